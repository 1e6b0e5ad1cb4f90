//! Which images are made of a recording.
//!
//! Owns: the choice. Invariant: it is a function of the recording and the seed, and spread over all of it.

use crate::image::Survival;
use crate::log::{Event, Mark};
use crate::prng::Prng;
use crate::stage::NODES;
use crate::traces::{Promised, Trace};

/// One image: the power goes just before the event at `place`.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub place: usize,
    pub node: usize,
    pub survival: Survival,
    pub promote: bool,
}

/// What an event is about.
fn inode(event: &Event) -> Option<u64> {
    match event {
        Event::Write { file, .. } | Event::Zero { file, .. } | Event::Size { file, .. } => Some(*file),
        Event::Sync { file } => Some(*file),
        Event::Name { dir, .. } | Event::SyncNames { dir } => Some(*dir),
        Event::Answered(_) | Event::Mark(_) => None,
    }
}

/// The places of the log at which something has just come to a node's disks, or was answered.
pub fn places(trace: &Trace, node: usize) -> Vec<usize> {
    let below = trace.recording.below(trace.recording.find(NODES[node]));
    let log = &trace.recording.log;
    let cause = |at: usize| if let Event::Answered(e) = log[at] { e } else { at };
    let ours = |at: &usize| inode(&log[cause(*at)]).is_some_and(|file| below.contains(&file));
    (0..log.len()).filter(ours).map(|at| at + 1).collect()
}

/// So many images, in the order of their places.
pub fn choose(trace: &Trace, promises: &[Promised], images: usize, seed: u64) -> Vec<Case> {
    let mut prng = Prng::new(seed);
    let nodes: Vec<_> = trace.nodes().into_iter().map(|node| (node, places(trace, node))).collect();
    let log = &trace.recording.log;
    // Where more is durable than before, and somebody may take that for all that he asked for.
    let settles = |at: &usize| match log[*at] {
        Event::Answered(e) => matches!(log[e], Event::Sync { .. } | Event::Write { fua: true, .. }),
        _ => false,
    };
    let settled: Vec<_> = (0..log.len()).filter(settles).map(|at| at + 1).collect();
    let is_urgent = |at: &usize| matches!(log[*at], Event::Write { fua: true, .. });
    let urgent: Vec<_> = (0..log.len()).filter(is_urgent).map(|at| at + 1).collect();
    let after = |places: &[usize], place: usize| {
        places.get(places.partition_point(|p| *p <= place)).copied().unwrap_or(place)
    };
    let is_kept = |at: &usize| matches!(log[*at], Event::Mark(Mark::Kept(_) | Mark::KeptThere(_)));
    let kept: Vec<_> = (0..log.len()).filter(is_kept).map(|at| at + 1).collect();
    let mut all = Vec::with_capacity(images);
    for i in 0..images {
        let (node, of) = &nodes[i % nodes.len()];
        // One in each part of the log, at a random place of it.
        let (from, to) = (i * of.len() / images, (i + 1) * of.len() / images);
        let place = of[from + prng.below((to - from) as u64) as usize];
        let (place, survival) = match prng.below(8) {
            0 => (place, Survival::Everything),
            1 | 2 => (after(&settled, place), Survival::Nothing),
            // Where most is promised and least is there.
            3 => (after(&kept, place), Survival::Nothing),
            // Where something has just come that is to be durable at once.
            4 => (after(&urgent, place), Survival::Torn(prng.next())),
            _ => (place, Survival::Random(prng.next())),
        };
        let promote = *node == 1 && prng.permille(500) && !promises[place].promoting;
        all.push(Case { place, node: *node, survival, promote });
    }
    all.sort_by_key(|c| c.place);
    all
}

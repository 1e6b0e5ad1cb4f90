//! Both sides of the comparison against each other, over images in memory.

use super::hash::{HashKey, Job, Product, UNKNOWN};
use super::source::{Purpose, Source, Task};
use super::target::Target;
use crate::disk::{aligned, freeze};
use crate::format::compare::{Compare, EXTENT, EXTENT_LEAVES, ExtentLeaves, LEAF, Root, WINDOW_LEAVES};
use crate::units::{Address, Extent, GroupId, Lsn, SECTOR};
use bytes::Bytes;
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};

/// An odd volume: its last extent, leaf and sector are not whole.
const SIZE: u64 = 5 * EXTENT + 2 * LEAF + 512;

fn extent(at: u64, len: u64) -> Extent {
    Extent::new(Address(at), len).unwrap()
}

/// No index.
fn unknown() -> Vec<Root> {
    vec![UNKNOWN; super::extents(extent(0, SIZE))]
}

fn key() -> HashKey {
    HashKey::of(GroupId([5; 16]))
}

/// What one of the two is at.
enum Pending {
    Read(u32, Purpose, Extent),
    Work(u32, Purpose, Job),
}

/// What comes from the primary, in order.
enum Sent {
    Word(Compare),
    Record(Lsn, Extent, u8),
}

/// What [`Pair::step`] may be told.
const STEPS: u8 = 7;

/// A primary and a shadow, and what is under way on each and between them.
struct Pair {
    source: Source,
    target: Target,
    theirs: Vec<u8>,
    ours: Vec<u8>,
    /// Received by the shadow and not applied: (LSN, where, what).
    records: VecDeque<(Lsn, Extent, u8)>,
    tail: Lsn,
    applied: Lsn,
    /// Accepted and in no record; how many were, and are in one.
    unsealed: VecDeque<(Extent, u8)>,
    accepted: usize,
    sealed: usize,
    /// The primary's image as of each of its records.
    images: BTreeMap<Lsn, Vec<u8>>,
    /// Windows to be confirmed when so many writes are in records.
    covers: VecDeque<(u32, usize)>,
    to_target: VecDeque<Sent>,
    to_source: VecDeque<Compare>,
    source_work: VecDeque<Pending>,
    target_work: VecDeque<Pending>,
    repairing: Option<Vec<(Extent, Option<Bytes>)>>,
    finished: Vec<super::target::Finished>,
}

fn cut(image: &[u8], e: Extent) -> Bytes {
    let mut buf = aligned(e.len() as usize);
    buf.extend_from_slice(&image[e.start() as usize..(e.start() + e.len()) as usize]);
    freeze(buf)
}

impl Pair {
    fn new(theirs: Vec<u8>, ours: Vec<u8>, verify: bool) -> Pair {
        Pair {
            source: Source::new(key()),
            target: Target::new(key(), verify, 1),
            images: BTreeMap::from([(Lsn(7), theirs.clone())]),
            unsealed: VecDeque::new(),
            accepted: 0,
            sealed: 0,
            covers: VecDeque::new(),
            theirs,
            ours,
            records: VecDeque::new(),
            tail: Lsn(7),
            applied: Lsn(7),
            to_target: VecDeque::new(),
            to_source: VecDeque::new(),
            source_work: VecDeque::new(),
            target_work: VecDeque::new(),
            repairing: None,
            finished: Vec::new(),
        }
    }

    fn open(&mut self) {
        let mut out = Vec::new();
        self.target.open(1, extent(0, SIZE), Vec::new(), false, &mut out);
        self.target_tasks(out);
    }

    fn source_tasks(&mut self, out: Vec<Task>) {
        for task in out {
            match task {
                Task::Say(word) => self.to_target.push_back(Sent::Word(word)),
                Task::Read(id, purpose, e) => self.source_work.push_back(Pending::Read(id, purpose, e)),
                Task::Work(id, purpose, job) => self.source_work.push_back(Pending::Work(id, purpose, job)),
                Task::Learn(window, roots) => {
                    for (i, root) in roots {
                        let e = super::extent_of(window, i).unwrap();
                        assert_eq!(root, super::hash::hash(&key(), &cut(&self.theirs, e)).roots[0], "{e:?}");
                    }
                }
                Task::Cover(window) => self.covers.push_back((window, self.accepted)),
            }
        }
        self.confirm();
    }

    fn confirm(&mut self) {
        while let Some((window, _)) = self.covers.pop_front_if(|(_, n)| *n <= self.sealed) {
            self.to_target.push_back(Sent::Word(Compare::Closed { window, lsn: self.tail }));
        }
    }

    fn target_tasks(&mut self, out: Vec<Task>) {
        for task in out {
            match task {
                Task::Say(word) => self.to_source.push_back(word),
                Task::Read(id, purpose, e) => self.target_work.push_back(Pending::Read(id, purpose, e)),
                Task::Work(id, purpose, job) => self.target_work.push_back(Pending::Work(id, purpose, job)),
                Task::Learn(..) | Task::Cover(..) => unreachable!("they are a primary's"),
            }
        }
    }

    /// A write on the primary.
    fn write(&mut self, e: Extent, byte: u8) {
        self.source.touch(e);
        self.theirs[e.start() as usize..(e.start() + e.len()) as usize].fill(byte);
        self.unsealed.push_back((e, byte));
        self.accepted += 1;
    }

    /// It becomes a record.
    fn seal(&mut self) -> bool {
        let Some((e, byte)) = self.unsealed.pop_front() else { return false };
        let mut image = self.images[&self.tail].clone();
        image[e.start() as usize..(e.start() + e.len()) as usize].fill(byte);
        self.tail = self.tail.next();
        self.sealed += 1;
        self.images.insert(self.tail, image);
        self.to_target.push_back(Sent::Record(self.tail, e, byte));
        self.confirm();
        true
    }

    fn apply(&mut self) {
        if self.repairing.is_some() {
            return;
        }
        if let Some((lsn, e, byte)) = self.records.pop_front() {
            self.ours[e.start() as usize..(e.start() + e.len()) as usize].fill(byte);
            self.applied = lsn;
        }
    }

    fn hear_target(&mut self, word: Compare) -> Result<(), &'static str> {
        let mut out = Vec::new();
        let heard = self.target.heard(word, &mut out);
        self.target_tasks(out);
        heard
    }

    fn hear_source(&mut self) -> Result<(), &'static str> {
        let Some(word) = self.to_source.pop_front() else { return Ok(()) };
        let mut out = Vec::new();
        let heard = match &word {
            Compare::Open { window, extent, wanted, quick } => {
                let (w, e, lsn) = (*window, *extent, self.tail);
                let newer = self.unsealed.iter().map(|(e, _)| *e);
                self.source.open(w, e, wanted, *quick, lsn, newer, unknown(), &mut out)
            }
            word => self.source.heard(word, &mut out),
        };
        self.source_tasks(out);
        heard
    }

    /// One step of the side that `who` says; whether there was anything to do.
    fn step(&mut self, who: u8) -> Result<bool, &'static str> {
        let mut out = Vec::new();
        match who {
            0 => match self.to_target.pop_front() {
                None => return Ok(false),
                Some(Sent::Word(word)) => self.hear_target(word)?,
                Some(Sent::Record(lsn, e, byte)) => {
                    self.target.touch(lsn, e);
                    self.records.push_back((lsn, e, byte));
                }
            },
            1 => {
                if self.to_source.is_empty() {
                    return Ok(false);
                }
                self.hear_source()?;
            }
            2 => match self.source_work.pop_front() {
                None => return Ok(false),
                Some(Pending::Read(id, purpose, e)) => {
                    let bytes = cut(&self.theirs, e);
                    self.source.read(id, purpose, bytes, &mut out);
                    self.source_tasks(out);
                }
                Some(Pending::Work(id, purpose, job)) => {
                    self.source.worked(id, purpose, job.run(), &mut out);
                    self.source_tasks(out);
                }
            },
            3 => match self.target_work.pop_front() {
                None => return Ok(false),
                Some(Pending::Read(id, purpose, e)) => {
                    let bytes = cut(&self.ours, e);
                    self.target.read(id, purpose, bytes, &mut out)?;
                    self.target_tasks(out);
                }
                Some(Pending::Work(id, purpose, job)) => {
                    self.target.worked(id, purpose, job.run(), &mut out)?;
                    self.target_tasks(out);
                }
            },
            4 => match self.repairing.take() {
                Some(batch) => {
                    for (e, bytes) in batch {
                        let to = &mut self.ours[e.start() as usize..(e.start() + e.len()) as usize];
                        match bytes {
                            Some(bytes) => to.copy_from_slice(&bytes),
                            None => to.fill(0),
                        }
                    }
                    self.target.written(&mut out);
                    self.target_tasks(out);
                }
                None if self.target.has_repairs() => {
                    self.repairing = Some(self.target.take_repairs(64 << 10))
                }
                None => return Ok(false),
            },
            5 => {
                if self.records.is_empty() {
                    return Ok(false);
                }
                self.apply();
            }
            _ => return Ok(self.seal()),
        }
        let mut more = Vec::new();
        self.target.applied(self.applied, |_| unknown(), &mut more);
        self.target_tasks(more);
        for window in self.target.take_finished() {
            for (i, root) in &window.learned {
                let e = super::extent_of(extent(0, SIZE), *i).unwrap();
                assert_eq!(*root, super::hash::hash(&key(), &cut(&self.ours, e)).roots[0], "{e:?}");
            }
            self.finished.push(window);
        }
        Ok(true)
    }

    /// Until nothing more happens.
    fn finish(&mut self) -> Result<(), &'static str> {
        loop {
            let mut moved = false;
            for who in 0..STEPS {
                moved |= self.step(who)?;
            }
            if !moved {
                return Ok(());
            }
        }
    }
}

fn images() -> (Vec<u8>, Vec<u8>) {
    let mut theirs = vec![0; SIZE as usize];
    blake3::Hasher::new().update(b"image").finalize_xof().fill(&mut theirs[..3 * EXTENT as usize]);
    (theirs.clone(), theirs)
}

proptest! {
    /// Whatever is written meanwhile, in whatever order things happen: in the end they are equal, what
    /// differed is named, and nothing else is.
    #[test]
    fn what_differs_is_repaired_and_nothing_else(
        spoilt in prop::collection::vec(0..SIZE, 0..12),
        writes in prop::collection::vec((0u64..SIZE / SECTOR, 1u64..40, any::<u8>()), 0..20),
        steps in prop::collection::vec(0u8..9, 0..400),
        verify in any::<bool>(),
    ) {
        let (theirs, mut ours) = images();
        for at in &spoilt {
            ours[*at as usize] ^= 0x55;
        }
        let different: Vec<u64> = (0..SIZE.div_ceil(LEAF)).filter(|leaf| {
            let range = (leaf * LEAF) as usize..((leaf + 1) * LEAF).min(SIZE) as usize;
            theirs[range.clone()] != ours[range]
        }).collect();
        let mut pair = Pair::new(theirs, ours, verify);
        let mut writes = writes.into_iter();
        pair.open();
        for who in steps {
            if who >= STEPS {
                if let Some((sector, sectors, byte)) = writes.next() {
                    let len = (sectors * SECTOR).min(SIZE - sector * SECTOR);
                    pair.write(extent(sector * SECTOR, len), byte);
                }
            } else {
                prop_assert_eq!(pair.step(who).map(drop), Ok(()));
            }
            // From now on the link may be gone for good.
            if !verify && pair.target.is_idle() {
                prop_assert!(pair.ours == pair.images[&pair.applied], "equal as of LSN {}", pair.applied);
            }
        }
        prop_assert_eq!(pair.finish(), Ok(()));
        prop_assert_eq!(pair.finished.len(), 1, "the window has ended");
        prop_assert!(pair.source.is_idle());
        let named: Vec<u64> = pair.finished[0].different.iter().flat_map(|e| {
            (e.start() / LEAF..(e.start() + e.len()).div_ceil(LEAF)).collect::<Vec<_>>()
        }).collect();
        for leaf in &named {
            prop_assert!(different.contains(leaf), "leaf {} is no difference", leaf);
        }
        if !verify {
            prop_assert!(pair.ours == pair.theirs, "they are equal now");
        }
    }
}

/// Runs a comparison in which `change` alters what the primary says; the refusal, and our image afterwards.
fn lied_to(change: impl Fn(&mut Compare)) -> (Result<(), &'static str>, bool) {
    let (theirs, mut ours) = images();
    ours[3 * LEAF as usize + 100] ^= 1;
    ours[20 * LEAF as usize] ^= 1;
    let before = ours.clone();
    let mut pair = Pair::new(theirs, ours, false);
    pair.open();
    let outcome = loop {
        if let Some(Sent::Word(word)) = pair.to_target.front_mut() {
            change(word);
        }
        let mut moved = false;
        let refused = (0..STEPS).find_map(|who| match pair.step(who) {
            Ok(m) => {
                moved |= m;
                None
            }
            Err(why) => Some(why),
        });
        match refused {
            Some(why) => break Err(why),
            None if !moved => break Ok(()),
            None => {}
        }
    };
    (outcome, pair.ours == before)
}

#[test]
fn a_primary_that_lies_is_refused_and_nothing_is_written() {
    assert_eq!(lied_to(|_| {}), (Ok(()), false), "an honest one");
    let refused = |what: &str, change: &dyn Fn(&mut Compare)| {
        let (outcome, untouched) = lied_to(change);
        assert!(outcome.is_err(), "{what}: it was believed");
        assert!(untouched, "{what}: something was written");
    };
    refused("other bytes than it hashed", &|w| {
        if let Compare::Data { payload, touched, .. } = w {
            let raw = vec![7; touched.len() * LEAF as usize];
            *payload = zstd::bulk::compress(&raw, 1).unwrap().into();
        }
    });
    refused("more bytes than were asked for", &|w| {
        if let Compare::Data { payload, touched, .. } = w {
            *payload = zstd::bulk::compress(&vec![7; (touched.len() + 1) * LEAF as usize], 1).unwrap().into();
        }
    });
    refused("no bytes at all", &|w| {
        if let Compare::Data { payload, .. } = w {
            *payload = Bytes::new();
        }
    });
    refused("a batch of another shape", &|w| {
        if let Compare::Data { touched, .. } = w {
            touched.push(0);
        }
    });
    refused("a batch that was not asked for", &|w| {
        if let Compare::Data { batch, .. } = w {
            *batch += 1;
        }
    });
    refused("a window that is not open", &|w| {
        if let Compare::At { window, .. } = w {
            *window += 1;
        }
    });
    refused("a bitmap of another length", &|w| {
        if let Compare::Root { touched, .. } = w {
            touched.push(0);
        }
    });
    refused("rot outside of the window", &|w| {
        if let Compare::Root { rotten, .. } = w {
            rotten.push(5000);
        }
    });
    refused("more roots than there are extents", &|w| {
        if let Compare::Roots { roots, .. } = w {
            roots.push([0; 16]);
        }
    });
    refused("an oversized tree", &|w| {
        if let Compare::Leaves { extents, .. } = w {
            let more = ExtentLeaves {
                index: 511,
                touched: [0; EXTENT_LEAVES],
                hashes: [0; EXTENT_LEAVES],
                rotten: false,
            };
            extents.extend(std::iter::repeat_n(more, WINDOW_LEAVES / EXTENT_LEAVES));
        }
    });
    refused("a shadow's word", &|w| {
        if let Compare::Root { .. } = w {
            *w = Compare::AskRoots { window: 1 };
        }
    });
}

/// Lies about hashes that lead nowhere cost work, and change nothing.
#[test]
fn a_lie_about_hashes_alone_changes_nothing() {
    for wrong in [1u64, u64::MAX] {
        let (outcome, untouched) = lied_to(|w| {
            if let Compare::Leaves { extents, .. } = w {
                extents.iter_mut().for_each(|e| e.hashes.iter_mut().for_each(|h| *h = wrong));
            }
        });
        assert!(outcome.is_err() && untouched, "the bytes have other hashes");
    }
}

#[test]
fn a_shadow_that_asks_for_what_it_may_not_is_refused() {
    let source = || {
        let (theirs, ours) = images();
        let mut pair = Pair::new(theirs, ours, false);
        pair.open();
        pair.finish().unwrap();
        let mut out = Vec::new();
        pair.source
            .open(9, extent(0, SIZE), &[], false, Lsn(7), std::iter::empty(), unknown(), &mut out)
            .unwrap();
        pair.source_tasks(out);
        pair.to_target.clear();
        while let Some(work) = pair.source_work.pop_front() {
            let mut out = Vec::new();
            match work {
                Pending::Read(id, purpose, e) => {
                    let bytes = cut(&pair.theirs, e);
                    pair.source.read(id, purpose, bytes, &mut out);
                }
                Pending::Work(id, purpose, job) => pair.source.worked(id, purpose, job.run(), &mut out),
            }
            pair.source_tasks(out);
        }
        pair.source
    };
    let window = 9;
    let heard = |word: Compare| source().heard(&word, &mut Vec::new());
    assert!(heard(Compare::AskRoots { window }).is_ok());
    assert!(heard(Compare::AskRoots { window: 8 }).is_err(), "not open");
    assert!(heard(Compare::AskLeaves { window, extents: vec![0, 5] }).is_ok());
    assert!(heard(Compare::AskLeaves { window, extents: vec![6] }).is_err(), "outside");
    assert!(heard(Compare::AskLeaves { window, extents: vec![2, 2] }).is_err(), "twice");
    let leaves = SIZE.div_ceil(LEAF) as u16;
    let ask = |runs: Vec<(u16, u16)>| heard(Compare::AskData { window, batch: 0, runs });
    assert!(ask(vec![(0, 1), (leaves - 1, 1)]).is_ok());
    assert!(ask(vec![(leaves - 1, 2)]).is_err(), "outside");
    assert!(ask(vec![(0, 0)]).is_err() && ask(vec![]).is_err(), "nothing");
    assert!(ask(vec![(4, 1), (4, 1)]).is_err() && ask(vec![(4, 1), (3, 1)]).is_err(), "not ascending");
    assert!(heard(Compare::Close { window: 1 }).is_err() && heard(Compare::Close { window }).is_ok());
    assert!(heard(Compare::At { window, lsn: Lsn(1) }).is_err(), "a primary's word");
    let mut s = source();
    let mut out = Vec::new();
    let mut open =
        |n| s.open(n, extent(0, SIZE), &[], false, Lsn(7), std::iter::empty(), unknown(), &mut out);
    assert!(open(9).is_err(), "open already");
    assert_eq!((10..600).filter(|n| open(*n).is_ok()).count(), super::MAX_OPEN - 1);
}

#[test]
fn an_answer_for_a_window_that_was_closed_is_not_that_of_the_next() {
    let (theirs, ours) = images();
    let mut pair = Pair::new(theirs, ours, false);
    let mut out = Vec::new();
    let none = std::iter::empty::<Extent>;
    pair.source.open(1, extent(0, SIZE), &[], false, Lsn(7), none(), unknown(), &mut out).unwrap();
    let old: BTreeMap<u32, (Purpose, Extent)> = out
        .drain(..)
        .filter_map(|t| if let Task::Read(id, p, e) = t { Some((id, (p, e))) } else { None })
        .collect();
    pair.source.heard(&Compare::Close { window: 1 }, &mut out).unwrap();
    pair.source.open(1, extent(0, SIZE), &[], false, Lsn(7), none(), unknown(), &mut out).unwrap();
    for (id, (purpose, e)) in old {
        let mut late = Vec::new();
        pair.source.read(id, purpose, Bytes::from(vec![0; e.len() as usize]), &mut late);
        assert!(!late.iter().any(|t| matches!(t, Task::Work(..))), "nobody wants it any more");
        let product = Product::Hashed(super::hash::Hashes::default());
        pair.source.worked(id, purpose, product, &mut late);
    }
}

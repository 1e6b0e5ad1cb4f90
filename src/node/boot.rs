//! From nothing to a node that knows its journal: superblock, dirty maps, recovery.
//!
//! Owns: the checks that what is on disk is what the configuration says. Invariants: nothing is
//! written before all of them have passed, except what recovery erases behind a torn tail; what was read
//! of the superblock is durable before anything is made of it (the last write of a killed process may be
//! in the disk's cache alone, and a power cut would take it back, or tear it together with the next one).

use super::config::NodeConfig;
use super::marks::{Mark, Marks};
use super::{JOURNAL_RECOVERY, SUPER};
use crate::apply::backlog::Backlog;
use crate::disk::{DiskOp, DiskRequest, DiskResult, File, Memory, Token};
use crate::format::mapped::Owner;
use crate::format::message::{Opening, Role};
use crate::format::record::{Kind, Record, flags, origin};
use crate::format::superblock::{MapRange, ResyncStage, SLOT, Superblock};
use crate::journal::maps::Maps;
use crate::journal::recovery::{Outcome, Recovered, Recovery};
use crate::resync::index::Index;
use crate::role;
use crate::units::{HistoryPoint, Lsn};
use bytes::Bytes;
use std::collections::VecDeque;

/// A node that is starting.
pub struct Boot {
    memory: Option<(Box<dyn Memory>, Box<dyn Memory>)>,
    slots: [Option<Bytes>; 2],
    synced: bool,
    found: Option<Found>,
}

/// After the slots' numbers.
const SYNC: u64 = 2;

/// What the superblock led to.
struct Found {
    slot: usize,
    sb: Superblock,
    recovery: Recovery,
    maps: Maps,
    index: Index,
    marks: VecDeque<Mark>,
    backlog: Backlog,
    /// It said already that this node is outdated.
    outdated: bool,
    unproved: Unproved,
}

/// What the superblock says of records after the checkpoint. They may be gone with a torn tail, and others in their
/// place: only what the journal shows again is this history's past.
struct Unproved {
    runs: Vec<Opening>,
    /// Where dirty maps begin.
    boundaries: Vec<HistoryPoint>,
}

impl Unproved {
    /// Takes the runs out of what the superblock lists.
    fn take(openings: &mut Vec<Opening>, maps: &[MapRange], checkpoint: Lsn) -> Unproved {
        let runs = openings.extract_if(.., |o| o.at.lsn > checkpoint).collect();
        let boundaries = maps.iter().map(|r| r.from).filter(|p| p.lsn > checkpoint).collect();
        Unproved { runs, boundaries }
    }

    /// That record is there, so the runs that begin after it did begin there: each has its number, though a later run's
    /// record may be all that the journal has of them (another node may have got one of theirs). A run that a record
    /// opens is noted by that, too.
    fn met(&mut self, point: HistoryPoint, openings: &mut Vec<Opening>) {
        self.boundaries.retain(|b| *b != point);
        let begun = self.runs.extract_if(.., |o| o.at == point);
        begun.for_each(|o| role::note_opening(openings, o.generation, o.at));
    }

    /// All that the journal has was met.
    fn settle(self, maps: &mut Maps) {
        if let Some(first) = self.boundaries.iter().map(|b| b.lsn).min() {
            maps.rewind(first.prev());
        }
    }
}

/// What boot ends with.
pub struct Booted {
    /// The superblock, with what the records after the checkpoint add to it.
    pub sb: Superblock,
    /// The slot that held it.
    pub slot: usize,
    /// The dirty maps.
    pub maps: Maps,
    /// The hash index.
    pub index: Index,
    /// The marks after the checkpoint.
    pub marks: VecDeque<Mark>,
    /// The records after it.
    pub backlog: Backlog,
    /// The journal's end.
    pub recovered: Recovered,
}

impl Boot {
    /// Begins: reads both slots, and makes them durable.
    pub fn new(maps: Box<dyn Memory>, index: Box<dyn Memory>, out: &mut Vec<DiskRequest>) -> Boot {
        for slot in 0..2u64 {
            let op = DiskOp::Read { offset: slot * SLOT as u64, len: SLOT };
            out.push(DiskRequest { token: Token::new(SUPER, slot), file: File::Superblock, op });
        }
        out.push(DiskRequest { token: Token::new(SUPER, SYNC), file: File::Superblock, op: DiskOp::Sync });
        Boot { memory: Some((maps, index)), slots: [None, None], synced: false, found: None }
    }

    /// The answer to one of its requests; `Some` when it ends.
    pub fn complete(
        &mut self,
        cfg: &NodeConfig,
        token: Token,
        result: DiskResult,
        out: &mut Vec<DiskRequest>,
    ) -> Option<Result<Booted, String>> {
        if token.owner() == SUPER {
            return self.superblock(cfg, token.id(), result, out).err().map(Err);
        }
        let Found { sb, recovery, maps, marks, backlog, unproved, .. } = self.found.as_mut()?;
        let mut seen = |r: &Record, offset| {
            note(sb, maps, r);
            unproved.met(r.point(), &mut sb.openings);
            Marks::find(marks, r);
            backlog.push(r, offset);
        };
        match recovery.complete(token.id(), result, &mut seen, out)? {
            Outcome::Stopped(text) => Some(Err(text)),
            Outcome::Differs => Some(Err(
                "the journal does not lead to the record to which it is to be cut back: it is damaged. What was to be \
                 cut off is in the salvage file; promote another node"
                    .into(),
            )),
            Outcome::Found(recovered) => {
                let Found { slot, mut sb, mut maps, index, marks, backlog, outdated, unproved, .. } =
                    self.found.take()?;
                if recovered.tail.point.lsn == sb.checkpoint.lsn {
                    sb.checkpoint = recovered.tail.point;
                }
                unproved.settle(&mut maps);
                if let Some(cut) = sb.cut {
                    maps.rewind(cut.lsn);
                }
                if !outdated && sb.sync_set.contains(&sb.node) {
                    // Read again were records from before those that the superblock knew of.
                    sb.outdated.retain(|n| *n != sb.node);
                }
                if sb.role == Role::Primary {
                    // The record that names this node as a member is from before its promotion.
                    sb.sync_set.retain(|n| *n != sb.node);
                }
                Some(Ok(Booted { sb, slot, maps, index, marks, backlog, recovered: *recovered }))
            }
        }
    }

    fn superblock(
        &mut self,
        cfg: &NodeConfig,
        id: u64,
        result: DiskResult,
        out: &mut Vec<DiskRequest>,
    ) -> Result<(), String> {
        let what = if id == SYNC { "syncing" } else { "reading" };
        let bytes = result.map_err(|e| {
            format!("{what} the superblock failed: {e}. Check the disk that holds it; nothing was changed")
        })?;
        match id {
            SYNC => self.synced = true,
            slot => self.slots[slot as usize] = Some(bytes),
        }
        let ([Some(a), Some(b)], true) = (&self.slots, self.synced) else { return Ok(()) };
        let (slot, mut sb) = Superblock::choose([a, b]).map_err(|[a, b]| {
            format!(
                "both superblock slots are unreadable (first: {a}; second: {b}). Nothing was changed. \
                 Restore the file from a copy, or join this node anew as a shadow"
            )
        })?;
        check(cfg, &sb)?;
        let origin = origin(sb.group);
        if sb.checkpoint.lsn == Lsn(0) {
            sb.checkpoint = HistoryPoint { lsn: Lsn(0), hash: origin };
        }
        let volumes: Vec<_> = sb.volumes.iter().map(|v| (v.number, v.size)).collect();
        let (memory, index) = self.memory.take().expect("slots are read once");
        let id = Owner { group: sb.group, node: sb.node, number: sb.maps_id };
        // No superblock that was ever written had this sequence.
        let renewed = Owner { number: sb.sequence + 1, ..id };
        let maps = Maps::new(memory, &volumes, sb.maps.clone(), sb.checkpoint, (id, renewed))?;
        (sb.maps, sb.maps_id) = (maps.ranges().to_vec(), maps.number());
        let mut index = Index::new(index, &volumes, Owner { number: sb.maps_id, ..id })?;
        if let Some(from) = repairing(&sb) {
            // The index may not know durably what was written there.
            index.forget_from(from);
        }
        // Promoted as of that record: whatever else is in the journal was given up.
        let mut recovery = match sb.cut {
            Some(cut) => Recovery::compare(JOURNAL_RECOVERY, &sb, origin, cut),
            None => Recovery::new(JOURNAL_RECOVERY, &sb, origin),
        };
        recovery.start(out);
        let unproved = Unproved::take(&mut sb.openings, &sb.maps, sb.checkpoint.lsn);
        let (marks, backlog) = (VecDeque::new(), Backlog::default());
        let outdated = sb.outdated.contains(&sb.node);
        self.found = Some(Found { slot, sb, recovery, maps, index, marks, backlog, outdated, unproved });
        Ok(())
    }
}

/// From which position on a comparison may have been writing into the backings.
fn repairing(sb: &Superblock) -> Option<u64> {
    let copying = sb.resync.as_ref().filter(|r| r.stage == ResyncStage::Copying).map(|r| r.progress);
    copying.or(sb.comparison.filter(|c| !c.verify).map(|c| c.progress))
}

/// A record after the checkpoint: its extents are dirty, and it may change what the superblock says.
pub fn note(sb: &mut Superblock, maps: &mut Maps, record: &Record) {
    for (extent, _) in record.extents() {
        maps.mark(extent);
    }
    let stamp = &record.stamp;
    if stamp.flags & flags::OPENS != 0 {
        let at = HistoryPoint { lsn: stamp.lsn.prev(), hash: stamp.prev };
        role::note_opened(&mut sb.openings, stamp.generation, at);
    }
    if stamp.kind == Kind::SyncSet
        && let Some(members) = record.members()
    {
        // Who leaves in the middle of a run was lost. Of itself a shadow unlearns that from its primary alone: the record
        // with which it enters is here before FLUSH waits for it.
        if stamp.flags & flags::OPENS == 0 {
            let left = sb.sync_set.iter().filter(|n| !members.contains(n));
            left.for_each(|n| role::note_outdated(&mut sb.outdated, *n));
        }
        let (own, opener) = (sb.node, stamp.generation.term.node);
        sb.outdated.retain(|n| *n != opener && (*n == own || !members.contains(n)));
        sb.sync_set = members;
    }
    if sb.role == Role::Shadow {
        sb.generation = stamp.generation;
        sb.limit = sb.limit.max(stamp.durable);
    }
}

fn check(cfg: &NodeConfig, sb: &Superblock) -> Result<(), String> {
    if sb.group != cfg.group || sb.node != cfg.node {
        return Err(format!(
            "the superblock is of group {:?}, node {:?}, but the configuration says group {:?}, node {:?}: \
             the state directory belongs to something else",
            sb.group, sb.node, cfg.group, cfg.node
        ));
    }
    let known: Vec<_> = sb.volumes.iter().map(|v| (v.number, v.size)).collect();
    let given: Vec<_> = cfg.volumes.iter().map(|v| (v.number, v.size)).collect();
    if known != given {
        return Err(format!(
            "the volumes' (number, bytes) are {given:?} but the group was made with {known:?}: \
             give every backing the size that it had"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::maps::{GRANULE, maps_len};
    use crate::units::{Address, Extent, Generation, GroupId, Hash, NodeId, Term};

    fn point(lsn: u64, hash: u8) -> HistoryPoint {
        HistoryPoint { lsn: Lsn(lsn), hash: Hash([hash; 32]) }
    }

    fn run(start: u32, at: HistoryPoint) -> Opening {
        let term = Term { counter: 1, node: NodeId(9) };
        Opening { generation: Generation { term, start }, at }
    }

    /// A shadow had a superblock written that names records which were not durable in its journal.
    #[test]
    fn what_went_with_a_torn_tail_is_nobodys_past() {
        let sizes = [(0u8, 8 * GRANULE)];
        let id = Owner { group: GroupId([3; 16]), node: NodeId(4), number: 1 };
        let granule = |n| Extent::new(Address(n * GRANULE), GRANULE).unwrap();
        // Tail, the records met after the checkpoint at 7, runs and boundaries that are left.
        type Case<'a> = (HistoryPoint, &'a [HistoryPoint], &'a [u64], &'a [u64]);
        let cases: [Case; 5] = [
            (point(60, 1), &[point(45, 1), point(60, 1)], &[0], &[0, 45]),
            (point(49, 1), &[point(45, 1), point(49, 1)], &[0, 49], &[0, 45]),
            // Another run's record came after it.
            (point(50, 1), &[point(45, 1), point(49, 1), point(50, 1)], &[0, 49], &[0, 45]),
            (point(37, 1), &[point(37, 1)], &[0], &[0]),
            // Other records are in their place.
            (point(49, 2), &[point(45, 2), point(49, 2)], &[0], &[0]),
        ];
        for (tail, met, runs, boundaries) in cases {
            let memory = Box::new(vec![0; maps_len(&sizes) as usize]);
            let mut maps = Maps::new(memory, &sizes, Vec::new(), point(0, 0), (id, id)).unwrap();
            maps.mark(granule(1));
            maps.rotate(point(45, 1));
            maps.mark(granule(2));
            let mut openings = vec![run(1, point(0, 0)), run(2, point(49, 1))];
            let mut unproved = Unproved::take(&mut openings, maps.ranges(), Lsn(7));
            met.iter().for_each(|p| unproved.met(*p, &mut openings));
            unproved.settle(&mut maps);
            assert_eq!(openings.iter().map(|o| o.at.lsn.0).collect::<Vec<_>>(), runs, "{tail:?}");
            assert_eq!(
                maps.ranges().iter().map(|r| r.from.lsn.0).collect::<Vec<_>>(),
                boundaries,
                "{tail:?}"
            );
            let both = Extent::new(granule(1).address(), 2 * GRANULE).unwrap();
            assert_eq!(maps.since(Lsn(20)), [both], "no bit is lost");
        }
    }
}

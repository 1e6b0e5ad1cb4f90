//! A window, as the shadow has it.
//!
//! Owns: what is known of it on both sides. Invariant: what is called different, or asked for, has no sector
//! that a record may have written since.

use super::hash::{Hashes, UNKNOWN};
use super::leaves::{Leaves, Wanted};
use super::source::Task;
use super::touched::{Touched, whole};
use super::{CHUNK, leaves, part, runs};
use crate::format::compare::{Compare, EXTENT, EXTENT_LEAVES, ExtentLeaves, Root, WINDOW_EXTENTS};
use crate::units::{Extent, Lsn};
use bytes::Bytes;
use std::collections::{BTreeMap, VecDeque};

/// Where a window stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    /// The roots are awaited, theirs or ours.
    Rooting,
    /// The primary's extent roots are awaited.
    Listing,
    /// Its leaves (and those of ours that were not read) are awaited.
    Leafing,
    /// Bytes are awaited or being repaired.
    Filling,
}

/// Why the bytes of a leaf are asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Want {
    /// It differs; theirs has this hash.
    Other(u64),
    /// It may differ: ours has to be looked at first.
    Look,
}

/// Leaves that are asked for together.
pub(super) struct Batch {
    pub(super) leaves: Vec<(usize, Want)>,
    pub(super) own: BTreeMap<usize, Bytes>,
    pub(super) own_missing: usize,
    pub(super) touched: Option<Vec<u8>>,
    pub(super) data: Option<(Bytes, Vec<u64>)>,
}

/// See the module's documentation.
pub(super) struct Window {
    pub(super) extent: Extent,
    pub(super) touched: Touched,
    pub(super) wanted: Wanted,
    pub(super) lsn: Option<Lsn>,
    pub(super) quick: bool,
    pub(super) begun: bool,
    pub(super) roots: Vec<Root>,
    pub(super) indexed: Vec<Root>,
    pub(super) leaves: Leaves,
    pub(super) chunks: VecDeque<(usize, usize)>,
    pub(super) hashing: usize,
    pub(super) theirs: Option<(Vec<u8>, Root)>,
    pub(super) their_rotten: Vec<u16>,
    pub(super) their_roots: Vec<Root>,
    pub(super) stage: Stage,
    pub(super) asked: Vec<u16>,
    pub(super) their_leaves: Option<Vec<ExtentLeaves>>,
    pub(super) need: VecDeque<(usize, Want)>,
    pub(super) batches: BTreeMap<u32, Batch>,
    pub(super) next_batch: u32,
    pub(super) repairing: usize,
    pub(super) different: Vec<usize>,
    pub(super) skipped: u64,
}

impl Window {
    /// Its LSN is in the image: what is not known is to be read.
    pub(super) fn begin(&mut self, indexed: Vec<Root>) {
        self.begun = true;
        let count = self.wanted.len();
        self.roots = if self.quick { self.wanted.only(indexed.clone()) } else { vec![UNKNOWN; count] };
        self.chunks = self.wanted.reads(self.quick, &indexed);
        self.indexed = indexed;
        let read = self.chunks.iter().filter_map(|(first, n)| part(self.extent, EXTENT, *first, *n));
        self.skipped = self.extent.len() - read.map(Extent::len).sum::<u64>();
    }

    /// Whether a record (here) or an accepted write (there) has touched an extent that counts.
    pub(super) fn is_touched(&self, i: usize) -> bool {
        let theirs = self.theirs.as_ref().is_some_and(|(touched, _)| touched[i / 8] >> (i % 8) & 1 == 1);
        self.wanted.has(i) && (theirs || self.touched.is_touched(i))
    }

    pub(super) fn descend(&mut self, number: u32, doubtful: Vec<u16>, out: &mut Vec<Task>) {
        debug_assert!(doubtful.len() <= WINDOW_EXTENTS);
        if doubtful.is_empty() {
            self.stage = Stage::Filling;
            return;
        }
        let lacking = |i: usize| doubtful.binary_search(&(i as u16)).is_ok() && !self.leaves.has(i);
        self.chunks.extend(runs(self.wanted.len(), (CHUNK / EXTENT) as usize, lacking));
        self.stage = Stage::Leafing;
        self.asked.clone_from(&doubtful);
        out.push(Task::Say(Compare::AskLeaves { window: number, extents: doubtful }));
    }

    pub(super) fn hashed(&mut self, first: usize, hashes: &Hashes) {
        self.hashing -= 1;
        self.leaves.put(self.extent, first, hashes);
        self.roots[first..first + hashes.roots.len()].copy_from_slice(&hashes.roots);
    }

    /// Which leaves of an extent are wanted: those that differ, and those that were partly written.
    pub(super) fn compare_extent(&mut self, theirs: &ExtentLeaves, verify: bool) {
        let index = usize::from(theirs.index);
        let first = index * EXTENT_LEAVES;
        let last = (first + EXTENT_LEAVES).min(leaves(self.extent));
        if theirs.rotten && !self.their_rotten.contains(&theirs.index) {
            self.their_rotten.push(theirs.index);
        }
        let before = (self.need.len(), self.different.len());
        let mut touched_any = false;
        for leaf in first..last {
            let touched = theirs.touched[leaf - first] | self.touched.leaf(leaf);
            touched_any |= touched != 0;
            if touched & whole(self.extent, leaf) == whole(self.extent, leaf) {
                continue; // all of it comes by record
            }
            if touched != 0 {
                self.need.push_back((leaf, Want::Look));
            } else if theirs.hashes[leaf - first] != self.leaves.hash(leaf) {
                self.different.push(leaf);
                if !verify && !self.their_rotten.contains(&theirs.index) {
                    self.need.push_back((leaf, Want::Other(theirs.hashes[leaf - first])));
                }
            }
        }
        // The roots cover whole hashes: where no short one differs, all leaves are looked at.
        let listed = self.their_roots.get(index);
        let same = (self.need.len(), self.different.len()) == before;
        let believed = !touched_any && !self.their_rotten.contains(&theirs.index);
        if same && believed && listed.is_some_and(|root| *root != self.roots[index]) {
            self.need.extend((first..last).map(|leaf| (leaf, Want::Look)));
        }
    }
}

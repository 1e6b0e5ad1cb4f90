//! Comparing a shadow's image with its primary's, and repairing what differs, while both are written.
//!
//! A window is compared at one definite LSN: the primary's journal tail when it was opened. From then on
//! both sides remember which sectors were *touched* by later writes: the primary by those it accepts, the
//! shadow by the records it receives. What neither has touched has the same bytes at that LSN and now, so
//! it can be compared, and repaired, without stopping anybody; what was touched comes by record.
//!
//! Owns: `hash` the tree over a window, `index` its kept roots, `leaves` what is wanted and read of a window, `touched` the masks, `source` the primary's side, `target` the
//! shadow's with its `window`s, `plan` which windows there are, and the pace. Invariants: no sector that a record may have
//! changed since the window was opened is called different or repaired (I1, I9); memory is bounded by the
//! windows in flight and the bytes asked for.

pub mod hash;
pub mod index;
mod leaves;
pub mod plan;
pub mod source;
pub mod target;
pub mod touched;
mod window;

use crate::format::compare::{EXTENT, LEAF};
use crate::units::Extent;

/// Windows that a shadow may have open at once.
pub const MAX_OPEN: usize = 256;
/// And has, when all of them are read: more would wait for the disks.
pub const FULL_OPEN: usize = 16;
/// Bytes of one read of a volume.
pub const CHUNK: u64 = 1 << 20;
/// Bytes of such reads in flight on one side.
pub const READING: u64 = 8 << 20;

/// Extents of a window.
pub fn extents(window: Extent) -> usize {
    window.len().div_ceil(EXTENT) as usize
}

/// Leaves of a window.
pub fn leaves(window: Extent) -> usize {
    window.len().div_ceil(LEAF) as usize
}

/// The part of `window` that lies in the units (of `size` bytes) `first` to `first + count`.
pub fn part(window: Extent, size: u64, first: usize, count: usize) -> Option<Extent> {
    let start = window.start() + first as u64 * size;
    let end = (start + count as u64 * size).min(window.start() + window.len());
    Extent::between(start, end)
}

/// An extent of a window, by its number.
pub fn extent_of(window: Extent, number: usize) -> Option<Extent> {
    part(window, EXTENT, number, 1)
}

/// Runs of the units that `pick` chooses, each at most `most` long.
pub fn runs(count: usize, most: usize, pick: impl Fn(usize) -> bool) -> Vec<(usize, usize)> {
    let mut found: Vec<(usize, usize)> = Vec::new();
    for i in (0..count).filter(|i| pick(*i)) {
        match found.last_mut() {
            Some((first, n)) if *first + *n == i && *n < most => *n += 1,
            _ => found.push((i, 1)),
        }
    }
    found
}

#[cfg(test)]
mod tests;

//! Which extents of a window are wanted, and the hashes of the leaves of those that were read.
//!
//! Owns: both. Invariant: nothing is allocated for what is not asked for: most windows of a quick comparison
//! are over before anything of them is read.

use super::hash::{Hashes, UNKNOWN};
use super::{CHUNK, leaves, runs};
use crate::format::compare::{EXTENT, EXTENT_LEAVES, Root};
use crate::units::Extent;
use std::collections::VecDeque;

/// The extents of a window that are to be compared.
#[derive(Debug)]
pub struct Wanted {
    /// A bit for each; empty: all.
    bits: Vec<u8>,
    count: usize,
}

impl Wanted {
    /// Of a window with `count` extents.
    pub fn new(bits: Vec<u8>, count: usize) -> Wanted {
        Wanted { bits, count }
    }

    /// All extents, wanted or not.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether this one is wanted.
    pub fn has(&self, i: usize) -> bool {
        i < self.count
            && (self.bits.is_empty() || self.bits.get(i / 8).is_some_and(|b| b >> (i % 8) & 1 == 1))
    }

    /// Bits of extents, without those that are not wanted.
    pub fn of(&self, mut bits: Vec<u8>) -> Vec<u8> {
        if !self.bits.is_empty() {
            let wanted = self.bits.iter().copied().chain(std::iter::repeat(0));
            bits.iter_mut().zip(wanted).for_each(|(b, w)| *b &= w);
        }
        bits
    }

    /// Roots, without those that are not wanted.
    pub fn only(&self, mut roots: Vec<Root>) -> Vec<Root> {
        if !self.bits.is_empty() {
            let others = roots.iter_mut().enumerate().filter(|(i, _)| !self.has(*i));
            others.for_each(|(_, root)| *root = UNKNOWN);
        }
        roots
    }

    /// What is to be read: (first extent, how many). With `quick` only what the index does not know.
    pub fn reads(&self, quick: bool, indexed: &[Root]) -> VecDeque<(usize, usize)> {
        let read = |i: usize| self.has(i) && !(quick && indexed[i] != UNKNOWN);
        runs(self.count, (CHUNK / EXTENT) as usize, read).into()
    }
}

/// The leaves that were read.
#[derive(Debug, Default)]
pub struct Leaves {
    hashes: Vec<u64>,
    read: Vec<bool>,
}

impl Leaves {
    /// Whether an extent was read.
    pub fn has(&self, extent: usize) -> bool {
        self.read.get(extent) == Some(&true)
    }

    /// The extents that were read.
    pub fn read(&self) -> impl Iterator<Item = usize> {
        self.read.iter().enumerate().filter(|(_, read)| **read).map(|(i, _)| i)
    }

    /// A leaf's hash; 0 where it was not read.
    pub fn hash(&self, leaf: usize) -> u64 {
        self.hashes.get(leaf).copied().unwrap_or(0)
    }

    /// The extents of `window` from `first` on were read.
    pub fn put(&mut self, window: Extent, first: usize, hashes: &Hashes) {
        if self.hashes.is_empty() {
            self.hashes = vec![0; leaves(window)];
            self.read = vec![false; leaves(window).div_ceil(EXTENT_LEAVES)];
        }
        let at = first * EXTENT_LEAVES;
        self.hashes[at..at + hashes.leaves.len()].copy_from_slice(&hashes.leaves);
        self.read[first..first + hashes.roots.len()].fill(true);
    }
}

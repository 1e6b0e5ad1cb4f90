//! The numbers that volrep speaks in: addresses, extents, LSNs, terms, identities, times.
//!
//! Owns: the meaning and the checked arithmetic of each. Invariant: an [`Extent`] is never empty,
//! is aligned to [`SECTOR`], and never crosses from one volume's address range into the next.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Logical sector, bytes: the smallest unit of a request, and what a disk writes without tearing.
pub const SECTOR: u64 = 512;
/// Physical block, bytes: alignment of journal records and of hash leaves.
pub const BLOCK: u64 = 4096;
/// Bits of an [`Address`] that count bytes within a volume (64 PiB); the 8 above are its number.
pub const VOLUME_SHIFT: u32 = 56;
/// Largest volume, bytes.
pub const MAX_VOLUME: u64 = 1 << VOLUME_SHIFT;

/// A byte position in a group's address space: volume number in the top 8 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Address(pub u64);

impl Address {
    /// The byte `offset` of volume `volume`; `None` past [`MAX_VOLUME`].
    pub fn new(volume: u8, offset: u64) -> Option<Address> {
        (offset < MAX_VOLUME).then_some(Address((u64::from(volume) << VOLUME_SHIFT) | offset))
    }
    /// The volume's number.
    pub fn volume(self) -> u8 {
        (self.0 >> VOLUME_SHIFT) as u8
    }
    /// Bytes from the volume's start.
    pub fn offset(self) -> u64 {
        self.0 & (MAX_VOLUME - 1)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{:#x}", self.volume(), self.offset())
    }
}

/// A contiguous, non-empty range of one volume, in whole sectors.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    start: u64,
    len: u64,
}

impl Extent {
    /// `None` when empty, not aligned to [`SECTOR`], or crossing a volume's address range.
    pub fn new(start: Address, len: u64) -> Option<Extent> {
        let aligned = start.0.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        let fits = start.offset().checked_add(len)? <= MAX_VOLUME;
        (len > 0 && aligned && fits).then_some(Extent { start: start.0, len })
    }
    /// The extent between two positions of one address space; `None` as for [`Extent::new`].
    pub fn between(start: u64, end: u64) -> Option<Extent> {
        Extent::new(Address(start), end.checked_sub(start)?)
    }
    /// First byte.
    pub fn address(self) -> Address {
        Address(self.start)
    }
    /// First byte, as a plain position.
    pub fn start(self) -> u64 {
        self.start
    }
    /// One past the last byte, as a plain position (may be the next volume's first).
    pub fn end(self) -> u64 {
        self.start.wrapping_add(self.len)
    }
    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "an extent is never empty")]
    pub fn len(self) -> u64 {
        self.len
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{:#x}", self.address(), self.len)
    }
}

/// Number of a record in its journal. 0 stands for the state before the first record.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The next record's number.
    pub fn next(self) -> Lsn {
        Lsn(self.0 + 1)
    }
    /// The number before; of 0, 0.
    pub fn prev(self) -> Lsn {
        Lsn(self.0.saturating_sub(1))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A 32-byte blake3 hash.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Hash(pub [u8; 32]);

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for b in &self.0[..6] {
            write!(f, "{b:02x}")?;
        }
        Ok(())
    }
}

/// A place in a history: two nodes whose chain hashes agree at an LSN share all records up to it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct HistoryPoint {
    /// Last record included.
    pub lsn: Lsn,
    /// Chain hash of that record.
    pub hash: Hash,
}

/// Identity of a node, drawn at random when it is set up. 0 is no node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct NodeId(pub u64);

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// Identity of a consistency group, drawn at random by `volrep init`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GroupId(pub [u8; 16]);

impl fmt::Debug for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// The kernel's boot id: what lives in tmpfs is as old as this at most.
pub type BootId = [u8; 16];

/// Fencing number: rises at each promotion. Equal counters of two nodes mean diverged.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug, Serialize, Deserialize)]
pub struct Term {
    /// Rises by at least one at each promotion.
    pub counter: u64,
    /// The node that was promoted.
    pub node: NodeId,
}

/// One run of a primary: its term, and how many times it has started within it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Generation {
    /// Term under which it runs.
    pub term: Term,
    /// Which start within the term: its count from 1, and below that [`SALT_BITS`] bits that were drawn when the
    /// process started. A machine that was put back to an older copy of itself begins a run of the same
    /// count as one that others know already, and not of the same name.
    pub start: u32,
}

/// Bits of [`Generation::start`] that are drawn. Two runs of one count have the same name once in 4096.
pub const SALT_BITS: u32 = 12;

impl Generation {
    /// How many times the primary had started within the term, this time included.
    pub fn count(self) -> u32 {
        self.start >> SALT_BITS
    }
}

/// The two clocks, read once by the shell before each step.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Now {
    /// Nanoseconds of a clock that never goes back; deadlines are in it.
    pub mono: u64,
    /// Nanoseconds since 1970 UTC; it may jump. Record times and lag are in it.
    pub wall: u64,
}

/// Nanoseconds in a microsecond.
pub const MICROS: u64 = 1_000;
/// Nanoseconds in a millisecond.
pub const MILLIS: u64 = 1_000_000;
/// Nanoseconds in a second.
pub const SECONDS: u64 = 1_000_000_000;

/// `n` rounded up to a multiple of `unit`.
pub fn round_up(n: u64, unit: u64) -> u64 {
    n.div_ceil(unit) * unit
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_extent_is_never_empty_unaligned_or_across_volumes() {
        let a = Address::new(1, 512).unwrap();
        assert_eq!(Extent::new(a, 0), None);
        assert_eq!(Extent::new(a, 100), None);
        assert_eq!(Extent::new(Address(a.0 + 1), 512), None);
        assert_eq!(Extent::new(Address::new(0, MAX_VOLUME - 512).unwrap(), 1024), None);
        assert_eq!(Extent::new(a, u64::MAX - 511), None);
        let last = Extent::new(Address::new(255, MAX_VOLUME - 512).unwrap(), 512).unwrap();
        assert_eq!((last.address().volume(), last.len()), (255, 512));
        assert_eq!(Address::new(0, MAX_VOLUME), None);
    }
}

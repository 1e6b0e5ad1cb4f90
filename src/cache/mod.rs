//! The write cache: writes that were accepted and are not in the backing yet.
//!
//! Owns: the ring (see [`ring`]), the index over it, and the epochs that have not become records.
//! Invariants: a read that consults the index sees the newest accepted version of every sector that
//! the backing lacks (I2); a write's bytes stay in the ring until they, or newer ones, are in the
//! backing; an epoch's content never changes once it is closed.

pub mod ring;

use crate::disk::{AlignedBuf, IoError, Memory, Payload, aligned};
use crate::extents::{ExtentMap, Piece};
use crate::format::record::{Content, EncodeJob, MAX_EXTENTS, MAX_RAW, padded, room};
use crate::units::{Extent, round_up};
use ring::Ring;
pub use ring::{RingId, RingState, ring_len};
use std::collections::VecDeque;

/// Where the newest bytes of a range lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Slot {
    /// The write that put them there.
    pub seq: u64,
    /// Position in the ring's data area; `None`: zeroes.
    pub at: Option<u64>,
}

impl Piece for Slot {
    fn skip(&self, bytes: u64) -> Slot {
        Slot { seq: self.seq, at: self.at.map(|at| at + bytes) }
    }
}

/// An epoch: the writes between two seals, newest version of each sector.
#[derive(Debug, Default)]
pub struct Epoch {
    map: ExtentMap<Slot>,
    /// Payload bytes accepted into it, overwrites included.
    pub bytes: u64,
    /// Sequence of its last write.
    pub last_seq: u64,
    /// Journal bytes set aside for it.
    reserved: u64,
}

/// An epoch on its way to becoming a record.
#[derive(Debug)]
pub struct Gathered {
    /// Work for the encoder.
    pub job: EncodeJob,
    /// Sequence of its last write.
    pub last_seq: u64,
    /// Journal bytes that were set aside for it, at the worst.
    pub reserved: u64,
}

/// See the module's documentation.
pub struct Cache {
    ring: Ring,
    index: ExtentMap<Slot>,
    open: Epoch,
    closed: VecDeque<Epoch>,
    /// Journal bytes set aside for the open and closed epochs.
    reserved: u64,
}

/// Journal bytes that a write of `len` payload bytes takes at the worst: a record of its own.
pub fn worst_case(len: u64) -> u64 {
    round_up(room(3) as u64 + len, 4096)
}

impl Cache {
    /// A cache over a ring that [`Ring::open`] or [`Ring::format`] made; what the ring still holds
    /// becomes the open epoch (closed where it would pass an epoch's bounds).
    pub fn new(ring: Ring) -> Cache {
        let mut cache = Cache {
            index: ExtentMap::default(),
            open: Epoch::default(),
            closed: VecDeque::new(),
            reserved: 0,
            ring,
        };
        for entry in cache.ring.entries() {
            cache.note(entry.extent, Slot { seq: entry.seq, at: entry.at });
        }
        cache
    }

    /// Whether a write of `len` payload bytes finds room in the ring now.
    pub fn has_room(&self, len: u64) -> bool {
        self.ring.has_room(len)
    }

    /// Accepts a write of at most [`MAX_RAW`] bytes: the first of `data`, or zeroes. Nothing has
    /// happened when the payload can't be copied. The caller has asked [`Cache::has_room`].
    pub fn write(&mut self, extent: Extent, data: Option<&Payload>) -> Result<u64, IoError> {
        let (seq, at) = self.ring.push(extent, data)?;
        self.note(extent, Slot { seq, at });
        Ok(seq)
    }

    fn note(&mut self, extent: Extent, slot: Slot) {
        let len = if slot.at.is_some() { extent.len() } else { 0 };
        let full = self.open.bytes + len > MAX_RAW as u64 || self.open.map.len() + 3 > MAX_EXTENTS;
        if full {
            self.close();
        }
        self.index.insert(extent, slot);
        self.open.map.insert(extent, slot);
        self.open.bytes += len;
        self.open.last_seq = slot.seq;
        self.open.reserved += worst_case(len);
        self.reserved += worst_case(len);
    }

    /// Payload bytes in the open epoch, overwrites included.
    pub fn open_bytes(&self) -> u64 {
        self.open.bytes
    }
    /// Whether the open epoch has anything.
    pub fn has_open(&self) -> bool {
        !self.open.map.is_empty()
    }
    /// Nothing is held: everything accepted is in records and in the backing.
    pub fn is_empty(&self) -> bool {
        !self.has_open() && self.closed.is_empty() && self.freed_seq() == self.last_seq()
    }
    /// Number of closed epochs that have not been taken.
    pub fn closed(&self) -> usize {
        self.closed.len()
    }
    /// Journal bytes, at the worst, for everything accepted and not yet taken by [`Cache::gather`].
    pub fn reserved(&self) -> u64 {
        self.reserved
    }

    /// Closes the open epoch, if it has anything.
    pub fn close(&mut self) {
        if self.has_open() {
            self.closed.push_back(std::mem::take(&mut self.open));
        }
    }

    /// Takes the oldest closed epoch.
    pub fn gather(&mut self, level: Option<i32>) -> Option<Gathered> {
        let epoch = self.closed.pop_front()?;
        self.reserved -= epoch.reserved;
        let content = |s: &Slot| if s.at.is_some() { Content::Data } else { Content::Zeroes };
        let extents: Vec<_> = epoch.map.iter().map(|(e, s)| (e, content(s))).collect();
        let raw: u64 = extents.iter().filter(|(_, c)| *c == Content::Data).map(|(e, _)| e.len()).sum();
        // Whole blocks: sealing pads the record where it is.
        let mut buf: AlignedBuf = aligned(padded(room(extents.len()) + raw as usize));
        buf.resize(room(extents.len()), 0);
        for (extent, slot) in epoch.map.iter() {
            if let Some(at) = slot.at {
                buf.extend_from_slice(self.ring.data(at, extent.len()));
            }
        }
        let job = EncodeJob { extents, buf, level };
        Some(Gathered { job, last_seq: epoch.last_seq, reserved: epoch.reserved })
    }

    /// The parts of `extent` that the cache holds: each with its bytes, or `None` for zeroes.
    pub fn read(&self, extent: Extent) -> impl Iterator<Item = (Extent, Option<&[u8]>)> {
        self.index.overlaps(extent).map(|(e, s)| (e, s.at.map(|at| self.ring.data(at, e.len()))))
    }

    /// The parts of `extent` whose newest write is newer than `seq`.
    pub fn newer_than(&self, seq: u64, extent: Extent) -> impl Iterator<Item = Extent> {
        self.index.overlaps(extent).filter(move |(_, s)| s.seq > seq).map(|(e, _)| e)
    }

    /// What write-back of everything up to write `seq` has to put into the backing: the newest
    /// versions that are not newer than `seq`, in order.
    pub fn dirty_up_to(&self, seq: u64) -> impl Iterator<Item = (Extent, Slot)> {
        self.index.iter().filter(move |(_, s)| s.seq <= seq).map(|(e, s)| (e, *s))
    }

    /// The bytes at a position that a [`Slot`] names.
    pub fn ring_data(&self, at: u64, len: u64) -> &[u8] {
        self.ring.data(at, len)
    }

    /// The backing has everything up to write `seq`, in `written`: forget it and free its room.
    pub fn written_back(&mut self, written: impl Iterator<Item = Extent>, seq: u64) {
        for extent in written {
            self.index.remove_if(extent, |s| s.seq <= seq);
        }
        self.ring.free(seq);
    }

    /// Sequence of the newest write accepted.
    pub fn last_seq(&self) -> u64 {
        self.ring.last_seq()
    }
    /// Sequence up to which everything is in the backing.
    pub fn freed_seq(&self) -> u64 {
        self.ring.freed_seq()
    }
    /// Data bytes in use, and altogether.
    pub fn usage(&self) -> (u64, u64) {
        self.ring.usage()
    }
    /// Data bytes that come free when everything up to write `seq` is in the backing.
    pub fn freeable(&self, seq: u64) -> u64 {
        self.ring.freeable(seq)
    }
    /// Gives the memory back, for a change of role.
    pub fn into_memory(self) -> Box<dyn Memory> {
        self.ring.into_memory()
    }
}

#[cfg(test)]
mod tests;

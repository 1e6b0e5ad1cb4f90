//! The ring: memory in tmpfs that holds accepted writes across the death of the process.
//!
//! ```text
//!    0 magic "VRING\0\0\1"  8 group [16]  24 boot id [16]  40 term counter u64  48 term node u64
//!   56 slots u64            64 data bytes u64              72 freed sequence u64
//! 4096 slots of 64 bytes: sequence u64, address u64, position u64, length u64, kind u64 (1 data, 2 zeroes)
//!      data area, used as a circle; positions rise for ever, modulo its size
//! ```
//! Write `s` has slot `s % slots`. Its sequence word is stored last, with release order, so a slot
//! whose sequence is right is whole: a process killed at any instruction leaves only whole writes.
//!
//! Owns: this layout. Invariants: sequences are never reused in a group's history; what [`Ring::open`]
//! returns is exactly the writes accepted and not yet known to be in a record.

use crate::disk::{IoError, Memory, Payload};
use crate::units::{Address, BLOCK, BootId, Extent, GroupId, SECTOR, Term};

const MAGIC: [u8; 8] = *b"VRING\0\0\x01";
const HEAD: usize = 4096;
const SLOT: usize = 64;
const FREED: usize = 72;
/// No sequence and no position ever gets there: memory that says so is not a ring.
const FAR: u64 = 1 << 62;
/// Data bytes per slot: smaller writes exhaust the slots before the data area.
const PER_SLOT: u64 = 2048;

/// Bytes of memory for a ring with `data` bytes (rounded up to whole blocks) of payload.
pub fn ring_len(data: u64) -> u64 {
    let data = crate::units::round_up(data, BLOCK);
    let slots = crate::units::round_up(data / PER_SLOT * SLOT as u64, BLOCK);
    HEAD as u64 + slots + data
}

/// Whom a ring belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingId {
    /// Group.
    pub group: GroupId,
    /// Boot of the kernel whose memory it is.
    pub boot: BootId,
    /// Term of the primary that fills it.
    pub term: Term,
}

/// What [`Ring::open`] found.
pub enum RingState {
    /// This owner's ring, with what it still holds.
    Ours(Ring),
    /// Something else, or nothing.
    Foreign(Box<dyn Memory>),
}

/// A write in the ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Its sequence.
    pub seq: u64,
    /// Where it goes.
    pub extent: Extent,
    /// Position of its bytes; `None`: zeroes.
    pub at: Option<u64>,
}

/// See the module's documentation.
pub struct Ring {
    memory: Box<dyn Memory>,
    slots: u64,
    data: u64,
    /// Newest sequence.
    last: u64,
    /// Everything up to this sequence is freed.
    freed: u64,
    /// Next free position, and the oldest one in use.
    head: u64,
    tail: u64,
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Slots and data bytes of a ring in `len` bytes of memory: the inverse of [`ring_len`].
fn shape(len: usize) -> (u64, u64) {
    let body = (len as u64).saturating_sub(HEAD as u64 + BLOCK);
    let mut data = body * PER_SLOT / (PER_SLOT + SLOT as u64) / BLOCK * BLOCK;
    while ring_len(data + BLOCK) <= len as u64 {
        data += BLOCK;
    }
    let slots = crate::units::round_up(data / PER_SLOT * SLOT as u64, BLOCK) / SLOT as u64;
    (slots, data)
}

impl Ring {
    /// Makes an empty ring of `memory`; the first write will have the sequence after `last`.
    pub fn format(mut memory: Box<dyn Memory>, id: RingId, last: u64) -> Ring {
        let (slots, data) = shape(memory.bytes().len());
        memory.publish(0, 0);
        let m = memory.bytes_mut();
        // Sequences left by an earlier owner must not look like ours.
        m[HEAD..HEAD + slots as usize * SLOT].fill(0);
        m[8..24].copy_from_slice(&id.group.0);
        m[24..40].copy_from_slice(&id.boot);
        m[40..48].copy_from_slice(&id.term.counter.to_le_bytes());
        m[48..56].copy_from_slice(&id.term.node.0.to_le_bytes());
        m[56..64].copy_from_slice(&slots.to_le_bytes());
        m[64..72].copy_from_slice(&data.to_le_bytes());
        m[FREED..FREED + 8].copy_from_slice(&last.to_le_bytes());
        memory.publish(0, u64::from_le_bytes(MAGIC));
        Ring { memory, slots, data, last, freed: last, head: 0, tail: 0 }
    }

    /// Takes up the ring of a process that is gone. Writes up to `recorded` are in records already.
    pub fn open(memory: Box<dyn Memory>, id: RingId, recorded: u64) -> RingState {
        let m = memory.bytes();
        let (slots, data) = shape(m.len());
        let ours = m.len() >= HEAD + SLOT
            && m[..8] == MAGIC
            && m[8..24] == id.group.0
            && m[24..40] == id.boot
            // The term of a primary that serves may have been raised since.
            && word(m, 40) <= id.term.counter
            && word(m, 48) == id.term.node.0
            && word(m, 56) == slots
            && word(m, 64) == data
            && word(m, FREED).max(recorded) < FAR;
        if !ours {
            return RingState::Foreign(memory);
        }
        let freed = word(m, FREED).max(recorded);
        let mut ring = Ring { memory, slots, data, last: freed, freed, head: 0, tail: 0 };
        // The oldest write that is kept fixes where the data area is in use.
        if let Some((first, begin, _)) = ring.slot(freed + 1) {
            ring.tail = first.at.unwrap_or(begin);
            ring.head = ring.tail;
        }
        while let Some((entry, begin, end)) = ring.slot(ring.last + 1)
            && begin >= ring.head
            && end - ring.tail <= ring.data
        {
            ring.last = entry.seq;
            ring.head = end;
        }
        RingState::Ours(ring)
    }

    /// The write with this sequence if its slot is whole: the entry, and the positions around it.
    fn slot(&self, seq: u64) -> Option<(Entry, u64, u64)> {
        let m = self.memory.bytes();
        let at = HEAD + (seq % self.slots) as usize * SLOT;
        if word(m, at) != seq {
            return None;
        }
        let extent = Extent::new(Address(word(m, at + 8)), word(m, at + 24))?;
        let position = Some(word(m, at + 16)).filter(|p| *p < FAR)?;
        match word(m, at + 32) {
            1 => {
                let fits = extent.len() <= self.data && position % self.data + extent.len() <= self.data;
                let entry = Entry { seq, extent, at: Some(position) };
                fits.then_some((entry, position, position + extent.len()))
            }
            2 => Some((Entry { seq, extent, at: None }, position, position)),
            _ => None,
        }
    }

    /// The writes that are not freed, oldest first.
    pub fn entries(&self) -> Vec<Entry> {
        let slot = |s| self.slot(s).expect("a write that is not freed has its slot").0;
        (self.freed + 1..=self.last).map(slot).collect()
    }

    fn place(&self, len: u64) -> u64 {
        let offset = self.head % self.data;
        if offset + len > self.data { self.head + self.data - offset } else { self.head }
    }

    /// Whether a write of `len` payload bytes finds room.
    pub fn has_room(&self, len: u64) -> bool {
        self.last - self.freed < self.slots && self.place(len) + len - self.tail <= self.data
    }

    /// Copies a write in, or nothing at all when its payload can't be had; its sequence, and the
    /// position of its bytes.
    pub fn push(&mut self, extent: Extent, data: Option<&Payload>) -> Result<(u64, Option<u64>), IoError> {
        let len = data.map_or(0, |_| extent.len());
        debug_assert!(self.has_room(len));
        let at = self.place(len);
        let seq = self.last + 1;
        let slot = HEAD + (seq % self.slots) as usize * SLOT;
        let start = self.data_at(at);
        let m = self.memory.bytes_mut();
        if let Some(data) = data {
            data.copy(&mut m[start..start + len as usize])?;
        }
        m[slot + 8..slot + 16].copy_from_slice(&extent.start().to_le_bytes());
        m[slot + 16..slot + 24].copy_from_slice(&at.to_le_bytes());
        m[slot + 24..slot + 32].copy_from_slice(&extent.len().to_le_bytes());
        m[slot + 32..slot + 40].copy_from_slice(&if data.is_some() { 1u64 } else { 2 }.to_le_bytes());
        self.memory.publish(slot, seq);
        self.last = seq;
        self.head = at + len;
        Ok((seq, data.map(|_| at)))
    }

    fn data_at(&self, position: u64) -> usize {
        HEAD + self.slots as usize * SLOT + (position % self.data) as usize
    }

    /// The bytes at a position that [`Ring::push`] returned (or within that write).
    pub fn data(&self, position: u64, len: u64) -> &[u8] {
        debug_assert!(len.is_multiple_of(SECTOR));
        let at = self.data_at(position);
        &self.memory.bytes()[at..at + len as usize]
    }

    /// Frees the writes up to `seq`.
    pub fn free(&mut self, seq: u64) {
        let seq = seq.min(self.last);
        if seq <= self.freed {
            return;
        }
        self.tail = match self.slot(seq + 1) {
            Some((entry, begin, _)) if seq < self.last => entry.at.unwrap_or(begin),
            _ => {
                // Empty: begin at the start of the area, or a write of more than half of it might never
                // find room before its end.
                self.head = crate::units::round_up(self.head, self.data);
                self.head
            }
        };
        self.freed = seq;
        self.memory.publish(FREED, seq);
    }

    /// Data bytes that freeing the writes up to `seq` would free.
    pub fn freeable(&self, seq: u64) -> u64 {
        let seq = seq.min(self.last);
        if seq <= self.freed {
            return 0;
        }
        self.slot(seq).map_or(0, |(_, _, end)| end - self.tail)
    }

    /// Newest sequence.
    pub fn last_seq(&self) -> u64 {
        self.last
    }
    /// Everything up to this sequence is freed.
    pub fn freed_seq(&self) -> u64 {
        self.freed
    }
    /// Data bytes in use, and altogether.
    pub fn usage(&self) -> (u64, u64) {
        (self.head - self.tail, self.data)
    }
    /// Gives the memory back.
    pub fn into_memory(self) -> Box<dyn Memory> {
        self.memory
    }
}

//! The first block of a journal segment: which lap of the ring it belongs to, and what it continues.
//!
//! ```text
//! 0 magic "VSEGMENT"  8 version u16  10 reserved u16 u32 (0)  16 group [16]  32 sequence u64
//! 40 point before its first record: lsn u64, chain hash [32]  80 generation of that record [20]
//! 100 last write sequence u64  108 time u64   116 zero   4064 blake3 of bytes 0..4064
//! ```
//! Segment `sequence` lies at index `sequence % segments`; the first is 1. It is written together
//! with its first record.
//!
//! Owns: this layout. Invariant: the records that follow continue the chain from `before`.

use super::FormatError;
use super::fields::{Reader, Writer};
use crate::units::{BLOCK, Generation, GroupId, HistoryPoint};

const MAGIC: &[u8; 8] = b"VSEGMENT";
const VERSION: u16 = 1;
const HASHED: usize = BLOCK as usize - 32;
/// Bytes of the fields.
const USED: usize = 116;

/// A segment's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// Group.
    pub group: GroupId,
    /// Rises by one for each segment opened, from 1.
    pub sequence: u64,
    /// The record before the segment's first.
    pub before: HistoryPoint,
    /// That record's generation.
    pub generation: Generation,
    /// That record's last write sequence.
    pub last_write: u64,
    /// That record's time.
    pub time: u64,
}

impl SegmentHeader {
    /// The block.
    pub fn encode(&self) -> [u8; BLOCK as usize] {
        let mut w = Writer::default();
        w.bytes(MAGIC).u16(VERSION).u16(0).u32(0).group(self.group).u64(self.sequence);
        w.point(self.before).generation(self.generation).u64(self.last_write).u64(self.time);
        let mut block = [0; BLOCK as usize];
        block[..w.0.len()].copy_from_slice(&w.0);
        let hash = blake3::hash(&block[..HASHED]);
        block[HASHED..].copy_from_slice(hash.as_bytes());
        block
    }

    /// Reads a block.
    pub fn decode(block: &[u8]) -> Result<SegmentHeader, FormatError> {
        let block = block.get(..BLOCK as usize).ok_or(FormatError::Short)?;
        let mut r = Reader(block);
        if r.take(8)? != MAGIC {
            return Err(FormatError::Magic);
        }
        if blake3::hash(&block[..HASHED]).as_bytes()[..] != block[HASHED..] {
            return Err(FormatError::Checksum);
        }
        let version = r.u16()?;
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let reserved = r.take(6)?;
        let header = SegmentHeader {
            group: r.group()?,
            sequence: r.u64()?,
            before: r.point()?,
            generation: r.generation()?,
            last_write: r.u64()?,
            time: r.u64()?,
        };
        let rest = r.take(HASHED - USED)?;
        let unused = reserved.iter().chain(rest).all(|b| *b == 0);
        if unused { Ok(header) } else { Err(FormatError::Field("reserved")) }
    }
}

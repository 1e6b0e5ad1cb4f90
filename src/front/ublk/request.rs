//! What a request descriptor asks for.
//!
//! Owns: the checks that a request has to pass. Invariant: what passes lies within the volume, is
//! aligned to its block, and carries at most the payload that the device was made for. A FLUSH is told
//! before any range is looked at: its position means nothing.

use super::abi::{F_FUA, IoDesc, op};
use crate::units::{Address, Extent, SECTOR};

/// What the checks need to know of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rules {
    /// Its number.
    pub volume: u8,
    /// Its bytes.
    pub size: u64,
    /// Its block, bytes.
    pub block: u64,
    /// Largest payload, bytes.
    pub payload: u64,
}

/// A request that passed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// The extent's bytes.
    Read(Extent),
    /// To write them; durable when answered, or not.
    Write(Extent, bool),
    /// Zeroes; durable when answered, or not.
    Zero(Extent, bool),
    /// Everything answered so far durable.
    Flush,
}

/// Why a request did not pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// An operation that was not offered.
    Unsupported,
    /// A range that is empty, beyond the end, not aligned, or too long.
    Range,
}

impl Rules {
    /// Judges a request.
    pub fn judge(&self, request: &IoDesc) -> Result<Wanted, Fault> {
        let fua = request.op_flags & F_FUA != 0;
        match request.op_flags as u8 {
            op::FLUSH => Ok(Wanted::Flush),
            op::READ => self.extent(request, self.payload).map(Wanted::Read),
            op::WRITE => self.extent(request, self.payload).map(|e| Wanted::Write(e, fua)),
            op::DISCARD | op::WRITE_ZEROES => self.extent(request, self.size).map(|e| Wanted::Zero(e, fua)),
            _ => Err(Fault::Unsupported),
        }
    }

    fn extent(&self, request: &IoDesc, longest: u64) -> Result<Extent, Fault> {
        let len = u64::from(request.nr_sectors) * SECTOR;
        let offset = request.start_sector.checked_mul(SECTOR).ok_or(Fault::Range)?;
        let fits = offset.checked_add(len).is_some_and(|end| end <= self.size) && len <= longest;
        if !fits || !(offset | len).is_multiple_of(self.block) {
            return Err(Fault::Range);
        }
        Address::new(self.volume, offset).and_then(|start| Extent::new(start, len)).ok_or(Fault::Range)
    }
}

//! Requests: which of them go to the node, and how every other one is answered.
//!
//! Owns: the checks that a request has to pass. Invariant: what passes lies within the export, is
//! aligned to its smallest block and is not empty.

use super::Export;
use super::wire::{self, Fault, cmd, cmd_flag};
use crate::units::{Address, Extent};

/// A request's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    pub flags: u16,
    pub command: u16,
    pub handle: u64,
    pub offset: u64,
    pub len: u32,
}

impl Header {
    /// Bytes on the wire.
    pub const LEN: usize = 28;

    /// The header; the magic instead if it is wrong.
    pub fn decode(bytes: &[u8; Header::LEN]) -> Result<Header, u32> {
        let magic = u32::from_be_bytes(field(bytes, 0));
        if magic != wire::REQUEST_MAGIC {
            return Err(magic);
        }
        Ok(Header {
            flags: u16::from_be_bytes(field(bytes, 4)),
            command: u16::from_be_bytes(field(bytes, 6)),
            handle: u64::from_be_bytes(field(bytes, 8)),
            offset: u64::from_be_bytes(field(bytes, 16)),
            len: u32::from_be_bytes(field(bytes, 24)),
        })
    }

    /// Durable before it is answered.
    pub fn fua(&self) -> bool {
        self.flags & cmd_flag::FUA != 0
    }
}

fn field<const N: usize>(bytes: &[u8; Header::LEN], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the range has N bytes")
}

/// What becomes of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// To the node.
    Read(Extent),
    /// To the node, once the payload is here.
    Write(Extent),
    /// To the node.
    Zero(Extent),
    /// To the node.
    Flush,
    /// Nothing to do: done.
    Empty,
    /// Answered with the allocation of the range.
    Status,
    /// No more requests.
    Disconnect,
}

/// What the checks need to know.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    volume: u8,
    size: u64,
    min: u64,
    max: u32,
    structured: bool,
    allocation: bool,
    read_only: bool,
}

impl Rules {
    /// Those of an export, as negotiated.
    pub fn new(export: &Export, structured: bool, allocation: bool) -> Rules {
        Rules {
            volume: export.volume,
            size: export.offered(),
            min: u64::from(export.min()),
            max: export.max(),
            structured,
            allocation,
            read_only: export.read_only,
        }
    }

    /// Reads need structured replies.
    pub fn structured(&self) -> bool {
        self.structured
    }

    /// Judges a request. A write's payload follows in any case.
    pub fn judge(&self, header: &Header) -> Result<Verdict, Fault> {
        let allowed = cmd_flag::FUA
            | match header.command {
                cmd::DISC => return Ok(Verdict::Disconnect),
                cmd::READ if self.structured => cmd_flag::DF,
                cmd::READ | cmd::WRITE | cmd::FLUSH | cmd::TRIM => 0,
                cmd::WRITE_ZEROES => cmd_flag::NO_HOLE | cmd_flag::FAST_ZERO,
                cmd::BLOCK_STATUS => cmd_flag::REQ_ONE,
                _ => return Err(Fault::new(wire::EINVAL, "unknown command")),
            };
        if header.flags & !allowed != 0 {
            return Err(Fault::new(wire::EINVAL, "flags not valid for this command"));
        }
        if self.read_only && matches!(header.command, cmd::WRITE | cmd::TRIM | cmd::WRITE_ZEROES) {
            return Err(Fault::new(wire::EPERM, "the export is read-only"));
        }
        let verdict = match header.command {
            cmd::FLUSH => return Ok(Verdict::Flush), // its offset and length mean nothing
            cmd::BLOCK_STATUS => return self.status(header),
            cmd::READ => self.extent(header, wire::EINVAL)?.map(Verdict::Read),
            cmd::WRITE => self.extent(header, wire::ENOSPC)?.map(Verdict::Write),
            cmd::WRITE_ZEROES => self.extent(header, wire::ENOSPC)?.map(Verdict::Zero),
            _ => self.extent(header, wire::EINVAL)?.map(Verdict::Zero),
        };
        if matches!(header.command, cmd::READ | cmd::WRITE) && header.len > self.max {
            let unfragmented = header.flags & cmd_flag::DF != 0;
            let error = if unfragmented { wire::EOVERFLOW } else { wire::EINVAL };
            return Err(Fault::new(error, "longer than the largest block size"));
        }
        Ok(verdict.unwrap_or(Verdict::Empty))
    }

    fn status(&self, header: &Header) -> Result<Verdict, Fault> {
        if !self.allocation {
            return Err(Fault::new(wire::EINVAL, "no metadata context was selected"));
        }
        match self.extent(header, wire::EINVAL)? {
            Some(_) => Ok(Verdict::Status),
            None => Err(Fault::new(wire::EINVAL, "an empty range has no status")),
        }
    }

    /// The range of a request; `None` if it is empty.
    fn extent(&self, header: &Header, beyond: u32) -> Result<Option<Extent>, Fault> {
        let len = u64::from(header.len);
        if header.offset.checked_add(len).is_none_or(|end| end > self.size) {
            return Err(Fault::new(beyond, "beyond the end of the export"));
        }
        if !(header.offset | len).is_multiple_of(self.min) {
            return Err(Fault::new(wire::EINVAL, "not aligned to the smallest block size"));
        }
        let start = Address::new(self.volume, header.offset);
        Ok(start.and_then(|start| Extent::new(start, len)))
    }
}

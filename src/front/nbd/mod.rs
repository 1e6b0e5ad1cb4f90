//! The NBD server protocol (fixed newstyle) as a session without I/O: bytes in, requests and
//! bytes out.
//!
//! Owns: what each byte of a connection means. Invariants:
//! - the outcome depends on the bytes received and on the completions, not on how the bytes were cut;
//! - every request gets exactly one reply, and a disconnect waits for all of them;
//! - whatever the client sends, what a session holds is bounded: one payload of at most
//!   [`MAX_REQUEST`], one option of at most 64 KiB, and what
//!   [`Session::outstanding`] tells, above which the shell stops receiving.
//!
//! What is advertised, and why it is true: a FLUSH reaches the one node behind all connections and
//! covers every write that any of them saw completed, so CAN_MULTI_CONN holds; zeroes are an entry
//! without payload in the journal, so they are always fast. NO_HOLE is accepted and makes no
//! difference: whether a backing keeps the room is its own configuration. Prefetching is not
//! implemented, so CACHE is neither advertised nor accepted.

mod intake;
mod negotiation;
mod replies;
mod session;
#[cfg(test)]
mod tests;
mod transmission;
mod wire;

pub use negotiation::transmission_flags;
pub use session::Session;

use crate::node::event::{MAX_REQUEST, Op};
use crate::units::SECTOR;

/// A volume as clients see it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Export {
    /// Its name. The empty name asks for the first export.
    pub name: String,
    /// The volume's number.
    pub volume: u8,
    /// Bytes; a remainder smaller than `min_block` is not offered.
    pub size: u64,
    /// Smallest unit of a request, bytes: a power of two from 512 to 65536.
    pub min_block: u32,
    /// Best unit of a request, bytes: a power of two.
    pub preferred_block: u32,
    /// Largest payload of a request, bytes; more than the node accepts counts as that.
    pub max_block: u32,
    /// Nothing may be written to it.
    pub read_only: bool,
}

impl Export {
    fn min(&self) -> u32 {
        self.min_block.max(SECTOR as u32)
    }
    fn preferred(&self) -> u32 {
        self.preferred_block.max(self.min())
    }
    fn max(&self) -> u32 {
        let max = self.max_block.max(self.preferred()).min(MAX_REQUEST as u32);
        max - max % self.min()
    }
    fn offered(&self) -> u64 {
        self.size - self.size % u64::from(self.min())
    }
}

/// A request for the node.
#[derive(Clone, Debug)]
pub struct Request {
    /// Comes back in [`Session::complete`]. Unique among a session's requests in flight.
    pub cookie: u64,
    /// What.
    pub op: Op,
}

/// Why a connection cannot go on: the protocol has no reply for it but to close.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProtocolError {
    /// Client flags that were not offered.
    #[error("the client set unknown handshake flags {0:#x}")]
    ClientFlags(u32),
    /// What should be an option is not one.
    #[error("the client's option does not begin with IHAVEOPT")]
    OptionMagic,
    /// A client without fixed newstyle may only name its export.
    #[error("the client sent option {0} without fixed newstyle negotiation")]
    NotFixed(u32),
    /// EXPORT_NAME cannot be refused otherwise.
    #[error("the client asked for an export that does not exist")]
    UnknownExport,
    /// Options are answered one at a time.
    #[error("the client sends options without reading the replies")]
    OptionFlood,
    /// What should be a request is not one.
    #[error("the client's request begins with {0:#010x}, not with the request magic")]
    RequestMagic(u32),
}

//! What a machine asks of a disk or of shared memory, and how the answer comes back.
//!
//! Owns: the vocabulary between the machines and the shell's executors (the real one on io_uring,
//! the simulator's on a model). Invariant: every [`DiskRequest`] gets exactly one answer with its
//! token; a buffer is shared and immutable from submission to that answer.

use aligned_vec::{AVec, ConstAlign};
use bytes::Bytes;
use std::fmt;
use std::sync::Arc;

/// A buffer that O_DIRECT accepts: 4096-byte aligned. Freeze it with [`freeze`] to share it.
pub type AlignedBuf = AVec<u8, ConstAlign<4096>>;

/// An empty aligned buffer with room for `capacity` bytes.
pub fn aligned(capacity: usize) -> AlignedBuf {
    AVec::with_capacity(0, capacity)
}

/// The buffer as shared bytes, without a copy; the start stays aligned.
pub fn freeze(buf: AlignedBuf) -> Bytes {
    Bytes::from_owner(buf)
}

/// The files of one group on one node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum File {
    /// Two superblock slots; see `format::superblock`.
    Superblock,
    /// The ring of journal segments.
    Journal,
    /// The dirty maps. Written through [`Memory`]; only `Sync` is asked of it here.
    DirtyMaps,
    /// The hash index. Written through [`Memory`]; only `Sync` is asked of it here.
    HashIndex,
    /// The backing of the volume with this number.
    Backing(u8),
    /// What a resync makes of the volume with this number, until it is shown.
    Stage(u8),
    /// Which sectors those are. Written through [`Memory`]; only `Sync` is asked of it here.
    StageMap,
}

/// One operation. Offsets and lengths are in bytes; those of `Read` and `Write` are multiples of
/// 512, on [`File::Journal`] and [`File::Superblock`] of 4096.
#[derive(Clone, Debug)]
pub enum DiskOp {
    /// Read `len` bytes. A short file is an error. The answer's bytes are 4096-aligned in memory.
    Read {
        /// Where.
        offset: u64,
        /// How much.
        len: usize,
    },
    /// Write all of `data` (start 4096-aligned in memory).
    Write {
        /// Where.
        offset: u64,
        /// What.
        data: Bytes,
        /// Durable when it completes (RWF_DSYNC). Says nothing of earlier writes.
        dsync: bool,
    },
    /// Make the range read as zeroes: deallocated where the file can, written otherwise.
    Zero {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Make every write that completed before this was submitted durable (fdatasync, or msync).
    Sync,
}

/// The name of a request in flight; opaque to the executor.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Token(pub u64);

impl Token {
    /// The `id`-th request (below 2^56) of an owner.
    pub fn new(owner: u8, id: u64) -> Token {
        debug_assert!(id < 1 << 56);
        Token(u64::from(owner) << 56 | id)
    }
    /// Who asked.
    pub fn owner(self) -> u8 {
        (self.0 >> 56) as u8
    }
    /// Which of his requests.
    pub fn id(self) -> u64 {
        self.0 & ((1 << 56) - 1)
    }
}

/// One operation on one file.
#[derive(Clone, Debug)]
pub struct DiskRequest {
    /// Comes back with the answer.
    pub token: Token,
    /// On what.
    pub file: File,
    /// What.
    pub op: DiskOp,
}

/// Bytes of a `Read`, nothing otherwise.
pub type DiskResult = Result<Bytes, IoError>;

/// An operation that the kernel (or the model) failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IoError {
    /// The errno; EIO when there is none.
    pub errno: i32,
}

impl IoError {
    /// Input/output error.
    pub const EIO: IoError = IoError { errno: 5 };
    /// Out of range, or malformed.
    pub const EINVAL: IoError = IoError { errno: 22 };
    /// No space, or a write past the end of the device.
    pub const ENOSPC: IoError = IoError { errno: 28 };
    /// The device is read-only here.
    pub const EROFS: IoError = IoError { errno: 30 };
    /// The device is going away.
    pub const ESHUTDOWN: IoError = IoError { errno: 108 };
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        std::io::Error::from_raw_os_error(self.errno).fmt(f)
    }
}

/// The bytes of a write on their way in, until the node has copied them.
#[derive(Clone)]
pub enum Payload {
    /// They are here.
    Here(Bytes),
    /// They are still where the request came from: copied from there, once, to where they are kept.
    Lent {
        /// Who has them.
        lender: Arc<dyn Lender>,
        /// His name for the request.
        tag: u16,
        /// Where they begin in it.
        at: u64,
        /// How many.
        len: u64,
    },
}

/// Keeps the payloads of requests until these are answered.
pub trait Lender: Send + Sync {
    /// Copies the bytes from `at` on of request `tag`: all of `to`, or an error.
    fn copy(&self, tag: u16, at: u64, to: &mut [u8]) -> Result<(), IoError>;
}

impl Payload {
    /// How many bytes.
    pub fn len(&self) -> u64 {
        match self {
            Payload::Here(bytes) => bytes.len() as u64,
            Payload::Lent { len, .. } => *len,
        }
    }
    /// None.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Copies the first bytes, as many as `to` holds; at most [`Payload::len`].
    pub fn copy(&self, to: &mut [u8]) -> Result<(), IoError> {
        match self {
            Payload::Here(bytes) => to.copy_from_slice(&bytes[..to.len()]),
            Payload::Lent { lender, tag, at, len } => {
                assert!(to.len() as u64 <= *len, "a payload is copied within its length");
                lender.copy(*tag, *at, to)?;
            }
        }
        Ok(())
    }
    /// Drops the first `bytes` (at most [`Payload::len`]).
    pub fn advance(&mut self, bytes: u64) {
        match self {
            Payload::Here(here) => *here = here.slice(bytes as usize..),
            Payload::Lent { at, len, .. } => {
                *at += bytes;
                *len -= bytes;
            }
        }
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Payload {
        Payload::Here(bytes)
    }
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Payload::Here(bytes) => bytes.fmt(f),
            Payload::Lent { tag, at, len, .. } => write!(f, "tag {tag}: {at}+{len}"),
        }
    }
}

/// Memory that outlives the process: the write cache's ring, or the dirty maps.
pub trait Memory: Send {
    /// All of it.
    fn bytes(&self) -> &[u8];
    /// All of it, to write. Plain stores: their order against each other is not promised.
    fn bytes_mut(&mut self) -> &mut [u8];
    /// Stores `word` at byte `at` (8-aligned, little endian) after every earlier store.
    fn publish(&mut self, at: usize, word: u64);
}

impl fmt::Debug for dyn Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes of memory", self.bytes().len())
    }
}

/// Plain memory, for tests and the simulator.
impl Memory for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        self
    }
    fn publish(&mut self, at: usize, word: u64) {
        self[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
}

//! Front ends: what the kernel or a socket asks, as block requests to the group, and the answers back.
//!
//! Owns: the way a request enters a group ([`Submit`]). Invariant: a front end never waits for the
//! group's loop; it hands a request over and is called back.

pub mod fuse;
pub mod loopdev;

use crate::disk::IoError;
use crate::node::event::Op;
use bytes::Bytes;

/// Hands block requests to a group.
pub trait Submit: Send + Sync {
    /// Hands `op` over and returns at once. `done` is called once, on the group's loop thread: with
    /// a read's bytes, with nothing otherwise.
    fn submit(&self, op: Op, done: Box<dyn FnOnce(Result<Bytes, IoError>) + Send>);
}

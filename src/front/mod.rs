//! Front ends: they turn a client's or the kernel's requests into [`Op`]s and the answers back.
//!
//! Owns: the protocols in which a volume is offered. Invariant: an [`Op`] that leaves here lies
//! within its volume and is aligned to its block; each gets exactly one answer. Front ends never
//! see each other.
#![allow(clippy::disallowed_methods, reason = "the shell: kernel devices, their mounts and the threads that serve them")]

pub mod fuse;
pub mod loopdev;
pub mod nbd;

use crate::disk::IoError;
use crate::node::event::Op;
use bytes::Bytes;

/// Where a front end with threads of its own (FUSE) hands in its requests.
pub trait Submit: Send + Sync {
    /// Hands in one request. `done` is called exactly once, on the group's loop thread: it must
    /// not block. A read's answer is its bytes, any other's is empty.
    fn submit(&self, op: Op, done: Box<dyn FnOnce(Result<Bytes, IoError>) + Send>);
}

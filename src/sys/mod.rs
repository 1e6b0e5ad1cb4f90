//! The kernel, wrapped: one io_uring, files, sockets, shared memory, clocks.
//!
//! Owns: nearly all `unsafe` of the program, and every rule about buffers and descriptors that the
//! kernel works on. Invariant: a buffer or descriptor given to the kernel is owned by the ring until
//! its completion is reaped; a file that failed a write or a sync never reports a later success.
#![allow(clippy::disallowed_methods, reason = "the shell: it opens files and sockets, and reads the clocks")]

pub mod clock;
pub mod disk;
pub mod memory;
pub mod mmap;
pub mod net;
pub mod open;
pub mod process;
pub mod uring;
pub mod wake;

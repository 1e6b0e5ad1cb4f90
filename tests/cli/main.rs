//! The `volrep` program as its users run it: arguments, files, exit codes, both forms of output.
//!
//! Owns: nothing. Invariant: no test touches /etc, /var/lib or /run.

#[path = "../common/mod.rs"]
mod common;
mod contract;
mod control;
mod full_disk;
mod setup;

pub use common::{Daemon, Ended, Place, program, volrep};

//! The `volrep` program as its users run it: arguments, files, exit codes, both forms of output.
//!
//! Owns: nothing. Invariant: no test touches /etc, /var/lib or /run.

mod bench;
mod contract;
mod control;
mod full_disk;
mod giving_up;
#[path = "../place/mod.rs"]
mod place;
mod salvage;
mod setup;

pub use place::{Daemon, Ended, Place, program, volrep};

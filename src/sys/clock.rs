//! The two clocks.
//!
//! Owns: the only reads of time that machines ever see. Invariant: `mono` never goes back.

use crate::units::{Now, SECONDS};
use nix::time::{ClockId, clock_gettime};

/// Reads both clocks (no system call: the vDSO answers).
pub fn now() -> Now {
    Now { mono: read(ClockId::CLOCK_MONOTONIC), wall: read(ClockId::CLOCK_REALTIME) }
}

fn read(clock: ClockId) -> u64 {
    let t = clock_gettime(clock).expect("Linux has these clocks");
    // A wall clock set before 1970 counts as 1970.
    u64::try_from(t.tv_sec()).unwrap_or(0) * SECONDS + t.tv_nsec() as u64
}

//! Whether a device that was left still waits for a daemon.
//!
//! Owns: the probing read. Invariant: nothing is written, and a read that has to wait is left to end
//! with the device's next daemon.

use super::plan::Pulse;
use crate::disk::aligned;
use crate::front::users::BlockDevice;
use crate::units::BLOCK;
use nix::libc;
use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

/// A read that fails does so without waiting for anything; one that takes this long waits for a daemon.
const WAITS: Duration = Duration::from_millis(100);

/// Reads the first block on a thread of its own: the open, too, may wait.
pub(super) fn take(device: &BlockDevice) -> io::Result<Pulse> {
    let (tell, told) = mpsc::channel();
    let node = device.node();
    let read = move || {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(node);
        let outcome = file.and_then(|file| {
            let mut block = aligned(BLOCK as usize);
            block.resize(BLOCK as usize, 0);
            file.read_at(&mut block, 0)
        });
        // Nobody listens any more when it had to wait.
        let _ = tell.send(outcome.is_ok());
    };
    thread::Builder::new().name("nbd-pulse".into()).spawn(read)?;
    Ok(match told.recv_timeout(WAITS) {
        Ok(true) => Pulse::Answers,
        Ok(false) => Pulse::Fails,
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Pulse::Waits,
    })
}

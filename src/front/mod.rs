//! Front ends: they turn a client's or the kernel's requests into [`Op`]s and the answers back.
//!
//! Owns: the protocols in which a volume is offered. Invariant: an [`Op`] that leaves here lies
//! within its volume and is aligned to its block; each gets exactly one answer. Front ends never
//! see each other.
#![allow(
    clippy::disallowed_methods,
    reason = "the shell: kernel devices, their mounts and the threads that serve them"
)]

mod apart;
pub mod fuse;
pub mod knbd;
pub mod links;
pub mod loopdev;
mod mounts;
pub mod nbd;
pub mod ublk;
pub mod users;

use crate::disk::IoError;
use crate::node::event::Op;
use bytes::Bytes;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

/// A volume to offer as a block device.
#[derive(Clone, Debug)]
pub struct Volume {
    /// Its number in the group.
    pub volume: u8,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Its smallest block, bytes: a power of two from 512 to 4096.
    pub block: u32,
    /// The link by which users open it, within the directory of such links.
    pub link: PathBuf,
    /// Nothing may be written to it.
    pub read_only: bool,
    /// Its device waits for the next daemon when this one is gone; otherwise its users get errors.
    pub lasting: bool,
}

/// A front end that is open.
pub trait FrontEnd: Send {
    /// What users open, in the order of the volumes.
    fn devices(&self) -> Vec<String>;

    /// Takes everything away, or says who still uses it (then what was not taken away yet stays, and
    /// it can be tried again). With `force`, users get errors from now on instead.
    ///
    /// Not on the group's loop thread: the kernel writes back what its cache holds meanwhile.
    fn detach(&mut self, force: bool) -> Result<(), FrontError>;

    /// The daemon ends. A device that can wait for the next daemon is left to it, with its users'
    /// requests; any other is taken away, if need be by force.
    fn leave(&mut self) -> Result<(), FrontError> {
        self.detach(false).or_else(|e| {
            tracing::warn!("{e}; its users get errors now");
            self.detach(true)
        })
    }
}

/// Why a front end could not be opened or closed.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// It is in use, so it can work later without a change.
    #[error("{0}")]
    Busy(String),
    /// Any other reason.
    #[error("{0}")]
    Failed(String),
}

/// Where requests are handed in by whoever is not the group's loop.
pub trait Submit: Send + Sync {
    /// Hands in one request. `done` is called exactly once, on the group's loop thread: it must
    /// not block. A read's answer is its bytes, any other's is empty.
    fn submit(&self, op: Op, done: Box<dyn FnOnce(Result<Bytes, IoError>) + Send>);
}

/// Between two looks whether the daemon ends.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Everything that was written is durable when this returns, unless the node says why not, or the daemon is `ending`. Who
/// waits here can be killed: the kernel, asked for the same by way of a device, has nothing left to wait for.
fn flush(node: &dyn Submit, ending: &AtomicBool) -> Result<(), FrontError> {
    let (tell, told) = mpsc::channel();
    let done = move |done: Result<Bytes, IoError>| {
        // Nobody waits for it any more when the daemon ends.
        let _ = tell.send(done.map(|_| ()));
    };
    node.submit(Op::Flush, Box::new(done));
    let failed = |e: IoError| FrontError::Failed(format!("can't make durable what was written: {e}"));
    loop {
        match told.recv_timeout(LOOK_AGAIN) {
            Ok(done) => return done.map_err(failed),
            Err(RecvTimeoutError::Disconnected) => return Err(failed(IoError::EIO)),
            Err(RecvTimeoutError::Timeout) if ending.load(Ordering::Relaxed) => {
                return Err(FrontError::Busy(
                    "the daemon ends, and leaves the devices to the next one".into(),
                ));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
    }
}

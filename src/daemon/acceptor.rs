//! A listener on the ring.
//!
//! Owns: one accept in flight per listener. Invariant: running out of descriptors pauses accepting
//! instead of spinning on it.

use super::reactor::Tag;
use crate::sys::uring::{Completion, Operation};
use crate::sys::uring::{Fd, Key, Ring};
use crate::units::MILLIS;
use nix::libc;
use std::os::fd::OwnedFd;

/// How long a listener rests after a failure that may pass.
const REST: u64 = 100 * MILLIS;

/// A listener.
pub(super) struct Acceptor {
    fd: Fd,
    in_flight: Option<Key>,
    retry_at: Option<u64>,
}

impl Acceptor {
    pub fn new(fd: Fd) -> Acceptor {
        Acceptor { fd, in_flight: None, retry_at: None }
    }

    /// Waits for the next connection, unless it does already.
    pub fn arm(&mut self, ring: &mut Ring<Tag>, tag: Tag) {
        if self.in_flight.is_none() {
            self.retry_at = None;
            let operation = Operation::Accept { fd: self.fd.clone(), accepted: None };
            self.in_flight = Some(ring.submit(operation, tag));
        }
    }

    /// Takes the outcome of an accept: a connection maybe. [`Acceptor::arm`] again unless it rests.
    pub fn accepted(&mut self, done: Completion<Tag>, now: u64) -> Option<OwnedFd> {
        self.in_flight = None;
        match (done.result, done.operation) {
            (Ok(_), Operation::Accept { accepted, .. }) => accepted,
            (Err(errno), _) => {
                if !matches!(errno, libc::ECONNABORTED | libc::ECANCELED) {
                    let error = std::io::Error::from_raw_os_error(errno);
                    tracing::warn!("accepting a connection failed: {error}; trying again");
                    self.retry_at = Some(now + REST);
                }
                None
            }
            _ => None,
        }
    }

    /// When it is to be armed again after a failure.
    pub fn retry_at(&self) -> Option<u64> {
        self.retry_at
    }

    /// Stops accepting; the last accept still completes.
    pub fn cancel(&mut self, ring: &mut Ring<Tag>) {
        if let Some(key) = self.in_flight {
            ring.cancel(key);
        }
    }

    /// An accept is in flight.
    pub fn is_armed(&self) -> bool {
        self.in_flight.is_some()
    }
}

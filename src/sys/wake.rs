//! Waking the loop from other threads.
//!
//! Owns: the eventfd, and the protocol that spares the system call while the loop is awake.
//! Invariant: after a post, either the loop has not yet decided to sleep and will see the post when
//! it looks once more, or it has said that it sleeps and the poster writes the eventfd.

use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};

/// Shared by the loop and everyone who posts to it.
#[derive(Debug)]
pub struct Waker {
    event: EventFd,
    sleeping: AtomicBool,
}

impl Waker {
    /// A new one. The eventfd is a blocking one: io_uring fails reads of a non-blocking one with
    /// EAGAIN where it would wait on a blocking one.
    pub fn new() -> io::Result<Waker> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
        Ok(Waker { event, sleeping: AtomicBool::new(false) })
    }

    /// A descriptor for the loop to read.
    pub fn descriptor(&self) -> io::Result<OwnedFd> {
        self.event.as_fd().try_clone_to_owned()
    }

    /// Call after something was put on a queue that the loop looks at.
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::SeqCst) && self.sleeping.swap(false, Ordering::SeqCst) {
            // Fails only when the counter is full, and then the loop wakes anyway.
            let _ = self.event.write(1);
        }
    }

    /// The loop is about to sleep; it must look at its queues once more after this.
    pub fn going_to_sleep(&self) {
        self.sleeping.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// The loop is awake and will look at its queues before it sleeps again.
    pub fn awake(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_sleeper_costs_a_system_call() {
        let waker = Waker::new().unwrap();
        waker.wake();
        waker.going_to_sleep();
        waker.wake();
        waker.wake();
        assert_eq!(waker.event.read().unwrap(), 1);
    }
}

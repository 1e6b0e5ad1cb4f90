//! Work that waits for requests which this very process has to answer.
//!
//! Owns: the thread it runs on. Invariant: that thread has no descriptor of the rest of the process. A thread that waits
//! in the kernel for an answer can't be killed, and as long as it lives its table of descriptors is open: with /dev/fuse in
//! it, a daemon that is killed while it binds a loop device would wait for itself for ever, and the loop driver with it.

use nix::libc;
use std::io;
use std::thread;

/// Runs `work` on a thread that has only the standard streams (Linux 5.9), and waits for it.
///
/// `work` uses and drops no descriptor that was opened before.
pub fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    let alone = || {
        let first = libc::STDERR_FILENO as libc::c_uint + 1;
        // SAFETY: with CLOSE_RANGE_UNSHARE this thread gets a table of its own first, and closes the descriptors in that
        // one; those of the others stay open.
        let done = unsafe {
            libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE)
        };
        if done != 0 { Err(io::Error::last_os_error()) } else { Ok(work()) }
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("volrep-apart".into()).spawn_scoped(scope, alone)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    #[test]
    fn descriptors_of_the_process_are_not_there_and_stay_open() {
        let file = File::open("/proc/self/exe").unwrap();
        let number = file.as_raw_fd();
        let there = move || std::fs::read_link(format!("/proc/thread-self/fd/{number}")).is_ok();
        assert!(there());
        assert!(!apart(there).unwrap());
        let mut magic = [0; 4];
        (&file).read_exact(&mut magic).unwrap();
        assert_eq!(magic, *b"\x7fELF");
    }
}

//! One io_uring, driven by the thread that made it.
//!
//! Owns: every buffer and descriptor that the kernel works on. Invariant: an [`Operation`] stays at
//! one place in memory (its buffers on the heap) from [`Ring::submit`] until its completion is
//! reaped; dropping the ring waits for what the kernel still holds. A full submission queue is
//! emptied into the kernel, never an error; short transfers are continued here.

use crate::disk::AlignedBuf;
use bytes::{Bytes, BytesMut};
use io_uring::types::{CancelBuilder, Fd as RingFd, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, opcode, squeue};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{SockaddrLike, SockaddrStorage};
use slab::Slab;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;

/// A descriptor shared with the operations in flight on it, so that it can't be reused under them.
pub type Fd = Rc<OwnedFd>;

/// Most pieces of one gathered send (the kernel's UIO_MAXIOV).
const MAX_PIECES: usize = 1024;
/// Completions of these are of no interest.
const IGNORED: u64 = u64::MAX;

/// What the kernel is asked to do. It comes back with the completion.
#[derive(Debug)]
pub enum Operation {
    /// Fill `buf` (empty, with capacity for `len`) from the file.
    Read {
        /// The file.
        fd: Fd,
        /// Where.
        offset: u64,
        /// Bytes wanted; fewer come back only at the file's end.
        len: usize,
        /// Where to.
        buf: AlignedBuf,
    },
    /// Write all of `data`.
    Write {
        /// The file.
        fd: Fd,
        /// Where.
        offset: u64,
        /// What.
        data: Bytes,
        /// With RWF_DSYNC.
        dsync: bool,
    },
    /// fdatasync.
    Sync {
        /// The file.
        fd: Fd,
    },
    /// fallocate.
    Fallocate {
        /// The file.
        fd: Fd,
        /// Its flags.
        mode: i32,
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// Receive into the spare capacity of `buf`.
    Receive {
        /// The socket, a blocking one.
        fd: Fd,
        /// Received bytes are appended.
        buf: BytesMut,
        /// Exactly so many bytes (fewer only when the stream ends), not whatever is there.
        exactly: Option<usize>,
    },
    /// Send all of `pieces`.
    Send {
        /// The socket, a blocking one.
        fd: Fd,
        /// In order.
        pieces: Vec<Bytes>,
    },
    /// Accept one connection.
    Accept {
        /// The listener, a blocking one.
        fd: Fd,
        /// The connection, on success.
        accepted: Option<OwnedFd>,
    },
    /// Connect.
    Connect {
        /// The socket, a blocking one.
        fd: Fd,
        /// To where; on the heap because the kernel reads it.
        address: Box<SockaddrStorage>,
    },
    /// A driver's own command (IORING_OP_URING_CMD). What it may make the kernel touch beyond its
    /// argument belongs to the caller, until it is over or the ring is gone. A ring that is dropped does
    /// not wait for it: such a command may wait for ever, and the driver ends it with the ring.
    Command {
        /// The driver's file.
        fd: Fd,
        /// The command's number.
        code: u32,
        /// Its argument.
        argument: [u8; 16],
    },
    /// Wait until an eventfd is raised, and lower it.
    Event {
        /// The eventfd.
        fd: Fd,
        /// Its counter.
        count: Box<u64>,
    },
}

/// A finished operation.
#[derive(Debug)]
pub struct Completion<T> {
    /// As submitted.
    pub tag: T,
    /// As submitted; buffers filled.
    pub operation: Operation,
    /// Bytes transferred, or the errno.
    pub result: Result<usize, i32>,
}

/// Names an operation in flight; valid until its completion is reaped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Key(usize);

struct Flight<T> {
    operation: Operation,
    tag: T,
    /// Bytes transferred so far.
    done: usize,
    gather: Option<Box<Gather>>,
}

/// The kernel's view of a gathered send.
struct Gather {
    header: libc::msghdr,
    pieces: Vec<libc::iovec>,
}

/// The ring. `T` says what a completion means to its owner.
pub struct Ring<T> {
    ring: IoUring,
    flights: Slab<Flight<T>>,
    /// Accepted by us, not yet in the submission queue because the kernel would not empty it.
    backlog: VecDeque<squeue::Entry>,
    #[expect(clippy::vec_box, reason = "the kernel reads a gather where it lies: it must not move")]
    spare: Vec<Box<Gather>>,
    again: Vec<usize>,
}

impl<T> Ring<T> {
    /// A ring for this thread, with room for `entries` submissions between two system calls.
    pub fn new(entries: u32) -> io::Result<Ring<T>> {
        let best = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(entries * 4)
            .build(entries);
        // Kernels before 6.1 know no DEFER_TASKRUN.
        best.or_else(|_| IoUring::builder().setup_cqsize(entries * 4).build(entries)).and_then(Ring::over)
    }

    fn over(ring: IoUring) -> io::Result<Ring<T>> {
        let p = ring.params();
        // Commands came with Linux 5.19, as did the cancelling of everything, without which a ring could not
        // be dropped, and which can't be asked for.
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let commands = probe.is_supported(opcode::UringCmd16::CODE);
        if !(p.is_feature_nodrop() && p.is_feature_ext_arg() && p.is_feature_submit_stable() && commands) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring lacks what Linux 5.19 has",
            ));
        }
        let flights = Slab::with_capacity(ring.params().sq_entries() as usize);
        Ok(Ring { ring, flights, backlog: VecDeque::new(), spare: Vec::new(), again: Vec::new() })
    }

    /// Submissions that one system call takes.
    pub fn capacity(&self) -> u32 {
        self.ring.params().sq_entries()
    }

    /// Operations in flight.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    /// Takes an operation; it reaches the kernel at the next [`Ring::turn`] at the latest.
    pub fn submit(&mut self, operation: Operation, tag: T) -> Key {
        let key = self.flights.insert(Flight { operation, tag, done: 0, gather: None });
        self.issue(key);
        Key(key)
    }

    /// Asks the kernel to give up on an operation; it completes all the same, maybe with ECANCELED.
    pub fn cancel(&mut self, key: Key) {
        self.push(opcode::AsyncCancel::new(key.0 as u64).build().user_data(IGNORED));
    }

    fn issue(&mut self, key: usize) {
        let flight = &mut self.flights[key];
        if flight.gather.is_none()
            && matches!(&flight.operation, Operation::Send { pieces, .. } if pieces.len() > 1)
        {
            flight.gather = Some(self.spare.pop().unwrap_or_else(Gather::empty));
        }
        let entry = flight.entry().user_data(key as u64);
        self.push(entry);
    }

    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: what the entry points to is owned by its flight (heap buffers, descriptor), which
        // is only removed when its completion is reaped; a cancel points to nothing.
        let pushed = self.backlog.is_empty() && unsafe { self.ring.submission().push(&entry) }.is_ok();
        if !pushed {
            self.backlog.push_back(entry);
            self.drain_backlog();
        }
    }

    /// Moves the backlog on while the kernel takes it.
    fn drain_backlog(&mut self) {
        while !self.backlog.is_empty() {
            if self.ring.submission().is_full() && !matches!(self.ring.submit(), Ok(n) if n > 0) {
                // The kernel wants completions reaped first; `turn` tries again after that.
                return;
            }
            let mut queue = self.ring.submission();
            while let Some(entry) = self.backlog.front() {
                // SAFETY: as in `push`.
                if unsafe { queue.push(entry) }.is_err() {
                    break;
                }
                self.backlog.pop_front();
            }
        }
    }

    /// Submits everything, and waits for a completion: not at all (`Some(0)`), at most so many
    /// nanoseconds, or for ever. One system call.
    pub fn turn(&mut self, timeout: Option<u64>) -> io::Result<()> {
        self.drain_backlog();
        let outcome = match timeout {
            Some(0) => self.ring.submit(),
            None => self.ring.submit_and_wait(1),
            Some(ns) => {
                let time = Timespec::from(std::time::Duration::from_nanos(ns));
                self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&time))
            }
        };
        match outcome.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO)) {
            // ETIME: the time is up. EBUSY, EAGAIN: reap first. EINTR: a signal; the caller loops.
            Ok(_) | Err(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => Ok(()),
            Err(errno) => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    /// Moves finished operations to `out`; continues short ones.
    pub fn reap(&mut self, out: &mut Vec<Completion<T>>) {
        for entry in self.ring.completion() {
            if entry.user_data() == IGNORED {
                continue;
            }
            let key = entry.user_data() as usize;
            let Some(result) = self.flights[key].advance(entry.result()) else {
                self.again.push(key);
                continue;
            };
            let flight = self.flights.remove(key);
            self.spare.extend(flight.gather);
            out.push(Completion { tag: flight.tag, operation: flight.operation, result });
        }
        while let Some(key) = self.again.pop() {
            self.issue(key);
        }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // Never reached the kernel, or soon will have: either way nothing new is started below.
        self.drain_backlog();
        self.push(opcode::AsyncCancel2::new(CancelBuilder::any()).build().user_data(IGNORED));
        let (mut failures, mut waited_for) =
            (0, self.flights.iter().filter(|(_, f)| !f.is_command()).count());
        while waited_for > 0 && failures < 1000 {
            self.drain_backlog();
            if let Err(e) = self.ring.submit_and_wait(1)
                && e.kind() != io::ErrorKind::Interrupted
            {
                failures += 1;
            }
            for entry in self.ring.completion() {
                if entry.user_data() != IGNORED {
                    let mut flight = self.flights.remove(entry.user_data() as usize);
                    waited_for -= usize::from(!flight.is_command());
                    // An accepted connection is closed by this.
                    let _ = flight.advance(entry.result());
                }
            }
        }
        self.flights.retain(|_, flight| !flight.is_command());
        // The kernel does not answer: what it may still write to is leaked rather than freed.
        std::mem::forget(std::mem::take(&mut self.flights));
    }
}

impl<T> Flight<T> {
    fn is_command(&self) -> bool {
        matches!(self.operation, Operation::Command { .. })
    }

    /// The submission for what is left to do.
    fn entry(&mut self) -> squeue::Entry {
        let done = self.done;
        match &mut self.operation {
            Operation::Read { fd, offset, len, buf } => {
                debug_assert!(buf.capacity() >= *len);
                // SAFETY: `done <= len <= capacity`, so the pointer stays within the allocation.
                let at = unsafe { buf.as_mut_ptr().add(done) };
                opcode::Read::new(ring_fd(fd), at, (*len - done) as u32).offset(*offset + done as u64).build()
            }
            Operation::Write { fd, offset, data, dsync } => {
                let rest = &data[done..];
                let flags = if *dsync { libc::RWF_DSYNC } else { 0 };
                opcode::Write::new(ring_fd(fd), rest.as_ptr(), rest.len() as u32)
                    .offset(*offset + done as u64)
                    .rw_flags(flags as _)
                    .build()
            }
            Operation::Sync { fd } => {
                opcode::Fsync::new(ring_fd(fd)).flags(io_uring::types::FsyncFlags::DATASYNC).build()
            }
            Operation::Fallocate { fd, mode, offset, len } => {
                opcode::Fallocate::new(ring_fd(fd), *len).offset(*offset).mode(*mode).build()
            }
            Operation::Receive { fd, buf, exactly } => {
                let spare = buf.spare_capacity_mut();
                let (len, flags) = match exactly {
                    Some(n) => (spare.len().min(*n - done), libc::MSG_WAITALL),
                    None => (spare.len(), 0),
                };
                opcode::Recv::new(ring_fd(fd), spare.as_mut_ptr().cast(), len as u32).flags(flags).build()
            }
            Operation::Send { fd, pieces } => send_entry(fd, pieces, done, self.gather.as_deref_mut()),
            Operation::Accept { fd, .. } => {
                opcode::Accept::new(ring_fd(fd), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Operation::Connect { fd, address } => {
                opcode::Connect::new(ring_fd(fd), address.as_ptr(), address.len()).build()
            }
            Operation::Command { fd, code, argument } => {
                opcode::UringCmd16::new(ring_fd(fd), *code).cmd(*argument).build()
            }
            Operation::Event { fd, count } => {
                opcode::Read::new(ring_fd(fd), (&raw mut **count).cast(), 8).offset(u64::MAX).build()
            }
        }
    }

    /// Takes the kernel's answer; `None` when there is more to do.
    fn advance(&mut self, answer: i32) -> Option<Result<usize, i32>> {
        // A driver's command is never given twice: what it did the first time only its owner knows.
        let again = answer == -libc::EINTR || answer == -libc::EAGAIN;
        if again && !matches!(self.operation, Operation::Command { .. }) {
            return None;
        }
        if answer < 0 {
            return Some(Err(-answer));
        }
        let n = answer as usize;
        self.done += n;
        let done = self.done;
        match &mut self.operation {
            Operation::Read { len, buf, .. } => {
                if n > 0 && done < *len {
                    return None;
                }
                // SAFETY: the kernel has filled `done <= len <= capacity` bytes from the start.
                unsafe { buf.set_len(done) };
            }
            Operation::Write { data, .. } => match (n, data.len()) {
                (0, len) if len > 0 => return Some(Err(libc::EIO)),
                (_, len) if done < len => return None,
                _ => {}
            },
            Operation::Receive { buf, exactly, .. } => {
                // SAFETY: the kernel has filled `n` bytes of the spare capacity it was given.
                unsafe { buf.set_len(buf.len() + n) };
                if n > 0 && exactly.is_some_and(|wanted| done < wanted) && buf.len() < buf.capacity() {
                    return None;
                }
            }
            Operation::Send { pieces, .. } => {
                if done < pieces.iter().map(Bytes::len).sum() {
                    return if n == 0 { Some(Err(libc::EPIPE)) } else { None };
                }
            }
            Operation::Accept { accepted, .. } => {
                // SAFETY: a successful accept gives a new descriptor that nobody else knows.
                *accepted = Some(unsafe { OwnedFd::from_raw_fd(answer) });
            }
            Operation::Sync { .. }
            | Operation::Fallocate { .. }
            | Operation::Connect { .. }
            | Operation::Command { .. }
            | Operation::Event { .. } => {}
        }
        Some(Ok(done))
    }
}

impl Gather {
    fn empty() -> Box<Gather> {
        // SAFETY: all zeroes is a valid msghdr: no name, no pieces, no control data.
        Box::new(Gather { header: unsafe { std::mem::zeroed() }, pieces: Vec::new() })
    }
}

fn ring_fd(fd: &Fd) -> RingFd {
    RingFd(fd.as_raw_fd())
}

/// A send of `pieces` without their first `done` bytes.
fn send_entry(fd: &Fd, pieces: &[Bytes], mut done: usize, gather: Option<&mut Gather>) -> squeue::Entry {
    // WAITALL: the kernel continues a short send by itself. NOSIGNAL: EPIPE is enough.
    let flags = libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
    let Some(gather) = gather else {
        let rest = pieces.first().map_or(&[][..], |p| &p[done..]);
        return opcode::Send::new(ring_fd(fd), rest.as_ptr(), rest.len() as u32).flags(flags).build();
    };
    gather.pieces.clear();
    for piece in pieces {
        if done >= piece.len() {
            done -= piece.len();
            continue;
        }
        let rest = &piece[done..];
        done = 0;
        gather.pieces.push(libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() });
        if gather.pieces.len() == MAX_PIECES {
            break;
        }
    }
    gather.header.msg_iov = gather.pieces.as_mut_ptr();
    gather.header.msg_iovlen = gather.pieces.len();
    opcode::SendMsg::new(ring_fd(fd), &raw const gather.header).flags(flags as u32).build()
}

/// An errno for a failure outside the ring.
pub fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(Errno::EIO as i32)
}

#[cfg(test)]
mod tests;

//! A device's queue: its descriptors, and the payloads of its requests.
//!
//! Owns: the character device, and with buffers the tags' memory. Invariants: a payload is touched only
//! while the server has its request; a descriptor is read only after the command of its tag has
//! completed; every request that is handed out is finished exactly once, or never, which leaves it to
//! the next server. With user copy no memory here grows with the requests; with buffers there are
//! `queue_depth` x `max_io_buf_bytes`, as far as they were touched.

use super::abi::{BUFFER_BITS, BUFFERS, DevInfo, IoCmd, IoDesc, io};
use super::params::Transfer;
use super::request::{Fault, Rules, Wanted};
use crate::disk::{IoError, Lender, Payload};
use crate::node::event::Op;
use bytes::Bytes;
use memmap2::{Mmap, MmapMut, MmapOptions, MmapRaw};
use nix::libc;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// A queue that is to be served, or is.
pub struct Queue {
    name: String,
    rules: Rules,
    shared: Arc<Shared>,
    descriptors: Option<Mmap>,
    /// What each tag's request wants, while the server has it.
    wanted: Vec<Option<Wanted>>,
}

/// What the payloads of requests need of a queue.
struct Shared {
    device: File,
    buffers: Option<Buffers>,
}

/// Memory that the kernel copies to and from, the same for each tag.
struct Buffers {
    memory: MmapRaw,
    each: usize,
}

/// A command for the driver about one tag, to be given on the thread that serves the queue.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Command {
    /// Its number.
    pub code: u32,
    /// Its argument.
    pub argument: [u8; 16],
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Queue({})", self.name)
    }
}

impl Queue {
    /// The queue of the device `info`, whose open character device is `device`.
    pub fn new(device: File, info: &DevInfo, rules: Rules) -> std::io::Result<Queue> {
        let depth = usize::from(info.queue_depth);
        let buffers = match Transfer::of(info) {
            Transfer::UserCopy => None,
            Transfer::Buffers => {
                let each = info.max_io_buf_bytes as usize;
                Some(Buffers { memory: MmapMut::map_anon(depth * each)?.into(), each })
            }
        };
        Ok(Queue {
            name: format!("ublkb{}", info.dev_id),
            rules,
            shared: Arc::new(Shared { device, buffers }),
            descriptors: None,
            wanted: vec![None; depth],
        })
    }

    /// The device's name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Requests that it has at a time; tags are below this.
    pub fn depth(&self) -> u16 {
        self.wanted.len() as u16
    }

    /// A descriptor to give the commands on.
    pub fn descriptor(&self) -> std::io::Result<OwnedFd> {
        Ok(self.shared.device.try_clone()?.into())
    }

    /// The command that waits for a tag's first request. Those of all tags are to reach the kernel in
    /// one system call: a server that dies with some of them given leaves a queue that the driver can
    /// neither cancel nor hand over. And without CAP_SYS_ADMIN in effect: the driver then leaves the
    /// partition table alone. Otherwise it reads it while it starts the disk, under a lock that the next
    /// server needs: should this one die meanwhile, the device, this process and its locks would be stuck
    /// until the machine is booted again.
    pub fn fetch(&self, tag: u16) -> Command {
        self.command(io::FETCH_REQ, tag, 0)
    }

    /// Makes the descriptors readable; once, after the tags wait. Not before: the driver would hold a
    /// server that dies in between for the owner of the queue, and let no other in.
    pub fn map(&mut self) -> std::io::Result<()> {
        let len = (self.wanted.len() * size_of::<IoDesc>()).next_multiple_of(4096);
        // SAFETY: the driver's pages, mapped for reading; they stay as long as the mapping. The kernel
        // changes a descriptor only while its tag waits, and `request` reads it only after that.
        self.descriptors = Some(unsafe { MmapOptions::new().len(len).map(&self.shared.device) }?);
        Ok(())
    }

    /// The request that a tag's completed command has brought.
    pub fn request(&mut self, tag: u16) -> Result<Op, Fault> {
        let wanted = self.rules.judge(&self.describe(tag).ok_or(Fault::Range)?)?;
        *self.wanted.get_mut(usize::from(tag)).ok_or(Fault::Range)? = Some(wanted);
        Ok(match wanted {
            Wanted::Read(extent) => Op::Read(extent),
            Wanted::Write(extent, fua) => {
                let lender = self.shared.clone();
                Op::Write { extent, data: Payload::Lent { lender, tag, at: 0, len: extent.len() }, fua }
            }
            Wanted::Zero(extent, fua) => Op::Zero { extent, fua },
            Wanted::Flush => Op::Flush,
        })
    }

    fn describe(&self, tag: u16) -> Option<IoDesc> {
        let (map, at) = (self.descriptors.as_ref()?, usize::from(tag) * size_of::<IoDesc>());
        let bytes = map.get(at..at + size_of::<IoDesc>())?;
        // SAFETY: within the mapping, and aligned: the mapping begins at a page, and 24 is a multiple
        // of 8. Volatile, because the kernel writes it between two of our reads.
        Some(unsafe { bytes.as_ptr().cast::<IoDesc>().read_volatile() })
    }

    /// The command that answers a tag's request and waits for its next one; a read's bytes are handed
    /// over here.
    pub fn finish(&mut self, tag: u16, result: Result<Bytes, IoError>) -> Command {
        let wanted = self.wanted.get_mut(usize::from(tag)).and_then(Option::take);
        let result = match (result, wanted) {
            (Ok(bytes), Some(Wanted::Read(extent))) => self.shared.answer(tag, extent.len(), &bytes),
            (Ok(_), Some(Wanted::Write(extent, _))) => Ok(extent.len() as i32),
            (Ok(_), Some(_)) => Ok(0),
            (Ok(_), None) => Err(libc::EIO),
            (Err(e), _) => Err(e.errno),
        };
        self.command(io::COMMIT_AND_FETCH_REQ, tag, result.unwrap_or_else(|errno| -errno.abs().max(1)))
    }

    /// The command that refuses a request that [`Queue::request`] did not hand out.
    pub fn refuse(&mut self, tag: u16, fault: Fault) -> Command {
        let errno = match fault {
            Fault::Unsupported => libc::EOPNOTSUPP,
            Fault::Range => libc::EIO,
        };
        self.finish(tag, Err(IoError { errno }))
    }

    fn command(&self, code: u32, tag: u16, result: i32) -> Command {
        let addr = self.shared.buffers.as_ref().map_or(0, |b| b.at(tag) as u64);
        Command { code, argument: IoCmd { q_id: 0, tag, result, addr }.bytes() }
    }
}

impl Shared {
    /// Hands a read's bytes over; how many.
    fn answer(&self, tag: u16, len: u64, bytes: &[u8]) -> Result<i32, i32> {
        if bytes.len() as u64 != len {
            return Err(libc::EIO);
        }
        match &self.buffers {
            None => {
                let written = self.device.write_all_at(bytes, position(tag, 0));
                written.map_err(|e| e.raw_os_error().unwrap_or(libc::EIO))?;
            }
            Some(buffers) => {
                assert!(bytes.len() <= buffers.each, "a request is no longer than its buffer");
                // SAFETY: the tag's buffer is ours while we have its request; the length was checked.
                unsafe { buffers.at(tag).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
            }
        }
        Ok(bytes.len() as i32)
    }
}

impl Lender for Shared {
    fn copy(&self, tag: u16, at: u64, to: &mut [u8]) -> Result<(), IoError> {
        match &self.buffers {
            None => {
                let read = self.device.read_exact_at(to, position(tag, at));
                read.map_err(|e| IoError { errno: e.raw_os_error().unwrap_or(libc::EIO) })
            }
            Some(buffers) => {
                assert!(at as usize + to.len() <= buffers.each, "a request is no longer than its buffer");
                // SAFETY: as in `answer`; `to` is memory of ours, elsewhere.
                unsafe {
                    to.as_mut_ptr().copy_from_nonoverlapping(buffers.at(tag).add(at as usize), to.len())
                };
                Ok(())
            }
        }
    }
}

impl Buffers {
    fn at(&self, tag: u16) -> *mut u8 {
        let at = usize::from(tag) * self.each;
        assert!(at + self.each <= self.memory.len(), "a tag is below the queue's depth");
        // SAFETY: within the mapping by the assertion.
        unsafe { self.memory.as_mut_ptr().add(at) }
    }
}

/// Where the byte `at` of a tag's request is on the character device.
fn position(tag: u16, at: u64) -> u64 {
    BUFFERS + (u64::from(tag) << BUFFER_BITS) + at
}

//! Executes [`DiskRequest`]s on the ring.
//!
//! Owns: the open files of one group, and their latches. Invariant: every request is answered
//! exactly once; after a failed write, zeroing or sync of a file, every later one on it fails with
//! EIO, however the kernel would answer (a failed fsync may have dropped what it could not write).

use super::open::OpenFile;
use super::uring::{Completion, Operation, Ring, errno};
use crate::disk::{AlignedBuf, DiskOp, DiskRequest, DiskResult, File, IoError, Token, aligned, freeze};
use crate::units::BLOCK;
use bytes::Bytes;
use nix::fcntl::FallocateFlags;
use nix::libc;

/// Most bytes of zeroes in one write.
const ZERO_CHUNK: u64 = 1 << 20;
/// Answers ready to be told.
pub type Answers = Vec<(Token, DiskResult)>;

/// What an operation of the executor was for.
#[derive(Clone, Copy, Debug)]
pub struct Tag {
    slot: u16,
    job: Job,
}

#[derive(Clone, Copy, Debug)]
enum Job {
    Read(Token, usize),
    Write(Token),
    Sync,
    Zero(Token, Zeroing),
}

/// A zeroing: by which means, and what is left.
#[derive(Clone, Copy, Debug)]
struct Zeroing {
    means: Means,
    offset: u64,
    end: u64,
}

/// From the cheapest to the one that always works.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Means {
    /// Deallocate. On a block device the kernel does it only where the device promises zeroes.
    Punch,
    /// Have the file system or the device write or map zeroes.
    ZeroRange,
    /// Write them.
    Write,
}

struct Slot {
    file: OpenFile,
    /// A write, zeroing or sync has failed.
    latched: bool,
    /// Tokens that the sync in flight answers; one at a time, because the kernel tells a failed
    /// writeback to only one of several concurrent fsyncs.
    syncing: Vec<Token>,
    /// Tokens for the sync after it.
    waiting: Vec<Token>,
    /// The cheapest means that has not been refused.
    means: Means,
    /// Operations that the kernel has.
    flights: usize,
    /// Requests that wait for these: after them the file goes on through the page cache. Before, a page could be read there
    /// that a direct write makes old.
    held: Vec<DiskRequest>,
}

/// The executor.
pub struct Disk {
    slots: Vec<Slot>,
    superblock: Option<u16>,
    journal: Option<u16>,
    maps: Option<u16>,
    hash_index: Option<u16>,
    stage_map: Option<u16>,
    backings: [Option<u16>; 256],
    stages: [Option<u16>; 256],
    zeroes: Bytes,
}

impl Disk {
    /// An executor over open files.
    pub fn new(files: impl IntoIterator<Item = (File, OpenFile)>) -> Disk {
        let mut zeroes = aligned(ZERO_CHUNK as usize);
        zeroes.resize(ZERO_CHUNK as usize, 0);
        let mut disk = Disk {
            slots: Vec::new(),
            superblock: None,
            journal: None,
            maps: None,
            hash_index: None,
            stage_map: None,
            backings: [None; 256],
            stages: [None; 256],
            zeroes: freeze(zeroes),
        };
        for (name, file) in files {
            disk.put(name, file);
        }
        disk
    }

    /// One more file, or another one under a name of which no change is in flight.
    pub fn put(&mut self, name: File, file: OpenFile) {
        // A journal's blocks are written once so that later writes need no metadata: never punched.
        let means =
            if matches!(name, File::Backing(_) | File::Stage(_)) { Means::Punch } else { Means::Write };
        let (flights, held) = (0, Vec::new());
        let mut slot =
            Slot { file, latched: false, syncing: Vec::new(), waiting: Vec::new(), means, flights, held };
        match *self.index(name) {
            Some(at) => {
                // Reads may be in flight, and end here.
                let old = &mut self.slots[usize::from(at)];
                (slot.flights, slot.held) = (old.flights, std::mem::take(&mut old.held));
                *old = slot;
            }
            None => {
                *self.index(name) = Some(self.slots.len() as u16);
                self.slots.push(slot);
            }
        }
    }

    fn index(&mut self, file: File) -> &mut Option<u16> {
        match file {
            File::Superblock => &mut self.superblock,
            File::Journal => &mut self.journal,
            File::DirtyMaps => &mut self.maps,
            File::HashIndex => &mut self.hash_index,
            File::Backing(number) => &mut self.backings[usize::from(number)],
            File::Stage(number) => &mut self.stages[usize::from(number)],
            File::StageMap => &mut self.stage_map,
        }
    }

    /// Takes a request. What can be answered at once goes to `answers`.
    pub fn submit<T: From<Tag>>(&mut self, ring: &mut Ring<T>, request: DiskRequest, answers: &mut Answers) {
        let Some(slot) = *self.index(request.file) else {
            return answers.push((request.token, Err(IoError::EINVAL)));
        };
        let s = &mut self.slots[usize::from(slot)];
        if !s.held.is_empty() || range(&request.op).is_some_and(|range| !s.file.takes(range)) {
            s.held.push(request);
            return self.release(ring, slot, answers);
        }
        let DiskRequest { token, op, .. } = request;
        if s.latched && !matches!(op, DiskOp::Read { .. }) {
            return answers.push((token, Err(IoError::EIO)));
        }
        let fd = s.file.fd.clone();
        match op {
            DiskOp::Read { offset, len, .. } => {
                let operation = Operation::Read { fd, offset, len, buf: aligned(len) };
                s.flights += 1;
                ring.submit(operation, Tag { slot, job: Job::Read(token, len) }.into());
            }
            DiskOp::Write { data, .. } if data.is_empty() => answers.push((token, Ok(Bytes::new()))),
            DiskOp::Write { offset, data, dsync } => {
                let data = if s.file.direct { aligned_bytes(data) } else { data };
                let operation = Operation::Write { fd, offset, data, dsync };
                s.flights += 1;
                ring.submit(operation, Tag { slot, job: Job::Write(token) }.into());
            }
            DiskOp::Zero { len: 0, .. } => answers.push((token, Ok(Bytes::new()))),
            DiskOp::Zero { offset, len } => match offset.checked_add(len) {
                Some(end) => self.zero(ring, slot, token, Zeroing { means: Means::Punch, offset, end }),
                None => answers.push((token, Err(IoError::EINVAL))),
            },
            DiskOp::Sync => {
                s.waiting.push(token);
                self.sync(ring, slot);
            }
        }
    }

    /// Takes a finished operation; what it answers goes to `answers`.
    pub fn complete<T: From<Tag>>(
        &mut self,
        ring: &mut Ring<T>,
        tag: Tag,
        done: Completion<T>,
        answers: &mut Answers,
    ) {
        let slot = tag.slot;
        self.slots[usize::from(slot)].flights -= 1;
        match tag.job {
            Job::Read(token, len) => answers.push((token, read_result(done, len))),
            Job::Write(token) => {
                let result = self.judge(slot, "write", done.result);
                answers.push((token, result.map(|()| Bytes::new())));
            }
            Job::Sync => {
                let result = self.judge(slot, "sync", done.result).map(|()| Bytes::new());
                let s = &mut self.slots[usize::from(slot)];
                answers.extend(s.syncing.drain(..).map(|t| (t, result.clone())));
                if s.latched {
                    answers.extend(s.waiting.drain(..).map(|t| (t, Err(IoError::EIO))));
                }
                self.sync(ring, slot);
            }
            Job::Zero(token, zeroing) => self.zeroed(ring, slot, token, zeroing, done, answers),
        }
        self.release(ring, slot, answers);
    }

    /// Once nothing is in flight, what is held goes on through the page cache.
    fn release<T: From<Tag>>(&mut self, ring: &mut Ring<T>, slot: u16, answers: &mut Answers) {
        let s = &mut self.slots[usize::from(slot)];
        if s.held.is_empty() || s.flights > 0 {
            return;
        }
        s.file.leave_direct();
        for request in std::mem::take(&mut s.held) {
            self.submit(ring, request, answers);
        }
    }

    /// The outcome of a change to a file; latches it.
    fn judge(&mut self, slot: u16, what: &str, result: Result<usize, i32>) -> Result<(), IoError> {
        let s = &mut self.slots[usize::from(slot)];
        match result {
            // A success that comes after a failure may owe itself to the error having been told once.
            Ok(_) if s.latched => Err(IoError::EIO),
            Ok(_) => Ok(()),
            Err(errno) => {
                let error = IoError { errno };
                if !s.latched {
                    let path = s.file.path.display();
                    tracing::error!(
                        "{what} of {path} failed: {error}; nothing more is written to it: replace the disk or free space, then restart"
                    );
                }
                s.latched = true;
                Err(error)
            }
        }
    }

    fn sync<T: From<Tag>>(&mut self, ring: &mut Ring<T>, slot: u16) {
        let s = &mut self.slots[usize::from(slot)];
        if s.syncing.is_empty() && !s.waiting.is_empty() {
            std::mem::swap(&mut s.syncing, &mut s.waiting);
            s.flights += 1;
            ring.submit(Operation::Sync { fd: s.file.fd.clone() }, Tag { slot, job: Job::Sync }.into());
        }
    }

    fn zero<T: From<Tag>>(&mut self, ring: &mut Ring<T>, slot: u16, token: Token, mut z: Zeroing) {
        let s = &mut self.slots[usize::from(slot)];
        s.flights += 1;
        z.means = z.means.max(s.means);
        let fd = s.file.fd.clone();
        let Zeroing { means, offset, end } = z;
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let operation = match means {
            Means::Write => {
                let data = self.zeroes.slice(..(end - offset).min(ZERO_CHUNK) as usize);
                Operation::Write { fd, offset, data, dsync: false }
            }
            Means::Punch => {
                let mode = (FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep).bits();
                Operation::Fallocate { fd, mode, offset, len: end - offset }
            }
            Means::ZeroRange => {
                let mode = (FallocateFlags::FALLOC_FL_ZERO_RANGE | keep).bits();
                Operation::Fallocate { fd, mode, offset, len: end - offset }
            }
        };
        ring.submit(operation, Tag { slot, job: Job::Zero(token, z) }.into());
    }

    fn zeroed<T: From<Tag>>(
        &mut self,
        ring: &mut Ring<T>,
        slot: u16,
        token: Token,
        mut z: Zeroing,
        done: Completion<T>,
        answers: &mut Answers,
    ) {
        let s = &mut self.slots[usize::from(slot)];
        match (z.means, done.result) {
            (Means::Punch | Means::ZeroRange, Err(e)) if !s.latched && refused(e) => {
                z.means = if z.means == Means::Punch { Means::ZeroRange } else { Means::Write };
                // EINVAL may be about this range's alignment only; the others are about the file.
                if e != libc::EINVAL {
                    s.means = s.means.max(z.means);
                }
                self.zero(ring, slot, token, z);
            }
            (Means::Write, Ok(n)) if !s.latched && z.offset + (n as u64) < z.end => {
                z.offset += n as u64;
                self.zero(ring, slot, token, z);
            }
            (_, result) => {
                let result = self.judge(slot, "zeroing", result);
                answers.push((token, result.map(|()| Bytes::new())));
            }
        }
    }
}

/// Where an operation reads or writes, and how much.
fn range(op: &DiskOp) -> Option<(u64, u64)> {
    match op {
        DiskOp::Read { offset, len, .. } => Some((*offset, *len as u64)),
        DiskOp::Write { offset, data, .. } => Some((*offset, data.len() as u64)),
        DiskOp::Zero { offset, len } => Some((*offset, *len)),
        DiskOp::Sync => None,
    }
}

fn read_result<T>(done: Completion<T>, len: usize) -> DiskResult {
    match (done.result, done.operation) {
        (Ok(n), Operation::Read { buf, .. }) if n == len => Ok(freeze(buf)),
        (Err(errno), _) => Err(IoError { errno }),
        // The file ends before the range does.
        _ => Err(IoError::EIO),
    }
}

/// fallocate said that it does not do this here, and did nothing.
fn refused(errno: i32) -> bool {
    matches!(errno, libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV | libc::EPERM)
}

/// O_DIRECT wants aligned memory; machines give it, but a slice of a record may not be.
fn aligned_bytes(data: Bytes) -> Bytes {
    if data.as_ptr().addr().is_multiple_of(BLOCK as usize) {
        return data;
    }
    let mut copy: AlignedBuf = aligned(data.len());
    copy.extend_from_slice(&data);
    freeze(copy)
}

/// The executor's answer to an error outside the ring.
pub fn io_error(error: &std::io::Error) -> IoError {
    IoError { errno: errno(error) }
}

#[cfg(test)]
mod tests;

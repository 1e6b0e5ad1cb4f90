//! The filesystem that shows each volume of a group as one file.
//!
//! Owns: the translation of FUSE requests into block requests. Invariant: every request is answered
//! exactly once, by the callback of the block request it became or at once; nothing here waits.
//!
//! No page of a volume is cached on the way: files are opened for direct I/O, so a read or write
//! that the kernel answered has been to the group and back, and an fsync is a FLUSH.

use crate::disk::IoError;
use crate::front::Submit;
use crate::front::Volume;
use crate::node::event::Op;
use crate::units::{Address, Extent};
use bytes::Bytes;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};
use nix::libc;
use nix::unistd::{getegid, geteuid};
use std::ffi::OsStr;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Largest write that the kernel sends at once (256 pages, the kernel's default bound).
const MAX_WRITE: u32 = 1 << 20;
/// Asynchronous requests that the kernel sends without an answer to the first: what a loop device's
/// queue holds. With [`MAX_WRITE`] it bounds the memory that requests take.
const MAX_BACKGROUND: u16 = 128;
/// Largest range zeroed by one block request; a longer one goes in pieces, one after the other.
const MAX_ZERO: u64 = 1 << 30;
/// How long the kernel may remember names and sizes. They never change while it is mounted.
const TTL: Duration = Duration::from_secs(3600);
/// The number of the first volume's file; 1 is the directory.
const FIRST_FILE: u64 = 2;
/// Handle of a file opened with O_DSYNC or O_SYNC. (Reads and writes carry the flags themselves.)
const SYNC_HANDLE: FileHandle = FileHandle(1);
const PLAIN_HANDLE: FileHandle = FileHandle(0);

/// The filesystem.
pub(super) struct Files {
    volumes: Vec<Volume>,
    submit: Arc<dyn Submit>,
    since: SystemTime,
}

impl Files {
    pub(super) fn new(volumes: Vec<Volume>, submit: Arc<dyn Submit>) -> Files {
        Files { volumes, submit, since: SystemTime::now() }
    }

    fn volume(&self, ino: INodeNo) -> Result<&Volume, Errno> {
        let index = ino.0.checked_sub(FIRST_FILE).and_then(|i| usize::try_from(i).ok());
        index.and_then(|i| self.volumes.get(i)).ok_or(Errno::ENOENT)
    }

    fn attributes(&self, ino: INodeNo) -> Result<FileAttr, Errno> {
        let file = if ino == INodeNo::ROOT { None } else { Some(self.volume(ino)?) };
        let size = file.map_or(0, |v| v.size);
        Ok(FileAttr {
            ino,
            size,
            blocks: size / 512,
            atime: self.since,
            mtime: self.since,
            ctime: self.since,
            crtime: self.since,
            kind: if file.is_some() { FileType::RegularFile } else { FileType::Directory },
            perm: file.map_or(0o700, |v| if v.read_only { 0o400 } else { 0o600 }),
            nlink: if file.is_some() { 1 } else { 2 },
            uid: geteuid().as_raw(),
            gid: getegid().as_raw(),
            rdev: 0,
            blksize: file.map_or(4096, |v| v.block.max(4096)),
            flags: 0,
        })
    }

    fn zero_range(
        &self,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
    ) -> Result<Zeroing, Errno> {
        let volume = self.volume(ino)?;
        if volume.read_only {
            return Err(Errno::EROFS);
        }
        let end = zeroed_end(volume, offset, length, mode)?;
        let (submit, fua) = (self.submit.clone(), fh == SYNC_HANDLE);
        Ok(Zeroing { submit, volume: volume.volume, from: offset, to: end, fua })
    }
}

/// The errno of an answer. ENOSYS would tell the kernel never to ask again and to call every later
/// fsync a success; beyond 511 the kernel takes the answer for malformed and the caller waits for ever.
fn errno(error: IoError) -> Errno {
    match error.errno {
        1..=511 if error.errno != libc::ENOSYS => Errno::from_i32(error.errno),
        _ => Errno::EIO,
    }
}

/// The blocks that a read needs, and the part of them that was asked for; `None` at the end.
///
/// Any alignment is served: rounding a read out to whole blocks changes nothing for anybody.
fn read_plan(volume: &Volume, offset: u64, size: u32) -> Option<(Extent, std::ops::Range<usize>)> {
    let block = u64::from(volume.block);
    let end = offset.checked_add(u64::from(size))?.min(volume.size);
    let start = offset - offset % block;
    let extent =
        Extent::new(Address::new(volume.volume, start)?, end.checked_sub(start)?.next_multiple_of(block))?;
    let skip = (offset - start) as usize;
    (end > offset).then(|| (extent, skip..skip + (end - offset) as usize))
}

/// Where a write goes; it is cut at the end of the volume, as on a disk.
///
/// A write of less than whole blocks is refused (EINVAL), as O_DIRECT refuses it on a disk. To
/// serve it, its blocks would have to be read, changed and written back, and a write to the rest of
/// such a block could come in between and be undone. The loop device only sends whole blocks.
fn write_plan(volume: &Volume, offset: u64, len: u64) -> Result<Extent, Errno> {
    if volume.read_only {
        return Err(Errno::EROFS);
    }
    let block = u64::from(volume.block);
    if !offset.is_multiple_of(block) || !len.is_multiple_of(block) || len == 0 {
        return Err(Errno::EINVAL);
    }
    let room = volume.size.checked_sub(offset).filter(|room| *room > 0).ok_or(Errno::ENOSPC)?;
    Address::new(volume.volume, offset).and_then(|at| Extent::new(at, len.min(room))).ok_or(Errno::EINVAL)
}

/// The end of the range that a fallocate zeroes. All but the two modes that zero are refused, as on
/// a disk (plain preallocation would promise space that only the backing can promise).
fn zeroed_end(volume: &Volume, offset: u64, length: u64, mode: i32) -> Result<u64, Errno> {
    let keep = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        libc::FALLOC_FL_PUNCH_HOLE if keep => {}
        libc::FALLOC_FL_ZERO_RANGE => {}
        _ => return Err(Errno::EOPNOTSUPP),
    }
    let block = u64::from(volume.block);
    let end = offset.checked_add(length).ok_or(Errno::EFBIG)?;
    if !keep && end > volume.size {
        return Err(Errno::ENOSPC);
    }
    let end = end.min(volume.size);
    let whole = offset.is_multiple_of(block) && end.is_multiple_of(block) && length > 0;
    if whole { Ok(end) } else { Err(Errno::EINVAL) }
}

/// A range on its way to zeroes.
struct Zeroing {
    submit: Arc<dyn Submit>,
    volume: u8,
    from: u64,
    to: u64,
    fua: bool,
}

impl Zeroing {
    /// Zeroes the next piece; its callback goes on with the one after it.
    fn go_on(mut self, reply: ReplyEmpty) {
        if self.from >= self.to {
            return reply.ok();
        }
        let len = (self.to - self.from).min(MAX_ZERO);
        let Some(extent) = Address::new(self.volume, self.from).and_then(|at| Extent::new(at, len)) else {
            return reply.error(Errno::EINVAL);
        };
        self.from += len;
        let (submit, fua) = (self.submit.clone(), self.fua);
        let done = move |result: Result<Bytes, IoError>| match result {
            Ok(_) => self.go_on(reply),
            Err(e) => reply.error(errno(e)),
        };
        submit.submit(Op::Zero { extent, fua }, Box::new(done));
    }
}

impl Filesystem for Files {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Without it the loop device's asynchronous requests become one synchronous one at a time.
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|_| io::Error::other("this kernel's FUSE has no asynchronous direct I/O"))?;
        let refused = |limit| io::Error::other(format!("a FUSE limit was refused; possible is {limit}"));
        config.set_max_write(MAX_WRITE).map_err(refused)?;
        config.set_max_background(MAX_BACKGROUND).map_err(|limit| refused(limit.into()))?;
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let index = self.volumes.iter().position(|v| OsStr::new(&v.name) == name);
        let found = index.filter(|_| parent == INodeNo::ROOT).ok_or(Errno::ENOENT);
        match found.and_then(|i| self.attributes(INodeNo(FIRST_FILE + i as u64))) {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(e) => reply.error(e),
        }
    }

    /// Times may be set, without effect; owner, mode and above all the size are fixed.
    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        match self.attributes(ino) {
            Err(e) => reply.error(e),
            Ok(a) if mode.is_none() && uid.is_none() && gid.is_none() && size.is_none_or(|s| s == a.size) => {
                reply.attr(&TTL, &a)
            }
            Ok(_) => reply.error(Errno::EPERM),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.volume(ino) {
            Ok(v) if v.read_only && flags.0 & libc::O_ACCMODE != libc::O_RDONLY => reply.error(Errno::EROFS),
            Ok(_) => {
                let handle = if flags.0 & libc::O_DSYNC != 0 { SYNC_HANDLE } else { PLAIN_HANDLE };
                // Without the second flag a write() holds the file for itself until it is answered.
                reply.opened(handle, FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES)
            }
            Err(e) => reply.error(e),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let volume = match self.volume(ino) {
            Ok(volume) => volume,
            Err(e) => return reply.error(e),
        };
        let Some((extent, part)) = read_plan(volume, offset, size) else {
            return reply.data(&[]);
        };
        let done = move |result: Result<Bytes, IoError>| match result {
            Ok(bytes) if bytes.len() as u64 == extent.len() => reply.data(&bytes[part]),
            Ok(_) => reply.error(Errno::EIO),
            Err(e) => reply.error(errno(e)),
        };
        self.submit.submit(Op::Read(extent), Box::new(done));
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let extent = match self.volume(ino).and_then(|v| write_plan(v, offset, data.len() as u64)) {
            Ok(extent) => extent,
            Err(e) => return reply.error(e),
        };
        // The session's buffer takes the next request as soon as this returns.
        let data = Bytes::copy_from_slice(&data[..extent.len() as usize]);
        // The kernel leaves it to us to make such a write durable, and sends no fsync after it.
        let fua = flags.0 & libc::O_DSYNC != 0;
        let done = move |result: Result<Bytes, IoError>| match result {
            Ok(_) => reply.written(extent.len() as u32),
            Err(e) => reply.error(errno(e)),
        };
        self.submit.submit(Op::Write { extent, data: data.into(), fua }, Box::new(done));
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        if let Err(e) = self.volume(ino) {
            return reply.error(e);
        }
        let done = move |result: Result<Bytes, IoError>| match result {
            Ok(_) => reply.ok(),
            Err(e) => reply.error(errno(e)),
        };
        self.submit.submit(Op::Flush, Box::new(done));
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        match self.zero_range(ino, fh, offset, length, mode) {
            Ok(zeroing) => zeroing.go_on(reply),
            Err(e) => reply.error(e),
        }
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if ino != INodeNo::ROOT {
            return reply.error(Errno::ENOTDIR);
        }
        let dots = [".", ".."].map(|name| (INodeNo::ROOT, FileType::Directory, name));
        let files = self.volumes.iter().zip(FIRST_FILE..);
        let files = files.map(|(v, ino)| (INodeNo(ino), FileType::RegularFile, v.name.as_str()));
        let rest =
            dots.into_iter().chain(files).zip(1u64..).skip(usize::try_from(offset).unwrap_or(usize::MAX));
        for ((ino, kind, name), next) in rest {
            if reply.add(ino, next, kind, name) {
                break;
            }
        }
        reply.ok();
    }

    /// The loop driver takes the granularity of its discards from the block size.
    fn statfs(&self, _req: &Request, ino: INodeNo, reply: ReplyStatfs) {
        let (size, block) = self.volume(ino).map_or((0, 4096), |v| (v.size, v.block));
        reply.statfs(size / u64::from(block), 0, 0, self.volumes.len() as u64, 0, block, 255, block);
    }

    // ENOSYS to these tells the kernel not to ask again, and to do what it does without them.

    /// Sent at each close; nothing is held back that it could write.
    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::ENOSYS);
    }

    /// Holes are not shown: to a reader all of a volume is data.
    fn lseek(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: i64,
        _whence: i32,
        reply: ReplyLseek,
    ) {
        reply.error(Errno::ENOSYS);
    }

    fn getxattr(&self, _req: &Request, _ino: INodeNo, _name: &OsStr, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _req: &Request, _ino: INodeNo, _size: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(size: u64, block: u32) -> Volume {
        Volume { volume: 3, name: "v".into(), size, block, link: "v".into(), read_only: false, lasting: true }
    }

    #[test]
    fn reads_are_rounded_out_and_cut_at_the_end() {
        let v = volume(8192, 4096);
        let plan =
            |offset, size| read_plan(&v, offset, size).map(|(e, r)| (e.address().offset(), e.len(), r));
        assert_eq!(plan(0, 4096), Some((0, 4096, 0..4096)));
        assert_eq!(plan(100, 10), Some((0, 4096, 100..110)));
        assert_eq!(plan(4095, 2), Some((0, 8192, 4095..4097)));
        assert_eq!(plan(8000, 4096), Some((4096, 4096, 3904..4096)));
        for (offset, size) in [(8192, 1), (0, 0), (100, 0), (u64::MAX, 1), (1 << 60, 4096)] {
            assert_eq!(plan(offset, size), None);
        }
    }

    #[test]
    fn writes_are_whole_blocks_and_cut_at_the_end() {
        let v = volume(8192, 1024);
        assert_eq!(write_plan(&v, 1024, 2048).map(|e| (e.address().offset(), e.len())), Ok((1024, 2048)));
        assert_eq!(write_plan(&v, 7168, 2048).map(|e| (e.address().offset(), e.len())), Ok((7168, 1024)));
        for (offset, len) in [(512, 1024), (0, 512), (0, 0), (1, 1)] {
            assert_eq!(write_plan(&v, offset, len), Err(Errno::EINVAL));
        }
        for offset in [8192, u64::MAX - 1023] {
            assert_eq!(write_plan(&v, offset, 1024), Err(Errno::ENOSPC));
        }
        let read_only = Volume { read_only: true, ..v };
        assert_eq!(write_plan(&read_only, 1024, 2048), Err(Errno::EROFS));
    }

    #[test]
    fn only_what_zeroes_whole_blocks_is_zeroed() {
        let (keep, punch, zero) =
            (libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_PUNCH_HOLE, libc::FALLOC_FL_ZERO_RANGE);
        let v = volume(8192, 512);
        assert_eq!(zeroed_end(&v, 512, 1024, punch | keep), Ok(1536));
        assert_eq!(zeroed_end(&v, 512, 1 << 40, zero | keep), Ok(8192));
        assert_eq!(zeroed_end(&v, 0, 8192, zero), Ok(8192));
        assert_eq!(zeroed_end(&v, 0, 8704, zero), Err(Errno::ENOSPC));
        assert_eq!(zeroed_end(&v, 0, 100, zero), Err(Errno::EINVAL));
        assert_eq!(zeroed_end(&v, 512, u64::MAX, zero | keep), Err(Errno::EFBIG));
        for mode in [0, keep, punch, punch | zero | keep, libc::FALLOC_FL_COLLAPSE_RANGE] {
            assert_eq!(zeroed_end(&v, 0, 512, mode), Err(Errno::EOPNOTSUPP));
        }
    }

    #[test]
    fn no_answer_switches_fsync_off_or_is_lost() {
        for (given, answered) in
            [(28, 28), (5, 5), (38, 5), (0, 5), (-5, 5), (512, 5), (i32::MIN, 5), (511, 511)]
        {
            assert_eq!(errno(IoError { errno: given }).code(), answered);
        }
    }
}

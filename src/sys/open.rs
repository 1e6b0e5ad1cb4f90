//! Opening and locking the files of a group.
//!
//! Owns: the answer to "may this process write here". Invariant: the lock is on the very open file
//! that carries the I/O: a request that outlives a killed process keeps that file, and so the lock,
//! and the next process waits for it before it reads anything. No file plays two parts.

use super::uring::Fd;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};
use nix::libc;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Between two attempts to get a lock that a dying process still holds.
const RETRY: Duration = Duration::from_millis(20);

/// Why a file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It does not exist.
    #[error("{} does not exist: check the path, or set the group up with `volrep init`", path.display())]
    Missing {
        /// Which.
        path: PathBuf,
    },
    /// Another process holds it.
    #[error("{} is in use by another process: stop that one first (`fuser -v` names it)", path.display())]
    Busy {
        /// Which.
        path: PathBuf,
    },
    /// One file was given for two parts.
    #[error("{} and {} are the same file or device: give each part its own", a.display(), b.display())]
    Same {
        /// One path.
        a: PathBuf,
        /// The other.
        b: PathBuf,
    },
    /// It is smaller than what it must hold.
    #[error("{} has {has} bytes and must have at least {needed}: enlarge it", path.display())]
    Small {
        /// Which.
        path: PathBuf,
        /// Its size.
        has: u64,
        /// The least.
        needed: u64,
    },
    /// It must have one exact length.
    #[error("{} has {has} bytes and must have {needed}: restore the setting it was made with", path.display())]
    Length {
        /// Which.
        path: PathBuf,
        /// Its size.
        has: u64,
        /// The right one.
        needed: u64,
    },
    /// The device can't address units this small.
    #[error("{} is addressed in units of {has} bytes, but the group was set up for {configured}: use a device with smaller sectors", path.display())]
    Block {
        /// Which.
        path: PathBuf,
        /// Its logical block.
        has: u64,
        /// What the configuration says.
        configured: u64,
    },
    /// It is a directory, a pipe or the like.
    #[error("{} is neither a regular file nor a block device", path.display())]
    Kind {
        /// Which.
        path: PathBuf,
    },
    /// It belongs to another user, or is not a regular file.
    #[error("{} is not a regular file of this user: remove it or choose another path", path.display())]
    NotOurs {
        /// Which.
        path: PathBuf,
    },
    /// The system call failed.
    #[error("can't {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl OpenError {
    /// From a failed system call; "no such file" becomes [`OpenError::Missing`] where it was opened.
    pub fn io(doing: &'static str, path: &Path, source: io::Error) -> OpenError {
        let path = path.to_path_buf();
        match source.kind() {
            io::ErrorKind::NotFound if doing != "create" => OpenError::Missing { path },
            _ => OpenError::Io { doing, path, source },
        }
    }
}

/// What makes two paths the same file: the device's number, or file system and inode.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Identity {
    Device(u64),
    Inode(u64, u64),
}

fn identity(path: &Path) -> Result<Identity, OpenError> {
    let meta = fs::metadata(path).map_err(|e| OpenError::io("look at", path, e))?;
    let kind = meta.file_type();
    if kind.is_block_device() {
        Ok(Identity::Device(meta.rdev()))
    } else if kind.is_file() {
        Ok(Identity::Inode(meta.dev(), meta.ino()))
    } else {
        Err(OpenError::Kind { path: path.into() })
    }
}

/// Refuses two paths to one file. Paths that do not exist (yet) are passed over.
pub fn check_distinct(paths: &[&Path]) -> Result<(), OpenError> {
    let mut seen: Vec<(Identity, &Path)> = Vec::new();
    for path in paths {
        let id = match identity(path) {
            Ok(id) => id,
            Err(OpenError::Missing { .. }) => continue,
            Err(e) => return Err(e),
        };
        if let Some((_, other)) = seen.iter().find(|(i, _)| *i == id) {
            return Err(OpenError::Same { a: other.to_path_buf(), b: path.to_path_buf() });
        }
        seen.push((id, path));
    }
    Ok(())
}

/// Takes the exclusive lock (flock) of an open file. A process that was killed may hold it until its
/// last request to the disk has ended; so it is waited for, at most `patience`.
pub fn lock(file: &File, path: &Path, patience: Duration) -> Result<(), OpenError> {
    patiently(path, patience, || {
        // SAFETY: flock takes a descriptor that is open, and touches no memory.
        match unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    })
}

/// Repeats `attempt` while something else holds the file.
fn patiently<R>(
    path: &Path,
    patience: Duration,
    mut attempt: impl FnMut() -> io::Result<R>,
) -> Result<R, OpenError> {
    let deadline = Instant::now() + patience;
    loop {
        match attempt() {
            Err(e) if matches!(e.raw_os_error(), Some(libc::EWOULDBLOCK | libc::EBUSY | libc::EINTR)) => {
                if Instant::now() >= deadline {
                    return Err(OpenError::Busy { path: path.into() });
                }
                std::thread::sleep(RETRY);
            }
            other => return other.map_err(|e| OpenError::io("open", path, e)),
        }
    }
}

/// A file that is open, locked and measured.
#[derive(Debug)]
pub struct OpenFile {
    /// The description that is locked, and that all I/O goes through.
    pub fd: Fd,
    /// For messages.
    pub path: PathBuf,
    /// Opened with O_DIRECT.
    pub direct: bool,
    /// Offsets and lengths must be multiples of this, bytes: 512 or more.
    pub block: u64,
    /// Bytes.
    pub size: u64,
    /// A block device rather than a regular file.
    pub device: bool,
}

/// Opens and locks a regular file or block device for reading and writing; with O_DIRECT where
/// asked for and where the file system has it.
pub fn open(path: &Path, direct: bool, patience: Duration) -> Result<OpenFile, OpenError> {
    let device = matches!(identity(path)?, Identity::Device(_));
    // O_EXCL on a block device: no mount, no RAID, no other O_EXCL opener at the same time.
    let exclusive = if device { libc::O_EXCL } else { 0 };
    let attempt = |flags| {
        patiently(path, patience, || OpenOptions::new().read(true).write(true).custom_flags(flags).open(path))
    };
    let (file, direct) = match direct.then(|| attempt(exclusive | libc::O_DIRECT)) {
        Some(Ok(file)) => (file, true),
        // tmpfs and some others refuse O_DIRECT.
        Some(Err(OpenError::Io { source, .. })) if source.raw_os_error() == Some(libc::EINVAL) => {
            (attempt(exclusive)?, false)
        }
        Some(Err(e)) => return Err(e),
        None => (attempt(exclusive)?, false),
    };
    lock(&file, path, patience)?;
    measure(file, path, direct)
}

/// Measures a file that is open and locked.
pub fn measure(file: File, path: &Path, direct: bool) -> Result<OpenFile, OpenError> {
    let failed = |e| OpenError::io("measure", path, e);
    let meta = file.metadata().map_err(failed)?;
    let device = meta.file_type().is_block_device();
    let size = if device { device_size(&file).map_err(failed)? } else { meta.len() };
    let block = match (device, direct) {
        (true, true) => device_block(&file).map_err(failed)?,
        (false, true) => direct_block(&file),
        // The page cache takes any unit.
        (_, false) => 512,
    };
    Ok(OpenFile { fd: Rc::new(OwnedFd::from(file)), path: path.into(), direct, block, size, device })
}

impl OpenFile {
    /// Refuses a file smaller than `needed`.
    pub fn at_least(&self, needed: u64) -> Result<(), OpenError> {
        if self.size >= needed {
            return Ok(());
        }
        Err(OpenError::Small { path: self.path.clone(), has: self.size, needed })
    }

    /// Whether a range (offset and length, bytes) can be read and written as the file is open.
    pub fn takes(&self, (offset, len): (u64, u64)) -> bool {
        !self.direct || (offset | len).is_multiple_of(self.block)
    }

    /// Goes on through the page cache, in units of 512 bytes: another node of the group has smaller sectors than this file's
    /// device. The open file, and so the lock, stays the same. Nothing may be in flight.
    pub fn leave_direct(&mut self) {
        let flags = fcntl(&self.fd, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let set = flags.and_then(|f| fcntl(&self.fd, FcntlArg::F_SETFL(f - OFlag::O_DIRECT)));
        let (path, block) = (self.path.display(), self.block);
        (self.direct, self.block) = (false, 512);
        match set {
            // What others have read there may be older than what was written past it.
            Ok(_) => {
                if let Err(e) = posix_fadvise(&self.fd, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED) {
                    tracing::warn!("{path}: the page cache is not emptied: {e}");
                }
                tracing::warn!(
                    "{path} has units of {block} bytes, and less than one is to be read or written: from here on through the page cache"
                );
            }
            // The requests themselves will fail, and say so.
            Err(e) => tracing::error!("{path}: O_DIRECT can't be switched off: {e}"),
        }
    }

    /// Refuses a file that can't be read and written in units of `configured` bytes.
    pub fn addresses(&self, configured: u64) -> Result<(), OpenError> {
        if self.block <= configured {
            return Ok(());
        }
        Err(OpenError::Block { path: self.path.clone(), has: self.block, configured })
    }
}

mod ioctls {
    use nix::libc::{c_int, size_t};
    nix::ioctl_read_bad!(blksszget, nix::libc::BLKSSZGET, c_int);
    nix::ioctl_read!(blkgetsize64, 0x12, 114, size_t);
}

fn device_size(file: &File) -> io::Result<u64> {
    let mut bytes = 0;
    // SAFETY: BLKGETSIZE64 writes one u64 to the pointer, which is `bytes`.
    unsafe { ioctls::blkgetsize64(file.as_raw_fd(), &raw mut bytes) }?;
    Ok(bytes as u64)
}

fn device_block(file: &File) -> io::Result<u64> {
    let mut bytes = 0;
    // SAFETY: BLKSSZGET writes one int to the pointer, which is `bytes`.
    unsafe { ioctls::blksszget(file.as_raw_fd(), &raw mut bytes) }?;
    Ok(u64::try_from(bytes).unwrap_or(512).max(512))
}

/// The unit of O_DIRECT on a regular file: what the kernel says (6.1), or what a read shows.
fn direct_block(file: &File) -> u64 {
    // SAFETY: all zeroes is a valid statx buffer.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH names the descriptor; the kernel fills `stat`.
    let told = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, &raw mut stat)
    };
    if told == 0 && stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0 {
        return u64::from(stat.stx_dio_offset_align).max(512);
    }
    let mut buf = crate::disk::aligned(512);
    buf.resize(512, 0);
    match file.read_at(&mut buf, 0) {
        Err(e) if e.raw_os_error() == Some(Errno::EINVAL as i32) => 4096,
        _ => 512,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_under_two_names_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b, c) = (dir.path().join("a"), dir.path().join("b"), dir.path().join("c"));
        fs::write(&a, [0; 4096]).unwrap();
        fs::hard_link(&a, &b).unwrap();
        fs::write(&c, [0; 4096]).unwrap();
        assert!(matches!(check_distinct(&[&a, &c, &b]), Err(OpenError::Same { .. })));
        let absent = dir.path().join("absent");
        check_distinct(&[&a, &absent, &c, &absent]).unwrap();
        assert!(matches!(check_distinct(&[dir.path()]), Err(OpenError::Kind { .. })));
    }

    #[test]
    fn a_locked_file_is_busy_until_its_holder_lets_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, [0; 8192]).unwrap();
        let first = open(&path, true, Duration::ZERO).unwrap();
        assert_eq!((first.size, first.device), (8192, false));
        assert!(first.block == 512 || first.block == 4096);
        assert!(matches!(open(&path, false, Duration::ZERO), Err(OpenError::Busy { .. })));
        // As after kill -9: the holder goes away while the next process already waits.
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| open(&path, false, Duration::from_secs(20)).map(|f| f.size));
            std::thread::sleep(Duration::from_millis(30));
            drop(first);
            assert_eq!(waiting.join().unwrap().unwrap(), 8192);
        });
        assert!(matches!(open(&dir.path().join("x"), true, Duration::ZERO), Err(OpenError::Missing { .. })));
    }
}

//! Memory that outlives the process: files mapped shared.
//!
//! Owns: the mappings of the write cache's ring and of the dirty maps. Invariant: the file is
//! locked, as long as the mapping, and has all its blocks, so that no access can raise SIGBUS on a
//! full file system; nobody else writes it while we hold the lock.

use super::open::{OpenError, lock};
use crate::disk::Memory;
use memmap2::{MmapMut, MmapOptions};
use nix::fcntl::{FallocateFlags, fallocate};
use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A whole file, mapped.
#[derive(Debug)]
pub struct Mapping {
    map: MmapMut,
    file: fs::File,
}

impl Mapping {
    /// Maps the file at `path`, which must have exactly `len` bytes; makes it (0600, all zeroes,
    /// preallocated, its directory 0700) if it does not exist.
    pub fn open_or_create(path: &Path, len: u64, patience: Duration) -> Result<Mapping, OpenError> {
        match Mapping::open(path, len, patience) {
            Err(OpenError::Missing { .. }) => {
                Mapping::create(path, len).map_err(|source| OpenError::io("create", path, source))?;
                Mapping::open(path, len, patience)
            }
            other => other,
        }
    }

    /// Maps the file at `path`, which must exist with exactly `len` bytes. Waits for its lock at most
    /// `patience` (see [`lock`]).
    pub fn open(path: &Path, len: u64, patience: Duration) -> Result<Mapping, OpenError> {
        Mapping::map(path, len, patience, true)
    }

    /// As [`Mapping::open`], but of a file that may be large and mostly unused: nothing is read before it
    /// is looked at.
    pub fn open_unread(path: &Path, len: u64, patience: Duration) -> Result<Mapping, OpenError> {
        Mapping::map(path, len, patience, false)
    }

    fn map(path: &Path, len: u64, patience: Duration, read: bool) -> Result<Mapping, OpenError> {
        let fail = |doing| move |source| OpenError::io(doing, path, source);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            // The write cache lies in a directory that everybody can write: follow nothing.
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(path)
            .map_err(fail("open"))?;
        let meta = file.metadata().map_err(fail("look at"))?;
        if !meta.is_file() || meta.uid() != nix::unistd::geteuid().as_raw() {
            return Err(OpenError::NotOurs { path: path.into() });
        }
        if meta.len() != len {
            return Err(OpenError::Length { path: path.into(), has: meta.len(), needed: len });
        }
        lock(&file, path, patience)?;
        // Gives a file with holes its blocks, and changes nothing else.
        fallocate(&file, FallocateFlags::empty(), 0, len as i64)
            .map_err(io::Error::from)
            .map_err(fail("preallocate"))?;
        let mut options = MmapOptions::new();
        if read {
            options.populate();
        }
        // SAFETY: the file is locked by us, is ours alone (0600 when we made it) and is never
        // truncated by this program while it is mapped, so the mapping stays valid and nobody else
        // writes through it.
        let map = unsafe { options.map_mut(&file) }.map_err(fail("map"))?;
        Ok(Mapping { map, file })
    }

    /// Makes a file of `len` zeroes that has all its blocks. Under another name first, so that a crash leaves
    /// no half-made one under `path`.
    pub fn create(path: &Path, len: u64) -> io::Result<()> {
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        name.push(".new");
        let temporary = path.with_file_name(name);
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&temporary)?;
        let made = fallocate(&file, FallocateFlags::empty(), 0, len as i64)
            .map_err(io::Error::from)
            .and_then(|()| file.sync_all())
            .and_then(|()| fs::rename(&temporary, path))
            .and_then(|()| fs::File::open(directory)?.sync_all());
        if made.is_err() {
            // What was not finished must not hold space in a full file system.
            let _ = fs::remove_file(&temporary);
        }
        made
    }

    /// Keeps the memory from being swapped out; false where the limits do not allow it.
    pub fn lock_in_memory(&self) -> bool {
        self.map.lock().is_ok()
    }

    /// The file, sharing the lock; fdatasync on it does what msync would (on Linux, msync(MS_SYNC)
    /// is a vfs_fsync_range of the mapped file).
    pub fn file(&self) -> io::Result<fs::File> {
        self.file.try_clone()
    }
}

impl Memory for Mapping {
    fn bytes(&self) -> &[u8] {
        &self.map
    }
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
    fn publish(&mut self, at: usize, word: u64) {
        assert!(
            at.is_multiple_of(8) && at + 8 <= self.map.len(),
            "a published word lies aligned within the memory"
        );
        // SAFETY: in bounds and aligned by the assertion; `&mut self` excludes other access from
        // this process, and atomic access to shared memory is what atomics are for.
        let cell = unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at).cast()) };
        cell.store(word.to_le(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_outlives_its_mapping_and_is_locked_while_mapped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sub/cache");
        let mut m = Mapping::open_or_create(&path, 8192, Duration::ZERO).unwrap();
        assert!(m.bytes().iter().all(|b| *b == 0));
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&path).unwrap().blocks() * 512, 8192);
        m.bytes_mut()[100] = 7;
        m.publish(8, 0x0102_0304_0506_0708);
        drop(m);
        let m = Mapping::open_or_create(&path, 8192, Duration::ZERO).unwrap();
        assert_eq!((m.bytes()[100], m.bytes()[8]), (7, 8));
        let again = Mapping::open(&path, 8192, Duration::ZERO);
        assert!(matches!(again, Err(OpenError::Busy { .. })), "{again:?}");
        drop(m);
        assert!(matches!(
            Mapping::open(&path, 4096, Duration::ZERO),
            Err(OpenError::Length { has: 8192, needed: 4096, .. })
        ));
    }

    #[test]
    fn a_link_in_place_of_the_file_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        drop(Mapping::open_or_create(&real, 4096, Duration::ZERO).unwrap());
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert!(Mapping::open_or_create(&link, 4096, Duration::ZERO).is_err());
    }
}

//! What the daemon relies on of any disk, shown on one of which every request is seen: the loop device of a
//! volume in memory, and a file on ext4 on it.

use crate::descriptors::own_descriptors;
use crate::{MIB, Rig, aligned, pattern, run};
use memmap2::MmapOptions;
use nix::libc;
use nix::mount::{MsFlags, mount};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;
use volrep::disk::freeze;
use volrep::sys::open::{OpenError, open};
use volrep::sys::uring::{Operation, Ring};

/// Writes as the daemon does.
fn write(file: &File, offset: u64, data: &[u8], dsync: bool) {
    let mut ring = Ring::new(4).unwrap();
    let fd = Rc::new(OwnedFd::from(file.try_clone().unwrap()));
    let mut buf = volrep::disk::aligned(data.len());
    buf.extend_from_slice(data);
    ring.submit(Operation::Write { fd, offset, data: freeze(buf), dsync }, ());
    let mut done = Vec::new();
    while ring.in_flight() > 0 {
        ring.turn(None).unwrap();
        ring.reap(&mut done);
    }
    assert_eq!(done.pop().unwrap().result, Ok(data.len()));
}

/// A file of zeroes that were written, as a journal is, on a file system on the device that does nothing by
/// itself.
fn journal(rig: &mut Rig, len: usize) -> File {
    own_descriptors();
    let plain = ["-q", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0"];
    run("mkfs.ext4", &[&plain[..], &[rig.path().to_str().unwrap()]].concat());
    let dir = rig.mount();
    mount(None::<&str>, &dir, None::<&str>, MsFlags::MS_REMOUNT, Some("commit=10000")).unwrap();
    let path = dir.join("journal");
    let mut file = File::create(&path).unwrap();
    file.write_all(&vec![0; len]).unwrap();
    file.sync_all().unwrap();
    direct(&path)
}

fn direct(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

/// Whether the disk holds these bytes somewhere, at a block.
fn on_disk(rig: &Rig, bytes: &[u8]) -> bool {
    let disk = rig.group.bytes(0, rig.group.size());
    disk.chunks_exact(bytes.len()).any(|piece| piece == bytes)
}

#[test]
fn a_durable_write_is_a_write_and_then_a_flush_and_another_write_is_none() {
    need_devices!();
    let rig = Rig::new(16 * MIB, 512, true);
    let device = direct(&rig.path());
    for (dsync, flushed) in [(false, 0), (true, 1)] {
        let (writes, flushes) = (rig.group.writes(), rig.group.flushes());
        write(&device, 8192, &pattern(4096, 1), dsync);
        assert_eq!((rig.group.writes() - writes, rig.group.flushes() - flushes), (1, flushed));
    }
}

#[test]
fn a_durable_overwrite_in_a_written_file_writes_its_block_and_no_metadata() {
    need_devices!();
    let mut rig = Rig::new(64 * MIB, 512, true);
    let file = journal(&mut rig, 1 << 20);
    for n in 0..8u64 {
        let data = pattern(4096, 1000 + n);
        let (writes, flushes) = (rig.group.writes(), rig.group.flushes());
        write(&file, n * 8192, &data, true);
        assert_eq!((rig.group.writes() - writes, rig.group.flushes() - flushes), (1, 1), "write {n}");
        assert!(on_disk(&rig, &data));
    }
    // Without the flag it is the sync that flushes.
    let (data, flushes) = (pattern(4096, 7), rig.group.flushes());
    write(&file, 4096, &data, false);
    assert_eq!(rig.group.flushes(), flushes);
    file.sync_data().unwrap();
    assert_eq!(rig.group.flushes(), flushes + 1);
    drop(file);
    rig.unmount();
}

#[test]
fn what_was_stored_through_a_mapping_is_on_the_disk_after_fdatasync() {
    need_devices!();
    let mut rig = Rig::new(64 * MIB, 512, true);
    let file = journal(&mut rig, 16384);
    // SAFETY: the file is this test's own, and is not truncated while it is mapped.
    let mut map = unsafe { MmapOptions::new().map_mut(&file) }.unwrap();
    let (data, flushes) = (pattern(4096, 42), rig.group.flushes());
    map[4096..8192].copy_from_slice(&data);
    assert!(!on_disk(&rig, &data), "nobody has asked for it");
    file.sync_data().unwrap();
    assert!(on_disk(&rig, &data) && rig.group.flushes() > flushes);
    drop((map, file));
    rig.unmount();
}

/// Why a failed sync is never tried again: the next one succeeds, and the data are nowhere.
#[test]
fn a_sync_after_a_failed_one_succeeds_though_the_data_are_lost() {
    need_devices!();
    let rig = Rig::new(16 * MIB, 512, true);
    let buffered = || OpenOptions::new().read(true).write(true).open(rig.path()).unwrap();
    let (first, second) = (buffered(), buffered());
    let data = pattern(4096, 9);
    first.write_all_at(&data, 65536).unwrap();
    rig.group.fail_with(libc::EIO);
    assert_eq!(first.sync_data().unwrap_err().raw_os_error(), Some(libc::EIO));
    rig.group.fail_with(0);
    let writes = rig.group.writes();
    first.sync_data().unwrap();
    assert_eq!(rig.group.writes(), writes, "it is not written again");
    assert_ne!(rig.group.bytes(65536, 4096), data);
    // Who had opened the file before is told, too, and once.
    assert_eq!(second.sync_data().unwrap_err().raw_os_error(), Some(libc::EIO));
    second.sync_data().unwrap();
}

#[test]
fn direct_io_is_in_whole_blocks_of_the_device() {
    need_devices!();
    for block in [512, 4096] {
        let rig = Rig::new(16 * MIB, block, true);
        let device = direct(&rig.path());
        let errno = |bytes: usize, at: u64| match device.write_at(&aligned(&pattern(bytes, 1)), at) {
            Ok(n) => Some((n != bytes).into()),
            Err(e) => e.raw_os_error(),
        };
        let whole = if block == 512 { Some(0) } else { Some(libc::EINVAL) };
        assert_eq!(errno(512, 0), whole);
        assert_eq!(errno(4096, 512), whole);
        assert_eq!(errno(4096, 4096), Some(0));
        assert_eq!(errno(4096, 100), Some(libc::EINVAL));
        drop(device);
        let opened = open(&rig.path(), true, Duration::from_secs(2)).unwrap();
        assert_eq!((opened.block, opened.direct), (u64::from(block), true));
        assert_eq!(opened.addresses(512).is_ok(), block == 512);
        assert!(matches!(opened.addresses(256), Err(OpenError::Block { .. })));
    }
}

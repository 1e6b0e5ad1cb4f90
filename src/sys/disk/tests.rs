//! The executor against real files.

use super::*;
use crate::sys::open::{measure, open};
use std::fs;
use std::path::Path;
use std::time::Duration;

struct Bench {
    ring: Ring<Tag>,
    disk: Disk,
    next: u64,
}

impl Bench {
    fn new(files: impl IntoIterator<Item = (File, OpenFile)>) -> Bench {
        Bench { ring: Ring::new(8).unwrap(), disk: Disk::new(files), next: 0 }
    }

    fn start(&mut self, file: File, op: DiskOp, answers: &mut Answers) -> Token {
        self.next += 1;
        let token = Token(self.next);
        self.disk.submit(&mut self.ring, DiskRequest { token, file, op }, answers);
        token
    }

    fn finish(&mut self, answers: &mut Answers) {
        let mut done = Vec::new();
        while self.ring.in_flight() > 0 {
            self.ring.turn(None).unwrap();
            self.ring.reap(&mut done);
            for c in done.drain(..) {
                self.disk.complete(&mut self.ring, c.tag, c, answers);
            }
        }
    }

    fn perform(&mut self, file: File, op: DiskOp) -> DiskResult {
        let mut answers = Vec::new();
        let token = self.start(file, op, &mut answers);
        self.finish(&mut answers);
        assert_eq!(answers.len(), 1);
        let (answered, result) = answers.remove(0);
        assert_eq!(answered, token);
        result
    }
}

fn filled(path: &Path, len: usize) -> OpenFile {
    fs::write(path, vec![0xAA; len]).unwrap();
    open(path, true, Duration::ZERO).unwrap()
}

fn write(offset: u64, byte: u8, len: usize, dsync: bool) -> DiskOp {
    let mut data = aligned(len);
    data.resize(len, byte);
    DiskOp::Write { offset, data: freeze(data), dsync }
}

#[test]
fn what_is_written_is_read_and_what_is_zeroed_is_zero() {
    let dir = tempfile::tempdir().unwrap();
    for (name, file) in [("journal", File::Journal), ("backing", File::Backing(7))] {
        let opened = filled(&dir.path().join(name), 4 << 20);
        let mut bench = Bench::new([(file, opened)]);
        bench.perform(file, write(8192, 1, 4096, false)).unwrap();
        bench.perform(file, write(12288, 2, 4096, true)).unwrap();
        bench.perform(file, DiskOp::Sync).unwrap();
        let read = bench.perform(file, DiskOp::Read { offset: 4096, len: 16384 }).unwrap();
        assert!(read.as_ptr().addr().is_multiple_of(4096));
        assert_eq!((read[0], read[4096], read[8192], read[12288]), (0xAA, 1, 2, 0xAA));
        // More than one chunk, where it has to be written.
        bench.perform(file, DiskOp::Zero { offset: 4096, len: 3 << 20 }).unwrap();
        let read = bench.perform(file, DiskOp::Read { offset: 0, len: 4 << 20 }).unwrap();
        assert!(read[4096..4096 + (3 << 20)].iter().all(|b| *b == 0));
        assert!(read[..4096].iter().chain(&read[4096 + (3 << 20)..]).all(|b| *b == 0xAA));
    }
}

#[test]
fn an_unaligned_slice_is_written_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let opened = filled(&dir.path().join("a"), 8192);
    let mut bench = Bench::new([(File::Backing(0), opened)]);
    let data = Bytes::from(vec![3; 4097]).slice(1..);
    bench.perform(File::Backing(0), DiskOp::Write { offset: 0, data, dsync: false }).unwrap();
    let read = bench.perform(File::Backing(0), DiskOp::Read { offset: 0, len: 4096 }).unwrap();
    assert!(read.iter().all(|b| *b == 3));
}

#[test]
fn a_short_file_an_unknown_file_and_an_overflow_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new([(File::Journal, filled(&dir.path().join("a"), 8192))]);
    assert_eq!(bench.perform(File::Journal, DiskOp::Read { offset: 4096, len: 8192 }), Err(IoError::EIO));
    assert_eq!(bench.perform(File::Backing(1), DiskOp::Sync), Err(IoError::EINVAL));
    let past = DiskOp::Zero { offset: u64::MAX - 4095, len: 8192 };
    assert_eq!(bench.perform(File::Journal, past), Err(IoError::EINVAL));
}

#[test]
fn syncs_that_wait_together_are_answered_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut bench = Bench::new([(File::Journal, filled(&dir.path().join("a"), 8192))]);
    let mut answers = Vec::new();
    let tokens: Vec<Token> =
        (0..10).map(|_| bench.start(File::Journal, DiskOp::Sync, &mut answers)).collect();
    assert_eq!(bench.ring.in_flight(), 1);
    bench.finish(&mut answers);
    assert_eq!(answers.iter().map(|(t, _)| *t).collect::<Vec<_>>(), tokens);
    assert!(answers.iter().all(|(_, r)| r.is_ok()));
}

#[test]
fn a_failed_write_latches_its_file_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = Path::new("/dev/full");
    let full = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let full = measure(full, path, false).unwrap();
    let mut bench =
        Bench::new([(File::Backing(0), full), (File::Journal, filled(&dir.path().join("a"), 8192))]);
    let file = File::Backing(0);
    assert_eq!(bench.perform(file, write(0, 1, 512, false)), Err(IoError::ENOSPC));
    assert_eq!(bench.perform(file, write(0, 1, 512, false)), Err(IoError::EIO));
    assert_eq!(bench.perform(file, DiskOp::Sync), Err(IoError::EIO));
    assert_eq!(bench.perform(file, DiskOp::Zero { offset: 0, len: 512 }), Err(IoError::EIO));
    assert!(bench.perform(file, DiskOp::Read { offset: 0, len: 512 }).is_ok());
    bench.perform(File::Journal, DiskOp::Sync).unwrap();
}

#[test]
fn a_failed_sync_latches_and_fails_those_who_wait() {
    // fdatasync of a pipe is EINVAL.
    let (_end, pipe) = std::io::pipe().unwrap();
    let file = fs::File::from(std::os::fd::OwnedFd::from(pipe));
    let opened = measure(file, Path::new("pipe"), false).unwrap();
    let mut bench = Bench::new([(File::DirtyMaps, opened)]);
    let mut answers = Vec::new();
    bench.start(File::DirtyMaps, DiskOp::Sync, &mut answers);
    bench.start(File::DirtyMaps, DiskOp::Sync, &mut answers);
    bench.finish(&mut answers);
    assert_eq!(answers, [(Token(1), Err(IoError::EINVAL)), (Token(2), Err(IoError::EIO))]);
    assert_eq!(bench.perform(File::DirtyMaps, DiskOp::Sync), Err(IoError::EIO));
}

/// A loop device over a file, where this machine lets us have one.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Option<Loop> {
        Loop::in_units_of("512", path)
    }
    fn in_units_of(sector: &str, path: &Path) -> Option<Loop> {
        let args = ["--find", "--show", "--sector-size", sector];
        let out = std::process::Command::new("losetup").args(args).arg(path).output().ok()?;
        out.status.success().then(|| Loop(String::from_utf8_lossy(&out.stdout).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_claimed_measured_and_zeroed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, vec![0xAA; 4 << 20]).unwrap();
    let Some(device) = Loop::over(&path) else {
        eprintln!("skipped: no loop device can be had here (not root, or no losetup)");
        return;
    };
    let opened = open(Path::new(&device.0), true, Duration::ZERO).unwrap();
    assert_eq!((opened.size, opened.device, opened.direct), (4 << 20, true, true));
    let again = open(Path::new(&device.0), true, Duration::ZERO);
    assert!(matches!(again, Err(crate::sys::open::OpenError::Busy { .. })), "{again:?}");
    let mut bench = Bench::new([(File::Backing(0), opened)]);
    bench.perform(File::Backing(0), DiskOp::Zero { offset: 4096, len: 1 << 20 }).unwrap();
    bench.perform(File::Backing(0), write(4 << 19, 1, 4096, true)).unwrap();
    bench.perform(File::Backing(0), DiskOp::Sync).unwrap();
    let read = bench.perform(File::Backing(0), DiskOp::Read { offset: 0, len: 4 << 20 }).unwrap();
    assert!(read[4096..4096 + (1 << 20)].iter().all(|b| *b == 0));
    assert_eq!((read[0], read[4096 + (1 << 20)], read[4 << 19]), (0xAA, 0xAA, 1));
    // As on a device that has no way to deallocate or zero.
    bench.disk.slots[0].means = Means::Write;
    bench.perform(File::Backing(0), DiskOp::Zero { offset: 0, len: 4 << 20 }).unwrap();
    let read = bench.perform(File::Backing(0), DiskOp::Read { offset: 0, len: 4 << 20 }).unwrap();
    assert!(read.iter().all(|b| *b == 0));
}

/// Its primary has sectors of 512 bytes: so have its records.
#[test]
fn a_device_of_large_sectors_takes_small_writes_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    fs::write(&path, vec![0xAA; 4 << 20]).unwrap();
    let Some(device) = Loop::in_units_of("4096", &path) else {
        eprintln!("skipped: no loop device can be had here (not root, or no losetup)");
        return;
    };
    let all = DiskOp::Read { offset: 0, len: 64 << 10 };
    for small in [
        write(512, 1, 512, true),
        write(512, 1, 1024, false),
        write(4096, 1, 512, false),
        DiskOp::Zero { offset: 1024, len: 3072 },
        DiskOp::Read { offset: 512, len: 512 },
    ] {
        let opened = open(Path::new(&device.0), true, Duration::ZERO).unwrap();
        assert_eq!((opened.block, opened.direct), (4096, true));
        let mut bench = Bench::new([(File::Backing(0), opened)]);
        let mut expected = bench.perform(File::Backing(0), all.clone()).unwrap().to_vec();
        // Somebody reads what is about to be written, and so has it in the page cache.
        assert!(fs::read(&device.0).unwrap()[..expected.len()] == expected);
        // Large ones are on their way when the small one comes.
        let mut answers = Vec::new();
        for i in 0..8 {
            bench.start(File::Backing(0), write(8192 + i * 4096, 7, 4096, false), &mut answers);
        }
        bench.ring.turn(Some(0)).unwrap();
        bench.start(File::Backing(0), small.clone(), &mut answers);
        bench.start(File::Backing(0), DiskOp::Sync, &mut answers);
        let slot = &bench.disk.slots[0];
        assert_eq!((slot.flights, slot.held.len(), slot.file.direct), (8, 2, true));
        bench.finish(&mut answers);
        let slot = &bench.disk.slots[0];
        assert_eq!((slot.flights, slot.held.len(), slot.file.direct), (0, 0, false));
        assert!(answers.len() == 10 && answers.iter().all(|(_, r)| r.is_ok()), "{answers:?}");
        expected[8192..8192 + 8 * 4096].fill(7);
        match &small {
            DiskOp::Write { offset, data, .. } => {
                expected[*offset as usize..*offset as usize + data.len()].fill(1)
            }
            DiskOp::Zero { offset, len } => expected[*offset as usize..(*offset + *len) as usize].fill(0),
            _ => {}
        }
        assert!(bench.perform(File::Backing(0), all.clone()).unwrap() == expected, "{small:?}");
        drop(bench);
        // And so it is for whoever reads the device itself.
        let again = open(Path::new(&device.0), true, Duration::from_secs(10)).unwrap();
        let mut bench = Bench::new([(File::Backing(0), again)]);
        assert!(bench.perform(File::Backing(0), all.clone()).unwrap() == expected, "{small:?}");
    }
}

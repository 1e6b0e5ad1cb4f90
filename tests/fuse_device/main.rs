//! The FUSE front end and its loop devices against the real kernel, over a volume in memory.
//!
//! Owns: the proof of each claim in kernel-notes/loop-direct-io.md and kernel-notes/fuse.md, and of those in
//! other pages that want a disk of which every request is seen. Needs root, /dev/fuse and
//! /dev/loop-control; says so and passes where these are missing. Each test has its own mount and
//! devices, and takes them away even when it fails.

#[path = "../descriptors/mod.rs"]
mod descriptors;
#[path = "../memory_group/mod.rs"]
mod memory_group;

use descriptors::own_descriptors;
use memory_group::{Hold, MemoryGroup};
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use volrep::front::Volume;
use volrep::front::fuse::{FuseDevice, FuseError, FuseOptions};

const MIB: u64 = 1 << 20;
/// How the killed child of the leftovers tests is told where to attach.
const CHILD_DIR: &str = "VOLREP_TEST_FUSE_DIR";

/// A device over memory, with what must be undone after a test.
struct Rig {
    group: Arc<MemoryGroup>,
    device: Option<FuseDevice>,
    filesystem: PathBuf,
    dir: tempfile::TempDir,
}

/// Says why a test can't run here.
fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("not root");
    }
    let device = |path: &str| OpenOptions::new().read(true).write(true).open(path).is_ok();
    if !device("/dev/fuse") {
        return Some("no /dev/fuse");
    }
    if !device("/dev/loop-control") {
        return Some("no /dev/loop-control");
    }
    None
}

macro_rules! need_devices {
    () => {
        if let Some(reason) = crate::missing() {
            println!("skipped: {reason}");
            return;
        }
    };
}

mod disk;

fn options(dir: &Path, group: Arc<MemoryGroup>, block: u32, loop_device: bool) -> FuseOptions {
    let size = group.size();
    FuseOptions {
        mount_dir: dir.join("fuse"),
        dev_dir: dir.join("dev"),
        volumes: vec![Volume {
            volume: 0,
            name: "data".into(),
            size,
            block,
            link: "epic".into(),
            read_only: false,
            lasting: true,
        }],
        loop_device,
        submit: group,
    }
}

impl Rig {
    fn new(size: u64, block: u32, loop_device: bool) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let group = MemoryGroup::new(size);
        let device = FuseDevice::attach(options(dir.path(), group.clone(), block, loop_device)).unwrap();
        Rig { group, device: Some(device), filesystem: dir.path().join("fs"), dir }
    }
    fn path(&self) -> PathBuf {
        self.device.as_ref().unwrap().paths().remove(0)
    }
    /// `/sys/block/loopN/…` of its loop device.
    fn attribute(&self, name: &str) -> String {
        let node = self.device.as_ref().unwrap().nodes().remove(0);
        let file = Path::new("/sys/block").join(node.file_name().unwrap()).join(name);
        fs::read_to_string(file).unwrap().trim().to_string()
    }
    fn open_direct(&self) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(self.path()).unwrap()
    }
    fn mount(&self) -> PathBuf {
        fs::create_dir_all(&self.filesystem).unwrap();
        mount(Some(&self.path()), &self.filesystem, Some("ext4"), MsFlags::empty(), None::<&str>).unwrap();
        self.filesystem.clone()
    }
    fn unmount(&self) {
        umount(&self.filesystem).unwrap();
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.group.let_go();
        let _ = umount2(&self.filesystem, MntFlags::MNT_DETACH);
        drop(self.device.take());
        // What a killed child left, when the test failed before it was taken up.
        let _ = umount2(&self.dir.path().join("fuse"), MntFlags::MNT_DETACH | MntFlags::MNT_FORCE);
    }
}

/// Runs a program; its output, once it has succeeded.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Bytes that differ from place to place.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    let mut bytes = vec![0; len];
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// A buffer that O_DIRECT takes.
fn aligned(bytes: &[u8]) -> volrep::disk::AlignedBuf {
    volrep::disk::AlignedBuf::from_slice(4096, bytes)
}

#[test]
fn ext4_on_the_device_survives_unmount_check_and_remount() {
    need_devices!();
    own_descriptors();
    let mut rig = Rig::new(128 * MIB, 512, true);
    let path = rig.path();
    assert_eq!(path, rig.dir.path().join("dev/epic"));
    run("mkfs.ext4", &["-q", path.to_str().unwrap()]);
    let dir = rig.mount();
    for i in 0..40u64 {
        fs::write(dir.join(i.to_string()), pattern(1 + 37_000 * i as usize, i)).unwrap();
    }
    let before = rig.group.flushes();
    let mut file = File::create(dir.join("synced")).unwrap();
    file.write_all(b"committed").unwrap();
    file.sync_all().unwrap();
    assert!(rig.group.flushes() > before, "fsync on the filesystem did not reach the group");
    drop(file);

    let busy = rig.device.as_mut().unwrap().detach(false).unwrap_err();
    assert!(busy.is_busy() && busy.to_string().contains("/fs"), "{busy}");
    assert_eq!(fs::read(dir.join("synced")).unwrap(), b"committed");
    rig.unmount();
    run("e2fsck", &["-fn", path.to_str().unwrap()]);

    let dir = rig.mount();
    for i in 0..40u64 {
        assert!(
            fs::read(dir.join(i.to_string())).unwrap() == pattern(1 + 37_000 * i as usize, i),
            "file {i}"
        );
    }
    rig.unmount();
    let node = rig.device.as_ref().unwrap().nodes().remove(0);
    rig.device.as_mut().unwrap().detach(false).unwrap();
    assert!(!path.exists() && path.symlink_metadata().is_err(), "the link stayed");
    assert!(
        !Path::new("/sys/block").join(node.file_name().unwrap()).join("loop").exists(),
        "{node:?} stayed bound"
    );
    assert!(!rig.dir.path().join("fuse").exists(), "the mount point stayed");
}

#[test]
fn fio_verifies_what_it_wrote_with_overlapping_unequal_requests() {
    need_devices!();
    let rig = Rig::new(64 * MIB, 512, true);
    let file = format!("--filename={}", rig.path().display());
    let text = run(
        "fio",
        &[
            "--name=verify",
            &file,
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=16",
            "--rw=randwrite",
            "--bsrange=512-1m",
            "--bs_unaligned=0",
            "--blockalign=512",
            "--size=64m",
            "--io_size=512m",
            "--verify_state_save=0",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--randrepeat=0",
            "--serialize_overlap=1",
        ],
    );
    assert!(text.contains("err= 0"), "{text}");
}

#[test]
fn the_kernel_is_told_of_a_volatile_cache_and_direct_io_for_each_block_size() {
    need_devices!();
    for block in [512, 4096] {
        let rig = Rig::new(16 * MIB, block, true);
        assert_eq!(rig.attribute("queue/write_cache"), "write back");
        assert_eq!(rig.attribute("queue/fua"), "0");
        assert_eq!(rig.attribute("loop/dio"), "1");
        assert_eq!(rig.attribute("queue/logical_block_size"), block.to_string());
        assert_eq!(rig.attribute("queue/discard_granularity"), block.to_string());
        assert_eq!(rig.attribute("size"), (16 * MIB / 512).to_string());
        let (writes, flushes) = (rig.group.writes(), rig.group.flushes());
        let file = rig.open_direct();
        file.write_all_at(&aligned(&pattern(8192, 1)), 4096).unwrap();
        assert_eq!((rig.group.writes() - writes, rig.group.flushes() - flushes), (1, 0));
        assert_eq!(rig.group.bytes(4096, 8192), pattern(8192, 1));
        file.sync_data().unwrap();
        assert_eq!(rig.group.flushes() - flushes, 1);
    }
}

#[test]
fn requests_are_in_flight_together() {
    need_devices!();
    let rig = Rig::new(64 * MIB, 512, true);
    rig.group.hold(Hold::Writes);
    let file = format!("--filename={}", rig.path().display());
    let mut fio = Command::new("fio")
        .args(["--name=depth", &file, "--direct=1", "--ioengine=libaio", "--iodepth=32", "--rw=randwrite"])
        .args(["--bs=4k", "--size=64m", "--number_ios=64"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    rig.group.wait_held(32);
    rig.group.let_go();
    assert!(fio.wait().unwrap().success());
}

#[test]
fn write_calls_on_the_plain_file_are_in_flight_together() {
    need_devices!();
    let rig = Rig::new(MIB, 512, false);
    rig.group.hold(Hold::Writes);
    let writers: Vec<_> = (0..4u64)
        .map(|i| {
            let file = OpenOptions::new().write(true).open(rig.path()).unwrap();
            std::thread::spawn(move || file.write_all_at(&[1; 4096], i * 4096).unwrap())
        })
        .collect();
    rig.group.wait_held(4);
    rig.group.let_go();
    writers.into_iter().for_each(|w| w.join().unwrap());
}

#[test]
fn discard_and_zeroing_give_zeroes_and_write_nothing() {
    need_devices!();
    let rig = Rig::new(64 * MIB, 512, true);
    let file = rig.open_direct();
    let full = aligned(&pattern(MIB as usize, 7));
    (0..8).for_each(|i| file.write_all_at(&full, i * MIB).unwrap());
    drop(file);
    let path = rig.path();
    let path = path.to_str().unwrap();
    let writes = rig.group.writes();
    run("blkdiscard", &["-o", "512", "-l", "1048576", path]);
    run("blkdiscard", &["-z", "-o", "4194304", "-l", "1049088", path]);
    assert_eq!(rig.group.writes(), writes, "zeroes were written out");
    assert!(rig.group.zeroes() >= 2);
    let mut expected = pattern(MIB as usize, 7).repeat(8);
    expected[512..512 + MIB as usize].fill(0);
    expected[4 * MIB as usize..5 * MIB as usize + 512].fill(0);
    assert!(rig.group.bytes(0, 8 * MIB) == expected);
    let mut read = Vec::new();
    File::open(path).unwrap().take(8 * MIB).read_to_end(&mut read).unwrap();
    assert!(read == expected);

    run("mkfs.ext4", &["-q", path]);
    let dir = rig.mount();
    let zeroes = rig.group.zeroes();
    run("fstrim", &[dir.to_str().unwrap()]);
    assert!(rig.group.zeroes() > zeroes);
    rig.unmount();
}

#[test]
fn a_failed_flush_or_write_is_seen_by_the_user() {
    need_devices!();
    let rig = Rig::new(16 * MIB, 512, true);
    let file = rig.open_direct();
    // 38 is ENOSYS: passed on, it would turn every later fsync into a success that reaches nobody.
    for errno in [5, 28, 38] {
        rig.group.fail_with(errno);
        assert!(file.sync_all().is_err(), "errno {errno}");
        assert!(file.write_at(&aligned(&[1; 4096]), 0).is_err(), "errno {errno}");
        rig.group.fail_with(0);
        let before = rig.group.flushes();
        file.sync_all().unwrap();
        assert_eq!(rig.group.flushes(), before + 1, "after errno {errno}");
    }
}

#[test]
fn the_plain_file_behaves_as_a_disk() {
    need_devices!();
    let mut rig = Rig::new(MIB, 512, false);
    let path = rig.path();
    assert_eq!(path, rig.dir.path().canonicalize().unwrap().join("fuse/data"));
    assert!(!rig.dir.path().join("dev").exists() && fs::metadata(&path).unwrap().len() == MIB);
    let errno = |r: std::io::Result<usize>| r.unwrap_err().raw_os_error().unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    assert_eq!(errno(file.write_at(&[1; 100], 0)), libc::EINVAL);
    assert_eq!(errno(file.write_at(&[1; 512], 100)), libc::EINVAL);
    assert_eq!(errno(file.write_at(&[1; 512], MIB)), libc::ENOSPC);
    assert_eq!(file.write_at(&[1; 1024], MIB - 512).unwrap(), 512);
    assert_eq!(errno(file.set_len(0).map(|()| 0)), libc::EPERM);
    let reserved = nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, 512);
    assert_eq!(reserved, Err(nix::errno::Errno::EOPNOTSUPP));
    file.write_all_at(&pattern(4096, 3), 8192).unwrap();
    let mut part = [0; 100];
    file.read_exact_at(&mut part, 8192 + 1000).unwrap();
    assert_eq!(part, pattern(4096, 3)[1000..1100]);
    assert_eq!(file.read_at(&mut part, MIB).unwrap(), 0);
    assert_eq!(rig.group.fua(), 0);
    for flag in [libc::O_DSYNC, libc::O_SYNC] {
        let (fua, flushes) = (rig.group.fua(), rig.group.flushes());
        let synced = OpenOptions::new().write(true).custom_flags(flag).open(&path).unwrap();
        synced.write_all_at(&[9; 512], 0).unwrap();
        assert_eq!((rig.group.fua(), rig.group.flushes()), (fua + 1, flushes));
    }
    let flushes = rig.group.flushes();
    file.sync_data().unwrap();
    assert_eq!(rig.group.flushes(), flushes + 1);
    let names: Vec<_> =
        fs::read_dir(path.parent().unwrap()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["data"]);
    assert!(rig.device.as_mut().unwrap().detach(false).unwrap_err().is_busy());
    drop(file);
    rig.device.as_mut().unwrap().detach(false).unwrap();
}

#[test]
fn an_open_device_is_refused_and_stays_whole_unless_forced() {
    need_devices!();
    let mut rig = Rig::new(16 * MIB, 512, true);
    let file = rig.open_direct();
    let error = rig.device.as_mut().unwrap().detach(false).unwrap_err();
    assert!(error.is_busy() && error.to_string().contains(&std::process::id().to_string()), "{error}");
    assert_eq!(rig.attribute("loop/autoclear"), "0");
    file.write_all_at(&aligned(&pattern(4096, 5)), 0).unwrap();
    rig.device.as_mut().unwrap().detach(true).unwrap();
    assert!(file.write_at(&aligned(&[0; 4096]), 0).is_err());
    assert_eq!(rig.group.bytes(0, 4096), pattern(4096, 5));
}

#[test]
fn a_second_daemon_is_refused_at_the_same_place() {
    need_devices!();
    let rig = Rig::new(MIB, 512, true);
    let again = FuseDevice::attach(options(rig.dir.path(), rig.group.clone(), 512, true));
    assert!(matches!(again.err(), Some(FuseError::Served { .. })));
    rig.open_direct().write_all_at(&aligned(&[4; 4096]), 0).unwrap();
}

/// Not a test: the process that the leftovers tests kill.
#[test]
fn child_that_attaches_and_waits_to_be_killed() {
    let Some(dir) = std::env::var_os(CHILD_DIR).map(PathBuf::from) else { return };
    let device = FuseDevice::attach(options(&dir, MemoryGroup::new(64 * MIB), 512, true)).unwrap();
    println!("\nattached {}", device.nodes()[0].display());
    let _ = std::io::stdin().read(&mut [0]);
}

/// Not a test: the process that is killed while the kernel waits for it, in the middle of an attach.
#[test]
fn child_that_answers_no_flush() {
    let Some(dir) = std::env::var_os(CHILD_DIR).map(PathBuf::from) else { return };
    let group = MemoryGroup::new(64 * MIB);
    group.hold(Hold::Flushes);
    let held = group.clone();
    std::thread::spawn(move || {
        held.wait_held(1);
        println!("\nattached {}", dir.display());
    });
    FuseDevice::attach(options(&PathBuf::from(std::env::var_os(CHILD_DIR).unwrap()), group, 512, true))
        .unwrap();
}

#[test]
fn a_daemon_that_is_killed_while_it_binds_a_loop_device_is_gone() {
    need_devices!();
    own_descriptors();
    let dir = tempfile::tempdir().unwrap();
    let (mut child, _) = spawn_child("child_that_answers_no_flush", dir.path());
    child.kill().unwrap();
    let end = Instant::now() + Duration::from_secs(20);
    let mut gone = false;
    while !gone && Instant::now() < end {
        gone = child.try_wait().unwrap().is_some();
        std::thread::sleep(Duration::from_millis(20));
    }
    let left = bound_below(dir.path()); // its file has no such path once it is unmounted
    // Aborts the connection: the loop driver takes no request of anybody meanwhile.
    umount2(&dir.path().join("fuse"), MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).unwrap();
    child.wait().unwrap();
    left.iter().for_each(|node| drop(run("losetup", &["--detach", node.to_str().unwrap()])));
    assert!(gone, "it waits for itself");
}

/// The loop devices of files below a directory.
fn bound_below(dir: &Path) -> Vec<PathBuf> {
    let blocks = fs::read_dir("/sys/block").unwrap().map_while(Result::ok);
    let below = |at: &Path| {
        fs::read_to_string(at.join("loop/backing_file")).is_ok_and(|f| Path::new(&f).starts_with(dir))
    };
    let bound = blocks.filter(|b| below(&b.path()));
    bound.map(|b| Path::new("/dev").join(b.file_name())).collect()
}

/// Starts such a process; it and its loop device.
fn spawn_child(name: &str, dir: &Path) -> (Child, PathBuf) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD_DIR, dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    let node =
        lines.filter_map(|l| l.strip_prefix("attached ").map(PathBuf::from)).next().expect("child failed");
    (child, node)
}

/// The killed daemon's filesystem is still mounted when the next one attaches, or it is not.
fn leftovers(mounted: bool) {
    own_descriptors();
    let dir = tempfile::tempdir().unwrap();
    let (mut child, stale) = spawn_child("child_that_attaches_and_waits_to_be_killed", dir.path());
    let mut rig =
        Rig { group: MemoryGroup::new(64 * MIB), device: None, filesystem: dir.path().join("fs"), dir };
    if mounted {
        run("mkfs.ext4", &["-q", stale.to_str().unwrap()]);
        fs::create_dir(&rig.filesystem).unwrap();
        mount(Some(&stale), &rig.filesystem, Some("ext4"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(rig.filesystem.join("f"), pattern(100_000, 1)).unwrap();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let stat = nix::sys::statfs::statfs(&rig.dir.path().join("fuse")).unwrap_err();
    assert_eq!(stat, nix::errno::Errno::ENOTCONN);
    let bound = Path::new("/sys/block").join(stale.file_name().unwrap()).join("loop/backing_file");
    assert!(fs::read_to_string(&bound).unwrap().contains("/fuse/data"));

    rig.device = Some(FuseDevice::attach(options(rig.dir.path(), rig.group.clone(), 512, true)).unwrap());
    rig.open_direct().write_all_at(&aligned(&pattern(4096, 2)), 0).unwrap();
    assert_eq!(rig.group.bytes(0, 4096), pattern(4096, 2));
    let node = rig.device.as_ref().unwrap().nodes().remove(0);
    if mounted {
        assert_ne!(node, stale);
        rig.unmount();
    }
    // The number may have been taken up by another test (or by us).
    let dir = rig.dir.path().to_str().unwrap();
    assert!(
        node == stale || !fs::read_to_string(&bound).is_ok_and(|file| file.contains(dir)),
        "{stale:?} stayed"
    );
    rig.device.as_mut().unwrap().detach(false).unwrap();
    assert!(!rig.dir.path().join("fuse").exists());
}

#[test]
fn what_a_killed_daemon_left_is_removed_by_the_next_attach() {
    need_devices!();
    leftovers(false);
}

#[test]
fn what_a_killed_daemon_left_mounted_goes_away_at_its_unmount() {
    need_devices!();
    leftovers(true);
}

/// Not a test: figures, and what the kernel lets through while a flush is under way.
/// `cargo test --release --test fuse_device figures -- --ignored --nocapture`
#[test]
#[ignore = "takes a minute and proves nothing"]
fn figures() {
    need_devices!();
    for loop_device in [true, false] {
        passes_a_flush(loop_device);
    }
    let rig = Rig::new(256 * MIB, 512, true);
    let file = format!("--filename={}", rig.path().display());
    for (rw, bs, depth, sync) in [
        ("randwrite", "4k", 1, 0),
        ("randwrite", "4k", 16, 0),
        ("randwrite", "4k", 32, 0),
        ("randwrite", "4k", 1, 1),
        ("randread", "4k", 1, 0),
        ("randread", "4k", 16, 0),
        ("write", "1m", 8, 0),
        ("read", "1m", 8, 0),
    ] {
        let (bs, depth, sync) =
            (format!("--bs={bs}"), format!("--iodepth={depth}"), format!("--fdatasync={sync}"));
        let args = ["--name=f", &file, "--direct=1", "--ioengine=libaio", "--runtime=5", "--time_based"];
        let rw = format!("--rw={rw}");
        let text = run("fio", &[&args[..], &[&rw, &bs, &depth, &sync, "--output-format=terse"]].concat());
        let fields: Vec<&str> = text.split(';').collect();
        println!("{rw} {bs} {depth} {sync}: read {} iops, write {} iops", fields[7], fields[48]);
    }
}

/// Says whether a read and a write get through while a flush waits for its answer.
fn passes_a_flush(loop_device: bool) {
    let rig = Rig::new(16 * MIB, 512, loop_device);
    let (flush, read, write) = (rig.open_direct(), rig.open_direct(), rig.open_direct());
    rig.group.hold(Hold::Flushes);
    let (reads, writes) = (rig.group.reads(), rig.group.writes());
    let flush = std::thread::spawn(move || flush.sync_data().unwrap());
    rig.group.wait_held(1);
    let read = std::thread::spawn(move || read.read_exact_at(&mut aligned(&[0; 4096]), MIB).unwrap());
    let write = std::thread::spawn(move || write.write_all_at(&aligned(&[1; 4096]), 0).unwrap());
    std::thread::sleep(std::time::Duration::from_millis(300));
    let passed = (rig.group.reads() > reads, rig.group.writes() > writes);
    println!("loop device {loop_device}: during a flush, (read, write) pass: {passed:?}");
    rig.group.let_go();
    [flush, read, write].into_iter().for_each(|thread| thread.join().unwrap());
}

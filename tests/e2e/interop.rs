//! Independent NBD clients on an attached group; the shadow is the same afterwards.

use crate::pair::{Pair, Setup, client, installed, long};
use std::path::Path;

const SIZE: u64 = 64 << 20;

fn two_volumes() -> Setup {
    Setup { volumes: vec![("data", SIZE), ("wal", SIZE / 4)], ..Setup::default() }
}

/// Reproducible bytes that do not compress, with stretches of zeroes among them.
fn pattern(path: &Path, len: usize, seed: u64) {
    let mut data = vec![0; len];
    let mut hasher = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    for piece in data.chunks_mut(96 << 10) {
        let full = piece.len() * 2 / 3;
        hasher.fill(&mut piece[..full]);
    }
    std::fs::write(path, data).unwrap();
}

#[test]
fn nbd_tools_of_others_work_on_a_group_of_two_volumes() {
    if !["nbdinfo", "nbdcopy", "nbdsh"].iter().all(|p| installed(p)) {
        return;
    }
    let mut pair = Pair::start(&two_volumes());
    let devices = pair.primary.attach("nbd-socket");
    let [data, wal] = &devices[..] else { panic!("{devices:?}") };
    let info = client("nbdinfo", &[data]);
    for line in [
        "export-size: 67108864 (64M)",
        "is_read_only: false",
        "can_flush: true",
        "can_fua: true",
        "can_trim: true",
        "can_zero: true",
        "can_df: true",
        "base:allocation",
        "block_size_preferred: 4096",
    ] {
        assert!(info.contains(line), "no {line:?} in\n{info}");
    }
    assert!(client("nbdinfo", &[wal]).contains("export-size: 16777216 (16M)"));
    let list = client("nbdinfo", &["--list", data]);
    assert!(list.contains("\"data\"") && list.contains("\"wal\""), "{list}");

    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    pattern(Path::new(&at("from")), SIZE as usize, 1);
    pattern(Path::new(&at("from2")), SIZE as usize / 4, 2);
    client("nbdcopy", &["--flush", &at("from"), data]);
    client("nbdcopy", &["--flush", &at("from2"), wal]);
    client("nbdcopy", &["--connections=4", "--requests=64", data, &at("to")]);
    client("cmp", &[&at("from"), &at("to")]);
    client("nbdcopy", &[wal, &at("to2")]);
    client("cmp", &[&at("from2"), &at("to2")]);

    let script = "
b = bytes(range(256)) * 16
h.pwrite(b, 8192, nbd.CMD_FLAG_FUA)
h.zero(512, 8192 + 512, nbd.CMD_FLAG_NO_HOLE)
h.trim(512, 8192 + 1024, nbd.CMD_FLAG_FUA)
h.flush()
assert h.pread(4096, 8192) == b[:512] + bytes(1024) + b[1536:]
found = []
h.block_status(1 << 20, 0, lambda name, offset, entries, error: found.append((name, offset, list(entries))))
assert found and found[0][0] == 'base:allocation', found
h.zero(h.get_size() // 2, 0)
assert h.pread(1 << 20, 4 << 20) == bytes(1 << 20)
";
    let open = |uri: &str| format!("h.add_meta_context('base:allocation'); h.connect_uri('{uri}')");
    client("nbdsh", &["-c", &open(data), "-c", script]);
    client("nbdsh", &["-c", &open(wal), "-c", script]);
    pair.finish();
}

#[test]
fn qemu_converts_compares_and_checks_patterns() {
    if !["qemu-img", "qemu-io"].iter().all(|p| installed(p)) {
        return;
    }
    let mut pair = Pair::start(&Setup::default());
    let uri = pair.primary.attach("nbd-socket").remove(0);
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    pattern(Path::new(&at("from")), SIZE as usize, 3);
    client("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", &at("from"), &uri]);
    client("qemu-img", &["compare", "-f", "raw", "-F", "raw", &at("from"), &uri]);
    client("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, &at("back")]);
    client("cmp", &[&at("from"), &at("back")]);
    let commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 4k 512",
        "write -P 0x33 1536 1000",
        "write -z 64k 64k",
        "write -z -u 256k 4k",
        "write -z -n 512k 4k",
        "discard 128k 64k",
        "write -P 0x44 32M 32M",
        "flush",
        "read -P 0x11 0 1536",
        "read -P 0x33 1536 1000",
        "read -P 0x22 4k 512",
        "read -P 0x11 4608 60928",
        "read -P 0 64k 128k",
        "read -P 0 256k 4k",
        "read -P 0 512k 4k",
        "read -P 0x44 32M 32M",
        "aio_write -P 0x55 2M 64k",
        "aio_write -P 0x66 3M 64k",
        "aio_flush",
        "read -P 0x55 2M 64k",
    ];
    let mut args = vec!["-f", "raw"];
    commands.iter().for_each(|c| args.extend(["-c", c]));
    args.push(&uri);
    let out = client("qemu-io", &args);
    assert!(!out.contains("failed"), "{out}");
    pair.finish();
}

#[test]
fn fio_verifies_random_sizes_overlaps_and_trims() {
    if !installed("fio") {
        return;
    }
    let mut pair =
        Pair::start(&Setup { volumes: vec![("data", 4 * SIZE)], journal: "256M", ..Setup::default() });
    let uri = format!("--uri={}", pair.primary.attach("nbd-socket").remove(0));
    let seconds = if long() { 600 } else { 15 };
    let runtime = format!("--runtime={seconds}");
    // Four regions at once, each overwritten many times by requests of unequal sizes and places.
    let common = "--ioengine=nbd --time_based --bs_unaligned=0 --blockalign=512 --iodepth=16 --serialize_overlap=1 \
                  --verify_state_save=0 --verify=crc32c --verify_backlog=256 --do_verify=1 --verify_fatal=1 --randrepeat=0";
    let jobs = [
        "--name=small --rw=randwrite --bsrange=512-16k --offset=0 --size=64m --fsync=16",
        "--name=large --rw=randwrite --bsrange=512-1m --offset=64m --size=64m --fsync=64",
        "--name=trims --rw=randtrimwrite --bs=8k --offset=128m --size=64m --fsync=32",
        "--name=mixed --rw=randrw --rwmixread=30 --bsrange=512-256k --offset=192m --size=64m --fsync=8",
    ];
    let mut args: Vec<&str> = Vec::new();
    for job in jobs {
        args.extend(job.split_whitespace().chain(common.split_whitespace()).chain([&*uri, &*runtime]));
    }
    let out = client("fio", &args);
    assert!(out.matches("err= 0").count() >= 4, "{out}");
    let sums = ["READ: ", "WRITE: ", "TRIM: "];
    out.lines().filter(|l| sums.iter().any(|s| l.contains(s))).for_each(|l| eprintln!("{}", l.trim()));
    pair.finish();
}

#[test]
fn a_device_that_this_machine_can_t_have_is_refused_with_what_to_do() {
    if std::path::Path::new("/sys/module/nbd").exists() {
        println!("skipped: this kernel has the NBD driver");
        return;
    }
    let mut pair = Pair::start(&Setup::default());
    let ended = pair.primary.place.run(&["attach", "g", "--device", "nbd"]);
    ended.expect(1, &["choose another --device"]);
    // Nothing is remembered of it.
    pair.primary.attach("nbd-socket");
    pair.finish();
}

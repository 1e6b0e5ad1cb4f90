//! File systems and a database on the loop device of an attached group.

use crate::descriptors::own_descriptors;
use crate::pair::{Pair, Setup, client, installed, long};
use crate::postgres::{Postgres, Production, impossible};
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

pub const MIB: u64 = 1 << 20;

/// Says why a test can't run here; readies its thread if it can. The first thing in a test.
pub fn missing() -> bool {
    let root = nix::unistd::geteuid().is_root();
    let devices = ["/dev/fuse", "/dev/loop-control"].iter().all(|p| Path::new(p).exists());
    if !root || !devices {
        eprintln!("skipped: a loop device on FUSE needs root, /dev/fuse and /dev/loop-control");
    }
    if root && devices {
        own_descriptors();
    }
    !root || !devices
}

/// Mounts a device below the primary's place (so that it is taken away whatever happens).
pub fn mounted(place: &Path, device: &str, kind: &str) -> PathBuf {
    let dir = place.join("fs");
    fs::create_dir_all(&dir).unwrap();
    mount(Some(device), &dir, Some(kind), MsFlags::empty(), None::<&str>).unwrap();
    dir
}

fn content(n: u64) -> Vec<u8> {
    let mut bytes = vec![0; (n as usize * 7919) % 200_000 + 1];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn on_a_device(kind: &str, make: &str, check: &dyn Fn(&Path)) {
    if missing() || !installed(make) {
        return;
    }
    let volumes = vec![("data", 384 * MIB), ("wal", 16 * MIB)];
    let mut pair = Pair::start(&Setup { volumes, ..Setup::default() });
    let device = pair.primary.attach("fuse").remove(0);
    client(make, &["-q", &device]);
    let dir = mounted(pair.primary.place.path(), &device, kind);
    (0..60).for_each(|n| fs::write(dir.join(n.to_string()), content(n)).unwrap());
    umount(&dir).unwrap();
    check(Path::new(&device));
    let dir = mounted(pair.primary.place.path(), &device, kind);
    (0..60).for_each(|n| assert!(fs::read(dir.join(n.to_string())).unwrap() == content(n), "file {n}"));
    (0..30).for_each(|n| fs::remove_file(dir.join(n.to_string())).unwrap());
    client("fstrim", &["-v", dir.to_str().unwrap()]);
    (60..80).for_each(|n| fs::write(dir.join(n.to_string()), content(n)).unwrap());
    umount(&dir).unwrap();
    check(Path::new(&device));
    pair.finish();
    check(&pair.shadow.backing("data"));
}

#[test]
fn ext4_lives_on_the_device_and_on_the_shadow() {
    on_a_device("ext4", "mkfs.ext4", &|path| {
        client("e2fsck", &["-fn", path.to_str().unwrap()]);
    });
}

#[test]
fn xfs_lives_on_the_device_and_on_the_shadow() {
    on_a_device("xfs", "mkfs.xfs", &|path| {
        client("xfs_repair", &["-n", path.to_str().unwrap()]);
    });
}

#[test]
fn a_killed_daemon_gives_a_mounted_file_system_an_error_and_it_recovers() {
    if missing() || !installed("mkfs.ext4") {
        return;
    }
    let mut pair = Pair::start(&Setup { volumes: vec![("data", 96 * MIB)], ..Setup::default() });
    let device = pair.primary.attach("fuse").remove(0);
    client("mkfs.ext4", &["-q", &device]);
    let mut synced = 0u64;
    for round in 0..if long() { 100 } else { 3 } {
        let dir = mounted(pair.primary.place.path(), &device, "ext4");
        for n in 0..synced {
            assert!(fs::read(dir.join(n.to_string())).unwrap() == content(n), "round {round}: file {n}");
        }
        if synced > 200 {
            (0..synced).for_each(|n| fs::remove_file(dir.join(n.to_string())).unwrap());
            fs::File::open(&dir).unwrap().sync_all().unwrap();
            synced = 0;
        }
        std::thread::scope(|scope| {
            let dir = &dir;
            let writer = scope.spawn(move || {
                for n in synced.. {
                    let written = fs::File::create(dir.join(n.to_string()))
                        .and_then(|mut file| file.write_all(&content(n)).and_then(|()| file.sync_all()))
                        .and_then(|()| fs::File::open(dir)?.sync_all());
                    if let Err(e) = written {
                        return (n, e);
                    }
                }
                unreachable!()
            });
            std::thread::sleep(Duration::from_millis(60 + 37 * (round % 8)));
            pair.primary.kill();
            let (n, error) = writer.join().unwrap();
            eprintln!("round {round}: {n} files synced, then: {error}");
            synced = n;
        });
        umount2(&dir, MntFlags::MNT_DETACH).unwrap();
        pair.primary.start();
        pair.primary.wait_attached();
        // Replays the file system's own journal; then there is nothing to repair.
        let dir = mounted(pair.primary.place.path(), &device, "ext4");
        umount(&dir).unwrap();
        client("e2fsck", &["-fn", &device]);
    }
    pair.finish();
    client("e2fsck", &["-fn", pair.shadow.backing("data").to_str().unwrap()]);
}

#[test]
fn no_commit_acknowledged_at_ack_level_durable_is_missing_after_promotion() {
    if impossible() {
        return;
    }
    for round in 0..if long() { 20 } else { 1 } {
        commits_survive(round);
    }
}

fn commits_survive(round: u64) {
    let volumes = vec![("data", 256 * MIB)];
    let setup = Setup { volumes, sync: true, journal: "256M", ..Setup::default() };
    let Some(Production { mut pair, dir, sockets, server }) = Production::start(&setup) else { return };
    let server = server.expect("it was started");
    // Inserts number after number; a number that is printed was committed.
    let script = "\\set ON_ERROR_STOP 1\n".to_owned()
        + &(1..=20_000)
            .map(|n| format!("insert into log values ({n}, repeat('x', 300)) returning n;\n"))
            .collect::<String>();
    let mut inserts =
        server.psql(&[]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut to = inserts.stdin.take().unwrap();
    let from = inserts.stdout.take().unwrap();
    let mut acknowledged = 0u64;
    std::thread::scope(|scope| {
        // It fails when the client has ended, which it does at the first error.
        scope.spawn(move || drop(to.write_all(script.as_bytes())));
        let reader = scope.spawn(move || {
            let lines = BufReader::new(from).lines().map_while(Result::ok);
            lines.filter_map(|l| l.parse::<u64>().ok()).last().unwrap_or(0)
        });
        std::thread::sleep(Duration::from_millis(400 + 113 * (round % 8)));
        if round % 2 == 1 {
            pair.shadow.kill();
        }
        pair.primary.kill();
        if round.is_multiple_of(2) {
            pair.shadow.kill();
        }
        acknowledged = reader.join().unwrap();
    });
    inserts.wait().unwrap();
    drop(server);
    umount2(&dir, MntFlags::MNT_DETACH).unwrap();
    pair.shadow.start();
    pair.promote();
    let device = pair.shadow.attach("fuse").remove(0);
    let dir = mounted(pair.shadow.place.path(), &device, "ext4");
    let server = Postgres::start(&dir.join("cluster"), sockets.path());
    let found: u64 = server.query("select coalesce(max(n), 0) from log").parse().unwrap();
    let count: u64 = server.query("select count(*) from log").parse().unwrap();
    eprintln!("round {round}: {acknowledged} commits acknowledged, 1..={found} on the shadow");
    assert!(acknowledged > 0, "the load never began");
    assert_eq!(found, count, "rows are missing in between");
    assert!(found >= acknowledged, "{acknowledged} were acknowledged, but only {found} are there");
    drop(server);
    umount(&dir).unwrap();
    client("e2fsck", &["-fn", &device]);
}

//! The primary is moved there and back, under load, by the database's own scripts.

use crate::filesystem::mounted;
use crate::nbd::Client;
use crate::pair::{Node, Pair, Setup, client, long};
use crate::place::until;
use crate::postgres::{BIN, as_postgres, impossible, make_cluster, open, sockets};
use nix::mount::umount;
use nix::sys::signal::Signal;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn back() -> Setup {
    Setup { back: true, ..Setup::default() }
}

/// A script of the administrator's: mounts and starts, or stops and unmounts.
fn scripts(node: &Node, sockets: &Path) {
    let dir = node.place.path().join("fs");
    fs::create_dir_all(&dir).unwrap();
    let text = format!(
        r#"#!/bin/sh
set -e
ctl() {{ cd / && setpriv --reuid=postgres --regid=postgres --clear-groups {BIN}/pg_ctl -w -t 60 -D {dir}/cluster "$@" >&2; }}
case $1 in
start) mount "$3" {dir} && ctl -l {dir}/cluster/log -o "-k {sockets} -c listen_addresses=" start ;;
stop) ctl -m fast stop && umount {dir} ;;
esac
"#,
        dir = dir.display(),
        sockets = sockets.display()
    );
    let path = node.place.path().join("database");
    fs::write(&path, text).unwrap();
    client("chmod", &["755", path.to_str().unwrap()]);
    open(node);
    let path = path.display();
    node.configure(|text| {
        text.replace("[hooks]\n", &format!("[hooks]\nstart = \"{path}\"\nstop = \"{path}\"\n"))
    });
}

/// Inserts number after number wherever the database answers; a number that is counted was committed.
fn insert(sockets: &Path, stop: &AtomicBool, committed: &AtomicU64) -> Duration {
    let (mut gap, mut last) = (Duration::ZERO, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        let n = committed.load(Ordering::Relaxed) + 1;
        let sql = format!("insert into log values ({n}, repeat('x', 300)) on conflict do nothing");
        let mut psql = as_postgres("psql");
        psql.arg("-h").arg(sockets).args(["-d", "postgres", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", &sql]);
        if psql.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success() {
            committed.store(n, Ordering::Relaxed);
            gap = gap.max(last.elapsed());
            last = Instant::now();
        }
    }
    gap
}

fn role_of(node: &Node) -> String {
    node.status()["role"].as_str().unwrap_or_default().to_owned()
}

fn moved(from: &Node, to: &Node, name: &str) -> String {
    let done = from.place.run(&["switchover", "g", "--to", name, "--yes", "--json"]);
    done.expect(0, &[]);
    until("the other one is the primary, and attached", || {
        let status = to.status();
        (status["role"] == "primary" && status["volumes"][0]["device"].is_string()).then_some(())
    });
    assert_eq!(role_of(from), "shadow");
    until("the old primary follows", || (from.status()["state"] == "UpToDate").then_some(()));
    done.json()["text"].as_str().unwrap().to_owned()
}

#[test]
fn a_database_moves_there_and_back_under_load_and_loses_nothing() {
    if impossible() {
        return;
    }
    let sockets = sockets();
    let mut pair = Pair::prepare(&Setup { volumes: vec![("data", 256 * MIB)], journal: "256M", ..back() });
    scripts(&pair.primary, sockets.path());
    scripts(&pair.shadow, sockets.path());
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    let device = pair.primary.attach("fuse").remove(0);
    client("mkfs.ext4", &["-q", &device]);
    let dir = mounted(pair.primary.place.path(), &device, "ext4");
    make_cluster(&dir.join("cluster"));
    umount(&dir).unwrap();
    let script = |node: &Node, verb: &str, device: &str| {
        let path = node.place.path().join("database");
        let ran = Command::new(path).args([verb, "g", device]).output().unwrap();
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    };
    script(&pair.primary, "start", &device);
    let query = |sql: &str| {
        let output = as_postgres("psql")
            .arg("-h")
            .arg(sockets.path())
            .args(["-d", "postgres", "-X", "-q", "-A", "-t", "-c", sql])
            .output()
            .unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    query("create table log (n bigint primary key, filler text)");
    let (stop, committed) = (AtomicBool::new(false), AtomicU64::new(0));
    let gap = std::thread::scope(|scope| {
        let load = scope.spawn(|| insert(sockets.path(), &stop, &committed));
        let more = |by: u64| {
            let goal = committed.load(Ordering::Relaxed) + by;
            until("the load goes on", || (committed.load(Ordering::Relaxed) >= goal).then_some(()));
        };
        for _ in 0..if long() { 10 } else { 1 } {
            more(20);
            moved(&pair.primary, &pair.shadow, "db2");
            more(20);
            moved(&pair.shadow, &pair.primary, "db1");
            more(20);
        }
        stop.store(true, Ordering::Relaxed);
        load.join().unwrap()
    });
    let committed = committed.load(Ordering::Relaxed);
    let (found, count) = (query("select max(n) from log"), query("select count(*) from log"));
    eprintln!("{committed} commits acknowledged, {count} found; longest time without one: {gap:?}");
    assert_eq!((found.parse(), count.parse()), (Ok(committed), Ok(committed)));
    let device = pair.primary.status()["volumes"][0]["device"].as_str().unwrap().to_owned();
    script(&pair.primary, "stop", &device);
    pair.finish();
    client("e2fsck", &["-fn", pair.shadow.backing("data").to_str().unwrap()]);
}

#[test]
fn a_switchover_that_fails_leaves_everything_as_it_was() {
    let mut pair = Pair::prepare(&back());
    let script = |name: &str, text: &str| -> PathBuf {
        let path = pair.primary.place.file(name, text.as_bytes());
        client("chmod", &["755", path.to_str().unwrap()]);
        path
    };
    let stop = script("stop", "#!/bin/sh\ntest ! -e \"${0%/*}/refuse\"\n");
    let start = script("start", "#!/bin/sh\necho \"$@\" >>\"${0%/*}/started\"\n");
    pair.primary.configure(|text| {
        let lines = format!("[hooks]\nstart = \"{}\"\nstop = \"{}\"\n", start.display(), stop.display());
        text.replace("[hooks]\n", &lines)
    });
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    let run = |args: &[&str]| pair.primary.place.run(&[&["switchover", "g"], args].concat());
    // Refused before anything is touched.
    run(&["--to", "db9", "--yes"]).expect(1, &["no peer is called db9", "db2"]);
    let there = pair.shadow.place.run(&["switchover", "g", "--to", "db1", "--yes"]);
    there.expect(11, &["run it on the primary"]);
    let device = pair.primary.attach("nbd-socket").remove(0);
    let dry = run(&["--to", "db2", "--dry-run"]);
    dry.expect(0, &["stop", "take away", &device]);
    assert!(dry.stdout.contains("db2 would become the primary"), "{}", dry.stdout);
    run(&["--to", "db2"]).expect(2, &["--yes"]);
    // The stop script fails: the device is still there.
    pair.primary.place.file("refuse", b"");
    run(&["--to", "db2", "--yes"]).expect(1, &["stop script", "exit status: 1"]);
    let started = || fs::read_to_string(pair.primary.place.path().join("started")).unwrap_or_default();
    assert_eq!((role_of(&pair.primary), started()), ("primary".into(), format!("start g {device}\n")));
    assert_eq!(pair.primary.status()["volumes"][0]["device"], device.as_str());
    // The other one is stopped while the place is handed over: it is not given away.
    fs::remove_file(pair.primary.place.path().join("refuse")).unwrap();
    pair.shadow.daemon().signal(Signal::SIGSTOP);
    Client::connect(&pair.primary.socket(), "data").unwrap().write(0, &[7; 4096]).unwrap();
    let refused = pair.primary.place.run(&["switchover", "g", "--to", "db2", "--yes"]);
    pair.shadow.daemon().signal(Signal::SIGCONT);
    refused.expect(1, &["rolled back", "the primary still"]);
    assert_eq!((role_of(&pair.primary), started().lines().count()), ("primary".into(), 2));
    assert_eq!(pair.primary.status()["volumes"][0]["device"], device.as_str());
    // And then it works.
    pair.wait_following();
    let gone = pair.primary.place.run(&["switchover", "g", "--to", "db2", "--yes"]);
    gone.expect(0, &[]);
    assert!(gone.stdout.contains("db2 has taken over"), "{}", gone.stdout);
    std::mem::swap(&mut pair.primary, &mut pair.shadow);
    pair.wait_following();
    pair.finish();
}

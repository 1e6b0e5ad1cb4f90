//! Drills: scripts against a scratch view, from a mere exit code to a database that recovers while production writes.

use crate::filesystem::{MIB, missing, mounted};
use crate::pair::{Pair, Setup, client, installed};
use crate::place::{Ended, until};
use crate::postgres::{BIN, Postgres, Production, sockets};
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A script in a place.
fn script(pair: &Pair, text: &str) -> PathBuf {
    let path = pair.shadow.place.file("script", format!("#!/bin/sh\n{text}\n").as_bytes());
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn drill(pair: &Pair, text: &str, more: &[&str]) -> Ended {
    let path = script(pair, text);
    let args = ["drill", "g", "--run", path.to_str().unwrap(), "--device", "nbd-socket"];
    pair.shadow.place.run(&[&args, more].concat())
}

/// What the drills so far have left.
fn drills(pair: &Pair) -> Vec<Value> {
    let text = fs::read_to_string(pair.shadow.place.config().join("state/g/drills")).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn is_closed(pair: &Pair) -> bool {
    let left = pair.shadow.place.tree().iter().any(|path| path.contains("stage-"));
    pair.shadow.status()["view"].is_null() && !left
}

#[test]
fn a_drill_is_what_its_script_says_and_its_view_is_closed_in_any_case() {
    let mut pair =
        Pair::start(&Setup { volumes: vec![("data", 16 << 20), ("wal", 8 << 20)], ..Setup::default() });
    pair.settle();
    // Data on stdout, what the script says on stderr; what it is told is in its environment.
    let text = "echo \"$VOLREP_GROUP $VOLREP_LSN\"; for d in $VOLREP_DEVICES; do echo \"is $d\"; done\n\
                [ \"$VOLREP_DEVICE\" = \"${VOLREP_DEVICES% *}\" ]";
    let ended = drill(&pair, text, &["--json"]);
    let lsn = pair.shadow.status()["applied_lsn"].as_u64().unwrap();
    ended.expect(0, &[&format!("g {lsn}\n"), "is nbd+unix:///data?socket=", "is nbd+unix:///wal?socket="]);
    let report = ended.json();
    assert_eq!((&report["passed"], &report["exit"], &report["lsn"]), (&true.into(), &0.into(), &lsn.into()));
    assert_eq!(report["devices"].as_array().unwrap().len(), 2);
    assert!(is_closed(&pair));
    drill(&pair, "exit 3", &[]).expect(1, &["the script exited with 3"]);
    drill(&pair, "kill -9 $$", &[]).expect(1, &["ended by signal 9"]);
    let begun = Instant::now();
    drill(&pair, "sleep 1000 & sleep 1000", &["--timeout", "200ms"]).expect(1, &["took too long"]);
    assert!(begun.elapsed() < Duration::from_secs(30), "it waited for the script");
    fs::write(pair.shadow.place.path().join("no"), "no program").unwrap();
    pair.shadow
        .place
        .run(&["drill", "g", "--run", "no", "--device", "nbd-socket"])
        .expect(1, &["can't be run"]);
    pair.shadow.place.run(&["drill", "g", "--run", "none"]).expect(1, &["none", "No such file"]);
    assert!(is_closed(&pair));
    let kept = drills(&pair);
    let exits: Vec<_> = kept.iter().map(|d| d["exit"].as_i64()).collect();
    assert_eq!(exits, [Some(0), Some(3), None, None, None]);
    assert_eq!(kept[0], report);
    assert!(kept[3]["timed_out"] == true && kept[2]["signal"] == 9);
    pair.finish();
}

#[test]
fn an_interrupted_drill_ends_its_script_and_closes_its_view() {
    let mut pair = Pair::start(&Setup { volumes: vec![("data", 16 << 20)], ..Setup::default() });
    let path = script(&pair, "trap 'echo ended; exit 9' TERM; touch began; sleep 1000 & wait");
    let args = ["drill", "g", "--run", path.to_str().unwrap(), "--device", "nbd-socket"];
    let child =
        pair.shadow.place.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let began = pair.shadow.place.path().join("began");
    until("the script runs", || began.exists().then_some(()));
    assert!(!is_closed(&pair));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    Ended::of(child.wait_with_output().unwrap()).expect(130, &["ended", "interrupted"]);
    assert!(is_closed(&pair));
    assert_eq!(drills(&pair)[0]["interrupted"], true);
    pair.finish();
}

fn production() -> Option<Production> {
    let volumes = vec![("data", 256 * MIB)];
    Production::start(&Setup { volumes, journal: "512M", ..Setup::default() })
}

/// Inserts number after number until it is told to stop; what was committed is told.
fn insert(server: &Postgres, committed: &AtomicU64, stop: &AtomicBool) {
    let mut psql = server.psql(&[]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut to, from) = (psql.stdin.take().unwrap(), psql.stdout.take().unwrap());
    let mut lines = BufReader::new(from).lines();
    for n in committed.load(Ordering::Relaxed) + 1.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        writeln!(to, "insert into log values ({n}, repeat('x', 300)) returning n;").unwrap();
        assert_eq!(lines.next().unwrap().unwrap(), n.to_string());
        committed.store(n, Ordering::Relaxed);
    }
    drop(to);
    psql.wait().unwrap();
}

/// Mounts, recovers, looks, works, stops. The production's own server runs on the same machine here: its process
/// number in the image says nothing about a server on the image.
const RECOVER: &str = r#"
set -e
mount "$VOLREP_DEVICE" "$DRILL_DIR"
trap 'umount "$DRILL_DIR"' EXIT
as() { setpriv --reuid=postgres --regid=postgres --clear-groups "$DRILL_BIN/$@"; }
sql() { as psql -h "$DRILL_SOCKETS" -d postgres -X -q -A -t -v ON_ERROR_STOP=1 -c "$1"; }
rm -f "$DRILL_DIR/cluster/postmaster.pid"
cd /
as pg_ctl -D "$DRILL_DIR/cluster" -w -t 60 -l "$DRILL_SOCKETS/log" -o "-k $DRILL_SOCKETS -c listen_addresses=" start >&2
sql "select count(*), max(n) from log" >"$DRILL_SOCKETS/found"
sql "create table drilled as select * from log; insert into log select n + 1000000, filler from log; delete from log where n <= 10; checkpoint"
sql "select count(*) from drilled" >>"$DRILL_SOCKETS/found"
as pg_ctl -D "$DRILL_DIR/cluster" -w stop >&2
"#;

#[test]
fn a_database_recovers_in_a_drill_while_production_writes_at_full_speed() {
    let Some(mut p) = production() else { return };
    let drilled = tempfile::tempdir().unwrap();
    let sockets = sockets();
    let path = script(&p.pair, RECOVER);
    let mut command = p.pair.shadow.place.command(&["drill", "g", "--device", "fuse", "--json", "--run"]);
    command
        .arg(path)
        .env("DRILL_DIR", drilled.path())
        .env("DRILL_SOCKETS", sockets.path())
        .env("DRILL_BIN", BIN);
    let (committed, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let server = p.server.take().unwrap();
    std::thread::scope(|scope| {
        let load = scope.spawn(|| insert(&server, &committed, &stop));
        let rate = |span: Duration, from: u64| {
            (committed.load(Ordering::Relaxed) - from) as f64 / span.as_secs_f64()
        };
        let begun = Instant::now();
        until("production is under way", || (committed.load(Ordering::Relaxed) > 200).then_some(()));
        let before = rate(begun.elapsed(), 0);
        let known = committed.load(Ordering::Relaxed);
        let tail = p.pair.primary.status()["tail_lsn"].as_u64();
        until("the shadow has these", || {
            (p.pair.shadow.status()["applied_lsn"].as_u64() >= tail).then_some(())
        });
        let (begun, from) = (Instant::now(), committed.load(Ordering::Relaxed));
        let ended = Ended::of(command.output().unwrap());
        ended.expect(0, &[]);
        let report = ended.json();
        let during = rate(begun.elapsed(), from);
        let found = fs::read_to_string(sockets.path().join("found")).unwrap();
        let numbers: Vec<u64> = found.split(['|', '\n']).filter_map(|n| n.parse().ok()).collect();
        let [count, max, copied] = numbers[..] else { panic!("{found:?}") };
        eprintln!(
            "drill at LSN {}: open after {:.3} s, ran {:.1} s; {known} commits known, 1..={max} found; production \
             committed {before:.0}/s before it and {during:.0}/s during it",
            report["lsn"],
            report["open_seconds"].as_f64().unwrap(),
            report["run_seconds"].as_f64().unwrap()
        );
        assert!(count == max && copied == count && max >= known, "{found:?}, {known} known");
        assert!(committed.load(Ordering::Relaxed) > from, "production stood still");
        assert!(is_closed(&p.pair));
        // The lag goes away while production goes on.
        let tail = p.pair.primary.status()["tail_lsn"].as_u64();
        let begun = Instant::now();
        until("the shadow has caught up", || {
            (p.pair.shadow.status()["applied_lsn"].as_u64() >= tail).then_some(())
        });
        eprintln!("caught up {:.3} s after the drill", begun.elapsed().as_secs_f64());
        stop.store(true, Ordering::Relaxed);
        load.join().unwrap();
    });
    let found = server.query("select count(*), max(n) from log");
    let n = committed.load(Ordering::Relaxed);
    assert_eq!(found, format!("{n}|{n}"), "what the drill did is not production's");
    drop(server);
    umount(&p.dir).unwrap();
    p.pair.finish();
    client("e2fsck", &["-fn", p.pair.shadow.backing("data").to_str().unwrap()]);
}

#[test]
fn a_read_only_view_serves_look_ups_during_an_outage_and_the_primary_goes_on() {
    let Some(mut p) = production() else { return };
    let server = p.server.take().unwrap();
    server.query("insert into log select n, repeat('x', 300) from generate_series(1, 5000) n");
    p.pair.settle();
    p.pair.primary.kill();
    drop(server);
    umount2(&p.dir, MntFlags::MNT_DETACH).unwrap();
    let ended = p.pair.shadow.place.run(&["view", "g", "--read-only", "--device", "fuse"]);
    let device = PathBuf::from(ended.expect(0, &[]).stdout.trim());
    // Nothing can be written to it: a file system that has to replay its journal can't be mounted from it.
    let text = device.to_str().unwrap();
    assert_eq!(client("blockdev", &["--getro", text]).trim(), "1");
    let there = tempfile::tempdir().unwrap();
    let plain = mount(Some(&device), there.path(), Some("ext4"), MsFlags::empty(), None::<&str>);
    assert!(plain.is_err(), "mounted to be written to");
    // So a copy is recovered and asked, while the view stays.
    let copy = there.path().join("copy");
    let (from, to) = (format!("if={text}"), format!("of={}", copy.display()));
    client("dd", &["bs=1M", "conv=sparse", "status=none", &from, &to]);
    let dir = there.path().join("fs");
    fs::create_dir(&dir).unwrap();
    client("chmod", &["755", there.path().to_str().unwrap()]);
    client("mount", &["-o", "loop", copy.to_str().unwrap(), dir.to_str().unwrap()]);
    fs::remove_file(dir.join("cluster/postmaster.pid")).unwrap();
    let server = Postgres::start(&dir.join("cluster"), p.sockets.path());
    assert_eq!(server.query("select count(*), sum(n) from log"), "5000|12502500");
    drop(server);
    umount(&dir).unwrap();
    // Who uses it is told, and it stays.
    let mut user = Command::new("sleep").arg("1000").stdin(fs::File::open(&device).unwrap()).spawn().unwrap();
    let close = || p.pair.shadow.place.run(&["view", "g", "--close"]);
    close().expect(11, &["is in use", &format!("{}", user.id())]);
    assert_eq!(p.pair.shadow.status()["view"]["state"], "Open");
    user.kill().unwrap();
    user.wait().unwrap();
    close().expect(0, &[]);
    assert!(!device.exists());
    // The primary comes back and goes on where it was.
    p.pair.primary.start();
    p.pair.primary.wait_attached();
    p.pair.wait_following();
    let device = p.pair.primary.status()["volumes"][0]["device"].as_str().unwrap().to_owned();
    let dir = mounted(p.pair.primary.place.path(), &device, "ext4");
    fs::remove_file(dir.join("cluster/postmaster.pid")).unwrap();
    let server = Postgres::start(&dir.join("cluster"), p.sockets.path());
    server.query("insert into log values (5001, 'after the outage')");
    assert_eq!(server.query("select count(*) from log"), "5001");
    drop(server);
    umount(&dir).unwrap();
    let log = p.pair.shadow.daemon().log();
    assert!(!log.contains("resync"), "a resync: {log}");
    p.pair.finish();
}

fn view_on_a_loop_device() -> Option<(Pair, PathBuf)> {
    if missing() || !installed("mkfs.ext4") {
        return None;
    }
    let volumes = vec![("data", 64 * MIB), ("wal", 8 * MIB)];
    let pair = Pair::start(&Setup { volumes, ..Setup::default() });
    let device = pair.primary.attach("fuse").remove(0);
    client("mkfs.ext4", &["-q", &device]);
    client("sync", &[]);
    pair.settle();
    let dir = pair.shadow.place.path().join("fs");
    fs::create_dir(&dir).unwrap();
    Some((pair, dir))
}

#[test]
fn a_script_that_leaves_a_mount_behind_does_not_keep_the_view_open() {
    let Some((mut pair, dir)) = view_on_a_loop_device() else { return };
    let path = script(&pair, &format!("mount $VOLREP_DEVICE {0} && touch {0}/written", dir.display()));
    let args = ["drill", "g", "--run", path.to_str().unwrap(), "--device", "fuse", "--json"];
    let ended = pair.shadow.place.run(&args);
    let report = ended.expect(0, &["its users get errors now"]).json();
    let by = report["in_use"].as_str().unwrap();
    assert!(by.contains(&format!("mounted on {}", dir.display())), "{by}");
    assert!(report["devices"][1].as_str().unwrap().ends_with("g.view/wal"), "{report}");
    assert!(is_closed(&pair) && pair.shadow.status()["role"] == "shadow");
    umount2(&dir, MntFlags::MNT_DETACH).unwrap();
    pair.finish();
}

#[test]
fn what_a_killed_daemon_leaves_of_a_view_gives_errors_and_the_next_one_takes_it_away() {
    let Some((mut pair, dir)) = view_on_a_loop_device() else { return };
    let mut seen = PathBuf::new();
    for round in 0..2 {
        let ended = pair.shadow.place.run(&["view", "g", "--scratch", "--device", "fuse"]);
        let device = PathBuf::from(ended.expect(0, &[]).stdout.lines().next().unwrap());
        mount(Some(&device), &dir, Some("ext4"), MsFlags::empty(), None::<&str>).unwrap();
        fs::write(dir.join("written"), "in the view").unwrap();
        client("sync", &["-f", dir.join("written").to_str().unwrap()]);
        seen = fs::canonicalize(&device).unwrap();
        pair.shadow.kill();
        pair.shadow.start();
        pair.wait_following();
        until("what was left is taken away", || fs::symlink_metadata(&device).is_err().then_some(()));
        assert!(is_closed(&pair));
        // Whoever still has it is not shown what is not there any more.
        assert!(fs::write(dir.join("more"), "x").and_then(|()| fs::File::open(&dir)?.sync_all()).is_err());
        umount2(&dir, MntFlags::MNT_DETACH).unwrap();
        eprintln!("round {round}: {} gave errors", seen.display());
    }
    let file = Path::new("/sys/block").join(seen.file_name().unwrap()).join("loop/backing_file");
    until("the loop device is free", || (!file.exists()).then_some(()));
    pair.finish();
}

//! An old primary comes back: it serves nothing beside the new one, gives up what only it holds, and follows.

use crate::filesystem::{missing, mounted};
use crate::nbd::Client;
use crate::outage::pour;
use crate::pair::{Node, Pair, Setup, client, free_port, installed};
use crate::place::{Daemon, until};
use crate::postgres::{Postgres, impossible, make_cluster, open, sockets};
use nix::mount::{MntFlags, umount, umount2};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;

/// Writers of numbered rows, with an account of them outside the database; ended with it.
struct Writers(Child);

impl Writers {
    fn start(dsn: &str, log: &Path) -> Writers {
        let mut child = commitlog("write", dsn, log).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "writing\n");
        Writers(child)
    }
    /// They end when the database goes away, or when they are told.
    fn end(mut self, tell: bool) {
        if tell {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0.id() as i32), Signal::SIGTERM).unwrap();
        }
        until("the writers end", || self.0.try_wait().unwrap());
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn commitlog(verb: &str, dsn: &str, log: &Path) -> Command {
    let mut command = Command::new("/usr/bin/python3");
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/commitlog");
    command.arg(tool).args([verb, "--dsn", dsn, "--json", "--log"]).arg(log);
    command
}

/// What the table says of the account; it is an exact prefix of what was sent.
fn account(dsn: &str, log: &Path) -> Value {
    let output = commitlog("compare", dsn, log).output().unwrap();
    let told: Value = serde_json::from_slice(&output.stdout).expect("an account");
    assert!(told["prefix"] == true && output.status.success(), "{told}");
    told
}

/// Blocks of two images that differ, and how small zstd makes those of the first.
fn difference(a: &Path, b: &Path) -> (u64, u64) {
    let (a, b) = (File::open(a).unwrap(), File::open(b).unwrap());
    let len = a.metadata().unwrap().len();
    let (mut x, mut y) = (vec![0; MIB as usize], vec![0; MIB as usize]);
    let mut differ = Vec::new();
    for at in (0..len).step_by(MIB as usize) {
        a.read_exact_at(&mut x, at).unwrap();
        b.read_exact_at(&mut y, at).unwrap();
        let blocks = x.chunks(BLOCK).zip(y.chunks(BLOCK));
        blocks.filter(|(p, q)| p != q).for_each(|(p, _)| differ.extend_from_slice(p));
    }
    (differ.len() as u64, zstd::bulk::compress(&differ, 3).unwrap().len() as u64)
}

fn wait_settled(node: &Node) {
    until("everything is in the backing", || {
        let s = node.status();
        (s["applied_lsn"] == s["tail_lsn"] && s["checkpoint_lsn"] == s["tail_lsn"]).then_some(())
    });
}

fn wait_following(shadow: &Node, primary: &Node) -> Value {
    until("it follows", || {
        let (s, p) = (shadow.status(), primary.status());
        let current = s["applied_lsn"] == p["tail_lsn"] && p["applied_lsn"] == p["tail_lsn"];
        (s["role"] == "shadow" && s["state"] == "UpToDate" && current).then_some(s)
    })
}

#[test]
fn an_old_primary_comes_back_at_the_cost_of_what_has_changed() {
    let psycopg = Command::new("/usr/bin/python3").args(["-c", "import psycopg2"]).output();
    if impossible() || !psycopg.is_ok_and(|o| o.status.success()) {
        eprintln!("skipped: it needs PostgreSQL on a loop device, and psycopg2");
        return;
    }
    const SIZE: u64 = 512 * MIB;
    let mut pair = Pair::start(&Setup {
        volumes: vec![("data", SIZE)],
        journal: "256M",
        back: true,
        ..Setup::default()
    });
    let scratch = sockets();
    let (sockets, log) = (scratch.path(), scratch.path().join("account"));
    [&pair.primary, &pair.shadow].into_iter().for_each(open);
    let dsn = format!("host={} dbname=postgres user=postgres", sockets.display());
    // Day one: the primary works; its last second never reaches the shadow.
    let device = pair.primary.attach("fuse").remove(0);
    client("mkfs.ext4", &["-q", &device]);
    let dir = mounted(pair.primary.place.path(), &device, "ext4");
    make_cluster(&dir.join("cluster"));
    let server = Postgres::start(&dir.join("cluster"), sockets);
    server.query("create table filler as select n, md5(n::text) from generate_series(1, 200000) n");
    let writers = Writers::start(&dsn, &log);
    std::thread::sleep(Duration::from_millis(700));
    pair.shadow.kill();
    std::thread::sleep(Duration::from_millis(700));
    pair.primary.kill();
    writers.end(false);
    drop(server);
    umount2(&dir, MntFlags::MNT_DETACH).unwrap();
    // The shadow takes over, and works on.
    pair.shadow.start();
    pair.promote();
    let device = pair.shadow.attach("fuse").remove(0);
    let dir = mounted(pair.shadow.place.path(), &device, "ext4");
    let server = Postgres::start(&dir.join("cluster"), sockets);
    let told = account(&dsn, &log);
    eprintln!("failover: {} acknowledged, {} lost with the old primary", told["acknowledged"], told["lost"]);
    // The writers send these numbers again; a commit of them has a time of its own then.
    let lost = told["lost_at"].as_array().unwrap().clone();
    assert!(!lost.is_empty(), "the old primary holds nothing of its own: {told}");
    let writers = Writers::start(&dsn, &log);
    server.query("create table news as select n, md5(n::text) from generate_series(1, 60000) n");
    std::thread::sleep(Duration::from_millis(700));
    writers.end(true);
    server.query("checkpoint");
    client("sync", &["-f", dir.to_str().unwrap()]);
    wait_settled(&pair.shadow);
    // The old primary is back.
    pair.primary.start();
    let retired = until("it has learned of the other", || {
        let s = pair.primary.status();
        (s["state"] == "Retired" && s["role"] == "shadow").then_some(s)
    });
    let action = retired["action"].as_str().unwrap();
    assert!(action.contains("volrep rejoin g"), "{action}");
    assert!(retired["reason"].as_str().unwrap().contains("db2 was promoted under term 2"), "{retired}");
    let other = pair.shadow.status();
    assert!(other["action"].as_str().unwrap().contains("on db1: volrep rejoin g"), "{other}");
    let fork = other["peers"][0]["fork_lsn"].as_u64().unwrap();
    pair.primary.place.run(&["attach", "g"]).expect(11, &["volrep rejoin"]);
    pair.primary.place.run(&["verify", "g"]).expect(14, &["db2 was promoted"]);
    pair.shadow.place.run(&["verify", "g"]).expect(14, &["the histories of db1 and this node have parted"]);
    pair.primary.place.run(&["rejoin", "g"]).expect(2, &["becomes a shadow of db2", "salvage file", "--yes"]);
    let dry = pair.primary.place.run(&["rejoin", "g", "--dry-run", "--json"]).expect(0, &[]).json();
    assert_eq!((&dry["dry_run"], &dry["tail_lsn"]), (&json!(true), &retired["tail_lsn"]), "{dry}");
    wait_settled(&pair.primary);
    let (differ, packed) = difference(&pair.shadow.backing("data"), &pair.primary.backing("data"));
    pair.primary.place.run(&["rejoin", "g", "--yes"]).expect(0, &["becomes a shadow of db2"]);
    let now = wait_following(&pair.primary, &pair.shadow);
    let job = &now["refresh"];
    let wire = job["wire"].as_u64().unwrap();
    eprintln!(
        "resync: {differ} bytes differed, {packed} as zstd; compared {} of {SIZE}, {wire} bytes on the wire in {} s",
        job["total"], job["seconds"]
    );
    assert_eq!((&job["cause"], &job["state"]), (&json!("resync"), &json!("Done")), "{job}");
    assert!(wire <= packed + packed / 2 + 256 * 1024, "{wire} bytes for {packed}");
    // mkfs has discarded all of it, before the fork; what was written since is what is read and compared.
    assert!(
        job["total"].as_u64().unwrap() < 4 * differ,
        "more than has changed was compared: {}",
        job["total"]
    );
    let files = pair.primary.place.run(&["salvage", "g", "list", "--json"]).json()["files"].clone();
    assert_eq!((&files[0]["state"], &files[0]["fork_lsn"]), (&json!("whole"), &json!(fork)), "{files}");
    assert_eq!(files[0]["last_lsn"], retired["tail_lsn"], "{files}");
    let file = files[0]["file"].as_str().unwrap();
    pair.primary.place.run(&["salvage", "g", "extract", file, "--to", "out"]).expect(0, &[]);
    // It is a shadow like any other: it gets what is written now, and can take over again.
    let writers = Writers::start(&dsn, &log);
    std::thread::sleep(Duration::from_millis(500));
    writers.end(true);
    drop(server);
    umount(&dir).unwrap();
    pair.shadow.place.run(&["detach", "g"]).expect(0, &[]);
    wait_following(&pair.primary, &pair.shadow);
    assert_eq!(pair.shadow.place.run(&["verify", "g"]).code, 0);
    pair.shadow.stop();
    pair.primary.stop();
    pair.compare();
    pair.primary.start();
    pair.primary.place.run(&["promote", "g", "--i-fenced-the-old-primary", "--yes"]).expect(0, &[]);
    let device = pair.primary.attach("fuse").remove(0);
    let dir = mounted(pair.primary.place.path(), &device, "ext4");
    let server = Postgres::start(&dir.join("cluster"), sockets);
    let told = account(&dsn, &log);
    assert!(told["lost_at"].as_array().unwrap().iter().all(|at| lost.contains(at)), "{told}");
    assert_eq!(server.query("select count(*) from news"), "60000");
    drop(server);
    umount(&dir).unwrap();
    client("e2fsck", &["-fn", &device]);
}

/// A primary that stands still while its shadow is promoted, and then goes on.
fn overtaken(pair: &mut Pair) {
    pair.primary.daemon().signal(Signal::SIGSTOP);
    pair.shadow.kill();
    pair.shadow.start();
    pair.promote();
    pair.primary.daemon().signal(Signal::SIGCONT);
    until("it has learned of the other", || (pair.primary.status()["state"] == "Retired").then_some(()));
}

#[test]
fn a_device_that_is_in_use_is_not_taken_away_and_nothing_is_given_up() {
    if missing() || !installed("mkfs.ext4") {
        return;
    }
    let mut pair = Pair::start(&Setup { volumes: vec![("data", 96 * MIB)], back: true, ..Setup::default() });
    let device = pair.primary.attach("fuse").remove(0);
    client("mkfs.ext4", &["-q", &device]);
    let dir = mounted(pair.primary.place.path(), &device, "ext4");
    fs::write(dir.join("a"), b"old").unwrap();
    client("sync", &["-f", dir.to_str().unwrap()]);
    pair.settle();
    overtaken(&mut pair);
    // Nothing is acknowledged any more.
    let late = File::create(dir.join("b")).and_then(|mut f| f.write_all(b"late").and_then(|()| f.sync_all()));
    assert!(late.is_err(), "a sync succeeded on a retired primary");
    let busy = pair.primary.place.run(&["rejoin", "g", "--yes"]);
    busy.expect(11, &["nothing was given up", "mounted on", dir.to_str().unwrap()]);
    assert_eq!(pair.primary.status()["state"], "Retired");
    let dry = pair.primary.place.run(&["rejoin", "g", "--dry-run", "--json"]).expect(0, &[]).json();
    assert_eq!(dry["devices"], json!([device]));
    umount(&dir).unwrap();
    pair.primary.place.run(&["rejoin", "g", "--yes"]).expect(0, &["Taken away first", &device]);
    assert!(!Path::new(&device).exists(), "the link to the device is gone");
    wait_following(&pair.primary, &pair.shadow);
    pair.primary.stop();
    pair.shadow.stop();
    pair.compare();
}

#[test]
fn devices_that_a_killed_primary_left_are_removed_by_a_rejoin() {
    if missing() {
        return;
    }
    let mut pair = Pair::start(&Setup { volumes: vec![("data", 16 * MIB)], back: true, ..Setup::default() });
    let device = pair.primary.attach("fuse").remove(0);
    let node = fs::canonicalize(&device).unwrap();
    pair.primary.kill();
    pair.promote();
    pair.primary.start();
    until("it has learned of the other", || (pair.primary.status()["state"] == "Retired").then_some(()));
    // It is told without the daemon, too, and stays so over a restart.
    pair.primary.stop();
    assert!(pair.primary.told().ends_with("volrep rejoin g\n"), "{}", pair.primary.told());
    pair.primary.start();
    until("it is as it was", || (pair.primary.status()["state"] == "Retired").then_some(()));
    pair.primary.place.run(&["rejoin", "g", "--yes"]).expect(0, &[]);
    assert!(!Path::new(&device).exists(), "the link is gone");
    let bound = Path::new("/sys/block").join(node.file_name().unwrap()).join("loop/backing_file");
    until("the loop device is free", || {
        let file = fs::read_to_string(&bound).unwrap_or_default();
        (!file.contains(pair.primary.place.path().to_str().unwrap())).then_some(())
    });
    wait_following(&pair.primary, &pair.shadow);
    pair.primary.stop();
    pair.shadow.stop();
    pair.compare();
}

#[test]
fn without_an_address_of_the_new_primary_the_next_step_is_told() {
    let mut pair = Pair::start(&Setup { volumes: vec![("data", 16 * MIB)], ..Setup::default() });
    overtaken(&mut pair);
    let refused = pair.primary.place.run(&["rejoin", "g", "--yes"]);
    refused.expect(12, &["no address of db2 is known", "[[peer]]", "restart the daemon"]);
    assert_eq!(pair.primary.status()["state"], "Retired");
}

#[test]
fn the_old_primarys_side_is_kept_by_promoting_it_again() {
    let mut pair = Pair::start(&Setup { volumes: vec![("data", 32 * MIB)], back: true, ..Setup::default() });
    pair.primary.attach("nbd-socket");
    pour(&mut Client::connect(&pair.primary.socket(), "data").unwrap(), 32 * MIB, 0..4, &AtomicU64::new(0));
    pair.shadow.kill();
    // Only the primary ever has this.
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    client.write(0, &[7; BLOCK]).unwrap();
    client.flush().unwrap();
    pair.shadow.start();
    pair.primary.daemon().signal(Signal::SIGSTOP);
    pair.shadow.kill();
    pair.shadow.start();
    pair.promote();
    pair.shadow.attach("nbd-socket");
    let mut other = Client::connect(&pair.shadow.socket(), "data").unwrap();
    other.write(MIB, &[8; BLOCK]).unwrap();
    other.flush().unwrap();
    pair.primary.daemon().signal(Signal::SIGCONT);
    until("it has learned of the other", || (pair.primary.status()["state"] == "Retired").then_some(()));
    let promoted = pair.primary.place.run(&["promote", "g", "--i-fenced-the-old-primary", "--yes"]);
    promoted.expect(0, &[]);
    until("the other has learned of it", || (pair.shadow.status()["state"] == "Retired").then_some(()));
    pair.shadow.place.run(&["rejoin", "g", "--yes"]).expect(0, &["becomes a shadow of db1"]);
    wait_following(&pair.shadow, &pair.primary);
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    assert_eq!(client.read(0, BLOCK).unwrap(), [7; BLOCK]);
    assert_ne!(client.read(MIB, BLOCK).unwrap(), [8; BLOCK]);
    let files = pair.shadow.place.run(&["salvage", "g", "list", "--json"]).json()["files"].clone();
    assert_eq!(
        (files[0]["state"].as_str(), files[0]["node"].as_str()),
        (Some("whole"), Some("db2")),
        "{files}"
    );
    pair.finish();
}

fn serving(node: &mut Node, since: Instant) -> Duration {
    until("it serves", || {
        let s = node.status();
        (s["state"] == "UpToDate" && s["role"] == "primary").then_some(())
    });
    since.elapsed()
}

#[test]
fn a_primary_that_starts_serves_nothing_before_it_has_asked_whether_another_was_promoted() {
    let mut pair = Pair::start(&Setup { volumes: vec![("data", 32 * MIB)], back: true, ..Setup::default() });
    // Longer than a test may take: whatever goes on sooner has ended the wait.
    pair.primary.configure(|text| text.replace("#ask = \"1s\"", "ask = \"1h\""));
    pair.primary.attach("nbd-socket");
    pour(&mut Client::connect(&pair.primary.socket(), "data").unwrap(), 32 * MIB, 0..4, &AtomicU64::new(0));
    pair.primary.kill();
    let at = Instant::now();
    pair.primary.start();
    eprintln!("a start beside a shadow that lives: {:?}", serving(&mut pair.primary, at));
    pair.primary.kill();
    pair.shadow.kill();
    let at = Instant::now();
    pair.primary.start();
    eprintln!("a start beside a port that is closed: {:?}", serving(&mut pair.primary, at));
    pair.wait_attached_and_killed();
    // The shadow is promoted: the old primary must not answer one request.
    pair.shadow.start();
    pair.promote();
    let served = |daemon: &mut Daemon| daemon.log().matches("serving after LSN").count();
    pair.primary.start();
    let before = 3;
    until("it has learned of the other", || {
        if let Ok(mut client) = Client::connect(&pair.primary.socket(), "data") {
            assert!(client.write(0, &[1; 512]).is_err(), "a write beside the new primary");
        }
        (pair.primary.status()["state"] == "Retired").then_some(())
    });
    assert_eq!(served(pair.primary.daemon()), before, "it has served beside the new primary");
}

impl Pair {
    /// The primary has opened its devices again, and is killed.
    fn wait_attached_and_killed(&mut self) {
        self.primary.wait_attached();
        self.primary.kill();
    }
}

#[test]
fn a_peer_that_never_answers_holds_a_start_up_for_its_time_alone() {
    let mut pair = Pair::prepare(&Setup { volumes: vec![("data", 16 * MIB)], ..Setup::default() });
    let port = free_port();
    // Connections are accepted by the kernel, and nobody says anything.
    let _silent = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
    pair.primary.configure(|text| text.replace("#ask = \"1s\"", "ask = \"700ms\""));
    pair.primary.knows("db2", &format!("127.0.0.1:{port}"));
    let at = Instant::now();
    pair.primary.start();
    until("it says what it waits for", || {
        let s = pair.primary.status();
        let asks = s["reason"].as_str().is_some_and(|r| r.contains("asks its peers"));
        assert!(asks || s["role"] == "unknown" || s["state"] == "Recovering", "{s}");
        asks.then_some(())
    });
    let took = serving(&mut pair.primary, at);
    eprintln!("a start beside a silent peer: {took:?}");
    assert!(took >= Duration::from_millis(700), "{took:?}");
}

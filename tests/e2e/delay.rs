//! A shadow that holds its image back, and what it is for: a promotion that stops before a mistake.

use crate::filesystem::mounted;
use crate::pair::{Pair, Setup, client, installed};
use crate::place::until;
use crate::postgres::{Postgres, impossible, make_cluster, open, sockets};
use nix::mount::{MntFlags, umount, umount2};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};
use volrep::format::record::Record;
use volrep::format::salvage::{Head, Trailer};

/// A pair whose shadow holds its image back.
fn delayed(delay: &str, setup: &Setup) -> Pair {
    let mut pair = Pair::prepare(setup);
    pair.shadow.configure(|t| t.replacen("apply_delay = \"0s\"", &format!("apply_delay = \"{delay}\""), 1));
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    pair
}

fn write(uri: &str, pattern: u8, at: &str) {
    let write = format!("write -P {pattern} {at}");
    client("qemu-io", &["-f", "raw", "-c", &write, "-c", "flush", uri]);
}

/// Everything of the primary is durable on the shadow.
fn received(pair: &Pair) -> u64 {
    until("the shadow has everything", || {
        let (p, s) = (pair.primary.status(), pair.shadow.status());
        (s["durable_lsn"] == p["tail_lsn"]).then(|| p["tail_lsn"].as_u64().unwrap())
    })
}

#[test]
fn an_image_is_held_back_and_nothing_else_is() {
    if !installed("qemu-io") {
        return;
    }
    let mut pair =
        delayed("3s", &Setup { volumes: vec![("data", 16 << 20)], journal: "32M", ..Setup::default() });
    let uri = pair.primary.attach("nbd-socket").remove(0);
    let begun = Instant::now();
    write(&uri, 7, "0 64k");
    pair.primary.place.run(&["mark", "g", "here"]).expect(0, &[]);
    let tail = received(&pair);
    let s = pair.shadow.status();
    if begun.elapsed() < Duration::from_secs(2) {
        assert!(s["applied_lsn"].as_u64().unwrap() < tail, "{s}");
        assert_eq!((&s["apply_delay"]["state"], &s["apply_delay"]["seconds"]), (&"Held".into(), &3.0.into()));
        assert!(s["lag"]["seconds"].as_f64().unwrap() < 1.0, "what is intended is no lag: {s}");
        let window = &s["apply_delay"];
        assert_eq!(
            (&window["window_to_lsn"], &window["window_to_time"]),
            (&s["tail_lsn"], &s["tail_time"]),
            "{s}"
        );
        assert!(
            window["window_from_lsn"].as_u64().unwrap() < tail && window["window_from_time"].is_string(),
            "{s}"
        );
        let told = pair.shadow.place.run(&["status", "g"]).stdout;
        let to = window["window_to_time"].as_str().unwrap();
        for words in ["delayed by 3", "promote --at: from LSN", to] {
            assert!(told.contains(words), "no `{words}` in: {told}");
        }
    }
    until("it is applied", || (pair.shadow.status()["applied_lsn"] == tail).then_some(()));
    assert!(begun.elapsed() >= Duration::from_secs(3), "too early: {:?}", begun.elapsed());
    let p = pair.primary.status();
    assert_eq!(p["peers"][0]["apply_delay_seconds"], 3.0);
    // A comparison would empty the window.
    for node in [&pair.primary, &pair.shadow] {
        node.place.run(&["refresh", "g"]).expect(11, &["apply_delay", "--suspend-delay"]);
    }
    pair.primary.place.run(&["verify", "g", "--suspend-delay"]).expect(0, &[]);
    pair.shadow.place.history("the delay was suspended, and holds again", |events| {
        events.iter().filter_map(|e| e["state"].as_str()).eq(["Suspended", "Held"])
    });
    // More than the journal has room for: it is told, and the writer does not wait.
    for i in 0..12 {
        let at = format!("{}k 1M", i % 8 * 1024);
        let random = format!("write -s /dev/urandom {at}");
        client("qemu-io", &["-f", "raw", "-c", &random, "-c", "flush", &uri]);
        client("qemu-io", &["-f", "raw", "-c", &random.replace("1M", "960k"), "-c", "flush", &uri]);
    }
    let tail = received(&pair);
    until("it is applied", || (pair.shadow.status()["applied_lsn"] == tail).then_some(()));
    pair.finish();
}

#[test]
fn a_promotion_stops_at_a_mark_before_the_deletion() {
    story(|_, _| "before batch".to_owned());
}

#[test]
fn a_promotion_stops_at_a_time_before_the_deletion() {
    story(|_, time| time.to_owned());
}

/// The database writes, somebody deletes everything, and that is undone by a promotion as of what `at` gives of the
/// mark's LSN and the time before the deletion.
fn story(at: impl Fn(u64, &str) -> String) {
    if impossible() {
        return;
    }
    let mut pair =
        delayed("15m", &Setup { volumes: vec![("data", 256 << 20)], journal: "256M", ..Setup::default() });
    let device = pair.primary.attach("fuse").remove(0);
    client("mkfs.ext4", &["-q", &device]);
    let sockets = sockets();
    [&pair.primary, &pair.shadow].into_iter().for_each(open);
    let dir = mounted(pair.primary.place.path(), &device, "ext4");
    let cluster = dir.join("cluster");
    make_cluster(&cluster);
    let server = Postgres::start(&cluster, sockets.path());
    server.query("create table log (n bigint primary key, filler text)");
    // The log outside: what was answered was committed.
    let commit =
        |n: u64| server.query(&format!("insert into log values ({n}, repeat('x', 300)) returning n"));
    let committed: Vec<String> = (1..=50).map(commit).collect();
    let mark = pair.primary.place.run(&["mark", "g", "before batch", "--json"]).expect(0, &[]).json();
    let mark = mark["lsn"].as_u64().unwrap();
    let time = jiff::Timestamp::now().to_string();
    server.query("delete from log");
    (51..=60).for_each(|n| drop(commit(n)));
    assert_eq!(server.query("select count(*) from log"), "10");
    pair.primary.place.run(&["mark", "g", "afterwards"]).expect(0, &[]);
    received(&pair);
    pair.primary.kill();
    drop(server);
    umount2(&dir, MntFlags::MNT_DETACH).unwrap();
    until("the shadow misses the primary", || {
        (pair.shadow.status()["peers"][0]["state"] == "Disconnected").then_some(())
    });
    // The filesystem may have written until the last moment.
    let tail = pair.shadow.status()["durable_lsn"].as_u64().unwrap();
    let promote = |more: &[&str]| {
        let args = [&["promote", "g", "--i-fenced-the-old-primary", "--yes"], more].concat();
        pair.shadow.place.run(&args)
    };
    for wrong in ["99999999", "1999-12-31T23:59:59Z", "no such mark"] {
        promote(&["--at", wrong]).expect(13, &["LSN 0", &format!("to {tail}")]);
    }
    let at = at(mark, &time);
    // A look at it first, which takes nothing from the choice.
    let applied = pair.shadow.status()["applied_lsn"].clone();
    let view = pair.shadow.place.run(&["view", "g", "--scratch", "--at", &at, "--device", "fuse"]);
    view.expect(0, &[]);
    let looked = mounted(pair.shadow.place.path(), view.stdout.trim(), "ext4");
    let server = Postgres::start(&looked.join("cluster"), sockets.path());
    let found = server.query("select n from log order by n");
    assert_eq!(found.lines().collect::<Vec<_>>(), committed, "what would be served");
    server.query("delete from log");
    drop(server);
    umount(&looked).unwrap();
    pair.shadow.place.run(&["view", "g", "--close"]).expect(0, &[]);
    assert_eq!(pair.shadow.status()["applied_lsn"], applied, "nothing went into the image for it");
    let plan = promote(&["--at", &at, "--dry-run", "--json"]).expect(0, &[]).json();
    assert!(plan["text"].as_str().unwrap().contains("saved in a salvage file"), "{plan}");
    assert_eq!(pair.shadow.status()["role"], "shadow");
    promote(&["--at", &at]).expect(0, &[]);
    let device = pair.shadow.attach("fuse").remove(0);
    let dir = mounted(pair.shadow.place.path(), &device, "ext4");
    let server = Postgres::start(&dir.join("cluster"), sockets.path());
    let found = server.query("select n from log order by n");
    assert_eq!(found.lines().collect::<Vec<_>>(), committed, "all commits before, and not the deletion");
    drop(server);
    umount(&dir).unwrap();
    client("e2fsck", &["-fn", &device]);
    let cut = told(&pair);
    assert!(cut >= mark && cut < tail, "{cut} of {mark}, {tail}");
    check_salvage(&pair.shadow.place.config().join("state/g/salvage"), cut, tail);
}

#[test]
fn what_was_not_received_is_lag_however_long_the_delay_is() {
    if !installed("qemu-io") {
        return;
    }
    let setup = Setup { volumes: vec![("data", 16 << 20)], journal: "32M", ..Setup::default() };
    let mut pair = delayed("1h", &setup);
    let uri = pair.primary.attach("nbd-socket").remove(0);
    write(&uri, 7, "0 64k");
    received(&pair);
    assert!(pair.primary.status()["peers"][0]["lag_seconds"].as_f64().unwrap() < 1.0);
    pair.shadow.stop();
    write(&uri, 8, "64k 64k");
    let written = Instant::now();
    let lag = until("what it has not received is told", || {
        pair.primary.status()["peers"][0]["lag_seconds"].as_f64().filter(|lag| *lag > 1.0)
    });
    assert!(lag <= written.elapsed().as_secs_f64() + 1.0, "{lag} s");
    pair.shadow.start();
    received(&pair);
    until("none of it is left", || {
        (pair.primary.status()["peers"][0]["lag_seconds"].as_f64().unwrap() < 1.0).then_some(())
    });
    assert!(pair.shadow.status()["lag"]["seconds"].as_f64().unwrap() < 1.0);
}

/// What the history tells of the promotion: the record that it stopped at.
fn told(pair: &Pair) -> u64 {
    let is_promotion = |e: &Value| e["event"] == "promoted";
    let events = pair.shadow.place.history("the promotion", |events| events.iter().any(is_promotion));
    let marks: Vec<_> = events.iter().filter(|e| e["event"] == "mark").collect();
    let given_up = |i: usize| (marks[i]["mark"]["text"].as_str().unwrap(), marks[i]["given_up"] == true);
    assert_eq!([given_up(0), given_up(1)], [("before batch", false), ("afterwards", true)]);
    events.iter().find(|e| is_promotion(e)).unwrap()["cut"].as_u64().unwrap()
}

/// One file that holds every record after `cut`.
fn check_salvage(dir: &Path, cut: u64, tail: u64) {
    let files: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(files.len(), 1, "{files:?}");
    let bytes = bytes::Bytes::from(fs::read(&files[0]).unwrap());
    let (head, mut at) = Head::decode(&bytes).unwrap();
    assert_eq!((head.fork.unwrap().lsn.0, head.last.lsn.0), (cut, tail));
    for lsn in cut + 1..=tail {
        let record = Record::decode(bytes.slice(at..)).unwrap();
        assert_eq!(record.stamp.lsn.0, lsn);
        at += record.wire_len() as usize;
    }
    assert_eq!(Trailer::decode(&bytes[at..]).unwrap().records, tail - cut);
}

//! Refresh and verify: what differs is found and repaired, under writes, across interruptions.

use crate::model::Random;
use crate::nbd::{Client, FLUSH, WRITE};
use crate::pair::{Node, Pair, Setup};
use crate::place::until;
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use volrep::disk::AlignedBuf;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 80 * MIB;

/// Asks on the control socket.
pub fn ask(node: &Node, mut request: Value) -> Value {
    request["version"] = json!(1);
    let mut stream = UnixStream::connect(node.place.config().join("run/g/control.sock")).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

fn wish(quick: bool, verify: bool) -> Value {
    json!({ "verb": "refresh", "peer": null, "quick": quick, "verify": verify, "rate": 0, "in_place": false })
}

/// Runs a comparison to its end; how it ended.
#[track_caller]
fn refresh(node: &Node, verify: bool) -> Value {
    run(node, wish(false, verify))
}

#[track_caller]
fn run(node: &Node, request: Value) -> Value {
    let before = node.status()["refresh"]["job"].clone();
    let reply = ask(node, request);
    assert_eq!(reply["reply"], "done", "{reply}");
    until("the comparison has ended", || {
        let told = node.status()["refresh"].clone();
        let over = ["Done", "Failed", "Stopped"].iter().any(|s| told["state"] == *s);
        (told["job"] != before && over).then_some(told)
    })
}

/// Spoils `count` places of a backing; the leaves that differ now.
fn spoil(node: &Node, random: &mut Random, count: u64) -> std::collections::BTreeSet<u64> {
    // Past the page cache, as the daemon does: mixing the two makes a later fsync fail (mm/filemap.c,
    // dio_warn_stale_pagecache).
    let mut open = OpenOptions::new();
    open.read(true).write(true).custom_flags(nix::libc::O_DIRECT);
    let file = open.open(node.backing("data")).unwrap();
    let mut leaves = std::collections::BTreeSet::new();
    while (leaves.len() as u64) < count {
        let at = random.below(SIZE / 512) * 512;
        if !leaves.insert(at / 4096) {
            continue;
        }
        let mut leaf = AlignedBuf::from_slice(4096, &[0; 4096]);
        let base = at / 4096 * 4096;
        file.read_exact_at(&mut leaf, base).unwrap();
        leaf[(at - base) as usize..][..512].iter_mut().for_each(|b| *b = !*b);
        file.write_all_at(&leaf, base).unwrap();
    }
    file.sync_all().unwrap();
    leaves
}

fn fill(client: &mut Client, random: &mut Random, writes: u64) {
    for _ in 0..writes {
        let len = (1 + random.below(64)) * 512;
        let at = random.below((SIZE - len) / 512) * 512;
        let mut data = vec![0; len as usize];
        blake3::Hasher::new()
            .update(&at.to_le_bytes())
            .update(&len.to_le_bytes())
            .finalize_xof()
            .fill(&mut data);
        client.send(WRITE, 0, at, len as usize, &data).unwrap();
        assert_eq!(client.reply().unwrap().error, 0);
    }
}

#[test]
fn what_differs_is_named_by_verify_and_repaired_by_refresh() {
    let mut pair = Pair::start(&Setup { volumes: vec![("data", SIZE)], ..Setup::default() });
    let mut random = Random(7);
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    fill(&mut client, &mut random, 500);
    client.flush().unwrap();
    let told = refresh(&pair.primary, true);
    assert_eq!((&told["state"], &told["differ"]), (&json!("Done"), &json!(0)), "{told}");
    pair.drain();
    let leaves = spoil(&pair.shadow, &mut random, 300);
    let told = refresh(&pair.shadow, true);
    assert_eq!(told["differ"], leaves.len() * 4096, "{told}");
    let named: u64 = told["ranges"].as_array().unwrap().iter().map(|r| r["len"].as_u64().unwrap()).sum();
    assert_eq!(named, leaves.len() as u64 * 4096);
    assert_eq!((&told["repaired"], &told["lsn"]), (&json!(0), &Value::Null));
    let told = refresh(&pair.primary, false);
    assert_eq!(told["differ"], leaves.len() * 4096, "{told}");
    assert_eq!(told["repaired"], leaves.len() * 4096);
    let told = refresh(&pair.primary, true);
    assert_eq!(told["differ"], 0, "{told}");
    assert_eq!(pair.shadow.status()["verified"]["differences"], 0);
    pair.finish();
}

#[test]
fn a_refresh_under_writes_finds_what_was_spoilt_and_nothing_else() {
    let mut pair = Pair::start(&Setup { volumes: vec![("data", SIZE)], journal: "256M", ..Setup::default() });
    let mut random = Random(11);
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    fill(&mut client, &mut random, 300);
    client.flush().unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (stop, socket) = (&stop, pair.primary.socket());
        // A failed check ends it, too: the scope waits for it.
        let _end = End(stop);
        let writer = scope.spawn(move || {
            let mut client = Client::connect(&socket, "data").unwrap();
            let mut random = Random(13);
            while !stop.load(Ordering::Relaxed) {
                fill(&mut client, &mut random, 20);
                client.send(FLUSH, 0, 0, 0, &[]).unwrap();
                assert_eq!(client.reply().unwrap().error, 0);
            }
        });
        for round in 0..if crate::pair::long() { 20 } else { 3 } {
            let told = refresh(&pair.primary, true);
            assert_eq!(told["differ"], 0, "round {round}: a difference that is none: {told}");
            let leaves = spoil(&pair.shadow, &mut random, 200);
            let told = refresh(&pair.primary, false);
            let differ = told["differ"].as_u64().unwrap();
            // What was overwritten meanwhile is mended already.
            assert!(differ > 0 && differ <= leaves.len() as u64 * 4096, "{told}");
        }
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    });
    pair.finish();
}

/// Ends a writer, whatever happens.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The three checkpoints that it takes until what was read is in the index.
fn wait_indexed(pair: &Pair) {
    let quiet = |node: &Node| {
        let before = node.status()["checkpoint_lsn"].clone();
        std::thread::sleep(std::time::Duration::from_millis(300));
        node.status()["checkpoint_lsn"] == before
    };
    until("nothing moves", || (quiet(&pair.primary) && quiet(&pair.shadow)).then_some(()));
}

#[test]
fn a_quick_refresh_reads_only_what_was_written_since_and_a_full_one_finds_rot() {
    let mut pair = Pair::prepare(&Setup { volumes: vec![("data", SIZE)], ..Setup::default() });
    for node in [&pair.primary, &pair.shadow] {
        node.configure(|text| text + "\ncheckpoint_after = \"50ms\"\n");
    }
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    let mut random = Random(17);
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    fill(&mut client, &mut random, 300);
    client.flush().unwrap();
    pair.settle();
    let told = run(&pair.primary, wish(true, false));
    assert_eq!((&told["skipped"], &told["differ"]), (&json!(0), &json!(0)), "nothing is known yet: {told}");
    // Until both have learned it: then nothing is read.
    until("all of it is known", || {
        wait_indexed(&pair);
        let told = run(&pair.shadow, wish(true, true));
        assert_eq!(told["differ"], 0, "{told}");
        (told["skipped"] == SIZE).then_some(())
    });
    // A kill keeps it; what is written is forgotten.
    pair.shadow.kill();
    pair.shadow.start();
    pair.primary.kill();
    pair.primary.start();
    pair.primary.wait_attached();
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    client.write(5 * MIB + 4096, &[7; 8192]).unwrap();
    client.flush().unwrap();
    pair.settle();
    until("the shadow is up to date", || {
        (pair.primary.status()["peers"][0]["state"] == "UpToDate").then_some(())
    });
    let told = run(&pair.shadow, wish(true, true));
    assert_eq!((&told["skipped"], &told["differ"]), (&json!(SIZE - (64 << 10)), &json!(0)), "{told}");
    // Rot: the quick one does not read it, the full one finds, names and mends it.
    let leaves = spoil(&pair.shadow, &mut random, 20);
    let told = run(&pair.primary, wish(true, false));
    assert_eq!(told["differ"], 0, "{told}");
    let told = refresh(&pair.primary, false);
    assert_eq!(told["differ"], leaves.len() * 4096, "{told}");
    let rotten: Vec<u64> = told["rotten"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| {
            assert_eq!((&r["node"], &r["volume"]), (&json!("db2"), &json!("data")), "{r}");
            r["offset"].as_u64().unwrap() / 65536
        })
        .collect();
    let known = leaves.iter().map(|leaf| leaf / 16).filter(|e| *e != 5 * MIB / 65536);
    assert_eq!(rotten, known.collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>());
    pair.finish();
}

#[test]
fn rot_on_the_primary_is_named_and_never_copied() {
    let mut pair = Pair::prepare(&Setup { volumes: vec![("data", SIZE)], ..Setup::default() });
    for node in [&pair.primary, &pair.shadow] {
        node.configure(|text| text + "\ncheckpoint_after = \"50ms\"\n");
    }
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    let mut random = Random(19);
    pair.primary.attach("nbd-socket");
    fill(&mut Client::connect(&pair.primary.socket(), "data").unwrap(), &mut random, 300);
    pair.settle();
    until("all of it is known", || {
        let told = refresh(&pair.primary, true);
        wait_indexed(&pair);
        (run(&pair.shadow, wish(true, true))["skipped"] == SIZE && told["differ"] == 0).then_some(())
    });
    let before = std::fs::read(pair.shadow.backing("data")).unwrap();
    let leaves = spoil(&pair.primary, &mut random, 5);
    let told = refresh(&pair.shadow, false);
    assert_eq!(
        (&told["state"], &told["repaired"], &told["lsn"]),
        (&json!("Done"), &json!(0), &Value::Null),
        "{told}"
    );
    assert!(told["rotten"].as_array().unwrap().iter().all(|r| r["node"] == "db1"), "{told}");
    assert_eq!(told["differ"], leaves.len() * 4096, "{told}");
    let s = pair.shadow.status();
    assert!(
        s["unrepaired_bytes"].as_u64().unwrap() > 0 && s["action"].as_str().unwrap().contains("refresh"),
        "{s}"
    );
    assert!(std::fs::read(pair.shadow.backing("data")).unwrap() == before, "the shadow's good bytes stay");
}

#[test]
fn a_refresh_goes_on_after_kills_and_cuts_and_its_proof_outlives_them() {
    let setup = Setup { volumes: vec![("data", SIZE)], journal: "256M", ..Setup::default() };
    let mut pair = Pair::start(&setup);
    let mut random = Random(23);
    pair.primary.attach("nbd-socket");
    fill(&mut Client::connect(&pair.primary.socket(), "data").unwrap(), &mut random, 300);
    pair.settle();
    let rounds = if crate::pair::long() { 200 } else { 8 };
    let mut interrupted = 0;
    for round in 0..rounds {
        pair.wait_following();
        spoil(&pair.shadow, &mut random, 100);
        let before = pair.shadow.status();
        // So slow that a kill comes in the middle.
        let mut request = wish(false, false);
        request["rate"] = json!(400 * MIB);
        let reply = ask(&pair.primary, request);
        assert_eq!(reply["reply"], "done", "{reply}");
        let job = until("it has begun", || {
            let told = pair.shadow.status()["refresh"].clone();
            (told["job"] != before["refresh"]["job"]).then_some(told["job"].clone())
        });
        let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
        fill(&mut client, &mut random, 10);
        std::thread::sleep(std::time::Duration::from_micros(random.below(300_000)));
        let state = pair.shadow.status()["refresh"]["state"].clone();
        interrupted += u64::from(state == "Running");
        if random.below(2) == 0 {
            pair.shadow.kill();
            pair.shadow.start();
        } else {
            pair.primary.kill();
            pair.primary.start();
            pair.primary.wait_attached();
        }
        let told = until("it has ended", || {
            let now = pair.shadow.status();
            let told = now["refresh"].clone();
            let over = told["state"] == "Done";
            assert!(told["state"] != "Failed" && told["state"] != "Stopped", "round {round}: {told}");
            // Of a job that was done before the kill only its proof is left.
            let proof = &now["verified"];
            let proved = told.is_null() && !proof.is_null() && *proof != before["verified"];
            (over || proved).then_some(told)
        });
        assert!(told.is_null() || told["job"] == job, "round {round}: another job: {told}");
    }
    eprintln!("{interrupted} of {rounds} kills were in the middle");
    let proof = pair.shadow.status()["verified"].clone();
    assert!(proof["lsn"].as_u64().unwrap() > 0, "{proof}");
    pair.shadow.kill();
    let stopped = pair.shadow.status();
    assert_eq!((&stopped["state"], &stopped["verified"]), (&json!("Stopped"), &proof));
    pair.shadow.start();
    until("it remembers", || (pair.shadow.status()["verified"] == proof).then_some(()));
    until("the primary knows of it, too", || {
        (!pair.primary.status()["peers"][0]["verified"].is_null()).then_some(())
    });
    pair.finish();
}

/// Spoils `count` records of a node's journal; the bytes of the file at which they begin.
/// Kept by each process that takes it up as the one before had kept it.
#[test]
fn a_refresh_that_is_taken_up_twice_keeps_its_number_and_what_it_has_found() {
    let setup = Setup { volumes: vec![("data", SIZE)], ..Setup::default() };
    let mut pair = Pair::prepare(&setup);
    let often = |text: String| text.replace("#checkpoint_after = \"5s\"", "checkpoint_after = \"100ms\"");
    pair.shadow.configure(often);
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    let mut random = Random(29);
    spoil(&pair.shadow, &mut random, 300);
    // So slow that it does not end here.
    let mut request = wish(false, false);
    request["rate"] = json!(4 * MIB);
    assert_eq!(ask(&pair.primary, request)["reply"], "done");
    let told = |pair: &Pair| {
        until("it tells of the job", || {
            let told = pair.shadow.status()["refresh"].clone();
            (told["differ"].as_u64() > Some(0)).then_some(told)
        })
    };
    told(&pair);
    // A checkpoint keeps what has been found by then.
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    fill(&mut client, &mut random, 1);
    client.flush().unwrap();
    let tail = pair.primary.status()["tail_lsn"].as_u64();
    until("a checkpoint", || (pair.shadow.status()["checkpoint_lsn"].as_u64() >= tail).then_some(()));
    pair.primary.kill();
    pair.shadow.kill();
    pair.shadow.start();
    let once = told(&pair);
    pair.shadow.kill();
    pair.shadow.start();
    let twice = told(&pair);
    for key in ["job", "differ", "repaired", "wire", "started"] {
        assert_eq!(twice[key], once[key], "{key}");
    }
    assert!(once["wire"].as_u64() > Some(0), "{once}");
    pair.primary.start();
    pair.primary.wait_attached();
    pair.shadow.kill(); // not to wait for the rest of it
    pair.shadow.start();
    pair.wait_following();
    assert_eq!(refresh_stopped(&pair)["job"], once["job"]);
    assert_eq!(refresh(&pair.primary, false)["state"], "Done");
    pair.finish();
}

/// Ends the one that runs; what is told of it.
fn refresh_stopped(pair: &Pair) -> Value {
    until("it can be stopped", || {
        (ask(&pair.shadow, json!({ "verb": "refresh_stop" }))["reply"] == "done").then_some(())
    });
    until("it has stopped", || {
        let told = pair.shadow.status()["refresh"].clone();
        (told["state"] == "Stopped").then_some(told)
    })
}

fn spoil_journal(node: &Node, count: usize) -> Vec<u64> {
    let path = node.place.config().join("state/g/journal");
    let bytes = std::fs::read(&path).unwrap();
    let records: Vec<u64> = (0..bytes.len())
        .step_by(4096)
        .filter(|at| bytes[*at..].starts_with(b"VREC"))
        .map(|at| at as u64)
        .collect();
    assert!(records.len() > count * 3, "{} records", records.len());
    let chosen: Vec<u64> = records.iter().step_by(records.len() / count).take(count).copied().collect();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for at in &chosen {
        let at = at + 100; // in its header
        file.write_all_at(&[!bytes[at as usize]], at).unwrap();
    }
    file.sync_all().unwrap();
    chosen
}

#[test]
fn rot_in_the_journal_is_named_and_put_back_from_the_primary() {
    let mut pair = Pair::prepare(&Setup { volumes: vec![("data", SIZE)], ..Setup::default() });
    // What memory holds is put back without the primary: here it holds little.
    pair.shadow.configure(|text| text.replace("feed = \"32M\"", "feed = \"4M\""));
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    let mut random = Random(29);
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    for _ in 0..60 {
        fill(&mut client, &mut random, 10);
        client.flush().unwrap();
    }
    pair.settle();
    let spoilt = spoil_journal(&pair.shadow, 5);
    let journal = |told: &Value| -> Vec<u64> {
        let rotten = told["rotten"].as_array().unwrap();
        let ours = rotten.iter().filter(|r| r["volume"] == "(journal)" && r["node"] == "db2");
        ours.map(|r| r["offset"].as_u64().unwrap()).collect()
    };
    let told = refresh(&pair.primary, true);
    assert_eq!(journal(&told), spoilt, "{told}");
    assert_eq!(told["lsn"], Value::Null, "{told}");
    let told = refresh(&pair.primary, false);
    assert_eq!(journal(&told), spoilt, "{told}");
    assert!(told["lsn"].as_u64().is_some() && told["differ"] == 0, "{told}");
    let told = refresh(&pair.primary, false);
    assert!(journal(&told).is_empty() && told["journal_read"].as_u64().unwrap() > 0, "{told}");
    pair.finish();
}

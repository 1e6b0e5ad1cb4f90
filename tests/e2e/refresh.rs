//! Refresh and verify: what differs is found and repaired, under writes, across interruptions.

use crate::model::Random;
use crate::nbd::{Client, FLUSH, WRITE};
use crate::pair::{Node, Pair, Setup};
use crate::place::until;
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// Runs a comparison to its end; how it ended.
#[track_caller]
fn refresh(node: &Node, verify: bool) -> Value {
    let before = node.status()["refresh"]["job"].clone();
    let request = json!({
        "verb": "refresh", "peer": null, "quick": false, "verify": verify, "rate": 0, "restart": false
    });
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
    let file = OpenOptions::new().read(true).write(true).open(node.backing("data")).unwrap();
    let mut leaves = std::collections::BTreeSet::new();
    while (leaves.len() as u64) < count {
        let at = random.below(SIZE / 512) * 512;
        if !leaves.insert(at / 4096) {
            continue;
        }
        let mut sector = [0; 512];
        file.read_exact_at(&mut sector, at).unwrap();
        sector.iter_mut().for_each(|b| *b = !*b);
        file.write_all_at(&sector, at).unwrap();
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

//! A shadow that is away: catch-up in order, a full journal, lag, and the prefix that a shadow holds.

use crate::model::{Random, UNIT, unit, version};
use crate::nbd::{Client, FLUSH, WRITE};
use crate::pair::{Pair, Setup};
use crate::place::until;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

pub const PIECE: usize = 1 << 20;

/// Bytes that do not compress.
pub fn noise(seed: u64) -> Vec<u8> {
    let mut data = vec![0; PIECE];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut data);
    data
}

/// Writes `count` pieces round and round the volume, several at once; tells how many are done.
pub fn pour(client: &mut Client, size: u64, pieces: std::ops::Range<u64>, done: &AtomicU64) {
    let mut next = pieces.start;
    while next < pieces.end || client.in_flight() > 0 {
        if next < pieces.end && client.in_flight() < 4 {
            let at = next * PIECE as u64 % size;
            client.send(WRITE, 0, at, PIECE, &noise(next)).unwrap();
            next += 1;
        } else {
            let reply = client.reply().unwrap();
            assert_eq!(reply.error, 0, "a write failed");
            done.fetch_add(1, Ordering::Relaxed);
        }
    }
    client.flush().unwrap();
}

#[test]
fn a_shadow_that_was_away_catches_up_in_order() {
    const SIZE: u64 = 96 << 20;
    let setup = Setup { volumes: vec![("data", SIZE)], journal: "512M", ..Setup::default() };
    let mut pair = Pair::start(&setup);
    pair.primary.attach("nbd-socket");
    pair.shadow.stop();
    until("the shadow is missed", || {
        (pair.primary.status()["peers"][0]["state"] == "Disconnected").then_some(())
    });
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    pour(&mut client, SIZE, 0..300, &AtomicU64::new(0));
    let tail = pair.primary.status()["tail_lsn"].as_u64().unwrap();
    pair.shadow.start();
    let (mut last, mut seen) = (0, 0);
    until("the shadow has caught up", || {
        let s = pair.shadow.status();
        let applied = s["applied_lsn"].as_u64().unwrap();
        // A daemon that is still recovering knows no position.
        if s["state"] != "Recovering" {
            assert!(applied >= last, "applied went back from {last} to {applied}");
            seen += u64::from(applied > last);
            last = applied;
        }
        (applied >= tail).then_some(())
    });
    eprintln!("300 MiB behind: caught up to LSN {tail} in at least {seen} steps");
    pair.wait_following();
    pair.finish();
}

#[test]
fn a_full_journal_throttles_the_writer_until_the_shadow_is_back() {
    const SIZE: u64 = 32 << 20;
    let setup = Setup { volumes: vec![("data", SIZE)], journal: "32M", ..Setup::default() };
    let mut pair = Pair::start(&setup);
    pair.primary.attach("nbd-socket");
    pair.shadow.stop();
    let done = AtomicU64::new(0);
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| pour(&mut client, SIZE, 0..128, &done));
        until("the writer is throttled, and status says why", || {
            let s = pair.primary.status();
            let reason = s["reason"].as_str().unwrap_or_default();
            (s["state"] == "Blocked" && reason.contains("db2") && reason.contains("journal")).then_some(())
        });
        let stopped = done.load(Ordering::Relaxed);
        assert!(stopped < 128, "nothing held the writer back");
        let told = pair.primary.told();
        assert!(told.contains("action: bring db2"), "{told}");
        pair.shadow.start();
        writer.join().unwrap();
    });
    assert_eq!(done.load(Ordering::Relaxed), 128);
    until("nothing is blocked any more", || (pair.primary.status()["state"] == "UpToDate").then_some(()));
    pair.finish();
}

#[test]
fn small_writes_are_on_the_shadow_within_milliseconds() {
    let mut pair = Pair::start(&Setup { alone: true, ..Setup::default() });
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    let mut random = Random(7);
    let (start, mut writes) = (Instant::now(), 0u64);
    while start.elapsed() < Duration::from_secs(10) {
        let number = random.below(16_000) * 8;
        let data: Vec<u8> = (number..number + 8).flat_map(|n| unit(n, writes + 1)).collect();
        client.write(number * UNIT as u64, &data).unwrap();
        client.flush().unwrap();
        writes += 1;
        // A steady load, not the most that there can be.
        let due = start + Duration::from_millis(2) * writes as u32;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let s = pair.shadow.status();
    let lag = &s["lag"];
    let of = |stage: &str, q: &str| lag[stage][q].as_f64().unwrap() * 1e3;
    for stage in ["received", "durable", "applied"] {
        eprintln!(
            "lag to {stage}: p50 {:.2} ms, p99 {:.2} ms, max {:.2} ms",
            of(stage, "p50"),
            of(stage, "p99"),
            of(stage, "max")
        );
    }
    eprintln!("{writes} flushed writes, {} records", lag["count"]);
    assert!(lag["count"].as_u64().unwrap() > writes / 2, "{lag}");
    // Ten times what is promised: only a gross failure fails a test.
    assert!(of("applied", "p50") < 10.0 && of("applied", "p99") < 50.0, "{lag}");
    pair.finish();
}

/// What units hold after writes 1..=k of `log`: (first unit, count) each.
fn image(log: &[(u64, u64)], k: u64, units: u64) -> Vec<u64> {
    let mut image = vec![0; units as usize];
    for (n, (first, count)) in (1..=k).zip(log) {
        image[*first as usize..(first + count) as usize].fill(n);
    }
    image
}

#[test]
fn an_asynchronous_shadow_holds_an_exact_prefix_of_the_writes() {
    const SIZE: u64 = 8 << 20;
    const UNITS: u64 = SIZE / UNIT as u64;
    for (round, every) in [1u64, 3, u64::MAX, 1, 2].into_iter().enumerate() {
        let mut pair =
            Pair::start(&Setup { volumes: vec![("data", SIZE)], journal: "64M", ..Setup::default() });
        pair.primary.attach("nbd-socket");
        let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
        let mut random = Random(std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
        let (mut log, mut acknowledged) = (Vec::new(), 0);
        let killed = AtomicBool::new(false);
        let after = Duration::from_millis(20 + random.below(400));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    let most = if random.below(50) == 0 { 512 } else { 16 };
                    let count = 1 + random.below(most);
                    let first = random.below(UNITS - count);
                    log.push((first, count));
                    let n = log.len() as u64;
                    let data: Vec<u8> = (first..first + count).flat_map(|u| unit(u, n)).collect();
                    let written = client.write(first * UNIT as u64, &data);
                    let flushed = written.and_then(|()| match n.is_multiple_of(every) {
                        true => client.call(FLUSH, 0, 0, 0, &[]).map(drop),
                        false => Ok(()),
                    });
                    if flushed.is_err() {
                        assert!(killed.load(Ordering::SeqCst), "an error before the kill");
                        return;
                    }
                    acknowledged = n;
                }
            });
            std::thread::sleep(after);
            killed.store(true, Ordering::SeqCst);
            pair.primary.kill();
        });
        // The shadow lives on, or goes with the primary and starts from its files.
        if round % 2 == 1 {
            pair.shadow.kill();
            pair.shadow.start();
        }
        pair.promote();
        pair.shadow.attach("nbd-socket");
        let mut client = Client::connect(&pair.shadow.socket(), "data").unwrap();
        let data = client.read(0, SIZE as usize).unwrap();
        let found = (0..).zip(data.chunks_exact(UNIT)).map(|(u, b)| version(u, b).expect("a whole unit"));
        let found: Vec<u64> = found.collect();
        let k = *found.iter().max().unwrap();
        assert!(found == image(&log, k, UNITS), "round {round}: not the image of the first {k} writes");
        eprintln!("round {round}: {acknowledged} acknowledged, the shadow holds exactly 1..={k}");
    }
}

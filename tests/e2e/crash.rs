//! Daemons killed at random instants under a load that remembers what it was promised.

use crate::model::{Model, Promise};
use crate::nbd::Client;
use crate::outage::noise;
use crate::pair::{Pair, Setup, long};
use crate::place::until;
use std::time::{Duration, Instant};

/// Long enough for every kill to come first.
const FOREVER: Duration = Duration::from_secs(600);

fn seed() -> u64 {
    let seed = std::env::var("VOLREP_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
    eprintln!("VOLREP_SEED={seed}");
    seed
}

/// Runs `load` until `kill`, which it is told to do at a random instant, has broken its connection.
fn load_until_killed(pair: &mut Pair, model: &mut Model, depth: usize, kill: impl FnOnce(&mut Pair)) {
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    let after = model.moment(5, 400);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| model.load(&mut client, depth, Instant::now() + FOREVER));
        std::thread::sleep(after);
        kill(pair);
        load.join().unwrap().expect_err("the daemon was killed");
    });
    model.broken();
}

#[test]
fn a_killed_primary_loses_nothing_that_it_acknowledged() {
    let rounds = if long() { 100 } else { 10 };
    let mut pair = Pair::start(&Setup { journal: "64M", ..Setup::default() });
    pair.primary.attach("nbd-socket");
    let mut model = Model::new(64 << 20, Promise::Reply, seed());
    for round in 1..=rounds {
        load_until_killed(&mut pair, &mut model, 1 << (round % 6), |pair| pair.primary.kill());
        pair.primary.start();
        pair.primary.wait_attached();
        let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
        model.check(&mut client, &format!("round {round}"));
        model.spot_check(&mut client);
    }
    eprintln!("{rounds} rounds, {} acknowledged, {} of them flushes", model.acknowledged, model.flushed);
    pair.finish();
}

/// A checkpoint gives it no room: the next one comes when it is time, and a restart goes through the journal until then.
#[test]
fn a_full_write_cache_asks_for_no_checkpoint() {
    let mut pair = Pair::prepare(&Setup { cache: "4M", ..Setup::default() });
    let rarely = |text: String| text.replace("#checkpoint_after = \"5s\"", "checkpoint_after = \"1h\"");
    pair.primary.configure(rarely);
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    let before = pair.primary.status();
    // More than it holds, so that the end of it has to wait for room.
    let data: Vec<u8> = (0..).flat_map(noise).take(16 << 20).collect();
    client.write(0, &data).unwrap();
    client.flush().unwrap();
    let after = pair.primary.status();
    assert!(after["tail_lsn"].as_u64() > before["tail_lsn"].as_u64(), "{after}");
    assert_eq!(after["checkpoint_lsn"], before["checkpoint_lsn"], "{after}");
    pair.primary.kill();
    pair.primary.start();
    pair.primary.wait_attached();
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    assert!(client.read(0, data.len()).unwrap() == data);
    pair.finish();
}

#[test]
fn a_killed_shadow_goes_on_where_it_was() {
    let rounds = if long() { 30 } else { 5 };
    let mut pair = Pair::start(&Setup { journal: "64M", ..Setup::default() });
    pair.primary.attach("nbd-socket");
    let mut model = Model::new(64 << 20, Promise::Reply, seed());
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    for _ in 0..rounds {
        let (after, more) = (model.moment(5, 300), model.moment(5, 100));
        std::thread::scope(|scope| {
            let load = scope.spawn(|| model.load(&mut client, 16, Instant::now() + after + more * 2));
            std::thread::sleep(after);
            pair.shadow.kill();
            std::thread::sleep(more);
            // Before the load ends: it may have filled the journal, and then waits for the shadow.
            pair.shadow.start();
            load.join().unwrap().unwrap();
        });
    }
    pair.wait_following();
    model.check(&mut client, "at the end");
    pair.finish();
}

#[test]
fn at_ack_level_durable_a_flush_survives_the_loss_of_the_primary() {
    for round in 1..=if long() { 20 } else { 3 } {
        let mut pair = Pair::start(&Setup { sync: true, journal: "64M", ..Setup::default() });
        assert_eq!(pair.primary.status()["ack_level"], "durable");
        pair.primary.attach("nbd-socket");
        let mut model = Model::new(64 << 20, Promise::Flush, seed());
        load_until_killed(&mut pair, &mut model, 1 << (round % 6), |pair| {
            // Both at once, in either order.
            if round % 2 == 0 {
                pair.shadow.kill();
            }
            pair.primary.kill();
            if round % 2 == 1 {
                pair.shadow.kill();
            }
        });
        pair.shadow.start();
        pair.promote();
        pair.shadow.attach("nbd-socket");
        let mut client = Client::connect(&pair.shadow.socket(), "data").unwrap();
        model.check(&mut client, &format!("round {round}"));
        eprintln!("round {round}: {} acknowledged, {} of them flushes", model.acknowledged, model.flushed);
        // It is a primary like any other.
        model.load(&mut client, 8, Instant::now() + Duration::from_millis(100)).unwrap();
        model.check(&mut client, "after the promotion");
        until("promoted", || (pair.shadow.status()["term"] == 2).then_some(()));
    }
}

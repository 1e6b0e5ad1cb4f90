//! Several shadows of one primary, each with a position of its own.

use crate::nbd::Client;
use crate::outage::pour;
use crate::pair::{Node, Pair, Setup};
use crate::place::{first_difference, until};
use serde_json::Value;
use std::sync::atomic::AtomicU64;

const SIZE: u64 = 32 << 20;

/// One more shadow of the primary, named `name`.
fn join(pair: &Pair, name: &str) -> Node {
    let token = pair.primary.place.run(&["token", "g", "--peer", name]);
    token.expect(0, &[]);
    let mut node = Node::new();
    let words = ["--listen", "none", "--journal-size", "128M", "--volume", "data=data"];
    node.place.run(&[&["join", token.stdout.trim()], &words[..]].concat()).expect(0, &[]);
    node.start();
    node
}

/// What the primary says of a shadow.
fn view(pair: &Pair, name: &str) -> Value {
    let status = pair.primary.status();
    let peers = status["peers"].as_array().unwrap();
    peers.iter().find(|p| p["name"] == name).cloned().unwrap_or_default()
}

fn current(pair: &Pair, name: &str) {
    until("the shadow has everything", || {
        let (view, tail) = (view(pair, name), pair.primary.status()["tail_lsn"].clone());
        (view["state"] == "UpToDate" && view["applied_lsn"] == tail).then_some(())
    });
}

#[test]
fn each_shadow_has_its_own_position_and_gets_what_it_missed() {
    let mut pair = Pair::start(&Setup { volumes: vec![("data", SIZE)], ..Setup::default() });
    let mut third = join(&pair, "db3");
    let mut fourth = join(&pair, "db4");
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    pour(&mut client, SIZE, 0..20, &AtomicU64::new(0));
    ["db2", "db3", "db4"].iter().for_each(|name| current(&pair, name));
    // One is away, then another: each at a point of its own.
    third.stop();
    pour(&mut client, SIZE, 20..30, &AtomicU64::new(0));
    current(&pair, "db4");
    fourth.kill();
    pour(&mut client, SIZE, 30..40, &AtomicU64::new(0));
    current(&pair, "db2");
    let lsn = |name: &str| view(&pair, name)["durable_lsn"].as_u64().unwrap();
    let (second, at_third, at_fourth) = (lsn("db2"), lsn("db3"), lsn("db4"));
    assert!(at_third < at_fourth && at_fourth < second, "{at_third} {at_fourth} {second}");
    for name in ["db3", "db4"] {
        let view = view(&pair, name);
        assert_eq!(view["state"], "Disconnected", "{view}");
        assert_eq!(view["lag_records"].as_u64().unwrap(), second - lsn(name), "{view}");
    }
    third.start();
    fourth.start();
    pour(&mut client, SIZE, 40..45, &AtomicU64::new(0));
    drop(client);
    ["db2", "db3", "db4"].iter().for_each(|name| current(&pair, name));
    pair.finish();
    for mut node in [third, fourth] {
        node.stop();
        let (a, b) = (pair.primary.backing("data"), node.backing("data"));
        assert_eq!(first_difference(&a, &b), None);
    }
}

/// Its machine is lost with everything on it, and another one joins in its place.
fn replace(pair: &mut Pair, sync: bool) {
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    let writes = AtomicU64::new(0);
    pour(&mut client, SIZE, 0..10, &writes);
    current(pair, "db2");
    if sync {
        pair.shadow.kill();
    }
    let fresh = join(pair, "db2");
    let mut lost = std::mem::replace(&mut pair.shadow, fresh);
    if !sync {
        // It is connected until the other one follows, and a moment longer.
        until("it follows, too", || {
            let peers = pair.primary.status()["peers"].as_array().unwrap().clone();
            (peers.len() == 2 && peers.iter().all(|p| p["state"] == "UpToDate")).then_some(())
        });
        lost.kill();
    }
    if sync {
        // FLUSH waits for the one that is lost, so that one alone can be meant; the other one is connected.
        until("it is a member, too", || {
            let peers = pair.primary.status()["peers"].as_array().unwrap().clone();
            peers.iter().any(|p| p["state"] == "UpToDate" && p["sync"] == true).then_some(())
        });
        let words = ["outdate", "g", "--member", "db2", "--i-fenced-the-member", "--yes"];
        pair.primary.place.run(&words).expect(0, &["would no longer wait for db2"]);
        pair.primary.place.run(&words).expect(11, &["connected and alive"]);
    }
    until("the one that is lost is forgotten", || {
        (pair.primary.status()["peers"].as_array().unwrap().len() == 1).then_some(())
    });
    current(pair, "db2");
    // More than the journal has room for, if it were held for the one that is lost.
    pour(&mut client, SIZE, 10..90, &writes);
    drop(client);
    current(pair, "db2");
    pair.finish();
}

#[test]
fn a_shadow_that_was_lost_and_set_up_anew_under_its_name_is_not_waited_for_as_the_one_before() {
    replace(
        &mut Pair::start(&Setup { volumes: vec![("data", SIZE)], journal: "32M", ..Setup::default() }),
        false,
    );
}

#[test]
fn so_is_a_member_of_the_sync_set_once_the_one_before_is_outdated() {
    let setup = Setup { volumes: vec![("data", SIZE)], journal: "32M", sync: true, ..Setup::default() };
    replace(&mut Pair::start(&setup), true);
}

/// Two have the name by mistake; the one that was away comes back, from its own records, as the other one is lost.
#[test]
fn what_a_shadow_is_about_to_read_is_held_when_the_one_before_it_is_forgotten() {
    let mut pair = Pair::start(&Setup { volumes: vec![("data", SIZE)], ..Setup::default() });
    let mut other = join(&pair, "db2");
    until("both follow", || {
        let peers = pair.primary.status()["peers"].as_array().unwrap().clone();
        (peers.len() == 2 && peers.iter().all(|p| p["state"] == "UpToDate")).then_some(())
    });
    other.stop();
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    pour(&mut client, SIZE, 0..10, &AtomicU64::new(0));
    until("none of it is needed any more", || {
        let p = pair.primary.status();
        (p["checkpoint_lsn"] == p["tail_lsn"]).then_some(())
    });
    pair.shadow.kill();
    until("it is missed", || (view(&pair, "db2")["state"] == "Disconnected").then_some(()));
    other.start();
    pair.shadow = other;
    current(&pair, "db2");
    assert_eq!(pair.primary.status()["peers"].as_array().unwrap().len(), 1);
    drop(client);
    pair.finish();
}

//! A shadow near and a shadow far: both fed by the primary, or the far one by the near one.

use crate::nbd::Client;
use crate::outage::pour;
use crate::pair::{Node, Pair, Setup, free_port};
use crate::place::{first_difference, until};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::sync::atomic::AtomicU64;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 48 * MIB;

/// A node that joins where `at` tells it to; its address.
fn join(at: &Node, name: &str) -> (Node, String) {
    let token = at.place.run(&["token", "g", "--peer", name]);
    token.expect(0, &[]);
    let node = Node::new();
    let listen = format!("127.0.0.1:{}", free_port());
    let words =
        ["--listen", &listen, "--journal-size", "64M", "--cache-size", "16M", "--volume", "data=data"];
    node.place.run(&[&["join", token.stdout.trim()], &words[..]].concat()).expect(0, &[]);
    (node, listen)
}

pub fn peer<'a>(status: &'a Value, name: &str) -> &'a Value {
    let peers = status["peers"].as_array().unwrap();
    peers.iter().find(|p| p["name"] == name).unwrap_or(&Value::Null)
}

/// Waits until a shadow has everything that the primary has.
#[track_caller]
pub fn wait_current(shadow: &Node, primary: &Node) -> Value {
    until("the shadow has everything", || {
        let (s, p) = (shadow.status(), primary.status());
        let current = s["applied_lsn"] == p["tail_lsn"] && p["applied_lsn"] == p["tail_lsn"];
        (s["role"] == "shadow" && s["state"] == "UpToDate" && current).then_some(s)
    })
}

pub fn load(node: &Node, pieces: std::ops::Range<u64>) {
    pour(&mut Client::connect(&node.socket(), "data").unwrap(), SIZE, pieces, &AtomicU64::new(0));
}

fn resyncs(node: &mut Node) -> usize {
    node.daemon().log().matches(" resync: ").count()
}

#[track_caller]
pub fn promote(node: &Node) {
    until("it may be promoted", || {
        let ended = node.place.run(&["promote", "g", "--i-fenced-the-old-primary", "--yes"]);
        // A connection outlives its killed process by a moment.
        assert!(ended.code == 0 || ended.stderr.contains("connected and alive"), "{}", ended.stderr);
        (ended.code == 0).then_some(())
    });
}

#[track_caller]
pub fn rejoin(node: &mut Node, primary: &Node) {
    until("it has learned of the other", || (node.status()["state"] == "Retired").then_some(()));
    node.place.run(&["rejoin", "g", "--yes"]).expect(0, &[]);
    wait_current(node, primary);
}

#[track_caller]
pub fn equal(a: &Node, b: &Node) {
    assert_eq!(first_difference(&a.backing("data"), &b.backing("data")), None);
}

fn chain() -> (Pair, Node) {
    delayed_chain("0s", "0s")
}

/// A group of three, the far shadow fed by the near one; the volume held something before. Each of the shadows holds
/// its image back.
pub fn delayed_chain(near_delay: &str, far_delay: &str) -> (Pair, Node) {
    let delay =
        |text: String, delay| text.replacen("apply_delay = \"0s\"", &format!("apply_delay = \"{delay}\""), 1);
    let setup = Setup {
        volumes: vec![("data", SIZE)],
        // More than all that is written: nobody falls behind.
        journal: "256M",
        filled: 8 * MIB,
        back: true,
        ..Setup::default()
    };
    let mut pair = Pair::prepare(&setup);
    pair.shadow.configure(|text| delay(text, near_delay));
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    let told = pair.shadow.place.run(&["token", "g", "--peer", "db3", "--json"]);
    assert_eq!(told.expect(0, &["db2 is a shadow"]).json()["cascade"], true);
    let (mut far, address) = join(&pair.shadow, "db3");
    let config = std::fs::read_to_string(far.place.config().join("g.toml")).unwrap();
    assert!(config.contains("cascade = true") && config.contains("name = \"db1\""), "{config}");
    pair.shadow.knows("db3", &address);
    pair.primary.knows("db3", &address);
    far.configure(|text| delay(text, far_delay));
    far.start();
    (pair, far)
}

/// The primary and its shadows end, with equal volumes.
pub fn end_equal(primary: &mut Node, mut shadows: [&mut Node; 2]) {
    primary.place.run(&["detach", "g"]).expect(0, &[]);
    shadows.iter().for_each(|s| drop(wait_current(s, primary)));
    primary.stop();
    for shadow in &mut shadows {
        shadow.stop();
        equal(shadow, primary);
    }
}

#[test]
fn a_far_shadow_is_fed_by_the_near_one_and_follows_it_when_it_is_promoted() {
    let (mut pair, mut far) = chain();
    // Its first copy comes through the near one.
    let s = wait_current(&far, &pair.primary);
    assert_eq!((&s["primary"]["name"], &s["primary"]["through"]), (&json!("db1"), &json!("db2")), "{s}");
    assert_eq!(peer(&s, "db2")["source"], "shadow", "{s}");
    equal(&far, &pair.primary);
    let near = pair.shadow.status();
    assert_eq!(
        (&peer(&near, "db3")["follower"], &peer(&near, "db3")["state"]),
        (&json!(true), &json!("UpToDate"))
    );
    assert_eq!(
        peer(&pair.primary.status(), "db3")["heard_seconds_ago"],
        Value::Null,
        "the primary feeds it, too"
    );
    assert!(far.told().contains("through db2"), "{}", far.told());
    assert!(pair.shadow.told().contains("shadow db3"), "{}", pair.shadow.told());
    pair.primary.attach("nbd-socket");
    load(&pair.primary, 0..40);
    wait_current(&far, &pair.primary);
    // Compared with the near one, from either side.
    far.place.run(&["verify", "g"]).expect(0, &[]);
    pair.shadow.place.run(&["refresh", "g", "--peer", "db3"]).expect(0, &[]);
    // The near one is killed under load, and the far one stands still for a while.
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    let before = resyncs(&mut far);
    std::thread::scope(|scope| {
        scope.spawn(|| pour(&mut client, SIZE, 40..100, &AtomicU64::new(0)));
        pair.shadow.kill();
        pair.shadow.start();
        far.daemon().signal(Signal::SIGSTOP);
        std::thread::sleep(std::time::Duration::from_millis(300));
        far.daemon().signal(Signal::SIGCONT);
    });
    drop(client);
    wait_current(&far, &pair.primary);
    // A view of the near one freezes its image, and not what it passes on.
    pair.shadow.place.run(&["view", "g", "--read-only"]).expect(0, &[]);
    load(&pair.primary, 100..110);
    let (tail, frozen) =
        (pair.primary.status()["tail_lsn"].clone(), pair.shadow.status()["applied_lsn"].clone());
    assert_ne!(tail, frozen);
    until("the far one has it", || (far.status()["applied_lsn"] == tail).then_some(()));
    far.place.run(&["verify", "g"]).expect(1, &["held back by a view"]);
    pair.shadow.place.run(&["view", "g", "--close"]).expect(0, &[]);
    wait_current(&pair.shadow, &pair.primary);
    assert_eq!(resyncs(&mut far), before, "it was resynced");
    // The primary is lost: that is told at the far end, too.
    far.place
        .run(&["promote", "g", "--i-fenced-the-old-primary", "--yes"])
        .expect(15, &["db1 is connected through db2"]);
    pair.primary.kill();
    let s = until("the far one says so", || {
        let s = far.status();
        (s["state"] == "Outdated" && s["lag"]["seconds"].as_f64().unwrap() > 2.5).then_some(s)
    });
    assert!(s["reason"].as_str().unwrap().contains("db2, which feeds this node, has no link"), "{s}");
    let plan = far.place.run(&["promote", "g", "--dry-run", "--i-fenced-the-old-primary"]);
    plan.expect(0, &["db1 is unreachable through db2 and not known to be fenced"]);
    promote(&pair.shadow);
    pair.shadow.attach("nbd-socket");
    load(&pair.shadow, 200..230);
    wait_current(&far, &pair.shadow);
    assert_eq!(resyncs(&mut far), before, "it was resynced");
    assert_eq!(far.status()["primary"]["through"], Value::Null);
    pair.primary.start();
    rejoin(&mut pair.primary, &pair.shadow);
    load(&pair.shadow, 230..240);
    end_equal(&mut pair.shadow, [&mut pair.primary, &mut far]);
}

#[test]
fn the_far_end_of_a_chain_is_promoted_and_the_others_follow_it() {
    let (mut pair, mut far) = chain();
    wait_current(&far, &pair.primary);
    pair.primary.attach("nbd-socket");
    load(&pair.primary, 0..20);
    wait_current(&far, &pair.primary);
    // What the primary writes while the near one is away never comes to the far one.
    pair.shadow.kill();
    load(&pair.primary, 20..24);
    pair.primary.kill();
    promote(&far);
    far.attach("nbd-socket");
    load(&far, 100..120);
    pair.shadow.start();
    wait_current(&pair.shadow, &far);
    pair.primary.start();
    rejoin(&mut pair.primary, &far);
    end_equal(&mut far, [&mut pair.shadow, &mut pair.primary]);
}

/// One near shadow in the sync set, one far shadow that is not: what hospitals run.
#[test]
fn a_near_shadow_takes_over_without_loss_and_the_far_one_goes_on_from_its_records() {
    let setup = Setup { volumes: vec![("data", SIZE)], journal: "64M", back: true, ..Setup::default() };
    let mut pair = Pair::prepare(&setup);
    let member = "name = \"db2\"\nsync = true\naddress";
    pair.primary.configure(|text| text.replace("name = \"db2\"\naddress", member));
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    let (mut far, address) = join(&pair.primary, "db3");
    let near = std::fs::read_to_string(pair.shadow.place.config().join("g.toml")).unwrap();
    let listen = near.lines().find_map(|l| l.strip_prefix("listen = ")).unwrap().trim_matches('"').to_owned();
    far.knows("db2", &listen);
    pair.shadow.knows("db3", &address);
    pair.shadow.stop();
    pair.shadow.start();
    far.start();
    wait_current(&far, &pair.primary);
    pair.wait_following();
    assert_eq!(pair.primary.status()["sync_set"], json!(["db2"]));
    pair.primary.attach("nbd-socket");
    load(&pair.primary, 0..30);
    wait_current(&far, &pair.primary);
    let before = resyncs(&mut far);
    // The near one dies and is back: a FLUSH waits for it, and then goes on.
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| pour(&mut client, SIZE, 30..60, &AtomicU64::new(0)));
        pair.shadow.kill();
        pair.shadow.start();
    });
    // Each commit is a block with its number; what was acknowledged is counted here.
    far.stop();
    let mut acknowledged = 0u64;
    for number in 1..=200u64 {
        client.write(number % 64 * 4096, &number.to_le_bytes().repeat(512)).unwrap();
        if number == 200 {
            break; // not acknowledged: it may be there or not
        }
        client.flush().unwrap();
        acknowledged = number;
    }
    pair.primary.kill();
    drop(client);
    promote(&pair.shadow);
    pair.shadow.attach("nbd-socket");
    let mut client = Client::connect(&pair.shadow.socket(), "data").unwrap();
    for number in acknowledged - 62..=acknowledged {
        let there = client.read(number % 64 * 4096, 4096).unwrap();
        assert_eq!(
            u64::from_le_bytes(there[..8].try_into().unwrap()),
            number,
            "an acknowledged commit is lost"
        );
    }
    drop(client);
    far.start();
    load(&pair.shadow, 100..120);
    wait_current(&far, &pair.shadow);
    assert_eq!(resyncs(&mut far), before, "the far one was resynced");
    pair.primary.start();
    rejoin(&mut pair.primary, &pair.shadow);
    end_equal(&mut pair.shadow, [&mut pair.primary, &mut far]);
}

//! A member of the sync set is lost: FLUSH waits, goes on once it is outdated, and the member comes back as one.

use crate::nbd::Client;
use crate::pair::{Pair, Setup};
use crate::place::until;

const SYNC: Setup = Setup {
    volumes: Vec::new(),
    journal: "128M",
    cache: "16M",
    sync: true,
    config: "",
    filled: 0,
    alone: false,
    behind: false,
    back: false,
};

fn pair() -> Pair {
    let pair = Pair::start(&Setup { volumes: vec![("data", 64 << 20)], ..SYNC });
    until("the shadow is told that it is a member", || {
        (pair.shadow.status()["standing"] == "member").then_some(())
    });
    pair
}

const FENCED: [&str; 6] = ["outdate", "g", "--member", "db2", "--i-fenced-the-member", "--yes"];

#[test]
fn flush_goes_on_once_a_lost_member_is_outdated_and_it_is_a_member_again_by_itself() {
    let mut pair = pair();
    pair.primary.attach("nbd-socket");
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    client.write(0, &[1; 4096]).unwrap();
    client.flush().unwrap();
    pair.primary.place.run(&FENCED).expect(11, &["alive"]);
    // By its id it is the same member.
    let id = pair.shadow.node_id();
    let by_id = ["outdate", "g", "--member", &id, "--i-fenced-the-member", "--yes"];
    pair.primary.place.run(&by_id).expect(11, &["alive"]);
    pair.shadow.kill();
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| {
            client.write(4096, &[2; 4096]).unwrap();
            client.flush().unwrap();
        });
        until("FLUSH waits for the member", || (pair.primary.status()["state"] == "Blocked").then_some(()));
        let told = pair.primary.status();
        assert!(told["action"].as_str().unwrap().contains("volrep outdate g --member db2"), "{told}");
        pair.primary.place.run(&["outdate", "g", "--member", "db2", "--yes"]).expect(15, &["--i-fenced"]);
        pair.primary
            .place
            .run(&["outdate", "g", "--member", "db3", "--i-fenced-the-member", "--yes"])
            .expect(1, &["db2"]);
        pair.primary.place.run(&[&FENCED[..], &["--dry-run"]].concat()).expect(0, &[]);
        assert!(!waits.is_finished(), "a FLUSH was answered without a member");
        let done = pair.primary.place.run(&[&FENCED[..], &["--json"]].concat());
        assert_eq!(done.expect(0, &[]).json()["member"], "db2");
        waits.join().unwrap();
    });
    let without = |pair: &Pair| {
        let s = pair.primary.status();
        assert_eq!((&s["ack_level"], &s["peers"][0]["outdated"]), (&"local".into(), &true.into()), "{s}");
        assert_eq!(s["peers"][0]["sync"], false);
    };
    without(&pair);
    assert!(pair.primary.told().contains("outdated"), "{}", pair.primary.told());
    pair.primary.place.run(&FENCED).expect(0, &[]);
    // It stays so, whatever happens to the primary.
    pair.primary.kill();
    pair.primary.start();
    pair.primary.wait_attached();
    without(&pair);
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    client.write(8192, &[3; 4096]).unwrap();
    client.flush().unwrap();
    pair.shadow.start();
    until("it is a member again", || {
        let (p, s) = (pair.primary.status(), pair.shadow.status());
        (p["ack_level"] == "durable" && p["peers"][0]["outdated"] == false && s["standing"] == "member")
            .then_some(())
    });
    for node in [&pair.primary, &pair.shadow] {
        node.place.history("that it was lost, and is a member again", |events| {
            ["outdated", "taken_in"].iter().all(|kind| events.iter().any(|e| e["event"] == *kind))
        });
    }
    pair.finish();
}

#[test]
fn a_node_that_knows_that_it_is_outdated_is_promoted_only_when_that_is_accepted() {
    let mut pair = pair();
    pair.primary.attach("nbd-socket");
    pair.shadow.kill();
    until("its link is gone", || {
        (pair.primary.status()["peers"][0]["state"] == "Disconnected").then_some(())
    });
    pair.primary.place.run(&FENCED).expect(0, &[]);
    // It is not to enter again.
    pair.primary.configure(|text| text.replace("\nsync = true", "\nsync = false"));
    pair.primary.kill();
    pair.primary.start();
    pair.shadow.start();
    // What it is told comes before it follows, and it may begin to by what is on the way from a primary that is dead.
    until("it learns it, and follows", || {
        let s = pair.shadow.status();
        (s["standing"] == "outdated" && s["primary"]["connected"] == true).then_some(())
    });
    pair.primary.kill();
    until("the shadow misses the primary", || {
        (pair.shadow.status()["peers"][0]["state"] == "Disconnected").then_some(())
    });
    let promote = ["promote", "g", "--i-fenced-the-old-primary", "--yes"];
    pair.shadow.place.run(&promote).expect(13, &["--accept-outdated", "acknowledged writes are not here"]);
    pair.shadow.kill();
    assert_eq!(pair.shadow.status()["standing"], "outdated");
    pair.shadow.start();
    until("it has recovered", || (pair.shadow.status()["state"] != "Recovering").then_some(()));
    pair.shadow.place.run(&promote).expect(13, &["--accept-outdated"]);
    pair.shadow.place.run(&[&promote[..], &["--accept-outdated"]].concat()).expect(0, &[]);
    let s = pair.shadow.status();
    assert_eq!((&s["role"], &s["standing"]), (&"primary".into(), &serde_json::Value::Null), "{s}");
    pair.shadow.stop();
}

#[test]
fn a_member_that_was_started_anew_claims_nothing_before_its_primary_says_so() {
    let mut pair = pair();
    pair.primary.kill();
    assert_eq!(pair.shadow.status()["standing"], "member", "nothing is acknowledged without it");
    pair.shadow.kill();
    pair.shadow.start();
    until("it has recovered", || (pair.shadow.status()["state"] != "Recovering").then_some(()));
    let s = pair.shadow.status();
    assert_eq!((&s["sync_set"][0], &s["standing"]), (&"db2".into(), &serde_json::Value::Null), "{s}");
    pair.primary.start();
    until("it is told", || (pair.shadow.status()["standing"] == "member").then_some(()));
    pair.finish();
}

#[test]
fn a_primary_whose_lease_has_run_out_acknowledges_nothing() {
    let mut pair = Pair::start(&Setup { volumes: vec![("data", 64 << 20)], sync: false, ..SYNC });
    pair.primary.attach("nbd-socket");
    pair.shadow.place.run(&["lease", "g", "--for", "20s"]).expect(11, &["not a primary"]);
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    let mut write = |pattern: u8| client.write(0, &[pattern; 4096]).and_then(|()| client.flush());
    // What is renewed, or not needed any more, goes on.
    let lend = |args: &[&str]| pair.primary.place.run(&[&["lease", "g"][..], args].concat()).code;
    assert_eq!(lend(&["--for", "1h"]), 0);
    write(1).unwrap();
    assert_eq!(lend(&["--none"]), 0);
    write(2).unwrap();
    assert_eq!(lend(&["--for", "200ms"]), 0);
    until("it stops by itself", || (pair.primary.status()["state"] == "Failed").then_some(()));
    assert!(write(3).is_err(), "acknowledged after the lease had run out");
    assert!(pair.primary.told().contains("lease has run out"), "{}", pair.primary.told());
    pair.primary.kill();
    pair.primary.start();
    pair.primary.wait_attached();
    let mut client = Client::connect(&pair.primary.socket(), "data").unwrap();
    client.write(0, &[4; 4096]).unwrap();
    client.flush().unwrap();
    pair.wait_following();
    pair.finish();
}

//! `rejoin` and `resolve` where there is nothing to give up: each says so, and what to do instead.

use super::place::until;
use super::{Daemon, Place};

/// A served primary that nobody follows.
fn alone() -> (Place, Daemon) {
    let place = Place::new();
    let args =
        ["init", "g", "--node", "db1", "--listen", "none", "--journal-size", "8M", "--volume", "d=disk:1M"];
    place.run(&args).expect(0, &[]);
    let daemon = Daemon::start(&place);
    until("it serves", || {
        (place.run(&["status", "g", "--json"]).json()["state"] == "UpToDate").then_some(())
    });
    (place, daemon)
}

#[test]
fn a_primary_that_knows_of_no_other_gives_nothing_up() {
    let (place, _daemon) = alone();
    for args in [&["rejoin", "g", "--yes"][..], &["rejoin", "g", "--dry-run"]] {
        place.run(args).expect(12, &["has heard of no other", "bring that node or the link to it back"]);
    }
    let error = place.run(&["rejoin", "g", "--yes", "--json"]).json();
    assert_eq!((&error["error"]["exit"], &error["error"]["kind"]), (&12.into(), &"peer_unreachable".into()));
}

#[test]
fn resolve_wants_a_node_that_is_known_and_not_this_one() {
    let (place, _daemon) = alone();
    let kept = place.run(&["resolve", "g", "--keep", "db1", "--yes"]);
    kept.expect(11, &["db1 is this node", "nothing is given up", "volrep resolve g --keep db1"]);
    place.run(&["resolve", "g", "--keep", "db9", "--yes"]).expect(2, &["`db9`", "known are"]);
}

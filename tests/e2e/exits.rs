//! How commands on a running pair end: the exit codes that scripts rely on, and what to do next.

use crate::pair::{Pair, Setup};
use crate::place::{Ended, until};
use nix::sys::signal::Signal;
use std::os::unix::fs::PermissionsExt;

fn small() -> Pair {
    Pair::start(&Setup { volumes: vec![("data", 16 << 20)], journal: "32M", ..Setup::default() })
}

fn missed(pair: &Pair) {
    until("the shadow misses the primary", || {
        (pair.shadow.status()["peers"][0]["state"] == "Disconnected").then_some(())
    });
}

#[test]
fn a_promotion_needs_proof_that_the_old_primary_can_t_write() {
    let mut pair = small();
    let promote = |pair: &Pair, more: &[&str]| -> Ended {
        pair.shadow.place.run(&[&["promote", "g", "--yes"], more].concat())
    };
    // Nobody's word counts while the primary is heard.
    promote(&pair, &["--i-fenced-the-old-primary"]).expect(15, &["connected and alive", "fence it"]);
    pair.primary.kill();
    missed(&pair);
    let words = ["unreachable and not known to be fenced", "or pass --i-fenced-the-old-primary"];
    promote(&pair, &[]).expect(15, &words);
    promote(&pair, &["--dry-run"]).expect(15, &words);
    let refused = promote(&pair, &["--json"]).json();
    assert_eq!(refused["error"]["kind"], "fencing_unconfirmed");
    let hook =
        pair.shadow.place.file("hook", b"#!/bin/sh\n[ \"$1 $2\" = 'db1 1' ] && [ -e \"${0%/*}/fenced\" ]\n");
    std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o700)).unwrap();
    pair.shadow.configure(|t| format!("fence_hook = {hook:?}\n{t}"));
    promote(&pair, &[]).expect(15, &["db1 is not fenced", "ended with exit status: 1"]);
    assert_eq!(pair.shadow.status()["role"], "shadow");
    pair.shadow.place.file("fenced", b"");
    promote(&pair, &[]).expect(0, &["fencing db1"]);
    assert_eq!(pair.shadow.status()["role"], "primary");
    promote(&pair, &[]).expect(11, &["is the primary already"]);
}

#[test]
fn a_fenced_primary_whose_connection_has_not_ended_is_replaced_once_it_is_silent() {
    let setup = Setup { volumes: vec![("data", 16 << 20)], journal: "32M", ..Setup::default() };
    let mut pair = Pair::prepare(&setup);
    pair.shadow.configure(|t| t.replacen("# silence = \"5s\"", "silence = \"60s\"", 1));
    pair.primary.start();
    pair.shadow.start();
    pair.wait_following();
    // As if its machine were cut off, or lost with all that it would have said.
    pair.primary.daemon().signal(Signal::SIGSTOP);
    until("two heartbeats are missing", || {
        let told = pair.shadow.status()["primary"].clone();
        assert_eq!(told["connected"], true);
        (told["heard_seconds_ago"].as_f64()? > 1.0).then_some(())
    });
    pair.shadow.place.run(&["promote", "g", "--yes"]).expect(15, &["or pass --i-fenced-the-old-primary"]);
    pair.shadow.place.run(&["promote", "g", "--yes", "--i-fenced-the-old-primary"]).expect(0, &[]);
    pair.primary.daemon().signal(Signal::SIGCONT);
}

#[test]
fn a_comparison_needs_the_other_side() {
    let mut pair = small();
    for verb in ["refresh", "verify"] {
        let ended = pair.primary.place.run(&[verb, "g", "--peer", "db9"]);
        ended.expect(12, &["db9 is not connected", "bring it or its link back"]);
    }
    pair.primary.place.run(&["refresh", "g", "--stop"]).expect(11, &["no comparison is under way"]);
    let ended = pair.shadow.place.run(&["verify", "g", "--json"]);
    assert_eq!(ended.expect(0, &[]).json()["refresh"]["differ"], 0);
    pair.primary.kill();
    missed(&pair);
    let ended = pair.shadow.place.run(&["refresh", "g"]);
    ended.expect(12, &["the primary is not connected", "bring it or its link back"]);
}

#[test]
fn an_attach_that_fails_leaves_nothing_open_and_nothing_remembered() {
    let pair = small();
    let run = pair.primary.place.config().join("run/g");
    let attach = || pair.primary.place.run(&["attach", "g", "--device", "nbd-socket"]);
    // In the place of what remembers it, and then of the socket.
    let (note, socket) = (run.join("attached.new"), pair.primary.socket());
    std::fs::create_dir(&note).unwrap();
    attach().expect(1, &["can't write", "attached.json"]);
    assert!(!socket.exists(), "it is open, and nobody would know of it");
    std::fs::remove_dir(&note).unwrap();
    std::fs::create_dir(&socket).unwrap();
    attach().expect(1, &["can't listen on", "nbd.sock"]);
    assert!(!run.join("attached.json").exists(), "the next daemon would look for it");
    std::fs::remove_dir(&socket).unwrap();
    attach().expect(0, &[]);
    pair.primary.place.run(&["detach", "g"]).expect(0, &[]);
}

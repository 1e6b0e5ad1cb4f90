//! Views of a shadow: what they show, what becomes of what is written to them, and what ends them.

use crate::nbd::{Client, READ, TRIM, WRITE, ZEROES};
use crate::outage::{PIECE, noise, pour};
use crate::pair::{Pair, Setup, client, installed};
use crate::place::{Ended, until};
use crate::resync::Small;
use serde_json::Value;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;

const SIZE: u64 = 16 << 20;

fn small() -> Pair {
    let pair = Pair::start(&Setup { volumes: vec![("data", SIZE)], journal: "32M", ..Setup::default() });
    pair.primary.attach("nbd-socket");
    pair
}

fn view(pair: &Pair, more: &[&str]) -> Ended {
    pair.shadow.place.run(&[&["view", "g"], more].concat())
}

fn open(pair: &Pair, mode: &str) -> Client {
    view(pair, &[mode, "--device", "nbd-socket"]).expect(0, &["frozen at LSN"]);
    Client::connect(&socket(pair), "data").unwrap()
}

fn socket(pair: &Pair) -> PathBuf {
    pair.shadow.place.config().join("run/g/view.sock")
}

/// The files beside the journal that an overlay consists of.
fn overlay(pair: &Pair) -> Vec<String> {
    pair.shadow.place.tree().into_iter().filter(|path| path.contains("stage-")).collect()
}

fn told(pair: &Pair) -> Value {
    pair.shadow.status()["view"].clone()
}

fn failed(result: std::io::Result<Vec<u8>>) -> i32 {
    result.expect_err("it is refused").raw_os_error().expect("by an errno of the protocol")
}

#[test]
fn a_scratch_view_shows_one_record_and_its_own_writes_and_nothing_of_it_stays() {
    let mut pair = small();
    let mut primary = Client::connect(&pair.primary.socket(), "data").unwrap();
    primary.write(0, &noise(1)).unwrap();
    primary.write(2 << 20, &noise(2)).unwrap();
    primary.flush().unwrap();
    pair.settle();
    let ended = view(&pair, &["--scratch", "--device", "nbd-socket", "--json"]);
    let opened = ended.expect(0, &[]).json();
    assert_eq!((&opened["view"]["kind"], &opened["view"]["state"]), (&"scratch".into(), &"Open".into()));
    let lsn = opened["view"]["lsn"].as_u64().unwrap();
    assert_eq!(lsn, pair.primary.status()["tail_lsn"].as_u64().unwrap());
    let mut seen = Client::connect(&socket(&pair), "data").unwrap();
    // What production writes from here on is received and acknowledged, and not shown.
    primary.write(0, &noise(3)).unwrap();
    primary.flush().unwrap();
    let tail = pair.primary.status()["tail_lsn"].as_u64().unwrap();
    until("the shadow has it", || (pair.shadow.status()["durable_lsn"].as_u64() >= Some(tail)).then_some(()));
    assert!(seen.read(0, PIECE).unwrap() == noise(1), "not the image of that record");
    // What is written to the view is there, over the image: whole, in part, and as zeroes.
    seen.write(2 << 20, &noise(4)).unwrap();
    seen.write((2 << 20) - 4096, &[7; 8192]).unwrap();
    seen.call(TRIM, 0, 4096, 4096, &[]).unwrap();
    seen.call(ZEROES, 1, 64 << 10, 4096, &[]).unwrap();
    seen.flush().unwrap();
    let mut wanted = noise(1);
    wanted[4096..8192].fill(0);
    wanted[64 << 10..68 << 10].fill(0);
    assert!(seen.read(0, PIECE).unwrap() == wanted, "the image under what was zeroed");
    let mut wanted = noise(4);
    wanted[..4096].fill(7);
    assert!(seen.read(2 << 20, PIECE).unwrap() == wanted, "the image under what was written");
    assert_eq!(seen.read((2 << 20) - 8192, 8192).unwrap()[4096..], [7; 4096]);
    let v = told(&pair);
    assert_eq!(v["overlay_bytes"].as_u64().unwrap(), (1 << 20) + 4096 + 8192);
    assert_eq!(v["waiting_records"].as_u64().unwrap(), tail - lsn);
    assert_eq!(v["devices"][0].as_str().unwrap(), opened["volumes"][0]["device"].as_str().unwrap());
    let text = pair.shadow.told();
    assert!(text.contains("scratch view  Open at LSN") && text.contains("volrep view g --close"), "{text}");
    assert!(!overlay(&pair).is_empty());
    view(&pair, &["--close"]).expect(0, &["catches up"]);
    assert!(told(&pair).is_null() && overlay(&pair).is_empty() && !socket(&pair).exists());
    pair.settle();
    pair.finish();
}

#[test]
fn a_read_only_view_takes_no_write() {
    let mut pair = small();
    let mut primary = Client::connect(&pair.primary.socket(), "data").unwrap();
    primary.write(0, &noise(1)).unwrap();
    primary.flush().unwrap();
    pair.settle();
    let mut seen = open(&pair, "--read-only");
    assert!(seen.read(0, PIECE).unwrap() == noise(1));
    for (kind, data) in [(WRITE, vec![1; 4096]), (TRIM, vec![]), (ZEROES, vec![])] {
        assert_eq!(failed(seen.call(kind, 0, 0, 4096, &data)), 1, "EPERM");
    }
    assert!(seen.call(READ, 0, 0, PIECE, &[]).unwrap() == noise(1));
    if installed("nbdinfo") {
        let uri = told(&pair)["devices"][0].as_str().unwrap().to_owned();
        client("nbdinfo", &["--is", "readonly", &uri]);
    }
    assert!(overlay(&pair).is_empty(), "nothing is needed to write to");
    // Its users hear of the end; a second end is none.
    view(&pair, &["--close"]).expect(0, &[]);
    assert!(seen.read(0, 4096).is_err());
    view(&pair, &["--close"]).expect(0, &["no view is open"]);
    pair.finish();
}

#[test]
fn a_view_and_what_excludes_it() {
    let pair = small();
    pair.settle();
    let ended = pair.primary.place.run(&["view", "g", "--read-only"]);
    ended.expect(11, &["this node is the primary", "run it there"]);
    pair.primary.place.run(&["view", "g", "--close"]).expect(0, &["no view is open"]);
    let far = ["--read-only", "--at", "1000000000", "--device", "nbd-socket"];
    view(&pair, &far).expect(11, &["LSN 1000000000 is not here yet"]);
    view(&pair, &["--read-only", "--at", "0", "--device", "nbd-socket"])
        .expect(11, &["can't be shown any more"]);
    view(&pair, &[]).expect(2, &["--read-only"]);
    view(&pair, &["--read-only", "--scratch"]).expect(2, &["cannot be used with"]);
    let at = pair.shadow.status()["applied_lsn"].to_string();
    view(&pair, &["--read-only", "--at", &at, "--device", "nbd-socket"]).expect(0, &[]);
    view(&pair, &["--scratch", "--device", "nbd-socket"]).expect(11, &["--close"]);
    for verb in ["refresh", "verify"] {
        for node in [&pair.primary, &pair.shadow] {
            node.place.run(&[verb, "g"]).expect(11, &["a view holds the image", "volrep view g --close"]);
        }
    }
    pair.shadow.place.run(&["detach", "g"]).expect(11, &["a view holds the image"]);
    pair.shadow.place.run(&["attach", "g", "--device", "nbd-socket"]).expect(11, &["this node is a shadow"]);
    view(&pair, &["--close"]).expect(0, &[]);
    pair.shadow.place.run(&["verify", "g"]).expect(0, &[]);
}

#[test]
fn a_view_ends_with_its_daemon_killed_or_stopped() {
    let mut pair = small();
    let mut primary = Client::connect(&pair.primary.socket(), "data").unwrap();
    for killed in [true, false] {
        let mut seen = open(&pair, "--scratch");
        seen.write(0, &noise(9)).unwrap();
        primary.write(0, &noise(1)).unwrap();
        primary.flush().unwrap();
        if killed {
            pair.shadow.kill();
        } else {
            pair.shadow.stop();
            assert!(
                overlay(&pair).is_empty() && !socket(&pair).exists(),
                "nothing is left to the next daemon"
            );
        }
        assert!(seen.read(0, 4096).is_err());
        pair.shadow.start();
        pair.wait_following();
        until("what was left is taken away", || (!socket(&pair).exists()).then_some(()));
        assert!(told(&pair).is_null() && overlay(&pair).is_empty());
    }
    pair.finish();
}

#[test]
fn a_promotion_ends_the_view_and_nothing_of_it_reaches_the_new_primary() {
    let mut pair = small();
    let mut primary = Client::connect(&pair.primary.socket(), "data").unwrap();
    primary.write(0, &noise(1)).unwrap();
    primary.flush().unwrap();
    pair.settle();
    let mut seen = open(&pair, "--scratch");
    seen.write(0, &noise(9)).unwrap();
    primary.write(1 << 20, &noise(2)).unwrap();
    primary.flush().unwrap();
    let tail = pair.primary.status()["tail_lsn"].as_u64();
    until("the shadow has it", || (pair.shadow.status()["durable_lsn"].as_u64() >= tail).then_some(()));
    pair.primary.kill();
    pair.promote();
    // The connection is closed, or (if a request came first) its requests fail.
    assert!(seen.write(0, &noise(8)).is_err() && seen.read(0, 4096).is_err());
    assert!(told(&pair).is_null() && overlay(&pair).is_empty() && !socket(&pair).exists());
    pair.shadow.attach("nbd-socket");
    let mut promoted = Client::connect(&pair.shadow.socket(), "data").unwrap();
    assert!(promoted.read(0, PIECE).unwrap() == noise(1), "written in the view");
    assert!(promoted.read(1 << 20, PIECE).unwrap() == noise(2), "received while the view was open");
}

#[test]
fn a_view_that_fills_the_journal_fails_and_the_primary_never_waits() {
    let mut pair = small();
    let mut seen = open(&pair, "--read-only");
    let mut primary = Client::connect(&pair.primary.socket(), "data").unwrap();
    // Four times the journal of either: the primary's own is freed by what the shadow has, not by what it shows.
    pour(&mut primary, SIZE, 0..128, &AtomicU64::new(0));
    let v = told(&pair);
    assert_eq!(v["state"], "Failed", "{v}");
    assert!(v["reason"].as_str().unwrap().contains("journal here is full"), "{v}");
    assert_eq!(failed(seen.read(0, 4096)), 5, "EIO");
    let text = pair.shadow.told();
    assert!(text.contains("a view has failed") || text.contains("action: volrep view g --close"), "{text}");
    assert!(pair.shadow.daemon().log().contains("the view has failed"));
    pair.settle();
    view(&pair, &["--scratch", "--device", "nbd-socket"]).expect(11, &["--close"]);
    view(&pair, &["--close"]).expect(0, &[]);
    drop(open(&pair, "--scratch"));
    view(&pair, &["--close"]).expect(0, &[]);
    pair.finish();
}

#[test]
fn a_full_overlay_fails_the_view_and_not_the_shadow() {
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: a small tmpfs can only be mounted by root");
    }
    let mut pair = small();
    pair.settle();
    pair.shadow.stop();
    let _small = Small::under(&pair.shadow, "size=40m");
    pair.shadow.start();
    pair.wait_following();
    let mut primary = Client::connect(&pair.primary.socket(), "data").unwrap();
    let mut seen = open(&pair, "--scratch");
    let pieces = (0..SIZE / PIECE as u64).map(|n| seen.write(n * PIECE as u64, &noise(n)));
    let error = pieces.filter_map(Result::err).next().expect("there is room for half of it");
    assert_eq!(error.raw_os_error(), Some(28), "ENOSPC");
    assert_eq!(failed(seen.read(0, 4096)), 5, "EIO");
    let v = told(&pair);
    assert!(v["state"] == "Failed" && v["reason"].as_str().unwrap().contains("overlay is full"), "{v}");
    // Its room is given back, and the shadow follows.
    assert!(pair.shadow.place.tree().iter().all(|path| !path.contains("stage-")));
    primary.write(0, &noise(77)).unwrap();
    primary.flush().unwrap();
    pair.settle();
    view(&pair, &["--close"]).expect(0, &[]);
    open(&pair, "--scratch").write(0, &noise(1)).unwrap();
    view(&pair, &["--close"]).expect(0, &[]);
    pair.finish();
}

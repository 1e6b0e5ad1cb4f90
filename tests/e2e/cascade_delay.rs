//! A shadow that feeds another one, and one of the two holds its image back.

use crate::cascade::{delayed_chain, end_equal, load, peer, rejoin, wait_current};
use crate::pair::{Node, Pair};
use crate::place::until;
use serde_json::Value;
use std::time::{Duration, Instant};

fn lsn(status: &Value, name: &str) -> u64 {
    status[name].as_u64().unwrap()
}

/// A mark, as of which a node is to be promoted, and more after it: the LSN of the mark.
fn mistake(pair: &Pair, far: &Node) -> u64 {
    let mark = pair.primary.place.run(&["mark", "g", "before", "--json"]).expect(0, &[]).json();
    load(&pair.primary, 30..34);
    until("all of it is durable on both", || {
        let tail = pair.primary.status()["tail_lsn"].clone();
        (pair.shadow.status()["durable_lsn"] == tail && far.status()["durable_lsn"] == tail).then_some(())
    });
    lsn(&mark, "lsn")
}

#[track_caller]
fn promote_before(node: &Node) {
    let args = ["promote", "g", "--at", "before", "--i-fenced-the-old-primary", "--yes"];
    until("it may be promoted", || {
        let ended = node.place.run(&args);
        assert!(ended.code == 0 || ended.stderr.contains("connected and alive"), "{}", ended.stderr);
        (ended.code == 0).then_some(())
    });
}

/// What it held beyond the new history is kept; then it follows.
#[track_caller]
fn give_up(node: &Node, primary: &Node) {
    until("it has learned of the other", || (node.status()["state"] == "Diverged").then_some(()));
    node.place.run(&["rejoin", "g", "--yes"]).expect(0, &[]);
    until("it follows", || {
        let (s, p) = (node.status(), primary.status());
        (s["durable_lsn"] == p["tail_lsn"] && s["state"] == "UpToDate").then_some(())
    });
    let kept = node.place.run(&["salvage", "g", "list", "--json"]).expect(0, &[]).json();
    assert_eq!(kept["files"].as_array().unwrap().len(), 1, "{kept}");
}

#[test]
fn a_near_shadow_holds_its_image_back_and_not_what_it_passes_on() {
    let (mut pair, mut far) = delayed_chain("1h", "0s");
    wait_current(&far, &pair.primary);
    pair.primary.attach("nbd-socket");
    let before = lsn(&pair.shadow.status(), "applied_lsn");
    let begun = Instant::now();
    load(&pair.primary, 0..20);
    let s = wait_current(&far, &pair.primary);
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert!(s["lag"]["seconds"].as_f64().unwrap() < 1.0, "{s}");
    let near = pair.shadow.status();
    assert_eq!(
        (lsn(&near, "applied_lsn"), &near["apply_delay"]["state"]),
        (before, &"Held".into()),
        "{near}"
    );
    assert!(lsn(&near, "tail_lsn") > before && near["durable_lsn"] == s["applied_lsn"], "{near}");
    let told = peer(&near, "db3");
    assert_eq!((&told["state"], &told["apply_delay_seconds"]), (&"UpToDate".into(), &0.0.into()), "{near}");
    // The one can't be compared with the other while they are apart on purpose.
    let hint = ["held back", "apply_delay: ask on db2, with --peer db3 --suspend-delay"];
    far.place.run(&["verify", "g"]).expect(1, &hint);
    pair.shadow.place.run(&["verify", "g", "--peer", "db3"]).expect(11, &["--suspend-delay"]);
    pair.shadow.place.run(&["verify", "g", "--peer", "db3", "--suspend-delay"]).expect(0, &[]);
    until("it holds again", || (pair.shadow.status()["apply_delay"]["state"] == "Held").then_some(()));
    let mark = mistake(&pair, &far);
    // A restart of the near one neither lets its image go nor takes anything from the far one.
    pair.shadow.stop();
    pair.shadow.start();
    until("the far one is fed again", || (far.status()["state"] == "UpToDate").then_some(()));
    assert!(lsn(&pair.shadow.status(), "applied_lsn") <= mark);
    pair.primary.kill();
    promote_before(&pair.shadow);
    assert!(lsn(&far.status(), "applied_lsn") > mark);
    give_up(&far, &pair.shadow);
    pair.shadow.attach("nbd-socket");
    load(&pair.shadow, 50..60);
    wait_current(&far, &pair.shadow);
    pair.primary.start();
    rejoin(&mut pair.primary, &pair.shadow);
    end_equal(&mut pair.shadow, [&mut far, &mut pair.primary]);
}

#[test]
fn a_far_shadow_has_a_delay_of_its_own_and_is_promoted_within_it() {
    let (mut pair, mut far) = delayed_chain("0s", "1h");
    until("its first copy is whole", || (far.status()["state"] == "UpToDate").then_some(()));
    pair.primary.attach("nbd-socket");
    let before = lsn(&far.status(), "applied_lsn");
    load(&pair.primary, 0..20);
    wait_current(&pair.shadow, &pair.primary);
    let mark = mistake(&pair, &far);
    let s = far.status();
    assert_eq!((lsn(&s, "applied_lsn"), &s["apply_delay"]["state"]), (before, &"Held".into()), "{s}");
    let near = pair.shadow.status();
    let told = peer(&near, "db3");
    assert_eq!(told["apply_delay_seconds"], 3600.0, "{near}");
    assert!(told["lag_seconds"].as_f64().unwrap() < 1.0 && lsn(told, "lag_records") > 0, "{near}");
    far.place.run(&["verify", "g"]).expect(11, &["--suspend-delay"]);
    // Both others are lost.
    pair.primary.kill();
    pair.shadow.kill();
    promote_before(&far);
    far.attach("nbd-socket");
    load(&far, 50..60);
    pair.shadow.start();
    give_up(&pair.shadow, &far);
    wait_current(&pair.shadow, &far);
    assert!(lsn(&far.status(), "tail_lsn") > mark);
    pair.primary.start();
    rejoin(&mut pair.primary, &far);
    end_equal(&mut far, [&mut pair.shadow, &mut pair.primary]);
}

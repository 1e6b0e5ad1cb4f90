//! Resyncs: the first full copy, and a shadow that the primary's journal can't feed any more.

use crate::filesystem::mounted;
use crate::model::Random;
use crate::nbd::Client;
use crate::outage::{noise, pour};
use crate::pair::{self, Node, Pair, Setup, long};
use crate::place::{first_difference, until};
use crate::postgres::{Postgres, Production, as_postgres};
use crate::refresh::ask;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// What is written round and round; the journal holds less.
const BUSY: u64 = 48 * MIB;

/// A pair whose shadow stands at a known image and has missed more than the journal holds.
fn left_behind(size: u64) -> Pair {
    let setup = Setup { volumes: vec![("data", size)], journal: "32M", behind: true, ..Setup::default() };
    let mut pair = Pair::start(&setup);
    pair.primary.attach("nbd-socket");
    let mut client = client(&pair);
    pour(&mut client, BUSY, 0..20, &AtomicU64::new(0));
    until("the shadow has it", || {
        let (p, s) = (pair.primary.status(), pair.shadow.status());
        (s["applied_lsn"] == p["tail_lsn"]).then_some(())
    });
    leave_behind(&mut pair, 0);
    pair
}

fn client(pair: &Pair) -> Client {
    Client::connect(&pair.primary.socket(), "data").unwrap()
}

/// Stops the shadow, and goes on until the journal can't feed it any more.
fn leave_behind(pair: &mut Pair, round: u64) {
    pair.shadow.stop();
    pour(&mut client(pair), BUSY, 1000 * (round + 1)..1000 * (round + 1) + 130, &AtomicU64::new(0));
    let s = pair.primary.status();
    assert_eq!(s["peers"][0]["state"], "Resync", "{s}");
    assert_eq!((&s["action"], &s["state"]), (&json!("db2 needs a resync"), &json!("UpToDate")), "{s}");
}

fn wait_current(pair: &Pair) {
    until("the shadow is up to date", || {
        let (p, s) = (pair.primary.status(), pair.shadow.status());
        assert_ne!(s["state"], "Inconsistent", "{s}");
        (p["peers"][0]["state"] == "UpToDate" && s["state"] == "UpToDate").then_some(())
    });
}

/// Files of a stage.
fn stage(node: &Node) -> Vec<String> {
    let mut tree = node.place.tree();
    tree.retain(|p| p.contains(".stage-"));
    tree
}

#[test]
fn a_shadow_that_fell_off_the_journal_comes_back_by_the_dirty_maps_alone() {
    const SIZE: u64 = 2 << 30;
    let mut pair = left_behind(SIZE);
    // It stays so while the primary is restarted.
    pair.primary.kill();
    pair.primary.start();
    pair.primary.wait_attached();
    pair.shadow.start();
    wait_current(&pair);
    let told = pair.shadow.status()["refresh"].clone();
    assert_eq!((&told["cause"], &told["state"]), (&json!("resync"), &json!("Done")), "{told}");
    let (total, differ) = (told["total"].as_u64().unwrap(), told["differ"].as_u64().unwrap());
    assert!(differ > 0 && total <= BUSY + 4 * MIB, "compared {total} of {SIZE}, {differ} differed");
    eprintln!("compared {total} of {SIZE} bytes, {differ} differed, in {} s", told["seconds"]);
    assert_eq!(stage(&pair.shadow), Vec::<String>::new(), "the stage is gone");
    pour(&mut client(&pair), BUSY, 0..10, &AtomicU64::new(0));
    pair.finish();
}

#[test]
fn a_resync_goes_on_after_either_side_was_killed_at_any_moment() {
    let mut pair = left_behind(128 * MIB);
    let mut random = Random(5);
    let rounds = if long() { 200 } else { 12 };
    let mut interrupted = 0;
    for round in 0..rounds {
        pair.shadow.start();
        // From before the first handshake to after the end.
        std::thread::sleep(Duration::from_micros(random.below(400_000)));
        let state = pair.shadow.status()["state"].clone();
        interrupted += u64::from(state == "Resyncing");
        if random.below(3) == 0 {
            pair.primary.kill();
            pair.primary.start();
            pair.primary.wait_attached();
        }
        pair.shadow.kill();
        let from = 10_000 + round * 10;
        pour(&mut client(&pair), BUSY, from..from + random.below(8), &AtomicU64::new(0));
        if state == "UpToDate" {
            pair.shadow.start();
            wait_current(&pair);
            leave_behind(&mut pair, 100 + round);
        }
    }
    eprintln!("{interrupted} of {rounds} kills were in the middle");
    pair.shadow.start();
    wait_current(&pair);
    pair.finish();
}

#[test]
fn a_promotion_in_the_middle_of_a_resync_gives_the_old_image() {
    let mut pair = left_behind(128 * MIB);
    let old = pair.shadow.place.path().join("old");
    std::fs::copy(pair.shadow.backing("data"), &old).unwrap();
    let at = pair.shadow.place.run(&["status", "g", "--json"]).json()["applied_lsn"].clone();
    // The moment is sought: a resync may be over before it is looked at.
    for round in 0.. {
        pair.shadow.start();
        let state = until("it is being resynced, or was", || {
            let state = pair.shadow.status()["state"].clone();
            (state == "Resyncing" || state == "UpToDate").then_some(state)
        });
        pair.primary.kill();
        let s = pair.shadow.status();
        if s["reason"].as_str().is_some_and(|r| r.contains("the image is the old one")) {
            assert_eq!(s["state"], "Resyncing");
            break;
        }
        assert!(round < 30, "never in the middle, last {state}");
        pair.primary.start();
        pair.primary.wait_attached();
        wait_current(&pair);
        leave_behind(&mut pair, round + 1);
        std::fs::copy(pair.shadow.backing("data"), &old).unwrap();
    }
    assert_eq!(first_difference(&pair.shadow.backing("data"), &old), None, "nothing is written over it");
    pair.promote();
    until("it serves", || {
        let s = pair.shadow.status();
        (s["role"] == "primary" && s["state"] == "UpToDate").then_some(())
    });
    assert_eq!(first_difference(&pair.shadow.backing("data"), &old), None, "the old image, from LSN {at}");
    assert_eq!(stage(&pair.shadow), Vec::<String>::new(), "the stage is gone");
}

/// Works on until the journal can't feed the shadow any more, nor anything of what it fed; the last number committed.
fn outgrow(p: &Production, from: u64) -> u64 {
    const ROWS: u64 = 3000;
    let server = p.server.as_ref().unwrap();
    let noise = (0..8).map(|i| format!("md5((n * 8 + {i})::text)")).collect::<Vec<_>>().join("||");
    let (mut last, mut behind) = (from, 0);
    while behind == 0 || last < behind + (behind - from) {
        let next = last + ROWS;
        server.query(&format!(
            "insert into log select n, {noise} from generate_series({}, {next}) n",
            last + 1
        ));
        last = next;
        if behind == 0 && p.pair.primary.status()["peers"][0]["state"] == "Resync" {
            behind = last;
        }
        assert!(last < from + 600_000, "the journal holds everything");
    }
    last
}

/// Kills the primary under its database.
fn lose_primary(p: &mut Production) {
    p.pair.primary.kill();
    p.server = None;
    umount2(&p.dir, MntFlags::MNT_DETACH).unwrap();
}

#[test]
fn a_database_recovers_after_a_promotion_in_the_middle_of_a_resync() {
    let volumes = vec![("data", 1024 * MIB)];
    let setup = Setup { volumes, journal: "32M", behind: true, ..Setup::default() };
    let Some(mut p) = Production::start(&setup) else { return };
    let mut last = 1000;
    p.server
        .as_ref()
        .unwrap()
        .query("insert into log select n, md5(n::text) from generate_series(1, 1000) n");
    let held = loop {
        // What the shadow has when it is stopped, it has; what comes after that, it misses.
        wait_current(&p.pair);
        p.pair.settle();
        let held = last;
        p.pair.shadow.stop();
        last = outgrow(&p, held);
        p.pair.shadow.start();
        let state = until("it is being resynced, or was", || {
            let state = p.pair.shadow.status()["state"].clone();
            (state == "Resyncing" || state == "UpToDate").then_some(state)
        });
        lose_primary(&mut p);
        let s = p.pair.shadow.status();
        if s["reason"].as_str().is_some_and(|r| r.contains("the image is the old one")) {
            break held;
        }

        assert!(last < 1_200_000, "never in the middle, last {state}");
        p.pair.primary.start();
        p.pair.primary.wait_attached();
        let device = p.pair.primary.status()["volumes"][0]["device"].as_str().unwrap().to_owned();
        p.dir = mounted(p.pair.primary.place.path(), &device, "ext4");
        p.server = Some(Postgres::start(&p.dir.join("cluster"), p.sockets.path()));
    };
    p.pair.promote();
    let device = p.pair.shadow.attach("fuse").remove(0);
    let dir = mounted(p.pair.shadow.place.path(), &device, "ext4");
    let server = Postgres::start(&dir.join("cluster"), p.sockets.path());
    assert_eq!(
        server.query("select count(*), max(n) from log"),
        format!("{held}|{held}"),
        "of {last} committed"
    );
    let sockets = p.sockets.path().to_str().unwrap();
    let checked = as_postgres("pg_amcheck")
        .args(["-h", sockets, "-d", "postgres", "--install-missing", "--heapallindexed"])
        .output()
        .unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stdout));
    eprintln!("{held} of {last} rows, as of before the resync");
    drop(server);
    umount2(&dir, MntFlags::empty()).unwrap();
    pair::client("e2fsck", &["-fn", &device]);
}

#[test]
fn the_first_copy_of_a_volume_that_holds_something_is_whole_or_not_usable() {
    let setup = Setup { volumes: vec![("data", 1 << 30)], filled: 300 * MIB, ..Setup::default() };
    let mut pair = Pair::prepare(&setup);
    pair.primary.start();
    pair.shadow.start();
    pair.primary.attach("nbd-socket");
    let mut client = client(&pair);
    let mut seen = 0;
    let mut number = 0;
    until("the copy is whole", || {
        client.write(number * 7919 * 4096 % (1 << 30) / 4096 * 4096, &noise(number)[..4096]).unwrap();
        number += 1;
        let s = pair.shadow.status();
        if s["state"] == "Inconsistent" && seen < 3 {
            seen += 1;
            let refused = pair.shadow.place.run(&["promote", "g", "--i-fenced-the-old-primary", "--yes"]);
            assert!(refused.code != 0, "{}", refused.stdout);
        }
        (s["state"] == "UpToDate").then_some(())
    });
    eprintln!("seen as inconsistent {seen} times, {number} writes meanwhile");
    let told = pair.shadow.status()["refresh"].clone();
    assert_eq!((&told["cause"], &told["state"]), (&json!("first copy"), &json!("Done")), "{told}");
    wait_current(&pair);
    pair.finish();
    let blocks = std::fs::metadata(pair.shadow.backing("data")).unwrap().blocks() * 512;
    assert!(blocks < 400 * MIB, "zeroes were written: {blocks} bytes in use");
}

/// A small file system, gone with it.
pub struct Small(PathBuf);

impl Small {
    /// Gives a shadow that is stopped a journal on one: its stage lies there, too.
    pub fn under(shadow: &Node, size: &str) -> Small {
        let small = Small(shadow.place.path().join("small"));
        std::fs::create_dir(&small.0).unwrap();
        small.size(size, MsFlags::empty());
        std::fs::copy(shadow.place.config().join("state/g/journal"), small.0.join("journal")).unwrap();
        let dir = format!("[journal]\ndir = {:?}", small.0);
        shadow.configure(|t| t.replace("[journal]", &dir).replace("direct = true", "direct = false"));
        small
    }

    fn size(&self, size: &str, flags: MsFlags) {
        mount(Some("volrep-test"), &self.0, Some("tmpfs"), flags, Some(size)).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A shadow whose resync has stopped, because there was no room for the new image; where the old one was copied.
fn full_stage() -> Option<(Pair, Small, PathBuf)> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: a small tmpfs can only be mounted by root");
        return None;
    }
    let mut pair = left_behind(128 * MIB);
    let old = pair.shadow.place.path().join("old");
    std::fs::copy(pair.shadow.backing("data"), &old).unwrap();
    // The journal, and so the stage, on a disk that has no room for what differs.
    let small = Small::under(&pair.shadow, "size=48m");
    pair.shadow.start();
    let reason = until("the resync stops", || {
        let s = pair.shadow.status();
        (s["state"] == "Outdated")
            .then(|| s["reason"].as_str().unwrap_or_default().to_owned())
            .filter(|r| r.contains("the resync stopped"))
    });
    assert!(reason.contains("No space left"), "{reason}");
    assert!(pair.shadow.told().contains("volrep refresh g"), "{}", pair.shadow.told());
    assert_eq!(first_difference(&pair.shadow.backing("data"), &old), None, "the old image stays");
    Some((pair, small, old))
}

#[test]
fn a_full_stage_stops_the_resync_and_leaves_the_old_image() {
    let Some((mut pair, small, _)) = full_stage() else { return };
    small.size("size=300m", MsFlags::MS_REMOUNT);
    let wish = json!({
        "verb": "refresh", "peer": null, "quick": false, "verify": false, "rate": 0, "in_place": false
    });
    let reply = ask(&pair.shadow, wish);
    assert_eq!(reply["reply"], "done", "{reply}");
    wait_current(&pair);
    pour(&mut client(&pair), BUSY, 0..3, &AtomicU64::new(0));
    pair.finish();
}

#[test]
fn a_resync_in_place_needs_no_room_and_is_asked_for_by_name() {
    let Some((mut pair, _small, old)) = full_stage() else { return };
    let refused = pair.shadow.place.run(&["refresh", "g", "--in-place"]);
    refused.expect(2, &["the shadow can't be promoted", "--yes"]);
    assert_eq!(first_difference(&pair.shadow.backing("data"), &old), None, "nothing has begun");
    let done = pair.shadow.place.run(&["refresh", "g", "--in-place", "--yes"]);
    done.expect(0, &["the shadow can't be promoted"]);
    let told = pair.shadow.status();
    assert_eq!(told["state"], "UpToDate", "{told}");
    assert_eq!(stage(&pair.shadow), Vec::<String>::new(), "no stage was made");
    pair.finish();
}

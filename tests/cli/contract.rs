//! What every verb owes: help, usage errors, no such group, the JSON form of an error.

use super::{Daemon, Place, place::until, volrep};

/// Each verb, and a command line that is complete but names a group that does not exist.
const VERBS: [(&str, &[&str], &[&str]); 21] = [
    (
        "init",
        &["init", "g", "--volume", "a=/x"],
        &[
            "--volume",
            "--sync",
            "--node",
            "--listen",
            "--journal-size",
            "--journal-dir",
            "--cache-size",
            "--buffered",
            "--dry-run",
        ],
    ),
    ("token", &["token", "g"], &["--peer", "--address"]),
    (
        "join",
        &["join", "t", "--volume", "a=/x"],
        &[
            "--volume",
            "--from",
            "--group",
            "--yes",
            "--node",
            "--listen",
            "--journal-size",
            "--journal-dir",
            "--cache-size",
            "--buffered",
            "--dry-run",
        ],
    ),
    ("serve", &["serve", "g"], &["--attach", "--no-attach", "--workers", "--dry-run"]),
    ("attach", &["attach", "g"], &["--device"]),
    ("detach", &["detach", "g"], &["--dry-run"]),
    ("status", &["status", "g"], &["--watch"]),
    ("history", &["history", "g"], &[]),
    ("mark", &["mark", "g", "before batch"], &[]),
    (
        "promote",
        &["promote", "g"],
        &["--at", "--dry-run", "--i-fenced-the-old-primary", "--accept-outdated", "--yes"],
    ),
    (
        "outdate",
        &["outdate", "g", "--member", "db2"],
        &["--member", "--dry-run", "--i-fenced-the-member", "--yes"],
    ),
    ("lease", &["lease", "g", "--for", "20s"], &["--for", "--none"]),
    ("switchover", &["switchover", "g", "--to", "db2"], &["--to", "--dry-run", "--yes"]),
    (
        "refresh",
        &["refresh", "g"],
        &[
            "--peer",
            "--quick",
            "--rate",
            "--suspend-delay",
            "--no-wait",
            "--stop",
            "--dry-run",
            "--in-place",
            "--yes",
        ],
    ),
    ("verify", &["verify", "g"], &["--peer", "--quick", "--rate", "--suspend-delay", "--no-wait", "--stop"]),
    ("rejoin", &["rejoin", "g"], &["--dry-run", "--yes"]),
    ("resolve", &["resolve", "g", "--keep", "db2"], &["--keep", "--dry-run", "--yes"]),
    ("salvage", &["salvage", "g"], &[]),
    ("view", &["view", "g", "--read-only"], &["--read-only", "--scratch", "--close", "--at", "--device"]),
    ("drill", &["drill", "g", "--run", "/bin/true"], &["--run", "--timeout", "--device"]),
    (
        "bench",
        &["bench", "g", "--profile", "mixed"],
        &[
            "--profile",
            "--seconds",
            "--size",
            "--volume",
            "--dir",
            "--shadow",
            "--sync",
            "--keep",
            "--dry-run",
        ],
    ),
];
const SHARED: [&str; 6] = ["--json", "--config", "--state-dir", "--run-dir", "--shm-dir", "--dev-dir"];

#[test]
fn help_names_every_flag() {
    for (verb, _, flags) in VERBS {
        let ended = volrep(&[verb, "--help"]);
        ended.expect(0, &[]);
        for flag in flags.iter().chain(&SHARED) {
            assert!(ended.stdout.contains(flag), "{verb} --help does not name {flag}");
        }
        // A flag that the list above does not know would go untested.
        let words = ended.stdout.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        for word in words.filter(|w| w.len() > 2 && w.starts_with("--")) {
            let known = flags.contains(&word) || SHARED.contains(&word) || word == "--help";
            assert!(known, "{verb} --help names {word}, which is not tested");
        }
    }
    let ended = volrep(&["--help"]);
    VERBS.iter().for_each(|(verb, ..)| assert!(ended.stdout.contains(verb)));
    assert!(ended.stdout.contains("15 fencing unconfirmed"));
}

#[test]
fn an_unknown_flag_is_usage() {
    for (verb, complete, _) in VERBS {
        let mut args = complete.to_vec();
        args.push("--frobnicate");
        volrep(&args).expect(2, &["--frobnicate"]);
        volrep(&[verb, "--json", "--frobnicate"]).expect(2, &[]);
        let error = volrep(&[verb, "--json", "--frobnicate"]).json();
        assert_eq!(error["error"]["exit"], 2);
        assert_eq!(error["error"]["kind"], "usage");
    }
    volrep::<&str>(&[]).expect(2, &[]);
    volrep(&["frobnicate"]).expect(2, &["frobnicate"]);
}

#[test]
fn no_such_group_is_told_with_what_there_is() {
    let place = Place::new();
    place.init(&["data=disk:1M"]).expect(0, &[]);
    for (_, complete, _) in VERBS.iter().filter(|(verb, ..)| !["init", "join"].contains(verb)) {
        let of = |group: &'static str| [&[complete[0], group], &complete[2..]].concat();
        place.run(&of("gg")).expect(10, &["no group `gg`", "did you mean `g`?"]);
        let ended = place.run(&[&of("nowhere")[..], &["--json"]].concat());
        ended.expect(10, &["here are: g"]);
        let error = ended.json();
        assert_eq!(error["schema_version"], 1);
        assert_eq!(error["error"]["exit"], 10);
        assert_eq!(error["error"]["kind"], "no_such_group");
        assert!(error["error"]["next"].as_str().unwrap().contains("here are: g"));
    }
}

#[test]
fn a_wrong_configuration_names_the_key() {
    let place = Place::new();
    place.init(&["data=disk:1M"]).expect(0, &[]);
    let path = place.config().join("g.toml");
    let good = std::fs::read_to_string(&path).unwrap();
    for (from, to, words) in [
        ("compression =", "compresion =", &["compresion", "did you mean `compression`?", "line "][..]),
        ("size = \"64M\"", "size = \"64 apples\"", &["64 apples", "not a size"]),
        ("segments = 4", "segments = 1", &["journal.segments"]),
        ("segments = 4", "segments = 5", &["does not belong to this configuration", "4 segments"]),
        ("on_full", "[", &["line "]),
    ] {
        assert!(good.contains(from), "{from}");
        std::fs::write(&path, good.replacen(from, to, 1)).unwrap();
        let ended = place.run(&["serve", "g", "--dry-run"]);
        assert_ne!(ended.code, 0);
        ended.expect(ended.code, words);
        assert_ne!(place.run(&["status", "g"]).code, 0);
    }
    std::fs::write(&path, good).unwrap();
    place.run(&["serve", "g", "--dry-run"]).expect(0, &[]);
}

#[test]
fn the_environment_names_places_and_a_flag_wins() {
    let place = Place::new();
    let at = |name: &str| place.path().join(name);
    let mut command = super::program();
    command
        .env("VOLREP_CONFIG_DIR", at("a"))
        .env("VOLREP_STATE_DIR", at("b"))
        .args(["--state-dir"])
        .arg(at("c"));
    command
        .args(["init", "g", "--node", "n", "--journal-size", "8M", "--volume", "d=disk:1M"])
        .current_dir(place.path());
    super::Ended::of(command.output().unwrap()).expect(0, &[]);
    assert!(at("a/g.toml").exists() && at("c/g/superblock").exists() && !at("b").exists());
}

#[test]
fn status_of_a_stopped_group() {
    let place = Place::new();
    let none = place.run(&["status"]);
    assert!(none.expect(0, &[]).stdout.starts_with("no groups in "), "{}", none.stdout);
    place.init(&["data=disk:1M", "wal=disk2:1M"]).expect(0, &[]);
    let ended = place.run(&["status", "g"]);
    ended.expect(0, &[]);
    assert!(ended.stdout.ends_with("action: start it: volrep serve g\n"), "{}", ended.stdout);
    let one = place.run(&["status", "g", "--json"]).expect(0, &[]).json();
    assert_eq!(
        (&one["state"], &one["role"], &one["term"]),
        (&"Stopped".into(), &"primary".into(), &1.into())
    );
    assert_eq!(one["volumes"][1]["name"], "wal");
    let all = place.run(&["status", "--json"]).expect(0, &[]).json();
    assert_eq!(all["groups"][0], one);
}

#[test]
fn the_history_needs_no_daemon() {
    let place = Place::new();
    place.init(&["data=disk:1M"]).expect(0, &[]);
    assert_eq!(place.run(&["history", "g"]).expect(0, &[]).stdout, "nothing has happened here yet\n");
    assert_eq!(place.run(&["history", "g", "--json"]).json()["events"].as_array().unwrap().len(), 0);
    let daemon = Daemon::start(&place);
    let serves = |s: &serde_json::Value| s["state"] == "UpToDate";
    until("it serves", || serves(&place.run(&["status", "g", "--json"]).json()).then_some(()));
    let mark = place.run(&["mark", "g", "before batch", "--json"]).expect(0, &[]).json();
    assert_eq!(mark["mark"], "before batch");
    daemon.stop();
    let history = place.run(&["history", "g", "--json"]).expect(0, &[]).json();
    let events = history["events"].as_array().unwrap();
    let kinds: Vec<_> = events.iter().map(|e| e["event"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["started", "generation", "mark"]);
    let (told, kept) = (&mark, &events[2]["mark"]);
    assert_eq!((&kept["text"], &kept["lsn"], &kept["hash"]), (&told["mark"], &told["lsn"], &told["hash"]));
    assert_eq!(events[2]["given_up"], false);
    let text = place.run(&["history", "g"]).expect(0, &[]).stdout.clone();
    assert!(text.lines().count() == 3 && text.contains("before batch"), "{text}");
}

#[test]
fn verbs_that_need_the_daemon_say_so() {
    let place = Place::new();
    place.init(&["data=disk:1M"]).expect(0, &[]);
    place.run(&["mark", "g", "before batch"]).expect(1, &["not running", "volrep serve g"]);
    place.run(&["mark", "g", "a\nb"]).expect(2, &["one visible line"]);
    place.run(&["mark", "g", "12:00"]).expect(2, &["is an LSN or a time"]);
    let verbs = ["attach", "detach", "promote", "refresh", "verify", "rejoin", "resolve", "view", "drill"];
    for (_, complete, _) in VERBS.iter().filter(|(verb, ..)| verbs.contains(verb)) {
        place.run(complete).expect(1, &["not running", "volrep serve g"]);
    }
    place.run(&["view", "g", "--close"]).expect(1, &["not running", "volrep serve g"]);
    place.run(&["resolve", "g"]).expect(2, &["--keep"]);
}

#[test]
fn damage_to_the_superblock_is_told() {
    let place = Place::new();
    place.init(&["data=disk:1M"]).expect(0, &[]);
    let path = place.config().join("state/g/superblock");
    let good = std::fs::read(&path).unwrap();
    let mut one = good.clone();
    one[100] ^= 1;
    std::fs::write(&path, &one).unwrap();
    place.run(&["status", "g"]).expect(0, &[]);
    one[(64 << 10) + 100] ^= 1;
    std::fs::write(&path, &one).unwrap();
    place.run(&["status", "g"]).expect(1, &["superblock is damaged", "checksum", "another node"]);
    std::fs::write(&path, &good[..1000]).unwrap();
    place.run(&["serve", "g"]).expect(1, &["superblock"]);
    std::fs::remove_file(&path).unwrap();
    place.run(&["serve", "g"]).expect(1, &["is not there", "VOLREP_"]);
}

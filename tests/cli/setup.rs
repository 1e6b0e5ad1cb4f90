//! `init`, `token`, `join`: what they create, and what they refuse without leaving anything behind.

use super::{Ended, Place};
use std::fs::File;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use volrep::format::message::Role;
use volrep::format::superblock::{SLOT, Superblock};

fn superblock(place: &Place, group: &str) -> Superblock {
    let bytes = std::fs::read(place.config().join("state").join(group).join("superblock")).unwrap();
    let (slot, s) = Superblock::choose([&bytes[..SLOT], &bytes[SLOT..]]).unwrap();
    assert_eq!(slot, 1);
    s
}

#[test]
fn init_creates_a_primary() {
    let place = Place::new();
    place.file("old", &[7; 8192]);
    let ended = place.init(&["data=new:1M", "wal=old"]);
    ended.expect(0, &[]);
    assert!(ended.stdout.contains("action: start it: volrep serve g"), "{}", ended.stdout);
    let s = superblock(&place, "g");
    assert_eq!((s.role, s.blank, s.clean, s.consistent), (Role::Primary, false, true, true));
    assert_eq!((s.term.counter, s.term.node), (1, s.node));
    assert_eq!(
        s.volumes.iter().map(|v| (v.name.as_str(), v.size)).collect::<Vec<_>>(),
        [("data", 1 << 20), ("wal", 8192)]
    );
    let journal = std::fs::metadata(place.config().join("state/g/journal")).unwrap();
    assert_eq!(journal.len(), s.geometry.len());
    assert!(journal.blocks() * 512 >= journal.len(), "the journal is written, not sparse");
    let key = std::fs::metadata(place.config().join("g.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        std::fs::metadata(place.config().join("state/g")).unwrap().permissions().mode() & 0o777,
        0o700
    );
    assert_eq!(std::fs::read(place.path().join("old")).unwrap(), [7; 8192], "what was there is kept");
}

#[test]
fn only_what_is_all_zeroes_is_blank() {
    let place = Place::new();
    place.file("zeroes", &[0; 3 << 20]);
    place.init(&["data=new:1M", "wal=zeroes"]).expect(0, &[]);
    assert!(superblock(&place, "g").blank);
    let mut bytes = vec![0; 3 << 20];
    bytes[(3 << 20) - 1] = 1;
    place.file("nearly", &bytes);
    let ended =
        place.run(&["init", "h", "--node", "n", "--journal-size", "8M", "--volume", "d=nearly", "--json"]);
    let document = ended.expect(0, &[]).json();
    assert!(!superblock(&place, "h").blank);
    assert_eq!((&document["blank"], &document["role"]), (&false.into(), &"primary".into()));
    assert_eq!(document["listen"], "0.0.0.0:7655", "the first group has 7654");
}

#[test]
fn init_refuses_and_leaves_nothing() {
    let place = Place::new();
    place.file("odd", &[0; 1000]);
    place.file("empty", &[]);
    place.file("full", &[1; 4096]);
    std::fs::hard_link(place.path().join("full"), place.path().join("link")).unwrap();
    std::fs::create_dir(place.path().join("dir")).unwrap();
    let held = File::open(place.file("held", &[0; 4096])).unwrap();
    let _held = nix::fcntl::Flock::lock(held, nix::fcntl::FlockArg::LockShared).unwrap();
    let before = place.tree();
    let cases: [(&[&str], i32, &[&str]); 11] = [
        (&["data=missing"], 1, &["missing does not exist", "data=missing:SIZE"]),
        (&["data=odd"], 1, &["1000 bytes", "make it 4096 bytes"]),
        (&["data=empty"], 1, &["0 bytes"]),
        (&["data=new:1000"], 1, &["1000 bytes"]),
        (&["data=full:8K"], 13, &["is there already", "4096 bytes"]),
        (&["a=full", "b=link"], 2, &["are the same file"]),
        (&["a=new:1M", "b=./new:1M"], 2, &["are the same file"]),
        (&["a=full", "a=new:1M"], 2, &["two volumes are called `a`"]),
        (&["a=dir"], 2, &["neither a file nor a block device"]),
        (&["a=held"], 11, &["in use", "locked"]),
        (&["a=none/new:1M"], 1, &["none"]),
    ];
    for (volumes, code, words) in cases {
        place.init(volumes).expect(code, words);
        assert_eq!(place.tree(), before, "{volumes:?} left something behind");
    }
    for (flags, words) in [
        (["--journal-size", "lots"], "not a size"),
        (["--listen", "db1"], "ADDRESS:PORT"),
        (["--cache-size", "1K"], "cache.size"),
        (["--sync", "db2=nowhere"], "HOST:PORT"),
        (["--sync", "db1"], "two nodes"),
        (["--node", "a b"], "can't be a name"),
    ] {
        let mut args = vec!["init", "g", "--volume", "data=new:1M"];
        if flags[0] != "--node" {
            args.extend(["--node", "db1"]);
        }
        args.extend(flags);
        place.run(&args).expect(2, &[words]);
        assert_eq!(place.tree(), before, "{flags:?} left something behind");
    }
}

#[test]
fn init_refuses_what_another_group_has() {
    let place = Place::new();
    place.init(&["data=disk:1M"]).expect(0, &[]);
    place.init(&["data=other:1M"]).expect(11, &["set up here already"]);
    let again =
        |name| place.run(&["init", name, "--node", "n", "--journal-size", "8M", "--volume", "d=disk"]);
    again("h").expect(11, &["is volume `data` of the group `g`"]);
    std::fs::remove_file(place.config().join("g.toml")).unwrap();
    again("g").expect(13, &["left its state behind"]);
}

#[test]
fn a_dry_run_creates_nothing() {
    let place = Place::new();
    let ended = place.run(&["init", "g", "--node", "n", "--volume", "d=disk:1M", "--dry-run"]);
    assert!(ended.expect(0, &[]).stdout.contains("nothing was created"));
    assert!(place.tree().is_empty(), "{:?}", place.tree());
}

fn token(place: &Place) -> String {
    let ended = place.run(&["token", "g"]);
    ended.expect(0, &["like a password"]);
    assert_eq!(ended.stdout.lines().count(), 1);
    ended.stdout.trim().to_owned()
}

fn join(place: &Place, token: &str, more: &[&str]) -> Ended {
    let mut args = vec!["join", token, "--node", "db2", "--listen", "none", "--journal-size", "8M"];
    args.extend(more);
    place.run(&args)
}

#[test]
fn join_creates_a_shadow() {
    let (primary, shadow) = (Place::new(), Place::new());
    primary.init(&["data=disk:1M", "wal=disk2:2M"]).expect(0, &[]);
    let token = token(&primary);
    join(&shadow, &token, &["--volume", "wal=w", "--volume", "data=d"]).expect(0, &[]);
    let (p, s) = (superblock(&primary, "g"), superblock(&shadow, "g"));
    assert_eq!((s.group, &s.volumes), (p.group, &p.volumes));
    assert_ne!(s.node, p.node);
    assert_eq!((s.role, s.blank, s.consistent, s.term.counter), (Role::Shadow, true, true, 0));
    assert_eq!(s.checkpoint, p.checkpoint);
    let read = |place: &Place, name: &str| std::fs::read_to_string(place.config().join(name)).unwrap();
    assert_eq!(read(&primary, "g.key"), read(&shadow, "g.key"));
    assert!(read(&shadow, "g.toml").contains("address = \"127.0.0.1:7654\""));
    shadow.run(&["serve", "g", "--dry-run"]).expect(0, &[]);
    // A shadow of the shadow; this one has to be reached for that.
    shadow.run(&["token", "g"]).expect(1, &["listens nowhere"]);
    let near = shadow.run(&["token", "g", "--address", "db2:7655", "--json"]);
    let near = near.expect(0, &["db2 is a shadow", "through it"]).json();
    assert_eq!((near["cascade"].as_bool(), near["primary"].as_str()), (Some(true), Some("db2")));
    let far = Place::new();
    let words = [
        "--node",
        "db3",
        "--listen",
        "none",
        "--journal-size",
        "8M",
        "--volume",
        "wal=w",
        "--volume",
        "data=d",
    ];
    far.run(&[&["join", near["token"].as_str().unwrap()], &words[..]].concat()).expect(0, &[]);
    let config = read(&far, "g.toml");
    assert!(
        config.contains("name = \"db2\"\naddress = \"db2:7655\"") && config.contains("\ncascade = true\n")
    );
    assert!(!read(&shadow, "g.toml").contains("\ncascade = true\n"));
}

#[test]
fn join_refuses_and_leaves_nothing() {
    let (primary, shadow) = (Place::new(), Place::new());
    primary.init(&["data=disk:1M"]).expect(0, &[]);
    let token = token(&primary);
    shadow.file("small", &[0; 4096]);
    shadow.file("used", &[3; 1 << 20]);
    let own = format!("data={}", primary.path().join("disk").display());
    let before = shadow.tree();
    let cases: [(&[&str], i32, &[&str]); 8] = [
        (&["--volume", "data=small"], 13, &["4096 bytes", "1048576 bytes"]),
        (&["--volume", "data=d:2M"], 13, &["make it exactly 1048576 bytes"]),
        (&["--volume", "data=used"], 13, &["is not empty", "--yes"]),
        (&["--volume", &own], 13, &["primary's own volume `data`"]),
        (&["--volume", "other=d"], 2, &["no volume `other`", "--volume data=PATH:1M"]),
        (&["--volume", "data=d", "--volume", "data=e"], 2, &["to be given once"]),
        (&["--volume", "data=d", "--from", "nowhere"], 2, &["HOST:PORT"]),
        (&["--volume", "data=d", "--dry-run"], 0, &[]),
    ];
    for (more, code, words) in cases {
        join(&shadow, &token, more).expect(code, words);
        assert_eq!(shadow.tree(), before, "{more:?} left something behind");
    }
    let same = ["join", &token, "--node", "db1", "--volume", "data=d"];
    shadow.run(&same).expect(2, &["as the primary is", "--node"]);
    primary
        .run(&["join", &token, "--node", "db2", "--volume", "data=d"])
        .expect(11, &["set up here already"]);
    assert_eq!(shadow.tree(), before);
    join(&shadow, &token, &["--volume", "data=used", "--yes"]).expect(0, &["is not empty"]);
    let s = superblock(&shadow, "g");
    assert_eq!((s.blank, s.consistent), (false, false));
}

#[test]
fn a_token_that_was_changed_is_refused() {
    let (primary, shadow) = (Place::new(), Place::new());
    primary.init(&["data=disk:1M"]).expect(0, &[]);
    let good = token(&primary);
    let changed = |at: usize| {
        let mut bytes = good.clone().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        String::from_utf8(bytes).unwrap()
    };
    let bad = [
        changed(0),
        changed(good.len() / 2),
        changed(good.len() - 3),
        good[..good.len() - 4].to_owned(),
        "x".into(),
        "".into(),
    ];
    for bad in bad {
        join(&shadow, &bad, &["--volume", "data=d"]).expect(2, &["token is not usable", "whole line"]);
    }
    assert!(shadow.tree().is_empty());
    let mut child =
        shadow.command(&["join", "-", "--node", "db2", "--volume", "data=d", "--journal-size", "8M"]);
    let mut child =
        child.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), format!("{good}\n").as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "a token from stdin");
}

#[test]
fn the_key_is_kept_from_others() {
    let place = Place::new();
    place.init(&["data=disk:1M"]).expect(0, &[]);
    let key = place.config().join("g.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    place.run(&["token", "g"]).expect(1, &["can be read by others", "chmod 600"]);
    place.run(&["serve", "g", "--dry-run"]).expect(1, &["can be read by others"]);
}

#[test]
fn a_token_without_an_address_can_be_given_one() {
    let place = Place::new();
    place
        .run(&[
            "init",
            "g",
            "--node",
            "n",
            "--listen",
            "none",
            "--journal-size",
            "8M",
            "--volume",
            "d=disk:1M",
        ])
        .expect(0, &[]);
    place.run(&["token", "g"]).expect(1, &["listens nowhere"]);
    let document = place.run(&["token", "g", "--address", "db1:7654", "--json"]).expect(0, &[]).json();
    assert_eq!(document["address"], "db1:7654");
    assert!(document["token"].as_str().unwrap().len() > 100);
}

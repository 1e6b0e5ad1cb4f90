//! `volrep salvage`: files that are whole, cut short, damaged, unfinished, or another group's.

use super::Place;
use serde_json::{Value, json};
use std::fs;
use std::path::PathBuf;
use volrep::disk::aligned;
use volrep::format::record::{
    Compressor, Content, EncodeJob, Kind, Record, Stamp, encode, encode_note, flags, origin, room, seal,
};
use volrep::format::salvage::{Head, Trailer};
use volrep::format::superblock::{SLOT, Superblock};
use volrep::units::{Address, Extent, Generation, GroupId, HistoryPoint, Lsn, NodeId, Term};

const MIB: u64 = 1 << 20;
const TIME: u64 = 1_714_557_600_000_000_000;

/// A group with two volumes, and the directory of its salvage files.
fn group() -> (Place, Superblock, PathBuf) {
    let place = Place::new();
    place.init(&["data=disk:1M", "wal=disk2:2M"]).expect(0, &[]);
    let slots = fs::read(place.config().join("state/g/superblock")).unwrap();
    let (_, sb) = Superblock::choose([&slots[..SLOT], &slots[SLOT..2 * SLOT]]).unwrap();
    let dir = place.config().join("state/g/salvage");
    fs::create_dir(&dir).unwrap();
    (place, sb, dir)
}

fn extent(volume: u8, offset: u64, len: u64) -> Extent {
    Extent::new(Address::new(volume, offset).unwrap(), len).unwrap()
}

fn record(group: GroupId, before: HistoryPoint, extents: &[(Extent, Option<u8>)]) -> Record {
    let generation = Generation { term: Term { counter: 1, node: NodeId(1) }, start: 1 };
    let stamp = Stamp {
        group,
        generation,
        lsn: before.lsn.next(),
        prev: before.hash,
        time: TIME + before.lsn.0 * 1_000_000,
        flags: if extents.is_empty() { flags::OPENS } else { 0 },
        last_write: before.lsn.0,
        durable: before.lsn,
        kind: if extents.is_empty() { Kind::SyncSet } else { Kind::Writes },
    };
    if extents.is_empty() {
        return seal(encode_note(&[]), stamp);
    }
    let content = |d: &Option<u8>| if d.is_some() { Content::Data } else { Content::Zeroes };
    let mut buf = aligned(4 * MIB as usize);
    buf.resize(room(extents.len()), 0);
    for (e, data) in extents {
        if let Some(fill) = data {
            buf.resize(buf.len() + e.len() as usize, *fill);
        }
    }
    let extents = extents.iter().map(|(e, d)| (*e, content(d))).collect();
    seal(encode(EncodeJob { extents, buf, level: Some(1) }, &mut Compressor::default()), stamp)
}

/// What the bytes of a sample say: a run's first record, writes, a write over a write, zeroes over a write.
fn sample(sb: &Superblock) -> Vec<u8> {
    let fork = HistoryPoint { lsn: Lsn(41), hash: origin(sb.group) };
    let mut at = fork;
    let mut records = Vec::new();
    for extents in [
        &[][..],
        &[(extent(0, 4096, 8192), Some(1)), (extent(1, 512, 512), Some(2))],
        &[(extent(0, 8192, 512), Some(3)), (extent(0, MIB - 4096, 4096), Some(4))],
        &[(extent(0, 4096, 4096), None), (extent(1, MIB, 512), None)],
    ] {
        let record = record(sb.group, at, extents);
        at = record.point();
        records.extend_from_slice(&record.wire());
    }
    let head = Head {
        group: sb.group,
        node: sb.node,
        name: "db1".into(),
        term: Term { counter: 1, node: sb.node },
        fork: Some(fork),
        last: at,
        time: TIME,
        volumes: sb.volumes.clone(),
    };
    let trailer = Trailer { records: 4, last: at.lsn };
    [head.encode(), records, trailer.encode()].concat()
}

fn list(place: &Place) -> Value {
    let ended = place.run(&["salvage", "g", "list", "--json"]);
    ended.expect(0, &[]);
    ended.json()
}

#[test]
fn a_whole_file_is_listed_and_extracted() {
    let (place, sb, dir) = group();
    assert_eq!(list(&place)["files"], json!([]));
    assert!(place.run(&["salvage", "g"]).expect(0, &[]).stdout.contains("has given up nothing here"));
    let bytes = sample(&sb);
    fs::write(dir.join("lsn-42-45-00.salvage"), &bytes).unwrap();
    let told = list(&place)["files"][0].clone();
    for (key, value) in [
        ("file", json!("lsn-42-45-00.salvage")),
        ("state", json!("whole")),
        ("reason", Value::Null),
        ("bytes", json!(bytes.len())),
        ("records", json!(4)),
        ("first_lsn", json!(42)),
        ("last_lsn", json!(45)),
        ("fork_lsn", json!(41)),
        ("tail_lsn", json!(45)),
        ("node", json!("db1")),
        ("term", json!(1)),
        ("written", json!("2024-05-01T10:00:00.000Z")),
        ("volumes", json!([{"name": "data", "size": MIB}, {"name": "wal", "size": 2 * MIB}])),
    ] {
        assert_eq!(told[key], value, "{key} in {told}");
    }
    let text = place.run(&["salvage", "g", "list"]).expect(0, &[]).stdout.clone();
    for word in
        ["lsn-42-45-00.salvage  whole", "LSN 42 to 45, 4 records", "part after LSN 41", "db1", "wal 2.00 MiB"]
    {
        assert!(text.contains(word), "no `{word}` in {text}");
    }
    let done = place.run(&["salvage", "g", "extract", "lsn-42-45-00.salvage", "--to", "out", "--json"]);
    let done = done.expect(0, &[]).json();
    assert_eq!(
        (&done["state"], &done["records"], &done["first_lsn"]),
        (&json!("whole"), &json!(4), &json!(42))
    );
    assert_eq!(done["volumes"][0]["data_bytes"], json!(8192 + 512 + 4096));
    assert_eq!(done["volumes"][0]["zero_bytes"], json!(4096));
    let out = place.path().join("out");
    let mut expected = vec![0; MIB as usize];
    expected[8192..12288].fill(1);
    expected[8192..8704].fill(3);
    expected[MIB as usize - 4096..].fill(4);
    assert!(fs::read(out.join("data.img")).unwrap() == expected);
    let mut expected = vec![0; 2 * MIB as usize];
    expected[512..1024].fill(2);
    assert!(fs::read(out.join("wal.img")).unwrap() == expected);
    let map = fs::read_to_string(out.join("map.jsonl")).unwrap();
    let lines: Vec<Value> = map.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 6);
    assert_eq!(
        lines[2],
        json!({"lsn": 44, "time": "2024-05-01T10:00:00.043Z", "volume": "data", "offset": 8192, "length": 512, "content": "data"})
    );
    assert_eq!((&lines[5]["content"], &lines[5]["volume"]), (&json!("zeroes"), &json!("wal")));
    let help = place.run(&["salvage", "g", "extract", "--help"]).expect(0, &[]).stdout.clone();
    // The line in the help has the form that the lines have.
    let keys = |line: &str| {
        line.split(['{', ',']).filter_map(|f| f.split_once(':')).map(|f| f.0.to_owned()).collect::<Vec<_>>()
    };
    let shown = help.lines().find(|l| l.trim_start().starts_with('{')).unwrap();
    assert_eq!(keys(shown), keys(map.lines().next().unwrap()));
    assert!(help.contains("--partial"), "{help}");
}

#[test]
fn nothing_is_overwritten() {
    let (place, sb, dir) = group();
    fs::write(dir.join("a.salvage"), sample(&sb)).unwrap();
    fs::create_dir(place.path().join("out")).unwrap();
    place.file("out/wal.img", b"mine");
    let ended = place.run(&["salvage", "g", "extract", "a.salvage", "--to", "out"]);
    ended.expect(1, &["wal.img is there already", "empty directory"]);
    assert_eq!(fs::read(place.path().join("out/wal.img")).unwrap(), b"mine");
    assert_eq!(fs::read_dir(place.path().join("out")).unwrap().count(), 1, "what was begun is gone");
    let ended = place.run(&["salvage", "g", "extract", "b.salvage", "--to", "out2"]);
    ended.expect(1, &["no salvage file b.salvage", "volrep salvage g list"]);
}

#[test]
fn a_file_that_is_cut_or_changed_anywhere_is_refused_and_nothing_is_left() {
    let (place, sb, dir) = group();
    let good = sample(&sb);
    let path = dir.join("a.salvage");
    let extract =
        |more: &[&str]| place.run(&[&["salvage", "g", "extract", "a.salvage", "--to", "out"], more].concat());
    let is_empty = || fs::read_dir(place.path().join("out")).map_or(0, Iterator::count) == 0;
    // Every kind of place: the head, each record's header, table and payload, the end.
    for at in (0..good.len()).step_by(7).chain(good.len() - 60..good.len()) {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        assert_eq!(extract(&[]).code, 1, "a bit at {at}");
        fs::write(&path, &good[..at]).unwrap();
        let cut = extract(&[]);
        cut.expect(1, &["cut short"]);
        assert!(is_empty(), "{at}");
    }
    fs::write(&path, [&good[..], b"x"].concat()).unwrap();
    extract(&[]).expect(1, &["something follows its end"]);
    fs::write(&path, b"").unwrap();
    extract(&[]).expect(1, &["cut short", "within its head"]);
    assert_eq!(list(&place)["files"][0]["state"], "cut");
    fs::write(&path, [b"VSALVAGE\x01\x00\xff\xff\xff\xff", &good[14..]].concat()).unwrap();
    extract(&[]).expect(1, &["damaged"]);
    assert!(is_empty());
    // The end, and with it half a record, is gone: the records before it are right.
    fs::write(&path, &good[..good.len() - 60]).unwrap();
    extract(&[]).expect(1, &["last whole record is LSN 44", "--partial"]);
    let done = extract(&["--partial", "--json"]);
    done.expect(0, &["warning", "cut"]);
    let done = done.json();
    assert_eq!((&done["state"], &done["records"], &done["last_lsn"]), (&json!("cut"), &json!(3), &json!(44)));
    assert_eq!(fs::read_to_string(place.path().join("out/map.jsonl")).unwrap().lines().count(), 4);
}

#[test]
fn an_unfinished_file_and_another_groups_are_told_as_such() {
    let (place, sb, dir) = group();
    let good = sample(&sb);
    fs::write(dir.join("a.new"), &good[..good.len() - 56]).unwrap();
    let foreign = sample(&Superblock { group: GroupId([7; 16]), ..sb.clone() });
    fs::write(dir.join("b.salvage"), foreign).unwrap();
    let files = list(&place)["files"].clone();
    assert_eq!((&files[0]["state"], &files[1]["state"]), (&json!("unfinished"), &json!("other_group")));
    let text = place.run(&["salvage", "g", "list"]).expect(0, &[]).stdout.clone();
    assert!(text.contains("a.new  unfinished") && text.contains("it is of another group"), "{text}");
    let extract = |file: &str| place.run(&["salvage", "g", "extract", file, "--to", "out"]);
    extract("a.new").expect(1, &["unfinished", "writes it anew when it rejoins"]);
    extract("b.salvage").expect(1, &["not this group's", "of another group"]);
    assert!(!place.path().join("out").exists());
}

#[test]
fn records_that_do_not_belong_there_are_refused() {
    let (place, sb, dir) = group();
    let path = dir.join("a.salvage");
    let fork = HistoryPoint { lsn: Lsn(41), hash: origin(sb.group) };
    let write = |records: &[Record], names: &[&str]| {
        let mut volumes = sb.volumes.clone();
        volumes.iter_mut().zip(names).for_each(|(v, n)| v.name = (*n).into());
        let last = records.last().unwrap().point();
        let (term, fork) = (Term::default(), Some(fork));
        let head = Head {
            group: sb.group,
            node: sb.node,
            name: "db1".into(),
            term,
            fork,
            last,
            time: TIME,
            volumes,
        };
        let mut bytes = head.encode();
        records.iter().for_each(|r| bytes.extend_from_slice(&r.wire()));
        bytes.extend(Trailer { records: records.len() as u64, last: last.lsn }.encode());
        fs::write(&path, bytes).unwrap();
        place.run(&["salvage", "g", "extract", "a.salvage", "--to", "out"])
    };
    let first = record(sb.group, fork, &[(extent(0, 0, 512), Some(1))]);
    let beyond = record(sb.group, first.point(), &[(extent(0, MIB - 512, 1024), Some(1))]);
    write(&[first.clone(), beyond], &[]).expect(1, &["record 43 writes beyond the volumes"]);
    let nowhere = record(sb.group, fork, &[(extent(9, 0, 512), None)]);
    write(&[nowhere], &[]).expect(1, &["writes beyond the volumes"]);
    let gap = record(sb.group, HistoryPoint { lsn: Lsn(50), hash: fork.hash }, &[(extent(0, 0, 512), None)]);
    write(&[first.clone(), gap], &[]).expect(1, &["record 51 does not follow"]);
    let other = record(GroupId([7; 16]), first.point(), &[(extent(0, 0, 512), None)]);
    write(&[first.clone(), other], &[]).expect(1, &["record 43 is of another group"]);
    write(std::slice::from_ref(&first), &["../../x"]).expect(1, &["a volume called"]);
    assert!(!place.path().join("out").exists());
    write(&[first], &[]).expect(0, &[]);
}

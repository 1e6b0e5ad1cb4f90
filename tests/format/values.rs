//! One value of each structure, every field different from its neighbours and from zero.
//!
//! Owns: the values behind the golden bytes. Changing one changes its golden bytes, and proves nothing.

use bytes::Bytes;
use volrep::disk::aligned;
use volrep::format::compare::{Compare, ExtentLeaves};
use volrep::format::message::{Cause, Identity, Message, Opening, Role, Standing, Verdict};
use volrep::format::record::{self, Compressor, Content, EncodeJob, Kind, Record, Stamp};
use volrep::format::salvage;
use volrep::format::segment::SegmentHeader;
use volrep::format::superblock::{
    Anchor, Comparison, Geometry, MapRange, OldImage, Peer, Resync, ResyncStage, Retired, Superblock,
    Verified, Volume,
};
use volrep::units::{Address, Extent, Generation, GroupId, Hash, HistoryPoint, Lsn, NodeId, Term};

pub fn group() -> GroupId {
    GroupId(std::array::from_fn(|i| 0x10 + i as u8))
}

pub fn term(counter: u64) -> Term {
    Term { counter, node: NodeId(0x0102_0304_0506_0700 + counter) }
}

pub fn generation(start: u32) -> Generation {
    Generation { term: term(7), start }
}

pub fn point(lsn: u64) -> HistoryPoint {
    HistoryPoint { lsn: Lsn(lsn), hash: Hash(std::array::from_fn(|i| (lsn as u8).wrapping_add(i as u8))) }
}

pub fn stamp(kind: Kind) -> Stamp {
    Stamp {
        group: group(),
        generation: generation(3),
        lsn: Lsn(0x1122_3344_5566),
        prev: point(9).hash,
        time: 0x0fed_cba9_8765_4321,
        flags: record::flags::SYNC,
        last_write: 0x0a0b_0c0d_0e0f,
        durable: Lsn(0x1122_3344_5500),
        kind,
    }
}

pub fn extent(volume: u8, sector: u64, sectors: u64) -> Extent {
    Extent::new(Address::new(volume, sector * 512).unwrap(), sectors * 512).unwrap()
}

/// A record of these extents over this payload.
pub fn record(extents: Vec<(Extent, Content)>, payload: &[u8], level: Option<i32>, stamp: Stamp) -> Record {
    let mut buf = aligned(0);
    buf.resize(record::room(extents.len()), 0);
    buf.extend_from_slice(payload);
    record::seal(record::encode(EncodeJob { extents, buf, level }, &mut Compressor::default()), stamp)
}

/// Bytes that compress, and that differ from place to place.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 512 + i % 7) as u8).collect()
}

pub fn extents() -> Vec<(Extent, Content)> {
    vec![
        (extent(0, 8, 1), Content::Data),
        (extent(0, 9, 1 << 20), Content::Zeroes),
        (extent(2, 5, 2), Content::Data),
    ]
}

pub fn raw_record() -> Record {
    record(extents(), &pattern(1536), None, stamp(Kind::Writes))
}

pub fn zstd_record() -> Record {
    record(vec![(extent(1, 0, 64), Content::Data)], &pattern(32768), Some(3), stamp(Kind::Writes))
}

pub fn sync_set_record() -> Record {
    let ids: Vec<u8> = [5u64, 0x0807_0605_0403_0201].iter().flat_map(|n| n.to_le_bytes()).collect();
    record::seal(record::encode_note(&ids), stamp(Kind::SyncSet))
}

pub fn mark_record() -> Record {
    record::seal(record::encode_note("before batch \u{fc}".as_bytes()), stamp(Kind::Mark))
}

pub fn segment() -> SegmentHeader {
    SegmentHeader {
        group: group(),
        sequence: 0x0123_4567,
        before: point(77),
        generation: generation(4),
        last_write: 0x99aa,
        time: 0x1234_5678_9abc,
    }
}

pub fn salvage_head() -> salvage::Head {
    salvage::Head {
        group: group(),
        node: NodeId(0x0303),
        name: "db1".into(),
        term: term(3),
        fork: Some(point(21)),
        last: point(29),
        time: 0x0e0f_1011,
        volumes: vec![
            Volume { number: 0, size: 1 << 30, name: "data".into() },
            Volume { number: 3, size: 512, name: "wal".into() },
        ],
    }
}

pub fn anchor(lsn: u64) -> Anchor {
    Anchor { point: point(lsn), generation: generation(lsn as u32), last_write: lsn << 8, time: lsn << 16 }
}

pub fn superblock() -> Superblock {
    Superblock {
        sequence: 0x0202,
        group: group(),
        node: NodeId(0x0303),
        role: Role::Primary,
        term: term(7),
        generation: generation(6),
        checkpoint: point(40),
        checkpoint_write: 0x0404,
        checkpoint_generation: generation(5),
        checkpoint_segment: 0x0505,
        base: anchor(33),
        base_segment: 0x0504,
        floor: Lsn(0x0606),
        limit: Lsn(0x0707),
        blank: true,
        clean: false,
        consistent: true,
        cache_boot: std::array::from_fn(|i| 0xa0 + i as u8),
        geometry: Geometry { segment: 2 << 20, segments: 9 },
        volumes: vec![
            Volume { number: 0, size: 1 << 30, name: "data".into() },
            Volume { number: 3, size: 512, name: "wal".into() },
        ],
        openings: vec![
            Opening { generation: generation(1), at: point(0) },
            Opening { generation: generation(2), at: point(12) },
        ],
        maps_id: 0x0a0a,
        maps: vec![MapRange { slot: 2, from: point(13) }],
        sync_set: vec![NodeId(0x0808), NodeId(0x0909)],
        outdated: vec![NodeId(0x0a0a)],
        peers: vec![
            Peer {
                node: NodeId(0x0808),
                name: "db2".into(),
                durable: Lsn(39),
                behind: false,
                resyncing: true,
                verified: None,
            },
            Peer {
                node: NodeId(0x0909),
                name: "db3".into(),
                durable: Lsn(11),
                behind: true,
                resyncing: false,
                verified: Some(Verified { time: 0x0e01, lsn: Lsn(0x0e02), differences: 0x0e03 }),
            },
        ],
        retired: Some(Retired { term: term(3), rewinds: true }),
        handed: Some(NodeId(0x0b01)),
        resync: Some(Resync {
            job: 0x0d01,
            stage: ResyncStage::Staging,
            since: Some(point(14)),
            progress: 0x0d02,
            compared: Some(Lsn(0x0d03)),
            old: Some(OldImage {
                at: anchor(34),
                openings: vec![Opening { generation: generation(9), at: point(15) }],
                sync_set: vec![NodeId(0x0d07)],
            }),
        }),
        comparison: Some(Comparison {
            job: 0x0d08,
            verify: false,
            quick: true,
            rate: 0x0d09,
            progress: 0x0d0a,
            differ: 0x0d0b,
            repaired: 0x0d0c,
            skipped: 0x0d0d,
            wire: 0x0d0e,
            spent: 0x0d0f,
        }),
        verified: Some(Verified { time: 0x0d04, lsn: Lsn(0x0d05), differences: 0x0d06 }),
        unrepaired: 0x0d10,
        redo: Some(Lsn(0x0d11)),
        cut: Some(point(35)),
    }
}

pub fn identity() -> Identity {
    Identity {
        group: group(),
        node: NodeId(0x0b0b),
        name: "db1".into(),
        role: Role::Shadow,
        term: term(9),
        volumes: vec![(0, 1 << 30), (3, 512)],
        blank: true,
        tail: point(50),
        tail_generation: generation(8),
        oldest: point(20),
        applied: Lsn(48),
        openings: vec![Opening { generation: generation(2), at: point(12) }],
        resyncing: true,
        rewinds: true,
        apply_delay: 0x0b0c,
        cascades: false,
        sources: vec![NodeId(0x0d01), NodeId(0x0d02)],
        primary: "db0".into(),
    }
}

/// One message of every kind, each verdict once; with names.
pub fn messages() -> Vec<(&'static str, Message)> {
    let welcome = |verdict| Message::Welcome { identity: Box::new(identity()), verdict, proof: [0x77; 32] };
    vec![
        ("challenge", Message::Challenge { nonce: [0x55; 32] }),
        ("hello", Message::Hello { identity: Box::new(identity()), nonce: [0x66; 32], proof: [0x67; 32] }),
        ("welcome_compare", welcome(Verdict::Compare(point(30)))),
        (
            "welcome_resync",
            welcome(Verdict::Resync {
                cause: Cause::Behind,
                oldest: Lsn(31),
                points: vec![point(16), point(17)],
            }),
        ),
        ("welcome_diverged", welcome(Verdict::Diverged(Lsn(32)))),
        ("refuse", Message::Refuse { text: "no: volume sizes differ".into() }),
        ("begin", Message::Begin { from: Lsn(0x0a01) }),
        ("record", Message::Record(raw_record())),
        ("durable", Message::Durable { lsn: Lsn(0x0a02) }),
        (
            "positions",
            Message::Positions { received: Lsn(0x0a05), durable: Lsn(0x0a04), applied: Lsn(0x0a03) },
        ),
        (
            "heartbeat",
            Message::Heartbeat {
                wall: 0x0b01,
                echo: 0x0b02,
                tail: Some(Lsn(0x0b03)),
                time: 0x0b04,
                bytes: 0x0b05,
                silent: 0x0b06,
                live: true,
                feeds: vec![NodeId(0x0b07)],
                standing: Standing::Outdated,
            },
        ),
        ("resync", Message::Resync { since: Some(point(18)) }),
        ("candidates", Message::Candidates { extents: vec![extent(0, 128, 256), extent(3, 0, 1)] }),
        ("rebase", Message::Rebase { at: anchor(19), since: Some(point(18)), members: vec![NodeId(0x0c0c)] }),
        ("resynced", Message::Resynced),
        ("ask_copy", Message::AskCopy { lsn: Lsn(0x0a06) }),
        ("copy", Message::Copy(raw_record())),
        ("no_copy", Message::NoCopy { lsn: Lsn(0x0a07) }),
        ("handover", Message::Handover { at: point(0x0a08) }),
    ]
    .into_iter()
    .chain(words().into_iter().map(|(name, word)| (name, Message::Compare(Box::new(word)))))
    .collect()
}

/// Every word of a comparison.
fn words() -> Vec<(&'static str, Compare)> {
    let window = 0x0f01;
    let leaves = ExtentLeaves {
        index: 0x0102,
        touched: std::array::from_fn(|i| i as u8 + 1),
        hashes: std::array::from_fn(|i| 0x0101_0101_0101_0101 * (i as u64 + 1)),
        rotten: true,
    };
    vec![
        (
            "compare_open",
            Compare::Open { window, extent: extent(3, 128, 1024), wanted: vec![0x5a], quick: true },
        ),
        ("compare_at", Compare::At { window, lsn: Lsn(0x0f02) }),
        (
            "compare_root",
            Compare::Root { window, touched: vec![0xa5, 0x5a], root: [0x33; 16], rotten: vec![7, 9] },
        ),
        ("compare_ask_roots", Compare::AskRoots { window }),
        ("compare_roots", Compare::Roots { window, roots: vec![[0x44; 16], [0x45; 16]] }),
        ("compare_ask_leaves", Compare::AskLeaves { window, extents: vec![3, 5] }),
        ("compare_leaves", Compare::Leaves { window, extents: vec![leaves] }),
        ("compare_ask_data", Compare::AskData { window, batch: 0x0f03, runs: vec![(4, 2), (9, 1)] }),
        (
            "compare_data",
            Compare::Data { window, batch: 0x0f03, touched: vec![1, 2, 3], payload: pattern(40).into() },
        ),
        ("compare_close", Compare::Close { window }),
        ("compare_closed", Compare::Closed { window, lsn: Lsn(77) }),
        ("compare_fail", Compare::Fail { text: "reading failed".into() }),
        (
            "compare_begin",
            Compare::Begin { quick: true, verify: false, rate: 0x0f04, in_place: true, suspend_delay: false },
        ),
        ("compare_stop", Compare::Stop),
        ("compare_report", Compare::Report { json: Bytes::from_static(b"{}") }),
    ]
}

/// The bytes of a message as they travel.
pub fn frame(message: &Message) -> Bytes {
    let frame = message.encode();
    [&frame.head[..], &frame.record[..]].concat().into()
}

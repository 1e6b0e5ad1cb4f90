//! The journal and its recovery over a disk in memory.

use super::recovery::{Outcome, Recovered, Recovery};
use super::*;
use crate::disk::aligned;
use crate::format::message::Role;
use crate::format::record::padded;
use crate::format::record::{self, Compressor, Content, EncodeJob, Kind, Stamp};
use crate::format::superblock::{Anchor, Superblock, Volume};
use crate::units::{Address, Extent, Hash, NodeId, Term};
use bytes::Bytes;

const G: Geometry = Geometry { segment: 2 << 20, segments: 4 };

pub(super) fn superblock() -> Superblock {
    let term = Term { counter: 1, node: NodeId(1) };
    Superblock {
        sequence: 1,
        group: GroupId([1; 16]),
        node: NodeId(1),
        role: Role::Primary,
        term,
        generation: Generation { term, start: 1 },
        checkpoint: HistoryPoint { lsn: Lsn(0), hash: record::origin(GroupId([1; 16])) },
        checkpoint_write: 0,
        checkpoint_generation: Generation::default(),
        checkpoint_segment: 1,
        base: Anchor::default(),
        base_segment: 1,
        floor: Lsn(0),
        limit: Lsn(0),
        blank: true,
        clean: false,
        consistent: true,
        cache_boot: [0; 16],
        geometry: G,
        volumes: vec![Volume { number: 0, size: 1 << 30, name: "v".into() }],
        openings: vec![],
        maps: vec![],
        sync_set: vec![],
        outdated: vec![],
        peers: vec![],
        maps_id: 0,
        retired: None,
        handed: None,
        resync: None,
        comparison: None,
        verified: None,
        unrepaired: 0,
        redo: None,
        cut: None,
    }
}

pub(super) fn make(tail: &Tail, sb: &Superblock, bytes: usize) -> Record {
    let mut buf = aligned(record::room(1) + bytes);
    buf.resize(record::room(1), 0);
    buf.resize(record::room(1) + bytes, tail.point.lsn.0 as u8);
    let extent = Extent::new(Address(0), bytes as u64).unwrap();
    let job = EncodeJob { extents: vec![(extent, Content::Data)], buf, level: None };
    let stamp = Stamp {
        group: sb.group,
        generation: sb.generation,
        lsn: tail.point.lsn.next(),
        prev: tail.point.hash,
        time: tail.time + 1,
        flags: 0,
        last_write: tail.last_write + 1,
        durable: tail.durable,
        kind: Kind::Writes,
    };
    record::seal(record::encode(job, &mut Compressor::default()), stamp)
}

/// A disk without a cache.
pub(super) struct Disk(pub(super) Vec<u8>);

impl Disk {
    pub(super) fn new() -> Disk {
        Disk(vec![0; G.len() as usize])
    }
    fn record(&self, at: u64) -> HistoryPoint {
        Record::decode(Bytes::copy_from_slice(&self.0[at as usize..])).unwrap().point()
    }
    fn run(&mut self, request: &DiskRequest) -> DiskResult {
        match &request.op {
            DiskOp::Read { offset, len } => {
                Ok(Bytes::copy_from_slice(&self.0[*offset as usize..*offset as usize + len]))
            }
            DiskOp::Write { offset, data, .. } => {
                self.0[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
                Ok(Bytes::new())
            }
            _ => Ok(Bytes::new()),
        }
    }
}

pub(super) fn recover(disk: &mut Disk, sb: &Superblock, target: Option<HistoryPoint>) -> (Outcome, Vec<u64>) {
    let origin = record::origin(sb.group);
    let mut recovery = match target {
        Some(target) => Recovery::compare(9, sb, origin, target),
        None => Recovery::new(9, sb, origin),
    };
    let (mut out, mut seen) = (Vec::new(), Vec::new());
    recovery.start(&mut out);
    loop {
        let request = out.remove(0);
        let result = disk.run(&request);
        let mut note = |r: &Record, at| {
            assert_eq!(disk.record(at), r.point(), "where it is said to lie");
            seen.push(r.stamp.lsn.0);
        };
        if let Some(outcome) = recovery.complete(request.token.id(), result, &mut note, &mut out) {
            return (outcome, seen);
        }
    }
}

pub(super) fn found(disk: &mut Disk, sb: &Superblock) -> (Recovered, Vec<u64>) {
    match recover(disk, sb, None) {
        (Outcome::Found(found), seen) => (*found, seen),
        (other, _) => panic!("{other:?}"),
    }
}

pub(super) fn journal(r: &Recovered, sb: &Superblock) -> Journal {
    Journal::new(1, sb.group, G, r.head, r.segments.clone(), r.tail)
}

pub(super) fn append(journal: &mut Journal, disk: &mut Disk, sb: &Superblock, bytes: usize) -> Record {
    let record = make(journal.tail(), sb, bytes);
    assert!(journal.fits(record.padded_len()));
    let mut out = Vec::new();
    let at = journal.append(Now::default(), &record, true, &mut out);
    for request in out {
        let result = disk.run(&request);
        journal.complete(request.token.id(), result).unwrap();
    }
    assert_eq!(disk.record(at), record.point());
    record
}

#[test]
fn what_was_appended_is_found_again_over_many_laps() {
    let (mut disk, mut sb) = (Disk::new(), superblock());
    let (r, seen) = found(&mut disk, &sb);
    assert!(seen.is_empty());
    let mut j = journal(&r, &sb);
    for i in 0..200u64 {
        let bytes = [4096, 512, 300 << 10, 1 << 20][i as usize % 4];
        while !j.fits(2 << 20) {
            let tail = *j.tail();
            sb.checkpoint = tail.point;
            sb.checkpoint_write = tail.last_write;
            sb.checkpoint_generation = tail.generation;
            sb.checkpoint_segment = j.segment_of(tail.point.lsn);
            j.keep_after(tail.point.lsn);
        }
        let record = append(&mut j, &mut disk, &sb, bytes);
        let (r, seen) = found(&mut disk, &sb);
        assert_eq!((r.tail, r.head), (*j.tail(), j.head()));
        let expected: Vec<u64> = (sb.checkpoint.lsn.0 + 1..=record.stamp.lsn.0).collect();
        assert_eq!(seen, expected);
        assert_eq!(r.segments, Vec::from(j.segments.clone()));
    }
    assert!(j.head().segment > 8);
}

#[test]
fn a_gap_below_a_watermark_is_damage_and_above_it_a_torn_tail() {
    for watermark in [0u64, 2, 3] {
        let (mut disk, sb) = (Disk::new(), superblock());
        let mut j = journal(&found(&mut disk, &sb).0, &sb);
        let mut places = Vec::new();
        for i in 1..=5 {
            if i == 5 {
                j.tail.durable = Lsn(watermark);
            }
            places.push(j.head().offset.max(BLOCK));
            append(&mut j, &mut disk, &sb, 4096);
        }
        // Record 3 is lost; 4 and 5 survive.
        let at = G.segment + places[2];
        disk.0[at as usize..at as usize + 512].fill(0xee);
        match recover(&mut disk, &sb, None) {
            (Outcome::Stopped(text), _) => assert!(watermark == 3 && text.contains("LSN 2"), "{text}"),
            (Outcome::Found(r), _) => {
                assert!(watermark < 3);
                assert_eq!((r.tail.point.lsn, r.cut), (Lsn(2), 3));
                // What was cut off never comes back, even when the gap is filled with an equal record.
                let mut j = journal(&r, &sb);
                append(&mut j, &mut disk, &sb, 4096);
                assert_eq!(found(&mut disk, &sb).0.tail.point.lsn, Lsn(3));
            }
            (other, _) => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_cut_needs_the_very_point_and_erases_what_follows() {
    let (mut disk, sb) = (Disk::new(), superblock());
    let mut j = journal(&found(&mut disk, &sb).0, &sb);
    let points: Vec<_> = (0..6).map(|_| append(&mut j, &mut disk, &sb, 900 << 10).point()).collect();
    let wrong = HistoryPoint { hash: Hash([1; 32]), ..points[3] };
    assert!(matches!(recover(&mut disk, &sb, Some(wrong)).0, Outcome::Differs));
    let beyond = HistoryPoint { lsn: Lsn(7), ..points[3] };
    assert!(matches!(recover(&mut disk, &sb, Some(beyond)).0, Outcome::Differs));
    assert_eq!(found(&mut disk, &sb).0.tail.point, points[5]);
    let (outcome, seen) = recover(&mut disk, &sb, Some(points[3]));
    assert!(matches!(outcome, Outcome::Found(r) if r.tail.point == points[3]));
    assert_eq!(seen, [1, 2, 3, 4]);
    assert_eq!(found(&mut disk, &sb).0.tail.point, points[3]);
}

#[test]
fn a_journal_that_ends_before_its_floor_is_damaged() {
    let (mut disk, mut sb) = (Disk::new(), superblock());
    let mut j = journal(&found(&mut disk, &sb).0, &sb);
    append(&mut j, &mut disk, &sb, 4096);
    sb.floor = Lsn(2);
    assert!(matches!(recover(&mut disk, &sb, None).0, Outcome::Stopped(_)));
    sb.floor = Lsn(1);
    assert_eq!(found(&mut disk, &sb).0.tail.point.lsn, Lsn(1));
}

#[test]
fn a_failed_write_or_sync_latches() {
    let (mut disk, sb) = (Disk::new(), superblock());
    let mut j = journal(&found(&mut disk, &sb).0, &sb);
    let mut out = Vec::new();
    for _ in 0..2 {
        let record = make(j.tail(), &sb, 512);
        j.append(Now::default(), &record, false, &mut out);
    }
    j.complete(1, Ok(Bytes::new())).unwrap();
    out.clear();
    j.want(Lsn(1));
    assert_eq!(j.poll(Now::default(), 5, 1 << 20, &mut out), None);
    assert!(matches!(out[..], [DiskRequest { op: DiskOp::Sync, .. }]));
    assert!(j.complete(SYNC, Err(IoError::EIO)).is_err());
    assert!(j.complete(2, Ok(Bytes::new())).is_err());
    assert_eq!(j.durable(), Lsn(0));
    out.clear();
    j.poll(Now { mono: 1 << 60, wall: 0 }, 5, 1, &mut out);
    assert!(out.is_empty());
}

/// What `keep_after` says, counted from the oldest segment each time.
fn busy_from(j: &Journal) -> u64 {
    let passed = |s: &&Segment| s.before.lsn <= j.keep && s.before.lsn < j.durable;
    let free = j.segments.iter().skip(1).take_while(passed).count();
    j.segments.get(free).map_or(j.head.segment, |s| s.sequence).min(j.head.segment)
}

#[test]
fn what_is_kept_is_found_without_walking_all_segments() {
    let sb = superblock();
    let geometry = Geometry { segment: 2 << 20, segments: 12 };
    for first_offset in [0, BLOCK] {
        let tail =
            Tail { point: sb.checkpoint, generation: sb.generation, last_write: 0, time: 0, durable: Lsn(0) };
        let segments = if first_offset == 0 {
            vec![]
        } else {
            vec![Segment {
                sequence: 1,
                before: tail.point,
                generation: tail.generation,
                last_write: 0,
                time: 0,
            }]
        };
        let head = cursor::Place { segment: 1, offset: first_offset };
        let mut j = Journal::new(1, sb.group, geometry, head, segments, tail);
        assert_eq!(j.busy_from, busy_from(&j));
        let (mut waiting, mut out, mut dice) = (VecDeque::new(), Vec::new(), 7u64);
        let mut laps = 0;
        while laps < 3 {
            dice = dice.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            match dice >> 61 {
                0..4 if j.fits(2 << 20) => {
                    let record = make(j.tail(), &sb, 900 << 10);
                    j.append(Now::default(), &record, dice >> 60 & 1 == 0, &mut out);
                    waiting.push_back(record.stamp.lsn.0);
                }
                0..4 => j.keep_after(j.durable()),
                4 => j.keep_after(Lsn((dice >> 32) % (j.tail().point.lsn.0 + 2))),
                _ => {
                    let back = dice >> 59 & 1 == 0;
                    let id = if back { waiting.pop_back() } else { waiting.pop_front() };
                    if let Some(id) = id {
                        j.complete(id, Ok(Bytes::new())).unwrap();
                    }
                    if j.poll(Now::default(), 0, 0, &mut out).is_none() && j.sync.is_some() {
                        j.complete(SYNC, Ok(Bytes::new())).unwrap();
                    }
                }
            }
            out.clear();
            // A head that was opened since the last call is not looked at before the next.
            let before = j.busy_from;
            j.keep_after(Lsn(0));
            assert!(before <= j.busy_from);
            assert_eq!(j.busy_from, busy_from(&j));
            laps = j.head.segment / u64::from(geometry.segments);
        }
    }
}

/// Runs a scrub to its end; what it found. `copies` has the records that the other side still has.
fn scrub(j: &mut Journal, disk: &mut Disk, copies: &[Record]) -> Vec<String> {
    let mut scrub = scrub::Scrub::new(j.durable());
    let mut found = Vec::new();
    loop {
        assert!(scrub.hold().is_none_or(|lsn| j.keep <= lsn), "what is read may not be overwritten");
        match scrub.step(j) {
            scrub::Step::Done => return found,
            scrub::Step::Read(op) => scrub.feed(disk.run(&request(op)).unwrap()),
            scrub::Step::Header(at, op) => {
                found.push(format!("header {}", at / (2 << 20)));
                disk.run(&request(op)).unwrap();
            }
            scrub::Step::Record(lsn, _) => {
                found.push(format!("record {lsn}"));
                match copies.iter().find(|r| r.stamp.lsn == lsn).and_then(|r| scrub.restore(r, j)) {
                    Some(op) => drop(disk.run(&request(op)).unwrap()),
                    None => scrub.pass_over(),
                }
            }
        }
    }
}

fn request(op: DiskOp) -> DiskRequest {
    DiskRequest { token: Token::new(1, 0), file: File::Journal, op }
}

#[test]
fn what_the_disk_has_spoilt_is_found_and_put_back() {
    let sb = superblock();
    let geometry = Geometry { segment: 2 << 20, segments: 24 };
    let mut disk = Disk(vec![0; geometry.len() as usize]);
    let tail =
        Tail { point: sb.checkpoint, generation: sb.generation, last_write: 0, time: 0, durable: Lsn(0) };
    let head = cursor::Place { segment: 1, offset: 0 };
    let mut j = Journal::new(1, sb.group, geometry, head, vec![], tail);
    let mut records = Vec::new();
    // More than a lap: the oldest are overwritten.
    for i in 0..120 {
        j.keep_after(j.durable());
        records.push(append(&mut j, &mut disk, &sb, [4096, 300 << 10, 900 << 10][i % 3]));
    }
    assert_eq!(scrub(&mut j, &mut disk, &records), Vec::<String>::new());
    let good = disk.0.clone();
    let retained: Vec<Segment> = j.segments().copied().collect();
    let at = |sequence: u64, offset: u64| {
        cursor::Place { segment: sequence, offset }.file_offset(geometry) as usize
    };
    // Retained, and with room enough to be held.
    let chosen = retained[retained.len() - 4];
    disk.0[at(chosen.sequence, 50)] ^= 1;
    disk.0[at(chosen.sequence, BLOCK + 100)] ^= 1;
    disk.0[at(chosen.sequence + 1, BLOCK + 4096 + 70_000)] ^= 1;
    let first = chosen.before.lsn.next();
    let found = scrub(&mut j, &mut disk, &records);
    assert_eq!(found.len(), 3, "{found:?}");
    assert_eq!(found[..2], [format!("header {}", chosen.sequence % 24), format!("record {first}")]);
    assert!(disk.0 == good, "every byte is back");
    assert_eq!(scrub(&mut j, &mut disk, &records), Vec::<String>::new());
    // Nobody has it: the rest of that segment is passed over, the next one is read.
    disk.0[at(chosen.sequence, BLOCK + 100)] ^= 1;
    disk.0[at(chosen.sequence + 1, 60)] ^= 1;
    let found = scrub(&mut j, &mut disk, &[]);
    assert_eq!(found, [format!("record {first}"), format!("header {}", (chosen.sequence + 1) % 24)]);
    // A record of another history is not put there.
    let other =
        make(&Tail { point: HistoryPoint { hash: Hash([9; 32]), ..chosen.before }, ..tail }, &sb, 4096);
    assert_eq!(scrub(&mut j, &mut disk, &[other]), [format!("record {first}")]);
}

/// A record that survived far behind the gap, in a segment whose header did not, tells what was durable.
#[test]
fn a_watermark_segments_behind_a_gap_is_found() {
    let geometry = Geometry { segment: 2 << 20, segments: 12 };
    let sb = Superblock { geometry, ..superblock() };
    for watermark in [1, 2] {
        let mut disk = Disk(vec![0; geometry.len() as usize]);
        let head = cursor::Place { segment: 1, offset: 0 };
        let tail =
            Tail { point: sb.checkpoint, generation: sb.generation, last_write: 0, time: 0, durable: Lsn(0) };
        let mut j = Journal::new(1, sb.group, geometry, head, vec![], tail);
        for i in 1..=10 {
            if i == 10 {
                j.tail.durable = Lsn(watermark);
            }
            append(&mut j, &mut disk, &sb, 900 << 10);
        }
        // The second is lost, and the headers of all later segments with the first record of each.
        let at = |segment: u64, offset: u64| cursor::Place { segment, offset }.file_offset(geometry) as usize;
        disk.0[at(1, 1 << 20)..at(2, 0)].fill(0);
        (2..=5).for_each(|segment| disk.0[at(segment, 0)..at(segment, 8192)].fill(0));
        match recover(&mut disk, &sb, None).0 {
            Outcome::Stopped(text) => assert!(watermark == 2 && text.contains("LSN 1"), "{text}"),
            Outcome::Found(r) => assert_eq!((watermark, r.tail.point.lsn, r.cut), (1, Lsn(1), 5)),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_scrub_leaves_room_for_what_comes_and_reads_much_at_a_time() {
    let sb = superblock();
    let fill = |segments, segment: u64, lsns| {
        let geometry = Geometry { segment, segments };
        let tail =
            Tail { point: sb.checkpoint, generation: sb.generation, last_write: 0, time: 0, durable: Lsn(0) };
        let head = cursor::Place { segment: 1, offset: 0 };
        let mut j = Journal::new(1, sb.group, geometry, head, vec![], tail);
        for lsn in 1..=lsns {
            let record = make(j.tail(), &sb, 900 << 10);
            j.append(Now::default(), &record, true, &mut Vec::new());
            j.complete(lsn, Ok(Bytes::new())).unwrap();
            j.keep_after(j.durable());
        }
        j
    };
    let mut j = fill(4, 16 << 20, 5);
    let mut one = scrub::Scrub::new(j.durable());
    assert!(matches!(
        one.step(&mut j),
        scrub::Step::Read(DiskOp::Read { offset: 16_777_216, len: 4_194_304 })
    ));
    for read in [4 << 20, 8 << 20] {
        one.feed(Bytes::from(vec![0; 4 << 20]));
        assert_eq!(one.read, read);
    }
    // The oldest ones are about to be overwritten: holding them would leave a writer less than 8 MiB.
    let mut j = fill(20, 2 << 20, 36);
    let mut one = scrub::Scrub::new(j.durable());
    let mut held = Vec::new();
    while let scrub::Step::Read(_) = one.step(&mut j) {
        held.extend(one.hold().map(|lsn| lsn.0));
        assert!(j.room() >= 8 << 20);
        one.pass_over();
    }
    assert!(held[0] > 0 && held.is_sorted() && *held.last().unwrap() == 34, "{held:?}");
}

/// Recovers from a disk that answers as `answer` says; the outcome, and how many requests there were.
fn recover_with(
    sb: &Superblock,
    target: Option<HistoryPoint>,
    mut answer: impl FnMut(usize, &DiskRequest) -> DiskResult,
) -> (Outcome, usize) {
    let origin = record::origin(sb.group);
    let mut recovery = match target {
        Some(target) => Recovery::compare(9, sb, origin, target),
        None => Recovery::new(9, sb, origin),
    };
    let (mut out, mut asked) = (Vec::new(), 0);
    recovery.start(&mut out);
    loop {
        assert!(!out.is_empty(), "it waits for nothing");
        let chunk = |r: &DiskRequest| matches!(r.op, DiskOp::Read { len, .. } if len > BLOCK as usize);
        assert!(out.iter().filter(|r| chunk(r)).count() <= 4, "chunks in memory at once");
        let request = out.remove(0);
        let result = answer(asked, &request);
        asked += 1;
        if let Some(outcome) = recovery.complete(request.token.id(), result, &mut |_, _| {}, &mut out) {
            return (outcome, asked);
        }
    }
}

/// What can't be read, erased or synced ends the recovery: nothing is concluded from it.
#[test]
fn recovery_stops_at_any_failure_but_that_of_a_segment_it_does_not_need() {
    let (mut disk, sb) = (Disk::new(), superblock());
    let mut j = journal(&found(&mut disk, &sb).0, &sb);
    let points: Vec<_> = (0..5).map(|_| append(&mut j, &mut disk, &sb, 900 << 10).point()).collect();
    // The third is torn, the first of the second segment.
    let torn = 2 * G.segment as usize + BLOCK as usize;
    disk.0[torn + 5000] ^= 1;
    for target in [None, Some(points[1])] {
        let copy = disk.0.clone();
        let mut ops = Vec::new();
        let (outcome, asked) = recover_with(&sb, target, |_, r| {
            ops.push(r.op.clone());
            disk.run(r)
        });
        // Everything is erased before the sync begins, and that is waited for.
        let erased = ops.iter().filter(|op| matches!(op, DiskOp::Write { .. })).count();
        assert!(erased > 1 && matches!(ops.last(), Some(DiskOp::Sync)));
        assert!(matches!(ops[asked - 1 - erased..asked - 1], [DiskOp::Write { .. }, ..]));
        let Outcome::Found(r) = outcome else { panic!("{outcome:?}") };
        let end = BLOCK + 2 * padded(record::room(1) + (900 << 10)) as u64;
        // What is cut off is so where it begins; a torn record leaves its segment's header.
        let head = if target.is_some() { (1, end) } else { (2, BLOCK) };
        assert_eq!((r.tail.point, r.head.segment, r.head.offset), (points[1], head.0, head.1));
        disk.0 = copy.clone();
        for failing in 0..asked {
            let (mut needed, mut spare) = (false, false);
            let (outcome, _) = recover_with(&sb, target, |i, request| {
                if i != failing {
                    return disk.run(request);
                }
                // Of four segments three were written.
                spare = matches!(request.op, DiskOp::Read { offset: 0, len } if len == BLOCK as usize);
                // The walk reads a segment's header again.
                needed = !matches!(request.op, DiskOp::Read { len, .. } if len == BLOCK as usize);
                Err(IoError::EIO)
            });
            match outcome {
                Outcome::Stopped(text) => assert!(!spare && text.contains("othing was changed"), "{text}"),
                Outcome::Found(r) => assert!(!needed && r.tail.point == points[1], "{failing}"),
                Outcome::Differs => panic!("{failing}: what can't be read proves nothing"),
            }
            disk.0 = copy.clone();
        }
    }
}

/// As far behind the end as there may be something unsynced, and a segment more: records leave the ends of segments free.
#[test]
fn what_may_have_survived_is_looked_for_far_enough() {
    for (segment, segments, furthest) in
        [(64 << 20, 16, 4), (128 << 20, 16, 3), (2 << 20, 80, 66), (64 << 20, 4, 4)]
    {
        let sb = Superblock { geometry: Geometry { segment, segments }, ..superblock() };
        let mut looked = vec![0; segments as usize];
        let (outcome, _) = recover_with(&sb, None, |_, request| {
            let DiskOp::Read { offset, len } = request.op else { return Ok(Bytes::new()) };
            if len > BLOCK as usize {
                looked[(offset / segment) as usize] += len as u64;
            }
            Ok(Bytes::from(vec![0; len]))
        });
        assert!(matches!(outcome, Outcome::Found(_)));
        // The first one is read by the walk, too.
        looked[1] -= cursor::CHUNK;
        let whole: Vec<_> =
            (0..u64::from(segments)).map(|s| if (1..=furthest).contains(&s) { segment } else { 0 }).collect();
        let mut ring = whole.clone();
        if furthest == u64::from(segments) {
            ring[0] = segment;
        }
        assert_eq!(looked, ring, "{segment} {segments}");
    }
}

#[test]
fn the_headers_of_many_segments_are_read_in_turn() {
    for segments in [4, 64, 65, 128, 200] {
        let sb = Superblock { geometry: Geometry { segment: 2 << 20, segments }, ..superblock() };
        let mut headers = Vec::new();
        let (outcome, _) = recover_with(&sb, None, |_, request| {
            let DiskOp::Read { offset, len } = request.op else { return Ok(Bytes::new()) };
            if len == BLOCK as usize {
                headers.push(offset / (2 << 20));
            }
            Ok(Bytes::from(vec![0; len]))
        });
        let Outcome::Found(found) = outcome else { panic!("{outcome:?}") };
        assert_eq!((found.tail.point.lsn, found.head), (Lsn(0), cursor::Place { segment: 1, offset: 0 }));
        assert_eq!(headers, (0..u64::from(segments)).collect::<Vec<_>>());
    }
}

#[test]
fn a_segments_header_of_another_group_or_from_another_place_is_none() {
    let (mut disk, sb) = (Disk::new(), superblock());
    let mut j = journal(&found(&mut disk, &sb).0, &sb);
    append(&mut j, &mut disk, &sb, 512);
    let ours = SegmentHeader {
        group: sb.group,
        sequence: 3,
        before: j.tail().point,
        generation: sb.generation,
        last_write: 1,
        time: 1,
    };
    let recovered = |header: SegmentHeader| {
        let mut disk = Disk(disk.0.clone());
        disk.0[3 * G.segment as usize..][..BLOCK as usize].copy_from_slice(&header.encode());
        let (r, _) = found(&mut disk, &sb);
        assert_eq!(r.tail.point.lsn, Lsn(1));
        r.cut > 0
    };
    assert!(recovered(ours), "a later one of this journal is erased");
    assert!(!recovered(SegmentHeader { group: GroupId([2; 16]), ..ours }));
    assert!(!recovered(SegmentHeader { sequence: 6, ..ours }));
    assert!(recovered(SegmentHeader { sequence: 7, ..ours }));
}

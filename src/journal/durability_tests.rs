//! What is durable when, what is synced when, and what may be overwritten: each promise of the journal by itself.

use super::tests::{make, superblock};
use super::*;
use crate::format::superblock::Superblock;
use bytes::Bytes;

const SEGMENT: u64 = 2 << 20;

/// A journal whose requests stay in flight until they are completed by hand.
struct Rig {
    journal: Journal,
    sb: Superblock,
    now: u64,
}

impl Rig {
    fn new() -> Rig {
        Rig::of(4)
    }

    fn of(segments: u32) -> Rig {
        let sb = superblock();
        let tail =
            Tail { point: sb.checkpoint, generation: sb.generation, last_write: 0, time: 0, durable: Lsn(0) };
        let geometry = Geometry { segment: SEGMENT, segments };
        let head = Place { segment: 1, offset: 0 };
        Rig { journal: Journal::new(1, sb.group, geometry, head, vec![], tail), sb, now: 0 }
    }

    fn now(&self) -> Now {
        Now { mono: self.now, wall: 0 }
    }

    /// Appends a record of so many bytes of payload: where its write begins, its length, and whether it is durable by itself.
    fn append(&mut self, bytes: usize, wanted: bool) -> (u64, u64, bool) {
        let record = make(self.journal.tail(), &self.sb, bytes);
        assert!(self.journal.fits(record.padded_len()));
        let mut out = Vec::new();
        let at = self.journal.append(self.now(), &record, wanted, &mut out);
        let [DiskRequest { op: DiskOp::Write { offset, data, dsync }, .. }] = &out[..] else {
            panic!("{out:?}")
        };
        assert_eq!(
            at + record.padded_len(),
            offset + data.len() as u64,
            "the record is the end of what is written"
        );
        (*offset, data.len() as u64, *dsync)
    }

    fn written(&mut self, lsn: u64) {
        self.journal.complete(lsn, Ok(Bytes::new())).unwrap();
    }

    fn synced(&mut self) {
        self.written(SYNC);
    }

    /// Whether a sync begins; if none does, when one is due.
    fn poll(&mut self, after: u64, limit: u64) -> (bool, Option<u64>) {
        let mut out = Vec::new();
        let due = self.journal.poll(self.now(), after, limit, &mut out);
        assert!(out.iter().all(|r| r.token.id() == SYNC && matches!(r.op, DiskOp::Sync)) && out.len() < 2);
        (!out.is_empty(), due)
    }

    fn state(&self) -> (u64, u64) {
        (self.journal.written().0, self.journal.durable().0)
    }
}

const LATER: (u64, u64) = (5, 1 << 30);
const NOTHING: (bool, Option<u64>) = (false, None);
const BEGINS: (bool, Option<u64>) = (true, None);

#[test]
fn a_record_is_written_through_while_all_before_it_are_durable_or_written_through() {
    let mut r = Rig::new();
    assert!(r.append(512, true).2 && r.append(512, true).2);
    assert!(!r.append(512, true).2, "too many at once: one sync serves them all");
    assert_eq!((r.state(), r.journal.in_flight()), ((0, 0), 3));
    r.written(2);
    assert_eq!(r.state(), (0, 0), "the one before is not");
    r.written(1);
    assert_eq!((r.state(), r.journal.in_flight()), ((2, 2), 1));
    assert!(!r.append(512, true).2, "a write that is not is in flight");
    r.written(4);
    r.written(3);
    assert_eq!((r.state(), r.journal.in_flight()), ((4, 2), 0));
    assert!(!r.append(512, true).2, "written and not durable is not enough");
    r.written(5);
    assert_eq!(r.poll(LATER.0, LATER.1), BEGINS);
    assert!(!r.append(512, true).2, "nor is a sync under way");
    r.synced();
    assert_eq!(r.state(), (5, 5));
    r.written(6);
    assert_eq!((r.poll(LATER.0, LATER.1), r.state()), (BEGINS, (6, 5)));
    r.synced();
    assert!(!r.append(512, false).2, "nobody waits");
    r.written(7);
    assert_eq!(r.state(), (7, 6));
}

#[test]
fn a_sync_covers_what_was_written_when_it_began() {
    let mut r = Rig::new();
    r.append(512, false);
    r.written(1);
    r.append(512, false);
    assert_eq!(r.poll(0, 0), BEGINS);
    r.written(2);
    assert_eq!((r.poll(0, 0), r.state()), (NOTHING, (2, 0)), "one at a time");
    r.synced();
    assert_eq!(r.state(), (2, 1));
    assert_eq!(r.poll(0, 0), BEGINS);
    r.synced();
    assert_eq!((r.state(), r.poll(0, 0)), ((2, 2), NOTHING));
}

#[test]
fn an_unsynced_record_is_synced_after_a_time_or_when_there_are_many() {
    let mut r = Rig::new();
    assert_eq!((r.poll(0, 0), r.journal.unsynced()), (NOTHING, 0));
    r.now = 100;
    let first = r.append(512, false).1;
    assert_eq!((first, r.journal.unsynced(), r.journal.bytes()), (8192, 8192, 8192));
    assert_eq!(r.poll(0, 0), NOTHING, "it is not written yet");
    r.written(1);
    r.now = 103;
    r.append(512, false);
    r.written(2);
    assert_eq!((r.journal.unsynced(), r.journal.bytes()), (12288, 12288));
    assert_eq!(r.poll(5, 12289), (false, Some(105)), "since the first of them");
    r.now = 104;
    assert_eq!(r.poll(5, 12289), (false, Some(105)));
    r.now = 105;
    r.append(512, false);
    assert_eq!(r.poll(5, 1 << 30), BEGINS);
    // What is in flight now is not covered, and waits from now on.
    assert_eq!(r.journal.unsynced(), 4096);
    r.written(3);
    r.synced();
    r.now = 107;
    assert_eq!(r.poll(5, 4097), (false, Some(110)));
    assert_eq!(r.poll(5, 4096), BEGINS, "as many as the limit");
    r.synced();
    assert_eq!((r.journal.unsynced(), r.state()), (0, (3, 3)));
    r.now = 200;
    r.append(512, false);
    r.written(4);
    assert_eq!(r.poll(5, 1 << 30), (false, Some(205)));
}

#[test]
fn what_somebody_waits_for_is_synced_once_it_is_written() {
    let mut r = Rig::new();
    for _ in 0..4 {
        r.append(512, false);
    }
    assert!(!r.journal.is_wanted());
    r.journal.want(Lsn(2));
    r.journal.want(Lsn(3));
    r.written(1);
    assert!(r.journal.is_wanted());
    assert_eq!(r.poll(LATER.0, LATER.1), (false, Some(5)), "the first that is waited for is not written");
    r.written(2);
    assert_eq!(r.poll(LATER.0, LATER.1), BEGINS);
    r.synced();
    assert_eq!((r.state(), r.journal.is_wanted()), ((2, 2), true));
    assert_eq!(r.poll(LATER.0, LATER.1), NOTHING);
    r.written(3);
    assert_eq!(r.poll(LATER.0, LATER.1), BEGINS);
    r.synced();
    assert!(!r.journal.is_wanted());
    r.written(4);
    assert_eq!(r.poll(LATER.0, LATER.1), (false, Some(5)), "nobody waits for it");
    r.journal.want(Lsn(4));
    assert_eq!(r.poll(LATER.0, LATER.1), BEGINS);
    r.synced();
    // Later is a new beginning: what was waited for before counts no more.
    r.append(512, false);
    r.append(512, false);
    r.written(5);
    r.journal.want(Lsn(6));
    assert_eq!(r.poll(LATER.0, LATER.1), (false, Some(5)));
}

#[test]
fn a_journal_is_quiet_when_nothing_is_in_flight_and_all_is_durable() {
    let mut r = Rig::new();
    assert!(r.journal.is_quiet());
    r.append(512, false);
    assert!(!r.journal.is_quiet(), "in flight");
    r.written(1);
    assert!(!r.journal.is_quiet(), "not durable");
    assert_eq!(r.poll(0, 0), BEGINS);
    assert!(!r.journal.is_quiet(), "a sync is under way");
    r.synced();
    assert!(r.journal.is_quiet());
    r.append(512, true);
    r.written(2);
    assert!(r.journal.is_quiet());
    // A sync of nothing more than is durable can't be: but one that ends behind a write that was written through can.
    r.append(512, false);
    assert!(!r.journal.is_quiet());
}

/// Room is what certainly fits: as much as that can be appended, in records of any length.
#[test]
fn what_there_is_room_for_fits() {
    let mut dice = 11u64;
    let mut draw = |n: u64| {
        dice = dice.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (dice >> 33) % n
    };
    for _ in 0..30 {
        let mut r = Rig::of(4 + draw(3) as u32);
        // Somewhere, and something is kept.
        for lsn in 1..=draw(14) {
            let bytes = 512 * (1 + draw(1800)) as usize;
            if !r.journal.fits(make(r.journal.tail(), &r.sb, bytes).padded_len()) {
                break;
            }
            r.append(bytes, true);
            r.written(lsn);
            if r.poll(0, 0).0 {
                r.synced();
            }
            if draw(3) == 0 {
                r.journal.keep_after(Lsn(draw(lsn + 1)));
            }
        }
        let mut room = r.journal.room();
        loop {
            let record = make(r.journal.tail(), &r.sb, 512 * (1 + draw(2048)) as usize);
            let len = record.padded_len();
            let Some(rest) = room.checked_sub(len) else { break };
            assert!(r.journal.fits(len));
            assert!(r.journal.room() <= r.journal.geometry.len());
            r.journal.append(Now::default(), &record, false, &mut Vec::new());
            room = rest;
        }
    }
}

#[test]
fn the_room_of_a_journal_is_counted_in_segments_that_nothing_needs() {
    let mut r = Rig::new();
    let (body, rest) = (SEGMENT - BLOCK - MAX_PADDED, SEGMENT - MAX_PADDED);
    assert_eq!(r.journal.room(), 3 * body + rest);
    assert_eq!(r.journal.usage(), (0, 4 * SEGMENT));
    let take = |r: &mut Rig, bytes| {
        let lsn = r.journal.tail().point.lsn.0 + 1;
        let (_, len, dsync) = r.append(bytes, true);
        assert!(dsync);
        r.written(lsn);
        len
    };
    let first = take(&mut r, 512);
    assert_eq!((first, r.journal.usage().0), (8192, 8192));
    assert_eq!(r.journal.room(), 3 * body + rest - first);
    // Almost a whole record's length from the end no record certainly fits.
    let second = take(&mut r, 1 << 20);
    assert_eq!(r.journal.usage().0, first + second);
    assert_eq!(r.journal.room(), 3 * body);
    // The last bytes of a segment are used, and not one more.
    let left = SEGMENT - first - second;
    assert!(r.journal.fits(left) && r.journal.fits(left + 4096), "the next segment is free");
    for _ in 0..3 {
        take(&mut r, 1 << 20);
    }
    let (used, _) = r.journal.usage();
    assert_eq!((r.journal.head().segment, r.journal.room()), (4, 0));
    assert!(used > 3 * SEGMENT && r.journal.head().offset > SEGMENT / 2);
    let left = SEGMENT - r.journal.head().offset;
    assert!(r.journal.fits(left) && !r.journal.fits(left + 4096), "the next segment is the first one");
}

#[test]
fn what_is_kept_bounds_the_room_and_can_be_held_again() {
    let mut r = Rig::of(8);
    // Two records in each segment.
    for lsn in 1..=12 {
        r.append(900 << 10, true);
        r.written(lsn);
    }
    let ends: Vec<u64> = r.journal.segments().map(|s| s.before.lsn.0).collect();
    assert_eq!((ends, r.journal.head().segment), (vec![0, 2, 4, 6, 8, 10], 6));
    assert_eq!(r.journal.oldest().lsn, Lsn(0));
    let body = SEGMENT - BLOCK - MAX_PADDED;
    let here = (SEGMENT - r.journal.head().offset).saturating_sub(MAX_PADDED);
    assert_eq!(r.journal.room(), 2 * body + here);
    r.journal.keep_after(Lsn(7));
    assert_eq!(r.journal.room(), 5 * body + here, "from the segment on that has the eighth");
    r.journal.keep_after(Lsn(3));
    assert_eq!(r.journal.room(), 5 * body + here, "what was given up stays so");
    r.journal.keep_after(Lsn(8));
    assert_eq!(r.journal.room(), 6 * body + here);
    // Later ones are held; earlier ones are, if that leaves room enough.
    let whole = u64::MAX;
    assert!(r.journal.can_hold(Lsn(8), whole) && r.journal.hold_after(Lsn(8), whole));
    let enough = 4 * body + here;
    assert!(!r.journal.can_hold(Lsn(5), enough + 1) && !r.journal.hold_after(Lsn(5), enough + 1));
    assert_eq!((r.journal.room(), r.journal.keep), (6 * body + here, Lsn(8)), "nothing has changed");
    assert!(r.journal.can_hold(Lsn(5), enough) && r.journal.hold_after(Lsn(5), enough));
    assert_eq!((r.journal.room(), r.journal.keep), (enough, Lsn(5)));
    assert!(r.journal.can_hold(Lsn(4), enough) && !r.journal.can_hold(Lsn(3), enough));
}

#[test]
fn the_segment_before_what_is_kept_stays_until_something_of_the_next_is_durable() {
    let mut r = Rig::of(8);
    for lsn in 1..=4 {
        r.append(900 << 10, lsn <= 2);
        r.written(lsn);
    }
    // The third begins the second segment, and is not durable.
    assert_eq!(r.state(), (4, 2));
    let before = r.journal.room();
    r.journal.keep_after(Lsn(2));
    assert_eq!(r.journal.room(), before);
    assert!(!r.journal.can_hold(Lsn(0), before + 1) && r.journal.can_hold(Lsn(0), before));
    r.journal.keep_after(Lsn(3));
    assert!(!r.journal.can_hold(Lsn(2), before + 1) && r.journal.can_hold(Lsn(2), before));
    assert_eq!(r.poll(0, 0), BEGINS);
    r.synced();
    assert_eq!(r.journal.room(), before + SEGMENT - BLOCK - MAX_PADDED);
}

#[test]
fn a_segment_is_filled_to_its_last_byte() {
    let mut r = Rig::new();
    r.append(512, true);
    r.append(1 << 20, true);
    let left = SEGMENT - r.journal.head().offset;
    r.append(left as usize - 512, true);
    assert_eq!(r.journal.head(), Place { segment: 1, offset: SEGMENT });
    assert_eq!(r.append(512, true).1, 8192, "with the next one's header");
    assert_eq!(r.journal.head(), Place { segment: 2, offset: 8192 });
}

/// Recovery may find the end where a segment would begin that holds what is needed yet.
#[test]
fn a_full_journal_that_ends_with_a_segment_has_no_room() {
    let mut r = Rig::new();
    for lsn in 1..=8 {
        r.append(900 << 10, true);
        r.written(lsn);
    }
    let (tail, segments) = (*r.journal.tail(), r.journal.segments().copied().collect::<Vec<_>>());
    let again = |geometry, keep| {
        let head = Place { segment: 5, offset: 0 };
        let mut journal = Journal::new(1, r.sb.group, geometry, head, segments.clone(), tail);
        journal.keep_after(Lsn(keep));
        journal
    };
    let geometry = r.journal.geometry;
    assert!(!again(geometry, 1).fits(4096) && again(geometry, 2).fits(4096));
    assert!(again(Geometry { segments: 5, ..geometry }, 0).fits(4096));
}

#[test]
fn records_are_found_by_the_segments_that_hold_them() {
    let mut r = Rig::new();
    for lsn in 1..=12 {
        r.journal.keep_after(r.journal.durable());
        r.append(900 << 10, true);
        r.written(lsn);
    }
    // Of six segments the last four are retained.
    assert_eq!((r.journal.oldest().lsn, r.journal.segments().count()), (Lsn(4), 4));
    let segment = |lsn| r.journal.segment_of(Lsn(lsn));
    assert_eq!([4, 5, 6, 7, 11, 12].map(segment), [3, 3, 4, 4, 6, 6]);
    assert_eq!(segment(3), 6, "none: where the next one goes");
    let from = |lsn| r.journal.cursor(Lsn(lsn)).map(|c| c.last().lsn.0);
    assert_eq!([3, 4, 5, 6, 11].map(from), [None, Some(4), Some(4), Some(6), Some(10)]);
    // So many bytes are the newest segments, that of the head among them.
    let older = |bytes| r.journal.older_than(bytes).0;
    assert_eq!([0, SEGMENT - 1].map(older), [0, 0]);
    assert_eq!([SEGMENT, 2 * SEGMENT, 3 * SEGMENT - 1, 4 * SEGMENT].map(older), [10, 8, 8, 4]);
    assert_eq!(older(9 * SEGMENT), 4);
}

#[test]
fn after_a_failure_nothing_is_durable_any_more_and_nothing_is_asked_for() {
    for failing in [1, SYNC] {
        let mut r = Rig::new();
        r.append(512, false);
        r.append(512, false);
        if failing == SYNC {
            r.written(1);
            assert_eq!(r.poll(0, 0), BEGINS);
        }
        assert!(r.journal.complete(failing, Err(IoError::EIO)).is_err());
        assert!(r.journal.complete(2, Ok(Bytes::new())).is_err());
        r.now = 1000;
        assert_eq!((r.poll(0, 0), r.journal.durable()), (NOTHING, Lsn(0)));
    }
}

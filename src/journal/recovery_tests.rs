//! Where a recovery begins, how far it looks, and what it keeps.

use super::cursor::Place;
use super::recovery::{Outcome, Recovered};
use super::tests::{Disk, append, found, journal, recover, superblock};
use super::*;
use crate::format::superblock::{Anchor, Superblock};

const SEGMENT: u64 = 2 << 20;

/// A journal of two records in each segment, as it lies on its disk.
struct Written {
    disk: Disk,
    sb: Superblock,
    points: Vec<HistoryPoint>,
    journal: Journal,
}

fn written(records: usize) -> Written {
    let (mut disk, sb) = (Disk::new(), superblock());
    let mut journal = journal(&found(&mut disk, &sb).0, &sb);
    let mut points = vec![sb.checkpoint];
    for _ in 0..records {
        journal.keep_after(journal.durable());
        points.push(append(&mut journal, &mut disk, &sb, 900 << 10).point());
    }
    Written { disk, sb, points, journal }
}

impl Written {
    /// The image is at this record; what follows it is in that segment, or will be.
    fn checkpoint(&mut self, lsn: usize, segment: u64) {
        self.sb.checkpoint = self.points[lsn];
        self.sb.checkpoint_write = lsn as u64;
        self.sb.checkpoint_generation = self.sb.generation;
        self.sb.checkpoint_segment = segment;
        self.sb.floor = Lsn(lsn as u64);
    }

    fn erase(&mut self, segment: u64) {
        let at = Place { segment, offset: 0 }.file_offset(self.journal.geometry) as usize;
        self.disk.0[at..at + SEGMENT as usize].fill(0);
    }

    fn found(&mut self) -> (Recovered, Vec<u64>) {
        found(&mut self.disk, &self.sb)
    }

    fn stopped(&mut self) -> bool {
        matches!(recover(&mut self.disk, &self.sb, None).0, Outcome::Stopped(_))
    }
}

fn sequences(r: &Recovered) -> Vec<u64> {
    r.segments.iter().map(|s| s.sequence).collect()
}

#[test]
fn redo_begins_in_the_segment_before_one_that_was_never_durable() {
    for named in [2, 3] {
        let mut w = written(2 * named);
        w.checkpoint(2 * (named - 1), named as u64);
        w.erase(named as u64);
        let (r, seen) = w.found();
        assert_eq!((r.tail.point, seen), (w.points[2 * (named - 1)], vec![]));
        assert_eq!(r.head.segment, named as u64 - 1);
        assert_eq!(sequences(&r), (1..named as u64).collect::<Vec<_>>());
        // It goes on from there as if the lost one had never been.
        let mut j = journal(&r, &w.sb);
        append(&mut j, &mut w.disk, &w.sb, 900 << 10);
        assert_eq!(w.found().1, [2 * named as u64 - 1]);
    }
    // If that is not there either, the start is missing.
    let mut w = written(6);
    w.checkpoint(4, 3);
    w.erase(3);
    w.erase(2);
    assert!(w.stopped());
    w.sb.floor = Lsn(0);
    assert!(w.stopped(), "an image that has some of it promises the rest");
}

#[test]
fn redo_begins_in_the_segment_behind_one_that_ended_with_the_checkpoint_and_was_overwritten() {
    let mut w = written(10);
    w.checkpoint(2, 1);
    let (r, seen) = w.found();
    assert_eq!((r.tail.point, seen), (w.points[10], (3..=10).collect()));
    assert_eq!((r.head, sequences(&r)), (w.journal.head(), vec![2, 3, 4, 5]));
    // One that begins later than the checkpoint leads nowhere.
    w.checkpoint(1, 1);
    assert!(w.stopped());
}

#[test]
fn what_lies_before_the_base_is_of_another_history() {
    // It began anew behind the fourth record, and has written nothing yet.
    let mut w = written(6);
    w.checkpoint(4, 3);
    w.sb.base = Anchor { point: w.points[4], generation: w.sb.generation, last_write: 4, time: 77 };
    w.sb.base_segment = 3;
    let mut empty = Written {
        disk: Disk(w.disk.0.clone()),
        sb: w.sb.clone(),
        points: w.points.clone(),
        journal: written(0).journal,
    };
    empty.erase(3);
    let (r, seen) = empty.found();
    assert_eq!((r.tail.point, r.tail.time, seen), (w.points[4], 77, vec![]));
    assert_eq!((r.head, sequences(&r)), (Place { segment: 3, offset: 0 }, vec![]));
    // What it wrote since is kept, and nothing older.
    let (r, seen) = w.found();
    assert_eq!((seen, sequences(&r)), (vec![5, 6], vec![3]));
    // What was promised since the beginning has to be there.
    let mut lost = empty;
    lost.sb.floor = Lsn(5);
    assert!(lost.stopped());
}

/// A journal that was closed cleanly has nothing behind its end: unless it began anew in a ring that was used.
#[test]
fn what_lies_behind_a_clean_end_is_damage_but_of_an_older_history() {
    let mut w = written(8);
    w.checkpoint(2, 2);
    w.sb.clean = true;
    // The chain ends within the third segment; the fourth is what is left of something.
    let torn = 3 * SEGMENT as usize + BLOCK as usize;
    w.disk.0[torn + 5000] ^= 1;
    assert!(w.stopped());
    for (base, segment, kept) in [(2, 2, true), (0, 1, false)] {
        let mut again = Written {
            disk: Disk(w.disk.0.clone()),
            sb: w.sb.clone(),
            points: w.points.clone(),
            journal: written(0).journal,
        };
        again.sb.base = Anchor { point: w.points[base], ..Anchor::default() };
        again.sb.base_segment = segment;
        if kept {
            let (r, _) = again.found();
            assert!(r.tail.point == w.points[4] && r.cut > 0);
            assert_eq!(again.found().0.cut, 0, "it is gone");
        } else {
            assert!(again.stopped());
        }
    }
    // Once round the ring everything in it is its own.
    let mut w = written(14);
    w.checkpoint(10, 6);
    w.sb.clean = true;
    w.sb.base_segment = 2;
    w.sb.base.point = w.points[2];
    let torn = 2 * SEGMENT as usize + BLOCK as usize + 930_000;
    w.disk.0[torn] ^= 1;
    assert!(w.stopped());
}

/// Closed cleanly it was durable as a whole up to the floor, and a later segment shows by its header: nothing else is looked
/// through.
#[test]
fn a_clean_end_is_looked_behind_no_further_than_its_segment_and_at_the_headers() {
    let mut w = written(8);
    w.checkpoint(2, 2);
    w.erase(3);
    // Records lie two segments behind the end.
    for (clean, floor, header, stops) in [
        (false, 4, false, false),
        (true, 4, false, false),
        (true, 4, true, true),
        (true, 5, false, true),
        (false, 5, false, true),
    ] {
        let (disk, sb, points) = (Disk(w.disk.0.clone()), w.sb.clone(), w.points.clone());
        let mut again = Written { disk, sb, points, journal: written(0).journal };
        (again.sb.clean, again.sb.floor) = (clean, Lsn(floor));
        if !header {
            let fourth = Place { segment: 4, offset: 0 }.file_offset(again.journal.geometry) as usize;
            again.disk.0[fourth..][..BLOCK as usize].fill(0);
        }
        let case = format!("clean {clean}, floor {floor}, header {header}");
        if stops {
            assert!(again.stopped(), "{case}");
            continue;
        }
        let (r, _) = again.found();
        assert_eq!((r.tail.point, r.cut > 0), (again.points[4], !clean), "{case}");
    }
}

#[test]
fn only_what_the_own_last_run_wrote_says_what_was_durable() {
    let torn = |change: fn(&mut Superblock), own: fn(&mut Superblock)| {
        let (mut disk, mut sb) = (Disk::new(), superblock());
        own(&mut sb);
        let mut j = journal(&found(&mut disk, &sb).0, &sb);
        for i in 1..=4 {
            if i == 4 {
                j.tail.durable = Lsn(3);
            }
            append(&mut j, &mut disk, &sb, 512);
        }
        // The second is lost: the fourth says that the third was durable.
        disk.0[SEGMENT as usize + 12288..][..4096].fill(0);
        change(&mut sb);
        matches!(recover(&mut disk, &sb, None).0, Outcome::Stopped(_))
    };
    assert!(torn(|_| {}, |_| {}));
    assert!(!torn(|sb| sb.generation.start += 1, |_| {}), "an earlier run");
    assert!(!torn(|_| {}, |sb| sb.node = crate::units::NodeId(9)), "another node's, which this one followed");
}

#[test]
fn the_time_of_the_last_record_is_known_whatever_the_journal_holds() {
    let mut w = written(4);
    let (r, _) = w.found();
    assert_eq!((r.tail.time, r.tail.last_write, r.tail.point), (4, 4, w.points[4]));
    // That of the checkpoint, too: by its record, or by the header of the segment that begins there.
    for (lsn, segment) in [(0, 1), (1, 1), (2, 2), (3, 2)] {
        w.checkpoint(lsn, segment);
        assert_eq!(w.found().0.checkpoint_time, lsn as u64);
    }
    // Of a segment that has no records yet, its header tells.
    w.checkpoint(2, 2);
    w.disk.0[2 * SEGMENT as usize + BLOCK as usize..3 * SEGMENT as usize].fill(0);
    let (r, seen) = w.found();
    assert_eq!((r.tail.time, r.tail.last_write, r.tail.point, seen.len()), (2, 2, w.points[2], 0));
    assert_eq!(r.tail.generation, w.sb.generation);
}

#[test]
fn a_superblock_and_a_journal_that_do_not_belong_together_are_noticed() {
    for (lsn, segment) in [(1, 1), (2, 2), (3, 2), (4, 3), (6, 4)] {
        let mut w = written(6);
        w.checkpoint(lsn, segment);
        assert_eq!(w.found().1, (lsn as u64 + 1..=6).collect::<Vec<_>>());
        w.sb.checkpoint.hash.0[7] ^= 1;
        let copy = w.disk.0.clone();
        match recover(&mut w.disk, &w.sb, None).0 {
            Outcome::Stopped(text) => assert!(lsn == 6 || text.contains("do not belong together"), "{text}"),
            other => panic!("{other:?}"),
        }
        assert!(w.disk.0 == copy, "nothing is changed");
    }
    // At the very beginning it may name no hash.
    let mut w = written(3);
    w.sb.checkpoint.hash = crate::units::Hash::default();
    assert_eq!(w.found().1, [1, 2, 3]);
}

/// It took up another history at an earlier record: what its ring has of the old one is neither kept nor found again.
#[test]
fn headers_of_a_history_that_was_given_up_are_not_kept() {
    let mut w = written(8);
    let elsewhere = HistoryPoint { lsn: Lsn(1), hash: crate::units::Hash([9; 32]) };
    w.points[1] = elsewhere;
    w.checkpoint(1, 3);
    w.sb.base = Anchor { point: elsewhere, ..Anchor::default() };
    w.sb.base_segment = 3;
    let (r, seen) = w.found();
    assert_eq!((r.tail.point, seen, sequences(&r)), (elsewhere, vec![], vec![]));
    assert_eq!(r.head, Place { segment: 3, offset: 0 });
    let (r, _) = w.found();
    assert_eq!((r.cut, sequences(&r)), (0, vec![]));
}

/// The end of the last segment of the ring is the end of the file.
#[test]
fn nothing_is_erased_behind_a_segment_that_is_full() {
    let (mut disk, sb) = (Disk::new(), superblock());
    let mut j = journal(&found(&mut disk, &sb).0, &sb);
    let rest = SEGMENT - BLOCK - 1_052_672;
    let mut points = Vec::new();
    for len in [900 << 10, 900 << 10, 900 << 10, 900 << 10, 1 << 20, rest as usize - 512, 512] {
        points.push(append(&mut j, &mut disk, &sb, len).point());
    }
    assert_eq!(j.head(), Place { segment: 4, offset: 8192 });
    let (outcome, _) = recover(&mut disk, &sb, Some(points[5]));
    let Outcome::Found(r) = outcome else { panic!("{outcome:?}") };
    assert_eq!((r.tail.point, r.head), (points[5], Place { segment: 3, offset: SEGMENT }));
    assert_eq!(found(&mut disk, &sb).0.tail.point, points[5]);
}

//! What a cursor reads, and what it takes for the end: on a journal whose every byte is known.

use super::cursor::{CHUNK, Cursor, Place, Step};
use super::tests::{make, superblock};
use super::*;
use bytes::Bytes;

const SEGMENT: u64 = 2 << 20;
const G: Geometry = Geometry { segment: SEGMENT, segments: 4 };

/// A file of `G`, and the places of its records, which are so many bytes long.
fn journal(lengths: &[usize]) -> (Vec<u8>, Vec<(Record, Place)>) {
    let sb = superblock();
    let tail =
        Tail { point: sb.checkpoint, generation: sb.generation, last_write: 0, time: 0, durable: Lsn(0) };
    let mut journal = Journal::new(1, sb.group, G, Place { segment: 1, offset: 0 }, vec![], tail);
    let (mut file, mut records) = (vec![0; G.len() as usize], Vec::new());
    for len in lengths {
        journal.keep_after(journal.durable());
        let record = make(journal.tail(), &sb, *len);
        let mut out = Vec::new();
        journal.append(Now::default(), &record, true, &mut out);
        let DiskOp::Write { offset, data, .. } = &out[0].op else { panic!("{out:?}") };
        file[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
        journal.complete(record.stamp.lsn.0, Ok(Bytes::new())).unwrap();
        let place =
            Place { segment: journal.head().segment, offset: journal.head().offset - record.padded_len() };
        records.push((record, place));
    }
    (file, records)
}

fn cursor(segment: u64, before: HistoryPoint) -> Cursor {
    Cursor::new(G, superblock().group, segment, before)
}

/// The next step that is not a read, and the reads before it as (offset, length).
fn next(cursor: &mut Cursor, file: &[u8], end: Option<Place>) -> (Step, Vec<(u64, u64)>) {
    let mut reads = Vec::new();
    loop {
        match cursor.step(end) {
            Step::Read(DiskOp::Read { offset, len }) => {
                assert!(offset + len as u64 <= G.len() && reads.len() < 9, "{reads:?}");
                reads.push((offset, len as u64));
                cursor.feed(Bytes::copy_from_slice(&file[offset as usize..offset as usize + len]));
            }
            step => return (step, reads),
        }
    }
}

fn place(segment: u64, offset: u64) -> Place {
    Place { segment, offset }
}

#[test]
fn a_place_lies_in_the_lap_of_the_ring_that_its_segment_is_in() {
    assert_eq!(place(1, 4096).file_offset(G), SEGMENT + 4096);
    assert_eq!(place(4, 8192).file_offset(G), 8192);
    assert_eq!(place(11, 0).file_offset(G), 3 * SEGMENT);
}

#[test]
fn every_record_is_yielded_with_its_place_and_read_once() {
    let (file, records) = journal(&[512, 900 << 10, 900 << 10, 900 << 10, 512]);
    let mut at = cursor(1, superblock().checkpoint);
    let mut reads = Vec::new();
    for (record, place) in &records {
        let (step, more) = next(&mut at, &file, None);
        assert!(matches!(step, Step::Record(r, p) if r == *record && p == *place));
        assert_eq!((at.last(), at.segment()), (record.point(), place.segment));
        reads.extend(more);
    }
    // A segment is read to its end, and the next one from its start.
    assert_eq!((records[2].1.segment, records[3].1.segment), (1, 2));
    let first: Vec<_> = reads.iter().filter(|(at, _)| at / SEGMENT == 1).copied().collect();
    assert_eq!(first[0], (SEGMENT, CHUNK));
    assert_eq!(reads.len(), first.len() + 1);
    assert_eq!(reads.last(), Some(&(2 * SEGMENT, CHUNK)));
    let end = place(2, records[4].1.offset + records[4].0.padded_len());
    let (step, _) = next(&mut at, &file, None);
    assert!(matches!(step, Step::Gap(p) if p == end), "{step:?}");
}

#[test]
fn no_more_is_read_than_the_end_asks_for() {
    let (file, records) = journal(&[512, 512, 512, 1 << 20, 512]);
    let end = place(1, records[1].1.offset + 4096);
    let mut at = cursor(1, superblock().checkpoint);
    let (_, reads) = next(&mut at, &file, Some(end));
    assert_eq!(reads, [(SEGMENT, end.offset)]);
    assert_eq!(next(&mut at, &file, Some(end)).1, [], "the second is in what was read");
    // Behind it: as much as there is.
    let (step, reads) = next(&mut at, &file, Some(end));
    assert!(matches!(step, Step::Record(r, _) if r.stamp.lsn == Lsn(3)));
    assert_eq!(reads, [(SEGMENT + end.offset, SEGMENT - end.offset)]);
    // From within the segment on, too.
    let mut at = cursor(1, superblock().checkpoint);
    at.pass(&records[0].0, records[0].1);
    assert_eq!(next(&mut at, &file, Some(end)).1, [(SEGMENT + 8192, end.offset - 8192)]);
    // An end in another segment bounds nothing.
    let mut at = cursor(1, superblock().checkpoint);
    assert_eq!(next(&mut at, &file, Some(place(2, 4096))).1, [(SEGMENT, SEGMENT)]);
}

#[test]
fn larger_chunks_are_read_and_smaller_ones_are_not() {
    let large = Geometry { segment: 16 << 20, segments: 4 };
    let mut lengths = Vec::new();
    for most in [512, CHUNK, CHUNK + 4096, 4 << 20, 64 << 20] {
        let mut at = Cursor::new(large, superblock().group, 1, superblock().checkpoint).with_chunks(most);
        let Step::Read(DiskOp::Read { len, .. }) = at.step(None) else { panic!() };
        lengths.push(len as u64);
    }
    assert_eq!(lengths, [CHUNK, CHUNK, CHUNK + 4096, 4 << 20, 16 << 20]);
}

#[test]
fn a_segment_that_does_not_continue_the_chain_is_a_gap_where_the_chain_ended() {
    let (file, records) = journal(&[900 << 10, 900 << 10, 900 << 10, 512]);
    let (last, third) = (&records[1], &records[2]);
    assert_eq!((last.1.segment, third.1), (1, place(2, 4096)));
    let end = place(1, last.1.offset + last.0.padded_len());
    let gap = |file: &[u8]| {
        let mut at = cursor(1, superblock().checkpoint);
        loop {
            match next(&mut at, file, None).0 {
                Step::Record(..) => continue,
                Step::Gap(p) => return (at.last().lsn.0, p),
                Step::Read(_) => unreachable!(),
            }
        }
    };
    let header = |file: &mut Vec<u8>, change: fn(&mut SegmentHeader)| {
        let block = &mut file[2 * SEGMENT as usize..][..4096];
        let mut header = SegmentHeader::decode(block).unwrap();
        change(&mut header);
        block.copy_from_slice(&header.encode());
    };
    let changes: [fn(&mut SegmentHeader); 4] = [
        |h| h.group = GroupId([9; 16]),
        |h| h.sequence = 6,
        |h| h.before.hash.0[0] ^= 1,
        |h| h.before.lsn = Lsn(1),
    ];
    for change in changes {
        let mut other = file.clone();
        header(&mut other, change);
        assert_eq!(gap(&other), (2, end));
    }
    // At the very start there is nothing before.
    let mut other = file.clone();
    other[SEGMENT as usize] ^= 1;
    assert_eq!(gap(&other), (0, place(1, 0)));
    // A record that is spoilt, or another's: the chain ends before it.
    let second = (SEGMENT + last.1.offset) as usize;
    for at in [second, second + 50, second + 130, second + 5000] {
        let mut other = file.clone();
        other[at] ^= 1;
        assert_eq!(gap(&other), (1, last.1), "{at}");
    }
    let mut elsewhere = superblock();
    elsewhere.group = GroupId([7; 16]);
    let tail = tail_of(&records[0].0);
    let foreign = make(&tail, &elsewhere, 900 << 10);
    let wrong = [
        make(&Tail { point: HistoryPoint { lsn: Lsn(2), ..tail.point }, ..tail }, &superblock(), 900 << 10),
        make(
            &Tail { point: HistoryPoint { hash: crate::units::Hash([1; 32]), ..tail.point }, ..tail },
            &superblock(),
            900 << 10,
        ),
        foreign,
    ];
    for record in wrong {
        let mut other = file.clone();
        other[second..second + record.padded_len() as usize].copy_from_slice(&record.journal_bytes());
        assert_eq!(gap(&other), (1, last.1));
    }
    assert_eq!(gap(&file).0, 4);
}

/// What was read before it was written is read again before it is taken for the end.
#[test]
fn what_was_written_since_it_was_read_is_found() {
    let (file, records) = journal(&[512, 512]);
    let second = (SEGMENT + records[1].1.offset) as usize;
    for spoilt in [second, second + 300] {
        let mut before = file.clone();
        before[spoilt..second + 4096].fill(0);
        let mut at = cursor(1, superblock().checkpoint);
        assert!(matches!(next(&mut at, &before, None).0, Step::Record(..)));
        let (step, reads) = next(&mut at, &file, None);
        assert!(matches!(step, Step::Record(r, _) if r == records[1].0));
        assert_eq!(reads.len(), 1);
    }
}

#[test]
fn a_record_never_reaches_over_the_end_of_its_segment() {
    // One that fills a segment to its last byte is read.
    let (file, records) = journal(&[512, 1 << 20, (SEGMENT - 8192 - 1_052_672) as usize - 512, 512]);
    let mut at = cursor(1, superblock().checkpoint);
    for (record, place) in &records {
        let (step, _) = next(&mut at, &file, None);
        assert!(matches!(step, Step::Record(r, p) if r == *record && p == *place));
    }
    assert_eq!((records[2].1.segment, records[3].1), (1, place(2, 4096)));
    // A header that says so much that it would reach over it is not believed.
    let at_third = (SEGMENT + records[2].1.offset) as usize;
    let mut long = file.clone();
    let record = make(&tail_of(&records[1].0), &superblock(), 1 << 20);
    let room = (2 * SEGMENT) as usize - at_third;
    long[at_third..2 * SEGMENT as usize].copy_from_slice(&record.journal_bytes()[..room]);
    let mut at = cursor(1, superblock().checkpoint);
    let ends: Vec<_> = (0..3).map(|_| next(&mut at, &long, None).0).collect();
    assert!(matches!(ends[2], Step::Gap(p) if p == records[2].1), "{:?}", ends[2]);
}

#[test]
fn a_cursor_passes_what_it_is_told_to_pass() {
    let (file, records) = journal(&[512, 512, 512]);
    let mut at = cursor(1, superblock().checkpoint);
    at.pass_header();
    let (step, reads) = next(&mut at, &file, None);
    assert!(matches!(step, Step::Record(r, _) if r == records[0].0));
    assert_eq!(reads, [(SEGMENT + BLOCK, SEGMENT - BLOCK)]);
    at.pass(&records[1].0, records[1].1);
    assert_eq!(at.last(), records[1].0.point());
    assert!(matches!(next(&mut at, &file, None).0, Step::Record(r, _) if r == records[2].0));
}

#[test]
fn the_last_block_of_a_segment_holds_a_record() {
    let (file, records) =
        journal(&[512, 1 << 20, (SEGMENT - 8192 - 1_052_672) as usize - 4096 - 512, 512, 512]);
    assert_eq!((records[3].1, records[4].1), (place(1, SEGMENT - BLOCK), place(2, BLOCK)));
    let mut at = cursor(1, superblock().checkpoint);
    for (record, place) in &records {
        let (step, _) = next(&mut at, &file, None);
        assert!(matches!(step, Step::Record(r, p) if r == *record && p == *place));
    }
}

//! Reading the retained journal again, to find what its disk has spoilt, and putting it right.
//!
//! A record's bytes are the same on every node, so whoever has it can give it back; a segment's header follows
//! from what is known of the segment.
//!
//! Owns: the position. Invariant: what is being read or written is held (see [`Scrub::hold`]), so a place is never
//! taken for spoilt, or written, because the journal has come round to it.

use super::cursor::{self, Cursor, Place};
use super::{Journal, Segment};
use crate::disk::{DiskOp, aligned, freeze};
use crate::format::record::Record;
use crate::format::segment::SegmentHeader;
use crate::units::{BLOCK, Lsn};

/// Journal bytes that must stay free for what comes meanwhile.
const ROOM: u64 = 8 << 20;
/// Bytes read at a time.
const CHUNK: u64 = 4 << 20;

/// What is to be done next.
#[derive(Debug)]
pub enum Step {
    /// Read this of the journal, then [`Scrub::feed`].
    Read(DiskOp),
    /// This record can't be read; it lay at this byte of the file. [`Scrub::restore`] it, or [`Scrub::pass_over`].
    Record(Lsn, u64),
    /// The header of a segment can't be read; it lay at this byte. Write this, then go on.
    Header(u64, DiskOp),
    /// That was all.
    Done,
}

struct Walk {
    cursor: Cursor,
    segment: Segment,
    /// The last record to be looked for in it.
    end: Lsn,
    /// Where the chain breaks.
    gap: Option<Place>,
}

/// See the module's documentation.
pub struct Scrub {
    /// Everything up to here is durable.
    upto: Lsn,
    /// Sequence of the segment after the one that is being read.
    next: u64,
    walk: Option<Walk>,
    /// Bytes read.
    pub read: u64,
}

impl Scrub {
    /// Of the records up to `upto`, which are durable.
    pub fn new(upto: Lsn) -> Scrub {
        Scrub { upto, next: 0, walk: None, read: 0 }
    }

    /// The records after this one are not to be overwritten.
    pub fn hold(&self) -> Option<Lsn> {
        self.walk.as_ref().map(|w| w.segment.before.lsn)
    }

    /// What to do next. The caller does nothing else of this journal's past meanwhile.
    pub fn step(&mut self, journal: &mut Journal) -> Step {
        loop {
            let Some(walk) = &mut self.walk else {
                if self.begin_segment(journal) {
                    continue;
                }
                return Step::Done;
            };
            if walk.cursor.last().lsn >= walk.end {
                self.walk = None;
                continue;
            }
            let place = match walk.cursor.step(None) {
                cursor::Step::Record(..) => continue,
                cursor::Step::Read(op) => return Step::Read(op),
                cursor::Step::Gap(place) => place,
            };
            let at = place.file_offset(journal.geometry);
            if place.offset == 0 {
                let op = DiskOp::Write { offset: at, data: header(journal, &walk.segment), dsync: true };
                walk.cursor.pass_header();
                return Step::Header(at, op);
            }
            walk.gap = Some(place);
            return Step::Record(walk.cursor.last().lsn.next(), at);
        }
    }

    fn begin_segment(&mut self, journal: &mut Journal) -> bool {
        let mut list = journal.segments.iter().skip_while(|s| s.sequence < self.next);
        let Some(segment) = list.next().copied().filter(|s| s.before.lsn < self.upto) else { return false };
        let end = list.next().map_or(self.upto, |next| next.before.lsn.min(self.upto));
        self.next = segment.sequence + 1;
        // What is about to be overwritten, whoever needs it, is not worth a throttled writer.
        if journal.hold_after(segment.before.lsn, ROOM) {
            let cursor = Cursor::new(journal.geometry, journal.group, segment.sequence, segment.before);
            let cursor = cursor.with_chunks(CHUNK);
            self.walk = Some(Walk { cursor, segment, end, gap: None });
        }
        true
    }

    /// Bytes of the answer to [`Step::Read`].
    pub fn feed(&mut self, bytes: bytes::Bytes) {
        self.read += bytes.len() as u64;
        if let Some(walk) = &mut self.walk {
            walk.cursor.feed(bytes);
        }
    }

    /// The record that could not be read: the write that puts it back, and it goes on behind it. `None`: it is
    /// not the one that belongs there.
    pub fn restore(&mut self, record: &Record, journal: &Journal) -> Option<DiskOp> {
        let walk = self.walk.as_mut()?;
        let (last, place) = (walk.cursor.last(), walk.gap.take()?);
        let fits = place.offset + record.padded_len() <= journal.geometry.segment;
        if record.stamp.lsn != last.lsn.next() || record.stamp.prev != last.hash || !fits {
            return None;
        }
        walk.cursor.pass(record, place);
        let offset = place.file_offset(journal.geometry);
        Some(DiskOp::Write { offset, data: record.journal_bytes(), dsync: true })
    }

    /// Nobody has it: the rest of the segment can't be looked at.
    pub fn pass_over(&mut self) {
        self.walk = None;
    }
}

fn header(journal: &Journal, segment: &Segment) -> bytes::Bytes {
    let Segment { sequence, before, generation, last_write, time } = *segment;
    let header = SegmentHeader { group: journal.group, sequence, before, generation, last_write, time };
    let mut block = aligned(BLOCK as usize);
    block.extend_from_slice(&header.encode());
    freeze(block)
}

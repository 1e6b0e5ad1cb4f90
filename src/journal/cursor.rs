//! Reading records out of the journal, in order, from a known place on.
//!
//! Owns: the walk over records and segments. Invariant: what it yields continues the chain from
//! where it began, record by record; anything else is a gap.

use crate::disk::DiskOp;
use crate::format::record::{Header, Record, padded};
use crate::format::segment::SegmentHeader;
use crate::format::superblock::Geometry;
use crate::units::{BLOCK, GroupId, HistoryPoint};
use bytes::Bytes;

/// Bytes read at a time; more than any record.
pub const CHUNK: u64 = 2 << 20;

/// A position in the journal: a segment by its sequence, and a byte offset within it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// Sequence of the segment.
    pub segment: u64,
    /// Bytes from its start.
    pub offset: u64,
}

impl Place {
    /// Byte offset in the journal's file.
    pub fn file_offset(self, g: Geometry) -> u64 {
        self.segment % u64::from(g.segments) * g.segment + self.offset
    }
}

/// What the cursor wants next.
#[derive(Debug)]
pub enum Step {
    /// The next record and where it lies.
    Record(Record, Place),
    /// Read this of the journal, then [`Cursor::feed`].
    Read(DiskOp),
    /// Nothing that continues the chain lies at this place.
    Gap(Place),
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Cursor {
    geometry: Geometry,
    group: GroupId,
    place: Place,
    last: HistoryPoint,
    chunk: Bytes,
    chunk_at: Place,
    /// The end of a segment's records: the next segment is being tried.
    gap: Option<Place>,
    /// Bytes read at a time.
    most: u64,
}

impl Cursor {
    /// Begins at the start of segment `segment`, whose first record follows `before`.
    pub fn new(geometry: Geometry, group: GroupId, segment: u64, before: HistoryPoint) -> Cursor {
        let place = Place { segment, offset: 0 };
        let (chunk, chunk_at) = (Bytes::new(), place);
        Cursor { geometry, group, place, last: before, chunk, chunk_at, gap: None, most: CHUNK }
    }

    /// Reads more at a time: what is left of a chunk behind its last whole record is read twice.
    pub fn with_chunks(self, most: u64) -> Cursor {
        Cursor { most: most.max(CHUNK), ..self }
    }

    /// The last record yielded, or where it began.
    pub fn last(&self) -> HistoryPoint {
        self.last
    }

    /// Sequence of the segment that it is in.
    pub fn segment(&self) -> u64 {
        self.place.segment
    }

    /// Bytes of the answer to [`Step::Read`].
    pub fn feed(&mut self, bytes: Bytes) {
        self.chunk_at = self.place;
        self.chunk = bytes;
    }

    /// Goes on behind `record`, which belongs at `place`.
    pub fn pass(&mut self, record: &Record, place: Place) {
        self.place = Place { offset: place.offset + record.padded_len(), ..place };
        (self.last, self.gap) = (record.point(), None);
    }

    /// Goes on behind the header of the segment at whose start it is, which continues the chain.
    pub fn pass_header(&mut self) {
        self.place.offset = BLOCK;
        self.gap = None;
    }

    /// What is there, or what is needed to know. `end`: nothing beyond it needs to be read.
    pub fn step(&mut self, end: Option<Place>) -> Step {
        loop {
            let rest = self.geometry.segment - self.place.offset;
            if rest < BLOCK {
                self.try_next();
                continue;
            }
            let Some(bytes) = self.ahead(BLOCK) else { return self.read(rest, end) };
            if self.place.offset == 0 {
                let header = SegmentHeader::decode(&bytes);
                let continues = header.is_ok_and(|h| {
                    h.group == self.group && h.sequence == self.place.segment && h.before == self.last
                });
                if !continues {
                    return Step::Gap(self.gap.unwrap_or(self.place));
                }
                self.gap = None;
                self.place.offset = BLOCK;
                continue;
            }
            let header = Header::decode(&bytes).ok().filter(|h| {
                let next = self.last.lsn.next();
                h.stamp.group == self.group && h.stamp.lsn == next && h.stamp.prev == self.last.hash
            });
            // What was read a while ago may have been written since: look again before it is a gap.
            let fresh = self.chunk_at == self.place;
            let len = header.map(|h| padded(h.len) as u64).filter(|len| *len <= rest);
            let whole = len.and_then(|len| self.ahead(len));
            if whole.is_none() && !fresh {
                return self.read(rest, end);
            }
            match whole.map(Record::decode) {
                Some(Ok(record)) => {
                    let place = self.place;
                    self.place.offset += record.padded_len();
                    self.last = record.point();
                    return Step::Record(record, place);
                }
                Some(Err(_)) if !fresh => return self.read(rest, end),
                _ => self.try_next(),
            }
        }
    }

    fn try_next(&mut self) {
        self.gap = Some(self.place);
        self.place = Place { segment: self.place.segment + 1, offset: 0 };
    }

    /// The next `len` bytes, if the chunk has them.
    fn ahead(&self, len: u64) -> Option<Bytes> {
        if self.chunk_at.segment != self.place.segment {
            return None;
        }
        let from = self.place.offset.checked_sub(self.chunk_at.offset)? as usize;
        let to = from + len as usize;
        (to <= self.chunk.len()).then(|| self.chunk.slice(from..to))
    }

    fn read(&self, rest: u64, end: Option<Place>) -> Step {
        let known = match end {
            Some(end) if end.segment == self.place.segment && end.offset > self.place.offset => {
                end.offset - self.place.offset
            }
            _ => rest,
        };
        let len = known.min(self.most).min(rest) as usize;
        Step::Read(DiskOp::Read { offset: self.place.file_offset(self.geometry), len })
    }
}

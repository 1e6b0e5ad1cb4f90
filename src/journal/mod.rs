//! The journal: a ring of segments that holds records in order, and knows which are durable.
//!
//! Owns: the place of the next record, the durability of the ones before, and what may be
//! overwritten. Invariants: a record is announced durable only after an fdatasync (or its own
//! RWF_DSYNC) that followed its write and those of all records before it (I3); a failed write or
//! sync latches (I10); nothing after `keep` is ever overwritten.

pub mod cursor;
pub mod maps;
pub mod recovery;
pub mod scrub;

use crate::disk::{DiskOp, DiskRequest, DiskResult, File, IoError, Token, aligned, freeze};
use crate::format::record::{MAX_PADDED, Record};
use crate::format::segment::SegmentHeader;
use crate::format::superblock::Geometry;
use crate::units::{BLOCK, Generation, GroupId, HistoryPoint, Lsn, Now};
use cursor::{Cursor, Place};
use std::collections::VecDeque;

/// A retained segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Segment {
    /// Its sequence.
    pub sequence: u64,
    /// The record before its first.
    pub before: HistoryPoint,
    /// That record's generation.
    pub generation: Generation,
    /// That record's last write sequence.
    pub last_write: u64,
    /// That record's time.
    pub time: u64,
}

/// The newest record, as what follows it needs to know it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tail {
    /// Its place in the history.
    pub point: HistoryPoint,
    /// Its generation.
    pub generation: Generation,
    /// Its last write sequence.
    pub last_write: u64,
    /// Its time.
    pub time: u64,
    /// The durable LSN that it carries.
    pub durable: Lsn,
}

struct Append {
    lsn: Lsn,
    bytes: u64,
    dsync: bool,
    done: bool,
}

/// See the module's documentation.
pub struct Journal {
    owner: u8,
    group: GroupId,
    geometry: Geometry,
    head: Place,
    segments: VecDeque<Segment>,
    tail: Tail,
    appends: VecDeque<Append>,
    written: Lsn,
    durable: Lsn,
    sync: Option<Lsn>,
    /// The newest record that somebody waits for, and a lower bound of the oldest.
    wanted: Lsn,
    first_wanted: Lsn,
    /// Bytes that no sync in flight covers, and since when there are any.
    unsynced: u64,
    unsynced_since: Option<u64>,
    keep: Lsn,
    busy_from: u64,
    bytes: u64,
    failed: bool,
}

/// The token of a sync; appends have their LSN.
const SYNC: u64 = 0;
/// Appends with RWF_DSYNC in flight at once; beyond it one fdatasync serves many.
const DSYNC_DEPTH: usize = 2;

impl Journal {
    /// A journal that goes on after `tail`, at `head`; everything in it is durable. `segments` are
    /// the retained ones, oldest first; the last is the one that `head` lies in, unless `head` is at
    /// the start of one that is not opened yet. `owner` marks its requests' tokens.
    pub fn new(
        owner: u8,
        group: GroupId,
        geometry: Geometry,
        head: Place,
        segments: Vec<Segment>,
        tail: Tail,
    ) -> Journal {
        let mut journal = Journal {
            owner,
            group,
            geometry,
            head,
            segments: segments.into(),
            appends: VecDeque::new(),
            written: tail.point.lsn,
            durable: tail.point.lsn,
            sync: None,
            wanted: Lsn(0),
            first_wanted: Lsn(0),
            unsynced: 0,
            unsynced_since: None,
            keep: Lsn(0),
            busy_from: 0,
            bytes: 0,
            failed: false,
            tail,
        };
        journal.keep_after(Lsn(0));
        journal
    }

    /// The newest record.
    pub fn tail(&self) -> &Tail {
        &self.tail
    }
    /// Newest record whose write, and all before it, completed.
    pub fn written(&self) -> Lsn {
        self.written
    }
    /// Newest durable record.
    pub fn durable(&self) -> Lsn {
        self.durable
    }
    /// Where the next record goes.
    pub fn head(&self) -> Place {
        self.head
    }
    /// Records that are written and not durable, bytes.
    pub fn unsynced(&self) -> u64 {
        self.unsynced
    }
    /// Bytes appended since the start.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
    /// Appends in flight.
    pub fn in_flight(&self) -> usize {
        self.appends.len()
    }
    /// Nothing is in flight, and everything is durable.
    pub fn is_quiet(&self) -> bool {
        self.appends.is_empty() && self.sync.is_none() && self.durable == self.tail.point.lsn
    }
    /// Whether somebody waits for a record that is not durable yet.
    pub fn is_wanted(&self) -> bool {
        self.wanted > self.durable
    }
    /// The point from which the retained segments continue.
    pub fn oldest(&self) -> HistoryPoint {
        self.segments.front().map_or(self.tail.point, |s| s.before)
    }
    /// The retained segments, oldest first.
    pub fn segments(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter()
    }
    /// Bytes in use (held for redo or for a peer), and altogether.
    pub fn usage(&self) -> (u64, u64) {
        let whole = self.head.segment.saturating_sub(self.busy_from);
        (whole * self.geometry.segment + self.head.offset, self.geometry.len())
    }

    /// Records after `keep` must not be overwritten. Never goes back. The segment that ends with
    /// `keep` is kept until a record of the next one is durable: recovery may have to begin in it.
    pub fn keep_after(&mut self, keep: Lsn) {
        self.keep = self.keep.max(keep);
        // Called at every completion, and a large journal has thousands of segments: what was passed
        // once stays passed, because neither `keep` nor `durable` goes back.
        let oldest = self.segments.front().map_or(self.head.segment, |s| s.sequence);
        let mut free = self.busy_from.saturating_sub(oldest) as usize;
        let passed = |next: &Segment| next.before.lsn <= self.keep && next.before.lsn < self.durable;
        while self.segments.get(free + 1).is_some_and(passed) {
            free += 1;
        }
        let first = self.segments.get(free).map_or(self.head.segment, |s| s.sequence);
        self.busy_from = first.min(self.head.segment);
    }

    /// Records after `lsn` must not be overwritten from now on, although `keep` was further: somebody
    /// is to read them. `false`, and nothing changed, when less than `room` bytes would be left.
    pub fn hold_after(&mut self, lsn: Lsn, room: u64) -> bool {
        if lsn >= self.keep {
            // It is being held already, however full the journal is.
            return true;
        }
        let before = (self.keep, self.busy_from);
        self.keep = lsn;
        self.busy_from = 0;
        self.keep_after(self.keep);
        let enough = self.room() >= room;
        if !enough {
            (self.keep, self.busy_from) = before;
        }
        enough
    }

    /// Whether [`Journal::hold_after`] would succeed now.
    pub fn can_hold(&self, lsn: Lsn, room: u64) -> bool {
        let after = self.segments.partition_point(|s| s.before.lsn <= lsn && s.before.lsn < self.durable);
        let first = self.segments.get(after.saturating_sub(1)).map_or(self.head.segment, |s| s.sequence);
        lsn >= self.keep || self.room_from(first.min(self.head.segment)) >= room
    }

    /// Bytes of records that certainly find room without overwriting anything kept.
    pub fn room(&self) -> u64 {
        self.room_from(self.busy_from)
    }

    fn room_from(&self, busy_from: u64) -> u64 {
        let busy = self.head.segment - busy_from + 1;
        let free = u64::from(self.geometry.segments).saturating_sub(busy);
        let fits = |space: u64| space.saturating_sub(MAX_PADDED);
        free * fits(self.geometry.segment - BLOCK) + fits(self.geometry.segment - self.head.offset)
    }

    /// Whether this many padded bytes can be appended as one record now.
    pub fn fits(&self, len: u64) -> bool {
        let offset = self.head.offset.max(BLOCK);
        let here = offset + len <= self.geometry.segment && self.head.offset > 0;
        here || {
            let next = if self.head.offset == 0 { self.head.segment } else { self.head.segment + 1 };
            next - self.busy_from < u64::from(self.geometry.segments)
        }
    }

    /// Appends the next record. `wanted`: somebody waits until it is durable. The caller has asked
    /// [`Journal::fits`] and has checked the chain. Where in the file it lies.
    pub fn append(&mut self, now: Now, record: &Record, wanted: bool, out: &mut Vec<DiskRequest>) -> u64 {
        debug_assert!(
            record.stamp.prev == self.tail.point.hash && record.stamp.lsn == self.tail.point.lsn.next()
        );
        let len = record.padded_len();
        let data = if self.head.offset == 0 || self.head.offset + len > self.geometry.segment {
            self.open_segment();
            let header = SegmentHeader {
                group: self.group,
                sequence: self.head.segment,
                before: self.tail.point,
                generation: self.tail.generation,
                last_write: self.tail.last_write,
                time: self.tail.time,
            };
            let mut both = aligned((BLOCK + len) as usize);
            both.extend_from_slice(&header.encode());
            both.extend_from_slice(&record.journal_bytes());
            freeze(both)
        } else {
            record.journal_bytes()
        };
        // RWF_DSYNC makes this write durable and says nothing of others, so those must be, or become so.
        let pending = self.appends.len() < DSYNC_DEPTH && self.appends.iter().all(|a| a.dsync);
        let dsync = wanted && pending && self.written == self.durable;
        let (offset, bytes) = (self.head.file_offset(self.geometry), data.len() as u64);
        let token = Token::new(self.owner, record.stamp.lsn.0);
        out.push(DiskRequest { token, file: File::Journal, op: DiskOp::Write { offset, data, dsync } });
        self.appends.push_back(Append { lsn: record.stamp.lsn, bytes, dsync, done: false });
        self.head.offset += bytes;
        self.bytes += bytes;
        self.tail = tail_of(record);
        if !dsync {
            self.unsynced += bytes;
            self.unsynced_since.get_or_insert(now.mono);
        }
        if wanted {
            self.want(record.stamp.lsn);
        }
        self.head.file_offset(self.geometry) - len
    }

    fn open_segment(&mut self) {
        if self.head.offset > 0 {
            self.head = Place { segment: self.head.segment + 1, offset: 0 };
        }
        let Tail { point: before, generation, last_write, time, .. } = self.tail;
        let sequence = self.head.segment;
        self.segments.push_back(Segment { sequence, before, generation, last_write, time });
        while self.segments.len() > self.geometry.segments as usize {
            self.segments.pop_front();
        }
    }

    /// Somebody waits until everything up to `lsn` is durable.
    pub fn want(&mut self, lsn: Lsn) {
        if self.wanted <= self.durable {
            self.first_wanted = lsn;
        }
        self.wanted = self.wanted.max(lsn);
    }

    /// Begins a sync when it is due: somebody waits and his records are written, or the oldest
    /// unsynced one is `after` ns old, or `limit` bytes wait. The next deadline otherwise.
    pub fn poll(&mut self, now: Now, after: u64, limit: u64, out: &mut Vec<DiskRequest>) -> Option<u64> {
        if self.sync.is_some() || self.failed || self.written <= self.durable {
            return None;
        }
        let deadline = self.unsynced_since.unwrap_or(now.mono) + after;
        let waited_for = self.wanted > self.durable && self.written >= self.first_wanted;
        if !waited_for && now.mono < deadline && self.unsynced < limit {
            return Some(deadline);
        }
        self.sync = Some(self.written);
        self.unsynced = self.appends.iter().filter(|a| !a.dsync).map(|a| a.bytes).sum();
        self.unsynced_since = (self.unsynced > 0).then_some(now.mono);
        out.push(DiskRequest { token: Token::new(self.owner, SYNC), file: File::Journal, op: DiskOp::Sync });
        None
    }

    /// The answer to a request of this journal.
    pub fn complete(&mut self, id: u64, result: DiskResult) -> Result<(), IoError> {
        if let Err(e) = result {
            self.failed = true;
            return Err(e);
        }
        if self.failed {
            return Err(IoError::EIO);
        }
        if id == SYNC {
            let covered = self.sync.take().expect("a sync was in flight");
            self.durable = self.durable.max(covered);
        } else if let Some(a) = self.appends.iter_mut().find(|a| a.lsn.0 == id) {
            a.done = true;
        }
        while let Some(a) = self.appends.front().filter(|a| a.done) {
            if a.dsync && self.durable == self.written {
                self.durable = a.lsn;
            }
            self.written = a.lsn;
            self.appends.pop_front();
        }
        self.keep_after(self.keep);
        Ok(())
    }

    /// The record up to which all must be given up, so that the rest takes no more than about `bytes`.
    pub fn older_than(&self, bytes: u64) -> Lsn {
        let whole = bytes / self.geometry.segment;
        let first = (self.head.segment + 1).saturating_sub(whole);
        self.segments.iter().find(|s| s.sequence >= first).map_or(Lsn(0), |s| s.before.lsn)
    }

    /// Something to read by, from the first record after `lsn` on (or a little before it).
    /// `None` when it is no longer, or not yet, here.
    pub fn cursor(&self, lsn: Lsn) -> Option<Cursor> {
        let after = self.segments.partition_point(|s| s.before.lsn <= lsn);
        let segment = self.segments.get(after.checked_sub(1)?)?;
        Some(Cursor::new(self.geometry, self.group, segment.sequence, segment.before))
    }

    /// Sequence of the segment that holds the record after `lsn`, or will.
    pub fn segment_of(&self, lsn: Lsn) -> u64 {
        let after = self.segments.partition_point(|s| s.before.lsn <= lsn);
        let found = after.checked_sub(1).and_then(|i| self.segments.get(i));
        found.map_or(self.head.segment, |s| s.sequence)
    }
}

/// What follows a record needs to know of it.
pub fn tail_of(record: &Record) -> Tail {
    Tail {
        point: record.point(),
        generation: record.stamp.generation,
        last_write: record.stamp.last_write,
        time: record.stamp.time,
        durable: record.stamp.durable,
    }
}

#[cfg(test)]
mod cursor_tests;
#[cfg(test)]
mod durability_tests;
#[cfg(test)]
mod recovery_tests;
#[cfg(test)]
mod tests;

//! A primary that serves before its image has caught up: reads through the journal, while that drains into the image.
//!
//! Owns: reads that wait for a disk, the records that they need, and the drain. Invariants: a read sees, of each sector,
//! the newest of write cache, backlog and backing, as they were when it was submitted (I2); no record is served that
//! does not verify as the one that was appended (I12); as long as the drain lasts nothing goes from the write cache into
//! the backings, so nothing older is put over it. A cache that fills up meanwhile leaves its durable records to the
//! journal, which holds them too. A crash finds a journal to be put into the image, as any crash does.

use super::BACKLOG;
use super::event::Level;
use super::primary::{Primary, ReadFor, Stage};
use super::run::{Part, Run};
use crate::apply::backlog::Held;
use crate::disk::{DiskOp, DiskRequest, DiskResult, File, IoError, Token, aligned, freeze};
use crate::format::record::Record;
use crate::units::{Extent, Lsn};
use bytes::Bytes;
use std::collections::{BTreeSet, VecDeque};

/// Payload bytes of records that were read last and are kept: others want the rest of them.
const RECENT: usize = 16 << 20;
/// So many records at most.
const MOST_RECENT: usize = 128;

/// A read that waits for a disk.
pub struct PendingRead {
    pub(super) whose: ReadFor,
    extent: Extent,
    /// What the cache held when the read was submitted.
    newer: Vec<(Extent, Option<Bytes>)>,
    /// What records hold that are not in the backing; what of that is to come.
    older: Vec<(Extent, Option<Bytes>)>,
    wanted: Vec<(Extent, Held)>,
    backing: Below,
    /// A record went into the image before it could be read: all is looked up anew.
    again: bool,
    /// A record could not be read, and the backing is awaited.
    failed: Option<IoError>,
}

enum Below {
    Unneeded,
    Awaited,
    Here(DiskResult),
}

impl PendingRead {
    /// `held`: the parts that lie in records; `needed`: not everything does.
    pub(super) fn new(
        whose: ReadFor,
        extent: Extent,
        newer: Vec<(Extent, Option<Bytes>)>,
        held: Vec<(Extent, Held)>,
        needed: bool,
    ) -> PendingRead {
        let backing = if needed { Below::Awaited } else { Below::Unneeded };
        let (older, again, failed) = (Vec::new(), false, None);
        PendingRead { whose, extent, newer, older, wanted: held, backing, again, failed }
    }

    fn is_done(&self) -> bool {
        self.wanted.is_empty() && !matches!(self.backing, Below::Awaited)
    }

    fn needs(&self, lsn: Lsn) -> bool {
        self.wanted.iter().any(|(_, held)| held.lsn == lsn)
    }

    /// Takes what the records at hand have of it.
    fn find(&mut self, records: &Records) {
        for (part, held) in std::mem::take(&mut self.wanted) {
            let bytes = match held.at {
                None => None,
                Some(at) => match records.get(held.lsn) {
                    Some(payload) => Some(payload.slice(at as usize..(at + part.len()) as usize)),
                    None => {
                        self.wanted.push((part, held));
                        continue;
                    }
                },
            };
            self.older.push((part, bytes));
        }
    }

    fn finish(self) -> (ReadFor, DiskResult) {
        let base = match self.backing {
            Below::Here(Err(e)) => return (self.whose, Err(e)),
            Below::Here(Ok(bytes)) if self.older.is_empty() && self.newer.is_empty() => {
                return (self.whose, Ok(bytes));
            }
            Below::Here(Ok(bytes)) => bytes,
            Below::Unneeded | Below::Awaited => Bytes::new(),
        };
        let mut buf = aligned(self.extent.len() as usize);
        buf.extend_from_slice(&base);
        buf.resize(self.extent.len() as usize, 0);
        for (part, data) in self.older.iter().chain(&self.newer) {
            let at = (part.start() - self.extent.start()) as usize;
            let to = &mut buf[at..at + part.len() as usize];
            match data {
                Some(data) => to.copy_from_slice(data),
                None => to.fill(0),
            }
        }
        (self.whose, Ok(freeze(buf)))
    }
}

/// Records that reads need.
#[derive(Default)]
pub struct Records {
    /// On their way from the journal: the request, the record, the reads that wait for it.
    coming: Vec<(u64, Lsn, Vec<usize>)>,
    /// Payloads, the last one that came at the end.
    recent: VecDeque<(Lsn, Bytes)>,
    bytes: usize,
}

impl Records {
    fn get(&self, lsn: Lsn) -> Option<&Bytes> {
        self.recent.iter().rev().find(|(l, _)| *l == lsn).map(|(_, bytes)| bytes)
    }

    fn keep(&mut self, lsn: Lsn, payload: Bytes) {
        self.bytes += payload.len();
        self.recent.push_back((lsn, payload));
        while (self.bytes > RECENT || self.recent.len() > MOST_RECENT) && self.recent.len() > 1 {
            self.bytes -= self.recent.pop_front().map_or(0, |(_, b)| b.len());
        }
    }

    fn forget(&mut self) {
        (self.recent, self.bytes) = (VecDeque::new(), 0);
    }
}

impl Run {
    /// A primary that recovers may serve at once, when all that its image lacks can be read from the journal.
    pub(super) fn begin_drain(&mut self) -> bool {
        let (applied, end) = (self.image.applied.point.lsn, self.journal.tail().point.lsn);
        let free = !self.is_asking() && !self.is_retiring() && !self.admin.is_promoting();
        let idle = self.checkpoint_idle();
        let Part::Primary(p) = &mut self.part else { return false };
        let early = p.stage == Stage::Redo && applied < end && free && idle;
        if !early || !self.backlog.reaches(applied, end) {
            return false;
        }
        self.backlog.cover(end);
        p.drain = Some(end);
        let left = end.0 - applied.0;
        self.log(Level::Info, format!("serving while {left} records go from the journal into the backing"));
        true
    }

    /// Records that have yet to go into the image, and their bytes in the journal.
    pub(super) fn drain_left(&self) -> (u64, u64) {
        let applied = self.image.applied.point.lsn.0;
        match &self.part {
            Part::Primary(Primary { drain: Some(upto), .. }) => {
                (upto.0.saturating_sub(applied), self.backlog.bytes())
            }
            _ => (0, 0),
        }
    }

    /// The image has everything up to here.
    pub(super) fn drained(&mut self, applied: Lsn) {
        let Part::Primary(p) = &mut self.part else { return };
        if p.drain.is_some_and(|upto| applied < upto) {
            return;
        }
        p.drain = None;
        p.records.forget();
        p.dirty_since = (!p.tails.is_empty()).then_some(self.now.mono);
        self.backlog.clear();
        self.log(Level::Info, format!("the backing has caught up, to LSN {applied}"));
    }

    /// The cache is full: what is durable in the journal, up to `durable`, is read from there as well.
    pub(super) fn spill(&mut self, durable: Lsn) -> bool {
        let Some(end) = self.backlog.end() else { return false };
        let Part::Primary(p) = &mut self.part else { return false };
        let Some(cache) = &mut p.cache else { return false };
        let here = p.tails.partition_point(|t| t.point.lsn <= durable.min(end));
        let Some(upto) = p.tails.drain(..here).next_back() else { return false };
        self.backlog.cover(upto.point.lsn);
        let written: Vec<Extent> = cache.dirty_up_to(upto.last_write).map(|(e, _)| e).collect();
        cache.written_back(written.into_iter(), upto.last_write);
        p.drain = Some(upto.point.lsn);
        true
    }

    /// Looks for the records that a read needs.
    pub(super) fn find_records(&mut self, key: usize) {
        let Part::Primary(p) = &mut self.part else { return };
        let Some(read) = p.reads.get_mut(key) else { return };
        read.find(&p.records);
        let missing: BTreeSet<Lsn> = read.wanted.iter().map(|(_, held)| held.lsn).collect();
        for lsn in missing {
            if let Some(record) = self.feed.get(lsn) {
                let Ok(payload) = record.payload() else { return self.record_lost(lsn) };
                p.records.keep(lsn, payload);
                read.find(&p.records);
                continue;
            }
            if let Some((.., keys)) = p.records.coming.iter_mut().find(|c| c.1 == lsn) {
                keys.push(key);
                continue;
            }
            let place = self.backlog.place(lsn).expect("the index names what is here");
            self.read_ids += 1;
            p.records.coming.push((self.read_ids, lsn, vec![key]));
            let (token, offset) = (Token::new(BACKLOG, self.read_ids), place.offset);
            let op = DiskOp::Read { offset, len: place.len as usize };
            self.disk.push(DiskRequest { token, file: File::Journal, op });
        }
        self.settle_read(key);
    }

    /// A record was read.
    pub(super) fn record_read(&mut self, id: u64, result: DiskResult) {
        let Part::Primary(p) = &mut self.part else { return };
        let Some(at) = p.records.coming.iter().position(|c| c.0 == id) else { return };
        let (_, lsn, keys) = p.records.coming.swap_remove(at);
        let place = self.backlog.place(lsn);
        let record = match result {
            Ok(bytes) => Record::decode(bytes).ok(),
            // As on a disk: what can't be read fails alone.
            Err(e) => return self.fail_reads(&keys, lsn, e),
        };
        let whole = record.filter(|r| place.is_some_and(|p| p.point == r.point()));
        match (place, whole.map(|r| r.payload())) {
            (_, Some(Ok(payload))) => {
                p.records.keep(lsn, payload);
                for key in keys {
                    let Part::Primary(Primary { reads, records, .. }) = &mut self.part else { return };
                    if let Some(read) = reads.get_mut(key) {
                        read.find(records);
                    }
                    self.settle_read(key);
                }
            }
            // It is in the image by now, and its place may be another record's.
            (None, _) => keys.into_iter().for_each(|key| self.read_again(key, lsn)),
            (Some(_), _) => self.record_lost(lsn),
        }
    }

    fn read_again(&mut self, key: usize, lsn: Lsn) {
        let Part::Primary(p) = &mut self.part else { return };
        if let Some(read) = p.reads.get_mut(key).filter(|r| r.needs(lsn)) {
            read.again = true;
            read.wanted.clear();
            self.settle_read(key);
        }
    }

    fn fail_reads(&mut self, keys: &[usize], lsn: Lsn, e: IoError) {
        for key in keys {
            let Part::Primary(p) = &mut self.part else { return };
            let Some(read) = p.reads.get_mut(*key).filter(|r| r.needs(lsn)) else { continue };
            read.wanted.clear();
            match &mut read.backing {
                Below::Awaited => read.failed = Some(e),
                answered => *answered = Below::Here(Err(e)),
            }
            self.settle_read(*key);
        }
    }

    fn record_lost(&mut self, lsn: Lsn) {
        self.fail(format!(
            "record {lsn} is not readable in the journal, but the image needs it: the journal's disk has lost data. \
             Promote another shadow or resync this node"
        ));
    }

    /// The answer to a read of the backing. A failed read fails its request alone.
    pub(super) fn read_done(&mut self, key: u64, result: DiskResult) {
        let Part::Primary(p) = &mut self.part else { return };
        let Some(read) = p.reads.get_mut(key as usize) else { return };
        read.backing = Below::Here(read.failed.take().map_or(result, Err));
        self.settle_read(key as usize);
    }

    /// Answers a read if it has everything.
    fn settle_read(&mut self, key: usize) {
        let Part::Primary(p) = &mut self.part else { return };
        if !p.reads.get(key).is_some_and(PendingRead::is_done) {
            return;
        }
        let read = p.reads.remove(key);
        if read.again {
            return self.read(read.whose, read.extent);
        }
        let (whose, result) = read.finish();
        self.read_answer(whose, result);
    }
}

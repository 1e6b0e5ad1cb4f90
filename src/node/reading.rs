//! Reads of an image that may lack what the journal has: of the disk, and of the records that are not in it yet.
//!
//! Owns: reads that wait for a disk, and the records that they need. Invariants: a read sees, of each sector, the newest
//! of what was laid over it (a write cache), the backlog's index and the backing, as they were when it was submitted
//! (I2); no record is served that does not verify as the one that was appended (I12).

use super::event::RequestId;
use super::run::{Part, Run};
use super::{BACKLOG, FRONT};
use crate::apply::backlog::Held;
use crate::disk::{DiskOp, DiskRequest, DiskResult, File, IoError, Token, aligned, freeze};
use crate::format::record::Record;
use crate::units::{Extent, Lsn};
use bytes::Bytes;
use slab::Slab;
use std::collections::{BTreeSet, VecDeque};

/// Payload bytes of records that were read last and are kept: others want the rest of them.
const RECENT: usize = 16 << 20;
/// So many records at most.
const MOST_RECENT: usize = 128;

/// For whom an image is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReadFor {
    /// A front end of the primary.
    Front(RequestId),
    /// A comparison; the number of its call.
    Compare(usize),
    /// A view; the number of its call.
    View(usize),
}

/// Parts of a read, each with its bytes, or `None` for zeroes.
pub type Parts = Vec<(Extent, Option<Bytes>)>;

/// A read that waits for a disk.
struct Pending {
    /// Until it is answered.
    whose: Option<ReadFor>,
    extent: Extent,
    /// What was over the image when the read was submitted.
    newer: Parts,
    /// What records hold that are not in the backing; what of that is to come.
    older: Parts,
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

impl Pending {
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

    fn finish(self) -> DiskResult {
        let base = match self.backing {
            Below::Here(Ok(bytes)) if self.older.is_empty() && self.newer.is_empty() => return Ok(bytes),
            Below::Here(result) => result?,
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
        Ok(freeze(buf))
    }
}

/// Records that reads need.
#[derive(Default)]
struct Records {
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
}

/// See the module's documentation.
#[derive(Default)]
pub struct Reading {
    pending: Slab<Pending>,
    records: Records,
}

impl Reading {
    /// Somebody waits for a disk.
    pub fn is_busy(&self) -> bool {
        self.pending.iter().any(|(_, read)| read.whose.is_some())
    }

    /// Nobody waits for anything any more. What the disks have of it comes to nothing.
    pub fn take_all(&mut self) -> Vec<ReadFor> {
        self.pending.iter_mut().filter_map(|(_, read)| read.whose.take()).collect()
    }
}

impl Run {
    /// Reads the image, with what the journal has and it lacks, under `newer`.
    pub(super) fn read_below(&mut self, whose: ReadFor, extent: Extent, newer: Parts) {
        let wanted: Vec<_> = self.backlog.parts(extent).collect();
        let needed = wanted.iter().map(|(e, _)| e.len()).sum::<u64>() < extent.len();
        let backing = if needed { Below::Awaited } else { Below::Unneeded };
        let (whose, older, again, failed) = (Some(whose), Vec::new(), false, None);
        let read = Pending { whose, extent, newer, older, wanted, backing, again, failed };
        let key = self.reading.pending.insert(read);
        if needed {
            let file = File::Backing(extent.address().volume());
            let op = DiskOp::Read { offset: extent.address().offset(), len: extent.len() as usize };
            self.disk.push(DiskRequest { token: Token::new(FRONT, key as u64), file, op });
        }
        self.find_records(key);
    }

    /// Looks for the records that a read needs.
    fn find_records(&mut self, key: usize) {
        let Reading { pending, records } = &mut self.reading;
        let read = &mut pending[key];
        read.find(records);
        let missing: BTreeSet<Lsn> = read.wanted.iter().map(|(_, held)| held.lsn).collect();
        for lsn in missing {
            if let Some(record) = self.feed.get(lsn) {
                let Ok(payload) = record.payload() else { return self.record_lost(lsn, &[key]) };
                records.keep(lsn, payload);
                read.find(records);
                continue;
            }
            if let Some((.., keys)) = records.coming.iter_mut().find(|c| c.1 == lsn) {
                keys.push(key);
                continue;
            }
            let place = self.backlog.place(lsn).expect("the index names what is here");
            self.read_ids += 1;
            records.coming.push((self.read_ids, lsn, vec![key]));
            let (token, offset) = (Token::new(BACKLOG, self.read_ids), place.offset);
            let op = DiskOp::Read { offset, len: place.len as usize };
            self.disk.push(DiskRequest { token, file: File::Journal, op });
        }
        self.settle_read(key);
    }

    /// A record was read.
    pub(super) fn record_read(&mut self, id: u64, result: DiskResult) {
        let coming = &mut self.reading.records.coming;
        let Some(at) = coming.iter().position(|c| c.0 == id) else { return };
        let (_, lsn, keys) = coming.swap_remove(at);
        let place = self.backlog.place(lsn);
        let record = match result {
            Ok(bytes) => Record::decode(bytes).ok(),
            // As on a disk: what can't be read fails alone.
            Err(e) => return self.fail_reads(&keys, lsn, e),
        };
        let whole = record.filter(|r| place.is_some_and(|p| p.point == r.point()));
        match (place, whole.map(|r| r.payload())) {
            (_, Some(Ok(payload))) => {
                self.reading.records.keep(lsn, payload);
                for key in keys {
                    let Reading { pending, records } = &mut self.reading;
                    if let Some(read) = pending.get_mut(key) {
                        read.find(records);
                    }
                    self.settle_read(key);
                }
            }
            // It is in the image by now, and its place may be another record's.
            (None, _) => keys.into_iter().for_each(|key| self.read_again(key, lsn)),
            (Some(_), _) => self.record_lost(lsn, &keys),
        }
    }

    /// Nobody reads through the journal any more. What is on its way is looked for elsewhere.
    pub(super) fn stop_reading_through(&mut self) {
        self.backlog.close();
        for (_, lsn, keys) in std::mem::take(&mut self.reading.records).coming {
            keys.into_iter().for_each(|key| self.read_again(key, lsn));
        }
    }

    fn read_again(&mut self, key: usize, lsn: Lsn) {
        if let Some(read) = self.reading.pending.get_mut(key).filter(|r| r.needs(lsn)) {
            read.again = true;
            read.wanted.clear();
            self.settle_read(key);
        }
    }

    fn fail_reads(&mut self, keys: &[usize], lsn: Lsn, e: IoError) {
        for key in keys {
            let Some(read) = self.reading.pending.get_mut(*key).filter(|r| r.needs(lsn)) else { continue };
            read.wanted.clear();
            match &mut read.backing {
                Below::Awaited => read.failed = Some(e),
                answered => *answered = Below::Here(Err(e)),
            }
            self.settle_read(*key);
        }
    }

    /// On a shadow it is as with any sector that can't be read: whoever applies the record will say so.
    fn record_lost(&mut self, lsn: Lsn, keys: &[usize]) {
        if matches!(self.part, Part::Shadow(_)) {
            return self.fail_reads(keys, lsn, IoError::EIO);
        }
        self.fail(format!(
            "record {lsn} is not readable in the journal, but the image needs it: the journal's disk has lost data. \
             Promote another shadow or resync this node"
        ));
    }

    /// The answer to a read of the backing. A failed read fails its request alone.
    pub(super) fn read_done(&mut self, key: u64, result: DiskResult) {
        let Some(read) = self.reading.pending.get_mut(key as usize) else { return };
        read.backing = Below::Here(read.failed.take().map_or(result, Err));
        self.settle_read(key as usize);
    }

    /// Answers a read if it has everything.
    fn settle_read(&mut self, key: usize) {
        if !self.reading.pending.get(key).is_some_and(Pending::is_done) {
            return;
        }
        let read = self.reading.pending.remove(key);
        let Some(whose) = read.whose else { return };
        if read.again {
            return match whose {
                ReadFor::View(_) => self.read_below(whose, read.extent, Vec::new()),
                ReadFor::Front(_) | ReadFor::Compare(_) => self.read(whose, read.extent),
            };
        }
        self.read_answer(whose, read.finish());
    }

    pub(super) fn read_answer(&mut self, whose: ReadFor, result: DiskResult) {
        match whose {
            ReadFor::Front(id) => self.complete(id, result),
            ReadFor::Compare(call) => self.compared_read(call, result),
            ReadFor::View(call) => self.view_read_done(call, result),
        }
    }
}

//! Records on their way to whoever follows: from memory when recent, from the journal otherwise.
//!
//! Owns: the recent records, and the readers of the older ones. Invariant: a record that is not
//! written to the journal yet is always in memory.

use crate::disk::{DiskRequest, DiskResult, File, IoError, Token};
use crate::format::record::Record;
use crate::journal::Journal;
use crate::journal::cursor::{Cursor, Step};
use crate::units::Lsn;
use std::collections::VecDeque;

/// The recent records.
pub struct Feed {
    records: VecDeque<Record>,
    bytes: u64,
    cap: u64,
}

impl Feed {
    /// Keeps about `cap` bytes.
    pub fn new(cap: u64) -> Feed {
        Feed { records: VecDeque::new(), bytes: 0, cap }
    }

    /// The next record. Older ones go when there are too many, but only those up to `written`.
    pub fn push(&mut self, record: Record, written: Lsn) {
        self.bytes += record.padded_len();
        self.records.push_back(record);
        while self.bytes > self.cap
            && let Some(r) = self.records.front().filter(|r| r.stamp.lsn <= written)
        {
            self.bytes -= r.padded_len();
            self.records.pop_front();
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.records.clear();
        self.bytes = 0;
    }

    /// The record with this LSN, if it is here.
    pub fn get(&self, lsn: Lsn) -> Option<&Record> {
        let first = self.records.front()?.stamp.lsn;
        self.records.get(lsn.0.checked_sub(first.0)? as usize)
    }
}

/// One follower's way through the journal.
#[derive(Default)]
pub struct Reader {
    cursor: Option<Cursor>,
    /// The record for which the cursor was made.
    made_for: Lsn,
    /// Id of the read in flight.
    pending: Option<u64>,
    /// A read failed: what it was for is not to be had.
    unreadable: bool,
}

/// What [`Reader::fetch`] found.
pub enum Fetched {
    /// The record.
    Ready(Record),
    /// It is being read.
    Pending,
    /// The journal does not have it (any more).
    Lost,
}

impl Reader {
    /// The record with this LSN. `owner` and `ids` name the reads.
    pub fn fetch(
        &mut self,
        lsn: Lsn,
        feed: &Feed,
        journal: &Journal,
        (owner, ids): (u8, &mut u64),
        out: &mut Vec<DiskRequest>,
    ) -> Fetched {
        if let Some(record) = feed.get(lsn) {
            return Fetched::Ready(record.clone());
        }
        if self.unreadable {
            return Fetched::Lost;
        }
        if self.pending.is_some() || lsn > journal.written() {
            return Fetched::Pending;
        }
        // Where memory has fed this follower for a while, what lies between is not read.
        let segment = journal.segment_of(lsn.prev());
        let far = |c: &Cursor| c.last().lsn.next() != lsn && c.segment() < segment;
        if self.cursor.as_ref().is_none_or(|c| c.last().lsn >= lsn || far(c)) {
            self.cursor = journal.cursor(lsn.prev());
            self.made_for = lsn;
        }
        let Some(cursor) = &mut self.cursor else { return Fetched::Lost };
        loop {
            match cursor.step(Some(journal.head())) {
                Step::Record(record, _) if record.stamp.lsn == lsn => return Fetched::Ready(record),
                Step::Record(..) => {}
                Step::Read(op) => {
                    *ids += 1;
                    self.pending = Some(*ids);
                    out.push(DiskRequest { token: Token::new(owner, *ids), file: File::Journal, op });
                    return Fetched::Pending;
                }
                // Memory may have fed this follower for so long that the journal went round meanwhile.
                Step::Gap(_) if self.made_for != lsn => {
                    let Some(again) = journal.cursor(lsn.prev()) else { return Fetched::Lost };
                    *cursor = again;
                    self.made_for = lsn;
                }
                Step::Gap(_) => {
                    self.cursor = None;
                    return Fetched::Lost;
                }
            }
        }
    }

    /// The answer to a read, if it is this reader's: `None` otherwise.
    pub fn complete(&mut self, id: u64, result: &DiskResult) -> Option<Result<(), IoError>> {
        self.pending.take_if(|p| *p == id)?;
        Some(result.clone().map(|bytes| {
            if let Some(cursor) = &mut self.cursor {
                cursor.feed(bytes);
            }
        }))
    }

    /// The journal can't be read where this reader is.
    pub fn give_up(&mut self) {
        self.unreadable = true;
    }

    /// Starts over, once no read is in flight: the journal was cut or begun anew.
    pub fn reset(&mut self) {
        self.cursor = None;
    }

    /// No read is in flight.
    pub fn is_idle(&self) -> bool {
        self.pending.is_none()
    }
}

//! The journal of a shadow, read again at the end of a comparison: what its disk has spoilt is put back from
//! the primary's copy.
//!
//! Owns: the reads and writes of that. Invariants: one at a time; a record is written only where it belongs in
//! the chain; while it lasts, the journal is not cut or begun anew under it.

use super::SCRUB;
use super::event::{Level, LinkId};
use super::run::Run;
use crate::disk::{DiskOp, DiskRequest, DiskResult, File, Token};
use crate::format::message::Message;
use crate::format::record::Record;
use crate::journal::scrub::{Scrub, Step};
use crate::units::Lsn;

/// A journal that is being read.
pub struct Scrubbing {
    scrub: Scrub,
    repair: bool,
    wait: Wait,
    /// Nobody wants it any more; it is here for the request that is in flight.
    ended: bool,
    /// Numbers its requests: an answer to an earlier one is not this one's.
    serial: u64,
    /// What was found since it was last asked.
    pub(super) found: Vec<Spoilt>,
}

/// A part of the journal that could not be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Spoilt {
    /// Byte of the journal's file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// It could not be put back.
    pub lost: bool,
}

enum Wait {
    Nothing,
    Disk,
    /// For the primary's copy of a record, asked for on this link.
    Copy {
        lsn: Lsn,
        offset: u64,
        asked: Option<LinkId>,
    },
    Over,
}

impl Scrubbing {
    /// Bytes read.
    pub(super) fn read(&self) -> u64 {
        self.scrub.read
    }
    /// All of it was read.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.wait, Wait::Over)
    }
}

impl Run {
    /// Begins to read the journal. `repair`: what is spoilt is put back.
    pub(super) fn begin_scrub(&mut self, repair: bool) {
        let serial = self.compare.serial();
        let scrub = Scrub::new(self.journal.durable());
        self.scrub =
            Some(Scrubbing { scrub, repair, wait: Wait::Nothing, ended: false, serial, found: Vec::new() });
    }

    /// Records after these are being read again.
    pub(super) fn scrub_holds(&self) -> Option<Lsn> {
        self.scrub.as_ref().and_then(|s| s.scrub.hold())
    }

    /// Gives it up, at once or with its last request: until then its place in the journal is held.
    pub(super) fn end_scrub(&mut self) {
        match &mut self.scrub {
            Some(s) if matches!(s.wait, Wait::Disk) => s.ended = true,
            Some(_) => {
                self.scrub = None;
                self.update_keep();
            }
            None => {}
        }
    }

    /// Moves it on; whether anything moved.
    pub(super) fn pump_scrub(&mut self) -> bool {
        let link = self.links.receiving();
        let Some(s) = self.scrub.as_mut().filter(|s| !s.ended) else { return false };
        match &mut s.wait {
            Wait::Disk | Wait::Over => return false,
            Wait::Copy { lsn, asked, .. } => {
                let lsn = *lsn;
                let Some(link) = link.filter(|l| *asked != Some(*l)) else { return false };
                *asked = Some(link);
                self.send(link, Message::AskCopy { lsn });
                return true;
            }
            Wait::Nothing => {}
        }
        match s.scrub.step(&mut self.journal) {
            Step::Read(op) => self.scrub_asks(op),
            Step::Header(offset, op) => {
                s.found.push(Spoilt { offset, len: crate::units::BLOCK, lost: false });
                if s.repair {
                    self.scrub_asks(op);
                }
            }
            Step::Record(lsn, offset) => match self.feed.get(lsn).cloned() {
                Some(record) => self.scrub_restores(&record, offset),
                None => s.wait = Wait::Copy { lsn, offset, asked: None },
            },
            Step::Done => s.wait = Wait::Over,
        }
        self.update_keep();
        true
    }

    fn scrub_asks(&mut self, op: DiskOp) {
        let Some(s) = &mut self.scrub else { return };
        s.wait = Wait::Disk;
        self.disk.push(DiskRequest { token: Token::new(SCRUB, s.serial), file: File::Journal, op });
    }

    fn scrub_restores(&mut self, record: &Record, offset: u64) {
        let Some(s) = &mut self.scrub else { return };
        let restored = s.scrub.restore(record, &self.journal);
        let lost = restored.is_none();
        s.found.push(Spoilt { offset, len: record.padded_len(), lost });
        s.wait = Wait::Nothing;
        match restored.filter(|_| s.repair) {
            Some(op) => self.scrub_asks(op),
            None if lost => s.scrub.pass_over(),
            None => {}
        }
    }

    /// The primary's answer to a question for a copy.
    pub(super) fn copy_came(&mut self, record: Option<Record>) {
        let Some(s) = &mut self.scrub else { return };
        let Wait::Copy { lsn, offset, .. } = s.wait else { return };
        match record.filter(|r| r.stamp.lsn == lsn) {
            Some(record) => self.scrub_restores(&record, offset),
            None => {
                s.found.push(Spoilt { offset, len: crate::units::BLOCK, lost: true });
                s.scrub.pass_over();
                s.wait = Wait::Nothing;
                let text = format!(
                    "record {lsn} can't be read in the journal here, and the primary no longer has it: it is \
                     needed only for a restart until the next checkpoint in a later segment"
                );
                self.log(Level::Error, text);
            }
        }
    }

    /// The answer to one of its requests.
    pub(super) fn scrub_done(&mut self, serial: u64, result: DiskResult) {
        let Some(s) = self.scrub.as_mut().filter(|s| s.serial == serial) else { return };
        s.wait = Wait::Nothing;
        if s.ended {
            return self.end_scrub();
        }
        match result {
            Ok(bytes) if !bytes.is_empty() => s.scrub.feed(bytes),
            Ok(_) => {}
            Err(e) => {
                s.scrub.pass_over();
                self.log(Level::Error, format!("a part of the journal can't be read or written: {e}"));
            }
        }
    }
}

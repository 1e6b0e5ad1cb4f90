//! Marks: named places in the write order.
//!
//! Owns: the marks that were asked for, and those that the journal holds. Invariants: whatever completed before a
//! mark was asked for is in a record before its record, and what is submitted after its answer in one after it (I2);
//! it is answered, and told as known, once it is durable in the own journal (I3).

use super::event::{Action, AdminId, Answer, Refusal};
use super::run::{Part, Run};
use super::status::{MarkStatus, rfc3339};
use crate::cache::worst_case;
use crate::format::record::{Kind, MAX_MARK, Record, flags, is_mark};
use crate::units::{HistoryPoint, Lsn};
use std::collections::VecDeque;

/// Marks asked for and not answered, at most.
const MAX_ASKED: usize = 16;
/// Marks of the journal that are remembered, at most: the newest.
const MAX_KNOWN: usize = 1024;

/// A mark that is in the journal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mark {
    /// Its record.
    pub at: HistoryPoint,
    /// When it was sealed, ns since 1970.
    pub time: u64,
    /// Its text.
    pub text: String,
}

impl Mark {
    /// The mark that a record is, if it is one.
    pub fn of(record: &Record) -> Option<Mark> {
        (record.stamp.kind == Kind::Mark).then_some(())?;
        Some(Mark { at: record.point(), time: record.stamp.time, text: record.mark()? })
    }
}

impl From<&Mark> for MarkStatus {
    fn from(m: &Mark) -> MarkStatus {
        let hash = m.at.hash.0.iter().map(|b| format!("{b:02x}")).collect();
        let time = rfc3339(m.time).unwrap_or_default();
        MarkStatus { text: m.text.clone(), lsn: m.at.lsn.0, time, hash }
    }
}

struct Asked {
    id: AdminId,
    text: String,
    /// Closed epochs that come before it.
    before: usize,
    /// Its place in the pipeline, then its record.
    job: Option<u64>,
    lsn: Option<Lsn>,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Marks {
    asked: Vec<Asked>,
    /// In the journal, and not yet durable there.
    fresh: VecDeque<Mark>,
    /// Durable there, oldest first.
    known: VecDeque<Mark>,
}

impl Marks {
    /// Those that recovery found.
    pub fn new(found: VecDeque<Mark>) -> Marks {
        Marks { fresh: found, ..Marks::default() }
    }

    /// Adds one to those that recovery has found.
    pub fn find(found: &mut VecDeque<Mark>, record: &Record) {
        found.extend(Mark::of(record));
        if found.len() > MAX_KNOWN {
            found.pop_front();
        }
    }

    /// A record was appended, by the pipeline's job of that number if it was sealed here.
    pub fn appended(&mut self, record: &Record, job: Option<u64>) {
        let Some(mark) = Mark::of(record) else { return };
        if let Some(asked) = self.asked.iter_mut().find(|a| a.job.is_some() && a.job == job) {
            asked.lsn = Some(mark.at.lsn);
        }
        self.fresh.push_back(mark);
    }

    /// The records after `lsn` were given up.
    pub fn cut(&mut self, lsn: Lsn) {
        self.fresh.retain(|m| m.at.lsn <= lsn);
        self.known.retain(|m| m.at.lsn <= lsn);
    }

    /// The LSNs of the durable marks of that text, oldest first.
    pub fn find_all(&self, text: &str) -> Vec<Lsn> {
        self.known.iter().filter(|m| m.text == text).map(|m| m.at.lsn).collect()
    }

    /// An epoch went into the pipeline.
    pub fn gathered(&mut self) {
        self.asked.iter_mut().for_each(|a| a.before = a.before.saturating_sub(1));
    }

    /// The next mark whose turn it is to go into the pipeline; its place there goes into what is returned.
    pub fn due(&mut self) -> Option<(&str, &mut Option<u64>)> {
        let next = self.asked.iter_mut().find(|a| a.job.is_none())?;
        (next.before == 0).then_some((&next.text, &mut next.job))
    }
}

impl Run {
    /// An administrator names this place in the write order.
    pub(super) fn mark(&mut self, id: AdminId, text: String) {
        if let Err(refused) = self.begin_mark(id, text) {
            self.answer(id, Err(refused));
        }
    }

    fn begin_mark(&mut self, id: AdminId, text: String) -> Result<(), (Refusal, String)> {
        let busy = |text: &str| Err((Refusal::Busy, text.to_owned()));
        if !is_mark(&text) {
            let text =
                format!("a mark is one visible line of 1 to {MAX_MARK} bytes without spaces around it");
            return Err((Refusal::Failed, text));
        }
        if self.is_retiring() || self.is_moving_over() {
            return busy("this node is no longer the primary");
        }
        let room = self.journal.room();
        let Part::Primary(p) = &mut self.part else {
            return busy("this node is a shadow: a mark is made where the writes are, on the primary");
        };
        let reserved = p.reserved() + note_room();
        let Some(cache) =
            p.cache.as_mut().filter(|_| p.stage == super::primary::Stage::Serving && !p.closing)
        else {
            return busy("this node does not serve: try again once it does (`volrep status`)");
        };
        if self.marks.asked.len() >= MAX_ASKED {
            return busy("many marks are being made already: try again");
        }
        if reserved > room {
            return busy("the journal is full, and writers wait for it: see `volrep status`");
        }
        // What completed is in the epochs before it, what comes is in those after it.
        cache.close();
        let before = cache.closed();
        p.pipeline.reserve(note_room());
        self.marks.asked.push(Asked { id, text, before, job: None, lsn: None });
        Ok(())
    }

    /// Puts the marks whose turn it is into the pipeline; whether there were any.
    pub(super) fn gather_marks(&mut self) -> bool {
        let Part::Primary(p) = &mut self.part else { return false };
        let mut moved = false;
        while let Some((text, job)) = self.marks.due() {
            *job = Some(p.pipeline.note(Kind::Mark, flags::SYNC, text.as_bytes(), note_room()));
            moved = true;
        }
        moved
    }

    /// Tells of the marks that are durable.
    pub(super) fn pump_marks(&mut self) {
        let durable = self.journal.durable();
        while let Some(mark) = self.marks.fresh.pop_front_if(|m| m.at.lsn <= durable) {
            self.tell_mark(&mark);
            let asked = self.marks.asked.iter().position(|a| a.lsn == Some(mark.at.lsn));
            if let Some(i) = asked {
                let id = self.marks.asked.remove(i).id;
                self.out.push(Action::Answer { id, answer: Answer::Marked(MarkStatus::from(&mark)) });
            }
            self.marks.known.push_back(mark);
            if self.marks.known.len() > MAX_KNOWN {
                self.marks.known.pop_front();
            }
        }
    }

    /// The records after `lsn` were to be given up, and were not.
    pub(super) fn tell_marks_again(&mut self, lsn: Lsn) {
        let kept: Vec<Mark> = self.marks.known.iter().filter(|m| m.at.lsn > lsn).cloned().collect();
        kept.iter().for_each(|m| self.tell_mark(m));
    }

    /// Those who wait for a mark that may never come.
    pub(super) fn take_marks(&mut self) -> Vec<AdminId> {
        let asked = std::mem::take(&mut self.marks.asked);
        if let Part::Primary(p) = &mut self.part {
            let waiting = asked.iter().filter(|a| a.job.is_none()).count() as u64;
            p.pipeline.release(waiting * note_room());
        }
        asked.into_iter().map(|a| a.id).collect()
    }
}

/// Journal bytes that a mark takes, whatever its length.
fn note_room() -> u64 {
    worst_case(MAX_MARK as u64)
}

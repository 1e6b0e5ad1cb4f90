//! What a node gives up, saved first: its own records from the fork on, in a file of their own.
//!
//! Owns: the way of those records into the file. Invariant: the journal that holds them is left only when the
//! file is durable.

use super::event::{Action, Level, Salvage};
use super::feed::Fetched;
use super::history::Happening;
use super::rebase::Rebase;
use super::run::{Part, Run, fetch};
use crate::format::salvage::{Head, Trailer};
use crate::journal::maps::Gathered;
use crate::units::{HistoryPoint, Lsn};
use bytes::Bytes;

/// Bytes handed over at once.
const BATCH: usize = 1 << 20;

/// Records on their way into the file.
pub struct Saving {
    /// The fork.
    pub since: Option<HistoryPoint>,
    next: Lsn,
    /// What may have been written over can be read up to here.
    probed: Lsn,
    last: Lsn,
    records: u64,
    /// What these records wrote; `None`: they are not all that was written here since the fork.
    pub touched: Option<Gathered>,
    step: Step,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    Begin,
    Records,
    /// The shell writes.
    Writing,
    Ending,
    Done,
}

impl Saving {
    /// Of a node whose history ends with `last`, and whose journal begins after `oldest`. What is not in the
    /// journal any more was in the backing for long: nobody can tell its records apart.
    /// `touched`: where what they wrote is gathered.
    pub fn new(since: Option<HistoryPoint>, oldest: Lsn, last: Lsn, touched: Gathered) -> Saving {
        let next = since.map_or(oldest, |p| p.lsn.max(oldest)).next();
        let touched = since.filter(|p| p.lsn >= oldest && last > Lsn(0)).map(|_| touched);
        Saving { since, next, probed: next, last, records: 0, touched, step: Step::Begin }
    }

    /// The file is durable, or there is nothing to save.
    pub fn is_done(&self) -> bool {
        self.step == Step::Done || self.next > self.last && self.step == Step::Begin
    }
}

impl Run {
    /// Moves the saving on; whether anything moved.
    pub(super) fn pump_salvage(&mut self, saving: &mut Saving) -> bool {
        match saving.step {
            Step::Begin => {
                if !self.probe_oldest(saving) {
                    return false;
                }
                let sb = &self.meta.sb;
                let head = Head {
                    group: sb.group,
                    node: sb.node,
                    name: self.cfg.name.clone(),
                    term: sb.retired.map_or(sb.term, |r| r.term),
                    fork: saving.since,
                    last: self.journal.tail().point,
                    time: self.now.wall,
                    volumes: sb.volumes.clone(),
                };
                self.out.push(Action::Salvage(Salvage::Begin(head)));
                saving.step = Step::Writing;
                true
            }
            Step::Records => self.salvage_records(saving),
            Step::Writing | Step::Ending | Step::Done => false,
        }
    }

    /// Segments that nobody needed any more may have been on their way to be written anew when power failed. So what is
    /// wanted of them, which is what was in the image for good, is read once before anything is saved, and where a
    /// record is gone the file begins with the next segment. Whether that is known now.
    fn probe_oldest(&mut self, saving: &mut Saving) -> bool {
        let end = self.links.checkpoint.min(saving.last);
        while saving.probed <= end {
            match fetch!(self, self.image.reader, saving.probed) {
                Fetched::Ready(_) => saving.probed = saving.probed.next(),
                Fetched::Pending => return false,
                Fetched::Lost => {
                    let next = self.journal.segments().find(|s| s.before.lsn >= saving.probed);
                    // Nobody can tell any more what all of these have written.
                    saving.touched = None;
                    saving.next = next.map_or(end, |s| s.before.lsn).next();
                    saving.probed = saving.next;
                }
            }
        }
        true
    }

    fn salvage_records(&mut self, saving: &mut Saving) -> bool {
        let mut batch: Vec<Bytes> = Vec::new();
        let mut bytes = 0;
        let mut lost = None;
        while bytes < BATCH && saving.next <= saving.last {
            match fetch!(self, self.image.reader, saving.next) {
                Fetched::Ready(record) => {
                    if let Some(touched) = &mut saving.touched {
                        record.extents().for_each(|(e, _)| self.maps.add(touched, e));
                    }
                    bytes += record.wire().len();
                    batch.push(record.wire());
                    saving.records += 1;
                    saving.next = saving.next.next();
                }
                Fetched::Pending => break,
                Fetched::Lost => {
                    lost = Some(saving.next);
                    break;
                }
            }
        }
        if let Some(lsn) = lost {
            let text =
                format!("the records from LSN {lsn} on can't be read here: they are not in the salvage file");
            self.log(Level::Error, text);
            saving.last = lsn.prev();
            saving.touched = None;
        }
        if !batch.is_empty() {
            self.out.push(Action::Salvage(Salvage::Append(batch)));
            saving.step = Step::Writing;
            return true;
        }
        if saving.next > saving.last {
            let trailer = Trailer { records: saving.records, last: saving.last };
            self.out.push(Action::Salvage(Salvage::End(trailer)));
            saving.step = Step::Ending;
            return true;
        }
        false
    }

    /// The shell has done a part of it, or all; or can't.
    pub(super) fn salvaged(&mut self, result: Result<Option<String>, String>) {
        let Part::Shadow(s) = &mut self.part else { return };
        let promotion = self.admin.promotion.as_mut().and_then(|p| p.rewind.as_mut());
        let promoting = promotion.is_some();
        let saving = match promotion {
            Some(rewind) => rewind.saving(),
            None => s.rebase.as_mut().and_then(Rebase::saving),
        };
        let Some(saving) = saving else { return };
        match (result, saving.step) {
            (Ok(None), Step::Writing) => saving.step = Step::Records,
            (Ok(Some(path)), Step::Ending) => {
                saving.step = Step::Done;
                let records = saving.records;
                self.tell(Happening::Salvaged { path: path.clone(), records });
                self.log(Level::Warn, format!("{records} records that are given up are saved in {path}"));
            }
            (Ok(_), _) => {}
            (Err(why), _) if promoting => self.rewind_unsaved(&why),
            (Err(why), _) => {
                s.rebase = None;
                let text = format!("what is to be given up can't be saved: {why}");
                self.log(Level::Error, text.clone());
                if let Part::Shadow(s) = &mut self.part {
                    s.stopped = Some(text);
                }
                self.close_links("the salvage file can't be written");
            }
        }
    }
}

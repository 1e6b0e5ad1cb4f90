//! A primary that serves before its image has caught up: what the journal holds goes there meanwhile.
//!
//! Owns: from when to when. Invariants: nothing begins before everything that the image lacks can be read through the
//! journal's index; as long as it lasts nothing goes from the write cache into the backings, so nothing older is put over
//! it. A cache that fills up meanwhile leaves its durable records to the journal, which holds them too, and which they
//! leave for the image in their turn. A crash finds a journal to be put into the image, as any crash does.

use super::event::Level;
use super::primary::{Primary, Stage};
use super::run::{Part, Run};
use crate::units::{Extent, Lsn};

impl Run {
    /// A primary that recovers may serve at once, when all that its image lacks can be read from the journal.
    pub(super) fn begin_drain(&mut self) -> bool {
        let (applied, end) = (self.image.applied.point.lsn, self.journal.tail().point.lsn);
        let free = !self.is_asking() && !self.is_retiring() && !self.admin.is_promoting();
        // A checkpoint under way would name dirty maps that the new generation's follow.
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
        p.dirty_since = (!p.tails.is_empty()).then_some(self.now.mono);
        self.backlog.clear();
        self.stop_reading_through();
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
}

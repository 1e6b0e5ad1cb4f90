//! An image that is held back on purpose, so that a promotion can stop before a mistake.
//!
//! Owns: when a record of a shadow's journal may go into its image. Invariants: that is `apply_delay` after it was
//! received, by the own clock, or later; sooner only while the journal has no room for the delay, or while a
//! comparison needs the image near the primary, and both are told. Nothing here delays a durable position.

use super::event::Level;
use super::history::Happening;
use super::meta::Ticket;
use super::run::{Part, Run};
use super::status::{DelayStatus, rfc3339};
use crate::units::{Lsn, MILLIS, SECONDS};
use std::collections::VecDeque;

/// Records received within this share of the delay are released together, with the last of them.
const SHARE: u64 = 1000;

/// Records received at about the same time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Group {
    last: Lsn,
    first_received: u64,
    last_received: u64,
    /// Seal time of the first, ns since 1970.
    sealed: u64,
}

/// What holds or lifts it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Held,
    /// The journal is too small.
    Shortened,
    /// Why.
    Suspended(&'static str),
}

/// See the module's documentation.
pub struct Delay {
    /// Nanoseconds; 0: nothing is held back.
    delay: u64,
    groups: VecDeque<Group>,
    /// Everything up to here has been held long enough.
    due: Lsn,
    /// Everything up to here goes into the image all the same, for want of room.
    released: Lsn,
    mode: Mode,
    /// A restart would find, in the superblock, that records up to here may be in the image, so that it does not
    /// hold them back: only that much may be put there.
    noted: Lsn,
    noting: Option<(Ticket, Lsn)>,
}

impl Delay {
    /// For a journal that ends with `tail`, all of which counts as received now. `sealed`: not after the seal time
    /// of the oldest record that is not applied.
    pub fn new(delay: u64, applied: Lsn, tail: Lsn, sealed: u64, now: u64) -> Delay {
        let mut groups = VecDeque::new();
        if delay > 0 && tail > applied {
            groups.push_back(Group { last: tail, first_received: now, last_received: now, sealed });
        }
        let noting = None;
        Delay { delay, groups, due: applied, released: Lsn(0), mode: Mode::Held, noted: Lsn(0), noting }
    }

    /// What is received within so much time is told apart by nobody, ns.
    pub fn step(&self) -> u64 {
        if self.delay == 0 { 0 } else { (self.delay / SHARE).clamp(MILLIS, SECONDS) }
    }

    /// At a start: the last record that is not applied, and a time not after the first one's.
    pub fn unapplied(&self) -> VecDeque<(Lsn, u64)> {
        self.groups.iter().map(|g| (g.last, g.sealed)).collect()
    }

    /// A record is in the journal.
    pub fn received(&mut self, lsn: Lsn, sealed: u64, now: u64) {
        let step = self.step();
        match self.groups.back_mut() {
            _ if self.delay == 0 => {}
            Some(g) if now < g.first_received + step => (g.last, g.last_received) = (lsn, now),
            _ => {
                self.groups.push_back(Group { last: lsn, first_received: now, last_received: now, sealed });
            }
        }
    }

    /// The records after `lsn` are gone; or the journal begins anew after it.
    pub fn cut(&mut self, lsn: Lsn) {
        while let Some(g) = self.groups.back_mut().filter(|g| g.last > lsn) {
            g.last = lsn;
            let before = self.groups.len().checked_sub(2).map_or(self.due, |i| self.groups[i].last);
            if before < lsn {
                break;
            }
            self.groups.pop_back();
        }
        (self.due, self.released) = (self.due.min(lsn), self.released.min(lsn));
        (self.noted, self.noting) = (self.noted.min(lsn), None);
    }

    /// The journal begins anew after `lsn`.
    pub fn begin_anew(&mut self, lsn: Lsn) {
        self.groups.clear();
        (self.due, self.released, self.noted, self.noting) = (lsn, Lsn(0), Lsn(0), None);
    }

    /// Lets go what was held long enough; when the next is.
    fn pass(&mut self, now: u64) -> Option<u64> {
        while let Some(g) = self.groups.pop_front_if(|g| g.last_received.saturating_add(self.delay) <= now) {
            self.due = self.due.max(g.last);
        }
        self.groups.front().map(|g| g.last_received.saturating_add(self.delay))
    }

    /// Nothing above it goes into the image now.
    pub fn limit(&self) -> Lsn {
        self.meant().min(self.noted)
    }

    /// Nothing above it is meant to go into the image.
    pub fn meant(&self) -> Lsn {
        match self.mode {
            _ if self.delay == 0 => Lsn(u64::MAX),
            Mode::Suspended(_) => Lsn(u64::MAX),
            Mode::Held | Mode::Shortened => self.due.max(self.released),
        }
    }

    /// The delay that is meant now, ns: what of a lag is intended.
    pub fn intended(&self) -> u64 {
        if matches!(self.mode, Mode::Suspended(_)) { 0 } else { self.delay }
    }

    /// How long the oldest record that is not applied has been held, ns, and not after its seal time.
    fn oldest(&self, applied: Lsn, now: u64) -> Option<(u64, u64)> {
        let g = self.groups.iter().find(|g| g.last > applied)?;
        Some((now.saturating_sub(g.first_received), g.sealed))
    }
}

impl Run {
    /// Why nothing may be held back now.
    fn needs_current_image(&self) -> Option<&'static str> {
        let Part::Shadow(s) = &self.part else { return None };
        if s.rebase.is_some() || s.retreat.is_some() || self.meta.sb.resync.is_some() {
            return Some("a resync needs the image near the primary's");
        }
        let compares = self.compare.job.as_ref().is_some_and(super::job::Job::is_running);
        (compares || self.compare.lent.is_some()).then_some("a comparison needs the image near the primary's")
    }

    /// Moves the limit on.
    pub(super) fn pump_delay(&mut self) {
        let needed = self.needs_current_image();
        let (used, size) = self.journal.usage();
        let Part::Shadow(s) = &mut self.part else { return };
        if s.delay.delay == 0 {
            return self.note_redo();
        }
        let next = s.delay.pass(self.now.mono);
        // What is let go early gives room back at once, and so much of it that this is not for every record.
        let full = used > size / 4 * 3 || s.is_holding();
        if full {
            let early = self.journal.older_than(size / 8 * 5);
            s.delay.released = s.delay.released.max(early);
        }
        let mode = match needed {
            Some(why) => Mode::Suspended(why),
            None if s.delay.released > s.delay.due => Mode::Shortened,
            None => Mode::Held,
        };
        let before = std::mem::replace(&mut s.delay.mode, mode);
        if let Some(at) = next {
            self.wake_at(at);
        }
        if before != mode {
            self.tell_delay(mode);
        }
        self.note_redo();
    }

    /// What is about to go into the image is written down first: after a crash it may be there in part, so a restart
    /// has to put all of it there, and no promotion may stop before it.
    fn note_redo(&mut self) {
        let durable = self.journal.durable();
        let begun = self.image.underway().point.lsn;
        let busy = self.is_choosing() || self.admin.is_promoting();
        let Part::Shadow(s) = &mut self.part else { return };
        if s.is_cutting() || s.is_turning() || busy {
            return;
        }
        if let Some((_, upto)) = s.delay.noting.take_if(|(ticket, _)| self.meta.is_saved(*ticket)) {
            s.delay.noted = s.delay.noted.max(upto);
        }
        if s.delay.noting.is_some() {
            return;
        }
        // What is not held back needs no note: a restart puts everything there at once.
        if s.delay.delay == 0 || matches!(s.delay.mode, Mode::Suspended(_)) {
            if self.meta.sb.redo.take().is_some() {
                s.delay.noting = Some((self.meta.save(false), Lsn(u64::MAX)));
            } else {
                s.delay.noted = Lsn(u64::MAX);
            }
            return;
        }
        if s.delay.noted == Lsn(u64::MAX) {
            s.delay.noted = begun;
        }
        let wanted = s.delay.meant().min(durable).max(begun);
        if s.delay.noted < wanted || self.meta.sb.redo.is_none() {
            self.meta.sb.redo = Some(wanted);
            s.delay.noting = Some((self.meta.save(false), wanted));
        }
    }

    fn tell_delay(&mut self, mode: Mode) {
        let seconds = self.cfg.apply_delay as f64 / SECONDS as f64;
        let (state, reason) = mode.told();
        let text = match &reason {
            Some(reason) => format!("apply_delay ({seconds} s) is {}: {reason}", state.to_lowercase()),
            None => format!("apply_delay ({seconds} s) holds again: the window fills up anew"),
        };
        let level = if reason.is_some() { Level::Warn } else { Level::Info };
        self.log(level, text);
        self.tell(Happening::Delay { state: state.into(), reason });
    }

    /// What is told of it.
    pub(super) fn delay_status(&self) -> Option<DelayStatus> {
        let Part::Shadow(s) = &self.part else { return None };
        if s.delay.delay == 0 {
            return None;
        }
        let seconds = |ns: u64| ns as f64 / SECONDS as f64;
        let (state, reason) = s.delay.mode.told();
        let oldest = s.delay.oldest(self.image.applied.point.lsn, self.now.mono);
        let (from, tail) = (self.window_from(), self.journal.tail());
        Some(DelayStatus {
            seconds: seconds(s.delay.delay),
            state: state.into(),
            reason,
            held_seconds: oldest.map_or(0.0, |(held, _)| seconds(held)),
            window_from_lsn: from.0.0,
            window_from_time: from.1.or(oldest.map(|(_, sealed)| sealed)).and_then(rfc3339),
            window_to_lsn: tail.point.lsn.0,
            window_to_time: rfc3339(tail.time),
        })
    }
}

impl Mode {
    fn told(self) -> (&'static str, Option<String>) {
        match self {
            Mode::Held => ("Held", None),
            Mode::Shortened => {
                let why = "the journal has no room for so many records: give it more segments, or set a shorter delay";
                ("Shortened", Some(why.into()))
            }
            Mode::Suspended(why) => ("Suspended", Some(why.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_held_from_its_receipt_on() {
        let mut d = Delay::new(10 * SECONDS, Lsn(3), Lsn(5), 1, 100);
        assert_eq!(d.meant(), Lsn(3));
        for lsn in 6..=20 {
            d.received(Lsn(lsn), lsn, lsn * SECONDS);
        }
        assert_eq!(d.pass(10 * SECONDS + 99), Some(10 * SECONDS + 100), "found at the start, received then");
        assert_eq!(d.meant(), Lsn(3));
        assert_eq!(d.pass(10 * SECONDS + 100), Some(16 * SECONDS));
        assert_eq!(d.meant(), Lsn(5));
        d.pass(17 * SECONDS);
        assert_eq!(d.meant(), Lsn(7));
        assert_eq!(d.oldest(Lsn(7), 18 * SECONDS), Some((10 * SECONDS, 8)));
        d.cut(Lsn(9));
        assert_eq!(d.pass(100 * SECONDS), None);
        assert_eq!(d.meant(), Lsn(9));
        d.cut(Lsn(8));
        assert_eq!(d.meant(), Lsn(8));
    }

    #[test]
    fn many_records_take_little_memory_and_none_goes_early() {
        let delay = 100 * SECONDS;
        let mut d = Delay::new(delay, Lsn(0), Lsn(0), 0, 0);
        let at = |lsn: u64| lsn * MILLIS;
        for lsn in 1..=100_000 {
            d.received(Lsn(lsn), 1, at(lsn));
        }
        assert!(d.groups.len() <= SHARE as usize + 1, "{}", d.groups.len());
        for now in [at(100_000), at(120_000), at(150_001), at(200_000)] {
            d.pass(now);
            let limit = d.meant().0;
            assert!(limit == 0 || at(limit) + delay <= now, "{limit} at {now}");
            assert!(at(limit) + delay + 200 * MILLIS > now, "not much later either: {limit} at {now}");
        }
        let mut none = Delay::new(0, Lsn(0), Lsn(7), 0, 0);
        none.received(Lsn(8), 1, 1);
        assert_eq!((none.meant(), none.groups.len()), (Lsn(u64::MAX), 0));
    }
}

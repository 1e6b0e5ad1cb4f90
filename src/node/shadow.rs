//! The shadow: records from the primary, into the journal, into the image.
//!
//! Owns: what is received and what is told of it. Invariants: only the exact continuation of the
//! journal is appended (I7); a position is told only when it is true (I5); nothing above the
//! primary's announced durable LSN is applied.

use super::delay::Delay;
use super::event::{Action, Level, LinkId, Positions};
use super::meta::Ticket;
use super::rebase::{Rebase, Retreat};
use super::run::{Part, Run};
use super::status::{Lag, Quantiles};
use super::view::View;
use super::{JOURNAL, JOURNAL_RECOVERY};
use crate::disk::DiskResult;
use crate::format::message::Message;
use crate::format::record::{Record, flags, origin};
use crate::journal::Journal;
use crate::journal::recovery::{Outcome, Recovery};
use crate::link::receiver::{Held, Verdict, judge};
use crate::units::{BLOCK, HistoryPoint, Lsn, MICROS, MILLIS, SECONDS};
use hdrhistogram::Histogram;
use std::borrow::Cow;
use std::collections::VecDeque;

/// See the module's documentation.
pub struct Shadow {
    cut: Option<Cut>,
    /// Positions last told, on which link, and when.
    told: Option<(LinkId, Positions, u64)>,
    /// Seal times of the records that are not durable (and the durable LSNs they carry), and not applied: of these
    /// the last of some and the time of the first.
    undurable: VecDeque<(Lsn, u64, Lsn)>,
    unapplied: VecDeque<(Lsn, u64)>,
    meter: Meter,
    /// Records received that the journal has no room for yet.
    held: VecDeque<Record>,
    held_bytes: u64,
    /// A restart would find, in the superblock or in a durable record, that the primary has
    /// everything up to here: only that much may be applied, or the restarted shadow would let
    /// records be taken back that its image has.
    vouched: Lsn,
    /// Before this record is applied the backings are no image: an earlier process, or the primary that this
    /// was, may have put there what comes up to it.
    whole_from: Lsn,
    /// The superblock that will vouch for a higher limit.
    vouching: Option<(Ticket, Lsn)>,
    pub(super) delay: Delay,
    /// No more dialling: the node is shutting down.
    pub(super) closing: bool,
    /// The journal is to begin anew, in another history.
    pub(super) rebase: Option<Rebase>,
    /// That is being undone.
    pub(super) retreat: Option<Retreat>,
    /// Why the last resync stopped: the next one is for an administrator to begin.
    pub(super) stopped: Option<String>,
    /// An administrator gives the old image up for the next resync.
    pub(super) in_place: bool,
    /// Others look at the image, which stays as it is meanwhile.
    pub(super) view: Option<View>,
    /// No comparison of a resync begins before.
    pub(super) compare_at: u64,
    /// What it holds was compared with the primary's, and differs, though all labels agree.
    pub(super) apart: bool,
}

/// Bytes of records that may wait for room in the journal; the primary's window is far smaller.
const HELD: u64 = 256 << 20;
/// A cut of the journal under way.
struct Cut {
    link: LinkId,
    at: HistoryPoint,
    stage: CutStage,
}

enum CutStage {
    /// Something still reads or writes the journal, or moves the image.
    Waiting,
    /// The superblock is told that the journal may end at the cut, and is no longer closed cleanly.
    Saving(Ticket),
    Cutting(Box<Recovery>),
}

/// Acknowledge what was only received in steps of this many records.
const RECEIVED_STEP: u64 = 32;
/// Positions that nobody waits for are told at most so often, ns.
const TOLD_AFTER: u64 = 5 * MILLIS;

impl Shadow {
    /// A shadow without a link; the primary has everything up to `limit`, as recovery found. Something of the records
    /// up to `begun` may be in the backings.
    pub fn new(limit: Lsn, begun: Lsn, delay: Delay) -> Shadow {
        Shadow {
            cut: None,
            told: None,
            undurable: VecDeque::new(),
            unapplied: delay.unapplied(),
            delay,
            meter: Meter::default(),
            held: VecDeque::new(),
            held_bytes: 0,
            vouched: limit,
            whole_from: begun,
            vouching: None,
            closing: false,
            rebase: None,
            retreat: None,
            stopped: None,
            in_place: false,
            view: None,
            compare_at: 0,
            apart: false,
        }
    }

    /// The journal has begun anew after `at`.
    pub fn begin_anew(&mut self, at: Lsn) {
        self.undurable.clear();
        self.unapplied.clear();
        self.delay.begin_anew(at);
        (self.vouched, self.vouching, self.told) = (at, None, None);
        self.whole_from = Lsn(0);
        self.compare_at = 0;
        self.apart = false;
    }

    /// The journal's end is about to be another one: nothing is written to it, or goes from it into the
    /// image, and the superblock says already what will be.
    pub fn is_turning(&self) -> bool {
        self.retreat.is_some() || self.rebase.as_ref().is_some_and(Rebase::is_turning)
    }

    /// Nothing above it may be applied.
    pub fn vouched(&self) -> Lsn {
        self.vouched
    }

    /// An image that stands at this record, or at a later one, is one.
    pub fn whole_from(&self) -> Lsn {
        self.whole_from
    }

    /// A view that is being opened wants nothing above it in the image.
    pub fn wanted(&self) -> Lsn {
        self.view.as_ref().map_or(Lsn(u64::MAX), View::wanted)
    }

    /// Nothing above `tail` was ever here.
    pub fn clamp(&mut self, tail: Lsn) {
        self.vouched = self.vouched.min(tail);
        self.vouching = None;
    }

    /// A record waits for room in the journal.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// Bytes that the next record takes which is here and not in the journal.
    pub(super) fn next_held(&self) -> Option<u64> {
        self.held.front().map(Record::padded_len)
    }

    /// The journal is about to be cut back: nothing goes from it into the image.
    pub fn is_cutting(&self) -> bool {
        self.cut.is_some()
    }
}

impl Run {
    /// Moves the shadow on; whether anything moved.
    pub(super) fn pump_shadow(&mut self) -> bool {
        let mut moved = self.append_held();
        self.pump_delay();
        moved |= self.pump_view();
        moved |= self.pump_rebase();
        moved |= self.pump_retreat();
        moved |= self.pump_finish();
        moved |= self.pump_resync_job();
        self.begin_cut();
        self.note_durable();
        self.vouch();
        let limit = self.meta.sb.limit;
        if limit > self.journal.durable() && self.journal.tail().point.lsn > self.journal.durable() {
            // What is durable on the primary is wanted in the image, so it is wanted durable here.
            let lsn = limit.min(self.journal.tail().point.lsn);
            self.journal.want(lsn);
        }
        self.tell_positions();
        moved
    }

    /// A record came in over the link that feeds this shadow.
    pub(super) fn received(&mut self, link: LinkId, record: Record) {
        let tail = *self.journal.tail();
        let Part::Shadow(s) = &mut self.part else { return };
        let last = s.held.back();
        let held = Held {
            group: self.cfg.group,
            term: self.meta.sb.term,
            point: last.map_or(tail.point, Record::point),
            generation: last.map_or(tail.generation, |r| r.stamp.generation),
            last_write: last.map_or(tail.last_write, |r| r.stamp.last_write),
            time: last.map_or(tail.time, |r| r.stamp.time),
            durable: last.map_or(tail.durable, |r| r.stamp.durable),
        };
        match judge(&held, &self.meta.sb.volumes, &record) {
            Verdict::Duplicate => {}
            Verdict::Reject(why) => self.drop_link(link, &format!("the primary sent {why}")),
            Verdict::Accept => {
                s.held_bytes += record.wire_len();
                s.held.push_back(record);
                if s.held_bytes > HELD {
                    return self.drop_link(link, "the primary sent far more than was acknowledged");
                }
                self.append_held();
            }
        }
    }

    /// The link that brought them is gone: what is not in the journal will be sent again, if the
    /// primary still has it.
    pub(super) fn forget_held(&mut self) {
        if let Part::Shadow(s) = &mut self.part {
            s.held.clear();
            s.held_bytes = 0;
        }
    }

    fn append_held(&mut self) -> bool {
        let mut moved = false;
        loop {
            let Part::Shadow(s) = &mut self.part else { return moved };
            let Some(record) = s.held.front() else { return moved };
            if !self.journal.fits(record.padded_len()) {
                self.image.hurry = true;
                return moved;
            }
            let record = s.held.pop_front().expect("just seen");
            s.held_bytes -= record.wire_len();
            let (lsn, time) = (record.stamp.lsn, record.stamp.time);
            s.undurable.push_back((lsn, time, record.stamp.durable));
            s.delay.received(lsn, time, self.now.mono);
            match s.unapplied.back_mut().filter(|(_, first)| time < first.saturating_add(s.delay.step())) {
                Some((last, _)) => *last = lsn,
                None => s.unapplied.push_back((lsn, time)),
            }
            if let Some(late) = self.links.since(time, self.now) {
                s.meter.record(0, late, self.now.mono);
            }
            let wanted = record.stamp.flags & flags::SYNC != 0;
            let offset = self.journal.append(self.now, &record, wanted, &mut self.disk);
            self.backlog.push(&record, offset);
            let outdated = self.is_outdated();
            super::boot::note(&mut self.meta.sb, &mut self.maps, &record);
            if !outdated && self.is_outdated() {
                self.unconfirm();
                self.meta.save(true);
                self.tell_outdated();
            }
            self.job_touched(&record);
            self.marks.appended(&record, None);
            if record.stamp.flags & flags::OPENS != 0 {
                self.tell_generation(record.stamp.generation, lsn.prev());
            }
            self.links.record_bytes += record.wire_len();
            self.note_sample(lsn, time);
            self.feed.push(record, self.journal.written());
            moved = true;
        }
    }

    /// The primary has everything up to here durable.
    pub(super) fn announced(&mut self, lsn: Lsn) {
        self.meta.sb.limit = self.meta.sb.limit.max(lsn);
    }

    /// The primary's announcement is written down before it is acted on: by the next record, which
    /// carries it, or by the superblock, whichever is durable first.
    fn vouch(&mut self) {
        let (limit, durable) = (self.meta.sb.limit, self.journal.durable());
        let Part::Shadow(s) = &mut self.part else { return };
        if s.is_cutting() || s.is_turning() || self.admin.is_promoting() {
            return; // what is durable now may be gone in a moment
        }
        match s.vouching {
            Some((ticket, upto)) if self.meta.is_saved(ticket) => {
                s.vouched = s.vouched.max(upto);
                s.vouching = None;
            }
            Some(_) => return,
            None => {}
        }
        // A record on its way into the journal will.
        let carried = s.undurable.back().is_some_and(|(.., carried)| *carried >= limit);
        if s.vouched < limit.min(durable) && !carried {
            // The same write says what is durable here: less than that at a restart is damage.
            self.meta.sb.floor = self.meta.sb.floor.max(durable);
            s.vouching = Some((self.meta.save(false), limit));
        }
    }

    fn note_durable(&mut self) {
        let durable = self.journal.durable();
        let Part::Shadow(s) = &mut self.part else { return };
        while let Some((_, time, carried)) = s.undurable.pop_front_if(|(lsn, ..)| *lsn <= durable) {
            s.vouched = s.vouched.max(carried);
            if let Some(late) = self.links.since(time, self.now) {
                s.meter.record(1, late, self.now.mono);
            }
        }
    }

    /// Everything up to here is in the image.
    pub(super) fn note_applied(&mut self, applied: Lsn) {
        let Part::Shadow(s) = &mut self.part else { return };
        while let Some((_, time)) = s.unapplied.pop_front_if(|(lsn, _)| *lsn <= applied) {
            if let Some(late) = self.links.since(time, self.now) {
                s.meter.record(2, late.saturating_sub(s.delay.intended()), self.now.mono);
            }
        }
    }

    fn tell_positions(&mut self) {
        let now = Positions {
            received: self.journal.tail().point.lsn,
            durable: self.journal.durable(),
            // Nothing of this history can be seen before all of it can.
            applied: if self.is_remaking() { Lsn(0) } else { self.image.applied.point.lsn },
        };
        let Some(link) = self.links.receiving() else { return };
        let Part::Shadow(s) = &mut self.part else { return };
        if let Some((told_on, told, at)) = s.told
            && told_on == link
        {
            // A FLUSH on the primary waits for what is durable on a member of the sync set.
            let member = self.meta.sb.sync_set.contains(&self.cfg.node);
            let durable = now.durable > told.durable;
            if !(durable && member || now.received.0 >= told.received.0 + RECEIVED_STEP) {
                let due = at + TOLD_AFTER;
                // What is on its way into a member's journal is told at once, and the rest with it.
                if !durable && now.applied <= told.applied || member && !s.undurable.is_empty() {
                    return;
                }
                if self.now.mono < due {
                    return self.wake_at(due);
                }
            }
        }
        s.told = Some((link, now, self.now.mono));
        let Positions { received, durable, applied } = now;
        self.out.push(Action::Send { link, message: Message::Positions { received, durable, applied } });
    }

    /// The primary asks to compare histories at `at`, which is before the tail here: if they are equal
    /// there, what lies behind is cut off.
    pub(super) fn cut_to(&mut self, link: LinkId, at: HistoryPoint) {
        if let Part::Shadow(s) = &mut self.part {
            s.cut = Some(Cut { link, at, stage: CutStage::Waiting });
            self.view_loses(at.lsn);
        }
    }

    fn begin_cut(&mut self) {
        // Nothing may be reading or writing the journal, or moving the image, meanwhile.
        let quiet =
            self.journal.is_quiet() && self.image.is_idle() && self.checkpoint_idle() && self.scrub.is_none();
        let Part::Shadow(s) = &mut self.part else { return };
        let Some(Cut { at, stage, .. }) = &mut s.cut else { return };
        let after = at.lsn;
        match stage {
            CutStage::Waiting if quiet => {
                // A crash in the middle of the cut must not look like damage.
                self.meta.sb.floor = self.meta.sb.floor.min(at.lsn);
                self.meta.sb.clean = false;
                *stage = CutStage::Saving(self.meta.save(true));
                self.tell_given_up(after, "the primary does not have it");
            }
            CutStage::Saving(ticket) if self.meta.is_saved(*ticket) => {
                let origin = origin(self.cfg.group);
                let mut begun = Box::new(Recovery::compare(JOURNAL_RECOVERY, &self.meta.sb, origin, *at));
                begun.start(&mut self.disk);
                *stage = CutStage::Cutting(begun);
            }
            _ => {}
        }
    }

    /// The answer to a request of the recovery that cuts the journal back.
    pub(super) fn cut_done(&mut self, id: u64, result: DiskResult) {
        let Part::Shadow(s) = &mut self.part else { return };
        let Some(Cut { link, at, stage: CutStage::Cutting(recovery) }) = &mut s.cut else { return };
        let Some(outcome) = recovery.complete(id, result, &mut |_, _| {}, &mut self.disk) else { return };
        let (link, at) = (*link, *at);
        s.cut = None;
        match outcome {
            Outcome::Found(r) => {
                let sb = &mut self.meta.sb;
                self.journal = Journal::new(JOURNAL, sb.group, sb.geometry, r.head, r.segments, r.tail);
                sb.openings.retain(|o| o.at.lsn < at.lsn);
                self.maps.rewind(at.lsn);
                self.marks.cut(at.lsn);
                s.undurable.clear();
                s.unapplied.iter_mut().for_each(|(last, _)| *last = (*last).min(at.lsn));
                s.delay.cut(at.lsn);
                self.forget_held();
                self.feed.clear();
                self.backlog.cut(at.lsn);
                self.image.journal_cut();
                self.restart_timeline(&r.tail);
                self.update_keep();
                self.look_again();
                self.log(
                    Level::Info,
                    format!("cut {} places behind LSN {} that the primary lost", r.cut, at.lsn),
                );
                self.histories_agree(link);
            }
            Outcome::Differs => {
                self.tell_marks_again(at.lsn);
                self.contents_differ(link, at.lsn);
            }
            Outcome::Stopped(text) => self.fail(text),
        }
    }

    /// Since when the oldest record that is not durable here is sealed, ns: that is not held back on purpose.
    fn late_here(&self, s: &Shadow, heard: Lsn) -> u64 {
        let tail = self.journal.tail();
        let undurable = s.undurable.front().map(|(_, time, _)| *time);
        let waiting = undurable.or(s.held.front().map(|record| record.stamp.time));
        // Of the first one that is still to come it is known that it follows the last one here.
        let since = waiting.or((heard > tail.point.lsn).then_some(tail.time));
        since.map_or(0, |since| self.late_since(since))
    }

    /// Lag as this shadow measures it.
    pub(super) fn lag(&self) -> Option<Lag> {
        let Part::Shadow(s) = &self.part else { return None };
        let clock = self.links.primary_clock()?;
        let applied = self.image.applied.point.lsn;
        let heard = self.links.heard_of_primary?;
        let newest = heard.tail.max(self.journal.tail().point.lsn);
        let records = newest.0.saturating_sub(applied.0);
        // What has come since that word is not in it.
        let come = self.behind(heard.tail).map_or(0, |(_, bytes, _)| bytes);
        let bytes = heard.bytes.saturating_add(come).max(records.saturating_mul(BLOCK));
        // When the first of them was sealed: as the journal here knows, or else the primary; and as it said when it came. Each may
        // be by a clock that was not known then: the oldest counts.
        let here = self.behind(applied).filter(|_| self.links.timeline.reaches(applied));
        let told = here.map_or(heard.time, |(.., time)| time);
        let came = s.unapplied.front().map_or(0, |(_, time)| *time);
        let late = self.late_since([told, came].into_iter().filter(|time| *time > 0).min().unwrap_or(0));
        let (bytes, late) = if records > 0 { (bytes, late) } else { (0, 0) };
        // What a silent primary has sealed since is unknown here: the last word of it is the bound.
        let silent = self.missing_word().unwrap_or(0);
        let seconds = |late: u64| late.max(silent) as f64 / SECONDS as f64;
        let beyond = match s.delay.intended() {
            0 => late,
            intended => late.saturating_sub(intended).max(self.late_here(s, heard.tail)),
        };
        let (total_seconds, seconds) = (seconds(late), seconds(beyond));
        Some(Lag {
            count: s.meter.count(),
            received: s.meter.quantiles(0),
            durable: s.meter.quantiles(1),
            applied: s.meter.quantiles(2),
            records,
            bytes,
            seconds,
            total_seconds,
            clock_offset: clock.offset() as f64 / SECONDS as f64,
        })
    }
}

/// Distributions of lag over the last half to whole minute.
#[derive(Default)]
struct Meter {
    halves: [Option<[Histogram<u64>; 3]>; 2],
    since: u64,
}

/// How long one half fills.
const HALF: u64 = 30 * SECONDS;

impl Meter {
    fn fresh() -> [Histogram<u64>; 3] {
        // One microsecond to an hour, two digits.
        std::array::from_fn(|_| Histogram::new_with_bounds(1, 3_600_000_000, 2).expect("fixed bounds"))
    }

    fn record(&mut self, stage: usize, nanos: u64, now: u64) {
        if self.halves[0].is_none() || now >= self.since + HALF {
            self.halves[1] = self.halves[0].take();
            self.halves[0] = Some(Meter::fresh());
            self.since = now;
        }
        if let Some(h) = &mut self.halves[0] {
            h[stage].saturating_record((nanos / MICROS).max(1));
        }
    }

    /// Without a copy while one half is all there is.
    fn merged(&self, stage: usize) -> Option<Cow<'_, Histogram<u64>>> {
        let newer = &self.halves[0].as_ref()?[stage];
        let Some(older) = self.halves[1].as_ref().map(|h| &h[stage]).filter(|h| !h.is_empty()) else {
            return Some(Cow::Borrowed(newer));
        };
        let mut all = newer.clone();
        all.add(older).ok()?;
        Some(Cow::Owned(all))
    }

    fn count(&self) -> u64 {
        self.halves.iter().flatten().map(|h| h[2].len()).sum()
    }

    fn quantiles(&self, stage: usize) -> Quantiles {
        let Some(h) = self.merged(stage).filter(|h| !h.is_empty()) else { return Quantiles::default() };
        let seconds = |micros: u64| micros as f64 / 1e6;
        Quantiles {
            p50: seconds(h.value_at_quantile(0.5)),
            p99: seconds(h.value_at_quantile(0.99)),
            max: seconds(h.max()),
        }
    }
}

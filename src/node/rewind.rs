//! Promotion of a shadow as of an earlier record, of those that it holds back.
//!
//! Owns: the choice of the record, and the way back to it. Invariants: what is cut off is in a salvage file, durably,
//! before anything changes; one superblock write makes the node the primary and says where its journal is to end, so
//! a crash leaves either the shadow as it was or the promoted node, which finishes the cut when it starts; the image
//! never gets beyond the record that was chosen.

use super::JOURNAL_RECOVERY;
use super::admin::Promoting;
use super::event::{AdminId, At, Refusal};
use super::feed::{Fetched, Reader};
use super::meta::Ticket;
use super::primary::Primary;
use super::run::{Part, Run, fetch};
use super::salvage::Saving;
use super::status::rfc3339;
use crate::disk::DiskResult;
use crate::format::record::origin;
use crate::journal::recovery::{Outcome, Recovery};
use crate::journal::{Journal, Tail, tail_of};
use crate::node::JOURNAL;
use crate::units::Lsn;

/// What a record is looked for for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// The node becomes the primary as of it.
    Promotion,
    /// To tell what that would do.
    Plan,
    /// A view of it.
    View {
        /// With an overlay.
        scratch: bool,
    },
}

/// A record being looked for.
pub struct Choosing {
    pub(super) id: AdminId,
    purpose: Purpose,
    want: At,
    /// The newest record when the search began: what comes later is not looked at.
    upto: Option<Tail>,
    /// So long a view waits for the primary's word that what was found is durable there, by the own monotonic clock, ns.
    until: u64,
    /// The next record to look at, and the last that is not too late.
    next: Lsn,
    found: Option<Tail>,
    /// What was meant, once it is known.
    meant: Option<Tail>,
    /// The next one is too late: only the one before it is to be looked at.
    passed: bool,
    /// Of its own: records may go into the image meanwhile.
    pub(super) reader: Reader,
}

/// The way back to a record.
pub struct Rewind {
    /// The last that stays.
    at: Tail,
    step: Step,
}

enum Step {
    /// What is cut off is saved.
    Saving(Saving),
    /// The superblock is told that this is the primary, and where its journal ends.
    Naming(Ticket),
    Cutting(Box<Recovery>),
}

/// What can be chosen: from the image on, to the newest record that is looked at.
#[derive(Clone, Copy)]
struct Window {
    from: Lsn,
    tail: Tail,
}

/// Outcome of a look.
enum Look {
    Wait,
    Refused(Refusal, String),
    Found(Tail),
}

impl Choosing {
    /// Nothing may change until it is found.
    pub fn is_binding(&self) -> bool {
        self.purpose == Purpose::Promotion
    }
}

impl Rewind {
    /// The superblock was told: there is no way back to the shadow.
    pub(super) fn is_named(&self) -> bool {
        !matches!(self.step, Step::Saving(_))
    }

    /// What is being saved.
    pub(super) fn saving(&mut self) -> Option<&mut Saving> {
        if let Step::Saving(saving) = &mut self.step { Some(saving) } else { None }
    }
}

impl Run {
    /// The newest record that is in the image already, on its way, or may be there in part since before a crash.
    pub(super) fn window_start(&self) -> Lsn {
        let begun = self.meta.sb.redo.unwrap_or(self.meta.sb.limit).min(self.journal.tail().point.lsn);
        self.image.underway().point.lsn.max(begun)
    }

    /// Nothing more goes into the image: a promotion is about to stop somewhere.
    pub(super) fn is_choosing(&self) -> bool {
        self.admin.choosing.as_ref().is_some_and(Choosing::is_binding) || self.is_rewinding()
    }

    /// The journal is about to be cut back, or is being.
    pub(super) fn is_rewinding(&self) -> bool {
        self.admin.promotion.as_ref().is_some_and(|p| p.rewind.is_some())
    }

    /// Looks for the record that is meant.
    pub(super) fn begin_choosing(&mut self, id: AdminId, want: At, purpose: Purpose) {
        if self.admin.choosing.is_some() {
            return self.answer(id, Err((Refusal::Busy, "a record is being looked for already".into())));
        }
        if self.meta.sb.resync.is_some() || matches!(&self.part, Part::Shadow(s) if s.is_turning()) {
            let text = "a resync is under way: there are no records to choose from until it has ended";
            return self.answer(id, Err((Refusal::Busy, text.into())));
        }
        let next = self.first_look(&want, purpose);
        if purpose == Purpose::Promotion {
            // What comes now would move the end of the journal.
            self.close_links("this node is being promoted");
            self.forget_held();
        }
        let (reader, until) = (Reader::default(), self.now.mono + 2 * self.cfg.timing.heartbeat);
        self.admin.choosing = Some(Choosing {
            id,
            purpose,
            want,
            upto: None,
            until,
            next,
            found: None,
            meant: None,
            passed: false,
            reader,
        });
    }

    /// Where the search for a record begins.
    fn first_look(&self, want: &At, purpose: Purpose) -> Lsn {
        let from = self.choice_from(purpose);
        match want {
            // Segments tell the time at which they begin.
            At::Time(time) => {
                let before = self.journal.segments().filter(|s| s.time <= *time).map(|s| s.before.lsn);
                before.max().unwrap_or(from).max(from).next()
            }
            At::Lsn(_) | At::Mark(_) => from.next(),
        }
    }

    /// The journal was cut: what was looked at may be gone.
    pub(super) fn look_again(&mut self) {
        let Some(mut choosing) = self.admin.choosing.take() else { return };
        choosing.next = self.first_look(&choosing.want, choosing.purpose);
        (choosing.found, choosing.passed) = (None, false);
        (choosing.upto, choosing.meant) = (None, None);
        choosing.reader.reset();
        self.admin.choosing = Some(choosing);
    }

    /// Goes on looking; whether anything moved.
    pub(super) fn pump_choosing(&mut self) -> bool {
        let Some(mut choosing) = self.admin.choosing.take() else { return false };
        let id = choosing.id;
        match self.look(&mut choosing) {
            Look::Wait => {
                self.admin.choosing = Some(choosing);
                false
            }
            Look::Refused(why, text) => {
                self.answer(id, Err((why, text)));
                if choosing.is_binding() {
                    self.links.dial_now();
                }
                true
            }
            Look::Found(at) => {
                match choosing.purpose {
                    Purpose::View { scratch } => self.open_view(id, scratch, Some(at.point.lsn)),
                    Purpose::Plan => {
                        let plan = self.rewind_plan(&at);
                        self.answer(id, Ok(plan));
                    }
                    Purpose::Promotion => self.promote_as_of(id, at),
                }
                true
            }
        }
    }

    fn promote_as_of(&mut self, id: AdminId, at: Tail) {
        let (plan, tail) = (self.rewind_plan(&at), self.journal.tail().point);
        let touched = self.maps.gather();
        let saving = Saving::new(Some(at.point), at.point.lsn, tail.lsn, touched);
        let rewind = (at.point != tail).then_some(Rewind { at, step: Step::Saving(saving) });
        self.begin_promotion(id, rewind, &plan);
    }

    fn rewind_plan(&self, at: &Tail) -> String {
        let tail = self.journal.tail();
        let when = |time| rfc3339(time).map_or_else(String::new, |t| format!(", sealed {t}"));
        let cut = tail.point.lsn.0.saturating_sub(at.point.lsn.0);
        let lost = match cut {
            0 => "nothing is cut off".to_owned(),
            n => format!(
                "{n} records after it (to LSN {}{}) are saved in a salvage file and cut off",
                tail.point.lsn,
                when(tail.time)
            ),
        };
        let pending = at.point.lsn.0.saturating_sub(self.image.applied.point.lsn.0);
        format!(
            "the image becomes that of LSN {}{} ({pending} records are to be applied); {lost}",
            at.point.lsn,
            when(at.time)
        )
    }

    /// The record at which the window begins, and its time if that is known.
    pub(super) fn window_from(&self) -> (Lsn, Option<u64>) {
        let (from, underway) = (self.window_start(), self.image.underway());
        (from, (underway.point.lsn == from && underway.time > 0).then_some(underway.time))
    }

    fn outside(&self, what: &str, Window { from, tail }: Window) -> Look {
        let since = |time| rfc3339(time).map_or_else(String::new, |t| format!(" ({t})"));
        let underway = self.image.underway();
        let begin = if underway.point.lsn == from { since(underway.time) } else { String::new() };
        Look::Refused(
            Refusal::WouldLoseData,
            format!(
                "{what}: this shadow can become the image of LSN {from}{begin} to {}{} and of no other, for what \
                 is before is in its image already",
                tail.point.lsn,
                since(tail.time)
            ),
        )
    }

    fn look(&mut self, choosing: &mut Choosing) -> Look {
        let newest = *self.journal.tail();
        if choosing.is_binding() && (!self.journal.is_quiet() || self.image.applier.is_busy()) {
            self.journal.want(newest.point.lsn);
            return Look::Wait;
        }
        if matches!(&self.part, Part::Shadow(s) if s.is_cutting()) {
            // What it is about to lose is not there to choose.
            return Look::Wait;
        }
        let from = self.choice_from(choosing.purpose);
        let mut tail = *choosing.upto.get_or_insert(newest);
        if tail.point.lsn < from {
            // The image has got beyond it meanwhile, or is about to.
            tail = Some(self.image.underway()).filter(|t| t.point.lsn >= from).unwrap_or(newest);
            choosing.upto = Some(tail);
        }
        if self.journal.durable() < tail.point.lsn {
            // What is not durable may not stay.
            self.journal.want(tail.point.lsn);
            return Look::Wait;
        }
        let window = Window { from, tail };
        let found = match (choosing.meant, choosing.want.clone()) {
            (Some(meant), _) => Look::Found(meant),
            (None, At::Lsn(lsn)) if lsn < from || lsn > tail.point.lsn => {
                self.outside(&format!("LSN {lsn} is not among the records held back here"), window)
            }
            (None, At::Lsn(lsn)) => self.look_at(lsn, window, choosing),
            (None, At::Mark(text)) => self.look_for_mark(&text, window, choosing),
            (None, At::Time(time)) => self.look_for(time, window, choosing),
        };
        let Look::Found(at) = found else { return found };
        choosing.meant = Some(at);
        if at.point.lsn < from {
            return self.outside("that is too early", window);
        }
        if self.awaits_word(at.point.lsn, choosing) { Look::Wait } else { Look::Found(at) }
    }

    /// A view shows what is known to be durable on the primary, which says so within a heartbeat, or can't.
    fn awaits_word(&mut self, lsn: Lsn, choosing: &Choosing) -> bool {
        let Part::Shadow(s) = &self.part else { return false };
        let view = matches!(choosing.purpose, Purpose::View { .. });
        let awaits = view && s.vouched() < lsn && self.now.mono < choosing.until;
        if awaits {
            self.wake_at(choosing.until);
        }
        awaits
    }

    /// What is in the image can't be shown, or be its end, any more. Only the latter minds what may be in it after a crash.
    fn choice_from(&self, purpose: Purpose) -> Lsn {
        match (&self.part, purpose) {
            (Part::Shadow(s), Purpose::View { .. }) => self.image.underway().point.lsn.max(s.whole_from()),
            _ => self.window_start(),
        }
    }

    fn look_for_mark(&mut self, text: &str, window: Window, choosing: &mut Choosing) -> Look {
        let known = self.marks.find_all(text);
        let within = window.from..=window.tail.point.lsn;
        let inside: Vec<Lsn> = known.iter().copied().filter(|l| within.contains(l)).collect();
        match (&inside[..], known.last()) {
            ([lsn], _) => self.look_at(*lsn, window, choosing),
            ([], Some(lsn)) => self.outside(&format!("the mark is at LSN {lsn}"), window),
            ([], None) => self.outside("no such mark is held here", window),
            (several, _) => {
                let list: Vec<String> = several.iter().map(Lsn::to_string).collect();
                let text = format!("several marks are called so: give the LSN of one ({})", list.join(", "));
                Look::Refused(Refusal::Failed, text)
            }
        }
    }

    fn look_at(&mut self, lsn: Lsn, window: Window, choosing: &mut Choosing) -> Look {
        if lsn == window.tail.point.lsn {
            return Look::Found(window.tail);
        }
        if lsn == self.image.applied.point.lsn {
            return Look::Found(self.image.applied);
        }
        match fetch!(self, choosing.reader, lsn) {
            Fetched::Ready(record) => Look::Found(tail_of(&record)),
            Fetched::Pending => Look::Wait,
            Fetched::Lost => self.lost(lsn),
        }
    }

    /// The record before all that are too late, if it is not too late itself.
    fn look_before(&mut self, lsn: Lsn, time: u64, window: Window, choosing: &mut Choosing) -> Look {
        match self.look_at(lsn, window, choosing) {
            Look::Found(at) if at.time > time => self.outside("that is too early", window),
            other => other,
        }
    }

    fn lost(&self, lsn: Lsn) -> Look {
        let text = format!("record {lsn} can't be read in the journal here: choose one before it");
        Look::Refused(Refusal::Failed, text)
    }

    /// The last record sealed at or before `time`.
    fn look_for(&mut self, time: u64, window: Window, choosing: &mut Choosing) -> Look {
        let Window { from, tail } = window;
        if tail.time <= time && tail.time > 0 {
            return Look::Found(tail);
        }
        while !choosing.passed && choosing.next <= tail.point.lsn {
            match fetch!(self, choosing.reader, choosing.next) {
                Fetched::Ready(record) if record.stamp.time > time => choosing.passed = true,
                Fetched::Ready(record) => {
                    choosing.found = Some(tail_of(&record));
                    choosing.next = choosing.next.next();
                }
                Fetched::Pending => return Look::Wait,
                Fetched::Lost if choosing.next <= from => return self.outside("that is too early", window),
                Fetched::Lost => return self.lost(choosing.next),
            }
        }
        if let Some(found) = choosing.found {
            return Look::Found(found);
        }
        // None of those looked at: it is the one before them, if that is known not to be later.
        let before = choosing.next.prev();
        if before > self.image.applied.point.lsn && before >= from {
            return self.look_before(before, time, window, choosing);
        }
        let applied = self.image.applied;
        let known = before == applied.point.lsn && applied.point.lsn >= from;
        if !known || before == Lsn(0) {
            return self.outside("that is too early", window);
        }
        if applied.time <= time { Look::Found(applied) } else { self.outside("that is too early", window) }
    }

    /// Moves the way back on; `true`: it is done with, go on.
    pub(super) fn pump_rewind(&mut self, promoting: &mut Promoting) -> bool {
        let Some(mut rewind) = promoting.rewind.take() else { return false };
        let at = rewind.at;
        let mut moved = false;
        rewind.step = match rewind.step {
            Step::Saving(saving) if saving.is_done() => {
                moved = true;
                Step::Naming(self.name_cut(&at))
            }
            Step::Saving(mut saving) => {
                moved |= self.pump_salvage(&mut saving);
                Step::Saving(saving)
            }
            Step::Naming(ticket) if self.meta.is_saved(ticket) => {
                let mut begun = Box::new(Recovery::compare(
                    JOURNAL_RECOVERY,
                    &self.meta.sb,
                    origin(self.cfg.group),
                    at.point,
                ));
                begun.start(&mut self.disk);
                moved = true;
                Step::Cutting(begun)
            }
            waiting => waiting,
        };
        promoting.rewind = Some(rewind);
        moved
    }

    /// This node is the primary from here on, of a history that ends with `at`.
    fn name_cut(&mut self, at: &Tail) -> Ticket {
        self.tell_given_up(at.point.lsn, "promoted as of this record");
        self.become_primary();
        // Whoever was fed beyond holds what is no history any more.
        for fed in &mut self.links.peers {
            for position in [&mut fed.received, &mut fed.durable, &mut fed.applied] {
                *position = (*position).min(at.point.lsn);
            }
        }
        let sb = &mut self.meta.sb;
        sb.cut = Some(at.point);
        sb.generation = at.generation;
        // What was announced and received beyond is nobody's any more.
        (sb.limit, sb.floor) = (at.point.lsn, at.point.lsn);
        sb.openings.retain(|o| o.at.lsn < at.point.lsn);
        sb.clean = false;
        self.meta.save(true)
    }

    /// The answer to a request of the recovery that cuts the journal back.
    pub(super) fn rewind_done(&mut self, id: u64, result: DiskResult) {
        let Some(promoting) = &mut self.admin.promotion else { return };
        let Some(Rewind { at, step: Step::Cutting(recovery) }) = &mut promoting.rewind else { return };
        let lsn = at.point.lsn;
        let Some(outcome) = recovery.complete(id, result, &mut |_, _| {}, &mut self.disk) else { return };
        match outcome {
            Outcome::Found(r) => {
                let sb = &self.meta.sb;
                self.journal = Journal::new(JOURNAL, sb.group, sb.geometry, r.head, r.segments, r.tail);
                self.maps.rewind(lsn);
                self.marks.cut(lsn);
                self.feed.clear();
                self.backlog.cut(lsn);
                self.image.journal_cut();
                self.restart_timeline(&Tail { time: self.links.timeline.time_of(lsn), ..r.tail });
                self.update_keep();
                // It is durable that this is the primary: nothing more is waited for.
                let ticket = self.meta.save(false);
                if let Some(promoting) = &mut self.admin.promotion {
                    (promoting.rewind, promoting.ticket, promoting.cut) = (None, Some(ticket), Some(lsn));
                }
                self.part = Part::Primary(Primary::new());
            }
            Outcome::Differs => self.fail(format!(
                "the journal does not lead to LSN {lsn}, to which it was to be cut back: it is damaged. What was to \
                 be cut off is in the salvage file; promote another shadow"
            )),
            Outcome::Stopped(text) => self.fail(text),
        }
    }

    /// What is to be cut off can't be saved: the shadow stays as it is.
    pub(super) fn rewind_unsaved(&mut self, why: &str) {
        if let Some(id) = self.admin.promotion.take().and_then(|p| p.id) {
            let text = format!("what is to be cut off can't be saved: {why}. Nothing was changed");
            self.answer(id, Err((Refusal::Failed, text)));
            self.links.dial_now();
        }
    }
}

//! What administrators ask: drain, shutdown, promotion.
//!
//! Owns: their requests until they are answered. Invariants: a drain waits for the own journal and
//! backing, never for a shadow; a promotion makes the journal, then the term, durable in both
//! superblock slots before the first write under it (I7).

use super::event::{Action, AdminId, AdminOp, Answer, At, Level, Promote, Refusal};
use super::history::Happening;
use super::meta::Ticket;
use super::primary::Primary;
use super::rewind::{Choosing, Purpose, Rewind};
use super::run::{Part, Run};
use super::switchover::Moving;
use crate::disk::IoError;
use crate::format::message::Role;
use crate::role::{self, Promotion};
use crate::units::{BootId, Lsn, SECONDS};

struct Drain {
    id: AdminId,
    /// Everything up to this write goes into the backing (primary).
    seq: u64,
    shutdown: bool,
    /// The backing has that write once this record is checkpointed.
    upto: Option<Lsn>,
    closing: Option<Ticket>,
}

/// A promotion under way.
pub struct Promoting {
    /// Nobody may have asked: the place was handed over.
    pub(super) id: Option<AdminId>,
    /// The superblock that makes it durable, once its journal is.
    pub(super) ticket: Option<Ticket>,
    /// It is to be as of an earlier record.
    pub(super) rewind: Option<Rewind>,
    /// It was cut back to this one.
    pub(super) cut: Option<Lsn>,
}

/// Requests under way.
#[derive(Default)]
pub struct Admin {
    opens: Vec<AdminId>,
    drains: Vec<Drain>,
    pub(super) promotion: Option<Promoting>,
    /// The record as of which a node is to be promoted is being looked for.
    pub(super) choosing: Option<Choosing>,
    promoted: Vec<Option<AdminId>>,
    /// To be told of a promotion that nobody asked for.
    pub(super) heirs: Vec<AdminId>,
}

impl Admin {
    /// A promotion's term is not durable yet, or its record is being looked for.
    pub fn is_promoting(&self) -> bool {
        self.promotion.is_some() || self.choosing.as_ref().is_some_and(Choosing::is_binding)
    }
    /// A promotion that nothing speaks against.
    pub fn begin_promotion(&mut self, asked: Option<AdminId>) {
        self.promotion = Some(Promoting { id: asked, ticket: None, rewind: None, cut: None });
    }
    /// The process is to end.
    pub fn is_shutting_down(&self) -> bool {
        self.drains.iter().any(|d| d.shutdown)
    }
    /// Write-back and sealing are not to wait for their time.
    pub fn is_draining(&self) -> bool {
        !self.drains.is_empty()
    }
}

impl Run {
    /// An administrator's request.
    pub(super) fn admin(&mut self, id: AdminId, op: AdminOp) {
        match op {
            AdminOp::Status => {
                let answer = Answer::Status(Box::new(self.status()));
                self.out.push(Action::Answer { id, answer });
            }
            _ if self.fault.is_some() && op != AdminOp::Shutdown => {
                let text = self.fault.clone().unwrap_or_default();
                self.answer(id, Err((Refusal::Failed, text)));
            }
            AdminOp::Open => match self.part {
                _ if self.is_retired() => {
                    let text = format!(
                        "{}: it serves nothing. To have it follow: volrep rejoin {}",
                        self.promoted_since(),
                        self.cfg.group_name
                    );
                    self.answer(id, Err((Refusal::Busy, text)));
                }
                Part::Primary(_) => self.admin.opens.push(id),
                Part::Shadow(_) => {
                    let text = "this node is a shadow: attach on the primary, or promote this node first";
                    self.answer(id, Err((Refusal::Busy, text.into())));
                }
            },
            AdminOp::Drain => self.drain(id, false),
            AdminOp::Shutdown => self.drain(id, true),
            AdminOp::Promote(wish) => self.promote(id, wish),
            AdminOp::Lease { ns } => self.lease(id, ns),
            AdminOp::Outdate { member, fenced, dry_run } => self.outdate(id, &member, fenced, dry_run),
            AdminOp::Refresh(wish) => self.refresh(id, wish),
            AdminOp::Mark { text } => self.mark(id, text),
            AdminOp::RefreshStop => self.refresh_stop(id),
            AdminOp::Switchover { to, dry_run } => self.switchover(id, &to, dry_run),
            AdminOp::AwaitTakeover => self.admin.heirs.push(id),
            AdminOp::View { scratch, at: None } => self.open_view(id, scratch, None),
            AdminOp::View { scratch, at: Some(At::Lsn(lsn)) } => self.open_view(id, scratch, Some(lsn)),
            AdminOp::View { scratch, at: Some(at) } => self.choose_view(id, scratch, at),
            AdminOp::ViewClose => self.close_view(id),
            AdminOp::Rejoin { keep, dry_run } => self.rejoin(id, keep.as_deref(), dry_run),
        }
    }

    pub(super) fn answer(&mut self, id: AdminId, outcome: Result<String, (Refusal, String)>) {
        let answer = match outcome {
            Ok(text) => Answer::Done(text),
            Err((refusal, text)) => Answer::Refused(refusal, text),
        };
        self.out.push(Action::Answer { id, answer });
    }

    fn drain(&mut self, id: AdminId, shutdown: bool) {
        if self.fault.is_some() {
            let text = "stopped without draining: the node has failed; what was acknowledged is recovered from \
                        the journal and the write cache at the next start";
            return self.answer(id, Err((Refusal::Failed, text.into())));
        }
        if shutdown {
            self.stop_moving();
            self.end_view("this node is shutting down");
        } else if self.is_viewed() {
            let text = format!(
                "a view holds the image here: close it first (volrep view {} --close)",
                self.cfg.group_name
            );
            return self.answer(id, Err((Refusal::Busy, text)));
        }
        let mut seq = 0;
        match &mut self.part {
            Part::Primary(p) => {
                p.closing |= shutdown;
                seq = p.cache.as_ref().map_or(0, |c| c.last_seq());
                if shutdown {
                    // They were not answered, and the room that they wait for may never come.
                    for id in p.take_waiting() {
                        self.out.push(Action::Complete { id, result: Err(IoError::ESHUTDOWN) });
                    }
                }
            }
            Part::Shadow(s) => s.closing |= shutdown,
        }
        if shutdown && matches!(self.part, Part::Shadow(_)) {
            self.close_links("this node is shutting down");
            self.forget_held();
        }
        self.admin.drains.push(Drain { id, seq, shutdown, upto: None, closing: None });
    }

    /// Answers everything that can't be done any more.
    pub(super) fn refuse_admin(&mut self, refusal: Refusal, why: &str) {
        let mut admin = std::mem::take(&mut self.admin);
        self.admin.heirs = std::mem::take(&mut admin.heirs);
        let text = why.to_owned();
        let outdated = self.end_outdate();
        let compared = self.compare.asked.take().map(|(id, _)| id);
        let rejoined = self.take_rejoins();
        for id in self
            .moving
            .take()
            .and_then(Moving::asked)
            .into_iter()
            .chain(compared)
            .chain(rejoined)
            .chain(outdated)
        {
            self.answer(id, Err((Refusal::Failed, text.clone())));
        }
        let drains = admin.drains.into_iter().map(|d| d.id);
        let choosing = admin.choosing.into_iter().map(|c| c.id);
        let promotion = admin.promotion.into_iter().map(|p| p.id);
        let promotions = admin.promoted.into_iter().chain(promotion).flatten().chain(choosing);
        let marks = self.take_marks();
        for id in admin.opens.into_iter().chain(promotions).chain(drains).chain(marks) {
            self.answer(id, Err((refusal, text.clone())));
        }
    }

    /// Moves administrators' requests on; whether anything moved.
    pub(super) fn pump_admin(&mut self) -> bool {
        if let Part::Primary(p) = &self.part
            && p.is_serving()
        {
            for id in std::mem::take(&mut self.admin.opens) {
                self.answer(id, Ok("serving".into()));
            }
            for id in std::mem::take(&mut self.admin.promoted) {
                let Some(id) = id else {
                    self.tell_taken_over();
                    continue;
                };
                let lsn = self.journal.tail().point.lsn;
                let text = format!("promoted: term {}, from LSN {lsn} on", self.meta.sb.term.counter);
                self.answer(id, Ok(text));
            }
        }
        let mut moved = self.pump_choosing() | self.pump_promotion();
        let mut i = 0;
        while i < self.admin.drains.len() {
            if self.is_drained(i) {
                let drain = self.admin.drains.remove(i);
                self.answer(drain.id, Ok(if drain.shutdown { "closed" } else { "drained" }.into()));
                moved = true;
            } else {
                i += 1;
            }
        }
        moved
    }

    fn is_drained(&mut self, i: usize) -> bool {
        let Drain { seq, shutdown, upto, closing, .. } = self.admin.drains[i];
        if let Some(ticket) = closing {
            return self.meta.is_saved(ticket);
        }
        if let (false, Part::Primary(p)) = (shutdown, &self.part) {
            // Writes may go on: the node need not be idle at any moment.
            let freed = p.freed_write() >= seq && !p.is_draining();
            let written = p.is_serving() && p.durable_write() >= seq && freed;
            let upto = upto.or(written.then_some(self.image.applied.point.lsn));
            self.admin.drains[i].upto = upto;
            return match upto {
                Some(lsn) if self.links.checkpoint >= lsn => true,
                Some(_) => {
                    self.hurry_checkpoint();
                    false
                }
                None => {
                    let tail = self.journal.tail().point.lsn;
                    self.journal.want(tail);
                    false
                }
            };
        }
        let tail = self.journal.tail().point.lsn;
        if !self.journal.is_quiet() {
            self.journal.want(tail);
        }
        let applied = self.image.applied.point.lsn;
        let done = match &self.part {
            Part::Primary(p) => {
                p.is_serving()
                    && p.is_written_back(seq)
                    && p.durable_write() >= seq
                    && (!shutdown || (applied == tail && p.is_empty()))
            }
            Part::Shadow(s) => {
                !s.is_cutting()
                    && !self.is_rewinding()
                    && !self.image_waits()
                    && self.journal.is_quiet()
                    && applied >= self.meta.sb.limit.min(tail).min(s.delay.limit())
            }
        };
        if !done || !self.image.is_idle() {
            return false;
        }
        if self.links.checkpoint < applied || !self.checkpoint_idle() {
            self.hurry_checkpoint();
            return false;
        }
        if !shutdown {
            return true; // a shadow
        }
        if !self.journal.is_quiet() {
            return false;
        }
        let sb = &mut self.meta.sb;
        sb.clean = true;
        sb.cache_boot = BootId::default();
        sb.floor = sb.floor.max(tail);
        self.admin.drains[i].closing = Some(self.meta.save(true));
        false
    }

    fn promote(&mut self, id: AdminId, wish: Promote) {
        let Promote { fenced, accept_outdated, dry_run, at } = wish;
        if self.admin.is_promoting() {
            return self.answer(id, Err((Refusal::Busy, "a promotion is under way".into())));
        }
        if self.is_retiring() || self.is_moving_over() {
            let text = "this node is giving its place as the primary up: try again in a moment";
            return self.answer(id, Err((Refusal::Busy, text.into())));
        }
        if self.admin.is_shutting_down() {
            let text = "the node is shutting down: start it again, then promote it";
            return self.answer(id, Err((Refusal::Busy, text.into())));
        }
        let facts = role::Facts {
            role: self.meta.sb.role,
            consistent: self.meta.sb.consistent,
            // One that was cut off or killed with its machine stays connected for a while.
            primary_heard: self.hears_primary() && self.silence().is_none(),
            fenced,
            current: !self.is_outdated() || accept_outdated,
        };
        let plan = self.promotion_plan();
        let refusal = match role::promotion(facts) {
            Promotion::Allowed => match at {
                Some(at) if dry_run => return self.begin_choosing(id, at, Purpose::Plan),
                Some(at) => return self.begin_choosing(id, at, Purpose::Promotion),
                None if dry_run => return self.answer(id, Ok(plan)),
                None => return self.begin_promotion(id, None, &plan),
            },
            Promotion::AlreadyPrimary => (Refusal::Busy, "this node is the primary already".to_owned()),
            Promotion::Inconsistent => (
                Refusal::WouldLoseData,
                "the image here is half of a first full copy: it can't be used. Finish the copy".to_owned(),
            ),
            Promotion::PrimaryAlive => (
                Refusal::Unfenced,
                "the primary is connected and alive: two nodes would write. Stop it first (`volrep detach` \
                 and stop its daemon), or fence it"
                    .to_owned(),
            ),
            Promotion::Outdated => (
                Refusal::WouldLoseData,
                format!(
                    "this node was lost as a member of the sync set, and the primary went on without it: acknowledged writes are \
                     not here. {plan}\npromote the node that has them, or pass --accept-outdated to lose them"
                ),
            ),
            Promotion::Unfenced => (
                Refusal::Unfenced,
                format!("{plan}\nfence the old primary first, or pass --i-fenced-the-old-primary"),
            ),
        };
        self.answer(id, Err(refusal));
    }

    /// It is decided. The links are closed, so that nothing comes any more.
    pub(super) fn begin_promotion(&mut self, id: AdminId, rewind: Option<Rewind>, plan: &str) {
        self.end_view("this node is being promoted");
        self.end_moving(Err((Refusal::Failed, "this node was promoted meanwhile".into())));
        self.close_links("this node is being promoted");
        self.forget_held();
        self.log(Level::Warn, format!("promotion begins: {plan}"));
        self.lease = None;
        self.admin.begin_promotion(Some(id));
        if let Some(promoting) = &mut self.admin.promotion {
            promoting.rewind = rewind;
        }
    }

    /// What a promotion would do, and what may be lost.
    fn promotion_plan(&self) -> String {
        let tail = self.journal.tail();
        let heard = self.links.primary().and_then(|n| self.links.view(n)).and_then(|v| v.heard);
        let known = match heard.zip(self.links.heard_of_primary) {
            Some((_, primary)) => {
                let missing = primary.tail.0.saturating_sub(tail.point.lsn.0);
                let ago = self.word_age() / SECONDS;
                let by = self.cascade_source().map_or_else(String::new, |name| format!(" that {name} had"));
                format!(
                    "at the last heartbeat{by}, {ago} s ago, {missing} records of the primary were not here; later writes are unknown"
                )
            }
            None => {
                "the primary was not heard since this node started: what it wrote later is unknown".into()
            }
        };
        let known = match self.holds_everything() {
            true => format!(
                "{known}; this node is a member of the sync set: nothing that a FLUSH has acknowledged is missing"
            ),
            false => known,
        };
        let pending = tail.point.lsn.0 - self.image.applied.point.lsn.0;
        if let Some(old) = self.old_image() {
            return format!(
                "a resync is under way and would be given up: the image here is the old one, of LSN {old}; {known}"
            );
        }
        format!(
            "the shadow ends at LSN {} ({pending} records are not in the image yet); {known}",
            tail.point.lsn
        )
    }

    /// Before a promotion: the old image, if a new one is not whole yet; or the new one, once it is in
    /// place. Whether that takes more time.
    fn leave_resync(&mut self) -> bool {
        if self.is_staging() {
            self.retreat(None);
            return true;
        }
        let turning = matches!(&self.part, Part::Shadow(s) if s.is_turning());
        turning || self.image_waits() || self.view_mut().is_some()
    }

    fn pump_promotion(&mut self) -> bool {
        let Some(mut promoting) = self.admin.promotion.take() else { return false };
        let moved = match promoting.ticket {
            None => self.promote_on(&mut promoting),
            Some(ticket) if self.meta.is_saved(ticket) => {
                self.tell(Happening::Promoted { cut: promoting.cut.map(|lsn| lsn.0) });
                self.admin.promoted.push(promoting.id);
                return true;
            }
            Some(_) => false,
        };
        self.admin.promotion = Some(promoting);
        moved
    }

    fn promote_on(&mut self, promoting: &mut Promoting) -> bool {
        if promoting.rewind.as_ref().is_some_and(Rewind::is_named) {
            return self.pump_rewind(promoting);
        }
        if self.leave_resync() {
            return false;
        }
        // First the journal: the term says that everything up to its end is history.
        let tail = self.journal.tail().point.lsn;
        if !self.journal.is_quiet() {
            self.journal.want(tail);
            return false;
        }
        let cutting = matches!(&self.part, Part::Shadow(s) if s.is_cutting());
        if cutting || !self.checkpoint_idle() || !self.image.is_idle() || self.scrub.is_some() {
            return false;
        }
        if promoting.rewind.is_some() {
            return self.pump_rewind(promoting);
        }
        self.become_primary();
        let sb = &mut self.meta.sb;
        sb.limit = sb.limit.max(tail);
        sb.floor = sb.floor.max(tail);
        sb.clean = true;
        promoting.ticket = Some(self.meta.save(true));
        debug_assert!(matches!(self.part, Part::Shadow(_)), "a live primary is replaced");
        // From here on nothing is followed; a generation opens only once this is durable.
        self.part = Part::Primary(Primary::new());
        true
    }

    /// What the superblock says of a node that is the primary under the next term.
    pub(super) fn become_primary(&mut self) {
        self.leave_clock();
        let sb = &mut self.meta.sb;
        sb.term = role::next_term(sb.term, sb.node);
        sb.role = Role::Primary;
        sb.sync_set.retain(|n| *n != sb.node);
        sb.outdated.retain(|n| *n != sb.node);
        (sb.retired, sb.handed) = (None, None);
        sb.redo = None;
        sb.peers.clear();
        sb.cache_boot = BootId::default();
    }
}

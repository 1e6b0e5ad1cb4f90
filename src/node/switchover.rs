//! A planned move: the primary hands its place over to a shadow that has everything.
//!
//! Owns: the move, and what a node that has handed its place over waits for. Invariants: the place is given away
//! only when all that was accepted is durable on both sides (nothing is lost), and durably, before the shadow is
//! told (no two primaries). Whoever was told nothing has not taken over: when he says so in a handshake, under the
//! same term, the place is taken back.

use super::delay::Delay;
use super::event::{AdminId, Level, LinkId, Refusal};
use super::links::LinkState;
use super::meta::Ticket;
use super::run::{Part, Run};
use super::shadow::Shadow;
use crate::format::message::{Identity, Message, Role};
use crate::link::handshake::{TermOrder, order};
use crate::role::{self, Switch};
use crate::units::{BootId, HistoryPoint, NodeId, SECONDS};

/// How long the shadow may take to have everything, and then to answer, ns.
const PATIENCE: u64 = 30 * SECONDS;
/// Journal bytes that the shadow may have to apply before it serves.
const MOST_LAG: u64 = 256 << 20;

/// On the way.
pub struct Moving {
    admin: Option<AdminId>,
    to: NodeId,
    name: String,
    until: u64,
    step: Step,
}

enum Step {
    /// What was accepted becomes durable, here and there.
    Draining(LinkId),
    /// The superblock is told that the place is given away.
    Demoting(LinkId, Ticket),
    /// The other one is told.
    Handed,
}

impl Moving {
    /// Whoever waits for its outcome.
    pub fn asked(self) -> Option<AdminId> {
        self.admin
    }
    /// Nobody has been told anything yet.
    fn is_draining(&self) -> bool {
        matches!(self.step, Step::Draining(_))
    }
}

impl Run {
    /// New writes wait: the place of the primary is being given away.
    pub(super) fn is_moving_over(&self) -> bool {
        self.moving.is_some() && matches!(self.part, Part::Primary(_))
    }

    /// An administrator's request on the primary.
    pub(super) fn switchover(&mut self, id: AdminId, to: &str, dry_run: bool) {
        let peer = self.links.peers.iter().find(|p| p.name == to);
        let node = peer.and_then(|p| p.node);
        let lag = peer.and_then(|p| self.behind(p.applied)).map_or(0, |(_, bytes, _)| bytes);
        let current = peer.is_some_and(|p| p.state == "UpToDate" && !p.resyncing) && lag < MOST_LAG;
        let link = node.and_then(|n| self.links.sending_to(n));
        let facts = role::SwitchFacts {
            serving: matches!(&self.part, Part::Primary(p) if p.is_serving() && !p.closing),
            known: peer.is_some(),
            dialled: self.cfg.peers.iter().any(|p| p.name == to && p.dial),
            linked: link.is_some(),
            current,
            busy: self.is_raising()
                || self.moving.is_some()
                || self.is_outdating()
                || self.is_retiring()
                || self.admin.is_draining(),
        };
        let names: Vec<_> = self.links.peers.iter().map(|p| p.name.as_str()).collect();
        let refusal = match (role::switchover(facts), node, link) {
            (Switch::Allowed, Some(node), Some(link)) => {
                let tail = self.journal.tail().point.lsn;
                if dry_run {
                    let text = format!(
                        "{to} would become the primary after LSN {tail} and what is written until then; \
                         this node would follow it as a shadow"
                    );
                    return self.answer(id, Ok(text));
                }
                self.log(Level::Warn, format!("switchover to {to} begins"));
                let until = self.now.mono + PATIENCE;
                let (name, step) = (to.to_owned(), Step::Draining(link));
                self.moving = Some(Moving { admin: Some(id), to: node, name, until, step });
                return;
            }
            (Switch::NotPrimary, ..) => (
                Refusal::Busy,
                "this node is not a primary that serves: run it on the primary, or promote a shadow"
                    .to_owned(),
            ),
            (Switch::Unknown, ..) => {
                (Refusal::Failed, format!("no peer is called {to}; there are: {}", names.join(", ")))
            }
            (Switch::NoAddress, ..) => (
                Refusal::Unreachable,
                format!(
                    "no address of {to} is known here, so this node could not follow it: add it as a [[peer]] (name, \
                     address) to the configuration, and restart the daemon"
                ),
            ),
            (Switch::Busy, ..) => (Refusal::Busy, "another change of this node is under way".to_owned()),
            (Switch::NotCurrent, ..) => (
                Refusal::Busy,
                format!(
                    "{to} is not UpToDate, or has {} MiB and more to apply before it could serve: wait until \
                     `volrep status` says so (a view there holds its image: close it), then try again",
                    MOST_LAG >> 20
                ),
            ),
            (Switch::Unreachable | Switch::Allowed, ..) => {
                (Refusal::Unreachable, format!("{to} is not connected: bring it or its link back first"))
            }
        };
        self.answer(id, Err(refusal));
    }

    /// Moves it on; whether anything moved.
    pub(super) fn pump_moving(&mut self) -> bool {
        let Some(moving) = &self.moving else { return false };
        let (until, to) = (moving.until, moving.to);
        match &moving.step {
            Step::Draining(link) => {
                let link = *link;
                if self.links.sending_to(to) != Some(link) {
                    return self.call_off("the link to it broke");
                }
                if self.now.mono >= until {
                    return self.call_off("it did not have everything in time");
                }
                self.wake_at(until);
                self.give_away(link)
            }
            Step::Demoting(link, ticket) => {
                let (link, ticket) = (*link, *ticket);
                self.meta.is_saved(ticket) && self.hand_over(link)
            }
            Step::Handed if self.now.mono >= until => {
                let text = format!(
                    "{} was told to take over and has not answered: this node is a shadow now. When the link is back \
                     either {0} is the primary, or this node takes its place back by itself. If {0} is lost for good, \
                     fence it and promote this node",
                    moving.name
                );
                self.end_moving(Err((Refusal::Unreachable, text)))
            }
            Step::Handed => {
                self.wake_at(until);
                false
            }
        }
    }

    pub(super) fn end_moving(&mut self, outcome: Result<String, (Refusal, String)>) -> bool {
        let Some(moving) = self.moving.take() else { return false };
        if let Err((_, text)) = &outcome {
            self.log(Level::Error, text.clone());
        }
        if let Some(id) = moving.admin {
            self.answer(id, outcome);
        }
        true
    }

    /// Nothing has been given away yet: the node goes on as it was.
    fn call_off(&mut self, why: &str) -> bool {
        let name = self.moving.as_ref().map_or(String::new(), |m| m.name.clone());
        self.end_moving(Err((
            Refusal::Failed,
            format!("the switchover to {name} is rolled back, this node is the primary still: {why}"),
        )))
    }

    /// The node is to end: nothing is moved any more.
    pub(super) fn stop_moving(&mut self) {
        if self.moving.as_ref().is_some_and(Moving::is_draining) {
            self.call_off("it is shutting down");
        }
    }

    /// The place is given away once both sides have everything.
    fn give_away(&mut self, link: LinkId) -> bool {
        let tail = self.journal.tail().point.lsn;
        let there = match self.links.by_id.get(&link).map(|l| &l.state) {
            Some(LinkState::Sending(sender)) => sender.positions().1,
            _ => return false,
        };
        let Part::Primary(p) = &self.part else { return false };
        let (sealed, idle) = (p.is_sealed() && !p.is_waited_for(), !self.reading.is_busy());
        if !self.journal.is_quiet() {
            self.journal.want(tail);
            return false;
        }
        if !sealed || !idle || there < tail || !self.image.is_idle() || !self.checkpoint_idle() {
            return false;
        }
        let Some(moving) = &mut self.moving else { return false };
        let sb = &mut self.meta.sb;
        sb.role = Role::Shadow;
        sb.handed = Some(moving.to);
        sb.limit = tail;
        sb.floor = sb.floor.max(tail);
        (sb.clean, sb.cache_boot) = (false, BootId::default());
        sb.peers.clear();
        moving.step = Step::Demoting(link, self.meta.save(true));
        true
    }

    /// The other one is told; this node is a shadow from now on.
    fn hand_over(&mut self, link: LinkId) -> bool {
        let at = self.journal.tail().point;
        if let Some(moving) = &mut self.moving {
            moving.step = Step::Handed;
            moving.until = self.now.mono + PATIENCE;
        }
        if self.links.by_id.get(&link).is_some_and(|l| matches!(l.state, LinkState::Sending(_))) {
            self.send(link, Message::Handover { at });
        }
        self.close_links("this node has handed its place over");
        self.leave_primary();
        self.log(Level::Warn, format!("this node is a shadow now, from LSN {} on", at.lsn));
        true
    }

    /// From a primary that has nothing under way to a shadow.
    pub(super) fn leave_primary(&mut self) {
        let (limit, tail) = (self.meta.sb.limit, *self.journal.tail());
        self.refuse_everything();
        if let Part::Primary(p) = &mut self.part
            && let Some(cache) = p.cache.take()
        {
            self.ring = Some(cache.into_memory());
        }
        self.stop_reading_through();
        // What was written back may be newer than the record that it was written back for: all goes there at once.
        let begun = limit.min(tail.point.lsn);
        let delay = Delay::new(self.cfg.apply_delay, begun, tail.point.lsn, tail.time, self.now.mono);
        let mut shadow = Shadow::new(limit, begun, delay);
        shadow.closing = self.admin.is_shutting_down();
        self.part = Part::Shadow(shadow);
        // Whoever came meanwhile was greeted by a primary.
        self.close_links("this node is a shadow now");
        (self.links.entering, self.links.timed) = (None, self.now.mono);
        if self.meta.sb.handed.is_none() {
            // Should it take its place back, it does so under the lease that it had.
            self.lease = None;
        }
        self.links.forget_followers();
        self.links.dial_now();
        self.update_keep();
    }

    /// The primary hands its place over to this shadow.
    pub(super) fn handed_over(&mut self, link: LinkId, at: HistoryPoint) {
        let sb = &self.meta.sb;
        let whole = sb.consistent && sb.resync.is_none() && self.journal.tail().point == at;
        let free = !self.admin.is_promoting() && !self.admin.is_draining();
        let turning = matches!(&self.part, Part::Shadow(s) if s.is_turning() || s.is_cutting() || s.closing);
        if !whole || !free || turning {
            return self.drop_link(link, "it hands its place over, which can't be taken now");
        }
        self.log(Level::Warn, format!("the primary hands its place over, after LSN {}", at.lsn));
        self.lease = None;
        self.take_over();
    }

    /// A peer has said who it is. The one that was to take over has not: the place is taken back.
    pub(super) fn takes_back(&mut self, link: LinkId, peer: &Identity) -> bool {
        let sb = &self.meta.sb;
        let told = sb.role == Role::Shadow && sb.handed == Some(peer.node);
        let turning = matches!(&self.part, Part::Shadow(s) if s.is_turning() || s.is_cutting() || s.closing);
        let same = peer.group == sb.group && peer.role == Role::Shadow;
        if told && self.is_moving_over() {
            // The place is not given away durably yet; it is soon, and then the other one is to be told.
            self.drop_link(link, "the place is being handed over");
            return true;
        }
        if !told || !same || order(sb.term, peer.term) != TermOrder::Equal || turning {
            return false;
        }
        self.drop_link(link, "it has not taken over: this node takes its place back");
        let name = peer.name.clone();
        let text = format!(
            "the switchover to {name} is rolled back, this node is the primary again: {name} was not reached"
        );
        self.end_moving(Err((Refusal::Failed, text)));
        self.take_over();
        true
    }

    /// Another node was promoted: there is nothing to be taken back.
    pub(super) fn taken_over(&mut self, by: NodeId, name: &str) {
        (self.meta.sb.handed, self.lease) = (None, None);
        if self.moving.as_ref().is_some_and(|m| !m.is_draining()) {
            let term = self.meta.sb.term.counter;
            let given = self.moving.as_ref().is_some_and(|m| m.to == by);
            let outcome = if given {
                Ok(format!("{name} has taken over, under term {term}; this node follows it"))
            } else {
                Err((Refusal::Failed, format!("{name} was promoted meanwhile, under term {term}")))
            };
            self.end_moving(outcome);
        }
    }

    /// Somebody's word is not needed: the primary itself gives the place away, or this node had it last.
    fn take_over(&mut self) {
        self.end_view("this node takes over");
        self.close_links("this node takes over");
        self.admin.begin_promotion(None);
    }

    /// This node is the primary, and nobody here asked for it.
    pub(super) fn tell_taken_over(&mut self) {
        let lsn = self.journal.tail().point.lsn;
        let counter = self.meta.sb.term.counter;
        self.log(Level::Warn, format!("this node is the primary: term {counter}, from LSN {lsn} on"));
        for id in std::mem::take(&mut self.admin.heirs) {
            self.answer(id, Ok("this node has taken over".into()));
        }
    }
}

//! A primary calls a shadow that follows it through another one.
//!
//! Owns: the call. Invariants: only what the sync set needs is called, for through another shadow comes only what is durable
//! on every member, and a member that stayed there would wait for itself; a shadow that is called leaves the one that
//! feeds it only for a primary that holds what it lacks, follows nobody else before it is clear what comes of that, and
//! heeds no other call soon.

use super::config::Timing;
use super::event::LinkId;
use super::links::{Links, PATIENCE};
use super::run::{Part, Run};
use crate::format::message::Identity;
use crate::units::NodeId;

/// After a call, none is heeded for so many times as long as a verdict lasts.
const CALLS: u64 = 24;

/// The call that was heeded last.
#[derive(Default)]
pub struct Call {
    /// It is being dialled, and nobody else is until then.
    peer: Option<usize>,
    until: u64,
    deaf_until: u64,
}

impl Call {
    /// That peer is not dialled before, on the monotonic clock.
    pub(super) fn holds_back(&self, peer: usize) -> u64 {
        if self.peer.is_some_and(|called| called != peer) { self.until } else { 0 }
    }
}

impl Links {
    /// The primary, which is that peer, calls: it is dialled now, and no other one before that has come to an end. But a
    /// call that came to nothing is not heeded again soon.
    pub(super) fn heeds_call(&mut self, peer: usize, now: u64, timing: &Timing) -> bool {
        if now < self.call.deaf_until {
            return false;
        }
        let deaf_until = now + CALLS * PATIENCE * timing.redial;
        self.call = Call { peer: Some(peer), until: now + timing.silence, deaf_until };
        self.dials[peer].at = 0;
        true
    }

    /// A dial of that peer has come to an end.
    pub(super) fn call_ends(&mut self, peer: usize) {
        if self.call.peer == Some(peer) {
            self.call.peer = None;
            self.dial_now();
        }
    }
}

impl Run {
    /// This primary needs the peer that is dialled over this link in the sync set, so it has to follow directly: through
    /// another one comes only what is durable on every member, and a member that stayed there would wait for itself.
    pub(super) fn calls(&self, link: LinkId) -> bool {
        let Part::Primary(p) = &self.part else { return false };
        let peer = self.links.by_id.get(&link).and_then(|l| l.dialed).and_then(|i| self.cfg.peers.get(i));
        let member = |name: &str| self.meta.sb.sync_set.iter().any(|n| self.name_of(*n) == name);
        p.is_serving() && !self.is_asking() && peer.is_some_and(|p| p.sync || member(&p.name))
    }

    /// The primary calls this shadow. What it lacks is there, too: it leaves the one through which it follows.
    pub(super) fn called_by_primary(&mut self, primary: &Identity) {
        let through = self.links.receiving().filter(|_| self.is_cascaded());
        let Some(at) = self.cfg.peers.iter().position(|p| p.name == primary.name && p.dial) else { return };
        let held = primary.oldest.lsn <= self.journal.tail().point.lsn;
        let heeds = self.hears_primary() && self.is_settled() && held;
        let (now, timing) = (self.now.mono, self.cfg.timing);
        if let Some(through) = through.filter(|_| heeds && self.links.heeds_call(at, now, &timing)) {
            self.drop_link(through, "the primary calls this shadow");
        }
    }

    /// Whether this primary has nothing to ask of that node: it follows, through another one, and that will do.
    pub(super) fn follows_well(&self, node: Option<NodeId>, sync: bool) -> bool {
        let member = |n: &NodeId| sync || self.meta.sb.sync_set.contains(n);
        let primary = matches!(self.part, Part::Primary(_));
        primary && node.filter(|n| !member(n)).is_some_and(|n| self.fed_through(n).is_some())
    }
}

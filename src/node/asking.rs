//! A primary that starts asks those whom it can reach whether another node was promoted meanwhile.
//!
//! Owns: whom it still waits for. Invariant: a primary that starts serves nothing before each peer that it can
//! dial has answered, can't be reached, or had its time; so an old primary that comes back beside the new one
//! acknowledges nothing (I8). One that is promoted asks nobody: its term is above all that it knows.

use super::event::LinkId;
use super::run::{Part, Run};
use crate::format::message::Role;

/// Who has not answered yet.
pub struct Asking {
    /// When it goes on without them, on the monotonic clock.
    until: u64,
    /// By their index in the configuration.
    left: Vec<usize>,
}

impl Run {
    /// A node that was a primary begins to ask.
    pub(super) fn begin_asking(&mut self) {
        let left: Vec<usize> = (0..self.cfg.peers.len()).filter(|i| self.cfg.peers[*i].dial).collect();
        if self.meta.sb.role == Role::Primary && !self.is_retiring() && !left.is_empty() {
            self.asking = Some(Asking { until: self.now.mono + self.cfg.timing.ask, left });
        }
    }

    /// Somebody is still waited for.
    pub(super) fn is_asking(&self) -> bool {
        self.asking.is_some()
    }

    /// Whether this peer is to be dialled before the node serves.
    pub(super) fn asks(&self, peer: usize) -> bool {
        self.asking.as_ref().is_some_and(|a| a.left.contains(&peer))
    }

    /// This peer has answered, or can't be reached: it is not waited for any more.
    pub(super) fn heard_out(&mut self, peer: usize) {
        if let Some(asking) = &mut self.asking {
            asking.left.retain(|i| *i != peer);
        }
    }

    /// The peer that was dialled over this link has answered.
    pub(super) fn heard_out_over(&mut self, link: LinkId) {
        if let Some(peer) = self.links.by_id.get(&link).and_then(|l| l.dialed) {
            self.heard_out(peer);
        }
    }

    /// A peer of this name has told its term.
    pub(super) fn heard_out_by_name(&mut self, name: &str) {
        if let Some(peer) = self.cfg.peers.iter().position(|p| p.name == name) {
            self.heard_out(peer);
        }
    }

    /// Ends the asking when it is time; whether it has ended now.
    pub(super) fn pump_asking(&mut self) -> bool {
        let Some(asking) = &self.asking else { return false };
        let closing = matches!(&self.part, Part::Primary(p) if p.closing);
        if asking.left.is_empty() || self.now.mono >= asking.until || self.is_retiring() || closing {
            self.asking = None;
            return true;
        }
        let until = asking.until;
        self.wake_at(until);
        false
    }
}

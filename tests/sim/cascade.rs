//! Groups in which a shadow is fed by another shadow.
//!
//! Owns: who dials whom then. Invariant: what a shadow passes on is durable in its own journal and in that of the
//! primary that sealed it, so neither ever takes it back (I7).

use crate::scenario::Phase;
use crate::world::{Outcome, Purpose, World, broken};
use volrep::format::message::Role;
use volrep::format::record::Record;
use volrep::node::event::{AdminOp, Refresh};

/// Who follows whom, of three nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Topology {
    /// Both shadows follow the primary alone.
    Star,
    /// The third knows of the second alone.
    Chain,
    /// The third follows the second or the primary, whoever answers first.
    Either,
    /// And the second likewise: they are not to feed each other.
    Ring,
}

impl Topology {
    /// Whether `node` dials `peer`.
    pub fn dials(self, node: usize, peer: usize) -> bool {
        (self, node, peer) != (Topology::Chain, 2, 0)
    }
    /// Whether `node` follows `peer` even while that is a shadow.
    pub fn cascades(self, node: usize, peer: usize) -> bool {
        match self {
            Topology::Star => false,
            Topology::Chain | Topology::Either => (node, peer) == (2, 1),
            Topology::Ring => node + peer == 3,
        }
    }
    /// What is rotten on this node's disk comes to no other: nobody takes it for the truth.
    pub fn may_rot(self, node: usize) -> bool {
        match self {
            Topology::Star => true,
            Topology::Chain | Topology::Either => node == 2,
            Topology::Ring => false,
        }
    }
}

impl World {
    /// A node sends a record. A shadow sends only what nobody takes back.
    pub fn watch_passed_on(&mut self, node: usize, record: &Record) -> Outcome {
        if self.hosts[node].watch.role() != Some(Role::Shadow) {
            return Ok(());
        }
        self.counts.check("I7");
        self.counts.met("a record passed on by a shadow");
        let lsn = record.stamp.lsn.0;
        if self.plan.delay_of(node) > 0 && self.hosts[node].watch.applied.is_none_or(|at| at.lsn.0 < lsn) {
            self.counts.met("a record passed on that is held back here");
        }
        self.watch_claim(node, lsn)?;
        let sealer = record.stamp.generation.term.node;
        let Some(sealer) = self.hosts.iter().position(|h| h.id == sealer) else {
            return broken("I7", format!("record {lsn} is of nobody"));
        };
        if self.scenario.is_promoted() {
            return Ok(()); // what it had may have been given up since
        }
        if self.hosts[sealer].watch.at(lsn, self.history.origin) != Some(record.chain) {
            let text = format!("{node} passes on record {lsn}, which {sealer} has replaced by another one");
            return broken("I7", text);
        }
        match self.hosts[sealer].is_durable(lsn) {
            Some(false) => {
                broken("I7", format!("{node} passes on record {lsn}, which is not durable on {sealer}"))
            }
            _ => Ok(()),
        }
    }

    /// An administrator asks for a comparison of a node, there or at the shadow that feeds it: only that one can let its
    /// own image go.
    pub fn ask_refresh(&mut self, node: usize, wish: Refresh) -> Outcome {
        let through = self.hosts[node].status.as_ref().and_then(|s| s.primary.as_ref()?.through.clone());
        let near = self.hosts.iter().position(|h| Some(&h.config.name) == through.as_ref());
        let near = near.filter(|n| self.hosts[*n].node.is_some() && self.plan.delay_of(*n) > 0);
        let Some(near) =
            near.filter(|_| self.scenario.phase() == Phase::Settle || self.scenario.rng.permille(700))
        else {
            return self.ask(node, AdminOp::Refresh(wish), Purpose::Refresh);
        };
        self.counts.met("a comparison is asked for at the delayed shadow that feeds");
        let wish = Refresh { peer: Some(self.hosts[node].config.name.clone()), ..wish };
        self.ask(near, AdminOp::Refresh(wish), Purpose::Refresh)
    }

    /// Somebody who feeds it says that this node is current.
    pub fn is_fed(&self, node: usize) -> bool {
        let name = &self.hosts[node].config.name;
        let told = |n: usize| {
            self.hosts[n].status.as_ref().is_some_and(|s| {
                let feeds = s.role == "primary" && n == self.scenario.primary;
                s.peers.iter().any(|p| p.name == *name && p.state == "UpToDate" && (feeds || p.follower))
            })
        };
        (0..self.hosts.len()).any(|n| n != node && told(n))
    }
}

//! Planned moves of the primary, whatever befalls the two meanwhile.
//!
//! Owns: the move under way. Invariants: there are never two primaries; wherever the place goes, everything that
//! was acknowledged is there (the image is read, and nothing of the model was given up).

use crate::scenario::Phase;
use crate::world::{Outcome, Purpose, World, broken};
use volrep::node::event::AdminOp;

/// A move of the primary.
pub struct Move {
    from: usize,
    to: usize,
    /// The one that was to hand over says that it is done, or has forgotten that it was to.
    answered: bool,
    /// It was no primary meanwhile, or another process is now.
    left: bool,
}

impl Move {
    /// It is the one that was to hand over.
    pub fn is_from(&self, node: usize) -> bool {
        self.from == node
    }
}

impl World {
    /// An administrator moves the primary to any other node.
    pub fn switch_over(&mut self) -> Outcome {
        let from = self.scenario.primary;
        let free = self.scenario.moving.is_none() && !self.scenario.is_reading() && self.work.open;
        if !self.plan.moves || !free || self.hosts[from].node.is_none() {
            return Ok(());
        }
        let to =
            (from + self.scenario.rng.within(1, self.hosts.len() as u64 - 1) as usize) % self.hosts.len();
        // The devices are taken away before; what was submitted is answered while the move begins.
        self.work.open = false;
        self.scenario.moving = Some(Move { from, to, answered: false, left: false });
        let to = self.hosts[to].config.name.clone();
        self.ask(from, AdminOp::Switchover { to, dry_run: false }, Purpose::Switchover)
    }

    /// It is about to give its place away.
    pub fn gives_place_away(&self, node: usize) -> bool {
        self.scenario.moving.as_ref().is_some_and(|m| m.from == node && !m.left)
    }

    /// It is one of the two between which the place moves.
    pub fn is_moving(&self, node: usize) -> bool {
        self.scenario.moving.as_ref().is_some_and(|m| m.from == node || m.to == node)
    }

    /// The one that was to hand over is no longer what it was.
    pub fn move_left(&mut self) {
        if let Some(m) = &mut self.scenario.moving {
            m.left = true;
        }
    }

    /// Nothing more will be said of it.
    pub fn switchover_answered(&mut self, by: usize) {
        // The answer to an earlier one may be late.
        if let Some(m) = &mut self.scenario.moving
            && m.from == by
        {
            m.answered = true;
        }
    }

    /// Where is the place now?
    pub fn watch_move(&mut self) -> Outcome {
        let Some(m) = &self.scenario.moving else { return Ok(()) };
        let (from, to, answered, left) = (m.from, m.to, m.answered, m.left);
        let role = |n: usize| self.hosts[n].status.as_ref().map(|s| s.role.as_str());
        let is_primary = |n: usize| role(n) == Some("primary");
        if is_primary(from) && is_primary(to) {
            return broken("I7", format!("{from} and {to} are primaries after a switchover"));
        }
        let (there, here, away) =
            (is_primary(to), is_primary(from) && answered, role(from) == Some("shadow"));
        if away {
            self.move_left();
        }
        let settled = match (there, here) {
            (true, _) => {
                self.counts.met("switched over");
                // What it was lent was for its place.
                self.hosts[from].watch.lease = None;
                self.work.forget(from);
                to
            }
            (false, true) if left => {
                self.counts.met("a switchover that was rolled back");
                if self.hosts[from].watch.lease.is_some() {
                    self.counts.met("a lease of a place that was taken back");
                }
                from
            }
            (false, true) => {
                self.counts.met("a switchover that was refused or called off");
                self.scenario.moving = None;
                self.work.open = true;
                self.work.progress = self.now;
                self.kick();
                return Ok(());
            }
            (false, false) => return Ok(()),
        };
        self.scenario.moving = None;
        self.scenario.primary = settled;
        match self.scenario.phase() {
            Phase::Work | Phase::Settle | Phase::Drain | Phase::Rest => self.begin_again(settled),
            _ => Ok(()),
        }
    }
}

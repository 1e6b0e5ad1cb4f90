//! What must be durable before a node acts, and what it may do once a disk has failed.
//!
//! Owns: the durable terms of both superblock slots. Invariants: nothing is sealed or followed under a term that is
//! not in both slots (I7, I8); a node to which a failed write was told is a failed node (I10).

use crate::plan::Fault;
use crate::prng::Prng;
use crate::scenario::Phase;
use crate::world::{Outcome, Purpose, World, broken};
use volrep::disk::File;
use volrep::format::superblock::{SLOT, Superblock};
use volrep::node::event::AdminOp;
use volrep::node::status::Status;
use volrep::units::{MICROS, MILLIS, Term};

impl World {
    /// A superblock was written, or its node starts: what does either slot say, durably?
    pub fn note_slots(&mut self, node: usize) {
        self.note_named(node);
        let disk = &self.hosts[node].disk;
        let terms = [0..SLOT, SLOT..2 * SLOT].map(|slot| {
            let durable = disk.durable(File::Superblock, slot);
            Superblock::decode(&durable).map_or(Term::default(), |s| s.term)
        });
        let least = terms.into_iter().min_by_key(|t| t.counter).unwrap_or_default();
        self.hosts[node].watch.safe_term = least;
    }

    /// A node does something under this term.
    pub fn check_term(&mut self, node: usize, term: Term, invariant: &'static str, doing: &str) -> Outcome {
        self.counts.check(invariant);
        let safe = self.hosts[node].watch.safe_term;
        if safe.counter < term.counter {
            return broken(invariant, format!("{doing} under {term:?}, but a slot has durably {safe:?}"));
        }
        Ok(())
    }

    /// A cluster manager lends the primary its place for a while.
    pub fn lend(&mut self) -> Outcome {
        let primary = self.scenario.primary;
        let serving = self.poll(primary)?.is_some_and(|s| s.role == "primary" && s.state == "UpToDate");
        if !serving || self.scenario.moving.is_some() || self.scenario.phase() != Phase::Work {
            return Ok(());
        }
        let ns = self.scenario.rng.log(MICROS, 200 * MILLIS);
        let watch = &mut self.hosts[primary].watch;
        // It fails at the end of it, and is started again.
        (watch.faulted, watch.lease) = (true, Some(self.now + ns));
        self.ask(primary, AdminOp::Lease { ns: Some(ns) }, Purpose::Mark)
    }

    /// It acknowledges something.
    pub fn check_lease(&mut self, node: usize) -> Outcome {
        let Some(until) = self.hosts[node].watch.lease else { return Ok(()) };
        self.counts.check("I8");
        match self.now >= until {
            true => broken("I8", format!("acknowledges {} ns after its lease has run out", self.now - until)),
            false => Ok(()),
        }
    }

    /// It acknowledges what its primary sends.
    pub fn check_followed(&mut self, node: usize) -> Outcome {
        let term = self.hosts[node].watch.term();
        self.check_term(node, term, "I8", "acknowledges")
    }

    /// A failed write is told to a node once: it says that it has failed from then on.
    pub fn check_latched(&mut self, node: usize, s: &Status) -> Outcome {
        if !self.hosts[node].watch.must_fail {
            return Ok(());
        }
        self.counts.check("I10");
        match (s.state.as_str(), &s.reason) {
            ("Failed", Some(reason)) if !reason.is_empty() => Ok(()),
            _ => broken("I10", format!("node {node} is {} after a failed write: {:?}", s.state, s.reason)),
        }
    }
}

/// A primary that takes the place back, which it has handed over in vain, has it for no longer than it was lent.
pub fn check() {
    let mut taken_back = 0;
    for seed in 1..=300 {
        let mut plan = crate::sweep::plan(&("lease", |p| (p.moves, p.role_ambush) = (true, 1000)));
        plan.mix.requests = 200;
        plan.faults = vec![(8, Fault::Lease), (12, Fault::Switchover)];
        let mut world = World::planned(plan, Prng::new(seed), false);
        if let Err(v) = world.run() {
            panic!("seed {seed}: {}: {}", v.invariant, v.text);
        }
        taken_back += world.counts.met.get("a lease of a place that was taken back").copied().unwrap_or(0);
    }
    assert!(taken_back > 0, "no place was taken back under a lease");
}

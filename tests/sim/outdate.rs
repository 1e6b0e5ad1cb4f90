//! A member of the sync set is lost and marked so; it comes back, and perhaps it is promoted.
//!
//! Owns: who is lost. Invariants (I4): no FLUSH goes on without a member that either slot of the superblock durably
//! names; who says that it holds all that was acknowledged does; who knows that it does not is promoted only when the
//! operator accepts that.

use crate::content::WriteId;
use crate::plan::Fault;
use crate::prng::Prng;
use crate::scenario::Phase;
use crate::world::{Coming, Outcome, Purpose, World, broken};
use std::collections::BTreeSet;
use volrep::disk::File;
use volrep::format::message::Standing;
use volrep::format::superblock::{SLOT, Superblock};
use volrep::node::event::{AdminOp, LinkId, Promote, Refusal};
use volrep::node::status::Status;
use volrep::units::{MILLIS, SECONDS};

/// See the module's documentation.
#[derive(Default)]
pub struct Outdating {
    /// A member that is down, as a fence hook would vouch.
    lost: Option<usize>,
    /// Nothing is promised to these: that they leave was asked for, and they are not members again yet.
    pub leaving: u8,
    /// What the node that is being promoted said of itself when it was told to.
    claim: Option<(usize, String)>,
    /// The operator takes it all the same.
    accepts: bool,
    /// Over these links somebody was told that it holds all that was acknowledged.
    told: BTreeSet<u64>,
}

fn standing(s: Option<&Status>) -> Option<&str> {
    s.and_then(|s| s.standing.as_deref())
}

impl World {
    /// A member dies, and stays away for a while.
    pub fn lose_member(&mut self) -> Outcome {
        let work = self.scenario.phase() == Phase::Work && !self.scenario.is_reading();
        if !work || self.scenario.outdating.lost.is_some() {
            return Ok(());
        }
        let set = self.members(self.scenario.primary)?;
        let members: Vec<usize> =
            (0..self.hosts.len()).filter(|n| set & 1 << n != 0 && self.hosts[*n].node.is_some()).collect();
        if members.is_empty() {
            return Ok(());
        }
        let rng = &mut self.scenario.rng;
        let (node, power) = (rng.pick(&members), rng.permille(500));
        let away = rng.log(10 * MILLIS, 20 * SECONDS);
        self.counts.met("a member is lost");
        self.kill(node, power);
        self.after(away, Coming::Boot { node });
        self.scenario.outdating.lost = Some(node);
        Ok(())
    }

    /// The primary is told to go on, as long as the member is surely down; and what becomes of those that return.
    pub fn watch_lost(&mut self) -> Outcome {
        let primary = self.scenario.primary;
        let asked = self.hosts[primary].waiting.values().any(|p| *p == Purpose::Outdate);
        // Who is promoted has to live with what was spoilt.
        let may_promote = !self.plan.faults.iter().any(|(_, f)| *f == Fault::Rot);
        for node in 0..self.hosts.len() {
            let status = self.hosts[node].status.as_deref();
            match standing(status) {
                Some("member") if !asked && self.scenario.outdating.leaving & 1 << node != 0 => {
                    self.counts.met("an outdated member is one again");
                    self.scenario.outdating.leaving &= !(1 << node);
                }
                // The primary is lost before it is.
                Some("outdated") if may_promote && self.scenario.rng.permille(100) => {
                    self.lose_primary_to(node)?
                }
                _ => {}
            }
        }
        let Some(node) = self.scenario.outdating.lost else { return Ok(()) };
        if self.hosts[node].node.is_some() || self.scenario.phase() == Phase::Promote || node == primary {
            self.scenario.outdating.lost = None;
            return Ok(());
        }
        if asked || self.hosts[primary].node.is_none() || !self.scenario.rng.permille(300) {
            return Ok(());
        }
        self.scenario.outdating.leaving |= 1 << node;
        let member = self.hosts[node].config.name.clone();
        self.ask(primary, AdminOp::Outdate { member, fenced: true, dry_run: false }, Purpose::Outdate)
    }

    /// It went on.
    pub fn outdated(&mut self) -> Outcome {
        self.counts.met("outdated");
        self.scenario.outdating.lost = None;
        Ok(())
    }

    /// It did not.
    pub fn not_outdated(&mut self, why: Refusal) -> Outcome {
        if why == Refusal::Unfenced {
            return broken("contract", "the fence hook's word was not taken");
        }
        if why != Refusal::Busy {
            self.scenario.outdating.lost = None;
        }
        Ok(())
    }

    /// What either slot of a node durably calls members.
    pub fn note_named(&mut self, node: usize) {
        let disk = &self.hosts[node].disk;
        let slots = [0..SLOT, SLOT..2 * SLOT].map(|slot| disk.durable(File::Superblock, slot));
        let sets = slots.iter().filter_map(|slot| Superblock::decode(slot).ok());
        self.hosts[node].watch.named = sets.flat_map(|s| s.sync_set).collect();
    }

    /// A FLUSH was answered: these writes are durable to the ack level.
    pub fn check_without(&mut self, node: usize, covered: &[WriteId]) -> Outcome {
        for (n, host) in self.hosts.iter().enumerate() {
            let named = self.hosts[node].watch.named.contains(&host.id);
            if n == node || host.node.is_some() || !named {
                continue;
            }
            self.counts.checks.entry("I4").and_modify(|c| *c += 1).or_insert(1);
            if covered.iter().any(|id| self.model.writes[*id as usize].began > host.watch.down) {
                let name = &host.config.name;
                return broken(
                    "I4",
                    format!("a FLUSH went on without {name}, a member as the superblock says"),
                );
            }
        }
        Ok(())
    }

    /// A node is told what it counts for. If that is that it holds all that was acknowledged, it has itself claimed before to
    /// have that durably.
    pub fn check_standing(
        &mut self,
        primary: usize,
        node: usize,
        link: LinkId,
        standing: Standing,
    ) -> Outcome {
        if standing != Standing::Member {
            self.scenario.outdating.told.remove(&link.0);
            return Ok(());
        }
        let promoting = self.scenario.phase() == Phase::Promote || self.scenario.rebase;
        if primary != self.scenario.primary || promoting || !self.scenario.outdating.told.insert(link.0) {
            return Ok(());
        }
        let watch = &self.hosts[node].watch;
        let Some(held) = watch.at(watch.claimed(), self.history.origin) else {
            return broken("I4", format!("{node} is told that it holds everything, and has nothing"));
        };
        self.counts.check("I4");
        self.counts.met("told that it holds everything");
        match self.model.missing(&self.history.image(held), |w| w.flushed) {
            None => Ok(()),
            Some(text) => broken("I4", format!("{node} is told that it holds everything: {text}")),
        }
    }

    /// The promotion of a node: as it is, or as its operator accepts it.
    pub fn promotion_of(&mut self, node: usize) -> Result<Promote, crate::world::Violation> {
        let status = self.poll(node)?;
        let claim = standing(status.as_deref()).map(|s| (node, s.to_owned()));
        let done = status.is_some_and(|s| s.role == "primary");
        let outdating = &mut self.scenario.outdating;
        if !done {
            outdating.accepts &= claim.as_ref().is_some_and(|(_, s)| s == "outdated");
            outdating.claim = claim;
        }
        Ok(Promote { fenced: true, accept_outdated: outdating.accepts, ..Promote::default() })
    }

    /// It was refused for what the node says of itself.
    pub fn outdated_refused(&mut self) -> Outcome {
        let outdating = &mut self.scenario.outdating;
        if outdating.accepts || outdating.claim.as_ref().is_none_or(|(_, s)| s != "outdated") {
            return broken("contract", format!("refused as outdated: {:?}", outdating.claim));
        }
        self.counts.met("promotion of an outdated member refused");
        outdating.accepts = true;
        Ok(())
    }

    /// It was granted.
    pub fn check_granted(&mut self, node: usize) -> Outcome {
        let outdating = &self.scenario.outdating;
        match &outdating.claim {
            Some((of, claim)) if *of == node && claim == "outdated" && !outdating.accepts => {
                broken("I4", "a node that knows that it is outdated was promoted as if it were not")
            }
            _ => Ok(()),
        }
    }

    /// Whether its operator has accepted that it does not: what it held may have been given up for a resync.
    pub fn accepted_loss(&self, node: usize) -> bool {
        let outdating = &self.scenario.outdating;
        outdating.accepts && outdating.claim.as_ref().is_some_and(|(of, _)| *of == node)
    }

    /// Whether it said that it holds all that was acknowledged.
    pub fn claims_everything(&self, node: usize) -> bool {
        matches!(&self.scenario.outdating.claim, Some((of, claim)) if *of == node && claim == "member")
    }

    /// Whoever is to be in the sync set is in it again.
    pub fn all_members(&self) -> bool {
        let star = self.plan.topology == crate::cascade::Topology::Star;
        if self.scenario.primary != 0 || self.scenario.is_promoted() || !star {
            return true;
        }
        let wanted = (1..self.hosts.len()).filter(|n| self.plan.sync & 1 << n != 0);
        wanted.into_iter().all(|n| standing(self.hosts[n].status.as_deref()) == Some("member"))
    }
}

/// Seconds between two heartbeats: far more than a run takes.
const NEVER: u64 = 1000;

/// A member has its primary's word as soon as there is a ground for it, after a start of either: a run whose heartbeats do
/// not come ends only if it needs none of them.
pub fn check() {
    // After a power loss a link is given up only for its silence.
    let restarts = [Fault::KillPrimary, Fault::KillShadow, Fault::KillAll];
    for (seed, fault) in (1..).zip(restarts.iter().cycle().take(16)) {
        let mut plan = crate::sweep::plan(&("word", |p| p.sync = 0b10));
        (plan.timing.heartbeat, plan.timing.silence) = (NEVER * SECONDS, 4 * NEVER * SECONDS);
        plan.faults = vec![(6, *fault), (14, *fault), (22, *fault)];
        let mut world = World::planned(plan, Prng::new(seed), false);
        if let Err(v) = world.run() {
            panic!("{fault:?}, seed {seed}: {}: {}", v.invariant, v.text);
        }
        assert!(world.now < NEVER * SECONDS, "{fault:?}, seed {seed}: not before a heartbeat");
    }
}

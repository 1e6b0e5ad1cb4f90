//! A primary that is put back to an older copy of its machine: its labels come again, with other contents.
//!
//! Owns: that copy. Invariant (I9): a shadow that had followed what is gone never counts as current by labels alone.

use crate::disk::Content;
use crate::marks::Kept;
use crate::scenario::Phase;
use crate::watch::Watch;
use crate::world::{Coming, Outcome, World};
use volrep::units::{MILLIS, SECONDS};

/// Everything that a machine remembers.
struct Machine {
    disk: Content,
    maps: Vec<u8>,
    index: Vec<u8>,
    kept: Kept,
    watch: Watch,
}

/// How far it is.
#[derive(Default)]
pub struct Rollback {
    copy: Option<Box<Machine>>,
    done: bool,
}

impl World {
    /// After a loss of power the first primary is copied; after another one the copy is all there is.
    pub fn roll_back(&mut self) -> Outcome {
        let Some((first, second)) = self.plan.rollback else { return Ok(()) };
        let state = &self.scenario.rollback;
        let (copied, done, at) = (state.copy.is_some(), state.done, self.work.submitted);
        let due = if copied { second <= at } else { first <= at };
        let busy = self.scenario.phase() != Phase::Work || self.scenario.is_reading();
        if done || !due || busy || self.hosts[0].node.is_none() {
            return Ok(());
        }
        self.kill(0, true);
        let delay = self.scenario.rng.log(MILLIS, SECONDS);
        let host = &mut self.hosts[0];
        if copied {
            self.counts.met("a primary put back to an older copy");
            self.trace.say(self.now, 0, "rollback", "");
            let Some(copy) = self.scenario.rollback.copy.take() else { return Ok(()) };
            host.disk.restore(copy.disk);
            host.maps.restore(&copy.maps);
            host.index.restore(&copy.index);
            (host.kept, host.watch) = (copy.kept, copy.watch);
            self.scenario.rollback.done = true;
            // What it holds is the truth from now on.
            self.scenario.crown(0);
            self.scenario.rejoined = true;
            let (least, most) = self.plan.apart;
            for other in 1..self.hosts.len() {
                let until = self.now + self.scenario.rng.log(least, most);
                self.net.partitions.insert((0, other), until);
                self.at(until, Coming::Heal { pair: (0, other) });
            }
        } else {
            self.scenario.rollback.copy = Some(Box::new(Machine {
                disk: host.disk.copy(),
                maps: host.maps.content(),
                index: host.index.content(),
                kept: host.kept.clone(),
                watch: host.watch.clone(),
            }));
        }
        self.after(delay, Coming::Boot { node: 0 });
        Ok(())
    }
}

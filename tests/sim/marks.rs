//! Marks, and the promise that they make about the order of writes.
//!
//! Owns: when each was asked for. Invariant: a mark's image holds every write that had completed before it was
//! asked for, also on whoever is promoted.

use crate::prng::Prng;
use crate::world::{Outcome, Purpose, World, broken};
use std::collections::BTreeMap;
use volrep::node::event::AdminOp;
use volrep::node::history::{Happening, HistoryEvent, Standing, parse};
use volrep::node::status::MarkStatus;
use volrep::units::Hash;

/// A mark that was answered.
#[derive(Clone, Debug)]
pub struct Made {
    /// Its record.
    pub lsn: u64,
    /// Its chain hash.
    pub hash: Hash,
    /// Its text.
    pub text: String,
}

/// The marks of a run.
#[derive(Default)]
pub struct Marks {
    /// By the number of the request: the tick.
    asked: BTreeMap<u64, u64>,
    count: u64,
    /// Those that were answered.
    pub made: Vec<Made>,
    /// What was written before was read anew from a promoted node: not all of it is there.
    pub since: u64,
}

/// The lines of a node's history.
#[derive(Clone, Default)]
pub struct Kept {
    lines: Vec<HistoryEvent>,
    /// So many are durable.
    durable: usize,
}

impl Kept {
    /// Its process is gone: what was not durable may be.
    pub fn crash(&mut self, rng: &mut Prng) {
        let lost = rng.below((self.lines.len() - self.durable) as u64 + 1) as usize;
        self.lines.truncate(self.lines.len() - lost);
        self.durable = self.lines.len();
    }

    fn standing(&self) -> Standing {
        Standing::after(&self.lines)
    }

    /// The marks that are believed: LSN and hash.
    fn believed(&self) -> Vec<(u64, String)> {
        let standing = self.standing();
        let mark = |(n, e): (usize, &HistoryEvent)| match &e.what {
            Happening::Mark { mark } if standing.is_true(n) => Some((mark.lsn, mark.hash.clone())),
            _ => None,
        };
        self.lines.iter().enumerate().filter_map(mark).collect()
    }
}

fn hex(hash: Hash) -> String {
    hash.0.iter().map(|b| format!("{b:02x}")).collect()
}

impl World {
    /// The shell keeps an event.
    pub fn keep_event(&mut self, node: usize, event: HistoryEvent) -> Outcome {
        self.trace.say(self.now, node, "history", &event.what.text());
        let line = serde_json::to_string(&event).ok().map(|line| parse(&line));
        if line.as_deref() != Some(std::slice::from_ref(&event)) {
            return broken("contract", format!("{event:?} does not come back from its line"));
        }
        self.watch_delay(node, &event);
        let kept = &mut self.hosts[node].kept;
        let barrier = matches!(event.what, Happening::Mark { .. } | Happening::GivenUp { .. });
        if kept.standing().note(&event) {
            kept.lines.push(event);
        }
        if barrier {
            kept.durable = kept.lines.len();
        }
        Ok(())
    }

    /// At rest: the marks that a node believes are in its journal's history, and it knows those that it was told.
    pub fn check_marks(&mut self, node: usize, tail: Hash) -> Outcome {
        let kept = &self.hosts[node].kept;
        let believed = kept.believed();
        for (lsn, hash) in &believed {
            self.counts.check("marks believed");
            let made = self.marks.made.iter().find(|m| m.lsn == *lsn && hex(m.hash) == *hash);
            let Some(made) = made else { continue }; // nobody was answered
            if !self.history.includes(tail, made.hash) {
                return broken(
                    "marks",
                    format!("node {node} believes {made:?}, which is not in its history"),
                );
            }
        }
        let anew = |e: &HistoryEvent| matches!(&e.what, Happening::GivenUp { reason, .. } if reason.contains("resync"));
        if kept.lines.iter().any(anew) {
            return Ok(()); // some marks never came
        }
        for made in self.marks.made.iter().filter(|m| self.history.includes(tail, m.hash)) {
            self.counts.check("marks known");
            if !believed.iter().any(|(lsn, hash)| *lsn == made.lsn && hex(made.hash) == *hash) {
                return broken("marks", format!("node {node} does not know {made:?}"));
            }
        }
        Ok(())
    }

    /// An administrator marks the primary's write order.
    pub fn ask_mark(&mut self, node: usize) -> Outcome {
        if self.hosts[node].node.is_none() || self.scenario.is_rebasing() {
            return Ok(());
        }
        self.marks.count += 1;
        let text = format!("mark {}", self.marks.count);
        let tick = self.model.tick();
        self.marks.asked.insert(self.next_ask(), tick);
        self.ask(node, AdminOp::Mark { text }, Purpose::Mark)
    }

    /// A mark is durable.
    pub fn marked(&mut self, node: usize, id: u64, mark: &MarkStatus) -> Outcome {
        self.counts.check("I2 marks");
        let Some(asked) = self.marks.asked.remove(&id) else { return broken("contract", "a mark unasked") };
        let Some(hash) = self.hosts[node].watch.at(mark.lsn, self.history.origin) else {
            return broken("I3", format!("{mark:?} is answered, and not in the journal"));
        };
        if hex(hash) != mark.hash {
            return broken("I2", format!("{mark:?} has another hash in the journal"));
        }
        self.watch_claim(node, mark.lsn)?;
        let since = self.marks.since;
        let before = |w: &crate::model::Write| w.acked && w.began > since && w.decided < asked;
        if let Some(text) = self.model.missing(&self.history.image(hash), before) {
            return broken("I2", format!("{mark:?} was asked for at {asked}: {text}"));
        }
        self.counts.met("marked");
        self.marks.made.push(Made { lsn: mark.lsn, hash, text: mark.text.clone() });
        Ok(())
    }
}

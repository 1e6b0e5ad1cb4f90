//! The return of a primary that was replaced, and of shadows that had gone further than the one promoted.
//!
//! Owns: the checks on salvage files. Invariant: what a node gives up is in its salvage file, all of it and
//! nothing else, before it leaves the journal.

use crate::scenario::Phase;
use crate::world::{Coming, Outcome, Purpose, World, broken};
use bytes::Bytes;
use volrep::format::record::Record;
use volrep::node::event::{AdminOp, Promote, Salvage};
use volrep::node::status::Status;

impl World {
    /// Whoever holds records of its own is told to give them up.
    pub fn ask_rejoins(&mut self) -> Outcome {
        if !self.plan.rejoin || !self.scenario.is_promoted() || self.scenario.phase() == Phase::Promote {
            return Ok(());
        }
        self.find_winner()?;
        if !self.has_looked_long() {
            return Ok(());
        }
        for node in 0..self.hosts.len() {
            let Some(s) = &self.hosts[node].status else { continue };
            let kept = &self.hosts[self.scenario.primary].config.name;
            let conflict = s.role == "primary" && s.peers.iter().any(|p| p.rival && p.name == *kept);
            let own_way = s.state == "Retired" || (s.state == "Diverged" && s.role == "shadow") || conflict;
            let keep = conflict.then(|| self.hosts[self.scenario.primary].config.name.clone());
            if node != self.scenario.primary && own_way {
                // It takes back what it had applied.
                let watch = &mut self.hosts[node].watch;
                watch.give_up();
                self.counts.met("told to rejoin");
                self.ask(node, AdminOp::Rejoin { keep, dry_run: false }, Purpose::Rejoin)?;
            }
        }
        let shadow = |n: usize| self.hosts[n].status.as_ref().is_some_and(|s| s.role == "shadow");
        self.scenario.other = self
            .scenario
            .other
            .filter(|n| !shadow(*n) || self.hosts[*n].waiting.values().any(|p| *p == Purpose::Promote));
        if self.hosts[0].status.as_ref().is_some_and(|s| s.role == "shadow" && s.state != "Retired") {
            self.scenario.rejoined = true;
        }
        Ok(())
    }

    /// While the work goes on nobody hurries to end a conflict.
    fn has_looked_long(&mut self) -> bool {
        let rival = |s: &Status| s.role == "primary" && s.peers.iter().any(|p| p.rival);
        let conflict = self.hosts.iter().any(|h| h.status.as_ref().is_some_and(|s| rival(s)));
        if !conflict || self.scenario.phase() != Phase::Work {
            self.scenario.conflict = None;
            return true;
        }
        let since = *self.scenario.conflict.get_or_insert(self.now);
        self.now >= since + self.plan.patience
    }

    /// Both were promoted, and the other's term is the higher one: it is the primary from now on.
    fn find_winner(&mut self) -> Outcome {
        let state = |n: usize| self.hosts[n].status.as_ref().map(|s| (s.role.as_str(), s.state.as_str()));
        let Some(other) = self.scenario.other else { return Ok(()) };
        let lost = state(self.scenario.primary) == Some(("shadow", "Retired"));
        let won = state(other).is_some_and(|(role, state)| role == "primary" && state != "Retiring");
        if lost && won {
            self.counts.met("the other one won");
            self.scenario.crown(other);
            return self.begin_again(other);
        }
        Ok(())
    }

    /// The other node was promoted over this one, which has heard of it.
    pub fn is_outranked(&self, node: usize) -> bool {
        let watch = &self.hosts[node].watch;
        // It may have lost the conflict already.
        let lost = self.scenario.is_promoted() && node != self.scenario.primary;
        let rival = self.scenario.other.is_some_and(|other| other != node);
        (rival || lost) && watch.heard_term > watch.acting_term
    }

    /// Somebody else promotes the other shadow at the same time.
    pub fn promote_another(&mut self, node: usize) -> Outcome {
        let other = (1..self.hosts.len()).find(|n| *n != node && self.hosts[*n].node.is_some());
        let Some(other) = other.filter(|_| self.plan.double && self.plan.rejoin) else { return Ok(()) };
        if self.scenario.other.is_none() {
            self.scenario.other = Some(other);
            self.ask(
                other,
                AdminOp::Promote(Promote { fenced: true, accept_outdated: true, ..Promote::default() }),
                Purpose::Promote,
            )?;
        }
        Ok(())
    }

    /// The shell writes a part of a salvage file.
    pub fn salvage(&mut self, node: usize, part: Salvage) -> Outcome {
        self.promotion_step(node);
        let end = matches!(part, Salvage::End(_));
        let files = &mut self.hosts[node].salvage;
        match part {
            Salvage::Begin(head) => files.push((head, Vec::new(), false)),
            Salvage::Append(records) => match files.last_mut() {
                Some((_, kept, false)) => kept.extend(records),
                _ => return broken("contract", "a part of no salvage file"),
            },
            Salvage::End(trailer) => match files.last_mut() {
                Some((_, kept, done @ false)) => {
                    *done = true;
                    if trailer.records != kept.len() as u64 {
                        return broken("contract", format!("{trailer:?} after {} records", kept.len()));
                    }
                }
                _ => return broken("contract", "the end of no salvage file"),
            },
        }
        if end {
            self.check_salvage(node)?;
        }
        let incarnation = self.hosts[node].incarnation;
        let delay = 20_000 + self.rng.below(3_000_000);
        self.after(delay, Coming::Salvaged { node, incarnation, end });
        Ok(())
    }

    fn check_salvage(&mut self, node: usize) -> Outcome {
        self.counts.check("salvage");
        let host = &self.hosts[node];
        let (head, records, _) = host.salvage.last().expect("it has just ended");
        let mut last = None;
        for bytes in records {
            let record = Record::decode(Bytes::clone(bytes)).map_err(|e| crate::world::Violation {
                invariant: "salvage",
                text: format!("a record that can't be read: {e}"),
            })?;
            if last.is_some_and(|hash| hash != record.stamp.prev) {
                return broken("salvage", format!("record {} does not follow", record.stamp.lsn));
            }
            let begins = last.is_none() && head.fork.is_some_and(|p| p.lsn.next() == record.stamp.lsn);
            if begins && head.fork.is_some_and(|p| p.hash != record.stamp.prev) {
                return broken("salvage", "it does not begin at the fork");
            }
            if !self.history.knows(record.chain) {
                return broken("salvage", format!("record {} was never sealed", record.stamp.lsn));
            }
            last = Some(record.chain);
        }
        let claimed = host.watch.claimed();
        if last != Some(head.last.hash) || head.last.lsn.0 < claimed {
            return broken("salvage", format!("it ends with {:?}, {claimed} was durable", head.last));
        }
        let first =
            records.first().map(|r| Record::decode(Bytes::clone(r)).expect("it was read above").chain);
        self.counts.met("salvaged");
        let primary = self.scenario.primary;
        if let (Some(first), true) = (first, self.hosts[primary].node.is_some()) {
            let tail = self.tail_hash(primary)?;
            // Journals and openings that are gone may leave more in doubt than was given up.
            let exact = !self.history.includes(tail, first);
            self.counts.met(if exact { "salvaged: its own alone" } else { "salvaged: with common records" });
        }
        Ok(())
    }
}

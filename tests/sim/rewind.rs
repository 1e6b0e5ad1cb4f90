//! Images that are held back, and promotions as of an earlier record.
//!
//! Owns: the choice of such a record, and the checks on it. Invariants: a record is in a delayed image only once it
//! was held for the delay, unless it was told that it would not be; what a promotion gives up is in a salvage file
//! before the superblock says so; after it the image is that of the record that was asked for, and of no other.

use crate::scenario::Phase;
use crate::world::{Coming, Outcome, World, broken};
use volrep::format::superblock::Superblock;
use volrep::node::event::At;
use volrep::node::history::{Happening, HistoryEvent};
use volrep::units::{HistoryPoint, Lsn, MICROS, MILLIS};

impl World {
    /// As of which record the shadow is to be promoted.
    pub fn choose_record(&mut self, node: usize) -> Option<At> {
        let s = self.hosts[node].status.as_ref().filter(|s| s.role == "shadow")?;
        let (from, to) = (s.applied_lsn, s.tail_lsn);
        self.hosts[node].watch.cut = None;
        let rng = &mut self.scenario.rng;
        // To the tail first: that may not become durable, and then it is to be as if it had never begun.
        if !self.plan.rewind || rng.permille(400) {
            return None;
        }
        let how = rng.below(3);
        self.name_record(node, (from, to), how)
    }

    /// Whether `point` is what `at` means in this node's journal, of what was there at time `asked`, up to `tail`.
    pub fn is_meant(&self, node: usize, at: &At, point: HistoryPoint, (asked, tail): (u64, u64)) -> bool {
        let watch = &self.hosts[node].watch;
        let time = self.history.get(point.hash).map_or(0, |e| e.time);
        let next = watch.at(point.lsn.0 + 1, self.history.origin);
        let next = next.filter(|_| point.lsn.0 < tail);
        let next = next.filter(|_| watch.received.get(&(point.lsn.0 + 1)).is_some_and(|at| *at < asked));
        let next = next.and_then(|h| self.history.get(h)).filter(|e| e.prev == point.hash);
        match at {
            At::Lsn(lsn) => *lsn == point.lsn,
            At::Time(t) => time <= *t && next.is_none_or(|e| e.time > *t),
            At::Mark(text) => self.marks.made.iter().any(|m| m.text == *text && m.hash == point.hash),
        }
    }

    /// A time or a mark of one of the records of a node from one to another; or the number of such a record.
    pub fn name_record(&mut self, node: usize, (from, to): (u64, u64), how: u64) -> Option<At> {
        let rng = &mut self.scenario.rng;
        let lsn = rng.within(from, to.max(from));
        match how {
            0 => {
                let made = &self.marks.made;
                let i = (!made.is_empty()).then(|| rng.below(made.len() as u64) as usize)?;
                Some(At::Mark(made[i].text.clone()))
            }
            1 => {
                let hash = self.hosts[node].watch.at(lsn, self.history.origin)?;
                let time = self.history.get(hash)?.time + rng.below(3) * rng.below(MILLIS);
                Some(At::Time(time))
            }
            _ => Some(At::Lsn(Lsn(rng.within(lsn.saturating_sub(1), lsn + 1)))),
        }
    }

    /// A step of the promotion: perhaps the node dies right after it.
    pub fn promotion_step(&mut self, node: usize) {
        let target = self.plan.promotion.map(|(.., target)| target);
        let due = self.scenario.phase() == Phase::Promote && self.scenario.is_asked();
        if !due || target != Some(node) || self.plan.delay_of(node) == 0 {
            return;
        }
        if self.scenario.rng.permille(self.plan.ambush_promotion) && self.scenario.strikes() {
            self.fall_within(node, 20 * MILLIS);
        }
    }

    /// A superblock is about to say that this node is the primary: perhaps it never does.
    pub fn promotion_named(&mut self, node: usize) {
        let due = self.scenario.phase() == Phase::Promote && self.plan.delay_of(node) > 0;
        if due && self.scenario.rng.permille(2 * self.plan.ambush_promotion) && self.scenario.strikes() {
            self.fall_within(node, 30 * MICROS);
        }
    }

    fn fall_within(&mut self, node: usize, most: u64) {
        let power = self.scenario.rng.permille(500);
        let delay = self.scenario.rng.log(MICROS, most);
        let incarnation = self.hosts[node].incarnation;
        self.after(delay, Coming::Fall { node, incarnation, power });
    }

    /// A superblock says that a node is promoted as of this record.
    pub fn check_cut(&mut self, node: usize, s: &Superblock) -> Outcome {
        let Some(cut) = s.cut.filter(|c| self.hosts[node].watch.cut != Some(*c)) else { return Ok(()) };
        self.counts.check("cut");
        let watch = &self.hosts[node].watch;
        let origin = self.history.origin;
        if watch.at(cut.lsn.0, origin) != Some(cut.hash) {
            return broken("cut", format!("{cut:?} was never in the journal of node {node}"));
        }
        if let Some(applied) = watch.applied
            && !self.history.includes(cut.hash, applied.hash)
        {
            return broken("I5", format!("is cut back to {cut:?}, before {applied:?}, which it had applied"));
        }
        let wanted = self.scenario.wanted.as_ref();
        if !wanted.is_some_and(|at| self.is_meant(node, at, cut, (u64::MAX, u64::MAX))) {
            return broken(
                "cut",
                format!("{:?} was asked for, it is cut back to {cut:?}", self.scenario.wanted),
            );
        }
        let saved = self.hosts[node].salvage.iter().any(|(head, _, done)| *done && head.fork == Some(cut));
        if !saved {
            return broken(
                "salvage",
                format!("node {node} is cut back to {cut:?} and what is cut off is not saved"),
            );
        }
        let watch = &mut self.hosts[node].watch;
        watch.cut = Some(cut);
        watch.unclaim(cut.lsn.0);
        self.counts.met("promoted as of an earlier record");
        Ok(())
    }

    /// A promoted node that was cut back serves that record's image, and holds nothing later.
    pub fn check_rewound(&mut self, node: usize, tail: volrep::units::Hash) -> Outcome {
        let Some(cut) = self.hosts[node].watch.cut else { return Ok(()) };
        self.counts.check("cut image");
        if !self.history.includes(tail, cut.hash) || !self.history.written(tail, cut.hash).is_empty() {
            return broken("cut", format!("promoted as of {cut:?}, and its history ends otherwise"));
        }
        Ok(())
    }

    /// What a node says of its delay.
    pub fn watch_delay(&mut self, node: usize, event: &HistoryEvent) {
        let watch = &mut self.hosts[node].watch;
        match &event.what {
            Happening::Delay { state, .. } => {
                self.counts.met(&format!("delay: {state}"));
                watch.lifted = state != "Held";
                watch.undelayed = watch.undelayed.max(event.lsn);
            }
            Happening::Started { .. } if watch.lifted => {
                (watch.lifted, watch.undelayed) = (false, watch.undelayed.max(event.lsn));
            }
            _ => {}
        }
    }

    /// It says that everything up to here is in its image.
    pub fn check_delay(&mut self, node: usize, lsn: u64) -> Outcome {
        let host = &self.hosts[node];
        let delay = host.config.apply_delay;
        let watch = &host.watch;
        if delay == 0 || watch.lifted || lsn <= watch.undelayed {
            return Ok(());
        }
        let Some(received) = watch.received.get(&lsn).map(|at| (*at).max(watch.booted_at)) else {
            return Ok(());
        };
        self.counts.check("delay");
        if self.now < received + delay {
            return broken(
                "delay",
                format!("node {node} has applied {lsn} {} ns after its receipt", self.now - received),
            );
        }
        Ok(())
    }
}

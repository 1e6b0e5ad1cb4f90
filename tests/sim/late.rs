//! What nodes tell of a shadow's lag, against what the simulator knows.
//!
//! Owns: when each record was sealed, in virtual time. Invariant (I5): nobody tells a shadow further, or less
//! late, than it is; where only a silent primary could know more, the silence itself counts.

use crate::plan::Fault;
use crate::world::{Outcome, World, broken};
use std::collections::HashMap;
use volrep::format::message::{Identity, Message, Role};
use volrep::node::status::{PeerStatus, Status};
use volrep::units::{Hash, Lsn, MILLIS, SECONDS};

/// When each record was sealed, and by which process of which node.
#[derive(Default)]
pub struct Sealed(HashMap<Hash, (u64, usize, u32)>);

impl Sealed {
    /// A record is seen for the first time.
    pub fn note(&mut self, hash: Hash, now: u64, node: usize, incarnation: u32) {
        self.0.entry(hash).or_insert((now, node, incarnation));
    }
}

fn follows(s: &Status) -> bool {
    s.role == "shadow" && matches!(s.state.as_str(), "UpToDate" | "CatchingUp") && s.reason.is_none()
}

/// What a shadow was last told of its primary's journal: by which process of which node.
#[derive(Clone, Copy)]
pub struct Heard {
    incarnation: u32,
    from: usize,
    tail: u64,
    /// Up to here it was told, too, how many bytes that is.
    sized: u64,
}

impl World {
    /// A message of the primary to a shadow is read there.
    pub fn heard_tail(&mut self, node: usize, from: usize, message: &Message) {
        if let Message::Welcome { identity, .. } = message {
            return self.welcomed_at(node, from, identity);
        }
        let Message::Heartbeat { tail: Some(Lsn(tail)), silent, .. } = *message else { return };
        // One that was replaced is still the primary of those who have not heard of it, and one that hands its place over until
        // somebody has it.
        let told = &self.hosts[from].watch;
        let vacant = told.handed() && self.hosts.iter().all(|h| h.watch.term() <= told.term());
        if !told.is_primary() && !vacant && !self.gives_place_away(from) {
            return self.heard_through(node, from, tail, silent > 0);
        }
        // Nothing else that it says ends its silence.
        self.hosts[node].watch.heard_at = self.now;
        if from == self.scenario.primary {
            let incarnation = self.hosts[from].incarnation;
            self.hosts[node].watch.heard_tail = Some(Heard { incarnation, from, tail, sized: tail });
        }
    }

    /// The primary says in the handshake how far it is, and nothing more.
    fn welcomed_at(&mut self, node: usize, from: usize, identity: &Identity) {
        let (primary, incarnation) = (self.scenario.primary, self.hosts[from].incarnation);
        let watch = &mut self.hosts[node].watch;
        // A term that has ended is not followed.
        let followed = identity.role == Role::Primary && identity.term >= watch.term();
        if let Some(heard) = watch.heard_tail.as_mut().filter(|_| followed && from == primary)
            && (heard.incarnation, heard.from) == (incarnation, from)
        {
            heard.tail = heard.tail.max(identity.tail.lsn.0);
        }
    }

    /// A shadow tells another one what it knows of the primary.
    fn heard_through(&mut self, node: usize, from: usize, tail: u64, old: bool) {
        let fed = |s: &Status| s.peers.iter().any(|p| p.name == self.hosts[node].config.name && p.follower);
        // What it says is of the primary if it is some time old, whatever was last looked at.
        if !old && !self.hosts[from].status.as_ref().is_some_and(|s| fed(s)) {
            return; // it tells where itself is
        }
        let told = &self.hosts[from].watch;
        let (at, heard) = (told.heard_at, told.passed_on.get(&tail).copied());
        let watch = &mut self.hosts[node].watch;
        watch.heard_at = watch.heard_at.max(at);
        if let Some(heard) = heard {
            watch.heard_tail = Some(Heard { tail, ..heard });
        }
    }

    /// A node says where it is, or where its primary is.
    pub fn told_tail(&mut self, node: usize, tail: u64) {
        let watch = &mut self.hosts[node].watch;
        if let Some(heard) = watch.heard_tail {
            watch.passed_on.entry(tail).or_insert(heard);
        }
    }

    /// Whether the primary's process has sealed whatever a shadow lacks that holds everything up to `lsn`.
    fn is_own(&self, primary: usize, p: &Status, node: usize, lsn: u64) -> bool {
        self.true_lag(primary, p, node, lsn).is_some_and(|(.., own)| own)
    }

    /// How long a shadow has lacked what it lacks now, ns, and how many records that are; whether the primary's
    /// process has sealed them all.
    fn true_lag(&self, primary: usize, p: &Status, node: usize, applied: u64) -> Option<(u64, u64, bool)> {
        let origin = self.history.origin;
        let tail = self.hosts[primary].watch.at(p.tail_lsn, origin)?;
        let here = self.hosts[node].watch.at(applied, origin)?;
        if !self.history.includes(tail, here) {
            return None;
        }
        let (mut first, mut lacks) = (tail, 0);
        while let Some(e) = self.history.get(first).filter(|e| e.lsn.0 > applied) {
            lacks += 1;
            if e.prev == here {
                let own = (primary, self.hosts[primary].incarnation);
                return self.sealed.0.get(&first).map(|(at, n, i)| (self.now - at, lacks, (*n, *i) == own));
            }
            first = e.prev;
        }
        Some((0, 0, true))
    }

    /// What the primary's journal has between these records.
    fn bytes_between(&self, primary: usize, node: usize, applied: u64, tail: u64) -> u64 {
        let origin = self.history.origin;
        let Some(mut at) = self.hosts[primary].watch.at(tail, origin) else { return 0 };
        let here = self.hosts[node].watch.at(applied, origin).filter(|here| self.history.includes(at, *here));
        let mut bytes = 0;
        while here.is_some_and(|here| at != here)
            && let Some(e) = self.history.get(at)
        {
            bytes += e.bytes;
            at = e.prev;
        }
        bytes
    }

    /// What a primary tells of its shadows, and these of themselves.
    pub fn check_lags(&mut self) -> Outcome {
        let primary = self.scenario.primary;
        let jumps = self.plan.faults.iter().any(|(_, f)| *f == Fault::ClockJump);
        let Some(p) = self.hosts[primary].status.clone().filter(|s| s.role == "primary") else {
            return Ok(());
        };
        if self.hosts[primary].node.is_none() || p.state == "Failed" || p.state == "Recovering" {
            return Ok(());
        }
        if !jumps {
            self.check_not_too_late(primary, &p)?;
        }
        for node in (0..self.hosts.len()).filter(|n| *n != primary) {
            let host = &self.hosts[node];
            // Whose connection is lost still tells how far it is behind.
            let tells = |s: &Status| follows(s) || (s.role == "shadow" && s.state == "Outdated");
            let Some(s) = host.status.clone().filter(|s| tells(s) && host.node.is_some()) else { continue };
            let Some((late, lacks, own)) = self.true_lag(primary, &p, node, s.applied_lsn) else { continue };
            let told = p.peers.iter().find(|q| q.name == host.config.name);
            let told = told.filter(|q| matches!(q.state.as_str(), "UpToDate" | "CatchingUp"));
            self.check_lag_here(primary, node, &s, (late, own, jumps))?;
            if !follows(&s) {
                continue;
            }
            self.check_followers(node, &s)?;
            if let Some(told) = told {
                // Of what another process has sealed it knows the segments' times alone, and they are of another clock.
                let own = own
                    && [told.applied_lsn, told.durable_lsn]
                        .iter()
                        .all(|l| self.is_own(primary, &p, node, *l));
                // What is held back on purpose is no lag; what is not durable is not held back.
                let meant = (told.apply_delay_seconds * SECONDS as f64) as u64;
                let undurable = self.true_lag(primary, &p, node, s.durable_lsn).map_or(0, |(late, ..)| late);
                let late = late.saturating_sub(meant).max(undurable);
                self.check_lag_there(node, &s, told, (late, lacks), jumps || !own)?;
            }
        }
        Ok(())
    }

    /// A primary knows by its own clock when it sealed what somebody lacks who has told it what he has.
    fn check_not_too_late(&mut self, primary: usize, p: &Status) -> Outcome {
        for q in &p.peers {
            let Some(node) = self.hosts.iter().position(|h| h.config.name == q.name) else { continue };
            let lag = self.true_lag(primary, p, node, q.applied_lsn);
            let Some((late, _, true)) = lag else { continue };
            self.counts.check("I5 lag");
            let told = (q.lag_seconds * SECONDS as f64) as u64;
            if told > late + MILLIS {
                let text = format!("the primary tells that {} is {told} ns late, who is {late}", q.name);
                return broken("I5", text);
            }
        }
        Ok(())
    }

    /// What a shadow tells of those that it feeds, who have what they have told and no less.
    fn check_followers(&mut self, node: usize, s: &Status) -> Outcome {
        for told in s.peers.iter().filter(|p| p.follower && p.state == "UpToDate") {
            let Some(host) = self.hosts.iter().find(|h| h.config.name == told.name) else { continue };
            let Some(f) = host.status.clone().filter(|f| follows(f) && host.node.is_some()) else { continue };
            self.counts.check("I5 lag");
            let lacks = s.tail_lsn.saturating_sub(f.applied_lsn);
            if told.applied_lsn > f.applied_lsn || told.lag_records < lacks {
                let text = format!(
                    "{node} tells that {} has applied {} and lags {} records; it has applied {} and lags {lacks}",
                    told.name, told.applied_lsn, told.lag_records, f.applied_lsn
                );
                return broken("I5", text);
            }
        }
        Ok(())
    }

    fn check_lag_there(
        &mut self,
        node: usize,
        s: &Status,
        told: &PeerStatus,
        (late, lacks): (u64, u64),
        jumps: bool,
    ) -> Outcome {
        self.counts.check("I5 lag");
        let ns = (told.lag_seconds * SECONDS as f64) as u64;
        let short = !jumps && ns + MILLIS < late;
        if told.applied_lsn > s.applied_lsn || told.lag_records < lacks || short {
            return broken(
                "I5",
                format!(
                    "the primary tells that {node} has applied {} and lags {} records, {} ns; it has applied {} \
                     and lags {lacks} records, {late} ns",
                    told.applied_lsn, told.lag_records, ns, s.applied_lsn
                ),
            );
        }
        Ok(())
    }

    fn check_lag_here(
        &mut self,
        primary: usize,
        node: usize,
        s: &Status,
        (late, own, jumps): (u64, bool, bool),
    ) -> Outcome {
        let Some(lag) = &s.lag else { return Ok(()) };
        self.counts.check("I5 lag");
        let heard = self.hosts[node].watch.heard_tail;
        let Some(Heard { incarnation, from, tail, sized }) = heard else { return Ok(()) };
        let same = (incarnation, from) == (self.hosts[primary].incarnation, primary);
        if same && lag.records + s.applied_lsn < tail {
            let text = format!(
                "{node} tells {} records after {}, and has heard of {tail}",
                lag.records, s.applied_lsn
            );
            return broken("I5", text);
        }
        // Of what another process has sealed it knows the segments alone; a shadow in between may never have had the
        // records; and back at an old image nobody has said what it lacks since.
        let through = s.primary.as_ref().and_then(|p| p.through.as_ref());
        let stopped = s.reason.as_ref().is_some_and(|why| why.starts_with("the resync stopped"));
        let exact = own && through.is_none() && !stopped;
        let bytes = if same && exact { self.bytes_between(primary, node, s.applied_lsn, sized) } else { 0 };
        if lag.bytes < bytes {
            let text = format!(
                "{node} tells {} bytes after {}, and has heard of {bytes} up to {sized}",
                lag.bytes, s.applied_lsn
            );
            return broken("I5", text);
        }
        // Of what it has heard of, the time is as exact as the primary's clock is known, if it is, and no earlier primary's was
        // ahead: no record's time is before that of the one before.
        let clock = |n: usize| self.hosts[n].now(self.now).wall;
        let earlier = self.hosts[primary].watch.term().counter > 1;
        let ahead = earlier && (0..self.hosts.len()).any(|n| clock(n) > clock(primary));
        let total = (lag.total_seconds * SECONDS as f64) as u64;
        let timed = lag.clock_offset != 0.0 && !jumps && !ahead;
        if same && exact && timed && tail > s.applied_lsn && total + 20 * MILLIS < late {
            let text = format!(
                "{node} tells a lag of {total} ns, and has heard of {tail}, of which the first is {late} ns old"
            );
            return broken("I5", text);
        }
        // Whatever it could have learned since it heard anything counts.
        let silent = self.now - self.hosts[node].watch.heard_at;
        let ns = (lag.seconds * SECONDS as f64) as u64;
        // Who is between tells it with a beat of his own; the shortest way of each is not counted.
        let hops = if s.primary.as_ref().is_some_and(|p| p.through.is_some()) { 2 } else { 1 };
        let slack = hops * 20 * MILLIS;
        if silent > 2 * hops * self.plan.timing.heartbeat + slack && late >= silent && ns + slack < silent {
            let text = format!("{node} tells a lag of {ns} ns, and has heard nothing for {silent}");
            return broken("I5", text);
        }
        Ok(())
    }
}

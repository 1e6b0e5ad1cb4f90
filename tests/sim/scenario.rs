//! The course of a run: everybody joins, the work with its faults, perhaps a promotion, the healing,
//! and the last look at every image.
//!
//! Owns: the phase. Invariant: once faults have stopped, every phase ends within a bounded virtual time.

use crate::moves::Move;
use crate::plan::{Fault, Loss};
use crate::prng::Prng;
use crate::reading::Reading;
use crate::workload::Asked;
use crate::world::{Coming, Outcome, Purpose, World, broken};
use std::collections::BTreeSet;
use volrep::node::event::{AdminOp, At, Op, Promote, Refresh};
use volrep::node::status::Status;
use volrep::units::{MILLIS, SECONDS};

/// Virtual time within which the system must come to rest once nothing disturbs it.
const PATIENCE: u64 = 120 * SECONDS;
/// Virtual time without progress after which somebody has a look.
const ATTENTION: u64 = 5 * SECONDS;

/// What is going on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Join,
    Work,
    Promote,
    Settle,
    Drain,
    Rest,
    Over,
}

/// The course of one run.
pub struct Scenario {
    /// Draws for faults.
    pub rng: Prng,
    phase: Phase,
    since: u64,
    /// The node that the workload goes to.
    pub primary: usize,
    /// Another node was promoted.
    pub promoted: bool,
    asked: bool,
    next_fault: usize,
    ambushes: u32,
    /// The reading of the whole image that is going on.
    pub verify: Option<Reading>,
    /// To befall the next messages.
    pub message_faults: Vec<Fault>,
    /// Links on which a message was lost and none sent since.
    pub gaps: BTreeSet<u64>,
    /// No dial succeeds before.
    pub dials_fail_until: u64,
    /// What a promoted node holds is to be the truth.
    pub rebase: bool,
    /// When the old primary came back.
    returned: Option<u64>,
    /// As of which record the shadow is to be promoted.
    pub wanted: Option<At>,
    /// It follows now.
    pub rejoined: bool,
    /// The other node that was promoted, while it is a primary.
    pub other: Option<usize>,
    /// The older copy of a machine.
    pub rollback: crate::rollback::Rollback,
    /// Since when there are two primaries.
    pub conflict: Option<u64>,
    /// The primary is being moved.
    pub moving: Option<Move>,
    /// A member of the sync set is lost.
    pub outdating: crate::outdate::Outdating,
}

impl Scenario {
    /// Before the beginning.
    pub fn new(rng: Prng) -> Scenario {
        Scenario {
            rng,
            phase: Phase::Join,
            since: 0,
            primary: 0,
            promoted: false,
            asked: false,
            next_fault: 0,
            ambushes: 0,
            verify: None,
            message_faults: Vec::new(),
            gaps: BTreeSet::new(),
            dials_fail_until: 0,
            rebase: false,
            returned: None,
            wanted: None,
            rejoined: false,
            other: None,
            rollback: crate::rollback::Rollback::default(),
            conflict: None,
            moving: None,
            outdating: crate::outdate::Outdating::default(),
        }
    }
    /// The whole image is being read.
    pub fn is_reading(&self) -> bool {
        self.verify.is_some()
    }
    /// The shadow was told to become the primary.
    pub fn is_asked(&self) -> bool {
        self.asked
    }
    /// Another node's image is the truth now, and has not been read yet: the model is still that of the one before.
    pub fn is_rebasing(&self) -> bool {
        self.rebase
    }
    /// What is going on.
    pub fn phase(&self) -> Phase {
        self.phase
    }
    /// Nothing more to see.
    pub fn over(&self) -> bool {
        self.phase == Phase::Over
    }
    /// Requests are being submitted.
    pub fn is_working(&self) -> bool {
        self.phase == Phase::Work
    }
    /// Faults may strike now.
    pub fn may_strike(&self) -> bool {
        matches!(self.phase, Phase::Join | Phase::Work | Phase::Settle)
    }
    /// One more fault in the middle of a resync, or of a change of roles; whether that is not too many.
    pub fn strikes(&mut self) -> bool {
        self.ambushes += 1;
        self.ambushes <= 12
    }
    /// The primary is lost, and nobody was promoted yet.
    pub fn is_losing(&self, node: usize) -> bool {
        node == 0 && self.phase == Phase::Promote
    }
    /// Another node was promoted over this one (or is about to be).
    pub fn demoted(&self, node: usize) -> bool {
        node == 0 && !self.rejoined && (self.promoted || self.phase == Phase::Promote)
    }
    /// This one is the primary from now on, and what it holds is the truth.
    pub fn crown(&mut self, node: usize) {
        (self.promoted, self.rebase, self.primary, self.other) = (true, true, node, None);
        self.verify = None;
    }
    /// Another node was promoted.
    pub fn is_promoted(&self) -> bool {
        self.promoted
    }
}

impl World {
    fn enter(&mut self, phase: Phase) {
        self.trace.say(self.now, self.scenario.primary, "phase", &format!("{phase:?}"));
        (self.scenario.phase, self.scenario.since, self.scenario.asked) = (phase, self.now, false);
        self.work.progress = self.now;
    }

    /// Looks around, and moves on when it is time.
    pub fn tick(&mut self) -> Outcome {
        for node in 0..self.hosts.len() {
            self.look_at(node)?;
        }
        self.counts.check("liveness");
        self.check_lags()?;
        self.shut_out_old();
        self.ask_rejoins()?;
        self.watch_lost()?;
        self.watch_move()?;
        let settled = self.scenario.phase == Phase::Settle && self.all_current(false) && self.all_mended()?;
        match self.scenario.phase {
            Phase::Join if self.all_current(true) => self.begin_work(),
            Phase::Work => {
                self.work_on()?;
                // A FLUSH may wait for it.
                if self.is_stuck() {
                    self.resume_resyncs()?;
                }
            }
            Phase::Promote => self.promote_on()?,
            Phase::Settle if settled => {
                self.enter(Phase::Drain);
                self.ask(self.scenario.primary, AdminOp::Drain, Purpose::Drain)?;
            }
            Phase::Settle => self.resume_resyncs()?,
            Phase::Rest if self.all_at_rest() => {
                self.last_look()?;
                self.enter(Phase::Over);
                return self.check_indexes_at_rest();
            }
            _ => {}
        }
        self.impatient()?;
        let pause = match (self.scenario.phase, self.waited()) {
            (Phase::Work, 0..SECONDS) => 5 * MILLIS,
            (_, 0..ATTENTION) => 20 * MILLIS,
            _ => 100 * MILLIS,
        };
        self.after(pause, Coming::Tick);
        Ok(())
    }

    /// An administrator has mended what stopped a resync.
    fn resume_resyncs(&mut self) -> Outcome {
        for node in 0..self.hosts.len() {
            let stopped = |s: &Status| s.reason.as_ref().is_some_and(|r| r.starts_with("the resync stopped"));
            if self.hosts[node].status.as_ref().is_some_and(|s| stopped(s)) {
                self.counts.met("a resync that stopped is resumed");
                self.ask(node, AdminOp::Refresh(Refresh::default()), Purpose::Refresh)?;
            }
        }
        Ok(())
    }

    /// For how long nothing has come of what is going on.
    fn waited(&self) -> u64 {
        let since = self.scenario.since;
        self.now - if self.scenario.phase == Phase::Work { self.work.progress.max(since) } else { since }
    }

    /// Nobody's requests were answered for long enough that somebody has a look.
    pub fn is_stuck(&self) -> bool {
        self.scenario.phase == Phase::Work && self.waited() > ATTENTION
    }

    fn impatient(&mut self) -> Outcome {
        let waited = self.waited();
        if waited > 2 * ATTENTION && self.blocked_for_good() {
            self.counts.met("blocked: a member of the sync set has diverged");
            self.enter(Phase::Over);
            return Ok(());
        }
        if waited < PATIENCE {
            return Ok(());
        }
        let states = (0..self.hosts.len()).map(|n| self.describe(n)).collect::<Vec<_>>().join("; ");
        broken("liveness", format!("{:?} does not end: {states}", self.scenario.phase))
    }

    /// A FLUSH waits for a member that a promotion has left behind: that takes an administrator.
    fn blocked_for_good(&self) -> bool {
        let state = |n: usize| self.hosts[n].status.as_ref().map(|s| s.state.as_str());
        self.scenario.promoted
            && state(self.scenario.primary) == Some("Blocked")
            && self.followers().any(|n| self.hosts[n].status.as_ref().is_some_and(|s| self.excused(s)))
    }

    fn describe(&self, node: usize) -> String {
        let Some(s) = &self.hosts[node].status else {
            return format!("{node}: down");
        };
        let peers: Vec<_> = s
            .peers
            .iter()
            .map(|p| format!("{} {} {:?} applied {}", p.name, p.state, p.reason, p.applied_lsn))
            .collect();
        format!(
            "{node}: {} {} {:?} tail {} durable {} applied {} checkpoint {} set {:?} journal {}/{} cache {} peers {peers:?}",
            s.role,
            s.state,
            s.reason,
            s.tail_lsn,
            s.durable_lsn,
            s.applied_lsn,
            s.checkpoint_lsn,
            s.sync_set,
            s.journal_used,
            s.journal_size,
            s.cache_used
        )
    }

    /// Checks a node's state by itself.
    fn look_at(&mut self, node: usize) -> Outcome {
        let Some(s) = self.poll(node)? else {
            return Ok(());
        };
        self.note_state(node, &s);
        self.check_latched(node, &s)?;
        self.check_told(node, &s)?;
        self.check_view(node, &s)?;
        let watch = &self.hosts[node].watch;
        let ordered =
            s.checkpoint_lsn <= s.applied_lsn && s.applied_lsn <= s.tail_lsn && s.durable_lsn <= s.tail_lsn;
        if !ordered && s.state != "Recovering" && s.state != "Failed" {
            return broken("I5", format!("positions out of order: {}", self.describe(node)));
        }
        let (faulted, demoted) = (watch.faulted, self.scenario.demoted(node));
        match s.state.as_str() {
            "Failed" if !faulted && !demoted => {
                broken("contract", format!("failed without a fault: {}", self.describe(node)))
            }
            "Failed" if (!demoted || self.plan.rejoin) && !watch.stopping => {
                // Its administrator starts it again.
                self.hosts[node].watch.stopping = true;
                let delay = self.scenario.rng.log(MILLIS, 500 * MILLIS);
                self.restart(node, false, delay);
                Ok(())
            }
            "Diverged" if !self.scenario.promoted && self.scenario.phase != Phase::Promote => {
                broken("I1", format!("diverged without a promotion: {}", self.describe(node)))
            }
            _ => Ok(()),
        }
    }

    fn restart(&mut self, node: usize, power: bool, delay: u64) {
        self.kill(node, power);
        self.after(delay, Coming::Boot { node });
    }

    /// A process began.
    pub fn booted(&mut self, node: usize) -> Outcome {
        if self.scenario.moving.as_ref().is_some_and(|m| m.is_from(node)) {
            self.switchover_answered(node);
            self.move_left();
        } else if node == self.scenario.primary && self.scenario.phase != Phase::Promote {
            self.ask(node, AdminOp::Open, Purpose::Open)?;
        } else if self.scenario.demoted(node) {
            self.issue(node, Op::Flush, Asked::Probe)?;
        }
        Ok(())
    }

    /// A process is gone.
    pub fn process_gone(&mut self, node: usize, power: bool) {
        self.hosts[node].watch.down = self.model.tick();
        self.work.forget(node);
        if self.scenario.phase == Phase::Promote
            && self.plan.promotion.is_some_and(|(.., target)| target == node)
        {
            self.scenario.asked = false;
        }
        if node == self.scenario.primary {
            if matches!(self.scenario.phase, Phase::Drain | Phase::Rest) {
                self.enter(Phase::Settle);
            }
            self.work.open = false;
            self.scenario.verify = None;
            if power { self.model.power_loss() } else { self.model.kill() }
        }
    }

    /// A process ended by itself.
    pub fn stopped(&mut self, node: usize, text: &str) -> Outcome {
        let watch = &self.hosts[node].watch;
        if !watch.faulted && !self.scenario.demoted(node) {
            return broken("contract", format!("stops without a fault: {text}"));
        }
        self.counts.met("stopped after a fault");
        let delay = self.scenario.rng.log(MILLIS, 500 * MILLIS);
        let again = !self.scenario.demoted(node) || self.plan.rejoin;
        self.kill(node, false);
        if again {
            self.after(delay, Coming::Boot { node });
        }
        Ok(())
    }

    /// What was asked is done.
    pub fn granted(&mut self, node: usize, purpose: Purpose) -> Outcome {
        match purpose {
            Purpose::Open if node == self.scenario.primary => self.begin_verify(node),
            Purpose::Promote if self.scenario.other == Some(node) => {
                self.counts.met("promoted, both");
                Ok(())
            }
            Purpose::Promote => {
                self.check_granted(node)?;
                self.counts.met("promoted");
                self.scenario.crown(node);
                self.stray_view_request(node)?;
                self.promote_another(node)?;
                self.begin_again(node)
            }
            Purpose::Drain => {
                self.enter(Phase::Rest);
                Ok(())
            }
            Purpose::Shutdown => {
                self.counts.met("clean stop");
                let power = self.scenario.rng.permille(300);
                let delay = self.scenario.rng.log(MILLIS, SECONDS);
                self.restart(node, power, delay);
                Ok(())
            }
            Purpose::Switchover => {
                self.switchover_answered(node);
                Ok(())
            }
            Purpose::View => self.view_opened(node),
            Purpose::Detach => self.check_detached(node),
            Purpose::Outdate => self.outdated(),
            Purpose::Open
            | Purpose::Status
            | Purpose::Refresh
            | Purpose::Rejoin
            | Purpose::ViewClose
            | Purpose::Mark => Ok(()),
        }
    }

    /// The work goes on at this node.
    pub fn begin_again(&mut self, node: usize) -> Outcome {
        self.work.open = false;
        self.enter(Phase::Work);
        self.ask(node, AdminOp::Open, Purpose::Open)
    }

    /// The promotion is refused; it may be for the moment only.
    pub fn promotion_refused(&mut self, text: &str) -> Outcome {
        self.scenario.asked = false;
        let target = self.plan.promotion.expect("in its phase").2;
        if text.contains("half of a first full copy") {
            // Only the lost primary has the data: it has to come back.
            self.counts.met("promotion refused: the copy is not whole");
            self.plan.promotion = None;
            self.hosts[0].gone = false;
            self.enter(Phase::Work);
            self.after(MILLIS, Coming::Boot { node: 0 });
            return Ok(());
        }
        if text.contains("lost as a member") {
            return self.outdated_refused();
        }
        if text.contains("is the primary already") {
            // An earlier attempt was cut short after its term was durable.
            let incarnation = self.hosts[target].incarnation;
            self.after(0, Coming::Granted { node: target, incarnation, purpose: Purpose::Promote });
        }
        Ok(())
    }

    fn begin_work(&mut self) {
        self.enter(Phase::Work);
        self.work.open = self.scenario.verify.is_none();
        self.kick();
    }

    fn work_on(&mut self) -> Outcome {
        while let Some((at, fault)) = self.plan.faults.get(self.scenario.next_fault).copied()
            && at <= self.work.submitted
        {
            self.scenario.next_fault += 1;
            self.inject(fault)?;
        }
        if let Some((at, loss, target)) = self.plan.promotion
            && !self.scenario.promoted
            && at <= self.work.submitted
        {
            return self.lose_primary(loss, target);
        }
        self.roll_back()?;
        let still = self.scenario.verify.is_none() && self.scenario.moving.is_none();
        if self.work.finished(&self.plan.mix) && still {
            self.settle();
        }
        Ok(())
    }

    fn settle(&mut self) {
        self.enter(Phase::Settle);
        self.net.partitions.clear();
        self.scenario.dials_fail_until = 0;
        self.scenario.message_faults.clear();
        self.scenario.returned.get_or_insert(0);
        self.shut_out_old();
        for node in 0..self.hosts.len() {
            self.hosts[node].armed.clear();
            self.hosts[node].slow = 1;
            if self.hosts[node].node.is_none() {
                self.after(MILLIS, Coming::Boot { node });
            }
        }
    }

    /// The old primary came back unasked; whoever follows it is to find the promoted node.
    fn shut_out_old(&mut self) {
        let truth = self.scenario.primary == 0;
        if truth || !self.scenario.promoted || self.hosts[0].gone || self.plan.rejoin {
            return;
        }
        if self.hosts[0].node.is_some() {
            self.scenario.returned.get_or_insert(self.now);
        }
        if self.scenario.returned.is_some_and(|at| self.now > at + 5 * SECONDS || at == 0) {
            self.kill(0, false);
            self.hosts[0].gone = true;
        }
    }

    /// The primary is lost in the middle of a shadow's resync, and that shadow is promoted.
    pub fn lose_primary_to(&mut self, node: usize) -> Outcome {
        let early = self.scenario.phase == Phase::Join || self.scenario.verify.is_some();
        // Whoever is being promoted for it may be a primary already.
        let lost = self.scenario.phase == Phase::Promote;
        if self.scenario.promoted || early || lost || self.plan.moves {
            return Ok(());
        }
        let loss = self.scenario.rng.pick(&[Loss::Forever, Loss::Kill, Loss::Power]);
        self.plan.promotion = Some((0, loss, node));
        self.counts.met("promotion in the middle of a resync");
        self.lose_primary(loss, node)
    }

    fn lose_primary(&mut self, loss: Loss, target: usize) -> Outcome {
        self.counts.met(&format!("primary lost: {loss:?}"));
        self.enter(Phase::Promote);
        self.kill(0, loss == Loss::Power);
        match loss {
            Loss::Forever => self.hosts[0].gone = true,
            Loss::Kill | Loss::Power => {
                let delay = self.scenario.rng.log(SECONDS, 10 * SECONDS);
                self.after(delay, Coming::Boot { node: 0 });
            }
        }
        self.after(0, Coming::Boot { node: target });
        Ok(())
    }

    fn promote_on(&mut self) -> Outcome {
        let target = self.plan.promotion.expect("in its phase").2;
        let ready = self.hosts[target].status.as_ref().is_some_and(|s| s.state != "Recovering");
        if self.hosts[target].node.is_none() || !ready || self.scenario.asked {
            return Ok(());
        }
        if self.scenario.rng.permille(800) {
            return Ok(()); // a random moment, not the first
        }
        self.scenario.asked = true;
        if self.hosts[target].view.is_some() {
            self.counts.met("promoted with a view open");
        }
        let at = self.choose_record(target);
        if at.is_some() || self.hosts[target].watch.cut.is_none() {
            self.scenario.wanted.clone_from(&at);
        }
        let wish = Promote { at, ..self.promotion_of(target)? };
        self.ask(target, AdminOp::Promote(wish), Purpose::Promote)
    }

    /// Nodes that must follow the primary: not the one that was replaced.
    pub fn followers(&self) -> impl Iterator<Item = usize> {
        let (primary, promoted) = (self.scenario.primary, self.scenario.promoted);
        let away = promoted && (self.hosts[0].gone || !self.plan.rejoin);
        (0..self.hosts.len()).filter(move |n| *n != primary && !(away && *n == 0))
    }

    /// A follower that lawfully waits for a resync.
    pub fn excused(&self, s: &Status) -> bool {
        let left_behind = matches!(s.state.as_str(), "Outdated" | "Diverged");
        self.scenario.promoted && !self.plan.rejoin && left_behind
    }

    fn all_current(&self, joining: bool) -> bool {
        let Some(p) = &self.hosts[self.scenario.primary].status else {
            return false;
        };
        // Write-back goes on by itself, without a drain.
        let written = joining || p.applied_lsn == p.tail_lsn;
        if !written || p.state != "UpToDate" || p.role != "primary" || self.scenario.verify.is_some() {
            return false;
        }
        if !joining && !self.all_members() {
            return false;
        }
        self.followers().all(|n| {
            let Some(s) = &self.hosts[n].status else {
                return false;
            };
            let known = self.is_fed(n);
            let current = s.state == "UpToDate" && s.applied_lsn == p.tail_lsn && known;
            current || (!joining && self.excused(s))
        })
    }

    fn all_at_rest(&self) -> bool {
        let Some(p) = &self.hosts[self.scenario.primary].status else {
            return false;
        };
        let whole = |s: &Status| !matches!(s.state.as_str(), "Resyncing" | "Inconsistent");
        let rests = |s: &Status| whole(s) && s.checkpoint_lsn == p.tail_lsn && s.applied_lsn == p.tail_lsn;
        rests(p)
            && self
                .followers()
                .all(|n| self.hosts[n].status.as_ref().is_some_and(|s| rests(s) || self.excused(s)))
    }
}

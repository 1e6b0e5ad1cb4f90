//! How each fault of a plan strikes.
//!
//! Owns: nothing; it acts on the world. Invariant: what it breaks for a while heals by itself.

use crate::disk::Fault as DiskFault;
use crate::perform::Armed;
use crate::plan::Fault;
use crate::scenario::Phase;
use crate::world::{Coming, Outcome, Purpose, World, broken};
use volrep::disk::File;
use volrep::node::event::{AdminOp, Event};
use volrep::units::{MICROS, MILLIS, SECONDS};

impl World {
    /// A shadow of the plan, any.
    fn some_shadow(&mut self) -> Option<usize> {
        let primary = self.scenario.primary;
        let shadows: Vec<_> =
            (0..self.hosts.len()).filter(|n| *n != primary && !self.scenario.demoted(*n)).collect();
        (!shadows.is_empty()).then(|| self.scenario.rng.pick(&shadows))
    }

    pub fn crash(&mut self, node: usize, power: bool) {
        if self.hosts[node].gone {
            return;
        }
        self.kill(node, power);
        let delay = self.scenario.rng.log(MILLIS, 2 * SECONDS);
        self.after(delay, Coming::Boot { node });
    }

    /// A shadow has made a step of its resync: perhaps something befalls it, or its primary, right after.
    pub fn resync_step(&mut self, node: usize) {
        let due = self.scenario.may_strike() && self.scenario.rng.permille(self.plan.ambush);
        if !due || !self.scenario.strikes() {
            return;
        }
        let rng = &mut self.scenario.rng;
        let fault = rng.pick(&[
            Fault::KillShadow,
            Fault::KillShadow,
            Fault::PowerShadow,
            Fault::PowerShadow,
            Fault::RestartShadow,
            Fault::KillPrimary,
            Fault::PowerPrimary,
            Fault::Cut,
            Fault::Away,
            Fault::StageFull,
            Fault::PowerAll,
        ]);
        let delay = rng.log(MICROS, 30 * MILLIS);
        self.after(delay, Coming::Ambush { node, fault });
    }

    /// A node's superblock is told of another place in the group: perhaps it dies right then, or all do, or its
    /// links break. Both slots are written one after the other.
    pub fn role_step(&mut self, node: usize) {
        let due = self.scenario.rng.permille(self.plan.role_ambush);
        if !due || !self.scenario.strikes() {
            return;
        }
        let rng = &mut self.scenario.rng;
        let kinds = [Fault::KillShadow, Fault::PowerShadow, Fault::PowerShadow, Fault::PowerAll, Fault::Cut];
        let (fault, delay) = (rng.pick(&kinds), rng.log(MICROS, 100 * MILLIS));
        self.after(delay, Coming::Ambush { node, fault });
    }

    /// A superblock is being written: perhaps its process dies, and the next one loses power over its own first one.
    pub fn slot_step(&mut self, node: usize) {
        let incarnation = self.hosts[node].incarnation;
        let fault = match self.hosts[node].watch.slot_ambushed {
            Some(died) if died != incarnation => Fault::PowerShadow,
            None if self.plan.slot_ambush > 0 && self.scenario.rng.permille(self.plan.slot_ambush) => {
                Fault::KillShadow
            }
            _ => return,
        };
        self.hosts[node].watch.slot_ambushed = (fault == Fault::KillShadow).then_some(incarnation);
        if self.scenario.strikes() {
            let delay = self.scenario.rng.log(MICROS, self.plan.disk_write);
            self.after(delay, Coming::Ambush { node, fault });
        }
    }

    /// A primary raises its term: what the old one has still to make durable may be lost right now.
    pub fn raise_step(&mut self, node: usize) {
        if self.plan.role_ambush > 0 && self.scenario.rng.permille(500) && self.scenario.strikes() {
            let delay = self.scenario.rng.log(10 * MICROS, 30 * MILLIS);
            self.after(delay, Coming::Ambush { node, fault: Fault::PowerShadow });
        }
    }

    /// A primary that has started is read: what it shows may not be lost with its power.
    pub fn start_step(&mut self, node: usize) {
        let due = self.plan.ambush_start > 0 && self.scenario.may_strike();
        if due && self.scenario.rng.permille(self.plan.ambush_start) && self.scenario.strikes() {
            self.counts.met("death while a primary that has started is read");
            let delay = self.scenario.rng.log(10 * MICROS, 30 * MILLIS);
            self.after(delay, Coming::Ambush { node, fault: Fault::PowerShadow });
        }
    }

    /// A backing is written to: perhaps its node dies, if it serves beside that.
    pub fn drain_step(&mut self, node: usize) {
        if self.hosts[node].status.as_ref().is_none_or(|s| s.drain_records == 0) {
            return;
        }
        self.counts.met("written while a primary drains");
        if self.scenario.rng.permille(20) {
            self.after(0, Coming::Detach { node });
        }
        let due = self.scenario.may_strike() && self.scenario.rng.permille(self.plan.ambush_drain);
        if !due || !self.scenario.strikes() {
            return;
        }
        let rng = &mut self.scenario.rng;
        let (fault, delay) = (
            rng.pick(&[Fault::KillShadow, Fault::PowerShadow, Fault::PowerAll]),
            rng.log(MICROS, 20 * MILLIS),
        );
        self.counts.met("death while a primary drains");
        self.after(delay, Coming::Ambush { node, fault });
    }

    /// A primary that may drain is told to detach: what it has is in the backing then.
    pub fn detach(&mut self, node: usize) -> Outcome {
        let Some(s) = self.poll(node)?.filter(|s| s.drain_records > 0 && s.state == "UpToDate") else {
            return Ok(());
        };
        let host = &mut self.hosts[node];
        if host.waiting.values().any(|p| *p == Purpose::Detach) {
            return Ok(());
        }
        host.watch.detaching = Some((host.incarnation, s.applied_lsn + s.drain_records));
        self.ask(node, AdminOp::Drain, Purpose::Detach)
    }

    /// It says that it is done.
    pub fn check_detached(&mut self, node: usize) -> Outcome {
        let Some(s) = self.poll(node)? else { return Ok(()) };
        let host = &self.hosts[node];
        if let Some((_, owed)) =
            host.watch.detaching.filter(|d| d.0 == host.incarnation && s.applied_lsn < d.1)
        {
            return broken(
                "I3",
                format!("detached at {}, and the records to {owed} are not in the backing", s.applied_lsn),
            );
        }
        self.counts.met("detached while it drains");
        Ok(())
    }

    /// The same for a named shadow. The promotion may be due as well: then to this one.
    pub fn strike(&mut self, node: usize, fault: Fault) -> Outcome {
        // While somebody is being promoted he and his links alone are struck: the lost primary stays away.
        let promoting = self.scenario.phase() == Phase::Promote
            && !self.scenario.demoted(node)
            && matches!(fault, Fault::KillShadow | Fault::PowerShadow | Fault::Cut);
        if !self.scenario.may_strike() && !promoting {
            return Ok(());
        }
        self.counts.met(&format!("in the middle: {fault:?}"));
        self.trace.say(self.now, node, "ambush", &format!("{fault:?}"));
        match fault {
            Fault::KillShadow | Fault::PowerShadow => self.crash(node, fault == Fault::PowerShadow),
            Fault::RestartShadow => return self.stop(node),
            Fault::Cut => {
                for connection in self.net.of_node(node) {
                    let c = self.net.connections.get_mut(&connection).expect("never removed");
                    (0..2).for_each(|side| c.cut(side, 0));
                    let at = self.now + self.scenario.rng.log(MICROS, 20 * MILLIS);
                    (0..2).for_each(|side| self.at(at, Coming::Down { connection, side }));
                }
            }
            Fault::Away => return self.lose_primary_to(node),
            other => return self.inject(other),
        }
        Ok(())
    }

    /// Strikes.
    pub fn inject(&mut self, fault: Fault) -> Outcome {
        self.trace.say(self.now, self.scenario.primary, "fault", &format!("{fault:?}"));
        self.counts.met(&format!("{fault:?}"));
        let primary = self.scenario.primary;
        match fault {
            Fault::KillPrimary => self.crash(primary, false),
            Fault::PowerPrimary => self.crash(primary, true),
            Fault::KillShadow | Fault::PowerShadow => {
                if let Some(node) = self.some_shadow() {
                    self.crash(node, fault == Fault::PowerShadow);
                }
            }
            Fault::KillAll | Fault::PowerAll => {
                (0..self.hosts.len()).for_each(|n| self.crash(n, fault == Fault::PowerAll));
            }
            Fault::RestartPrimary => return self.stop(primary),
            Fault::RestartShadow => {
                if let Some(node) = self.some_shadow() {
                    return self.stop(node);
                }
            }
            Fault::Cut | Fault::HalfOpen | Fault::Stall => self.break_link(fault),
            Fault::Partition => self.part(),
            Fault::DropMessage | Fault::DuplicateMessage | Fault::FlipBit => {
                self.scenario.message_faults.push(fault);
            }
            Fault::DialFailure => {
                self.scenario.dials_fail_until = self.now + self.scenario.rng.log(10 * MILLIS, 5 * SECONDS);
            }
            Fault::IoErrorPrimary => self.arm(primary),
            Fault::IoErrorShadow => {
                if let Some(node) = self.some_shadow() {
                    self.arm(node);
                }
            }
            Fault::ClockJump => {
                let node = self.scenario.rng.below(self.hosts.len() as u64) as usize;
                let jump = self.scenario.rng.log(MILLIS, 3600 * SECONDS);
                let base = &mut self.hosts[node].wall_base;
                *base = if self.scenario.rng.permille(500) { *base + jump } else { *base - jump };
            }
            Fault::SpuriousWake => {
                let node = self.scenario.rng.below(self.hosts.len() as u64) as usize;
                return self.step(node, Event::Wake);
            }
            Fault::Away => {
                if let Some(node) = self.some_shadow() {
                    let share = self.plan.mix.requests / 2;
                    let until = self.work.submitted + self.scenario.rng.within(share / 4 + 1, share + 1);
                    let latest = self.now + 60 * SECONDS;
                    let power = self.scenario.rng.permille(300);
                    self.crash(node, power);
                    self.hosts[node].away = Some((until, latest));
                }
            }
            Fault::View | Fault::ViewClose => {
                if let Some(node) = self.some_shadow() {
                    return self.strike_view(node, fault);
                }
            }
            Fault::StageFull => {
                if let Some(node) = self.some_shadow() {
                    self.fill_stage(node);
                }
            }
            Fault::Switchover => return self.switch_over(),
            Fault::Outdate => return self.lose_member(),
            Fault::Lease => return self.lend(),
            Fault::LostMaps => {
                let node = self.scenario.rng.below(self.hosts.len() as u64) as usize;
                self.crash(node, false);
                self.hosts[node].maps.clear();
            }
            Fault::LostIndex => {
                let node = self.scenario.rng.below(self.hosts.len() as u64) as usize;
                self.crash(node, false);
                self.hosts[node].index.clear();
            }
            Fault::Rot => {
                if let Some(node) = self.some_shadow() {
                    self.spoil(node);
                }
            }
            Fault::Refresh | Fault::Quick | Fault::Verify => {
                let (verify, quick) = (fault == Fault::Verify, fault == Fault::Quick);
                let verify = verify || (quick && self.scenario.rng.permille(300));
                let there = self.some_shadow().filter(|_| self.scenario.rng.permille(700));
                return self.ask_comparison(there.unwrap_or(primary), verify, quick);
            }
            Fault::StopRefresh => {
                let there = self.some_shadow().filter(|_| self.scenario.rng.permille(700)).unwrap_or(primary);
                if self.hosts[there].node.is_some() {
                    return self.ask(there, AdminOp::RefreshStop, Purpose::Refresh);
                }
            }
            Fault::InPlace => {
                if let Some(node) = self.some_shadow() {
                    return self.ask_in_place(node);
                }
            }
            Fault::Mark => return self.ask_mark(primary),
            Fault::SlowDisk => {
                let node = self.scenario.rng.below(self.hosts.len() as u64) as usize;
                self.hosts[node].slow = self.scenario.rng.pick(&[1, 10, 50]);
            }
        }
        Ok(())
    }

    /// A request to a stage will fail, or there is no room for one.
    pub fn fill_stage(&mut self, node: usize) {
        let rng = &mut self.scenario.rng;
        let (file, kind) = rng.pick(&[
            (File::Stage(0), 1),
            (File::Stage(0), 1),
            (File::Stage(0), 2),
            (File::Stage(0), 0),
            (File::StageMap, 1),
            (File::StageMap, 2),
        ]);
        let fault = DiskFault { errno: 28, drops: rng.permille(500) };
        let skip = rng.log(1, 20) - 1;
        self.hosts[node].armed.push(Armed { file, kind, skip, fault });
    }

    fn stop(&mut self, node: usize) -> Outcome {
        let host = &mut self.hosts[node];
        let starting = host.status.as_ref().is_none_or(|s| s.state == "Recovering");
        if host.node.is_none() || host.watch.stopping || starting {
            return Ok(());
        }
        host.watch.stopping = true;
        if node == self.scenario.primary {
            self.work.open = false;
        }
        self.ask(node, AdminOp::Shutdown, Purpose::Shutdown)
    }

    fn break_link(&mut self, fault: Fault) {
        let standing = self.net.standing();
        if standing.is_empty() {
            return;
        }
        let connection = self.scenario.rng.pick(&standing);
        let c = self.net.connections.get_mut(&connection).expect("standing");
        if fault == Fault::Stall {
            let until = self.now + self.scenario.rng.log(MILLIS, 10 * SECONDS);
            (0..2).for_each(|side| c.hold(side, until));
            return;
        }
        let deaf = (fault == Fault::HalfOpen).then(|| self.scenario.rng.below(2) as usize);
        let mut told = Vec::new();
        for side in 0..2 {
            let left = self.scenario.rng.below(c.under_way(side) as u64 + 1) as usize;
            c.cut(side, left);
            if deaf != Some(side) {
                told.push((c.after_all(side, self.now) + self.scenario.rng.log(MICROS, 20 * MILLIS), side));
            }
        }
        for (at, side) in told {
            self.at(at, Coming::Down { connection, side });
        }
    }

    fn part(&mut self) {
        let a = self.scenario.rng.below(self.hosts.len() as u64) as usize;
        let b = (a + 1 + self.scenario.rng.below(self.hosts.len() as u64 - 1) as usize) % self.hosts.len();
        let until = self.now + self.scenario.rng.log(MILLIS, 20 * SECONDS);
        let pair = (a.min(b), a.max(b));
        self.net.partitions.insert(pair, until);
        self.at(until, Coming::Heal { pair });
    }

    fn arm(&mut self, node: usize) {
        let rng = &mut self.scenario.rng;
        let file = rng.pick(&[
            File::Journal,
            File::Journal,
            File::Backing(0),
            File::Backing(0),
            File::Superblock,
            File::DirtyMaps,
        ]);
        let kind = if file == File::DirtyMaps { 2 } else { rng.below(3) as u8 };
        let fault = DiskFault { errno: 5, drops: rng.permille(500) };
        let skip = rng.below(10);
        self.hosts[node].armed.push(Armed { file, kind, skip, fault });
    }
}

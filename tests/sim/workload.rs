//! The requests: what is submitted to the primary, and what their answers prove.
//!
//! Owns: requests outstanding. Invariant: a request has at most one answer, and only from the process
//! that it was given to.

use crate::content::{self, SECTOR, WriteId};
use crate::model::NEVER;
use crate::plan::Mix;
use crate::prng::Prng;
use crate::world::{Coming, Outcome, World, broken};
use bytes::Bytes;
use std::collections::BTreeMap;
use volrep::disk::IoError;
use volrep::node::event::{Event, Op, RequestId};
use volrep::node::status::Status;
use volrep::units::{Address, Extent};

/// What a request was.
#[derive(Clone, Debug)]
pub enum Asked {
    /// A write or a zeroing.
    Write { id: WriteId, fua: bool, latched: bool },
    /// A flush: when, the sync set then, and whether a disk had failed already.
    Flush { tick: u64, members: u8, latched: bool },
    /// A read of the workload.
    Read { extent: Extent, tick: u64 },
    /// A read of the whole image after a recovery.
    Verify { extent: Extent, tick: u64 },
    /// A flush on a node that should no longer acknowledge anything.
    Probe,
}

/// A request outstanding.
#[derive(Clone, Debug)]
pub struct Request {
    /// At which node.
    pub node: usize,
    /// What.
    pub asked: Asked,
}

/// The workload of one run.
pub struct Workload {
    rng: Prng,
    /// By request id.
    pub outstanding: BTreeMap<u64, Request>,
    next: u64,
    /// Requests submitted.
    pub submitted: u64,
    /// When something was last answered or begun.
    pub progress: u64,
    /// Submits only while this holds.
    pub open: bool,
    scheduled: bool,
    /// Writes that a crash left without an answer, to be submitted again.
    pub unanswered: Vec<WriteId>,
    /// Spoilt on a shadow's disk: to be written in the middle of a comparison.
    pub spoilt: Vec<Extent>,
    /// Rich writes, for resubmission.
    rich: BTreeMap<WriteId, bool>,
}

impl Workload {
    /// None yet.
    pub fn new(rng: Prng) -> Workload {
        Workload {
            rng,
            outstanding: BTreeMap::new(),
            next: 0,
            submitted: 0,
            progress: 0,
            open: false,
            scheduled: false,
            unanswered: Vec::new(),
            spoilt: Vec::new(),
            rich: BTreeMap::new(),
        }
    }
    /// Whether requests of the plan are still to come or to be answered.
    pub fn finished(&self, mix: &Mix) -> bool {
        let probe = |r: &Request| matches!(r.asked, Asked::Probe);
        self.submitted >= mix.requests && self.outstanding.values().all(probe)
    }
    /// The process is gone: nothing of it will be answered.
    pub fn forget(&mut self, node: usize) {
        self.outstanding.retain(|_, r| {
            if r.node == node
                && let Asked::Write { id, .. } = r.asked
            {
                self.unanswered.push(id);
            }
            r.node != node
        });
    }
}

/// Draws an extent: small ones are likelier, and many lie in the same few places.
pub fn draw_extent(volumes: &[(u8, u64, u64)], mix: &Mix, rng: &mut Prng) -> Extent {
    let (number, size, block) = rng.pick(volumes);
    let sectors = size / SECTOR as u64;
    // The front end tells its client the smallest unit.
    let unit = if rng.permille(300) { 8 } else { block / SECTOR as u64 };
    let len = rng.log(1, mix.largest).next_multiple_of(unit).min(sectors);
    let room = if rng.permille(mix.hot) { (sectors / 16).max(len) } else { sectors };
    let first = rng.below(room.min(sectors) - len + 1) / unit * unit;
    let address = Address::new(number, first * SECTOR as u64).expect("within a small volume");
    Extent::new(address, len * SECTOR as u64).expect("whole sectors of one volume")
}

impl World {
    /// Lets the workload go on if it may.
    pub fn kick(&mut self) {
        let node = self.scenario.primary;
        let outstanding = self.work.outstanding.values().filter(|r| r.node == node).count();
        let room = (outstanding as u64) < self.plan.mix.depth;
        let more = self.work.submitted < self.plan.mix.requests;
        if self.work.open && room && more && !self.work.scheduled {
            self.work.scheduled = true;
            let think = self.work.rng.below(self.plan.mix.think + 1);
            self.after(think, Coming::Submit);
        }
    }

    /// One request.
    pub fn submit(&mut self) -> Outcome {
        self.work.scheduled = false;
        let node = self.scenario.primary;
        if !self.work.open || self.hosts[node].node.is_none() {
            return Ok(());
        }
        if self.work.submitted >= self.plan.mix.requests {
            return Ok(());
        }
        self.work.submitted += 1;
        self.work.progress = self.now;
        let mix = self.plan.mix.clone();
        let draw = self.work.rng.below(1000);
        let latched = self.hosts[node].watch.latched;
        let (op, asked) = if draw < mix.flush {
            let members = self.members(node)?;
            let tick = self.model.tick();
            (Op::Flush, Asked::Flush { tick, members, latched })
        } else {
            let extent = match self.next_spoilt() {
                Some(extent) => extent,
                None => draw_extent(&self.plan.volumes, &mix, &mut self.work.rng),
            };
            let fua = self.work.rng.permille(mix.fua);
            match draw - mix.flush {
                d if d < mix.read => {
                    (Op::Read(extent), Asked::Read { extent, tick: self.model.begin_read() })
                }
                d if d < mix.read + mix.zero => {
                    let id = self.model.begin_write(extent, true);
                    (Op::Zero { extent, fua }, Asked::Write { id, fua, latched })
                }
                _ => self.draw_write(extent, fua, latched),
            }
        };
        self.issue(node, op, asked)?;
        self.kick();
        Ok(())
    }

    /// A spoilt place, while it may be in a window that is open.
    fn next_spoilt(&mut self) -> Option<Extent> {
        let running = |s: &Status| s.refresh.as_ref().is_some_and(|j| j.state == "Running");
        let open = !self.work.spoilt.is_empty()
            && self.hosts.iter().any(|h| h.status.as_deref().is_some_and(running))
            && self.work.rng.permille(300);
        if open { self.work.spoilt.pop() } else { None }
    }

    fn draw_write(&mut self, extent: Extent, fua: bool, latched: bool) -> (Op, Asked) {
        if let Some(id) = self.work.unanswered.pop()
            && self.work.rng.permille(500)
            && let Some(rich) = self.work.rich.get(&id).copied()
            && self.model.writes[id as usize].decided != NEVER
        {
            // A recovered front end may submit the same write again (I11).
            self.counts.check("I11");
            self.model.resubmit(id);
            let w = &self.model.writes[id as usize];
            let address = Address::new(self.model.volumes[w.volume].number, w.first * SECTOR as u64);
            let extent = Extent::new(address.expect("was written before"), w.sectors * SECTOR as u64);
            let extent = extent.expect("was written before");
            return self.write_op(extent, id, fua, rich, latched);
        }
        let rich = self.work.rng.permille(self.plan.mix.rich);
        let id = self.model.begin_write(extent, false);
        self.work.rich.insert(id, rich);
        self.write_op(extent, id, fua, rich, latched)
    }

    fn write_op(&self, extent: Extent, id: WriteId, fua: bool, rich: bool, latched: bool) -> (Op, Asked) {
        let mut data = vec![0; extent.len() as usize];
        let first = extent.address().offset() / SECTOR as u64;
        for (out, sector) in data.chunks_exact_mut(SECTOR).zip(first..) {
            content::fill(out, id, extent.address().volume(), sector, rich);
        }
        (Op::Write { extent, data: Bytes::from(data).into(), fua }, Asked::Write { id, fua, latched })
    }

    /// Gives a node a request.
    pub fn issue(&mut self, node: usize, op: Op, asked: Asked) -> Outcome {
        self.work.next += 1;
        let id = self.work.next;
        let (kind, at, len) = match &op {
            Op::Read(e) => (0, e.start(), e.len()),
            Op::Write { extent, fua, .. } => (1 + u64::from(*fua), extent.start(), extent.len()),
            Op::Zero { extent, fua } => (3 + u64::from(*fua), extent.start(), extent.len()),
            Op::Flush => (5, 0, 0),
        };
        self.trace.note(self.now, node, "request", [id << 8 | kind, at, len]);
        self.work.outstanding.insert(id, Request { node, asked });
        self.step(node, Event::Request { id: RequestId(id), op })
    }

    /// A request is answered.
    pub fn complete(&mut self, node: usize, id: u64, result: Result<Bytes, IoError>) -> Outcome {
        if id > crate::view::IDS {
            return self.view_complete(node, id, result);
        }
        let errno = result.as_ref().err().map_or(0, |e| e.errno as u64);
        self.trace.note(self.now, node, "complete", [id, errno, 0]);
        let Some(request) = self.work.outstanding.remove(&id) else {
            return broken("contract", format!("request {id} is answered a second time, or was never made"));
        };
        self.work.progress = self.now;
        match result {
            Ok(bytes) => self.succeeded(node, request.asked, &bytes)?,
            Err(error) => self.failed(node, &request.asked, error)?,
        }
        self.kick();
        Ok(())
    }

    fn succeeded(&mut self, node: usize, asked: Asked, bytes: &Bytes) -> Outcome {
        match asked {
            Asked::Write { id, fua, latched, .. } => {
                self.may_acknowledge(node, latched && fua)?;
                self.model.end_write(id, true, fua);
            }
            Asked::Flush { tick, members, latched } => {
                self.may_acknowledge(node, latched)?;
                self.counts.check("I3");
                let members = members & !self.scenario.outdating.leaving;
                let covered = self.model.end_flush(tick);
                self.check_without(node, &covered)?;
                for id in covered {
                    self.model.writes[id as usize].remote |= members;
                }
                self.promise(tick, members);
            }
            Asked::Read { extent, tick } => {
                self.counts.check("I2");
                self.model.end_read(tick);
                self.model.check_read(extent, bytes, tick).or_else(|text| broken("I2", text))?;
            }
            Asked::Verify { extent, tick } => {
                let (incarnation, bytes) = (self.hosts[node].incarnation, bytes.clone());
                self.after(0, Coming::Verified { node, incarnation, extent, bytes, tick });
            }
            Asked::Probe => {
                self.may_acknowledge(node, false)?;
                self.counts.check("asked");
                if self.plan.finds_the_promoted() && self.scenario.demoted(node) {
                    return broken("I8", "an old primary serves beside the new one, which could answer");
                }
            }
        }
        Ok(())
    }

    /// Every write answered before `tick` is promised to the members, though an earlier flush covered it.
    fn promise(&mut self, tick: u64, members: u8) {
        if members != 0 {
            let writes = self.model.writes.iter_mut().filter(|w| w.acked && w.decided < tick);
            writes.for_each(|w| w.remote |= members);
        }
    }

    fn may_acknowledge(&mut self, node: usize, latched: bool) -> Outcome {
        self.check_lease(node)?;
        self.counts.check("I8");
        let watch = &self.hosts[node].watch;
        if watch.heard_term > watch.acting_term {
            let text =
                format!("acknowledges under term {} having heard of {}", watch.acting_term, watch.heard_term);
            return broken("I8", text);
        }
        self.counts.check("I10");
        if latched {
            return broken("I10", "a flush submitted after a failed journal write or sync succeeded");
        }
        Ok(())
    }

    fn failed(&mut self, node: usize, asked: &Asked, error: IoError) -> Outcome {
        self.counts.met("request failed");
        if let Asked::Write { id, .. } = asked {
            self.model.end_write(*id, false, false);
        }
        if let Asked::Read { tick, .. } = asked {
            self.model.end_read(*tick);
        }
        if let Asked::Verify { extent, tick } = asked {
            let (incarnation, extent, tick) = (self.hosts[node].incarnation, *extent, *tick);
            let bytes = Bytes::new();
            self.after(1_000_000, Coming::Verified { node, incarnation, extent, bytes, tick });
        }
        let watch = &self.hosts[node].watch;
        let replaced = self.scenario.demoted(node) || self.is_outranked(node);
        if watch.faulted || watch.stopping || replaced || self.is_moving(node) {
            return Ok(());
        }
        broken("contract", format!("{asked:?} failed without a fault: {error}"))
    }

    /// Members of the sync set as the primary tells them now.
    pub fn members(&mut self, node: usize) -> Result<u8, crate::world::Violation> {
        if self.plan.sync == 0 {
            return Ok(0);
        }
        let Some(status) = self.poll(node)? else {
            return Ok(0);
        };
        if status.ack_level != "durable" {
            return Ok(0);
        }
        let named =
            |name: &String, h: &crate::world::Host| *name == h.config.name || *name == format!("{:?}", h.id);
        let bit = |(n, h)| {
            if status.sync_set.iter().any(|name| named(name, h)) { 1u8 << n } else { 0 }
        };
        Ok(self.hosts.iter().enumerate().map(bit).fold(0, |a, b: u8| a | b))
    }
}

//! What a node asks of its shell, done on the models; and how the answers come back.
//!
//! Owns: the executor's side of the node's boundary. Invariant: every disk request, encoding and
//! dial of a living process is answered exactly once.

use crate::disk::{self, Fault as DiskFault};
use crate::memory::Slot;
use crate::net::{self, peer_node};
use crate::plan::Fault;
use crate::world::{Coming, Outcome, Purpose, Sabotage, World, broken};
use bytes::Bytes;
use volrep::disk::{DiskOp, DiskRequest, File};
use volrep::format::message::Message;
use volrep::format::record::encode;
use volrep::node::event::{Action, Actions, Answer, Event, Level, LinkId, Refusal};

/// A disk fault that waits for its request.
#[derive(Clone, Copy, Debug)]
pub struct Armed {
    /// Of which file; all backings count as `Backing(0)`.
    pub file: File,
    /// Of which kind: 0 read, 1 write or zero, 2 sync.
    pub kind: u8,
    /// After how many such requests.
    pub skip: u64,
    /// How.
    pub fault: DiskFault,
}

fn kind(op: &DiskOp) -> u8 {
    match op {
        DiskOp::Read { .. } => 0,
        DiskOp::Write { .. } | DiskOp::Zero { .. } => 1,
        DiskOp::Sync => 2,
    }
}

/// A message in two numbers, for the trace.
fn digest(message: &Message) -> (u64, u64) {
    match message {
        Message::Challenge { .. } => (1, 0),
        Message::Hello { identity, .. } => (2, identity.tail.lsn.0),
        Message::Welcome { identity, .. } => (3, identity.tail.lsn.0),
        Message::Refuse { .. } => (4, 0),
        Message::Begin { from } => (5, from.0),
        Message::Record(r) => (6, r.stamp.lsn.0),
        Message::Durable { lsn } => (7, lsn.0),
        Message::Positions { received, durable, applied } => {
            (8, received.0 << 40 ^ durable.0 << 20 ^ applied.0)
        }
        Message::Heartbeat { tail, .. } => (9, tail.map_or(0, |t| t.0)),
        Message::Resync { since } => (10, since.map_or(0, |p| p.lsn.0)),
        Message::Candidates { extents } => (11, extents.len() as u64),
        Message::Rebase { at, .. } => (12, at.point.lsn.0),
        Message::Resynced => (13, 0),
        Message::AskCopy { lsn } => (14, lsn.0),
        Message::Copy(r) => (15, r.stamp.lsn.0),
        Message::NoCopy { lsn } => (16, lsn.0),
        Message::Handover { at } => (21, at.lsn.0),
        Message::Compare(word) => (20, word.wire_len()),
    }
}

impl World {
    /// Does what a node asks.
    pub fn perform(&mut self, node: usize, actions: Actions) -> Outcome {
        for action in actions.list {
            match action {
                Action::Disk(request) => self.disk_submit(node, request)?,
                Action::Encode { token, job } => {
                    self.trace.note(
                        self.now,
                        node,
                        "encode",
                        [token.0, job.extents.len() as u64, job.buf.len() as u64],
                    );
                    let compressor = self.compressors.entry(job.level.unwrap_or(0)).or_default();
                    let size = job.buf.len() as u64;
                    let encoded = encode(job, compressor);
                    let incarnation = self.hosts[node].incarnation;
                    let delay = 2_000 + self.rng.below(20_000 + size / 2);
                    self.after(delay, Coming::Encoded { node, incarnation, token, encoded });
                }
                Action::Compare { token, job } => {
                    let size = job.len() as u64;
                    self.trace.note(self.now, node, "compare", [token.0, size, 0]);
                    let product = job.run();
                    let incarnation = self.hosts[node].incarnation;
                    let delay = 2_000 + self.rng.below(20_000 + size / 2);
                    self.after(delay, Coming::Compared { node, incarnation, token, product });
                }
                Action::OpenStage { fresh } => {
                    self.trace.note(self.now, node, "open stage", [u64::from(fresh), 0, 0]);
                    let incarnation = self.hosts[node].incarnation;
                    let delay = 50_000 + self.rng.below(5_000_000);
                    self.after(delay, Coming::Stage { node, incarnation, fresh });
                }
                Action::DropStage => self.drop_stage(node)?,
                Action::History(event) => self.keep_event(node, event)?,
                Action::Salvage(part) => self.salvage(node, part)?,
                Action::Complete { id, result } => self.complete(node, id.0, result)?,
                Action::Dial { peer } => {
                    let incarnation = self.hosts[node].incarnation;
                    let delay = 50_000 + self.rng.below(5_000_000);
                    self.after(delay, Coming::Dialed { node, incarnation, peer });
                }
                Action::Send { link, message } => self.send(node, link, &message)?,
                Action::Close { link } => self.close(node, link),
                Action::Answer { id, answer } => self.answered(node, id.0, answer)?,
                Action::Log { level, text } => {
                    let name = if level <= Level::Warn { "LOG" } else { "log" };
                    self.trace.say(self.now, node, name, &text);
                }
                Action::Stop { text } => {
                    self.trace.say(self.now, node, "stop", &text);
                    return self.stopped(node, &text);
                }
            }
        }
        self.wish(node, actions.wake);
        Ok(())
    }

    fn disk_submit(&mut self, node: usize, request: DiskRequest) -> Outcome {
        self.counts.check("contract");
        let name = match request.file {
            File::Superblock => "superblock",
            File::Journal => "journal",
            File::DirtyMaps => "maps",
            File::HashIndex => "index",
            File::Backing(_) => "backing",
            File::Stage(_) => "stage",
            File::StageMap => "stage map",
        };
        let (what, at, len) = match &request.op {
            DiskOp::Read { offset, len } => (0, *offset, *len as u64),
            DiskOp::Write { offset, data, dsync } => (1 + u64::from(*dsync), *offset, data.len() as u64),
            DiskOp::Zero { offset, len } => (3, *offset, *len),
            DiskOp::Sync => (4, 0, 0),
        };
        self.trace.note(self.now, node, name, [what, at, len]);
        if let DiskOp::Write { offset, data, .. } = &request.op {
            match request.file {
                File::Journal => self.watch_journal(node, *offset, data)?,
                File::Superblock => self.watch_superblock(node, data)?,
                _ => {}
            }
        }
        let mapped = matches!(request.file, File::DirtyMaps | File::HashIndex | File::StageMap);
        if mapped && !matches!(request.op, DiskOp::Sync) {
            return broken("contract", format!("mapped memory: {}", disk::describe(&request)));
        }
        let file = request.file;
        if matches!(file, File::Superblock | File::Journal) {
            self.promotion_step(node);
        }
        if matches!(file, File::Backing(_)) && what > 0 {
            self.drain_step(node);
        }
        if request.token.owner() == volrep::node::BACKLOG {
            self.counts.met("read through the journal");
        }
        if matches!(file, File::Stage(_)) {
            self.resync_step(node);
        }
        let (write, sync) = (self.plan.disk_write, self.plan.disk_sync);
        let host = &mut self.hosts[node];
        let ticket = match host.disk.submit(request) {
            Ok(ticket) => ticket,
            Err(text) => return broken("I2", text),
        };
        let slot = match file {
            File::StageMap => host.stage.as_ref(),
            File::HashIndex => Some(&host.index),
            _ => Some(&host.maps),
        };
        if let Some(slot) = slot.filter(|_| mapped) {
            host.map_syncs.insert(ticket, (slot.clone(), slot.sync()));
        }
        let slowest = if what == 4 { sync } else { write };
        let usual = 10_000 + self.rng.below(slowest / 4) + len / 4;
        let delay = if self.rng.permille(50) { usual + self.rng.below(slowest) } else { usual };
        let (delay, incarnation) = (delay * self.hosts[node].slow, self.hosts[node].incarnation);
        self.after(delay, Coming::Disk { node, incarnation, ticket });
        Ok(())
    }

    /// A disk request completes.
    pub fn disk_done(&mut self, node: usize, ticket: u64) -> Outcome {
        let host = &mut self.hosts[node];
        let request = host.disk.request(ticket).expect("in flight until it completes").clone();
        let (file, kind) = (request.file, kind(&request.op));
        let class = match file {
            File::Backing(_) => File::Backing(0),
            File::Stage(_) => File::Stage(0),
            other => other,
        };
        let mut fault = None;
        if let Some(at) = host.armed.iter().position(|a| a.file == class && a.kind == kind) {
            if host.armed[at].skip == 0 {
                fault = Some(host.armed.swap_remove(at).fault);
            } else {
                host.armed[at].skip -= 1;
            }
        }
        fault = fault.or(self.sweep.as_mut().and_then(|s| s.strikes(node, kind, self.now)));
        let lost = match self.sabotage {
            Some(Sabotage::LyingSync) => kind == 2 && file == File::Journal,
            Some(Sabotage::LostWrite) => kind == 1 && class == File::Backing(0) && self.rng.permille(50),
            _ => false,
        };
        let mut result = if lost {
            host.disk.skip(ticket);
            Ok(Bytes::new())
        } else {
            host.disk.complete(ticket, fault, &mut self.rng)
        };
        if self.sabotage == Some(Sabotage::StaleRead) && kind == 0 && class == File::Backing(0) {
            let zeroes = |b: Bytes| {
                if b.len() > 512 && self.rng.permille(20) { vec![0; b.len()].into() } else { b }
            };
            result = result.map(zeroes);
        }
        if file == File::Superblock && kind != 0 {
            self.note_slots(node);
        }
        let host = &mut self.hosts[node];
        if let Some((slot, sync)) = host.map_syncs.remove(&ticket)
            && result.is_ok()
        {
            slot.synced(sync);
        }
        if fault.is_some() {
            let name = format!("EIO on {} of {class:?}", ["read", "write", "sync"][usize::from(kind)]);
            self.trace.say(self.now, node, "fault", &name);
            self.counts.met(&name);
            host.watch.failed(file, kind);
        }
        self.trace.note(
            self.now,
            node,
            "disk done",
            [request.token.0, kind.into(), u64::from(result.is_err())],
        );
        self.step(node, Event::Disk { token: request.token, result })
    }

    /// The shell has opened the stage's files, or made them.
    pub fn stage_opened(&mut self, node: usize, fresh: bool) -> Outcome {
        let sizes: Vec<_> = self.plan.volumes.iter().map(|&(n, size, _)| (n, size)).collect();
        let swept = self.sweep.as_mut().filter(|_| fresh).and_then(|s| s.strikes(node, 1, self.now));
        let full = swept.is_some()
            || fresh && self.hosts[node].armed.iter().any(|a| a.file == File::StageMap && a.kind == 1);
        let host = &mut self.hosts[node];
        host.armed.retain(|a| a.file != File::StageMap || a.kind != 1);
        if fresh && !full {
            self.drop_stage(node)?;
            let host = &mut self.hosts[node];
            for &(number, size, block) in &self.plan.volumes {
                host.disk.make(File::Stage(number), size, block);
            }
            host.stage = Some(Slot::new(volrep::apply::stage::stage_len(&sizes) as usize));
        }
        let stage = self.hosts[node].stage.as_ref().filter(|_| !full);
        let result = stage.map(Slot::lend).ok_or_else(|| "no space left on device".to_owned());
        self.counts.met(if result.is_err() {
            "no stage"
        } else if fresh {
            "stage made"
        } else {
            "stage found"
        });
        self.step(node, Event::Stage { result })
    }

    fn drop_stage(&mut self, node: usize) -> Outcome {
        let host = &mut self.hosts[node];
        host.stage = None;
        for &(number, ..) in &self.plan.volumes {
            host.disk.remove(File::Stage(number)).or_else(|text| broken("contract", text))?;
        }
        Ok(())
    }

    fn send(&mut self, node: usize, link: LinkId, message: &Message) -> Outcome {
        let (kind, number) = digest(message);
        self.trace.note(self.now, node, "send", [link.0, kind, number]);
        self.watch_sent(node, message)?;
        let Some((connection, side)) = self.net.find(link) else {
            return broken("contract", format!("send on unknown {link:?}"));
        };
        let mut frame = net::frame(message);
        let mut copies = 1;
        let broken_already = self.scenario.gaps.remove(&link.0);
        if broken_already {
            // A lost message shows at the next one: the stream's own checks fail.
            frame = net::flip(&frame, &mut self.rng);
        }
        match self.scenario.message_faults.pop() {
            Some(Fault::DropMessage) => {
                self.scenario.gaps.insert(link.0);
                copies = 0;
            }
            Some(Fault::DuplicateMessage) => copies = 2,
            Some(_) if broken_already => {} // the same bit might turn back
            Some(_) => {
                frame = net::flip(&frame, &mut self.rng);
                self.counts.check("I12");
                if net::parse(&frame).is_ok() {
                    return broken("I12", format!("a flipped bit went unnoticed in {message:?}"));
                }
            }
            None => {}
        }
        let c = self.net.connections.get(&connection).expect("never removed");
        let (other, mine) = (c.ends[1 - side].node, &c.ends[side]);
        if mine.node != node || mine.down {
            return Ok(()); // the shell drops what is sent on a link that is gone
        }
        if let Message::Heartbeat { standing, .. } = message {
            self.check_standing(node, other, link, *standing)?;
        }
        let parted = self.net.parted(node, other);
        for _ in 0..copies {
            let c = self.net.connections.get_mut(&connection).expect("never removed");
            if let Some(until) = parted {
                c.hold(1 - side, until);
            }
            let at = c.send(1 - side, self.now, frame.clone(), &mut self.rng);
            self.at(at, Coming::Arrive { connection, side: 1 - side });
        }
        Ok(())
    }

    fn close(&mut self, node: usize, link: LinkId) {
        self.trace.note(self.now, node, "close", [link.0, 0, 0]);
        let Some((connection, side)) = self.net.find(link) else {
            return;
        };
        let c = self.net.connections.get_mut(&connection).expect("never removed");
        if c.ends[side].down {
            return;
        }
        c.ends[side].closed = true;
        let other = c.after_all(1 - side, self.now);
        let delay = self.rng.below(500_000);
        self.after(delay, Coming::Down { connection, side });
        self.at(other + delay, Coming::Down { connection, side: 1 - side });
    }

    /// A dial ends.
    pub fn dialed(&mut self, node: usize, peer: usize) -> Outcome {
        let target = peer_node(node, peer);
        let refused = self.now < self.scenario.dials_fail_until
            || self.net.parted(node, target).is_some()
            || self.hosts[target].node.is_none();
        if refused {
            self.trace.note(self.now, node, "dial failed", [peer as u64, 0, 0]);
            return self.step(node, Event::DialFailed { peer });
        }
        let connection = self.net.open(node, peer, target, &mut self.rng);
        for side in 0..2 {
            let c = self.net.connections.get_mut(&connection).expect("just opened");
            let at = c.up_time(side, self.now, &mut self.rng);
            self.at(at, Coming::Up { connection, side });
        }
        Ok(())
    }

    /// An end learns of its connection.
    pub fn link_up(&mut self, connection: u64, side: usize) -> Outcome {
        let nonce = self.rng.bytes32();
        let end = &mut self.net.connections.get_mut(&connection).expect("never removed").ends[side];
        if end.down {
            return Ok(());
        }
        end.up = true;
        let (node, link, dialed) = (end.node, end.link, end.dialed);
        self.trace.note(self.now, node, "link up", [link.0, dialed.map_or(99, |d| d as u64), 0]);
        self.step(node, Event::LinkUp { link, dialed, nonce })
    }

    /// A frame arrives, or would have.
    pub fn arrive(&mut self, connection: u64, side: usize) -> Outcome {
        let c = self.net.connections.get_mut(&connection).expect("never removed");
        let (node, other, link) = (c.ends[side].node, c.ends[1 - side].node, c.ends[side].link);
        if let Some(until) = self.net.parted(node, other) {
            self.at(until, Coming::Arrive { connection, side });
            return Ok(());
        }
        let c = self.net.connections.get_mut(&connection).expect("never removed");
        let closed = c.ends[side].closed;
        let Some(frame) = c.arrive(side) else {
            return Ok(());
        };
        match net::parse(&frame) {
            Ok(message) => {
                let (kind, number) = digest(&message);
                self.trace.note(self.now, node, "receive", [link.0, kind, number]);
                if !closed {
                    self.hosts[node].watch.heard(&message);
                    self.heard_tail(node, other, &message);
                }
                self.step(node, Event::Message { link, message })
            }
            Err(text) => {
                self.trace.say(self.now, node, "bad frame", &text);
                self.counts.met("bad frame refused");
                self.after(1_000, Coming::Down { connection, side: 1 - side });
                self.link_down(connection, side)
            }
        }
    }

    /// An end learns that its connection is gone.
    pub fn link_down(&mut self, connection: u64, side: usize) -> Outcome {
        let c = &self.net.connections[&connection];
        let (node, other) = (c.ends[side].node, c.ends[1 - side].node);
        if let Some(until) = self.net.parted(node, other)
            && !c.ends[1 - side].down
        {
            // What tells it of the end does not get through either. A close of its own does.
            let mine = self.rng.permille(500);
            if !mine {
                self.at(until, Coming::Down { connection, side });
                return Ok(());
            }
        }
        let c = self.net.connections.get_mut(&connection).expect("never removed");
        let end = &mut c.ends[side];
        if end.down {
            return Ok(());
        }
        end.down = true;
        let (link, up, dialed) = (end.link, end.up, end.dialed);
        self.trace.note(self.now, node, "link down", [link.0, 0, 0]);
        match dialed {
            _ if up => self.step(node, Event::LinkDown { link }),
            Some(peer) => self.step(node, Event::DialFailed { peer }),
            None => Ok(()),
        }
    }

    /// A process is gone, and with it its ends of connections.
    pub fn disconnect_all(&mut self, node: usize, power: bool) {
        for connection in self.net.of_node(node) {
            let c = self.net.connections.get_mut(&connection).expect("never removed");
            for side in 0..2 {
                if c.ends[side].node == node {
                    c.ends[side].down = true;
                }
            }
            let Some(side) = (0..2).find(|s| !c.ends[*s].down) else {
                continue;
            };
            let lost = self.rng.below(c.under_way(side) as u64 + 1) as usize;
            c.cut(side, lost);
            let silent = power && self.rng.permille(700);
            if !silent {
                let at = c.after_all(side, self.now) + self.rng.below(2_000_000);
                self.at(at, Coming::Down { connection, side });
            }
        }
    }

    fn answered(&mut self, node: usize, id: u64, answer: Answer) -> Outcome {
        let Some(purpose) = self.hosts[node].waiting.remove(&id) else {
            return broken("contract", format!("answer to nothing: {answer:?}"));
        };
        match answer {
            Answer::Status(status) => {
                self.hosts[node].status = Some(status.into());
                Ok(())
            }
            Answer::Done(text) => {
                self.trace.say(self.now, node, "done", &format!("{purpose:?}: {text}"));
                let incarnation = self.hosts[node].incarnation;
                self.after(0, Coming::Granted { node, incarnation, purpose });
                Ok(())
            }
            Answer::Marked(mark) => {
                self.trace.say(self.now, node, "marked", &format!("{mark:?}"));
                self.marked(node, id, &mark)
            }
            Answer::Refused(why, text) => {
                self.trace.say(self.now, node, "refused", &format!("{purpose:?}: {why:?} {text}"));
                self.refused(node, purpose, why, &text)
            }
        }
    }

    fn refused(&mut self, node: usize, purpose: Purpose, why: Refusal, text: &str) -> Outcome {
        self.counts.met(&format!("{purpose:?} refused: {why:?}"));
        match purpose {
            Purpose::Promote if self.scenario.other == Some(node) => {
                self.scenario.other = None;
                return Ok(());
            }
            Purpose::Promote => return self.promotion_refused(text),
            Purpose::Outdate => return self.not_outdated(why),
            Purpose::Switchover => {
                self.switchover_answered(node);
                return Ok(());
            }
            Purpose::View => {
                self.hosts[node].view = None;
                return Ok(());
            }
            Purpose::Refresh | Purpose::Rejoin | Purpose::ViewClose | Purpose::Mark | Purpose::Detach => {
                return Ok(());
            }
            // Told to give its place up meanwhile.
            Purpose::Shutdown
                if self.hosts[node].watch.faulted
                    || self.scenario.is_promoted() && text.contains("no longer the primary") =>
            {
                let incarnation = self.hosts[node].incarnation;
                self.after(0, Coming::Granted { node, incarnation, purpose });
                return Ok(());
            }
            Purpose::Open if why == Refusal::Busy => {
                let incarnation = self.hosts[node].incarnation;
                self.after(5_000_000, Coming::Ask { node, incarnation });
                return Ok(());
            }
            _ => {}
        }
        let fault = self.hosts[node].watch.faulted || self.scenario.demoted(node) || self.is_moving(node);
        if fault {
            Ok(())
        } else {
            broken("contract", format!("{purpose:?} refused ({why:?}) without a fault: {text}"))
        }
    }
}

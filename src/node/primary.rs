//! The primary: requests of the front ends, from acceptance to the backing.
//!
//! Owns: the write cache while it is open, who waits for what, write-back. Invariants: a FLUSH is
//! answered only when every write answered before it was submitted is durable to the ack level (I2,
//! I3, I4); no request is served before everything that an earlier run accepted is durable (I6); a
//! write is accepted only if the journal surely has room for it.

use super::event::{Action, Op, RequestId};
use super::foresight::Foresight;
use super::meta::Ticket;
use super::reading::ReadFor;
use super::run::{Part, Run};
use super::sealing::Pipeline;
use crate::apply::Source;
use crate::cache::{Cache, worst_case};
use crate::disk::{IoError, aligned, freeze};
use crate::format::record::{MAX_RAW, MAX_ZERO};
use crate::journal::Tail;
use crate::units::{Extent, Lsn, Term};
use bytes::Bytes;
use std::collections::VecDeque;

/// How far a primary is on its way to serving.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    /// Records after the checkpoint go into the backing.
    Redo,
    /// A checkpoint at the journal's end.
    Checkpoint,
    /// The new generation is being made durable.
    Opening(Ticket),
    /// What the earlier run had accepted is being made durable; up to this record.
    Settling(Lsn),
    /// Requests are served.
    Serving,
}

/// Somebody waits until write `seq` and all before it are durable to the ack level.
struct Waiter {
    seq: u64,
    id: RequestId,
}

/// The term is on its way up; no record takes a place meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Raising {
    /// Above this one, once everything in the journal is durable.
    Above(Term),
    /// The superblock is told.
    Saving(Ticket),
}

/// Journal bytes that front ends can't use: room for the records that open generations.
const RESERVE: u64 = 64 << 10;

/// A batch of write-back frees at most about this part of the write cache: its room comes back when the whole of it is in the
/// backing, and a writer that finds none waits for that long.
const STEPS: u64 = 8;

/// See the module's documentation.
pub struct Primary {
    pub(super) stage: Stage,
    pub(super) cache: Option<Cache>,
    pub(super) pipeline: Pipeline,
    pub(super) foresight: Foresight,
    /// Requests that wait: for service, or (writes) for room.
    waiting: VecDeque<(RequestId, Op)>,
    waiters: VecDeque<Waiter>,
    /// Records that are not durable here, and not to the ack level: (LSN, last write sequence).
    undurable: VecDeque<(Lsn, u64)>,
    uncommitted: VecDeque<(Lsn, u64)>,
    durable_write: u64,
    committed_write: u64,
    /// Everything up to here is durable here, and to the ack level: shadows may apply it. A shadow outside of the sync set
    /// that had more in its image than the members have could not follow the member that is promoted.
    pub(super) announced: Lsn,
    /// Records that are in the write cache, too.
    pub(super) tails: VecDeque<Tail>,
    pub(super) dirty_since: Option<u64>,
    batch: Vec<Extent>,
    /// It serves already: records up to this one go from the journal into the image.
    pub(super) drain: Option<Lsn>,
    /// Room was asked for and not found; in the journal.
    pub(super) starved: bool,
    pub(super) journal_full: bool,
    /// The term is being raised: no record takes a place meanwhile.
    pub(super) raising: Option<Raising>,
    /// No more requests: the node is shutting down.
    pub(super) closing: bool,
    pub(super) written_bytes: u64,
}

impl Primary {
    /// A primary that has yet to recover its image.
    pub fn new() -> Primary {
        Primary {
            stage: Stage::Redo,
            cache: None,
            pipeline: Pipeline::default(),
            foresight: Foresight::default(),
            waiting: VecDeque::new(),
            waiters: VecDeque::new(),
            undurable: VecDeque::new(),
            uncommitted: VecDeque::new(),
            durable_write: 0,
            committed_write: 0,
            announced: Lsn(0),
            tails: VecDeque::new(),
            dirty_since: None,
            batch: Vec::new(),
            drain: None,
            starved: false,
            journal_full: false,
            raising: None,
            closing: false,
            written_bytes: 0,
        }
    }

    /// Records go from the journal into the backing.
    pub fn is_redoing(&self) -> bool {
        self.stage == Stage::Redo
    }
    /// Requests are served.
    pub fn is_serving(&self) -> bool {
        self.stage == Stage::Serving
    }
    /// Last write sequence that is durable in the own journal.
    pub fn durable_write(&self) -> u64 {
        self.durable_write
    }
    /// The journal was recovered up to `tail`: everything in it is durable here. With a sync set
    /// (not `alone`), whether its members have it is not known yet.
    pub(super) fn begin_at(&mut self, tail: &Tail, alone: bool) {
        self.durable_write = tail.last_write;
        if alone {
            self.committed_write = tail.last_write;
            self.announced = tail.point.lsn;
        } else {
            self.uncommitted.push_back((tail.point.lsn, tail.last_write));
        }
    }
    /// Whether everything accepted up to `seq` is in the backing.
    pub(super) fn is_written_back(&self, seq: u64) -> bool {
        self.cache.as_ref().is_none_or(|c| c.freed_seq() >= seq) && self.batch.is_empty()
    }
    /// Last write sequence that is in the backing, with all before it.
    pub(super) fn freed_write(&self) -> u64 {
        self.cache.as_ref().map_or(0, |c| c.freed_seq())
    }
    /// The sequence that the oldest waiter needs.
    pub(super) fn first_wanted(&self) -> Option<u64> {
        self.waiters.front().map(|w| w.seq)
    }
    /// The sequence that the newest waiter needs.
    pub(super) fn last_wanted(&self) -> Option<u64> {
        self.waiters.back().map(|w| w.seq)
    }
    /// A FLUSH or FUA is waiting.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.waiters.is_empty()
    }

    /// A record was appended.
    pub(super) fn appended(&mut self, tail: Tail, now: u64) {
        let pair = (tail.point.lsn, tail.last_write);
        self.undurable.push_back(pair);
        self.uncommitted.push_back(pair);
        self.tails.push_back(tail);
        self.dirty_since.get_or_insert(now);
    }

    /// Part of what it has lies in the journal alone.
    pub(super) fn is_draining(&self) -> bool {
        self.drain.is_some()
    }

    /// A batch that ends with `upto` is in the backing.
    pub(super) fn written_back(&mut self, upto: &Tail) {
        if let Some(cache) = &mut self.cache {
            cache.written_back(self.batch.drain(..), upto.last_write);
        }
        while self.tails.front().is_some_and(|t| t.point.lsn <= upto.point.lsn) {
            self.tails.pop_front();
        }
    }

    /// Requests that wait for room or for service, to be refused.
    pub(super) fn take_waiting(&mut self) -> Vec<RequestId> {
        self.waiting.drain(..).map(|(id, _)| id).collect()
    }

    /// Journal bytes that must stay free for what was accepted.
    pub(super) fn reserved(&self) -> u64 {
        self.cache.as_ref().map_or(0, Cache::reserved) + self.pipeline.reserved() + RESERVE
    }

    /// Nothing that was accepted is anywhere but in the journal and the backing.
    pub(super) fn is_empty(&self) -> bool {
        let cache = self.cache.as_ref();
        self.batch.is_empty() && self.pipeline.is_empty() && cache.is_none_or(Cache::is_empty)
    }

    /// Everything that was accepted is in records.
    pub(super) fn is_sealed(&self) -> bool {
        let open = |c: &Cache| c.has_open() || c.closed() > 0;
        self.pipeline.is_empty() && !self.cache.as_ref().is_some_and(open)
    }
}

impl Run {
    /// A front end's request.
    pub(super) fn request(&mut self, id: RequestId, op: Op) {
        let refused = match &self.part {
            _ if self.fault.is_some() || self.is_retiring() => Some(IoError::EIO),
            Part::Shadow(_) => Some(IoError::EROFS),
            Part::Primary(p) if p.closing => Some(IoError::ESHUTDOWN),
            Part::Primary(_) => None,
        };
        if let Some(error) = refused {
            return self.complete(id, Err(error));
        }
        let moving = self.moving.is_some();
        let Part::Primary(p) = &mut self.part else { return };
        match op {
            Op::Write { .. } | Op::Zero { .. } if moving => p.waiting.push_back((id, op)),
            _ if !p.is_serving() => p.waiting.push_back((id, op)),
            Op::Read(extent) => self.read(ReadFor::Front(id), extent),
            Op::Flush => {
                let seq = p.cache.as_ref().map_or(0, |c| c.last_seq());
                p.foresight.flushed();
                self.wait_for(seq, id);
            }
            Op::Write { .. } | Op::Zero { .. } if !p.waiting.is_empty() => p.waiting.push_back((id, op)),
            Op::Write { .. } | Op::Zero { .. } => {
                if let Some(rest) = self.accept(id, op)
                    && let Part::Primary(p) = &mut self.part
                {
                    p.waiting.push_front((id, rest));
                }
            }
        }
    }

    pub(super) fn complete(&mut self, id: RequestId, result: Result<Bytes, IoError>) {
        self.out.push(Action::Complete { id, result });
    }

    /// Answers `id` once write `seq` is durable to the ack level.
    fn wait_for(&mut self, seq: u64, id: RequestId) {
        let Part::Primary(p) = &mut self.part else { return };
        if seq <= p.committed_write {
            return self.complete(id, Ok(Bytes::new()));
        }
        p.waiters.push_back(Waiter { seq, id });
        // It may be in a record already; records to come are wanted from the start.
        let tail = self.journal.tail();
        if tail.last_write >= seq {
            let lsn = tail.point.lsn;
            self.journal.want(lsn);
        }
    }

    /// Takes as much of a write as there is room for; what is left of it, if anything.
    fn accept(&mut self, id: RequestId, op: Op) -> Option<Op> {
        let (mut extent, mut data, fua) = match op {
            Op::Write { extent, data, fua } => (extent, Some(data), fua),
            Op::Zero { extent, fua } => (extent, None, fua),
            other => return Some(other),
        };
        loop {
            let Part::Primary(p) = &mut self.part else { return None };
            let Some(cache) = &mut p.cache else { return None };
            let most = if data.is_some() { MAX_RAW as u64 } else { MAX_ZERO };
            let len = extent.len().min(most);
            let payload = if data.is_some() { len } else { 0 };
            let journal = cache.reserved() + p.pipeline.reserved() + worst_case(payload) + RESERVE;
            if !cache.has_room(payload) || journal > self.journal.room() {
                p.starved = true;
                p.journal_full |= journal > self.journal.room();
                return Some(match data {
                    Some(data) => Op::Write { extent, data, fua },
                    None => Op::Zero { extent, fua },
                });
            }
            let piece = Extent::new(extent.address(), len).expect("a part of an extent");
            let seq = match cache.write(piece, data.as_ref()) {
                Ok(seq) => seq,
                Err(e) => {
                    self.complete(id, Err(e));
                    return None;
                }
            };
            self.compare.touch(piece);
            p.written_bytes += payload;
            p.pipeline.opened(self.now.mono);
            if let Some(data) = &mut data {
                data.advance(len);
            }
            match Extent::between(piece.end(), extent.end()) {
                Some(rest) => extent = rest,
                None if fua => {
                    self.wait_for(seq, id);
                    return None;
                }
                None => {
                    p.foresight.wrote();
                    self.complete(id, Ok(Bytes::new()));
                    return None;
                }
            }
        }
    }

    /// Writes that waited for room, and everything that waited for service.
    pub(super) fn retry_waiting(&mut self) -> bool {
        let mut moved = false;
        loop {
            let Part::Primary(p) = &mut self.part else { return moved };
            if !p.is_serving() || self.moving.is_some() {
                return moved;
            }
            p.starved = false;
            p.journal_full = false;
            let Some((id, op)) = p.waiting.pop_front() else { return moved };
            match op {
                Op::Read(extent) => self.read(ReadFor::Front(id), extent),
                Op::Flush => {
                    let seq = p.cache.as_ref().map_or(0, |c| c.last_seq());
                    self.wait_for(seq, id);
                }
                write => {
                    if let Some(rest) = self.accept(id, write) {
                        if let Part::Primary(p) = &mut self.part {
                            p.waiting.push_front((id, rest));
                        }
                        return moved;
                    }
                }
            }
            moved = true;
        }
    }

    /// Reads a volume for a comparison.
    pub(super) fn read_served(&mut self, call: usize, extent: Extent) {
        self.read(ReadFor::Compare(call), extent);
    }

    pub(super) fn read(&mut self, whose: ReadFor, extent: Extent) {
        let Part::Primary(p) = &mut self.part else { return };
        let Some(cache) = &p.cache else { return };
        let mut covered = 0;
        let parts: Vec<_> = cache.read(extent).inspect(|(e, _)| covered += e.len()).collect();
        if covered == extent.len() {
            let mut buf = aligned(extent.len() as usize);
            for (part, data) in parts {
                match data {
                    Some(data) => buf.extend_from_slice(data),
                    None => buf.resize(buf.len() + part.len() as usize, 0),
                }
            }
            return self.read_answer(whose, Ok(freeze(buf)));
        }
        // Write-back may finish before the read does: keep now what the backing lacks now.
        let newer = parts.into_iter().map(|(e, d)| (e, d.map(Bytes::copy_from_slice))).collect();
        self.read_below(whose, extent, newer);
    }

    /// Moves the primary on; whether anything moved.
    pub(super) fn pump_primary(&mut self) -> bool {
        let Part::Primary(p) = &self.part else { return false };
        match p.stage {
            Stage::Redo | Stage::Checkpoint | Stage::Opening(_) => self.open(),
            Stage::Settling(lsn) => {
                let mut moved = self.pump_sealing();
                moved |= self.commit();
                // What is being settled may need the room of what is settled already.
                moved |= self.begin_write_back();
                if self.journal.durable() >= lsn {
                    let Part::Primary(p) = &mut self.part else { return false };
                    p.stage = Stage::Serving;
                    self.retry_waiting();
                    moved = true;
                }
                moved
            }
            Stage::Serving => {
                let mut moved = self.retry_waiting() | self.pump_raise();
                moved |= self.pump_sealing();
                moved |= self.commit();
                moved | self.begin_write_back()
            }
        }
    }

    /// Answers those whose writes are durable to the ack level.
    fn commit(&mut self) -> bool {
        let durable = self.journal.durable();
        let committed = durable.min(self.members_durable());
        let Part::Primary(p) = &mut self.part else { return false };
        p.pipeline.durable(durable, self.now.mono);
        p.announced = p.announced.max(committed);
        while let Some((_, seq)) = p.undurable.pop_front_if(|(lsn, _)| *lsn <= durable) {
            p.durable_write = seq;
        }
        let mut moved = false;
        while let Some((_, seq)) = p.uncommitted.pop_front_if(|(lsn, _)| *lsn <= committed) {
            p.committed_write = seq;
            moved = true;
        }
        while let Some(w) = p.waiters.pop_front_if(|w| w.seq <= p.committed_write) {
            self.out.push(Action::Complete { id: w.id, result: Ok(Bytes::new()) });
        }
        moved
    }

    /// Begins a batch of write-back when it is due.
    fn begin_write_back(&mut self) -> bool {
        let hurry = self.image.hurry || self.admin.is_draining() || self.is_moving_over();
        let after = self.cfg.timing.write_back_after;
        let (durable, leaving) = (self.journal.durable(), self.is_leaving());
        let Part::Primary(p) = &mut self.part else { return false };
        let Some(cache) = &p.cache else { return false };
        if leaving || self.image.applier.is_busy() && !p.is_draining() {
            return false;
        }
        let ready = p.tails.partition_point(|t| t.point.lsn <= durable);
        let Some(newest) = ready.checked_sub(1) else { return false };
        let (used, size) = cache.usage();
        if p.is_draining() {
            // Older records are on their way into the image: nothing newer goes there before them.
            let full = p.starved && !p.journal_full || used >= size / 2;
            let upto = p.tails[newest].point.lsn;
            return full && self.spill(upto);
        }
        let due = p.dirty_since.unwrap_or(self.now.mono) + after;
        if !hurry && !p.starved && used < size / 2 && self.now.mono < due {
            self.wake_at(due);
            return false;
        }
        let step = p.tails.partition_point(|t| cache.freeable(t.last_write) <= size / STEPS);
        let last = newest.min(step.saturating_sub(1));
        let upto = p.tails[last];
        let dirty: Vec<_> = cache.dirty_up_to(upto.last_write).collect();
        p.batch = dirty.iter().map(|(e, _)| *e).collect();
        // What is left for the next step is due as it was.
        if last == newest {
            p.dirty_since = (ready < p.tails.len()).then_some(self.now.mono);
        }
        let source = |at: Option<u64>| at.map_or(Source::Zeroes, Source::Ring);
        self.begin_batch(dirty.into_iter().map(|(e, s)| (e, source(s.at))).collect(), Some(upto));
        true
    }

    /// Refuses everything that waits.
    pub(super) fn refuse_everything(&mut self) {
        let mut ids = Vec::new();
        if let Part::Primary(p) = &mut self.part {
            ids = p.take_waiting();
            ids.extend(p.waiters.drain(..).map(|w| w.id));
        }
        ids.extend(self.reading.take_all().into_iter().filter_map(|whose| match whose {
            ReadFor::Front(id) => Some(id),
            ReadFor::Compare(_) | ReadFor::View(_) => None,
        }));
        for id in ids {
            self.complete(id, Err(IoError::EIO));
        }
    }
}

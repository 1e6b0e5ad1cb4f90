//! From accepted writes to records: sealing, encoding, appending; and the opening of a generation.
//!
//! Owns: when an epoch closes, and the order in which encoded epochs become records. Invariants: a
//! record takes its place in the chain in the order in which its epoch closed; a generation is
//! durable in both superblock slots before its first record, and its first record before any READ.

use super::event::{Action, Level, LinkId};
use super::primary::{Raising, Stage};
use super::run::{Part, Run};
use crate::cache::{Cache, Gathered, RingId, RingState, ring::Ring};
use crate::disk::Memory;
use crate::format::message::{Role, refuse};
use crate::format::record::{Encoded, Kind, Stamp, encode_note, flags, seal};
use crate::journal::{Tail, tail_of};
use crate::role;
use crate::units::{BootId, Lsn, MILLIS, Term};
use std::collections::VecDeque;

/// Epochs being encoded or waiting for their turn.
const DEPTH: usize = 8;
/// Appends in flight.
const APPENDS: usize = 8;
/// Epochs of small writes that may be in the pipeline while another fills up.
const SHALLOW: usize = 2;
/// zstd levels of twice and of four times the speed of level 1, for nearly as good a ratio (database pages at 8 KiB:
/// 18 at level 1, 15.5 at -1, 10.7 at -3; `zstd -b --fast=3 -B8K`).
const QUICK: i32 = -1;
const HASTY: i32 = -3;
/// The longest that a commit counts for, ns.
const LONG: u64 = 5 * MILLIS;

/// What an epoch is compressed with: the strongest level while there is time for it, faster ones the more epochs wait,
/// none when so many do that compressing would make it worse.
fn level(strongest: i32, idle: bool, waiting: usize) -> Option<i32> {
    match waiting {
        DEPTH.. => None,
        n if n > SHALLOW => Some(strongest.min(HASTY)),
        0 | 1 if idle => Some(strongest),
        _ => Some(strongest.min(QUICK)),
    }
}

struct Sealing {
    job: u64,
    last_write: Option<u64>,
    kind: Kind,
    flags: u32,
    reserved: u64,
    encoded: Option<Encoded>,
}

/// Epochs on their way into the journal.
#[derive(Default)]
pub struct Pipeline {
    queue: VecDeque<Sealing>,
    jobs: u64,
    reserved: u64,
    open_since: Option<u64>,
    /// Newest record sealed because somebody waits.
    committing: Lsn,
    /// When that was appended, until it is durable.
    committing_since: Option<u64>,
    /// How long the last one took to become durable, ns.
    commit_took: u64,
}

impl Pipeline {
    /// Journal bytes set aside for what is on its way.
    pub fn reserved(&self) -> u64 {
        self.reserved
    }
    /// Nothing is on its way.
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
    /// A write went into the open epoch.
    pub fn opened(&mut self, now: u64) {
        self.open_since.get_or_insert(now);
    }
    /// How long the last record that somebody waited for took to become durable, ns; at most [`LONG`].
    pub fn commit_takes(&self) -> u64 {
        self.commit_took
    }
    /// Everything up to here is durable.
    pub fn durable(&mut self, durable: Lsn, now: u64) {
        if durable >= self.committing
            && let Some(since) = self.committing_since.take()
        {
            self.commit_took = now.saturating_sub(since).min(LONG);
        }
    }
    /// Adds a record that carries no writes, for which so much of the journal was set aside; its number.
    pub fn note(&mut self, kind: Kind, flags: u32, payload: &[u8], reserved: u64) -> u64 {
        self.jobs += 1;
        let encoded = Some(encode_note(payload));
        let note = Sealing { job: self.jobs, last_write: None, kind, flags, reserved, encoded };
        // What opens a generation comes before everything.
        if flags & flags::OPENS != 0 {
            self.queue.push_front(note)
        } else {
            self.queue.push_back(note)
        }
        self.jobs
    }
    /// Sets journal bytes aside.
    pub fn reserve(&mut self, bytes: u64) {
        self.reserved += bytes;
    }
    /// Gives them back.
    pub fn release(&mut self, bytes: u64) {
        self.reserved -= bytes;
    }
}

impl Run {
    /// Closes, encodes and appends what is due; whether anything moved.
    pub(super) fn pump_sealing(&mut self) -> bool {
        let closed = self.close_epoch();
        let gathered = self.gather_epochs();
        closed | gathered | self.append_records()
    }

    fn close_epoch(&mut self) -> bool {
        let timing = self.cfg.timing;
        let draining = self.admin.is_draining() || self.is_retiring() || self.is_moving_over();
        let durable = self.journal.durable();
        let tail = self.journal.tail().last_write;
        let Part::Primary(p) = &mut self.part else { return false };
        let (first_wanted, last_wanted) = (p.first_wanted(), p.last_wanted());
        let Some(cache) = &mut p.cache else { return false };
        if !cache.has_open() {
            p.pipeline.open_since = None;
            return false;
        }
        let since = p.pipeline.open_since.unwrap_or(self.now.mono);
        let pending = p.pipeline.queue.len() + cache.closed();
        // While a commit is under way, what arrives joins the next one.
        let committing = p.pipeline.committing > durable
            || p.pipeline
                .queue
                .iter()
                .any(|s| s.last_write.is_some_and(|w| first_wanted.is_some_and(|f| f <= w)));
        let wanted = last_wanted.is_some_and(|w| w > tail) && !committing;
        let full = cache.open_bytes() >= timing.seal_bytes && pending < SHALLOW;
        // Not at once: the answer to the write goes out first.
        let foreseen = p.foresight.is_due() && !committing && pending == 0;
        let after = if foreseen { 1 } else { timing.seal_after };
        let old = self.now.mono >= since + after && pending < DEPTH;
        if wanted || full || old || draining {
            if foreseen {
                p.foresight.closed(cache.last_seq());
            }
            cache.close();
            p.pipeline.open_since = None;
            return true;
        }
        if pending < DEPTH {
            self.wake_at(since + after);
        }
        false
    }

    fn gather_epochs(&mut self) -> bool {
        let strongest = self.cfg.level;
        let idle = self.journal.in_flight() == 0;
        let mut moved = false;
        loop {
            moved |= self.gather_marks();
            let Part::Primary(p) = &mut self.part else { return false };
            let Some(cache) = &mut p.cache else { return false };
            if p.pipeline.queue.len() >= DEPTH {
                break;
            }
            let level = strongest.and_then(|l| level(l, idle, cache.closed() + p.pipeline.queue.len()));
            let Some(Gathered { job, last_seq, reserved }) = cache.gather(level) else { break };
            p.pipeline.jobs += 1;
            p.pipeline.reserved += reserved;
            let sealing = Sealing {
                job: p.pipeline.jobs,
                last_write: Some(last_seq),
                kind: Kind::Writes,
                flags: 0,
                reserved,
                encoded: None,
            };
            self.out.push(Action::Encode { token: Self::encode_token(sealing.job), job });
            p.pipeline.queue.push_back(sealing);
            self.marks.gathered();
            moved = true;
        }
        moved
    }

    /// An epoch is encoded.
    pub(super) fn encoded(&mut self, job: u64, encoded: Encoded) {
        if let Part::Primary(p) = &mut self.part
            && let Some(s) = p.pipeline.queue.iter_mut().find(|s| s.job == job)
        {
            s.encoded = Some(encoded);
        }
    }

    fn append_records(&mut self) -> bool {
        let mut moved = false;
        while self.journal.in_flight() < APPENDS {
            let Part::Primary(p) = &mut self.part else { break };
            if p.raising.is_some() {
                break;
            }
            let Some(len) =
                p.pipeline.queue.front().and_then(|s| s.encoded.as_ref()).map(Encoded::padded_len)
            else {
                break;
            };
            if !self.journal.fits(len) {
                p.starved = true;
                p.journal_full = true;
                break;
            }
            let s = p.pipeline.queue.pop_front().expect("just seen");
            p.pipeline.reserved -= s.reserved;
            self.append(s);
            moved = true;
        }
        moved
    }

    fn append(&mut self, s: Sealing) {
        let Part::Primary(p) = &mut self.part else { return };
        let tail = *self.journal.tail();
        let last_write = s.last_write.unwrap_or(tail.last_write);
        let wanted = p.first_wanted().is_some_and(|w| w <= last_write);
        let foreseen = s.last_write.is_some_and(|w| p.foresight.covers(w));
        let waited = wanted || foreseen || s.flags & flags::SYNC != 0;
        let stamp = Stamp {
            group: self.cfg.group,
            generation: self.meta.sb.generation,
            lsn: tail.point.lsn.next(),
            prev: tail.point.hash,
            time: self.now.wall.max(tail.time),
            flags: s.flags | if waited { flags::SYNC } else { 0 },
            last_write,
            durable: p.announced,
            kind: s.kind,
        };
        let record = seal(s.encoded.expect("only encoded epochs are appended"), stamp);
        let offset = self.journal.append(self.now, &record, waited, &mut self.disk);
        if p.is_draining() {
            self.backlog.push(&record, offset);
        }
        for (extent, _) in record.extents() {
            self.maps.mark(extent);
        }
        if waited {
            p.pipeline.committing = record.stamp.lsn;
            p.pipeline.committing_since = Some(self.now.mono);
        }
        self.marks.appended(&record, Some(s.job));
        let lsn = record.stamp.lsn;
        p.appended(tail_of(&record), self.now.mono);
        // By the own clock: the record's own time may be that of an earlier primary, whose clock was ahead.
        self.note_sample(lsn, self.now.wall);
        self.links.record_bytes += record.wire_len();
        self.feed.push(record, self.journal.written());
        if s.kind == Kind::SyncSet {
            self.changed_at(s.job, lsn);
        }
    }

    /// The way from a recovered journal to a primary that serves; whether anything moved.
    pub(super) fn open(&mut self) -> bool {
        let end = self.journal.tail().point.lsn;
        let checkpointed = self.links.checkpoint == end && self.checkpoint_idle();
        let asking = self.is_asking();
        if self.begin_drain() {
            self.open_generation();
            return true;
        }
        let Part::Primary(p) = &mut self.part else { return false };
        match p.stage {
            Stage::Redo if self.image.applied.point.lsn == end && self.image.is_idle() => {
                p.stage = Stage::Checkpoint;
                self.image.hurry = true;
                true
            }
            Stage::Checkpoint if checkpointed && !asking && !self.admin.is_promoting() => {
                self.open_generation();
                true
            }
            Stage::Opening(ticket) if self.meta.is_saved(ticket) => {
                self.open_journal();
                true
            }
            _ => false,
        }
    }

    /// A node that gives its place up opens one, too, if its cache holds something: a record that was on its way
    /// when the process died may be elsewhere, so no other record of its generation may take that LSN.
    fn open_generation(&mut self) {
        let tail = *self.journal.tail();
        let retiring = self.is_retiring();
        let sb = &self.meta.sb;
        let term = if retiring { sb.generation.term } else { sb.term };
        let id = RingId { group: sb.group, boot: self.cfg.boot, term };
        let live = !sb.clean && sb.cache_boot == self.cfg.boot && sb.cache_boot != BootId::default();
        let Some(memory) = self.ring.take() else {
            return self.fail("there is no memory for the write cache: this node can't be a primary".into());
        };
        let ring = match Ring::open(memory, id, tail.last_write) {
            RingState::Ours(ring) if live && !(retiring && ring.last_seq() == ring.freed_seq()) => ring,
            RingState::Ours(ring) if retiring => return self.nothing_left(ring.into_memory(), &tail),
            RingState::Foreign(memory) if retiring => {
                if live {
                    let text = "the write cache is missing: what it held is not in the journal, nor will it be in a \
                                salvage file";
                    self.log(Level::Error, text);
                }
                return self.nothing_left(memory, &tail);
            }
            RingState::Foreign(_) if live && !self.cfg.accept_lost_cache => {
                return self.fail(
                    "the write cache is missing, but this machine has not rebooted since it was in use: \
                     acknowledged writes may be lost. Put the cache file back, or start with \
                     --accept-lost-cache to go on with what is in the journal"
                        .into(),
                );
            }
            RingState::Ours(ring) => Ring::format(ring.into_memory(), id, tail.last_write),
            RingState::Foreign(memory) => Ring::format(memory, id, tail.last_write),
        };
        let Part::Primary(p) = &mut self.part else { return };
        p.begin_at(&tail, self.meta.sb.sync_set.is_empty());
        p.cache = Some(Cache::new(ring));
        let sb = &mut self.meta.sb;
        sb.role = Role::Primary;
        sb.cut = None;
        let first = !sb.openings.iter().any(|o| o.generation.term == term);
        sb.generation = role::next_generation(&sb.openings, term, self.cfg.salt);
        role::note_opening(&mut sb.openings, sb.generation, tail.point);
        let promoted = first && tail.point.lsn > Lsn(0);
        if promoted && self.maps.ranges().last().is_some_and(|r| r.from != tail.point) {
            // Whoever goes on from here under another term is told exactly what has changed since.
            self.maps.rotate(tail.point);
        }
        sb.cache_boot = self.cfg.boot;
        sb.clean = false;
        sb.floor = sb.floor.max(tail.point.lsn);
        p.stage = Stage::Opening(self.meta.save(true));
    }

    /// A node that gives its place up has nothing to write any more.
    fn nothing_left(&mut self, ring: Box<dyn Memory>, tail: &Tail) {
        self.ring = Some(ring);
        if let Part::Primary(p) = &mut self.part {
            p.begin_at(tail, true);
            p.stage = Stage::Settling(tail.point.lsn);
        }
    }

    /// Another primary gives way to this one: the term rises above both.
    pub(super) fn raise_over(&mut self, link: LinkId, other: Term) {
        let serving =
            matches!(&self.part, Part::Primary(p) if p.is_serving() && p.raising.is_none() && !p.closing);
        self.send(link, refuse("the term is being raised above both: try again"));
        self.drop_link(link, "it gives way: the term is raised");
        if !serving || self.is_retiring() || self.moving.is_some() {
            return;
        }
        self.close_links("the term is raised");
        if let Part::Primary(p) = &mut self.part {
            p.raising = Some(Raising::Above(other));
        }
    }

    /// A term above another primary's is on its way, and not durable.
    pub(super) fn is_raising(&self) -> bool {
        matches!(&self.part, Part::Primary(p) if p.raising.is_some())
    }

    /// The new generation begins at a record that is durable.
    fn raise(&mut self, other: Term) -> bool {
        let tail = *self.journal.tail();
        if !self.journal.is_quiet() {
            self.journal.want(tail.point.lsn);
            return false;
        }
        let sb = &mut self.meta.sb;
        let seen = Term { counter: sb.term.counter.max(other.counter), node: sb.node };
        sb.term = role::next_term(seen, sb.node);
        sb.generation = role::next_generation(&sb.openings, sb.term, self.cfg.salt);
        role::note_opening(&mut sb.openings, sb.generation, tail.point);
        sb.floor = sb.floor.max(tail.point.lsn);
        let (counter, ticket) = (sb.term.counter, self.meta.save(true));
        if let Part::Primary(p) = &mut self.part {
            p.raising = Some(Raising::Saving(ticket));
        }
        self.log(Level::Warn, format!("the term is raised to {counter}"));
        true
    }

    /// Goes on under the new term once it is durable.
    pub(super) fn pump_raise(&mut self) -> bool {
        let members: Vec<u8> = self.meta.sb.sync_set.iter().flat_map(|n| n.0.to_le_bytes()).collect();
        let retiring = self.is_retiring();
        let Part::Primary(p) = &mut self.part else { return false };
        match p.raising {
            None => return false,
            Some(Raising::Above(_)) if retiring => {
                p.raising = None;
                return true;
            }
            Some(Raising::Above(other)) => return self.raise(other),
            Some(Raising::Saving(ticket)) if !self.meta.is_saved(ticket) => return false,
            Some(Raising::Saving(_)) => {}
        }
        p.raising = None;
        let (generation, after) = (self.meta.sb.generation, self.journal.tail().point.lsn);
        p.pipeline.note(Kind::SyncSet, flags::OPENS | flags::SYNC, &members, 0);
        self.tell_generation(generation, after);
        true
    }

    fn open_journal(&mut self) {
        let members: Vec<u8> = self.meta.sb.sync_set.iter().flat_map(|n| n.0.to_le_bytes()).collect();
        let end = self.journal.tail().point.lsn;
        let Part::Primary(p) = &mut self.part else { return };
        let Some(cache) = &mut p.cache else { return };
        let leftover = cache.last_seq() - cache.freed_seq();
        p.pipeline.note(Kind::SyncSet, flags::OPENS | flags::SYNC, &members, 0);
        cache.close();
        let last = Lsn(end.0 + 1 + cache.closed() as u64);
        p.stage = Stage::Settling(last);
        self.journal.want(last);
        let generation = self.meta.sb.generation;
        self.tell_generation(generation, end);
        let start = generation.count();
        self.log(
            Level::Info,
            format!("serving after LSN {end}, start {start} of the term; {leftover} writes taken up from the cache"),
        );
    }
}

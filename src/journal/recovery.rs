//! Finding the end of the journal after a crash, and whether that end can be trusted.
//!
//! Reads every segment's header, walks the chain from the checkpoint on, looks past the first gap
//! for records that survived, decides by [`decide`], erases what lies behind the end, syncs.
//!
//! Owns: the decision table. Invariants: nothing that was ever announced durable is cut off in
//! silence: that is damage, and recovery stops; what may have been written behind the end is gone, durably, before
//! anything is appended, so it can't come back.

use super::cursor::{CHUNK, Cursor, Place, Step};
use super::{Segment, Tail, tail_of};
use crate::disk::{DiskOp, DiskRequest, DiskResult, File, IoError, Token, aligned, freeze};
use crate::format::message::Role;
use crate::format::record::{Header, Record};
use crate::format::segment::SegmentHeader;
use crate::format::superblock::Superblock;
use crate::units::{BLOCK, Hash, HistoryPoint, Lsn};
use bytes::Bytes;
use std::collections::BTreeMap;

/// Bytes behind a gap that may hold records that survived: more than a node ever has unsynced.
pub const SURVIVORS: u64 = 128 << 20;

/// What recovery found out before it decides.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    /// The walk found the segment that the superblock names, continuing into it.
    pub start_found: bool,
    /// Nothing in it was ever promised: checkpoint and floor are its base.
    pub fresh: bool,
    /// The record at the checkpoint, if the walk met it, is the one that the superblock names.
    pub checkpoint_matches: bool,
    /// The chain reaches the superblock's floor and the checkpoint.
    pub reaches_floor: bool,
    /// A record that this generation wrote says that something behind the end was durable.
    pub denied_by_watermark: bool,
    /// Records lie behind the end.
    pub survivors: bool,
    /// The journal was closed cleanly at its end.
    pub clean: bool,
    /// It began anew and has not gone round since: what lies behind its end may be of the one before.
    pub reused: bool,
}

/// What to do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Go on at the end of the chain.
    Continue,
    /// The end is torn: erase what lies behind it, then go on.
    Cut,
    /// Records that were durable are gone: stop.
    Damaged(&'static str),
}

/// The decision table; its test enumerates every combination of facts.
pub fn decide(f: Facts) -> Decision {
    use Decision::{Continue, Cut, Damaged};
    match f {
        Facts { start_found: false, fresh: false, .. } => {
            Damaged("the segment in which redo starts is missing or unreadable")
        }
        Facts { checkpoint_matches: false, .. } => Damaged(
            "its record at the checkpoint is not the superblock's: the two files do not belong together",
        ),
        Facts { reaches_floor: false, .. } => {
            Damaged("the journal ends before a record that was durable here")
        }
        Facts { denied_by_watermark: true, .. } => {
            Damaged("a record is unreadable that a later one names as durable")
        }
        Facts { survivors: true, clean: true, reused: false, .. } => {
            Damaged("records lie behind the end of a journal that was closed cleanly")
        }
        Facts { survivors: true, .. } => Cut,
        Facts { .. } => Continue,
    }
}

/// The outcome of a recovery.
#[derive(Debug)]
pub enum Outcome {
    /// The journal's end, and what it retains.
    Found(Box<Recovered>),
    /// Recovery stopped. What happened and what to do.
    Stopped(String),
    /// The chain hash at the point that [`Recovery::compare`] asked for differs, or the point is not
    /// here. Nothing was changed.
    Differs,
}

/// What [`super::Journal::new`] needs.
#[derive(Debug)]
pub struct Recovered {
    /// Where the next record goes.
    pub head: Place,
    /// Retained segments, oldest first.
    pub segments: Vec<Segment>,
    /// Newest record.
    pub tail: Tail,
    /// When the record at the checkpoint was sealed.
    pub checkpoint_time: u64,
    /// Records cut off.
    pub cut: u64,
}

enum State {
    Headers {
        next: u32,
        waiting: u32,
    },
    Walk(Cursor),
    /// The next place to read, the last segment, and what is being read.
    Survivors {
        at: Place,
        until: u64,
        reading: BTreeMap<u64, Place>,
    },
    Erase {
        waiting: usize,
    },
    Sync,
    Done,
}

/// See the module's documentation.
pub struct Recovery {
    owner: u8,
    sb: Superblock,
    /// Stop at this point, which must be in the chain, and erase everything behind it.
    target: Option<HistoryPoint>,
    state: State,
    headers: BTreeMap<u64, SegmentHeader>,
    /// A segment's header could not be read.
    unread: Option<IoError>,
    start_found: bool,
    checkpoint_matches: bool,
    tail: Tail,
    checkpoint_time: u64,
    end: Place,
    behind: Vec<Place>,
    watermark: Lsn,
}

/// Told of a record, and where in the file it lies.
type Seen<'a> = &'a mut dyn FnMut(&Record, u64);

/// Reads behind the end of the chain at a time.
const AHEAD: usize = 4;
/// Segment headers read at a time.
const BATCH: u32 = 64;

impl Recovery {
    /// Finds the end of the journal that `sb` describes. `origin` is the chain hash before LSN 1.
    pub fn new(owner: u8, sb: &Superblock, origin: Hash) -> Recovery {
        let mut point = sb.checkpoint;
        if point.lsn == Lsn(0) {
            point.hash = origin;
        }
        let mut tail = Tail {
            point,
            generation: sb.checkpoint_generation,
            last_write: sb.checkpoint_write,
            time: 0,
            durable: Lsn(0),
        };
        if sb.checkpoint.lsn == sb.base.point.lsn {
            // There may be no segment yet that tells.
            tail.time = sb.base.time;
        }
        Recovery {
            owner,
            sb: sb.clone(),
            target: None,
            state: State::Headers { next: 0, waiting: 0 },
            headers: BTreeMap::new(),
            unread: None,
            start_found: false,
            checkpoint_matches: true,
            checkpoint_time: tail.time,
            tail,
            end: Place { segment: sb.checkpoint_segment, offset: 0 },
            behind: Vec::new(),
            watermark: Lsn(0),
        }
    }

    /// Cuts the journal back to `target`, if its chain has that very point at or after the checkpoint.
    pub fn compare(owner: u8, sb: &Superblock, origin: Hash, target: HistoryPoint) -> Recovery {
        Recovery { target: Some(target), ..Recovery::new(owner, sb, origin) }
    }

    /// Begins.
    pub fn start(&mut self, out: &mut Vec<DiskRequest>) {
        self.read_headers(out);
    }

    fn ask(&self, id: u64, op: DiskOp, out: &mut Vec<DiskRequest>) {
        out.push(DiskRequest { token: Token::new(self.owner, id), file: File::Journal, op });
    }

    fn read_headers(&mut self, out: &mut Vec<DiskRequest>) {
        let State::Headers { next, .. } = self.state else { return };
        let g = self.sb.geometry;
        let end = (next + BATCH).min(g.segments);
        for index in next..end {
            let offset = u64::from(index) * g.segment;
            self.ask(u64::from(index), DiskOp::Read { offset, len: BLOCK as usize }, out);
        }
        self.state = State::Headers { next: end, waiting: end - next };
    }

    /// The answer to one of its requests. `seen` is told every record after the checkpoint that
    /// stays, in order, and where in the file it lies.
    pub fn complete(
        &mut self,
        id: u64,
        result: DiskResult,
        seen: Seen,
        out: &mut Vec<DiskRequest>,
    ) -> Option<Outcome> {
        let bytes = match result {
            Ok(bytes) => bytes,
            // A segment that holds nothing needed may be unreadable; one that is needed will be missed.
            Err(e) if matches!(self.state, State::Headers { .. }) => {
                self.unread = Some(e);
                Bytes::new()
            }
            Err(e) => {
                self.state = State::Done;
                return Some(Outcome::Stopped(unreadable(e)));
            }
        };
        match &mut self.state {
            State::Headers { waiting, .. } => {
                *waiting -= 1;
                let more = *waiting > 0;
                self.note_header(id, &bytes);
                if !more { self.headers_read(seen, out) } else { None }
            }
            State::Walk(cursor) => {
                cursor.feed(bytes);
                self.walk(seen, out)
            }
            State::Survivors { reading, .. } => {
                let place = reading.remove(&id).expect("one answer to each read");
                self.search(place, &bytes);
                self.search_on(out)
            }
            State::Erase { waiting } => {
                *waiting -= 1;
                if *waiting == 0 {
                    self.state = State::Sync;
                    self.ask(0, DiskOp::Sync, out);
                }
                None
            }
            State::Sync => Some(self.found()),
            State::Done => None,
        }
    }

    fn note_header(&mut self, index: u64, block: &Bytes) {
        let Ok(header) = SegmentHeader::decode(block) else { return };
        let here = header.sequence % u64::from(self.sb.geometry.segments) == index;
        if here && header.group == self.sb.group {
            self.headers.insert(header.sequence, header);
        }
    }

    fn headers_read(&mut self, seen: Seen, out: &mut Vec<DiskRequest>) -> Option<Outcome> {
        if matches!(self.state, State::Headers { next, .. } if next < self.sb.geometry.segments) {
            self.read_headers(out);
            return None;
        }
        let first = self.first_segment();
        let header = self.headers.get(&first).copied();
        let before = match header.filter(|h| h.before.lsn <= self.sb.checkpoint.lsn) {
            Some(h) => {
                self.start_found = true;
                self.check_checkpoint(h.before, h.time);
                // The walk begins at the segment's own start and must pass the checkpoint.
                self.tail = Tail {
                    point: h.before,
                    generation: h.generation,
                    last_write: h.last_write,
                    time: h.time,
                    durable: Lsn(0),
                };
                h.before
            }
            // Nothing was ever written; or the journal is not there.
            None => self.tail.point,
        };
        self.state = State::Walk(Cursor::new(self.sb.geometry, self.sb.group, first, before));
        self.walk(seen, out)
    }

    /// Where the walk to the checkpoint begins. Normally the segment that the superblock names. It may
    /// have been opened by a record that was never durable: then the checkpoint is the end of the one
    /// before. Or it ended with the checkpoint and was overwritten since: then the next one begins there.
    fn first_segment(&self) -> u64 {
        let (named, checkpoint) = (self.sb.checkpoint_segment, self.sb.checkpoint);
        let header = |s: u64| self.headers.get(&s);
        let leads = |s: u64| header(s).is_some_and(|h| h.before.lsn <= checkpoint.lsn);
        if leads(named) {
            named
        } else if header(named + 1).is_some_and(|h| h.before == checkpoint) {
            named + 1
        } else if named > self.sb.base_segment && leads(named - 1) {
            named - 1
        } else {
            named
        }
    }

    fn walk(&mut self, seen: Seen, out: &mut Vec<DiskRequest>) -> Option<Outcome> {
        loop {
            let State::Walk(cursor) = &mut self.state else { return None };
            if self.target.is_some_and(|t| t.lsn == self.tail.point.lsn) {
                let place = self.end;
                return self.gap(place, out);
            }
            match cursor.step(None) {
                Step::Read(op) => {
                    self.ask(0, op, out);
                    return None;
                }
                Step::Record(record, place) => {
                    self.start_found = true;
                    self.check_checkpoint(record.point(), record.stamp.time);
                    self.tail = tail_of(&record);
                    self.end = Place { offset: place.offset + record.padded_len(), ..place };
                    if record.stamp.lsn > self.sb.checkpoint.lsn {
                        seen(&record, place.file_offset(self.sb.geometry));
                    }
                }
                Step::Gap(place) => return self.gap(place, out),
            }
        }
    }

    fn check_checkpoint(&mut self, met: HistoryPoint, time: u64) {
        if met.lsn <= self.sb.checkpoint.lsn {
            self.checkpoint_time = time;
        }
        // At LSN 0 the superblock may name no hash: the walk's own origin stands there.
        let same = met.lsn != self.sb.checkpoint.lsn || met.lsn == Lsn(0) || met == self.sb.checkpoint;
        self.checkpoint_matches &= same;
    }

    /// The chain ends at `place`.
    fn gap(&mut self, place: Place, out: &mut Vec<DiskRequest>) -> Option<Outcome> {
        if self.target.is_some_and(|t| t != self.tail.point) {
            self.state = State::Done;
            // What can't be read proves nothing.
            return Some(self.unread.map_or(Outcome::Differs, |e| Outcome::Stopped(unreadable(e))));
        }
        self.end = place;
        let g = self.sb.geometry;
        let window = (SURVIVORS.div_ceil(g.segment) + 1).min(u64::from(g.segments) - 1);
        // Erasing on a cut goes on to the newest segment; a torn tail can't reach further than the window. A journal that is
        // closed cleanly ends at the superblock's floor, and nothing was written since: a chain that ends before that is
        // damaged whatever lies behind, and a segment that was opened later shows by its header.
        let newest = self.headers.last_key_value().map_or(0, |(s, _)| *s);
        let until = match self.target {
            Some(_) => newest.max(place.segment),
            None if self.sb.clean => place.segment,
            None => place.segment + window,
        };
        let later = self.headers.range(place.segment + 1..).map(|(s, _)| Place { segment: *s, offset: 0 });
        self.behind.extend(later);
        self.state = State::Survivors { at: place, until, reading: BTreeMap::new() };
        self.search_on(out)
    }

    fn search_on(&mut self, out: &mut Vec<DiskRequest>) -> Option<Outcome> {
        let (g, owner) = (self.sb.geometry, self.owner);
        let State::Survivors { at, until, reading } = &mut self.state else { return None };
        while reading.len() < AHEAD {
            if at.offset >= g.segment {
                *at = Place { segment: at.segment + 1, offset: 0 };
            }
            if at.segment > *until {
                break;
            }
            let len = (g.segment - at.offset).min(CHUNK);
            let (id, op) =
                (at.file_offset(g) / BLOCK, DiskOp::Read { offset: at.file_offset(g), len: len as usize });
            reading.insert(id, *at);
            at.offset += len;
            out.push(DiskRequest { token: Token::new(owner, id), file: File::Journal, op });
        }
        if reading.is_empty() { self.judge(out) } else { None }
    }

    fn search(&mut self, place: Place, bytes: &Bytes) {
        for (i, block) in bytes.chunks_exact(BLOCK as usize).enumerate() {
            let Ok(h) = Header::decode(block) else { continue };
            if h.stamp.group != self.sb.group || h.stamp.lsn <= self.tail.point.lsn {
                continue;
            }
            self.behind.push(Place { offset: place.offset + i as u64 * BLOCK, ..place });
            // Only what this node's own latest run wrote says what was durable here.
            if h.stamp.generation == self.sb.generation && h.stamp.generation.term.node == self.sb.node {
                self.watermark = self.watermark.max(h.stamp.durable);
            }
        }
    }

    fn judge(&mut self, out: &mut Vec<DiskRequest>) -> Option<Outcome> {
        let (end, base) = (self.tail.point.lsn, self.sb.base.point.lsn);
        let lap = self.sb.base_segment + u64::from(self.sb.geometry.segments);
        let facts = Facts {
            start_found: self.start_found,
            fresh: self.sb.checkpoint.lsn == base && self.sb.floor <= base,
            checkpoint_matches: self.checkpoint_matches,
            reaches_floor: end >= self.sb.floor && end >= self.sb.checkpoint.lsn,
            denied_by_watermark: self.watermark > end,
            survivors: !self.behind.is_empty(),
            clean: self.sb.clean,
            reused: self.sb.base_segment > 1 && self.end.segment < lap,
        };
        let decision = if self.target.is_some() { Decision::Cut } else { decide(facts) };
        match decision {
            // What a killed process had written may not be durable yet, and everything found here is
            // announced as durable from now on.
            Decision::Continue => {
                self.state = State::Sync;
                self.ask(0, DiskOp::Sync, out);
                None
            }
            Decision::Cut => {
                self.erase(out);
                None
            }
            Decision::Damaged(why) => {
                self.state = State::Done;
                let advice = match self.sb.role {
                    Role::Primary => {
                        "If a shadow holds later records, promote it; keep this journal for analysis"
                    }
                    Role::Shadow => {
                        "Do not promote this node; keep the journal for analysis and join it anew"
                    }
                };
                Some(Outcome::Stopped(format!(
                    "the journal is damaged: {why} (it ends at LSN {end}, segment {}, byte {}). Nothing was \
                     changed. {advice}",
                    self.end.segment, self.end.offset
                )))
            }
        }
    }

    fn erase(&mut self, out: &mut Vec<DiskRequest>) {
        let mut blank = aligned(BLOCK as usize);
        blank.resize(BLOCK as usize, 0);
        let blank = freeze(blank);
        self.behind.push(self.end);
        self.behind.retain(|p| p.offset < self.sb.geometry.segment);
        // A torn record's header may have survived at the very end: one write for each place.
        self.behind.sort_unstable();
        self.behind.dedup();
        for place in &self.behind {
            let offset = place.file_offset(self.sb.geometry);
            self.ask(0, DiskOp::Write { offset, data: blank.clone(), dsync: false }, out);
        }
        self.state = State::Erase { waiting: self.behind.len() };
        if self.behind.is_empty() {
            self.state = State::Sync;
            self.ask(0, DiskOp::Sync, out);
        }
    }

    fn found(&mut self) -> Outcome {
        self.state = State::Done;
        let end = self.end;
        let mut segments = Vec::new();
        let mut sequence = if end.offset == 0 { end.segment - 1 } else { end.segment };
        // What lies before the base is of another history.
        while sequence >= self.sb.base_segment
            && let Some(header) = self.headers.get(&sequence)
        {
            let SegmentHeader { before, generation, last_write, time, .. } = *header;
            segments.push(Segment { sequence, before, generation, last_write, time });
            sequence -= 1;
        }
        segments.reverse();
        let cut = self.behind.len() as u64;
        let checkpoint_time = self.checkpoint_time;
        Outcome::Found(Box::new(Recovered { head: end, segments, tail: self.tail, checkpoint_time, cut }))
    }
}

fn unreadable(e: IoError) -> String {
    format!("reading the journal failed: {e}. Check the disk that holds it; nothing was changed")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every combination of facts, and the only safe answer to it.
    #[test]
    fn the_table_answers_every_combination() {
        let mut answers = [0; 3];
        for bits in 0..256u32 {
            let bit = |i: u32| bits >> i & 1 == 1;
            let f = Facts {
                start_found: bit(0),
                fresh: bit(1),
                reaches_floor: bit(2),
                denied_by_watermark: bit(3),
                survivors: bit(4),
                clean: bit(5),
                checkpoint_matches: bit(6),
                reused: bit(7),
            };
            let lost_start = !f.start_found && !f.fresh;
            let safe = !lost_start && f.checkpoint_matches && f.reaches_floor && !f.denied_by_watermark;
            match decide(f) {
                Decision::Damaged(_) => {
                    assert!(!safe || (f.survivors && f.clean && !f.reused), "{f:?}");
                    answers[0] += 1;
                }
                Decision::Cut => {
                    assert!(safe && f.survivors && (!f.clean || f.reused), "{f:?}");
                    answers[1] += 1;
                }
                Decision::Continue => {
                    assert!(safe && !f.survivors, "{f:?}");
                    answers[2] += 1;
                }
            }
        }
        assert_eq!(answers.iter().sum::<i32>(), 256);
        assert!(answers.iter().all(|n| *n > 0));
    }
}

//! What the checks learn by looking at every write to a journal or superblock and at every message.
//!
//! Owns: per host, the facts that outlive its process: the records in its journal, what it claimed.
//! Invariant: nothing here changes what the node sees.

use crate::world::{Outcome, Violation, World, broken};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::ops::Range;
use volrep::disk::File;
use volrep::format::mapped::Owner;
use volrep::format::message::{Message, Role};
use volrep::format::record::{Header, Record, padded};
use volrep::format::superblock::{ResyncStage, Retired, SLOT, Superblock};
use volrep::journal::maps::Maps;
use volrep::units::{Address, Extent, Hash, HistoryPoint, NodeId, Term};

/// What is known of a host.
#[derive(Clone)]
pub struct Watch {
    /// The record that was last written at each LSN.
    pub journal: BTreeMap<u64, Hash>,
    /// Where in the journal file, and how long.
    places: BTreeMap<u64, (usize, usize)>,
    /// A disk fault was delivered to this process.
    pub faulted: bool,
    /// A failed write or sync of journal or superblock was delivered to this process.
    pub latched: bool,
    /// It is being stopped on purpose.
    pub stopping: bool,
    /// Highest term of another node that this process was told of.
    pub heard_term: u64,
    /// An administrator has said whom it follows.
    chose: bool,
    /// Term under which it last opened a generation of its own.
    pub acting_term: u64,
    /// Highest point that it ever said it had applied.
    pub applied: Option<HistoryPoint>,
    /// Highest LSN that it claimed durable and that was checked.
    claimed: u64,
    term: Term,
    /// Who it is, as its superblock says: primary, by which term, handed over to whom, giving up what.
    place: Option<Standing>,
    said_applied: u64,
    /// By an administrator's word it gives up what its next primary does not hold.
    rewinds: bool,
    base_segment: u64,
    stage: Option<ResyncStage>,
    consistent: bool,
    /// An administrator gave its old image up.
    pub in_place: bool,
    /// The record at which its usable image stands.
    shown: u64,
    /// The lowest term that either slot has durably.
    pub safe_term: Term,
    /// A failed write that no node survives was told to this process.
    pub must_fail: bool,
    /// What the primary last told of its journal's end: which process, at which node.
    pub heard_tail: Option<crate::late::Heard>,
    /// When it last heard anything of it.
    pub heard_at: u64,
    /// What it knew of it when it first told so of the primary's journal.
    pub passed_on: BTreeMap<u64, crate::late::Heard>,
    /// Its last state.
    pub state: Option<String>,
    /// It was promoted after it had heard of another promoted node, and may have given up what that one does not hold.
    pub second: bool,
    /// As of which record it was promoted.
    pub cut: Option<HistoryPoint>,
    /// Its process was to die while this superblock was written, by number of the process: the next one loses power.
    pub slot_ambushed: Option<u32>,
    /// The incarnation that was told to detach, and what its backing has to have then.
    pub detaching: Option<(u32, u64)>,
    /// When each record came.
    pub received: BTreeMap<u64, u64>,
    /// When its process began.
    pub booted_at: u64,
    /// Up to here it did not hold its image back, as it said.
    pub undelayed: u64,
    /// It does not now.
    pub lifted: bool,
    /// Members of the sync set, as either slot durably says.
    pub named: Vec<NodeId>,
    /// When its process was last gone, by the model's clock.
    pub down: u64,
    /// Until when its process may acknowledge anything.
    pub lease: Option<u64>,
}

impl Default for Watch {
    fn default() -> Watch {
        Watch {
            journal: BTreeMap::new(),
            places: BTreeMap::new(),
            faulted: false,
            latched: false,
            stopping: false,
            heard_term: 0,
            chose: false,
            acting_term: 0,
            applied: None,
            claimed: 0,
            term: Term::default(),
            place: None,
            said_applied: 0,
            rewinds: false,
            base_segment: 1,
            stage: None,
            consistent: true,
            in_place: false,
            shown: 0,
            safe_term: Term::default(),
            must_fail: false,
            heard_tail: None,
            heard_at: 0,
            passed_on: BTreeMap::new(),
            state: None,
            second: false,
            cut: None,
            slot_ambushed: None,
            detaching: None,
            received: BTreeMap::new(),
            booted_at: 0,
            undelayed: 0,
            lifted: false,
            named: Vec::new(),
            down: 0,
            lease: None,
        }
    }
}

impl Watch {
    /// A new process.
    pub fn booted(&mut self, now: u64) {
        self.booted_at = now;
        (self.faulted, self.latched, self.stopping, self.must_fail) = (false, false, false, false);
        (self.said_applied, self.heard_tail, self.lease) = (0, None, None);
        self.passed_on.clear();
    }
    /// What it claimed after `lsn` is given up.
    pub fn unclaim(&mut self, lsn: u64) {
        self.claimed = self.claimed.min(lsn);
    }
    /// Highest LSN that it claimed durable in its present history.
    pub fn claimed(&self) -> u64 {
        self.claimed
    }
    /// The term that its superblock was last told of.
    pub fn term(&self) -> Term {
        self.term
    }
    /// Its superblock was last told that it is the primary.
    pub fn is_primary(&self) -> bool {
        self.place.is_some_and(|(role, ..)| role == Role::Primary)
    }
    /// What it had applied is given up, by an administrator's word.
    pub fn give_up(&mut self) {
        (self.applied, self.said_applied) = (None, 0);
        // Until its superblock says so itself, it may still tell of what it holds.
        (self.chose, self.rewinds) = (true, true);
    }
    /// A disk fault was delivered.
    pub fn failed(&mut self, file: File, kind: u8) {
        if matches!(file, File::Stage(_) | File::StageMap) && kind != 0 {
            return; // only what was being made is lost
        }
        self.faulted = true;
        self.must_fail |= kind != 0;
        self.latched |= kind != 0 && matches!(file, File::Journal | File::Superblock);
    }
    /// A message was delivered.
    pub fn heard(&mut self, message: &Message) {
        if let Message::Hello { identity, .. } | Message::Welcome { identity, .. } = message {
            self.heard_term = self.heard_term.max(identity.term.counter);
        }
    }
    /// Its superblock says that it has handed its place as primary over.
    pub fn handed(&self) -> bool {
        self.place.is_some_and(|(_, _, handed, _)| handed.is_some())
    }
    /// What its superblock says that it is.
    pub fn role(&self) -> Option<Role> {
        self.place.map(|(role, ..)| role)
    }
    /// The chain hash of an LSN in its journal.
    pub fn at(&self, lsn: u64, origin: Hash) -> Option<Hash> {
        if lsn == 0 { Some(origin) } else { self.journal.get(&lsn).copied() }
    }
}

impl crate::world::Host {
    /// Whether that record of its journal would outlive a power cut; `None`: it was overwritten since.
    pub fn is_durable(&self, lsn: u64) -> Option<bool> {
        let (at, len) = self.watch.places.get(&lsn)?;
        let live = self.disk.part(File::Journal, *at + 160..*at + 192);
        if self.watch.journal.get(&lsn).is_none_or(|chain| *live != chain.0) {
            return Some(false); // on its way
        }
        let same = |range: Range<usize>| {
            self.disk.part(File::Journal, range.clone()) == self.disk.durable(File::Journal, range)
        };
        Some(same(*at..*at + 192) && same(at + len - 512..at + len))
    }
}

type Standing = (Role, Term, Option<NodeId>, Option<Retired>);

/// The record at which the usable image stands.
fn shown(s: &Superblock) -> u64 {
    let old = s.resync.as_ref().and_then(|r| r.old.as_ref());
    old.map_or(s.checkpoint.lsn.0, |o| o.at.point.lsn.0)
}

impl World {
    /// A write to a journal.
    pub fn watch_journal(&mut self, node: usize, offset: u64, data: &Bytes) -> Outcome {
        let mut at = 0;
        while at < data.len() {
            if let Some(header) = self.watch_written(node, data.slice(at..))? {
                self.watch_append(node, offset as usize + at, &header)?;
                at += padded(header.len);
            } else {
                let here = offset as usize + at;
                let watch = &mut self.hosts[node].watch;
                // Its end is cut off: what the primary has lost. (Records up to the checkpoint are recycled.)
                let mut newest = watch.places.range(watch.shown + 1..);
                if let Some((lsn, _)) = newest.find(|(_, (place, len))| (*place..place + len).contains(&here))
                {
                    watch.claimed = watch.claimed.min(lsn - 1);
                }
                at += 4096;
            }
        }
        Ok(())
    }

    /// The record at the start of what is written, if a whole one is there.
    fn watch_written(&mut self, node: usize, data: Bytes) -> Result<Option<Header>, Violation> {
        let header = data.starts_with(b"VREC").then(|| Header::decode(&data).ok()).flatten();
        let Some(header) = header.filter(|h| h.len <= data.len()) else { return Ok(None) };
        // A payload that was looked at when the record was sealed is looked at again now and then: that takes its time.
        if self.history.knows(header.chain) && !header.stamp.lsn.0.is_multiple_of(4) {
            return Ok(Some(header));
        }
        let Ok(record) = Record::decode(data) else { return Ok(None) };
        self.watch_record(node, &record)?;
        Ok(Some(header))
    }

    fn watch_append(&mut self, node: usize, place: usize, record: &Header) -> Outcome {
        let lsn = record.stamp.lsn.0;
        let watch = &mut self.hosts[node].watch;
        self.counts.check("I7");
        if watch.at(lsn - 1, self.history.origin) != Some(record.stamp.prev) {
            return broken("I7", format!("record {lsn} is appended behind another history"));
        }
        watch.claimed = watch.claimed.min(lsn - 1);
        watch.journal.insert(lsn, record.chain);
        let end = place + padded(record.len);
        watch.places.retain(|_, (at, len)| *at + *len <= place || end <= *at); // recycled
        watch.places.insert(lsn, (place, end - place));
        watch.received.insert(lsn, self.now);
        Ok(())
    }

    fn watch_record(&mut self, node: usize, record: &Record) -> Outcome {
        if self.history.knows(record.chain) {
            return Ok(());
        }
        self.counts.check("I2");
        let sealer = self.hosts[node].id;
        let lsn = record.stamp.lsn.0;
        self.sealed.note(record.chain, self.now, node, self.hosts[node].incarnation);
        self.check_term(node, record.stamp.generation.term, "I7", "seals")?;
        self.trace.note(
            self.now,
            node,
            "sealed",
            [lsn, record.wire().len() as u64, record.stamp.flags.into()],
        );
        let entered = self.history.enter(record, sealer, &self.model);
        entered.or_else(|(invariant, text)| broken(invariant, text))
    }

    /// A write of a superblock slot.
    pub fn watch_superblock(&mut self, node: usize, data: &Bytes) -> Outcome {
        let Ok(s) = Superblock::decode(data) else {
            return broken("contract", "a superblock slot that does not decode");
        };
        self.counts.check("I7");
        let text =
            format!("{:?} term {:?} checkpoint {} clean {}", s.role, s.term, s.checkpoint.lsn, s.clean);
        self.trace.say(self.now, node, "slot", &text);
        self.slot_step(node);
        let host = &mut self.hosts[node];
        let watch = &mut host.watch;
        // Of two promotions under one counter an administrator may choose either.
        let chosen = watch.chose && s.term.counter == watch.term.counter;
        if s.term < watch.term && !chosen {
            return broken("I7", format!("the term falls from {:?} to {:?}", watch.term, s.term));
        }
        watch.term = s.term;
        let place = (s.role, s.term, s.handed, s.retired);
        let before = watch.place.replace(place);
        let moved = before.is_some_and(|before| before != place);
        let raised = before.is_some_and(|(role, term, ..)| {
            (role, s.role) == (Role::Primary, Role::Primary) && term != s.term && s.term.node == host.id
        });
        if before.is_some_and(|(role, ..)| role == Role::Shadow) && s.role == Role::Primary {
            watch.second = s.term.counter > 2 && self.plan.promotion.is_some();
        }
        if before.is_some_and(|(role, ..)| role == Role::Primary) && s.role == Role::Shadow {
            // What it wrote itself may be in its image.
            let newest = watch.journal.last_key_value().map_or(0, |(lsn, _)| *lsn);
            watch.undelayed = watch.undelayed.max(newest);
        }
        watch.rewinds = s.retired.is_some_and(|r| r.rewinds);
        let stage = s.resync.as_ref().map(|r| r.stage);
        let mut step = false;
        if s.base_segment != watch.base_segment {
            // The journal begins anew: what it held before is nobody's past any more.
            watch.base_segment = s.base_segment;
            watch.places.clear();
            watch.journal.insert(s.base.point.lsn.0, s.base.point.hash);
            watch.claimed = s.base.point.lsn.0;
            watch.said_applied = 0; // nothing of the new history is shown until all of it can be
            self.counts.met(&format!("journal begun anew: {stage:?}"));
            step = true;
        }
        // A checkpoint in the middle of one is a step, too.
        step |= matches!(stage, Some(ResyncStage::Staging | ResyncStage::Merging));
        if stage != watch.stage {
            self.counts.met(&format!("resync: {:?} -> {stage:?}", watch.stage));
            let lost = watch.stage == Some(ResyncStage::Merging) && stage == Some(ResyncStage::Copying);
            let whole = watch.consistent && watch.shown > 0;
            if whole && !s.consistent && !lost && !watch.in_place {
                return broken("I1", "a usable image was given up for one that is not whole");
            }
            watch.stage = stage;
            if stage == Some(ResyncStage::Copying) {
                watch.said_applied = 0;
            }
            step = true;
        }
        watch.in_place &= !s.consistent || watch.consistent;
        watch.consistent = s.consistent;
        watch.shown = shown(&s);
        if s.role == Role::Primary && s.generation.term.node == host.id {
            watch.acting_term = s.generation.term.counter;
        }
        if step {
            self.resync_step(node);
        }
        if raised {
            let phase = self.scenario.phase();
            self.counts.met(&format!("a primary raised its term: {phase:?}"));
            self.raise_step(node);
        } else if moved {
            self.role_step(node);
        }
        if moved && s.role == Role::Primary {
            self.promotion_named(node);
        }
        self.check_cut(node, &s)?;
        if s.checkpoint.lsn.0 > 0 && !self.history.knows(s.checkpoint.hash) {
            return broken("I1", format!("checkpoint at an unknown record {:?}", s.checkpoint));
        }
        Ok(())
    }

    /// Before a start: the dirty maps that the superblock lists hold every record up to the checkpoint.
    pub fn check_maps(&mut self, node: usize) -> Outcome {
        let host = &self.hosts[node];
        let slots = host.disk.content(File::Superblock);
        let (a, b) = slots.split_at(SLOT);
        let Ok((_, s)) = Superblock::choose([a, b]) else {
            return broken("I3", "neither superblock slot decodes");
        };
        // What was being written when its last process ended may not be there: what that one was told and could not
        // make durable, this one was never told.
        let id = host.id;
        let watch = &mut self.hosts[node].watch;
        if watch.base_segment != s.base_segment {
            watch.claimed = watch.claimed.min(s.floor.0);
        }
        watch.heard_term = if s.term.node == id { 0 } else { s.term.counter };
        if s.retired.is_some_and(|r| r.rewinds) {
            watch.give_up(); // it still does what it was told
        }
        // What may be in the image in part goes there at once.
        let newest = watch.journal.last_key_value().map_or(0, |(lsn, _)| *lsn);
        let redo = s.redo.map_or(newest, |lsn| lsn.0);
        watch.undelayed = watch.undelayed.max(s.checkpoint.lsn.0).max(redo);
        (watch.term, watch.base_segment, watch.consistent) = (s.term, s.base_segment, s.consistent);
        (watch.stage, watch.shown) = (s.resync.as_ref().map(|r| r.stage), shown(&s));
        let host = &self.hosts[node];
        let Some(first) = s.maps.first().copied() else {
            return Ok(());
        };
        let sizes: Vec<_> = s.volumes.iter().map(|v| (v.number, v.size)).collect();
        let id = Owner { group: s.group, node: s.node, number: s.maps_id };
        let nobody = Owner { number: u64::MAX, ..id };
        let memory = Box::new(host.maps.content());
        let maps = Maps::new(memory, &sizes, s.maps.clone(), first.from, (id, nobody));
        let maps = maps.or_else(|text| broken("I9", text))?;
        if maps.number() != id.number {
            return Ok(()); // the node will see that, too
        }
        for range in &s.maps {
            // A map may begin after the checkpoint, whose records recovery marks again; or at a record
            // that was cut off, which is nobody's past.
            let since = range.from.hash;
            if range.from.lsn >= s.checkpoint.lsn || !self.history.includes(s.checkpoint.hash, since) {
                continue;
            }
            self.counts.check("I9");
            let listed = maps.since(range.from.lsn);
            for (volume, sector, sectors) in self.history.written(s.checkpoint.hash, since) {
                let number = self.model.volumes[volume].number;
                let at = Address::new(number, sector * 512).expect("a record's extent");
                let covers = |e: &Extent| e.start() <= at.0 && at.0 + sectors * 512 <= e.end();
                if !listed.iter().any(covers) {
                    let text = format!("the map since {} lacks {at:?}+{sectors} sectors", range.from.lsn);
                    return broken("I9", text);
                }
            }
        }
        Ok(())
    }

    /// A message is sent.
    pub fn watch_sent(&mut self, node: usize, message: &Message) -> Outcome {
        match message {
            Message::Record(record) => {
                self.watch_record(node, record)?;
                self.watch_passed_on(node, record)
            }
            Message::Durable { lsn } => self.watch_claim(node, lsn.0),
            Message::Heartbeat { tail: Some(tail), .. } => {
                self.told_tail(node, tail.0);
                Ok(())
            }
            Message::Positions { received, durable, applied } => {
                if applied > durable || durable > received {
                    return broken("I5", format!("positions out of order: {message:?}"));
                }
                self.check_followed(node)?;
                self.watch_claim(node, durable.0)?;
                self.watch_applied(node, applied.0)
            }
            Message::Begin { from } => self.watch_claim(node, from.0 - 1),
            Message::Hello { identity, .. } if identity.role == Role::Shadow => {
                self.counts.check("I5");
                let said = self.hosts[node].watch.applied.map_or(0, |p| p.lsn.0);
                if identity.applied.0 < said {
                    let text = format!(
                        "gives {} as what can't be taken back after it reported {said} as applied",
                        identity.applied
                    );
                    return broken("I5", text);
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// It says that everything up to here is durable in its journal.
    pub fn watch_claim(&mut self, node: usize, lsn: u64) -> Outcome {
        let host = &mut self.hosts[node];
        let live = |range| host.disk.part(File::Journal, range);
        let durable = |range| host.disk.durable(File::Journal, range);
        let news = host.watch.places.range(host.watch.claimed + 1..).take_while(|(l, _)| **l <= lsn);
        for (claimed, (at, len)) in news {
            self.counts.check("I4");
            let (head, end) = (*at..*at + 192, at + len - 512..at + len);
            let there = *live(*at + 160..*at + 192) == host.watch.journal[claimed].0;
            if !there {
                return broken("I4", format!("claims record {claimed} durable and it is not in the journal"));
            }
            if live(head.clone()) != durable(head) || live(end.clone()) != durable(end) {
                return broken("I4", format!("claims record {claimed} durable and it is not"));
            }
        }
        host.watch.claimed = host.watch.claimed.max(lsn);
        Ok(())
    }

    /// It says that everything up to here is in its image.
    fn watch_applied(&mut self, node: usize, lsn: u64) -> Outcome {
        self.counts.check("I5");
        self.check_delay(node, lsn)?;
        let host = &mut self.hosts[node];
        let watch = &mut host.watch;
        if lsn < watch.said_applied {
            return broken("I1", format!("applied falls from {} to {lsn}", watch.said_applied));
        }
        watch.said_applied = lsn;
        let Some(hash) = watch.at(lsn, self.history.origin) else {
            return broken("I5", format!("applied {lsn}, which was never in its journal"));
        };
        let said =
            watch.applied.unwrap_or(HistoryPoint { lsn: volrep::units::Lsn(0), hash: self.history.origin });
        if !self.history.includes(hash, said.hash) && !self.history.includes(said.hash, hash) {
            return broken(
                "I5",
                format!("applied {lsn} of a history without {said:?}, which it had applied"),
            );
        }
        // After a restart redo begins at the checkpoint: the position told may fall, the image does not.
        if lsn > said.lsn.0 && !watch.rewinds {
            watch.applied = Some(HistoryPoint { lsn: volrep::units::Lsn(lsn), hash });
        }
        Ok(())
    }
}

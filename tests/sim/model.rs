//! What each sector of the volumes may read as, given what the node has acknowledged.
//!
//! Owns: the table of writes and, per sector, the versions that are still possible. Invariant: a
//! version is possible unless an acknowledged (after a power cut: durable) write that began after
//! that version was decided has replaced it, or a read has shown that it was replaced.
//!
//! Times are ticks of the model's own clock: one per submission, completion and crash.

use crate::content::{SECTOR, WriteId, parse};
use std::collections::BTreeSet;
use volrep::units::Extent;

/// Not yet.
pub const NEVER: u64 = u64::MAX;

/// A write or a zeroing; index in the table is its [`WriteId`].
#[derive(Clone, Debug)]
pub struct Write {
    /// Index of its volume.
    pub volume: usize,
    /// First sector.
    pub first: u64,
    /// Sectors.
    pub sectors: u64,
    /// It writes zeroes.
    pub zero: bool,
    /// When it was (last) submitted.
    pub submit: u64,
    /// When it was first submitted.
    pub began: u64,
    /// When it was certain whether it took place: completion, or the crash.
    pub decided: u64,
    /// It was answered with success.
    pub acked: bool,
    /// Nodes on whose journals it was promised to be durable, as bits.
    pub remote: u8,
    /// A flush that was answered covers it: whoever holds all that was acknowledged holds it.
    pub flushed: bool,
}

/// One possible content of one sector.
#[derive(Clone, Debug)]
struct Version {
    id: WriteId,
    zero: bool,
    submit: u64,
    decided: u64,
    acked: bool,
    durable: bool,
    /// When a read has shown a later one.
    hidden: u64,
}

/// A volume as the model sees it.
pub struct Volume {
    /// Its number.
    pub number: u8,
    sectors: Vec<Vec<Version>>,
}

/// The oracle of contents.
pub struct Model {
    now: u64,
    /// Volumes, in order.
    pub volumes: Vec<Volume>,
    /// Every write.
    pub writes: Vec<Write>,
    in_flight: Vec<WriteId>,
    /// Acknowledged writes that no flush covers yet.
    volatile: Vec<WriteId>,
    crashed: u64,
    /// When the reads outstanding were submitted: they may return what was replaced since.
    reads: BTreeSet<u64>,
}

impl Model {
    /// Volumes of zeroes: (number, bytes).
    pub fn new(volumes: &[(u8, u64)]) -> Model {
        let zero =
            Version { id: 0, zero: true, submit: 0, decided: 0, acked: true, durable: true, hidden: NEVER };
        let volume = |&(number, size): &(u8, u64)| Volume {
            number,
            sectors: vec![vec![zero.clone()]; size as usize / SECTOR],
        };
        let nothing = Write {
            volume: 0,
            first: 0,
            sectors: 0,
            zero: true,
            submit: 0,
            began: 0,
            decided: 0,
            acked: true,
            remote: 0,
            flushed: false,
        };
        Model {
            now: 0,
            volumes: volumes.iter().map(volume).collect(),
            writes: vec![nothing],
            in_flight: Vec::new(),
            volatile: Vec::new(),
            crashed: 0,
            reads: BTreeSet::new(),
        }
    }
    /// The next tick.
    pub fn tick(&mut self) -> u64 {
        self.now += 1;
        self.now
    }
    /// Index of a volume number.
    pub fn volume_index(&self, number: u8) -> Option<usize> {
        self.volumes.iter().position(|v| v.number == number)
    }
    /// Sectors of a volume.
    pub fn volume_sectors(&self, volume: usize) -> u64 {
        self.volumes[volume].sectors.len() as u64
    }
    fn span(&self, extent: Extent) -> (usize, u64, u64) {
        let at = extent.address();
        let volume = self.volume_index(at.volume()).expect("the workload knows the volumes");
        (volume, at.offset() / SECTOR as u64, extent.len() / SECTOR as u64)
    }
    fn versions(&mut self, id: WriteId) -> impl Iterator<Item = &mut Vec<Version>> {
        let w = &self.writes[id as usize];
        let range = w.first as usize..(w.first + w.sectors) as usize;
        self.volumes[w.volume].sectors[range].iter_mut()
    }

    /// A write is submitted.
    pub fn begin_write(&mut self, extent: Extent, zero: bool) -> WriteId {
        let (volume, first, sectors) = self.span(extent);
        let submit = self.tick();
        let id = self.writes.len() as WriteId;
        let (decided, acked) = (NEVER, false);
        self.writes.push(Write {
            volume,
            first,
            sectors,
            zero,
            submit,
            began: submit,
            decided,
            acked,
            remote: 0,
            flushed: false,
        });
        self.enter(id, zero, submit);
        id
    }
    /// A write that a crash left unanswered is submitted again, with the same content.
    pub fn resubmit(&mut self, id: WriteId) {
        let submit = self.tick();
        let w = &mut self.writes[id as usize];
        (w.submit, w.decided) = (submit, NEVER);
        let zero = w.zero;
        self.enter(id, zero, submit);
    }
    fn enter(&mut self, id: WriteId, zero: bool, submit: u64) {
        self.in_flight.push(id);
        let version =
            Version { id, zero, submit, decided: NEVER, acked: false, durable: false, hidden: NEVER };
        self.versions(id).for_each(|list| list.push(version.clone()));
    }
    /// A write is answered.
    pub fn end_write(&mut self, id: WriteId, ok: bool, fua: bool) {
        if !ok {
            return; // it may take place until the process ends
        }
        let now = self.tick();
        self.in_flight.retain(|w| *w != id);
        let w = &mut self.writes[id as usize];
        (w.decided, w.acked) = (now, true);
        for list in self.versions(id) {
            if let Some(v) = list.iter_mut().rev().find(|v| v.id == id && v.decided == NEVER) {
                (v.decided, v.acked) = (now, true);
            }
        }
        if fua {
            self.make_durable(id);
        } else {
            self.volatile.push(id);
        }
    }
    /// A flush that was submitted at `submit` succeeded: returns the writes it covers newly.
    pub fn end_flush(&mut self, submit: u64) -> Vec<WriteId> {
        let all = std::mem::take(&mut self.volatile);
        let covered = |id: &WriteId| self.writes[*id as usize].decided < submit;
        let (covered, rest): (Vec<_>, Vec<_>) = all.into_iter().partition(covered);
        self.volatile = rest;
        covered.iter().for_each(|id| self.make_durable(*id));
        covered
    }
    /// A read is submitted.
    pub fn begin_read(&mut self) -> u64 {
        let now = self.tick();
        self.reads.insert(now);
        now
    }
    /// A read is answered, or never will be.
    pub fn end_read(&mut self, submit: u64) {
        self.reads.remove(&submit);
    }
    fn make_durable(&mut self, id: WriteId) {
        self.writes[id as usize].flushed = true;
        let oldest = self.reads.first().copied().unwrap_or(NEVER);
        for list in self.versions(id) {
            let Some(at) = list.iter().rposition(|v| v.id == id && v.acked) else {
                continue;
            };
            list[at].durable = true;
            let (floor, seen) = (list[at].submit, list[at].decided > oldest);
            // Whoever reads from now on can't see what this one has replaced; who reads already may.
            list.retain(|v| v.decided >= floor || seen);
        }
    }

    /// The process is gone: what it had not answered is decided, though nobody knows how.
    pub fn kill(&mut self) {
        let now = self.tick();
        self.crashed = now;
        self.reads.clear();
        for id in std::mem::take(&mut self.in_flight) {
            self.writes[id as usize].decided = now;
            for list in self.versions(id) {
                list.iter_mut().filter(|v| v.decided == NEVER).for_each(|v| v.decided = now);
            }
        }
    }
    /// The machine is gone: what no flush covered may be gone too, and what it had replaced be back.
    pub fn power_loss(&mut self) {
        self.kill();
        for id in std::mem::take(&mut self.volatile) {
            self.writes[id as usize].acked = false; // nobody was promised anything
        }
        for list in self.volumes.iter_mut().flat_map(|v| &mut v.sectors) {
            for v in list.iter_mut().filter(|v| !v.durable) {
                v.acked = false;
            }
            list.iter_mut().for_each(|v| v.hidden = NEVER);
        }
    }

    /// A read submitted at `submit` returned these bytes. Returns the sectors looked at.
    pub fn check_read(&mut self, extent: Extent, bytes: &[u8], submit: u64) -> Result<u64, String> {
        let (volume, first, sectors) = self.span(extent);
        if bytes.len() as u64 != extent.len() {
            return Err(format!("{extent:?}: {} bytes came back", bytes.len()));
        }
        let number = self.volumes[volume].number;
        for (bytes, sector) in bytes.chunks_exact(SECTOR).zip(first..) {
            let id = parse(bytes, number, sector)?;
            self.check_sector(volume, sector, id, submit)?;
        }
        Ok(sectors)
    }

    fn check_sector(&mut self, volume: usize, sector: u64, id: WriteId, submit: u64) -> Result<(), String> {
        let (now, crashed) = (self.tick(), self.crashed);
        let list = &mut self.volumes[volume].sectors[sector as usize];
        let replaced = list.iter().filter(|v| v.acked && v.decided < submit).map(|v| v.submit).max();
        let floor = replaced.unwrap_or(0);
        let same = |v: &Version| if id == 0 { v.zero } else { v.id == id };
        let possible = |v: &Version| v.hidden >= submit && v.decided >= floor;
        let Some(at) = list.iter().rposition(|v| same(v) && possible(v)) else {
            return Err(format!(
                "volume {volume} sector {sector} reads as write {id}; possible were {:?} at {submit}, floor {floor}",
                list
            ));
        };
        // Whatever was decided before this read began and is not what it saw came before that.
        for v in list.iter_mut().filter(|v| !same(v) && v.decided < submit) {
            v.hidden = v.hidden.min(now);
        }
        if list[at].decided <= crashed && (!list[at].durable || list.len() > 1) {
            // Read after a recovery: it stands for good.
            let v = &mut list[at];
            (v.acked, v.durable, v.hidden) = (true, true, NEVER);
            let kept = v.id;
            list.retain(|v| v.id == kept || v.decided > crashed);
        }
        Ok(())
    }

    /// The whole image as it was read from a promoted shadow: from here on, this is the truth.
    pub fn rebase(&mut self, image: &[Vec<WriteId>]) {
        let now = self.tick();
        self.kill();
        self.volatile.clear();
        self.writes.iter_mut().for_each(|w| w.flushed = false);
        for (volume, ids) in self.volumes.iter_mut().zip(image) {
            for (list, id) in volume.sectors.iter_mut().zip(ids) {
                let (id, zero) = (*id, *id == 0);
                let (submit, decided) = (now, now);
                *list =
                    vec![Version { id, zero, submit, decided, acked: true, durable: true, hidden: NEVER }];
            }
        }
    }

    /// Whether `newer` may lie over `older` at a sector: not if it was over before `older` began.
    pub fn may_follow(&self, newer: WriteId, older: WriteId, volume: usize, sector: u64) -> bool {
        let began = self.writes[older as usize].began;
        if newer != 0 {
            return newer == older || self.writes[newer as usize].decided >= began;
        }
        let covers =
            |w: &Write| w.zero && w.volume == volume && (w.first..w.first + w.sectors).contains(&sector);
        older == 0 || self.writes[1..].iter().any(|w| covers(w) && w.decided >= began)
    }

    /// A write that some image should hold and does not, if any: `promised` selects the writes.
    pub fn missing(&self, image: &[Vec<WriteId>], promised: impl Fn(&Write) -> bool) -> Option<String> {
        for (id, w) in self.writes.iter().enumerate().skip(1).filter(|(_, w)| promised(w)) {
            for sector in w.first..w.first + w.sectors {
                let there = image[w.volume][sector as usize];
                let older = if w.zero { there != 0 } else { there != id as WriteId };
                if older && !self.may_follow(there, id as WriteId, w.volume, sector) {
                    return Some(format!(
                        "volume {} sector {sector} holds write {there}, not {id}: {w:?}",
                        w.volume
                    ));
                }
            }
        }
        None
    }
}

/// The oracle accepts what a disk may do and nothing else.
pub fn check() {
    use crate::content::fill;
    use volrep::units::Address;
    let extent = Extent::new(Address(0), 512).expect("a sector");
    let bytes = |id: WriteId| {
        let mut b = vec![0; 512];
        if id != 0 {
            fill(&mut b, id, 0, 0, false);
        }
        b
    };
    let written = |m: &mut Model| {
        let id = m.begin_write(extent, false);
        m.end_write(id, true, false);
        id
    };
    let reads = |m: &mut Model, id| {
        let now = m.tick();
        m.check_read(extent, &bytes(id), now).is_ok()
    };
    let fresh = || Model::new(&[(0, 4096)]);
    // A completed write is seen, and nothing older.
    let mut m = fresh();
    assert!(reads(&mut m, 0));
    let a = written(&mut m);
    assert!(!reads(&mut m, 0) && reads(&mut m, a));
    // Concurrent writes: either, but once one is seen after both, always that one.
    let (b, c) = (m.begin_write(extent, false), m.begin_write(extent, false));
    m.end_write(b, true, false);
    m.end_write(c, true, false);
    assert!(!reads(&mut m, a) && reads(&mut m, b) && !reads(&mut m, c));
    // A kill loses nothing that was answered; a power cut may, until a flush.
    m.kill();
    assert!(!reads(&mut m, a) && reads(&mut m, b));
    let flush = m.tick();
    m.end_flush(flush);
    let d = written(&mut m);
    m.power_loss();
    assert!(!reads(&mut m, a) && reads(&mut m, b) && !reads(&mut m, d), "read once, never reverts");
    // Unanswered writes: any, then always the same.
    let e = m.begin_write(extent, false);
    m.kill();
    assert!(reads(&mut m, e) && !reads(&mut m, b));
    m.power_loss();
    assert!(!reads(&mut m, b) && reads(&mut m, e));
}

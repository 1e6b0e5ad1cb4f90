//! The journal alone on the disk model: appends, syncs, checkpoints, crashes, recoveries, many laps.
//!
//! Owns: a shorter loop around `journal` and its recovery than a whole node allows. Invariant checked
//! (I3): what was durable is there after a crash, what was recovered and served stays, and no crash
//! without damage is called damage.

use crate::disk::Disk;
use crate::prng::Prng;
use volrep::disk::{DiskRequest, File, aligned};
use volrep::format::message::Role;
use volrep::format::record::{self, Compressor, Content, EncodeJob, Kind, Record, Stamp};
use volrep::format::superblock::{Anchor, Geometry, Superblock, Volume};
use volrep::journal::cursor::Place;
use volrep::journal::recovery::{Outcome, Recovered, Recovery};
use volrep::journal::{Journal, Tail, tail_of};
use volrep::units::{Address, Extent, Generation, GroupId, Hash, HistoryPoint, Lsn, NodeId, Now, Term};

const G: Geometry = Geometry { segment: 2 << 20, segments: 4 };

fn superblock(group: GroupId) -> Superblock {
    let term = Term { counter: 1, node: NodeId(1) };
    Superblock {
        sequence: 1,
        group,
        node: NodeId(1),
        role: Role::Primary,
        term,
        generation: Generation { term, start: 1 },
        checkpoint: HistoryPoint { lsn: Lsn(0), hash: record::origin(group) },
        checkpoint_write: 0,
        checkpoint_generation: Generation::default(),
        checkpoint_segment: 1,
        base: Anchor::default(),
        base_segment: 1,
        floor: Lsn(0),
        limit: Lsn(0),
        blank: true,
        clean: false,
        consistent: true,
        cache_boot: [0; 16],
        geometry: G,
        volumes: vec![Volume { number: 0, size: 1 << 30, name: "v".into() }],
        openings: vec![],
        maps: vec![],
        sync_set: vec![],
        outdated: vec![],
        peers: vec![],
        maps_id: 0,
        retired: None,
        handed: None,
        resync: None,
        comparison: None,
        verified: None,
        unrepaired: 0,
        redo: None,
        cut: None,
    }
}

struct Run {
    rng: Prng,
    disk: Disk,
    /// As it is durably on disk.
    sb: Superblock,
    chain: Vec<Tail>,
    in_flight: Vec<(u64, u64)>,
}

impl Run {
    fn make(&mut self, tail: &Tail, durable: Lsn) -> Record {
        let bytes = if self.rng.permille(200) { 1 << 20 } else { self.rng.log(1, 600) * 512 } as usize;
        let mut buf = aligned(record::room(1) + bytes);
        buf.resize(record::room(1) + bytes, self.rng.next() as u8);
        let extent = Extent::new(Address(0), bytes as u64).expect("whole sectors");
        let job = EncodeJob { extents: vec![(extent, Content::Data)], buf, level: None };
        let stamp = Stamp {
            group: self.sb.group,
            generation: self.sb.generation,
            lsn: tail.point.lsn.next(),
            prev: tail.point.hash,
            time: tail.time + 1,
            flags: 0,
            last_write: tail.last_write + 1,
            durable,
            kind: Kind::Writes,
        };
        record::seal(record::encode(job, &mut Compressor::default()), stamp)
    }

    fn submit(&mut self, out: &mut Vec<DiskRequest>) {
        for request in out.drain(..) {
            let id = request.token.id();
            let ticket = self.disk.submit(request).expect("the journal keeps the disk's rules");
            self.in_flight.push((ticket, id));
        }
    }

    fn crash(&mut self) {
        self.in_flight.clear();
        if self.rng.permille(500) {
            self.disk.power_loss(&mut self.rng);
        } else {
            self.disk.kill(&mut self.rng);
        }
    }

    /// Recovery, itself interrupted now and then.
    fn recover(&mut self, target: Option<HistoryPoint>) -> Recovered {
        loop {
            let patience = if self.rng.permille(300) { self.rng.below(12) } else { u64::MAX };
            if let Some(found) = self.try_recover(target, patience) {
                return found;
            }
            self.crash();
        }
    }

    fn try_recover(&mut self, target: Option<HistoryPoint>, patience: u64) -> Option<Recovered> {
        let origin = record::origin(self.sb.group);
        let mut recovery = match target {
            Some(target) => Recovery::compare(1, &self.sb, origin, target),
            None => Recovery::new(1, &self.sb, origin),
        };
        let (mut out, mut seen) = (Vec::new(), Vec::new());
        recovery.start(&mut out);
        self.submit(&mut out);
        for _ in 0..patience {
            let at = self.rng.below(self.in_flight.len() as u64) as usize;
            let (ticket, id) = self.in_flight.swap_remove(at);
            let result = self.disk.complete(ticket, None, &mut self.rng);
            let mut note = |r: &Record, _| seen.push(r.point());
            match recovery.complete(id, result, &mut note, &mut out) {
                Some(Outcome::Found(found)) => {
                    let after = self.sb.checkpoint.lsn.0 as usize;
                    let kept: Vec<_> =
                        self.chain[after + 1..].iter().map(|t| t.point).take(seen.len()).collect();
                    assert_eq!(seen, kept, "redo sees the records after the checkpoint");
                    return Some(*found);
                }
                Some(other) => panic!("a crash is called damage: {other:?}"),
                None => self.submit(&mut out),
            }
        }
        None
    }

    /// Another history is taken up, at a later record or an earlier one: the journal begins after it, and
    /// what it held before is no evidence of anything.
    fn begin_anew(&mut self, before: &Recovered) -> Recovered {
        let lsn = self.rng.within(1, before.tail.point.lsn.0 + 50);
        self.sb.generation.start += 1;
        let point = HistoryPoint { lsn: Lsn(lsn), hash: Hash(self.rng.bytes32()) };
        let time = before.tail.time + self.rng.below(10);
        let (generation, last_write) = (self.sb.generation, self.rng.below(1000));
        let tail = Tail { point, generation, last_write, time, durable: Lsn(0) };
        self.chain.resize(lsn as usize + 1, tail);
        self.chain[lsn as usize] = tail;
        self.sb.base = Anchor { point, generation, last_write, time };
        self.sb.base_segment = before.head.segment + 1;
        (self.sb.checkpoint, self.sb.checkpoint_write) = (point, last_write);
        (self.sb.checkpoint_generation, self.sb.checkpoint_segment) = (generation, self.sb.base_segment);
        self.sb.floor = point.lsn;
        // It may be closed, or die, before the first record.
        for _ in 0..self.rng.below(3) {
            self.sb.clean = self.rng.permille(500);
            self.crash();
            let found = self.recover(None);
            assert_eq!((found.tail.point, found.tail.time, found.segments.len()), (point, time, 0));
        }
        let found = self.recover(None);
        self.sb.clean = false;
        assert_eq!(found.head, Place { segment: self.sb.base_segment, offset: 0 });
        found
    }

    fn life(&mut self, promised: Lsn) -> Lsn {
        let mut r = self.recover(None);
        let tail = r.tail.point.lsn;
        assert!(tail >= promised, "ends at {tail}, {promised} was durable");
        if self.rng.permille(200) {
            // A shadow is told to cut back to what it shares with its primary.
            let lsn = self.rng.within(self.sb.checkpoint.lsn.0, tail.0);
            let target = self.chain[lsn as usize].point;
            self.sb.floor = self.sb.floor.min(Lsn(lsn));
            r = self.recover(Some(target));
            assert_eq!(r.tail.point, target);
        }
        if self.rng.permille(250) {
            r = self.begin_anew(&r);
        }
        let tail = r.tail.point.lsn;
        assert_eq!(self.chain[tail.0 as usize].point, r.tail.point, "another history");
        self.chain.truncate(tail.0 as usize + 1);
        let mut j = Journal::new(1, self.sb.group, G, r.head, r.segments, r.tail);
        let mut promised = j.durable();
        let mut out = Vec::new();
        let mut now = Now::default();
        for _ in 0..self.rng.within(1, 60) {
            now.mono += self.rng.below(4_000_000);
            let tail = *j.tail();
            match self.rng.below(10) {
                0..=4 => {
                    let record = self.make(&tail, j.durable());
                    if j.fits(record.padded_len()) {
                        let wanted = self.rng.permille(300);
                        j.append(now, &record, wanted, &mut out);
                        self.chain.push(tail_of(&record));
                    }
                }
                5..=7 if !self.in_flight.is_empty() => {
                    let at = self.rng.below(self.in_flight.len() as u64) as usize;
                    let (ticket, id) = self.in_flight.swap_remove(at);
                    let result = self.disk.complete(ticket, None, &mut self.rng);
                    j.complete(id, result).expect("no fault");
                }
                8 => self.checkpoint(&mut j),
                _ => {}
            }
            j.poll(now, 5_000_000, 1 << 20, &mut out);
            self.submit(&mut out);
            promised = promised.max(j.durable());
        }
        promised
    }

    /// Some durable record becomes the checkpoint, atomically.
    fn checkpoint(&mut self, j: &mut Journal) {
        let lsn = self.rng.within(self.sb.checkpoint.lsn.0, j.durable().0);
        let lsn = if self.rng.permille(500) { j.durable().0 } else { lsn };
        let at = self.chain[lsn as usize];
        self.sb.checkpoint = at.point;
        self.sb.checkpoint_write = at.last_write;
        self.sb.checkpoint_generation = at.generation;
        self.sb.checkpoint_segment = j.segment_of(at.point.lsn);
        self.sb.floor = j.durable();
        j.keep_after(at.point.lsn);
    }
}

fn run(seed: u64) {
    let mut rng = Prng::new(seed);
    let group = GroupId(rng.bytes16());
    let sb = superblock(group);
    let start = Tail {
        point: sb.checkpoint,
        generation: Generation::default(),
        last_write: 0,
        time: 0,
        durable: Lsn(0),
    };
    let disk = Disk::new(&[(File::Journal, G.len(), 4096)]);
    let mut run = Run { rng, disk, sb, chain: vec![start], in_flight: Vec::new() };
    let mut promised = Lsn(0);
    for _ in 0..9 {
        promised = run.life(promised);
        run.crash();
    }
}

/// Many lives of many journals.
pub fn check() {
    let runs = if cfg!(debug_assertions) { 20 } else { 300 };
    for seed in 0..runs {
        let outcome = std::panic::catch_unwind(|| run(seed));
        assert!(outcome.is_ok(), "journal {seed}: {}", crate::last_panic());
    }
}

//! What a volume may hold, block by block, as its writer knows it.
//!
//! Owns: the versions written to each block of one volume. Invariant: a block's candidates are what
//! it was last promised to hold and everything submitted since; once it was read, it holds what was
//! read.

use crate::nbd::{Client, FLUSH, FUA, TRIM, WRITE, ZEROES};
use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

/// Bytes of a block of the model: the smallest unit of the volume.
pub const UNIT: usize = 512;

/// A generator of numbers that a seed repeats (SplitMix64).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// The bytes of a unit: version 0 is zeroes.
pub fn unit(number: u64, version: u64) -> [u8; UNIT] {
    let mut out = [0; UNIT];
    if version > 0 {
        // Half of it does not compress, so that records come in both kinds.
        let mut random = Random(number ^ (version << 24));
        out[..8].copy_from_slice(&number.to_le_bytes());
        out[8..16].copy_from_slice(&version.to_le_bytes());
        out[16..256].chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&random.next().to_le_bytes()));
        out[504..].copy_from_slice(&version.to_le_bytes());
    }
    out
}

/// The version that bytes claim to be; `None` if they are no unit at all.
pub fn version(number: u64, bytes: &[u8]) -> Option<u64> {
    let claimed = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    (bytes == unit(number, claimed)).then_some(claimed)
}

/// What is submitted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Write,
    Zero,
    Flush,
}

struct Flying {
    kind: Kind,
    first: u64,
    count: u64,
    version: u64,
    fua: bool,
    /// Of a FLUSH: the number of completions before it was submitted.
    covers: u64,
}

/// What makes a write a promise.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Promise {
    /// Its reply: the daemon may die, the machine lives.
    Reply,
    /// The reply to a FLUSH that was submitted after its reply, or its own if it is FUA.
    Flush,
}

/// A unit's candidates, oldest first: (version, when it was completed).
type Candidates = Vec<(u64, Option<u64>)>;

/// See the module's documentation.
pub struct Model {
    units: u64,
    promise: Promise,
    random: Random,
    blocks: HashMap<u64, Candidates>,
    flying: HashMap<u64, Flying>,
    versions: u64,
    completions: u64,
    /// Requests acknowledged.
    pub acknowledged: u64,
    /// Of these, FLUSH and FUA.
    pub flushed: u64,
}

impl Model {
    /// Of a volume that is all zeroes.
    pub fn new(bytes: u64, promise: Promise, seed: u64) -> Model {
        Model {
            units: bytes / UNIT as u64,
            promise,
            random: Random(seed),
            blocks: HashMap::new(),
            flying: HashMap::new(),
            versions: 0,
            completions: 0,
            acknowledged: 0,
            flushed: 0,
        }
    }

    /// Writes with `depth` requests in flight until `end`, or until the connection breaks.
    pub fn load(&mut self, client: &mut Client, depth: usize, end: Instant) -> io::Result<()> {
        loop {
            while client.in_flight() < depth && Instant::now() < end {
                self.submit(client)?;
            }
            if client.in_flight() == 0 {
                return Ok(());
            }
            let reply = client.reply()?;
            assert_eq!(reply.error, 0, "a request failed: {reply:?}");
            self.completed(reply.cookie);
        }
    }

    fn submit(&mut self, client: &mut Client) -> io::Result<()> {
        let dice = self.random.below(100);
        let kind = match dice {
            0..12 => Kind::Flush,
            12..18 => Kind::Zero,
            _ => Kind::Write,
        };
        let fua = self.random.below(8) == 0;
        let most = if self.random.below(20) == 0 { 1024 } else { 32 };
        let count = 1 + self.random.below(most);
        // A third of the volume is hit again and again.
        let within = if self.random.below(3) > 0 { self.units / 3 } else { self.units };
        let first = self.random.below(within - count);
        let range = first..first + count;
        let collides = |f: &Flying| f.first < range.end && range.start < f.first + f.count;
        if kind != Kind::Flush && self.flying.values().any(collides) {
            // The order of overlapping writes in flight is the server's to choose.
            return Ok(());
        }
        self.versions += 1;
        let version = if kind == Kind::Zero { 0 } else { self.versions };
        let (offset, len) = (first * UNIT as u64, count as usize * UNIT);
        let flags = if fua { FUA } else { 0 };
        if kind != Kind::Flush {
            for number in range.clone() {
                self.blocks.entry(number).or_insert_with(|| vec![(0, Some(0))]).push((version, None));
            }
        }
        let covers = self.completions;
        let flying = match kind {
            Kind::Flush => Flying { kind, first: 0, count: 0, version, fua: false, covers },
            _ => Flying { kind, first, count, version, fua, covers },
        };
        // In flight even if sending it fails half-way: the server may have it.
        let result = match kind {
            Kind::Flush => client.send(FLUSH, 0, 0, 0, &[]),
            Kind::Zero if self.random.below(2) == 0 => client.send(TRIM, flags, offset, len, &[]),
            Kind::Zero => client.send(ZEROES, flags, offset, len, &[]),
            Kind::Write => {
                let data: Vec<u8> = range.flat_map(|n| unit(n, version)).collect();
                client.send(WRITE, flags, offset, len, &data)
            }
        };
        self.flying.insert(result?, flying);
        Ok(())
    }

    fn completed(&mut self, cookie: u64) {
        let f = self.flying.remove(&cookie).expect("it was in flight");
        self.completions += 1;
        self.acknowledged += 1;
        let now = self.completions;
        if f.kind == Kind::Flush {
            self.flushed += 1;
            if self.promise == Promise::Flush {
                self.blocks.values_mut().for_each(|c| settle(c, f.covers));
            }
            return;
        }
        let promised = f.fua || self.promise == Promise::Reply;
        self.flushed += u64::from(f.fua);
        for number in f.first..f.first + f.count {
            let candidates = self.blocks.get_mut(&number).expect("it was submitted");
            // Only one write of a block is ever in flight, so it is the newest.
            let last = candidates.last_mut().expect("it was submitted");
            assert_eq!(last.0, f.version);
            last.1 = Some(now);
            if promised {
                settle(candidates, now);
            }
        }
    }

    /// The connection is gone: what was in flight may have happened or not.
    pub fn broken(&mut self) {
        self.flying.clear();
    }

    /// Reads every unit that was ever written; panics where it holds what it may not.
    #[track_caller]
    pub fn check(&mut self, client: &mut Client, what: &str) {
        const STEP: u64 = 2048;
        for from in (0..self.units).step_by(STEP as usize) {
            let count = STEP.min(self.units - from);
            let data = client.read(from * UNIT as u64, count as usize * UNIT).unwrap();
            for (number, bytes) in (from..).zip(data.chunks_exact(UNIT)) {
                let candidates = self.blocks.entry(number).or_insert_with(|| vec![(0, Some(0))]);
                let found = version(number, bytes);
                let known = found.filter(|v| candidates.iter().any(|(c, _)| c == v));
                let Some(known) = known else {
                    panic!("{what}: unit {number} holds version {found:?}, allowed are {candidates:?}");
                };
                *candidates = vec![(known, Some(self.completions))];
            }
        }
    }

    /// Reads while writing goes on elsewhere: some units, at random.
    pub fn spot_check(&mut self, client: &mut Client) {
        for _ in 0..64 {
            let number = self.random.below(self.units);
            let data = client.read(number * UNIT as u64, UNIT).unwrap();
            if let Some(candidates) = self.blocks.get(&number) {
                let last = candidates.last().unwrap().0;
                assert_eq!(version(number, &data), Some(last), "unit {number}: {candidates:?}");
            }
        }
    }

    /// A moment between `least` and `most` from now.
    pub fn moment(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_micros(1000 * least + self.random.below(1000 * (most - least)))
    }
}

/// Whatever is older than the newest completion up to `at` can't come back.
fn settle(candidates: &mut Candidates, at: u64) {
    if let Some(i) = candidates.iter().rposition(|(_, done)| done.is_some_and(|d| d <= at)) {
        candidates.drain(..i);
    }
}

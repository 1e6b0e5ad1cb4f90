//! What the benches are fed with.
//!
//! Owns: it. Invariant: the same bytes in every run.
#![allow(dead_code, reason = "each bench uses its part")]

use criterion::Criterion;
use std::time::Duration;
use volrep::disk::aligned;
use volrep::format::record::{Content, EncodeJob, Kind, Stamp, room};
use volrep::units::{Address, Extent, Generation, GroupId, Hash, Lsn, NodeId, Term};

/// A kind of contents.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Data {
    /// Half of each 4 KiB is random and half zeroes, as fio's `buffer_compress_percentage=50` makes them.
    Half,
    /// Pages of rows with numbers and short texts, as a database's.
    Rows,
    /// Random.
    Random,
}

/// All of them.
pub const ALL: [Data; 3] = [Data::Half, Data::Rows, Data::Random];

/// The settings of every bench: many cases, each short.
pub fn settings() -> Criterion {
    let short = Criterion::default().warm_up_time(Duration::from_millis(200)).sample_size(20);
    short.measurement_time(Duration::from_millis(800))
}

/// Numbers that look random.
pub struct Numbers(u64);

impl Numbers {
    /// Always the same ones.
    pub fn new() -> Numbers {
        Numbers(0x9e37_79b9_7f4a_7c15)
    }
    /// The next (xorshift64*).
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// So many bytes of this kind.
pub fn bytes(data: Data, len: usize) -> Vec<u8> {
    let mut numbers = Numbers::new();
    let mut out = Vec::with_capacity(len + 8192);
    while out.len() < len {
        match data {
            Data::Half if out.len() % 4096 >= 2048 => out.extend_from_slice(&[0; 8]),
            Data::Half | Data::Random => out.extend_from_slice(&numbers.next().to_le_bytes()),
            Data::Rows => page(&mut out, &mut numbers),
        }
    }
    out.truncate(len);
    out
}

/// A page of 8 KiB: a head, pointers, then rows of a key, a balance, a date and a name.
fn page(out: &mut Vec<u8>, numbers: &mut Numbers) {
    const NAMES: [&str; 8] =
        ["Meier", "Okafor", "Nguyen", "Smith", "Garcia", "Kowalski", "Haddad", "Ivanova"];
    let begin = out.len();
    out.extend_from_slice(&numbers.next().to_le_bytes());
    out.extend((0..60u32).flat_map(|row| (8192 - 128 * (row + 1)).to_le_bytes()));
    while out.len() - begin < 8192 - 96 {
        let (key, cents) = (numbers.next() % 10_000_000, numbers.next() % 1_000_000);
        let name = NAMES[(numbers.next() % 8) as usize];
        let visit = numbers.next() % 365;
        out.extend_from_slice(&(key as u32).to_le_bytes());
        out.extend_from_slice(&(cents as u32).to_le_bytes());
        out.extend_from_slice(
            format!("{name:<16}2026-{:02}-{:02} room {visit:04}", visit / 31 + 1, visit % 28 + 1).as_bytes(),
        );
        out.extend_from_slice(&[0, 0, 3, 0, 2, 9, 24, 0, 0, 0, 0, 0]);
    }
    out.resize(begin + 8192, 0);
}

/// So many bytes at this offset.
pub fn extent(at: u64, len: u64) -> Extent {
    Extent::new(Address(at), len).expect("a proper extent")
}

/// An epoch of these bytes, in extents of at most `each` bytes that do not touch, ready to be encoded.
pub fn job(payload: &[u8], each: usize, level: Option<i32>) -> EncodeJob {
    let extents: Vec<_> = payload
        .chunks(each)
        .enumerate()
        .map(|(i, part)| (extent(2 * (i * each) as u64, part.len() as u64), Content::Data))
        .collect();
    let room = room(extents.len());
    let mut buf = aligned((room + payload.len()).next_multiple_of(4096));
    buf.resize(room, 0);
    buf.extend_from_slice(payload);
    EncodeJob { extents, buf, level }
}

/// The stamp of the record after this one.
pub fn stamp(lsn: Lsn, prev: Hash) -> Stamp {
    let term = Term { counter: 1, node: NodeId(1) };
    Stamp {
        group: GroupId([7; 16]),
        generation: Generation { term, start: 1 },
        lsn: lsn.next(),
        prev,
        time: 1,
        flags: 0,
        last_write: lsn.0 + 1,
        durable: Lsn(0),
        kind: Kind::Writes,
    }
}

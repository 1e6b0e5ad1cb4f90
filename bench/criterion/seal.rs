//! The write cache: accepting writes, closing an epoch of them, and closing the chain over its record.
//!
//! `cargo bench --manifest-path bench/criterion/Cargo.toml --bench seal [-- FILTER]`

mod data;

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use data::{Data, Numbers, bytes, extent, job, settings, stamp};
use std::hint::black_box;
use std::time::{Duration, Instant};
use volrep::cache::ring::Ring;
use volrep::cache::{Cache, RingId, ring_len};
use volrep::disk::Payload;
use volrep::format::record::{Compressor, encode, origin, seal};
use volrep::units::{Extent, GroupId, Lsn, NodeId, Term};

const RING: u64 = 64 << 20;
/// The volume on which the writes fall at random.
const VOLUME: u64 = 1 << 30;
/// Writes of an epoch, and bytes of each.
const EPOCHS: [(u64, u64); 4] = [(1, 8 << 10), (16, 4 << 10), (256, 4 << 10), (1, 1 << 20)];

fn cache() -> Cache {
    let id = RingId { group: GroupId([7; 16]), boot: [9; 16], term: Term { counter: 3, node: NodeId(5) } };
    Cache::new(Ring::format(Box::new(vec![0u8; ring_len(RING) as usize]), id, 0))
}

/// Fills an epoch and closes it, again and again; the time of what `timed` names is counted.
fn epochs(rounds: u64, (writes, each): (u64, u64), timed: Part) -> Duration {
    let payload = Payload::Here(Bytes::from(bytes(Data::Half, each as usize)));
    let (mut cache, mut numbers) = (cache(), Numbers::new());
    let mut spent = Duration::ZERO;
    for _ in 0..rounds {
        let extents: Vec<Extent> =
            (0..writes).map(|_| extent(numbers.next() % (VOLUME / each) * each, each)).collect();
        let begun = Instant::now();
        for extent in &extents {
            cache.write(*extent, Some(&payload)).unwrap();
        }
        let written = Instant::now();
        cache.close();
        let gathered = black_box(cache.gather(Some(1))).expect("an epoch");
        spent += match timed {
            Part::Accept => written - begun,
            Part::Close => written.elapsed(),
        };
        cache.written_back(extents.into_iter(), gathered.last_seq);
    }
    spent
}

#[derive(Clone, Copy)]
enum Part {
    Accept,
    Close,
}

fn sealing(c: &mut Criterion) {
    for (part, what) in [(Part::Accept, "accept"), (Part::Close, "close and gather")] {
        let mut group = c.benchmark_group(what);
        for epoch in EPOCHS {
            group.throughput(Throughput::Bytes(epoch.0 * epoch.1));
            let id = BenchmarkId::from_parameter(format!("{} x {}k", epoch.0, epoch.1 >> 10));
            group.bench_function(id, |b| b.iter_custom(|rounds| epochs(rounds, epoch, part)));
        }
        group.finish();
    }
}

/// The header and the chain over an encoded epoch: what takes its turn on the loop's own thread.
fn chaining(c: &mut Criterion) {
    let start = origin(GroupId([7; 16]));
    let mut group = c.benchmark_group("chain");
    for len in [4 << 10, 64 << 10, 1 << 20] {
        let payload = bytes(Data::Half, len);
        group.bench_function(BenchmarkId::from_parameter(format!("{}k", len >> 10)), |b| {
            b.iter_batched(
                || encode(job(&payload, 4096.max(len / 16), None), &mut Compressor::default()),
                |encoded| seal(encoded, stamp(Lsn(0), start)),
                BatchSize::LargeInput,
            )
        });
    }
    group.finish();
}

criterion_group! { name = all; config = settings(); targets = sealing, chaining }
criterion_main!(all);

//! The extent map, which is behind the cache's index, an epoch, the stage's and the backlog's: with few and with many
//! extents of 4 KiB.
//!
//! `cargo bench --manifest-path bench/criterion/Cargo.toml --bench index [-- FILTER]`. An element is one call.

mod data;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use data::{Numbers, extent, settings};
use std::hint::black_box;
use volrep::cache::Slot;
use volrep::extents::ExtentMap;

const EACH: u64 = 4096;

/// So many extents with as much room between them.
fn map(count: u64) -> ExtentMap<Slot> {
    let mut map = ExtentMap::default();
    (0..count).for_each(|i| map.insert(extent(2 * i * EACH, EACH), Slot { seq: i, at: Some(i * EACH) }));
    map
}

fn index(c: &mut Criterion) {
    for (name, count) in [("10k", 10_000u64), ("1M", 1_000_000)] {
        let mut group = c.benchmark_group(format!("index of {name}"));
        group.throughput(Throughput::Elements(1));
        let (full, mut numbers) = (map(count), Numbers::new());
        let slot = Slot { seq: 1 << 40, at: Some(0) };
        let id = BenchmarkId::from_parameter;
        group.bench_function(id("look up 8k"), |b| {
            b.iter(|| {
                full.overlaps(extent(2 * (numbers.next() % count) * EACH, 2 * EACH))
                    .map(|(e, _)| e.len())
                    .sum::<u64>()
            })
        });
        group.bench_function(id("look up what is not there"), |b| {
            b.iter(|| full.overlaps(extent((2 * (numbers.next() % count) + 1) * EACH, EACH)).count())
        });
        let mut changed = full.clone();
        group.bench_function(id("overwrite the same 4k"), |b| {
            b.iter(|| changed.insert(extent(2 * (numbers.next() % count) * EACH, EACH), black_box(slot)))
        });
        group.bench_function(id("insert between, and remove"), |b| {
            b.iter(|| {
                let between = extent((2 * (numbers.next() % count) + 1) * EACH, EACH);
                changed.insert(between, black_box(slot));
                changed.remove(between);
            })
        });
        group.bench_function(id("overwrite across two halves, and put back"), |b| {
            b.iter(|| {
                let at = 2 * (numbers.next() % count) * EACH;
                changed.insert(extent(at + EACH / 2, 2 * EACH), black_box(slot));
                changed.remove(extent(at, 3 * EACH));
                changed.insert(extent(at, EACH), slot);
                changed.insert(extent(at + 2 * EACH, EACH), slot);
            })
        });
        group.finish();
    }
}

criterion_group! { name = all; config = settings(); targets = index }
criterion_main!(all);

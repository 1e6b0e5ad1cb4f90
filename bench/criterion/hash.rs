//! Hashes: of a record's payload, and of the leaves, extents and windows that a refresh compares.
//!
//! `cargo bench --manifest-path bench/criterion/Cargo.toml --bench hash [-- FILTER]`

mod data;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use data::{Data, bytes, settings};
use std::hint::black_box;
use volrep::format::compare::{EXTENT, LEAF};
use volrep::resync::hash::{HashKey, hash, window_root};
use volrep::units::GroupId;

fn payloads(c: &mut Criterion) {
    let mut group = c.benchmark_group("payload");
    for len in [4 << 10, 64 << 10, 1 << 20] {
        let bytes = bytes(Data::Random, len);
        group.throughput(Throughput::Bytes(len as u64));
        let id = BenchmarkId::from_parameter(format!("{}k", len >> 10));
        group.bench_function(id, |b| b.iter(|| blake3::hash(black_box(&bytes))));
    }
    group.finish();
}

fn leaves(c: &mut Criterion) {
    let key = HashKey::of(GroupId([7; 16]));
    let mut group = c.benchmark_group("leaves and roots");
    let extent = EXTENT as usize;
    for (name, len) in
        [("leaf", LEAF as usize), ("extent", extent), ("8 extents", 8 * extent), ("64 extents", 64 * extent)]
    {
        let bytes = bytes(Data::Random, len);
        group.throughput(Throughput::Bytes(len as u64));
        group.bench_function(BenchmarkId::from_parameter(name), |b| b.iter(|| hash(&key, black_box(&bytes))));
    }
    group.finish();
    let mut group = c.benchmark_group("window's root");
    let roots: Vec<_> = (0..=255u8).map(|i| [i; 16]).collect();
    for (name, touched) in [("nothing touched", [0u8; 32]), ("half touched", [0x55; 32])] {
        group.bench_function(BenchmarkId::from_parameter(name), |b| {
            b.iter(|| window_root(&key, black_box(&roots), &touched))
        });
    }
    group.finish();
}

criterion_group! { name = all; config = settings(); targets = payloads, leaves }
criterion_main!(all);

//! From an epoch to a record and back: compression, hash, table; verification and unpacking.
//!
//! `cargo bench --manifest-path bench/criterion/Cargo.toml --bench encode [-- FILTER]`. Bytes are those that were written, before compression.

mod data;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use data::{ALL, Data, bytes, job, settings, stamp};
use std::hint::black_box;
use volrep::format::record::{Compressor, Record, encode, origin, seal};
use volrep::units::{GroupId, Lsn};

/// Payload, and bytes of one of its extents.
const SIZES: [(&str, usize, usize); 3] =
    [("4k", 4 << 10, 4 << 10), ("64k of 4k", 64 << 10, 4 << 10), ("1M", 1 << 20, 1 << 20)];
const LEVELS: [Option<i32>; 6] = [None, Some(-7), Some(-3), Some(-1), Some(1), Some(3)];

fn name(level: Option<i32>) -> String {
    level.map_or("raw".to_owned(), |level| format!("zstd {level}"))
}

fn encoding(c: &mut Criterion) {
    for (size, len, each) in SIZES {
        let mut group = c.benchmark_group(format!("encode {size}"));
        group.throughput(Throughput::Bytes(len as u64));
        for data in ALL {
            let payload = bytes(data, len);
            for level in LEVELS {
                let mut compressor = Compressor::default();
                let stored = encode(job(&payload, each, level), &mut compressor).padded_len();
                eprintln!("encode {size} {data:?} {}: {stored} bytes in the journal", name(level));
                group.bench_function(BenchmarkId::new(format!("{data:?}"), name(level)), |b| {
                    b.iter_batched(
                        || job(&payload, each, level),
                        |job| encode(job, &mut compressor),
                        BatchSize::SmallInput,
                    )
                });
            }
        }
        group.finish();
    }
}

/// What a shadow does with a record.
fn decoding(c: &mut Criterion) {
    let start = origin(GroupId([7; 16]));
    for (size, len, each) in SIZES {
        let mut group = c.benchmark_group(format!("decode {size}"));
        group.throughput(Throughput::Bytes(len as u64));
        for (data, level) in [(Data::Half, Some(1)), (Data::Rows, Some(1)), (Data::Random, None)] {
            let encoded = encode(job(&bytes(data, len), each, level), &mut Compressor::default());
            let wire = seal(encoded, stamp(Lsn(0), start)).wire();
            let id = |what: &str| BenchmarkId::new(what, format!("{data:?} {}", name(level)));
            group.bench_function(id("verify"), |b| {
                b.iter(|| Record::decode(black_box(wire.clone())).unwrap())
            });
            let record = Record::decode(wire).unwrap();
            group.bench_function(id("unpack"), |b| b.iter(|| black_box(&record).payload().unwrap()));
        }
        group.finish();
    }
}

criterion_group! { name = all; config = settings(); targets = encoding, decoding }
criterion_main!(all);

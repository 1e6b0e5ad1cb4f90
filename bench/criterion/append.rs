//! The journal: what the machine does for a record, and with it the writes and syncs that it asks for.
//!
//! `cargo bench --manifest-path bench/criterion/Cargo.toml --bench append [-- FILTER]`. The files are made in $VOLREP_BENCH_DIR (or the directory for temporary
//! files), and in /dev/shm if that is there. Each record is durable before the next.

mod data;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use data::{Data, bytes, job, settings, stamp};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use volrep::disk::DiskOp;
use volrep::format::record::{Compressor, Record, encode, origin, seal};
use volrep::format::superblock::Geometry;
use volrep::journal::cursor::Place;
use volrep::journal::{Journal, Tail};
use volrep::units::{Generation, GroupId, HistoryPoint, Lsn, Now};

const GROUP: GroupId = GroupId([7; 16]);
const GEOMETRY: Geometry = Geometry { segment: 16 << 20, segments: 16 };

/// A journal, and the file that it is kept in.
struct Bench {
    journal: Journal,
    file: Option<File>,
    requests: Vec<volrep::disk::DiskRequest>,
}

impl Bench {
    fn new(file: Option<File>) -> Bench {
        let point = HistoryPoint { lsn: Lsn(0), hash: origin(GROUP) };
        let tail = Tail { point, generation: Generation::default(), last_write: 0, time: 0, durable: Lsn(0) };
        let journal = Journal::new(1, GROUP, GEOMETRY, Place { segment: 1, offset: 0 }, Vec::new(), tail);
        Bench { journal, file, requests: Vec::new() }
    }

    /// The record after the newest.
    fn record(&self, payload: &[u8]) -> Record {
        let tail = self.journal.tail().point;
        seal(encode(job(payload, 1 << 20, None), &mut Compressor::default()), stamp(tail.lsn, tail.hash))
    }

    /// Appends it and makes it durable.
    fn append(&mut self, record: &Record) {
        let now = Now::default();
        self.journal.append(now, record, true, &mut self.requests);
        self.perform();
        self.journal.poll(now, 0, 0, &mut self.requests);
        self.perform();
        let durable = self.journal.durable();
        assert_eq!(durable, record.stamp.lsn);
        self.journal.keep_after(durable);
    }

    fn perform(&mut self) {
        for request in self.requests.drain(..) {
            match (&request.op, &self.file) {
                (DiskOp::Write { offset, data, dsync }, Some(file)) => {
                    file.write_all_at(data, *offset).expect("written");
                    if *dsync {
                        file.sync_data().expect("synced");
                    }
                }
                (DiskOp::Sync, Some(file)) => file.sync_data().expect("synced"),
                _ => {}
            }
            self.journal.complete(request.token.id(), Ok(bytes::Bytes::new())).expect("complete");
        }
    }
}

/// Where journals are made: what it is called, and the directory.
fn targets() -> Vec<(&'static str, Option<PathBuf>)> {
    let dir = std::env::var_os("VOLREP_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let shm = PathBuf::from("/dev/shm");
    let memory = shm.is_dir().then_some(("memory", Some(shm)));
    [("machine alone", None), ("disk", Some(dir))].into_iter().chain(memory).collect()
}

/// A journal of written zeroes, without the page cache where that works; it has no name any more.
fn file(dir: &std::path::Path) -> File {
    let path = dir.join(format!("volrep-bench-append-{}", std::process::id()));
    let open = |flags| {
        OpenOptions::new().read(true).write(true).create(true).truncate(false).custom_flags(flags).open(&path)
    };
    let plain = open(0).expect("a file");
    let zeroes = vec![0; 1 << 20];
    (0..GEOMETRY.len() >> 20)
        .for_each(|i| plain.write_all_at(&zeroes, i << 20).expect("room for the journal"));
    plain.sync_all().expect("synced");
    let file = open(nix::libc::O_DIRECT).unwrap_or(plain);
    std::fs::remove_file(&path).expect("removed");
    file
}

fn appending(c: &mut Criterion) {
    let mut group = c.benchmark_group("append and sync");
    for len in [4 << 10, 64 << 10, 1 << 20] {
        let payload = bytes(Data::Half, len);
        group.throughput(Throughput::Bytes(len as u64));
        for (what, dir) in targets() {
            let mut bench = Bench::new(dir.as_deref().map(file));
            group.bench_function(BenchmarkId::new(what, format!("{}k", len >> 10)), |b| {
                b.iter_custom(|rounds| {
                    let mut spent = Duration::ZERO;
                    for _ in 0..rounds {
                        let record = bench.record(&payload);
                        let begun = Instant::now();
                        bench.append(&record);
                        spent += begun.elapsed();
                    }
                    spent
                })
            });
        }
    }
    group.finish();
}

criterion_group! { name = all; config = settings(); targets = appending }
criterion_main!(all);

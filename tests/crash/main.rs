//! Crash points, one after the other: whatever reached the disks of a real pair of nodes is recorded, and for each
//! place in that record the power is cut once more.
//!
//! `cargo test --profile checked --test crash -- --trace NAME --images N --seed S --workers W`; `--program PATH` has
//! another build of volrep tried, such as one with a bug in it; VOLREP_LONG=1 is the long form. `--record` adds what was
//! run to RESULTS.md.
//!
//! The files of both nodes lie on a file system of the test's own (FUSE) that notes every write, sync, zeroing and
//! change of names, below the real daemons. A crash image holds what a sync had made durable, and of the rest
//! nothing, everything, or a random part with torn sectors. The real program recovers it, in a place of its own;
//! then the volume must be in a state that the write order has, at or after all that was promised, and whoever uses
//! it must be content: the kernel mounts it, fsck finds nothing, every file that was synced is there, PostgreSQL
//! recovers, amcheck and the page checksums find nothing, every acknowledged commit is there.
//!
//! What it does not see: pages of the mapped files (dirty maps, hash index) that the kernel writes back before a sync
//! asks for it; two nodes that lose their power at once are two images of one place, judged one by one.
//!
//! Shown with bugs planted (`tests/bugs`): 06, 14, 33 and 91 (recycle; 06 by a file missing on ext4, too), 09 (durable), 90
//! (durable, recycle). Not found: 46, in 100 images of `again`.
//!
//! Owns: the driver. Invariant: a wrong image is named with its place in the record, and kept.

mod cases;
#[path = "../descriptors/mod.rs"]
mod descriptors;
mod files;
mod image;
mod judge;
mod log;
#[allow(dead_code, reason = "the end to end tests use all of it")]
#[path = "../e2e/nbd.rs"]
mod nbd;
mod postgres;
mod prefix;
#[allow(dead_code, reason = "the simulator uses all of it")]
#[path = "../sim/prng.rs"]
mod prng;
mod recorder;
mod results;
mod stage;
mod traces;
mod writes;

use cases::Case;
use image::Disks;
use judge::{Judge, Laps, Verdict};
use log::Event;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use stage::NODES;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;
use traces::{Content, Line, Promised, Seen, Trace};

/// Images that are wrong, after which a trace is given up.
const ENOUGH: usize = 5;

struct Args {
    traces: Vec<String>,
    images: Option<usize>,
    seed: u64,
    workers: usize,
    long: bool,
    record: bool,
}

fn arguments() -> Args {
    let long = std::env::var_os("VOLREP_LONG").is_some_and(|v| v != "0");
    let mut args = Args { traces: Vec::new(), images: None, seed: 1, workers: 2, long, record: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || words.next().and_then(|n| n.parse().ok()).expect("a number follows");
        match &*word {
            "--trace" => args.traces.push(words.next().expect("a name follows")),
            "--images" => args.images = Some(number() as usize),
            "--seed" => args.seed = number(),
            "--program" => stage::use_program(words.next().expect("a path follows").into()),
            "--workers" => args.workers = number() as usize,
            "--record" => args.record = true,
            // Of the harness that this is not.
            "--show-output" | "--nocapture" => {}
            other => panic!("{other} is not understood: see the module's documentation"),
        }
    }
    if args.traces.is_empty() {
        args.traces = traces::NAMES.map(str::to_owned).to_vec();
    }
    args
}

/// Judges one image that was made.
fn judge(trace: &Trace, judge: &mut Judge, case: Case, promised: &Promised) -> Verdict<()> {
    let Case { node, promote, .. } = case;
    judge.recover(node, promote)?;
    judge.lap("recovery");
    let rot = trace.rot.as_ref().filter(|_| node == 1 && !promised.repaired);
    let state = prefix::state_of(&judge.volumes(node, &trace.volumes), rot);
    judge.lap("comparing");
    let seen = match (node, promote) {
        (0, _) => Seen::Primary,
        (_, false) => Seen::Shadow,
        (_, true) => Seen::Promoted,
    };
    for lines in &trace.lines[node] {
        let at = |line: &Line| (line.states.position(state), (line.least)(promised, seen));
        let found: Vec<_> = lines.iter().map(at).collect();
        if !found.iter().any(|(position, least)| position.is_some() && *position >= *least && least.is_some())
        {
            return Err(format!("its place in the write order, and the least that it may be: {found:?}"));
        }
    }
    let kept = if node == 0 || (promote && trace.sync) { promised.kept[0] } else { 0 };
    match trace.content {
        Content::Bytes => Ok(()),
        Content::Files(kind) => {
            judge.mounted((node, trace.volumes[0]), kind, |_, at| files::look(at, kept))?;
            judge.lap("mounting");
            judge.checked((node, trace.volumes[0]), kind)?;
            judge.lap("fsck");
            Ok(())
        }
        Content::Postgres => {
            judge.mounted((node, "data"), "ext4", |judge, data| {
                judge.mounted((node, "wal"), "ext4", |judge, _| postgres::look(judge, data, kept))
            })?;
            trace.volumes.iter().try_for_each(|v| judge.checked((node, v), "ext4"))?;
            judge.lap("fsck");
            Ok(())
        }
    }
}

/// Where wrong images are kept.
fn kept_images() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("crash")
}

struct Outcome {
    images: usize,
    laps: Laps,
    wrong: Vec<String>,
}

fn work(
    trace: &Trace,
    root: &Path,
    cases: &[Case],
    promises: &[Promised],
    wrong: &Mutex<Vec<String>>,
) -> (usize, Laps) {
    // A program that the other worker starts must not hold what is mounted here.
    descriptors::own_descriptors();
    let mut worker = Judge::new(root, &root.parent().unwrap().parent().unwrap().join("disk"));
    let mut disks = Disks::new(trace.recording.clone());
    let mut done = 0;
    for case in cases {
        disks.advance(case.place);
        let dir = trace.recording.find(NODES[case.node]);
        let mut make = |target: &Path, worker: &Judge| {
            disks.image(dir, target, case.survival, &|name, bytes| worker.edit(name, bytes)).unwrap();
        };
        worker.lap("");
        make(&worker.place(case.node), &worker);
        worker.lap("making");
        done += 1;
        if done % 250 == 0 {
            eprintln!("{}: {done} of {}", trace.name, cases.len());
        }
        let Err(why) = judge(trace, &mut worker, *case, &promises[case.place]) else { continue };
        let target = kept_images().join(format!("{}-{}-{}", trace.name, case.place, NODES[case.node]));
        let _ = std::fs::remove_dir_all(&target);
        make(&target, &worker);
        let mut wrong = wrong.lock().unwrap();
        wrong.push(format!("{} {case:?}: {why}\n    the image: {}", trace.name, target.display()));
        if wrong.len() >= ENOUGH {
            break;
        }
    }
    (done, worker.laps())
}

fn enumerate(trace: &Trace, root: &Path, args: &Args, rounds: usize) -> Outcome {
    let images = args.images.unwrap_or(trace.images(args.long)).div_ceil(rounds);
    let promises = traces::promises(trace);
    let cases = cases::choose(trace, &promises, images, args.seed);
    let wrong = Mutex::new(Vec::new());
    let part = cases.len().div_ceil(args.workers).max(1);
    let (images, laps) = std::thread::scope(|scope| {
        let workers = cases.chunks(part).enumerate().map(|(i, cases)| {
            let (root, promises, wrong) = (root.join(format!("ram/w{i}")), &promises, &wrong);
            scope.spawn(move || work(trace, &root, cases, promises, wrong))
        });
        let workers: Vec<_> = workers.collect();
        let mut laps = Laps::default();
        let images = workers.into_iter().map(|w| w.join().unwrap()).map(|(images, more)| {
            more.into_iter().for_each(|(name, s)| *laps.entry(name).or_default() += s);
            images
        });
        (images.sum(), laps)
    });
    Outcome { images, laps, wrong: wrong.into_inner().unwrap() }
}

/// What a recording is made of.
fn summary(trace: &Trace) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut bytes = 0;
    for event in &trace.recording.log {
        let name = match event {
            Event::Write { data, .. } => {
                bytes += data.len();
                "writes"
            }
            Event::Zero { .. } => "zeroings",
            Event::Sync { .. } => "syncs",
            Event::Name { .. } | Event::SyncNames { .. } | Event::Size { .. } => "others",
            Event::Answered(_) | Event::Mark(_) => continue,
        };
        *counts.entry(name).or_default() += 1;
    }
    let counts: Vec<_> = counts.iter().map(|(name, n)| format!("{n} {name}")).collect();
    let places: usize = trace.nodes().into_iter().map(|node| cases::places(trace, node).len()).sum();
    format!(
        "{}, {} MiB; {places} places, {} states",
        counts.join(", "),
        bytes >> 20,
        trace.lines[0][0][0].states.len()
    )
}

/// Records a trace and judges its images; whether all are right.
fn try_trace(name: &str, root: &Path, args: &Args, (round, rounds): (u64, u64)) -> bool {
    let begun = Instant::now();
    let trace = traces::record(name, root, args.long, args.seed + round);
    println!("{name}: recorded in {:.1} s: {}", begun.elapsed().as_secs_f64(), summary(&trace));
    let begun = Instant::now();
    let Outcome { images, laps, wrong } = enumerate(&trace, root, args, rounds as usize);
    let took = begun.elapsed().as_secs_f64();
    let each = |(name, s): (&&str, &f64)| format!("{name} {:.0}", s * 1000.0 / images.max(1) as f64);
    let laps = laps.iter().map(each).collect::<Vec<_>>().join(", ");
    println!("{name}: {images} images in {took:.1} s (ms each: {laps}), {} wrong", wrong.len());
    wrong.iter().for_each(|w| println!("FAILED {w}"));
    if args.record {
        let database = matches!(trace.content, Content::Postgres);
        results::add(name, args.seed + round, images, database, wrong.len());
    }
    wrong.is_empty()
}

fn possible() -> bool {
    let devices = ["/dev/fuse", "/dev/loop-control"].iter().all(|p| Path::new(p).exists());
    let programs = ["mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair"];
    let there = |p: &&str| ["/usr/sbin", "/sbin"].iter().any(|d| Path::new(d).join(p).exists());
    nix::unistd::geteuid().is_root() && devices && programs.iter().all(there)
}

fn main() {
    let args = arguments();
    if !possible() {
        println!("skipped: crash images need root, /dev/fuse, loop devices, e2fsprogs and xfsprogs");
        return println!("test result: ok. 0 passed; 0 failed");
    }
    // What is mounted here is seen by nobody else, and goes away with this process.
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let root = scratch.path().canonicalize().unwrap();
    // A database is another user's.
    std::fs::set_permissions(&root, std::fs::Permissions::from_mode(0o755)).unwrap();
    stage::scratch(&root);
    let _ = std::fs::remove_dir_all(kept_images());
    let (mut passed, mut failed) = (0, 0);
    for name in &args.traces {
        if name == "postgres" && !postgres::possible() {
            println!("skipped: crash images of a database need postgresql-15");
            continue;
        }
        let rounds = traces::rounds(name, args.long);
        let right =
            (0..rounds).map(|round| try_trace(name, &root, &args, (round, rounds))).filter(|right| !right);
        let right = right.count() == 0;
        println!("test {name}_images ... {}", if right { "ok" } else { "FAILED" });
        match right {
            true => passed += 1,
            false => failed += 1,
        }
    }
    nix::mount::umount(&root.join("ram")).unwrap();
    let verdict = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {verdict}. {passed} passed; {failed} failed");
    if failed > 0 {
        // The directory is taken away first.
        drop(scratch);
        std::process::exit(1);
    }
}

//! What is recorded: each trace sets a pair up, works on it, and says what its images are judged by.
//!
//! Owns: nothing. Invariant: a trace's states are known exactly: by the records of the primary's journal, or by
//! the writes that the test itself made, one after the other, or by both.

use crate::log::{Event, Mark, Recording};
use crate::prefix::{Image, Prefixes, Rot, by_records, records};
use crate::stage::{Setup, Stage, run, until};
use crate::writes::Account;
use crate::{files, postgres};
use nix::mount::{MsFlags, mount, umount};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// What lies on the volumes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// A file system of this kind.
    Files(&'static str),
    /// A database on two of them, both ext4.
    Postgres,
    /// Nothing that anybody but the test knows.
    Bytes,
}

/// What had been promised at a place of the log.
#[derive(Clone, Copy, Default)]
pub struct Promised {
    pub kept: [u64; 2],
    pub durable: [u64; 2],
    pub applied: [u64; 2],
    pub promoting: bool,
    pub given_up: bool,
    pub repaired: bool,
}

/// States that a node's image may have, and the first of them that it must have reached, if it may have one at all.
pub struct Line {
    pub states: Arc<Prefixes>,
    pub least: fn(&Promised, Seen) -> Option<u64>,
}

/// How an image is looked at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Seen {
    /// As the node shows it that was the primary.
    Primary,
    /// As a shadow shows it.
    Shadow,
    /// After its promotion.
    Promoted,
}

/// A finished recording and what is known of it.
pub struct Trace {
    pub name: &'static str,
    pub content: Content,
    pub volumes: Vec<&'static str>,
    /// The shadow is in the sync set.
    pub sync: bool,
    pub recording: Arc<Recording>,
    /// Of each node: each must hold, by one of its lines.
    pub lines: [Vec<Vec<Line>>; 2],
    /// Of the shadow.
    pub rot: Option<Rot>,
}

impl Trace {
    /// How many images are made of it: in the long form 10,000 of file systems and 1,000 of databases at least.
    pub fn images(&self, long: bool) -> usize {
        match self.content {
            Content::Files(_) => {
                if long {
                    5_100
                } else {
                    120
                }
            }
            Content::Postgres => {
                if long {
                    1_050
                } else {
                    16
                }
            }
            Content::Bytes => {
                if long {
                    2_000
                } else {
                    80
                }
            }
        }
    }
}

/// The names of all traces.
pub const NAMES: [&str; 7] = ["ext4", "xfs", "postgres", "recycle", "durable", "refresh", "promote"];

/// Records one.
pub fn record(name: &str, root: &Path, long: bool) -> Trace {
    let times = if long { 4 } else { 1 };
    match name {
        "ext4" => file_system("ext4", root, 100 * times, false),
        "xfs" => file_system("xfs", root, 100 * times, true),
        "postgres" => database(root, 150 * times),
        "recycle" => bytes("recycle", root, 400 * times, false),
        "durable" => bytes("durable", root, 150 * times, true),
        "refresh" => refresh(root, 150 * times),
        "promote" => promote(root, 80 * times),
        _ => panic!("no trace {name}: there are {NAMES:?}"),
    }
}

fn mounted(stage: &Stage, device: &str, volume: &str, kind: &str) -> PathBuf {
    let at = stage.root().join("fs").join(volume);
    std::fs::create_dir_all(&at).unwrap();
    mount(Some(device), &at, Some(kind), MsFlags::empty(), None::<&str>).unwrap();
    at
}

fn file_system(kind: &'static str, root: &Path, steps: u64, sync: bool) -> Trace {
    let volumes: &[(&str, u64)] = if kind == "xfs" { &[("data", 32)] } else { &[("data", 24)] };
    let stage = Stage::new(root, &Setup { volumes, sync, both: false });
    let device = stage.attach(0, "fuse").remove(0);
    match kind {
        // So small a file system is for tests alone; these variables are how mkfs is told.
        "xfs" => run(Command::new("mkfs.xfs").args(["-q", &device]).envs([
            ("TEST_DIR", "1"),
            ("TEST_DEV", "1"),
            ("QA_CHECK_FS", "1"),
        ])),
        _ => run(Command::new("mkfs.ext4").args(["-q", &device])),
    };
    stage.settle(0);
    let names = stage.volumes().collect();
    let recording = stage.record(|stage| {
        let device = stage.attach(0, "fuse").remove(0);
        let at = mounted(stage, &device, "data", kind);
        stage.watched(|| files::work(&at, steps, &stage.recorder));
        umount(&at).unwrap();
        stage.settle(0);
    });
    by_journal(kind, Content::Files(kind), names, sync, recording)
}

fn database(root: &Path, commits: u64) -> Trace {
    let stage = Stage::new(root, &Setup { volumes: &[("data", 72), ("wal", 20)], sync: true, both: false });
    let attached = |stage: &Stage| -> [PathBuf; 2] {
        let devices = stage.attach(0, "fuse");
        [0, 1].map(|i| mounted(stage, &devices[i], ["data", "wal"][i], "ext4"))
    };
    for device in stage.attach(0, "fuse") {
        run(Command::new("mkfs.ext4").args(["-q", &device]));
    }
    let mounts = attached(&stage);
    postgres::make(&mounts[0], &mounts[1]);
    mounts.iter().for_each(|at| umount(at).unwrap());
    stage.settle(0);
    let names = stage.volumes().collect();
    let recording = stage.record(|stage| {
        let mounts = attached(stage);
        stage.watched(|| postgres::work(&mounts[0], commits, &stage.recorder));
        mounts.iter().for_each(|at| umount(at).unwrap());
        stage.settle(0);
    });
    by_journal("postgres", Content::Postgres, names, true, recording)
}

const TWO: &[(&str, u64)] = &[("data", 12), ("log", 4)];

/// What the primary holds at the begin, and the account of what is written from then on.
fn account(stage: &Stage, sizes: Vec<u64>) -> Account {
    let begin = stage.volumes().map(|v| std::fs::read(stage.place(0).join(v)).unwrap());
    Account::new(begin.collect(), sizes)
}

/// Bare writes on two volumes, many times the length of the journal.
fn bytes(name: &'static str, root: &Path, count: u64, sync: bool) -> Trace {
    let stage = Stage::new(root, &Setup { volumes: TWO, sync, both: false });
    let mut account = account(&stage, vec![12 * MIB, 4 * MIB]);
    let names: Vec<_> = stage.volumes().collect();
    let recording = stage.record(|stage| {
        stage.attach(0, "nbd-socket");
        stage.watched(|| account.work(&stage.nbd(0), &names, count, &stage.recorder, Mark::Kept));
        stage.settle(0);
    });
    let mut trace = by_journal(name, Content::Bytes, names, sync, recording);
    by_account(&mut trace, account);
    trace
}

/// The same, while what has rotted on the shadow is found and put back.
fn refresh(root: &Path, count: u64) -> Trace {
    let stage = Stage::new(root, &Setup { volumes: TWO, sync: false, both: false });
    let mut account = account(&stage, vec![8 * MIB, 4 * MIB]);
    let names: Vec<_> = stage.volumes().collect();
    // Where nothing is written.
    let (from, len) = (8 * MIB, 4 * MIB as usize);
    let good = vec![0; len];
    let mut bad = good.clone();
    for n in 0..60 {
        blake3::Hasher::new()
            .update(&[n])
            .finalize_xof()
            .fill(&mut bad[usize::from(n) * 65_536 % len..][..4096]);
    }
    let (offset, spoilt) = (from, bad.clone());
    let recording = stage.record_spoilt(
        |recorder| recorder.rot("db2/data", offset, &spoilt),
        |stage| {
            stage.attach(0, "nbd-socket");
            let refreshing = stage.command(0).args(["refresh", "g"]).spawn().unwrap();
            let mut refreshing = refreshing;
            stage.watched(|| account.work(&stage.nbd(0), &names, count, &stage.recorder, Mark::Kept));
            let status = until("the refresh ends", || refreshing.try_wait().unwrap());
            assert!(status.success(), "refresh: {status}");
            stage.recorder.mark(Mark::Repaired);
            stage.settle(0);
        },
    );
    let mut trace = by_journal("refresh", Content::Bytes, names, false, recording);
    by_account(&mut trace, account);
    trace.rot = Some(Rot { volume: 0, first: (from / 4096) as usize, good, bad });
    trace
}

/// The primary is lost with writes that only it holds, the shadow is promoted, and the old primary comes back.
fn promote(root: &Path, count: u64) -> Trace {
    let stage = Stage::new(root, &Setup { volumes: TWO, sync: false, both: true });
    let mut first = account(&stage, vec![12 * MIB, 4 * MIB]);
    let names: Vec<_> = stage.volumes().collect();
    let mut second = None;
    let recording = stage.record(|stage| {
        stage.attach(0, "nbd-socket");
        first.work(&stage.nbd(0), &names, count, &stage.recorder, Mark::Kept);
        until("the shadow has everything", || {
            let (a, b) = (stage.ask(0)?, stage.ask(1)?);
            (b.durable_lsn == a.tail_lsn && b.applied_lsn == a.tail_lsn).then_some(())
        });
        stage.kill(1);
        let mut there = first.fork();
        first.work(&stage.nbd(0), &names, count / 2, &stage.recorder, Mark::Kept);
        stage.kill(0);
        stage.start(1);
        stage.wait_peer(1, "Disconnected");
        stage.recorder.mark(Mark::Promoting);
        run(stage.command(1).args(["promote", "g", "--i-fenced-the-old-primary", "--yes"]));
        stage.attach(1, "nbd-socket");
        there.work(&stage.nbd(1), &names, count, &stage.recorder, Mark::KeptThere);
        stage.start(0);
        until("the old primary has heard of it", || (stage.ask(0)?.state == "Retired").then_some(()));
        stage.recorder.mark(Mark::GivingUp);
        run(stage.command(0).args(["rejoin", "g", "--yes"]));
        there.work(&stage.nbd(1), &names, count, &stage.recorder, Mark::KeptThere);
        stage.wait_peer(1, "UpToDate");
        stage.settle(1);
        second = Some(there);
    });
    let second = second.expect("it was done");
    let (first, second) = (Arc::new(first.states), Arc::new(second.states));
    let own = Line { states: first, least: |p, _| Some(p.kept[0]) };
    // Only once it has given its own up.
    let theirs = Line { states: second.clone(), least: |p, _| p.given_up.then_some(p.kept[0].min(1)) };
    let there = Line { states: second, least: |p, _| Some(p.kept[1]) };
    let lines = [vec![vec![own, theirs]], vec![vec![there]]];
    let recording = Arc::new(recording);
    let content = Content::Bytes;
    Trace { name: "promote", content, volumes: names, sync: false, recording, lines, rot: None }
}

/// A trace that is judged by the records of the first node's journal.
fn by_journal(
    name: &'static str,
    content: Content,
    volumes: Vec<&'static str>,
    sync: bool,
    recording: Recording,
) -> Trace {
    let journal = recording.find("db1/etc/state/g/journal");
    let begin = volumes.iter().map(|v| recording.bytes(recording.find(&format!("db1/{v}"))).to_vec());
    let states = Arc::new(by_records(&records(&recording, journal), Image::new(begin.collect())));
    let line = |least| vec![Line { states: states.clone(), least }];
    let primary = line(|p, _| Some(p.durable[0]));
    let shadow = line(|p, seen| Some(if seen == Seen::Promoted { p.durable[1] } else { p.applied[1] }));
    let lines = [vec![primary], vec![shadow]];
    Trace { name, content, volumes, sync, recording: Arc::new(recording), lines, rot: None }
}

/// Has it be judged by the test's own account, too.
fn by_account(trace: &mut Trace, account: Account) {
    let states = Arc::new(account.states);
    let line = |least| vec![Line { states: states.clone(), least }];
    trace.lines[0].push(line(|p, _| Some(p.kept[0])));
    trace.lines[1].push(match trace.sync {
        true => line(|p, seen| Some(if seen == Seen::Promoted { p.kept[0] } else { 0 })),
        false => line(|_, _| Some(0)),
    });
}

/// What was promised before each place.
pub fn promises(trace: &Trace) -> Vec<Promised> {
    let mut now = Promised::default();
    let mut all = Vec::with_capacity(trace.recording.log.len() + 1);
    for event in &trace.recording.log {
        all.push(now);
        let Event::Mark(mark) = event else { continue };
        match *mark {
            Mark::Kept(n) => now.kept[0] = now.kept[0].max(n),
            Mark::KeptThere(n) => now.kept[1] = now.kept[1].max(n),
            Mark::Told { node, durable, applied } => {
                now.durable[node] = now.durable[node].max(durable);
                now.applied[node] = now.applied[node].max(applied);
            }
            Mark::Promoting => now.promoting = true,
            Mark::GivingUp => now.given_up = true,
            Mark::Repaired => now.repaired = true,
        }
    }
    all.push(now);
    all
}

//! What is recorded: each trace sets a pair up, works on it, and says what its images are judged by.
//!
//! Owns: nothing. Invariant: a trace's states are known exactly: by the records of the primary's journal, or by
//! the writes that the test itself made, one after the other, or by both.

use crate::image::{Disks, Survival};
use crate::log::{Event, Mark, Recording};
use crate::prefix::{Image, Prefixes, Rot, by_records, records};
use crate::prng::Prng;
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
    pub read: bool,
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
    /// The nodes of which there are images.
    pub fn nodes(&self) -> Vec<usize> {
        [0, 1].into_iter().filter(|n| !self.lines[*n].is_empty()).collect()
    }

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
pub const NAMES: [&str; 8] = ["ext4", "xfs", "postgres", "recycle", "durable", "refresh", "promote", "again"];

/// How many times a trace is recorded, each time with its part of the images.
pub fn rounds(name: &str, long: bool) -> u64 {
    match (name, long) {
        ("again", false) => 2,
        ("again", true) => 12,
        _ => 1,
    }
}

/// Records one.
pub fn record(name: &str, root: &Path, long: bool, seed: u64) -> Trace {
    let times = if long { 4 } else { 1 };
    match name {
        "ext4" => ext4_images(root, 100 * times),
        "xfs" => xfs_images(root, 100 * times),
        "postgres" => postgres_images(root, 150 * times),
        "recycle" => recycle_images(root, 400 * times),
        "durable" => durable_images(root, 150 * times),
        "refresh" => refresh_images(root, 150 * times),
        "promote" => promote_images(root, 80 * times),
        "again" => again_images(root, seed),
        _ => panic!("no trace {name}: there are {NAMES:?}"),
    }
}

fn mounted(stage: &Stage, device: &str, volume: &str, kind: &str) -> PathBuf {
    let at = stage.root().join("fs").join(volume);
    std::fs::create_dir_all(&at).unwrap();
    mount(Some(device), &at, Some(kind), MsFlags::empty(), None::<&str>).unwrap();
    at
}

/// Files on ext4; the shadow is asynchronous.
fn ext4_images(root: &Path, steps: u64) -> Trace {
    file_system("ext4", root, steps, false)
}

/// Files on xfs; the shadow is in the sync set.
fn xfs_images(root: &Path, steps: u64) -> Trace {
    file_system("xfs", root, steps, true)
}

fn file_system(kind: &'static str, root: &Path, steps: u64, sync: bool) -> Trace {
    let volumes: &[(&str, u64)] = if kind == "xfs" { &[("data", 32)] } else { &[("data", 24)] };
    let stage = Stage::new(root, &Setup { volumes, sync, both: false, hasty: sync });
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

/// A database; the shadow is in the sync set.
fn postgres_images(root: &Path, commits: u64) -> Trace {
    let stage = Stage::new(
        root,
        &Setup { volumes: &[("data", 72), ("wal", 20)], sync: true, both: false, hasty: true },
    );
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

/// Bare writes on two volumes, many times the length of the journal: checkpoints, segments used again.
fn recycle_images(root: &Path, count: u64) -> Trace {
    bytes("recycle", root, count, false)
}

/// The same, with the shadow in the sync set.
fn durable_images(root: &Path, count: u64) -> Trace {
    bytes("durable", root, count, true)
}

fn bytes(name: &'static str, root: &Path, count: u64, sync: bool) -> Trace {
    let stage = Stage::new(root, &Setup { volumes: TWO, sync, both: false, hasty: true });
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
fn refresh_images(root: &Path, count: u64) -> Trace {
    let stage = Stage::new(root, &Setup { volumes: TWO, sync: false, both: false, hasty: false });
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
fn promote_images(root: &Path, count: u64) -> Trace {
    let stage = Stage::new(root, &Setup { volumes: TWO, sync: false, both: true, hasty: true });
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

/// A primary that recovers from one crash, and has the next one meanwhile or soon after.
fn again_images(root: &Path, seed: u64) -> Trace {
    let before = recycle_images(root, 150);
    let mut prng = Prng::new(seed);
    let log = &before.recording.log;
    let place = log.len() / 4 + prng.below(log.len() as u64 / 2) as usize;
    let promised = promises(&before)[place];
    let stage = Stage::again(root, TWO, |target| {
        let mut disks = Disks::new(before.recording.clone());
        disks.advance(place);
        let dir = before.recording.find("db1");
        disks.image(dir, target, Survival::Random(prng.next()), &|_, _| None).unwrap();
    });
    let states = before.lines[0][1][0].states.clone();
    let names: Vec<_> = stage.volumes().collect();
    let mut later = None;
    let recording = stage.record_alone(|stage| {
        stage.recorder.mark(Mark::Kept(promised.kept[0]));
        stage.attach(0, "nbd-socket");
        let mut account = Account::new(Account::read(&stage.nbd(0), TWO), vec![12 * MIB, 4 * MIB]);
        let position = states.position(account.state()).expect("what is served is in the write order");
        assert!(position >= promised.kept[0], "{position} is served, and {} was kept", promised.kept[0]);
        stage.recorder.mark(Mark::Read);
        account.work(&stage.nbd(0), &names, 60, &stage.recorder, Mark::KeptThere);
        stage.kill(0);
        later = Some(account);
    });
    let later = Arc::new(later.expect("it was done").states);
    // What was read does not revert.
    let own = Line { states, least: |p, _| (!p.read).then_some(p.kept[0]) };
    let then = Line { states: later, least: |p, _| Some(p.kept[1]) };
    let (recording, lines) = (Arc::new(recording), [vec![vec![own, then]], Vec::new()]);
    Trace { name: "again", content: Content::Bytes, volumes: names, sync: false, recording, lines, rot: None }
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
            Mark::Read => now.read = true,
        }
    }
    all.push(now);
    all
}

//! The scratch group of a measurement: its directories, its nodes, their daemons.
//!
//! Owns: everything that a measurement puts on disks and into memory, and the daemons. Invariants: all of it is gone when
//! this is dropped; it removes only what lies in directories of its own, which one process at a time holds; no daemon
//! outlives the command, not even one that is killed.

use super::plan::Plan;
use super::report::Spent;
use crate::cli::backing::Backing;
use crate::cli::config::{self, Config, Hooks, Peer, Span, Volume};
use crate::cli::failure::{Exit, Failure};
use crate::cli::hooks::LOOK;
use crate::cli::places::{PlaceArgs, Places};
use crate::cli::progress::Progress;
use crate::cli::setup::{self, NewNode};
use crate::cli::size::Size;
use crate::cli::{interrupt, remote};
use crate::control::{DeviceKind, Reply, Verb};
use crate::disk::aligned;
use crate::format::message::Role;
use crate::node::status::Status;
use crate::sys::process::end_with_parent;
use crate::units::{GroupId, NodeId};
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use nix::libc;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The scratch file, in its directory.
pub const VOLUME: &str = "volume";
/// The scratch group's name.
const GROUP: &str = "bench";
/// The shadow's.
const SHADOW: &str = "shadow";
/// How long a daemon may take to begin, and to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// See the module's documentation.
pub struct Scratch {
    /// The primary first.
    nodes: Vec<Node>,
    dirs: Dirs,
    volume: PathBuf,
}

/// Directories of our own, removed when dropped, the first one last.
struct Dirs {
    made: Vec<PathBuf>,
    /// Those above them that were missing; they stay if somebody else has put something there meanwhile.
    above: Vec<PathBuf>,
    /// One on each, held until the end: two nodes of a group on one machine share some of them.
    locks: Vec<Flock<File>>,
}

impl Drop for Dirs {
    fn drop(&mut self) {
        for dir in self.made.iter().rev() {
            let removed = std::fs::remove_dir_all(dir);
            if let Err(e) = removed.or_else(|e| if dir.exists() { Err(e) } else { Ok(()) }) {
                eprintln!("volrep: {} can't be removed: {e}: remove it yourself", dir.display());
            }
        }
        for dir in &self.above {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// The places of a scratch node.
pub fn places(state: &Path, run: &Path, shm: &Path) -> Result<Places, Failure> {
    let places = Places::resolve(&PlaceArgs {
        config: Some(state.join("config")),
        state_dir: Some(state.join("state")),
        run_dir: Some(run.to_owned()),
        shm_dir: Some(shm.to_owned()),
        dev_dir: Some(state.join("dev")),
    })?;
    places.check_sockets(GROUP)?;
    Ok(places)
}

impl Scratch {
    /// Makes the directories. What an earlier run left that was killed is removed.
    pub fn make(plan: &Plan) -> Result<Scratch, Failure> {
        let mut dirs = Dirs { made: Vec::new(), above: Vec::new(), locks: Vec::new() };
        let others = plan.directories().into_iter().filter(|d| *d != plan.state);
        for dir in std::iter::once(&*plan.state).chain(others) {
            if dirs.made.iter().any(|made| made == dir) {
                continue;
            }
            dirs.above.extend(dir.ancestors().skip(1).take_while(|a| !a.exists()).map(Path::to_owned));
            own_dir(dir)?;
            dirs.locks.push(lock(dir)?);
            dirs.made.push(dir.to_owned());
        }
        dirs.made.iter().try_for_each(|dir| clear(dir))?;
        Ok(Scratch { nodes: Vec::new(), dirs, volume: plan.disk.join(VOLUME) })
    }

    /// The scratch file.
    pub fn volume(&self) -> &Path {
        &self.volume
    }

    /// A file beside the scratch journal.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dirs.made[0].join(name)
    }

    /// Writes the scratch file, half of it compressible: neither run is to pay for its allocation.
    pub fn write_volume(&self, plan: &Plan) -> Result<(), Failure> {
        let fail = |e: io::Error| Failure::io("write", &self.volume, &e);
        let flags = if plan.direct { libc::O_DIRECT } else { 0 };
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).custom_flags(flags).open(&self.volume);
        let file = file.map_err(|e| match e.raw_os_error() {
            Some(libc::EINVAL) => {
                let what = format!("{} has no O_DIRECT, which the group's volume uses", plan.disk.display());
                Failure::new(Exit::Failure, what, "name a directory on a comparable disk with --dir")
            }
            _ => fail(e),
        })?;
        match fallocate(&file, FallocateFlags::empty(), 0, plan.size as i64) {
            Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => {}
            Err(e) => return Err(fail(e.into())),
        }
        let mut chunk = aligned(1 << 20);
        chunk.resize(1 << 20, 0);
        let mut noise = blake3::Hasher::new().update(b"volrep bench").finalize_xof();
        chunk.chunks_mut(4096).for_each(|block| noise.fill(&mut block[..2048]));
        let mut progress = Progress::new("writing the scratch file".to_owned(), plan.size);
        let mut at = 0;
        while at < plan.size {
            interrupt::check()?;
            let n = chunk.len().min((plan.size - at) as usize);
            // Each block is another one.
            chunk
                .chunks_mut(4096)
                .zip(at / 4096..)
                .for_each(|(b, i)| b[..8].copy_from_slice(&i.to_le_bytes()));
            file.write_all_at(&chunk[..n], at).map_err(fail)?;
            at += n as u64;
            progress.at(at);
        }
        file.sync_all().map_err(fail)
    }

    /// Sets the scratch group up on that file and serves it; its NBD URI.
    pub fn serve(&mut self, plan: &Plan) -> Result<String, Failure> {
        let port = plan.shadow.is_some().then(free_port).transpose()?;
        let (id, key) = (GroupId(setup::random()?), setup::random()?);
        let here = places(&plan.state, &plan.run, &plan.shm)?;
        let mut primary = like(plan, id, "primary", &self.volume)?;
        if let Some(port) = port {
            primary.listen = Some(format!("127.0.0.1:{port}"));
            primary.peers = vec![peer(SHADOW, None, plan.sync)];
        }
        self.node(plan, NewNode { role: Role::Primary, ..new(primary, key) }, here)?;
        if let (Some(dir), Some(port)) = (&plan.shadow, port) {
            let there = places(dir, &plan.run.join(SHADOW), &plan.shm.join(SHADOW))?;
            let mut shadow = like(plan, id, SHADOW, &dir.join(VOLUME))?;
            shadow.peers = vec![peer("primary", Some(format!("127.0.0.1:{port}")), false)];
            let mut new = NewNode { role: Role::Shadow, ..new(shadow, key) };
            new.backings[0].create = true;
            self.node(plan, new, there)?;
            super::say("the shadow's first copy");
            self.until(PATIENCE + Duration::from_secs(plan.size >> 24), |nodes| {
                Ok(nodes[1].status()?.state == "UpToDate")
            })?;
        }
        self.nodes[0].attach()
    }

    /// Creates a node and starts its daemon.
    fn node(&mut self, plan: &Plan, new: NewNode, places: Places) -> Result<(), Failure> {
        setup::create(&new, &places)?;
        let name = if new.role == Role::Primary { "primary" } else { SHADOW };
        let node = Node::start(name, places, self.file(&format!("{name}.log")))?;
        debug_assert_eq!(new.config.compression, plan.config.compression);
        self.nodes.push(node);
        let begun = Instant::now();
        loop {
            interrupt::check()?;
            let node = self.nodes.last_mut().expect("just pushed");
            match node.status() {
                Ok(_) => return Ok(()),
                Err(e) if node.has_ended() || begun.elapsed() > PATIENCE => return Err(node.broken(&e)),
                Err(_) => std::thread::sleep(LOOK),
            }
        }
    }

    /// Waits until the backing, and the shadow's, hold everything: how long that took; `None`: longer than `limit`.
    pub fn settle(&mut self, limit: Duration) -> Result<Option<Duration>, Failure> {
        let begun = Instant::now();
        let done = self.until(limit, |nodes| {
            let primary = nodes[0].status()?;
            let behind = |s: &Node| Ok(s.status()?.applied_lsn < primary.tail_lsn);
            let behind = nodes[1..].iter().map(behind).collect::<Result<Vec<_>, Failure>>()?;
            Ok(primary.cache_used == 0 && !behind.contains(&true))
        });
        match done {
            Ok(()) => Ok(Some(begun.elapsed())),
            Err(e) if e.exit == Exit::Busy => Ok(None),
            Err(e) => Err(e),
        }
    }

    fn until(&self, limit: Duration, done: impl Fn(&[Node]) -> Result<bool, Failure>) -> Result<(), Failure> {
        let begun = Instant::now();
        while !done(&self.nodes)? {
            interrupt::check()?;
            if begun.elapsed() > limit {
                let what = format!("the scratch group was not ready within {} s", limit.as_secs());
                return Err(Failure::new(
                    Exit::Busy,
                    what,
                    "the machine is very busy: try again, or a smaller --size",
                ));
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// The shadow, if there is one.
    pub fn shadow(&self) -> Option<&Node> {
        self.nodes.get(1)
    }

    /// What the daemons have used so far.
    pub fn spent(&self) -> Result<Vec<Spent>, Failure> {
        self.nodes.iter().map(Node::spent).collect()
    }
}

/// A scratch node's configuration: the group's, but for what names it.
fn like(plan: &Plan, group: GroupId, name: &str, volume: &Path) -> Result<Config, Failure> {
    Ok(Config {
        group,
        node_id: NodeId(u64::from_be_bytes(setup::random()?).max(1)),
        node: name.to_owned(),
        listen: None,
        key_file: format!("{GROUP}.key").into(),
        apply_delay: Span::default(),
        fence_hook: None,
        hooks: Hooks::default(),
        journal: plan.journal.clone(),
        volumes: vec![Volume {
            name: "data".to_owned(),
            path: volume.to_owned(),
            size: Size(plan.size),
            direct: plan.direct,
        }],
        peers: Vec::new(),
        ..plan.config.clone()
    })
}

fn peer(name: &str, address: Option<String>, sync: bool) -> Peer {
    Peer { name: name.to_owned(), dial: Some(address.is_some()), address, sync, cascade: false }
}

fn new(config: Config, key: [u8; config::KEY]) -> NewNode<'static> {
    let v = &config.volumes[0];
    let backing = Backing { name: v.name.clone(), path: v.path.clone(), size: v.size.0, create: false };
    NewNode { group: GROUP, config, key, role: Role::Primary, backings: vec![backing], blank: false }
}

fn free_port() -> Result<u16, Failure> {
    let listener = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr());
    let fail = |e| Failure::new(Exit::Failure, format!("no port on 127.0.0.1: {e}"), "leave --shadow away");
    listener.map(|at| at.port()).map_err(fail)
}

/// Makes a directory that nobody else uses, or finds it again.
fn own_dir(dir: &Path) -> Result<(), Failure> {
    let mut builder = DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(dir);
    let found =
        made.and_then(|()| std::fs::symlink_metadata(dir)).map_err(|e| Failure::io("create", dir, &e))?;
    if found.is_dir() && found.uid() == nix::unistd::geteuid().as_raw() {
        return Ok(());
    }
    let what = format!("{} is there, and belongs to somebody else", dir.display());
    Err(Failure::new(Exit::Busy, what, "remove it"))
}

/// One measurement of a group at a time.
fn lock(dir: &Path) -> Result<Flock<File>, Failure> {
    let busy = || {
        let what = format!("another `volrep bench` of this group is running: it has {}", dir.display());
        Failure::new(Exit::Busy, what, "wait for it")
    };
    let file = File::open(dir).map_err(|e| Failure::io("open", dir, &e))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| busy())?;
    // The other one may have removed it as it ended.
    let (here, there) = (lock.metadata(), std::fs::symlink_metadata(dir));
    let same = matches!((here, there), (Ok(a), Ok(b)) if (a.dev(), a.ino()) == (b.dev(), b.ino()));
    if same { Ok(lock) } else { Err(busy()) }
}

/// Removes what an earlier run has left.
fn clear(dir: &Path) -> Result<(), Failure> {
    let fail = |e| Failure::io("clear", dir, &e);
    for entry in std::fs::read_dir(dir).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let whole = entry.file_type().map_err(fail)?.is_dir();
        let removed =
            if whole { std::fs::remove_dir_all(entry.path()) } else { std::fs::remove_file(entry.path()) };
        removed.map_err(fail)?;
    }
    Ok(())
}

/// A scratch node and its daemon, which is killed when this is dropped: what it serves is thrown away.
pub struct Node {
    name: &'static str,
    places: Places,
    child: Child,
    log: PathBuf,
}

impl Drop for Node {
    fn drop(&mut self) {
        // It has ended already, at the worst.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Node {
    fn start(name: &'static str, places: Places, log: PathBuf) -> Result<Node, Failure> {
        let stderr = File::create(&log).map_err(|e| Failure::io("create", &log, &e))?;
        // Not by its path: the program may have been replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("volrep").args(["serve", GROUP]).args(places.arguments());
        // This service manager's READY is for the group's own daemon.
        command.env_remove("NOTIFY_SOCKET").env_remove("WATCHDOG_USEC");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).process_group(0);
        end_with_parent(&mut command);
        let child = command.spawn();
        let fail = |e| {
            Failure::new(Exit::Failure, format!("the scratch daemon can't be started: {e}"), "report this")
        };
        Ok(Node { name, places, child: child.map_err(fail)?, log })
    }

    fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Why it does not serve, in its own words.
    fn broken(&self, e: &Failure) -> Failure {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let said: Vec<&str> = log.lines().rev().take(3).collect();
        let said = said.into_iter().rev().collect::<Vec<_>>().join("; ");
        Failure::new(
            Exit::Failure,
            format!("the scratch {} does not serve: {}: {said}", self.name, e.what),
            "see above",
        )
    }

    /// Its state.
    pub fn status(&self) -> Result<Box<Status>, Failure> {
        match remote::ask(&self.places, GROUP, Verb::Status, Some(PATIENCE))? {
            Reply::Status { status } => Ok(status),
            _ => Err(remote::odd(GROUP)),
        }
    }

    fn attach(&self) -> Result<String, Failure> {
        let verb = Verb::Attach { device: DeviceKind::NbdSocket };
        match remote::ask(&self.places, GROUP, verb, Some(PATIENCE))? {
            Reply::Attached { volumes, .. } if volumes.len() == 1 => Ok(volumes[0].device.clone()),
            _ => Err(remote::odd(GROUP)),
        }
    }

    /// What its daemon has used so far.
    fn spent(&self) -> Result<Spent, Failure> {
        let proc = PathBuf::from(format!("/proc/{}", self.child.id()));
        let read = |name: &str| {
            let path = proc.join(name);
            std::fs::read_to_string(&path).map_err(|e| Failure::io("read", &path, &e))
        };
        let status = self.status()?;
        let (stat, io) = (read("stat")?, read("io")?);
        // After the name, which may hold anything: user and system time are the 12th and 13th.
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let ticks: u64 = fields.skip(11).take(2).filter_map(|n| n.parse::<u64>().ok()).sum();
        let hertz = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
        let disk =
            io.lines().find_map(|l| l.strip_prefix("write_bytes: ")).and_then(|n| n.trim().parse().ok());
        Ok(Spent {
            name: self.name,
            cpu_seconds: ticks as f64 / hertz as f64,
            disk_bytes: disk.unwrap_or(0),
            journal_bytes: status.journal_bytes,
            wire_bytes: status.peers.iter().map(|p| p.sent_bytes).sum(),
        })
    }
}

//! The world of one run: hosts, clocks, the queue of what is to come, and how a process lives and dies.
//!
//! Owns: virtual time and every host. Invariant: things happen one at a time in the order (time,
//! sequence), and everything that is random comes from the seed.

use crate::disk::Disk;
use crate::history::History;
use crate::memory::Slot;
use crate::model::Model;
use crate::net::Network;
use crate::plan::{Fault, Plan};
use crate::prng::{Prng, splitmix};
use crate::scenario::Scenario;
use crate::trace::Trace;
use crate::workload::Workload;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::rc::Rc;
use volrep::disk::{File, Token};
use volrep::format::message::Role;
use volrep::format::record::{Compressor, Encoded, origin};
use volrep::format::salvage::Head;
use volrep::format::superblock::{Anchor, Geometry, SLOT, Superblock, Volume};
use volrep::node::config::{NodeConfig, PeerConfig, VolumeConfig};
use volrep::node::event::{Actions, AdminId, AdminOp, Event};
use volrep::node::status::Status;
use volrep::node::{Memories, Node};
use volrep::resync::hash::Product;
use volrep::units::{Address, Extent, Generation, GroupId, HistoryPoint, Lsn, NodeId, Now, SECONDS, Term};

/// A broken promise.
#[derive(Clone, Debug)]
pub struct Violation {
    /// Which: "I1".."I13", "liveness", "contract".
    pub invariant: &'static str,
    /// What was seen.
    pub text: String,
}

/// What a step of the simulator returns.
pub type Outcome = Result<(), Violation>;

/// Fails a check.
pub fn broken<T>(invariant: &'static str, text: impl Into<String>) -> Result<T, Violation> {
    Err(Violation { invariant, text: text.into() })
}

/// What is to come.
pub enum Coming {
    /// The scenario looks around.
    Tick,
    /// The workload submits.
    Submit,
    /// A node's deadline.
    Wake { node: usize, wish: u64 },
    /// A disk request is done.
    Disk { node: usize, incarnation: u32, ticket: u64 },
    /// An encoder is done.
    Encoded { node: usize, incarnation: u32, token: Token, encoded: Encoded },
    /// A comparison's work is done.
    Compared { node: usize, incarnation: u32, token: Token, product: Product },
    /// The shell is done with opening a stage, or making one.
    Stage { node: usize, incarnation: u32, fresh: bool },
    /// A dial ends, one way or the other.
    Dialed { node: usize, incarnation: u32, peer: usize },
    /// An end of a connection learns that it stands.
    Up { connection: u64, side: usize },
    /// A frame arrives.
    Arrive { connection: u64, side: usize },
    /// An end of a connection learns that it is gone.
    Down { connection: u64, side: usize },
    /// A host starts its process again.
    Boot { node: usize },
    /// What was asked of a node is done. (Never handled within the step that answered it: what the
    /// same step asked for comes first.)
    Granted { node: usize, incarnation: u32, purpose: Purpose },
    /// Time to ask for `Open` again.
    Ask { node: usize, incarnation: u32 },
    /// A part of the image came back.
    Verified { node: usize, incarnation: u32, extent: Extent, bytes: Bytes, tick: u64 },
    /// Something befalls a shadow in the middle of its resync.
    Ambush { node: usize, fault: Fault },
    /// A primary that drains is told to detach.
    Detach { node: usize },
    /// The shell has written a part of a salvage file.
    Salvaged { node: usize, incarnation: u32, end: bool },
    /// The user of a view goes on.
    View { node: usize, incarnation: u32 },
    /// A node that is being promoted dies.
    Fall { node: usize, incarnation: u32, power: bool },
    /// A partition ends.
    Heal { pair: (usize, usize) },
}

/// What a host asked of its node and waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// `Open` of a primary.
    Open,
    /// `Drain`.
    Drain,
    /// The same, in the middle of everything.
    Detach,
    /// `Shutdown`, then start again.
    Shutdown,
    /// `Promote`.
    Promote,
    /// `Status`.
    Status,
    /// `Refresh`.
    Refresh,
    /// `Switchover`.
    Switchover,
    /// `Rejoin`.
    Rejoin,
    /// `View`.
    View,
    /// `ViewClose`.
    ViewClose,
    /// `Mark`.
    Mark,
    /// `Outdate`.
    Outdate,
}

/// A machine.
pub struct Host {
    /// Its node's identity.
    pub id: NodeId,
    /// Its configuration, but for the boot id.
    pub config: NodeConfig,
    /// Its files.
    pub disk: Disk,
    ring: Slot,
    /// Its dirty maps.
    pub maps: Slot,
    /// Its hash index.
    pub index: Slot,
    /// What it has given up: the head of each salvage file, its records, and whether it was finished.
    pub salvage: Vec<(Head, Vec<Bytes>, bool)>,
    /// What has befallen it, as kept.
    pub kept: crate::marks::Kept,
    /// What was spoilt on its disk.
    pub rot: crate::compare::Rot,
    /// Syncs of mapped files in flight, by ticket.
    pub map_syncs: BTreeMap<u64, (Slot, u64)>,
    /// What says which sectors are in the stage, if there is one.
    pub stage: Option<Slot>,
    /// Its process, while it runs.
    pub node: Option<Node>,
    /// Counts processes.
    pub incarnation: u32,
    /// Ahead of virtual time.
    mono_base: u64,
    /// Wall clock minus virtual time, ns.
    pub wall_base: u64,
    wish: u64,
    /// It will never run again.
    pub gone: bool,
    /// Answers awaited.
    pub waiting: BTreeMap<u64, Purpose>,
    /// The last status.
    pub status: Option<Rc<Status>>,
    /// What checks know of it.
    pub watch: crate::watch::Watch,
    /// Disk slowness, times.
    pub slow: u64,
    /// It stays away until so many requests were submitted, or until that time.
    pub away: Option<(u64, u64)>,
    /// The view of it, as its user knows it.
    pub view: Option<crate::view::Seen>,
    /// Disk faults to come.
    pub armed: Vec<crate::perform::Armed>,
}

impl Host {
    /// The two clocks.
    pub fn now(&self, at: u64) -> Now {
        Now { mono: self.mono_base + at, wall: self.wall_base + at }
    }

    /// Its mapped files, for a process that begins.
    pub fn memories(&self) -> Memories {
        Memories { ring: Some(self.ring.lend()), maps: self.maps.lend(), index: self.index.lend() }
    }
}

/// A broken promise of the models, to see that the checks notice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sabotage {
    /// A sync of the journal makes nothing durable.
    LyingSync,
    /// A write to a backing is lost now and then.
    LostWrite,
    /// The write cache does not outlive the process.
    ForgetfulRing,
    /// A read of a backing returns another write's sector now and then.
    StaleRead,
}

/// Counters for the closing report.
#[derive(Default)]
pub struct Counts {
    /// Checks done, by invariant.
    pub checks: BTreeMap<&'static str, u64>,
    /// Faults injected and other things met, by name.
    pub met: BTreeMap<String, u64>,
}

impl Counts {
    /// One more check of an invariant.
    pub fn check(&mut self, invariant: &'static str) {
        *self.checks.entry(invariant).or_default() += 1;
    }
    /// One more of something.
    pub fn met(&mut self, name: &str) {
        match self.met.get_mut(name) {
            Some(n) => *n += 1,
            None => drop(self.met.insert(name.to_owned(), 1)),
        }
    }
}

/// One run.
pub struct World {
    /// What it does.
    pub plan: Plan,
    /// Virtual nanoseconds.
    pub now: u64,
    sequence: u64,
    queue: BTreeMap<(u64, u64), Coming>,
    /// Machines.
    pub hosts: Vec<Host>,
    /// Connections.
    pub net: Network,
    /// Contents.
    pub model: Model,
    /// Records.
    pub history: History,
    /// Marks.
    pub marks: crate::marks::Marks,
    /// When its records were sealed.
    pub sealed: crate::late::Sealed,
    /// Requests.
    pub work: Workload,
    /// Phases.
    pub scenario: Scenario,
    /// Of shadows.
    pub views: crate::view::Views,
    /// What happened.
    pub trace: Trace,
    /// For the report.
    pub counts: Counts,
    /// Draws for disks, links and latencies.
    pub rng: Prng,
    /// Compression contexts by level.
    pub compressors: BTreeMap<i32, Compressor>,
    next_admin: u64,
    /// What the models do wrong on purpose.
    pub sabotage: Option<Sabotage>,
    /// Which request is to fail.
    pub sweep: Option<crate::sweep::Sweep>,
}

const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];
/// Virtual time 0 on the wall.
const WALL: u64 = 1_790_000_000_000_000_000;

impl World {
    /// The run of a seed, before its first event.
    pub fn new(seed: u64, verbose: bool) -> World {
        let mut rng = Prng::new(seed);
        let plan = Plan::draw(&mut rng);
        World::planned(plan, rng, verbose)
    }

    /// The run of a plan, before its first event.
    pub fn planned(plan: Plan, mut rng: Prng, verbose: bool) -> World {
        let group = GroupId(rng.bytes16());
        let key = rng.bytes32();
        let ids: Vec<NodeId> = (0..plan.nodes).map(|_| NodeId(rng.next() | 1)).collect();
        let volumes: Vec<_> = plan.volumes.iter().map(|&(n, size, _)| (n, size)).collect();
        let model = Model::new(&volumes);
        let history = History::new(origin(group), &model);
        let hosts = (0..plan.nodes).map(|n| host(&plan, n, &ids, group, key, &mut rng)).collect();
        let work = Workload::new(rng.fork());
        let scenario = Scenario::new(rng.fork());
        let views = crate::view::Views::new(rng.fork());
        let mut world = World {
            plan,
            now: 0,
            sequence: 0,
            queue: BTreeMap::new(),
            hosts,
            net: Network::default(),
            model,
            history,
            marks: crate::marks::Marks::default(),
            sealed: crate::late::Sealed::default(),
            work,
            scenario,
            views,
            trace: Trace::new(verbose),
            counts: Counts::default(),
            rng,
            compressors: BTreeMap::new(),
            next_admin: 0,
            sabotage: None,
            sweep: None,
        };
        world.fill_volumes();
        world
    }

    /// What was on the volumes before volrep.
    fn fill_volumes(&mut self) {
        let before = self.plan.before.clone();
        for (turn, (number, first, sectors)) in
            before.iter().enumerate().flat_map(|(turn, list)| list.iter().map(move |e| (turn, *e)))
        {
            let volume = self.model.volume_index(number).expect("a volume of the plan");
            let address = Address::new(number, first * 512).expect("a small volume");
            let extent = Extent::new(address, sectors * 512).expect("whole sectors");
            let id = self.model.begin_write(extent, false);
            self.model.end_write(id, true, true);
            self.history.begin_with(volume, first, sectors, id);
            let mut bytes = vec![0; (sectors * 512) as usize];
            for (out, sector) in bytes.chunks_exact_mut(512).zip(first..) {
                crate::content::fill(out, id, number, sector, true);
            }
            for (n, host) in self.hosts.iter_mut().enumerate() {
                if n == 0 || (turn == 0 && self.plan.blank & (1 << n) == 0) {
                    host.disk.install(File::Backing(number), (first * 512) as usize, &bytes);
                }
            }
        }
    }

    /// Puts something into the future.
    pub fn at(&mut self, time: u64, coming: Coming) {
        self.sequence += 1;
        self.queue.insert((time.max(self.now), self.sequence), coming);
    }
    /// Puts something `delay` from now.
    pub fn after(&mut self, delay: u64, coming: Coming) {
        self.at(self.now + delay, coming);
    }

    /// Runs to the end.
    pub fn run(&mut self) -> Outcome {
        for node in 0..self.hosts.len() {
            let delay = self.rng.below(20_000_000);
            self.after(delay, Coming::Boot { node });
        }
        self.at(0, Coming::Tick);
        while let Some(((time, _), coming)) = self.queue.pop_first() {
            self.now = time;
            self.happen(coming)?;
            if self.scenario.over() {
                return Ok(());
            }
        }
        broken("contract", "the queue ran dry")
    }

    fn happen(&mut self, coming: Coming) -> Outcome {
        match coming {
            Coming::Tick => self.tick(),
            Coming::Submit => self.submit(),
            Coming::Wake { node, wish } => {
                if self.hosts[node].wish == wish && self.hosts[node].node.is_some() {
                    return self.step(node, Event::Wake);
                }
                Ok(())
            }
            Coming::Disk { node, incarnation, ticket } if self.lives(node, incarnation) => {
                self.disk_done(node, ticket)
            }
            Coming::Encoded { node, incarnation, token, encoded } if self.lives(node, incarnation) => {
                self.step(node, Event::Encoded { token, encoded })
            }
            Coming::Compared { node, incarnation, token, product } if self.lives(node, incarnation) => {
                self.step(node, Event::Compared { token, product })
            }
            Coming::Salvaged { node, incarnation, end } if self.lives(node, incarnation) => {
                let fault = self.sweep.as_mut().and_then(|s| s.strikes(node, 1, self.now));
                let result = match fault {
                    Some(_) => Err("no space left on device".to_owned()),
                    None => Ok(end.then(|| "a file".to_owned())),
                };
                self.step(node, Event::Salvaged { result })
            }
            Coming::Stage { node, incarnation, fresh } if self.lives(node, incarnation) => {
                self.stage_opened(node, fresh)
            }
            Coming::View { node, incarnation } if self.lives(node, incarnation) => self.view_goes_on(node),
            Coming::Stage { .. } | Coming::Salvaged { .. } | Coming::View { .. } => Ok(()),
            Coming::Dialed { node, incarnation, peer } if self.lives(node, incarnation) => {
                self.dialed(node, peer)
            }
            Coming::Granted { node, incarnation, purpose } if self.lives(node, incarnation) => {
                self.granted(node, purpose)
            }
            Coming::Verified { node, incarnation, extent, bytes, tick } if self.lives(node, incarnation) => {
                self.verified(node, extent, &bytes, tick)
            }
            Coming::Disk { .. }
            | Coming::Encoded { .. }
            | Coming::Compared { .. }
            | Coming::Dialed { .. } => Ok(()),
            Coming::Ask { node, incarnation }
                if self.lives(node, incarnation) && node == self.scenario.primary =>
            {
                self.ask(node, AdminOp::Open, Purpose::Open)
            }
            Coming::Granted { .. } | Coming::Verified { .. } | Coming::Ask { .. } => Ok(()),
            Coming::Up { connection, side } => self.link_up(connection, side),
            Coming::Arrive { connection, side } => self.arrive(connection, side),
            Coming::Down { connection, side } => self.link_down(connection, side),
            Coming::Ambush { node, fault } => self.strike(node, fault),
            Coming::Detach { node } => self.detach(node),
            Coming::Fall { node, incarnation, power } => {
                if self.lives(node, incarnation) {
                    self.counts.met("death while being promoted");
                    self.crash(node, power);
                }
                Ok(())
            }
            Coming::Boot { node } => self.boot(node),
            Coming::Heal { pair } => {
                if self.net.partitions.get(&pair).is_some_and(|until| *until <= self.now) {
                    self.net.partitions.remove(&pair);
                }
                Ok(())
            }
        }
    }

    /// Whether that process still runs.
    pub fn lives(&self, node: usize, incarnation: u32) -> bool {
        self.hosts[node].node.is_some() && self.hosts[node].incarnation == incarnation
    }

    /// Starts the process of a host.
    pub fn boot(&mut self, node: usize) -> Outcome {
        let at = self.now;
        if self.hosts[node].gone || self.hosts[node].node.is_some() {
            return Ok(());
        }
        if self.scenario.is_losing(node) {
            // Not before another was promoted.
            self.after(SECONDS, Coming::Boot { node });
            return Ok(());
        }
        if let Some((until, latest)) = self.hosts[node].away {
            if self.work.submitted < until && at < latest && self.scenario.is_working() {
                self.after(20_000_000, Coming::Boot { node });
                return Ok(());
            }
            self.hosts[node].away = None;
        }
        self.check_maps(node)?;
        self.check_index(node)?;
        self.note_slots(node);
        let host = &mut self.hosts[node];
        host.incarnation += 1;
        // Not drawn: every start has one of its own.
        host.config.salt = splitmix(&mut (at << 8 | node as u64)) as u32;
        let mut new = Node::new(host.config.clone(), host.memories());
        self.trace.note(at, node, "boot", [u64::from(host.incarnation), 0, 0]);
        host.watch.booted(at);
        let mut actions = Actions::default();
        new.start(host.now(at), &mut actions);
        host.node = Some(new);
        self.perform(node, actions)?;
        self.booted(node)
    }

    /// Gives a node an event and does what it asks.
    pub fn step(&mut self, node: usize, event: Event) -> Outcome {
        let host = &mut self.hosts[node];
        let Some(running) = &mut host.node else {
            return Ok(());
        };
        let now = Now { mono: host.mono_base + self.now, wall: host.wall_base + self.now };
        let mut actions = Actions::default();
        running.step(now, event, &mut actions);
        self.perform(node, actions)
    }

    /// The node's wish to be woken replaces the one before.
    pub fn wish(&mut self, node: usize, mono: Option<u64>) {
        let host = &mut self.hosts[node];
        host.wish += 1;
        let (wish, base) = (host.wish, host.mono_base);
        if let Some(mono) = mono {
            let late = self.rng.below(50_000);
            self.at(mono.saturating_sub(base).max(self.now) + late, Coming::Wake { node, wish });
        }
    }

    /// The number of the next request.
    pub fn next_ask(&self) -> u64 {
        self.next_admin + 1
    }

    /// Asks a node something; the answer is handled by purpose.
    pub fn ask(&mut self, node: usize, op: AdminOp, purpose: Purpose) -> Outcome {
        self.next_admin += 1;
        let id = self.next_admin;
        if purpose != Purpose::Status {
            self.trace.note(self.now, node, "ask", [id, purpose as u64, 0]);
        }
        self.hosts[node].waiting.insert(id, purpose);
        self.step(node, Event::Admin { id: AdminId(id), op })
    }

    /// The node's state, if it runs.
    pub fn poll(&mut self, node: usize) -> Result<Option<Rc<Status>>, Violation> {
        if self.hosts[node].node.is_none() {
            return Ok(None);
        }
        self.hosts[node].status = None;
        self.ask(node, AdminOp::Status, Purpose::Status)?;
        let status = self.hosts[node].status.clone();
        if status.is_none() && self.hosts[node].node.is_some() {
            return broken("contract", "Status was not answered at once");
        }
        Ok(status)
    }

    /// The process is gone: SIGKILL, its own end, or with its machine (`power`).
    pub fn kill(&mut self, node: usize, power: bool) {
        if self.hosts[node].node.is_none() && !power {
            return;
        }
        self.trace.note(self.now, node, if power { "power loss" } else { "kill" }, [0; 3]);
        let host = &mut self.hosts[node];
        (host.node, host.status, host.view) = (None, None, None);
        host.waiting.clear();
        host.map_syncs.clear();
        host.kept.crash(&mut self.rng);
        host.armed.clear();
        host.wish += 1;
        if power {
            host.disk.power_loss(&mut self.rng);
            host.maps.power_loss(&mut self.rng);
            host.index.power_loss(&mut self.rng);
            if let Some(stage) = &host.stage {
                stage.power_loss(&mut self.rng);
            }
            host.ring.clear();
            host.config.boot = self.rng.bytes16();
            host.mono_base = self.rng.below(1 << 40);
        } else {
            host.disk.kill(&mut self.rng);
            if self.sabotage == Some(Sabotage::ForgetfulRing) {
                host.ring.clear();
            }
        }
        self.views.forget(node);
        self.process_gone(node, power);
        self.disconnect_all(node, power);
    }
}

fn host(plan: &Plan, n: usize, ids: &[NodeId], group: GroupId, key: [u8; 32], rng: &mut Prng) -> Host {
    let geometry = Geometry { segment: plan.segment, segments: plan.segments };
    let mut files = vec![(File::Superblock, 2 * SLOT as u64, 4096), (File::Journal, geometry.len(), 4096)];
    files.extend(plan.volumes.iter().map(|&(v, size, block)| (File::Backing(v), size, block)));
    let mut disk = Disk::new(&files);
    for slot in 0..2 {
        let bytes = superblock(plan, n, ids, group, geometry, slot as u64 + 1).encode();
        disk.install(File::Superblock, slot * SLOT, &bytes);
    }
    let config = config(plan, n, ids, group, key, rng);
    let sizes: Vec<_> = plan.volumes.iter().map(|&(n, size, _)| (n, size)).collect();
    let maps = Slot::new(volrep::journal::maps::maps_len(&sizes) as usize);
    Host {
        id: ids[n],
        disk,
        ring: Slot::volatile(volrep::cache::ring_len(plan.cache) as usize),
        maps,
        salvage: Vec::new(),
        kept: crate::marks::Kept::default(),
        rot: crate::compare::Rot::default(),
        index: Slot::new(volrep::resync::index::index_len(&sizes) as usize),
        config,
        map_syncs: BTreeMap::new(),
        stage: None,
        node: None,
        incarnation: 0,
        mono_base: rng.below(1 << 40),
        wall_base: WALL + rng.below(4_000_000_000) - 2_000_000_000,
        wish: 0,
        gone: false,
        waiting: BTreeMap::new(),
        status: None,
        watch: crate::watch::Watch::default(),
        slow: 1,
        away: None,
        view: None,
        armed: Vec::new(),
    }
}

fn volume_name(number: u8) -> String {
    format!("v{number}")
}

fn config(
    plan: &Plan,
    n: usize,
    ids: &[NodeId],
    group: GroupId,
    key: [u8; 32],
    rng: &mut Prng,
) -> NodeConfig {
    let volume = |&(number, size, block): &(u8, u64, u64)| VolumeConfig {
        number,
        name: volume_name(number),
        size,
        block,
    };
    let peer = |p: usize| PeerConfig {
        name: NAMES[p].to_owned(),
        dial: plan.topology.dials(n, p),
        sync: n == 0 && plan.sync & (1 << p) != 0,
        cascade: plan.topology.cascades(n, p),
    };
    NodeConfig {
        group_name: "sim".to_owned(),
        group,
        node: ids[n],
        name: NAMES[n].to_owned(),
        volumes: plan.volumes.iter().map(volume).collect(),
        peers: (0..plan.nodes).filter(|p| *p != n).map(peer).collect(),
        key,
        boot: rng.bytes16(),
        salt: 0,
        full: plan.full,
        accept_lost_cache: false,
        apply_delay: plan.delay_of(n),
        level: plan.level,
        feed_bytes: plan.feed,
        batch_bytes: plan.batch,
        window_bytes: plan.window,
        timing: plan.timing,
    }
}

/// As `volrep init` and `volrep join` leave it.
fn superblock(
    plan: &Plan,
    n: usize,
    ids: &[NodeId],
    group: GroupId,
    geometry: Geometry,
    sequence: u64,
) -> Superblock {
    let role = if n == 0 { Role::Primary } else { Role::Shadow };
    let term = if n == 0 { Term { counter: 1, node: ids[0] } } else { Term::default() };
    let volume = |&(number, size, _): &(u8, u64, u64)| Volume { number, size, name: volume_name(number) };
    Superblock {
        sequence,
        group,
        node: ids[n],
        role,
        term,
        generation: Generation::default(),
        checkpoint: HistoryPoint { lsn: Lsn(0), hash: origin(group) },
        checkpoint_write: 0,
        checkpoint_generation: Generation::default(),
        checkpoint_segment: 1,
        base: Anchor::default(),
        base_segment: 1,
        floor: Lsn(0),
        limit: Lsn(0),
        blank: plan.blank & (1 << n) != 0,
        clean: true,
        consistent: n == 0 || plan.blank & (1 << n) != 0,
        cache_boot: [0; 16],
        geometry,
        volumes: plan.volumes.iter().map(volume).collect(),
        openings: Vec::new(),
        maps: Vec::new(),
        sync_set: Vec::new(),
        outdated: Vec::new(),
        peers: Vec::new(),
        maps_id: 0,
        retired: None,
        handed: None,
        resync: None,
        comparison: None,
        verified: None,
        unrepaired: 0,
        redo: None,
        cut: None,
    }
}

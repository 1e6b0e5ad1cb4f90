//! The Nth disk request of a node fails, once or from then on, for every N of a scenario.
//!
//! Owns: the scenarios, and the counting of requests. Invariants: whatever fails, the promises hold; a failed write
//! latches and is told (`fence`); after the disk is whole again everything comes to rest within the patience of the
//! simulator.
//!
//! `--sweep` runs an even sample of all cases, `--sweep-all` every one, `--sweep-one NAME:NODE:KIND:N:MODE` a
//! single one in every detail.

use crate::cascade::Topology;
use crate::disk::Fault as DiskFault;
use crate::plan::{Fault, Loss, Mix, Plan};
use crate::prng::Prng;
use crate::workers;
use crate::world::{Violation, World};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};
use volrep::node::config::{FullPolicy, Timing};
use volrep::units::{MICROS, MILLIS, SECONDS};

/// How long a disk that fails from then on does so.
const BROKEN: u64 = 4 * SECONDS;
/// Cases of the sample.
const SAMPLE: usize = 2700;
/// After so long a sample ends, whatever is left of it.
const LIMIT: Duration = Duration::from_secs(55);

/// What fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Any request, with EIO.
    Error,
    /// A write, with ENOSPC.
    Full,
    /// A sync, and what it should have covered is dropped.
    Sync,
}

const KINDS: [(Kind, &str); 3] = [(Kind::Error, "eio"), (Kind::Full, "enospc"), (Kind::Sync, "fsync")];

/// One case.
#[derive(Clone, Debug)]
pub struct Sweep {
    node: usize,
    kind: Kind,
    /// Which request of this kind, from 0.
    nth: u64,
    /// And all that follow.
    on: bool,
    seen: u64,
    /// When the first one failed.
    since: Option<u64>,
}

impl Sweep {
    /// A request of this kind (0 read, 1 write, 2 sync) of a node is done: does it fail?
    pub fn strikes(&mut self, node: usize, kind: u8, now: u64) -> Option<DiskFault> {
        let counts = match self.kind {
            Kind::Error => true,
            Kind::Full => kind == 1,
            Kind::Sync => kind == 2,
        };
        if node != self.node || !counts {
            return None;
        }
        let at = self.seen;
        self.seen += 1;
        let again = self.on && at > self.nth && self.since.is_some_and(|s| now < s + BROKEN);
        if at == self.nth {
            self.since = Some(now);
        } else if !again {
            return None;
        }
        let errno = if self.kind == Kind::Full { 28 } else { 5 };
        Some(DiskFault { errno, drops: self.kind == Kind::Sync })
    }
}

type Scenario = (&'static str, fn(&mut Plan));

/// Each begins with the start of the nodes, their joining, and ends with everything at rest.
const SCENARIOS: [Scenario; 15] = [
    ("write", |_| {}),
    ("checkpoint", |p| (p.timing.checkpoint_after, p.timing.write_back_after) = (MILLIS, 200 * MICROS)),
    ("recycling", |p| {
        (p.mix.largest, p.mix.rich, p.mix.requests, p.mix.depth) = (2000, 1000, 40, 2);
        (p.mix.zero, p.mix.hot) = (0, 0);
    }),
    ("join", |p| (p.sync, p.mix.flush) = (2, 400)),
    ("copy", |p| {
        (p.blank, p.before) = (0, [vec![(0, 100, 300)], vec![(0, 200, 900)]]);
    }),
    ("refresh", |p| p.faults = vec![(3, Fault::Rot), (8, Fault::Refresh), (14, Fault::Quick)]),
    ("resync", |p| {
        (p.mix.largest, p.mix.rich, p.mix.requests, p.mix.depth) = (2000, 1000, 40, 2);
        (p.mix.zero, p.full) = (0, FullPolicy::Behind);
        p.faults = vec![(4, Fault::Away)];
    }),
    ("promote", |p| p.promotion = Some((12, Loss::Forever, 1))),
    ("switchover", |p| (p.moves, p.faults) = (true, vec![(8, Fault::Switchover), (16, Fault::Switchover)])),
    ("rejoin", |p| (p.promotion, p.rejoin) = (Some((12, Loss::Power, 1)), true)),
    ("resolve", |p| {
        (p.nodes, p.promotion) = (3, Some((10, Loss::Kill, 1)));
        (p.rejoin, p.double) = (true, true);
    }),
    ("view", |p| {
        p.faults = vec![(3, Fault::View), (9, Fault::ViewClose), (12, Fault::View), (20, Fault::ViewClose)];
    }),
    ("restart", |p| {
        p.faults = vec![(6, Fault::RestartPrimary), (14, Fault::RestartShadow), (18, Fault::Mark)]
    }),
    ("cascade", |p| {
        (p.nodes, p.topology, p.faults) = (3, Topology::Chain, vec![(10, Fault::Refresh)]);
        (p.blank, p.before) = (0, [vec![(0, 100, 300)], vec![(0, 200, 900)]]);
    }),
    ("delayed", |p| {
        (p.nodes, p.topology, p.far_delay) = (3, Topology::Chain, Some(0));
        (p.apply_delay, p.rewind, p.rejoin) = (500 * MILLIS, true, true);
        p.promotion = Some((12, Loss::Power, 1));
    }),
];

/// The plan of a scenario: a small run without anything at random.
pub fn plan(scenario: &Scenario) -> Plan {
    let mut plan = Plan {
        nodes: 2,
        volumes: vec![(0, 1 << 20, 4096)],
        segment: 2 << 20,
        segments: 4,
        cache: 1 << 20,
        level: None,
        full: FullPolicy::Block,
        sync: 0,
        timing: Timing {
            seal_after: MILLIS,
            seal_bytes: 64 << 10,
            sync_after: 5 * MILLIS,
            heartbeat: 100 * MILLIS,
            silence: 600 * MILLIS,
            redial: 50 * MILLIS,
            write_back_after: 5 * MILLIS,
            checkpoint_after: 50 * MILLIS,
            ask: 50 * MILLIS,
        },
        feed: 1 << 20,
        window: 1 << 20,
        mix: Mix {
            depth: 4,
            requests: 24,
            largest: 16,
            read: 100,
            flush: 200,
            zero: 100,
            fua: 50,
            hot: 500,
            rich: 200,
            think: 2 * MILLIS,
        },
        faults: Vec::new(),
        before: Default::default(),
        ambush_drain: 0,
        ambush_start: 0,
        batch: 64 << 10,
        apply_delay: 0,
        far_delay: None,
        rewind: false,
        ambush_promotion: 0,
        blank: 0xff,
        ambush: 0,
        role_ambush: 0,
        slot_ambush: 0,
        patience: 0,
        promotion: None,
        moves: false,
        rejoin: false,
        double: false,
        rollback: None,
        apart: (MILLIS, MILLIS),
        topology: Topology::Star,
        disk_write: 200 * MICROS,
        disk_sync: MILLIS,
    };
    scenario.1(&mut plan);
    plan
}

/// Two nodes, a volume, and nothing that befalls them.
pub fn plain_plan() -> Plan {
    plan(&SCENARIOS[0])
}

fn run(scenario: &Scenario, sweep: Sweep, verbose: bool) -> (World, Option<Violation>) {
    let mut world = World::planned(plan(scenario), Prng::new(1), verbose);
    world.sweep = Some(sweep);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    let failure = match outcome {
        Ok(outcome) => outcome.err(),
        Err(_) => Some(Violation { invariant: "panic", text: crate::last_panic() }),
    };
    (world, failure)
}

fn case(node: usize, kind: Kind, nth: u64, on: bool) -> Sweep {
    Sweep { node, kind, nth, on, seen: 0, since: None }
}

fn name(scenario: &str, s: &Sweep) -> String {
    let kind = KINDS.iter().find(|(k, _)| *k == s.kind).map_or("", |(_, name)| name);
    format!("{scenario}:{}:{kind}:{}:{}", s.node, s.nth, if s.on { "on" } else { "once" })
}

/// Every case of a scenario: those of its requests that a run without faults makes.
fn cases(scenario: &Scenario) -> Result<Vec<Sweep>, String> {
    let mut all = Vec::new();
    for node in 0..plan(scenario).nodes {
        for (kind, _) in KINDS {
            let (world, failure) = run(scenario, case(node, kind, u64::MAX, false), false);
            if let Some(f) = failure {
                return Err(format!("{}: without a fault: {}: {}", scenario.0, f.invariant, f.text));
            }
            let seen = world.sweep.map_or(0, |s| s.seen);
            all.extend((0..seen).flat_map(|nth| [false, true].map(|on| case(node, kind, nth, on))));
        }
    }
    Ok(all)
}

/// Runs the cases, or an even sample of them: how many passed, and failed.
pub fn sweep(everything: bool) -> (u64, u64) {
    let begun = Instant::now();
    let mut all = Vec::new();
    for scenario in &SCENARIOS {
        match cases(scenario) {
            Ok(cases) => all.extend(cases.into_iter().map(|c| (scenario, c))),
            Err(text) => {
                println!("FAILED sweep {text}");
                return (0, 1);
            }
        }
    }
    let total = all.len();
    let step = if everything { 1 } else { total.div_ceil(SAMPLE) };
    let (mut ran, mut struck, mut failed) = (BTreeMap::<&str, u64>::new(), 0, 0);
    // Over all scenarios in turn, so that a machine too slow for all of it has seen some of each.
    let mut picked: Vec<_> = all.into_iter().step_by(step).enumerate().collect();
    picked.sort_by_key(|(i, _)| (i % 64, *i));
    let picked = picked.into_iter().take_while(|_| everything || begun.elapsed() <= LIMIT);
    let work = |(_, (scenario, case)): (usize, (&'static Scenario, Sweep))| {
        let text = name(scenario.0, &case);
        let (world, failure) = run(scenario, case, false);
        (scenario.0, text, world.sweep.is_some_and(|s| s.since.is_some()), failure)
    };
    workers::each(picked, work, |(scenario, text, hit, failure)| {
        *ran.entry(scenario).or_default() += 1;
        struck += u64::from(hit);
        if let Some(f) = failure {
            failed += 1;
            let first = f.text.lines().next().unwrap_or_default();
            println!("FAILED sweep {text}: {}: {first}", f.invariant);
            println!("repeat: cargo test --profile checked --test sim -- --sweep-one {text}");
        }
        true
    });
    let cases: u64 = ran.values().sum();
    let of: Vec<_> = ran.iter().map(|(name, n)| format!("{name} {n}")).collect();
    println!(
        "swept {cases} of {total} cases, {struck} struck, in {:.1} s: {}",
        begun.elapsed().as_secs_f64(),
        of.join(", ")
    );
    (cases - failed, failed)
}

/// Runs one case in every detail.
pub fn one(text: &str) -> (u64, u64) {
    let words: Vec<&str> = text.split(':').collect();
    let parsed = || {
        let [scenario, node, kind, nth, on] = words[..] else { return None };
        let scenario = SCENARIOS.iter().find(|(name, _)| *name == scenario)?;
        let kind = KINDS.iter().find(|(_, name)| *name == kind)?.0;
        Some((scenario, case(node.parse().ok()?, kind, nth.parse().ok()?, on == "on")))
    };
    let Some((scenario, case)) = parsed() else {
        println!("FAILED sweep {text}: no such case; scenarios: {:?}", SCENARIOS.map(|(name, _)| name));
        return (0, 1);
    };
    let (world, failure) = run(scenario, case, true);
    println!("plan: {:?}", world.plan);
    match failure {
        None => (1, 0),
        Some(f) => {
            println!("FAILED sweep {text}: {}: {}", f.invariant, f.text);
            (0, 1)
        }
    }
}

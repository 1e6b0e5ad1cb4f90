//! The simulator: whole groups of nodes on modelled disks, links and clocks, thousands of runs, each
//! repeatable from its seed.
//!
//! `cargo test --release --test sim -- --seeds N --start S --minutes M`, `-- --seed X` for one run in
//! every detail, `-- --twice` to run every seed a second time (otherwise every sixteenth).
//!
//! Owns: the driver. Invariant: a failure names its seed, the promise that was broken, what led to it,
//! and the command that repeats it.

mod bare_journal;
mod cascade;
mod compare;
mod content;
mod disk;
mod faults;
mod history;
mod marks;
mod memory;
mod model;
mod moves;
mod net;
mod perform;
mod plan;
mod prng;
mod rejoin;
mod rest;
mod scenario;
mod trace;
mod view;
mod watch;
mod workload;
mod world;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use world::{Counts, Sabotage, Violation, World};

/// Where and why the last panic was.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// The text of the last panic.
fn last_panic() -> String {
    PANIC.lock().unwrap_or_else(|e| e.into_inner()).clone()
}

struct Args {
    seeds: u64,
    start: u64,
    minutes: Option<u64>,
    one: Option<u64>,
    twice: bool,
    keep_going: bool,
}

fn args() -> Option<Args> {
    let seeds = if cfg!(debug_assertions) { 50 } else { 2000 };
    let mut a = Args { seeds, start: 1, minutes: None, one: None, twice: false, keep_going: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || {
            let value = words.next().and_then(|w| w.parse().ok());
            value.unwrap_or_else(|| panic!("{word} needs a number"))
        };
        match word.as_str() {
            "--seeds" => a.seeds = number(),
            "--start" => a.start = number(),
            "--minutes" => a.minutes = Some(number()),
            "--seed" => a.one = Some(number()),
            "--twice" => a.twice = true,
            "--keep-going" => a.keep_going = true,
            "--list" => {
                println!("sim: test");
                return None;
            }
            // What `cargo test` passes to every test binary: a flag of libtest, or a name filter.
            flag if flag.starts_with("--") => {}
            filter if "sim".contains(filter) => {}
            _ => return None,
        }
    }
    Some(a)
}

/// How a run ended.
struct Ran {
    world: World,
    hash: [u8; 32],
    failure: Option<Violation>,
}

fn run(seed: u64, verbose: bool, sabotage: Option<Sabotage>) -> Ran {
    let mut world = World::new(seed, verbose);
    world.sabotage = sabotage;
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    let failure = match outcome {
        Ok(outcome) => outcome.err(),
        Err(_) => Some(Violation { invariant: "panic", text: last_panic() }),
    };
    Ran { hash: world.trace.hash(), world, failure }
}

fn report(seed: u64, ran: &Ran, failure: &Violation) {
    if !ran.world.trace.verbose {
        println!("{}", ran.world.trace.tail());
    }
    println!("plan: {:?}", ran.world.plan);
    println!("FAILED seed {seed}: {}: {}", failure.invariant, failure.text);
    println!("repeat: cargo test --release --test sim -- --seed {seed}");
}

fn models() -> (u64, u64) {
    let checks: [(&str, fn()); 6] = [
        ("content", content::check),
        ("disk", disk::check),
        ("memory", memory::check),
        ("model", model::check),
        ("net", net::check),
        ("journal", bare_journal::check),
    ];
    let failed = checks.iter().filter(|(name, check)| {
        let bad = catch_unwind(check).is_err();
        if bad {
            println!("FAILED model {name}: {}", last_panic());
        }
        bad
    });
    let failed = failed.count() as u64;
    (checks.len() as u64 - failed, failed)
}

/// The checks notice a model that breaks its promises: otherwise a clean run would mean nothing.
fn sabotages() -> (u64, u64) {
    let (mut passed, mut failed) = (0, 0);
    for kind in [Sabotage::LyingSync, Sabotage::LostWrite, Sabotage::ForgetfulRing, Sabotage::StaleRead] {
        let noticed = (1..=200).find_map(|seed| run(seed, false, Some(kind)).failure.map(|f| (seed, f)));
        match noticed {
            Some((seed, f)) => {
                println!("sabotage {kind:?} noticed at seed {seed}: {}", f.invariant);
                passed += 1;
            }
            None => {
                println!("FAILED sabotage {kind:?}: not noticed in 200 seeds");
                failed += 1;
            }
        }
    }
    (passed, failed)
}

fn summary(total: &Counts, lines: u64, records: u64, took: Duration) {
    let list = |m: Vec<(String, u64)>| {
        m.into_iter().map(|(k, n)| format!("  {k:40} {n}")).collect::<Vec<_>>().join("\n")
    };
    println!("checked:\n{}", list(total.checks.iter().map(|(k, n)| ((*k).to_owned(), *n)).collect()));
    println!("met:\n{}", list(total.met.iter().map(|(k, n)| (k.clone(), *n)).collect()));
    println!("{lines} events, {records} records, {:.1} s", took.as_secs_f64());
}

fn main() {
    std::panic::set_hook(Box::new(|info| {
        let trace = std::backtrace::Backtrace::force_capture().to_string();
        let ours = trace.lines().filter(|l| l.contains(" at ./") && !l.contains("main.rs"));
        let ours: Vec<_> = ours.map(str::trim).take(8).collect();
        *PANIC.lock().unwrap_or_else(|e| e.into_inner()) = format!("{info}\n{}", ours.join("\n"));
    }));
    let Some(args) = args() else { return };
    let (mut passed, mut failed) = models();
    let begun = Instant::now();
    let limit = args.minutes.map(|m| Duration::from_secs(m * 60));
    let seeds = args.one.map_or(
        args.start..args.start.saturating_add(if limit.is_some() { u64::MAX } else { args.seeds }),
        |s| s..s + 1,
    );
    let (mut total, mut lines, mut records) = (Counts::default(), 0, 0);
    let mut kinds: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for seed in seeds {
        if limit.is_some_and(|l| begun.elapsed() > l) {
            break;
        }
        let mut ran = run(seed, args.one.is_some(), None);
        if ran.failure.is_none() && (args.twice || args.one.is_some() || seed % 16 == 0) {
            let again = run(seed, false, None);
            total.check("same trace twice");
            if again.hash != ran.hash {
                let text = "two runs of the seed differ".to_owned();
                ran.failure = Some(Violation { invariant: "determinism", text });
            }
        }
        ran.world.counts.checks.iter().for_each(|(k, n)| *total.checks.entry(k).or_default() += n);
        ran.world.counts.met.iter().for_each(|(k, n)| *total.met.entry(k.clone()).or_default() += n);
        lines += ran.world.trace.lines;
        records += ran.world.history.len() as u64;
        match &ran.failure {
            None => passed += 1,
            Some(failure) if args.keep_going => {
                failed += 1;
                println!(
                    "FAILED seed {seed}: {}: {}",
                    failure.invariant,
                    failure.text.lines().take(3).collect::<Vec<_>>().join(" ")
                );
                let kind: String = format!(
                    "{}: {}",
                    failure.invariant,
                    failure
                        .text
                        .chars()
                        .take(70)
                        .map(|c| if c.is_ascii_digit() { '#' } else { c })
                        .collect::<String>()
                        .replace("##", "#")
                        .replace("##", "#")
                );
                kinds.entry(kind).or_insert((0, seed)).0 += 1;
            }
            Some(failure) => {
                failed += 1;
                report(seed, &ran, failure);
                break;
            }
        }
    }
    if args.one.is_none() && failed == 0 {
        let (noticed, missed) = sabotages();
        (passed, failed) = (passed + noticed, failed + missed);
    }
    kinds.iter().for_each(|(kind, (n, seed))| println!("{n:5} x (first seed {seed}) {kind}"));
    summary(&total, lines, records, begun.elapsed());
    println!("{passed} passed, {failed} failed");
    std::process::exit(i32::from(failed > 0));
}

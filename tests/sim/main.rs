//! The simulator: whole groups of nodes on modelled disks, links and clocks, thousands of runs, each
//! repeatable from its seed.
//!
//! `cargo test --profile checked --test sim -- --seeds N --start S --minutes M` (whichever is less), `-- --seed X`
//! for one run in every detail, `-- --twice` to run every seed a second time (otherwise every sixteenth),
//! `-- --sweep` to have each disk request fail in its turn. A failing seed is made smaller before it is told, and belongs
//! into `regressions.txt` once mended: these come before all others.
//! `tools/sim` runs it for long.
//!
//! Owns: the driver. Invariant: a failure names its seed, the promise that was broken, what led to it,
//! and the command that repeats it.

mod bare_journal;
mod cascade;
mod compare;
mod content;
mod coverage;
mod disk;
mod faults;
mod fence;
mod history;
mod late;
mod lone;
mod marks;
mod memory;
mod minimise;
mod model;
mod moves;
mod net;
mod outdate;
mod perform;
mod plan;
mod prng;
mod reading;
mod regressions;
mod rejoin;
mod rest;
mod rewind;
mod rollback;
mod scenario;
mod sparse;
mod sweep;
mod trace;
mod view;
mod watch;
mod workers;
mod workload;
mod world;

use minimise::Cut;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};
use world::{Counts, Sabotage, Violation, World};

/// How long a failing run is made smaller.
const MINIMISING: Duration = Duration::from_secs(60);

thread_local! {
    /// Where and why this thread's last panic was.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// The text of the last panic.
fn last_panic() -> String {
    PANIC.with_borrow(Clone::clone)
}

struct Args {
    seeds: Option<u64>,
    start: u64,
    minutes: Option<u64>,
    one: Option<u64>,
    cut: Cut,
    twice: bool,
    keep_going: bool,
    /// Nothing but the models and the seeds.
    plain: bool,
    /// A failure is told as it is, not made smaller.
    whole: bool,
    /// The sweep alone: a sample, everything, or one case.
    sweep: Option<Wanted>,
}

enum Wanted {
    Sample,
    All,
    One(String),
}

fn args() -> Option<Args> {
    let (seeds, minutes, one, cut, sweep) = (None, None, None, Cut::default(), None);
    let mut a = Args {
        seeds,
        start: 1,
        minutes,
        one,
        cut,
        twice: false,
        keep_going: false,
        plain: false,
        whole: false,
        sweep,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut text = || words.next().unwrap_or_else(|| panic!("{word} needs a value"));
        let number = |text: String| text.parse().unwrap_or_else(|_| panic!("{word} needs a number"));
        match word.as_str() {
            "--seeds" => a.seeds = Some(number(text())),
            "--start" => a.start = number(text()),
            "--minutes" => a.minutes = Some(number(text())),
            "--seed" => a.one = Some(number(text())),
            "--cut" => a.cut = Cut::parse(&text()).expect("--cut takes what a failure printed"),
            "--twice" => a.twice = true,
            "--keep-going" => a.keep_going = true,
            "--plain" => a.plain = true,
            "--whole" => a.whole = true,
            "--sweep" => a.sweep = Some(Wanted::Sample),
            "--sweep-all" => a.sweep = Some(Wanted::All),
            "--sweep-one" => a.sweep = Some(Wanted::One(text())),
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

fn run(seed: u64, verbose: bool, sabotage: Option<Sabotage>, cut: &Cut) -> Ran {
    let mut world = World::new(seed, verbose);
    world.sabotage = sabotage;
    cut.apply(&mut world.plan);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    let failure = match outcome {
        Ok(outcome) => outcome.err(),
        Err(_) => Some(Violation { invariant: "panic", text: last_panic() }),
    };
    Ran { hash: world.trace.hash(), world, failure }
}

/// Tells a failure: made smaller first, if that was not done before.
fn report(seed: u64, ran: Ran, failure: Violation, args: &Args) {
    let (mut ran, mut failure, mut cut) = (ran, failure, args.cut.clone());
    if cut.is_empty() && !args.whole && failure.invariant != "determinism" {
        let (requests, faults) = (ran.world.plan.mix.requests, ran.world.plan.faults.len());
        let invariant = failure.invariant;
        let fails = |cut: &Cut| run(seed, false, None, cut).failure.is_some_and(|f| f.invariant == invariant);
        let smaller = minimise::minimise(requests, faults, MINIMISING, fails);
        let mut again = run(seed, false, None, &smaller);
        if let Some(same) = again.failure.take() {
            (ran, failure, cut) = (again, same, smaller);
        }
    }
    if !ran.world.trace.verbose {
        println!("{}", ran.world.trace.tail());
    }
    println!("plan: {:?}", ran.world.plan);
    println!("FAILED seed {seed}: {}: {}", failure.invariant, failure.text);
    let cut = if cut.is_empty() { String::new() } else { format!(" --cut {cut}") };
    println!("repeat: cargo test --profile checked --test sim -- --seed {seed}{cut}");
}

fn models() -> (u64, u64) {
    let checks: [(&str, fn()); 12] = [
        ("content", content::check),
        ("disk", disk::check),
        ("memory", memory::check),
        ("minimise", minimise::check),
        ("model", model::check),
        ("net", net::check),
        ("word", outdate::check),
        ("lease", fence::check),
        ("sparse", sparse::check),
        ("journal", bare_journal::check),
        ("lone", lone::check),
        ("regressions", regressions::check),
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
        let noticed = (1..=200)
            .find_map(|seed| run(seed, false, Some(kind), &Cut::default()).failure.map(|f| (seed, f)));
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
    println!("{}", coverage::summary(total));
    println!("{lines} events, {records} records, {:.1} s", took.as_secs_f64());
}

fn main() {
    std::panic::set_hook(Box::new(|info| {
        let trace = std::backtrace::Backtrace::force_capture().to_string();
        let ours = trace.lines().filter(|l| l.contains(" at ./") && !l.contains("main.rs"));
        let ours: Vec<_> = ours.map(str::trim).take(8).collect();
        PANIC.set(format!("{info}\n{}", ours.join("\n")));
    }));
    let Some(args) = args() else { return };
    let (passed, failed) = match &args.sweep {
        Some(Wanted::Sample) => sweep::sweep(false),
        Some(Wanted::All) => sweep::sweep(true),
        Some(Wanted::One(case)) => sweep::one(case),
        None => seeds(&args),
    };
    println!("{passed} passed, {failed} failed");
    std::process::exit(i32::from(failed > 0));
}

/// What is kept of a run.
struct Ended {
    seed: u64,
    failure: Option<Violation>,
    counts: Counts,
    lines: u64,
    records: u64,
}

/// One seed, and now and then once more: two runs of it must not differ.
fn run_seed(seed: u64, args: &Args) -> Ended {
    let Ran { mut world, hash, mut failure } = run(seed, args.one.is_some(), None, &args.cut);
    if failure.is_none() && (args.twice || args.one.is_some() || seed.is_multiple_of(16)) {
        world.counts.check("same trace twice");
        if run(seed, false, None, &args.cut).hash != hash {
            let text = "two runs of the seed differ".to_owned();
            failure = Some(Violation { invariant: "determinism", text });
        }
    }
    let (lines, records) = (world.trace.lines, world.history.len() as u64);
    Ended { seed, failure, counts: world.counts, lines, records }
}

/// Runs the models and the seeds; how many passed, and failed.
fn seeds(args: &Args) -> (u64, u64) {
    let (mut passed, mut failed) = models();
    if failed > 0 {
        return (passed, failed); // what the seeds say means nothing then
    }
    let begun = Instant::now();
    let (mut total, mut lines, mut records, mut ran) = (Counts::default(), 0, 0, 0);
    let mut kinds: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    let mut worst = None;
    let limit = args.minutes.map(|m| Duration::from_secs(m * 60));
    let usual = if limit.is_some() { u64::MAX } else { 200 };
    let (first, count) = args.one.map_or((args.start, args.seeds.unwrap_or(usual)), |seed| (seed, 1));
    // Before the first one those that have found something.
    let known = regressions::seeds().filter(|_| args.one.is_none() && first == 1 && count > 0);
    let seeds = known
        .chain(first..first.saturating_add(count))
        .take_while(|_| limit.is_none_or(|l| begun.elapsed() <= l));
    workers::each(
        seeds,
        |seed| run_seed(seed, args),
        |one| {
            ran += 1;
            one.counts.checks.iter().for_each(|(k, n)| *total.checks.entry(k).or_default() += n);
            one.counts.met.iter().for_each(|(k, n)| *total.met.entry(k.clone()).or_default() += n);
            lines += one.lines;
            records += one.records;
            let Some(failure) = one.failure else {
                passed += 1;
                return true;
            };
            failed += 1;
            if args.keep_going {
                let text = failure.text.lines().take(3).collect::<Vec<_>>().join(" ");
                println!("FAILED seed {}: {}: {text}", one.seed, failure.invariant);
                kinds.entry(kind_of(&failure)).or_insert((0, one.seed)).0 += 1;
            } else {
                worst = Some((one.seed, failure));
            }
            args.keep_going
        },
    );
    if let Some((seed, failure)) = worst {
        report(seed, run(seed, args.one.is_some(), None, &args.cut), failure, args);
    }
    if args.one.is_none() && failed == 0 && !args.plain {
        let (noticed, missed) = sabotages();
        (passed, failed) = (passed + noticed, failed + missed);
    }
    kinds.iter().for_each(|(kind, (n, seed))| println!("{n:5} x (first seed {seed}) {kind}"));
    summary(&total, lines, records, begun.elapsed());
    if ran >= coverage::ENOUGH {
        for name in coverage::missing(&total) {
            println!("FAILED coverage: {ran} seeds have never met {name}");
            failed += 1;
        }
    } else if limit.is_some_and(|l| begun.elapsed() > l) {
        println!("skipped: coverage: {ran} seeds in that time, of the {} that it takes", coverage::ENOUGH);
    }
    (passed, failed)
}

/// Failures that look alike.
fn kind_of(failure: &Violation) -> String {
    let text: String = failure.text.chars().take(70).collect();
    let text = text.chars().map(|c| if c.is_ascii_digit() { '#' } else { c }).collect::<String>();
    format!("{}: {}", failure.invariant, text.replace("##", "#").replace("##", "#"))
}

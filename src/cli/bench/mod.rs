//! `volrep bench`: what the group's own disks give through volrep, beside what they give bare.
//!
//! Owns: the order of a measurement. Invariants: nothing of the group that is measured is written to, nor is its daemon
//! asked for anything but its state; whatever was made is gone when the command ends.

mod load;
mod plan;
mod report;
mod scratch;

use super::failure::Failure;
use super::output::Output;
use super::places::Places;
use super::size::Size;
use super::{config, interrupt};
use load::{Fio, Target};
use plan::{Plan, Profile};
use report::Report;
use scratch::Scratch;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Measure with fio what the group's disks give through volrep, on a scratch volume beside the group's own
///
/// A scratch file beside the group's backing is written once, then the profile runs on it without volrep (O_DIRECT),
/// then through a scratch group with a journal beside the group's journal, the same settings and a daemon of its own, whose
/// NBD socket fio uses. The group's own volumes are not written to; it may be in use meanwhile, but then it shares its disks
/// with the measurement. Everything is removed at the end, also after an error or Ctrl-C. Needs fio with its nbd engine.
#[derive(clap::Args, Clone, Debug)]
pub struct Bench {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// What is run
    #[arg(long, value_enum, value_name = "PROFILE")]
    profile: Profile,
    /// How long each of the two runs takes [default: 30; iris: 90, so that its write daemon wakes twice]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: Option<u64>,
    /// Size of the scratch volume [default: 1G, or four times the group's write cache if that is more]
    #[arg(long, value_name = "SIZE")]
    size: Option<Size>,
    /// Beside which volume's backing [default: the first]
    #[arg(long, value_name = "VOLUME")]
    volume: Option<String>,
    /// Where the scratch file lies, for a backing that is a block device: a directory on a comparable disk
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Replicate to a scratch shadow in this directory, too, over loopback
    #[arg(long, value_name = "DIR")]
    shadow: Option<PathBuf>,
    /// A FLUSH waits for that shadow
    #[arg(long, requires = "shadow")]
    sync: bool,
    /// Keep fio's job file and its JSON there
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Only check, and say what would be done
    #[arg(long)]
    dry_run: bool,
}

impl Bench {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let config = config::load(places, &self.group)?;
        let fio = Fio::find()?;
        let plan = Plan::new(self, places, config)?;
        if self.dry_run {
            plan.check_space()?;
            out.document(&plan.json(&fio), || plan.text(&fio));
            return Ok(());
        }
        if let Some(dir) = &self.keep {
            std::fs::create_dir_all(dir).map_err(|e| Failure::io("create", dir, &e))?;
        }
        interrupt::watch(|| {})?;
        let report = measure(&plan, &fio)?;
        let kept = self.keep.as_deref().map(|dir| keep(&plan, &report, dir)).transpose();
        // What took minutes is told, whatever became of the files.
        let files = kept.as_ref().ok().and_then(|k| k.as_deref());
        out.document(&report.json(&plan, files), || report.text(&plan, files));
        kept.map(|_| ())
    }
}

/// How long the shadow may take to apply what is left at the end.
const SETTLING: Duration = Duration::from_secs(600);

fn measure(plan: &Plan, fio: &Fio) -> Result<Report, Failure> {
    let mut scratch = Scratch::make(plan)?;
    // What a killed run had left is gone by now.
    plan.check_space()?;
    scratch.write_volume(plan)?;
    let bare = {
        say(&format!("{} s of {} on the bare file", plan.seconds, plan.profile.name()));
        fio.run(plan, &scratch, &Target::Bare(scratch.volume()))?
    };
    let uri = scratch.serve(plan)?;
    let with = if plan.shadow.is_some() { ", replicated to a shadow" } else { "" };
    say(&format!("{} s of {} through volrep{with}", plan.seconds, plan.profile.name()));
    let before = scratch.spent()?;
    let through = fio.run(plan, &scratch, &Target::Volrep(&uri))?;
    let lag = scratch.shadow().map(|s| s.status()).transpose()?.and_then(|s| s.lag);
    let settled = scratch.settle(SETTLING)?;
    let after = scratch.spent()?;
    let nodes = before.iter().zip(&after).map(|(b, a)| a.since(b)).collect();
    Report::new(bare, through, nodes, lag, settled)
}

/// Where the run is, for whoever waits for it.
fn say(text: &str) {
    eprintln!("volrep: {text}");
}

/// Keeps fio's own words; the names of the files.
fn keep(plan: &Plan, report: &Report, dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    std::fs::create_dir_all(dir).map_err(|e| Failure::io("create", dir, &e))?;
    let stamp = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let stem = format!("{}-{}-{stamp}", plan.group, plan.profile.name());
    let parts = [
        (format!("{stem}.fio"), plan.job_file()),
        (format!("{stem}-bare.json"), report.bare().to_string()),
        (format!("{stem}-volrep.json"), report.through().to_string()),
    ];
    let mut kept = Vec::new();
    for (name, text) in parts {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|e| Failure::io("write", &path, &e))?;
        kept.push(path);
    }
    Ok(kept)
}

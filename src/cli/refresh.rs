//! `volrep refresh` and `volrep verify`: prove a shadow equal, and repair it.
//!
//! Owns: what is told while the daemons compare. Invariant: the work is the daemons' own, so an
//! interrupted command interrupts nothing; what is called identical is what the node said.

use super::failure::{Exit, Failure};
use super::output::{Output, confirm};
use super::places::Places;
use super::size::{Size, grouped, human, span};
use super::{remote, status};
use crate::control::{Reply, Verb};
use crate::node::status::{DifferentRange, RefreshStatus, SCHEMA_VERSION};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// Between two looks at the job, at most; a short job is not waited for that long.
const LOOK: Duration = Duration::from_millis(200);
const SOON: Duration = Duration::from_millis(5);
/// Between two lines off a terminal; the first comes sooner.
const INTERVAL: Duration = Duration::from_secs(10);
const FIRST: Duration = Duration::from_secs(2);
/// Ranges that are printed one by one.
const SHOWN: usize = 20;
/// How long a daemon may take for an answer.
const LIMIT: Duration = Duration::from_secs(30);

/// Prove a shadow equal to its primary and repair what differs, while both are in use
#[derive(clap::Args, Clone, Debug)]
pub struct Refresh {
    #[command(flatten)]
    job: JobArgs,
    /// Only compare; nothing is repaired (the same as `verify`)
    #[arg(long)]
    dry_run: bool,
    /// For a shadow that needs a resync: make the new image over the old one. It takes no further room, and
    /// until it ends that shadow has no image that could be used
    #[arg(long, conflicts_with_all = ["dry_run", "quick", "stop"])]
    in_place: bool,
    /// Don't ask for the group's name (with --in-place)
    #[arg(long)]
    yes: bool,
}

/// Prove a shadow equal to its primary; nothing is repaired
#[derive(clap::Args, Clone, Debug)]
pub struct Verify {
    #[command(flatten)]
    job: JobArgs,
}

#[derive(clap::Args, Clone, Debug)]
struct JobArgs {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// On a primary with several shadows: which one
    #[arg(long, value_name = "NODE")]
    peer: Option<String>,
    /// Trust the hash index: read only what was written since it was last read, and so find no bit rot
    #[arg(long)]
    quick: bool,
    /// Bytes of the volumes that each side may read in a second, such as 400M [default: no limit]
    #[arg(long, value_name = "SIZE")]
    rate: Option<Size>,
    /// A shadow with an apply_delay gives it up until the comparison has ended: its window is empty then
    #[arg(long)]
    suspend_delay: bool,
    /// Don't follow it: it goes on in the daemons
    #[arg(long)]
    no_wait: bool,
    /// End the one that is under way; what was repaired stays
    #[arg(long, conflicts_with_all = ["peer", "quick", "rate", "suspend_delay", "no_wait"])]
    stop: bool,
}

impl Refresh {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        if self.in_place {
            eprintln!(
                "A resync in place spoils the old image of the shadow at once. Until it has ended, which takes about \
                 as long as reading both volumes, the shadow can't be promoted or viewed; a failure of the primary \
                 meanwhile loses the data. Without --in-place the old image stays until the new one is whole."
            );
            confirm(&self.job.group, "give up the shadow's old image", self.yes)?;
        }
        self.job.run(self.dry_run, self.in_place, places, out)
    }
}

impl Verify {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        self.job.run(true, false, places, out)
    }
}

impl JobArgs {
    fn run(&self, verify: bool, in_place: bool, places: &Places, out: &Output) -> Result<(), Failure> {
        if self.rate.as_ref().is_some_and(|rate| rate.0 == 0) {
            return Err(Failure::usage("a rate of 0 would never end", "leave --rate away for no limit"));
        }
        if self.stop {
            let text = self.ask(places, Verb::RefreshStop)?;
            let document = json!({ "schema_version": SCHEMA_VERSION, "group": self.group, "text": text });
            out.document(&document, || text.clone());
            return Ok(());
        }
        let before = self.job(places)?.map(|s| s.job);
        let rate = self.rate.as_ref().map_or(0, |rate| rate.0);
        let (peer, quick, suspend_delay) = (self.peer.clone(), self.quick, self.suspend_delay);
        let wish = Verb::Refresh { peer, quick, verify, rate, in_place, suspend_delay };
        let text = self.ask(places, wish)?;
        if self.no_wait {
            let document = json!({ "schema_version": SCHEMA_VERSION, "group": self.group, "text": text });
            out.document(&document, || text.clone());
            return Ok(());
        }
        let done = self.follow(places, out, before)?;
        out.document(&document(&self.group, &done), || outcome(&done));
        verdict(&self.group, &done)
    }

    fn ask(&self, places: &Places, verb: Verb) -> Result<String, Failure> {
        match remote::ask(places, &self.group, verb, Some(LIMIT))? {
            Reply::Done { text } => Ok(text),
            _ => Err(remote::odd(&self.group)),
        }
    }

    fn job(&self, places: &Places) -> Result<Option<RefreshStatus>, Failure> {
        Ok(status::running(places, &self.group)?.refresh)
    }

    /// Tells of the job until it is over.
    fn follow(&self, places: &Places, out: &Output, before: Option<u64>) -> Result<RefreshStatus, Failure> {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
            bar.set_style(ProgressStyle::with_template("{bar:20} {msg}").expect("a fixed template"));
            bar
        });
        let mut next = Instant::now() + FIRST;
        let mut pause = SOON;
        loop {
            if let Some(job) = self.job(places)?.filter(|s| Some(s.job) != before) {
                if matches!(job.state.as_str(), "Done" | "Failed" | "Stopped") {
                    bar.iter().for_each(ProgressBar::finish_and_clear);
                    return Ok(job);
                }
                if let Some(bar) = &bar {
                    bar.set_length(job.total.max(1));
                    bar.set_position(job.compared.min(job.total));
                    bar.set_message(progress(&job));
                } else if Instant::now() >= next {
                    next = Instant::now() + INTERVAL;
                    match out.json {
                        true => out.line(&document(&self.group, &job).to_string()),
                        false => eprintln!("volrep: {}", progress(&job)),
                    }
                }
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(LOOK);
        }
    }
}

fn document(group: &str, s: &RefreshStatus) -> Value {
    json!({ "schema_version": SCHEMA_VERSION, "group": group, "refresh": s })
}

/// One line of how far it is.
pub fn progress(s: &RefreshStatus) -> String {
    let percent = (s.compared.min(s.total) as f64 / s.total.max(1) as f64 * 100.0) as u64;
    let mut line = format!("compared {}/{} {percent}%", human(s.compared.min(s.total)), human(s.total));
    if s.state == "Waiting" {
        let why = s.reason.as_deref().unwrap_or("its peer is not there");
        return format!("{line}  waiting: {why}");
    }
    line += &format!("  {}/s | differ {} | sent {}", human(s.rate as u64), human(s.differ), human(s.wire));
    if let Some(eta) = s.eta {
        line += &format!(" | eta {}", span(eta));
    }
    if let Some(limit) = s.limited_by.as_ref().filter(|_| s.rate < 1.0) {
        line += &format!(" | it stands still and waits for {limit}");
    }
    line
}

/// How it ended, for people.
fn outcome(s: &RefreshStatus) -> String {
    let mut lines = Vec::new();
    let named = |r: &DifferentRange| {
        let whose = r.node.as_ref().map(|n| format!(", the bytes of {n} are wrong")).unwrap_or_default();
        format!("  {} at {}, {} bytes (found {}{whose})", r.volume, r.offset, r.len, r.found)
    };
    lines.extend(s.ranges.iter().take(SHOWN).map(named));
    if s.ranges.len() > SHOWN {
        lines.push(format!("  … and more: `volrep status --json` lists {} ranges", s.ranges.len()));
    }
    lines.extend(s.rotten.iter().take(SHOWN).map(named));
    let state = s.state.to_lowercase();
    let reason = s.reason.as_ref().map(|r| format!(" ({r})")).unwrap_or_default();
    let what = match (s.cause.as_str(), s.differ, s.lsn) {
        (_, 0, Some(lsn)) => format!("0 differences, identical at LSN {}", grouped(lsn)),
        (_, _, Some(lsn)) => format!("{} repaired, identical at LSN {}", human(s.repaired), grouped(lsn)),
        (_, differ, None) => format!("{} differ, {} repaired", human(differ), human(s.repaired)),
    };
    lines.push(format!("{state} {}: {what}{reason}", span(s.seconds)));
    lines.join("\n")
}

/// Whether that was a success.
fn verdict(group: &str, s: &RefreshStatus) -> Result<(), Failure> {
    match (s.state.as_str(), s.lsn) {
        ("Done", Some(_)) => Ok(()),
        ("Done", None) => Err(Failure::new(
            Exit::Failure,
            format!("{} is not identical: {} differ", s.shadow, human(s.differ)),
            format!("repair it: volrep refresh {group}"),
        )),
        _ => {
            let reason = s.reason.clone().unwrap_or_else(|| "no reason was told".into());
            let next = "mend that, then run it again: what was repaired stays";
            Err(Failure::new(Exit::Failure, format!("the {} ended early: {reason}", s.cause), next))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_and_outcome_say_what_is_known() {
        let mut s = RefreshStatus { state: "Running".into(), cause: "refresh".into(), ..Default::default() };
        assert!(progress(&s).starts_with("compared 0 B/0 B 0%"), "{}", progress(&s));
        (s.total, s.compared, s.rate, s.differ, s.wire) = (100 << 30, 25 << 30, 2e9, 1 << 30, 1 << 20);
        s.eta = Some(40.0);
        let text = progress(&s);
        assert!(text.contains("25%") && text.contains("eta 40") && !text.contains("stands still"), "{text}");
        (s.rate, s.eta, s.limited_by) = (0.0, None, Some("the link".into()));
        assert!(progress(&s).ends_with("waits for the link"));
        s.compared = 200 << 30;
        assert!(progress(&s).contains("100%"), "it never tells more than all of it");
        (s.state, s.lsn, s.repaired) = ("Done".into(), Some(88_213_999), 1 << 30);
        assert!(
            outcome(&s).ends_with("repaired, identical at LSN 88\u{2009}213\u{2009}999"),
            "{}",
            outcome(&s)
        );
        assert!(verdict("g", &s).is_ok());
        s.lsn = None;
        assert_eq!(verdict("g", &s).unwrap_err().exit, Exit::Failure);
        s.differ = 0;
        s.lsn = Some(3);
        assert!(outcome(&s).contains("0 differences, identical at LSN 3"));
    }
}

//! `volrep drill`: proves, while production goes on, that a database would start on the shadow.
//!
//! Owns: the script's process and the list of drills. Invariants: the view is closed before this ends, whatever
//! became of the script, and nothing that the script started outlives it; it is a success only if the script is one.

use super::failure::{Exit, Failure};
use super::hooks::{LOOK, has_ended};
use super::output::Output;
use super::places::Places;
use super::size::{grouped, span};
use super::view::{self, Opened};
use super::{config, interrupt};
use crate::control::DeviceKind;
use crate::node::status::SCHEMA_VERSION;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::Serialize;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What a script that is to end has for it.
const GRACE: Duration = Duration::from_secs(5);
/// What those whom it started have to die, once they are killed.
const DYING: Duration = Duration::from_secs(1);

/// Run a script against a scratch view of a shadow, and close the view whatever happens
///
/// The script finds the first device in VOLREP_DEVICE, all of them (with spaces between) in VOLREP_DEVICES, the record
/// whose image they show in VOLREP_LSN, and the group in VOLREP_GROUP. It should unmount what it mounts. What it prints goes to
/// stderr. Each drill adds a line of JSON to the file `drills` in the group's state directory.
#[derive(clap::Args, Clone, Debug)]
pub struct Drill {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// What to run; the drill succeeds if it exits with 0
    #[arg(long, value_name = "SCRIPT")]
    run: PathBuf,
    /// How long it may take; then it is ended with all that it started
    #[arg(long, value_name = "SPAN", default_value = "1h", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// What kind of device
    #[arg(long, value_enum, value_name = "KIND", default_value = "auto")]
    device: DeviceKind,
}

/// How a drill went, as it is kept and told.
#[derive(Clone, Debug, Default, Serialize)]
struct Report {
    schema_version: u32,
    group: String,
    /// RFC 3339.
    started: String,
    script: PathBuf,
    /// The script exited with 0.
    passed: bool,
    /// Its exit code.
    exit: Option<i32>,
    /// The signal that ended it.
    signal: Option<i32>,
    timed_out: bool,
    interrupted: bool,
    /// Why there is neither.
    error: Option<String>,
    lsn: Option<u64>,
    devices: Vec<String>,
    /// From the request to the devices.
    open_seconds: f64,
    run_seconds: f64,
    /// What still used the devices when the view was closed.
    in_use: Option<String>,
}

/// How a script ended.
#[derive(Debug)]
enum Ended {
    By(ExitStatus),
    Late,
    Interrupted,
}

impl Drill {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        config::load(places, &self.group)?;
        let script = self.run.canonicalize().map_err(|e| Failure::io("run", &self.run, &e))?;
        interrupt::watch(|| {})?;
        let mut report = Report {
            schema_version: SCHEMA_VERSION,
            group: self.group.clone(),
            started: format!("{:.3}", jiff::Timestamp::now()),
            script,
            ..Report::default()
        };
        let begun = Instant::now();
        let opened = view::open(places, &self.group, true, None, self.device)?;
        report.open_seconds = begun.elapsed().as_secs_f64();
        report.lsn = opened.view.lsn;
        report.devices = opened.devices().into_iter().map(str::to_owned).collect();
        let lsn = grouped(report.lsn.unwrap_or_default());
        eprintln!("volrep: the view is open after {}, at LSN {lsn}", span(report.open_seconds));
        let begun = Instant::now();
        let ended = self.script(&report.script, &opened);
        report.run_seconds = begun.elapsed().as_secs_f64();
        report.note(ended);
        let closed = self.close(places, &mut report);
        record(&places.state(&self.group).join("drills"), &report)?;
        let document = serde_json::to_value(&report).map_err(|e| {
            Failure::new(Exit::Failure, format!("the report can't be written: {e}"), "report this")
        })?;
        out.document(&document, || report.text());
        closed?;
        report.verdict()
    }

    fn script(&self, script: &Path, opened: &Opened) -> io::Result<Ended> {
        let devices = opened.devices();
        let mut command = Command::new(script);
        command.env("VOLREP_DEVICE", devices.first().copied().unwrap_or_default());
        command.env("VOLREP_DEVICES", devices.join(" "));
        command.env("VOLREP_LSN", opened.view.lsn.unwrap_or_default().to_string());
        command.env("VOLREP_GROUP", &self.group);
        // What it prints is for the reader of stderr: stdout is the command's own data.
        command.stdin(Stdio::null()).stdout(io::stderr()).process_group(0);
        watch(command.spawn()?, self.timeout)
    }

    /// Closes the view; by force where the script left something behind.
    fn close(&self, places: &Places, report: &mut Report) -> Result<(), Failure> {
        match view::close(places, &self.group, false) {
            Err(busy) if busy.exit == Exit::Busy => {
                eprintln!("volrep: {}; its users get errors now", busy.what);
                report.in_use = Some(busy.what);
                view::close(places, &self.group, true).map(drop)
            }
            other => other.map(drop),
        }
    }
}

/// Waits for the script's end, or brings it about; nothing of its process group is left.
fn watch(mut child: Child, limit: Duration) -> io::Result<Ended> {
    let group = Pid::from_raw(child.id() as i32);
    let deadline = Instant::now().checked_add(limit);
    let mut told: Option<(Ended, Instant)> = None;
    // Looked at and not waited for: its number is its own until all is killed.
    while !has_ended(group)? {
        let now = Instant::now();
        match &told {
            Some((_, until)) if now >= *until => break,
            Some(_) => {}
            None => {
                let why = match interrupt::check() {
                    Err(_) => Some(Ended::Interrupted),
                    Ok(()) => deadline.is_some_and(|d| now >= d).then_some(Ended::Late),
                };
                if let Some(why) = why {
                    let _ = killpg(group, Signal::SIGTERM);
                    told = Some((why, now + GRACE));
                }
            }
        }
        std::thread::sleep(LOOK);
    }
    // The group may have nobody left but the script itself.
    let _ = killpg(group, Signal::SIGKILL);
    let status = child.wait()?;
    // The others die by themselves, and let go of the devices; but whoever adopted them may never wait for them.
    let gone_by = Instant::now() + DYING;
    while killpg(group, None).is_ok() && Instant::now() < gone_by {
        std::thread::sleep(LOOK);
    }
    Ok(told.map_or(Ended::By(status), |(why, _)| why))
}

impl Report {
    fn note(&mut self, ended: io::Result<Ended>) {
        match ended {
            Ok(Ended::By(status)) => {
                (self.exit, self.signal) = (status.code(), status.signal());
                self.passed = status.success();
            }
            Ok(Ended::Late) => self.timed_out = true,
            Ok(Ended::Interrupted) => self.interrupted = true,
            Err(e) => self.error = Some(format!("{} can't be run: {e}", self.script.display())),
        }
    }

    fn outcome(&self) -> String {
        match (self.exit, self.signal) {
            (Some(code), _) => format!("the script exited with {code}"),
            (_, Some(signal)) => format!("the script was ended by signal {signal}"),
            _ if self.timed_out => "the script took too long and was killed".into(),
            _ if self.interrupted => "interrupted".into(),
            _ => self.error.clone().unwrap_or_default(),
        }
    }

    fn text(&self) -> String {
        let verdict = if self.passed { "passed" } else { "failed" };
        let lsn = grouped(self.lsn.unwrap_or_default());
        let (open, run) = (span(self.open_seconds), span(self.run_seconds));
        format!("drill {verdict}: LSN {lsn}, open after {open}, ran {run}: {}", self.outcome())
    }

    fn verdict(&self) -> Result<(), Failure> {
        match self {
            Report { passed: true, .. } => Ok(()),
            Report { interrupted: true, .. } => Err(Failure::interrupted()),
            _ => Err(Failure::new(
                Exit::Failure,
                format!("the drill failed: {}", self.outcome()),
                "what the script printed is above; the shadow is as it was",
            )),
        }
    }
}

/// Adds a drill to the list, in one write.
fn record(path: &Path, report: &Report) -> Result<(), Failure> {
    let mut line = serde_json::to_vec(report).map_err(|e| Failure::io("write", path, &e.into()))?;
    line.push(b'\n');
    let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    file.and_then(|mut f| f.write_all(&line)).map_err(|e| Failure::io("write", path, &e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(text: &str) -> Child {
        Command::new("sh").args(["-c", text]).process_group(0).spawn().unwrap()
    }

    #[test]
    fn a_script_ends_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let text = format!("sleep 1000 & echo $! >{}; exit 7", pid.display());
        let Ended::By(status) = watch(shell(&text), Duration::from_secs(60)).unwrap() else { panic!() };
        assert_eq!(status.code(), Some(7));
        let left: i32 = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
        // Killed it is; it dies when it has its turn, and whoever adopted it may never wait for it.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{left}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") || stat.contains(") X ") {
                break;
            }
            assert!(Instant::now() < deadline, "{stat}");
            std::thread::sleep(LOOK);
        }
    }

    #[test]
    fn a_script_that_takes_too_long_is_ended() {
        let begun = Instant::now();
        let ended = watch(shell("sleep 1000"), Duration::from_millis(50)).unwrap();
        assert!(matches!(ended, Ended::Late), "{ended:?}");
        assert!(begun.elapsed() < GRACE, "it had not to be killed");
    }

    #[test]
    fn only_the_scripts_success_is_one() {
        let mut report = Report::default();
        report.note(Ok(Ended::By(ExitStatus::from_raw(0))));
        assert!(report.verdict().is_ok());
        let mut report = Report::default();
        report.note(Ok(Ended::By(ExitStatus::from_raw(3 << 8))));
        assert_eq!(report.verdict().unwrap_err().exit, Exit::Failure);
        assert!(report.text().contains("exited with 3"), "{}", report.text());
        let mut report = Report::default();
        report.note(Ok(Ended::Interrupted));
        assert_eq!(report.verdict().unwrap_err().exit, Exit::Interrupted);
    }
}

//! fio: whether it is there, its command line, its run.
//!
//! Owns: fio's process. Invariant: it has ended when a run returns, however that ends.

use super::plan::Plan;
use super::scratch::Scratch;
use crate::cli::failure::{Exit, Failure};
use crate::cli::hooks::{LOOK, has_ended};
use crate::cli::interrupt;
use crate::sys::process::end_with_parent;
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// The program, looked for in PATH.
const PROGRAM: &str = "fio";
/// What fio may take beyond its run: to begin, and to end the requests that are under way.
const GRACE: Duration = Duration::from_secs(120);

/// What fio writes to and reads from.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// A file.
    Bare(&'a Path),
    /// An NBD export.
    Volrep(&'a str),
}

/// A fio that can do what is needed.
pub struct Fio {
    /// As it calls itself.
    pub version: String,
}

impl Fio {
    /// Looks for it, and for its engines.
    pub fn find() -> Result<Fio, Failure> {
        let ask = |arg: &str| Command::new(PROGRAM).arg(arg).stdin(Stdio::null()).output();
        let install =
            "install it: the package is called fio (apt install fio, dnf install fio, zypper install fio)";
        let version = match ask("--version") {
            Ok(told) if told.status.success() => String::from_utf8_lossy(&told.stdout).trim().to_owned(),
            Ok(told) => {
                let what = format!("`fio --version` ended with {}", told.status);
                return Err(Failure::new(Exit::Failure, what, install));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(Failure::new(Exit::Failure, "there is no fio in PATH", install));
            }
            Err(e) => return Err(Failure::new(Exit::Failure, format!("fio can't be run: {e}"), install)),
        };
        for engine in ["nbd", "io_uring"] {
            if !ask(&format!("--enghelp={engine}")).is_ok_and(|told| told.status.success()) {
                let what = format!("{version} has no `{engine}` engine");
                let next = "install a build that has it: Debian's and Ubuntu's package fio (with libnbd0), Fedora's fio-engine-nbd";
                return Err(Failure::new(Exit::Failure, what, next));
            }
        }
        Ok(Fio { version })
    }

    /// Its arguments before the job file. Threads, not processes: then its end is the end of all its jobs.
    fn arguments(plan: &Plan, target: &Target) -> Vec<String> {
        let target = match target {
            Target::Bare(file) => {
                ["--ioengine=io_uring".to_owned(), format!("--filename={}", file.display())]
            }
            Target::Volrep(uri) => ["--ioengine=nbd".to_owned(), format!("--uri={uri}")],
        };
        let how = ["--thread", "--eta=never", "--output-format=json"].map(str::to_owned);
        let much = [format!("--size={}", plan.size), format!("--runtime={}", plan.seconds)];
        how.into_iter().chain(much).chain(target).collect()
    }

    /// The command, to be read.
    pub fn line(&self, plan: &Plan, target: &Target) -> String {
        format!("{PROGRAM} {} {}.fio", Fio::arguments(plan, target).join(" "), plan.profile.name())
    }

    /// Runs the profile; what fio says.
    pub fn run(&self, plan: &Plan, scratch: &Scratch, target: &Target) -> Result<Value, Failure> {
        let [jobs, told, complaints] = ["jobs.fio", "fio.json", "fio.err"].map(|name| scratch.file(name));
        std::fs::write(&jobs, plan.job_file()).map_err(|e| Failure::io("write", &jobs, &e))?;
        let stderr = File::create(&complaints).map_err(|e| Failure::io("create", &complaints, &e))?;
        let mut command = Command::new(PROGRAM);
        command.args(Fio::arguments(plan, target)).arg(format!("--output={}", told.display())).arg(&jobs);
        // It may leave files where it stands.
        command.current_dir(scratch.file("")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        command.process_group(0);
        end_with_parent(&mut command);
        let child =
            command.spawn().map_err(|e| Failure::new(Exit::Failure, format!("fio can't be run: {e}"), ""))?;
        let ended = wait(Running(child), Duration::from_secs(plan.seconds) + GRACE);
        let failed = |what: &str| {
            let said = std::fs::read_to_string(&complaints).unwrap_or_default();
            let said = said
                .lines()
                .rev()
                .take(3)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .collect::<Vec<_>>()
                .join("; ");
            let next = "see what fio says; its command line is what --dry-run prints";
            Failure::new(Exit::Failure, format!("fio {what}: {said}"), next)
        };
        if !ended?.is_some_and(|status| status.success()) {
            return Err(failed("failed or did not end"));
        }
        let text = std::fs::read_to_string(&told).map_err(|e| Failure::io("read", &told, &e))?;
        // Warnings may stand before it.
        let document = text.find('{').map(|at| serde_json::from_str::<Value>(&text[at..]));
        let Some(Ok(document)) = document else { return Err(failed("printed no JSON")) };
        let errors = document["jobs"].as_array().into_iter().flatten().any(|job| job["error"] != 0);
        if errors { Err(failed("had errors")) } else { Ok(document) }
    }
}

/// fio, which is killed when nobody waits for it any more.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended, in the good case.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Its status; `None` when it took longer than `limit`.
fn wait(mut running: Running, limit: Duration) -> Result<Option<std::process::ExitStatus>, Failure> {
    let fail =
        |e: io::Error| Failure::new(Exit::Failure, format!("fio can't be waited for: {e}"), "report this");
    let begun = Instant::now();
    while !has_ended(Pid::from_raw(running.0.id() as i32)).map_err(fail)? {
        interrupt::check()?;
        if begun.elapsed() >= limit {
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
    running.0.wait().map(Some).map_err(fail)
}

//! The database's start and stop scripts, called around a change of roles.
//!
//! Owns: their calls, and the time limit of every program that is called. Invariant: only exit status 0 within
//! the limit is a success; a script that is cut off is killed with all that it started.

use super::config::Hooks;
use super::failure::{Exit, Failure};
use crate::sys::process::as_any_other;
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Between two looks at a program that runs.
pub const LOOK: Duration = Duration::from_millis(20);

/// Which one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// The devices are there: mount, and start the database.
    Start,
    /// The devices are about to go: stop the database, and unmount.
    Stop,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Hook::Start => "start",
            Hook::Stop => "stop",
        }
    }
}

impl Hooks {
    /// The script, if there is one.
    pub fn path(&self, hook: Hook) -> Option<&Path> {
        match hook {
            Hook::Start => self.start.as_deref(),
            Hook::Stop => self.stop.as_deref(),
        }
    }

    /// Calls it: `SCRIPT start|stop GROUP DEVICE…`. Nothing to call is a success.
    pub fn call(&self, hook: Hook, group: &str, devices: &[String]) -> Result<(), Failure> {
        let Some(script) = self.path(hook) else { return Ok(()) };
        let name = hook.name();
        eprintln!("volrep: {} {name} {group} {}", script.display(), devices.join(" "));
        let mut command = Command::new(script);
        command.arg(name).arg(group).args(devices);
        command.env("VOLREP_GROUP", group).env("VOLREP_DEVICES", devices.join(" "));
        let limit = self.timeout.0;
        let why = match run(&mut command, limit) {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => format!("ended with {status}"),
            Ok(None) => format!("did not end within {} s (hooks.timeout) and was killed", limit.as_secs()),
            Err(e) => format!("can't be run: {e}"),
        };
        let what = format!("the {name} script of `{group}`, {}, {why}", script.display());
        Err(Failure::new(Exit::Failure, what, "see what it printed; correct it, then try again"))
    }
}

/// Runs a program for at most `limit`; its status, `None` if it had to be killed. What it prints goes to stderr:
/// stdout is the command's own data.
pub fn run(command: &mut Command, limit: Duration) -> io::Result<Option<ExitStatus>> {
    command.stdin(Stdio::null()).stdout(io::stderr()).process_group(0);
    as_any_other(command);
    let mut child = command.spawn()?;
    let group = Pid::from_raw(child.id() as i32);
    let deadline = Instant::now().checked_add(limit);
    while !has_ended(group)? {
        if deadline.is_some_and(|d| Instant::now() >= d) {
            killpg(group, Signal::SIGKILL)?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(LOOK);
    }
    child.wait().map(Some)
}

/// Whether a child has ended. It is looked at and not waited for: its number stays its own.
pub fn has_ended(child: Pid) -> io::Result<bool> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
    Ok(waitid(Id::Pid(child), flags)? != WaitStatus::StillAlive)
}

#[cfg(test)]
mod tests {
    use super::super::config::Span;
    use super::*;

    fn hooks(text: &str, limit: Duration) -> (tempfile::TempDir, Hooks) {
        let dir = tempfile::tempdir().unwrap();
        let path = super::super::fence::tests::script(dir.path(), text);
        (dir, Hooks { start: Some(path), stop: None, timeout: Span(limit) })
    }

    #[test]
    fn it_is_told_what_to_do_with_what_and_only_success_is_success() {
        let minute = Duration::from_secs(60);
        let (_dir, hooks) =
            hooks(r#"[ "$1$2$3$4$VOLREP_DEVICES" = "startg/dev/a/dev/b/dev/a /dev/b" ]"#, minute);
        let devices = ["/dev/a".to_owned(), "/dev/b".to_owned()];
        assert!(hooks.call(Hook::Start, "g", &devices).is_ok());
        assert!(hooks.call(Hook::Stop, "g", &devices).is_ok(), "there is none");
        let failure = hooks.call(Hook::Start, "h", &devices).unwrap_err();
        assert!(failure.to_string().contains("exit status: 1"), "{failure}");
    }

    #[test]
    fn one_that_hangs_is_killed_with_its_children() {
        let (_dir, hooks) = hooks("sleep 1000 & sleep 1000", Duration::from_millis(50));
        let failure = hooks.call(Hook::Start, "g", &[]).unwrap_err();
        assert!(failure.to_string().contains("was killed"), "{failure}");
    }
}

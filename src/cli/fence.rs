//! The fence hook: a program of the administrator's that makes sure that a node can't write.
//!
//! Owns: its call and its time limit. Invariant: only exit status 0 within the limit is a proof; a hook
//! that is cut off is killed with all that it started.

use super::failure::{Exit, Failure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How long the hook may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Calls `hook NODE TERM`.
pub fn fence(hook: &Path, node: &str, term: u64) -> Result<(), Failure> {
    eprintln!("volrep: fencing {node}: {} {node} {term}", hook.display());
    let call = format!("{} {node} {term}", hook.display());
    let failed = |why: String| {
        let what = format!("{node} is not fenced: {call} {why}");
        let next = "correct the hook, or fence it by other means and pass --i-fenced-the-old-primary";
        Failure::new(Exit::Unfenced, what, next)
    };
    match run(hook, node, term, LIMIT) {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(failed(format!("ended with {status}"))),
        Ok(None) => Err(failed(format!("did not end within {} s", LIMIT.as_secs()))),
        Err(e) => Err(failed(format!("can't be run: {e}"))),
    }
}

/// Its status; `None` if it had to be killed.
fn run(hook: &Path, node: &str, term: u64, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let mut command = Command::new(hook);
    // What it prints is for the reader of stderr: stdout is the command's own data.
    command.arg(node).arg(term.to_string()).stdin(Stdio::null()).stdout(io::stderr()).process_group(0);
    let mut child = command.spawn()?;
    let group = Pid::from_raw(child.id() as i32);
    let (tell, told) = mpsc::channel();
    let waiter = std::thread::spawn(move || drop(tell.send(child.wait())));
    let outcome = match told.recv_timeout(limit) {
        Ok(status) => status.map(Some),
        Err(_) => {
            // Not waited for yet, so its number is still its own.
            killpg(group, Signal::SIGKILL)?;
            Ok(None)
        }
    };
    // It has ended, or was killed: the wait is over soon.
    let _ = waiter.join();
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by a process of its own: a child that another test's thread forks while this process
    /// has the file open for writing keeps it open until it executes, and until then a program that
    /// somebody writes to can't be run (ETXTBSY).
    fn hook(dir: &Path, text: &str) -> std::path::PathBuf {
        let path = dir.join("hook");
        let write = r#"printf '#!/bin/sh\n%s\n' "$2" >"$1" && chmod 755 "$1""#;
        let mut sh = Command::new("sh");
        assert!(sh.args(["-c", write, "sh"]).arg(&path).arg(text).status().unwrap().success());
        path
    }

    #[test]
    fn only_success_is_a_proof() {
        let dir = tempfile::tempdir().unwrap();
        let path = hook(dir.path(), r#"[ "$1" = db1 ] && [ "$2" = 7 ]"#);
        assert!(fence(&path, "db1", 7).is_ok());
        let failure = fence(&path, "db1", 8).unwrap_err();
        assert_eq!(failure.exit, Exit::Unfenced);
        assert!(fence(&dir.path().join("none"), "db1", 7).is_err());
    }

    #[test]
    fn a_hook_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let path = hook(dir.path(), "sleep 1000 & sleep 1000");
        assert!(run(&path, "db1", 7, Duration::from_millis(50)).unwrap().is_none());
    }
}

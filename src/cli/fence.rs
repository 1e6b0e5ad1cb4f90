//! The fence hook: a program of the administrator's that makes sure that a node can't write.
//!
//! Owns: its call. Invariant: only exit status 0 within the time limit is a proof.

use super::failure::{Exit, Failure};
use super::hooks::run;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// How long the hook may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Calls `hook NODE TERM`. `flag`: what an administrator says who has fenced it by other means.
pub fn fence(hook: &Path, node: &str, term: u64, flag: &str) -> Result<(), Failure> {
    eprintln!("volrep: fencing {node}: {} {node} {term}", hook.display());
    let call = format!("{} {node} {term}", hook.display());
    let failed = |why: String| {
        let what = format!("{node} is not fenced: {call} {why}");
        let next = format!("correct the hook, or fence it by other means and pass {flag}");
        Failure::new(Exit::Unfenced, what, next)
    };
    match run(Command::new(hook).arg(node).arg(term.to_string()), LIMIT) {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(failed(format!("ended with {status}"))),
        Ok(None) => Err(failed(format!("did not end within {} s", LIMIT.as_secs()))),
        Err(e) => Err(failed(format!("can't be run: {e}"))),
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// Written by a process of its own: a child that another test's thread forks while this process
    /// has the file open for writing keeps it open until it executes, and until then a program that
    /// somebody writes to can't be run (ETXTBSY).
    pub fn script(dir: &Path, text: &str) -> std::path::PathBuf {
        let path = dir.join("hook");
        let write = r#"printf '#!/bin/sh\n%s\n' "$2" >"$1" && chmod 755 "$1""#;
        let mut sh = Command::new("sh");
        assert!(sh.args(["-c", write, "sh"]).arg(&path).arg(text).status().unwrap().success());
        path
    }

    #[test]
    fn only_success_is_a_proof() {
        let dir = tempfile::tempdir().unwrap();
        let path = script(dir.path(), r#"[ "$1" = db1 ] && [ "$2" = 7 ]"#);
        assert!(fence(&path, "db1", 7, "--yes").is_ok());
        let failure = fence(&path, "db1", 8, "--yes").unwrap_err();
        assert_eq!(failure.exit, Exit::Unfenced);
        assert!(fence(&dir.path().join("none"), "db1", 7, "--yes").is_err());
    }
}

//! The `volrep` program as its users run it: arguments, files, exit codes, both forms of output.
//!
//! Owns: scratch places for each test. Invariant: no test touches /etc, /var/lib or /run.

mod contract;
mod control;
mod full_disk;
mod setup;

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Scratch places for one node.
pub struct Place {
    dir: tempfile::TempDir,
}

/// How a command ended.
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// Its data.
    pub stdout: String,
    /// The rest.
    pub stderr: String,
}

impl Ended {
    fn of(output: Output) -> Ended {
        Ended {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).expect("stdout is text"),
            stderr: String::from_utf8(output.stderr).expect("stderr is text"),
        }
    }

    /// The one JSON document on stdout.
    pub fn json(&self) -> Value {
        assert_eq!(self.stdout.lines().count(), 1, "one document: {:?} {}", self.stdout, self.stderr);
        serde_json::from_str(&self.stdout).expect("stdout is JSON")
    }

    /// Checks the exit code, and that stderr says each of `words`.
    #[track_caller]
    pub fn expect(&self, code: i32, words: &[&str]) -> &Ended {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        for word in words {
            assert!(self.stderr.contains(word), "no `{word}` in: {}", self.stderr);
        }
        if code != 0 {
            assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        }
        self
    }
}

/// The program with no VOLREP_* of the caller's.
pub fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_volrep"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("VOLREP_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs the program with these arguments alone.
pub fn volrep<S: AsRef<std::ffi::OsStr>>(args: &[S]) -> Ended {
    Ended::of(program().args(args).output().expect("the program runs"))
}

impl Default for Place {
    fn default() -> Place {
        Place { dir: tempfile::tempdir().expect("a scratch directory") }
    }
}

impl Place {
    /// Empty.
    pub fn new() -> Place {
        Place::default()
    }
    /// Its directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
    /// Where the configuration lies.
    pub fn config(&self) -> PathBuf {
        self.path().join("etc")
    }
    /// A command for this node.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = program();
        command.arg("--config").arg(self.config()).args(args).current_dir(self.path());
        // Write caches go away with the scratch directory.
        command.env("VOLREP_SHM_DIR", self.path().join("shm"));
        command
    }
    /// Runs a command for this node.
    pub fn run(&self, args: &[&str]) -> Ended {
        Ended::of(self.command(args).output().expect("the program runs"))
    }
    /// Sets up a small primary `g` on this node.
    #[track_caller]
    pub fn init(&self, volumes: &[&str]) -> Ended {
        let mut args = vec!["init", "g", "--node", "db1", "--listen", "127.0.0.1:7654", "--journal-size", "8M"];
        volumes.iter().for_each(|v| args.extend(["--volume", v]));
        self.run(&args)
    }
    /// Makes a file.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path().join(name);
        std::fs::write(&path, bytes).expect("a scratch file");
        path
    }
    /// Every path below, in order: to see that nothing is left.
    pub fn tree(&self) -> Vec<String> {
        fn walk(dir: &Path, base: &Path, out: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).expect("a directory").flatten() {
                let path = entry.path();
                out.push(path.strip_prefix(base).expect("below").display().to_string());
                if path.is_dir() {
                    walk(&path, base, out);
                }
            }
        }
        let mut out = Vec::new();
        walk(self.path(), self.path(), &mut out);
        out.sort();
        out
    }
}

//! What the tests of the `volrep` program share: scratch places, commands, daemons.
//!
//! Owns: directories and processes until they are dropped. Invariant: no test touches /etc, /var/lib or
//! /run, and no daemon outlives its test.
#![allow(dead_code, reason = "each test binary uses its part")]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// Scratch places for one node.
pub struct Place {
    dir: tempfile::TempDir,
    /// Of the write cache, if that is to be memory.
    shm: Option<tempfile::TempDir>,
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
    /// From what the command left.
    pub fn of(output: Output) -> Ended {
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
        Place { dir: tempfile::tempdir().expect("a scratch directory"), shm: None }
    }
}

impl Place {
    /// Empty.
    pub fn new() -> Place {
        Place::default()
    }
    /// Empty; the write cache lies in memory, as it does for a user.
    pub fn with_memory() -> Place {
        let shm = tempfile::Builder::new().prefix("volrep-test-").tempdir_in("/dev/shm");
        Place { shm: Some(shm.expect("a directory in /dev/shm")), ..Place::default() }
    }
    /// Its directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
    /// Where the configuration lies.
    pub fn config(&self) -> PathBuf {
        self.path().join("etc")
    }
    /// Where the write cache lies. It goes away with this place.
    pub fn shm(&self) -> PathBuf {
        self.shm.as_ref().map_or_else(|| self.path().join("shm"), |dir| dir.path().to_owned())
    }
    /// A command for this node.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = program();
        command.arg("--config").arg(self.config()).args(args).current_dir(self.path());
        command.env("VOLREP_SHM_DIR", self.shm());
        command
    }
    /// Runs a command for this node.
    pub fn run(&self, args: &[&str]) -> Ended {
        Ended::of(self.command(args).output().expect("the program runs"))
    }
    /// Sets up a small primary `g` on this node.
    #[track_caller]
    pub fn init(&self, volumes: &[&str]) -> Ended {
        let mut args =
            vec!["init", "g", "--node", "db1", "--listen", "127.0.0.1:7654", "--journal-size", "8M"];
        volumes.iter().for_each(|v| args.extend(["--volume", v]));
        self.run(&args)
    }
    /// The events that `history` shows, once they are what `found` looks for: the file follows what happens by the
    /// time that it takes to make a line durable.
    #[track_caller]
    pub fn history(&self, what: &str, found: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        until(what, || {
            let told = self.run(&["history", "g", "--json"]).expect(0, &[]).json();
            let events = told["events"].as_array().expect("a list").clone();
            found(&events).then_some(events)
        })
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

/// Polls `condition` until it gives something; the deadline is only there to end a hang.
#[track_caller]
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited a minute for this: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// `volrep serve g`, killed at the end if it still runs.
pub struct Daemon {
    child: Child,
    /// Its control socket.
    pub socket: PathBuf,
    log: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail if it has ended, and that is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("--- the end of {}:", self.log.display());
            lines[lines.len().saturating_sub(40)..].iter().for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Daemon {
    /// Starts it and waits until it answers.
    #[track_caller]
    pub fn start(place: &Place) -> Daemon {
        let mut daemon = Daemon::spawn(place);
        until("the daemon answers", || {
            if let Some(status) = daemon.child.try_wait().unwrap() {
                panic!("the daemon ended with {status}");
            }
            UnixStream::connect(&daemon.socket).ok()
        });
        daemon
    }

    /// Starts it and waits for nothing.
    pub fn spawn(place: &Place) -> Daemon {
        let log = place.path().join("daemon.log");
        let file = OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let child = place.command(&["serve", "g"]).stdout(Stdio::null()).stderr(file).spawn().unwrap();
        Daemon { child, socket: place.config().join("run/g/control.sock"), log }
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }
    /// Kills it as the kernel's out-of-memory killer would.
    pub fn kill(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }
    /// Waits for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        until("the daemon ends", || self.child.try_wait().unwrap())
    }
    /// Whether it runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
    /// Stops it cleanly.
    #[track_caller]
    pub fn stop(mut self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait();
        assert!(status.success(), "{status}");
    }
    /// Everything that the daemons of this place have logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
    /// Resident memory, bytes.
    pub fn resident(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:")).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
    }
}

/// Whether two files hold the same bytes; where they first differ if not.
pub fn first_difference(a: &Path, b: &Path) -> Option<u64> {
    use std::os::unix::fs::FileExt;
    let (a, b) = (File::open(a).unwrap(), File::open(b).unwrap());
    let len = a.metadata().unwrap().len();
    assert_eq!(len, b.metadata().unwrap().len());
    let (mut x, mut y) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for at in (0..len).step_by(1 << 20) {
        let n = (len - at).min(1 << 20) as usize;
        a.read_exact_at(&mut x[..n], at).unwrap();
        b.read_exact_at(&mut y[..n], at).unwrap();
        if x[..n] != y[..n] {
            return Some(at + x.iter().zip(&y).position(|(p, q)| p != q).unwrap() as u64);
        }
    }
    None
}

//! A PostgreSQL server on a device of a test's own.
//!
//! Owns: the server's process. Invariant: it ends with the test, hard, as the disk under it may.

use crate::filesystem::{missing, mounted};
use crate::pair::{Node, Pair, Setup, client, installed};
use crate::place::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Where Debian has the server.
pub const BIN: &str = "/usr/lib/postgresql/15/bin";

/// A server that is stopped at the end, hard.
pub struct Postgres {
    child: Child,
    dir: PathBuf,
    sockets: PathBuf,
}

/// A command under the user that PostgreSQL insists on.
pub fn as_postgres(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", &format!("{BIN}/{program}")]);
    command.current_dir("/");
    command
}

impl Postgres {
    /// Waits until it answers.
    pub fn start(dir: &Path, sockets: &Path) -> Postgres {
        let mut command = as_postgres("postgres");
        command.arg("-D").arg(dir).arg("-k").arg(sockets).args([
            "-c",
            "listen_addresses=",
            "-c",
            "max_connections=10",
        ]);
        let log = fs::File::create(sockets.join("log")).unwrap();
        let child = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let mut server = Postgres { child, dir: dir.into(), sockets: sockets.into() };
        until("PostgreSQL answers", || {
            if let Some(status) = server.child.try_wait().unwrap() {
                panic!(
                    "PostgreSQL has ended: {status}\n{}",
                    fs::read_to_string(sockets.join("log")).unwrap()
                );
            }
            server.psql(&["-c", "select 1"]).output().unwrap().status.success().then_some(())
        });
        server
    }
    /// A client.
    pub fn psql(&self, args: &[&str]) -> Command {
        let mut command = as_postgres("psql");
        command.arg("-h").arg(&self.sockets).args([
            "-d",
            "postgres",
            "-X",
            "-q",
            "-A",
            "-t",
            "-v",
            "ON_ERROR_STOP=1",
        ]);
        command.args(args);
        command
    }
    /// The answer to one statement.
    #[track_caller]
    pub fn query(&self, sql: &str) -> String {
        let output = self.psql(&["-c", sql]).output().unwrap();
        assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // The server's own children end when they miss it; its immediate shutdown waits for them. On a
        // dead disk it may be unable to remove its files, which is all that can fail.
        let pid = Pid::from_raw(self.child.id() as i32);
        let _ = kill(pid, Signal::SIGQUIT);
        let _ = self.child.wait();
        let _ = fs::metadata(&self.dir);
    }
}

/// Says why there can be no server on a loop device here; readies the test's thread if there can. The first thing in a test.
pub fn impossible() -> bool {
    let there = !missing() && installed("mkfs.ext4") && installed("setpriv");
    if !there || !Path::new(BIN).join("postgres").exists() {
        eprintln!("skipped: postgresql-15 on a loop device is not possible here");
        return true;
    }
    false
}

/// A fresh cluster with page checksums.
pub fn make_cluster(dir: &Path) {
    fs::create_dir(dir).unwrap();
    client("chown", &["postgres", dir.to_str().unwrap()]);
    let made = as_postgres("initdb").args(["-k", "-A", "trust", "-D"]).arg(dir).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// A directory for servers' sockets.
pub fn sockets() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    client("chown", &["postgres", dir.path().to_str().unwrap()]);
    dir
}

/// Lets the server's user through to what is mounted there.
pub fn open(node: &Node) {
    client("chmod", &["755", node.place.path().to_str().unwrap()]);
}

/// A database on the primary's device, on a file system of its own.
pub struct Production {
    pub pair: Pair,
    pub dir: PathBuf,
    pub sockets: tempfile::TempDir,
    pub server: Option<Postgres>,
}

impl Production {
    /// With an empty table `log`, if there can be one here.
    pub fn start(setup: &Setup) -> Option<Production> {
        if impossible() {
            return None;
        }
        let pair = Pair::start(setup);
        let device = pair.primary.attach("fuse").remove(0);
        client("mkfs.ext4", &["-q", &device]);
        [&pair.primary, &pair.shadow].into_iter().for_each(open);
        let (sockets, dir) = (sockets(), mounted(pair.primary.place.path(), &device, "ext4"));
        make_cluster(&dir.join("cluster"));
        let server = Postgres::start(&dir.join("cluster"), sockets.path());
        server.query("create table log (n bigint primary key, filler text)");
        Some(Production { pair, dir, sockets, server: Some(server) })
    }
}

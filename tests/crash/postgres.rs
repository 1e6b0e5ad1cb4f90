//! PostgreSQL on a primary's volumes, and what it finds after a crash.
//!
//! Owns: the server and its clients while they run. Invariants: a commit is noted once the client has heard of it;
//! its recovery after a crash is looked at without a network, by one process.

use crate::judge::{Judge, Verdict};
use crate::log::Mark;
use crate::recorder::Recorder;
use crate::stage::{run, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Where Debian has the server.
const BIN: &str = "/usr/lib/postgresql/15/bin";

const SETTINGS: &str = "\
listen_addresses = ''
max_connections = 10
shared_buffers = 1MB
min_wal_size = 2MB
max_wal_size = 3MB
checkpoint_timeout = 30s
autovacuum_naptime = 1s
";

/// What all indexes and tables have to stand.
const LOOK: &str = "\
select 'log', coalesce(max(n), 0), count(*) from log;
select 'tables', count(*) from pg_class c, lateral verify_heapam(c.oid) v where c.relkind in ('r', 't') and c.relpersistence = 'p';
select 'indexes', count(bt_index_check(c.oid, true)::text) from pg_class c join pg_am a on a.oid = c.relam where a.amname = 'btree' and c.relkind = 'i';
";

/// Whether it is installed.
pub fn possible() -> bool {
    Path::new(BIN).join("postgres").exists()
}

/// A command under the user that PostgreSQL insists on.
fn as_postgres(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", &format!("{BIN}/{program}")]);
    command.current_dir("/");
    command
}

/// A running server; it ends hard.
struct Server(Child, std::path::PathBuf);

impl Server {
    fn start(cluster: &Path) -> Server {
        let sockets = cluster.parent().expect("a mount").to_owned();
        let log = fs::File::create(sockets.parent().expect("a root").join("postgres.log")).unwrap();
        let mut command = as_postgres("postgres");
        command.arg("-D").arg(cluster).arg("-k").arg(&sockets).stdout(Stdio::null()).stderr(log);
        let server = Server(command.spawn().unwrap(), sockets);
        until("PostgreSQL answers", || {
            server.psql().args(["-c", "select 1"]).output().unwrap().status.success().then_some(())
        });
        server
    }

    fn psql(&self) -> Command {
        let mut command = as_postgres("psql");
        command.arg("-h").arg(&self.1).args(["-d", "postgres", "-XqAt", "-v", "ON_ERROR_STOP=1"]);
        command
    }

    fn stop(mut self) {
        kill(Pid::from_raw(self.0.id() as i32), Signal::SIGINT).unwrap();
        until("PostgreSQL ends", || self.0.try_wait().unwrap());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGQUIT);
        let _ = self.0.wait();
    }
}

/// Makes a cluster with page checksums below the mount of the first volume; its log is on that of the second.
pub fn make(data: &Path, wal: &Path) {
    let cluster = data.join("cluster");
    for dir in [&cluster, &wal.join("pg_wal")] {
        fs::create_dir(dir).unwrap();
        run(Command::new("chown").arg("postgres").arg(dir));
    }
    run(Command::new("chown").arg("postgres").arg(data));
    run(as_postgres("initdb")
        .args(["-k", "-A", "trust", "--wal-segsize=1", "--no-sync", "-D"])
        .arg(&cluster));
    // Wherever both are mounted, side by side.
    let own = cluster.join("pg_wal");
    run(Command::new("cp").arg("-a").arg(own.join(".")).arg(wal.join("pg_wal")));
    fs::remove_dir_all(&own).unwrap();
    std::os::unix::fs::symlink("../../wal/pg_wal", &own).unwrap();
    let file = cluster.join("postgresql.auto.conf");
    fs::write(&file, SETTINGS).unwrap();
    let server = Server::start(&cluster);
    let sql = "create extension amcheck; create table log (n bigint primary key, filler text); \
               create table noise (n bigint primary key, v bigint, filler text); create index on noise (v); \
               insert into noise select n, n, repeat('y', 200) from generate_series(1, 3000) n";
    run(server.psql().args(["-c", sql]));
    server.stop();
}

/// Inserts number after number, while another client updates.
pub fn work(data: &Path, commits: u64, recorder: &Recorder) {
    let server = Server::start(&data.join("cluster"));
    let spawn = |script: String| {
        let mut client = server.psql().stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut to = client.stdin.take().unwrap();
        // It fails when the client has ended, which it does at the first error.
        std::thread::spawn(move || drop(to.write_all(script.as_bytes())));
        client
    };
    let insert = |n| format!("insert into log values ({n}, repeat('x', {})) returning n;\n", 100 + n % 900);
    let update = |n: u64| {
        let k = n * 7919 % 3000;
        format!(
            "update noise set v = {n}, filler = repeat('z', {}) where n between {k} and {};\n",
            n % 300,
            k + 5
        )
    };
    let mut inserts = spawn((1..=commits).map(insert).collect());
    let mut updates = spawn((1..=commits).map(update).collect());
    let mut heard = 0;
    for line in BufReader::new(inserts.stdout.take().unwrap()).lines().map_while(Result::ok) {
        if let Ok(n) = line.parse() {
            heard = n;
            recorder.mark(Mark::Kept(n));
        }
    }
    assert!(inserts.wait().unwrap().success() && heard == commits, "{heard} of {commits} commits");
    assert!(updates.wait().unwrap().success(), "the updates failed");
    server.stop();
}

/// Has PostgreSQL recover, and looks at every page, every table, every index, and at the commits.
pub fn look(judge: &mut Judge, data: &Path, kept: u64) -> Verdict<()> {
    let cluster = data.join("cluster");
    let mut command = as_postgres("postgres");
    command.args(["--single", "-j", "-D"]).arg(&cluster).arg("postgres");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut server = command.spawn().unwrap();
    // With -j a statement ends at an empty line.
    let script = LOOK.replace(";\n", ";\n\n");
    // It fails when the server has ended, which is told by its output.
    let _ = server.stdin.take().unwrap().write_all(script.as_bytes());
    let output = server.wait_with_output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let wrong = |what: &str| Err(format!("{what}\n{out}\n{err}"));
    if !output.status.success() || ["ERROR", "FATAL", "PANIC"].iter().any(|w| err.contains(w)) {
        return wrong("PostgreSQL does not recover");
    }
    // ` 2: max = "17"	(typeid = ...`
    let values: Vec<&str> = out.lines().filter_map(|l| l.split(" = \"").nth(1)?.split('"').next()).collect();
    let [_, last, count, _, bad, _, checked] = values[..] else { return wrong("its answers are missing") };
    let number = |text: &str| text.parse::<u64>().unwrap_or(u64::MAX);
    if number(last) != number(count) {
        return wrong("commits are missing in between");
    }
    if number(last) < kept {
        return wrong(&format!("commit {kept} was acknowledged"));
    }
    if number(bad) != 0 || number(checked) < 50 {
        return wrong("amcheck");
    }
    judge.lap("postgres");
    let output = as_postgres("pg_checksums").args(["--check", "-D"]).arg(&cluster).output().unwrap();
    judge.lap("checksums");
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("pg_checksums: {}", String::from_utf8_lossy(&output.stdout))),
    }
}

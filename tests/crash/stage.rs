//! A primary and its shadow whose files lie on the recorder.
//!
//! Owns: the scratch places, the daemons, the mounts. Invariants: the nodes believe to run under another boot of the
//! kernel than those who recover them later, as after a power cut; all is gone when the stage is dropped (the mounts
//! with the name space of this process).

use crate::log::{Mark, Recording, Tree};
use crate::recorder::{Mounted, Recorder};
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};
use volrep::control::client::call;
use volrep::control::{Reply, Verb};
use volrep::node::status::Status;

/// The nodes' names.
pub const NODES: [&str; 2] = ["db1", "db2"];
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Only there to end a hang.
const LIMIT: Duration = Duration::from_secs(60);

/// How the nodes are set up.
pub struct Setup {
    /// Names and MiB.
    pub volumes: &'static [(&'static str, u64)],
    /// The shadow is in the sync set.
    pub sync: bool,
    /// Each knows where the other listens.
    pub both: bool,
    /// There is a checkpoint every few records, not twice in a journal.
    pub hasty: bool,
}

/// See the module's documentation.
pub struct Stage {
    root: PathBuf,
    volumes: &'static [(&'static str, u64)],
    mounted: Option<Mounted>,
    pub recorder: Recorder,
    daemons: [Option<Child>; 2],
}

/// Memory below this process's root, with all that a test needs.
pub fn scratch(root: &Path) {
    let ram = root.join("ram");
    fs::create_dir_all(&ram).unwrap();
    mount(Some("crash"), &ram, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).unwrap();
}

/// Waits for something; the limit is only there to end a hang.
#[track_caller]
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited a minute for this: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Runs a program that must succeed; its standard output.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{command:?}: {status}\n{out}\n{err}");
    out.into_owned()
}

/// The program, if it is not that of this build.
static PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Has another program be the one that is tried.
pub fn use_program(path: PathBuf) {
    PROGRAM.set(path).expect("it is said once");
}

/// A command for a node whose files lie below `place`.
pub fn volrep(place: &Path, private: &Path) -> Command {
    let mut command =
        Command::new(PROGRAM.get().map_or(Path::new(env!("CARGO_BIN_EXE_volrep")), PathBuf::as_path));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("VOLREP_")) {
        command.env_remove(name);
    }
    command.arg("--config").arg(place.join("etc")).current_dir("/").stdin(Stdio::null());
    for (name, dir) in [("RUN", "run"), ("DEV", "dev"), ("SHM", "shm")] {
        command.env(format!("VOLREP_{name}_DIR"), private.join(dir));
    }
    command
}

fn free_port(seed: u64) -> u16 {
    let ports =
        (0..2000).map(|n| (20_000 + (u64::from(std::process::id()) * 31 + seed + n * 7) % 12_000) as u16);
    ports.into_iter().find(|p| TcpListener::bind(("127.0.0.1", *p)).is_ok()).expect("a port is free")
}

impl Stage {
    /// Sets both up, and has the shadow follow.
    pub fn new(root: &Path, setup: &Setup) -> Stage {
        let mut stage = Stage::empty(root, setup.volumes, "01234567-89ab-cdef-0123-456789abcdef\n");
        stage.set_up(setup);
        stage.start(0);
        stage.start(1);
        stage.wait_following(setup.sync);
        stage
    }

    /// The primary alone, from a crash image that `make` puts where it is told.
    pub fn again(root: &Path, volumes: &'static [(&'static str, u64)], make: impl FnOnce(&Path)) -> Stage {
        let stage = Stage::empty(root, volumes, "76543210-89ab-cdef-0123-456789abcdef\n");
        fs::create_dir_all(stage.private(0)).unwrap();
        make(&stage.place(0));
        stage
    }

    fn empty(root: &Path, volumes: &'static [(&'static str, u64)], boot: &str) -> Stage {
        fs::write(root.join("ram/boot"), boot).unwrap();
        let bind = MsFlags::MS_BIND;
        mount(Some(&root.join("ram/boot")), BOOT_ID, None::<&str>, bind, None::<&str>).unwrap();
        let mounted = Mounted::new(&root.join("ram/below"), &root.join("disk"));
        let recorder = mounted.recorder.clone();
        Stage { root: root.into(), volumes, mounted: Some(mounted), recorder, daemons: [None, None] }
    }

    fn set_up(&self, setup: &Setup) {
        let listen = format!("127.0.0.1:{}", free_port(0));
        let back = if setup.both { format!("127.0.0.1:{}", free_port(3)) } else { "none".to_owned() };
        for node in NODES {
            fs::create_dir_all(self.root.join("ram").join(node)).unwrap();
            fs::create_dir(self.root.join("disk").join(node)).unwrap();
        }
        let sizes = ["--journal-size", "8M", "--cache-size", "4M"];
        let mut init = self.command(0);
        init.args(["init", "g", "--node", "db1", "--listen", &listen]).args(sizes);
        let mut join = self.command(1);
        for (name, mib) in setup.volumes {
            init.arg("--volume").arg(format!("{name}={}:{mib}M", self.place(0).join(name).display()));
        }
        if setup.sync {
            init.args(["--sync", "db2"]);
        }
        run(&mut init);
        let token = run(self.command(0).args(["token", "g", "--peer", "db2"]));
        if setup.both {
            let path = self.place(0).join("etc/g.toml");
            let text = fs::read_to_string(&path).unwrap();
            fs::write(&path, format!("{text}\n[[peer]]\nname = \"db2\"\naddress = \"{back}\"\n")).unwrap();
        }
        join.args(["join", token.trim(), "--node", "db2", "--listen", &back]).args(sizes);
        for (name, _) in setup.volumes {
            join.arg("--volume").arg(format!("{name}={}", self.place(1).join(name).display()));
        }
        run(&mut join);
        if setup.hasty {
            for node in [0, 1] {
                let path = self.place(node).join("etc/g.toml");
                let text = fs::read_to_string(&path).unwrap();
                let table = "[timing]\n";
                assert!(text.contains(table), "a configuration has this table");
                let often = format!("{table}write_back_after = \"3ms\"\ncheckpoint_after = \"20ms\"\n");
                fs::write(&path, text.replace(table, &often)).unwrap();
            }
        }
    }

    /// The place of a node's files.
    pub fn place(&self, node: usize) -> PathBuf {
        self.root.join("disk").join(NODES[node])
    }
    fn private(&self, node: usize) -> PathBuf {
        self.root.join("ram").join(NODES[node])
    }
    /// Where things that are no node's lie.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// A command for a node.
    pub fn command(&self, node: usize) -> Command {
        volrep(&self.place(node), &self.private(node))
    }

    /// Serves a node.
    pub fn start(&mut self, node: usize) {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log(node)).unwrap();
        let child =
            self.command(node).args(["serve", "g"]).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.daemons[node] = Some(child);
        until("the daemon answers", || {
            if let Some(status) = self.daemons[node].as_mut().and_then(|d| d.try_wait().unwrap()) {
                panic!(
                    "{} ended with {status}: {}",
                    NODES[node],
                    fs::read_to_string(self.log(node)).unwrap()
                );
            }
            self.ask(node)
        });
    }

    fn log(&self, node: usize) -> PathBuf {
        self.private(node).join("log")
    }

    /// Stops a node cleanly.
    pub fn stop(&mut self, node: usize) {
        let mut daemon = self.daemons[node].take().expect("it is served");
        kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
        let status = until("the daemon ends", || daemon.try_wait().unwrap());
        assert!(status.success(), "{}: {}", NODES[node], fs::read_to_string(self.log(node)).unwrap());
    }

    /// Kills a node's daemon.
    pub fn kill(&mut self, node: usize) {
        let mut daemon = self.daemons[node].take().expect("it is served");
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    fn socket(&self, node: usize, name: &str) -> PathBuf {
        self.private(node).join("run/g").join(name)
    }
    /// Where a node serves NBD.
    pub fn nbd(&self, node: usize) -> PathBuf {
        self.socket(node, "nbd.sock")
    }

    /// A node's state, if it answers.
    pub fn ask(&self, node: usize) -> Option<Status> {
        status(&self.socket(node, "control.sock"))
    }

    /// Waits until the shadow follows, and is in the sync set if it is to be.
    pub fn wait_following(&self, sync: bool) {
        until("the shadow follows", || {
            let status = serde_json::to_value(self.ask(0)?).unwrap();
            let peer = &status["peers"][0];
            (peer["state"] == "UpToDate" && (!sync || peer["sync"] == true)).then_some(())
        });
    }

    /// Waits until a node's peer is in this state.
    pub fn wait_peer(&self, node: usize, state: &str) {
        until(state, || (self.ask(node)?.peers.first()?.state == state).then_some(()));
    }

    /// Offers a node's volumes; what users open.
    pub fn attach(&self, node: usize, device: &str) -> Vec<String> {
        let out = run(self.command(node).args(["attach", "g", "--device", device]));
        out.lines().map(str::to_owned).collect()
    }

    /// Takes the devices away, and waits until both have everything.
    pub fn settle(&self, node: usize) {
        run(self.command(node).args(["detach", "g"]));
        until("both have applied everything", || {
            let (a, b) = (self.ask(0)?, self.ask(1)?);
            let tail = a.tail_lsn.max(b.tail_lsn);
            (a.applied_lsn == tail && b.applied_lsn == tail).then_some(())
        });
    }

    /// Stops both (what they have is durable then) and records what comes now: they are started again, then `work` is
    /// done with them, which leaves whom it likes running.
    pub fn record(self, work: impl FnOnce(&mut Stage)) -> Recording {
        self.record_spoilt(|_| {}, work)
    }

    /// The same; `spoil` may change files while nobody uses them.
    pub fn record_spoilt(
        mut self,
        spoil: impl FnOnce(&Recorder),
        work: impl FnOnce(&mut Stage),
    ) -> Recording {
        self.stop(0);
        self.stop(1);
        spoil(&self.recorder);
        let base = self.recorder.begin();
        self.start(0);
        self.start(1);
        self.wait_following(false);
        self.finish(base, work)
    }

    /// Records the primary alone from its start on, and then `work`.
    pub fn record_alone(mut self, work: impl FnOnce(&mut Stage)) -> Recording {
        let base = self.recorder.begin();
        self.start(0);
        self.finish(base, work)
    }

    fn finish(mut self, base: Tree, work: impl FnOnce(&mut Stage)) -> Recording {
        work(&mut self);
        for node in 0..2 {
            if self.daemons[node].is_some() {
                self.stop(node);
            }
        }
        self.recorder.end(base)
    }

    /// Does `work` while the nodes' positions are asked for and noted.
    pub fn watched<R>(&self, work: impl FnOnce() -> R) -> R {
        let ended = Arc::new(AtomicBool::new(false));
        let sockets = [0, 1].map(|node| self.socket(node, "control.sock"));
        let (over, recorder) = (ended.clone(), self.recorder.clone());
        let watch = std::thread::spawn(move || {
            while !over.load(Ordering::SeqCst) {
                for (node, socket) in sockets.iter().enumerate() {
                    let Some(status) = status(socket) else { continue };
                    let (durable, applied) = (status.durable_lsn, status.applied_lsn);
                    recorder.mark(Mark::Told { node, durable, applied });
                }
                std::thread::sleep(Duration::from_millis(3));
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        ended.store(true, Ordering::SeqCst);
        watch.join().unwrap();
        result.unwrap_or_else(|e| std::panic::resume_unwind(e))
    }

    /// The names of the volumes.
    pub fn volumes(&self) -> impl Iterator<Item = &'static str> {
        self.volumes.iter().map(|v| v.0)
    }
}

fn status(socket: &Path) -> Option<Status> {
    match call(socket, Verb::Status, Some(LIMIT)) {
        Ok(Reply::Status { status }) => Some(*status),
        _ => None,
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        for daemon in self.daemons.iter_mut().flatten() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        for volume in self.volumes() {
            let _ = umount2(&self.root.join("fs").join(volume), MntFlags::MNT_DETACH);
        }
        if let Some(mounted) = self.mounted.take() {
            mounted.end();
        }
        let _ = umount(BOOT_ID);
        for path in ["ram/below", "ram/db1", "ram/db2"] {
            let _ = fs::remove_dir_all(self.root.join(path));
        }
    }
}

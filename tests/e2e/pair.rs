//! A primary and its shadow, with real daemons, real files and a link over loopback.
//!
//! Owns: everything that a test starts: daemons, file systems, loop devices, memory. Invariant: all of
//! it is gone when the pair is dropped, even by a panic.

use crate::place::{Daemon, Place, first_difference, until};
use nix::mount::{MntFlags, umount2};
use serde_json::Value;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Tests that measure time run alone.
static TURN: RwLock<()> = RwLock::new(());

#[allow(dead_code, reason = "held, not read")]
enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// How a pair is set up.
pub struct Setup {
    /// Names and bytes.
    pub volumes: Vec<(&'static str, u64)>,
    /// `--journal-size`, of both.
    pub journal: &'static str,
    /// `--cache-size`, of the primary.
    pub cache: &'static str,
    /// The shadow is in the sync set.
    pub sync: bool,
    /// Lines for the primary's configuration, put before its first table.
    pub config: &'static str,
    /// Bytes that do not compress at the front of each of the primary's volumes before it is set up.
    pub filled: u64,
    /// No other test runs meanwhile.
    pub alone: bool,
    /// A shadow that the full journal can't feed is left behind.
    pub behind: bool,
    /// The shadow listens, too, and the primary knows where: it can follow when the roles have changed.
    pub back: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            volumes: vec![("data", 64 << 20)],
            journal: "128M",
            cache: "16M",
            sync: false,
            config: "",
            filled: 0,
            alone: false,
            behind: false,
            back: false,
        }
    }
}

/// One node.
pub struct Node {
    /// Its files.
    pub place: Place,
    daemon: Option<Daemon>,
}

/// See the module's documentation.
pub struct Pair {
    /// The node that writes.
    pub primary: Node,
    /// The node that follows.
    pub shadow: Node,
    names: Vec<&'static str>,
    _turn: Turn,
}

/// A port that nothing listens on, outside of the range from which the kernel takes ports for
/// outgoing connections (a shadow that redials could connect to itself there).
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    for _ in 0..1000 {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 20_000 + ((std::process::id() % 11_000) as u16 + n * 7) % 12_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no port is free");
}

impl Node {
    /// One that is not served.
    pub fn new() -> Node {
        Node { place: Place::with_memory(), daemon: None }
    }
    /// Serves it.
    #[track_caller]
    pub fn start(&mut self) {
        self.daemon = Some(Daemon::start(&self.place));
    }
    /// Its daemon.
    pub fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("a daemon runs")
    }
    /// Kills its daemon.
    pub fn kill(&mut self) {
        self.daemon().kill();
        self.daemon = None;
    }
    /// Stops its daemon cleanly.
    #[track_caller]
    pub fn stop(&mut self) {
        self.daemon.take().expect("a daemon runs").stop();
    }
    /// Its state.
    #[track_caller]
    pub fn status(&self) -> Value {
        let ended = self.place.run(&["status", "g", "--json"]);
        ended.expect(0, &[]);
        ended.json()
    }
    /// The first line of its state as text, which ends in what to do.
    pub fn told(&self) -> String {
        self.place.run(&["status", "g"]).stdout
    }
    /// Attaches it; the devices, in the order of the volumes.
    #[track_caller]
    pub fn attach(&self, kind: &str) -> Vec<String> {
        let ended = self.place.run(&["attach", "g", "--device", kind]);
        ended.expect(0, &[]);
        ended.stdout.lines().map(str::to_owned).collect()
    }
    /// Its NBD socket.
    pub fn socket(&self) -> PathBuf {
        self.place.config().join("run/g/nbd.sock")
    }
    /// Waits until it is served and attached again.
    #[track_caller]
    pub fn wait_attached(&mut self) {
        until("the volumes are attached", || {
            assert!(self.daemon().is_running(), "the daemon ended");
            self.status()["volumes"][0]["device"].as_str().map(|_| ())
        });
    }
    /// The file behind a volume.
    pub fn backing(&self, volume: &str) -> PathBuf {
        self.place.path().join(volume)
    }
    /// Tells it where another node listens.
    pub fn knows(&self, name: &str, address: &str) {
        self.configure(|text| format!("{text}\n[[peer]]\nname = \"{name}\"\naddress = \"{address}\"\n"));
    }
    /// As its configuration has it.
    pub fn node_id(&self) -> String {
        let text = std::fs::read_to_string(self.place.config().join("g.toml")).unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("node_id = \"")).unwrap();
        line.trim_end_matches('"').to_owned()
    }
    /// Changes its configuration.
    pub fn configure(&self, change: impl FnOnce(String) -> String) {
        let path = self.place.config().join("g.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, change(text)).unwrap();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Whatever of this exists after a failed test; nothing of it after a good one.
        let below = self.place.path().to_owned();
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let ours = |line: &str| line.split(' ').nth(1).map(PathBuf::from).filter(|p| p.starts_with(&below));
        let mut mounts: Vec<_> = mounts.lines().filter_map(ours).collect();
        let fronts = mounts.extract_if(.., |m| m.ends_with("run/g/fuse") || m.ends_with("run/g/view"));
        let fronts: Vec<_> = fronts.collect();
        for mount in mounts.iter().rev() {
            let _ = umount2(mount, MntFlags::MNT_DETACH);
        }
        if let Some(daemon) = self.daemon.as_mut()
            && std::thread::panicking()
        {
            daemon.kill();
        }
        self.daemon = None;
        for front in fronts {
            let loops = Command::new("losetup")
                .args(["--list", "--noheadings", "--output", "NAME,BACK-FILE"])
                .output();
            let loops = loops.map(|o| String::from_utf8_lossy(&o.stdout).into_owned()).unwrap_or_default();
            for line in loops.lines().filter(|l| l.contains(front.to_str().unwrap_or("?"))) {
                let device = line.split_whitespace().next().unwrap_or_default();
                let _ = Command::new("losetup").args(["--detach", device]).status();
            }
            let _ = umount2(&front, MntFlags::MNT_DETACH | MntFlags::MNT_FORCE);
        }
    }
}

impl Pair {
    /// Sets both up and serves both.
    #[track_caller]
    pub fn start(setup: &Setup) -> Pair {
        let mut pair = Pair::prepare(setup);
        pair.primary.start();
        pair.shadow.start();
        pair.wait_following();
        pair
    }

    /// Sets both up.
    #[track_caller]
    pub fn prepare(setup: &Setup) -> Pair {
        let turn = match setup.alone {
            true => Turn::Alone(TURN.write().unwrap_or_else(PoisonError::into_inner)),
            false => Turn::Shared(TURN.read().unwrap_or_else(PoisonError::into_inner)),
        };
        let (primary, shadow) = (Node::new(), Node::new());
        let listen = format!("127.0.0.1:{}", free_port());
        if setup.filled > 0 {
            setup.volumes.iter().for_each(|(n, size)| fill(&primary.backing(n), *size, setup.filled));
        }
        let spec = |(n, size): &(&str, u64)| match setup.filled {
            0 => format!("{n}={n}:{size}"),
            _ => format!("{n}={n}"),
        };
        let volumes: Vec<_> = setup.volumes.iter().map(spec).collect();
        let mut args =
            vec!["init", "g", "--node", "db1", "--listen", &listen, "--journal-size", setup.journal];
        args.extend(["--cache-size", setup.cache]);
        volumes.iter().for_each(|v| args.extend(["--volume", v]));
        if setup.sync {
            args.extend(["--sync", "db2"]);
        }
        primary.place.run(&args).expect(0, &[]);
        primary.configure(|text| format!("{}\n{}", setup.config, text));
        if setup.behind {
            primary.configure(|text| text.replace("on_full = \"block\"", "on_full = \"behind\""));
        }
        let token = primary.place.run(&["token", "g", "--peer", "db2"]);
        token.expect(0, &[]);
        let listen = if setup.back { format!("127.0.0.1:{}", free_port()) } else { "none".to_owned() };
        if setup.back {
            primary.knows("db2", &listen);
        }
        let mut args =
            vec!["join", token.stdout.trim(), "--listen", &listen, "--journal-size", setup.journal];
        let volumes: Vec<_> = setup.volumes.iter().map(|(n, _)| format!("{n}={n}")).collect();
        volumes.iter().for_each(|v| args.extend(["--volume", v]));
        shadow.place.run(&args).expect(0, &[]);
        Pair { primary, shadow, names: setup.volumes.iter().map(|v| v.0).collect(), _turn: turn }
    }

    /// Waits until the shadow follows (and, if it is to be, is in the sync set).
    #[track_caller]
    pub fn wait_following(&self) {
        let sync = std::fs::read_to_string(self.primary.place.config().join("g.toml"))
            .unwrap()
            .contains("\nsync = true");
        until("the shadow follows", || {
            let s = self.primary.status();
            let peer = &s["peers"][0];
            (peer["state"] == "UpToDate" && (!sync || peer["sync"] == true)).then_some(())
        });
    }

    /// Drains the primary and waits until the shadow has applied everything.
    #[track_caller]
    pub fn drain(&self) {
        self.primary.place.run(&["detach", "g"]).expect(0, &[]);
        self.settle();
    }

    /// Waits until both have everything in their backings; the devices stay.
    #[track_caller]
    pub fn settle(&self) {
        until("both have applied everything", || {
            let (p, s) = (self.primary.status(), self.shadow.status());
            (s["applied_lsn"] == p["tail_lsn"] && p["applied_lsn"] == p["tail_lsn"]).then_some(())
        });
    }

    /// Drains, stops both, and compares their files byte for byte.
    #[track_caller]
    pub fn finish(&mut self) {
        self.drain();
        self.primary.stop();
        self.shadow.stop();
        self.compare();
    }

    /// The backings are equal.
    #[track_caller]
    pub fn compare(&self) {
        for name in &self.names {
            let (a, b) = (self.primary.backing(name), self.shadow.backing(name));
            assert_eq!(first_difference(&a, &b), None, "{name} differs at this byte");
        }
    }

    /// Makes the shadow the primary, after the old one was killed.
    #[track_caller]
    pub fn promote(&self) {
        // A connection outlives its killed process by a moment, and promotion refuses while it stands.
        until("the shadow misses the primary", || {
            (self.shadow.status()["peers"][0]["state"] == "Disconnected").then_some(())
        });
        let args = ["promote", "g", "--i-fenced-the-old-primary", "--yes"];
        self.shadow.place.run(&args).expect(0, &[]);
    }
}

fn fill(path: &Path, size: u64, filled: u64) {
    let mut noise = vec![0; filled as usize];
    blake3::Hasher::new().update(&size.to_le_bytes()).finalize_xof().fill(&mut noise);
    std::fs::write(path, noise).unwrap();
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(size).unwrap();
}

/// Whether the long forms were asked for.
pub fn long() -> bool {
    std::env::var_os("VOLREP_LONG").is_some_and(|v| v != "0")
}

/// Runs a client that must be installed; its standard output, once it has succeeded.
#[track_caller]
pub fn client(program: &str, args: &[&str]) -> String {
    // The distribution's python holds libnbd's bindings; another one may come first in PATH.
    let search = format!("/usr/bin:/bin:/usr/sbin:/sbin:{}", std::env::var("PATH").unwrap_or_default());
    // A client that waits for a reply that never comes must not wait for ever.
    let output = Command::new("timeout")
        .args(["900", program])
        .args(args)
        .env("PATH", search)
        .current_dir("/tmp")
        .output();
    let output = output.unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// Whether a client is installed; says so if not.
pub fn installed(program: &str) -> bool {
    let found = ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin"]
        .iter()
        .any(|d| Path::new(d).join(program).exists());
    if !found {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

//! What becomes of a crash image: volrep's recovery, and what others find on the recovered volumes.
//!
//! Owns: a worker's scratch places and loop devices. Invariant: the daemon that recovers is the real one, on real
//! files; what is looked at is the backing, after that daemon has drained to it.

use crate::stage::{self, NODES, volrep};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use volrep::front::loopdev::LoopDevice;

/// A worker's place.
pub struct Judge {
    root: PathBuf,
    /// The directory that the recorded nodes lay in.
    recorded: String,
    ready: UnixDatagram,
    loops: Vec<(PathBuf, LoopDevice)>,
    laps: Laps,
    lap: Instant,
}

/// Seconds that went into something.
pub type Laps = BTreeMap<&'static str, f64>;

/// What makes an image wrong; empty words are not among them.
pub type Verdict<T> = Result<T, String>;

impl Judge {
    /// In this place.
    pub fn new(root: &Path, recorded: &Path) -> Judge {
        fs::create_dir_all(root.join("private")).unwrap();
        fs::create_dir_all(root.join("fs")).unwrap();
        let socket = root.join("ready");
        let _ = fs::remove_file(&socket);
        let ready = UnixDatagram::bind(&socket).unwrap();
        ready.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let recorded = recorded.to_str().expect("a path of text").to_owned();
        Judge {
            root: root.into(),
            recorded,
            ready,
            loops: Vec::new(),
            laps: Laps::new(),
            lap: Instant::now(),
        }
    }

    /// Where the image of a node is to lie.
    pub fn place(&self, node: usize) -> PathBuf {
        self.root.join(NODES[node])
    }

    /// A node's file as it is to be here: the configuration names other places, and nobody is listened for.
    pub fn edit(&self, name: &str, bytes: &[u8]) -> Option<Vec<u8>> {
        if name != "g.toml" {
            return None;
        }
        let text = String::from_utf8(bytes.to_vec()).ok()?;
        let text = text.replace(&self.recorded, self.root.to_str().expect("a path of text"));
        let line = |l: &str| if l.starts_with("listen = ") { String::new() } else { l.to_owned() };
        Some(text.lines().map(line).collect::<Vec<_>>().join("\n").into_bytes())
    }

    /// Starts the node, waits until it is ready, promotes it if asked to, and stops it cleanly.
    pub fn recover(&self, node: usize, promote: bool) -> Verdict<()> {
        let private = self.root.join("private");
        // The power was cut: what was in memory is gone.
        let _ = fs::remove_dir_all(private.join("shm"));
        let path = private.join("log");
        let log = fs::File::create(&path).unwrap();
        let place = self.place(node);
        let mut command = volrep(&place, &private);
        command.args(["serve", "g", "--workers", "1"]).env("NOTIFY_SOCKET", self.root.join("ready"));
        let mut daemon = command.stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let told = |what: String| Err(format!("{what}\n{}", fs::read_to_string(&path).unwrap_or_default()));
        let mut words = [0; 512];
        let mut tries = 0;
        loop {
            match self.ready.recv(&mut words) {
                Ok(n) if words[..n].starts_with(b"READY=1") => break,
                Ok(_) => {}
                Err(_) => tries += 1,
            }
            if let Some(status) = daemon.try_wait().unwrap() {
                return told(format!("recovery ended with {status}"));
            }
            if tries > 3000 {
                let _ = daemon.kill();
                let _ = daemon.wait();
                return told("recovery does not end".into());
            }
        }
        let mut promoted = Ok(());
        if promote {
            let args = ["promote", "g", "--i-fenced-the-old-primary", "--yes"];
            let output = volrep(&place, &private).args(args).output().unwrap();
            if !output.status.success() {
                promoted = Err(format!("promote: {}", String::from_utf8_lossy(&output.stderr)));
            }
        }
        kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM).unwrap();
        let status = daemon.wait().unwrap();
        // What it says at its end is for nobody.
        while self.ready.recv(&mut words).is_ok_and(|n| !words[..n].starts_with(b"STOPPING=1")) {}
        if !status.success() {
            return told(format!("the recovered daemon ended with {status}"));
        }
        promoted
    }

    /// A block device on a file of the image. It stays; the file is always the same.
    fn device(&mut self, file: &Path) -> PathBuf {
        if let Some((_, device)) = self.loops.iter().find(|(path, _)| path == file) {
            return device.path();
        }
        let mut options = OpenOptions::new();
        let open = options.read(true).write(true).custom_flags(nix::libc::O_DIRECT).open(file).unwrap();
        let device = LoopDevice::bind(&open, file, 512, false).unwrap();
        let path = device.path();
        self.loops.push((file.into(), device));
        path
    }

    /// Mounts a volume of the image; what `look` finds there.
    pub fn mounted<R>(
        &mut self,
        (node, volume): (usize, &str),
        kind: &str,
        look: impl FnOnce(&mut Judge, &Path) -> Verdict<R>,
    ) -> Verdict<R> {
        let device = self.device(&self.place(node).join(volume));
        let at = self.root.join("fs").join(volume);
        fs::create_dir_all(&at).unwrap();
        let options = if kind == "xfs" { Some("nouuid") } else { None };
        mount(Some(&device), &at, Some(kind), MsFlags::empty(), options)
            .map_err(|e| format!("mount {volume} ({kind}): {e}"))?;
        let found = look(self, &at);
        umount2(&at, MntFlags::empty()).map_err(|e| format!("unmount {volume}: {e}"))?;
        found
    }

    /// Has the file system checked by its own program, which changes nothing.
    pub fn checked(&self, (node, volume): (usize, &str), kind: &str) -> Verdict<()> {
        let file = self.place(node).join(volume);
        let mut command = match kind {
            "xfs" => Command::new("xfs_repair"),
            _ => Command::new("e2fsck"),
        };
        command.arg(if kind == "xfs" { "-n" } else { "-fn" }).arg(&file);
        let output = command.stdin(Stdio::null()).output().unwrap();
        match output.status.success() {
            true => Ok(()),
            false => Err(format!(
                "{command:?}: {}\n{}{}",
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            )),
        }
    }

    /// The paths of the volumes of the image.
    pub fn volumes(&self, node: usize, names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(|v| self.place(node).join(v)).collect()
    }

    /// The time since the last lap went into this; into nothing without a name.
    pub fn lap(&mut self, name: &'static str) {
        let took = std::mem::replace(&mut self.lap, Instant::now()).elapsed().as_secs_f64();
        if !name.is_empty() {
            *self.laps.entry(name).or_default() += took;
        }
    }
    /// What its time went into.
    pub fn laps(&self) -> Laps {
        self.laps.clone()
    }
}

impl Drop for Judge {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.root.join("fs")).into_iter().flatten().flatten() {
            let _ = umount2(&entry.path(), MntFlags::MNT_DETACH);
        }
        for (_, device) in &self.loops {
            stage::until("the loop device is free", || device.release().ok());
        }
        let _ = fs::remove_dir_all(&self.root);
    }
}

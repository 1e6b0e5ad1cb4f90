//! Who uses a block device: the one answer that every front end gives before it takes one away.
//!
//! Owns: looking for mounts, devices on top and open files, of the whole device and its partitions.
//! Invariant: a device is claimed only while nobody has it mounted or below another device (the
//! kernel's exclusive open is the proof); those who merely have it open are found as far as this
//! process may look.

use super::mounts;
use nix::libc;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a process may keep a device open before it counts as busy: device managers open it
/// for a moment to look for a filesystem each time a writer closes it.
const PATIENCE: Duration = Duration::from_secs(2);
/// The same for udev's own workers, which are known to let go of it: `udevadm settle` waits for them, too. A busy
/// machine may take seconds to run them.
const SETTLING: Duration = Duration::from_secs(30);
/// Between two looks at a device that is open; the kernel does not tell when it is closed.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A block device by the kernel's name for it (`loop0`, `nbd3`, `ublkb1`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    name: String,
}

impl BlockDevice {
    /// The device with this name; it need not exist.
    pub fn new(name: impl Into<String>) -> BlockDevice {
        BlockDevice { name: name.into() }
    }

    /// The kernel's name for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its node.
    pub fn node(&self) -> PathBuf {
        Path::new("/dev").join(&self.name)
    }

    /// One of its files below /sys/block, without the line's end; empty if there is none.
    pub fn attribute(&self, file: &str) -> String {
        fs::read_to_string(self.sys().join(file)).unwrap_or_default().trim_end().to_string()
    }

    /// Writes one of its files below /sys/block.
    pub fn set_attribute(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.sys().join(file), value)
    }

    fn sys(&self) -> PathBuf {
        Path::new("/sys/block").join(&self.name)
    }

    /// Itself and its partitions: name and directory below /sys.
    fn parts(&self) -> Vec<(String, PathBuf)> {
        let sys = self.sys();
        let below = fs::read_dir(&sys).into_iter().flatten().flatten();
        let partitions = below
            .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
            .filter(|(name, path)| name.starts_with(&self.name) && path.join("partition").exists());
        std::iter::once((self.name.clone(), sys.clone())).chain(partitions).collect()
    }

    /// Those who use it for long, for people: mounts as far as this mount namespace sees, and devices
    /// stacked on it.
    pub fn lasting_users(&self) -> Vec<String> {
        let parts = self.parts();
        let numbers: Vec<String> = parts
            .iter()
            .filter_map(|(_, sys)| Some(fs::read_to_string(sys.join("dev")).ok()?.trim_end().to_string()))
            .collect();
        let mounted = mounts::read().into_iter().filter(|m| numbers.contains(&m.device));
        let mut users: Vec<String> = mounted.map(|m| format!("mounted on {}", m.point.display())).collect();
        for (_, sys) in &parts {
            let holders = fs::read_dir(sys.join("holders")).into_iter().flatten().flatten();
            users.extend(holders.map(|h| format!("under /dev/{}", h.file_name().to_string_lossy())));
        }
        users
    }

    /// Everybody who uses it, for people, but for our own `claim`.
    pub fn users(&self, claim: Option<&File>) -> Vec<String> {
        let open = openers(&self.nodes(), claim).into_iter();
        let open = open.map(|Opener { name, pid }| format!("open in {name} (pid {pid})"));
        self.lasting_users().into_iter().chain(open).collect()
    }

    /// Its node and those of its partitions.
    fn nodes(&self) -> Vec<PathBuf> {
        self.parts().iter().map(|(name, _)| Path::new("/dev").join(name)).collect()
    }

    /// [`BlockDevice::users`] as one text, for a device that is known to be in use.
    pub fn used_by(&self) -> String {
        let users = self.users(None);
        if users.is_empty() { "by the kernel or another namespace".into() } else { users.join(", ") }
    }

    /// Opens it so that nobody can mount it or put a device on it until the file is closed; `None`
    /// while somebody has done so.
    pub fn claim(&self) -> io::Result<Option<File>> {
        match OpenOptions::new().read(true).write(true).custom_flags(libc::O_EXCL).open(self.node()) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Makes durable what the page cache and the driver hold of it, or says why that failed, in a process of its own
    /// (`sync` of coreutils). Who waits for a device can't be killed, and a thread of the process that serves it keeps
    /// that one's memory, in it the mapping of the ring, and so all that the ring holds: the kernel would take it to be
    /// served still.
    pub fn sync(&self) -> io::Result<Result<(), String>> {
        let done = Command::new("sync").arg(self.node()).stdin(Stdio::null()).output();
        let done =
            done.map_err(|e| io::Error::new(e.kind(), format!("can't run `sync` (coreutils): {e}")))?;
        let why = || format!("{} ({})", String::from_utf8_lossy(&done.stderr).trim(), done.status);
        Ok(done.status.success().then_some(()).ok_or_else(why))
    }

    /// Waits a moment for those who only look at it, until `attempt` says that it is done. False, at
    /// once, when somebody has it mounted or below another device, and in the end for the others.
    pub fn when_unused<E>(&self, mut attempt: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        let begun = Instant::now();
        while !attempt()? {
            let waited = begun.elapsed();
            let patient = waited < PATIENCE || (waited < SETTLING && self.is_probed());
            if !patient || !self.lasting_users().is_empty() {
                return Ok(false);
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(true)
    }

    /// udev has it open, and nobody else.
    fn is_probed(&self) -> bool {
        let open = openers(&self.nodes(), None);
        !open.is_empty() && open.iter().all(|o| UDEV.contains(&o.name.as_str()))
    }

    /// Claims it once nobody else uses it, or says who does. For devices whose driver would take them
    /// away from under those who merely have them open.
    pub fn claim_unused(&self) -> io::Result<Result<File, String>> {
        let mut claimed = None;
        let done = self.when_unused(|| {
            claimed = self.claim()?;
            if claimed.is_some() && !self.users(claimed.as_ref()).is_empty() {
                claimed = None;
            }
            Ok::<bool, io::Error>(claimed.is_some())
        })?;
        Ok(claimed.filter(|_| done).ok_or_else(|| self.used_by()))
    }
}

/// What udev's workers are called: by systemd 252 and later, and before.
const UDEV: [&str; 2] = ["(udev-worker)", "systemd-udevd"];

/// A process that has a device open.
struct Opener {
    name: String,
    pid: String,
}

/// Processes that have one of `nodes` open, other than as `claim`, as far as we may look.
fn openers(nodes: &[PathBuf], claim: Option<&File>) -> Vec<Opener> {
    let own =
        claim.map(|file| PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())));
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let dir = process.path();
        let name = process.file_name();
        // `self` and `thread-self` are other names of one that is listed by its number.
        let Some(pid) = name.to_str().filter(|n| n.bytes().all(|b| b.is_ascii_digit())) else { continue };
        let opened = fs::read_dir(dir.join("fd")).into_iter().flatten().flatten().map(|fd| fd.path());
        let others = opened.filter(|fd| own.as_ref() != Some(fd));
        if others.filter_map(|fd| fs::read_link(fd).ok()).any(|target| nodes.contains(&target)) {
            let name = fs::read_to_string(dir.join("comm")).unwrap_or_default();
            found.push(Opener { name: name.trim_end().to_owned(), pid: pid.to_owned() });
        }
    }
    found
}

//! The front ends of a running node: opened by `attach`, closed by `detach`, and opened again by a
//! daemon that starts after a crash. Those of a view of a shadow are others, and end with the daemon: what they
//! showed is not there any more.
//!
//! Owns: which front end is open, and the file in the run directory that remembers it. Invariant: the
//! file names a front end before anybody is told of it, until it is closed on purpose.

use super::{Attached, DeviceKind, Kind, Reply};
use crate::daemon::{Handle, ListenId};
use crate::front::fuse::{self, FuseDevice, FuseOptions};
use crate::front::knbd::{self, KernelNbd};
use crate::front::nbd::Export;
use crate::front::ublk::{self, UblkDevices, UblkOptions};
use crate::front::{FrontEnd, FrontError, Volume};
use crate::node::config::VolumeConfig;
use crate::node::event::MAX_REQUEST;
use crate::node::status::Status;
use crate::sys::clock;
use crate::units::{BLOCK, GroupId, NodeId};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Kinds of block devices, the best first; those that are not possible here are passed over.
const BLOCK_DEVICES: [DeviceKind; 3] = [DeviceKind::Ublk, DeviceKind::Nbd, DeviceKind::Fuse];

/// What the front ends need to know of the group.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The group's name.
    pub group: String,
    /// Its identity, and this node's.
    pub owner: (GroupId, NodeId),
    /// Its volumes.
    pub volumes: Vec<VolumeConfig>,
    /// Their backings, in the same order.
    pub backings: Vec<PathBuf>,
    /// Directory of its sockets.
    pub run: PathBuf,
    /// Where links to devices lie.
    pub dev: PathBuf,
    /// How long a device's users wait for the next daemon when this one is gone.
    pub dead_after: Duration,
}

/// The front ends of one group.
pub struct Fronts {
    facts: Facts,
    handle: Handle,
    /// They offer a view.
    view: bool,
    /// The daemon ends.
    ending: Arc<AtomicBool>,
    open: Mutex<Option<Front>>,
    last: Mutex<Option<DeviceKind>>,
}

/// What is open.
struct Front {
    kind: DeviceKind,
    end: Box<dyn FrontEnd>,
}

/// What is remembered in the run directory.
#[derive(Serialize, Deserialize)]
struct Memory {
    device: DeviceKind,
    /// A daemon that ended in order left its devices: until then, on the machine's clock since its
    /// boot in ns, their users certainly wait.
    #[serde(default)]
    patient_until: Option<u64>,
}

impl Fronts {
    /// None is open.
    pub fn new(facts: Facts, handle: Handle) -> Fronts {
        Fronts {
            facts,
            handle,
            view: false,
            ending: Arc::default(),
            open: Mutex::new(None),
            last: Mutex::new(None),
        }
    }

    /// Of the view of a shadow; none is open.
    pub fn of_view(facts: Facts, handle: &Handle) -> Fronts {
        let (group, node) = facts.owner;
        // Nobody takes a device of a view for one of a volume, or the other way round.
        let mut hash = blake3::Hasher::new();
        hash.update(b"volrep view\0").update(&node.0.to_le_bytes());
        let node =
            u64::from_le_bytes(*hash.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"));
        let facts = Facts { owner: (group, NodeId(node)), ..facts };
        Fronts {
            facts,
            handle: handle.for_view(),
            view: true,
            ending: Arc::default(),
            open: Mutex::new(None),
            last: Mutex::new(None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Front>> {
        // A panic under the lock leaves `None` or a whole front end: both are true.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self) -> PathBuf {
        self.facts.run.join(if self.view { "viewed.json" } else { "attached.json" })
    }

    /// Which front end was open last, since the daemon began.
    pub fn last(&self) -> Option<DeviceKind> {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which front end was open when the daemon died, if one was.
    pub fn remembered(&self) -> Option<DeviceKind> {
        self.recall().map(|m| m.device)
    }

    fn recall(&self) -> Option<Memory> {
        let text = std::fs::read(self.memory()).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// A kind of which devices may be there still, waiting to be taken over.
    fn left(&self) -> Option<DeviceKind> {
        self.remembered().filter(|kind| matches!(kind, DeviceKind::Ublk | DeviceKind::Nbd))
    }

    /// Offers a view that the node holds open.
    pub fn show(&self, wanted: DeviceKind, read_only: bool) -> Reply {
        let mut open = self.lock();
        if open.is_some() {
            return Reply::refused(
                Kind::Busy,
                "the devices of a view are there still: close it first (--close)",
            );
        }
        self.sweep();
        let shown = match wanted {
            DeviceKind::Auto => self.open_best(read_only),
            kind => self.open(kind, read_only),
        };
        match shown {
            Ok(front) => {
                let reply = self.attached(&front);
                *open = Some(front);
                reply
            }
            Err(e) => {
                let _ = remove(&self.memory());
                refused(e)
            }
        }
    }

    /// Takes the devices of a view away, whoever uses them if `force`.
    pub fn close(&self, force: bool) -> Reply {
        let mut open = self.lock();
        if let Some(front) = &mut *open {
            let closed = match front.end.detach(force) {
                // What can't be written back any more is thrown away in any case.
                Err(FrontError::Failed(why)) if !force => {
                    tracing::warn!("{why}");
                    front.end.detach(true)
                }
                other => other,
            };
            if let Err(e) = closed {
                return refused(e);
            }
        }
        *open = None;
        self.forget()
    }

    /// Takes away what an earlier daemon left of a view: nobody is shown anything of it again.
    pub fn clear(&self) {
        let open = self.lock();
        if open.is_none() {
            self.sweep();
        }
    }

    fn sweep(&self) {
        let Some(kind) = self.remembered() else { return };
        let Facts { owner, dev, run, .. } = &self.facts;
        let volumes = self.volumes(true);
        let swept = match kind {
            DeviceKind::Ublk => ublk::remove_left(*owner, dev, &volumes, true).map_err(FrontError::from),
            DeviceKind::Nbd => knbd::remove_left(*owner, dev, &volumes, true),
            DeviceKind::Fuse => fuse::remove_left(&self.mount_dir(), dev, &volumes).map_err(FrontError::from),
            DeviceKind::NbdSocket | DeviceKind::Auto => {
                let socket = run.join(self.socket_name());
                remove(&socket)
                    .map_err(|e| FrontError::Failed(format!("can't remove {}: {e}", socket.display())))
            }
        };
        match swept {
            Ok(()) => drop(self.forget()),
            Err(e) => tracing::error!("what the last daemon left of a view is not taken away: {e}"),
        }
    }

    fn socket_name(&self) -> &'static str {
        if self.view { "view.sock" } else { "nbd.sock" }
    }

    fn mount_dir(&self) -> PathBuf {
        self.facts.run.join(if self.view { "view" } else { "fuse" })
    }

    fn forget(&self) -> Reply {
        match remove(&self.memory()) {
            Ok(()) => Reply::Done { text: String::new() },
            Err(e) => Reply::refused(Kind::Failed, format!("can't remove {}: {e}", self.memory().display())),
        }
    }

    /// Opens the front end, if none is open. Blocks; the node must serve.
    pub fn attach(&self, wanted: DeviceKind) -> Reply {
        let mut open = self.lock();
        if let Some(front) = &*open {
            let is = front.kind;
            if wanted != DeviceKind::Auto && wanted != is {
                let text = format!("`{0}` is attached by {is} already: volrep detach {0}", self.facts.group);
                return Reply::refused(Kind::Busy, text);
            }
            return self.attached(front);
        }
        let opened = match (wanted, self.left()) {
            (DeviceKind::Auto, Some(left)) => self.open(left, false),
            (DeviceKind::Auto, None) => self.open_best(false),
            (kind, Some(left)) if kind != left => {
                let text = format!(
                    "`{0}` was attached by {left}, which is not undone: volrep detach {0}",
                    self.facts.group
                );
                return Reply::refused(Kind::Busy, text);
            }
            (kind, _) => self.open(kind, false),
        };
        match opened {
            Ok(front) => {
                *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(front.kind);
                let reply = self.attached(&front);
                *open = Some(front);
                reply
            }
            Err(e) => refused(e),
        }
    }

    /// The best block device that this machine has; without any, anybody can have an NBD server.
    fn open_best(&self, read_only: bool) -> Result<Front, FrontError> {
        let mut last = None;
        for kind in BLOCK_DEVICES {
            if let Err(why) = usable(kind) {
                tracing::info!("not attached by {kind}: {why}");
                continue;
            }
            match self.open(kind, read_only) {
                Ok(front) => return Ok(front),
                Err(e) => {
                    tracing::warn!("not attached by {kind}: {e}");
                    last = Some(e);
                }
            }
        }
        last.map_or_else(|| self.open(DeviceKind::NbdSocket, read_only), Err)
    }

    /// Remembers the front end and opens it. Of one that can't be opened nothing is left but what was there before.
    fn open(&self, kind: DeviceKind, read_only: bool) -> Result<Front, FrontError> {
        // A driver that is not there is not remembered: nothing could take away what it does not have.
        if matches!(kind, DeviceKind::Ublk | DeviceKind::Nbd) {
            usable(kind).map_err(FrontError::Failed)?;
        }
        let before = self.recall();
        let known = before.as_ref().is_some_and(|m| m.device == kind);
        let keep = |memory| {
            self.remember(memory).map_err(|e| {
                let path = self.memory();
                FrontError::Failed(format!("can't write {}: {e}; free some space there", path.display()))
            })
        };
        if !known {
            keep(Memory { device: kind, patient_until: None })?;
        }
        let end = match self.open_end(kind, read_only) {
            Ok(end) => end,
            Err(e) if known => return Err(e),
            Err(e) => {
                before.map_or_else(|| drop(self.forget()), |before| drop(keep(before)));
                return Err(e);
            }
        };
        if known {
            // Best effort: what an earlier daemon knew of its users' patience holds, unless they are to wait less now.
            let _ = self.remember(Memory { device: kind, patient_until: None });
        }
        Ok(Front { kind, end })
    }

    fn open_end(&self, kind: DeviceKind, read_only: bool) -> Result<Box<dyn FrontEnd>, FrontError> {
        Ok(match kind {
            DeviceKind::Ublk => Box::new(self.open_ublk(read_only)?),
            DeviceKind::Nbd => Box::new(self.open_nbd(read_only)?),
            DeviceKind::Fuse => Box::new(self.open_fuse(read_only)?),
            DeviceKind::NbdSocket | DeviceKind::Auto => Box::new(self.open_socket(read_only)?),
        })
    }

    fn remember(&self, memory: Memory) -> io::Result<()> {
        let staged = self.memory().with_extension("new");
        std::fs::write(&staged, serde_json::to_vec(&memory)?)?;
        std::fs::rename(staged, self.memory())
    }

    fn open_socket(&self, read_only: bool) -> Result<SocketServer, FrontError> {
        let socket = self.facts.run.join(self.socket_name());
        let fail = |e: io::Error| FrontError::Failed(format!("can't listen on {}: {e}", socket.display()));
        remove(&socket).map_err(fail)?;
        let listener = UnixListener::bind(&socket).map_err(fail)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
        let volumes = &self.facts.volumes;
        let uris = volumes.iter().map(|v| nbd_uri(&v.name, &socket)).collect();
        let listener =
            self.handle.listen_nbd(listener, volumes.iter().map(|v| export(v, read_only)).collect());
        Ok(SocketServer { handle: self.handle.clone(), listener, socket, uris })
    }

    fn open_ublk(&self, read_only: bool) -> Result<UblkDevices, FrontError> {
        let options = UblkOptions {
            owner: self.facts.owner,
            volumes: self.volumes(read_only),
            dev_dir: self.facts.dev.clone(),
            host: Arc::new(self.handle.clone()),
            ending: self.ending.clone(),
        };
        Ok(UblkDevices::attach(options)?)
    }

    fn open_nbd(&self, read_only: bool) -> Result<KernelNbd, FrontError> {
        KernelNbd::attach(knbd::Options {
            owner: self.facts.owner,
            dev_dir: self.facts.dev.clone(),
            volumes: self.volumes(read_only),
            dead_after: self.facts.dead_after,
            patient: self
                .recall()
                .and_then(|m| m.patient_until)
                .is_some_and(|until| clock::now().mono < until),
            serve: Arc::new(self.handle.clone()),
            ending: self.ending.clone(),
        })
    }

    fn open_fuse(&self, read_only: bool) -> Result<FuseDevice, FrontError> {
        let options = FuseOptions {
            mount_dir: self.mount_dir(),
            dev_dir: self.facts.dev.clone(),
            volumes: self.volumes(read_only),
            loop_device: nix::unistd::geteuid().is_root(),
            submit: Arc::new(self.handle.clone()),
        };
        Ok(FuseDevice::attach(options)?)
    }

    /// The volumes and their links: the group's name alone if there is only one.
    fn volumes(&self, read_only: bool) -> Vec<Volume> {
        let name = if self.view { format!("{}.view", self.facts.group) } else { self.facts.group.clone() };
        let group = Path::new(&name);
        let single = self.facts.volumes.len() == 1;
        let volume = |v: &VolumeConfig| Volume {
            volume: v.number,
            name: v.name.clone(),
            size: v.size,
            block: v.block as u32,
            link: if single { group.to_owned() } else { group.join(&v.name) },
            read_only,
            lasting: !self.view,
        };
        self.facts.volumes.iter().map(volume).collect()
    }

    fn attached(&self, front: &Front) -> Reply {
        let volumes = self.facts.volumes.iter().zip(front.end.devices());
        let volumes = volumes.map(|(v, device)| Attached { volume: v.name.clone(), device }).collect();
        Reply::Attached { device: front.kind, volumes }
    }

    /// Closes the front end and forgets it. Of a node that `serves` nothing any more, what the page cache holds is lost
    /// already: it keeps nobody who has let go of the device.
    pub fn detach(&self, serves: bool) -> Reply {
        let mut open = self.lock();
        if let Some(front) = &mut *open {
            let done = match front.end.detach(false) {
                Err(FrontError::Failed(why)) if !serves => {
                    tracing::warn!("detached without what was not written back: {why}");
                    front.end.detach(true)
                }
                done => done,
            };
            if let Err(e) = done {
                return refused(e);
            }
        }
        if open.is_none()
            && let Err(e) = self.remove_left()
        {
            return refused(e);
        }
        *open = None;
        self.forget()
    }

    /// Of devices that this daemon could not take over.
    fn remove_left(&self) -> Result<(), FrontError> {
        let Facts { owner, dev, .. } = &self.facts;
        match self.left() {
            Some(DeviceKind::Nbd) => knbd::remove_left(*owner, dev, &self.volumes(false), false),
            Some(DeviceKind::Ublk) => Ok(ublk::remove_left(*owner, dev, &self.volumes(false), false)?),
            _ if self.remembered() == Some(DeviceKind::Fuse) => {
                Ok(fuse::remove_left(&self.mount_dir(), dev, &self.volumes(false))?)
            }
            _ => Ok(()),
        }
    }

    /// A node that serves nothing any more takes up what a killed daemon left, so that whoever waits for it gets
    /// an error and can let go of it.
    pub fn take_up_left(&self) {
        let Some(kind) = self.left() else { return };
        match self.attach(kind) {
            Reply::Refused { text, .. } => {
                tracing::error!("users of the devices that were left wait on: {text}")
            }
            _ => {
                tracing::warn!("the devices that were left by {kind} give errors: nothing is served here now")
            }
        }
    }

    /// A front end is open, as far as that can be said without waiting.
    pub fn is_open(&self) -> bool {
        self.open.try_lock().is_ok_and(|open| open.is_some())
    }

    /// Lets go of the front end as the daemon ends; the next one opens it again.
    pub fn shut(&self) {
        // A detach that waits for the node has the lock.
        self.ending.store(true, Ordering::Relaxed);
        let Some(mut front) = self.lock().take() else { return };
        if self.view {
            // Its users are told now, and the next daemon has nothing to sweep.
            match front.end.detach(true) {
                Ok(()) => drop(self.forget()),
                Err(e) => tracing::warn!("{e}"),
            }
            return;
        }
        if let Err(e) = front.end.leave() {
            tracing::warn!("{e}");
        }
        let patient_until = clock::now().mono.checked_add(self.facts.dead_after.as_nanos() as u64);
        // Without it the next daemon has to look for itself.
        let _ = self.remember(Memory { device: front.kind, patient_until });
    }

    /// Adds to a node's state what only its daemon knows.
    pub fn complete(&self, status: &mut Status) {
        // Opening can take long; a state without devices is better than none.
        let devices = match self.open.try_lock() {
            Ok(open) => open.as_ref().map(|front| front.end.devices()).unwrap_or_default(),
            Err(_) => Vec::new(),
        };
        if self.view {
            if let Some(view) = &mut status.view {
                view.devices = devices;
            }
            return;
        }
        for (i, v) in status.volumes.iter_mut().enumerate() {
            v.device = devices.get(i).cloned();
            v.backing = self.facts.backings.get(i).map(|p| p.display().to_string());
        }
    }
}

/// The NBD server on a unix socket.
struct SocketServer {
    handle: Handle,
    listener: ListenId,
    socket: PathBuf,
    uris: Vec<String>,
}

impl FrontEnd for SocketServer {
    fn devices(&self) -> Vec<String> {
        self.uris.clone()
    }

    fn detach(&mut self, _force: bool) -> Result<(), FrontError> {
        self.handle.close_nbd(self.listener);
        let socket = &self.socket;
        remove(socket).map_err(|e| FrontError::Failed(format!("can't remove {}: {e}", socket.display())))
    }
}

/// Whether this machine can have such a block device, or why not.
fn usable(kind: DeviceKind) -> Result<(), String> {
    match kind {
        DeviceKind::Ublk => ublk::usable().map_err(|e| e.to_string()),
        DeviceKind::Nbd => knbd::available().map_err(|why| format!("{why}; or choose another --device")),
        DeviceKind::Fuse => {
            if !nix::unistd::geteuid().is_root() {
                return Err("a loop device needs root".into());
            }
            let missing =
                ["/dev/fuse", "/dev/loop-control"].into_iter().find(|path| !Path::new(path).exists());
            missing.map_or(Ok(()), |path| Err(format!("this machine has no {path}")))
        }
        DeviceKind::NbdSocket | DeviceKind::Auto => Ok(()),
    }
}

fn refused(e: FrontError) -> Reply {
    let kind = match e {
        FrontError::Busy(_) => Kind::Busy,
        FrontError::Failed(_) => Kind::Failed,
    };
    Reply::refused(kind, e.to_string())
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn export(v: &VolumeConfig, read_only: bool) -> Export {
    Export {
        name: v.name.clone(),
        volume: v.number,
        size: v.size,
        min_block: v.block as u32,
        preferred_block: BLOCK as u32,
        max_block: MAX_REQUEST as u32,
        read_only,
    }
}

/// The URI of an export on a unix socket.
pub fn nbd_uri(export: &str, socket: &Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    let mut uri = format!("nbd+unix:///{export}?socket=");
    for b in socket.as_os_str().as_bytes() {
        match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => {
                uri.push(char::from(*b))
            }
            _ => write!(uri, "%{b:02X}").expect("memory"),
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uri_survives_odd_paths() {
        assert_eq!(
            nbd_uri("data", Path::new("/run/volrep/a b&c/nbd.sock")),
            "nbd+unix:///data?socket=/run/volrep/a%20b%26c/nbd.sock"
        );
    }
}

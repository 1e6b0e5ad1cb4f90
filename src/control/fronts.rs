//! The front ends of a running node: opened by `attach`, closed by `detach`, and opened again by a
//! daemon that starts after a crash.
//!
//! Owns: which front end is open, and the file in the run directory that remembers it. Invariant: the
//! file names a front end before anybody is told of it, until it is closed on purpose.

use super::{Attached, DeviceKind, Kind, Reply};
use crate::daemon::{Handle, ListenId};
use crate::front::fuse::{FuseDevice, FuseOptions};
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
    open: Mutex<Option<Front>>,
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
        Fronts { facts, handle, open: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Front>> {
        // A panic under the lock leaves `None` or a whole front end: both are true.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self) -> PathBuf {
        self.facts.run.join("attached.json")
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
            (DeviceKind::Auto, Some(left)) => self.open(left),
            (DeviceKind::Auto, None) => self.open_best(),
            (kind, Some(left)) if kind != left => {
                let text = format!(
                    "`{0}` was attached by {left}, which is not undone: volrep detach {0}",
                    self.facts.group
                );
                return Reply::refused(Kind::Busy, text);
            }
            (kind, _) => self.open(kind),
        };
        match opened {
            Ok(front) => {
                let reply = self.attached(&front);
                *open = Some(front);
                reply
            }
            Err(e) => refused(e),
        }
    }

    /// The best block device that this machine has; without any, anybody can have an NBD server.
    fn open_best(&self) -> Result<Front, FrontError> {
        let mut last = None;
        for kind in BLOCK_DEVICES {
            if let Err(why) = usable(kind) {
                tracing::info!("not attached by {kind}: {why}");
                continue;
            }
            match self.open(kind) {
                Ok(front) => return Ok(front),
                Err(e) => {
                    tracing::warn!("not attached by {kind}: {e}");
                    last = Some(e);
                }
            }
        }
        last.map_or_else(|| self.open(DeviceKind::NbdSocket), Err)
    }

    fn open(&self, kind: DeviceKind) -> Result<Front, FrontError> {
        let end: Box<dyn FrontEnd> = match kind {
            DeviceKind::Ublk => Box::new(self.open_ublk()?),
            DeviceKind::Nbd => Box::new(self.open_nbd()?),
            DeviceKind::Fuse => Box::new(self.open_fuse()?),
            DeviceKind::NbdSocket | DeviceKind::Auto => Box::new(self.open_socket()?),
        };
        self.remember(Memory { device: kind, patient_until: None }).map_err(|e| {
            let path = self.memory();
            FrontError::Failed(format!("can't write {}: {e}; free some space there", path.display()))
        })?;
        Ok(Front { kind, end })
    }

    fn remember(&self, memory: Memory) -> io::Result<()> {
        let staged = self.memory().with_extension("new");
        std::fs::write(&staged, serde_json::to_vec(&memory)?)?;
        std::fs::rename(staged, self.memory())
    }

    fn open_socket(&self) -> Result<SocketServer, FrontError> {
        let socket = self.facts.run.join("nbd.sock");
        let fail = |e: io::Error| FrontError::Failed(format!("can't listen on {}: {e}", socket.display()));
        remove(&socket).map_err(fail)?;
        let listener = UnixListener::bind(&socket).map_err(fail)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
        let volumes = &self.facts.volumes;
        let uris = volumes.iter().map(|v| nbd_uri(&v.name, &socket)).collect();
        let listener = self.handle.listen_nbd(listener, volumes.iter().map(export).collect());
        Ok(SocketServer { handle: self.handle.clone(), listener, socket, uris })
    }

    fn open_ublk(&self) -> Result<UblkDevices, FrontError> {
        let options = UblkOptions {
            owner: self.facts.owner,
            volumes: self.volumes(),
            dev_dir: self.facts.dev.clone(),
            host: Arc::new(self.handle.clone()),
        };
        Ok(UblkDevices::attach(options)?)
    }

    fn open_nbd(&self) -> Result<KernelNbd, FrontError> {
        KernelNbd::attach(knbd::Options {
            owner: self.facts.owner,
            dev_dir: self.facts.dev.clone(),
            volumes: self.volumes(),
            dead_after: self.facts.dead_after,
            patient: self
                .recall()
                .and_then(|m| m.patient_until)
                .is_some_and(|until| clock::now().mono < until),
            serve: Arc::new(self.handle.clone()),
        })
    }

    fn open_fuse(&self) -> Result<FuseDevice, FrontError> {
        let options = FuseOptions {
            mount_dir: self.facts.run.join("fuse"),
            dev_dir: self.facts.dev.clone(),
            volumes: self.volumes(),
            loop_device: nix::unistd::geteuid().is_root(),
            submit: Arc::new(self.handle.clone()),
        };
        Ok(FuseDevice::attach(options)?)
    }

    /// The volumes and their links: the group's name alone if there is only one.
    fn volumes(&self) -> Vec<Volume> {
        let group = Path::new(&self.facts.group);
        let single = self.facts.volumes.len() == 1;
        let volume = |v: &VolumeConfig| Volume {
            volume: v.number,
            name: v.name.clone(),
            size: v.size,
            block: v.block as u32,
            link: if single { group.to_owned() } else { group.join(&v.name) },
        };
        self.facts.volumes.iter().map(volume).collect()
    }

    fn attached(&self, front: &Front) -> Reply {
        let volumes = self.facts.volumes.iter().zip(front.end.devices());
        let volumes = volumes.map(|(v, device)| Attached { volume: v.name.clone(), device }).collect();
        Reply::Attached { device: front.kind, volumes }
    }

    /// Closes the front end and forgets it.
    pub fn detach(&self) -> Reply {
        let mut open = self.lock();
        if let Some(front) = &mut *open
            && let Err(e) = front.end.detach(false)
        {
            return refused(e);
        }
        if open.is_none()
            && let Err(e) = self.remove_left()
        {
            return refused(e);
        }
        *open = None;
        match remove(&self.memory()) {
            Ok(()) => Reply::Done { text: String::new() },
            Err(e) => Reply::refused(Kind::Failed, format!("can't remove {}: {e}", self.memory().display())),
        }
    }

    /// Of devices that this daemon could not take over.
    fn remove_left(&self) -> Result<(), FrontError> {
        let Facts { owner, dev, .. } = &self.facts;
        match self.left() {
            Some(DeviceKind::Nbd) => knbd::remove_left(*owner, dev, &self.volumes()),
            Some(DeviceKind::Ublk) => Ok(ublk::remove_left(*owner, dev, &self.volumes())?),
            _ => Ok(()),
        }
    }

    /// A front end is open, as far as that can be said without waiting.
    pub fn is_open(&self) -> bool {
        self.open.try_lock().is_ok_and(|open| open.is_some())
    }

    /// Lets go of the front end as the daemon ends; the next one opens it again.
    pub fn shut(&self) {
        let Some(mut front) = self.lock().take() else { return };
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
        DeviceKind::Nbd => knbd::available(),
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

fn export(v: &VolumeConfig) -> Export {
    Export {
        name: v.name.clone(),
        volume: v.number,
        size: v.size,
        min_block: v.block as u32,
        preferred_block: BLOCK as u32,
        max_block: MAX_REQUEST as u32,
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

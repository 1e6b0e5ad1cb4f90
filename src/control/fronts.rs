//! The front ends of a running node: opened by `attach`, closed by `detach`, and opened again by a
//! daemon that starts after a crash.
//!
//! Owns: which front end is open, and the file in the run directory that remembers it. Invariant: the
//! file names a front end before anybody is told of it, until it is closed on purpose.

use super::{Attached, DeviceKind, Kind, Reply};
use crate::daemon::{Handle, ListenId};
use crate::front::fuse::{FuseDevice, FuseError, FuseOptions, FuseVolume};
use crate::front::nbd::Export;
use crate::node::config::VolumeConfig;
use crate::node::event::MAX_REQUEST;
use crate::node::status::Status;
use crate::units::BLOCK;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the front ends need to know of the group.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The group's name.
    pub group: String,
    /// Its volumes.
    pub volumes: Vec<VolumeConfig>,
    /// Their backings, in the same order.
    pub backings: Vec<PathBuf>,
    /// Directory of its sockets.
    pub run: PathBuf,
    /// Where links to devices lie.
    pub dev: PathBuf,
}

/// The front ends of one group.
pub struct Fronts {
    facts: Facts,
    handle: Handle,
    open: Mutex<Option<Front>>,
}

enum Front {
    Nbd { listener: ListenId, socket: PathBuf },
    Fuse(FuseDevice),
}

#[derive(Serialize, Deserialize)]
struct Memory {
    device: DeviceKind,
}

type Refused = (Kind, String);

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
        let text = std::fs::read(self.memory()).ok()?;
        serde_json::from_slice::<Memory>(&text).ok().map(|m| m.device)
    }

    /// Opens the front end, if none is open. Blocks; the node must serve.
    pub fn attach(&self, wanted: DeviceKind) -> Reply {
        let mut open = self.lock();
        if let Some(front) = &*open {
            let is = front.kind();
            if wanted != DeviceKind::Auto && wanted != is {
                let text = format!("`{0}` is attached by {is} already: volrep detach {0}", self.facts.group);
                return Reply::refused(Kind::Busy, text);
            }
            return self.attached(front);
        }
        let kind = if wanted == DeviceKind::Auto { self.best() } else { wanted };
        match self.open(kind) {
            Ok(front) => {
                let reply = self.attached(&front);
                *open = Some(front);
                reply
            }
            Err((kind, text)) => Reply::refused(kind, text),
        }
    }

    /// A real block device needs root and the kernel's help; anybody can have an NBD server.
    fn best(&self) -> DeviceKind {
        let usable = nix::unistd::geteuid().is_root()
            && ["/dev/fuse", "/dev/loop-control"].iter().all(|path| Path::new(path).exists());
        if usable { DeviceKind::Fuse } else { DeviceKind::Nbd }
    }

    fn open(&self, kind: DeviceKind) -> Result<Front, Refused> {
        let front = match kind {
            DeviceKind::Nbd | DeviceKind::Auto => self.open_nbd()?,
            DeviceKind::Ublk => {
                return Err((Kind::Failed, "ublk is not in this build: use --device nbd or fuse".into()));
            }
            DeviceKind::Fuse => self.open_fuse()?,
        };
        self.remember(kind).map_err(|e| {
            let text = format!("can't write {}: {e}; free some space there", self.memory().display());
            (Kind::Failed, text)
        })?;
        Ok(front)
    }

    fn remember(&self, device: DeviceKind) -> io::Result<()> {
        let staged = self.memory().with_extension("new");
        std::fs::write(&staged, serde_json::to_vec(&Memory { device })?)?;
        std::fs::rename(staged, self.memory())
    }

    fn open_nbd(&self) -> Result<Front, Refused> {
        let socket = self.facts.run.join("nbd.sock");
        let fail = |e: io::Error| (Kind::Failed, format!("can't listen on {}: {e}", socket.display()));
        remove(&socket).map_err(fail)?;
        let listener = UnixListener::bind(&socket).map_err(fail)?;
        std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
        let listener = self.handle.listen_nbd(listener, self.facts.volumes.iter().map(export).collect());
        Ok(Front::Nbd { listener, socket })
    }

    fn open_fuse(&self) -> Result<Front, Refused> {
        let single = self.facts.volumes.len() == 1;
        let volume = |v: &VolumeConfig| FuseVolume {
            volume: v.number,
            name: v.name.clone(),
            size: v.size,
            block: v.block as u32,
            link: if single {
                self.facts.group.clone().into()
            } else {
                Path::new(&self.facts.group).join(&v.name)
            },
        };
        let options = FuseOptions {
            mount_dir: self.facts.run.join("fuse"),
            dev_dir: self.facts.dev.clone(),
            volumes: self.facts.volumes.iter().map(volume).collect(),
            loop_device: nix::unistd::geteuid().is_root(),
            submit: Arc::new(self.handle.clone()),
        };
        FuseDevice::attach(options).map(Front::Fuse).map_err(|e| refused(&e))
    }

    fn attached(&self, front: &Front) -> Reply {
        let devices = self.devices(front);
        let volumes = self.facts.volumes.iter().zip(devices);
        let volumes = volumes.map(|(v, device)| Attached { volume: v.name.clone(), device }).collect();
        Reply::Attached { device: front.kind(), volumes }
    }

    fn devices(&self, front: &Front) -> Vec<String> {
        match front {
            Front::Nbd { socket, .. } => {
                self.facts.volumes.iter().map(|v| nbd_uri(&v.name, socket)).collect()
            }
            Front::Fuse(device) => device.paths().iter().map(|p| p.display().to_string()).collect(),
        }
    }

    /// Closes the front end and forgets it.
    pub fn detach(&self) -> Reply {
        let mut open = self.lock();
        if let Err((kind, text)) = self.close(&mut open, false) {
            return Reply::refused(kind, text);
        }
        match remove(&self.memory()) {
            Ok(()) => Reply::Done { text: String::new() },
            Err(e) => Reply::refused(Kind::Failed, format!("can't remove {}: {e}", self.memory().display())),
        }
    }

    /// Closes the front end as the daemon ends; the next one opens it again. Whoever still uses it
    /// gets errors from now on, as after a crash.
    pub fn shut(&self) {
        let mut open = self.lock();
        let closed = self.close(&mut open, false).or_else(|(_, text)| {
            tracing::warn!("{text}; its users get errors now");
            self.close(&mut open, true)
        });
        if let Err((_, text)) = closed {
            tracing::warn!("{text}");
        }
    }

    fn close(&self, open: &mut Option<Front>, force: bool) -> Result<(), Refused> {
        match open {
            None => {}
            Some(Front::Nbd { listener, socket }) => {
                self.handle.close_nbd(*listener);
                remove(socket)
                    .map_err(|e| (Kind::Failed, format!("can't remove {}: {e}", socket.display())))?;
            }
            Some(Front::Fuse(device)) => device.detach(force).map_err(|e| refused(&e))?,
        }
        *open = None;
        Ok(())
    }

    /// Adds to a node's state what only its daemon knows.
    pub fn complete(&self, status: &mut Status) {
        // Opening can take long; a state without devices is better than none.
        let devices = match self.open.try_lock() {
            Ok(open) => open.as_ref().map(|front| self.devices(front)).unwrap_or_default(),
            Err(_) => Vec::new(),
        };
        for (i, v) in status.volumes.iter_mut().enumerate() {
            v.device = devices.get(i).cloned();
            v.backing = self.facts.backings.get(i).map(|p| p.display().to_string());
        }
    }
}

impl Front {
    fn kind(&self) -> DeviceKind {
        match self {
            Front::Nbd { .. } => DeviceKind::Nbd,
            Front::Fuse(_) => DeviceKind::Fuse,
        }
    }
}

fn refused(e: &FuseError) -> Refused {
    (if e.is_busy() { Kind::Busy } else { Kind::Failed }, e.to_string())
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

//! ublk: volumes as real block devices, `/dev/ublkbN`, that outlive the daemon.
//!
//! Owns: making, taking over and deleting the devices. Invariants: a device is known by the mark that
//! it carries for its volume ([`params::identity`]), never by its number alone, so a stale number or a
//! stranger's device is only ever looked at; a device stays, and its users wait, whenever the daemon
//! goes, and goes only with `detach`; it is not taken away from under anybody unless that was asked for.
//!
//! The data path is the group's own ring ([`Queue`] says what to give to it): the kernel's requests
//! become [`Op`](crate::node::event::Op)s on the loop's thread, without a hop. Commands that make, start
//! and stop devices go through a ring of their own ([`control`]) on the caller's thread, because several
//! wait for the queue's server.
//!
//! The kernel does not look for partitions on these devices by itself: see [`Queue::fetch`].
//!
//! The crate libublk (0.4.8) does not serve here: its queues bring their own thread, ring and executor
//! where this has one loop; its control half opens the character device itself (it can be opened once),
//! keeps files of its own in /run/ublksrvd, and starts a device only together with its queues; and its
//! `sys` types are made by bindgen, so that each build would need libclang for the six structures in
//! [`abi`]. Zero copy is not used: a write has to be copied once anyway, into the write cache, and with
//! user copy that is the only copy.

mod abi;
mod control;
mod params;
mod queue;
mod recovery;
mod request;
#[cfg(test)]
mod tests;

pub use queue::{Command, Queue};
pub use request::Fault;

use super::links::DeviceLink;
use super::users::BlockDevice;
use super::{FrontEnd, FrontError, Submit, Volume, flush};
use crate::units::{GroupId, NodeId};
use abi::DevInfo;
use control::Control;
use crossbeam_channel::Receiver;
use nix::libc;
use params::Transfer;
use recovery::{Decision, Seen, decide};
use request::Rules;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// How long the kernel may take to take leave of a device's last server. It cancels what that has left
/// at once, but for a queue of which the dead server had every request: that waits for a request to
/// time out ([`TIMEOUT`]; 30 s on a device that a crash left before it was set).
const PATIENCE: Duration = Duration::from_secs(45);
/// Between two looks at it.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// How long the loop may take to begin, or to end, serving a queue.
const LOOP: Duration = Duration::from_secs(20);
/// After how many milliseconds the block layer asks the driver about a request. While the server lives
/// the driver only says to wait on; see [`PATIENCE`].
const TIMEOUT: &str = "1000";

/// With the value `buffers`, new devices go without user copy although the driver offers it: so that
/// both ways are tested, and measured side by side.
const TRANSFER: &str = "VOLREP_UBLK_TRANSFER";

/// The number of the device whose queue it is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct QueueId(pub u32);

/// The loop that serves queues.
pub trait Host: Submit {
    /// Serves a queue from now on; answers once every tag waits for a request.
    fn open(&self, id: QueueId, queue: Queue) -> Receiver<io::Result<()>>;
    /// Takes nothing more from it. What it has not answered is left to the next server.
    fn park(&self, id: QueueId);
    /// Lets go of a queue whose device was stopped; answers once it has.
    fn close(&self, id: QueueId) -> Receiver<io::Result<()>>;
}

/// What to attach.
pub struct UblkOptions {
    /// Whose volumes they are, and on which node.
    pub owner: (GroupId, NodeId),
    /// The volumes.
    pub volumes: Vec<Volume>,
    /// Directory of the links.
    pub dev_dir: PathBuf,
    /// Who serves them.
    pub host: Arc<dyn Host>,
    /// Set when the daemon ends: who waits for the node gives up.
    pub ending: Arc<AtomicBool>,
}

/// Why a device could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum UblkError {
    /// The driver is not there.
    #[error(
        "this machine has no ublk: {0}. It needs root, Linux 6.5 and the driver (`modprobe ublk_drv`, \
         CONFIG_BLK_DEV_UBLK); use --device nbd or --device fuse instead"
    )]
    Missing(io::Error),
    /// The driver can't keep a device over a restart of the daemon.
    #[error(
        "this kernel's ublk can't hand a device to the next daemon (features {0:#x}; Linux 6.5 can): use \
         --device nbd or --device fuse instead"
    )]
    TooOld(u64),
    /// Somebody uses it.
    #[error("{device} is in use ({by}): unmount and close it, then try again")]
    Busy {
        /// The device.
        device: PathBuf,
        /// Mount points, devices on top, processes.
        by: String,
    },
    /// Its size or its blocks are not the volume's any more.
    #[error(
        "{device} was made for volume {volume} of another size or block, and is in use ({by}): unmount and \
         close it, then try again"
    )]
    Other {
        /// The device.
        device: PathBuf,
        /// The volume.
        volume: String,
        /// Mount points, devices on top, processes.
        by: String,
    },
    /// The kernel does not let go of the process that served it last.
    #[error("the kernel says that process {pid} still serves {device}: end it, then try again")]
    Served {
        /// The device.
        device: PathBuf,
        /// The process.
        pid: i32,
    },
    /// A system call or a command failed.
    #[error("{action}: {source}")]
    Io {
        /// What was tried, on what.
        action: String,
        /// How it failed.
        source: io::Error,
    },
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> UblkError {
    move |source| UblkError::Io { action: action.into(), source }
}

impl From<UblkError> for FrontError {
    fn from(e: UblkError) -> FrontError {
        match e {
            UblkError::Busy { .. } | UblkError::Other { .. } | UblkError::Served { .. } => {
                FrontError::Busy(e.to_string())
            }
            _ => FrontError::Failed(e.to_string()),
        }
    }
}

/// The attached volumes. Dropping it leaves the devices to the next daemon.
pub struct UblkDevices {
    control: Control,
    host: Arc<dyn Host>,
    ending: Arc<AtomicBool>,
    disks: Vec<Disk>,
}

struct Disk {
    id: u32,
    link: DeviceLink,
    /// It was made here, not taken over.
    fresh: bool,
}

impl Disk {
    fn block(&self) -> BlockDevice {
        block(self.id)
    }
}

fn block(id: u32) -> BlockDevice {
    BlockDevice::new(format!("ublkb{id}"))
}

/// Whether this machine can have such devices, or why not.
pub fn usable() -> Result<(), UblkError> {
    driver().map(|_| ())
}

/// Takes away devices that an earlier daemon has left and that this one did not take over, unless
/// somebody uses them; with `force`, even then.
pub fn remove_left(
    owner: (GroupId, NodeId),
    dev_dir: &Path,
    volumes: &[Volume],
    force: bool,
) -> Result<(), UblkError> {
    let (mut control, _) = driver()?;
    for volume in volumes {
        for info in control.marked(params::identity(owner, volume.volume))? {
            let device = block(info.dev_id);
            // Not claimed: what it has to be asked would wait for a server.
            let users = device.users(None);
            if !users.is_empty() && !force {
                return Err(UblkError::Busy { device: device.node(), by: users.join(", ") });
            }
            tracing::warn!("{} of volume {} is taken away", device.node().display(), volume.name);
            let deleting = failed(format!("delete {}", device.node().display()));
            control.delete_later(info.dev_id).map_err(deleting)?;
            DeviceLink::new(dev_dir, &volume.link).remove(&device.node());
        }
    }
    Ok(())
}

/// The driver, and its features.
fn driver() -> Result<(Control, u64), UblkError> {
    let mut control = Control::open().map_err(UblkError::Missing)?;
    let features = control.features().map_err(UblkError::Missing)?;
    if features & params::NEEDED != params::NEEDED {
        return Err(UblkError::TooOld(features));
    }
    Ok((control, features))
}

impl UblkDevices {
    /// Takes over the devices that an earlier daemon has left, and makes the others.
    ///
    /// Not on the host's own thread. The group's locks are held, and its node serves.
    pub fn attach(options: UblkOptions) -> Result<UblkDevices, UblkError> {
        let (control, features) = driver()?;
        let (host, ending) = (options.host.clone(), options.ending.clone());
        let mut devices = UblkDevices { control, host, ending, disks: Vec::new() };
        // All that can be refused is refused before anything is changed.
        for volume in &options.volumes {
            let link = DeviceLink::new(&options.dev_dir, &volume.link);
            link.check().map_err(failed(format!("attach {}", volume.name)))?;
        }
        let mut left = Vec::new();
        for volume in &options.volumes {
            left.push(devices.left(params::identity(options.owner, volume.volume), volume)?);
        }
        let transfer = match std::env::var_os(TRANSFER) {
            Some(buffers) if buffers == "buffers" => Transfer::Buffers,
            _ => Transfer::best(features),
        };
        for (volume, left) in options.volumes.iter().zip(left) {
            if let Err(e) = devices.attach_volume(&options, volume, left.as_ref(), transfer) {
                devices.give_up();
                return Err(e);
            }
        }
        Ok(devices)
    }

    fn attach_volume(
        &mut self,
        options: &UblkOptions,
        volume: &Volume,
        left: Option<&DevInfo>,
        transfer: Transfer,
    ) -> Result<(), UblkError> {
        let id = match left {
            Some(info) => self.take_over(info, volume)?,
            None => self.create(params::identity(options.owner, volume.volume), volume, transfer)?,
        };
        let link = DeviceLink::new(&options.dev_dir, &volume.link);
        let disk = Disk { id, link, fresh: left.is_none() };
        let named = disk.link.point_to(&disk.block().node());
        self.disks.push(disk);
        named.map_err(failed(format!("attach {}", volume.name)))
    }

    /// After a failure half way: what was made is nobody's yet and goes. What was taken over is served, and its users go on:
    /// the kernel does not let go of it while this process lives.
    fn give_up(&mut self) {
        for disk in std::mem::take(&mut self.disks).into_iter().filter(|d| d.fresh) {
            let node = disk.block().node();
            match self.take_away(disk.id) {
                Ok(()) => disk.link.remove(&node),
                Err(e) => tracing::warn!("{e}"),
            }
        }
    }

    /// The device of a volume that can be taken over. What can't be, and nobody uses, is deleted.
    fn left(&mut self, identity: u64, volume: &Volume) -> Result<Option<DevInfo>, UblkError> {
        let mut found = None;
        for mut info in self.control.marked(identity)? {
            let (id, device) = (info.dev_id, block(info.dev_id));
            let asking = || failed(format!("ask for the state of {}", device.node().display()));
            let deadline = Instant::now() + PATIENCE;
            let decision = loop {
                let params = self.control.params(id).map_err(asking())?;
                match decide(Seen::new(volume, &info, &params)) {
                    Decision::Wait if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN),
                    decision => break decision,
                }
                info = self.control.info(id).map_err(asking())?;
            };
            match decision {
                Decision::Wait => {
                    return Err(UblkError::Served { device: device.node(), pid: info.ublksrv_pid });
                }
                Decision::TakeOver if found.is_none() => found = Some(info),
                Decision::Delete => self.delete(id)?,
                Decision::TakeOver | Decision::DeleteUnused => {
                    // Its requests wait for a server that will not come, so a look at it would wait, too.
                    let users = device.users(None);
                    if !users.is_empty() {
                        let (device, volume, by) = (device.node(), volume.name.clone(), users.join(", "));
                        return Err(UblkError::Other { device, volume, by });
                    }
                    self.delete(id)?;
                }
            }
        }
        Ok(found)
    }

    fn create(&mut self, identity: u64, volume: &Volume, transfer: Transfer) -> Result<u32, UblkError> {
        let mut info = params::dev_info(identity, params::wanted(volume), transfer, std::process::id());
        self.control.add(&mut info).map_err(failed("make a ublk device"))?;
        let started = self.start(&info, volume);
        if started.is_err()
            && let Err(e) = self.take_away(info.dev_id)
        {
            tracing::warn!("{e}");
        }
        started.map(|()| info.dev_id)
    }

    fn start(&mut self, info: &DevInfo, volume: &Volume) -> Result<(), UblkError> {
        if info.flags & params::wanted(volume) != params::wanted(volume) {
            return Err(UblkError::TooOld(info.flags));
        }
        let device = block(info.dev_id);
        let node = device.node();
        let params = params::params(volume);
        self.control
            .set_params(info.dev_id, &params)
            .map_err(failed(format!("set the parameters of {}", node.display())))?;
        self.serve(info, volume)?;
        self.control.start(info.dev_id).map_err(failed(format!("start {}", node.display())))?;
        // One tag stays free, so that the kernel always has a command to cancel when the server dies.
        let free_tag = (info.queue_depth - 1).to_string();
        for (file, value) in
            [("queue/scheduler", "none"), ("queue/nr_requests", &free_tag), ("queue/io_timeout", TIMEOUT)]
        {
            if let Err(e) = device.set_attribute(file, value) {
                tracing::warn!("{} {file} = {value}: {e}; a take-over may take longer", node.display());
            }
        }
        Ok(())
    }

    fn take_over(&mut self, info: &DevInfo, volume: &Volume) -> Result<u32, UblkError> {
        let id = info.dev_id;
        let node = block(id).node();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.control.start_recovery(id).map_err(|e| (e.raw_os_error(), e)) {
                // EINVAL: a server that died had begun this, and had got no further.
                Ok(()) | Err((Some(libc::EINVAL), _)) => break,
                Err((Some(libc::EBUSY), _)) if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN),
                Err((_, e)) => return Err(failed(format!("take over {}", node.display()))(e)),
            }
        }
        self.serve(info, volume)?;
        self.control.end_recovery(id).map_err(failed(format!("go on with {}", node.display())))?;
        tracing::info!("{} is taken over for volume {}", node.display(), volume.name);
        Ok(id)
    }

    /// Gives the device's queue to the loop.
    fn serve(&mut self, info: &DevInfo, volume: &Volume) -> Result<(), UblkError> {
        let node = PathBuf::from(format!("/dev/ublkc{}", info.dev_id));
        let serving = || failed(format!("serve {}", node.display()));
        let rules = Rules {
            volume: volume.volume,
            size: volume.size,
            block: volume.block.into(),
            payload: info.max_io_buf_bytes.into(),
        };
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC)
            .open(&node)
            .map_err(serving())?;
        let queue = Queue::new(device, info, rules).map_err(serving())?;
        told(&self.host.open(QueueId(info.dev_id), queue)).map_err(serving())
    }

    /// Stops and deletes a device that this process serves, or nobody.
    fn take_away(&mut self, id: u32) -> Result<(), UblkError> {
        let node = block(id).node();
        self.control.stop(id).map_err(failed(format!("stop {}", node.display())))?;
        told(&self.host.close(QueueId(id))).map_err(failed(format!("stop serving {}", node.display())))?;
        self.delete(id)
    }

    fn delete(&mut self, id: u32) -> Result<(), UblkError> {
        let node = block(id).node();
        self.control.delete_later(id).map_err(failed(format!("delete {}", node.display())))
    }
}

/// The loop's answer.
fn told(answer: &Receiver<io::Result<()>>) -> io::Result<()> {
    answer
        .recv_timeout(LOOP)
        .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "the daemon's loop does not answer")))
}

impl Control {
    /// The devices that carry a mark.
    fn marked(&mut self, identity: u64) -> Result<Vec<DevInfo>, UblkError> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/class/ublk-char").into_iter().flatten().flatten() {
            let name = entry.file_name();
            let id = name.to_str().and_then(|n| n.strip_prefix("ublkc")).and_then(|n| n.parse().ok());
            // One that can't be asked (it is gone, or a user's without privilege) is not ours.
            if let Some(info) = id.and_then(|id| self.info(id).ok())
                && info.ublksrv_flags == identity
            {
                found.push(info);
            }
        }
        Ok(found)
    }
}

impl FrontEnd for UblkDevices {
    fn devices(&self) -> Vec<String> {
        self.disks.iter().map(|disk| disk.link.path().display().to_string()).collect()
    }

    fn detach(&mut self, force: bool) -> Result<(), FrontError> {
        // All of them or none: a group without one of its volumes is of no use to anybody.
        let mut claims = Vec::new();
        for disk in self.disks.iter().filter(|_| !force) {
            claims.push((claim(&disk.block())?, disk.block()));
        }
        match claims.first().map_or(Ok(()), |_| flush(&*self.host, &self.ending)) {
            // As below.
            Err(FrontError::Failed(why)) => tracing::warn!("{why}"),
            done => done?,
        }
        for (_, device) in &claims {
            let syncing = || failed(format!("flush {}", device.node().display()));
            // The driver fails what is written while it stops. A node that has failed takes nothing more: who
            // wrote and did not ask whether it was durable has lost it, and the device still has to go.
            if let Err(e) = device.sync().map_err(syncing())? {
                tracing::warn!(
                    "{} is detached without its last unflushed writes: {e}",
                    device.node().display()
                );
            }
        }
        let mut claims = claims.into_iter();
        while let Some(disk) = self.disks.first() {
            let (id, device) = (disk.id, disk.block());
            self.control.stop(id).map_err(failed(format!("stop {}", device.node().display())))?;
            // It has no disk any more: a claim would only keep its number in use.
            drop(claims.next());
            self.take_away(id)?;
            self.disks.remove(0).link.remove(&device.node());
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), FrontError> {
        self.disks.drain(..).for_each(|disk| self.host.park(QueueId(disk.id)));
        Ok(())
    }
}

/// Keeps a device from being mounted or opened by others, once nobody uses it.
fn claim(device: &BlockDevice) -> Result<File, UblkError> {
    let file = device.claim_unused().map_err(failed(format!("claim {}", device.node().display())))?;
    file.map_err(|by| UblkError::Busy { device: device.node(), by })
}

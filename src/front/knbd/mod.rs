//! The kernel NBD front end: a block device of the kernel's NBD driver, served over a socket pair.
//!
//! Owns: the devices `/dev/nbdN` that bear this node's identity, their limits and the links to them.
//! Invariants: a device that does not bear this node's identity is never touched; a device is taken
//! away only while nobody uses it, unless forced or failing already; a daemon that ends, however it
//! ends, leaves the device, whose users wait for the next one.
//!
//! The kernel is the memory: it keeps the identity that a device was made with (`backend` in sysfs), so
//! a stale note of a number can't lead to somebody else's device. Requests that the last daemon had
//! received and not answered are sent again by the driver; see `kernel-notes/nbd-reconnect.md`.
//!
//! Making a device, reading it and taking it away wait for requests that the group's loop answers: none
//! of it may happen on the loop's thread.

mod messages;
mod netlink;
mod plan;
mod pulse;

use crate::front::links::{DeviceLink, is_plain};
use crate::front::nbd::{Export, transmission_flags};
use crate::front::users::BlockDevice;
use crate::front::{FrontEnd, FrontError, Submit, Volume, flush};
use crate::node::event::MAX_REQUEST;
use crate::units::{BLOCK, GroupId, NodeId};
use messages::NewDevice;
use netlink::Driver;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};
use plan::{Left, Plan, Pulse};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// Bytes on the way to the daemon before the driver has to wait. More than it ever sends at once (128
/// requests of [`LARGEST`]): a sender that waits and gets a signal leaves half a request behind, which
/// the driver can't send again on another socket.
const TO_DAEMON: usize = 160 << 20;
/// Bytes on the way to the driver before the daemon has to wait.
const TO_DRIVER: usize = 8 << 20;
/// Largest read or write that the kernel makes, KiB (`max_sectors_kb`).
const LARGEST: u32 = 1024;
/// How often the driver looks whether a request has to be sent again, ms (`io_timeout`). It looks once
/// this long after it has sent it, rounded up to whole seconds or so: that is the longest pause that a
/// killed daemon's successor adds to its own start. It is not a limit: see `NBD_ATTR_TIMEOUT`.
const LOOK_AGAIN: u32 = 1000;
/// How long a dead daemon's socket may outlive it (its last requests may still be in the kernel).
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two offers of a socket that the driver did not take.
const RETRY: Duration = Duration::from_millis(20);
/// How long requests in flight may take at a clean end of the daemon before they are left to the next.
const FAREWELL: Duration = Duration::from_secs(5);

/// Serves NBD without negotiation to whoever holds the other end of a socket.
pub trait Serve: Submit {
    /// Begins; returns at once, with a name for the connection.
    fn serve(&self, socket: OwnedFd, export: Export) -> u64;
    /// Stops receiving as soon as nothing is on the way, answers everything that came, and closes the
    /// connection; then calls `done`, which must not block. After `limit` it closes in any case.
    fn finish(&self, connection: u64, limit: Duration, done: Box<dyn FnOnce() + Send>);
    /// Closes it at once.
    fn close(&self, connection: u64);
}

/// What to attach, and where.
pub struct Options {
    /// Whose the devices are: the group and this node of it.
    pub owner: (GroupId, NodeId),
    /// Where the links are made, `/dev/volrep` as a rule.
    pub dev_dir: PathBuf,
    /// The volumes.
    pub volumes: Vec<Volume>,
    /// How long requests wait for the next daemon before they fail.
    pub dead_after: Duration,
    /// It is certain that nobody has waited for so long yet.
    pub patient: bool,
    /// The group.
    pub serve: Arc<dyn Serve>,
    /// Set when the daemon ends: who waits for the node gives up.
    pub ending: Arc<AtomicBool>,
}

/// Devices of the kernel's NBD driver, attached. Dropping it leaves them to the next daemon.
pub struct KernelNbd {
    serve: Arc<dyn Serve>,
    ending: Arc<AtomicBool>,
    attached: Vec<Attached>,
}

struct Attached {
    index: u32,
    identity: String,
    connection: u64,
    link: DeviceLink,
    /// It was made here, not taken over.
    fresh: bool,
}

/// Whether this process can have such devices; else why not. Loads the driver's module if it can.
pub fn available() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("a device of the kernel's NBD driver needs root".into());
    }
    Driver::find().map(drop).map_err(|e| e.to_string())
}

impl KernelNbd {
    /// Takes over what the last daemon left, or makes devices, and links them.
    ///
    /// Not on the group's loop thread.
    pub fn attach(options: Options) -> Result<KernelNbd, FrontError> {
        let mut driver = Driver::find().map_err(failed("reach the NBD driver"))?;
        let (serve, ending) = (options.serve.clone(), options.ending.clone());
        let mut front = KernelNbd { serve, ending, attached: Vec::new() };
        for volume in &options.volumes {
            let link = DeviceLink::new(&options.dev_dir, &volume.link);
            if !is_plain(&volume.link) {
                let why = format!("{} can't be the name of a link", volume.link.display());
                return Err(FrontError::Failed(why));
            }
            link.check().map_err(failed("name the device"))?;
        }
        for volume in &options.volumes {
            let attached = front.attach_volume(&mut driver, &options, volume).and_then(|attached| {
                let (link, node) = (attached.link.clone(), device(attached.index).node());
                front.attached.push(attached);
                link.point_to(&node).map_err(failed("name the device"))
            });
            if let Err(e) = attached {
                front.give_up();
                return Err(e);
            }
        }
        Ok(front)
    }

    fn attach_volume(
        &self,
        driver: &mut Driver,
        options: &Options,
        volume: &Volume,
    ) -> Result<Attached, FrontError> {
        let identity = identity(options.owner, volume.volume);
        let link = DeviceLink::new(&options.dev_dir, &volume.link);
        let left = left(&identity, options.patient).map_err(failed("list the devices of the NBD driver"))?;
        let Plan { take_over, remove } = plan::plan(&left, volume.size, volume.block);
        for index in remove {
            let node = device(index).node();
            tracing::warn!("{} was left and can't be taken over: disconnecting it", node.display());
            driver.disconnect(index).map_err(failed(&format!("disconnect {}", node.display())))?;
            link.remove(&node);
        }
        let (index, connection) = match take_over {
            Some(index) => (index, self.take_over(driver, options, volume, index, &identity)?),
            None => self.make(driver, options, volume, &identity)?,
        };
        Ok(Attached { index, identity, connection, link, fresh: take_over.is_none() })
    }

    /// Makes a device.
    fn make(
        &self,
        driver: &mut Driver,
        options: &Options,
        volume: &Volume,
        identity: &str,
    ) -> Result<(u32, u64), FrontError> {
        let (ours, theirs) = socket_pair().map_err(failed("make a socket"))?;
        let connection = self.serve.serve(ours.into(), export(volume));
        let new = NewDevice {
            identity: identity.to_owned(),
            size: volume.size,
            block: volume.block,
            flags: transmission_flags(volume.read_only),
            // Of one that does not wait for the next daemon requests fail at once.
            dead_after: if volume.lasting { options.dead_after.as_secs() } else { 0 },
            socket: theirs.as_raw_fd(),
        };
        let made = driver.connect(&new).and_then(|index| {
            settle(index, volume).inspect_err(|_| {
                // What is not as it should be is not offered to anybody.
                let _ = driver.disconnect(index);
            })?;
            Ok(index)
        });
        let made = made.inspect_err(|_| self.serve.close(connection));
        made.map(|index| (index, connection)).map_err(failed(&format!("attach volume {}", volume.name)))
    }

    /// Gives a device that waits a new socket.
    fn take_over(
        &self,
        driver: &mut Driver,
        options: &Options,
        volume: &Volume,
        index: u32,
        identity: &str,
    ) -> Result<u64, FrontError> {
        let node = device(index).node();
        let action = format!("take {} over", node.display());
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (ours, theirs) = socket_pair().map_err(failed("make a socket"))?;
            let watch = ours.try_clone().map_err(failed("make a socket"))?;
            let dead_after = options.dead_after.as_secs();
            driver.reconnect(index, identity, dead_after, theirs.as_raw_fd()).map_err(failed(&action))?;
            drop(theirs);
            // The driver has the only other end now, or nobody has.
            if !is_hung_up(&watch).map_err(failed(&action))? {
                tracing::info!("{} is taken over: its users go on", node.display());
                return Ok(self.serve.serve(ours.into(), export(volume)));
            }
            if Instant::now() >= deadline {
                let text = format!(
                    "{} is served by another process, which holds its socket: end that one, then try again",
                    node.display()
                );
                return Err(FrontError::Busy(text));
            }
            std::thread::sleep(RETRY);
        }
    }
}

impl FrontEnd for KernelNbd {
    fn devices(&self) -> Vec<String> {
        self.attached.iter().map(|a| a.link.path().display().to_string()).collect()
    }

    fn detach(&mut self, force: bool) -> Result<(), FrontError> {
        let mut driver = Driver::find().map_err(failed("reach the NBD driver"))?;
        // All of them or none: the claims are kept until the last one is gone.
        let mut claims = Vec::new();
        for attached in self.attached.iter().filter(|a| !force && a.is_ours()) {
            claims.push((claim(&device(attached.index))?, attached.index));
        }
        // Nobody uses any of them from here on, so a failure below is no user's.
        if !claims.is_empty() {
            flush(&*self.serve, &self.ending)?;
        }
        for (_, index) in &claims {
            let device = device(*index);
            let flushing = format!("flush {}", device.node().display());
            let done = device.sync().map_err(failed(&flushing))?;
            done.map_err(|why| FrontError::Failed(format!("{flushing}: {why}")))?;
        }
        let mut gone = Vec::new();
        let done = self.disconnect_all(&mut driver, &mut gone);
        // Only without a claim does a device lose its size. Until then a device manager that hears of the link
        // would read what can't be read any more.
        drop(claims);
        gone.iter().for_each(|a| a.link.remove(&device(a.index).node()));
        done
    }

    fn leave(&mut self) -> Result<(), FrontError> {
        let (tell, told) = mpsc::channel::<()>();
        for attached in &self.attached {
            let tell = tell.clone();
            self.serve.finish(attached.connection, FAREWELL, Box::new(move || drop(tell)));
        }
        drop(tell);
        // Nothing is told; the channel ends with the last connection.
        let _ = told.recv();
        self.attached.clear();
        Ok(())
    }
}

impl KernelNbd {
    /// After a failure half way: what was made is nobody's yet and goes, and the users of what was taken over wait for
    /// the next attempt.
    fn give_up(&mut self) {
        let (fresh, taken): (Vec<_>, Vec<_>) = self.attached.drain(..).partition(|a| a.fresh);
        taken.iter().for_each(|a| self.serve.close(a.connection));
        self.attached = fresh;
        if !self.attached.is_empty()
            && let Err(error) = self.detach(true)
        {
            tracing::warn!("{error}");
        }
    }

    fn disconnect_all(&mut self, driver: &mut Driver, gone: &mut Vec<Attached>) -> Result<(), FrontError> {
        while let Some(attached) = self.attached.first() {
            if attached.is_ours() {
                let action = format!("disconnect {}", device(attached.index).node().display());
                driver.disconnect(attached.index).map_err(failed(&action))?;
            }
            self.serve.close(attached.connection);
            gone.push(self.attached.remove(0));
        }
        Ok(())
    }
}

/// Takes away what earlier daemons left of these volumes and nobody uses; with `force`, whoever uses it.
pub fn remove_left(
    owner: (GroupId, NodeId),
    dev_dir: &Path,
    volumes: &[Volume],
    force: bool,
) -> Result<(), FrontError> {
    let mut driver = Driver::find().map_err(failed("reach the NBD driver"))?;
    for volume in volumes {
        let identity = identity(owner, volume.volume);
        for left in left(&identity, true).map_err(failed("list the devices of the NBD driver"))? {
            let node = device(left.index).node();
            // It answers nothing, so its page cache can't be written back: who has it open has lost that.
            let users = device(left.index).users(None);
            if !users.is_empty() && !force {
                let text = format!(
                    "{} is in use ({}) and waits to be attached again: attach it, unmount and close it, then detach",
                    node.display(),
                    users.join(", ")
                );
                return Err(FrontError::Busy(text));
            }
            driver.disconnect(left.index).map_err(failed(&format!("disconnect {}", node.display())))?;
            DeviceLink::new(dev_dir, &volume.link).remove(&node);
        }
    }
    Ok(())
}

impl Attached {
    /// Nobody has disconnected it and given it to others meanwhile.
    fn is_ours(&self) -> bool {
        device(self.index).attribute("backend") == self.identity
    }
}

/// Keeps a device from being mounted or opened by others, once nobody uses it.
fn claim(device: &BlockDevice) -> Result<fs::File, FrontError> {
    let node = device.node();
    let claim = device.claim_unused().map_err(failed(&format!("open {}", node.display())))?;
    let claim = claim.map_err(|by| {
        FrontError::Busy(format!("{} is in use ({by}): unmount and close it, then try again", node.display()))
    })?;
    Ok(claim)
}

fn failed(action: &str) -> impl FnOnce(io::Error) -> FrontError {
    let action = action.to_owned();
    move |e| FrontError::Failed(format!("{action}: {e}"))
}

fn device(index: u32) -> BlockDevice {
    BlockDevice::new(format!("nbd{index}"))
}

/// What the kernel keeps for us with a device.
fn identity((group, node): (GroupId, NodeId), volume: u8) -> String {
    format!("volrep {group:?} {node:?} {volume}")
}

fn export(volume: &Volume) -> Export {
    Export {
        name: volume.name.clone(),
        volume: volume.volume,
        size: volume.size,
        min_block: volume.block,
        preferred_block: BLOCK as u32,
        max_block: MAX_REQUEST as u32,
        read_only: volume.read_only,
    }
}

/// The daemon's end and the driver's.
fn socket_pair() -> io::Result<(UnixStream, UnixStream)> {
    let (ours, theirs) = UnixStream::pair()?;
    setsockopt(&theirs, sockopt::SndBufForce, &TO_DAEMON)?;
    setsockopt(&ours, sockopt::SndBufForce, &TO_DRIVER)?;
    Ok((ours, theirs))
}

fn is_hung_up(socket: &UnixStream) -> io::Result<bool> {
    let mut poll_fd = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut poll_fd, PollTimeout::ZERO)?;
    Ok(poll_fd[0].revents().is_some_and(|e| e.contains(PollFlags::POLLHUP)))
}

/// Sets the limits of a new device and checks those that the driver was told.
fn settle(index: u32, volume: &Volume) -> io::Result<()> {
    let device = device(index);
    make_node(&device)?;
    device.set_attribute("queue/io_timeout", &LOOK_AGAIN.to_string())?;
    device.set_attribute("queue/max_sectors_kb", &LARGEST.to_string())?;
    let expected = [
        ("size", (volume.size / 512).to_string()),
        ("queue/logical_block_size", volume.block.to_string()),
        ("queue/write_cache", "write back".to_owned()),
        ("queue/fua", "1".to_owned()),
        ("ro", u8::from(volume.read_only).to_string()),
    ];
    for (file, wanted) in expected {
        let is = device.attribute(file);
        if is != wanted {
            let why = format!("the driver set {file} of {} to {is:?}, not {wanted:?}", device.name());
            return Err(io::Error::other(why));
        }
    }
    Ok(())
}

/// Makes the device's node where no device manager does.
fn make_node(device: &BlockDevice) -> io::Result<()> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    if device.node().exists() {
        return Ok(());
    }
    let number = device.attribute("dev");
    let parts = number.split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let (major, minor) = parts.ok_or_else(|| io::Error::other(format!("{} has no number", device.name())))?;
    let mode = Mode::from_bits_truncate(0o660);
    match mknod(&device.node(), SFlag::S_IFBLK, mode, makedev(major, minor)) {
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// The driver's devices that bear this identity, in the order of their numbers.
fn left(identity: &str, patient: bool) -> io::Result<Vec<Left>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(Path::new("/sys/block"))?.flatten() {
        let name = entry.file_name();
        let number = name.to_str().and_then(|n| n.strip_prefix("nbd")).and_then(|n| n.parse::<u32>().ok());
        let Some(index) = number else { continue };
        let device = device(index);
        if device.attribute("backend") != identity {
            continue;
        }
        let number = |file: &str| device.attribute(file).parse::<u64>().unwrap_or(0);
        let (size, block) = (number("size") * 512, number("queue/logical_block_size") as u32);
        found.push(Left { index, size, block, pulse: Pulse::Waits });
    }
    found.sort_by_key(|l| l.index);
    // Of several, all but one were given up earlier and are only kept by their users.
    if !patient || found.len() > 1 {
        for left in &mut found {
            left.pulse = pulse::take(&device(left.index))?;
        }
    }
    Ok(found)
}

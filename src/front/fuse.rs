//! The FUSE front end: a volume as a file, and a loop device on the file.
//!
//! Owns: the mount, its session threads, the loop devices and the links to them, and the removal of
//! what a killed daemon left of these. Invariant: what exists is released in the reverse order
//! (link, loop device, mount, threads), and nothing that somebody uses is released unless forced.
//!
//! The device needs the daemon and the daemon's machine needs memory, so two waits are forbidden:
//! a session thread never waits for the group (it only hands requests over; see [`files`]), and the
//! group's loop thread never attaches, detaches, or touches a file on the volume (both make the
//! kernel wait for requests that this very thread has to answer). And whoever does so in this process
//! has no descriptor of /dev/fuse, so that the requests fail when the process is killed: see [`apart`].

mod files;

use crate::front::apart::apart;
use crate::front::links::{DeviceLink, is_plain};
use crate::front::loopdev::{LoopDevice, LoopError};
use crate::front::{FrontEnd, FrontError, Submit, Volume, mounts};
use crate::units::{MAX_VOLUME, SECTOR};
use files::Files;
use fuser::{Config, MountOption, Session};
use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, umount2};
use std::collections::HashSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// Threads that take requests from the kernel. One: it never waits, it only copies and hands over,
/// and a second one was no faster and competes with the group's loop for the processor.
const SESSION_THREADS: usize = 1;
/// `PR_SET_IO_FLUSHER` of linux/prctl.h (Linux 5.6).
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// What to attach, and where.
pub struct FuseOptions {
    /// Where the volumes' files are mounted. Made if missing.
    pub mount_dir: PathBuf,
    /// Where the links to the loop devices are made, `/dev/volrep` as a rule.
    pub dev_dir: PathBuf,
    /// The volumes.
    pub volumes: Vec<Volume>,
    /// Make loop devices. Without them (they need root) the files themselves are the result:
    /// databases and fio can use a file directly, a filesystem can't be mounted on it.
    pub loop_device: bool,
    /// The group.
    pub submit: Arc<dyn Submit>,
}

/// Why a device could not be attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Somebody uses it.
    #[error("{path} is in use: close every file below it, then try again")]
    Busy {
        /// The mount.
        path: PathBuf,
    },
    /// Another process serves the mount.
    #[error("{path} is served by another process: detach it there first")]
    Served {
        /// The mount.
        path: PathBuf,
    },
    /// A loop device could not be bound or unbound.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// A system call failed.
    #[error("{action}: {source}")]
    Io {
        /// What was tried, on what.
        action: String,
        /// How it failed.
        source: io::Error,
    },
}

impl FuseError {
    /// Whether it is in use, so that it can work later without a change.
    pub fn is_busy(&self) -> bool {
        matches!(
            self,
            FuseError::Busy { .. } | FuseError::Served { .. } | FuseError::Loop(LoopError::Busy { .. })
        )
    }
}

impl From<FuseError> for FrontError {
    fn from(e: FuseError) -> FrontError {
        if e.is_busy() { FrontError::Busy(e.to_string()) } else { FrontError::Failed(e.to_string()) }
    }
}

fn failed(action: String) -> impl FnOnce(io::Error) -> FuseError {
    move |source| FuseError::Io { action, source }
}

/// An attached device. Dropping it detaches it by force.
pub struct FuseDevice {
    mount_dir: PathBuf,
    dev_dir: PathBuf,
    attached: Vec<Attached>,
    /// What users open, in the order of the volumes.
    paths: Vec<PathBuf>,
    session: Option<JoinHandle<()>>,
}

/// One volume's loop device and the link to it.
struct Attached {
    device: LoopDevice,
    link: DeviceLink,
}

impl FuseDevice {
    /// Mounts the volumes' files, and binds and links a loop device to each if asked for. Removes
    /// what a killed process left behind in the same place first.
    ///
    /// Not on the thread that calls `done`: the kernel reads from the new device meanwhile.
    pub fn attach(options: FuseOptions) -> Result<FuseDevice, FuseError> {
        check(&options)?;
        remove_left(&options.mount_dir, &options.dev_dir, &options.volumes)?;
        let mut builder = fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(&options.mount_dir)
            .map_err(failed(making(&options.mount_dir)))?;
        // The kernel names a bound file by its resolved path.
        let mount_dir = options.mount_dir.canonicalize().map_err(failed(making(&options.mount_dir)))?;
        let session = serve(&mount_dir, Files::new(options.volumes.clone(), options.submit))?;
        let mut device = FuseDevice {
            mount_dir,
            dev_dir: options.dev_dir,
            attached: Vec::new(),
            paths: Vec::new(),
            session: Some(session),
        };
        for volume in &options.volumes {
            let path = if options.loop_device {
                waiting(|| device.bind(volume))?
            } else {
                device.mount_dir.join(&volume.name)
            };
            device.paths.push(path);
        }
        Ok(device)
    }

    /// What users open, in the order of the volumes: the links, or the files without loop devices.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.paths.clone()
    }

    /// The loop devices' own nodes, in the order of the volumes.
    pub fn nodes(&self) -> Vec<PathBuf> {
        self.attached.iter().map(|a| a.device.path()).collect()
    }

    /// Releases everything, or says who still uses it (then what was not released yet stays, and
    /// it can be tried again). With `force`, users get errors from now on instead, and the loop
    /// devices go away with their last user.
    ///
    /// Not on the thread that calls `done`: the kernel writes back what its cache holds meanwhile.
    pub fn detach(&mut self, force: bool) -> Result<(), FuseError> {
        waiting(|| self.release(force))?;
        if self.session.is_some() {
            waiting(|| unmount(&self.mount_dir, force))?;
            self.end_session(force);
            // Best effort: a directory that was there before, or is not empty, may stay.
            let _ = fs::remove_dir(&self.mount_dir);
        }
        Ok(())
    }

    fn release(&mut self, force: bool) -> Result<(), FuseError> {
        // All of them or none, as far as that can be known before.
        if !force {
            self.attached.iter().try_for_each(|a| a.device.unused())?;
        }
        while let Some(attached) = self.attached.first() {
            if force {
                attached.device.release_forced()?
            } else {
                attached.device.release()?
            }
            let attached = self.attached.remove(0);
            attached.link.remove(&attached.device.path());
        }
        Ok(())
    }

    fn bind(&mut self, volume: &Volume) -> Result<PathBuf, FuseError> {
        let path = self.mount_dir.join(&volume.name);
        let file = OpenOptions::new()
            .read(true)
            .write(!volume.read_only)
            .custom_flags(libc::O_DIRECT)
            .open(&path)
            .map_err(failed(format!("open {}", path.display())))?;
        let device = LoopDevice::bind(&file, &path, volume.block, volume.read_only)?;
        let link = DeviceLink::new(&self.dev_dir, &volume.link);
        let (linked, path) = (link.point_to(&device.path()), link.path());
        self.attached.push(Attached { device, link });
        linked.map(|()| path).map_err(failed("name the device".into()))
    }

    fn end_session(&mut self, force: bool) {
        let Some(session) = self.session.take() else { return };
        // Without privilege a forced unmount is a lazy one: the threads end with the last user.
        if !force || nix::unistd::geteuid().is_root() {
            // A panic of the thread was reported when it happened; there is nothing to add.
            let _ = session.join();
        }
    }
}

impl FrontEnd for FuseDevice {
    fn devices(&self) -> Vec<String> {
        self.paths.iter().map(|p| p.display().to_string()).collect()
    }

    fn detach(&mut self, force: bool) -> Result<(), FrontError> {
        Ok(FuseDevice::detach(self, force)?)
    }
}

impl Drop for FuseDevice {
    fn drop(&mut self) {
        if let Err(error) = self.detach(true) {
            tracing::warn!("detach of {}: {error}", self.mount_dir.display());
        }
    }
}

/// Runs what may wait for requests that this process answers.
fn waiting<T: Send>(work: impl FnOnce() -> Result<T, FuseError> + Send) -> Result<T, FuseError> {
    apart(work).map_err(failed("start a thread without the process's descriptors".into()))?
}

fn making(dir: &Path) -> String {
    format!("make {}", dir.display())
}

/// Refuses what could not be attached, before anything is changed.
fn check(options: &FuseOptions) -> Result<(), FuseError> {
    let invalid = |text: String| Err(FuseError::Invalid(text));
    let (mut names, mut links) = (HashSet::new(), HashSet::new());
    for Volume { name, size, block, link, .. } in &options.volumes {
        if name.is_empty() || name.contains(['/', '\0']) || !is_plain(Path::new(name)) || name.len() > 255 {
            return invalid(format!("{name:?} can't be the name of a file"));
        }
        if !is_plain(link) {
            return invalid(format!(
                "{} can't be a link within {}",
                link.display(),
                options.dev_dir.display()
            ));
        }
        if !block.is_power_of_two() || !(512..=4096).contains(block) {
            return invalid(format!(
                "volume {name}: a block of {block} bytes; it must be 512, 1024, 2048 or 4096"
            ));
        }
        if *size == 0 || *size > MAX_VOLUME || !size.is_multiple_of(u64::from(*block).max(SECTOR)) {
            return invalid(format!(
                "volume {name}: {size} bytes is not a whole number of {block}-byte blocks"
            ));
        }
        if !names.insert(name) || !links.insert(link) {
            return invalid(format!("volume {name}: its name or its link occurs twice"));
        }
    }
    Ok(())
}

/// Mounts, and starts the session threads.
fn serve(mount_dir: &Path, files: Files) -> Result<JoinHandle<()>, FuseError> {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("volrep".into()),
        MountOption::DefaultPermissions,
        MountOption::NoAtime,
        MountOption::NoExec,
    ];
    config.n_threads = Some(SESSION_THREADS);
    let action = format!("mount the volumes' files on {}", mount_dir.display());
    let session = Session::new(files, mount_dir, &config).map_err(failed(action))?;
    let run = move || {
        set_io_flusher();
        if let Err(error) = session.run() {
            tracing::error!("the FUSE session has ended: {error}; detach the device and attach it again");
        }
    };
    thread::Builder::new().name("volrep-fuse".into()).spawn(run).map_err(failed("start a thread".into()))
}

/// Lets this thread, and those that it starts, allocate without waiting for writes to a disk that
/// may be the one they serve. Best effort: it needs CAP_SYS_RESOURCE and Linux 5.6.
fn set_io_flusher() {
    // SAFETY: this option takes integers only and changes nothing but flags of this thread.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!("PR_SET_IO_FLUSHER: {error}; under memory pressure the device may stall");
    }
}

/// Unmounts. By force, requests in flight and those to come fail (the connection is aborted).
fn unmount(dir: &Path, force: bool) -> Result<(), FuseError> {
    let flags = if force { MntFlags::MNT_FORCE | MntFlags::MNT_DETACH } else { MntFlags::empty() };
    let action = || format!("unmount {}", dir.display());
    match umount2(dir, flags) {
        // EINVAL: somebody unmounted it already.
        Ok(()) | Err(Errno::EINVAL) => Ok(()),
        Err(Errno::EBUSY) => Err(FuseError::Busy { path: dir.to_path_buf() }),
        // Without privilege it is the set-user-id helper that unmounts.
        Err(Errno::EPERM) => {
            let lazy: &[&str] = if force { &["-z"] } else { &[] };
            let output = Command::new("fusermount3").arg("-u").args(lazy).arg("--").arg(dir).output();
            let output = output.map_err(failed(action()))?;
            let text = String::from_utf8_lossy(&output.stderr);
            match output.status.success() {
                true => Ok(()),
                false if text.contains("busy") => Err(FuseError::Busy { path: dir.to_path_buf() }),
                false => Err(failed(action())(io::Error::other(text.trim_end().to_string()))),
            }
        }
        Err(e) => Err(failed(action())(e.into())),
    }
}

/// Removes what a killed process left behind, with the links to it; see [`clear_leftovers`].
pub fn remove_left(mount_dir: &Path, dev_dir: &Path, volumes: &[Volume]) -> Result<(), FuseError> {
    for device in clear_leftovers(mount_dir)? {
        for volume in volumes {
            DeviceLink::new(dev_dir, &volume.link).remove(&device.path());
        }
    }
    Ok(())
}

/// Removes what a killed process left at `dir`: the mount, which answers nothing any more, and the
/// loop devices bound to files in it. Those still in use (a filesystem mounted on one) only ever
/// give errors again; they go away with their last user. Refuses a mount that is alive. Returns the
/// devices that it released.
fn clear_leftovers(dir: &Path) -> Result<Vec<LoopDevice>, FuseError> {
    let mut released = Vec::new();
    // A dead mount can't be resolved itself, but its parent can.
    let dir = match (dir.parent().and_then(|p| p.canonicalize().ok()), dir.file_name()) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => return Ok(released),
    };
    for mount in mounts::read().iter().filter(|m| m.point == dir && m.kind.starts_with("fuse")) {
        // statfs is never answered from a cache.
        match nix::sys::statfs::statfs(&dir) {
            Err(Errno::ENOTCONN | Errno::ECONNABORTED) => {}
            Ok(_) => return Err(FuseError::Served { path: dir }),
            Err(e) => return Err(failed(format!("look at {} ({})", dir.display(), mount.kind))(e.into())),
        }
        for device in LoopDevice::bound_under(&dir)? {
            tracing::info!("{} was left by a killed process: unbinding it", device.path().display());
            device.release_forced()?;
            released.push(device);
        }
        unmount(&dir, true)?;
    }
    Ok(released)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::IoError;
    use crate::node::event::Op;
    use bytes::Bytes;

    struct Nothing;
    impl Submit for Nothing {
        fn submit(&self, _: Op, _: Box<dyn FnOnce(Result<Bytes, IoError>) + Send>) {}
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_is_changed() {
        let good = Volume {
            volume: 0,
            name: "data".into(),
            size: 8192,
            block: 512,
            link: "epic".into(),
            read_only: false,
            lasting: true,
        };
        let verdict = |volumes: Vec<Volume>| {
            let (mount_dir, dev_dir) = ("/nonexistent/mount".into(), "/nonexistent/dev".into());
            check(&FuseOptions { mount_dir, dev_dir, volumes, loop_device: true, submit: Arc::new(Nothing) })
                .is_ok()
        };
        assert!(verdict(vec![good.clone()]));
        for name in ["", "a/b", "..", ".", "/", "a\0"] {
            assert!(!verdict(vec![Volume { name: name.into(), ..good.clone() }]), "{name:?}");
        }
        for link in ["", "/etc/passwd", "../x", "a/../../x"] {
            assert!(!verdict(vec![Volume { link: link.into(), ..good.clone() }]), "{link:?}");
        }
        let huge = MAX_VOLUME + 512;
        for (size, block) in
            [(0, 512), (512, 4096), (1000, 512), (huge, 512), (8192, 0), (8192, 768), (8192, 8192)]
        {
            assert!(!verdict(vec![Volume { size, block, ..good.clone() }]), "{size} {block}");
        }
        let second = Volume { name: "wal".into(), link: "epic".into(), ..good.clone() };
        assert!(!verdict(vec![good.clone(), second]));
        assert!(!verdict(vec![good.clone(), good]));
    }
}

//! Loop devices: a file bound to a free `/dev/loopN` with direct I/O, and unbound again.
//!
//! Owns: the loop driver's ioctls. Invariant: a loop device is unbound only while it is bound to
//! the very file it was bound to, and, unless forced, only when nobody else has it open: what
//! `LOOP_CLR_FD` does on a busy device (unbind at the last close, whenever that is) is undone.

use super::users::BlockDevice;
use nix::errno::Errno;
use nix::libc;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Block major number of the loop driver.
const LOOP_MAJOR: u64 = 7;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// How often a free device may be lost to another process before that is an error.
const ATTEMPTS: usize = 32;
/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

impl LoopInfo64 {
    fn zeroed() -> LoopInfo64 {
        LoopInfo64 {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

mod ioctl {
    use super::{LoopConfig, LoopInfo64};
    nix::ioctl_none_bad!(loop_clr_fd, 0x4C01);
    nix::ioctl_write_ptr_bad!(loop_set_status64, 0x4C04, LoopInfo64);
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, LoopInfo64);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, LoopConfig);
    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
}

/// Why a loop device could not be bound or unbound.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// Somebody uses it.
    #[error("{device} is in use ({by}): unmount and close it, then try again")]
    Busy {
        /// The device.
        device: PathBuf,
        /// Mount points, devices on top, processes.
        by: String,
    },
    /// The kernel would go through its page cache, which may answer a write before it reached us.
    #[error("{device}: the kernel refused direct I/O with {block}-byte blocks on {file}")]
    NotDirect {
        /// The device.
        device: PathBuf,
        /// The block size asked for.
        block: u32,
        /// The file.
        file: PathBuf,
    },
    /// A system call failed.
    #[error("{action}: {source}")]
    Io {
        /// What was tried, on what.
        action: String,
        /// How it failed.
        source: io::Error,
    },
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> LoopError {
    move |source| LoopError::Io { action: action.into(), source }
}

/// A loop device and the file it is bound to.
#[derive(Debug)]
pub struct LoopDevice {
    number: u32,
    file: PathBuf,
}

impl LoopDevice {
    /// Binds `file` (open for reading, and unless `read_only` for writing, at `path`) to a free loop device with logical
    /// blocks of `block` bytes.
    ///
    /// Needs Linux 5.8 (`LOOP_CONFIGURE`: no moment at which the device exists without direct I/O).
    pub fn bind(file: &File, path: &Path, block: u32, read_only: bool) -> Result<LoopDevice, LoopError> {
        let control = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/loop-control")
            .map_err(failed("open /dev/loop-control"))?;
        let config = LoopConfig {
            fd: file.as_raw_fd() as u32,
            block_size: block,
            info: LoopInfo64 {
                flags: LO_FLAGS_DIRECT_IO | if read_only { LO_FLAGS_READ_ONLY } else { 0 },
                file_name: name_field(path),
                ..LoopInfo64::zeroed()
            },
            reserved: [0; 8],
        };
        for _ in 0..ATTEMPTS {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument; the descriptor is open.
            let number = unsafe { ioctl::loop_ctl_get_free(control.as_raw_fd()) }
                .map_err(|e| failed("find a free loop device")(e.into()))?;
            let device = LoopDevice { number: number as u32, file: path.to_path_buf() };
            let node = device.open_node()?;
            // SAFETY: `config` is a live loop_config of the size asserted above, which the kernel
            // only reads; the descriptor in it is open.
            match unsafe { ioctl::loop_configure(node.as_raw_fd(), &config) } {
                Ok(_) => return device.checked(block),
                // Another process took it since it was free.
                Err(Errno::EBUSY) => continue,
                Err(e) => {
                    let action = format!("bind {} to {}", path.display(), device.path().display());
                    return Err(failed(action)(e.into()));
                }
            }
        }
        let lost = io::Error::from_raw_os_error(libc::EBUSY);
        Err(failed(format!("bind {}: every free loop device was taken by others", path.display()))(lost))
    }

    /// The loop devices bound to files under `dir`, by whichever process.
    pub fn bound_under(dir: &Path) -> Result<Vec<LoopDevice>, LoopError> {
        let mut found = Vec::new();
        for entry in fs::read_dir("/sys/block").map_err(failed("list /sys/block"))?.flatten() {
            let name = entry.file_name();
            let number = name.to_str().and_then(|n| n.strip_prefix("loop")).and_then(|n| n.parse().ok());
            if let Some(number) = number
                && let Some(file) = bound_to(number).filter(|file| file.starts_with(dir))
            {
                found.push(LoopDevice { number, file });
            }
        }
        Ok(found)
    }

    /// The device node.
    pub fn path(&self) -> PathBuf {
        self.block_device().node()
    }

    fn block_device(&self) -> BlockDevice {
        BlockDevice::new(format!("loop{}", self.number))
    }

    /// Says who uses it, after waiting a moment for those who only look at it.
    pub fn unused(&self) -> Result<(), LoopError> {
        if !self.is_bound() {
            return Ok(());
        }
        let device = self.block_device();
        let claim = device.claim_unused().map_err(failed(format!("open {}", self.path().display())))?;
        claim.map(drop).map_err(|by| LoopError::Busy { device: self.path(), by })
    }

    /// Unbinds it, or says who uses it. Waits a moment for those who only look at it.
    pub fn release(&self) -> Result<(), LoopError> {
        let device = self.block_device();
        if device.when_unused(|| Ok(!self.is_bound() || self.try_release()?))? {
            return Ok(());
        }
        Err(LoopError::Busy { device: self.path(), by: device.used_by() })
    }

    /// Unbinds it now, or, when it is in use, at its last close.
    pub fn release_forced(&self) -> Result<(), LoopError> {
        if !self.is_bound() {
            return Ok(());
        }
        let node = self.open_node()?;
        self.clear(&node)
    }

    /// False when it was unbound or bound to something else behind our back.
    fn is_bound(&self) -> bool {
        bound_to(self.number).is_some_and(|file| file == self.file)
    }

    /// One attempt; false, with nothing changed, when somebody has it open.
    fn try_release(&self) -> Result<bool, LoopError> {
        let claim = self.block_device().claim();
        let Some(node) = claim.map_err(failed(format!("open {}", self.path().display())))? else {
            return Ok(false);
        };
        self.clear(&node)?;
        let mut info = LoopInfo64::zeroed();
        // SAFETY: `info` is a live loop_info64 of the size asserted above.
        match unsafe { ioctl::loop_get_status64(node.as_raw_fd(), &mut info) } {
            // Unbound: at once, or by our own close.
            Err(Errno::ENXIO) => return Ok(true),
            Err(e) => return Err(failed(format!("ask {} for its state", self.path().display()))(e.into())),
            Ok(_) => {}
        }
        // Others have it open: the kernel has only marked it for their last close. Take that back.
        info.flags &= !LO_FLAGS_AUTOCLEAR;
        // SAFETY: as above; the kernel only reads it.
        unsafe { ioctl::loop_set_status64(node.as_raw_fd(), &info) }
            .map_err(|e| failed(format!("keep {} bound", self.path().display()))(e.into()))?;
        Ok(false)
    }

    fn clear(&self, node: &File) -> Result<(), LoopError> {
        // SAFETY: LOOP_CLR_FD takes no argument; the descriptor is open.
        match unsafe { ioctl::loop_clr_fd(node.as_raw_fd()) } {
            Ok(_) | Err(Errno::ENXIO) => Ok(()),
            Err(e) => Err(failed(format!("unbind {}", self.path().display()))(e.into())),
        }
    }

    /// Opens the node, and makes it first where no device manager does.
    fn open_node(&self) -> Result<File, LoopError> {
        let path = self.path();
        let open = || OpenOptions::new().read(true).write(true).open(&path);
        match open() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let mode = Mode::from_bits_truncate(0o660);
                match mknod(&path, SFlag::S_IFBLK, mode, makedev(LOOP_MAJOR, self.number.into())) {
                    Ok(()) | Err(Errno::EEXIST) => open(),
                    Err(e) => Err(e.into()),
                }
            }
            other => other,
        }
        .map_err(failed(format!("open {}", path.display())))
    }

    /// The kernel drops the wish for direct I/O in silence when it can't grant it.
    fn checked(self, block: u32) -> Result<LoopDevice, LoopError> {
        let device = self.block_device();
        if device.attribute("loop/dio") == "1"
            && device.attribute("queue/logical_block_size") == block.to_string()
        {
            return Ok(self);
        }
        self.release_forced()?;
        Err(LoopError::NotDirect { device: self.path(), block, file: self.file })
    }
}

/// The file a loop device is bound to, as the kernel names it.
fn bound_to(number: u32) -> Option<PathBuf> {
    let name = fs::read(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
    let name = name.strip_suffix(b"\n").unwrap_or(&name);
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(name)))
}

/// The path as the name that `losetup` shows, cut to fit.
fn name_field(path: &Path) -> [u8; 64] {
    let mut field = [0; 64];
    let name = path.as_os_str().as_bytes();
    let len = name.len().min(field.len() - 1);
    field[..len].copy_from_slice(&name[..len]);
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_name_is_cut_and_stays_terminated() {
        assert_eq!(&name_field(Path::new("/a"))[..3], b"/a\0");
        let long = name_field(&Path::new("/").join("x".repeat(300)));
        assert_eq!((long[62], long[63]), (b'x', 0));
    }
}

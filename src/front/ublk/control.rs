//! Commands to the ublk driver, one at a time.
//!
//! Owns: `/dev/ublk-control` and a ring of 128-byte submissions on it. Invariant: what a command points
//! to lives until the command has completed; a command is never given up while the kernel has it.
//! Several block until the device's queue is served, so they are given on any thread but that one.

use super::abi::{ANY_DEVICE, CtrlCmd, DevInfo, NO_QUEUE, Params, control};
use io_uring::types::Fd;
use io_uring::{IoUring, cqueue, opcode, squeue};
use nix::libc;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

const NODE: &str = "/dev/ublk-control";

/// The driver's door for commands.
pub struct Control {
    ring: IoUring<squeue::Entry128, cqueue::Entry>,
    node: File,
    /// How many were given: the name of the newest.
    commands: u64,
}

/// A structure that the kernel reads or fills: integers only and without padding (`abi` asserts the
/// sizes), so that any bytes are a value of it.
trait Plain: Copy {}
impl Plain for DevInfo {}
impl Plain for Params {}
impl Plain for u64 {}

impl Control {
    /// Opens it; loads the driver first where it is a module that is not loaded.
    pub fn open() -> io::Result<Control> {
        if !Path::new(NODE).exists() {
            // Best effort: without it the open below says what is missing.
            let _ = Command::new("modprobe").args(["-q", "ublk_drv"]).status();
        }
        let node = OpenOptions::new().read(true).write(true).open(NODE)?;
        Ok(Control { ring: IoUring::builder().build(4)?, node, commands: 0 })
    }

    /// What the driver can do; ENOTSUP or EINVAL from one that is older than Linux 6.5.
    pub fn features(&mut self) -> io::Result<u64> {
        let mut features = 0u64;
        self.exchange(control::GET_FEATURES, ANY_DEVICE, &mut features)?;
        Ok(features)
    }

    /// Makes a device; `info` is as the driver then has it, its number in it.
    pub fn add(&mut self, info: &mut DevInfo) -> io::Result<()> {
        self.exchange(control::ADD_DEV, info.dev_id, info)
    }

    /// Sets its parameters, before it is started.
    pub fn set_params(&mut self, id: u32, params: &Params) -> io::Result<()> {
        let mut params = *params;
        self.exchange(control::SET_PARAMS, id, &mut params)
    }

    /// Its parameters.
    pub fn params(&mut self, id: u32) -> io::Result<Params> {
        let mut params = Params { len: size_of::<Params>() as u32, ..Params::default() };
        self.exchange(control::GET_PARAMS, id, &mut params)?;
        Ok(params)
    }

    /// What it is; ENODEV if there is none.
    pub fn info(&mut self, id: u32) -> io::Result<DevInfo> {
        let mut info = DevInfo::default();
        self.exchange(control::GET_DEV_INFO, id, &mut info)?;
        Ok(info)
    }

    /// Makes it a disk. Its queue must be served.
    pub fn start(&mut self, id: u32) -> io::Result<()> {
        self.plain(control::START_DEV, id, std::process::id().into())
    }

    /// Begins to take over a device whose server is gone; EBUSY while the kernel is not done with that.
    pub fn start_recovery(&mut self, id: u32) -> io::Result<()> {
        self.plain(control::START_USER_RECOVERY, id, 0)
    }

    /// Lets requests through again, once its queue is served.
    pub fn end_recovery(&mut self, id: u32) -> io::Result<()> {
        self.plain(control::END_USER_RECOVERY, id, std::process::id().into())
    }

    /// Takes the disk away. Whoever has it open gets errors from now on. Waits for requests in flight.
    pub fn stop(&mut self, id: u32) -> io::Result<()> {
        self.plain(control::STOP_DEV, id, 0)
    }

    /// Forgets a device; stops it first. It is gone when every descriptor of it is closed, which this
    /// does not wait for where the driver can do without (Linux 6.9).
    pub fn delete_later(&mut self, id: u32) -> io::Result<()> {
        match self.plain(control::DEL_DEV_ASYNC, id, 0) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => self.plain(control::DEL_DEV, id, 0),
            other => other,
        }
    }

    fn plain(&mut self, command: u32, id: u32, data: u64) -> io::Result<()> {
        self.command(command, id, std::ptr::null_mut::<u64>(), 0, data)?
    }

    fn exchange<T: Plain>(&mut self, command: u32, id: u32, value: &mut T) -> io::Result<()> {
        let mut held = Box::new(*value);
        match self.command(command, id, &raw mut *held, size_of::<T>() as u16, 0) {
            Ok(result) => {
                *value = *held;
                result
            }
            Err(lost) => {
                // The kernel may still write to it.
                Box::leak(held);
                Err(lost)
            }
        }
    }

    /// The driver's answer; an outer error when it can't be waited for, and the command may still be
    /// with the kernel.
    fn command<T: Plain>(
        &mut self,
        command: u32,
        id: u32,
        at: *mut T,
        len: u16,
        data: u64,
    ) -> io::Result<io::Result<()>> {
        let header = CtrlCmd { dev_id: id, queue_id: NO_QUEUE, len, addr: at as u64, data, path: 0 };
        self.commands += 1;
        let entry = opcode::UringCmd80::new(Fd(self.node.as_raw_fd()), command)
            .cmd(header.bytes())
            .build()
            .user_data(self.commands);
        // SAFETY: the caller's `at` is null or points to a value of `len` bytes on the heap, which it
        // keeps until this has said that the command is over. The descriptor is open.
        unsafe { self.ring.submission().push(&entry) }
            .map_err(|_| io::Error::other("the ring for commands is full"))?;
        loop {
            match self.ring.submit_and_wait(1) {
                Err(e) if e.kind() != io::ErrorKind::Interrupted => return Err(e),
                _ => {}
            }
            if let Some(done) = self.ring.completion().find(|done| done.user_data() == self.commands) {
                return Ok(match done.result() {
                    n if n < 0 => Err(io::Error::from_raw_os_error(-n)),
                    _ => Ok(()),
                });
            }
        }
    }
}

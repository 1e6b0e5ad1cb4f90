//! What the process asks of the kernel about itself.
//!
//! Owns: identity of this boot, randomness, privilege, and the promise not to wait for our own
//! writeback. Invariant: none of it is read by a machine except through its configuration or an event.

use crate::units::BootId;
use nix::libc;
use nix::sys::signal::Signal;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Tells the kernel that this thread (and those it starts) serves a block device: memory that it
/// needs must not be reclaimed by writing to that device. Needs CAP_SYS_RESOURCE; false without it.
pub fn become_io_flusher() -> bool {
    set_io_flusher(true)
}

fn set_io_flusher(flusher: bool) -> bool {
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: this prctl takes plain numbers and touches no memory of ours.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, u64::from(flusher), 0u64, 0u64, 0u64) == 0 }
}

/// The command that is started is no part of the block device, as this process may be: it waits for its own write-back as
/// everybody does, and may be the one that is killed when memory runs out. Both would be inherited (prctl(2), proc(5)).
pub fn as_any_other(command: &mut Command) {
    let give_up = || {
        set_io_flusher(false);
        let mut sign = [0u8];
        // SAFETY: `open` reads the path, `read` fills the one byte of `sign`, `pwrite` reads one of the text; the descriptor is
        // the one that was got.
        unsafe {
            let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
            if file >= 0 {
                if libc::read(file, sign.as_mut_ptr().cast(), 1) == 1 && sign == *b"-" {
                    libc::pwrite(file, c"0".as_ptr().cast(), 1, 0);
                }
                libc::close(file);
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec only system calls are made; nothing is allocated, and no lock is taken.
    unsafe { command.pre_exec(give_up) };
}

/// Keeps this process's memory, what it has and what it will have, from being swapped out once it was
/// touched: the swap may lie on a device that it serves. Only with privilege (a limit on locked memory
/// would make later allocations fail); false where it was not done.
pub fn lock_memory() -> bool {
    use nix::sys::mman::{MlockAllFlags, mlockall};
    let all = MlockAllFlags::MCL_CURRENT
        | MlockAllFlags::MCL_FUTURE
        | MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    nix::unistd::geteuid().is_root() && mlockall(all).is_ok()
}

/// `_LINUX_CAPABILITY_VERSION_3` of linux/capability.h.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
const CAP_SYS_ADMIN: u32 = 1 << 21;

/// `struct __user_cap_header_struct`; thread 0 is the calling one.
#[repr(C)]
struct CapabilityHeader {
    version: u32,
    thread: libc::c_int,
}

/// `struct __user_cap_data_struct`, of which version 3 takes two: numbers 0 to 31, and those above.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Capabilities {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Does `act` without CAP_SYS_ADMIN in effect for this thread, which has it again afterwards if it had it.
pub fn without_admin<R>(act: impl FnOnce() -> R) -> io::Result<R> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION, thread: 0 };
    let mut own = [Capabilities::default(); 2];
    // SAFETY: the kernel reads (and, on a version that it does not know, writes) `header`, and fills both
    // entries of `own`.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, own.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut less = own;
    less[0].effective &= !CAP_SYS_ADMIN;
    set_capabilities(&less)?;
    let done = act();
    set_capabilities(&own)?;
    Ok(done)
}

fn set_capabilities(capabilities: &[Capabilities; 2]) -> io::Result<()> {
    let mut header = CapabilityHeader { version: CAPABILITY_VERSION, thread: 0 };
    // SAFETY: the kernel reads `header` and both entries of `capabilities`.
    match unsafe { libc::syscall(libc::SYS_capset, &raw mut header, capabilities.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The command that is started is killed when the thread that starts it ends, however that ends.
pub fn end_with_parent(command: &mut Command) {
    let parent = nix::unistd::getpid();
    let ask = move || {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        // It may have ended before that.
        if nix::unistd::getppid() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec only system calls are made; nothing is allocated, and no lock is taken.
    unsafe { command.pre_exec(ask) };
}

/// Has the system's allocator, which does what [`super::memory`] does not, give back to the kernel what is freed: large
/// tables in mappings of their own, and the ends of its heaps. By itself it would let both grow with the largest table.
pub fn give_back_freed_memory() {
    const KEPT: libc::c_int = 1 << 20;
    // SAFETY: mallopt takes plain numbers; the allocator accepts it at any time.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT);
    }
}

/// The kernel's boot id.
pub fn boot_id() -> io::Result<BootId> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    parse_uuid(text.trim()).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "boot_id is not a UUID"))
}

fn parse_uuid(text: &str) -> Option<BootId> {
    let digits: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
    if digits.len() != 32 {
        return None;
    }
    let mut id = [0; 16];
    for (byte, pair) in id.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |d: u8| char::from(d).to_digit(16);
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(id)
}

/// Fresh random bytes.
///
/// # Panics
/// When the kernel has no randomness to give, which Linux does not do after boot.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).expect("getrandom(2) does not fail after boot");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_id_is_read_and_stays() {
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
        assert_eq!(parse_uuid("not a uuid"), None);
        assert_eq!(parse_uuid("00112233-4455-6677-8899-aabbccddeeff").unwrap()[15], 0xff);
        assert_ne!(random::<32>(), random::<32>());
    }

    #[test]
    fn privilege_is_laid_down_and_taken_up_again_by_this_thread_alone() {
        let effective = || {
            let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let line = status.lines().find_map(|l| l.strip_prefix("CapEff:")).unwrap();
            u64::from_str_radix(line.trim(), 16).unwrap()
        };
        let before = effective();
        let (during, others) =
            without_admin(|| (effective(), std::thread::spawn(effective).join().unwrap())).unwrap();
        assert_eq!(during, before & !u64::from(CAP_SYS_ADMIN));
        // A thread that is started meanwhile begins with what its maker has then.
        assert_eq!(others, during);
        assert_eq!(effective(), before);
    }
}

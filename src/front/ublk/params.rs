//! What a device is told to be.
//!
//! Owns: the identity, the features and the limits of a volume's device. Invariant: a device whose
//! identity is a volume's own was made by the holder of the group's locks, for that volume of that
//! node; and what it promises (write cache, FUA, zeroes) is what the node keeps.

use super::abi::{ANY_DEVICE, DevInfo, Params, attribute, feature, parameter};
use crate::front::Volume;
use crate::units::{BLOCK, GroupId, NodeId, SECTOR};

/// Requests that a device can have at a time.
pub const DEPTH: u16 = 128;
/// Largest payload of a request, bytes: what one record of the journal takes.
pub const PAYLOAD: u32 = 1 << 20;
/// Longest discard or zeroing in one request, bytes. A longer one is several requests, between which
/// others have their turn.
const LONGEST_ZERO: u64 = 1 << 30;

/// Features that a device can't do without.
pub const NEEDED: u64 = feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE | feature::CMD_IOCTL_ENCODE;

/// Features that the device of a volume has.
pub fn wanted(volume: &Volume) -> u64 {
    // Without recovery the driver takes a device away when its server is gone.
    if volume.lasting { NEEDED } else { feature::CMD_IOCTL_ENCODE }
}

/// How payloads go between the kernel and the server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transfer {
    /// The server reads and writes them at a place of the character device: a write's bytes go from
    /// the caller's pages to the write cache in one copy, a read's answer to the caller's pages in one.
    UserCopy,
    /// The kernel copies them to and from a buffer that each tag has.
    Buffers,
}

impl Transfer {
    /// The best that a driver with these features offers.
    pub fn best(features: u64) -> Transfer {
        if features & feature::USER_COPY != 0 { Transfer::UserCopy } else { Transfer::Buffers }
    }

    /// That of a device.
    pub fn of(info: &DevInfo) -> Transfer {
        Transfer::best(info.flags)
    }
}

/// The mark that a volume's device carries in the field that the driver keeps for its server. Two
/// devices with the same mark belong to the same volume of the same node.
pub fn identity((group, node): (GroupId, NodeId), volume: u8) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"volrep ublk device\0").update(&group.0).update(&node.0.to_le_bytes()).update(&[volume]);
    u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"))
}

/// What ADD_DEV is asked for.
pub fn dev_info(identity: u64, wanted: u64, transfer: Transfer, pid: u32) -> DevInfo {
    let copy = if transfer == Transfer::UserCopy { feature::USER_COPY } else { 0 };
    DevInfo {
        nr_hw_queues: 1,
        queue_depth: DEPTH,
        max_io_buf_bytes: PAYLOAD,
        dev_id: ANY_DEVICE,
        ublksrv_pid: pid as i32,
        flags: wanted | copy,
        ublksrv_flags: identity,
        ..DevInfo::default()
    }
}

/// What SET_PARAMS is told. With the smallest and the best unit both the physical block, mkfs.xfs sees
/// no stripe.
pub fn params(volume: &Volume) -> Params {
    let block = u64::from(volume.block);
    let physical = BLOCK.max(block);
    let shift = |bytes: u64| bytes.trailing_zeros() as u8;
    let longest = (LONGEST_ZERO / SECTOR) as u32;
    Params {
        len: size_of::<Params>() as u32,
        types: parameter::BASIC | parameter::DISCARD,
        attrs: attribute::VOLATILE_CACHE
            | attribute::FUA
            | if volume.read_only { attribute::READ_ONLY } else { 0 },
        logical_bs_shift: shift(block),
        physical_bs_shift: shift(physical),
        io_opt_shift: shift(physical),
        io_min_shift: shift(physical),
        max_sectors: PAYLOAD / SECTOR as u32,
        dev_sectors: volume.size / SECTOR,
        discard_granularity: physical as u32,
        max_discard_sectors: longest,
        max_write_zeroes_sectors: longest,
        max_discard_segments: 1,
        ..Params::default()
    }
}

/// Whether a device has a volume's size and blocks: with others it can't be taken over, because a
/// device's parameters never change.
pub fn fits(volume: &Volume, has: &Params) -> bool {
    let wants = params(volume);
    has.dev_sectors == wants.dev_sectors && has.logical_bs_shift == wants.logical_bs_shift
}

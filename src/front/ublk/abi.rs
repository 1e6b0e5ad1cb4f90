//! What the ublk driver and its server say to each other: include/uapi/linux/ublk_cmd.h.
//!
//! Owns: the numbers and the layouts. Invariant: each structure has the size that the kernel asserts
//! or encodes in the command's number; none has padding.

/// Numbers of control commands, on `/dev/ublk-control`.
pub mod control {
    use super::{CtrlCmd, command};

    const fn ior(nr: u32) -> u32 {
        command(2, nr, size_of::<CtrlCmd>())
    }
    const fn iowr(nr: u32) -> u32 {
        command(3, nr, size_of::<CtrlCmd>())
    }

    pub const GET_DEV_INFO: u32 = ior(0x02);
    pub const ADD_DEV: u32 = iowr(0x04);
    pub const DEL_DEV: u32 = iowr(0x05);
    pub const START_DEV: u32 = iowr(0x06);
    pub const STOP_DEV: u32 = iowr(0x07);
    pub const SET_PARAMS: u32 = iowr(0x08);
    pub const GET_PARAMS: u32 = ior(0x09);
    pub const START_USER_RECOVERY: u32 = iowr(0x10);
    pub const END_USER_RECOVERY: u32 = iowr(0x11);
    pub const GET_FEATURES: u32 = ior(0x13);
    pub const DEL_DEV_ASYNC: u32 = ior(0x14);
}

/// Numbers of a queue's commands, on `/dev/ublkcN`.
pub mod io {
    use super::{IoCmd, command};

    pub const FETCH_REQ: u32 = command(3, 0x20, size_of::<IoCmd>());
    pub const COMMIT_AND_FETCH_REQ: u32 = command(3, 0x21, size_of::<IoCmd>());
}

/// `_IOC(direction, 'u', nr, size)` of asm-generic/ioctl.h.
const fn command(direction: u32, nr: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (b'u' as u32) << 8 | nr
}

/// Features, of the driver and of a device.
pub mod feature {
    pub const USER_RECOVERY: u64 = 1 << 3;
    pub const USER_RECOVERY_REISSUE: u64 = 1 << 4;
    pub const UNPRIVILEGED_DEV: u64 = 1 << 5;
    pub const CMD_IOCTL_ENCODE: u64 = 1 << 6;
    pub const USER_COPY: u64 = 1 << 7;
}

/// States of a device.
pub mod state {
    pub const DEAD: u16 = 0;
    pub const LIVE: u16 = 1;
    pub const QUIESCED: u16 = 2;
}

/// What a device is; part of its parameters.
pub mod attribute {
    pub const READ_ONLY: u32 = 1 << 0;
    pub const VOLATILE_CACHE: u32 = 1 << 2;
    pub const FUA: u32 = 1 << 3;
}

/// Which parameters are given.
pub mod parameter {
    pub const BASIC: u32 = 1 << 0;
    pub const DISCARD: u32 = 1 << 1;
}

/// Operations, the low eight bits of [`IoDesc::op_flags`].
pub mod op {
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const FLUSH: u8 = 2;
    pub const DISCARD: u8 = 3;
    pub const WRITE_ZEROES: u8 = 5;
}

/// A flag of [`IoDesc::op_flags`]: durable when answered.
pub const F_FUA: u32 = 1 << 13;

/// Where a request's bytes are on the character device, with user copy: tag above 25 bits of offset
/// (queue 0's bits above are zero).
pub const BUFFERS: u64 = 0x8000_0000;
/// Bits of offset within a request.
pub const BUFFER_BITS: u32 = 25;

/// No device, no queue: the answer is to choose one, or there is none to name.
pub const ANY_DEVICE: u32 = u32::MAX;
/// As above.
pub const NO_QUEUE: u16 = u16::MAX;

/// `struct ublksrv_ctrl_cmd`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct CtrlCmd {
    pub dev_id: u32,
    pub queue_id: u16,
    pub len: u16,
    pub addr: u64,
    pub data: u64,
    /// The last eight bytes name a device by its path, which is for devices of users without privilege.
    pub path: u64,
}

/// `struct ublksrv_ctrl_dev_info`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct DevInfo {
    pub nr_hw_queues: u16,
    pub queue_depth: u16,
    pub state: u16,
    pub pad0: u16,
    pub max_io_buf_bytes: u32,
    pub dev_id: u32,
    pub ublksrv_pid: i32,
    pub pad1: u32,
    pub flags: u64,
    /// The server's own; the driver keeps it.
    pub ublksrv_flags: u64,
    pub owner_uid: u32,
    pub owner_gid: u32,
    pub reserved1: u64,
    pub reserved2: u64,
}

/// `struct ublk_params`, as far as it is used.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Params {
    pub len: u32,
    pub types: u32,
    // struct ublk_param_basic
    pub attrs: u32,
    pub logical_bs_shift: u8,
    pub physical_bs_shift: u8,
    pub io_opt_shift: u8,
    pub io_min_shift: u8,
    pub max_sectors: u32,
    pub chunk_sectors: u32,
    pub dev_sectors: u64,
    pub virt_boundary_mask: u64,
    // struct ublk_param_discard
    pub discard_alignment: u32,
    pub discard_granularity: u32,
    pub max_discard_sectors: u32,
    pub max_write_zeroes_sectors: u32,
    pub max_discard_segments: u16,
    pub reserved0: u16,
    /// The begin of what follows; not looked at, because `types` does not name it.
    pub rest: u32,
}

/// `struct ublksrv_io_desc`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct IoDesc {
    pub op_flags: u32,
    pub nr_sectors: u32,
    pub start_sector: u64,
    pub addr: u64,
}

/// `struct ublksrv_io_cmd`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct IoCmd {
    pub q_id: u16,
    pub tag: u16,
    pub result: i32,
    pub addr: u64,
}

impl CtrlCmd {
    /// As it goes into a submission of 128 bytes.
    pub fn bytes(&self) -> [u8; 80] {
        let mut bytes = [0; 80];
        bytes[0..4].copy_from_slice(&self.dev_id.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.queue_id.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.len.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes[16..24].copy_from_slice(&self.data.to_ne_bytes());
        bytes
    }
}

impl IoCmd {
    /// As it goes into a submission.
    pub fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..2].copy_from_slice(&self.q_id.to_ne_bytes());
        bytes[2..4].copy_from_slice(&self.tag.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.result.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_ne_bytes());
        bytes
    }
}

const _: () = assert!(size_of::<CtrlCmd>() == 32 && size_of::<DevInfo>() == 64);
const _: () = assert!(size_of::<Params>() == 64 && size_of::<IoDesc>() == 24 && size_of::<IoCmd>() == 16);

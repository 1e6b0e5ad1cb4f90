//! The pure parts: requests, parameters, and the table of what becomes of a device.

use super::abi::{self, DevInfo, F_FUA, IoDesc, Params, attribute, feature, op, state};
use super::params::{self, DEPTH, NEEDED, PAYLOAD, Transfer};
use super::recovery::{Decision, Life, Seen, decide};
use super::request::{Fault, Rules, Wanted};
use super::*;
use crate::units::{Address, Extent};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;
const RULES: Rules = Rules { volume: 3, size: SIZE, block: 512, payload: 64 << 10 };

fn request(op: u8, flags: u32, start_sector: u64, nr_sectors: u32) -> IoDesc {
    IoDesc { op_flags: u32::from(op) | flags, nr_sectors, start_sector, addr: 0 }
}

fn volume(size: u64, block: u32) -> Volume {
    Volume {
        volume: 3,
        name: "data".into(),
        size,
        block,
        link: "epic".into(),
        read_only: false,
        lasting: true,
    }
}

#[test]
fn a_flush_is_told_whatever_its_position() {
    for (start, count) in [(0, 0), (u64::MAX, u32::MAX), (SIZE, 8)] {
        assert_eq!(RULES.judge(&request(op::FLUSH, 0, start, count)), Ok(Wanted::Flush));
    }
}

#[test]
fn requests_mean_what_the_kernel_says() {
    let extent = |start, len| Extent::new(Address::new(3, start).unwrap(), len).unwrap();
    for (request, wanted) in [
        (request(op::READ, 0, 8, 8), Wanted::Read(extent(4096, 4096))),
        (request(op::READ, F_FUA, 2047, 1), Wanted::Read(extent(SIZE - 512, 512))),
        (request(op::WRITE, 0, 0, 128), Wanted::Write(extent(0, 64 << 10), false)),
        (request(op::WRITE, F_FUA, 1, 1), Wanted::Write(extent(512, 512), true)),
        // Other flags (metadata, fail fast, swap, no unmapping) change nothing.
        (request(op::WRITE, 0xffff_df00, 1, 1), Wanted::Write(extent(512, 512), false)),
        (request(op::DISCARD, 0, 0, 2048), Wanted::Zero(extent(0, SIZE), false)),
        (request(op::WRITE_ZEROES, F_FUA, 8, 8), Wanted::Zero(extent(4096, 4096), true)),
    ] {
        assert_eq!(RULES.judge(&request), Ok(wanted));
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for op in [op::READ, op::WRITE, op::DISCARD, op::WRITE_ZEROES] {
        for (start, count) in [(2048, 1), (2047, 2), (0, 0), (u64::MAX, 1), (u64::MAX / 512, 8), (1 << 55, 8)]
        {
            assert_eq!(RULES.judge(&request(op, 0, start, count)), Err(Fault::Range), "{op} {start} {count}");
        }
    }
    // A payload that the tag's buffer would not hold.
    assert_eq!(RULES.judge(&request(op::WRITE, 0, 0, 129)), Err(Fault::Range));
    assert_eq!(RULES.judge(&request(op::READ, 0, 0, 129)), Err(Fault::Range));
    let whole_blocks = Rules { block: 4096, ..RULES };
    assert_eq!(whole_blocks.judge(&request(op::WRITE, 0, 8, 9)), Err(Fault::Range));
    assert_eq!(whole_blocks.judge(&request(op::READ, 0, 1, 8)), Err(Fault::Range));
    for op in [4, 6, 10, 18, 255] {
        assert_eq!(RULES.judge(&request(op, 0, 0, 8)), Err(Fault::Unsupported));
    }
}

proptest! {
    #[test]
    fn whatever_passes_lies_within_the_volume(desc in (any::<u32>(), any::<u32>(), any::<u64>(), 9..13u32)) {
        let (op_flags, nr_sectors, start_sector, shift) = desc;
        let rules = Rules { block: 1 << shift, ..RULES };
        for start_sector in [start_sector, start_sector % 4096] {
            for nr_sectors in [nr_sectors, nr_sectors % 256] {
                let desc = IoDesc { op_flags, nr_sectors, start_sector, addr: 0 };
                let (extent, payload) = match rules.judge(&desc) {
                    Ok(Wanted::Read(e) | Wanted::Write(e, _)) => (e, e.len()),
                    Ok(Wanted::Zero(e, _)) => (e, 0),
                    Ok(Wanted::Flush) | Err(_) => continue,
                };
                prop_assert!(extent.address().volume() == 3 && payload <= rules.payload);
                prop_assert!(extent.address().offset() + extent.len() <= SIZE);
                prop_assert!((extent.start() | extent.len()).is_multiple_of(rules.block));
            }
        }
    }
}

#[test]
fn a_device_is_what_the_node_keeps() {
    let p = params::params(&volume(1 << 40, 512));
    assert_eq!(p.attrs, attribute::VOLATILE_CACHE | attribute::FUA);
    assert_eq!((p.logical_bs_shift, p.physical_bs_shift, p.io_min_shift, p.io_opt_shift), (9, 12, 12, 12));
    assert_eq!((p.dev_sectors, p.max_sectors, p.discard_granularity), (1 << 31, 2048, 4096));
    assert_eq!((p.max_discard_segments, p.len), (1, 64));
    let p = params::params(&volume(1 << 20, 4096));
    assert_eq!((p.logical_bs_shift, p.physical_bs_shift), (12, 12));
    // That of a view: it may be read-only, and no server takes it over.
    let view = Volume { read_only: true, lasting: false, ..volume(1 << 20, 4096) };
    assert_eq!(params::params(&view).attrs, p.attrs | attribute::READ_ONLY);
    assert_eq!(params::wanted(&view) & (feature::USER_RECOVERY | feature::USER_RECOVERY_REISSUE), 0);
    assert_eq!(params::wanted(&volume(512, 512)), NEEDED);
    // The driver refuses payloads above the buffer, and records don't take more.
    assert!(PAYLOAD as usize <= crate::format::record::MAX_RAW && p.max_sectors * 512 <= PAYLOAD);
}

#[test]
fn user_copy_is_asked_for_where_it_is_offered() {
    assert_eq!(Transfer::best(NEEDED), Transfer::Buffers);
    assert_eq!(Transfer::best(NEEDED | feature::USER_COPY), Transfer::UserCopy);
    let info = |transfer| params::dev_info(7, NEEDED, transfer, 42);
    assert_eq!(info(Transfer::Buffers).flags, NEEDED);
    assert_eq!(info(Transfer::UserCopy).flags, NEEDED | feature::USER_COPY);
    let info = info(Transfer::UserCopy);
    assert_eq!((info.nr_hw_queues, info.queue_depth, info.dev_id), (1, DEPTH, abi::ANY_DEVICE));
    assert_eq!((info.ublksrv_flags, info.ublksrv_pid), (7, 42));
    assert_eq!(Transfer::of(&info), Transfer::UserCopy);
}

#[test]
fn a_mark_names_group_node_and_volume() {
    let mark = |group, node, volume| params::identity((GroupId([group; 16]), NodeId(node)), volume);
    assert_eq!(mark(1, 1, 0), mark(1, 1, 0));
    let others = [mark(2, 1, 0), mark(1, 2, 0), mark(1, 1, 1)];
    assert!(!others.contains(&mark(1, 1, 0)));
}

/// Every combination of what can be seen has one answer, and those that matter have the right one.
#[test]
fn the_table_of_left_devices() {
    use Decision::*;
    for life in [Life::Dead, Life::Live, Life::Quiesced, Life::Unknown] {
        for (able, fits) in [(false, false), (false, true), (true, false), (true, true)] {
            let right = match life {
                Life::Dead => Delete,
                Life::Live => Wait,
                Life::Quiesced if able && fits => TakeOver,
                Life::Quiesced | Life::Unknown => DeleteUnused,
            };
            assert_eq!(decide(Seen { life, able, fits }), right, "{life:?} {able} {fits}");
        }
    }
}

#[test]
fn a_device_is_judged_by_what_the_driver_says() {
    let volume = volume(1 << 30, 512);
    let params = params::params(&volume);
    let info = DevInfo { state: state::QUIESCED, ..params::dev_info(7, NEEDED, Transfer::UserCopy, 42) };
    let decision = |info: &DevInfo, params: &Params| decide(Seen::new(&volume, info, params));
    assert_eq!(decision(&info, &params), Decision::TakeOver);
    for (state, right) in
        [(state::DEAD, Decision::Delete), (state::LIVE, Decision::Wait), (9, Decision::DeleteUnused)]
    {
        assert_eq!(decision(&DevInfo { state, ..info }, &params), right);
    }
    for flags in [info.flags & !feature::USER_RECOVERY_REISSUE, info.flags | feature::UNPRIVILEGED_DEV] {
        assert_eq!(decision(&DevInfo { flags, ..info }, &params), Decision::DeleteUnused);
    }
    for other in
        [Params { dev_sectors: params.dev_sectors + 1, ..params }, Params { logical_bs_shift: 12, ..params }]
    {
        assert_eq!(decision(&info, &other), Decision::DeleteUnused);
    }
    // Limits that a later version may set otherwise are no reason to leave a device.
    assert_eq!(decision(&info, &Params { max_discard_sectors: 8, ..params }), Decision::TakeOver);
}

#[test]
fn commands_are_as_the_kernel_counts_them() {
    // _IOWR('u', 0x20, 16), _IOWR('u', 0x04, 32), _IOR('u', 0x13, 32)
    assert_eq!(abi::io::FETCH_REQ, 0xc010_7520);
    assert_eq!(abi::control::ADD_DEV, 0xc020_7504);
    assert_eq!(abi::control::GET_FEATURES, 0x8020_7513);
    let command = abi::IoCmd { q_id: 1, tag: 2, result: -5, addr: 3 };
    assert_eq!(command.bytes(), [1, 0, 2, 0, 0xfb, 0xff, 0xff, 0xff, 3, 0, 0, 0, 0, 0, 0, 0]);
}

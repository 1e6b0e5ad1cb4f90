//! The session byte for byte: negotiation, requests, errors, and any cut of any stream.
//!
//! Owns: nothing. Invariant: expected bytes are written out here, never taken from the encoder.

use super::wire::{cmd, cmd_flag, flag, opt, rep};
use super::*;
use crate::disk::{IoError, Payload};
use bytes::Bytes;
use proptest::prelude::*;
use std::sync::Arc;

const SIZE: u64 = 1 << 30;

fn exports() -> Arc<[Export]> {
    let export = |name: &str, volume, size| Export {
        name: name.into(),
        volume,
        size,
        min_block: 512,
        preferred_block: 4096,
        max_block: 32 << 20,
        read_only: false,
    };
    Arc::new([export("data", 3, SIZE), export("wal", 4, 8 << 30)])
}

/// An option as the client sends it.
fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [&b"IHAVEOPT"[..], &number.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

/// A reply to an option as the server sends it.
fn answer(number: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let magic = 0x0003_e889_0455_65a9_u64.to_be_bytes();
    [&magic[..], &number.to_be_bytes(), &reply.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data]
        .concat()
}

fn name(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat()
}

fn go(export: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = name(export);
    data.extend((infos.len() as u16).to_be_bytes());
    infos.iter().for_each(|i| data.extend(i.to_be_bytes()));
    data
}

fn context(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = name(export);
    data.extend((queries.len() as u32).to_be_bytes());
    queries.iter().for_each(|q| data.extend(name(q)));
    data
}

fn request(flags: u16, command: u16, handle: u64, offset: u64, len: u32) -> Vec<u8> {
    let magic = 0x2560_9513_u32.to_be_bytes();
    let head = [&magic[..], &flags.to_be_bytes(), &command.to_be_bytes()].concat();
    [&head[..], &handle.to_be_bytes(), &offset.to_be_bytes(), &len.to_be_bytes()].concat()
}

fn simple(error: u32, handle: u64) -> Vec<u8> {
    [&0x6744_6698_u32.to_be_bytes()[..], &error.to_be_bytes(), &handle.to_be_bytes()].concat()
}

fn chunk(kind: u16, handle: u64, payload: &[u8]) -> Vec<u8> {
    let head = [&0x668e_33ef_u32.to_be_bytes()[..], &1_u16.to_be_bytes(), &kind.to_be_bytes()].concat();
    [&head[..], &handle.to_be_bytes(), &(payload.len() as u32).to_be_bytes(), payload].concat()
}

fn error_chunk(error: u32, text: &str, handle: u64) -> Vec<u8> {
    let payload = [&error.to_be_bytes()[..], &(text.len() as u16).to_be_bytes(), text.as_bytes()].concat();
    chunk(1 << 15 | 1, handle, &payload)
}

fn sent(session: &mut Session) -> Vec<u8> {
    session.output().concat()
}

fn feed(session: &mut Session, bytes: impl Into<Bytes>) -> Vec<Request> {
    let mut requests = Vec::new();
    session.receive(bytes.into(), &mut requests).unwrap();
    requests
}

/// A session past the client's flags, its greeting taken.
fn fixed() -> Session {
    let mut session = Session::new(exports());
    assert_eq!(sent(&mut session), b"NBDMAGICIHAVEOPT\x00\x03");
    feed(&mut session, 3_u32.to_be_bytes().to_vec());
    session
}

/// A session in transmission, its answers taken.
fn ready(structured: bool) -> Session {
    let mut session = fixed();
    if structured {
        feed(&mut session, option(opt::STRUCTURED_REPLY, b""));
        feed(&mut session, option(opt::SET_META_CONTEXT, &context("", &["base:allocation"])));
    }
    feed(&mut session, option(opt::GO, &go("data", &[])));
    sent(&mut session);
    session
}

#[test]
fn export_name_enters_transmission_with_and_without_zeroes() {
    let flags = flag::HAS_FLAGS | 0b1000_0000_0000 | 0b1_0110_1100;
    for (client, zeroes) in [(1_u32, 124), (3, 0)] {
        let mut session = Session::new(exports());
        sent(&mut session);
        feed(&mut session, client.to_be_bytes().to_vec());
        feed(&mut session, option(opt::EXPORT_NAME, b"wal"));
        let expected = [&(8_u64 << 30).to_be_bytes()[..], &flags.to_be_bytes(), &vec![0; zeroes]].concat();
        assert_eq!(sent(&mut session), expected);
        let requests = feed(&mut session, request(0, cmd::READ, 1, 512, 512));
        assert_eq!(format!("{:?}", requests[0].op), "Read(4:0x200+0x200)");
    }
}

#[test]
fn go_tells_size_flags_block_sizes_and_the_name_when_asked() {
    let mut session = fixed();
    feed(&mut session, option(opt::STRUCTURED_REPLY, b""));
    assert_eq!(sent(&mut session), answer(opt::STRUCTURED_REPLY, rep::ACK, b""));
    for number in [opt::INFO, opt::GO] {
        feed(&mut session, option(number, &go("", &[3, 1])));
        let export = [&[0, 0][..], &SIZE.to_be_bytes(), &0b1001_1110_1101_u16.to_be_bytes()].concat();
        assert_eq!(u16::from_be_bytes([export[10], export[11]]) & flag::SEND_DF, flag::SEND_DF);
        let expected = [
            answer(number, rep::INFO, &export),
            answer(number, rep::INFO, b"\x00\x03\x00\x00\x02\x00\x00\x00\x10\x00\x02\x00\x00\x00"),
            answer(number, rep::INFO, b"\x00\x01data"),
            answer(number, rep::ACK, b""),
        ];
        assert_eq!(sent(&mut session), expected.concat());
    }
    assert_eq!(feed(&mut session, request(0, cmd::FLUSH, 7, 99, 1)).len(), 1);
}

#[test]
fn without_negotiation_the_first_byte_is_a_requests() {
    let mut session = Session::transmission(&exports()[0]);
    assert!(sent(&mut session).is_empty());
    let bytes = [request(0, cmd::READ, 1, 0, 512), request(1, cmd::WRITE_ZEROES, 2, 512, 512)].concat();
    let requests = feed(&mut session, bytes);
    session.complete(requests[0].cookie, Ok(vec![7; 512].into()));
    session.complete(requests[1].cookie, Ok(Bytes::new()));
    assert_eq!(sent(&mut session), [simple(0, 1), vec![7; 512], simple(0, 2)].concat());
    // Not told of, so not to be used.
    feed(&mut session, request(0, cmd::BLOCK_STATUS, 3, 0, 512));
    assert_eq!(sent(&mut session), simple(22, 3));
    assert_eq!(transmission_flags(false), 0b110_1101);
    assert_eq!(transmission_flags(true), 0b000_1111);
}

#[test]
fn list_and_abort() {
    let mut session = fixed();
    feed(&mut session, option(opt::LIST, b""));
    let expected = [
        answer(opt::LIST, rep::SERVER, b"\x00\x00\x00\x04data"),
        answer(opt::LIST, rep::SERVER, b"\x00\x00\x00\x03wal"),
        answer(opt::LIST, rep::ACK, b""),
    ];
    assert_eq!(sent(&mut session), expected.concat());
    feed(&mut session, option(opt::ABORT, b""));
    assert_eq!(sent(&mut session), answer(opt::ABORT, rep::ACK, b""));
    assert!(session.closing());
    assert!(feed(&mut session, vec![0xff; 100]).is_empty());
}

#[test]
fn options_that_are_not_done_are_refused_and_the_haggling_goes_on() {
    let mut session = fixed();
    let long = vec![0; negotiation::MAX_OPTION as usize + 1];
    let cases: &[(u32, Vec<u8>, u32, &str)] = &[
        (opt::STARTTLS, vec![], rep::ERR_POLICY, "no TLS here"),
        (4, vec![], rep::ERR_UNSUP, ""),
        (11, vec![], rep::ERR_UNSUP, ""),
        (77, vec![1, 2, 3], rep::ERR_UNSUP, ""),
        (77, long.clone(), rep::ERR_UNSUP, ""),
        (opt::GO, long, rep::ERR_TOO_BIG, "option too long"),
        (opt::LIST, vec![1], rep::ERR_INVALID, "unexpected data"),
        (opt::STRUCTURED_REPLY, vec![1], rep::ERR_INVALID, "unexpected data"),
        (opt::GO, go("nothing", &[]), rep::ERR_UNKNOWN, "no such export"),
        (opt::INFO, vec![], rep::ERR_INVALID, "malformed"),
        (opt::INFO, vec![0xff; 6], rep::ERR_INVALID, "malformed"),
        (opt::GO, [go("data", &[3]), vec![0]].concat(), rep::ERR_INVALID, "malformed"),
        (opt::SET_META_CONTEXT, context("data", &[]), rep::ERR_INVALID, "negotiate structured replies first"),
    ];
    for (number, data, reply, text) in cases {
        feed(&mut session, option(*number, data));
        assert_eq!(sent(&mut session), answer(*number, *reply, text.as_bytes()), "option {number}");
    }
    assert!(!session.closing());
}

#[test]
fn metadata_contexts_are_listed_selected_and_replaced() {
    let mut session = fixed();
    feed(&mut session, option(opt::STRUCTURED_REPLY, b""));
    sent(&mut session);
    let (list, set) = (opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT);
    let cases: &[(u32, &[&str], Option<u32>)] = &[
        (list, &[], Some(0)),
        (list, &["base:"], Some(0)),
        (list, &["qemu:dirty-bitmap:x"], None),
        (set, &[], None),
        (set, &["base:"], None),
        (set, &["x:y", "base:allocation", "base:allocation"], Some(1)),
    ];
    for (number, queries, id) in cases {
        feed(&mut session, option(*number, &context("data", queries)));
        let found = id.map(|id| {
            answer(*number, rep::META_CONTEXT, &[&id.to_be_bytes()[..], b"base:allocation"].concat())
        });
        let expected = [found.unwrap_or_default(), answer(*number, rep::ACK, b"")].concat();
        assert_eq!(sent(&mut session), expected, "{queries:?}");
    }
    let mut malformed = context("data", &["base:allocation"]);
    malformed[11] = 2; // one query fewer than announced
    feed(&mut session, option(set, &malformed));
    assert_eq!(sent(&mut session), answer(set, rep::ERR_INVALID, b"malformed"));
    feed(&mut session, option(opt::GO, &go("data", &[])));
    sent(&mut session);
    feed(&mut session, request(0, cmd::BLOCK_STATUS, 1, 0, 512));
    assert_eq!(sent(&mut session), error_chunk(22, "no metadata context was selected", 1));
}

#[test]
fn a_context_of_another_export_does_not_count() {
    let mut session = fixed();
    feed(&mut session, option(opt::STRUCTURED_REPLY, b""));
    feed(&mut session, option(opt::SET_META_CONTEXT, &context("wal", &["base:allocation"])));
    feed(&mut session, option(opt::GO, &go("data", &[])));
    sent(&mut session);
    feed(&mut session, request(0, cmd::BLOCK_STATUS, 1, 0, 512));
    assert_eq!(sent(&mut session), error_chunk(22, "no metadata context was selected", 1));
}

#[test]
fn broken_protocol_closes() {
    let cases: &[(Vec<u8>, ProtocolError)] = &[
        (vec![0, 0, 0, 7], ProtocolError::ClientFlags(7)),
        ([&[0, 0, 0, 3][..], &[b'x'; 16]].concat(), ProtocolError::OptionMagic),
        ([&[0, 0, 0, 2][..], &option(opt::LIST, b"")].concat(), ProtocolError::NotFixed(opt::LIST)),
        ([&[0, 0, 0, 3][..], &option(opt::EXPORT_NAME, b"nope")].concat(), ProtocolError::UnknownExport),
        (
            [&[0, 0, 0, 3][..], &option(opt::EXPORT_NAME, b""), &[0xab; 28]].concat(),
            ProtocolError::RequestMagic(0xabab_abab),
        ),
    ];
    for (bytes, expected) in cases {
        let mut session = Session::new(exports());
        let mut requests = Vec::new();
        assert_eq!(session.receive(bytes.clone().into(), &mut requests), Err(*expected));
        assert!(session.closing());
        assert_eq!(session.receive(bytes.clone().into(), &mut requests), Err(*expected));
    }
}

#[test]
fn options_without_end_and_without_reading_are_cut_off() {
    let mut session = fixed();
    let flood: Bytes = option(opt::LIST, b"").repeat(1000).into();
    let error = (0..1000).find_map(|_| session.receive(flood.clone(), &mut Vec::new()).err());
    assert_eq!(error, Some(ProtocolError::OptionFlood));
    assert!(session.outstanding() < 5 << 20);
}

#[test]
fn a_payload_that_arrives_whole_is_not_copied() {
    let mut session = ready(false);
    let bytes = Bytes::from([request(cmd_flag::FUA, cmd::WRITE, 5, 4096, 4096), vec![7; 4096]].concat());
    let requests = feed(&mut session, bytes.clone());
    let Op::Write { extent, data: Payload::Here(data), fua } = &requests[0].op else { panic!() };
    assert_eq!((extent.address().volume(), extent.address().offset(), *fua), (3, 4096, true));
    assert_eq!(data.as_ptr(), bytes[28..].as_ptr());
    session.complete(requests[0].cookie, Ok(Bytes::new()));
    assert_eq!(sent(&mut session), simple(0, 5));
    assert_eq!(session.outstanding(), 0);
}

#[test]
fn needed_tells_how_much_of_a_payload_is_missing() {
    let mut session = ready(false);
    assert!(feed(&mut session, request(0, cmd::WRITE, 5, 0, 8192)).is_empty());
    assert_eq!(session.needed(), 8192);
    assert!(feed(&mut session, vec![1; 100]).is_empty());
    assert_eq!(session.needed(), 8092);
    assert_eq!(feed(&mut session, vec![2; 8092]).len(), 1);
    assert_eq!(session.needed(), 0);
    assert!(session.outstanding() >= 8192);
}

#[test]
fn reads_are_answered_in_the_form_that_was_negotiated() {
    let data = Bytes::from(vec![9; 4096]);
    let mut session = ready(false);
    let requests = feed(&mut session, request(0, cmd::READ, 1, 8192, 4096));
    session.complete(requests[0].cookie, Ok(data.clone()));
    let out = session.output();
    assert_eq!(out.concat(), [&simple(0, 1)[..], &data].concat());
    assert_eq!(out[1].as_ptr(), data.as_ptr());

    let mut session = ready(true);
    for flags in [0, cmd_flag::DF | cmd_flag::FUA] {
        let requests = feed(&mut session, request(flags, cmd::READ, 2, 8192, 4096));
        session.complete(requests[0].cookie, Ok(data.clone()));
        let payload = [&8192_u64.to_be_bytes()[..], &data].concat();
        assert_eq!(sent(&mut session), chunk(1, 2, &payload));
    }
    let requests = feed(&mut session, request(0, cmd::READ, 3, 0, 4096));
    session.complete(requests[0].cookie, Ok(data.slice(..512)));
    assert_eq!(sent(&mut session), error_chunk(5, "", 3));
}

#[test]
fn answers_may_come_in_any_order_and_only_once() {
    let mut session = ready(true);
    let bytes: Vec<u8> = (0..5).flat_map(|h| request(0, cmd::READ, h, h * 512, 512)).collect();
    let requests = feed(&mut session, bytes);
    let mut expected = Vec::new();
    for i in [3, 0, 4, 1, 2] {
        session.complete(requests[i].cookie, Ok(vec![i as u8; 512].into()));
        let payload = [&(i as u64 * 512).to_be_bytes()[..], &[i as u8; 512]].concat();
        expected.extend(chunk(1, i as u64, &payload));
    }
    session.complete(requests[0].cookie, Ok(Bytes::new()));
    session.complete(u64::MAX, Ok(Bytes::new()));
    assert_eq!(sent(&mut session), expected);
}

#[test]
fn requests_that_cannot_be_done_are_answered_with_the_reason() {
    const LONG: u32 = (32 << 20) + 512;
    let cases: &[(u16, u16, u64, u32, u32)] = &[
        (0, cmd::READ, SIZE, 512, 22),
        (0, cmd::READ, SIZE - 512, 1024, 22),
        (0, cmd::READ, u64::MAX - 511, 1024, 22),
        (0, cmd::READ, 1, 512, 22),
        (0, cmd::READ, 512, 511, 22),
        (0, cmd::READ, 0, LONG, 22),
        (cmd_flag::DF, cmd::READ, 0, LONG, 75),
        (cmd_flag::NO_HOLE, cmd::READ, 0, 512, 22),
        (1 << 5, cmd::READ, 0, 512, 22),
        (0, cmd::WRITE, SIZE, 512, 28),
        (0, cmd::WRITE, 1, 512, 22),
        (0, cmd::WRITE, 0, LONG, 22),
        (cmd_flag::DF, cmd::WRITE, 0, 512, 22),
        (0, cmd::TRIM, SIZE, 512, 22),
        (0, cmd::TRIM, 0, 100, 22),
        (0, cmd::WRITE_ZEROES, SIZE, 512, 28),
        (cmd_flag::REQ_ONE, cmd::WRITE_ZEROES, 0, 512, 22),
        (0, cmd::BLOCK_STATUS, SIZE, 512, 22),
        (0, cmd::BLOCK_STATUS, 0, 0, 22),
        (0, 5, 0, 512, 22),
        (0, 99, 0, 512, 22),
    ];
    for structured in [false, true] {
        for &(flags, command, offset, len, error) in cases {
            // Without structured replies DF is not offered at all.
            let error = if !structured && flags == cmd_flag::DF { 22 } else { error };
            let mut session = ready(structured);
            assert!(feed(&mut session, request(flags, command, 42, offset, len)).is_empty());
            let mut left = if command == cmd::WRITE { len as usize } else { 0 };
            let piece = Bytes::from(vec![0; 1 << 20]);
            while left > 0 {
                assert_eq!((sent(&mut session).len(), session.held()), (0, 0));
                let part = left.min(piece.len());
                assert!(feed(&mut session, piece.slice(..part)).is_empty());
                left -= part;
            }
            let out = sent(&mut session);
            if structured {
                assert_eq!(out[..20], chunk(1 << 15 | 1, 42, &vec![0; out.len() - 20])[..20]);
                assert_eq!(out[20..24], error.to_be_bytes(), "{flags} {command} {offset} {len}");
            } else {
                assert_eq!(out, simple(error, 42), "{flags} {command} {offset} {len}");
            }
            assert_eq!(feed(&mut session, request(0, cmd::FLUSH, 43, 0, 0)).len(), 1);
        }
    }
}

#[test]
fn zeroes_and_trims_of_any_length_are_one_request() {
    let mut session = fixed();
    feed(&mut session, option(opt::GO, &go("wal", &[])));
    sent(&mut session);
    let len = u32::MAX - 511;
    for (flags, command) in [(cmd_flag::FUA, cmd::TRIM), (0b1_0011, cmd::WRITE_ZEROES)] {
        let requests = feed(&mut session, request(flags, command, 1, 512, len));
        assert_eq!(format!("{:?}", requests[0].op), "Zero { extent: 4:0x200+0xfffffe00, fua: true }");
        session.complete(requests[0].cookie, Ok(Bytes::new()));
        assert_eq!(sent(&mut session), simple(0, 1));
    }
}

#[test]
fn empty_requests_succeed_and_do_nothing() {
    for structured in [false, true] {
        let mut session = ready(structured);
        for command in [cmd::READ, cmd::WRITE, cmd::TRIM, cmd::WRITE_ZEROES] {
            assert!(feed(&mut session, request(0, command, 8, SIZE, 0)).is_empty());
            let chunked = structured && command == cmd::READ;
            assert_eq!(sent(&mut session), if chunked { chunk(0, 8, b"") } else { simple(0, 8) });
        }
    }
}

#[test]
fn block_status_is_one_allocated_extent() {
    let mut session = ready(true);
    for flags in [0, cmd_flag::REQ_ONE] {
        assert!(feed(&mut session, request(flags, cmd::BLOCK_STATUS, 6, 512, 1 << 20)).is_empty());
        assert_eq!(sent(&mut session), chunk(5, 6, b"\x00\x00\x00\x01\x00\x10\x00\x00\x00\x00\x00\x00"));
    }
}

#[test]
fn errors_are_told_in_the_protocols_numbers() {
    let numbers = [(1, 1), (13, 1), (30, 1), (5, 5), (0, 5), (9, 5), (-1, 5), (12, 12), (22, 22), (28, 28)];
    for (errno, error) in numbers.into_iter().chain([(122, 28), (27, 28), (75, 75), (95, 95), (108, 108)]) {
        let mut session = ready(false);
        let requests = feed(&mut session, request(0, cmd::READ, 1, 0, 512));
        session.complete(requests[0].cookie, Err(IoError { errno }));
        assert_eq!(sent(&mut session), simple(error, 1));
    }
}

#[test]
fn a_disconnect_waits_for_requests_in_flight_and_hears_nothing_more() {
    let mut session = ready(false);
    let bytes =
        [request(0, cmd::FLUSH, 1, 0, 0), request(0, cmd::DISC, 2, 0, 0), request(0, cmd::FLUSH, 3, 0, 0)];
    let requests = feed(&mut session, bytes.concat());
    assert_eq!((requests.len(), session.in_flight(), session.closing()), (1, 1, false));
    session.complete(requests[0].cookie, Ok(Bytes::new()));
    assert!(session.closing());
    assert_eq!(sent(&mut session), simple(0, 1));
}

#[test]
fn the_remainder_of_a_block_is_not_offered() {
    let mut export = exports()[0].clone();
    (export.size, export.min_block, export.max_block) = (10_000, 4096, u32::MAX);
    let mut session = Session::new(Arc::new([export]));
    let bytes =
        [&[0, 0, 0, 3][..], &option(opt::EXPORT_NAME, b""), &request(0, cmd::READ, 1, 512, 512)].concat();
    assert!(feed(&mut session, bytes).is_empty());
    let out = sent(&mut session);
    assert_eq!(out[18..26], 8192_u64.to_be_bytes());
    assert_eq!(out[28..], simple(22, 1));
}

/// One thing that a client may send before it has chosen an export.
fn option_piece() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        2 => (0..13_u32, proptest::collection::vec(any::<u8>(), 0..40)).prop_map(|(n, d)| option(n, &d)),
        2 => Just(option(opt::STRUCTURED_REPLY, b"")),
        2 => Just(option(opt::SET_META_CONTEXT, &context("", &["base:allocation"]))),
        1 => Just(option(99, &vec![0; negotiation::MAX_OPTION as usize + 5])),
        1 => Just(option(opt::INFO, &go("wal", &[1, 3]))),
    ]
}

/// One request, mostly a good one.
fn request_piece() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![3 => Just(0), 1 => 0..0x20_u16];
    let command = prop_oneof![6 => 0..2_u16, 6 => 3..9_u16, 1 => Just(cmd::DISC)];
    let len = prop_oneof![9 => (0..20_u32).prop_map(|n| n * 512), 1 => 0..5000_u32];
    let offset = (0..(SIZE / 512) + 10).prop_map(|n| n * 512);
    (flags, command, any::<u64>(), offset, len).prop_map(|(flags, command, handle, offset, len)| {
        let payload = if command == cmd::WRITE { len as usize } else { 0 };
        [request(flags, command, handle, offset, len), vec![handle as u8; payload]].concat()
    })
}

/// What a client sends, now and then with bytes in it that it should not have sent.
fn stream() -> impl Strategy<Value = Vec<u8>> {
    let options = proptest::collection::vec(option_piece(), 0..5).prop_map(|p| p.concat());
    let requests = proptest::collection::vec(request_piece(), 0..12).prop_map(|p| p.concat());
    let noise = prop_oneof![5 => Just(vec![]), 1 => proptest::collection::vec(any::<u8>(), 0..40)];
    (options, requests, noise, any::<prop::sample::Index>()).prop_map(|(options, requests, noise, at)| {
        let mut all = [&[0, 0, 0, 3][..], &options, &option(opt::GO, &go("data", &[])), &requests].concat();
        let at = at.index(all.len() + 1);
        all.splice(at..at, noise);
        all
    })
}

/// Runs a stream cut at `cuts`; completes everything at the end. Returns all that can be observed.
fn run(bytes: &[u8], cuts: &[usize]) -> (String, Vec<u8>, Option<ProtocolError>, bool) {
    let mut session = Session::new(exports());
    let (mut requests, mut failed, mut at) = (Vec::new(), None, 0);
    for cut in cuts.iter().copied().chain([bytes.len()]) {
        let part = Bytes::copy_from_slice(&bytes[at..cut]);
        at = cut;
        if let Err(error) = session.receive(part, &mut requests) {
            failed = Some(error);
        }
        assert!(session.held() <= MAX_REQUEST as usize);
    }
    for r in &requests {
        let data = if let Op::Read(extent) = r.op { vec![5; extent.len() as usize] } else { vec![] };
        session.complete(r.cookie, Ok(data.into()));
    }
    assert_eq!(session.in_flight(), 0);
    (format!("{requests:?}"), sent(&mut session), failed, session.closing())
}

proptest! {
    #[test]
    fn every_cut_of_a_stream_has_the_same_outcome(
        bytes in stream(),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
        cuts.sort_unstable();
        let whole = run(&bytes, &[]);
        prop_assert_eq!(&run(&bytes, &cuts), &whole);
        let single: Vec<usize> = (0..bytes.len().min(2000)).collect();
        prop_assert_eq!(&run(&bytes, &single), &whole);
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..400), at in 0..6_usize) {
        let prefixes: [Vec<u8>; 6] = [
            vec![],
            vec![0, 0, 0, 3],
            [&[0, 0, 0, 3][..], b"IHAVEOPT"].concat(),
            [&[0, 0, 0, 3][..], b"IHAVEOPT\x00\x00\x00"].concat(),
            [&[0, 0, 0, 3][..], &option(opt::GO, &go("", &[]))].concat(),
            [&[0, 0, 0, 3][..], &option(opt::GO, &go("", &[])), &0x2560_9513_u32.to_be_bytes()].concat(),
        ];
        run(&[&prefixes[at][..], &bytes].concat(), &[]);
    }
}

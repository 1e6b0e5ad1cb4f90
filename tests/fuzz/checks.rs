//! Whatever bytes come from outside, into whatever reads them: one check for each reader.
//!
//! The property tests (`tests/format/outside.rs`) call these with arbitrary and altered bytes, libFuzzer
//! (`tools/fuzz`) with what it finds by coverage. Each is tried as it is, and with its checksums put right.
//!
//! Owns: the list of what reads bytes from outside. Invariants: no panic; no allocation beyond the stated limit; what
//! is accepted comes back when it is written.

use crate::alloc::counted;
use crate::reseal::*;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use std::sync::Arc;
use volrep::apply::stage::{Stage, stage_len};
use volrep::cache::ring::{Ring, RingId, RingState, ring_len};
use volrep::cli::config;
use volrep::cli::invitation::Invitation;
use volrep::control;
use volrep::disk::{IoError, Payload};
use volrep::format::compare::{Compare, EXTENT, WINDOW};
use volrep::format::fields::{Reader, Writer};
use volrep::format::mapped::Owner;
use volrep::format::message::{FRAME, FrameHeader, MAX_BODY};
use volrep::format::record::{Header, MAX_RAW, Record};
use volrep::format::salvage::{Head, MAX_HEAD, Trailer};
use volrep::format::segment::SegmentHeader;
use volrep::format::superblock::{MapRange, SLOT, Superblock};
use volrep::front::nbd::{Export, Session};
use volrep::journal::maps::{Maps, joined, maps_len};
use volrep::node::event::Op;
use volrep::node::history::{Standing, parse};
use volrep::resync::hash::HashKey;
use volrep::resync::index::{Index, index_len};
use volrep::resync::source::{Source, Task};
use volrep::resync::target::Target;
use volrep::units::{Address, Extent, GroupId, HistoryPoint, Lsn, NodeId, Term};

/// Takes any bytes, and panics when something is wrong.
pub type Check = fn(&[u8]);

/// What reads bytes from outside, by name.
pub const TARGETS: &[(&str, Check)] = &[
    ("superblock", superblock),
    ("segment", segment),
    ("record", record),
    ("message", message),
    ("salvage", salvage),
    ("config", configuration),
    ("control", control_socket),
    ("token", token),
    ("nbd", nbd),
    ("nbd_transmission", nbd_transmission),
    ("ring", ring),
    ("maps", maps),
    ("index", index),
    ("stage", stage),
    ("history", history),
    ("compare_source", compare_source),
    ("compare_target", compare_target),
];

/// As it is, and after `seal`.
fn both(data: &[u8], seal: impl Fn(&mut Vec<u8>), check: impl Fn(Vec<u8>)) {
    check(data.to_vec());
    let mut sealed = data.to_vec();
    seal(&mut sealed);
    check(sealed);
}

pub fn check_superblock(slot: &[u8]) {
    let (decoded, allocated) = counted(|| Superblock::decode(slot));
    assert!(allocated < 2 * SLOT, "{allocated} bytes");
    if let Ok(s) = decoded {
        let encoded = s.encode();
        let used = 46 + u32::from_le_bytes(encoded[10..14].try_into().expect("four")) as usize;
        assert_eq!(encoded[..used], slot[..used]);
    }
}

fn superblock(data: &[u8]) {
    let check = |slot: Vec<u8>| check_superblock(&slot);
    let seal = |slot: &mut Vec<u8>| {
        slot.resize(slot.len().max(64), 0);
        let body = slot.len() as u32 - 46;
        slot[..8].copy_from_slice(b"VSUPERBK");
        slot[8..10].copy_from_slice(&volrep::format::superblock::VERSION.to_le_bytes());
        slot[10..14].copy_from_slice(&body.to_le_bytes());
        reseal_superblock(slot);
    };
    both(data, seal, check);
    // Its own length, and the rest padding.
    let mut padded = data.to_vec();
    reseal_superblock(&mut padded);
    check(padded);
}

pub fn check_segment(block: &[u8]) {
    let (decoded, allocated) = counted(|| SegmentHeader::decode(block));
    assert_eq!(allocated, 0);
    if let Ok(s) = decoded {
        assert_eq!(s.encode()[..], block[..4096]);
    }
}

fn segment(data: &[u8]) {
    let check = |block: Vec<u8>| check_segment(&block);
    let seal = |block: &mut Vec<u8>| {
        block.resize(4096, 0);
        block[..8].copy_from_slice(b"VSEGMENT");
        block[8..10].copy_from_slice(&1u16.to_le_bytes());
        reseal_segment(block);
    };
    both(data, seal, check);
}

pub fn check_record(bytes: Vec<u8>) {
    let bytes = Bytes::from(bytes);
    let (header, allocated) = counted(|| Header::decode(&bytes));
    assert_eq!(allocated, 0);
    // The first clone of `Bytes` that owns a vector allocates a counter.
    let (decoded, allocated) = counted(|| Record::decode(bytes.clone()));
    assert!(allocated < 1024, "{allocated} bytes");
    let Ok(r) = decoded else { return };
    assert_eq!(header.map(|h| h.len), Ok(r.wire().len()));
    assert_eq!(r.wire(), bytes.slice(..r.wire().len()));
    assert_eq!(r.journal_bytes()[..r.wire().len()], r.wire());
    let (payload, allocated) = counted(|| r.payload());
    assert!(allocated < MAX_RAW + (64 << 10), "{allocated} bytes");
    assert!(payload.is_err() || payload.is_ok_and(|p| p.len() == r.raw as usize));
    let (_, allocated) = counted(|| (r.members(), r.mark()));
    assert!(allocated < 3 * MAX_RAW, "{allocated} bytes");
}

fn record(data: &[u8]) {
    let seal = |b: &mut Vec<u8>| {
        b.resize(b.len().max(208), 0);
        b[..4].copy_from_slice(b"VREC");
        b[4..6].copy_from_slice(&1u16.to_le_bytes());
        b[6] %= 3;
        b[7] %= 2;
        b[92..96].fill(0);
        // As much payload as there is behind the table.
        let extents = u32::from(b[80] % 4);
        let stored = (b.len() as u32 - 192).saturating_sub(16 * extents);
        b[80..84].copy_from_slice(&extents.to_le_bytes());
        b[84..88].copy_from_slice(&stored.to_le_bytes());
        if b[7] == 0 {
            b[88..92].copy_from_slice(&stored.to_le_bytes());
        }
        reseal_record(b);
    };
    both(data, seal, check_record);
    let mut sealed = data.to_vec();
    reseal_record(&mut sealed);
    check_record(sealed);
}

fn check_frame(bytes: Vec<u8>) {
    let Some((head, body)) = bytes.split_first_chunk::<FRAME>() else { return };
    let (header, allocated) = counted(|| FrameHeader::decode(head));
    assert_eq!(allocated, 0);
    let Ok(header) = header else { return };
    assert!(header.len <= MAX_BODY);
    let body = Bytes::copy_from_slice(body);
    let (message, allocated) = counted(|| header.body(body.clone()));
    // A list of leaves is larger in memory than on the link, but never by much.
    assert!(allocated < 4 * body.len() + (64 << 10), "{allocated} bytes of {}", body.len());
    let Ok(message) = message else { return };
    let again = message.encode();
    let again = [&again.head[..], &again.record[..]].concat();
    assert_eq!(again, bytes, "{message:?}");
}

fn message(data: &[u8]) {
    let seal = |b: &mut Vec<u8>| {
        b.resize(b.len().max(FRAME), 0);
        b[5] = volrep::format::message::VERSION;
        (b[6], b[7]) = (0, 0);
        reseal_frame(b, true);
    };
    both(data, seal, check_frame);
}

fn salvage(data: &[u8]) {
    let check = |file: Vec<u8>| {
        let (decoded, allocated) = counted(|| Head::decode(&file));
        assert!(allocated < 2 * MAX_HEAD, "{allocated} bytes");
        if let Ok((head, used)) = decoded {
            assert_eq!(head.encode(), file[..used]);
        }
        if let Ok(trailer) = Trailer::decode(&file) {
            assert_eq!(trailer.encode(), file[..56]);
        }
    };
    let seal = |file: &mut Vec<u8>| {
        file.resize(file.len().max(64), 0);
        let body = file.len() as u32 - 46;
        file[..8].copy_from_slice(b"VSALVAGE");
        file[8..10].copy_from_slice(&1u16.to_le_bytes());
        file[10..14].copy_from_slice(&body.to_le_bytes());
        reseal_salvage(file);
    };
    both(data, seal, check);
}

fn configuration(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (parsed, allocated) = counted(|| config::parse(&text));
    assert!(allocated < 2048 * text.len() + (64 << 10), "{allocated} bytes of {}", text.len());
    match parsed {
        Ok(config) => {
            let written = config::render("group", &config);
            assert_eq!(config::parse(&written).as_ref(), Ok(&config), "{written}");
        }
        Err((what, next)) => assert!(!what.is_empty() && !next.is_empty()),
    }
}

fn control_socket(data: &[u8]) {
    let (parsed, allocated) = counted(|| control::parse_request(data));
    assert!(allocated < 64 * data.len() + (64 << 10), "{allocated} bytes of {}", data.len());
    if let Ok(verb) = parsed {
        let request = control::Request { version: control::VERSION, verb: verb.clone() };
        let line = serde_json::to_vec(&request).expect("a request is JSON");
        assert_eq!(control::parse_request(&line), Ok(verb));
    }
    // And what a daemon of another version might answer.
    let (reply, allocated) = counted(|| serde_json::from_slice::<control::Reply>(data));
    assert!(allocated < 256 * data.len() + (64 << 10), "{allocated} bytes of {}", data.len());
    drop(reply);
}

fn token(data: &[u8]) {
    let check = |text: &str| {
        let (decoded, allocated) = counted(|| Invitation::decode(text));
        assert!(allocated < 16 * text.len() + (64 << 10), "{allocated} bytes of {}", text.len());
        if let Ok(invitation) = decoded {
            assert_eq!(Invitation::decode(&invitation.encode()).ok(), Some(invitation));
        }
    };
    check(&String::from_utf8_lossy(data));
    let mut sealed = [b"VTOK\x01", data].concat();
    let sum = *blake3::hash(&sealed).as_bytes();
    sealed.extend_from_slice(&sum[..16]);
    check(&URL_SAFE_NO_PAD.encode(&sealed));
    check(&URL_SAFE_NO_PAD.encode(data));
}

fn export(size: u64, read_only: bool) -> Export {
    let name = if read_only { "frozen" } else { "data" }.to_owned();
    Export { name, volume: 0, size, min_block: 512, preferred_block: 4096, max_block: 32 << 20, read_only }
}

/// A client's bytes, cut where the first byte says; each request is answered, some with an error.
fn serve(mut session: Session, size: u64, data: &[u8]) {
    let Some((cut, rest)) = data.split_first() else { return };
    let (mut requests, mut sent) = (Vec::new(), 0);
    for part in rest.chunks(usize::from(*cut).max(1)) {
        let (received, allocated) = counted(|| session.receive(Bytes::copy_from_slice(part), &mut requests));
        // A payload is gathered in one buffer of the size that its request says, once that was allowed.
        assert!(allocated < (33 << 20) + 64 * part.len(), "{allocated} bytes of {}", part.len());
        for request in requests.drain(..) {
            let extent = match &request.op {
                Op::Read(extent) => Some(*extent),
                Op::Write { extent, data, .. } => {
                    assert_eq!(data.len(), extent.len());
                    Some(*extent)
                }
                Op::Zero { extent, .. } => Some(*extent),
                Op::Flush => None,
            };
            assert!(extent.is_none_or(|e| e.address().offset() + e.len() <= size), "{extent:?} of {size}");
            let result = match request.op {
                Op::Read(e) if request.cookie % 3 < 2 => {
                    Ok(Bytes::from(vec![0; e.len().min(1 << 20) as usize]))
                }
                _ if request.cookie % 3 == 2 => Err(IoError::EIO),
                _ => Ok(Bytes::new()),
            };
            session.complete(request.cookie, result);
        }
        sent += session.output().iter().map(Bytes::len).sum::<usize>();
        if received.is_err() {
            assert!(session.closing());
            return;
        }
    }
    assert!(sent < (40 << 20) * (1 + rest.len() / 28) + (64 << 10) * (1 + rest.len()));
}

fn nbd(data: &[u8]) {
    let exports: Arc<[Export]> = [export(1 << 20, false), export(1 << 30, true)].into();
    serve(Session::new(exports), 1 << 30, data);
}

fn nbd_transmission(data: &[u8]) {
    let export = export((1 << 20) + 512, false);
    serve(Session::transmission(&export), export.size, data);
    // Requests whose magic is right.
    let mut sealed = data.to_vec();
    if let Some(rest) = sealed.get_mut(1..) {
        for header in rest.chunks_exact_mut(28) {
            header[..4].copy_from_slice(&0x2560_9513u32.to_be_bytes());
            header[6] = 0;
            header[16..21].fill(0);
            header[24] = 0;
        }
    }
    serve(Session::transmission(&export), export.size, &sealed);
}

const GROUP: GroupId = GroupId([3; 16]);
const VOLUMES: [(u8, u64); 2] = [(0, (1 << 20) + 512), (3, 200 << 10)];

fn owner(number: u64) -> Owner {
    Owner { group: GROUP, node: NodeId(4), number }
}

fn extent(volume: u8, at: u64, len: u64) -> Extent {
    Extent::new(Address::new(volume, at).expect("a small volume"), len).expect("whole sectors")
}

/// A mapped file of this length that begins with `data`, behind a head that is put right.
fn mapped(data: &[u8], len: u64, magic: &[u8; 8]) -> [Vec<u8>; 2] {
    let mut file = data.to_vec();
    file.resize(len as usize, 0);
    let raw = file.clone();
    let head = volrep::format::mapped::HEAD as usize;
    file[..head].fill(0);
    let body = data.len().min(file.len() - head);
    file[head..head + body].copy_from_slice(&data[..body]);
    owner(1).claim(magic, &mut file);
    [raw, file]
}

fn ring(data: &[u8]) {
    let len = ring_len(64 << 10) as usize;
    let id = RingId { group: GROUP, boot: [7; 16], term: Term { counter: 2, node: NodeId(4) } };
    let mut raw = data.to_vec();
    raw.resize(len, 0);
    // A head that is right, and the bytes as the words behind it.
    let formatted = Ring::format(Box::new(vec![0u8; len]), id, 0).into_memory();
    let mut sealed = formatted.bytes().to_vec();
    let freed = data.first().copied().unwrap_or_default();
    sealed[72] = freed;
    let body = data.get(1..).unwrap_or_default();
    let body = &body[..body.len().min(len - 4096)];
    sealed[4096..4096 + body.len()].copy_from_slice(body);
    for memory in [raw, sealed] {
        let (state, allocated) = counted(|| Ring::open(Box::new(memory), id, 0));
        assert!(allocated < 1024, "{allocated} bytes");
        let RingState::Ours(mut ring) = state else { continue };
        let entries = ring.entries();
        for e in &entries {
            if let Some(at) = e.at {
                assert_eq!(ring.data(at, e.extent.len()).len() as u64, e.extent.len());
            }
        }
        let payload = Payload::from(Bytes::from(vec![1; 512]));
        if ring.has_room(512) {
            assert!(ring.push(extent(0, 0, 512), Some(&payload)).is_ok());
        }
        ring.free(ring.freed_seq() + 1);
        ring.free(ring.last_seq());
        assert!(ring.has_room(512));
    }
}

fn maps(data: &[u8]) {
    let point = |lsn: u8| HistoryPoint { lsn: Lsn(lsn.into()), ..HistoryPoint::default() };
    let ranges: Vec<_> = data
        .iter()
        .take(usize::from(data.len() > 4) * 3)
        .enumerate()
        .map(|(i, b)| MapRange { slot: (b % 9) ^ i as u8, from: point(*b) })
        .collect();
    for memory in mapped(data, maps_len(&VOLUMES), b"VMAPFILE") {
        let owners = (owner(1), owner(2));
        let opened = Maps::new(Box::new(memory), &VOLUMES, ranges.clone(), point(9), owners);
        let Ok(mut maps) = opened else { continue };
        maps.mark(extent(0, 512, 1024));
        maps.rotate(point(200));
        maps.rewind(Lsn(100));
        let (since, allocated) = counted(|| maps.since(Lsn(0)));
        assert!(allocated < 64 << 10, "{allocated} bytes");
        let sizes = |e: &Extent| {
            VOLUMES
                .iter()
                .any(|(n, size)| e.address().volume() == *n && e.address().offset() + e.len() <= *size)
        };
        assert!(since.iter().all(sizes), "{since:?}");
        assert!(since.iter().any(|e| e.start() <= 512 && 1536 <= e.end()), "what was marked is kept");
        assert!(joined(since, 2).iter().all(sizes));
    }
    assert!(
        Maps::new(Box::new(data.to_vec()), &VOLUMES, vec![], point(9), (owner(1), owner(2))).is_err()
            || data.len() as u64 >= maps_len(&VOLUMES)
    );
}

fn index(data: &[u8]) {
    for memory in mapped(data, index_len(&VOLUMES), b"VHASHIDX") {
        let Ok(mut index) = Index::new(Box::new(memory), &VOLUMES, owner(1)) else { continue };
        let whole = extent(0, 0, VOLUMES[0].1);
        let (roots, allocated) = counted(|| index.roots(whole));
        assert!(allocated < 64 << 10, "{allocated} bytes");
        assert_eq!(roots.len() as u64, whole.len().div_ceil(EXTENT));
        let known = index.known();
        index.forget(extent(0, 512, 512));
        assert!(index.known() <= known);
        assert_eq!(index.root(Address(0)), None);
        index.forget_from(0);
        let _ = (index.sync(), index.has_pending());
        index.synced();
    }
}

fn stage(data: &[u8]) {
    for memory in mapped(data, stage_len(&VOLUMES), b"VSTAGING") {
        let Some(mut stage) = Stage::new(Box::new(memory), &VOLUMES, owner(1), false) else { continue };
        let whole = extent(3, 0, VOLUMES[1].1);
        let parts = stage.parts(whole);
        assert_eq!(parts.iter().map(|(e, _)| e.len()).sum::<u64>(), whole.len());
        let mut at = 0;
        while let Some(next) = stage.next(at, 64 << 10) {
            assert!(next.start() >= at);
            at = next.start() + next.len();
        }
        stage.mark(extent(3, 512, 512));
        assert!(stage.parts(extent(3, 512, 512))[0].1);
    }
}

fn history(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (events, allocated) = counted(|| parse(&text));
    assert!(allocated < 256 * text.len() + (64 << 10), "{allocated} bytes of {}", text.len());
    let standing = Standing::after(&events);
    for (n, event) in events.iter().enumerate() {
        let _ = (standing.is_true(n), event.what.text());
        let line = serde_json::to_string(event).expect("an event is JSON");
        assert_eq!(parse(&line), std::slice::from_ref(event));
    }
}

/// The words of a comparison in the bytes: each behind its length.
fn words(data: &[u8]) -> Vec<Compare> {
    let (mut words, mut r) = (Vec::new(), Reader(data));
    while let Ok(len) = r.u8() {
        let Ok(body) = r.take(usize::from(len).min(r.0.len())) else { break };
        // The number of a window is of the few that are open.
        let mut body = body.to_vec();
        if let Some(n) = body.get_mut(1..5) {
            n.copy_from_slice(&[n[0] % 4, 0, 0, 0]);
        }
        let mut own = Reader(&body);
        let (word, allocated) = counted(|| Compare::read(&mut own));
        assert!(allocated < 32 * body.len() + 1024, "{allocated} bytes of {}", body.len());
        if let Ok(word) = word {
            let mut w = Writer::default();
            word.write(&mut w);
            assert_eq!(w.0, body[..body.len() - own.0.len()]);
            words.push(word);
        }
    }
    words
}

fn compare_source(data: &[u8]) {
    let mut source = Source::new(HashKey::of(GROUP));
    let volume = extent(0, 0, 256 << 10);
    let mut work: Vec<Task> = Vec::new();
    for word in words(data) {
        let heard = match &word {
            // The node has looked at the place before.
            Compare::Open { window, extent, wanted, quick } if extent.len() <= WINDOW => {
                let at = self::extent(0, 0, extent.len().min(volume.len()));
                let roots = vec![[0; 16]; at.len().div_ceil(EXTENT) as usize];
                source.open(
                    *window,
                    at,
                    wanted,
                    *quick,
                    Lsn(5),
                    [volume].into_iter().take(1),
                    roots,
                    &mut work,
                )
            }
            _ => source.heard(&word, &mut work),
        };
        if heard.is_err() {
            return; // the link is dropped
        }
        answer(&mut work, |task, out| match task {
            Task::Read(id, purpose, e) => {
                source.read(id, purpose, Bytes::from(vec![7; e.len() as usize]), out)
            }
            Task::Work(id, purpose, job) => source.worked(id, purpose, job.run(), out),
            Task::Say(_) | Task::Learn(..) | Task::Cover(_) => {}
        });
    }
}

fn compare_target(data: &[u8]) {
    let mut target = Target::new(HashKey::of(GROUP), data.first().is_some_and(|b| b % 2 == 0), 0);
    let mut work: Vec<Task> = Vec::new();
    for window in 0..4 {
        target.open(window, extent(0, u64::from(window) * EXTENT, EXTENT), Vec::new(), false, &mut work);
    }
    for (i, word) in words(data).into_iter().enumerate() {
        if target.heard(word, &mut work).is_err() {
            return; // the link is dropped
        }
        target.touch(Lsn(i as u64 % 9), extent(0, (i as u64 % 64) * 4096, 512));
        let mut refused = false;
        let indexed = |e: Extent| vec![[0; 16]; e.len().div_ceil(EXTENT) as usize];
        target.applied(Lsn(i as u64), indexed, &mut work);
        answer(&mut work, |task, out| {
            refused |= match task {
                Task::Read(id, purpose, e) => {
                    target.read(id, purpose, Bytes::from(vec![7; e.len() as usize]), out).is_err()
                }
                Task::Work(id, purpose, job) => target.worked(id, purpose, job.run(), out).is_err(),
                Task::Say(_) | Task::Learn(..) | Task::Cover(_) => false,
            }
        });
        if refused {
            return;
        }
        for (e, bytes) in target.take_repairs(1 << 20) {
            assert!(e.address().offset() + e.len() <= 4 * EXTENT, "{e:?}");
            assert!(bytes.is_none_or(|b| b.len() as u64 == e.len()));
        }
        target.written(&mut work);
        work.clear();
        drop(target.take_finished());
    }
}

/// Does what a machine asks for, until it asks for nothing more.
fn answer(work: &mut Vec<Task>, mut act: impl FnMut(Task, &mut Vec<Task>)) {
    let mut steps = 0;
    while let Some(task) = work.pop() {
        act(task, work);
        steps += 1;
        assert!(steps < 100_000, "it asks for ever");
    }
}

//! Bytes that an enemy or a fault would write: right checksums around wrong contents, huge lengths.
//!
//! Owns: the ways to damage a field and put the checksums right again. Invariant: each is refused with
//! the field's name, before anything of its claimed size is allocated.

use crate::alloc::counted;
use crate::reseal::*;
use crate::values::*;
use bytes::Bytes;
use volrep::format::FormatError;
use volrep::format::message::{
    FRAME, FrameHeader, MAX_BODY, MAX_GENERATIONS, MAX_NAME, MAX_VOLUMES, Opening,
};
use volrep::format::record::{self, Content, Header, Kind, MAX_RAW, Record};
use volrep::format::superblock::{MAX_MAPS, MAX_PEERS, MapRange, Peer, SLOT, Superblock, Verified, Volume};
use volrep::units::{Lsn, NodeId};

fn altered(record: &Record, change: impl FnOnce(&mut Vec<u8>)) -> Result<Record, FormatError> {
    let mut bytes = record.wire().to_vec();
    change(&mut bytes);
    reseal_record(&mut bytes);
    let bytes = Bytes::from(bytes);
    let (decoded, allocated) = counted(|| Record::decode(bytes));
    assert!(allocated < 1024, "{allocated} bytes for decoding");
    decoded
}

fn put(at: usize, value: u32) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes())
}

#[test]
fn lengths_of_gigabytes_are_refused_before_anything_is_allocated() {
    for (name, message) in messages() {
        for len in [u32::MAX, 1 << 31, MAX_BODY as u32 + 1] {
            let mut head: [u8; FRAME] = frame(&message)[..FRAME].try_into().unwrap();
            head[..4].copy_from_slice(&len.to_le_bytes());
            let (decoded, allocated) = counted(|| FrameHeader::decode(&head));
            assert_eq!((decoded, allocated), (Err(FormatError::Field("length")), 0), "{name}");
        }
    }
    let record = raw_record();
    for (at, field) in [(80, "extents"), (84, "stored"), (88, "raw")] {
        for value in [u32::MAX, 1 << 31, MAX_RAW as u32 + 1] {
            assert_eq!(altered(&record, put(at, value)), Err(FormatError::Field(field)));
        }
    }
    let mut slot = superblock().encode().to_vec();
    for value in [u32::MAX, 1 << 31, SLOT as u32] {
        slot[10..14].copy_from_slice(&value.to_le_bytes());
        reseal_superblock(&mut slot);
        let (decoded, allocated) = counted(|| Superblock::decode(&slot));
        assert_eq!((decoded, allocated), (Err(FormatError::Field("length")), 0));
    }
}

#[test]
fn another_version_is_refused_by_its_number() {
    for (name, message) in messages() {
        let mut head: [u8; FRAME] = frame(&message)[..FRAME].try_into().unwrap();
        head[5] += 1;
        let told = FrameHeader::decode(&head).unwrap_err();
        assert_eq!(told, FormatError::Version(head[5].into()), "{name}");
        assert!(told.to_string().contains("which this build does not read"));
    }
}

#[test]
fn the_parts_of_a_record_must_agree() {
    let record = raw_record();
    let entry = |n: usize| record::HEADER + n * record::ENTRY;
    assert!(altered(&record, |_| {}).is_ok());
    let refused = [
        // The payload ends before the table's data does, or after it.
        (put(entry(2) + 8, 1), "raw"),
        (put(entry(2) + 8, 3), "raw"),
        // Sectors: none, and more than the address space has.
        (put(entry(0) + 8, 0), "extent"),
        (put(entry(1) + 12, 2), "extent kind"),
        (put(entry(0), 8 * 512 + 1), "extent"),
        (put(92, 1), "reserved"),
        (put(44, 1 << 31), "flags"),
    ];
    for (i, (change, field)) in refused.into_iter().enumerate() {
        assert_eq!(altered(&record, change), Err(FormatError::Field(field)), "{i}");
    }
    let last = |b: &mut Vec<u8>| b[entry(2)..entry(2) + 8].copy_from_slice(&(u64::MAX - 511).to_le_bytes());
    assert_eq!(altered(&record, last), Err(FormatError::Field("extent")));
}

/// An epoch's writes coalesce, so a record never writes a sector twice; one that does was not made by
/// this program, and which of the two would win is nobody's promise.
#[test]
fn extents_of_one_record_are_disjoint_and_ascend() {
    use Content::{Data, Zeroes};
    let made = |extents: Vec<_>| {
        let data: u64 = extents
            .iter()
            .filter(|(_, c)| *c == Data)
            .map(|(e, _): &(volrep::units::Extent, _)| e.len())
            .sum();
        Record::decode(record(extents, &pattern(data as usize), None, stamp(Kind::Writes)).wire())
    };
    let end = (1u64 << 56) / 512;
    assert!(made(vec![(extent(0, 0, 8), Data), (extent(0, 8, 8), Data)]).is_ok());
    assert!(made(vec![(extent(0, end - 1, 1), Data), (extent(1, 0, 8), Data)]).is_ok());
    assert!(made(vec![(extent(254, 0, 1), Data), (extent(255, end - 1, 1), Data)]).is_ok());
    for wrong in [
        vec![(extent(0, 0, 8), Data), (extent(0, 7, 8), Data)],
        vec![(extent(0, 0, 8), Data), (extent(0, 0, 8), Zeroes)],
        vec![(extent(0, 0, 1 << 20), Zeroes), (extent(0, 5, 1), Data)],
        vec![(extent(0, 8, 8), Data), (extent(0, 0, 8), Data)],
        vec![(extent(1, 0, 1), Data), (extent(0, 0, 1), Data)],
        vec![(extent(255, end - 1, 1), Data), (extent(0, 0, 1), Data)],
    ] {
        assert_eq!(made(wrong), Err(FormatError::Field("extent order")));
    }
}

/// A record whose payload is this zstd frame, said to be `raw` bytes.
fn with_frame(frame: &[u8], raw: usize) -> Result<Record, FormatError> {
    let sectors = raw.div_ceil(512) as u64;
    let honest =
        record(vec![(extent(0, 0, sectors), Content::Data)], &vec![0; raw], Some(1), stamp(Kind::Writes));
    altered(&honest, |bytes| {
        bytes.truncate(record::room(1));
        bytes.extend_from_slice(frame);
        bytes[84..88].copy_from_slice(&(frame.len() as u32).to_le_bytes());
    })
}

#[test]
fn a_zstd_bomb_is_bounded() {
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    assert!(bomb.len() < 16 << 10);
    assert_eq!(with_frame(&bomb, MAX_RAW), Err(FormatError::Field("raw")));
    // One that hides its size.
    let mut silent = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
    std::io::copy(&mut std::io::repeat(0).take_bytes(64 << 20), &mut silent).unwrap();
    assert_eq!(with_frame(&silent.finish().unwrap(), MAX_RAW), Err(FormatError::Field("raw")));
    // One that lies: the field after magic, descriptor and window.
    let mut liar = bomb.clone();
    assert_eq!(liar[6..10], (64u32 << 20).to_le_bytes());
    liar[6..10].copy_from_slice(&(MAX_RAW as u32).to_le_bytes());
    let record = with_frame(&liar, MAX_RAW).unwrap();
    let (payload, allocated) = counted(|| record.payload());
    assert_eq!(payload, Err(FormatError::Field("payload")));
    assert!(allocated < MAX_RAW + 64 * 1024, "{allocated}");
    // Several frames in one, or something behind it.
    let half = zstd::bulk::compress(&[0; 2048], 1).unwrap();
    assert_eq!(with_frame(&[&half[..], &half].concat(), 4096), Err(FormatError::Field("raw")));
    let whole = zstd::bulk::compress(&[0; 4096], 1).unwrap();
    assert!(with_frame(&whole, 4096).unwrap().payload().is_ok());
    assert_eq!(with_frame(&[&whole[..], &half].concat(), 4096), Err(FormatError::Field("stored")));
    assert_eq!(with_frame(&whole[..whole.len() - 1], 4096), Err(FormatError::Field("stored")));
    assert!(with_frame(b"no frame", 4096).is_err());
    assert!(with_frame(&[], 4096).is_err());
}

trait TakeBytes: std::io::Read + Sized {
    fn take_bytes(self, n: u64) -> std::io::Take<Self> {
        std::io::Read::take(self, n)
    }
}
impl<R: std::io::Read> TakeBytes for R {}

#[test]
fn a_header_says_nothing_of_a_body_that_is_short() {
    let wire = raw_record().wire();
    for len in 0..wire.len() {
        let cut = wire.slice(..len);
        let wanted = if len < record::HEADER { Err(FormatError::Short) } else { Ok(wire.len()) };
        assert_eq!(Header::decode(&cut).map(|h| h.len), wanted);
        assert_eq!(Record::decode(cut), Err(FormatError::Short));
    }
}

/// The fullest superblock fits in its slot, and comes back.
#[test]
fn the_fullest_superblock_fits_in_its_slot() {
    let name = |i: usize| format!("{i:0>width$}", width = MAX_NAME);
    let mut s = superblock();
    s.volumes = (0..MAX_VOLUMES).map(|i| Volume { number: i as u8, size: 1 << 56, name: name(i) }).collect();
    s.openings = (0..MAX_GENERATIONS as u32)
        .map(|i| Opening { generation: generation(i), at: point(u64::from(i)) })
        .collect();
    s.maps = (0..MAX_MAPS).map(|i| MapRange { slot: i as u8, from: point(i as u64) }).collect();
    s.sync_set = (1..=MAX_PEERS as u64).map(NodeId).collect();
    s.outdated = s.sync_set.clone();
    s.peers = (0..MAX_PEERS)
        .map(|i| Peer {
            node: NodeId(i as u64),
            name: name(i),
            durable: Lsn(u64::MAX),
            behind: true,
            resyncing: true,
            verified: Some(Verified { time: u64::MAX, lsn: Lsn(u64::MAX), differences: u64::MAX }),
        })
        .collect();
    let old = s.resync.as_mut().and_then(|r| r.old.as_mut()).unwrap();
    old.openings = s.openings.clone();
    let slot = s.encode();
    assert!(slot.len() <= SLOT, "{}", slot.len());
    let (decoded, allocated) = counted(|| Superblock::decode(&slot));
    assert_eq!(decoded, Ok(s));
    assert!(allocated < 2 * SLOT, "{allocated}");
    let body = u32::from_le_bytes(slot[10..14].try_into().unwrap()) as usize;
    assert!(14 + body + 32 <= SLOT, "{body}");
}

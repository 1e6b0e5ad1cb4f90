//! Golden bytes: golden/NAME.hex holds a structure's length and its bytes without trailing zeroes.
//!
//! A difference means that disks and peers of yesterday are not understood: raise the VERSION of the
//! module in src/format, decide what becomes of the old one, and only then write the files anew with
//! `GOLDEN=write cargo test --test format`.

use crate::values::*;
use bytes::Bytes;
use std::path::PathBuf;
use volrep::format::mapped::Owner;
use volrep::format::message::{FRAME, FrameHeader, Message, proof};
use volrep::format::record::{Codec, Record, origin};
use volrep::format::salvage;
use volrep::format::segment::SegmentHeader;
use volrep::format::superblock::Superblock;
use volrep::units::{Lsn, NodeId};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/format/golden").join(format!("{name}.hex"))
}

fn text(bytes: &[u8]) -> String {
    let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |i| i + 1);
    let line = |chunk: &[u8]| chunk.iter().map(|b| format!("{b:02x}")).collect::<String>() + "\n";
    format!("{}\n{}", bytes.len(), bytes[..used].chunks(32).map(line).collect::<String>())
}

/// The bytes in the tree.
fn stored(name: &str) -> Bytes {
    let text = std::fs::read_to_string(path(name)).unwrap_or_else(|e| panic!("golden/{name}.hex: {e}"));
    let (len, hex) = text.split_once('\n').unwrap();
    let digits: Vec<u8> = hex.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
    let mut bytes: Vec<u8> = digits.chunks(2).map(|d| d[0] << 4 | d[1]).collect();
    bytes.resize(len.parse().unwrap(), 0);
    bytes.into()
}

/// Compares what is encoded now with the bytes in the tree; gives those.
fn golden(name: &str, now: &[u8]) -> Bytes {
    if std::env::var("GOLDEN").is_ok_and(|v| v == "write") {
        std::fs::write(path(name), text(now)).unwrap();
    }
    let stored = stored(name);
    assert!(
        now == stored,
        "the bytes of {name} changed: raise the format's VERSION (see tests/format/golden.rs). Now:\n{}",
        text(now)
    );
    stored
}

#[test]
fn the_superblock_stays_as_it_is() {
    let bytes = golden("superblock", &superblock().encode());
    assert_eq!(Superblock::decode(&bytes), Ok(superblock()));
}

#[test]
fn the_segment_header_stays_as_it_is() {
    let bytes = golden("segment", &segment().encode());
    assert_eq!(SegmentHeader::decode(&bytes), Ok(segment()));
}

#[test]
fn a_salvage_file_stays_as_it_is() {
    let head = golden("salvage_head", &salvage_head().encode());
    assert_eq!(salvage::Head::decode(&head), Ok((salvage_head(), head.len())));
    let trailer = salvage::Trailer { records: 0x0e12, last: Lsn(0x0e13) };
    let end = golden("salvage_trailer", &trailer.encode());
    assert_eq!(salvage::Trailer::decode(&end), Ok(trailer));
}

#[test]
fn the_head_of_a_mapped_file_stays_as_it_is() {
    let owner = Owner { group: group(), node: NodeId(0x0303), number: 0x0e14 };
    let mut file = vec![0; 4096];
    owner.claim(b"VMAPFILE", &mut file);
    assert!(owner.owns(b"VMAPFILE", &golden("mapped", &file)));
}

#[test]
fn the_record_stays_as_it_is() {
    for (name, record) in
        [("record_raw", raw_record()), ("record_sync_set", sync_set_record()), ("record_mark", mark_record())]
    {
        let bytes = golden(name, &record.journal_bytes());
        let decoded = Record::decode(bytes.clone()).unwrap();
        assert_eq!(decoded.stamp, record.stamp);
        assert_eq!(decoded.journal_bytes(), bytes);
        assert_eq!(decoded.wire(), bytes.slice(..record.wire_len() as usize));
    }
    let bytes = stored("record_raw");
    let decoded = Record::decode(bytes).unwrap();
    assert_eq!(decoded.extents().collect::<Vec<_>>(), extents());
    assert_eq!(decoded.payload().unwrap(), pattern(1536));
    assert_eq!(sync_set_record().members().unwrap().len(), 2);
    assert_eq!(mark_record().mark().as_deref(), Some("before batch \u{fc}"));
    assert_eq!(sync_set_record().mark(), None);
    golden("origin", &origin(group()).0);
}

/// The compressor may find other bytes for the same payload one day, so these are only read.
#[test]
fn a_compressed_record_stays_readable() {
    if std::env::var("GOLDEN").is_ok_and(|v| v == "write") && !path("record_zstd").exists() {
        golden("record_zstd", &zstd_record().journal_bytes());
    }
    let decoded = Record::decode(stored("record_zstd")).unwrap();
    assert_eq!((&decoded.stamp, decoded.codec), (&zstd_record().stamp, Codec::Zstd));
    assert_eq!(decoded.payload().unwrap(), pattern(32768));
    assert_eq!(decoded.journal_bytes(), stored("record_zstd"));
}

#[test]
fn every_message_stays_as_it_is() {
    for (name, message) in messages() {
        let bytes = golden(&format!("message_{name}"), &frame(&message));
        let header = FrameHeader::decode(bytes[..FRAME].try_into().unwrap()).unwrap();
        assert_eq!(header.len, bytes.len() - FRAME);
        let decoded = header.body(bytes.slice(FRAME..)).unwrap();
        match (&decoded, &message) {
            (Message::Record(a), Message::Record(b)) | (Message::Copy(a), Message::Copy(b)) => {
                assert_eq!((&a.stamp, a.wire()), (&b.stamp, b.wire()))
            }
            _ => assert_eq!(decoded, message),
        }
    }
    let verdict = volrep::format::message::Verdict::Compare(point(30));
    golden("proof_hello", &proof(&[1; 32], &[2; 32], &identity(), None));
    golden("proof_welcome", &proof(&[1; 32], &[2; 32], &identity(), Some(&verdict)));
}

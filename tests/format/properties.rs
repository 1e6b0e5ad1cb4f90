//! Every decoder against arbitrary bytes, valid bytes that were altered, and valid bytes cut short.
//!
//! Invariants: no panic, no allocation beyond the bound, and whatever is accepted encodes to the very
//! bytes it came from. Altered bytes have their checksums put right half of the time: otherwise nothing
//! behind the checksum would ever be reached.

use crate::alloc::counted;
use crate::checks::{check_record, check_segment, check_superblock};
use crate::reseal::{reseal_frame, reseal_record, reseal_segment, reseal_superblock};
use crate::values::*;
use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use volrep::format::message::{FRAME, FrameHeader, Message};
use volrep::format::record::{Codec, Content, HEADER, Kind, Record};
use volrep::format::{message, superblock as superblock_format};

/// A change to bytes: what to overwrite, and what is left.
type Change = (Vec<(Index, u8)>, Option<Index>, bool);

fn change() -> impl Strategy<Value = Change> {
    (vec((any::<Index>(), any::<u8>()), 0..4), proptest::option::weighted(0.2, any::<Index>()), any::<bool>())
}

fn apply(bytes: &mut Vec<u8>, (pokes, cut, _): &Change) {
    // Most of the fields lie at the front.
    for (i, (at, value)) in pokes.iter().enumerate() {
        let len = if i % 2 == 0 { bytes.len() } else { bytes.len().min(256) };
        bytes[at.index(len)] = *value;
    }
    if let Some(cut) = cut {
        bytes.truncate(cut.index(bytes.len()));
    }
}

fn record_holds(bytes: Vec<u8>) {
    let bytes = Bytes::from(bytes);
    check_record(bytes.to_vec());
    let Ok(r) = Record::decode(bytes) else { return };
    let Ok(payload) = r.payload() else { return };
    let data: u64 = r.extents().filter(|(_, c)| *c == Content::Data).map(|(e, _)| e.len()).sum();
    assert!(r.stamp.kind != Kind::Writes || data == payload.len() as u64);
    if r.codec == Codec::Raw {
        let again = record(r.extents().collect(), &payload, None, r.stamp.clone());
        assert_eq!(again.wire(), r.wire());
    }
}

fn frame_holds(bytes: Vec<u8>) {
    let Some((head, body)) = bytes.split_first_chunk::<FRAME>() else { return };
    let (header, allocated) = counted(|| FrameHeader::decode(head));
    assert_eq!(allocated, 0);
    let Ok(header) = header else { return };
    let body = Bytes::copy_from_slice(body);
    let (decoded, allocated) = counted(|| header.body(body.clone()));
    assert!(allocated < 4 * body.len() + 4096, "{allocated} bytes for {}", body.len());
    let Ok(message) = decoded else { return };
    assert_eq!(frame(&message), bytes);
    if let Message::Record(r) | Message::Copy(r) = message {
        record_holds(r.wire().to_vec());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_are_borne(bytes in vec(any::<u8>(), 0..5000)) {
        check_superblock(&bytes);
        check_segment(&bytes);
        record_holds(bytes.clone());
        frame_holds(bytes);
    }

    /// Right magic, version and hashes around arbitrary bytes.
    #[test]
    fn arbitrary_fields_are_borne(bytes in vec(any::<u8>(), 600..5000), kind in 0u8..24, small in any::<bool>()) {
        let mut b = bytes.clone();
        b[..8].copy_from_slice(b"VSUPERBK");
        b[8..10].copy_from_slice(&superblock_format::VERSION.to_le_bytes());
        let body = b.len() as u32 - 46;
        b[10..14].copy_from_slice(&body.to_le_bytes());
        reseal_superblock(&mut b);
        check_superblock(&b);

        let mut b = bytes.clone();
        b.resize(4096, 0);
        b[..8].copy_from_slice(b"VSEGMENT");
        b[8..10].copy_from_slice(&1u16.to_le_bytes());
        reseal_segment(&mut b);
        check_segment(&b);

        let mut b = bytes.clone();
        b[..4].copy_from_slice(b"VREC");
        b[4..6].copy_from_slice(&1u16.to_le_bytes());
        (b[6], b[7]) = (b[6] % 2, b[7] % 2);
        b[44..48].fill(0);
        b[72..80].fill(0);
        b[80..96].fill(0);
        if small {
            let stored = b.len() as u32 - HEADER as u32 - 16;
            b[80] = 1;
            b[84..88].copy_from_slice(&stored.to_le_bytes());
            b[88..92].copy_from_slice(&stored.to_le_bytes());
        }
        reseal_record(&mut b);
        record_holds(b);

        let mut b = bytes;
        (b[4], b[5], b[6], b[7]) = (kind, message::VERSION, 0, 0);
        reseal_frame(&mut b, true);
        frame_holds(b);
    }

    #[test]
    fn an_altered_superblock_is_borne(change in change()) {
        let mut slot = superblock().encode().to_vec();
        slot.truncate(700);
        apply(&mut slot, &change);
        if change.2 && slot.len() >= 14 {
            reseal_superblock(&mut slot);
        }
        check_superblock(&slot);
    }

    #[test]
    fn an_altered_segment_is_borne(change in change()) {
        let mut block = segment().encode().to_vec();
        apply(&mut block, &change);
        if change.2 && block.len() == 4096 {
            reseal_segment(&mut block);
        }
        check_segment(&block);
    }

    #[test]
    fn an_altered_record_is_borne(which in 0..3usize, change in change()) {
        let record = [raw_record, zstd_record, sync_set_record][which]();
        let mut bytes = record.wire().to_vec();
        apply(&mut bytes, &change);
        if change.2 && bytes.len() >= HEADER {
            reseal_record(&mut bytes);
        }
        record_holds(bytes);
    }

    #[test]
    fn an_altered_message_is_borne(which in any::<Index>(), change in change()) {
        let messages = messages();
        let mut bytes = frame(&messages[which.index(messages.len())].1).to_vec();
        apply(&mut bytes, &change);
        if change.2 && bytes.len() >= FRAME {
            reseal_frame(&mut bytes, true);
        }
        frame_holds(bytes);
    }

    /// What is written is read back: any extents, any payload, packed or not.
    #[test]
    fn a_record_comes_back(
        parts in vec((0u8..4, 0u64..1000, 1u64..40, any::<bool>()), 0..20),
        level in proptest::option::of(1..4i32),
        noise in any::<u8>(),
    ) {
        let (mut extents, mut at) = (Vec::new(), [0u64; 4]);
        for (volume, gap, len, data) in parts {
            let start = at[volume as usize] + gap;
            at[volume as usize] = start + len;
            extents.push((extent(volume, start, len), if data { Content::Data } else { Content::Zeroes }));
        }
        extents.sort_by_key(|(e, _)| e.start());
        let data: u64 = extents.iter().filter(|(_, c)| *c == Content::Data).map(|(e, _)| e.len()).sum();
        let payload: Vec<u8> = pattern(data as usize).iter().map(|b| b.wrapping_mul(noise)).collect();
        let made = record(extents.clone(), &payload, level, stamp(Kind::Writes));
        let read = Record::decode(made.wire()).unwrap();
        prop_assert_eq!(read.extents().collect::<Vec<_>>(), extents);
        prop_assert_eq!(read.payload().unwrap(), payload);
        prop_assert_eq!((read.stamp, read.chain), (made.stamp.clone(), made.chain));
    }
}

//! Every bound of every field, from both sides: the last value that is accepted, and the first that is not.
//!
//! Owns: nothing. Invariant: what lies within a bound comes back as it was; what does not is refused by its name.

use crate::reseal::*;
use crate::values::*;
use bytes::Bytes;
use volrep::format::FormatError;
use volrep::format::compare::{self, Compare, EXTENT, ExtentLeaves, LEAF, WINDOW};
use volrep::format::mapped::{HEAD, Owner};
use volrep::format::message::{
    self, Cause, FRAME, FrameHeader, MAX_BODY, MAX_NAME, MAX_TEXT, Message, Standing, Verdict, refuse,
};
use volrep::format::record::{
    self, Codec, Compressor, Content, EncodeJob, Encoded, Header, Kind, MAX_EXTENTS, MAX_MARK, MAX_MEMBERS,
    MAX_RAW, Record, is_mark, padded,
};
use volrep::format::salvage::{self, Trailer};
use volrep::format::segment::SegmentHeader;
use volrep::format::superblock::{self, Geometry, ResyncStage, SLOT, Superblock, Volume};
use volrep::units::{Address, BLOCK, Extent, GroupId, Lsn, MAX_VOLUME, NodeId, SECTOR};

fn field<T>(name: &'static str) -> Result<T, FormatError> {
    Err(FormatError::Field(name))
}

/// Both ends of a link and both sides of a crash go by these.
#[test]
fn the_limits_stay_as_they_are() {
    assert_eq!((LEAF, EXTENT, WINDOW), (4 << 10, 64 << 10, 32 << 20));
    assert_eq!((compare::EXTENT_LEAVES, compare::WINDOW_EXTENTS, compare::WINDOW_LEAVES), (16, 512, 8192));
    assert_eq!((compare::MAX_BATCH, compare::MAX_REPORT), (128, 524_288));
    assert_eq!(
        (MAX_EXTENTS, MAX_RAW, record::MAX_RECORD, record::MAX_PADDED),
        (2048, 1 << 20, 1_081_536, 1_085_440)
    );
    assert_eq!((MAX_MEMBERS, MAX_MARK, record::MAX_ZERO), (64, 200, 1_099_511_627_776));
    assert_eq!((SLOT, superblock::MAX_PEERS, superblock::MAX_MAPS), (65_536, 64, 16));
    assert_eq!((MAX_BODY, MAX_NAME, MAX_TEXT), (1_081_536, 64, 250));
    assert_eq!((message::MAX_GENERATIONS, message::MAX_POINTS, message::MAX_CANDIDATES), (128, 146, 8192));
    assert_eq!((salvage::MAX_HEAD, salvage::TRAILER, HEAD), (65_536, 56, 4096));
}

/// What a superblock with this change comes back as.
fn superblock_with(change: impl FnOnce(&mut Superblock)) -> Result<(), FormatError> {
    let mut s = superblock();
    change(&mut s);
    Superblock::decode(&s.encode()).map(|back| assert_eq!(back, s))
}

#[test]
fn a_superblocks_fields_are_bounded() {
    let segment = |bytes| superblock_with(|s| s.geometry.segment = bytes);
    assert_eq!([2 << 20, (2 << 20) + 4096, 1 << 40].map(segment), [Ok(()); 3]);
    let wrong = [(2 << 20) - 4096, (2 << 20) + 512, (1 << 40) + 4096];
    assert_eq!(wrong.map(segment), [field("segment size"); 3]);
    let segments = |n| superblock_with(|s| s.geometry.segments = n);
    assert_eq!([4, 1 << 20].map(segments), [Ok(()); 2]);
    assert_eq!([3, (1 << 20) + 1].map(segments), [field("segments"); 2]);
    let bases =
        |base, checkpoint| superblock_with(|s| (s.base_segment, s.checkpoint_segment) = (base, checkpoint));
    assert_eq!([bases(1, 1), bases(3, 4)], [Ok(()); 2]);
    assert_eq!([bases(0, 0), bases(0, 3), bases(4, 3)], [field("base segment"); 3]);
    let volume = |number, size| Volume { number, size, name: "v".into() };
    let volumes = |list: Vec<Volume>| superblock_with(|s| s.volumes = list);
    assert_eq!(volumes(vec![]), field("volumes"));
    let [one, other] = [volume(4, 512), volume(5, MAX_VOLUME)];
    assert_eq!(volumes(vec![one.clone(), other.clone()]), Ok(()));
    assert_eq!(volumes(vec![one.clone(), one.clone()]), field("volume numbers"));
    assert_eq!(volumes(vec![other, one]), field("volume numbers"));
    for size in [0, 513, MAX_VOLUME + SECTOR] {
        assert_eq!(volumes(vec![volume(4, size)]), field("volume size"));
    }
    assert_eq!(Geometry { segment: 5 << 20, segments: 7 }.len(), 35 << 20);
}

/// The old image is there while a new one is staged, and not before or after.
#[test]
fn each_stage_of_a_resync_comes_back() {
    let staged = superblock().resync.unwrap().old;
    assert!(staged.is_some());
    for stage in [ResyncStage::Copying, ResyncStage::Staging, ResyncStage::Merging] {
        for old in [None, staged.clone()] {
            let fits = old.is_some() == (stage == ResyncStage::Staging);
            let back = superblock_with(|s| {
                let resync = s.resync.as_mut().unwrap();
                (resync.stage, resync.old) = (stage, old);
            });
            assert_eq!(back, if fits { Ok(()) } else { field("old image") });
        }
    }
}

#[test]
fn a_superblocks_length_is_bounded_before_its_checksum_counts() {
    let mut slot = superblock().encode().to_vec();
    slot.resize(SLOT, 0);
    for (body, told) in [(SLOT - 46, FormatError::Checksum), (SLOT - 45, FormatError::Field("length"))] {
        slot[10..14].copy_from_slice(&(body as u32).to_le_bytes());
        assert_eq!(Superblock::decode(&slot), Err(told));
    }
    // Its own length, and not all of it there.
    let slot = superblock().encode();
    let used = 46 + u32::from_le_bytes(slot[10..14].try_into().unwrap()) as usize;
    assert!(Superblock::decode(&slot[..used]).is_ok());
    assert_eq!(Superblock::decode(&slot[..used - 1]), Err(FormatError::Short));
}

#[test]
fn of_two_slots_the_newer_valid_one_stands() {
    let slot = |sequence| Superblock { sequence, ..superblock() }.encode();
    let [old, new, torn] = [slot(7), slot(8), slot(9)];
    let torn = &torn[..600];
    let chosen = |slots| Superblock::choose(slots).map(|(i, s)| (i, s.sequence));
    assert_eq!(chosen([&old, &new]), Ok((1, 8)));
    assert_eq!(chosen([&new, &old]), Ok((0, 8)));
    assert_eq!(chosen([&new, &new]), Ok((0, 8)));
    assert_eq!(chosen([torn, &old]), Ok((1, 7)));
    assert_eq!(chosen([&old, torn]), Ok((0, 7)));
    assert_eq!(chosen([torn, b"VSUPERBL"]), Err([FormatError::Short, FormatError::Magic]));
}

#[test]
fn what_a_segments_header_does_not_use_is_zero() {
    for at in [10, 15, 116, 4063] {
        let mut block = segment().encode();
        block[at] = 1;
        assert_eq!(SegmentHeader::decode(&block), Err(FormatError::Checksum));
        reseal_segment(&mut block);
        assert_eq!(SegmentHeader::decode(&block), field("reserved"), "{at}");
    }
}

#[test]
fn a_mapped_file_is_its_owners_and_nobody_elses() {
    let id = Owner { group: group(), node: NodeId(7), number: 9 };
    let (magic, mut file) = (b"VSTAGING", vec![0xee; 2 * HEAD as usize]);
    assert!(!id.owns(magic, &file));
    id.claim(magic, &mut file);
    assert!(id.owns(magic, &file) && file[64..].iter().all(|b| *b == 0xee));
    let others = [
        Owner { group: GroupId([1; 16]), ..id },
        Owner { node: NodeId(8), ..id },
        Owner { number: 10, ..id },
    ];
    assert!(others.iter().all(|o| !o.owns(magic, &file)) && !id.owns(b"VMAPFILE", &file));
    for at in 0..64 {
        file[at] ^= 1;
        assert!(!id.owns(magic, &file), "{at}");
        file[at] ^= 1;
    }
    assert!(!id.owns(magic, &file[..63]));
}

#[test]
fn a_salvage_files_head_is_bounded_and_its_ends_are_checked() {
    let head = salvage_head().encode();
    let decode = |bytes: &[u8]| salvage::Head::decode(bytes);
    assert_eq!(decode(&[&head[..], b"more"].concat()), Ok((salvage_head(), head.len())));
    for len in 0..head.len() {
        assert_eq!(decode(&head[..len]), Err(FormatError::Short));
    }
    let mut long = head.clone();
    long.resize(salvage::MAX_HEAD + 64, 0);
    for (len, told) in [
        (salvage::MAX_HEAD - 14, FormatError::Checksum),
        (salvage::MAX_HEAD - 13, FormatError::Field("length")),
    ] {
        long[10..14].copy_from_slice(&(len as u32).to_le_bytes());
        assert_eq!(decode(&long), Err(told));
    }
    let altered = |at: usize, put: u8| {
        let mut bytes = head.clone();
        bytes[at] = put;
        let raw = decode(&bytes);
        reseal_salvage(&mut bytes);
        (raw, decode(&bytes))
    };
    assert_eq!(altered(0, 0), (Err(FormatError::Magic), Err(FormatError::Magic)));
    assert_eq!(altered(8, 2), (Err(FormatError::Checksum), Err(FormatError::Version(2))));
    // The name's length: more than the bound, and a byte fewer than there are.
    assert_eq!(altered(38, MAX_NAME as u8 + 1).1, field("node name"));
    assert!(altered(38, 2).1.is_err());

    let trailer = Trailer { records: 3, last: Lsn(77) };
    let bytes = trailer.encode();
    assert_eq!((bytes.len(), Trailer::decode(&bytes)), (salvage::TRAILER, Ok(trailer)));
    assert_eq!(Trailer::decode(&bytes[..bytes.len() - 1]), Err(FormatError::Short));
    for at in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        let told = if at < 8 { FormatError::Magic } else { FormatError::Checksum };
        assert_eq!(Trailer::decode(&bytes), Err(told), "{at}");
    }
}

fn back(message: &Message) -> Result<Message, FormatError> {
    let bytes = frame(message);
    FrameHeader::decode(bytes[..FRAME].try_into().unwrap())?.body(bytes.slice(FRAME..))
}

#[test]
fn a_frames_header_is_bounded_and_its_body_as_long_as_it_says() {
    let mut head: [u8; FRAME] = frame(&Message::Resynced)[..].try_into().unwrap();
    let decode = |head: &[u8; FRAME]| FrameHeader::decode(head).map(|h| h.len);
    head[..4].copy_from_slice(&(MAX_BODY as u32).to_le_bytes());
    assert_eq!(decode(&head), Ok(MAX_BODY));
    head[..4].copy_from_slice(&(MAX_BODY as u32 + 1).to_le_bytes());
    assert_eq!(decode(&head), field("length"));
    head[..4].fill(0);
    for (at, put) in [(4, 22), (6, 1), (7, 1)] {
        let kept = std::mem::replace(&mut head[at], put);
        assert_eq!(decode(&head), Err(FormatError::Magic));
        head[at] = kept;
    }
    let bytes = frame(&Message::Begin { from: Lsn(5) });
    let header = FrameHeader::decode(bytes[..FRAME].try_into().unwrap()).unwrap();
    let body = bytes.slice(FRAME..);
    assert_eq!(header.body(body.slice(1..)), Err(FormatError::Short));
    assert_eq!(header.body([&body[..], b"x"].concat().into()), Err(FormatError::Short));
    assert!(header.body(body).is_ok());
    // A record and a copy end where their bodies do.
    for message in [Message::Record(raw_record()), Message::Copy(raw_record())] {
        let mut bytes = [&frame(&message)[..], &[0]].concat();
        let len = (bytes.len() - FRAME) as u32;
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        let sum = *blake3::hash(&bytes[..8]).as_bytes();
        bytes[8..16].copy_from_slice(&sum[..8]);
        let header = FrameHeader::decode(bytes[..FRAME].try_into().unwrap()).unwrap();
        assert_eq!(header.body(Bytes::from(bytes).slice(FRAME..)), field("length"));
    }
}

#[test]
fn a_record_alone_may_be_followed_by_what_makes_it_whole_blocks() {
    let framed = |message: &Message| {
        let bytes = frame(message);
        (FrameHeader::decode(bytes[..FRAME].try_into().unwrap()).unwrap(), bytes.slice(FRAME..))
    };
    let of_len = |body: &Bytes, len: usize| {
        let mut body = body.to_vec();
        body.resize(len, 0);
        Bytes::from(body)
    };
    for message in [Message::Record(zstd_record()), Message::Copy(zstd_record())] {
        let (header, body) = framed(&message);
        let whole = padded(header.len);
        assert_eq!((whole > header.len, whole % 4096), (true, 0));
        assert_eq!(header.body(of_len(&body, whole)), Ok(message));
        for len in [header.len - 1, header.len + 1, whole - 1, whole + 1, whole + 4096] {
            assert_eq!(header.body(of_len(&body, len)), Err(FormatError::Short), "{len}");
        }
    }
    let (header, body) = framed(&Message::Begin { from: Lsn(5) });
    assert_eq!(header.body(of_len(&body, padded(header.len))), Err(FormatError::Short));
}

#[test]
fn each_standing_comes_back() {
    for (name, message) in messages() {
        let Message::Heartbeat { .. } = message else { continue };
        for standing in [Standing::None, Standing::Member, Standing::Outdated] {
            let mut message = message.clone();
            let Message::Heartbeat { standing: told, .. } = &mut message else { unreachable!() };
            *told = standing;
            assert_eq!(back(&message), Ok(message), "{name}");
        }
    }
}

#[test]
fn a_refusals_text_is_cut_between_characters() {
    let text = |t: &str| match back(&refuse(t)) {
        Ok(Message::Refuse { text }) => text,
        other => panic!("{other:?}"),
    };
    assert_eq!((text("no"), text("")), ("no".into(), String::new()));
    let long = "x".repeat(MAX_TEXT);
    assert_eq!((text(&long), text(&format!("{long}y"))), (long.clone(), long));
    for before in 0..4 {
        let cut = text(&format!("{}{}", "x".repeat(before), "\u{1f4be}".repeat(100)));
        assert_eq!(cut.len(), before + (MAX_TEXT - before) / 4 * 4);
    }
    let long = Message::Refuse { text: "x".repeat(MAX_TEXT + 1) };
    assert_eq!(back(&long), field("text"));
}

#[test]
fn each_cause_of_a_resync_comes_back() {
    for cause in [Cause::Lineage, Cause::Behind, Cause::NeverCopied, Cause::Fork] {
        let verdict = Verdict::Resync { cause, oldest: Lsn(4), points: vec![] };
        let message = Message::Welcome { identity: Box::new(identity()), verdict, proof: [7; 32] };
        assert_eq!(back(&message), Ok(message));
    }
}

#[test]
fn each_cause_of_a_resync_has_a_text_of_its_own() {
    let causes = [Cause::Lineage, Cause::Behind, Cause::NeverCopied, Cause::Fork].map(Cause::text);
    let mut different = causes.to_vec();
    different.sort_unstable();
    different.dedup();
    assert!(different.len() == 4 && causes.iter().all(|t| t.len() > 20), "{causes:?}");
}

fn word(word: Compare) -> Result<(), FormatError> {
    let message = Message::Compare(Box::new(word));
    back(&message).map(|read| assert_eq!(read, message))
}

#[test]
fn the_words_of_a_comparison_are_bounded() {
    let window = 3;
    let open = |start: u64, len: u64, wanted: usize| {
        let extent = Extent::new(Address(start), len).unwrap();
        word(Compare::Open { window, extent, wanted: vec![1; wanted], quick: false })
    };
    assert_eq!([open(0, WINDOW, 64), open(EXTENT, SECTOR, 0)], [Ok(()); 2]);
    assert_eq!([open(0, WINDOW + SECTOR, 0), open(EXTENT / 2, SECTOR, 0)], [field("window"); 2]);
    assert_eq!(open(0, WINDOW, 65), field("wanted"));
    let root = |touched: usize, rotten: usize| {
        word(Compare::Root { window, touched: vec![1; touched], root: [2; 16], rotten: vec![3; rotten] })
    };
    assert_eq!([root(64, 512), root(65, 0), root(0, 513)], [Ok(()), field("touched"), field("rotten")]);
    let roots = |n| word(Compare::Roots { window, roots: vec![[1; 16]; n] });
    assert_eq!([roots(512), roots(513)], [Ok(()), field("roots")]);
    let extents = |n| word(Compare::AskLeaves { window, extents: vec![1; n] });
    assert_eq!([extents(512), extents(513)], [Ok(()), field("extents")]);
    let leaves = |n| word(Compare::Leaves { window, extents: vec![leaves(1); n] });
    assert_eq!([leaves(512), leaves(513)], [Ok(()), field("leaves")]);
    let runs = |n| word(Compare::AskData { window, batch: 1, runs: vec![(1, 1); n] });
    assert_eq!([runs(128), runs(129)], [Ok(()), field("runs")]);
    let data = |touched: usize, payload: usize| {
        let payload = vec![1; payload].into();
        word(Compare::Data { window, batch: 1, touched: vec![1; touched], payload })
    };
    let most = 128 * LEAF as usize + (64 << 10);
    assert_eq!(
        [data(128, most), data(129, 0), data(0, most + 1)],
        [Ok(()), field("touched"), field("payload")]
    );
    let report = |n: usize| word(Compare::Report { json: vec![b' '; n].into() });
    assert_eq!([report(512 << 10), report((512 << 10) + 1)], [Ok(()), field("report")]);
    let fail = |n| word(Compare::Fail { text: "x".repeat(n) });
    assert_eq!([fail(MAX_TEXT), fail(MAX_TEXT + 1)], [Ok(()), field("text")]);
}

#[test]
fn a_word_is_about_a_window_or_about_none() {
    for (name, message) in messages() {
        let Message::Compare(word) = &message else { continue };
        let about = !["compare_fail", "compare_begin", "compare_stop", "compare_report"].contains(&name);
        assert_eq!(word.window(), about.then_some(0x0f01), "{name}");
        let mut bytes = frame(&message).to_vec();
        bytes[FRAME + 1] ^= 0x40;
        reseal_frame(&mut bytes, true);
        let header = FrameHeader::decode(bytes[..FRAME].try_into().unwrap()).unwrap();
        let read = header.body(Bytes::from(bytes).slice(FRAME..));
        assert_eq!(read.is_ok(), about, "{name}");
    }
}

/// What a word is said to cost on the link is what its frame takes, but for a few bytes.
#[test]
fn the_cost_of_a_word_is_about_the_length_of_its_frame() {
    let window = 1;
    let extent = extent(0, 0, 1);
    let many = 300;
    let large = [
        Compare::Open { window, extent, wanted: vec![1; 64], quick: true },
        Compare::Root { window, touched: vec![1; 64], root: [0; 16], rotten: vec![1; many] },
        Compare::Roots { window, roots: vec![[1; 16]; many] },
        Compare::AskLeaves { window, extents: vec![1; many] },
        Compare::Leaves { window, extents: vec![leaves(1); many] },
        Compare::AskData { window, batch: 1, runs: vec![(1, 1); 128] },
        Compare::Data { window, batch: 1, touched: vec![1; 128], payload: vec![1; 5000].into() },
        Compare::Report { json: vec![b' '; 5000].into() },
    ];
    let small = messages().into_iter().filter_map(|(_, m)| match m {
        Message::Compare(word) => Some(*word),
        _ => None,
    });
    for word in small.chain(large) {
        let said = word.wire_len();
        let takes = frame(&Message::Compare(Box::new(word.clone()))).len() as u64;
        assert!(said.abs_diff(takes) <= 14, "{said} for {takes}: {word:?}");
    }
}

fn leaves(index: u16) -> ExtentLeaves {
    ExtentLeaves { index, touched: [2; 16], hashes: [3; 16], rotten: false }
}

/// A record with one field of its header overwritten, and its hashes put right.
fn header_with(record: &Record, at: usize, put: &[u8]) -> Result<Header, FormatError> {
    let mut bytes = record.wire().to_vec();
    bytes[at..at + put.len()].copy_from_slice(put);
    reseal_record(&mut bytes);
    Header::decode(&bytes)
}

#[test]
fn the_fields_of_a_records_header_are_bounded() {
    let record = raw_record();
    let number = |at: usize, value: u64| header_with(&record, at, &value.to_le_bytes()).map(drop);
    let lsn = record.stamp.lsn.0;
    assert_eq!([number(48, u64::MAX), number(48, u64::MAX - 1)], [field("lsn"), Ok(())]);
    assert_eq!([number(72, lsn), number(72, lsn - 1), number(72, 0)], [field("durable lsn"), Ok(()), Ok(())]);
    let first = |lsn: u64| {
        let mut stamp = stamp(Kind::Mark);
        (stamp.lsn, stamp.durable) = (Lsn(lsn), Lsn(0));
        Header::decode(&record::seal(record::encode_note(b"x"), stamp).wire()).map(drop)
    };
    assert_eq!([first(0), first(1)], [field("lsn"), Ok(())]);
    let small = |at: usize, value: u32| header_with(&record, at, &value.to_le_bytes()).map(drop);
    assert_eq!([small(44, 0), small(44, 3), small(44, 4)], [Ok(()), Ok(()), field("flags")]);
    assert_eq!(
        [small(80, MAX_EXTENTS as u32), small(80, MAX_EXTENTS as u32 + 1)],
        [Ok(()), field("extents")]
    );
    assert_eq!(small(84, MAX_RAW as u32 + 1), field("stored"));
    assert_eq!(small(88, 1535), field("raw"));
    let packed = |at, value: u32| header_with(&zstd_record(), at, &value.to_le_bytes()).map(drop);
    let most = MAX_RAW as u32;
    assert_eq!([packed(84, most), packed(84, most + 1)], [Ok(()), field("stored")]);
    assert_eq!([packed(88, most), packed(88, most + 1)], [Ok(()), field("raw")]);
    for (at, put, told) in [(6, 3, "kind"), (7, 2, "codec"), (92, 1, "reserved")] {
        assert_eq!(header_with(&record, at, &[put]), field(told));
    }
    assert_eq!(header_with(&record, 4, &[2, 0]), Err(FormatError::Version(2)));
    assert_eq!(header_with(&record, 0, b"VREX"), Err(FormatError::Magic));
    // Only writes have extents, and only their payloads are packed.
    for kind in [1, 2] {
        assert_eq!(header_with(&record, 6, &[kind]), field("kind"));
        let mut one = mark_record().wire().to_vec();
        (one[6], one[7]) = (kind, 1);
        reseal_record(&mut one);
        assert_eq!(Header::decode(&one), field("kind"));
    }
    let mut wire = record.wire().to_vec();
    wire[100] ^= 1;
    assert_eq!(Header::decode(&wire), Err(FormatError::Checksum));
}

#[test]
fn the_largest_records_come_back() {
    let sectors = (MAX_RAW / 512) as u64;
    let large =
        record(vec![(extent(0, 0, sectors), Content::Data)], &pattern(MAX_RAW), None, stamp(Kind::Writes));
    let many: Vec<_> = (0..MAX_EXTENTS as u64).map(|i| (extent(0, i, 1), Content::Data)).collect();
    let many = record(many, &pattern(MAX_RAW), None, stamp(Kind::Writes));
    for made in [large, many] {
        let header = Header::decode(&made.wire()).unwrap();
        assert_eq!((header.len, header.len as u64), (made.wire().len(), made.wire_len()));
        assert!(header.len <= record::MAX_RECORD && made.padded_len() <= record::MAX_PADDED);
        let read = Record::decode(made.wire()).unwrap();
        assert_eq!(read.payload().unwrap(), pattern(MAX_RAW));
        assert_eq!(read.point(), made.point());
    }
}

#[test]
fn what_a_journal_holds_is_aligned_and_padded() {
    let record = raw_record();
    let bytes = record.journal_bytes();
    assert_eq!((bytes.len() as u64, bytes.len()), (record.padded_len(), 4096));
    for (before, behind) in [(0, 0), (8, 0), (0, 512), (8, 512)] {
        let mut buf = volrep::disk::aligned(0);
        buf.resize(before, 0);
        buf.extend_from_slice(&bytes);
        buf.resize(before + bytes.len() + behind, 7);
        let read = Record::decode(volrep::disk::freeze(buf).slice(before..)).unwrap();
        let again = read.journal_bytes();
        assert_eq!(again, bytes);
        assert!(again.as_ptr().addr().is_multiple_of(BLOCK as usize), "{before} {behind}");
    }
    assert_eq!([0, 1, 4096, 4097].map(record::padded), [0, 4096, 4096, 8192]);
}

fn packed(payload: &[u8], level: Option<i32>, compressor: &mut Compressor) -> Encoded {
    let mut buf = volrep::disk::aligned(0);
    buf.resize(record::room(1), 0);
    buf.extend_from_slice(payload);
    let extents = vec![(extent(0, 0, (payload.len() / 512) as u64), Content::Data)];
    record::encode(EncodeJob { extents, buf, level }, compressor)
}

/// Bytes that nothing compresses.
fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn a_payload_is_packed_only_if_that_pays() {
    let codec = |payload: &[u8]| {
        let encoded = packed(payload, Some(3), &mut Compressor::default());
        let room = encoded.padded_len();
        let record = record::seal(encoded, stamp(Kind::Writes));
        assert_eq!(record.padded_len(), room);
        assert_eq!(Record::decode(record.wire()).unwrap().payload().unwrap(), payload);
        record.codec
    };
    let partly = |zeroes: usize| [noise((64 << 10) - zeroes), vec![0; zeroes]].concat();
    assert_eq!(codec(&noise(64 << 10)), Codec::Raw);
    assert_eq!(codec(&partly(2 << 10)), Codec::Raw, "less than a sixteenth");
    assert_eq!(codec(&partly(8 << 10)), Codec::Zstd);
    assert_eq!(codec(&vec![0; 3072]), Codec::Raw, "the same block of a journal");
    assert_eq!(codec(&vec![0; 4096]), Codec::Zstd);
    let raw = record::seal(packed(&pattern(8192), None, &mut Compressor::default()), stamp(Kind::Writes));
    assert_eq!(raw.codec, Codec::Raw);
}

/// What it was used for before leaves nothing behind.
#[test]
fn a_compressor_packs_as_a_new_one_does() {
    let mut used = Compressor::default();
    for (len, level) in [(64 << 10, 1), (8 << 10, 19), (256 << 10, 19), (256 << 10, 1), (4 << 10, 1)] {
        let payload = pattern(len).iter().zip(noise(len)).map(|(a, b)| a ^ (b & 3)).collect::<Vec<_>>();
        let seal = |encoded| record::seal(encoded, stamp(Kind::Writes)).wire();
        let again = seal(packed(&payload, Some(level), &mut used));
        assert_eq!(again, seal(packed(&payload, Some(level), &mut Compressor::default())), "{len} {level}");
    }
}

#[test]
fn a_packed_payload_is_not_empty() {
    let frame = zstd::bulk::compress(&[], 1).unwrap();
    let honest = record(vec![(extent(0, 0, 9), Content::Zeroes)], &[], None, stamp(Kind::Writes));
    let mut bytes = [&honest.wire()[..], &frame].concat();
    bytes[7] = 1;
    bytes[84..88].copy_from_slice(&(frame.len() as u32).to_le_bytes());
    reseal_record(&mut bytes);
    assert!(Header::decode(&bytes).is_ok());
    assert_eq!(Record::decode(bytes.into()), field("raw"));
}

#[test]
fn zeroes_need_no_payload_whatever_the_level() {
    for level in [None, Some(3)] {
        let made = record(vec![(extent(0, 0, 9), Content::Zeroes)], &[], level, stamp(Kind::Writes));
        assert_eq!((made.codec, made.raw, made.wire_len()), (Codec::Raw, 0, record::room(1) as u64));
    }
}

#[test]
fn a_mark_is_one_visible_line() {
    let longest = "x".repeat(MAX_MARK);
    for good in ["a", "before batch 7", "\u{fc}", &longest] {
        assert!(is_mark(good), "{good}");
    }
    for bad in ["", " a", "a ", "a\nb", "\u{7f}", &format!("{longest}x")] {
        assert!(!is_mark(bad), "{bad:?}");
    }
    let sealed = |payload: &[u8], kind| record::seal(record::encode_note(payload), stamp(kind));
    assert_eq!(sealed(b"x", Kind::Mark).mark().as_deref(), Some("x"));
    assert_eq!([sealed(b"x", Kind::SyncSet).mark(), sealed(b" x", Kind::Mark).mark()], [None, None]);
    assert_eq!(sealed(b"\xff", Kind::Mark).mark(), None);
}

#[test]
fn the_members_of_a_sync_set_are_few_and_each_is_one() {
    let members = |ids: &[u64]| {
        let payload: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        record::seal(record::encode_note(&payload), stamp(Kind::SyncSet)).members()
    };
    let most: Vec<u64> = (1..=MAX_MEMBERS as u64).collect();
    for ids in [&[][..], &[5], &most] {
        assert_eq!(members(ids), Some(ids.iter().copied().map(NodeId).collect()));
    }
    let more: Vec<u64> = (1..=MAX_MEMBERS as u64 + 1).collect();
    for ids in [&more[..], &[0], &[5, 5], &[1, 0]] {
        assert_eq!(members(ids), None);
    }
    let odd = record::seal(record::encode_note(&[1; 9]), stamp(Kind::SyncSet));
    assert_eq!(odd.members(), None);
}

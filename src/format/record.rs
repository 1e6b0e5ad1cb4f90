//! The record: one sealed epoch, the same bytes in every journal and on every link.
//!
//! ```text
//!   0 magic "VREC"      4 version u16   6 kind u8   7 codec u8
//!   8 group [16]       24 generation: term counter u64, term node u64, start u32   44 flags u32
//!  48 lsn u64          56 time u64 (ns since 1970)   64 last write sequence u64
//!  72 durable lsn u64  80 extents u32   84 stored u32   88 raw u32   92 reserved u32 (0)
//!  96 payload hash [32] = blake3(extent table, stored payload)
//! 128 previous chain hash [32]
//! 160 chain hash [32] = blake3(bytes 0..160)
//! 192 extent table: per extent  address u64, sectors u32, kind u32 (0 data, 1 zeroes)
//!     stored payload: the data extents' bytes in table order, as the codec left them
//! extents ascend and are disjoint; a zstd payload is one frame that names its raw size
//! ```
//! In a journal a record starts on a 4096-byte boundary and is padded with zeroes to the next.
//!
//! Owns: this layout and the chain. Invariant: the chain hash covers every byte of the record and,
//! through the previous one, every record before it; equal chain hashes mean equal histories.

pub use super::codec::Compressor;
use super::fields::Reader;
use super::{FormatError, codec};
use crate::disk::{AlignedBuf, aligned};
use crate::units::{
    Address, BLOCK, Extent, Generation, GroupId, Hash, HistoryPoint, Lsn, NodeId, SECTOR, round_up,
};
use bytes::Bytes;

/// Bytes of the fixed header.
pub const HEADER: usize = 192;
/// Bytes of one extent table entry.
pub const ENTRY: usize = 16;
/// Most extents in one record (a 32 KiB table).
pub const MAX_EXTENTS: usize = 2048;
/// Most payload bytes in one record, before compression.
pub const MAX_RAW: usize = 1 << 20;
/// Most bytes of a whole record.
pub const MAX_RECORD: usize = HEADER + MAX_EXTENTS * ENTRY + MAX_RAW;
/// Most bytes that a record takes in a journal.
pub const MAX_PADDED: u64 = (MAX_RECORD as u64).div_ceil(BLOCK) * BLOCK;
/// Most members of a sync set.
pub const MAX_MEMBERS: usize = 64;
/// Longest text of a mark, bytes.
pub const MAX_MARK: usize = 200;
/// Longest zero extent, bytes (the sector count is 32 bits, kept even).
pub const MAX_ZERO: u64 = 1 << 40;

const MAGIC: [u8; 4] = *b"VREC";
const VERSION: u16 = 1;

/// What a record carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// An epoch's writes.
    Writes,
    /// The sync set from here on: payload is the list of node ids, 8 bytes each.
    SyncSet,
    /// A named place in the write order: payload is its text, see [`is_mark`].
    Mark,
}

/// How the payload is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Codec {
    /// As it is.
    Raw,
    /// One zstd frame.
    Zstd,
}

/// The record's flags.
pub mod flags {
    /// A FLUSH waits for this record: a shadow makes it durable at once.
    pub const SYNC: u32 = 1;
    /// First record of its generation.
    pub const OPENS: u32 = 2;
    /// Every defined flag.
    pub const ALL: u32 = 3;
}

/// What is written to an extent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Bytes in the payload.
    Data,
    /// Zeroes; nothing in the payload.
    Zeroes,
}

/// The fields of a header that its writer chooses.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Stamp {
    /// Group.
    pub group: GroupId,
    /// The run of the primary that sealed it.
    pub generation: Generation,
    /// Its number.
    pub lsn: Lsn,
    /// Chain hash of the record before.
    pub prev: Hash,
    /// Seal time, ns since 1970; never less than the record before's.
    pub time: u64,
    /// See [`flags`].
    pub flags: u32,
    /// Sequence of the last write included, in this or an earlier record.
    pub last_write: u64,
    /// The primary's durable LSN when it was sealed; below `lsn`.
    pub durable: Lsn,
    /// What it carries.
    pub kind: Kind,
}

/// Whether a mark may be called so: it is bounded, and one visible line.
pub fn is_mark(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_MARK && text.trim() == text && !text.chars().any(char::is_control)
}

/// A whole, verified record. Cloning shares the bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Its stamp.
    pub stamp: Stamp,
    /// How the payload is stored.
    pub codec: Codec,
    /// Payload bytes before compression.
    pub raw: u32,
    /// Chain hash.
    pub chain: Hash,
    extents: u32,
    len: u32,
    /// Header, table, payload and padding; the start is 4096-aligned when made by `seal`.
    bytes: Bytes,
}

/// The chain hash that stands before a group's first record.
pub fn origin(group: GroupId) -> Hash {
    Hash(*blake3::Hasher::new().update(b"volrep origin").update(&group.0).finalize().as_bytes())
}

/// Work for an encoder: gathered payload behind `room` bytes for the header and table.
#[derive(Debug)]
pub struct EncodeJob {
    /// The extents in order.
    pub extents: Vec<(Extent, Content)>,
    /// `room(extents.len())` bytes of anything, then the raw payload.
    pub buf: AlignedBuf,
    /// zstd level, or `None` to store raw.
    pub level: Option<i32>,
}

/// A payload ready to be sealed.
#[derive(Debug)]
pub struct Encoded {
    buf: AlignedBuf,
    extents: u32,
    codec: Codec,
    raw: u32,
    payload_hash: Hash,
}

impl Encoded {
    /// Bytes that the record will take in a journal.
    pub fn padded_len(&self) -> u64 {
        padded(self.buf.len()) as u64
    }
}

/// Bytes before the payload in a record of `extents` extents.
pub fn room(extents: usize) -> usize {
    HEADER + extents * ENTRY
}

/// Compresses if it pays (a sixteenth at least, and a block of the journal), writes the table, hashes.
///
/// # Panics
/// When `job` breaks its own rules (over [`MAX_EXTENTS`] or [`MAX_RAW`]); the caller builds it.
pub fn encode(job: EncodeJob, compressor: &mut Compressor) -> Encoded {
    let EncodeJob { extents, mut buf, level } = job;
    let room = room(extents.len());
    let raw = buf.len() - room;
    assert!(extents.len() <= MAX_EXTENTS && raw <= MAX_RAW, "an epoch is bounded when sealed");
    let mut codec = Codec::Raw;
    if let Some(level) = level {
        let whole = |payload: usize| padded(room + payload);
        let packed = compressor.compress(level, &buf[room..], raw - raw / 16);
        if let Some(packed) = packed.filter(|p| whole(p.len()) < whole(raw)) {
            let mut small = aligned(whole(packed.len()));
            small.resize(room, 0);
            small.extend_from_slice(packed);
            buf = small;
            codec = Codec::Zstd;
        }
    }
    for (entry, (extent, content)) in buf[HEADER..room].chunks_exact_mut(ENTRY).zip(&extents) {
        entry[..8].copy_from_slice(&extent.start().to_le_bytes());
        let sectors = u32::try_from(extent.len() / SECTOR).expect("an extent is bounded when sealed");
        entry[8..12].copy_from_slice(&sectors.to_le_bytes());
        entry[12..].copy_from_slice(&u32::from(*content == Content::Zeroes).to_le_bytes());
    }
    let payload_hash = Hash(*blake3::hash(&buf[HEADER..]).as_bytes());
    Encoded { extents: extents.len() as u32, codec, raw: raw as u32, payload_hash, buf }
}

/// A record without extents: its payload is stored raw.
pub fn encode_note(payload: &[u8]) -> Encoded {
    let mut buf = aligned(HEADER);
    buf.resize(HEADER, 0);
    buf.extend_from_slice(payload);
    encode(EncodeJob { extents: Vec::new(), buf, level: None }, &mut Compressor::default())
}

/// Writes the header over `encoded` and closes the chain.
pub fn seal(encoded: Encoded, stamp: Stamp) -> Record {
    let Encoded { mut buf, extents, codec, raw, payload_hash } = encoded;
    let len = buf.len();
    let stored = len - room(extents as usize);
    let h = &mut buf[..HEADER];
    h[..4].copy_from_slice(&MAGIC);
    h[4..6].copy_from_slice(&VERSION.to_le_bytes());
    h[6] = match stamp.kind {
        Kind::Writes => 0,
        Kind::SyncSet => 1,
        Kind::Mark => 2,
    };
    h[7] = match codec {
        Codec::Raw => 0,
        Codec::Zstd => 1,
    };
    h[8..24].copy_from_slice(&stamp.group.0);
    h[24..32].copy_from_slice(&stamp.generation.term.counter.to_le_bytes());
    h[32..40].copy_from_slice(&stamp.generation.term.node.0.to_le_bytes());
    h[40..44].copy_from_slice(&stamp.generation.start.to_le_bytes());
    h[44..48].copy_from_slice(&stamp.flags.to_le_bytes());
    h[48..56].copy_from_slice(&stamp.lsn.0.to_le_bytes());
    h[56..64].copy_from_slice(&stamp.time.to_le_bytes());
    h[64..72].copy_from_slice(&stamp.last_write.to_le_bytes());
    h[72..80].copy_from_slice(&stamp.durable.0.to_le_bytes());
    h[80..84].copy_from_slice(&extents.to_le_bytes());
    h[84..88].copy_from_slice(&(stored as u32).to_le_bytes());
    h[88..92].copy_from_slice(&raw.to_le_bytes());
    h[92..96].fill(0);
    h[96..128].copy_from_slice(&payload_hash.0);
    h[128..160].copy_from_slice(&stamp.prev.0);
    let chain = Hash(*blake3::hash(&h[..160]).as_bytes());
    h[160..192].copy_from_slice(&chain.0);
    buf.resize(padded(len), 0);
    let bytes = crate::disk::freeze(buf);
    Record { stamp, codec, raw, chain, extents, len: len as u32, bytes }
}

/// `len` rounded up to whole journal blocks.
pub fn padded(len: usize) -> usize {
    round_up(len as u64, BLOCK) as usize
}

/// The fields of a header whose own hash is right; says nothing yet of table and payload.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Its stamp.
    pub stamp: Stamp,
    /// Chain hash.
    pub chain: Hash,
    /// Bytes of the whole record, without padding; at most [`MAX_RECORD`].
    pub len: usize,
    codec: Codec,
    extents: u32,
    raw: u32,
    payload_hash: Hash,
}

impl Header {
    /// Reads and checks a header: its hash first, then each field's bounds.
    pub fn decode(bytes: &[u8]) -> Result<Header, FormatError> {
        let h = bytes.get(..HEADER).ok_or(FormatError::Short)?;
        let mut r = Reader(h);
        if r.array()? != MAGIC {
            return Err(FormatError::Magic);
        }
        if blake3::hash(&h[..160]).as_bytes()[..] != h[160..] {
            return Err(FormatError::Checksum);
        }
        let version = r.u16()?;
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let kind = match r.u8()? {
            0 => Kind::Writes,
            1 => Kind::SyncSet,
            2 => Kind::Mark,
            _ => return Err(FormatError::Field("kind")),
        };
        let codec = match r.u8()? {
            0 => Codec::Raw,
            1 => Codec::Zstd,
            _ => return Err(FormatError::Field("codec")),
        };
        let (group, generation, flags) = (r.group()?, r.generation()?, r.u32()?);
        let (lsn, time, last_write, durable) = (r.lsn()?, r.u64()?, r.u64()?, r.lsn()?);
        let (extents, stored, raw, reserved) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        let (payload_hash, prev, chain) = (r.hash()?, r.hash()?, r.hash()?);
        let bound = |ok: bool, name| if ok { Ok(()) } else { Err(FormatError::Field(name)) };
        bound(flags & !self::flags::ALL == 0, "flags")?;
        bound(lsn.0 > 0 && lsn.0 < u64::MAX, "lsn")?;
        bound(durable < lsn, "durable lsn")?;
        bound(extents as usize <= MAX_EXTENTS, "extents")?;
        bound(stored as usize <= MAX_RAW, "stored")?;
        bound(raw as usize <= MAX_RAW && (codec == Codec::Zstd || raw == stored), "raw")?;
        bound(reserved == 0, "reserved")?;
        bound(kind == Kind::Writes || (extents == 0 && codec == Codec::Raw), "kind")?;
        let len = room(extents as usize) + stored as usize;
        let stamp = Stamp { group, generation, lsn, prev, time, flags, last_write, durable, kind };
        Ok(Header { stamp, chain, len, codec, extents, raw, payload_hash })
    }
}

impl Record {
    /// Decodes and verifies a whole record at the start of `bytes` (padding beyond it is not looked at).
    /// Cheap to call on shared bytes: nothing is copied.
    pub fn decode(bytes: Bytes) -> Result<Record, FormatError> {
        let h = Header::decode(&bytes)?;
        let body = bytes.get(HEADER..h.len).ok_or(FormatError::Short)?;
        if *blake3::hash(body).as_bytes() != h.payload_hash.0 {
            return Err(FormatError::Checksum);
        }
        let record = Record {
            stamp: h.stamp,
            codec: h.codec,
            raw: h.raw,
            chain: h.chain,
            extents: h.extents,
            len: h.len as u32,
            bytes,
        };
        record.check_table()?;
        Ok(record)
    }

    /// The table is one that [`encode`] writes: extents ascend and are disjoint, and their data is all of
    /// the payload. Compressed, that is a single frame which says so itself.
    fn check_table(&self) -> Result<(), FormatError> {
        let bound = |ok: bool, name| if ok { Ok(()) } else { Err(FormatError::Field(name)) };
        let (mut data, mut last) = (0, None);
        for entry in self.table() {
            let (extent, content) = parse_entry(entry)?;
            if let Some(last) = last.replace(extent) {
                // Not by `end`: that of the last volume's last byte is 0.
                let after = extent.start().checked_sub(Extent::start(last));
                bound(after.is_some_and(|gap| gap >= last.len()), "extent order")?;
            }
            if content == Content::Data {
                data += extent.len();
            }
        }
        bound(self.stamp.kind != Kind::Writes || data == u64::from(self.raw), "raw")?;
        if self.codec == Codec::Zstd {
            let frame = &self.bytes[room(self.extents as usize)..self.len as usize];
            let says = zstd::zstd_safe::get_frame_content_size(frame).ok().flatten();
            bound(self.raw > 0 && says == Some(u64::from(self.raw)), "raw")?;
            bound(zstd::zstd_safe::find_frame_compressed_size(frame) == Ok(frame.len()), "stored")?;
        }
        Ok(())
    }

    /// The members that a record of kind [`Kind::SyncSet`] names, each once; `None` if it is malformed.
    pub fn members(&self) -> Option<Vec<NodeId>> {
        let payload = self.payload().ok()?;
        let ids = payload.chunks_exact(8);
        if !ids.remainder().is_empty() || payload.len() > 8 * MAX_MEMBERS {
            return None;
        }
        let ids: Vec<_> = ids.map(|id| NodeId(u64::from_le_bytes(id.try_into().expect("eight")))).collect();
        let once = ids.iter().enumerate().all(|(i, id)| id.0 != 0 && !ids[..i].contains(id));
        once.then_some(ids)
    }

    /// The text of a record of kind [`Kind::Mark`]; `None` if it is malformed, or of another kind.
    pub fn mark(&self) -> Option<String> {
        let text = String::from_utf8(self.payload().ok()?.to_vec()).ok()?;
        (self.stamp.kind == Kind::Mark && is_mark(&text)).then_some(text)
    }

    fn table(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes[HEADER..room(self.extents as usize)].chunks_exact(ENTRY)
    }

    /// This record's place in the history.
    pub fn point(&self) -> HistoryPoint {
        HistoryPoint { lsn: self.stamp.lsn, hash: self.chain }
    }

    /// Its extents, in the order of the payload.
    pub fn extents(&self) -> impl Iterator<Item = (Extent, Content)> {
        self.table().map(|e| parse_entry(e).expect("the table was checked when decoded"))
    }

    /// The bytes without padding: what a link carries.
    pub fn wire(&self) -> Bytes {
        self.bytes.slice(..self.len as usize)
    }

    /// The bytes with padding, 4096-aligned: what a journal holds. Copies only what does not lie so.
    pub fn journal_bytes(&self) -> Bytes {
        let padded = padded(self.len as usize);
        if self.bytes.len() == padded && self.bytes.as_ptr().addr().is_multiple_of(BLOCK as usize) {
            return self.bytes.clone();
        }
        let mut buf = aligned(padded);
        buf.extend_from_slice(&self.bytes[..self.len as usize]);
        buf.resize(padded, 0);
        crate::disk::freeze(buf)
    }

    /// Bytes it takes on a link.
    pub fn wire_len(&self) -> u64 {
        u64::from(self.len)
    }

    /// Bytes it takes in a journal.
    pub fn padded_len(&self) -> u64 {
        padded(self.len as usize) as u64
    }

    /// The payload as it was written: the data extents' bytes in table order, 4096-aligned if packed.
    pub fn payload(&self) -> Result<Bytes, FormatError> {
        let stored = self.bytes.slice(room(self.extents as usize)..self.len as usize);
        match self.codec {
            Codec::Raw => Ok(stored),
            Codec::Zstd => codec::unpack(&stored, self.raw as usize).ok_or(FormatError::Field("payload")),
        }
    }
}

fn parse_entry(entry: &[u8]) -> Result<(Extent, Content), FormatError> {
    let mut r = Reader(entry);
    let (start, sectors, kind) = (r.u64()?, r.u32()?, r.u32()?);
    let content = match kind {
        0 => Content::Data,
        1 => Content::Zeroes,
        _ => return Err(FormatError::Field("extent kind")),
    };
    let extent = Extent::new(Address(start), u64::from(sectors) * SECTOR);
    extent.map(|e| (e, content)).ok_or(FormatError::Field("extent"))
}

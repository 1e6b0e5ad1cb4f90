//! The superblock: who this node is, what it has promised, where its journal's redo starts.
//!
//! A file of two slots of [`SLOT`] bytes, written in turn; the valid slot with the higher sequence
//! is the truth. Layout of a slot: magic "VSUPERBK", version u16, length of the body u32, the body's
//! fields in the order of [`Superblock`], then blake3 over everything before it; the rest is zero.
//!
//! Owns: this layout. Invariant: a slot that a power cut tore never decodes, so the other slot stands.

use super::FormatError;
use super::fields::{Reader, Writer};
use super::message::{MAX_GENERATIONS, MAX_NAME, MAX_VOLUMES, Opening, Role};
use crate::disk::{aligned, freeze};
use crate::units::{BootId, Generation, GroupId, HistoryPoint, Lsn, MAX_VOLUME, NodeId, SECTOR, Term};
use bytes::Bytes;

/// Bytes of a slot.
pub const SLOT: usize = 64 << 10;
/// Most peers whose position is kept.
pub const MAX_PEERS: usize = 64;
const _: () = assert!(super::record::MAX_MEMBERS <= MAX_PEERS, "a sync set fits in the list");
const MAGIC: &[u8; 8] = b"VSUPERBK";
const VERSION: u16 = 1;
const HEAD: usize = 14;

/// A volume as the superblock knows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Its number: the top 8 bits of its addresses.
    pub number: u8,
    /// Bytes.
    pub size: u64,
    /// Its name within the group.
    pub name: String,
}

/// Where the journal lies in its file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of a segment; a multiple of 4096, at least 2 MiB.
    pub segment: u64,
    /// Number of segments, at least 4.
    pub segments: u32,
}

impl Geometry {
    /// Bytes of the journal's file.
    pub fn len(self) -> u64 {
        self.segment * u64::from(self.segments)
    }
    /// Never: a geometry has at least four segments.
    pub fn is_empty(self) -> bool {
        self.segments == 0
    }
}

/// What was last known of a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Who.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Last record durable there, as acknowledged.
    pub durable: Lsn,
    /// The journal is no longer held for it: it needs a resync.
    pub behind: bool,
}

/// A dirty map: which slot of the map file holds it, and after which record it begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MapRange {
    /// Slot.
    pub slot: u8,
    /// Every later record's extents are in it, or in a later range's.
    pub from: HistoryPoint,
}

/// Most dirty maps.
pub const MAX_MAPS: usize = 16;

/// The state that a node keeps beside its journal.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// Rises with each write; the higher valid slot wins.
    pub sequence: u64,
    /// Group.
    pub group: GroupId,
    /// This node.
    pub node: NodeId,
    /// Role.
    pub role: Role,
    /// Highest term seen: nothing is acknowledged under a lower one.
    pub term: Term,
    /// The last generation opened or followed.
    pub generation: Generation,
    /// Every record up to here is in the backing, durably: redo starts after it.
    pub checkpoint: HistoryPoint,
    /// Last write sequence of that record, in the numbering of its generation.
    pub checkpoint_write: u64,
    /// Generation of that record.
    pub checkpoint_generation: Generation,
    /// Segment (by sequence) that holds the record after the checkpoint, or will.
    pub checkpoint_segment: u64,
    /// A journal that ends before this LSN is damaged: it was durable here once.
    pub floor: Lsn,
    /// On a shadow: highest LSN known to be durable on the primary; nothing above may be applied.
    pub limit: Lsn,
    /// The images of all nodes are equal at LSN 0 because each was all zeroes then.
    pub blank: bool,
    /// The journal was closed with nothing in the write cache.
    pub clean: bool,
    /// The image is usable: false only while a first full copy runs.
    pub consistent: bool,
    /// Boot under which a write cache exists; zeroes: none does.
    pub cache_boot: BootId,
    /// Journal.
    pub geometry: Geometry,
    /// Volumes, in order of their numbers.
    pub volumes: Vec<Volume>,
    /// Openings known, oldest first; the newest [`MAX_GENERATIONS`].
    pub openings: Vec<Opening>,
    /// Dirty maps, oldest first; never empty once the node has started.
    pub maps: Vec<MapRange>,
    /// Members of the sync set.
    pub sync_set: Vec<NodeId>,
    /// Peers.
    pub peers: Vec<Peer>,
}

impl Superblock {
    /// The bytes of a slot, 4096-aligned.
    pub fn encode(&self) -> Bytes {
        let mut w = Writer(vec![0; HEAD]);
        w.u64(self.sequence).group(self.group).node(self.node);
        self.role.write(&mut w);
        w.term(self.term).generation(self.generation);
        w.point(self.checkpoint).u64(self.checkpoint_write);
        w.generation(self.checkpoint_generation).u64(self.checkpoint_segment);
        w.lsn(self.floor).lsn(self.limit);
        w.flag(self.blank).flag(self.clean).flag(self.consistent).bytes(&self.cache_boot);
        w.u64(self.geometry.segment).u32(self.geometry.segments);
        w.list(&self.volumes, |w, v| {
            w.u8(v.number).u64(v.size).name(&v.name);
        });
        w.list(&self.openings, |w, o| o.write(w));
        w.list(&self.maps, |w, m| {
            w.u8(m.slot).point(m.from);
        });
        w.list(&self.sync_set, |w, n| {
            w.node(*n);
        });
        w.list(&self.peers, |w, p| {
            w.node(p.node).name(&p.name).lsn(p.durable).flag(p.behind);
        });
        let body = (w.0.len() - HEAD) as u32;
        w.0[..8].copy_from_slice(MAGIC);
        w.0[8..10].copy_from_slice(&VERSION.to_le_bytes());
        w.0[10..14].copy_from_slice(&body.to_le_bytes());
        let hash = blake3::hash(&w.0);
        w.bytes(hash.as_bytes());
        let mut slot = aligned(SLOT);
        slot.extend_from_slice(&w.0);
        slot.resize(SLOT, 0);
        freeze(slot)
    }

    /// Reads a slot.
    pub fn decode(slot: &[u8]) -> Result<Superblock, FormatError> {
        let mut r = Reader(slot);
        if r.take(8)? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = r.u16()?;
        let body = r.u32()? as usize;
        if body > SLOT - HEAD - 32 {
            return Err(FormatError::Field("length"));
        }
        let covered = slot.get(..HEAD + body).ok_or(FormatError::Short)?;
        let sum = slot.get(HEAD + body..HEAD + body + 32).ok_or(FormatError::Short)?;
        if blake3::hash(covered).as_bytes() != sum {
            return Err(FormatError::Checksum);
        }
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let mut r = Reader(&covered[HEAD..]);
        let s = Self::read(&mut r)?;
        r.end()?;
        s.check()?;
        Ok(s)
    }

    fn read(r: &mut Reader) -> Result<Superblock, FormatError> {
        Ok(Superblock {
            sequence: r.u64()?,
            group: r.group()?,
            node: r.node()?,
            role: Role::read(r)?,
            term: r.term()?,
            generation: r.generation()?,
            checkpoint: r.point()?,
            checkpoint_write: r.u64()?,
            checkpoint_generation: r.generation()?,
            checkpoint_segment: r.u64()?,
            floor: r.lsn()?,
            limit: r.lsn()?,
            blank: r.flag("blank")?,
            clean: r.flag("clean")?,
            consistent: r.flag("consistent")?,
            cache_boot: r.array()?,
            geometry: Geometry { segment: r.u64()?, segments: r.u32()? },
            volumes: r.list(MAX_VOLUMES, "volumes", |r| {
                Ok(Volume { number: r.u8()?, size: r.u64()?, name: r.name(MAX_NAME, "volume name")? })
            })?,
            openings: r.list(MAX_GENERATIONS, "openings", Opening::read)?,
            maps: r.list(MAX_MAPS, "maps", |r| Ok(MapRange { slot: r.u8()?, from: r.point()? }))?,
            sync_set: r.list(MAX_PEERS, "sync set", Reader::node)?,
            peers: r.list(MAX_PEERS, "peers", |r| {
                Ok(Peer {
                    node: r.node()?,
                    name: r.name(MAX_NAME, "peer name")?,
                    durable: r.lsn()?,
                    behind: r.flag("behind")?,
                })
            })?,
        })
    }

    /// The bounds that everything later relies on.
    fn check(&self) -> Result<(), FormatError> {
        let bound = |ok: bool, name| if ok { Ok(()) } else { Err(FormatError::Field(name)) };
        let g = self.geometry;
        bound((2 << 20..=1 << 40).contains(&g.segment) && g.segment.is_multiple_of(4096), "segment size")?;
        bound((4..=1 << 20).contains(&g.segments), "segments")?;
        bound(!self.volumes.is_empty(), "volumes")?;
        bound(self.volumes.windows(2).all(|w| w[0].number < w[1].number), "volume numbers")?;
        let size = |v: &Volume| v.size > 0 && v.size <= MAX_VOLUME && v.size.is_multiple_of(SECTOR);
        bound(self.volumes.iter().all(size), "volume size")
    }

    /// Of two slots as read, the one that stands, and its index.
    pub fn choose(slots: [&[u8]; 2]) -> Result<(usize, Superblock), [FormatError; 2]> {
        match slots.map(Superblock::decode) {
            [Ok(a), Ok(b)] if b.sequence > a.sequence => Ok((1, b)),
            [Ok(a), _] => Ok((0, a)),
            [_, Ok(b)] => Ok((1, b)),
            [Err(a), Err(b)] => Err([a, b]),
        }
    }
}

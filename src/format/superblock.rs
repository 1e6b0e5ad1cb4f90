//! The superblock: who this node is, what it has promised, where its journal's redo starts.
//!
//! A file of two slots of [`SLOT`] bytes, written in turn; the valid slot with the higher sequence
//! is the truth. Layout of a slot: magic "VSUPERBK", version u16, length of the body u32, the body's
//! fields in the order of [`Superblock`], then blake3 over everything before it. Only the blocks that it
//! takes are written; what lies behind them in the slot means nothing.
//!
//! Owns: this layout. Invariant: a slot that a power cut tore never decodes, so the other slot stands.

use super::FormatError;
use super::fields::{Reader, Writer};
use super::message::{MAX_GENERATIONS, MAX_NAME, MAX_VOLUMES, Opening, Role};
use super::record::padded;
use crate::disk::{aligned, freeze};
use crate::units::{BootId, Generation, GroupId, HistoryPoint, Lsn, MAX_VOLUME, NodeId, SECTOR, Term};
use bytes::Bytes;

/// Bytes of a slot.
pub const SLOT: usize = 64 << 10;
/// Most peers whose position is kept.
pub const MAX_PEERS: usize = 64;
const _: () = assert!(super::record::MAX_MEMBERS <= MAX_PEERS, "a sync set fits in the list");
const MAGIC: &[u8; 8] = b"VSUPERBK";
/// Of this layout.
pub const VERSION: u16 = 5;
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
    #[expect(clippy::len_without_is_empty, reason = "a journal has at least four segments")]
    pub fn len(self) -> u64 {
        self.segment * u64::from(self.segments)
    }
}

/// A record, as whatever follows it needs to know it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Anchor {
    /// Its place in the history.
    pub point: HistoryPoint,
    /// Its generation.
    pub generation: Generation,
    /// Its last write sequence, in the numbering of its generation.
    pub last_write: u64,
    /// Its time, ns since 1970.
    pub time: u64,
}

/// How far a resync is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResyncStage {
    /// In place: the image in the backings is part old, part new.
    Copying,
    /// The backings hold the old image; what is new goes into the stage.
    Staging,
    /// The image is the stage over the backings; the one is being put into the others.
    Merging,
}

/// The image that the backings hold while a new one is staged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct OldImage {
    /// Its newest record.
    pub at: Anchor,
    /// The openings that led there.
    pub openings: Vec<Opening>,
    /// The sync set there.
    pub sync_set: Vec<NodeId>,
}

/// A shadow on its way to an image that its journal can't lead to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resync {
    /// Its number, of its own on this node: the stage belongs to it.
    pub job: u64,
    /// How far it is.
    pub stage: ResyncStage,
    /// The dirty maps since this point hold whatever may differ from the primary's image at the journal's
    /// base; `None`: everything may.
    pub since: Option<HistoryPoint>,
    /// Everything at a lower position has been compared, and what differed is in the new image, durably.
    pub progress: u64,
    /// All of it has; the new image needs the records up to here.
    pub compared: Option<Lsn>,
    /// While staging.
    pub old: Option<OldImage>,
}

/// When the image was last proved equal to the primary's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Verified {
    /// Wall clock, ns since 1970.
    pub time: u64,
    /// At this record.
    pub lsn: Lsn,
    /// Bytes that differed then, and were repaired.
    pub differences: u64,
}

/// A comparison that an administrator asked for, under way on a shadow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Comparison {
    /// Its number; the time at which it was asked for, ns since 1970.
    pub job: u64,
    /// Nothing is repaired.
    pub verify: bool,
    /// With the hash index.
    pub quick: bool,
    /// Bytes a second that each side may read; 0: no limit.
    pub rate: u64,
    /// Everything at a lower position has been compared, and what was repaired there is durable.
    pub progress: u64,
    /// Bytes in leaves that differed, so far.
    pub differ: u64,
    /// Bytes repaired.
    pub repaired: u64,
    /// Bytes that the index knew.
    pub skipped: u64,
    /// Bytes of messages.
    pub wire: u64,
    /// Nanoseconds that it has run.
    pub spent: u64,
}

/// A node that was a primary, or a shadow with records of its own, and is not any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Retired {
    /// Under which it was the primary; the default: it was none.
    pub term: Term,
    /// An administrator gave its own records up: they go into a salvage file, and it follows.
    pub rewinds: bool,
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
    /// It is in the middle of one: what it holds is not an image yet.
    pub resyncing: bool,
    /// Its last proof, as it told.
    pub verified: Option<Verified>,
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
    /// The journal begins after this record; what older segments hold is of another history, or was given up.
    pub base: Anchor,
    /// Segment (by sequence) that holds the record after the base, or will.
    pub base_segment: u64,
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
    /// The number that the dirty maps' file must bear: another file proves nothing.
    pub maps_id: u64,
    /// Dirty maps, oldest first; never empty once the node has started.
    pub maps: Vec<MapRange>,
    /// Members of the sync set.
    pub sync_set: Vec<NodeId>,
    /// Those that were members, were lost, and are not waited for any more; until they are members again. Of itself a
    /// shadow unlearns it from its primary's word alone.
    pub outdated: Vec<NodeId>,
    /// Peers.
    pub peers: Vec<Peer>,
    /// On a shadow that holds records which its primary may not have.
    pub retired: Option<Retired>,
    /// On a shadow that was the primary: the node to which it has handed its place over, and which has not said yet
    /// whether it took it.
    pub handed: Option<NodeId>,
    /// On a shadow: the resync under way.
    pub resync: Option<Resync>,
    /// On a shadow: the comparison under way. It is here before the first repair, and until all are durable.
    pub comparison: Option<Comparison>,
    /// On a shadow: its last proof.
    pub verified: Option<Verified>,
    /// On a shadow: bytes that the last comparison found to differ, and that it did not repair.
    pub unrepaired: u64,
    /// On a shadow that holds its image back: no later record was ever begun to be put into it. `None`: any may be.
    pub redo: Option<Lsn>,
    /// On a node that was promoted as of an earlier record, until it opens its generation: that record. What its
    /// journal holds behind it was given up.
    pub cut: Option<HistoryPoint>,
}

impl Anchor {
    pub(super) fn write(&self, w: &mut Writer) {
        w.point(self.point).generation(self.generation).u64(self.last_write).u64(self.time);
    }
    pub(super) fn read(r: &mut Reader) -> Result<Anchor, FormatError> {
        Ok(Anchor { point: r.point()?, generation: r.generation()?, last_write: r.u64()?, time: r.u64()? })
    }
}

impl Verified {
    fn write(&self, w: &mut Writer) {
        w.u64(self.time).lsn(self.lsn).u64(self.differences);
    }
    fn read(r: &mut Reader) -> Result<Verified, FormatError> {
        Ok(Verified { time: r.u64()?, lsn: r.lsn()?, differences: r.u64()? })
    }
}

impl Comparison {
    fn write(&self, w: &mut Writer) {
        w.u64(self.job).flag(self.verify).flag(self.quick).u64(self.rate).u64(self.progress);
        w.u64(self.differ).u64(self.repaired).u64(self.skipped).u64(self.wire).u64(self.spent);
    }
    fn read(r: &mut Reader) -> Result<Comparison, FormatError> {
        Ok(Comparison {
            job: r.u64()?,
            verify: r.flag("comparison verify")?,
            quick: r.flag("comparison quick")?,
            rate: r.u64()?,
            progress: r.u64()?,
            differ: r.u64()?,
            repaired: r.u64()?,
            skipped: r.u64()?,
            wire: r.u64()?,
            spent: r.u64()?,
        })
    }
}

impl Resync {
    fn write(&self, w: &mut Writer) {
        w.u64(self.job).u8(match self.stage {
            ResyncStage::Copying => 0,
            ResyncStage::Staging => 1,
            ResyncStage::Merging => 2,
        });
        w.option(self.since.as_ref(), |w, p| {
            w.point(*p);
        });
        w.u64(self.progress).option(self.compared.as_ref(), |w, lsn| {
            w.lsn(*lsn);
        });
        w.option(self.old.as_ref(), |w, old| {
            old.at.write(w);
            w.list(&old.openings, |w, o| o.write(w));
            w.list(&old.sync_set, |w, n| {
                w.node(*n);
            });
        });
    }
    fn read(r: &mut Reader) -> Result<Resync, FormatError> {
        let resync = Resync {
            job: r.u64()?,
            stage: match r.u8()? {
                0 => ResyncStage::Copying,
                1 => ResyncStage::Staging,
                2 => ResyncStage::Merging,
                _ => return Err(FormatError::Field("resync stage")),
            },
            since: r.option("resync since", Reader::point)?,
            progress: r.u64()?,
            compared: r.option("resync compared", Reader::lsn)?,
            old: r.option("old image", |r| {
                Ok(OldImage {
                    at: Anchor::read(r)?,
                    openings: r.list(MAX_GENERATIONS, "old openings", Opening::read)?,
                    sync_set: r.list(MAX_PEERS, "old sync set", Reader::node)?,
                })
            })?,
        };
        let kept = resync.old.is_some() == (resync.stage == ResyncStage::Staging);
        if kept { Ok(resync) } else { Err(FormatError::Field("old image")) }
    }
}

impl Superblock {
    /// The bytes for the front of a slot: 4096-aligned, whole blocks, at most [`SLOT`].
    pub fn encode(&self) -> Bytes {
        let mut w = Writer(vec![0; HEAD]);
        w.u64(self.sequence).group(self.group).node(self.node);
        self.role.write(&mut w);
        w.term(self.term).generation(self.generation);
        w.point(self.checkpoint).u64(self.checkpoint_write);
        w.generation(self.checkpoint_generation).u64(self.checkpoint_segment);
        self.base.write(&mut w);
        w.u64(self.base_segment);
        w.lsn(self.floor).lsn(self.limit);
        w.flag(self.blank).flag(self.clean).flag(self.consistent).bytes(&self.cache_boot);
        w.u64(self.geometry.segment).u32(self.geometry.segments);
        w.list(&self.volumes, |w, v| {
            w.u8(v.number).u64(v.size).name(&v.name);
        });
        w.list(&self.openings, |w, o| o.write(w));
        w.u64(self.maps_id).list(&self.maps, |w, m| {
            w.u8(m.slot).point(m.from);
        });
        w.list(&self.sync_set, |w, n| {
            w.node(*n);
        });
        w.list(&self.outdated, |w, n| {
            w.node(*n);
        });
        w.list(&self.peers, |w, p| {
            w.node(p.node).name(&p.name).lsn(p.durable).flag(p.behind).flag(p.resyncing);
            w.option(p.verified.as_ref(), |w, v| v.write(w));
        });
        w.option(self.retired.as_ref(), |w, r| {
            w.term(r.term).flag(r.rewinds);
        });
        w.option(self.handed.as_ref(), |w, n| {
            w.node(*n);
        });
        w.option(self.resync.as_ref(), |w, r| r.write(w));
        w.option(self.comparison.as_ref(), |w, c| c.write(w));
        w.option(self.verified.as_ref(), |w, v| v.write(w)).u64(self.unrepaired);
        w.option(self.redo.as_ref(), |w, lsn| {
            w.lsn(*lsn);
        });
        w.option(self.cut.as_ref(), |w, p| {
            w.point(*p);
        });
        let body = (w.0.len() - HEAD) as u32;
        w.0[..8].copy_from_slice(MAGIC);
        w.0[8..10].copy_from_slice(&VERSION.to_le_bytes());
        w.0[10..14].copy_from_slice(&body.to_le_bytes());
        let hash = blake3::hash(&w.0);
        w.bytes(hash.as_bytes());
        let mut slot = aligned(SLOT);
        slot.extend_from_slice(&w.0);
        slot.resize(padded(w.0.len()), 0);
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
            base: Anchor::read(r)?,
            base_segment: r.u64()?,
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
            maps_id: r.u64()?,
            maps: r.list(MAX_MAPS, "maps", |r| Ok(MapRange { slot: r.u8()?, from: r.point()? }))?,
            sync_set: r.list(MAX_PEERS, "sync set", Reader::node)?,
            outdated: r.list(MAX_PEERS, "outdated", Reader::node)?,
            peers: r.list(MAX_PEERS, "peers", |r| {
                Ok(Peer {
                    node: r.node()?,
                    name: r.name(MAX_NAME, "peer name")?,
                    durable: r.lsn()?,
                    behind: r.flag("behind")?,
                    resyncing: r.flag("resyncing")?,
                    verified: r.option("peer verified", Verified::read)?,
                })
            })?,
            retired: r.option("retired", |r| Ok(Retired { term: r.term()?, rewinds: r.flag("rewinds")? }))?,
            handed: r.option("handed", Reader::node)?,
            resync: r.option("resync", Resync::read)?,
            comparison: r.option("comparison", Comparison::read)?,
            verified: r.option("verified", Verified::read)?,
            unrepaired: r.u64()?,
            redo: r.option("redo", Reader::lsn)?,
            cut: r.option("cut", Reader::point)?,
        })
    }

    /// The bounds that everything later relies on.
    fn check(&self) -> Result<(), FormatError> {
        let bound = |ok: bool, name| if ok { Ok(()) } else { Err(FormatError::Field(name)) };
        let g = self.geometry;
        bound((2 << 20..=1 << 40).contains(&g.segment) && g.segment.is_multiple_of(4096), "segment size")?;
        bound((4..=1 << 20).contains(&g.segments), "segments")?;
        bound(self.base_segment > 0 && self.checkpoint_segment >= self.base_segment, "base segment")?;
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

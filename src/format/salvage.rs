//! A salvage file: the records that a node has given up, as they were.
//!
//! ```text
//! 0 magic "VSALVAGE"  8 version u16  10 length of the fields u32  14 fields of [`Head`], then blake3 of all that
//! records, one after the other, each as long as its header says (see `format::record`)
//! magic "VSALVEND"  records u64  last lsn u64  blake3 of these 24 bytes
//! ```
//! Owns: this layout. Invariant: every record in it carries its own hashes; a file without its end was not
//! finished, and what it holds up to there is right all the same.

use super::FormatError;
use super::fields::{Reader, Writer};
use super::message::{MAX_NAME, MAX_VOLUMES};
use super::superblock::Volume;
use crate::units::{GroupId, HistoryPoint, Lsn, NodeId, Term};

const MAGIC: &[u8; 8] = b"VSALVAGE";
const END: &[u8; 8] = b"VSALVEND";
const VERSION: u16 = 1;
const FIXED: usize = 14;
/// Most bytes of a head.
pub const MAX_HEAD: usize = 64 << 10;
/// Bytes of a trailer.
pub const TRAILER: usize = 56;

/// Whose records they are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Head {
    /// Group.
    pub group: GroupId,
    /// The node that gave them up.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// The term under which it was the primary; the default: it was none.
    pub term: Term,
    /// The last record that is known to be the primary's, too; `None`: none is. The file may begin later: where the
    /// node's journal did.
    pub fork: Option<HistoryPoint>,
    /// The last record that it held.
    pub last: HistoryPoint,
    /// When it gave them up, ns since 1970.
    pub time: u64,
    /// Volumes.
    pub volumes: Vec<Volume>,
}

/// The end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Trailer {
    /// Records in the file.
    pub records: u64,
    /// The last one.
    pub last: Lsn,
}

impl Head {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer(vec![0; FIXED]);
        w.group(self.group).node(self.node).name(&self.name).term(self.term);
        w.option(self.fork.as_ref(), |w, p| {
            w.point(*p);
        });
        w.point(self.last).u64(self.time).list(&self.volumes, |w, v| {
            w.u8(v.number).u64(v.size).name(&v.name);
        });
        let len = (w.0.len() - FIXED) as u32;
        w.0[..8].copy_from_slice(MAGIC);
        w.0[8..10].copy_from_slice(&VERSION.to_le_bytes());
        w.0[10..14].copy_from_slice(&len.to_le_bytes());
        let hash = blake3::hash(&w.0);
        w.bytes(hash.as_bytes());
        w.0
    }

    /// Reads the head of a file; the bytes that it takes.
    pub fn decode(file: &[u8]) -> Result<(Head, usize), FormatError> {
        let mut r = Reader(file);
        if r.take(8)? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = r.u16()?;
        let end = FIXED + r.u32()? as usize;
        if end > MAX_HEAD {
            return Err(FormatError::Field("length"));
        }
        let covered = file.get(..end).ok_or(FormatError::Short)?;
        let sum = file.get(end..end + 32).ok_or(FormatError::Short)?;
        if blake3::hash(covered).as_bytes() != sum {
            return Err(FormatError::Checksum);
        }
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let mut r = Reader(&covered[FIXED..]);
        let head = Head {
            group: r.group()?,
            node: r.node()?,
            name: r.name(MAX_NAME, "node name")?,
            term: r.term()?,
            fork: r.option("fork", Reader::point)?,
            last: r.point()?,
            time: r.u64()?,
            volumes: r.list(MAX_VOLUMES, "volumes", |r| {
                Ok(Volume { number: r.u8()?, size: r.u64()?, name: r.name(MAX_NAME, "volume name")? })
            })?,
        };
        r.end()?;
        Ok((head, end + 32))
    }
}

impl Trailer {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer(END.to_vec());
        w.u64(self.records).lsn(self.last);
        let hash = blake3::hash(&w.0);
        w.bytes(hash.as_bytes());
        w.0
    }

    /// Reads one, if these are its bytes.
    pub fn decode(bytes: &[u8]) -> Result<Trailer, FormatError> {
        let mut r = Reader(bytes);
        if r.take(8)? != END {
            return Err(FormatError::Magic);
        }
        let trailer = Trailer { records: r.u64()?, last: r.lsn()? };
        let sum: [u8; 32] = r.array()?;
        if blake3::hash(&bytes[..24]).as_bytes() != &sum {
            return Err(FormatError::Checksum);
        }
        Ok(trailer)
    }
}

//! What a shadow and its primary say to each other while they compare their images.
//!
//! The volumes are compared in **windows** of up to [`WINDOW`] bytes. Over each lies a tree: a root per
//! window, a root per [`EXTENT`], a hash per [`LEAF`]; only where roots differ do the two descend. The
//! shadow asks, the primary answers; a window has a number that the shadow chooses.
//!
//! Owns: this layout. Invariant: every list is bounded by what one window can hold before it is read.

use super::FormatError;
use super::fields::{Reader, Writer};
use crate::units::{Address, BLOCK, Extent, Lsn};
use bytes::Bytes;

/// Bytes of a leaf: what differs is sent in these.
pub const LEAF: u64 = BLOCK;
/// Bytes under one root of the middle level.
pub const EXTENT: u64 = 64 << 10;
/// Bytes of the largest window.
pub const WINDOW: u64 = 32 << 20;
/// Leaves of an extent.
pub const EXTENT_LEAVES: usize = (EXTENT / LEAF) as usize;
/// Extents of the largest window.
pub const WINDOW_EXTENTS: usize = (WINDOW / EXTENT) as usize;
/// Leaves of the largest window.
pub const WINDOW_LEAVES: usize = (WINDOW / LEAF) as usize;
/// Most leaves in one [`Compare::Data`].
pub const MAX_BATCH: usize = 128;
/// Longest [`Compare::Report`], bytes.
pub const MAX_REPORT: usize = 512 << 10;

/// A root: the first 16 bytes of a hash.
pub type Root = [u8; 16];

/// The leaves of one extent.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ExtentLeaves {
    /// Which extent of the window.
    pub index: u16,
    /// Per leaf, the sectors written since the window was opened: bit `i` is sector `i`.
    pub touched: [u8; EXTENT_LEAVES],
    /// Per leaf, the first 8 bytes of its hash.
    pub hashes: [u64; EXTENT_LEAVES],
    /// The bytes are not those that the index says were written.
    pub rotten: bool,
}

/// A run of leaves: the first, and how many.
pub type Run = (u16, u16);

/// One word of the comparison.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Compare {
    /// Shadow: I begin with this window.
    Open {
        /// Its number.
        window: u32,
        /// What it covers; starts at a multiple of [`EXTENT`], at most [`WINDOW`].
        extent: Extent,
        /// Bitmap of the extents that are to be compared, the others are passed over; empty: all.
        wanted: Vec<u8>,
        /// Roots that the hash index knows need not be read.
        quick: bool,
    },
    /// Primary: my journal ends here; what is written later counts as touched.
    At {
        /// Its number.
        window: u32,
        /// Its journal's newest record.
        lsn: Lsn,
    },
    /// Primary: the window's root. Touched extents count as zeroes in it.
    Root {
        /// Its number.
        window: u32,
        /// Bitmap of the extents with touched sectors.
        touched: Vec<u8>,
        /// Root.
        root: Root,
        /// Extents whose bytes are not those that the index says were written, as far as they were read.
        rotten: Vec<u16>,
    },
    /// Shadow: the roots of its extents?
    AskRoots {
        /// Its number.
        window: u32,
    },
    /// Primary: here, all of them.
    Roots {
        /// Its number.
        window: u32,
        /// One per extent; zeroes for those not wanted.
        roots: Vec<Root>,
    },
    /// Shadow: the leaves of these extents?
    AskLeaves {
        /// Its number.
        window: u32,
        /// Which, ascending.
        extents: Vec<u16>,
    },
    /// Primary: here, in that order (perhaps in several messages).
    Leaves {
        /// Its number.
        window: u32,
        /// Them.
        extents: Vec<ExtentLeaves>,
    },
    /// Shadow: the bytes of these leaves?
    AskData {
        /// Its number.
        window: u32,
        /// Number of the batch in the window.
        batch: u32,
        /// At most [`MAX_BATCH`] leaves, ascending.
        runs: Vec<Run>,
    },
    /// Primary: here.
    Data {
        /// Its number.
        window: u32,
        /// The batch.
        batch: u32,
        /// Per leaf asked for, its touched sectors: their bytes may be newer than the window.
        touched: Vec<u8>,
        /// The bytes, one zstd frame.
        payload: Bytes,
    },
    /// Shadow: I am done with it.
    Close {
        /// Its number.
        window: u32,
    },
    /// Primary: once this record is in the shadow's image, what was passed over as touched is as it is here.
    Closed {
        /// Its number.
        window: u32,
        /// The newest record that may hold such a write; 0: there is none.
        lsn: Lsn,
    },
    /// Primary: a window can't be compared; the comparison has failed.
    Fail {
        /// Why.
        text: String,
    },
    /// Primary: an administrator asks here for a comparison.
    Begin {
        /// Trust the hash index.
        quick: bool,
        /// Only compare.
        verify: bool,
        /// Bytes a second; 0: no limit.
        rate: u64,
        /// A resync may spoil the old image: it is made without a stage.
        in_place: bool,
        /// A shadow that holds its image back gives that up for as long.
        suspend_delay: bool,
    },
    /// Primary: and to end it.
    Stop,
    /// Shadow: how it stands, as JSON of `node::status::RefreshStatus`.
    Report {
        /// At most [`MAX_REPORT`] bytes.
        json: Bytes,
    },
}

const BITMAP: usize = WINDOW_EXTENTS / 8;

fn bytes(r: &mut Reader, max: usize, field: &'static str) -> Result<Vec<u8>, FormatError> {
    let len = r.u32()? as usize;
    if len > max {
        return Err(FormatError::Field(field));
    }
    Ok(r.take(len)?.to_vec())
}

fn put(w: &mut Writer, bytes: &[u8]) {
    w.u32(bytes.len() as u32).bytes(bytes);
}

impl ExtentLeaves {
    fn write(&self, w: &mut Writer) {
        w.u16(self.index).bytes(&self.touched).flag(self.rotten);
        for hash in self.hashes {
            w.u64(hash);
        }
    }
    fn read(r: &mut Reader) -> Result<ExtentLeaves, FormatError> {
        let (index, touched, rotten) = (r.u16()?, r.array()?, r.flag("rotten")?);
        let mut hashes = [0; EXTENT_LEAVES];
        for hash in &mut hashes {
            *hash = r.u64()?;
        }
        Ok(ExtentLeaves { index, touched, hashes, rotten })
    }
}

impl Compare {
    /// Appends the body.
    pub fn write(&self, w: &mut Writer) {
        let mut head = |kind: u8, window: &u32| {
            w.u8(kind).u32(*window);
        };
        match self {
            Compare::Open { window, extent, wanted, quick } => {
                head(1, window);
                w.u64(extent.start()).u64(extent.len()).flag(*quick);
                put(w, wanted);
            }
            Compare::At { window, lsn } => {
                head(2, window);
                w.lsn(*lsn);
            }
            Compare::Root { window, touched, root, rotten } => {
                head(3, window);
                put(w, touched);
                w.bytes(root).list(rotten, |w, i| {
                    w.u16(*i);
                });
            }
            Compare::AskRoots { window } => head(4, window),
            Compare::Roots { window, roots } => {
                head(5, window);
                w.list(roots, |w, root| {
                    w.bytes(root);
                });
            }
            Compare::AskLeaves { window, extents } => {
                head(6, window);
                w.list(extents, |w, i| {
                    w.u16(*i);
                });
            }
            Compare::Leaves { window, extents } => {
                head(7, window);
                w.list(extents, |w, e| e.write(w));
            }
            Compare::AskData { window, batch, runs } => {
                head(8, window);
                w.u32(*batch).list(runs, |w, (first, count)| {
                    w.u16(*first).u16(*count);
                });
            }
            Compare::Data { window, batch, touched, payload } => {
                head(9, window);
                w.u32(*batch);
                put(w, touched);
                put(w, payload);
            }
            Compare::Close { window } => head(10, window),
            Compare::Closed { window, lsn } => {
                head(11, window);
                w.lsn(*lsn);
            }
            Compare::Fail { text } => {
                head(12, &0);
                put(w, text.as_bytes());
            }
            Compare::Begin { quick, verify, rate, in_place, suspend_delay } => {
                head(13, &0);
                w.flag(*quick).flag(*verify).u64(*rate).flag(*in_place).flag(*suspend_delay);
            }
            Compare::Stop => head(14, &0),
            Compare::Report { json } => {
                head(15, &0);
                put(w, json);
            }
        }
    }

    /// Reads a body.
    pub fn read(r: &mut Reader) -> Result<Compare, FormatError> {
        let (kind, window) = (r.u8()?, r.u32()?);
        if kind > 11 && window != 0 {
            return Err(FormatError::Field("window"));
        }
        Ok(match kind {
            1 => {
                let (start, len, quick) = (r.u64()?, r.u64()?, r.flag("quick")?);
                let extent = Extent::new(Address(start), len)
                    .filter(|e| e.len() <= WINDOW && e.address().offset().is_multiple_of(EXTENT));
                let extent = extent.ok_or(FormatError::Field("window"))?;
                Compare::Open { window, extent, wanted: bytes(r, BITMAP, "wanted")?, quick }
            }
            2 => Compare::At { window, lsn: r.lsn()? },
            3 => Compare::Root {
                window,
                touched: bytes(r, BITMAP, "touched")?,
                root: r.array()?,
                rotten: r.list(WINDOW_EXTENTS, "rotten", Reader::u16)?,
            },
            4 => Compare::AskRoots { window },
            5 => Compare::Roots { window, roots: r.list(WINDOW_EXTENTS, "roots", Reader::array)? },
            6 => Compare::AskLeaves { window, extents: r.list(WINDOW_EXTENTS, "extents", Reader::u16)? },
            7 => Compare::Leaves { window, extents: r.list(WINDOW_EXTENTS, "leaves", ExtentLeaves::read)? },
            8 => Compare::AskData {
                window,
                batch: r.u32()?,
                runs: r.list(MAX_BATCH, "runs", |r| Ok((r.u16()?, r.u16()?)))?,
            },
            9 => Compare::Data {
                window,
                batch: r.u32()?,
                touched: bytes(r, MAX_BATCH, "touched")?,
                payload: bytes(r, MAX_BATCH * LEAF as usize + (64 << 10), "payload")?.into(),
            },
            10 => Compare::Close { window },
            11 => Compare::Closed { window, lsn: r.lsn()? },
            12 => {
                let text = bytes(r, super::message::MAX_TEXT, "text")?;
                Compare::Fail { text: String::from_utf8(text).map_err(|_| FormatError::Field("text"))? }
            }
            13 => Compare::Begin {
                quick: r.flag("quick")?,
                verify: r.flag("verify")?,
                rate: r.u64()?,
                in_place: r.flag("in place")?,
                suspend_delay: r.flag("suspend delay")?,
            },
            14 => Compare::Stop,
            15 => Compare::Report { json: bytes(r, MAX_REPORT, "report")?.into() },
            _ => return Err(FormatError::Field("word")),
        })
    }

    /// The window that it is about.
    pub fn window(&self) -> Option<u32> {
        match self {
            Compare::Open { window, .. }
            | Compare::At { window, .. }
            | Compare::Root { window, .. }
            | Compare::AskRoots { window }
            | Compare::Roots { window, .. }
            | Compare::AskLeaves { window, .. }
            | Compare::Leaves { window, .. }
            | Compare::AskData { window, .. }
            | Compare::Data { window, .. }
            | Compare::Close { window }
            | Compare::Closed { window, .. } => Some(*window),
            Compare::Fail { .. } | Compare::Begin { .. } | Compare::Stop | Compare::Report { .. } => None,
        }
    }

    /// Bytes of the body, about: what it costs on the link.
    pub fn wire_len(&self) -> u64 {
        let body = match self {
            Compare::Open { wanted, .. } => 25 + wanted.len(),
            Compare::Root { touched, rotten, .. } => 26 + touched.len() + 2 * rotten.len(),
            Compare::Roots { roots, .. } => 2 + 16 * roots.len(),
            Compare::AskLeaves { extents, .. } => 2 + 2 * extents.len(),
            Compare::Leaves { extents, .. } => 2 + extents.len() * (3 + 9 * EXTENT_LEAVES),
            Compare::AskData { runs, .. } => 6 + 4 * runs.len(),
            Compare::Data { touched, payload, .. } => 12 + touched.len() + payload.len(),
            Compare::Report { json } => json.len(),
            _ => 12,
        };
        (super::message::FRAME + 5 + body) as u64
    }
}

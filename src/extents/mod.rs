//! Sets of extents: a map from address ranges to what lies there, and a bitmap of granules.
//!
//! Owns: splitting and overlapping of ranges, once, for the cache index, open epochs, overlays and
//! dirty maps. Invariant: the ranges of a map never overlap and are never empty.

mod bitmap;
mod map;

pub use bitmap::Bitmap;
pub use map::{ExtentMap, Piece};

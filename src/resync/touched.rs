//! Which sectors of a window were written since it was opened.
//!
//! Owns: eight bits per leaf, once there are any. Invariant: a bit that is set is never cleared.

use super::{extents, leaves};
use crate::format::compare::{EXTENT_LEAVES, LEAF};
use crate::units::{Extent, SECTOR};

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Touched {
    window: Extent,
    masks: Vec<u8>,
}

impl Touched {
    /// Nothing is touched.
    pub fn new(window: Extent) -> Touched {
        Touched { window, masks: Vec::new() }
    }

    /// Marks the part of `extent` that lies in the window.
    pub fn touch(&mut self, extent: Extent) {
        if extent.address().volume() != self.window.address().volume() {
            return;
        }
        // Offsets, not ends: that of the last volume's last byte is 0.
        let (base, len) = (self.window.address().offset(), self.window.len());
        let start = extent.address().offset().max(base) - base;
        let end = (extent.address().offset() + extent.len()).clamp(base, base + len) - base;
        if start >= end {
            return;
        }
        if self.masks.is_empty() {
            self.masks = vec![0; leaves(self.window)];
        }
        for leaf in start / LEAF..end.div_ceil(LEAF) {
            let first = start.max(leaf * LEAF) - leaf * LEAF;
            let last = end.min((leaf + 1) * LEAF) - leaf * LEAF;
            let bits = ((1u16 << (last / SECTOR)) - (1u16 << (first / SECTOR))) as u8;
            self.masks[leaf as usize] |= bits;
        }
    }

    /// The touched sectors of a leaf: bit `i` is sector `i`.
    pub fn leaf(&self, leaf: usize) -> u8 {
        self.masks.get(leaf).copied().unwrap_or(0)
    }

    /// The masks of an extent's leaves.
    pub fn extent(&self, index: usize) -> [u8; EXTENT_LEAVES] {
        std::array::from_fn(|i| self.masks.get(index * EXTENT_LEAVES + i).copied().unwrap_or(0))
    }

    /// Nothing is touched at all.
    pub fn is_clean(&self) -> bool {
        self.masks.is_empty()
    }

    /// Whether any sector of an extent is touched.
    pub fn is_touched(&self, index: usize) -> bool {
        let from = (index * EXTENT_LEAVES).min(self.masks.len());
        let to = (from + EXTENT_LEAVES).min(self.masks.len());
        self.masks[from..to].iter().any(|m| *m != 0)
    }

    /// A bit for each extent of the window that is touched.
    pub fn extents(&self) -> Vec<u8> {
        let mut bits = vec![0; extents(self.window).div_ceil(8)];
        if !self.is_clean() {
            let touched = (0..extents(self.window)).filter(|i| self.is_touched(*i));
            touched.for_each(|i| bits[i / 8] |= 1 << (i % 8));
        }
        bits
    }
}

/// All the sectors that a leaf of the window has: fewer in the last leaf of an odd volume.
pub fn whole(window: Extent, leaf: usize) -> u8 {
    let len = (window.len() - leaf as u64 * LEAF).min(LEAF);
    ((1u16 << (len / SECTOR)) - 1) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Address;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_an_array(
            writes in prop::collection::vec((0u64..200, 1u64..60), 0..12), size in 1u64..170, volume in 0u8..2
        ) {
            let at = |v, sector: u64, n: u64| Extent::new(Address::new(v, sector * SECTOR).unwrap(), n * SECTOR);
            let window = at(255, 32, size).unwrap();
            let mut touched = Touched::new(window);
            let mut model = vec![false; size as usize];
            for (start, len) in writes {
                touched.touch(at(254 + volume, start, len).unwrap());
                for sector in start..start + len {
                    if volume == 1 && (32..32 + size).contains(&sector) {
                        model[(sector - 32) as usize] = true;
                    }
                }
            }
            for (sector, expected) in model.iter().enumerate() {
                prop_assert_eq!(touched.leaf(sector / 8) >> (sector % 8) & 1 == 1, *expected);
            }
            for leaf in 0..leaves(window) {
                prop_assert_eq!(touched.leaf(leaf) & !whole(window, leaf), 0);
            }
        }
    }
}

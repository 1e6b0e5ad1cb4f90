//! The stage: what is new of an image that is not shown yet, beside the old one in the backings.
//!
//! Per volume a sparse file of its size holds the new sectors at their own places; a bitmap in mapped
//! memory, a bit per sector, says which these are. (256 MiB of file per TiB of volume; memory only where
//! something is staged.) The first block of the bitmap's file names group, node and resync, so another
//! one's stage is never taken for it.
//!
//! Owns: the bitmap. Invariant: a sector is marked only after it was written; its mark is durable before
//! a checkpoint that relies on it. A mark that a crash lost is made again by redo, or by the comparison.

use crate::disk::Memory;
use crate::extents::Bitmap;
use crate::format::mapped::{HEAD, Owner};
use crate::units::{Address, BLOCK, Extent, SECTOR, round_up};

const MAGIC: &[u8; 8] = b"VSTAGING";

/// Bytes of the bitmap's file for volumes of these (number, bytes).
pub fn stage_len(volumes: &[(u8, u64)]) -> u64 {
    HEAD + volumes.iter().map(|(_, size)| bitmap_len(*size)).sum::<u64>()
}

fn bitmap_len(size: u64) -> u64 {
    round_up((size / SECTOR).div_ceil(8), BLOCK)
}

/// See the module's documentation.
pub struct Stage {
    memory: Box<dyn Memory>,
    /// (number, size, offset of its bits).
    volumes: Vec<(u8, u64, usize)>,
}

impl Stage {
    /// Takes up a stage's bitmap. A `fresh` one is all zeroes and becomes `id`'s; of another one, `None`
    /// unless it is `id`'s.
    pub fn new(mut memory: Box<dyn Memory>, volumes: &[(u8, u64)], id: Owner, fresh: bool) -> Option<Stage> {
        if (memory.bytes().len() as u64) < stage_len(volumes) {
            return None;
        }
        if fresh {
            id.claim(MAGIC, memory.bytes_mut());
        } else if !id.owns(MAGIC, memory.bytes()) {
            return None;
        }
        let mut at = HEAD as usize;
        let place = |(number, size): &(u8, u64)| {
            let offset = at;
            at += bitmap_len(*size) as usize;
            (*number, *size, offset)
        };
        Some(Stage { memory, volumes: volumes.iter().map(place).collect() })
    }

    fn volume(&self, number: u8) -> Option<(u64, usize)> {
        self.volumes.iter().find(|(n, ..)| *n == number).map(|(_, size, offset)| (*size, *offset))
    }

    fn bits(&self, number: u8) -> Bitmap<&[u8]> {
        let (size, offset) = self.volume(number).unwrap_or((0, HEAD as usize));
        Bitmap(&self.memory.bytes()[offset..offset + bitmap_len(size) as usize])
    }

    /// What was written lies in the stage from now on.
    pub fn mark(&mut self, extent: Extent) {
        let Some((size, offset)) = self.volume(extent.address().volume()) else { return };
        let first = extent.address().offset() / SECTOR;
        let last = first + extent.len() / SECTOR - 1;
        let bits = &mut self.memory.bytes_mut()[offset..offset + bitmap_len(size) as usize];
        Bitmap(bits).set(first, last);
    }

    /// The parts of `extent`, in order, each with whether it lies in the stage.
    pub fn parts(&self, extent: Extent) -> Vec<(Extent, bool)> {
        let bits = self.bits(extent.address().volume());
        let (start, count) = (extent.address().offset() / SECTOR, extent.len() / SECTOR);
        let mut parts = Vec::new();
        let mut at = 0;
        while at < count {
            let staged = bits.get(start + at);
            let len = bits.same(start + at, start + count);
            let part = Extent::between(extent.start() + at * SECTOR, extent.start() + (at + len) * SECTOR);
            parts.push((part.expect("whole sectors within the extent"), staged));
            at += len;
        }
        parts
    }

    /// The first extent in the stage that begins at or after position `from`, cut to `most` bytes; none:
    /// that was the last one.
    pub fn next(&self, from: u64, most: u64) -> Option<Extent> {
        for (number, size, _) in &self.volumes {
            let base = Address::new(*number, 0)?.0;
            let (bits, sectors) = (self.bits(*number), size / SECTOR);
            // Nothing of it is left when `from` lies behind it.
            let mut at = from.saturating_sub(base).div_ceil(SECTOR).min(sectors);
            if !bits.get(at) {
                at += bits.same(at, sectors);
            }
            if at < sectors {
                let len = bits.same(at, sectors.min(at + most / SECTOR));
                return Extent::new(Address(base + at * SECTOR), len * SECTOR);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GroupId, NodeId};
    use proptest::prelude::*;

    const VOLUMES: [(u8, u64); 2] = [(0, 300 * SECTOR), (255, 77 * SECTOR)];

    fn id(number: u64) -> Owner {
        Owner { group: GroupId([1; 16]), node: NodeId(2), number }
    }

    fn memory() -> Box<dyn Memory> {
        Box::new(vec![0; stage_len(&VOLUMES) as usize])
    }

    fn extent(volume: u8, sector: u64, sectors: u64) -> Extent {
        Extent::new(Address::new(volume, sector * SECTOR).unwrap(), sectors * SECTOR).unwrap()
    }

    #[test]
    fn a_bitmap_has_a_bit_for_each_sector_and_no_less() {
        let bits = 8 * BLOCK;
        assert_eq!(stage_len(&[]), HEAD);
        assert_eq!(stage_len(&[(0, SECTOR)]), HEAD + BLOCK);
        let volumes = [(0, bits * SECTOR), (1, (bits + 1) * SECTOR)];
        assert_eq!(stage_len(&volumes), HEAD + 3 * BLOCK);
        let made = |len| Stage::new(Box::new(vec![0; len as usize]), &volumes, id(1), true).is_some();
        assert!(made(HEAD + 3 * BLOCK) && !made(HEAD + 3 * BLOCK - 1));
        // Each volume has its own.
        let memory = Box::new(vec![0; stage_len(&volumes) as usize]);
        let mut stage = Stage::new(memory, &volumes, id(1), true).unwrap();
        let last = extent(1, bits, 1);
        stage.mark(last);
        assert_eq!(stage.next(0, 1 << 20), Some(last));
        assert_eq!(
            (stage.parts(extent(0, 0, 9)), stage.parts(last)),
            (vec![(extent(0, 0, 9), false)], vec![(last, true)])
        );
    }

    #[test]
    fn another_ones_stage_is_not_taken_up() {
        let used = |id: Owner| {
            let mut bytes = vec![0; stage_len(&VOLUMES) as usize];
            id.claim(MAGIC, &mut bytes);
            Box::new(bytes)
        };
        assert!(Stage::new(used(id(7)), &VOLUMES, id(7), false).is_some());
        assert!(Stage::new(used(id(7)), &VOLUMES, id(8), false).is_none());
        let other = Owner { node: NodeId(3), ..id(7) };
        assert!(Stage::new(used(other), &VOLUMES, id(7), false).is_none());
        assert!(Stage::new(memory(), &VOLUMES, id(7), false).is_none());
        assert!(Stage::new(memory(), &VOLUMES, id(7), true).is_some());
    }

    proptest! {
        #[test]
        fn agrees_with_an_array(
            marks in prop::collection::vec((any::<bool>(), 0u64..300, 1u64..90), 0..20),
            ask in (0u64..300, 1u64..90),
            most in 1u64..50,
        ) {
            let mut stage = Stage::new(memory(), &VOLUMES, id(1), true).unwrap();
            let mut model = [vec![false; 300], vec![false; 77]];
            for (second, start, len) in marks {
                let cells = &mut model[usize::from(second)];
                let start = start % cells.len() as u64;
                let len = len.min(cells.len() as u64 - start);
                cells[start as usize..(start + len) as usize].fill(true);
                stage.mark(extent(if second { 255 } else { 0 }, start, len));
            }
            let len = ask.1.min(300 - ask.0);
            let mut at = ask.0;
            for (part, staged) in stage.parts(extent(0, ask.0, len)) {
                prop_assert_eq!(part.start(), at * SECTOR);
                for _ in 0..part.len() / SECTOR {
                    prop_assert_eq!(model[0][at as usize], staged);
                    at += 1;
                }
            }
            prop_assert_eq!(at, ask.0 + len);
            let mut seen = [vec![false; 300], vec![false; 77]];
            let mut from = 0;
            while let Some(e) = stage.next(from, most * SECTOR) {
                prop_assert!(e.len() <= most * SECTOR && e.start() >= from);
                let cells = &mut seen[usize::from(e.address().volume() == 255)];
                let first = (e.address().offset() / SECTOR) as usize;
                cells[first..first + (e.len() / SECTOR) as usize].fill(true);
                from = e.start() + e.len();
            }
            prop_assert_eq!(seen, model);
        }
    }
}

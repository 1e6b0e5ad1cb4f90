//! Dirty maps: for any peer whose records are gone, a superset of what has changed since.
//!
//! Each map is a bitmap of [`GRANULE`]s over all volumes, in one slot of a memory-mapped file. The
//! list of maps and where each begins lives in the superblock, so it changes atomically. Extents are
//! marked when a record is appended; the file is synced before a checkpoint is recorded; recovery
//! marks the records after the checkpoint again. So a record that may be trimmed (it is at or below
//! the checkpoint) always has its bits durable.
//!
//! Owns: the map file. Invariant (I9): the union of the maps from the one in force at LSN n on
//! contains every extent of every record after n. Bits too many are harmless.

use crate::disk::Memory;
use crate::extents::Bitmap;
use crate::format::superblock::MapRange;
use crate::units::{Address, BLOCK, Extent, HistoryPoint, Lsn, round_up};

/// Bytes per bit.
pub const GRANULE: u64 = 64 << 10;
/// Slots in the file.
const SLOTS: u8 = 8;

/// Bytes of the map file for volumes of these (number, bytes).
pub fn maps_len(volumes: &[(u8, u64)]) -> u64 {
    volumes.iter().map(|(_, size)| volume_len(*size)).sum::<u64>() * u64::from(SLOTS)
}

fn volume_len(size: u64) -> u64 {
    round_up(size.div_ceil(GRANULE).div_ceil(8), BLOCK)
}

/// See the module's documentation.
pub struct Maps {
    memory: Box<dyn Memory>,
    /// (number, size, offset of its bits in a slot).
    volumes: Vec<(u8, u64, u64)>,
    slot_len: u64,
    /// In force, oldest first.
    ranges: Vec<MapRange>,
    /// Slots that the superblock on disk may still list.
    cooling: Vec<u8>,
}

impl Maps {
    /// Takes up a map file with the ranges that the superblock lists; with none, begins at `tail`.
    pub fn new(
        memory: Box<dyn Memory>,
        volumes: &[(u8, u64)],
        ranges: Vec<MapRange>,
        tail: HistoryPoint,
    ) -> Result<Maps, String> {
        if (memory.bytes().len() as u64) < maps_len(volumes) {
            return Err("the dirty map file is too short for the volumes".into());
        }
        if ranges.iter().any(|r| r.slot >= SLOTS) {
            return Err("the superblock lists a dirty map that the file does not have".into());
        }
        let mut at = 0;
        let place = |(number, size): &(u8, u64)| {
            let offset = at;
            at += volume_len(*size);
            (*number, *size, offset)
        };
        let volumes = volumes.iter().map(place).collect();
        let mut maps = Maps { memory, volumes, slot_len: at, ranges, cooling: Vec::new() };
        if maps.ranges.is_empty() {
            maps.bits_mut(0).fill(0);
            maps.ranges.push(MapRange { slot: 0, from: tail });
        }
        Ok(maps)
    }

    fn bits(&self, slot: u8) -> &[u8] {
        let at = u64::from(slot) * self.slot_len;
        &self.memory.bytes()[at as usize..(at + self.slot_len) as usize]
    }

    fn bits_mut(&mut self, slot: u8) -> &mut [u8] {
        let at = u64::from(slot) * self.slot_len;
        &mut self.memory.bytes_mut()[at as usize..(at + self.slot_len) as usize]
    }

    /// Marks an extent of a record that is being appended (or found again by recovery).
    pub fn mark(&mut self, extent: Extent) {
        let volume = extent.address().volume();
        let Some(&(_, size, offset)) = self.volumes.iter().find(|(n, ..)| *n == volume) else { return };
        let first = extent.address().offset() / GRANULE;
        let end = (extent.address().offset() + extent.len()).min(size);
        let newest = self.ranges.last().expect("there is always one").slot;
        let bits = &mut self.bits_mut(newest)[offset as usize..];
        Bitmap(&mut bits[..volume_len(size) as usize]).set(first, end.saturating_sub(1) / GRANULE);
    }

    /// The ranges to be written into the superblock.
    pub fn ranges(&self) -> &[MapRange] {
        &self.ranges
    }

    /// Begins a new map after `tail`, merging the two oldest when no slot is free. The caller writes
    /// the superblock with [`Maps::ranges`] after the next sync of the file, then calls
    /// [`Maps::settled`].
    pub fn rotate(&mut self, tail: HistoryPoint) {
        let used = |s: &u8| self.ranges.iter().any(|r| r.slot == *s) || self.cooling.contains(s);
        if let Some(free) = (0..SLOTS).find(|s| !used(s)) {
            self.bits_mut(free).fill(0);
            self.ranges.push(MapRange { slot: free, from: tail });
        } else if self.cooling.is_empty() {
            let oldest = self.ranges.remove(0);
            let bits = self.bits(oldest.slot).to_vec();
            Bitmap(self.bits_mut(self.ranges[0].slot)).union(&bits);
            self.ranges[0].from = oldest.from;
            self.cooling.push(oldest.slot);
        }
    }

    /// A superblock with [`Maps::ranges`] is durable: merged slots can be used again.
    pub fn settled(&mut self) {
        self.cooling.clear();
    }

    /// A superset of the extents of all records after `since`, whole granules, in order.
    pub fn since(&self, since: Lsn) -> Vec<Extent> {
        let after = self.ranges.iter().rposition(|r| r.from.lsn <= since).unwrap_or(0);
        let everything = self.ranges[0].from.lsn > since;
        let mut union = vec![0; self.slot_len as usize];
        for range in &self.ranges[after..] {
            Bitmap(&mut union).union(self.bits(range.slot));
        }
        let mut extents = Vec::new();
        for (number, size, offset) in &self.volumes {
            let bits = &mut union[*offset as usize..(*offset + volume_len(*size)) as usize];
            if everything {
                bits.fill(0xff);
            }
            for (first, end) in Bitmap(&bits[..]).runs() {
                let (start, end) = (first * GRANULE, (end * GRANULE).min(*size));
                let address = Address::new(*number, start).filter(|_| start < end);
                extents.extend(address.and_then(|a| Extent::new(a, end - start)));
            }
        }
        extents
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(volume: u8, at: u64, len: u64) -> Extent {
        Extent::new(Address::new(volume, at).unwrap(), len).unwrap()
    }
    fn point(lsn: u64) -> HistoryPoint {
        HistoryPoint { lsn: Lsn(lsn), ..HistoryPoint::default() }
    }

    #[test]
    fn the_maps_since_a_point_contain_everything_later() {
        let volumes = [(0u8, 100 * GRANULE + 512), (3, 10 * GRANULE)];
        let memory = Box::new(vec![0xaa; maps_len(&volumes) as usize]);
        let mut maps = Maps::new(memory, &volumes, vec![], point(0)).unwrap();
        for lsn in 1..=90u64 {
            maps.mark(extent(0, (lsn % 100) * GRANULE + 512, 512));
            if lsn % 5 == 0 {
                maps.rotate(point(lsn));
                maps.settled();
            }
            for since in 0..lsn {
                let found = maps.since(Lsn(since));
                for later in since + 1..=lsn {
                    let at = (later % 100) * GRANULE;
                    assert!(found.iter().any(|e| e.start() <= at && at < e.end()), "{since} {later}");
                }
            }
        }
        // Recent ranges stay precise; old ones lose precision, never bits.
        let granules = |since| maps.since(Lsn(since)).iter().map(|e| e.len() / GRANULE).sum::<u64>();
        assert!(granules(90) <= 10 && granules(60) <= 40 && granules(0) >= 90);
    }

    #[test]
    fn before_the_oldest_boundary_everything_may_differ() {
        let volumes = [(0u8, 3 * GRANULE + 512)];
        let memory = Box::new(vec![0; maps_len(&volumes) as usize]);
        let maps = Maps::new(memory, &volumes, vec![], point(50)).unwrap();
        assert_eq!(maps.since(Lsn(49)), [extent(0, 0, 3 * GRANULE + 512)]);
        assert_eq!(maps.since(Lsn(50)), []);
    }

    #[test]
    fn the_tail_of_a_volume_and_a_second_volume_are_marked() {
        let volumes = [(0u8, 3 * GRANULE + 512), (7, GRANULE)];
        let memory = Box::new(vec![0; maps_len(&volumes) as usize]);
        let mut maps = Maps::new(memory, &volumes, vec![], point(0)).unwrap();
        maps.mark(extent(0, 3 * GRANULE, 512));
        maps.mark(extent(7, 512, 512));
        maps.mark(extent(9, 0, 512));
        assert_eq!(maps.since(Lsn(0)), [extent(0, 3 * GRANULE, 512), extent(7, 0, GRANULE)]);
    }
}

//! Dirty maps: for any peer whose records are gone, a superset of what has changed since.
//!
//! Each map is a bitmap of [`GRANULE`]s over all volumes, in one slot of a memory-mapped file. The
//! list of maps and where each begins lives in the superblock, so it changes atomically. Extents are
//! marked when a record is appended; the file is synced before a checkpoint is recorded; recovery
//! marks the records after the checkpoint again. So a record that may be trimmed (it is at or below
//! the checkpoint) always has its bits durable.
//!
//! The file begins with a block that names group, node and the number that the superblock gave it. A file
//! without that (lost, another node's, of an earlier life) proves nothing: the maps begin anew, and before
//! their first boundary everything may differ.
//!
//! Owns: the map file. Invariant (I9): where the image was at boundary b, the union of the maps from that
//! boundary on contains every extent in which the image may differ now, by whatever way it went from there
//! to here. Bits too many are harmless.

use crate::disk::Memory;
use crate::extents::Bitmap;
use crate::format::mapped::{HEAD, Owner};
use crate::format::superblock::MapRange;
use crate::units::{Address, BLOCK, Extent, HistoryPoint, Lsn, round_up};

/// Bytes per bit.
pub const GRANULE: u64 = 64 << 10;
/// Slots in the file.
const SLOTS: u8 = 8;

const MAGIC: &[u8; 8] = b"VMAPFILE";

/// Bytes of the map file for volumes of these (number, bytes).
pub fn maps_len(volumes: &[(u8, u64)]) -> u64 {
    HEAD + volumes.iter().map(|(_, size)| volume_len(*size)).sum::<u64>() * u64::from(SLOTS)
}

fn volume_len(size: u64) -> u64 {
    round_up(size.div_ceil(GRANULE).div_ceil(8), BLOCK)
}

/// Extents for a range that does not exist yet, as bits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Gathered(Vec<u8>);

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
    id: Owner,
}

impl Maps {
    /// Takes up a map file with the ranges that the superblock lists. With none, or with a file that is
    /// not `id`'s, the maps begin at `tail`, and the file is `renewed`'s.
    pub fn new(
        memory: Box<dyn Memory>,
        volumes: &[(u8, u64)],
        ranges: Vec<MapRange>,
        tail: HistoryPoint,
        (id, renewed): (Owner, Owner),
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
        let ours = id.owns(MAGIC, memory.bytes()) && !ranges.is_empty();
        let mut maps = Maps { memory, volumes, slot_len: at, ranges, cooling: Vec::new(), id };
        if !ours {
            maps.id = renewed;
            maps.bits_mut(0).fill(0);
            maps.ranges = vec![MapRange { slot: 0, from: tail }];
            renewed.claim(MAGIC, maps.memory.bytes_mut());
        }
        Ok(maps)
    }

    /// The number of the file, for the superblock.
    pub fn number(&self) -> u64 {
        self.id.number
    }

    fn bits(&self, slot: u8) -> &[u8] {
        let at = HEAD + u64::from(slot) * self.slot_len;
        &self.memory.bytes()[at as usize..(at + self.slot_len) as usize]
    }

    fn bits_mut(&mut self, slot: u8) -> &mut [u8] {
        let at = HEAD + u64::from(slot) * self.slot_len;
        &mut self.memory.bytes_mut()[at as usize..(at + self.slot_len) as usize]
    }

    /// Marks an extent of a record that is being appended (or found again by recovery).
    pub fn mark(&mut self, extent: Extent) {
        let newest = self.ranges.last().expect("there is always one").slot;
        let Some((bits, first, last)) = self.granules(extent) else { return };
        Bitmap(&mut self.bits_mut(newest)[bits]).set(first, last);
    }

    fn set(&self, slot: &mut [u8], extent: Extent) {
        let Some((bits, first, last)) = self.granules(extent) else { return };
        Bitmap(&mut slot[bits]).set(first, last);
    }

    /// Where an extent's volume has its bits in a slot, and its first and last granule there.
    fn granules(&self, extent: Extent) -> Option<(std::ops::Range<usize>, u64, u64)> {
        let volume = extent.address().volume();
        let &(_, size, offset) = self.volumes.iter().find(|(n, ..)| *n == volume)?;
        let first = extent.address().offset() / GRANULE;
        let end = (extent.address().offset() + extent.len()).min(size);
        let bits = offset as usize..(offset + volume_len(size)) as usize;
        Some((bits, first, end.saturating_sub(1) / GRANULE))
    }

    /// Nothing yet of what a range to come will hold.
    pub fn gather(&self) -> Gathered {
        Gathered(vec![0; self.slot_len as usize])
    }

    /// Adds an extent to what is gathered.
    pub fn add(&self, gathered: &mut Gathered, extent: Extent) {
        self.set(&mut gathered.0, extent);
    }

    /// As [`Maps::rewind`], where `gathered` is everything that may differ since `point`: it has a range of its own.
    pub fn rewind_to(&mut self, point: HistoryPoint, gathered: &Gathered) {
        self.rewind(point.lsn);
        if self.ranges.last().is_some_and(|r| r.from.lsn < point.lsn) {
            self.rotate(point);
        }
        let newest = self.ranges.last().expect("there is always one").slot;
        Bitmap(self.bits_mut(newest)).union(&gathered.0);
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

    /// The history after `point` was given up, or another one is taken up there: no later boundary is
    /// anybody's past. As with [`Maps::rotate`], the caller syncs and saves.
    pub fn rewind(&mut self, point: Lsn) {
        while self.ranges.len() > 1
            && let Some(later) = self.ranges.pop_if(|r| r.from.lsn > point)
        {
            let bits = self.bits(later.slot).to_vec();
            let before = self.ranges.last().expect("one is left").slot;
            Bitmap(self.bits_mut(before)).union(&bits);
            self.cooling.push(later.slot);
        }
    }

    /// What may differ is unknown: the maps begin anew at `from`, and before it everything may differ. As
    /// with [`Maps::rotate`], the caller syncs and saves.
    pub fn restart(&mut self, from: HistoryPoint) {
        self.rotate(from);
        let newest = self.ranges.pop().expect("there is always one");
        self.cooling.extend(self.ranges.drain(..).map(|r| r.slot));
        if newest.from != from {
            // No slot was free, and its bits may be needed yet. Bits too many are harmless.
            self.bits_mut(newest.slot).fill(0xff);
        }
        self.ranges.push(MapRange { slot: newest.slot, from });
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
                // Bits behind the volume's end are no extent.
                let address = Address::new(*number, start);
                extents.extend(address.and_then(|a| Extent::new(a, end.saturating_sub(start))));
            }
        }
        extents
    }
}

/// At most `most` extents that cover all of `extents`, which are in order: the nearest neighbours within a
/// volume are joined.
pub fn joined(extents: Vec<Extent>, most: usize) -> Vec<Extent> {
    let gap = |a: &Extent, b: &Extent| {
        let one = a.address().volume() == b.address().volume();
        one.then(|| (b.start() - a.start()).saturating_sub(a.len()))
    };
    let mut gaps: Vec<u64> = extents.windows(2).filter_map(|pair| gap(&pair[0], &pair[1])).collect();
    gaps.sort_unstable();
    // As many as there are too many, from the narrowest on.
    let surplus = extents.len().saturating_sub(most).min(gaps.len());
    let Some(widest) = gaps[..surplus].last() else { return extents };
    let mut fewer: Vec<Extent> = Vec::new();
    for e in extents {
        let near = fewer.last_mut().filter(|last| gap(last, &e).is_some_and(|g| g <= *widest));
        match near {
            Some(last) => {
                *last = Extent::new(last.address(), e.start() - last.start() + e.len())
                    .expect("within one volume")
            }
            None => fewer.push(e),
        }
    }
    fewer
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GroupId, NodeId};

    fn id(number: u64) -> Owner {
        Owner { group: GroupId([3; 16]), node: NodeId(4), number }
    }

    fn open(memory: Vec<u8>, volumes: &[(u8, u64)], ranges: Vec<MapRange>, at: HistoryPoint) -> Maps {
        Maps::new(Box::new(memory), volumes, ranges, at, (id(1), id(1))).unwrap()
    }

    fn extent(volume: u8, at: u64, len: u64) -> Extent {
        Extent::new(Address::new(volume, at).unwrap(), len).unwrap()
    }
    fn point(lsn: u64) -> HistoryPoint {
        HistoryPoint { lsn: Lsn(lsn), ..HistoryPoint::default() }
    }

    #[test]
    fn the_maps_since_a_point_contain_everything_later() {
        let volumes = [(0u8, 100 * GRANULE + 512), (3, 10 * GRANULE)];
        let mut maps = open(vec![0xaa; maps_len(&volumes) as usize], &volumes, vec![], point(0));
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
    fn what_was_gathered_since_a_fork_is_told_exactly() {
        let volumes = [(0u8, 100 * GRANULE)];
        let granule = |n: u64| extent(0, n * GRANULE, GRANULE);
        for fork in [3, 10, 25, 30, 37] {
            // Everything was written at 5, and then one granule a record.
            let mut maps = open(vec![0; maps_len(&volumes) as usize], &volumes, vec![], point(0));
            for lsn in 1..=37u64 {
                maps.mark(if lsn == 5 { extent(0, 0, 100 * GRANULE) } else { granule(lsn) });
                if lsn % 10 == 0 {
                    maps.rotate(point(lsn));
                    maps.settled();
                }
            }
            let mut gathered = maps.gather();
            (fork + 1..=37).for_each(|lsn| maps.add(&mut gathered, granule(lsn)));
            maps.add(&mut gathered, granule(90));
            maps.rewind_to(point(fork), &gathered);
            let since: Vec<u64> = maps.since(Lsn(fork)).iter().map(|e| e.start() / GRANULE).collect();
            let first = (fork < 37).then_some(fork + 1);
            assert_eq!(since, first.into_iter().chain([90]).collect::<Vec<_>>(), "{fork}");
            assert_eq!(maps.since(Lsn(2)), [extent(0, 0, 100 * GRANULE)], "what was before stays");
            assert!(maps.ranges().is_sorted_by(|a, b| a.from.lsn < b.from.lsn), "each boundary once");
        }
        // Before the first boundary nothing is exact.
        let mut maps = open(vec![0; maps_len(&volumes) as usize], &volumes, vec![], point(50));
        let gathered = maps.gather();
        maps.rewind_to(point(40), &gathered);
        assert_eq!(maps.since(Lsn(40)), [extent(0, 0, 100 * GRANULE)]);
    }

    #[test]
    fn before_the_oldest_boundary_everything_may_differ() {
        let volumes = [(0u8, 3 * GRANULE + 512)];
        let maps = open(vec![0; maps_len(&volumes) as usize], &volumes, vec![], point(50));
        assert_eq!(maps.since(Lsn(49)), [extent(0, 0, 3 * GRANULE + 512)]);
        assert_eq!(maps.since(Lsn(50)), []);
    }

    #[test]
    fn a_file_has_a_bit_for_each_granule_in_each_slot_and_no_less() {
        let (bits, block) = (8 * BLOCK, BLOCK * u64::from(SLOTS));
        assert_eq!(maps_len(&[]), HEAD);
        assert_eq!(maps_len(&[(0, 512)]), HEAD + block);
        assert_eq!(maps_len(&[(0, bits * GRANULE), (1, bits * GRANULE + 512)]), HEAD + 3 * block);
        let volumes = [(0u8, 3 * GRANULE), (7, GRANULE)];
        let made = |len: u64, slot| {
            let ranges = vec![MapRange { slot, from: point(0) }];
            let memory = Box::new(vec![0; len as usize]);
            Maps::new(memory, &volumes, ranges, point(0), (id(1), id(1))).map(drop)
        };
        let len = maps_len(&volumes);
        assert_eq!([made(len, SLOTS - 1), made(len + 1, 0)], [Ok(()), Ok(())]);
        assert!(made(len - 1, 0).is_err() && made(len, SLOTS).is_err());
    }

    #[test]
    fn the_tail_of_a_volume_and_a_second_volume_are_marked() {
        let volumes = [(0u8, 3 * GRANULE + 512), (7, GRANULE)];
        let mut maps = open(vec![0; maps_len(&volumes) as usize], &volumes, vec![], point(0));
        maps.mark(extent(0, 3 * GRANULE, 512));
        maps.mark(extent(7, 512, 512));
        maps.mark(extent(9, 0, 512));
        assert_eq!(maps.since(Lsn(0)), [extent(0, 3 * GRANULE, 512), extent(7, 0, GRANULE)]);
    }

    /// Plain memory that a test can still look at when the maps are gone.
    #[derive(Clone)]
    struct Shared(std::sync::Arc<std::sync::Mutex<Vec<u8>>>, Vec<u8>);

    impl Memory for Shared {
        fn bytes(&self) -> &[u8] {
            &self.1
        }
        fn bytes_mut(&mut self) -> &mut [u8] {
            &mut self.1
        }
        fn publish(&mut self, _: usize, _: u64) {}
    }

    impl Drop for Shared {
        fn drop(&mut self) {
            *self.0.lock().unwrap() = std::mem::take(&mut self.1);
        }
    }

    #[test]
    fn a_file_that_is_not_the_nodes_own_proves_nothing() {
        let volumes = [(0u8, 8 * GRANULE)];
        let kept = std::sync::Arc::default();
        let memory = Shared(std::sync::Arc::clone(&kept), vec![0; maps_len(&volumes) as usize]);
        let mut maps = Maps::new(Box::new(memory), &volumes, vec![], point(0), (id(0), id(1))).unwrap();
        assert_eq!(maps.number(), 1);
        maps.mark(extent(0, GRANULE, 512));
        let ranges = maps.ranges().to_vec();
        drop(maps);
        let file = kept.lock().unwrap().clone();
        let since = |file: &Vec<u8>, id| {
            let memory = Box::new(file.clone());
            let maps = Maps::new(memory, &volumes, ranges.clone(), point(7), (id, self::id(9))).unwrap();
            (maps.number(), maps.since(Lsn(0)), maps.since(Lsn(7)))
        };
        let (everything, one) = (vec![extent(0, 0, 8 * GRANULE)], vec![extent(0, GRANULE, GRANULE)]);
        assert_eq!(since(&file, id(1)), (1, one.clone(), one), "its own file");
        let lost = (9, everything, vec![]);
        assert_eq!(since(&vec![0; file.len()], id(1)), lost, "lost, and made anew");
        assert_eq!(since(&file, id(2)), lost, "of an earlier life");
        assert_eq!(since(&file, Owner { node: NodeId(5), ..id(1) }), lost, "another node's");
        assert_eq!(since(&file, Owner { group: GroupId([4; 16]), ..id(1) }), lost, "another group's");
        let mut torn = file.clone();
        torn[40] ^= 1;
        assert_eq!(since(&torn, id(1)), lost, "damaged");
    }

    #[test]
    fn joining_covers_all_and_crosses_no_volume() {
        let list: Vec<_> = (0..100u64)
            .map(|i| extent((i / 60) as u8 * 3, (i * i % 60 * 60 + i % 60) * GRANULE, GRANULE))
            .collect();
        let mut list: Vec<_> = list.into_iter().collect();
        list.sort_unstable();
        list.dedup();
        for most in [0, 1, 2, 5, 30, 1000] {
            let few = joined(list.clone(), most);
            assert!(few.len() <= most.max(2), "{} of {most}", few.len());
            for e in &list {
                assert!(few.iter().any(|f| f.start() <= e.start() && e.end() <= f.end()));
            }
        }
        assert_eq!(joined(list.clone(), list.len()), list);
        let end = [2, 1].map(|n| extent(255, crate::units::MAX_VOLUME - n * GRANULE, GRANULE));
        assert_eq!(joined(end.to_vec(), 1), [extent(255, end[0].address().offset(), 2 * GRANULE)]);
        // The nearest neighbours first.
        let few = [0, 1, 10, 11, 40].map(|at| extent(3, at * GRANULE, GRANULE));
        let runs = |most| joined(few.to_vec(), most).iter().map(|e| e.len() / GRANULE).collect::<Vec<_>>();
        assert_eq!(
            [runs(4), runs(3), runs(2), runs(1)],
            [vec![2, 2, 1], vec![2, 2, 1], vec![12, 1], vec![41]]
        );
    }

    #[test]
    fn a_rewind_forgets_boundaries_and_never_bits() {
        let volumes = [(0u8, 32 * GRANULE)];
        let mut maps = open(vec![0; maps_len(&volumes) as usize], &volumes, vec![], point(0));
        for i in 0..5 {
            maps.mark(extent(0, i * GRANULE, 512));
            maps.rotate(point(10 * (i + 1)));
        }
        maps.rewind(Lsn(20));
        assert_eq!(maps.ranges().iter().map(|r| r.from.lsn.0).collect::<Vec<_>>(), [0, 10, 20]);
        maps.mark(extent(0, 9 * GRANULE, 512));
        let granules = |maps: &Maps, lsn| {
            let list = maps.since(Lsn(lsn)).into_iter();
            list.flat_map(|e| e.start() / GRANULE..e.end() / GRANULE).collect::<Vec<_>>()
        };
        assert_eq!(granules(&maps, 20), [2, 3, 4, 9]);
        assert_eq!(granules(&maps, 10), [1, 2, 3, 4, 9]);
        maps.rewind(Lsn(0));
        assert_eq!(granules(&maps, 5), [0, 1, 2, 3, 4, 9]);
    }

    #[test]
    fn after_a_restart_everything_before_it_may_differ() {
        let volumes = [(0u8, 32 * GRANULE)];
        for rotations in 0..10 {
            let mut maps = open(vec![0; maps_len(&volumes) as usize], &volumes, vec![], point(0));
            for i in 0..rotations {
                maps.mark(extent(0, i * GRANULE, 512));
                maps.rotate(point(10 * (i + 1)));
            }
            let listed: Vec<_> = maps.ranges().iter().map(|r| r.slot).collect();
            maps.restart(point(500));
            assert_eq!(maps.since(Lsn(499)), [extent(0, 0, 32 * GRANULE)]);
            maps.mark(extent(0, 3 * GRANULE, 512));
            assert!(maps.since(Lsn(500)).iter().any(|e| e.start() <= 3 * GRANULE && e.end() >= 4 * GRANULE));
            let slot = maps.ranges()[0].slot;
            // What the superblock on disk lists has only gained bits.
            assert!(!listed.contains(&slot) || maps.since(Lsn(500)).len() == 1);
            maps.settled();
            maps.restart(point(600));
            assert_eq!(maps.since(Lsn(600)), [], "a free slot once nothing else is listed");
        }
    }
}

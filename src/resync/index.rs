//! The hash index: for every extent of the backings, the root of its bytes, if that is known.
//!
//! A file next to the superblock: [`HEAD`] bytes that name whose it is, then per volume a bitmap of the extents
//! whose root is known (rounded up to [`BLOCK`]), then per volume the roots, 16 bytes each (likewise). That is
//! 256 MiB of roots and 2 MiB of bits per TiB; only the bits are looked at while writes go on.
//!
//! Owns: what is known. Invariant (I9): wherever a crash at any moment leaves the file, an extent that it calls
//! known has that root in its backing, or a record after the checkpoint touches it (redo forgets it then), or a
//! comparison was repairing there (the next start forgets it then), or its disk has changed it by itself. Therefore:
//! - an extent is forgotten before it is written, and a checkpoint waits until that is durable;
//! - what a comparison has learned takes three syncs of the file, and of the backings with it: one makes the
//!   bytes durable, and that the bit is clear; the root is stored, and the next makes it durable; then the bit is
//!   set. A write meanwhile takes it off the way;
//! - a file that is not this node's own becomes so only after one sync has made all its bits durably clear.

use super::hash::UNKNOWN;
use crate::disk::Memory;
use crate::extents::Bitmap;
use crate::format::compare::{EXTENT, Root};
use crate::format::mapped::{HEAD, Owner};
use crate::units::{Address, BLOCK, Extent, round_up};
use std::collections::BTreeMap;

const MAGIC: &[u8; 8] = b"VHASHIDX";
const ROOT: u64 = 16;

/// Bytes of the index of volumes of these (number, bytes).
pub fn index_len(volumes: &[(u8, u64)]) -> u64 {
    HEAD + volumes.iter().map(|(_, size)| bits_len(*size) + roots_len(*size)).sum::<u64>()
}

fn bits_len(size: u64) -> u64 {
    round_up(size.div_ceil(EXTENT).div_ceil(8), BLOCK)
}

fn roots_len(size: u64) -> u64 {
    round_up(size.div_ceil(EXTENT) * ROOT, BLOCK)
}

struct Volume {
    number: u8,
    extents: u64,
    bits: usize,
    bits_len: usize,
    roots: usize,
}

/// Extents (by their address over [`EXTENT`]) on their way into the file.
type Pending = BTreeMap<u64, Root>;

/// See the module's documentation.
pub struct Index {
    memory: Box<dyn Memory>,
    volumes: Vec<Volume>,
    owner: Owner,
    /// The file is his.
    owned: bool,
    /// Learned since the last sync began.
    learned: Pending,
    /// A sync that is done has made their bytes durable, and their bits clear: the root is stored.
    stored: Pending,
    /// As `learned` and `stored` were when the sync under way began, and what it covers of them.
    syncing: Option<(Pending, Pending)>,
    /// Something was changed since the last sync began.
    changed: bool,
}

impl Index {
    /// Takes up an index file; one that is not `owner`'s knows nothing and becomes his.
    pub fn new(memory: Box<dyn Memory>, volumes: &[(u8, u64)], owner: Owner) -> Result<Index, String> {
        if (memory.bytes().len() as u64) < index_len(volumes) {
            return Err("the hash index is too short for the volumes: remove its file".into());
        }
        let mut bits = HEAD;
        let mut roots = HEAD + volumes.iter().map(|(_, size)| bits_len(*size)).sum::<u64>();
        let place = |(number, size): &(u8, u64)| {
            let v = Volume {
                number: *number,
                extents: size.div_ceil(EXTENT),
                bits: bits as usize,
                bits_len: bits_len(*size) as usize,
                roots: roots as usize,
            };
            bits += bits_len(*size);
            roots += roots_len(*size);
            v
        };
        let volumes: Vec<_> = volumes.iter().map(place).collect();
        let owned = owner.owns(MAGIC, memory.bytes());
        let mut index = Index {
            memory,
            volumes,
            owner,
            owned,
            learned: Pending::new(),
            stored: Pending::new(),
            syncing: None,
            // What an earlier process has forgotten may not be durable.
            changed: true,
        };
        if !owned {
            for v in &index.volumes {
                let bits = &mut index.memory.bytes_mut()[v.bits..v.bits + v.bits_len];
                bits.fill(0);
            }
        }
        Ok(index)
    }

    fn volume(&self, number: u8) -> Option<&Volume> {
        self.volumes.iter().find(|v| v.number == number)
    }

    /// Where an extent's bit lies (byte, mask), and its root.
    fn place(&self, key: u64) -> Option<(usize, u8, usize)> {
        let address = Address(key * EXTENT);
        let i = address.offset() / EXTENT;
        let v = self.volume(address.volume()).filter(|v| i < v.extents)?;
        Some((v.bits + (i / 8) as usize, 1 << (i % 8), v.roots + (i * ROOT) as usize))
    }

    fn get(&self, key: u64) -> Option<Root> {
        let (bit, mask, at) = self.place(key).filter(|_| self.owned)?;
        let bytes = self.memory.bytes();
        (bytes[bit] & mask != 0).then(|| bytes[at..at + ROOT as usize].try_into().expect("16 bytes"))
    }

    /// The root of the extent that begins here, if it is known.
    pub fn root(&self, extent: Address) -> Option<Root> {
        self.get(extent.0 / EXTENT)
    }

    /// The roots of all extents of a window, which starts at one; [`UNKNOWN`] where it does not know.
    pub fn roots(&self, window: Extent) -> Vec<Root> {
        let mut roots = vec![UNKNOWN; window.len().div_ceil(EXTENT) as usize];
        let first = window.address().offset() / EXTENT;
        let Some(v) = self.volume(window.address().volume()).filter(|_| self.owned) else { return roots };
        let bytes = self.memory.bytes();
        let bits = Bitmap(&bytes[v.bits..v.bits + v.bits_len]);
        let mut at = first;
        let end = (first + roots.len() as u64).min(v.extents);
        while at < end {
            let run = bits.same(at, end);
            if bits.get(at) {
                let from = v.roots + (at * ROOT) as usize;
                let known = &bytes[from..from + (run * ROOT) as usize];
                let to = &mut roots[(at - first) as usize..(at - first + run) as usize];
                to.as_flattened_mut().copy_from_slice(known);
            }
            at += run;
        }
        roots
    }

    /// How many extents are known.
    pub fn known(&self) -> u64 {
        let bytes = self.memory.bytes();
        self.volumes.iter().map(|v| Bitmap(&bytes[v.bits..v.bits + v.bits_len]).count()).sum()
    }

    /// The backing is about to be written here.
    pub fn forget(&mut self, written: Extent) {
        let (first, last) = (written.start() / EXTENT, (written.start() + (written.len() - 1)) / EXTENT);
        for pending in [&mut self.learned, &mut self.stored] {
            drop_range(pending, first, last);
        }
        if let Some((learned, stored)) = &mut self.syncing {
            drop_range(learned, first, last);
            drop_range(stored, first, last);
        }
        for key in first..=last {
            if let Some((bit, mask, _)) = self.place(key)
                && self.memory.bytes()[bit] & mask != 0
            {
                self.memory.bytes_mut()[bit] &= !mask;
                self.changed = true;
            }
        }
    }

    /// Nobody knows what is at this position and behind it.
    pub fn forget_from(&mut self, position: u64) {
        let from = Address(position);
        for i in 0..self.volumes.len() {
            let Volume { number, extents, .. } = self.volumes[i];
            let first = match number.cmp(&from.volume()) {
                std::cmp::Ordering::Less => continue,
                std::cmp::Ordering::Equal => from.offset() / EXTENT,
                std::cmp::Ordering::Greater => 0,
            };
            let rest = extents.checked_sub(first).filter(|n| *n > 0);
            let address = Address::new(number, first * EXTENT);
            if let Some(rest) = rest.and_then(|n| Extent::new(address?, n * EXTENT)) {
                self.forget(rest);
            }
        }
    }

    /// The extent that begins here has this root now, and nothing is writing it.
    pub fn learn(&mut self, extent: Address, root: Root) {
        let key = extent.0 / EXTENT;
        match self.get(key) {
            Some(known) if known == root => {}
            // Another root is never put over one that counts: the next comparison learns it.
            Some(_) => self.forget(Extent::new(extent, EXTENT).expect("an extent of a volume")),
            None => drop(self.learned.insert(key, root)),
        }
    }

    /// Something waits for syncs.
    pub fn has_pending(&self) -> bool {
        !self.learned.is_empty() || !self.stored.is_empty()
    }

    /// The backings begin to be synced. Whether this file has to be, too.
    pub fn sync(&mut self) -> bool {
        debug_assert!(self.syncing.is_none());
        self.syncing = Some((std::mem::take(&mut self.learned), std::mem::take(&mut self.stored)));
        std::mem::take(&mut self.changed)
    }

    /// All of that is durable.
    pub fn synced(&mut self) {
        let Some((learned, stored)) = self.syncing.take() else { return };
        if !self.owned {
            self.owner.claim(MAGIC, self.memory.bytes_mut());
            (self.owned, self.changed) = (true, true);
        }
        for (key, root) in learned {
            if let Some((.., at)) = self.place(key) {
                self.memory.bytes_mut()[at..at + ROOT as usize].copy_from_slice(&root);
                self.stored.insert(key, root);
                self.changed = true;
            }
        }
        for key in stored.into_keys() {
            if let Some((bit, mask, _)) = self.place(key) {
                self.memory.bytes_mut()[bit] |= mask;
                self.changed = true;
            }
        }
    }

    /// The sync has failed, or was given up.
    pub fn abandoned(&mut self) {
        self.syncing = None;
        self.changed = true;
    }
}

fn drop_range(pending: &mut Pending, first: u64, last: u64) {
    while let Some((key, _)) = pending.range(first..=last).next() {
        let key = *key;
        pending.remove(&key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GroupId, NodeId};
    use proptest::prelude::*;

    const VOLUMES: [(u8, u64); 2] = [(0, 20 * EXTENT), (255, 5 * EXTENT + 512)];

    fn owner(number: u64) -> Owner {
        Owner { group: GroupId([1; 16]), node: NodeId(2), number }
    }

    fn index(bytes: Vec<u8>, number: u64) -> Index {
        Index::new(Box::new(bytes), &VOLUMES, owner(number)).unwrap()
    }

    fn fresh() -> Index {
        index(vec![0; index_len(&VOLUMES) as usize], 1)
    }

    fn at(volume: u8, extent: u64) -> Address {
        Address::new(volume, extent * EXTENT).unwrap()
    }

    fn settle(index: &mut Index) {
        for _ in 0..3 {
            index.sync();
            index.synced();
        }
    }

    #[test]
    fn what_was_learned_is_known_after_the_syncs_and_forgotten_when_written() {
        let mut index = fresh();
        assert!(index.sync(), "nobody knows what an earlier process left behind");
        index.synced();
        settle(&mut index);
        index.learn(at(0, 3), [7; 16]);
        index.learn(at(255, 5), [8; 16]);
        for step in 0..2 {
            assert!(index.has_pending() && index.root(at(0, 3)).is_none(), "{step}");
            index.sync();
            index.synced();
        }
        assert_eq!((index.root(at(0, 3)), index.root(at(255, 5))), (Some([7; 16]), Some([8; 16])));
        for (volume, first, extents) in [(0, 0, 20), (0, 3, 1), (0, 4, 3), (255, 5, 1)] {
            let window = Extent::new(at(volume, first), extents * EXTENT).unwrap();
            let one = |i| index.root(at(volume, first + i)).unwrap_or(UNKNOWN);
            assert_eq!(index.roots(window), (0..extents).map(one).collect::<Vec<_>>());
        }
        assert!(!index.has_pending() && index.known() == 2);
        assert!(index.sync(), "the bits are not durable yet");
        index.synced();
        assert!(!index.sync(), "nothing changed");
        index.synced();
        let written = Extent::new(Address::new(0, 4 * EXTENT - 512).unwrap(), 1024).unwrap();
        index.forget(written);
        assert_eq!((index.root(at(0, 3)), index.known()), (None, 1));
        assert!(index.sync());
    }

    #[test]
    fn a_write_on_the_way_takes_it_off() {
        for step in 0..4 {
            let mut index = fresh();
            settle(&mut index);
            let forget = |now, index: &mut Index| {
                if now == step {
                    index.forget(Extent::new(at(0, 1), 512).unwrap());
                }
            };
            index.learn(at(0, 1), [7; 16]);
            forget(0, &mut index);
            index.sync();
            forget(1, &mut index);
            index.synced();
            forget(2, &mut index);
            index.sync();
            forget(3, &mut index);
            index.synced();
            settle(&mut index);
            assert_eq!(index.root(at(0, 1)), None, "{step}");
        }
    }

    #[test]
    fn everything_behind_a_position_is_forgotten() {
        let mut index = fresh();
        let all = [at(0, 0), at(0, 7), at(0, 19), at(255, 0), at(255, 5)];
        all.iter().for_each(|a| index.learn(*a, [1; 16]));
        settle(&mut index);
        let known = |index: &Index| all.map(|a| index.root(a).is_some());
        index.forget_from(at(255, 1).0);
        assert_eq!(known(&index), [true, true, true, true, false]);
        index.forget_from(at(0, 7).0 + 512);
        assert_eq!(known(&index), [true, false, false, false, false]);
        index.forget_from(0);
        assert_eq!(index.known(), 0);
    }

    #[test]
    fn another_root_is_not_put_over_one_that_counts() {
        let mut index = fresh();
        index.learn(at(0, 1), [7; 16]);
        settle(&mut index);
        index.learn(at(0, 1), [7; 16]);
        assert!(!index.has_pending(), "it is known already");
        index.learn(at(0, 1), [9; 16]);
        assert!(index.root(at(0, 1)).is_none() && !index.has_pending());
        index.learn(at(0, 1), [9; 16]);
        settle(&mut index);
        assert_eq!(index.root(at(0, 1)), Some([9; 16]));
    }

    #[test]
    fn a_file_that_is_not_the_nodes_own_knows_nothing() {
        let mut bytes = vec![0xff; index_len(&VOLUMES) as usize];
        owner(9).claim(MAGIC, &mut bytes);
        assert!(index(bytes.clone(), 9).root(at(0, 0)).is_some(), "its own");
        let mut other = index(bytes, 1);
        assert!(other.root(at(0, 0)).is_none() && other.known() == 0);
        assert!(!owner(1).owns(MAGIC, other.memory.bytes()), "not before its bits are durably clear");
        assert!(other.sync());
        other.synced();
        assert!(owner(1).owns(MAGIC, other.memory.bytes()) && other.known() == 0);
    }

    /// What of the file is durable: pages of 4096 bytes, each as a sync left it or as it is now.
    fn torn(synced: &[u8], now: &[u8], mut coin: impl FnMut() -> bool) -> Vec<u8> {
        let pages = synced.chunks(4096).zip(now.chunks(4096));
        pages.flat_map(|(s, n)| if coin() { n } else { s }).copied().collect()
    }

    proptest! {
        /// Writes, comparisons and syncs in any order; then a power cut. `content` is what an extent holds,
        /// `durable` what it holds for sure, `redone` what redo would write again.
        #[test]
        fn whatever_is_known_after_a_power_cut_is_so(
            steps in prop::collection::vec((0u8..5, 0u64..6), 1..60), seed in any::<u64>()
        ) {
            let mut index = fresh();
            let mut synced = index.memory.bytes().to_vec();
            let (mut content, mut durable) = ([0u8; 6], [0u8; 6]);
            // By records after the checkpoint, or by repairs that are not durable.
            let mut excused = [false; 6];
            let mut covered: Option<(Vec<u8>, [u8; 6])> = None;
            let mut version = 0;
            for (step, extent) in steps {
                let i = extent as usize;
                match step {
                    // A record's write.
                    0 => {
                        version += 1;
                        index.forget(Extent::new(at(0, extent), 4096).unwrap());
                        (content[i], excused[i]) = (version, true);
                    }
                    // A repair: no record brings it back.
                    1 => {
                        version += 1;
                        index.forget(Extent::new(at(0, extent), 4096).unwrap());
                        (content[i], excused[i]) = (version, true);
                    }
                    2 => index.learn(at(0, extent), [content[i]; 16]),
                    3 if covered.is_none() => {
                        index.sync();
                        covered = Some((index.memory.bytes().to_vec(), content));
                        // A checkpoint: redo begins here once the sync is done.
                        excused = [false; 6];
                    }
                    4 => if let Some((bytes, now)) = covered.take() {
                        (synced, durable) = (bytes, now);
                        index.synced();
                    },
                    _ => {}
                }
            }
            // Without its checkpoint, what it would have covered is redone, too: nothing to see there.
            prop_assume!(covered.is_none());
            let mut state = seed;
            let mut coin = || { state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407); state >> 63 == 1 };
            let left = torn(&synced, index.memory.bytes(), &mut coin);
            let found: [u8; 6] = std::array::from_fn(|i| if coin() { content[i] } else { durable[i] });
            let after = Index::new(Box::new(left), &VOLUMES, owner(1)).unwrap();
            for extent in 0..6u64 {
                let i = extent as usize;
                if let Some(root) = after.root(at(0, extent)) && !excused[i] {
                    prop_assert_eq!(root, [found[i]; 16], "extent {}", extent);
                }
            }
        }
    }
}

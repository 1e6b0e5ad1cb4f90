//! The extent map. See the parent's documentation.

use crate::units::Extent;
use std::collections::BTreeMap;

/// A value that describes a range and can describe the rest of it.
pub trait Piece: Clone {
    /// The value for what is left when `bytes` are cut off the front.
    fn skip(&self, bytes: u64) -> Self;
}

impl Piece for () {
    fn skip(&self, _: u64) {}
}

/// Non-overlapping ranges, each with a value; the newest insert wins.
#[derive(Clone, Debug)]
pub struct ExtentMap<V> {
    /// Start to (end, value).
    ranges: BTreeMap<u64, (u64, V)>,
}

impl<V> Default for ExtentMap<V> {
    fn default() -> Self {
        ExtentMap { ranges: BTreeMap::new() }
    }
}

impl<V: Piece> ExtentMap<V> {
    /// Number of ranges.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }
    /// No range at all.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
    /// Forgets everything.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }

    /// Maps all of `extent` to `value`, cutting what was there.
    pub fn insert(&mut self, extent: Extent, value: V) {
        // An overwrite of exactly the same range is the common case of a database page.
        if let Some(slot) = self.ranges.get_mut(&extent.start())
            && slot.0 == extent.end()
        {
            slot.1 = value;
            return;
        }
        self.remove(extent);
        self.ranges.insert(extent.start(), (extent.end(), value));
    }

    /// Forgets what lies in `extent`.
    pub fn remove(&mut self, extent: Extent) {
        self.remove_if(extent, |_| true);
    }

    /// Forgets those parts of `extent` whose value satisfies `which`.
    pub fn remove_if(&mut self, extent: Extent, mut which: impl FnMut(&V) -> bool) {
        let (start, end) = (extent.start(), extent.end());
        let mut at = self.first_overlap(start).unwrap_or(start);
        while at < end
            && let Some((&s, &(e, _))) = self.ranges.range(at..end).next()
        {
            at = e;
            if e <= start || !which(&self.ranges[&s].1) {
                continue;
            }
            let (_, value) = self.ranges.remove(&s).expect("just found");
            if e > end {
                self.ranges.insert(end, (e, value.skip(end - s)));
            }
            if s < start {
                self.ranges.insert(s, (start, value));
            }
        }
    }

    /// Start of the first range that ends after `start` and begins at or before it.
    fn first_overlap(&self, start: u64) -> Option<u64> {
        let (&s, &(e, _)) = self.ranges.range(..=start).next_back()?;
        (e > start).then_some(s)
    }

    /// The mapped parts of `extent`, in order, cut to it.
    pub fn overlaps(&self, extent: Extent) -> impl Iterator<Item = (Extent, V)> {
        let (start, end) = (extent.start(), extent.end());
        let at = self.first_overlap(start).unwrap_or(start);
        self.ranges.range(at..end).map(move |(&s, (e, value))| {
            let cut = s.max(start);
            let part = Extent::between(cut, (*e).min(end)).expect("ranges are not empty");
            (part, value.skip(cut - s))
        })
    }

    /// Every range, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Extent, &V)> {
        self.ranges
            .iter()
            .map(|(&s, (e, value))| (Extent::between(s, *e).expect("ranges are not empty"), value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Address;
    use proptest::prelude::*;

    #[derive(Clone, Debug, PartialEq)]
    struct From(u32, u64);
    impl Piece for From {
        fn skip(&self, bytes: u64) -> From {
            From(self.0, self.1 + bytes)
        }
    }

    fn extent(start: u64, sectors: u64) -> Extent {
        Extent::new(Address(start * 512), sectors * 512).unwrap()
    }

    #[test]
    fn a_range_that_reaches_past_what_is_removed_ends_the_search() {
        let mut map: ExtentMap<From> = ExtentMap::default();
        map.insert(extent(26, 11), From(1, 0));
        map.remove(extent(10, 17));
        assert_eq!(map.iter().collect::<Vec<_>>(), [(extent(27, 10), &From(1, 512))]);
    }

    proptest! {
        /// Against an array of sectors that remembers who wrote each, and from where.
        #[test]
        fn agrees_with_an_array(ops in prop::collection::vec((0u8..4, 0u64..60, 1u64..20), 1..80)) {
            let mut map: ExtentMap<From> = ExtentMap::default();
            let mut model: Vec<Option<(u32, u64)>> = vec![None; 80];
            for (i, (op, start, len)) in ops.into_iter().enumerate() {
                let e = extent(start, len);
                let cells = &mut model[start as usize..(start + len) as usize];
                match op {
                    0 => { map.remove(e); cells.fill(None); }
                    1 => {
                        map.remove_if(e, |v| v.0 % 2 == 0);
                        for c in cells { if c.is_some_and(|(id, _)| id % 2 == 0) { *c = None; } }
                    }
                    _ => {
                        map.insert(e, From(i as u32, 0));
                        for (k, c) in cells.iter_mut().enumerate() { *c = Some((i as u32, k as u64 * 512)); }
                    }
                }
                let mut seen = vec![None; 80];
                for (e, v) in map.overlaps(extent(0, 80)) {
                    for k in 0..e.len() / 512 {
                        let cell = &mut seen[(e.start() / 512 + k) as usize];
                        prop_assert!(cell.is_none());
                        *cell = Some((v.0, v.1 + k * 512));
                    }
                }
                prop_assert_eq!(&seen, &model);
                prop_assert_eq!(map.iter().count(), map.len());
                for (e, v) in map.overlaps(extent(start, len)) {
                    prop_assert!(e.start() >= start * 512 && e.end() <= (start + len) * 512);
                    prop_assert_eq!(model[(e.start() / 512) as usize], Some((v.0, v.1)));
                }
            }
        }
    }
}

//! A bitmap of granules over a byte range, in memory that somebody else owns.

/// A view of bytes as bits, one per granule; bit `i` is bit `i % 8` of byte `i / 8`.
pub struct Bitmap<B>(pub B);

impl<B: AsRef<[u8]>> Bitmap<B> {
    /// Whether the granule is marked.
    pub fn get(&self, granule: u64) -> bool {
        self.0.as_ref().get((granule / 8) as usize).is_some_and(|b| b & (1 << (granule % 8)) != 0)
    }
    /// How many granules from `first` on, before `end`, are as the first one is.
    pub fn same(&self, first: u64, end: u64) -> u64 {
        let bytes = self.0.as_ref();
        let whole = if self.get(first) { 0xff } else { 0 };
        let is = self.get(first);
        let mut at = first;
        while at < end {
            if at.is_multiple_of(8) && bytes.get((at / 8) as usize) == Some(&whole) {
                at += 8;
            } else if self.get(at) == is {
                at += 1;
            } else {
                break;
            }
        }
        at.min(end) - first
    }
    /// Marked granules.
    pub fn count(&self) -> u64 {
        self.0.as_ref().iter().map(|b| u64::from(b.count_ones())).sum()
    }
    /// Runs of marked granules: (first, one past the last), in order.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64)> {
        let bits = self.0.as_ref().len() as u64 * 8;
        let mut at = 0;
        std::iter::from_fn(move || {
            while at < bits && !self.get(at) {
                let byte = self.0.as_ref()[(at / 8) as usize];
                at = if at.is_multiple_of(8) && byte == 0 { at + 8 } else { at + 1 };
            }
            let start = at;
            while at < bits && self.get(at) {
                at += 1;
            }
            (start < at).then_some((start, at))
        })
    }
}

impl<B: AsMut<[u8]>> Bitmap<B> {
    /// Marks granules `first..=last`; those past the end are ignored.
    pub fn set(&mut self, first: u64, last: u64) {
        let bytes = self.0.as_mut();
        let end = last.saturating_add(1).min(bytes.len() as u64 * 8);
        if first >= end {
            return;
        }
        let (from, to) = ((first / 8) as usize, ((end - 1) / 8) as usize);
        let (head, tail) = (0xffu8 << (first % 8), 0xffu8 >> (7 - (end - 1) % 8));
        if from == to {
            bytes[from] |= head & tail;
            return;
        }
        bytes[from] |= head;
        bytes[from + 1..to].fill(0xff);
        bytes[to] |= tail;
    }
    /// Marks what is marked in `other`.
    pub fn union(&mut self, other: &[u8]) {
        for (to, from) in self.0.as_mut().iter_mut().zip(other) {
            *to |= from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_any_shape_is_set_and_nothing_else() {
        for first in 0..40 {
            for last in 0..45u64 {
                let mut bits = Bitmap(vec![0u8; 5]);
                bits.set(first, last);
                let set: Vec<u64> = (0..40).filter(|i| bits.get(*i)).collect();
                assert_eq!(set, (first..=last.min(39)).collect::<Vec<_>>(), "{first} {last}");
            }
        }
    }

    #[test]
    fn runs_are_what_was_set() {
        let mut bits = Bitmap(vec![0u8; 8]);
        bits.set(3, 3);
        bits.set(9, 30);
        bits.set(60, 1000);
        assert_eq!(bits.runs().collect::<Vec<_>>(), [(3, 4), (9, 31), (60, 64)]);
        assert_eq!(bits.count(), 1 + 22 + 4);
        assert!(bits.get(9) && !bits.get(8) && !bits.get(5000));
        let mut other = Bitmap(vec![0u8; 8]);
        other.set(4, 8);
        bits.union(&other.0);
        assert_eq!(bits.runs().next(), Some((3, 31)));
    }
}

//! A bitmap of granules over a byte range, in memory that somebody else owns.

/// A view of bytes as bits, one per granule; bit `i` is bit `i % 8` of byte `i / 8`.
pub struct Bitmap<B>(pub B);

impl<B: AsRef<[u8]>> Bitmap<B> {
    /// Whether the granule is marked.
    pub fn get(&self, granule: u64) -> bool {
        self.0.as_ref().get((granule / 8) as usize).is_some_and(|b| b & (1 << (granule % 8)) != 0)
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
        for granule in first..=last.min((bytes.len() as u64 * 8).saturating_sub(1)) {
            bytes[(granule / 8) as usize] |= 1 << (granule % 8);
        }
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

//! The newest point that two histories have in common, as far as that can be proved.
//!
//! Owns: the search. Invariant (I9): a point is common only if both sides have the same chain hash at the
//! same LSN; where nothing can be proved, everything may differ.

use crate::units::{Hash, HistoryPoint, Lsn};

/// A shadow's search through the points that its primary offers, newest first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Search {
    /// Oldest first.
    points: Vec<HistoryPoint>,
}

impl Search {
    /// Among `points`. Those above `applied` are not in the image here, so they bound nothing. That of LSN
    /// 0 is every history's, and says nothing of the images, unless both were `blank` there.
    pub fn new(mut points: Vec<HistoryPoint>, applied: Lsn, blank: bool) -> Search {
        points.retain(|p| p.lsn <= applied && (p.lsn > Lsn(0) || blank));
        points.sort_by_key(|p| p.lsn);
        Search { points }
    }

    /// The LSN whose chain hash decides next. `None`: no point is common.
    pub fn next(&self) -> Option<Lsn> {
        self.points.last().map(|p| p.lsn)
    }

    /// The own chain hash there; `None`: it is not known any more. The newest common point, once found.
    pub fn compare(&mut self, own: Option<Hash>) -> Option<HistoryPoint> {
        let point = self.points.pop()?;
        (own == Some(point.hash)).then_some(point)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn point(lsn: u64, branch: u8) -> HistoryPoint {
        HistoryPoint { lsn: Lsn(lsn), hash: Hash([branch.wrapping_add(lsn as u8); 32]) }
    }

    proptest! {
        /// Two histories that part after `common`, of which each side knows some points.
        #[test]
        fn finds_the_newest_provable_point_and_nothing_else(
            common in 0u64..20,
            offered in prop::collection::vec(0u64..40, 0..12),
            known in prop::collection::btree_set(0u64..40, 0..30),
            applied in 0u64..40,
            blank: bool,
        ) {
            let branch = |side: u8, lsn: u64| point(lsn, if lsn <= common { 0 } else { 100 * side });
            let points: Vec<_> = offered.iter().map(|lsn| branch(1, *lsn)).collect();
            let mut search = Search::new(points, Lsn(applied), blank);
            let (mut found, mut steps) = (None, 0);
            while let Some(lsn) = search.next() {
                found = search.compare(known.contains(&lsn.0).then(|| branch(2, lsn.0).hash));
                steps += 1;
                if found.is_some() {
                    break;
                }
            }
            let expected = offered
                .iter()
                .copied()
                .filter(|l| *l <= common && *l <= applied && known.contains(l) && (*l > 0 || blank))
                .max();
            prop_assert_eq!(found.map(|p| p.lsn.0), expected);
            prop_assert!(steps <= offered.len());
        }
    }

    #[test]
    fn an_equal_lsn_with_another_hash_is_not_common() {
        let mut search = Search::new(vec![point(5, 9), point(5, 1), point(3, 0)], Lsn(9), false);
        assert_eq!((search.next(), search.compare(Some(point(5, 0).hash))), (Some(Lsn(5)), None));
        assert_eq!((search.next(), search.compare(Some(point(5, 0).hash))), (Some(Lsn(5)), None));
        assert_eq!((search.next(), search.compare(None)), (Some(Lsn(3)), None));
        assert_eq!((search.next(), search.compare(None)), (None, None));
    }
}

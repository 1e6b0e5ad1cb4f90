//! The backlog: what the journal holds and the image lacks, known well enough to be read from there.
//!
//! Per record that is not in the image: where it lies, and its table of extents, which was verified with the rest of
//! the record when that came, or was recovered. Nothing has to be read for the index that is made of them when somebody
//! is to read through it (a primary that serves before its image has caught up): extent to record and place in its
//! payload.
//!
//! Owns: both. Invariants: the records are those of one history, without a gap, the newest at the end; the index names
//! for every sector the newest of the records that it covers, and nothing that the image has; both take bounded memory
//! ([`MOST`]): of too many the oldest go, and those have to be in the image before anything is read; while something is,
//! no more are taken.

use crate::extents::{ExtentMap, Piece};
use crate::format::record::{Content, Record};
use crate::units::{Extent, HistoryPoint, Lsn};
use std::collections::VecDeque;

/// Extents that are remembered, at most: 8 GiB of database pages. 24 MiB; and 60 MiB of index while that is read.
pub const MOST: usize = 1 << 20;
/// What a record counts for beside its extents.
const ENTRY: usize = 4;

/// Where a sector's newest bytes are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// In this record.
    pub lsn: Lsn,
    /// From there on in its payload; `None`: zeroes.
    pub at: Option<u64>,
}

impl Piece for Held {
    fn skip(&self, bytes: u64) -> Held {
        Held { lsn: self.lsn, at: self.at.map(|at| at + bytes) }
    }
}

/// Where a record lies in the journal's file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The record.
    pub point: HistoryPoint,
    /// Where it begins.
    pub offset: u64,
    /// Bytes, padding included.
    pub len: u32,
}

struct Entry {
    place: Place,
    extents: Box<[(Extent, Content)]>,
}

impl Entry {
    fn weight(&self) -> usize {
        self.extents.len() + ENTRY
    }
}

/// See the module's documentation.
#[derive(Default)]
pub struct Backlog {
    entries: VecDeque<Entry>,
    /// What they count for, of [`MOST`].
    weight: usize,
    /// Their bytes in the journal.
    bytes: u64,
    index: ExtentMap<Held>,
    /// The newest record that the index covers.
    covered: Option<Lsn>,
}

impl Backlog {
    /// A record is in the journal, or on its way there, at this offset of the file.
    pub fn push(&mut self, record: &Record, offset: u64) {
        let point = record.point();
        let follows = self.end().is_none_or(|end| end.next() == point.lsn);
        if self.covered.is_some() && (!follows || self.weight >= MOST) {
            return; // those before it are being read
        }
        if !follows {
            self.clear();
        }
        let extents: Box<[_]> = record.extents().collect();
        let place = Place { point, offset, len: record.padded_len() as u32 };
        let entry = Entry { place, extents };
        self.weight += entry.weight();
        self.bytes += u64::from(place.len);
        self.entries.push_back(entry);
        while self.weight > MOST && self.covered.is_none() {
            self.pop();
        }
    }

    fn pop(&mut self) -> Option<Entry> {
        let entry = self.entries.pop_front()?;
        self.forget(&entry);
        Some(entry)
    }

    fn forget(&mut self, entry: &Entry) {
        self.weight -= entry.weight();
        self.bytes -= u64::from(entry.place.len);
    }

    /// The newest record here.
    pub fn end(&self) -> Option<Lsn> {
        self.entries.back().map(|e| e.place.point.lsn)
    }

    /// Bytes of the journal that the image lacks.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Everything up to `lsn` is in the image.
    pub fn applied(&mut self, lsn: Lsn) {
        while self.entries.front().is_some_and(|e| e.place.point.lsn <= lsn) {
            let Some(entry) = self.pop() else { break };
            for (extent, _) in entry.extents.iter().filter(|_| self.covered.is_some()) {
                self.index.remove_if(*extent, |held| held.lsn <= lsn);
            }
        }
    }

    /// The records after `lsn` were given up; so is whoever reads them.
    pub fn cut(&mut self, lsn: Lsn) {
        if self.covered > Some(lsn) {
            self.close();
        }
        while let Some(entry) = self.entries.pop_back_if(|e| e.place.point.lsn > lsn) {
            self.forget(&entry);
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Backlog::default();
    }

    /// Nobody reads through it any more.
    pub fn close(&mut self) {
        self.index.clear();
        self.covered = None;
    }

    /// Every record after `applied`, up to `end`, is here.
    pub fn reaches(&self, applied: Lsn, end: Lsn) -> bool {
        let first = self.entries.front().map(|e| e.place.point.lsn);
        applied >= end || (first.is_some_and(|f| f <= applied.next()) && self.end() >= Some(end))
    }

    /// The index is to cover everything up to `end`, from what it covers now on.
    pub fn cover(&mut self, end: Lsn) {
        let from = self.covered.unwrap_or(Lsn(0));
        let news = |e: &&Entry| e.place.point.lsn > from && e.place.point.lsn <= end;
        for entry in self.entries.iter().filter(news) {
            let (lsn, mut payload) = (entry.place.point.lsn, 0);
            for (extent, content) in &entry.extents {
                let at = (*content == Content::Data).then_some(payload);
                payload += at.map_or(0, |_| extent.len());
                self.index.insert(*extent, Held { lsn, at });
            }
        }
        self.covered = Some(end.max(from));
    }

    /// The newest record that may have to be read; none when nobody reads through it.
    pub fn covered(&self) -> Option<Lsn> {
        self.covered
    }

    /// The parts of `extent` that the image lacks, in order.
    pub fn parts(&self, extent: Extent) -> impl Iterator<Item = (Extent, Held)> {
        self.index.overlaps(extent)
    }

    /// Where a record lies, while it is not in the image.
    pub fn place(&self, lsn: Lsn) -> Option<Place> {
        let first = self.entries.front()?.place.point.lsn;
        Some(self.entries.get(lsn.0.checked_sub(first.0)? as usize)?.place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::aligned;
    use crate::format::record::{Compressor, EncodeJob, Kind, Stamp, encode, room, seal};
    use crate::units::{Address, Generation, GroupId, Hash, SECTOR};

    const SECTORS: u64 = 64;

    fn record(lsn: u64, writes: &[(u64, u64, Content)]) -> Record {
        let place = |at: u64| Address::new(0, at * SECTOR).unwrap();
        let extents: Vec<_> =
            writes.iter().map(|(at, len, c)| (Extent::new(place(*at), len * SECTOR).unwrap(), *c)).collect();
        let raw: u64 = writes.iter().filter(|w| w.2 == Content::Data).map(|w| w.1 * SECTOR).sum();
        let mut buf = aligned(room(extents.len()) + raw as usize);
        buf.resize(room(extents.len()) + raw as usize, lsn as u8);
        let encoded = encode(EncodeJob { extents, buf, level: None }, &mut Compressor::default());
        let stamp = Stamp {
            group: GroupId::default(),
            generation: Generation::default(),
            lsn: Lsn(lsn),
            prev: Hash::default(),
            time: lsn,
            flags: 0,
            last_write: lsn,
            durable: Lsn(0),
            kind: Kind::Writes,
        };
        seal(encoded, stamp)
    }

    /// What each sector's newest record is, as the index says.
    fn newest(b: &Backlog) -> Vec<Option<(u64, Option<u64>)>> {
        let sector = |s| Extent::new(Address::new(0, s * SECTOR).unwrap(), SECTOR).unwrap();
        (0..SECTORS).map(|s| b.parts(sector(s)).next().map(|(_, h)| (h.lsn.0, h.at))).collect()
    }

    #[test]
    fn the_index_names_the_newest_of_what_the_image_lacks() {
        let mut random = 7u64;
        let mut draw = |n: u64| {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (random >> 33) % n
        };
        for _ in 0..200 {
            let mut b = Backlog::default();
            let mut model = vec![None; SECTORS as usize];
            let (applied, end, open) = (draw(5), 8 + draw(8), 5 + draw(4));
            for lsn in 1..=end {
                let (mut writes, mut at, mut payload) = (Vec::new(), draw(8), 0);
                while at < SECTORS - 8 {
                    let len = 1 + draw(8);
                    let content = if draw(4) == 0 { Content::Zeroes } else { Content::Data };
                    writes.push((at, len, content));
                    for s in 0..len {
                        let from = (content == Content::Data).then_some(payload + s * SECTOR);
                        model[(at + s) as usize] = Some((lsn, from));
                    }
                    payload += if content == Content::Data { len * SECTOR } else { 0 };
                    at += len + draw(9);
                }
                b.push(&record(lsn, &writes), lsn << 20);
                if lsn == open {
                    b.applied(Lsn(applied));
                    assert!(b.reaches(Lsn(applied), Lsn(lsn)) && !b.reaches(Lsn(applied), Lsn(lsn + 1)));
                    b.cover(Lsn(lsn));
                }
            }
            b.cover(Lsn(end));
            for applied in applied..=end {
                b.applied(Lsn(applied));
                let lacking = |m: &Option<(u64, Option<u64>)>| m.filter(|(lsn, _)| *lsn > applied);
                assert_eq!(newest(&b), model.iter().map(lacking).collect::<Vec<_>>());
                assert!(b.place(Lsn(applied)).is_none());
                assert_eq!(
                    b.place(Lsn(applied + 1)).map(|p| p.offset),
                    (applied < end).then_some((applied + 1) << 20)
                );
            }
        }
    }

    #[test]
    fn of_too_many_the_oldest_go_unless_somebody_reads_them() {
        let many: Vec<_> = (0..2000).map(|i| (i * 2, 1, Content::Zeroes)).collect();
        let mut b = Backlog::default();
        let count = MOST as u64 / 2000 + 3;
        (1..=count).for_each(|lsn| b.push(&record(lsn, &many), lsn));
        assert!(b.weight <= MOST && b.end() == Some(Lsn(count)));
        assert!(!b.reaches(Lsn(0), Lsn(count)) && b.reaches(Lsn(5), Lsn(count)));
        b.applied(Lsn(5));
        b.cover(Lsn(count));
        (count + 1..count + 9).for_each(|lsn| b.push(&record(lsn, &many), lsn));
        let end = b.end().unwrap();
        assert!(b.weight < MOST + 2100 && end < Lsn(count + 8) && b.reaches(Lsn(5), end));
        // Later ones are not taken over a gap, whatever room there is.
        b.applied(Lsn(20));
        b.push(&record(count + 9, &many), 1);
        assert_eq!(b.end(), Some(end));
        b.close();
        b.push(&record(count + 10, &many), 1);
        assert!(b.reaches(Lsn(count + 9), Lsn(count + 10)) && !b.reaches(Lsn(count + 8), Lsn(count + 10)));
        b.applied(Lsn(count + 10));
        assert_eq!((b.weight, b.bytes()), (0, 0));
    }

    #[test]
    fn a_gap_or_a_cut_leaves_nothing_that_is_not_of_this_history() {
        let mut b = Backlog::default();
        let one = [(0, 1, Content::Data)];
        (3..=6).for_each(|lsn| b.push(&record(lsn, &one), lsn));
        assert!(b.reaches(Lsn(2), Lsn(6)) && b.reaches(Lsn(4), Lsn(6)) && !b.reaches(Lsn(1), Lsn(6)));
        b.cut(Lsn(4));
        assert!(b.reaches(Lsn(2), Lsn(4)) && b.place(Lsn(5)).is_none());
        b.push(&record(5, &one), 50);
        assert_eq!(b.place(Lsn(5)).map(|p| p.offset), Some(50));
        b.push(&record(9, &one), 9);
        assert!(b.place(Lsn(5)).is_none() && !b.reaches(Lsn(4), Lsn(9)) && b.reaches(Lsn(8), Lsn(9)));
        assert!(b.reaches(Lsn(9), Lsn(9)) && Backlog::default().reaches(Lsn(3), Lsn(3)));
    }

    #[test]
    fn what_the_image_lacks_is_counted_in_bytes_of_the_journal() {
        let mut b = Backlog::default();
        assert_eq!((b.bytes(), b.end(), b.covered()), (0, None, None));
        let lengths = [1, 20, 40].map(|sectors| [(0, sectors, Content::Data)]);
        let bytes: Vec<u64> = (3..).zip(&lengths).map(|(lsn, w)| record(lsn, w).padded_len()).collect();
        (3..).zip(&lengths).for_each(|(lsn, w)| b.push(&record(lsn, w), lsn << 20));
        assert_eq!(bytes, [4096, 12288, 24576]);
        assert_eq!((b.bytes(), b.end()), (40960, Some(Lsn(5))));
        let place = b.place(Lsn(4)).unwrap();
        assert_eq!((place.point.lsn, place.offset, place.len), (Lsn(4), 4 << 20, 12288));
        assert_eq!([2, 6].map(|lsn| b.place(Lsn(lsn))), [None; 2]);
        b.applied(Lsn(3));
        assert_eq!(b.bytes(), 36864);
        b.cut(Lsn(4));
        assert_eq!((b.bytes(), b.end()), (12288, Some(Lsn(4))));
        b.clear();
        assert_eq!((b.bytes(), b.weight, b.end()), (0, 0, None));
    }

    #[test]
    fn a_cut_ends_the_reading_only_of_what_it_gives_up() {
        let reading = |lsn| {
            let mut b = Backlog::default();
            (1..=6).for_each(|lsn| b.push(&record(lsn, &[(lsn, 1, Content::Data)]), lsn));
            b.cover(Lsn(4));
            assert_eq!(newest(&b).iter().flatten().count(), 4);
            b.cut(Lsn(lsn));
            (b.covered(), newest(&b).iter().flatten().count())
        };
        assert_eq!([3, 4, 5].map(reading), [(None, 0), (Some(Lsn(4)), 4), (Some(Lsn(4)), 4)]);
    }

    #[test]
    fn the_index_never_covers_less_than_before_and_closed_it_covers_nothing() {
        let mut b = Backlog::default();
        (1..=6).for_each(|lsn| b.push(&record(lsn, &[(0, 1, Content::Data)]), lsn));
        b.cover(Lsn(5));
        b.cover(Lsn(3));
        assert_eq!((b.covered(), newest(&b)[0]), (Some(Lsn(5)), Some((5, Some(0)))));
        b.close();
        assert_eq!((b.covered(), newest(&b)[0]), (None, None));
        b.cover(Lsn(2));
        assert_eq!((b.covered(), newest(&b)[0]), (Some(Lsn(2)), Some((2, Some(0)))));
    }

    /// Exactly as much as there may be is kept, and taken while somebody reads.
    #[test]
    fn the_bound_of_what_is_remembered_is_used_to_the_last() {
        let of = |lsn, weight: usize| {
            let writes: Vec<_> = (0..(weight - ENTRY) as u64).map(|i| (i * 2, 1, Content::Zeroes)).collect();
            record(lsn, &writes)
        };
        let whole = 1024;
        let count = (MOST / whole) as u64;
        let mut b = Backlog::default();
        (1..=count).for_each(|lsn| b.push(&of(lsn, whole), lsn));
        assert_eq!((b.weight, b.reaches(Lsn(0), Lsn(count))), (MOST, true), "as many as there may be");
        b.push(&of(count + 1, ENTRY + 1), 1);
        assert!(!b.reaches(Lsn(0), Lsn(count)) && b.reaches(Lsn(1), Lsn(count + 1)), "the oldest went");
        b.cover(Lsn(count + 1));
        b.push(&of(count + 2, whole - ENTRY - 1), 1);
        assert_eq!((b.weight, b.end()), (MOST, Some(Lsn(count + 2))));
        b.push(&of(count + 3, ENTRY + 1), 1);
        assert_eq!(b.end(), Some(Lsn(count + 2)), "and no more while they are read");
    }
}

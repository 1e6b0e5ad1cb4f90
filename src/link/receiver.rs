//! What a shadow accepts from its primary.
//!
//! Owns: the check of each record against what is held. Invariant (I7): a record is taken only if
//! group, size, term, LSN and previous hash all fit; otherwise nothing happens but the stated outcome.
//! What is taken can be applied: once it is in the journal there is no way to be rid of it.

use crate::format::record::{Kind, Record, Stamp, flags};
use crate::format::superblock::Volume;
use crate::units::{Extent, Generation, GroupId, HistoryPoint, Lsn, Term};
use std::cmp::Ordering;

/// What a shadow holds at its tail.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Held {
    /// Group.
    pub group: GroupId,
    /// Highest term seen; the primary's.
    pub term: Term,
    /// Newest record.
    pub point: HistoryPoint,
    /// Its generation.
    pub generation: Generation,
    /// Its last write sequence.
    pub last_write: u64,
    /// Its time.
    pub time: u64,
    /// Its durable LSN.
    pub durable: Lsn,
}

/// What to do with a record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Append it.
    Accept,
    /// It is held already: ignore it (I11).
    Duplicate,
    /// The link is broken or the sender is: close it. Why.
    Reject(&'static str),
}

/// Judges a record whose own hashes are right. `volumes` are the group's, in order of their numbers.
pub fn judge(held: &Held, volumes: &[Volume], record: &Record) -> Verdict {
    let s: &Stamp = &record.stamp;
    if s.group != held.group {
        return Verdict::Reject("a record of another group");
    }
    if s.generation.term > held.term {
        return Verdict::Reject("a record of a term that its sender did not announce");
    }
    if s.lsn == held.point.lsn && record.chain != held.point.hash {
        return Verdict::Reject("a record that differs from the one held");
    }
    if s.lsn <= held.point.lsn {
        return Verdict::Duplicate;
    }
    if s.lsn != held.point.lsn.next() {
        return Verdict::Reject("a record is missing in between");
    }
    if s.prev != held.point.hash {
        return Verdict::Reject("a record that does not continue the history here");
    }
    let continues = match s.generation.cmp(&held.generation) {
        Ordering::Less => false,
        Ordering::Equal => true,
        Ordering::Greater => s.flags & flags::OPENS != 0,
    };
    if !continues {
        return Verdict::Reject("a record of a generation that was never opened");
    }
    let falls = s.time < held.time || s.last_write < held.last_write;
    if falls || (s.generation == held.generation && s.durable < held.durable) {
        return Verdict::Reject("a record whose time or sequence falls");
    }
    if s.kind == Kind::SyncSet && record.members().is_none() {
        return Verdict::Reject("a list of the sync set that can't be read");
    }
    if s.kind == Kind::Mark && record.mark().is_none() {
        return Verdict::Reject("a mark that can't be read");
    }
    if !record.extents().all(|(extent, _)| lies_within(volumes, extent)) {
        return Verdict::Reject("a write outside the group's volumes");
    }
    Verdict::Accept
}

fn lies_within(volumes: &[Volume], extent: Extent) -> bool {
    let at = extent.address();
    let found = volumes.binary_search_by_key(&at.volume(), |v| v.number);
    found.is_ok_and(|i| extent.len() <= volumes[i].size.saturating_sub(at.offset()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::aligned;
    use crate::format::record::{Compressor, Content, EncodeJob, Encoded, encode, encode_note, room, seal};
    use crate::units::{Address, Hash, NodeId};

    fn held() -> Held {
        let term = Term { counter: 2, node: NodeId(1) };
        Held {
            group: GroupId([1; 16]),
            term,
            point: HistoryPoint { lsn: Lsn(7), hash: Hash([7; 32]) },
            generation: Generation { term, start: 3 },
            last_write: 40,
            time: 1000,
            durable: Lsn(5),
        }
    }

    fn record(change: impl FnOnce(&mut Stamp)) -> Record {
        sealed(encode_note(&[]), change)
    }

    fn sealed(encoded: Encoded, change: impl FnOnce(&mut Stamp)) -> Record {
        let h = held();
        let mut stamp = Stamp {
            group: h.group,
            generation: h.generation,
            lsn: Lsn(8),
            prev: h.point.hash,
            time: 1000,
            flags: 0,
            last_write: 41,
            durable: Lsn(6),
            kind: Kind::SyncSet,
        };
        change(&mut stamp);
        seal(encoded, stamp)
    }

    #[test]
    fn only_the_exact_continuation_is_accepted() {
        let verdict = |change: fn(&mut Stamp)| judge(&held(), &volumes(), &record(change));
        assert_eq!(verdict(|_| {}), Verdict::Accept);
        assert_eq!(verdict(|s| s.lsn = Lsn(6)), Verdict::Duplicate);
        assert!(matches!(verdict(|s| s.lsn = Lsn(7)), Verdict::Reject(_)), "another history's record");
        assert_eq!(
            verdict(|s| {
                s.generation.start = 4;
                s.flags = flags::OPENS;
                s.durable = Lsn(1)
            }),
            Verdict::Accept
        );
        let rejected: [fn(&mut Stamp); 9] = [
            |s| s.group = GroupId([2; 16]),
            |s| s.generation.term.counter = 3,
            |s| s.lsn = Lsn(9),
            |s| s.prev = Hash([8; 32]),
            |s| s.generation.start = 4,
            |s| {
                s.generation.start = 2;
                s.flags = flags::OPENS
            },
            |s| s.time = 999,
            |s| s.last_write = 39,
            |s| s.durable = Lsn(4),
        ];
        for (i, change) in rejected.into_iter().enumerate() {
            assert!(matches!(verdict(change), Verdict::Reject(_)), "{i}");
        }
    }

    fn volumes() -> Vec<Volume> {
        let volume = |number, size| Volume { number, size, name: String::new() };
        vec![volume(0, 1 << 20), volume(3, 8192)]
    }

    #[test]
    fn a_write_outside_the_volumes_is_never_appended() {
        let verdict = |volume: u8, offset: u64, len: u64, content| {
            let extents = vec![(Extent::new(Address::new(volume, offset).unwrap(), len).unwrap(), content)];
            let mut buf = aligned(0);
            buf.resize(room(1) + if content == Content::Data { len as usize } else { 0 }, 7);
            let encoded = encode(EncodeJob { extents, buf, level: None }, &mut Compressor::default());
            judge(&held(), &volumes(), &sealed(encoded, |s| s.kind = Kind::Writes))
        };
        for content in [Content::Data, Content::Zeroes] {
            assert_eq!(verdict(0, (1 << 20) - 4096, 4096, content), Verdict::Accept);
            assert_eq!(verdict(3, 0, 8192, content), Verdict::Accept);
            for (volume, offset, len) in [
                (0, (1 << 20) - 512, 1024),
                (0, 1 << 20, 512),
                (3, 8192, 512),
                (3, 0, 8704),
                (1, 0, 512),
                (255, 1 << 40, 512),
            ] {
                assert!(
                    matches!(verdict(volume, offset, len, content), Verdict::Reject(_)),
                    "{volume}:{offset}+{len}"
                );
            }
        }
        assert!(matches!(verdict(0, 0, 1 << 40, Content::Zeroes), Verdict::Reject(_)));
    }

    #[test]
    fn a_malformed_mark_is_never_appended() {
        let verdict =
            |text: &[u8]| judge(&held(), &volumes(), &sealed(encode_note(text), |s| s.kind = Kind::Mark));
        for good in ["a", "before batch", &"x".repeat(200), "\u{fc}ber"] {
            assert_eq!(verdict(good.as_bytes()), Verdict::Accept, "{good}");
        }
        for bad in [&b""[..], b" a", b"a\n", b"a\x1b[2J", b"\xff", &[b'x'; 201]] {
            assert!(matches!(verdict(bad), Verdict::Reject(_)), "{bad:?}");
        }
    }

    #[test]
    fn a_malformed_sync_set_is_never_appended() {
        let verdict = |ids: &[u8]| judge(&held(), &volumes(), &sealed(encode_note(ids), |_| {}));
        let ids = |n: u64| (1..=n).flat_map(u64::to_le_bytes).collect::<Vec<u8>>();
        assert_eq!(verdict(&ids(0)), Verdict::Accept);
        assert_eq!(verdict(&ids(64)), Verdict::Accept);
        for bad in [ids(65), vec![1; 7], vec![1; 9], vec![0; 8], vec![1; 16], vec![1; 1 << 20]] {
            assert!(matches!(verdict(&bad), Verdict::Reject(_)), "{} bytes", bad.len());
        }
    }

    #[test]
    fn what_stays_the_same_has_not_fallen_and_a_flush_opens_nothing() {
        let verdict = |change: fn(&mut Stamp)| judge(&held(), &volumes(), &record(change));
        let same = |s: &mut Stamp| (s.time, s.last_write, s.durable) = (1000, 40, Lsn(5));
        assert_eq!(verdict(same), Verdict::Accept);
        // The primary's highest term is announced; a record of an earlier one of its is not new.
        assert_eq!(verdict(|s| (s.lsn, s.generation.term.counter) = (Lsn(6), 1)), Verdict::Duplicate);
        let next = |flags| move |s: &mut Stamp| (s.generation.start, s.flags) = (4, flags);
        let judge = |change: &dyn Fn(&mut Stamp)| judge(&held(), &volumes(), &record(|s| change(s)));
        assert_eq!(judge(&next(flags::OPENS | flags::SYNC)), Verdict::Accept);
        assert!(matches!(judge(&next(flags::SYNC)), Verdict::Reject(_)));
        // In a generation of its own, too, neither time nor sequence falls.
        for change in [|s: &mut Stamp| s.time = 999, |s: &mut Stamp| s.last_write = 39] {
            let both = |s: &mut Stamp| {
                next(flags::OPENS)(s);
                change(s);
            };
            assert!(matches!(judge(&both), Verdict::Reject(_)));
        }
    }

    #[test]
    fn the_very_record_that_is_held_is_a_duplicate() {
        let next = record(|_| {});
        let held = Held { point: next.point(), ..held() };
        assert_eq!(judge(&held, &volumes(), &next), Verdict::Duplicate);
    }
}

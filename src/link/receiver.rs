//! What a shadow accepts from its primary.
//!
//! Owns: the check of each record against what is held. Invariant (I7): a record is taken only if
//! group, term, LSN and previous hash all fit; otherwise nothing happens but the stated outcome.

use crate::format::record::{Record, Stamp, flags};
use crate::units::{Generation, GroupId, HistoryPoint, Lsn, Term};

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

/// Judges a record whose own hashes are right.
pub fn judge(held: &Held, record: &Record) -> Verdict {
    let s: &Stamp = &record.stamp;
    if s.group != held.group {
        return Verdict::Reject("a record of another group");
    }
    if s.generation.term > held.term {
        return Verdict::Reject("a record of a term that its sender did not announce");
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
    let opens = s.flags & flags::OPENS != 0;
    if s.generation != held.generation && !(opens && s.generation > held.generation) {
        return Verdict::Reject("a record of a generation that was never opened");
    }
    let falls = s.time < held.time || s.last_write < held.last_write;
    if falls || (s.generation == held.generation && s.durable < held.durable) {
        return Verdict::Reject("a record whose time or sequence falls");
    }
    Verdict::Accept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::{Kind, encode_note, seal};
    use crate::units::{Hash, NodeId};

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
        seal(encode_note(&[]), stamp)
    }

    #[test]
    fn only_the_exact_continuation_is_accepted() {
        let verdict = |change: fn(&mut Stamp)| judge(&held(), &record(change));
        assert_eq!(verdict(|_| {}), Verdict::Accept);
        assert_eq!(verdict(|s| s.lsn = Lsn(7)), Verdict::Duplicate);
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
}

//! Terms and promotion: who may become the primary, and when.
//!
//! Owns: the promotion table and the arithmetic of terms and generations. Invariants (I7, I8): a new
//! term is higher than every term seen; nothing is acknowledged under a term that was superseded.

use crate::format::message::{MAX_GENERATIONS, Opening, Role};
use crate::format::superblock::MAX_PEERS;
use crate::units::{Generation, HistoryPoint, NodeId, SALT_BITS, Term};

/// What a node knows when it is told to become the primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Its role.
    pub role: Role,
    /// Its image is consistent.
    pub consistent: bool,
    /// A primary is connected and heard right now.
    pub primary_heard: bool,
    /// The operator's word, or the fence hook's, that the old primary can't write any more.
    pub fenced: bool,
    /// It does not know of acknowledged writes that it lacks, or the operator has accepted that.
    pub current: bool,
}

/// The answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Promotion {
    /// Go on.
    Allowed,
    /// It is the primary.
    AlreadyPrimary,
    /// Only half an image is here.
    Inconsistent,
    /// The primary lives: move with a switchover, or stop it first.
    PrimaryAlive,
    /// Nobody vouches that the old primary is stopped.
    Unfenced,
    /// It was lost as a member of the sync set, and others went on without it.
    Outdated,
}

/// The promotion table; its test enumerates every combination of facts.
pub fn promotion(f: Facts) -> Promotion {
    match f {
        Facts { role: Role::Primary, .. } => Promotion::AlreadyPrimary,
        Facts { consistent: false, .. } => Promotion::Inconsistent,
        Facts { primary_heard: true, .. } => Promotion::PrimaryAlive,
        Facts { fenced: false, .. } => Promotion::Unfenced,
        Facts { current: false, .. } => Promotion::Outdated,
        Facts { current: true, .. } => Promotion::Allowed,
    }
}

/// What a primary knows when it is told that a member of its sync set is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutdateFacts {
    /// It is a primary that serves.
    pub serving: bool,
    /// Another change of this node is under way.
    pub busy: bool,
    /// The node is one of its peers.
    pub known: bool,
    /// That was done before.
    pub outdated: bool,
    /// It is a member.
    pub member: bool,
    /// It is connected, and was heard a moment ago.
    pub heard: bool,
    /// The operator's word, or the fence hook's, that it is stopped.
    pub fenced: bool,
}

/// The answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outdate {
    /// Go on.
    Allowed,
    /// There is nobody to wait for it.
    NotPrimary,
    /// Not now.
    Busy,
    /// No such peer.
    Unknown,
    /// It is outdated.
    Already,
    /// Nothing waits for it.
    NotMember,
    /// It is not lost.
    Alive,
    /// Nobody vouches that it is stopped: it might be promoted.
    Unfenced,
}

/// The table of an outdating; its test enumerates every combination of facts.
pub fn outdate(f: OutdateFacts) -> Outdate {
    match f {
        OutdateFacts { serving: false, .. } => Outdate::NotPrimary,
        OutdateFacts { busy: true, .. } => Outdate::Busy,
        OutdateFacts { known: false, .. } => Outdate::Unknown,
        OutdateFacts { member: false, outdated: true, .. } => Outdate::Already,
        OutdateFacts { member: false, .. } => Outdate::NotMember,
        OutdateFacts { heard: true, .. } => Outdate::Alive,
        OutdateFacts { fenced: false, .. } => Outdate::Unfenced,
        OutdateFacts { fenced: true, .. } => Outdate::Allowed,
    }
}

/// What a node knows when it is told to give its own records up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RejoinFacts {
    /// Its role.
    pub role: Role,
    /// It was a primary and has learned of another one since, or is about to become a shadow for that.
    pub retired: bool,
    /// A peer's history differs from its own.
    pub diverged: bool,
    /// The operator has named the side that is kept.
    pub kept: bool,
}

/// The answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rejoin {
    /// Go on.
    Allowed,
    /// There is nothing to give up.
    Follows,
    /// A primary that knows of no other.
    OnlyPrimary,
    /// Two primaries: the operator has to say which side is kept.
    NotKept,
}

/// The table of [`Rejoin`]; its test enumerates every combination of facts.
pub fn rejoin(f: RejoinFacts) -> Rejoin {
    match f {
        RejoinFacts { retired: true, .. } => Rejoin::Allowed,
        RejoinFacts { role: Role::Shadow, diverged: true, .. } => Rejoin::Allowed,
        RejoinFacts { role: Role::Shadow, diverged: false, .. } => Rejoin::Follows,
        RejoinFacts { diverged: false, .. } => Rejoin::OnlyPrimary,
        RejoinFacts { kept: false, .. } => Rejoin::NotKept,
        RejoinFacts { kept: true, .. } => Rejoin::Allowed,
    }
}

/// What a primary knows when it is told to hand its place over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SwitchFacts {
    /// It is a primary that serves.
    pub serving: bool,
    /// The shadow is one of its peers.
    pub known: bool,
    /// Its address is known here: this node will have to dial it.
    pub dialled: bool,
    /// It is fed right now.
    pub linked: bool,
    /// It has an image of its own, and all records that the journal had not just got.
    pub current: bool,
    /// Another change of this node is under way.
    pub busy: bool,
}

/// The answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Switch {
    /// Go on.
    Allowed,
    /// There is nothing to hand over.
    NotPrimary,
    /// No such peer.
    Unknown,
    /// It could not be followed.
    NoAddress,
    /// It can't be told.
    Unreachable,
    /// It lacks too much.
    NotCurrent,
    /// Not now.
    Busy,
}

/// The table of a switchover; its test enumerates every combination of facts.
pub fn switchover(f: SwitchFacts) -> Switch {
    match f {
        SwitchFacts { serving: false, .. } => Switch::NotPrimary,
        SwitchFacts { busy: true, .. } => Switch::Busy,
        SwitchFacts { known: false, .. } => Switch::Unknown,
        SwitchFacts { dialled: false, .. } => Switch::NoAddress,
        SwitchFacts { linked: false, .. } => Switch::Unreachable,
        SwitchFacts { current: false, .. } => Switch::NotCurrent,
        SwitchFacts { current: true, .. } => Switch::Allowed,
    }
}

/// The term of a promotion on `node` that has seen `seen`.
pub fn next_term(seen: Term, node: NodeId) -> Term {
    Term { counter: seen.counter + 1, node }
}

/// The next run of a primary under `term`, after the runs in `openings`. Of `salt` the low bits count.
pub fn next_generation(openings: &[Opening], term: Term, salt: u32) -> Generation {
    let counts = openings.iter().map(|o| o.generation).filter(|g| g.term == term).map(Generation::count);
    let count = (counts.max().unwrap_or(0) + 1).min(u32::MAX >> SALT_BITS);
    Generation { term, start: (count << SALT_BITS) + (salt & ((1 << SALT_BITS) - 1)) }
}

/// Adds an opening, once; the oldest goes when there are too many.
pub fn note_opening(openings: &mut Vec<Opening>, generation: Generation, at: HistoryPoint) {
    if openings.iter().any(|o| o.generation == generation) {
        return;
    }
    openings.push(Opening { generation, at });
    if openings.len() > MAX_GENERATIONS {
        openings.remove(0);
    }
}

/// A record says that it opens this run. Of those that begin at one record the one that has records is the last: the others
/// have none, or none that is of this history.
pub fn note_opened(openings: &mut Vec<Opening>, generation: Generation, at: HistoryPoint) {
    match openings.iter().position(|o| o.generation == generation) {
        Some(i) if openings[i..].iter().all(|o| o.at == at) => openings[i..].rotate_left(1),
        Some(_) => {}
        None => note_opening(openings, generation, at),
    }
}

/// Notes that a member of the sync set was lost. Who was lost longest ago is forgotten when there are too many.
pub fn note_outdated(outdated: &mut Vec<NodeId>, node: NodeId) {
    if outdated.contains(&node) {
        return;
    }
    outdated.push(node);
    if outdated.len() > MAX_PEERS {
        outdated.remove(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Lsn;

    #[test]
    fn of_runs_that_begin_at_one_record_the_one_that_has_records_is_the_last() {
        let run = |start| Generation { term: Term { counter: 1, node: NodeId(1) }, start };
        let at = |lsn| HistoryPoint { lsn: Lsn(lsn), ..HistoryPoint::default() };
        let mut openings = Vec::new();
        for (start, lsn) in [(1, 0), (2, 7), (3, 7), (4, 7)] {
            note_opening(&mut openings, run(start), at(lsn));
        }
        let starts = |o: &[Opening]| o.iter().map(|o| o.generation.start).collect::<Vec<_>>();
        note_opened(&mut openings, run(2), at(7));
        assert_eq!(starts(&openings), [1, 3, 4, 2]);
        // Once more, as a restart goes through the journal, and what came before another record stays where it is.
        note_opened(&mut openings, run(2), at(7));
        note_opened(&mut openings, run(1), at(0));
        assert_eq!(starts(&openings), [1, 3, 4, 2]);
        note_opened(&mut openings, run(5), at(9));
        note_opened(&mut openings, run(3), at(7));
        assert_eq!(starts(&openings), [1, 3, 4, 2, 5]);
    }

    #[test]
    fn who_was_lost_last_is_never_left_out() {
        let mut outdated = Vec::new();
        (0..MAX_PEERS as u64 + 1).for_each(|n| note_outdated(&mut outdated, NodeId(n)));
        assert_eq!((outdated.len(), outdated[0]), (MAX_PEERS, NodeId(1)));
        let last = NodeId(MAX_PEERS as u64);
        note_outdated(&mut outdated, last);
        assert_eq!(outdated.iter().filter(|n| **n == last).count(), 1);
    }

    #[test]
    fn the_promotion_table_answers_every_combination() {
        for bits in 0..32u32 {
            let bit = |i: u32| bits >> i & 1 == 1;
            let role = if bit(0) { Role::Primary } else { Role::Shadow };
            let f =
                Facts { role, consistent: bit(1), primary_heard: bit(2), fenced: bit(3), current: bit(4) };
            let able = role == Role::Shadow && f.consistent && !f.primary_heard;
            assert_eq!(promotion(f) == Promotion::Allowed, able && f.fenced && f.current, "{f:?}");
            assert_eq!(promotion(f) == Promotion::Unfenced, able && !f.fenced, "{f:?}");
            assert_eq!(promotion(f) == Promotion::Outdated, able && f.fenced && !f.current, "{f:?}");
        }
    }

    #[test]
    fn the_table_of_outdating_answers_every_combination() {
        let mut counts = std::collections::BTreeMap::new();
        for bits in 0..128u32 {
            let bit = |i: u32| bits >> i & 1 == 1;
            let f = OutdateFacts {
                serving: bit(0),
                busy: bit(1),
                known: bit(2),
                outdated: bit(3),
                member: bit(4),
                heard: bit(5),
                fenced: bit(6),
            };
            let answer = outdate(f);
            let able = f.serving && !f.busy && f.known;
            // Nobody leaves the set by the primary's word alone, or while he is there.
            assert_eq!(answer == Outdate::Allowed, able && f.member && !f.heard && f.fenced, "{f:?}");
            assert_eq!(answer == Outdate::Already, able && !f.member && f.outdated, "{f:?}");
            *counts.entry(format!("{answer:?}")).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 8, "{counts:?}");
    }

    #[test]
    fn the_table_of_rejoin_answers_every_combination() {
        for bits in 0..16u32 {
            let bit = |i: u32| bits >> i & 1 == 1;
            let role = if bit(0) { Role::Primary } else { Role::Shadow };
            let f = RejoinFacts { role, retired: bit(1), diverged: bit(2), kept: bit(3) };
            let answer = rejoin(f);
            // A primary that serves gives way only when another one is known and was named as kept.
            let safe = f.retired || (f.diverged && (role == Role::Shadow || f.kept));
            assert_eq!(answer == Rejoin::Allowed, safe, "{f:?}");
            assert_eq!(answer == Rejoin::Follows, !f.retired && role == Role::Shadow && !f.diverged, "{f:?}");
        }
    }

    #[test]
    fn the_table_of_switchover_answers_every_combination() {
        let mut counts = std::collections::BTreeMap::new();
        for bits in 0..64u32 {
            let bit = |i: u32| bits >> i & 1 == 1;
            let f = SwitchFacts {
                serving: bit(0),
                known: bit(1),
                linked: bit(2),
                current: bit(3),
                busy: bit(4),
                dialled: bit(5),
            };
            let answer = switchover(f);
            let all = f.serving && f.known && f.dialled && f.linked && f.current && !f.busy;
            assert_eq!(answer == Switch::Allowed, all, "{f:?}");
            let true_of_it = match answer {
                Switch::Allowed => all,
                Switch::NotPrimary => !f.serving,
                Switch::Unknown => !f.known,
                Switch::NoAddress => !f.dialled,
                Switch::Unreachable => !f.linked,
                Switch::NotCurrent => !f.current,
                Switch::Busy => f.busy,
            };
            assert!(true_of_it, "{f:?} -> {answer:?}");
            *counts.entry(format!("{answer:?}")).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 7, "{counts:?}");
    }

    #[test]
    fn terms_and_generations_rise() {
        let seen = Term { counter: 4, node: NodeId(9) };
        let term = next_term(seen, NodeId(1));
        assert!(term > seen);
        let mut openings = Vec::new();
        for start in 1..=300 {
            let generation = next_generation(&openings, term, 0xfff0_0abc);
            assert_eq!(generation, Generation { term, start: start << 12 | 0xabc });
            assert_eq!(generation.count(), start);
            let at = HistoryPoint { lsn: Lsn(u64::from(start)), ..HistoryPoint::default() };
            note_opening(&mut openings, generation, at);
            note_opening(&mut openings, generation, at);
        }
        assert_eq!(openings.len(), MAX_GENERATIONS);
        // The last number there is: it stays, and does not begin again.
        let last = Generation { term, start: u32::MAX };
        note_opening(&mut openings, last, HistoryPoint::default());
        assert_eq!(next_generation(&openings, term, 0).count(), last.count());
    }
}

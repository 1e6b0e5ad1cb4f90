//! The handshake's decision: from where, if at all, a shadow can follow a primary.
//!
//! Owns: the table. Invariant (I9): "nothing to resync" is never concluded from labels: the outcome
//! [`Decision::Compare`] still makes both sides compare a chain hash.

use crate::format::message::{Cause, Identity, Opening, Role};
use crate::units::{Generation, HistoryPoint, Lsn, Term};

/// A peer's highest term against the own one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TermOrder {
    /// The peer has seen less.
    Lower,
    /// The very same.
    Equal,
    /// The peer has seen a promotion that this node has not.
    Higher,
    /// Equal counters of two nodes: two promotions without a winner.
    Conflicting,
}

/// Compares `peer` with `own`.
pub fn order(own: Term, peer: Term) -> TermOrder {
    match peer.counter.cmp(&own.counter) {
        std::cmp::Ordering::Less => TermOrder::Lower,
        std::cmp::Ordering::Greater => TermOrder::Higher,
        std::cmp::Ordering::Equal if peer.node == own.node => TermOrder::Equal,
        std::cmp::Ordering::Equal => TermOrder::Conflicting,
    }
}

/// What the acceptor knows when a peer has said who it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Both are of one group.
    pub same_group: bool,
    /// Both have the same volumes.
    pub same_volumes: bool,
    /// The acceptor's role.
    pub own: Role,
    /// The dialler's role.
    pub peer: Role,
    /// The dialler's highest term against the acceptor's.
    pub term: TermOrder,
    /// The dialler's newest record belongs to a generation that the acceptor knows (or there is none).
    pub lineage_known: bool,
    /// The candidate (or, where there is none, the end of the last run in common) is not before what the
    /// dialler has applied; or they have no run in common any more.
    pub keeps_applied: bool,
    /// The acceptor's journal holds every record after the candidate, and can go on holding them.
    pub held: bool,
    /// The candidate is a record; or both images were all zeroes at LSN 0.
    pub common_start: bool,
    /// The dialler gives up what it holds and the acceptor does not.
    pub rewinds: bool,
}

/// The acceptor's decision.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Decision {
    /// Compare chain hashes at the candidate; continue from there if they are equal.
    Compare,
    /// A resync is needed; why.
    Resync(Cause),
    /// The histories differ; nothing is merged.
    Diverged,
    /// No; why.
    Refuse(&'static str),
    /// The peer has seen a higher term: this primary must not acknowledge anything any more.
    Superseded,
    /// Both were promoted, and the peer gives way: this primary raises its term above both, then asks again.
    Raise,
}

/// The decision table; its test enumerates every combination of facts.
pub fn decide(f: Facts) -> Decision {
    use Decision::{Compare, Diverged, Raise, Refuse, Resync, Superseded};
    if !f.same_group {
        return Refuse("it belongs to another group");
    }
    if !f.same_volumes {
        return Refuse("its volumes differ in number or size; make them equal, then join again");
    }
    match (f.own, f.peer, f.term) {
        (Role::Shadow, ..) => return Refuse("this node is a shadow too; connect to the primary"),
        (_, _, TermOrder::Higher) => return Superseded,
        (_, Role::Shadow, TermOrder::Conflicting) if f.rewinds => return Raise,
        (_, _, TermOrder::Conflicting) | (_, Role::Primary, TermOrder::Equal) => return Diverged,
        (_, Role::Primary, TermOrder::Lower) => {
            return Refuse("another node was promoted since; run `volrep rejoin` on the old primary");
        }
        (Role::Primary, Role::Shadow, TermOrder::Lower | TermOrder::Equal) => {}
    }
    if f.rewinds && !(f.lineage_known && f.keeps_applied) {
        return Resync(Cause::Fork);
    }
    if !f.keeps_applied {
        return Diverged;
    }
    if !f.lineage_known {
        return Resync(Cause::Lineage);
    }
    if !f.held {
        return Resync(Cause::Behind);
    }
    if !f.common_start {
        return Resync(Cause::NeverCopied);
    }
    Compare
}

/// Whether `generation` is a run that the primary of the oldest known opening had before, under the same
/// term: one node's runs under one term are one history, however many of them are forgotten.
pub fn is_earlier_run(openings: &[Opening], generation: Generation) -> bool {
    let oldest = openings.first().map(|o| o.generation);
    oldest.is_some_and(|o| o.term == generation.term && generation.start < o.start)
}

/// The LSN after which two histories that have parted hold different records: where the newest run of a primary
/// that both know ended in the one that has less of it. `None`: they know no run in common any more.
pub fn fork(own: &Identity, peer: &Identity) -> Option<Lsn> {
    let end = |id: &Identity, i: usize| id.openings.get(i + 1).map_or(id.tail.lsn, |o| o.at.lsn);
    own.openings.iter().enumerate().rev().find_map(|(i, o)| {
        let theirs = peer.openings.iter().position(|p| p.generation == o.generation)?;
        Some(end(own, i).min(end(peer, theirs)))
    })
}

/// The last point that primary and shadow can share, judged by generations: the shadow's tail, or
/// the end of its last generation in the primary's history if that comes first. `None`: the primary
/// does not know that generation. The hash is known only at a generation's end.
pub fn candidate(
    openings: &[Opening],
    own_tail: HistoryPoint,
    shadow: &Identity,
) -> Option<(Lsn, Option<HistoryPoint>)> {
    let none = Generation::default();
    let known = if shadow.tail_generation == none {
        0
    } else {
        openings.iter().position(|o| o.generation == shadow.tail_generation)? + 1
    };
    // Where the next generation was opened, the shadow's one ended.
    let end = match openings.get(known) {
        Some(next) if shadow.tail_generation != none => next.at,
        _ => own_tail,
    };
    let at = shadow.tail.lsn.min(end.lsn);
    Some((at, (at == end.lsn).then_some(end)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GroupId, Hash, NodeId};

    /// Every combination, against the promises rather than the code's order.
    #[test]
    fn the_table_answers_every_combination() {
        use TermOrder::{Conflicting, Equal, Higher, Lower};
        let mut counts = [0; 6];
        for bits in 0..512u32 {
            for term in [Lower, Equal, Higher, Conflicting] {
                let bit = |i: u32| bits >> i & 1 == 1;
                let role = |b| if b { Role::Primary } else { Role::Shadow };
                let f = Facts {
                    same_group: bit(0),
                    same_volumes: bit(1),
                    own: role(bit(2)),
                    peer: role(bit(3)),
                    term,
                    lineage_known: bit(4),
                    keeps_applied: bit(5),
                    held: bit(6),
                    common_start: bit(7),
                    rewinds: bit(8),
                };
                let decision = decide(f);
                let ours = f.same_group && f.same_volumes && f.own == Role::Primary;
                let followable = ours && f.peer == Role::Shadow && matches!(term, Lower | Equal);
                let expected = match decision {
                    Decision::Compare => {
                        followable && f.lineage_known && f.keeps_applied && f.held && f.common_start
                    }
                    Decision::Resync(Cause::Fork) => {
                        followable && f.rewinds && !(f.lineage_known && f.keeps_applied)
                    }
                    Decision::Resync(_) => {
                        followable
                            && !(f.lineage_known && f.held && f.common_start)
                            && (!f.rewinds || f.lineage_known)
                            && f.keeps_applied
                    }
                    Decision::Raise => ours && f.rewinds && term == Conflicting && f.peer == Role::Shadow,
                    Decision::Superseded => ours && term == Higher,
                    Decision::Diverged => {
                        ours && term != Higher
                            && (term == Conflicting
                                || (f.peer == Role::Primary && term == Equal)
                                || (followable && !f.keeps_applied && !f.rewinds))
                            && !(term == Conflicting && f.rewinds && f.peer == Role::Shadow)
                    }
                    Decision::Refuse(_) => !ours || (f.peer == Role::Primary && term == Lower),
                };
                assert!(expected, "{f:?} -> {decision:?}");
                counts[match decision {
                    Decision::Compare => 0,
                    Decision::Resync(_) => 1,
                    Decision::Diverged => 2,
                    Decision::Refuse(_) => 3,
                    Decision::Superseded => 4,
                    Decision::Raise => 5,
                }] += 1;
            }
        }
        assert_eq!(counts.iter().sum::<i32>(), 2048);
        assert!(counts.iter().all(|n| *n > 0), "{counts:?}");
    }

    #[test]
    fn histories_part_where_the_last_common_run_ended_first() {
        let opening = |node, start, lsn| Opening {
            generation: Generation { term: Term { counter: node, node: NodeId(node) }, start },
            at: HistoryPoint { lsn: Lsn(lsn), hash: Hash::default() },
        };
        let identity = |openings: &[Opening], tail| Identity {
            group: GroupId::default(),
            node: NodeId(2),
            name: String::new(),
            role: Role::Primary,
            term: Term::default(),
            volumes: vec![],
            blank: true,
            tail: HistoryPoint { lsn: Lsn(tail), hash: Hash::default() },
            tail_generation: Generation::default(),
            oldest: HistoryPoint::default(),
            applied: Lsn(0),
            openings: openings.to_vec(),
            resyncing: false,
            rewinds: false,
            apply_delay: 0,
        };
        let (first, second) = (opening(1, 1, 0), opening(1, 2, 10));
        // The old primary went on to 30; the new one was promoted at 25.
        let old = identity(&[first, second], 30);
        let new = identity(&[first, second, opening(2, 1, 25)], 40);
        assert_eq!((fork(&old, &new), fork(&new, &old)), (Some(Lsn(25)), Some(Lsn(25))));
        // Two were promoted, one of them behind the other.
        let other = identity(&[first, second, opening(3, 1, 22)], 50);
        assert_eq!((fork(&other, &new), fork(&new, &other)), (Some(Lsn(22)), Some(Lsn(22))));
        // Promoted before it heard of the old primary's last start.
        let early = identity(&[first, opening(3, 1, 12)], 50);
        assert_eq!(fork(&early, &old), Some(Lsn(10)));
        assert_eq!(fork(&identity(&[opening(7, 1, 0)], 3), &old), None);
    }

    #[test]
    fn the_candidate_is_where_the_shadows_generation_ended() {
        let generation = |start| Generation { term: Term { counter: 1, node: NodeId(1) }, start };
        let point = |lsn| HistoryPoint { lsn: Lsn(lsn), hash: Hash([lsn as u8; 32]) };
        let opening = |start, lsn| Opening { generation: generation(start), at: point(lsn) };
        let openings = [opening(1, 0), opening(2, 10), opening(3, 20)];
        let shadow = |start, lsn| Identity {
            group: GroupId::default(),
            node: NodeId(2),
            name: String::new(),
            role: Role::Shadow,
            term: Term::default(),
            volumes: vec![],
            blank: true,
            tail: point(lsn),
            tail_generation: if lsn == 0 { Generation::default() } else { generation(start) },
            oldest: point(0),
            applied: Lsn(0),
            openings: vec![],
            resyncing: false,
            rewinds: false,
            apply_delay: 0,
        };
        let find = |start, lsn| candidate(&openings, point(30), &shadow(start, lsn));
        assert_eq!(find(1, 8), Some((Lsn(8), None)));
        assert_eq!(find(1, 10), Some((Lsn(10), Some(point(10)))));
        assert_eq!(find(1, 12), Some((Lsn(10), Some(point(10)))));
        assert_eq!(find(2, 25), Some((Lsn(20), Some(point(20)))));
        assert_eq!(find(3, 25), Some((Lsn(25), None)));
        assert_eq!(find(3, 35), Some((Lsn(30), Some(point(30)))));
        assert_eq!(find(4, 35), None);
        assert_eq!(find(0, 0), Some((Lsn(0), None)));
        let elder = |openings: &[Opening], start| is_earlier_run(openings, generation(start));
        assert!(
            elder(&openings[1..], 1) && !elder(&openings, 1) && !elder(&openings[1..], 4) && !elder(&[], 1)
        );
        let other = Term { counter: 1, node: NodeId(7) };
        assert!(!is_earlier_run(&openings[1..], Generation { term: other, start: 1 }));
    }
}

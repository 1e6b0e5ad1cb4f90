//! The handshake's decision: from where, if at all, a shadow can follow a primary, or another shadow.
//!
//! Owns: the table. Invariants: (I9) "nothing to resync" is never concluded from labels: the outcome
//! [`Decision::Compare`] still makes both sides compare a chain hash. A shadow feeds nobody through whom it is fed
//! itself, and judges only what it knows for certain: of what it may only lack, it says nothing.

use crate::format::message::{Cause, Identity, Opening, Role};
use crate::units::{Generation, HistoryPoint, Lsn, NodeId, Term};

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
    /// The dialler is set up to follow this peer even while it is a shadow.
    pub cascades: bool,
    /// Of two shadows: the one is fed by the other already, directly or through others, or too many would be.
    pub loops: bool,
    /// The acceptor, a shadow, has an image and a journal that nothing is about to replace.
    pub settled: bool,
    /// The acceptor, a shadow, may only lack what the dialler has.
    pub lacks: bool,
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
    if let Some(answer) = own_is_shadow(f) {
        return answer;
    }
    match (f.own, f.peer, f.term) {
        (_, _, TermOrder::Higher) => return Superseded,
        (_, Role::Shadow, TermOrder::Conflicting) if f.rewinds => return Raise,
        (_, _, TermOrder::Conflicting) | (_, Role::Primary, TermOrder::Equal) => return Diverged,
        (_, Role::Primary, TermOrder::Lower) => {
            return Refuse("another node was promoted since; run `volrep rejoin` on the old primary");
        }
        (_, Role::Shadow, TermOrder::Lower | TermOrder::Equal) => {}
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

/// What a shadow that was dialled answers without looking at the histories.
fn own_is_shadow(f: Facts) -> Option<Decision> {
    use Decision::{Diverged, Refuse};
    let answer = match (f.own, f.peer, f.term) {
        (Role::Primary, ..) => return None,
        (Role::Shadow, Role::Shadow, _) if f.cascades && f.loops => Refuse(
            "this node is fed through it, or the chain of shadows is too long: connect it to the primary",
        ),
        (Role::Shadow, Role::Shadow, _) if f.cascades && !f.settled => {
            Refuse("this node is a shadow whose own image or role is changing: it feeds nobody meanwhile")
        }
        (Role::Shadow, Role::Shadow, TermOrder::Higher) if f.cascades => {
            Refuse("this node has not heard yet of the promotion that it has seen")
        }
        (Role::Shadow, Role::Shadow, TermOrder::Conflicting) if f.cascades && f.rewinds => {
            Refuse("it was promoted, too: only the primary itself can end that, so connect it to the primary")
        }
        (Role::Shadow, Role::Shadow, TermOrder::Conflicting) if f.cascades => Diverged,
        (Role::Shadow, Role::Shadow, _) if f.cascades && f.lacks => {
            Refuse("it holds more than this shadow has got so far: it can follow once this one has caught up")
        }
        (Role::Shadow, Role::Shadow, _) if f.cascades => return None,
        (Role::Shadow, ..) => Refuse("this node is a shadow too; connect to the primary"),
    };
    Some(answer)
}

/// Whether a shadow with this identity may only lack what a shadow that dials it holds, so that nothing can be said of
/// where their histories part.
pub fn may_lack(own: &Identity, peer: &Identity) -> bool {
    let (here, there) = (own.tail_generation, peer.tail_generation);
    let unknown = there != Generation::default() && !own.openings.iter().any(|o| o.generation == there);
    // Before its first record of the primary's term, it does not know all that led there.
    let early = here.term != own.term;
    let later = there.term == own.term && there > here;
    unknown && early || later || (there == here && peer.tail.lsn > own.tail.lsn)
}

/// Most shadows through which one is fed.
pub const MAX_SOURCES: usize = 8;

/// Whether a shadow whose chain of sources is `own` would close a ring by feeding `peer`, or make the chain too long.
pub fn closes_ring(own: &[NodeId], peer: NodeId) -> bool {
    own.contains(&peer) || own.len() >= MAX_SOURCES
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
    use crate::units::{GroupId, Hash};

    fn facts(bits: u32, term: TermOrder) -> Facts {
        let bit = |i: u32| bits >> i & 1 == 1;
        let role = |b| if b { Role::Primary } else { Role::Shadow };
        Facts {
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
            cascades: bit(9),
            loops: bit(10),
            settled: bit(11),
            lacks: bit(12),
        }
    }

    /// Every combination, against the promises rather than the code's order.
    #[test]
    fn the_table_answers_every_combination() {
        use TermOrder::{Conflicting, Equal, Higher, Lower};
        let mut counts = [[0; 6]; 2];
        for (bits, term) in
            (0..8192u32).flat_map(|bits| [Lower, Equal, Higher, Conflicting].map(|term| (bits, term)))
        {
            let f = facts(bits, term);
            let decision = decide(f);
            let ours = f.same_group && f.same_volumes;
            let serves = ours && f.own == Role::Primary;
            // A shadow feeds a shadow that asks for it, in no ring, from an image that stays.
            let passes_on = ours
                && (f.own, f.peer) == (Role::Shadow, Role::Shadow)
                && f.cascades
                && !f.loops
                && f.settled;
            let followable =
                f.peer == Role::Shadow && matches!(term, Lower | Equal) && (serves || passes_on && !f.lacks);
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
                // A shadow neither ends its primary's term nor raises it.
                Decision::Raise => serves && f.rewinds && term == Conflicting && f.peer == Role::Shadow,
                Decision::Superseded => serves && term == Higher,
                Decision::Diverged => {
                    (serves || passes_on)
                        && term != Higher
                        && (term == Conflicting
                            || (f.peer == Role::Primary && term == Equal)
                            || (followable && !f.keeps_applied && !f.rewinds))
                        && !(term == Conflicting && f.rewinds && f.peer == Role::Shadow)
                }
                Decision::Refuse(_) => {
                    !(serves || passes_on)
                        || (serves && f.peer == Role::Primary && term == Lower)
                        || (passes_on
                            && (term == Higher || if term == Conflicting { f.rewinds } else { f.lacks }))
                }
            };
            assert!(expected, "{f:?} -> {decision:?}");
            counts[usize::from(f.own == Role::Shadow)][match decision {
                Decision::Compare => 0,
                Decision::Resync(_) => 1,
                Decision::Diverged => 2,
                Decision::Refuse(_) => 3,
                Decision::Superseded => 4,
                Decision::Raise => 5,
            }] += 1;
        }
        assert_eq!(counts.as_flattened().iter().sum::<i32>(), 32768);
        assert!(counts[0].iter().all(|n| *n > 0), "{counts:?}");
        assert!(counts[1][..4].iter().all(|n| *n > 0) && counts[1][4..] == [0, 0], "{counts:?}");
    }

    #[test]
    fn a_shadow_that_does_not_ask_for_it_is_sent_to_the_primary() {
        use TermOrder::{Conflicting, Equal, Higher, Lower};
        let all = (0..8192u32).filter(|bits| bits & 0b11 == 0b11);
        for f in all.flat_map(|bits| [Lower, Equal, Higher, Conflicting].map(|term| facts(bits, term))) {
            if f.own == Role::Shadow && (f.peer == Role::Primary || !f.cascades) {
                assert_eq!(decide(f), Decision::Refuse("this node is a shadow too; connect to the primary"));
            }
        }
    }

    #[test]
    fn no_chain_of_shadows_closes_or_is_too_long() {
        let [a, b, c] = [1, 2, 3].map(NodeId);
        assert!(!closes_ring(&[a], c) && closes_ring(&[c, b, a], b) && closes_ring(&[b], b));
        assert!(!closes_ring(&[a; MAX_SOURCES - 1], c) && closes_ring(&[a; MAX_SOURCES], c));
    }

    #[test]
    fn a_shadow_does_not_judge_what_it_may_only_lack() {
        let generation =
            |counter, node, start| Generation { term: Term { counter, node: NodeId(node) }, start };
        let point = |lsn| HistoryPoint { lsn: Lsn(lsn), hash: Hash::default() };
        let shadow = |term: Generation, runs: &[Generation], tail| Identity {
            tail_generation: *runs.last().unwrap_or(&Generation::default()),
            openings: runs.iter().map(|g| Opening { generation: *g, at: point(1) }).collect(),
            term: term.term,
            ..blank_identity(tail)
        };
        let (first, second) = (generation(1, 1, 1), generation(1, 1, 2));
        let (next, other) = (generation(2, 3, 1), generation(2, 4, 1));
        let own = shadow(first, &[first], 10);
        assert!(!may_lack(&own, &shadow(first, &[first], 10)));
        assert!(may_lack(&own, &shadow(first, &[first], 11)), "the same run, and more of it");
        assert!(may_lack(&own, &shadow(first, &[first, second], 5)), "a run that began since");
        assert!(!may_lack(&shadow(first, &[first, second], 20), &shadow(first, &[first], 30)));
        // It has heard of the next primary, and has nothing of it yet.
        let told = shadow(next, &[first], 10);
        assert!(may_lack(&told, &shadow(next, &[first, next], 9)));
        assert!(may_lack(&told, &shadow(first, &[first, second], 9)), "what led there is not known");
        // It has its records: what it does not know is of no history that leads there.
        let knows = shadow(next, &[first, next], 12);
        assert!(!may_lack(&knows, &shadow(next, &[first, second], 11)));
        assert!(!may_lack(&knows, &shadow(next, &[first, other], 11)));
        assert!(!may_lack(&shadow(next, &[], 0), &shadow(next, &[], 0)));
    }

    fn blank_identity(tail: u64) -> Identity {
        Identity {
            group: GroupId::default(),
            node: NodeId(2),
            name: String::new(),
            role: Role::Shadow,
            term: Term::default(),
            volumes: vec![],
            blank: true,
            tail: HistoryPoint { lsn: Lsn(tail), hash: Hash::default() },
            tail_generation: Generation::default(),
            oldest: HistoryPoint::default(),
            applied: Lsn(0),
            openings: vec![],
            resyncing: false,
            rewinds: false,
            apply_delay: 0,
            cascades: false,
            sources: vec![],
            primary: String::new(),
        }
    }

    #[test]
    fn histories_part_where_the_last_common_run_ended_first() {
        let opening = |node, start, lsn| Opening {
            generation: Generation { term: Term { counter: node, node: NodeId(node) }, start },
            at: HistoryPoint { lsn: Lsn(lsn), hash: Hash::default() },
        };
        let identity = |openings: &[Opening], tail| Identity {
            role: Role::Primary,
            openings: openings.to_vec(),
            ..blank_identity(tail)
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
            tail: point(lsn),
            tail_generation: if lsn == 0 { Generation::default() } else { generation(start) },
            oldest: point(0),
            ..blank_identity(lsn)
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

    #[test]
    fn terms_are_ordered_by_their_counters_and_equal_ones_by_who_was_promoted() {
        use TermOrder::{Conflicting, Equal, Higher, Lower};
        let term = |counter, node| Term { counter, node: NodeId(node) };
        let own = term(4, 7);
        let orders =
            [term(3, 7), term(3, 9), term(4, 7), term(4, 6), term(4, 8), term(5, 1)].map(|t| order(own, t));
        assert_eq!(orders, [Lower, Lower, Equal, Conflicting, Conflicting, Higher]);
    }
}

//! Terms and promotion: who may become the primary, and when.
//!
//! Owns: the promotion table and the arithmetic of terms and generations. Invariants (I7, I8): a new
//! term is higher than every term seen; nothing is acknowledged under a term that was superseded.

use crate::format::message::{MAX_GENERATIONS, Opening, Role};
use crate::units::{Generation, HistoryPoint, NodeId, Term};

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
}

/// The promotion table; its test enumerates every combination of facts.
pub fn promotion(f: Facts) -> Promotion {
    match f {
        Facts { role: Role::Primary, .. } => Promotion::AlreadyPrimary,
        Facts { consistent: false, .. } => Promotion::Inconsistent,
        Facts { primary_heard: true, .. } => Promotion::PrimaryAlive,
        Facts { fenced: false, .. } => Promotion::Unfenced,
        Facts { fenced: true, .. } => Promotion::Allowed,
    }
}

/// The term of a promotion on `node` that has seen `seen`.
pub fn next_term(seen: Term, node: NodeId) -> Term {
    Term { counter: seen.counter + 1, node }
}

/// The next run of a primary under `term`, after the runs in `openings`.
pub fn next_generation(openings: &[Opening], term: Term) -> Generation {
    let starts = openings.iter().filter(|o| o.generation.term == term).map(|o| o.generation.start);
    Generation { term, start: starts.max().unwrap_or(0) + 1 }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Lsn;

    #[test]
    fn the_promotion_table_answers_every_combination() {
        for bits in 0..16u32 {
            let bit = |i: u32| bits >> i & 1 == 1;
            let role = if bit(0) { Role::Primary } else { Role::Shadow };
            let f = Facts { role, consistent: bit(1), primary_heard: bit(2), fenced: bit(3) };
            let allowed = role == Role::Shadow && f.consistent && !f.primary_heard && f.fenced;
            assert_eq!(promotion(f) == Promotion::Allowed, allowed, "{f:?}");
            if f == (Facts { role: Role::Shadow, consistent: true, primary_heard: false, fenced: false }) {
                assert_eq!(promotion(f), Promotion::Unfenced);
            }
        }
    }

    #[test]
    fn terms_and_generations_rise() {
        let seen = Term { counter: 4, node: NodeId(9) };
        let term = next_term(seen, NodeId(1));
        assert!(term > seen);
        let mut openings = Vec::new();
        for start in 1..=300 {
            let generation = next_generation(&openings, term);
            assert_eq!(generation, Generation { term, start });
            let at = HistoryPoint { lsn: Lsn(u64::from(start)), ..HistoryPoint::default() };
            note_opening(&mut openings, generation, at);
            note_opening(&mut openings, generation, at);
        }
        assert_eq!(openings.len(), MAX_GENERATIONS);
    }
}

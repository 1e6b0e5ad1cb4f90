//! How a connection ends that its other end will renew: the kernel's NBD driver at a restart of ours.
//!
//! Owns: the phases of the end. Invariant: as far as the limit allows, no request is on its way when the
//! connection closes: each was answered before, or the driver could not send it and keeps it.
//!
//! The driver sends a request again at once if it could not send it, but one that it has sent and that
//! is not answered only after a long while. So: answers are held back, which makes those who wait for
//! them stop asking; when nothing comes any more the direction towards us is closed (from now on the
//! driver can't send), what came before is read to its end; and then all answers go out together.

use super::handle::Reply;
use std::time::Duration;

/// Silence after which nothing more is expected, ns.
const QUIET: u64 = 5_000_000;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Requests still come; answers are held back.
    Hearing,
    /// The other end can't send any more; what it has sent is being received.
    Draining,
    /// Everything was received.
    Drained,
    /// Answers go out; nothing follows them.
    Answering,
}

/// The end of a connection.
pub(super) struct Farewell {
    phase: Phase,
    quiet_at: u64,
    limit: u64,
    _done: Reply<()>,
}

impl Farewell {
    /// Begins; `done` is told when it is dropped.
    pub fn begin(now: u64, limit: Duration, done: Reply<()>) -> Farewell {
        let limit = now.saturating_add(limit.as_nanos() as u64);
        Farewell { phase: Phase::Hearing, quiet_at: now + QUIET, limit, _done: done }
    }

    /// Something came.
    pub fn heard(&mut self, now: u64) {
        self.quiet_at = now + QUIET;
    }

    /// Nothing comes any more; true if that was expected.
    pub fn ended(&mut self) -> bool {
        match self.phase {
            Phase::Hearing => return false,
            Phase::Draining => self.phase = Phase::Drained,
            Phase::Drained | Phase::Answering => {}
        }
        true
    }

    /// Goes on; `idle`: everything that was received is answered by the node. True when the caller is
    /// to close the direction towards us.
    pub fn advance(&mut self, now: u64, idle: bool) -> bool {
        let late = now >= self.limit;
        match self.phase {
            Phase::Hearing if late || (idle && now >= self.quiet_at) => {
                self.phase = if late { Phase::Answering } else { Phase::Draining };
                return true;
            }
            // A client that is quiet and waits for the node is looked at again.
            Phase::Hearing if now >= self.quiet_at => self.heard(now),
            Phase::Drained if idle => self.phase = Phase::Answering,
            Phase::Draining | Phase::Drained if late => self.phase = Phase::Answering,
            _ => {}
        }
        false
    }

    /// When to [`Farewell::advance`] without another reason.
    pub fn deadline(&self) -> Option<u64> {
        match self.phase {
            Phase::Hearing => Some(self.quiet_at.min(self.limit)),
            Phase::Draining | Phase::Drained => Some(self.limit),
            Phase::Answering => None,
        }
    }

    /// More may come.
    pub fn hears(&self) -> bool {
        matches!(self.phase, Phase::Hearing | Phase::Draining)
    }

    /// Answers wait.
    pub fn holds_back(&self) -> bool {
        self.phase != Phase::Answering
    }

    /// The connection closes once nothing is left to be sent.
    pub fn is_over(&self) -> bool {
        self.phase == Phase::Answering
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn begin() -> Farewell {
        Farewell::begin(0, Duration::from_secs(1), Reply::nobody())
    }

    #[test]
    fn answers_go_out_when_nothing_is_on_its_way() {
        let mut f = begin();
        assert!(!f.advance(MS, true) && f.holds_back());
        f.heard(2 * MS);
        assert!(!f.advance(6 * MS, true) && f.hears());
        assert_eq!(f.deadline(), Some(7 * MS));
        assert!(!f.advance(7 * MS, false) && f.deadline() == Some(12 * MS));
        // Quiet, and nothing is with the node: the direction is closed, once.
        assert!(f.advance(12 * MS, true) && !f.advance(12 * MS, true));
        assert!(f.hears() && f.holds_back());
        // What came meanwhile is done first.
        assert!(f.ended() && !f.hears());
        assert!(!f.advance(13 * MS, false) && f.holds_back());
        assert!(!f.advance(14 * MS, true) && f.is_over() && f.deadline().is_none());
    }

    #[test]
    fn the_limit_ends_it_in_every_phase() {
        for phase in [Phase::Hearing, Phase::Draining, Phase::Drained] {
            let mut f = begin();
            f.phase = phase;
            assert!(!f.advance(999 * MS, false) && !f.is_over(), "{phase:?}");
            assert_eq!(f.advance(1000 * MS, false), phase == Phase::Hearing);
            assert!(f.is_over(), "{phase:?}");
        }
    }

    #[test]
    fn an_end_that_was_not_expected_is_the_other_ends_doing() {
        assert!(!begin().ended());
    }
}

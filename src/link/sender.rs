//! One shadow, as its primary sees it: what was sent, what it acknowledged.
//!
//! Owns: the window. Invariant: bytes sent and not acknowledged as received stay below the window,
//! plus one record.

use crate::units::Lsn;
use std::collections::VecDeque;

/// An acknowledgement that can't be true.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("it acknowledged LSN {told} where only {possible} is possible")]
pub struct Violation {
    /// What it said.
    pub told: Lsn,
    /// The most (or least) that can be.
    pub possible: Lsn,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Sender {
    window: u64,
    next: Lsn,
    flying: VecDeque<(Lsn, u64)>,
    flying_bytes: u64,
    /// Last received, durable, applied there.
    positions: [Lsn; 3],
    announced: Lsn,
    /// What is to be announced, and since when.
    news: Option<(Lsn, u64)>,
    /// Bytes of records sent.
    pub sent_bytes: u64,
}

impl Sender {
    /// Begins with the record `next`; everything before is durable there.
    pub fn new(next: Lsn, window: u64) -> Sender {
        let held = next.prev();
        Sender {
            window,
            next,
            flying: VecDeque::new(),
            flying_bytes: 0,
            positions: [held, held, Lsn(0)],
            announced: Lsn(0),
            news: None,
            sent_bytes: 0,
        }
    }

    /// The record to send next, if the window has room.
    pub fn wants(&self) -> Option<Lsn> {
        (self.flying_bytes < self.window).then_some(self.next)
    }

    /// Last record sent.
    pub fn sent_to(&self) -> Lsn {
        self.next.prev()
    }

    /// That record was sent; it says itself what was durable on the primary when it was sealed.
    pub fn sent(&mut self, bytes: u64, carries: Lsn) {
        self.announced = self.announced.max(carries);
        self.news.take_if(|(lsn, _)| *lsn <= carries);
        self.flying.push_back((self.next, bytes));
        self.flying_bytes += bytes;
        self.sent_bytes += bytes;
        self.next = self.next.next();
    }

    /// The shadow told its positions.
    pub fn acknowledged(&mut self, received: Lsn, durable: Lsn, applied: Lsn) -> Result<(), Violation> {
        let sent = self.sent_to();
        let told = [received, durable, applied];
        let bounds = [sent, received, durable];
        for ((told, bound), before) in told.into_iter().zip(bounds).zip(self.positions) {
            if told > bound {
                return Err(Violation { told, possible: bound });
            }
            if told < before {
                return Err(Violation { told, possible: before });
            }
        }
        self.positions = told;
        while let Some((lsn, bytes)) = self.flying.front().copied().filter(|(lsn, _)| *lsn <= received) {
            debug_assert!(lsn <= received);
            self.flying_bytes -= bytes;
            self.flying.pop_front();
        }
        Ok(())
    }

    /// Last received, durable and applied there.
    pub fn positions(&self) -> (Lsn, Lsn, Lsn) {
        (self.positions[0], self.positions[1], self.positions[2])
    }

    /// What is to be announced as durable on the primary: news, about records that were sent. It waits
    /// for `patience` ns first, because the next record may carry it; then the error says until when.
    pub fn announce(&mut self, durable: Lsn, now: u64, patience: u64) -> Result<Option<Lsn>, u64> {
        let lsn = durable.min(self.sent_to());
        if lsn <= self.announced {
            return Ok(None);
        }
        let (_, since) = *self.news.get_or_insert((lsn, now));
        if now < since + patience {
            return Err(since + patience);
        }
        self.announced = lsn;
        self.news = None;
        Ok(Some(lsn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_bounds_what_flies_and_lies_are_found() {
        let mut s = Sender::new(Lsn(5), 1000);
        for _ in 0..3 {
            assert!(s.wants().is_some());
            s.sent(400, Lsn(0));
        }
        assert_eq!((s.wants(), s.sent_to()), (None, Lsn(7)));
        assert!(s.acknowledged(Lsn(8), Lsn(4), Lsn(0)).is_err());
        assert!(s.acknowledged(Lsn(6), Lsn(7), Lsn(0)).is_err());
        assert!(s.acknowledged(Lsn(6), Lsn(5), Lsn(6)).is_err());
        s.acknowledged(Lsn(6), Lsn(5), Lsn(5)).unwrap();
        assert_eq!(s.wants(), Some(Lsn(8)));
        assert!(s.acknowledged(Lsn(6), Lsn(4), Lsn(4)).is_err(), "a position never falls");
        assert_eq!(s.positions(), (Lsn(6), Lsn(5), Lsn(5)));
    }

    #[test]
    fn only_what_was_sent_is_announced_and_once() {
        let mut s = Sender::new(Lsn(5), 1000);
        assert_eq!(s.announce(Lsn(9), 0, 0), Ok(Some(Lsn(4))));
        s.sent(1, Lsn(0));
        assert_eq!(s.announce(Lsn(9), 0, 0), Ok(Some(Lsn(5))));
        assert_eq!(s.announce(Lsn(9), 0, 0), Ok(None));
    }

    #[test]
    fn news_that_the_next_record_carries_is_not_announced() {
        let mut s = Sender::new(Lsn(5), 1000);
        s.sent(1, Lsn(4));
        assert_eq!(s.announce(Lsn(4), 0, 0), Ok(None));
        assert_eq!(s.announce(Lsn(5), 10, 7), Err(17));
        s.sent(1, Lsn(5));
        assert_eq!(s.announce(Lsn(5), 12, 7), Ok(None));
        // The wait of what comes later is its own.
        assert_eq!(s.announce(Lsn(6), 15, 7), Err(22));
        s.sent(1, Lsn(5));
        assert_eq!(s.announce(Lsn(7), 21, 7), Err(22));
        assert_eq!(s.announce(Lsn(7), 22, 7), Ok(Some(Lsn(7))));
        assert_eq!(s.announce(Lsn(7), 40, 7), Ok(None));
    }

    #[test]
    fn a_full_window_opens_by_what_is_acknowledged() {
        let mut s = Sender::new(Lsn(1), 1000);
        (0..2).for_each(|_| s.sent(500, Lsn(0)));
        assert_eq!((s.wants(), s.sent_bytes), (None, 1000), "it is full when it is reached");
        s.acknowledged(Lsn(1), Lsn(0), Lsn(0)).unwrap();
        assert_eq!(s.wants(), Some(Lsn(3)));
        s.sent(499, Lsn(0));
        assert_eq!(s.wants(), Some(Lsn(4)), "a byte is left");
        s.sent(1, Lsn(0));
        assert_eq!((s.wants(), s.sent_bytes), (None, 1500));
        // The same once more says nothing new, and is no lie.
        s.acknowledged(Lsn(1), Lsn(0), Lsn(0)).unwrap();
        assert_eq!(s.wants(), None);
        s.acknowledged(Lsn(4), Lsn(4), Lsn(4)).unwrap();
        assert_eq!(s.wants(), Some(Lsn(5)));
    }
}

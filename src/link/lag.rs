//! How late a shadow is: the other's clock, and a line of (LSN, seal time, bytes) to measure against.
//!
//! Owns: the estimate of the clocks' difference, and the samples. Invariant (I5): lag is never told
//! smaller than the samples prove: between two samples the older one's time counts.

use crate::units::Lsn;
use std::collections::VecDeque;

/// Estimates the other wall clock minus the own one, from the round trips of heartbeats.
#[derive(Debug, Default)]
pub struct ClockEstimate {
    /// (round trip, offset) of the last exchanges, ns.
    samples: VecDeque<(u64, i64)>,
}

/// Exchanges that count.
const EXCHANGES: usize = 16;

impl ClockEstimate {
    /// The other answered, at its time `wall`, a heartbeat sent at the own time `echo`.
    pub fn answered(&mut self, echo: u64, wall: u64, now: u64) {
        // A clock that jumped in between proves nothing.
        let Some(trip) = now.checked_sub(echo) else { return };
        let offset = wall.wrapping_sub(echo + trip / 2) as i64;
        self.samples.push_back((trip, offset));
        if self.samples.len() > EXCHANGES {
            self.samples.pop_front();
        }
    }
    /// The offset of the exchange with the shortest round trip, ns; 0 before any.
    pub fn offset(&self) -> i64 {
        self.samples.iter().min().map_or(0, |(_, offset)| *offset)
    }
    /// Round trip of the last exchange, ns.
    pub fn round_trip(&self) -> Option<u64> {
        self.samples.back().map(|(trip, _)| *trip)
    }
    /// Nanoseconds from `theirs`, on the other's clock, to `now` on the own one; 0 if not after.
    pub fn since(&self, theirs: u64, now: u64) -> u64 {
        let theirs_here = theirs.wrapping_sub(self.offset() as u64);
        now.saturating_sub(theirs_here)
    }
}

/// A record on the line.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sample {
    /// Its LSN.
    pub lsn: Lsn,
    /// Its seal time, ns since 1970.
    pub time: u64,
    /// Journal bytes up to its end since the start.
    pub bytes: u64,
}

/// Samples of the records sealed, thinned out as they age.
#[derive(Debug, Default)]
pub struct Timeline {
    samples: VecDeque<Sample>,
    /// Times up to this record are of the own clock; those of later ones are of the primary's that is followed.
    own: Lsn,
}

/// Samples kept.
const SAMPLES: usize = 8192;

impl Timeline {
    /// The next record was sealed, at a time of the own clock or of the primary's.
    pub fn push(&mut self, sample: Sample, own: bool) {
        self.own = if own { sample.lsn } else { self.own.min(sample.lsn.prev()) };
        if self.samples.len() == SAMPLES {
            let mut i = 0;
            // Every other one of the older half goes: old lags need no fine steps.
            self.samples.retain(|_| {
                i += 1;
                i > SAMPLES / 2 || i % 2 == 1
            });
        }
        self.samples.push_back(sample);
    }

    /// The records after `lsn` were given up.
    pub fn cut(&mut self, lsn: Lsn) {
        while self.samples.pop_back_if(|s| s.lsn > lsn).is_some() {}
        self.own = self.own.min(lsn);
    }

    /// A time not after the seal time of that record, on the clock of its sample; 0 if it is older than all samples.
    pub fn time_of(&self, lsn: Lsn) -> u64 {
        let after = self.samples.partition_point(|s| s.lsn <= lsn);
        after.checked_sub(1).map_or(0, |i| self.samples[i].time)
    }

    /// The primary that was followed, whose clock is `offset` ahead, is followed no longer: its times become own ones.
    pub fn settle(&mut self, offset: i64) {
        let own = self.own;
        for s in self.samples.iter_mut().filter(|s| s.lsn > own) {
            s.time = s.time.saturating_add_signed(offset.saturating_neg());
        }
        self.own = self.newest().map_or(own, |s| s.lsn);
    }

    /// Newest record.
    pub fn newest(&self) -> Option<Sample> {
        self.samples.back().copied()
    }

    /// For a shadow that has applied up to `lsn`: records, bytes, and the seal time of the oldest
    /// record that it lacks, on the clock of the primary, which is `offset` ahead (0 on the primary itself); `None`
    /// when it lacks nothing. Never less than the truth by more than a sample's step in bytes; never less in time.
    pub fn behind(&self, lsn: Lsn, offset: i64) -> Option<(u64, u64, u64)> {
        let newest = self.newest().filter(|s| s.lsn > lsn)?;
        let first = self.samples.partition_point(|s| s.lsn <= lsn);
        let before = first.checked_sub(1).map(|i| self.samples[i]);
        let lacking = self.samples[first];
        // The record after `lsn` may lie between two samples: the older one's time is the bound.
        let bound = match before {
            Some(b) if lacking.lsn > lsn.next() => b,
            _ => lacking,
        };
        let time = bound.time.saturating_add_signed(if bound.lsn <= self.own { offset } else { 0 });
        let bytes = newest.bytes - before.map_or(0, |b| b.bytes).min(newest.bytes);
        Some((newest.lsn.0 - lsn.0, bytes, time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_of_the_shortest_round_trip_counts() {
        let mut clock = ClockEstimate::default();
        assert_eq!(clock.offset(), 0);
        clock.answered(1000, 6000, 3000); // asymmetric, 2000 ns
        clock.answered(10_000, 15_050, 10_100); // 100 ns: offset 5000
        assert_eq!((clock.offset(), clock.round_trip()), (5000, Some(100)));
        assert_eq!(clock.since(20_000, 15_300), 300);
        assert_eq!(clock.since(20_000, 14_000), 0);
        clock.answered(50_000, 1, 40_000); // the own clock went back
        assert_eq!(clock.offset(), 5000);
    }

    #[test]
    fn lag_is_never_told_too_small() {
        let mut line = Timeline::default();
        for lsn in 1..=50_000u64 {
            line.push(Sample { lsn: Lsn(lsn), time: lsn * 10, bytes: lsn * 4096 }, true);
        }
        assert_eq!(line.behind(Lsn(50_000), 0), None);
        for lsn in [0u64, 1, 77, 3_000, 25_000, 49_990, 49_999] {
            let (records, bytes, time) = line.behind(Lsn(lsn), 0).unwrap();
            assert_eq!(records, 50_000 - lsn);
            assert!(bytes >= (50_000 - lsn) * 4096);
            assert!(time <= (lsn + 1) * 10, "{lsn} {time}");
        }
        assert!(line.samples.len() <= SAMPLES);
        // What was given up does not lag.
        line.cut(Lsn(49_990));
        assert_eq!(line.newest().map(|s| s.lsn), Some(Lsn(49_990)));
        assert_eq!((line.behind(Lsn(49_990), 0), line.behind(Lsn(49_989), 0).map(|b| b.0)), (None, Some(1)));
    }

    #[test]
    fn each_time_is_of_the_clock_of_whoever_sealed() {
        let mut line = Timeline::default();
        let push =
            |line: &mut Timeline, lsn, time, own| line.push(Sample { lsn: Lsn(lsn), time, bytes: 0 }, own);
        let time = |line: &Timeline, lsn, ahead| line.behind(Lsn(lsn), ahead).map(|(.., time)| time);
        // The primary; then a shadow of one whose clock is 5 ahead; then of one whose clock is 3 behind.
        push(&mut line, 1, 100, true);
        push(&mut line, 2, 215, false);
        assert_eq!((time(&line, 0, 5), time(&line, 1, 5)), (Some(105), Some(215)));
        line.settle(5);
        push(&mut line, 3, 297, false);
        assert_eq!([0, 1, 2].map(|lsn| time(&line, lsn, -3)), [Some(97), Some(207), Some(297)]);
        // The primary once more.
        line.settle(-3);
        push(&mut line, 4, 400, true);
        assert_eq!([0, 1, 2, 3].map(|lsn| time(&line, lsn, 0)), [Some(100), Some(210), Some(300), Some(400)]);
        // Another history takes the place of the last ones.
        line.cut(Lsn(1));
        push(&mut line, 2, 211, false);
        push(&mut line, 3, 305, false);
        assert_eq!((time(&line, 1, 1), time(&line, 2, 1)), (Some(211), Some(305)));
    }
}

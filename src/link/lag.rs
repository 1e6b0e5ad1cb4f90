//! How late a shadow is: the other's clock, and a line of (LSN, seal time, bytes) to measure against.
//!
//! Owns: the estimate of the clocks' difference, and the samples. Invariant (I5): lag is never told
//! smaller than the samples prove: between two samples the older one's time counts; what stands in a line counts as late, and
//! what a round trip took beyond the shortest one, and the drift since, are taken for what makes the lag longer. (No record's
//! time is before that of the one before. So of records that are sealed by a clock that was set back, or is behind that of an
//! earlier primary, a shadow tells too few seconds by as much, until that clock is there.)

use crate::units::{BLOCK, Lsn};
use std::collections::VecDeque;

/// Estimates the other wall clock minus the own one, from the round trips of heartbeats: an exchange proves the offset to its
/// round trip, and the proof grows weaker as the clocks drift apart.
#[derive(Clone, Debug, Default)]
pub struct ClockEstimate {
    /// The one that proves most.
    best: Option<Exchange>,
    /// Round trip of the last one, ns.
    last: Option<u64>,
}

/// A heartbeat and its answer.
#[derive(Clone, Copy, Debug)]
struct Exchange {
    trip: u64,
    /// If the answer was given in the middle of the trip, ns.
    middle: i64,
    /// If all that the trip took beyond the shortest one was on the way back, ns: what happened there is not told to be
    /// younger than it is.
    offset: i64,
    /// When it ended, on the own wall clock.
    at: u64,
}

/// Two clocks drift apart by at most one ns in so many: quartz keeps time to 100 ppm, at either end.
const STEADY: u64 = 5000;

impl Exchange {
    /// It says more than an earlier one does now, or that one of the clocks has been set since.
    fn counts_for_more_than(&self, old: &Exchange) -> bool {
        let drift = self.at.saturating_sub(old.at) / STEADY;
        let both = (self.trip / 2 + old.trip / 2).saturating_add(drift);
        self.trip / 2 <= (old.trip / 2).saturating_add(drift) || self.middle.abs_diff(old.middle) > both
    }
}

impl ClockEstimate {
    /// The other answered, at its time `wall`, a heartbeat sent at the own time `echo`; that took `excess` ns longer than the
    /// shortest round trip.
    pub fn answered(&mut self, echo: u64, wall: u64, now: u64, excess: u64) {
        // A clock that jumped in between proves nothing.
        let Some(trip) = now.checked_sub(echo) else { return };
        self.last = Some(trip);
        let after = |half: u64| wall.wrapping_sub(echo + half) as i64;
        let (middle, offset) = (after(trip / 2), after(trip.saturating_sub(excess) / 2));
        let new = Exchange { trip, middle, offset, at: now };
        if self.best.is_none_or(|old| new.counts_for_more_than(&old)) {
            self.best = Some(new);
        }
    }
    /// The offset, ns; 0 before any exchange.
    pub fn offset(&self) -> i64 {
        self.best.map_or(0, |best| best.offset)
    }
    /// Round trip of the last exchange, ns.
    pub fn round_trip(&self) -> Option<u64> {
        self.last
    }
    /// Nanoseconds from `theirs`, on the other's clock, to `now` on the own one, and what the clocks may have drifted apart
    /// by; 0 if not after.
    pub fn since(&self, theirs: u64, now: u64) -> u64 {
        let theirs_here = theirs.wrapping_sub(self.offset() as u64);
        let drift = self.best.map_or(0, |best| now.saturating_sub(best.at) / STEADY);
        now.saturating_add(drift).saturating_sub(theirs_here)
    }
}

/// The shortest round trip with a peer, ns, over all its connections, and when the last one was greeted, on the own monotonic
/// clock: what waits in a line is not news when it comes, however long the queue has stood there.
#[derive(Debug, Default)]
pub struct Way(Option<(u64, u64)>);

impl Way {
    /// A connection was greeted that began so long ago, which took a round trip at least. The way may have become longer since
    /// the last one, which is believed as slowly as clocks drift apart.
    pub fn greeted(&mut self, trip: u64, now: u64) {
        let least = self.0.map(|(least, at)| least.saturating_add(now.saturating_sub(at) / STEADY));
        self.0 = Some((trip.min(least.unwrap_or(trip)), now));
    }

    /// A round trip has ended that took so long: ns beyond the shortest.
    pub fn trip(&mut self, trip: u64) -> u64 {
        let (least, _) = self.0.get_or_insert((trip, 0));
        let excess = trip.saturating_sub(*least);
        *least = trip.min(*least);
        excess
    }
}

/// How late the messages of a connection come.
#[derive(Debug)]
pub struct Line {
    /// What comes from now on was sent after this, on the own monotonic clock, but for the time that the way takes.
    after: u64,
}

impl Line {
    /// The connection begins, at that time of the own monotonic clock.
    pub fn new(now: u64) -> Line {
        Line { after: now }
    }

    /// Ns that a message which comes now was in the line at most: it was sent after the one before, and if it ends a round
    /// trip, that was so much longer than the shortest.
    pub fn late(&mut self, excess: Option<u64>, now: u64) -> u64 {
        self.after = self.after.max(excess.map_or(0, |excess| now.saturating_sub(excess)));
        now.saturating_sub(self.after)
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

    /// The record after `lsn` is not older than all samples.
    pub fn reaches(&self, lsn: Lsn) -> bool {
        self.samples.front().is_none_or(|s| s.lsn <= lsn.next())
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
        let records = newest.lsn.0 - lsn.0;
        // Each takes a block at least, also those of which nothing was noted here.
        let least = records.saturating_mul(BLOCK);
        let bytes = newest.bytes - before.map_or(0, |b| b.bytes).min(newest.bytes);
        Some((records, bytes.max(least), time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_of_the_shortest_round_trip_counts() {
        let mut clock = ClockEstimate::default();
        assert_eq!(clock.offset(), 0);
        clock.answered(1000, 6000, 3000, 0); // asymmetric, 2000 ns
        clock.answered(10_000, 15_050, 10_100, 0); // 100 ns: offset 5000
        assert_eq!((clock.offset(), clock.round_trip()), (5000, Some(100)));
        assert_eq!((clock.since(20_000, 15_300), clock.since(20_000, 60_100)), (301, 45_110));
        assert_eq!(clock.since(20_000, 14_000), 0);
        clock.answered(50_000, 1, 40_000, 0); // the own clock went back
        assert_eq!(clock.offset(), 5000);
        // What the trip took beyond the shortest one may have been on the way back.
        let mut clock = ClockEstimate::default();
        clock.answered(1000, 6000, 3000, 1900);
        assert_eq!(clock.offset(), 4950);
        clock.answered(4000, 9090, 4100, 0);
        assert_eq!(clock.offset(), 5040);
    }

    #[test]
    fn a_message_is_no_older_than_the_one_before_and_an_answer_than_its_trip() {
        let mut line = Line::new(993);
        assert_eq!([1000, 1100].map(|now| line.late(None, now)), [7, 107]);
        assert_eq!(
            [(Some(5), 1150), (None, 1200), (None, 1200)].map(|(e, now)| line.late(e, now)),
            [5, 55, 55]
        );
        // It was long on its way, after one that was not.
        assert_eq!(
            [(Some(0), 1300), (Some(5000), 1400), (None, 1450)].map(|(e, n)| line.late(e, n)),
            [0, 100, 150]
        );
        assert_eq!([line.late(Some(3), 1440), line.late(None, 1440)], [3, 3]);
    }

    #[test]
    fn a_queue_is_seen_for_as_long_as_it_stands() {
        let (mut way, queue) = (Way::default(), 3_000_000_000);
        assert_eq!([way.trip(40), way.trip(20), way.trip(25)], [0, 0, 5]);
        assert!((0..100_000).all(|_| way.trip(20 + queue) == queue));
        assert_eq!([way.trip(20), way.trip(10), way.trip(30)], [0, 0, 20]);
        // Another connection: what the way takes may have changed meanwhile.
        let mut way = Way::default();
        way.greeted(50, 1_000_000);
        assert_eq!([way.trip(60), way.trip(20), way.trip(70)], [10, 0, 50]);
        way.greeted(500, 1_500_000);
        assert_eq!([way.trip(130), way.trip(120)], [10, 0]);
        way.greeted(90, 100_000_000);
        assert_eq!(way.trip(95), 5);
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

    #[test]
    fn what_an_exchange_proves_of_a_clock_grows_weaker() {
        let mut clock = ClockEstimate::default();
        assert_eq!((clock.round_trip(), clock.since(70, 100)), (None, 30));
        clock.answered(20, 1_000_025, 30, 0);
        // Of longer trips, until the clocks may have drifted apart by the difference.
        for i in 1..=224u64 {
            let at = i * 1000;
            clock.answered(at, 1_000_000 + at + 57, at + 100, 0);
            assert_eq!((clock.offset(), clock.round_trip()), (1_000_000, Some(100)), "{i}");
        }
        clock.answered(225_000, 1_225_057, 225_100, 0);
        assert_eq!(clock.offset(), 1_000_007, "the shortest trip is too long ago");
        // The other's clock is set: what was proved of it is not true any more.
        clock.answered(226_000, 1_226_057, 226_900, 0);
        assert_eq!(clock.offset(), 1_000_007);
        clock.answered(227_000, 1_227_957, 227_900, 0);
        assert_eq!(clock.offset(), 1_000_007);
        clock.answered(228_000, 1_228_958, 228_900, 0);
        assert_eq!(clock.offset(), 1_000_508);
        // The other's clock may be behind, too.
        let mut clock = ClockEstimate::default();
        clock.answered(1000, 710, 1020, 0);
        assert_eq!((clock.offset(), clock.since(1000, 1800)), (-300, 500));
    }

    fn line(lsns: impl Iterator<Item = u64>) -> Timeline {
        let mut line = Timeline::default();
        lsns.for_each(|lsn| line.push(Sample { lsn: Lsn(lsn), time: lsn * 10, bytes: lsn * 4096 }, true));
        line
    }

    #[test]
    fn of_records_that_are_all_sampled_the_lag_is_exact() {
        let all = line(1..=10);
        for lsn in 0..10 {
            let behind = all.behind(Lsn(lsn), 0);
            assert_eq!(behind, Some((10 - lsn, (10 - lsn) * 4096, (lsn + 1) * 10)), "{lsn}");
        }
        assert_eq!([10, 11].map(|lsn| all.behind(Lsn(lsn), 0)), [None; 2]);
        assert_eq!([0, 1, 9, 10, 11].map(|lsn| all.time_of(Lsn(lsn))), [0, 10, 90, 100, 100]);
        assert_eq!((line(0..0).newest(), line(0..0).behind(Lsn(0), 0)), (None, None));
        // Between two samples the older one's time counts, and the bytes since then.
        let some = line([4, 8, 12].into_iter());
        assert_eq!(some.behind(Lsn(5), 0), Some((7, 8 * 4096, 40)));
        assert_eq!(some.behind(Lsn(7), 0), Some((5, 8 * 4096, 80)));
        assert_eq!((some.time_of(Lsn(3)), some.time_of(Lsn(7))), (0, 40));
    }

    #[test]
    fn of_what_is_older_than_the_line_every_record_counts_a_block() {
        let mut line = Timeline::default();
        assert!(line.reaches(Lsn(0)), "there is nothing to be older than");
        line.push(Sample { lsn: Lsn(10), time: 100, bytes: 0 }, true);
        line.push(Sample { lsn: Lsn(11), time: 110, bytes: 3 * BLOCK }, true);
        assert_eq!([8, 9, 10, 11].map(|lsn| line.reaches(Lsn(lsn))), [false, true, true, true]);
        let bytes = |lsn| line.behind(Lsn(lsn), 0).map(|(_, bytes, _)| bytes);
        assert_eq!([0, 9, 10].map(bytes), [11, 3, 3].map(|blocks| Some(blocks * BLOCK)));
    }

    #[test]
    fn the_newer_half_of_a_full_line_keeps_every_step_and_the_older_one_thins_out() {
        let full = SAMPLES as u64;
        let line = line(1..=full + 1);
        assert_eq!(line.samples.len(), SAMPLES * 3 / 4 + 1);
        for lsn in [full / 2 + 1, full / 2 + 2, full - 1, full] {
            assert_eq!(line.time_of(Lsn(lsn)), lsn * 10);
        }
        let kept = (1..=full / 2).filter(|lsn| line.time_of(Lsn(*lsn)) == lsn * 10).count();
        assert_eq!((kept, line.time_of(Lsn(1)), line.time_of(Lsn(2))), (SAMPLES / 4, 10, 10));
    }

    #[test]
    fn what_was_given_up_of_the_line_is_gone() {
        let mut line = line(1..=10);
        line.cut(Lsn(7));
        assert_eq!((line.newest().map(|s| s.lsn), line.time_of(Lsn(9))), (Some(Lsn(7)), 70));
        // What comes instead is of the primary's clock, and what is left of the own one.
        line.push(Sample { lsn: Lsn(8), time: 500, bytes: 1 << 20 }, false);
        let time = |lsn, ahead| line.behind(Lsn(lsn), ahead).map(|(.., time)| time);
        assert_eq!([time(6, 3), time(7, 3)], [Some(73), Some(500)]);
        line.settle(100);
        assert_eq!([7, 8].map(|lsn| line.time_of(Lsn(lsn))), [70, 400]);
    }
}

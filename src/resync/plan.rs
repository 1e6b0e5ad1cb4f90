//! Which windows a comparison goes through, at which pace, and how far it is.
//!
//! Owns: the position, the throttle, the rate over the last seconds. Invariant: windows come in the order
//! of the address space, so everything before the first open one has been compared.

use super::extents;
use crate::format::compare::{EXTENT, WINDOW};
use crate::units::{Address, Extent, SECONDS};
use std::collections::VecDeque;

/// The windows to come.
#[derive(Clone, Debug)]
pub struct Plan {
    volumes: Vec<(u8, u64)>,
    /// What may differ, in order; `None`: everything.
    candidates: Option<Vec<Extent>>,
    /// `None`: the address space ends before it.
    next: Option<u64>,
    /// Bytes to be compared altogether.
    pub total: u64,
}

impl Plan {
    /// Over volumes of these (number, bytes), in order; from the position `from` on.
    pub fn new(volumes: Vec<(u8, u64)>, candidates: Option<Vec<Extent>>, from: u64) -> Plan {
        let total = match &candidates {
            None => volumes.iter().map(|(_, size)| size).sum(),
            Some(list) => list.iter().map(|e| e.len()).sum(),
        };
        Plan { volumes, candidates, next: Some(from), total }
    }

    /// Where the next window begins; everything before was handed out.
    pub fn position(&self) -> u64 {
        self.next.unwrap_or(u64::MAX)
    }

    /// What may differ; `None`: everything.
    pub fn candidates(&self) -> Option<&Vec<Extent>> {
        self.candidates.as_ref()
    }

    /// Every window was handed out.
    pub fn is_done(&self) -> bool {
        self.next.and_then(|from| self.first_from(from)).is_none()
    }

    /// Bytes to be compared before this position.
    pub fn before(&self, position: u64) -> u64 {
        let clip = |start: u64, len: u64| position.saturating_sub(start).min(len);
        match &self.candidates {
            None => {
                let start = |n: u8| Address::new(n, 0).map_or(u64::MAX, |a| a.0);
                self.volumes.iter().map(|(n, size)| clip(start(*n), *size)).sum()
            }
            Some(list) => list.iter().map(|e| clip(e.start(), e.len())).sum(),
        }
    }

    /// The next window and the bitmap of its extents that are wanted (empty: all).
    pub fn next_window(&mut self) -> Option<(Extent, Vec<u8>)> {
        let from = self.first_from(self.next?)?;
        let (number, size) = *self.volumes.iter().find(|(n, _)| *n == Address(from).volume())?;
        let offset = Address(from).offset() / EXTENT * EXTENT;
        let start = Address::new(number, offset)?;
        let extent = Extent::new(start, (size - offset).min(WINDOW))?;
        self.next = extent.start().checked_add(extent.len());
        Some((extent, self.wanted(extent)))
    }

    /// The first position at or after `from` that is to be compared.
    fn first_from(&self, from: u64) -> Option<u64> {
        match &self.candidates {
            None => {
                let start = |n: u8| Address::new(n, 0).map(|a| a.0);
                let mut volumes = self.volumes.iter().filter_map(|(n, size)| Some((start(*n)?, *size)));
                volumes.find(|(start, size)| from <= start + (size - 1)).map(|(start, _)| start.max(from))
            }
            Some(list) => {
                let at = list.partition_point(|e| e.start() + (e.len() - 1) < from);
                list.get(at).map(|e| e.start().max(from))
            }
        }
    }

    fn wanted(&self, window: Extent) -> Vec<u8> {
        let Some(list) = &self.candidates else { return Vec::new() };
        let mut bits = vec![0u8; extents(window).div_ceil(8)];
        let last = window.start() + (window.len() - 1);
        let first = list.partition_point(|e| e.start() + (e.len() - 1) < window.start());
        for e in list[first..].iter().take_while(|e| e.start() <= last) {
            let from = e.start().max(window.start()) - window.start();
            let to = (e.start() + (e.len() - 1)).min(last) - window.start();
            for i in from / EXTENT..=to / EXTENT {
                bits[(i / 8) as usize] |= 1 << (i % 8);
            }
        }
        bits
    }
}

/// A limit on bytes a second.
#[derive(Clone, Copy, Debug)]
pub struct Throttle {
    rate: u64,
    /// When what was taken is paid for.
    free_at: u64,
}

impl Throttle {
    /// `rate` bytes a second; 0: no limit.
    pub fn new(rate: u64) -> Throttle {
        Throttle { rate, free_at: 0 }
    }

    /// When more may be taken (monotonic ns), if not now.
    pub fn wait(&self, now: u64) -> Option<u64> {
        (self.rate > 0 && self.free_at > now).then_some(self.free_at)
    }

    /// This much was taken.
    pub fn take(&mut self, bytes: u64, now: u64) {
        if self.rate > 0 {
            let nanos = u128::from(bytes) * u128::from(SECONDS) / u128::from(self.rate);
            self.free_at = self.free_at.max(now).saturating_add(u64::try_from(nanos).unwrap_or(u64::MAX));
        }
    }
}

/// How long the rate looks back.
const LOOK_BACK: u64 = 15 * SECONDS;
/// Between two samples.
const SAMPLE: u64 = SECONDS / 2;
/// An estimate beyond this is none.
const LONGEST: f64 = 30.0 * 86_400.0;

/// Rate and remaining time, from the last seconds.
#[derive(Clone, Debug, Default)]
pub struct Meter {
    samples: VecDeque<(u64, u64)>,
    waits: VecDeque<&'static str>,
}

impl Meter {
    /// So much is done now, and this is what it waits for.
    pub fn sample(&mut self, now: u64, done: u64, waits: Option<&'static str>) {
        if self.samples.back().is_some_and(|(at, _)| now < at + SAMPLE) {
            return;
        }
        self.samples.push_back((now, done));
        while self.samples.front().is_some_and(|(at, _)| at + LOOK_BACK < now) {
            self.samples.pop_front();
        }
        if let Some(waits) = waits {
            self.waits.push_back(waits);
        }
        while self.waits.len() > (LOOK_BACK / SAMPLE) as usize {
            self.waits.pop_front();
        }
    }

    /// Bytes a second.
    pub fn rate(&self) -> f64 {
        match (self.samples.front(), self.samples.back()) {
            (Some((from, a)), Some((to, b))) if to > from => {
                b.saturating_sub(*a) as f64 / ((to - from) as f64 / SECONDS as f64)
            }
            _ => 0.0,
        }
    }

    /// Seconds until `left` bytes are done; `None` when nobody can tell.
    pub fn eta(&self, left: u64) -> Option<f64> {
        let seconds = left as f64 / self.rate();
        (seconds.is_finite() && seconds <= LONGEST).then_some(seconds)
    }

    /// What it has waited for most.
    pub fn limited_by(&self) -> Option<&'static str> {
        let count = |what: &str| self.waits.iter().filter(|w| **w == what).count();
        self.waits.iter().copied().max_by_key(|w| count(w))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(volume: u8, offset: u64, len: u64) -> Extent {
        Extent::new(Address::new(volume, offset).unwrap(), len).unwrap()
    }

    #[test]
    fn windows_cover_every_volume_once_and_resume_where_they_ended() {
        let volumes = vec![(0, 2 * WINDOW + 512), (3, 4096), (255, WINDOW)];
        let all = |from| {
            let mut plan = Plan::new(volumes.clone(), None, from);
            let found = std::iter::from_fn(|| plan.next_window()).map(|(e, wanted)| {
                assert!(wanted.is_empty());
                e
            });
            found.collect::<Vec<_>>()
        };
        let expected = [
            extent(0, 0, WINDOW),
            extent(0, WINDOW, WINDOW),
            extent(0, 2 * WINDOW, 512),
            extent(3, 0, 4096),
            extent(255, 0, WINDOW),
        ];
        assert_eq!(all(0), expected);
        assert_eq!(all(WINDOW), expected[1..]);
        assert_eq!(all(expected[3].start()), expected[3..]);
        let plan = Plan::new(volumes.clone(), None, 0);
        assert_eq!(plan.total, 3 * WINDOW + 512 + 4096);
        assert_eq!(plan.before(expected[3].start()), 2 * WINDOW + 512);
    }

    #[test]
    fn only_candidates_are_wanted() {
        let list = vec![extent(0, EXTENT, EXTENT), extent(0, 9 * EXTENT, 2 * EXTENT), extent(0, WINDOW, 512)];
        let mut plan = Plan::new(vec![(0, 2 * WINDOW), (1, WINDOW)], Some(list), 0);
        assert_eq!(plan.total, 3 * EXTENT + 512);
        let (window, wanted) = plan.next_window().unwrap();
        assert_eq!(window, extent(0, EXTENT, WINDOW));
        // The window starts at the first candidate: bits 0, 8, 9 and the one at its end.
        let bits: Vec<_> = (0..extents(window)).filter(|i| wanted[i / 8] >> (i % 8) & 1 == 1).collect();
        assert_eq!(bits, [0, 8, 9, 511]);
        assert_eq!(plan.next_window(), None);
        assert_eq!(plan.before(plan.position()), plan.total);
    }

    #[test]
    fn the_pace_is_kept_and_the_estimate_is_honest() {
        let mut throttle = Throttle::new(1000);
        assert_eq!(throttle.wait(5), None);
        throttle.take(500, 5);
        assert_eq!(throttle.wait(5), Some(5 + SECONDS / 2));
        assert_eq!(throttle.wait(5 + SECONDS / 2), None);
        assert_eq!(Throttle::new(0).wait(0), None);
        let mut meter = Meter::default();
        assert_eq!((meter.eta(10), meter.limited_by()), (None, None));
        for i in 0..100 {
            meter.sample(i * SECONDS, i * 100, Some(if i % 3 == 0 { "a" } else { "b" }));
        }
        assert!((meter.rate() - 100.0).abs() < 1e-9 && meter.limited_by() == Some("b"));
        assert_eq!(meter.eta(1000), Some(10.0));
        for i in 100..120 {
            meter.sample(i * SECONDS, 9900, None);
        }
        assert_eq!(meter.eta(1000), None, "it stands still");
    }
}

//! Heartbeats: that the other end lives, its clock, and what is known of the primary.
//!
//! Owns: what they say and what is believed of it. Invariant (I5): a shadow that passes on what it knows of the
//! primary says how old that is, so lag is never told smaller at the end of a chain than it is; the clock that lag is
//! measured by is the primary's, never that of a shadow in between.

use super::event::LinkId;
use super::links::{LinkState, PeerView};
use super::run::{Part, Run};
use crate::format::message::Message;
use crate::link::lag::ClockEstimate;
use crate::units::{BLOCK, Lsn, NodeId, Term};

/// What was last said of the primary, by itself or by the shadow that feeds this one.
#[derive(Clone, Copy)]
pub struct Heard {
    /// Its newest record.
    pub(super) tail: Lsn,
    /// Seal time of the oldest record that was not applied here.
    pub(super) time: u64,
    /// Journal bytes that were not.
    pub(super) bytes: u64,
}

/// How the primary is known through those between.
#[derive(Clone, Copy, Default)]
pub struct Between {
    /// The newest that was said, whoever said it, and when it was heard there, on the own monotonic clock.
    known: Option<(u64, Term, Heard)>,
    /// The connection to the primary is lost there.
    lost: bool,
}

/// What one says.
struct Beat {
    wall: u64,
    tail: Option<Lsn>,
    time: u64,
    bytes: u64,
    silent: u64,
    live: bool,
}

impl PeerView {
    /// The times that it tells from now on are those of this node.
    pub(super) fn tells_time_of(&mut self, node: NodeId) {
        if self.clock_of != Some(node) {
            (self.clock_of, self.clock) = (Some(node), ClockEstimate::default());
        }
    }
}

impl Run {
    /// A heartbeat came.
    pub(super) fn heartbeat(&mut self, link: LinkId, message: Message) {
        let Message::Heartbeat { wall, echo, tail, time, bytes, silent, live, feeds, standing } = message
        else {
            return;
        };
        match self.links.by_id.get(&link).map(|l| &l.state) {
            Some(LinkState::Receiving) => {
                self.links.between.lost = !live;
                if let Some(tail) = tail {
                    self.heard_of(Heard { tail, time, bytes }, silent);
                }
                self.told_standing(standing, true);
            }
            Some(state) if state.is_followed() => {
                // What it lacks is more by so much; since when, and how many bytes, this link does not tell.
                if let Some((tail, known)) =
                    tail.zip(self.links.heard_of_primary).filter(|(t, k)| *t > k.tail)
                {
                    self.heard_of(Heard { tail, ..known }, silent);
                }
                self.told_standing(standing, false);
            }
            Some(LinkState::Sending(_)) => self.fed_by(link, feeds),
            _ => {}
        }
        if echo == 0 {
            return self.send_heartbeat(link, wall);
        }
        let now = self.now.wall;
        // A shadow that has no idea of its primary's clock says 0.
        if let Some(p) = self.links.peer_of(link).filter(|_| wall > 0) {
            p.clock.answered(echo, wall, now);
        }
    }

    /// Somebody who heard of the primary so long ago says this of it.
    fn heard_of(&mut self, mut heard: Heard, silent: u64) {
        let (mut at, term) = (self.now.mono.saturating_sub(silent), self.meta.sb.term);
        // What was known here may be newer than what the next one in the chain knows.
        if let Some((later, _, known)) =
            self.links.between.known.filter(|(then, of, _)| *then > at && *of == term)
        {
            at = later;
            if known.tail > heard.tail {
                heard = known;
            }
        }
        self.links.between.known = Some((at, term, heard));
        self.links.heard_of_primary = Some(heard);
    }

    /// Sends one; `echo`: it answers one.
    pub(super) fn send_heartbeat(&mut self, link: LinkId, echo: u64) {
        let own = self.journal.tail().point.lsn;
        let applied = match self.links.by_id.get(&link).map(|l| &l.state) {
            Some(LinkState::Sending(s)) => Some(s.positions().2),
            _ => None,
        };
        let behind = applied.and_then(|lsn| self.behind(lsn));
        let (_, bytes, time) = behind.unwrap_or((0, 0, 0));
        let feeds = if applied.is_none() { self.feeds() } else { Vec::new() };
        let (wall, live) = (self.now.wall, matches!(self.part, Part::Primary(_)));
        let mut beat = Beat { wall, tail: Some(own), time, bytes, silent: 0, live };
        if let (Part::Shadow(_), Some(applied)) = (&self.part, applied) {
            self.pass_on(&mut beat, own, applied);
            if echo > 0 {
                beat.wall = self.primary_wall().unwrap_or(0);
            }
        }
        let Beat { wall, tail, time, bytes, silent, live } = beat;
        let standing = self.counted(link);
        self.send(link, Message::Heartbeat { wall, echo, tail, time, bytes, silent, live, feeds, standing });
    }

    /// What is known here of the primary, for a shadow that has applied so much.
    fn pass_on(&self, beat: &mut Beat, own: Lsn, applied: Lsn) {
        let heard = self.links.heard_of_primary;
        // What has not come here yet lags there, too.
        beat.tail = heard.map(|h| own.max(h.tail));
        if let Some((bytes, time)) = self.still_to_come() {
            beat.bytes += bytes;
            if beat.time == 0 && heard.is_some_and(|h| h.tail > applied) {
                beat.time = time;
            }
        }
        (beat.silent, beat.live) = (self.unheard(), self.hears_primary());
    }

    /// Journal bytes of what the primary has and this shadow has not received, about, and a time not after the seal time of
    /// its first record. What the primary tells is of what was not applied here, which may be held back on purpose.
    pub(super) fn still_to_come(&self) -> Option<(u64, u64)> {
        let tail = self.journal.tail();
        let heard = self.links.heard_of_primary.filter(|h| h.tail > tail.point.lsn)?;
        if self.cfg.apply_delay == 0 {
            return Some((heard.bytes, heard.time));
        }
        let unapplied = self.behind(self.image.applied.point.lsn).map_or(0, |(_, bytes, _)| bytes);
        let least = (heard.tail.0 - tail.point.lsn.0).saturating_mul(BLOCK);
        Some((heard.bytes.saturating_sub(unapplied).max(least), heard.time.max(tail.time)))
    }

    /// The primary's wall clock now, as far as it is known here.
    pub(super) fn primary_wall(&self) -> Option<u64> {
        let clock = self.links.primary_clock()?;
        clock.round_trip()?;
        Some(self.now.wall.wrapping_add(clock.offset() as u64))
    }

    /// Nanoseconds since the primary was heard, by this shadow or by those between; since the start if never.
    pub(super) fn unheard(&self) -> u64 {
        let heard = match self.is_cascaded() {
            true => self.links.between.known.filter(|(_, of, _)| *of == self.meta.sb.term).map(|(at, ..)| at),
            false => self.links.primary().and_then(|n| self.links.view(n)).and_then(|v| v.heard),
        };
        self.now.mono.saturating_sub(heard.unwrap_or(self.links.chain.since))
    }

    /// The primary is connected, or as far as those between say.
    pub(super) fn hears_primary(&self) -> bool {
        self.links.receiving().is_some() && !(self.is_cascaded() && self.links.between.lost)
    }

    /// For how long the primary has missed its heartbeats, ns; none while they arrive.
    pub(super) fn silence(&self) -> Option<u64> {
        self.links.view(self.links.primary()?)?.heard?;
        let (silent, beat) = (self.unheard(), self.cfg.timing.heartbeat);
        // Each one between tells of what it heard up to two beats ago.
        let hops = if self.is_cascaded() { self.links.chain.sources().len().max(2) } else { 1 };
        (silent > 2 * beat * hops as u64).then_some(silent)
    }
}

//! Heartbeats: that the other end lives, its clock, and what is known of the primary.
//!
//! Owns: what they say and what is believed of it. Invariant (I5): a shadow that passes on what it knows of the
//! primary says how old that is, so lag is never told smaller at the end of a chain than it is; only a word on where the
//! primary is ends its silence, not whatever else comes of a connection; the clock that lag is measured by is the
//! primary's, never that of a shadow in between.

use super::event::LinkId;
use super::links::{LinkState, Links, PeerView};
use super::run::{Part, Run};
use crate::format::message::{Identity, Message};
use crate::journal::Tail;
use crate::link::handshake::{TermOrder, order};
use crate::link::lag::ClockEstimate;
use crate::units::{BLOCK, Lsn, NodeId, Now, Term};

/// What was last said of the primary, by itself or by the shadow that feeds this one.
#[derive(Clone, Copy)]
pub struct Heard {
    /// Its newest record.
    pub(super) tail: Lsn,
    /// Seal time of the oldest record that was not applied here; 0: none was known, so it was sealed since.
    pub(super) time: u64,
    /// Journal bytes that were not.
    pub(super) bytes: u64,
}

/// When it was heard there that this is so, by the own monotonic clock, and when that would have been if the message had not
/// waited in the line to here; under which term, and who said so here.
#[derive(Clone, Copy)]
struct Known {
    at: u64,
    alive: u64,
    term: Term,
    by: Option<NodeId>,
    heard: Heard,
}

/// How the primary is known through those between.
#[derive(Clone, Copy, Default)]
pub struct Between {
    /// The newest that was said, whoever said it.
    known: Option<Known>,
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
    /// The times that it tells from now on are those of this node, whose clock another one may have told already.
    pub(super) fn tells_time_of(&mut self, node: NodeId, clock: ClockEstimate) {
        if self.clock_of != Some(node) {
            (self.clock_of, self.clock) = (Some(node), clock);
        }
    }
}

impl Links {
    /// What is known of that node's clock.
    pub(super) fn clock_of(&self, node: NodeId) -> ClockEstimate {
        let told = self.peers.iter().filter(|p| p.clock_of == Some(node));
        told.max_by_key(|p| p.clock.round_trip().is_some())
            .map_or_else(ClockEstimate::default, |p| p.clock.clone())
    }

    /// Nanoseconds since that time on the primary's clock; `None` while nothing is known of that clock, or of the time (0).
    pub(super) fn since(&self, time: u64, now: Now) -> Option<u64> {
        let clock = self.primary_clock().filter(|c| time > 0 && c.round_trip().is_some())?;
        Some(clock.since(time, now.wall))
    }
}

impl Run {
    /// A heartbeat came.
    pub(super) fn heartbeat(&mut self, link: LinkId, message: Message) {
        let Message::Heartbeat { wall, echo, tail, time, bytes, silent, live, feeds, standing } = message
        else {
            return;
        };
        let (late, excess) = self.late_in_line(link, echo);
        match self.links.by_id.get(&link).map(|l| &l.state) {
            Some(LinkState::Receiving) => {
                self.links.between.lost = !live;
                if let Some(tail) = tail {
                    self.heard_of(link, Heard { tail, time, bytes }, (silent, late));
                }
                self.told_standing(standing, true);
            }
            Some(state) if state.is_followed() => {
                if let Some(tail) = tail {
                    let heard = self.with_own(Heard { tail, time, bytes });
                    self.heard_of(link, heard, (silent, late));
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
        let primary = self.links.primary();
        // A shadow that has no idea of its primary's clock says 0.
        if let Some(p) = self.links.peer_of(link).filter(|_| wall > 0) {
            p.clock.answered(echo, wall, now, excess);
            if p.node == primary {
                self.links.timed = self.now.mono;
            }
        }
    }

    /// For how long, ns, a heartbeat that came now, the answer to one sent at the own time `echo`, or none, was in the line at
    /// most; and how much longer than the shortest the round trip was that it ends.
    fn late_in_line(&mut self, link: LinkId, echo: u64) -> (u64, u64) {
        let now = self.now;
        let trip = now.wall.checked_sub(echo).filter(|_| echo > 0);
        let excess = trip.and_then(|trip| Some(self.links.peer_of(link)?.way.trip(trip)));
        let late = self.links.by_id.get_mut(&link).map_or(0, |l| l.line.late(excess, now.mono));
        (late, excess.unwrap_or(0))
    }

    /// Before records come over a link, it tells what follows the point that the handshake has found: what is here and
    /// not in the image is lacking, too.
    fn with_own(&self, told: Heard) -> Heard {
        let (applied, tail) = (self.image.applied.point.lsn, self.journal.tail());
        let (own, first) = self.behind(applied).map_or((0, None), |(_, bytes, time)| (bytes, Some(time)));
        let time = match told.time {
            // It does not know either; but it follows the last one here.
            0 if told.tail > tail.point.lsn => Some(tail.time),
            0 => None,
            time => Some(time),
        };
        let time = first.into_iter().chain(time).min().unwrap_or(0);
        Heard { time, bytes: told.bytes.saturating_add(own), ..told }
    }

    /// A node that follows no older primary, or is the primary, says in the handshake how far its journal goes: since
    /// when, and how many bytes that is, it does not.
    pub(super) fn ends_no_earlier(&mut self, peer: &Identity) {
        let (tail, rank) = (peer.tail.lsn, order(self.meta.sb.term, peer.term));
        let counts = peer.group == self.meta.sb.group && matches!(rank, TermOrder::Equal | TermOrder::Higher);
        let Some(known) = self.links.heard_of_primary.filter(|h| counts && tail > h.tail) else { return };
        let (own, received) = (self.journal.tail().point.lsn, self.behind(known.tail));
        let more = tail.0.saturating_sub(own.max(known.tail).0).saturating_mul(BLOCK);
        let bytes =
            known.bytes.saturating_add(received.map_or(0, |(_, bytes, _)| bytes)).saturating_add(more);
        // What has come meanwhile is not what is lacking since then.
        let time = if known.tail > own { known.time } else { 0 };
        self.links.heard_of_primary = Some(Heard { tail, time, bytes });
    }

    /// The image is another one, which may be older than the one of which the last word was said.
    pub(super) fn lacks_since(&mut self, end: &Tail) {
        if let Some(heard) = self.links.heard_of_primary.as_mut().filter(|h| h.tail > end.point.lsn) {
            heard.time = if heard.time == 0 { end.time } else { heard.time.min(end.time) };
        }
    }

    /// Somebody who heard of the primary so long ago says this of it, and that was late by so much.
    fn heard_of(&mut self, link: LinkId, mut heard: Heard, (silent, late): (u64, u64)) {
        let (mut alive, term) = (self.now.mono.saturating_sub(silent), self.meta.sb.term);
        let mut at = alive.saturating_sub(late);
        let by = self.links.by_id.get(&link).and_then(|l| l.peer());
        // What was known here may be newer than what the next one in the chain knows. But if that one said so itself, it
        // took longer to come here than it seemed: he knows no less now.
        if let Some(known) = self.links.between.known.filter(|k| k.at > at && k.term == term && k.by != by) {
            (at, alive) = (known.at, alive.max(known.alive));
            if known.heard.tail > heard.tail {
                heard = known.heard;
            }
        }
        self.links.between.known = Some(Known { at, alive, term, by, heard });
        self.links.heard_of_primary = Some(heard);
    }

    /// Sends one; `echo`: it answers one.
    pub(super) fn send_heartbeat(&mut self, link: LinkId, echo: u64) {
        let own = self.journal.tail().point.lsn;
        // Up to where the other one has it.
        let (mut applied, mut fed, mut begins) = (None, false, false);
        match self.links.by_id.get(&link).map(|l| (&l.state, l.common)) {
            Some((LinkState::Sending(s), _)) => (applied, fed) = (Some(s.positions().2), true),
            Some((LinkState::Offered | LinkState::Offering { .. }, common)) => applied = Some(common),
            // It may take this for the word of one that feeds it already: it is told nothing of where the primary is.
            Some((LinkState::Welcomed { .. }, _)) => begins = true,
            _ => {}
        }
        let behind = applied.and_then(|lsn| self.behind(lsn));
        let (_, bytes, mut time) = behind.unwrap_or((0, 0, 0));
        if !fed && applied.is_some_and(|lsn| !self.links.timeline.reaches(lsn)) {
            time = 0;
        }
        let feeds = if fed { Vec::new() } else { self.feeds() };
        let (wall, live) = (self.now.wall, matches!(self.part, Part::Primary(_)));
        let mut beat = Beat { wall, tail: Some(own).filter(|_| !begins), time, bytes, silent: 0, live };
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
            beat.bytes = beat.bytes.saturating_add(bytes);
            if own <= applied && heard.is_some_and(|h| h.tail > applied) {
                beat.time = time;
            }
        }
        (beat.silent, beat.live) = (self.word_age(), self.hears_primary());
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

    /// Nanoseconds since that time on the primary's clock. Before an exchange has told that clock it may be wrong by
    /// anything, and counts from the last exchange that told a primary's, or from the start here, at the latest. Time 0: since
    /// the last word of the primary.
    pub(super) fn late_since(&self, time: u64) -> u64 {
        if time == 0 {
            return self.word_age();
        }
        let Some(clock) = self.links.primary_clock() else { return 0 };
        let timed = self.links.timed.max(self.links.chain.since);
        let least = || self.now.mono.saturating_sub(timed).max(clock.since(time, self.now.wall));
        self.links.since(time, self.now).unwrap_or_else(least)
    }

    /// Nanoseconds since the primary was heard, by this shadow or by those between; since the start if never.
    pub(super) fn unheard(&self) -> u64 {
        let heard = match self.is_cascaded() {
            true => self.links.between.known.filter(|k| k.term == self.meta.sb.term).map(|k| k.alive),
            false => self.links.primary().and_then(|n| self.links.view(n)).and_then(|v| v.heard),
        };
        self.now.mono.saturating_sub(heard.unwrap_or(self.links.chain.since))
    }

    /// Nanoseconds since the last word on where the primary is, by itself or by those between; since the start if never.
    /// Other messages, of which a handshake is full, tell nothing of what was sealed meanwhile.
    pub(super) fn word_age(&self) -> u64 {
        let node = self.meta.sb.term.node;
        let known = self.links.between.known.filter(|k| k.term.node == node);
        self.now.mono.saturating_sub(known.map_or(self.links.chain.since, |k| k.at))
    }

    /// For how long that word is missing, ns; none while it comes.
    pub(super) fn missing_word(&self) -> Option<u64> {
        Some(self.word_age()).filter(|age| *age > self.patience() || !self.hears_primary())
    }

    /// The primary is connected, or as far as those between say.
    pub(super) fn hears_primary(&self) -> bool {
        self.links.receiving().is_some() && !(self.is_cascaded() && self.links.between.lost)
    }

    /// For how long the primary has missed its heartbeats, ns; none while they arrive.
    pub(super) fn silence(&self) -> Option<u64> {
        self.links.view(self.links.primary()?)?.heard?;
        let silent = self.unheard();
        (silent > self.patience()).then_some(silent)
    }

    /// How old the last word of the primary may be while nothing is wrong, ns.
    fn patience(&self) -> u64 {
        // Each one between tells of what it heard up to two beats ago.
        let hops = if self.is_cascaded() { self.links.chain.sources().len().max(2) } else { 1 };
        2 * self.cfg.timing.heartbeat * hops as u64
    }
}

//! Heartbeats: that the other end lives, its clock, and what is known of the primary.
//!
//! Owns: what they say and what is believed of it. Invariant (I5): a shadow that passes on what it knows of the
//! primary says how old that is, so lag is never told smaller at the end of a chain than it is; only a word on where the
//! primary is ends its silence, not whatever else comes of a connection; such a word is as old as the newest heartbeat from
//! here that was answered before it, so whatever time it lay in the line counts as silence; an older word never takes back
//! a newer one; the clock that lag is measured by is the primary's, never that of a shadow in between.

use super::event::LinkId;
use super::links::{LinkState, PeerView};
use super::run::{Part, Run};
use crate::format::message::{Identity, Message};
use crate::journal::Tail;
use crate::link::handshake::{TermOrder, order};
use crate::link::lag::ClockEstimate;
use crate::units::{BLOCK, Lsn, NodeId, Term};

/// What was last said of the primary, by itself or by the shadow that feeds this one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heard {
    /// Its newest record.
    pub(super) tail: Lsn,
    /// Seal time of the oldest record that was not applied here; 0: none was known, so it was sealed since.
    pub(super) time: u64,
    /// Journal bytes of those up to `tail` that had not come here; what has come is measured here.
    bytes: u64,
    /// It feeds this shadow: what had come is the beginning of the primary's history.
    fed: bool,
}

impl Heard {
    /// Some of it was not here when the journal here ended so.
    fn exceeds(&self, own: Lsn) -> bool {
        self.tail > own || !self.fed
    }
}

/// Between which times this was so, by the own monotonic clock, and under which term.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Known {
    /// Not before.
    at: u64,
    /// Not after: it was here.
    came: u64,
    term: Term,
    heard: Heard,
}

/// How the primary is known.
#[derive(Clone, Copy, Default)]
pub struct Word {
    /// The newest that was said, whoever said it.
    known: Option<Known>,
    /// Something was, over the newest link.
    spoken: bool,
    /// The connection to the primary is lost at those between.
    lost: bool,
}

impl Word {
    /// What was last said; nothing until the newest link has brought a word.
    pub(super) fn heard(&self) -> Option<Heard> {
        self.known.filter(|_| self.spoken).map(|k| k.heard)
    }
    /// Another link takes the place of the newest one.
    pub(super) fn awaited(&mut self) {
        self.spoken = false;
    }
    /// Somebody says something over the newest link.
    fn said(&mut self, new: Known) {
        self.spoken = true;
        let known = self.known.filter(|k| k.term.node == new.term.node);
        // What was known here may be newer than what the next one in the chain knows. A journal that ends earlier than it
        // did is believed only of a word that is certainly newer: it has lost its end.
        if let Some(mut k) = known.filter(|k| new.heard.tail < k.heard.tail && new.at <= k.came) {
            // Of records that a handshake told of it may know how long they are.
            let more = (k.heard.tail.0 - new.heard.tail.0).saturating_mul(BLOCK);
            k.heard.bytes = k.heard.bytes.max(new.heard.bytes.saturating_add(more));
            self.known = Some(k);
            return;
        }
        let at = known.map_or(new.at, |k| k.at.max(new.at));
        self.known = Some(Known { at, ..new });
    }
    /// The primary has so much, it is said `now`, and no more: so the silence goes on. The journal here ends with `own`.
    fn ends_no_earlier(&mut self, tail: Lsn, own: Lsn, now: u64) {
        let Some(known) = self.known.as_mut().filter(|k| tail > k.heard.tail) else { return };
        let before = known.heard;
        // What has come meanwhile is not what is lacking since then.
        let (time, bytes) = if before.exceeds(own) { (before.time, before.bytes) } else { (0, 0) };
        let more = (tail.0 - before.tail.0).min(tail.0.saturating_sub(own.0)).saturating_mul(BLOCK);
        let bytes = bytes.saturating_add(more);
        (known.came, known.heard) = (now, Heard { tail, time, bytes, ..before });
    }
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
        if echo > 0 {
            self.answered(link, echo, wall);
        }
        match self.links.by_id.get(&link).map(|l| &l.state) {
            Some(LinkState::Receiving) => {
                self.links.word.lost = !live;
                if let Some(tail) = tail {
                    self.heard_of(link, Heard { tail, time, bytes, fed: true }, silent);
                }
                self.told_standing(standing, true);
            }
            Some(state) if state.is_followed() => {
                if let Some(tail) = tail {
                    let heard = self.with_own(Heard { tail, time, bytes, fed: false });
                    self.heard_of(link, heard, silent);
                }
                self.told_standing(standing, false);
            }
            Some(LinkState::Sending(_)) => self.fed_by(link, feeds),
            _ => {}
        }
        if echo == 0 {
            self.send_heartbeat(link, wall);
        }
    }

    /// By which time a heartbeat's answer tells that it is one.
    pub(super) fn asked_at(&self) -> u64 {
        self.now.mono.max(1)
    }

    /// It answers a heartbeat that was sent at `echo`; its time is `wall`.
    fn answered(&mut self, link: LinkId, echo: u64, wall: u64) {
        let now = self.now;
        let Some(trip) = now.mono.checked_sub(echo) else { return };
        if let Some(l) = self.links.by_id.get_mut(&link) {
            l.sent_since = l.sent_since.max(echo);
        }
        // A shadow that has no idea of its primary's clock says 0.
        if let Some(p) = self.links.peer_of(link).filter(|_| wall > 0) {
            p.clock.answered(trip, wall, now.wall);
        }
    }

    /// Before records come over a link, it tells what follows the point that the handshake has found: what is here and
    /// not in the image is lacking, too.
    fn with_own(&self, told: Heard) -> Heard {
        let (applied, tail) = (self.image.applied.point.lsn, self.journal.tail());
        let first = self.behind(applied).map(|(.., time)| time);
        let time = match told.time {
            // It does not know either; but it follows the last one here.
            0 if told.tail > tail.point.lsn => Some(tail.time),
            0 => None,
            time => Some(time),
        };
        let time = first.into_iter().chain(time).min().unwrap_or(0);
        Heard { time, ..told }
    }

    /// A node that follows no older primary, or is the primary, says in the handshake how far its journal goes: since
    /// when, and how many bytes that is, it does not.
    pub(super) fn ends_no_earlier(&mut self, peer: &Identity) {
        let (tail, rank) = (peer.tail.lsn, order(self.meta.sb.term, peer.term));
        let counts = peer.group == self.meta.sb.group && matches!(rank, TermOrder::Equal | TermOrder::Higher);
        if counts {
            self.links.word.ends_no_earlier(tail, self.journal.tail().point.lsn, self.now.mono);
        }
    }

    /// The journal is about to end so: of what the last word says, the image or the journal lacks more than it did then.
    pub(super) fn lacks_since(&mut self, end: &Tail) {
        let gone = self.behind(end.point.lsn).map_or(0, |(_, bytes, _)| bytes);
        let known = self.links.word.known.as_mut().map(|k| &mut k.heard);
        if let Some(heard) = known.filter(|h| h.tail > end.point.lsn) {
            heard.time = if heard.time == 0 { end.time } else { heard.time.min(end.time) };
            heard.bytes = heard.bytes.saturating_add(gone);
        }
    }

    /// Somebody who heard of the primary so long ago says this of it.
    fn heard_of(&mut self, link: LinkId, heard: Heard, silent: u64) {
        let Some(since) = self.links.by_id.get(&link).map(|l| l.sent_since) else { return };
        let (at, came, term) = (since.saturating_sub(silent), self.now.mono, self.meta.sb.term);
        self.links.word.said(Known { at, came, term, heard });
    }

    /// Sends one; `echo`: it answers one.
    pub(super) fn send_heartbeat(&mut self, link: LinkId, echo: u64) {
        let own = self.journal.tail().point.lsn;
        // Up to where the other one has it: in its image, and at all.
        let (mut has, mut fed, mut begins) = (None, false, false);
        match self.links.by_id.get(&link).map(|l| (&l.state, l.common)) {
            Some((LinkState::Sending(s), _)) => {
                let (received, _, applied) = s.positions();
                (has, fed) = (Some((applied, received)), true);
            }
            Some((LinkState::Offered | LinkState::Offering { .. }, common)) => has = Some((common, common)),
            // It may take this for the word of one that feeds it already: it is told nothing of where the primary is.
            Some((LinkState::Welcomed { .. }, _)) => begins = true,
            _ => {}
        }
        let (applied, received) = has.unzip();
        let mut time = applied.and_then(|lsn| self.behind(lsn)).map_or(0, |(.., time)| time);
        let bytes = received.and_then(|lsn| self.behind(lsn)).map_or(0, |(_, bytes, _)| bytes);
        if !fed && applied.is_some_and(|lsn| !self.links.timeline.reaches(lsn)) {
            time = 0;
        }
        let feeds = if fed { Vec::new() } else { self.feeds() };
        let wall = if echo > 0 { self.now.wall } else { self.asked_at() };
        let live = matches!(self.part, Part::Primary(_));
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
        let heard = self.links.word.heard();
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

    /// Journal bytes of what the primary has and this shadow has not received, and a time not after the seal time of its
    /// first record: the primary tells that of what was not applied here, which may be held back on purpose.
    pub(super) fn still_to_come(&self) -> Option<(u64, u64)> {
        let tail = self.journal.tail();
        let heard = self.links.word.heard().filter(|h| h.exceeds(tail.point.lsn))?;
        let time = if self.cfg.apply_delay == 0 { heard.time } else { heard.time.max(tail.time) };
        Some((heard.bytes, time))
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
            true => self.links.word.known.filter(|k| k.term == self.meta.sb.term).map(|k| k.at),
            false => self.links.primary().and_then(|n| self.links.view(n)).and_then(|v| v.heard),
        };
        self.now.mono.saturating_sub(heard.unwrap_or(self.links.chain.since))
    }

    /// Nanoseconds since the last word on where the primary is, by itself or by those between; since the start if never.
    /// Other messages, of which a handshake is full, tell nothing of what was sealed meanwhile.
    pub(super) fn word_age(&self) -> u64 {
        let node = self.meta.sb.term.node;
        let known = self.links.word.known.filter(|k| k.term.node == node);
        self.now.mono.saturating_sub(known.map_or(self.links.chain.since, |k| k.at))
    }

    /// For how long that word is missing, ns; none while it comes.
    pub(super) fn missing_word(&self) -> Option<u64> {
        Some(self.word_age()).filter(|age| *age > self.patience())
    }

    /// The primary is connected, or as far as those between say.
    pub(super) fn hears_primary(&self) -> bool {
        self.links.receiving().is_some() && !(self.is_cascaded() && self.links.word.lost)
    }

    /// For how long the primary has missed its heartbeats, ns; none while they arrive.
    pub(super) fn silence(&self) -> Option<u64> {
        self.links.view(self.links.primary()?)?.heard?;
        let silent = self.unheard();
        (silent > self.patience()).then_some(silent)
    }

    /// How old the last word of the primary may be while nothing is wrong, ns.
    fn patience(&self) -> u64 {
        // Each one between tells of what it heard up to two beats ago; each beat is counted from the one that it answers.
        let hops = if self.is_cascaded() { self.links.chain.sources().len().max(2) } else { 1 };
        2 * self.cfg.timing.heartbeat * hops as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(at: u64, came: u64, tail: u64, node: u64) -> Known {
        let heard = Heard { tail: Lsn(tail), time: 7, bytes: 5 * BLOCK, fed: true };
        Known { at, came, term: Term { counter: 3, node: NodeId(node) }, heard }
    }

    /// When the last word that counts was so, and how far the primary is by it.
    fn known(word: &Word) -> (u64, u64) {
        word.known.map_or((0, 0), |k| (k.at, k.heard.tail.0))
    }

    #[test]
    fn an_older_word_takes_nothing_back() {
        let mut word = Word::default();
        word.said(said(100, 130, 40, 1));
        word.ends_no_earlier(Lsn(50), Lsn(38), 200);
        assert_eq!(known(&word), (100, 50), "what a handshake says does not end the silence");
        // It may have been on its way since before that.
        word.said(said(180, 230, 44, 1));
        assert_eq!(known(&word), (100, 50));
        word.said(said(190, 240, 50, 1));
        assert_eq!(known(&word), (190, 50));
        word.said(said(150, 250, 51, 1));
        assert_eq!(known(&word), (190, 51), "it knows more, so it is not older than what was known");
        // The primary has lost its end.
        word.said(said(250, 260, 45, 1));
        assert_eq!(known(&word), (190, 51));
        word.said(said(251, 270, 45, 1));
        assert_eq!(known(&word), (251, 45));
        // Another primary.
        word.said(said(20, 280, 30, 2));
        assert_eq!(known(&word), (20, 30));
    }

    /// The handshake counted a block for each record; who counted bytes knows better, of as many as he knew.
    #[test]
    fn an_older_word_may_know_how_long_records_are() {
        let blocks = |told: u64| {
            let mut word = Word::default();
            word.said(said(100, 130, 40, 1));
            word.ends_no_earlier(Lsn(50), Lsn(38), 200);
            let mut older = said(180, 230, 44, 1);
            older.heard.bytes = told * BLOCK;
            word.said(older);
            word.heard().map(|h| (h.tail.0, h.bytes / BLOCK))
        };
        assert_eq!(blocks(5), Some((50, 15)));
        assert_eq!(blocks(20), Some((50, 26)));
    }

    #[test]
    fn of_records_of_which_only_the_number_is_known_each_takes_a_block() {
        let lacks = |own, tail| {
            let mut word = Word::default();
            word.said(said(100, 130, 40, 1));
            word.ends_no_earlier(Lsn(tail), Lsn(own), 200);
            word.heard().map(|h| (h.bytes / BLOCK, h.time))
        };
        assert_eq!(lacks(38, 40), Some((5, 7)));
        assert_eq!(lacks(38, 43), Some((8, 7)));
        assert_eq!(lacks(40, 43), Some((3, 0)), "sealed since the last word");
        assert_eq!(lacks(42, 43), Some((1, 0)));
        assert_eq!(lacks(44, 43), Some((0, 0)));
    }

    #[test]
    fn nothing_is_known_before_the_newest_link_has_brought_a_word() {
        let mut word = Word::default();
        word.ends_no_earlier(Lsn(9), Lsn(3), 100);
        assert_eq!(word.heard(), None);
        word.said(said(100, 130, 40, 1));
        word.awaited();
        assert_eq!(word.heard(), None);
        word.said(said(110, 140, 39, 1));
        assert_eq!(word.heard().map(|h| h.tail), Some(Lsn(40)), "it was known before");
    }
}

//! A shadow that feeds another shadow.
//!
//! Owns: what a shadow passes on, and to whom. Invariants: it passes on only what it may never take back itself:
//! records that are durable here, and that the primary has vouched for (I7); no ring of shadows lasts, for each tells
//! those it feeds through whom it is fed, and lets them go whenever that changes; an image that is about to be
//! replaced feeds nobody; whatever those who follow need is given up before the primary, or the image here, waits.

use super::event::{Level, LinkId};
use super::links::{LinkState, PeerView};
use super::run::{Part, Run};
use super::status::PrimaryStatus;
use crate::format::compare::Compare;
use crate::format::message::{Identity, Role};
use crate::format::record::MAX_PADDED;
use crate::format::superblock::MAX_PEERS;
use crate::journal::Tail;
use crate::link::handshake::{MAX_SOURCES, TermOrder, closes_ring, may_lack, order};
use crate::link::lag::Sample;
use crate::units::{Extent, Lsn, NodeId, SECONDS, Term};

/// Journal bytes that stay free for what the primary sends, when somebody is to be fed.
const ROOM: u64 = MAX_PADDED;

/// Through whom the records come, and who was told so.
#[derive(Default)]
pub struct Chain {
    /// The nearest first; the last ones that were known.
    sources: Vec<NodeId>,
    /// The nearest of them is a shadow.
    cascaded: bool,
    told: (Vec<NodeId>, Term),
    /// The primary of that term, as it is called there.
    primary: (Term, String),
    /// When the node began, on the monotonic clock.
    pub(super) since: u64,
}

impl Chain {
    /// Through whom the records come, the nearest first.
    pub fn sources(&self) -> &[NodeId] {
        &self.sources
    }
    /// From now on they come from this node.
    pub fn follow(&mut self, source: &Identity) {
        self.cascaded = source.role == Role::Shadow;
        self.sources = std::iter::once(source.node).chain(source.sources.iter().copied()).collect();
        self.primary = (source.term, source.primary.clone());
    }
}

/// May a window be opened on the image here?
enum Window {
    Now,
    /// Once the image has what was sent already.
    Later,
    Never(String),
}

/// A connection over which somebody asks to be fed, or is.
fn feeds(state: &LinkState) -> bool {
    matches!(
        state,
        LinkState::Locating { .. }
            | LinkState::Welcomed { .. }
            | LinkState::Offered
            | LinkState::Offering { .. }
            | LinkState::Sending(_)
    )
}

impl Run {
    /// The peer that is dialled over this link may be followed while it is a shadow.
    fn cascades(&self, link: LinkId) -> bool {
        let dialed = self.links.by_id.get(&link).and_then(|l| l.dialed);
        dialed.and_then(|i| self.cfg.peers.get(i)).is_some_and(|p| p.cascade)
    }

    /// What is said of that to the peer: on a primary, whether it calls it.
    pub(super) fn tells_way(&self, link: LinkId) -> bool {
        match self.part {
            Part::Primary(_) => self.calls(link),
            Part::Shadow(_) => self.cascades(link),
        }
    }

    /// Another shadow says who it is, and may be followed.
    pub(super) fn may_follow_shadow(&self, link: LinkId, shadow: &Identity) -> bool {
        let ring = shadow.sources.contains(&self.cfg.node) || shadow.sources.len() >= MAX_SOURCES;
        // FLUSH waits for what a member tells the primary itself.
        let member = self.meta.sb.sync_set.contains(&self.cfg.node);
        // Who has handed its place over waits for the one that was to get it, unless another one has it by now.
        let waits =
            self.meta.sb.handed.is_some() && order(self.meta.sb.term, shadow.term) != TermOrder::Higher;
        shadow.role == Role::Shadow && self.cascades(link) && !ring && !member && !waits
    }

    /// Records come from a shadow.
    pub(super) fn is_cascaded(&self) -> bool {
        self.links.chain.cascaded
    }

    /// The name of the primary whose term is the highest seen.
    pub(super) fn primary_name_known(&self) -> Option<String> {
        let (term, sb) = (self.meta.sb.term, &self.meta.sb);
        if term.node == sb.node {
            return Some(self.cfg.name.clone());
        }
        let told = Some(&self.links.chain.primary).filter(|(of, name)| *of == term && !name.is_empty());
        let met = self.links.view(term.node).map(|v| v.name.clone());
        met.or_else(|| told.map(|(_, name)| name.clone()))
    }

    /// What this shadow knows of its primary.
    pub(super) fn primary_status(&self) -> Option<PrimaryStatus> {
        let heard = self.links.primary().and_then(|n| self.links.view(n)).and_then(|v| v.heard);
        let seconds = self.unheard() as f64 / SECONDS as f64;
        matches!(self.part, Part::Shadow(_)).then(|| PrimaryStatus {
            name: self.primary_name_known(),
            connected: self.hears_primary(),
            heard_seconds_ago: heard.map(|_| seconds),
            through: self.cascade_source(),
        })
    }

    /// The name of the shadow from which the records come, or came last.
    pub(super) fn cascade_source(&self) -> Option<String> {
        let node = self.links.primary().filter(|_| self.is_cascaded())?;
        Some(self.name_of(node))
    }

    /// Feeding that node would close a ring of shadows.
    pub(super) fn closes_ring(&self, peer: NodeId) -> bool {
        closes_ring(self.links.chain.sources(), peer)
    }

    /// This node is a shadow, and may only lack what that one holds.
    pub(super) fn may_lack(&self, own: &Identity, peer: &Identity) -> bool {
        matches!(self.part, Part::Shadow(_)) && may_lack(own, peer)
    }

    /// Image and journal here are those of a history, and nothing is about to replace either.
    pub(super) fn is_settled(&self) -> bool {
        let Part::Shadow(s) = &self.part else { return true };
        let sb = &self.meta.sb;
        let whole = sb.consistent && sb.resync.is_none() && !self.is_resyncing();
        let own_way = sb.retired.is_some() || sb.handed.is_some() || self.moving.is_some();
        let leaving = s.closing || self.admin.is_promoting() || self.fault.is_some();
        whole && !own_way && !leaving && !s.is_cutting() && !s.is_turning()
    }

    /// The newest record that may be passed on.
    pub(super) fn feedable(&self) -> Lsn {
        match &self.part {
            Part::Primary(_) => self.journal.tail().point.lsn,
            Part::Shadow(s) => self.journal.durable().min(s.vouched()),
        }
    }

    /// The newest record that may go over this link, and the newest that may be called durable on the primary.
    pub(super) fn feedable_to(&self, link: LinkId) -> (Lsn, Lsn) {
        let upto = self.feedable();
        let node = self.links.by_id.get(&link).and_then(|l| l.peer());
        let remade = node.and_then(|n| self.links.view(n)).is_some_and(|v| v.resyncing);
        if let Part::Primary(p) = &self.part {
            // A member that is being remade has to be told of more than it has.
            return (upto, if remade { self.journal.durable() } else { p.announced });
        }
        // Its image is being made from the one here: it is not to be ahead of it.
        let waits = self.compare.waits_for_window(link) && !self.is_held_back(upto);
        let most = if remade || waits { upto.min(self.image.applied.point.lsn) } else { upto };
        (most, upto)
    }

    /// Journal bytes that have to stay free when records are held for somebody.
    pub(super) fn room_to_hold(&self) -> u64 {
        match &self.part {
            Part::Primary(p) => p.reserved(),
            Part::Shadow(_) => ROOM,
        }
    }

    /// Where a resync from here begins: at a durable record, which is not before `since`.
    pub(super) fn resync_base(&self, since: Option<Lsn>) -> Option<Tail> {
        match &self.part {
            Part::Primary(p) if p.is_serving() && !p.closing => Some(*self.journal.tail()),
            Part::Primary(_) => None,
            // The image here is what is compared, wherever it stands.
            Part::Shadow(_) => {
                let at = self.image.applied;
                (self.is_settled() && at.point.lsn > Lsn(0) && since.is_none_or(|lsn| lsn <= at.point.lsn))
                    .then_some(at)
            }
        }
    }

    /// Lets those who follow this shadow go when they were told what is true no longer; makes room.
    /// Whether anything moved.
    pub(super) fn pump_cascade(&mut self) -> bool {
        if matches!(self.part, Part::Primary(_)) {
            return false;
        }
        let news = self.links.chain.told.0 != self.links.chain.sources
            || self.links.chain.told.1 != self.meta.sb.term;
        if news {
            self.links.chain.told = (self.links.chain.sources.clone(), self.meta.sb.term);
        }
        let fed = self.links.by_id.iter().filter(|(_, l)| l.dialed.is_none() && feeds(&l.state));
        let fed: Vec<LinkId> = fed.map(|(id, _)| *id).collect();
        if fed.is_empty() {
            return self.leave_behind();
        }
        let settled = self.is_settled();
        if !news && settled {
            return self.leave_behind();
        }
        let why = if settled { "this shadow follows on another way now" } else { "this shadow is changing" };
        fed.into_iter().for_each(|id| self.drop_link(id, why));
        true
    }

    /// Where the journal of a shadow is full, those who follow it are left behind: neither its primary nor a view of
    /// it waits for them.
    pub(super) fn leave_behind(&mut self) -> bool {
        let Part::Shadow(s) = &self.part else { return false };
        let starved = s.next_held().is_some_and(|len| !self.journal.fits(len));
        let (used, size) = self.journal.usage();
        let viewed = self.is_viewed() && used > size / 4 * 3;
        if !starved && !viewed {
            return false;
        }
        let checkpoint = self.links.checkpoint;
        if let Some(id) = self.links.by_id.iter().find(|(_, l)| l.held.is_some_and(|h| h < checkpoint)) {
            let id = *id.0;
            self.drop_link(id, "the journal is full, and it does not begin");
            self.update_keep();
            return true;
        }
        let slow = self.meta.sb.peers.iter().filter(|p| !p.behind && p.durable < checkpoint);
        let Some(node) = slow.min_by_key(|p| p.durable).map(|p| p.node) else { return false };
        self.fall_behind(node);
        true
    }

    /// Those that get their records through this node now.
    pub(super) fn feeds(&self) -> Vec<NodeId> {
        let fed = self.links.by_id.values().filter(|l| matches!(l.state, LinkState::Sending(_)));
        let fed: Vec<NodeId> = fed.filter_map(|l| l.peer()).collect();
        let further = fed.iter().filter_map(|n| self.links.view(*n)).flat_map(|v| v.feeds.iter().copied());
        let mut all: Vec<NodeId> = fed.iter().copied().chain(further).collect();
        all.truncate(MAX_PEERS);
        all
    }

    /// A shadow that is fed over this link says whom it feeds.
    pub(super) fn fed_by(&mut self, link: LinkId, feeds: Vec<NodeId>) {
        if let Some(view) = self.links.peer_of(link) {
            view.feeds = feeds;
        }
    }

    /// The name of the shadow through which that node gets its records now: nobody has to wait for it here.
    pub(super) fn fed_through(&self, node: NodeId) -> Option<&str> {
        let feeds = |v: &&PeerView| v.feeds.contains(&node) && v.node.is_some_and(|n| self.links.is_live(n));
        self.links.peers.iter().find(feeds).map(|v| v.name.as_str())
    }

    /// That node is followed from now on: nothing is held for it.
    pub(super) fn held_no_longer(&mut self, source: NodeId) {
        self.meta.sb.peers.retain(|p| p.node != source);
        self.update_keep();
    }

    /// The journal is not held for that node any more.
    pub(super) fn fall_behind(&mut self, node: NodeId) {
        let through = self.fed_through(node).map(str::to_owned);
        let Some(peer) = self.meta.sb.peers.iter_mut().find(|p| p.node == node) else { return };
        peer.behind = true;
        let name = peer.name.clone();
        self.meta.save(false);
        if let Some(through) = through {
            self.log(
                Level::Info,
                format!("{name} is fed through {through}: nothing is held for it any more"),
            );
            return self.update_keep();
        }
        let reason = "the journal was full: it fell back to the dirty map and needs a resync";
        let feeds = matches!(self.part, Part::Primary(_));
        // Whoever is followed now was fed once: what is told of the one is not true of the other.
        if let Some(p) = self.links.view_mut(node).filter(|p| feeds || p.follows) {
            p.state = "Resync";
            p.reason = Some(reason.into());
        }
        self.log(Level::Warn, format!("{name}: {reason}"));
        self.update_keep();
    }

    /// A record was appended, here or on the primary: lag is measured against it.
    pub(super) fn note_sample(&mut self, lsn: Lsn, time: u64) {
        let bytes = self.links.bytes_before + self.journal.bytes();
        self.links.timeline.push(Sample { lsn, time, bytes }, self.meta.sb.role == Role::Primary);
    }

    /// Records, journal bytes, and the seal time on the primary's clock of the first record that is lacking to whoever
    /// has everything up to `lsn`.
    pub(super) fn behind(&self, lsn: Lsn) -> Option<(u64, u64, u64)> {
        self.links.timeline.behind(lsn, self.clock_ahead())
    }

    /// By how much the primary's clock is ahead of the own one, as far as that is known.
    fn clock_ahead(&self) -> i64 {
        match self.meta.sb.role {
            Role::Primary => 0,
            Role::Shadow => self.links.primary_clock().map_or(0, |c| c.offset()),
        }
    }

    /// Before another one is the primary: lag is measured by its clock from here on.
    pub(super) fn leave_clock(&mut self) {
        let ahead = self.clock_ahead();
        self.links.timeline.settle(ahead);
    }

    /// The journal is another one, which ends so.
    pub(super) fn restart_timeline(&mut self, end: &Tail) {
        self.links.bytes_before = self.links.timeline.newest().map_or(0, |s| s.bytes);
        self.links.timeline.cut(end.point.lsn.prev());
        self.note_sample(end.point.lsn, end.time);
    }

    /// How far a shadow that follows this one is behind what is known of the primary here, once it has everything up to
    /// `applied`: records, journal bytes, nanoseconds.
    pub(super) fn lag_of_follower(&self, applied: Lsn) -> (u64, u64, u64) {
        let own = self.journal.tail().point.lsn;
        let tail = self.links.heard_of_primary.map_or(own, |h| own.max(h.tail));
        let (more, time) = self.still_to_come().unwrap_or_default();
        let records = tail.0.saturating_sub(applied.0);
        if records == 0 {
            return (0, 0, 0);
        }
        let (_, bytes, since) = self.behind(applied).unwrap_or((0, 0, time));
        (records, bytes.saturating_add(more), self.late_since(since))
    }

    /// The records come from this peer.
    pub(super) fn is_source(&self, peer: &PeerView) -> bool {
        matches!(self.part, Part::Shadow(_)) && peer.node.is_some() && peer.node == self.links.primary()
    }

    /// Nothing moves the image here to `lsn` for now: a view holds it, or it is held back on purpose.
    fn is_held_back(&self, lsn: Lsn) -> bool {
        let meant = matches!(&self.part, Part::Shadow(s) if s.wanted().min(s.delay.meant()) < lsn);
        self.view_holds() || meant
    }

    fn may_open_window(&self, link: LinkId) -> Window {
        let sent = match self.links.by_id.get(&link).map(|l| &l.state) {
            Some(LinkState::Sending(sender)) => sender.sent_to(),
            _ => return Window::Later,
        };
        let name = &self.cfg.name;
        if self.compare.job.as_ref().is_some_and(|j| j.is_running()) {
            return Window::Never(format!(
                "a comparison of {name}, which feeds this node, is under way: wait for its end"
            ));
        }
        if self.image.applied.point.lsn >= sent {
            return Window::Now;
        }
        if self.is_held_back(sent) {
            let who = self.links.by_id.get(&link).and_then(|l| l.peer()).map(|n| self.name_of(n));
            let how = match who.filter(|_| self.cfg.apply_delay > 0) {
                Some(who) => {
                    format!("a view or its apply_delay: ask on {name}, with --peer {who} --suspend-delay")
                }
                None => "a view: run it again after that".to_owned(),
            };
            return Window::Never(format!(
                "the image of {name}, which feeds this node, is held back by {how}, or connected to the primary"
            ));
        }
        Window::Later
    }

    /// A shadow that is fed from here asks for a window of the image.
    pub(super) fn open_from_shadow(&mut self, link: LinkId, open: Compare) {
        match self.may_open_window(link) {
            Window::Now => self.open_image_window(link, open),
            Window::Later => self.open_later(link, open),
            Window::Never(text) => {
                self.open_later(link, open);
                self.say(link, Compare::Fail { text });
            }
        }
    }

    /// Opens those that can be opened now; whether there were any.
    pub(super) fn open_waiting_windows(&mut self) -> bool {
        let links = self.compare.waiting_links();
        let ready = |run: &Run, link: &LinkId| matches!(run.may_open_window(*link), Window::Now);
        let ready: Vec<LinkId> = links.into_iter().filter(|l| ready(self, l)).collect();
        for link in &ready {
            for open in self.compare.take_waiting(*link) {
                self.open_image_window(*link, open);
            }
        }
        !ready.is_empty()
    }

    /// The window is as of the image's record: what is on its way into the image now, or will be later, is touched.
    fn open_image_window(&mut self, link: LinkId, open: Compare) {
        let Compare::Open { window, extent, wanted, quick } = open else { return };
        if !self.lies_within(link, extent) {
            return;
        }
        let (at, under_way) = (self.image.applied.point.lsn, self.image.under_way.clone());
        let indexed = self.index.roots(extent);
        self.begin_window(link, (window, extent, &wanted, quick), at, under_way.into_iter(), indexed);
    }

    /// What is about to be put into a shadow's image.
    pub(super) fn touch_image(&mut self, batch: impl Iterator<Item = Extent>) {
        if matches!(self.part, Part::Shadow(_)) && !self.is_staging() {
            self.image.under_way = batch.collect();
            self.image.under_way.iter().for_each(|e| self.compare.touch(*e));
        }
    }

    /// A window of this node's image is being compared by another one, or is waited for.
    pub(super) fn is_compared_with(&self) -> bool {
        matches!(self.part, Part::Shadow(_)) && self.compare.has_windows()
    }

    /// A window is done with there: what was touched in it is as it is here once this record is.
    pub(super) fn cover_window(&mut self, link: LinkId, window: u32) {
        let lsn = self.image.underway().point.lsn;
        self.say(link, Compare::Closed { window, lsn });
    }
}

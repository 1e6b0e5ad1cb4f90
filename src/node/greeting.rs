//! The handshake on both sides: facts gathered, the table asked, its answer carried out.
//!
//! Owns: the steps between a proven identity and the first record. Invariants: a shadow compares
//! chain hashes before it believes that histories agree (I9); it follows a term only once that term
//! is durable here (I8); a primary that learns of a higher term stops for good.

use super::event::{Level, LinkId};
use super::feed::Fetched;
use super::history::Happening;
use super::links::LinkState;
use super::run::{Part, Run, fetch};
use crate::format::message::{Cause, Identity, Message, Role, Verdict, proof, refuse};
use crate::link::handshake::{Decision, Facts, TermOrder, candidate, decide, fork, is_earlier_run, order};
use crate::units::{HistoryPoint, Lsn, Term};

impl LinkState {
    /// This node follows, or is about to follow, whoever is at the other end.
    pub(super) fn is_followed(&self) -> bool {
        matches!(
            self,
            LinkState::Cutting | LinkState::Rebasing | LinkState::Settling(_) | LinkState::Receiving
        )
    }
}

impl Run {
    /// This node, as it presents itself.
    pub(super) fn identity(&self) -> Identity {
        let sb = &self.meta.sb;
        let tail = self.journal.tail();
        Identity {
            group: sb.group,
            node: sb.node,
            name: self.cfg.name.clone(),
            role: sb.role,
            term: sb.term,
            volumes: sb.volumes.iter().map(|v| (v.number, v.size)).collect(),
            blank: sb.blank,
            tail: tail.point,
            tail_generation: tail.generation,
            oldest: self.journal.oldest(),
            applied: if self.is_apart() { Lsn(u64::MAX) } else { sb.limit.min(tail.point.lsn) },
            openings: sb.openings.clone(),
            resyncing: self.is_remaking(),
            rewinds: sb.retired.is_some_and(|r| r.rewinds),
            apply_delay: if sb.role == Role::Shadow { self.cfg.apply_delay } else { 0 },
            cascades: false,
            sources: match sb.role {
                Role::Shadow => self.links.chain.sources().to_vec(),
                Role::Primary => Vec::new(),
            },
            primary: self.primary_name_known().unwrap_or_default(),
        }
    }

    /// The dialler has proved who it is.
    pub(super) fn greeted(&mut self, link: LinkId, hello: &Identity, nonce: [u8; 32]) {
        if hello.node == self.cfg.node {
            self.send(link, refuse("this node was dialled by itself: check the peers' addresses"));
            return self.drop_link(link, "it is this very node");
        }
        if self.admin.is_promoting() {
            // What it would be told of this node's role may be untrue in a moment.
            return self.drop_link(link, "this node is being promoted");
        }
        if self.is_raising() {
            // A term that is not durable may be forgotten, and come again from whoever was told of it.
            return self.drop_link(link, "the term is being raised");
        }
        self.meet(link, hello);
        self.heard_out_by_name(&hello.name);
        let term = order(self.meta.sb.term, hello.term);
        // Nobody follows this node before it knows whether it is the primary; but a shadow, too, may tell it that it
        // was replaced.
        let outlived = matches!(term, TermOrder::Higher | TermOrder::Conflicting);
        if self.is_retiring() || (self.is_asking() && hello.role == Role::Shadow && !outlived) {
            return self.drop_link(link, "this node does not know yet whom it follows");
        }
        if self.takes_back(link, hello) {
            return;
        }
        if let Some(peer) = self.links.peer_of(link) {
            peer.resyncing = hello.resyncing;
            peer.blank = hello.blank;
            peer.apply_delay = hello.apply_delay;
            peer.follows = self.meta.sb.role == Role::Shadow && hello.role == Role::Shadow && hello.cascades;
        }
        let own = self.identity();
        let found = candidate(&own.openings, own.tail, hello);
        let at = found.map_or(Lsn(0), |(lsn, _)| lsn);
        let parted = fork(&own, hello);
        if let Some(l) = self.links.by_id.get_mut(&link) {
            l.common = found.map(|(lsn, _)| lsn).or(parted).unwrap_or(Lsn(0)).min(hello.tail.lsn);
        }
        if (own.role == Role::Shadow || hello.role == Role::Primary)
            && let Some(peer) = self.links.peer_of(link)
        {
            peer.fork = parted;
        }
        // Of two promotions a node can give up its own, or take an administrator's word on which one it follows.
        let gives_way = term != TermOrder::Conflicting || hello.term.node == hello.node;
        let facts = Facts {
            same_group: hello.group == own.group,
            same_volumes: hello.volumes == own.volumes,
            own: own.role,
            peer: hello.role,
            term,
            lineage_known: found.is_some(),
            // Of a run that is not known here, all that counts is where the last one that is known ended.
            keeps_applied: found.map(|(lsn, _)| lsn).or(parted).is_none_or(|at| at >= hello.applied),
            held: own.oldest.lsn <= at && self.can_hold(at),
            common_start: at > Lsn(0) || (own.blank && hello.blank),
            rewinds: hello.rewinds && gives_way,
            cascades: hello.cascades,
            loops: self.closes_ring(hello.node),
            settled: self.is_settled(),
            lacks: self.may_lack(&own, hello),
        };
        let ours = facts.same_group && facts.same_volumes;
        match decide(facts) {
            Decision::Compare => match self.point_at(at) {
                Some(point) => self.welcome(link, nonce, Verdict::Compare(point)),
                None => {
                    let state = LinkState::Locating { nonce, at, forked: false };
                    self.set_state(link, state);
                }
            },
            Decision::Resync(cause) => {
                let earlier = is_earlier_run(&own.openings, hello.tail_generation);
                let cause = if cause == Cause::Lineage && earlier { Cause::Behind } else { cause };
                let at = parted.filter(|at| cause == Cause::Fork && *at > Lsn(0));
                match at.map(|at| (at, self.point_at(at))) {
                    // Nobody else may have taken note of it, and it says what was whose exactly.
                    Some((at, None)) => {
                        self.set_state(link, LinkState::Locating { nonce, at, forked: true });
                    }
                    Some((_, point)) => self.offer_resync(link, nonce, cause, point),
                    None => self.offer_resync(link, nonce, cause, None),
                }
            }
            // It has shown nothing yet of what it holds.
            Decision::Diverged
                if hello.resyncing && hello.role == Role::Shadow && facts.term != TermOrder::Conflicting =>
            {
                self.offer_resync(link, nonce, Cause::Lineage, None);
            }
            Decision::Diverged => {
                self.parted_from(link, hello, parted);
                self.welcome(link, nonce, Verdict::Diverged(parted.unwrap_or(at)));
            }
            // A primary of an earlier term has to learn of the one that was seen here.
            Decision::Refuse(_) if ours && hello.role == Role::Primary && facts.term == TermOrder::Lower => {
                if own.role == Role::Primary {
                    self.parted_from(link, hello, parted);
                }
                self.welcome(link, nonce, Verdict::Diverged(parted.unwrap_or(at)));
            }
            Decision::Refuse(why) => {
                // A primary that asks a shadow who is the primary takes nothing back of what it is known to hold.
                let asks =
                    own.role == Role::Shadow && hello.role == Role::Primary && term == TermOrder::Equal;
                if !(asks && self.links.peer_of(link).is_some_and(|p| p.state == "Diverged")) {
                    self.set_peer(link, "Disconnected", Some(why.into()));
                }
                self.send(link, refuse(why));
                self.drop_link(link, why);
                let current = hello.term.node == hello.node;
                if asks && ours && current && hello.cascades {
                    self.called_by_primary(hello);
                }
            }
            Decision::Superseded => self.superseded(link, hello.term),
            Decision::Raise => self.raise_over(link, hello.term),
        }
    }

    /// This primary's history and the peer's have parted after `fork`. A primary that has heard of another promotion
    /// acknowledges nothing any more: it is no rival.
    fn parted_from(&mut self, link: LinkId, peer: &Identity, fork: Option<Lsn>) {
        let own = self.meta.sb.term;
        let ended = peer.term.node != peer.node || order(own, peer.term) == TermOrder::Lower;
        let (rival, why) = match peer.role {
            Role::Primary if ended => (false, "it was a primary under a term that has ended"),
            Role::Primary => (true, "it is a primary, too"),
            Role::Shadow => (false, "it holds what this node never wrote"),
        };
        self.set_diverged(link, fork, rival, why);
    }

    /// The journal has room to keep the records after `at` for somebody who reads them.
    fn can_hold(&self, at: Lsn) -> bool {
        self.journal.can_hold(at, self.room_to_hold())
    }

    /// The candidate's hash is known, or being read.
    pub(super) fn point_at(&self, lsn: Lsn) -> Option<HistoryPoint> {
        let tail = self.journal.tail().point;
        let oldest = self.journal.oldest();
        let known = [tail, oldest].into_iter().chain(self.meta.sb.openings.iter().map(|o| o.at));
        known.into_iter().find(|p| p.lsn == lsn)
    }

    /// Records which node a link leads to; an older link to the same node is given up.
    fn meet(&mut self, link: LinkId, peer: &Identity) {
        let older: Vec<_> = self
            .links
            .by_id
            .iter()
            .filter(|(id, l)| **id != link && l.peer() == Some(peer.node))
            .map(|(id, _)| *id)
            .collect();
        for id in older {
            self.drop_link(id, "the peer has connected anew");
        }
        self.links.meet(link, peer.node, &peer.name, self.now.mono);
        if let Some(view) = self.links.peer_of(link) {
            view.term = Some(peer.term);
        }
    }

    pub(super) fn set_state(&mut self, link: LinkId, state: LinkState) {
        if let Some(l) = self.links.by_id.get_mut(&link) {
            l.state = state;
        }
    }

    pub(super) fn welcome(&mut self, link: LinkId, nonce: [u8; 32], verdict: Verdict) {
        let identity = Box::new(self.identity());
        let proof = proof(&self.cfg.key, &nonce, &identity, Some(&verdict));
        let state = match &verdict {
            Verdict::Compare(point) => Some(LinkState::Welcomed { at: point.lsn }),
            Verdict::Resync { .. } => Some(LinkState::Offered),
            Verdict::Diverged(_) => None,
        };
        self.send(link, Message::Welcome { identity, verdict, proof });
        match state {
            Some(state) => {
                self.set_state(link, state);
                self.tell_outdated_at(link);
            }
            None => self.drop_link(link, "it can't follow as it is"),
        }
    }

    /// Looks up the chain hash at the candidate; whether anything moved.
    pub(super) fn locate(&mut self, id: LinkId) -> bool {
        let Some(link) = self.links.by_id.get_mut(&id) else { return false };
        let LinkState::Locating { nonce, at, forked } = &link.state else { return false };
        let (nonce, at, forked) = (*nonce, *at, *forked);
        match fetch!(self, link.reader, at) {
            Fetched::Pending => return false,
            Fetched::Ready(record) if forked => {
                self.offer_resync(id, nonce, Cause::Fork, Some(record.point()));
            }
            Fetched::Lost if forked => self.offer_resync(id, nonce, Cause::Fork, None),
            Fetched::Ready(record) => self.welcome(id, nonce, Verdict::Compare(record.point())),
            Fetched::Lost => {
                self.offer_resync(id, nonce, Cause::Behind, None);
            }
        }
        true
    }

    /// A peer has seen a higher term: this node must never acknowledge again under its own.
    fn superseded(&mut self, link: LinkId, term: Term) {
        self.send(link, refuse("this primary was superseded and has stopped"));
        self.supersede(term);
    }

    /// The acceptor's verdict on this shadow.
    pub(super) fn welcomed(&mut self, link: LinkId, primary: &Identity, verdict: Verdict) {
        // Whatever comes of this link.
        self.ends_no_earlier(primary);
        match &self.part {
            // Begun for an earlier link: what this one compared may be gone in a moment.
            Part::Shadow(s) if s.is_cutting() => {
                return self.drop_link(link, "the journal is being cut back");
            }
            Part::Shadow(s) if s.is_turning() => {
                return self.drop_link(link, "the journal is being begun anew");
            }
            Part::Shadow(_) if self.admin.is_promoting() => {
                return self.drop_link(link, "this node is being promoted");
            }
            Part::Shadow(_) => {}
            Part::Primary(_) => return self.met_other(link, primary),
        }
        let own = self.identity();
        // Who has handed its place over does not follow the one that was not told of it, though it may feed shadows.
        if primary.role == Role::Shadow && self.takes_back(link, primary) {
            return;
        }
        let followed = primary.role == Role::Primary || self.may_follow_shadow(link, primary);
        if !followed || primary.group != own.group || primary.volumes != own.volumes {
            return self.drop_link(link, "it is not a primary of this group with these volumes");
        }
        let rank = order(own.term, primary.term);
        if let Some(peer) = self.links.peer_of(link) {
            peer.blank = primary.blank;
        }
        if rank == TermOrder::Lower {
            return self.drop_link(link, "it is a primary of a term that has ended");
        }
        self.meet(link, primary);
        // Of two that were dialled at once, the other has answered first.
        let stale = self.links.by_id.get(&link).is_some_and(|l| l.told != (own.tail, own.applied));
        if rank == TermOrder::Equal && (stale || self.hears_primary()) {
            return self.drop_link(link, "another one is followed by now");
        }
        if rank == TermOrder::Higher {
            self.leave_clock();
        }
        let clock = self.links.clock_of(primary.term.node);
        if let Some(peer) = self.links.peer_of(link) {
            peer.fork = fork(&own, primary);
            peer.tells_time_of(primary.term.node, clock);
            peer.follows = false;
        }
        if rank == TermOrder::Conflicting {
            return self.histories_differ(link, own.tail.lsn.min(primary.tail.lsn));
        }
        if rank == TermOrder::Higher {
            self.meta.sb.term = primary.term;
            let told = Some(primary.primary.clone()).filter(|name| !name.is_empty());
            let name = told.unwrap_or_else(|| self.name_of(primary.term.node));
            self.taken_over(primary.term.node, &name);
            self.meta.save(true);
            self.tell(Happening::Term { primary: name });
        }
        if rank == TermOrder::Higher || matches!(verdict, Verdict::Compare(_)) {
            self.links.follow(primary);
            self.held_no_longer(primary.node);
            self.leave_others(link);
        }
        if stale {
            return self.drop_link(link, "more has come since it was told what there is");
        }
        match verdict {
            Verdict::Compare(at) if at.lsn > own.tail.lsn => {
                self.drop_link(link, "it compares what is not here")
            }
            Verdict::Compare(at) if at.lsn < own.applied => self.contents_differ(link, at.lsn),
            Verdict::Compare(at) if at.lsn < own.tail.lsn => {
                self.set_state(link, LinkState::Cutting);
                self.cut_to(link, at);
            }
            Verdict::Compare(at) if at == own.tail => self.histories_agree(link),
            Verdict::Compare(at) => self.contents_differ(link, at.lsn),
            Verdict::Resync { cause, oldest, points } => {
                let why = format!(
                    "{}: its journal begins after LSN {oldest}, this shadow ends at LSN {}",
                    cause.text(),
                    own.tail.lsn
                );
                self.set_peer(link, "Resync", Some(why));
                self.begin_rebase(link, cause, primary, points);
            }
            Verdict::Diverged(lsn) => self.histories_differ(link, lsn),
        }
    }

    /// A primary has dialled a node that has proved to be of this group, and that knows of another primary.
    fn met_other(&mut self, link: LinkId, other: &Identity) {
        self.meet(link, other);
        let parted = fork(&self.identity(), other);
        if order(self.meta.sb.term, other.term) == TermOrder::Higher {
            if let Some(peer) = self.links.peer_of(link) {
                peer.fork = parted;
            }
            return self.superseded(link, other.term);
        }
        if other.role == Role::Primary {
            self.parted_from(link, other, parted);
        }
        self.be_patient(link);
        self.drop_link(link, "it does not follow this node");
    }

    /// One primary at a time: under a term that may have ended, nothing is acknowledged any more (I8).
    pub(super) fn leave_others(&mut self, link: LinkId) {
        let others = self.links.by_id.iter().filter(|(id, l)| **id != link && l.state.is_followed());
        for id in others.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.drop_link(id, "this shadow follows another primary now");
        }
    }

    /// The journal here is a prefix of the primary's.
    pub(super) fn histories_agree(&mut self, link: LinkId) {
        self.rejoined();
        let tail = self.journal.tail().point.lsn;
        if let Part::Shadow(s) = &mut self.part {
            // What was announced beyond the end here belongs to records that never came.
            s.clamp(tail);
        }
        self.meta.sb.limit = self.meta.sb.limit.min(tail);
        self.meta.sb.clean = false;
        let ticket = self.meta.save(true);
        self.set_state(link, LinkState::Settling(ticket));
    }

    /// The journal here holds something that the primary never wrote.
    pub(super) fn histories_differ(&mut self, link: LinkId, lsn: Lsn) {
        let known = self.links.peer_of(link).and_then(|p| p.fork);
        self.set_diverged(link, known, false, "this node holds what it never wrote");
        let at =
            known.map_or_else(|| format!("at LSN {lsn} at the latest"), |lsn| format!("after LSN {lsn}"));
        self.send(link, refuse(&format!("histories differ, {at}; nothing was merged")));
        self.be_patient(link);
        self.drop_link(link, "histories differ");
    }

    /// The labels agree, and what they stand for does not: one of the two was put back to an older copy.
    pub(super) fn contents_differ(&mut self, link: LinkId, lsn: Lsn) {
        if let Part::Shadow(s) = &mut self.part {
            s.apart = true;
        }
        self.histories_differ(link, lsn);
    }

    /// It gives up what it holds, and the primary's labels do not tell where the two parted.
    pub(super) fn is_apart(&self) -> bool {
        let rewinds = self.meta.sb.retired.is_some_and(|r| r.rewinds);
        rewinds && matches!(&self.part, Part::Shadow(s) if s.apart)
    }

    /// Asks for records once what was decided is durable; whether anything moved.
    pub(super) fn settle(&mut self, link: LinkId) -> bool {
        let Some(LinkState::Settling(ticket)) = self.links.by_id.get(&link).map(|l| &l.state) else {
            return false;
        };
        if !self.meta.is_saved(*ticket) || !self.journal.is_quiet() {
            return false;
        }
        let from = self.journal.tail().point.lsn.next();
        self.set_state(link, LinkState::Receiving);
        self.links.heard_of_primary = None;
        self.set_peer(link, "UpToDate", None);
        self.send(link, Message::Begin { from });
        if !self.is_remaking() {
            // It may have become so since it said hello.
            self.send(link, Message::Resynced);
        }
        let whom = if self.is_cascaded() { "another shadow" } else { "the primary" };
        self.log(Level::Info, format!("following {whom} from LSN {from}"));
        true
    }
}

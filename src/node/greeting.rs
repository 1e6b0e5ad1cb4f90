//! The handshake on both sides: facts gathered, the table asked, its answer carried out.
//!
//! Owns: the steps between a proven identity and the first record. Invariants: a shadow compares
//! chain hashes before it believes that histories agree (I9); it follows a term only once that term
//! is durable here (I8); a primary that learns of a higher term stops for good.

use super::event::{Level, LinkId};
use super::feed::Fetched;
use super::links::LinkState;
use super::run::{Part, Run, fetch};
use crate::format::message::{Cause, Identity, Message, Role, Verdict, proof, refuse};
use crate::link::handshake::{Decision, Facts, TermOrder, candidate, decide, is_earlier_run, order};
use crate::units::{Lsn, Term};

impl Run {
    /// The dialler has proved who it is.
    pub(super) fn greeted(&mut self, link: LinkId, hello: &Identity, nonce: [u8; 32]) {
        if hello.node == self.cfg.node {
            self.send(link, refuse("this node was dialled by itself: check the peers' addresses"));
            return self.drop_link(link, "it is this very node");
        }
        self.meet(link, hello);
        if let Some(peer) = self.links.peer_of(link) {
            peer.resyncing = hello.resyncing;
            peer.blank = hello.blank;
        }
        let own = self.identity();
        let found = candidate(&own.openings, own.tail, hello);
        let at = found.map_or(Lsn(0), |(lsn, _)| lsn);
        let facts = Facts {
            same_group: hello.group == own.group,
            same_volumes: hello.volumes == own.volumes,
            own: own.role,
            peer: hello.role,
            term: order(own.term, hello.term),
            lineage_known: found.is_some(),
            keeps_applied: at >= hello.applied,
            held: own.oldest.lsn <= at && self.can_hold(at),
            common_start: at > Lsn(0) || (own.blank && hello.blank),
        };
        match decide(facts) {
            Decision::Compare => match self.point_at(at) {
                Some(point) => self.welcome(link, nonce, Verdict::Compare(point)),
                None => {
                    let state = LinkState::Locating { nonce, at };
                    self.set_state(link, state);
                }
            },
            Decision::Resync(cause) => {
                let earlier = is_earlier_run(&own.openings, hello.tail_generation);
                let cause = if cause == Cause::Lineage && earlier { Cause::Behind } else { cause };
                self.offer_resync(link, nonce, cause);
            }
            // It has shown nothing yet of what it holds.
            Decision::Diverged
                if hello.resyncing && hello.role == Role::Shadow && facts.term != TermOrder::Conflicting =>
            {
                self.offer_resync(link, nonce, Cause::Lineage);
            }
            Decision::Diverged => {
                let why = format!("its history differs from this node's, at LSN {at} at the latest");
                self.set_peer(link, "Diverged", Some(why));
                self.welcome(link, nonce, Verdict::Diverged(at));
            }
            // A primary of an earlier term has to learn of this one, whose proof it gets here.
            Decision::Refuse(_) if hello.role == Role::Primary && own.role == Role::Primary => {
                let why = "it was a primary under a term that has ended; run `volrep rejoin` there";
                self.set_peer(link, "Diverged", Some(why.into()));
                self.welcome(link, nonce, Verdict::Diverged(at));
            }
            Decision::Refuse(why) => {
                self.set_peer(link, "Disconnected", Some(why.into()));
                self.send(link, refuse(why));
                self.drop_link(link, why);
            }
            Decision::Superseded => self.superseded(link, hello.term),
        }
    }

    /// The journal has room to keep the records after `at` for somebody who reads them.
    fn can_hold(&self, at: Lsn) -> bool {
        match &self.part {
            Part::Primary(p) => self.journal.can_hold(at, p.reserved()),
            Part::Shadow(_) => true,
        }
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
            Some(state) => self.set_state(link, state),
            None => self.drop_link(link, "it can't follow as it is"),
        }
    }

    /// Looks up the chain hash at the candidate; whether anything moved.
    pub(super) fn locate(&mut self, id: LinkId) -> bool {
        let Some(link) = self.links.by_id.get_mut(&id) else { return false };
        let LinkState::Locating { nonce, at } = &link.state else { return false };
        let (nonce, at) = (*nonce, *at);
        match fetch!(self, link.reader, at) {
            Fetched::Pending => return false,
            Fetched::Ready(record) => self.welcome(id, nonce, Verdict::Compare(record.point())),
            Fetched::Lost => {
                self.offer_resync(id, nonce, Cause::Behind);
            }
        }
        true
    }

    /// A peer has seen a higher term: this node must never acknowledge again under its own.
    fn superseded(&mut self, link: LinkId, term: Term) {
        let text = format!(
            "node {:?} was promoted under term {}, this primary has term {}: it stops acknowledging. \
             Run `volrep rejoin` here to follow the new primary",
            term.node, term.counter, self.meta.sb.term.counter
        );
        self.send(link, refuse("this primary was superseded and has stopped"));
        self.meta.sb.term = term;
        self.meta.save(true);
        self.fail(text);
    }

    /// The acceptor's verdict on this shadow.
    pub(super) fn welcomed(&mut self, link: LinkId, primary: &Identity, verdict: Verdict) {
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
            Part::Primary(_) => return self.met_primary(link, primary),
        }
        let own = self.identity();
        if primary.role != Role::Primary || primary.group != own.group || primary.volumes != own.volumes {
            return self.drop_link(link, "it is not a primary of this group with these volumes");
        }
        let rank = order(own.term, primary.term);
        if let Some(peer) = self.links.peer_of(link) {
            peer.blank = primary.blank;
        }
        match rank {
            TermOrder::Lower => return self.drop_link(link, "it is a primary of a term that has ended"),
            TermOrder::Conflicting => {
                self.meet(link, primary);
                return self.histories_differ(link, own.tail.lsn.min(primary.tail.lsn));
            }
            TermOrder::Equal | TermOrder::Higher => self.meet(link, primary),
        }
        if rank == TermOrder::Higher {
            self.meta.sb.term = primary.term;
            self.meta.save(true);
        }
        if rank == TermOrder::Higher || matches!(verdict, Verdict::Compare(_)) {
            self.links.follow(primary.node);
            self.leave_others(link);
        }
        match verdict {
            Verdict::Compare(at) if at.lsn > own.tail.lsn => {
                self.drop_link(link, "it compares what is not here")
            }
            Verdict::Compare(at) if at.lsn < own.applied => self.histories_differ(link, at.lsn),
            Verdict::Compare(at) if at.lsn < own.tail.lsn => {
                self.set_state(link, LinkState::Cutting);
                self.cut_to(link, at);
            }
            Verdict::Compare(at) if at == own.tail => self.histories_agree(link),
            Verdict::Compare(at) => self.histories_differ(link, at.lsn),
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

    /// A primary has dialled another one, which has proved to be of this group.
    fn met_primary(&mut self, link: LinkId, other: &Identity) {
        self.meet(link, other);
        if order(self.meta.sb.term, other.term) == TermOrder::Higher {
            return self.superseded(link, other.term);
        }
        let why = "it is a primary too: choose which side to keep";
        self.set_peer(link, "Diverged", Some(why.into()));
        self.be_patient(link);
        self.drop_link(link, why);
    }

    /// One primary at a time: under a term that may have ended, nothing is acknowledged any more (I8).
    pub(super) fn leave_others(&mut self, link: LinkId) {
        let following = |state: &LinkState| {
            matches!(
                state,
                LinkState::Cutting | LinkState::Rebasing | LinkState::Settling(_) | LinkState::Receiving
            )
        };
        let others = self.links.by_id.iter().filter(|(id, l)| **id != link && following(&l.state));
        for id in others.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.drop_link(id, "this shadow follows another primary now");
        }
    }

    /// The journal here is a prefix of the primary's.
    pub(super) fn histories_agree(&mut self, link: LinkId) {
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
        let why = format!("its history and this node's differ, at LSN {lsn} at the latest");
        self.set_peer(link, "Diverged", Some(why));
        self.send(link, refuse(&format!("histories differ, at LSN {lsn} at the latest; nothing was merged")));
        self.be_patient(link);
        self.drop_link(link, "histories differ");
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
        self.set_peer(link, "UpToDate", None);
        self.send(link, Message::Begin { from });
        if !self.is_remaking() {
            // It may have become so since it said hello.
            self.send(link, Message::Resynced);
        }
        self.log(Level::Info, format!("following the primary from LSN {from}"));
        true
    }
}

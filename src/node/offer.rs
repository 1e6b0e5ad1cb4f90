//! What a primary, or the shadow that feeds it, offers to a shadow whose journal does not lead to its own.
//!
//! Owns: that half of the beginning of a resync. Invariants: the records after the point that is
//! offered are kept until the shadow begins with them or its link is gone; what is told to have changed
//! since a point of this history is a superset of what has (I9).

use super::event::LinkId;
use super::links::LinkState;
use super::rebase::anchor;
use super::run::Run;
use crate::format::message::{Cause, MAX_CANDIDATES, Message, Verdict};
use crate::journal::Tail;
use crate::journal::maps::joined;
use crate::units::{HistoryPoint, Lsn};

/// Most extents that are told altogether; beyond it neighbours are joined.
const MOST: usize = 1 << 18;

impl Run {
    /// Tells a shadow that it needs a resync, and from what. `fork`: where its history leaves the one here.
    pub(super) fn offer_resync(
        &mut self,
        link: LinkId,
        nonce: [u8; 32],
        cause: Cause,
        fork: Option<HistoryPoint>,
    ) {
        self.set_peer(link, "Resync", Some(cause.text().into()));
        let Some(peer) = self.links.peer_of(link) else { return };
        let (node, blank) = (peer.node, peer.blank);
        if let Some(known) = self.meta.sb.peers.iter_mut().find(|k| Some(k.node) == node && !k.behind) {
            // What is held for it does not help it.
            known.behind = true;
            self.meta.save(false);
            self.update_keep();
        }
        let oldest = self.journal.oldest().lsn;
        let mut points = self.points(blank && self.meta.sb.blank);
        if let (Some(fork), Some(link)) = (fork, self.links.by_id.get_mut(&link)) {
            link.fork = Some(fork);
            points.push(fork);
        }
        self.welcome(link, nonce, Verdict::Resync { cause, oldest, points });
    }

    /// Points of the history here since which the dirty maps tell what has changed. That of LSN 0 says
    /// something only when both images were `blank` there.
    fn points(&self, blank: bool) -> Vec<HistoryPoint> {
        let sb = &self.meta.sb;
        let openings = sb.openings.iter().map(|o| o.at);
        let mut points: Vec<_> = self.maps.ranges().iter().map(|r| r.from).chain(openings).collect();
        points.retain(|p| p.lsn > Lsn(0) || blank);
        points.sort_by_key(|p| p.lsn);
        points.dedup();
        points
    }

    /// Answers a shadow that takes up the history here; whether anything moved.
    pub(super) fn offer(&mut self, id: LinkId) -> bool {
        let wanted = match self.links.by_id.get(&id).map(|l| &l.state) {
            Some(LinkState::Offering { since, .. }) => since.map(|p| p.lsn),
            _ => return false,
        };
        let Some(base) = self.resync_base(wanted).filter(|_| self.fault.is_none()) else { return false };
        let Some(link) = self.links.by_id.get_mut(&id) else { return false };
        let LinkState::Offering { since, at } = &mut link.state else { return false };
        let at = *at.get_or_insert(base);
        link.held = Some(at.point.lsn);
        let (since, fork) = (*since, link.fork);
        if self.journal.durable() < at.point.lsn {
            self.journal.want(at.point.lsn);
            return false;
        }
        let since = since.filter(|p| fork == Some(*p) || self.points(true).contains(p));
        self.tell_candidates(id, at, since);
        true
    }

    fn tell_candidates(&mut self, id: LinkId, at: Tail, since: Option<HistoryPoint>) {
        if let Some(since) = since {
            for extents in joined(self.maps.since(since.lsn), MOST).chunks(MAX_CANDIDATES) {
                self.send(id, Message::Candidates { extents: extents.to_vec() });
            }
        }
        let members = self.members_at(at.point.lsn);
        let told = anchor(&at);
        self.send(id, Message::Rebase { at: told, since, members });
        self.set_state(id, LinkState::Welcomed { at: at.point.lsn });
        self.set_peer(id, "Resyncing", None);
        if let Some(peer) = self.links.peer_of(id) {
            peer.resyncing = true;
        }
    }
}

//! What a primary (or a shadow that feeds others) owes its followers: records kept for them, and a place in the sync
//! set.
//!
//! Owns: how far the journal is held and for whom, and who enters the sync set. Invariants: a record
//! that a shadow still needs is overwritten only after that shadow was openly given up; entry to the
//! sync set counts once its record is durable on both sides (I4).

use super::config::FullPolicy;
use super::event::Action;
use super::event::{Level, LinkId};
use super::feed::Fetched;
use super::history::Happening;
use super::links::{LinkState, PeerView};
use super::run::{Part, Run, fetch};
use crate::format::message::{Message, Role};
use crate::format::record::{Kind, flags};
use crate::format::superblock::{MAX_PEERS, Peer};
use crate::link::sender::Sender;
use crate::units::{Lsn, NodeId};

/// A change of the sync set: whose, and the record that says it.
pub struct Change {
    pub(super) node: NodeId,
    job: u64,
    pub(super) lsn: Option<Lsn>,
}

impl Change {
    /// The record of that number has this LSN.
    pub(super) fn appended(&mut self, job: u64, lsn: Lsn) {
        if job == self.job {
            self.lsn = Some(lsn);
        }
    }
}

impl Run {
    /// A shadow asks for records from here on.
    pub(super) fn begin_sending(&mut self, link: LinkId, from: Lsn) {
        let window = self.cfg.window_bytes;
        let Some(l) = self.links.by_id.get_mut(&link) else { return };
        l.state = LinkState::Sending(Sender::new(from, window));
        l.held = None;
        let Some(p) = self.links.peer_of(link) else { return };
        (p.received, p.durable, p.applied) = (from.prev(), from.prev(), Lsn(0));
        let (Some(node), name, resyncing) = (p.node, p.name.clone(), p.resyncing) else { return };
        // What it still has to read must not be overwritten from here on.
        let room = self.room_to_hold();
        if !self.journal.hold_after(from.prev(), room) {
            self.set_peer(link, "Resync", Some("the journal has no room to hold what it lacks".into()));
            return self.drop_link(link, "the journal is too full for it to catch up");
        }
        self.drop_former();
        let known = &mut self.meta.sb.peers;
        let at = known.iter().position(|k| k.node == node);
        let verified = at.and_then(|i| known[i].verified);
        let peer = Peer { node, name, durable: from.prev(), behind: false, resyncing, verified };
        match at {
            Some(i) => known[i] = peer,
            None if known.len() < MAX_PEERS => known.push(peer),
            None => return self.drop_link(link, "this group has too many peers"),
        }
        self.meta.save(false);
        self.set_peer(link, if resyncing { "Resyncing" } else { "CatchingUp" }, None);
        self.update_keep();
        debug_assert!(self.journal.can_hold(from.prev(), u64::MAX), "what it is about to read was let go");
        // Until it hears where this node is, it can't say how far it is behind.
        self.send_heartbeat(link, 0);
    }

    /// A name belongs to the node that is fed here under it: of those that had it before, whose machine was lost and set
    /// up anew, nothing is known or kept any more, unless one is connected, too, or FLUSH waits for it.
    ///
    /// Whether anybody was: then more of the journal may go, once all is in place that still holds it.
    pub(super) fn drop_former(&mut self) -> bool {
        let fed: Vec<(&str, NodeId)> = (self.links.peers.iter())
            .filter_map(|v| Some((v.name.as_str(), v.node.filter(|n| self.links.sending_to(*n).is_some())?)))
            .collect();
        let known = self.meta.sb.peers.iter().map(|p| (p.name.as_str(), p.node));
        let seen = self.links.peers.iter().filter_map(|v| Some((v.name.as_str(), v.node?)));
        let had_it = |name: &str, n: NodeId| fed.iter().any(|(of, node)| *of == name && *node != n);
        let former: Vec<(String, NodeId)> = known
            .chain(seen)
            .filter(|(name, n)| had_it(name, *n) && !self.counts_on(*n))
            .map(|(name, n)| (name.to_owned(), n))
            .collect();
        let Some((name, _)) = former.first() else { return false };
        let text = format!("{name} is another node now: nothing is kept for the one before it");
        self.log(Level::Warn, text);
        let goes = |node: NodeId| former.iter().any(|(_, n)| *n == node);
        self.links.peers.retain(|v| v.node.is_none_or(|n| !goes(n)));
        self.meta.sb.peers.retain(|p| !goes(p.node));
        self.meta.save(false);
        true
    }

    /// A peer that something here goes by, whoever has its name.
    fn counts_on(&self, node: NodeId) -> bool {
        let changes = [self.links.entering.as_ref(), self.leaving()];
        let view = self.links.view(node);
        let above = self.meta.sb.role == Role::Shadow && view.is_some_and(|v| !v.follows);
        // What only it holds is an administrator's business.
        let diverged = view.is_some_and(|v| v.state == "Diverged");
        above
            || diverged
            || self.links.link_to(node).is_some()
            || self.meta.sb.sync_set.contains(&node)
            || changes.into_iter().flatten().any(|c| c.node == node)
    }

    /// Sends what the window and the journal have.
    pub(super) fn feed_shadow(&mut self, id: LinkId) -> bool {
        let (tail, durable) = self.feedable_to(id);
        let mut moved = false;
        let mut lost = None;
        let Some(link) = self.links.by_id.get_mut(&id) else { return false };
        let LinkState::Sending(sender) = &mut link.state else { return false };
        while let Some(next) = sender.wants().filter(|lsn| *lsn <= tail) {
            match fetch!(self, link.reader, next) {
                Fetched::Ready(record) => {
                    sender.sent(record.wire_len(), record.stamp.durable);
                    self.out.push(Action::Send { link: id, message: Message::Record(record) });
                    moved = true;
                }
                Fetched::Pending => break,
                Fetched::Lost => {
                    lost = Some(next);
                    break;
                }
            }
        }
        // A record that is on its way will carry it.
        let patience = match &self.part {
            Part::Primary(p) if !p.is_sealed() => p.pipeline.commit_takes(),
            Part::Primary(_) | Part::Shadow(_) => 0,
        };
        let news = sender.announce(durable, self.now.mono, patience);
        let (sent_bytes, current) = (sender.sent_bytes, sender.sent_to() == tail);
        if let Some(p) = self.links.peer_of(id) {
            p.sent_bytes = p.sent_bytes.max(sent_bytes);
            // Up to date once it has everything, and as long as memory can feed it.
            if current && p.received.0 + 1000 >= tail.0 && p.state == "CatchingUp" {
                p.state = "UpToDate";
                p.reason = None;
            }
        }
        match news {
            Ok(Some(lsn)) => self.out.push(Action::Send { link: id, message: Message::Durable { lsn } }),
            Ok(None) => {}
            Err(at) => self.wake_at(at),
        }
        if let Some(lsn) = lost {
            self.set_peer(id, "Resync", Some(format!("record {lsn} is no longer in the journal here")));
            self.drop_link(id, "the journal no longer holds what it lacks");
        }
        moved
    }

    /// Sends a record that a shadow asked for once more; whether anything moved.
    pub(super) fn send_copy(&mut self, id: LinkId) -> bool {
        let Some(link) = self.links.by_id.get_mut(&id) else { return false };
        let Some(lsn) = link.copy else { return false };
        let known = lsn > Lsn(0) && lsn <= self.journal.written();
        let found = if known { fetch!(self, link.copies, lsn) } else { Fetched::Lost };
        let message = match found {
            Fetched::Pending => return false,
            Fetched::Ready(record) => Message::Copy(record),
            Fetched::Lost => Message::NoCopy { lsn },
        };
        link.copy = None;
        self.send(id, message);
        true
    }

    /// The shadow's image is that of its history again.
    pub(super) fn resynced(&mut self, link: LinkId) {
        let Some(p) = self.links.peer_of(link).filter(|p| p.resyncing) else { return };
        p.resyncing = false;
        let node = p.node;
        if let Some(known) = self.meta.sb.peers.iter_mut().find(|k| Some(k.node) == node) {
            known.resyncing = false;
        }
        self.meta.save(false);
        self.set_peer(link, "CatchingUp", None);
    }

    /// Records that the checkpoint or a shadow still needs are kept.
    pub(super) fn update_keep(&mut self) {
        let mut keep = self.links.checkpoint;
        for peer in self.meta.sb.peers.iter().filter(|p| !p.behind) {
            keep = keep.min(peer.durable);
        }
        let held = self.links.by_id.values().filter_map(|l| l.held).chain(self.scrub_holds());
        keep = held.fold(keep, Lsn::min);
        self.journal.keep_after(keep);
    }

    /// Makes room in a full journal: a checkpoint, or by leaving slow shadows behind.
    pub(super) fn relieve(&mut self) -> bool {
        let Part::Primary(p) = &self.part else { return false };
        // A full write cache is none of its business: write-back makes room there, a checkpoint makes none.
        if !p.starved || !p.journal_full || self.fault.is_some() {
            return false;
        }
        let checkpoint = self.links.checkpoint;
        let applied = self.image.applied.point.lsn;
        if applied > checkpoint {
            return self.hurry_checkpoint();
        }
        // Only when all that this node can do itself is done are the shadows the cause.
        let done = applied == self.journal.tail().point.lsn && self.checkpoint_idle();
        if !done {
            return false;
        }
        let blocks = self.cfg.full != FullPolicy::Behind;
        let held = self.links.by_id.iter().find(|(_, l)| l.held.is_some() && !blocks);
        if let Some((id, _)) = held {
            // It was about to begin, and takes too long for that.
            self.drop_link(*id, "the journal is full, and it does not begin");
            self.update_keep();
            return true;
        }
        // Who is fed by another shadow by now is not waited for, nor who was lost as a member of the sync set.
        let through = |p: &Peer| self.fed_through(p.node).is_some() && !self.links.is_live(p.node);
        let lost = |p: &Peer| self.meta.sb.outdated.contains(&p.node);
        let may = |p: &&Peer| !blocks || through(p) || lost(p);
        let set = &self.meta.sb.sync_set;
        let slow = |p: &&Peer| !p.behind && p.durable < checkpoint && !set.contains(&p.node) && may(p);
        let Some(peer) = self.meta.sb.peers.iter().filter(slow).min_by_key(|p| p.durable) else {
            return false;
        };
        let node = peer.node;
        self.fall_behind(node);
        true
    }

    /// A peer that is configured for the sync set enters it once it is current.
    pub(super) fn enter_sync_set(&mut self) -> bool {
        let Part::Primary(p) = &mut self.part else { return false };
        if !p.is_serving()
            || p.closing
            || self.fault.is_some()
            || self.moving.is_some()
            || self.is_outdating()
        {
            return false;
        }
        if let Some(Change { node, lsn, .. }) = self.links.entering {
            // Its record has no LSN until it is appended.
            let lsn = lsn.unwrap_or(Lsn(u64::MAX));
            let there = self.links.view(node).map_or(Lsn(0), |v| v.durable);
            if self.journal.durable() < lsn || there < lsn {
                return false;
            }
            self.links.entering = None;
            self.meta.sb.sync_set.push(node);
            self.meta.sb.outdated.retain(|n| *n != node);
            self.meta.save(true);
            self.log(Level::Info, "a shadow entered the sync set: FLUSH waits for it from now on");
            self.tell(Happening::TakenIn { peer: self.name_of(node) });
            return true;
        }
        let wanted = |v: &&PeerView| {
            let configured = self.cfg.peers.iter().any(|c| c.name == v.name && c.sync);
            let member = v.node.is_some_and(|n| self.meta.sb.sync_set.contains(&n));
            configured && !member && v.state == "UpToDate" && v.node.is_some()
        };
        let Some(node) = self.links.peers.iter().find(wanted).and_then(|v| v.node) else { return false };
        let mut members = self.meta.sb.sync_set.clone();
        members.push(node);
        self.links.entering = self.propose_sync_set(node, &members);
        self.links.entering.is_some()
    }

    /// Puts the sync set's next members into the write order, in which `node` enters or leaves it.
    pub(super) fn propose_sync_set(&mut self, node: NodeId, members: &[NodeId]) -> Option<Change> {
        let payload: Vec<u8> = members.iter().flat_map(|n| n.0.to_le_bytes()).collect();
        let Part::Primary(p) = &mut self.part else { return None };
        Some(Change { node, job: p.pipeline.note(Kind::SyncSet, flags::SYNC, &payload, 0), lsn: None })
    }

    /// The sync set as the records up to `at` say it, those of a change under way, too: who takes up the history there
    /// never receives them. (A shadow's may be newer: whoever follows it receives those records.)
    pub(super) fn members_at(&self, at: Lsn) -> Vec<NodeId> {
        let there = |c: &&Change| c.lsn.is_some_and(|lsn| lsn <= at);
        let (enters, leaves) = (self.links.entering.as_ref(), self.leaving());
        let mut members = self.meta.sb.sync_set.clone();
        members.extend(enters.filter(there).map(|c| c.node));
        members.retain(|n| leaves.filter(there).is_none_or(|c| c.node != *n));
        members
    }

    /// The record of a change has this LSN.
    pub(super) fn changed_at(&mut self, job: u64, lsn: Lsn) {
        if let Some(entering) = &mut self.links.entering {
            entering.appended(job, lsn);
        }
        self.leaving_at(job, lsn);
    }
}

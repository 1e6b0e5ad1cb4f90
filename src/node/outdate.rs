//! A member of the sync set that was lost: it is not waited for any more, and knows it once it is back.
//!
//! Owns: who leaves the sync set, and what a shadow may claim to hold. Invariants (I4): a member leaves only on an
//! administrator's or a fence hook's word that it is stopped, and FLUSH goes on without it only once that is
//! durable, in the write order and in both superblock slots; a shadow claims to hold everything that was
//! acknowledged only while its process has the word of the newest primary that it knows for that. A process that was
//! started anew has no such word: its primary may have gone on without it.

use super::event::{AdminId, Level, LinkId, Refusal};
use super::followers::Change;
use super::history::Happening;
use super::links::{Link, LinkState, PeerView};
use super::meta::Ticket;
use super::run::{Part, Run};
use crate::format::message::{Message, Role, Standing};
use crate::role::{self, Outdate};
use crate::units::{Lsn, NodeId, Term};

/// A member is leaving.
struct Leaving {
    change: Change,
    /// The superblock that says so, once the record is durable.
    ticket: Option<Ticket>,
    asked: Vec<AdminId>,
}

/// See the module's documentation.
#[derive(Default)]
pub struct Standings {
    leaving: Option<Leaving>,
    /// The term of the primary on whose word this shadow holds all that was acknowledged.
    confirmed: Option<Term>,
}

impl Run {
    /// An administrator says that a member is lost.
    pub(super) fn outdate(&mut self, id: AdminId, name: &str, fenced: bool, dry_run: bool) {
        // Of several with one name the one that FLUSH waits for in vain is meant.
        let waits = |p: &&PeerView| {
            let member = p.node.is_some_and(|n| self.meta.sb.sync_set.contains(&n));
            (member, p.node.is_none_or(|n| self.links.link_to(n).is_none()))
        };
        let named = self.links.peers.iter().rev().filter(|p| p.name == name).max_by_key(waits);
        let sb = &self.meta.sb;
        // One that this process has not met has no name here but its id.
        let by_id = || sb.sync_set.iter().chain(&sb.outdated).copied().find(|n| format!("{n:?}") == name);
        let node = named.and_then(|p| p.node).or_else(by_id);
        // It may have come meanwhile.
        let view = named.or_else(|| self.links.view(node?));
        let leaving = self.standings.leaving.as_ref().map(|l| l.change.node);
        let facts = role::OutdateFacts {
            serving: matches!(&self.part, Part::Primary(p) if p.is_serving() && !p.closing),
            busy: self.moving.is_some() || self.is_retiring() || leaving.is_some_and(|n| Some(n) != node),
            known: view.is_some() || node.is_some(),
            outdated: node.is_some_and(|n| sb.outdated.contains(&n)),
            member: node.is_some_and(|n| sb.sync_set.contains(&n)),
            heard: view
                .is_some_and(|v| node.is_some_and(|n| self.links.link_to(n).is_some()) && self.is_heard(v)),
            fenced,
        };
        let names = || self.links.peers.iter().map(|p| p.name.as_str()).collect::<Vec<_>>().join(", ");
        let refusal = match (role::outdate(facts), node) {
            (Outdate::Allowed, Some(node)) => {
                if dry_run {
                    let text = format!(
                        "FLUSH would no longer wait for {name}, and what is written from then on would not be there; it \
                         would be a member again once it has caught up"
                    );
                    return self.answer(id, Ok(text));
                }
                return self.begin_leaving(id, node, name);
            }
            (Outdate::Already, _) => {
                let text = format!("{name} is outdated already: FLUSH does not wait for it");
                return self.answer(id, Ok(text));
            }
            (Outdate::NotPrimary, _) => {
                (Refusal::Busy, "this node is not a primary that serves: run it on the primary".to_owned())
            }
            (Outdate::Busy, _) => {
                (Refusal::Busy, "another change of this node is under way: try again in a moment".to_owned())
            }
            (Outdate::Alive, _) => {
                (Refusal::Busy, format!("{name} is connected and alive: stop its daemon first, or fence it"))
            }
            (Outdate::Unfenced, _) => (
                Refusal::Unfenced,
                format!(
                    "{name} is in the sync set: it may be promoted as one that holds everything, without what is written \
                     from now on. Stop or fence it first, or pass --i-fenced-the-member"
                ),
            ),
            (Outdate::NotMember, _) => {
                let unmet = self.unmet_members();
                let text = match node.is_some() || unmet.is_empty() {
                    true => format!("{name} is not in the sync set: nothing waits for it"),
                    false => format!("{name} was not met since this daemon began: name it by its id{unmet}"),
                };
                (Refusal::Failed, text)
            }
            (Outdate::Unknown | Outdate::Allowed, _) => {
                let unmet = self.unmet_members();
                (Refusal::Failed, format!("no peer is called {name}; there are: {}{unmet}", names()))
            }
        };
        self.answer(id, Err(refusal));
    }

    /// The members that this process has not met, as they can be named.
    fn unmet_members(&self) -> String {
        let set = &self.meta.sb.sync_set;
        let unmet: Vec<_> =
            set.iter().filter(|n| self.links.view(**n).is_none()).map(|n| format!("{n:?}")).collect();
        if unmet.is_empty() { String::new() } else { format!("; members not met yet: {}", unmet.join(", ")) }
    }

    /// It was heard a moment ago.
    fn is_heard(&self, peer: &PeerView) -> bool {
        peer.heard.is_some_and(|at| self.now.mono.saturating_sub(at) <= 2 * self.cfg.timing.heartbeat)
    }

    fn begin_leaving(&mut self, id: AdminId, node: NodeId, name: &str) {
        if let Some(leaving) = &mut self.standings.leaving {
            return leaving.asked.push(id);
        }
        // One that is stopped says nothing more over it.
        while let Some(link) = self.links.link_to(node) {
            self.drop_link(link, "it is lost as a member of the sync set");
        }
        // Whoever was about to enter begins again: its record may come before the one that is written now.
        self.links.entering = None;
        let members: Vec<_> = self.meta.sb.sync_set.iter().copied().filter(|n| *n != node).collect();
        let Some(change) = self.propose_sync_set(node, &members) else { return };
        self.standings.leaving = Some(Leaving { change, ticket: None, asked: vec![id] });
        self.log(Level::Warn, format!("{name} leaves the sync set: it is lost"));
    }

    /// Its record has this LSN.
    pub(super) fn leaving_at(&mut self, job: u64, lsn: Lsn) {
        if let Some(leaving) = &mut self.standings.leaving {
            leaving.change.appended(job, lsn);
        }
    }

    /// A member's way out, and the record that says it.
    pub(super) fn leaving(&self) -> Option<&Change> {
        self.standings.leaving.as_ref().map(|l| &l.change)
    }

    /// A member is on its way out: nobody enters meanwhile.
    pub(super) fn is_outdating(&self) -> bool {
        self.standings.leaving.is_some()
    }

    /// Moves it on; whether anything moved.
    pub(super) fn pump_outdate(&mut self) -> bool {
        let Some(Leaving { change, ticket, .. }) = &self.standings.leaving else { return false };
        let (node, lsn) = (change.node, change.lsn);
        match *ticket {
            None if lsn.is_some_and(|lsn| self.journal.durable() >= lsn) => {
                let sb = &mut self.meta.sb;
                sb.sync_set.retain(|n| *n != node);
                role::note_outdated(&mut sb.outdated, node);
                let ticket = self.meta.save(true);
                if let Some(leaving) = &mut self.standings.leaving {
                    leaving.ticket = Some(ticket);
                }
                true
            }
            Some(ticket) if self.meta.is_saved(ticket) => {
                let asked = self.standings.leaving.take().map_or(Vec::new(), |l| l.asked);
                let (peer, at) = (self.name_of(node), lsn.unwrap_or_default());
                self.tell(Happening::Outdated { peer: peer.clone() });
                let text = format!(
                    "{peer} is outdated from LSN {at} on: FLUSH does not wait for it, until it has caught up and is a \
                     member again"
                );
                self.log(Level::Warn, text.clone());
                asked.into_iter().for_each(|id| self.answer(id, Ok(text.clone())));
                if self.drop_former() {
                    self.update_keep();
                }
                true
            }
            _ => false,
        }
    }

    /// Everything up to here is durable on every member, with those whose leaving is not durable yet.
    pub(super) fn members_durable(&self) -> Lsn {
        let leaving = self.standings.leaving.as_ref().map(|l| self.links.sync_durable(&[l.change.node]));
        self.links.sync_durable(&self.meta.sb.sync_set).min(leaving.unwrap_or(Lsn(u64::MAX)))
    }

    /// Nothing comes of it: this node is no primary any more, or has failed. Those who wait for an answer.
    pub(super) fn end_outdate(&mut self) -> Vec<AdminId> {
        self.standings.leaving.take().map_or(Vec::new(), |l| l.asked)
    }

    /// What this node, as the primary, counts the shadow at the other end of a link for.
    pub(super) fn standing_of(&self, link: LinkId) -> Standing {
        let Part::Primary(p) = &self.part else { return Standing::None };
        let serving = p.is_serving() && p.raising.is_none();
        let node = self.links.by_id.get(&link).and_then(|l| l.peer());
        let Some(node) = node.filter(|_| serving && !self.is_retiring() && self.fault.is_none()) else {
            return Standing::None;
        };
        let sb = &self.meta.sb;
        let leaves = self.standings.leaving.as_ref().is_some_and(|l| l.change.node == node);
        if leaves || sb.outdated.contains(&node) {
            return Standing::Outdated;
        }
        // All that was in the journal when this run began may have been acknowledged by an earlier one, without it; and
        // by this one what was committed before it entered.
        let opening = sb.openings.iter().rfind(|o| o.generation == sb.generation).map(|o| o.at.lsn);
        let acknowledged = opening.map(|lsn| lsn.max(p.announced));
        let fed = self.links.sending_to(node) == Some(link);
        let whole = self
            .links
            .view(node)
            .is_some_and(|v| !v.resyncing && acknowledged.is_some_and(|lsn| v.durable >= lsn));
        match sb.sync_set.contains(&node) && fed && whole {
            true => Standing::Member,
            false => Standing::None,
        }
    }

    /// The same; the peer is being told.
    pub(super) fn counted(&mut self, link: LinkId) -> Standing {
        let standing = self.standing_of(link);
        if let Some(l) = self.links.by_id.get_mut(&link) {
            l.counted = standing;
        }
        standing
    }

    /// The peer counts for something else here than it was told. Without that word a member may not be promoted, so it
    /// does not wait for the next heartbeat.
    pub(super) fn owes_word(&self, link: LinkId) -> bool {
        let fed = |l: &&Link| matches!(l.state, LinkState::Sending(_));
        let Some(told) = self.links.by_id.get(&link).filter(fed).map(|l| l.counted) else { return false };
        let standing = self.standing_of(link);
        standing != Standing::None && standing != told
    }

    /// A shadow was welcomed: one that was lost as a member of the sync set learns it before anything else.
    pub(super) fn tell_outdated_at(&mut self, link: LinkId) {
        let standing = self.counted(link);
        if standing == Standing::Outdated {
            let (wall, feeds) = (self.now.wall, Vec::new());
            let (echo, tail, time, bytes, silent, live) = (0, None, 0, 0, 0, true);
            self.send(
                link,
                Message::Heartbeat { wall, echo, tail, time, bytes, silent, live, feeds, standing },
            );
        }
    }

    /// The primary that is followed counts this shadow for that; `fed`: it is fed over that very link.
    pub(super) fn told_standing(&mut self, standing: Standing, fed: bool) {
        let (own, marked) = (self.cfg.node, self.is_outdated());
        match standing {
            Standing::Member if fed => {
                self.standings.confirmed = Some(self.meta.sb.term);
                if marked {
                    self.meta.sb.outdated.retain(|n| *n != own);
                    self.meta.save(false);
                    self.tell(Happening::TakenIn { peer: self.cfg.name.clone() });
                }
            }
            Standing::Outdated => {
                self.standings.confirmed = None;
                if !marked {
                    role::note_outdated(&mut self.meta.sb.outdated, own);
                    self.meta.save(true);
                    self.tell_outdated();
                }
            }
            Standing::Member | Standing::None => {}
        }
    }

    /// This shadow has learned that it is outdated.
    pub(super) fn tell_outdated(&mut self) {
        self.tell(Happening::Outdated { peer: self.cfg.name.clone() });
        self.log(
            Level::Warn,
            "this node was lost as a member of the sync set: the primary went on without it",
        );
    }

    /// It knows that it lacks what was acknowledged.
    pub(super) fn is_outdated(&self) -> bool {
        self.meta.sb.role == Role::Shadow && self.meta.sb.outdated.contains(&self.cfg.node)
    }

    /// It holds everything that was acknowledged: on the word of the newest primary that it knows, given to this
    /// very process.
    pub(super) fn holds_everything(&self) -> bool {
        let sb = &self.meta.sb;
        let member = sb.sync_set.contains(&self.cfg.node) && !self.is_outdated();
        let whole = sb.consistent && sb.resync.is_none() && !self.is_remaking() && !self.is_rewinding();
        sb.role == Role::Shadow && member && whole && self.standings.confirmed == Some(sb.term)
    }

    /// What it held is no image of the history any more.
    pub(super) fn unconfirm(&mut self) {
        self.standings.confirmed = None;
    }
}

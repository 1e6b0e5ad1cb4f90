//! The end of a primary, or of a shadow's own way: it gives its place up, and follows whoever was promoted.
//!
//! Owns: the way from primary to shadow. Invariants: from the moment at which a node learns of a higher term it
//! acknowledges nothing (I8); whatever it had accepted is in its journal before it becomes a shadow, so nothing is
//! given up that is not saved (`salvage`); its own records are given up by an administrator's word alone.

use super::event::{AdminId, Level, Refusal};
use super::history::Happening;
use super::links::PeerView;
use super::meta::Ticket;
use super::run::{Part, Run};
use crate::format::message::Role;
use crate::format::superblock::Retired;
use crate::link::handshake::{TermOrder, order};
use crate::role::{self, Rejoin};
use crate::units::{BootId, Term};

/// On the way.
pub struct Retiring {
    /// What it holds is given up, too.
    rewinds: bool,
    ticket: Option<Ticket>,
    /// Told when this node is a shadow, durably.
    asked: Vec<(AdminId, String)>,
}

impl Run {
    /// This node is giving its place up.
    pub(super) fn is_retiring(&self) -> bool {
        self.retiring.is_some()
    }

    /// It is a shadow as soon as its superblock is saved: nothing that needs the write cache may begin.
    pub(super) fn is_leaving(&self) -> bool {
        self.retiring.as_ref().is_some_and(|r| r.ticket.is_some())
    }

    /// A node that recovers as a primary whose term has ended.
    pub(super) fn note_superseded(&mut self) {
        let sb = &self.meta.sb;
        if sb.role == Role::Primary && sb.term.node != sb.node {
            let text = format!("{}: it serves nothing", self.promoted_since());
            self.log(Level::Warn, text);
            self.retire(false);
        }
    }

    /// A higher term was seen: nothing is acknowledged under the own one any more.
    pub(super) fn supersede(&mut self, term: Term) {
        self.meta.sb.term = term;
        let text = format!(
            "{}: it stops acknowledging. Run `volrep rejoin {}` here to have it follow",
            self.promoted_since(),
            self.cfg.group_name
        );
        self.log(Level::Error, text);
        self.meta.sb.handed = None;
        self.meta.save(true);
        let by = self.name_of(term.node);
        self.tell(Happening::Superseded { by });
        self.retire(false);
    }

    /// Those who wait for the end of a retirement that will not come.
    pub(super) fn take_rejoins(&mut self) -> Vec<AdminId> {
        let asked = self.retiring.as_mut().map_or(Vec::new(), |r| std::mem::take(&mut r.asked));
        asked.into_iter().map(|(id, _)| id).collect()
    }

    fn retire(&mut self, rewinds: bool) {
        if let Some(retiring) = &mut self.retiring {
            retiring.rewinds |= rewinds;
            return;
        }
        self.retiring = Some(Retiring { rewinds, ticket: None, asked: Vec::new() });
        self.refuse_admin(Refusal::Busy, "this node is no longer the primary");
        if let Part::Primary(p) = &mut self.part {
            p.closing = true;
        }
        self.refuse_everything();
        self.close_links("this node is no longer the primary");
        // Nobody is fed by it any more: what it still has to write may have the whole journal.
        self.meta.sb.peers.clear();
        self.links.entering = None;
        self.update_keep();
    }

    /// Moves the way to the shadow on; whether anything moved.
    pub(super) fn pump_retiring(&mut self) -> bool {
        let Some(Retiring { rewinds, ticket, .. }) = &self.retiring else { return false };
        let rewinds = *rewinds;
        if let Some(ticket) = ticket {
            if !self.meta.is_saved(*ticket) {
                return false;
            }
            if let Some(retired) = self.meta.sb.retired.as_mut().filter(|r| r.rewinds != rewinds) {
                // He was told so meanwhile.
                retired.rewinds = rewinds;
                let ticket = self.meta.save(true);
                if let Some(retiring) = &mut self.retiring {
                    retiring.ticket = Some(ticket);
                }
                return true;
            }
            let asked = self.retiring.take().map_or(Vec::new(), |r| r.asked);
            asked.into_iter().for_each(|(id, text)| self.answer(id, Ok(text)));
            self.leave_primary();
            self.tell(Happening::Retired);
            self.log(Level::Warn, "this node is a shadow now; nothing of what it holds was changed");
            return true;
        }
        let Part::Primary(p) = &self.part else { return false };
        let sealed = p.is_serving() && p.is_sealed();
        if !self.journal.is_quiet() {
            let tail = self.journal.tail().point.lsn;
            self.journal.want(tail);
            return false;
        }
        if !sealed || !self.image.is_idle() || !self.checkpoint_idle() {
            return false;
        }
        let tail = self.journal.tail().point.lsn;
        let sb = &mut self.meta.sb;
        sb.retired = Some(Retired { term: sb.generation.term, rewinds });
        sb.role = Role::Shadow;
        (sb.cut, sb.redo) = (None, None);
        sb.limit = tail;
        sb.floor = sb.floor.max(tail);
        (sb.clean, sb.cache_boot) = (false, BootId::default());
        let ticket = self.meta.save(true);
        if let Some(retiring) = &mut self.retiring {
            retiring.ticket = Some(ticket);
        }
        true
    }

    /// An administrator gives up what this node holds and the primary does not. `keep`: he has said that the
    /// other side is to be kept.
    pub(super) fn rejoin(&mut self, id: AdminId, keep: Option<&str>, dry_run: bool) {
        let outcome = self.may_rejoin(keep);
        if outcome.is_ok() && !dry_run {
            self.begin_rejoin(keep);
            if let (Some(retiring), Ok(text)) = (&mut self.retiring, &outcome) {
                return retiring.asked.push((id, text.clone()));
            }
        }
        self.answer(id, outcome);
    }

    /// What a rejoin would do; or why it can't be done.
    fn may_rejoin(&self, keep: Option<&str>) -> Result<String, (Refusal, String)> {
        if self.admin.is_promoting() {
            return Err((Refusal::Busy, "this node is being promoted".into()));
        }
        let retired = self.meta.sb.retired.is_some() || self.is_retiring();
        let shadow = self.meta.sb.role == Role::Shadow;
        let apart = |v: &&PeerView| if shadow { v.state == "Diverged" && !v.follows } else { v.is_rival() };
        let others: Vec<&str> = self.links.peers.iter().filter(apart).map(|v| v.name.as_str()).collect();
        if let Some(keep) = keep {
            self.check_kept(keep, &others)?;
        }
        if retired && !shadow && keep.is_none() && !others.is_empty() {
            return Err((Refusal::Diverged, self.several_promoted(&others)));
        }
        let kept = keep.is_some_and(|k| shadow || others.is_empty() || others.contains(&k));
        let busy = |text: &str| Err((Refusal::Busy, text.to_owned()));
        let followed = || self.links.peers.iter().any(|v| v.node.is_some_and(|n| self.links.is_live(n)));
        match role::rejoin(role::RejoinFacts {
            role: self.meta.sb.role,
            retired,
            diverged: !others.is_empty(),
            kept,
        }) {
            Rejoin::Allowed => self.rejoin_plan(keep.or(self.followed(shadow).map(|v| v.name.as_str()))),
            Rejoin::Follows => busy("this node is a shadow, and holds nothing that its primary does not"),
            Rejoin::OnlyPrimary if followed() => {
                busy("this node is the primary, and is followed: there is nothing to give up")
            }
            Rejoin::OnlyPrimary => Err((
                Refusal::Unreachable,
                "this node is a primary and has heard of no other: bring that node or the link to it back, then \
                 run it again"
                    .into(),
            )),
            Rejoin::NotKept => Err((Refusal::Diverged, self.both_promoted(&others))),
        }
    }

    /// Refuses to keep this very node, or one that nobody knows.
    fn check_kept(&self, keep: &str, others: &[&str]) -> Result<(), (Refusal, String)> {
        if keep == self.cfg.name {
            let there = if others.is_empty() { "the other node".to_owned() } else { others.join(", ") };
            let text = format!(
                "{keep} is this node, and it is to be kept: nothing is given up here. Run this on {there}: \
                 volrep resolve {} --keep {keep}",
                self.cfg.group_name
            );
            return Err((Refusal::Busy, text));
        }
        if self.links.peers.iter().any(|v| v.name == keep) {
            return Ok(());
        }
        Err((Refusal::Failed, format!("no node is known here by the name {keep}")))
    }

    fn several_promoted(&self, others: &[&str]) -> String {
        format!(
            "several nodes were promoted since this one was the primary, {} among them: resolve that first, on those \
             that are not kept; or say here whom this node is to follow: volrep resolve {} --keep PEER",
            others.join(", "),
            self.cfg.group_name
        )
    }

    fn both_promoted(&self, others: &[&str]) -> String {
        let (first, group) = (others.first().copied().unwrap_or("PEER"), &self.cfg.group_name);
        format!(
            "this node is a primary, and so is {0}: both were promoted and may hold writes that the other lacks. \
             Choose which side is kept. To keep {first}, here: volrep resolve {group} --keep {first}. To keep this \
             node, on {0}: volrep resolve {group} --keep {1}",
            others.join(", "),
            self.cfg.name
        )
    }

    fn rejoin_plan(&self, keep: Option<&str>) -> Result<String, (Refusal, String)> {
        let promoted = self.links.view(self.meta.sb.term.node).map(|v| v.name.as_str());
        let kept = keep.or(promoted);
        let dials = |name: &str| self.cfg.peers.iter().any(|p| p.dial && p.name == name);
        if !kept.map_or(self.cfg.peers.iter().any(|p| p.dial), dials) {
            let text = format!(
                "no address of {} is known here: add it as a [[peer]] (name, address) to the configuration of this \
                 node, restart the daemon, then run it again",
                kept.unwrap_or("another node")
            );
            return Err((Refusal::Unreachable, text));
        }
        let kept = kept.unwrap_or("the new primary");
        let tail = self.journal.tail().point.lsn;
        let fork = self.links.peers.iter().filter(|v| v.name == kept).find_map(|v| v.fork);
        let given_up = match fork {
            Some(fork) if fork >= tail => "nothing that it holds is given up".to_owned(),
            Some(fork) if fork.next() == tail => {
                format!("its record {tail} is given up, after it was saved in a salvage file")
            }
            Some(fork) => format!(
                "its records {} to {tail} are given up, after they were saved in a salvage file",
                fork.next()
            ),
            None => format!(
                "its records after the point at which the histories part, up to {tail}, are given up, after they \
                 were saved in a salvage file"
            ),
        };
        Ok(format!(
            "this node becomes a shadow of {kept}: {given_up}. Then only what was written on either side since is \
             resynced; the image here stays as it is until the new one is whole"
        ))
    }

    /// Whose history a shadow's differs from: the only one that it can mean without an administrator's word.
    fn followed(&self, shadow: bool) -> Option<&PeerView> {
        let mut diverged = self.links.above().filter(|v| shadow && v.state == "Diverged");
        diverged.next().filter(|_| diverged.next().is_none())
    }

    fn begin_rejoin(&mut self, keep: Option<&str>) {
        self.tell(Happening::Rejoining);
        let shadow = self.meta.sb.role == Role::Shadow;
        let named = self.links.peers.iter().find(|v| Some(v.name.as_str()) == keep);
        let chosen = named.or_else(|| self.followed(shadow)).and_then(|v| v.term);
        if let Some(term) = chosen.filter(|t| order(self.meta.sb.term, *t) == TermOrder::Conflicting)
            && self.meta.sb.term.node != self.meta.sb.node
        {
            // Of two promotions under one counter this is the one that it follows.
            self.meta.sb.term = term;
            self.meta.save(true);
        }
        self.links.dial_now();
        self.links.peers.iter_mut().filter(|v| v.state == "Diverged").for_each(|v| v.state = "Disconnected");
        if matches!(self.part, Part::Primary(_)) {
            return self.retire(true);
        }
        let term = self.meta.sb.retired.map_or(Term::default(), |r| r.term);
        self.meta.sb.retired = Some(Retired { term, rewinds: true });
        self.meta.save(true);
    }

    /// It follows a primary whose history is the own one: there is nothing to give up any more.
    pub(super) fn rejoined(&mut self) {
        self.links.peers.iter_mut().for_each(|v| v.fork = None);
        let sb = &mut self.meta.sb;
        if sb.retired.take().is_some() | sb.handed.take().is_some() {
            self.meta.save(true);
        }
    }
}

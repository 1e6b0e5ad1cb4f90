//! The connections: who they are with, what may go over them, when they are given up.
//!
//! Owns: the state of each link and what is known of each peer. Invariants: nothing but the handshake
//! is believed before the peer has proved the group's key; one link a peer; a peer's durable position
//! counts only for records of the history that is current here.

use super::calling::Call;
use super::cascade::Chain;
use super::config::NodeConfig;
use super::event::{Action, Level, LinkId};
use super::feed::Reader;
use super::followers::Change;
use super::heartbeat::{Between, Heard};
use super::history::Happening;
use super::meta::Ticket;
use super::run::{Part, Run};
use crate::format::message::{Identity, Message, Role, Standing, proof, refuse};
use crate::format::superblock::{Peer, Superblock};
use crate::journal::Tail;
use crate::link::lag::{ClockEstimate, Line, Timeline, Way};
use crate::link::sender::Sender;
use crate::units::{HistoryPoint, Lsn, NodeId, Term};
use std::collections::BTreeMap;

/// Where a link stands.
#[derive(Debug)]
pub enum LinkState {
    /// Accepted: the challenge is out.
    Challenged,
    /// Accepted: the chain hash at this LSN is being looked up; to be proved over this nonce. `forked`: the
    /// histories part there.
    Locating { nonce: [u8; 32], at: Lsn, forked: bool },
    /// Accepted: the shadow compares at this LSN.
    Welcomed { at: Lsn },
    /// Accepted: the shadow can't go on by the journal, and was told so.
    Offered,
    /// Accepted: it takes up the history here; what may differ since this point is being gathered.
    Offering { since: Option<HistoryPoint>, at: Option<Tail> },
    /// Accepted: the shadow is fed.
    Sending(Sender),
    /// Dialled: the challenge is awaited.
    Dialled,
    /// Dialled: the verdict is awaited.
    Greeted,
    /// Dialled: the journal is being cut back.
    Cutting,
    /// Dialled: the journal is being begun anew where the primary's ends.
    Rebasing,
    /// Dialled: histories agree; the superblock and the journal are being made durable.
    Settling(Ticket),
    /// Dialled: records come.
    Receiving,
    /// Given up.
    Closing,
}

/// A connection.
pub struct Link {
    pub(super) state: LinkState,
    pub(super) reader: Reader,
    /// For records that a shadow asks for once more.
    pub(super) copies: Reader,
    pub(super) copy: Option<Lsn>,
    /// The peer's place in the configuration, if it was dialled from here.
    pub(super) dialed: Option<usize>,
    nonce: [u8; 32],
    peer: Option<NodeId>,
    /// Where the journal here ended, and what of it was applied, as told to whom was dialled.
    pub(super) told: (HistoryPoint, Lsn),
    begun: u64,
    heard: u64,
    beat: u64,
    pub(super) line: Line,
    /// What the peer was last told that it counts for here.
    pub(super) counted: Standing,
    /// The records after this one are kept for it, until it begins.
    pub(super) held: Option<Lsn>,
    /// Where the peer's history leaves the one here: offered to it as a common point.
    pub(super) fork: Option<HistoryPoint>,
    /// Up to here at most the one that dialled holds the history here, as it said.
    pub(super) common: Lsn,
}

/// What is known of a peer, connected or not.
pub struct PeerView {
    pub(super) name: String,
    pub(super) node: Option<NodeId>,
    pub(super) state: &'static str,
    pub(super) reason: Option<String>,
    pub(super) received: Lsn,
    pub(super) durable: Lsn,
    pub(super) applied: Lsn,
    pub(super) heard: Option<u64>,
    pub(super) clock: ClockEstimate,
    pub(super) way: Way,
    pub(super) sent_bytes: u64,
    /// What it holds is not an image yet: it is durable for nobody.
    pub(super) resyncing: bool,
    /// As it says, its image was all zeroes at LSN 0.
    pub(super) blank: bool,
    /// The highest term that it knew when it was last met.
    pub(super) term: Option<Term>,
    /// After this LSN its history and the one here hold different records, as far as it has told.
    pub(super) fork: Option<Lsn>,
    /// It was a primary too when it was last met, under a term that neither side can call ended.
    rival: bool,
    /// As it says, it holds its image back by so many ns.
    pub(super) apply_delay: u64,
    /// It asked this shadow to feed it: what became of it says nothing of the state here.
    pub(super) follows: bool,
    /// Who gets his records through it, as it last said.
    pub(super) feeds: Vec<NodeId>,
    /// Whose clock is measured.
    pub(super) clock_of: Option<NodeId>,
}

impl PeerView {
    fn new(name: &str, known: Option<&Peer>) -> PeerView {
        PeerView {
            name: name.to_owned(),
            node: known.map(|p| p.node),
            state: if known.is_some_and(|p| p.behind) { "Resync" } else { "Disconnected" },
            reason: None,
            received: Lsn(0),
            durable: known.map_or(Lsn(0), |p| p.durable),
            applied: Lsn(0),
            heard: None,
            clock: ClockEstimate::default(),
            way: Way::default(),
            sent_bytes: 0,
            resyncing: known.is_some_and(|p| p.resyncing),
            blank: false,
            term: None,
            fork: None,
            rival: false,
            apply_delay: 0,
            follows: false,
            feeds: Vec::new(),
            clock_of: None,
        }
    }

    /// It has diverged, and only an administrator can say which side is kept.
    pub(super) fn is_rival(&self) -> bool {
        self.rival && self.state == "Diverged"
    }
}

impl Link {
    /// The node at the other end, once it has proved to be of the group.
    pub(super) fn peer(&self) -> Option<NodeId> {
        self.peer
    }
}

pub(super) struct Dial {
    pub(super) at: u64,
    busy: bool,
}

/// See the module's documentation.
pub struct Links {
    pub(super) by_id: BTreeMap<LinkId, Link>,
    pub(super) peers: Vec<PeerView>,
    pub(super) dials: Vec<Dial>,
    pub(super) call: Call,
    primary: Option<NodeId>,
    /// Nothing until it has spoken over the newest link.
    pub(super) heard_of_primary: Option<Heard>,
    /// When an exchange last told a primary's clock, on the own monotonic one; or this node was the primary.
    pub(super) timed: u64,
    /// How it is known through those between.
    pub(super) between: Between,
    /// Through whom they come.
    pub(super) chain: Chain,
    /// The records sealed here, or received, to measure shadows against.
    pub(super) timeline: Timeline,
    /// Journal bytes on the timeline from before the start.
    pub(super) bytes_before: u64,
    /// Bytes of records that every follower gets.
    pub(super) record_bytes: u64,
    /// The checkpoint that is durable.
    pub(super) checkpoint: Lsn,
    /// A peer is about to enter the sync set.
    pub(super) entering: Option<Change>,
}

/// After a verdict that dialling again won't change soon.
pub(super) const PATIENCE: u64 = 10;

impl Links {
    /// No connection; what the superblock knows of the peers.
    pub fn new(cfg: &NodeConfig, sb: &Superblock) -> Links {
        let view = |name: &str, known: Option<&Peer>| PeerView::new(name, known);
        let by_name = |name: &String| sb.peers.iter().find(|p| p.name == *name);
        let mut peers: Vec<_> = cfg.peers.iter().map(|p| view(&p.name, by_name(&p.name))).collect();
        for p in &sb.peers {
            if !peers.iter().any(|v| v.name == p.name) {
                peers.push(view(&p.name, Some(p)));
            }
        }
        // A shadow knows positions of those alone that it feeds.
        let fed = |v: &PeerView| v.node.is_some() && sb.role == Role::Shadow;
        peers.iter_mut().for_each(|v| v.follows = fed(v));
        Links {
            by_id: BTreeMap::new(),
            peers,
            dials: cfg.peers.iter().map(|_| Dial { at: 0, busy: false }).collect(),
            call: Call::default(),
            primary: None,
            heard_of_primary: None,
            timed: 0,
            between: Between::default(),
            chain: Chain::default(),
            timeline: Timeline::default(),
            bytes_before: 0,
            record_bytes: 0,
            checkpoint: sb.checkpoint.lsn,
            entering: None,
        }
    }

    /// The link over which records come.
    pub fn receiving(&self) -> Option<LinkId> {
        self.by_id.iter().find(|(_, l)| matches!(l.state, LinkState::Receiving)).map(|(id, _)| *id)
    }

    /// The estimate of the primary's clock, on a shadow.
    pub fn primary_clock(&self) -> Option<&ClockEstimate> {
        let node = self.primary?;
        self.peers.iter().find(|p| p.node == Some(node)).map(|p| &p.clock)
    }

    /// The primary that this shadow follows or has followed since the start.
    pub fn primary(&self) -> Option<NodeId> {
        self.primary
    }

    /// The least that every member of the sync set has durable.
    pub fn sync_durable(&self, members: &[NodeId]) -> Lsn {
        let image = |m: &NodeId| self.view(*m).filter(|p| !p.resyncing);
        let durable = |m: &NodeId| image(m).map_or(Lsn(0), |p| p.durable);
        members.iter().map(durable).min().unwrap_or(Lsn(u64::MAX))
    }

    /// What is known of a peer.
    pub fn view(&self, node: NodeId) -> Option<&PeerView> {
        self.peers.iter().find(|p| p.node == Some(node))
    }

    pub(super) fn view_mut(&mut self, node: NodeId) -> Option<&mut PeerView> {
        self.peers.iter_mut().find(|p| p.node == Some(node))
    }

    /// The peer of a link.
    pub(super) fn peer_of(&mut self, link: LinkId) -> Option<&mut PeerView> {
        let node = self.by_id.get(&link)?.peer?;
        self.view_mut(node)
    }

    /// A link leads to this node, which calls itself `name`.
    pub fn meet(&mut self, link: LinkId, node: NodeId, name: &str, now: u64) {
        let Some(l) = self.by_id.get_mut(&link) else { return };
        l.peer = Some(node);
        let greeted = now.saturating_sub(l.begun);
        let known = self.peers.iter().position(|p| p.node == Some(node));
        let named = || self.peers.iter().position(|p| p.name == name && p.node.is_none());
        let at = known.or_else(named).unwrap_or_else(|| {
            self.peers.push(PeerView::new(name, None));
            self.peers.len() - 1
        });
        let view = &mut self.peers[at];
        view.node = Some(node);
        view.heard = Some(now);
        view.way.greeted(greeted, now); // no queue stands before it
    }

    /// Those whose word on this shadow counts: not those that follow it.
    pub(super) fn above(&self) -> impl Iterator<Item = &PeerView> {
        self.peers.iter().filter(|p| !p.follows)
    }

    /// This node follows that primary, or shadow: what another one made of it means nothing any more.
    pub fn follow(&mut self, source: &Identity) {
        let node = source.node;
        self.chain.follow(source);
        for view in self.peers.iter_mut().filter(|v| v.node != Some(node) && !v.follows) {
            if matches!(view.state, "Resync" | "Diverged") {
                (view.state, view.reason) = ("Disconnected", None);
            }
        }
        if self.primary != Some(node) {
            self.heard_of_primary = None;
        }
        self.primary = Some(node);
    }

    /// A connection with that node that is not given up.
    pub fn link_to(&self, node: NodeId) -> Option<LinkId> {
        let with = |l: &Link| l.peer == Some(node) && !matches!(l.state, LinkState::Closing);
        self.by_id.iter().find(|(_, l)| with(l)).map(|(id, _)| *id)
    }

    /// Whether a peer is connected and past its handshake.
    pub fn is_live(&self, node: NodeId) -> bool {
        let live = |l: &Link| matches!(l.state, LinkState::Sending(_) | LinkState::Receiving);
        self.by_id.values().any(|l| l.peer == Some(node) && live(l))
    }

    /// What was known of those that followed this node means nothing any more.
    pub fn forget_followers(&mut self) {
        for view in &mut self.peers {
            let (node, term, fork) = (view.node, view.term, view.fork);
            *view = PeerView { node, term, fork, ..PeerView::new(&view.name, None) };
        }
    }

    /// The link on which this peer is fed.
    pub fn sending_to(&self, node: NodeId) -> Option<LinkId> {
        let fed = |l: &Link| l.peer == Some(node) && matches!(l.state, LinkState::Sending(_));
        self.by_id.iter().find(|(_, l)| fed(l)).map(|(id, _)| *id)
    }

    /// Nobody is waited for any longer before he is dialled.
    pub fn dial_now(&mut self) {
        self.dials.iter_mut().for_each(|d| d.at = 0);
    }

    /// Every reader of the journal that a link has.
    pub fn readers(&mut self) -> impl Iterator<Item = &mut Reader> {
        self.by_id.values_mut().flat_map(|l| [&mut l.reader, &mut l.copies])
    }
}

impl Run {
    /// A connection stands.
    pub(super) fn link_up(&mut self, link: LinkId, dialed: Option<usize>, nonce: [u8; 32]) {
        if let Some(d) = dialed.and_then(|i| self.links.dials.get_mut(i)) {
            d.busy = false;
            d.at = self.now.mono + self.cfg.timing.redial;
        }
        let state = if dialed.is_some() { LinkState::Dialled } else { LinkState::Challenged };
        let (begun, heard, beat) = (self.now.mono, self.now.mono, self.now.mono);
        let fresh = Link {
            state,
            reader: Reader::default(),
            copies: Reader::default(),
            copy: None,
            dialed,
            nonce,
            peer: None,
            told: Default::default(),
            begun,
            heard,
            beat,
            line: Line::new(begun),
            counted: Standing::None,
            held: None,
            fork: None,
            common: Lsn(0),
        };
        self.links.by_id.insert(link, fresh);
        if self.fault.is_some() {
            return self.drop_link(link, "this node has failed");
        }
        if self.is_rewinding() {
            return self.drop_link(link, "this node is being promoted");
        }
        if matches!(&self.part, Part::Shadow(s) if s.closing) {
            // The dial was under way when the node was told to shut down.
            return self.drop_link(link, "this node is shutting down");
        }
        if dialed.is_none() {
            self.send(link, Message::Challenge { nonce });
        }
    }

    /// A connection is gone.
    pub(super) fn link_down(&mut self, link: LinkId) {
        // The end of a link that was given up says nothing of the one that took its place.
        let standing = self.links.by_id.get(&link).filter(|l| !matches!(l.state, LinkState::Closing));
        if let Some(followed) = standing.map(|l| l.state.is_followed())
            && let Some(peer) = self.links.peer_of(link)
            && (followed || matches!(peer.state, "UpToDate" | "CatchingUp" | "Resyncing"))
        {
            peer.state = "Disconnected";
        }
        self.compare.forget(link);
        let gone = self.links.by_id.remove(&link);
        if let Some(peer) = gone.as_ref().and_then(|l| l.dialed) {
            self.links.call_ends(peer);
        }
        // A link that ends without an answer says nothing: its peer may be on the way to a promotion.
        let silent = |l: &&Link| matches!(l.state, LinkState::Dialled | LinkState::Greeted);
        if let Some(peer) = gone.as_ref().filter(|l| !silent(l)).and_then(|l| l.dialed) {
            self.heard_out(peer);
        }
        if gone.is_some_and(|l| matches!(l.state, LinkState::Receiving)) {
            self.forget_held();
        }
    }

    /// Dialling failed.
    pub(super) fn dial_failed(&mut self, peer: usize) {
        let redial = self.cfg.timing.redial;
        self.heard_out(peer);
        self.links.call_ends(peer);
        if let Some(d) = self.links.dials.get_mut(peer) {
            d.busy = false;
            d.at = self.now.mono + redial;
        }
    }

    pub(super) fn send(&mut self, link: LinkId, message: Message) {
        self.out.push(Action::Send { link, message });
    }

    /// Gives a link up, and says why.
    pub(super) fn drop_link(&mut self, link: LinkId, why: &str) {
        let Some(l) = self.links.by_id.get_mut(&link) else { return };
        if matches!(l.state, LinkState::Closing) {
            return;
        }
        let was_fed = matches!(l.state, LinkState::Receiving);
        let silent = matches!(l.state, LinkState::Dialled | LinkState::Greeted);
        let dialed = l.dialed.filter(|_| !silent);
        l.state = LinkState::Closing;
        l.held = None;
        self.compare.forget(link);
        if was_fed {
            self.forget_held();
        }
        if let Some(peer) = dialed {
            self.heard_out(peer);
        }
        self.out.push(Action::Close { link });
        let name = self.links.peer_of(link).map(|p| {
            if matches!(p.state, "UpToDate" | "CatchingUp" | "Resyncing") {
                p.state = "Disconnected";
            }
            p.name.clone()
        });
        self.log(Level::Info, format!("link to {} closed: {why}", name.as_deref().unwrap_or("a peer")));
    }

    /// Gives every link up.
    pub(super) fn close_links(&mut self, why: &str) {
        let ids: Vec<_> = self.links.by_id.keys().copied().collect();
        for id in ids {
            self.drop_link(id, why);
        }
    }

    /// The state of a peer changes for a reason that a person should know.
    pub(super) fn set_peer(&mut self, link: LinkId, state: &'static str, reason: Option<String>) {
        if let Some(p) = self.links.peer_of(link) {
            let news = p.state != state;
            p.state = state;
            p.reason = reason.clone();
            let name = p.name.clone();
            if let (true, Some(reason)) = (news, reason) {
                if state == "Diverged" {
                    let (peer, reason) = (name.clone(), reason.clone());
                    self.tell(Happening::Diverged { peer, reason });
                }
                self.log(Level::Warn, format!("{name}: {state}: {reason}"));
            }
        }
    }

    /// The histories have parted after `fork`; `rival`: the peer is a primary, too.
    pub(super) fn set_diverged(&mut self, link: LinkId, fork: Option<Lsn>, rival: bool, why: &str) {
        let at = fork.map_or_else(String::new, |lsn| format!(" after LSN {lsn}"));
        if let Some(p) = self.links.peer_of(link) {
            (p.fork, p.rival) = (fork, rival);
        }
        self.set_peer(link, "Diverged", Some(format!("{why}; the histories part{at}")));
    }

    /// Dialling this link's peer again soon won't help.
    pub(super) fn be_patient(&mut self, link: LinkId) {
        let wait = self.cfg.timing.redial * PATIENCE;
        if let Some(i) = self.links.by_id.get(&link).and_then(|l| l.dialed) {
            self.links.dials[i].at = self.now.mono + wait;
        }
    }

    /// A message arrived.
    pub(super) fn message(&mut self, link: LinkId, message: Message) {
        let now = self.now.mono;
        let Some(l) = self.links.by_id.get_mut(&link) else { return };
        l.heard = now;
        if let Some(p) = self.links.peer_of(link) {
            p.heard = Some(now);
        }
        let Some(l) = self.links.by_id.get_mut(&link) else { return };
        match (&mut l.state, message) {
            (LinkState::Closing, _) => {}
            (LinkState::Challenged, Message::Hello { identity, nonce, proof: given }) => {
                let expected = proof(&self.cfg.key, &l.nonce, &identity, None);
                if blake3::Hash::from(expected) == blake3::Hash::from(given) {
                    self.greeted(link, &identity, nonce);
                } else {
                    self.send(
                        link,
                        refuse("the proof of the group's key is wrong: join again with a new token"),
                    );
                    self.drop_link(link, "it does not know the group's key");
                }
            }
            (LinkState::Dialled, Message::Challenge { nonce }) => {
                let cascades = self.tells_way(link);
                let identity = Box::new(Identity { cascades, ..self.identity() });
                let proof = proof(&self.cfg.key, &nonce, &identity, None);
                let Some(l) = self.links.by_id.get_mut(&link) else { return };
                l.state = LinkState::Greeted;
                l.told = (identity.tail, identity.applied);
                let nonce = l.nonce;
                self.send(link, Message::Hello { identity, nonce, proof });
            }
            (LinkState::Greeted, Message::Welcome { identity, verdict, proof: given }) => {
                let expected = proof(&self.cfg.key, &l.nonce, &identity, Some(&verdict));
                if blake3::Hash::from(expected) == blake3::Hash::from(given) {
                    self.heard_out_over(link);
                    self.welcomed(link, &identity, verdict);
                } else {
                    self.drop_link(link, "it does not know the group's key");
                }
            }
            (_, Message::Refuse { text }) => {
                self.set_peer(link, "Disconnected", Some(text.clone()));
                self.be_patient(link);
                self.heard_out_over(link);
                self.drop_link(link, &format!("refused: {text}"));
            }
            (LinkState::Welcomed { at }, Message::Begin { from }) if from == at.next() => {
                self.begin_sending(link, from);
            }
            (LinkState::Offered, Message::Resync { since }) => {
                l.state = LinkState::Offering { since, at: None };
            }
            (LinkState::Sending(_), Message::Resynced) => self.resynced(link),
            (LinkState::Rebasing, Message::Candidates { extents }) => self.candidates(&extents),
            (LinkState::Rebasing, Message::Rebase { at, since, members }) => {
                self.rebase_offered(link, at, since, members);
            }
            (LinkState::Sending(sender), Message::Positions { received, durable, applied }) => {
                match sender.acknowledged(received, durable, applied) {
                    Ok(()) => self.acknowledged(link, received, durable, applied),
                    Err(e) => self.drop_link(link, &e.to_string()),
                }
            }
            (LinkState::Receiving, Message::Record(record)) => self.received(link, record),
            (LinkState::Receiving, Message::Copy(record)) => self.copy_came(Some(record)),
            (LinkState::Receiving, Message::NoCopy { .. }) => self.copy_came(None),
            (LinkState::Sending(_), Message::AskCopy { lsn }) => l.copy = Some(lsn),
            (LinkState::Receiving, Message::Handover { at }) => self.handed_over(link, at),
            (LinkState::Receiving, Message::Durable { lsn }) => self.announced(lsn),
            (LinkState::Receiving, Message::Compare(word)) => self.heard_as_shadow(link, *word),
            (LinkState::Sending(_), Message::Compare(word)) => self.heard_as_primary(link, *word),
            (_, beat @ Message::Heartbeat { .. }) if l.peer.is_some() => self.heartbeat(link, beat),
            (state, message) => {
                let why = format!("unexpected message while {}", name_of(state));
                debug_assert!(!matches!(message, Message::Refuse { .. }));
                self.drop_link(link, &why);
            }
        }
    }

    /// A shadow's positions, believed.
    fn acknowledged(&mut self, link: LinkId, received: Lsn, durable: Lsn, applied: Lsn) {
        let Some(p) = self.links.peer_of(link) else { return };
        (p.received, p.durable, p.applied) = (received, durable, applied);
        let node = p.node;
        let checkpoint = self.links.checkpoint;
        let mut back = false;
        if let Some(known) = self.meta.sb.peers.iter_mut().find(|k| Some(k.node) == node) {
            known.durable = durable;
            // It was given up while the journal was full, and has caught up before it lost anything.
            back = known.behind && durable >= checkpoint;
            known.behind &= !back;
        }
        if back {
            self.meta.save(false);
            self.set_peer(link, "CatchingUp", None);
        }
        self.update_keep();
    }

    /// Everything that links do of themselves; whether anything moved.
    pub(super) fn pump_links(&mut self) -> bool {
        let mut moved = false;
        let ids: Vec<_> = self.links.by_id.keys().copied().collect();
        for id in ids {
            moved |= self.pump_link(id);
        }
        self.dial();
        moved |= self.relieve();
        moved | self.enter_sync_set()
    }

    fn pump_link(&mut self, id: LinkId) -> bool {
        let timing = self.cfg.timing;
        let now = self.now.mono;
        let Some(l) = self.links.by_id.get_mut(&id) else { return false };
        if matches!(l.state, LinkState::Closing) {
            return false;
        }
        // Whoever has not said who he is has no right to keep a place for long.
        let since = if l.peer.is_some() { l.heard } else { l.begun };
        let silent_at = since + timing.silence;
        if now >= silent_at {
            self.drop_link(id, "nothing was heard for too long");
            return true;
        }
        let mut wake = silent_at;
        let mut due = false;
        // Before its verdict the dialler does not know yet with whom it speaks.
        if l.peer.is_some() && !matches!(l.state, LinkState::Locating { .. }) {
            due = now >= l.beat + timing.heartbeat;
            if due {
                l.beat = now;
            }
            wake = wake.min(l.beat + timing.heartbeat);
        }
        let step = match &l.state {
            LinkState::Locating { .. } => 1,
            LinkState::Settling(_) => 2,
            LinkState::Sending(_) => 3,
            LinkState::Offering { .. } => 4,
            _ => 0,
        };
        self.wake_at(wake);
        if due || self.owes_word(id) {
            self.send_heartbeat(id, 0);
        }
        match step {
            1 => self.locate(id),
            2 => self.settle(id),
            3 => self.feed_shadow(id) | self.send_copy(id),
            4 => self.offer(id),
            _ => false,
        }
    }

    /// A shadow dials its primary; a primary those who do not come, for one may have been promoted.
    fn dial(&mut self) {
        if self.fault.is_some() || self.admin.is_promoting() || self.is_retiring() || self.is_raising() {
            return;
        }
        let patience = match &self.part {
            Part::Shadow(s) if s.closing || s.is_turning() || self.hears_primary() => return,
            // Who holds records of his own waits for an administrator's word.
            Part::Shadow(_) if self.meta.sb.retired.is_some_and(|r| !r.rewinds) && !self.is_remaking() => {
                return;
            }
            Part::Shadow(_) if !self.journal.is_quiet() => {
                let lsn = self.journal.tail().point.lsn;
                return self.journal.want(lsn);
            }
            Part::Shadow(_) => 1,
            Part::Primary(p) if p.closing => return,
            Part::Primary(_) if self.is_asking() => 1,
            Part::Primary(p) if !p.is_serving() => return,
            Part::Primary(_) => PATIENCE,
        };
        for i in 0..self.links.dials.len() {
            let name = &self.cfg.peers[i].name;
            let node = self.links.peers.iter().find(|p| p.name == *name).and_then(|p| p.node);
            let is_it = |n: NodeId| self.links.view(n).is_some_and(|v| v.name == *name);
            let linked = self.links.by_id.values().any(|l| l.dialed == Some(i) || l.peer.is_some_and(is_it));
            let asked = self.is_asking() && !self.asks(i);
            let content = !self.is_asking() && self.follows_well(node, self.cfg.peers[i].sync);
            let dial = &mut self.links.dials[i];
            if !self.cfg.peers[i].dial || linked || asked || content || dial.busy {
                continue;
            }
            let at = dial.at + (patience - 1) * self.cfg.timing.redial;
            let at = at.max(self.links.call.holds_back(i));
            if self.now.mono >= at {
                dial.busy = true;
                self.out.push(Action::Dial { peer: i });
            } else {
                self.wake_at(at);
            }
        }
    }
}

fn name_of(state: &LinkState) -> &'static str {
    match state {
        LinkState::Challenged | LinkState::Locating { .. } | LinkState::Dialled => "shaking hands",
        LinkState::Welcomed { .. } | LinkState::Greeted | LinkState::Cutting => "comparing histories",
        LinkState::Offered | LinkState::Offering { .. } | LinkState::Rebasing => "beginning a resync",
        LinkState::Settling(_) => "settling",
        LinkState::Sending(_) => "sending",
        LinkState::Receiving => "receiving",
        LinkState::Closing => "closing",
    }
}

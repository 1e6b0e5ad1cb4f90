//! What a node says of itself.
//!
//! Owns: the translation of state into the facts of [`Status`]. Invariant: no fact is told that was
//! not measured.

use super::config::NodeConfig;
use super::links::PeerView;
use super::run::{Part, Run};
use super::status::{PeerStatus, RefreshStatus, SCHEMA_VERSION, Status, Verified, VolumeStatus, rfc3339};
use crate::format::message::Role;
use crate::format::superblock::Peer;
use crate::units::SECONDS;

/// With less than this a journal is full: what one write in a full cache may want of it.
const ROOM: u64 = 4 << 20;

/// The status of a node that has not recovered yet, or could not.
pub fn bare(cfg: &NodeConfig, state: &str, reason: Option<String>) -> Status {
    let volume = |v: &super::config::VolumeConfig| VolumeStatus {
        name: v.name.clone(),
        size: v.size,
        device: None,
        backing: None,
    };
    Status {
        schema_version: SCHEMA_VERSION,
        group: cfg.group_name.clone(),
        node: cfg.name.clone(),
        role: "unknown".into(),
        state: state.into(),
        action: reason.clone().unwrap_or_else(|| "none: wait until the journal is recovered".into()),
        reason,
        term: 0,
        ack_level: "local".into(),
        sync_set: vec![],
        standing: None,
        volumes: cfg.volumes.iter().map(volume).collect(),
        tail_lsn: 0,
        tail_time: None,
        durable_lsn: 0,
        applied_lsn: 0,
        checkpoint_lsn: 0,
        drain_records: 0,
        drain_bytes: 0,
        journal_used: 0,
        journal_size: 0,
        cache_used: 0,
        cache_size: 0,
        written_bytes: 0,
        record_bytes: 0,
        journal_bytes: 0,
        peers: vec![],
        lag: None,
        apply_delay: None,
        primary: None,
        verified: None,
        unrepaired_bytes: 0,
        refresh: None,
        view: None,
    }
}

impl Run {
    /// Everything that is known now.
    pub(super) fn status(&self) -> Status {
        let sb = &self.meta.sb;
        let (state, reason, action) = self.state();
        let (journal_used, journal_size) = self.journal.usage();
        let (cache_used, cache_size, written_bytes) = match &self.part {
            Part::Primary(p) => {
                let (used, size) = p.cache.as_ref().map_or((0, 0), |c| c.usage());
                (used, size, p.written_bytes)
            }
            Part::Shadow(_) => (0, 0, 0),
        };
        let member = |n| match self.links.view(n) {
            Some(v) => v.name.clone(),
            None if n == self.cfg.node => self.cfg.name.clone(),
            None => format!("{n:?}"),
        };
        Status {
            // Until a promotion is durable, a crash leaves the shadow that it was.
            role: if sb.role == Role::Primary && !self.admin.is_promoting() { "primary" } else { "shadow" }
                .into(),
            state: state.into(),
            reason,
            action,
            term: sb.term.counter,
            ack_level: if sb.sync_set.is_empty() { "local" } else { "durable" }.into(),
            sync_set: sb.sync_set.iter().map(|n| member(*n)).collect(),
            standing: match (self.is_outdated(), self.holds_everything()) {
                (true, _) => Some("outdated".into()),
                (false, true) => Some("member".into()),
                (false, false) => None,
            },
            tail_lsn: self.journal.tail().point.lsn.0,
            tail_time: rfc3339(self.journal.tail().time),
            durable_lsn: self.journal.durable().0,
            applied_lsn: self.image.applied.point.lsn.0,
            checkpoint_lsn: self.links.checkpoint.0,
            drain_records: self.drain_left().0,
            drain_bytes: self.drain_left().1,
            journal_used,
            journal_size,
            cache_used,
            cache_size,
            written_bytes,
            record_bytes: self.links.record_bytes,
            journal_bytes: self.journal.bytes(),
            peers: self.links.peers.iter().map(|p| self.peer(p)).collect(),
            lag: self.lag(),
            apply_delay: self.delay_status(),
            primary: self.primary_status(),
            verified: sb.verified.as_ref().filter(|_| sb.role == Role::Shadow).map(Verified::from),
            unrepaired_bytes: sb.unrepaired,
            view: self.view_status(),
            refresh: self.last_comparison().cloned(),
            ..bare(&self.cfg, "", None)
        }
    }

    /// The newest comparison, of this node or of one that it feeds.
    fn last_comparison(&self) -> Option<&RefreshStatus> {
        let own = self.compare.job.as_ref().map(|j| &j.status);
        own.into_iter().chain(self.compare.told.as_ref()).max_by_key(|s| s.job)
    }

    fn peer(&self, p: &PeerView) -> PeerStatus {
        let follower = matches!(self.part, Part::Shadow(_)) && p.follows;
        let late = |lsn| match &self.part {
            Part::Primary(_) => self.behind(lsn).map_or((0, 0, 0), |(records, bytes, since)| {
                (records, bytes, self.now.wall.saturating_sub(since))
            }),
            Part::Shadow(_) if follower => self.lag_of_follower(lsn),
            Part::Shadow(_) => (0, 0, 0),
        };
        let (lag_records, lag_bytes, unapplied) = late(p.applied);
        let away = p.node.filter(|n| matches!(p.state, "Disconnected" | "Resync") && !self.links.is_live(*n));
        let through = away.and_then(|n| self.fed_through(n));
        let known = self.meta.sb.peers.iter().find(|k| Some(k.node) == p.node);
        let seconds = |ns: u64| ns as f64 / SECONDS as f64;
        // What is not even durable there is not held back on purpose.
        let lag = unapplied.saturating_sub(p.apply_delay).max(late(p.durable).2);
        // What a silent primary has sealed since is unknown, here and there.
        let lag = lag.max(self.missing_word().filter(|_| follower).unwrap_or(0));
        PeerStatus {
            name: p.name.clone(),
            state: if through.is_some() { "Disconnected" } else { p.state }.into(),
            reason: through.map(|name| format!("it is fed through {name}")).or_else(|| p.reason.clone()),
            rival: p.is_rival(),
            sync: p.node.is_some_and(|n| self.meta.sb.sync_set.contains(&n)),
            outdated: p.node.is_some_and(|n| self.meta.sb.outdated.contains(&n)),
            received_lsn: p.received.0,
            durable_lsn: p.durable.0,
            applied_lsn: p.applied.0,
            lag_records,
            lag_bytes,
            lag_seconds: seconds(lag),
            apply_delay_seconds: seconds(p.apply_delay),
            heard_seconds_ago: p.heard.map(|at| seconds(self.now.mono.saturating_sub(at))),
            round_trip_seconds: p.clock.round_trip().map(seconds),
            sent_bytes: p.sent_bytes,
            fork_lsn: p.fork.filter(|_| p.state == "Diverged" || self.is_retired()).map(|lsn| lsn.0),
            source: self.is_source(p).then(|| if self.is_cascaded() { "shadow" } else { "primary" }.into()),
            follower,
            verified: known.and_then(|k| k.verified.as_ref()).map(Verified::from),
        }
    }

    /// State, why, and what to do about it.
    fn state(&self) -> (&'static str, Option<String>, String) {
        if let Some(fault) = &self.fault {
            return (
                "Failed",
                Some(fault.clone()),
                "see the reason, mend it, then restart the daemon".into(),
            );
        }
        match &self.part {
            Part::Primary(_) if self.is_retiring() => {
                let why = format!("{}: this node is about to become a shadow", self.promoted_since());
                ("Retiring", Some(why), "none: wait".into())
            }
            Part::Primary(p) if !p.is_serving() => {
                let left = self.journal.tail().point.lsn.0 - self.image.applied.point.lsn.0;
                if left == 0 && self.is_asking() {
                    let why = "it asks its peers whether another node was promoted meanwhile";
                    return ("Recovering", Some(why.into()), "none: wait until it serves".into());
                }
                let why = format!("{left} records are being put back into the backing");
                ("Recovering", Some(why), "none: wait until it serves".into())
            }
            Part::Primary(p) => {
                let remade = |n| self.links.view(n).is_some_and(|v| v.resyncing);
                let set = &self.meta.sb.sync_set;
                let missing = set.iter().find(|n| !self.links.is_live(**n) || remade(**n));
                if let Some(n) = missing.filter(|_| p.is_waited_for()) {
                    let name = self.links.view(*n).map_or_else(|| format!("{n:?}"), |v| v.name.clone());
                    if self.links.is_live(*n) {
                        let why =
                            format!("{name} is in the sync set and is being resynced: FLUSH waits for it");
                        return ("Blocked", Some(why), "none: wait for the resync".into());
                    }
                    let why = format!("{name} is in the sync set and can't be reached: FLUSH waits for it");
                    let action = format!(
                        "bring {name} or its link back; or stop or fence it, then: volrep outdate {} --member {name}",
                        self.cfg.group_name
                    );
                    return ("Blocked", Some(why), action);
                }
                if let Some(name) = self.waits_for_room() {
                    let why = format!(
                        "the journal is full of records that {name} still needs and it can't be reached: writers wait for it"
                    );
                    let action = format!(
                        "bring {name} or its link back, or set on_full = \"behind\" and restart: then it will need a resync"
                    );
                    return ("Blocked", Some(why), action);
                }
                if let Some(v) = self.links.peers.iter().find(|v| v.is_rival()) {
                    let why =
                        format!("{}: {}", v.name, v.reason.as_deref().unwrap_or("it is a primary, too"));
                    let action = format!(
                        "choose which side is kept. To keep {0}, here: volrep resolve {1} --keep {0}; to keep {2}, on {0}: \
                         volrep resolve {1} --keep {2}",
                        v.name, self.cfg.group_name, self.cfg.name
                    );
                    return ("Diverged", Some(why), action);
                }
                let through = |v: &PeerView| v.node.is_some_and(|n| self.fed_through(n).is_some());
                let needs = |v: &&PeerView| v.state == "Diverged" || (v.state == "Resync" && !through(v));
                let resync = self.links.peers.iter().find(needs);
                let action = match resync {
                    Some(v) if v.state == "Resync" => format!("{} needs a resync", v.name),
                    Some(v) => format!(
                        "{0} has diverged: to have it follow this node, on {0}: volrep rejoin {1}",
                        v.name, self.cfg.group_name
                    ),
                    None => "none".into(),
                };
                let why = match self.drain_left() {
                    (0, _) => None,
                    (n, bytes) => Some(format!(
                        "serving; {n} records ({} MiB of journal) go into the backing meanwhile",
                        bytes.div_ceil(1 << 20)
                    )),
                };
                ("UpToDate", why, action)
            }
            Part::Shadow(_) => self.state_of_viewed(self.shadow_state()),
        }
    }

    /// It was a primary, and its own records wait for an administrator's word.
    pub(super) fn is_retired(&self) -> bool {
        self.is_retiring() || self.meta.sb.retired.is_some_and(|r| !r.rewinds)
    }

    /// Why it is retired.
    pub(super) fn promoted_since(&self) -> String {
        let term = self.meta.sb.term;
        let view = self.links.view(term.node);
        let name = view.map_or_else(|| "another node".to_owned(), |v| v.name.clone());
        let fork = view.and_then(|v| v.fork);
        let at = fork.map_or_else(String::new, |lsn| format!(", and the histories part after LSN {lsn}"));
        format!("{name} was promoted under term {} while this node was the primary{at}", term.counter)
    }

    fn to_rejoin(&self) -> String {
        let group = &self.cfg.group_name;
        format!("volrep rejoin {group}: what only this node holds goes to a salvage file, then it follows")
    }

    /// The shadow that is away and without which a write finds no room in the journal.
    fn waits_for_room(&self) -> Option<String> {
        let Part::Primary(p) = &self.part else { return None };
        let away = |k: &&Peer| {
            let behind = !k.behind && k.durable < self.links.checkpoint;
            behind && !self.links.is_live(k.node) && self.fed_through(k.node).is_none()
        };
        let slowest = self.meta.sb.peers.iter().filter(away).min_by_key(|k| k.durable)?;
        (p.starved && self.journal.room() < ROOM).then(|| slowest.name.clone())
    }

    fn resync_percent(&self) -> String {
        let job = self.compare.job.as_ref().map(|j| &j.status);
        let job = job.filter(|j| j.total > 0 && self.is_remaking());
        job.map_or_else(String::new, |j| {
            format!(": {:.1} % compared", j.compared as f64 * 100.0 / j.total as f64)
        })
    }

    fn shadow_state(&self) -> (&'static str, Option<String>, String) {
        if !self.meta.sb.consistent {
            let left = format!("a full copy has not ended{}", self.resync_percent());
            let stopped = match &self.part {
                Part::Shadow(s) => s.stopped.as_ref(),
                Part::Primary(_) => None,
            };
            let (why, action) = match stopped {
                Some(why) => (
                    format!("the resync stopped: {why}; {left}"),
                    format!("go on with it: volrep refresh {}", self.cfg.group_name),
                ),
                None => (left, "wait for the copy".into()),
            };
            return ("Inconsistent", Some(why), action);
        }
        if self.meta.sb.resync.is_some() {
            let old = self.old_image().map_or_else(
                || "the new image is being put in place".to_owned(),
                |lsn| format!("the image is the old one, of LSN {lsn}, until the new one is whole"),
            );
            let why = format!("{old}{}", self.resync_percent());
            return ("Resyncing", Some(why), "none: wait".into());
        }
        if let Some(node) = self.meta.sb.handed {
            let name = self.links.peers.iter().find(|p| p.node == Some(node)).map_or("a peer", |p| &p.name);
            let why = format!("{name} was told to take over, and has not been heard since");
            let action = format!(
                "bring {name} or its link back; if it is lost for good, fence it and promote this node"
            );
            return ("Outdated", Some(why), action);
        }
        if self.meta.sb.retired.is_some_and(|r| !r.rewinds) {
            let why = format!(
                "{}: what this node holds of its own is kept until it rejoins",
                self.promoted_since()
            );
            return ("Retired", Some(why), self.to_rejoin());
        }
        if let Part::Shadow(s) = &self.part
            && let Some(why) = &s.stopped
        {
            let action = format!("mend that, then: volrep refresh {}", self.cfg.group_name);
            return ("Outdated", Some(format!("the resync stopped: {why}")), action);
        }
        if let Some(v) = self.links.above().find(|v| v.state == "Diverged") {
            let why = format!("{}: {}", v.name, v.reason.as_deref().unwrap_or("the histories differ"));
            return ("Diverged", Some(why), self.to_rejoin());
        }
        if let Some(v) = self.links.above().find(|v| v.state == "Resync") {
            let action = "a resync is needed: join this node anew".to_owned();
            return ("Outdated", v.reason.clone(), action);
        }
        if self.links.receiving().is_none() {
            let why = self.links.above().find_map(|v| v.reason.clone());
            let why = why.unwrap_or_else(|| "no link to the primary".into());
            return ("Outdated", Some(why), "check the primary and the link to it".into());
        }
        if let Some(name) = self.cascade_source().filter(|_| !self.hears_primary()) {
            let why = format!("{name}, which feeds this node, has no link to the primary");
            return ("Outdated", Some(why), format!("check the primary and the link of {name} to it"));
        }
        let Some(heard) = self.links.heard_of_primary else {
            let why = "the primary has not said yet where it is".to_owned();
            return ("CatchingUp", Some(why), "none: wait".into());
        };
        let tail = self.journal.tail().point.lsn.max(heard.tail);
        let behind = tail.0.saturating_sub(self.image.applied.point.lsn.0);
        let late = self.lag().map_or(0.0, |l| l.seconds);
        if late > 1.0 {
            let why = match self.missing_word() {
                Some(ns) => format!("nothing was heard of the primary for {} s", ns / SECONDS),
                None => format!("{behind} records to apply"),
            };
            return ("CatchingUp", Some(why), "none: wait".into());
        }
        let action = match self.meta.sb.unrepaired {
            0 => "none".into(),
            n => format!("a comparison found {n} bytes that differ: volrep refresh {}", self.cfg.group_name),
        };
        ("UpToDate", None, action)
    }
}

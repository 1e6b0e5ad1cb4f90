//! `volrep status`: the state of one group or of all, with the daemon or without it.
//!
//! Owns: nothing. Invariant: what is shown comes from the daemon, or is marked as Stopped.

use super::config;
use super::failure::{Exit, Failure};
use super::output::Output;
use super::places::Places;
use super::status_text::{Rates, text};
use super::{remote, state};
use crate::control::client::{CallError, call};
use crate::control::{Reply, Verb};
use crate::format::message::Role;
use crate::format::superblock::{Peer, Superblock};
use crate::node::status::{PeerStatus, SCHEMA_VERSION, Status, Verified, VolumeStatus};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// How long a daemon may take to say how it is.
const LIMIT: Duration = Duration::from_secs(5);
const INTERVAL: Duration = Duration::from_secs(1);

/// Show role, state, lag and what to do
#[derive(clap::Args, Clone, Debug)]
pub struct Show {
    /// The group's name [default: all]
    #[arg(value_name = "NAME")]
    group: Option<String>,
    /// Show it each second until interrupted
    #[arg(long)]
    watch: bool,
}

impl Show {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let mut rates = HashMap::new();
        if !self.watch {
            return self.once(places, out, &mut rates);
        }
        let redraw = !out.json && std::io::stdout().is_terminal();
        let mut next = Instant::now();
        loop {
            if redraw {
                // Home and clear to the end: no flicker, and nothing is left of a longer screen.
                out.line("\x1b[H\x1b[J");
            }
            self.once(places, out, &mut rates)?;
            next += INTERVAL;
            std::thread::sleep(next.saturating_duration_since(Instant::now()));
        }
    }

    fn once(&self, places: &Places, out: &Output, rates: &mut HashMap<String, Rates>) -> Result<(), Failure> {
        let mut tell = |s: &Status| {
            let before = rates.get(&s.group).cloned();
            let now = Rates::new(s, Instant::now());
            let shown = text(s, before.as_ref().map(|b| now.since(b)).as_ref());
            rates.insert(s.group.clone(), now);
            shown
        };
        if let Some(group) = &self.group {
            let status = obtain(places, group)?;
            out.document(&document(&status), || tell(&status));
            return Ok(());
        }
        let groups = places.groups()?;
        let states: Vec<_> = groups.iter().map(|g| (g, obtain(places, g))).collect();
        let all = json!({
            "schema_version": SCHEMA_VERSION,
            "groups": states.iter().map(|(g, s)| either(g, s)).collect::<Vec<_>>(),
        });
        out.document(&all, || {
            let one = |(group, s): &(&String, Result<Status, Failure>)| match s {
                Ok(s) => tell(s),
                Err(failure) => format!("{group}  unknown: {failure}"),
            };
            if states.is_empty() {
                return format!("no groups in {}", places.config_dir().display());
            }
            states.iter().map(one).collect::<Vec<_>>().join("\n\n")
        });
        Ok(())
    }
}

fn document(status: &Status) -> Value {
    serde_json::to_value(status).unwrap_or_else(|e| json!({ "error": e.to_string() }))
}

fn either(group: &str, s: &Result<Status, Failure>) -> Value {
    match s {
        Ok(s) => document(s),
        Err(failure) => json!({ "group": group, "error": failure.json()["error"] }),
    }
}

/// The state: as the daemon says, or from the files if it is down.
pub fn obtain(places: &Places, group: &str) -> Result<Status, Failure> {
    let config = config::load(places, group)?;
    match call(&places.control_socket(group), Verb::Status, Some(LIMIT)) {
        Ok(Reply::Status { status }) => Ok(*status),
        Ok(Reply::Refused { kind, text }) => Err(Failure::new(Exit::from(kind), text, "")),
        Ok(_) => Err(remote::odd(group)),
        Err(CallError::Down) => {
            let path = places.superblock(group);
            let superblock = state::read(&path)?;
            state::check(&superblock, &config, &path)?;
            Ok(stopped(group, &config, &superblock))
        }
        Err(e) => Err(remote::unanswered(places, group, &e)),
    }
}

/// The state as the daemon says; it has to run.
pub fn running(places: &Places, group: &str) -> Result<Status, Failure> {
    let status = obtain(places, group)?;
    if status.state == "Stopped" {
        return Err(Failure::new(Exit::Failure, format!("`{group}` is not running here"), status.action));
    }
    Ok(status)
}

/// What the files of a node tell while nobody serves it.
fn stopped(group: &str, config: &config::Config, s: &Superblock) -> Status {
    let in_set = |id| s.sync_set.contains(&id);
    let name = |id| match s.peers.iter().find(|p| p.node == id) {
        Some(p) => p.name.clone(),
        None if id == s.node => config.node.clone(),
        None => format!("{id:?}"),
    };
    let volume = |v: &config::Volume| VolumeStatus {
        name: v.name.clone(),
        size: v.size.0,
        device: None,
        backing: Some(v.path.display().to_string()),
    };
    let superseded = s.role == Role::Primary && s.term.node != s.node;
    let retired = superseded || s.retired.is_some_and(|r| !r.rewinds);
    let reason = match (s.clean, s.consistent) {
        _ if retired => "the daemon is not running; another node was promoted while this one was the primary",
        (_, false) => "the daemon is not running; the image is not usable yet (first copy)",
        (true, true) => "the daemon is not running; it was shut down cleanly",
        (false, true) => {
            "the daemon is not running; it was not shut down cleanly and will recover when it starts"
        }
    };
    let checkpoint = s.checkpoint.lsn.0;
    Status {
        schema_version: SCHEMA_VERSION,
        group: group.to_owned(),
        node: config.node.clone(),
        role: if s.role == Role::Primary { "primary" } else { "shadow" }.to_owned(),
        state: "Stopped".to_owned(),
        reason: Some(reason.to_owned()),
        term: s.term.counter,
        ack_level: if s.sync_set.is_empty() { "local" } else { "durable" }.to_owned(),
        sync_set: s.sync_set.iter().map(|id| name(*id)).collect(),
        standing: s.outdated.contains(&s.node).then(|| "outdated".to_owned()),
        volumes: config.volumes.iter().map(volume).collect(),
        tail_lsn: s.floor.0.max(checkpoint),
        tail_time: None,
        durable_lsn: s.floor.0.max(checkpoint),
        applied_lsn: checkpoint,
        checkpoint_lsn: checkpoint,
        drain_records: 0,
        drain_bytes: 0,
        journal_used: 0,
        journal_size: s.geometry.len(),
        cache_used: 0,
        cache_size: config.cache.size.0,
        written_bytes: 0,
        record_bytes: 0,
        journal_bytes: 0,
        peers: s
            .peers
            .iter()
            .map(|p| stopped_peer(p, in_set(p.node), s.outdated.contains(&p.node)))
            .collect(),
        lag: None,
        apply_delay: None,
        primary: None,
        verified: s.verified.as_ref().map(Verified::from),
        unrepaired_bytes: s.unrepaired,
        refresh: None,
        view: None,
        action: match retired {
            true => format!("start it: volrep serve {group}; then have it follow: volrep rejoin {group}"),
            false => format!("start it: volrep serve {group}"),
        },
    }
}

fn stopped_peer(p: &Peer, sync: bool, outdated: bool) -> PeerStatus {
    PeerStatus {
        name: p.name.clone(),
        state: if p.behind { "Resync" } else { "Disconnected" }.to_owned(),
        reason: None,
        rival: false,
        sync,
        outdated,
        received_lsn: p.durable.0,
        durable_lsn: p.durable.0,
        applied_lsn: 0,
        lag_records: 0,
        lag_bytes: 0,
        lag_seconds: 0.0,
        apply_delay_seconds: 0.0,
        heard_seconds_ago: None,
        round_trip_seconds: None,
        sent_bytes: 0,
        fork_lsn: None,
        source: None,
        follower: false,
        verified: p.verified.as_ref().map(Verified::from),
    }
}

//! `volrep promote`: makes a shadow the primary.
//!
//! Owns: what is said before it, and the call of the fence hook. Invariant: nothing counts as fencing
//! but the hook's success and the flag that says so; what may be lost is said before anything is done.

use super::config;
use super::failure::Failure;
use super::fence::fence;
use super::hooks::Hook;
use super::output::{Output, confirm};
use super::places::Places;
use super::size::{grouped, human, span};
use super::{remote, status};
use crate::control::{DeviceKind, Reply, Verb};
use crate::node::status::{PeerStatus, SCHEMA_VERSION, Status};
use serde_json::{Value, json};

/// Make this shadow the primary
#[derive(clap::Args, Clone, Debug)]
pub struct Promote {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// As of an earlier record of those that an apply_delay holds back: an LSN, a time (RFC 3339, or HH:MM:SS of
    /// this machine's clock), or the text of a mark. Later records go to a salvage file first
    #[arg(long, value_name = "LSN|TIME|MARK")]
    at: Option<String>,
    /// Only say what would happen and what may be lost
    #[arg(long)]
    dry_run: bool,
    /// Your word that the old primary can no longer write; nothing else stands for it
    #[arg(long)]
    i_fenced_the_old_primary: bool,
    /// Promote a node that was lost as a member of the sync set, though the primary went on without it: what was
    /// acknowledged since is lost
    #[arg(long)]
    accept_outdated: bool,
    /// Don't ask for the group's name
    #[arg(long)]
    yes: bool,
}

impl Promote {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let config = config::load(places, &self.group)?;
        let before = status::running(places, &self.group)?;
        eprintln!("{}", at_stake(&before));
        let named = self.i_fenced_the_old_primary;
        // With a hook the plan is that of a fenced primary: the hook runs only after the plan is confirmed.
        let plan = self.ask(places, named || config.fence_hook.is_some(), true)?;
        if self.dry_run {
            let hook = config.fence_hook.as_ref().filter(|_| !named);
            if let Some(hook) = hook {
                eprintln!("volrep: would call {} first, and go on only if it succeeds", hook.display());
            }
            out.document(&self.document(&before, None, &plan), || plan.clone());
            return Ok(());
        }
        eprintln!("{plan}");
        confirm(&self.group, "promote this shadow", self.yes)?;
        let fenced = match (&config.fence_hook, named) {
            (Some(hook), false) => {
                let (name, term) = old_primary(&before);
                fence(hook, name, term, "--i-fenced-the-old-primary").map(|()| true)?
            }
            (_, named) => named,
        };
        let done = self.ask(places, fenced, false)?;
        if config.hooks.path(Hook::Start).is_some() {
            // It is the primary whatever becomes of the database: trying it again would be refused.
            self.start(places, &config.hooks)
                .map_err(|f| Failure { what: format!("{done}; but {}", f.what), ..f })?;
        }
        let after = status::obtain(places, &self.group).ok();
        out.document(&self.document(&before, after.as_ref(), &done), || done.clone());
        Ok(())
    }

    /// Attaches the volumes, and has the database started.
    fn start(&self, places: &Places, hooks: &config::Hooks) -> Result<(), Failure> {
        match remote::ask(places, &self.group, Verb::Attach { device: DeviceKind::Auto }, None)? {
            Reply::Attached { volumes, .. } => {
                let devices: Vec<String> = volumes.into_iter().map(|v| v.device).collect();
                hooks.call(Hook::Start, &self.group, &devices)
            }
            _ => Err(remote::odd(&self.group)),
        }
    }

    fn ask(&self, places: &Places, fenced: bool, dry_run: bool) -> Result<String, Failure> {
        let at = self.at.as_deref().map(super::at::parse).transpose()?;
        let verb = Verb::Promote { fenced, dry_run, at, accept_outdated: self.accept_outdated };
        match remote::ask(places, &self.group, verb, None)? {
            Reply::Done { text } => Ok(text),
            _ => Err(remote::odd(&self.group)),
        }
    }

    fn document(&self, before: &Status, after: Option<&Status>, text: &str) -> Value {
        let (old, term) = old_primary(before);
        let heard = before.primary.as_ref().map(|p| p.heard_seconds_ago);
        let heard = heard.unwrap_or_else(|| source(before).and_then(|p| p.heard_seconds_ago));
        json!({
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "node": before.node,
            "dry_run": self.dry_run,
            "standing": before.standing,
            "at": self.at,
            "old_primary": old,
            "old_term": term,
            "term": after.map(|s| s.term),
            "tail_lsn": before.tail_lsn,
            "at_last_heartbeat": {
                "seconds_ago": heard,
                "lag_records": lag(before).1,
                "lag_bytes": lag(before).2,
            },
            "text": text,
        })
    }
}

/// The peer that the records come from, or one that may be the primary: never one that follows this node.
fn source(s: &Status) -> Option<&PeerStatus> {
    let above = || s.peers.iter().filter(|p| !p.follower);
    above().find(|p| p.source.is_some()).or_else(|| above().next())
}

/// The primary's name, and its term. A shadow through which it is followed is not meant.
fn old_primary(s: &Status) -> (&str, u64) {
    let told = s.primary.as_ref();
    let through = told.and_then(|p| p.through.as_deref());
    let other = || s.peers.iter().find(|p| !p.follower && Some(p.name.as_str()) != through);
    let direct = || source(s).filter(|p| p.source.is_some() && through.is_none());
    let name = told.and_then(|p| p.name.as_deref());
    let name = name.or_else(|| direct().or_else(other).map(|p| p.name.as_str()));
    (name.unwrap_or("unknown"), s.term)
}

/// Seconds, records and bytes that the shadow lacked when it last heard of its primary.
fn lag(s: &Status) -> (f64, u64, u64) {
    let of_peer = |p: &PeerStatus| (p.lag_seconds, p.lag_records, p.lag_bytes);
    match (&s.lag, source(s)) {
        (Some(lag), _) => (lag.seconds, lag.records, lag.bytes),
        (None, Some(p)) => of_peer(p),
        (None, None) => (0.0, 0, 0),
    }
}

/// What a promotion may lose, as far as this node can know.
pub fn at_stake(s: &Status) -> String {
    if s.role == "primary" {
        return format!("{} is the primary of `{}` already.", s.node, s.group);
    }
    let end = format!("The shadow ends at LSN {}", grouped(s.tail_lsn));
    let Some(p) = source(s) else {
        return format!("{end}; no primary is known here, so what it has beyond that is unknown.");
    };
    let through = s.primary.as_ref().and_then(|t| t.through.as_deref());
    let name = match (old_primary(s).0, through) {
        ("unknown", Some(_)) => "the primary",
        (name, _) => name,
    };
    let heard = match &s.primary {
        Some(told) => told.heard_seconds_ago,
        None => p.heard_seconds_ago,
    };
    let Some(heard) = heard else {
        return format!(
            "{name} was not heard since this daemon started. {end}; what {name} wrote later is unknown."
        );
    };
    let (_, records, bytes) = lag(s);
    let missing = match (records, bytes) {
        (0, _) => format!("nothing acknowledged on {name} was missing here"),
        (n, bytes) => format!(
            "{} in {} records of {name} was not applied here (what the journal here holds of it is kept)",
            human(bytes),
            grouped(n)
        ),
    };
    let ago = span(heard);
    let connected = match &s.primary {
        Some(told) => told.connected,
        None => p.state != "Disconnected",
    };
    let by = through.map_or_else(String::new, |shadow| format!(" through {shadow}"));
    let connection = if connected {
        format!("{name} is connected{by} and may be writing: a switch without loss is better. ")
    } else {
        format!("{name} is unreachable{by} and not known to be fenced. ")
    };
    format!("{connection}{end};\nat the last heartbeat, {ago} ago, {missing}; later writes are unknown.")
}

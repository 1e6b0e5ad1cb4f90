//! A node's state for people.
//!
//! Owns: its layout. Invariant: the first line says who and what, the last what to do.

use super::size::{grouped, human, span};
use crate::node::status::{PeerStatus, Status, Verified, ViewStatus};
use jiff::Timestamp;
use std::collections::HashMap;
use std::time::Instant;

/// Counters at an instant.
#[derive(Clone, Debug)]
pub struct Rates {
    at: Instant,
    sent: HashMap<String, u64>,
}

/// Bytes per second between two instants.
#[derive(Clone, Debug, Default)]
pub struct Speeds {
    sent: HashMap<String, f64>,
}

impl Rates {
    /// The counters of a state.
    pub fn new(s: &Status, at: Instant) -> Rates {
        let sent = s.peers.iter().map(|p| (p.name.clone(), p.sent_bytes)).collect();
        Rates { at, sent }
    }

    /// Per second since an earlier instant. A counter that went back (a daemon that started anew)
    /// gives nothing rather than something wrong.
    pub fn since(&self, before: &Rates) -> Speeds {
        let seconds = self.at.duration_since(before.at).as_secs_f64();
        let speed =
            |now: u64, was: u64| now.checked_sub(was).filter(|_| seconds > 0.0).map(|n| n as f64 / seconds);
        let sent = self
            .sent
            .iter()
            .filter_map(|(name, now)| Some((name.clone(), speed(*now, *before.sent.get(name)?)?)));
        Speeds { sent: sent.collect() }
    }
}

/// The whole text, without a last line break.
pub fn text(s: &Status, speeds: Option<&Speeds>) -> String {
    let mut lines = vec![head(s)];
    if s.volumes.len() > 1 {
        let width = s.volumes.iter().map(|v| v.name.len()).max().unwrap_or(0);
        for v in &s.volumes {
            let at = place(v.device.as_deref(), v.backing.as_deref());
            lines.push(format!(" volume {:width$}  {at}  {}", v.name, human(v.size)));
        }
    }
    if let Some(reason) = &s.reason {
        lines.push(format!(" {}: {reason}", s.state));
    }
    if s.peers.is_empty() && s.role == "primary" {
        lines.push(format!(" no shadow yet  {}", journal(s)));
    }
    let width = |f: fn(&PeerStatus) -> &str| s.peers.iter().map(|p| f(p).len()).max().unwrap_or(0);
    let widths = (width(|p| &p.name), width(|p| &p.state));
    lines.extend(s.peers.iter().map(|p| peer(s, p, widths, speeds)));
    if let Some(lag) = &s.lag {
        let a = lag.applied;
        let (p50, p99, max) = (span(a.p50), span(a.p99), span(a.max));
        lines.push(format!(
            " applied within {p50} (median), {p99} (99 %), {max} (most)  {} records",
            grouped(lag.count)
        ));
    }
    if let Some(view) = &s.view {
        lines.push(viewed(view, Timestamp::now()));
    }
    if let Some(d) = &s.apply_delay {
        let reason = d.reason.as_ref().map_or_else(String::new, |r| format!(" ({r})"));
        let when = |time: &Option<String>| time.as_ref().map_or_else(String::new, |t| format!(" ({t})"));
        lines.push(format!(
            " delayed by {}: {}{reason}, the oldest record is held since {}",
            span(d.seconds),
            d.state.to_lowercase(),
            span(d.held_seconds)
        ));
        lines.push(format!(
            " promote --at: from LSN {}{} to {}{}",
            grouped(d.window_from_lsn),
            when(&d.window_from_time),
            grouped(d.window_to_lsn),
            when(&d.window_to_time)
        ));
    }
    if let Some(job) = s.refresh.as_ref().filter(|j| matches!(j.state.as_str(), "Running" | "Waiting")) {
        lines.push(format!(" {} of {}: {}", job.cause, job.shadow, super::refresh::progress(job)));
    }
    lines.extend(proofs(s, Timestamp::now()));
    lines.push(format!("action: {}", s.action));
    lines.join("\n")
}

fn head(s: &Status) -> String {
    let role = s.role.to_uppercase();
    let acks = match (s.role.as_str(), s.sync_set.is_empty()) {
        ("primary", true) => format!("  acks {}", s.ack_level),
        ("primary", false) => format!("  acks {} ({})", s.ack_level, s.sync_set.join(", ")),
        _ => String::new(),
    };
    let state = match s.state.as_str() {
        "UpToDate" if s.role == "primary" => String::new(),
        state => format!("  {state}"),
    };
    let volume = match s.volumes.as_slice() {
        [v] => format!("  {}  {}", place(v.device.as_deref(), v.backing.as_deref()), human(v.size)),
        volumes => format!("  {} volumes  {}", volumes.len(), human(volumes.iter().map(|v| v.size).sum())),
    };
    let standing = match s.standing.as_deref() {
        Some("member") => "  sync",
        Some("outdated") => "  outdated: the primary went on without it",
        _ => "",
    };
    format!("{}  {role} {}{state}{standing}  term {}{acks}{volume}", s.group, s.node, s.term)
}

fn place(device: Option<&str>, backing: Option<&str>) -> String {
    let on = backing.map(|b| format!(" on {b}")).unwrap_or_default();
    match device {
        Some(device) => format!("{device}{on}"),
        None => format!("not attached{on}"),
    }
}

fn journal(s: &Status) -> String {
    let percent = (s.journal_used as f64 / s.journal_size.max(1) as f64 * 100.0).ceil() as u64;
    match s.state.as_str() {
        // The files alone don't tell how full it is.
        "Stopped" => format!("journal {}", human(s.journal_size)),
        _ => format!("journal {percent}% of {}", human(s.journal_size)),
    }
}

fn peer(s: &Status, p: &PeerStatus, (name, state): (usize, usize), speeds: Option<&Speeds>) -> String {
    let source = s.role != "primary" && !p.follower;
    let other = match (s.role.as_str(), p.follower, p.source.as_deref()) {
        ("primary", ..) | (_, true, _) => "shadow",
        (_, _, Some("shadow")) => "through",
        _ => "primary",
    };
    let mut line = format!(" {other} {:name$}  {:state$}", p.name, p.state);
    if s.state == "Stopped" {
        line += &format!("  durable there to LSN {}", grouped(p.durable_lsn));
    } else {
        let (seconds, records, bytes) = match &s.lag {
            Some(lag) if source => (lag.seconds, lag.records, lag.bytes),
            _ => (p.lag_seconds, p.lag_records, p.lag_bytes),
        };
        line += &format!("  lag {}, {} records", span(seconds), grouped(records));
        let delay = s.apply_delay.as_ref().map_or(p.apply_delay_seconds, |d| d.seconds);
        if delay > 0.0 {
            line += &format!(" beyond the delay of {}", span(delay));
        }
        if bytes > 0 {
            line += &format!(", {}", human(bytes));
        }
    }
    if !source && s.state != "Stopped" {
        line += &format!("  {}", sent(s, p, speeds));
    }
    line += &format!("  {}", journal(s));
    if p.sync {
        line += "  sync";
    }
    if p.outdated {
        line += "  outdated";
    }
    if let Some(heard) = p.heard_seconds_ago.filter(|h| p.state == "Disconnected" || *h > 5.0) {
        line += &format!("  heard {} ago", span(heard));
    }
    if let Some(reason) = &p.reason {
        line += &format!("\n  {reason}");
    }
    line
}

fn sent(s: &Status, p: &PeerStatus, speeds: Option<&Speeds>) -> String {
    let amount = match speeds.and_then(|v| v.sent.get(&p.name)) {
        Some(speed) => format!("sent {}/s", human(*speed as u64)),
        None => format!("sent {}", human(p.sent_bytes)),
    };
    // Below a record's own overhead the ratio says nothing.
    if s.record_bytes < 1 << 16 {
        return amount;
    }
    format!("{amount} ({:.1}x compressed)", s.written_bytes as f64 / s.record_bytes as f64)
}

/// The view of a shadow.
fn viewed(v: &ViewStatus, now: Timestamp) -> String {
    let mut line = format!(" {} view  {}", v.kind, v.state);
    if let Some(lsn) = v.lsn {
        line += &format!(" at LSN {}", grouped(lsn));
    }
    if let Ok(since) = v.since.parse::<Timestamp>() {
        line +=
            &format!("  for {}", span((now.as_millisecond() - since.as_millisecond()).max(0) as f64 / 1e3));
    }
    if v.kind == "scratch" {
        line += &format!("  {} written", human(v.overlay_bytes));
    }
    line += &format!("  {} records wait", grouped(v.waiting_records));
    if !v.devices.is_empty() {
        line += &format!("\n  {}", v.devices.join(" "));
    }
    line
}

/// Of the shadow itself, or of each shadow.
fn proofs(s: &Status, now: Timestamp) -> Vec<String> {
    match (s.role.as_str(), s.peers.as_slice()) {
        ("primary", [p]) => vec![verified(p.verified.as_ref(), now)],
        ("primary", peers) => {
            let named = |p: &PeerStatus| format!(" {}{}", p.name, verified(p.verified.as_ref(), now));
            peers.iter().map(named).collect()
        }
        _ => vec![verified(s.verified.as_ref(), now)],
    }
}

fn verified(v: Option<&Verified>, now: Timestamp) -> String {
    let Some(v) = v else { return " never verified".to_owned() };
    let when = match v.at.parse::<Timestamp>() {
        Ok(at) => format!("{} ago", span((now.as_millisecond() - at.as_millisecond()) as f64 / 1e3)),
        Err(_) => format!("at {}", v.at),
    };
    let what = match v.differences {
        0 => "0 differences".to_owned(),
        n => format!("{} differed and were repaired", human(n)),
    };
    format!(" verified {when} at LSN {}: {what}", grouped(v.lsn))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::status::VolumeStatus;

    fn sample() -> Status {
        serde_json::from_value(serde_json::json!({
            "schema_version": 1, "group": "epic", "node": "db1", "role": "primary", "state": "UpToDate",
            "reason": null, "term": 7, "ack_level": "local", "sync_set": [],
            "volumes": [{ "name": "data", "size": 2u64 << 40, "device": "/dev/volrep/epic", "backing": "/dev/vg0/epic" }],
            "tail_lsn": 88213412, "durable_lsn": 88213412, "applied_lsn": 88213412, "checkpoint_lsn": 88213000,
            "journal_used": 1u64 << 30, "journal_size": 64u64 << 30, "cache_used": 0, "cache_size": 64 << 20,
            "written_bytes": 31u64 << 20, "record_bytes": 10u64 << 20,
            "peers": [{
                "name": "db2", "state": "UpToDate", "reason": null, "rival": false, "sync": false, "received_lsn": 1, "durable_lsn": 1,
                "applied_lsn": 1, "lag_records": 0, "lag_bytes": 0, "lag_seconds": 0.0004, "heard_seconds_ago": 0.2,
                "round_trip_seconds": 0.0001, "sent_bytes": 10u64 << 20, "verified": null,
            }],
            "lag": null, "verified": null, "unrepaired_bytes": 0, "refresh": null, "action": "none",
        }))
        .unwrap()
    }

    #[test]
    fn as_the_users_know_it() {
        assert_eq!(
            text(&sample(), None),
            "epic  PRIMARY db1  term 7  acks local  /dev/volrep/epic on /dev/vg0/epic  2.00 TiB\n \
             shadow db2  UpToDate  lag 0.4 ms, 0 records  sent 10.0 MiB (3.1x compressed)  journal 2% of 64.0 GiB\n \
             never verified\n\
             action: none"
        );
    }

    #[test]
    fn speeds_never_go_negative() {
        let s = sample();
        let t = Instant::now();
        let a = Rates::new(&s, t);
        let mut later = s.clone();
        later.peers[0].sent_bytes += 96 << 20;
        let b = Rates::new(&later, t + std::time::Duration::from_secs(1));
        assert!(text(&later, Some(&b.since(&a))).contains("sent 96.0 MiB/s"));
        assert!(b.since(&b).sent.is_empty());
        let c = Rates::new(&s, t + std::time::Duration::from_secs(2));
        assert!(c.since(&b).sent.is_empty());
    }

    #[test]
    fn volumes_of_a_group_have_lines_of_their_own() {
        let mut s = sample();
        s.volumes.push(VolumeStatus { name: "w".into(), size: 512, device: None, backing: None });
        let text = text(&s, None);
        assert!(text.contains("\n volume data  /dev/volrep/epic on /dev/vg0/epic  2.00 TiB\n"), "{text}");
        assert!(text.contains("\n volume w     not attached  512 B\n"), "{text}");
    }

    #[test]
    fn a_view_is_told() {
        let v = ViewStatus {
            kind: "scratch".into(),
            state: "Open".into(),
            lsn: Some(88_213_412),
            since: "2024-05-13T00:00:00Z".into(),
            overlay_bytes: 3 << 20,
            waiting_records: 1200,
            devices: vec!["/dev/volrep/epic.view".into()],
            ..ViewStatus::default()
        };
        let now = "2024-05-13T00:01:00Z".parse().unwrap();
        assert_eq!(
            viewed(&v, now),
            " scratch view  Open at LSN 88\u{2009}213\u{2009}412  for 60 s  3.00 MiB written  1\u{2009}200 records wait\n  \
             /dev/volrep/epic.view"
        );
        let read_only = ViewStatus { kind: "read-only".into(), ..v };
        assert!(!viewed(&read_only, now).contains("written"));
    }

    #[test]
    fn a_proof_has_an_age() {
        let v = Verified { at: "2024-05-01T00:00:00Z".into(), lsn: 88_213_412, differences: 0 };
        let now = "2024-05-13T00:00:00Z".parse().unwrap();
        assert_eq!(
            verified(Some(&v), now),
            " verified 12 d ago at LSN 88\u{2009}213\u{2009}412: 0 differences"
        );
        let odd = Verified { at: "yesterday".into(), ..v };
        assert!(verified(Some(&odd), now).contains("at yesterday"));
    }
}

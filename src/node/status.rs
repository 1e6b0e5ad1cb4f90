//! The state of a node as it is told: what `volrep status` prints, in either form.
//!
//! Owns: the names and units of the facts. Invariant: everything here was measured by the node
//! that says it, or says of whom it was heard.

use serde::{Deserialize, Serialize};

/// Rises when a field changes its meaning or goes away.
pub const SCHEMA_VERSION: u32 = 1;

/// What a node can say of itself.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The group's name.
    pub group: String,
    /// The node's name.
    pub node: String,
    /// "primary" or "shadow".
    pub role: String,
    /// Primary: "Recovering", "UpToDate", "Blocked" or "Failed". Shadow: "Recovering", "UpToDate",
    /// "CatchingUp", "Outdated", "Resyncing", "Inconsistent", "Diverged" or "Failed".
    pub state: String,
    /// Why, when the state is not UpToDate.
    pub reason: Option<String>,
    /// Term counter.
    pub term: u64,
    /// "local" or "durable".
    pub ack_level: String,
    /// Names or ids of the sync set's members.
    pub sync_set: Vec<String>,
    /// Volumes.
    pub volumes: Vec<VolumeStatus>,
    /// Newest record in the journal.
    pub tail_lsn: u64,
    /// When that record was sealed, RFC 3339; null before the first.
    pub tail_time: Option<String>,
    /// Newest record durable here.
    pub durable_lsn: u64,
    /// Newest record in the backing (as reads see it).
    pub applied_lsn: u64,
    /// Newest record that the backing holds durably: redo starts after it.
    pub checkpoint_lsn: u64,
    /// Journal bytes in use.
    pub journal_used: u64,
    /// Journal bytes altogether.
    pub journal_size: u64,
    /// Write cache bytes in use (primary).
    pub cache_used: u64,
    /// Write cache bytes altogether.
    pub cache_size: u64,
    /// Bytes accepted from the application since the start.
    pub written_bytes: u64,
    /// Bytes of records since the start, as they go over each link.
    pub record_bytes: u64,
    /// One per peer. On a primary: its shadows; on a shadow: its primary.
    pub peers: Vec<PeerStatus>,
    /// On a shadow: its lag behind its primary, measured here.
    pub lag: Option<Lag>,
    /// When the shadow was last proved identical, RFC 3339, and at which LSN; not yet: null.
    pub verified: Option<Verified>,
    /// What the administrator should do now; "none" most of the time.
    pub action: String,
}

/// A proof that a shadow was identical.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Verified {
    /// RFC 3339.
    pub at: String,
    /// At which LSN.
    pub lsn: u64,
    /// Differences found (and repaired, if it was a refresh).
    pub differences: u64,
}

/// A volume.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// The path of its device or its NBD URI, once attached.
    pub device: Option<String>,
    /// The path of its backing.
    pub backing: Option<String>,
}

/// A peer, as this node knows it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its name.
    pub name: String,
    /// "UpToDate", "CatchingUp", "Disconnected", "Resync" (needs one), "Diverged".
    pub state: String,
    /// Why, when not UpToDate.
    pub reason: Option<String>,
    /// In the sync set.
    pub sync: bool,
    /// Last record it received.
    pub received_lsn: u64,
    /// Last record durable in its journal.
    pub durable_lsn: u64,
    /// Last record in its image.
    pub applied_lsn: u64,
    /// Records not applied there.
    pub lag_records: u64,
    /// Journal bytes not applied there.
    pub lag_bytes: u64,
    /// Seconds from the seal of the oldest record not applied there until now; 0 when none.
    pub lag_seconds: f64,
    /// Seconds since it was last heard; null if never.
    pub heard_seconds_ago: Option<f64>,
    /// Round trip of the last heartbeat, seconds.
    pub round_trip_seconds: Option<f64>,
    /// Bytes of records sent to it since the start.
    pub sent_bytes: u64,
}

/// Lag, from seal on the primary to each stage here, by the heartbeat clock.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Lag {
    /// Records counted since the start.
    pub count: u64,
    /// To received, seconds.
    pub received: Quantiles,
    /// To durable, seconds.
    pub durable: Quantiles,
    /// To applied, seconds: the headline.
    pub applied: Quantiles,
    /// Records that the primary has sealed (as far as heard) and this shadow has not applied.
    pub records: u64,
    /// Their journal bytes, as far as known.
    pub bytes: u64,
    /// Seconds since the oldest of them was sealed; 0 when none. While the primary is silent, at least
    /// the seconds since it was heard.
    pub seconds: f64,
    /// Difference of the clocks (primary minus shadow) that was taken off, seconds.
    pub clock_offset: f64,
}

/// Of a distribution, in seconds.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Quantiles {
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

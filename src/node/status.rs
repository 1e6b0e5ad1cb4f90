//! The state of a node as it is told: what `volrep status` prints, in either form.
//!
//! Owns: the names and units of the facts. Invariant: everything here was measured by the node
//! that says it, or says of whom it was heard.

use crate::format::superblock;
use crate::units::MILLIS;
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
    /// "CatchingUp", "Outdated", "Resyncing", "Inconsistent" or "Failed". Either: "Diverged". A
    /// primary over which another was promoted: "Retiring", then, as a shadow, "Retired".
    pub state: String,
    /// Why, when the state is not UpToDate.
    pub reason: Option<String>,
    /// Term counter.
    pub term: u64,
    /// "local" or "durable".
    pub ack_level: String,
    /// Names or ids of the sync set's members.
    pub sync_set: Vec<String>,
    /// On a shadow: "member" (on the primary's word to this very process it holds all that was acknowledged), "outdated"
    /// (it was lost as a member, and lacks what was acknowledged since), or null: nobody knows.
    #[serde(default)]
    pub standing: Option<String>,
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
    /// On a primary that serves already: records that are still to go from the journal into the backing.
    #[serde(default)]
    pub drain_records: u64,
    /// Their bytes in the journal.
    #[serde(default)]
    pub drain_bytes: u64,
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
    /// Bytes written to the journal since the start, or since it was last cut or begun anew: records, their padding,
    /// segments' headers.
    #[serde(default)]
    pub journal_bytes: u64,
    /// One per peer. On a primary: its shadows; on a shadow: its primary, and the shadows that follow it.
    pub peers: Vec<PeerStatus>,
    /// On a shadow: its lag behind its primary, measured here.
    pub lag: Option<Lag>,
    /// On a shadow that holds its image back: that.
    #[serde(default)]
    pub apply_delay: Option<DelayStatus>,
    /// On a shadow: what is known of the primary, which it may follow through other shadows.
    #[serde(default)]
    pub primary: Option<PrimaryStatus>,
    /// On a shadow: when it was last proved identical, RFC 3339, and at which LSN; not yet: null.
    pub verified: Option<Verified>,
    /// On a shadow: bytes that the last comparison found to differ, and that nobody has repaired.
    pub unrepaired_bytes: u64,
    /// The comparison that is under way, or the last one since the start.
    pub refresh: Option<RefreshStatus>,
    /// On a shadow: the view of it that is open.
    pub view: Option<ViewStatus>,
    /// What the administrator should do now; "none" most of the time.
    pub action: String,
}

/// The primary, as a shadow knows it.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct PrimaryStatus {
    /// Its name, if that was told since the start.
    pub name: Option<String>,
    /// It is connected here, or to the shadow through which it is followed.
    pub connected: bool,
    /// Seconds since it was heard, here or by that shadow; null if never since the start.
    pub heard_seconds_ago: Option<f64>,
    /// The shadow through which it is followed.
    pub through: Option<String>,
}

/// A view of a shadow.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ViewStatus {
    /// "read-only" or "scratch".
    pub kind: String,
    /// "Opening", "Open", "Closing" or "Failed" (its users get errors, and records are applied again).
    pub state: String,
    /// Why it failed.
    pub reason: Option<String>,
    /// The record whose image it shows, while it is open.
    pub lsn: Option<u64>,
    /// Since when, RFC 3339.
    pub since: String,
    /// Bytes of the volumes that were written in it, and lie in its overlay.
    pub overlay_bytes: u64,
    /// Records here that are not in the image.
    pub waiting_records: u64,
    /// Its devices or NBD URIs, in the order of the volumes.
    pub devices: Vec<String>,
}

/// An image that is held back on purpose.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DelayStatus {
    /// By so many seconds, as configured.
    pub seconds: f64,
    /// "Held", "Shortened" (the journal is too small) or "Suspended" (a comparison needs the newest image).
    pub state: String,
    /// Why, when not Held.
    pub reason: Option<String>,
    /// Seconds that the oldest record not in the image has been held; 0 when there is none.
    pub held_seconds: f64,
    /// `promote --at` can choose from here: the newest record in the image.
    pub window_from_lsn: u64,
    /// When that was sealed, RFC 3339; or, if that is not known (after a start), a time not after the seal of the
    /// first record that is held; null when there is none.
    pub window_from_time: Option<String>,
    /// To here: the newest record in the journal.
    pub window_to_lsn: u64,
    /// When that was sealed, RFC 3339.
    #[serde(default)]
    pub window_to_time: Option<String>,
}

/// A mark: a named place in the write order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MarkStatus {
    /// Its text.
    pub text: String,
    /// Its record.
    pub lsn: u64,
    /// When it was sealed, RFC 3339.
    pub time: String,
    /// The chain hash of its record, hexadecimal: another history has another one at this LSN.
    pub hash: String,
}

/// A proof that a shadow was identical.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Verified {
    /// RFC 3339.
    pub at: String,
    /// At which LSN.
    pub lsn: u64,
    /// Bytes that differed then, and were repaired.
    pub differences: u64,
}

impl From<&superblock::Verified> for Verified {
    fn from(v: &superblock::Verified) -> Verified {
        let at = rfc3339(v.time).unwrap_or_default();
        Verified { at, lsn: v.lsn.0, differences: v.differences }
    }
}

/// Nanoseconds since 1970 as RFC 3339, to the millisecond; `None` for 0.
pub fn rfc3339(time: u64) -> Option<String> {
    let time = jiff::Timestamp::from_millisecond((time / MILLIS) as i64).ok().filter(|_| time > 0)?;
    Some(format!("{time:.3}"))
}

/// A comparison of a shadow with its primary. On the primary it is as its shadow last told.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct RefreshStatus {
    /// Number of the job; another number is another job.
    pub job: u64,
    /// The shadow's name.
    pub shadow: String,
    /// "refresh", "verify", "first copy" or "resync".
    pub cause: String,
    /// With the hash index.
    pub quick: bool,
    /// "Running", "Waiting" (for its peer; it goes on by itself), "Done", "Stopped" or "Failed".
    pub state: String,
    /// Why it waits or failed.
    pub reason: Option<String>,
    /// When it began, RFC 3339.
    pub started: String,
    /// Seconds that it has run; without the time that it waited for a connection.
    pub seconds: f64,
    /// Bytes to compare altogether.
    pub total: u64,
    /// Bytes compared (and repaired where that was needed).
    pub compared: u64,
    /// Bytes compared without being read, from the hash index.
    pub skipped: u64,
    /// Bytes in 4 KiB leaves that differed.
    pub differ: u64,
    /// Bytes repaired.
    pub repaired: u64,
    /// Bytes of the shadow's journal that were read again, once the volumes were done.
    pub journal_read: u64,
    /// Bytes of messages about it, both directions.
    pub wire: u64,
    /// Bytes a second over the last seconds.
    pub rate: f64,
    /// Seconds until the end at that rate; null when nobody can tell.
    pub eta: Option<f64>,
    /// What it waits for most of the time: "the primary's disk", "the shadow's disk", "the link", "the
    /// processor", "the rate limit", "writes to be applied".
    pub limited_by: Option<String>,
    /// Once done: the LSN at which the shadow was identical.
    pub lsn: Option<u64>,
    /// Ranges that differed, the first thousand.
    pub ranges: Vec<DifferentRange>,
    /// Ranges in which a node's disk returned other bytes than were written, as the hash index knows; those of
    /// the shadow's journal, as its own hashes know, have the volume "(journal)".
    pub rotten: Vec<DifferentRange>,
}

/// A range that differed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct DifferentRange {
    /// The volume's name.
    pub volume: String,
    /// Bytes from its start.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// When it was found, RFC 3339.
    pub found: String,
    /// The name of the node whose bytes were wrong, if that is known.
    pub node: Option<String>,
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
    /// Diverged, and a primary like this node: both were promoted.
    pub rival: bool,
    /// In the sync set.
    pub sync: bool,
    /// Lost as a member of the sync set, and not one again yet.
    #[serde(default)]
    pub outdated: bool,
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
    /// Seconds from the seal of the oldest record not applied there until now, less what it holds its image back on
    /// purpose, but no less than from that of the oldest one not durable there; 0 when none.
    pub lag_seconds: f64,
    /// Seconds by which it holds its image back on purpose.
    #[serde(default)]
    pub apply_delay_seconds: f64,
    /// Seconds since it was last heard; null if never.
    pub heard_seconds_ago: Option<f64>,
    /// Round trip of the last heartbeat, seconds.
    pub round_trip_seconds: Option<f64>,
    /// Bytes of records sent to it since the start.
    pub sent_bytes: u64,
    /// The histories have parted: the last LSN that both have; null when they have not, or nobody can tell.
    #[serde(default)]
    pub fork_lsn: Option<u64>,
    /// On a shadow: its records come from this peer, or came last, and it was then the "primary" or a "shadow".
    #[serde(default)]
    pub source: Option<String>,
    /// On a shadow: that shadow follows this one.
    #[serde(default)]
    pub follower: bool,
    /// On the node that it follows: when that shadow was last proved identical, as it told; not yet: null.
    pub verified: Option<Verified>,
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
    /// Seconds since the oldest of them was sealed, less the delay that is intended, but no less than since the oldest
    /// that is not durable here; 0 when none. While the primary does not say where it is, at least the seconds since
    /// it last did.
    pub seconds: f64,
    /// The same with the delay: how old the image is.
    #[serde(default)]
    pub total_seconds: f64,
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

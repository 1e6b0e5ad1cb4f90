//! What a node is told before its first event.
//!
//! Owns: the settings that machines see. Invariant: nothing here changes while the node lives.

use crate::units::{BootId, GroupId, MICROS, MILLIS, NodeId};

/// A volume of the group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeConfig {
    /// Its number.
    pub number: u8,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Smallest unit that the backing can be read and written in, bytes: 512 or 4096.
    pub block: u64,
}

/// Another node of the group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerConfig {
    /// Its name: what it calls itself in its identity.
    pub name: String,
    /// This node dials it while this node is a shadow.
    pub dial: bool,
    /// A FLUSH waits for it (once it is in the sync set).
    pub sync: bool,
    /// This node follows it even while it is a shadow.
    pub cascade: bool,
}

/// What a full journal does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FullPolicy {
    /// Throttle the writer until the slowest shadow has caught up.
    Block,
    /// Let the slowest shadow fall back to the dirty map.
    Behind,
}

/// When an epoch closes, and when a journal is synced, with nobody waiting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// Oldest write of an open epoch, ns.
    pub seal_after: u64,
    /// Payload bytes of an open epoch.
    pub seal_bytes: u64,
    /// Oldest unsynced record, ns.
    pub sync_after: u64,
    /// Between heartbeats, ns.
    pub heartbeat: u64,
    /// Silence after which a link is dead, ns.
    pub silence: u64,
    /// Between dials, ns.
    pub redial: u64,
    /// Oldest record not in the backing before write-back begins, ns.
    pub write_back_after: u64,
    /// Between checkpoints while there is something to checkpoint, ns.
    pub checkpoint_after: u64,
    /// How long a primary that starts waits for its peers' word that none was promoted meanwhile, ns.
    pub ask: u64,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            seal_after: MILLIS,
            seal_bytes: 64 << 10,
            sync_after: 5 * MILLIS,
            heartbeat: 500 * MILLIS,
            silence: 5_000 * MILLIS,
            redial: 250 * MILLIS,
            write_back_after: 200 * MILLIS,
            checkpoint_after: 5_000 * MILLIS,
            ask: 1_000 * MILLIS,
        }
    }
}

/// What [`NodeConfig::batch_bytes`] is, outside of tests.
pub const BATCH: u64 = 4 << 20;

/// The rest of what a node needs to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeConfig {
    /// The group's name.
    pub group_name: String,
    /// Group; must be the superblock's.
    pub group: GroupId,
    /// This node; must be the superblock's.
    pub node: NodeId,
    /// This node's name.
    pub name: String,
    /// Volumes, in order of their numbers; must be the superblock's.
    pub volumes: Vec<VolumeConfig>,
    /// Other nodes.
    pub peers: Vec<PeerConfig>,
    /// The group's shared key.
    pub key: [u8; 32],
    /// The kernel's boot id now.
    pub boot: BootId,
    /// Drawn at every start of the process: see [`crate::units::Generation::start`].
    pub salt: u32,
    /// What a full journal does.
    pub full: FullPolicy,
    /// The write cache was lost (not by a reboot) and its owner says to go on without it.
    pub accept_lost_cache: bool,
    /// How long a shadow holds each record back from its image, ns; 0: not at all.
    pub apply_delay: u64,
    /// Strongest zstd level used; `None`: never compress.
    pub level: Option<i32>,
    /// Records kept in memory for current shadows, bytes.
    pub feed_bytes: u64,
    /// Records sent to a shadow and not yet acknowledged as received, bytes.
    pub window_bytes: u64,
    /// Payload of records that go into the image together, bytes.
    pub batch_bytes: u64,
    /// Intervals.
    pub timing: Timing,
}

/// Bounds on [`Timing::seal_after`], for the configuration's check.
pub const SEAL_AFTER: std::ops::RangeInclusive<u64> = 50 * MICROS..=1_000 * MILLIS;

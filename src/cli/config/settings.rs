//! From a configuration to what a node and its daemon are told.
//!
//! Owns: the translation. Invariant: it asks the machine only for what a file can't know: the boot
//! id and the block size of each backing.

use super::{Config, KEY, OnFull, Span, TimingOverrides};
use crate::cli::backing;
use crate::cli::failure::{Exit, Failure};
use crate::cli::places::Places;
use crate::node::config::{BATCH, FullPolicy, NodeConfig, PeerConfig, Timing, VolumeConfig};
use crate::units::BootId;
use std::path::{Path, PathBuf};

impl Config {
    /// Where the journal lies.
    pub fn journal_file(&self, places: &Places, group: &str) -> PathBuf {
        self.journal.dir.clone().unwrap_or_else(|| places.state(group)).join("journal")
    }

    /// Bytes of the dirty maps' file.
    pub fn maps_len(&self) -> u64 {
        let volumes = self.volumes.iter().enumerate().map(|(number, v)| (number as u8, v.size.0));
        crate::journal::maps::maps_len(&volumes.collect::<Vec<_>>())
    }

    /// What a node is told.
    pub fn node_config(&self, group: &str, key: [u8; KEY]) -> Result<NodeConfig, Failure> {
        let peer = |p: &super::Peer| PeerConfig {
            name: p.name.clone(),
            dial: p.dials(),
            sync: p.sync,
            cascade: p.cascade,
        };
        Ok(NodeConfig {
            group_name: group.to_owned(),
            group: self.group,
            node: self.node_id,
            name: self.node.clone(),
            volumes: self.volume_configs()?,
            peers: self.peers.iter().map(peer).collect(),
            key,
            boot: boot_id()?,
            salt: u32::from_le_bytes(crate::sys::process::random()),
            full: match self.on_full {
                OnFull::Block => FullPolicy::Block,
                OnFull::Behind => FullPolicy::Behind,
            },
            accept_lost_cache: self.cache.accept_lost,
            apply_delay: self.apply_delay.nanos(),
            level: (self.compression > 0).then_some(self.compression),
            feed_bytes: self.link.feed.0,
            window_bytes: self.link.window.0,
            batch_bytes: BATCH,
            timing: self.timing.settle(),
        })
    }

    /// The volumes, each with its backing's block size.
    pub fn volume_configs(&self) -> Result<Vec<VolumeConfig>, Failure> {
        let volumes = self.volumes.iter().enumerate();
        volumes
            .map(|(number, v)| {
                Ok(VolumeConfig {
                    number: number as u8,
                    name: v.name.clone(),
                    size: v.size.0,
                    block: backing::block_size(&v.path, v.direct)?,
                })
            })
            .collect()
    }
}

impl TimingOverrides {
    fn settle(&self) -> Timing {
        let d = Timing::default();
        let ns = |given: Option<Span>, default| given.map_or(default, Span::nanos);
        Timing {
            seal_after: ns(self.seal_after, d.seal_after),
            seal_bytes: self.seal_bytes.map_or(d.seal_bytes, |s| s.0),
            sync_after: ns(self.sync_after, d.sync_after),
            heartbeat: ns(self.heartbeat, d.heartbeat),
            silence: ns(self.silence, d.silence),
            redial: ns(self.redial, d.redial),
            write_back_after: ns(self.write_back_after, d.write_back_after),
            checkpoint_after: ns(self.checkpoint_after, d.checkpoint_after),
            ask: ns(self.ask, d.ask),
        }
    }
}

/// The kernel's boot id.
pub fn boot_id() -> Result<BootId, Failure> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    let text = std::fs::read_to_string(path).map_err(|e| Failure::io("read", path, &e))?;
    super::unhex(&text.trim().replace('-', "")).ok_or_else(|| {
        Failure::new(
            Exit::Failure,
            format!("{} holds no boot id", path.display()),
            "is this Linux with /proc?",
        )
    })
}

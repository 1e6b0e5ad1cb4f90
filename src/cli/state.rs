//! A node's superblock, as a command reads it beside (or without) the daemon.
//!
//! Owns: that reading, and the first superblock of a node. Invariant: nothing here writes to a node
//! that exists.

use super::backing::Backing;
use super::config::Config;
use super::failure::{Exit, Failure};
use crate::format::message::Role;
use crate::format::record::origin;
use crate::format::superblock::{Anchor, SLOT, Superblock, Volume};
use crate::units::{Generation, HistoryPoint, Lsn, Term};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Reads the slot that stands.
pub fn read(path: &Path) -> Result<Superblock, Failure> {
    let file = File::open(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Failure::new(
            Exit::Failure,
            format!("the superblock {} is not there", path.display()),
            "the group may have been set up with other places: give the same --config, --state-dir or VOLREP_*",
        ),
        _ => Failure::io("open", path, &e),
    })?;
    let mut slots = [vec![0; SLOT], vec![0; SLOT]];
    for (i, slot) in slots.iter_mut().enumerate() {
        let read = file.read_exact_at(slot, (i * SLOT) as u64);
        read.map_err(|e| Failure::io("read", path, &e))?;
    }
    Superblock::choose([&slots[0], &slots[1]]).map(|(_, s)| s).map_err(|[a, b]| {
        let what = format!("{} is damaged: the first slot: {a}; the second: {b}", path.display());
        let next = "don't write to the volumes; look for a cause (disk errors in dmesg), and go on with another node \
                    of the group";
        Failure::new(Exit::Failure, what, next)
    })
}

/// Refuses a superblock that is not this configuration's.
pub fn check(s: &Superblock, config: &Config, path: &Path) -> Result<(), Failure> {
    let wrong = |what: String| {
        let what = format!("{} does not belong to this configuration: {what}", path.display());
        Err(Failure::new(
            Exit::WouldLoseData,
            what,
            "restore the configuration or the state that goes with it",
        ))
    };
    if s.group != config.group || s.node != config.node_id {
        return wrong(format!("it is of group {:?}, node {:?}", s.group, s.node));
    }
    if s.geometry != config.journal.geometry() {
        let g = s.geometry;
        return wrong(format!("its journal has {} segments of {} bytes", g.segments, g.segment));
    }
    let volumes = config.volumes.iter().map(|v| (v.name.as_str(), v.size.0));
    if !s.volumes.iter().map(|v| (v.name.as_str(), v.size)).eq(volumes) {
        let list: Vec<String> = s.volumes.iter().map(|v| format!("{} ({} bytes)", v.name, v.size)).collect();
        return wrong(format!("its volumes are {}", list.join(", ")));
    }
    Ok(())
}

/// The superblock of a node that has no history yet.
pub fn first(config: &Config, backings: &[Backing], role: Role, blank: bool) -> Superblock {
    let volume =
        |(number, b): (usize, &Backing)| Volume { number: number as u8, size: b.size, name: b.name.clone() };
    Superblock {
        sequence: 1,
        group: config.group,
        node: config.node_id,
        role,
        term: match role {
            Role::Primary => Term { counter: 1, node: config.node_id },
            Role::Shadow => Term::default(),
        },
        generation: Generation::default(),
        checkpoint: HistoryPoint { lsn: Lsn(0), hash: origin(config.group) },
        checkpoint_write: 0,
        checkpoint_generation: Generation::default(),
        checkpoint_segment: 1,
        base: Anchor::default(),
        base_segment: 1,
        floor: Lsn(0),
        limit: Lsn(0),
        blank,
        clean: true,
        consistent: blank || role == Role::Primary,
        cache_boot: [0; 16],
        geometry: config.journal.geometry(),
        volumes: backings.iter().enumerate().map(volume).collect(),
        openings: Vec::new(),
        sync_set: Vec::new(),
        outdated: Vec::new(),
        peers: Vec::new(),
        maps_id: 0,
        retired: None,
        handed: None,
        resync: None,
        comparison: None,
        verified: None,
        unrepaired: 0,
        redo: None,
        cut: None,
        maps: Vec::new(),
    }
}

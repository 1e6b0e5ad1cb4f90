//! One node of one consistency group: the sole owner of its machines.
//!
//! Owns: the order in which the machines see things. Invariant: a node is a function of its
//! configuration, its two memories, its files, and the sequence of (now, event).

pub mod config;
pub mod event;
pub mod status;

use crate::disk::Memory;
use crate::units::Now;
use config::NodeConfig;
use event::{Actions, Event};

/// A node. Feed it events; do what it asks.
pub struct Node {
    _todo: (),
}

impl Node {
    /// A node over its write cache and its dirty maps. The shell holds the locks of all files before
    /// this. `ring` is all zeroes when new; it is taken up if it belongs to this group and boot.
    pub fn new(_config: NodeConfig, _ring: Option<Box<dyn Memory>>, _maps: Box<dyn Memory>) -> Node {
        Node { _todo: () }
    }

    /// Begins recovery; call once, before the first `step`.
    pub fn start(&mut self, _now: Now, _actions: &mut Actions) {}

    /// Takes one event, and says what to do.
    pub fn step(&mut self, _now: Now, _event: Event, _actions: &mut Actions) {}
}

//! What a long run has met: each fault, each state of a node and each change between two.
//!
//! Owns: the list of what has to be met. Invariant: a run of many seeds that never met one of them fails, so that
//! a fault which no plan draws any more, or a state that nothing leads to, is noticed.

use crate::plan::FAULTS;
use crate::world::{Counts, World};
use std::collections::BTreeSet;
use volrep::node::status::Status;

/// So many seeds meet everything.
pub const ENOUGH: u64 = 2000;

/// What else has to be met, beside every fault.
const MET: &[&str] = &[
    "serves while it drains",
    "read through the journal",
    "written while a primary drains",
    "death while a primary drains",
    "detached while it drains",
    "view at a mark",
    "view at a time",
    "view at a record",
    "view of what is not in the image",
    "outdated",
    "Lease",
    "an outdated member is one again",
    "promotion of an outdated member refused",
    "promoted as one that holds everything",
];

impl World {
    /// A node is in this state now.
    pub fn note_state(&mut self, node: usize, s: &Status) {
        if s.drain_records > 0 {
            self.counts.met("serves while it drains");
        }
        let now = format!("{} {}", s.role, s.state);
        let before = self.hosts[node].watch.state.replace(now.clone());
        if let Some(before) = before.filter(|b| *b != now) {
            self.counts.met(&format!("state: {before} -> {now}"));
        }
    }
}

/// What was never met.
pub fn missing(total: &Counts) -> Vec<String> {
    let faults = FAULTS.iter().map(|f| format!("{f:?}"));
    let all = faults.chain(MET.iter().map(|m| (*m).to_owned()));
    all.filter(|name| !total.met.contains_key(name)).collect()
}

/// How many faults of each kind, how many states and changes of state.
pub fn summary(total: &Counts) -> String {
    let kinds = FAULTS.iter().filter(|f| total.met.contains_key(&format!("{f:?}"))).count();
    let changes: Vec<_> =
        total.met.keys().filter_map(|k| k.strip_prefix("state: ")?.split_once(" -> ")).collect();
    let states: BTreeSet<_> = changes.iter().flat_map(|(a, b)| [*a, *b]).collect();
    let resync = total.met.keys().filter(|k| k.starts_with("resync: ")).count();
    format!(
        "covered: {kinds} of {} kinds of faults, {} states with {} changes between them, {resync} steps of resyncs",
        FAULTS.len(),
        states.len(),
        changes.len()
    )
}

//! The superblock of a running node: what it should be, and what of it is durable.
//!
//! Owns: the two slots and the order of their writes. Invariant: one write in flight, to the slot
//! that does not hold the newest durable state; each with RWF_DSYNC, so its completion is durable.

use crate::disk::{DiskOp, DiskRequest, DiskResult, File, IoError, Token};
use crate::format::superblock::{SLOT, Superblock};

/// See the module's documentation.
pub struct Meta {
    /// The state wanted. Change it, then [`Meta::save`].
    pub sb: Superblock,
    owner: u8,
    slot: usize,
    started: u64,
    completed: u64,
    target: u64,
}

/// A state was saved when [`Meta::is_saved`] says so of its ticket.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ticket(u64);

impl Meta {
    /// Goes on from what slot `slot` holds. `owner` marks its requests' tokens.
    pub fn new(owner: u8, sb: Superblock, slot: usize) -> Meta {
        Meta { sb, owner, slot: 1 - slot, started: 0, completed: 0, target: 0 }
    }

    /// Asks that the state as it is now be written: to one slot, or to both in turn.
    pub fn save(&mut self, both: bool) -> Ticket {
        let ticket = self.started + if both { 2 } else { 1 };
        self.target = self.target.max(ticket);
        Ticket(ticket)
    }

    /// Whether the state at that time is durable.
    pub fn is_saved(&self, ticket: Ticket) -> bool {
        self.completed >= ticket.0
    }

    /// Submits the next write, if one is wanted and none is in flight.
    pub fn pump(&mut self, out: &mut Vec<DiskRequest>) {
        if self.started > self.completed || self.started >= self.target {
            return;
        }
        self.started += 1;
        self.sb.sequence += 1;
        let op = DiskOp::Write { offset: (self.slot * SLOT) as u64, data: self.sb.encode(), dsync: true };
        self.slot = 1 - self.slot;
        out.push(DiskRequest { token: Token::new(self.owner, 0), file: File::Superblock, op });
    }

    /// The answer to its write.
    pub fn complete(&mut self, result: DiskResult) -> Result<(), IoError> {
        result?;
        self.completed = self.started;
        Ok(())
    }
}

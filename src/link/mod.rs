//! The link between nodes: who may follow whom from where, what is in flight, how late it is.
//!
//! Owns: the handshake's decision table, the search for a common past, the bookkeeping of what was sent and acknowledged, the
//! checks on what is received, the estimate of the other's clock. Invariants: a record is accepted
//! only as the exact continuation of what is held (I7); a position, once told, never falls within a
//! generation (I5).

pub mod boundary;
pub mod handshake;
pub mod lag;
pub mod receiver;
pub mod sender;

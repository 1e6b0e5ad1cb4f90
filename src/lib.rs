//! volrep replicates block volumes, for any database, in write order, to shadows at a distance.
//!
//! # Code map
//! Imports point down only; `tests/tidy.rs` checks it.
//! - layer 3, the shell (clocks, descriptors, threads, unsafe): [`cli`] one file per verb, [`daemon`]
//!   the group's event loop, [`control`] the admin socket, [`front`] the kernel's NBD driver, NBD and FUSE, [`sys`] the ring,
//!   disks, sockets and memory
//! - layer 2, composition: [`node`], the sole owner of one group's machines: `Node::step(now, event)`
//! - layer 1, machines (events in, actions out; they never import each other): [`cache`] the ring of
//!   accepted writes, [`journal`] append, recovery, dirty maps, [`link`] handshake and bookkeeping,
//!   [`apply`] into the backing or the stage, [`resync`] comparing and repairing images, [`role`] terms and promotion
//! - layer 0, vocabulary: [`units`], [`disk`], [`extents`], [`format`]
//!
//! # What is absent
//! No clock, file, socket or thread below layer 3: a node is a function of its configuration, its
//! files and its events, which is what lets `tests/sim` repeat any run from a seed. No lock in the
//! data path: one thread owns a group. No retry of a failed write or sync: it latches.
//!
//! # Invariants
//! I1 prefix, I2 order, I3 local durability, I4 remote durability, I5 lag is never under-reported,
//! I6 what was read never reverts, I7 terms and exact continuation, I8 nothing under an ended term,
//! I9 equality is proved from data, I10 failures latch, I11 replays are idempotent, I12 nothing with a
//! bad checksum is applied or served, I13 bad input is refused without loss. Each module names those
//! that it keeps; `tests/sim` checks them by these names.
#![warn(missing_docs)]
#![deny(clippy::disallowed_methods)]

pub mod apply;
pub mod cache;
pub mod cli;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod extents;
pub mod format;
pub mod front;
pub mod journal;
pub mod link;
pub mod node;

pub mod resync;
pub mod role;
pub mod sys;
pub mod units;

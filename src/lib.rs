//! volrep replicates block volumes, for any database, in write order, to shadows at a distance.
//!
//! # Code map
//! Imports point down only; `tests/tidy.rs` checks it.
//! - layer 3, the shell (clocks, descriptors, threads, unsafe): [`cli`], [`daemon`], [`control`],
//!   [`front`], [`sys`]
//! - layer 2, composition: [`node`]
//! - layer 1, machines (events in, actions out; they never import each other): [`apply`], [`cache`],
//!   [`journal`], [`link`], [`resync`], [`role`]
//! - layer 0, vocabulary: [`units`], [`disk`], [`extents`], [`format`]
#![warn(missing_docs)]

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
pub mod role;
pub mod sys;
pub mod units;

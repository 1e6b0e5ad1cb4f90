//! The shapes of the daemon's boundary.
//!
//! Owns: nothing yet. Invariant: these are the contract's names.
#![allow(missing_docs)]

use crate::disk::IoError;
use crate::front::Submit;
use crate::front::nbd::Export;
use crate::node::config::NodeConfig;
use crate::node::event::{AdminOp, Answer, Op};
use bytes::Bytes;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

pub struct BackingPath {
    pub number: u8,
    pub path: PathBuf,
    pub direct: bool,
}

pub struct DaemonOptions {
    pub config: NodeConfig,
    pub superblock: PathBuf,
    pub journal: PathBuf,
    pub dirty_maps: PathBuf,
    pub cache: PathBuf,
    pub cache_bytes: u64,
    pub backings: Vec<BackingPath>,
    pub listen: Option<SocketAddr>,
    pub dial: Vec<Option<String>>,
    pub workers: usize,
}

#[derive(Debug, thiserror::Error)]
#[error("this build has no daemon")]
pub struct Error;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListenId(pub u64);

#[derive(Clone)]
pub struct Handle;

impl Handle {
    pub fn admin(&self, _op: AdminOp, _done: Box<dyn FnOnce(Answer) + Send>) {}
    pub fn listen_nbd(&self, _listener: UnixListener, _exports: Vec<Export>) -> ListenId {
        ListenId(0)
    }
    pub fn close_nbd(&self, _id: ListenId) {}
    pub fn stop(&self) {}
}

impl Submit for Handle {
    fn submit(&self, _op: Op, _done: Box<dyn FnOnce(Result<Bytes, IoError>) + Send>) {}
}

pub fn run(_options: DaemonOptions, _ready: impl FnOnce(Handle)) -> Result<(), Error> {
    Err(Error)
}

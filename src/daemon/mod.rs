//! Runs one group: a [`Node`] on one thread with one io_uring.
//!
//! Owns: opening and locking everything a node works on, and the loop that feeds it. Invariant: all
//! locks are held before the node sees its first byte, until the kernel has finished with the last.
#![allow(clippy::disallowed_methods, reason = "the shell: it reads the clocks and starts the workers")]

mod acceptor;
mod clients;
mod encoders;
mod farewell;
mod frames;
mod handle;
pub mod history;
mod links;
mod reactor;
mod salvage;
mod stage;
mod ublk;

pub use handle::{Handle, ListenId};

use crate::disk::File;
use crate::format::superblock::SLOT;
use crate::node::config::NodeConfig;
use crate::node::{Memories, Node};
use crate::resync::index::index_len;
use crate::sys::disk::Disk;
use crate::sys::mmap::Mapping;
use crate::sys::open::{OpenError, OpenFile, check_distinct, measure, open};
use crate::sys::uring::Fd;
use crate::sys::wake::Waker;
use crate::sys::{net, process};
use history::HistoryFile;
use links::Links;
use reactor::{Parts, Reactor};
use salvage::SalvageFiles;
use stage::{StageFiles, Staged};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long the requests of a killed predecessor may keep the files locked.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a volume's bytes are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackingPath {
    /// The volume's number.
    pub number: u8,
    /// A regular file or a block device.
    pub path: PathBuf,
    /// With O_DIRECT, where the file system has it.
    pub direct: bool,
}

/// What a running group needs to know beyond its node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DaemonOptions {
    /// For the node.
    pub config: NodeConfig,
    /// Superblock file.
    pub superblock: PathBuf,
    /// Journal file. The stage of a resync is made next to it.
    pub journal: PathBuf,
    /// Dirty maps file; made here if it is not there.
    pub dirty_maps: PathBuf,
    /// Bytes of the dirty maps file: `journal::maps::maps_len` of the volumes.
    pub dirty_maps_bytes: u64,
    /// Hash index file; made here if it is not there.
    pub hash_index: PathBuf,
    /// Directory of salvage files; made when it is needed.
    pub salvage: PathBuf,
    /// File of what has befallen this node; made when it is needed.
    pub history: PathBuf,
    /// Write cache file; made here if it is not there.
    pub cache: PathBuf,
    /// Bytes of the write cache file: `cache::ring_len` of its payload.
    pub cache_bytes: u64,
    /// Bytes that the journal was made with.
    pub journal_bytes: u64,
    /// Backings, one per volume.
    pub backings: Vec<BackingPath>,
    /// Where peers connect.
    pub listen: Option<SocketAddr>,
    /// host:port of each peer, in the order of `config.peers`; `None` where it is not dialled.
    pub dial: Vec<Option<String>>,
    /// Threads for large compression jobs; with 0 the loop does them.
    pub workers: usize,
}

/// Why a group does not run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file can't be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A volume has no backing.
    #[error("volume {0} has no backing: name one in the configuration")]
    NoBacking(String),
    /// The address for peers can't be had.
    #[error(
        "can't listen for peers on {address}: {source}. If another program listens there (`ss -ltnp` names it), choose another address with `listen` in the configuration"
    )]
    Listen {
        /// It.
        address: SocketAddr,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The journal is shorter than it was made.
    #[error(
        "{} has {has} bytes and must have {needed}: its end is missing, so records are. Nothing was changed; \
         restore the file, or join this node anew as a shadow of another node",
        path.display()
    )]
    Cut {
        /// The journal.
        path: PathBuf,
        /// Its size.
        has: u64,
        /// What it was made with.
        needed: u64,
    },
    /// No ring, or it broke.
    #[error("io_uring: {0} (Linux 5.19 is needed, and sysctl kernel.io_uring_disabled = 0)")]
    Ring(io::Error),
    /// No thread.
    #[error("can't start a thread: {0}")]
    Thread(io::Error),
    /// The node can't go on.
    #[error("{0}")]
    Stopped(String),
}

/// Runs a group on the calling thread until `stop`, or an error. `ready` is called once, before the
/// loop begins; its handle works from any thread.
pub fn run(options: DaemonOptions, ready: impl FnOnce(Handle)) -> Result<(), Error> {
    let paths =
        [&options.superblock, &options.journal, &options.dirty_maps, &options.hash_index, &options.cache];
    let paths: Vec<&Path> =
        paths.into_iter().chain(options.backings.iter().map(|b| &b.path)).map(PathBuf::as_path).collect();
    check_distinct(&paths)?;
    let files = open_files(&options)?;
    // Lost ones are made anew: they prove nothing then, and whoever needs them compares everything.
    let maps = Mapping::open_or_create(&options.dirty_maps, options.dirty_maps_bytes, PATIENCE)?;
    let index = hash_index(&options)?;
    let cache = Mapping::open_or_create(&options.cache, options.cache_bytes, PATIENCE)?;
    if !cache.lock_in_memory() {
        tracing::info!(
            "the write cache may be swapped out: raise the limit on locked memory (LimitMEMLOCK) to prevent it"
        );
    }
    process::give_back_freed_memory();
    if !process::lock_memory() {
        tracing::debug!("memory is not locked: that needs root");
    }
    if !process::become_io_flusher() {
        tracing::debug!("not an I/O flusher: CAP_SYS_RESOURCE is missing");
    }
    let mapped = [
        (File::DirtyMaps, as_file(&maps, &options.dirty_maps)?),
        (File::HashIndex, as_file(&index, &options.hash_index)?),
    ];
    let disk = Disk::new(files.into_iter().chain(mapped));
    let (listener, link_address) = listen(options.listen)?;
    let waker = Arc::new(Waker::new().map_err(Error::Ring)?);
    let (queue, commands) = crossbeam_channel::unbounded();
    let handle = Handle::new(queue, waker.clone(), link_address);
    let stage = stage_files(&options);
    let salvage = SalvageFiles::new(options.salvage.clone());
    let history = HistoryFile::start(options.history.clone())
        .map_err(|e| Error::Open(OpenError::io("read", &options.history, e)))?;
    let memories = Memories { ring: Some(Box::new(cache)), maps: Box::new(maps), index: Box::new(index) };
    let machine = Node::new(options.config, memories);
    let links = Links::new(listener, options.dial);
    let workers = options.workers;
    let reactor =
        Reactor::new(Parts { machine, disk, stage, salvage, history, links, workers, waker, commands })?;
    ready(handle);
    reactor.run()
}

fn open_files(options: &DaemonOptions) -> Result<Vec<(File, OpenFile)>, Error> {
    let superblock = open(&options.superblock, true, PATIENCE)?;
    superblock.at_least(2 * SLOT as u64)?;
    let journal = open(&options.journal, true, PATIENCE)?;
    if journal.size < options.journal_bytes {
        let (path, needed) = (options.journal.clone(), options.journal_bytes);
        return Err(Error::Cut { path, has: journal.size, needed });
    }
    let mut files = vec![(File::Superblock, superblock), (File::Journal, journal)];
    for volume in &options.config.volumes {
        let backing = options.backings.iter().find(|b| b.number == volume.number);
        let backing = backing.ok_or_else(|| Error::NoBacking(volume.name.clone()))?;
        let file = open(&backing.path, backing.direct, PATIENCE)?;
        file.at_least(volume.size)?;
        file.addresses(volume.block)?;
        files.push((File::Backing(volume.number), file));
    }
    Ok(files)
}

fn stage_files(options: &DaemonOptions) -> StageFiles {
    let direct = |number| options.backings.iter().any(|b| b.number == number && b.direct);
    let volumes = options.config.volumes.iter().map(|v| {
        let (number, size, block) = (v.number, v.size, v.block);
        Staged { number, size, block, direct: direct(number) }
    });
    StageFiles::new(options.journal.clone(), volumes.collect())
}

/// The hash index; one that is missing, or was made for other volumes, is made anew and knows nothing.
fn hash_index(options: &DaemonOptions) -> Result<Mapping, Error> {
    let volumes: Vec<_> = options.config.volumes.iter().map(|v| (v.number, v.size)).collect();
    let (path, len) = (&options.hash_index, index_len(&volumes));
    match Mapping::open_unread(path, len, PATIENCE) {
        Err(OpenError::Missing { .. } | OpenError::Length { .. }) => {
            Mapping::create(path, len).map_err(|e| OpenError::io("create", path, e))?;
            Ok(Mapping::open_unread(path, len, PATIENCE)?)
        }
        other => Ok(other?),
    }
}

/// A mapped file, to be synced.
fn as_file(mapping: &Mapping, path: &Path) -> Result<OpenFile, Error> {
    let file = mapping.file().map_err(|e| OpenError::io("open", path, e))?;
    Ok(measure(file, path, false)?)
}

fn listen(address: Option<SocketAddr>) -> Result<(Option<Fd>, Option<SocketAddr>), Error> {
    let Some(address) = address else { return Ok((None, None)) };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match net::listen_tcp(address) {
            Ok((fd, bound)) => return Ok((Some(fd), Some(bound))),
            // As with the locks: the accept of a killed process holds its socket until the kernel has
            // taken that process's ring apart, which it does after the process is gone.
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(net::RETRY);
            }
            Err(source) => return Err(Error::Listen { address, source }),
        }
    }
}

#[cfg(test)]
#[path = "opening_tests.rs"]
mod opening_tests;

//! The files of a new node.
//!
//! Owns: their creation. Invariant: either all of them stand, durably, the configuration last; or
//! none does: what was created before a failure or a signal is removed.

use super::backing::Backing;
use super::config::{Config, KEY, hex, render};
use super::failure::{Exit, Failure};
use super::interrupt;
use super::places::Places;
use super::progress::Progress;
use super::size::human;
use crate::format::superblock::{SLOT, Superblock};
use nix::fcntl::{FallocateFlags, Flock, FlockArg, fallocate};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Everything that a new node consists of.
pub struct Plan<'a> {
    /// The group's name.
    pub group: &'a str,
    /// Its configuration.
    pub config: &'a Config,
    /// The group's key.
    pub key: [u8; KEY],
    /// The superblock; its sequence is set here.
    pub superblock: Superblock,
    /// Its volumes.
    pub backings: &'a [Backing],
    /// Bytes of the dirty maps' file.
    pub maps_len: u64,
}

/// What was created so far; removed again unless kept.
#[derive(Default)]
struct Created {
    files: Vec<PathBuf>,
    dirs: Vec<PathBuf>,
    kept: bool,
}

impl Drop for Created {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        // Best effort: the failure that led here is what the user needs to hear.
        for file in self.files.iter().rev() {
            let _ = std::fs::remove_file(file);
        }
        for dir in self.dirs.iter().rev() {
            let _ = std::fs::remove_dir(dir);
        }
    }
}

impl Created {
    fn file(&mut self, path: &Path, mode: u32) -> Result<File, Failure> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(mode).open(path).map_err(|e| {
            match e.kind() {
                ErrorKind::AlreadyExists => {
                    let what = format!("{} is there already", path.display());
                    let next = "if it is left over from a group that is gone, remove it; otherwise choose another name";
                    Failure::new(Exit::Busy, what, next)
                }
                _ => Failure::io("create", path, &e),
            }
        })?;
        self.files.push(path.to_owned());
        Ok(file)
    }

    /// Creates a directory and those above it.
    fn dir(&mut self, path: &Path, mode: u32) -> Result<(), Failure> {
        let missing: Vec<&Path> = path.ancestors().take_while(|p| !p.exists()).collect();
        for dir in missing.into_iter().rev() {
            let mode = if dir == path { mode } else { 0o755 };
            DirBuilder::new().mode(mode).create(dir).map_err(|e| Failure::io("create", dir, &e))?;
            self.dirs.push(dir.to_owned());
        }
        Ok(())
    }

    fn sync_dirs(&self) -> Result<(), Failure> {
        let parents = self.files.iter().chain(&self.dirs).filter_map(|p| p.parent());
        let mut dirs: Vec<&Path> = parents.collect();
        dirs.sort();
        dirs.dedup();
        dirs.into_iter().try_for_each(sync_dir)
    }
}

fn sync_dir(dir: &Path) -> Result<(), Failure> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Failure::io("sync", dir, &e))
}

/// Keeps two set-ups apart; hold it from the first check to the end.
pub struct Alone {
    dir: PathBuf,
    made: bool,
    _lock: Flock<File>,
}

impl Drop for Alone {
    fn drop(&mut self) {
        if self.made {
            // Stays if it is not empty, that is: if the set-up succeeded.
            let _ = std::fs::remove_dir(&self.dir);
        }
    }
}

/// Locks the configurations' directory, and makes it if it is missing.
pub fn exclusive(places: &Places) -> Result<Alone, Failure> {
    let dir = places.config_dir();
    let made = !dir.exists();
    std::fs::create_dir_all(dir).map_err(|e| Failure::io("create", dir, &e))?;
    let file = File::open(dir).map_err(|e| Failure::io("open", dir, &e))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
        let what = format!("another volrep is setting up a group in {}", dir.display());
        Failure::new(Exit::Busy, what, "wait for it, and run this again")
    })?;
    Ok(Alone { dir: dir.to_owned(), made, _lock: lock })
}

/// Refuses the name of a group that is set up here, or of which something is left.
pub fn refuse_existing(places: &Places, group: &str) -> Result<(), Failure> {
    let config = places.config_file(group);
    if config.exists() {
        let what = format!("the group `{group}` is set up here already: {}", config.display());
        return Err(Failure::new(Exit::Busy, what, "choose another name, or other places with --config DIR"));
    }
    let superblock = places.superblock(group);
    if superblock.exists() {
        let what = format!("a group `{group}` has left its state behind: {}", superblock.display());
        let next = "restore its configuration, or remove that directory if its data is no longer needed";
        return Err(Failure::new(Exit::WouldLoseData, what, next));
    }
    places.check_sockets(group)
}

/// Creates all files.
pub fn provision(places: &Places, plan: &Plan) -> Result<(), Failure> {
    let mut created = Created::default();
    created.dir(places.config_dir(), 0o755)?;
    created.dir(&places.state(plan.group), 0o700)?;
    for b in plan.backings.iter().filter(|b| b.create) {
        let file = created.file(&b.path, 0o600)?;
        let sized = file.set_len(b.size).and_then(|()| file.sync_all());
        sized.map_err(|e| Failure::io("create", &b.path, &e))?;
        warn_if_sparse_may_fill(b);
    }
    let key = created.file(&places.config_dir().join(&plan.config.key_file), 0o600)?;
    write_whole(&key, format!("{}\n", hex(&plan.key)).as_bytes(), &plan.config.key_file)?;
    journal(places, plan, &mut created)?;
    let maps = places.dirty_maps(plan.group);
    zeroes(&created.file(&maps, 0o600)?, plan.maps_len, &maps, "preparing the dirty maps")?;
    superblock(places, plan, &mut created)?;
    created.sync_dirs()?;
    interrupt::check()?;
    configuration(places, plan, &mut created)?;
    created.kept = true;
    Ok(())
}

fn journal(places: &Places, plan: &Plan, created: &mut Created) -> Result<(), Failure> {
    let path = plan.config.journal_file(places, plan.group);
    if let Some(dir) = path.parent() {
        created.dir(dir, 0o700)?;
    }
    let file = created.file(&path, 0o600)?;
    let len = plan.config.journal.geometry().len();
    zeroes(&file, len, &path, "preparing the journal")
}

fn superblock(places: &Places, plan: &Plan, created: &mut Created) -> Result<(), Failure> {
    let path = places.superblock(plan.group);
    let file = created.file(&path, 0o600)?;
    zeroes(&file, 2 * SLOT as u64, &path, "preparing the superblock")?;
    for slot in 0..2u64 {
        let copy = Superblock { sequence: slot + 1, ..plan.superblock.clone() };
        let written = file.write_all_at(&copy.encode(), slot * SLOT as u64);
        written.map_err(|e| Failure::io("write", &path, &e))?;
    }
    file.sync_all().map_err(|e| Failure::io("write", &path, &e))
}

/// The last step: with the configuration's name in place the group exists.
fn configuration(places: &Places, plan: &Plan, created: &mut Created) -> Result<(), Failure> {
    let path = places.config_file(plan.group);
    let staged = path.with_extension("toml.new");
    // Nobody reads that name, and the caller keeps other set-ups away: one left by a crash is in the way only.
    let _ = std::fs::remove_file(&staged);
    let file = created.file(&staged, 0o644)?;
    write_whole(&file, render(plan.group, plan.config).as_bytes(), &staged)?;
    std::fs::rename(&staged, &path).map_err(|e| Failure::io("create", &path, &e))?;
    created.files.push(path);
    sync_dir(places.config_dir())
}

fn write_whole(mut file: &File, bytes: &[u8], path: &Path) -> Result<(), Failure> {
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| Failure::io("write", path, &e))
}

/// Writes `len` zero bytes: an append must never wait for an allocation, nor turn an unwritten extent
/// into a written one. A disk that is too small shows at once.
fn zeroes(file: &File, len: u64, path: &Path, label: &str) -> Result<(), Failure> {
    let fail = |e| Failure::io("create", path, &e);
    match fallocate(file, FallocateFlags::empty(), 0, len as i64) {
        Ok(()) | Err(nix::errno::Errno::EOPNOTSUPP) => {}
        Err(e) => return Err(fail(e.into())),
    }
    let chunk = vec![0; 1 << 20];
    let mut progress = Progress::new(label.to_owned(), len);
    let mut at = 0;
    while at < len {
        interrupt::check()?;
        let n = chunk.len().min((len - at) as usize);
        file.write_all_at(&chunk[..n], at).map_err(fail)?;
        at += n as u64;
        progress.at(at);
    }
    file.sync_all().map_err(fail)
}

fn warn_if_sparse_may_fill(b: &Backing) {
    let Some(dir) = b.path.parent() else { return };
    let Ok(fs) = nix::sys::statvfs::statvfs(dir) else { return };
    let free = fs.blocks_available() * fs.fragment_size();
    if free < b.size {
        eprintln!(
            "volrep: warning: {} is sparse: it may grow to {}, but its file system has {} free",
            b.path.display(),
            human(b.size),
            human(free)
        );
    }
}

//! What a measurement is to do, and whether there is room for it.
//!
//! Owns: the profiles and the choice of places. Invariant: making a plan changes nothing.

use super::Bench;
use super::load::{Fio, Target};
use crate::cache::ring_len;
use crate::cli::config::{Config, Journal};
use crate::cli::failure::{Exit, Failure};
use crate::cli::places::Places;
use crate::cli::size::{Size, exact, human};
use crate::control::Verb;
use crate::control::client::call;
use crate::node::status::SCHEMA_VERSION;
use crate::resync::index::index_len;
use crate::units::{BLOCK, MAX_VOLUME};
use serde_json::{Value, json};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What is run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Profile {
    /// PostgreSQL under many short transactions
    PgOltp,
    /// InterSystems IRIS: its journal, and a write daemon's bursts
    Iris,
    /// One stream of large writes
    Bulk,
    /// Seven reads for three writes, small and large
    Mixed,
}

impl Profile {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Profile::PgOltp => "pg-oltp",
            Profile::Iris => "iris",
            Profile::Bulk => "bulk",
            Profile::Mixed => "mixed",
        }
    }

    fn job_file(self) -> &'static str {
        match self {
            Profile::PgOltp => include_str!("../../../bench/profiles/pg-oltp.fio"),
            Profile::Iris => include_str!("../../../bench/profiles/iris-like.fio"),
            Profile::Bulk => include_str!("../../../bench/profiles/bulk.fio"),
            Profile::Mixed => include_str!("../../../bench/profiles/mixed.fio"),
        }
    }
}

/// Smallest scratch volume: a profile's parts are percents of it.
const SMALLEST: u64 = 64 << 20;
/// Largest journal that is made: what matters of a larger one is not its size.
const JOURNAL: u64 = 1 << 30;
/// Superblock, keys, logs.
const SMALL_FILES: u64 = 16 << 20;
/// Kept free on each file system: a twentieth of it, but no more than this.
const RESERVE: u64 = 10 << 30;

/// See the module's documentation.
pub struct Plan {
    /// The group that is measured.
    pub group: String,
    /// What is run.
    pub profile: Profile,
    /// For how long, on each target.
    pub seconds: u64,
    /// Bytes of the scratch volume.
    pub size: u64,
    /// The group's configuration.
    pub config: Config,
    /// Without the page cache, as the volume that is measured.
    pub direct: bool,
    /// The scratch journal.
    pub journal: Journal,
    /// The scratch directories: of the backing, of journal and configuration, of the sockets, of the write cache.
    pub disk: PathBuf,
    /// See `disk`.
    pub state: PathBuf,
    /// See `disk`.
    pub run: PathBuf,
    /// See `disk`.
    pub shm: PathBuf,
    /// The scratch directory of a shadow.
    pub shadow: Option<PathBuf>,
    /// A FLUSH waits for the shadow.
    pub sync: bool,
    /// The group's own daemon runs.
    pub live: bool,
}

impl Plan {
    /// What `bench` asks for.
    pub fn new(bench: &Bench, places: &Places, config: Config) -> Result<Plan, Failure> {
        let group = &bench.group;
        let (beside, direct) = disk(bench, &config)?;
        let journal_dir = config.journal_file(places, group);
        let journal_dir = journal_dir.parent().unwrap_or(Path::new("/"));
        let cache = config.cache.size.0;
        let size = bench.size.map_or((1 << 30).max(4 * cache), |s| s.0);
        if !(SMALLEST..=MAX_VOLUME).contains(&size) || !size.is_multiple_of(BLOCK) {
            let what =
                format!("--size {}: a scratch volume has from {} to 64P", exact(size), exact(SMALLEST));
            return Err(Failure::usage(what, "and a multiple of 4096 bytes"));
        }
        let beside_of = |path: PathBuf| path.parent().map(Path::to_owned).unwrap_or(path);
        let name = format!(".volrep-bench-{group}");
        let shadow = bench.shadow.as_deref().map(|dir| existing(dir, "--shadow")).transpose()?;
        let plan = Plan {
            group: group.clone(),
            profile: bench.profile,
            seconds: bench.seconds.unwrap_or(if bench.profile == Profile::Iris { 90 } else { 30 }),
            size,
            direct,
            journal: smaller(&config.journal),
            disk: beside.join(format!("{name}-volume")),
            state: existing(journal_dir, "the journal's directory")?.join(&name),
            run: beside_of(places.run(group)).join(&name),
            shm: beside_of(places.cache(group, config.node_id)).join(&name),
            shadow: shadow.map(|dir| dir.join(format!("{name}-shadow"))),
            sync: bench.sync,
            live: call(&places.control_socket(group), Verb::Status, Some(Duration::from_secs(5))).is_ok(),
            config,
        };
        if plan.disk.as_os_str().as_encoded_bytes().iter().any(|b| matches!(b, b':' | b'\\')) {
            let what =
                format!("{}: fio takes `:` and `\\` in a name for something else", plan.disk.display());
            return Err(Failure::usage(what, "name another directory on that disk with --dir"));
        }
        let longest = if plan.shadow.is_some() { plan.run.join("shadow") } else { plan.run.clone() };
        super::scratch::places(&plan.state, &longest, &plan.shm)?;
        Ok(plan)
    }

    /// fio's jobs. `direct=1` of the profiles gives way to what the group does.
    pub fn job_file(&self) -> String {
        let text = self.profile.job_file();
        if self.direct { text.to_owned() } else { text.replace("direct=1", "direct=0") }
    }

    /// What is needed, and in which scratch directory.
    fn needs(&self) -> Vec<(&Path, u64)> {
        let volumes = [(0, self.size)];
        let kept = crate::journal::maps::maps_len(&volumes) + index_len(&volumes) + SMALL_FILES;
        let journal = self.journal.geometry().len() + kept;
        let ring = ring_len(self.config.cache.size.0);
        let mut needs = vec![(&*self.disk, self.size), (&*self.state, journal), (&*self.shm, ring)];
        if let Some(shadow) = &self.shadow {
            needs.extend([(&**shadow, self.size + journal), (&*self.shm, ring)]);
        }
        needs
    }

    /// Refuses what would leave too little free.
    pub fn check_space(&self) -> Result<(), Failure> {
        for room in self.rooms()? {
            if room.need + room.reserve > room.free {
                let what = format!(
                    "not enough room on the file system of {}: {} are needed, {} are free, of which {} stay free",
                    room.at.display(),
                    human(room.need),
                    human(room.free),
                    human(room.reserve)
                );
                let next = "make room, give a smaller --size, or choose other places (--dir, --shadow)";
                return Err(Failure::new(Exit::Failure, what, next));
            }
        }
        Ok(())
    }

    /// What is needed, file system by file system.
    fn rooms(&self) -> Result<Vec<Room>, Failure> {
        let mut rooms: Vec<Room> = Vec::new();
        for (dir, need) in self.needs() {
            // Those of sockets and caches may not be there yet.
            let at = dir.ancestors().skip(1).find(|a| a.is_dir()).unwrap_or(Path::new("/"));
            let device = std::fs::metadata(at).map_err(|e| Failure::io("look at", at, &e))?.dev();
            match rooms.iter_mut().find(|r| r.device == device) {
                Some(room) => room.need += need,
                None => rooms.push(Room::at(at, device, need)?),
            }
        }
        Ok(rooms)
    }

    /// The plan for scripts.
    pub fn json(&self, fio: &Fio) -> Value {
        let commands = self.commands(fio);
        let room = |r: Room| json!({ "file_system_of": r.at, "needed": r.need, "free": r.free, "kept_free": r.reserve });
        json!({
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "dry_run": true,
            "profile": self.profile.name(),
            "seconds": self.seconds,
            "size": self.size,
            "direct": self.direct,
            "live_group_shares_its_disks": self.live,
            "directories": self.directories(),
            "journal_size": self.journal.geometry().len(),
            "compression": self.config.compression,
            "sync": self.sync,
            "space": self.rooms().unwrap_or_default().into_iter().map(room).collect::<Vec<_>>(),
            "fio": fio.version,
            "commands": commands,
        })
    }

    /// The plan for people.
    pub fn text(&self, fio: &Fio) -> String {
        let mut text = format!("{}\n", self.heading());
        text += &self.places_text();
        for room in self.rooms().unwrap_or_default() {
            let (need, free, at) = (human(room.need), human(room.free), room.at.display());
            text += &format!(" space    {need} of {free} free on the file system of {at}\n");
        }
        for command in self.commands(fio) {
            text += &format!(" run      {command}\n");
        }
        text += &format!(" with     {}\n", fio.version);
        text + "action: run it without --dry-run  (dry run: nothing was created)"
    }

    /// What is measured, in a line.
    pub fn heading(&self) -> String {
        let (size, seconds) = (human(self.size), self.seconds);
        let name = self.profile.name();
        format!("{}  {name}: {seconds} s on a bare file, then {seconds} s through volrep; {size}", self.group)
    }

    /// Where everything lies, a line each.
    pub fn places_text(&self) -> String {
        let how = if self.direct { "O_DIRECT" } else { "through the page cache, as the group's" };
        let mut text = format!(" file     {}, {how}\n", self.disk.display());
        let (journal, own) = (self.journal.geometry().len(), self.config.journal.geometry().len());
        let of = if journal == own { String::new() } else { format!(" (the group's: {})", human(own)) };
        let level = match self.config.compression {
            0 => "no compression".to_owned(),
            level => format!("zstd {level}"),
        };
        text += &format!(" journal  {}, {}{of}, {level}\n", self.state.display(), human(journal));
        if let Some(shadow) = &self.shadow {
            let how = if self.sync { "a FLUSH waits for it" } else { "asynchronous" };
            text += &format!(" shadow   {}, over loopback, {how}\n", shadow.display());
        }
        if self.live {
            text += " note     the group's daemon runs: it and the measurement share disks and processors\n";
        }
        text
    }

    /// The scratch directories.
    pub fn directories(&self) -> Vec<&Path> {
        let four = [&self.disk, &self.state, &self.run, &self.shm];
        four.into_iter().chain(&self.shadow).map(PathBuf::as_path).collect()
    }

    fn commands(&self, fio: &Fio) -> Vec<String> {
        let file = self.disk.join(super::scratch::VOLUME);
        let targets = [Target::Bare(&file), Target::Volrep("nbd+unix:///…")];
        targets.iter().map(|t| fio.line(self, t)).collect()
    }
}

/// A file system, and what is wanted of it.
struct Room {
    at: PathBuf,
    device: u64,
    need: u64,
    free: u64,
    reserve: u64,
}

impl Room {
    fn at(at: &Path, device: u64, need: u64) -> Result<Room, Failure> {
        let fs = nix::sys::statvfs::statvfs(at).map_err(|e| Failure::io("look at", at, &e.into()))?;
        let bytes = |blocks: u64| blocks.saturating_mul(fs.fragment_size());
        let reserve = (bytes(fs.blocks()) / 20).min(RESERVE);
        Ok(Room { at: at.to_owned(), device, need, free: bytes(fs.blocks_available()), reserve })
    }
}

/// The directory for the scratch file, and whether the page cache is gone around there.
fn disk(bench: &Bench, config: &Config) -> Result<(PathBuf, bool), Failure> {
    let volume = match &bench.volume {
        None => config.volumes.first(),
        Some(name) => config.volumes.iter().find(|v| v.name == *name),
    };
    let Some(volume) = volume else {
        let names: Vec<&str> = config.volumes.iter().map(|v| v.name.as_str()).collect();
        let what = format!("no volume `{}`", bench.volume.as_deref().unwrap_or_default());
        return Err(Failure::usage(what, format!("here are: {}", names.join(", "))));
    };
    if let Some(dir) = &bench.dir {
        return Ok((existing(dir, "--dir")?, volume.direct));
    }
    let path = &volume.path;
    let kind = std::fs::metadata(path).map_err(|e| Failure::io("look at", path, &e))?.file_type();
    if kind.is_block_device() {
        let what = format!(
            "volume `{}` is the block device {}: there is no file system beside it for a scratch file",
            volume.name,
            path.display()
        );
        let next = "name a directory on a comparable disk with --dir, for example on a volume of the same volume group";
        return Err(Failure::usage(what, next));
    }
    let path = path.canonicalize().map_err(|e| Failure::io("look at", path, &e))?;
    Ok((path.parent().unwrap_or(Path::new("/")).to_owned(), volume.direct))
}

fn existing(dir: &Path, what: &str) -> Result<PathBuf, Failure> {
    let found = dir.canonicalize().map_err(|e| Failure::io("use", dir, &e))?;
    if found.is_dir() {
        return Ok(found);
    }
    Err(Failure::usage(format!("{what}: {} is no directory", dir.display()), "name a directory"))
}

/// A journal like this one, and not larger than [`JOURNAL`].
fn smaller(journal: &Journal) -> Journal {
    let segment = journal.segment.0.min(JOURNAL / 4);
    let segments = u64::from(journal.segments).min((JOURNAL / segment).max(4)) as u32;
    Journal { dir: None, segment: Size(segment), segments }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_journal_is_like_the_groups_but_bounded() {
        let of = |segment: u64, segments| {
            let g = smaller(&Journal { dir: None, segment: Size(segment), segments }).geometry();
            (g.segment, g.segments)
        };
        assert_eq!(of(2 << 20, 4), (2 << 20, 4));
        assert_eq!(of(16 << 20, 64), (16 << 20, 64));
        assert_eq!(of(16 << 20, 4096), (16 << 20, 64));
        assert_eq!(of(1 << 40, 4), (256 << 20, 4));
    }

    #[test]
    fn every_profile_says_direct_and_leaves_the_target_open() {
        for profile in [Profile::PgOltp, Profile::Iris, Profile::Bulk, Profile::Mixed] {
            let text = profile.job_file();
            assert!(text.lines().any(|l| l == "direct=1") && text.contains("time_based=1"), "{text}");
            for key in ["ioengine=", "filename=", "uri=", "runtime="] {
                assert!(!text.lines().any(|l| l.starts_with(key)), "{key} in {text}");
            }
        }
    }
}

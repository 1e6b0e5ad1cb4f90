//! Where everything of a group lies on this machine.
//!
//! Owns: the rule flag > environment > file > default. Invariant: with `--config DIR` alone nothing
//! outside DIR is touched but the write cache, which needs memory and so lies in /dev/shm if it can.

use super::failure::{Exit, Failure};
use crate::units::NodeId;
use nix::unistd::{AccessFlags, Uid, access};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Longest path of a unix socket, bytes.
const MAX_SOCKET: usize = 107;

/// Places that a user may move.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct PlaceArgs {
    /// Where NAME.toml and its key lie [default: /etc/volrep]; given alone, everything else lies below it
    #[arg(long, global = true, env = "VOLREP_CONFIG_DIR", value_name = "DIR", help_heading = "Places")]
    pub config: Option<PathBuf>,
    /// Superblock, journal and dirty maps [default: /var/lib/volrep]
    #[arg(long, global = true, env = "VOLREP_STATE_DIR", value_name = "DIR", help_heading = "Places")]
    pub state_dir: Option<PathBuf>,
    /// Sockets [default: /run/volrep]
    #[arg(long, global = true, env = "VOLREP_RUN_DIR", value_name = "DIR", help_heading = "Places")]
    pub run_dir: Option<PathBuf>,
    /// Write cache, in a tmpfs that nothing empties [default: /dev/shm/volrep]
    #[arg(long, global = true, env = "VOLREP_SHM_DIR", value_name = "DIR", help_heading = "Places")]
    pub shm_dir: Option<PathBuf>,
    /// Links to the devices [default: /dev/volrep]
    #[arg(long, global = true, env = "VOLREP_DEV_DIR", value_name = "DIR", help_heading = "Places")]
    pub dev_dir: Option<PathBuf>,
}

/// The directories in force; absolute.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Places {
    config: PathBuf,
    state: PathBuf,
    run: PathBuf,
    shm: PathBuf,
    dev: PathBuf,
    /// Several nodes of one group may share `shm`: their caches' names tell them apart.
    shared_shm: bool,
}

impl Places {
    /// Settles each place.
    pub fn resolve(args: &PlaceArgs) -> Result<Places, Failure> {
        let below = args.config.as_deref();
        let pick = |given: &Option<PathBuf>, name: &str, default: &str| {
            let path = match (given, below) {
                (Some(path), _) => path.clone(),
                (None, Some(dir)) => dir.join(name),
                (None, None) => PathBuf::from(default),
            };
            absolute(&path)
        };
        let shm = match (&args.shm_dir, below) {
            (Some(path), _) => absolute(path)?,
            (None, None) => PathBuf::from("/dev/shm/volrep"),
            (None, Some(dir)) if access("/dev/shm", AccessFlags::W_OK | AccessFlags::X_OK).is_err() => {
                absolute(&dir.join("shm"))?
            }
            (None, Some(_)) => PathBuf::from(format!("/dev/shm/volrep-{}", Uid::effective())),
        };
        Ok(Places {
            config: absolute(below.unwrap_or(Path::new("/etc/volrep")))?,
            state: pick(&args.state_dir, "state", "/var/lib/volrep")?,
            run: pick(&args.run_dir, "run", "/run/volrep")?,
            dev: pick(&args.dev_dir, "dev", "/dev/volrep")?,
            shared_shm: shm != Path::new("/dev/shm/volrep"),
            shm,
        })
    }

    /// Where configurations lie.
    pub fn config_dir(&self) -> &Path {
        &self.config
    }
    /// A group's configuration.
    pub fn config_file(&self, group: &str) -> PathBuf {
        self.config.join(format!("{group}.toml"))
    }
    /// A group's superblock, maps and (unless the configuration says otherwise) journal.
    pub fn state(&self, group: &str) -> PathBuf {
        self.state.join(group)
    }
    /// A group's superblock.
    pub fn superblock(&self, group: &str) -> PathBuf {
        self.state(group).join("superblock")
    }
    /// A group's dirty maps.
    pub fn dirty_maps(&self, group: &str) -> PathBuf {
        self.state(group).join("dirty-maps")
    }
    /// A group's hash index.
    pub fn hash_index(&self, group: &str) -> PathBuf {
        self.state(group).join("hash-index")
    }
    /// A group's salvage files.
    pub fn salvage(&self, group: &str) -> PathBuf {
        self.state(group).join("salvage")
    }
    /// What has befallen a group's node.
    pub fn history(&self, group: &str) -> PathBuf {
        self.state(group).join("history")
    }
    /// Locked by whoever serves the group.
    pub fn lock(&self, group: &str) -> PathBuf {
        self.state(group).join("lock")
    }
    /// A group's sockets.
    pub fn run(&self, group: &str) -> PathBuf {
        self.run.join(group)
    }
    /// The administrator's socket.
    pub fn control_socket(&self, group: &str) -> PathBuf {
        self.run(group).join("control.sock")
    }
    /// A group's write cache.
    pub fn cache(&self, group: &str, node: NodeId) -> PathBuf {
        if self.shared_shm { self.shm.join(format!("{group}-{node:?}")) } else { self.shm.join(group) }
    }
    /// Where links to devices lie.
    pub fn dev(&self) -> &Path {
        &self.dev
    }

    /// The flags that name them.
    pub fn arguments(&self) -> Vec<OsString> {
        let flags = ["--config", "--state-dir", "--run-dir", "--shm-dir", "--dev-dir"];
        let dirs = [&self.config, &self.state, &self.run, &self.shm, &self.dev];
        flags.iter().zip(dirs).flat_map(|(f, d)| [OsString::from(f), d.clone().into_os_string()]).collect()
    }

    /// Refuses a run directory in which sockets can't have names.
    pub fn check_sockets(&self, group: &str) -> Result<(), Failure> {
        let longest = self.control_socket(group);
        if longest.as_os_str().len() <= MAX_SOCKET {
            return Ok(());
        }
        let what = format!("{} is too long for the path of a socket ({MAX_SOCKET} bytes)", longest.display());
        Err(Failure::new(Exit::Failure, what, "choose a shorter one with --run-dir or VOLREP_RUN_DIR"))
    }

    /// Names of the groups that are set up here, in order.
    pub fn groups(&self) -> Result<Vec<String>, Failure> {
        let entries = match std::fs::read_dir(&self.config) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Failure::io("read", &self.config, &e)),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|file| file.strip_suffix(".toml").map(str::to_owned))
            .filter(|name| check_name(name).is_ok())
            .collect();
        names.sort();
        Ok(names)
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|e| Failure::io("use", path, &e))
}

/// Names of groups, nodes and volumes: they become names of files, of exports and in messages.
pub fn check_name(name: &str) -> Result<String, String> {
    let first = name.starts_with(|c: char| c.is_ascii_alphanumeric());
    let rest = name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if first && rest && name.len() <= crate::format::message::MAX_NAME {
        return Ok(name.to_owned());
    }
    Err(format!(
        "`{name}` can't be a name: use letters, digits, `-`, `_` and `.`, beginning with a letter or digit, \
         {} at most",
        crate::format::message::MAX_NAME
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_config_directory_alone_moves_everything() {
        let args = PlaceArgs { config: Some("/x".into()), ..Default::default() };
        let p = Places::resolve(&args).unwrap();
        assert_eq!(p.config_file("epic"), Path::new("/x/epic.toml"));
        assert_eq!(p.superblock("epic"), Path::new("/x/state/epic/superblock"));
        assert_eq!(p.control_socket("epic"), Path::new("/x/run/epic/control.sock"));
        assert_eq!(p.dev(), Path::new("/x/dev"));
    }

    #[test]
    fn a_named_place_wins_over_the_config_directory() {
        let args =
            PlaceArgs { config: Some("/x".into()), state_dir: Some("/y".into()), ..Default::default() };
        assert_eq!(Places::resolve(&args).unwrap().state("g"), Path::new("/y/g"));
        let p = Places::resolve(&PlaceArgs::default()).unwrap();
        assert_eq!(p.cache("epic", NodeId(7)), Path::new("/dev/shm/volrep/epic"));
    }

    #[test]
    fn names_are_harmless_in_paths() {
        for bad in ["", "..", ".x", "a/b", "a b", "-x", "é", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name("epic-2.data_x").is_ok());
    }
}

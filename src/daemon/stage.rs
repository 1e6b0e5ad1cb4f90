//! The files of the stage, next to the journal.
//!
//! Owns: their names, and that all or none of them are there. Invariant: a stage that was made is found
//! again after a power cut, or the superblock never spoke of it.

use crate::apply::stage::stage_len;
use crate::disk::{File, Memory};
use crate::sys::disk::Disk;
use crate::sys::mmap::Mapping;
use crate::sys::open::{OpenError, OpenFile, measure, open};
use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A volume, as its stage has to be.
pub(super) struct Staged {
    pub number: u8,
    pub size: u64,
    /// Smallest unit that is written.
    pub block: u64,
    pub direct: bool,
}

/// Where a group's stage lies.
pub(super) struct StageFiles {
    journal: PathBuf,
    volumes: Vec<Staged>,
}

impl StageFiles {
    /// Next to this journal.
    pub fn new(journal: PathBuf, volumes: Vec<Staged>) -> StageFiles {
        StageFiles { journal, volumes }
    }

    fn path(&self, what: &str) -> PathBuf {
        let mut name = self.journal.file_name().unwrap_or_default().to_owned();
        name.push(format!(".stage-{what}"));
        self.journal.with_file_name(name)
    }

    fn paths(&self) -> Vec<PathBuf> {
        let volumes = self.volumes.iter().map(|v| self.path(&v.number.to_string()));
        volumes.chain([self.path("map")]).collect()
    }

    /// Opens them, or makes them anew.
    pub fn open(&self, fresh: bool, disk: &mut Disk) -> Result<Box<dyn Memory>, String> {
        let opened = if fresh { self.make().and_then(|()| self.take(disk)) } else { self.take(disk) };
        opened.map_err(|e| {
            if fresh {
                // What was not finished must not hold room.
                self.remove();
            }
            e.to_string()
        })
    }

    fn make(&self) -> Result<(), OpenError> {
        self.remove();
        for v in &self.volumes {
            let path = self.path(&v.number.to_string());
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
            let made = file.and_then(|f| f.set_len(v.size).and_then(|()| f.sync_all()));
            made.map_err(|e| OpenError::io("create", &path, e))?;
        }
        let path = self.path("map");
        Mapping::create(&path, self.map_len()).map_err(|e| OpenError::io("create", &path, e))
    }

    fn take(&self, disk: &mut Disk) -> Result<Box<dyn Memory>, OpenError> {
        let map_path = self.path("map");
        let mut files = Vec::new();
        for v in &self.volumes {
            files.push((File::Stage(v.number), stage_file(&self.path(&v.number.to_string()), v)?));
        }
        let map = Mapping::open_unread(&map_path, self.map_len(), Duration::ZERO)?;
        let file = map.file().map_err(|e| OpenError::io("open", &map_path, e))?;
        files.push((File::StageMap, measure(file, &map_path, false)?));
        files.into_iter().for_each(|(name, file)| disk.put(name, file));
        Ok(Box::new(map))
    }

    fn map_len(&self) -> u64 {
        stage_len(&self.volumes.iter().map(|v| (v.number, v.size)).collect::<Vec<_>>())
    }

    /// Removes them; their room is free at once, even while a descriptor is open.
    pub fn remove(&self) {
        for path in self.paths() {
            let emptied = OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(0));
            match emptied.and_then(|()| fs::remove_file(&path)) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!("can't remove {}: {e}; remove it to get its room back", path.display());
                }
                _ => {}
            }
        }
    }
}

fn stage_file(path: &Path, v: &Staged) -> Result<OpenFile, OpenError> {
    let mut file = open(path, v.direct, Duration::ZERO)?;
    if file.block > v.block {
        // Its file system wants larger units than the volume is written in.
        drop(file);
        file = open(path, false, Duration::ZERO)?;
    }
    file.at_least(v.size)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::BLOCK;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_stage_is_made_found_again_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let volume = |number, size| Staged { number, size, block: BLOCK, direct: true };
        let files = || StageFiles::new(dir.path().join("journal"), vec![volume(0, 1 << 20), volume(3, 8192)]);
        let mut disk = Disk::new([]);
        assert!(files().open(false, &mut disk).unwrap_err().contains("does not exist"));
        let mut map = files().open(true, &mut disk).unwrap();
        map.bytes_mut()[0] = 7;
        drop((map, disk));
        let mut disk = Disk::new([]);
        let map = files().open(false, &mut disk).unwrap();
        assert_eq!((map.bytes()[0], map.bytes().len() as u64), (7, files().map_len()));
        let at = |name: &str| fs::metadata(dir.path().join(name));
        let data = at("journal.stage-0").unwrap();
        assert_eq!((data.len(), data.blocks(), data.mode() & 0o777), (1 << 20, 0, 0o600), "sparse");
        let bits = at("journal.stage-map").unwrap();
        assert!(bits.blocks() * 512 >= files().map_len(), "no access can find the file system full");
        drop((map, disk));
        let mut disk = Disk::new([]);
        let map = files().open(true, &mut disk).unwrap();
        assert_eq!(map.bytes()[0], 0, "made anew");
        fs::remove_file(dir.path().join("journal.stage-3")).unwrap();
        drop((map, disk));
        assert!(files().open(false, &mut Disk::new([])).is_err(), "all or none");
        files().remove();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

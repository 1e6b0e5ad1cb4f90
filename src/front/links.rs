//! The names by which users open devices: links in `/dev/volrep`.
//!
//! Owns: making and removing them. Invariant: a link is made in one step, so it never points nowhere
//! while its device exists; nothing that is not a link is replaced; and only a link that still points
//! to the device is removed with it. A device manager is told of both, so that its rules (ours are
//! `tools/60-volrep.rules`) can know a device by its link.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

/// A link to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceLink {
    dir: PathBuf,
    name: PathBuf,
}

impl DeviceLink {
    /// The link `name` within `dir`; see [`is_plain`].
    pub fn new(dir: &Path, name: &Path) -> DeviceLink {
        DeviceLink { dir: dir.to_path_buf(), name: name.to_path_buf() }
    }

    /// Where it lies.
    pub fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }

    /// Whether it can be made: nothing that is not a link is in its place.
    pub fn check(&self) -> io::Result<()> {
        let link = self.path();
        match fs::symlink_metadata(&link).is_ok_and(|m| !m.is_symlink()) {
            true => Err(io::Error::other(format!(
                "{}, which is not a link, is in its place: move it away",
                link.display()
            ))),
            false => Ok(()),
        }
    }

    /// Makes it point to `node`; replaces a link, nothing else.
    pub fn point_to(&self, node: &Path) -> io::Result<()> {
        let link = self.path();
        self.make(&link, node).map_err(|e| {
            io::Error::new(e.kind(), format!("link {} to {}: {e}", link.display(), node.display()))
        })?;
        announce(node);
        Ok(())
    }

    fn make(&self, link: &Path, node: &Path) -> io::Result<()> {
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent)?;
        }
        self.check()?;
        let mut fresh = link.as_os_str().to_owned();
        fresh.push(".new");
        match fs::remove_file(&fresh) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => std::os::unix::fs::symlink(node, &fresh)?,
        }
        fs::rename(&fresh, link)
    }

    /// Removes it if it points to `node`, and directories that are empty without it. Best effort: a
    /// link that stays is replaced by the next attach.
    pub fn remove(&self, node: &Path) {
        let link = self.path();
        if target(&link).is_some_and(|target| target == node) {
            let _ = fs::remove_file(&link);
            announce(node);
        }
        let above = link.ancestors().skip(1);
        for dir in above.take_while(|dir| dir.starts_with(&self.dir) && *dir != self.dir) {
            if fs::remove_dir(dir).is_err() {
                break;
            }
        }
    }
}

/// Where a link points to, absolute. By its text: what it points to may be gone. (udev puts a relative
/// link in the place of ours.)
fn target(link: &Path) -> Option<PathBuf> {
    let mut path = link.parent()?.to_path_buf();
    for part in fs::read_link(link).ok()?.components() {
        match part {
            Component::ParentDir => drop(path.pop()),
            Component::CurDir => {}
            part => path.push(part),
        }
    }
    Some(path)
}

/// Has the kernel tell device managers that something about the device has changed. Best effort: there
/// may be none, and the device may be gone.
fn announce(node: &Path) {
    if let Some(name) = node.file_name() {
        let _ = fs::write(Path::new("/sys/block").join(name).join("uevent"), "change");
    }
}

/// Whether the path stays below the directory that it is joined to.
pub fn is_plain(path: &Path) -> bool {
    !path.as_os_str().is_empty() && path.components().all(|c| matches!(c, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_replaces_a_stale_one_and_is_removed_with_its_own_device_only() {
        let dir = tempfile::tempdir().unwrap();
        let link = DeviceLink::new(dir.path(), Path::new("epic/data"));
        let (old, new) = (Path::new("/dev/none0"), Path::new("/dev/none1"));
        link.point_to(old).unwrap();
        link.point_to(new).unwrap();
        assert_eq!(fs::read_link(link.path()).unwrap(), new);
        link.remove(old);
        assert_eq!(fs::read_link(link.path()).unwrap(), new);
        link.remove(new);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        link.remove(new);
    }

    #[test]
    fn a_relative_link_in_place_of_ours_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let link = DeviceLink::new(dir.path(), Path::new("epic/data"));
        link.point_to(Path::new("../.././none0")).unwrap();
        let node = dir.path().parent().unwrap().join("none0");
        assert_eq!(target(&link.path()).unwrap(), node);
        link.remove(&node);
        assert!(!link.path().is_symlink());
    }

    #[test]
    fn what_is_not_a_link_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let link = DeviceLink::new(dir.path(), Path::new("epic"));
        fs::write(link.path(), b"mine").unwrap();
        let error = link.point_to(Path::new("/dev/none0")).unwrap_err();
        assert!(error.to_string().contains("move it away"), "{error}");
        assert_eq!(fs::read(link.path()).unwrap(), b"mine");
    }

    #[test]
    fn plain_paths_stay_below() {
        assert!(is_plain(Path::new("epic/data")));
        for bad in ["", "/", "/etc", "..", "a/../b", "."] {
            assert!(!is_plain(Path::new(bad)), "{bad:?}");
        }
    }
}

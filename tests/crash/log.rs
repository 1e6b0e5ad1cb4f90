//! What reached the disks below the nodes, in order, and what was promised meanwhile.
//!
//! Owns: the vocabulary between the recorder, the replay and the judges. Invariant: an event is in the log before
//! its answer goes out, so whoever was answered, or was promised something, finds its cause at an earlier place.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::ffi::OsString;

/// A file or directory; its inode number.
pub type FileId = u64;

/// The directory at the top.
pub const ROOT: FileId = 1;

/// One thing that happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// Bytes came.
    Write { file: FileId, offset: u64, data: Bytes, fua: bool },
    /// A range became zeroes.
    Zero { file: FileId, offset: u64, len: u64 },
    /// A file got this length.
    Size { file: FileId, len: u64 },
    /// Names in a directory changed.
    Name { dir: FileId, change: Change },
    /// A sync of a file came. What had been answered before is durable once this is.
    Sync { file: FileId },
    /// A sync of a directory came.
    SyncNames { dir: FileId },
    /// The answer to the event at this place went out.
    Answered(usize),
    /// Somebody was told something that a crash must not undo.
    Mark(Mark),
}

/// A change of names.
#[derive(Clone, Debug)]
pub enum Change {
    /// A new name, of a new file or directory.
    Put(OsString, FileId, Kind),
    /// A name less.
    Remove(OsString),
    /// Another name, in place of whatever had it.
    Rename(OsString, OsString),
}

/// What a name is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    File,
    Directory,
}

/// What was told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mark {
    /// The work's steps up to this one are durable: an fsync, a FLUSH, a COMMIT was answered.
    Kept(u64),
    /// The same, on the second node, which has become the primary.
    KeptThere(u64),
    /// A node has told its positions.
    Told { node: usize, durable: u64, applied: u64 },
    /// The second node is told to take over.
    Promoting,
    /// The first node is told to give up what only it holds.
    GivingUp,
    /// A refresh has told that it is done.
    Repaired,
    /// Everything was read.
    Read,
}

/// A file or a directory, as it is.
#[derive(Clone, Debug)]
pub enum Inode {
    Directory(BTreeMap<OsString, FileId>),
    File(Vec<u8>),
}

/// A whole tree, durable.
pub type Tree = BTreeMap<FileId, Inode>;

/// A recording: how it began, and what happened.
pub struct Recording {
    pub base: Tree,
    pub log: Vec<Event>,
}

impl Change {
    /// Makes the change.
    pub fn apply(&self, names: &mut BTreeMap<OsString, FileId>) {
        match self {
            Change::Put(name, file, _) => drop(names.insert(name.clone(), *file)),
            Change::Remove(name) => drop(names.remove(name)),
            Change::Rename(from, to) => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
        }
    }
}

impl Recording {
    /// The file at a path from the top, at the begin.
    pub fn find(&self, path: &str) -> FileId {
        let step = |at: FileId, name: &str| match &self.base[&at] {
            Inode::Directory(names) => names[&OsString::from(name)],
            Inode::File(_) => panic!("{path} leads through a file"),
        };
        path.split('/').fold(ROOT, step)
    }

    /// The bytes of a file at the begin.
    pub fn bytes(&self, file: FileId) -> &[u8] {
        match &self.base[&file] {
            Inode::File(bytes) => bytes,
            Inode::Directory(_) => panic!("{file} is a directory"),
        }
    }

    /// Everything below a directory, now or later.
    pub fn below(&self, dir: FileId) -> std::collections::HashSet<FileId> {
        let mut found = std::collections::HashSet::from([dir]);
        let mut todo = vec![dir];
        while let Some(at) = todo.pop() {
            if let Some(Inode::Directory(names)) = self.base.get(&at) {
                found.extend(names.values());
                todo.extend(names.values());
            }
        }
        for event in &self.log {
            if let Event::Name { dir, change: Change::Put(_, file, _) } = event
                && found.contains(dir)
            {
                found.insert(*file);
            }
        }
        found
    }
}

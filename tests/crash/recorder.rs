//! The file system on which the files of both nodes lie: it records what the kernel really gets from the daemons.
//!
//! Owns: the files (in a directory below), their names, and the log. Invariants: a request is in the log before it
//! is answered; an O_DIRECT file is never cached above, so that each write comes as the daemon made it; RWF_DSYNC
//! and O_DSYNC arrive as flags of the write, not as a sync that covers others. Answers are held back for a moment:
//! a sync that a daemon sends before the write it is to cover was answered does not cover it, as on a disk.

use crate::log::{Change, Event, FileId, Inode, Kind, Mark, ROOT, Recording, Tree};
use crate::prng::Prng;
use crate::stage::until;
use bytes::Bytes;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, Session,
    TimeOrNow, WriteFlags,
};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::mount::umount;
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant, SystemTime};

const TTL: Duration = Duration::from_secs(3600);
/// How long the answer to a change is held back, in microseconds, at most: as a rule, and now and then. So answers to
/// different files come in any order, as from several disks.
const HELD: [u64; 2] = [300, 3000];
/// How long there may be nothing to answer.
const IDLE: Duration = Duration::from_secs(3600);

/// The way to the log.
#[derive(Clone)]
pub struct Recorder(Arc<Mutex<State>>);

struct State {
    dir: PathBuf,
    inodes: BTreeMap<FileId, Held>,
    next: FileId,
    /// Nothing is recorded before it begins.
    log: Option<Vec<Event>>,
}

enum Held {
    Directory(BTreeMap<OsString, FileId>),
    File(Arc<File>, u32),
}

/// An answer, when it is due, and the event that it is to.
type Due = ((Instant, usize), Box<dyn FnOnce() + Send>);

/// Gives each answer when it is due; ends with those who ask.
fn answer_all(queue: &mpsc::Receiver<Due>, log: &Recorder) {
    let mut waiting = BTreeMap::new();
    let mut open = true;
    while open || !waiting.is_empty() {
        let next = waiting.first_key_value().map(|((at, _), _): (&(Instant, usize), _)| *at);
        let patience = next.map_or(IDLE, |at| at.saturating_duration_since(Instant::now()));
        match queue.recv_timeout(patience) {
            Ok((due, answer)) => drop(waiting.insert(due, answer)),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => open = false,
        }
        while let Some(first) = waiting.first_entry().filter(|e| !open || e.key().0 <= Instant::now()) {
            let ((_, event), answer): (_, Box<dyn FnOnce() + Send>) = first.remove_entry();
            log.state().push(Event::Answered(event));
            answer();
        }
    }
}

/// The mounted file system.
pub struct Mounted {
    pub recorder: Recorder,
    at: PathBuf,
    session: Option<BackgroundSession>,
}

impl Recorder {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything that is there now is durable; from here on it is recorded. Nobody may use the files meanwhile.
    pub fn begin(&self) -> Tree {
        let mut state = self.state();
        state.log = Some(Vec::new());
        let content = |inode: &Held| match inode {
            Held::Directory(names) => Inode::Directory(names.clone()),
            Held::File(file, _) => {
                let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
                file.read_exact_at(&mut bytes, 0).unwrap();
                Inode::File(bytes)
            }
        };
        state.inodes.iter().map(|(id, inode)| (*id, content(inode))).collect()
    }

    /// Ends the recording.
    pub fn end(&self, base: Tree) -> Recording {
        Recording { base, log: self.state().log.take().expect("it was begun") }
    }

    /// Notes what was promised.
    pub fn mark(&self, mark: Mark) {
        self.state().push(Event::Mark(mark));
    }

    /// Writes into a file behind everybody's back, as rot does. Not recorded: call it before the recording begins.
    pub fn rot(&self, path: &str, offset: u64, bytes: &[u8]) {
        let state = self.state();
        let step = |at: FileId, name: &str| match &state.inodes[&at] {
            Held::Directory(names) => names[&OsString::from(name)],
            Held::File(..) => panic!("{path} leads through a file"),
        };
        match &state.inodes[&path.split('/').fold(ROOT, step)] {
            Held::File(file, _) => file.write_all_at(bytes, offset).unwrap(),
            Held::Directory(_) => panic!("{path} is a directory"),
        }
    }
}

impl Mounted {
    /// Mounts it; the bytes lie in `dir`.
    pub fn new(dir: &Path, at: &Path) -> Mounted {
        std::fs::create_dir_all(dir).unwrap();
        std::fs::create_dir_all(at).unwrap();
        let root = BTreeMap::from([(ROOT, Held::Directory(BTreeMap::new()))]);
        let state = State { dir: dir.into(), inodes: root, next: ROOT + 1, log: None };
        let recorder = Recorder(Arc::new(Mutex::new(state)));
        let (due, queue) = mpsc::channel::<Due>();
        let log = recorder.clone();
        std::thread::spawn(move || answer_all(&queue, &log));
        let mut config = Config::default();
        config.mount_options = vec![MountOption::FSName("crash-recorder".into())];
        config.n_threads = Some(1);
        let files = Files { recorder: recorder.clone(), due, prng: Mutex::new(Prng::new(1)) };
        let session = Session::new(files, at, &config).unwrap().spawn().unwrap();
        Mounted { recorder, at: at.into(), session: Some(session) }
    }

    /// Unmounts it, once the kernel has closed what a killed daemon had open: its ring outlives it for a moment.
    pub fn end(mut self) {
        until("the files are closed", || umount(&self.at).ok());
        self.session.take().expect("it is mounted").join().unwrap();
    }
}

impl State {
    /// Its place in the log; 0 if nothing is recorded.
    fn push(&mut self, event: Event) -> usize {
        let Some(log) = &mut self.log else { return 0 };
        log.push(event);
        log.len() - 1
    }

    fn file(&self, id: INodeNo) -> Result<Arc<File>, Errno> {
        match self.inodes.get(&id.0) {
            Some(Held::File(file, _)) => Ok(file.clone()),
            Some(Held::Directory(_)) => Err(Errno::EISDIR),
            None => Err(Errno::ENOENT),
        }
    }

    fn names(&mut self, id: INodeNo) -> Result<&mut BTreeMap<OsString, FileId>, Errno> {
        match self.inodes.get_mut(&id.0) {
            Some(Held::Directory(names)) => Ok(names),
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn attributes(&self, id: INodeNo) -> Result<FileAttr, Errno> {
        let since = SystemTime::UNIX_EPOCH;
        let (kind, size, perm) = match self.inodes.get(&id.0).ok_or(Errno::ENOENT)? {
            Held::Directory(_) => (FileType::Directory, 0, 0o700),
            Held::File(file, mode) => {
                (FileType::RegularFile, file.metadata().map_err(Errno::from)?.len(), *mode as u16)
            }
        };
        Ok(FileAttr {
            ino: id,
            size,
            blocks: size.div_ceil(512),
            atime: since,
            mtime: since,
            ctime: since,
            crtime: since,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        })
    }

    fn make(&mut self, dir: INodeNo, name: &OsStr, mode: Option<u32>) -> Result<FileAttr, Errno> {
        if self.names(dir)?.contains_key(name) {
            return Err(Errno::EEXIST);
        }
        let id = self.next;
        self.next += 1;
        let inode = match mode {
            None => Held::Directory(BTreeMap::new()),
            Some(mode) => {
                let path = self.dir.join(id.to_string());
                let file = OpenOptions::new().read(true).write(true).create_new(true).open(path);
                Held::File(Arc::new(file.map_err(Errno::from)?), mode & 0o7777)
            }
        };
        self.inodes.insert(id, inode);
        let kind = if mode.is_some() { Kind::File } else { Kind::Directory };
        self.rename(dir, Change::Put(name.into(), id, kind))?;
        self.attributes(INodeNo(id))
    }

    fn rename(&mut self, dir: INodeNo, change: Change) -> Result<(), Errno> {
        change.apply(self.names(dir)?);
        let event = self.push(Event::Name { dir: dir.0, change });
        self.push(Event::Answered(event));
        Ok(())
    }
}

struct Files {
    recorder: Recorder,
    due: mpsc::Sender<Due>,
    prng: Mutex<Prng>,
}

impl Files {
    fn state(&self) -> MutexGuard<'_, State> {
        self.recorder.state()
    }

    /// Notes a change that was made, and answers it later.
    fn later(&self, mut state: MutexGuard<'_, State>, event: Event, answer: impl FnOnce() + Send + 'static) {
        let recorded = state.log.is_some();
        let at = state.push(event);
        drop(state);
        if recorded {
            let held = {
                let mut prng = self.prng.lock().unwrap_or_else(PoisonError::into_inner);
                let most = HELD[usize::from(prng.permille(100))];
                Duration::from_micros(prng.below(most))
            };
            let due = ((Instant::now() + held, at), Box::new(answer) as Box<dyn FnOnce() + Send>);
            self.due.send(due).expect("the thread that answers ends with this");
        } else {
            answer();
        }
    }
}

/// How a file is opened: what a daemon opens with O_DIRECT is its disk, and nothing caches it.
fn opening(flags: i32) -> FopenFlags {
    match flags & libc::O_DIRECT {
        0 => FopenFlags::empty(),
        _ => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
    }
}

fn done(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

impl Filesystem for Files {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        config
            .add_capabilities(InitFlags::FUSE_ASYNC_DIO)
            .map_err(|_| io::Error::other("no FUSE_ASYNC_DIO"))?;
        config.set_max_write(1 << 20).map_err(|_| io::Error::other("max_write"))?;
        config.set_max_background(128).map_err(|_| io::Error::other("max_background"))?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let mut state = self.state();
        let found = state.names(parent).and_then(|names| names.get(name).copied().ok_or(Errno::ENOENT));
        match found.and_then(|id| state.attributes(INodeNo(id))) {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.state().attributes(ino) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(e) => reply.error(e),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let mut state = self.state();
        if let (Some(new), Some(Held::File(_, mode))) = (mode, state.inodes.get_mut(&ino.0)) {
            *mode = new & 0o7777;
        }
        if let Some(len) = size {
            match state.file(ino).and_then(|file| file.set_len(len).map_err(Errno::from)) {
                Ok(()) => {
                    let event = state.push(Event::Size { file: ino.0, len });
                    state.push(Event::Answered(event));
                }
                Err(e) => return reply.error(e),
            }
        }
        match state.attributes(ino) {
            Ok(attributes) => reply.attr(&TTL, &attributes),
            Err(e) => reply.error(e),
        }
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        match self.state().make(parent, name, None) {
            Ok(attributes) => reply.entry(&TTL, &attributes, Generation(0)),
            Err(e) => reply.error(e),
        }
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        match self.state().make(parent, name, Some(mode & !umask)) {
            Ok(attributes) => {
                reply.created(&TTL, &attributes, Generation(0), FileHandle(0), opening(flags));
            }
            Err(e) => reply.error(e),
        }
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        done(reply, self.state().rename(parent, Change::Remove(name.into())));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let mut state = self.state();
        let dir = state.names(parent).and_then(|names| names.get(name).copied().ok_or(Errno::ENOENT));
        let result = dir.and_then(|dir| match state.names(INodeNo(dir))?.is_empty() {
            true => state.rename(parent, Change::Remove(name.into())),
            false => Err(Errno::ENOTEMPTY),
        });
        done(reply, result);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        if parent != newparent || !flags.is_empty() {
            return reply.error(Errno::EOPNOTSUPP);
        }
        done(reply, self.state().rename(parent, Change::Rename(name.into(), newname.into())));
    }

    fn open(&self, _: &Request, _: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), opening(flags.0));
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut bytes = vec![0; size as usize];
        let file = self.state().file(ino);
        match file.and_then(|file| file.read_at(&mut bytes, offset).map_err(Errno::from)) {
            Ok(n) => reply.data(&bytes[..n]),
            Err(e) => reply.error(e),
        }
    }

    fn write(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let state = self.state();
        match state.file(ino).and_then(|file| file.write_all_at(data, offset).map_err(Errno::from)) {
            Ok(()) => {
                let (fua, len) = (flags.0 & libc::O_DSYNC != 0, data.len() as u32);
                let event = Event::Write { file: ino.0, offset, data: Bytes::copy_from_slice(data), fua };
                self.later(state, event, move || reply.written(len));
            }
            Err(e) => reply.error(e),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        len: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let mut state = self.state();
        let flags = FallocateFlags::from_bits_truncate(mode);
        let zeroes =
            flags.intersects(FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_ZERO_RANGE);
        let file = match state.file(ino) {
            Ok(file) => file,
            Err(e) => return reply.error(e),
        };
        let before = file.metadata().map_or(0, |m| m.len());
        if let Err(e) = fallocate(&*file, flags, offset as i64, len as i64) {
            return reply.error(Errno::from_i32(e as i32));
        }
        let after = file.metadata().map_or(0, |m| m.len());
        if after != before {
            let event = state.push(Event::Size { file: ino.0, len: after });
            state.push(Event::Answered(event));
        }
        match zeroes {
            true => self.later(state, Event::Zero { file: ino.0, offset, len }, move || reply.ok()),
            false => reply.ok(),
        }
    }

    fn fsync(&self, _: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.later(self.state(), Event::Sync { file: ino.0 }, move || reply.ok());
    }

    fn fsyncdir(&self, _: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.later(self.state(), Event::SyncNames { dir: ino.0 }, move || reply.ok());
    }

    fn readdir(&self, _: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut state = self.state();
        let names = match state.names(ino) {
            Ok(names) => names.clone(),
            Err(e) => return reply.error(e),
        };
        let kind = |id: &FileId| match state.inodes.get(id) {
            Some(Held::Directory(_)) => FileType::Directory,
            _ => FileType::RegularFile,
        };
        let dots = [(ino.0, OsString::from(".")), (ROOT, OsString::from(".."))];
        let all = dots.into_iter().chain(names.into_iter().map(|(name, id)| (id, name)));
        for ((id, name), next) in all.zip(1u64..).skip(offset as usize) {
            if reply.add(INodeNo(id), next, kind(&id), name) {
                break;
            }
        }
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        reply.statfs(1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096);
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }
}

//! The files and block devices that are to become volumes.
//!
//! Owns: the checks before anything is written. Invariant: a backing that is accepted is nobody
//! else's: not mounted, not held, not of another group, not given twice.

use super::config::{self, Volume};
use super::failure::{Exit, Failure};
use super::interrupt;
use super::places::{Places, check_name};
use super::progress::Progress;
use super::size::{Size, exact, human};
use crate::disk::{AlignedBuf, aligned};
use crate::units::{BLOCK, MAX_VOLUME, SECTOR};
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// `NAME=PATH[:SIZE]`, as it is written on the command line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spec {
    /// The volume's name.
    pub name: String,
    /// Its backing.
    pub path: PathBuf,
    /// Create it as a sparse file of this size.
    pub size: Option<Size>,
}

impl FromStr for Spec {
    type Err = String;
    fn from_str(text: &str) -> Result<Spec, String> {
        let Some((name, rest)) = text.split_once('=') else {
            return Err(format!(
                "`{text}` is not NAME=PATH[:SIZE], such as data=/dev/vg0/data or data=disk.img:10G"
            ));
        };
        let sized = rest.rsplit_once(':').and_then(|(path, size)| Some((path, size.parse::<Size>().ok()?)));
        let (path, size) = sized.map_or((rest, None), |(path, size)| (path, Some(size)));
        if path.is_empty() {
            return Err(format!("`{text}` names no path"));
        }
        Ok(Spec { name: check_name(name)?, path: path.into(), size })
    }
}

/// What a path turned out to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backing {
    /// The volume's name.
    pub name: String,
    /// Absolute, symbolic links of its directory resolved.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// It does not exist yet.
    pub create: bool,
}

/// Which file or device something is, whatever its path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKey {
    /// A file: device and inode.
    File(u64, u64),
    /// A block device: its number.
    Device(u64),
}

impl FileKey {
    /// Of an open or named file.
    pub fn of(m: &Metadata) -> FileKey {
        if m.file_type().is_block_device() {
            FileKey::Device(m.rdev())
        } else {
            FileKey::File(m.dev(), m.ino())
        }
    }

    /// A fingerprint that says "the same file on the same running machine", and nothing else.
    pub fn fingerprint(self, boot: crate::units::BootId) -> [u8; 16] {
        let mut h = blake3::Hasher::new();
        h.update(b"volrep file").update(&boot);
        match self {
            FileKey::File(dev, ino) => h.update(b"f").update(&dev.to_le_bytes()).update(&ino.to_le_bytes()),
            FileKey::Device(rdev) => h.update(b"d").update(&rdev.to_le_bytes()),
        };
        let mut out = [0; 16];
        out.copy_from_slice(&h.finalize().as_bytes()[..16]);
        out
    }
}

/// Checks every backing of a new group or shadow; touches nothing.
pub fn inspect(specs: &[Spec], places: &Places) -> Result<Vec<Backing>, Failure> {
    let found: Vec<Backing> = specs.iter().map(inspect_one).collect::<Result<_, _>>()?;
    for (i, b) in found.iter().enumerate() {
        for a in &found[..i] {
            if a.name == b.name {
                return Err(Failure::usage(
                    format!("two volumes are called `{}`", a.name),
                    "give each its own name",
                ));
            }
            let same = a.path == b.path || (!a.create && !b.create && key(&a.path)? == key(&b.path)?);
            if same {
                let what =
                    format!("volumes `{}` and `{}` are the same file: {}", a.name, b.name, b.path.display());
                return Err(Failure::usage(what, "give each volume its own file or device"));
            }
        }
    }
    refuse_others(&found, places)?;
    Ok(found)
}

fn inspect_one(spec: &Spec) -> Result<Backing, Failure> {
    let path = match spec.path.canonicalize() {
        Ok(path) => path,
        Err(e) if e.kind() == ErrorKind::NotFound => return to_create(spec),
        Err(e) => return Err(Failure::io("use", &spec.path, &e)),
    };
    let m = std::fs::metadata(&path).map_err(|e| Failure::io("use", &path, &e))?;
    let kind = m.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let what = format!("{} is neither a file nor a block device", path.display());
        return Err(Failure::usage(what, "give a file or a block device"));
    }
    let mut file = open_unheld(&path, kind.is_block_device())?;
    let size = file.seek(SeekFrom::End(0)).map_err(|e| Failure::io("measure", &path, &e))?;
    if let Some(wanted) = spec.size.filter(|s| s.0 != size) {
        let what = format!(
            "{} is there already, with {} and not {}",
            path.display(),
            amount(size),
            amount(wanted.0)
        );
        return Err(Failure::new(
            Exit::WouldLoseData,
            what,
            "leave the size away to use it as it is, or choose another path",
        ));
    }
    check_size(&path, size)?;
    Ok(Backing { name: spec.name.clone(), path, size, create: false })
}

/// A size to read, and exactly.
pub fn amount(bytes: u64) -> String {
    if bytes < 1024 { human(bytes) } else { format!("{} ({bytes} bytes)", human(bytes)) }
}

fn to_create(spec: &Spec) -> Result<Backing, Failure> {
    let Some(size) = spec.size else {
        let what = format!("{} does not exist", spec.path.display());
        let next = format!("check the path, or have it created: {}={}:SIZE", spec.name, spec.path.display());
        return Err(Failure::new(Exit::Failure, what, next));
    };
    let absolute = std::path::absolute(&spec.path).map_err(|e| Failure::io("use", &spec.path, &e))?;
    let (Some(dir), Some(file)) = (absolute.parent(), absolute.file_name()) else {
        return Err(Failure::usage(
            format!("{} is not the path of a file", absolute.display()),
            "give a file",
        ));
    };
    if dir.starts_with("/dev") && !dir.starts_with("/dev/shm") {
        let what = format!("{} does not exist", absolute.display());
        return Err(Failure::new(Exit::Failure, what, "a file in /dev is not kept: check the device's name"));
    }
    let dir = dir.canonicalize().map_err(|e| Failure::io("use", dir, &e))?;
    check_size(&absolute, size.0)?;
    Ok(Backing { name: spec.name.clone(), path: dir.join(file), size: size.0, create: true })
}

fn check_size(path: &Path, size: u64) -> Result<(), Failure> {
    if size > 0 && size <= MAX_VOLUME && size.is_multiple_of(SECTOR) {
        return Ok(());
    }
    let what = format!("{} can't be a volume of {size} bytes", path.display());
    let next = if size == 0 || size > MAX_VOLUME {
        "a volume has from 512 bytes to 64 PiB".to_owned()
    } else {
        format!("a volume is whole sectors of 512 bytes: make it {} bytes", size.next_multiple_of(BLOCK))
    };
    Err(Failure::new(Exit::Failure, what, next))
}

/// Opens for reading and writing what nobody else holds.
fn open_unheld(path: &Path, device: bool) -> Result<File, Failure> {
    let held = |by: String, next: &str| {
        Failure::new(Exit::Busy, format!("{} is in use: {by}", path.display()), next)
    };
    if let Some(holder) = holder(path)? {
        return Err(held(holder, "unmount or release it first: a volume belongs to volrep alone"));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(if device { libc::O_EXCL } else { 0 });
    let file = options.open(path).map_err(|e| match e.raw_os_error() {
        Some(libc::EBUSY) => held(
            "the kernel holds it (mounted, LVM, md, swap, ...)".into(),
            "release it first; `lsblk` shows by what",
        ),
        Some(libc::ETXTBSY) => held("it is being executed or swapped to".into(), "release it first"),
        _ => Failure::io("open", path, &e),
    })?;
    let lock = libc::flock { l_type: libc::F_WRLCK as _, l_whence: 0, l_start: 0, l_len: 0, l_pid: 0 };
    let by_range = fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).is_err();
    let locked = Flock::lock(file, FlockArg::LockExclusiveNonblock);
    match locked {
        Ok(lock) if !by_range => lock.unlock().map_err(|(_, e)| Failure::io("unlock", path, &e.into())),
        _ => Err(held(
            "another program has locked it".into(),
            "stop that program; `fuser -v` or `lslocks` shows which",
        )),
    }
}

/// By whom a file or device is mounted or attached to a loop device, if it is.
fn holder(path: &Path) -> Result<Option<String>, Failure> {
    let m = std::fs::metadata(path).map_err(|e| Failure::io("use", path, &e))?;
    if m.file_type().is_block_device() {
        let number = format!("{}:{}", libc::major(m.rdev()), libc::minor(m.rdev()));
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let at = mounts.lines().find_map(|l| {
            let mut fields = l.split(' ').skip(2);
            (fields.next() == Some(&number)).then(|| fields.nth(1).unwrap_or("?").to_owned())
        });
        return Ok(at.map(|at| format!("it is mounted at {at}")));
    }
    let Ok(loops) = std::fs::read_dir("/sys/block") else { return Ok(None) };
    for entry in loops.flatten() {
        let Ok(text) = std::fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        if std::fs::metadata(text.trim_end()).is_ok_and(|l| FileKey::of(&l) == FileKey::of(&m)) {
            return Ok(Some(format!("/dev/{} is attached to it", entry.file_name().to_string_lossy())));
        }
    }
    Ok(None)
}

fn key(path: &Path) -> Result<FileKey, Failure> {
    std::fs::metadata(path).map(|m| FileKey::of(&m)).map_err(|e| Failure::io("use", path, &e))
}

/// Refuses what is a volume of a group that is set up here already.
fn refuse_others(found: &[Backing], places: &Places) -> Result<(), Failure> {
    for group in places.groups()? {
        let Ok(other) = config::load(places, &group) else {
            eprintln!(
                "volrep: warning: {} can't be read, so its volumes are not checked",
                places.config_file(&group).display()
            );
            continue;
        };
        for b in found {
            if let Some(v) = other.volumes.iter().find(|v| is_same(b, v)) {
                let what = format!("{} is volume `{}` of the group `{group}`", b.path.display(), v.name);
                return Err(Failure::new(Exit::Busy, what, "give each volume its own file or device"));
            }
        }
    }
    Ok(())
}

fn is_same(b: &Backing, v: &Volume) -> bool {
    b.path == v.path || matches!((key(&b.path), key(&v.path)), (Ok(a), Ok(b)) if a == b)
}

/// Whether O_DIRECT works there.
pub fn direct_works(path: &Path) -> bool {
    open_to_read(path, true).is_ok_and(|f| f.read_at(&mut buffer(BLOCK as usize), 0).is_ok())
}

/// Smallest unit that the backing can be read and written in: 512 or 4096.
pub fn block_size(path: &Path, direct: bool) -> Result<u64, Failure> {
    if !direct {
        return Ok(SECTOR);
    }
    let file =
        open_to_read(path, true).map_err(|e| Failure::io("open (without the page cache)", path, &e))?;
    // The kernel refuses what is too small for the device with EINVAL; nothing else shows it for a file.
    match file.read_at(&mut buffer(SECTOR as usize), SECTOR) {
        Ok(_) => Ok(SECTOR),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(BLOCK),
        Err(e) => Err(Failure::io("read", path, &e)),
    }
}

fn buffer(len: usize) -> AlignedBuf {
    let mut buf = aligned(len);
    buf.resize(len, 0);
    buf
}

fn open_to_read(path: &Path, direct: bool) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(if direct { libc::O_DIRECT } else { 0 }).open(path)
}

/// Reads until the first byte that is not zero. True: it was read to the end and is all zeroes.
pub fn is_blank(b: &Backing) -> Result<bool, Failure> {
    let fail = |e| Failure::io("read", &b.path, &e);
    let file = open_to_read(&b.path, direct_works(&b.path)).map_err(fail)?;
    let mut buf = buffer(1 << 20);
    let zeroes = buffer(1 << 20);
    let mut progress = Progress::new(format!("looking whether `{}` is empty", b.name), b.size);
    let mut at = 0;
    while at < b.size {
        interrupt::check()?;
        let n = match file.read_at(&mut buf, at) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(fail(e)),
        };
        if n == 0 {
            return Err(fail(ErrorKind::UnexpectedEof.into()));
        }
        if buf[..n] != zeroes[..n] {
            return Ok(false);
        }
        at += n as u64;
        progress.at(at);
    }
    Ok(true)
}

/// How a volume would be given on the command line.
pub fn spec_text(name: &str, size: u64) -> String {
    format!("--volume {name}=PATH:{}", exact(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(name: &str, path: &Path, size: Option<u64>) -> Spec {
        Spec { name: name.into(), path: path.into(), size: size.map(Size) }
    }

    #[test]
    fn specs() {
        let s: Spec = "data=/dev/vg/data".parse().unwrap();
        assert_eq!(s, spec("data", Path::new("/dev/vg/data"), None));
        let s: Spec = "data=a:b:10M".parse().unwrap();
        assert_eq!(s, spec("data", Path::new("a:b"), Some(10 << 20)));
        for bad in ["data", "=x", "da ta=x", "data=", "data=:10M"] {
            assert!(bad.parse::<Spec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn blank_is_read_to_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let size = (3 << 20) + 512;
        let file = File::create(&path).unwrap();
        file.set_len(size).unwrap();
        let b = Backing { name: "v".into(), path, size, create: false };
        assert!(is_blank(&b).unwrap());
        file.write_at(b"x", size - 1).unwrap();
        assert!(!is_blank(&b).unwrap());
    }

    #[test]
    fn a_locked_file_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        std::fs::write(&path, [0; 4096]).unwrap();
        assert!(open_unheld(&path, false).is_ok());
        let held = Flock::lock(File::open(&path).unwrap(), FlockArg::LockShared).unwrap();
        assert_eq!(open_unheld(&path, false).unwrap_err().exit, Exit::Busy);
        drop(held);
        assert!(open_unheld(&path, false).is_ok());
    }
}

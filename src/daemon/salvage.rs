//! Salvage files: what a node has given up.
//!
//! Owns: their directory, and the one that is being written. Invariant: a file has its own name only once all of
//! it is durable; one that was cut short is written again under the same name.

use crate::format::salvage::{Head, MAX_HEAD, TRAILER, Trailer};
use crate::node::event::Salvage;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Where a group's salvage files lie.
pub(super) struct SalvageFiles {
    dir: PathBuf,
    open: Option<Open>,
}

/// The one that is being written.
struct Open {
    path: PathBuf,
    /// None: all of it is there from an earlier time, and nothing is written.
    file: Option<BufWriter<File>>,
    /// Bytes since the last sync.
    unsynced: usize,
}

/// Bytes between two syncs: the last one is not to hold the loop up for as long as all of it takes.
const SYNC: usize = 16 << 20;

impl SalvageFiles {
    /// In this directory, which is made when it is needed.
    pub fn new(dir: PathBuf) -> SalvageFiles {
        SalvageFiles { dir, open: None }
    }

    /// Writes a part. The path, once the file has ended.
    pub fn write(&mut self, part: Salvage) -> Result<Option<String>, String> {
        let done = match part {
            Salvage::Begin(head) => {
                let fork = head.fork.map_or(0, |p| p.lsn.0);
                let hash = head.last.hash.0[..4].iter().map(|b| format!("{b:02x}")).collect::<String>();
                let name = format!("lsn-{}-{}-{hash}.salvage", fork + 1, head.last.lsn);
                self.begin(self.dir.join(name), &head).map(|()| None)
            }
            Salvage::Append(records) => self.append(&records).map(|()| None),
            Salvage::End(trailer) => self.end(&trailer.encode()).map(Some),
        };
        done.map_err(|e| format!("{}: {e}", self.dir.display()))
    }

    fn begin(&mut self, path: PathBuf, head: &Head) -> io::Result<()> {
        if is_whole(&path, head)? {
            // Read again it could only be less.
            self.open = Some(Open { path, file: None, unsynced: 0 });
            return Ok(());
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let mut options = OpenOptions::new();
        let file =
            options.write(true).create(true).truncate(true).mode(0o600).open(path.with_extension("new"))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(&head.encode())?;
        self.open = Some(Open { path, file: Some(file), unsynced: 0 });
        Ok(())
    }

    fn append(&mut self, records: &[bytes::Bytes]) -> io::Result<()> {
        let open = self.open.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let Some(file) = &mut open.file else { return Ok(()) };
        records.iter().try_for_each(|r| file.write_all(r))?;
        open.unsynced += records.iter().map(|r| r.len()).sum::<usize>();
        if open.unsynced >= SYNC {
            open.unsynced = 0;
            file.flush()?;
            file.get_ref().sync_data()?;
        }
        Ok(())
    }

    fn end(&mut self, trailer: &[u8]) -> io::Result<String> {
        let Open { path, file, .. } = self.open.take().ok_or(io::ErrorKind::NotFound)?;
        if let Some(mut file) = file {
            file.write_all(trailer)?;
            file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
            fs::rename(path.with_extension("new"), &path)?;
        }
        // Of one that was there already, too: the process that gave it its name may have died right then.
        for dir in [Some(&*self.dir), self.dir.parent()].into_iter().flatten() {
            File::open(dir)?.sync_all()?;
        }
        Ok(path.display().to_string())
    }
}

/// Whether the file is there with everything up to the last record of the same history.
fn is_whole(path: &Path, head: &Head) -> io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    let len = file.metadata()?.len();
    let mut begin = vec![0; len.min(MAX_HEAD as u64 + 32) as usize];
    file.read_exact_at(&mut begin, 0)?;
    let same = Head::decode(&begin).is_ok_and(|(there, _)| Head { time: head.time, ..there } == *head);
    let mut end = [0; TRAILER];
    let Some(at) = len.checked_sub(TRAILER as u64).filter(|_| same) else { return Ok(false) };
    file.read_exact_at(&mut end, at)?;
    Ok(Trailer::decode(&end).is_ok_and(|t| t.last == head.last.lsn))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{GroupId, HistoryPoint, Lsn, NodeId, Term};

    #[test]
    fn a_file_has_its_name_once_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = SalvageFiles::new(dir.path().join("salvage"));
        let head = Head {
            group: GroupId([1; 16]),
            node: NodeId(2),
            name: "db1".into(),
            term: Term::default(),
            fork: Some(HistoryPoint { lsn: Lsn(41), ..HistoryPoint::default() }),
            last: HistoryPoint { lsn: Lsn(43), ..HistoryPoint::default() },
            time: 1,
            volumes: vec![],
        };
        let finished = || {
            let list = fs::read_dir(dir.path().join("salvage")).unwrap();
            list.filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|x| x == "salvage")).count()
        };
        for _ in 0..2 {
            // Interrupted, then begun again.
            assert_eq!(files.write(Salvage::Begin(head.clone())), Ok(None));
            assert_eq!(files.write(Salvage::Append(vec![bytes::Bytes::from_static(b"record")])), Ok(None));
            assert_eq!(finished(), 0);
        }
        let trailer = Trailer { records: 1, last: Lsn(43) };
        let path = files.write(Salvage::End(trailer)).unwrap().unwrap();
        assert!(path.ends_with("/salvage/lsn-42-43-00000000.salvage"), "{path}");
        let bytes = fs::read(&path).unwrap();
        let (read, at) = Head::decode(&bytes).unwrap();
        assert_eq!(read, head);
        assert_eq!(&bytes[at..at + 6], b"record");
        assert_eq!(Trailer::decode(&bytes[at + 6..]), Ok(trailer));
        assert_eq!(finished(), 1);
        assert!(files.write(Salvage::Append(vec![])).is_err(), "none is open");
        // Begun again, as after a broken link, when a part can't be read any more: the whole one stays.
        assert_eq!(files.write(Salvage::Begin(Head { time: 2, ..head.clone() })), Ok(None));
        let shorter = Trailer { records: 0, last: Lsn(41) };
        assert_eq!(files.write(Salvage::End(shorter)), Ok(Some(path.clone())));
        assert_eq!(fs::read(&path).unwrap(), bytes);
        // One that lacks its end is written anew.
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(files.write(Salvage::Begin(head)), Ok(None));
        assert_eq!(files.write(Salvage::Append(vec![bytes::Bytes::from_static(b"record")])), Ok(None));
        assert_eq!(files.write(Salvage::End(trailer)), Ok(Some(path.clone())));
        assert_eq!(fs::read(&path).unwrap(), bytes);
    }
}

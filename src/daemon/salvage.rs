//! Salvage files: what a node has given up.
//!
//! Owns: their directory, and the one that is being written. Invariant: a file has its own name only once all of
//! it is durable; one that was cut short is written again under the same name.

use crate::node::event::Salvage;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;

/// Where a group's salvage files lie.
pub(super) struct SalvageFiles {
    dir: PathBuf,
    open: Option<(PathBuf, BufWriter<File>)>,
}

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
                self.begin(self.dir.join(name), &head.encode()).map(|()| None)
            }
            Salvage::Append(records) => self.append(&records).map(|()| None),
            Salvage::End(trailer) => self.end(&trailer.encode()).map(Some),
        };
        done.map_err(|e| format!("{}: {e}", self.dir.display()))
    }

    fn begin(&mut self, path: PathBuf, head: &[u8]) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
        let mut options = OpenOptions::new();
        let file =
            options.write(true).create(true).truncate(true).mode(0o600).open(path.with_extension("new"))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        file.write_all(head)?;
        self.open = Some((path, file));
        Ok(())
    }

    fn append(&mut self, records: &[bytes::Bytes]) -> io::Result<()> {
        let (_, file) = self.open.as_mut().ok_or(io::ErrorKind::NotFound)?;
        records.iter().try_for_each(|r| file.write_all(r))
    }

    fn end(&mut self, trailer: &[u8]) -> io::Result<String> {
        let (path, mut file) = self.open.take().ok_or(io::ErrorKind::NotFound)?;
        file.write_all(trailer)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(path.with_extension("new"), &path)?;
        File::open(&self.dir)?.sync_all()?;
        Ok(path.display().to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::salvage::{Head, Trailer};
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
    }
}

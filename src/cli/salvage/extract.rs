//! `volrep salvage NAME extract`: a salvage file as images that other tools can read.
//!
//! Owns: the files that it writes. Invariant: the whole file was checked before anything is written, what is there
//! already is never overwritten, and of a failure nothing is left.

use super::file::{Next, Reader, State};
use super::{advice, find, origin};
use crate::cli::failure::{Exit, Failure};
use crate::cli::interrupt;
use crate::cli::output::Output;
use crate::cli::places::Places;
use crate::cli::progress::Progress;
use crate::cli::size::{grouped, human};
use crate::format::record::{Content, Record};
use crate::format::superblock::Volume;
use crate::node::status::{SCHEMA_VERSION, rfc3339};
use crate::units::{Extent, GroupId, Lsn};
use nix::fcntl::{FallocateFlags, fallocate};
use serde_json::{Value, json};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The map of all volumes.
const MAP: &str = "map.jsonl";

/// Write what a salvage file holds as sparse images, one per volume, with a map of every write
///
/// DIR gets, per volume, VOLUME.img: a sparse raw image as large as the volume. Each sector that the records wrote is
/// at its own offset, as the last of them left it; everything else is a hole, which says that it was not written, and
/// NOT that it was zeroes. And map.jsonl: one line per extent of each record, oldest first, such as
///
///   {"content":"data","length":4096,"lsn":41,"offset":8192,"time":"2024-05-01T10:00:00.000Z","volume":"data"}
///
/// with "content":"zeroes" for what was trimmed or zeroed. To see what those writes made of a database, take a copy of
/// a volume as it was when the histories parted (of a backup, or a snapshot), and copy each extent of the map from the
/// image into the copy, or zero it; then start the database on the copy. Without such a copy the extents are what
/// there is to compare with the volume that was kept.
#[derive(clap::Args, Clone, Debug)]
pub struct Extract {
    /// A name from the list, or a path
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Where the images and the map are written; made if missing
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Of a file that is unfinished, cut short or damaged: write the records before that place
    #[arg(long)]
    partial: bool,
}

/// What the check of a whole file found.
struct Checked {
    state: State,
    records: u64,
    first: Option<Lsn>,
    last: Option<Lsn>,
}

impl Extract {
    /// Does it.
    pub fn run(&self, (name, id): (&str, GroupId), places: &Places, out: &Output) -> Result<(), Failure> {
        interrupt::watch(|| {})?;
        let path = find(&self.file, name, places)?;
        let checked = self.check(&path, id)?;
        let mut target = Target::create(&self.to, &open(&path, id)?.head.volumes)?;
        let mut reader = open(&path, id)?;
        let mut progress = Progress::new("writing".into(), reader.len);
        while reader.records < checked.records {
            interrupt::check()?;
            match reader.next()? {
                Ok(Next::Record(record)) => target.write(&record)?,
                Ok(Next::End(_)) | Err(_) => {
                    let what = format!("{} was changed while it was read", path.display());
                    return Err(Failure::new(Exit::Failure, what, "run it again, into another directory"));
                }
            }
            progress.at(reader.at());
        }
        drop(progress);
        target.finish()?;
        if let Some(reason) = checked.state.reason() {
            eprintln!("volrep: warning: the file is {}: {reason}", checked.state.name());
        }
        let document = self.document(name, &path, &reader, &checked, &target);
        out.document(&document, || summary(&checked, &target));
        Ok(())
    }

    /// Reads all of it, and writes nothing.
    fn check(&self, path: &Path, id: GroupId) -> Result<Checked, Failure> {
        let mut reader = open(path, id)?;
        let mut progress = Progress::new("checking".into(), reader.len);
        let mut first = None;
        let state = loop {
            interrupt::check()?;
            match reader.next()? {
                Ok(Next::Record(record)) => {
                    // Its hashes are right; that it can be unpacked is seen only by doing it.
                    if let Err(e) = record.payload() {
                        let text = format!("record {} can't be unpacked: {e}", record.stamp.lsn);
                        return Err(refused(path, &State::Damaged(text)));
                    }
                    first.get_or_insert(record.stamp.lsn);
                    progress.at(reader.at());
                }
                Ok(Next::End(state)) => break state,
                Err(wrong) if self.partial => break wrong,
                Err(wrong) => return Err(refused(path, &wrong)),
            }
        };
        Ok(Checked { state, records: reader.records, first, last: reader.last().map(|p| p.lsn) })
    }

    fn document(
        &self,
        group: &str,
        path: &Path,
        reader: &Reader,
        checked: &Checked,
        target: &Target,
    ) -> Value {
        let volume = |i: &Image| {
            json!({
                "name": i.name,
                "image": i.path.display().to_string(),
                "size": i.size,
                "data_bytes": i.data,
                "zero_bytes": i.zeroes,
            })
        };
        json!({
            "schema_version": SCHEMA_VERSION,
            "group": group,
            "file": path.display().to_string(),
            "state": checked.state.name(),
            "reason": checked.state.reason(),
            "from": origin(&reader.head),
            "records": checked.records,
            "first_lsn": checked.first.map(|l| l.0),
            "last_lsn": checked.last.map(|l| l.0),
            "map": target.map_path.display().to_string(),
            "volumes": target.images.iter().map(volume).collect::<Vec<_>>(),
        })
    }
}

fn open(path: &Path, id: GroupId) -> Result<Reader, Failure> {
    Reader::open(path, id)?.map_err(|(state, _)| refused(path, &state))
}

fn refused(path: &Path, state: &State) -> Failure {
    let reason = state.reason().unwrap_or_default();
    Failure::new(Exit::Failure, format!("{} is {}: {reason}", path.display(), said(state)), advice(state))
}

fn said(state: &State) -> &'static str {
    match state {
        State::Whole => "whole",
        State::Incomplete(_) => "incomplete",
        State::Unfinished(_) => "unfinished",
        State::Cut(_) => "cut short",
        State::Damaged(_) => "damaged",
        State::OtherGroup => "not this group's",
    }
}

fn summary(checked: &Checked, target: &Target) -> String {
    let mut lines = vec![match (checked.first, checked.last) {
        (Some(first), Some(last)) => {
            format!("{} records, LSN {} to {}", grouped(checked.records), grouped(first.0), grouped(last.0))
        }
        _ => "no records".to_owned(),
    }];
    let image = |i: &Image| {
        let (data, zeroes) = (human(i.data), human(i.zeroes));
        format!("{}: {data} written and {zeroes} zeroed, in {}", i.name, i.path.display())
    };
    lines.extend(target.images.iter().map(image));
    lines.push(format!("each write: {}", target.map_path.display()));
    lines.join("\n")
}

/// One volume's.
struct Image {
    number: u8,
    name: String,
    size: u64,
    path: PathBuf,
    file: File,
    /// Bytes that the records wrote and zeroed; one that was written twice counts twice.
    data: u64,
    zeroes: u64,
}

/// What is being written; removed again unless it was finished.
struct Target {
    images: Vec<Image>,
    map: BufWriter<File>,
    map_path: PathBuf,
    made: Vec<PathBuf>,
}

impl Target {
    fn create(dir: &Path, volumes: &[Volume]) -> Result<Target, Failure> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|e| Failure::io("create", dir, &e))?;
        let map_path = dir.join(MAP);
        let map = new_file(&map_path)?;
        let mut target =
            Target { images: Vec::new(), map: BufWriter::new(map), made: vec![map_path.clone()], map_path };
        for v in volumes {
            let path = dir.join(format!("{}.img", v.name));
            let file = new_file(&path)?;
            target.made.push(path.clone());
            file.set_len(v.size).map_err(|e| Failure::io("write", &path, &e))?;
            let (number, name, size) = (v.number, v.name.clone(), v.size);
            target.images.push(Image { number, name, size, path, file, data: 0, zeroes: 0 });
        }
        Ok(target)
    }

    fn write(&mut self, record: &Record) -> Result<(), Failure> {
        let payload = record.payload().map_err(|e| {
            Failure::new(Exit::Failure, format!("record {} can't be unpacked: {e}", record.stamp.lsn), "")
        })?;
        let mut at = 0;
        for (extent, content) in record.extents() {
            let number = extent.address().volume();
            // The reader has refused an extent of no volume.
            let Some(image) = self.images.iter_mut().find(|i| i.number == number) else { continue };
            let written = match content {
                Content::Data => {
                    let data = &payload[at..at + extent.len() as usize];
                    at += data.len();
                    image.data += extent.len();
                    image.file.write_all_at(data, extent.address().offset())
                }
                Content::Zeroes => {
                    image.zeroes += extent.len();
                    zero(&image.file, extent)
                }
            };
            written.map_err(|e| Failure::io("write", &image.path, &e))?;
            let line = json!({
                "lsn": record.stamp.lsn.0,
                "time": rfc3339(record.stamp.time),
                "volume": image.name,
                "offset": extent.address().offset(),
                "length": extent.len(),
                "content": if content == Content::Data { "data" } else { "zeroes" },
            });
            writeln!(self.map, "{line}").map_err(|e| Failure::io("write", &self.map_path, &e))?;
        }
        Ok(())
    }

    /// Everything is durable, and stays.
    fn finish(&mut self) -> Result<(), Failure> {
        let map = self.map.flush().and_then(|()| self.map.get_ref().sync_all());
        map.map_err(|e| Failure::io("write", &self.map_path, &e))?;
        for image in &self.images {
            image.file.sync_all().map_err(|e| Failure::io("write", &image.path, &e))?;
        }
        self.made.clear();
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        // Best effort: the failure that led here is what the user needs to hear.
        for path in &self.made {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn new_file(path: &Path) -> Result<File, Failure> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|e| match e.kind() {
        std::io::ErrorKind::AlreadyExists => {
            let what = format!("{} is there already, and is not overwritten", path.display());
            Failure::new(Exit::Failure, what, "give an empty directory: --to DIR")
        }
        _ => Failure::io("create", path, &e),
    })
}

/// What an earlier record wrote there goes; a hole where that is possible.
fn zero(file: &File, extent: Extent) -> std::io::Result<()> {
    let (mut at, mut left) = (extent.address().offset(), extent.len());
    let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, punch, at as i64, left as i64) {
        Err(nix::errno::Errno::EOPNOTSUPP) => {}
        result => return Ok(result?),
    }
    let zeroes = vec![0; left.min(1 << 20) as usize];
    while left > 0 {
        let part = left.min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..part as usize], at)?;
        (at, left) = (at + part, left - part);
    }
    Ok(())
}

//! The file of what has befallen a node: JSON lines, for `volrep history`.
//!
//! Owns: the file, its predecessor, and the thread that writes. Invariants: lines are appended in the order of the
//! node's actions and made durable; a mark, a promotion, and that a member is outdated, are there before they are
//! answered, and that history is given up before it is, unless the file can't be written, which is told and stops
//! nothing; every other line follows what it tells as soon as the disk lets it, and nothing waits for it; the two files
//! are bounded, the oldest lines go.

use crate::node::history::{Happening, HistoryEvent, Standing, parse};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

/// Bytes of the file beyond which it becomes the old one.
const MOST: u64 = 1 << 20;

/// Lines made durable at once, at most.
const BATCH: usize = 256;

/// A line, and who waits until it is durable.
type Line = (String, Option<Sender<()>>);

/// See the module's documentation.
pub(super) struct HistoryFile {
    standing: Standing,
    lines: Option<Sender<Line>>,
    thread: Option<JoinHandle<()>>,
}

/// Where the older lines are.
fn older(path: &Path) -> PathBuf {
    path.with_extension("old")
}

/// Every event that is kept, oldest first.
pub fn read(path: &Path) -> io::Result<Vec<HistoryEvent>> {
    let mut events = Vec::new();
    for path in [&older(path), path] {
        match fs::read(path) {
            // A torn line may end in the middle of a character.
            Ok(bytes) => events.extend(parse(&String::from_utf8_lossy(&bytes))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
    }
    Ok(events)
}

impl HistoryFile {
    /// Goes on with the file at `path`, which is made when it is needed.
    pub fn start(path: PathBuf) -> io::Result<HistoryFile> {
        let known = read(&path).unwrap_or_else(|e| {
            tracing::error!("{}: what happened before can't be read: {e}", path.display());
            Vec::new()
        });
        let standing = Standing::after(&known);
        let (lines, queue) = unbounded();
        let thread =
            std::thread::Builder::new().name("history".into()).spawn(move || write(&path, &queue))?;
        Ok(HistoryFile { standing, lines: Some(lines), thread: Some(thread) })
    }

    /// Keeps an event.
    pub fn keep(&mut self, event: &HistoryEvent) {
        if !self.standing.note(event) {
            return; // found again at a start
        }
        let Ok(line) = serde_json::to_string(event) else { return };
        let Some(lines) = &self.lines else { return };
        if !is_awaited(&event.what) {
            // The thread ends only with this.
            let _ = lines.send((line, None));
            return;
        }
        let (tell, told) = bounded(1);
        if lines.send((line, Some(tell))).is_ok() {
            let _ = told.recv();
        }
    }
}

/// Nothing goes on before it is durable: marks are believed by what is there, and what an administrator decided about
/// acknowledged writes has to be found afterwards, whatever happens right after the answer.
fn is_awaited(what: &Happening) -> bool {
    use Happening::{GivenUp, Mark, Outdated, Promoted};
    matches!(what, GivenUp { .. } | Mark { .. } | Promoted { .. } | Outdated { .. })
}

impl Drop for HistoryFile {
    fn drop(&mut self) {
        drop(self.lines.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn write(path: &Path, queue: &Receiver<Line>) {
    let mut failed = false;
    while let Ok(first) = queue.recv() {
        let batch: Vec<Line> = std::iter::once(first).chain(queue.try_iter().take(BATCH)).collect();
        let text: String = batch.iter().map(|(line, _)| format!("{line}\n")).collect();
        match append(path, &text) {
            Ok(()) => failed = false,
            Err(e) if !failed => {
                failed = true;
                tracing::error!(
                    "{}: what happens can't be kept: {e}. Replication goes on; make room there, or mend the disk",
                    path.display()
                );
            }
            Err(_) => {}
        }
        for tell in batch.into_iter().filter_map(|(_, tell)| tell) {
            // It waits, or its thread is gone.
            let _ = tell.send(());
        }
    }
}

fn append(path: &Path, text: &str) -> io::Result<()> {
    let open = || OpenOptions::new().append(true).read(true).create(true).mode(0o600).open(path);
    let mut file = open()?;
    let mut len = file.metadata()?.len();
    if len > 0 && len + text.len() as u64 > MOST {
        fs::rename(path, older(path))?;
        (file, len) = (open()?, 0);
    }
    let torn = len > 0 && {
        let mut last = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut last, len - 1)?;
        last != *b"\n"
    };
    // In one write: another line never begins in the middle of a torn one.
    let text = if torn { format!("\n{text}") } else { text.to_owned() };
    file.write_all(text.as_bytes())?;
    file.sync_data()?;
    if len == 0
        && let Some(dir) = path.parent()
    {
        File::open(dir)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::status::MarkStatus;

    fn event(what: Happening) -> HistoryEvent {
        HistoryEvent { at: "2026-01-02T03:04:05.678Z".into(), term: 1, lsn: 9, what }
    }

    fn mark(lsn: u64, text: &str) -> HistoryEvent {
        let (text, time, hash) = (text.to_owned(), String::new(), "ab".to_owned());
        event(Happening::Mark { mark: MarkStatus { text, lsn, time, hash } })
    }

    #[test]
    fn lines_outlive_a_torn_one_and_the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        assert_eq!(read(&path).unwrap(), []);
        let keep = |events: &[HistoryEvent]| {
            let mut file = HistoryFile::start(path.clone()).unwrap();
            events.iter().for_each(|e| file.keep(e));
        };
        let (first, second) = (mark(3, "a"), event(Happening::Retired));
        keep(&[first.clone(), second.clone()]);
        keep(std::slice::from_ref(&first)); // found again
        assert_eq!(read(&path).unwrap(), [first.clone(), second.clone()]);
        // A power cut left half a line.
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 5]).unwrap();
        keep(std::slice::from_ref(&second));
        assert_eq!(read(&path).unwrap(), [first, second]);
        let long = "x".repeat(190);
        let many: Vec<_> = (0..20_000u64)
            .map(|n| event(Happening::Diverged { peer: n.to_string(), reason: long.clone() }))
            .collect();
        keep(&many);
        let kept = read(&path).unwrap();
        assert_eq!(kept.last(), many.last());
        assert!(kept.len() < many.len() && kept.len() > 1000, "{}", kept.len());
        let bytes: u64 =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum();
        assert!(bytes <= 2 * MOST, "{bytes}");
        assert!(
            kept.iter().zip(&many[many.len() - kept.len()..]).all(|(a, b)| a == b),
            "the newest, in order"
        );
    }

    #[test]
    fn what_was_decided_is_durable_when_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        let mut file = HistoryFile::start(path.clone()).unwrap();
        let given_up = event(Happening::GivenUp { after: 2, reason: "r".into() });
        let decided = [
            mark(3, "a"),
            given_up,
            event(Happening::Promoted { cut: None }),
            event(Happening::Outdated { peer: "db2".into() }),
        ];
        for (n, what) in decided.iter().enumerate() {
            file.keep(what);
            assert_eq!(read(&path).unwrap(), decided[..=n], "before anything else happens");
        }
    }
}

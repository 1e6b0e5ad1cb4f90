//! A salvage file, read from its beginning to its end.
//!
//! Owns: the order of its checks. Invariant: a record is handed out only after its hashes, its group, its place in
//! the chain and its extents were checked, and nothing is allocated on the word of a length that was not.

use super::missing;
use crate::cli::failure::Failure;
use crate::cli::places::check_name;
use crate::format::FormatError;
use crate::format::record::{HEADER, Header, Record};
use crate::format::salvage::{Head, MAX_HEAD, TRAILER, Trailer};
use crate::units::{GroupId, HistoryPoint, Lsn};
use bytes::Bytes;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// What a file is good for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum State {
    /// It has its end, and everything that was to be in it.
    Whole,
    /// It has its end, but its node could not read everything any more; why.
    Incomplete(String),
    /// The node was still writing it; why that is known.
    Unfinished(String),
    /// Its end is missing.
    Cut(String),
    /// Something in it is wrong.
    Damaged(String),
    /// It is of another group.
    OtherGroup,
}

impl State {
    /// Its name in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            State::Whole => "whole",
            State::Incomplete(_) => "incomplete",
            State::Unfinished(_) => "unfinished",
            State::Cut(_) => "cut",
            State::Damaged(_) => "damaged",
            State::OtherGroup => "other_group",
        }
    }
    /// Why it is not whole.
    pub fn reason(&self) -> Option<String> {
        match self {
            State::Whole => None,
            State::Incomplete(why) | State::Unfinished(why) | State::Cut(why) | State::Damaged(why) => {
                Some(why.clone())
            }
            State::OtherGroup => Some("it is of another group".into()),
        }
    }
}

/// What the beginning and the end of a file tell; the records between them are not looked at.
pub struct Facts {
    pub path: PathBuf,
    pub state: State,
    pub bytes: u64,
    pub head: Option<Head>,
    pub records: Option<u64>,
    pub first: Option<Lsn>,
    pub last: Option<Lsn>,
}

impl Facts {
    /// Of one file, in a list of this group's.
    pub fn of(path: PathBuf, group: GroupId) -> Result<Facts, Failure> {
        let mut facts = Facts {
            bytes: 0,
            state: State::Whole,
            head: None,
            records: None,
            first: None,
            last: None,
            path: path.clone(),
        };
        let mut reader = match Reader::open(&path, group)? {
            Ok(reader) => reader,
            Err((state, bytes)) => return Ok(Facts { state, bytes, ..facts }),
        };
        facts.bytes = reader.len;
        facts.first = reader.peek()?.map(|h| h.stamp.lsn);
        facts.head = Some(reader.head.clone());
        match reader.end()? {
            Some(t) => {
                facts.records = Some(t.records);
                facts.last = facts.first.map(|_| t.last);
                facts.state = reader.ended(&t);
            }
            None => facts.state = reader.unfinished(),
        }
        Ok(facts)
    }
}

/// What comes next.
pub enum Next {
    /// A record.
    Record(Record),
    /// The end; whether everything was there.
    End(State),
}

/// Reads the records one by one.
pub struct Reader {
    /// Whose records they are.
    pub head: Head,
    /// Bytes of the file.
    pub len: u64,
    /// Records read.
    pub records: u64,
    path: PathBuf,
    file: BufReader<File>,
    at: u64,
    last: Option<HistoryPoint>,
}

/// What a file is, that is not one to be read; and its bytes.
type Refused = (State, u64);

impl Reader {
    /// Reads and checks the head.
    pub fn open(path: &Path, group: GroupId) -> Result<Result<Reader, Refused>, Failure> {
        let io = |e| Failure::io("read", path, &e);
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        let mut file = BufReader::with_capacity(1 << 20, file);
        let mut bytes = Vec::new();
        Read::by_ref(&mut file).take(MAX_HEAD as u64 + 32).read_to_end(&mut bytes).map_err(io)?;
        let (head, at) = match Head::decode(&bytes) {
            Ok(read) => read,
            Err(FormatError::Short) => {
                return Ok(Err((State::Cut(format!("it ends within its head, after {len} bytes")), len)));
            }
            Err(e) => return Ok(Err((State::Damaged(format!("its head can't be read: {e}")), len))),
        };
        if head.group != group {
            return Ok(Err((State::OtherGroup, len)));
        }
        if let Some(v) = head.volumes.iter().find(|v| check_name(&v.name).is_err()) {
            return Ok(Err((State::Damaged(format!("it has a volume called {:?}", v.name)), len)));
        }
        file.seek(SeekFrom::Start(at as u64)).map_err(io)?;
        Ok(Ok(Reader { head, len, records: 0, path: path.into(), file, at: at as u64, last: None }))
    }

    /// Bytes read.
    pub fn at(&self) -> u64 {
        self.at
    }
    /// The last record that was read.
    pub fn last(&self) -> Option<HistoryPoint> {
        self.last
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<(), Failure> {
        self.file.read_exact(buf).map_err(|e| Failure::io("read", &self.path, &e))?;
        self.at += buf.len() as u64;
        Ok(())
    }

    /// The next record, or the end; the inner error says what is wrong at this place.
    pub fn next(&mut self) -> Result<Result<Next, State>, Failure> {
        let at = self.at;
        let left = self.len.saturating_sub(at);
        let mut bytes = vec![0; left.min(HEADER as u64) as usize];
        self.read(&mut bytes)?;
        let damaged = |e: &dyn std::fmt::Display| Ok(Err(State::Damaged(format!("at byte {at}: {e}"))));
        match Trailer::decode(&bytes) {
            Ok(_) if left != TRAILER as u64 => return damaged(&"something follows its end"),
            Ok(trailer) => return Ok(self.check_end(&trailer).map(Next::End)),
            Err(FormatError::Checksum) => return damaged(&"its end has a wrong checksum"),
            Err(_) => {}
        }
        if bytes.len() < HEADER {
            return Ok(Err(self.unfinished()));
        }
        let header = match Header::decode(&bytes) {
            Ok(header) => header,
            Err(e) => return damaged(&e),
        };
        if left < header.len as u64 {
            return Ok(Err(self.unfinished()));
        }
        bytes.resize(header.len, 0);
        self.read(&mut bytes[HEADER..])?;
        let record = match Record::decode(Bytes::from(bytes)) {
            Ok(record) => record,
            Err(e) => return damaged(&e),
        };
        if let Some(why) = self.misplaced(&record) {
            return damaged(&why);
        }
        self.last = Some(record.point());
        self.records += 1;
        Ok(Ok(Next::Record(record)))
    }

    /// Why this record can't be the next one of this file.
    fn misplaced(&self, record: &Record) -> Option<String> {
        let stamp = &record.stamp;
        if stamp.group != self.head.group {
            return Some(format!("record {} is of another group", stamp.lsn));
        }
        let before =
            self.last.or(self.head.fork.filter(|p| self.last.is_none() && p.lsn.next() == stamp.lsn));
        let follows = before.is_none_or(|p| p.lsn.next() == stamp.lsn && p.hash == stamp.prev);
        if !follows || self.head.fork.is_some_and(|p| stamp.lsn <= p.lsn) {
            return Some(format!("record {} does not follow what is before it", stamp.lsn));
        }
        let fits = |e: crate::units::Extent| {
            let (number, end) = (e.address().volume(), e.address().offset() + e.len());
            self.head.volumes.iter().any(|v| v.number == number && end <= v.size)
        };
        let outside = record.extents().any(|(e, _)| !fits(e));
        outside.then(|| format!("record {} writes beyond the volumes", stamp.lsn))
    }

    fn check_end(&self, trailer: &Trailer) -> Result<State, State> {
        let count = trailer.records == self.records;
        let last = self.last.is_none_or(|p| p.lsn == trailer.last);
        let state = self.ended(trailer);
        let same = self.last.is_none_or(|p| p == self.head.last) || state != State::Whole;
        if count && last && same {
            return Ok(state);
        }
        Err(State::Damaged(format!("{} records were read, and its end says otherwise", self.records)))
    }

    /// Of a file with this end.
    fn ended(&self, trailer: &Trailer) -> State {
        let tail = self.head.last.lsn;
        if trailer.last < tail { State::Incomplete(missing(trailer.last.next(), tail)) } else { State::Whole }
    }

    /// Of a file without an end.
    fn unfinished(&self) -> State {
        let upto =
            self.last.map_or_else(String::new, |p| format!("; its last whole record is LSN {}", p.lsn));
        let why = format!("it ends after {} bytes without its end{upto}", self.len);
        let writing = self.path.extension().is_some_and(|x| x == "new");
        if writing { State::Unfinished(why) } else { State::Cut(why) }
    }

    /// The header of the next record, if one comes; it comes again.
    fn peek(&mut self) -> Result<Option<Header>, Failure> {
        let at = self.at;
        let mut bytes = vec![0; self.len.saturating_sub(at).min(HEADER as u64) as usize];
        self.read(&mut bytes)?;
        self.go_to(at)?;
        Ok(Header::decode(&bytes).ok())
    }

    /// The end, if the file has one.
    fn end(&mut self) -> Result<Option<Trailer>, Failure> {
        let Some(start) = self.len.checked_sub(TRAILER as u64) else { return Ok(None) };
        let mut bytes = [0; TRAILER];
        self.go_to(start)?;
        self.read(&mut bytes)?;
        Ok(Trailer::decode(&bytes).ok())
    }

    fn go_to(&mut self, at: u64) -> Result<(), Failure> {
        self.file.seek(SeekFrom::Start(at)).map_err(|e| Failure::io("read", &self.path, &e))?;
        self.at = at;
        Ok(())
    }
}

//! A disk with a volatile cache, whose power can be cut: what a guest's disks are served from, over NBD.
//!
//! Owns: two images, the one that is read and the one that would survive, and the writes between them, in order.
//! Invariants: a FLUSH makes durable what was answered before it was received, and nothing that it need not; after a cut
//! the disk holds what was durable and, of the later writes, none, all, or a random part with torn sectors. A disk without
//! power answers nothing, not even with an error. The protocol is written out here on purpose: nothing is shared with the product.

use crate::prng::Prng;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const SECTOR: u64 = 512;
/// How long the answer to a write is held back, in microseconds, at most: as a rule, and now and then. A FLUSH that is
/// sent meanwhile does not cover that write, as on a disk.
const HELD: [u64; 2] = [200, 2000];
/// How long a FLUSH takes, in microseconds: each order of magnitude as likely as another. It has its effect at the end.
const FLUSH: [u64; 2] = [200, 100_000];
/// How long the flushes before a cut last, as a rule, in microseconds: whoever does not wait for them has time to be found out.
const LAST: [u64; 2] = [1_000, 800_000];

/// A write that is not durable.
struct Pending {
    id: u64,
    offset: u64,
    data: Vec<u8>,
    /// When, by the count of all that was answered.
    answered: Option<u64>,
}

/// An answer that is due later.
enum Due {
    /// To the write of this number.
    Write(u64),
    /// To a flush of the writes that were answered before.
    Flush(u64),
}

impl Pending {
    fn overlaps(&self, other: &Pending) -> bool {
        self.offset < other.offset + other.data.len() as u64
            && other.offset < self.offset + self.data.len() as u64
    }
}

struct State {
    /// What is read.
    now: File,
    /// What would survive.
    durable: File,
    pending: Vec<Pending>,
    next: u64,
    answered: u64,
    /// No flush ends any more.
    held: bool,
    /// Rises whenever power comes or goes; it is on while this is odd.
    power: u64,
    random: Prng,
    /// Answers to come: when, in which order, to what, and the client's word for it.
    answers: BTreeMap<(Instant, u64), (Due, u64)>,
}

/// What became of the writes that no FLUSH had covered.
#[derive(Default, Debug)]
pub struct Lost {
    pub pending: usize,
    pub whole: usize,
    pub torn: usize,
}

/// One disk. The clones are the same disk.
#[derive(Clone)]
pub struct Disk {
    state: Arc<(Mutex<State>, Condvar)>,
    size: u64,
}

impl Disk {
    /// One that holds the bytes of this file. Its images lie beside it.
    pub fn new(image: &Path, seed: u64) -> io::Result<Disk> {
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let copy = image.with_extension("durable");
        copy_sparse(image, &copy)?;
        let (now, durable) = (open(image)?, open(&copy)?);
        let size = now.metadata()?.len();
        let random = Prng::new(seed);
        let state = State {
            now,
            durable,
            pending: Vec::new(),
            next: 0,
            answered: 0,
            held: false,
            power: 0,
            random,
            answers: BTreeMap::new(),
        };
        Ok(Disk { state: Arc::new((Mutex::new(state), Condvar::new())), size })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Power comes: it is served at this socket until power goes.
    pub fn plug(&self, socket: &Path) -> io::Result<()> {
        // Of the last time.
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket)?;
        let mut state = self.lock();
        assert!(state.power.is_multiple_of(2) && state.pending.is_empty(), "it has power already");
        state.power += 1;
        let (disk, power) = (self.clone(), state.power);
        std::thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                // A client that goes away without a word was killed: that is not for the disk to judge.
                let _ = disk.serve(stream, power);
            }
        });
        Ok(())
    }

    fn serve(&self, mut stream: UnixStream, power: u64) -> io::Result<()> {
        greet(&mut stream, self.size)?;
        let answers = Arc::new(Mutex::new(stream.try_clone()?));
        let (disk, out) = (self.clone(), answers.clone());
        std::thread::spawn(move || disk.answer_all(&out, power));
        loop {
            let mut head = [0; 28];
            stream.read_exact(&mut head)?;
            let number = |at: usize, len: usize| {
                head[at..at + len].iter().fold(0u64, |n, byte| n << 8 | u64::from(*byte))
            };
            let (command, cookie, offset, len) = (number(6, 2), number(8, 8), number(16, 8), number(24, 4));
            assert_eq!(number(0, 4), 0x2560_9513, "a request");
            assert!(offset + len <= self.size && len <= 32 << 20, "within the disk");
            let mut data = vec![0; len as usize];
            if command == 1 {
                stream.read_exact(&mut data)?;
            }
            let mut state = self.lock();
            if state.power != power {
                // No power, no answer; the connection stays until the client is gone.
                drop(state);
                return stream.read_to_end(&mut Vec::new()).map(drop);
            }
            match command {
                0 => {
                    state.now.read_exact_at(&mut data, offset)?;
                    drop(state);
                    answer(&answers, cookie, &data)?;
                }
                1 => {
                    state.write(offset, data, cookie)?;
                    drop(state);
                    self.state.1.notify_all();
                }
                2 => return Ok(()),
                3 => {
                    let due = Due::Flush(state.answered);
                    let micros = state.random.log(FLUSH[0], FLUSH[1]);
                    state.answer_in(micros, due, cookie);
                    drop(state);
                    self.state.1.notify_all();
                }
                other => panic!("a client that was told of no such command sends {other}"),
            }
        }
    }

    /// Answers each when its time has come, for as long as there is power.
    fn answer_all(&self, out: &Mutex<UnixStream>, power: u64) {
        let mut state = self.lock();
        while state.power == power {
            let now = Instant::now();
            let Some((&(at, _), _)) = state.answers.first_key_value() else {
                state = self.state.1.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            if at > now {
                let (held, _) =
                    self.state.1.wait_timeout(state, at - now).unwrap_or_else(PoisonError::into_inner);
                state = held;
                continue;
            }
            let Some((_, (due, cookie))) = state.answers.pop_first() else { continue };
            state.answered += 1;
            match due {
                Due::Write(id) => {
                    let when = Some(state.answered);
                    state.pending.iter_mut().filter(|p| p.id == id).for_each(|p| p.answered = when);
                }
                // A file that can't be written is the end of the test: no answer, and the guest hangs.
                Due::Flush(before) => state.flush(before).expect("the disk's file"),
            }
            // Under the lock: a cut comes before the answer, or after it. A client that is gone needs none.
            let _ = answer(out, cookie, &[]);
        }
    }
}

/// Power goes, for all of these at one moment: as a rule, in the middle of a flush.
pub fn cut(disks: &[Disk], seed: u64) -> io::Result<Vec<Lost>> {
    let mut random = Prng::new(seed);
    if random.below(4) > 0 {
        disks.iter().for_each(|disk| disk.lock().hold());
        std::thread::sleep(Duration::from_micros(random.log(LAST[0], LAST[1])));
    }
    let mut states: Vec<_> = disks.iter().map(Disk::lock).collect();
    for state in &mut states {
        assert!(!state.power.is_multiple_of(2), "it has no power");
        state.power += 1;
        state.answers.clear();
        state.held = false;
    }
    let lost = states.iter_mut().map(|state| state.forget(&mut random)).collect();
    drop(states);
    disks.iter().for_each(|disk| disk.state.1.notify_all());
    lost
}

impl State {
    fn write(&mut self, offset: u64, data: Vec<u8>, cookie: u64) -> io::Result<()> {
        self.now.write_all_at(&data, offset)?;
        let id = self.next;
        self.next += 1;
        self.pending.push(Pending { id, offset, data, answered: None });
        let most = HELD[usize::from(self.random.below(20) == 0)];
        let micros = self.random.below(most);
        self.answer_in(micros, Due::Write(id), cookie);
        Ok(())
    }

    /// No flush ends before the power goes.
    fn hold(&mut self) {
        self.held = true;
        self.answers.retain(|_, (due, _)| matches!(due, Due::Write(_)));
    }

    fn answer_in(&mut self, micros: u64, due: Due, cookie: u64) {
        if self.held && matches!(due, Due::Flush(_)) {
            return;
        }
        let at = Instant::now() + Duration::from_micros(micros);
        self.answers.insert((at, self.next), (due, cookie));
        self.next += 1;
    }

    /// Makes durable what was answered up to then.
    fn flush(&mut self, then: u64) -> io::Result<()> {
        let all = std::mem::take(&mut self.pending);
        let covered = |p: &Pending| p.answered.is_some_and(|at| at <= then);
        // What is covered must not lie below an older write that is not.
        let goes = |i: usize| covered(&all[i]) || all[i..].iter().any(|p| covered(p) && p.overlaps(&all[i]));
        let goes: Vec<_> = (0..all.len()).map(goes).collect();
        for (write, goes) in all.into_iter().zip(goes) {
            match goes {
                true => self.durable.write_all_at(&write.data, write.offset)?,
                false => self.pending.push(write),
            }
        }
        Ok(())
    }

    /// Loses what a power cut may take.
    fn forget(&mut self, random: &mut Prng) -> io::Result<Lost> {
        let all = std::mem::take(&mut self.pending);
        let mut lost = Lost { pending: all.len(), ..Lost::default() };
        // Of 16: how many writes survive, and how many of their sectors.
        let (writes, sectors) = match random.below(8) {
            0..3 => (0, 16),
            3 => (16, 16),
            4 | 5 => (1 + random.below(15), 16),
            _ => (1 + random.below(16), 1 + random.below(15)),
        };
        for write in &all {
            if random.below(16) >= writes {
                continue;
            }
            let mut kept = 0;
            let pieces = write.data.chunks(SECTOR as usize);
            let count = pieces.len();
            for (piece, at) in pieces.zip((write.offset..).step_by(SECTOR as usize)) {
                if random.below(16) < sectors {
                    self.durable.write_all_at(piece, at)?;
                    kept += 1;
                }
            }
            lost.whole += usize::from(kept == count);
            lost.torn += usize::from(kept > 0 && kept < count);
        }
        let mut bytes = Vec::new();
        for write in &all {
            bytes.resize(write.data.len(), 0);
            self.durable.read_exact_at(&mut bytes, write.offset)?;
            self.now.write_all_at(&bytes, write.offset)?;
        }
        Ok(lost)
    }
}

/// Copies a file without making its holes real.
fn copy_sparse(from: &Path, to: &Path) -> io::Result<()> {
    let (from, to) = (File::open(from)?, File::create(to)?);
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut piece = vec![0; 1 << 16];
    for at in (0..size).step_by(piece.len()) {
        let n = (size - at).min(piece.len() as u64) as usize;
        from.read_exact_at(&mut piece[..n], at)?;
        if piece[..n].iter().any(|byte| *byte != 0) {
            to.write_all_at(&piece[..n], at)?;
        }
    }
    Ok(())
}

fn answer(out: &Mutex<UnixStream>, cookie: u64, data: &[u8]) -> io::Result<()> {
    let mut words = Vec::with_capacity(16 + data.len());
    words.extend(0x6744_6698u32.to_be_bytes());
    words.extend([0; 4]);
    words.extend(cookie.to_be_bytes());
    words.extend(data);
    out.lock().unwrap_or_else(PoisonError::into_inner).write_all(&words)
}

/// Fixed newstyle, and of the options only what has to be: a disk with a cache and FLUSH.
fn greet(stream: &mut UnixStream, size: u64) -> io::Result<()> {
    const FLAGS: u16 = 1 | 4; // HAS_FLAGS, SEND_FLUSH
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?; // FIXED_NEWSTYLE, NO_ZEROES
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; 16];
        stream.read_exact(&mut head)?;
        let number = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let (option, len) = (number(8), number(12));
        let mut words = vec![0; len.min(1 << 16) as usize];
        stream.read_exact(&mut words)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut out = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
            out.extend(option.to_be_bytes());
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            stream.write_all(&out)
        };
        if option != 6 && option != 7 {
            reply(0x8000_0001, &[])?; // ERR_UNSUP
            continue;
        }
        let info = [&[0, 0][..], &size.to_be_bytes(), &FLAGS.to_be_bytes()].concat();
        reply(3, &info)?; // INFO: EXPORT
        let block = [&[0, 3][..], &512u32.to_be_bytes(), &4096u32.to_be_bytes(), &(1u32 << 20).to_be_bytes()];
        reply(3, &block.concat())?; // INFO: BLOCK_SIZE
        reply(1, &[])?; // ACK
        if option == 7 {
            return Ok(());
        }
    }
}

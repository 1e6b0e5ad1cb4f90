//! The work on bare volumes: one write after the other, each noted before it is sent.
//!
//! Owns: the account of the writes, and every state that they make. Invariant: one request at a time, so that the
//! write order is the account's, known without looking at any journal.

use crate::log::Mark;
use crate::nbd::{Client, FLUSH, TRIM, WRITE, ZEROES};
use crate::prefix::{Image, Prefixes};
use crate::prng::Prng;
use crate::recorder::Recorder;
use std::path::Path;

const SECTOR: u64 = 512;

/// What was written.
pub struct Account {
    prng: Prng,
    image: Image,
    pub states: Prefixes,
    /// How many writes.
    pub count: u64,
    /// Bytes of each volume that are written to.
    sizes: Vec<u64>,
}

impl Account {
    /// On top of these bytes; only so many of each volume's first are written.
    pub fn new(begin: Vec<Vec<u8>>, sizes: Vec<u64>) -> Account {
        let image = Image::new(begin);
        let states = Prefixes::new(0, &image);
        Account { prng: Prng::new(7), image, states, count: 0, sizes }
    }

    /// Everything that is on the volumes.
    pub fn read(socket: &Path, volumes: &[(&str, u64)]) -> Vec<Vec<u8>> {
        let read = |(name, mib): &(&str, u64)| {
            let mut client = Client::connect(socket, name).unwrap();
            (0..*mib).flat_map(|n| client.read(n << 20, 1 << 20).unwrap()).collect()
        };
        volumes.iter().map(read).collect()
    }

    /// The hash of what is there now.
    pub fn state(&self) -> u128 {
        self.image.state()
    }

    /// The same account up to now, which another node goes on with.
    pub fn fork(&mut self) -> Account {
        let (image, states) = (self.image.clone(), self.states.clone());
        Account { prng: self.prng.fork(), image, states, count: self.count, sizes: self.sizes.clone() }
    }

    /// Writes `count` times, with a FLUSH now and then and one at the end. `mark` says how one is noted.
    pub fn work(
        &mut self,
        socket: &Path,
        names: &[&str],
        count: u64,
        recorder: &Recorder,
        mark: fn(u64) -> Mark,
    ) {
        let mut clients: Vec<_> = names.iter().map(|n| Client::connect(socket, n).unwrap()).collect();
        for n in 1..=count {
            self.write(&mut clients);
            if n == count || self.prng.permille(150) {
                let client = &mut clients[self.prng.below(names.len() as u64) as usize];
                client.call(FLUSH, 0, 0, 0, &[]).unwrap();
                recorder.mark(mark(self.count));
            }
        }
    }

    fn write(&mut self, clients: &mut [Client]) {
        let volume = self.prng.below(clients.len() as u64) as usize;
        let size = self.sizes[volume];
        let large = self.prng.permille(300);
        let len = if large { self.prng.within(32 << 10, 128 << 10) } else { self.prng.log(1, 32 << 10) };
        let len = len.next_multiple_of(SECTOR);
        // The same places again and again, and any place now and then.
        let room = if self.prng.permille(700) { size / 8 } else { size - len };
        let offset = self.prng.below(room / SECTOR) * SECTOR;
        self.count += 1;
        if self.prng.permille(80) {
            let kind = if self.prng.permille(500) { ZEROES } else { TRIM };
            self.image.write(volume, offset, len, None);
            self.states.push(&self.image);
            clients[volume].call(kind, 0, offset, len as usize, &[]).unwrap();
            return;
        }
        let mut data = vec![0; len as usize];
        blake3::Hasher::new().update(&self.prng.next().to_le_bytes()).finalize_xof().fill(&mut data);
        self.image.write(volume, offset, len, Some(&data));
        self.states.push(&self.image);
        clients[volume].call(WRITE, 0, offset, data.len(), &data).unwrap();
    }
}

//! What the workload writes: every sector names its volume, its place and the write it belongs to.
//!
//! Owns: that layout. Invariant: a sector that decodes is whole, in its place, and of one write;
//! write 0 stands for zeroes.

use crate::prng::splitmix;

/// Bytes of a sector.
pub const SECTOR: usize = 512;
const MAGIC: [u8; 4] = *b"VSIM";
const ZEROES: [u8; SECTOR] = [0; SECTOR];

/// The number of a write in one run; 0 is "zeroes".
pub type WriteId = u32;

/// Words of a sector behind its head.
const WORDS: usize = (SECTOR - HEAD) / 8;
const HEAD: usize = 24;

/// What makes the words of a rich sector differ from each other.
const GRAIN: [u64; WORDS] = {
    let (mut grain, mut at, mut state) = ([0; WORDS], 0, 0);
    while at < WORDS {
        grain[at] = splitmix(&mut state);
        at += 1;
    }
    grain
};
const SMOOTH: [u64; WORDS] = [0; WORDS];

/// The head of a sector, the word that all of its other words are made of, and what they are mixed with.
fn layout(id: WriteId, volume: u8, sector: u64, rich: bool) -> ([u8; HEAD], u64, &'static [u64; WORDS]) {
    let mut head = [0x5a; HEAD];
    head[..4].copy_from_slice(&MAGIC);
    head[4..8].copy_from_slice(&id.to_le_bytes());
    head[8..16].copy_from_slice(&sector.to_le_bytes());
    (head[16], head[17]) = (volume, u8::from(rich));
    let mut state = (u64::from(id) << 32) ^ sector ^ (u64::from(volume) << 56);
    (head, splitmix(&mut state), if rich { &GRAIN } else { &SMOOTH })
}

/// Fills one sector. `rich` content does not compress.
pub fn fill(out: &mut [u8], id: WriteId, volume: u8, sector: u64, rich: bool) {
    let (head, word, grain) = layout(id, volume, sector, rich);
    out[..HEAD].copy_from_slice(&head);
    for (out, grain) in out[HEAD..].as_chunks_mut().0.iter_mut().zip(grain) {
        *out = (word ^ grain).to_le_bytes();
    }
}

/// Which write a sector came from, or what is wrong with it.
pub fn parse(bytes: &[u8], volume: u8, sector: u64) -> Result<WriteId, String> {
    if bytes[..4] != MAGIC {
        return match *bytes == ZEROES {
            true => Ok(0),
            false => Err(format!("volume {volume} sector {sector}: not a sector of any write")),
        };
    }
    let id = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
    let (head, word, grain) = layout(id, volume, sector, bytes[17] == 1);
    let words = bytes[HEAD..].as_chunks().0.iter().zip(grain);
    // Without a branch for each word: millions of sectors are looked at.
    let wrong = words.fold(0, |wrong, (is, grain)| wrong | (u64::from_le_bytes(*is) ^ word ^ grain));
    if bytes[..HEAD] == head && wrong == 0 && bytes.len() == SECTOR && id != 0 {
        return Ok(id);
    }
    let place = u64::from_le_bytes(bytes[8..16].try_into().expect("eight bytes"));
    Err(format!(
        "volume {volume} sector {sector}: torn or misplaced, says write {id} volume {} sector {place}",
        bytes[16]
    ))
}

/// The writes of a run of sectors.
pub fn parse_run(bytes: &[u8], volume: u8, first: u64) -> Result<Vec<WriteId>, String> {
    let sectors = bytes.chunks_exact(SECTOR).zip(first..);
    sectors.map(|(bytes, sector)| parse(bytes, volume, sector)).collect()
}

/// A sector decodes only where it was written, and only whole.
pub fn check() {
    for rich in [false, true] {
        let mut s = [0; SECTOR];
        fill(&mut s, 7, 1, 99, rich);
        assert_eq!(parse(&s, 1, 99), Ok(7));
        assert!(parse(&s, 1, 98).is_err());
        assert!(parse(&s, 0, 99).is_err());
        for at in 0..SECTOR {
            s[at] ^= 1;
            assert!(parse(&s, 1, 99).is_err(), "byte {at}");
            s[at] ^= 1;
        }
        let mut other = [0; SECTOR];
        fill(&mut other, 8, 1, 99, rich);
        s[256..].copy_from_slice(&other[256..]);
        assert!(parse(&s, 1, 99).is_err(), "torn");
    }
    assert_eq!(parse(&ZEROES, 0, 0), Ok(0));
}

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

/// Fills one sector. `rich` content does not compress.
pub fn fill(out: &mut [u8], id: WriteId, volume: u8, sector: u64, rich: bool) {
    out[..4].copy_from_slice(&MAGIC);
    out[4..8].copy_from_slice(&id.to_le_bytes());
    out[8..16].copy_from_slice(&sector.to_le_bytes());
    out[16] = volume;
    out[17] = u8::from(rich);
    out[18..24].fill(0x5a);
    let mut state = (u64::from(id) << 32) ^ sector ^ (u64::from(volume) << 56);
    let constant = splitmix(&mut state);
    for word in out[24..].chunks_exact_mut(8) {
        let w = if rich { splitmix(&mut state) } else { constant };
        word.copy_from_slice(&w.to_le_bytes());
    }
}

/// Which write a sector came from, or what is wrong with it.
pub fn parse(bytes: &[u8], volume: u8, sector: u64) -> Result<WriteId, String> {
    if *bytes == ZEROES {
        return Ok(0);
    }
    if bytes[..4] != MAGIC {
        return Err(format!("volume {volume} sector {sector}: not a sector of any write"));
    }
    let id = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes"));
    let mut expected = [0; SECTOR];
    fill(&mut expected, id, volume, sector, bytes[17] == 1);
    if *bytes == expected && id != 0 {
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
        s[511] ^= 1;
        assert!(parse(&s, 1, 99).is_err());
    }
    assert_eq!(parse(&ZEROES, 0, 0), Ok(0));
}

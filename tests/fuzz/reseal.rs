//! Checksums put right around contents that are wrong: otherwise nothing behind a checksum would ever be reached.
//!
//! Owns: where the hashes of each format lie. Invariant: bytes too short for that are left as they are.

use volrep::format::message::FRAME;

/// Puts the hashes of a record right.
pub fn reseal_record(bytes: &mut [u8]) {
    if bytes.len() < 192 {
        return;
    }
    let number = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
    let end = number(80).saturating_mul(16).saturating_add(192).saturating_add(number(84));
    if let Some(body) = bytes.get(192..end) {
        let hash = *blake3::hash(body).as_bytes();
        bytes[96..128].copy_from_slice(&hash);
    }
    let chain = *blake3::hash(&bytes[..160]).as_bytes();
    bytes[160..192].copy_from_slice(&chain);
}

/// Puts a hash right that follows a head of 14 bytes and as many more as that says.
fn reseal_counted(bytes: &mut [u8]) {
    let Some(len) = bytes.get(10..14) else { return };
    let body = u32::from_le_bytes(len.try_into().expect("four bytes")) as usize;
    if let Some(covered) = bytes.get(..14 + body) {
        let hash = *blake3::hash(covered).as_bytes();
        if let Some(place) = bytes.get_mut(14 + body..46 + body) {
            place.copy_from_slice(&hash);
        }
    }
}

/// Puts the hash of a superblock's slot right.
pub fn reseal_superblock(slot: &mut [u8]) {
    reseal_counted(slot);
}

/// Puts the hash of a salvage file's head right.
pub fn reseal_salvage(file: &mut [u8]) {
    reseal_counted(file);
}

/// Puts the hash of a segment's header right.
pub fn reseal_segment(block: &mut [u8]) {
    if block.len() < 4096 {
        return;
    }
    let hash = *blake3::hash(&block[..4064]).as_bytes();
    block[4064..4096].copy_from_slice(&hash);
}

/// Puts the check and, where `length`, the length of a frame right.
pub fn reseal_frame(frame: &mut [u8], length: bool) {
    if frame.len() < FRAME {
        return;
    }
    if length {
        let len = (frame.len() - FRAME) as u32;
        frame[..4].copy_from_slice(&len.to_le_bytes());
    }
    let covered = if frame[4] == 6 { &[] } else { &frame[FRAME..] };
    let hash = *blake3::Hasher::new().update(&frame[..8]).update(covered).finalize().as_bytes();
    frame[8..16].copy_from_slice(&hash[..8]);
}

//! The first bytes of a mapped file: whose it is.
//!
//! Layout, 64 bytes: magic of 8 bytes, group of 16, node u64, number u64, then the first 24 bytes of
//! blake3 over all that. The number is one that the superblock gives; another one for each new beginning.
//!
//! Owns: this layout. Invariant: a file that another node, another group or another life has written is
//! never taken for one's own.

use crate::units::{BLOCK, GroupId, NodeId};

/// Bytes before the content.
pub const HEAD: u64 = BLOCK;

/// Whose a mapped file is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Owner {
    /// Group.
    pub group: GroupId,
    /// Node.
    pub node: NodeId,
    /// The superblock's number for it.
    pub number: u64,
}

impl Owner {
    fn head(self, magic: &[u8; 8]) -> [u8; 64] {
        let mut head = [0; 64];
        head[..8].copy_from_slice(magic);
        head[8..24].copy_from_slice(&self.group.0);
        head[24..32].copy_from_slice(&self.node.0.to_le_bytes());
        head[32..40].copy_from_slice(&self.number.to_le_bytes());
        let sum = *blake3::hash(&head[..40]).as_bytes();
        head[40..].copy_from_slice(&sum[..24]);
        head
    }

    /// Whether a file of this kind with these bytes is his.
    pub fn owns(self, magic: &[u8; 8], file: &[u8]) -> bool {
        file.starts_with(&self.head(magic))
    }

    /// Makes it his; `file` has at least [`HEAD`] bytes.
    pub fn claim(self, magic: &[u8; 8], file: &mut [u8]) {
        file[..64].copy_from_slice(&self.head(magic));
    }
}

//! Bytes on disk and on the link, and nothing else: encoders, decoders, hashes.
//!
//! Owns: every layout that outlives a process. Invariant: decoding arbitrary bytes never panics and
//! never allocates more than the stated bound; what decodes encodes to the same bytes again. All
//! integers are little endian. The golden bytes of tests/format pin every layout.

pub mod codec;
pub mod compare;
pub mod fields;
pub mod mapped;
pub mod message;
pub mod record;
pub mod salvage;
pub mod segment;
pub mod superblock;

/// Why bytes were not accepted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FormatError {
    /// They end before the structure does.
    #[error("it is cut short")]
    Short,
    /// They are something else.
    #[error("it is not of this kind (bad magic)")]
    Magic,
    /// Written by another version of the format.
    #[error("it has format version {0}, which this build does not read")]
    Version(u16),
    /// A hash does not match: damage.
    #[error("its checksum does not match")]
    Checksum,
    /// A field is outside its bounds; its name.
    #[error("its field `{0}` is out of bounds")]
    Field(&'static str),
}

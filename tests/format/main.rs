//! The formats: their bytes as they are, and what arbitrary bytes do to their decoders.
//!
//! Owns: golden bytes of everything that outlives a process or travels. Invariants: no byte of a format
//! changes unnoticed; no input makes a decoder panic or allocate more than its bound; what decodes
//! encodes to the same bytes.

mod alloc;
mod bounds;
#[path = "../fuzz/checks.rs"]
mod checks;
mod golden;
mod hostile;
mod outside;
mod properties;
#[path = "../fuzz/reseal.rs"]
mod reseal;
mod values;

//! The `volrep` program.
fn main() {}

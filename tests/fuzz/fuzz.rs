//! The checks under libFuzzer: `FUZZ_TARGET` names the one that is run. See tools/fuzz.
#![no_main]

#[path = "../format/alloc.rs"]
mod alloc;
mod checks;
mod reseal;

use std::sync::OnceLock;

fn target() -> fn(&[u8]) {
    static TARGET: OnceLock<fn(&[u8])> = OnceLock::new();
    *TARGET.get_or_init(|| {
        let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
        let found = checks::TARGETS.iter().find(|(n, _)| *n == name);
        found.unwrap_or_else(|| panic!("FUZZ_TARGET is {name:?}, and none of {:?}", checks::TARGETS)).1
    })
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| target()(data));

//! SIGINT and SIGTERM, taken by a thread instead of ending the process where it stands.
//!
//! Owns: the signal mask of the process. Invariant: a second signal ends the process at once.

use super::failure::{Exit, Failure};
use nix::sys::signal::{SigSet, Signal};
use std::sync::atomic::{AtomicBool, Ordering};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Calls `first` at the first signal. Call it before any other thread exists: they inherit the mask.
pub fn watch(first: impl FnOnce() + Send + 'static) -> Result<(), Failure> {
    let set = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    let fail = |e: String| Failure::new(Exit::Failure, format!("can't take signals: {e}"), "report this");
    set.thread_block().map_err(|e| fail(e.to_string()))?;
    let wait = move || {
        // Only a broken set makes this fail, and then nobody could end the process politely.
        if set.wait().is_ok() {
            ASKED.store(true, Ordering::Relaxed);
            first();
            let _ = set.wait();
        }
        std::process::exit(i32::from(Exit::Interrupted as u8));
    };
    std::thread::Builder::new().name("signals".into()).spawn(wait).map_err(|e| fail(e.to_string()))?;
    Ok(())
}

/// Fails once a signal has come: for work that is undone when it is left.
pub fn check() -> Result<(), Failure> {
    if ASKED.load(Ordering::Relaxed) { Err(Failure::interrupted()) } else { Ok(()) }
}

//! Independent runs on every processor.
//!
//! Owns: the threads. Invariant: what a run does depends on its own job alone, so which thread takes it does not matter.

use std::sync::{Mutex, mpsc};
use std::thread;

/// Does `work` for each of `jobs`, and gives what comes of it to `told` in the order in which the runs end, until
/// that one has had enough.
pub fn each<J: Send, T: Send>(
    jobs: impl Iterator<Item = J> + Send,
    work: impl Fn(J) -> T + Sync,
    mut told: impl FnMut(T) -> bool,
) {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let jobs = Mutex::new(jobs);
    let (sender, ended) = mpsc::channel();
    let next = || jobs.lock().unwrap_or_else(|e| e.into_inner()).next();
    thread::scope(|scope| {
        for sender in vec![sender; workers] {
            let (next, work) = (&next, &work);
            scope.spawn(move || {
                while let Some(job) = next() {
                    if sender.send(work(job)).is_err() {
                        break;
                    }
                }
            });
        }
        for one in ended {
            if !told(one) {
                break;
            }
        }
    });
}

//! Set-ups on a disk that is too small, and set-ups that are interrupted.

use super::Place;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::path::PathBuf;

struct Tmpfs(PathBuf);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily: a process that failed may still be in it.
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A small file system below the place, or why there can't be one.
fn small(place: &Place, bytes: u64) -> Option<Tmpfs> {
    let dir = place.path().join("small");
    std::fs::create_dir(&dir).unwrap();
    let options = format!("size={bytes}");
    match mount(Some("volrep-test"), &dir, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())) {
        Ok(()) => Some(Tmpfs(dir)),
        Err(e) => {
            eprintln!("skipped: a small tmpfs can't be mounted ({e}); run it as root");
            None
        }
    }
}

#[test]
fn a_full_disk_is_told_and_everything_removed() {
    let place = Place::new();
    let Some(tmpfs) = small(&place, 4 << 20) else { return };
    let before = place.tree();
    let ended = place.run(&[
        "init",
        "g",
        "--node",
        "n",
        "--journal-size",
        "8M",
        "--journal-dir",
        "small/journal",
        "--volume",
        "d=disk:1M",
    ]);
    ended.expect(1, &["No space left", "small/journal", "free some space"]);
    assert_eq!(place.tree(), before);
    let path = tmpfs.0.to_str().unwrap();
    let ended = place.run(&[
        "--state-dir",
        path,
        "init",
        "g",
        "--node",
        "n",
        "--journal-size",
        "8M",
        "--volume",
        "d=disk:1M",
    ]);
    ended.expect(1, &["No space left"]);
    assert_eq!(place.tree(), before);
}

#[test]
fn a_write_cache_that_has_no_room_is_refused_at_the_start() {
    let place = Place::new();
    let Some(tmpfs) = small(&place, 4 << 20) else { return };
    place.init(&["data=disk:1M"]).expect(0, &[]);
    let ended = place.run(&["--shm-dir", tmpfs.0.to_str().unwrap(), "serve", "g"]);
    ended.expect(1, &["can't create", "small", "No space left", "free some space"]);
    assert_eq!(std::fs::read_dir(&tmpfs.0).unwrap().count(), 0, "something was left");
}

#[test]
fn an_interrupted_init_is_undone() {
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    let place = Place::new();
    // Enough zeroes to be still reading when the signal comes; a hole reads as fast as memory does.
    std::fs::File::create(place.path().join("big")).unwrap().set_len(1 << 42).unwrap();
    let before = place.tree();
    let mut command = place.command(&["init", "g", "--node", "n", "--buffered", "--volume", "d=big"]);
    let child =
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap();
    // The configurations' directory appears just after the signals are taken.
    while !place.config().exists() {
        std::thread::yield_now();
    }
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let ended = super::Ended::of(child.wait_with_output().unwrap());
    ended.expect(130, &["interrupted"]);
    assert_eq!(place.tree(), before);
}

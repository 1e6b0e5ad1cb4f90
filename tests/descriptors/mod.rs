//! Descriptors that no other test's children inherit.
//!
//! Owns: nothing. Invariant: after [`own_descriptors`], what the calling thread opens is in its own table.

/// Gives the calling thread a table of descriptors of its own, with only the standard three in it. For
/// a test that mounts: a program that another test starts holds copies of every descriptor in the
/// shared table between its fork and its exec, and a file held open there makes `umount` fail.
/// Call it before the thread opens anything.
pub fn own_descriptors() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES).unwrap();
    let listed = std::fs::read_dir("/proc/thread-self/fd").unwrap();
    let listed: Vec<i32> = listed.filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok()).collect();
    // The listing's own descriptor is among them, and closed already.
    for fd in listed.into_iter().filter(|fd| *fd > 2) {
        let _ = nix::unistd::close(fd);
    }
}

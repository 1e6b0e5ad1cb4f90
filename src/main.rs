//! The `volrep` program.

#[global_allocator]
static MEMORY: volrep::sys::memory::Buffers = volrep::sys::memory::Buffers::new();

fn main() -> std::process::ExitCode {
    volrep::cli::run()
}

//! The `volrep` program.

fn main() -> std::process::ExitCode {
    volrep::cli::run()
}

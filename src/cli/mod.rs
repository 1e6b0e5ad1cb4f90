//! The command line: one file per verb.
//!
//! Owns: arguments, configuration, files of a new node, and what people and scripts read. Invariant:
//! stdout is data and stderr the rest; the exit code is one of [`failure::Exit`].
#![allow(clippy::disallowed_methods, reason = "the shell: arguments, environment, files, the clock")]

mod at;
mod attach;
pub mod backing;
mod bench;
pub mod config;
mod detach;
mod drill;
pub mod failure;
mod fence;
mod history;
mod hooks;
mod init;
mod interrupt;
pub mod invitation;
mod join;
mod lease;
mod mark;
mod outdate;
mod output;
pub mod places;
mod progress;
mod promote;
mod provision;
mod refresh;
mod rejoin;
mod remote;
mod salvage;
mod serve;
mod setup;
pub mod size;
mod state;
mod status;
mod status_text;
mod switchover;
mod token;
mod view;

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use failure::{Exit, Failure};
use output::Output;
use places::{PlaceArgs, Places};
use std::process::ExitCode;

const AFTER: &str = "Exit status: 0 done, 1 failed, 2 wrong usage, 10 no such group, 11 busy, 12 peer unreachable, \
                     13 would lose data, 14 diverged, 15 fencing unconfirmed, 130 interrupted.\n\
                     VOLREP_LOG sets what is logged to stderr: error, warn, info (default), debug.";

/// Replicates block volumes in write order to a distant shadow, for any database
#[derive(Parser, Debug)]
#[command(name = "volrep", version, after_help = AFTER, subcommand_required = true, arg_required_else_help = true)]
struct Args {
    #[command(flatten)]
    places: PlaceArgs,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand, Debug)]
enum Verb {
    Init(init::Init),
    Token(token::Token),
    Join(join::Join),
    Serve(serve::Serve),
    Attach(attach::Attach),
    Detach(detach::Detach),
    Status(status::Show),
    Mark(mark::Mark),
    History(history::History),
    Promote(promote::Promote),
    Outdate(outdate::Outdate),
    Lease(lease::Lease),
    Switchover(switchover::Switchover),
    Refresh(refresh::Refresh),
    Verify(refresh::Verify),
    Rejoin(rejoin::Rejoin),
    Resolve(rejoin::Resolve),
    Salvage(salvage::Salvage),
    View(view::View),
    Drill(drill::Drill),
    Bench(bench::Bench),
}

/// Runs the program.
pub fn run() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) => return not_parsed(&e),
    };
    start_log();
    let out = Output { json: args.json };
    let exit = match act(&args, &out) {
        Ok(()) => Exit::Ok,
        Err(failure) => {
            out.failure(&failure);
            failure.exit
        }
    };
    ExitCode::from(exit as u8)
}

fn act(args: &Args, out: &Output) -> Result<(), Failure> {
    let places = Places::resolve(&args.places)?;
    match &args.verb {
        Verb::Init(v) => v.run(&places, out),
        Verb::Token(v) => v.run(&places, out),
        Verb::Join(v) => v.run(&places, out),
        Verb::Serve(v) => v.run(&places, out),
        Verb::Attach(v) => v.run(&places, out),
        Verb::Detach(v) => v.run(&places, out),
        Verb::Status(v) => v.run(&places, out),
        Verb::History(v) => v.run(&places, out),
        Verb::Mark(v) => v.run(&places, out),
        Verb::Promote(v) => v.run(&places, out),
        Verb::Outdate(v) => v.run(&places, out),
        Verb::Lease(v) => v.run(&places, out),
        Verb::Switchover(v) => v.run(&places, out),
        Verb::Refresh(v) => v.run(&places, out),
        Verb::Verify(v) => v.run(&places, out),
        Verb::Rejoin(v) => v.run(&places, out),
        Verb::Resolve(v) => v.run(&places, out),
        Verb::Salvage(v) => v.run(&places, out),
        Verb::View(v) => v.run(&places, out),
        Verb::Drill(v) => v.run(&places, out),
        Verb::Bench(v) => v.run(&places, out),
    }
}

/// Help and version are data; anything else is wrong usage, told to scripts in their form, too.
fn not_parsed(e: &clap::Error) -> ExitCode {
    // Nobody may be there to read it, and the exit status says it as well.
    let _ = e.print();
    if !e.use_stderr() {
        return ExitCode::SUCCESS;
    }
    if std::env::args_os().any(|a| a == "--json")
        && e.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand
    {
        let text = e.render().to_string();
        let failure = Failure::usage(text.trim(), "see --help");
        Output { json: true }.line(&failure.json().to_string());
    }
    ExitCode::from(Exit::Usage as u8)
}

fn start_log() {
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_env_var("VOLREP_LOG")
        .with_default_directive(tracing::level_filters::LevelFilter::INFO.into())
        .from_env_lossy();
    let color = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    log.with_target(false).with_ansi(color).init();
}

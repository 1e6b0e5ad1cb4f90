//! Where data goes: stdout, in one of two forms.
//!
//! Owns: stdout. Invariant: with --json exactly one document per command (or one per line for a
//! command that goes on), whatever happens.

use super::failure::{Exit, Failure};
use serde_json::Value;
use std::io::{self, IsTerminal, Write};

/// The form of a command's data.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON rather than text.
    pub json: bool,
}

impl Output {
    /// Prints one document, or the same facts as text.
    pub fn document(&self, document: &Value, text: impl FnOnce() -> String) {
        if self.json { self.line(&document.to_string()) } else { self.line(&text()) }
    }

    /// Prints one line.
    pub fn line(&self, text: &str) {
        let mut out = io::stdout().lock();
        // A reader that has gone (`| head`) wants no more, and no complaint either.
        if writeln!(out, "{text}").and_then(|()| out.flush()).is_err() {
            std::process::exit(i32::from(Exit::Failure as u8));
        }
    }

    /// Tells of a failure.
    pub fn failure(&self, failure: &Failure) {
        if self.json {
            self.line(&failure.json().to_string());
        }
        eprintln!("volrep: {failure}");
    }
}

/// Asks for the group's name before an act that can't be undone.
pub fn confirm(group: &str, act: &str, yes: bool) -> Result<(), Failure> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        let next = "look at what is said above, then pass --yes";
        return Err(Failure::usage(
            format!("to {act} needs a confirmation, and there is no terminal to ask on"),
            next,
        ));
    }
    eprint!("To {act}, type the group's name: ");
    let mut answer = String::new();
    // A broken terminal gives no answer, and that is a no.
    let _ = io::stdin().read_line(&mut answer);
    if answer.trim() == group {
        return Ok(());
    }
    Err(Failure::new(
        Exit::Failure,
        "not confirmed; nothing was changed",
        format!("type `{group}`, or pass --yes"),
    ))
}

//! `volrep salvage`: what this node has given up, shown and written out. Needs no daemon.
//!
//! Owns: the list. Invariant: nothing here changes a salvage file, and a file is told as what it is: whole, cut
//! short, damaged, or another group's.

mod extract;
mod file;

use super::config;
use super::failure::{Exit, Failure};
use super::output::Output;
use super::places::Places;
use super::size::{grouped, human};
use crate::format::salvage::Head;
use crate::node::status::{SCHEMA_VERSION, rfc3339};
use crate::units::{GroupId, Lsn};
use extract::Extract;
use file::{Facts, State};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Show what this node has given up, and write it out; needs no daemon
///
/// A node that rejoins (`rejoin`, `resolve`) saves the records that only it held in a salvage file first.
#[derive(clap::Args, Clone, Debug)]
pub struct Salvage {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    #[command(subcommand)]
    act: Option<Act>,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum Act {
    /// Show each file: its records, and since when the histories differ (the default)
    List,
    Extract(Extract),
}

impl Salvage {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let config = config::load(places, &self.group)?;
        match &self.act {
            None | Some(Act::List) => self.list(config.group, places, out),
            Some(Act::Extract(extract)) => extract.run((&self.group, config.group), places, out),
        }
    }

    fn list(&self, id: GroupId, places: &Places, out: &Output) -> Result<(), Failure> {
        let dir = places.salvage(&self.group);
        let files: Vec<Facts> =
            files(&dir)?.into_iter().map(|p| Facts::of(p, id)).collect::<Result<_, _>>()?;
        let document = json!({
            "schema_version": SCHEMA_VERSION,
            "group": self.group,
            "directory": dir.display().to_string(),
            "files": files.iter().map(document).collect::<Vec<_>>(),
        });
        out.document(&document, || match files.is_empty() {
            true => {
                format!("`{}` has given up nothing here: no salvage file in {}", self.group, dir.display())
            }
            false => files.iter().map(text).collect::<Vec<_>>().join("\n"),
        });
        Ok(())
    }
}

/// The salvage files in a directory, by name.
fn files(dir: &std::path::Path) -> Result<Vec<PathBuf>, Failure> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Failure::io("read", dir, &e)),
    };
    let ours = |p: &PathBuf| p.extension().is_some_and(|x| x == "salvage" || x == "new");
    let mut files: Vec<_> = entries.flatten().map(|e| e.path()).filter(ours).collect();
    files.sort();
    Ok(files)
}

fn name(f: &Facts) -> String {
    f.path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

fn document(f: &Facts) -> Value {
    let mut document = json!({
        "file": name(f),
        "state": f.state.name(),
        "reason": f.state.reason(),
        "bytes": f.bytes,
        "records": f.records,
        "first_lsn": f.first.map(|l| l.0),
        "last_lsn": f.last.map(|l| l.0),
    });
    if let (Some(head), Value::Object(map)) = (&f.head, &mut document)
        && let Value::Object(more) = origin(head)
    {
        map.extend(more);
    }
    document
}

/// Whose records they are.
fn origin(head: &Head) -> Value {
    let volume = |v: &crate::format::superblock::Volume| json!({ "name": v.name, "size": v.size });
    json!({
        "node": head.name,
        "term": head.term.counter,
        "fork_lsn": head.fork.map(|p| p.lsn.0),
        "tail_lsn": head.last.lsn.0,
        "written": rfc3339(head.time),
        "volumes": head.volumes.iter().map(volume).collect::<Vec<_>>(),
    })
}

fn text(f: &Facts) -> String {
    let mut text = format!("{}  {}  {}", name(f), f.state.name(), human(f.bytes));
    if let Some(head) = &f.head {
        let span = match (f.first, f.last) {
            (Some(first), Some(last)) => format!("LSN {} to {}", grouped(first.0), grouped(last.0)),
            _ => "no records".to_owned(),
        };
        let records = f.records.map_or_else(String::new, |n| format!(", {} records", grouped(n)));
        let fork = match head.fork {
            Some(p) => format!("the histories part after LSN {}", grouped(p.lsn.0)),
            None => "where the histories part is not known".to_owned(),
        };
        let volumes: Vec<_> = head.volumes.iter().map(|v| format!("{} {}", v.name, human(v.size))).collect();
        text += &format!(
            "\n {span}{records}; {fork}\n given up by {} {}, written under term {}; volumes: {}",
            head.name,
            rfc3339(head.time).unwrap_or_default(),
            head.term.counter,
            volumes.join(", ")
        );
    }
    if let Some(reason) = f.state.reason() {
        text += &format!("\n {reason}");
    }
    text
}

/// The file that is meant: a name from the list, or a path.
fn find(given: &std::path::Path, group: &str, places: &Places) -> Result<PathBuf, Failure> {
    let listed = places.salvage(group).join(given);
    if given.components().count() == 1 && listed.exists() {
        return Ok(listed);
    }
    if given.exists() {
        return Ok(given.to_owned());
    }
    let what = format!("there is no salvage file {}", given.display());
    Err(Failure::new(Exit::Failure, what, format!("volrep salvage {group} list shows those of this node")))
}

/// The next step for a file that can't be used as it is.
fn advice(state: &State) -> &'static str {
    match state {
        State::Unfinished(_) => {
            "the node had not finished it: it writes it anew when it rejoins, from its own journal, which still has \
             everything. With --partial what is there is written out"
        }
        State::OtherGroup => "give a file of this group, or the name of the group whose file it is",
        State::Cut(_) | State::Damaged(_) => {
            "look for a copy of it. With --partial the records before that place, each whole and checked, are written out"
        }
        State::Incomplete(_) | State::Whole => "",
    }
}

fn missing(from: Lsn, to: Lsn) -> String {
    format!("records {} to {} could not be read when it was written", grouped(from.0), grouped(to.0))
}

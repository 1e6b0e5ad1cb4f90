//! The repository's rules, as an ordinary test: layers, module docs, unsafe, file sizes, leftovers.
//!
//! Owns: the list of modules and their layers. Invariant: a rule that a file breaks is named with the
//! file and the line; every rule is also shown to fire on a line that breaks it.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules directly below src/, lowest first: one may import those of a lower rank, and no other.
/// Machines (rank 10) never import each other. Within the shell: `sys` and `front` know nothing of
/// their users.
const RANKS: &[(&str, u32)] = &[
    ("units", 0),
    ("disk", 1),
    ("extents", 1),
    ("format", 2),
    ("apply", 10),
    ("cache", 10),
    ("journal", 10),
    ("link", 10),
    ("resync", 10),
    ("role", 10),
    ("node", 20),
    ("sys", 30),
    ("front", 30),
    ("daemon", 31),
    ("control", 32),
    ("cli", 33),
];

/// The first rank of the shell: clocks, descriptors, threads.
const SHELL: u32 = 30;

/// Where `unsafe` may stand.
const UNSAFE: &[&str] = &["src/sys/", "src/front/", "src/daemon/"];

/// What only the shell may name: its standard modules, its crates.
const SHELL_ONLY: &[&str] = &[
    "std::fs",
    "std::net",
    "std::thread",
    "std::process",
    "std::os",
    "std::env",
    "Instant",
    "SystemTime",
    "nix",
    "libc",
    "io_uring",
    "tokio",
    "tokio_uring",
    "memmap2",
    "fuser",
    "clap",
    "getrandom",
    "crossbeam_channel",
];

/// The front ends: none sees another's modules. The loop device belongs to FUSE.
const FRONTS: &[&[&str]] = &[&["fuse", "loopdev"], &["nbd", "knbd"], &["ublk"]];

/// Most lines of a source file.
const LINES: usize = 700;

/// Words that a finished file does not have; split, so that this file has none.
const LEFTOVERS: &[(&str, &str)] =
    &[("to", "do!("), ("unimpl", "emented!("), ("db", "g!("), ("FIX", "ME"), ("XX", "X")];

/// Module names that say nothing.
const VAGUE: &[&str] = &["util", "utils", "common", "misc", "helpers"];

/// A source file: its path from the root, and its lines.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// The names of the modules down to this file: `src/node/links.rs` is `[node, links]`.
    fn module(&self) -> Vec<&str> {
        let path = self.path.trim_start_matches("src/").trim_end_matches(".rs");
        path.split('/').filter(|part| *part != "mod").collect()
    }

    fn rank(&self) -> Option<u32> {
        rank(self.module().first()?)
    }

    /// Lines of code with their numbers: without comments and text literals, and with how many inline
    /// modules each lies in.
    fn code(&self) -> Vec<(usize, String, usize)> {
        let (mut depth, mut inline) = (0i32, Vec::new());
        let mut out = Vec::new();
        for (i, line) in self.text.lines().enumerate() {
            let code = strip(line);
            let opens =
                code.trim_start().trim_start_matches("pub ").starts_with("mod ") && code.contains('{');
            if opens {
                inline.push(depth);
            }
            depth += code.matches('{').count() as i32 - code.matches('}').count() as i32;
            inline.retain(|at| depth > *at);
            out.push((i + 1, code, inline.len()));
        }
        out
    }

    /// The paths of our own that a line names, from the crate's root.
    fn imports(&self, code: &str, inline: usize) -> Vec<Vec<String>> {
        let mut found = Vec::new();
        let mut rest = code;
        while let Some((at, word)) = ["crate::", "super::"]
            .iter()
            .filter_map(|w| rest.find(w).map(|at| (at, *w)))
            .min_by_key(|(at, _)| *at)
        {
            let before = rest[..at].chars().next_back();
            rest = &rest[at + word.len()..];
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '$') {
                continue;
            }
            let mut path: Vec<String> = Vec::new();
            if word == "super::" {
                let mut up = 1usize.saturating_sub(inline);
                while let Some(more) = rest.strip_prefix("super::") {
                    (rest, up) = (more, up + 1);
                }
                let module = self.module();
                path.extend(module[..module.len().saturating_sub(up)].iter().map(|m| (*m).to_owned()));
            }
            for part in rest.split("::").take(3) {
                let name: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let ends = name.len() < part.len();
                if name.is_empty() {
                    // `crate::{a, b}`: every name in the braces.
                    if path.is_empty() && part.starts_with('{') {
                        let names = part.trim_matches(|c| "{};".contains(c)).split(',');
                        found.extend(names.map(|n| vec![n.trim().to_owned()]));
                    }
                    break;
                }
                path.push(name);
                if ends {
                    break;
                }
            }
            found.push(path);
        }
        found
    }
}

fn rank(module: &str) -> Option<u32> {
    RANKS.iter().find(|(name, _)| *name == module).map(|(_, rank)| *rank)
}

/// A line without its comment and without what stands in its text literals.
fn strip(line: &str) -> String {
    let mut out = String::new();
    let (mut text, mut chars) = (false, line.chars().peekable());
    while let Some(c) = chars.next() {
        match c {
            '\\' if text => drop(chars.next()),
            '\'' if !text
                && (chars.peek() == Some(&'"')
                    || chars.peek() == Some(&'{')
                    || chars.peek() == Some(&'}')) =>
            {
                chars.next();
                chars.next();
            }
            '"' => text = !text,
            '/' if !text && chars.peek() == Some(&'/') => break,
            _ if text => {}
            _ => out.push(c),
        }
    }
    out
}

/// Whether `word` stands in `code` as a word of its own.
fn names(code: &str, word: &str) -> bool {
    let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    code.match_indices(word).any(|(at, _)| {
        let after = code[at + word.len()..].chars().next();
        !part(code[..at].chars().next_back()) && !part(after)
    })
}

fn layers(s: &Source, out: &mut Vec<String>) {
    let module = s.module();
    if matches!(module[..], ["lib"] | ["main"]) {
        return;
    }
    let Some(own) = s.rank() else {
        return out.push(format!(
            "{}: module {} has no layer: add it to RANKS and to src/lib.rs",
            s.path, module[0]
        ));
    };
    for (line, code, inline) in s.code() {
        for path in s.imports(&code, inline) {
            let Some(target) = path.first() else {
                out.push(format!("{}:{line}: `super` of a module at the top: say `crate::`", s.path));
                continue;
            };
            if target == module[0] {
                let family = |name: &str| FRONTS.iter().position(|f| f.contains(&name));
                if let ("front", Some(from), Some(to)) = (module[0], module.get(1), path.get(1))
                    && let (Some(from), Some(to)) = (family(from), family(to))
                    && from != to
                {
                    out.push(format!("{}:{line}: a front end sees another's modules", s.path));
                }
                continue;
            }
            // A macro or a type at the crate's root has no rank, and there is none.
            match rank(target) {
                Some(rank) if rank < own => {}
                Some(_) => {
                    out.push(format!("{}:{line}: {} imports {target}: not below it", s.path, module[0]))
                }
                None => out.push(format!("{}:{line}: `{target}` is no module of src/", s.path)),
            }
        }
        if own < SHELL
            && let Some(word) = SHELL_ONLY.iter().find(|w| names(&code, w))
        {
            out.push(format!("{}:{line}: `{word}` below the shell", s.path));
        }
    }
}

fn unsafety(s: &Source, out: &mut Vec<String>) {
    let lines: Vec<&str> = s.text.lines().collect();
    for (line, code, _) in s.code() {
        if !names(&code, "unsafe") {
            continue;
        }
        if s.path.starts_with("src/") && !UNSAFE.iter().any(|dir| s.path.starts_with(dir)) {
            out.push(format!("{}:{line}: unsafe outside {UNSAFE:?}", s.path));
        }
        // The comment ends right above the statement, or above what the statement continues.
        let above = lines[..line - 1].iter().rev().take(8).map(|l| l.trim());
        let mut comment =
            above.skip_while(|l| !l.starts_with("//") && !l.ends_with(';') && !l.ends_with('}'));
        let stated = comment.by_ref().take_while(|l| l.starts_with("//")).any(|l| l.contains("SAFETY:"));
        let here = lines[line - 1].contains("SAFETY:");
        if !stated && !here && !code.contains("unsafe fn") && !code.contains("unsafe extern") {
            out.push(format!("{}:{line}: unsafe without a SAFETY comment", s.path));
        }
    }
}

fn shape(s: &Source, out: &mut Vec<String>) {
    if !s.text.starts_with("//!") && s.path != "src/main.rs" {
        out.push(format!("{}: begins without `//!`: what it owns, its invariant", s.path));
    }
    let lines = s.text.lines().count();
    if lines > LINES {
        out.push(format!("{}: {lines} lines, more than {LINES}: divide it", s.path));
    }
    for (i, line) in s.text.lines().enumerate() {
        if let Some((a, b)) = LEFTOVERS.iter().find(|(a, b)| line.contains(&format!("{a}{b}"))) {
            out.push(format!("{}:{}: {a}{b} is left", s.path, i + 1));
        }
    }
    if let Some(vague) = s.path.trim_end_matches(".rs").split('/').find(|part| VAGUE.contains(part)) {
        out.push(format!("{}: a module named {vague} says nothing", s.path));
    }
}

fn files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    files(&root.join("src"), &mut paths);
    files(&root.join("tests"), &mut paths);
    paths.sort();
    let source = |p: &PathBuf| Source {
        path: p.strip_prefix(root).unwrap().to_str().unwrap().to_owned(),
        text: fs::read_to_string(p).unwrap(),
    };
    paths.iter().map(source).collect()
}

fn check(rule: fn(&Source, &mut Vec<String>), only: &str) {
    let mut broken = Vec::new();
    let sources = sources();
    assert!(sources.len() > 50, "the sources were not found");
    sources.iter().filter(|s| s.path.starts_with(only)).for_each(|s| rule(s, &mut broken));
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn imports_point_down_only() {
    check(layers, "src/");
}

#[test]
fn unsafe_is_where_it_belongs_and_says_why() {
    check(unsafety, "");
}

#[test]
fn every_file_has_its_documentation_and_no_leftovers() {
    check(shape, "");
}

#[test]
fn the_code_map_names_every_module() {
    let sources = sources();
    let map = &sources.iter().find(|s| s.path == "src/lib.rs").unwrap().text;
    let declared = map.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';'));
    for module in declared {
        assert!(rank(module).is_some(), "{module} has no layer in RANKS");
        assert!(map.contains(&format!("[`{module}`]")), "{module} is not in the code map");
    }
}

/// The name of a planted bug: a number first.
fn is_planted(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_digit()) && word.contains('-')
}

/// What is wrong with a page of kernel-notes/: a row of a table of tests that names none that exists, and does
/// not say why there is none. `known` says what exists.
fn notes(path: &str, text: &str, known: &dyn Fn(&str) -> bool) -> Vec<String> {
    let mut broken = Vec::new();
    let mut tests = false;
    for (i, line) in text.lines().enumerate() {
        if !line.starts_with('|') {
            tests = false;
            continue;
        }
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let last = *cells.last().expect("a line has a cell");
        if !tests {
            tests = last == "test";
            continue;
        }
        let name = |word: &&str| {
            word.ends_with(".bash")
                || is_planted(word)
                || word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        };
        let names: Vec<&str> = last.split('`').skip(1).step_by(2).filter(name).collect();
        broken.extend(
            names.iter().filter(|n| !known(n)).map(|n| format!("{path}:{}: there is no test {n}", i + 1)),
        );
        let excused = ["none: ", "none here: ", "every "].iter().any(|e| last.starts_with(e));
        let rule = last.chars().all(|c| "-: ".contains(c));
        if names.is_empty() && !excused && !rule {
            broken.push(format!("{path}:{}: neither a test nor why there is none", i + 1));
        }
    }
    broken
}

#[test]
fn the_kernel_notes_name_tests_that_exist_and_the_index_names_the_pages() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = sources();
    let scenarios = fs::read_to_string(root.join("tests/kernel/ublk_alone.py")).unwrap();
    let known = |name: &str| {
        let function = format!("fn {name}(");
        sources.iter().any(|s| s.text.contains(&function))
            || scenarios.contains(&format!("\ndef {name}("))
            || root.join("tests/kernel").join(name).is_file()
            || (is_planted(name) && root.join(format!("tests/bugs/{name}.patch")).is_file())
    };
    let index = fs::read_to_string(root.join("kernel-notes/README.md")).unwrap();
    let mut broken = Vec::new();
    for entry in fs::read_dir(root.join("kernel-notes")).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let text = fs::read_to_string(entry.path()).unwrap();
        if name != "README.md" && !index.contains(&format!("]({name})")) {
            broken.push(format!("kernel-notes/README.md does not name {name}"));
        }
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !root.join("kernel-notes").join(link).exists() {
                broken.push(format!("kernel-notes/{name}: there is no page {link}"));
            }
        }
        broken.extend(notes(&format!("kernel-notes/{name}"), &text, &known));
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

/// Each rule notices what it is there for.
#[test]
fn the_rules_fire() {
    let fires = |rule: fn(&Source, &mut Vec<String>), path: &str, text: &str| {
        let mut out = Vec::new();
        rule(&Source { path: path.into(), text: format!("//! Doc.\n{text}\n") }, &mut out);
        !out.is_empty()
    };
    let cases: &[(&str, &str, bool)] = &[
        ("src/journal/mod.rs", "use crate::units::Lsn;", false),
        ("src/journal/mod.rs", "use crate::cache::Cache;", true),
        ("src/journal/mod.rs", "use crate::{units, cache};", true),
        ("src/journal/mod.rs", "fn f() { crate::node::f() }", true),
        ("src/journal/maps.rs", "use super::super::cache::Cache;", true),
        ("src/journal/maps.rs", "use super::Tail;", false),
        ("src/journal/mod.rs", "use super::cache::Cache;", true),
        ("src/journal/mod.rs", "mod tests {\n    use super::*;\n}", false),
        ("src/journal/mod.rs", "// crate::cache", false),
        ("src/units.rs", "use crate::format::record::Record;", true),
        ("src/node/mod.rs", "use crate::sys::clock;", true),
        ("src/node/mod.rs", "let now = Instant::now();", true),
        ("src/node/mod.rs", "use std::fs;", true),
        ("src/cli/mod.rs", "use std::fs;", false),
        ("src/sys/mod.rs", "use crate::daemon::reactor;", true),
        ("src/front/nbd/mod.rs", "use crate::front::fuse::FuseDevice;", true),
        ("src/front/nbd/mod.rs", "use super::loopdev::X;", true),
        ("src/front/fuse.rs", "use crate::front::loopdev::X;", false),
        ("src/front/knbd/mod.rs", "use crate::front::nbd::X;", false),
        ("src/front/knbd/mod.rs", "use crate::front::loopdev::X;", true),
        ("src/strange/mod.rs", "use crate::units::Lsn;", true),
    ];
    for (path, text, wanted) in cases {
        assert_eq!(fires(layers, path, text), *wanted, "{path}: {text}");
    }
    let block = "let x = unsafe { f() };";
    assert!(fires(unsafety, "src/sys/mod.rs", block));
    assert!(fires(unsafety, "src/sys/mod.rs", &format!("// SAFETY: sound.\nlet y = 1;\n{block}")));
    assert!(!fires(unsafety, "src/sys/mod.rs", &format!("// SAFETY: sound.\n{block}")));
    assert!(!fires(unsafety, "src/sys/mod.rs", "// SAFETY: sound.\nlet x =\n    unsafe { f() };"));
    assert!(fires(unsafety, "src/node/mod.rs", &format!("// SAFETY: sound.\n{block}")));
    assert!(fires(shape, "src/util.rs", ""));
    assert!(fires(shape, "src/node/common/mod.rs", ""));
    assert!(fires(shape, "src/node/mod.rs", &format!("{}{}x)", "db", "g!(")));
    assert!(fires(shape, "src/node/mod.rs", &"\n".repeat(LINES)));
    assert!(!fires(shape, "src/node/mod.rs", ""));
    assert!(is_planted("01-a-bug") && !is_planted("a-1") && !is_planted("10_000"));
    let page = |cell: &str| format!("| claim | test |\n| --- | --- |\n| so | {cell} |\n");
    let fires = |cell: &str| !notes("page", &page(cell), &|name| name == "it_is").is_empty();
    assert!(!fires("`it_is`, and `Other`") && !fires("none: no disk"));
    assert!(fires("`it_is`, `it_is_not`") && fires("seen") && fires("none") && fires("`gone.bash`"));
}

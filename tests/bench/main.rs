//! `tools/bench` stays alive between benchmarks: it names its parts, its programs are Python, and a result becomes one
//! page that needs nothing else. Nothing is measured here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn bench(args: &[&str]) -> Output {
    Command::new(root().join("tools/bench")).args(args).output().expect("tools/bench can be run")
}

/// The files below a directory of the repository, one level deep.
fn files(dir: &str) -> Vec<PathBuf> {
    let read = fs::read_dir(root().join(dir)).expect("the directory is there");
    let mut found: Vec<PathBuf> = read.map(|e| e.expect("an entry").path()).filter(|p| p.is_file()).collect();
    found.sort();
    found
}

fn python(path: &Path) -> bool {
    let text = fs::read_to_string(path).unwrap_or_default();
    path.extension().is_some_and(|e| e == "py")
        || text.lines().next().is_some_and(|l| l.starts_with("#!") && l.contains("python"))
}

#[test]
fn every_part_is_listed() {
    let done = bench(&["--list"]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let listed = String::from_utf8(done.stdout).expect("text");
    for part in files("bench/parts").iter().filter(|p| python(p)) {
        let name = part.file_stem().expect("a name").to_string_lossy();
        let words = |l: &str| l.split_whitespace().next().map(String::from);
        assert!(
            listed.lines().any(|l| words(l).as_deref() == Some(&*name)),
            "{name} is not listed:\n{listed}"
        );
    }
}

#[test]
fn a_part_that_is_not_there_is_named() {
    let done = bench(&["no-such-part"]);
    assert!(!done.status.success());
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(said.contains("no-such-part") && said.contains("peers"), "{said}");
}

#[test]
fn every_program_compiles() {
    let dirs = ["bench", "bench/parts", "bench/guest"];
    let programs: Vec<PathBuf> = dirs
        .iter()
        .flat_map(|d| files(d))
        .chain([root().join("tools/bench")])
        .filter(|p| python(p))
        .collect();
    assert!(programs.len() > 8, "{programs:?}");
    let check = "import ast, sys\nfor path in sys.argv[1:]:\n    ast.parse(open(path).read(), path)";
    let done =
        Command::new("/usr/bin/python3").arg("-c").arg(check).args(&programs).output().expect("python3");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

/// The page of a result, in a directory of its own.
fn render(result: &Path) -> String {
    let dir = tempfile::tempdir().expect("a directory");
    let copy = dir.path().join("result.json");
    fs::copy(result, &copy).expect("copied");
    let done = bench(&["--render", copy.to_str().expect("a path")]);
    assert!(done.status.success(), "{}: {}", result.display(), String::from_utf8_lossy(&done.stderr));
    fs::read_to_string(dir.path().join("result.html")).expect("the page")
}

#[test]
fn a_result_becomes_one_page_that_needs_nothing_else() {
    let page = render(&root().join("tests/bench/result.json"));
    assert_eq!(page.matches("<svg").count(), 3, "a bar, a line and a cdf plot");
    for wanted in [
        "1 of 2 aims reached, 1 not measured",
        "0.50×",
        "≥ 1×",
        ">missed<",
        ">reached<",
        "interrupted",
        "no such device",
        "x&lt;y",
    ] {
        assert!(page.contains(wanted), "{wanted} is not on the page:\n{page}");
    }
    for outside in ["http:", "https:", "src=", "@import", "<link", "<script", "nan"] {
        assert!(!page.contains(outside), "{outside} is on the page");
    }
}

#[test]
fn kept_results_can_be_rendered_again() {
    let kept = files("bench/results").into_iter().filter(|p| {
        let name = p.file_name().expect("a name").to_string_lossy().into_owned();
        name.starts_with("bench-") && name.ends_with(".json")
    });
    for result in kept {
        assert!(render(&result).contains("aims reached"), "{}", result.display());
    }
}

//! What was measured, for people and for scripts.
//!
//! Owns: the figures that are told. Invariant: both forms tell the same, and each comes from fio, from the daemon or from
//! the kernel.

use super::plan::Plan;
use crate::cli::failure::{Exit, Failure};
use crate::cli::size::{human, span};
use crate::node::status::{Lag, SCHEMA_VERSION};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// What a daemon has used.
#[derive(Clone, PartialEq, Debug)]
pub struct Spent {
    /// Which.
    pub name: &'static str,
    /// Of all its threads, in user and kernel.
    pub cpu_seconds: f64,
    /// Written to disks, as the kernel counts it.
    pub disk_bytes: u64,
    /// Written to the journal.
    pub journal_bytes: u64,
    /// Records sent to shadows.
    pub wire_bytes: u64,
}

impl Spent {
    /// Since `before`.
    pub fn since(&self, before: &Spent) -> Spent {
        Spent {
            name: self.name,
            cpu_seconds: self.cpu_seconds - before.cpu_seconds,
            disk_bytes: self.disk_bytes.saturating_sub(before.disk_bytes),
            journal_bytes: self.journal_bytes.saturating_sub(before.journal_bytes),
            wire_bytes: self.wire_bytes.saturating_sub(before.wire_bytes),
        }
    }
}

/// One kind of request of one job.
#[derive(Clone, PartialEq, Debug)]
struct Row {
    job: String,
    op: &'static str,
    per_second: f64,
    bytes_per_second: f64,
    bytes: u64,
    /// p50, p99, p99.9, seconds; 0 where fio told none.
    latency: [f64; 3],
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Report {
    bare: Value,
    through: Value,
    rows: Vec<(Row, Row)>,
    nodes: Vec<Spent>,
    lag: Option<Lag>,
    /// Until everything was applied; `None`: it was not.
    settled: Option<Duration>,
}

impl Report {
    /// From fio's two documents, what the daemons used, the shadow's lag, and how long all took to be applied at the end.
    pub fn new(
        bare: Value,
        through: Value,
        nodes: Vec<Spent>,
        lag: Option<Lag>,
        settled: Option<Duration>,
    ) -> Result<Report, Failure> {
        let (a, b) = (rows(&bare), rows(&through));
        let same = a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| (&a.job, a.op) == (&b.job, b.op));
        if !same || a.is_empty() {
            let what = "fio's two runs did not do the same kinds of requests: too short to compare";
            return Err(Failure::new(Exit::Failure, what, "give more --seconds"));
        }
        Ok(Report { rows: a.into_iter().zip(b).collect(), bare, through, nodes, lag, settled })
    }

    /// fio's document of the run on the bare file.
    pub fn bare(&self) -> &Value {
        &self.bare
    }
    /// fio's document of the run through volrep.
    pub fn through(&self) -> &Value {
        &self.through
    }

    /// Bytes that fio wrote, and all that it moved, through volrep.
    fn moved(&self) -> (u64, u64) {
        let of = |op: &str| self.rows.iter().filter(|(_, r)| r.op == op).map(|(_, r)| r.bytes).sum::<u64>();
        (of("write"), of("write") + of("read"))
    }

    /// For scripts.
    pub fn json(&self, plan: &Plan, kept: Option<&[PathBuf]>) -> Value {
        let (written, moved) = self.moved();
        let side = |r: &Row| {
            json!({
                "per_second": r.per_second,
                "bytes_per_second": r.bytes_per_second,
                "p50_seconds": r.latency[0],
                "p99_seconds": r.latency[1],
                "p99_9_seconds": r.latency[2],
            })
        };
        let row = |(bare, through): &(Row, Row)| {
            json!({
                "job": bare.job,
                "op": bare.op,
                "bare": side(bare),
                "volrep": side(through),
                "ratio": ratio(through.per_second, bare.per_second),
            })
        };
        let node = |n: &Spent| {
            json!({
                "node": n.name,
                "cpu_seconds": n.cpu_seconds,
                "cpu_seconds_per_gib": ratio(n.cpu_seconds, moved as f64 / GIB),
                "journal_bytes": n.journal_bytes,
                "journal_bytes_per_byte_written": ratio(n.journal_bytes as f64, written as f64),
                "disk_bytes": n.disk_bytes,
                "disk_bytes_per_byte_written": ratio(n.disk_bytes as f64, written as f64),
                "wire_bytes": n.wire_bytes,
                "wire_bytes_per_byte_written": ratio(n.wire_bytes as f64, written as f64),
            })
        };
        json!({
            "schema_version": SCHEMA_VERSION,
            "group": plan.group,
            "dry_run": false,
            "profile": plan.profile.name(),
            "seconds": plan.seconds,
            "size": plan.size,
            "direct": plan.direct,
            "live_group_shares_its_disks": plan.live,
            "directories": plan.directories(),
            "journal_size": plan.journal.geometry().len(),
            "compression": plan.config.compression,
            "shadow": plan.shadow.is_some(),
            "sync": plan.sync,
            "rows": self.rows.iter().map(row).collect::<Vec<_>>(),
            "bytes_written": written,
            "bytes_moved": moved,
            "nodes": self.nodes.iter().map(node).collect::<Vec<_>>(),
            "lag": self.lag,
            "applied_after_seconds": self.settled.map(|d| d.as_secs_f64()),
            "kept": kept.unwrap_or_default(),
            "fio": { "bare": self.bare, "volrep": self.through },
        })
    }

    /// For people.
    pub fn text(&self, plan: &Plan, kept: Option<&[PathBuf]>) -> String {
        let mut text = format!("{}\n{}\n", plan.heading(), plan.places_text());
        text += &self.table();
        let (written, moved) = self.moved();
        for n in &self.nodes {
            let cpu = match ratio(n.cpu_seconds, moved as f64 / GIB) {
                Some(each) => format!("{each:.2} s of CPU per GiB read and written"),
                None => "no CPU figure".to_owned(),
            };
            let per =
                |bytes: u64| ratio(bytes as f64, written as f64).map_or("-".into(), |r| format!("{r:.2}"));
            let (journal, disk) = (per(n.journal_bytes), per(n.disk_bytes));
            text += &format!(
                "\n{:<8} {cpu} ({:.1} s); for each byte written {journal} into the journal, {disk} to disks",
                n.name, n.cpu_seconds
            );
            if n.wire_bytes > 0 {
                text += &format!(", {} to the shadow", per(n.wire_bytes));
            }
        }
        let settled = match self.settled {
            Some(after) => format!("everything was applied {} after the end", span(after.as_secs_f64())),
            None => "not everything was applied minutes after the end: the shadow is slower than the load"
                .to_owned(),
        };
        match &self.lag {
            Some(lag) => {
                let of = &lag.applied;
                let (p50, p99, max) = (span(of.p50), span(of.p99), span(of.max));
                text += &format!(
                    "\nlag      p50 {p50}, p99 {p99}, at most {max}, from seal to applied; {settled}"
                );
            }
            None => text += &format!("\nbacking  {settled}"),
        }
        for path in kept.unwrap_or_default() {
            text += &format!("\nkept     {}", path.display());
        }
        text
    }

    fn table(&self) -> String {
        let head = ["job", "", "on", "ops/s", "bytes/s", "p50", "p99", "p99.9", "x bare"].map(str::to_owned);
        let mut lines: Vec<[String; 9]> = vec![head];
        for (bare, through) in &self.rows {
            let line = |r: &Row, on: &str, times: String| {
                let much = if r.op == "fsync" { String::new() } else { human(r.bytes_per_second as u64) };
                let [p50, p99, p999] = r.latency.map(short);
                [
                    r.job.clone(),
                    r.op.into(),
                    on.into(),
                    format!("{:.0}", r.per_second),
                    much,
                    p50,
                    p99,
                    p999,
                    times,
                ]
            };
            let times = ratio(through.per_second, bare.per_second).map_or("-".into(), |x| format!("{x:.2}"));
            lines.push(line(bare, "bare", String::new()));
            lines.push(line(through, "volrep", times));
        }
        let width = |i: usize| lines.iter().map(|l| l[i].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..9).map(width).collect();
        let mut text = String::new();
        for line in &lines {
            let cell = |(i, c): (usize, &String)| {
                let pad = " ".repeat(widths[i] - c.chars().count());
                if i < 3 { format!("{c}{pad}") } else { format!("{pad}{c}") }
            };
            let cells: Vec<String> = line.iter().enumerate().map(cell).collect();
            text += cells.join("  ").trim_end();
            text.push('\n');
        }
        text
    }
}

const GIB: f64 = (1u64 << 30) as f64;

fn ratio(a: f64, b: f64) -> Option<f64> {
    (b > 0.0).then(|| a / b)
}

/// A latency: from microseconds on.
fn short(seconds: f64) -> String {
    match seconds {
        s if s <= 0.0 => String::new(),
        s if s < 0.001 => format!("{:.0} us", s * 1e6),
        s if s < 0.1 => format!("{:.2} ms", s * 1e3),
        s => span(s),
    }
}

/// What each job did.
fn rows(document: &Value) -> Vec<Row> {
    let mut rows = Vec::new();
    for job in document["jobs"].as_array().into_iter().flatten() {
        let name = job["jobname"].as_str().unwrap_or_default();
        for op in ["read", "write"] {
            let of = &job[op];
            if of["total_ios"].as_u64().unwrap_or(0) > 0 {
                rows.push(Row {
                    job: name.to_owned(),
                    op,
                    per_second: of["iops"].as_f64().unwrap_or(0.0),
                    bytes_per_second: of["bw_bytes"].as_f64().unwrap_or(0.0),
                    bytes: of["io_bytes"].as_u64().unwrap_or(0),
                    latency: latencies(&of["clat_ns"]),
                });
            }
        }
        let (syncs, ms) = (job["sync"]["total_ios"].as_f64(), job["write"]["runtime"].as_f64());
        if let (Some(syncs), Some(ms)) = (syncs.filter(|n| *n > 0.0), ms.filter(|ms| *ms > 0.0)) {
            let latency = latencies(&job["sync"]["lat_ns"]);
            let per_second = syncs / ms * 1e3;
            rows.push(Row {
                job: name.to_owned(),
                op: "fsync",
                per_second,
                bytes_per_second: 0.0,
                bytes: 0,
                latency,
            });
        }
    }
    rows
}

fn latencies(of: &Value) -> [f64; 3] {
    let at = |p: &str| of["percentile"][p].as_f64().unwrap_or(0.0) / 1e9;
    [at("50.000000"), at("99.000000"), at("99.900000")]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(iops: f64) -> Value {
        let percentile = json!({ "50.000000": 800_000, "99.000000": 2_500_000, "99.900000": 150_000_000 });
        let write = json!({ "total_ios": 10, "iops": iops, "bw_bytes": iops * 8192.0, "io_bytes": 81_920, "runtime": 1000,
            "clat_ns": { "percentile": percentile } });
        let sync = json!({ "total_ios": 5, "lat_ns": { "percentile": percentile } });
        json!({ "jobs": [{ "jobname": "wal", "read": { "total_ios": 0 }, "write": write, "sync": sync }] })
    }

    #[test]
    fn rows_are_what_fio_says_and_the_ratio_is_of_requests() {
        let report = Report::new(document(1000.0), document(1500.0), vec![], None, None).unwrap();
        assert_eq!(report.rows.len(), 2);
        let (bare, through) = &report.rows[0];
        assert_eq!((bare.op, bare.per_second, through.per_second), ("write", 1000.0, 1500.0));
        assert_eq!(bare.latency, [0.0008, 0.0025, 0.15]);
        assert_eq!((report.rows[1].0.op, report.rows[1].0.per_second), ("fsync", 5.0));
        assert_eq!(report.moved(), (81_920, 81_920));
        let table = report.table();
        let line = table.lines().nth(2).unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[..4], ["wal", "write", "volrep", "1500"], "{table}");
        assert_eq!(words.last(), Some(&"1.50"), "{table}");
        assert!(line.contains("800 us") && line.contains("2.50 ms") && line.contains("150 ms"), "{table}");
    }

    #[test]
    fn runs_that_did_different_things_are_not_compared() {
        let nothing = json!({ "jobs": [] });
        assert!(Report::new(document(1.0), nothing.clone(), vec![], None, None).is_err());
        assert!(Report::new(nothing.clone(), nothing, vec![], None, None).is_err());
    }
}

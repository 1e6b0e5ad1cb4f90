//! A group's configuration file: NAME.toml.
//!
//! Owns: its fields, their defaults and bounds. Invariant: a configuration that was loaded is within
//! every bound; what [`render`] writes loads to the same configuration.

mod render;
mod settings;

pub use render::render;
pub use settings::boot_id;

use super::failure::{Exit, Failure};
use super::places::{Places, check_name};
use super::size::Size;
use crate::format::superblock::Geometry;
use crate::units::{GroupId, MICROS, NodeId};
use serde::{Deserialize, Deserializer, de};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of a key.
pub const KEY: usize = 32;
/// Longest `apply_delay`.
pub const MAX_DELAY: Duration = Duration::from_secs(30 * 86_400);
/// Port of the first group on a machine.
pub const PORT: u16 = 7654;

/// The file's contents.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The group's identity.
    #[serde(deserialize_with = "group_id")]
    pub group: GroupId,
    /// This node's identity.
    #[serde(deserialize_with = "node_id")]
    pub node_id: NodeId,
    /// This node's name.
    pub node: String,
    /// Address and port on which peers are accepted; none are without it.
    pub listen: Option<String>,
    /// File with the group's key; relative to this file.
    pub key_file: PathBuf,
    /// What a full journal does.
    #[serde(default)]
    pub on_full: OnFull,
    /// While this node is a shadow: its image is held back by so much.
    #[serde(default)]
    pub apply_delay: Span,
    /// Strongest zstd level; 0 never compresses. Under load faster ones are taken, or none.
    #[serde(default = "default_compression")]
    pub compression: i32,
    /// Program that proves that a node can no longer write.
    pub fence_hook: Option<PathBuf>,
    /// The database's start and stop scripts.
    #[serde(default)]
    pub hooks: Hooks,
    /// Write cache.
    #[serde(default)]
    pub cache: Cache,
    /// Journal.
    #[serde(default)]
    pub journal: Journal,
    /// Memory for the links.
    #[serde(default)]
    pub link: Link,
    /// The devices by which volumes are used.
    #[serde(default)]
    pub device: Device,
    /// Volumes, in the order of their numbers.
    #[serde(rename = "volume")]
    pub volumes: Vec<Volume>,
    /// Other nodes.
    #[serde(rename = "peer", default)]
    pub peers: Vec<Peer>,
    /// Intervals that differ from the defaults.
    #[serde(default)]
    pub timing: TimingOverrides,
}

/// What a full journal does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnFull {
    /// The writer waits for the slowest shadow
    #[default]
    Block,
    /// The slowest shadow falls behind and needs a resync
    Behind,
}

/// Write cache.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cache {
    /// Bytes.
    pub size: Size,
    /// Go on without a cache that was lost.
    pub accept_lost: bool,
}

impl Default for Cache {
    fn default() -> Cache {
        Cache { size: Size(64 << 20), accept_lost: false }
    }
}

/// Journal.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Journal {
    /// Directory; the state directory's by default.
    pub dir: Option<PathBuf>,
    /// Bytes of a segment.
    pub segment: Size,
    /// Number of segments.
    pub segments: u32,
}

impl Default for Journal {
    fn default() -> Journal {
        Journal { dir: None, segment: Size(16 << 20), segments: 64 }
    }
}

impl Journal {
    /// Its geometry.
    pub fn geometry(&self) -> Geometry {
        Geometry { segment: self.segment.0, segments: self.segments }
    }
    /// One of about `total` bytes: rounded up to whole segments, which shrink for a small one.
    pub fn of_size(total: Size, dir: Option<PathBuf>) -> Journal {
        let segment = if total.0 >= 128 << 20 { 16 << 20 } else { 2 << 20 };
        let segments = total.0.div_ceil(segment).clamp(4, 1 << 20) as u32;
        Journal { dir, segment: Size(segment), segments }
    }
}

/// Memory for the links.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Link {
    /// Records kept in memory for shadows that are current.
    pub feed: Size,
    /// Records on their way to a shadow and not yet acknowledged as received.
    pub window: Size,
}

impl Default for Link {
    fn default() -> Link {
        Link { feed: Size(16 << 20), window: Size(16 << 20) }
    }
}

/// The devices by which volumes are used.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Device {
    /// How long the users of a kernel NBD device wait for the next daemon when this one has ended or
    /// died; then their requests fail, and the next daemon makes a new device. Whole seconds.
    pub dead_after: Span,
}

impl Default for Device {
    fn default() -> Device {
        Device { dead_after: Span(Duration::from_secs(600)) }
    }
}

/// Scripts of the administrator's, called around a change of roles.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Hooks {
    /// Mounts the volumes and starts the database.
    pub start: Option<PathBuf>,
    /// Stops the database and unmounts the volumes.
    pub stop: Option<PathBuf>,
    /// How long either may take.
    pub timeout: Span,
}

impl Default for Hooks {
    fn default() -> Hooks {
        Hooks { start: None, stop: None, timeout: Span(Duration::from_secs(120)) }
    }
}

/// A volume.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its backing: a file or a block device.
    pub path: PathBuf,
    /// Bytes.
    pub size: Size,
    /// Bypass the page cache.
    #[serde(default = "yes")]
    pub direct: bool,
}

/// Another node.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// What it calls itself.
    pub name: String,
    /// Host and port.
    pub address: Option<String>,
    /// Dial it while this node is a shadow; by default if it has an address.
    pub dial: Option<bool>,
    /// A FLUSH waits for it.
    #[serde(default)]
    pub sync: bool,
    /// Follow it even while it is a shadow.
    #[serde(default)]
    pub cascade: bool,
}

impl Peer {
    /// Whether this node dials it.
    pub fn dials(&self) -> bool {
        self.dial.unwrap_or(self.address.is_some())
    }
}

/// Intervals that differ from the defaults.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimingOverrides {
    /// Oldest write of an open epoch.
    pub seal_after: Option<Span>,
    /// Payload of an open epoch.
    pub seal_bytes: Option<Size>,
    /// Oldest unsynced record.
    pub sync_after: Option<Span>,
    /// Between heartbeats.
    pub heartbeat: Option<Span>,
    /// Silence after which a link is dead.
    pub silence: Option<Span>,
    /// Between dials.
    pub redial: Option<Span>,
    /// Oldest record not yet in the backing.
    pub write_back_after: Option<Span>,
    /// Between checkpoints.
    pub checkpoint_after: Option<Span>,
    /// For its peers' word, when a primary starts.
    pub ask: Option<Span>,
}

/// A span of time, written "5ms", "2s".
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Span(pub Duration);

impl Span {
    /// Nanoseconds; at most [`MAX_DELAY`], which the check has seen to.
    pub fn nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }
}

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Span, D::Error> {
        let text = String::deserialize(d)?;
        let bad =
            |e| de::Error::custom(format!("`{text}` is not a span of time such as \"5ms\" or \"2s\": {e}"));
        humantime::parse_duration(&text).map(Span).map_err(bad)
    }
}

fn yes() -> bool {
    true
}

fn default_compression() -> i32 {
    1
}

fn group_id<'de, D: Deserializer<'de>>(d: D) -> Result<GroupId, D::Error> {
    let text = String::deserialize(d)?;
    unhex(&text)
        .map(GroupId)
        .ok_or_else(|| de::Error::custom("the group's identity is 32 hexadecimal digits"))
}

fn node_id<'de, D: Deserializer<'de>>(d: D) -> Result<NodeId, D::Error> {
    let text = String::deserialize(d)?;
    let id = unhex(&text).map(u64::from_be_bytes).filter(|n| *n != 0);
    id.map(NodeId).ok_or_else(|| de::Error::custom("a node's identity is 16 hexadecimal digits, not all 0"))
}

/// Exactly `N` bytes from hexadecimal digits.
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut out = [0; N];
    for (i, byte) in out.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
    }
    Some(out)
}

/// Hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// Reads a group's configuration.
pub fn load(places: &Places, group: &str) -> Result<Config, Failure> {
    let path = places.config_file(group);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(no_group(places, group)),
        Err(e) => return Err(Failure::io("read", &path, &e)),
    };
    parse(&text)
        .map_err(|(what, next)| Failure::new(Exit::Failure, format!("{}: {what}", path.display()), next))
}

fn no_group(places: &Places, group: &str) -> Failure {
    let dir = places.config_dir().display();
    let next = match places.groups().unwrap_or_default() {
        names if names.is_empty() => "set it up with `volrep init` or `volrep join`, or name its \
                                      configuration's directory with --config DIR"
            .to_owned(),
        names => match nearest(group, names.iter().map(String::as_str)) {
            Some(near) => format!("did you mean `{near}`? (here are: {})", names.join(", ")),
            None => format!("here are: {}", names.join(", ")),
        },
    };
    Failure::new(Exit::NoGroup, format!("no group `{group}` in {dir}"), next)
}

/// What is wrong, and what to do.
type Fault = (String, String);

/// Reads and checks the text of a configuration.
pub fn parse(text: &str) -> Result<Config, Fault> {
    let config: Config = toml::from_str(text).map_err(|e| {
        let line = e.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
        let at = line.map(|n| format!("line {n}: ")).unwrap_or_default();
        (format!("{at}{}", e.message()), advice(e.message()))
    })?;
    config.check().map_err(|what| (what, "correct it there".to_owned()))?;
    Ok(config)
}

/// For an unknown key, the known one that is nearest.
fn advice(message: &str) -> String {
    let words: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    match words.split_first() {
        Some((unknown, known)) if message.starts_with("unknown") => {
            match nearest(unknown, known.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None => "take it out, or use one of those".to_owned(),
            }
        }
        _ => "correct it there".to_owned(),
    }
}

/// The candidate fewest edits away, if that is near at all.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let measured = candidates.map(|c| (edits(word, c), c)).min_by_key(|(n, _)| *n);
    measured.filter(|(n, c)| *n <= 1 + c.len().max(word.len()) / 3).map(|(_, c)| c)
}

/// Levenshtein distance.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

impl Config {
    fn check(&self) -> Result<(), String> {
        check_name(&self.node).map_err(|e| format!("node: {e}"))?;
        self.check_volumes()?;
        self.check_peers()?;
        let bound = |ok: bool, what: &str| if ok { Ok(()) } else { Err(what.to_owned()) };
        bound((0..=19).contains(&self.compression), "compression: a zstd level from 1 to 19, or 0 for none")?;
        bound(self.apply_delay.0 <= MAX_DELAY, "apply_delay: from 0s to 30days")?;
        let g = self.journal.geometry();
        let segment = (2 << 20..=1 << 40).contains(&g.segment) && g.segment.is_multiple_of(4096);
        bound(segment, "journal.segment: from 2M to 1T, a multiple of 4096")?;
        bound((4..=1 << 20).contains(&g.segments), "journal.segments: from 4 to 1048576")?;
        bound((4 << 20..=1 << 40).contains(&self.cache.size.0), "cache.size: from 4M to 1T")?;
        bound(self.cache.size.0.is_multiple_of(4096), "cache.size: a multiple of 4096")?;
        bound((4 << 20..=64 << 30).contains(&self.link.feed.0), "link.feed: from 4M to 64G")?;
        bound((2 << 20..=64 << 30).contains(&self.link.window.0), "link.window: from 2M to 64G")?;
        let dead_after = self.device.dead_after.0;
        let whole = dead_after.subsec_nanos() == 0 && (1..=86_400).contains(&dead_after.as_secs());
        bound(whole, "device.dead_after: from 1s to 1day, in whole seconds")?;
        let limit = self.hooks.timeout.0;
        bound((1..=86_400).contains(&limit.as_secs()), "hooks.timeout: from 1s to 1day")?;
        if let Some(listen) = &self.listen {
            listen.parse::<std::net::SocketAddr>().map_err(|_| {
                format!(
                    "listen: `{listen}` is not ADDRESS:PORT, such as \"0.0.0.0:{PORT}\" or \"[::1]:{PORT}\""
                )
            })?;
        }
        self.timing.check()
    }

    fn check_volumes(&self) -> Result<(), String> {
        if self.volumes.is_empty() || self.volumes.len() > crate::format::message::MAX_VOLUMES {
            return Err("volume: a group has from 1 to 256 of them".into());
        }
        for (i, v) in self.volumes.iter().enumerate() {
            check_name(&v.name).map_err(|e| format!("volume.name: {e}"))?;
            if self.volumes[..i].iter().any(|w| w.name == v.name) {
                return Err(format!("volume.name: `{}` is there twice", v.name));
            }
            if v.size.0 == 0 || v.size.0 % 512 != 0 || v.size.0 > crate::units::MAX_VOLUME {
                return Err(format!("volume `{}`: size is a multiple of 512, from 512 to 64 PiB", v.name));
            }
            if !v.path.is_absolute() {
                return Err(format!("volume `{}`: path is not absolute", v.name));
            }
        }
        Ok(())
    }

    fn check_peers(&self) -> Result<(), String> {
        if self.peers.len() > crate::format::superblock::MAX_PEERS {
            return Err("peer: at most 64 of them".into());
        }
        for (i, p) in self.peers.iter().enumerate() {
            check_name(&p.name).map_err(|e| format!("peer.name: {e}"))?;
            if p.name == self.node || self.peers[..i].iter().any(|q| q.name == p.name) {
                return Err(format!("peer.name: `{}` is the name of two nodes", p.name));
            }
            if p.dials() && p.address.is_none() {
                return Err(format!("peer `{}`: it can't be dialled without an address", p.name));
            }
            if p.cascade && !p.dials() {
                return Err(format!(
                    "peer `{}`: it can't be followed (cascade) without being dialled",
                    p.name
                ));
            }
            if let Some(address) = &p.address {
                check_address(address).map_err(|e| format!("peer `{}`: {e}", p.name))?;
            }
        }
        Ok(())
    }
}

impl TimingOverrides {
    fn check(&self) -> Result<(), String> {
        let range = crate::node::config::SEAL_AFTER;
        if self.seal_after.is_some_and(|s| !range.contains(&s.nanos())) {
            return Err("timing.seal_after: from 50us to 1s".into());
        }
        if self.seal_bytes.is_some_and(|s| !(4096..=1 << 20).contains(&s.0)) {
            return Err("timing.seal_bytes: from 4K to 1M".into());
        }
        let spans = [
            ("sync_after", self.sync_after),
            ("heartbeat", self.heartbeat),
            ("silence", self.silence),
            ("redial", self.redial),
            ("write_back_after", self.write_back_after),
            ("checkpoint_after", self.checkpoint_after),
            ("ask", self.ask),
        ];
        let day = 86_400 * crate::units::SECONDS;
        match spans.iter().find(|(_, s)| s.is_some_and(|s| !(50 * MICROS..=day).contains(&s.nanos()))) {
            Some((name, _)) => Err(format!("timing.{name}: from 50us to 1day")),
            None => Ok(()),
        }
    }
}

/// Host and port, as they are dialled.
pub fn check_address(address: &str) -> Result<String, String> {
    let parts = address.rsplit_once(':');
    let good = parts.is_some_and(|(host, port)| {
        let plain = !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c.is_control());
        let bracketed = !host.contains(':') || (host.starts_with('[') && host.ends_with(']'));
        plain && bracketed && port.parse::<u16>().is_ok_and(|p| p > 0)
    });
    if good && address.len() <= 250 {
        return Ok(address.to_owned());
    }
    Err(format!("`{address}` is not HOST:PORT"))
}

/// Reads the group's key; refuses one that others can read.
pub fn load_key(places: &Places, config: &Config) -> Result<[u8; KEY], Failure> {
    use std::os::unix::fs::PermissionsExt;
    let path = places.config_dir().join(&config.key_file);
    let fail = |doing: &str, e| Failure::io(doing, &path, &e);
    let mode = std::fs::metadata(&path).map_err(|e| fail("read", e))?.permissions().mode();
    if mode & 0o077 != 0 {
        let what = format!("the key {} can be read by others (mode {:o})", path.display(), mode & 0o777);
        let next =
            format!("run `chmod 600 {}`; if others may have read it, set the group up anew", path.display());
        return Err(Failure::new(Exit::Failure, what, next));
    }
    let text = read_short(&path).map_err(|e| fail("read", e))?;
    unhex(text.trim()).ok_or_else(|| {
        let what = format!("{} does not hold a key (64 hexadecimal digits)", path.display());
        Failure::new(Exit::Failure, what, "restore it, or copy it from another node of the group")
    })
}

fn read_short(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(4096).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests;

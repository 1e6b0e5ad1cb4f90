//! The text of a configuration file, every field explained.
//!
//! Owns: the words in the file. Invariant: every field of [`Config`] is there, set or as a comment.

use super::{Config, OnFull, PORT, Peer, TimingOverrides, Volume, hex};
use crate::cli::size::exact;
use crate::node::config::Timing;
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

fn quote(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn path(p: &Path) -> String {
    quote(&p.to_string_lossy())
}

/// `key = value`, or the same as a comment that shows the default.
fn line(key: &str, value: Option<String>, default: &str) -> String {
    match value {
        Some(value) => format!("{key} = {value}"),
        None => format!("#{key} = {default}"),
    }
}

/// The whole file.
pub fn render(group: &str, config: &Config) -> String {
    let mut out = head(group, config);
    out.push_str(&tail(config));
    for v in &config.volumes {
        out.push_str(&volume(v));
    }
    out.push_str(PEERS);
    for p in &config.peers {
        out.push_str(&peer(p));
    }
    out.push_str(&timing(&config.timing));
    out
}

fn head(group: &str, c: &Config) -> String {
    let listen = line("listen", c.listen.as_deref().map(quote), &format!("\"0.0.0.0:{PORT}\""));
    let hook = line("fence_hook", c.fence_hook.as_deref().map(path), "\"/etc/volrep/fence\"");
    let on_full = match c.on_full {
        OnFull::Block => "block",
        OnFull::Behind => "behind",
    };
    format!(
        r#"# volrep: the group `{group}` on the node `{node}`. A change takes effect when `volrep serve {group}` starts.
# Sizes: 64M, 1.5G, 2T or bytes. Times: 500us, 5ms, 2s.

# Identities, drawn at random when the group was set up. Never change them.
group = "{id}"
node_id = "{node_id:?}"

# This node's name, as its peers and `volrep status` show it.
node = {node_name}

# Address and port on which peers are accepted. Without it none are (and this node can't be followed).
{listen}

# The key that every node of the group proves to the others: 64 hexadecimal digits, mode 0600.
# A relative path begins at this file's directory.
key_file = {key}

# What happens when the journal is full because a shadow is away or slow:
#   "block"   writers wait until the slowest shadow has caught up
#   "behind"  writers go on; the slowest shadow needs a resync
on_full = "{on_full}"

# While this node is a shadow: how long it holds each write back from its image ("15m", "2h"), so that
# `volrep promote --at` can stop before a mistake. What is held is durable here all the same, and takes room
# in the journal. "0s": nothing is held.
apply_delay = "{delay}"

# Strongest zstd level used, 1 to 19; 0 never compresses. Under load faster ones are taken, or none.
compression = {level}

# Called by `volrep promote` as PROGRAM OLD-PRIMARY TERM. Exit status 0 says: that node can no longer
# write. It has 60 seconds.
{hook}

"#,
        node = c.node,
        id = hex(&c.group.0),
        node_id = c.node_id,
        node_name = quote(&c.node),
        key = path(&c.key_file),
        level = c.compression,
        delay = written(c.apply_delay.0),
    )
}

fn tail(c: &Config) -> String {
    format!(
        r#"# The write cache: memory that holds writes not yet in the backing, and outlives the daemon.
[cache]
size = "{cache}"
# Set this for one start, by hand, if the cache was lost without a reboot and you accept the loss of
# writes that no flush covered.
accept_lost = {lost}

# The journal. Its geometry is fixed when the group is set up.
[journal]
# Its directory; the state directory by default.
{dir}
segment = "{segment}"
segments = {segments}

# Memory for the links, for all shadows together and for each.
[link]
# Records kept in memory for shadows that are current.
feed = "{feed}"
# Records on their way to a shadow and not yet acknowledged as received.
window = "{window}"

# The devices by which the volumes are used.
[device]
# How long the users of a kernel NBD device wait for the next daemon when this one has ended or died.
# Then their requests fail, and the next daemon makes a new device. Whole seconds.
dead_after = "{dead_after}"

# The database's scripts, called as SCRIPT start|stop GROUP DEVICE... around a change of roles: `start` after the
# volumes are attached (promote, switchover), `stop` before they are taken away (switchover). Exit status 0 is success.
[hooks]
{start}
{stop}
timeout = "{timeout}"

# The volumes, one table each, in the order of their numbers; the same names, sizes and order on every node.
#   path    the backing: a file or a block device, absolute
#   direct  bypass the page cache (O_DIRECT)
"#,
        cache = exact(c.cache.size.0),
        lost = c.cache.accept_lost,
        dir = line("dir", c.journal.dir.as_deref().map(path), "\"/var/lib/volrep/NAME\""),
        segment = exact(c.journal.segment.0),
        segments = c.journal.segments,
        feed = exact(c.link.feed.0),
        window = exact(c.link.window.0),
        dead_after = written(c.device.dead_after.0),
        start = line("start", c.hooks.start.as_deref().map(path), "\"/etc/volrep/database\""),
        stop = line("stop", c.hooks.stop.as_deref().map(path), "\"/etc/volrep/database\""),
        timeout = written(c.hooks.timeout.0),
    )
}

fn volume(v: &Volume) -> String {
    format!(
        "[[volume]]\nname = {}\npath = {}\nsize = \"{}\"\ndirect = {}\n\n",
        quote(&v.name),
        path(&v.path),
        exact(v.size.0),
        v.direct
    )
}

const PEERS: &str = r#"# The other nodes, one [[peer]] table each. A primary accepts every node that proves the key; those
# listed here have a say:
#   name     what the node calls itself
#   address  HOST:PORT on which it listens
#   dial     dial it while this node is a shadow, and to ask whether it was promoted (by default if it has an address)
#   sync     a FLUSH waits until it is durable there as well
#   cascade  follow it even while it is a shadow itself: it passes on what its primary has
"#;

fn peer(p: &Peer) -> String {
    let mut out = format!("[[peer]]\nname = {}\n", quote(&p.name));
    let dial = p.dial.map(|d| d.to_string());
    let default = p.dials().to_string();
    let address = line("address", p.address.as_deref().map(quote), &format!("\"host:{PORT}\""));
    let cascade = line("cascade", p.cascade.then(|| "true".to_owned()), "false");
    writeln!(out, "{address}\n{}\nsync = {}\n{cascade}\n", line("dial", dial, &default), p.sync)
        .expect("memory");
    out
}

/// A span of time without spaces.
fn written(d: Duration) -> String {
    humantime::format_duration(d).to_string().replace(' ', "")
}

fn timing(t: &TimingOverrides) -> String {
    let d = Timing::default();
    let quoted = |d: Duration| format!("\"{}\"", written(d));
    let span = |key: &str, given: Option<super::Span>, default: u64| {
        line(key, given.map(|s| quoted(s.0)), &quoted(Duration::from_nanos(default)))
    };
    let seal_bytes = t.seal_bytes.map(|s| format!("\"{}\"", exact(s.0)));
    format!(
        r#"
# Intervals. The defaults suit most; each is shown as a comment.
[timing]
# An epoch is sealed when its oldest write is this old, or at this many bytes, with nobody waiting.
{}
{}
# The journal is synced when its oldest unsynced record is this old, with nobody waiting.
{}
# Between heartbeats; silence after which a link is given up; between attempts to connect.
{}
{}
{}
# Write-back begins when the oldest record not in the backing is this old.
{}
# Between checkpoints.
{}
# A primary that starts waits this long for its peers' word that none was promoted meanwhile.
{}
"#,
        span("seal_after", t.seal_after, d.seal_after),
        line("seal_bytes", seal_bytes, &format!("\"{}\"", exact(d.seal_bytes))),
        span("sync_after", t.sync_after, d.sync_after),
        span("heartbeat", t.heartbeat, d.heartbeat),
        span("silence", t.silence, d.silence),
        span("redial", t.redial, d.redial),
        span("write_back_after", t.write_back_after, d.write_back_after),
        span("checkpoint_after", t.checkpoint_after, d.checkpoint_after),
        span("ask", t.ask, d.ask),
    )
}

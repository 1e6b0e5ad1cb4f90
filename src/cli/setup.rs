//! What `init` and `join` share: choosing, checking and creating a new node's parts.
//!
//! Owns: the defaults of a new node. Invariant: with a dry run nothing is created.

use super::backing::{self, Backing};
use super::config::{self, Config, Journal, PORT, Peer, Volume};
use super::failure::{Exit, Failure};
use super::output::Output;
use super::places::{Places, check_name};
use super::provision::{Plan, provision};
use super::size::{Size, human};
use super::{interrupt, state};
use crate::format::message::Role;
use crate::node::status::SCHEMA_VERSION;
use crate::units::{GroupId, NodeId};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Flags of a new node.
#[derive(clap::Args, Clone, Debug)]
pub struct NodeArgs {
    /// This node's name [default: the host's]
    #[arg(long, value_name = "NAME", value_parser = check_name)]
    pub node: Option<String>,
    /// Where peers are accepted, ADDRESS:PORT, or `none` [default: 0.0.0.0 and the first port from
    /// 7654 that no group here has]
    #[arg(long, value_name = "ADDR", value_parser = parse_listen)]
    pub listen: Option<Listen>,
    /// Size of the journal
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub journal_size: Size,
    /// Directory of the journal [default: the state directory]
    #[arg(long, value_name = "DIR")]
    pub journal_dir: Option<PathBuf>,
    /// Size of the write cache
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    pub cache_size: Size,
    /// Go through the page cache instead of O_DIRECT
    #[arg(long)]
    pub buffered: bool,
    /// Only check, and say what would be created
    #[arg(long)]
    pub dry_run: bool,
}

/// Where a node listens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Listen {
    /// Nowhere.
    Nowhere,
    /// There.
    At(SocketAddr),
}

fn parse_listen(text: &str) -> Result<Listen, String> {
    if text == "none" {
        return Ok(Listen::Nowhere);
    }
    text.parse().map(Listen::At).map_err(|_| {
        format!("`{text}` is not ADDRESS:PORT, such as 0.0.0.0:{PORT} or [::1]:{PORT}, nor `none`")
    })
}

/// Random bytes from the kernel.
pub fn random<const N: usize>() -> Result<[u8; N], Failure> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|e| {
        Failure::new(Exit::Failure, format!("the kernel gives no random bytes: {e}"), "run it again")
    })?;
    Ok(bytes)
}

/// The host's name, as far as it can be a node's.
pub fn host_name() -> Result<String, Failure> {
    let host = nix::unistd::gethostname().ok().and_then(|h| h.into_string().ok()).unwrap_or_default();
    let short = host.split('.').next().unwrap_or_default();
    check_name(short)
        .map_err(|e| Failure::usage(format!("the host's name: {e}"), "give this node a name with --node"))
}

/// A new node's configuration.
pub fn new_config(
    args: &NodeArgs,
    places: &Places,
    (group, id): (&str, GroupId),
    node: String,
    peers: Vec<Peer>,
    backings: &[Backing],
) -> Result<Config, Failure> {
    let listen = match args.listen {
        Some(Listen::Nowhere) => None,
        Some(Listen::At(at)) => Some(at.to_string()),
        None => Some(format!("0.0.0.0:{}", free_port(places)?)),
    };
    let volume = |b: &Backing| Volume {
        name: b.name.clone(),
        path: b.path.clone(),
        size: Size(b.size),
        direct: !args.buffered && (b.create || backing::direct_works(&b.path)),
    };
    let dir = match &args.journal_dir {
        Some(dir) => Some(std::path::absolute(dir).map_err(|e| Failure::io("use", dir, &e))?),
        None => None,
    };
    let config = Config {
        group: id,
        node_id: NodeId(u64::from_be_bytes(random()?).max(1)),
        node,
        listen,
        key_file: format!("{group}.key").into(),
        on_full: config::OnFull::default(),
        apply_delay: config::Span::default(),
        compression: 1,
        hooks: config::Hooks::default(),
        fence_hook: None,
        cache: config::Cache { size: args.cache_size, ..Default::default() },
        journal: Journal::of_size(args.journal_size, dir),
        link: config::Link::default(),
        device: config::Device::default(),
        volumes: backings.iter().map(volume).collect(),
        peers,
        timing: config::TimingOverrides::default(),
    };
    // The checks of a file hold for what the flags ask for, too.
    config::parse(&config::render(group, &config)).map_err(|(what, next)| Failure::usage(what, next))
}

fn free_port(places: &Places) -> Result<u16, Failure> {
    let taken: Vec<u16> = places
        .groups()?
        .iter()
        .filter_map(|g| config::load(places, g).ok()?.listen?.parse::<SocketAddr>().ok())
        .map(|a| a.port())
        .collect();
    let free = (PORT..u16::MAX).find(|p| !taken.contains(p));
    free.ok_or_else(|| Failure::usage("no port is free", "choose one with --listen"))
}

/// A node to be created.
pub struct NewNode<'a> {
    /// The group's name.
    pub group: &'a str,
    /// Its configuration.
    pub config: Config,
    /// The group's key.
    pub key: [u8; config::KEY],
    /// Its role.
    pub role: Role,
    /// Its volumes.
    pub backings: Vec<Backing>,
    /// Every volume is known to be all zeroes.
    pub blank: bool,
}

/// Whether every volume is all zeroes, proved by reading what is not created here.
pub fn all_blank(backings: &[Backing]) -> Result<bool, Failure> {
    for b in backings.iter().filter(|b| !b.create) {
        if !backing::is_blank(b)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Creates the node's files.
pub fn create(node: &NewNode, places: &Places) -> Result<(), Failure> {
    interrupt::check()?;
    let plan = Plan {
        group: node.group,
        config: &node.config,
        key: node.key,
        superblock: state::first(&node.config, &node.backings, node.role, node.blank),
        backings: &node.backings,
        maps_len: node.config.maps_len(),
    };
    provision(places, &plan)?;
    // A file's O_DIRECT shows only once it is there.
    if node.config.volumes.iter().any(|v| v.direct && !backing::direct_works(&v.path)) {
        eprintln!(
            "volrep: warning: a volume's file system has no O_DIRECT: set `direct = false` in {}",
            places.config_file(node.group).display()
        );
    }
    Ok(())
}

/// Tells what was created, or would be.
pub fn report(node: &NewNode, places: &Places, dry_run: bool, action: &str, out: &Output) {
    let role = if node.role == Role::Primary { "primary" } else { "shadow" };
    let c = &node.config;
    let journal = c.journal_file(places, node.group);
    let blank = (!dry_run).then_some(node.blank);
    let volumes: Vec<Value> = node
        .backings
        .iter()
        .map(|b| json!({ "name": b.name, "path": b.path, "size": b.size, "created": b.create }))
        .collect();
    let document = json!({
        "schema_version": SCHEMA_VERSION,
        "group": node.group,
        "group_id": config::hex(&c.group.0),
        "node": c.node,
        "node_id": format!("{:?}", c.node_id),
        "role": role,
        "dry_run": dry_run,
        "config": places.config_file(node.group),
        "journal": { "path": journal, "size": c.journal.geometry().len() },
        "cache_size": c.cache.size.0,
        "listen": c.listen,
        "volumes": volumes,
        "blank": blank,
        "action": action,
    });
    out.document(&document, || human_report(node, places, role, dry_run, action));
}

fn human_report(node: &NewNode, places: &Places, role: &str, dry_run: bool, action: &str) -> String {
    let c = &node.config;
    let would = if dry_run { "  (dry run: nothing was created)" } else { "" };
    let mut text = format!("{}  {} {}{would}\n", node.group, role.to_uppercase(), c.node);
    for b in &node.backings {
        let new = if b.create { "  new, sparse" } else { "" };
        text += &format!(" volume {}  {}  {}{new}\n", b.name, human(b.size), b.path.display());
    }
    let journal = c.journal_file(places, node.group);
    text += &format!(" journal  {}  {}\n", human(c.journal.geometry().len()), journal.display());
    text += &format!(" config  {}\n", places.config_file(node.group).display());
    text += &format!(" listens  {}\naction: {action}", c.listen.as_deref().unwrap_or("nowhere"));
    text
}

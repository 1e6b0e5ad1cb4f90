//! `volrep serve`: runs a node in the foreground until a signal or a fatal error.
//!
//! Owns: the group's lock, and the order of start and stop. Invariant: nothing of the group is opened
//! before the lock is held, and the front ends are closed before the node shuts down.

use super::config::{self, Config, Hooks};
use super::failure::{Exit, Failure, advice};
use super::hooks::Hook;
use super::output::Output;
use super::places::Places;
use super::{interrupt, state};
use crate::control::fronts::{Facts, Fronts};
use crate::control::server::{self, Open};
use crate::control::{DeviceKind, Reply};
use crate::daemon::{self, BackingPath, DaemonOptions, Handle};
use crate::node::event::{AdminOp, Answer, Refusal};
use crate::node::status::SCHEMA_VERSION;
use crate::sys::open::OpenError;
use nix::fcntl::{Flock, FlockArg};
use sd_notify::NotifyState;
use serde_json::json;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};

/// Run a node: serve its volumes, follow or feed its peers
#[derive(clap::Args, Clone, Debug)]
pub struct Serve {
    /// The group's name
    #[arg(value_name = "NAME")]
    group: String,
    /// Attach the volumes once they are served
    #[arg(long, value_name = "KIND", value_enum)]
    attach: Option<DeviceKind>,
    /// Attach nothing unless told to, neither what was attached when the last daemon died nor after a takeover: a
    /// cluster manager says when
    #[arg(long, conflicts_with = "attach")]
    no_attach: bool,
    /// Threads that compress and hash [default: one less than the processors, 4 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
    workers: Option<u8>,
    /// Only check configuration and state
    #[arg(long)]
    dry_run: bool,
}

/// What a signal acts on, once it exists.
struct Running {
    handle: Handle,
    fronts: Arc<Open>,
}

impl Serve {
    /// Does it.
    pub fn run(&self, places: &Places, out: &Output) -> Result<(), Failure> {
        let config = config::load(places, &self.group)?;
        let superblock = places.superblock(&self.group);
        state::check(&state::read(&superblock)?, &config, &superblock)?;
        places.check_sockets(&self.group)?;
        let options = self.options(&config, places)?;
        if self.dry_run {
            let document = json!({ "schema_version": SCHEMA_VERSION, "group": self.group, "dry_run": true });
            out.document(&document, || format!("`{}` can be served", self.group));
            return Ok(());
        }
        self.serve(&config, options, places)
    }

    fn serve(&self, config: &Config, options: DaemonOptions, places: &Places) -> Result<(), Failure> {
        let _lock = lock(&places.lock(&self.group), &self.group)?;
        if let Some(dir) = options.cache.parent() {
            private_dir(dir)?;
        }
        let running = Arc::new(OnceLock::<Running>::new());
        let on_signal = running.clone();
        interrupt::watch(move || shut_down(&on_signal))?;
        let facts = Facts {
            group: self.group.clone(),
            owner: (options.config.group, options.config.node),
            dead_after: config.device.dead_after.0,
            volumes: options.config.volumes.clone(),
            backings: config.volumes.iter().map(|v| v.path.clone()).collect(),
            run: places.run(&self.group),
            dev: places.dev().to_owned(),
        };
        let socket = places.control_socket(&self.group);
        let heir = Arc::new(Heir {
            group: self.group.clone(),
            hooks: config.hooks.clone(),
            attach: self.attach,
            obeys: self.no_attach,
            turn: Mutex::new(()),
        });
        let trouble = Arc::new(Mutex::new(None));
        let result = daemon::run(options, |handle| {
            let view = Fronts::of_view(facts.clone(), &handle);
            let fronts = Arc::new(Open { volumes: Fronts::new(facts, handle.clone()), view });
            if self.no_attach {
                // Before anybody can ask for more.
                remove_left(&fronts.volumes);
            }
            if let Err(e) = server::start(&socket, handle.clone(), fronts.clone()) {
                *trouble.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(Failure::io("serve", &socket, &e));
                handle.stop();
                return;
            }
            when_served(handle.clone(), fronts.clone(), self.attach, self.no_attach);
            when_taken_over(handle.clone(), fronts.clone(), heir.clone());
            let _ = running.set(Running { handle, fronts });
            // A signal that came before there was anything to shut down.
            if interrupt::check().is_err() {
                shut_down(&running);
            }
        });
        // The daemon is gone, whatever happens now.
        let _ = std::fs::remove_file(&socket);
        if let Some(failure) = trouble.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(failure);
        }
        result.map_err(|e| stopped(&self.group, &e))
    }

    fn options(&self, config: &Config, places: &Places) -> Result<DaemonOptions, Failure> {
        let key = config::load_key(places, config)?;
        let backing = |(number, v): (usize, &config::Volume)| BackingPath {
            number: number as u8,
            path: v.path.clone(),
            direct: v.direct,
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(DaemonOptions {
            config: config.node_config(&self.group, key)?,
            superblock: places.superblock(&self.group),
            journal: config.journal_file(places, &self.group),
            journal_bytes: config.journal.geometry().len(),
            dirty_maps: places.dirty_maps(&self.group),
            dirty_maps_bytes: config.maps_len(),
            hash_index: places.hash_index(&self.group),
            salvage: places.salvage(&self.group),
            history: places.history(&self.group),
            cache: places.cache(&self.group, config.node_id),
            cache_bytes: crate::cache::ring_len(config.cache.size.0),
            backings: config.volumes.iter().enumerate().map(backing).collect(),
            listen: config.listen.as_ref().and_then(|l| l.parse().ok()),
            dial: config.peers.iter().map(|p| p.address.clone()).collect(),
            workers: self.workers.map_or((processors - 1).clamp(1, 4), usize::from),
        })
    }
}

fn stopped(group: &str, e: &daemon::Error) -> Failure {
    // The others say themselves what to do.
    let (exit, next) = match e {
        daemon::Error::Open(OpenError::Busy { .. }) => (Exit::Busy, ""),
        daemon::Error::Open(OpenError::Io { source, .. }) => (Exit::Failure, advice(source)),
        _ => (Exit::Failure, ""),
    };
    Failure::new(exit, format!("`{group}` stopped: {e}"), next)
}

/// A directory of our own in a place that everybody can write.
fn private_dir(dir: &Path) -> Result<(), Failure> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    let owner =
        made.and_then(|()| std::fs::symlink_metadata(dir)).map_err(|e| Failure::io("create", dir, &e))?;
    if owner.is_dir() && owner.uid() == nix::unistd::geteuid().as_raw() {
        return Ok(());
    }
    let what = format!("the directory {} belongs to another user", dir.display());
    Err(Failure::new(Exit::Failure, what, "remove it, or choose another with --shm-dir or VOLREP_SHM_DIR"))
}

/// One daemon per group: the lock is the proof, the process id in the file is for the message.
fn lock(path: &Path, group: &str) -> Result<Flock<File>, Failure> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(|e| Failure::io("open", path, &e))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(mut lock) => {
            let written = lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id()));
            written.map_err(|e| Failure::io("write", path, &e))?;
            Ok(lock)
        }
        Err((mut file, _)) => {
            let mut pid = String::new();
            // Only for the message.
            let _ = file.rewind().and_then(|()| file.take(16).read_to_string(&mut pid));
            let by =
                if pid.trim().is_empty() { String::new() } else { format!(" by process {}", pid.trim()) };
            let what = format!("`{group}` is being served already{by}");
            Err(Failure::new(Exit::Busy, what, format!("see `volrep status {group}`")))
        }
    }
}

/// Begins the end of the daemon, on a thread of its own: this one waits for the second signal.
fn shut_down(running: &Arc<OnceLock<Running>>) {
    let running = running.clone();
    let work = move || {
        if let Some(running) = running.get() {
            running.shut_down();
        }
    };
    if let Err(e) = std::thread::Builder::new().name("stopping".into()).spawn(work) {
        tracing::error!("no thread to drain on: {e}; end it with a second signal");
    }
}

impl Running {
    /// Asks the node to drain and to mark itself clean; its answer stops the loop. With a front end
    /// open it drains once before that, with its users served: only the second drain, of what came
    /// meanwhile, keeps those waiting whose device waits for the next daemon.
    fn shut_down(&self) {
        // There may be no service manager; then nobody is told.
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        tracing::info!("stopping: draining to the backing (a second signal ends it at once)");
        self.fronts.view.shut();
        if self.fronts.volumes.is_open() {
            let (tell, told) = mpsc::channel();
            let done = move |_| {
                let _ = tell.send(());
            };
            self.handle.admin(AdminOp::Drain, Box::new(done));
            // Answered or not (the loop has ended): what is left is for the second drain.
            let _ = told.recv();
        }
        self.fronts.volumes.shut();
        let stopping = self.handle.clone();
        let done = move |answer| {
            match answer {
                Answer::Refused(_, text) => tracing::error!("not drained: {text}"),
                Answer::Done(_) | Answer::Status(_) | Answer::Marked(_) => tracing::info!("drained"),
            }
            stopping.stop();
        };
        self.handle.admin(AdminOp::Shutdown, Box::new(done));
    }
}

/// The devices that the last daemon left.
fn remove_left(fronts: &Fronts) {
    let Some(kind) = fronts.remembered() else { return };
    match fronts.detach(true) {
        Reply::Refused { text, .. } => tracing::error!("the last daemon left {kind}, which stays: {text}"),
        _ => tracing::info!("the last daemon left {kind}: removed, and nothing is attached"),
    }
}

/// Once the node serves (or is known to be a shadow): attaches what was attached, and says READY.
fn when_served(handle: Handle, fronts: Arc<Open>, asked: Option<DeviceKind>, obeys: bool) {
    let done = move |answer| {
        // A shadow refuses, too, and is ready; a node that could not recover is about to end.
        if interrupt::check().is_err() || matches!(answer, Answer::Refused(Refusal::Failed, _)) {
            return;
        }
        let wanted = asked.or_else(|| fronts.volumes.remembered());
        let served = matches!(answer, Answer::Done(_));
        // Attaching makes the kernel wait for the loop that calls this: it needs its own thread.
        let work = move || {
            fronts.view.clear();
            match (served, wanted) {
                (true, Some(_)) if obeys => {}
                (true, Some(kind)) => drop(attach(&fronts.volumes, kind)),
                (false, Some(kind)) => {
                    tracing::info!("{kind} is not attached: this node serves no volumes now");
                    fronts.volumes.take_up_left();
                }
                (_, None) => {}
            }
            let _ = sd_notify::notify(&[NotifyState::Ready]);
            tracing::info!("ready");
        };
        if let Err(e) = std::thread::Builder::new().name("front-ends".into()).spawn(work) {
            tracing::error!("no thread to attach the volumes on: {e}");
        }
    };
    handle.admin(AdminOp::Open, Box::new(done));
}

/// Attaches; the devices.
fn attach(fronts: &Fronts, kind: DeviceKind) -> Option<Vec<String>> {
    match fronts.attach(kind) {
        Reply::Attached { volumes, .. } => {
            volumes.iter().for_each(|v| tracing::info!("volume {} is {}", v.volume, v.device));
            Some(volumes.into_iter().map(|v| v.device).collect())
        }
        Reply::Refused { text, .. } => {
            tracing::error!("not attached: {text}");
            None
        }
        Reply::Done { .. } | Reply::Status { .. } | Reply::Marked { .. } => None,
    }
}

/// What is done when the place of the primary comes to this node.
struct Heir {
    group: String,
    hooks: Hooks,
    attach: Option<DeviceKind>,
    /// Somebody else says when to attach.
    obeys: bool,
    /// One takeover at a time; the next may come while the script of the first still runs.
    turn: Mutex<()>,
}

impl Heir {
    fn take_over(&self, open: &Open) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if open.view.is_open() {
            // It shows nothing any more.
            open.view.close(true);
        }
        if self.obeys {
            return;
        }
        let fronts = &open.volumes;
        let start = self.hooks.path(Hook::Start).is_some();
        let kind = self.attach.or_else(|| fronts.last()).or(start.then_some(DeviceKind::Auto));
        let Some(kind) = kind else {
            return tracing::info!("nothing is attached: run `volrep attach {}`", self.group);
        };
        let Some(devices) = attach(fronts, kind) else { return };
        if let Err(failure) = self.hooks.call(Hook::Start, &self.group, &devices) {
            tracing::error!("{failure}");
        }
    }
}

/// Each time that the node becomes the primary without having been asked: attaches, and starts the database.
fn when_taken_over(handle: Handle, fronts: Arc<Open>, heir: Arc<Heir>) {
    let again = (handle.clone(), fronts.clone(), heir.clone());
    let done = move |answer| {
        if !matches!(answer, Answer::Done(_)) {
            return;
        }
        let (handle, next, theirs) = again;
        when_taken_over(handle, next, theirs);
        let work = move || heir.take_over(&fronts);
        if let Err(e) = std::thread::Builder::new().name("taking over".into()).spawn(work) {
            tracing::error!("no thread to attach the volumes on: {e}");
        }
    };
    handle.admin(AdminOp::AwaitTakeover, Box::new(done));
}

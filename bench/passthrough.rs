//! A device that hands every request on to a disk or file: what a device served from user space costs,
//! before it does anything for its keep. `bench/guests` measures it beside volrep on ublk, `tools/bench pgbench` on FUSE.
//!
//!     passthrough DISK            on ublk: prints the device's path, serves it until its standard input ends
//!     passthrough FILE DIR        on FUSE and a loop device, mounted below DIR
//!
//! Owns: the way of a request to the disk and back. Invariant: as volrep's own loop does, it serves all
//! requests from one io_uring on one thread and copies a payload once; a FLUSH is the disk's fdatasync.

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use nix::fcntl::{FallocateFlags, OFlag};
use slab::Slab;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use volrep::disk::{AlignedBuf, IoError, aligned, freeze};
use volrep::front::fuse::{FuseDevice, FuseOptions};
use volrep::front::ublk::{Command, Host, Queue, QueueId, UblkDevices, UblkOptions};
use volrep::front::{FrontEnd, Submit, Volume};
use volrep::node::event::Op;
use volrep::sys::uring::{Completion, Fd, Operation, Ring};
use volrep::sys::wake::Waker;
use volrep::units::{GroupId, NodeId};

/// Takes a request's answer.
type Done = Box<dyn FnOnce(Result<Bytes, IoError>) + Send>;

/// What the thread that makes the device asks of the loop.
enum Order {
    Ask(Op, Done),
    Open(Box<Queue>, Sender<io::Result<()>>),
    Close(Sender<io::Result<()>>),
    End,
}

struct Door {
    orders: Sender<Order>,
    waker: Arc<Waker>,
}

impl Door {
    fn post(&self, order: Order) {
        if self.orders.send(order).is_ok() {
            self.waker.wake();
        }
    }
}

impl Host for Door {
    fn open(&self, _: QueueId, queue: Queue) -> Receiver<io::Result<()>> {
        let (tell, told) = bounded(1);
        self.post(Order::Open(Box::new(queue), tell));
        told
    }
    fn park(&self, _: QueueId) {}
    fn close(&self, _: QueueId) -> Receiver<io::Result<()>> {
        let (tell, told) = bounded(1);
        self.post(Order::Close(tell));
        told
    }
}

impl Submit for Door {
    fn submit(&self, op: Op, done: Done) {
        self.post(Order::Ask(op, done));
    }
}

/// What an operation on the ring was for.
#[derive(Clone, Copy)]
enum Tag {
    Wake,
    /// The driver's command of a tag.
    Command(u16),
    /// The disk's part of a tag's request.
    Disk(u16),
    /// The disk's part of a request that FUSE has handed in.
    Asked(usize),
}

/// A write's buffer; it goes back to where it came from.
struct Lent {
    buf: Option<AlignedBuf>,
    len: usize,
    home: Sender<AlignedBuf>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], |buf| &buf[..self.len])
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(buf) = self.buf.take() {
            let _ = self.home.send(buf);
        }
    }
}

/// The loop.
struct Loop {
    ring: Ring<Tag>,
    disk: Fd,
    queue: Option<(Queue, Fd)>,
    /// Commands and requests that are with the kernel.
    out: usize,
    closing: Option<Sender<io::Result<()>>>,
    asked: Slab<Done>,
    spare: (Sender<AlignedBuf>, Receiver<AlignedBuf>),
}

impl Loop {
    fn run(mut self, orders: &Receiver<Order>, waker: &Waker) -> Result<(), Box<dyn Error>> {
        let wake = Rc::new(waker.descriptor()?);
        let listen = |ring: &mut Ring<Tag>| {
            ring.submit(Operation::Event { fd: wake.clone(), count: Box::new(0) }, Tag::Wake);
        };
        listen(&mut self.ring);
        let mut done = Vec::new();
        loop {
            while let Ok(order) = orders.try_recv() {
                match order {
                    Order::Ask(op, done) => self.ask(op, done),
                    Order::Open(queue, tell) => tell.send(self.open(*queue))?,
                    Order::Close(tell) => self.closing = Some(tell),
                    Order::End => return Ok(()),
                }
            }
            if self.out == 0
                && let Some(tell) = self.closing.take()
            {
                self.queue = None;
                tell.send(Ok(()))?;
            }
            waker.going_to_sleep();
            self.ring.turn(if orders.is_empty() { None } else { Some(0) })?;
            waker.awake();
            self.ring.reap(&mut done);
            for completion in done.drain(..) {
                match completion.tag {
                    Tag::Wake => listen(&mut self.ring),
                    Tag::Command(tag) => self.request(tag, &completion),
                    Tag::Disk(tag) => {
                        self.out -= 1;
                        self.give(tag, |queue| queue.finish(tag, told(completion)));
                    }
                    Tag::Asked(id) => self.asked.remove(id)(told(completion)),
                }
            }
        }
    }

    fn open(&mut self, queue: Queue) -> io::Result<()> {
        let (fd, depth) = (Rc::new(queue.descriptor()?), queue.depth());
        self.queue = Some((queue, fd));
        self.ring.turn(Some(0))?;
        for tag in 0..depth {
            self.give(tag, |queue| queue.fetch(tag));
        }
        self.ring.turn(Some(0))?;
        self.queue.as_mut().map_or(Ok(()), |(queue, _)| queue.map())
    }

    fn give(&mut self, tag: u16, command: impl FnOnce(&mut Queue) -> Command) {
        let Some((queue, fd)) = &mut self.queue else { return };
        let Command { code, argument } = command(queue);
        self.out += 1;
        self.ring.submit(Operation::Command { fd: fd.clone(), code, argument }, Tag::Command(tag));
    }

    /// A tag's request has come.
    fn request(&mut self, tag: u16, completion: &Completion<Tag>) {
        self.out -= 1;
        let Some((queue, _)) = &mut self.queue else { return };
        if completion.result.is_err() {
            return; // the device is being stopped
        }
        let op = match queue.request(tag) {
            Err(fault) => return self.give(tag, |queue| queue.refuse(tag, fault)),
            Ok(op) => op,
        };
        match self.operation(op) {
            Err(e) => self.give(tag, |queue| queue.finish(tag, Err(e))),
            Ok(operation) => {
                self.out += 1;
                self.ring.submit(operation, Tag::Disk(tag));
            }
        }
    }

    /// FUSE's session has handed a request in.
    fn ask(&mut self, op: Op, done: Done) {
        match self.operation(op) {
            Err(e) => done(Err(e)),
            Ok(operation) => {
                self.ring.submit(operation, Tag::Asked(self.asked.insert(done)));
            }
        }
    }

    /// The disk's part of a request.
    fn operation(&mut self, op: Op) -> Result<Operation, IoError> {
        let fd = self.disk.clone();
        Ok(match op {
            Op::Read(extent) => {
                let len = extent.len() as usize;
                Operation::Read { fd, offset: extent.address().offset(), len, buf: aligned(len) }
            }
            Op::Write { extent, data, fua } => {
                let len = data.len() as usize;
                let mut buf = self.spare.1.try_recv().unwrap_or_else(|_| aligned(len));
                if buf.len() < len {
                    buf.resize(len, 0);
                }
                data.copy(&mut buf[..len])?;
                let lent = Lent { buf: Some(buf), len, home: self.spare.0.clone() };
                let data = Bytes::from_owner(lent);
                Operation::Write { fd, offset: extent.address().offset(), data, dsync: fua }
            }
            Op::Zero { extent, .. } => {
                let mode =
                    (FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE).bits();
                Operation::Fallocate { fd, mode, offset: extent.address().offset(), len: extent.len() }
            }
            Op::Flush => Operation::Sync { fd },
        })
    }
}

/// The disk's answer.
fn told(completion: Completion<Tag>) -> Result<Bytes, IoError> {
    completion.result.map_err(|errno| IoError { errno })?;
    Ok(match completion.operation {
        Operation::Read { buf, .. } => freeze(buf),
        _ => Bytes::new(),
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let path = arguments.next().ok_or("usage: passthrough DISK, or passthrough FILE DIR")?;
    let mounted = arguments.next();
    let flags = (OFlag::O_DIRECT | OFlag::O_EXCL).bits();
    let mut disk: File = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path)?;
    let size = disk.seek(SeekFrom::End(0))?;
    let (orders, queue) = unbounded();
    let waker = Arc::new(Waker::new()?);
    let door = Arc::new(Door { orders, waker: waker.clone() });
    let device = std::thread::spawn(move || {
        let served = offer(door.clone(), size, mounted);
        door.post(Order::End);
        served.map_err(|e| e.to_string())
    });
    let looping = Loop {
        ring: Ring::new(512)?,
        disk: Rc::new(disk.into()),
        queue: None,
        out: 0,
        closing: None,
        asked: Slab::new(),
        spare: unbounded(),
    };
    looping.run(&queue, &waker)?;
    Ok(device.join().map_err(|_| "the thread that makes the device died")??)
}

/// Makes the device, and takes it away when the standard input ends.
fn offer(host: Arc<Door>, size: u64, mounted: Option<PathBuf>) -> Result<(), Box<dyn Error>> {
    let volumes = vec![Volume {
        volume: 0,
        name: "disk".into(),
        size,
        block: 512,
        link: PathBuf::from("disk"),
        read_only: false,
        lasting: true,
    }];
    let shown = |paths: Vec<PathBuf>| paths.iter().for_each(|p| println!("{}", p.display()));
    if let Some(dir) = mounted {
        let (mount_dir, dev_dir) = (dir.join("mount"), dir.join("dev"));
        let mut device =
            FuseDevice::attach(FuseOptions { mount_dir, dev_dir, volumes, loop_device: true, submit: host })?;
        shown(device.paths());
        io::stdin().read_to_end(&mut Vec::new())?;
        return Ok(device.detach(false)?);
    }
    let (owner, dev_dir) = ((GroupId([0; 16]), NodeId(0)), PathBuf::from("/dev/passthrough"));
    let mut devices =
        UblkDevices::attach(UblkOptions { owner, volumes, dev_dir, host, ending: Arc::default() })?;
    shown(devices.devices().iter().map(PathBuf::from).collect());
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(devices.detach(false)?)
}

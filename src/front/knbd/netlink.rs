//! The conversation with the kernel's NBD driver.
//!
//! Owns: the netlink socket. Invariant: a request is over when its acknowledgement is here, and the
//! driver has then done all of it or nothing.

use super::messages::{Answer, FAMILY, Message, NewDevice, answers};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Longest wait for an answer, seconds. A disconnect waits for a device's last replies.
const PATIENCE: i64 = 60;
/// Answers are far smaller.
const ANSWER: usize = 16 << 10;

/// The NBD driver.
pub(super) struct Driver {
    socket: OwnedFd,
    family: u16,
    sequence: u32,
}

impl Driver {
    /// Finds the driver. The kernel loads its module if it can.
    pub fn find() -> io::Result<Driver> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkGeneric,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(PATIENCE))?;
        let mut driver = Driver { socket, family: 0, sequence: 0 };
        let parts = driver.ask(Message::find_family()).map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT) => {
                io::Error::new(io::ErrorKind::NotFound, "this kernel has no NBD driver: try `modprobe nbd`")
            }
            _ => e,
        })?;
        driver.family = parts.iter().find_map(Message::family_id).ok_or_else(|| {
            io::Error::other(format!("the kernel does not tell the number of the netlink family {FAMILY}"))
        })?;
        Ok(driver)
    }

    /// Makes a device; returns its number.
    pub fn connect(&mut self, new: &NewDevice) -> io::Result<u32> {
        let parts = self.ask(Message::connect(self.family, new))?;
        let index = parts.iter().find_map(Message::index);
        index.ok_or_else(|| io::Error::other("the NBD driver made a device and does not tell which"))
    }

    /// Offers a device another socket. That this succeeds does not mean that the driver took it: as
    /// long as it believes in the old one, it drops the new one and says nothing.
    pub fn reconnect(&mut self, index: u32, identity: &str, dead_after: u64, socket: i32) -> io::Result<()> {
        self.ask(Message::reconnect(self.family, index, identity, dead_after, socket)).map(drop)
    }

    /// Takes a device away. Requests in flight fail.
    pub fn disconnect(&mut self, index: u32) -> io::Result<()> {
        self.ask(Message::disconnect(self.family, index)).map(drop)
    }

    /// Sends a request and waits for its end.
    fn ask(&mut self, message: Message) -> io::Result<Vec<Message>> {
        self.sequence += 1;
        let datagram = message.datagram(self.sequence);
        send(self.socket.as_raw_fd(), &datagram, MsgFlags::empty())?;
        let mut parts = Vec::new();
        let mut buffer = vec![0; ANSWER];
        loop {
            let len = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Err(nix::errno::Errno::EINTR) => continue,
                Err(nix::errno::Errno::EAGAIN) => {
                    let why = format!("the NBD driver has not answered for {PATIENCE} s");
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
                len => len?,
            };
            let found = answers(&buffer[..len], self.sequence).map_err(io::Error::other)?;
            for answer in found {
                match answer {
                    Answer::Part(part) => parts.push(part),
                    Answer::End(end) => return end.map(|()| parts),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_the_driver_is_told_from_one_with_it() {
        match Driver::find() {
            Ok(driver) => assert!(driver.family > super::super::messages::CONTROLLER),
            Err(e) if e.kind() == io::ErrorKind::NotFound => assert!(e.to_string().contains("modprobe nbd")),
            Err(e) => println!("skipped: no generic netlink here: {e}"),
        }
    }
}

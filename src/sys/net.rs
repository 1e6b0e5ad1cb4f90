//! Sockets, as the ring wants them.
//!
//! Owns: the options of every socket. Invariant: sockets on the ring are blocking: on those, io_uring
//! waits for readiness by itself; on non-blocking ones it answers EAGAIN.

use super::uring::Fd;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, listen, setsockopt, shutdown, socket,
    sockopt,
};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

/// How long sent bytes may stay unacknowledged before the kernel gives a connection up, ms.
const USER_TIMEOUT: u32 = 15_000;

/// Between two attempts to get an address that a dying process still holds.
pub const RETRY: Duration = Duration::from_millis(20);

/// A listener, and the address it got (with the port chosen by the kernel for port 0).
pub fn listen_tcp(address: SocketAddr) -> io::Result<(Fd, SocketAddr)> {
    let listener = TcpListener::bind(address)?;
    let bound = listener.local_addr()?;
    let backlog = Backlog::new(128).map_err(io::Error::from)?;
    listen(&listener, backlog)?;
    Ok((Rc::new(OwnedFd::from(listener)), bound))
}

/// An unconnected socket for `address`.
pub fn tcp_socket(address: &SocketAddr) -> io::Result<Fd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    tune(&fd)?;
    Ok(Rc::new(fd))
}

/// The options of a TCP connection: no Nagle delay, and an end to silence of the other kernel.
pub fn tune(fd: &impl AsFd) -> io::Result<()> {
    setsockopt(fd, sockopt::TcpNoDelay, &true)?;
    setsockopt(fd, sockopt::TcpUserTimeout, &USER_TIMEOUT)?;
    Ok(())
}

/// The address in the kernel's form.
pub fn storage(address: SocketAddr) -> Box<SockaddrStorage> {
    Box::new(SockaddrStorage::from(address))
}

/// Ends both directions; operations in flight on the socket complete.
pub fn hang_up(fd: &Fd) {
    // Fails when the other end is gone already, which is as good.
    let _ = shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Both);
}

/// Ends the direction towards us: what came before can still be received, then there is an end, and
/// the other end can't send any more.
pub fn stop_receiving(fd: &Fd) {
    let _ = shutdown(fd.as_raw_fd(), nix::sys::socket::Shutdown::Read);
}

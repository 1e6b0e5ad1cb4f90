//! A small NBD client that keeps many requests in flight and knows exactly what was acknowledged.
//!
//! Owns: one connection. Invariant: a reply is told to the caller once, and only for a cookie that is
//! in flight. The wire is written out here once more on purpose: nothing is shared with the server.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub const FUA: u16 = 1;
pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const ZEROES: u16 = 6;

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub cookie: u64,
    /// 0, or an errno of the protocol.
    pub error: u32,
    pub data: Vec<u8>,
}

/// See the module's documentation.
pub struct Client {
    stream: UnixStream,
    cookie: u64,
    /// Lengths that replies bring.
    flying: HashMap<u64, usize>,
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

impl Client {
    /// Connects to one export.
    pub fn connect(socket: &Path, export: &str) -> io::Result<Client> {
        let mut stream = UnixStream::connect(socket)?;
        // A reply that never comes must not hang the test.
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut hello = [0; 18];
        stream.read_exact(&mut hello)?;
        if &hello[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(odd("not an NBD server"));
        }
        let mut ask = vec![0, 0, 0, 3];
        ask.extend(b"IHAVEOPT");
        ask.extend(7u32.to_be_bytes());
        ask.extend((export.len() as u32 + 6).to_be_bytes());
        ask.extend((export.len() as u32).to_be_bytes());
        ask.extend(export.as_bytes());
        ask.extend([0, 0]);
        stream.write_all(&ask)?;
        loop {
            let mut head = [0; 20];
            stream.read_exact(&mut head)?;
            let kind = u32::from_be_bytes(head[12..16].try_into().unwrap());
            let mut rest = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
            stream.read_exact(&mut rest)?;
            match kind {
                1 => return Ok(Client { stream, cookie: 0, flying: HashMap::new() }),
                3 => {}
                _ => return Err(odd("the export was refused")),
            }
        }
    }

    /// Requests without a reply yet.
    pub fn in_flight(&self) -> usize {
        self.flying.len()
    }

    /// Sends a request; its cookie.
    pub fn send(&mut self, kind: u16, flags: u16, offset: u64, len: usize, data: &[u8]) -> io::Result<u64> {
        self.cookie += 1;
        let mut head = Vec::with_capacity(28 + data.len());
        head.extend(0x2560_9513u32.to_be_bytes());
        head.extend(flags.to_be_bytes());
        head.extend(kind.to_be_bytes());
        head.extend(self.cookie.to_be_bytes());
        head.extend(offset.to_be_bytes());
        head.extend((len as u32).to_be_bytes());
        head.extend(data);
        self.flying.insert(self.cookie, if kind == READ { len } else { 0 });
        self.stream.write_all(&head)?;
        Ok(self.cookie)
    }

    /// Waits for the next reply.
    pub fn reply(&mut self) -> io::Result<Reply> {
        let mut head = [0; 16];
        self.stream.read_exact(&mut head)?;
        if head[..4] != 0x6744_6698u32.to_be_bytes() {
            return Err(odd("not a reply"));
        }
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        let len = self.flying.remove(&cookie).ok_or_else(|| odd("a reply to nothing"))?;
        let mut data = vec![0; if error == 0 { len } else { 0 }];
        self.stream.read_exact(&mut data)?;
        Ok(Reply { cookie, error, data })
    }

    /// A request alone; its data.
    pub fn call(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        len: usize,
        data: &[u8],
    ) -> io::Result<Vec<u8>> {
        self.send(kind, flags, offset, len, data)?;
        let reply = self.reply()?;
        match reply.error {
            0 => Ok(reply.data),
            n => Err(io::Error::from_raw_os_error(n as i32)),
        }
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        self.call(READ, 0, offset, len, &[])
    }
    /// Writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.call(WRITE, 0, offset, data.len(), data).map(drop)
    }
    /// Flushes.
    pub fn flush(&mut self) -> io::Result<()> {
        self.call(FLUSH, 0, 0, 0, &[]).map(drop)
    }
}

//! Messages to and from the kernel's NBD driver (generic netlink family "nbd"), as bytes.
//!
//! Owns: their numbers and their layout (linux/genetlink.h, linux/nbd-netlink.h). Invariant: what is
//! built here parses to itself, and no bytes received make a parser panic.

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_ACK, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlaBuffer, NlasIterator,
};
use std::io;

/// Name of the family.
pub(super) const FAMILY: &str = "nbd";
/// The controller, which tells the numbers of the families.
pub(super) const CONTROLLER: u16 = 0x10;

/// Commands of the controller, and its attributes.
mod ctrl {
    pub const GETFAMILY: u8 = 3;
    pub const FAMILY_ID: u16 = 1;
    pub const FAMILY_NAME: u16 = 2;
}

/// Commands of the family.
mod cmd {
    pub const CONNECT: u8 = 1;
    pub const DISCONNECT: u8 = 2;
    pub const RECONFIGURE: u8 = 3;
}

/// Attributes of the family.
mod attr {
    pub const INDEX: u16 = 1;
    pub const SIZE_BYTES: u16 = 2;
    pub const BLOCK_SIZE_BYTES: u16 = 3;
    pub const TIMEOUT: u16 = 4;
    pub const SERVER_FLAGS: u16 = 5;
    pub const CLIENT_FLAGS: u16 = 6;
    pub const SOCKETS: u16 = 7;
    pub const DEAD_CONN_TIMEOUT: u16 = 8;
    pub const BACKEND_IDENTIFIER: u16 = 10;
    /// Within SOCKETS.
    pub const SOCK_ITEM: u16 = 1;
    /// Within SOCK_ITEM.
    pub const SOCK_FD: u16 = 1;
}

/// Bytes of the header that follows netlink's own.
const HEADER: usize = 4;

/// A generic netlink message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Message {
    family: u16,
    command: u8,
    attributes: Vec<DefaultNla>,
}

/// A device to make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct NewDevice {
    /// Whose it is: the kernel keeps it, and compares it before it takes another socket.
    pub identity: String,
    /// Bytes.
    pub size: u64,
    /// Logical block, bytes.
    pub block: u32,
    /// Transmission flags of the NBD protocol.
    pub flags: u16,
    /// How long requests wait for another socket when this one is gone, seconds.
    pub dead_after: u64,
    /// The driver's end of the socket.
    pub socket: i32,
}

impl Message {
    /// Asks the controller for the family's number.
    pub fn find_family() -> Message {
        let name = text(ctrl::FAMILY_NAME, FAMILY);
        Message { family: CONTROLLER, command: ctrl::GETFAMILY, attributes: vec![name] }
    }

    /// Makes a device out of one that nobody uses.
    pub fn connect(family: u16, new: &NewDevice) -> Message {
        let attributes = vec![
            wide(attr::SIZE_BYTES, new.size),
            wide(attr::BLOCK_SIZE_BYTES, new.block.into()),
            // A daemon that lives is never given up, however long a request takes.
            wide(attr::TIMEOUT, 0),
            wide(attr::DEAD_CONN_TIMEOUT, new.dead_after),
            wide(attr::SERVER_FLAGS, new.flags.into()),
            // Told, because what the last user of the device asked for would stay otherwise.
            wide(attr::CLIENT_FLAGS, 0),
            sockets(new.socket),
            text(attr::BACKEND_IDENTIFIER, &new.identity),
        ];
        Message { family, command: cmd::CONNECT, attributes }
    }

    /// Gives a device whose socket is gone another one. Nothing else is told: it would be changed.
    pub fn reconnect(family: u16, index: u32, identity: &str, dead_after: u64, socket: i32) -> Message {
        let attributes = vec![
            narrow(attr::INDEX, index),
            text(attr::BACKEND_IDENTIFIER, identity),
            wide(attr::DEAD_CONN_TIMEOUT, dead_after),
            sockets(socket),
        ];
        Message { family, command: cmd::RECONFIGURE, attributes }
    }

    /// Takes a device away from its users.
    pub fn disconnect(family: u16, index: u32) -> Message {
        Message { family, command: cmd::DISCONNECT, attributes: vec![narrow(attr::INDEX, index)] }
    }

    /// In an answer of the controller: the family's number.
    pub fn family_id(&self) -> Option<u16> {
        let value = self.attribute(ctrl::FAMILY_ID)?;
        Some(u16::from_ne_bytes(value.try_into().ok()?))
    }

    /// In an answer to [`Message::connect`]: the device's number.
    pub fn index(&self) -> Option<u32> {
        let value = self.attribute(attr::INDEX)?;
        Some(u32::from_ne_bytes(value.try_into().ok()?))
    }

    fn attribute(&self, kind: u16) -> Option<Vec<u8>> {
        use netlink_packet_core::Nla;
        let found = self.attributes.iter().find(|a| a.kind() == kind)?;
        let mut value = vec![0; found.value_len()];
        found.emit_value(&mut value);
        Some(value)
    }

    /// The whole datagram, which asks for an acknowledgement.
    pub fn datagram(self, sequence: u32) -> Vec<u8> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_ACK;
        header.sequence_number = sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(self));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }
}

/// What came in answer to a request.
#[derive(Debug)]
pub(super) enum Answer {
    /// Something that was asked for; the end of it comes later.
    Part(Message),
    /// The end: done, or why not.
    End(io::Result<()>),
}

/// The messages of a datagram that answer the request with this number.
pub(super) fn answers(mut datagram: &[u8], sequence: u32) -> Result<Vec<Answer>, DecodeError> {
    let mut found = Vec::new();
    while !datagram.is_empty() {
        let message = NetlinkMessage::<Message>::deserialize(datagram)?;
        // At least the header's length, which the parser has checked; a padded end may be cut off.
        let len = (message.header.length as usize).next_multiple_of(4).min(datagram.len());
        datagram = &datagram[len..];
        if message.header.sequence_number != sequence {
            continue;
        }
        match message.payload {
            NetlinkPayload::InnerMessage(part) => found.push(Answer::Part(part)),
            NetlinkPayload::Error(e) if e.code.is_none() => found.push(Answer::End(Ok(()))),
            NetlinkPayload::Error(e) => found.push(Answer::End(Err(e.to_io()))),
            NetlinkPayload::Done(_) => found.push(Answer::End(Ok(()))),
            _ => {}
        }
    }
    Ok(found)
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.family
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes.as_slice().buffer_len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer[..HEADER].copy_from_slice(&[self.command, 1, 0, 0]);
        self.attributes.as_slice().emit(&mut buffer[HEADER..]);
    }
}

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Message, DecodeError> {
        let Some((head, rest)) = payload.split_first_chunk::<HEADER>() else {
            return Err(DecodeError::from("a message without a header"));
        };
        let attributes = NlasIterator::new(rest)
            .map(|nla| nla.map(|nla: NlaBuffer<&[u8]>| DefaultNla::new(nla.kind(), nla.value().to_vec())))
            .collect::<Result<_, _>>()?;
        Ok(Message { family: header.message_type, command: head[0], attributes })
    }
}

fn narrow(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

fn wide(kind: u16, value: u64) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

fn text(kind: u16, value: &str) -> DefaultNla {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    DefaultNla::new(kind, bytes)
}

/// The list of sockets, with one.
fn sockets(fd: i32) -> DefaultNla {
    let item = nest(attr::SOCK_ITEM, &narrow(attr::SOCK_FD, fd as u32));
    nest(attr::SOCKETS, &item)
}

fn nest(kind: u16, inner: &DefaultNla) -> DefaultNla {
    // The kernel's own clients nest with this flag; the driver does not ask for it.
    const NLA_F_NESTED: u16 = 1 << 15;
    let mut bytes = vec![0; inner.buffer_len()];
    inner.emit(&mut bytes);
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    fn sample() -> NewDevice {
        NewDevice {
            identity: "volrep x".into(),
            size: 1 << 30,
            block: 4096,
            flags: 0x6d,
            dead_after: 300,
            socket: 7,
        }
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn golden_bytes_as_the_kernels_headers_lay_them_out() {
        let find = Message::find_family().datagram(1);
        assert_eq!(hex(&find), "1c00000010000500010000000000000003010000080002006e626400");
        let connect = Message::connect(0x1b, &sample()).datagram(2);
        let parts = [
            "7c0000001b000500020000000000000001010000",
            "0c0002000000004000000000",
            "0c0003000010000000000000",
            "0c0004000000000000000000",
            "0c0008002c01000000000000",
            "0c0005006d00000000000000",
            "0c0006000000000000000000",
            "100007800c0001800800010007000000",
            "0d000a00766f6c726570207800000000",
        ];
        assert_eq!(hex(&connect), parts.concat());
        let reconnect = Message::reconnect(0x1b, 3, "volrep x", 300, 7).datagram(3);
        let parts = [
            "480000001b000500030000000000000003010000",
            "0800010003000000",
            "0d000a00766f6c726570207800000000",
            "0c0008002c01000000000000",
            "100007800c0001800800010007000000",
        ];
        assert_eq!(hex(&reconnect), parts.concat());
        let disconnect = Message::disconnect(0x1b, 3).datagram(4);
        assert_eq!(hex(&disconnect), "1c0000001b0005000400000000000000020100000800010003000000");
    }

    #[test]
    fn answers_are_told_apart_by_their_number_and_end_with_the_errno() {
        let index = Message { family: 27, command: cmd::CONNECT, attributes: vec![narrow(attr::INDEX, 5)] };
        let mut datagram = index.clone().datagram(8);
        datagram.extend(index.datagram(9));
        // An error: its length, NLMSG_ERROR, no flags, number 9, no port; -EBUSY; the request's header.
        datagram.extend([36, 0, 0, 0, 2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        datagram.extend((-16_i32).to_ne_bytes());
        datagram.extend([0; 16]);
        let found = answers(&datagram, 9).unwrap();
        let [Answer::Part(part), Answer::End(Err(error))] = &found[..] else { panic!("{found:?}") };
        assert_eq!((part.index(), error.raw_os_error()), (Some(5), Some(16)));
        let end = datagram.len() - 36;
        datagram[end + 16..end + 20].fill(0);
        let found = answers(&datagram[end..], 9).unwrap();
        assert!(matches!(found[..], [Answer::End(Ok(()))]), "{found:?}");
    }

    #[test]
    fn the_controllers_answer_names_the_family() {
        let id = DefaultNla::new(ctrl::FAMILY_ID, 27_u16.to_ne_bytes().to_vec());
        let message = Message { family: CONTROLLER, command: 1, attributes: vec![text(2, "nbd"), id] };
        let found = answers(&message.datagram(1), 1).unwrap();
        let [Answer::Part(part)] = &found[..] else { panic!("{found:?}") };
        assert_eq!((part.family_id(), part.index()), (Some(27), None));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            let _ = answers(&bytes, 1);
            // The same with a length that is right, so that the rest is looked at, too.
            let mut whole = bytes;
            if let Some(head) = whole.first_chunk::<4>().copied() {
                let len = whole.len() as u32;
                whole[..4].copy_from_slice(&len.to_ne_bytes());
                if let Ok(found) = answers(&whole, u32::from_ne_bytes(head)) {
                    for answer in found {
                        if let Answer::Part(part) = answer {
                            let _ = (part.index(), part.family_id());
                        }
                    }
                }
            }
        }
    }
}

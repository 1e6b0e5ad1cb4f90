//! What a primary tells a node that is to follow it: one line of text, which holds the group's key.
//!
//! Owns: the token's layout: base64 of magic "VTOK", version u8, the fields in the order of
//! [`Invitation`], the first 16 bytes of blake3 over all before. Invariant: a token that lost or
//! changed a character is never accepted.

use super::config::{KEY, check_address};
use super::places::check_name;
use crate::format::FormatError;
use crate::format::fields::{Reader, Writer};
use crate::format::message::{MAX_NAME, MAX_VOLUMES};
use crate::units::GroupId;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

const MAGIC: &[u8; 4] = b"VTOK";
const VERSION: u8 = 2;
const CHECK: usize = 16;
/// Longest token, characters.
pub const MAX_TOKEN: usize = 64 << 10;

/// A token's contents.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Invitation {
    /// The group's name.
    pub group: String,
    /// Its identity.
    pub id: GroupId,
    /// Its volumes in the order of their numbers.
    pub volumes: Vec<Volume>,
    /// The name of the node that printed it: the primary, or the shadow that is to be followed.
    pub primary: String,
    /// Where it listens.
    pub address: String,
    /// Proposed name of the node that joins; may be empty.
    pub peer: String,
    /// The group's key.
    pub key: [u8; KEY],
    /// Of a shadow: the name of its primary, if it is known, or nothing.
    pub shadow_of: Option<String>,
}

/// A volume as the token has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Fingerprint of the primary's file, so that it is not given as the shadow's, too.
    pub file: [u8; 16],
}

impl Invitation {
    /// The token.
    pub fn encode(&self) -> String {
        let mut w = Writer::default();
        w.bytes(MAGIC).u8(VERSION).name(&self.group).group(self.id);
        w.list(&self.volumes, |w, v| {
            w.name(&v.name).u64(v.size).bytes(&v.file);
        });
        w.name(&self.primary).name(&self.address).name(&self.peer).bytes(&self.key);
        w.option(self.shadow_of.as_ref(), |w, name| {
            w.name(name);
        });
        let sum = blake3::hash(&w.0);
        w.bytes(&sum.as_bytes()[..CHECK]);
        URL_SAFE_NO_PAD.encode(&w.0)
    }

    /// Reads a token.
    pub fn decode(token: &str) -> Result<Invitation, FormatError> {
        let token = token.trim();
        if token.len() > MAX_TOKEN {
            return Err(FormatError::Field("length"));
        }
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| FormatError::Magic)?;
        let mut r = Reader(&bytes);
        if r.take(MAGIC.len())? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = r.u8()?;
        let body = bytes.len().checked_sub(CHECK).ok_or(FormatError::Short)?;
        if blake3::hash(&bytes[..body]).as_bytes()[..CHECK] != bytes[body..] {
            return Err(FormatError::Checksum);
        }
        if version != VERSION {
            return Err(FormatError::Version(u16::from(version)));
        }
        let mut r = Reader(bytes.get(MAGIC.len() + 1..body).ok_or(FormatError::Short)?);
        let invitation = Self::read(&mut r)?;
        r.end()?;
        invitation.check()?;
        Ok(invitation)
    }

    fn read(r: &mut Reader) -> Result<Invitation, FormatError> {
        Ok(Invitation {
            group: r.name(MAX_NAME, "group name")?,
            id: r.group()?,
            volumes: r.list(MAX_VOLUMES, "volumes", |r| {
                Ok(Volume { name: r.name(MAX_NAME, "volume name")?, size: r.u64()?, file: r.array()? })
            })?,
            primary: r.name(MAX_NAME, "primary's name")?,
            address: r.name(255, "address")?,
            peer: r.name(MAX_NAME, "peer's name")?,
            key: r.array()?,
            shadow_of: r.option("shadow", |r| r.name(MAX_NAME, "primary's name"))?,
        })
    }

    fn check(&self) -> Result<(), FormatError> {
        let name = |n: &str, field| check_name(n).map(drop).map_err(|_| FormatError::Field(field));
        name(&self.group, "group name")?;
        name(&self.primary, "primary's name")?;
        if !self.peer.is_empty() {
            name(&self.peer, "peer's name")?;
        }
        if let Some(primary) = self.shadow_of.as_ref().filter(|n| !n.is_empty()) {
            name(primary, "primary's name")?;
        }
        check_address(&self.address).map_err(|_| FormatError::Field("address"))?;
        self.volumes.iter().try_for_each(|v| name(&v.name, "volume name"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Invitation {
        Invitation {
            group: "epic".into(),
            id: GroupId([1; 16]),
            volumes: vec![Volume { name: "data".into(), size: 4096, file: [2; 16] }],
            primary: "db1".into(),
            address: "db1:7654".into(),
            peer: String::new(),
            key: [3; KEY],
            shadow_of: None,
        }
    }

    #[test]
    fn golden() {
        let token = sample().encode();
        assert_eq!(Invitation::decode(&format!(" {token}\n")).unwrap(), sample());
        assert!(token.starts_with("VlRPSwIEZXBpYwEBAQEBAQEBAQEBAQEBAQEBAARkYXRhABAAAAAAAAAC"), "{token}");
    }

    proptest! {
        #[test]
        fn a_changed_or_cut_token_is_refused(at in 0usize..300, with in "[A-Za-z0-9_-]", cut: bool) {
            let good = sample().encode();
            let at = at % good.len();
            let mut bad = good.clone();
            if cut { bad.truncate(at) } else { bad.replace_range(at..=at, &with) }
            prop_assert!(bad == good || Invitation::decode(&bad).is_err());
        }
        #[test]
        fn no_text_panics(text in ".{0,200}", bytes: Vec<u8>) {
            let _ = Invitation::decode(&text);
            let _ = Invitation::decode(&URL_SAFE_NO_PAD.encode([&MAGIC[..], &bytes].concat()));
        }
    }
}

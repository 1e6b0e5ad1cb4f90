//! The mount table of this process.
//!
//! Owns: reading `/proc/self/mountinfo`. Invariant: a line that does not parse is left out, never
//! guessed at.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mount.
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    /// `major:minor` of what is mounted.
    pub device: String,
    /// Where.
    pub point: PathBuf,
    /// Type of the filesystem.
    pub kind: String,
}

/// All mounts, lower ones of a stack first.
pub fn read() -> Vec<Mount> {
    let table = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    table.split(|b| *b == b'\n').filter_map(parse).collect()
}

/// `ID PARENT MAJ:MIN ROOT POINT OPTIONS [TAG]... - TYPE SOURCE SUPER`
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|b| *b == b' ');
    let device = text(fields.nth(2)?)?;
    let point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    fields.find(|f| *f == b"-")?;
    Some(Mount { device, point, kind: text(fields.next()?)? })
}

fn text(field: &[u8]) -> Option<String> {
    String::from_utf8(field.to_vec()).ok()
}

/// Space, tab, newline and backslash come as a backslash and three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let digits = tail.get(..3).filter(|d| byte == b'\\' && d.iter().all(|c| (b'0'..=b'7').contains(c)));
        let value = digits.map(|d| d.iter().fold(0u32, |n, c| n * 8 + u32::from(c - b'0')));
        if let Some(value) = value.and_then(|v| u8::try_from(v).ok()) {
            out.push(value);
            rest = &tail[3..];
        } else {
            out.push(byte);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_parse_with_tags_and_escapes_or_are_left_out() {
        let line = br"36 35 0:44 / /mnt/a\040b\134 rw,noatime shared:1 master:2 - fuse volrep rw,user_id=0";
        let mount = Mount { device: "0:44".into(), point: r"/mnt/a b\".into(), kind: "fuse".into() };
        assert_eq!(parse(line), Some(mount));
        for bad in [&b""[..], b"36 35", b"1 2 0:1 / /x rw", b"1 2 0:1 / /x rw -"] {
            assert_eq!(parse(bad), None);
        }
        assert_eq!(unescape(br"\777\04"), br"\777\04");
    }
}

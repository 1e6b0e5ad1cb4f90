//! Reading and writing the fields of a layout, in order.
//!
//! Owns: the bounds check of every field read. Invariant: a [`Reader`] never reads past its bytes.

use super::FormatError;
use crate::units::{Generation, GroupId, Hash, HistoryPoint, Lsn, NodeId, Term};

/// Takes fields off the front of bytes.
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        let (head, tail) = self.0.split_at_checked(n).ok_or(FormatError::Short)?;
        self.0 = tail;
        Ok(head)
    }
    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        Ok(self.take(N)?.try_into().expect("take gives N bytes"))
    }
    /// An integer of 1 byte.
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }
    /// An integer of 2 bytes.
    pub fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }
    /// An integer of 4 bytes.
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }
    /// An integer of 8 bytes.
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }
    /// 0 or 1; anything else is refused.
    pub fn flag(&mut self, name: &'static str) -> Result<bool, FormatError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(FormatError::Field(name)),
        }
    }
    /// An LSN.
    pub fn lsn(&mut self) -> Result<Lsn, FormatError> {
        self.u64().map(Lsn)
    }
    /// A hash.
    pub fn hash(&mut self) -> Result<Hash, FormatError> {
        self.array().map(Hash)
    }
    /// A node's identity.
    pub fn node(&mut self) -> Result<NodeId, FormatError> {
        self.u64().map(NodeId)
    }
    /// A group's identity.
    pub fn group(&mut self) -> Result<GroupId, FormatError> {
        self.array().map(GroupId)
    }
    /// A term: 16 bytes.
    pub fn term(&mut self) -> Result<Term, FormatError> {
        Ok(Term { counter: self.u64()?, node: self.node()? })
    }
    /// A generation: 20 bytes.
    pub fn generation(&mut self) -> Result<Generation, FormatError> {
        Ok(Generation { term: self.term()?, start: self.u32()? })
    }
    /// A history point: 40 bytes.
    pub fn point(&mut self) -> Result<HistoryPoint, FormatError> {
        Ok(HistoryPoint { lsn: self.lsn()?, hash: self.hash()? })
    }
    /// A name: one byte of length (at most `max`), UTF-8.
    pub fn name(&mut self, max: usize, field: &'static str) -> Result<String, FormatError> {
        let len = usize::from(self.u8()?);
        if len > max {
            return Err(FormatError::Field(field));
        }
        let bytes = self.take(len)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| FormatError::Field(field))
    }
    /// A counted list: two bytes of count (at most `max`), then the items.
    pub fn list<T>(
        &mut self,
        max: usize,
        field: &'static str,
        mut item: impl FnMut(&mut Self) -> Result<T, FormatError>,
    ) -> Result<Vec<T>, FormatError> {
        let count = usize::from(self.u16()?);
        if count > max {
            return Err(FormatError::Field(field));
        }
        (0..count).map(|_| item(self)).collect()
    }
    /// 0 for nothing, or 1 and the value.
    pub fn option<T>(
        &mut self,
        field: &'static str,
        value: impl FnOnce(&mut Self) -> Result<T, FormatError>,
    ) -> Result<Option<T>, FormatError> {
        if self.flag(field)? { value(self).map(Some) } else { Ok(None) }
    }
    /// Refuses bytes that nothing has read.
    pub fn end(&self) -> Result<(), FormatError> {
        if self.0.is_empty() { Ok(()) } else { Err(FormatError::Field("length")) }
    }
}

/// Appends fields to bytes.
#[derive(Default)]
pub struct Writer(pub Vec<u8>);

impl Writer {
    /// Bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }
    /// An integer of 1 byte.
    pub fn u8(&mut self, v: u8) -> &mut Self {
        self.bytes(&[v])
    }
    /// An integer of 2 bytes.
    pub fn u16(&mut self, v: u16) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }
    /// An integer of 4 bytes.
    pub fn u32(&mut self, v: u32) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }
    /// An integer of 8 bytes.
    pub fn u64(&mut self, v: u64) -> &mut Self {
        self.bytes(&v.to_le_bytes())
    }
    /// 0 or 1.
    pub fn flag(&mut self, v: bool) -> &mut Self {
        self.u8(u8::from(v))
    }
    /// An LSN.
    pub fn lsn(&mut self, v: Lsn) -> &mut Self {
        self.u64(v.0)
    }
    /// A hash.
    pub fn hash(&mut self, v: Hash) -> &mut Self {
        self.bytes(&v.0)
    }
    /// A node's identity.
    pub fn node(&mut self, v: NodeId) -> &mut Self {
        self.u64(v.0)
    }
    /// A group's identity.
    pub fn group(&mut self, v: GroupId) -> &mut Self {
        self.bytes(&v.0)
    }
    /// A term.
    pub fn term(&mut self, v: Term) -> &mut Self {
        self.u64(v.counter).node(v.node)
    }
    /// A generation.
    pub fn generation(&mut self, v: Generation) -> &mut Self {
        self.term(v.term).u32(v.start)
    }
    /// A history point.
    pub fn point(&mut self, v: HistoryPoint) -> &mut Self {
        self.lsn(v.lsn).hash(v.hash)
    }
    /// A name of at most 255 bytes; the caller has checked it.
    pub fn name(&mut self, v: &str) -> &mut Self {
        self.u8(u8::try_from(v.len()).expect("a name is short")).bytes(v.as_bytes())
    }
    /// A counted list of at most 65,535 items.
    pub fn list<T>(&mut self, items: &[T], mut item: impl FnMut(&mut Self, &T)) -> &mut Self {
        self.u16(u16::try_from(items.len()).expect("a list is bounded"));
        for i in items {
            item(self, i);
        }
        self
    }
    /// 0 for nothing, or 1 and the value.
    pub fn option<T>(&mut self, value: Option<&T>, write: impl FnOnce(&mut Self, &T)) -> &mut Self {
        self.flag(value.is_some());
        if let Some(value) = value {
            write(self, value);
        }
        self
    }
}

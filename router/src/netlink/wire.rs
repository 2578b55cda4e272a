//! Netlink messages as bytes: what must reach the kernel as one datagram is written here, and what
//! comes back in great number is read here without a copy.
//!
//! Headers and plain integers are in host byte order; what nf_tables keeps in network byte order
//! is written so by its caller. The layout is that of `include/uapi/linux/netlink.h`.

/// Bytes of a `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;
/// Bytes of a `struct nlattr`.
const ATTRIBUTE: usize = 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;
/// `NLA_TYPE_MASK`: without the flags "nested" and "network byte order".
const TYPE_MASK: u16 = 0x3fff;

fn align(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Messages for one datagram.
#[derive(Debug)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
    /// Where the newest message starts.
    newest: usize,
    first_sequence: u32,
    next_sequence: u32,
}

impl Batch {
    /// An empty batch whose messages are numbered from `first_sequence`.
    pub(crate) fn new(first_sequence: u32) -> Self {
        Self {
            bytes: Vec::new(),
            newest: 0,
            first_sequence,
            next_sequence: first_sequence,
        }
    }

    /// Appends a message, whose payload `write` produces.
    pub(crate) fn push(&mut self, kind: u16, flags: u16, write: impl FnOnce(&mut Payload<'_>)) {
        self.newest = self.bytes.len();
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        let flags = flags | libc::NLM_F_REQUEST as u16;
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes
            .extend_from_slice(&self.next_sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&0u32.to_ne_bytes());
        write(&mut Payload(&mut self.bytes));
        let length = (self.bytes.len() - self.newest) as u32;
        self.bytes[self.newest..self.newest + 4].copy_from_slice(&length.to_ne_bytes());
        self.next_sequence = self.next_sequence.wrapping_add(1);
    }

    /// Has the kernel acknowledge the newest message.
    pub(crate) fn acknowledge_newest(&mut self) {
        if let Some(flags) = self.bytes.get_mut(self.newest + 6..self.newest + 8) {
            let wanted = u16::from_ne_bytes([flags[0], flags[1]]) | libc::NLM_F_ACK as u16;
            flags.copy_from_slice(&wanted.to_ne_bytes());
        }
    }

    /// The datagram.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// How many messages it holds.
    pub(crate) fn len(&self) -> u32 {
        self.next_sequence.wrapping_sub(self.first_sequence)
    }

    /// Number of the first message.
    pub(crate) fn first_sequence(&self) -> u32 {
        self.first_sequence
    }
}

/// The payload of a message under construction.
#[derive(Debug)]
pub(crate) struct Payload<'a>(&'a mut Vec<u8>);

impl Payload<'_> {
    /// Appends the fixed part of a message, whose length is a multiple of four.
    pub(crate) fn fixed(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Appends an attribute.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let start = self.open(kind);
        self.0.extend_from_slice(value);
        self.close(start);
    }

    /// Appends an attribute that holds a host-order integer.
    pub(crate) fn u32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    /// Appends an attribute that holds a network-order integer.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// Appends an attribute that holds a network-order integer of eight bytes.
    pub(crate) fn be64(&mut self, kind: u16, value: u64) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// Appends an attribute that holds a NUL-terminated text.
    pub(crate) fn text(&mut self, kind: u16, value: &str) {
        let start = self.open(kind);
        self.0.extend_from_slice(value.as_bytes());
        self.0.push(0);
        self.close(start);
    }

    /// Appends an attribute that holds attributes.
    pub(crate) fn nested(&mut self, kind: u16, write: impl FnOnce(&mut Payload<'_>)) {
        let start = self.open(kind | NESTED);
        write(&mut Payload(self.0));
        self.close(start);
    }

    /// Bytes written to the datagram so far.
    pub(crate) fn written(&self) -> usize {
        self.0.len()
    }

    fn open(&mut self, kind: u16) -> usize {
        let start = self.0.len();
        self.0.extend_from_slice(&0u16.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        start
    }

    fn close(&mut self, start: usize) {
        // An attribute's length has 16 bits; lists that may grow beyond are split by their writer.
        let length = self.0.len() - start;
        debug_assert!(
            length <= usize::from(u16::MAX),
            "attribute of {length} bytes"
        );
        self.0[start..start + 2].copy_from_slice(&(length as u16).to_ne_bytes());
        self.0.resize(start + align(length), 0);
    }
}

/// A message that the kernel sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Message<'a> {
    /// Message type.
    pub(crate) kind: u16,
    /// Header flags.
    pub(crate) flags: u16,
    /// Number of the request that it answers.
    pub(crate) sequence: u32,
    /// All behind the header.
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram, or of several in a row.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(field(bytes, 0)?) as usize;
        let message = Message {
            kind: u16::from_ne_bytes(field(bytes, 4)?),
            flags: u16::from_ne_bytes(field(bytes, 6)?),
            sequence: u32::from_ne_bytes(field(bytes, 8)?),
            payload: bytes.get(HEADER..length)?,
        };
        bytes = bytes.get(align(length)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`, as type (without flags) and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(field(bytes, 0)?));
        let kind = u16::from_ne_bytes(field(bytes, 2)?) & TYPE_MASK;
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(align(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of type `kind` in `bytes`.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(found, value)| (found == kind).then_some(value))
}

/// `N` bytes of `bytes` from `offset`.
pub(crate) fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset + N)?.try_into().ok()
}

/// The text of a NUL-terminated attribute.
pub(crate) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut batch = Batch::new(7);
        batch.push(24, 0x400, |payload| {
            payload.fixed(&[1, 2, 3, 4]);
            payload.text(1, "abc");
            payload.nested(2, |inner| {
                inner.be32(3, 9);
                inner.attribute(4, &[5]);
            });
        });
        batch.push(25, 0, |_| {});
        batch.acknowledge_newest();
        assert_eq!((batch.len(), batch.first_sequence()), (2, 7));

        let read: Vec<_> = messages(batch.bytes()).collect();
        assert_eq!(
            (read[0].kind, read[0].flags, read[0].sequence),
            (24, 0x401, 7)
        );
        assert_eq!((read[1].kind, read[1].flags, read[1].sequence), (25, 5, 8));
        let attrs = &read[0].payload[4..];
        assert_eq!(text(attribute(attrs, 1).unwrap()), "abc");
        let inner = attribute(attrs, 2).unwrap();
        assert_eq!(attribute(inner, 3), Some(&[0, 0, 0, 9][..]));
        assert_eq!(attribute(inner, 4), Some(&[5][..]));
        assert_eq!(attribute(inner, 5), None);
    }

    #[test]
    fn the_wire_form_of_an_attribute() {
        let mut batch = Batch::new(0);
        batch.push(1, 0, |payload| payload.text(6, "lo"));
        let mut wanted = vec![7, 0, 6, 0, b'l', b'o', 0, 0];
        if cfg!(target_endian = "big") {
            wanted[..4].copy_from_slice(&[0, 7, 0, 6]);
        }
        assert_eq!(batch.bytes()[HEADER..], wanted);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            for message in messages(&bytes) {
                attributes(message.payload).for_each(drop);
            }
            attributes(&bytes).for_each(drop);
        }
    }
}

//! The header before what goes through a peer relay (RFC 8926), without options.

/// Bytes of a header.
pub const LEN: usize = 8;

const DISCO: [u8; 2] = [0x7a, 0x11];
const WIREGUARD: [u8; 2] = [0x7a, 0x12];
/// The number has 24 bits.
const MOST: u32 = 0xff_ffff;

/// What follows a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inner {
    /// A disco datagram.
    Disco,
    /// A WireGuard message.
    WireGuard,
}

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What follows.
    pub inner: Inner,
    /// It is for the relay itself, which carries it no further.
    pub control: bool,
    /// Whose datagrams these are (VNI), 24 bits.
    pub number: u32,
}

impl Header {
    /// That of a disco datagram for the node at the other end.
    pub(crate) fn to_peer(number: u32) -> Self {
        Self {
            inner: Inner::Disco,
            control: false,
            number,
        }
    }

    /// That of a disco datagram for the relay itself.
    pub(crate) fn to_relay(number: u32) -> Self {
        Self {
            control: true,
            ..Self::to_peer(number)
        }
    }

    /// Splits a datagram into its header and what follows. `None` for every other datagram: WireGuard's has zeroes
    /// where the kind is, disco's its magic.
    pub fn parse(datagram: &[u8]) -> Option<(Self, &[u8])> {
        let (head, rest) = datagram.split_first_chunk::<LEN>()?;
        let [version, flags, d, e, a, b, c, reserved] = *head;
        // Beside the version are the options' length: none are sent, and none would be understood.
        if version != 0 || flags & 0x3f != 0 || reserved != 0 {
            return None;
        }
        let inner = match [d, e] {
            DISCO => Inner::Disco,
            WIREGUARD => Inner::WireGuard,
            _ => return None,
        };
        let header = Self {
            inner,
            control: flags & 0x80 != 0,
            number: u32::from_be_bytes([0, a, b, c]),
        };
        Some((header, rest))
    }

    /// Its bytes. Of the number only 24 bits go.
    pub fn bytes(&self) -> [u8; LEN] {
        let [d, e] = match self.inner {
            Inner::Disco => DISCO,
            Inner::WireGuard => WIREGUARD,
        };
        let [_, a, b, c] = (self.number & MOST).to_be_bytes();
        [0, u8::from(self.control) << 7, d, e, a, b, c, 0]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bytes_as_go_writes_them() {
        let header = Header {
            inner: Inner::Disco,
            control: true,
            number: 0x01_0203,
        };
        let expected = [0, 0x80, 0x7a, 0x11, 1, 2, 3, 0];
        assert_eq!(header.bytes(), expected);
        let datagram = [&expected[..], b"rest"].concat();
        assert_eq!(Header::parse(&datagram), Some((header, &b"rest"[..])));
    }

    #[test]
    fn other_datagrams_have_none() {
        let good = [0, 0, 0x7a, 0x12, 0, 0, 1, 0];
        assert!(Header::parse(&good).is_some());
        for (at, byte) in [(0, 0x40), (0, 1), (1, 1), (2, 0), (3, 0x13), (7, 1)] {
            let mut other = good;
            other[at] = byte;
            assert_eq!(Header::parse(&other), None, "{other:?}");
        }
        for datagram in [
            &b"TS\xf0\x9f\x92\xac      "[..],
            &[4, 0, 0, 0, 1, 2, 3, 4],
            &good[..7],
        ] {
            assert_eq!(Header::parse(datagram), None);
        }
    }

    proptest! {
        #[test]
        fn what_is_read_is_written_again(bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            if let Some((header, rest)) = Header::parse(&bytes) {
                let head = [&header.bytes()[..], rest].concat();
                // A bit beside the control one means nothing.
                prop_assert_eq!(Header::parse(&head), Some((header, rest)));
            }
        }
    }
}

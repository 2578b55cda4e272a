//! The virtio-net header that precedes each packet on a TUN queue with `IFF_VNET_HDR`
//! (linux/virtio_net.h `struct virtio_net_hdr`; legacy layout, in the machine's byte order).

/// Length of the header in bytes.
pub(crate) const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
/// The first segment carries CWR.
const GSO_ECN: u8 = 0x80;

/// What the kernel is to cut a super-packet into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gso {
    /// Not a super-packet.
    None,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over either.
    Udp,
}

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Kind of super-packet.
    pub(crate) gso: Gso,
    /// Payload bytes of each segment.
    pub(crate) gso_size: u16,
    /// Offset of the transport header whose checksum is to be completed: (start, offset of the
    /// field from there).
    pub(crate) checksum: Option<(u16, u16)>,
}

impl Header {
    /// A packet that is whole.
    pub(crate) const PLAIN: Self = Self {
        gso: Gso::None,
        gso_size: 0,
        checksum: None,
    };

    /// Reads a header; `None` for a kind that this engine never asked for.
    pub(crate) fn decode(bytes: &[u8; LEN]) -> Option<Self> {
        let field = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        let gso = match bytes[1] & !GSO_ECN {
            0 => Gso::None,
            GSO_TCPV4 => Gso::Tcp4,
            GSO_TCPV6 => Gso::Tcp6,
            GSO_UDP_L4 => Gso::Udp,
            _ => return None,
        };
        Some(Self {
            gso,
            gso_size: field(4),
            checksum: (bytes[0] & NEEDS_CSUM != 0).then(|| (field(6), field(8))),
        })
    }

    /// Writes a header. `header_length` is the length of all headers of a super-packet in bytes.
    pub(crate) fn encode(&self, header_length: u16) -> [u8; LEN] {
        let mut bytes = [0u8; LEN];
        bytes[1] = match self.gso {
            Gso::None => 0,
            Gso::Tcp4 => GSO_TCPV4,
            Gso::Tcp6 => GSO_TCPV6,
            Gso::Udp => GSO_UDP_L4,
        };
        if self.gso != Gso::None {
            bytes[2..4].copy_from_slice(&header_length.to_ne_bytes());
            bytes[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        }
        if let Some((start, offset)) = self.checksum {
            bytes[0] = NEEDS_CSUM;
            bytes[6..8].copy_from_slice(&start.to_ne_bytes());
            bytes[8..10].copy_from_slice(&offset.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for gso in [Gso::None, Gso::Tcp4, Gso::Tcp6, Gso::Udp] {
            for checksum in [None, Some((20, 16))] {
                let gso_size = if gso == Gso::None { 0 } else { 1380 };
                let header = Header {
                    gso,
                    gso_size,
                    checksum,
                };
                assert_eq!(Header::decode(&header.encode(40)), Some(header));
            }
        }
    }

    #[test]
    fn ecn_flag_does_not_hide_the_kind_and_unknown_kinds_are_refused() {
        let mut bytes = [0u8; LEN];
        bytes[1] = GSO_TCPV4 | GSO_ECN;
        assert_eq!(Header::decode(&bytes).map(|h| h.gso), Some(Gso::Tcp4));
        bytes[1] = 3;
        assert_eq!(Header::decode(&bytes), None);
    }
}

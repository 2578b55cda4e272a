//! What an IP packet carries, behind whatever headers.

use crate::engine::offload::ip::{V4_HEADER, V6_HEADER};

/// IPv6 headers in front of what they carry (RFC 8200).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
/// Protocol number of the header of a piece.
pub(crate) const FRAGMENT: u8 = 44;
const DESTINATION: u8 = 60;
/// Of these a packet has so many at most.
const HEADERS: usize = 8;
/// Length of the header of a piece in bytes.
pub(crate) const FRAGMENT_HEADER: usize = 8;

/// Flags of an IPv4 header, and the place of a piece in units of 8 bytes.
pub(crate) const DONT_FRAGMENT: u16 = 0x4000;
pub(crate) const MORE: u16 = 0x2000;
pub(crate) const OFFSET: u16 = 0x1fff;

/// One of the pieces of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fragment {
    /// Where it belongs, in units of 8 bytes.
    pub(crate) offset: u16,
    pub(crate) more: bool,
    pub(crate) id: u32,
}

/// What a packet carries, behind all headers that only IPv6 has.
pub(crate) struct Carried {
    pub(crate) protocol: u8,
    pub(crate) start: usize,
    pub(crate) fragment: Option<Fragment>,
}

impl Carried {
    /// Of an IPv6 packet.
    pub(crate) fn of(packet: &[u8]) -> Option<Self> {
        let mut carried = Self {
            protocol: *packet.get(6)?,
            start: V6_HEADER,
            fragment: None,
        };
        for _ in 0..HEADERS {
            let at = carried.start;
            let header = |offset: usize| packet.get(at + offset).copied();
            match carried.protocol {
                ROUTING if header(3)? != 0 => return None,
                HOP_BY_HOP | ROUTING | DESTINATION => {
                    carried.start += (usize::from(header(1)?) + 1) * 8;
                }
                FRAGMENT => {
                    let bytes: &[u8; 8] = packet.get(at..)?.first_chunk()?;
                    let place = u16::from_be_bytes([bytes[2], bytes[3]]);
                    let fragment = Fragment {
                        offset: place >> 3,
                        more: place & 1 != 0,
                        id: u32::from_be_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
                    };
                    carried.start += FRAGMENT_HEADER;
                    carried.protocol = header(0)?;
                    carried.fragment = Some(fragment);
                    if fragment.offset > 0 {
                        break;
                    }
                    continue;
                }
                _ => break,
            }
            carried.protocol = header(0)?;
        }
        let known = !matches!(
            carried.protocol,
            HOP_BY_HOP | ROUTING | DESTINATION | FRAGMENT
        );
        (carried.start <= packet.len() && (known || carried.fragment.is_some())).then_some(carried)
    }

    /// Whether the transport header is in it.
    pub(crate) fn is_first(&self) -> bool {
        self.fragment.is_none_or(|fragment| fragment.offset == 0)
    }

    /// Whether it is but a piece: one that is whole may have a fragment header all the same.
    pub(crate) fn is_piece(&self) -> bool {
        self.fragment
            .is_some_and(|fragment| fragment.offset > 0 || fragment.more)
    }
}

/// The header of an IPv4 packet whose length is right, and where it ends.
pub(crate) fn v4_header(packet: &[u8]) -> Option<(&[u8; V4_HEADER], usize)> {
    let head: &[u8; V4_HEADER] = packet.first_chunk()?;
    let start = usize::from(head[0] & 15) * 4;
    let total = usize::from(u16::from_be_bytes([head[2], head[3]]));
    (head[0] >> 4 == 4 && start >= V4_HEADER && start <= total && total == packet.len())
        .then_some((head, start))
}

//! ICMP errors: type and code on the other side, and the packet that they quote.

use std::net::Ipv4Addr;

use super::sites::Sites;

use crate::engine::offload::carried::{
    Carried, DONT_FRAGMENT, FRAGMENT, FRAGMENT_HEADER, Fragment, MORE, OFFSET,
};
use crate::engine::offload::change::Readdress;
use crate::engine::offload::checksum;
use crate::engine::offload::ip::{ICMP, ICMPV6, V4_HEADER, V6_HEADER};
use crate::engine::offload::write::{both, write_v4, write_v6};
use crate::via::Ends;

/// Bytes in front of the quoted packet.
const HEADER: usize = 8;
/// The longest error in bytes, with its IP header: RFC 4443, and RFC 1812.
const LONGEST_V6: usize = 1280;
const LONGEST_V4: usize = 576;
/// No IPv6 link carries less, in bytes.
const LEAST_MTU: u16 = 1280;

/// An error about what the peer has sent, as IPv6.
pub(super) struct Error {
    /// Without its checksum.
    pub(super) message: Vec<u8>,
    /// The address of the host that the packet was for.
    pub(super) about: [u8; 16],
}

impl Error {
    /// Writes the checksum of the message that is in its packet now.
    pub(super) fn finish(&self, message: &mut [u8], addresses: &[u8; 32]) {
        let pseudo = checksum::pseudo(addresses, ICMPV6, message.len());
        let sum = checksum::finish(checksum::add(pseudo, message));
        if let Some(field) = message.get_mut(2..4) {
            field.copy_from_slice(&sum);
        }
    }
}

/// The error that an ICMP message is, as ICMPv6; `None` for other messages and for what has no sense there. Tables of
/// RFC 7915, section 4.2.
pub(super) fn error_to_v6(message: &[u8], ends: &Ends, sites: &Sites, mtu: usize) -> Option<Error> {
    let (head, quoted) = message.split_first_chunk::<HEADER>()?;
    let number = |value: u32| value.to_be_bytes();
    let ([kind, code], rest) = match (head[0], head[1]) {
        (3, 2) => ([4, 1], number(6)),
        (3, 3) => ([1, 4], number(0)),
        (3, 4) => {
            let told = u16::from_be_bytes([head[6], head[7]]);
            let room = u16::try_from(mtu).unwrap_or(u16::MAX).max(LEAST_MTU);
            let fits = told.saturating_add((V6_HEADER - V4_HEADER) as u16);
            ([2, 0], number(fits.clamp(LEAST_MTU, room).into()))
        }
        (3, 9 | 10 | 13 | 15) => ([1, 1], number(0)),
        (3, 0 | 1 | 5..=8 | 11 | 12) => ([1, 0], number(0)),
        (11, code) => ([3, code], number(0)),
        (12, 0 | 2) => ([4, 0], number(pointer_to_v6(head[4])?)),
        _ => return None,
    };
    let (quoted, about) = quote_to_v6(quoted, ends, sites)?;
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest);
    message.extend(quoted);
    message.truncate(LONGEST_V6 - V6_HEADER);
    Some(Error { message, about })
}

fn pointer_to_v6(pointer: u8) -> Option<u32> {
    Some(match pointer {
        0 => 0,
        1 => 1,
        2 | 3 => 4,
        8 => 7,
        9 => 6,
        12..=15 => 8,
        16..=19 => 24,
        _ => return None,
    })
}

/// The error that an ICMPv6 message of a peer is, as ICMP. Tables of RFC 7915, section 5.2.
pub(super) fn error_to_v4(message: &[u8], ends: &Ends, sites: &Sites) -> Option<Vec<u8>> {
    let (head, quoted) = message.split_first_chunk::<HEADER>()?;
    let number = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
    let ([kind, code], rest) = match (head[0], head[1]) {
        (1, 0 | 2 | 3) => ([3, 1], [0; 4]),
        (1, 1 | 5 | 6) => ([3, 10], [0; 4]),
        (1, 4) => ([3, 3], [0; 4]),
        (2, _) => {
            let less = (V6_HEADER - V4_HEADER) as u32;
            let fits = u16::try_from(number.saturating_sub(less)).unwrap_or(u16::MAX);
            let [a, b] = fits.to_be_bytes();
            ([3, 4], [0, 0, a, b])
        }
        (3, code) => ([11, code], [0; 4]),
        (4, 0) => ([12, 0], [pointer_to_v4(number)?, 0, 0, 0]),
        (4, 1) => ([3, 2], [0; 4]),
        _ => return None,
    };
    let mut message = vec![kind, code, 0, 0];
    message.extend(rest);
    message.extend(quote_to_v4(quoted, ends, sites)?);
    message.truncate(LONGEST_V4 - V4_HEADER);
    let sum = checksum::finish(checksum::add(0, &message));
    message[2..4].copy_from_slice(&sum);
    Some(message)
}

fn pointer_to_v4(pointer: u32) -> Option<u8> {
    Some(match pointer {
        0 => 0,
        1 => 1,
        4 | 5 => 2,
        6 => 9,
        7 => 8,
        8..=23 => 12,
        24..=39 => 16,
        _ => return None,
    })
}

/// What a peer has sent, as it was before it was translated: quoted from a header on, perhaps not whole. With the
/// address that it was for.
fn quote_to_v6(quoted: &[u8], ends: &Ends, sites: &Sites) -> Option<(Vec<u8>, [u8; 16])> {
    let head: &[u8; V4_HEADER] = quoted.first_chunk()?;
    let start = usize::from(head[0] & 15) * 4;
    let total = usize::from(u16::from_be_bytes([head[2], head[3]]));
    let host = Ipv4Addr::new(head[16], head[17], head[18], head[19]);
    let whole = head[0] >> 4 == 4 && (V4_HEADER..=total).contains(&start);
    if !whole || head[12..16] != ends.v4.octets() {
        return None;
    }
    let about = sites.address(host)?;
    let new: [u8; 32] = both(ends.v6.octets(), about);
    let mut transport = quoted.get(start..)?.to_vec();
    let place = u16::from_be_bytes([head[6], head[7]]);
    let is_piece = place & (OFFSET | MORE) != 0;
    let length = total - start;
    let mut protocol = head[9];
    if place & OFFSET == 0 {
        let readdress = Readdress {
            old: &head[12..20],
            new: &new,
            length,
            to_v6: true,
            partial: false,
        };
        protocol = readdress.apply(&mut transport, protocol)?;
    }
    let extra = if is_piece { FRAGMENT_HEADER } else { 0 };
    let length = u16::try_from(length + extra).ok()?;
    let next = if is_piece { FRAGMENT } else { protocol };
    let mut quote = write_v6(head[1], length, next, head[8], &new).to_vec();
    if is_piece {
        let more = u16::from(place & MORE != 0);
        quote.extend([protocol, 0]);
        quote.extend(((place & OFFSET) << 3 | more).to_be_bytes());
        quote.extend([0, 0, head[4], head[5]]);
    }
    quote.append(&mut transport);
    Some((quote, about))
}

/// What a host has sent to the peer, as it was before it was translated.
fn quote_to_v4(quoted: &[u8], ends: &Ends, sites: &Sites) -> Option<Vec<u8>> {
    let head: &[u8; V6_HEADER] = quoted.first_chunk()?;
    if head[0] >> 4 != 6 || head[24..40] != ends.v6.octets() {
        return None;
    }
    let host = sites.served(&head[8..24])?;
    let carried = Carried::of(quoted)?;
    let new: [u8; 8] = both(host.octets(), ends.v4.octets());
    let payload = usize::from(u16::from_be_bytes([head[4], head[5]]));
    let length = payload.checked_sub(carried.start - V6_HEADER)?;
    let mut transport = quoted.get(carried.start..)?.to_vec();
    let mut protocol = carried.protocol;
    if carried.is_first() {
        let readdress = Readdress {
            old: &head[8..40],
            new: &new,
            length,
            to_v6: false,
            partial: false,
        };
        protocol = readdress.apply(&mut transport, protocol)?;
    } else if protocol == ICMPV6 {
        protocol = ICMP;
    }
    let total = u16::try_from(V4_HEADER + length).ok()?;
    let (id, place) = match carried.fragment {
        Some(Fragment { offset, more, id }) => (id as u16, offset | if more { MORE } else { 0 }),
        None => (0, DONT_FRAGMENT),
    };
    let mut quote = vec![0; V4_HEADER];
    let traffic = head[0] << 4 | head[1] >> 4;
    write_v4(
        &mut quote, traffic, total, id, place, head[7], protocol, &new,
    );
    quote.append(&mut transport);
    Some(quote)
}

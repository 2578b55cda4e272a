//! Packets between a peer and the IPv4 hosts of a site, translated (4via6): RFC 7915, in memory.
//!
//! What a peer sends to the IPv6 address of such a host becomes IPv4 from the address that stands for the peer, and
//! what comes back becomes IPv6. Nothing is kept: both ways follow from the two addresses of the peer, and the
//! networks of the sites. The translation is not a hop, for the router is one already, and counts it.
//!
//! Checksums of TCP, UDP and echoes are changed, never made anew, so damage stays visible. Left out is what RFC 7915
//! leaves out: ICMP in fragments, ICMP that has no sense on the other side, source routes.

mod icmp;
pub(crate) mod sites;
#[cfg(test)]
mod tests;

use std::net::Ipv4Addr;

use sites::Sites;

use crate::engine::offload::carried::{
    Carried, DONT_FRAGMENT, FRAGMENT, FRAGMENT_HEADER, Fragment, MORE, OFFSET, v4_header,
};
use crate::engine::offload::change::{Readdress, clamp};
use crate::engine::offload::ip::{ICMP, ICMPV6, UDP, V4_HEADER, V6_HEADER};
use crate::engine::offload::vnet::{self, Gso};
use crate::engine::offload::write::{both, write_v4, write_v6};
use crate::engine::offload::{checksum, segment};
use crate::via::Ends;

/// Up to this length in bytes an IPv4 packet may be cut on its way (RFC 7915, section 5.1): an IPv6 sender makes
/// none that are smaller than 1,280 when it is told to.
const CUT: usize = 1260;

/// Why a packet is not translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It has no form on the other side.
    Shape,
    /// It is too long for the tunnel, and must not be cut. The sender is to be told this MTU in bytes.
    TooBig(u16),
}

/// Translates what the peer of `ends` sends to `host`, in place: the packet is shorter then, and this is its length.
/// `mtu` is the tunnel's in bytes, and `id` what names the packet's fragments if it is cut on the way.
pub(crate) fn to_v4(
    packet: &mut [u8],
    ends: &Ends,
    host: Ipv4Addr,
    sites: &Sites,
    mtu: usize,
    id: u16,
) -> Option<usize> {
    let carried = Carried::of(packet)?;
    let (traffic, hops) = (packet[0] << 4 | packet[1] >> 4, packet[7]);
    let mut old = [0; 32];
    old.copy_from_slice(&packet[8..40]);
    let new = both(ends.v4.octets(), host.octets());
    let mut length = packet.len() - carried.start;
    let mut protocol = carried.protocol;
    if protocol == ICMPV6 && carried.is_piece() {
        return None;
    }
    let error = (protocol == ICMPV6)
        .then(|| icmp::error_to_v4(&packet[carried.start..], ends, sites))
        .flatten();
    if let Some(error) = error {
        length = error.len();
        protocol = ICMP;
        packet
            .get_mut(V4_HEADER..)?
            .get_mut(..length)?
            .copy_from_slice(&error);
    } else {
        if carried.is_first() {
            let readdress = Readdress {
                old: &old,
                new: &new,
                length,
                to_v6: false,
                partial: false,
            };
            let transport = &mut packet[carried.start..];
            clamp(transport, protocol, mss(mtu), false);
            protocol = readdress.apply(transport, protocol)?;
        }
        packet.copy_within(carried.start.., V4_HEADER);
    }
    let total = u16::try_from(V4_HEADER + length).ok()?;
    let (id, place) = match carried.fragment {
        Some(piece) if carried.is_piece() => {
            let more = if piece.more { MORE } else { 0 };
            (piece.id as u16, piece.offset | more)
        }
        _ if usize::from(total) <= CUT => (id, 0),
        _ => (0, DONT_FRAGMENT),
    };
    write_v4(packet, traffic, total, id, place, hops, protocol, &new);
    Some(total.into())
}

/// The largest segment that fits when it is IPv6.
fn mss(mtu: usize) -> u16 {
    u16::try_from(mtu.saturating_sub(V6_HEADER + 20)).unwrap_or(u16::MAX)
}

/// Translates what is sent to the peer of `ends`, as it was read from the TUN device with `header`, into `out`: the
/// packet there, with [`segment::SLACK`] bytes behind it, goes with the header that this gives. One that is longer
/// than `mtu` and no super-packet is to be cut by [`cut`].
pub(crate) fn to_v6(
    header: vnet::Header,
    packet: &[u8],
    ends: &Ends,
    sites: &Sites,
    mtu: usize,
    out: &mut Vec<u8>,
) -> Result<vnet::Header, Refused> {
    let (head, start) = v4_header(packet).ok_or(Refused::Shape)?;
    let place = u16::from_be_bytes([head[6], head[7]]);
    let is_piece = place & (OFFSET | MORE) != 0;
    let is_first = place & OFFSET == 0;
    let payload = &packet[start..];
    let mut protocol = head[9];
    let source = Ipv4Addr::new(head[12], head[13], head[14], head[15]);
    let error = (protocol == ICMP && !is_piece)
        .then(|| icmp::error_to_v6(payload, ends, sites, mtu))
        .flatten();
    let source = match (sites.address(source), &error) {
        (Some(source), _) => source,
        // A router on the way, of whatever network: peers take errors from the host alone.
        (None, Some(error)) => error.about,
        (None, None) => return Err(Refused::Shape),
    };
    let new: [u8; 32] = both(source, ends.v6.octets());
    out.clear();
    let extra = if is_piece { FRAGMENT_HEADER } else { 0 };
    let carried = error.as_ref().map_or(payload, |error| &error.message);
    let length = u16::try_from(carried.len() + extra).map_err(|_| Refused::Shape)?;
    out.extend([0; V6_HEADER]);
    if is_piece {
        let mut fragment = [0; FRAGMENT_HEADER];
        let more = u16::from(place & MORE != 0);
        fragment[2..4].copy_from_slice(&((place & OFFSET) << 3 | more).to_be_bytes());
        fragment[6..8].copy_from_slice(&head[4..6]);
        out.extend(fragment);
    }
    let at = out.len();
    out.extend_from_slice(carried);
    let transport = &mut out[at..];
    let partial = header.checksum.is_some();
    if let Some(error) = error {
        error.finish(transport, &new);
        protocol = ICMPV6;
    } else if protocol == ICMP && is_piece {
        return Err(Refused::Shape);
    } else if is_first {
        clamp(transport, protocol, mss(mtu), partial);
        let readdress = Readdress {
            old: &head[12..20],
            new: &new,
            length: transport.len(),
            to_v6: true,
            partial,
        };
        let without = protocol == UDP && !partial && transport.get(6..8) == Some(&[0, 0]);
        match without {
            // IPv6 has no UDP without a checksum, and of a piece it cannot be told.
            true if is_piece => return Err(Refused::Shape),
            true => complete_udp(transport, &new),
            false => protocol = readdress.apply(transport, protocol).ok_or(Refused::Shape)?,
        }
    }
    let header_of = |next| write_v6(head[1], length, next, head[8], &new);
    if is_piece {
        out[V6_HEADER] = protocol;
        out[..V6_HEADER].copy_from_slice(&header_of(FRAGMENT));
    } else {
        out[..V6_HEADER].copy_from_slice(&header_of(protocol));
    }
    let mut header = vnet::Header {
        gso: match header.gso {
            Gso::Tcp4 | Gso::Tcp6 => Gso::Tcp6,
            other => other,
        },
        checksum: header
            .checksum
            .map(|(_, offset)| (V6_HEADER as u16, offset)),
        ..header
    };
    let told = u16::try_from(mtu - (V6_HEADER - V4_HEADER).min(mtu)).unwrap_or(u16::MAX);
    if header.gso != Gso::None {
        let transport = if header.gso == Gso::Udp {
            8
        } else {
            out.get(at + 12)
                .map_or(20, |byte| usize::from(byte >> 4) * 4)
        };
        if at + transport + usize::from(header.gso_size) > mtu {
            return Err(Refused::TooBig(told));
        }
    } else if out.len() > mtu {
        if place & DONT_FRAGMENT != 0 {
            return Err(Refused::TooBig(told));
        }
        if let Some((start, offset)) = header.checksum.take() {
            segment::complete_checksum(out, start.into(), offset.into())
                .map_err(|_| Refused::Shape)?;
        }
    }
    out.resize(out.len() + segment::SLACK, 0);
    Ok(header)
}

fn complete_udp(datagram: &mut [u8], addresses: &[u8; 32]) {
    let pseudo = checksum::pseudo(addresses, UDP, datagram.len());
    let sum = match checksum::finish(checksum::add(pseudo, datagram)) {
        [0, 0] => [0xff; 2],
        sum => sum,
    };
    datagram[6..8].copy_from_slice(&sum);
}

/// The pieces of an IPv6 packet that [`to_v6`] has made, each of at most `mtu` bytes; `id` names them if they are not
/// pieces already.
pub(crate) fn cut(packet: &[u8], mtu: usize, id: u32) -> Vec<Vec<u8>> {
    let Some(carried) = Carried::of(packet) else {
        return Vec::new();
    };
    let whole = carried.fragment.unwrap_or(Fragment {
        offset: 0,
        more: false,
        id,
    });
    let room = mtu.saturating_sub(V6_HEADER + FRAGMENT_HEADER) & !7;
    let payload = &packet[carried.start..];
    if room == 0 {
        return Vec::new();
    }
    let count = payload.len().div_ceil(room);
    let pieces = payload.chunks(room).enumerate().map(|(at, part)| {
        let mut piece = packet[..V6_HEADER].to_vec();
        let length = (FRAGMENT_HEADER + part.len()) as u16;
        piece[4..6].copy_from_slice(&length.to_be_bytes());
        piece[6] = FRAGMENT;
        let offset = whole.offset + (at * room / 8) as u16;
        let more = u16::from(at + 1 < count || whole.more);
        piece.extend([carried.protocol, 0]);
        piece.extend((offset << 3 | more).to_be_bytes());
        piece.extend(whole.id.to_be_bytes());
        piece.extend_from_slice(part);
        piece
    });
    pieces.collect()
}

/// Tells the sender of an IPv4 packet, in the name of its destination, that only `mtu` bytes fit (RFC 1191).
pub(crate) fn too_big(packet: &[u8], mtu: u16) -> Option<Vec<u8>> {
    /// Bytes of the packet that are quoted (RFC 1812, section 4.3.2.3).
    const QUOTED: usize = 548;
    let (head, _) = v4_header(packet)?;
    let quoted = &packet[..packet.len().min(QUOTED)];
    let mut message = vec![3, 4, 0, 0, 0, 0];
    message.extend(mtu.to_be_bytes());
    message.extend_from_slice(quoted);
    let sum = checksum::finish(checksum::add(0, &message));
    message[2..4].copy_from_slice(&sum);
    let mut answer = vec![0; V4_HEADER];
    answer.append(&mut message);
    let mut addresses = [0; 8];
    addresses[..4].copy_from_slice(&head[16..20]);
    addresses[4..].copy_from_slice(&head[12..16]);
    let total = answer.len() as u16;
    write_v4(&mut answer, 0, total, 0, 0, 64, ICMP, &addresses);
    Some(answer)
}

/// Whether an error may be sent about a packet: not about an error, and not about the later pieces (RFC 1812, section
/// 4.3.2.7).
pub(crate) fn may_be_told(packet: &[u8]) -> bool {
    v4_header(packet).is_some_and(|(head, start)| {
        let is_first = u16::from_be_bytes([head[6], head[7]]) & OFFSET == 0;
        let is_error = head[9] == ICMP
            && packet
                .get(start)
                .is_none_or(|kind| matches!(kind, 3 | 4 | 5 | 11 | 12));
        is_first && !is_error
    })
}

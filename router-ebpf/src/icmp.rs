//! ICMP errors: those about packets of a flow, and those that the programs send themselves.

use crate::abi::{Address, Prefix, Side, Tuple};
use crate::csum::{Delta, fold};
use crate::forward::{Answer, Nat};
use crate::fragment;
use crate::frame::{Bytes, Covers, Frame, MAX_SUM, Sum};
use crate::packet::{
    FRAGMENT_HEADER, ICMP, ICMPV6, IPV6_FRAGMENT, Packet, TCP, Transport, UDP, echo_ports,
};
use crate::route;
use crate::tables::Tables;
use crate::verdict::Verdict;

/// TTL of what the programs send.
pub(crate) const TTL: u8 = 64;
/// Length in bytes of an ICMP error's own header (RFC 792, RFC 4443).
const HEADER: u32 = 8;
/// TOS of ICMP errors: internetwork control (RFC 1812, section 4.3.2.5).
const TOS: u8 = 0xc0;
/// Bytes of the packet that an error quotes at most: the whole error has 576 (RFC 1812, section
/// 4.3.2.3) or 1280 (RFC 4443, section 2.4).
const QUOTE_V4: u32 = 576 - 28;
const QUOTE_V6: u32 = MAX_SUM;

/// The tuple of the packet that the error `packet` quotes; `None` where it is no packet of a flow. `seen_by`
/// is the side whose program has seen it.
#[inline(always)]
fn quote<F: Frame, T: Tables>(
    seen_by: Side,
    packet: &Packet,
    frame: &F,
    tables: &T,
) -> Option<Tuple> {
    let at = packet.transport_at + HEADER;
    let mut tuple = Packet::default().tuple;
    let mut transport_at = at + packet.header_len;
    // Identification and offset of a fragment.
    let (mut id, mut offset) = ([0; 4], 0);
    if packet.is_v4() {
        let Bytes(header) = frame.read::<20>(at)?;
        // Without options.
        if header[0] != 0x45 {
            return None;
        }
        tuple.source.octets[..4].copy_from_slice(&header[12..16]);
        tuple.destination.octets[..4].copy_from_slice(&header[16..20]);
        tuple.protocol = header[9];
        id[2..].copy_from_slice(&header[4..6]);
        offset = u16::from_be_bytes([header[6], header[7]]) & 0x1fff;
    } else {
        let Bytes(header) = frame.read::<40>(at)?;
        if header[0] >> 4 != 6 {
            return None;
        }
        tuple.source = Address::v6([0; 16]);
        tuple.destination = Address::v6([0; 16]);
        tuple.source.octets.copy_from_slice(&header[8..24]);
        tuple.destination.octets.copy_from_slice(&header[24..40]);
        tuple.protocol = header[6];
        if header[6] == IPV6_FRAGMENT {
            let Bytes([next, _, a, b, fragment @ ..]) = frame.read::<8>(transport_at)?;
            tuple.protocol = next;
            id = fragment;
            offset = u16::from_be_bytes([a, b]) & 0xfff8;
            transport_at += FRAGMENT_HEADER;
        }
    }
    if offset != 0 {
        let key = fragment::key(seen_by, &tuple, id);
        tuple.ports = fragment::known(&key, tables)?.ports;
        return Some(tuple);
    }
    // RFC 792 promises eight bytes behind the IP header.
    if packet.len < transport_at + 8 {
        return None;
    }
    let Bytes([a, b, c, d, e, f]) = frame.read::<6>(transport_at)?;
    tuple.ports = match tuple.protocol {
        TCP | UDP => [[a, b], [c, d]],
        protocol => echo_ports(seen_by, protocol, a, [e, f])?,
    };
    Some(tuple)
}

/// Where the transport header of the packet begins that the error `packet` quotes; `None` if it has none,
/// being a later fragment. That packet is one of a flow, see [`quote`].
#[inline(always)]
fn quoted_transport<F: Frame>(packet: &Packet, frame: &F) -> Result<Option<u32>, Verdict> {
    let at = packet.transport_at + HEADER;
    let transport_at = at + packet.header_len;
    let (place, bits, transport_at) = if packet.is_v4() {
        (at + 6, 0x1fff, transport_at)
    } else {
        match frame.read::<1>(at + 6) {
            Some(Bytes([IPV6_FRAGMENT])) => {
                (transport_at + 2, 0xfff8, transport_at + FRAGMENT_HEADER)
            }
            _ => return Ok(Some(transport_at)),
        }
    };
    let Bytes(offset) = frame.read::<2>(place).ok_or(Verdict::DropInternal)?;
    Ok((u16::from_be_bytes(offset) & bits == 0).then_some(transport_at))
}

/// Sets [`Packet::flow`] to the flow that the error `packet` is about, as this side's packets have
/// it. Of a peer only what is about its own flows is believed: it cannot have met another's packets,
/// and the far end would lower the path MTU for all whom the router translates.
#[inline(always)]
pub(crate) fn concerned<F: Frame, T: Tables>(
    side: Side,
    packet: &mut Packet,
    frame: &F,
    tables: &T,
) -> Result<(), Verdict> {
    // A plain number: an `Option` that is read where it is none, Linux 5.10 refuses.
    let mut peer = 0;
    if side == Side::Overlay {
        let Some(sender) = tables.peer(&Prefix::host(packet.tuple.source)) else {
            return Err(Verdict::DropSpoofed);
        };
        peer = sender.peer;
    }
    // The packet came through the other program, the other way.
    match quote(side.other(), packet, frame, tables) {
        Some(quoted) if quoted.source.words() == packet.tuple.destination.words() => {
            if side == Side::Overlay {
                match tables.peer(&Prefix::host(quoted.destination)) {
                    Some(concerned) if concerned.peer == peer => {}
                    _ => return Err(Verdict::DropSpoofed),
                }
            }
            packet.flow = quoted.reversed();
            Ok(())
        }
        _ => Err(route::refuse(side, packet, tables, Verdict::SlowNoFlow)),
    }
}

/// Translates the packet that an error quotes, and accounts for it in the error's checksum, which
/// does not yet know of the outer address.
#[inline(always)]
pub fn translate_quote<F: Frame>(
    side: Side,
    packet: &Packet,
    nat: &Nat,
    frame: &mut F,
) -> Result<(), Verdict> {
    // The flow has the quoted packet's tuple, reversed: no need to read it again.
    let flow = &packet.flow;
    let at = packet.transport_at + HEADER;
    // What went into the subnet has the overlay's end as its source, what came out as its
    // destination.
    let (old, to_source) = match side {
        Side::Subnet => (&flow.destination, true),
        Side::Overlay => (&flow.source, false),
    };
    let addresses = Delta::default().words(old.words(), nat.words());
    let mut whole = addresses;
    if packet.is_v4() {
        let Some(Bytes(checksum)) = frame.read::<2>(at + 10) else {
            return Err(Verdict::DropInternal);
        };
        let new = addresses.apply(checksum);
        whole = whole.word(checksum, new);
        frame.write(at + 10, &Bytes(new), Sum::Kept)?;
        let [a, b, c, d, ..] = nat.address;
        let place = if to_source { at + 12 } else { at + 16 };
        frame.write(place, &Bytes([a, b, c, d]), Sum::Kept)?;
    } else {
        let place = if to_source { at + 8 } else { at + 24 };
        frame.write(place, &Bytes(nat.address), Sum::Kept)?;
    }

    let Some(transport_at) = quoted_transport(packet, frame)? else {
        return frame.replace_checksum(packet.transport_at + 2, whole, Covers::Payload);
    };
    let echo = matches!(flow.protocol, ICMP | ICMPV6);
    let port_at = transport_at
        + if echo {
            4
        } else if to_source {
            0
        } else {
            2
        };
    let Some(Bytes(old_port)) = frame.read::<2>(port_at) else {
        return Err(Verdict::DropInternal);
    };
    let ports = Delta::default().word(old_port, nat.port);
    whole = Delta(whole.0 + ports.0);
    frame.write(port_at, &Bytes(nat.port), Sum::Kept)?;

    // The transport checksum, where the quote reaches so far.
    let (checksum_at, under) = match flow.protocol {
        TCP => (16, Delta(addresses.0 + ports.0)),
        UDP => (6, Delta(addresses.0 + ports.0)),
        ICMPV6 => (2, Delta(addresses.0 + ports.0)),
        _ => (2, ports),
    };
    let checksum_at = transport_at + checksum_at;
    if checksum_at + 2 <= packet.len
        && let Some(Bytes(checksum)) = frame.read::<2>(checksum_at)
        && (flow.protocol != UDP || checksum != [0; 2])
    {
        let new = under.apply(checksum);
        whole = whole.word(checksum, new);
        frame.write(checksum_at, &Bytes(new), Sum::Kept)?;
    }
    frame.replace_checksum(packet.transport_at + 2, whole, Covers::Payload)
}

/// Makes of `frame`, which holds `packet` as it came, the ICMP error about it to its sender, and in
/// the name of its destination; `mtu` in bytes is for [`Answer::TooBig`].
#[inline(always)]
pub(crate) fn error<F: Frame>(
    packet: &Packet,
    answer: Answer,
    mtu: u32,
    frame: &mut F,
) -> Result<(), Verdict> {
    let v4 = packet.is_v4();
    let most = if v4 { QUOTE_V4 } else { QUOTE_V6 };
    // Whole words are summed.
    let quoted = packet.len.min(most) & !3;
    let all = frame.sum(quoted).ok_or(Verdict::DropInternal)?;
    let sum = settle_checksum(packet, quoted, all, frame)?;
    // An error is a plain packet, whatever it is about.
    if frame.len() > quoted || packet.gso_size != 0 {
        frame.trim(quoted)?;
    }
    // Not earlier: the verifier would follow each kind through the sums.
    let kind = kind(answer, v4, mtu);
    if v4 {
        insert_v4(packet, kind, quoted, sum, frame)
    } else {
        insert_v6(packet, kind, quoted, sum, frame)
    }
}

/// Type, code and MTU of an error, in 8, 8 and 16 bits: a function of a program takes five arguments.
/// RFC 792 and RFC 1812, section 5.2.7.1; RFC 4443, section 3.
#[inline(always)]
fn kind(answer: Answer, v4: bool, mtu: u32) -> u32 {
    let number = |kind: u32, code: u32| kind << 24 | code << 16;
    let mtu = mtu & 0xffff;
    match (answer, v4) {
        (Answer::TooBig, true) => number(3, 4) | mtu,
        (Answer::TooBig, false) => number(2, 0) | mtu,
        (Answer::TimeExceeded, true) => number(11, 0),
        (Answer::TimeExceeded, false) => number(3, 0),
        (_, true) => number(3, 13),
        (_, false) => number(1, 1),
    }
}

/// Gives the quoted packet a transport checksum that stays what it is if a device computes it: on many
/// links the packet came without one, with the order to fill it in (CHECKSUM_PARTIAL), and no helper
/// takes that order back. Else the error's own checksum would be wrong in the end. `sum` is that over
/// the `quoted` bytes, before; afterwards it is what is returned. Nobody can verify the checksum of a
/// packet of which a part is quoted.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn settle_checksum<F: Frame>(
    packet: &Packet,
    quoted: u32,
    all: u16,
    frame: &mut F,
) -> Result<u16, Verdict> {
    let at = match packet.transport {
        Transport::Tcp => packet.transport_at + 16,
        Transport::Udp => packet.transport_at + 6,
        _ => return Ok(all),
    };
    let (Some(Bytes(old)), Some(headers)) = (frame.read::<2>(at), frame.sum(packet.transport_at))
    else {
        return Err(Verdict::DropInternal);
    };
    if at + 2 > quoted {
        return Ok(all);
    }
    // The sum over the transport header and what is quoted behind it, without the checksum x. What a
    // device fills in is the complement of that sum and x: so 2 x must be the complement of the sum.
    let old = u32::from(u16::from_ne_bytes(old));
    let rest = u32::from(all) + u32::from(!headers) + u32::from(!(old as u16));
    let twice = u32::from(!fold(rest));
    // 65,535 is what sums are counted by, and odd: so halves are whole numbers too.
    let half = if twice % 2 == 0 {
        twice / 2
    } else {
        (twice + 0xffff) / 2
    };
    frame.write(at, &Bytes((half as u16).to_ne_bytes()), Sum::Changed)?;
    Ok(fold(u32::from(headers) + u32::from(fold(rest)) + half))
}

/// Puts IPv4 and ICMP header of an error about `packet` in front of the `quoted` bytes, whose sum is
/// `sum`; `kind` as [`kind`] tells it.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn insert_v4<F: Frame>(
    packet: &Packet,
    kind: u32,
    quoted: u32,
    sum: u16,
    frame: &mut F,
) -> Result<(), Verdict> {
    let mut bytes = Bytes([0; 28]);
    let header = &mut bytes.0;
    header[0] = 0x45;
    header[1] = TOS;
    header[2..4].copy_from_slice(&((28 + quoted) as u16).to_be_bytes());
    header[8] = TTL;
    header[9] = ICMP;
    header[12..16].copy_from_slice(&packet.tuple.destination.v4_octets());
    header[16..20].copy_from_slice(&packet.tuple.source.v4_octets());
    let [kind, code, mtu_high, mtu_low] = kind.to_be_bytes();
    (header[20], header[21]) = (kind, code);
    (header[26], header[27]) = (mtu_high, mtu_low);
    let (mut ip, mut icmp) = (0, u32::from(sum));
    let mut at = 0;
    while at < 28 {
        let word = u32::from(u16::from_ne_bytes([header[at], header[at + 1]]));
        if at < 20 {
            ip += word;
        } else {
            icmp += word;
        }
        at += 2;
    }
    header[10..12].copy_from_slice(&(!fold(ip)).to_ne_bytes());
    header[22..24].copy_from_slice(&(!fold(icmp)).to_ne_bytes());
    frame.insert(&bytes)
}

/// As [`insert_v4`], with IPv6 and ICMPv6 header.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn insert_v6<F: Frame>(
    packet: &Packet,
    kind: u32,
    quoted: u32,
    sum: u16,
    frame: &mut F,
) -> Result<(), Verdict> {
    let mut bytes = Bytes([0; 48]);
    let header = &mut bytes.0;
    header[0] = 0x60 | TOS >> 4;
    header[4..6].copy_from_slice(&((HEADER + quoted) as u16).to_be_bytes());
    header[6] = ICMPV6;
    header[7] = TTL;
    header[8..24].copy_from_slice(&packet.tuple.destination.octets);
    header[24..40].copy_from_slice(&packet.tuple.source.octets);
    let [kind, code, mtu_high, mtu_low] = kind.to_be_bytes();
    (header[40], header[41]) = (kind, code);
    (header[46], header[47]) = (mtu_high, mtu_low);
    // The pseudo-header has the same addresses, length and protocol (RFC 8200, section 8.1).
    let mut icmp = u32::from(sum) + u32::from(u16::from_ne_bytes([0, ICMPV6]));
    let mut at = 4;
    while at < 48 {
        if at != 6 {
            icmp += u32::from(u16::from_ne_bytes([header[at], header[at + 1]]));
        }
        at += 2;
    }
    header[42..44].copy_from_slice(&(!fold(icmp)).to_ne_bytes());
    frame.insert(&bytes)
}

#[cfg(test)]
mod tests;

//! Carries out a decision on the packet's bytes.

use crate::abi::Side;
use crate::csum::Delta;
use crate::forward::{Exit, Forward, Nat};
use crate::frame::{Bytes, Covers, Frame, Sum};
use crate::packet::{ICMP, Packet, SYN, Transport};
use crate::steps::Steps;
use crate::verdict::Verdict;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// Clamps the MSS, translates, lowers the TTL, cuts link-layer padding and puts the Ethernet header
/// in front. After an error the packet may be half rewritten: it must be dropped. Not for
/// [`Exit::Answer`].
#[inline(always)]
pub fn apply<F: Frame, S: Steps>(
    side: Side,
    packet: &Packet,
    forward: &Forward,
    steps: &S,
    frame: &mut F,
) -> Result<(), S::Stop> {
    // Only of TCP there are flags.
    if packet.tcp_flags & SYN != 0 {
        steps.clamp_mss(side, packet, forward, frame)?;
    }
    if forward.is_translated {
        let nat = &forward.nat;
        if packet.transport == Transport::Error {
            steps.translate_quote(side, packet, nat, frame)?;
        }
        translate_transport(side, packet, nat, frame)?;
    }
    // The kernel lowers the TTL of what it carries itself.
    let ttl = match forward.exit {
        Exit::Stack => packet.ttl,
        _ => packet.ttl.wrapping_sub(1),
    };
    if packet.is_v4() {
        write_v4(side, packet, forward, ttl, frame)?;
    } else {
        write_v6(side, packet, forward, ttl, frame)?;
    }
    if forward.exit == Exit::Stack {
        return Ok(());
    }
    if side == Side::Subnet && packet.has_jumbo_header() {
        // Kernels that put it there take it out when they cut the packet, some as if there were always an
        // Ethernet header in front, which there is none of in the TUN device.
        frame.write(6, &Bytes([packet.tuple.protocol]), Sum::Changed)?;
        return Ok(frame.cut_jumbo_header()?);
    }
    // Ethernet pads to 60 bytes; inside a tunnel the padding would only cost.
    if packet.gso_size == 0 && packet.len < frame.len() {
        frame.trim(packet.len)?;
    }
    if side == Side::Overlay {
        let ethertype = if packet.is_v4() {
            ETHERTYPE_IPV4
        } else {
            ETHERTYPE_IPV6
        };
        let mut header = Bytes([0; 14]);
        // The kernel overwrites the addresses where it finds the neighbour.
        header.0[..12].copy_from_slice(&forward.hardware);
        header.0[12..].copy_from_slice(&ethertype);
        frame.push_ethernet(&header)?;
    }
    Ok(())
}

/// The address that a translation changes, as words.
#[inline(always)]
fn translated(side: Side, packet: &Packet) -> [u32; 4] {
    match side {
        Side::Overlay => packet.tuple.source.words(),
        Side::Subnet => packet.tuple.destination.words(),
    }
}

/// Translates the port, and accounts for address and port in the transport checksum. A later
/// fragment has neither.
#[inline(always)]
fn translate_transport<F: Frame>(
    side: Side,
    packet: &Packet,
    nat: &Nat,
    frame: &mut F,
) -> Result<(), Verdict> {
    let (old_port, port_at) = match side {
        Side::Overlay => (packet.tuple.ports[0], 0),
        Side::Subnet => (packet.tuple.ports[1], 2),
    };
    let (checksum_at, port_at, pseudo, payload) = match packet.transport {
        Transport::Tcp => (16, port_at, Covers::Pseudo, Covers::Payload),
        Transport::Udp => (6, port_at, Covers::UdpPseudo, Covers::UdpPayload),
        Transport::Echo | Transport::Error => (2, 4, Covers::Pseudo, Covers::Payload),
        _ => return Ok(()),
    };
    let checksum_at = packet.transport_at + checksum_at;
    // ICMP of IPv4 has no pseudo-header.
    if packet.tuple.protocol != ICMP {
        let (old, new) = (translated(side, packet), nat.words());
        let delta = if packet.is_v4() {
            Delta::default().words([old[0]], [new[0]])
        } else {
            Delta::default().words(old, new)
        };
        frame.replace_checksum(checksum_at, delta, pseudo)?;
    }
    if old_port == nat.port || packet.transport == Transport::Error {
        return Ok(());
    }
    let delta = Delta::default().word(old_port, nat.port);
    frame.replace_checksum(checksum_at, delta, payload)?;
    frame.write(packet.transport_at + port_at, &Bytes(nat.port), Sum::Kept)
}

/// Writes TTL, header checksum and, if they change, addresses.
#[inline(always)]
fn write_v4<F: Frame>(
    side: Side,
    packet: &Packet,
    forward: &Forward,
    ttl: u8,
    frame: &mut F,
) -> Result<(), Verdict> {
    let protocol = packet.tuple.protocol;
    let delta = Delta::default().word([packet.ttl, protocol], [ttl, protocol]);
    if !forward.is_translated {
        let [high, low] = delta.apply(packet.header_checksum);
        return frame.write_header::<8, 4>(&Bytes([ttl, protocol, high, low]));
    }
    let ([old, ..], [new, ..]) = (translated(side, packet), forward.nat.words());
    let [high, low] = delta.words([old], [new]).apply(packet.header_checksum);
    let [e, f, g, h] = new.to_ne_bytes();
    match side {
        Side::Overlay => {
            let bytes = [ttl, protocol, high, low, e, f, g, h];
            frame.write_header::<8, _>(&Bytes(bytes))
        }
        Side::Subnet => {
            let [i, j, k, l] = packet.tuple.source.v4_octets();
            let bytes = [ttl, protocol, high, low, i, j, k, l, e, f, g, h];
            frame.write_header::<8, _>(&Bytes(bytes))
        }
    }
}

/// Writes the hop limit and, if it changes, the address.
#[inline(always)]
fn write_v6<F: Frame>(
    side: Side,
    packet: &Packet,
    forward: &Forward,
    ttl: u8,
    frame: &mut F,
) -> Result<(), Verdict> {
    // What is beside the hop limit stays, so it may be any byte.
    let mut delta = Delta::default().word([0, packet.ttl], [0, ttl]);
    if forward.is_translated {
        // The transport checksum, mended as a pseudo-header's is, offsets what this adds to a sum
        // over the whole packet.
        let address = Bytes(forward.nat.address);
        delta = delta.words(translated(side, packet), forward.nat.words());
        match side {
            Side::Overlay => frame.write_header::<8, _>(&address)?,
            Side::Subnet => frame.write_header::<24, _>(&address)?,
        }
    }
    frame.write_header::<7, _>(&Bytes([ttl]))?;
    frame.change_sum(delta);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::abi::Settings;
    use crate::csum::tests::sum;
    use crate::memory::Memory;
    use crate::packet::parse;
    use crate::world::World;
    use proptest::prelude::*;

    const MACS: [u8; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

    fn carried(side: Side, mut frame: Memory, forward: &Forward) -> Vec<u8> {
        let mut packet = Packet::default();
        parse(side, &frame, &mut packet).unwrap();
        let world = World::new(Settings::default());
        apply(side, &packet, forward, &world.view(side), &mut frame).unwrap();
        frame.bytes
    }

    fn onto_ethernet() -> Forward {
        Forward {
            exit: Exit::Ethernet,
            hardware: MACS,
            ..Forward::default()
        }
    }

    fn v4(ttl: u8, id: [u8; 2], payload: &[u8]) -> Vec<u8> {
        let len = (20 + payload.len()) as u16;
        let mut bytes = vec![0x45, 0];
        bytes.extend(len.to_be_bytes());
        bytes.extend([
            id[0], id[1], 0x40, 0, ttl, 1, 0, 0, 100, 64, 0, 2, 10, 0, 0, 2,
        ]);
        let checksum = (!sum(&bytes)).to_be_bytes();
        bytes[10..12].copy_from_slice(&checksum);
        bytes.extend(payload);
        bytes
    }

    proptest! {
        #[test]
        fn the_header_checksum_follows_the_ttl(ttl in 2..=255_u8, id: [u8; 2]) {
            let frame = Memory::new(Side::Overlay, v4(ttl, id, &[0; 8]), 0);
            let out = carried(Side::Overlay, frame, &onto_ethernet());
            prop_assert_eq!(&out[14..], &v4(ttl - 1, id, &[0; 8]));
        }
    }

    #[test]
    fn only_the_hop_limit_of_ipv6_changes() {
        let mut bytes = vec![0x60, 0, 0, 0, 0, 8, 58, 2];
        bytes.extend([1; 32]);
        bytes.extend([9; 8]);
        let frame = Memory::new(Side::Overlay, bytes.clone(), 0);
        bytes[7] = 1;
        let wanted = [&MACS[..], &ETHERTYPE_IPV6, &bytes].concat();
        assert_eq!(carried(Side::Overlay, frame, &onto_ethernet()), wanted);
    }

    #[test]
    fn padding_is_cut_off_plain_packets() {
        let packet_bytes = v4(9, [0; 2], &[1; 8]);
        let padded = [&[0; 14][..], &packet_bytes, &[0; 18]].concat();
        let out = |gso_size| {
            let frame = Memory::new(Side::Subnet, padded.clone(), gso_size);
            carried(Side::Subnet, frame, &Forward::default())
        };
        assert_eq!(out(0).len(), 14 + packet_bytes.len());
        assert_eq!(out(500).len(), padded.len());
    }
}

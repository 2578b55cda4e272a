//! There and back, beside packets that are built by hand.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv6Addr};

use proptest::prelude::*;

use super::*;
use crate::engine::offload::ip::{TCP, Transport};
use crate::engine::offload::segment::{SLACK, Segments};
use crate::engine::packets::rfc1071;
use crate::via::ViaNet;
use crate::wireguard::Packets as _;

const MTU: usize = 1280;
const SYN: u8 = 2;
const ACK: u8 = 16;

fn ends() -> Ends {
    Ends {
        v6: "fd7a:115c:a1e0::7".parse().unwrap(),
        v4: "198.18.3.4".parse().unwrap(),
    }
}

fn host() -> Ipv4Addr {
    "10.1.2.3".parse().unwrap()
}

fn sites() -> Sites {
    let net = |site, net: &str| ViaNet {
        site,
        net: net.parse().unwrap(),
    };
    Sites::new([net(7, "10.1.0.0/16"), net(8, "10.1.9.0/24")])
}

fn via_host() -> Ipv6Addr {
    crate::via::address(7, host())
}

/// An IP packet around a transport header and its payload, whose checksum at `field` is made.
fn around(
    from: IpAddr,
    to: IpAddr,
    next: u8,
    tos: u8,
    hops: u8,
    mut carried: Vec<u8>,
    field: Option<usize>,
) -> Vec<u8> {
    let length = carried.len() as u16;
    let (mut packet, addresses) = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let mut packet = vec![0; 20];
            let mut both = from.octets().to_vec();
            both.extend(to.octets());
            packet[0] = 0x45;
            packet[1] = tos;
            packet[2..4].copy_from_slice(&(20 + length).to_be_bytes());
            packet[8] = hops;
            packet[9] = next;
            packet[12..].copy_from_slice(&both);
            let sum = rfc1071(&packet);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            (packet, both)
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let mut packet = vec![0x60 | tos >> 4, tos << 4, 0, 0];
            packet.extend(length.to_be_bytes());
            packet.extend([next, hops]);
            packet.extend(from.octets());
            packet.extend(to.octets());
            let both = packet[8..].to_vec();
            (packet, both)
        }
        _ => unreachable!(),
    };
    if let Some(field) = field {
        let mut summed = Vec::new();
        if next != ICMP {
            summed.extend(addresses);
            summed.extend(u32::from(length).to_be_bytes());
            summed.extend([0, 0, 0, next]);
        }
        carried[field..field + 2].fill(0);
        summed.extend(&carried);
        let sum = match rfc1071(&summed) {
            0 if next == UDP => 0xffff,
            sum => sum,
        };
        carried[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }
    packet.append(&mut carried);
    packet
}

fn tcp(ports: (u16, u16), flags: u8, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(ports.0.to_be_bytes());
    out.extend(ports.1.to_be_bytes());
    out.extend([0, 0, 1, 0, 0, 0, 2, 0]);
    out.extend([
        ((20 + options.len()) as u8 / 4) << 4,
        flags,
        1,
        0,
        0,
        0,
        0,
        0,
    ]);
    out.extend(options);
    out.extend(payload);
    out
}

fn udp(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(ports.0.to_be_bytes());
    out.extend(ports.1.to_be_bytes());
    out.extend((8 + payload.len() as u16).to_be_bytes());
    out.extend([0, 0]);
    out.extend(payload);
    out
}

/// What a peer sends to the host.
fn up(next: u8, carried: Vec<u8>, field: Option<usize>) -> Vec<u8> {
    around(
        ends().v6.into(),
        via_host().into(),
        next,
        0x2e,
        60,
        carried,
        field,
    )
}

/// What the host sends back.
fn down(next: u8, carried: Vec<u8>, field: Option<usize>) -> Vec<u8> {
    around(
        host().into(),
        ends().v4.into(),
        next,
        0x2e,
        60,
        carried,
        field,
    )
}

fn translated_up(packet: &[u8]) -> Option<Vec<u8>> {
    let mut packet = packet.to_vec();
    let host = sites().host(&packet)?;
    let length = to_v4(&mut packet, &ends(), host, &sites(), MTU, 5)?;
    packet.truncate(length);
    Some(packet)
}

fn translated_down(packet: &[u8]) -> Result<Vec<u8>, Refused> {
    let mut out = Vec::new();
    to_v6(
        vnet::Header::PLAIN,
        packet,
        &ends(),
        &sites(),
        MTU,
        &mut out,
    )?;
    out.truncate(out.len() - SLACK);
    Ok(out)
}

/// A packet with its name and "don't fragment" as in another, which are the translator's own choice.
fn named_as(mut packet: Vec<u8>, other: &[u8]) -> Vec<u8> {
    packet[4..8].copy_from_slice(&other[4..8]);
    packet[10..12].fill(0);
    let sum = rfc1071(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Zero and minus zero are one in a checksum.
fn same(a: &[u8], b: &[u8], field: usize) -> bool {
    let masked = |packet: &[u8]| {
        let mut packet = packet.to_vec();
        if packet[field..field + 2] == [0xff; 2] {
            packet[field..field + 2].fill(0);
        }
        packet
    };
    masked(a) == masked(b)
}

proptest! {
    #[test]
    fn what_a_peer_sends_is_what_an_ipv4_sender_would_have_sent(
        is_tcp: bool,
        ports: (u16, u16),
        payload in proptest::collection::vec(any::<u8>(), 0..1200),
    ) {
        let (next, field) = if is_tcp { (TCP, 16) } else { (UDP, 6) };
        let carried = if is_tcp { tcp(ports, ACK, &[], &payload) } else { udp(ports, &payload) };
        let packet = up(next, carried.clone(), Some(field));
        let out = translated_up(&packet).unwrap();
        let wanted = around(ends().v4.into(), host().into(), next, 0x2e, 60, carried, Some(field));
        let wanted = named_as(wanted, &out);
        prop_assert!(same(&out, &wanted, 20 + field));
        prop_assert!(Transport::parse(&out).unwrap().checksums_hold(&out));
    }

    #[test]
    fn what_comes_back_is_what_an_ipv6_host_would_have_sent(
        is_tcp: bool,
        ports: (u16, u16),
        payload in proptest::collection::vec(any::<u8>(), 0..1200),
    ) {
        let (next, field) = if is_tcp { (TCP, 16) } else { (UDP, 6) };
        let carried = if is_tcp { tcp(ports, ACK, &[], &payload) } else { udp(ports, &payload) };
        let packet = down(next, carried.clone(), Some(field));
        let out = translated_down(&packet).unwrap();
        let wanted = around(via_host().into(), ends().v6.into(), next, 0x2e, 60, carried, Some(field));
        prop_assert!(same(&out, &wanted, 40 + field));
        prop_assert!(Transport::parse(&out).unwrap().checksums_hold(&out));
    }

    #[test]
    fn super_packets_are_cut_into_right_ipv6(
        is_tcp: bool,
        payload in proptest::collection::vec(any::<u8>(), 1500..8000),
        size in 400u16..1200,
    ) {
        let (next, start, offset) = if is_tcp { (TCP, 20, 16) } else { (UDP, 20, 6) };
        let carried = if is_tcp { tcp((1, 2), ACK, &[], &payload) } else { udp((1, 2), &payload) };
        let packet = down(next, carried, None);
        let header = vnet::Header {
            gso: if is_tcp { Gso::Tcp4 } else { Gso::Udp },
            gso_size: size,
            checksum: Some((start, offset)),
        };
        let mut out = Vec::new();
        let header = to_v6(header, &packet, &ends(), &sites(), MTU, &mut out).unwrap();
        let length = out.len() - SLACK;
        let mut segments = Segments::new(header, &mut out, length, 0).unwrap();
        let mut received: Vec<u8> = Vec::new();
        while let Some(segment) = segments.next() {
            prop_assert!(segment.len() <= MTU);
            let transport = Transport::parse(segment).unwrap();
            prop_assert!(transport.checksums_hold(segment) && !transport.is_v4());
            received.extend(&segment[transport.payload..]);
        }
        prop_assert_eq!(received, payload);
    }

    #[test]
    fn pieces_come_out_as_pieces_and_make_up_the_whole(
        payload in proptest::collection::vec(any::<u8>(), 1300..4000),
    ) {
        // Down: one long packet that may be cut.
        let packet = down(UDP, udp((1, 2), &payload), Some(6));
        let whole = translated_down(&packet).unwrap();
        let mut joined: Vec<u8> = Vec::new();
        let pieces = cut(&whole, MTU, 9);
        for piece in &pieces {
            prop_assert!(piece.len() <= MTU);
            let carried = Carried::of(piece).unwrap();
            let fragment = carried.fragment.unwrap();
            prop_assert_eq!(usize::from(fragment.offset) * 8, joined.len());
            prop_assert_eq!((fragment.id, carried.protocol), (9, UDP));
            joined.extend(&piece[carried.start..]);
            prop_assert_eq!(fragment.more, joined.len() < whole.len() - V6_HEADER);
        }
        prop_assert_eq!(&joined[..], &whole[V6_HEADER..]);

        // Up: the same as pieces of the peer's.
        let whole = up(UDP, udp((1, 2), &payload), Some(6));
        let mut joined: Vec<u8> = Vec::new();
        for piece in cut(&whole, MTU, 0x1_0009) {
            let out = translated_up(&piece).unwrap();
            let place = u16::from_be_bytes([out[6], out[7]]);
            prop_assert_eq!(usize::from(place & OFFSET) * 8, joined.len());
            prop_assert_eq!(out[4..6].to_vec(), vec![0, 9]);
            joined.extend(&out[V4_HEADER..]);
            prop_assert_eq!(place & MORE != 0, joined.len() < whole.len() - V6_HEADER);
        }
        let mut wanted = around(ends().v4.into(), host().into(), UDP, 0, 0, udp((1, 2), &payload), Some(6));
        wanted.drain(..V4_HEADER);
        prop_assert!(same(&joined, &wanted, 6));
    }

    #[test]
    fn nonsense_is_refused_without_panic(
        mut packet in proptest::collection::vec(any::<u8>(), 0..400),
        next in prop_oneof![Just(0u8), Just(43), Just(44), Just(60), Just(58), Just(1), Just(6), Just(17), any::<u8>()],
        kind: u8,
        checksum in proptest::option::of((0u16..100, 0u16..30)),
        gso in 0u8..4,
        gso_size: u16,
        mtu in 0usize..1500,
        right: bool,
    ) {
        let gso = [Gso::None, Gso::Tcp4, Gso::Tcp6, Gso::Udp][usize::from(gso)];
        let header = vnet::Header { gso, gso_size, checksum };
        let mut v6 = packet.clone();
        if v6.len() >= 40 {
            v6[0] = 0x60;
            v6[6] = next;
            v6[8..24].copy_from_slice(&ends().v6.octets());
            v6[24..40].copy_from_slice(&via_host().octets());
            if let Some(byte) = v6.get_mut(40) {
                *byte = kind;
            }
        }
        if let Some(host) = sites().host(&v6) {
            let _ = to_v4(&mut v6, &ends(), host, &sites(), mtu, 1);
        }
        if packet.len() >= 20 {
            packet[0] = 0x45;
            packet[9] = next;
            if right {
                let length = packet.len() as u16;
                packet[2..4].copy_from_slice(&length.to_be_bytes());
                packet[6] &= 0x40;
                packet[12..16].copy_from_slice(&host().octets());
            }
        }
        let mut out = Vec::new();
        if to_v6(header, &packet, &ends(), &sites(), mtu, &mut out).is_ok() {
            let length = out.len() - SLACK;
            cut(&out[..length], mtu, 1);
        }
        let _ = (too_big(&packet, 1260), may_be_told(&packet));
    }
}

#[test]
fn echoes_go_there_and_back() {
    let echo = |kind: u8| vec![kind, 0, 0, 0, 0, 7, 0, 1, b'a', b'b', b'c'];
    let out = translated_up(&up(ICMPV6, echo(128), Some(2))).unwrap();
    let wanted = around(
        ends().v4.into(),
        host().into(),
        ICMP,
        0x2e,
        60,
        echo(8),
        Some(2),
    );
    assert_eq!(out, named_as(wanted, &out));
    let back = translated_down(&down(ICMP, echo(0), Some(2))).unwrap();
    let wanted = around(
        via_host().into(),
        ends().v6.into(),
        ICMPV6,
        0x2e,
        60,
        echo(129),
        Some(2),
    );
    assert_eq!(back, wanted);
    // A router solicitation, and a timestamp.
    assert_eq!(translated_up(&up(ICMPV6, echo(133), Some(2))), None);
    assert_eq!(
        translated_down(&down(ICMP, echo(13), Some(2))),
        Err(Refused::Shape)
    );
}

#[test]
fn an_error_quotes_what_the_peer_has_sent() {
    let sent = up(UDP, udp((40_000, 53), b"question"), Some(6));
    let seen = translated_up(&sent).unwrap();
    for (from, kind, rest, wanted) in [
        // The host itself.
        (host(), [3, 3], [0; 4], ([1, 4], 0)),
        // Routers on the way, of networks that are no site's: in the host's name.
        (Ipv4Addr::new(192, 168, 0, 1), [11, 0], [0; 4], ([3, 0], 0)),
        (
            Ipv4Addr::new(192, 168, 0, 1),
            [3, 4],
            [0, 0, 0x04, 0xb0],
            ([2, 0], 1280),
        ),
        (Ipv4Addr::new(192, 168, 0, 1), [3, 13], [0; 4], ([1, 1], 0)),
    ] {
        let mut error = kind.to_vec();
        error.extend([0, 0]);
        error.extend(rest);
        error.extend(&seen);
        let packet = around(from.into(), ends().v4.into(), ICMP, 0, 60, error, Some(2));
        let out = translated_down(&packet).unwrap();
        let mut message = wanted.0.to_vec();
        message.extend([0, 0]);
        message.extend(u32::to_be_bytes(wanted.1));
        message.extend(&sent);
        let wanted = around(
            via_host().into(),
            ends().v6.into(),
            ICMPV6,
            0,
            60,
            message,
            Some(2),
        );
        assert_eq!(out, wanted, "{kind:?}");
    }
    // About what somebody else has sent.
    let mut error = vec![3, 3, 0, 0, 0, 0, 0, 0];
    error.extend(around(
        host().into(),
        host().into(),
        UDP,
        0,
        60,
        udp((1, 2), b""),
        Some(6),
    ));
    let packet = around(host().into(), ends().v4.into(), ICMP, 0, 60, error, Some(2));
    assert_eq!(translated_down(&packet), Err(Refused::Shape));
}

#[test]
fn an_error_of_the_peer_quotes_what_the_host_has_sent() {
    let sent = down(UDP, udp((53, 40_000), b"answer"), Some(6));
    let sent = named_as(sent, &[0, 0, 0, 0, 0, 0, 0x40, 0]);
    let seen = translated_down(&sent).unwrap();
    for (kind, number, wanted, rest) in [
        ([1, 4], 0, [3, 3], [0; 4]),
        ([2, 0], 1280, [3, 4], [0, 0, 0x04, 0xec]),
    ] {
        let mut error = kind.to_vec();
        error.extend([0, 0]);
        error.extend(u32::to_be_bytes(number));
        error.extend(&seen);
        let out = translated_up(&up(ICMPV6, error, Some(2))).unwrap();
        let mut message = wanted.to_vec();
        message.extend([0, 0]);
        message.extend(rest);
        message.extend(&sent);
        let wanted = around(
            ends().v4.into(),
            host().into(),
            ICMP,
            0x2e,
            60,
            message,
            Some(2),
        );
        assert_eq!(out, named_as(wanted, &out), "{kind:?}");
    }
}

#[test]
fn the_mss_fits_the_tunnel_in_ipv6() {
    for (options, wanted) in [
        (&[2, 4, 0x05, 0xb4][..], Some([0x04, 0xc4])),
        (&[1, 2, 4, 0x05, 0xb4, 1, 1, 0][..], Some([0x04, 0xc4])),
        (&[2, 4, 0x02, 0x18][..], Some([0x02, 0x18])),
        (&[1, 1, 1, 0][..], None),
    ] {
        let at = options.iter().position(|byte| *byte == 2);
        let up = translated_up(&up(TCP, tcp((1, 2), SYN, options, &[]), Some(16))).unwrap();
        let down =
            translated_down(&down(TCP, tcp((1, 2), SYN | ACK, options, &[]), Some(16))).unwrap();
        for (packet, header) in [(up, V4_HEADER), (down, V6_HEADER)] {
            assert!(Transport::parse(&packet).unwrap().checksums_hold(&packet));
            let value = at.map(|at| [packet[header + 22 + at], packet[header + 23 + at]]);
            assert_eq!(value, wanted);
        }
    }
}

#[test]
fn what_is_too_long_and_must_not_be_cut_is_told() {
    let mut packet = down(UDP, udp((1, 2), &[0; 1250]), Some(6));
    packet = named_as(packet, &[0, 0, 0, 0, 0, 0, 0x40, 0]);
    assert_eq!(translated_down(&packet), Err(Refused::TooBig(1260)));
    let told = too_big(&packet, 1260).unwrap();
    assert_eq!(told[12..20], [198, 18, 3, 4, 10, 1, 2, 3]);
    assert_eq!((told[20], told[21], told[26], told[27]), (3, 4, 0x04, 0xec));
    assert_eq!((rfc1071(&told[..20]), rfc1071(&told[20..])), (0, 0));
    assert_eq!(told[28..], packet[..told.len() - 28]);
    assert!(may_be_told(&packet) && !may_be_told(&told));
    let header = vnet::Header {
        gso: Gso::Tcp4,
        gso_size: 1240,
        checksum: Some((20, 16)),
    };
    let packet = down(TCP, tcp((1, 2), ACK, &[], &[0; 5000]), None);
    let mut out = Vec::new();
    let done = to_v6(header, &packet, &ends(), &sites(), MTU, &mut out);
    assert_eq!(done, Err(Refused::TooBig(1260)));
}

#[test]
fn a_datagram_without_checksum_gets_one() {
    let packet = down(UDP, udp((1, 2), b"bare"), None);
    let out = translated_down(&packet).unwrap();
    assert!(Transport::parse(&out).unwrap().checksums_hold(&out));
}

#[test]
fn headers_that_ipv4_does_not_have_are_left_out() {
    let datagram = udp((1, 2), b"optional");
    let plain = up(UDP, datagram, Some(6));
    let mut packet = plain.clone();
    packet[6] = 0;
    packet.splice(40..40, [60, 0, 1, 4, 0, 0, 0, 0, UDP, 0, 1, 4, 0, 0, 0, 0]);
    packet[5] += 16;
    assert_eq!(translated_up(&packet), translated_up(&plain));
    // A route that is not at its end.
    packet[6] = 43;
    packet[40..48].copy_from_slice(&[UDP, 1, 4, 1, 0, 0, 0, 0]);
    assert_eq!(translated_up(&packet), None);
}

#[test]
fn only_hosts_of_the_sites_are_served() {
    let host = |site, host: &str| {
        let mut packet = vec![0x60; 40];
        let address = crate::via::address(site, host.parse().unwrap());
        packet[24..].copy_from_slice(&address.octets());
        sites().host(&packet).map(|host| host.to_string())
    };
    assert_eq!(host(7, "10.1.2.3"), Some("10.1.2.3".to_owned()));
    assert_eq!(host(8, "10.1.9.3"), Some("10.1.9.3".to_owned()));
    assert_eq!(
        host(7, "10.1.9.3"),
        None,
        "the longer prefix is another site's"
    );
    assert_eq!(host(9, "10.1.2.3"), None);
    assert_eq!(host(7, "10.2.0.1"), None);
    let everything = ViaNet {
        site: 1,
        net: "0.0.0.0/1".parse().unwrap(),
    };
    let mut packet = vec![0x60; 40];
    packet[24..].copy_from_slice(&crate::via::address(1, Ipv4Addr::LOCALHOST).octets());
    assert_eq!(Sites::new([everything]).host(&packet), None);
}

#[test]
fn an_address_is_changed_with_all_checksums() {
    let (own, known): (IpAddr, IpAddr) = (host().into(), "100.100.1.1".parse().unwrap());
    let packet = |to| {
        around(
            ends().v4.into(),
            to,
            TCP,
            0,
            60,
            tcp((1, 2), ACK, &[], b"abc"),
            Some(16),
        )
    };
    use crate::engine::offload::readdress::readdress;
    let mut changed = packet(known);
    readdress(&mut changed, false, &host().octets(), false).unwrap();
    assert!(same(&changed, &packet(own), 36));
    let v6 = |from: Ipv6Addr| {
        around(
            from.into(),
            ends().v6.into(),
            ICMPV6,
            0,
            60,
            vec![128, 0, 0, 0, 1, 2, 3, 4],
            Some(2),
        )
    };
    let mut changed = v6(via_host());
    readdress(&mut changed, true, &ends().v6.octets(), false).unwrap();
    assert_eq!(changed, v6(ends().v6));
}

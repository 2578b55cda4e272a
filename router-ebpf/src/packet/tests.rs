#![allow(clippy::unwrap_used)]
use super::*;
use crate::abi::Side;
use crate::memory::Memory;
use proptest::prelude::*;

fn read(bytes: &[u8]) -> Result<Packet, Verdict> {
    let mut packet = Packet::default();
    let frame = Memory::new(Side::Overlay, bytes.to_vec(), 0);
    parse(Side::Overlay, &frame, &mut packet).map(|()| packet)
}

const TCP_V4: [u8; 40] = [
    0x45, 0x02, 0, 40, 1, 2, 0x40, 0, 64, 6, 0xab, 0xcd, 10, 0, 0, 1, 10, 0, 0, 2, //
    0x9c, 0x40, 0x01, 0xbb, 0, 0, 0, 3, 0, 0, 0, 4, 0x50, 0x12, 0, 0, 0, 0, 0, 0,
];

#[test]
fn the_fields_of_a_tcp_segment() {
    let packet = read(&TCP_V4).unwrap();
    let wanted = Packet {
        tuple: Tuple {
            source: Address::v4([10, 0, 0, 1]),
            destination: Address::v4([10, 0, 0, 2]),
            ports: [[0x9c, 0x40], [0x01, 0xbb]],
            protocol: TCP,
        },
        first_word: [0x45, 2, 0, 40],
        header_checksum: [0xab, 0xcd],
        ttl: 64,
        id: [0, 0, 1, 2],
        header_len: 20,
        transport_at: 20,
        len: 40,
        transport: Transport::Tcp,
        tcp_flags: 0x12,
        sequence: [3, 4],
        transport_len: 20,
        ..Packet::default()
    };
    assert_eq!(packet, wanted);
}

#[test]
fn the_same_over_ipv6() {
    let mut bytes = vec![0x6a, 0xbc, 0xde, 0xf0, 0, 20, 6, 63];
    bytes.extend([1; 16]);
    bytes.extend([2; 16]);
    bytes.extend(&TCP_V4[20..]);
    let packet = read(&bytes).unwrap();
    let over_v4 = read(&TCP_V4).unwrap();
    let wanted = Packet {
        tuple: Tuple {
            source: Address::v6([1; 16]),
            destination: Address::v6([2; 16]),
            ..over_v4.tuple
        },
        first_word: [0x6a, 0xbc, 0xde, 0xf0],
        header_checksum: [0; 2],
        ttl: 63,
        id: [0; 4],
        header_len: 40,
        transport_at: 40,
        len: 60,
        ..over_v4
    };
    assert_eq!(packet, wanted);
}

#[test]
fn padding_is_no_part_of_the_packet() {
    let mut padded = TCP_V4.to_vec();
    padded.extend([0; 6]);
    assert_eq!(read(&padded), read(&TCP_V4));
}

#[test]
fn what_is_no_whole_packet() {
    assert_eq!(read(&[]), Err(Verdict::DropMalformed));
    assert_eq!(read(&TCP_V4[..39]), Err(Verdict::DropMalformed));
    for (at, value) in [
        (0, 0x44),
        (0, 0x55),
        (0, 0x05),
        (3, 19),
        (0, 0x4f),
        (0, 0x65),
    ] {
        let mut bytes = TCP_V4;
        bytes[at] = value;
        assert_eq!(read(&bytes), Err(Verdict::DropMalformed), "{at} {value}");
    }
}

#[test]
fn a_super_packet_is_judged_by_its_segments() {
    let mut packet = read(&TCP_V4).unwrap();
    assert_eq!(packet.segment_len(), 40);
    packet.gso_size = 1380;
    packet.transport_len = 32;
    assert_eq!(packet.segment_len(), 20 + 32 + 1380);
}

proptest! {
    #[test]
    fn any_bytes_are_judged_without_a_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..120),
        version in prop::sample::select(vec![0x45_u8, 0x46, 0x60, 0x00]),
        gso_size: u32,
    ) {
        if let Some(first) = bytes.first_mut() {
            *first = version;
        }
        let frame = Memory::new(Side::Overlay, bytes.clone(), gso_size);
        let mut packet = Packet::default();
        if parse(Side::Overlay, &frame, &mut packet).is_ok() {
            prop_assert!(packet.len as usize <= bytes.len());
            prop_assert!(packet.header_len <= packet.len);
            if let Transport::Tcp | Transport::Udp | Transport::Echo = packet.transport {
                prop_assert!(packet.transport_at + packet.transport_len <= packet.len);
            }
        }
    }
}

/// BIG TCP: the length in the IP header is zero, and older kernels put a hop-by-hop header into IPv6.
#[test]
fn a_super_packet_above_64_kib_is_as_long_as_it_is() {
    use crate::abi::Settings;
    use crate::craft::{ACK, Ip, frame};
    use crate::forward::Forward;
    use crate::rewrite;
    use crate::world::World;
    for (v4, jumbo) in [(true, false), (false, false), (false, true)] {
        let [source, destination]: [std::net::IpAddr; 2] = if v4 {
            [[10, 0, 0, 2].into(), [100, 64, 0, 2].into()]
        } else {
            ["2001:db8::2", "fd64::2"].map(|text| text.parse().unwrap())
        };
        let segment = Ip::tcp(source, destination, ACK, &[], 1380);
        let headers = if v4 { 40 } else { 60 };
        let mut wanted = segment.bytes();
        let length = if v4 { 2..4 } else { 4..6 };
        wanted[length].fill(0);
        wanted.resize(headers + 50 * 1380, 7);
        let mut sent = wanted.clone();
        if jumbo {
            sent[6] = 0;
            sent.splice(40..40, [6, 0, 0xc2, 4, 0, 1, 0x10, 0]);
        }
        let bytes = frame([2; 6], [4; 6], &sent);
        let mut packet = Packet::default();
        let mut memory = Memory::new(Side::Subnet, bytes, 1380);
        parse(Side::Subnet, &memory, &mut packet).unwrap();
        assert_eq!(packet.transport, Transport::Tcp);
        assert_eq!(packet.tuple.ports, [[0x9c, 0x40], [0x01, 0xbb]]);
        assert_eq!(packet.len as usize, sent.len());
        assert_eq!(packet.segment_len() as usize, headers + 1380);
        let (world, forward) = (World::new(Settings::default()), Forward::default());
        let steps = world.view(Side::Subnet);
        rewrite::apply(Side::Subnet, &packet, &forward, &steps, &mut memory).unwrap();
        let out = &memory.bytes[14..];
        assert_eq!(out.len(), wanted.len());
        let ttl_at = if v4 { 8 } else { 7 };
        assert_eq!(out[ttl_at], wanted[ttl_at] - 1);
        if !v4 {
            wanted[ttl_at] -= 1;
            assert!(out == wanted, "jumbo header: {jumbo}");
        }
        // A plain packet that says so is none.
        memory.gso_size = 0;
        if v4 {
            let parsed = parse(Side::Subnet, &memory, &mut packet);
            assert_eq!(parsed, Err(Verdict::DropMalformed));
        }
    }
}

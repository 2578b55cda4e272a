//! Property tests of coalescing: what comes out is what went in.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod refusing;

use std::collections::{HashMap, HashSet};

use super::*;
use crate::engine::offload::segment::{SLACK, Segments};
use crate::engine::offload::vnet::Gso;
use crate::engine::packets::{Flow, rfc1071};
use proptest::prelude::*;

const ALL: Offload = Offload {
    vnet: true,
    tcp: true,
    udp: true,
};

/// Cuts what was written, as the kernel would.
#[derive(Default)]
struct Written {
    packets: Vec<Vec<u8>>,
    frames: usize,
}

impl TunSink for Written {
    fn write(&mut self, frame: &[u8]) {
        self.frames += 1;
        let (head, packet) = frame.split_first_chunk().unwrap();
        let header = Header::decode(head).unwrap();
        if header.gso != Gso::None {
            check(header, packet);
        }
        let mut buffer = packet.to_vec();
        buffer.resize(packet.len() + SLACK, 0);
        // No MTU, no padding.
        let mut segments = Segments::new(header, &mut buffer, packet.len(), 0).unwrap();
        while let Some(segment) = segments.next() {
            self.packets.push(segment.to_vec());
        }
    }
}

/// What the kernel demands of a super-packet.
fn check(header: Header, packet: &[u8]) {
    let v4 = packet[0] >> 4 == 4;
    if v4 {
        assert_eq!(rfc1071(&packet[..20]), 0);
        assert_eq!(
            usize::from(u16::from_be_bytes([packet[2], packet[3]])),
            packet.len()
        );
    } else {
        assert_eq!(
            usize::from(u16::from_be_bytes([packet[4], packet[5]])) + 40,
            packet.len()
        );
    }
    let (start, offset) = header.checksum.unwrap();
    let (start, offset) = (usize::from(start), usize::from(offset));
    assert_eq!(start, if v4 { 20 } else { 40 });
    let protocol = if v4 { packet[9] } else { packet[6] };
    assert_eq!(offset, if protocol == 6 { 16 } else { 6 });
    let mut pseudo = packet[if v4 { 12..20 } else { 8..40 }].to_vec();
    pseudo.extend(((packet.len() - start) as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    let field = &packet[start + offset..start + offset + 2];
    assert_eq!(field, (!rfc1071(&pseudo)).to_be_bytes());
    assert!(usize::from(header.gso_size) < packet.len() - start);
}

fn push(coalescer: &mut Coalescer, packet: &[u8], sink: &mut impl TunSink) {
    coalescer.slot()[..packet.len()].copy_from_slice(packet);
    if !coalescer.push(packet.len(), sink) {
        coalescer.pass(packet.len(), sink);
    }
}

fn through(offload: Offload, packets: &[Vec<u8>]) -> Written {
    let mut coalescer = Coalescer::new(offload);
    let mut written = Written::default();
    for packet in packets {
        push(&mut coalescer, packet, &mut written);
    }
    coalescer.flush_all(&mut written);
    written
}

/// The same while datagrams keep coming, and no time passes.
fn through_held(packets: &[Vec<u8>]) -> Written {
    let mut coalescer = Coalescer::new(ALL);
    let mut written = Written::default();
    coalescer.hold(Duration::ZERO, &mut written);
    for packet in packets {
        push(&mut coalescer, packet, &mut written);
    }
    coalescer.flush_all(&mut written);
    written
}

/// What may differ: with DF the IPv4 id means nothing (RFC 6864).
fn normal(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 && packet[6] & 0x40 != 0 {
        let correct = rfc1071(&packet[..20]) == 0;
        packet[4..6].fill(0);
        if correct {
            packet[10..12].fill(0);
        }
    }
    packet
}

/// Addresses, and protocol and ports unless the packet may be of any flow between these addresses.
type FlowKey = (Vec<u8>, Option<Vec<u8>>);

fn flow_of(packet: &[u8]) -> FlowKey {
    let v4 = packet[0] >> 4 == 4;
    let (protocol, addresses, start) = if v4 {
        (packet[9], 12..20, 20)
    } else {
        (packet[6], 8..40, 40)
    };
    let fragment = v4 && (packet[6] & 0x3f, packet[7]) != (0, 0);
    let known = matches!(protocol, 6 | 17) && !fragment;
    let flow = [&[protocol], &packet[start..start + 4]].concat();
    (packet[addresses].to_vec(), known.then_some(flow))
}

/// What order is kept within: the packets of each flow, and of no flow, and such as may be of any
/// flow between the same addresses.
fn by_flow(packets: &[Vec<u8>]) -> HashMap<FlowKey, Vec<Vec<u8>>> {
    let keys: Vec<_> = packets.iter().map(|packet| flow_of(packet)).collect();
    let mut flows: HashMap<_, Vec<_>> = HashMap::new();
    let mut between: HashMap<_, HashSet<_>> = HashMap::new();
    for key in &keys {
        between.entry(&key.0).or_default().insert(key);
    }
    for (key, packet) in keys.iter().zip(packets) {
        for other in &between[&key.0] {
            if key.1.is_none() || *other == key {
                let kept = flows.entry((*other).clone()).or_default();
                kept.push(normal(packet));
            }
        }
    }
    flows
}

fn assert_kept(sent: &[Vec<u8>], written: &Written) {
    assert_eq!(written.packets.len(), sent.len());
    let (expected, found) = (by_flow(sent), by_flow(&written.packets));
    for (flow, packets) in &expected {
        assert_eq!(found.get(flow), Some(packets), "{flow:02x?}");
    }
}

/// How one packet differs from what its flow would send next.
#[derive(Clone, Debug)]
enum Twist {
    None,
    Short(usize),
    Empty,
    Gap,
    Ttl,
    Tos,
    Ack,
    Window,
    Options,
    Id,
    Fragment,
    Flags(u8),
    WrongChecksum(usize),
    NoChecksum,
}

fn twist() -> impl Strategy<Value = Twist> {
    prop_oneof![
        30 => Just(Twist::None),
        1 => (1usize..1000).prop_map(Twist::Short),
        1 => Just(Twist::Empty),
        1 => Just(Twist::Gap),
        1 => Just(Twist::Ttl),
        1 => Just(Twist::Tos),
        1 => Just(Twist::Ack),
        1 => Just(Twist::Window),
        1 => Just(Twist::Options),
        1 => Just(Twist::Id),
        1 => Just(Twist::Fragment),
        3 => any::<u8>().prop_map(Twist::Flags),
        2 => any::<usize>().prop_map(Twist::WrongChecksum),
        1 => Just(Twist::NoChecksum),
    ]
}

struct Stream {
    flow: Flow,
    id: u16,
    sequence: u32,
    size: usize,
}

impl Stream {
    fn next(&mut self, twist: &Twist, fill: u8) -> Vec<u8> {
        let mut size = self.size;
        let mut flags = 0x10;
        match twist {
            Twist::Short(less) => size -= less % size,
            Twist::Empty => size = 0,
            Twist::Gap => self.sequence = self.sequence.wrapping_add(1),
            Twist::Ttl => self.flow.ttl ^= 1,
            Twist::Tos => self.flow.tos ^= 2,
            Twist::Ack => self.flow.ack += 1,
            Twist::Window => self.flow.window += 1,
            Twist::Options if self.flow.tcp => self.flow.options[5] ^= 1,
            Twist::Id => self.id = self.id.wrapping_add(5),
            Twist::Flags(set) => flags = *set,
            _ => {}
        }
        let payload: Vec<u8> = (0..size).map(|at| fill.wrapping_add(at as u8)).collect();
        let mut packet = self.flow.packet(self.id, self.sequence, flags, &payload);
        self.id = self.id.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(size as u32);
        match twist {
            Twist::Fragment if !self.flow.v6 => packet[6] |= 0x20,
            Twist::WrongChecksum(at) => {
                let payload = self.flow.headers();
                if payload < packet.len() {
                    let at = payload + at % (packet.len() - payload);
                    packet[at] ^= 0x40;
                }
            }
            Twist::NoChecksum if !self.flow.tcp => {
                let start = if self.flow.v6 { 40 } else { 20 };
                packet[start + 6..start + 8].fill(0);
            }
            _ => {}
        }
        packet
    }
}

fn flow() -> impl Strategy<Value = Flow> {
    (any::<bool>(), any::<bool>(), any::<bool>(), 2u8..4, 0u16..2).prop_map(
        |(v6, tcp, dont_fragment, source, port)| Flow {
            dont_fragment,
            source,
            ports: (1000 + port, 443),
            ..Flow::new(v6, tcp)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn what_comes_out_is_what_went_in(
        flows in proptest::collection::vec((flow(), any::<u16>(), any::<u32>(), 1usize..300), 1..12),
        steps in proptest::collection::vec((any::<prop::sample::Index>(), 1usize..12, twist(), any::<u8>()), 1..25),
        tcp: bool,
        udp: bool,
    ) {
        let mut seen = HashSet::new();
        let mut streams: Vec<_> = flows
            .into_iter()
            .filter(|(flow, ..)| seen.insert((flow.v6, flow.tcp, flow.source, flow.ports)))
            .map(|(flow, id, sequence, size)| Stream { flow, id, sequence, size })
            .collect();
        let mut sent = Vec::new();
        for (which, burst, twist, fill) in steps {
            let at = which.index(streams.len());
            sent.push(streams[at].next(&twist, fill));
            for _ in 0..burst {
                sent.push(streams[at].next(&Twist::None, fill));
            }
        }
        let written = through(Offload { vnet: true, tcp, udp }, &sent);
        assert_kept(&sent, &written);
    }

    #[test]
    fn hundreds_of_flows_stay_in_order(
        flows in proptest::collection::vec((flow(), any::<u32>(), 1usize..400), 1..400),
        steps in proptest::collection::vec((any::<prop::sample::Index>(), 1usize..4, twist()), 1..400),
        loose in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..3), 0..20),
        every in 1usize..300,
        pause in 0u64..3000,
    ) {
        let mut streams: Vec<_> = (0u16..)
            .zip(flows)
            .map(|(number, (flow, sequence, size))| {
                let ports = (number, 443);
                Stream { flow: Flow { ports, ..flow }, id: number, sequence, size }
            })
            .collect();
        let mut sent = Vec::new();
        for (which, burst, twist) in steps {
            let at = which.index(streams.len());
            sent.push(streams[at].next(&twist, 3));
            for neighbour in 0..burst {
                let at = (at + neighbour) % streams.len();
                sent.push(streams[at].next(&Twist::None, 5));
            }
        }
        for (at, kind) in loose {
            let at = at.index(sent.len());
            let mut packet = sent[at].clone();
            match (packet[0] >> 4, kind) {
                // ICMP, which no flow knows.
                (4, 0) => packet[9] = 1,
                // The rest of a fragmented packet.
                (4, _) => packet[7] |= 0x10,
                (_, 0) => packet[6] = 58,
                // A fragment header.
                _ => packet[6] = 44,
            }
            sent.insert(at, packet);
        }
        let mut coalescer = Coalescer::new(ALL);
        let mut written = Written::default();
        let mut now = Duration::ZERO;
        for (at, packet) in sent.iter().enumerate() {
            if at % every == 0 {
                now += Duration::from_micros(pause);
                coalescer.hold(now, &mut written);
            }
            push(&mut coalescer, packet, &mut written);
        }
        coalescer.flush_all(&mut written);
        assert_kept(&sent, &written);
    }

    #[test]
    fn any_bytes_pass_unharmed(
        packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..200), 1..20),
        version in prop_oneof![Just(0x45u8), Just(0x60)],
        protocol in prop_oneof![Just(6u8), Just(17)],
    ) {
        let mut sent = packets;
        for packet in &mut sent {
            packet[0] = version;
            let at = if version == 0x45 { 9 } else { 6 };
            if let Some(byte) = packet.get_mut(at) {
                *byte = protocol;
            }
        }
        struct Raw(Vec<Vec<u8>>);
        impl TunSink for Raw {
            fn write(&mut self, frame: &[u8]) {
                assert_eq!(Header::decode(frame.first_chunk().unwrap()), Some(Header::PLAIN));
                self.0.push(frame[vnet::LEN..].to_vec());
            }
        }
        let mut coalescer = Coalescer::new(ALL);
        let mut raw = Raw(Vec::new());
        for packet in &sent {
            push(&mut coalescer, packet, &mut raw);
        }
        coalescer.flush_all(&mut raw);
        raw.0.sort();
        sent.sort();
        prop_assert_eq!(raw.0, sent);
    }
}

fn bulk(flow: Flow, count: usize, size: usize) -> Vec<Vec<u8>> {
    let mut stream = Stream {
        flow,
        id: 0xfff0,
        sequence: u32::MAX - 5000,
        size,
    };
    (0..count)
        .map(|at| stream.next(&Twist::None, at as u8))
        .collect()
}

#[test]
fn bulk_needs_few_writes() {
    for v6 in [false, true] {
        for tcp in [false, true] {
            let sent = bulk(Flow::new(v6, tcp), 100, 1300);
            let written = through(ALL, &sent);
            assert_kept(&sent, &written);
            // 50 segments of 1300 bytes fit a super-packet.
            assert_eq!(written.frames, 2, "v6 {v6}, tcp {tcp}");
        }
    }
}

fn flow_from(port: u16, tcp: bool) -> Flow {
    Flow {
        ports: (port, 443),
        ..Flow::new(false, tcp)
    }
}

/// Packets of so many flows in turn.
fn interleaved(flows: usize, tcp: bool, count: usize, size: usize) -> Vec<Vec<u8>> {
    let mut streams: Vec<_> = (1..=flows as u16)
        .map(|port| bulk(flow_from(port, tcp), count, size))
        .collect();
    let mut sent = Vec::new();
    for at in 0..count {
        sent.extend(
            streams
                .iter_mut()
                .map(|packets| std::mem::take(&mut packets[at])),
        );
    }
    sent
}

#[test]
fn interleaved_flows_are_joined_each() {
    let sent = interleaved(FEW, true, 10, 500);
    let written = through(ALL, &sent);
    assert_kept(&sent, &written);
    assert_eq!(written.frames, FEW);
}

#[test]
fn many_flows_are_joined_each_while_datagrams_keep_coming() {
    for tcp in [false, true] {
        let sent = interleaved(RUNS, tcp, 64, 64);
        let written = through_held(&sent);
        assert_kept(&sent, &written);
        assert_eq!(written.frames, RUNS, "tcp {tcp}");
    }
}

#[test]
fn many_bulk_flows_share_the_large_buffers() {
    // Each peer's packets come together.
    let sent: Vec<_> = (1..=64)
        .flat_map(|port| bulk(flow_from(port, true), 45, 1400))
        .collect();
    let written = through_held(&sent);
    assert_kept(&sent, &written);
    assert_eq!(written.frames, 64);

    // Nothing comes together: more than a small buffer takes goes into each write.
    let sent = interleaved(64, true, 45, 1400);
    let written = through_held(&sent);
    assert_kept(&sent, &written);
    assert!(written.frames < sent.len() / 5, "{}", written.frames);
}

#[test]
fn a_run_outgrows_its_small_buffer() {
    let sent = bulk(flow_from(1, true), 600, 100);
    let written = through_held(&sent);
    assert_kept(&sent, &written);
    assert_eq!(written.frames, 1);
}

#[test]
fn packets_longer_than_small_buffers_take_large_ones() {
    let sent = interleaved(3 * LARGE, true, 2, 20_000);
    let written = through_held(&sent);
    assert_kept(&sent, &written);
}

#[test]
fn few_packets_wait_and_more_only_while_datagrams_keep_coming() {
    for (held, most) in [(false, FEW), (true, RUNS)] {
        let mut coalescer = Coalescer::new(ALL);
        let mut written = Written::default();
        // What held before the last flush no longer holds.
        coalescer.hold(Duration::ZERO, &mut written);
        coalescer.flush_all(&mut written);
        if held {
            coalescer.hold(Duration::ZERO, &mut written);
        }
        for (pushed, packet) in (1..).zip(interleaved(3 * RUNS, false, 1, 64)) {
            push(&mut coalescer, &packet, &mut written);
            assert_eq!(pushed - written.packets.len(), pushed.min(most));
        }
        coalescer.flush_all(&mut written);
        assert_eq!(written.packets.len(), 3 * RUNS);
    }
}

#[test]
fn a_packet_waits_no_longer_than_it_may() {
    let mut coalescer = Coalescer::new(ALL);
    let mut written = Written::default();
    let began = Duration::from_secs(5);
    let late = Duration::from_nanos(1);
    let [first, second, more] = [(1, 0), (2, 0), (1, 1)].map(|(port, id)| {
        let flow = flow_from(port, false);
        flow.packet(id, 0, 0, &[7; 64])
    });
    coalescer.hold(began, &mut written);
    push(&mut coalescer, &first, &mut written);
    coalescer.hold(began + HOLD - late, &mut written);
    push(&mut coalescer, &second, &mut written);
    // One that is joined does not make the others wait again.
    push(&mut coalescer, &more, &mut written);
    assert_eq!(written.packets.len(), 0);
    coalescer.hold(began + HOLD, &mut written);
    assert_eq!(written.packets.len(), 2);
    coalescer.hold(began + HOLD - late + HOLD, &mut written);
    assert_eq!(written.packets.len(), 3);
    assert_eq!(written.frames, 2);
}

#[test]
fn push_is_not_held_back() {
    let mut coalescer = Coalescer::new(ALL);
    let mut written = Written::default();
    let flow = Flow::new(false, true);
    for (at, flags) in [0x10, 0x10, 0x18].into_iter().enumerate() {
        let packet = flow.packet(at as u16, at as u32 * 100, flags, &[7; 100]);
        push(&mut coalescer, &packet, &mut written);
    }
    assert_eq!((written.frames, written.packets.len()), (1, 3));
}

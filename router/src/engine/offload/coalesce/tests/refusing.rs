//! A device that refuses super-packets: nothing is lost, and soon none of the kind are made.

use super::*;
use crate::engine::offload::refusals::{Found, Refused};

/// A device that takes nothing of some kinds.
struct Refusing {
    refuses: fn(&Header, &[u8]) -> bool,
    refused: usize,
    written: Written,
}

impl TunSink for Refusing {
    fn write(&mut self, frame: &[u8]) {
        let header = Header::decode(frame.first_chunk().unwrap()).unwrap();
        if header.gso == Gso::None || !(self.refuses)(&header, &frame[vnet::LEN..]) {
            self.written.write(frame);
        }
    }

    fn write_merged(&mut self, frame: &[u8]) -> bool {
        let header = Header::decode(frame.first_chunk().unwrap()).unwrap();
        let refused = (self.refuses)(&header, &frame[vnet::LEN..]);
        if refused {
            self.refused += 1;
        } else {
            self.written.write(frame);
        }
        !refused
    }
}

fn ends_short(header: &Header, packet: &[u8]) -> bool {
    let start = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let headers = match header.gso {
        Gso::Udp => start + 8,
        _ => start + usize::from(packet[start + 12] >> 4) * 4,
    };
    !(packet.len() - headers).is_multiple_of(usize::from(header.gso_size))
}

/// Rounds of packets through a device; what was found of it, how many it refused, and how many frames
/// it took in the last round.
fn rounds(
    refuses: fn(&Header, &[u8]) -> bool,
    packets: impl Fn(usize) -> Vec<Vec<u8>>,
) -> (Vec<Refused>, usize, usize) {
    let found = Found::default();
    let mut coalescer = Coalescer::new(ALL);
    coalescer.tell_refusals(found.clone());
    let mut sink = Refusing {
        refuses,
        refused: 0,
        written: Written::default(),
    };
    let (mut sent, mut last) = (Vec::new(), 0);
    for round in 0..20 {
        let packets = packets(round);
        let before = sink.written.frames;
        for packet in &packets {
            push(&mut coalescer, packet, &mut sink);
        }
        coalescer.flush_all(&mut sink);
        sent.extend(packets);
        last = sink.written.frames - before;
    }
    assert_kept(&sent, &sink.written);
    (found.kinds().collect(), sink.refused, last)
}

fn flow(round: usize, v6: bool, tcp: bool) -> Flow {
    Flow {
        ports: (round as u16, 443),
        ..Flow::new(v6, tcp)
    }
}

#[test]
fn a_kind_that_is_refused_is_written_packet_by_packet_and_soon_not_made() {
    for (v6, tcp, kind) in [
        (false, true, Refused::Tcp4),
        (true, true, Refused::Tcp6),
        (false, false, Refused::Udp),
        (true, false, Refused::Udp),
    ] {
        // Super-packets that fill a large buffer and a small one to their ends, or nearly.
        let packets = |round| {
            let [large, small] = [0, 1].map(|at| flow(2 * round + at, v6, tcp));
            [bulk(large, 50, 1300), bulk(small, 16, 511)].concat()
        };
        let (found, refused, last) = rounds(|_, _| true, packets);
        assert_eq!((found, refused), (vec![kind], 4), "v6 {v6}, tcp {tcp}");
        assert_eq!(last, 50 + 16);
    }
}

#[test]
fn others_are_made_as_before() {
    let tcp6 = |header: &Header, _: &[u8]| header.gso == Gso::Tcp6;
    let (found, refused, last) = rounds(tcp6, |round| bulk(flow(round, false, true), 10, 1300));
    assert_eq!((found, refused, last), (vec![], 0, 1));
}

#[test]
fn only_a_short_end_is_written_apart_where_only_that_is_refused() {
    for (v6, tcp, kind) in [
        (false, true, Refused::Tcp4Short),
        (true, true, Refused::Tcp6Short),
        (true, false, Refused::UdpShort),
    ] {
        let packets = |round| {
            let mut stream = Stream {
                flow: flow(round, v6, tcp),
                id: 1,
                sequence: 1,
                size: 1300,
            };
            let twists = [&Twist::None, &Twist::None, &Twist::None, &Twist::Short(9)];
            twists.map(|twist| stream.next(twist, 7)).to_vec()
        };
        let (found, refused, last) = rounds(ends_short, packets);
        assert_eq!(
            (found, refused, last),
            (vec![kind], 4, 2),
            "v6 {v6}, tcp {tcp}"
        );
    }
}

#[test]
fn what_is_refused_now_and_then_is_made_on() {
    // Every other one, as something of a certain flow might be.
    let even = |_: &Header, packet: &[u8]| {
        let at = if packet[0] >> 4 == 4 { 21 } else { 41 };
        packet[at].is_multiple_of(2)
    };
    let (found, refused, last) = rounds(even, |round| bulk(flow(round, false, true), 10, 1300));
    assert_eq!((found, refused, last), (vec![], 10, 1));
}

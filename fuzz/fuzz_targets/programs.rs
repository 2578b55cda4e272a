//! The packet logic of the eBPF programs: parse, decide, rewrite, answer.
//!
//! The input is a row of packets, each with a head of five bytes: flags, GSO size, length. They meet
//! one flow table.
#![no_main]

use libfuzzer_sys::fuzz_target;
use router_ebpf::abi::{Link, Overlay, Prefix, Route, Settings, Side};
use router_ebpf::forward::Exit;
use router_ebpf::frame::Bytes;
use router_ebpf::memory::Memory;
use router_ebpf::packet::{Packet, parse};
use router_ebpf::tables::Hop;
use router_ebpf::verdict::Verdict;
use router_ebpf::world::World;
use sluice_fuzz::repair;

const TUN: u32 = 7;
const LINK: u32 = 8;
/// Most bytes that the programs put in front: an Ethernet header, or the headers of an ICMPv6 error.
const GROWTH: usize = 48;

fn everything(family: [u8; 4], flags: u32) -> (Prefix, Route) {
    let mut prefix = Prefix::host(router_ebpf::abi::Address::v4([0; 4]));
    prefix.address.family = family;
    prefix.len = 32;
    (prefix, Route { flags })
}

/// A router whose overlay and routes are everything: who comes by which side is whose.
fn world(flags: u8) -> World {
    let mut world = World::new(Settings {
        flags: u32::from(flags & 1) * Settings::FIB_MTU
            | u32::from(flags >> 3 & 1) * Settings::REJECT,
        tun: TUN,
        mtu: 1420,
        generation: 1,
        bank: u32::from(flags >> 1 & 1),
        flows_per_source: 8,
        flows_from_subnet: 12,
        kept_ports: [1024, 60_999],
        ports: [2000, 2003],
        ..Settings::default()
    });
    let snat = if flags & 4 == 0 { Route::SNAT } else { 0 };
    world.ingress = [TUN, LINK];
    world.entries = 64;
    world.routes = [[4, 0, 0, 0], [6, 0, 0, 0]]
        .map(|family| everything(family, snat))
        .into();
    world.overlay = world
        .routes
        .iter()
        .map(|(prefix, _)| (*prefix, Overlay::of(1)))
        .collect();
    world.rules = Box::new(|tuple| (tuple.ports[1][1] < 200).then_some(1));
    let mut link = Link {
        mtu: 1500,
        v4_count: 1,
        v6_count: 1,
        ..Link::default()
    };
    link.v4[0] = [10, 0, 0, 1];
    link.v6[0] = [0xfd; 16];
    world.links.insert(LINK, link);
    world.routing = Box::new(|packet, len| match packet.tuple.destination.octets[3] & 7 {
        0 => Err(Verdict::SlowFib),
        1 if len > 1400 => Err(Verdict::SlowMtu),
        n => Ok(Hop {
            gateway: [0; 4],
            link: if packet.ttl & 1 == 0 { LINK } else { TUN },
            mtu: if n == 2 { 1300 } else { u32::MAX },
            resolved: n != 3,
            hardware: Bytes([2; 12]),
        }),
    });
    world
}

fuzz_target!(|data: &[u8]| {
    let Some((flags, mut rest)) = data.split_first() else {
        return;
    };
    let mut world = world(*flags);
    while let Some((head, tail)) = rest.split_first_chunk::<5>() {
        let len = usize::from(u16::from_be_bytes([head[3], head[4]])).min(tail.len());
        let (bytes, after) = tail.split_at(len);
        rest = after;
        let side = if head[0] & 1 == 0 {
            Side::Overlay
        } else {
            Side::Subnet
        };
        let mut bytes = bytes.to_vec();
        let offset = side.header_offset() as usize;
        if head[0] & 2 == 0 && bytes.len() > offset {
            repair(&mut bytes[offset..]);
        }
        if head[0] & 4 != 0 {
            world.settings.generation += 1;
        }
        world.now += u64::from(head[0] >> 3) << 28;
        let gso_size = u16::from_be_bytes([head[1], head[2]]);
        let mut frame = Memory::new(side, bytes, gso_size.into());
        let before = frame.bytes.len();
        let (verdict, forward) = world.run(side, &mut frame);
        if let Some(forward) = forward {
            assert!(frame.bytes.len() <= before + GROWTH, "a packet grew");
            let mut packet = Packet::default();
            assert!(
                parse(side, &frame, &mut packet).is_ok(),
                "what leaves can be read"
            );
            let answered = matches!(
                verdict,
                Verdict::DropTooBig | Verdict::DropTtl | Verdict::RejectPolicy
            );
            assert_eq!(forward.exit == Exit::Answer, answered);
        }
    }
});

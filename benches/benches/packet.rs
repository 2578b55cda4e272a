//! The packet path's pieces: what the programs do with a packet, what the engine does with a run.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use benches::packet::{Segment, tcp};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::IpNet;
use router::engine::internals::pieces::{AllowedIps, Merger, cut, with_slack};
use router_ebpf::abi::{Address, Link, Overlay, Prefix, Route, Settings, Side};
use router_ebpf::decide::decide;
use router_ebpf::forward::Forward;
use router_ebpf::frame::Bytes;
use router_ebpf::memory::Memory;
use router_ebpf::packet::{Packet, parse};
use router_ebpf::rewrite;
use router_ebpf::tables::Hop;
use router_ebpf::verdict::Verdict;
use router_ebpf::world::World;

const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
const MTU: usize = 1420;
/// Payload of a full segment, with time stamps in its header.
const SEGMENT: usize = MTU - 52;
const NIC: u32 = 3;
const TUN: u32 = 7;

fn ends() -> (SocketAddr, SocketAddr) {
    (
        "100.64.0.2:40000".parse().unwrap(),
        "10.0.0.1:443".parse().unwrap(),
    )
}

/// A router with a single route, whose sources it translates.
fn world() -> World {
    let mut world = World::new(Settings {
        flags: Settings::FIB_MTU,
        tun: TUN,
        mtu: MTU as u32,
        generation: 1,
        flows_per_source: 10,
        flows_from_subnet: 10,
        kept_ports: [1024, u16::MAX],
        ..Settings::default()
    });
    world.ingress = [TUN, NIC];
    world.overlay = vec![(
        Prefix::cidr(Address::v4([100, 64, 0, 0]), 10),
        Overlay::of(1),
    )];
    let route = Route { flags: Route::SNAT };
    world.routes = vec![(Prefix::cidr(Address::v4([10, 0, 0, 0]), 8), route)];
    let mut link = Link {
        mtu: 1500,
        v4_count: 1,
        ..Link::default()
    };
    link.v4[0] = [192, 0, 2, 1];
    world.links.insert(NIC, link);
    world.routing = Box::new(|_, _| {
        Ok(Hop {
            gateway: [0; 4],
            link: NIC,
            mtu: 1500,
            resolved: true,
            hardware: Bytes([2; 12]),
        })
    });
    world
}

fn program(c: &mut Criterion) {
    const SIDE: Side = Side::Overlay;
    let (from, to) = ends();
    let mss = [2, 4, 0x23, 0];
    let mut world = world();
    // The SYN opens the flow that the data goes with.
    for (name, flags, options) in [("syn", SYN, &mss[..]), ("data", ACK, &[][..])] {
        let segment = Segment {
            flags,
            options,
            ..Segment::default()
        };
        let frame = Memory::new(SIDE, tcp(from, to, segment), 0);
        let (verdict, forward) = world.run(SIDE, &mut frame.clone());
        assert_eq!(verdict, Verdict::Forwarded);
        let forward = forward.unwrap();
        assert!(forward.is_translated);
        let mut packet = Packet::default();
        parse(SIDE, &frame, &mut packet).unwrap();
        let tables = world.view(SIDE);
        c.bench_function(&format!("program/parse/{name}"), |b| {
            b.iter(|| parse(SIDE, black_box(&frame), &mut packet));
        });
        c.bench_function(&format!("program/decide/{name}"), |b| {
            let mut forward = Forward::default();
            b.iter(|| decide(SIDE, black_box(&mut packet), &frame, &tables, &mut forward));
        });
        c.bench_function(&format!("program/rewrite/{name}"), |b| {
            b.iter_batched_ref(
                || frame.clone(),
                |frame| rewrite::apply(SIDE, &packet, &forward, &tables, frame).unwrap(),
                BatchSize::SmallInput,
            );
        });
    }
}

/// Segments of one TCP stream.
fn stream(segments: u32) -> Vec<Vec<u8>> {
    let (from, to) = ends();
    // Time stamps, as every Linux sends them.
    let options = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    let segment = |n| Segment {
        flags: ACK,
        sequence: n * SEGMENT as u32,
        options: &options,
        payload: SEGMENT,
        ..Segment::default()
    };
    (0..segments).map(|n| tcp(from, to, segment(n))).collect()
}

fn runs(c: &mut Criterion) {
    const SEGMENTS: u32 = 45;
    let packets = stream(SEGMENTS);
    let bytes = packets.iter().map(Vec::len).sum::<usize>() as u64;
    let mut merger = Merger::default();
    let mut frames = Vec::new();
    merger.merge(&packets, |frame| frames.push(frame.to_vec()));
    assert_eq!(frames.len(), 1, "one stream makes one super-packet");
    let frame = with_slack(&frames[0]);
    assert_eq!(cut(&mut frame.clone(), MTU), Some(SEGMENTS as usize));

    let mut group = c.benchmark_group("engine");
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function("merge", |b| {
        b.iter(|| {
            merger.merge(black_box(&packets), |frame| {
                black_box(frame);
            })
        });
    });
    group.bench_function("cut", |b| {
        b.iter_batched_ref(
            || frame.clone(),
            |frame| cut(frame, MTU),
            BatchSize::SmallInput,
        );
    });
}

fn allowed_ips(c: &mut Criterion) {
    let mut group = c.benchmark_group("allowed-ips");
    for count in [10u32, 1_000, 100_000] {
        let address = |n: u32| Ipv4Addr::from(0x6440_0000 + 7 * n);
        let entry = |n| (IpNet::from(IpAddr::from(address(n))), n);
        let table = AllowedIps::new((0..count).map(entry));
        let mut n = 0;
        group.bench_function(BenchmarkId::from_parameter(count), |b| {
            b.iter(|| {
                // Spread over the table, so that a lookup is not of what the last one left behind.
                n = (n + 7_919) % count;
                assert_eq!(table.get(address(n).into()), Some(n));
            });
        });
    }
}

criterion_group!(benches, program, runs, allowed_ips);
criterion_main!(benches);

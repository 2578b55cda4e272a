//! The packet path's pieces: what the programs do with a packet, what the engine does with a run.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use benches::packet::{Segment, tcp};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use ipnet::IpNet;
use router::engine::pieces::{AllowedIps, Merger, cut, with_slack};
use router_ebpf::abi::{ABI_VERSION, Prefix, Route, Settings, Side};
use router_ebpf::decide::{Hop, Tables, decide};
use router_ebpf::memory::Memory;
use router_ebpf::packet::{Packet, parse};
use router_ebpf::rewrite;
use router_ebpf::verdict::Verdict;

const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
const MTU: usize = 1420;
/// Payload of a full segment, with time stamps in its header.
const SEGMENT: usize = MTU - 52;
const NIC: u32 = 3;

fn ends() -> (SocketAddr, SocketAddr) {
    (
        "100.64.0.2:40000".parse().unwrap(),
        "10.0.0.1:443".parse().unwrap(),
    )
}

/// The maps of a router with a single route, answered without a search.
struct One;

impl Tables for One {
    fn settings(&self) -> Settings {
        Settings {
            abi_version: ABI_VERSION,
            flags: Settings::FIB_MTU,
            tun: 7,
            mtu: MTU as u32,
            ..Settings::default()
        }
    }

    fn ingress(&self) -> u32 {
        7
    }

    fn in_overlay(&self, address: &Prefix) -> bool {
        address.address.octets[0] == 100
    }

    fn route(&self, _: &Prefix) -> Option<Route> {
        Some(Route::default())
    }

    fn link_mtu(&self, _: u32) -> Option<u32> {
        Some(1500)
    }

    fn next_hop(&self, _: &Packet, _: &Settings) -> Result<Hop, Verdict> {
        Ok(Hop {
            link: NIC,
            mtu: 1500,
            hardware: [2; 12],
        })
    }
}

fn program(c: &mut Criterion) {
    let (from, to) = ends();
    let mss = [2, 4, 0x23, 0];
    for (name, flags, options) in [("data", ACK, &[][..]), ("syn", SYN, &mss[..])] {
        let segment = Segment {
            flags,
            options,
            ..Segment::default()
        };
        let frame = Memory::new(Side::Overlay, tcp(from, to, segment), 0);
        let packet = parse(&frame).unwrap();
        let forward = decide(Side::Overlay, &packet, &One).unwrap();
        assert_eq!(forward.link, NIC);
        c.bench_function(&format!("program/parse/{name}"), |b| {
            b.iter(|| parse(black_box(&frame)));
        });
        c.bench_function(&format!("program/decide/{name}"), |b| {
            b.iter(|| decide(Side::Overlay, black_box(&packet), &One));
        });
        c.bench_function(&format!("program/rewrite/{name}"), |b| {
            b.iter_batched_ref(
                || frame.clone(),
                |frame| rewrite::apply(&packet, &forward, frame).unwrap(),
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

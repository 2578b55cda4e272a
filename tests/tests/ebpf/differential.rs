//! The same packets through the programs in the kernel and through the same code on the host.

use std::net::IpAddr;

use anyhow::{Context, ensure};
use router::datapath::Datapath as _;
use router_ebpf::abi::{Prefix, Route, Settings, Side};
use router_ebpf::decide::{Hop, Tables, decide};
use router_ebpf::memory::Memory;
use router_ebpf::packet::{Packet, parse};
use router_ebpf::rewrite;
use router_ebpf::verdict::{Class, Verdict};

use super::fixture::*;
use super::packets::*;

/// Packets a run, unless `SLUICE_FUZZ_CASES` says otherwise (an emulated processor needs 7 ms for
/// one); the seed of a failing one is told, and `SLUICE_FUZZ_SEED` repeats it.
const CASES: u64 = 20_000;
const SEED: u64 = 0x5105_ce00;

/// SplitMix64.
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// The fixture's maps and routing, as the test knows them.
struct Model<'a> {
    fixture: &'a Fixture,
    side: Side,
}

fn address_of(prefix: &Prefix) -> IpAddr {
    if prefix.address.is_v4() {
        prefix.address.v4_octets().into()
    } else {
        prefix.address.octets.into()
    }
}

impl Tables for Model<'_> {
    fn settings(&self) -> Settings {
        Settings {
            abi_version: router_ebpf::abi::ABI_VERSION,
            flags: Settings::FIB_MTU,
            tun: self.fixture.spec.tun.index,
            mtu: MTU.into(),
            ..Settings::default()
        }
    }

    fn ingress(&self) -> u32 {
        match self.side {
            Side::Overlay => self.fixture.spec.tun.index,
            Side::Subnet => self.fixture.spec.subnet[0].index,
        }
    }

    fn in_overlay(&self, address: &Prefix) -> bool {
        let address = address_of(address);
        self.fixture
            .spec
            .overlay
            .iter()
            .any(|cidr| cidr.contains(&address))
    }

    fn route(&self, address: &Prefix) -> Option<Route> {
        let address = address_of(address);
        let routes = self.fixture.spec.routes.iter();
        let route = routes
            .filter(|route| route.cidr.contains(&address))
            .max_by_key(|route| route.cidr.prefix_len())?;
        let mut flags = 0;
        if route.snat {
            flags |= Route::SNAT;
        }
        if route.mode == router::control::RouteMode::Stack {
            flags |= Route::STACK;
        }
        Some(Route { flags })
    }

    fn link_mtu(&self, index: u32) -> Option<u32> {
        (index == self.fixture.spec.subnet[0].index).then_some(LINK_MTU.into())
    }

    fn next_hop(&self, packet: &Packet, settings: &Settings) -> Result<Hop, Verdict> {
        let destination = address_of(&packet.destination);
        let family = if destination.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        };
        let is = |net, host| destination == family.subnet(net, host);
        let inside = |net| (0..=255).any(|host| is(net, host));
        let eth0 = self.fixture.spec.subnet[0].index;
        let mut hardware = [0; 12];
        hardware[..6].copy_from_slice(&self.fixture.gateway_mac);
        hardware[6..].copy_from_slice(&self.fixture.mac);
        let known = |mtu: u16| Hop {
            link: eth0,
            mtu: if has_fib_mtu() { mtu.into() } else { u32::MAX },
            hardware,
        };
        let (mtu, hop) = if is(Net::NEAR, ROUTER)
            || is(Net::ELSEWHERE, ROUTER)
            || destination == family.overlay(1)
        {
            return Err(Verdict::SlowToRouter);
        } else if inside(Net::PROHIBITED) {
            return Err(Verdict::SlowFib);
        } else if is(Net::NEAR, GATEWAY) {
            (LINK_MTU, Ok(known(LINK_MTU)))
        } else if inside(Net::NARROW) {
            (NARROW_MTU, Ok(known(NARROW_MTU)))
        } else if is(Net::ELSEWHERE, GATEWAY) {
            // Its MTU is that of eth1, and that is no subnet-side NIC.
            (LINK_MTU, Err(Verdict::SlowOtherLink))
        } else if inside(Net::NEAR) || inside(Net::UNRESOLVED) || inside(Net::ELSEWHERE) {
            (LINK_MTU, Err(Verdict::SlowNoNeighbour))
        } else if (0..=255).any(|host| destination == family.overlay(host)) {
            let tun = Hop {
                link: settings.tun,
                mtu: u32::MAX,
                hardware: [0; 12],
            };
            (MTU, Ok(tun))
        } else {
            return Err(Verdict::SlowToRouter);
        };
        if packet.segment_len() > mtu.into() {
            return Err(Verdict::SlowMtu);
        }
        hop
    }
}

/// What the host's code makes of a packet.
fn on_the_host(fixture: &Fixture, side: Side, bytes: &[u8], gso_size: u32) -> Outcome {
    let mut frame = Memory::new(side, bytes.to_vec(), gso_size);
    let verdict = carry(fixture, side, &mut frame)
        .err()
        .unwrap_or(Verdict::Forwarded);
    let code = match verdict.class() {
        Class::Forward => REDIRECT,
        Class::Drop => SHOT,
        Class::Slow | Class::Pass => NEXT,
    };
    Outcome {
        code,
        verdict,
        bytes: frame.bytes,
    }
}

fn carry(fixture: &Fixture, side: Side, frame: &mut Memory) -> Result<(), Verdict> {
    if side == Side::Subnet {
        let plain = [[8, 0], [0x86, 0xdd]]
            .iter()
            .any(|ethertype| frame.bytes[12..14] == *ethertype);
        if frame.bytes[..6] != fixture.mac || !plain {
            return Err(Verdict::PassUnrelated);
        }
    }
    let packet = parse(frame).map_err(|verdict| match side {
        Side::Overlay => verdict,
        Side::Subnet => Verdict::PassUnrelated,
    })?;
    let forward = decide(side, &packet, &Model { fixture, side })?;
    rewrite::apply(&packet, &forward, frame)
}

/// A packet of one of the fixture's networks to another.
fn sample(random: &mut Random, side: Side) -> (Ip, u32) {
    let family = random.pick(&FAMILIES);
    let near = if random.chance(70) {
        family.subnet(Net::NEAR, GATEWAY)
    } else if random.chance(10) {
        family.foreign()
    } else {
        let net = random.pick(&[
            Net::NEAR,
            Net::SNAT,
            Net::STACK,
            Net::ELSEWHERE,
            Net::PROHIBITED,
            Net::NARROW,
            Net::UNRESOLVED,
        ]);
        family.subnet(net, random.pick(&[1, ROUTER, GATEWAY, 99]))
    };
    let peer = match random.below(10) {
        0 => family.foreign(),
        1 => family.overlay(1),
        _ => family.overlay(PEER),
    };
    let (source, destination) = match side {
        Side::Overlay => (peer, near),
        Side::Subnet => (near, peer),
    };
    let len = random.pick(&[
        0, 1, 64, 1252, 1352, 1372, 1392, 1432, 1452, 1472, 1473, 3000,
    ]);
    let mut ip = match random.below(8) {
        0 => Ip::echo(source, destination),
        1 => Ip::new(
            source,
            destination,
            random.next() as u8,
            vec![0; len.max(20)],
        ),
        2..=4 => Ip::udp(source, destination, len),
        _ => {
            let flags = random.pick(&[ACK, SYN, SYN | ACK, 0x18]);
            let options = match random.below(4) {
                0 => vec![],
                1 => mss(random.next() as u16).to_vec(),
                2 => [&[1, 1, 1][..], &mss(random.next() as u16), &[0]].concat(),
                _ => (0..random.below(10) * 4)
                    .map(|_| random.pick(&[0, 1, 2, 3, 4, 8, 10]))
                    .collect(),
            };
            Ip::tcp(source, destination, flags, &options, len)
        }
    };
    ip.ttl = random.pick(&[0, 1, 2, 64, 64, 64, 255]);
    let gso_size = if random.chance(20) {
        random.pick(&[1, 536, 1240, 1360, 1380, 1400, 1440, 8000])
    } else {
        0
    };
    (ip, gso_size)
}

/// The packet's bytes, sometimes damaged; its addresses stay, for the model knows no others.
fn damaged(random: &mut Random, ip: &Ip) -> Vec<u8> {
    let mut bytes = ip.bytes();
    let addresses = if ip.source.is_ipv4() { 12..20 } else { 8..40 };
    if random.chance(50) {
        for _ in 0..=random.below(3) {
            let at = random.below(bytes.len().min(80));
            if !addresses.contains(&at) {
                bytes[at] = if random.chance(50) {
                    random.next() as u8
                } else {
                    bytes[at] ^ (1 << random.below(8))
                };
            }
        }
    }
    if random.chance(5) {
        bytes.truncate(random.below(bytes.len()));
    }
    if random.chance(5) {
        bytes.resize(bytes.len() + random.below(30), 0);
    }
    bytes
}

#[test]
fn kernel_and_host_agree_on_any_packet() {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(text.parse().expect("a number"))
    };
    let (first, cases) = match number("SLUICE_FUZZ_SEED") {
        Some(seed) => (seed, 1),
        None => (SEED, number("SLUICE_FUZZ_CASES").unwrap_or(CASES)),
    };
    lab::test(|lab| {
        let seen = router(lab)?.enter(|| {
            let fixture = Fixture::new(None)?;
            let mut seen = std::collections::HashSet::new();
            for seed in first..first + cases {
                let verdict =
                    compare(&fixture, seed).with_context(|| format!("SLUICE_FUZZ_SEED={seed}"))?;
                seen.insert(verdict);
            }
            let counted = fixture.ebpf.counters()?;
            let total: u64 = counted.iter().map(|counter| counter.packets).sum();
            ensure!(total == cases, "{total} packets counted of {cases}");
            anyhow::Ok(seen)
        })??;
        if cases >= CASES {
            // The first two need other settings, and nothing runs out of memory; the rest is of flows.
            let rare = [
                Verdict::SlowPolicy,
                Verdict::SlowScope,
                Verdict::DropInternal,
                Verdict::SlowNoFlow,
                Verdict::DropPolicy,
                Verdict::DropSourceLimit,
                Verdict::DropTableFull,
                Verdict::DropNatExhausted,
                Verdict::DropFragment,
                Verdict::DropTooBig,
                Verdict::DropTtl,
            ];
            for verdict in Verdict::ALL
                .iter()
                .filter(|verdict| !rare.contains(verdict))
            {
                ensure!(seen.contains(verdict), "no packet was {}", verdict.label());
            }
        }
        Ok(())
    });
}

fn compare(fixture: &Fixture, seed: u64) -> anyhow::Result<Verdict> {
    let mut random = Random(seed);
    let side = random.pick(&Side::ALL);
    let (ip, gso_size) = sample(&mut random, side);
    let packet = damaged(&mut random, &ip);
    let mut bytes = match side {
        Side::Overlay => packet,
        Side::Subnet => {
            let to = if random.chance(97) {
                fixture.mac
            } else {
                [0xff; 6]
            };
            let mut bytes = frame(to, fixture.gateway_mac, &ip.bytes());
            bytes.truncate(14);
            bytes.extend(packet);
            bytes
        }
    };
    // TEST_RUN refuses what does not hold the header that the EtherType announces.
    let least = match side {
        Side::Overlay => 14,
        Side::Subnet => 14 + 40,
    };
    if bytes.len() < least {
        bytes.resize(least, 0);
    }
    let on_the_host = on_the_host(fixture, side, &bytes, gso_size);
    let counted = |fixture: &Fixture| fixture.ebpf.counter(side, on_the_host.verdict);
    let before = counted(fixture)?.packets;
    let (code, out) = fixture.test_run(side, &bytes, gso_size)?;
    ensure!(
        counted(fixture)?.packets == before + 1
            && code == on_the_host.code
            && out == on_the_host.bytes,
        "{side:?}, GSO size {gso_size}: {:?} on the host but not in the kernel, of {} bytes:\n{:02x?}",
        on_the_host.verdict,
        bytes.len(),
        &bytes[..bytes.len().min(120)]
    );
    Ok(on_the_host.verdict)
}

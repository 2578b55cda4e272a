//! The same packets through the programs in the kernel and through the same code on the host: what
//! leaves, what is counted, and what the flow table holds.

mod traffic;

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;

use anyhow::{Context, ensure};
use aya::maps::{Array, HashMap, MapData};
use router::control::{Denied, Destination, RouteMode, Rule};
use router::datapath::Datapath as _;
use router::datapath::ebpf::{Ebpf, Options};
use router::datapath::limits::Limits;
use router_ebpf::abi::{
    self, Address, Budget, Flow, FragmentKey, Link, Overlay, Prefix, Route, Settings, Side, Tuple,
};
use router_ebpf::craft::*;
use router_ebpf::forward::{Answer, Exit, Forward};
use router_ebpf::frame::Bytes;
use router_ebpf::memory::Memory;
use router_ebpf::packet::Packet;
use router_ebpf::tables::Hop;
use router_ebpf::verdict::{Class, Verdict};
use router_ebpf::world::World;

use super::fixture::*;
pub(super) use traffic::Random;
use traffic::{Traffic, damaged};

/// Packets a run, unless `SLUICE_FUZZ_CASES` says otherwise (an emulated processor needs 7 ms for
/// one). They come in batches, each of which begins with empty tables; the seed of a batch that
/// fails is told, and `SLUICE_FUZZ_SEED` repeats it.
const CASES: u64 = 1_000_000;
const BATCH: u64 = 500;
const SEED: u64 = 0x5105_ce00;

/// Of so many batches, one has its flows settle thrice: the kernel takes some time for that.
const SETTLING: u64 = 8;

/// Flows of one source, at most.
const LIMIT: u32 = 12;
/// The only port that is given when the own one is not free: so both sides give the same.
const PORT: u16 = 3000;
/// No rule allows more.
const LAST_PORT: u16 = 50_000;

fn address_of(address: &Address) -> IpAddr {
    if address.is_v4() {
        address.v4_octets().into()
    } else {
        address.octets.into()
    }
}

fn address(ip: IpAddr) -> Address {
    match ip {
        IpAddr::V4(ip) => Address::v4(ip.octets()),
        IpAddr::V6(ip) => Address::v6(ip.octets()),
    }
}

fn prefix(cidr: &ipnet::IpNet) -> Prefix {
    Prefix::cidr(address(cidr.network()), cidr.prefix_len())
}

/// The maps behind the programs.
struct Maps {
    settings: Array<MapData, Settings>,
    fragments: HashMap<MapData, FragmentKey, abi::Fragment>,
}

impl Maps {
    fn of(ebpf: &Ebpf) -> anyhow::Result<Self> {
        Ok(Self {
            settings: map(ebpf, abi::SETTINGS)?.try_into()?,
            fragments: map(ebpf, abi::FRAGMENTS)?.try_into()?,
        })
    }

    fn clear(&mut self) -> anyhow::Result<()> {
        for key in self.fragments.keys().collect::<Result<Vec<_>, _>>()? {
            self.fragments.remove(&key)?;
        }
        Ok(())
    }
}

/// What of the kernel's flow table does not hang on the time of day.
fn flows(ebpf: &Ebpf) -> anyhow::Result<Table> {
    let entries = ebpf.flows().entries()?.into_iter();
    let timeless = entries.map(|(side, tuple, flow)| ((side as u8, tuple), timeless(flow)));
    Ok(timeless.collect())
}

/// A flow table by side and tuple.
type Table = BTreeMap<(u8, Tuple), Flow>;

fn timeless(flow: Flow) -> Flow {
    Flow {
        last_used: 0,
        ..flow
    }
}

/// The router once more, with the host's code.
fn world(fixture: &Fixture, settings: Settings) -> World {
    let spec = &fixture.spec;
    let (tun, nic) = (spec.tun.index, spec.subnet[0].index);
    let mut world = World::new(settings);
    world.ingress = [tun, nic];
    let overlay = spec.overlay.iter();
    world.overlay = overlay
        .map(|(net, peer)| (prefix(net), Overlay::of(*peer)))
        .collect();
    world.own = spec.own.iter().map(|own| address(*own)).collect();
    let routes = spec.routes.iter().map(|route| {
        let snat = if route.snat { Route::SNAT } else { 0 };
        let stack = if route.mode == RouteMode::Stack {
            Route::STACK
        } else {
            0
        };
        let flags = snat | stack;
        (prefix(&route.cidr), Route { flags })
    });
    world.routes = routes.collect();
    let mut link = Link {
        mtu: LINK_MTU.into(),
        v4_count: 1,
        v6_count: 1,
        ..Link::default()
    };
    link.v4[0] = address(Family::V4.subnet(Net::NEAR, ROUTER)).v4_octets();
    link.v6[0] = address(Family::V6.subnet(Net::NEAR, ROUTER)).octets;
    world.links.insert(nic, link);
    world.rules = Box::new(|tuple| {
        let ports = matches!(tuple.protocol, TCP | UDP);
        (!ports || u16::from_be_bytes(tuple.ports[1]) <= LAST_PORT).then_some(0)
    });
    let hardware = [fixture.gateway_mac, fixture.mac].concat();
    let hardware: [u8; 12] = hardware.try_into().expect("twice six bytes");
    let elsewhere = link_of("eth1");
    world.routing =
        Box::new(move |packet: &Packet, len| next_hop(packet, len, tun, nic, elsewhere, hardware));
    world
}

fn link_of(name: &str) -> u32 {
    link(name).expect("an interface of the fixture").index
}

/// The fixture's routing, as the test knows it.
fn next_hop(
    packet: &Packet,
    len: u32,
    tun: u32,
    nic: u32,
    elsewhere: u32,
    hardware: [u8; 12],
) -> Result<Hop, Verdict> {
    let destination = address_of(&packet.tuple.destination);
    let family = if destination.is_ipv4() {
        Family::V4
    } else {
        Family::V6
    };
    let is = |net, host| destination == family.subnet(net, host);
    let inside = |net| (0..=255).any(|host| is(net, host));
    let hop = |link, mtu: Option<u16>| Hop {
        gateway: [0; 4],
        link,
        mtu: match mtu {
            Some(mtu) if has_fib_mtu() => mtu.into(),
            _ => u32::MAX,
        },
        resolved: mtu.is_some(),
        hardware: Bytes(hardware),
    };
    // Of IPv6 the first address of a network is every router's (RFC 4291, section 2.6.1).
    let own = [Some(ROUTER), (family == Family::V6).then_some(0)];
    let mut own = own.into_iter().flatten();
    if own.any(|host| is(Net::NEAR, host) || is(Net::ELSEWHERE, host))
        || destination == family.overlay(1)
    {
        Err(Verdict::SlowToRouter)
    } else if inside(Net::PROHIBITED) {
        Err(Verdict::SlowFib)
    } else if is(Net::NEAR, GATEWAY) || inside(Net::SNAT) {
        fitting(len, LINK_MTU).map(|mtu| hop(nic, Some(mtu)))
    } else if inside(Net::NARROW) {
        fitting(len, NARROW_MTU).map(|mtu| hop(nic, Some(mtu)))
    } else if inside(Net::ELSEWHERE) {
        Ok(hop(elsewhere, None))
    } else if inside(Net::NEAR) || inside(Net::UNRESOLVED) {
        Ok(hop(nic, None))
    } else if (0..=255).any(|host| destination == family.overlay(host)) {
        Ok(hop(tun, None))
    } else {
        Err(Verdict::SlowToRouter)
    }
}

/// Kernels that do not tell the MTU are asked with the packet's length.
fn fitting(len: u32, mtu: u16) -> Result<u16, Verdict> {
    if len > mtu.into() {
        Err(Verdict::SlowMtu)
    } else {
        Ok(mtu)
    }
}

/// What the host's code makes of a packet.
fn on_the_host(
    fixture: &Fixture,
    world: &mut World,
    side: Side,
    bytes: &[u8],
    gso_size: u32,
) -> (Outcome, Option<Forward>) {
    let mut frame = Memory::new(side, bytes.to_vec(), gso_size);
    let plain = [[8, 0], [0x86, 0xdd]];
    let for_us = side == Side::Overlay
        || bytes[..6] == fixture.mac && plain.iter().any(|ethertype| bytes[12..14] == *ethertype);
    let (verdict, forward) = if for_us {
        world.run(side, &mut frame)
    } else {
        (Verdict::PassUnrelated, None)
    };
    let exit = forward.map(|forward| forward.exit);
    let code = match (exit, verdict.class()) {
        (Some(Exit::Stack), _) => NEXT,
        (Some(_), _) => REDIRECT,
        (None, Class::Drop | Class::Reject) => SHOT,
        (None, _) => NEXT,
    };
    let outcome = Outcome {
        code,
        verdict,
        bytes: frame.bytes,
    };
    (outcome, forward)
}

#[test]
fn kernel_and_host_agree_on_any_packet() {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<u64>().expect("a number"))
    };
    let (first, batches) = match number("SLUICE_FUZZ_SEED") {
        Some(seed) => (seed, 1),
        None => {
            let cases = number("SLUICE_FUZZ_CASES").unwrap_or(CASES);
            (SEED, cases.div_ceil(BATCH))
        }
    };
    lab::test(|lab| {
        let seen = router(lab)?.enter(|| {
            let options = Options {
                sweep: false,
                limits: Limits {
                    flows_per_source: LIMIT,
                    ..Limits::default()
                },
                ..Options::default()
            };
            let mut fixture = Fixture::with("eth0", options)?;
            let mut maps = Maps::of(&fixture.ebpf)?;
            let mut seen = HashSet::new();
            for seed in first..first + batches {
                if seed == first || seed % 64 == 0 {
                    // With rules and without them by turns.
                    let rules = if seed / 64 % 2 == 0 {
                        vec![rule()]
                    } else {
                        vec![]
                    };
                    let reject = seed / 128 % 2 == 0;
                    fixture.change(|spec| {
                        spec.policy.rules = rules;
                        spec.policy.denied = if reject { Denied::Reject } else { Denied::Drop };
                    })?;
                }
                let mut settings = maps.settings.get(&0, 0)?;
                settings.ports = [PORT; 2];
                // Now and then the router drains.
                settings.flags &= !Settings::DRAINING;
                if seed % 8 == 7 {
                    settings.flags |= Settings::DRAINING;
                }
                maps.settings.set(0, settings, 0)?;
                maps.clear()?;
                fixture.ebpf.end_flows()?;
                batch(&mut fixture, &mut maps, seed, &mut seen)
                    .with_context(|| format!("SLUICE_FUZZ_SEED={seed}"))?;
            }
            let counted = fixture.ebpf.counters()?;
            let total: u64 = counted.iter().map(|counter| counter.packets).sum();
            let sent = batches * BATCH;
            ensure!(total == sent, "{total} packets counted of {sent}");
            anyhow::Ok(seen)
        })??;
        if batches * BATCH >= 20_000 {
            // The settings do not lead there, and nothing runs out of memory.
            let rare = [
                Verdict::SlowSnat,
                Verdict::SlowScope,
                Verdict::DropLinkLocal,
                Verdict::DropTableFull,
                Verdict::DropOtherLink,
                Verdict::DropInternal,
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

/// All may go anywhere, but not to high ports.
fn rule() -> Rule {
    Rule {
        sources: ["0.0.0.0/0", "::/0"]
            .map(|cidr| cidr.parse().unwrap())
            .into(),
        destinations: ["0.0.0.0/0", "::/0"]
            .map(|cidr| Destination {
                cidr: cidr.parse().unwrap(),
                ports: 0..=LAST_PORT,
            })
            .into(),
        protocols: vec![],
        ..Rule::default()
    }
}

fn batch(
    fixture: &mut Fixture,
    maps: &mut Maps,
    seed: u64,
    seen: &mut HashSet<Verdict>,
) -> anyhow::Result<()> {
    let mut world = world(fixture, maps.settings.get(&0, 0)?);
    let mut traffic = Traffic {
        random: Random(seed),
        left: Vec::new(),
    };
    for number in 0..BATCH {
        if seed.is_multiple_of(SETTLING) && number % (BATCH / 3) == BATCH / 6 {
            fixture.ebpf.settle_flows()?;
        }
        let (verdict, left) = compare(fixture, &mut world, &mut traffic)
            .with_context(|| format!("packet {number}"))?;
        seen.insert(verdict);
        if let Some(left) = left
            && traffic.left.len() < 64
        {
            traffic.left.push(left);
        }
    }
    let on_the_host: Table = world
        .flows()
        .into_iter()
        .map(|(side, tuple, flow)| ((side as u8, tuple), timeless(flow)))
        .collect();
    let in_the_kernel = flows(&fixture.ebpf)?;
    for (key, flow) in &on_the_host {
        let other = in_the_kernel.get(key);
        ensure!(
            other == Some(flow),
            "{key:?}: {flow:?} on the host, {other:?} in the kernel"
        );
    }
    ensure!(
        in_the_kernel.len() == on_the_host.len(),
        "the kernel has {} entries, the host {}",
        in_the_kernel.len(),
        on_the_host.len()
    );
    Ok(())
}

fn compare(
    fixture: &mut Fixture,
    world: &mut World,
    traffic: &mut Traffic,
) -> anyhow::Result<(Verdict, Option<(Side, Ip)>)> {
    let (side, ip, gso_size) = traffic.next();
    let random = &mut traffic.random;
    let packet = damaged(random, &ip);
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
    let (on_the_host, forward) = on_the_host(fixture, world, side, &bytes, gso_size);
    let exit = forward.map(|forward| forward.exit);
    if exit == Some(Exit::Answer) {
        use_up(fixture, Budget::Answers, 0)?;
    }
    let is_error = forward.is_some_and(|forward| forward.answer != Answer::Reset);
    if side == Side::Overlay && exit == Some(Exit::Answer) && is_error {
        // TEST_RUN takes the EtherType from within a packet that has none, and with a wrong one the
        // kernel puts no headers in front. The real thing is in `flows.rs`.
        let (code, _) = fixture.test_run(side, &bytes, gso_size)?;
        ensure!(code == SHOT, "{code} in the kernel");
        return Ok((on_the_host.verdict, None));
    }
    let counted = |fixture: &Fixture| fixture.ebpf.counter(side, on_the_host.verdict);
    let before = counted(fixture)?.packets;
    let (code, out) = fixture.test_run(side, &bytes, gso_size)?;
    if counted(fixture)?.packets != before + 1
        || code != on_the_host.code
        || out != on_the_host.bytes
    {
        let counters = fixture.ebpf.counters()?;
        let counters: Vec<_> = counters.iter().filter(|c| c.packets > 0).collect();
        anyhow::bail!(
            "{side:?}, GSO size {gso_size}: {:?} {} on the host, {code} in the kernel, of {} bytes:\n{:02x?}\nhost\n{:02x?}\nkernel\n{:02x?}\n{counters:?}",
            on_the_host.verdict,
            on_the_host.code,
            bytes.len(),
            &bytes[..bytes.len().min(120)],
            &on_the_host.bytes[..on_the_host.bytes.len().min(150)],
            &out[..out.len().min(150)],
        );
    }
    let whole = matches!(exit, Some(Exit::Tun | Exit::Ethernet | Exit::Neighbour));
    let left = if whole { Ip::read(&out[14..]) } else { None };
    Ok((on_the_host.verdict, left.map(|left| (side, left))))
}

//! The policy in the kernel: what its tables say of a new flow, and how a change is made.

use std::ops::RangeInclusive;

use anyhow::ensure;
use aya::programs::{TestRun, TestRunOptions};
use router::control::{Destination, Direction, Policy, Rule};
use router::datapath::policy::{NewFlow, TCP, UDP, allows, is_restricted};
use router_ebpf::craft::{Ip, SYN, frame};

use super::differential::Random;
use super::fixture::*;

/// What the programs say of a flow: the number of the clause that lets it through.
fn clause(fixture: &mut Fixture, flow: &NewFlow) -> anyhow::Result<Option<u32>> {
    let NewFlow {
        source,
        destination,
        ..
    } = *flow;
    let mut packet = match flow.protocol {
        TCP => Ip::tcp(source, destination, SYN, &[], 0),
        UDP => Ip::udp(source, destination, 10),
        other => Ip::new(source, destination, other, vec![0; 20]),
    };
    if matches!(flow.protocol, TCP | UDP) {
        packet.payload[2..4].copy_from_slice(&flow.port.to_be_bytes());
    }
    let bytes = frame([0; 6], [0; 6], &packet.bytes());
    let program = fixture.ebpf.policy_probe()?;
    let result = program.test_run(TestRunOptions {
        data_in: Some(&bytes),
        ..TestRunOptions::default()
    })?;
    Ok(result.return_value.checked_sub(1))
}

fn inside(body: impl FnOnce(&mut Fixture) -> anyhow::Result<()> + Send) {
    lab::test(|lab| router(lab)?.enter(|| body(&mut Fixture::new(None)?))?);
}

fn rule(from: &str, to: &str, ports: RangeInclusive<u16>, protocols: &[u8]) -> Rule {
    Rule {
        sources: vec![from.parse().unwrap()],
        destinations: vec![Destination {
            cidr: to.parse().unwrap(),
            ports,
        }],
        protocols: protocols.to_vec(),
        ..Rule::default()
    }
}

fn flow(family: Family, peer: u8, host: u8, protocol: u8, port: u16) -> NewFlow {
    NewFlow {
        source: family.overlay(peer),
        destination: family.subnet(Net::NEAR, host),
        protocol,
        port,
    }
}

/// A rule over a few hosts of each family, so that prefixes and ranges meet.
fn random_rule(random: &mut Random) -> Rule {
    // Sometimes about what the subnet side opens.
    let mut inward = random.below(4) == 0;
    let mut net = |make: &dyn Fn(Family, u8) -> std::net::IpAddr| {
        let address = make(random.pick(&FAMILIES), random.below(8) as u8);
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let shorter = random.pick(&[0, 0, 1, 2, 3, 16]);
        ipnet::IpNet::new(address, longest - shorter)
            .unwrap()
            .trunc()
    };
    let mut side = |inward: bool| {
        net(&|family, n| match inward {
            true => family.subnet(Net::NEAR, n),
            false => family.overlay(n),
        })
    };
    let sources = (0..2).map(|_| side(inward)).collect();
    inward = !inward;
    let cidrs = [0; 3].map(|_| side(inward));
    let destinations = cidrs.map(|cidr| {
        let ports = [random.below(8) as u16, random.below(8) as u16];
        let ports = match random.below(4) {
            0 => 0..=u16::MAX,
            _ => ports[0].min(ports[1])..=ports[0].max(ports[1]),
        };
        Destination { cidr, ports }
    });
    Rule {
        sources,
        destinations: destinations.to_vec(),
        protocols: random
            .pick(&[&[][..], &[6], &[17], &[1, 58], &[47, 6]])
            .to_vec(),
        direction: random.pick(&[
            Direction::Both,
            Direction::FromOverlay,
            Direction::ToOverlay,
        ]),
    }
}

fn random_flow(random: &mut Random) -> NewFlow {
    // The router has the first address.
    let (peer, host) = (2 + random.below(9) as u8, random.below(9) as u8);
    let protocol = random.pick(&[TCP, TCP, UDP, 1, 58, 47]);
    flow(
        random.pick(&FAMILIES),
        peer,
        host,
        protocol,
        random.below(9) as u16,
    )
}

#[test]
fn the_kernel_finds_what_the_rules_mean() {
    inside(|fixture| {
        let mut random = Random(0x5105_ce06);
        let mut outcomes = [0; 2];
        for round in 0..24 {
            let rules = random.pick(&[1, 2, 5, 70, 300]);
            let policy = Policy {
                rules: (0..rules).map(|_| random_rule(&mut random)).collect(),
                ..Policy::default()
            };
            fixture.change(|spec| spec.policy = policy.clone())?;
            for _ in 0..300 {
                let mut flow = random_flow(&mut random);
                let from_overlay = random.below(3) > 0;
                if !from_overlay {
                    std::mem::swap(&mut flow.source, &mut flow.destination);
                }
                if !is_restricted(&policy, from_overlay) {
                    continue;
                }
                let found = clause(fixture, &flow)?.is_some();
                ensure!(
                    found == allows(&policy, from_overlay, &flow),
                    "round {round}: {flow:?}: the kernel says {found}: {policy:#?}"
                );
                outcomes[usize::from(found)] += 1;
            }
        }
        ensure!(outcomes.iter().all(|count| *count > 500), "{outcomes:?}");
        Ok(())
    });
}

#[test]
fn hits_are_counted_by_rule_and_outlive_a_change() {
    inside(|fixture| {
        let ssh = rule("100.64.0.0/24", "10.20.0.0/16", 22..=22, &[TCP]);
        let web = rule("100.64.0.0/24", "10.20.0.0/16", 80..=90, &[TCP]);
        let dns = rule("fd64::/64", "2001:db8:20::/64", 53..=53, &[UDP]);
        fixture.change(|spec| spec.policy.rules = vec![ssh.clone(), web.clone(), dns.clone()])?;
        for (count, flow) in [
            (1, flow(Family::V4, 2, 1, TCP, 22)),
            (2, flow(Family::V4, 2, 1, TCP, 85)),
            (3, flow(Family::V6, 2, 1, UDP, 53)),
        ] {
            for _ in 0..count {
                ensure!(clause(fixture, &flow)?.is_some(), "{flow:?}");
            }
        }
        ensure!(clause(fixture, &flow(Family::V4, 2, 1, TCP, 443))?.is_none());
        ensure!(fixture.ebpf.rule_hits()? == [1, 2, 3]);

        let new = rule("100.64.0.2/32", "10.20.0.0/16", 443..=443, &[TCP]);
        fixture.change(|spec| spec.policy.rules = vec![dns, new, web])?;
        ensure!(fixture.ebpf.rule_hits()? == [3, 0, 2]);
        ensure!(clause(fixture, &flow(Family::V4, 2, 1, TCP, 80))?.is_some());
        ensure!(clause(fixture, &flow(Family::V4, 2, 1, TCP, 443))?.is_some());
        ensure!(clause(fixture, &flow(Family::V4, 2, 1, TCP, 22))?.is_none());
        ensure!(fixture.ebpf.rule_hits()? == [3, 1, 3]);
        Ok(())
    });
}

#[test]
fn a_refused_policy_leaves_the_old_one_in_force() {
    inside(|fixture| {
        let one = |port: u16| rule("100.64.0.0/24", "10.20.0.0/16", port..=port, &[TCP]);
        fixture.change(|spec| spec.policy.rules = vec![one(22)])?;
        let mut too_many = fixture.spec.clone();
        too_many.policy.rules = (1..=5000).map(one).collect();
        let refused = router::datapath::Datapath::apply(&mut fixture.ebpf, &too_many);
        let error = refused.err().map(|error| error.to_string());
        ensure!(
            error.as_deref().is_some_and(|text| text.contains("4096")),
            "{error:?}"
        );
        ensure!(clause(fixture, &flow(Family::V4, 2, 1, TCP, 22))?.is_some());
        ensure!(clause(fixture, &flow(Family::V4, 2, 1, TCP, 23))?.is_none());
        Ok(())
    });
}

#[test]
fn changes_leave_nothing_behind() {
    inside(|fixture| {
        // More sets in all than the map holds.
        for round in 0..20u16 {
            let rules = (0..2000).map(|n| {
                let port = 1 + round + 30 * n;
                rule("100.64.0.0/24", "10.20.0.0/16", port..=port, &[TCP])
            });
            fixture.change(|spec| spec.policy.rules = rules.collect())?;
            for (allowed, port) in [
                (true, 1 + round),
                (false, 2 + round),
                (true, 1 + round + 30),
            ] {
                let found = clause(fixture, &flow(Family::V4, 2, 1, TCP, port))?;
                ensure!(found.is_some() == allowed, "round {round}, port {port}");
            }
        }
        fixture.change(|spec| spec.policy.rules.clear())?;
        ensure!(fixture.ebpf.rule_hits()?.is_empty());
        ensure!(clause(fixture, &flow(Family::V4, 2, 1, TCP, 20))?.is_none());
        Ok(())
    });
}

/// What a search costs is told, not judged.
#[test]
fn a_search_among_many_rules_is_measured() {
    inside(|fixture| {
        for rules in [1, 100, 1000u32] {
            let one = |n: u32| {
                let source = std::net::Ipv4Addr::from(0x6440_0000 + n);
                let near = std::net::Ipv4Addr::from(0x0a14_0000 + 16 * n);
                let port = 1000 + n as u16;
                rule(
                    &format!("{source}/32"),
                    &format!("{near}/28"),
                    port..=port + 100,
                    &[TCP],
                )
            };
            fixture.change(|spec| spec.policy.rules = (0..rules).map(one).collect())?;
            let last = rules - 1;
            let source = std::net::Ipv4Addr::from(0x6440_0000 + last).into();
            let near = std::net::Ipv4Addr::from(0x0a14_0001 + 16 * last).into();
            let mut packet = Ip::tcp(source, near, SYN, &[], 0);
            packet.payload[2..4].copy_from_slice(&(1050 + last as u16).to_be_bytes());
            let result = fixture.ebpf.policy_probe()?.test_run(TestRunOptions {
                data_in: Some(&frame([0; 6], [0; 6], &packet.bytes())),
                repeat: 100_000,
                ..TestRunOptions::default()
            })?;
            ensure!(
                result.return_value == rules,
                "clause {}",
                result.return_value
            );
            println!("{rules} rules: {:?} a packet", result.duration);
            ensure!(fixture.ebpf.rule_hits()?[last as usize] == 100_000);
        }
        Ok(())
    });
}

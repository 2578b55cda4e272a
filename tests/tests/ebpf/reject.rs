//! What the programs answer when the policy denies a packet.

use anyhow::{Context, ensure};
use router::control::{Denied, Policy, Rule};
use router_ebpf::abi::{Budget, Side};
use router_ebpf::craft::*;
use router_ebpf::verdict::Verdict;

use super::fixture::*;
use super::frames::ends;

/// Runs `body` with a fixture whose rules let nothing through, and whose senders are told.
fn inside(body: impl FnOnce(&mut Fixture) -> anyhow::Result<()> + Send) {
    lab::test(|lab| {
        router(lab)?.enter(|| {
            let mut fixture = Fixture::new(None)?;
            fixture.change(|spec| {
                spec.policy = Policy {
                    rules: vec![Rule {
                        sources: vec![],
                        destinations: vec![],
                        protocols: vec![],
                        ..Rule::default()
                    }],
                    denied: Denied::Reject,
                }
            })?;
            body(&mut fixture)
        })?
    });
}

/// See [`use_up`].
fn use_up_answers(fixture: &Fixture, until: u64) -> anyhow::Result<()> {
    use_up(fixture, Budget::Answers, until)
}

/// The program's answer to `packet`, from its IP header on.
fn answer(
    fixture: &mut Fixture,
    side: Side,
    packet: &Ip,
    gso_size: u32,
) -> anyhow::Result<(Verdict, Vec<u8>)> {
    use_up_answers(fixture, 0)?;
    let (ours, theirs) = (fixture.mac, fixture.gateway_mac);
    let input = match side {
        Side::Overlay => packet.bytes(),
        Side::Subnet => frame(ours, theirs, &packet.bytes()),
    };
    let outcome = fixture.run(side, &input, gso_size)?;
    if outcome.verdict != Verdict::RejectPolicy {
        ensure!(outcome.code != REDIRECT && outcome.bytes == input);
        return Ok((outcome.verdict, Vec::new()));
    }
    ensure!(outcome.code == REDIRECT, "return code {}", outcome.code);
    let offset = side.header_offset() as usize;
    if side == Side::Subnet {
        let back = [theirs, ours].concat();
        ensure!(outcome.bytes[..12] == back, "to who sent it");
    }
    Ok((outcome.verdict, outcome.bytes[offset..].to_vec()))
}

#[test]
fn tcp_gets_an_rst() {
    inside(|fixture| {
        for family in FAMILIES {
            for side in Side::ALL {
                let (source, destination) = ends(family, side);
                for (name, flags, options, len, gso_size, wanted, numbers) in [
                    ("SYN", SYN, 20, 0, 0, RST | ACK, (0, 1001)),
                    ("SYN with data", SYN, 0, 100, 0, RST | ACK, (0, 1101)),
                    ("no flags", 0, 0, 0, 0, RST | ACK, (0, 1000)),
                    ("FIN", FIN, 0, 10, 0, RST | ACK, (0, 1011)),
                    ("SYN, ACK", SYN | ACK, 4, 0, 0, RST, (77, 0)),
                    ("ACK", ACK, 12, 0, 0, RST, (77, 0)),
                    ("data", ACK, 12, 1200, 0, RST, (77, 0)),
                    ("super-packet", ACK, 12, 3000, 1348, RST, (77, 0)),
                ] {
                    let sent = Ip::tcp(source, destination, flags, &vec![1; options], len)
                        .sequence(1000, 77);
                    let (verdict, bytes) = answer(fixture, side, &sent, gso_size)?;
                    let context = || format!("{family:?} {side:?} {name}");
                    ensure!(
                        verdict == Verdict::RejectPolicy,
                        "{} {verdict:?}",
                        context()
                    );
                    let mut reset = Ip::read(&bytes).with_context(context)?;
                    ensure!(reset.bytes() == bytes, "{}: more than one", context());
                    ensure!(reset.transport_sum() == u16::MAX, "{}: checksum", context());
                    let mut expected = Ip::tcp(destination, source, wanted, &[], 0)
                        .ports(443, 40_000)
                        .sequence(numbers.0, numbers.1);
                    // The window is anything, and the checksum was looked at.
                    for ip in [&mut reset, &mut expected] {
                        ip.payload[14..18].fill(0);
                        ip.id = 0;
                    }
                    ensure!(
                        reset == expected,
                        "{}: {reset:?}, not {expected:?}",
                        context()
                    );
                }
                let reset = Ip::tcp(source, destination, RST | ACK, &[], 0);
                let (verdict, _) = answer(fixture, side, &reset, 0)?;
                ensure!(verdict == Verdict::DropPolicy, "an RST: {verdict:?}");
            }
        }
        Ok(())
    });
}

/// From the overlay TEST_RUN puts no headers in front; see the lab's tests of the policy.
#[test]
fn all_else_gets_an_icmp_error() {
    inside(|fixture| {
        for family in FAMILIES {
            let (source, destination) = ends(family, Side::Subnet);
            let kind = match family {
                Family::V4 => [3, 13],
                Family::V6 => [1, 1],
            };
            for sent in [
                Ip::udp(source, destination, 100),
                Ip::echo(source, destination),
            ] {
                let (verdict, bytes) = answer(fixture, Side::Subnet, &sent, 0)?;
                ensure!(verdict == Verdict::RejectPolicy, "{verdict:?}");
                let error = Ip::read(&bytes).context("no packet")?;
                ensure!((error.source, error.destination) == (destination, source));
                ensure!(error.payload[..2] == kind, "{:?}", &error.payload[..8]);
                ensure!(error.payload[4..8] == [0; 4], "{:?}", &error.payload[..8]);
                ensure!(error.transport_sum() == u16::MAX, "checksum");
                let header = if family == Family::V4 { 20 } else { 40 };
                ensure!(error.payload[8..][..header] == sent.bytes()[..header]);
            }
        }
        Ok(())
    });
}

#[test]
fn what_must_not_be_answered_is_not() {
    inside(|fixture| {
        for family in FAMILIES {
            let peer = family.overlay(PEER);
            let router = family.subnet(Net::NEAR, ROUTER);
            let mut own = vec![router];
            if family == Family::V4 {
                // The broadcast address of eth0's network.
                own.push(family.subnet(Net::NEAR, 255));
            }
            for address in own {
                let to_router = Ip::tcp(peer, address, SYN, &[], 0);
                let (verdict, _) = answer(fixture, Side::Overlay, &to_router, 0)?;
                ensure!(verdict == Verdict::SlowToRouter, "{address}: {verdict:?}");
            }
            for (side, until, wanted) in [
                (Side::Overlay, u64::MAX / 2, Verdict::DropPolicy),
                (Side::Subnet, u64::MAX / 2, Verdict::DropPolicy),
                (Side::Overlay, 0, Verdict::RejectPolicy),
            ] {
                use_up_answers(fixture, until)?;
                let (source, destination) = ends(family, side);
                let syn = Ip::tcp(source, destination, SYN, &[], 0).bytes();
                let input = match side {
                    Side::Overlay => syn,
                    Side::Subnet => frame(fixture.mac, fixture.gateway_mac, &syn),
                };
                let outcome = fixture.run(side, &input, 0)?;
                ensure!(outcome.verdict == wanted, "{side:?}: {:?}", outcome.verdict);
                ensure!((outcome.code == SHOT) == (wanted == Verdict::DropPolicy));
            }
        }
        Ok(())
    });
}

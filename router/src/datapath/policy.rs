//! The meaning of the policy in plain code: what every datapath must agree with.

use std::net::IpAddr;
use std::ops::RangeInclusive;

use crate::control::{Policy, Rule};

/// TCP.
pub const TCP: u8 = libc::IPPROTO_TCP as u8;
/// UDP.
pub const UDP: u8 = libc::IPPROTO_UDP as u8;

/// A new flow, as its first packet shows it before any translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewFlow {
    /// Source.
    pub source: IpAddr,
    /// Destination.
    pub destination: IpAddr,
    /// IP protocol.
    pub protocol: u8,
    /// Destination port, host byte order; only looked at for TCP and UDP.
    pub port: u16,
}

/// The ICMP of an address family.
pub fn icmp(ipv4: bool) -> u8 {
    if ipv4 {
        libc::IPPROTO_ICMP as u8
    } else {
        libc::IPPROTO_ICMPV6 as u8
    }
}

/// The ports that `rule` lets through for an IP protocol to a destination that it names with the
/// ports `named`; `None` when none. Protocols without ports are let through whole or not at all.
///
/// ICMP is let through wherever anything is, whatever the rule's protocols are: who may use a
/// service may ping its host. Other protocols than TCP and UDP need a rule for all ports.
pub fn ports(
    rule: &Rule,
    named: &RangeInclusive<u16>,
    protocol: u8,
    ipv4: bool,
) -> Option<(u16, u16)> {
    const ALL: (u16, u16) = (0, u16::MAX);
    if named.is_empty() {
        return None;
    }
    if protocol == icmp(ipv4) {
        return Some(ALL);
    }
    let ports = (*named.start(), *named.end());
    let with_ports = matches!(protocol, TCP | UDP);
    let meant = if rule.protocols.is_empty() {
        with_ports
    } else {
        rule.protocols.contains(&protocol)
    };
    (meant && (with_ports || ports == ALL)).then_some(ports)
}

/// Whether some rule is about flows that peers open (`from_overlay`), or about those opened to them.
pub fn is_restricted(policy: &Policy, from_overlay: bool) -> bool {
    let covers = |rule: &Rule| rule.direction.covers(from_overlay);
    policy.rules.iter().any(covers)
}

/// Whether `policy` lets a new flow through that a peer opens (`from_overlay`), or that is opened to
/// one. Without rules for that direction it has no say: then the routes decide alone.
pub fn allows(policy: &Policy, from_overlay: bool, flow: &NewFlow) -> bool {
    let concerned = |rule: &&Rule| {
        rule.direction.covers(from_overlay)
            && rule.sources.iter().any(|net| net.contains(&flow.source))
    };
    let ipv4 = flow.destination.is_ipv4();
    !is_restricted(policy, from_overlay)
        || policy.rules.iter().filter(concerned).any(|rule| {
            rule.destinations.iter().any(|destination| {
                destination.cidr.contains(&flow.destination)
                    && ports(rule, &destination.ports, flow.protocol, ipv4).is_some_and(
                        |(first, last)| {
                            !matches!(flow.protocol, TCP | UDP)
                                || (first..=last).contains(&flow.port)
                        },
                    )
            })
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::control::{Destination, Direction};

    fn rule(protocols: &[u8], destination: &str, ports: std::ops::RangeInclusive<u16>) -> Policy {
        Policy {
            rules: vec![Rule {
                sources: vec!["100.64.0.0/24".parse().unwrap()],
                destinations: vec![Destination {
                    cidr: destination.parse().unwrap(),
                    ports,
                }],
                protocols: protocols.to_vec(),
                ..Rule::default()
            }],
            ..Policy::default()
        }
    }

    fn flow(source: &str, destination: &str, protocol: u8, port: u16) -> NewFlow {
        NewFlow {
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            protocol,
            port,
        }
    }

    #[test]
    fn the_meaning_of_a_rule() {
        let peer = "100.64.0.2";
        let web = rule(&[], "10.0.0.0/8", 80..=90);
        for (allowed, source, destination, protocol, port) in [
            (true, peer, "10.1.2.3", TCP, 80),
            (true, peer, "10.1.2.3", UDP, 90),
            (true, peer, "10.1.2.3", 1, 0),
            (false, peer, "10.1.2.3", TCP, 91),
            (false, peer, "11.1.2.3", TCP, 80),
            (false, "100.64.1.2", "10.1.2.3", TCP, 80),
            (false, peer, "10.1.2.3", 47, 0),
        ] {
            let flow = flow(source, destination, protocol, port);
            assert_eq!(allows(&web, true, &flow), allowed, "{flow:?}");
        }
    }

    #[test]
    fn protocols_are_what_the_rule_names() {
        let to = |protocol| flow("100.64.0.2", "10.1.2.3", protocol, 53);
        let dns = rule(&[UDP], "10.0.0.0/8", 53..=53);
        assert_eq!(
            [UDP, TCP, 1].map(|p| allows(&dns, true, &to(p))),
            [true, false, true]
        );
        let gre = rule(&[47], "10.0.0.0/8", 0..=65535);
        assert_eq!(
            [47, 50, TCP].map(|p| allows(&gre, true, &to(p))),
            [true, false, false]
        );
        let gre = rule(&[47], "10.0.0.0/8", 0..=65534);
        assert!(!allows(&gre, true, &to(47)));
        assert!(allows(&Policy::default(), true, &to(47)));
    }

    #[test]
    fn a_rule_is_about_the_flows_of_its_direction() {
        let flow = flow("100.64.0.2", "10.1.2.3", TCP, 22);
        for (direction, from_overlay, to_overlay) in [
            (Direction::Both, false, false),
            // The other direction is open.
            (Direction::FromOverlay, false, true),
            (Direction::ToOverlay, true, false),
        ] {
            let mut web = rule(&[], "10.0.0.0/8", 80..=80);
            web.rules[0].direction = direction;
            let allowed = [true, false].map(|from| allows(&web, from, &flow));
            assert_eq!(allowed, [from_overlay, to_overlay], "{direction:?}");
        }
    }
}

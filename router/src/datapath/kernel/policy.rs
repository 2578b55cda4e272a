//! The policy as sets that nf_tables can search.
//!
//! Sources fall into classes: addresses to which the same rules apply. A packet's class is found
//! in a map of ranges, and (protocol, destination, port) in the set of that class: boxes that do
//! not overlap, which the kernel requires of ranges over several fields. Two searches decide about
//! a flow, however many rules there are. Rules for all sources stand in a set of their own, so
//! that they are not repeated for each class.

use std::collections::{BTreeMap, HashMap};

use super::span::{Family, Span, intersect, merge, partition, span, union};
use crate::control::{Policy, Rule};
use crate::datapath::policy::{TCP, UDP, icmp, ports};
use crate::netlink::nft::Flows;

/// The policy of one address family for the sources of one side.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Compiled {
    /// What every source may reach.
    pub(super) any: Vec<Flows>,
    /// Sources, with the number of their class.
    pub(super) sources: Vec<(Span, usize)>,
    /// What each class may reach beyond that.
    pub(super) classes: Vec<Vec<Flows>>,
}

impl Compiled {
    /// Whether the policy lets a new flow through, found as the kernel finds it.
    pub(super) fn allows(&self, source: u128, destination: u128, protocol: u8, port: u16) -> bool {
        let fits = |flows: &Flows| {
            flows.protocol == protocol
                && (flows.destinations.0..=flows.destinations.1).contains(&destination)
                && (flows.ports.0..=flows.ports.1).contains(&port)
        };
        let behind = self
            .sources
            .partition_point(|((first, _), _)| *first <= source);
        let class = behind
            .checked_sub(1)
            .and_then(|at| self.sources.get(at))
            .filter(|((_, last), _)| *last >= source)
            .and_then(|(_, class)| self.classes.get(*class));
        self.any.iter().chain(class.into_iter().flatten()).any(fits)
    }
}

/// Compiles the policy for sources within `side`, which is in order.
pub(super) fn compile(policy: &Policy, family: Family, side: &[Span]) -> Compiled {
    let mut for_all = Vec::new();
    let mut labelled = Vec::new();
    for (rule, index) in policy.rules.iter().zip(0u32..) {
        let sources = intersect(&union(&rule.sources, family), side);
        if sources == side && !side.is_empty() {
            for_all.push(rule);
        } else {
            labelled.extend(sources.into_iter().map(|span| (span, index)));
        }
    }
    let mut compiled = Compiled {
        any: flows(&for_all, family),
        ..Compiled::default()
    };
    let mut numbers: HashMap<Vec<u32>, usize> = HashMap::new();
    for (span, rules) in partition(&labelled) {
        let class = *numbers.entry(rules).or_insert_with_key(|rules| {
            let rules: Vec<&Rule> = rules
                .iter()
                .filter_map(|index| policy.rules.get(*index as usize))
                .collect();
            compiled.classes.push(flows(&rules, family));
            compiled.classes.len() - 1
        });
        compiled.sources.push((span, class));
    }
    compiled
}

/// A range of destinations and one of ports, host byte order.
type Reach = (Span, (u16, u16));

/// What these rules let through, in boxes that do not overlap.
fn flows(rules: &[&Rule], family: Family) -> Vec<Flows> {
    let ipv4 = family == Family::V4;
    let mut by_protocol: BTreeMap<u8, Vec<Reach>> = BTreeMap::new();
    for rule in rules {
        let named: &[u8] = if rule.protocols.is_empty() {
            &[TCP, UDP]
        } else {
            &rule.protocols
        };
        let mut protocols = [named, &[icmp(ipv4)]].concat();
        protocols.sort_unstable();
        protocols.dedup();
        for destination in &rule.destinations {
            let Some(range) = span(&destination.cidr, family) else {
                continue;
            };
            for protocol in &protocols {
                if let Some(ports) = ports(rule, &destination.ports, *protocol, ipv4) {
                    by_protocol
                        .entry(*protocol)
                        .or_default()
                        .push((range, ports));
                }
            }
        }
    }
    let mut all = Vec::new();
    for (protocol, boxes) in by_protocol {
        for (destinations, ports) in disjoint(&boxes) {
            all.extend(ports.into_iter().map(|ports| Flows {
                protocol,
                destinations,
                ports,
            }));
        }
    }
    all
}

/// Destinations with the ports open there; neighbours with the same ports are one.
fn disjoint(boxes: &[Reach]) -> Vec<(Span, Vec<(u16, u16)>)> {
    let labelled: Vec<(Span, u32)> = boxes.iter().zip(0..).map(|((s, _), i)| (*s, i)).collect();
    let mut pieces: Vec<(Span, Vec<(u16, u16)>)> = Vec::new();
    for (span, labels) in partition(&labelled) {
        let ranges = labels
            .iter()
            .filter_map(|label| boxes.get(*label as usize))
            .map(|(_, (first, last))| (u128::from(*first), u128::from(*last)));
        let ports: Vec<(u16, u16)> = merge(ranges.collect())
            .into_iter()
            .map(|(first, last)| (first as u16, last as u16))
            .collect();
        match pieces.last_mut() {
            Some((before, same)) if before.1 + 1 == span.0 && *same == ports => before.1 = span.1,
            _ => pieces.push((span, ports)),
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::{IpAddr, Ipv4Addr};

    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::*;
    use crate::control::Destination;
    use crate::datapath::policy::{NewFlow, allows};

    fn overlap(a: &Flows, b: &Flows) -> bool {
        a.protocol == b.protocol
            && a.destinations.0.max(b.destinations.0) <= a.destinations.1.min(b.destinations.1)
            && a.ports.0.max(b.ports.0) <= a.ports.1.min(b.ports.1)
    }

    fn net() -> impl Strategy<Value = IpNet> {
        (0u32..16, 28u8..=32).prop_map(|(host, prefix)| {
            let address = IpAddr::from(Ipv4Addr::from(0x0a00_0000 + host));
            IpNet::new(address, prefix).unwrap().trunc()
        })
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let ports = prop_oneof![Just((0u16, 65535u16)), (0u16..6, 0u16..6)];
        let destination =
            (net(), ports).prop_map(|(cidr, (a, b))| Destination { cidr, ports: a..=b });
        let protocols = proptest::sample::subsequence(vec![1u8, 6, 17, 47, 58], 0..3);
        (
            proptest::collection::vec(net(), 1..4),
            proptest::collection::vec(destination, 1..4),
            protocols,
        )
            .prop_map(|(sources, destinations, protocols)| Rule {
                sources,
                destinations,
                protocols,
                ..Rule::default()
            })
    }

    proptest! {
        #[test]
        fn the_sets_mean_what_the_rules_mean(
            rules in proptest::collection::vec(rule(), 1..6),
            side in proptest::collection::vec(net(), 1..4),
        ) {
            let policy = Policy { rules, ..Policy::default() };
            let side = union(&side, Family::V4);
            let compiled = compile(&policy, Family::V4, &side);
            for set in compiled.classes.iter().chain([&compiled.any]) {
                for (i, a) in set.iter().enumerate() {
                    prop_assert!(set[i + 1..].iter().all(|b| !overlap(a, b)), "{set:?}");
                }
            }
            let base = 0x0a00_0000u32;
            for source in (base..base + 16).filter(|s| side.iter().any(|(a, b)| (*a..=*b).contains(&u128::from(*s)))) {
                for destination in base..base + 16 {
                    for protocol in [1, 6, 17, 47, 58] {
                        for port in [0, 1, 3, 5, 6, 65535] {
                            let flow = NewFlow {
                                source: IpAddr::from(Ipv4Addr::from(source)),
                                destination: IpAddr::from(Ipv4Addr::from(destination)),
                                protocol,
                                port,
                            };
                            // In protocols without ports the kernel may show any number there.
                            let want = allows(&policy, true, &flow);
                            let got = compiled.allows(source.into(), destination.into(), protocol, port);
                            prop_assert_eq!(got, want, "{:?}", flow);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_rule_for_every_peer_is_not_repeated_for_each() {
        let to = |port: u16| Destination {
            cidr: "10.0.0.0/8".parse().unwrap(),
            ports: port..=port,
        };
        let one = |n: u32| Rule {
            sources: vec![IpNet::from(IpAddr::from(Ipv4Addr::from(0x6440_0000 + n)))],
            destinations: vec![to(n as u16 + 1)],
            protocols: vec![TCP],
            ..Rule::default()
        };
        let mut rules: Vec<Rule> = (0..500).map(one).collect();
        rules.extend((0..500).map(|n| Rule {
            sources: vec!["100.64.0.0/10".parse().unwrap()],
            destinations: vec![to(10_000 + 2 * n)],
            protocols: vec![TCP],
            ..Rule::default()
        }));
        let side = union(&["100.64.0.0/10".parse().unwrap()], Family::V4);
        let compiled = compile(
            &Policy {
                rules,
                ..Policy::default()
            },
            Family::V4,
            &side,
        );
        // 500 ports, and ICMP.
        assert_eq!(compiled.any.len(), 501);
        assert_eq!(compiled.sources.len(), 500);
        assert!(compiled.classes.iter().all(|flows| flows.len() == 2));
    }

    #[test]
    fn rules_of_the_other_family_or_the_other_side_are_left_out() {
        let rules = vec![Rule {
            sources: vec![
                "100.64.0.0/10".parse().unwrap(),
                "fd7a::/64".parse().unwrap(),
            ],
            destinations: vec![Destination {
                cidr: "10.0.0.0/8".parse().unwrap(),
                ports: 0..=65535,
            }],
            ..Rule::default()
        }];
        let policy = Policy {
            rules,
            ..Policy::default()
        };
        let v6 = union(&["fd7a::/64".parse().unwrap()], Family::V6);
        assert_eq!(compile(&policy, Family::V6, &v6), Compiled::default());
        let subnet = union(&["10.0.0.0/8".parse().unwrap()], Family::V4);
        assert_eq!(compile(&policy, Family::V4, &subnet), Compiled::default());
        assert_eq!(compile(&policy, Family::V4, &[]), Compiled::default());
    }
}

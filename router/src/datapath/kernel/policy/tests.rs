#![allow(clippy::unwrap_used)]
use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;

use super::*;
use crate::control::{Destination, Direction};
use crate::datapath::policy::{NewFlow, allows};

fn net() -> impl Strategy<Value = IpNet> {
    (0u32..16, prop_oneof![Just(0u8), 28u8..=32]).prop_map(|(host, prefix)| {
        let address = IpAddr::from(Ipv4Addr::from(0x0a00_0000 + host));
        IpNet::new(address, prefix).unwrap().trunc()
    })
}

fn rule() -> impl Strategy<Value = Rule> {
    let ports = prop_oneof![Just((0u16, 65535u16)), (0u16..6, 0u16..6)];
    let destination = (net(), ports).prop_map(|(cidr, (a, b))| Destination { cidr, ports: a..=b });
    let protocols = proptest::sample::subsequence(vec![1u8, 6, 17, 47, 58], 0..3);
    let direction = proptest::sample::select(vec![
        Direction::Both,
        Direction::FromOverlay,
        Direction::ToOverlay,
    ]);
    (
        direction,
        proptest::collection::vec(net(), 1..4),
        proptest::collection::vec(destination, 1..4),
        protocols,
    )
        .prop_map(|(direction, sources, destinations, protocols)| Rule {
            direction,
            sources,
            destinations,
            protocols,
        })
}

proptest! {
    #[test]
    fn the_tree_means_what_the_rules_mean(
        rules in proptest::collection::vec(rule(), 1..6),
        subnet in proptest::collection::vec(net(), 1..4),
    ) {
        let policy = Policy { rules, ..Policy::default() };
        let subnet = union(&subnet, Family::V4);
        let compiled = Compiled::new(&policy, Family::V4, &subnet);
        for tree in [&compiled.from, &compiled.to] {
            for level in &tree.levels {
                prop_assert!(level.windows(2).all(|w| w[0].0.1 < w[1].0.0), "{level:?}");
            }
        }
        let base = 0x0a00_0000u32;
        for from in [true, false] {
            for source in base..base + 16 {
                if !from && !holds(&subnet, source.into()) {
                    continue;
                }
                for destination in base..base + 16 {
                    for (protocol, port) in [(1, 9), (6, 0), (6, 3), (17, 5), (17, 6), (47, 3), (58, 0)] {
                        let flow = NewFlow {
                            source: IpAddr::from(Ipv4Addr::from(source)),
                            destination: IpAddr::from(Ipv4Addr::from(destination)),
                            protocol,
                            port,
                        };
                        let want = allows(&policy, from, &flow);
                        let ends = [source.into(), destination.into()];
                        let got = compiled.allows(from, ends, protocol, port);
                        prop_assert_eq!(got, want, "{:?} {}", flow, from);
                    }
                }
            }
        }
    }
}

#[test]
fn the_size_is_that_of_the_rules() {
    let peer = |n: u32| IpNet::from(IpAddr::from(Ipv4Addr::from(0x6440_0000 + n)));
    // Each peer is in other rules than any other.
    let rules = (0..2000u32).map(|n| Rule {
        sources: (0..50)
            .map(|i| peer((n * 7919 + i * 104_729) % 10_000))
            .collect(),
        destinations: vec![Destination {
            cidr: format!("10.{}.{}.0/24", n / 200, n % 200).parse().unwrap(),
            ports: 443..=443,
        }],
        ..Rule::default()
    });
    let policy = Policy {
        rules: rules.collect(),
        ..Policy::default()
    };
    let compiled = Compiled::new(&policy, Family::V4, &[]);
    assert_eq!(compiled.sources.len(), 2000);
    assert_eq!(compiled.from.levels.len(), 1);
    // TCP and UDP with their ports, and ICMP.
    assert!(
        compiled
            .from
            .openings
            .iter()
            .all(|openings| openings.len() == 2)
    );
    assert_eq!(compiled.from.openings.len(), 2000);
    assert_eq!(compiled.to.openings.len(), 0);
}

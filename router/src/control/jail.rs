//! Peers that may open no flows, whatever the rules say.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::{Direction, Peers, Policy, Rule};

/// Takes the addresses of jailed peers out of the sources of rules about what peers open. Only peers' addresses come as
/// sources there, so a network that holds a jailed one's is replaced by those of the others within it. What the subnet side
/// opens stays as it was: where a rule is about both, it goes on behind all others, whose places stay the same.
pub(super) fn close(policy: &mut Policy, peers: &Peers) {
    let jailed: BTreeSet<u32> = peers
        .iter()
        .filter(|peer| peer.jailed)
        .filter_map(|peer| peers.number(&peer.public_key))
        .collect();
    if jailed.is_empty() {
        return;
    }
    let owners = peers.allowed_ips();
    let mut more = Vec::new();
    for rule in policy
        .rules
        .iter_mut()
        .filter(|rule| rule.direction.covers(true))
    {
        let sources = rule
            .sources
            .iter()
            .flat_map(|net| free(net.trunc(), owners, &jailed));
        let sources: BTreeSet<IpNet> = sources.collect();
        let before: BTreeSet<IpNet> = rule.sources.iter().map(IpNet::trunc).collect();
        if rule.direction == Direction::Both && sources != before {
            more.push(Rule {
                direction: Direction::ToOverlay,
                ..rule.clone()
            });
            rule.direction = Direction::FromOverlay;
        }
        rule.sources = sources.into_iter().collect();
    }
    policy.rules.append(&mut more);
}

/// What of `net` is no jailed peer's.
fn free(net: IpNet, owners: &BTreeMap<IpNet, u32>, jailed: &BTreeSet<u32>) -> Vec<IpNet> {
    // Sorted, a network stands before all that it holds.
    let within = || {
        owners
            .range(net..)
            .take_while(|(inner, _)| net.contains(*inner))
    };
    let around = (0..=net.prefix_len()).rev().find_map(|length| {
        let outer = IpNet::new(net.addr(), length).ok()?.trunc();
        owners.get(&outer)
    });
    let is_jailed = |owner: &u32| jailed.contains(owner);
    let holds_jailed = within().any(|(_, owner)| is_jailed(owner));
    let lies_in_jailed = around.is_some_and(is_jailed);
    match (holds_jailed, lies_in_jailed) {
        (false, false) => vec![net],
        (false, true) => {
            let others = within().filter(|(_, owner)| !is_jailed(owner));
            others.map(|(inner, _)| *inner).collect()
        }
        (true, _) => {
            let mut free: Vec<IpNet> = Vec::new();
            let others = within().filter(|(_, owner)| !is_jailed(owner));
            for (inner, _) in others {
                free.extend(apart(*inner, owners, jailed));
            }
            free
        }
    }
}

/// A peer's network without the jailed ones in it.
fn apart(net: IpNet, owners: &BTreeMap<IpNet, u32>, jailed: &BTreeSet<u32>) -> Vec<IpNet> {
    let mut holes = owners
        .range(net..)
        .take_while(|(inner, _)| net.contains(*inner))
        .filter(|(_, owner)| jailed.contains(owner));
    if holes.next().is_none() {
        return vec![net];
    }
    let halves = net.subnets(net.prefix_len() + 1).into_iter().flatten();
    halves
        .filter(|half| !owners.get(half).is_some_and(|owner| jailed.contains(owner)))
        .flat_map(|half| apart(half, owners, jailed))
        .collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::{Combined, Delta, Peer, Update};
    use super::*;
    use crate::wireguard::keys::PublicKey;

    fn sources(peers: &[(&str, bool)], sources: &[&str]) -> Vec<String> {
        let peer = |(at, (net, jailed)): (usize, &(&str, bool))| Peer {
            name: None,
            public_key: PublicKey([at as u8 + 1; 32]),
            preshared_key: None,
            allowed_ips: vec![net.parse().unwrap()],
            endpoint: None,
            keepalive: None,
            roaming: true,
            masquerade: Vec::new(),
            jailed: *jailed,
        };
        let rule = Rule {
            direction: Direction::FromOverlay,
            sources: sources.iter().map(|net| net.parse().unwrap()).collect(),
            ..Rule::default()
        };
        let delta = Delta {
            set: peers.iter().enumerate().map(peer).collect(),
            policy: Some(Policy {
                rules: vec![rule],
                ..Policy::default()
            }),
            ..Delta::default()
        };
        let mut combined = Combined::new(&["tailnet"]);
        combined.apply(0, Update::Delta(delta));
        let rules = &combined.state().policy.rules;
        rules[0].sources.iter().map(IpNet::to_string).collect()
    }

    #[test]
    fn jailed_peers_are_no_sources() {
        let peers = [
            ("100.64.0.2/32", false),
            ("100.64.0.3/32", true),
            ("fd64::3/128", true),
        ];
        assert_eq!(sources(&peers, &["0.0.0.0/0", "::/0"]), ["100.64.0.2/32"]);
        assert_eq!(sources(&peers, &["100.64.0.3/32"]), [""; 0]);
        assert_eq!(
            sources(&peers, &["100.64.0.2/32", "10.0.0.0/8"]),
            ["10.0.0.0/8", "100.64.0.2/32"]
        );
        // Without any, all stays as it was written.
        assert_eq!(sources(&peers[..1], &["0.0.0.0/0"]), ["0.0.0.0/0"]);
    }

    #[test]
    fn what_the_subnet_side_opens_stays_open() {
        let peer = |key: u8, jailed| Peer {
            name: None,
            public_key: PublicKey([key; 32]),
            preshared_key: None,
            allowed_ips: vec![format!("100.64.0.{key}/32").parse().unwrap()],
            endpoint: None,
            keepalive: None,
            roaming: true,
            masquerade: Vec::new(),
            jailed,
        };
        let rule = |direction, sources: &[&str], protocol| Rule {
            direction,
            sources: sources.iter().map(|net| net.parse().unwrap()).collect(),
            protocols: vec![protocol],
            ..Rule::default()
        };
        let delta = Delta {
            set: vec![peer(2, false), peer(3, true)],
            policy: Some(Policy {
                rules: vec![
                    rule(Direction::Both, &["0.0.0.0/0"], 6),
                    rule(Direction::Both, &["10.0.0.0/8"], 17),
                ],
                ..Policy::default()
            }),
            ..Delta::default()
        };
        let mut combined = Combined::new(&["file"]);
        combined.apply(0, Update::Delta(delta));
        assert_eq!(
            combined.state().policy.rules,
            [
                rule(Direction::FromOverlay, &["100.64.0.2/32"], 6),
                rule(Direction::Both, &["10.0.0.0/8"], 17),
                rule(Direction::ToOverlay, &["0.0.0.0/0"], 6),
            ]
        );
    }

    #[test]
    fn one_that_is_jailed_no_more_is_a_source_again() {
        let peer = |jailed| Peer {
            name: None,
            public_key: PublicKey([1; 32]),
            preshared_key: None,
            allowed_ips: vec!["100.64.0.2/32".parse().unwrap()],
            endpoint: None,
            keepalive: None,
            roaming: true,
            masquerade: Vec::new(),
            jailed,
        };
        let rule = Rule {
            sources: vec!["0.0.0.0/0".parse().unwrap()],
            ..Rule::default()
        };
        let mut combined = Combined::new(&["tailnet"]);
        let policy = Policy {
            rules: vec![rule],
            ..Policy::default()
        };
        combined.apply(
            0,
            Update::Delta(Delta {
                policy: Some(policy.clone()),
                ..Delta::default()
            }),
        );
        for jailed in [true, false] {
            let changed = combined.apply(
                0,
                Update::Delta(Delta {
                    set: vec![peer(jailed)],
                    ..Delta::default()
                }),
            );
            assert!(changed.policy);
            assert_eq!(combined.state().policy == policy, !jailed);
        }
    }

    #[test]
    fn networks_within_each_other() {
        let peers = [
            ("10.0.0.0/8", true),
            ("10.1.0.0/30", false),
            ("10.1.0.1/32", true),
        ];
        assert_eq!(
            sources(&peers, &["0.0.0.0/0"]),
            ["10.1.0.0/32", "10.1.0.2/31"]
        );
        assert_eq!(sources(&peers, &["10.2.0.0/16"]), [""; 0]);
        assert_eq!(sources(&peers, &["10.1.0.2/32"]), ["10.1.0.2/32"]);
    }
}

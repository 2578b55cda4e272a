#![allow(clippy::unwrap_used)]

use super::super::{Combined, Delta, RouteMode, Update};
use super::*;
use crate::datapath::policy::{NewFlow, allows};
use crate::wireguard::keys::PublicKey;

fn peer(n: u8, nets: &[&str]) -> Peer {
    Peer {
        name: None,
        public_key: PublicKey([n; 32]),
        preshared_key: None,
        allowed_ips: nets.iter().map(|net| net.parse().unwrap()).collect(),
        endpoint: None,
        keepalive: None,
        roaming: true,
        masquerade: Vec::new(),
        jailed: false,
    }
}

fn route(cidr: &str) -> Route {
    Route {
        cidr: cidr.parse().unwrap(),
        snat: true,
        mode: RouteMode::Fast,
    }
}

fn rule(sources: &[&str], destinations: &[&str]) -> Rule {
    let destination = |cidr: &&str| Destination {
        cidr: cidr.parse().unwrap(),
        ports: 0..=u16::MAX,
    };
    Rule {
        direction: Direction::FromOverlay,
        sources: sources.iter().map(|net| net.parse().unwrap()).collect(),
        destinations: destinations.iter().map(destination).collect(),
        protocols: Vec::new(),
    }
}

const VIA: &str = "fd7a:115c:a1e0:b1a:0:7:a01:0/112";

/// Two peers, of which one has no IPv6, and what the router is told of routes and rules.
fn combined(routes: &[&str], rules: &[Rule]) -> Combined {
    let mut combined = Combined::new(&["file", "tailnet"]);
    let delta = Delta {
        set: vec![
            peer(1, &["100.64.0.2/32", "fd64::2/128"]),
            peer(2, &["100.64.0.3/32"]),
            peer(3, &["fd64::4/128"]),
        ],
        routes: Some(routes.iter().map(|cidr| route(cidr)).collect()),
        policy: Some(Policy {
            rules: rules.to_vec(),
            ..Policy::default()
        }),
        ..Delta::default()
    };
    combined.apply(0, Update::Delta(delta));
    combined
}

/// The address of the pool that stands for a peer.
fn stands_for(combined: &Combined, n: u8) -> Option<Ipv4Addr> {
    let peer = combined.state().peers.get(&PublicKey([n; 32]))?;
    via::Ends::of(&peer.allowed_ips).map(|ends| ends.v4)
}

#[test]
fn peers_and_routes_get_ipv4_while_there_is_a_site() {
    let mut combined = combined(&[VIA, "10.9.0.0/16"], &[]);
    let state = combined.state();
    let cidrs: Vec<String> = state
        .routes
        .iter()
        .map(|route| route.cidr.to_string())
        .collect();
    assert_eq!(cidrs, ["10.9.0.0/16", "10.1.0.0/16"]);
    assert_eq!(
        state.sites.iter().map(|via| via.site).collect::<Vec<_>>(),
        [7]
    );
    assert!(combined.conflicts().is_empty());
    let address = stands_for(&combined, 1).unwrap();
    assert!(POOL.contains(&address));
    assert_ne!(stands_for(&combined, 3).unwrap(), address);
    assert_eq!(stands_for(&combined, 2), None);
    assert_eq!(
        combined
            .state()
            .peers
            .at(address.into())
            .unwrap()
            .public_key,
        PublicKey([1; 32])
    );

    // A peer that comes later, by another source.
    let later = Delta {
        set: vec![peer(4, &["fd64::5/128"])],
        ..Delta::default()
    };
    let changed = combined.apply(1, Update::Delta(later));
    let given = stands_for(&combined, 4).unwrap();
    assert!(changed.nets.contains(&IpNet::V4(given.into())));

    let gone = Delta {
        routes: Some(vec![route("10.9.0.0/16")]),
        ..Delta::default()
    };
    let changed = combined.apply(0, Update::Delta(gone));
    assert!(changed.routes && changed.peers.len() == 3);
    assert_eq!([1, 2, 3, 4].map(|n| stands_for(&combined, n)), [None; 4]);
    assert!(combined.state().sites.is_empty());
    // What is said of them is what was said.
    let said = combined.peer_of(0, &PublicKey([1; 32])).unwrap();
    assert_eq!(*said, peer(1, &["100.64.0.2/32", "fd64::2/128"]));
}

#[test]
fn the_same_peers_get_the_same_addresses_again() {
    let addresses = |combined: &Combined| [1, 3].map(|n| stands_for(combined, n));
    assert_eq!(
        addresses(&combined(&[VIA], &[])),
        addresses(&combined(&[VIA, "10.9.0.0/16"], &[]))
    );
}

#[test]
fn a_pool_gives_no_address_twice_and_ends() {
    let mut pool = Pool::default();
    let all: HashSet<Option<Ipv4Addr>> = (0..65_534_u32)
        .map(|n| pool.give(Ipv6Addr::from_bits(u128::from(n))))
        .collect();
    assert_eq!(all.len(), 65_534);
    assert!(!all.contains(&None));
    assert_eq!(pool.give(Ipv6Addr::from_bits(1 << 100)), None);
    assert!(pool.is_stale(1) && !pool.is_stale(40_000));
    pool.tidy([peer(1, &["::5/128"])].iter());
    assert_eq!(pool.addresses.len(), 1);
}

fn may(combined: &Combined, source: Ipv4Addr, destination: &str) -> bool {
    let flow = NewFlow {
        source: source.into(),
        destination: destination.parse().unwrap(),
        protocol: 6,
        port: 443,
    };
    allows(&combined.state().policy, true, &flow)
}

#[test]
fn a_rule_about_a_site_is_about_the_peers_ipv6() {
    let v4: Ipv4Addr = "100.64.0.2".parse().unwrap();
    // To one host, from one peer.
    let host = "fd7a:115c:a1e0:b1a:0:7:a01:203/128";
    let combined_ = combined(&[VIA], &[rule(&["fd64::2/128"], &[host])]);
    let [first, third] = [1, 3].map(|n| stands_for(&combined_, n).unwrap());
    assert!(may(&combined_, first, "10.1.2.3"));
    assert!(!may(&combined_, first, "10.1.2.4") && !may(&combined_, third, "10.1.2.3"));
    assert!(!may(&combined_, v4, "10.1.2.3"));

    // Everything, for everybody: what has no route of its own is not reached by IPv4.
    let everything = [rule(&["0.0.0.0/0", "::/0"], &["0.0.0.0/0", "::/0"])];
    let combined_ = combined(&[VIA, "10.9.0.0/16"], &everything);
    assert!(may(&combined_, first, "10.1.2.3") && may(&combined_, third, "10.1.2.3"));
    assert!(may(&combined_, v4, "10.9.0.1") && !may(&combined_, v4, "10.1.2.3"));
    assert!(
        !may(&combined_, first, "10.9.0.1"),
        "it has an address for that"
    );

    // Another site's, and IPv4 alone.
    let other = "fd7a:115c:a1e0:b1a:0:8:a01:203/128";
    let rules = [
        rule(&["::/0"], &[other]),
        rule(&["0.0.0.0/0"], &["10.1.0.0/16"]),
    ];
    let combined_ = combined(&[VIA], &rules);
    assert!(!may(&combined_, first, "10.1.2.3") && !may(&combined_, v4, "10.1.2.3"));
    // With a route of its own it is.
    let combined_ = combined(&[VIA, "10.1.0.0/16"], &rules);
    assert!(may(&combined_, v4, "10.1.2.3") && !may(&combined_, first, "10.1.2.3"));
}

#[test]
fn rules_follow_peers_that_come_later() {
    let mut combined = combined(&[VIA], &[rule(&["fd64::/64"], &[VIA])]);
    let delta = Delta {
        set: vec![peer(4, &["fd64::9/128"])],
        ..Delta::default()
    };
    let changed = combined.apply(0, Update::Delta(delta));
    assert!(changed.policy);
    assert!(may(
        &combined,
        stands_for(&combined, 4).unwrap(),
        "10.1.2.3"
    ));
}

#[test]
fn without_rules_all_stays_open() {
    let combined = combined(&[VIA], &[]);
    assert!(combined.state().policy.rules.is_empty());
}

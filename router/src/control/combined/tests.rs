#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::control::{Denied, Direction, RouteMode, Rule};
use crate::wireguard::keys::PrivateKey;

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn key(n: u8) -> PublicKey {
    PublicKey([n; 32])
}

fn peer(n: u8, nets: &[&str]) -> Peer {
    Peer {
        name: None,
        public_key: key(n),
        preshared_key: None,
        allowed_ips: nets.iter().map(|text| net(text)).collect(),
        endpoint: None,
        keepalive: None,
        roaming: true,
        masquerade: Vec::new(),
        jailed: false,
    }
}

fn set(peers: &[(u8, &[&str])]) -> Update {
    Update::Delta(Delta {
        set: peers.iter().map(|(n, nets)| peer(*n, nets)).collect(),
        ..Delta::default()
    })
}

fn remove(n: u8) -> Update {
    Update::Delta(Delta {
        remove: vec![key(n)],
        ..Delta::default()
    })
}

fn rule(from: &str) -> Rule {
    Rule {
        direction: Direction::FromOverlay,
        sources: vec![net(from)],
        ..Rule::default()
    }
}

fn two() -> Combined {
    Combined::new(&["file", "tailnet"])
}

fn allowed(combined: &Combined, n: u8) -> Option<Vec<String>> {
    let peer = combined.state().peers.get(&key(n))?;
    Some(peer.allowed_ips.iter().map(IpNet::to_string).collect())
}

#[test]
fn a_change_tells_what_it_changes_and_nothing_else() {
    let mut combined = two();
    let first = combined.apply(0, set(&[(1, &["10.0.0.1/32"]), (2, &["10.0.0.2/32"])]));
    assert_eq!(first.peers, BTreeSet::from([key(1), key(2)]));
    assert_eq!(first.nets.len(), 2);
    let again = combined.apply(0, set(&[(1, &["10.0.0.1/32"])]));
    assert!(again.is_nothing(), "{again:?}");
    let more = combined.apply(0, set(&[(1, &["10.0.0.1/32", "10.0.0.3/32"])]));
    let wanted = Changed {
        peers: BTreeSet::from([key(1)]),
        nets: BTreeSet::from([net("10.0.0.3/32")]),
        ..Changed::default()
    };
    assert_eq!(more, wanted);
    let mut quiet = peer(2, &["10.0.0.2/32"]);
    quiet.keepalive = Some(25);
    let changed = combined.apply(
        0,
        Update::Delta(Delta {
            set: vec![quiet],
            ..Delta::default()
        }),
    );
    assert_eq!((changed.peers.len(), changed.nets.len()), (1, 0));
    let gone = combined.apply(0, remove(2));
    let wanted = Changed {
        peers: BTreeSet::from([key(2)]),
        nets: BTreeSet::from([net("10.0.0.2/32")]),
        ..Changed::default()
    };
    assert_eq!(gone, wanted);
    assert!(gone.gone(combined.state()).eq([key(2)]));
    assert_eq!(more.gone(combined.state()).count(), 0, "it is there yet");
    assert!(combined.apply(0, remove(2)).is_nothing());
}

#[test]
fn the_first_source_has_a_key_that_two_name_until_it_lets_go() {
    let mut combined = two();
    combined.apply(1, set(&[(1, &["10.0.0.1/32"])]));
    let changed = combined.apply(0, set(&[(1, &["10.0.0.9/32"])]));
    assert_eq!(allowed(&combined, 1).unwrap(), ["10.0.0.9/32"]);
    assert_eq!(changed.nets.len(), 2);
    assert_eq!(combined.conflicts(), [("tailnet", Conflict::Key(key(1)))]);
    // What the other one says of it has no effect meanwhile.
    assert!(
        combined
            .apply(1, set(&[(1, &["10.0.0.2/32"])]))
            .is_nothing()
    );
    combined.apply(0, remove(1));
    assert_eq!(allowed(&combined, 1).unwrap(), ["10.0.0.2/32"]);
    assert_eq!(combined.conflicts(), []);
}

#[test]
fn an_allowed_ip_of_two_peers_is_the_first_sources() {
    let mut combined = two();
    combined.apply(1, set(&[(1, &["10.0.0.1/32", "10.0.0.2/32"])]));
    combined.apply(0, set(&[(2, &["10.0.0.2/32"])]));
    assert_eq!(allowed(&combined, 1).unwrap(), ["10.0.0.1/32"]);
    assert_eq!(allowed(&combined, 2).unwrap(), ["10.0.0.2/32"]);
    let lost = Conflict::Net(net("10.0.0.2/32"), key(1));
    assert_eq!(combined.conflicts(), [("tailnet", lost)]);
    let changed = combined.apply(0, set(&[(2, &[])]));
    assert_eq!(changed.peers, BTreeSet::from([key(1), key(2)]));
    assert_eq!(
        allowed(&combined, 1).unwrap(),
        ["10.0.0.1/32", "10.0.0.2/32"]
    );
    assert_eq!(combined.conflicts(), []);
}

#[test]
fn routes_keys_and_addresses_of_all_count() {
    let route = |cidr: &str, snat| Route {
        cidr: net(cidr),
        snat,
        mode: RouteMode::Fast,
    };
    let say = |private: u8, address: &str, routes: Vec<Route>| {
        Update::Delta(Delta {
            identity: Some(Identity {
                private_key: PrivateKey::from_bytes([private; 32]),
                addresses: vec![net(address)],
            }),
            routes: Some(routes),
            ..Delta::default()
        })
    };
    let mut combined = two();
    let changed = combined.apply(
        1,
        say(
            2,
            "100.64.0.1/10",
            vec![route("10.0.0.0/16", true), route("10.9.0.0/16", true)],
        ),
    );
    assert!(changed.identity && changed.routes && !changed.policy);
    combined.apply(
        0,
        say(1, "100.127.0.1/32", vec![route("10.0.0.0/16", false)]),
    );
    let state = combined.state();
    let identity = state.identity.as_ref().unwrap();
    assert!(identity.private_key == PrivateKey::from_bytes([1; 32]));
    assert_eq!(
        identity.addresses,
        [net("100.127.0.1/32"), net("100.64.0.1/10")]
    );
    assert_eq!(
        state.routes,
        [route("10.0.0.0/16", false), route("10.9.0.0/16", true)]
    );
    let lost = [Conflict::PrivateKey, Conflict::Route(net("10.0.0.0/16"))];
    assert_eq!(
        combined.conflicts(),
        lost.map(|conflict| ("tailnet", conflict))
    );
}

#[test]
fn rules_of_one_source_take_nothing_from_the_peers_of_one_without() {
    let policy = |rules| {
        Update::Delta(Delta {
            policy: Some(Policy {
                rules,
                denied: Denied::Drop,
            }),
            ..Delta::default()
        })
    };
    let mut combined = two();
    combined.apply(0, set(&[(1, &["10.0.0.1/32"])]));
    combined.apply(1, set(&[(2, &["10.0.0.2/32"])]));
    assert!(combined.state().policy.rules.is_empty());
    assert!(combined.apply(1, policy(vec![rule("10.0.0.2/32")])).policy);
    let rules = |combined: &Combined| {
        let rules = combined.state().policy.rules.iter();
        rules.map(|rule| rule.sources.clone()).collect::<Vec<_>>()
    };
    let wanted = [vec![net("10.0.0.1/32")], vec![net("10.0.0.2/32")]];
    assert_eq!(rules(&combined), wanted);
    // Its peers change, and the rule for them.
    assert!(combined.apply(0, set(&[(3, &["10.0.0.3/32"])])).policy);
    assert_eq!(
        rules(&combined)[0],
        [net("10.0.0.1/32"), net("10.0.0.3/32")]
    );
    // Those of a source with rules are theirs to name.
    assert!(!combined.apply(1, set(&[(4, &["10.0.0.4/32"])])).policy);
    combined.apply(0, policy(vec![rule("10.0.0.3/32")]));
    assert_eq!(
        rules(&combined),
        [vec![net("10.0.0.3/32")], vec![net("10.0.0.2/32")]]
    );
    // A rule for what the subnet side opens closes that direction, too.
    let both = Rule {
        direction: Direction::Both,
        ..rule("10.0.0.2/32")
    };
    combined.apply(1, policy(vec![both]));
    let opened = &combined.state().policy.rules[1];
    let to: Vec<IpNet> = opened.destinations.iter().map(|to| to.cidr).collect();
    assert_eq!(
        (opened.direction, opened.sources.len()),
        (Direction::ToOverlay, 2)
    );
    assert_eq!(to, [net("10.0.0.1/32"), net("10.0.0.3/32")]);
}

#[test]
fn a_source_that_fails_keeps_what_it_said() {
    let mut combined = two();
    combined.apply(1, set(&[(1, &["10.0.0.1/32"])]));
    combined.failed(1, "no answer".to_owned());
    assert_eq!(
        combined.failures().collect::<Vec<_>>(),
        [("tailnet", "no answer")]
    );
    assert!(combined.state().peers.get(&key(1)).is_some());
    combined.apply(1, set(&[]));
    assert_eq!(combined.failures().count(), 0);
}

/// A peer with few keys and addresses, so that they meet.
fn any_peer() -> impl Strategy<Value = Peer> {
    let nets = prop::collection::vec(0_u8..6, 0..4);
    (0_u8..6, nets, prop::option::of(1_u16..3)).prop_map(|(n, nets, keepalive)| {
        let nets: Vec<String> = nets.iter().map(|n| format!("10.0.0.{n}/32")).collect();
        let nets: Vec<&str> = nets.iter().map(String::as_str).collect();
        Peer {
            keepalive,
            ..peer(n, &nets)
        }
    })
}

fn any_update() -> impl Strategy<Value = Update> {
    let peers = || {
        prop::collection::vec(any_peer(), 0..4).prop_map(|mut peers| {
            let mut seen = BTreeSet::new();
            peers.retain(|peer| seen.insert(peer.public_key));
            peers
        })
    };
    let delta = (peers(), prop::collection::vec(0_u8..6, 0..3), 0_u8..4);
    let delta = delta.prop_map(|(set, remove, rules)| {
        let remove = remove.into_iter().map(key);
        let remove = remove.filter(|key| set.iter().all(|peer| peer.public_key != *key));
        let rules = (rules < 3).then(|| vec![rule("10.0.0.1/32"); rules.into()]);
        Update::Delta(Delta {
            remove: remove.collect(),
            set,
            policy: rules.map(|rules| Policy {
                rules,
                denied: Denied::Drop,
            }),
            ..Delta::default()
        })
    });
    let whole = peers().prop_map(|peers| Update::Whole {
        identity: None,
        snapshot: Snapshot {
            peers,
            ..Snapshot::default()
        },
    });
    prop_oneof![4 => delta, 1 => whole]
}

/// All that a source wants, at once.
fn whole(source: &Held) -> Update {
    Update::Whole {
        identity: source.identity.clone(),
        snapshot: Snapshot {
            peers: source
                .peers
                .values()
                .map(|peer| Peer::clone(peer))
                .collect(),
            routes: source.routes.clone(),
            policy: source.policy.clone(),
        },
    }
}

proptest! {
    /// Updates one by one come to the same as the whole of each source at the end, in whatever order
    /// the sources say it; and whoever follows what is told to have changed misses nothing.
    #[test]
    fn updates_one_by_one_are_the_whole_of_the_end(
        updates in prop::collection::vec((0_usize..3, any_update()), 0..24),
        backwards in any::<bool>(),
    ) {
        let mut combined = Combined::new(&["a", "b", "c"]);
        let mut peers: BTreeMap<PublicKey, Peer> = BTreeMap::new();
        let mut nets: BTreeMap<IpNet, u32> = BTreeMap::new();
        for (rank, update) in updates {
            let changed = combined.apply(rank, update);
            let state = combined.state();
            for key in &changed.peers {
                match state.peers.get(key) {
                    Some(peer) => _ = peers.insert(*key, peer.clone()),
                    None => _ = peers.remove(key),
                }
            }
            for net in &changed.nets {
                match state.peers.allowed_ips().get(net) {
                    Some(number) => _ = nets.insert(*net, *number),
                    None => _ = nets.remove(net),
                }
            }
            prop_assert_eq!(&nets, state.peers.allowed_ips());
            let all = state.peers.iter().map(|peer| (peer.public_key, peer.clone()));
            prop_assert_eq!(&peers, &all.collect());
            // Each allowed IP is that peer's which says so.
            for peer in state.peers.iter() {
                for net in &peer.allowed_ips {
                    prop_assert_eq!(state.peers.owner(net).map(|p| p.public_key), Some(peer.public_key));
                }
            }
        }
        let mut at_once = Combined::new(&["a", "b", "c"]);
        let mut ranks = vec![0, 1, 2];
        if backwards {
            ranks.reverse();
        }
        for rank in ranks {
            at_once.apply(rank, whole(&combined.sources[rank]));
        }
        prop_assert!(combined.state() == at_once.state(), "{:?}\n{:?}", combined, at_once);
        prop_assert_eq!(combined.conflicts(), at_once.conflicts());
    }
}

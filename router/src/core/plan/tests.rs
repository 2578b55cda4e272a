#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::time::Instant;

use super::*;
use crate::config::{DatapathMode, Mtu};
use crate::control::{
    Combined, Delta, Endpoint, Identity, Peer, Route, RouteMode, Snapshot, Update,
};
use crate::core::{LinkFacts, Names, peer_specs, tunnel_routes};
use crate::datapath::masquerade::Candidate;
use crate::wireguard::keys::{PrivateKey, PublicKey};

fn local() -> Local {
    Local {
        name: "router".into(),
        device: "sluice0".into(),
        listen_port: 51820,
        mtu: Mtu::Auto,
        datapath: DatapathMode::Auto,
        uplink: Interface::Auto,
        uplink_guard: false,
        external_addresses: Vec::new(),
        subnet: vec![],
        workers: None,
        limits: Default::default(),
        offloads: Default::default(),
        marks: Default::default(),
        patience: Default::default(),
        http: None,
        http_pages: crate::config::HttpPages::All,
        http_hosts: Vec::new(),
        socket: "/run/sluice/sluice0.sock".into(),
    }
}

fn facts() -> Facts {
    let link = |name: &str, addresses: &[&str]| LinkFacts {
        name: name.into(),
        addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        ..LinkFacts::default()
    };
    Facts {
        links: BTreeMap::from([
            (1, link("lo", &["127.0.0.1/8"])),
            (2, link("eth0", &["10.0.0.5/24"])),
            (3, link("eth1", &["10.0.7.5/24"])),
            (4, link("eth2", &["192.0.2.1/24"])),
        ]),
        default_link: Some(2),
        gateways: BTreeSet::new(),
        egress: BTreeMap::from([("10.0.0.0/16".parse().unwrap(), BTreeSet::from([2]))]),
        ..Facts::default()
    }
}

fn candidate(address: &str) -> Candidate {
    let address: IpAddr = address.parse().unwrap();
    Candidate {
        address,
        network: address.into(),
        unloved: false,
    }
}

fn peer(allowed: &[&str]) -> Peer {
    Peer {
        name: None,
        public_key: PublicKey([9; 32]),
        preshared_key: None,
        allowed_ips: allowed.iter().map(|a| a.parse().unwrap()).collect(),
        endpoint: Some(Endpoint::Name {
            host: "laptop.example".into(),
            port: 7,
        }),
        keepalive: None,
        roaming: true,
        masquerade: Vec::new(),
        jailed: false,
    }
}

fn tun() -> Link {
    Link {
        index: 9,
        name: "sluice0".into(),
    }
}

fn route() -> Route {
    Route {
        cidr: "10.0.0.0/16".parse().unwrap(),
        snat: true,
        mode: RouteMode::Fast,
    }
}

fn combined() -> Combined {
    let mut combined = Combined::new(&["file"]);
    let update = Update::Whole {
        identity: Some(Identity {
            private_key: PrivateKey::from_bytes([1; 32]),
            addresses: vec![
                "100.64.0.1/24".parse().unwrap(),
                "fd7a::1/128".parse().unwrap(),
            ],
        }),
        snapshot: Snapshot {
            peers: vec![peer(&["100.64.0.2/32", "fd7a::2/128"])],
            routes: vec![route()],
            ..Snapshot::default()
        },
    };
    combined.apply(0, update);
    combined
}

fn state() -> State {
    combined().state().clone()
}

#[test]
fn only_subnet_side_interfaces_translate_sources() {
    let mut facts = facts();
    for (index, address) in [(2, "10.0.0.5"), (4, "192.0.2.1")] {
        let link = facts.links.get_mut(&index).unwrap();
        link.external = vec![candidate(address)];
    }
    let plan = plan(&local(), &state(), &tun(), &facts);
    let external = &plan.datapath.external;
    let everywhere = "0.0.0.0/0".parse().unwrap();
    let wanted = vec![(everywhere, "10.0.0.5".parse().unwrap())];
    assert_eq!((external.len(), &external[&2].masquerade), (1, &wanted));
    assert_eq!(plan.datapath.chosen, BTreeMap::new());
}

#[test]
fn external_addresses_are_chosen_among_those_that_an_interface_has() {
    let mut facts = facts();
    let link = facts.links.get_mut(&2).unwrap();
    link.addresses.push("10.0.0.6/24".parse().unwrap());
    link.external = vec![candidate("10.0.0.5"), candidate("fd00::5")];
    let mut local = local();
    let external = |local: &Local| {
        let plan = plan(local, &state(), &tun(), &facts);
        let external = plan.datapath.external.get(&2).into_iter();
        let external = external.flat_map(External::addresses);
        let chosen = plan.datapath.chosen.get(&2).into_iter().flatten();
        let external: Vec<_> = external.map(IpAddr::to_string).collect();
        (external, chosen.map(IpAddr::to_string).collect::<Vec<_>>())
    };
    let texts = |list: &[&str]| list.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>();
    local.external_addresses = vec!["10.0.0.7".parse().unwrap()];
    assert_eq!(external(&local), (texts(&["10.0.0.5", "fd00::5"]), vec![]));
    local
        .external_addresses
        .extend(["10.0.0.6", "10.0.0.5"].map(|a| a.parse::<IpAddr>().unwrap()));
    let wanted = texts(&["10.0.0.6", "10.0.0.5", "fd00::5"]);
    assert_eq!(external(&local), (wanted.clone(), wanted[..2].to_vec()));
}

#[test]
fn auto_finds_the_uplink_and_every_interface_into_a_routed_cidr() {
    let plan = plan(&local(), &state(), &tun(), &facts());
    assert_eq!(plan.uplink.map(|l| l.name).as_deref(), Some("eth0"));
    let names = |links: &[Link]| links.iter().map(|l| l.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&plan.datapath.subnet), ["eth0", "eth1"]);
    assert_eq!(names(&plan.forwarding), ["sluice0", "eth0", "eth1"]);
}

#[test]
fn a_former_subnet_side_stays_unless_interfaces_are_named() {
    let mut facts = facts();
    facts.egress.clear();
    facts.former.insert(4);
    let subnet = |local: &Local| {
        let plan = plan(local, &state(), &tun(), &facts);
        let links = plan.datapath.subnet.into_iter();
        links.map(|link| link.index).collect::<Vec<_>>()
    };
    assert_eq!(subnet(&local()), [2, 3, 4]);
    let named = Local {
        subnet: vec!["eth1".into()],
        ..local()
    };
    assert_eq!(subnet(&named), [3]);
}

#[test]
fn every_next_hop_of_a_route_is_subnet_side() {
    let mut facts = facts();
    let toward = facts.egress.values_mut().next().unwrap();
    toward.insert(4);
    let plan = plan(&local(), &state(), &tun(), &facts);
    let names: Vec<_> = plan.datapath.subnet.iter().map(|l| &*l.name).collect();
    assert_eq!(names, ["eth0", "eth1", "eth2"]);
}

#[test]
fn interfaces_without_an_ethernet_header_are_left_to_the_kernel() {
    let mut facts = facts();
    facts.without_ethernet = BTreeSet::from([2, 4]);
    for index in [2, 3] {
        let link = facts.links.get_mut(&index).unwrap();
        link.external = vec![candidate("192.0.2.1")];
        link.mtu = 1400;
    }
    let plan = plan(&local(), &state(), &tun(), &facts);
    let names = |links: &[Link]| links.iter().map(|l| l.name.clone()).collect::<Vec<_>>();
    assert_eq!(plan.link_mtus, BTreeMap::from([(3, 1400)]));
    assert_eq!(names(&plan.datapath.subnet), ["eth1"]);
    assert_eq!(plan.datapath.external.keys().collect::<Vec<_>>(), [&3]);
    assert_eq!(names(&plan.forwarding), ["sluice0", "eth0", "eth1"]);
    assert_eq!(plan.unserved(&facts).count(), 0);
    let stack: Vec<Link> = plan.stack_links.into_iter().collect();
    assert_eq!(names(&stack), ["eth0"]);
    let route = route().cidr;
    assert_eq!(
        plan.stack_routes,
        BTreeMap::from([(route, "eth0".to_owned())])
    );
}

#[test]
fn named_interfaces_are_taken_as_named() {
    let local = Local {
        subnet: vec!["eth2".into()],
        uplink: Interface::Named("eth1".into()),
        ..local()
    };
    let plan = plan(&local, &state(), &tun(), &facts());
    let facts = facts();
    let unserved: Vec<_> = plan.unserved(&facts).collect();
    assert_eq!(unserved, [("10.0.0.0/16".parse().unwrap(), "eth0")]);
    assert_eq!(plan.uplink.unwrap().index, 3);
    assert_eq!(
        plan.datapath.subnet,
        [Link {
            index: 4,
            name: "eth2".into()
        }]
    );
}

#[test]
fn allowed_ips_and_the_tunnels_own_network_are_routed_into_the_tun() {
    let texts = |nets: Vec<IpNet>| nets.iter().map(IpNet::to_string).collect::<Vec<_>>();
    let v4 = texts(tunnel_routes(&state(), Family::V4));
    assert_eq!(v4, ["100.64.0.0/24", "100.64.0.2/32"]);
    assert_eq!(texts(tunnel_routes(&state(), Family::V6)), ["fd7a::2/128"]);
    // What is the router's own is not in the tunnel, though a peer claims it.
    let mut combined = combined();
    let delta = Delta {
        set: vec![peer(&["100.64.0.1/32", "100.64.0.2/32"])],
        ..Delta::default()
    };
    combined.apply(0, Update::Delta(delta));
    assert_eq!(texts(tunnel_routes(combined.state(), Family::V4)), v4);
}

#[test]
fn without_ipv6_its_networks_lead_nowhere_else() {
    for (ipv6, v6_addresses) in [(Ipv6::On, 1), (Ipv6::Off, 0), (Ipv6::Absent, 0)] {
        let facts = Facts { ipv6, ..facts() };
        let plan = plan(&local(), &state(), &tun(), &facts);
        assert_eq!(plan.way(Family::V6), ipv6);
        assert_eq!(plan.addresses(Family::V6).len(), v6_addresses);
        assert_eq!(plan.way(Family::V4), Ipv6::On);
        assert_eq!(plan.addresses(Family::V4).len(), 1);
        assert_eq!(plan.without_ipv6().is_some(), ipv6 != Ipv6::On);
    }
}

#[test]
fn names_are_resolved_by_the_caller() {
    let (combined, mut names) = (combined(), Names::default());
    let state = combined.state();
    assert_eq!(peer_specs(state, &names)[0].endpoint, None);
    let there: SocketAddr = "198.51.100.1:7".parse().unwrap();
    let keys = state.peers.iter().map(|peer| &peer.public_key);
    let now = Instant::now();
    names.follow(state, keys, now);
    names.handle_answer("laptop.example", 7, Ok(vec![there]), now);
    assert_eq!(peer_specs(state, &names)[0].endpoint, Some(there));
}

//! The desired state of the machine, derived from settings, a control snapshot and the network.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::mtu::tunnel_mtu;
use super::vrf::{self, Vrf};
use super::{Action, Part};
use crate::config::{Interface, Local};
use crate::control::{Endpoint, Peer, Snapshot};
use crate::datapath::masquerade::{self, Candidate, Label};
use crate::datapath::{External, Link, Spec};
use crate::engine::PeerSpec;
use crate::netlink::Family;
use crate::netlink::sysctl::Ipv6;

/// What the kernel says of the network, without our own TUN device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Interfaces by index.
    pub links: BTreeMap<u32, LinkFacts>,
    /// Interface of the default route (IPv4 first), if any.
    pub default_link: Option<u32>,
    /// Gateways of the default routes.
    pub gateways: BTreeSet<IpAddr>,
    /// Where the main table sends packets for each routed CIDR: the interface indexes of all next
    /// hops.
    pub egress: BTreeMap<IpNet, BTreeSet<u32>>,
    /// Interfaces that were the subnet side before, by index. Where a route moves to another one,
    /// packets of its flows come by the old one until the network's own routing has followed, and as
    /// long as sources are translated to its address.
    pub former: BTreeSet<u32>,
    /// Whether our own TUN device can have IPv6.
    pub ipv6: Ipv6,
    /// The VRFs of those interfaces that are in one, by the interface's index.
    pub vrfs: BTreeMap<u32, Vrf>,
    /// Whether UDP sockets outside of VRFs hear what comes in by one (`udp_l3mdev_accept`).
    pub vrfs_heard: bool,
    /// The kernel's labels of IPv6 addresses.
    pub labels: Vec<Label>,
    /// Ways of underlay packets: to the endpoints of peers, and by default (to `0.0.0.0` and `::`).
    pub paths: BTreeMap<IpAddr, Path>,
    /// Interfaces whose packets have no Ethernet header: tunnels, PPP.
    pub without_ethernet: BTreeSet<u32>,
    /// The main table's routes and their own MTUs in bytes, or zero; empty when none has one.
    pub route_mtus: BTreeMap<IpNet, u32>,
}

/// A way of underlay packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Index of the interface.
    pub link: u32,
    /// MTU in bytes, where the route has one of its own or a router on the path has told one.
    pub mtu: Option<u32>,
}

/// One interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LinkFacts {
    /// Its name.
    pub name: String,
    /// Its addresses with their connected networks.
    pub addresses: Vec<IpNet>,
    /// What the kernel's masquerade could translate sources to here, in the kernel's order.
    pub external: Vec<Candidate>,
    /// MTU in bytes.
    pub mtu: u32,
}

impl Facts {
    fn link(&self, index: u32) -> Option<Link> {
        self.links.get(&index).map(|facts| Link {
            index,
            name: facts.name.clone(),
        })
    }

    fn link_named(&self, name: &str) -> Option<Link> {
        let (index, facts) = self.links.iter().find(|(_, facts)| facts.name == name)?;
        Some(Link {
            index: *index,
            name: facts.name.clone(),
        })
    }

    /// Every interface that packets for `cidr` may leave by: the main table's answer for it, and
    /// those connected to a part of it.
    fn links_toward(&self, cidr: &IpNet) -> impl Iterator<Item = u32> {
        let connected = self.links.iter().filter_map(move |(index, facts)| {
            let inside = facts
                .addresses
                .iter()
                .any(|address| cidr.contains(&address.addr()));
            inside.then_some(*index)
        });
        let egress = self.egress.get(cidr).into_iter().flatten();
        egress.copied().chain(connected)
    }

    /// Where packets for routed CIDRs may leave by an interface that `plan` does not serve: the CIDR,
    /// and the interface's name.
    pub fn unserved<'a>(&'a self, plan: &'a Plan) -> impl Iterator<Item = (IpNet, &'a str)> {
        // What the programs leave to the kernel is served too.
        let served = move |index: &u32| plan.forwarding.iter().any(|link| link.index == *index);
        self.egress.iter().flat_map(move |(cidr, interfaces)| {
            let unserved = interfaces.iter().filter(move |index| !served(index));
            let names = unserved.filter_map(move |index| self.links.get(index));
            names.map(|link| (*cidr, link.name.as_str()))
        })
    }
}

/// The desired state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The TUN device.
    pub tun: Link,
    /// Tunnel MTU in bytes.
    pub mtu: u16,
    /// Tunnel addresses.
    pub addresses: Vec<IpNet>,
    /// Whether the TUN device can have IPv6.
    pub ipv6: Ipv6,
    /// The uplink, if there is one now.
    pub uplink: Option<Link>,
    /// What does not work since an interface is in a VRF, with the mend.
    pub vrf_problems: Vec<String>,
    /// Routes into the TUN device.
    pub tunnel_routes: Vec<IpNet>,
    /// Interfaces that forward.
    pub forwarding: Vec<Link>,
    /// Subnet-side interfaces without an Ethernet header, which the programs cannot serve.
    pub stack_links: BTreeSet<Link>,
    /// The routes that lead to one of them.
    pub stack_routes: BTreeMap<IpNet, String>,
    /// What the datapath serves.
    pub datapath: Spec,
    /// The engine's peers.
    pub peers: Vec<PeerSpec>,
}

impl Plan {
    /// The action that puts `part` of this plan in force.
    pub fn action(&self, part: Part) -> Action {
        match part {
            Part::Device => Action::Device { mtu: self.mtu },
            Part::Addresses(family) => {
                let possible = family == Family::V4 || self.ipv6 == Ipv6::On;
                let wanted = self.addresses.iter().filter(|_| possible);
                Action::Addresses(family, of_family(wanted, family))
            }
            Part::Datapath => Action::Datapath(Box::new(self.datapath.clone())),
            Part::Forwarding(family) => {
                // What the overlay has no address of cannot be forwarded.
                let overlay = &self.datapath.overlay;
                let forwards = overlay.keys().any(|net| Family::of(net.addr()) == family);
                let links = self.forwarding.iter().filter(|_| forwards);
                Action::Forwarding(family, links.cloned().collect())
            }
            Part::Routes(family) => {
                let ipv6 = match family {
                    Family::V4 => Ipv6::On,
                    Family::V6 => self.ipv6,
                };
                let wanted = self.tunnel_routes.iter().filter(|_| ipv6 != Ipv6::Absent);
                Action::Routes {
                    family,
                    device: ipv6 == Ipv6::On,
                    nets: of_family(wanted, family),
                }
            }
            Part::Rules(family) => Action::Rules(family),
            Part::Peers => Action::Peers(self.peers.clone()),
        }
    }

    /// Whether anything of this family is to be carried.
    pub fn asks(&self, family: Family) -> bool {
        let nets = self.addresses.iter().chain(self.datapath.overlay.keys());
        nets.chain(&self.tunnel_routes)
            .any(|net| Family::of(net.addr()) == family)
    }

    /// What the machine does not let us do for a family, with the mend.
    pub fn without_ipv6(&self) -> Option<String> {
        let name = &self.tun.name;
        let (why, mend) = match self.ipv6 {
            Ipv6::On => return None,
            Ipv6::Off => (
                format!("IPv6 is switched off on {name} (net.ipv6.conf.{name}.disable_ipv6 = 1)"),
                "switch it on there (0), and the router takes it up by itself",
            ),
            Ipv6::Absent => (
                "this kernel runs without IPv6".to_owned(),
                "start it without ipv6.disable=1, or with the module ipv6",
            ),
        };
        self.asks(Family::V6).then(|| {
            format!(
                "{why}: this router carries IPv4 only, and nothing that is configured for IPv6; \
                 {mend}, or take the IPv6 addresses and networks out of the configuration"
            )
        })
    }
}

fn of_family<'a>(nets: impl Iterator<Item = &'a IpNet>, family: Family) -> Vec<IpNet> {
    nets.filter(|net| Family::of(net.addr()) == family)
        .copied()
        .collect()
}

/// What programs translate sources to toward the subnet-side interfaces, by interface index; and the
/// part of it that was chosen by hand.
fn external(
    local: &Local,
    facts: &Facts,
    subnet: &BTreeSet<Link>,
) -> (BTreeMap<u32, External>, BTreeMap<u32, Vec<IpAddr>>) {
    let (mut external, mut chosen) = (BTreeMap::new(), BTreeMap::new());
    for (index, link) in subnet
        .iter()
        .filter_map(|link| Some((link.index, facts.links.get(&link.index)?)))
    {
        let mut addresses = local.external_addresses.clone();
        addresses.retain(|address| link.addresses.iter().any(|own| own.addr() == *address));
        if !addresses.is_empty() {
            chosen.insert(index, addresses.clone());
        }
        let mut candidates = link.external.clone();
        candidates.retain(|c| addresses.iter().all(|a| a.is_ipv4() != c.address.is_ipv4()));
        let mut labels = facts.labels.clone();
        labels.retain(|label| label.interface == 0 || label.interface == index);
        let found = External {
            chosen: addresses,
            masquerade: masquerade::by_prefix(&candidates, &labels),
        };
        if found != External::default() {
            external.insert(index, found);
        }
    }
    (external, chosen)
}

/// Derives the desired state. `resolve` yields the addresses of a DNS name and port.
pub fn plan(
    local: &Local,
    snapshot: &Snapshot,
    tun: &Link,
    facts: &Facts,
    resolve: impl Fn(&str, u16) -> Vec<SocketAddr>,
) -> Plan {
    let overlay: BTreeSet<IpNet> = snapshot
        .peers
        .iter()
        .flat_map(|peer| &peer.allowed_ips)
        .copied()
        .collect();
    let uplink = match &local.uplink {
        Interface::Auto => facts.default_link.and_then(|index| facts.link(index)),
        Interface::Named(name) => facts.link_named(name),
    };
    let subnet: BTreeSet<Link> = if local.subnet.is_empty() {
        let indices = snapshot
            .routes
            .iter()
            .flat_map(|route| facts.links_toward(&route.cidr));
        let indices = indices.chain(facts.former.iter().copied());
        indices.filter_map(|index| facts.link(index)).collect()
    } else {
        local
            .subnet
            .iter()
            .filter_map(|name| facts.link_named(name))
            .collect()
    };
    let (mut external, chosen) = external(local, facts, &subnet);
    let is_ethernet = |index: u32| !facts.without_ethernet.contains(&index);
    external.retain(|index, _| is_ethernet(*index));
    let stack_links: BTreeSet<Link> = subnet
        .iter()
        .filter(|link| !is_ethernet(link.index))
        .cloned()
        .collect();
    let stack_routes = snapshot.routes.iter().filter_map(|route| {
        let mut links = facts.links_toward(&route.cidr);
        let link = links.find_map(|index| stack_links.iter().find(|l| l.index == index))?;
        Some((route.cidr, link.name.clone()))
    });
    let stack_routes = stack_routes.collect();
    let served = subnet.difference(&stack_links).cloned().collect();
    let addresses = subnet
        .iter()
        .filter_map(|link| facts.links.get(&link.index))
        .flat_map(|link| link.addresses.iter().map(IpNet::addr))
        .collect();
    let own: BTreeSet<IpAddr> = local.addresses.iter().map(IpNet::addr).collect();
    let connected: BTreeSet<IpNet> = local.addresses.iter().map(IpNet::trunc).collect();
    let host_route = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
    let (mtu, _) = tunnel_mtu(local, facts);
    let vrf_problems = vrf::problems(snapshot, tun, facts, uplink.as_ref(), &subnet);
    Plan {
        tun: tun.clone(),
        mtu,
        vrf_problems,
        addresses: local.addresses.clone(),
        ipv6: facts.ipv6,
        uplink,
        // The kernel makes the connected route of each tunnel address itself, but in the main
        // table, which another table's less specific route must not hide: ours comes first.
        tunnel_routes: overlay
            .iter()
            .filter(|net| !(host_route(net) && own.contains(&net.addr())))
            .copied()
            .chain(connected.iter().filter(|net| !host_route(net)).copied())
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect(),
        forwarding: std::iter::once(tun.clone())
            .chain(subnet.iter().cloned())
            .collect(),
        stack_links,
        stack_routes,
        datapath: Spec {
            tun: tun.clone(),
            mtu,
            subnet: served,
            route_mtus: facts.route_mtus.clone(),
            // Numbers outlive plans: whoever keeps them fills them in.
            overlay: overlay.into_iter().map(|net| (net, 0)).collect(),
            local_ports: None,
            own,
            routes: snapshot.routes.clone(),
            policy: snapshot.policy.clone(),
            external,
            chosen,
            addresses,
            guarded_port: local.uplink_guard.then_some(local.listen_port),
            marks: local.marks,
            handed_over: Some(local.marks.handed_over),
            knocked_port: snapshot
                .peers
                .iter()
                .any(|peer| peer.endpoint.is_none())
                .then_some(local.listen_port),
        },
        peers: snapshot
            .peers
            .iter()
            .map(|peer| peer_spec(peer, &resolve))
            .collect(),
    }
}

/// A peer as the engine takes it. `resolve` yields the addresses of a DNS name and port, best first.
pub fn peer_spec(peer: &Peer, resolve: impl Fn(&str, u16) -> Vec<SocketAddr>) -> PeerSpec {
    let mut endpoints = match &peer.endpoint {
        None => Vec::new(),
        Some(Endpoint::Addr(addr)) => vec![*addr],
        Some(Endpoint::Name { host, port }) => resolve(host, *port),
    }
    .into_iter();
    PeerSpec {
        public_key: peer.public_key,
        preshared_key: peer.preshared_key.clone(),
        allowed_ips: peer.allowed_ips.clone(),
        endpoint: endpoints.next(),
        others: endpoints.collect(),
        keepalive: peer.keepalive,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{DatapathMode, Mtu};
    use crate::control::{Route, RouteMode};
    use crate::wireguard::keys::{PrivateKey, PublicKey};

    fn local() -> Local {
        Local {
            name: "router".into(),
            device: "sluice0".into(),
            private_key: PrivateKey::from_bytes([1; 32]),
            listen_port: 51820,
            addresses: vec![
                "100.64.0.1/24".parse().unwrap(),
                "fd7a::1/128".parse().unwrap(),
            ],
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
            http: None,
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
        }
    }

    fn tun() -> Link {
        Link {
            index: 9,
            name: "sluice0".into(),
        }
    }

    fn snapshot() -> Snapshot {
        Snapshot {
            peers: vec![peer(&["100.64.0.2/32", "fd7a::2/128"])],
            routes: vec![Route {
                cidr: "10.0.0.0/16".parse().unwrap(),
                snat: true,
                mode: RouteMode::Fast,
            }],
            ..Snapshot::default()
        }
    }

    #[test]
    fn only_subnet_side_interfaces_translate_sources() {
        let mut facts = facts();
        for (index, address) in [(2, "10.0.0.5"), (4, "192.0.2.1")] {
            let link = facts.links.get_mut(&index).unwrap();
            link.external = vec![candidate(address)];
        }
        let plan = plan(&local(), &snapshot(), &tun(), &facts, |_, _| Vec::new());
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
            let plan = plan(local, &snapshot(), &tun(), &facts, |_, _| Vec::new());
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
        let plan = plan(&local(), &snapshot(), &tun(), &facts(), |_, _| Vec::new());
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
            let plan = plan(local, &snapshot(), &tun(), &facts, |_, _| Vec::new());
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
        let plan = plan(&local(), &snapshot(), &tun(), &facts, |_, _| Vec::new());
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
        }
        let plan = plan(&local(), &snapshot(), &tun(), &facts, |_, _| Vec::new());
        let names = |links: &[Link]| links.iter().map(|l| l.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&plan.datapath.subnet), ["eth1"]);
        assert_eq!(plan.datapath.external.keys().collect::<Vec<_>>(), [&3]);
        assert_eq!(names(&plan.forwarding), ["sluice0", "eth0", "eth1"]);
        assert_eq!(facts.unserved(&plan).count(), 0);
        let stack: Vec<Link> = plan.stack_links.into_iter().collect();
        assert_eq!(names(&stack), ["eth0"]);
        let route = snapshot().routes[0].cidr;
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
        let plan = plan(&local, &snapshot(), &tun(), &facts(), |_, _| Vec::new());
        let facts = facts();
        let unserved: Vec<_> = facts.unserved(&plan).collect();
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
        let plan = plan(&local(), &snapshot(), &tun(), &facts(), |_, _| Vec::new());
        let want: Vec<IpNet> = ["100.64.0.0/24", "100.64.0.2/32", "fd7a::2/128"]
            .iter()
            .map(|net| net.parse().unwrap())
            .collect();
        assert_eq!(plan.tunnel_routes, want);
    }

    #[test]
    fn without_ipv6_its_networks_lead_nowhere_else() {
        let of = |ipv6| {
            let facts = Facts { ipv6, ..facts() };
            plan(&local(), &snapshot(), &tun(), &facts, |_, _| Vec::new())
        };
        let routes = |plan: &Plan, family| match plan.action(Part::Routes(family)) {
            Action::Routes { device, nets, .. } => (device, nets.len()),
            _ => unreachable!(),
        };
        let addresses = |plan: &Plan, family| match plan.action(Part::Addresses(family)) {
            Action::Addresses(_, nets) => nets.len(),
            _ => unreachable!(),
        };
        for (ipv6, v6_routes, v6_addresses) in [
            (Ipv6::On, (true, 1), 1),
            (Ipv6::Off, (false, 1), 0),
            (Ipv6::Absent, (false, 0), 0),
        ] {
            let plan = of(ipv6);
            assert_eq!(routes(&plan, Family::V6), v6_routes);
            assert_eq!(addresses(&plan, Family::V6), v6_addresses);
            assert_eq!(routes(&plan, Family::V4), (true, 2));
            assert_eq!(addresses(&plan, Family::V4), 1);
            assert_eq!(plan.without_ipv6().is_some(), ipv6 != Ipv6::On);
        }
    }

    #[test]
    fn names_are_resolved_by_the_caller() {
        let there: SocketAddr = "198.51.100.1:7".parse().unwrap();
        let unresolved = plan(&local(), &snapshot(), &tun(), &facts(), |_, _| Vec::new());
        assert_eq!(unresolved.peers[0].endpoint, None);
        let resolved = plan(&local(), &snapshot(), &tun(), &facts(), |host, port| {
            assert_eq!((host, port), ("laptop.example", 7));
            vec![there]
        });
        assert_eq!(resolved.peers[0].endpoint, Some(there));
    }
}

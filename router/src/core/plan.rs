//! The desired state of the machine but for the peers, derived from settings, what control sources
//! want and the network.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::Facts;
use super::mtu::tunnel_mtu;
use super::vrf;
use crate::config::{Interface, Local};
use crate::control::State;
use crate::datapath::masquerade;
use crate::datapath::{External, Link, Spec};
use crate::netlink::Family;
use crate::netlink::sysctl::Ipv6;
use crate::via::ViaNet;

/// The desired state. Peers, their allowed IPs and the routes to these are not in it: there are many,
/// and they stand in the [`State`] already.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The TUN device.
    pub tun: Link,
    /// Tunnel MTU in bytes.
    pub mtu: u16,
    /// Tunnel addresses.
    pub addresses: Vec<IpNet>,
    /// Which families peers have allowed IPs of.
    pub overlay: Overlay,
    /// Whether the TUN device can have IPv6.
    pub ipv6: Ipv6,
    /// The uplink, if there is one now.
    pub uplink: Option<Link>,
    /// What does not work since an interface is in a VRF, with the mend.
    pub vrf_problems: Vec<String>,
    /// Interfaces that forward.
    pub forwarding: Vec<Link>,
    /// Subnet-side interfaces without an Ethernet header, which the programs cannot serve.
    pub stack_links: BTreeSet<Link>,
    /// The routes that lead to one of them.
    pub stack_routes: BTreeMap<IpNet, String>,
    /// The sites' networks that peers reach by IPv6 (4via6), which the engine translates.
    pub sites: Vec<ViaNet>,
    /// What the datapath serves, without the peers' allowed IPs.
    pub datapath: Spec,
    /// MTUs in bytes of the interfaces that the programs serve, by index. The programs are told what
    /// they are when the datapath is put in force.
    pub link_mtus: BTreeMap<u32, u32>,
}

/// What of the peers the plan depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlay {
    ipv4: bool,
    ipv6: bool,
    /// Some peer has no configured endpoint, so that it must come by itself.
    knocks: bool,
}

impl Overlay {
    /// IPv4 alone.
    #[cfg(test)]
    pub(super) const IPV4: Self = Self {
        ipv4: true,
        ipv6: false,
        knocks: false,
    };

    /// As `state` has it.
    pub fn of(state: &State) -> Self {
        let mut nets = state.peers.allowed_ips().keys();
        let is_v4 = |net: &IpNet| net.addr().is_ipv4();
        Self {
            // Sorted, all of IPv4 comes before IPv6.
            ipv4: nets.next().is_some_and(is_v4),
            ipv6: state
                .peers
                .allowed_ips()
                .keys()
                .next_back()
                .is_some_and(|net| !is_v4(net)),
            knocks: state.peers.iter().any(|peer| peer.endpoint.is_none()),
        }
    }

    fn has(self, family: Family) -> bool {
        match family {
            Family::V4 => self.ipv4,
            Family::V6 => self.ipv6,
        }
    }
}

impl Plan {
    /// The tunnel addresses of one family, as far as the device can have any.
    pub(super) fn addresses(&self, family: Family) -> Vec<IpNet> {
        let possible = family == Family::V4 || self.ipv6 == Ipv6::On;
        let wanted = self.addresses.iter().filter(|_| possible);
        wanted
            .filter(|net| Family::of(net.addr()) == family)
            .copied()
            .collect()
    }

    /// The interfaces that forward packets of one family.
    pub(super) fn forwarding(&self, family: Family) -> Vec<Link> {
        // What the overlay has no address of cannot be forwarded.
        let links = self.forwarding.iter().filter(|_| self.overlay.has(family));
        links.cloned().collect()
    }

    /// How routes to peers can be made in one family.
    pub(super) fn way(&self, family: Family) -> Ipv6 {
        match family {
            Family::V4 => Ipv6::On,
            Family::V6 => self.ipv6,
        }
    }

    /// Whether anything of this family is to be carried.
    pub fn asks(&self, family: Family) -> bool {
        let mut own = self.addresses.iter();
        self.overlay.has(family) || own.any(|net| Family::of(net.addr()) == family)
    }

    /// Where packets for routed CIDRs may leave by an interface that this plan does not serve: the CIDR,
    /// and the interface's name.
    pub fn unserved<'a>(&'a self, facts: &'a Facts) -> impl Iterator<Item = (IpNet, &'a str)> {
        // What the programs leave to the kernel is served too.
        let served = move |index: &u32| self.forwarding.iter().any(|link| link.index == *index);
        facts.egress.iter().flat_map(move |(cidr, interfaces)| {
            let unserved = interfaces.iter().filter(move |index| !served(index));
            let names = unserved.filter_map(move |index| facts.links.get(index));
            names.map(|link| (*cidr, link.name.as_str()))
        })
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

/// Derives the desired state.
pub fn plan(local: &Local, state: &State, tun: &Link, facts: &Facts) -> Plan {
    let uplink = match &local.uplink {
        Interface::Auto => facts.default_link.and_then(|index| facts.link(index)),
        Interface::Named(name) => facts.link_named(name),
    };
    let subnet: BTreeSet<Link> = if local.subnet.is_empty() {
        let indices = state
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
    let stack_routes = state.routes.iter().filter_map(|route| {
        let mut links = facts.links_toward(&route.cidr);
        let link = links.find_map(|index| stack_links.iter().find(|l| l.index == index))?;
        Some((route.cidr, link.name.clone()))
    });
    let stack_routes = stack_routes.collect();
    let served: Vec<Link> = subnet.difference(&stack_links).cloned().collect();
    let link_mtus = served
        .iter()
        .filter_map(|link| Some((link.index, facts.links.get(&link.index)?.mtu)))
        .collect();
    let addresses = subnet
        .iter()
        .filter_map(|link| facts.links.get(&link.index))
        .flat_map(|link| link.addresses.iter().map(IpNet::addr))
        .collect();
    let overlay = Overlay::of(state);
    let (mtu, _) = tunnel_mtu(local, facts);
    let vrf_problems = vrf::problems(&state.routes, tun, facts, uplink.as_ref(), &subnet);
    Plan {
        tun: tun.clone(),
        mtu,
        vrf_problems,
        addresses: state.addresses().to_vec(),
        overlay,
        ipv6: facts.ipv6,
        uplink,
        forwarding: std::iter::once(tun.clone())
            .chain(subnet.iter().cloned())
            .collect(),
        stack_links,
        stack_routes,
        sites: state.sites.clone(),
        link_mtus,
        datapath: Spec {
            tun: tun.clone(),
            mtu,
            subnet: served,
            route_mtus: facts.route_mtus.clone(),
            local_ports: None,
            own: state.addresses().iter().map(IpNet::addr).collect(),
            routes: state.routes.clone(),
            policy: state.policy.clone(),
            external,
            chosen,
            addresses,
            guarded_port: local.uplink_guard.then_some(local.listen_port),
            marks: local.marks,
            handed_over: Some(local.marks.handed_over),
            knocked_port: overlay.knocks.then_some(local.listen_port),
            // What is the peers' is added where it is put in force.
            ..Spec::default()
        },
    }
}

#[cfg(test)]
mod tests;

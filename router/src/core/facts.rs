//! What the kernel says of the network.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::datapath::Link;
use crate::datapath::masquerade::{Candidate, Label};
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

/// The VRF that an interface is in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vrf {
    /// Its name.
    pub name: String,
    /// The networks of the overlay whose packets its table does not lead into the TUN device.
    pub astray: Vec<IpNet>,
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
    pub(super) fn link(&self, index: u32) -> Option<Link> {
        self.links.get(&index).map(|facts| Link {
            index,
            name: facts.name.clone(),
        })
    }

    pub(super) fn link_named(&self, name: &str) -> Option<Link> {
        let (index, facts) = self.links.iter().find(|(_, facts)| facts.name == name)?;
        Some(Link {
            index: *index,
            name: facts.name.clone(),
        })
    }

    /// Every interface that packets for `cidr` may leave by: the main table's answer for it, and
    /// those connected to a part of it.
    pub(super) fn links_toward(&self, cidr: &IpNet) -> impl Iterator<Item = u32> {
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
}

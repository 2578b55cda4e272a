//! What the kernel says of the network, gathered for the core and for the check of a configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::control::Snapshot;
use crate::core::{Facts, LinkFacts};
use crate::netlink::{self, Netlink};

/// Gathers the facts. Our own TUN device and the loopback are left out: neither is a subnet side.
pub(super) async fn gather(
    netlink: &Netlink,
    snapshot: &Snapshot,
    tun: Option<u32>,
) -> Result<Facts, netlink::Error> {
    let mut links = BTreeMap::new();
    for info in netlink.links().await? {
        if Some(info.link.index) != tun && info.link.name != "lo" {
            let facts = LinkFacts {
                name: info.link.name,
                addresses: Vec::new(),
                external: Vec::new(),
            };
            links.insert(info.link.index, facts);
        }
    }
    for (index, address) in netlink.addresses().await? {
        if let Some(link) = links.get_mut(&index) {
            link.addresses.push(address);
        }
    }
    for (index, address) in netlink.external_addresses().await? {
        if let Some(link) = links.get_mut(&index)
            && link
                .external
                .iter()
                .all(|other| other.is_ipv4() != address.is_ipv4())
        {
            link.external.push(address);
        }
    }
    let mut egress = BTreeMap::new();
    for route in &snapshot.routes {
        let hop = netlink.route_to(first_host(&route.cidr)).await?;
        if let Some(hop) = hop.filter(|hop| links.contains_key(&hop.link.index)) {
            egress.insert(route.cidr, hop.link.index);
        }
    }
    let (mut default_link, mut gateways) = (None, BTreeSet::new());
    for family in [
        IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::from(Ipv6Addr::UNSPECIFIED),
    ] {
        if let Some(hop) = netlink.default_route(family).await? {
            default_link = default_link.or(Some(hop.link.index));
            // A link-local gateway says nothing without its link, and no allowed IP holds it.
            gateways.extend(hop.gateway.filter(|gateway| !is_link_local(*gateway)));
        }
    }
    Ok(Facts {
        links,
        default_link,
        gateways,
        egress,
        former: BTreeSet::new(),
    })
}

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// An address of `cidr` that may be a host: not the network's own where there is another.
fn first_host(cidr: &IpNet) -> IpAddr {
    cidr.hosts().next().unwrap_or(cidr.addr())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_hosts() {
        for (cidr, host) in [
            ("10.0.0.0/16", "10.0.0.1"),
            ("10.0.0.7/32", "10.0.0.7"),
            ("fd00::/8", "fd00::"),
            ("0.0.0.0/0", "0.0.0.1"),
        ] {
            assert_eq!(
                first_host(&cidr.parse().unwrap()),
                host.parse::<IpAddr>().unwrap(),
                "{cidr}"
            );
        }
    }
}

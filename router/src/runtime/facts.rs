//! What the kernel says of the network, gathered for the core and for the check of a configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::control::State;
use crate::core::{Facts, LinkFacts, Path, Vrf};
use crate::netlink::{self, LinkInfo, Netlink, sysctl};

/// So many networks of the overlay a VRF is asked about: one that is missing is enough to tell.
const MOST_ASKED: usize = 8;

/// Gathers the facts. Our own TUN device and the loopback are left out: neither is a subnet side.
pub(super) async fn gather(
    netlink: &Netlink,
    state: &State,
    tun: Option<u32>,
) -> Result<Facts, netlink::Error> {
    let (mut links, mut without_ethernet) = (BTreeMap::new(), BTreeSet::new());
    let mut own_name = None;
    let infos = netlink.links().await?;
    let vrfs = vrfs(netlink, &infos, state, tun).await?;
    for info in infos {
        if Some(info.link.index) == tun {
            own_name = Some(info.link.name.clone());
        }
        if Some(info.link.index) != tun && info.link.name != "lo" {
            let facts = LinkFacts {
                name: info.link.name,
                addresses: Vec::new(),
                external: Vec::new(),
                mtu: info.mtu,
            };
            links.insert(info.link.index, facts);
            if !info.ethernet {
                without_ethernet.insert(info.link.index);
            }
        }
    }
    for (index, address) in netlink.addresses().await? {
        if let Some(link) = links.get_mut(&index) {
            link.addresses.push(address);
        }
    }
    for (index, candidate) in netlink.masquerade_candidates().await? {
        if let Some(link) = links.get_mut(&index) {
            link.external.push(candidate);
        }
    }
    let mut egress = BTreeMap::new();
    for route in &state.routes {
        let mut interfaces = netlink.interfaces_toward(first_host(&route.cidr)).await?;
        interfaces.retain(|index| links.contains_key(index));
        if !interfaces.is_empty() {
            egress.insert(route.cidr, interfaces);
        }
    }
    let (mut default_link, mut gateways) = (None, BTreeSet::new());
    let mut paths = BTreeMap::new();
    for family in [
        IpAddr::from(Ipv4Addr::UNSPECIFIED),
        IpAddr::from(Ipv6Addr::UNSPECIFIED),
    ] {
        if let Some(hop) = netlink.default_route(family).await? {
            default_link = default_link.or(Some(hop.link.index));
            let (link, mtu) = (hop.link.index, hop.mtu);
            paths.insert(family, Path { link, mtu });
            // A link-local gateway says nothing without its link, and no allowed IP holds it.
            gateways.extend(hop.gateway.filter(|gateway| !is_link_local(*gateway)));
        }
    }
    let mut route_mtus = netlink.route_mtus().await?;
    route_mtus.retain(|net, _| {
        let mut routes = state.routes.iter();
        routes.any(|route| route.cidr.contains(net) || net.contains(&route.cidr))
    });
    Ok(Facts {
        links,
        default_link,
        gateways,
        egress,
        former: BTreeSet::new(),
        vrfs,
        vrfs_heard: sysctl::is_set("net/ipv4/udp_l3mdev_accept"),
        // What a new device begins with, as long as there is none.
        ipv6: sysctl::ipv6_of(own_name.as_deref().unwrap_or("default")),
        labels: netlink.labels().await?,
        paths,
        without_ethernet,
        route_mtus,
    })
}

/// The VRFs, by the index of each interface in one.
async fn vrfs(
    netlink: &Netlink,
    infos: &[LinkInfo],
    state: &State,
    tun: Option<u32>,
) -> Result<BTreeMap<u32, Vrf>, netlink::Error> {
    let mut members = BTreeMap::new();
    let vrfs = infos.iter().filter(|i| i.kind.as_deref() == Some("vrf"));
    for vrf in vrfs {
        let mut astray = Vec::new();
        // As long as there is no TUN device, nothing can lead there.
        if let Some(tun) = tun {
            let nets: Vec<IpNet> = state.peers.allowed_ips().keys().copied().collect();
            for net in IpNet::aggregate(&nets).into_iter().take(MOST_ASKED) {
                let hop = netlink
                    .route_within(first_host(&net), vrf.link.index)
                    .await?;
                if hop.is_none_or(|hop| hop.link.index != tun) {
                    astray.push(net);
                }
            }
        }
        let vrf_of_them = Vrf {
            name: vrf.link.name.clone(),
            astray,
        };
        for member in infos.iter().filter(|i| i.master == Some(vrf.link.index)) {
            members.insert(member.link.index, vrf_of_them.clone());
        }
    }
    Ok(members)
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

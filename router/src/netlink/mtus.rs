//! The MTUs that routes have of their own (`ip route … mtu`). The kernel's forwarding keeps to them, but a
//! FIB lookup of an eBPF program tells them only where they are locked.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::Ordering;

use ipnet::IpNet;
use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType,
};

use super::routes::ip;
use super::{Error, Netlink, family_of};

impl Netlink {
    /// The main table's routes, each with its own MTU in bytes, or zero; empty when none has one. The table
    /// is read only if there was such a route when it was read last, or one has come since.
    pub async fn route_mtus(&self) -> Result<BTreeMap<IpNet, u32>, Error> {
        if !self.own_mtus.swap(false, Ordering::Relaxed) {
            return Ok(BTreeMap::new());
        }
        match self.read_mtus().await {
            Ok(mtus) if mtus.values().all(|mtu| *mtu == 0) => Ok(BTreeMap::new()),
            outcome => {
                self.own_mtus.store(true, Ordering::Relaxed);
                outcome
            }
        }
    }

    async fn read_mtus(&self) -> Result<BTreeMap<IpNet, u32>, Error> {
        let mut routes = Vec::new();
        for family in [
            IpAddr::from(Ipv4Addr::UNSPECIFIED),
            IpAddr::from(Ipv6Addr::UNSPECIFIED),
        ] {
            let mut request = RouteMessage::default();
            request.header.address_family = family_of(family);
            let request = RouteNetlinkMessage::GetRoute(request);
            let answers = match self.request(request, NLM_F_DUMP, "list routes").await {
                // Without that family in the kernel.
                Err(error) if matches!(error.errno(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP) => {
                    continue;
                }
                answers => answers?,
            };
            routes.extend(answers.into_iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(message) => read(&message, family),
                _ => None,
            }));
        }
        // The kernel takes the one with the lowest metric: it is put in last.
        routes.sort_by_key(|(_, metric, _)| std::cmp::Reverse(*metric));
        let mtus = routes.into_iter().map(|(net, _, mtu)| (net, mtu));
        Ok(mtus.collect())
    }
}

/// Destination, metric, and MTU of a route of the main table; zero: none of its own.
fn read(message: &RouteMessage, family: IpAddr) -> Option<(IpNet, u32, u32)> {
    let header = &message.header;
    if header.address_family != family_of(family)
        || header.kind != RouteType::Unicast
        || header.table != RouteHeader::RT_TABLE_MAIN
    {
        return None;
    }
    let (mut destination, mut metric) = (family, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Priority(priority) => metric = *priority,
            _ => {}
        }
    }
    let net = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some((net.trunc(), metric, own_mtu(message).unwrap_or(0)))
}

/// The MTU in bytes that a route has of its own.
pub(super) fn own_mtu(message: &RouteMessage) -> Option<u32> {
    let metrics = message
        .attributes
        .iter()
        .filter_map(|attribute| match attribute {
            RouteAttribute::Metrics(metrics) => Some(metrics),
            _ => None,
        });
    metrics.flatten().find_map(|metric| match metric {
        RouteMetric::Mtu(mtu) if *mtu != 0 => Some(*mtu),
        _ => None,
    })
}

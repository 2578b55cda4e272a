//! The way to an address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::PoisonError;

use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType,
};

use super::socket::Socket;
use super::{Error, Netlink, family_of};
use crate::datapath::Link;

/// Addresses that nobody has: reserved (RFC 1112, section 4), and of no allocated block.
const NOWHERE_V4: Ipv4Addr = Ipv4Addr::new(240, 0, 0, 1);
const NOWHERE_V6: Ipv6Addr = Ipv6Addr::new(0x4000, 0, 0, 0, 0, 0, 0, 1);

/// The next hop toward an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Interface that packets leave by.
    pub link: Link,
    /// Gateway; `None` when the destination is on the link.
    pub gateway: Option<IpAddr>,
    /// Source address that the kernel would choose.
    pub source: Option<IpAddr>,
    /// MTU of the route in bytes, where it has one of its own.
    pub mtu: Option<u32>,
}

impl Netlink {
    /// Does `work` with the blocking socket, on a thread that may wait.
    pub(super) async fn in_bulk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Socket) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let bulk = self.bulk.clone();
        let work = move || work(&mut bulk.lock().unwrap_or_else(PoisonError::into_inner));
        match tokio::task::spawn_blocking(work).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::new("look after routes", libc::ECANCELED)),
        }
    }

    /// The next hop toward `address` for underlay and subnet packets, as if our table were not
    /// there. `None` without a route, and when the address is the router's own.
    pub async fn route_to(&self, address: IpAddr) -> Result<Option<NextHop>, Error> {
        self.look_up(address, RouteAttribute::Mark(self.mark)).await
    }

    /// The next hop toward `address` for packets of the VRF with this index.
    pub async fn route_within(&self, address: IpAddr, vrf: u32) -> Result<Option<NextHop>, Error> {
        self.look_up(address, RouteAttribute::Oif(vrf)).await
    }

    async fn look_up(
        &self,
        address: IpAddr,
        way: RouteAttribute,
    ) -> Result<Option<NextHop>, Error> {
        let mut request = RouteMessage::default();
        request.header.address_family = family_of(address);
        request.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
        request.attributes = vec![RouteAttribute::Destination(address.into()), way];
        let request = RouteNetlinkMessage::GetRoute(request);
        let doing = format!("look up the route to {address}");
        match self.request(request, 0, &doing).await {
            Ok(answers) => self.next_hop(answers.into_iter().find_map(route)).await,
            Err(error) if no_route(error.errno()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The main table's default route, the one with the lowest metric. `family` is that of an
    /// address such as `Ipv4Addr::UNSPECIFIED`.
    pub async fn default_route(&self, family: IpAddr) -> Result<Option<NextHop>, Error> {
        // As a rule the kernel can be asked for it by an address to which nothing else leads, without
        // a look at each of its routes.
        let nowhere = match family {
            IpAddr::V4(_) => IpAddr::from(NOWHERE_V4),
            IpAddr::V6(_) => IpAddr::from(NOWHERE_V6),
        };
        match self.fib_entry(nowhere).await {
            // A route refuses such addresses: it says nothing of others.
            Err(error)
                if matches!(
                    error.errno(),
                    libc::EINVAL | libc::EACCES | libc::EHOSTUNREACH
                ) => {}
            Err(error) if no_route(error.errno()) => return Ok(None),
            Err(error) => return Err(error),
            Ok(None) => return Ok(None),
            Ok(Some(message))
                if message.header.destination_prefix_length == 0
                    && message.header.table == RouteHeader::RT_TABLE_MAIN =>
            {
                return self.next_hop(Some(message)).await;
            }
            Ok(Some(_)) => {}
        }
        let mut request = RouteMessage::default();
        request.header.address_family = family_of(family);
        let request = RouteNetlinkMessage::GetRoute(request);
        let answers = self.request(request, NLM_F_DUMP, "list routes").await?;
        let metric = |message: &RouteMessage| {
            let priority = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RouteAttribute::Priority(metric) => Some(*metric),
                    _ => None,
                });
            priority.unwrap_or(0)
        };
        let best = answers
            .into_iter()
            .filter_map(route)
            .filter(|message| {
                message.header.address_family == family_of(family)
                    && message.header.destination_prefix_length == 0
                    && message.header.table == RouteHeader::RT_TABLE_MAIN
            })
            .min_by_key(metric);
        self.next_hop(best).await
    }

    async fn next_hop(&self, message: Option<RouteMessage>) -> Result<Option<NextHop>, Error> {
        let Some(message) = message.filter(|m| m.header.kind == RouteType::Unicast) else {
            return Ok(None);
        };
        let (mut index, mut gateway, mut source, mut mtu) = (None, None, None, None);
        let mut read = |attribute: &RouteAttribute| match attribute {
            RouteAttribute::Oif(oif) => index = Some(*oif),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Via(via) => gateway = via_address(via),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        };
        let mut first_hop = None;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::MultiPath(hops) => first_hop = hops.first(),
                other => read(other),
            }
        }
        if let Some(hop) = first_hop {
            read(&RouteAttribute::Oif(hop.interface_index));
            hop.attributes.iter().for_each(read);
        }
        let Some(index) = index else { return Ok(None) };
        let info = self.link_by_index(index).await?;
        Ok(info.map(|info| NextHop {
            link: info.link,
            gateway,
            source,
            mtu,
        }))
    }
}

pub(super) fn route(answer: RouteNetlinkMessage) -> Option<RouteMessage> {
    match answer {
        RouteNetlinkMessage::NewRoute(message) => Some(message),
        _ => None,
    }
}

pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// The gateway of another family than the route's (IPv4 by an IPv6 next hop, RFC 8950).
fn via_address(via: &netlink_packet_route::route::RouteVia) -> Option<IpAddr> {
    use netlink_packet_route::route::RouteVia;
    match via {
        RouteVia::Inet(v4) => Some((*v4).into()),
        RouteVia::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// What the kernel answers when no packet could go that way: no route, or one that refuses.
pub(super) fn no_route(errno: i32) -> bool {
    matches!(
        errno,
        libc::ENETUNREACH
            | libc::EHOSTUNREACH
            | libc::ENETDOWN
            | libc::EACCES
            | libc::EINVAL
            | libc::EAFNOSUPPORT
            | libc::EOPNOTSUPP
    )
}

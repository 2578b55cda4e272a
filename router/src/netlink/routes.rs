//! Routes: those into the TUN device in our own table, and the way to an address.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::PoisonError;

use ipnet::IpNet;
use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteType,
};

use super::socket::{Refusal, Socket};
use super::wire::{self, Payload};
use super::{Error, Family, Netlink, PROTOCOL, address_from, family_of};
use crate::datapath::Link;

/// Routes per datagram: enough that the system call does not count, few enough that the refusals
/// of all of them fit the receive buffer.
const ROUTES_PER_DATAGRAM: usize = 512;

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
    /// Makes `table` hold exactly these routes of one family into the interface `index`, without
    /// touching those that are right already, or routes of others. Behind them lie routes that drop
    /// in silence, as few as hold the same addresses: when the interface is gone, or where there is
    /// no `index` because it cannot carry this family, packets for peers go nowhere else.
    ///
    /// Returns what had to be changed, in words.
    pub async fn sync_routes(
        &self,
        table: u32,
        family: Family,
        index: Option<u32>,
        wanted: &[IpNet],
    ) -> Result<Vec<String>, Error> {
        let ours = wanted.iter().filter(|net| Family::of(net.addr()) == family);
        let wanted = ours.copied().collect();
        self.in_bulk(move |socket| sync(socket, table, family, index, wanted))
            .await
    }

    /// Removes what [`Netlink::sync_routes`] has put into `table` and the kernel does not remove
    /// with the interface.
    pub async fn release_routes(&self, table: u32) -> Result<(), Error> {
        let work = move |socket: &mut Socket| {
            for family in Family::ALL {
                let mut held = present(socket, table, family)?;
                held.retain(|(_, target)| *target == Target::Nowhere);
                remove(socket, table, &held)?;
            }
            Ok(())
        };
        self.in_bulk(work).await
    }

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
        match self.fib_entry(nowhere).await? {
            None => return Ok(None),
            Some(message)
                if message.header.destination_prefix_length == 0
                    && message.header.table == RouteHeader::RT_TABLE_MAIN =>
            {
                return self.next_hop(Some(message)).await;
            }
            Some(_) => {}
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

/// Attribute types and values of `include/uapi/linux/rtnetlink.h`.
mod uapi {
    pub(super) const RTM_NEWROUTE: u16 = 24;
    pub(super) const RTM_DELROUTE: u16 = 25;
    pub(super) const RTM_GETROUTE: u16 = 26;
    pub(super) const RTA_DST: u16 = 1;
    pub(super) const RTA_OIF: u16 = 4;
    pub(super) const RTA_PRIORITY: u16 = 6;
    pub(super) const RTA_TABLE: u16 = 15;
    pub(super) const RT_SCOPE_UNIVERSE: u8 = 0;
    pub(super) const RT_SCOPE_LINK: u8 = 253;
    pub(super) const RT_SCOPE_NOWHERE: u8 = 255;
    pub(super) const RTN_UNSPEC: u8 = 0;
    pub(super) const RTN_UNICAST: u8 = 1;
    pub(super) const RTN_BLACKHOLE: u8 = 6;
}

/// The metric of routes that lead nowhere: behind all others.
const LAST: u32 = u32::MAX;

/// Where a route of ours leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Target {
    /// Into the interface with this index.
    Device(u32),
    /// Packets are dropped in silence.
    Nowhere,
}

/// Writes a `struct rtmsg` and the attributes that name one of our routes.
fn write_route(payload: &mut Payload<'_>, table: u32, target: Target, net: IpNet, add: bool) {
    let (family, scope) = match (net, add, target) {
        // A route that is to be removed must match whatever scope and type it has.
        (IpNet::V4(_), false, _) => (libc::AF_INET, uapi::RT_SCOPE_NOWHERE),
        (IpNet::V4(_), true, Target::Device(_)) => (libc::AF_INET, uapi::RT_SCOPE_LINK),
        (IpNet::V4(_), true, Target::Nowhere) => (libc::AF_INET, uapi::RT_SCOPE_UNIVERSE),
        (IpNet::V6(_), ..) => (libc::AF_INET6, uapi::RT_SCOPE_UNIVERSE),
    };
    let kind = match (target, add) {
        (Target::Nowhere, _) => uapi::RTN_BLACKHOLE,
        (Target::Device(_), true) => uapi::RTN_UNICAST,
        (Target::Device(_), false) => uapi::RTN_UNSPEC,
    };
    let table_byte = u8::try_from(table).unwrap_or(0);
    let flags = [0; 4];
    payload.fixed(&[
        family as u8,
        net.prefix_len(),
        0,
        0,
        table_byte,
        PROTOCOL,
        scope,
        kind,
    ]);
    payload.fixed(&flags);
    payload.u32(uapi::RTA_TABLE, table);
    match net.network() {
        IpAddr::V4(v4) => payload.attribute(uapi::RTA_DST, &v4.octets()),
        IpAddr::V6(v6) => payload.attribute(uapi::RTA_DST, &v6.octets()),
    }
    match target {
        Target::Device(index) => payload.u32(uapi::RTA_OIF, index),
        Target::Nowhere => payload.u32(uapi::RTA_PRIORITY, LAST),
    }
}

/// Our routes of one family in `table`, and where each leads.
fn present(socket: &mut Socket, table: u32, family: Family) -> Result<Vec<(IpNet, Target)>, Error> {
    let family = match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    };
    let request = |payload: &mut Payload<'_>| {
        payload.fixed(&[family, 0, 0, 0, 0, PROTOCOL, 0, 0, 0, 0, 0, 0]);
        payload.u32(uapi::RTA_TABLE, table);
    };
    match socket.dump(uapi::RTM_GETROUTE, request) {
        Ok(answer) => Ok(wire::messages(&answer)
            .filter_map(|message| read_route(message.payload, family, table))
            .collect()),
        // The kernel makes a table when it gets its first route.
        Err(refusal)
            if matches!(
                refusal.errno,
                libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP
            ) =>
        {
            Ok(Vec::new())
        }
        Err(refusal) => Err(Error::refused("list our routes", refusal)),
    }
}

fn read_route(payload: &[u8], family: u8, table: u32) -> Option<(IpNet, Target)> {
    let [found, prefix, _, _, _, protocol, _, kind, ..]: [u8; 12] = wire::field(payload, 0)?;
    let attributes = payload.get(12..)?;
    let host_u32 = |kind| {
        let value = wire::attribute(attributes, kind)?;
        Some(u32::from_ne_bytes(value.try_into().ok()?))
    };
    // Asked for a family that it lacks, the kernel may list the others instead.
    if found != family || protocol != PROTOCOL || host_u32(uapi::RTA_TABLE) != Some(table) {
        return None;
    }
    let address = match wire::attribute(attributes, uapi::RTA_DST) {
        Some(bytes) => address_from(bytes)?,
        None if found == libc::AF_INET as u8 => IpAddr::from([0u8; 4]),
        None => IpAddr::from([0u8; 16]),
    };
    let net = IpNet::new(address, prefix).ok()?;
    let target = match kind {
        uapi::RTN_BLACKHOLE => Target::Nowhere,
        _ => Target::Device(host_u32(uapi::RTA_OIF)?),
    };
    Some((net, target))
}

fn sync(
    socket: &mut Socket,
    table: u32,
    family: Family,
    index: Option<u32>,
    wanted: Vec<IpNet>,
) -> Result<Vec<String>, Error> {
    let into = |net: IpNet| Some((net.trunc(), Target::Device(index?)));
    let nowhere = IpNet::aggregate(&wanted)
        .into_iter()
        .map(|net| (net, Target::Nowhere));
    let mut missing: HashSet<_> = wanted.into_iter().filter_map(into).chain(nowhere).collect();
    let mut surplus = present(socket, table, family)?;
    surplus.retain(|route| !missing.remove(route));
    let of = |count: usize, state: &str, first: Option<&(IpNet, Target)>| {
        let (net, _) = first?;
        Some(match count {
            1 => format!("the route to {net} was {state}"),
            _ => format!("{count} routes were {state}, that to {net} among them"),
        })
    };
    let changed = [
        of(missing.len(), "missing", missing.iter().next()),
        of(surplus.len(), "there", surplus.first()),
    ];
    let is_last = |(_, target): &(IpNet, Target)| *target == Target::Nowhere;
    let (last, first): (Vec<_>, Vec<_>) = surplus.into_iter().partition(is_last);
    let (safety, then): (Vec<_>, Vec<_>) = missing.into_iter().partition(is_last);
    // In this order, for nothing may leave by another way meanwhile.
    add(socket, table, &safety)?;
    remove(socket, table, &first)?;
    add(socket, table, &then)?;
    remove(socket, table, &last)?;
    Ok(changed.into_iter().flatten().collect())
}

fn remove(socket: &mut Socket, table: u32, routes: &[(IpNet, Target)]) -> Result<(), Error> {
    for chunk in routes.chunks(ROUTES_PER_DATAGRAM) {
        let mut batch = socket.batch();
        for (net, target) in chunk {
            batch.push(uapi::RTM_DELROUTE, 0, |payload| {
                write_route(payload, table, *target, *net, false);
            });
        }
        let refused = socket
            .send(batch)
            .map_err(|refusal| Error::refused("remove routes", refusal))?;
        // ESRCH: it went by itself meanwhile.
        let serious = refused.into_iter().find(|(_, r)| r.errno != libc::ESRCH);
        if let Some((at, refusal)) = serious {
            let net = chunk.get(at as usize).map(|(net, _)| *net);
            return Err(failed("remove", table, net, refusal));
        }
    }
    Ok(())
}

fn add(socket: &mut Socket, table: u32, routes: &[(IpNet, Target)]) -> Result<(), Error> {
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    for chunk in routes.chunks(ROUTES_PER_DATAGRAM) {
        let mut batch = socket.batch();
        for (net, target) in chunk {
            batch.push(uapi::RTM_NEWROUTE, flags, |payload| {
                write_route(payload, table, *target, *net, true);
            });
        }
        let refused = socket
            .send(batch)
            .map_err(|refusal| Error::refused("add routes", refusal))?;
        if let Some((at, refusal)) = refused.into_iter().next() {
            let net = chunk.get(at as usize).map(|(net, _)| *net);
            return Err(failed("add", table, net, refusal));
        }
    }
    Ok(())
}

fn failed(verb: &str, table: u32, net: Option<IpNet>, refusal: Refusal) -> Error {
    let net = net.unwrap_or_default();
    Error::refused(format!("{verb} route {net} in table {table}"), refusal)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::netlink::wire::Batch;

    #[test]
    fn a_route_is_read_as_it_was_written() {
        for net in [
            "10.1.0.0/16",
            "0.0.0.0/0",
            "fd00::/8",
            "::/0",
            "2001:db8::7/128",
        ] {
            let net: IpNet = net.parse().unwrap();
            for target in [Target::Device(7), Target::Nowhere] {
                let mut batch = Batch::new(1);
                batch.push(uapi::RTM_NEWROUTE, 0, |payload| {
                    write_route(payload, 51820, target, net, true);
                });
                let message = wire::messages(batch.bytes()).next().unwrap();
                let family = if net.addr().is_ipv4() {
                    libc::AF_INET as u8
                } else {
                    libc::AF_INET6 as u8
                };
                let read = |table| read_route(message.payload, family, table);
                assert_eq!(read(51820), Some((net, target)));
                assert_eq!(read(51821), None);
            }
        }
    }
}

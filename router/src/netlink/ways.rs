//! Every interface that packets for an address may leave by.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use ipnet::Ipv6Net;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteType};

use super::routes::{no_route, route};
use super::socket::Socket;
use super::wire::{self, Payload};
use super::{Error, Netlink, family_of};

/// Message and attribute types of `include/uapi/linux/nexthop.h` and `rtnetlink.h`.
mod uapi {
    pub(super) const RTM_GETROUTE: u16 = 26;
    pub(super) const RTM_GETNEXTHOP: u16 = 106;
    pub(super) const RTA_DST: u16 = 1;
    pub(super) const RTA_PRIORITY: u16 = 6;
    pub(super) const RTA_TABLE: u16 = 15;
    pub(super) const RTA_NH_ID: u16 = 30;
    /// Bytes of a `struct rtmsg`.
    pub(super) const RTMSG: usize = 12;
    pub(super) const NHA_ID: u16 = 1;
    pub(super) const NHA_GROUP: u16 = 2;
    pub(super) const NHA_OIF: u16 = 5;
    /// Bytes of a `struct nhmsg`.
    pub(super) const NHMSG: usize = 8;
    /// Bytes of a `struct nexthop_grp`, which begins with the id of a member.
    pub(super) const NEXTHOP_GRP: usize = 8;
}

impl Netlink {
    /// The interfaces of all next hops of the route toward `address`, as if our table were not there.
    /// None without a route, and when the address is the router's own.
    pub async fn interfaces_toward(&self, address: IpAddr) -> Result<BTreeSet<u32>, Error> {
        let found = match self.fib_entry(address).await {
            Err(error) if no_route(error.errno()) => None,
            found => found?,
        };
        let Some(message) = found.filter(|message| message.header.kind == RouteType::Unicast)
        else {
            return Ok(BTreeSet::new());
        };
        let (mut interfaces, mut object) = (BTreeSet::new(), None);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Oif(index) => drop(interfaces.insert(*index)),
                RouteAttribute::MultiPath(hops) => {
                    interfaces.extend(hops.iter().map(|hop| hop.interface_index));
                }
                RouteAttribute::NhId(id) => object = Some(*id),
                _ => {}
            }
        }
        match (object, address) {
            // The kernel remembers the outcome of an IPv6 lookup with the next-hop object, and which
            // of the routes by that object it answers with is a matter of which was used first.
            (Some(_), IpAddr::V6(address)) => {
                self.in_bulk(move |socket| of_table(socket, address)).await
            }
            // With `net.ipv4.nexthop_compat_mode` off it names the object alone.
            (Some(id), _) if interfaces.is_empty() => {
                self.in_bulk(move |socket| of_object(socket, id)).await
            }
            _ => Ok(interfaces),
        }
    }

    /// The whole entry of the kernel's tables that leads packets to `address`, as if our table were
    /// not there: not the one next hop that a packet would get. The kernel answers with an error where
    /// none does, or one refuses them ([`no_route`]).
    pub(super) async fn fib_entry(&self, address: IpAddr) -> Result<Option<RouteMessage>, Error> {
        let mut request = RouteMessage::default();
        request.header.address_family = family_of(address);
        request.header.destination_prefix_length = if address.is_ipv4() { 32 } else { 128 };
        request.header.flags = RouteFlags::FibMatch;
        request.attributes = vec![
            RouteAttribute::Destination(address.into()),
            RouteAttribute::Mark(self.mark),
        ];
        let request = RouteNetlinkMessage::GetRoute(request);
        let doing = format!("look up the route to {address}");
        let answers = self.request(request, 0, &doing).await?;
        Ok(answers.into_iter().find_map(route))
    }
}

/// The interfaces of the next-hop object by which the main table leads to `address`.
fn of_table(socket: &mut Socket, address: Ipv6Addr) -> Result<BTreeSet<u32>, Error> {
    let family = libc::AF_INET6 as u8;
    let main = u32::from(libc::RT_TABLE_MAIN);
    let mut best: Option<((u8, Reverse<u32>), u32)> = None;
    let request = |payload: &mut Payload<'_>| {
        payload.fixed(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        payload.u32(uapi::RTA_TABLE, main);
    };
    let look = |message: &wire::Message<'_>| {
        let found = by_object(message.payload, address, main);
        if let Some(found) = found
            && best.is_none_or(|(rank, _)| found.0 > rank)
        {
            best = Some(found);
        }
    };
    // If the table changes meanwhile, that is news, and it is looked at again.
    socket
        .visit(uapi::RTM_GETROUTE, request, look)
        .map_err(|refusal| Error::refused("list routes", refusal))?;
    best.map_or(Ok(BTreeSet::new()), |(_, id)| of_object(socket, id))
}

/// How well a route fits (length of its prefix, then metric), and its next-hop object, if it leads to
/// `address` by one.
fn by_object(
    payload: &[u8],
    address: Ipv6Addr,
    wanted_table: u32,
) -> Option<((u8, Reverse<u32>), u32)> {
    let length = *payload.get(1)?;
    let attributes = payload.get(uapi::RTMSG..)?;
    let number = |kind| {
        let value = wire::attribute(attributes, kind)?;
        Some(u32::from_ne_bytes(value.try_into().ok()?))
    };
    let net = match wire::attribute(attributes, uapi::RTA_DST) {
        Some(bytes) => u128::from_be_bytes(bytes.try_into().ok()?),
        None => 0,
    };
    let object = number(uapi::RTA_NH_ID)?;
    let net = Ipv6Net::new(net.into(), length).ok()?;
    let leads = number(uapi::RTA_TABLE) == Some(wanted_table) && net.contains(&address);
    let metric = number(uapi::RTA_PRIORITY).unwrap_or(0);
    leads.then_some(((length, Reverse(metric)), object))
}

/// The interfaces of a next-hop object: of all members, where it is a group.
fn of_object(socket: &mut Socket, id: u32) -> Result<BTreeSet<u32>, Error> {
    let answer = socket
        .dump(uapi::RTM_GETNEXTHOP, |payload| {
            payload.fixed(&[0; uapi::NHMSG]);
        })
        .map_err(|refusal| Error::refused("list next hops", refusal))?;
    let objects: BTreeMap<u32, Object> = wire::messages(&answer)
        .filter_map(|message| Object::read(message.payload))
        .collect();
    let interface = |id: &u32| objects.get(id).and_then(|object| object.interface);
    let members = objects.get(&id).map(|object| &*object.members);
    let members = members.unwrap_or_default().iter();
    // A group has no groups in it.
    Ok(members.chain([&id]).filter_map(interface).collect())
}

/// A next-hop object.
#[derive(Debug, PartialEq, Eq)]
struct Object {
    interface: Option<u32>,
    members: Vec<u32>,
}

impl Object {
    /// Reads the answer about one, and tells its id.
    fn read(payload: &[u8]) -> Option<(u32, Self)> {
        let attributes = payload.get(uapi::NHMSG..)?;
        let number = |kind| {
            let value = wire::attribute(attributes, kind)?;
            Some(u32::from_ne_bytes(value.try_into().ok()?))
        };
        let group = wire::attribute(attributes, uapi::NHA_GROUP).unwrap_or_default();
        let members = group.chunks_exact(uapi::NEXTHOP_GRP);
        let object = Self {
            interface: number(uapi::NHA_OIF),
            members: members
                .filter_map(|member| Some(u32::from_ne_bytes(wire::field(member, 0)?)))
                .collect(),
        };
        Some((number(uapi::NHA_ID)?, object))
    }
}

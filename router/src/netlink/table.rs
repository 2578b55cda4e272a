//! Our own routing table: routes into the TUN device, and behind them those that lead nowhere.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use ipnet::IpNet;

use super::fewest::{Difference, Fewest};
use super::socket::{Refusal, Socket};
use super::wire::{self, Payload};
use super::{Error, Family, Netlink, PROTOCOL, address_from};

/// Routes per datagram: enough that the system call does not count, few enough that the refusals
/// of all of them fit the receive buffer.
const ROUTES_PER_DATAGRAM: usize = 512;

/// What was last put into tables, by table and family, as far as it is known.
pub(super) type Tables = Arc<Mutex<HashMap<(u32, Family), Held>>>;

/// What a table holds of one family.
#[derive(Debug)]
pub(super) struct Held {
    /// Where the routes lead.
    index: Option<u32>,
    /// The networks for which they are.
    wanted: BTreeSet<IpNet>,
    routes: Fewest,
    /// Routes of others that take packets which ours would take.
    in_the_way: Vec<Other>,
}

/// A route in our table that is not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Other {
    net: IpNet,
    /// Lower ones come first.
    metric: u32,
}

impl Netlink {
    /// Makes `table` lead these networks of one family into the interface `index`, by as few routes as
    /// hold the same addresses, without touching those that are right already, or routes of others.
    /// Behind each lies one that drops in silence: when the interface is gone, or where there is no
    /// `index` because it cannot carry this family, packets for peers go nowhere else.
    ///
    /// A route of others in the place of one of ours stays, see [`Netlink::routes_in_the_way`].
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
        let wanted: BTreeSet<IpNet> = ours.map(IpNet::trunc).collect();
        let mut held = Held {
            index,
            routes: Fewest::of(&wanted),
            wanted,
            in_the_way: Vec::new(),
        };
        let tables = self.tables.clone();
        let work = move |socket: &mut Socket| {
            let mut tables = tables.lock().unwrap_or_else(PoisonError::into_inner);
            // What a failure leaves is not known.
            tables.remove(&(table, family));
            let changed = sync(socket, table, family, &mut held)?;
            tables.insert((table, family), held);
            Ok(changed)
        };
        self.in_bulk(work).await
    }

    /// Adds and removes some of the routes that [`Netlink::sync_routes`] has made for this interface,
    /// and what lies behind them, at the cost of the change. An error says that the table is not known
    /// any more, and has to be made whole.
    pub async fn change_routes(
        &self,
        table: u32,
        family: Family,
        index: Option<u32>,
        add: &[IpNet],
        remove: &[IpNet],
    ) -> Result<(), Error> {
        let of_family = |nets: &[IpNet]| -> Vec<IpNet> {
            let nets = nets.iter().filter(|net| Family::of(net.addr()) == family);
            nets.map(IpNet::trunc).collect()
        };
        let (new, gone) = (of_family(add), of_family(remove));
        let tables = self.tables.clone();
        let work = move |socket: &mut Socket| {
            let mut tables = tables.lock().unwrap_or_else(PoisonError::into_inner);
            let known = tables.remove(&(table, family));
            let Some(mut held) = known.filter(|held| held.index == index) else {
                return Err(Error::new(
                    "change routes of an unknown table",
                    libc::ENOENT,
                ));
            };
            change(socket, table, &mut held, new, gone)?;
            tables.insert((table, family), held);
            Ok(())
        };
        self.in_bulk(work).await
    }

    /// Routes that somebody else has put into `table`, and that take packets which are for peers, as far as
    /// [`Netlink::sync_routes`] has seen them: each with what mends it.
    pub fn routes_in_the_way(&self, table: u32) -> Vec<String> {
        let tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        let mut told = Vec::new();
        for family in Family::ALL {
            let Some(held) = tables.get(&(table, family)) else {
                continue;
            };
            let option = match family {
                Family::V4 => "",
                Family::V6 => "-6 ",
            };
            told.extend(held.in_the_way.iter().map(|Other { net, metric }| {
                format!(
                    "somebody else has put a route to {net} into routing table {table}, which is this \
                     router's own: packets for peers there go that way, and not into the tunnel; remove it \
                     by `ip {option}route del {net} table {table} metric {metric}`, and have whoever made \
                     it use another table"
                )
            }));
        }
        told
    }

    /// Removes what [`Netlink::sync_routes`] has put into `table` and the kernel does not remove
    /// with the interface.
    pub async fn release_routes(&self, table: u32) -> Result<(), Error> {
        let work = move |socket: &mut Socket| {
            for family in Family::ALL {
                let mut ours = present(socket, table, family)?.ours;
                ours.retain(|(_, target)| *target == Target::Nowhere);
                remove(socket, table, &ours)?;
            }
            Ok(())
        };
        self.in_bulk(work).await
    }
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

/// The routes of one family in a table.
#[derive(Default)]
struct Present {
    /// Ours, and where each leads.
    ours: Vec<(IpNet, Target)>,
    others: Vec<Other>,
}

fn present(socket: &mut Socket, table: u32, family: Family) -> Result<Present, Error> {
    let family = match family {
        Family::V4 => libc::AF_INET as u8,
        Family::V6 => libc::AF_INET6 as u8,
    };
    let request = |payload: &mut Payload<'_>| {
        payload.fixed(&[family, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        payload.u32(uapi::RTA_TABLE, table);
    };
    match socket.dump(uapi::RTM_GETROUTE, request) {
        Ok(answer) => {
            let mut present = Present::default();
            for message in wire::messages(&answer) {
                match read_route(message.payload, family, table) {
                    Some(Ok(route)) => present.ours.push(route),
                    Some(Err(other)) => present.others.push(other),
                    None => {}
                }
            }
            Ok(present)
        }
        // The kernel makes a table when it gets its first route.
        Err(refusal)
            if matches!(
                refusal.errno,
                libc::ENOENT | libc::EAFNOSUPPORT | libc::EOPNOTSUPP
            ) =>
        {
            Ok(Present::default())
        }
        Err(refusal) => Err(Error::refused("list our routes", refusal)),
    }
}

fn read_route(payload: &[u8], family: u8, table: u32) -> Option<Result<(IpNet, Target), Other>> {
    let [found, prefix, _, _, _, protocol, _, kind, ..]: [u8; 12] = wire::field(payload, 0)?;
    let attributes = payload.get(12..)?;
    let host_u32 = |kind| {
        let value = wire::attribute(attributes, kind)?;
        Some(u32::from_ne_bytes(value.try_into().ok()?))
    };
    // Asked for a family that it lacks, the kernel may list the others instead.
    if found != family || host_u32(uapi::RTA_TABLE) != Some(table) {
        return None;
    }
    let address = match wire::attribute(attributes, uapi::RTA_DST) {
        Some(bytes) => address_from(bytes)?,
        None if found == libc::AF_INET as u8 => IpAddr::from([0u8; 4]),
        None => IpAddr::from([0u8; 16]),
    };
    let net = IpNet::new(address, prefix).ok()?;
    if protocol != PROTOCOL {
        return Some(Err(Other {
            net,
            metric: host_u32(uapi::RTA_PRIORITY).unwrap_or(0),
        }));
    }
    let target = match kind {
        uapi::RTN_BLACKHOLE => Target::Nowhere,
        _ => Target::Device(host_u32(uapi::RTA_OIF)?),
    };
    Some(Ok((net, target)))
}

/// The metric of our routes into the device: the least in IPv4, the kernel's usual one in IPv6.
fn metric(family: Family) -> u32 {
    match family {
        Family::V4 => 0,
        Family::V6 => 1024,
    }
}

fn sync(
    socket: &mut Socket,
    table: u32,
    family: Family,
    wanted: &mut Held,
) -> Result<Vec<String>, Error> {
    let into = |net| Some((net, Target::Device(wanted.index?)));
    let nowhere = wanted.routes.nets().map(|net| (net, Target::Nowhere));
    let mut missing: HashSet<_> = wanted
        .routes
        .nets()
        .filter_map(into)
        .chain(nowhere)
        .collect();
    let Present {
        ours: mut surplus,
        mut others,
    } = present(socket, table, family)?;
    surplus.retain(|route| !missing.remove(route));
    // In the place of a route of ours the kernel takes none.
    let taken = |net: IpNet| {
        let mut others = others.iter();
        others.any(|other| other.net == net && other.metric == metric(family))
    };
    missing.retain(|(net, target)| *target == Target::Nowhere || !taken(*net));
    others.retain(|other| match wanted.routes.holder(other.net) {
        Some(holder) => holder != other.net || other.metric <= metric(family),
        None => wanted.wanted.iter().any(|net| net.prefix_len() == 0),
    });
    wanted.in_the_way = others;
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
    // What leads elsewhere must go before the one in its place comes.
    let moved: HashSet<IpNet> = first.iter().map(|(net, _)| *net).collect();
    let (then, at_once): (Vec<_>, Vec<_>) =
        then.into_iter().partition(|(net, _)| moved.contains(net));
    // In this order, for nothing may leave by another way or be dropped meanwhile.
    add(socket, table, &at_once)?;
    add(socket, table, &safety)?;
    remove(socket, table, &first)?;
    add(socket, table, &then)?;
    remove(socket, table, &last)?;
    Ok(changed.into_iter().flatten().collect())
}

fn change(
    socket: &mut Socket,
    table: u32,
    held: &mut Held,
    mut add_nets: Vec<IpNet>,
    mut remove_nets: Vec<IpNet>,
) -> Result<(), Error> {
    let mut changed = Difference::default();
    add_nets.retain(|net| held.wanted.insert(*net));
    remove_nets.retain(|net| held.wanted.remove(net));
    for net in &add_nets {
        held.routes.add(*net, &mut changed);
    }
    for net in &remove_nets {
        held.routes.remove(*net, &held.wanted, &mut changed);
    }
    let to = |nets: &BTreeSet<IpNet>, target: Target| -> Vec<_> {
        nets.iter().map(|net| (*net, target)).collect()
    };
    // In the same order as above.
    if let Some(index) = held.index {
        add(socket, table, &to(&changed.new, Target::Device(index)))?;
    }
    add(socket, table, &to(&changed.new, Target::Nowhere))?;
    if let Some(index) = held.index {
        remove(socket, table, &to(&changed.gone, Target::Device(index)))?;
    }
    remove(socket, table, &to(&changed.gone, Target::Nowhere))
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
                assert_eq!(read(51820), Some(Ok((net, target))));
                assert_eq!(read(51821), None);
            }
        }
    }
}

//! The kernel's network configuration over netlink. No other module speaks netlink.
//!
//! [`Netlink`] is the asynchronous handle for links, addresses, routes and rules. What must reach
//! the kernel in one piece (an nf_tables ruleset) or in great number (100,000 routes) goes through
//! a blocking socket instead.

mod changes;
mod concern;
mod fewest;
mod mtus;
mod neighbours;
pub(crate) mod nft;
pub(crate) mod outgoing;
mod routes;
mod rules;
pub(crate) mod socket;
pub mod sysctl;
mod table;
mod ways;
pub(crate) mod wire;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use futures_util::StreamExt as _;
use ipnet::{IpNet, Ipv6Net};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::addrlabel::{AddrLabelAttribute, AddrLabelMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkInfo as Info,
    LinkLayerType, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::AsyncSocket as _;

pub use changes::{Change, Changes};
pub use concern::Concern;
pub use nft::Family;
pub use routes::NextHop;
pub use rules::{DroppingRule, Priorities, RuleSpec};

use crate::datapath::Link;
use crate::datapath::marks::Marks;
use crate::datapath::masquerade::{Candidate, Label};
use socket::{Refusal, Socket};

/// The routing protocol number of every route and rule that Sluice makes, by which leftovers are
/// known. `rtnetlink.h` and iproute2's `rt_protos` leave it free.
pub const PROTOCOL: u8 = 81;

/// Below this MTU in bytes a device has no IPv6 (RFC 8200 section 5).
const IPV6_MIN_MTU: u32 = 1280;

/// A failure, worded for an operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{doing}: {}", explain(*errno, message.as_deref()))]
pub struct Error {
    doing: String,
    errno: i32,
    message: Option<String>,
}

impl Error {
    /// What was being done.
    pub(crate) fn doing(&self) -> &str {
        &self.doing
    }

    fn new(doing: impl Into<String>, errno: i32) -> Self {
        Self {
            doing: doing.into(),
            errno,
            message: None,
        }
    }

    fn io(doing: impl Into<String>, error: &std::io::Error) -> Self {
        Self::new(doing, error.raw_os_error().unwrap_or(libc::EIO))
    }

    fn refused(doing: impl Into<String>, refusal: Refusal) -> Self {
        Self {
            doing: doing.into(),
            errno: refusal.errno,
            message: refusal.message,
        }
    }

    /// The `errno` behind it.
    pub fn errno(&self) -> i32 {
        self.errno
    }
}

fn explain(errno: i32, message: Option<&str>) -> String {
    let text = match errno {
        libc::EPERM => "not permitted; it needs CAP_NET_ADMIN (run as root)".to_owned(),
        libc::ENODEV | libc::ENXIO => "there is no such interface".to_owned(),
        libc::ENETDOWN => "the interface is down".to_owned(),
        libc::EOPNOTSUPP | libc::EAFNOSUPPORT => "this kernel cannot do it".to_owned(),
        libc::EMSGSIZE => {
            "it is larger than the socket buffers here allow; raise net.core.wmem_max".to_owned()
        }
        libc::EEXIST => {
            "it is there already, and not from Sluice; remove that one, and Sluice adds its own"
                .to_owned()
        }
        _ => {
            let text = std::io::Error::from_raw_os_error(errno).to_string();
            match text.rsplit_once(" (os error") {
                Some((text, _)) => text.to_owned(),
                None => text,
            }
        }
    };
    match message {
        Some(message) => format!("{text} (kernel: {message})"),
        None => text,
    }
}

/// A network interface and its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    /// Index and name.
    pub link: Link,
    /// MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up.
    pub up: bool,
    /// Kind of a virtual interface, e.g. `tun`, `veth`, `bridge`; `None` for hardware.
    pub kind: Option<String>,
    /// Index of the bridge, bond or VRF that it belongs to.
    pub master: Option<u32>,
    /// Whether its packets have an Ethernet header.
    pub ethernet: bool,
}

/// A handle on the kernel's network configuration, in the network namespace where it was made.
#[derive(Clone, Debug)]
pub struct Netlink {
    handle: rtnetlink::Handle,
    bulk: Arc<Mutex<Socket>>,
    tables: table::Tables,
    /// The mark of underlay packets, by which routes are looked up as if our table were not there.
    mark: u32,
    /// See [`Netlink::route_mtus`].
    own_mtus: Arc<AtomicBool>,
}

impl Netlink {
    /// Opens the handle and subscribes to changes. Call it within a tokio runtime, in the network
    /// namespace to be configured; it stays in that namespace.
    pub fn connect() -> Result<(Self, Changes), Error> {
        let failed = |error: std::io::Error| Error::io("open a netlink socket", &error);
        let bulk = Socket::open(netlink_sys::protocols::NETLINK_ROUTE).map_err(failed)?;
        let (mut connection, handle, _) = rtnetlink::new_connection().map_err(failed)?;
        let port = connection
            .socket_mut()
            .socket_mut()
            .bind_auto()
            .map_err(failed)?
            .port_number();
        let own_mtus = Arc::new(AtomicBool::new(true));
        let changes = Changes::subscribe([port, bulk.port()], own_mtus.clone()).map_err(failed)?;
        tokio::spawn(connection);
        let netlink = Self {
            handle,
            bulk: Arc::new(Mutex::new(bulk)),
            tables: table::Tables::default(),
            mark: Marks::default().underlay,
            own_mtus,
        };
        Ok((netlink, changes))
    }

    /// Looks up routes of underlay packets by this mark.
    pub fn with_mark(self, mark: u32) -> Self {
        Self { mark, ..self }
    }

    /// All interfaces, by index.
    pub async fn links(&self) -> Result<Vec<LinkInfo>, Error> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.request(request, NLM_F_DUMP, "list interfaces").await?;
        let mut links: Vec<_> = answers.into_iter().filter_map(link_info).collect();
        links.sort_by_key(|info| info.link.index);
        Ok(links)
    }

    /// The interface of that name.
    pub async fn link_by_name(&self, name: &str) -> Result<Option<LinkInfo>, Error> {
        let mut request = LinkMessage::default();
        request.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        self.link(request, &format!("look up interface {name}"))
            .await
    }

    async fn link_by_index(&self, index: u32) -> Result<Option<LinkInfo>, Error> {
        let mut request = LinkMessage::default();
        request.header.index = index;
        self.link(request, &format!("look up interface {index}"))
            .await
    }

    async fn link(&self, request: LinkMessage, doing: &str) -> Result<Option<LinkInfo>, Error> {
        let request = RouteNetlinkMessage::GetLink(request);
        match self.request(request, 0, doing).await {
            Ok(answers) => Ok(answers.into_iter().find_map(link_info)),
            // ERANGE and EINVAL: no interface can have such a name.
            Err(error) if matches!(error.errno, libc::ENODEV | libc::ERANGE | libc::EINVAL) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// All addresses with their prefix lengths, by interface index.
    pub async fn addresses(&self) -> Result<Vec<(u32, IpNet)>, Error> {
        let messages = self.address_messages().await?;
        let mut addresses: Vec<_> = messages
            .iter()
            .filter_map(|message| Some((message.header.index, address_of(message)?)))
            .collect();
        addresses.sort_unstable();
        Ok(addresses)
    }

    /// The addresses that a masquerade could take, by interface index, in the kernel's order.
    pub async fn masquerade_candidates(&self) -> Result<Vec<(u32, Candidate)>, Error> {
        let messages = self.address_messages().await?;
        let mut found: Vec<_> = messages.iter().filter_map(candidate).collect();
        let temporary = found.iter().filter(|(_, candidate)| candidate.unloved);
        let interfaces: BTreeSet<u32> = temporary.map(|(index, _)| *index).collect();
        for index in interfaces {
            let info = self.link_by_index(index).await?;
            if info.is_some_and(|info| sysctl::prefers_temporary(&info.link.name)) {
                let on_it = found.iter_mut().filter(|(other, _)| *other == index);
                on_it.for_each(|(_, candidate)| candidate.unloved ^= true);
            }
        }
        Ok(found)
    }

    /// The kernel's labels of IPv6 addresses (RFC 6724, section 2.1); none without IPv6.
    pub async fn labels(&self) -> Result<Vec<Label>, Error> {
        let mut request = AddrLabelMessage::default();
        request.header.family = AddressFamily::Inet6;
        let request = RouteNetlinkMessage::GetAddrLabel(request);
        match self
            .request(request, NLM_F_DUMP, "list address labels")
            .await
        {
            Ok(answers) => Ok(answers.into_iter().filter_map(label).collect()),
            Err(error) if matches!(error.errno, libc::EOPNOTSUPP | libc::EAFNOSUPPORT) => {
                Ok(Vec::new())
            }
            Err(error) => Err(error),
        }
    }

    async fn address_messages(&self) -> Result<Vec<AddressMessage>, Error> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.request(request, NLM_F_DUMP, "list addresses").await?;
        let messages = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => Some(message),
            _ => None,
        });
        Ok(messages.collect())
    }

    /// Gives our own device its name back, if somebody has given it another. Tells that, in words; `None` is
    /// no device: it is in another network namespace.
    pub async fn name_link(&self, index: u32, name: &str) -> Result<Option<Vec<String>>, Error> {
        let Some(info) = self.link_by_index(index).await? else {
            return Ok(None);
        };
        let found = info.link.name;
        if found == name {
            return Ok(Some(Vec::new()));
        }
        let doing = format!("rename interface {found} to {name}");
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
        let rename = RouteNetlinkMessage::SetLink(message.clone());
        match self.request(rename.clone(), NLM_F_ACK, &doing).await {
            // Before Linux 6.2 it has to be down.
            Err(error) if error.errno == libc::EBUSY => {
                message.attributes.clear();
                message.header.change_mask = LinkFlags::Up;
                let down = RouteNetlinkMessage::SetLink(message);
                self.request(down, NLM_F_ACK, &doing).await?;
                self.request(rename, NLM_F_ACK, &doing).await?;
            }
            outcome => drop(outcome?),
        }
        Ok(Some(vec![format!("it was called {found}")]))
    }

    /// Gives our own device its MTU (bytes) and sets it up or down. The kernel makes no link-local
    /// address on it: nothing in the tunnel would answer its solicitations.
    ///
    /// Returns what of it had to be changed, in words.
    pub async fn set_link(&self, index: u32, mtu: u32, up: bool) -> Result<Vec<String>, Error> {
        let doing = format!("set MTU {mtu} and state of interface {index}");
        let mut changed = Vec::new();
        let mut message = LinkMessage::default();
        message.header.index = index;
        if let Some(info) = self.link_by_index(index).await? {
            if info.mtu != mtu {
                changed.push(format!("the MTU was {} instead of {mtu}", info.mtu));
            }
            if info.up != up {
                let state = |up| if up { "up" } else { "down" };
                changed.push(format!(
                    "it was {} instead of {}",
                    state(info.up),
                    state(up)
                ));
            }
            // The kernel tells everybody of what is set, though it was so already.
            if changed.is_empty() {
                return Ok(changed);
            }
            // The device has lost IPv6 with all of its settings, and gets it anew: while it is down,
            // lest the kernel make an address meanwhile.
            if info.mtu < IPV6_MIN_MTU && mtu >= IPV6_MIN_MTU {
                let mut wider = message.clone();
                wider.attributes = vec![LinkAttribute::Mtu(mtu)];
                wider.header.change_mask = LinkFlags::Up;
                for attributes in [Vec::new(), wider.attributes.clone()] {
                    wider.attributes = attributes;
                    let request = RouteNetlinkMessage::SetLink(wider.clone());
                    self.request(request, NLM_F_ACK, &doing).await?;
                }
            }
        }
        // Without IPv6 in the kernel, or below its smallest MTU, the attribute would be refused.
        if mtu >= IPV6_MIN_MTU && std::path::Path::new("/proc/sys/net/ipv6").exists() {
            let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
            message.attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
                vec![mode],
            )])];
            let request = RouteNetlinkMessage::SetLink(message.clone());
            // It is a nicety: a kernel that refuses it is no reason to fail.
            if let Err(error) = self.request(request, NLM_F_ACK, &doing).await {
                tracing::debug!("{error}");
            }
        }
        message.attributes = vec![LinkAttribute::Mtu(mtu)];
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = if up {
            LinkFlags::Up
        } else {
            LinkFlags::empty()
        };
        let request = RouteNetlinkMessage::SetLink(message);
        self.request(request, NLM_F_ACK, &doing).await?;
        Ok(changed)
    }

    /// Gives our own device exactly these addresses of one family. Addresses that the kernel made
    /// itself (IPv6 link-local ones) stay. Returns what had to be changed, in words.
    pub async fn sync_addresses(
        &self,
        index: u32,
        family: Family,
        wanted: &[IpNet],
    ) -> Result<Vec<String>, Error> {
        let mut changed = Vec::new();
        let on_it = |messages: Vec<AddressMessage>| {
            let ours = messages.into_iter().filter(move |m| {
                m.header.index == index && m.header.family == address_family(family)
            });
            ours.filter_map(|m| Some((address_of(&m)?, m)))
        };
        for (address, message) in on_it(self.address_messages().await?) {
            if wanted.contains(&address) || message.header.scope != AddressScope::Universe {
                continue;
            }
            let request = RouteNetlinkMessage::DelAddress(message);
            let doing = format!("remove address {address} from interface {index}");
            match self.request(request, NLM_F_ACK, &doing).await {
                // It went with another: an IPv4 address takes its secondaries along.
                Err(error) if error.errno == libc::EADDRNOTAVAIL => {}
                outcome => drop(outcome?),
            }
            changed.push(format!("it had {address}"));
        }
        let ours = wanted.iter().filter(|net| Family::of(net.addr()) == family);
        let mut missing: Vec<IpNet> = ours.copied().collect();
        for (address, _) in on_it(self.address_messages().await?) {
            missing.retain(|wanted| *wanted != address);
        }
        for address in missing {
            let request = RouteNetlinkMessage::NewAddress(address_message(index, address));
            let doing = format!("add address {address} to interface {index}");
            self.request(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &doing)
                .await?;
            changed.push(format!("it did not have {address}"));
        }
        Ok(changed)
    }

    /// Sends one request and gathers its answers.
    async fn request(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
        doing: &str,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        let closed = || Error::new(doing, libc::ECONNRESET);
        let mut handle = self.handle.clone();
        let mut answers = handle.request(message).map_err(|_| closed())?;
        let mut gathered = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.payload {
                NetlinkPayload::InnerMessage(inner) => gathered.push(inner),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(Error::new(doing, error.raw_code().abs()));
                }
                NetlinkPayload::Overrun(_) => return Err(Error::new(doing, libc::ENOBUFS)),
                _ => {}
            }
        }
        Ok(gathered)
    }
}

fn link_info(answer: RouteNetlinkMessage) -> Option<LinkInfo> {
    let RouteNetlinkMessage::NewLink(message) = answer else {
        return None;
    };
    let mut info = LinkInfo {
        link: Link {
            index: message.header.index,
            name: String::new(),
        },
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        kind: None,
        master: None,
        ethernet: message.header.link_layer_type == LinkLayerType::Ether,
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => info.link.name = name,
            LinkAttribute::Mtu(mtu) => info.mtu = mtu,
            LinkAttribute::Controller(index) => info.master = Some(index),
            LinkAttribute::LinkInfo(details) => {
                info.kind = details.into_iter().find_map(|detail| match detail {
                    Info::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(info)
}

/// The address that a message is about: the near end of a point-to-point link.
fn address_of(message: &AddressMessage) -> Option<IpNet> {
    let find = |local: bool| {
        message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Local(address) if local => Some(*address),
                AddressAttribute::Address(address) if !local => Some(*address),
                _ => None,
            })
    };
    let address = find(true).or_else(|| find(false))?;
    IpNet::new(address, message.header.prefix_len).ok()
}

/// What a masquerade could make of an address; `None` where it takes another one. A NIC whose IPv6
/// addresses are all deprecated or not yet proven unique gets one of another interface, if there is
/// one (RFC 6724, rules 3 and 5): that is left to the kernel.
fn candidate(message: &AddressMessage) -> Option<(u32, Candidate)> {
    let address = address_of(message)?;
    let mut flags = AddressFlags::empty();
    let mut network = address;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Flags(found) => flags = *found,
            // Of a point-to-point link, the far end.
            AddressAttribute::Address(IpAddr::V4(far)) => {
                network = IpNet::new((*far).into(), message.header.prefix_len).ok()?;
            }
            _ => {}
        }
    }
    let (unfit, unloved) = if address.addr().is_ipv4() {
        (AddressFlags::Secondary, false)
    } else {
        let unfit = AddressFlags::Deprecated
            | AddressFlags::Tentative
            | AddressFlags::Optimistic
            | AddressFlags::Dadfailed;
        // In IPv6 the flag for secondary means temporary (RFC 8981).
        (unfit, flags.contains(AddressFlags::Secondary))
    };
    let fit = message.header.scope == AddressScope::Universe && !flags.intersects(unfit);
    let candidate = Candidate {
        address: address.addr(),
        network,
        unloved,
    };
    fit.then_some((message.header.index, candidate))
}

fn label(answer: RouteNetlinkMessage) -> Option<Label> {
    let RouteNetlinkMessage::NewAddrLabel(message) = answer else {
        return None;
    };
    let (mut address, mut label) = (Ipv6Addr::UNSPECIFIED, None);
    for attribute in message.attributes {
        match attribute {
            AddrLabelAttribute::Address(IpAddr::V6(found)) => address = found,
            AddrLabelAttribute::Label(found) => label = Some(found),
            _ => {}
        }
    }
    Some(Label {
        interface: message.header.index,
        prefix: Ipv6Net::new(address, message.header.prefix_len).ok()?,
        label: label?,
    })
}

fn address_message(index: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family_of(address.addr());
    message.header.index = index;
    message.header.prefix_len = address.prefix_len();
    message.attributes = vec![
        AddressAttribute::Local(address.addr()),
        AddressAttribute::Address(address.addr()),
    ];
    message
}

fn family_of(address: IpAddr) -> AddressFamily {
    address_family(Family::of(address))
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

/// An address from its bytes in network order.
fn address_from(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    let v6 = <[u8; 16]>::try_from(bytes).ok()?;
    Some(Ipv6Addr::from(v6).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_worded_for_an_operator() {
        let plain = Error::new("list interfaces", libc::EPERM).to_string();
        assert_eq!(
            plain,
            "list interfaces: not permitted; it needs CAP_NET_ADMIN (run as root)"
        );
        let refusal = Refusal {
            errno: libc::EINVAL,
            message: Some("Invalid prefix".to_owned()),
        };
        let explained = Error::refused("add route 10.0.0.0/8", refusal).to_string();
        assert_eq!(
            explained,
            "add route 10.0.0.0/8: Invalid argument (kernel: Invalid prefix)"
        );
    }
}

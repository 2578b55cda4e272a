//! What changes in the kernel's network configuration by others' hands.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::{FutureExt as _, Stream, StreamExt as _};
use ipnet::IpNet;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::MulticastGroup;

use super::concern::Concern;
use super::mtus::own_mtu;
use super::neighbours::Known;
use super::{Error, Netlink};

/// How long changes are gathered: a link that comes up brings dozens.
const GATHER: Duration = Duration::from_millis(100);

/// A part of the configuration that changed, as a reason to look again; by whom and how is not
/// told, because many changes become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Change {
    /// An interface came, went, or changed its state or MTU.
    Link,
    /// An address came or went.
    Address,
    /// A route came, went or changed, and concerns this router ([`Changes::concern`]).
    Route,
    /// A routing rule came or went (some network managers remove rules that they do not know).
    Rule,
    /// A neighbour was found, moved or lost; not each step of its life.
    Neighbour,
}

impl Change {
    const ALL: [Self; 5] = [
        Self::Link,
        Self::Address,
        Self::Route,
        Self::Rule,
        Self::Neighbour,
    ];

    fn bit(self) -> u8 {
        1 << self as u8
    }

    fn of(message: &RouteNetlinkMessage) -> Option<Self> {
        use RouteNetlinkMessage as M;
        match message {
            M::NewLink(_) | M::DelLink(_) => Some(Self::Link),
            M::NewAddress(_) | M::DelAddress(_) => Some(Self::Address),
            M::NewRoute(_) | M::DelRoute(_) => Some(Self::Route),
            M::NewRule(_) | M::DelRule(_) => Some(Self::Rule),
            M::NewNeighbour(_) | M::DelNeighbour(_) => Some(Self::Neighbour),
            _ => None,
        }
    }
}

type Notice = (NetlinkMessage<RouteNetlinkMessage>, netlink_sys::SocketAddr);

/// A stream of changes, without those that our own requests brought.
pub struct Changes {
    notices: Box<dyn Stream<Item = Notice> + Send + Unpin>,
    own_ports: [u32; 2],
    neighbours: Known,
    /// `None`: any route.
    concern: Option<Concern>,
    /// Set when a route may have an MTU of its own, see [`Netlink::route_mtus`].
    own_mtus: Arc<AtomicBool>,
    pending: u8,
}

impl std::fmt::Debug for Changes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Changes").finish_non_exhaustive()
    }
}

impl Changes {
    /// Subscribes in the network namespace of the calling thread.
    pub(super) fn subscribe(own_ports: [u32; 2], own_mtus: Arc<AtomicBool>) -> io::Result<Self> {
        let (connection, _, notices) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
            MulticastGroup::Neigh,
        ])?;
        tokio::spawn(connection);
        Ok(Self {
            notices: Box::new(notices),
            own_ports,
            neighbours: Known::default(),
            concern: None,
            own_mtus,
            pending: 0,
        })
    }

    /// Takes the neighbours that are there already for known, so that it is news when one is lost.
    pub async fn know_neighbours(&mut self, netlink: &Netlink) -> Result<(), Error> {
        for message in netlink.neighbours().await? {
            self.neighbours.learn(&message, false);
        }
        Ok(())
    }

    /// Has only these routes told of from now on.
    pub fn concern(&mut self, concern: Concern) {
        self.concern = Some(concern);
    }

    /// Has routes to these networks of the overlay told of, or not any more, beside the others.
    pub fn concern_overlay(&mut self, nets: impl IntoIterator<Item = (IpNet, bool)>) {
        if let Some(concern) = &mut self.concern {
            for (net, is_there) in nets {
                concern.change(net, is_there);
            }
        }
    }

    /// The next change; each part at most once in 100 ms. `None` when the subscription ended,
    /// which only the end of the runtime brings. Cancel safe.
    pub async fn next(&mut self) -> Option<Change> {
        if self.pending == 0 {
            while self.pending == 0 {
                let notice = self.notices.next().await?;
                self.note(&notice);
            }
            tokio::time::sleep(GATHER).await;
        }
        while let Some(Some(notice)) = self.notices.next().now_or_never() {
            self.note(&notice);
        }
        let change = Change::ALL
            .into_iter()
            .find(|change| self.pending & change.bit() != 0)?;
        self.pending &= !change.bit();
        Some(change)
    }

    fn note(&mut self, (message, _): &Notice) {
        match &message.payload {
            // Some were lost: any part may have changed.
            NetlinkPayload::Overrun(_) => {
                self.own_mtus.store(true, Ordering::Relaxed);
                self.pending = Change::ALL.into_iter().fold(0, |all, c| all | c.bit());
            }
            NetlinkPayload::InnerMessage(inner)
                if !self.own_ports.contains(&message.header.port_number) =>
            {
                use RouteNetlinkMessage as M;
                if let M::NewRoute(route) = inner
                    && own_mtu(route).is_some()
                {
                    self.own_mtus.store(true, Ordering::Relaxed);
                }
                let is_news = match inner {
                    M::NewNeighbour(message) => self.neighbours.learn(message, false),
                    M::DelNeighbour(message) => self.neighbours.learn(message, true),
                    M::NewRoute(message) | M::DelRoute(message) => self
                        .concern
                        .as_ref()
                        .is_none_or(|concern| concern.includes(message)),
                    _ => true,
                };
                self.pending |= Change::of(inner).filter(|_| is_news).map_or(0, Change::bit);
            }
            _ => {}
        }
    }
}

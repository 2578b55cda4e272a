//! What this node tells of itself: endpoints and home.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use super::{Event, Paths};
use crate::tailnet::paths::{EndpointKind, Mapped, Netcheck, Protocol};

/// Endpoints of our own that are told.
const MOST: usize = 40;

impl Paths {
    /// The gateway leads a port here, or no longer.
    pub(in super::super) fn handle_mapped(&mut self, mapped: Option<Mapped>, now: Instant) {
        self.mapped = mapped;
        self.say_endpoints(now);
        let found = self.rounds.last().cloned().unwrap_or_default();
        self.say_net_info(&found);
        self.changed = true;
    }

    /// Tells where peers may reach this node, if that has changed.
    pub(super) fn say_endpoints(&mut self, now: Instant) {
        let port = self.local.port;
        let (seen, varies) = self.rounds.seen(now);
        let seen: Vec<SocketAddr> = seen.collect();
        let seen_as = |address: &SocketAddr| (*address, EndpointKind::Stun);
        // Whoever has a NAT that shows each destination another port may have had one forwarded by hand.
        let forwarded = seen.iter().filter(|address| varies && address.is_ipv4());
        let forwarded = forwarded.map(|address| {
            (
                SocketAddr::new(address.ip(), port),
                EndpointKind::StunLocalPort,
            )
        });
        let fixed = self.local.fixed.iter();
        let local = self.local.addresses.iter().filter(|ip| is_local(**ip));
        let local = local.map(|ip| (SocketAddr::new(*ip, port), EndpointKind::Local));
        let all = fixed
            .map(|address| (*address, EndpointKind::Fixed))
            .chain(
                self.mapped
                    .map(|mapped| (mapped.address, EndpointKind::Mapped)),
            )
            .chain(seen.iter().map(seen_as))
            .chain(forwarded)
            .chain(local);
        let mut known = BTreeSet::new();
        let endpoints: Vec<_> = all
            .filter(|(address, _)| address.port() != 0 && known.insert(*address))
            .take(MOST)
            .collect();
        if endpoints != self.endpoints {
            self.endpoints.clone_from(&endpoints);
            let event = super::super::Event::Endpoints(endpoints);
            self.events.push_back(Event::Outside(event));
            self.changed = true;
        }
    }

    /// Sees that there is a home, and tells if it is another one.
    pub(super) fn say_home(&mut self) -> bool {
        let Some(own) = &self.own else {
            return false;
        };
        let bytes = own.node.as_bytes().first_chunk::<8>();
        let spread = bytes.map_or(0, |bytes| u64::from_be_bytes(*bytes));
        // Without answers it may be that UDP is blocked: any relay is better than none.
        if self.rounds.last().is_some() || !self.rounds.has_servers() {
            self.rounds.need_home(spread);
        }
        let home = self.rounds.home();
        let Some(new) = home.filter(|_| self.told_home != home) else {
            return false;
        };
        self.told_home = home;
        let event = super::super::Event::Home(new);
        self.events.push_back(Event::Outside(event));
        // Peers look for this node where the server says that it is.
        let found = self.rounds.last().cloned().unwrap_or_default();
        self.say_net_info(&found);
        self.changed = true;
        true
    }

    /// Tells what is known of the network.
    pub(super) fn say_net_info(&mut self, found: &Netcheck) {
        let mut info = found.net_info(self.rounds.home());
        let by = |protocol| Some(self.mapped?.by == protocol);
        info.pcp = by(Protocol::Pcp);
        info.pmp = by(Protocol::NatPmp);
        info.upnp = by(Protocol::Upnp);
        let event = super::super::Event::NetInfo(Box::new(info));
        self.events.push_back(Event::Outside(event));
    }
}

/// Whether a peer may reach an address of this machine.
pub(super) fn is_local(ip: IpAddr) -> bool {
    let usable = match ip {
        IpAddr::V4(_) => true,
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    };
    usable && !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast()
}

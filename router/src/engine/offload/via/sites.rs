//! What is served.

use std::net::Ipv4Addr;

use crate::via::{self, ViaNet};

/// The IPv4 networks that are served, each with its site.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sites(Vec<ViaNet>);

impl Sites {
    /// Of a network that two sites have, the first counts.
    pub(crate) fn new(nets: impl IntoIterator<Item = ViaNet>) -> Self {
        let mut nets: Vec<ViaNet> = nets.into_iter().collect();
        nets.sort_by_key(|via| std::cmp::Reverse(via.net.prefix_len()));
        Self(nets)
    }

    /// Whether there are none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn of(&self, host: Ipv4Addr) -> Option<u32> {
        let holds = |via: &&ViaNet| via.net.contains(&host);
        self.0.iter().find(holds).map(|via| via.site)
    }

    /// The host that an IPv6 packet is for, if it is one of these.
    pub(crate) fn host(&self, packet: &[u8]) -> Option<Ipv4Addr> {
        let destination = packet.get(24..40)?;
        if packet[0] >> 4 != 6 || destination[..8] != via::PREFIX {
            return None;
        }
        self.served(destination)
    }

    /// The host that an IPv6 address stands for, if it is one of these.
    pub(crate) fn served(&self, address: &[u8]) -> Option<Ipv4Addr> {
        let address: [u8; 16] = address.try_into().ok()?;
        let (site, host) = via::parse(address.into())?;
        (via::may_reach(host) && self.of(host) == Some(site)).then_some(host)
    }

    /// The IPv6 address of a host.
    pub(crate) fn address(&self, host: Ipv4Addr) -> Option<[u8; 16]> {
        Some(via::address(self.of(host)?, host).octets())
    }
}

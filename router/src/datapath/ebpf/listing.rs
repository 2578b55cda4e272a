//! The flow table for people.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use ipnet::IpNet;
use router_ebpf::abi::{Account, Address, Flow, Key4, Key6, Side, Tuple};
use router_ebpf::packet::{ICMP, ICMPV6, TCP};

use super::flows::{Key, Read, Table, partner};
use super::settled::Flows;
use super::sweep::is_established;
use super::sweeper::monotonic;

/// A flow. An ICMP echo has its identifier as the port of the overlay end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowView {
    /// IP protocol.
    pub protocol: u8,
    /// The overlay end.
    pub overlay: SocketAddr,
    /// The subnet end.
    pub subnet: SocketAddr,
    /// What the overlay end looks like to the subnet, where it is translated.
    pub external: Option<SocketAddr>,
    /// Whether the overlay end has opened it.
    pub from_overlay: bool,
    /// Of TCP whether it is established.
    pub established: Option<bool>,
    /// Since the last packet of either direction; up to a second more.
    pub idle: Duration,
}

/// Which flows to list. What is `None` fits all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowFilter {
    /// Either end, or the external address, lies in it.
    pub address: Option<IpNet>,
    /// IP protocol.
    pub protocol: Option<u8>,
    /// Port of either end, or external port.
    pub port: Option<u16>,
}

impl FlowFilter {
    /// Whether packets of a protocol between these ends fit.
    pub fn fits(&self, protocol: u8, ends: impl Iterator<Item = SocketAddr> + Clone) -> bool {
        let address = |end: SocketAddr| self.address.is_none_or(|net| net.contains(&end.ip()));
        let port = |end: SocketAddr| self.port.is_none_or(|port| port == end.port());
        self.protocol.is_none_or(|wanted| wanted == protocol)
            && ends.clone().any(address)
            && ends.clone().any(port)
    }

    fn fits_flow(&self, flow: &FlowView) -> bool {
        let ends = [Some(flow.overlay), Some(flow.subnet), flow.external];
        self.fits(flow.protocol, ends.into_iter().flatten())
    }
}

/// Reads the flow table, beside the programs and the sweeps.
pub struct FlowTables {
    pub(super) v4: Flows<Key4>,
    pub(super) v6: Flows<Key6>,
    pub(super) sources: Table<Account, u32>,
}

impl std::fmt::Debug for FlowTables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowTables").finish_non_exhaustive()
    }
}

impl FlowTables {
    /// The maps themselves, for tests and measurements: IPv4 flows, IPv6 flows, accounts.
    pub fn maps(&self) -> [BorrowedFd<'_>; 3] {
        [self.v4.table.fd(), self.v6.table.fd(), self.sources.fd()]
    }

    /// All entries as they are now, for tests: by side and tuple.
    pub fn entries(&self) -> io::Result<Vec<(Side, Tuple, Flow)>> {
        let mut all = Vec::new();
        entries(&self.v4, &mut all)?;
        entries(&self.v6, &mut all)?;
        Ok(all)
    }

    /// The flows that `filter` lets through, and whether there are more than `most`.
    pub fn list(&self, filter: &FlowFilter, most: usize) -> io::Result<(Vec<FlowView>, bool)> {
        let mut found = Vec::new();
        let more =
            list(&self.v4, filter, most, &mut found)? || list(&self.v6, filter, most, &mut found)?;
        Ok((found, more))
    }
}

fn entries<K: Key>(
    store: &impl Read<K, Flow>,
    all: &mut Vec<(Side, Tuple, Flow)>,
) -> io::Result<()> {
    let (mut cursor, mut entries) = (None, Vec::new());
    loop {
        store.read(&mut cursor, &mut entries)?;
        for (key, _) in &entries {
            let flow = store.get(key)?;
            all.extend(flow.map(|flow| (key.side(), key.tuple(), flow)));
        }
        if cursor.is_none() {
            return Ok(());
        }
    }
}

fn list<K: Key>(
    store: &impl Read<K, Flow>,
    filter: &FlowFilter,
    most: usize,
    found: &mut Vec<FlowView>,
) -> io::Result<bool> {
    let now = monotonic()?;
    let (mut cursor, mut entries) = (None, Vec::new());
    loop {
        store.read(&mut cursor, &mut entries)?;
        for (key, flow) in &entries {
            let view = (key.side() == Side::Overlay).then(|| view(key, flow));
            let Some(mut view) = view.filter(|view| filter.fits_flow(view)) else {
                continue;
            };
            if found.len() == most {
                return Ok(true);
            }
            // Read here, for what the table tells of a settled entry is old.
            let flow = store.get(key)?.unwrap_or(*flow);
            let other = store.get(&partner(key, &flow))?.unwrap_or(flow);
            let last_used = flow.last_used.max(other.last_used);
            view.idle = Duration::from_nanos(now.saturating_sub(last_used));
            view.established = (view.protocol == TCP).then(|| is_established(flow.tcp, other.tcp));
            found.push(view);
        }
        if cursor.is_none() {
            return Ok(false);
        }
    }
}

/// What the overlay's entry alone tells.
fn view<K: Key>(key: &K, flow: &Flow) -> FlowView {
    let tuple = key.tuple();
    let [source, destination] = tuple.ports;
    let echo = matches!(tuple.protocol, ICMP | ICMPV6);
    let translated = Address {
        octets: flow.address,
        ..tuple.source
    };
    FlowView {
        protocol: tuple.protocol,
        overlay: end(&tuple.source, source),
        subnet: end(&tuple.destination, if echo { [0; 2] } else { destination }),
        external: (flow.flags & Flow::SNAT != 0).then(|| end(&translated, flow.port)),
        from_overlay: flow.flags & Flow::FROM_SUBNET == 0,
        established: None,
        idle: Duration::ZERO,
    }
}

pub(super) fn end(address: &Address, port: [u8; 2]) -> SocketAddr {
    let ip = if address.is_v4() {
        IpAddr::from(address.v4_octets())
    } else {
        IpAddr::from(address.octets)
    };
    SocketAddr::new(ip, u16::from_be_bytes(port))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::super::flows::memory::Memory;
    use super::*;

    #[test]
    fn flows_are_found_by_either_end() {
        let tuple = Tuple {
            source: Address::v4([100, 64, 0, 2]),
            destination: Address::v4([10, 0, 0, 1]),
            ports: [40_000u16.to_be_bytes(), 443u16.to_be_bytes()],
            protocol: TCP,
        };
        let flow = Flow {
            address: Address::v4([10, 0, 0, 9]).octets,
            port: 1025u16.to_be_bytes(),
            flags: Flow::SNAT,
            tcp: Flow::SYN | Flow::ACK,
            ..Flow::default()
        };
        let key = Key4::new(Side::Overlay, &tuple);
        let reply = Flow {
            address: tuple.source.octets,
            port: tuple.ports[0],
            ..flow
        };
        let store = Memory::new(BTreeMap::from([(key, flow), (partner(&key, &flow), reply)]));
        let found = |filter: FlowFilter, most| {
            let mut found = Vec::new();
            let more = list(&store, &filter, most, &mut found).unwrap();
            (found, more)
        };
        let (all, more) = found(FlowFilter::default(), 10);
        assert!(!more);
        let wanted = FlowView {
            protocol: TCP,
            overlay: "100.64.0.2:40000".parse().unwrap(),
            subnet: "10.0.0.1:443".parse().unwrap(),
            external: Some("10.0.0.9:1025".parse().unwrap()),
            from_overlay: true,
            established: Some(true),
            idle: all[0].idle,
        };
        assert_eq!(all, [wanted]);
        assert_eq!(found(FlowFilter::default(), 0), (vec![], true));
        let net = |text: &str| FlowFilter {
            address: Some(text.parse().unwrap()),
            ..FlowFilter::default()
        };
        for (count, filter) in [
            (1, net("100.64.0.0/24")),
            (1, net("10.0.0.1/32")),
            (1, net("10.0.0.9/32")),
            (0, net("10.0.0.2/32")),
            (0, net("fd00::/8")),
            (
                1,
                FlowFilter {
                    port: Some(443),
                    ..net("10.0.0.1/32")
                },
            ),
            (
                1,
                FlowFilter {
                    port: Some(1025),
                    ..FlowFilter::default()
                },
            ),
            (
                0,
                FlowFilter {
                    port: Some(80),
                    ..FlowFilter::default()
                },
            ),
            (
                1,
                FlowFilter {
                    protocol: Some(TCP),
                    ..FlowFilter::default()
                },
            ),
            (
                0,
                FlowFilter {
                    protocol: Some(17),
                    ..FlowFilter::default()
                },
            ),
        ] {
            assert_eq!(found(filter, 10).0.len(), count, "{filter:?}");
        }
    }
}

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
use crate::datapath::{Connections, QUIET};

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

    /// How many flows are in use: TCP connections, and what else had a packet in the last [`QUIET`].
    pub fn live(&self, connections: Connections) -> io::Result<u64> {
        Ok(live(&self.v4, connections)? + live(&self.v6, connections)?)
    }
}

fn live<K: Key>(store: &impl Read<K, Flow>, connections: Connections) -> io::Result<u64> {
    let mut live = 0;
    each(store, &FlowFilter::default(), |flow| {
        let busy = flow.idle < QUIET;
        live += u64::from(match flow.established {
            Some(open) => open && (busy || connections == Connections::Open),
            None => busy,
        });
        true
    })?;
    Ok(live)
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

/// Whether there are more.
fn list<K: Key>(
    store: &impl Read<K, Flow>,
    filter: &FlowFilter,
    most: usize,
    found: &mut Vec<FlowView>,
) -> io::Result<bool> {
    let whole = each(store, filter, |flow| {
        let room = found.len() < most;
        if room {
            found.push(flow);
        }
        room
    })?;
    Ok(!whole)
}

/// Has `see` see the flows that `filter` lets through, until it returns `false`; whether it has seen all.
fn each<K: Key>(
    store: &impl Read<K, Flow>,
    filter: &FlowFilter,
    mut see: impl FnMut(FlowView) -> bool,
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
            // Read here, for what the table tells of a settled entry is old.
            let flow = store.get(key)?.unwrap_or(*flow);
            let other = store.get(&partner(key, &flow))?.unwrap_or(flow);
            let last_used = flow.last_used.max(other.last_used);
            view.idle = Duration::from_nanos(now.saturating_sub(last_used));
            view.established = (view.protocol == TCP).then(|| is_established(flow.tcp, other.tcp));
            if !see(view) {
                return Ok(false);
            }
        }
        if cursor.is_none() {
            return Ok(true);
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
    fn flows_are_in_use_while_connected_or_lately_used() {
        let now = monotonic().unwrap();
        let ago = |seconds: u64| now.saturating_sub(seconds * 1_000_000_000);
        for (live_now, protocol, tcp, last_used) in [
            (true, TCP, [Flow::SYN | Flow::ACK; 2], ago(100)),
            (
                true,
                TCP,
                [Flow::SYN | Flow::ACK, Flow::SYN | Flow::ACK | Flow::FIN],
                now,
            ),
            (false, TCP, [Flow::SYN | Flow::ACK | Flow::FIN; 2], now),
            (false, TCP, [Flow::SYN, 0], now),
            (true, 17, [0; 2], ago(5)),
            (false, 17, [0; 2], ago(15)),
        ] {
            let tuple = Tuple {
                source: Address::v4([100, 64, 0, 2]),
                destination: Address::v4([10, 0, 0, 1]),
                ports: [40_000u16.to_be_bytes(), 443u16.to_be_bytes()],
                protocol,
            };
            let flow = Flow {
                address: tuple.source.octets,
                port: tuple.ports[0],
                tcp: tcp[0],
                last_used,
                ..Flow::default()
            };
            let key = Key4::new(Side::Overlay, &tuple);
            let reply = Flow {
                tcp: tcp[1],
                ..flow
            };
            let store = Memory::new(BTreeMap::from([(key, flow), (partner(&key, &flow), reply)]));
            let found = live(&store, Connections::Open).unwrap();
            assert_eq!(found, u64::from(live_now), "{flow:?}");
            let found = live(&store, Connections::Busy).unwrap();
            let busy = live_now && last_used >= ago(5);
            assert_eq!(found, u64::from(busy), "{flow:?}");
        }
    }

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

//! What carries clear packets between the TUN device and the subnet side.
//!
//! The kernel datapath (forwarding, masquerade, MSS clamp and policy through nf_tables) is always
//! installed: it is the slow path. The eBPF datapath is laid over it where the kernel and the
//! rights allow, and hands it what it will not carry.

pub mod ebpf;
pub mod kernel;
pub mod limits;
pub mod marks;
pub mod masquerade;
mod nets;
pub mod policy;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use ipnet::IpNet;
use marks::Marks;

use crate::control::{Policy, Route, RouteMode};

/// Ports (and ICMP ids) that the kernel gives to flows which it masquerades while no program
/// translates. It is Linux's default range for the router's own sockets, with which connection
/// tracking keeps these flows apart.
pub const KERNEL_NAT_PORTS: RangeInclusive<u16> = 32_768..=60_999;

/// Ports (and ICMP ids) that the kernel gives to flows which it masquerades beside programs that
/// translate. Neither knows the other's flows, so no program uses a port of this range.
pub const SLOW_NAT_PORTS: RangeInclusive<u16> = 61_000..=65_535;

/// Ports (and ICMP ids) that the eBPF programs translate to: apart from [`SLOW_NAT_PORTS`] and from the
/// well-known ones, which are the router's own services. Those that Linux gives to the router's own
/// sockets are left out too, see [`Spec::fast_nat_ports`].
pub const FAST_NAT_PORTS: RangeInclusive<u16> = 1_024..=60_999;

/// Ports that Linux gives to sockets by itself, unless `net.ipv4.ip_local_port_range` says otherwise.
pub const LOCAL_PORTS: RangeInclusive<u16> = 32_768..=60_999;

/// With fewer ports than these the programs would soon have none left toward a busy server.
const LEAST_FAST_NAT_PORTS: usize = 4_096;

/// A flow without connections is over when it had no packet for so long.
pub const QUIET: Duration = Duration::from_secs(10);

/// Which TCP connections are in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connections {
    /// All until both ends have closed them, however idle they are.
    Open,
    /// Those of them that had a packet in the last [`QUIET`]: others may have moved to another router, which nobody
    /// tells.
    Busy,
}

/// Flows of each family that one peer may open unless the configuration says otherwise.
pub const FLOWS_PER_SOURCE: u32 = 16_384;

/// One way of carrying clear packets.
pub trait Datapath: Send {
    /// Makes the datapath serve `spec`. On error what was in force before stays in force.
    fn apply(&mut self, spec: &Spec) -> Result<(), Error>;

    /// Changes the peers of what is in force, as [`Datapath::apply`] would, at the cost of the change. On
    /// error what was in force before stays in force.
    fn change_peers(&mut self, change: &OverlayChange) -> Result<(), Error>;

    /// Packet and byte counters by program and verdict, since the daemon's start.
    fn counters(&self) -> Result<Vec<Counter>, Error>;

    /// Takes everything away that [`Datapath::apply`] installed, and nothing else.
    fn remove(&mut self) -> Result<(), Error>;
}

/// A failure of a datapath, worded for an operator: what failed, why, and the mend if there is one.
#[derive(Debug, thiserror::Error)]
#[error("{context}: {source}")]
pub struct Error {
    /// What was being done, e.g. "attach from_overlay to sluice0 (tcx)".
    pub context: String,
    /// The cause.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// One counter of a datapath.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Program or chain, e.g. `from_overlay`.
    pub program: &'static str,
    /// Verdict label from the one list in `router_ebpf`, e.g. `forwarded`, `slow_snat`, `drop_spoofed`.
    pub verdict: &'static str,
    /// Packets (a super-packet counts once).
    pub packets: u64,
    /// Bytes at the IP layer.
    pub bytes: u64,
}

/// Everything a datapath needs to know, whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// The TUN device.
    pub tun: Link,
    /// Tunnel MTU in bytes.
    pub mtu: u16,
    /// The subnet-side NICs (often the uplink too) that the eBPF programs serve: those with an Ethernet
    /// header.
    pub subnet: Vec<Link>,
    /// The peers' allowed IPs, without host bits, each with the number of its peer: who may appear as a
    /// source from the TUN and as a destination into it, and by whom limits count.
    pub overlay: BTreeMap<IpNet, u32>,
    /// The router's own overlay addresses, of which none is a peer's, whatever allowed IPs contain.
    pub own: BTreeSet<IpAddr>,
    /// Advertised routes.
    pub routes: Vec<Route>,
    /// The kernel's routes inside and around them with their own MTUs in bytes, or zero.
    pub route_mtus: BTreeMap<IpNet, u32>,
    /// What peers may reach.
    pub policy: Policy,
    /// Flows that are there go on, and no new ones are let through.
    pub draining: bool,
    /// What the eBPF programs translate sources to, by interface index of the subnet-side NICs. Flows
    /// through a NIC that has none are translated by the kernel.
    pub external: BTreeMap<u32, External>,
    /// Those of the external addresses that were chosen by hand, by interface index: the kernel
    /// translates to them as well. Toward other interfaces it masquerades.
    pub chosen: BTreeMap<u32, Vec<IpAddr>>,
    /// All addresses of the subnet-side NICs. A flow that is translated to none of them, nor to an
    /// external one, has lost its address: no reply can come.
    pub addresses: BTreeSet<IpAddr>,
    /// Ports that the kernel gives to the router's own sockets (`net.ipv4.ip_local_port_range`); `None`:
    /// [`LOCAL_PORTS`].
    pub local_ports: Option<RangeInclusive<u16>>,
    /// The listen port if the uplink's guard may stand in front of it: what comes back for a flow
    /// that was translated to it would be taken for junk. (The eBPF programs take no port that a
    /// socket has.)
    pub guarded_port: Option<u16>,
    /// Our bits of the mark.
    pub marks: Marks,
    /// The bit of the mark by which eBPF programs hand over packets, if there are programs.
    pub handed_over: Option<u32>,
    /// The listen port if some peer has no configured endpoint, so that it must come by itself.
    pub knocked_port: Option<u16>,
}

/// A change of [`Spec::overlay`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OverlayChange {
    /// Allowed IPs that are new or another peer's now, each with the number of its peer.
    pub set: Vec<(IpNet, u32)>,
    /// Allowed IPs that are no peer's any more. One that is in `set` too stays.
    pub remove: Vec<IpNet>,
}

impl OverlayChange {
    /// What makes `after` of `before`.
    pub fn between(before: &BTreeMap<IpNet, u32>, after: &BTreeMap<IpNet, u32>) -> Self {
        // The usual case costs no search.
        if before == after {
            return Self::default();
        }
        let remove = before.keys().filter(|net| !after.contains_key(net));
        let set = after.iter();
        let set = set.filter(|(net, peer)| before.get(net) != Some(peer));
        Self {
            remove: remove.copied().collect(),
            set: set.map(|(net, peer)| (*net, *peer)).collect(),
        }
    }

    /// Carries the change out on the allowed IPs of a [`Spec`].
    pub fn apply(&self, overlay: &mut BTreeMap<IpNet, u32>) {
        for net in &self.remove {
            overlay.remove(net);
        }
        overlay.extend(self.set.iter().copied());
    }
}

/// The external addresses of a NIC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct External {
    /// Those that were chosen by hand, at most eight of a family: sources are spread over them.
    pub chosen: Vec<IpAddr>,
    /// For a family of which none is chosen, what the kernel's masquerade takes: see
    /// [`masquerade::by_prefix`].
    pub masquerade: Vec<(IpNet, IpAddr)>,
}

impl External {
    /// All of them, some more than once.
    pub fn addresses(&self) -> impl Iterator<Item = &IpAddr> {
        let masquerade = self.masquerade.iter().map(|(_, address)| address);
        self.chosen.iter().chain(masquerade)
    }
}

impl From<Vec<IpAddr>> for External {
    fn from(chosen: Vec<IpAddr>) -> Self {
        Self {
            chosen,
            ..Self::default()
        }
    }
}

impl Spec {
    /// All but the peers and the policy.
    fn frame(&self) -> Self {
        Self {
            tun: self.tun.clone(),
            mtu: self.mtu,
            subnet: self.subnet.clone(),
            overlay: BTreeMap::new(),
            own: self.own.clone(),
            routes: self.routes.clone(),
            route_mtus: self.route_mtus.clone(),
            policy: Policy::default(),
            draining: self.draining,
            external: self.external.clone(),
            chosen: self.chosen.clone(),
            addresses: self.addresses.clone(),
            local_ports: self.local_ports.clone(),
            guarded_port: self.guarded_port,
            marks: self.marks,
            handed_over: self.handed_over,
            knocked_port: self.knocked_port,
        }
    }

    /// Ports (and ICMP ids) that flows keep when the eBPF programs translate them, unless another flow
    /// or a socket of the router has them toward the same destination, and that they get otherwise. And
    /// whether the kernel gives none of these to the router's own sockets, which come later: their
    /// servers' answers would be taken for the flow's.
    pub fn fast_nat_ports(&self) -> (RangeInclusive<u16>, bool) {
        let (first, last) = FAST_NAT_PORTS.into_inner();
        let local = self.local_ports.as_ref().unwrap_or(&LOCAL_PORTS);
        // One range: the larger part.
        let below = first..=last.min(local.start().saturating_sub(1));
        let above = first.max(local.end().saturating_add(1))..=last;
        let larger = if above.len() > below.len() {
            above
        } else {
            below
        };
        if larger.len() >= LEAST_FAST_NAT_PORTS {
            (larger, true)
        } else {
            (first..=LOCAL_PORTS.start() - 1, false)
        }
    }

    /// The ports that the kernel gives to flows which it masquerades.
    pub fn kernel_nat_ports(&self) -> RangeInclusive<u16> {
        let all = if self.external.is_empty() {
            KERNEL_NAT_PORTS
        } else {
            SLOW_NAT_PORTS
        };
        let Some(guarded) = self.guarded_port.filter(|port| all.contains(port)) else {
            return all;
        };
        // nf_tables masquerades to one range: the larger part.
        let below = *all.start()..=guarded.saturating_sub(1);
        let above = guarded.saturating_add(1)..=*all.end();
        if above.len() > below.len() {
            above
        } else {
            below
        }
    }
}

/// Why packets of `route` take the slow path although the eBPF datapath is there; `None`: they take
/// the fast one.
pub fn slow_reason(route: &Route) -> Option<&'static str> {
    match route.mode {
        RouteMode::Stack => Some("the route is marked for the kernel stack"),
        RouteMode::Fast => None,
    }
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Link {
    /// Interface index in the daemon's network namespace.
    pub index: u32,
    /// Interface name.
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_translate_to_no_port_that_the_kernel_gives_to_sockets() {
        let ports = |local_ports| {
            let spec = Spec {
                local_ports,
                ..Spec::default()
            };
            spec.fast_nat_ports()
        };
        assert_eq!(ports(None), (1024..=32_767, true));
        assert_eq!(ports(Some(10_000..=20_000)), (20_001..=60_999, true));
        assert_eq!(ports(Some(40_000..=65_535)), (1024..=39_999, true));
        assert_eq!(ports(Some(1024..=50_000)), (50_001..=60_999, true));
        assert_eq!(ports(Some(1024..=65_535)), (1024..=32_767, false));
    }

    #[test]
    fn the_kernel_translates_to_no_guarded_port() {
        let ports = |guarded_port, external: bool| {
            let addresses = external.then(|| (2, vec![IpAddr::from([192, 0, 2, 1])].into()));
            let spec = Spec {
                guarded_port,
                external: addresses.into_iter().collect(),
                ..Spec::default()
            };
            spec.kernel_nat_ports()
        };
        assert_eq!(ports(None, false), KERNEL_NAT_PORTS);
        assert_eq!(ports(Some(51_820), false), 32_768..=51_819);
        assert_eq!(ports(Some(40_000), false), 40_001..=60_999);
        assert_eq!(ports(Some(51_820), true), SLOW_NAT_PORTS);
        assert_eq!(ports(Some(65_535), true), 61_000..=65_534);
        assert_eq!(ports(Some(61_000), true), 61_001..=65_535);
    }
}

//! What carries clear packets between the TUN device and the subnet side.
//!
//! The kernel datapath (forwarding, masquerade, MSS clamp and policy through nf_tables) is always
//! installed: it is the slow path. The eBPF datapath is laid over it where the kernel and the
//! rights allow, and hands it what it will not carry.

pub mod ebpf;
pub mod kernel;
pub mod policy;

use std::ops::RangeInclusive;

use ipnet::IpNet;

use crate::control::{Policy, Route, RouteMode};

/// Ports (and ICMP ids) that the kernel gives to flows which it masquerades. It is Linux's default
/// range for the router's own sockets, with which connection tracking keeps these flows apart.
pub const KERNEL_NAT_PORTS: RangeInclusive<u16> = 32_768..=60_999;

/// Ports (and ICMP ids) that the eBPF programs give to flows which they translate. Connection
/// tracking does not know those flows, so the range touches neither [`KERNEL_NAT_PORTS`] nor the
/// router's own sockets, and leaves well-known ports alone.
pub const FAST_NAT_PORTS: RangeInclusive<u16> = 1_024..=32_767;

/// One way of carrying clear packets.
pub trait Datapath: Send {
    /// Makes the datapath serve `spec`. On error what was in force before stays in force.
    fn apply(&mut self, spec: &Spec) -> Result<(), Error>;

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

/// Everything a datapath needs to know; whole, never a delta.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// The TUN device.
    pub tun: Link,
    /// Tunnel MTU in bytes.
    pub mtu: u16,
    /// The subnet-side NICs (often the uplink too).
    pub subnet: Vec<Link>,
    /// The peers' allowed IPs: who may appear as a source from the TUN and as a destination into it.
    pub overlay: Vec<IpNet>,
    /// Advertised routes.
    pub routes: Vec<Route>,
    /// What peers may reach.
    pub policy: Policy,
}

/// Why packets of `route` take the slow path although the eBPF datapath is there; `None`: they take
/// the fast one. Both directions follow the same answer, so that a flow never changes its path.
pub fn slow_reason(route: &Route, policy: &Policy) -> Option<&'static str> {
    if route.mode == RouteMode::Stack {
        Some("the route is marked for the kernel stack")
    } else if route.snat {
        Some("the kernel translates its sources")
    } else if !policy.rules.is_empty() {
        Some("the kernel applies the policy")
    } else {
        None
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

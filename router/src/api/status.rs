//! The status document. Its field names are an interface: scripts and dashboards read them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

use super::tailnet::Tailnet;
use crate::cloud::agent;
use crate::tailnet::node::Report;

/// What the router is, does and suffers from, at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The router's name.
    pub name: String,
    /// Version of the daemon.
    pub version: &'static str,
    /// Seconds since the daemon started.
    pub uptime_seconds: u64,
    /// Whether `wg` has changed peers, private key or port, so that they differ from the file's
    /// until that is read again.
    pub changed_by_wg: bool,
    /// What is wrong; empty means healthy.
    pub problems: Vec<Problem>,
    /// Whether new flows are taken, and what is waited for if not.
    pub life: LifeStatus,
    /// The TUN device.
    pub device: DeviceStatus,
    /// The uplink's name, if there is one.
    pub uplink: Option<String>,
    /// Names of the subnet-side interfaces.
    pub subnet: Vec<String>,
    /// The datapath in use.
    pub datapath: DatapathStatus,
    /// The uplink's guard.
    pub uplink_guard: GuardStatus,
    /// Advertised routes.
    pub routes: Vec<RouteStatus>,
    /// WireGuard peers.
    pub peers: Vec<PeerStatus>,
    /// The fast path's flows; `None` on the kernel datapath.
    pub flows: Option<FlowStatus>,
    /// New flows that each rule of the policy has let through on the fast path, in the order of the
    /// configuration.
    pub rule_hits: Vec<u64>,
    /// Clear packets by program and verdict.
    pub packets: Vec<Packets>,
    /// The engine.
    pub engine: EngineStatus,
    /// What keeps the router from carrying packets, in words; empty means ready.
    pub unready: Vec<String>,
    /// The cloud that this machine is in, if one is asked.
    pub cloud: Option<CloudStatus>,
    /// The tailnet, for a router in one: an object `tailnet`, and fields of `tailscale status --json` beside it.
    #[serde(flatten)]
    pub tailnet: Option<Tailnet>,
}

impl Status {
    /// Whether everything that is wanted is in force.
    pub fn healthy(&self) -> bool {
        self.problems.is_empty()
    }

    /// Takes the URL out that lets the router into its tailnet: who opens it owns the router there.
    pub fn hide_login(&mut self) {
        let Some(tailnet) = &mut self.tailnet else {
            return;
        };
        let Some(url) = tailnet.report.auth_url.clone() else {
            return;
        };
        let hide = |text: &mut String| {
            *text = text.replace(&url, "the URL that `sluice status` shows on this machine");
        };
        let mut report = Report::clone(&tailnet.report);
        report.auth_url = None;
        report.problems.iter_mut().for_each(|p| hide(&mut p.text));
        tailnet.report = Arc::new(report);
        self.problems.iter_mut().for_each(|p| hide(&mut p.error));
    }

    /// Whether the tailnet has given the router an address.
    pub fn has_tailnet_address(&self) -> bool {
        let own = self.tailnet.as_ref().and_then(|t| t.report.map.own());
        own.is_some_and(|own| !own.addresses.is_empty())
    }
}

/// The cloud that this machine is in.
#[derive(Clone, Debug, Serialize)]
pub struct CloudStatus {
    /// Which, `aws`.
    pub provider: &'static str,
    /// What is known of it.
    #[serde(flatten)]
    pub report: Arc<agent::Report>,
}

/// Something an operator should know of.
#[derive(Clone, Debug, Serialize)]
pub struct Problem {
    /// Which part: `datapath`, `peers`, `config`, `endpoint`, …
    pub part: String,
    /// One sentence.
    pub error: String,
}

/// Where in its life the router is.
#[derive(Clone, Debug, Serialize)]
pub struct LifeStatus {
    /// `starting`, `serving`, `draining`, `drained`, `leaving` or `left`.
    pub phase: &'static str,
    /// Why it drains, has drained or leaves: `hand`, `group`, `signal` or `spot`.
    pub cause: Option<&'static str>,
    /// The same in words.
    pub reason: Option<&'static str>,
    /// Until when flows are waited for, in seconds since the Unix epoch.
    pub until: Option<u64>,
    /// Flows in use as they were counted last; `None`: nobody counts them.
    pub flows: Option<u64>,
    /// What is waited for, in words.
    pub waits_for: Option<&'static str>,
}

/// The TUN device.
#[derive(Clone, Debug, Serialize)]
pub struct DeviceStatus {
    /// Interface name.
    pub name: String,
    /// Interface index.
    pub index: u32,
    /// Tunnel MTU in bytes.
    pub mtu: u16,
    /// Tunnel addresses.
    pub addresses: Vec<IpNet>,
    /// The router's WireGuard public key.
    pub public_key: String,
    /// UDP port of the underlay.
    pub listen_port: u16,
}

/// The datapath in use, and why.
#[derive(Clone, Debug, Serialize)]
pub struct DatapathStatus {
    /// What the configuration asks for: `auto`, `ebpf` or `kernel`.
    pub requested: &'static str,
    /// What carries packets: `ebpf` or `kernel`.
    pub active: &'static str,
    /// How the programs are attached: `tcx` or `clsact`.
    pub attach: Option<&'static str>,
    /// Why it is this one.
    pub reason: String,
    /// Why the programs' flows end with the daemon; `None`: they outlive it, or there are no
    /// programs.
    pub unkept: Option<String>,
    /// By what the programs judge flows now: with each new number, every flow is judged anew by its
    /// next packet. `None` on the kernel datapath.
    pub generation: Option<u32>,
}

/// The XDP program that drops on the uplink what cannot be WireGuard for the router.
#[derive(Clone, Debug, Serialize)]
pub struct GuardStatus {
    /// What the configuration asks for: `auto` or `off`.
    pub requested: &'static str,
    /// Where it is attached; `None`: nowhere.
    pub interface: Option<String>,
    /// Why it is or is not.
    pub reason: String,
    /// Frames that it has seen, by verdict.
    pub frames: BTreeMap<&'static str, u64>,
}

/// An advertised route.
#[derive(Clone, Debug, Serialize)]
pub struct RouteStatus {
    /// Destination.
    pub cidr: IpNet,
    /// Whether sources are translated.
    pub snat: bool,
    /// `fast` or `stack`, as configured.
    pub mode: &'static str,
    /// The path its packets take now: `fast` or `slow`.
    pub path: &'static str,
    /// Why it is the slow one.
    pub reason: Option<String>,
}

/// A WireGuard peer.
#[derive(Clone, Debug, Serialize)]
pub struct PeerStatus {
    /// The operator's name for it.
    pub name: Option<String>,
    /// Public key, base64.
    pub public_key: String,
    /// Where it is, as far as known.
    pub endpoint: Option<SocketAddr>,
    /// The peer relay that it is reached through instead: address, `:vni:` and number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer_relay: Option<String>,
    /// Number of the relay that it is reached through instead.
    pub relay: Option<u32>,
    /// Overlay CIDRs that are this peer's.
    pub allowed_ips: Vec<IpNet>,
    /// When the last handshake completed, in seconds since the Unix epoch.
    pub last_handshake: Option<u64>,
    /// Underlay bytes received from it.
    pub rx_bytes: u64,
    /// Underlay bytes sent to it.
    pub tx_bytes: u64,
    /// What the path to it carries in bytes, where its route or a router on it has told.
    pub path_mtu: Option<u32>,
    /// Datagrams to it are sent one by one, since the kernel refuses to cut them out of larger messages.
    pub uncut: bool,
}

/// The fast path's flows as the last sweep has left them.
#[derive(Clone, Debug, Serialize)]
pub struct FlowStatus {
    /// The flow table of each address family: `ipv4`, `ipv6`.
    pub tables: BTreeMap<&'static str, FlowTableStatus>,
    /// Flows ended by sweeps since the start, by reason: `expired`, `early`, `denied`, `address`, `stray`.
    pub ended: BTreeMap<&'static str, u64>,
    /// How long the last sweep took.
    pub sweep_seconds: f64,
}

/// The flow table of one address family.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct FlowTableStatus {
    /// Flows in it.
    pub flows: u64,
    /// Most flows.
    pub capacity: u64,
    /// Whether it is so full that idle flows end early.
    pub pressure: bool,
    /// Directions of flows, two of each, that have settled: the programs find them fastest.
    pub settled: u64,
}

impl FlowTableStatus {
    /// Whether it is so full that the operator should know: above 90 %.
    pub fn is_nearly_full(&self) -> bool {
        10 * self.flows > 9 * self.capacity
    }
}

/// A counter of a datapath.
#[derive(Clone, Debug, Serialize)]
pub struct Packets {
    /// Program or chain.
    pub program: &'static str,
    /// Verdict.
    pub verdict: &'static str,
    /// Packets; a super-packet counts once.
    pub packets: u64,
    /// Bytes at the IP layer.
    pub bytes: u64,
}

/// The engine.
#[derive(Clone, Debug, Serialize)]
pub struct EngineStatus {
    /// Offloads in use.
    pub features: Vec<&'static str>,
    /// Super-packets that the kernel refused, which are not made any more.
    pub refused: Vec<&'static str>,
    /// Worker threads.
    pub workers: usize,
    /// Counters by label.
    pub counters: BTreeMap<&'static str, u64>,
}

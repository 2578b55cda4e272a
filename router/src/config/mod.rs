//! The configuration file: raw form, validation, and the validated form that the rest sees.

use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;

use crate::control::Snapshot;
use crate::wireguard::keys::PrivateKey;

/// A validated configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What this machine itself decides.
    pub local: Local,
    /// Peers, routes and policy of the file.
    pub snapshot: Snapshot,
}

/// Settings that belong to this machine and never come from a control source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// The router's name, for display and metrics.
    pub name: String,
    /// Name of the TUN device, e.g. `sluice0`.
    pub device: String,
    /// The WireGuard private key.
    pub private_key: PrivateKey,
    /// UDP port of the underlay, host byte order.
    pub listen_port: u16,
    /// Tunnel addresses with their prefix length; at most one of each family.
    pub addresses: Vec<IpNet>,
    /// Tunnel MTU in bytes.
    pub mtu: u16,
    /// Which datapath to use.
    pub datapath: DatapathMode,
    /// The uplink.
    pub uplink: Interface,
    /// The subnet-side interfaces; empty means `auto`: found by the routes' CIDRs.
    pub subnet: Vec<String>,
    /// Number of worker threads; `None` lets the engine choose.
    pub workers: Option<usize>,
    /// Where Prometheus metrics, health and status are served over HTTP; `None`: only on the socket.
    pub http: Option<SocketAddr>,
    /// Path of the local API socket.
    pub socket: PathBuf,
}

/// Which datapath an operator asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatapathMode {
    /// eBPF where it works, else the kernel alone.
    Auto,
    /// eBPF, or refuse to start.
    Ebpf,
    /// The kernel alone.
    Kernel,
}

/// How an interface is chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Interface {
    /// By the routing table.
    Auto,
    /// By name.
    Named(String),
}

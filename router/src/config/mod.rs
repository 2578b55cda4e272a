//! The configuration file: raw form, validation, and the validated form that the rest sees.
//!
//! [`load`] reads a file in two steps: `raw` takes the TOML apart and keeps the place of every
//! value, `validate` judges the values and builds a [`Config`]. Both go on after a mistake, so that
//! [`ConfigErrors`] holds all of them. What only the running machine can tell is judged by
//! [`check_against_system`]. docs/configuration.md describes the file for operators.

mod keyfile;
mod net;
mod problem;
mod raw;
mod section;
mod suggest;
mod syntax;
mod system;
mod validate;

#[cfg(test)]
pub(crate) mod tests;

use std::fs::File;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

pub(crate) use net::{endpoint as parse_endpoint, host_name};
pub use problem::{ConfigErrors, Position, Problem};
pub use system::{check_against_system, check_peers_against_system};

use crate::control::{Identity, Peer, Policy, Snapshot, Update};
use crate::datapath::limits::Limits;
use crate::datapath::marks::Marks;
use crate::engine::Offloads;
use crate::wireguard::keys::PublicKey;

/// UDP port of the underlay if the file names none.
pub const DEFAULT_LISTEN_PORT: u16 = 51820;
/// Tunnel MTU in bytes that WireGuard's clients have by default, and the largest that [`Mtu::Auto`]
/// chooses: 1500 less the 80 bytes of IPv6, UDP and WireGuard.
pub const DEFAULT_MTU: u16 = 1420;
/// Tunnel MTUs in bytes that can work. Below 1280 the kernel takes IPv6 off the device (RFC 8200
/// section 5). A UDP datagram over IPv4 holds 65,507 bytes; less 32 for WireGuard's header and tag,
/// and rounded down to the 16 bytes that a packet is padded to, that leaves 65,472.
pub const MTU: RangeInclusive<u16> = 1280..=65472;
/// Name of the TUN device if the file names none.
pub const DEFAULT_DEVICE: &str = "sluice0";

/// Path of the local API socket of `device` if the file names none.
pub fn default_socket(device: &str) -> PathBuf {
    Path::new("/run/sluice").join(format!("{device}.sock"))
}

/// No configuration file is longer, in bytes; whatever is, is another file.
const LONGEST_FILE: u64 = 64 << 20;

/// Reads and validates the configuration file at `path`, and the key files that it names.
pub fn load(path: &Path) -> Result<Config, ConfigErrors> {
    let unreadable = |what: String| {
        ConfigErrors(vec![Problem {
            file: path.into(),
            position: None,
            key: "".into(),
            message: what,
        }])
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(LONGEST_FILE + 1).read_to_end(&mut bytes))
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                unreadable("does not exist; `sluice init` makes one".into())
            }
            _ => unreadable(format!("cannot be read: {error}")),
        })?;
    if bytes.len() as u64 > LONGEST_FILE {
        return Err(unreadable(
            "is longer than 64 MiB; is it the right file?".into(),
        ));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at]
            .iter()
            .filter(|b| **b == b'\n')
            .count()
            + 1;
        unreadable(format!("line {line} is not UTF-8; save the file as UTF-8"))
    })?;
    parse(&text, path)
}

/// Validates the text of a configuration file that stands (or will stand) at `path`; key files are
/// looked for beside it.
pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigErrors> {
    let mut problems = problem::Problems::new(path, text);
    let raw = raw::read(text, &mut problems);
    let config = validate::config(&raw, path, &mut problems);
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(problems.into_errors()),
    }
}

/// What differs between two settings and takes effect only when the daemon starts, as sentences.
/// Private key, addresses, port and MTU are not among it: a running router takes new ones.
pub fn restart_needed(old: &Local, new: &Local) -> Vec<String> {
    [
        ("name", old.name != new.name),
        ("wireguard.device", old.device != new.device),
        ("datapath.mode", old.datapath != new.datapath),
        ("datapath.uplink", old.uplink != new.uplink),
        (
            "datapath.uplink_guard",
            old.uplink_guard != new.uplink_guard,
        ),
        ("datapath.subnet", old.subnet != new.subnet),
        (
            "datapath.external_addresses",
            old.external_addresses != new.external_addresses,
        ),
        ("a mark in [datapath]", old.marks != new.marks),
        ("datapath.workers", old.workers != new.workers),
        (
            "a limit or timeout of flows in [datapath]",
            old.limits != new.limits,
        ),
        ("a switch in [offloads]", old.offloads != new.offloads),
        ("metrics.listen", old.http != new.http),
        ("metrics.hosts", old.http_hosts != new.http_hosts),
        ("api.socket", old.socket != new.socket),
    ]
    .into_iter()
    .filter(|(_, changed)| *changed)
    .map(|(key, _)| format!("{key} has changed, which takes effect when sluice is restarted"))
    .collect()
}

/// A validated configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What this machine itself decides.
    pub local: Local,
    /// Who the router is.
    pub identity: Identity,
    /// Peers, routes and policy of the file.
    pub snapshot: Snapshot,
    /// The sources of each rule, as the file has them.
    sources: Vec<Vec<validate::RuleSource>>,
    /// Where in the file what stands.
    pub origin: Origin,
}

impl Config {
    /// The file as what a control source says.
    pub fn update(&self) -> Update {
        Update::Whole {
            identity: Some(self.identity.clone()),
            snapshot: self.snapshot.clone(),
        }
    }

    /// Judges peers of a router with these overlay addresses as if the file named them, but for keys,
    /// which must be checked already. They stand beside each other and the file's routes; a peer may
    /// be without allowed IPs, and be anywhere for now: only an endpoint of the file is judged beside
    /// CIDRs.
    pub fn judge_peers(&self, addresses: &[IpNet], peers: &[&Peer]) -> Result<(), ConfigErrors> {
        validate::judge_peers(self, addresses, peers)
    }

    /// Whether a rule names this peer.
    pub fn is_named(&self, key: &PublicKey) -> bool {
        validate::is_named(self, key)
    }

    /// The policy when peers have these allowed IPs: rules follow the peers that they name, and one
    /// that is gone is no source any more.
    pub fn policy<'p>(&self, allowed: impl Fn(&PublicKey) -> Option<&'p [IpNet]>) -> Policy {
        validate::policy_of(self, allowed)
    }
}

/// Where the parts of a [`Config`] stand in its file, for problems that are found after parsing.
/// All origins are equal: a value that only moved in the file has not changed.
#[derive(Clone, Debug, Default)]
pub struct Origin(Option<Arc<Places>>);

impl PartialEq for Origin {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Origin {}

#[derive(Debug)]
struct Places {
    file: Arc<Path>,
    addresses: Vec<Position>,
    uplink: Option<Position>,
    subnet: Vec<Position>,
    /// By peer, as in the snapshot: the place of each allowed IP.
    allowed_ips: Vec<Vec<Position>>,
}

/// Settings that belong to this machine and never come from a control source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// The router's name, for display and metrics.
    pub name: String,
    /// Name of the TUN device, e.g. `sluice0`.
    pub device: String,
    /// UDP port of the underlay, host byte order.
    pub listen_port: u16,
    /// The tunnel MTU.
    pub mtu: Mtu,
    /// Which datapath to use.
    pub datapath: DatapathMode,
    /// The uplink.
    pub uplink: Interface,
    /// Whether the uplink's guard drops, where it can, what is no WireGuard message for us.
    pub uplink_guard: bool,
    /// The subnet-side interfaces; empty means `auto`: found by the routes' CIDRs.
    pub subnet: Vec<String>,
    /// What sources are translated to on the subnet-side interfaces that have these addresses, at
    /// most eight of each family; on others it is their first address.
    pub external_addresses: Vec<IpAddr>,
    /// Number of worker threads; `None` lets the engine choose.
    pub workers: Option<usize>,
    /// The limits of the fast path's flow table.
    pub limits: Limits,
    /// What the engine may use where the kernel has it.
    pub offloads: Offloads,
    /// Our bits of the firewall mark.
    pub marks: Marks,
    /// Where Prometheus metrics, health and status are served over HTTP; `None`: only on the socket.
    pub http: Option<SocketAddr>,
    /// Names that HTTP requests may be for, beside addresses and `localhost`: in lower case, without a
    /// final dot.
    pub http_hosts: Vec<String>,
    /// Path of the local API socket.
    pub socket: PathBuf,
}

/// How the tunnel MTU is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mtu {
    /// What uplink and routes to the peers carry, at most [`DEFAULT_MTU`] and never less than
    /// [`MTU`] allows.
    Auto,
    /// This, in bytes.
    Fixed(u16),
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

//! The configuration file: raw form, validation, and the validated form that the rest sees.
//!
//! [`load`] reads a file and what lies over it (`layers`) in two steps: `raw` takes the TOML apart and keeps the
//! place of every value, `validate` judges the values and builds a [`Config`]. Both go on after a mistake, so that
//! [`ConfigErrors`] holds all of them. What only the running machine can tell is judged by
//! [`check_against_system`]. docs/configuration.md describes the file for operators.

mod changes;
mod environment;
mod flags;
mod keyfile;
mod layers;
mod net;
mod preferences;
mod problem;
mod raw;
mod section;
mod show;
mod suggest;
mod syntax;
mod system;
mod validate;

#[cfg(test)]
pub(crate) mod tests;

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

pub use changes::{Changes, Login};
pub use environment::{Environment, Variables, joining, read as read_environment, variables};
pub use flags::{SetFlags, UpFlags, duration, from_go};
use layers::Layers;
pub(crate) use layers::files;
pub use layers::{DEFAULT_FILE, is_there};
pub(crate) use net::{endpoint as parse_endpoint, host_name};
pub use preferences::{Preferences, PreferencesError};
pub use problem::{ConfigErrors, Position, Problem};
pub use show::show;
pub use system::{captured, check_against_system, check_peers_against_system};

use crate::cloud::agent;
use crate::cloud::detect::Provider;
use crate::cloud::life::Patience;
use crate::control::{Identity, Peer, Policy, Route, RouteMode, Snapshot, Update};
use crate::datapath::limits::Limits;
use crate::datapath::marks::Marks;
use crate::engine::Offloads;
use crate::tailnet::node::Settings;
use crate::wireguard::keys::{PrivateKey, PublicKey};

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

/// Reads and validates the configuration file at `path` with its other layers, and the key files that they
/// name. The layers, the weaker first: for [`DEFAULT_FILE`] the files of the image in
/// `/usr/lib/sluice/sluice.d`; the file; those in the folder of its name with `.d` in the place of `.toml`; for
/// [`DEFAULT_FILE`] the instance's user data; the variable `SLUICE_CONFIG`.
///
/// A layer of user data with which all would not be valid is left out, and [`Config::user_data`] says what is wrong
/// with it: nobody is at hand to mend it, and the rest may carry packets. But not where the only rules would go with it,
/// for without any rule every peer may reach every route.
pub fn load(path: &Path) -> Result<Config, ConfigErrors> {
    effective(path).map(|(config, _)| config)
}

/// The same with the layers that it is made of.
fn effective(path: &Path) -> Result<(Config, Layers), ConfigErrors> {
    settle(Layers::read(path, None)?, path)
}

fn settle(layers: Layers, path: &Path) -> Result<(Config, Layers), ConfigErrors> {
    let mut errors = match judge(&layers, path) {
        Ok(config) => return Ok((config, layers)),
        Err(errors) => errors,
    };
    let rest = layers.without_user_data();
    match rest.map(|rest| (judge(&rest, path), rest)) {
        Some((Ok(config), _))
            if config.snapshot.policy.rules.is_empty() && layers.has_user_rules() =>
        {
            errors.0.push(layers::only_rules());
            Err(errors)
        }
        Some((Ok(mut config), rest)) => {
            config.user_data = errors.0.iter().map(ToString::to_string).collect();
            Ok((config, rest))
        }
        _ => Err(errors),
    }
}

/// Validates the text of a configuration file that stands (or will stand) at `path`, by itself. Key files are looked
/// for beside it.
pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigErrors> {
    judge(&Layers::one(text, path), path)
}

/// The same of the text with the other layers of the file.
pub fn parse_layered(text: &str, path: &Path) -> Result<Config, ConfigErrors> {
    judge(&Layers::read(path, Some(text))?, path)
}

fn judge(layers: &Layers, path: &Path) -> Result<Config, ConfigErrors> {
    let mut problems = problem::Problems::new(layers);
    let sources = layers.sources();
    let raw = raw::read(&sources, layers.main(), &mut problems);
    let config = validate::config(&raw, path, &mut problems);
    match config {
        Some(config) if problems.is_empty() => Ok(config),
        _ => Err(problems.into_errors()),
    }
}

/// Whether a network is one that is never routed, such as the link-local ones.
pub fn is_never_routed(net: &IpNet) -> bool {
    net::never_routed(net).is_some()
}

/// What differs between two settings and takes effect only when the daemon starts, as sentences.
/// Private key, addresses, port, MTU and `[drain]` are not among it: a running router takes new ones.
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
    /// Who the router is; `None`: the tailnet says it.
    pub identity: Option<Identity>,
    /// The tailnet that the router joins.
    pub tailnet: Option<Settings>,
    /// Peers, routes and policy of the file.
    pub snapshot: Snapshot,
    /// Routes whose CIDRs are found out while the router runs.
    pub auto_routes: Vec<AutoRoute>,
    /// What is wanted of a cloud.
    pub cloud: Cloud,
    /// What is wrong with the layer of the user data, which is left out then; each a sentence.
    pub user_data: Vec<String>,
    /// The sources of each rule, as the file has them.
    sources: Vec<Vec<validate::RuleSource>>,
    /// Where in the file what stands.
    pub origin: Origin,
}

impl Config {
    /// Whether this is without the user data that `before` has: a router that runs keeps it.
    pub fn loses_user_data(&self, before: &Self) -> bool {
        let places = before.origin.0.iter();
        let mut files = places.flat_map(|places| &places.files);
        !self.user_data.is_empty() && files.any(|file| layers::is_user_data(file))
    }

    /// The router's own overlay addresses, as far as the file says them.
    pub fn addresses(&self) -> &[IpNet] {
        self.identity.as_ref().map_or(&[], |own| &own.addresses)
    }

    /// The router's private key, if the file says it.
    pub fn private_key(&self) -> Option<&PrivateKey> {
        self.identity.as_ref().map(|own| &own.private_key)
    }

    /// The file as what a control source says.
    pub fn update(&self) -> Update {
        Update::Whole {
            identity: self.identity.clone(),
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

/// Routes to networks that are found out while the router runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutoRoute {
    /// To which.
    pub nets: AutoNets,
    /// Whether sources are translated to the router's own address.
    pub snat: bool,
    /// Which path carries them.
    pub mode: RouteMode,
}

impl AutoRoute {
    /// The route to one of the networks.
    pub fn to(&self, cidr: IpNet) -> Route {
        Route {
            cidr,
            snat: self.snat,
            mode: self.mode,
        }
    }
}

/// Networks that are found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AutoNets {
    /// Those of the VPC that this machine is in.
    Vpc,
    /// Those that the subnet-side interfaces are in.
    Connected,
}

impl AutoNets {
    /// As the file has it.
    pub fn label(self) -> &'static str {
        match self {
            Self::Vpc => "auto:vpc",
            Self::Connected => "auto:connected",
        }
    }
}

/// What is wanted of a cloud.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cloud {
    /// Which is asked.
    pub provider: Provider,
    /// What for.
    pub settings: agent::Settings,
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
    /// The layers.
    files: Vec<Arc<Path>>,
    addresses: Vec<Place>,
    uplink: Option<Place>,
    subnet: Vec<Place>,
    /// By peer, as in the snapshot: the place of each allowed IP.
    allowed_ips: Vec<Vec<Place>>,
}

/// A place in one of the layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Which of [`Places::files`].
    file: u16,
    position: Position,
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
    /// How long flows may take to end when the router drains.
    pub patience: Patience,
    /// Where Prometheus metrics, health and status are served over HTTP; `None`: only on the socket.
    pub http: Option<SocketAddr>,
    /// What is served there.
    pub http_pages: HttpPages,
    /// Names that HTTP requests may be for, beside addresses and `localhost`: in lower case, without a
    /// final dot.
    pub http_hosts: Vec<String>,
    /// Path of the local API socket.
    pub socket: PathBuf,
}

/// What is served over HTTP beside the local socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpPages {
    /// Metrics, status, and health: healthy is what has everything in force.
    All,
    /// As Tailscale's containers have it: healthy is what has an address, and ready what has everything in force that
    /// carries packets.
    Container {
        /// Health is served.
        health: bool,
        /// Metrics are served.
        metrics: bool,
    },
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

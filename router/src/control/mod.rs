//! Where identity, peers, routes and policy come from.
//!
//! A control source yields [`Update`]s: whole snapshots, or what has changed since. [`Combined`]
//! holds what each source wants, settles where two of them contradict each other, and yields the one
//! [`State`] that is wanted, with what each update has changed of it. The configuration file is the
//! first source; what `wg` sets are updates of the file's part, which hold until it is read again.

mod combined;
mod feeds;
pub mod file;
mod jail;
mod state;
mod via;

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;

use ipnet::IpNet;

pub use combined::{Combined, Conflict};
pub use feeds::Feeds;
pub use state::{Changed, Peers, State};

use crate::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};

/// Something that decides what the router is to do.
pub trait Source: Send {
    /// Why there is no update.
    type Error: std::error::Error;

    /// Waits for the next update. After an error what the source said before stays in force, and it
    /// may be asked again; it is the source that waits before it fails once more. Cancel safe.
    fn next(&mut self) -> impl Future<Output = Result<Update, Self::Error>> + Send;
}

/// What a source has to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Update {
    /// Everything that it wants; nothing of what it said before.
    Whole {
        /// Who the router is, if the source decides it.
        identity: Option<Identity>,
        /// The rest.
        snapshot: Snapshot,
    },
    /// What has changed.
    Delta(Delta),
}

/// What has changed of what a source wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Who the router is from now on; `None`: as before.
    pub identity: Option<Identity>,
    /// Peers that are new or have changed, each public key once.
    pub set: Vec<Peer>,
    /// Peers that go.
    pub remove: Vec<PublicKey>,
    /// All routes from now on; `None`: as before.
    pub routes: Option<Vec<Route>>,
    /// The policy from now on; `None`: as before.
    pub policy: Option<Policy>,
}

/// Who the router is in the overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its WireGuard private key.
    pub private_key: PrivateKey,
    /// Its overlay addresses with their prefix length.
    pub addresses: Vec<IpNet>,
}

/// Everything a control source decides beside the identity, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Peers, each public key once; no CIDR belongs to two peers.
    pub peers: Vec<Peer>,
    /// Advertised routes, each CIDR once.
    pub routes: Vec<Route>,
    /// What peers may reach.
    pub policy: Policy,
}

/// A WireGuard peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// The operator's name for it; only for display.
    pub name: Option<String>,
    /// Static public key.
    pub public_key: PublicKey,
    /// Optional symmetric key mixed into the handshake.
    pub preshared_key: Option<PresharedKey>,
    /// Overlay CIDRs that are this peer's (cryptokey routing), without host bits.
    pub allowed_ips: Vec<IpNet>,
    /// Where to send before the peer has been heard from.
    pub endpoint: Option<Endpoint>,
    /// Interval of persistent keepalives in seconds.
    pub keepalive: Option<u16>,
    /// It is where it was heard from last. Otherwise whoever knows the ways says where it is
    /// ([`PeerSpec::roaming`](crate::engine::PeerSpec::roaming)).
    pub roaming: bool,
    /// Addresses of ours, at most one of each family, each with the one by which this peer knows it.
    pub masquerade: Vec<(IpAddr, IpAddr)>,
    /// It may open no flows, whatever the rules say. Without any rule this means nothing.
    pub jailed: bool,
}

/// The underlay address of a peer as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A literal address.
    Addr(SocketAddr),
    /// A DNS name and port, resolved by the runtime.
    Name {
        /// Host name.
        host: String,
        /// UDP port, host byte order.
        port: u16,
    },
}

/// A CIDR that the router carries packets into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// Destination, without host bits.
    pub cidr: IpNet,
    /// Whether sources are translated to the router's own address.
    pub snat: bool,
    /// Which path carries it.
    pub mode: RouteMode,
}

/// Which path a route's packets take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteMode {
    /// The fast path where the datapath has one.
    Fast,
    /// Always the kernel stack (kube-proxy or Cilium must see the packets).
    Stack,
}

/// What peers may reach, and who may reach them. For each direction by itself: no rules, every advertised
/// route; any rule, nothing but what a rule allows. So a source that allows nothing says it by one rule
/// without sources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Rules; a packet that any one of them matches is allowed.
    pub rules: Vec<Rule>,
    /// What becomes of packets that no rule allows.
    pub denied: Denied,
}

/// What becomes of packets that no rule allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Denied {
    /// They are dropped.
    #[default]
    Drop,
    /// Their senders are told, by a TCP RST or an ICMP error.
    Reject,
}

/// Whose flows a rule is about, by the side that opens them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Direction {
    /// Those that peers open: to the subnet side, to other peers and to the router itself.
    FromOverlay,
    /// Those that the subnet side opens to peers.
    ToOverlay,
    /// Both.
    #[default]
    Both,
}

impl Direction {
    /// Whether the rule is about flows that peers open (`true`), or about those opened to them.
    pub fn covers(self, from_overlay: bool) -> bool {
        match self {
            Self::FromOverlay => from_overlay,
            Self::ToOverlay => !from_overlay,
            Self::Both => true,
        }
    }
}

/// One policy rule, in shape and meaning a Tailscale packet-filter rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Whose flows it is about. A direction without any rule is open.
    pub direction: Direction,
    /// Sources; a packet matches when its source is in any of them.
    pub sources: Vec<IpNet>,
    /// Destinations; a packet matches when any of them matches.
    pub destinations: Vec<Destination>,
    /// IP protocol numbers. Empty means TCP (6), UDP (17), ICMP (1) and ICMPv6 (58).
    pub protocols: Vec<u8>,
}

/// A destination CIDR and port range. ICMP and protocols without ports match by CIDR; protocols
/// other than TCP, UDP and ICMP need the full port range. ICMP matches whatever protocols the rule
/// names, as in Tailscale: who may use a service may ping its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Destination CIDR.
    pub cidr: IpNet,
    /// Destination ports, host byte order; `0..=65535` for all.
    pub ports: RangeInclusive<u16>,
}

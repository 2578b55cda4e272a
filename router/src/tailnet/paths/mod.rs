//! Underlay paths to the peers of a tailnet: which address or relay a peer is reached by, and how that is found out.
//!
//! After Tailscale's `wgengine/magicsock` and `net/netcheck`. [`spawn`] starts a thread that does the I/O; whoever
//! holds the [`Handle`] tells it of keys, peers and relays by [`Command`]s, hears of [`Event`]s that the coordination
//! server must know, and reads the [`PathsReport`].

mod budget;
mod home;
mod model;
mod netcheck;
mod peer;
pub mod portmap;
mod rounds;
mod thread;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};

pub use self::netcheck::Netcheck;
pub use self::portmap::{Mapped, Protocol};
pub use self::thread::{Thread, spawn};

use crate::engine::Path;
use crate::tailnet::keys::{DiscoPublic, DiscoSecret, NodePublic, NodeSecret};
use crate::tailnet::relay::server::{self, Stats};
use crate::tailnet::relay::service::Counts;
use crate::tailnet::wire::{DerpMap, NetInfo};
use crate::wireguard::keys::PublicKey;

/// A peer, as far as paths go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathPeer {
    /// Its node key.
    pub key: NodePublic,
    /// Its disco key; `None` for one that has none.
    pub disco: Option<DiscoPublic>,
    /// Its underlay addresses, as the coordination server knows them.
    pub endpoints: Vec<SocketAddr>,
    /// Region of its home relay.
    pub home: Option<u32>,
    /// Speaks neither disco nor DERP.
    pub wireguard_only: bool,
    /// Knows what peer relays are.
    pub relayed: bool,
    /// Connected to the coordination server; `None` when that does not tell.
    pub online: Option<bool>,
    /// Its addresses in the tailnet.
    pub addresses: Vec<IpAddr>,
}

/// What the thread is told.
#[derive(Debug)]
pub enum Command {
    /// Own keys. Nothing is done without them; others than before end all that was known of paths.
    Identity {
        /// Own node key.
        node: NodeSecret,
        /// Own disco key.
        disco: DiscoSecret,
    },
    /// Peers that came or changed, and those that are gone.
    Peers {
        /// Whole, each in the place of what was known of it.
        set: Vec<PathPeer>,
        /// Unknown ones are passed over.
        removed: Vec<NodePublic>,
    },
    /// The relays, all of them.
    Derp(Box<DerpMap>),
    /// Peers that carry datagrams between this node and others, all of them.
    PeerRelays(BTreeSet<NodePublic>),
    /// Whether this node carries datagrams between others, and for whom.
    Serve(Option<Serve>),
    /// What this machine has, whole.
    Local {
        /// The engine's listen port, host byte order.
        port: u16,
        /// Addresses of the uplinks; others than before have paths looked for anew.
        addresses: Vec<IpAddr>,
        /// Endpoints that the settings name.
        fixed: Vec<SocketAddr>,
    },
    /// The gateway that is asked for a port; `None`: none is.
    Gateway(Option<portmap::Wanted>),
    /// The router stops: a port of the gateway is given back, and then this is told.
    GiveBack(oneshot::Sender<()>),
    /// Whether the coordination server hears what this node tells: the home does not move without.
    Control {
        /// It is connected.
        connected: bool,
    },
    /// The engine knows these peers now: it is to be told their paths again.
    Applied(Vec<PublicKey>),
    /// The engine knows all peers that are wanted now.
    AppliedAll,
    /// A disco ping.
    Ping {
        /// Whom.
        peer: NodePublic,
        /// Gets the answer, or what was tried.
        done: oneshot::Sender<Result<Pong, PingError>>,
    },
    /// A look at the network now.
    Netcheck(oneshot::Sender<Netcheck>),
}

/// What this node is as a peer relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Serve {
    /// Its UDP port, host byte order.
    pub port: u16,
    /// Where it is reached whatever is found out.
    pub fixed: Vec<SocketAddr>,
    /// Peers that may ask for places.
    pub clients: BTreeSet<NodePublic>,
}

/// How an endpoint of our own is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum EndpointKind {
    /// An address of this machine.
    Local,
    /// A STUN server has seen it.
    Stun,
    /// The address that a STUN server has seen, with the listen port: the NAT shows each destination another port, but
    /// one may have been forwarded by hand.
    StunLocalPort,
    /// The gateway leads it here.
    Mapped,
    /// Set by hand.
    Fixed,
}

impl EndpointKind {
    /// The number on the wire (`tailcfg.EndpointType`).
    pub fn wire(self) -> i64 {
        match self {
            Self::Local => 1,
            Self::Stun => 2,
            Self::Mapped => 3,
            Self::StunLocalPort => 4,
            Self::Fixed => 5,
        }
    }
}

/// What the coordination server must be told.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Where peers may reach this node, all of it.
    Endpoints(Vec<(SocketAddr, EndpointKind)>),
    /// Region of the home relay. Also in what [`Event::NetInfo`] tells.
    Home(u32),
    /// What is known of the network.
    NetInfo(Box<NetInfo>),
}

/// A disco ping's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pong {
    /// The way it took.
    pub path: Path,
    /// Code of the relay's region, if it was one.
    pub region: Option<String>,
    /// There and back.
    pub latency: Duration,
}

/// Why a ping brought nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PingError {
    /// No peer has this key.
    #[error("there is no such peer")]
    Unknown,
    /// The peer speaks no disco.
    #[error("the peer speaks no disco: it is a plain WireGuard peer")]
    NoDisco,
    /// No answer came in time.
    #[error("no answer within {} s: {tried}", .after.as_secs())]
    Silent {
        /// Waited for so long.
        after: Duration,
        /// What was tried, in words.
        tried: String,
    },
    /// There is no way to send to it.
    #[error("nothing can be sent to the peer: {0}")]
    Nowhere(String),
}

/// What is known of the way to a peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerWay {
    /// The way that is used; `None` when there is none.
    pub path: Option<Path>,
    /// Code of the peer's home region.
    pub region: Option<String>,
    /// Round trip by disco on that way, as measured last.
    pub latency: Option<Duration>,
    /// The path is by UDP, direct or by a peer relay, and has answered within the last seconds.
    pub trusted: bool,
    /// Packets have come or gone within the last minute.
    pub active: bool,
    /// When a disco message came from the peer last.
    pub last_disco: Option<Instant>,
    /// Why the way is no better, or what is tried.
    pub why: Option<String>,
}

/// What is known of all ways.
#[derive(Clone, Debug, Default)]
pub struct PathsReport {
    /// Region of the home relay.
    pub home: Option<u32>,
    /// Codes of the regions.
    pub regions: BTreeMap<u32, String>,
    /// What is wrong with relays that somebody needs now: in sentences, with what mends it.
    pub relay_problems: Vec<String>,
    /// What the gateway says of a port that leads here.
    pub port: portmap::Found,
    /// Own endpoints.
    pub endpoints: Vec<(SocketAddr, EndpointKind)>,
    /// The network as it was found last.
    pub netcheck: Option<Netcheck>,
    /// By peer: those that have traffic or a direct path. One that is not here is quiet.
    pub peers: HashMap<NodePublic, PeerWay>,
    /// The peer relay that this node is.
    pub relay_server: Option<RelayServer>,
}

/// How this node stands as a peer relay.
#[derive(Clone, Debug)]
pub struct RelayServer {
    /// Its UDP port, host byte order.
    pub port: u16,
    /// Where those who ask are told to go, the best first.
    pub addresses: Vec<SocketAddr>,
    /// Peers that may ask for places.
    pub clients: usize,
    /// Questions of peers that may not.
    pub ungranted: u64,
    /// Why it does not run.
    pub failure: Option<String>,
    /// What it carries; `None` if it does not run.
    pub counts: Option<Counts>,
}

/// What is wrong with a peer relay that has no place left.
fn full(stats: &Stats) -> Option<String> {
    (stats.open + stats.connecting >= server::MOST).then(|| {
        format!(
            "this peer relay has no place left of {}, so that other pairs of nodes stay with slower relays: set up \
             another peer relay beside it",
            server::MOST
        )
    })
}

/// Places in a row that nobody has come to, before that is told.
const MISSED: u64 = 3;

impl RelayServer {
    /// How it stands now.
    pub fn stats(&self) -> Stats {
        self.counts.as_ref().map(Counts::read).unwrap_or_default()
    }

    /// What is wrong with it, and what mends that.
    pub fn problem(&self) -> Option<String> {
        let port = self.port;
        if let Some(why) = &self.failure {
            return Some(format!(
                "this router is to be a peer relay and cannot: {why}; nodes that find no direct way stay with slower \
                 relays meanwhile. It is tried again: free UDP port {port}, or name another one in relay_server_port"
            ));
        }
        self.counts.as_ref()?;
        if self.addresses.is_empty() {
            return Some(
                "this peer relay knows no address of its own, so nobody is given a place: name one in \
                 relay_server_static_endpoints"
                    .to_owned(),
            );
        }
        let stats = self.stats();
        if let Some(full) = full(&stats) {
            return Some(full);
        }
        let missed = stats.missed;
        (missed >= MISSED).then(|| {
            let told: Vec<_> = self.addresses.iter().map(SocketAddr::to_string).collect();
            format!(
                "the last {missed} places on this peer relay were of no use, for neither node could reach it at {}: let \
                 UDP port {port} in (host firewall, security group, NAT), or name where it is reached in \
                 relay_server_static_endpoints",
                told.join(", ")
            )
        })
    }
}

impl PathsReport {
    /// The code of a region, or its number where the map has no code.
    pub fn region_code(&self, region: u32) -> String {
        self.regions
            .get(&region)
            .cloned()
            .unwrap_or_else(|| region.to_string())
    }
}

/// Talks to the thread.
#[derive(Clone)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    report: watch::Receiver<Arc<PathsReport>>,
}

impl Handle {
    /// Tells something. After the thread's end nothing comes of it.
    pub fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
    }

    /// What is known of the ways, as of the last second.
    pub fn report(&self) -> Arc<PathsReport> {
        self.report.borrow().clone()
    }

    /// A disco ping. Answers within ten seconds.
    pub async fn ping(&self, peer: NodePublic) -> Result<Pong, PingError> {
        let (done, answer) = oneshot::channel();
        self.tell(Command::Ping { peer, done });
        let gone = || PingError::Nowhere("the daemon is ending".to_owned());
        answer.await.map_err(|_| gone())?
    }

    /// A look at the network now. `None` when the daemon is ending.
    pub async fn netcheck(&self) -> Option<Netcheck> {
        let (done, answer) = oneshot::channel();
        self.tell(Command::Netcheck(done));
        answer.await.ok()
    }
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_relay_without_a_place_left_is_told() {
        let mut stats = Stats {
            open: server::MOST - 1,
            ..Stats::default()
        };
        assert_eq!(full(&stats), None);
        stats.connecting = 1;
        assert!(full(&stats).is_some_and(|told| told.contains("another peer relay")));
    }
}

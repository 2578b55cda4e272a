//! How a node stands, for status, metrics and the API.

use std::fmt;
use std::sync::Arc;

use ipnet::IpNet;

use crate::tailnet::keys::NodePublic;
use crate::tailnet::netmap::Netmap;
use crate::tailnet::time::Timestamp;

/// The states of `ipn.State`, in its words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackendState {
    /// Nothing is known yet.
    #[default]
    NoState,
    /// A person or a key is wanted.
    NeedsLogin,
    /// An administrator has to let the machine in.
    NeedsMachineAuth,
    /// Let in, and without a map.
    Starting,
    /// A map is in force.
    Running,
    /// Told to take no part.
    Stopped,
}

impl BackendState {
    /// Tailscale's word.
    pub fn label(self) -> &'static str {
        match self {
            Self::NoState => "NoState",
            Self::NeedsLogin => "NeedsLogin",
            Self::NeedsMachineAuth => "NeedsMachineAuth",
            Self::Starting => "Starting",
            Self::Running => "Running",
            Self::Stopped => "Stopped",
        }
    }
}

impl fmt::Display for BackendState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// Something that stops, slows or changes somebody's packets, or will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// A word that stays, for logs and metrics, e.g. `login`, `control`, `key-expiry`.
    pub part: &'static str,
    /// What, why it matters, and what mends it.
    pub text: String,
}

/// What is known of the node. A clone costs little.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The state.
    pub state: BackendState,
    /// Where a person must go to let the node in.
    pub auth_url: Option<String>,
    /// The network map as it is in force, from the state directory if the server has not answered yet.
    pub map: Arc<Netmap>,
    /// The node's own key.
    pub key: Option<NodePublic>,
    /// The coordination server.
    pub control_url: String,
    /// The name that the node asks for; the one that it has is in the map.
    pub hostname: String,
    /// Routes that the node offers; those that were approved are the allowed IPs of the map's own node.
    pub advertised: Vec<IpNet>,
    /// Tags that the node asks for.
    pub tags: Vec<String>,
    /// The server has the node removed when it is gone.
    pub ephemeral: bool,
    /// Others' subnet routes are taken.
    pub accept_routes: bool,
    /// Since when the map stream stands; `None`: it does not.
    pub connected: Option<Timestamp>,
    /// How far the server's clock is ahead of ours, in microseconds; 0 if they agree.
    pub ahead: i64,
    /// What is wrong, the worst first. The map's own messages ([`Netmap::health`]) are not among them.
    pub problems: Vec<Problem>,
    /// When the node's key ends; `None` for never.
    pub key_expiry: Option<Timestamp>,
}

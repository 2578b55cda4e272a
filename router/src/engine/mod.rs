//! The packet engine: worker threads between the UDP sockets and the TUN queues.

use std::net::SocketAddr;
use std::time::SystemTime;

use ipnet::IpNet;

use crate::wireguard::keys::{PresharedKey, PublicKey};

/// A peer as the engine needs it: endpoint already resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerSpec {
    /// Static public key.
    pub public_key: PublicKey,
    /// Optional symmetric key mixed into the handshake.
    pub preshared_key: Option<PresharedKey>,
    /// CIDRs that are this peer's.
    pub allowed_ips: Vec<IpNet>,
    /// Where to send until the peer is heard from elsewhere.
    pub endpoint: Option<SocketAddr>,
    /// Interval of persistent keepalives in seconds.
    pub keepalive: Option<u16>,
}

/// What the engine knows of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStats {
    /// Static public key.
    pub public_key: PublicKey,
    /// Where it was last authenticated from, or its configured endpoint.
    pub endpoint: Option<SocketAddr>,
    /// When the last handshake completed.
    pub last_handshake: Option<SystemTime>,
    /// Underlay bytes received from it, as `wg show` counts them.
    pub rx_bytes: u64,
    /// Underlay bytes sent to it.
    pub tx_bytes: u64,
}

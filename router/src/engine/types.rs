//! What the rest of the daemon gives to the engine and reads of it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Instant, SystemTime};

use ipnet::IpNet;

use crate::engine::error::Error;
use crate::engine::path::Path;
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
    /// Where else it may be: tried in this order when it does not answer there.
    pub others: Vec<SocketAddr>,
    /// Interval of persistent keepalives in seconds.
    pub keepalive: Option<u16>,
    /// It is where it was heard from last, and is looked for when it does not answer. Otherwise it is
    /// where [`Engine::set_path`](crate::engine::Engine::set_path) says, and no packet changes that; only
    /// until something is said it is at `endpoint`, or where it is first heard from.
    pub roaming: bool,
    /// Addresses of ours, at most one of each family, each with the one by which this peer knows it: what
    /// it sends there comes to ours, and what ours sends to it comes from there.
    pub masquerade: Vec<(IpAddr, IpAddr)>,
}

/// A change of the peers.
#[derive(Clone, Debug, Default)]
pub struct PeerChange {
    /// Peers that are added, or are from now on like this.
    pub set: Vec<PeerSpec>,
    /// Peers that go. Unknown ones are passed over.
    pub remove: Vec<PublicKey>,
}

/// A peer of a change that is not put into force. One that was there before stays as it was, but for
/// allowed IPs that others have got by the same change.
#[derive(Debug)]
pub struct Skipped {
    /// Whose specification it is.
    pub public_key: PublicKey,
    /// What is wrong with it.
    pub error: Error,
}

/// What the engine knows of a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerStats {
    /// Static public key.
    pub public_key: PublicKey,
    /// The way to it: where it was last authenticated from, its configured endpoint, or what
    /// [`Engine::set_path`](crate::engine::Engine::set_path) has said.
    pub path: Option<Path>,
    /// When the last handshake completed.
    pub last_handshake: Option<SystemTime>,
    /// Underlay bytes received from it, as `wg show` counts them.
    pub rx_bytes: u64,
    /// Underlay bytes sent to it.
    pub tx_bytes: u64,
    /// WireGuard messages received from it.
    pub rx_packets: u64,
    /// WireGuard messages sent to it.
    pub tx_packets: u64,
    /// The kernel has refused to cut messages to it into datagrams (UDP GSO) within the last seconds:
    /// each is sent by itself.
    pub uncut: bool,
    /// The last packet for it that was dropped because nobody knows where it is.
    pub nowhere: Option<Nowhere>,
}

impl PeerStats {
    /// The address that is sent to, if the way is not by a relay.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.path.and_then(Path::endpoint)
    }
}

/// A packet for a peer that nobody knows the endpoint of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nowhere {
    /// The packet's destination.
    pub destination: IpAddr,
    /// When it was dropped.
    pub at: SystemTime,
}

/// A datagram that came to the listen port and is no WireGuard message.
#[derive(Clone, Debug)]
pub struct Datagram {
    /// The sender.
    pub source: SocketAddr,
    /// Our address that it was sent to.
    pub local: Option<IpAddr>,
    /// Index of the interface that it came in by; 0 if that is not known.
    pub interface: u32,
    /// The payload, up to 2,048 bytes.
    pub bytes: Box<[u8]>,
    /// When it was taken from the socket.
    pub received: Instant,
}

/// How an engine is set up.
#[derive(Clone, Debug)]
pub struct Options {
    /// Name of the TUN device to create.
    pub device: String,
    /// MTU of the device in bytes.
    pub mtu: u16,
    /// UDP port to listen on, host byte order; 0 lets the system choose.
    pub listen_port: u16,
    /// Firewall mark of underlay packets (`SO_MARK`); 0 for none.
    pub fwmark: u32,
    /// Number of worker threads; `None` lets the engine choose.
    pub workers: Option<usize>,
    /// What may be used where the kernel has it.
    pub offloads: Offloads,
}

/// Which offloads may be used where the kernel has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// TCP super-packets on the TUN device (TUN_F_TSO4, TUN_F_TSO6).
    pub tun_tso: bool,
    /// UDP super-packets on the TUN device (TUN_F_USO4, TUN_F_USO6).
    pub tun_uso: bool,
    /// Decrypted packets are merged into such super-packets.
    pub tun_gro: bool,
    /// Datagrams are received in batches (UDP_GRO).
    pub udp_gro: bool,
    /// Datagrams are sent in batches (UDP_SEGMENT).
    pub udp_gso: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Self = Self::each(true);
    /// None of them.
    pub const NONE: Self = Self::each(false);

    /// Names of all, as the configuration has them.
    pub const NAMES: [&'static str; 5] = ["tun_tso", "tun_uso", "tun_gro", "udp_gro", "udp_gso"];

    const fn each(on: bool) -> Self {
        Self {
            tun_tso: on,
            tun_uso: on,
            tun_gro: on,
            udp_gro: on,
            udp_gso: on,
        }
    }

    /// The one of this name, as the configuration has it.
    pub fn named(&mut self, name: &str) -> Option<&mut bool> {
        Some(match name {
            "tun_tso" => &mut self.tun_tso,
            "tun_uso" => &mut self.tun_uso,
            "tun_gro" => &mut self.tun_gro,
            "udp_gro" => &mut self.udp_gro,
            "udp_gso" => &mut self.udp_gso,
            _ => return None,
        })
    }
}

impl Default for Offloads {
    fn default() -> Self {
        Self::ALL
    }
}

/// What the kernel granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// Worker threads.
    pub workers: usize,
    /// TUN packets carry a virtio-net header.
    pub vnet_header: bool,
    /// TCP super-packets on the TUN device.
    pub tso: bool,
    /// UDP super-packets on the TUN device (Linux 6.2).
    pub uso: bool,
    /// Decrypted packets are merged into super-packets.
    pub tun_gro: bool,
    /// Datagrams arrive in batches.
    pub udp_gro: bool,
    /// Datagrams are sent in batches.
    pub udp_gso: bool,
    /// The kernel brings each datagram to the worker that owns its session, and those of no session
    /// to queues of their own.
    pub udp_steering: bool,
    /// With several workers: the kernel brings each packet to the worker that owns its peer.
    pub tun_steering: bool,
    /// Receive buffer of each socket for sessions in bytes, as the kernel counts it.
    pub receive_buffer: usize,
    /// Send buffer of each socket in bytes, as the kernel counts it.
    pub send_buffer: usize,
}

/// Somebody who must know which receiver indices are in use: a filter in front of the sockets.
///
/// Every index that a peer is told has its upper 24 bits from here, for as long as the peer stays;
/// the lower 8 count its sessions. So only changes of the peers are told, no handshake is.
pub trait IndexWatch: Send + std::fmt::Debug {
    /// These upper 24 bits will be in use from now on, and those no longer are. The first call
    /// tells all in use. No message with a new index leaves before this returns.
    fn changed(&mut self, new: &[u32], gone: &[u32]);
}

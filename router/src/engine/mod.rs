//! The packet engine: worker threads between the UDP sockets and the TUN queues.
//!
//! A worker runs to completion on epoll. It alone touches its sockets, its TUN queue, its buffers
//! and its peers, so no lock is taken on the way of a packet. [`Engine`] is the handle that the
//! rest of the daemon holds; it talks to the workers through their inboxes.

mod batch;
mod checksum;
mod coalesce;
mod control;
mod counters;
#[cfg(feature = "bench-delay")]
mod delay;
mod detours;
mod directory;
mod exchange;
mod forward;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod ip;
mod location;
mod outlet;
mod peer;
#[cfg(feature = "fuzz")]
pub mod pieces;
mod refusals;
mod routes;
mod segment;
mod steer;
mod tun;
mod udp;
mod udp_io;
mod vnet;
mod worker;

#[cfg(test)]
mod interop;
#[cfg(test)]
mod packets;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::SystemTime;

use ipnet::IpNet;

pub use control::Engine;
pub use counters::Counter;
pub use refusals::Refused;

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
    /// The kernel has refused to cut messages to it into datagrams (UDP GSO) within the last seconds:
    /// each is sent by itself.
    pub uncut: bool,
    /// The last packet for it that was dropped because nobody knows where it is.
    pub nowhere: Option<Nowhere>,
}

/// A packet for a peer that nobody knows the endpoint of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nowhere {
    /// The packet's destination.
    pub destination: IpAddr,
    /// When it was dropped.
    pub at: SystemTime,
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

/// The engine cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A name that no interface can have.
    #[error(
        "{0:?} cannot be the name of a network device: use 1 to 15 characters without '/', '%' and blanks"
    )]
    DeviceName(String),
    /// Another process, or a leftover, has the name.
    #[error(
        "a network device {0} exists already: another Sluice may be running, else choose another name or remove it with: ip link del {0}"
    )]
    DeviceExists(String),
    /// No TUN driver, or no right to use it.
    #[error(
        "open /dev/net/tun: {0}; the tun module must be loaded, and in a container the device must be passed in"
    )]
    TunOpen(#[source] io::Error),
    /// A descriptor that was passed in is no TUN device, or not of the right kind.
    #[error(
        "the descriptor passed in is no TUN device without packet information (IFF_TUN, IFF_NO_PI): {0}"
    )]
    TunPassed(#[source] io::Error),
    /// The device could not be set up.
    #[error("{what} the TUN device {device}: {source}")]
    Device {
        /// What was being done.
        what: &'static str,
        /// The device's name.
        device: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The UDP port could not be had.
    #[error("listen on UDP port {port}: {source}")]
    Bind {
        /// Port, host byte order.
        port: u16,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The firewall mark was refused.
    #[error("set the firewall mark of the underlay: {0}")]
    Mark(#[source] io::Error),
    /// A thread or a descriptor could not be had.
    #[error("start a worker: {0}")]
    Start(#[source] io::Error),
    /// The random source failed.
    #[error("read the system's random source: {0}")]
    Random(#[source] getrandom::Error),
    /// A peer that must not be.
    #[error("peer {0} has this router's own key")]
    OwnKey(PublicKey),
    /// A public key that makes no secret.
    #[error("peer {0}: this public key is of small order and protects nothing; ask for a new one")]
    LowOrderKey(PublicKey),
    /// The same key twice.
    #[error("peer {0} is there twice")]
    DoubledPeer(PublicKey),
    /// The same CIDR twice.
    #[error("{cidr} is an allowed IP of peer {first} and of peer {second}")]
    DoubledCidr {
        /// The CIDR.
        cidr: IpNet,
        /// One owner.
        first: PublicKey,
        /// The other.
        second: PublicKey,
    },
    /// A worker has ended; [`Engine::failed`] tells why.
    #[error("a worker of the packet engine has ended")]
    Worker,
}

impl Error {
    fn device(what: &'static str, device: &str, source: io::Error) -> Self {
        Self::Device {
            what,
            device: device.to_owned(),
            source,
        }
    }
}

/// Why a running engine stopped by itself.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Somebody deleted the device.
    #[error("the TUN device was deleted")]
    DeviceGone,
    /// The device cannot be read.
    #[error("read from the TUN device: {0}")]
    Read(#[source] io::Error),
    /// Waiting for events failed.
    #[error("wait for events: {0}")]
    Poll(#[source] io::Error),
    /// A worker panicked: a defect of the engine.
    #[error("a worker panicked; please report this")]
    Panic,
}

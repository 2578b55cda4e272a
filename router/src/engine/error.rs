//! What goes wrong in the engine.

use std::io;

use ipnet::IpNet;

use crate::wireguard::keys::PublicKey;

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
        "open /dev/net/tun: {0}; {mend}", mend = crate::container::tun_mend(.0)
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
    /// A worker has ended; [`failed`](crate::engine::Engine::failed) tells why.
    #[error("a worker of the packet engine has ended")]
    Worker,
}

impl Error {
    pub(crate) fn device(what: &'static str, device: &str, source: io::Error) -> Self {
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

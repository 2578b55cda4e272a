//! What a forwarder is given and where what it makes goes: the seam between it and a worker's I/O.

use std::net::{IpAddr, SocketAddr};

use crate::engine::counters::Counter;
use crate::engine::forward::batch::{Destination, Endpoint, UdpSink};
use crate::engine::offload::coalesce::TunSink;
use crate::engine::offload::vnet;
use crate::engine::path::RelayId;
use crate::wireguard::keys::PublicKey;

/// Where a buffer of datagrams came from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Origin {
    /// The sender.
    pub(crate) remote: SocketAddr,
    /// Our address that it was sent to.
    pub(crate) local: Option<IpAddr>,
    /// Index of the interface that it came in by; 0 if that is not known.
    pub(crate) interface: u32,
    /// ECN bits of the underlay packets.
    pub(crate) ecn: u8,
    /// It came through a peer relay there, behind a header with this number.
    pub(crate) number: Option<u32>,
    /// It came through a relay, from whom that says has this key. The address above is then none, but
    /// another one for each key.
    pub(crate) relay: Option<(RelayId, PublicKey)>,
}

impl Origin {
    /// From whom a relay says that it comes. The address that stands for the sender is one of its own for
    /// each key, for the limiter counts by address (an IPv6 network of 64 bits).
    pub(crate) fn relayed(relay: RelayId, key: PublicKey) -> Self {
        let address = key.0.first_chunk::<16>().copied().unwrap_or_default();
        Self {
            remote: SocketAddr::new(IpAddr::from(address), 0),
            local: None,
            interface: 0,
            ecn: 0,
            number: None,
            relay: Some((relay, key)),
        }
    }

    /// Where an answer goes.
    pub(crate) fn destination(&self) -> Destination {
        match self.relay {
            None => Destination::Udp(Endpoint {
                remote: self.remote,
                local: self.local,
                number: self.number,
            }),
            Some((relay, key)) => Destination::Relay(relay, key),
        }
    }
}

/// What one worker hands to another.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content {
    /// A packet from the TUN device.
    Packet(vnet::Header),
    /// Datagrams that arrived together, with the length of each but the last.
    Datagrams(Origin, usize),
    /// A packet that the daemon has made.
    Inside,
    /// A handshake initiation of this peer, which the limiter let pass.
    Initiation(Origin, PublicKey),
}

/// What a worker's I/O takes: packets for the TUN device, messages for the underlay, and what
/// belongs to other workers.
pub(crate) trait Port: TunSink + UdpSink {
    /// Takes a datagram that is no WireGuard message. Tells what is to be counted.
    fn other(&mut self, origin: &Origin, bytes: &[u8]) -> Counter;

    /// Whether somebody takes messages between nodes.
    fn takes_inside(&self) -> bool {
        false
    }

    /// Takes such a message, an IP packet. Tells what is to be counted.
    fn inside(&mut self, _packet: &[u8]) -> Counter {
        Counter::DropInside
    }

    /// Hands `bytes` to another worker. False when its queue is full.
    fn hand_over(&mut self, worker: usize, content: Content, bytes: &[u8]) -> bool;
}

/// Which worker of how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) worker: usize,
    pub(crate) workers: usize,
}

impl Place {
    /// The worker that a receiver index belongs to: the engine draws them so.
    pub(crate) fn owner(self, index: u32) -> usize {
        (index >> 8) as usize % self.workers
    }
}

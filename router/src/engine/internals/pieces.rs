//! Pieces of the packet path one at a time, for `benches/` to measure.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::engine::control::state::State;
use crate::engine::forward::routes::Routes;
use crate::engine::io::udp::Bind;
use crate::engine::offload::coalesce::{Coalescer, Offload, TunSink};
use crate::engine::offload::segment::{SLACK, Segments};
use crate::engine::offload::vnet::{self, Header};
use crate::engine::types::{PeerChange, PeerSpec};
use crate::wireguard::Packets as _;
use crate::wireguard::keys::PublicKey;

/// Merges the segments of a flow into what is written to the TUN device.
pub struct Merger(Coalescer);

struct Written<F>(F);

impl<F: FnMut(&[u8])> TunSink for Written<F> {
    fn write(&mut self, frame: &[u8]) {
        self.0(frame);
    }
}

impl Default for Merger {
    fn default() -> Self {
        Self(Coalescer::new(Offload {
            vnet: true,
            tcp: true,
            udp: true,
        }))
    }
}

impl Merger {
    /// Merges `packets`, which arrived together, and hands each frame (virtio header and packet) to
    /// `write`.
    pub fn merge(&mut self, packets: &[Vec<u8>], write: impl FnMut(&[u8])) {
        let mut sink = Written(write);
        for packet in packets {
            self.0.slot()[..packet.len()].copy_from_slice(packet);
            if !self.0.push(packet.len(), &mut sink) {
                self.0.pass(packet.len(), &mut sink);
            }
        }
        self.0.flush_all(&mut sink);
    }
}

/// A frame as the TUN device gives it, with the room behind it that cutting needs.
pub fn with_slack(frame: &[u8]) -> Vec<u8> {
    [frame, &[0; SLACK]].concat()
}

/// Cuts a frame of [`with_slack`] into packets with complete checksums, in place, and yields how
/// many there are; `None` if it is no frame.
pub fn cut(frame: &mut [u8], mtu: usize) -> Option<usize> {
    let (head, packet) = frame.split_first_chunk_mut::<{ vnet::LEN }>()?;
    let header = Header::decode(head)?;
    let length = packet.len().checked_sub(SLACK)?;
    let mut segments = Segments::new(header, packet, length, mtu).ok()?;
    let mut count = 0;
    while segments.next().is_some() {
        count += 1;
    }
    Some(count)
}

/// The table of allowed IPs.
pub struct AllowedIps(Routes);

impl AllowedIps {
    /// A table of these prefixes and their owners.
    pub fn new(entries: impl IntoIterator<Item = (IpNet, u32)>) -> Self {
        Self(Routes::new(entries))
    }

    /// The owner of `address`.
    pub fn get(&self, address: IpAddr) -> Option<u32> {
        self.0.get(address)
    }
}

/// The peers of an engine: what a change of them costs before the workers get it.
pub struct PeerTable(State);

impl PeerTable {
    /// A table of these peers.
    pub fn new(peers: &[PeerSpec]) -> Self {
        let bind = Bind {
            port: 0,
            mark: 0,
            workers: 2,
            gro: false,
            others: false,
        };
        let mut state = State::new(bind, PublicKey([9; 32]), None);
        state.change(peers, &[]);
        Self(state)
    }

    /// Changes it; yields how many peers the workers are told of.
    pub fn change(&mut self, change: &PeerChange) -> usize {
        let outcome = self.0.change(&change.set, &change.remove);
        let told = outcome.changes.iter();
        told.map(|change| change.add.len() + change.remove.len())
            .sum()
    }
}

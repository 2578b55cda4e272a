//! What goes through the internet beside paths' own messages: packets of the tunnel, and what somebody forges.

use std::net::SocketAddr;
use std::time::Instant;

use super::super::parts::stun_response;
use super::{FORGER, Internet, Node, PORT};
use crate::engine::{Path, RelayId};
use crate::tailnet::disco::Message;
use crate::tailnet::keys::NodePublic;
use crate::tailnet::relay::{Header, Inner};
use crate::tailnet::stun;

/// Stands for a packet of the tunnel.
const PACKET: &[u8] = &[4, 0, 0, 0];

impl Node {
    /// Counts a packet of the tunnel, if it is one; later copies count no more.
    pub(super) fn takes(&mut self, bytes: &[u8], now: Instant) -> bool {
        let inner = match Header::parse(bytes) {
            Some((header, rest)) if header.inner == Inner::WireGuard => rest,
            _ => bytes,
        };
        let Some(number) = inner.strip_prefix(PACKET) else {
            return false;
        };
        let number = u64::from_be_bytes(number.try_into().unwrap());
        let (last, at) = self.last.unwrap_or((0, now));
        if number > last {
            self.arrived += 1;
            self.gap = self.gap.max(now.saturating_duration_since(at));
            self.last = Some((number, now));
        }
        true
    }
}

impl Internet {
    /// The engine has a packet for the peer.
    pub(super) fn packet(&mut self, at: usize) {
        let key = self.nodes[1 - at].key;
        let told = self.nodes[at].told;
        let due = told.is_none_or(|told| self.now.saturating_duration_since(told).as_secs() >= 5);
        if due {
            self.nodes[at].told = Some(self.now);
            self.nodes[at].paths.handle_active(&key, self.now);
            self.drain(at);
        }
        self.nodes[at].sent += 1;
        let packet = [PACKET, &self.nodes[at].sent.to_be_bytes()].concat();
        let Some(ways) = self.nodes[at].ways else {
            return;
        };
        for path in [Some(ways.path), ways.also].into_iter().flatten() {
            match path {
                Path::Udp(to) => self.send(at, to, packet.clone()),
                Path::PeerRelay(to, number) => {
                    let inner = Inner::WireGuard;
                    let header = Header {
                        inner,
                        ..Header::to_peer(number)
                    };
                    self.send(at, to, [&header.bytes()[..], &packet].concat());
                }
                Path::Relay(RelayId(region)) => self.relay(at, region, key, packet.clone()),
            }
        }
    }

    /// Somebody sends what he has seen and what he makes up.
    pub(super) fn forge(&mut self) {
        let at = self.dice.below(2) as usize;
        let node = &self.nodes[at];
        let to = match node.nat {
            None => SocketAddr::new(node.v4, PORT),
            // As one who has found an open port.
            Some(_) => SocketAddr::new(node.v4, PORT),
        };
        if node.blocked {
            return;
        }
        let mut forged = Vec::new();
        if !self.seen.is_empty() {
            let which = self.dice.below(self.seen.len() as u64) as usize;
            let mut bytes = self.seen[which].clone();
            forged.push(bytes.clone());
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            forged.push(bytes);
        }
        let call = Message::CallMeMaybe(vec![FORGER]);
        let receiver = self.nodes[at].disco;
        forged.extend(self.stranger.seal(&receiver, &call, [1; 24]));
        forged.push(stun_response(&stun::request(&[9; 12]), FORGER));
        let wrapped = forged
            .iter()
            .map(|bytes| [&Header::to_peer(3).bytes()[..], bytes].concat());
        let wrapped: Vec<_> = wrapped.collect();
        for bytes in forged.into_iter().chain(wrapped) {
            let paths = &mut self.nodes[at].paths;
            paths.handle_datagram(FORGER, Some(to.ip()), &bytes, self.now);
            let key = NodePublic::from_bytes([7; 32]);
            paths.handle_relayed(1, key, &bytes, self.now);
        }
    }
}

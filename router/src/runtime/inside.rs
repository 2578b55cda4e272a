//! What passes between the nodes of a tailnet inside the tunnel: answers to our pings, what peers tell, and what they
//! are told.

use std::future::pending;
use std::time::Instant;

use router_ebpf::abi::Side;
use router_ebpf::packet::{ACK, SYN, TCP};
use router_ebpf::verdict::Verdict;

use super::Daemon;
use super::tailnet::Tailnet;
use crate::datapath::ebpf::DeniedPacket;
use crate::tailnet::inside::Told;
use crate::tailnet::tsmp;

/// The next message. Cancel safe.
pub(super) async fn next(tailnet: &mut Option<Tailnet>) -> Box<[u8]> {
    match tailnet {
        Some(tailnet) => match tailnet.messages.recv().await {
            Some(message) => message,
            // The workers have ended, which the daemon hears otherwise.
            None => pending().await,
        },
        None => pending().await,
    }
}

impl Daemon {
    /// Takes a message of a peer.
    pub(super) fn hear_inside(&self, packet: &[u8]) {
        let Some(tailnet) = &self.tailnet else {
            return;
        };
        match tailnet.inside.handle(packet, Instant::now()) {
            Some(Told::DiscoKey { from, key }) => tailnet.node.learn_disco(from, key),
            Some(Told::Rejected { from, message }) => {
                tracing::debug!(%from, ?message, "a peer refuses a flow");
            }
            None => {}
        }
    }

    /// Tells the peers of a tailnet which flows the policy has refused (of those that the programs tell of, which are
    /// bounded): their users see why nothing comes.
    pub(super) fn tell_refused(&self, packets: &[DeniedPacket]) {
        if self.tailnet.is_none() {
            return;
        }
        let peers = &self.sources.state().peers;
        for packet in packets.iter().filter(|packet| begins_refused(packet)) {
            // One of the file's is no node, and would not understand.
            let is_node = |peer: &crate::control::Peer| !peer.roaming;
            if peers.at(packet.source.ip()).is_some_and(is_node)
                && let Some(notice) = tsmp::rejection(packet.source, packet.destination, TCP)
            {
                self.machine.engine.send_inside(&notice);
            }
        }
    }
}

/// Whether a peer has begun a TCP connection that no rule allows.
fn begins_refused(packet: &DeniedPacket) -> bool {
    packet.side == Side::Overlay
        && matches!(packet.verdict, Verdict::DropPolicy | Verdict::RejectPolicy)
        && packet.protocol == TCP
        && packet.tcp_flags & (SYN | ACK) == SYN
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn only_the_beginning_of_a_connection_of_a_peer_is_refused_to_it() {
        let packet = DeniedPacket {
            at: SystemTime::UNIX_EPOCH,
            side: Side::Overlay,
            verdict: Verdict::DropPolicy,
            protocol: TCP,
            source: ([100, 64, 0, 2], 40_000).into(),
            destination: ([10, 0, 0, 1], 22).into(),
            len: 60,
            tcp_flags: SYN,
        };
        assert!(begins_refused(&packet));
        for other in [
            DeniedPacket {
                side: Side::Subnet,
                ..packet
            },
            DeniedPacket {
                verdict: Verdict::DropSpoofed,
                ..packet
            },
            DeniedPacket {
                tcp_flags: SYN | ACK,
                ..packet
            },
            DeniedPacket {
                protocol: 17,
                tcp_flags: 0,
                ..packet
            },
        ] {
            assert!(!begins_refused(&other), "{other:?}");
        }
    }
}

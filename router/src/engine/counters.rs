//! The engine's counters: one list that gives label, text and place.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($name:ident = $label:literal, $text:literal;)*) => {
        /// One counter of the engine.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub enum Counter {
            $(#[doc = $text] $name,)*
        }

        impl Counter {
            /// Every counter.
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            /// Metric label.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)* }
            }

            /// What it counts, for a person.
            pub const fn text(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

counters! {
    UdpReceives = "udp_receives", "buffers received from the underlay (each holds one or more datagrams)";
    RxDatagrams = "rx_datagrams", "datagrams received from the underlay";
    RxPackets = "rx_packets", "packets decrypted and accepted";
    TunWrites = "tun_writes", "packets and super-packets written to the TUN device";
    TunRefused = "tun_refused", "super-packets that the TUN device refused, written packet by packet instead";
    TunReads = "tun_reads", "packets and super-packets read from the TUN device";
    TxDatagrams = "tx_datagrams", "datagrams handed to the underlay";
    UdpSends = "udp_sends", "messages handed to the underlay (each holds one or more datagrams)";
    HandshakesReceived = "handshakes_received", "handshake messages that passed the limiter";
    HandshakesCompleted = "handshakes_completed", "handshakes completed";
    CookiesSent = "cookies_sent", "cookie replies sent because of load";
    Roamed = "roamed", "times a peer was heard from a new endpoint";
    HandedOver = "handed_over", "packets handed to the worker that owns their peer";
    RxRelayed = "rx_relayed", "datagrams that came through a relay";
    TxRelayed = "tx_relayed", "datagrams handed to relays";
    DropRelay = "drop_relay", "datagram that goes through a relay, and nobody takes it there as fast as they come";
    RxOther = "rx_other", "datagrams that are no WireGuard message, for those who asked for such";
    DropOther = "drop_other", "datagram is no WireGuard message: nobody asked for such, or it was more than the worker had time for";
    DropOtherFull = "drop_other_full", "datagram is no WireGuard message: more than those who asked took";
    DropIndex = "drop_index", "datagram names a session that does not exist";
    DropMac = "drop_mac", "handshake message with a wrong mac1";
    DropLimited = "drop_limited", "handshake message beyond the source's rate, under load";
    DropUnknownPeer = "drop_unknown_peer", "handshake initiation of a key that is no peer";
    DropHandshake = "drop_handshake", "handshake message refused: replayed, forged or late";
    DropAuth = "drop_auth", "data message that does not decrypt";
    DropReplay = "drop_replay", "data message seen before or too old";
    DropExpired = "drop_expired", "data message of an expired session";
    RxInside = "rx_inside", "messages between the nodes of a tailnet that came inside the tunnel";
    DropInside = "drop_inside", "message between the nodes of a tailnet: more than were taken, or by a host behind the router";
    DropVia = "drop_via", "4via6 packet that has no form in the other IP version, or is too large for the tunnel";
    DropInner = "drop_inner", "decrypted packet is no IP packet";
    DropSource = "drop_source", "inner source is not an allowed IP of the peer (spoofed)";
    DropCongestion = "drop_congestion", "congestion mark on a packet that cannot carry it (RFC 6040)";
    DropTunWrite = "drop_tun_write", "TUN device refused a packet";
    DropTunRead = "drop_tun_read", "packet from the TUN device that cannot be segmented";
    DropNoPeer = "drop_no_peer", "destination is no peer's allowed IP";
    DropNoEndpoint = "drop_no_endpoint", "peer's endpoint is unknown";
    DropStaged = "drop_staged", "too many packets wait for the peer's handshake, or it never came";
    DropReceiveFull = "drop_receive_full", "datagram of a session: the worker is too slow, its UDP socket full";
    DropStrangerFull = "drop_stranger_full", "handshake initiation: more than the worker had time for";
    DropSendFull = "drop_send_full", "UDP socket full";
    DropSendError = "drop_send_error", "underlay refused a datagram";
    DropHandOver = "drop_hand_over", "the owning worker's queue was full";
}

/// Counters of one worker. Only that worker adds; anyone may read. What the kernel dropped is asked of
/// the sockets instead ([`crate::engine::io::udp::Overflows`]).
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Counters([AtomicU64; Counter::ALL.len()]);

impl Counters {
    /// All zero.
    pub(super) fn new() -> Self {
        Self([const { AtomicU64::new(0) }; Counter::ALL.len()])
    }

    /// Adds `n`. A load and a store, since there is one writer.
    pub(super) fn add(&self, counter: Counter, n: u64) {
        let cell = &self.0[counter as usize];
        cell.store(
            cell.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    /// Reads one.
    pub(super) fn get(&self, counter: Counter) -> u64 {
        self.0[counter as usize].load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn labels_are_unique_and_fit_prometheus() {
        let labels: BTreeSet<_> = Counter::ALL.iter().map(|c| c.label()).collect();
        assert_eq!(labels.len(), Counter::ALL.len());
        for label in labels {
            assert!(
                label.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'),
                "{label}"
            );
        }
    }
}

//! What wg(8) sees of the router. It may look, and change nothing: peers and keys come from the
//! configuration, with routes and rules that must fit them, and what `wg set` changed would be
//! undone by the next reload.

use super::Daemon;
use crate::netlink::FWMARK;
use crate::uapi::{Errno, PeerState, Question, Refusal, State};

impl Daemon {
    /// Answers a client, which may have gone meanwhile.
    pub(super) fn answer(&self, question: Question) {
        match question {
            Question::Get(answer) => {
                let _ = answer.send(self.wireguard_state());
            }
            Question::Set(_, answer) => {
                let reason = "this device is configured by Sluice's file; change that, and it is \
                              read again";
                let _ = answer.send(Err(Refusal {
                    errno: Errno::Permission,
                    reason: reason.to_owned(),
                }));
            }
        }
    }

    fn wireguard_state(&self) -> State {
        let stats = self.stats_by_peer();
        let peers = self.snapshot.peers.iter().map(|peer| {
            let stats = stats.get(&peer.public_key);
            PeerState {
                public_key: peer.public_key,
                preshared_key: peer.preshared_key.clone(),
                endpoint: stats.and_then(|stats| stats.endpoint),
                last_handshake: stats.and_then(|stats| stats.last_handshake),
                tx_bytes: stats.map_or(0, |stats| stats.tx_bytes),
                rx_bytes: stats.map_or(0, |stats| stats.rx_bytes),
                keepalive: peer.keepalive.unwrap_or(0),
                allowed_ips: peer.allowed_ips.clone(),
            }
        });
        State {
            private_key: Some(self.local.private_key.clone()),
            listen_port: self.engine.listen_port(),
            fwmark: FWMARK,
            peers: peers.collect(),
        }
    }
}

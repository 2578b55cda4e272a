//! Denied packets: logged, and the last ones kept for `sluice denied`.

use std::collections::{HashMap, VecDeque};
use std::future::pending;
use std::io;
use std::net::IpAddr;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::api::{DeniedList, Question};
use crate::control::Peers;
use crate::datapath::ebpf::{DeniedPacket, DeniedPackets, Ebpf};

/// Packets that are kept.
const KEPT: usize = 512;

/// The last denied packets.
#[derive(Debug)]
pub(super) struct DeniedLog {
    packets: AsyncFd<DeniedPackets>,
    /// The latest last.
    recent: VecDeque<DeniedPacket>,
}

impl DeniedLog {
    /// Follows what the programs tell. Without, the router routes as well.
    pub(super) fn of(ebpf: Option<&mut Ebpf>) -> Option<Self> {
        let packets = ebpf?.take_denied()?;
        // SAFETY: the map's descriptor is open as long as what owns it, and is never another one.
        let packets = unsafe { AsyncFd::register_with_interest(packets, Interest::READABLE) };
        let packets = packets
            .inspect_err(|error| tracing::warn!(%error, "denied packets are not listed"))
            .ok()?;
        Some(Self {
            packets,
            recent: VecDeque::new(),
        })
    }

    /// Waits for packets, logs and keeps them. Cancel safe.
    async fn follow(&mut self) -> io::Result<Vec<DeniedPacket>> {
        let mut ready = self.packets.readable_mut().await?;
        // Before reading: what comes meanwhile makes it ready anew.
        ready.clear_ready();
        let packets = ready.get_inner_mut().read()?;
        for packet in &packets {
            tracing::debug!(
                target: "denied",
                source = %packet.source,
                destination = %packet.destination,
                protocol = packet.protocol,
                bytes = packet.len,
                "{}", packet.verdict.label(),
            );
            if self.recent.len() == KEPT {
                self.recent.pop_front();
            }
            self.recent.push_back(*packet);
        }
        Ok(packets)
    }

    /// The packets that `question` is for; `peers` tells whose they are.
    pub(super) fn answer(&self, question: &Question, peers: &Peers) -> DeniedList {
        let mut known = HashMap::new();
        question.pick(self.recent.iter().rev(), |packet| {
            let overlay = packet.overlay().ip();
            let peer = known.entry(overlay).or_insert_with(|| peer(peers, overlay));
            peer.clone()
        })
    }
}

/// Whose `address` is.
fn peer(peers: &Peers, address: IpAddr) -> Option<String> {
    let peer = peers.at(address)?;
    let key = || peer.public_key.to_string();
    Some(peer.name.clone().unwrap_or_else(key))
}

/// Follows `log`, and ends it when it fails. Yields what has come. Cancel safe.
pub(super) async fn follow(log: &mut Option<DeniedLog>) -> Vec<DeniedPacket> {
    let Some(followed) = log else {
        return pending().await;
    };
    followed.follow().await.unwrap_or_else(|error| {
        tracing::warn!(%error, "denied packets are not listed any more");
        *log = None;
        Vec::new()
    })
}

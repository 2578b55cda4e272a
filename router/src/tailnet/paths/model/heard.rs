//! What comes from outside: datagrams of anybody, of which little is believed.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::{Paths, Way};
use crate::engine::Path;
use crate::tailnet::disco::{self, Message, Transaction};
use crate::tailnet::keys::{DiscoPublic, NodePublic};
use crate::tailnet::relay::{Header, Inner};
use crate::tailnet::stun;

/// A peer's calls are heeded no more often.
const HEED: Duration = Duration::from_secs(1);

/// How a message came.
#[derive(Clone, Copy, Debug)]
enum Via {
    /// From an address to one of ours.
    Udp(SocketAddr, Option<IpAddr>),
    /// From a peer relay at an address, behind a header with this number.
    PeerRelay(SocketAddr, u32),
    /// Through the relay of a region, by its word from this node.
    Relay(u32, NodePublic),
}

impl Paths {
    /// Takes a datagram of the listen port that is no WireGuard message.
    pub(in super::super) fn handle_datagram(
        &mut self,
        source: SocketAddr,
        local: Option<IpAddr>,
        bytes: &[u8],
        received: Instant,
    ) {
        if let Some((transaction, mapped)) = stun::response(bytes) {
            self.rounds.handle_response(&transaction, mapped, received);
            self.go_on_with_round(received);
            return;
        }
        let source = SocketAddr::new(source.ip().to_canonical(), source.port());
        match Header::parse(bytes) {
            Some((header, sealed)) if header.inner == Inner::Disco => {
                let via = Via::PeerRelay(source, header.number);
                match header.control {
                    true => self.challenged(source, header.number, sealed, received),
                    false => self.handle_disco(sealed, via, received),
                }
            }
            _ => self.handle_disco(bytes, Via::Udp(source, local), received),
        }
    }

    /// Takes a datagram of disco that a relay has brought, by its word from `from`.
    pub(in super::super) fn handle_relayed(
        &mut self,
        region: u32,
        from: NodePublic,
        bytes: &[u8],
        now: Instant,
    ) {
        self.handle_disco(bytes, Via::Relay(region, from), now);
    }

    fn handle_disco(&mut self, bytes: &[u8], via: Via, now: Instant) {
        // Before anything is computed: strangers must cost nothing.
        let Some(sender) = disco::sender(bytes).filter(|key| self.by_disco.contains_key(key))
        else {
            return;
        };
        let Some(own) = &mut self.own else {
            return;
        };
        let Some(clear) = own.boxes.open_clear(&sender, bytes) else {
            return;
        };
        if let Via::Relay(region, from) = via
            && let Some(peer) = self.peers.get_mut(&from)
            && peer.spec.disco == Some(sender)
        {
            let is_new = peer.heard_through.replace(region) != Some(region);
            peer.absent = peer.absent.filter(|(absent, _)| *absent != region);
            if is_new {
                self.settle(&from, now);
            }
        }
        let Some(message) = Message::parse(&clear) else {
            if let Via::Relay(_, from) = via {
                self.told_of_relay(sender, from, &clear, now);
            }
            return;
        };
        match message {
            Message::Ping {
                transaction, node, ..
            } => self.pinged(sender, transaction, node, via, now),
            Message::Pong { transaction, .. } => {
                if !self.ponged(sender, &transaction, via, now)
                    && let Via::PeerRelay(source, number) = via
                {
                    self.relay_answers(sender, source, number, &transaction, now);
                }
            }
            Message::CallMeMaybe(endpoints) => self.called(sender, &endpoints, via, now),
        }
    }

    /// Which node a ping is of: several can share a disco key.
    fn pinger(
        &self,
        sender: DiscoPublic,
        node: Option<NodePublic>,
        via: Via,
    ) -> Option<NodePublic> {
        let has = |key: &NodePublic| {
            let peer = self.peers.get(key);
            peer.is_some_and(|peer| peer.spec.disco == Some(sender))
        };
        if let Via::Relay(_, from) = via {
            return Some(from).filter(has);
        }
        if let Some(node) = node.filter(has) {
            return Some(node);
        }
        match self.by_disco.get(&sender)?.as_slice() {
            [only] => Some(*only),
            _ => None,
        }
    }

    fn pinged(
        &mut self,
        sender: DiscoPublic,
        transaction: Transaction,
        node: Option<NodePublic>,
        via: Via,
        now: Instant,
    ) {
        let key = self.pinger(sender, node, via);
        let (to, source) = match via {
            Via::Udp(source, local) => (Way::Udp(source, local), source),
            Via::PeerRelay(at, number) => (Way::PeerRelay(at, Header::to_peer(number)), at),
            // What Tailscale's nodes say of a relay: no address, and the region as the port.
            Via::Relay(region, from) => {
                let port = u16::try_from(region).unwrap_or(0);
                let source = SocketAddr::from(([127, 3, 3, 40], port));
                (Way::Relay(region, from), source)
            }
        };
        let mut unknown = None;
        if let Some(peer) = key.and_then(|key| self.peers.get_mut(&key)) {
            peer.last_disco = Some(now);
            let trusted = peer.is_trusted(now);
            if let Via::Udp(source, _) = via
                && let Some((candidate, new)) = peer.candidate_or_new(source)
            {
                let before = candidate.pinged_us.replace((now, transaction));
                if before.is_some_and(|(_, last)| last == transaction) {
                    return;
                }
                let asks = candidate.may_be_pinged(now) && (new || !trusted);
                let named = candidate.listed || candidate.called;
                unknown = (asks && (named || peer.strange.take(now))).then_some(source);
            }
        } else if matches!(via, Via::Relay(..)) {
            return;
        }
        let pong = Message::Pong {
            transaction,
            source,
        };
        self.send(to, &sender, &pong);
        if let (Some(key), Some(source)) = (key, unknown) {
            self.ping(&key, Path::Udp(source), None, now);
        }
        if let Via::PeerRelay(source, number) = via {
            self.peer_is_bound(sender, source, number, now);
        }
    }

    /// Takes a pong; false if it answers none of our pings to peers.
    fn ponged(
        &mut self,
        sender: DiscoPublic,
        transaction: &Transaction,
        via: Via,
        now: Instant,
    ) -> bool {
        let same_way = |to: Path| {
            matches!(
                (to, via),
                (Path::Udp(_), Via::Udp(..))
                    | (Path::PeerRelay(..), Via::PeerRelay(..))
                    | (Path::Relay(_), Via::Relay(..))
            )
        };
        let sent = self.pings.get(transaction);
        if sent.is_none_or(|sent| sent.disco != sender || !same_way(sent.to)) {
            return false;
        }
        let Some(sent) = self.pings.take(transaction) else {
            return false;
        };
        let Some(peer) = self.peers.get_mut(&sent.peer) else {
            return true;
        };
        if peer.spec.disco != Some(sender) {
            return true;
        }
        let latency = now.saturating_duration_since(sent.at);
        peer.last_disco = Some(now);
        match sent.to {
            // That we could send there counts, wherever the answer comes from.
            Path::Udp(address) => peer.answered(address, latency, now),
            Path::PeerRelay(..) => peer.answered_by_relay(sent.to, latency, now),
            Path::Relay(_) => peer.relay_latency = Some(latency),
        }
        self.answered(&sent, latency);
        self.settle(&sent.peer, now);
        true
    }

    fn called(&mut self, sender: DiscoPublic, endpoints: &[SocketAddr], via: Via, now: Instant) {
        // By UDP anybody could have an old one repeated.
        let Via::Relay(_, from) = via else {
            return;
        };
        let Some(peer) = self.peers.get_mut(&from) else {
            return;
        };
        if peer.spec.disco != Some(sender) {
            return;
        }
        peer.last_disco = Some(now);
        // Several that a relay has kept come together, and the last one is right.
        peer.call(endpoints);
        let heeded = peer.heeded.map(|at| now.saturating_duration_since(at));
        if heeded.is_some_and(|since| since < HEED) {
            return;
        }
        peer.heeded = Some(now);
        for candidate in &mut peer.candidates {
            candidate.pinged = None;
        }
        // It has pinged, so its NAT is open for the moment.
        self.search(&from, false, now);
        self.settle(&from, now);
    }
}

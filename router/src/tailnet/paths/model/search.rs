//! Pings and calls: asking where a peer is.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::{Event, FRESH, Paths, Transmit, Way, lost};
use crate::engine::{Path, RelayId};
use crate::tailnet::disco::{Message, Transaction};
use crate::tailnet::keys::{DiscoPublic, NodePublic};
use crate::tailnet::paths::peer::{PING_AGAIN, Peer, UPGRADE};
use crate::tailnet::paths::{PingError, Pong};
use crate::tailnet::relay::Header;

/// A ping that was not answered within this time will not be.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pings under way, all peers together.
const MOST: usize = 65_536;

/// A ping under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sent {
    pub(super) peer: NodePublic,
    pub(super) disco: DiscoPublic,
    pub(super) to: Path,
    pub(super) at: Instant,
    /// Somebody waits for it, by this number.
    pub(super) asked: Option<u64>,
}

/// All pings under way.
#[derive(Debug, Default)]
pub(super) struct Pings {
    sent: HashMap<Transaction, Sent>,
    /// All have the same patience, so the oldest is first.
    timeouts: VecDeque<(Instant, Transaction)>,
    /// Who waits for an answer, and until when.
    asked: HashMap<u64, NodePublic>,
    asked_until: VecDeque<(Instant, u64)>,
}

impl Pings {
    pub(super) fn clear(&mut self) {
        self.sent.clear();
        self.timeouts.clear();
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let pings = self.timeouts.front().map(|(at, _)| *at);
        let asked = self.asked_until.front().map(|(at, _)| *at);
        [pings, asked].into_iter().flatten().min()
    }

    pub(super) fn get(&self, transaction: &Transaction) -> Option<&Sent> {
        self.sent.get(transaction)
    }

    pub(super) fn take(&mut self, transaction: &Transaction) -> Option<Sent> {
        self.sent.remove(transaction)
    }
}

impl Paths {
    /// Seals a message for a peer and has it sent.
    pub(super) fn send(&mut self, to: Way, disco: &DiscoPublic, message: &Message) -> bool {
        self.send_clear(to, disco, &message.clear())
    }

    /// The same for a message of any kind.
    pub(super) fn send_clear(&mut self, to: Way, disco: &DiscoPublic, clear: &[u8]) -> bool {
        let mut nonce = [0; 24];
        if !(self.random)(&mut nonce) {
            return false;
        }
        let Some(own) = &mut self.own else {
            return false;
        };
        let Some(bytes) = own.boxes.seal_clear(disco, clear, nonce) else {
            return false;
        };
        self.transmits.push_back(Transmit { to, bytes });
        true
    }

    /// Pings a peer by `to`, if the budgets allow.
    pub(super) fn ping(
        &mut self,
        key: &NodePublic,
        to: Path,
        asked: Option<u64>,
        now: Instant,
    ) -> bool {
        let Some(peer) = self.peers.get_mut(key) else {
            return false;
        };
        peer.budget.take(now) && self.budget.take(now) && self.beat(key, to, asked, now)
    }

    /// The same of no budget, for the path that is used: there is one each few seconds, and a peer whose heartbeat fails
    /// is searched for, which costs more.
    pub(super) fn beat(
        &mut self,
        key: &NodePublic,
        to: Path,
        asked: Option<u64>,
        now: Instant,
    ) -> bool {
        let (Some(own), Some(peer)) = (&self.own, self.peers.get(key)) else {
            return false;
        };
        let (Some(disco), node) = (peer.spec.disco, own.node) else {
            return false;
        };
        if self.pings.sent.len() >= MOST {
            return false;
        }
        let mut transaction = [0; 12];
        if !(self.random)(&mut transaction) {
            return false;
        }
        let ping = Message::Ping {
            transaction,
            node: Some(node),
            padding: 0,
        };
        let way = match to {
            Path::Udp(address) => Way::Udp(address, None),
            Path::PeerRelay(at, number) => Way::PeerRelay(at, Header::to_peer(number)),
            Path::Relay(RelayId(region)) => Way::Relay(region, *key),
        };
        if !self.send(way, &disco, &ping) {
            return false;
        }
        let sent = Sent {
            peer: *key,
            disco,
            to,
            at: now,
            asked,
        };
        self.pings.sent.insert(transaction, sent);
        self.pings.timeouts.push_back((now + PATIENCE, transaction));
        let peer = self.peers.get_mut(key);
        if let (Path::Udp(address), Some(peer)) = (to, peer)
            && let Some(candidate) = peer.candidate(address)
        {
            candidate.pinged = Some(now);
        }
        true
    }

    /// Asks all candidates that were not asked just now, and with `call` has the peer do the same.
    pub(super) fn search(&mut self, key: &NodePublic, call: bool, now: Instant) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        if peer.spec.disco.is_none() || peer.spec.wireguard_only {
            return;
        }
        peer.prune(now);
        if peer.searched.is_some() && !peer.is_direct(now) {
            // One that never answers is asked less and less often.
            peer.patience = (peer.patience * 2).min(UPGRADE);
        }
        peer.searched = Some(now);
        let wanted = peer.candidates.iter().filter(|c| c.may_be_pinged(now));
        let addresses: Vec<_> = wanted.map(|candidate| candidate.address).collect();
        for address in addresses {
            self.ping(key, Path::Udp(address), None, now);
        }
        if call {
            self.call(key, now);
        }
    }

    /// Asks a peer, through a relay, to ping this node: what both send opens the NATs of both.
    pub(super) fn call(&mut self, key: &NodePublic, now: Instant) {
        let lost = lost(&self.regions, &self.down);
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        let recently = |at: Instant| now.saturating_duration_since(at) < PING_AGAIN;
        let relay = peer.relay(lost, now);
        let (Some(disco), Some((region, _))) = (peer.spec.disco, relay) else {
            return;
        };
        if peer.called.is_some_and(recently) {
            return;
        }
        let is_fresh = self.rounds.age(now).is_some_and(|age| age < FRESH);
        if !is_fresh && self.own.is_some() && self.rounds.has_servers() {
            self.to_call.insert(*key);
            self.rounds.start(false, now);
            self.go_on_with_round(now);
            return;
        }
        peer.called = Some(now);
        let endpoints = self.endpoints.iter().map(|(address, _)| *address);
        let call = Message::CallMeMaybe(endpoints.collect());
        self.send(Way::Relay(region, *key), &disco, &call);
    }

    /// A ping for somebody, with a number of theirs: by the way that is used, or by all.
    pub(in super::super) fn handle_ping(&mut self, id: u64, key: &NodePublic, now: Instant) {
        let refuse = |this: &mut Self, error| this.events.push_back(Event::Ponged(id, Err(error)));
        let Some(peer) = self.peers.get(key) else {
            return refuse(self, PingError::Unknown);
        };
        if self.own.is_none() {
            let why = "this node has not joined the tailnet".to_owned();
            return refuse(self, PingError::Nowhere(why));
        }
        if peer.spec.disco.is_none() || peer.spec.wireguard_only {
            return refuse(self, PingError::NoDisco);
        }
        self.handle_active(key, now);
        let Some(peer) = self.peers.get(key) else {
            return;
        };
        let lost = lost(&self.regions, &self.down);
        let relay = peer.relay(lost, now);
        let best = peer.best.filter(|_| peer.is_trusted(now));
        let candidates = peer.candidates.iter().map(|c| Path::Udp(c.address));
        let all: Vec<_> = match best {
            Some(best) if best.address().is_some() => vec![best.path],
            best => best
                .map(|best| best.path)
                .into_iter()
                .chain(candidates)
                .collect(),
        };
        let mut sent = false;
        for path in all {
            sent |= self.ping(key, path, Some(id), now);
        }
        if let Some((region, _)) = relay.filter(|_| best.is_none()) {
            sent |= self.ping(key, Path::Relay(RelayId(region)), Some(id), now);
        }
        if !sent {
            let why = "neither an address nor a relay of the peer is known".to_owned();
            return refuse(self, PingError::Nowhere(why));
        }
        self.pings.asked.insert(id, *key);
        self.pings.asked_until.push_back((now + PATIENCE, id));
    }

    /// An answer for whoever has asked for it.
    pub(super) fn answered(&mut self, sent: &Sent, latency: Duration) {
        if let Some(id) = sent.asked
            && self.pings.asked.remove(&id).is_some()
        {
            let region = match sent.to {
                Path::Relay(RelayId(region)) => Some(self.code(region)),
                Path::Udp(_) | Path::PeerRelay(..) => None,
            };
            let pong = Pong {
                path: sent.to,
                region,
                latency,
            };
            self.events.push_back(Event::Ponged(id, Ok(pong)));
        }
    }

    /// Gives up pings that were not answered.
    pub(super) fn expire_pings(&mut self, now: Instant) {
        while let Some((at, transaction)) = self.pings.timeouts.front().copied()
            && at <= now
        {
            self.pings.timeouts.pop_front();
            if let Some(sent) = self.pings.sent.remove(&transaction) {
                self.unanswered(&sent, now);
            }
        }
        while let Some((at, id)) = self.pings.asked_until.front().copied()
            && at <= now
        {
            self.pings.asked_until.pop_front();
            if let Some(key) = self.pings.asked.remove(&id) {
                let peer = self.peers.get(&key);
                let tried = peer.map(|peer| self.tried(peer)).unwrap_or_default();
                let after = PATIENCE;
                let silent = PingError::Silent { after, tried };
                self.events.push_back(Event::Ponged(id, Err(silent)));
            }
        }
    }

    fn unanswered(&mut self, sent: &Sent, now: Instant) {
        let Some(peer) = self.peers.get_mut(&sent.peer) else {
            return;
        };
        let is_best = |peer: &Peer| peer.best.is_some_and(|best| best.path == sent.to);
        if is_best(peer) && !peer.is_trusted(now) {
            peer.best = None;
            self.settle(&sent.peer, now);
        }
    }
}

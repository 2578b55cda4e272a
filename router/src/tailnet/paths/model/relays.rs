//! Places on peer relays: asked for, told to the peer, bound to, and found to work or not.
//!
//! After `wgengine/magicsock/relaymanager.go`. A place that works becomes the peer's path by UDP
//! ([`crate::tailnet::paths::peer::Best`]), and nothing is kept of it here.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Paths, Way, Wish, lost};
use crate::engine::Path;
use crate::tailnet::disco::{self, Transaction};
use crate::tailnet::keys::{DiscoPublic, NodePublic};
use crate::tailnet::paths::peer::{Best, Peer, is_endpoint};
use crate::tailnet::relay::binding::Say;
use crate::tailnet::relay::{Binding, Endpoint, Header, Message, Outcome};

/// How long a relay has to answer, and when it is asked once more: what DERP drops is dropped for good.
const PATIENCE: Duration = Duration::from_secs(10);
const AGAIN: Duration = Duration::from_secs(3);
/// Places of one peer that are tried at once, and of all.
const MOST_OF_PEER: usize = 8;
const MOST: usize = 4096;
/// Addresses of a relay that are tried.
const ADDRESSES: usize = 16;

/// A place that a relay was asked for.
#[derive(Debug)]
struct Asked {
    server: NodePublic,
    peer: NodePublic,
    ends: Instant,
    again: Option<Instant>,
}

/// A place that is tried.
#[derive(Debug)]
struct Try {
    peer: NodePublic,
    binding: Binding,
}

/// What is under way.
#[derive(Debug, Default)]
pub(super) struct Tries {
    servers: BTreeSet<NodePublic>,
    /// By a number of ours that comes back in the answer.
    asked: HashMap<u32, Asked>,
    /// By the relay's key and number.
    bound: HashMap<(DiscoPublic, u32), Try>,
    /// Begins anywhere: a relay refuses one that it knows of this node from before a restart.
    generation: u32,
    due: Option<Instant>,
}

impl Tries {
    /// Nothing, with a number to begin at.
    pub(super) fn new(generation: u32) -> Self {
        Self {
            generation,
            ..Self::default()
        }
    }

    /// Forgets all that is under way.
    pub(super) fn clear(&mut self) {
        self.asked.clear();
        self.bound.clear();
        self.due = None;
    }

    /// When [`Paths::tend_tries`] has something to do.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// To be called whenever something has changed.
    fn plan(&mut self) {
        let asked = self.asked.values();
        let asked = asked.map(|asked| {
            asked
                .again
                .map_or(asked.ends, |again| again.min(asked.ends))
        });
        let bound = self.bound.values();
        let bound = bound.filter_map(|one| one.binding.poll_timeout());
        self.due = asked.chain(bound).min();
    }

    fn next(&mut self) -> u32 {
        self.generation = self.generation.wrapping_add(1).max(1);
        self.generation
    }

    fn is_sought(&self, peer: &NodePublic) -> bool {
        self.asked.values().any(|asked| asked.peer == *peer)
            || self.bound.values().any(|one| one.peer == *peer)
    }
}

impl Paths {
    /// Takes the peers that are relays.
    pub(super) fn set_relays(&mut self, servers: BTreeSet<NodePublic>) {
        if !servers.is_subset(&self.tries.servers) {
            // A new one may help at once.
            for peer in self.peers.values_mut() {
                peer.relays_sought = None;
            }
        }
        self.tries.servers = servers;
        self.changed = true;
    }

    /// Forgets what is tried for a peer.
    pub(super) fn forget_tries(&mut self, key: &NodePublic) {
        self.tries.asked.retain(|_, asked| asked.peer != *key);
        let mut gone = Vec::new();
        self.tries.bound.retain(|(server, _), one| {
            let stays = one.peer != *key;
            gone.extend((!stays).then_some(*server));
            stays
        });
        gone.iter().for_each(|server| self.forget_server(server));
        self.tries.plan();
    }

    /// The key that was computed for a relay is kept no longer than needed.
    fn forget_server(&mut self, server: &DiscoPublic) {
        let used = self.tries.bound.keys().any(|(other, _)| other == server);
        if !used
            && !self.by_disco.contains_key(server)
            && let Some(own) = &mut self.own
        {
            own.boxes.forget(server);
        }
    }

    /// Asks all relays for a place between this node and a peer, if that may help and nothing is tried already.
    pub(super) fn seek_relays(&mut self, key: &NodePublic, now: Instant) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        let seeks = !self.tries.servers.is_empty()
            && peer.wants_relays(now)
            && !self.tries.is_sought(key)
            && self.tries.asked.len() < MOST;
        if !seeks || peer.spec.disco.is_none() || self.own.is_none() {
            return;
        }
        peer.relays_sought = Some(now);
        let servers = self.tries.servers.iter().filter(|server| *server != key);
        for server in servers.copied().collect::<Vec<_>>() {
            let generation = self.tries.next();
            let asked = Asked {
                server,
                peer: *key,
                ends: now + PATIENCE,
                again: Some(now + AGAIN),
            };
            if self.ask(generation, &asked, now) {
                self.tries.asked.insert(generation, asked);
            }
        }
        self.tries.plan();
    }

    fn ask(&mut self, generation: u32, asked: &Asked, now: Instant) -> bool {
        let own = self.own.as_ref().map(|own| own.disco);
        let peer = self.peers.get(&asked.peer).and_then(|peer| peer.spec.disco);
        let lost = lost(&self.regions, &self.down);
        let server = self.peers.get(&asked.server);
        let at = server.and_then(|server| Some((server.spec.disco?, server.relay(lost, now)?.0)));
        let (Some(own), Some(peer), Some((server, region))) = (own, peer, at) else {
            return false;
        };
        let mut clients = [own, peer];
        clients.sort_by_key(|key| *key.as_bytes());
        let message = Message::Allocate {
            clients,
            generation,
        };
        self.send_clear(Way::Relay(region, asked.server), &server, &message.clear())
    }

    /// A message about peer relays has come through a relay, by its word from `from`.
    pub(super) fn told_of_relay(
        &mut self,
        sender: DiscoPublic,
        from: NodePublic,
        clear: &[u8],
        now: Instant,
    ) {
        let known = self.peers.get(&from);
        if known.is_none_or(|peer| peer.spec.disco != Some(sender)) {
            return;
        }
        match Message::parse(clear) {
            Some(Message::Allocated {
                generation,
                endpoint,
            }) => {
                let asked = self.tries.asked.get(&generation);
                if asked.is_some_and(|asked| asked.server == from)
                    && let Some(asked) = self.tries.asked.remove(&generation)
                {
                    self.bind(&asked.peer, endpoint, true, now);
                }
            }
            Some(Message::CallMeMaybeVia(endpoint)) => {
                let may = self.peers.get_mut(&from).is_some_and(|peer| {
                    peer.last_disco = Some(now);
                    peer.spec.relayed
                });
                if may {
                    self.bind(&from, endpoint, false, now);
                }
            }
            Some(Message::Allocate {
                clients,
                generation,
            }) => {
                let wish = Wish {
                    node: from,
                    disco: sender,
                    clients,
                    generation,
                };
                self.asked_for_place(wish, now);
            }
            _ => {}
        }
        self.tries.plan();
    }

    /// Begins to bind to a place for this node and a peer, and with `call` tells the peer of it.
    fn bind(&mut self, key: &NodePublic, mut endpoint: Endpoint, call: bool, now: Instant) {
        let (Some(own), Some(peer)) = (&self.own, self.peers.get(key)) else {
            return;
        };
        let (Some(disco), node) = (peer.spec.disco, own.node) else {
            return;
        };
        let both = [own.disco, disco];
        let is_ours = both.iter().all(|key| endpoint.clients.contains(key)) && own.disco != disco;
        let tailnet: &[_] = &peer.spec.addresses;
        endpoint.addresses.retain(|at| is_endpoint(*at, tailnet));
        endpoint.addresses.truncate(ADDRESSES);
        if !is_ours || endpoint.addresses.is_empty() || endpoint.server == own.disco {
            return;
        }
        let is_in_use = peer.is_trusted(now)
            && peer.best.is_some_and(|best| {
                let number = match best.path {
                    Path::PeerRelay(_, number) => Some(number),
                    _ => None,
                };
                best.server == Some(endpoint.server) && number == Some(endpoint.number)
            });
        let lost = lost(&self.regions, &self.down);
        let relay = peer.relay(lost, now);
        // Of places on one relay the newest counts.
        let same = |(server, number): &(DiscoPublic, u32), one: &Try| {
            *server == endpoint.server && (one.peer == *key || *number == endpoint.number)
        };
        let mut others = self.tries.bound.iter();
        if others.any(|(place, one)| {
            same(place, one) && one.binding.endpoint().lamport >= endpoint.lamport
        }) {
            return;
        }
        self.tries.bound.retain(|place, one| !same(place, one));
        if call && let Some((region, _)) = relay {
            let message = Message::CallMeMaybeVia(endpoint.clone());
            self.send_clear(Way::Relay(region, *key), &disco, &message.clear());
        }
        let of_peer = self.tries.bound.values().filter(|one| one.peer == *key);
        // Whoever is served by that place already would lose it if it came from elsewhere now.
        if is_in_use || of_peer.count() >= MOST_OF_PEER || self.tries.bound.len() >= MOST {
            return;
        }
        let place = (endpoint.server, endpoint.number);
        let generation = self.tries.next();
        let binding = Binding::new(endpoint, node, disco, generation, now);
        let peer = *key;
        self.tries.bound.insert(place, Try { peer, binding });
        self.carry_on(place, now);
    }

    /// Sends what a try wants sent, and takes its end. Whoever calls it plans anew.
    fn carry_on(&mut self, place: (DiscoPublic, u32), now: Instant) {
        let Some(one) = self.tries.bound.get_mut(&place) else {
            return;
        };
        let (key, (server, number)) = (one.peer, place);
        let all: Vec<_> = std::iter::from_fn(|| one.binding.poll_transmit()).collect();
        let outcome = one.binding.outcome();
        let disco = self.peers.get(&key).and_then(|peer| peer.spec.disco);
        for transmit in all {
            match transmit.say {
                Say::Relay(message) => {
                    let way = Way::PeerRelay(transmit.to, Header::to_relay(number));
                    self.send_clear(way, &server, &message.clear());
                }
                Say::Peer(message) => {
                    let way = Way::PeerRelay(transmit.to, Header::to_peer(number));
                    if let Some(disco) = disco {
                        self.send(way, &disco, &message);
                    }
                }
            }
        }
        if let Some(outcome) = outcome {
            self.tries.bound.remove(&place);
            self.forget_server(&server);
            if let (Outcome::Works { by, latency }, Some(peer)) =
                (outcome, self.peers.get_mut(&key))
            {
                let path = Path::PeerRelay(by, number);
                let server = Some(server);
                let best = Best {
                    path,
                    latency,
                    server,
                };
                peer.found_relay(best, now);
                self.settle(&key, now);
            }
        }
    }

    /// A relay asks whether this node is there.
    pub(super) fn challenged(
        &mut self,
        source: SocketAddr,
        number: u32,
        sealed: &[u8],
        now: Instant,
    ) {
        let Some(place) = disco::sender(sealed).map(|server| (server, number)) else {
            return;
        };
        // Strangers cost nothing.
        let (Some(one), Some(own)) = (self.tries.bound.get_mut(&place), &mut self.own) else {
            return;
        };
        let clear = own.boxes.open_clear(&place.0, sealed);
        let message = clear.and_then(|clear| Message::parse(&clear));
        let mut transaction: Transaction = [0; 12];
        if let Some(Message::Challenge(challenge)) = message
            && (self.random)(&mut transaction)
        {
            one.binding
                .handle_challenge(source, number, &challenge, transaction, now);
            self.carry_on(place, now);
            self.tries.plan();
        }
    }

    /// The tries with a number for whoever has a disco key.
    fn tries_of(&self, sender: DiscoPublic, number: u32) -> Vec<(DiscoPublic, u32)> {
        let all = self.tries.bound.iter().filter(|((_, other), one)| {
            let peer = self.peers.get(&one.peer);
            *other == number && peer.is_some_and(|peer| peer.spec.disco == Some(sender))
        });
        all.map(|(place, _)| *place).collect()
    }

    /// A peer has sent a ping through a relay, so it is bound there.
    pub(super) fn peer_is_bound(
        &mut self,
        sender: DiscoPublic,
        source: SocketAddr,
        number: u32,
        now: Instant,
    ) {
        for place in self.tries_of(sender, number) {
            let mut transaction: Transaction = [0; 12];
            if let Some(one) = self.tries.bound.get_mut(&place)
                && (self.random)(&mut transaction)
            {
                one.binding.handle_ping(source, transaction, now);
                self.carry_on(place, now);
                self.tries.plan();
            }
        }
    }

    /// A peer has answered through a relay.
    pub(super) fn relay_answers(
        &mut self,
        sender: DiscoPublic,
        source: SocketAddr,
        number: u32,
        transaction: &Transaction,
        now: Instant,
    ) {
        for place in self.tries_of(sender, number) {
            if let Some(one) = self.tries.bound.get_mut(&place) {
                one.binding.handle_pong(source, transaction, now);
                self.carry_on(place, now);
                self.tries.plan();
            }
        }
    }

    /// Does what is due.
    pub(super) fn tend_tries(&mut self, now: Instant) {
        if self.tries.due.is_none_or(|due| due > now) {
            return;
        }
        self.tries.asked.retain(|_, asked| now < asked.ends);
        let is_due = |asked: &Asked| asked.again.is_some_and(|again| again <= now);
        let asked = self.tries.asked.iter().filter(|(_, asked)| is_due(asked));
        for generation in asked.map(|(generation, _)| *generation).collect::<Vec<_>>() {
            if let Some(mut asked) = self.tries.asked.remove(&generation) {
                asked.again = None;
                self.ask(generation, &asked, now);
                self.tries.asked.insert(generation, asked);
            }
        }
        let is_due = |one: &Try| one.binding.poll_timeout().is_none_or(|due| due <= now);
        let bound = self.tries.bound.iter().filter(|(_, one)| is_due(one));
        for place in bound.map(|(place, _)| *place).collect::<Vec<_>>() {
            if let Some(one) = self.tries.bound.get_mut(&place) {
                one.binding.handle_timeout(now);
                self.carry_on(place, now);
            }
        }
        self.tries.plan();
    }

    /// Why no peer relay carries what goes to a peer, for a person; nothing where there is none.
    pub(super) fn unrelayed(&self, peer: &Peer) -> &'static str {
        match (self.tries.servers.is_empty(), peer.spec.relayed) {
            (true, _) => "",
            (false, false) => "; the peer is too old for peer relays",
            (false, true) if self.tries.is_sought(&peer.spec.key) => {
                "; peer relays are being tried"
            }
            (false, true) => "; no peer relay reaches both ends",
        }
    }
}

//! The router as a peer relay: who may ask for places, and where it is to be found.
//!
//! What is carried is none of this: [`crate::tailnet::relay::server`]. Its port has a round of STUN of its own, for a
//! NAT shows it another address than the listen port.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Event, Paths, Way, lost};
use crate::tailnet::keys::{DiscoPublic, NodePublic};
use crate::tailnet::paths::model::own::is_local;
use crate::tailnet::paths::rounds::Rounds;
use crate::tailnet::paths::{RelayServer, Serve};
use crate::tailnet::relay::server::{Allocated, BIND, LASTS};
use crate::tailnet::relay::service::Seen;
use crate::tailnet::relay::{Endpoint, Message};
use crate::tailnet::stun;

/// Addresses that are told: what a client of Sluice's tries.
const MOST: usize = 16;
/// Between two rounds while nobody asks. Less than what was seen is kept for.
const IDLE: Duration = Duration::from_secs(240);
/// So long after the last question a NAT's mapping is kept alive.
const BUSY: Duration = Duration::from_secs(600);

/// What is known of it.
#[derive(Debug, Default)]
pub(super) struct Serving {
    /// `None`: it is no relay.
    wanted: Option<Serve>,
    rounds: Rounds,
    pause: Duration,
    /// When a place was asked for last, by somebody who may.
    asked: Option<Instant>,
    /// Questions of nodes that may not.
    ungranted: u64,
}

/// A question for a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Wish {
    /// Who has asked.
    pub(in super::super) node: NodePublic,
    /// Its disco key.
    pub(in super::super) disco: DiscoPublic,
    /// For whom.
    pub(in super::super) clients: [DiscoPublic; 2],
    /// Comes back in the answer.
    pub(in super::super) generation: u32,
}

impl Paths {
    /// Takes whether the router is a peer relay, and whose.
    pub(super) fn set_serving(&mut self, wanted: Option<Serve>, now: Instant) {
        let port = |wanted: &Option<Serve>| wanted.as_ref().map(|wanted| wanted.port);
        let moved = port(&wanted) != port(&self.serving.wanted);
        self.serving.wanted = wanted;
        if moved {
            self.serving.ungranted = 0;
            self.serving.asked = None;
            self.look_for_serving(now);
        }
        self.changed = true;
    }

    /// The network, or what is known of STUN servers, is another one.
    pub(super) fn look_for_serving(&mut self, now: Instant) {
        let serving = &mut self.serving;
        serving.rounds.forget();
        if serving.wanted.is_some() && serving.rounds.has_servers() {
            serving.rounds.start(true, now);
        }
    }

    /// The rounds of the relay's port.
    pub(super) fn serving_rounds(&mut self) -> &mut Rounds {
        &mut self.serving.rounds
    }

    /// A STUN server has answered the relay's port.
    pub(in super::super) fn handle_served(&mut self, seen: Seen, now: Instant) {
        let Seen {
            transaction,
            mapped,
            received,
        } = seen;
        self.serving
            .rounds
            .handle_response(&transaction, mapped, received);
        self.tend_serving(now);
    }

    /// A peer asks for a place, by a relay.
    pub(super) fn asked_for_place(&mut self, wish: Wish, now: Instant) {
        let serving = &mut self.serving;
        let Some(wanted) = &serving.wanted else {
            return;
        };
        if !wanted.clients.contains(&wish.node) {
            serving.ungranted += 1;
            self.changed = true;
            return;
        }
        serving.asked = Some(now);
        self.events.push_back(Event::Allocate(wish));
    }

    /// Tells a peer of the place that the relay with this key has given it.
    pub(in super::super) fn handle_allocated(
        &mut self,
        wish: &Wish,
        server: DiscoPublic,
        allocated: Allocated,
        now: Instant,
    ) {
        let addresses = self.served_at(now);
        let lost = lost(&self.regions, &self.down);
        let peer = self.peers.get(&wish.node);
        let peer = peer.filter(|peer| peer.spec.disco == Some(wish.disco));
        let relay = peer.and_then(|peer| peer.relay(lost, now));
        let Some((region, _)) = relay.filter(|_| !addresses.is_empty()) else {
            return;
        };
        let message = Message::Allocated {
            generation: wish.generation,
            endpoint: Endpoint {
                server,
                clients: allocated.clients,
                lamport: allocated.lamport,
                number: allocated.number,
                bind_within: BIND,
                lasts: LASTS,
                addresses,
            },
        };
        let way = Way::Relay(region, wish.node);
        self.send_clear(way, &wish.disco, &message.clear());
    }

    /// Where the relay may be reached, the best first; nowhere if it is none.
    fn served_at(&self, now: Instant) -> Vec<SocketAddr> {
        let Some(wanted) = &self.serving.wanted else {
            return Vec::new();
        };
        let (seen, varies) = self.serving.rounds.seen(now);
        let seen: Vec<SocketAddr> = seen.collect();
        let with_port = |ip| SocketAddr::new(ip, wanted.port);
        // Behind a NAT that shows each destination another port this one may have been forwarded by hand.
        let forwarded = seen.iter().filter(|at| varies && at.is_ipv4());
        let forwarded = forwarded.map(|at| with_port(at.ip()));
        let local = self.local.addresses.iter().copied();
        let local = local.filter(|ip| is_local(*ip)).map(with_port);
        let all = wanted.fixed.iter().chain(&seen).copied();
        let mut found = Vec::new();
        for address in all.chain(forwarded).chain(local) {
            if found.len() < MOST && !found.contains(&address) {
                found.push(address);
            }
        }
        found
    }

    /// When [`Paths::tend_serving`] has something to do.
    pub(super) fn serving_due(&self) -> Option<Instant> {
        let serving = &self.serving;
        self.own.as_ref()?;
        if serving.rounds.is_running() {
            return serving.rounds.poll_timeout();
        }
        let finished = serving.rounds.finished()?;
        let soon = finished + serving.pause;
        let is_busy = serving
            .asked
            .is_some_and(|asked| soon.saturating_duration_since(asked) <= BUSY);
        Some(if is_busy { soon } else { finished + IDLE })
    }

    /// Does what is due.
    pub(super) fn tend_serving(&mut self, now: Instant) {
        if self.serving_due().is_none_or(|due| due > now) {
            return;
        }
        let serving = &mut self.serving;
        if !serving.rounds.is_running() {
            serving.rounds.start(false, now);
        }
        while let Some((server, transaction)) = serving.rounds.poll_request(now, || {
            let mut transaction = [0; 12];
            (self.random)(&mut transaction).then_some(transaction)
        }) {
            self.transmits.push_back(super::Transmit {
                to: Way::Served(server),
                bytes: stun::request(&transaction),
            });
        }
        if serving.rounds.finish(false, now).is_some() {
            let mut byte = [0];
            (self.random)(&mut byte);
            serving.pause = super::pause(byte[0]);
            self.changed = true;
        }
    }

    /// What is told of it; `None` if it is no relay. Who drives the model knows the rest.
    pub(super) fn relay_server(&self, now: Instant) -> Option<RelayServer> {
        let wanted = self.serving.wanted.as_ref()?;
        Some(RelayServer {
            port: wanted.port,
            addresses: self.served_at(now),
            clients: wanted.clients.len(),
            ungranted: self.serving.ungranted,
            failure: None,
            counts: None,
        })
    }
}

//! Binding to an endpoint of a peer relay, and finding out whether the peer is behind it; without I/O.
//!
//! The relay serves the first address that it hears each node from. So nothing is bound again that works already.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::message::{Endpoint, Handshake, Message};
use crate::tailnet::disco::{self, Transaction};
use crate::tailnet::keys::{DiscoPublic, NodePublic};

/// Whatever a relay says, a try takes no longer.
const MOST: Duration = Duration::from_secs(30);
/// What was not answered is said again after so long, so many times: whoever names a relay may name anybody's address.
const AGAIN: Duration = Duration::from_secs(1);
const REPEATED: u32 = 4;
/// Pings of a try: the peer's have ours follow, and that must end.
const MOST_PINGS: usize = 10;

/// What goes to the relay's address, behind a header with the endpoint's number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Say {
    /// To the relay itself (the header's control bit), sealed for it.
    Relay(Message),
    /// Through it, sealed for the peer.
    Peer(disco::Message),
}

/// A datagram to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// The relay's address.
    pub to: SocketAddr,
    /// What to say there.
    pub say: Say,
}

/// How it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The peer is reached by the relay at this address.
    Works {
        /// The relay's address.
        by: SocketAddr,
        /// There and back.
        latency: Duration,
    },
    /// It took too long.
    Late,
}

/// One try.
#[derive(Debug)]
pub struct Binding {
    endpoint: Endpoint,
    own: NodePublic,
    handshake: Handshake,
    ends: Instant,
    /// When to say the last thing again, and how many times more.
    again: Option<Instant>,
    repeats: u32,
    /// Where the relay has answered from.
    by: Option<SocketAddr>,
    pings: Vec<(Transaction, Instant)>,
    transmits: VecDeque<Transmit>,
    outcome: Option<Outcome>,
}

impl Binding {
    /// Begins with an endpoint, between the node `own` and the peer with this disco key. `generation` is another one
    /// for each try, and not 0.
    pub fn new(
        endpoint: Endpoint,
        own: NodePublic,
        peer: DiscoPublic,
        generation: u32,
        now: Instant,
    ) -> Self {
        let handshake = Handshake {
            number: endpoint.number,
            generation,
            remote: peer,
            challenge: [0; 32],
        };
        let mut binding = Self {
            ends: now + endpoint.bind_within.min(MOST),
            endpoint,
            own,
            handshake,
            again: None,
            repeats: REPEATED,
            by: None,
            pings: Vec::new(),
            transmits: VecDeque::new(),
            outcome: None,
        };
        binding.bind(now);
        binding
    }

    /// The endpoint.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn bind(&mut self, now: Instant) {
        for to in &self.endpoint.addresses {
            let say = Say::Relay(Message::Bind(self.handshake));
            self.transmits.push_back(Transmit { to: *to, say });
        }
        self.repeat(now);
    }

    /// Has the last thing said once more, if it was not too often yet.
    fn repeat(&mut self, now: Instant) {
        let left = self.repeats.checked_sub(1);
        self.again = left.map(|_| now + AGAIN);
        self.repeats = left.unwrap_or(0);
    }

    fn answer(&mut self, to: SocketAddr, now: Instant) {
        let say = Say::Relay(Message::Answer(self.handshake));
        self.transmits.push_back(Transmit { to, say });
        self.repeat(now);
    }

    /// The relay, authenticated by its disco key, has answered from `from` under the number `number`. The transaction
    /// is a random one.
    pub fn handle_challenge(
        &mut self,
        from: SocketAddr,
        number: u32,
        challenge: &Handshake,
        transaction: Transaction,
        now: Instant,
    ) {
        let ours = Handshake {
            challenge: challenge.challenge,
            ..self.handshake
        };
        // It serves the address that it has heard first.
        if self.by.is_some() || *challenge != ours || number != ours.number {
            return;
        }
        self.by = Some(from);
        self.handshake = ours;
        self.repeats = REPEATED;
        self.answer(from, now);
        self.ping(from, transaction, now);
    }

    /// The peer, authenticated by its disco key, has sent a ping through the relay: it is bound, so it may have missed
    /// ours. The ping is answered by whoever answers all of them.
    pub fn handle_ping(&mut self, from: SocketAddr, transaction: Transaction, now: Instant) {
        if self.by == Some(from) {
            self.ping(from, transaction, now);
        }
    }

    fn ping(&mut self, to: SocketAddr, transaction: Transaction, now: Instant) {
        if self.pings.len() < MOST_PINGS && self.outcome.is_none() {
            self.pings.push((transaction, now));
            let say = Say::Peer(disco::Message::Ping {
                transaction,
                node: Some(self.own),
                padding: 0,
            });
            self.transmits.push_back(Transmit { to, say });
        }
    }

    /// The peer, authenticated by its disco key, has answered through the relay.
    pub fn handle_pong(&mut self, from: SocketAddr, transaction: &Transaction, now: Instant) {
        let mut asked = self.pings.iter();
        if self.by == Some(from)
            && self.outcome.is_none()
            && let Some((_, at)) = asked.rfind(|(known, _)| known == transaction)
        {
            self.outcome = Some(Outcome::Works {
                by: from,
                latency: now.saturating_duration_since(*at),
            });
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.outcome.is_none() && now >= self.ends {
            self.outcome = Some(Outcome::Late);
        } else if self.again.is_some_and(|again| now >= again) {
            match self.by {
                Some(by) => {
                    self.answer(by, now);
                    // The relay has dropped a ping that came before the answer.
                    let last = self.pings.last().map(|(transaction, _)| *transaction);
                    if let Some(transaction) = last {
                        self.ping(by, transaction, now);
                    }
                }
                None => self.bind(now),
            }
        }
    }

    /// When something is due; `None` when it is over.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let ends = self.outcome.is_none().then_some(self.ends)?;
        Some(self.again.map_or(ends, |again| again.min(ends)))
    }

    /// What to send next.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// How it has ended, once it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.outcome
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::tests::endpoint;
    use super::*;

    const OWN: NodePublic = NodePublic::from_bytes([9; 32]);

    fn start() -> (Binding, Instant, Handshake) {
        let now = Instant::now();
        let long = Endpoint {
            bind_within: Duration::from_secs(300),
            ..endpoint()
        };
        let peer = long.clients[1];
        let binding = Binding::new(long, OWN, peer, 6, now);
        let handshake = binding.handshake;
        (binding, now, handshake)
    }

    fn said(binding: &mut Binding) -> Vec<Transmit> {
        std::iter::from_fn(|| binding.poll_transmit()).collect()
    }

    #[test]
    fn the_peer_is_found_behind_the_relay() {
        let (mut binding, now, handshake) = start();
        let [one, two] = [0, 1].map(|at| binding.endpoint().addresses[at]);
        let to: Vec<_> = said(&mut binding)
            .into_iter()
            .map(|transmit| transmit.to)
            .collect();
        assert_eq!(to, [one, two]);
        let challenge = Handshake {
            challenge: [8; 32],
            ..handshake
        };
        binding.handle_challenge(two, 5, &challenge, [1; 12], now);
        binding.handle_challenge(one, 5, &challenge, [2; 12], now);
        let ping = |transaction| Transmit {
            to: two,
            say: Say::Peer(disco::Message::Ping {
                transaction,
                node: Some(OWN),
                padding: 0,
            }),
        };
        let answer = Transmit {
            to: two,
            say: Say::Relay(Message::Answer(challenge)),
        };
        assert_eq!(said(&mut binding), [answer, ping([1; 12])]);
        // That ping came too early; the peer's own tells when it is there.
        binding.handle_ping(two, [3; 12], now);
        assert_eq!(said(&mut binding), [ping([3; 12])]);
        let later = now + Duration::from_millis(20);
        for (from, transaction) in [(two, [7; 12]), (one, [3; 12])] {
            binding.handle_pong(from, &transaction, later);
            assert_eq!(binding.outcome(), None);
        }
        binding.handle_pong(two, &[3; 12], later);
        let works = Outcome::Works {
            by: two,
            latency: Duration::from_millis(20),
        };
        assert_eq!(binding.outcome(), Some(works));
        assert_eq!(binding.poll_timeout(), None);
    }

    #[test]
    fn an_answer_that_is_lost_is_repeated_with_its_ping() {
        let (mut binding, now, handshake) = start();
        let by = binding.endpoint().addresses[0];
        said(&mut binding);
        binding.handle_challenge(by, 5, &handshake, [1; 12], now);
        let first = said(&mut binding);
        assert_eq!(first.len(), 2);
        let mut again = now;
        for _ in 0..REPEATED {
            again += AGAIN;
            assert_eq!(binding.poll_timeout(), Some(again));
            binding.handle_timeout(again);
            assert_eq!(said(&mut binding), first);
        }
        assert_eq!(binding.poll_timeout(), Some(now + MOST));
        let later = again + Duration::from_millis(20);
        binding.handle_pong(by, &[1; 12], later);
        let latency = Duration::from_millis(20);
        assert_eq!(binding.outcome(), Some(Outcome::Works { by, latency }));
    }

    #[test]
    fn what_is_not_ours_is_passed_over() {
        let (mut binding, now, handshake) = start();
        let from = binding.endpoint().addresses[0];
        said(&mut binding);
        let other = DiscoPublic::from_bytes([77; 32]);
        for (number, challenge) in [
            (6, handshake),
            (
                5,
                Handshake {
                    number: 6,
                    ..handshake
                },
            ),
            (
                5,
                Handshake {
                    generation: 5,
                    ..handshake
                },
            ),
            (
                5,
                Handshake {
                    remote: other,
                    ..handshake
                },
            ),
        ] {
            binding.handle_challenge(from, number, &challenge, [1; 12], now);
        }
        binding.handle_ping(from, [1; 12], now);
        binding.handle_pong(from, &[1; 12], now);
        assert!(said(&mut binding).is_empty());
        assert_eq!(binding.outcome(), None);
    }

    #[test]
    fn the_relay_is_asked_again_and_then_given_up() {
        let (mut binding, start, handshake) = start();
        let (mut now, mut binds) = (start, 0);
        while let Some(next) = binding.poll_timeout() {
            now = next;
            binding.handle_timeout(now);
            binds += said(&mut binding).len();
        }
        assert_eq!(binding.outcome(), Some(Outcome::Late));
        assert_eq!(now - start, MOST);
        assert_eq!(binds, 2 * (1 + REPEATED as usize));
        // Pings end too.
        let (mut binding, now, _) = self::start();
        let from = binding.endpoint().addresses[0];
        binding.handle_challenge(from, 5, &handshake, [0; 12], now);
        said(&mut binding);
        for number in 0..100 {
            binding.handle_ping(from, [number; 12], now);
        }
        assert_eq!(said(&mut binding).len(), MOST_PINGS - 1);
    }
}

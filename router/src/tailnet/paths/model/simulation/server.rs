//! A peer relay of the simulated internet: the one that a router is ([`relay::Server`]), and a node that has it.

use std::net::SocketAddr;
use std::time::Instant;

use super::parts::{Dice, filler, secret};
use crate::tailnet::disco::{self, Boxes};
use crate::tailnet::keys::{DiscoPublic, DiscoSecret, NodePublic, NodeSecret};
use crate::tailnet::paths::PathPeer;
use crate::tailnet::relay::server::{BIND, LASTS, Leg, Verdict};
use crate::tailnet::relay::{self, Endpoint, Header, Message};

/// The region of its home relay.
pub(super) const HOME: u32 = 1;

pub(super) struct Server {
    pub(super) key: NodePublic,
    disco: DiscoPublic,
    /// Of the node, for what comes through relays.
    node: Boxes,
    relay: relay::Server,
    dice: Dice,
    /// Packets of the tunnel that it has carried.
    pub(super) carried: u64,
}

/// Where it is.
pub(super) fn address(v4: bool) -> SocketAddr {
    let text = match v4 {
        true => "203.0.113.99:7777",
        false => "[2001:db8:ffff::99]:7777",
    };
    text.parse().unwrap()
}

fn relay(dice: &mut Dice) -> relay::Server {
    let secret: DiscoSecret = secret(dice).parse().unwrap();
    relay::Server::new(&secret, filler(Dice::new(dice.next())))
}

impl Server {
    pub(super) fn new(dice: &mut Dice) -> Self {
        let node: NodeSecret = secret(dice).parse().unwrap();
        let disco: DiscoSecret = secret(dice).parse().unwrap();
        let mut dice = Dice::new(dice.next());
        Self {
            key: node.public(),
            disco: disco.public(),
            node: Boxes::new(&disco),
            relay: relay(&mut dice),
            dice,
            carried: 0,
        }
    }

    /// What the server says of it.
    pub(super) fn spec(&self) -> PathPeer {
        PathPeer {
            key: self.key,
            disco: Some(self.disco),
            endpoints: Vec::new(),
            home: Some(HOME),
            wireguard_only: false,
            relayed: true,
            online: Some(true),
            addresses: Vec::new(),
        }
    }

    /// Forgets all places, as one that is started anew.
    pub(super) fn restart(&mut self) {
        self.relay = relay(&mut self.dice);
    }

    /// Takes what has come through a relay, and answers.
    pub(super) fn asked(&mut self, bytes: &[u8], nonce: [u8; 24], now: Instant) -> Option<Vec<u8>> {
        let sender = disco::sender(bytes)?;
        let clear = self.node.open_clear(&sender, bytes)?;
        let Message::Allocate {
            clients,
            generation,
        } = Message::parse(&clear)?
        else {
            return None;
        };
        let place = self.relay.allocate(sender, clients, now).unwrap();
        let endpoint = Endpoint {
            server: self.relay.key(),
            clients: place.clients,
            lamport: place.lamport,
            number: place.number,
            bind_within: BIND,
            lasts: LASTS,
            addresses: [true, false].map(address).into(),
        };
        let answer = Message::Allocated {
            generation,
            endpoint,
        };
        self.node.seal_clear(&sender, &answer.clear(), nonce)
    }

    /// Takes a datagram; gives what it sends, and where to.
    pub(super) fn arrives(
        &mut self,
        from: SocketAddr,
        datagram: &[u8],
        now: Instant,
    ) -> Option<(SocketAddr, Vec<u8>)> {
        let leg = Leg {
            remote: from,
            local: None,
        };
        self.relay.handle_timeout(now);
        match self.relay.handle(datagram, datagram.len(), leg, now) {
            Verdict::Carry(to) => {
                let (_, rest) = Header::parse(datagram)?;
                self.carried += u64::from(disco::sender(rest).is_none());
                Some((to.remote, datagram.to_vec()))
            }
            Verdict::Answer(answer) => Some((from, answer)),
            Verdict::Bound | Verdict::Drop(_) => None,
        }
    }
}

//! Two nodes, what lies between them, and somebody who forges.

mod checks;
mod traffic;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::nat::Nat;
use super::parts::{
    Dice, REGIONS, filler, is_private, map, nat, secret, stun_response, stun_server,
};
use super::server::{self, Server};
use crate::tailnet::disco::{self, Boxes};
use crate::tailnet::keys::{DiscoPublic, DiscoSecret, NodePublic, NodeSecret};
use crate::tailnet::paths::model::{Event, Paths, Way};
use crate::tailnet::paths::peer::Ways;
use crate::tailnet::paths::{Command, PathPeer};
use crate::tailnet::stun;

/// The port of the nodes.
const PORT: u16 = 41641;
/// Where the forger is. Nobody may send packets of the tunnel there.
const FORGER: SocketAddr = SocketAddr::new(IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 66)), 666);

/// What a sealed message is longer: magic, key, nonce and tag.
const SEALED: usize = 6 + 32 + 24 + 16;
/// A ping with a node's key. A call has an endpoint each `ENDPOINT` bytes behind `CALL`. To open each message would be
/// a third of what a schedule costs.
const PING: usize = 2 + 12 + 32;
const CALL: usize = 2;
const ENDPOINT: usize = 18;

/// A way's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Direct,
    PeerRelay,
    Relay,
}

struct Node {
    paths: Paths,
    key: NodePublic,
    disco: DiscoPublic,
    /// Behind which NAT, if one.
    nat: Option<usize>,
    v4: IpAddr,
    v6: Option<IpAddr>,
    blocked: bool,
    home: Option<u32>,
    /// What the engine was told.
    ways: Option<Ways>,
    endpoints: Vec<SocketAddr>,
    /// Packets of the tunnel that have arrived, each counted once.
    arrived: u64,
    /// The last of them, and the longest time between two.
    last: Option<(u64, Instant)>,
    gap: Duration,
    /// Packets of the tunnel that were sent.
    sent: u64,
    /// When pings left.
    pings: Vec<Instant>,
    /// Datagrams of disco that have left.
    disco_sent: u64,
    /// When the engine told of traffic last.
    told: Option<Instant>,
}

enum What {
    /// A datagram arrives.
    Datagram(SocketAddr, SocketAddr, Vec<u8>),
    /// A STUN server answers to this address.
    Relayed(u32, usize, usize, Vec<u8>),
    /// Something arrives at the peer relay through a relay, or comes from there.
    Asked(u32, usize, Vec<u8>),
    Answered(u32, usize, Vec<u8>),
    /// A relay does not know a peer.
    Gone(u32, usize, usize),
    /// The server tells a node what the other one has told.
    Map(usize, Box<PathPeer>),
    /// Packets for the peer.
    Traffic(usize),
    /// A relay dies or comes back.
    Toggle(u32),
    /// A node hears of a relay.
    Relay(usize, u32, bool),
    /// Forged datagrams.
    Forge,
    /// A NAT forgets all, as one that is started anew.
    Reboot,
}

pub(super) struct Internet {
    dice: Dice,
    now: Instant,
    nodes: Vec<Node>,
    nats: Vec<Nat>,
    queue: BinaryHeap<Reverse<(Instant, u64)>>,
    whats: HashMap<u64, What>,
    number: u64,
    alive: BTreeMap<u32, bool>,
    loss: u64,
    trouble: bool,
    traffic: bool,
    /// Datagrams that the forger has seen.
    seen: Vec<Vec<u8>>,
    /// The forger's own.
    stranger: Boxes,
    server: Option<Server>,
}

impl Internet {
    pub(super) fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let now = Instant::now();
        let mut nats = Vec::new();
        let same = dice.percent(15);
        let mut nodes: Vec<Node> = Vec::new();
        for at in 0..2_u8 {
            let random = Dice::new(dice.next());
            let (node, disco) = (secret(&mut dice), secret(&mut dice));
            let (node, disco): (NodeSecret, DiscoSecret) =
                (node.parse().unwrap(), disco.parse().unwrap());
            let nat = if at == 1 && same {
                nodes[0].nat
            } else if dice.percent(80) {
                nats.push(nat(&mut dice, at));
                Some(nats.len() - 1)
            } else {
                None
            };
            let v4: IpAddr = match nat {
                Some(_) if same => [10, 0, 0, 2 + at].into(),
                // Both private networks have the same addresses, as real ones do.
                Some(_) => [10, 0, 0, 2].into(),
                None => [198, 51, 100, 100 + at].into(),
            };
            let v6 = dice
                .percent(30)
                .then(|| format!("2001:db8:{at}::2").parse().unwrap());
            let mut paths = Paths::new(filler(random));
            let key = node.public();
            paths.handle_command(
                Command::Local {
                    port: PORT,
                    addresses: [Some(v4), v6].into_iter().flatten().collect(),
                    fixed: Vec::new(),
                },
                now,
            );
            let identity = Command::Identity {
                node,
                disco: disco.clone(),
            };
            paths.handle_command(identity, now);
            paths.handle_command(Command::Control { connected: true }, now);
            paths.handle_command(Command::Derp(Box::new(map())), now);
            nodes.push(Node {
                paths,
                key,
                disco: disco.public(),
                nat,
                v4,
                v6,
                blocked: dice.percent(12),
                home: None,
                ways: None,
                endpoints: Vec::new(),
                arrived: 0,
                last: None,
                gap: Duration::ZERO,
                sent: 0,
                pings: Vec::new(),
                disco_sent: 0,
                told: None,
            });
        }
        let loss = if dice.percent(50) { 0 } else { dice.below(25) };
        let stranger: DiscoSecret = secret(&mut dice).parse().unwrap();
        let mut internet = Self {
            dice,
            now,
            nodes,
            nats,
            queue: BinaryHeap::new(),
            whats: HashMap::new(),
            number: 0,
            alive: (1..=REGIONS).map(|region| (region, true)).collect(),
            loss,
            trouble: true,
            traffic: true,
            seen: Vec::new(),
            stranger: Boxes::new(&stranger),
            server: None,
        };
        if internet.dice.percent(40) {
            let server = Server::new(&mut internet.dice);
            let knows = internet.dice.below(3);
            for (at, node) in internet.nodes.iter_mut().enumerate() {
                let set = vec![server.spec()];
                let removed = Vec::new();
                node.paths
                    .handle_command(Command::Peers { set, removed }, now);
                // One that may use it is enough: it tells the other.
                if knows == 2 || knows == at as u64 {
                    let relays = Command::PeerRelays([server.key].into());
                    node.paths.handle_command(relays, now);
                }
            }
            internet.server = Some(server);
        }
        for at in 0..2 {
            internet.publish(at);
            internet.at(Duration::from_millis(500), What::Traffic(at));
        }
        for region in 1..=REGIONS {
            if internet.dice.percent(40) {
                let after = internet.dice.below(80);
                internet.at(Duration::from_secs(after), What::Toggle(region));
            }
        }
        internet.at(Duration::from_secs(2), What::Forge);
        internet.at(Duration::from_secs(40), What::Reboot);
        internet
    }

    fn at(&mut self, after: Duration, what: What) {
        self.number += 1;
        self.whats.insert(self.number, what);
        self.queue.push(Reverse((self.now + after, self.number)));
    }

    /// The server tells the other node what it knows of this one.
    fn publish(&mut self, at: usize) {
        let node = &self.nodes[at];
        let peer = PathPeer {
            key: node.key,
            disco: Some(node.disco),
            endpoints: node.endpoints.clone(),
            home: node.home,
            wireguard_only: false,
            relayed: true,
            online: Some(true),
            addresses: Vec::new(),
        };
        // Always the same, for the server's news keep their order.
        self.at(
            Duration::from_millis(200),
            What::Map(1 - at, Box::new(peer)),
        );
    }

    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            for at in 0..self.nodes.len() {
                self.drain(at);
            }
            let timers = self
                .nodes
                .iter()
                .filter_map(|node| node.paths.poll_timeout());
            let timer = timers.min();
            let event = self.queue.peek().map(|Reverse((at, _))| *at);
            let Some(next) = [timer, event].into_iter().flatten().min() else {
                break;
            };
            if next > end {
                break;
            }
            self.now = self.now.max(next);
            while let Some(Reverse((at, number))) = self.queue.peek().copied()
                && at <= self.now
            {
                self.queue.pop();
                if let Some(what) = self.whats.remove(&number) {
                    self.carry_out(what);
                }
            }
            for node in &mut self.nodes {
                node.paths.handle_timeout(self.now);
            }
        }
        self.now = end;
    }

    /// Takes what a node wants sent and told.
    fn drain(&mut self, at: usize) {
        while let Some(transmit) = self.nodes[at].paths.poll_transmit() {
            if disco::sender(&transmit.bytes).is_some() {
                self.note(at, &transmit.bytes, transmit.to);
            } else {
                // Else something has left in the clear.
                assert!(stun::is_stun(&transmit.bytes));
            }
            match transmit.to {
                Way::Udp(to, _) => self.send(at, to, transmit.bytes),
                Way::PeerRelay(to, header) => {
                    self.send(at, to, [&header.bytes()[..], &transmit.bytes].concat());
                }
                Way::Relay(region, key) => self.relay(at, region, key, transmit.bytes),
                Way::Served(_) => panic!("neither is a peer relay"),
            }
        }
        while let Some(event) = self.nodes[at].paths.poll_event() {
            match event {
                Event::Path { peer, ways, .. } => {
                    for path in [Some(ways.path), ways.also].into_iter().flatten() {
                        let to = path.by_udp().map(|(to, _)| to);
                        assert_ne!(to, Some(FORGER), "a forger is believed");
                    }
                    if peer == self.nodes[1 - at].key.into() {
                        self.nodes[at].ways = Some(ways);
                    }
                }
                Event::Outside(super::super::super::Event::Endpoints(all)) => {
                    assert!(all.iter().all(|(address, _)| *address != FORGER));
                    self.nodes[at].endpoints = all.iter().map(|(address, _)| *address).collect();
                    self.publish(at);
                }
                Event::Outside(super::super::super::Event::Home(home)) => {
                    self.nodes[at].home = Some(home);
                    self.publish(at);
                    let alive = self.alive[&home];
                    self.at(Duration::from_millis(200), What::Relay(at, home, alive));
                }
                _ => {}
            }
        }
    }

    /// Takes note of a datagram of disco, whose length tells its kind.
    fn note(&mut self, at: usize, bytes: &[u8], to: Way) {
        let node = &mut self.nodes[at];
        node.disco_sent += 1;
        let message = bytes.len() - SEALED;
        if message == PING {
            node.pings.push(self.now);
            let recent = node.pings.len().saturating_sub(200);
            // What the budget of one peer lets pass: a burst, and five a second.
            if let Some(then) = node.pings.get(recent).filter(|_| recent > 0) {
                let time = self.now.saturating_duration_since(*then);
                assert!(time > Duration::from_secs(15), "200 pings within {time:?}");
            }
        } else if message % ENDPOINT == CALL {
            let secret = match to {
                Way::Relay(..) => true,
                // What is said to the peer relay itself may be as long.
                Way::PeerRelay(_, header) => header.control,
                Way::Udp(..) | Way::Served(_) => false,
            };
            assert!(secret, "a call that is no secret");
        }
        // Whoever carries pings and pongs both ways is a path indeed: he who sends only what others were sent is none.
        if self.seen.len() < 50 && !matches!(to, Way::Udp(to, _) if to == FORGER) {
            self.seen.push(bytes.to_vec());
        }
    }

    fn delay(&mut self) -> Duration {
        let base = 5 + self.dice.below(if self.trouble { 80 } else { 10 });
        Duration::from_millis(base)
    }

    /// A node sends a datagram by UDP.
    fn send(&mut self, at: usize, to: SocketAddr, bytes: Vec<u8>) {
        let node = &self.nodes[at];
        if node.blocked || (to.is_ipv6() && node.v6.is_none()) {
            return;
        }
        let own = if to.is_ipv4() { Some(node.v4) } else { node.v6 };
        let Some(own) = own else {
            return;
        };
        let inside = SocketAddr::new(own, PORT);
        // A neighbour behind the same NAT.
        let near = self.nodes[1 - at].nat == node.nat
            && node.nat.is_some()
            && to == SocketAddr::new(self.nodes[1 - at].v4, PORT);
        let from = match node.nat {
            Some(nat) if to.is_ipv4() && !near => {
                if to.ip() == self.nats[nat].outside && !self.nats[nat].hairpin {
                    return;
                }
                self.nats[nat].leave(inside, to, self.now)
            }
            _ => inside,
        };
        if self.dice.percent(self.loss) {
            return;
        }
        let delay = self.delay();
        self.at(delay, What::Datagram(from, to, bytes));
    }

    /// A node sends something through a relay.
    fn relay(&mut self, at: usize, region: u32, to: NodePublic, bytes: Vec<u8>) {
        if !self.alive.get(&region).copied().unwrap_or(false) {
            return;
        }
        let other = 1 - at;
        let delay = self.delay() * 2;
        if to != self.nodes[other].key {
            if region == server::HOME {
                self.at(delay, What::Asked(region, at, bytes));
            }
            return;
        }
        let what = match self.nodes[other].home == Some(region) {
            true => What::Relayed(region, at, other, bytes),
            false => What::Gone(region, at, other),
        };
        self.at(delay, what);
    }

    fn carry_out(&mut self, what: What) {
        match what {
            What::Datagram(from, to, bytes) => self.arrive(from, to, bytes),
            What::Relayed(region, from, to, bytes) => {
                if !self.alive[&region] {
                    return;
                }
                let from = self.nodes[from].key;
                let node = &mut self.nodes[to];
                if disco::sender(&bytes).is_some() {
                    node.paths.handle_relayed(region, from, &bytes, self.now);
                } else {
                    node.takes(&bytes, self.now);
                }
            }
            What::Asked(region, at, bytes) => {
                let nonce = self.nonce();
                let server = self.server.as_mut().filter(|_| self.alive[&region]);
                if let Some(answer) =
                    server.and_then(|server| server.asked(&bytes, nonce, self.now))
                {
                    let home = self.nodes[at].home.unwrap_or(region);
                    let delay = self.delay() * 2;
                    self.at(delay, What::Answered(home, at, answer));
                }
            }
            What::Answered(region, at, bytes) => {
                if let Some(server) = self.server.as_ref().filter(|_| self.alive[&region]) {
                    let paths = &mut self.nodes[at].paths;
                    paths.handle_relayed(region, server.key, &bytes, self.now);
                }
            }
            What::Gone(region, at, other) => {
                let key = self.nodes[other].key;
                self.nodes[at].paths.handle_gone(region, &key, self.now);
            }
            What::Map(at, peer) => {
                let peers = Command::Peers {
                    set: vec![*peer],
                    removed: Vec::new(),
                };
                self.nodes[at].paths.handle_command(peers, self.now);
            }
            What::Traffic(at) => {
                self.packet(at);
                if self.traffic {
                    self.at(Duration::from_millis(1000), What::Traffic(at));
                }
            }
            What::Toggle(region) => {
                if !self.trouble {
                    return;
                }
                let alive = !self.alive[&region];
                self.set_relay(region, alive);
                let after = 5 + self.dice.below(60);
                self.at(Duration::from_secs(after), What::Toggle(region));
            }
            What::Relay(at, region, alive) => {
                let down = (!alive).then(|| "refused".to_owned());
                self.nodes[at].paths.handle_relay(region, down, self.now);
            }
            What::Forge => {
                self.forge();
                if self.trouble {
                    self.at(Duration::from_millis(2100), What::Forge);
                }
            }
            What::Reboot => {
                if let Some(server) = self.server.as_mut().filter(|_| self.dice.percent(30)) {
                    server.restart();
                }
                for nat in &mut self.nats {
                    if self.dice.percent(30) {
                        nat.restart();
                    }
                }
            }
        }
    }

    fn set_relay(&mut self, region: u32, alive: bool) {
        self.alive.insert(region, alive);
        for at in 0..2 {
            self.at(Duration::from_secs(1), What::Relay(at, region, alive));
        }
    }

    /// A datagram is at the end of its way.
    fn arrive(&mut self, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        for region in 1..=REGIONS {
            if to == stun_server(region, to.is_ipv4()) {
                if self.alive[&region] && stun::is_stun(&bytes) {
                    let answer = stun_response(&bytes, from);
                    let delay = self.delay() + Duration::from_millis(u64::from(region) * 15);
                    self.at(delay, What::Datagram(to, from, answer));
                }
                return;
            }
        }
        if to == server::address(to.is_ipv4()) {
            let server = self.server.as_mut();
            let arrives = |server: &mut Server| server.arrives(from, &bytes, self.now);
            if let Some((on, bytes)) = server.and_then(arrives) {
                let delay = self.delay();
                let from = server::address(on.is_ipv4());
                self.at(delay, What::Datagram(from, on, bytes));
            }
            return;
        }
        let nat = self.nats.iter().position(|nat| nat.outside == to.ip());
        let (inside, behind) = match nat {
            Some(nat) => match self.nats[nat].enter(to.port(), from, self.now) {
                Some(inside) => (inside, Some(nat)),
                None => return,
            },
            None => (to, None),
        };
        let own = |node: &Node| {
            let v4 = SocketAddr::new(node.v4, PORT) == inside;
            let v6 = node
                .v6
                .is_some_and(|v6| SocketAddr::new(v6, PORT) == inside);
            let reached = behind.is_some() || node.nat.is_none() || is_private(from.ip());
            let here = behind.is_none_or(|nat| node.nat == Some(nat));
            v6 || v4 && reached && here
        };
        let Some(at) = self.nodes.iter().position(own) else {
            return;
        };
        let node = &mut self.nodes[at];
        if node.blocked {
            return;
        }
        if !node.takes(&bytes, self.now) {
            let local = Some(inside.ip());
            node.paths.handle_datagram(from, local, &bytes, self.now);
        }
    }

    fn nonce(&mut self) -> [u8; 24] {
        let mut nonce = [0; 24];
        for part in nonce.chunks_mut(8) {
            part.copy_from_slice(&self.dice.next().to_le_bytes());
        }
        nonce
    }
}

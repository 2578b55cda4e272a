//! What decides about paths, without I/O: when who is asked, what is believed, and which way is taken.
//!
//! Whoever drives it hands in what comes and what changes, sends what [`Paths::poll_transmit`] gives, looks at
//! [`Paths::poll_event`], and calls [`Paths::handle_timeout`] at [`Paths::poll_timeout`]. A peer without traffic costs
//! nothing: it has no deadline.

mod heard;
mod own;
mod relays;
mod report;
mod search;
mod serving;
mod told;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use self::relays::Tries;
use self::search::Pings;
use self::serving::Serving;
pub(super) use self::serving::Wish;
use super::budget::Budget;
use super::peer::{PING_AGAIN, Peer, SESSION, Ways};
use super::rounds::Rounds;
use super::{EndpointKind, Mapped, Netcheck, PingError, Pong};
use crate::engine::Path;
use crate::tailnet::disco::Boxes;
use crate::tailnet::keys::{DiscoPublic, NodePublic};
use crate::tailnet::relay::Header;
use crate::tailnet::stun;
use crate::wireguard::keys::PublicKey;

/// Pings of all peers together: so many at once, and then a thousand a second.
const PINGS: (Duration, u32) = (Duration::from_millis(1), 4096);
/// Endpoints of our own that a call-me-maybe may tell are no older. Less than between two rounds.
const FRESH: Duration = Duration::from_secs(27);
/// Between full rounds.
const FULL: Duration = Duration::from_secs(300);

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// To an address; from this address of ours, where that matters.
    Udp(SocketAddr, Option<IpAddr>),
    /// To an address, behind a header with this number: to a peer relay, which may carry it on.
    PeerRelay(SocketAddr, Header),
    /// To a peer through the relay of a region.
    Relay(u32, NodePublic),
    /// To an address, from the port of the peer relay that this router is.
    Served(SocketAddr),
}

/// A datagram to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Transmit {
    pub(super) to: Way,
    pub(super) bytes: Vec<u8>,
}

/// Something for others.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Event {
    /// The engine is to be told. `moved`: a peer with traffic goes another way than before.
    Path {
        peer: PublicKey,
        ways: Ways,
        moved: bool,
    },
    /// The coordination server is.
    Outside(super::Event),
    /// A ping's answer, by its number.
    Ponged(u64, Result<Pong, PingError>),
    /// A look at the network, by its number.
    Netcheck(u64, Box<Netcheck>),
    /// Addresses of these names are wanted.
    Resolve(BTreeSet<String>),
    /// How far the relays of these regions are is wanted.
    Measure(BTreeSet<u32>),
    /// A place on the peer relay that this router is, by somebody who may have one.
    Allocate(Wish),
}

/// What this machine has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Local {
    port: u16,
    addresses: Vec<IpAddr>,
    fixed: Vec<SocketAddr>,
}

/// Own keys.
struct Own {
    node: NodePublic,
    disco: DiscoPublic,
    boxes: Boxes,
}

/// Fills bytes at random; false if it cannot.
pub(super) type Random = Box<dyn FnMut(&mut [u8]) -> bool>;

/// The model.
pub(super) struct Paths {
    own: Option<Own>,
    peers: HashMap<NodePublic, Peer>,
    /// Several nodes can share a disco key.
    by_disco: HashMap<DiscoPublic, Vec<NodePublic>>,
    deadlines: BinaryHeap<Reverse<(Instant, NodePublic)>>,
    pings: Pings,
    /// Places on peer relays that are not in use yet.
    tries: Tries,
    /// The peer relay that this router is.
    serving: Serving,
    budget: Budget,
    rounds: Rounds,
    /// Peers that are to be called once this node knows how it looks from outside.
    to_call: BTreeSet<NodePublic>,
    /// Who waits for a look at the network.
    netchecks: Vec<u64>,
    /// How long after the last round the next one begins, while there is traffic.
    pause: Duration,
    /// When there was traffic last.
    active: Option<Instant>,
    local: Local,
    /// A port of the gateway that leads here.
    mapped: Option<Mapped>,
    endpoints: Vec<(SocketAddr, EndpointKind)>,
    /// Codes of the regions.
    regions: BTreeMap<u32, String>,
    /// Regions whose relay cannot be reached, and why.
    down: BTreeMap<u32, String>,
    /// What relays say to be wrong.
    ill: BTreeMap<u32, String>,
    /// The coordination server hears what this node tells.
    heard: bool,
    told_home: Option<u32>,
    /// Peers with something to report.
    awake: BTreeSet<NodePublic>,
    changed: bool,
    random: Random,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Paths {
    /// One that knows nothing.
    pub(super) fn new(mut random: Random) -> Self {
        let mut generation = [0; 4];
        random(&mut generation);
        Self {
            own: None,
            peers: HashMap::new(),
            by_disco: HashMap::new(),
            deadlines: BinaryHeap::new(),
            pings: Pings::default(),
            tries: Tries::new(u32::from_le_bytes(generation)),
            serving: Serving::default(),
            budget: Budget::new(PINGS.0, PINGS.1),
            rounds: Rounds::default(),
            to_call: BTreeSet::new(),
            netchecks: Vec::new(),
            pause: Duration::from_secs(20),
            active: None,
            local: Local::default(),
            mapped: None,
            endpoints: Vec::new(),
            regions: BTreeMap::new(),
            down: BTreeMap::new(),
            ill: BTreeMap::new(),
            heard: false,
            told_home: None,
            awake: BTreeSet::new(),
            changed: true,
            random,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// The engine has sent something to a peer, for the first time in some seconds.
    pub(super) fn handle_active(&mut self, key: &NodePublic, now: Instant) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        if peer.spec.disco.is_none() {
            return;
        }
        peer.active = Some(now);
        self.active = Some(now);
        if peer.heartbeat.is_none() {
            peer.heartbeat = Some(now + super::peer::HEARTBEAT);
        }
        if !peer.is_trusted(now) && peer.wants_search(now) {
            self.search(key, true, now);
        }
        self.seek_relays(key, now);
        self.settle(key, now);
    }

    /// The relay of a region can be reached, or cannot, and why.
    pub(super) fn handle_relay(&mut self, region: u32, down: Option<String>, now: Instant) {
        let was = self.down.contains_key(&region);
        let is = down.is_some();
        match down {
            Some(why) => self.down.insert(region, why),
            None => self.down.remove(&region),
        };
        self.changed = true;
        if was != is {
            self.settle_region(region, now);
        }
    }

    /// The relay of a region has answered after so long.
    pub(super) fn handle_latency(&mut self, region: u32, latency: Duration, now: Instant) {
        let home = self.rounds.home();
        let down = home.is_some_and(|home| self.down.contains_key(&home));
        let may_move = self.heard;
        self.rounds
            .handle_latency(region, latency, down, may_move, now);
        self.say_home();
    }

    /// The relay of a region says what is wrong; nothing if `text` is empty.
    pub(super) fn handle_health(&mut self, region: u32, text: String) {
        match text.is_empty() {
            true => self.ill.remove(&region),
            false => self.ill.insert(region, text),
        };
        self.changed = true;
    }

    /// The relay of a region says that it does not know a peer.
    pub(super) fn handle_gone(&mut self, region: u32, key: &NodePublic, now: Instant) {
        if let Some(peer) = self.peers.get_mut(key) {
            peer.absent = Some((region, now));
            self.settle(key, now);
        }
    }

    fn settle_region(&mut self, region: u32, now: Instant) {
        let near = |(_, peer): &(&NodePublic, &Peer)| {
            peer.spec.home == Some(region) || peer.heard_through == Some(region)
        };
        let keys: Vec<_> = self
            .peers
            .iter()
            .filter(near)
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            self.settle(&key, now);
        }
    }

    fn tell_again(&mut self, key: &NodePublic, now: Instant) {
        if let Some(peer) = self.peers.get_mut(key) {
            peer.told = None;
            self.settle(key, now);
        }
    }

    /// Has the engine told which way a peer is reached, and the peer looked at in time.
    fn settle(&mut self, key: &NodePublic, now: Instant) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        let lost = lost(&self.regions, &self.down);
        let ways = match peer.spec.wireguard_only {
            // It speaks no disco, so nothing tells which of its addresses answers.
            true => {
                let mut all = peer.candidates.iter().map(|candidate| candidate.address);
                let reachable = |at: &SocketAddr| self.rounds.has[usize::from(at.is_ipv6())];
                all.find(reachable).map(Path::Udp).map(Ways::one)
            }
            false => peer.choose(lost, now),
        };
        if let Some(ways) = ways
            && peer.told != Some(ways)
        {
            let before = peer.told.replace(ways);
            let moved = before.is_some_and(|before| before.path != ways.path);
            self.events.push_back(Event::Path {
                peer: (*key).into(),
                ways,
                moved: moved && peer.is_active(now),
            });
        }
        let trusted = peer.trusted_until.filter(|_| peer.best.is_some());
        let due = [peer.heartbeat, trusted].into_iter().flatten().min();
        if let Some(due) = due
            && peer.due.is_none_or(|known| due < known)
        {
            peer.due = Some(due);
            self.deadlines.push(Reverse((due, *key)));
        }
        if peer.is_active(now) || peer.best.is_some() {
            self.awake.insert(*key);
        } else {
            self.awake.remove(key);
        }
        self.changed = true;
    }

    /// Looks at a peer whose time has come.
    fn tend(&mut self, key: &NodePublic, now: Instant) {
        let Some(peer) = self.peers.get_mut(key) else {
            return;
        };
        let lost = peer.trusted_until.is_some_and(|until| until <= now);
        if lost {
            peer.trusted_until = None;
            // What was found lately was found without this one.
            peer.patience = PING_AGAIN;
        }
        let is_active = peer.is_active(now);
        let beats = peer.heartbeat.is_some_and(|at| at <= now);
        if beats && is_active {
            peer.heartbeat = Some(now + super::peer::HEARTBEAT);
            if let Some(best) = peer.best {
                self.beat(key, best.path, None, now);
            }
        } else if beats {
            peer.heartbeat = None;
        }
        let wants = |peer: &Peer| is_active && peer.wants_search(now);
        if (beats || lost) && self.peers.get(key).is_some_and(wants) {
            self.search(key, true, now);
        }
        if (beats || lost) && is_active {
            self.seek_relays(key, now);
        }
        self.settle(key, now);
    }

    /// When [`Paths::handle_timeout`] has something to do.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let peers = self.deadlines.peek().map(|Reverse((at, _))| *at);
        let timeouts = [
            peers,
            self.pings.poll_timeout(),
            self.tries.poll_timeout(),
            self.serving_due(),
            self.round_due(),
        ];
        timeouts.into_iter().flatten().min()
    }

    /// When there is something to do for rounds.
    fn round_due(&self) -> Option<Instant> {
        self.own.as_ref()?;
        if self.rounds.is_running() {
            return self.rounds.poll_timeout();
        }
        if !self.rounds.has_servers() {
            return None;
        }
        let finished = self.rounds.finished()?;
        let idle = finished + FULL;
        let busy = self.active.and_then(|active| {
            let next = finished + self.pause;
            (next.saturating_duration_since(active) <= SESSION).then_some(next)
        });
        Some(busy.unwrap_or(idle))
    }

    /// Does what is due.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        while let Some(Reverse((at, key))) = self.deadlines.peek().copied()
            && at <= now
        {
            self.deadlines.pop();
            if let Some(peer) = self.peers.get_mut(&key)
                && peer.due == Some(at)
            {
                peer.due = None;
                self.tend(&key, now);
            }
        }
        self.expire_pings(now);
        self.tend_tries(now);
        self.tend_serving(now);
        if self.round_due().is_some_and(|due| due <= now) {
            if !self.rounds.is_running() {
                let full = self.rounds.full_age(now).is_none_or(|age| age >= FULL);
                if full {
                    self.resolve();
                }
                self.rounds.start(full, now);
            }
            self.go_on_with_round(now);
        }
    }

    /// Sends what a round wants sent, and takes its end.
    fn go_on_with_round(&mut self, now: Instant) {
        while let Some((server, transaction)) = self.rounds.poll_request(now, || {
            let mut transaction = [0; 12];
            (self.random)(&mut transaction).then_some(transaction)
        }) {
            self.transmits.push_back(Transmit {
                to: Way::Udp(server, None),
                bytes: stun::request(&transaction),
            });
        }
        let Some(found) = self.rounds.finish(self.heard, now).cloned() else {
            return;
        };
        let mut byte = [0];
        (self.random)(&mut byte);
        self.pause = pause(byte[0]);
        for id in self.netchecks.drain(..) {
            let found = Box::new(found.clone());
            self.events.push_back(Event::Netcheck(id, found));
        }
        if !self.say_home() {
            self.say_net_info(&found);
        }
        let far = self.rounds.poll_far(now);
        if !far.is_empty() {
            self.events.push_back(Event::Measure(far));
        }
        self.say_endpoints(now);
        for key in std::mem::take(&mut self.to_call) {
            self.call(&key, now);
        }
        self.changed = true;
    }

    /// A look at the network for somebody.
    pub(super) fn netcheck(&mut self, id: u64, now: Instant) {
        if self.own.is_none() || !self.rounds.has_servers() {
            let nothing = Event::Netcheck(id, Box::default());
            self.events.push_back(nothing);
            return;
        }
        self.netchecks.push(id);
        self.rounds.start(true, now);
    }

    /// The next datagram to be sent.
    pub(super) fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next thing for others.
    pub(super) fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The kernel has let a datagram go by IPv4, or IPv6.
    pub(super) fn handle_sent(&mut self, v4: bool) {
        self.rounds.can_send[usize::from(!v4)] = true;
    }
}

/// Tells the regions through which nobody is reached: those whose relay is down, and those that the map has not, once there
/// is one. A peer may be slower to hear of a map than this node.
fn lost<'a>(
    regions: &'a BTreeMap<u32, String>,
    down: &'a BTreeMap<u32, String>,
) -> impl Fn(u32) -> bool + Copy + 'a {
    move |region| {
        down.contains_key(&region) || !(regions.is_empty() || regions.contains_key(&region))
    }
}

/// 20 to 26 s, by a random byte, as `magicsock` has it: NATs are said to forget after 30.
fn pause(byte: u8) -> Duration {
    Duration::from_secs(20) + Duration::from_millis(23 * u64::from(byte))
}

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

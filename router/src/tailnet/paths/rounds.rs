//! STUN: rounds of requests to the relays' servers tell how this node looks from outside, and how far each region is.
//!
//! After `net/netcheck`. A full round asks all regions, the others the nearest and the home; each request is repeated
//! until it is answered or the round is over.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use super::Netcheck;
use super::home::{Home, Measured, WINDOW};
use crate::tailnet::stun::Transaction;
use crate::tailnet::wire::{DerpMap, DerpNode, each, entries};

/// When a request goes, after the round's start: twice is enough where nothing is lost.
const TRIES: [Duration; 3] = [
    Duration::ZERO,
    Duration::from_millis(200),
    Duration::from_millis(600),
];
/// A round's end, whoever has not answered.
const PATIENCE: Duration = Duration::from_secs(3);
/// After answers of so many regions the rest has as long again as those have taken.
const ENOUGH: usize = 3;
/// The least that the rest has.
const GRACE: Duration = Duration::from_millis(100);
/// Between two looks at how far relays are where STUN tells nothing.
const FAR: Duration = Duration::from_secs(300);
/// Regions that a round asks that is not full, beside the home.
const NEAREST: usize = 3;
/// How long what was seen holds when no newer answer comes.
pub(super) const KEPT: Duration = Duration::from_secs(300);

/// A server.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Server {
    host: String,
    v4: Address,
    v6: Address,
    port: u16,
}

/// Where a server is in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Address {
    Known(IpAddr),
    /// DNS knows.
    Ask,
    None,
}

impl Server {
    fn from_wire(node: &DerpNode) -> Option<Self> {
        let port = match node.stun_port.unwrap_or(0) {
            0 => 3478,
            port => u16::try_from(port).ok()?,
        };
        let test = node.stun_test_ip.as_deref().unwrap_or_default();
        if let Ok(ip) = test.parse::<IpAddr>() {
            let of = |family: bool| match ip.is_ipv4() == family {
                true => Address::Known(ip),
                false => Address::None,
            };
            return Some(Self {
                host: String::new(),
                v4: of(true),
                v6: of(false),
                port,
            });
        }
        let of = |text: &Option<String>, v4: bool| match text.as_deref().unwrap_or_default() {
            "" => Address::Ask,
            text => match text.parse::<IpAddr>() {
                Ok(ip) if ip.is_ipv4() == v4 => Address::Known(ip),
                _ => Address::None,
            },
        };
        Some(Self {
            host: node.host_name.clone().unwrap_or_default(),
            v4: of(&node.ipv4, true),
            v6: of(&node.ipv6, false),
            port,
        })
    }

    fn at(&self, v4: bool, names: &HashMap<String, Vec<IpAddr>>) -> Option<SocketAddr> {
        let ip = match if v4 { self.v4 } else { self.v6 } {
            Address::Known(ip) => ip,
            Address::Ask => {
                let all = names.get(&self.host)?;
                *all.iter().find(|ip| ip.is_ipv4() == v4)?
            }
            Address::None => return None,
        };
        Some(SocketAddr::new(ip, self.port))
    }
}

/// A request that is to go, or has gone.
#[derive(Clone, Copy, Debug)]
struct Probe {
    at: Instant,
    region: u32,
    server: SocketAddr,
}

#[derive(Debug)]
struct Round {
    full: bool,
    started: Instant,
    /// What is to go, soonest first.
    plan: VecDeque<Probe>,
    sent: HashMap<Transaction, Probe>,
    /// Who has answered by which family.
    answered: BTreeSet<(u32, bool)>,
    /// Who is asked.
    asked: BTreeSet<(u32, bool)>,
    ends: Instant,
    found: Netcheck,
    /// How each server has seen us by IPv4.
    seen: BTreeMap<SocketAddr, SocketAddr>,
}

/// All rounds.
#[derive(Debug, Default)]
pub(super) struct Rounds {
    regions: BTreeMap<u32, Vec<Server>>,
    names: HashMap<String, Vec<IpAddr>>,
    round: Option<Round>,
    home: Home,
    /// When the last round ended.
    finished: Option<Instant>,
    /// When the last full one began.
    full: Option<Instant>,
    last: Option<Netcheck>,
    /// Round trips over connections to relays, for when STUN is not answered, and when they were measured.
    relayed: BTreeMap<u32, (Instant, Duration)>,
    /// When those were asked for.
    measured: Option<Instant>,
    /// How we were seen last, by IPv4 and IPv6, and when.
    seen: [Option<(Instant, SocketAddr)>; 2],
    /// The kernel has let a datagram go, by IPv4 and IPv6.
    pub(super) can_send: [bool; 2],
    /// This machine has an address of the family.
    pub(super) has: [bool; 2],
}

impl Rounds {
    /// Takes the relays. True if something is different for rounds.
    pub(super) fn set_map(&mut self, map: &DerpMap) -> bool {
        let mut regions = BTreeMap::new();
        for (text, region) in entries(&map.regions) {
            let Ok(number) = text.parse::<u32>() else {
                continue;
            };
            if region.no_measure_no_home == Some(true) {
                continue;
            }
            let servers: Vec<_> = each(&region.nodes).filter_map(Server::from_wire).collect();
            regions.insert(number, servers);
        }
        self.home.set_map(map);
        let changed = self.regions != regions;
        self.regions = regions;
        changed
    }

    /// Names whose addresses are wanted.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        let servers = self.regions.values().flatten();
        let ask = |server: &&Server| server.v4 == Address::Ask || server.v6 == Address::Ask;
        servers
            .filter(ask)
            .map(|server| server.host.as_str())
            .filter(|host| !host.is_empty())
            .collect()
    }

    /// Takes the addresses of names. True if some are news.
    pub(super) fn resolved(&mut self, names: Vec<(String, Vec<IpAddr>)>) -> bool {
        let mut changed = false;
        for (name, addresses) in names {
            let old = self.names.insert(name, addresses.clone());
            changed |= old.as_ref() != Some(&addresses);
        }
        changed
    }

    /// Ends the round under way without an outcome.
    pub(super) fn cancel(&mut self) {
        self.round = None;
    }

    /// Whether somebody can be asked.
    pub(super) fn has_servers(&self) -> bool {
        self.regions.values().any(|servers| !servers.is_empty())
    }

    /// Whether a round is under way.
    pub(super) fn is_running(&self) -> bool {
        self.round.is_some()
    }

    /// When the last round ended.
    pub(super) fn finished(&self) -> Option<Instant> {
        self.finished
    }

    /// How long ago the last round ended.
    pub(super) fn age(&self, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.finished?))
    }

    /// How long ago the last full round began.
    pub(super) fn full_age(&self, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.full?))
    }

    /// What the last round found.
    pub(super) fn last(&self) -> Option<&Netcheck> {
        self.last.as_ref()
    }

    /// The home region that was chosen.
    pub(super) fn home(&self) -> Option<u32> {
        self.home.current()
    }

    /// Chooses a home as long as there is none, or the one there is has gone. `spread` has different nodes choose
    /// differently.
    pub(super) fn need_home(&mut self, spread: u64) {
        self.home.need(spread);
    }

    /// The network is another one.
    pub(super) fn forget(&mut self) {
        self.round = None;
        self.seen = [None; 2];
        self.full = None;
        self.finished = None;
        self.relayed.clear();
        self.measured = None;
        self.home.forget();
    }

    /// Regions whose relays should be asked how far they are, for no STUN server answers: now and then, as each
    /// costs a connection.
    pub(super) fn poll_far(&mut self, now: Instant) -> BTreeSet<u32> {
        let recent = |at: Instant| now.saturating_duration_since(at) < FAR;
        let blind = self.last.as_ref().is_some_and(|last| !last.udp);
        if !blind || self.measured.is_some_and(recent) {
            return BTreeSet::new();
        }
        self.measured = Some(now);
        self.home.eligible().collect()
    }

    /// The relay of a region has answered over its connection. As long as UDP gets nowhere that chooses the home,
    /// but not before the home has answered itself or cannot (`home_is_down`): who answers first need not be near.
    pub(super) fn handle_latency(
        &mut self,
        region: u32,
        latency: Duration,
        home_is_down: bool,
        may_move: bool,
        now: Instant,
    ) {
        self.relayed.insert(region, (now, latency));
        let latency = self.by_relays(now);
        let knows = self.knows_home(&latency);
        let Some(last) = self.last.as_mut().filter(|last| !last.udp) else {
            return;
        };
        last.latency.clone_from(&latency);
        if knows || home_is_down {
            self.home.measured(Measured { at: now, latency }, may_move);
            last.preferred = self.home.nearest();
        }
    }

    fn knows_home(&self, latency: &BTreeMap<u32, Duration>) -> bool {
        self.home().is_none_or(|home| latency.contains_key(&home))
    }

    /// What relays have measured lately.
    fn by_relays(&mut self, now: Instant) -> BTreeMap<u32, Duration> {
        self.relayed
            .retain(|_, (at, _)| now.saturating_duration_since(*at) < WINDOW);
        let all = self.relayed.iter();
        all.map(|(region, (_, latency))| (*region, *latency))
            .collect()
    }

    /// Begins a round. A full one takes the place of another; else one that is under way goes on.
    pub(super) fn start(&mut self, full: bool, now: Instant) {
        let answered = |last: &&Netcheck| last.udp && !last.latency.is_empty();
        let last = self.last.as_ref().filter(answered);
        let full = full || last.is_none();
        if self.round.as_ref().is_some_and(|round| round.full >= full) {
            return;
        }
        let mut regions: Vec<u32> = self.regions.keys().copied().collect();
        if let Some(last) = last.filter(|_| !full) {
            let far = |region: &u32| last.latency.get(region).copied();
            regions.retain(|region| far(region).is_some() || self.home() == Some(*region));
            regions.sort_by_key(|region| far(region).unwrap_or(Duration::MAX));
            let home = self.home();
            let mut count = 0;
            regions.retain(|region| {
                count += 1;
                count <= NEAREST || Some(*region) == home
            });
        }
        let mut plan = Vec::new();
        for region in regions {
            let servers = self.regions.get(&region).map_or(&[][..], Vec::as_slice);
            for v4 in [true, false] {
                if !self.has[usize::from(!v4)] {
                    continue;
                }
                let at: Vec<_> = servers
                    .iter()
                    .filter_map(|server| server.at(v4, &self.names))
                    .collect();
                let tries = TRIES.iter().zip(at.iter().cycle());
                plan.extend(tries.map(|(after, server)| Probe {
                    at: now + *after,
                    region,
                    server: *server,
                }));
            }
        }
        plan.sort_by_key(|probe| probe.at);
        self.round = Some(Round {
            full,
            started: now,
            asked: plan
                .iter()
                .map(|probe| (probe.region, probe.server.is_ipv4()))
                .collect(),
            // With nobody to ask it is over at once.
            ends: if plan.is_empty() { now } else { now + PATIENCE },
            plan: plan.into(),
            sent: HashMap::new(),
            answered: BTreeSet::new(),
            found: Netcheck::default(),
            seen: BTreeMap::new(),
        });
        if full {
            self.full = Some(now);
        }
    }

    /// When there is something to do for the round under way.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let round = self.round.as_ref()?;
        let next = round.plan.front().map(|probe| probe.at);
        Some(next.map_or(round.ends, |next| next.min(round.ends)))
    }

    /// The next request that is due: to whom, with a transaction of `random`.
    pub(super) fn poll_request(
        &mut self,
        now: Instant,
        random: impl FnOnce() -> Option<Transaction>,
    ) -> Option<(SocketAddr, Transaction)> {
        let round = self.round.as_mut()?;
        while let Some(probe) = round.plan.front().copied().filter(|probe| probe.at <= now) {
            round.plan.pop_front();
            let is_answered = round
                .answered
                .contains(&(probe.region, probe.server.is_ipv4()));
            if !is_answered {
                let transaction = random()?;
                round.sent.insert(transaction, Probe { at: now, ..probe });
                return Some((probe.server, transaction));
            }
        }
        None
    }

    /// Takes a response: `mapped` is how the server sees us. One that nobody has asked for is passed over.
    pub(super) fn handle_response(
        &mut self,
        transaction: &Transaction,
        mapped: SocketAddr,
        received: Instant,
    ) {
        let home = self.home();
        let Some(round) = &mut self.round else {
            return;
        };
        let Some(probe) = round.sent.remove(transaction) else {
            return;
        };
        let v4 = probe.server.is_ipv4();
        if mapped.is_ipv4() != v4 || mapped.port() == 0 || mapped.ip().is_unspecified() {
            return;
        }
        let latency = received.saturating_duration_since(probe.at);
        let found = &mut round.found;
        found.udp = true;
        let own = if v4 {
            found.ipv4 = true;
            found.global4.get_or_insert(mapped);
            round.seen.insert(probe.server, mapped);
            &mut found.latency4
        } else {
            found.ipv6 = true;
            found.global6.get_or_insert(mapped);
            &mut found.latency6
        };
        for all in [own, &mut found.latency] {
            let least = all.entry(probe.region).or_insert(latency);
            *least = latency.min(*least);
        }
        self.seen[usize::from(!v4)] = Some((received, mapped));
        round.answered.insert((probe.region, v4));
        if round.answered == round.asked {
            round.ends = received;
        } else if found.latency.len() >= ENOUGH
            && home.is_none_or(|home| found.latency.contains_key(&home))
        {
            // One lost datagram is no reason to leave the home.
            let taken = received.saturating_duration_since(round.started);
            round.ends = round.ends.min(received + taken.max(GRACE));
        }
    }

    /// Ends the round if it is over. `may_move`: the coordination server would hear of another home.
    pub(super) fn finish(&mut self, may_move: bool, now: Instant) -> Option<&Netcheck> {
        let round = self.round.take_if(|round| round.ends <= now)?;
        let mut found = round.found;
        found.taken = Some(SystemTime::now());
        found.ipv4_can_send = self.can_send[0];
        found.ipv6_can_send = self.can_send[1];
        found.os_has_ipv6 = self.has[1];
        if round.seen.len() > 1 {
            let all: BTreeSet<_> = round.seen.values().collect();
            found.mapping_varies = Some(all.len() > 1);
        } else if let Some(last) = &self.last {
            // A single answer tells nothing new.
            found.mapping_varies = last.mapping_varies.filter(|_| found.ipv4);
        }
        if !found.udp {
            found.latency = self.by_relays(now);
        }
        if found.udp || found.latency.is_empty() || self.knows_home(&found.latency) {
            let latency = found.latency.clone();
            self.home.measured(Measured { at: now, latency }, may_move);
        }
        found.preferred = self.home.nearest();
        self.finished = Some(now);
        self.last = Some(found);
        self.last.as_ref()
    }

    /// How this node was seen lately, and whether the NAT is known to show each destination another address.
    pub(super) fn seen(&self, now: Instant) -> (impl Iterator<Item = SocketAddr>, bool) {
        let recent = move |seen: &(Instant, SocketAddr)| {
            (now.saturating_duration_since(seen.0) < KEPT).then_some(seen.1)
        };
        let varies = self.last.as_ref().and_then(|last| last.mapping_varies);
        let all = self.seen.into_iter().flatten();
        (
            all.filter_map(move |seen| recent(&seen)),
            varies == Some(true),
        )
    }
}

#[cfg(test)]
mod tests;

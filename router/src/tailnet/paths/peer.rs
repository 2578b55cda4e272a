//! One peer: where it may be, what has answered, and which way is taken.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::PathPeer;
use super::budget::Budget;
use crate::engine::{Path, RelayId};
use crate::tailnet::disco::Transaction;
use crate::tailnet::keys::DiscoPublic;

/// How long an answer makes a direct path trusted: two heartbeats and the time for their answers.
pub(super) const TRUST: Duration = Duration::from_millis(6500);
/// Between two pings to the path that is used, while there is traffic.
pub(super) const HEARTBEAT: Duration = Duration::from_secs(3);
/// Traffic is over when none has been for so long.
pub(super) const SESSION: Duration = Duration::from_secs(45);
/// No address is asked more often when all of them are.
pub(super) const PING_AGAIN: Duration = Duration::from_secs(5);
/// Between two looks for something better than a direct path.
pub(super) const UPGRADE: Duration = Duration::from_secs(60);
/// A path so fast is not looked for something better.
pub(super) const GOOD_ENOUGH: Duration = Duration::from_millis(5);
/// Between two looks for places on peer relays, while no path is trusted.
const SEEK_AGAIN: Duration = Duration::from_secs(30);
/// How long a relay is believed that it does not know a peer.
const ABSENT: Duration = Duration::from_secs(60);
/// Addresses of one peer. Tailscale's peers tell some ten.
const CANDIDATES: usize = 48;
/// One ping for each candidate, and then five a second.
const PINGS: (Duration, u32) = (Duration::from_millis(200), 2 * CANDIDATES as u32);
/// Pings to where nothing but a ping of the peer has come from: whoever has recorded one sends it from anywhere.
const STRANGE: (Duration, u32) = (Duration::from_secs(1), 8);

/// An address where a peer may be.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) address: SocketAddr,
    /// The coordination server says so.
    pub(super) listed: bool,
    /// The peer's last call-me-maybe says so.
    pub(super) called: bool,
    /// It has pinged from there, then and with that.
    pub(super) pinged_us: Option<(Instant, Transaction)>,
    /// When it was pinged.
    pub(super) pinged: Option<Instant>,
    /// What the last answer took.
    pub(super) latency: Option<Duration>,
}

impl Candidate {
    fn new(address: SocketAddr) -> Self {
        Self {
            address,
            listed: false,
            called: false,
            pinged_us: None,
            pinged: None,
            latency: None,
        }
    }

    fn is_wanted(&self, now: Instant) -> bool {
        let pinged_us = |(at, _): (Instant, _)| now.saturating_duration_since(at) < SESSION;
        self.listed || self.called || self.pinged_us.is_some_and(pinged_us)
    }

    /// Whether it was not asked just now.
    pub(super) fn may_be_pinged(&self, now: Instant) -> bool {
        self.pinged
            .is_none_or(|at| now.saturating_duration_since(at) >= PING_AGAIN)
    }
}

/// A path by UDP that has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Best {
    pub(super) path: Path,
    pub(super) latency: Duration,
    /// Of a path by a peer relay: that one's key.
    pub(super) server: Option<DiscoPublic>,
}

impl Best {
    /// A direct path.
    pub(super) fn direct(address: SocketAddr, latency: Duration) -> Self {
        Self {
            path: Path::Udp(address),
            latency,
            server: None,
        }
    }

    /// The peer's own address, if it is a direct path.
    pub(super) fn address(self) -> Option<SocketAddr> {
        self.path.endpoint()
    }

    /// Latency, with what speaks for an address: private ones cost no traffic in a cloud, and IPv6 has fewer NATs.
    /// A millisecond more keeps neighbours of a fast network from taking turns.
    fn cost(self) -> u128 {
        let ip = match self.path {
            Path::Udp(at) | Path::PeerRelay(at, _) => at.ip(),
            Path::Relay(_) => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        };
        let percent = match ip {
            IpAddr::V4(ip) if ip.is_loopback() => 50,
            IpAddr::V4(ip) if ip.is_link_local() => 70,
            IpAddr::V4(ip) if ip.is_private() => 80,
            IpAddr::V4(_) => 100,
            IpAddr::V6(ip) if ip.is_loopback() => 45,
            IpAddr::V6(ip) if ip.is_unicast_link_local() => 65,
            IpAddr::V6(ip) if ip.is_unique_local() => 75,
            IpAddr::V6(_) => 90,
        };
        (self.latency + Duration::from_millis(1)).as_micros() * percent
    }

    /// Whether it is worth to leave `other` for it. A direct path always is, for it takes nobody else's bandwidth.
    pub(super) fn is_better_than(self, other: Self) -> bool {
        let direct = [self, other].map(|best| best.address().is_some());
        match direct {
            [true, false] => true,
            [false, true] => false,
            _ => self.cost() * 100 < other.cost() * 95,
        }
    }
}

/// The ways that packets to a peer take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ways {
    pub(super) path: Path,
    /// Beside a relay, all of them go this way as well.
    pub(super) also: Option<Path>,
}

impl Ways {
    /// One way.
    pub(super) fn one(path: Path) -> Self {
        Self { path, also: None }
    }
}

/// A peer.
#[derive(Debug)]
pub(super) struct Peer {
    /// Without the endpoints, which are candidates.
    pub(super) spec: PathPeer,
    pub(super) candidates: Vec<Candidate>,
    pub(super) best: Option<Best>,
    /// The best has answered lately.
    pub(super) trusted_until: Option<Instant>,
    /// When a packet for it was sent last, as far as the engine has told.
    pub(super) active: Option<Instant>,
    /// When the next heartbeat is due; none while there is no traffic.
    pub(super) heartbeat: Option<Instant>,
    /// When all candidates were asked.
    pub(super) searched: Option<Instant>,
    /// How long until they are asked again, while none has answered.
    pub(super) patience: Duration,
    /// When it was called by a call-me-maybe.
    pub(super) called: Option<Instant>,
    /// When places on peer relays were asked for.
    pub(super) relays_sought: Option<Instant>,
    /// When its own was heeded.
    pub(super) heeded: Option<Instant>,
    /// The relay that a message of it came through.
    pub(super) heard_through: Option<u32>,
    /// A relay that does not know it.
    pub(super) absent: Option<(u32, Instant)>,
    /// What the engine was told.
    pub(super) told: Option<Ways>,
    /// When it is in the heap of deadlines.
    pub(super) due: Option<Instant>,
    /// When a message of disco came from it.
    pub(super) last_disco: Option<Instant>,
    /// Round trip through the relay, where that was measured.
    pub(super) relay_latency: Option<Duration>,
    pub(super) budget: Budget,
    pub(super) strange: Budget,
}

/// Whether an address can be a peer's. `tailnet` are the peer's own addresses inside the tunnel.
pub(super) fn is_endpoint(address: SocketAddr, tailnet: &[IpAddr]) -> bool {
    let ip = address.ip().to_canonical();
    let usable = match ip {
        IpAddr::V4(ip) => !ip.is_broadcast(),
        // Without an interface it leads nowhere.
        IpAddr::V6(ip) => !ip.is_unicast_link_local(),
    };
    usable
        && address.port() != 0
        && !ip.is_unspecified()
        && !ip.is_multicast()
        && !ip.is_loopback()
        && !tailnet.contains(&ip)
}

impl Peer {
    /// One that nothing is known of but `spec`.
    pub(super) fn new(spec: PathPeer) -> Self {
        let mut peer = Self {
            spec: PathPeer {
                endpoints: Vec::new(),
                ..spec.clone()
            },
            candidates: Vec::new(),
            best: None,
            trusted_until: None,
            active: None,
            heartbeat: None,
            searched: None,
            patience: PING_AGAIN,
            called: None,
            relays_sought: None,
            heeded: None,
            heard_through: None,
            absent: None,
            told: None,
            due: None,
            last_disco: None,
            relay_latency: None,
            budget: Budget::new(PINGS.0, PINGS.1),
            strange: Budget::new(STRANGE.0, STRANGE.1),
        };
        peer.list(&spec.endpoints);
        peer
    }

    /// Takes the endpoints that the coordination server knows. True if one is new.
    pub(super) fn list(&mut self, endpoints: &[SocketAddr]) -> bool {
        self.mark(endpoints, |candidate, on| candidate.listed = on)
    }

    /// Takes the endpoints of a call-me-maybe, in place of those of the last one. True if one is new.
    pub(super) fn call(&mut self, endpoints: &[SocketAddr]) -> bool {
        self.mark(endpoints, |candidate, on| candidate.called = on)
    }

    fn mark(&mut self, endpoints: &[SocketAddr], set: impl Fn(&mut Candidate, bool)) -> bool {
        for candidate in &mut self.candidates {
            set(candidate, false);
        }
        let mut new = false;
        for endpoint in endpoints.iter().take(CANDIDATES) {
            let (candidate, is_new) = match self.candidate_or_new(*endpoint) {
                Some(found) => found,
                None => continue,
            };
            set(candidate, true);
            new |= is_new;
        }
        new
    }

    /// The candidate of an address. `None` when the address can be nobody's or there are too many.
    pub(super) fn candidate_or_new(
        &mut self,
        address: SocketAddr,
    ) -> Option<(&mut Candidate, bool)> {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        if let Some(at) = self.candidates.iter().position(|c| c.address == address) {
            return Some((&mut self.candidates[at], false));
        }
        if !is_endpoint(address, &self.spec.addresses) {
            return None;
        }
        if self.candidates.len() >= CANDIDATES {
            // One that nobody names any more makes room, or none.
            let best = self.best.and_then(Best::address);
            let idle = |c: &Candidate| !c.listed && !c.called && Some(c.address) != best;
            let at = self.candidates.iter().position(idle)?;
            self.candidates.remove(at);
        }
        self.candidates.push(Candidate::new(address));
        self.candidates
            .last_mut()
            .map(|candidate| (candidate, true))
    }

    /// The candidate of an address.
    pub(super) fn candidate(&mut self, address: SocketAddr) -> Option<&mut Candidate> {
        self.candidates.iter_mut().find(|c| c.address == address)
    }

    /// Forgets candidates that nobody names any more.
    pub(super) fn prune(&mut self, now: Instant) {
        let best = self.best.and_then(Best::address);
        self.candidates
            .retain(|candidate| candidate.is_wanted(now) || Some(candidate.address) == best);
    }

    /// Whether the best path has answered lately.
    pub(super) fn is_trusted(&self, now: Instant) -> bool {
        self.best.is_some() && self.trusted_until.is_some_and(|until| now < until)
    }

    /// The same, and nobody is in between.
    pub(super) fn is_direct(&self, now: Instant) -> bool {
        self.is_trusted(now) && self.best.is_some_and(|best| best.address().is_some())
    }

    /// Whether places on peer relays should be asked for.
    pub(super) fn wants_relays(&self, now: Instant) -> bool {
        let since = self
            .relays_sought
            .map(|at| now.saturating_duration_since(at));
        let pause = match self.is_trusted(now) {
            true => UPGRADE,
            false => SEEK_AGAIN,
        };
        self.spec.relayed && !self.is_direct(now) && since.is_none_or(|since| since >= pause)
    }

    /// Whether there is traffic.
    pub(super) fn is_active(&self, now: Instant) -> bool {
        self.active
            .is_some_and(|at| now.saturating_duration_since(at) <= SESSION)
    }

    /// Whether all candidates should be asked.
    pub(super) fn wants_search(&self, now: Instant) -> bool {
        let Some(searched) = self.searched else {
            return true;
        };
        let since = now.saturating_duration_since(searched);
        match self.best.filter(|_| self.is_trusted(now)) {
            None => since >= self.patience,
            Some(best) if best.address().is_none() => since >= self.patience,
            Some(best) => best.latency > GOOD_ENOUGH && since >= UPGRADE,
        }
    }

    /// An answer came from a candidate after `latency`.
    pub(super) fn answered(&mut self, address: SocketAddr, latency: Duration, now: Instant) {
        let Some(candidate) = self.candidate(address) else {
            return;
        };
        candidate.latency = Some(latency);
        let new = Best::direct(address, latency);
        let best = self.best.filter(|_| self.is_trusted(now));
        if best.is_none_or(|best| best.path == new.path || new.is_better_than(best)) {
            self.best = Some(new);
            self.trusted_until = Some(now + TRUST);
            self.patience = PING_AGAIN;
        }
    }

    /// An answer came by a peer relay. Only that of the path in use counts: any other the relay serves no more.
    pub(super) fn answered_by_relay(&mut self, path: Path, latency: Duration, now: Instant) {
        if let Some(best) = self.best.as_mut().filter(|best| best.path == path) {
            best.latency = latency;
            self.trusted_until = Some(now + TRUST);
        }
    }

    /// A place on a peer relay works. A new one on the same relay takes the place of the old, which it serves no more.
    pub(super) fn found_relay(&mut self, new: Best, now: Instant) {
        let best = self.best.filter(|_| self.is_trusted(now));
        if best.is_none_or(|best| best.server == new.server || new.is_better_than(best)) {
            self.best = Some(new);
            self.trusted_until = Some(now + TRUST);
        }
    }

    /// The network is another one: what has answered means nothing any more. It goes on being taken beside a relay until
    /// it has been asked in vain, for most of what goes is an address that nothing went by.
    pub(super) fn doubt(&mut self) {
        self.trusted_until = None;
        self.searched = None;
        self.called = None;
        self.relays_sought = None;
        self.patience = PING_AGAIN;
        for candidate in &mut self.candidates {
            candidate.pinged = None;
            candidate.latency = None;
        }
    }

    /// The relay through which it can be reached, and whether that is likely to help.
    pub(super) fn relay(&self, is_down: impl Fn(u32) -> bool, now: Instant) -> Option<(u32, bool)> {
        let works = |region: &u32| {
            let absent = self.absent.is_some_and(|(from, at)| {
                from == *region && now.saturating_duration_since(at) < ABSENT
            });
            !absent && !is_down(*region)
        };
        let all = [self.spec.home, self.heard_through];
        let mut regions = all.into_iter().flatten();
        let first = regions.clone().next()?;
        Some(match regions.find(works) {
            Some(region) => (region, true),
            None => (first, false),
        })
    }

    /// The ways to be taken now. Without a trusted path that is a relay: it may be slower, but it is one. As long as
    /// the path that was trusted last has not been given up, it is taken too: it may be as good as ever, as after a
    /// time without traffic.
    pub(super) fn choose(&self, is_down: impl Fn(u32) -> bool, now: Instant) -> Option<Ways> {
        let best = self.best.map(|best| best.path);
        let relay = match self.is_trusted(now) {
            true => None,
            false => self.relay(is_down, now),
        };
        match relay {
            None | Some((_, false)) if best.is_some() => best.map(Ways::one),
            None => None,
            Some((region, _)) => Some(Ways {
                path: Path::Relay(RelayId(region)),
                also: best,
            }),
        }
    }
}

#[cfg(test)]
mod tests;

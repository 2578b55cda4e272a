//! Where a peer is, and where it is looked for when it does not answer. No I/O and no clock.
//!
//! A peer is where it was heard from last. Silence casts doubt on that, step by step: first on our own
//! address that its packets came to (as the kernel's `wg_socket_clear_peer_endpoint_src`), then, after
//! unanswered initiations, on its address. A name may stand for several addresses, of which some are
//! dead: they are tried in turn, and so is the one that the peer was heard from last.
//!
//! Of a peer that does not roam none of this holds: somebody else says where it is.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::engine::forward::batch::Endpoint;
use crate::engine::path::{Path, RelayId};

/// Unanswered initiations after which the next address is tried. One may get lost, or meet a peer
/// that is busy and wants a cookie first.
const PATIENCE: u32 = 2;
/// How long a peer may be silent before an address that it has roamed to is given up for a configured
/// one.
const FORSAKEN: Duration = Duration::from_secs(120);

/// How packets to a peer leave, for somebody who asks the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Way {
    /// Where to.
    pub(crate) remote: SocketAddr,
    /// Our address that the peer's packets came to.
    pub(crate) local: IpAddr,
    /// Index of the interface that they came in by.
    pub(crate) interface: u32,
    /// Packets to the peer leave by another one.
    pub(crate) detour: bool,
}

/// Where a peer is.
#[derive(Debug, Default)]
pub(crate) struct Location {
    /// Where it may be, best first.
    configured: Vec<SocketAddr>,
    /// Where it is taken to be.
    current: Option<Endpoint>,
    /// It is reached through a relay instead.
    relay: Option<RelayId>,
    /// And by `current` as well: nobody knows whether that still leads there.
    both: bool,
    /// Somebody else says where it is: no packet and no silence changes that.
    is_told: bool,
    /// Index of the interface that its packets come in by; 0: it has not been heard there.
    interface: u32,
    /// Packets to it leave by another interface: they take the source that belongs to that one.
    detour: bool,
    /// From when on that may be judged again.
    judge_after: Duration,
    /// Where it was heard from last, if that is not configured.
    roamed: Option<SocketAddr>,
    /// Initiations since it was heard, or another address was tried.
    tries: u32,
    /// When the first went since it was heard.
    silent: Option<Duration>,
    /// It is not where it was heard last: all addresses are tried in turn.
    searching: bool,
}

/// An IPv6 socket of ours cannot reach ::ffff:a.b.c.d.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => (ip, address.port()).into(),
        IpAddr::V6(_) => address,
    }
}

impl Location {
    /// A peer that has not been heard from.
    #[cfg(test)]
    pub(crate) fn new(configured: Vec<SocketAddr>) -> Self {
        let mut location = Self::default();
        location.configure(configured);
        location
    }

    /// Where to send, and from which address of ours if that matters.
    pub(crate) fn endpoint(&self) -> Option<Endpoint> {
        let mut endpoint = self.current?;
        if self.detour {
            endpoint.local = None;
        }
        Some(endpoint)
    }

    /// The relay that it is reached through.
    pub(crate) fn relay(&self) -> Option<RelayId> {
        self.relay
    }

    /// Whether the peer is where it was heard from last.
    pub(crate) fn set_roaming(&mut self, roaming: bool) {
        self.is_told = !roaming;
    }

    /// Whether somebody else says where the peer is.
    pub(crate) fn is_told(&self) -> bool {
        self.is_told
    }

    /// Whether it is reached by its address as well as through the relay.
    pub(crate) fn is_both(&self) -> bool {
        self.both
    }

    /// This is the way to the peer from now on. Of a way through a relay `also` is one by UDP that is taken besides.
    pub(crate) fn set_path(&mut self, path: Path, also: Option<Path>) {
        let relay = match path {
            Path::Relay(relay) => Some(relay),
            Path::Udp(_) | Path::PeerRelay(..) => None,
        };
        let by_udp = match relay {
            None => path.by_udp(),
            Some(_) => also.and_then(Path::by_udp),
        };
        if let Some((remote, number)) = by_udp
            && !self.is_at(canonical(remote), number)
        {
            self.go_to(canonical(remote), number);
        }
        self.both = relay.is_some() && by_udp.is_some();
        self.relay = relay;
        self.tries = 0;
        self.silent = None;
        self.searching = false;
    }

    /// Whether somebody else has said where it is. Until then it is where it is heard from, for it must
    /// be answered.
    fn is_settled(&self) -> bool {
        self.is_told && (self.current.is_some() || self.relay.is_some())
    }

    fn is_at(&self, remote: SocketAddr, number: Option<u32>) -> bool {
        let there = |current: Endpoint| current.remote == remote && current.number == number;
        self.current.is_some_and(there)
    }

    /// The peer is at this address and nowhere else, whoever says so. It has yet to be heard there.
    pub(crate) fn move_to(&mut self, remote: SocketAddr) {
        self.go_to(canonical(remote), None);
        self.relay = None;
        self.both = false;
        self.tries = 0;
        self.silent = None;
        self.searching = false;
    }

    fn go_to(&mut self, remote: SocketAddr, number: Option<u32>) {
        self.current = Some(Endpoint {
            remote,
            local: None,
            number,
        });
        self.interface = 0;
        self.detour = false;
    }

    /// Where the peer was before we were started.
    pub(crate) fn resume(&mut self, path: Path) {
        if self.current.is_some() || self.relay.is_some() {
            return;
        }
        self.set_path(path, None);
        self.roamed = path.endpoint().map(canonical);
    }

    /// Takes new addresses, best first. A peer stays where it is if it may still be there, and
    /// where it has roamed to unless the best address is another one.
    pub(crate) fn configure(&mut self, configured: Vec<SocketAddr>) {
        let configured = configured.into_iter().map(canonical).collect();
        let old = std::mem::replace(&mut self.configured, configured);
        let Some(best) = self.configured.first().copied() else {
            return;
        };
        if self.is_settled() {
            return;
        }
        self.roamed = self.roamed.filter(|at| !self.configured.contains(at));
        let current = self.current.map(|endpoint| endpoint.remote);
        if current.is_some_and(|at| self.configured.contains(&at)) {
            return;
        }
        if current.is_none() || old.first() != Some(&best) {
            self.move_to(best);
        }
    }

    /// Something authentic came from `from`, our address in it being the one that it was sent to, by an interface.
    pub(crate) fn heard(&mut self, from: Endpoint, interface: u32) {
        self.tries = 0;
        self.silent = None;
        self.searching = false;
        let heard = Endpoint {
            remote: canonical(from.remote),
            ..from
        };
        if self.is_settled() && !self.is_at(heard.remote, heard.number) {
            return;
        }
        if !self.is_told {
            // Peer relays are a tailnet's: whoever roams is not there.
            if heard.number.is_some() {
                return;
            }
            self.relay = None;
        }
        if self.current == Some(heard) && self.interface == interface {
            return;
        }
        // What was found of the same address of ours holds until it is judged again.
        self.detour &= self.current.is_some_and(|old| old.local == heard.local);
        self.judge_after = Duration::ZERO;
        self.interface = interface;
        self.current = Some(heard);
        self.roamed = Some(heard.remote).filter(|at| !self.configured.contains(at));
    }

    /// Something authentic came through a relay. Whoever is nowhere else is there.
    pub(crate) fn heard_through(&mut self, relay: RelayId) {
        self.tries = 0;
        self.silent = None;
        if !self.is_settled() && (self.current.is_none() || self.relay.is_some()) {
            self.relay = Some(relay);
        }
    }

    /// The kernel refuses our address that the peer's packets came to, or nothing comes back that
    /// may have been sent from it.
    pub(crate) fn forget_source(&mut self) {
        if let Some(endpoint) = &mut self.current {
            endpoint.local = None;
        }
    }

    /// An initiation goes. `unanswered`: because what went before has brought nothing.
    pub(crate) fn initiates(&mut self, unanswered: bool, now: Duration) {
        if unanswered || self.tries > 0 {
            self.forget_source();
        }
        if self.is_told || self.relay.is_some() {
            return;
        }
        let silent = now.saturating_sub(*self.silent.get_or_insert(now));
        let has_roamed = self.roamed.is_some() && self.roamed == self.current.map(|e| e.remote);
        let enough = if has_roamed && !self.searching {
            silent >= FORSAKEN
        } else {
            self.tries >= PATIENCE
        };
        if enough && let Some(next) = self.next() {
            self.searching = true;
            self.go_to(next, None);
            self.tries = 0;
        }
        self.tries = self.tries.saturating_add(1);
    }

    /// A cookie came: somebody is there.
    pub(crate) fn told_to_wait(&mut self) {
        self.tries = 0;
    }

    /// The address to be tried after the present one.
    fn next(&self) -> Option<SocketAddr> {
        let current = self.current?.remote;
        let all = self.configured.iter().chain(&self.roamed).copied();
        let mut after = all.clone().skip_while(|at| *at != current).skip(1);
        let next = after.next().or_else(|| all.clone().next());
        next.filter(|next| *next != current)
    }

    /// The way that packets to the peer take, if it is time to judge again, `pause` after the last
    /// time, whether they leave by the interface that its own come in by.
    pub(crate) fn way_to_judge(&mut self, pause: Duration, now: Duration) -> Option<Way> {
        if !self.is_doubtful(now) {
            return None;
        }
        self.judge_after = now + pause;
        if self.interface == 0 || self.relay.is_some() {
            return None;
        }
        let Endpoint { remote, local, .. } = self.current?;
        // A link-local address names its interface.
        if matches!(remote, SocketAddr::V6(v6) if v6.scope_id() != 0) {
            return None;
        }
        Some(Way {
            remote,
            local: local?,
            interface: self.interface,
            detour: self.detour,
        })
    }

    /// Whether it is time for [`Location::way_to_judge`].
    pub(crate) fn is_doubtful(&self, now: Duration) -> bool {
        now >= self.judge_after
    }

    /// Takes what has been found of a way.
    pub(crate) fn judge(&mut self, way: &Way) {
        let known = self.current.is_some_and(|endpoint| {
            endpoint.remote == way.remote && endpoint.local == Some(way.local)
        });
        if known && self.interface == way.interface {
            self.detour = way.detour;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const V6: &str = "[2001:db8::2]:51820";
    const V4: &str = "192.0.2.2:51820";
    const ROAMED: &str = "198.51.100.7:4500";

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn seconds(at: u64) -> Duration {
        Duration::from_secs(at)
    }

    fn local() -> Option<IpAddr> {
        Some(IpAddr::from([192, 0, 2, 1]))
    }

    fn heard(location: &mut Location, remote: SocketAddr, local: Option<IpAddr>, interface: u32) {
        let from = Endpoint {
            remote,
            local,
            number: None,
        };
        location.heard(from, interface);
    }

    /// Where initiations go that are sent every five seconds, from `start` on.
    fn tried(location: &mut Location, start: u64, count: u64) -> Vec<String> {
        let times = (0..count).map(|n| start + 5 * n);
        times
            .map(|time| {
                location.initiates(time > start, seconds(time));
                location.endpoint().unwrap().remote.to_string()
            })
            .collect()
    }

    #[test]
    fn all_addresses_of_a_name_are_tried_in_turn_until_one_answers() {
        let mut location = Location::new(vec![at(V6), at(V4)]);
        let tries = tried(&mut location, 0, 6);
        assert_eq!(tries, [V6, V6, V4, V4, V6, V6]);
        assert_eq!(tried(&mut location, 30, 1), [V4]);
        heard(&mut location, at(V4), local(), 2);
        // It stays where it answers, whatever goes on for how long.
        for minute in 1..100 {
            assert_eq!(tried(&mut location, minute * 60, 2), [V4, V4]);
            heard(&mut location, at(V4), local(), 2);
        }
        // That one dies.
        assert_eq!(tried(&mut location, 9000, 4), [V4, V4, V6, V6]);
    }

    #[test]
    fn a_single_address_is_tried_for_ever() {
        let mut location = Location::new(vec![at(V4)]);
        assert_eq!(tried(&mut location, 0, 100), [V4; 100]);
    }

    #[test]
    fn a_peer_that_roamed_is_given_two_minutes() {
        let mut location = Location::new(vec![at(V4)]);
        heard(&mut location, at(ROAMED), local(), 2);
        // Long idle before is no silence.
        let tries = tried(&mut location, 9000, 30);
        assert_eq!(tries[..24], [ROAMED; 24]);
        // Then all are tried.
        assert_eq!(tries[24..], [V4, V4, ROAMED, ROAMED, V4, V4]);
        heard(&mut location, at(ROAMED), local(), 2);
        assert_eq!(tried(&mut location, 20_000, 24), [ROAMED; 24]);
        // Given up after 90 seconds and asked for again later: it is as silent as before.
        heard(&mut location, at(ROAMED), local(), 2);
        assert_eq!(tried(&mut location, 30_000, 18), [ROAMED; 18]);
        assert_eq!(tried(&mut location, 31_000, 1), [V4]);
    }

    #[test]
    fn a_peer_without_a_configured_address_stays_where_it_was_heard() {
        let mut location = Location::new(vec![]);
        location.initiates(false, seconds(0));
        assert_eq!(location.endpoint(), None);
        heard(&mut location, at(ROAMED), local(), 2);
        assert_eq!(tried(&mut location, 0, 100), [ROAMED; 100]);
    }

    #[test]
    fn a_cookie_is_a_sign_of_life() {
        let mut location = Location::new(vec![at(V6), at(V4)]);
        assert_eq!(tried(&mut location, 0, 2), [V6; 2]);
        location.told_to_wait();
        assert_eq!(tried(&mut location, 10, 2), [V6; 2]);
    }

    #[test]
    fn new_addresses_move_whom_they_are_news_for() {
        let mut location = Location::new(vec![at(V6)]);
        let now = |location: &Location| location.endpoint().unwrap().remote;
        location.configure(vec![at(V4), at(V6)]);
        assert_eq!(now(&location), at(V6), "still among them");
        heard(&mut location, at(ROAMED), local(), 2);
        location.configure(vec![at(V4)]);
        assert_eq!(now(&location), at(ROAMED), "the best is the same");
        location.configure(vec![]);
        assert_eq!(now(&location), at(ROAMED));
        location.configure(vec![at(V6), at(V4)]);
        assert_eq!(now(&location), at(V6), "news");
        location.configure(vec![at("[::ffff:192.0.2.9]:7")]);
        assert_eq!(now(&location), at("192.0.2.9:7"));
    }

    #[test]
    fn the_source_is_forgotten_with_every_retry() {
        let mut location = Location::new(vec![at(V4)]);
        heard(&mut location, at(V4), local(), 2);
        assert_eq!(location.endpoint().unwrap().local, local());
        location.initiates(false, seconds(1));
        assert_eq!(location.endpoint().unwrap().local, local());
        location.initiates(true, seconds(6));
        assert_eq!(location.endpoint().unwrap().local, None);
        heard(&mut location, at(V4), local(), 2);
        assert_eq!(location.endpoint().unwrap().local, local());
        // Data without an answer.
        location.initiates(true, seconds(60));
        assert_eq!(location.endpoint().unwrap().local, None);
    }

    #[test]
    fn packets_that_leave_by_another_interface_have_no_source_of_the_first() {
        let mut location = Location::new(vec![at(V4)]);
        assert_eq!(location.way_to_judge(seconds(1), seconds(0)), None);
        heard(&mut location, at(V4), local(), 2);
        let way = location.way_to_judge(seconds(1), seconds(0)).unwrap();
        assert_eq!((way.remote, way.interface), (at(V4), 2));
        assert_eq!(location.way_to_judge(seconds(1), seconds(0)), None);
        location.judge(&Way {
            detour: true,
            ..way
        });
        assert_eq!(location.endpoint().unwrap().local, None);
        // The peer goes on sending to that address, as it does not know.
        heard(&mut location, at(V4), local(), 2);
        assert_eq!(location.endpoint().unwrap().local, None);
        heard(&mut location, at(ROAMED), local(), 3);
        assert_eq!(location.endpoint().unwrap().local, None);
        // A stale verdict.
        location.judge(&Way {
            detour: false,
            ..way
        });
        assert_eq!(location.endpoint().unwrap().local, None);
        // The route comes back.
        let way = location.way_to_judge(seconds(1), seconds(0)).unwrap();
        location.judge(&Way {
            detour: false,
            ..way
        });
        assert_eq!(location.endpoint().unwrap().local, local());
        // Another address is trusted until it is judged.
        location.judge(&Way {
            detour: true,
            ..way
        });
        let other = Some(IpAddr::from([192, 0, 2, 8]));
        heard(&mut location, at(ROAMED), other, 3);
        assert_eq!(location.endpoint().unwrap().local, other);
        let link_local = at("[fe80::1%2]:1");
        heard(&mut location, link_local, other, 2);
        assert_eq!(location.way_to_judge(seconds(1), seconds(9)), None);
    }

    #[test]
    fn a_peer_that_does_not_roam_is_where_it_is_said_to_be() {
        let mut location = Location::new(vec![at(V4), at(V6)]);
        location.set_roaming(false);
        heard(&mut location, at(ROAMED), local(), 2);
        assert_eq!(
            tried(&mut location, 0, 50),
            [V4; 50],
            "not even silence moves it"
        );
        // From where it is said to be it tells our address, as anyone.
        heard(&mut location, at(V4), local(), 2);
        assert_eq!(location.endpoint().unwrap().local, local());
        location.set_path(Path::Udp(at(V4)), None);
        assert_eq!(location.endpoint().unwrap().local, local(), "no news");
        location.set_path(Path::Relay(RelayId(7)), None);
        heard(&mut location, at(V4), local(), 2);
        location.heard_through(RelayId(8));
        assert_eq!(
            location.relay(),
            Some(RelayId(7)),
            "a late packet decides nothing"
        );
        location.configure(vec![at(ROAMED)]);
        assert_eq!(location.relay(), Some(RelayId(7)), "nor do addresses");
        location.set_path(Path::Udp(at(V6)), None);
        assert_eq!(
            (location.relay(), location.endpoint().unwrap().remote),
            (None, at(V6))
        );
    }

    #[test]
    fn a_peer_of_whom_nothing_is_said_yet_is_answered() {
        let mut location = Location::new(vec![]);
        location.set_roaming(false);
        location.heard_through(RelayId(7));
        assert_eq!(location.relay(), Some(RelayId(7)));
        let mut location = Location::new(vec![]);
        location.set_roaming(false);
        heard(&mut location, at(V4), local(), 2);
        assert_eq!(location.endpoint().unwrap().remote, at(V4));
        heard(&mut location, at(ROAMED), local(), 2);
        assert_eq!(location.endpoint().unwrap().remote, at(V4));
    }

    #[test]
    fn a_peer_that_roams_leaves_a_relay_for_an_address_it_is_heard_from() {
        let mut location = Location::new(vec![]);
        location.heard_through(RelayId(1));
        assert_eq!(location.relay(), Some(RelayId(1)));
        heard(&mut location, at(V4), local(), 2);
        assert_eq!(
            (location.relay(), location.endpoint().unwrap().remote),
            (None, at(V4))
        );
        location.heard_through(RelayId(1));
        assert_eq!(location.relay(), None);
    }
}

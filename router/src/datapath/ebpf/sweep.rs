//! Which flows end, and when: one pass over the flow table.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use router_ebpf::abi::{Address, Flow, Side, Tuple};
use router_ebpf::packet::{ICMP, ICMPV6, TCP};

use super::accounts::host;
use super::flows::{Key, Store, partner};
use super::listing::end as endpoint;
use super::policy::Compiled;
use super::settled::Settle;
use crate::datapath::limits::Timeouts;
use crate::datapath::nets::Nets;
use crate::datapath::policy::NewFlow;

/// Above this share of the table, in percent, flows that are hardly in use end early...
const PRESSURE: u64 = 80;
/// ...until the table is emptier than this.
const RELIEF: u64 = 70;

/// Timeout under pressure of TCP connections that are half open or over. Shorter than RFC 5382
/// allows a NAT that has room: the alternative is to refuse new flows.
const HALF_OPEN: Duration = Duration::from_secs(30);

/// How long translated flows keep an external address that is gone: a NIC that is down for a moment
/// loses its IPv6 addresses.
const ADDRESS_AWAY: Duration = Duration::from_secs(30);

/// A next hop counts as used when a packet has gone to it not longer ago.
const IN_USE: Duration = Duration::from_secs(30);

/// A settled entry is read anew when what is known of it is older. Less than every timeout: a flow does
/// not end by what was known of it.
const STALE: Duration = Duration::from_secs(20);
const _: () = assert!(STALE.as_secs() < HALF_OPEN.as_secs());

/// Entries settle that had a packet not longer ago, as most have that are in use ([`Flow::COARSE`]).
const LIVELY: Duration = Duration::from_secs(2);

/// Entries that settle at a time, for one grace period of the kernel.
pub(super) const SETTLING: usize = 1 << 14;

/// Entries that settle in a pass at most, so that whoever waits for its end need not wait for that.
const MOST_SETTLING: usize = 8 * SETTLING;

/// Bits that remember which entries a pass has found in use.
const LIVELY_BITS: usize = 1 << 20;

/// Every so many passes each entry is compared with its partner.
const THOROUGH: u32 = 12;

/// What a pass has seen and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Flows that remain.
    pub(super) flows: u64,
    /// Flows that were idle for too long.
    pub(super) expired: u64,
    /// Flows that were ended early, to make room.
    pub(super) early: u64,
    /// Flows that the policy no longer allows.
    pub(super) denied: u64,
    /// Flows whose external address is gone.
    pub(super) addressless: u64,
    /// Entries without a partner.
    pub(super) strays: u64,
    /// Entries that are settled, of each flow up to two.
    pub(super) settled: u64,
    /// Flows that each overlay address has opened.
    pub(super) sources: HashMap<Address, u32>,
    /// Flows that each host of the subnet side has opened.
    pub(super) hosts: HashMap<Address, u32>,
    /// Interface and hardware address of the next hops in use.
    pub(super) next_hops: HashSet<(u32, [u8; 6])>,
}

/// What ends flows in a pass, beside their age.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Judge<'a> {
    /// The policy, if all flows are to be judged by it.
    pub(super) policy: Option<&'a Compiled>,
    /// Overlay addresses whose flows end, for they were another peer's.
    pub(super) gone: Option<&'a Nets<()>>,
    /// The peers' numbers by allowed IP, which tell whose an address is.
    pub(super) peers: Option<&'a Nets<u32>>,
}

impl Judge<'_> {
    /// Whether an overlay address was another peer's. It was not if a narrower network than the one that
    /// is gone makes it somebody's.
    fn is_of_another(&self, address: &Address) -> bool {
        let host = host(address);
        let gone = self.gone.and_then(|gone| gone.around(&host).next());
        let owner = self.peers.and_then(|peers| peers.around(&host).next());
        gone.is_some_and(|(gone, ())| {
            owner.is_none_or(|(owned, _)| gone.prefix_len() >= owned.prefix_len())
        })
    }

    fn forbids(&self, tuple: &Tuple, flow: &Flow) -> bool {
        self.is_of_another(&tuple.source)
            || self.policy.is_some_and(|policy| {
                let from_overlay = flow.flags & Flow::FROM_SUBNET == 0;
                !policy.allows(from_overlay, &opening(tuple, from_overlay))
            })
    }
}

/// What is kept from one pass over the table of a family to the next.
#[derive(Debug)]
pub(super) struct Sweep<K> {
    timeouts: Timeouts,
    /// Most flows.
    capacity: u64,
    pressure: bool,
    passes: u32,
    /// What translated flows may have as their external address; `None`: not known yet.
    addresses: Option<Arc<HashSet<Address>>>,
    /// External addresses that are gone, and when that was noticed.
    away: HashMap<Address, u64>,
    /// Entries whose partner was missing: a flow that begins looks so for a moment.
    suspects: HashSet<K>,
    /// Entries without a slot that the last pass has found in use.
    lively: Lively,
    /// When that pass began, in ns of `CLOCK_MONOTONIC`.
    began: u64,
}

/// A set of entries, one bit for those of the same hash: it may hold some more than were put in.
#[derive(Debug, Default)]
struct Lively(Vec<u64>);

impl Lively {
    fn place(key: &impl Hash) -> (usize, u64) {
        let mut hasher = DefaultHasher::new();
        key.hash(&mut hasher);
        let bit = hasher.finish() as usize % LIVELY_BITS;
        (bit / 64, 1 << (bit % 64))
    }

    fn put(&mut self, key: &impl Hash) {
        let (word, bit) = Self::place(key);
        self.0.resize(LIVELY_BITS / 64, 0);
        if let Some(word) = self.0.get_mut(word) {
            *word |= bit;
        }
    }

    fn has(&self, key: &impl Hash) -> bool {
        let (word, bit) = Self::place(key);
        self.0.get(word).is_some_and(|word| word & bit != 0)
    }
}

impl<K: Key> Sweep<K> {
    pub(super) fn new(timeouts: Timeouts, capacity: u32) -> Self {
        Self {
            timeouts,
            capacity: capacity.into(),
            pressure: false,
            passes: 0,
            addresses: None,
            away: HashMap::new(),
            suspects: HashSet::new(),
            lively: Lively::default(),
            began: 0,
        }
    }

    /// Whether flows that are hardly in use end early.
    pub(super) fn pressure(&self) -> bool {
        self.pressure
    }

    /// From now on translated flows may have these external addresses.
    pub(super) fn know(&mut self, addresses: Arc<HashSet<Address>>) {
        self.away.retain(|address, _| !addresses.contains(address));
        self.addresses = Some(addresses);
    }

    /// Goes over the whole table at `now` (ns of `CLOCK_MONOTONIC`) and ends what is due, and what
    /// `judge` forbids.
    pub(super) fn pass(
        &mut self,
        store: &mut impl Settle<K>,
        now: u64,
        judge: &Judge<'_>,
    ) -> io::Result<Tally> {
        let mut tally = Tally::default();
        let mut missing = HashSet::new();
        let thorough = self.is_thorough();
        let (mut cursor, mut entries) = (None, Vec::new());
        let (mut settling, mut room) = (Vec::new(), MOST_SETTLING);
        let mut lively = Lively::default();
        loop {
            store.read(&mut cursor, &mut entries)?;
            for (key, flow) in &mut entries {
                let settled = store.has_settled(key);
                if settled && idle(now, flow.last_used) > STALE {
                    let Some(present) = store.refresh(key)? else {
                        continue;
                    };
                    *flow = present;
                }
                let suspect = self.suspects.contains(key);
                if key.side() == Side::Overlay {
                    if !self.judge(store, now, judge, (key, flow), &mut tally)? {
                        continue;
                    }
                } else if (thorough || suspect) && store.get(&partner(key, flow))?.is_none() {
                    if suspect {
                        store.remove(key)?;
                        tally.strays += 1;
                    } else {
                        missing.insert(*key);
                    }
                    continue;
                }
                if !settled && settles(key.tuple().protocol, flow, now) {
                    // It had packets before the last pass and since. Most flows are over before it would pay.
                    if room > 0 && flow.last_used > self.began && self.lively.has(key) {
                        settling.push((*key, *flow));
                        room -= 1;
                    }
                    lively.put(key);
                }
            }
            if settling.len() >= SETTLING || cursor.is_none() {
                store.settle(&settling)?;
                settling.clear();
            }
            if cursor.is_none() {
                break;
            }
        }
        tally.settled = store.settled();
        self.suspects = missing;
        self.lively = lively;
        self.began = now;
        // Who had them is gone by now.
        self.away
            .retain(|_, since| idle(now, *since) <= ADDRESS_AWAY);
        self.passes = self.passes.wrapping_add(1);
        let share = 100 * tally.flows / self.capacity.max(1);
        self.pressure = share >= PRESSURE || (self.pressure && share >= RELIEF);
        Ok(tally)
    }

    /// Ends the flow of an entry of the overlay side, or counts it; whether it remains.
    fn judge(
        &mut self,
        store: &mut impl Settle<K>,
        now: u64,
        judge: &Judge<'_>,
        (key, flow): (&K, &Flow),
        tally: &mut Tally,
    ) -> io::Result<bool> {
        let tuple = key.tuple();
        if judge.forbids(&tuple, flow) {
            tally.denied += 1;
            return end(store, key, flow).map(|()| false);
        }
        if flow.tcp & Flow::LOST != 0 {
            tally.early += 1;
            return end(store, key, flow).map(|()| false);
        }
        if self.has_lost_address(&tuple, flow, now) {
            tally.addressless += 1;
            return end(store, key, flow).map(|()| false);
        }
        // Reading the partner is a system call: only where this direction alone does not tell.
        if self.is_thorough() || idle(now, flow.last_used) > self.shortest() {
            let Some(other) = store.get(&partner(key, flow))? else {
                // It is made first and goes last.
                tally.strays += 1;
                return store.remove(key).map(|()| false);
            };
            let idle = idle(now, flow.last_used.max(other.last_used));
            if idle > self.timeout(tuple.protocol, flow, &other, false) {
                tally.expired += 1;
                return end(store, key, flow).map(|()| false);
            }
            if self.pressure && idle > self.timeout(tuple.protocol, flow, &other, true) {
                tally.early += 1;
                return end(store, key, flow).map(|()| false);
            }
        }
        tally.flows += 1;
        let (openers, opener) = if flow.flags & Flow::FROM_SUBNET == 0 {
            (&mut tally.sources, tuple.source)
        } else {
            (&mut tally.hosts, tuple.destination)
        };
        *openers.entry(opener).or_default() += 1;
        if flow.link != 0 && idle(now, flow.last_used) < IN_USE {
            let [a, b, c, d, e, f, ..] = flow.hardware;
            tally.next_hops.insert((flow.link, [a, b, c, d, e, f]));
        }
        Ok(true)
    }

    /// Whether the external address of a flow is gone for good, by its entry of the overlay side.
    fn has_lost_address(&mut self, tuple: &Tuple, flow: &Flow, now: u64) -> bool {
        let Some(addresses) = &self.addresses else {
            return false;
        };
        let address = Address {
            family: tuple.source.family,
            octets: flow.address,
        };
        if flow.flags & Flow::SNAT == 0 || addresses.contains(&address) {
            return false;
        }
        idle(now, *self.away.entry(address).or_insert(now)) > ADDRESS_AWAY
    }

    /// Whether this pass compares each entry with its partner.
    fn is_thorough(&self) -> bool {
        self.passes.is_multiple_of(THOROUGH)
    }

    fn shortest(&self) -> Duration {
        let Timeouts {
            tcp,
            tcp_transitory,
            udp,
            icmp,
        } = self.timeouts;
        let least = tcp.min(tcp_transitory).min(udp).min(icmp);
        if self.pressure {
            least.min(HALF_OPEN)
        } else {
            least
        }
    }

    /// How long a flow may be idle, given both its entries.
    fn timeout(&self, protocol: u8, flow: &Flow, other: &Flow, pressure: bool) -> Duration {
        match protocol {
            TCP if !is_established(flow.tcp, other.tcp) => {
                let usual = self.timeouts.tcp_transitory;
                if pressure {
                    usual.min(HALF_OPEN)
                } else {
                    usual
                }
            }
            TCP => self.timeouts.tcp,
            ICMP | ICMPV6 => self.timeouts.icmp,
            _ if pressure => self.timeouts.udp.min(Timeouts::LEAST.udp),
            _ => self.timeouts.udp,
        }
    }
}

/// Whether an entry is worth a slot, if it was the pass before: it is in use now and, of TCP, neither about
/// to begin nor to end.
fn settles(protocol: u8, flow: &Flow, now: u64) -> bool {
    let steady = flow.tcp & (Flow::ACK | Flow::FIN | Flow::RST) == Flow::ACK;
    (protocol != TCP || steady) && idle(now, flow.last_used) <= LIVELY
}

/// What the policy was asked when the flow of an entry of the overlay side began.
fn opening(tuple: &Tuple, from_overlay: bool) -> NewFlow {
    let tuple = if from_overlay {
        *tuple
    } else {
        tuple.reversed()
    };
    let to = endpoint(&tuple.destination, tuple.ports[1]);
    NewFlow {
        source: endpoint(&tuple.source, tuple.ports[0]).ip(),
        destination: to.ip(),
        protocol: tuple.protocol,
        port: to.port(),
    }
}

/// Whether a TCP connection is established, by what both directions have sent (RFC 5382 section 5,
/// RFC 7857 section 2: as long as one side may still send, it is).
pub(super) fn is_established(one: u8, other: u8) -> bool {
    let (both, any) = (one & other, one | other);
    let open = |seen: u8| seen & (Flow::SYN | Flow::ACK) != 0;
    open(one)
        && open(other)
        && any & Flow::ACK != 0
        && both & Flow::FIN == 0
        && any & Flow::RST == 0
}

/// Removes a flow by its entry of the overlay side. That of the subnet side holds the translated port: it goes last, so that
/// nothing is sent from a port which another flow may have got meanwhile.
fn end<K: Key>(store: &mut impl Store<K, Flow>, key: &K, flow: &Flow) -> io::Result<()> {
    store.remove(key)?;
    store.remove(&partner(key, flow))
}

fn idle(now: u64, last_used: u64) -> Duration {
    Duration::from_nanos(now.saturating_sub(last_used))
}

#[cfg(test)]
mod tests;

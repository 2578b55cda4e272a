//! The policy as the programs search it: see [`router_ebpf::policy`].
//!
//! A rule becomes one clause for each different list of ports among its destinations; a clause is
//! all sources of the rule, the destinations with that list, and its protocols with these ports.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;

use ipnet::IpNet;
use router_ebpf::abi::{Address, Prefix};
use router_ebpf::policy::{self as table, Axis, MAX_CLAUSES, NewFlow, Rules, Set};

use super::tables::prefix;
use crate::control::{Policy, Rule};
use crate::datapath::policy::{TCP, UDP, icmp, ports};

/// Why a policy cannot be put in force, worded for an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the rules have more than {MAX_CLAUSES} different lists of ports together; merge rules that \
     differ in nothing but one of `from`, `to` and `protocols`"
)]
pub struct TooManyClauses;

/// A policy in the form of the programs' tables.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    bank: u32,
    /// In order, so that a prefix stands before those within it.
    prefixes: Vec<Node>,
    sets: Vec<Set>,
    /// By clause: the place of its rule in the policy.
    rules: Vec<usize>,
}

/// A prefix on any axis.
#[derive(Clone, Copy, Debug)]
struct Node {
    address: Address,
    /// Bits of `address` that count.
    len: u32,
    /// Place of its set.
    set: u32,
    /// Place of the longest prefix around it.
    around: Option<u32>,
}

impl Node {
    fn holds(&self, address: &Address, len: u32) -> bool {
        self.len <= len && masked(address, self.len) == self.address
    }
}

impl Compiled {
    /// Compiles `policy` for one of the banks.
    pub fn new(policy: &Policy, bank: u32) -> Result<Self, TooManyClauses> {
        let mut compiled = Self {
            bank,
            ..Self::default()
        };
        let mut members: BTreeMap<(Address, u32), Vec<u32>> = BTreeMap::new();
        for (place, rule) in policy.rules.iter().enumerate() {
            for (ports, cidrs) in clauses(rule) {
                let clause = compiled.rules.len();
                if clause == MAX_CLAUSES {
                    return Err(TooManyClauses);
                }
                compiled.rules.push(place);
                for key in keys(bank, rule, &ports, &cidrs) {
                    members
                        .entry((key.address, key.len))
                        .or_default()
                        .push(clause as u32);
                }
            }
        }
        compiled.fill(members);
        Ok(compiled)
    }

    /// Gives each prefix the set of its own clauses and those of the prefixes around it.
    fn fill(&mut self, members: BTreeMap<(Address, u32), Vec<u32>>) {
        let mut places: HashMap<Set, u32> = HashMap::new();
        for ((address, len), own) in members {
            let around = self.innermost(self.prefixes.len(), &address, len);
            let outer = around.and_then(|node| self.node_set(node));
            let mut set = outer.copied().unwrap_or(Set::EMPTY);
            own.into_iter().for_each(|clause| set.insert(clause));
            let place = *places.entry(set).or_insert_with(|| {
                self.sets.push(set);
                self.sets.len() as u32 - 1
            });
            self.prefixes.push(Node {
                address,
                len,
                set: place,
                around,
            });
        }
    }

    /// The place of the longest prefix that holds the first `len` bits of `address`, among those
    /// before place `end`: the last of these, or one around it.
    fn innermost(&self, end: usize, address: &Address, len: u32) -> Option<u32> {
        let mut place = end.checked_sub(1)? as u32;
        loop {
            let node = self.prefixes.get(place as usize)?;
            if node.holds(address, len) {
                return Some(place);
            }
            place = node.around?;
        }
    }

    fn node_set(&self, place: u32) -> Option<&Set> {
        let node = self.prefixes.get(place as usize)?;
        self.sets.get(node.set as usize)
    }

    /// The bank that it is for; zero when it was not compiled from a policy.
    pub fn bank(&self) -> u32 {
        self.bank
    }

    /// By clause: the place of its rule in the policy.
    pub fn rules(&self) -> &[usize] {
        &self.rules
    }

    /// The place of the first rule that lets `flow` through, found as the programs find it.
    pub fn rule(&self, flow: &NewFlow) -> Option<usize> {
        let clause = table::clause(self, self.bank, flow)?;
        self.rules.get(clause as usize).copied()
    }

    /// Entries of the map of prefixes.
    pub(super) fn prefixes(&self) -> impl Iterator<Item = (Prefix, u32)> {
        self.prefixes.iter().map(|node| {
            let Node { address, len, .. } = *node;
            (Prefix { len, address }, self.number(node.set))
        })
    }

    /// Entries of the map of sets.
    pub(super) fn sets(&self) -> impl Iterator<Item = (u32, Set)> {
        (0..)
            .zip(&self.sets)
            .map(|(place, set)| (self.number(place), *set))
    }

    /// The number in the map of the set at `place`, different for each bank.
    fn number(&self, place: u32) -> u32 {
        self.bank << 24 | place
    }
}

impl Rules for Compiled {
    fn set(&self, key: &Prefix) -> Option<&Set> {
        let behind = self
            .prefixes
            .partition_point(|node| (node.address, node.len) <= (key.address, key.len));
        self.node_set(self.innermost(behind, &key.address, key.len)?)
    }
}

/// `address` without the bits beyond the first `len`.
fn masked(address: &Address, len: u32) -> Address {
    let mut bytes = [0; 20];
    let (family, octets) = bytes.split_at_mut(4);
    family.copy_from_slice(&address.family);
    octets.copy_from_slice(&address.octets);
    for (byte, at) in bytes.iter_mut().zip((0..).step_by(8)) {
        let kept = len.saturating_sub(at).min(8);
        *byte &= !(0xff_u16 >> kept) as u8;
    }
    let [f0, f1, f2, f3, octets @ ..] = bytes;
    Address {
        family: [f0, f1, f2, f3],
        octets,
    }
}

/// The different lists of ports of a rule, with the destinations that have them.
fn clauses(rule: &Rule) -> BTreeMap<Vec<(u16, u16)>, Vec<IpNet>> {
    let mut by_cidr: BTreeMap<IpNet, Vec<(u16, u16)>> = BTreeMap::new();
    for destination in &rule.destinations {
        if !destination.ports.is_empty() {
            let ports = (*destination.ports.start(), *destination.ports.end());
            by_cidr
                .entry(destination.cidr.trunc())
                .or_default()
                .push(ports);
        }
    }
    let mut clauses: BTreeMap<Vec<(u16, u16)>, Vec<IpNet>> = BTreeMap::new();
    for (cidr, mut ports) in by_cidr {
        ports.sort_unstable();
        ports.dedup();
        clauses.entry(ports).or_default().push(cidr);
    }
    clauses
}

/// The keys that a clause of `rule` belongs to, on all axes.
fn keys<'a>(
    bank: u32,
    rule: &'a Rule,
    ranges: &'a [(u16, u16)],
    cidrs: &'a [IpNet],
) -> impl Iterator<Item = Prefix> + 'a {
    let of = move |axis, cidr: &IpNet| table::address(bank, axis, prefix(&cidr.trunc()));
    let sources = rule.sources.iter().map(move |cidr| of(Axis::Source, cidr));
    let destinations = cidrs.iter().map(move |cidr| of(Axis::Destination, cidr));
    let families = [(true, Address::v4([0; 4])), (false, Address::v6([0; 16]))];
    let services = families.into_iter().flat_map(move |(ipv4, like)| {
        let mut protocols = if rule.protocols.is_empty() {
            vec![TCP, UDP]
        } else {
            rule.protocols.clone()
        };
        protocols.push(icmp(ipv4));
        protocols.into_iter().flat_map(move |protocol| {
            ranges.iter().flat_map(move |(first, last)| {
                let open = ports(rule, &(*first..=*last), protocol, ipv4);
                let pieces = match open {
                    Some((first, last)) if matches!(protocol, TCP | UDP) => split(first..=last),
                    Some(_) => vec![(0, 0)],
                    None => Vec::new(),
                };
                pieces.into_iter().map(move |(port, bits)| {
                    table::service(bank, &like, protocol, port.to_be_bytes(), bits)
                })
            })
        })
    });
    sources.chain(destinations).chain(services)
}

/// The fewest prefixes that make up a range of ports, each with its number of bits.
fn split(ports: RangeInclusive<u16>) -> Vec<(u16, u32)> {
    let (mut first, end) = (u32::from(*ports.start()), u32::from(*ports.end()) + 1);
    let mut pieces = Vec::new();
    while first < end {
        // As large as its place allows, and as there is room.
        let aligned = first.trailing_zeros().min(16);
        let room = (end - first).ilog2();
        let size = aligned.min(room);
        pieces.push((first as u16, 16 - size));
        first += 1 << size;
    }
    pieces
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;
    use crate::control::Destination;
    use crate::datapath::policy::{self, allows};

    /// A world of 16 addresses in each family, so that prefixes meet.
    fn host(ipv4: bool, number: u8) -> IpAddr {
        if ipv4 {
            Ipv4Addr::new(10, 0, 0, number).into()
        } else {
            Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, number.into()).into()
        }
    }

    fn net() -> impl Strategy<Value = IpNet> {
        (any::<bool>(), 0u8..16, 0u8..=5).prop_map(|(ipv4, number, wider)| {
            let address = host(ipv4, number);
            let longest = if ipv4 { 32 } else { 128 };
            let len = if wider == 5 { 0 } else { longest - wider };
            IpNet::new(address, len).unwrap().trunc()
        })
    }

    /// Ports at which ranges and prefixes begin and end.
    const PORTS: [u16; 12] = [0, 1, 2, 3, 79, 80, 443, 1023, 1024, 32768, 65534, 65535];

    fn ports() -> impl Strategy<Value = RangeInclusive<u16>> {
        let any = (0..PORTS.len(), 0..PORTS.len()).prop_map(|(a, b)| PORTS[a]..=PORTS[b]);
        prop_oneof![2 => Just(0..=u16::MAX), 5 => any]
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let destination = (net(), ports()).prop_map(|(cidr, ports)| Destination { cidr, ports });
        (
            proptest::collection::vec(net(), 0..4),
            proptest::collection::vec(destination, 0..5),
            proptest::sample::subsequence(vec![1u8, 6, 17, 47, 58], 0..3),
        )
            .prop_map(|(sources, destinations, protocols)| Rule {
                sources,
                destinations,
                protocols,
                ..Rule::default()
            })
    }

    fn new_flow() -> impl Strategy<Value = policy::NewFlow> {
        (
            any::<bool>(),
            0u8..18,
            0u8..18,
            proptest::sample::select(vec![1u8, 6, 17, 47, 58, 132]),
            proptest::sample::select(PORTS.to_vec()),
        )
            .prop_map(
                |(ipv4, source, destination, protocol, port)| policy::NewFlow {
                    source: host(ipv4, source),
                    destination: host(ipv4, destination),
                    protocol,
                    port,
                },
            )
    }

    fn as_seen(flow: &policy::NewFlow) -> NewFlow {
        NewFlow {
            source: prefix(&flow.source.into()),
            destination: prefix(&flow.destination.into()),
            protocol: flow.protocol,
            port: flow.port.to_be_bytes(),
        }
    }

    fn only(policy: &Policy, place: usize) -> Policy {
        Policy {
            rules: vec![policy.rules[place].clone()],
            ..Policy::default()
        }
    }

    /// The tables agree with the plain meaning, and the rule that they name is the first.
    fn check(policy: &Policy, compiled: &Compiled, flow: &policy::NewFlow) {
        let found = compiled.rule(&as_seen(flow));
        let wanted = (0..policy.rules.len()).find(|place| allows(&only(policy, *place), flow));
        assert_eq!(found, wanted, "{flow:?} {policy:#?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4000))]

        #[test]
        fn the_tables_mean_what_the_rules_mean(
            rules in proptest::collection::vec(rule(), 1..8),
            flows in proptest::collection::vec(new_flow(), 40),
        ) {
            let policy = Policy { rules, ..Policy::default() };
            let compiled = Compiled::new(&policy, 1).unwrap();
            for flow in &flows {
                check(&policy, &compiled, flow);
            }
        }

        #[test]
        fn ranges_are_split_without_a_gap(a: u16, b: u16) {
            let (first, last) = (a.min(b), a.max(b));
            let mut next = u32::from(first);
            let pieces = split(first..=last);
            prop_assert!(pieces.len() <= 30);
            for (port, bits) in pieces {
                let size = 1u32 << (16 - bits);
                prop_assert_eq!(u32::from(port), next);
                prop_assert_eq!(u32::from(port) % size, 0);
                next += size;
            }
            prop_assert_eq!(next, u32::from(last) + 1);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]

        /// Sets of many words, too.
        #[test]
        fn a_long_list_means_what_its_rules_mean(
            rules in proptest::collection::vec(rule(), 300..1000),
            flows in proptest::collection::vec(new_flow(), 100),
        ) {
            let policy = Policy { rules, ..Policy::default() };
            let compiled = Compiled::new(&policy, 2).unwrap();
            for flow in &flows {
                check(&policy, &compiled, flow);
            }
        }
    }

    fn to(cidr: &str, ports: RangeInclusive<u16>) -> Destination {
        Destination {
            cidr: cidr.parse().unwrap(),
            ports,
        }
    }

    #[test]
    fn destinations_with_the_same_ports_are_one_clause() {
        let rule = Rule {
            sources: vec!["100.64.0.0/10".parse().unwrap()],
            destinations: vec![
                to("10.0.0.1/32", 80..=80),
                to("10.0.0.1/32", 443..=443),
                to("10.0.0.2/32", 443..=443),
                to("10.0.0.2/32", 80..=80),
                to("10.0.0.3/32", 22..=22),
            ],
            ..Rule::default()
        };
        assert_eq!(clauses(&rule).len(), 2);
    }

    #[test]
    fn more_clauses_than_places_are_refused() {
        let one = |port: usize| Rule {
            sources: vec!["100.64.0.0/10".parse().unwrap()],
            destinations: vec![to("10.0.0.0/8", port as u16..=port as u16)],
            protocols: vec![TCP],
            ..Rule::default()
        };
        let rules = |count: usize| Policy {
            rules: (0..count).map(one).collect(),
            ..Policy::default()
        };
        assert!(Compiled::new(&rules(MAX_CLAUSES), 1).is_ok());
        let error = Compiled::new(&rules(MAX_CLAUSES + 1), 1).unwrap_err();
        assert!(error.to_string().contains("4096"), "{error}");
    }

    #[test]
    fn rules_for_the_same_peers_share_a_set() {
        let rules = (1..=1000).map(|port| Rule {
            sources: vec!["100.64.0.0/10".parse().unwrap()],
            destinations: vec![to("10.0.0.0/8", port..=port)],
            protocols: vec![TCP],
            ..Rule::default()
        });
        let policy = Policy {
            rules: rules.collect(),
            ..Policy::default()
        };
        let compiled = Compiled::new(&policy, 1).unwrap();
        // All sources, destinations and ICMP of both families; each port by itself.
        assert_eq!(compiled.sets().count(), 1001);
        assert_eq!(compiled.rules().len(), 1000);
    }
}

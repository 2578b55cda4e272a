#![allow(clippy::unwrap_used)]
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard};

use proptest::prelude::*;
use router_ebpf::policy::{BY_ADDRESS, NewFlow, Rules, clause};

use super::super::tables::{Store, address};
use super::*;
use crate::control::{Destination, Direction, Rule};
use crate::datapath::policy::{self, allows};

/// A map in memory, which somebody else may look at.
struct Memory<K, V>(Arc<Mutex<BTreeMap<K, V>>>);

impl<K, V> Default for Memory<K, V> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<K, V> Memory<K, V> {
    fn shared(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    fn look(&self) -> MutexGuard<'_, BTreeMap<K, V>> {
        self.0.lock().unwrap()
    }
}

impl<K: Ord + Copy + Send, V: Copy + Send> Store<K, V> for Memory<K, V> {
    fn put(&mut self, key: &K, value: &V) -> Result<(), MapError> {
        self.look().insert(*key, *value);
        Ok(())
    }

    fn delete(&mut self, key: &K) -> Result<(), MapError> {
        self.look().remove(key).unwrap();
        Ok(())
    }
}

struct NoHits;

impl Hits for NoHits {
    fn read(&self, _: u32) -> Result<u64, MapError> {
        Ok(0)
    }

    fn clear(&mut self, _: u32) -> Result<(), MapError> {
        Ok(())
    }
}

/// Entries of the overlay and of the policy, each with its set.
type Found = (
    BTreeMap<Prefix, (abi::Overlay, Option<Set>)>,
    BTreeMap<Prefix, Set>,
);

/// The maps of a router, and who fills them.
struct Router {
    overlay: Memory<Prefix, abi::Overlay>,
    prefixes: Memory<Prefix, u32>,
    sets: Memory<u32, Set>,
    banks: Banks,
    bank: u32,
}

impl Router {
    fn new() -> Self {
        let (overlay, prefixes, sets) = (Memory::default(), Memory::default(), Memory::default());
        let banks = Banks::new(
            Mirror::new(overlay.shared(), "overlay", 1000),
            Mirror::new(prefixes.shared(), "prefixes", 1000),
            Pool::new(sets.shared()),
            NoHits,
        );
        Self {
            overlay,
            prefixes,
            sets,
            banks,
            bank: 0,
        }
    }

    /// Puts `spec` in force; whether something was taken away.
    fn apply(&mut self, spec: &Spec) -> bool {
        let (bank, taken) = self.banks.stage(spec).unwrap();
        self.bank = bank;
        self.banks.commit();
        taken
    }

    /// Everything that a program can find, with sets in the place of their numbers.
    fn found(&self) -> Found {
        let sets = self.sets.look();
        let overlay = self.overlay.look();
        let overlay = overlay.iter().map(|(key, entry)| {
            let class = Some(entry.class(self.bank)).filter(|_| self.bank != 0);
            let set = class.and_then(|class| sets.get(&class)).copied();
            let classes = [0; 2];
            (*key, (abi::Overlay { classes, ..*entry }, set))
        });
        let prefixes = self.prefixes.look();
        let prefixes = prefixes.iter().map(|(key, number)| {
            let mut key = *key;
            // The banks differ by how often the policy was rewritten.
            assert_eq!(u32::from(key.address.family[1]), self.bank);
            key.address.family[1] = 0;
            (key, sets[number])
        });
        (overlay.collect(), prefixes.collect())
    }

    /// The peer of an address and its class, as a program finds them.
    fn peer(&self, address: IpAddr) -> Option<abi::Overlay> {
        let overlay = self.overlay.look();
        let around = overlay
            .iter()
            .filter(|(key, _)| net(key).is_some_and(|net| net.contains(&address)));
        let (_, entry) = around.max_by_key(|(key, _)| key.len)?;
        (entry.flags & abi::Overlay::OWN == 0).then_some(*entry)
    }

    /// Whether the programs let a flow through that passes between a peer and another address.
    fn allows(&self, view: &View, from_overlay: bool, flow: &policy::NewFlow) -> bool {
        let class = if from_overlay {
            self.peer(flow.source).unwrap().class(self.bank)
        } else {
            BY_ADDRESS
        };
        let flow = NewFlow {
            class,
            source: Prefix::host(address(flow.source)),
            destination: Prefix::host(address(flow.destination)),
            protocol: flow.protocol,
            port: flow.port.to_be_bytes(),
        };
        clause(view, self.bank, &flow).is_some()
    }

    fn view(&self) -> View {
        View {
            sets: self.sets.look().clone(),
            prefixes: self.prefixes.look().clone(),
        }
    }
}

struct View {
    sets: BTreeMap<u32, Set>,
    prefixes: BTreeMap<Prefix, u32>,
}

impl Rules for View {
    fn set(&self, key: &Prefix) -> Option<&Set> {
        let whole = |prefix: &Prefix| {
            let [a, b, c, d] = prefix.address.family;
            let head = u128::from(u32::from_be_bytes([a, b, c, d]));
            // Ports and the last bits of an address do not meet here.
            (head, u128::from_be_bytes(prefix.address.octets))
        };
        let holds = |prefix: &&Prefix| {
            let bits = prefix.len - 32;
            let (head, octets) = whole(prefix);
            let (other_head, other) = whole(key);
            let cut = |number: u128| number.checked_shr(128 - bits).unwrap_or(0);
            head == other_head && cut(octets) == cut(other)
        };
        let longest = self.prefixes.keys().filter(holds).max_by_key(|key| key.len);
        self.sets.get(self.prefixes.get(longest?)?)
    }

    fn numbered(&self, number: u32) -> Option<&Set> {
        self.sets.get(&number)
    }
}

fn host(ipv4: bool, number: u8) -> IpAddr {
    if ipv4 {
        Ipv4Addr::new(10, 0, 0, number).into()
    } else {
        Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, number.into()).into()
    }
}

fn any_net() -> impl Strategy<Value = IpNet> {
    (any::<bool>(), 0u8..16, 0u8..=4).prop_map(|(ipv4, number, wider)| {
        let address = host(ipv4, number);
        let longest = if ipv4 { 32 } else { 128 };
        let len = if wider == 4 { 0 } else { longest - wider };
        IpNet::new(address, len).unwrap().trunc()
    })
}

fn nets() -> impl Strategy<Value = Vec<IpNet>> {
    proptest::collection::vec(any_net(), 0..5)
}

fn rule() -> impl Strategy<Value = Rule> {
    let direction = proptest::sample::select(vec![
        Direction::FromOverlay,
        Direction::ToOverlay,
        Direction::Both,
    ]);
    let ports = proptest::sample::select(vec![0..=u16::MAX, 80..=80]);
    let destination = (any_net(), ports).prop_map(|(cidr, ports)| Destination { cidr, ports });
    let destinations = proptest::collection::vec(destination, 0..3);
    (direction, nets(), destinations).prop_map(|(direction, sources, destinations)| Rule {
        direction,
        sources,
        destinations,
        protocols: Vec::new(),
    })
}

/// A step from one state of the router to the next.
#[derive(Clone, Debug)]
enum Step {
    Peers(Vec<(IpNet, u32)>, Vec<IpNet>),
    /// Other sources for a rule.
    Sources(usize, Vec<IpNet>),
    Rules(Vec<Rule>),
    Own(Vec<u8>),
}

fn step() -> impl Strategy<Value = Step> {
    let set = proptest::collection::vec((any_net(), 1u32..4), 0..4);
    let own = proptest::collection::vec(0u8..16, 0..2);
    prop_oneof![
        4 => (set, nets()).prop_map(|(set, remove)| Step::Peers(set, remove)),
        4 => (0usize..4, nets()).prop_map(|(rule, sources)| Step::Sources(rule, sources)),
        1 => proptest::collection::vec(rule(), 0..5).prop_map(Step::Rules),
        1 => own.prop_map(Step::Own),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn changes_make_what_a_whole_specification_makes(
        rules in proptest::collection::vec(rule(), 1..5),
        steps in proptest::collection::vec(step(), 1..12),
    ) {
        let mut spec = Spec::default();
        spec.policy.rules = rules;
        let mut changed = Router::new();
        changed.apply(&spec);
        for step in steps {
            let before = spec.clone();
            let taken = match step {
                Step::Peers(set, remove) => {
                    let change = OverlayChange { set, remove };
                    change.apply(&mut spec.overlay);
                    let taken = changed.banks.change_peers(&change).unwrap();
                    changed.banks.commit();
                    taken
                }
                Step::Sources(place, sources) => {
                    if let Some(rule) = spec.policy.rules.get_mut(place) {
                        rule.sources = sources;
                    }
                    changed.apply(&spec)
                }
                Step::Rules(rules) => {
                    spec.policy.rules = rules;
                    changed.apply(&spec)
                }
                Step::Own(own) => {
                    spec.own = own.into_iter().map(|number| host(true, number)).collect();
                    changed.apply(&spec)
                }
            };
            let mut whole = Router::new();
            whole.apply(&spec);
            prop_assert_eq!(changed.found(), whole.found());
            let view = changed.view();
            for ipv4 in [true, false] {
                for source in 0..16 {
                    let address = host(ipv4, source);
                    let nets = spec.overlay.iter().filter(|(net, _)| net.contains(&address));
                    let peer = nets.max_by_key(|(net, _)| net.prefix_len()).map(|(_, peer)| *peer);
                    let peer = peer.filter(|_| !spec.own.contains(&address));
                    prop_assert_eq!(changed.peer(address).map(|entry| entry.peer), peer);
                    for (destination, port) in [(1, 80), (6, 22), (15, 80)] {
                        let flow = policy::NewFlow {
                            source: address,
                            destination: host(ipv4, destination),
                            protocol: policy::TCP,
                            port,
                        };
                        for from in [true, false] {
                            if from && peer.is_none() {
                                continue;
                            }
                            // What the settings say to be open is not looked up.
                            let now = policy::is_restricted(&spec.policy, from);
                            let allowed = allows(&spec.policy, from, &flow);
                            if now {
                                prop_assert_eq!(changed.allows(&view, from, &flow), allowed, "{:?}", flow);
                            }
                            let lost = allows(&before.policy, from, &flow) && !allowed;
                            prop_assert!(taken || !lost, "{:?} goes on", flow);
                        }
                    }
                    let was = Router::peer_of(&before, address);
                    prop_assert!(taken || was.is_none() || peer.is_some(), "{address} goes on");
                }
            }
        }
    }
}

impl Router {
    fn peer_of(spec: &Spec, address: IpAddr) -> Option<u32> {
        let nets = spec
            .overlay
            .iter()
            .filter(|(net, _)| net.contains(&address));
        let peer = nets
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, peer)| *peer);
        peer.filter(|_| !spec.own.contains(&address))
    }
}

/// Ten thousand peers, and two thousand rules with fifty of them each.
fn crowd() -> Spec {
    let peer = |n: u32| IpNet::from(IpAddr::from(Ipv4Addr::from(0x6440_0000 + n)));
    let mut spec = Spec {
        overlay: (0..10_000).map(|n| (peer(n), n + 1)).collect(),
        ..Spec::default()
    };
    let rule = |n: u32| Rule {
        sources: (0..50)
            .map(|i| peer((n * 7919 + i * 104_729) % 10_000))
            .collect(),
        destinations: vec![Destination {
            cidr: format!("10.{}.{}.0/24", n / 200, n % 200).parse().unwrap(),
            ports: 443..=443,
        }],
        ..Rule::default()
    };
    spec.policy.rules = (0..2_000).map(rule).collect();
    spec
}

#[test]
fn one_change_among_many_peers_and_rules_writes_what_it_touches() {
    let mut router = Router::new();
    router.banks.overlay = Mirror::new(router.overlay.shared(), "overlay", abi::MAX_OVERLAY);
    router.banks.prefixes = Mirror::new(router.prefixes.shared(), "prefixes", MAX_PREFIXES);
    let mut spec = crowd();
    let begun = std::time::Instant::now();
    router.apply(&spec);
    println!(
        "whole: {:?}, {} sets",
        begun.elapsed(),
        router.sets.look().len()
    );
    let before = router.overlay.look().clone();

    let begun = std::time::Instant::now();
    let new = "100.65.0.1/32".parse().unwrap();
    let change = OverlayChange {
        set: vec![(new, 20_000)],
        remove: Vec::new(),
    };
    assert!(!router.banks.change_peers(&change).unwrap());
    router.banks.commit();
    println!("a peer: {:?}", begun.elapsed());
    change.apply(&mut spec.overlay);

    let begun = std::time::Instant::now();
    spec.policy.rules[7].sources.push(new);
    assert!(!router.apply(&spec));
    println!("a source: {:?}", begun.elapsed());
    let after = router.overlay.look().clone();
    let differs = |(key, entry): &(&Prefix, &abi::Overlay)| before.get(key) != Some(entry);
    assert_eq!(after.iter().filter(differs).count(), 1);
}

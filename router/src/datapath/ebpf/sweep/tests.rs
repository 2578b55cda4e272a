#![allow(clippy::unwrap_used)]
use std::collections::BTreeMap;

use proptest::prelude::*;
use router_ebpf::abi::Key4;

use super::super::flows::memory::Memory;
use super::*;
use crate::control::{Destination, Policy, Rule};

const SECOND: u64 = 1_000_000_000;
/// A day after boot, so that times may lie before it.
const NOW: u64 = 86_400 * SECOND;
const UDP: u8 = 17;

type Flows = Memory<Key4, Flow>;

fn tuple(protocol: u8, host: u8, port: u16) -> Tuple {
    Tuple {
        source: Address::v4([100, 64, 0, host]),
        destination: Address::v4([10, 0, 0, 1]),
        ports: [port.to_be_bytes(), [0, 53]],
        protocol,
    }
}

/// Adds a translated flow, idle for so many seconds in each direction.
fn add(flows: &mut Flows, tuple: &Tuple, idle: [u64; 2], tcp: [u8; 2]) {
    let flow = |direction: usize, address: Address, port| Flow {
        last_used: NOW - idle[direction] * SECOND,
        address: address.octets,
        port,
        tcp: tcp[direction],
        flags: Flow::SNAT,
        link: 3,
        hardware: [1; 12],
        ..Flow::default()
    };
    // The port tells apart what one external address stands for.
    let [high, low] = tuple.ports[0];
    let port = [high | tuple.source.octets[3] << 4, low];
    let overlay = flow(0, Address::v4([10, 0, 0, 9]), port);
    let key = Key4::new(Side::Overlay, tuple);
    flows.entries.insert(
        partner(&key, &overlay),
        flow(1, tuple.source, tuple.ports[0]),
    );
    flows.entries.insert(key, overlay);
}

fn sweep(capacity: u32) -> Sweep<Key4> {
    Sweep::new(Timeouts::default(), capacity)
}

fn remains(protocol: u8, idle: [u64; 2], tcp: [u8; 2], pressure: bool) -> bool {
    let mut flows = Memory::new(BTreeMap::new());
    add(&mut flows, &tuple(protocol, 2, 1), idle, tcp);
    let mut sweep = sweep(100);
    sweep.pressure = pressure;
    let tally = sweep.pass(&mut flows, NOW, &Judge::default()).unwrap();
    assert_eq!(
        flows.entries.len() as u64,
        2 * tally.flows,
        "half a flow is left"
    );
    assert_eq!(tally.flows + tally.expired + tally.early, 1);
    tally.flows == 1
}

#[test]
fn each_protocol_and_state_has_its_timeout() {
    const SYN: u8 = Flow::SYN;
    const OPEN: u8 = Flow::SYN | Flow::ACK;
    const FIN: u8 = OPEN | Flow::FIN;
    for (protocol, tcp, usual, under_pressure) in [
        (UDP, [0, 0], 300, 120),
        (ICMP, [0, 0], 60, 60),
        (TCP, [SYN, 0], 240, 30),
        (TCP, [SYN, SYN], 240, 30),
        (TCP, [OPEN, SYN], 7440, 7440),
        (TCP, [OPEN, OPEN], 7440, 7440),
        // Without its beginning, as of a flow without translation.
        (TCP, [Flow::ACK, Flow::ACK], 7440, 7440),
        (TCP, [FIN, OPEN], 7440, 7440),
        (TCP, [FIN, FIN], 240, 30),
        (TCP, [OPEN | Flow::RST, OPEN], 240, 30),
        (TCP, [OPEN, OPEN | Flow::RST], 240, 30),
    ] {
        for (pressure, timeout) in [(false, usual), (true, under_pressure)] {
            let what = format!("{protocol} {tcp:?} pressure {pressure}");
            // Either direction keeps the flow.
            assert!(remains(protocol, [timeout, 9000], tcp, pressure), "{what}");
            assert!(remains(protocol, [9000, timeout], tcp, pressure), "{what}");
            assert!(
                !remains(protocol, [timeout + 1; 2], tcp, pressure),
                "{what}"
            );
        }
    }
}

#[test]
fn pressure_comes_with_a_full_table_and_goes_with_an_empty_one() {
    let mut flows = Memory::new(BTreeMap::new());
    let mut sweep = sweep(10);
    let mut pressure_at = |flows: &mut Flows, count: u16| {
        flows.entries.clear();
        for port in 0..count {
            add(flows, &tuple(UDP, 2, port), [1, 1], [0, 0]);
        }
        sweep.pass(flows, NOW, &Judge::default()).unwrap();
        sweep.pressure()
    };
    let seen = [7, 8, 7, 6, 7].map(|count| pressure_at(&mut flows, count));
    assert_eq!(seen, [false, true, true, false, false]);
}

#[test]
fn what_a_new_policy_does_not_allow_ends() {
    let policy = Policy {
        rules: vec![Rule {
            sources: vec!["100.64.0.2/32".parse().unwrap()],
            destinations: vec![Destination {
                cidr: "10.0.0.0/8".parse().unwrap(),
                ports: 53..=53,
            }],
            ..Rule::default()
        }],
        ..Policy::default()
    };
    let policy = Compiled::new(&policy, 1).unwrap();
    let mut flows = Memory::new(BTreeMap::new());
    add(&mut flows, &tuple(UDP, 2, 7), [0, 0], [0, 0]);
    add(&mut flows, &tuple(UDP, 3, 7), [0, 0], [0, 0]);
    // From the subnet, to the same peer: no rule is for that.
    let inward = tuple(UDP, 2, 8);
    add(&mut flows, &inward, [0, 0], [0, 0]);
    let key = Key4::new(Side::Overlay, &inward);
    flows.entries.get_mut(&key).unwrap().flags = Flow::FROM_SUBNET;

    let tally = sweep(100)
        .pass(
            &mut flows,
            NOW,
            &Judge {
                policy: Some(&policy),
                ..Judge::default()
            },
        )
        .unwrap();
    assert_eq!((tally.flows, tally.denied), (1, 2));
    assert!(
        flows
            .entries
            .contains_key(&Key4::new(Side::Overlay, &tuple(UDP, 2, 7)))
    );
    assert_eq!(flows.entries.len(), 2);
}

#[test]
fn flows_of_addresses_that_were_another_peers_end() {
    let mut flows = Memory::new(BTreeMap::new());
    add(&mut flows, &tuple(UDP, 2, 7), [0, 0], [0, 0]);
    let remains = tuple(UDP, 5, 7);
    add(&mut flows, &remains, [0, 0], [0, 0]);
    let gone = [("100.64.0.0/30".parse().unwrap(), ())];
    let judge = Judge {
        gone: Some(&gone.into_iter().collect()),
        ..Judge::default()
    };
    let tally = sweep(100).pass(&mut flows, NOW, &judge).unwrap();
    assert_eq!((tally.flows, tally.denied), (1, 1));
    let key = Key4::new(Side::Overlay, &remains);
    assert!(flows.entries.len() == 2 && flows.entries.contains_key(&key));
}

#[test]
fn flows_of_a_narrower_network_outlive_a_wider_one() {
    let gone: Nets<()> = [("100.64.0.0/24".parse().unwrap(), ())]
        .into_iter()
        .collect();
    for (owned, remains) in [
        ("100.64.0.2/32", [true, false]),
        ("100.64.0.0/30", [true, false]),
        // The wider one has moved, or what is left is wider still.
        ("100.64.0.0/24", [false, false]),
        ("100.64.0.0/10", [false, false]),
    ] {
        let mut flows = Memory::new(BTreeMap::new());
        let tuples = [tuple(UDP, 2, 7), tuple(UDP, 5, 7)];
        for tuple in &tuples {
            add(&mut flows, tuple, [0, 0], [0, 0]);
        }
        let peers = [(owned.parse().unwrap(), 7)];
        let judge = Judge {
            gone: Some(&gone),
            peers: Some(&peers.into_iter().collect()),
            ..Judge::default()
        };
        sweep(100).pass(&mut flows, NOW, &judge).unwrap();
        let is_there = |tuple| {
            let key = Key4::new(Side::Overlay, tuple);
            flows.entries.contains_key(&key)
        };
        assert_eq!(tuples.each_ref().map(is_there), remains, "{owned}");
    }
}

#[test]
fn flows_whose_external_address_is_gone_end() {
    let mut flows = Memory::new(BTreeMap::new());
    add(&mut flows, &tuple(UDP, 2, 7), [0, 0], [0, 0]);
    add(&mut flows, &tuple(UDP, 2, 8), [0, 0], [0, 0]);
    let untranslated = Key4::new(Side::Overlay, &tuple(UDP, 2, 8));
    flows.entries.get_mut(&untranslated).unwrap().flags = 0;

    let mut sweep = sweep(100);
    let mut pass = |after: u64, addresses: Option<&[u8]>| {
        if let Some(hosts) = addresses {
            let own = hosts.iter().map(|host| Address::v4([10, 0, 0, *host]));
            sweep.know(Arc::new(own.collect()));
        }
        let now = NOW + after * SECOND;
        let tally = sweep.pass(&mut flows, now, &Judge::default()).unwrap();
        (tally.flows, tally.addressless)
    };
    // Before anybody has told, and while it is there.
    assert_eq!(pass(0, None), (2, 0));
    assert_eq!(pass(100, Some(&[8, 9])), (2, 0));
    // Away for a moment.
    assert_eq!(pass(101, Some(&[8])), (2, 0));
    assert_eq!(pass(131, None), (2, 0));
    assert_eq!(pass(132, Some(&[9])), (2, 0));
    // Away for good.
    assert_eq!(pass(133, Some(&[8])), (2, 0));
    assert_eq!(pass(163, None), (2, 0));
    assert_eq!(pass(164, None), (1, 1));
    assert_eq!(pass(165, None), (1, 0));
    assert_eq!(flows.entries.len(), 2);
}

#[test]
fn an_entry_without_its_partner_goes_but_not_one_that_is_being_made() {
    let mut flows = Memory::new(BTreeMap::new());
    add(&mut flows, &tuple(UDP, 2, 7), [0, 0], [0, 0]);
    add(&mut flows, &tuple(UDP, 2, 8), [0, 0], [0, 0]);
    let made = Key4::new(Side::Overlay, &tuple(UDP, 2, 8));
    let entry = flows.entries.remove(&made).unwrap();
    let mut sweep = sweep(100);
    let tally = sweep.pass(&mut flows, NOW, &Judge::default()).unwrap();
    assert_eq!((tally.flows, tally.strays, flows.entries.len()), (1, 0, 3));
    // It is made now.
    flows.entries.insert(made, entry);
    let tally = sweep.pass(&mut flows, NOW, &Judge::default()).unwrap();
    assert_eq!((tally.flows, tally.strays, flows.entries.len()), (2, 0, 4));

    let overlay = Key4::new(Side::Overlay, &tuple(UDP, 2, 7));
    flows.remove(&overlay).unwrap();
    flows.remove(&partner(&made, &entry)).unwrap();
    let passes = (0..2 * THOROUGH).map(|_| sweep.pass(&mut flows, NOW, &Judge::default()).unwrap());
    assert_eq!(passes.map(|tally| tally.strays).sum::<u64>(), 2);
    assert!(flows.entries.is_empty());
}

#[test]
fn next_hops_in_use_are_told() {
    let mut flows = Memory::new(BTreeMap::new());
    add(&mut flows, &tuple(UDP, 2, 7), [29, 0], [0, 0]);
    let tally = sweep(100).pass(&mut flows, NOW, &Judge::default()).unwrap();
    assert_eq!(tally.next_hops, HashSet::from([(3, [1; 6])]));
    let tally = sweep(100)
        .pass(&mut flows, NOW + 2 * SECOND, &Judge::default())
        .unwrap();
    assert!(tally.next_hops.is_empty());
}

#[test]
fn flows_settle_when_they_are_in_use_and_steady() {
    const OPEN: u8 = Flow::SYN | Flow::ACK;
    for (protocol, idle, tcp, settles) in [
        (UDP, [0, 0], [0, 0], 2),
        (UDP, [2, 3], [0, 0], 1),
        (UDP, [3, 3], [0, 0], 0),
        (ICMP, [1, 1], [0, 0], 2),
        (TCP, [0, 0], [Flow::SYN, 0], 0),
        (TCP, [0, 0], [Flow::SYN, Flow::SYN], 0),
        (TCP, [0, 0], [OPEN, Flow::SYN], 1),
        (TCP, [0, 0], [OPEN, OPEN], 2),
        (TCP, [0, 0], [OPEN | Flow::FIN, OPEN | Flow::RST], 0),
    ] {
        let mut flows = Memory::new(BTreeMap::new());
        add(&mut flows, &tuple(protocol, 2, 1), idle, tcp);
        let mut sweep = sweep(100);
        let mut settled = |at| {
            sweep
                .pass(&mut flows, at, &Judge::default())
                .unwrap()
                .settled
        };
        // Not before it is found so twice.
        let settled = [NOW - 5 * SECOND, NOW].map(&mut settled);
        assert_eq!(settled, [0, settles], "{protocol} {idle:?} {tcp:?}");
        assert_eq!(flows.settled.len() as u64, settles);
    }
}

#[test]
fn short_flows_do_not_settle() {
    let mut sweep = sweep(100);
    for n in 0..10 {
        let mut flows = Memory::new(BTreeMap::new());
        add(&mut flows, &tuple(UDP, 2, 100 + n), [0, 0], [0, 0]);
        assert_eq!(
            sweep
                .pass(&mut flows, NOW, &Judge::default())
                .unwrap()
                .settled,
            0
        );
        // Still lively, but by the same packet.
        let later = NOW + SECOND;
        assert_eq!(
            sweep
                .pass(&mut flows, later, &Judge::default())
                .unwrap()
                .settled,
            0
        );
    }
}

#[test]
fn a_settled_flow_lives_by_what_its_slots_say() {
    let mut flows = Memory::new(BTreeMap::new());
    add(&mut flows, &tuple(UDP, 2, 1), [0, 0], [0, 0]);
    let mut sweep = sweep(100);
    sweep
        .pass(&mut flows, NOW - SECOND, &Judge::default())
        .unwrap();
    let mut pass = |flows: &mut Flows, after: u64| {
        let tally = sweep
            .pass(flows, NOW + after * SECOND, &Judge::default())
            .unwrap();
        (tally.flows, tally.next_hops.len(), tally.settled)
    };
    assert_eq!(pass(&mut flows, 0), (1, 1, 2));
    // What the table tells is old by now, but in use it is, and told to be.
    let keys: Vec<Key4> = flows.settled.keys().copied().collect();
    for key in &keys {
        flows.settled.get_mut(key).unwrap().last_used = NOW + 999 * SECOND;
    }
    assert_eq!(pass(&mut flows, 1000), (1, 1, 2));
    for key in &keys {
        assert_eq!(flows.entries[key].last_used, NOW + 999 * SECOND);
    }
    // One direction keeps it.
    flows.settled.get_mut(&keys[1]).unwrap().last_used = NOW + 1200 * SECOND;
    assert_eq!(pass(&mut flows, 1400), (1, 0, 2));
    assert_eq!(pass(&mut flows, 1501), (0, 0, 0));
    assert!(flows.entries.is_empty() && flows.settled.is_empty());
}

proptest! {
    /// Whatever the table holds: what is left is whole, live, and rightly counted.
    #[test]
    fn a_pass_leaves_whole_live_flows(
        all in proptest::collection::btree_map(
            (prop_oneof![Just(UDP), Just(ICMP), Just(TCP)], 1u8..5, 0u16..50),
            ([0u64..9000, 0u64..9000], [0u8..16, 0u8..16]),
            0..60,
        ),
    ) {
        let mut flows = Memory::new(BTreeMap::new());
        for ((protocol, host, port), (idle, tcp)) in &all {
            add(&mut flows, &tuple(*protocol, *host, *port), *idle, *tcp);
        }
        prop_assert_eq!(flows.entries.len(), 2 * all.len());
        let tally = sweep(1000).pass(&mut flows, NOW, &Judge::default()).unwrap();
        prop_assert_eq!(tally.strays, 0);
        prop_assert_eq!(tally.flows + tally.expired, all.len() as u64);
        for ((protocol, host, port), (idle, tcp)) in &all {
            let key = Key4::new(Side::Overlay, &tuple(*protocol, *host, *port));
            let timeout = match *protocol {
                UDP => 300,
                ICMP => 60,
                _ if is_established(tcp[0], tcp[1]) => 7440,
                _ => 240,
            };
            let live = idle[0].min(idle[1]) <= timeout;
            prop_assert_eq!(flows.entries.contains_key(&key), live);
        }
        let total: u32 = tally.sources.values().sum();
        prop_assert_eq!(u64::from(total), tally.flows);
    }
}

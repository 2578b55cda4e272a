#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::control::{Combined, Delta, Identity, Peer, State, Update};
use crate::engine::PeerSpec;

fn run_all(core: &mut Core, now: Instant, fail: Option<Part>) -> Vec<Part> {
    let mut parts = Vec::new();
    while let Some(action) = core.poll_action(now) {
        let part = action.part();
        parts.push(part);
        let outcome = if fail == Some(part) {
            Err("no".to_owned())
        } else {
            Ok(Vec::new())
        };
        core.handle_done(action, outcome, now);
    }
    parts
}

const ROUTES: Part = Part::Routes(Family::V4);

fn some_plan() -> Plan {
    Plan {
        mtu: 1420,
        ..Plan::default()
    }
}

#[test]
fn everything_once_and_policy_before_forwarding_before_peers() {
    let mut core = Core::default();
    let now = Instant::now();
    assert_eq!(core.poll_action(now), None);
    core.want(some_plan(), None);
    assert!(!core.settled());
    assert_eq!(run_all(&mut core, now, None), Part::ALL);
    assert!(core.settled());
    core.want(some_plan(), None);
    assert_eq!(run_all(&mut core, now, None), []);
}

#[test]
fn only_what_changed_is_applied_again() {
    let mut core = Core::default();
    let now = Instant::now();
    core.want(some_plan(), None);
    run_all(&mut core, now, None);
    core.want(
        Plan {
            forwarding: vec![Link::default()],
            overlay: Overlay::IPV4,
            ..some_plan()
        },
        None,
    );
    let forwarding = Part::Forwarding(Family::V4);
    assert_eq!(run_all(&mut core, now, None), [forwarding]);
    core.invalidate(Part::Rules(Family::V6));
    assert_eq!(run_all(&mut core, now, None), [Part::Rules(Family::V6)]);
    core.want(
        Plan {
            forwarding: vec![Link::default()],
            overlay: Overlay::IPV4,
            link_mtus: [(2, 1400)].into(),
            ..some_plan()
        },
        None,
    );
    assert_eq!(run_all(&mut core, now, None), [Part::Datapath]);
}

#[test]
fn a_failed_part_is_retried_with_a_growing_pause() {
    let mut core = Core::default();
    let mut now = Instant::now();
    core.want(some_plan(), None);
    run_all(&mut core, now, Some(ROUTES));
    assert!(!core.settled());
    assert_eq!(
        core.failures()
            .map(|(p, f)| (p, f.attempts))
            .collect::<Vec<_>>(),
        [(ROUTES, 1)]
    );
    assert_eq!(core.poll_timeout(), Some(now + FIRST_PAUSE));
    now += FIRST_PAUSE;
    assert_eq!(run_all(&mut core, now, Some(ROUTES)), [ROUTES]);
    assert_eq!(core.poll_timeout(), Some(now + 2 * FIRST_PAUSE));
    for _ in 0..20 {
        now = core.poll_timeout().unwrap();
        run_all(&mut core, now, Some(ROUTES));
    }
    assert_eq!(core.poll_timeout(), Some(now + LONGEST_PAUSE));
    now += LONGEST_PAUSE;
    assert_eq!(run_all(&mut core, now, None), [ROUTES]);
    assert!(core.settled());
    assert_eq!(core.poll_timeout(), None);
}

#[test]
fn without_its_policy_the_router_does_not_open() {
    let mut core = Core::default();
    let now = Instant::now();
    core.want(some_plan(), None);
    let tried = run_all(&mut core, now, Some(Part::Datapath));
    let [v4, v6] = Family::ALL.map(Part::Addresses);
    assert_eq!(tried, [Part::Device, v4, v6, Part::Datapath]);
}

#[test]
fn what_one_family_cannot_have_does_not_stop_the_other() {
    let now = Instant::now();
    let plan = |nets: &[&str]| Plan {
        addresses: nets.iter().map(|net| net.parse().unwrap()).collect(),
        ..some_plan()
    };
    let both = plan(&["100.64.0.1/24", "fd64::1/64"]);
    for of in [Part::Addresses, Part::Forwarding, Part::Routes, Part::Rules] {
        let mut core = Core::default();
        core.want(both.clone(), None);
        assert!(!core.ready());
        let tried = run_all(&mut core, now, Some(of(Family::V6)));
        assert_eq!(tried, Part::ALL);
        assert!(core.ready() && !core.settled());
        // All that is asked for is not there.
        let mut core = Core::default();
        core.want(plan(&["100.64.0.1/24"]), None);
        run_all(&mut core, now, Some(of(Family::V4)));
        assert!(!core.ready());
    }
    let mut core = Core::default();
    core.want(both, None);
    run_all(&mut core, now, Some(Part::Peers));
    assert!(!core.ready());
}

#[test]
fn a_new_plan_does_not_wait_for_the_old_ones_pause() {
    let mut core = Core::default();
    let now = Instant::now();
    core.want(some_plan(), None);
    run_all(&mut core, now, Some(Part::Datapath));
    core.want(
        Plan {
            mtu: 1400,
            ..some_plan()
        },
        None,
    );
    let addresses = |part: &Part| matches!(part, Part::Addresses(_));
    let all = Part::ALL.into_iter().filter(|part| !addresses(part));
    assert_eq!(run_all(&mut core, now, None), Vec::from_iter(all));
}

/// What a machine has that does what actions say.
#[derive(Debug, Default, PartialEq)]
struct Machine {
    peers: BTreeMap<PublicKey, PeerSpec>,
    overlay: BTreeMap<IpNet, u32>,
    routes: BTreeSet<IpNet>,
    /// Actions that were not for all there is.
    deltas: usize,
}

impl Machine {
    fn carry_out(&mut self, action: &Action, state: &State) {
        let names = Names::default();
        match action {
            Action::Datapath { .. } => self.overlay = state.peers.allowed_ips().clone(),
            Action::OverlayChanged { nets, .. } => {
                let change = overlay_change(state, nets);
                self.overlay.extend(change.set);
                self.overlay.retain(|net, _| !change.remove.contains(net));
                self.deltas += 1;
            }
            Action::Routes { family, .. } => {
                self.routes.retain(|net| Family::of(net.addr()) != *family);
                self.routes.extend(tunnel_routes(state, *family));
            }
            Action::RoutesChanged { nets, .. } => {
                let (there, gone) = route_change(state, nets);
                self.routes.extend(there);
                self.routes.retain(|net| !gone.contains(net));
                self.deltas += 1;
            }
            Action::Peers { .. } => {
                let specs = peer_specs(state, &names).into_iter();
                self.peers = specs.map(|spec| (spec.public_key, spec)).collect();
            }
            Action::PeersChanged { keys, .. } => {
                let change = peer_change(state, &names, keys);
                let set = change.set.into_iter();
                self.peers.extend(set.map(|spec| (spec.public_key, spec)));
                self.peers.retain(|key, _| !change.remove.contains(key));
                self.deltas += 1;
            }
            _ => {}
        }
    }
}

fn any_update() -> impl Strategy<Value = Update> {
    let peer = (0_u8..8, prop::collection::vec(0_u8..8, 0..3), any::<bool>());
    let peer = peer.prop_map(|(key, hosts, v6)| {
        let net = |host| match v6 {
            true => format!("fd00::{host}/128"),
            false => format!("100.64.0.{host}/32"),
        };
        Peer {
            name: None,
            public_key: PublicKey([key; 32]),
            preshared_key: None,
            allowed_ips: hosts.into_iter().map(|h| net(h).parse().unwrap()).collect(),
            endpoint: None,
            keepalive: None,
            roaming: true,
            masquerade: Vec::new(),
            jailed: false,
        }
    });
    let addresses = prop::option::of((1_u8..8, 24_u8..=32));
    (prop::option::of(peer), prop::option::of(0_u8..8), addresses).prop_map(
        |(set, remove, address)| {
            let remove = remove.map(|key| PublicKey([key; 32]));
            let remove = remove.filter(|key| set.as_ref().is_none_or(|p| p.public_key != *key));
            Update::Delta(Delta {
                identity: address.map(|(host, length)| Identity {
                    private_key: PrivateKey::from_bytes([1; 32]),
                    addresses: vec![format!("100.64.0.{host}/{length}").parse().unwrap()],
                }),
                set: set.into_iter().collect(),
                remove: remove.into_iter().collect(),
                ..Delta::default()
            })
        },
    )
}

/// How an action ends that is tried: as it should, not at all, or with what was there before unknown.
fn any_step() -> impl Strategy<Value = (Update, Option<Part>, Option<Part>)> {
    let part = || {
        let of = [Part::Datapath, Part::Peers, Part::Routes(Family::V4)];
        prop::option::weighted(0.2, prop::sample::select(of.to_vec()))
    };
    (any_update(), part(), part())
}

proptest! {
    /// Change after change, with failures and others' hands between, comes to what a new machine is
    /// told at once.
    #[test]
    fn deltas_come_to_the_whole_of_the_end(steps in prop::collection::vec(any_step(), 1..24)) {
        let tun = Link::default();
        let local = crate::config::tests::parse_in_temporary_directory(
            crate::config::tests::EXAMPLE,
        ).unwrap().local;
        let facts = Facts::default();
        let (mut core, mut machine) = (Core::default(), Machine::default());
        let mut combined = Combined::new(&["file"]);
        let mut now = Instant::now();
        for (update, fails, doubted) in steps {
            let changed = combined.apply(0, update);
            let state = combined.state();
            core.want(plan(&local, state, &tun, &facts), None);
            core.changed(&changed);
            if let Some(part) = doubted {
                core.invalidate(part);
            }
            let mut fails = fails;
            while let Some(action) = core.poll_action(now) {
                if fails == Some(action.part()) {
                    fails = None;
                    core.handle_done(action, Err("no".to_owned()), now);
                    continue;
                }
                machine.carry_out(&action, state);
                core.handle_done(action, Ok(Vec::new()), now);
            }
            now += LONGEST_PAUSE;
        }
        let state = combined.state();
        while let Some(action) = core.poll_action(now) {
            machine.carry_out(&action, state);
            core.handle_done(action, Ok(Vec::new()), now);
        }
        prop_assert!(core.settled());
        let mut anew = Machine { deltas: machine.deltas, ..Machine::default() };
        for family in Family::ALL {
            anew.carry_out(&Action::Routes { family, way: Ipv6::On, revision: 0 }, state);
        }
        anew.carry_out(&Action::Datapath { revision: 0 }, state);
        anew.carry_out(&Action::Peers { revision: 0 }, state);
        prop_assert_eq!(machine, anew);
    }
}

#[test]
fn one_peer_among_many_is_told_alone() {
    let peer = |n: u16| Peer {
        name: None,
        public_key: PublicKey([(n >> 8) as u8, n as u8].repeat(16).try_into().unwrap()),
        preshared_key: None,
        allowed_ips: vec![format!("100.64.{}.{}/32", n >> 8, n & 255).parse().unwrap()],
        endpoint: None,
        keepalive: None,
        roaming: true,
        masquerade: Vec::new(),
        jailed: false,
    };
    let set = |peers: Vec<Peer>| {
        Update::Delta(Delta {
            set: peers,
            ..Delta::default()
        })
    };
    let mut combined = Combined::new(&["file"]);
    let mut core = Core::default();
    let now = Instant::now();
    core.changed(&combined.apply(0, set((0..1000).map(peer).collect())));
    core.want(some_plan(), None);
    run_all(&mut core, now, None);
    let mut changed = peer(500);
    changed.keepalive = Some(25);
    core.changed(&combined.apply(0, set(vec![changed, peer(1000)])));
    let mut actions = Vec::new();
    while let Some(action) = core.poll_action(now) {
        core.handle_done(action.clone(), Ok(Vec::new()), now);
        actions.push(action);
    }
    let net: IpNet = "100.64.3.232/32".parse().unwrap();
    let keys: BTreeSet<PublicKey> = [500, 1000].map(|n| peer(n).public_key).into();
    assert_eq!(actions.len(), 3, "{actions:?}");
    for action in actions {
        match action {
            Action::OverlayChanged { nets, .. } | Action::RoutesChanged { nets, .. } => {
                assert_eq!(nets, [net]);
            }
            Action::PeersChanged { keys: told, .. } => {
                assert_eq!(BTreeSet::from_iter(told), keys);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_change_that_fails_is_made_whole_at_once() {
    let mut core = Core::default();
    let now = Instant::now();
    core.want(some_plan(), None);
    run_all(&mut core, now, None);
    core.touch_peers([PublicKey([1; 32])]);
    let action = core.poll_action(now).unwrap();
    assert!(matches!(action, Action::PeersChanged { .. }));
    core.handle_done(action, Err("no".to_owned()), now);
    assert_eq!(core.failures().count(), 0);
    let action = core.poll_action(now).unwrap();
    assert!(matches!(action, Action::Peers { .. }));
    core.handle_done(action, Err("no".to_owned()), now);
    assert_eq!(core.failures().count(), 1);
    assert_eq!(core.poll_action(now), None);
}

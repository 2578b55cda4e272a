//! What changes with the peers, and what does not.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const OWN: PublicKey = PublicKey([1; 32]);

fn key(peer: u8) -> PublicKey {
    PublicKey([peer; 32])
}

fn spec(peer: u8, allowed: &[&str]) -> PeerSpec {
    PeerSpec {
        public_key: key(peer),
        preshared_key: None,
        allowed_ips: allowed.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        endpoint: None,
        others: Vec::new(),
        keepalive: None,
        masquerade: Vec::new(),
        roaming: true,
    }
}

fn state() -> State {
    let bind = Bind {
        port: 0,
        mark: 0,
        workers: 2,
        gro: false,
        others: false,
    };
    State::new(bind, OWN, None)
}

fn owner(state: &State, address: &str) -> Option<PublicKey> {
    let id = state.directory.routes.get(address.parse().unwrap())?;
    Some(state.names[id as usize])
}

fn skipped(outcome: &Outcome) -> Vec<PublicKey> {
    let skipped = outcome.skipped.iter();
    skipped.map(|skipped| skipped.public_key).collect()
}

#[test]
fn indices_stay_with_their_peers() {
    let mut state = state();
    let first = state.change(&[2, 3, 4].map(|peer| spec(peer, &[])), &[]);
    assert_eq!((first.new.len(), &first.gone[..]), (3, &[][..]));
    let first: HashSet<u32> = first.new.into_iter().collect();
    assert_eq!(first, state.indices);

    // Whatever changes of a peer that stays, its index does not.
    let mut moved = spec(2, &[]);
    moved.endpoint = Some(([192, 0, 2, 1], 7).into());
    let outcome = state.change(&[moved, spec(5, &[])], &[key(3)]);
    let (new, gone) = (outcome.new, outcome.gone);
    assert_eq!((new.len(), gone.len(), state.indices.len()), (1, 1, 3));
    assert!(first.contains(&gone[0]) && !state.indices.contains(&gone[0]));
    assert!(state.indices.contains(&new[0]));

    let outcome = state.change(&[], &[2, 4, 5].map(key));
    assert_eq!((outcome.new.len(), outcome.gone.len()), (0, 3));
    assert!(state.indices.is_empty());
}

#[test]
fn a_change_concerns_whom_it_names_and_nobody_else() {
    let mut state = state();
    let many: Vec<_> = (2..100)
        .map(|peer| spec(peer, &[&format!("10.0.{peer}.0/24")]))
        .collect();
    state.change(&many, &[]);
    let named = |outcome: &Outcome| {
        let count = |change: &Change| {
            change.add.len()
                + change.remove.len()
                + change.configured.len()
                + change.keepalives.len()
                + change.preshared_keys.len()
        };
        outcome.changes.iter().map(count).sum::<usize>()
    };
    assert_eq!(named(&state.change(&many, &[])), 0, "nothing is news");
    assert_eq!(named(&state.change(&[spec(100, &["10.1.0.0/16"])], &[])), 1);
    assert_eq!(named(&state.change(&[], &[key(7), key(200)])), 1);
    assert_eq!(owner(&state, "10.0.7.1"), None);
    assert_eq!(owner(&state, "10.0.8.1"), Some(key(8)));
    // Endpoints need no new table.
    let mut moved = many[10].clone();
    moved.endpoint = Some(([192, 0, 2, 1], 7).into());
    let outcome = state.change(&[moved], &[]);
    assert_eq!(named(&outcome), 1);
    assert!(
        outcome
            .changes
            .iter()
            .all(|change| change.directory.is_none())
    );
}

#[test]
fn a_bad_peer_is_skipped_and_all_others_are_in_force() {
    let mut state = state();
    let outcome = state.change(
        &[
            spec(2, &["10.0.0.0/24"]),
            spec(1, &[]),
            spec(3, &["10.0.1.0/24", "10.0.0.77/24"]),
            spec(0, &["10.0.9.0/24"]),
            spec(2, &["10.0.3.0/24"]),
            spec(4, &["10.0.1.0/24"]),
        ],
        &[],
    );
    assert_eq!(skipped(&outcome), [1, 0, 2, 3].map(key));
    let errors: Vec<_> = outcome
        .skipped
        .iter()
        .map(|s| s.error.to_string())
        .collect();
    assert!(errors[0].contains("own key") && errors[1].contains("small order"));
    assert!(
        errors[2].contains("twice") && errors[3].contains("10.0.0.0/24"),
        "{errors:?}"
    );
    assert_eq!(owner(&state, "10.0.0.9"), Some(key(2)));
    assert_eq!(owner(&state, "10.0.1.9"), Some(key(4)));
    assert_eq!(owner(&state, "10.0.9.9"), None);
    assert_eq!(state.peers.len(), 2);

    // A change that cannot be leaves a peer as it was.
    let outcome = state.change(&[spec(4, &["10.0.0.0/24"])], &[]);
    assert_eq!(skipped(&outcome), [key(4)]);
    assert_eq!(owner(&state, "10.0.1.9"), Some(key(4)));
}

#[test]
fn what_one_gives_up_another_gets_by_the_same_change() {
    let mut state = state();
    state.change(&[spec(2, &["10.0.0.0/24"]), spec(3, &["10.0.1.0/24"])], &[]);
    let outcome = state.change(&[spec(3, &["10.0.0.0/24"]), spec(2, &["10.0.1.0/24"])], &[]);
    assert_eq!(skipped(&outcome), []);
    assert_eq!(owner(&state, "10.0.0.9"), Some(key(3)));
    assert_eq!(owner(&state, "10.0.1.9"), Some(key(2)));
    // As a removed peer does.
    state.change(&[spec(4, &["10.0.1.0/24"])], &[key(2)]);
    assert_eq!(owner(&state, "10.0.1.9"), Some(key(4)));
}

#[test]
fn who_could_not_change_takes_nothing_from_others_later() {
    for later in [None, Some(spec(2, &["10.0.2.0/24"]))] {
        let mut state = state();
        state.change(&[spec(2, &["10.0.0.0/24"]), spec(3, &["10.0.1.0/24"])], &[]);
        let outcome = state.change(&[spec(4, &["10.0.0.0/24"]), spec(2, &["10.0.1.0/24"])], &[]);
        assert_eq!(skipped(&outcome), [key(2)]);
        assert_eq!(owner(&state, "10.0.0.9"), Some(key(4)));
        match later {
            Some(spec) => state.change(&[spec], &[]),
            None => state.change(&[], &[key(2)]),
        };
        assert_eq!(owner(&state, "10.0.0.9"), Some(key(4)));
    }
}

proptest! {
    /// Changes one by one come to the same as the list of all in the end.
    #[test]
    fn changes_add_up(
        changes in proptest::collection::vec((2u8..40, any::<bool>(), 0u8..3, 8u8..=32), 0..200),
    ) {
        let mut state = state();
        let mut wanted = BTreeMap::new();
        for (peer, add, net, length) in changes {
            if add {
                let cidr = format!("10.{peer}.{net}.0/{}", length.max(16));
                let spec = spec(peer, &[&cidr]);
                wanted.insert(peer, spec.clone());
                prop_assert!(skipped(&state.change(&[spec], &[])).is_empty());
            } else {
                wanted.remove(&peer);
                state.change(&[], &[key(peer)]);
            }
        }
        let mut anew = super::tests::state();
        let all: Vec<_> = wanted.into_values().collect();
        anew.change(&all, &[]);
        prop_assert_eq!(anew.peers.len(), state.peers.len());
        prop_assert_eq!(state.load.iter().sum::<usize>(), state.peers.len());
        for peer in 2..40 {
            for address in [format!("10.{peer}.0.0"), format!("10.{peer}.1.255"), format!("10.{peer}.2.1")] {
                prop_assert_eq!(owner(&state, &address), owner(&anew, &address));
            }
            let known = state.peers.get(&key(peer));
            let id = state.directory.keys.get(&key(peer));
            prop_assert_eq!(known.map(|known| known.id), id);
            if let Some(known) = known {
                prop_assert_eq!(state.directory.owner(known.id), Some(known.worker));
            }
        }
    }
}

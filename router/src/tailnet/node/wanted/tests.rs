use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::control::{Combined, State};
use crate::tailnet::wire::MapResponse;

const NOW: Timestamp = Timestamp(1_800_000_000_000_000);

fn settings() -> Settings {
    let route = |cidr: &str| Route {
        cidr: cidr.parse().unwrap(),
        snat: true,
        mode: crate::control::RouteMode::Fast,
    };
    Settings {
        advertise_routes: vec![route("10.2.0.0/16")],
        ..Settings::default()
    }
}

fn node(id: i64, more: Value) -> Value {
    let mut node = json!({
        "ID": id, "Name": format!("n{id}.tail.test."), "Key": format!("nodekey:{:064x}", id + 1),
        "DiscoKey": format!("discokey:{:064x}", id + 1), "Addresses": [format!("100.64.0.{id}/32")],
        "AllowedIPs": [format!("100.64.0.{id}/32")], "MachineAuthorized": true,
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        node[key] = value.clone();
    }
    node
}

/// A map after these responses.
fn map(responses: &[Value]) -> Netmap {
    let mut map = Netmap::default();
    for (at, response) in responses.iter().enumerate() {
        let response: MapResponse = serde_json::from_value(response.clone()).unwrap();
        map.apply(response, at == 0, NOW).unwrap();
    }
    map
}

fn snapshot(update: Update) -> (Option<Identity>, Snapshot) {
    match update {
        Update::Whole { identity, snapshot } => (identity, snapshot),
        Update::Delta(delta) => panic!("{delta:?}"),
    }
}

fn peers(responses: &[Value], settings: &Settings) -> BTreeMap<String, Vec<String>> {
    let key = NodeSecret::generate().unwrap();
    let (_, snapshot) = snapshot(whole(&key, &map(responses), settings, NOW));
    let peers = snapshot.peers.into_iter().map(|peer| {
        let nets = peer.allowed_ips.iter().map(ToString::to_string);
        (peer.name.unwrap_or_default(), nets.collect())
    });
    peers.collect()
}

#[test]
fn what_a_map_wants() {
    let key = NodeSecret::generate().unwrap();
    let map = map(&[json!({
        "Node": node(1, json!({"Addresses": ["100.64.0.1/32", "fd7a:115c:a1e0::1/128"]})),
        "Peers": [node(2, json!({"IsJailed": true, "SelfNodeV4MasqAddrForThisPeer": "100.70.0.1"}))],
        "PacketFilters": {"base": []},
    })]);
    let (identity, snapshot) = snapshot(whole(&key, &map, &settings(), NOW));
    let identity = identity.unwrap();
    assert!(identity.private_key == *key.wireguard());
    assert_eq!(identity.addresses.len(), 2);
    assert_eq!(snapshot.routes, settings().advertise_routes);
    // An empty filter lets nobody in.
    assert_eq!(snapshot.policy.rules.len(), 1);
    assert!(snapshot.policy.rules[0].sources.is_empty());
    let [peer] = &snapshot.peers[..] else {
        panic!("{snapshot:?}");
    };
    assert!(peer.jailed && !peer.roaming && peer.endpoint.is_none());
    let known = ["100.64.0.1", "100.70.0.1"].map(|text| text.parse().unwrap());
    assert_eq!(peer.masquerade, [known.into()]);
    assert_eq!(peer.name.as_deref(), Some("n2"));
}

#[test]
fn a_node_without_a_map_lets_nobody_in() {
    let key = NodeSecret::generate().unwrap();
    let (identity, snapshot) = snapshot(nothing(&key, &settings()));
    assert!(identity.unwrap().addresses.is_empty());
    assert!(snapshot.peers.is_empty());
    assert!(snapshot.policy.rules[0].sources.is_empty());
    assert_eq!(snapshot.policy.rules.len(), 1);
}

#[test]
fn routes_of_others_are_taken_if_that_is_wanted_and_never_the_internet() {
    let peer = node(
        2,
        json!({"AllowedIPs": [
            "100.64.0.2/32", "100.100.1.1/32", "fd7a:115c:a1e0::5/128", "10.9.0.1/32", "10.3.0.0/16", "10.2.7.0/24",
            "10.0.0.0/8", "0.0.0.0/0", "::/0",
        ]}),
    );
    let map = [json!({"Node": node(1, json!({})), "Peers": [peer]})];
    let own = ["100.64.0.2/32", "100.100.1.1/32", "fd7a:115c:a1e0::5/128"];
    let mut settings = settings();
    assert_eq!(peers(&map, &settings)["n2"], own);
    settings.accept_routes = true;
    // 10.2.0.0/16 is behind this router; what is wider leads there only where nothing narrower does.
    let mut wanted = vec!["10.0.0.0/8", "10.3.0.0/16", "10.9.0.1/32"];
    wanted.extend(own);
    assert_eq!(peers(&map, &settings)["n2"], wanted);
}

#[test]
fn nodes_that_cannot_be_reached_are_no_peers() {
    let past = Timestamp(NOW.0 - 1).to_string();
    let map = [json!({"Node": node(1, json!({})), "Peers": [
        node(2, json!({"Expired": true})),
        node(3, json!({"KeyExpiry": past})),
        node(4, json!({"DiscoKey": null})),
        node(5, json!({"DiscoKey": null, "IsWireGuardOnly": true})),
        node(6, json!({"DiscoKey": null, "HomeDERP": 1})),
        node(7, json!({"AllowedIPs": []})),
        node(8, json!({"AllowedIPs": ["10.7.0.0/16"], "UnsignedPeerAPIOnly": true})),
    ]})];
    let names: Vec<String> = peers(&map, &settings()).into_keys().collect();
    assert_eq!(names, ["n5", "n6", "n8"]);
}

#[test]
fn the_end_of_a_key_comes_by_itself() {
    let at = |seconds: i64| Timestamp(NOW.0 + seconds * 1_000_000);
    let peer = |id, seconds: i64| node(id, json!({"KeyExpiry": at(seconds).to_string()}));
    let mut map = map(&[
        json!({"Node": node(1, json!({})), "Peers": [peer(2, 20), peer(3, 10), node(4, json!({}))]}),
    ]);
    let mut expiries = Expiries::of(&map);
    assert_eq!(expiries.next(), Some(at(10)));
    assert_eq!(expiries.pop(at(9)), None);
    assert_eq!(expiries.pop(at(10)), Some(NodeId(3)));
    // One is given more time.
    let more = json!({"PeersChangedPatch": [{"NodeID": 2, "KeyExpiry": at(40).to_string()}]});
    let change = map
        .apply(serde_json::from_value(more).unwrap(), false, NOW)
        .unwrap();
    expiries.follow(&map, &change);
    assert_eq!(expiries.pop(at(20)), None);
    assert_eq!(expiries.next(), Some(at(40)));
    let key = NodeSecret::generate().unwrap();
    let change = Change {
        set: [NodeId(3)].into(),
        ..Change::default()
    };
    let told = delta(&key, &map, &settings(), &change, at(10));
    assert_eq!(told.remove.len(), 1);
    assert!(told.set.is_empty() && told.policy.is_none());
    // The clock was ahead.
    assert_eq!(expiries.take_back(at(10)), None);
    assert_eq!(expiries.take_back(at(9)), Some(NodeId(3)));
    assert_eq!(expiries.take_back(at(9)), None);
    assert_eq!(delta(&key, &map, &settings(), &change, at(9)).set.len(), 1);
    assert_eq!(expiries.pop(at(10)), Some(NodeId(3)));
    let gone = json!({"PeersRemoved": [3]});
    let change = map
        .apply(serde_json::from_value(gone).unwrap(), false, NOW)
        .unwrap();
    expiries.follow(&map, &change);
    assert!(!expiries.has_ended());
}

#[test]
fn a_node_that_has_joined_anew_keeps_the_key_of_the_one_that_has_ended() {
    let again = node(3, json!({"Key": node(2, json!({}))["Key"]}));
    let mut map = map(&[json!({"Node": node(1, json!({})), "Peers": [node(2, json!({})), again]})]);
    let ended = json!({"PeersChanged": [node(2, json!({"Expired": true}))]});
    let ended = serde_json::from_value(ended).unwrap();
    let change = map.apply(ended, false, NOW).unwrap();
    let key = NodeSecret::generate().unwrap();
    let told = delta(&key, &map, &settings(), &change, NOW);
    let set: Vec<_> = told
        .set
        .iter()
        .filter_map(|peer| peer.name.as_deref())
        .collect();
    assert_eq!(set, ["n3"]);
}

/// One delta for one node, however many there are.
#[test]
fn a_delta_says_no_more_than_what_has_changed() {
    let peers: Vec<Value> = (2..200).map(|id| node(id, json!({}))).collect();
    let mut map = map(&[json!({"Node": node(1, json!({})), "Peers": peers})]);
    let key = NodeSecret::generate().unwrap();
    let mut say = |response: Value| {
        let response = serde_json::from_value(response).unwrap();
        let change = map.apply(response, false, NOW).unwrap();
        delta(&key, &map, &settings(), &change, NOW)
    };
    let told = say(
        json!({"PeersChanged": [node(7, json!({"AllowedIPs": ["100.64.0.7/32", "100.64.1.7/32"]}))]}),
    );
    assert_eq!((told.set.len(), told.remove.len()), (1, 0));
    assert!(told.identity.is_none() && told.policy.is_none() && told.routes.is_none());
    let told = say(json!({"PeersRemoved": [8]}));
    assert_eq!((told.set.len(), told.remove.len()), (0, 1));
    let told = say(json!({"PacketFilters": {"base": []}}));
    assert!(told.policy.is_some() && told.set.is_empty());
    // Another key: the old one goes.
    let told = say(
        json!({"PeersChangedPatch": [{"NodeID": 9, "Key": format!("nodekey:{}", "ab".repeat(32))}]}),
    );
    assert_eq!((told.set.len(), told.remove.len()), (1, 1));
    assert!(is_nothing(&say(json!({"Health": ["something"]}))));
}

fn responses() -> impl Strategy<Value = Value> {
    let id = 2_i64..7;
    let nets = prop::sample::subsequence(
        vec![
            "100.64.0.9/32",
            "10.3.0.0/16",
            "10.4.0.0/16",
            "100.64.9.0/24",
        ],
        0..4,
    );
    let wire = (id.clone(), nets, any::<bool>(), -5_i64..5, any::<bool>()).prop_map(
        |(id, nets, expired, expiry, disco)| {
            let at = Timestamp(NOW.0 + expiry * 1_000_000).to_string();
            let mut all = vec![format!("100.64.0.{id}/32")];
            all.extend(nets.into_iter().map(str::to_owned));
            let mut more = json!({"AllowedIPs": all, "Expired": expired, "KeyExpiry": at});
            if !disco {
                more["DiscoKey"] = Value::Null;
            }
            node(id, more)
        },
    );
    let filter = prop_oneof![
        Just(json!([])),
        Just(
            json!([{"SrcIPs": ["*"], "DstPorts": [{"IP": "*", "Ports": {"First": 0, "Last": 65535}}]}])
        ),
    ];
    // No two nodes have one key.
    let key = (id.clone(), 0_u8..4).prop_map(|(id, n)| {
        let key = format!("{:02x}{:02x}", 0xa0 + id, n).repeat(16);
        json!({"NodeID": id, "Key": format!("nodekey:{key}")})
    });
    prop_oneof![
        prop::collection::vec(wire.clone(), 1..4).prop_map(|nodes| json!({"PeersChanged": nodes})),
        prop::collection::vec(wire, 1..4).prop_map(|nodes| json!({"Peers": nodes})),
        prop::collection::vec(id.clone(), 1..3).prop_map(|ids| json!({"PeersRemoved": ids})),
        key.prop_map(|patch| json!({"PeersChangedPatch": [patch]})),
        filter.prop_map(|filter| json!({"PacketFilters": {"base": filter}})),
        (1_u8..4).prop_map(
            |n| json!({"Node": node(1, json!({"Addresses": [format!("100.64.7.{n}/32")]}))})
        ),
    ]
}

/// What the router wants of a source that has said this, beside the numbers of its peers.
fn state(updates: Vec<Update>) -> Arc<State> {
    let mut combined = Combined::new(&["the tailnet"]);
    for update in updates {
        combined.apply(0, update);
    }
    Arc::new(combined.state().clone())
}

proptest! {
    #[test]
    fn deltas_one_by_one_or_merged_lead_where_the_whole_map_does(
        steps in prop::collection::vec((responses(), any::<bool>()), 1..12),
        accept in any::<bool>(),
    ) {
        let key = NodeSecret::generate().unwrap();
        let settings = Settings { accept_routes: accept, ..settings() };
        let first = json!({"Node": node(1, json!({})), "Peers": [node(2, json!({}))]});
        let mut map = map(&[first]);
        let mut said = vec![whole(&key, &map, &settings, NOW)];
        let mut pending = Change::default();
        for (response, waits) in steps {
            let response = serde_json::from_value(response).unwrap();
            merge(&mut pending, map.apply(response, false, NOW).unwrap());
            if !waits {
                let change = std::mem::take(&mut pending);
                said.push(Update::Delta(delta(&key, &map, &settings, &change, NOW)));
            }
        }
        said.push(Update::Delta(delta(&key, &map, &settings, &pending, NOW)));
        let folded = state(said);
        let wanted = state(vec![whole(&key, &map, &settings, NOW)]);
        prop_assert_eq!(folded, wanted);
    }
}

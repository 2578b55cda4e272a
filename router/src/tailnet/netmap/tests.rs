//! The recorded conversation, the rules of deltas one by one, and any sequence of them.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::tailnet::wire::tests::conversation;

const NOW: Timestamp = Timestamp(1_795_243_933_000_000);

fn key(number: u8) -> String {
    format!("nodekey:{}", format!("{number:02x}").repeat(32))
}

fn disco(number: u8) -> String {
    format!("discokey:{}", format!("{number:02x}").repeat(32))
}

fn node(id: i64) -> Value {
    json!({
        "ID": id, "StableID": id.to_string(), "Name": format!("n{id}.example."), "Key": key(id as u8),
        "Addresses": [format!("100.64.0.{id}/32")],
    })
}

fn first(peers: &[Value]) -> Value {
    json!({"Node": node(200), "Peers": peers})
}

/// A map of which `apply` is asked with JSON.
#[derive(Default)]
struct Told(Netmap);

impl Told {
    fn new(peers: &[Value]) -> Self {
        let mut told = Self::default();
        let response = serde_json::from_value(first(peers)).unwrap();
        told.0.apply(response, true, NOW).unwrap();
        told
    }

    fn tell(&mut self, response: Value) -> Change {
        let response = serde_json::from_value(response).unwrap();
        self.0.apply(response, false, NOW).unwrap()
    }

    fn ids(&self) -> Vec<i64> {
        self.0.peers().map(|peer| peer.id.0).collect()
    }

    fn peer(&self, id: i64) -> &Node {
        self.0.peer(NodeId(id)).unwrap()
    }
}

#[test]
fn the_recorded_conversation_ends_where_the_real_client_was() {
    for (who, id, peers) in [
        ("client", 2, vec![(1, "router", 0), (3, "router-two", 1)]),
        ("router-2", 1, vec![(2, "client-renamed", 0)]),
        ("router2", 3, vec![(2, "client-renamed", 0)]),
    ] {
        let (mut map, mut begun) = (Netmap::default(), false);
        for (name, body) in conversation() {
            let of = name
                .strip_prefix(who)
                .and_then(|rest| rest.strip_prefix('-'));
            let is_its = of
                .is_some_and(|rest| rest.ends_with("-MapResponse") && rest.split('-').count() == 2);
            if !is_its {
                continue;
            }
            let before = map.clone();
            let response = serde_json::from_value(body).unwrap();
            let change = map.apply(response, !begun, NOW).unwrap();
            begun = true;
            assert_eq!(change.is_empty(), before == map, "{name}: {change:?}");
        }
        assert_eq!(map.own().unwrap().id, NodeId(id), "{who}");
        let found: Vec<_> = map
            .peers()
            .map(|peer| {
                let name = peer.name.split('.').next().unwrap();
                (peer.id.0, name, peer.primary_routes.len())
            })
            .collect();
        assert_eq!(found, peers, "{who}");
        assert_eq!(map.magic_dns_suffix(), "tail.lab");
        assert!(map.policy().problems.is_empty());
        // It is kept and read again.
        let kept = serde_json::to_string(&map).unwrap();
        assert_eq!(serde_json::from_str::<Netmap>(&kept).unwrap(), map);
    }
}

#[test]
fn the_first_map_says_who_the_node_is() {
    let mut map = Netmap::default();
    assert_eq!(map.apply(MapResponse::default(), true, NOW), Err(NoSelf));
    let change = map.apply(MapResponse::default(), false, NOW).unwrap();
    assert!(change.is_empty());
}

#[test]
fn a_whole_list_excludes_all_else_and_an_empty_one_says_nothing() {
    let mut told = Told::new(&[node(1), node(2), node(3)]);
    let change = told.tell(json!({
        "Peers": [node(2), node(4)], "PeersRemoved": [2], "PeersChanged": [node(5)],
        "OnlineChange": {"2": true},
    }));
    assert_eq!(told.ids(), [2, 4]);
    assert_eq!(told.peer(2).online, None);
    assert_eq!(change.set, [NodeId(4)].into());
    assert_eq!(change.removed.len(), 2);
    assert!(told.tell(json!({"Peers": []})).is_empty());
    assert_eq!(told.ids(), [2, 4]);
}

#[test]
fn a_new_stream_without_peers_has_none() {
    let mut told = Told::new(&[node(1)]);
    told.tell(json!({"PacketFilters": {"extra": [{"SrcIPs": ["*"]}]}, "Health": ["a"]}));
    let response = serde_json::from_value(json!({"Node": node(200)})).unwrap();
    let change = told.0.apply(response, true, NOW).unwrap();
    assert_eq!(told.ids(), [0_i64; 0]);
    assert_eq!(change.removed.len(), 1);
    assert!(change.filter && change.health && !change.own);
}

#[test]
fn removed_before_changed_before_online_before_patch() {
    let mut told = Told::new(&[node(1), node(2)]);
    let change = told.tell(json!({
        "PeersRemoved": [1, 77], "PeersChanged": [node(1), null],
        "PeerSeenChange": {"1": true, "78": true, "x": true},
        "OnlineChange": {"1": true, "2": null},
        "PeersChangedPatch": [{"NodeID": 1, "Online": false, "DERPRegion": 9}, null, {"NodeID": 79, "Cap": 5}],
    }));
    assert_eq!(told.ids(), [1, 2]);
    let peer = told.peer(1);
    assert_eq!(peer.online, Some(false));
    assert_eq!(peer.last_seen, Some(NOW));
    assert_eq!(peer.home_derp, 9);
    assert_eq!(change.set, [NodeId(1)].into());
    assert!(change.removed.is_empty(), "it is there under the same key");
}

#[test]
fn in_a_patch_zero_and_null_leave_things_alone() {
    let mut told = Told::new(&[json!({
        "ID": 1, "Key": key(1), "HomeDERP": 4, "Endpoints": ["192.0.2.1:1"], "Cap": 100,
        "KeyExpiry": "2030-01-01T00:00:00Z",
    })]);
    let before = told.peer(1).clone();
    let change = told.tell(json!({"PeersChangedPatch": [
        {"NodeID": 1, "DERPRegion": 0, "Endpoints": null, "Cap": 0, "Key": null, "KeyExpiry": null}
    ]}));
    assert!(change.is_empty());
    assert_eq!(*told.peer(1), before);
    let change = told.tell(json!({"PeersChangedPatch": [
        {"NodeID": 1, "DERPRegion": 5, "Endpoints": [], "Key": key(9), "KeyExpiry": "0001-01-01T00:00:00Z"}
    ]}));
    let peer = told.peer(1);
    assert_eq!((peer.home_derp, peer.endpoints.len()), (5, 0));
    assert_eq!(peer.key_expiry, None);
    assert_eq!(change.removed, [before.key].into(), "the key that it had");
    assert_eq!(peer.key.to_string(), key(9));
}

#[test]
fn an_older_disco_key_does_not_win() {
    let seen = |time: &str, online: bool, disco_key: u8| {
        json!({"PeersChangedPatch": [{
            "NodeID": 1, "Online": online, "LastSeen": time, "DiscoKey": disco(disco_key)
        }]})
    };
    let mut told = Told::new(&[node(1)]);
    let peer = NodeId(1);
    let learned = disco(7).parse().unwrap();
    assert_eq!(told.0.learn_disco(peer, learned, NOW).set, [peer].into());
    assert!(told.0.learn_disco(peer, learned, NOW).is_empty());
    assert!(told.0.learn_disco(NodeId(9), learned, NOW).is_empty());

    assert!(told.tell(seen("2020-01-01T00:00:00Z", false, 8)).is_empty());
    assert_eq!(told.peer(1).disco, Some(learned));
    // One that is connected, and one that was seen later, know better.
    told.tell(seen("2020-01-01T00:00:00Z", true, 8));
    assert_eq!(told.peer(1).disco, disco(8).parse().ok());
    told.tell(seen("2029-01-01T00:00:00Z", false, 9));
    assert_eq!(told.peer(1).disco, disco(9).parse().ok());
    // The same in a whole list.
    let mut old = node(1);
    old["DiscoKey"] = json!(disco(8));
    old["LastSeen"] = json!("2028-01-01T00:00:00Z");
    told.tell(json!({"Peers": [old]}));
    assert_eq!(told.peer(1).disco, disco(9).parse().ok());
}

#[test]
fn filters_have_names() {
    let rule = |from: &str| json!([{"SrcIPs": [from], "DstPorts": [{"IP": "*", "Ports": {"Last": 65535}}]}]);
    let sources = |told: &Told| -> Vec<String> {
        let rules = told.0.policy().policy.rules;
        rules
            .iter()
            .flat_map(|rule| &rule.sources)
            .map(ToString::to_string)
            .collect()
    };
    let mut told = Told::new(&[]);
    assert_eq!(sources(&told), [""; 0]);
    assert!(
        told.tell(json!({"PacketFilter": rule("100.64.0.1")}))
            .filter
    );
    assert!(
        !told
            .tell(json!({"PacketFilter": rule("100.64.0.1")}))
            .filter,
        "the same"
    );
    told.tell(json!({"PacketFilters": {"z": rule("100.64.0.3"), "a": rule("100.64.0.2")}}));
    assert_eq!(
        sources(&told),
        ["100.64.0.2/32", "100.64.0.1/32", "100.64.0.3/32"]
    );
    told.tell(json!({"PacketFilters": {"a": null}}));
    assert_eq!(sources(&told), ["100.64.0.1/32", "100.64.0.3/32"]);
    told.tell(json!({"PacketFilters": {"*": null, "b": rule("100.64.0.4")}}));
    assert_eq!(sources(&told), ["100.64.0.4/32"]);
    told.tell(json!({"PacketFilters": null, "PacketFilter": null}));
    assert_eq!(sources(&told), ["100.64.0.4/32"]);
    assert!(told.tell(json!({"PacketFilter": []})).is_empty() || sources(&told).len() == 1);
}

#[test]
fn who_has_a_capability_that_the_filter_names_changes_the_filter() {
    let mut told = Told::new(&[node(1), node(2)]);
    told.tell(json!({"PacketFilter": [
        {"SrcIPs": ["cap:x"], "DstPorts": [{"IP": "*", "Ports": {"Last": 65535}}]}
    ]}));
    let change = told.tell(json!({"PeersChangedPatch": [{"NodeID": 1, "CapMap": {"y": null}}]}));
    assert!(!change.filter);
    let change = told.tell(json!({"PeersChangedPatch": [{"NodeID": 1, "CapMap": {"x": null}}]}));
    assert!(change.filter);
    let rules = told.0.policy().policy.rules;
    assert_eq!(rules[0].sources, ["100.64.0.1/32".parse().unwrap()]);
    assert!(told.tell(json!({"PeersRemoved": [2]})).set.is_empty());
    assert!(told.tell(json!({"PeersRemoved": [1]})).filter);
}

#[test]
fn relays_stay_where_they_are_null() {
    let mut told = Told::new(&[]);
    let region = json!({"RegionID": 1, "Nodes": [{"Name": "1a"}]});
    told.tell(json!({"DERPMap": {
        "Regions": {"1": region, "2": null}, "omitDefaultRegions": true,
        "HomeParams": {"RegionScore": {"1": 0.5}},
    }}));
    let regions = |told: &Told| told.0.derp().regions.clone().unwrap().len();
    assert_eq!(regions(&told), 1);
    assert!(told.tell(json!({"DERPMap": {"Regions": null}})).is_empty());
    assert_eq!(told.0.derp().omit_default_regions, Some(true));
    assert!(told.tell(json!({"DERPMap": {"HomeParams": {}}})).is_empty());
    let change = told.tell(json!({"DERPMap": {"Regions": {}}}));
    assert!(change.derp);
    assert_eq!(regions(&told), 0);
    assert_eq!(told.0.derp().omit_default_regions, None);
}

#[test]
fn health_is_cleared_by_emptiness_and_by_the_star() {
    let mut told = Told::new(&[]);
    let health = |told: &Told| told.0.health().collect::<Vec<_>>();
    told.tell(json!({"Health": ["a"], "DisplayMessages": {"m": {"Title": "T", "Text": "t"}, "n": {"Text": "u"}}}));
    assert_eq!(health(&told), ["a", "T: t", "u"]);
    assert!(
        told.tell(json!({"Health": null, "DisplayMessages": null}))
            .is_empty()
    );
    told.tell(json!({"Health": [], "DisplayMessages": {"n": null}}));
    assert_eq!(health(&told), ["T: t"]);
    assert!(
        told.tell(json!({"DisplayMessages": {"*": null, "o": {"Title": "O"}}}))
            .health
    );
    assert_eq!(health(&told), ["O"]);
}

#[test]
fn what_a_node_can_be() {
    let told = Told::new(&[
        json!({"ID": 1, "Key": key(1), "Addresses": ["100.64.0.1/32"], "DERP": "127.3.3.40:7"}),
        json!({"ID": 2, "Key": key(2), "Addresses": ["100.64.0.2/32"], "AllowedIPs": []}),
        json!({"ID": 3, "Key": key(3), "Addresses": ["100.64.0.3/32", "nonsense"],
            "AllowedIPs": ["100.64.0.3/32", "10.0.0.0/8"], "UnsignedPeerAPIOnly": true}),
        json!({"ID": 4, "Key": key(4), "DERP": "1.2.3.4:7", "IsJailed": true,
            "SelfNodeV4MasqAddrForThisPeer": "100.64.9.9", "SelfNodeV6MasqAddrForThisPeer": "100.64.9.9"}),
        json!({"ID": 5, "Key": "nodekey:cut"}),
        json!({"Key": key(6)}),
        json!({"ID": 7, "Key": format!("nodekey:{}", "0".repeat(64))}),
    ]);
    assert_eq!(told.ids(), [1, 2, 3, 4]);
    let peer = |id| told.peer(id);
    assert_eq!(
        peer(1).allowed_ips,
        peer(1).addresses,
        "absent: the addresses"
    );
    assert_eq!(peer(1).home_derp, 7);
    assert!(peer(2).allowed_ips.is_empty(), "empty is empty");
    assert_eq!(
        peer(3).allowed_ips,
        ["100.64.0.3/32".parse().unwrap()],
        "unsigned: no routes"
    );
    assert!(!peer(3).signed && peer(1).signed);
    assert_eq!(peer(4).home_derp, 0);
    assert!(peer(4).jailed);
    assert_eq!(peer(4).masquerade4, "100.64.9.9".parse().ok());
    assert_eq!(peer(4).masquerade6, None);
}

#[test]
fn keys_end_by_the_servers_word_or_its_clock() {
    let told = Told::new(&[
        json!({"ID": 1, "Key": key(1), "KeyExpiry": "2026-11-21T06:52:13Z"}),
        json!({"ID": 2, "Key": key(2), "Expired": true}),
        json!({"ID": 3, "Key": key(3), "KeyExpiry": "0001-01-01T00:00:00Z"}),
    ]);
    let expired = |id: i64, micros: i64| told.peer(id).is_expired(Timestamp(NOW.0 + micros));
    assert!(!expired(1, -1) && expired(1, 0));
    assert!(expired(2, -1) && !expired(3, i64::MAX / 4));
}

#[test]
fn tailnet_lock_is_noticed() {
    let mut told = Told::new(&[]);
    assert!(!told.0.is_locked());
    assert!(told.tell(json!({"TKAInfo": {"Head": "abc"}})).names);
    assert!(told.0.is_locked());
    told.tell(json!({"TKAInfo": null}));
    assert!(told.0.is_locked());
    told.tell(json!({"TKAInfo": {"Head": "abc", "Disabled": true}}));
    assert!(!told.0.is_locked());
}

fn any_node() -> impl Strategy<Value = Value> {
    let expiry = prop_oneof![Just(json!(null)), Just(json!("2030-01-01T00:00:00Z"))];
    (1..6_i64, 1..8_u8, any::<Option<bool>>(), 1..4_u8, expiry).prop_map(
        |(id, key_number, online, disco_number, expiry)| {
            json!({
                "ID": id, "Key": key(key_number), "Online": online, "DiscoKey": disco(disco_number),
                "KeyExpiry": expiry, "Addresses": [format!("100.64.0.{id}/32")],
            })
        },
    )
}

fn any_patch() -> impl Strategy<Value = Value> {
    (1..7_i64, any::<Option<bool>>(), prop::option::of(1..8_u8), prop::option::of(0..3_i64)).prop_map(
        |(id, online, key_number, derp)| {
            json!({"NodeID": id, "Online": online, "Key": key_number.map(key), "DERPRegion": derp})
        },
    )
}

fn any_response() -> impl Strategy<Value = Value> {
    let nodes = || prop::collection::vec(any_node(), 0..4);
    (
        prop::option::weighted(0.2, nodes()),
        nodes(),
        prop::collection::vec(1..7_i64, 0..3),
        prop::collection::vec(any_patch(), 0..3),
        prop::collection::btree_map("[1-6]", any::<bool>(), 0..3),
    )
        .prop_map(|(peers, changed, removed, patches, online)| {
            json!({
                "Node": node(200), "Peers": peers, "PeersChanged": changed, "PeersRemoved": removed,
                "PeersChangedPatch": patches, "OnlineChange": online,
            })
        })
}

proptest! {
    /// Whatever is told, the change is the difference of before and after: nothing is missed, nothing invented.
    #[test]
    fn a_change_is_the_difference(
        responses in prop::collection::vec((any_response(), prop::bool::weighted(0.1)), 1..8),
    ) {
        let mut map = Netmap::default();
        for (response, first) in responses {
            let before = map.clone();
            let response = serde_json::from_value(response).unwrap();
            let change = map.apply(response, first, NOW).unwrap();
            let differs = |id: &NodeId| before.peers.get(id) != map.peers.get(id);
            let different: BTreeSet<NodeId> = map.peers.keys().copied().filter(differs).collect();
            // What changes back within one response may be named.
            prop_assert!(change.set.is_superset(&different), "{:?} {different:?}", change.set);
            prop_assert!(change.set.iter().all(|id| map.peers.contains_key(id)));
            let keys = |map: &Netmap| map.peers().map(|peer| peer.key).collect::<BTreeSet<_>>();
            let (old, new) = (keys(&before), keys(&map));
            let gone: BTreeSet<_> = old.difference(&new).copied().collect();
            prop_assert!(change.removed.is_superset(&gone));
            prop_assert!(change.removed.is_disjoint(&new));
        }
    }
}

#[test]
fn peers_are_relays_as_the_filter_grants() {
    let capable = |id: i64, version: i64| {
        let mut node = node(id);
        node["Cap"] = json!(version);
        node["DiscoKey"] = json!(disco(id as u8));
        node
    };
    let mut told = Told::new(&[capable(1, 121), capable(2, 145), capable(3, 120), node(4)]);
    let grant = |sources: &[&str], to: &str, cap: &str| json!({"SrcIPs": sources, "CapGrant": [{"Dsts": [to], "CapMap": {cap: null}}]});
    let relays = |told: &Told| {
        let all = told.0.peer_relays();
        let ids = told.0.peers().filter(|peer| all.contains(&peer.key));
        ids.map(|peer| peer.id.0).collect::<Vec<_>>()
    };
    let target = "tailscale.com/cap/relay-target";
    for (rules, expected) in [
        (json!([]), vec![]),
        // Too old, or never connected: no relays.
        (json!([grant(&["*"], "100.64.0.0/10", target)]), vec![1, 2]),
        (
            json!([grant(&["100.64.0.2"], "100.64.0.200/32", target)]),
            vec![2],
        ),
        // Toward others, another capability, and the other way round.
        (json!([grant(&["*"], "100.64.0.7/32", target)]), vec![]),
        (
            json!([grant(&["*"], "100.64.0.0/10", "tailscale.com/cap/relay")]),
            vec![],
        ),
        (
            json!([grant(&["100.64.0.200"], "100.64.0.2/32", target)]),
            vec![],
        ),
        (
            json!([{"SrcIPs": ["100.64.0.1"], "CapGrant": [{"Dsts": ["100.64.0.0/10"], "Caps": [target]}]}]),
            vec![1],
        ),
        (
            json!([{"SrcIPs": ["*"], "CapGrant": [{"Dsts": ["nonsense", "::/0"], "CapMap": {target: []}}]}]),
            vec![],
        ),
    ] {
        let change = told.tell(json!({"PacketFilters": {"base": rules}}));
        assert!(change.filter || expected.is_empty());
        assert_eq!(relays(&told), expected, "{rules}");
    }
    told.tell(json!({"PacketFilters": {"base": [grant(&["*"], "100.64.0.0/10", target)]}}));
    assert_eq!(relays(&told), [1, 2]);
    let mut own = node(200);
    own["CapMap"] = json!({"disable-relay-client": null});
    told.tell(json!({"Node": own}));
    assert_eq!(relays(&told), [0; 0]);
}

#[test]
fn peers_have_this_node_relay_as_the_filter_grants() {
    // How old they are does not matter: whoever knows how to ask may ask.
    let mut told = Told::new(&[node(1), node(2)]);
    let grant = |sources: &[&str], to: &str, cap: &str| json!({"SrcIPs": sources, "CapGrant": [{"Dsts": [to], "CapMap": {cap: null}}]});
    let clients = |told: &Told| {
        let all = told.0.relay_clients();
        let ids = told.0.peers().filter(|peer| all.contains(&peer.key));
        ids.map(|peer| peer.id.0).collect::<Vec<_>>()
    };
    let relay = "tailscale.com/cap/relay";
    for (rules, expected) in [
        (json!([]), vec![]),
        (json!([grant(&["*"], "100.64.0.200/32", relay)]), vec![1, 2]),
        (
            json!([grant(&["100.64.0.2"], "100.64.0.0/10", relay)]),
            vec![2],
        ),
        (json!([grant(&["*"], "100.64.0.7/32", relay)]), vec![]),
        (
            json!([grant(
                &["*"],
                "100.64.0.0/10",
                "tailscale.com/cap/relay-target"
            )]),
            vec![],
        ),
    ] {
        told.tell(json!({"PacketFilters": {"base": rules}}));
        assert_eq!(clients(&told), expected, "{rules}");
    }
    let mut unsigned = node(1);
    unsigned["UnsignedPeerAPIOnly"] = json!(true);
    told.tell(json!({
        "PeersChanged": [unsigned],
        "PacketFilters": {"base": [grant(&["*"], "100.64.0.0/10", relay)]},
    }));
    assert_eq!(clients(&told), [2]);
    assert!(told.0.may_relay());
    let mut own = node(200);
    own["CapMap"] = json!({"disable-relay-server": null});
    told.tell(json!({"Node": own}));
    assert!(!told.0.may_relay());
}

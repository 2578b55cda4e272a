use serde_json::Value;

use super::*;
use crate::engine::Path;
use crate::tailnet::netmap::Netmap;
use crate::tailnet::node::{BackendState, Problem};
use crate::tailnet::paths::{PeerWay, RelayServer};
use crate::tailnet::time::Timestamp;

/// A router as it was recorded beside Headscale, with a peer that is reached directly.
pub(crate) fn tailnet() -> Tailnet {
    let recorded = crate::tailnet::wire::tests::conversation();
    let (_, body) = recorded
        .iter()
        .find(|(name, _)| name == "router-2-05-MapResponse")
        .unwrap();
    let mut map = Netmap::default();
    let response = serde_json::from_value(body.clone()).unwrap();
    map.apply(response, true, Timestamp(0)).unwrap();
    let own = map.own().unwrap();
    let mut advertised: Vec<_> = own.allowed_ips.clone();
    advertised.retain(|cidr| !own.addresses.contains(cidr));
    advertised.push("198.51.100.0/24".parse().unwrap());
    let peer = map.peers().next().unwrap().key;
    let way = PeerWay {
        path: Some(Path::Udp("192.0.2.1:41641".parse().unwrap())),
        latency: Some(std::time::Duration::from_millis(7)),
        active: true,
        ..PeerWay::default()
    };
    let stats = PeerStats {
        public_key: peer.into(),
        path: None,
        last_handshake: Some(std::time::UNIX_EPOCH),
        rx_bytes: 5,
        tx_bytes: 6,
        rx_packets: 2,
        tx_packets: 1,
        uncut: false,
        nowhere: None,
    };
    Tailnet {
        report: Arc::new(Report {
            state: BackendState::Running,
            key: Some(own.key),
            control_url: "http://hs.lab:8080".to_owned(),
            hostname: "gw".to_owned(),
            advertised,
            connected: Some(Timestamp(0)),
            problems: vec![Problem {
                part: "login",
                text: "something is wrong".to_owned(),
            }],
            map: Arc::new(map),
            ..Report::default()
        }),
        ways: Arc::new(PathsReport {
            peers: HashMap::from([(peer, way)]),
            ..PathsReport::default()
        }),
        stats: HashMap::from([(peer.into(), stats)]),
        settings_from: "file",
    }
}

/// A peer relay that does not run.
pub(crate) fn relay_server() -> RelayServer {
    RelayServer {
        port: 7777,
        addresses: vec!["203.0.113.7:7777".parse().unwrap()],
        clients: 3,
        ungranted: 2,
        failure: Some("listen on UDP port 7777: in use".to_owned()),
        counts: None,
    }
}

#[test]
fn a_peer_relay_is_shown() {
    let mut tailnet = tailnet();
    let document = serde_json::to_value(&tailnet).unwrap();
    assert_eq!(document["tailnet"]["relay_server"], Value::Null);
    let ways = Arc::make_mut(&mut tailnet.ways);
    let relay = ways.relay_server.insert(relay_server());
    let problem = relay.problem().unwrap();
    assert!(problem.contains("port 7777: in use") && problem.contains("relay_server_port"));
    let mut document = serde_json::to_value(&tailnet).unwrap();
    let shown = &mut document["tailnet"]["relay_server"];
    assert_eq!(
        (&shown["port"], &shown["running"], &shown["ungranted"]),
        (&Value::from(7777), &Value::from(false), &Value::from(2))
    );
    assert!(!page(&document).0.contains("relay     UDP"));
    document["tailnet"]["relay_server"]["running"] = true.into();
    let (head, _) = page(&document);
    let line = "relay     UDP 7777 at 203.0.113.7:7777: 0 places open, 0 connecting, 0 packets";
    assert!(head.contains(line), "{head}");
    document["tailnet"]["relay_server"]["clients"] = 0.into();
    let (head, _) = page(&document);
    assert!(
        head.contains("grant nodes tailscale.com/cap/relay"),
        "{head}"
    );
}

#[test]
fn scripts_find_tailscales_fields() {
    let tailnet = tailnet();
    let own = tailnet.report.map.own().unwrap();
    let document = serde_json::to_value(&tailnet).unwrap();
    assert_eq!(document["BackendState"], "Running");
    assert_eq!(document["AuthURL"], "");
    assert_eq!(document["Self"]["HostName"], "gw");
    assert_eq!(document["Self"]["DNSName"], own.name.as_str());
    assert_eq!(document["Self"]["Online"], true);
    assert_eq!(document["Self"]["PublicKey"], own.key.to_string());
    assert_eq!(document["Health"][0], "something is wrong");
    assert_eq!(
        document["MagicDNSSuffix"],
        tailnet.report.map.magic_dns_suffix()
    );
    let peers = document["Peer"].as_object().unwrap();
    assert_eq!(peers.len(), tailnet.report.map.peers().count());
    for (key, peer) in peers {
        assert!(key.starts_with("nodekey:"), "{key}");
        for field in [
            "HostName",
            "DNSName",
            "TailscaleIPs",
            "AllowedIPs",
            "CurAddr",
            "Relay",
            "Online",
            "Active",
            "RxBytes",
            "TxBytes",
            "LastHandshake",
        ] {
            assert!(!peer[field].is_null(), "{field} is missing: {peer}");
        }
    }
    let known = tailnet.report.map.peers().next().unwrap();
    let peer = &peers[&known.key.to_string()];
    assert_eq!(peer["CurAddr"], "192.0.2.1:41641");
    assert_eq!(peer["LastHandshake"], "1970-01-01T00:00:00Z");
    assert_eq!(
        (&peer["RxBytes"], &peer["TxBytes"]),
        (&Value::from(5), &Value::from(6))
    );
    assert_eq!(peer["Active"], true);
}

#[test]
fn a_node_without_a_map_has_fields_too() {
    let tailnet = Tailnet {
        report: Arc::new(Report {
            state: BackendState::NeedsLogin,
            auth_url: Some("http://hs.lab/register/x".to_owned()),
            advertised: vec!["10.0.0.0/8".parse().unwrap()],
            ..Report::default()
        }),
        ways: Arc::default(),
        stats: HashMap::new(),
        settings_from: "commands",
    };
    let document = serde_json::to_value(&tailnet).unwrap();
    assert_eq!(document["BackendState"], "NeedsLogin");
    assert_eq!(document["AuthURL"], "http://hs.lab/register/x");
    assert_eq!(document["Self"]["Online"], false);
    assert_eq!(document["CurrentTailnet"], Value::Null);
    assert_eq!(document["tailnet"]["routes"][0]["approved"], Value::Null);
    let (head, _) = page(&document);
    assert!(head.contains("visit http://hs.lab/register/x"), "{head}");
}

#[test]
fn a_route_that_is_not_approved_says_what_to_do() {
    let mut tailnet = tailnet();
    let routes = tailnet.routes();
    let (missing, approved) = routes.split_last().unwrap();
    assert!(!approved.is_empty());
    for route in approved {
        assert_eq!((route.approved, &route.advice), (Some(true), &None));
    }
    assert_eq!(missing.approved, Some(false));
    let id = tailnet.report.map.own().unwrap().id.0;
    let advice = missing.advice.as_deref().unwrap();
    let command = format!("headscale nodes approve-routes --identifier {id} --routes ");
    assert!(advice.contains(&command), "{advice}");
    // All of them, for the command replaces what was approved.
    for route in &routes {
        assert!(advice.contains(&route.cidr.to_string()), "{advice}");
    }
    let report = Arc::make_mut(&mut tailnet.report);
    report.control_url = crate::tailnet::node::DEFAULT_CONTROL_URL.to_owned();
    let routes = tailnet.routes();
    let advice = routes.last().unwrap().advice.as_deref().unwrap();
    assert!(
        advice.contains("login.tailscale.com/admin/machines"),
        "{advice}"
    );
}

#[test]
fn the_page_names_peers_and_their_paths() {
    let tailnet = tailnet();
    let mut document = serde_json::to_value(&tailnet).unwrap();
    document["problems"] = serde_json::json!([{"part": "login", "error": "something is wrong"}]);
    let (head, peers) = page(&document);
    for part in [
        "tailnet   Running: ",
        "http://hs.lab:8080",
        "ROUTE     198.51.100.0/24 is advertised but not approved",
        "approved",
    ] {
        assert!(head.contains(part), "{part} is missing in:\n{head}");
    }
    assert!(!head.contains("HEALTH"), "told twice:\n{head}");
    assert!(
        peers.contains("active direct 192.0.2.1:41641 in 7.0 ms"),
        "{peers}"
    );
    assert_eq!(page(&serde_json::json!({})), Default::default());
}

/// Such a peer is left out before the server says anything.
#[test]
fn a_key_that_has_ended_by_the_clock_is_shown() {
    let mut tailnet = tailnet();
    let id = tailnet.report.map.peers().next().unwrap().id.0;
    let now = Timestamp::now();
    for (seconds, ahead, ended) in [
        (-5, 0, true),
        (50, 0, false),
        (50, 60, true),
        (-5, -60, false),
    ] {
        let expiry = Timestamp(now.0 + seconds * 1_000_000).to_string();
        let patch = serde_json::json!({"PeersChangedPatch": [{"NodeID": id, "KeyExpiry": expiry}]});
        let report = Arc::make_mut(&mut tailnet.report);
        report.ahead = ahead * 1_000_000;
        let map = Arc::make_mut(&mut report.map);
        map.apply(serde_json::from_value(patch).unwrap(), false, now)
            .unwrap();
        let key = map.peers().next().unwrap().key.to_string();
        let document = serde_json::to_value(&tailnet).unwrap();
        assert_eq!(document["Peer"][&key]["Expired"] == true, ended);
        assert_eq!(document["tailnet"]["peers"][0]["expired"], ended);
        assert_eq!(page(&document).1.contains("key expired"), ended);
    }
}

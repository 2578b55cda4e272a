//! The document. Names and meanings of the fields that begin with capitals are those of Tailscale's `ipn/ipnstate`.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::Tailnet;
use super::routes::AdvertisedRoute;
use crate::engine;
use crate::tailnet::netmap::Node;
use crate::tailnet::node::BackendState;
use crate::tailnet::paths::{PeerWay, RelayServer};
use crate::tailnet::relay::server::Reason;
use crate::tailnet::time::Timestamp;
use crate::wireguard::keys::PublicKey;

/// Go's zero time.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// What is added to the status document's top.
#[derive(Serialize)]
pub(super) struct Document<'t> {
    tailnet: Own<'t>,
    #[serde(rename = "Version")]
    version: String,
    #[serde(rename = "TUN")]
    tun: bool,
    #[serde(rename = "BackendState")]
    state: &'static str,
    #[serde(rename = "HaveNodeKey")]
    have_node_key: bool,
    #[serde(rename = "AuthURL")]
    auth_url: String,
    #[serde(rename = "TailscaleIPs")]
    addresses: Vec<IpAddr>,
    #[serde(rename = "Self")]
    own: Value,
    #[serde(rename = "Health")]
    health: Vec<String>,
    #[serde(rename = "MagicDNSSuffix")]
    magic_dns_suffix: String,
    #[serde(rename = "CurrentTailnet")]
    current: Value,
    #[serde(rename = "Peer")]
    peers: Peers<'t>,
    #[serde(rename = "User")]
    users: BTreeMap<i64, Value>,
}

/// Sluice's own part.
#[derive(Serialize)]
struct Own<'t> {
    state: &'static str,
    settings_from: &'static str,
    control_url: String,
    auth_url: Option<String>,
    /// Full name, without the final dot; empty before the first map.
    name: String,
    hostname: String,
    addresses: Vec<IpAddr>,
    tags: Vec<String>,
    ephemeral: bool,
    accept_routes: bool,
    /// Since when the server is connected, RFC 3339.
    connected_since: Option<String>,
    key_expiry: Option<String>,
    home_relay: Option<String>,
    endpoints: Vec<String>,
    /// What the router is as a peer relay; null if it is none.
    relay_server: Option<Value>,
    routes: Vec<AdvertisedRoute>,
    peers: Ways<'t>,
}

/// The peers by key, in Tailscale's words. Each is made as it is written: all at once are tens of MiB in a large
/// tailnet.
struct Peers<'t>(&'t Tailnet);

impl Serialize for Peers<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let nodes = self.0.report.map.peers();
        serializer.collect_map(nodes.map(|node| (node.key.to_string(), peer(self.0, node))))
    }
}

/// How the peers are reached, each made as it is written too.
struct Ways<'t>(&'t Tailnet);

impl Serialize for Ways<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let nodes = self.0.report.map.peers();
        serializer.collect_seq(nodes.map(|node| way(self.0, node)))
    }
}

pub(super) fn document(tailnet: &Tailnet) -> Document<'_> {
    let report = &tailnet.report;
    let map = &report.map;
    let own = map.own();
    let running = !matches!(
        report.state,
        BackendState::NoState | BackendState::NeedsLogin
    );
    let suffix = map.magic_dns_suffix().to_owned();
    let users = map.peers().chain(own).map(|node| node.user);
    let users = users.filter_map(|id| {
        let user = map.user(id)?;
        let named = json!({
            "ID": id,
            "LoginName": user.login_name,
            "DisplayName": user.display_name,
        });
        Some((id, named))
    });
    Document {
        tailnet: own_part(tailnet),
        version: format!("{}-sluice", env!("CARGO_PKG_VERSION")),
        tun: true,
        state: report.state.label(),
        have_node_key: report.key.is_some(),
        auth_url: report.auth_url.clone().unwrap_or_default(),
        addresses: own.map(addresses).unwrap_or_default(),
        own: self_node(tailnet),
        health: tailnet.health(),
        current: match running {
            true => json!({
                "Name": map.domain(),
                "MagicDNSSuffix": suffix,
                "MagicDNSEnabled": !suffix.is_empty(),
            }),
            false => Value::Null,
        },
        magic_dns_suffix: suffix,
        peers: Peers(tailnet),
        users: users.collect(),
    }
}

fn own_part(tailnet: &Tailnet) -> Own<'_> {
    let report = &tailnet.report;
    let own = report.map.own();
    Own {
        state: report.state.label(),
        settings_from: tailnet.settings_from,
        control_url: report.control_url.clone(),
        auth_url: report.auth_url.clone(),
        name: own.map(|own| undotted(&own.name)).unwrap_or_default(),
        hostname: report.hostname.clone(),
        addresses: own.map(addresses).unwrap_or_default(),
        tags: match own {
            Some(own) => own.tags.clone(),
            None => report.tags.clone(),
        },
        ephemeral: report.ephemeral,
        accept_routes: report.accept_routes,
        connected_since: report.connected.map(|time| time.to_string()),
        key_expiry: report.key_expiry.map(|time| time.to_string()),
        home_relay: tailnet.home(),
        endpoints: endpoints(tailnet),
        relay_server: tailnet.ways.relay_server.as_ref().map(relay_server),
        routes: tailnet.routes(),
        peers: Ways(tailnet),
    }
}

fn relay_server(relay: &RelayServer) -> Value {
    let stats = relay.stats();
    let carried = || stats.carried.iter().flatten();
    let dropped = Reason::ALL.iter().zip(stats.dropped);
    let dropped: BTreeMap<_, _> = dropped.map(|(why, count)| (why.label(), count)).collect();
    json!({
        "port": relay.port,
        "running": relay.counts.is_some(),
        "addresses": relay.addresses,
        "clients": relay.clients,
        "connecting": stats.connecting,
        "open": stats.open,
        "packets": carried().map(|count| count.packets).sum::<u64>(),
        "bytes": carried().map(|count| count.bytes).sum::<u64>(),
        "dropped": dropped,
        "refused": stats.refused,
        "ungranted": relay.ungranted,
    })
}

/// Whether its key has ended, whether or not the server has said so yet.
fn is_expired(tailnet: &Tailnet, node: &Node) -> bool {
    let ahead = tailnet.report.ahead;
    node.is_expired(Timestamp(Timestamp::now().0.saturating_add(ahead)))
}

/// How a peer is reached, in Sluice's words.
fn way(tailnet: &Tailnet, node: &Node) -> Value {
    let way = tailnet.ways.peers.get(&node.key);
    let stats = tailnet.stats.get(&PublicKey::from(node.key));
    json!({
        "name": name(node),
        "addresses": addresses(node),
        "routes": subnets(node),
        "tags": node.tags,
        "os": node.os,
        "user": tailnet.report.map.user(node.user).map(|user| &user.login_name),
        "public_key": PublicKey::from(node.key).to_string(),
        "online": node.online,
        "expired": is_expired(tailnet, node),
        "way": path(tailnet, node),
        "latency_ms": way.and_then(|way| way.latency).map(|time| time.as_secs_f64() * 1e3),
        "active": way.is_some_and(|way| way.active),
        "why": way.and_then(|way| way.why.clone()),
        "last_handshake": stats
            .and_then(|stats| stats.last_handshake)
            .and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok())
            .map(|time| time.as_secs()),
        "last_seen": node.last_seen.map(|time| time.to_string()),
        "rx_bytes": stats.map_or(0, |stats| stats.rx_bytes),
        "tx_bytes": stats.map_or(0, |stats| stats.tx_bytes),
    })
}

/// `direct 192.0.2.1:1`, `peer relay 192.0.2.9:7:vni:5`, `relay fra`, or nothing.
fn path(tailnet: &Tailnet, node: &Node) -> Option<String> {
    let way = current(tailnet, node)?;
    match way {
        engine::Path::Udp(address) => Some(format!("direct {address}")),
        engine::Path::PeerRelay(..) => Some(format!("peer relay {way}")),
        engine::Path::Relay(relay) => Some(format!("relay {}", tailnet.ways.region_code(relay.0))),
    }
}

fn current(tailnet: &Tailnet, node: &Node) -> Option<engine::Path> {
    let way = tailnet.ways.peers.get(&node.key);
    let stats = tailnet.stats.get(&PublicKey::from(node.key));
    way.and_then(|way| way.path)
        .or_else(|| stats.and_then(|stats| stats.path))
}

fn endpoints(tailnet: &Tailnet) -> Vec<String> {
    let all = tailnet.ways.endpoints.iter();
    all.map(|(address, _)| address.to_string()).collect()
}

fn self_node(tailnet: &Tailnet) -> Value {
    let report = &tailnet.report;
    let Some(own) = report.map.own() else {
        return json!({
            "HostName": report.hostname,
            "PublicKey": report.key.map(|key| key.to_string()).unwrap_or_default(),
            "Online": false,
            "TailscaleIPs": [],
        });
    };
    let mut node = node(tailnet, own);
    node["HostName"] = json!(report.hostname);
    node["Addrs"] = json!(endpoints(tailnet));
    node["Relay"] = json!(tailnet.home().unwrap_or_default());
    node["Online"] = json!(report.connected.is_some());
    if let Some(expiry) = report.key_expiry {
        node["KeyExpiry"] = json!(expiry.to_string());
    }
    node["RxBytes"] = json!(
        tailnet
            .stats
            .values()
            .map(|stats| stats.rx_bytes)
            .sum::<u64>()
    );
    node["TxBytes"] = json!(
        tailnet
            .stats
            .values()
            .map(|stats| stats.tx_bytes)
            .sum::<u64>()
    );
    node["CurAddr"] = json!("");
    node["Active"] = json!(false);
    node["LastHandshake"] = json!(NEVER);
    node
}

fn peer(tailnet: &Tailnet, peer: &Node) -> Value {
    let way = tailnet.ways.peers.get(&peer.key);
    let stats = tailnet.stats.get(&PublicKey::from(peer.key));
    let mut node = node(tailnet, peer);
    let address = current(tailnet, peer).and_then(engine::Path::endpoint);
    // As tailscaled: an address is a direct path, which the relay then is not.
    let relay = way.and_then(|way| way.region.clone());
    let relay = relay.or_else(|| {
        let home = u32::try_from(peer.home_derp)
            .ok()
            .filter(|home| *home > 0)?;
        Some(tailnet.ways.region_code(home))
    });
    let handshake = stats.and_then(|stats| stats.last_handshake);
    node["Addrs"] = json!(peer.endpoints);
    node["CurAddr"] = json!(
        address
            .map(|address| address.to_string())
            .unwrap_or_default()
    );
    if let Some(way @ engine::Path::PeerRelay(..)) = current(tailnet, peer) {
        node["PeerRelay"] = json!(way.to_string());
    }
    node["Relay"] = json!(relay.unwrap_or_default());
    node["RxBytes"] = json!(stats.map_or(0, |stats| stats.rx_bytes));
    node["TxBytes"] = json!(stats.map_or(0, |stats| stats.tx_bytes));
    node["LastHandshake"] = json!(match handshake {
        Some(time) => Timestamp::from(time).to_string(),
        None => NEVER.to_owned(),
    });
    node["Online"] = json!(peer.online == Some(true));
    node["Active"] = json!(way.is_some_and(|way: &PeerWay| way.active));
    node["InMagicSock"] = json!(way.is_some());
    node["InEngine"] = json!(stats.is_some());
    node
}

/// What the map says of a node.
fn node(tailnet: &Tailnet, node: &Node) -> Value {
    let seen = node.last_seen.filter(|_| node.online != Some(true));
    let mut out = json!({
        "ID": node.stable_id,
        "NodeID": node.id.0,
        "PublicKey": node.key.to_string(),
        "HostName": node.hostname,
        "DNSName": node.name,
        "OS": node.os,
        "UserID": node.user,
        "TailscaleIPs": addresses(node),
        "AllowedIPs": node.allowed_ips,
        "LastSeen": seen.map_or_else(|| NEVER.to_owned(), |time| time.to_string()),
        "ExitNode": false,
        "ExitNodeOption": node.allowed_ips.iter().any(|cidr| cidr.prefix_len() == 0),
        "InNetworkMap": true,
    });
    // Absent where empty, as in Go.
    if !node.tags.is_empty() {
        out["Tags"] = json!(node.tags);
    }
    if !node.primary_routes.is_empty() {
        out["PrimaryRoutes"] = json!(node.primary_routes);
    }
    if is_expired(tailnet, node) {
        out["Expired"] = json!(true);
    }
    if let Some(expiry) = node.key_expiry {
        out["KeyExpiry"] = json!(expiry.to_string());
    }
    out
}

fn addresses(node: &Node) -> Vec<IpAddr> {
    node.addresses.iter().map(IpNet::addr).collect()
}

/// What is routed to a node besides its own addresses.
fn subnets(node: &Node) -> Vec<&IpNet> {
    let all = node.allowed_ips.iter();
    all.filter(|cidr| !node.addresses.contains(cidr)).collect()
}

/// A node's name for people.
fn name(node: &Node) -> String {
    match node.name.as_str() {
        "" => node.hostname.clone(),
        name => undotted(name),
    }
}

fn undotted(name: &str) -> String {
    name.trim_end_matches('.').to_owned()
}

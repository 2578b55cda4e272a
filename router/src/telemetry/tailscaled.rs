//! Metrics under the names that tailscaled gives them, so that dashboards made for it show a router of ours.
//!
//! Names and labels are those of Tailscale's `wgengine/magicsock`, `util/usermetric`, `ipn/ipnlocal` and `health`. What
//! nobody counts here is not there.

use std::collections::HashMap;

use metrics::{Label, Unit};

use super::{Kind, Metrics};
use crate::api::{Packets, Status, Tailnet};
use crate::engine::Path;
use crate::tailnet::paths::RelayServer;
use crate::tailnet::relay::server::Reason;
use crate::wireguard::keys::PublicKey;

/// Routes that the router offers.
pub const ADVERTISED: &str = "tailscaled_advertised_routes";
/// Those of them that are approved.
pub const APPROVED: &str = "tailscaled_approved_routes";
/// Whether a route is approved.
pub const ROUTE_APPROVED: &str = "sluice_tailnet_route_approved";
/// Whether this router is the one that serves a route.
pub const ROUTE_PRIMARY: &str = "sluice_tailnet_route_primary";
/// Home relay.
pub const HOME: &str = "tailscaled_home_derp_region_id";
/// What is wrong.
pub const HEALTH: &str = "tailscaled_health_messages";
/// Bytes from peers by path.
pub const RECEIVED: &str = "tailscaled_inbound_bytes_total";
/// Bytes to peers by path.
pub const SENT: &str = "tailscaled_outbound_bytes_total";
/// Packets from peers by path.
pub const RECEIVED_PACKETS: &str = "tailscaled_inbound_packets_total";
/// Packets to peers by path.
pub const SENT_PACKETS: &str = "tailscaled_outbound_packets_total";
/// Packets from peers that were dropped.
pub const RECEIVED_DROPPED: &str = "tailscaled_inbound_dropped_packets_total";
/// Packets to peers that were dropped.
pub const SENT_DROPPED: &str = "tailscaled_outbound_dropped_packets_total";
/// Packets that were carried between others.
pub const RELAYED_PACKETS: &str = "tailscaled_peer_relay_forwarded_packets_total";
/// Their bytes.
pub const RELAYED: &str = "tailscaled_peer_relay_forwarded_bytes_total";
/// Places for pairs of others.
pub const RELAY_PLACES: &str = "tailscaled_peer_relay_endpoints";
/// Whether the peer relay runs.
pub const RELAY_RUNS: &str = "sluice_tailnet_relay_server_running";
/// Nodes that may use it.
pub const RELAY_CLIENTS: &str = "sluice_tailnet_relay_server_clients";
/// Packets that the peer relay has dropped.
pub const RELAY_DROPPED: &str = "sluice_tailnet_relay_server_dropped_packets_total";
/// Places that it has not given.
pub const RELAY_REFUSED: &str = "sluice_tailnet_relay_server_refused_total";

pub(super) const DESCRIPTIONS: &[(Kind, &str, Unit, &str)] = &[
    (
        Kind::Gauge,
        ADVERTISED,
        Unit::Count,
        "Number of advertised network routes (e.g. by a subnet router)",
    ),
    (
        Kind::Gauge,
        APPROVED,
        Unit::Count,
        "Number of approved network routes (e.g. by a subnet router)",
    ),
    (
        Kind::Gauge,
        ROUTE_APPROVED,
        Unit::Count,
        "1 for an advertised route that is approved, 0 for one that is not, by route",
    ),
    (
        Kind::Gauge,
        ROUTE_PRIMARY,
        Unit::Count,
        "1 for an advertised route that this router serves, 0 where another one does or nobody, by route",
    ),
    (
        Kind::Gauge,
        HOME,
        Unit::Count,
        "DERP region ID of this node's home relay server",
    ),
    (
        Kind::Gauge,
        HEALTH,
        Unit::Count,
        "Number of health messages broken down by type",
    ),
    (
        Kind::Counter,
        RECEIVED,
        Unit::Bytes,
        "Bytes received from other peers, by the path in use when they were counted",
    ),
    (
        Kind::Counter,
        SENT,
        Unit::Bytes,
        "Bytes sent to other peers, by the path in use when they were counted",
    ),
    (
        Kind::Counter,
        RECEIVED_PACKETS,
        Unit::Count,
        "Packets received from other peers, by the path in use when they were counted",
    ),
    (
        Kind::Counter,
        SENT_PACKETS,
        Unit::Count,
        "Packets sent to other peers, by the path in use when they were counted",
    ),
    (
        Kind::Counter,
        RECEIVED_DROPPED,
        Unit::Count,
        "Packets from other peers that were dropped, by reason",
    ),
    (
        Kind::Counter,
        SENT_DROPPED,
        Unit::Count,
        "Packets to other peers that were dropped, by reason",
    ),
    (
        Kind::Counter,
        RELAYED_PACKETS,
        Unit::Count,
        "Number of packets forwarded via Peer Relay",
    ),
    (
        Kind::Counter,
        RELAYED,
        Unit::Bytes,
        "Number of bytes forwarded via Peer Relay",
    ),
    (
        Kind::Gauge,
        RELAY_PLACES,
        Unit::Count,
        "Number of allocated Peer Relay endpoints",
    ),
    (
        Kind::Gauge,
        RELAY_RUNS,
        Unit::Count,
        "1 while the router is a peer relay, 0 while it is to be one and cannot",
    ),
    (
        Kind::Gauge,
        RELAY_CLIENTS,
        Unit::Count,
        "Nodes that may use the router as a peer relay",
    ),
    (
        Kind::Counter,
        RELAY_DROPPED,
        Unit::Count,
        "Packets for the peer relay that went no further, by reason",
    ),
    (
        Kind::Counter,
        RELAY_REFUSED,
        Unit::Count,
        "Places on the peer relay that were asked for in vain: without a grant, or too many",
    ),
];

/// Bytes and packets by path. The engine counts them by peer, and a peer's path changes: what has come since the last scrape is
/// put down to the path of now.
#[derive(Debug, Default)]
pub(super) struct ByPath {
    /// [`NAMES`]'s counts, as they were last.
    peers: HashMap<PublicKey, [u64; 4]>,
    sums: HashMap<&'static str, [u64; 4]>,
}

impl ByPath {
    fn follow(&mut self, tailnet: &Tailnet) {
        let map = &tailnet.report.map;
        let mut now = HashMap::new();
        for node in map.peers() {
            let key = PublicKey::from(node.key);
            let Some(stats) = tailnet.stats.get(&key) else {
                continue;
            };
            let counts = [
                stats.rx_bytes,
                stats.tx_bytes,
                stats.rx_packets,
                stats.tx_packets,
            ];
            let before = self.peers.get(&key).copied().unwrap_or_default();
            now.insert(key, counts);
            let way = tailnet.ways.peers.get(&node.key).and_then(|way| way.path);
            let path = match way.or(stats.path) {
                Some(Path::Udp(address)) if address.is_ipv4() => "direct_ipv4",
                Some(Path::Udp(_)) => "direct_ipv6",
                Some(Path::PeerRelay(at, _)) if at.is_ipv4() => "peer_relay_ipv4",
                Some(Path::PeerRelay(..)) => "peer_relay_ipv6",
                Some(Path::Relay(_)) => "derp",
                None => continue,
            };
            let sums = self.sums.entry(path).or_default();
            for ((sum, count), before) in sums.iter_mut().zip(counts).zip(before) {
                // A peer that has left and come again begins anew.
                *sum += count.checked_sub(before).unwrap_or(count);
            }
        }
        self.peers = now;
    }
}

/// What is counted by path.
const NAMES: [&str; 4] = [RECEIVED, SENT, RECEIVED_PACKETS, SENT_PACKETS];

/// Why packets were dropped, in tailscaled's words, and our verdicts that say the same.
const REASONS: &[(&str, &[&str])] = &[
    ("acl", &["drop_policy", "reject_policy"]),
    ("fragment", &["drop_fragment"]),
    ("too_short", &["drop_malformed"]),
];

impl Metrics {
    fn relay_server(&self, relay: &RelayServer) {
        let runs = relay.counts.is_some();
        self.gauge(RELAY_RUNS, vec![], if runs { 1.0 } else { 0.0 });
        self.gauge(RELAY_CLIENTS, vec![], relay.clients as f64);
        let stats = relay.stats();
        for (state, places) in [("connecting", stats.connecting), ("open", stats.open)] {
            let state = vec![Label::new("state", state)];
            self.gauge(RELAY_PLACES, state, places as f64);
        }
        let transports = ["udp4", "udp6"];
        for (by, row) in transports.into_iter().zip(stats.carried) {
            for (on, count) in transports.into_iter().zip(row) {
                let labels = || {
                    let by = Label::new("transport_in", by);
                    vec![by, Label::new("transport_out", on)]
                };
                self.counter(RELAYED_PACKETS, labels(), count.packets);
                self.counter(RELAYED, labels(), count.bytes);
            }
        }
        for (reason, count) in Reason::ALL.iter().zip(stats.dropped) {
            let reason = vec![Label::new("reason", reason.label())];
            self.counter(RELAY_DROPPED, reason, count);
        }
        for (reason, count) in [("grant", relay.ungranted), ("full", stats.refused)] {
            let reason = vec![Label::new("reason", reason)];
            self.counter(RELAY_REFUSED, reason, count);
        }
    }

    pub(super) fn tailscaled(&self, status: &Status) {
        let Some(tailnet) = &status.tailnet else {
            return;
        };
        let routes = tailnet.routes();
        let approved = routes.iter().filter(|route| route.approved == Some(true));
        self.gauge(ADVERTISED, vec![], routes.len() as f64);
        if tailnet.report.map.own().is_some() {
            self.gauge(APPROVED, vec![], approved.count() as f64);
        }
        for route in &routes {
            let of = || vec![Label::new("route", route.cidr.to_string())];
            let is = |yes| if yes { 1.0 } else { 0.0 };
            self.gauge(ROUTE_APPROVED, of(), is(route.approved == Some(true)));
            self.gauge(ROUTE_PRIMARY, of(), is(route.primary));
        }
        if let Some(home) = tailnet.ways.home {
            self.gauge(HOME, vec![], f64::from(home));
        }
        let warnings = vec![Label::new("type", "warning")];
        self.gauge(HEALTH, warnings, tailnet.health().len() as f64);
        if let Some(relay) = &tailnet.ways.relay_server {
            self.relay_server(relay);
        }
        let mut by_path = self
            .by_path
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        by_path.follow(tailnet);
        for (path, counts) in &by_path.sums {
            for (name, count) in NAMES.iter().zip(counts) {
                self.counter(name, vec![Label::new("path", *path)], *count);
            }
        }
        for (name, programs) in [
            (RECEIVED_DROPPED, ["from_overlay", "kernel_from_overlay"]),
            (SENT_DROPPED, ["from_subnet", "kernel_to_overlay"]),
        ] {
            for (reason, verdicts) in REASONS {
                let counts = |row: &&Packets| {
                    programs.contains(&row.program) && verdicts.contains(&row.verdict)
                };
                let rows: Vec<&Packets> = status.packets.iter().filter(counts).collect();
                if !rows.is_empty() {
                    let sum = rows.iter().map(|row| row.packets).sum();
                    self.counter(name, vec![Label::new("reason", *reason)], sum);
                }
            }
        }
    }
}

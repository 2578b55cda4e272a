//! Every metric name, once.
//!
//! Metrics are derived from the status document on each scrape, so the two cannot disagree.

pub mod tailscaled;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics::{Key, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use metrics_util::MetricKindMask;

use crate::api::Status;
use crate::cloud::life::Phase;

/// Version, as a label.
pub const BUILD_INFO: &str = "sluice_build_info";
/// 1 when everything wanted is in force.
pub const HEALTHY: &str = "sluice_healthy";
/// Seconds since the daemon started.
pub const UPTIME: &str = "sluice_uptime_seconds";
/// The datapath in use, as a label.
pub const DATAPATH_INFO: &str = "sluice_datapath_info";
/// The cloud's instance, as labels.
pub const CLOUD_INFO: &str = "sluice_cloud_info";
/// What is wrong with what is asked of the cloud.
pub const CLOUD_PROBLEMS: &str = "sluice_cloud_problems";
/// Clear packets.
pub const PACKETS: &str = "sluice_packets_total";
/// Bytes of the clear packets.
pub const BYTES: &str = "sluice_bytes_total";
/// Frames that the uplink's guard has seen.
pub const GUARD_FRAMES: &str = "sluice_uplink_guard_frames_total";
/// Whether the uplink's guard is attached.
pub const GUARD_ATTACHED: &str = "sluice_uplink_guard_attached";
/// Events of the engine.
pub const ENGINE: &str = "sluice_engine_events_total";
/// Underlay bytes from a peer.
pub const PEER_RECEIVED: &str = "sluice_peer_receive_bytes_total";
/// Underlay bytes to a peer.
pub const PEER_SENT: &str = "sluice_peer_transmit_bytes_total";
/// Time of a peer's last handshake.
pub const PEER_HANDSHAKE: &str = "sluice_peer_last_handshake_timestamp_seconds";

/// Where in its life the router is, as a label.
pub const LIFE: &str = "sluice_life_phase";
/// Flows that a router which drains still carries.
pub const LIFE_FLOWS: &str = "sluice_drain_flows";

/// Flows in the fast path's table.
pub const FLOWS: &str = "sluice_flows";
/// Most flows there.
pub const FLOWS_LIMIT: &str = "sluice_flows_limit";
/// Directions of flows that have settled.
pub const FLOWS_SETTLED: &str = "sluice_flow_directions_settled";
/// Flows that sweeps have ended.
pub const FLOWS_ENDED: &str = "sluice_flows_ended_total";
/// Duration of a sweep.
pub const SWEEP: &str = "sluice_flow_sweep_seconds";
/// New flows by policy rule.
pub const RULE_HITS: &str = "sluice_policy_rule_hits_total";

/// Kind, name, unit and help of each metric.
const DESCRIPTIONS: &[(Kind, &str, Unit, &str)] = &[
    (
        Kind::Gauge,
        BUILD_INFO,
        Unit::Count,
        "Version of the daemon; always 1",
    ),
    (
        Kind::Gauge,
        HEALTHY,
        Unit::Count,
        "1 when everything wanted is in force",
    ),
    (
        Kind::Gauge,
        UPTIME,
        Unit::Seconds,
        "Seconds since the daemon started",
    ),
    (
        Kind::Gauge,
        LIFE,
        Unit::Count,
        "1 for the phase of its life that the router is in, 0 for the others",
    ),
    (
        Kind::Gauge,
        LIFE_FLOWS,
        Unit::Count,
        "Flows that a router which drains still carries; 0 for one that does not drain",
    ),
    (
        Kind::Gauge,
        DATAPATH_INFO,
        Unit::Count,
        "The datapath in use and how it is attached; always 1",
    ),
    (
        Kind::Gauge,
        CLOUD_INFO,
        Unit::Count,
        "The cloud's instance that the router is; always 1",
    ),
    (
        Kind::Gauge,
        CLOUD_PROBLEMS,
        Unit::Count,
        "Problems with what is asked of the cloud",
    ),
    (
        Kind::Counter,
        PACKETS,
        Unit::Count,
        "Clear packets by program and verdict; a super-packet counts once",
    ),
    (
        Kind::Counter,
        BYTES,
        Unit::Bytes,
        "IP bytes of the clear packets by program and verdict",
    ),
    (
        Kind::Counter,
        GUARD_FRAMES,
        Unit::Count,
        "Frames on the uplink by verdict of its guard",
    ),
    (
        Kind::Gauge,
        GUARD_ATTACHED,
        Unit::Count,
        "1 when the uplink's guard is attached",
    ),
    (
        Kind::Counter,
        ENGINE,
        Unit::Count,
        "Events of the WireGuard engine",
    ),
    (
        Kind::Counter,
        PEER_RECEIVED,
        Unit::Bytes,
        "Underlay bytes received from a peer",
    ),
    (
        Kind::Counter,
        PEER_SENT,
        Unit::Bytes,
        "Underlay bytes sent to a peer",
    ),
    (
        Kind::Gauge,
        PEER_HANDSHAKE,
        Unit::Seconds,
        "Unix time of a peer's last completed handshake; 0: never",
    ),
    (
        Kind::Gauge,
        FLOWS,
        Unit::Count,
        "Flows in the fast path's table, by address family",
    ),
    (
        Kind::Gauge,
        FLOWS_LIMIT,
        Unit::Count,
        "Most flows that the fast path's table holds, by address family",
    ),
    (
        Kind::Gauge,
        FLOWS_SETTLED,
        Unit::Count,
        "Directions of flows, two of each, that the fast path finds in one access to memory, by address family",
    ),
    (
        Kind::Counter,
        FLOWS_ENDED,
        Unit::Count,
        "Flows of the fast path that sweeps have ended, by reason",
    ),
    (
        Kind::Gauge,
        SWEEP,
        Unit::Seconds,
        "How long the last sweep of the flow table took",
    ),
    (
        Kind::Counter,
        RULE_HITS,
        Unit::Count,
        "New flows on the fast path that a policy rule has let through, by its place from 1",
    ),
];

/// A series that no scrape has touched for so long belongs to a removed peer and is dropped.
const FORGET_AFTER: Duration = Duration::from_secs(600);

enum Kind {
    Counter,
    Gauge,
}

/// Renders status documents as Prometheus text.
#[derive(Clone)]
pub struct Metrics {
    recorder: Arc<PrometheusRecorder>,
    handle: PrometheusHandle,
    by_path: Arc<Mutex<tailscaled::ByPath>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let recorder = PrometheusBuilder::new()
            .idle_timeout(MetricKindMask::ALL, Some(FORGET_AFTER))
            .build_recorder();
        for (kind, name, unit, help) in DESCRIPTIONS.iter().chain(tailscaled::DESCRIPTIONS) {
            let (name, unit, help) = ((*name).into(), Some(*unit), (*help).into());
            match kind {
                Kind::Counter => recorder.describe_counter(name, unit, help),
                Kind::Gauge => recorder.describe_gauge(name, unit, help),
            }
        }
        let handle = recorder.handle();
        Self {
            recorder: Arc::new(recorder),
            handle,
            by_path: Arc::default(),
        }
    }
}

impl Metrics {
    /// The Prometheus text (exposition format 0.0.4) of `status`.
    pub fn render(&self, status: &Status) -> String {
        self.gauge(BUILD_INFO, vec![Label::new("version", status.version)], 1.0);
        self.gauge(HEALTHY, vec![], f64::from(u8::from(status.healthy())));
        self.gauge(UPTIME, vec![], status.uptime_seconds as f64);
        for phase in Phase::LABELS {
            let here = phase == status.life.phase;
            let labels = vec![Label::new("phase", phase)];
            self.gauge(LIFE, labels, f64::from(u8::from(here)));
        }
        let flows = status.life.flows.unwrap_or(0);
        self.gauge(LIFE_FLOWS, vec![], flows as f64);
        let datapath = &status.datapath;
        self.gauge(
            DATAPATH_INFO,
            vec![
                Label::new("datapath", datapath.active),
                Label::new("attach", datapath.attach.unwrap_or("none")),
            ],
            1.0,
        );
        if let Some(cloud) = &status.cloud {
            let labels = cloud.report.instance.as_ref().map(|instance| {
                vec![
                    Label::new("provider", cloud.provider),
                    Label::new("region", instance.region.clone()),
                    Label::new("zone", instance.zone.clone()),
                    Label::new("instance", instance.id.clone()),
                    Label::new("kind", instance.kind.clone()),
                ]
            });
            if let Some(labels) = labels {
                self.gauge(CLOUD_INFO, labels, 1.0);
            }
            let problems = cloud.report.problems.len();
            self.gauge(CLOUD_PROBLEMS, vec![], problems as f64);
        }
        for row in &status.packets {
            let labels = vec![
                Label::new("program", row.program),
                Label::new("verdict", row.verdict),
            ];
            self.counter(PACKETS, labels.clone(), row.packets);
            self.counter(BYTES, labels, row.bytes);
        }
        let guard = &status.uplink_guard;
        for (verdict, count) in &guard.frames {
            self.counter(GUARD_FRAMES, vec![Label::new("verdict", *verdict)], *count);
        }
        let attached = f64::from(u8::from(guard.interface.is_some()));
        self.gauge(GUARD_ATTACHED, vec![], attached);
        if let Some(flows) = &status.flows {
            for (family, table) in &flows.tables {
                let labels = vec![Label::new("family", *family)];
                self.gauge(FLOWS, labels.clone(), table.flows as f64);
                self.gauge(FLOWS_LIMIT, labels.clone(), table.capacity as f64);
                self.gauge(FLOWS_SETTLED, labels, table.settled as f64);
            }
            for (reason, count) in &flows.ended {
                self.counter(FLOWS_ENDED, vec![Label::new("reason", *reason)], *count);
            }
            self.gauge(SWEEP, vec![], flows.sweep_seconds);
        }
        for (place, count) in (1_usize..).zip(&status.rule_hits) {
            let labels = vec![Label::new("rule", place.to_string())];
            self.counter(RULE_HITS, labels, *count);
        }
        for (event, count) in &status.engine.counters {
            self.counter(ENGINE, vec![Label::new("event", *event)], *count);
        }
        for peer in &status.peers {
            let labels = vec![
                Label::new("public_key", peer.public_key.clone()),
                Label::new("name", peer.name.clone().unwrap_or_default()),
            ];
            self.counter(PEER_RECEIVED, labels.clone(), peer.rx_bytes);
            self.counter(PEER_SENT, labels.clone(), peer.tx_bytes);
            self.gauge(
                PEER_HANDSHAKE,
                labels,
                peer.last_handshake.unwrap_or(0) as f64,
            );
        }
        self.tailscaled(status);
        self.handle.run_upkeep();
        self.handle.render()
    }

    fn gauge(&self, name: &'static str, labels: Vec<Label>, value: f64) {
        let key = Key::from_parts(name, labels);
        self.recorder.register_gauge(&key, &METADATA).set(value);
    }

    fn counter(&self, name: &'static str, labels: Vec<Label>, value: u64) {
        let key = Key::from_parts(name, labels);
        self.recorder
            .register_counter(&key, &METADATA)
            .absolute(value);
    }
}

static METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::api::{
        CloudStatus, DatapathStatus, DeviceStatus, EngineStatus, FlowStatus, FlowTableStatus,
        GuardStatus, LifeStatus, Packets, PeerStatus, Problem, Status,
    };
    use crate::cloud::agent::Report;
    use crate::cloud::instance::Instance;

    fn status() -> Status {
        Status {
            name: "r1".into(),
            version: "0.1.0",
            uptime_seconds: 7,
            changed_by_wg: false,
            problems: vec![],
            life: LifeStatus {
                phase: "draining",
                cause: Some("hand"),
                reason: None,
                until: None,
                flows: Some(3),
                waits_for: None,
            },
            device: DeviceStatus {
                name: "sluice0".into(),
                index: 3,
                mtu: 1420,
                addresses: vec![],
                public_key: "k".into(),
                listen_port: 1,
            },
            uplink: None,
            subnet: vec![],
            datapath: DatapathStatus {
                requested: "auto",
                active: "ebpf",
                attach: Some("tcx"),
                reason: String::new(),
                unkept: None,
                generation: None,
            },
            uplink_guard: GuardStatus {
                requested: "auto",
                interface: Some("eth0".into()),
                reason: "attached".into(),
                frames: BTreeMap::from([("drop_index", 5)]),
            },
            routes: vec![],
            peers: vec![PeerStatus {
                name: Some("a \"quoted\" name".into()),
                public_key: "pk=".into(),
                endpoint: None,
                peer_relay: None,
                relay: None,
                allowed_ips: vec![],
                last_handshake: Some(1_000_000_000),
                rx_bytes: 5,
                tx_bytes: 6,
                path_mtu: None,
                uncut: false,
            }],
            flows: Some(FlowStatus {
                tables: BTreeMap::from([(
                    "ipv4",
                    FlowTableStatus {
                        flows: 12,
                        capacity: 100,
                        pressure: false,
                        settled: 20,
                    },
                )]),
                ended: BTreeMap::from([("expired", 4)]),
                sweep_seconds: 0.25,
            }),
            rule_hits: vec![0, 8],
            packets: vec![Packets {
                program: "from_overlay",
                verdict: "forwarded",
                packets: 3,
                bytes: 300,
            }],
            engine: EngineStatus {
                features: vec![],
                refused: vec![],
                workers: 1,
                counters: BTreeMap::from([("spoofed", 2)]),
            },
            unready: vec![],
            cloud: Some(CloudStatus {
                provider: "aws",
                report: Arc::new(Report {
                    instance: Some(Instance {
                        id: "i-1".into(),
                        ..Instance::default()
                    }),
                    problems: vec!["a problem".into()],
                    ..Report::default()
                }),
            }),
            tailnet: None,
        }
    }

    #[test]
    fn every_described_metric_is_rendered_with_its_value() {
        let metrics = Metrics::default();
        let text = metrics.render(&status());
        for (_, name, _, _) in DESCRIPTIONS {
            assert!(
                text.contains(&format!("# HELP {name} ")),
                "{name} is missing in:\n{text}"
            );
        }
        for line in [
            "sluice_packets_total{program=\"from_overlay\",verdict=\"forwarded\"} 3",
            "sluice_engine_events_total{event=\"spoofed\"} 2",
            "sluice_healthy 1",
            "sluice_life_phase{phase=\"serving\"} 0",
            "sluice_life_phase{phase=\"draining\"} 1",
            "sluice_drain_flows 3",
            "sluice_cloud_problems 1",
            "sluice_uplink_guard_frames_total{verdict=\"drop_index\"} 5",
            "sluice_uplink_guard_attached 1",
            "sluice_flows{family=\"ipv4\"} 12",
            "sluice_flows_limit{family=\"ipv4\"} 100",
            "sluice_flow_directions_settled{family=\"ipv4\"} 20",
            "sluice_flows_ended_total{reason=\"expired\"} 4",
            "sluice_flow_sweep_seconds 0.25",
            "sluice_policy_rule_hits_total{rule=\"2\"} 8",
            "sluice_peer_receive_bytes_total{public_key=\"pk=\",name=\"a \\\"quoted\\\" name\"} 5",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in:\n{text}"
            );
        }
    }

    #[test]
    fn a_router_in_a_tailnet_has_tailscaleds_metrics_too() {
        let metrics = Metrics::default();
        assert!(!metrics.render(&status()).contains("tailscaled_"));
        let mut status = status();
        let mut tailnet = crate::api::tailnet_of_tests();
        let ways = Arc::make_mut(&mut tailnet.ways);
        ways.home = Some(9);
        ways.relay_server = Some(crate::api::relay_server_of_tests());
        status.packets.push(Packets {
            program: "from_overlay",
            verdict: "drop_policy",
            packets: 4,
            bytes: 0,
        });
        status.packets.push(Packets {
            program: "from_subnet",
            verdict: "drop_fragment",
            packets: 2,
            bytes: 0,
        });
        let advertised = tailnet.report.advertised.len();
        status.tailnet = Some(tailnet);
        let text = metrics.render(&status);
        for (_, name, _, _) in tailscaled::DESCRIPTIONS {
            assert!(
                text.contains(&format!("# HELP {name} ")),
                "{name} is missing in:\n{text}"
            );
        }
        // More came over the same path, and then over a relay.
        let tailnet = status.tailnet.as_mut().unwrap();
        let peer = *tailnet.stats.keys().next().unwrap();
        tailnet.stats.get_mut(&peer).unwrap().rx_bytes += 10;
        metrics.render(&status);
        let tailnet = status.tailnet.as_mut().unwrap();
        tailnet.stats.get_mut(&peer).unwrap().rx_bytes += 100;
        for way in Arc::make_mut(&mut tailnet.ways).peers.values_mut() {
            way.path = Some(crate::engine::Path::Relay(crate::engine::RelayId(9)));
        }
        let text = metrics.render(&status);
        for line in [
            format!("tailscaled_advertised_routes {advertised}").as_str(),
            format!("tailscaled_approved_routes {}", advertised - 1).as_str(),
            "sluice_tailnet_route_approved{route=\"198.51.100.0/24\"} 0",
            "sluice_tailnet_route_primary{route=\"198.51.100.0/24\"} 0",
            "tailscaled_home_derp_region_id 9",
            "tailscaled_health_messages{type=\"warning\"} 1",
            "sluice_tailnet_relay_server_clients 3",
            "sluice_tailnet_relay_server_running 0",
            "sluice_tailnet_relay_server_refused_total{reason=\"grant\"} 2",
            "tailscaled_inbound_bytes_total{path=\"direct_ipv4\"} 15",
            "tailscaled_inbound_bytes_total{path=\"derp\"} 100",
            "tailscaled_outbound_bytes_total{path=\"direct_ipv4\"} 6",
            "tailscaled_inbound_packets_total{path=\"direct_ipv4\"} 2",
            "tailscaled_outbound_packets_total{path=\"direct_ipv4\"} 1",
            "tailscaled_inbound_dropped_packets_total{reason=\"acl\"} 4",
            "tailscaled_outbound_dropped_packets_total{reason=\"fragment\"} 2",
        ] {
            assert!(
                text.lines().any(|l| l == line),
                "{line} is missing in:\n{text}"
            );
        }
    }

    #[test]
    fn a_later_scrape_shows_later_values() {
        let metrics = Metrics::default();
        metrics.render(&status());
        let mut later = status();
        later.packets[0].packets = 9;
        later.problems.push(Problem {
            part: "routes".into(),
            error: "x".into(),
        });
        let text = metrics.render(&later);
        assert!(text.contains("verdict=\"forwarded\"} 9"), "{text}");
        assert!(text.contains("sluice_healthy 0"), "{text}");
    }

    /// Nothing that is served over TCP tells the URL; all else stays.
    #[test]
    fn the_url_to_log_in_by_can_be_left_out() {
        let url = "http://hs.lab/register/x";
        let mut tailnet = crate::api::tailnet_of_tests();
        let report = Arc::make_mut(&mut tailnet.report);
        report.auth_url = Some(url.to_owned());
        let text = format!("a person has to let this node in: open {url}");
        report.problems[0].text.clone_from(&text);
        let mut status = Status {
            tailnet: Some(tailnet),
            problems: vec![Problem {
                part: "login".to_owned(),
                error: text,
            }],
            ..status()
        };
        let written = |status: &Status| serde_json::to_value(status).unwrap();
        let before = written(&status);
        assert_eq!(before["AuthURL"], url);
        status.hide_login();
        let after = written(&status);
        assert!(!after.to_string().contains(url), "{after:#}");
        assert_eq!(
            (&after["AuthURL"], &after["tailnet"]["auth_url"]),
            (&"".into(), &serde_json::Value::Null)
        );
        assert_eq!(after["Peer"], before["Peer"]);
        let told = after["problems"][0]["error"].as_str().unwrap();
        assert!(
            told.starts_with("a person has to let this node in: open the URL that"),
            "{told}"
        );
    }
}

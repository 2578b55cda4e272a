//! The status document, put together from all parts of the daemon.

use std::collections::{BTreeMap, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

use super::{Daemon, Tailnet};
use crate::api::{
    DatapathStatus, DeviceStatus, EngineStatus, FlowStatus, FlowTableStatus, Packets, PeerStatus,
    Problem, RouteStatus, Status,
};
use crate::config::DatapathMode;
use crate::control::{Route, RouteMode};
use crate::datapath::ebpf::Ebpf;
use crate::datapath::{Datapath, slow_reason};
use crate::engine::{self, PeerStats};
use crate::tailnet::node::BackendState;
use crate::wireguard::keys::PublicKey;

/// How many of those that have as many flows as they may are named.
const NAMED_AT_LIMIT: usize = 16;

impl Daemon {
    /// What the router is, does and suffers from, now.
    pub(super) fn status(&self) -> Status {
        let mut problems: Vec<Problem> = self
            .core
            .failures()
            .map(|(part, failure)| Problem {
                part: part.label().to_owned(),
                error: failure.error.clone(),
            })
            .collect();
        problems.extend(self.contested());
        problems.extend(self.in_the_way().into_iter().map(|error| Problem {
            part: "routing".to_owned(),
            error,
        }));
        let vrf = self.core.wanted().map(|plan| &plan.vrf_problems);
        problems.extend(vrf.into_iter().flatten().map(|error| Problem {
            part: "vrf".to_owned(),
            error: error.clone(),
        }));
        problems.extend(self.network.ipv6.problem().map(|error| Problem {
            part: "ipv6".to_owned(),
            error: error.to_owned(),
        }));
        let via = crate::core::via_problems(self.sources.state(), &self.network.facts);
        problems.extend(via.into_iter().map(|error| Problem {
            part: "4via6".to_owned(),
            error,
        }));
        let sources = self.sources.problems().into_iter();
        problems.extend(sources.map(|(part, error)| Problem {
            part: part.to_owned(),
            error,
        }));
        problems.extend(self.tailnet.iter().flat_map(Tailnet::problems));
        problems.extend(self.cloud.problems());
        problems.extend(self.skipped_peers());
        problems.extend(self.resolver.names.failures().map(|(host, error)| Problem {
            part: "endpoint".to_owned(),
            error: format!("{host}: {error}"),
        }));
        problems.extend(self.life.problem().map(|error| Problem {
            part: "life".to_owned(),
            error,
        }));
        problems.extend(self.told.unserved.iter().map(|error| Problem {
            part: "subnet".to_owned(),
            error: error.clone(),
        }));
        problems.extend(self.machine.engine.refused().iter().map(|kind| Problem {
            part: "offloads".to_owned(),
            error: format!(
                "the kernel refuses {} on the TUN device (EINVAL), so they are written packet by \
                 packet, which costs throughput: boot another kernel (6.6.44 and 6.10.3 have this \
                 fault), or set offloads.tun_gro = false, which merges none",
                kind.text()
            ),
        }));
        problems.extend(self.peers_nowhere().into_iter().map(|(_, error)| Problem {
            part: "peers".to_owned(),
            error,
        }));
        let firewalls = self.machine.kernel.firewall_problems().into_iter();
        problems.extend(firewalls.map(|error| Problem {
            part: "firewall".to_owned(),
            error,
        }));
        let stats = self.stats_by_peer();
        problems.extend(self.underlay_problems(stats.values()));
        let mut packets = Vec::new();
        let datapaths = [
            Some(&self.machine.kernel as &dyn Datapath),
            self.machine.ebpf.as_ref().map(|e| e as &dyn Datapath),
        ];
        for datapath in datapaths.into_iter().flatten() {
            match datapath.counters() {
                Ok(counters) => packets.extend(counters.into_iter().map(|c| Packets {
                    program: c.program,
                    verdict: c.verdict,
                    packets: c.packets,
                    bytes: c.bytes,
                })),
                Err(error) => problems.push(Problem {
                    part: "counters".to_owned(),
                    error: error.to_string(),
                }),
            }
        }
        if self.machine.ebpf.is_some() {
            problems.extend(self.left_to_the_kernel());
        }
        let flows = self.flow_status(&mut problems);
        let uplink_guard = self.machine.guard.status(&mut problems);
        let plan = self.core.wanted();
        Status {
            name: self.sources.local.name.clone(),
            version: env!("CARGO_PKG_VERSION"),
            uptime_seconds: self.started.elapsed().as_secs(),
            changed_by_wg: self.differs_from_file(),
            problems,
            life: self.life.status(),
            device: DeviceStatus {
                name: self.machine.tun.name.clone(),
                index: self.machine.tun.index,
                mtu: plan.map_or(0, |plan| plan.mtu),
                addresses: self.sources.state().addresses().to_vec(),
                public_key: self.public_key(),
                listen_port: self.sources.local.listen_port,
            },
            uplink: plan
                .and_then(|plan| plan.uplink.as_ref())
                .map(|link| link.name.clone()),
            subnet: plan
                .map(|plan| {
                    let left = plan.stack_links.iter();
                    plan.datapath
                        .subnet
                        .iter()
                        .chain(left)
                        .map(|link| link.name.clone())
                        .collect()
                })
                .unwrap_or_default(),
            datapath: DatapathStatus {
                requested: match self.sources.local.datapath {
                    DatapathMode::Auto => "auto",
                    DatapathMode::Ebpf => "ebpf",
                    DatapathMode::Kernel => "kernel",
                },
                active: self.machine.active_datapath(),
                attach: self.machine.ebpf.as_ref().and_then(Ebpf::attach_mode),
                reason: self.machine.datapath_reason.clone(),
                generation: self.machine.ebpf.as_ref().map(Ebpf::generation),
                unkept: self
                    .machine
                    .ebpf
                    .as_ref()
                    .and_then(Ebpf::unkept)
                    .map(str::to_owned),
            },
            uplink_guard,
            routes: self.route_status(),
            peers: self.peer_status(&stats),
            flows,
            rule_hits: self.rule_hits(),
            packets,
            engine: EngineStatus {
                features: offloads(self.machine.engine.features()),
                refused: self
                    .machine
                    .engine
                    .refused()
                    .iter()
                    .map(|kind| kind.label())
                    .collect(),
                workers: self.machine.engine.features().workers,
                counters: self.machine.engine.counters().into_iter().collect(),
            },
            unready: self.unready(),
            cloud: self.cloud.status(),
            tailnet: self.tailnet.as_ref().map(|tailnet| crate::api::Tailnet {
                report: tailnet.node.report(),
                ways: tailnet.paths.report(),
                stats,
                settings_from: self.sources.ruler.label(),
            }),
        }
    }

    /// What keeps the router from carrying packets.
    fn unready(&self) -> Vec<String> {
        let mut found: Vec<String> = self.life.unready().into_iter().collect();
        found.extend(self.cloud.unready(&self.sources.config));
        if let Some(tailnet) = &self.tailnet {
            let report = tailnet.node.report();
            if report.state != BackendState::Running {
                found.push(format!("tailnet: {}, so no map is in force", report.state));
            }
        }
        if !self.core.ready() {
            found.push("datapath: not everything that is wanted is in force yet".to_owned());
        }
        let failures = self.core.failures();
        found
            .extend(failures.map(|(part, failure)| format!("{}: {}", part.label(), failure.error)));
        found
    }

    fn public_key(&self) -> String {
        let own = self.sources.state().identity.as_ref();
        own.map(|own| own.private_key.public().to_string())
            .unwrap_or_default()
    }

    /// The peers that the engine does not take.
    fn skipped_peers(&self) -> impl Iterator<Item = Problem> {
        self.machine.skipped.iter().map(|(key, why)| {
            let peer = self.sources.state().peers.get(key);
            let name = peer.and_then(|peer| peer.name.clone());
            Problem {
                part: "peers".to_owned(),
                error: format!(
                    "the peer {} is left out, and the others are in force: {why}; change it or take it \
                     out where it comes from",
                    name.unwrap_or_else(|| key.to_string())
                ),
            }
        })
    }

    fn flow_status(&self, problems: &mut Vec<Problem>) -> Option<FlowStatus> {
        let report = self.machine.ebpf.as_ref()?.flow_report()?;
        let mut problem = |error: String| {
            problems.push(Problem {
                part: "flows".to_owned(),
                error,
            });
        };
        if let Some(error) = report.error {
            problem(format!("the flow table could not be swept: {error}"));
        }
        let [v4, v6] = report.families.map(|family| FlowTableStatus {
            flows: family.flows,
            capacity: family.capacity,
            settled: family.settled,
            pressure: family.pressure,
        });
        let tables = BTreeMap::from([("ipv4", v4), ("ipv6", v6)]);
        for (family, table) in &tables {
            if table.is_nearly_full() {
                problem(format!(
                    "the {family} flow table holds {} of {} flows; new ones will be refused when \
                     it is full: raise datapath.flows",
                    table.flows, table.capacity
                ));
            }
        }
        if let Some(error) = self.ports_problem() {
            problem(error);
        }
        let named = report.at_limit.iter().take(NAMED_AT_LIMIT);
        named.for_each(|at_limit| problem(self.at_limit_text(at_limit)));
        let more = report.at_limit.len().saturating_sub(NAMED_AT_LIMIT);
        if more > 0 {
            problem(format!("{more} more have opened as many flows as they may"));
        }
        let ended = report.ended;
        Some(FlowStatus {
            tables,
            ended: BTreeMap::from([
                ("expired", ended.expired),
                ("early", ended.early),
                ("denied", ended.denied),
                ("address", ended.addressless),
                ("stray", ended.strays),
            ]),
            sweep_seconds: report.took.as_secs_f64(),
        })
    }

    /// Empty where the programs do not know.
    fn rule_hits(&self) -> Vec<u64> {
        let hits = self.machine.ebpf.as_ref().map(Ebpf::rule_hits);
        hits.and_then(Result::ok).unwrap_or_default()
    }

    /// The routes whose packets the kernel carries although nobody asked for it.
    fn left_to_the_kernel(&self) -> impl Iterator<Item = Problem> {
        let fast = self.sources.state().routes.iter();
        let fast = fast.filter(|route| route.mode == RouteMode::Fast);
        let links = self.core.wanted().map(|plan| &plan.stack_routes);
        fast.filter_map(move |route| {
            let (cidr, link) = (route.cidr, links?.get(&route.cidr)?);
            Some(Problem {
                part: "datapath".to_owned(),
                error: format!(
                    "{cidr} leads to {link}, which has no Ethernet header: the programs cannot carry \
                     its packets, and the kernel does, which takes more CPU; if that is meant, say \
                     mode = \"stack\" of the route"
                ),
            })
        })
    }

    fn route_status(&self) -> Vec<RouteStatus> {
        let stack_links = self.core.wanted().map(|plan| &plan.stack_routes);
        let without_ethernet = |route: &Route| {
            let link = stack_links?.get(&route.cidr)?;
            Some(format!(
                "{link} has no Ethernet header, which the programs need"
            ))
        };
        let reason = |route| match &self.machine.ebpf {
            None => Some("the kernel datapath is in use".to_owned()),
            Some(_) => slow_reason(route)
                .map(str::to_owned)
                .or_else(|| without_ethernet(route)),
        };
        let status = self.sources.state().routes.iter().map(|route| RouteStatus {
            cidr: route.cidr,
            snat: route.snat,
            mode: match route.mode {
                RouteMode::Fast => "fast",
                RouteMode::Stack => "stack",
            },
            path: if reason(route).is_none() {
                "fast"
            } else {
                "slow"
            },
            reason: reason(route),
        });
        status.collect()
    }

    /// What the engine knows of each peer.
    pub(super) fn stats_by_peer(&self) -> HashMap<PublicKey, PeerStats> {
        let stats = self.machine.engine.peer_stats().into_iter();
        stats.map(|stats| (stats.public_key, stats)).collect()
    }

    fn peer_status(&self, stats: &HashMap<PublicKey, PeerStats>) -> Vec<PeerStatus> {
        let status = self.sources.state().peers.iter().map(|peer| {
            let stats = stats.get(&peer.public_key);
            let epoch = |time: SystemTime| time.duration_since(UNIX_EPOCH).ok();
            PeerStatus {
                name: peer.name.clone(),
                public_key: peer.public_key.to_string(),
                endpoint: stats.and_then(|stats| stats.endpoint()),
                peer_relay: stats.and_then(|stats| match stats.path {
                    Some(way @ engine::Path::PeerRelay(..)) => Some(way.to_string()),
                    _ => None,
                }),
                relay: stats.and_then(|stats| match stats.path {
                    Some(engine::Path::Relay(relay)) => Some(relay.0),
                    _ => None,
                }),
                allowed_ips: peer.allowed_ips.clone(),
                last_handshake: stats
                    .and_then(|stats| stats.last_handshake)
                    .and_then(epoch)
                    .map(|t| t.as_secs()),
                rx_bytes: stats.map_or(0, |stats| stats.rx_bytes),
                tx_bytes: stats.map_or(0, |stats| stats.tx_bytes),
                path_mtu: stats
                    .and_then(|stats| self.network.facts.paths.get(&stats.endpoint()?.ip())?.mtu),
                uncut: stats.is_some_and(|stats| stats.uncut),
            }
        });
        status.collect()
    }
}

/// Names of the offloads in use.
fn offloads(features: engine::Features) -> Vec<&'static str> {
    let all = [
        (features.vnet_header, "vnet_header"),
        (features.tso, "tso"),
        (features.uso, "uso"),
        (features.tun_gro, "tun_gro"),
        (features.udp_gro, "udp_gro"),
        (features.udp_gso, "udp_gso"),
    ];
    all.into_iter()
        .filter(|(on, _)| *on)
        .map(|(_, name)| name)
        .collect()
}

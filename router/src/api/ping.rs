//! Questions to the network: pings of peers, and the way to the relays.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use serde::Serialize;

use super::server::Ways;
use crate::engine::Path;
use crate::tailnet::inside::Kind;
use crate::tailnet::netmap::{Netmap, Node};
use crate::tailnet::paths::{self, Protocol};
use crate::tailnet::time::Timestamp;

/// A ping's answer, with the fields of Tailscale's `ipnstate.PingResult`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Answer {
    /// The peer's address.
    #[serde(rename = "NodeIP")]
    pub address: String,
    /// Its name.
    #[serde(rename = "NodeName")]
    pub name: String,
    /// Why there is no answer; empty if there is one.
    #[serde(rename = "Err")]
    pub error: String,
    /// There and back.
    #[serde(rename = "LatencySeconds")]
    pub latency: f64,
    /// The address that it came by, if it came directly.
    #[serde(rename = "Endpoint")]
    pub endpoint: String,
    /// The peer relay that it came by: address, `:vni:` and number.
    #[serde(rename = "PeerRelay")]
    pub peer_relay: String,
    /// The relay's region that it came by; 0 for none.
    #[serde(rename = "DERPRegionID")]
    pub region: u32,
    /// That region's code.
    #[serde(rename = "DERPRegionCode")]
    pub region_code: String,
}

/// What is known of the network, with the fields of Tailscale's `netcheck.Report`. Absent is what nobody has looked for.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Netcheck {
    now: String,
    #[serde(rename = "UDP")]
    udp: bool,
    #[serde(rename = "IPv4")]
    ipv4: bool,
    #[serde(rename = "IPv6")]
    ipv6: bool,
    #[serde(rename = "IPv4CanSend")]
    ipv4_can_send: bool,
    #[serde(rename = "IPv6CanSend")]
    ipv6_can_send: bool,
    #[serde(rename = "OSHasIPv6")]
    os_has_ipv6: bool,
    #[serde(rename = "MappingVariesByDestIP")]
    mapping_varies: Option<bool>,
    #[serde(rename = "UPnP")]
    upnp: Option<bool>,
    #[serde(rename = "PMP")]
    pmp: Option<bool>,
    #[serde(rename = "PCP")]
    pcp: Option<bool>,
    /// By which protocols the gateway refuses a port, and why, in words. Not in Tailscale's report.
    port_mapping_refused: Option<String>,
    #[serde(rename = "PreferredDERP")]
    preferred: u32,
    /// Nanoseconds, as Go writes durations.
    region_latency: BTreeMap<u32, u64>,
    region_v4_latency: BTreeMap<u32, u64>,
    region_v6_latency: BTreeMap<u32, u64>,
    #[serde(rename = "GlobalV4")]
    global4: String,
    #[serde(rename = "GlobalV6")]
    global6: String,
    /// Names of the regions, which Tailscale's report does not have: whoever prints it needs them.
    region_codes: BTreeMap<u32, String>,
}

/// The peer with this address or name: the full one, or its first label.
fn find<'m>(map: &'m Netmap, wanted: &str) -> Result<&'m Node, String> {
    let address: Option<IpAddr> = wanted.parse().ok();
    let holds = |node: &Node| match address {
        Some(address) => node.addresses.iter().any(|own| own.addr() == address),
        None => {
            let name = node.name.trim_end_matches('.');
            let wanted = wanted.trim_end_matches('.');
            let first = name.split('.').next().unwrap_or_default();
            name.eq_ignore_ascii_case(wanted) || first.eq_ignore_ascii_case(wanted)
        }
    };
    if map.own().is_some_and(holds) {
        return Err(format!("{wanted} is this router itself"));
    }
    map.peers().find(|node| holds(node)).ok_or_else(|| {
        format!("the tailnet has no node {wanted} that this router may reach; `sluice status` lists them")
    })
}

/// Pings the peer that `query` names (`node=`): by disco, for the way there, or inside the tunnel (`type=TSMP`,
/// `type=ICMP`).
pub(super) async fn ping(ways: &Ways, query: &str) -> Result<Answer, String> {
    let part = |key| query.split('&').find_map(|part| part.strip_prefix(key));
    let wanted = part("node=").unwrap_or_default();
    let node = find(&ways.report.map, wanted)?;
    let named: Option<IpAddr> = wanted.parse().ok();
    let mut addresses = node.addresses.iter().map(IpNet::addr);
    let address = named.or_else(|| addresses.next());
    let mut answer = Answer {
        address: address.map(|own| own.to_string()).unwrap_or_default(),
        name: node.name.trim_end_matches('.').to_owned(),
        ..Answer::default()
    };
    let within = match part("type=") {
        None | Some("disco") => None,
        Some("TSMP") => Some(Kind::Tsmp),
        Some("ICMP") => Some(Kind::Icmp),
        Some(other) => {
            return Err(format!(
                "there is no ping {other:?}; try disco, TSMP or ICMP"
            ));
        }
    };
    if let Some(kind) = within {
        match ping_inside(ways, kind, address).await {
            Ok(latency) => answer.latency = latency.as_secs_f64(),
            Err(error) => answer.error = error,
        }
        return Ok(answer);
    }
    match ways.paths.ping(node.key).await {
        Ok(pong) => {
            answer.latency = pong.latency.as_secs_f64();
            match pong.path {
                Path::Udp(address) => answer.endpoint = address.to_string(),
                path @ Path::PeerRelay(..) => answer.peer_relay = path.to_string(),
                Path::Relay(relay) => {
                    answer.region = relay.0;
                    answer.region_code = pong.region.unwrap_or_else(|| relay.0.to_string());
                }
            }
        }
        Err(error) => answer.error = error.to_string(),
    }
    Ok(answer)
}

async fn ping_inside(ways: &Ways, kind: Kind, to: Option<IpAddr>) -> Result<Duration, String> {
    let to = to.ok_or("the node has no address")?;
    let own = ways.report.map.own().into_iter();
    let mut own = own.flat_map(|own| own.addresses.iter().map(IpNet::addr));
    let from = own.find(|own| own.is_ipv4() == to.is_ipv4());
    let from = from.ok_or("this router has no address of that family in the tailnet")?;
    let pong = ways.inside.ping(kind, from, to).await;
    pong.map(|pong| pong.latency)
        .map_err(|error| error.to_string())
}

/// Looks at the network now. `None`: the daemon is ending.
pub(super) async fn netcheck(ways: &Ways) -> Option<Netcheck> {
    let found = ways.paths.netcheck().await?;
    Some(Netcheck::new(&found, &ways.paths.report()))
}

impl Netcheck {
    fn new(found: &paths::Netcheck, report: &paths::PathsReport) -> Self {
        let nanos = |all: &BTreeMap<u32, std::time::Duration>| {
            let nanos = |time: &std::time::Duration| u64::try_from(time.as_nanos());
            all.iter()
                .filter_map(|(region, time)| Some((*region, nanos(time).ok()?)))
                .collect()
        };
        let text = |address: Option<std::net::SocketAddr>| {
            address.map(|a| a.to_string()).unwrap_or_default()
        };
        let by = |protocol| Some(report.port.mapped?.by == protocol);
        Self {
            now: found
                .taken
                .map_or_else(Timestamp::now, Timestamp::from)
                .to_string(),
            udp: found.udp,
            ipv4: found.ipv4,
            ipv6: found.ipv6,
            ipv4_can_send: found.ipv4_can_send,
            ipv6_can_send: found.ipv6_can_send,
            os_has_ipv6: found.os_has_ipv6,
            mapping_varies: found.mapping_varies,
            upnp: by(Protocol::Upnp),
            pmp: by(Protocol::NatPmp),
            pcp: by(Protocol::Pcp),
            port_mapping_refused: report.port.refusals(),
            preferred: found.preferred.unwrap_or(0),
            region_latency: nanos(&found.latency),
            region_v4_latency: nanos(&found.latency4),
            region_v6_latency: nanos(&found.latency6),
            global4: text(found.global4),
            global6: text(found.global6),
            region_codes: report.regions.clone(),
        }
    }
}

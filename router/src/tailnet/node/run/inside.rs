//! What passes between nodes inside the tunnel, and pings of all kinds that the server asks for.

use std::net::IpAddr;

use super::Node;
use crate::engine;
use crate::tailnet::inside::{Inside, Kind};
use crate::tailnet::keys::{DiscoPublic, NodePublic};
use crate::tailnet::netmap;
use crate::tailnet::paths;
use crate::tailnet::session::Asked;
use crate::tailnet::wire::PingResponse;

impl Node {
    /// A peer has told its disco key through the tunnel: the server may know it later.
    pub(super) fn learn_disco(&mut self, from: IpAddr, key: DiscoPublic) {
        let Some(id) = self.peer_at(from).map(|peer| peer.id) else {
            return;
        };
        let now = self.control_time();
        let map = match &mut self.driver {
            Some(driver) => driver.session_mut().map_mut(),
            None => &mut self.map,
        };
        let change = map.learn_disco(id, key, now);
        if !change.is_empty() {
            self.handle_change(change);
        }
    }

    fn peer_at(&self, address: IpAddr) -> Option<&netmap::Node> {
        let holds = |node: &&netmap::Node| node.addresses.iter().any(|own| own.addr() == address);
        self.map().peers().find(holds)
    }

    pub(super) fn handle_ping(&mut self, asked: Asked) {
        let Some(driver) = &self.driver else {
            return;
        };
        let answers = driver.answers();
        let target = self.target(&asked.address);
        let (paths, inside) = (self.paths.clone(), self.inside.clone());
        tokio::spawn(async move {
            for kind in &asked.kinds {
                let mut found = PingResponse {
                    kind: Some(kind.clone()),
                    ip: Some(asked.address.clone()),
                    ..PingResponse::default()
                };
                let done = match &target {
                    Some(target) => {
                        let (paths, inside) = (paths.as_ref(), inside.as_ref());
                        ping(kind, target, paths, inside, &mut found).await
                    }
                    None => Err("this node has no such peer".to_owned()),
                };
                found.err = done.err();
                if let Ok(answer) = asked.answer(&found) {
                    answers.send(answer).await;
                }
            }
        });
    }

    /// Whom a ping is for, by an address.
    fn target(&self, text: &str) -> Option<Target> {
        let address: IpAddr = text.parse().ok()?;
        let own = self.map().own();
        let mut own = own.into_iter().flat_map(|own| &own.addresses);
        let own = own.find(|own| own.addr().is_ipv4() == address.is_ipv4());
        Some(Target {
            key: self.peer_at(address)?.key,
            address,
            own: own.map(ipnet::IpNet::addr),
        })
    }
}

struct Target {
    key: NodePublic,
    address: IpAddr,
    /// Our address of the same family.
    own: Option<IpAddr>,
}

/// Pings a peer in one of the ways that a server can ask for.
async fn ping(
    kind: &str,
    target: &Target,
    paths: Option<&paths::Handle>,
    inside: Option<&Inside>,
    found: &mut PingResponse,
) -> Result<(), String> {
    let within = match kind {
        "TSMP" => Some(Kind::Tsmp),
        "ICMP" => Some(Kind::Icmp),
        _ => None,
    };
    if let (Some(kind), Some(inside), Some(own)) = (within, inside, target.own) {
        let pong = inside.ping(kind, own, target.address).await;
        let pong = pong.map_err(|error| error.to_string())?;
        found.latency_seconds = Some(pong.latency.as_secs_f64());
        return Ok(());
    }
    let paths = paths.filter(|_| kind == "disco");
    let paths = paths.ok_or_else(|| format!("this node sends no {kind} pings for others"))?;
    let pong = paths
        .ping(target.key)
        .await
        .map_err(|error| error.to_string())?;
    found.latency_seconds = Some(pong.latency.as_secs_f64());
    match pong.path {
        engine::Path::Udp(at) => found.endpoint = Some(at.to_string()),
        way @ engine::Path::PeerRelay(..) => found.peer_relay = Some(way.to_string()),
        engine::Path::Relay(relay) => found.derp_region_id = Some(i64::from(relay.0)),
    }
    Ok(())
}

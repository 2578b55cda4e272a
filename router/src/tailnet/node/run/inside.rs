//! What passes between nodes inside the tunnel, and pings of all kinds that the server asks for.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::Node;
use crate::engine;
use crate::tailnet::inside::{Inside, Kind};
use crate::tailnet::keys::{DiscoPublic, NodePublic};
use crate::tailnet::netmap;
use crate::tailnet::paths;
use crate::tailnet::session::Asked;
use crate::tailnet::wire::PingResponse;

/// A peer is heard so often with a disco key: each one costs a look at all peers, and work wherever it is told.
const TELLS: Duration = Duration::from_secs(1);
/// Addresses from which one is heard within that time. A peer may have a whole network of them.
const MOST_TELLERS: usize = 256;

/// Addresses that have told a disco key lately, each with when.
#[derive(Debug, Default)]
pub(super) struct Tellers(BTreeMap<IpAddr, Instant>);

impl Tellers {
    /// Whether one is heard now.
    fn hears(&mut self, from: IpAddr, now: Instant) -> bool {
        let lately = |at: Instant| now.saturating_duration_since(at) < TELLS;
        if self.0.get(&from).is_some_and(|at| lately(*at)) {
            return false;
        }
        if self.0.len() >= MOST_TELLERS {
            self.0.retain(|_, at| lately(*at));
        }
        let has_room = self.0.len() < MOST_TELLERS;
        if has_room {
            self.0.insert(from, now);
        }
        has_room
    }
}

impl Node {
    /// A peer has told its disco key through the tunnel: the server may know it later.
    pub(super) fn learn_disco(&mut self, from: IpAddr, key: DiscoPublic, now: Instant) {
        if !self.tellers.hears(from, now) {
            return;
        }
        let Some(id) = self.peer_at(from).map(|peer| peer.id) else {
            return;
        };
        let clock = self.control_time();
        let map = match &mut self.driver {
            Some(driver) => driver.session_mut().map_mut(),
            None => &mut self.map,
        };
        let change = map.learn_disco(id, key, clock);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_tells_keys_without_end() {
        let mut tellers = Tellers::default();
        let at = |n: u16| IpAddr::from([100, 64, (n >> 8) as u8, n as u8]);
        let now = Instant::now();
        let heard = |tellers: &mut Tellers, n, seconds: f64| {
            tellers.hears(at(n), now + Duration::from_secs_f64(seconds))
        };
        assert!(heard(&mut tellers, 1, 0.0) && heard(&mut tellers, 2, 0.0));
        assert!(!heard(&mut tellers, 1, 0.9) && heard(&mut tellers, 1, 1.0));
        let many = (1000..2000)
            .filter(|n| heard(&mut tellers, *n, 1.5))
            .count();
        assert!(many <= MOST_TELLERS && tellers.0.len() <= MOST_TELLERS);
        assert!(heard(&mut tellers, 3, 3.0));
    }
}

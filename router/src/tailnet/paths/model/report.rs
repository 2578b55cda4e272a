//! What a person is told of paths: which is taken, and why it is no better.

use std::collections::BTreeSet;
use std::time::Instant;

use super::{Paths, lost};
use crate::engine::Path;
use crate::tailnet::paths::peer::Peer;
use crate::tailnet::paths::{PathsReport, PeerWay};

impl Paths {
    /// Whether there is something new to report.
    pub(in super::super) fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// All that is known but of the gateway, of peers those that have traffic or a direct path.
    pub(in super::super) fn report(&self, now: Instant) -> PathsReport {
        let peers = self.awake.iter().filter_map(|key| {
            let peer = self.peers.get(key)?;
            Some((*key, self.way(peer, now)))
        });
        PathsReport {
            home: self.rounds.home(),
            regions: self.regions.clone(),
            relay_problems: self.relay_problems(now),
            endpoints: self.endpoints.clone(),
            netcheck: self.rounds.last().cloned(),
            peers: peers.collect(),
            relay_server: self.relay_server(now),
            ..PathsReport::default()
        }
    }

    /// What is wrong with the home, and with the relays of peers that have traffic and no direct path.
    fn relay_problems(&self, now: Instant) -> Vec<String> {
        let lost = lost(&self.regions, &self.down);
        let peers = self.awake.iter().filter_map(|key| self.peers.get(key));
        let relayed = peers.filter(|peer| peer.is_active(now) && !peer.is_direct(now));
        let home = self.rounds.home();
        let needed: BTreeSet<u32> = relayed
            .filter_map(|peer| Some(peer.relay(lost, now)?.0))
            .chain(home)
            .collect();
        let told = needed.into_iter().filter_map(|region| {
            let code = self.code(region);
            let whose = match home == Some(region) {
                true => "this router's home",
                false => "the home of peers with traffic",
            };
            if let Some(why) = self.down.get(&region) {
                return Some(format!(
                    "the relay of region {code}, {whose}, cannot be reached ({why}), so that who has no direct path is \
                     cut off: let the router reach it by HTTPS (firewall, proxy, certificates), or mend the relay"
                ));
            }
            let text = self.ill.get(&region)?;
            Some(format!("the relay of region {code}, {whose}, says: {text}"))
        });
        told.collect()
    }

    /// The code of a region.
    pub(super) fn code(&self, region: u32) -> String {
        let code = self.regions.get(&region).cloned();
        code.unwrap_or_else(|| region.to_string())
    }

    fn way(&self, peer: &Peer, now: Instant) -> PeerWay {
        let trusted = peer.is_trusted(now);
        let told = peer.told.map(|ways| ways.path);
        let best = peer.best.filter(|best| told == Some(best.path));
        PeerWay {
            path: told,
            region: peer.spec.home.map(|home| self.code(home)),
            latency: match told {
                Some(Path::Relay(_)) => peer.relay_latency,
                _ => best.map(|best| best.latency),
            },
            trusted,
            active: peer.is_active(now),
            last_disco: peer.last_disco,
            why: (!peer.is_direct(now)).then(|| self.why(peer, now)),
        }
    }

    /// Why a peer has no trusted direct path.
    fn why(&self, peer: &Peer, now: Instant) -> String {
        if !peer.is_active(now) {
            return "there is no traffic, so nothing is tried".to_owned();
        }
        if peer.is_trusted(now) {
            return self.tried(peer);
        }
        let relay = match peer.relay(lost(&self.regions, &self.down), now) {
            Some((_, true)) => "",
            Some((region, false)) => match self.down.get(&region) {
                Some(why) => {
                    return format!(
                        "the relay of region {} cannot be reached ({why}), and {}",
                        self.code(region),
                        self.tried(peer)
                    );
                }
                None if !self.regions.contains_key(&region) => {
                    "the tailnet has no longer the region of the peer's relay, and "
                }
                None => "the peer is not connected to its relay, and ",
            },
            None => "the peer has no relay, and ",
        };
        format!("{relay}{}{}", self.tried(peer), self.unrelayed(peer))
    }

    /// What was tried to reach a peer directly, and why that may fail.
    pub(super) fn tried(&self, peer: &Peer) -> String {
        let found = self.rounds.last();
        if found.is_some_and(|found| !found.udp) {
            return "UDP seems to be blocked here: no relay's STUN server answers".to_owned();
        }
        let count = peer.candidates.len();
        if count == 0 {
            return "the peer has told no addresses".to_owned();
        }
        let shown: Vec<_> = peer
            .candidates
            .iter()
            .take(3)
            .map(|c| c.address.to_string())
            .collect();
        let more = if count > shown.len() { ", ..." } else { "" };
        let hard = found.is_some_and(|found| found.mapping_varies == Some(true));
        let hint = if hard {
            "; the NAT here shows each destination another port, so a peer behind such a NAT cannot be reached directly"
        } else {
            ""
        };
        format!(
            "none of the peer's addresses has answered ({}{more}){hint}",
            shown.join(", ")
        )
    }
}

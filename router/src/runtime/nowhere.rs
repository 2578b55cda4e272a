//! Peers that packets are for, and that nobody knows the endpoint of.

use std::time::{Duration, SystemTime};

use super::Daemon;

/// How long such a packet is a problem.
const MEMORY: Duration = Duration::from_secs(60);

impl Daemon {
    /// What is wrong with such peers, each with its name first.
    pub(super) fn peers_nowhere(&self) -> Vec<(String, String)> {
        let now = SystemTime::now();
        let stats = self.machine.engine.peer_stats().into_iter();
        let missing = stats
            .filter(|stats| stats.path.is_none())
            .filter_map(|stats| {
                let nowhere = stats.nowhere?;
                let recent = now.duration_since(nowhere.at).unwrap_or_default() < MEMORY;
                recent.then_some((stats.public_key, nowhere.destination))
            });
        missing
            .map(|(key, destination)| {
                let peer = self.sources.state().peers.get(&key);
                let name = peer.and_then(|peer| peer.name.clone());
                let name = name.unwrap_or_else(|| key.to_string());
                let problem = format!(
                    "packets for the peer {name} (the last one to {destination}) are dropped \
                     (drop_no_endpoint): it has no configured endpoint and has not connected to this \
                     router; connect it, or, if it is at another router of the same network, have \
                     packets for its addresses routed there"
                );
                (name, problem)
            })
            .collect()
    }

    /// Says once of each that it is missed.
    pub(super) fn tell_nowhere(&mut self) {
        let missing = self.peers_nowhere();
        for (name, problem) in &missing {
            if !self.told.missed.contains(name) {
                tracing::warn!("{problem}");
            }
        }
        self.told.missed = missing.into_iter().map(|(name, _)| name).collect();
    }
}

//! Relays: packets between nodes over TLS, when no way by UDP is known (DERP).
//!
//! After `derp/` of Tailscale's sources. What a relay brings is believed of no message: WireGuard and disco
//! authenticate what is inside, and the relay's word tells only by whom it was handed over.

mod bucket;
pub mod certificate;
mod connection;
mod dial;
pub mod frames;
mod queue;
mod session;
mod trust;

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use connection::{Shared, Task};
use dial::Region;
use queue::Queue;

use crate::tailnet::client::{Proxies, TlsRoots};
use crate::tailnet::keys::{NodePublic, NodeSecret};
use crate::tailnet::wire::{DerpMap, entries};

/// How relays are reached.
#[derive(Clone)]
pub struct Options {
    /// Whom TLS believes.
    pub roots: TlsRoots,
    /// Proxies for what goes over TLS.
    pub proxies: Proxies,
    /// Plain HTTP instead of TLS, for laboratories (`TS_DEBUG_USE_DERP_HTTP` of tailscaled).
    pub plain: bool,
    /// Firewall mark of the connections (`SO_MARK`), so that they do not go into the tunnel; 0 for none.
    pub mark: u32,
}

/// Why a relay does not have a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoneReason {
    /// It was there, and has left.
    Disconnected,
    /// The relay does not know it: what was sent to it there is lost.
    NotHere,
    /// A reason that is not known here.
    Other(u8),
}

/// What the relays say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayEvent {
    /// The region's relay has let the node in: from now on it reaches the node's peers.
    Connected {
        /// The region.
        region: u32,
        /// The relay's name in the map.
        relay: String,
    },
    /// There is no connection any more, or a try to make one has failed. What the relay has said of its health
    /// is over.
    Disconnected {
        /// The region.
        region: u32,
        /// Why, and when it is tried again; `None` where it is not needed any more.
        failure: Option<Failure>,
    },
    /// The relay has answered a ping. One is sent with each connection, and when the relay has been silent.
    Latency {
        /// The region.
        region: u32,
        /// There and back, over the connection.
        latency: Duration,
    },
    /// Packets from peers, as many as were read at once.
    Packets {
        /// The region.
        region: u32,
        /// Who has sent each, by the relay's word, and what. Never empty.
        packets: Vec<(NodePublic, Bytes)>,
    },
    /// A peer that something was sent to, or received from, is not at this relay.
    Gone {
        /// The region.
        region: u32,
        /// The peer.
        peer: NodePublic,
        /// Why.
        reason: GoneReason,
    },
    /// What the relay says to be wrong with the connection, until it says something else or the connection ends.
    Health {
        /// The region.
        region: u32,
        /// Its words; empty when nothing is wrong any more.
        text: String,
    },
    /// The relay is about to restart; the connection is made again without further ado.
    Restarting {
        /// The region.
        region: u32,
        /// How long it asks to wait before that.
        reconnect_in: Duration,
    },
}

/// Why there is no connection to a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What has happened.
    pub why: String,
    /// When it is tried again.
    pub retry: Duration,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// Connections to relays, one for each region that is needed.
///
/// Must be used within a tokio runtime; the connections are tasks of it. They end when this is dropped.
pub struct Relays {
    node: NodeSecret,
    options: Options,
    out: mpsc::Sender<RelayEvent>,
    regions: HashMap<u32, Region>,
    home: Option<u32>,
    connections: HashMap<u32, Running>,
    /// By connections that are over.
    dropped: u64,
}

struct Running {
    shared: Arc<Shared>,
    task: AbortHandle,
}

impl Relays {
    /// No connections yet. What the relays say goes to `out`; while it is full, nothing is read from them.
    pub fn new(node: NodeSecret, options: Options, out: mpsc::Sender<RelayEvent>) -> Self {
        Self {
            node,
            options,
            out,
            regions: HashMap::new(),
            home: None,
            connections: HashMap::new(),
            dropped: 0,
        }
    }

    /// Where the relays are. Connections to relays that are not there any more are made anew.
    pub fn set_map(&mut self, map: &DerpMap) {
        let regions = entries(&map.regions)
            .filter_map(|(number, region)| Some((number.parse().ok()?, Region::new(region))));
        self.regions = regions.collect();
        let dropped = &mut self.dropped;
        self.connections.retain(|number, running| {
            if let Some(region) = self.regions.get(number) {
                running.shared.tell(|state| state.region = region.clone());
                return true;
            }
            running.task.abort();
            *dropped += running.shared.lock().queue.dropped;
            // There may be no room for it now, and there is nobody else who would say it.
            let out = self.out.clone();
            let region = *number;
            tokio::spawn(async move {
                let failure = None;
                let _ = out.send(RelayEvent::Disconnected { region, failure }).await;
            });
            false
        });
        if let Some(home) = self.home {
            self.connect(home);
        }
    }

    /// The home: it is kept connected, and told that it is the home. `None` for none.
    pub fn set_home(&mut self, region: Option<u32>) {
        if self.home == region {
            return;
        }
        if let Some(running) = self.home.and_then(|home| self.connections.get(&home)) {
            running.shared.tell(|state| state.set_home(false));
        }
        self.home = region;
        if let Some(home) = region
            && let Some(shared) = self.running(home)
        {
            shared.tell(|state| state.set_home(true));
        }
    }

    /// Connects to a region that will be needed soon. Without packets the connection is closed after a minute, if
    /// the region is not the home.
    pub fn connect(&mut self, region: u32) {
        if let Some(shared) = self.running(region) {
            shared.tell(|state| state.touch(Instant::now()));
        }
    }

    /// Sends datagrams to a peer at a region, which is connected to if need be: `size` bytes each, the last one
    /// perhaps shorter. What waits for a peer is bounded, in bytes and in time; the oldest is dropped first, for
    /// what is late is worth least. Disco messages do not wait behind the rest. False if the region is unknown or
    /// too much waits already, and nothing was taken.
    pub fn send(&mut self, region: u32, to: NodePublic, datagrams: Bytes, size: usize) -> bool {
        let Some(shared) = self.running(region) else {
            return false;
        };
        let now = Instant::now();
        shared.tell(|state| {
            state.touch(now);
            state.queue.push(to, datagrams, size, now)
        })
    }

    /// Finds out at once which connections live, and tries again those that wait to be: after a change of the
    /// uplink, or a sleep.
    pub fn check(&mut self) {
        let now = Instant::now();
        for running in self.connections.values() {
            running.shared.tell(|state| state.check(now));
        }
    }

    /// Datagrams that were taken and dropped since the beginning.
    pub fn dropped(&self) -> u64 {
        let running = self.connections.values();
        let running = running.map(|running| running.shared.lock().queue.dropped);
        self.dropped + running.sum::<u64>()
    }

    /// What is shared with the task of a region, which is started if there is none. `None` if the map does not have
    /// the region.
    fn running(&mut self, number: u32) -> Option<Arc<Shared>> {
        let region = self.regions.get(&number)?;
        let now = Instant::now();
        let mut queue = Queue::default();
        if let Some(running) = self.connections.get(&number) {
            let mut state = running.shared.lock();
            if !state.over {
                // From now on it is not idle: the task cannot end before the caller has done what it wants.
                state.touch(now);
                return Some(running.shared.clone());
            }
            // Nobody has waited for what it still has.
            queue = std::mem::take(&mut state.queue);
            queue.clear();
        }
        let home = self.home == Some(number);
        let shared = Shared::new(region.clone(), home, queue);
        let task = Task {
            number,
            node: self.node.clone(),
            options: self.options.clone(),
            shared: shared.clone(),
            out: self.out.clone(),
        };
        let task = tokio::spawn(task.run()).abort_handle();
        let running = Running {
            shared: shared.clone(),
            task,
        };
        self.connections.insert(number, running);
        Some(shared)
    }
}

impl Drop for Relays {
    fn drop(&mut self) {
        for running in self.connections.values() {
            running.task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody takes what relays say for a while: that a region is gone is said all the same.
    #[tokio::test]
    async fn a_region_that_is_gone_is_told_of_however_full_the_channel_is() {
        let (out, mut told) = mpsc::channel(1);
        let health = |region| RelayEvent::Health {
            region,
            text: String::new(),
        };
        out.try_send(health(9)).unwrap();
        let options = Options {
            roots: TlsRoots::new(None).unwrap(),
            proxies: Proxies::default(),
            plain: true,
            mark: 0,
        };
        let mut relays = Relays::new(NodeSecret::generate().unwrap(), options, out);
        let region = r#"{"RegionID":1,"Nodes":[{"Name":"n","HostName":"127.0.0.1","IPv4":"127.0.0.1","DERPPort":1}]}"#;
        let map = format!(r#"{{"Regions":{{"1":{region}}}}}"#);
        relays.set_map(&serde_json::from_str(&map).unwrap());
        relays.connect(1);
        relays.set_map(&DerpMap::default());
        assert_eq!(told.recv().await, Some(health(9)));
        let gone = RelayEvent::Disconnected {
            region: 1,
            failure: None,
        };
        assert_eq!(told.recv().await, Some(gone));
    }
}

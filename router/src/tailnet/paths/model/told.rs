//! What the model is told: own keys, peers, relays, and what this machine has.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Instant;

use super::{Event, Local, Own, Paths};
use crate::tailnet::disco::Boxes;
use crate::tailnet::keys::{DiscoPublic, DiscoSecret, NodePublic, NodeSecret};
use crate::tailnet::paths::peer::{PING_AGAIN, Peer};
use crate::tailnet::paths::{Command, PathPeer};
use crate::tailnet::wire::{DerpMap, DerpRegion};

impl Paths {
    /// Takes a command; pings and looks at the network, which want an answer, come by their own names.
    pub(in super::super) fn handle_command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Identity { node, disco } => self.set_identity(&node, &disco, now),
            Command::Peers { set, removed } => {
                for key in removed {
                    self.remove_peer(&key);
                }
                for peer in set {
                    self.set_peer(peer, now);
                }
            }
            Command::Derp(map) => self.set_derp(&map, now),
            Command::PeerRelays(servers) => self.set_relays(servers),
            Command::Serve(wanted) => self.set_serving(wanted, now),
            Command::Local {
                port,
                addresses,
                fixed,
            } => self.set_local(
                Local {
                    port,
                    addresses,
                    fixed,
                },
                now,
            ),
            Command::Control { connected } => self.heard = connected,
            Command::Applied(keys) => {
                for key in keys {
                    self.tell_again(&NodePublic::from_bytes(key.0), now);
                }
            }
            Command::AppliedAll => {
                for key in self.peers.keys().copied().collect::<Vec<_>>() {
                    self.tell_again(&key, now);
                }
            }
            Command::Ping { .. }
            | Command::Netcheck(_)
            | Command::Gateway(_)
            | Command::GiveBack(_) => {}
        }
    }

    fn set_identity(&mut self, node: &NodeSecret, disco: &DiscoSecret, now: Instant) {
        // Connections to relays begin anew, and nobody tells how the old ones end.
        self.down.clear();
        self.ill.clear();
        let (node, public) = (node.public(), disco.public());
        let same = |own: &Own| own.node == node && own.disco == public;
        if self.own.as_ref().is_some_and(same) {
            return;
        }
        self.own = Some(Own {
            node,
            disco: public,
            boxes: Boxes::new(disco),
        });
        self.pings.clear();
        self.tries.clear();
        self.search_everywhere(true, now);
        self.look(now);
    }

    fn set_peer(&mut self, spec: PathPeer, now: Instant) {
        let key = spec.key;
        let Some(peer) = self.peers.get_mut(&key) else {
            if let Some(disco) = spec.disco {
                self.by_disco.entry(disco).or_default().push(key);
            }
            self.peers.insert(key, Peer::new(spec));
            self.settle(&key, now);
            return;
        };
        let new = peer.list(&spec.endpoints);
        let old = std::mem::replace(
            &mut peer.spec,
            PathPeer {
                endpoints: Vec::new(),
                ..spec
            },
        );
        let other_disco = old.disco != peer.spec.disco;
        if new || other_disco {
            peer.patience = PING_AGAIN;
        }
        if other_disco {
            // It has been started anew: nothing says that it is where it was.
            peer.trusted_until = None;
            peer.called = None;
            peer.relays_sought = None;
            for candidate in &mut peer.candidates {
                candidate.pinged = None;
            }
        }
        if peer.spec.home != old.home {
            peer.absent = None;
        }
        peer.prune(now);
        let seeks = peer.is_active(now) && !peer.is_trusted(now) && (new || other_disco);
        let disco = peer.spec.disco;
        if other_disco {
            self.forget_tries(&key);
            if let Some(old) = old.disco {
                self.forget_disco(&old, &key);
            }
            if let Some(disco) = disco {
                self.by_disco.entry(disco).or_default().push(key);
            }
        }
        if seeks {
            self.search(&key, true, now);
        }
        self.settle(&key, now);
    }

    fn remove_peer(&mut self, key: &NodePublic) {
        if let Some(peer) = self.peers.remove(key) {
            if let Some(disco) = peer.spec.disco {
                self.forget_disco(&disco, key);
            }
            self.forget_tries(key);
            self.to_call.remove(key);
            self.changed |= self.awake.remove(key);
        }
    }

    fn forget_disco(&mut self, disco: &DiscoPublic, key: &NodePublic) {
        let Some(keys) = self.by_disco.get_mut(disco) else {
            return;
        };
        keys.retain(|other| other != key);
        if keys.is_empty() {
            self.by_disco.remove(disco);
            if let Some(own) = &mut self.own {
                own.boxes.forget(disco);
            }
        }
    }

    fn set_derp(&mut self, map: &DerpMap, now: Instant) {
        let regions = map.regions.iter().flatten();
        let code = |(text, region): (&String, &Option<DerpRegion>)| {
            let code = region.as_ref()?.region_code.clone().unwrap_or_default();
            Some((text.parse::<u32>().ok()?, code))
        };
        let before = std::mem::replace(&mut self.regions, regions.filter_map(code).collect());
        for (number, code) in &mut self.regions {
            if code.is_empty() {
                *code = number.to_string();
            }
        }
        self.down
            .retain(|region, _| self.regions.contains_key(region));
        if self.serving_rounds().set_map(map) {
            self.look_for_serving(now);
        }
        if self.rounds.set_map(map) {
            self.resolve();
            if self.own.is_some() {
                self.rounds.start(true, now);
            }
        }
        let others =
            |region: &u32| before.contains_key(region) != self.regions.contains_key(region);
        let others: BTreeSet<u32> = before
            .keys()
            .chain(self.regions.keys())
            .copied()
            .filter(others)
            .collect();
        for region in others {
            self.settle_region(region, now);
        }
        self.changed = true;
        self.say_home();
    }

    /// Asks for the addresses of names.
    pub(super) fn resolve(&mut self) {
        let names: BTreeSet<_> = self.rounds.names().into_iter().map(str::to_owned).collect();
        if !names.is_empty() {
            self.events.push_back(Event::Resolve(names));
        }
    }

    /// Takes the addresses of names.
    pub(in super::super) fn handle_resolved(
        &mut self,
        names: Vec<(String, Vec<IpAddr>)>,
        now: Instant,
    ) {
        let serving = self.serving_rounds();
        if serving.resolved(names.clone()) && serving.last().is_none_or(|last| !last.udp) {
            self.look_for_serving(now);
        }
        let changed = self.rounds.resolved(names);
        let found = self.rounds.last().is_some_and(|last| last.udp);
        if self.own.is_some() && changed && !found {
            // A round that has begun without them is none.
            self.rounds.cancel();
            self.rounds.start(true, now);
        }
    }

    fn set_local(&mut self, local: Local, now: Instant) {
        if local == self.local {
            return;
        }
        let gone = |address: &IpAddr| !local.addresses.contains(address);
        // What is new beside the rest takes nothing away: most of it are bridges of containers.
        let moved = local.port != self.local.port || self.local.addresses.iter().any(gone);
        self.rounds.has = [
            local.addresses.iter().any(IpAddr::is_ipv4),
            local.addresses.iter().any(IpAddr::is_ipv6),
        ];
        self.serving_rounds().has = self.rounds.has;
        self.local = local;
        if moved {
            self.look_for_serving(now);
            self.rounds.forget();
        }
        self.search_everywhere(moved, now);
        self.look(now);
        self.say_endpoints(now);
    }

    /// A look at the network, now.
    fn look(&mut self, now: Instant) {
        if self.own.is_some() && self.rounds.has_servers() {
            self.rounds.start(true, now);
        }
    }

    /// Searches for all peers with traffic that may be found elsewhere now. If this node has `moved`, what was known
    /// of paths is worth nothing any more.
    fn search_everywhere(&mut self, moved: bool, now: Instant) {
        for key in self.peers.keys().copied().collect::<Vec<_>>() {
            let Some(peer) = self.peers.get_mut(&key) else {
                continue;
            };
            if moved {
                peer.doubt();
            }
            if peer.is_active(now) && !peer.is_direct(now) {
                self.search(&key, true, now);
            }
            self.settle(&key, now);
        }
    }
}

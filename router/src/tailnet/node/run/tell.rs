//! What the node tells the server and the paths.

use std::time::Instant;

use super::super::wanted;
use super::{ABOUT, Node, Phase};
use crate::tailnet::netmap::Change;
use crate::tailnet::paths::{self, PathPeer};
use crate::tailnet::session::{About, Now};

impl Node {
    pub(super) fn about(&self) -> About {
        let mut hostinfo = self.host.clone();
        hostinfo.net_info = self.net_info.clone();
        let fixed = || {
            let fixed = self.settings.static_endpoints.iter();
            fixed
                .map(|at| (*at, paths::EndpointKind::Fixed.wire()))
                .collect()
        };
        let endpoints = self.endpoints.clone().unwrap_or_else(fixed);
        About {
            hostinfo,
            endpoints: endpoints
                .into_iter()
                .map(|(at, kind)| (at.to_string(), kind))
                .collect(),
            debug_flags: Vec::new(),
            ephemeral: self.settings.ephemeral,
        }
    }

    pub(super) fn tell_about(&mut self) {
        let about = self.about();
        if let Some(driver) = &mut self.driver {
            driver.session_mut().set_about(about, Now::read());
        }
    }

    pub(super) fn handle_path_event(&mut self, event: paths::Event) {
        match event {
            paths::Event::Endpoints(endpoints) => {
                let endpoints = endpoints.into_iter().map(|(at, kind)| (at, kind.wire()));
                self.endpoints = Some(endpoints.collect());
            }
            paths::Event::NetInfo(info) => self.net_info = Some(*info),
            // It is in the NetInfo that comes with it.
            paths::Event::Home(_) => return,
        }
        self.about_due.get_or_insert(Instant::now() + ABOUT);
    }

    pub(super) fn tell_paths(&self, command: paths::Command) {
        if let Some(paths) = &self.paths {
            paths.tell(command);
        }
    }

    pub(super) fn tell_paths_identity(&self) {
        self.tell_paths(paths::Command::Identity {
            node: self.identity.node.clone(),
            disco: self.identity.disco.clone(),
        });
    }

    pub(super) fn tell_paths_derp(&self) {
        self.tell_paths(paths::Command::Derp(Box::new(
            self.map().derp().as_ref().clone(),
        )));
    }

    pub(super) fn tell_paths_everything(&self) {
        self.tell_paths_identity();
        self.tell_paths_derp();
        let set = self.map().peers().map(|peer| peer.id).collect();
        self.tell_paths_peers(&Change {
            set,
            ..Change::default()
        });
        self.tell_paths_relays();
    }

    /// Tells which peers are relays, and for whom this node is one. None is used that the paths do not know as peers.
    pub(super) fn tell_paths_relays(&self) {
        if self.paths.is_some() {
            self.tell_paths(paths::Command::PeerRelays(self.map().peer_relays()));
            self.tell_paths(paths::Command::Serve(self.serve()));
        }
    }

    fn serve(&self) -> Option<paths::Serve> {
        let port = self.settings.relay_server_port?.get();
        let may = self.phase == Phase::In && self.map().may_relay();
        may.then(|| paths::Serve {
            port,
            fixed: self.settings.relay_server_static_endpoints.clone(),
            clients: self.map().relay_clients(),
        })
    }

    pub(super) fn tell_paths_peers(&self, change: &Change) {
        if self.paths.is_none() || (change.set.is_empty() && change.removed.is_empty()) {
            return;
        }
        let now = self.control_time();
        let in_force = self.phase == Phase::In;
        let nodes = change.set.iter().filter_map(|id| self.map().peer(*id));
        let (set, gone): (Vec<_>, Vec<_>) =
            nodes.partition(|node| in_force && wanted::is_reachable(node, now));
        let set = set.into_iter().map(|node| PathPeer {
            key: node.key,
            disco: node.disco,
            endpoints: node.endpoints.clone(),
            home: u32::try_from(node.home_derp)
                .ok()
                .filter(|region| *region != 0),
            wireguard_only: node.wireguard_only,
            relayed: node.knows_relays(),
            online: node.online,
            addresses: node.addresses.iter().map(ipnet::IpNet::addr).collect(),
        });
        let gone = gone.into_iter().map(|node| node.key);
        self.tell_paths(paths::Command::Peers {
            set: set.collect(),
            removed: change.removed.iter().copied().chain(gone).collect(),
        });
    }
}

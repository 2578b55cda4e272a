//! What wg(8) sees of the router, and changes.
//!
//! A `set` changes peers, private key and port of the running router. It goes the way of a reload:
//! judged as a file would be, then planned and carried out by parts. The file knows nothing of it,
//! so the next reload or start undoes it.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Instant;

use ipnet::IpNet;

use super::Daemon;
use crate::config::{self, Config, Local, Problem};
use crate::control::{Endpoint, Peer, Snapshot};
use crate::core::{Facts, Names, peer_spec};
use crate::engine::PeerSpec;
use crate::uapi::{Errno, Interface, PeerState, Question, Refusal, Set, State};
use crate::wireguard::keys::PublicKey;

impl Daemon {
    /// Answers a client, which may have gone meanwhile.
    pub(super) async fn answer(&mut self, question: Question) {
        match question {
            Question::Get(answer) => drop(answer.send(self.wireguard_state())),
            Question::Set(set, answer) => {
                let outcome = self.set(&set).await;
                drop(answer.send(outcome));
            }
        }
    }

    /// Whether a `set` has changed something since the file was read.
    pub(super) fn differs_from_file(&self) -> bool {
        self.snapshot != self.file.snapshot
            || self.local.private_key != self.file.local.private_key
            || self.local.listen_port != self.file.local.listen_port
    }

    /// Carries out a `set`. When this returns it is in force, as far as the machine allows it.
    async fn set(&mut self, set: &Set) -> Result<(), Refusal> {
        let stats = self.engine.peer_stats().into_iter();
        let present = Present {
            file: &self.file,
            local: &self.local,
            snapshot: &self.snapshot,
            names: &self.names,
            facts: &self.facts,
            whereabouts: stats
                .filter_map(|stats| Some((stats.public_key, stats.endpoint?)))
                .collect(),
        };
        let Some(wanted) = present.after(set)? else {
            return Ok(());
        };
        let Config {
            local, snapshot, ..
        } = wanted.config;
        // The only thing that may fail by others' fault comes first.
        self.listen_on(local.listen_port)?;
        if let Some(staying) = wanted.staying {
            self.take_key(&local.private_key, &staying)?;
        }
        tracing::info!(
            peers = snapshot.peers.len(),
            "`wg` has changed the router; this holds until the configuration is read again"
        );
        self.snapshot = snapshot;
        self.names.track(&self.snapshot, Instant::now());
        self.replan();
        self.act().await;
        Ok(self.engine.set_endpoints(&wanted.endpoints)?)
    }

    fn wireguard_state(&self) -> State {
        let stats = self.stats_by_peer();
        let peers = self.snapshot.peers.iter().map(|peer| {
            let stats = stats.get(&peer.public_key);
            PeerState {
                public_key: peer.public_key,
                preshared_key: peer.preshared_key.clone(),
                endpoint: stats.and_then(|stats| stats.endpoint),
                last_handshake: stats.and_then(|stats| stats.last_handshake),
                tx_bytes: stats.map_or(0, |stats| stats.tx_bytes),
                rx_bytes: stats.map_or(0, |stats| stats.rx_bytes),
                keepalive: peer.keepalive.unwrap_or(0),
                allowed_ips: peer.allowed_ips.clone(),
            }
        });
        State {
            private_key: Some(self.local.private_key.clone()),
            listen_port: self.engine.listen_port(),
            fwmark: self.local.marks.underlay,
            peers: peers.collect(),
        }
    }
}

/// The router as it is.
struct Present<'d> {
    file: &'d Config,
    local: &'d Local,
    snapshot: &'d Snapshot,
    names: &'d Names,
    facts: &'d Facts,
    /// Where peers are.
    whereabouts: HashMap<PublicKey, SocketAddr>,
}

/// What a `set` makes of it.
struct Wanted {
    config: Config,
    /// The peers that may stay while the private key changes, and while others come anew; `None`:
    /// neither happens.
    staying: Option<Vec<PeerSpec>>,
    /// Endpoints that peers are not at, or will not be when they have come anew.
    endpoints: Vec<(PublicKey, SocketAddr)>,
}

impl Present<'_> {
    /// The router after a `set`; `None`: as before.
    fn after(&self, set: &Set) -> Result<Option<Wanted>, Refusal> {
        // Where a file for wg(8) says nothing of the mark, 0 comes.
        let own = self.local.marks.underlay;
        if let Some(mark) = set.fwmark.filter(|mark| ![0, own].contains(mark)) {
            let reason = format!(
                "the firewall mark {mark:#x}: a router's own is {own:#x} (datapath.underlay_mark), by \
                 which its packets stay out of the tunnel"
            );
            return Err(Refusal::new(Errno::Permission, reason));
        }
        let resolved =
            |peer| peer_spec(peer, |host, port| self.names.addresses(host, port).to_vec());
        let specs: Vec<PeerSpec> = self.snapshot.peers.iter().map(resolved).collect();
        let key = self.local.private_key.clone();
        let before = Interface::new(key, own, specs.iter().cloned());
        let mut edited = before.edit(set)?;
        let Some(private_key) = edited.interface.private_key.clone() else {
            let reason = "a router is nothing without its private key; `wg setconf` and `wg \
                          syncconf` take it away where their file has none";
            return Err(Refusal::new(Errno::Invalid, reason));
        };
        // 0 leaves the choice to the system; a file for wg(8) without a port means it, too.
        let port = edited.listen_port.filter(|port| *port != 0);
        let local = Local {
            private_key,
            listen_port: port.unwrap_or(self.local.listen_port),
            ..self.local.clone()
        };
        let is_there = |(key, endpoint): &_| self.whereabouts.get(key) == Some(endpoint);
        // Of one that comes anew nothing is known.
        let renewed = &edited.renewed;
        edited
            .endpoints
            .retain(|told| renewed.contains(&told.0) || !is_there(told));
        let merge = Merge {
            before: by_key(self.snapshot.peers.iter().zip(&specs), |(peer, _)| peer),
            file: by_key(&self.file.snapshot.peers, |peer| peer),
            whereabouts: &self.whereabouts,
            renewed: &edited.renewed,
        };
        let peers = edited.interface.specs().into_iter();
        let peers: Vec<Peer> = peers.map(|spec| merge.peer(spec)).collect();
        if peers == self.snapshot.peers
            && local == *self.local
            && edited.renewed.is_empty()
            && edited.endpoints.is_empty()
        {
            return Ok(None);
        }
        let config = self.file.with_peers(&local, peers);
        let config = config.map_err(|errors| refusal(&errors.0))?;
        let problems = config::check_against_system(&config, self.facts);
        if !problems.is_empty() {
            return Err(refusal(&problems));
        }
        let staying = edited.staying(&before);
        let is_new = local.private_key != self.local.private_key;
        Ok(Some(Wanted {
            config,
            staying: staying.or_else(|| is_new.then(|| before.specs())),
            endpoints: edited.endpoints,
        }))
    }
}

/// For the first of these problems: one CIDR may be in the way of all peers.
fn refusal(problems: &[Problem]) -> Refusal {
    let reason = match problems {
        [] => String::new(),
        [only] => only.message.clone(),
        [first, more @ ..] => format!("{} (and {} more problems)", first.message, more.len()),
    };
    Refusal::new(Errno::Invalid, reason)
}

fn by_key<'p, T>(
    items: impl IntoIterator<Item = T>,
    peer: impl Fn(&T) -> &'p Peer,
) -> HashMap<PublicKey, T> {
    let items = items.into_iter();
    items.map(|item| (peer(&item).public_key, item)).collect()
}

/// Brings together what a `set` makes of the peers and what it does not know of.
struct Merge<'p> {
    /// The peers in force, with what the engine was told of each.
    before: HashMap<PublicKey, (&'p Peer, &'p PeerSpec)>,
    /// The peers of the file.
    file: HashMap<PublicKey, &'p Peer>,
    /// Where peers are.
    whereabouts: &'p HashMap<PublicKey, SocketAddr>,
    /// Peers that went and came again.
    renewed: &'p HashSet<PublicKey>,
}

impl Merge<'_> {
    fn peer(&self, spec: PeerSpec) -> Peer {
        let file = self.file.get(&spec.public_key);
        Peer {
            name: file.and_then(|peer| peer.name.clone()),
            endpoint: self.endpoint(&spec),
            allowed_ips: self.allowed_ips(&spec),
            public_key: spec.public_key,
            preshared_key: spec.preshared_key,
            keepalive: spec.keepalive,
        }
    }

    /// What was configured stays, a DNS name perhaps, unless the set names another place than that
    /// and where the peer is.
    fn endpoint(&self, spec: &PeerSpec) -> Option<Endpoint> {
        let anew = || spec.endpoint.map(Endpoint::Addr);
        let key = &spec.public_key;
        let Some((before, told)) = self.before.get(key) else {
            return anew();
        };
        let is_same =
            spec.endpoint == told.endpoint || spec.endpoint.as_ref() == self.whereabouts.get(key);
        // One that comes anew without an endpoint has none.
        let is_taken = spec.endpoint.is_none() && self.renewed.contains(key);
        if is_same && !is_taken {
            before.endpoint.clone()
        } else {
            anew()
        }
    }

    /// The same CIDRs stay in their order: what is the same is to compare so.
    fn allowed_ips(&self, spec: &PeerSpec) -> Vec<IpNet> {
        let key = &spec.public_key;
        let before = self.before.get(key).map(|(peer, _)| *peer);
        let known = before.into_iter().chain(self.file.get(key).copied());
        let sorted = |cidrs: &[IpNet]| {
            let mut sorted = cidrs.to_vec();
            sorted.sort_unstable();
            sorted
        };
        let wanted = sorted(&spec.allowed_ips);
        let mut known = known.map(|peer| &peer.allowed_ips);
        let same = known.find(|cidrs| sorted(cidrs) == wanted);
        same.cloned().unwrap_or(wanted)
    }
}

#[cfg(test)]
mod tests;

//! What wg(8) sees of the router, and changes.
//!
//! A `set` changes peers, private key and port of the running router. It is an update of what the file
//! wants: judged as a file would be, then planned and carried out by parts. The file knows nothing of
//! it, so the next reload or start undoes it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::Daemon;
use super::sources::FILE;
use crate::config::{self, Config, Local, Problem};
use crate::control::{Combined, Delta, Endpoint, Identity, Peer, Update};
use crate::core::{Facts, Names, peer_spec};
use crate::engine::PeerSpec;
use crate::uapi::{AllowedIp, Errno, Interface, PeerState, Refusal, Set, State};
use crate::wireguard::keys::{PrivateKey, PublicKey};

impl Daemon {
    /// Carries out a `set`. When this returns it is in force, as far as the machine allows it.
    pub(super) async fn set(&mut self, set: &Set) -> Result<(), Refusal> {
        let engine = &self.machine.engine;
        let present = Present {
            file: &self.sources.config,
            local: &self.sources.local,
            combined: self.sources.combined(),
            names: &self.resolver.names,
            facts: &self.network.facts,
            whereabouts: &|key| engine.endpoint_of(key),
        };
        let Some(wanted) = present.after(set)? else {
            return Ok(());
        };
        // The only thing that may fail by others' fault comes first.
        self.listen_on(wanted.listen_port)?;
        if !wanted.renewed.is_empty() {
            self.core.touch_peers(wanted.renewed.iter().copied());
            self.machine.drop_peers(wanted.renewed)?;
        }
        tracing::info!(
            changed = wanted.delta.set.len(),
            removed = wanted.delta.remove.len(),
            "`wg` has changed the router; this holds until the configuration is read again"
        );
        let changed = self.sources.apply(FILE, Update::Delta(wanted.delta));
        self.take(&changed);
        self.guard_uplink();
        self.act().await;
        Ok(self.machine.engine.set_endpoints(&wanted.endpoints)?)
    }

    pub(super) fn wireguard_state(&self) -> State {
        let stats = self.stats_by_peer();
        let state = self.sources.state();
        let peers = state.peers.iter().map(|peer| {
            let stats = stats.get(&peer.public_key);
            PeerState {
                public_key: peer.public_key,
                preshared_key: peer.preshared_key.clone(),
                endpoint: stats.and_then(|stats| stats.endpoint()),
                last_handshake: stats.and_then(|stats| stats.last_handshake),
                tx_bytes: stats.map_or(0, |stats| stats.tx_bytes),
                rx_bytes: stats.map_or(0, |stats| stats.rx_bytes),
                keepalive: peer.keepalive.unwrap_or(0),
                allowed_ips: peer.allowed_ips.clone(),
            }
        });
        State {
            private_key: state.identity.as_ref().map(|own| own.private_key.clone()),
            listen_port: self.machine.engine.listen_port(),
            fwmark: self.sources.local.marks.underlay,
            peers: peers.collect(),
        }
    }
}

/// The router as it is.
struct Present<'d> {
    file: &'d Config,
    local: &'d Local,
    combined: &'d Combined,
    names: &'d Names,
    facts: &'d Facts,
    /// Where a peer is.
    whereabouts: &'d dyn Fn(&PublicKey) -> Option<SocketAddr>,
}

/// What a `set` makes of it.
struct Wanted {
    listen_port: u16,
    /// Of what the file wants.
    delta: Delta,
    /// Peers that go and come again: nothing of them is to stay.
    renewed: Vec<PublicKey>,
    /// Endpoints that peers are not at, or will not be when they have come anew.
    endpoints: Vec<(PublicKey, SocketAddr)>,
}

impl Present<'_> {
    /// The router after a `set`; `None`: as before. Costs as much as the peers that the set is about.
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
        let Some(key) = self.combined.key_of(FILE) else {
            let reason = "the router's private key comes from elsewhere than the file";
            return Err(Refusal::new(Errno::Permission, reason));
        };
        let touched = self.touched(set)?;
        let of_file = |key: &PublicKey| self.combined.peer_of(FILE, key);
        let present: Vec<&Peer> = touched.iter().filter_map(of_file).collect();
        let specs = present.iter().map(|peer| peer_spec(peer, self.names));
        let specs: Vec<PeerSpec> = specs.collect();
        let before = Interface::new(key.clone(), own, specs.iter().cloned());
        let mut edited = before.edit(set)?;
        let Some(private_key) = edited.interface.private_key.clone() else {
            let reason = "a router is nothing without its private key; `wg setconf` and `wg \
                          syncconf` take it away where their file has none";
            return Err(Refusal::new(Errno::Invalid, reason));
        };
        let is_there = |(key, endpoint): &_| (self.whereabouts)(key).as_ref() == Some(endpoint);
        // Of one that comes anew nothing is known.
        let renewed = &edited.renewed;
        edited
            .endpoints
            .retain(|told| renewed.contains(&told.0) || !is_there(told));
        let file = self.file.snapshot.peers.iter();
        let file = file.filter(|peer| touched.contains(&peer.public_key));
        let merge = Merge {
            before: present
                .iter()
                .zip(&specs)
                .map(|(peer, spec)| (peer.public_key, (*peer, spec)))
                .collect(),
            file: file.map(|peer| (peer.public_key, peer)).collect(),
            whereabouts: self.whereabouts,
            renewed,
        };
        let peers = edited.interface.specs().into_iter();
        let peers: Vec<Peer> = peers.map(|spec| merge.peer(spec)).collect();
        self.judge(&peers, &touched)?;
        let stay: HashMap<PublicKey, &Peer> =
            peers.iter().map(|peer| (peer.public_key, peer)).collect();
        let gone = present.iter().map(|peer| peer.public_key);
        let remove: Vec<PublicKey> = gone.filter(|key| !stay.contains_key(key)).collect();
        let policy = self.policy(&touched, &stay);
        let differs = |peer: &Peer| self.combined.peer_of(FILE, &peer.public_key) != Some(peer);
        // 0 leaves the choice to the system; a file for wg(8) without a port means it, too.
        let port = edited.listen_port.filter(|port| *port != 0);
        let wanted = Wanted {
            listen_port: port.unwrap_or(self.local.listen_port),
            delta: Delta {
                identity: self.new_identity(private_key, key),
                policy,
                set: peers.into_iter().filter(differs).collect(),
                remove,
                routes: None,
            },
            renewed: edited.renewed.into_iter().collect(),
            endpoints: edited.endpoints,
        };
        let is_nothing = wanted.delta == Delta::default()
            && wanted.listen_port == self.local.listen_port
            && wanted.renewed.is_empty()
            && wanted.endpoints.is_empty();
        Ok((!is_nothing).then_some(wanted))
    }

    fn new_identity(&self, private_key: PrivateKey, before: &PrivateKey) -> Option<Identity> {
        (private_key != *before).then(|| Identity {
            private_key,
            addresses: self.file.addresses().to_vec(),
        })
    }

    /// The peers that a set may change: those that it names, whoever loses allowed IPs to them, and who
    /// has the new private key. What another source has is not to be changed here.
    fn touched(&self, set: &Set) -> Result<BTreeSet<PublicKey>, Refusal> {
        let mut touched = BTreeSet::new();
        let peers = &self.combined.state().peers;
        for peer in &set.peers {
            touched.insert(peer.public_key);
            touched.extend(peer.allowed_ips.iter().filter_map(|change| match change {
                AllowedIp::Add(net) => Some(peers.owner(&net.trunc())?.public_key),
                AllowedIp::Remove(_) | AllowedIp::Clear => None,
            }));
        }
        let new_key = set.private_key.iter().flatten().map(PrivateKey::public);
        touched.extend(new_key);
        for key in &touched {
            if let Some((rank, source)) = self.combined.source_of(key)
                && rank != FILE
            {
                let reason = format!(
                    "the peer {key}, or an address of it, comes from {source}, and is to be changed there"
                );
                return Err(Refusal::new(Errno::Permission, reason));
            }
        }
        if set.replace_peers {
            touched.extend(self.combined.peers_of(FILE).map(|peer| peer.public_key));
        }
        Ok(touched)
    }

    /// Judges peers as a file's, beside all others that are near them.
    fn judge(&self, peers: &[Peer], touched: &BTreeSet<PublicKey>) -> Result<(), Refusal> {
        let state = self.combined.state();
        let mut near: HashMap<PublicKey, &Peer> = HashMap::new();
        for peer in peers {
            let nets = peer.allowed_ips.iter();
            let overlapping = nets.flat_map(|net| state.peers.overlapping(*net));
            let host = host(peer).and_then(|host| state.peers.at(host));
            let others = overlapping.chain(host);
            near.extend(others.map(|other| (other.public_key, other)));
        }
        let nets: HashSet<IpNet> = peers.iter().flat_map(|p| &p.allowed_ips).copied().collect();
        let lengths: BTreeSet<u8> = nets.iter().map(IpNet::prefix_len).collect();
        let holds = |host: IpAddr| {
            let mut outer = lengths
                .iter()
                .filter_map(|length| IpNet::new(host, *length).ok());
            outer.any(|outer| nets.contains(&outer.trunc()))
        };
        let others = state.peers.iter();
        let held = others.filter(|other| host(other).is_some_and(holds));
        near.extend(held.map(|other| (other.public_key, other)));
        near.retain(|key, _| !touched.contains(key));
        let all: Vec<&Peer> = peers.iter().chain(near.into_values()).collect();
        self.file
            .judge_peers(state.addresses(), &all)
            .map_err(|errors| refusal(&errors.0))?;
        match config::check_peers_against_system(self.local, peers, self.facts) {
            problems if problems.is_empty() => Ok(()),
            problems => Err(refusal(&problems)),
        }
    }

    /// The file's policy when these peers are all that stays of those that were touched; `None`: as
    /// before.
    fn policy(
        &self,
        touched: &BTreeSet<PublicKey>,
        stay: &HashMap<PublicKey, &Peer>,
    ) -> Option<crate::control::Policy> {
        if !touched.iter().any(|key| self.file.is_named(key)) {
            return None;
        }
        let policy = self.file.policy(|key| {
            let peer = match touched.contains(key) {
                true => stay.get(key).copied(),
                false => self.combined.peer_of(FILE, key),
            };
            Some(peer?.allowed_ips.as_slice())
        });
        (self.combined.policy_of(FILE) != Some(&policy)).then_some(policy)
    }
}

/// Where a peer was configured to be, as an address.
fn host(peer: &Peer) -> Option<IpAddr> {
    match &peer.endpoint {
        Some(Endpoint::Addr(address)) => Some(address.ip()),
        _ => None,
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

/// Brings together what a `set` makes of the peers and what it does not know of.
struct Merge<'p> {
    /// The peers in force that the set is about, with what the engine was told of each.
    before: HashMap<PublicKey, (&'p Peer, &'p PeerSpec)>,
    /// What the file says of them.
    file: HashMap<PublicKey, &'p Peer>,
    /// Where they are.
    whereabouts: &'p dyn Fn(&PublicKey) -> Option<SocketAddr>,
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
            roaming: true,
            masquerade: Vec::new(),
            jailed: false,
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
        let is_same = spec.endpoint == told.endpoint || spec.endpoint == (self.whereabouts)(key);
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

//! What engine, datapath and routes are told of the peers: of all of them, or of those that changed.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use ipnet::IpNet;

use super::Names;
use crate::control::{Endpoint, Peer, State};
use crate::datapath::OverlayChange;
use crate::engine::{PeerChange, PeerSpec};
use crate::netlink::Family;
use crate::wireguard::keys::PublicKey;

/// A peer as the engine takes it.
pub fn peer_spec(peer: &Peer, names: &Names) -> PeerSpec {
    let endpoints: &[SocketAddr] = match &peer.endpoint {
        None => &[],
        Some(Endpoint::Addr(addr)) => &[*addr],
        Some(Endpoint::Name { host, port }) => names.addresses(host, *port),
    };
    let mut endpoints = endpoints.iter().copied();
    PeerSpec {
        public_key: peer.public_key,
        preshared_key: peer.preshared_key.clone(),
        allowed_ips: peer.allowed_ips.clone(),
        endpoint: endpoints.next(),
        others: endpoints.collect(),
        keepalive: peer.keepalive,
        roaming: peer.roaming,
        masquerade: peer.masquerade.clone(),
    }
}

/// All peers as the engine takes them.
pub fn peer_specs(state: &State, names: &Names) -> Vec<PeerSpec> {
    state
        .peers
        .iter()
        .map(|peer| peer_spec(peer, names))
        .collect()
}

/// What becomes of these peers in the engine.
pub fn peer_change<'k>(
    state: &State,
    names: &Names,
    keys: impl IntoIterator<Item = &'k PublicKey>,
) -> PeerChange {
    let mut change = PeerChange::default();
    for key in keys {
        match state.peers.get(key) {
            Some(peer) => change.set.push(peer_spec(peer, names)),
            None => change.remove.push(*key),
        }
    }
    change
}

/// What becomes of these allowed IPs in the datapath.
pub fn overlay_change(state: &State, nets: &[IpNet]) -> OverlayChange {
    let mut change = OverlayChange::default();
    for net in nets {
        match state.peers.allowed_ips().get(net) {
            Some(number) => change.set.push((*net, *number)),
            None => change.remove.push(*net),
        }
    }
    change
}

/// The routes of one family into the TUN device. The kernel makes the connected route of each tunnel
/// address itself, but in the main table, which another table's less specific route must not hide:
/// ours comes first.
pub fn tunnel_routes(state: &State, family: Family) -> Vec<IpNet> {
    let own: BTreeSet<IpNet> = state
        .addresses()
        .iter()
        .map(|own| own.addr().into())
        .collect();
    let mut nets: BTreeSet<IpNet> = state.addresses().iter().filter_map(connected).collect();
    nets.extend(
        state
            .peers
            .allowed_ips()
            .keys()
            .filter(|net| !own.contains(net)),
    );
    nets.retain(|net| Family::of(net.addr()) == family);
    nets.into_iter().collect()
}

/// Which of these networks are routed into the TUN device, and which are not.
pub fn route_change(state: &State, nets: &[IpNet]) -> (Vec<IpNet>, Vec<IpNet>) {
    nets.iter().partition(|net| {
        let own = state.addresses();
        let is_own = own
            .iter()
            .any(|address| IpNet::from(address.addr()) == **net);
        (state.peers.allowed_ips().contains_key(net) && !is_own)
            || own
                .iter()
                .any(|address| connected(address).as_ref() == Some(*net))
    })
}

/// The network of a tunnel address, if it has one beside itself.
fn connected(address: &IpNet) -> Option<IpNet> {
    (address.prefix_len() < address.max_prefix_len()).then(|| address.trunc())
}

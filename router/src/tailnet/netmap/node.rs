//! A node of the map, with its texts understood.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::tailnet::keys::{DiscoPublic, MachinePublic, NodePublic};
use crate::tailnet::time::Timestamp;
use crate::tailnet::wire::{self, List, PeerChange, each};

/// A node's number: any 64 bits, never given to another one.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct NodeId(pub i64);

/// A node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its number.
    pub id: NodeId,
    /// Its number for people and interfaces.
    pub stable_id: String,
    /// Full name with a dot at the end.
    pub name: String,
    /// Its owner.
    pub user: i64,
    /// Its WireGuard key.
    pub key: NodePublic,
    /// When the key ends; `None` for never.
    pub key_expiry: Option<Timestamp>,
    /// Its machine.
    pub machine: Option<MachinePublic>,
    /// Its disco key; `None` for one that has never been connected, or is WireGuard alone.
    pub disco: Option<DiscoPublic>,
    /// Its own addresses.
    pub addresses: Vec<IpNet>,
    /// What is routed to it; of the node itself: its addresses and the routes that were approved.
    pub allowed_ips: Vec<IpNet>,
    /// Its underlay addresses.
    pub endpoints: Vec<SocketAddr>,
    /// Region of its home relay; 0 for none.
    pub home_derp: i64,
    /// Routes for which it is the one in charge now.
    pub primary_routes: Vec<IpNet>,
    /// Its tags.
    pub tags: Vec<String>,
    /// Connected to the server; `None` when the server does not tell.
    pub online: Option<bool>,
    /// When it was connected last.
    pub last_seen: Option<Timestamp>,
    /// The server says that its key has ended.
    pub expired: bool,
    /// An administrator has let it in.
    pub authorized: bool,
    /// Its capability version.
    pub version: i64,
    /// Its capabilities.
    pub caps: BTreeSet<String>,
    /// Our IPv4 address as it knows us.
    pub masquerade4: Option<IpAddr>,
    /// Our IPv6 address as it knows us.
    pub masquerade6: Option<IpAddr>,
    /// Speaks neither disco nor DERP.
    pub wireguard_only: bool,
    /// May open no flows to us.
    pub jailed: bool,
    /// Signed where tailnet lock asks for it; `true` where nothing is known.
    pub signed: bool,
    /// Its operating system.
    pub os: String,
    /// The name of its host.
    pub hostname: String,
    /// There is a signature for tailnet lock.
    #[serde(default)]
    pub has_signature: bool,
}

impl Node {
    /// Whether it knows what peer relays are, and how places on them are asked for.
    pub fn knows_relays(&self) -> bool {
        self.version >= 121 && self.disco.is_some()
    }

    /// Understands a node of the wire. `None` for one without number or key, which is of no use to anybody.
    pub fn from_wire(wire: &wire::Node) -> Option<Self> {
        let addresses: Vec<IpNet> = all(&wire.addresses);
        let unsigned = wire.unsigned_peer_api_only == Some(true);
        let allowed_ips = match &wire.allowed_ips {
            Some(_) if !unsigned => all(&wire.allowed_ips),
            _ => addresses.clone(),
        };
        let host = wire.hostinfo.as_ref();
        let caps = each(&wire.capabilities).cloned();
        let caps = caps.chain(wire.cap_map.iter().flat_map(|map| map.0.iter().cloned()));
        Some(Self {
            id: NodeId(wire.id?),
            stable_id: wire.stable_id.clone().unwrap_or_default(),
            name: wire.name.clone().unwrap_or_default(),
            user: wire.user.unwrap_or(0),
            key: text(&wire.key)?,
            key_expiry: time(&wire.key_expiry),
            machine: text(&wire.machine),
            disco: text(&wire.disco_key),
            addresses,
            allowed_ips,
            endpoints: all(&wire.endpoints),
            home_derp: home_derp(wire),
            primary_routes: all(&wire.primary_routes),
            tags: each(&wire.tags).cloned().collect(),
            online: wire.online,
            last_seen: time(&wire.last_seen),
            expired: wire.expired == Some(true),
            authorized: wire.machine_authorized == Some(true),
            version: wire.cap.unwrap_or(0),
            caps: caps.collect(),
            masquerade4: text(&wire.masquerade4).filter(IpAddr::is_ipv4),
            masquerade6: text(&wire.masquerade6).filter(IpAddr::is_ipv6),
            wireguard_only: wire.is_wire_guard_only == Some(true),
            jailed: wire.is_jailed == Some(true),
            signed: !unsigned,
            os: host.and_then(|host| host.os.clone()).unwrap_or_default(),
            hostname: host
                .and_then(|host| host.hostname.clone())
                .unwrap_or_default(),
            has_signature: wire
                .key_signature
                .as_ref()
                .is_some_and(|text| !text.is_empty()),
        })
    }

    /// Whether its key has ended, at `now` by the server's clock.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.expired || self.key_expiry.is_some_and(|expiry| expiry <= now)
    }

    /// Takes changes of single fields.
    pub(super) fn patch(&mut self, patch: &PeerChange) {
        if let Some(disco) = text(&patch.disco_key) {
            // All three together are how one server tells of a key that another one, or a tunnel, may know better.
            let dated = patch.online.zip(time(&patch.last_seen));
            let outdated = dated.is_some_and(|(online, last_seen)| {
                !online && self.last_seen.is_some_and(|known| last_seen <= known)
            });
            if outdated {
                return;
            }
            self.disco = Some(disco);
        }
        if let Some(region) = patch.derp_region.filter(|region| *region != 0) {
            self.home_derp = region;
        }
        if let Some(version) = patch.cap.filter(|version| *version != 0) {
            self.version = version;
        }
        if let Some(caps) = &patch.cap_map {
            self.caps = caps.0.iter().cloned().collect();
        }
        if patch.endpoints.is_some() {
            self.endpoints = all(&patch.endpoints);
        }
        if let Some(key) = text(&patch.key) {
            self.key = key;
        }
        if let Some(online) = patch.online {
            self.online = Some(online);
        }
        if let Some(last_seen) = time(&patch.last_seen) {
            self.last_seen = Some(last_seen);
        }
        if let Some(expiry) = &patch.key_expiry {
            self.key_expiry = Timestamp::parse(expiry);
        }
    }

    /// Keeps the disco key of `old`, if this is news of a node that is not connected and `old` is newer: an older
    /// key must not win over one that was learned since.
    pub(super) fn keep_newer_disco(&mut self, old: &Self) {
        let newer = |known| self.last_seen.is_none_or(|seen| seen <= known);
        if self.online != Some(true)
            && self.disco.is_some()
            && self.disco != old.disco
            && old.last_seen.is_some_and(newer)
        {
            self.disco = old.disco;
            self.last_seen = old.last_seen;
        }
    }
}

/// The home relay, in the form of today or the one before version 111.
fn home_derp(wire: &wire::Node) -> i64 {
    let legacy = wire.legacy_derp.as_deref().unwrap_or_default();
    let legacy = legacy.strip_prefix("127.3.3.40:");
    let legacy = legacy.and_then(|port| port.parse().ok());
    wire.home_derp
        .filter(|region| *region != 0)
        .or(legacy)
        .unwrap_or(0)
}

fn text<T: FromStr>(text: &Option<String>) -> Option<T> {
    text.as_ref()?.parse().ok()
}

fn time(text: &Option<String>) -> Option<Timestamp> {
    Timestamp::parse(text.as_ref()?)
}

/// What of a list is understood.
fn all<T: FromStr>(list: &Option<List<String>>) -> Vec<T> {
    each(list).filter_map(|text| text.parse().ok()).collect()
}

//! The nodes that a server knows, and what it tells of them.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedSender;

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its number.
    pub id: i64,
    /// `nodekey:`.
    pub key: String,
    /// `mkey:`.
    pub machine: String,
    /// `discokey:`.
    pub disco: String,
    /// Name without the domain.
    pub name: String,
    /// Tags.
    pub tags: Vec<String>,
    /// The version of the protocol that it speaks.
    pub version: u64,
    /// What it says of itself.
    pub hostinfo: Value,
    /// Its underlay addresses.
    pub endpoints: Vec<String>,
    /// Routes that were approved.
    pub approved: Vec<String>,
    /// Its key has ended.
    pub expired: bool,
    /// It goes when it logs out.
    pub ephemeral: bool,
    /// It has a stream.
    pub online: bool,
    /// Nobody has registered it.
    pub invented: bool,
}

impl Node {
    /// Its IPv4 and IPv6 address.
    pub fn addresses(&self) -> [String; 2] {
        let id = self.id as u32;
        [
            format!("100.{}.{}.{}", 64 + (id >> 16), id >> 8 & 255, id & 255),
            format!("fd7a:115c:a1e0::{id:x}"),
        ]
    }

    fn advertised(&self) -> Vec<String> {
        let routes = self.hostinfo["RoutableIPs"].as_array();
        let routes = routes.into_iter().flatten();
        routes
            .filter_map(|route| Some(route.as_str()?.to_owned()))
            .collect()
    }

    /// The routes that are approved and still advertised.
    fn served(&self) -> Vec<String> {
        let advertised = self.advertised();
        let approved = self.approved.iter();
        approved
            .filter(|route| advertised.contains(route))
            .cloned()
            .collect()
    }
}

/// Where frames of a stream go: the body of a map.
pub(crate) type Out = UnboundedSender<Value>;

/// All nodes.
#[derive(Default)]
pub(crate) struct Nodes {
    nodes: BTreeMap<i64, Node>,
    last: i64,
    streams: BTreeMap<i64, Out>,
    primaries: BTreeMap<String, i64>,
    filter: Option<Value>,
    derp: Option<Value>,
}

impl Nodes {
    pub(crate) fn real(&self) -> Vec<Node> {
        let real = self.nodes.values().filter(|node| !node.invented);
        real.cloned().collect()
    }

    pub(crate) fn by_key(&self, key: &str) -> Option<&Node> {
        self.nodes.values().find(|node| node.key == key)
    }

    /// Adds a node or replaces what was known of its machine.
    pub(crate) fn admit(&mut self, mut node: Node) -> i64 {
        let same = |old: &&Node| old.machine == node.machine;
        if let Some(old) = self.nodes.values().find(same) {
            node.id = old.id;
            node.approved = old.approved.clone();
        } else {
            self.last += 1;
            node.id = self.last;
        }
        let id = node.id;
        self.nodes.insert(id, node);
        self.tell(id);
        id
    }

    pub(crate) fn edit(&mut self, id: i64, edit: impl FnOnce(&mut Node)) {
        if let Some(node) = self.nodes.get_mut(&id) {
            edit(node);
            self.tell(id);
            self.elect(id);
        }
    }

    /// Puts others in charge of the routes that a node serves no more.
    fn elect(&mut self, gone: i64) {
        let serves = |node: &Node, route: &String| node.served().contains(route);
        let lost = self.primaries.iter().filter(|(route, id)| {
            let node = self.nodes.get(id);
            **id == gone && node.is_some_and(|node| !serves(node, route))
        });
        let next = lost.filter_map(|(route, _)| {
            let next = self.nodes.values().find(|node| serves(node, route))?;
            Some((route.clone(), next.id))
        });
        for (route, id) in next.collect::<Vec<_>>() {
            self.set_primary(&route, id);
        }
    }

    pub(crate) fn get(&self, id: i64) -> Option<Node> {
        self.nodes.get(&id).cloned()
    }

    pub(crate) fn named(&self, name: &str) -> Option<Node> {
        self.nodes.values().find(|node| node.name == name).cloned()
    }

    /// Adds a node that nobody has registered.
    pub(crate) fn introduce(&mut self, name: &str, key: String) -> i64 {
        self.invent(1);
        let id = self.last;
        self.edit(id, |node| {
            node.name = name.to_owned();
            node.key = key;
            node.endpoints = Vec::new();
        });
        id
    }

    pub(crate) fn remove(&mut self, id: i64) {
        self.nodes.remove(&id);
        self.streams.remove(&id);
        for other in self.streams.values() {
            let _ = other.send(json!({"PeersRemoved": [id]}));
        }
    }

    pub(crate) fn invent(&mut self, count: u32) {
        let mut nodes = Vec::new();
        for _ in 0..count {
            self.last += 1;
            let id = self.last;
            let node = Node {
                id,
                key: format!("nodekey:{:064x}", 0xabcd_0000_0000_u64 + id as u64),
                machine: format!("mkey:{:064x}", 0xabcd_0000_0000_u64 + id as u64),
                disco: format!("discokey:{:064x}", 0xabcd_0000_0000_u64 + id as u64),
                name: format!("invented-{id}"),
                tags: Vec::new(),
                version: 119,
                hostinfo: json!({"OS": "linux", "Hostname": format!("invented-{id}")}),
                endpoints: vec![format!("192.0.2.1:{}", 1024 + id % 60_000)],
                approved: Vec::new(),
                expired: false,
                ephemeral: false,
                online: id % 2 == 0,
                invented: true,
            };
            nodes.push(self.wire(&node, false));
            self.nodes.insert(id, node);
        }
        for stream in self.streams.values() {
            let _ = stream.send(json!({"PeersChanged": nodes}));
        }
    }

    pub(crate) fn approve(&mut self, id: i64, routes: &[&str]) {
        for route in routes {
            self.primaries.entry((*route).to_owned()).or_insert(id);
        }
        let routes = routes.iter().map(|route| (*route).to_owned()).collect();
        self.edit(id, |node| node.approved = routes);
    }

    pub(crate) fn set_primary(&mut self, route: &str, id: i64) {
        let old = self.primaries.insert(route.to_owned(), id);
        for id in old.into_iter().chain([id]) {
            self.tell(id);
        }
    }

    pub(crate) fn set_filter(&mut self, rules: Value) {
        self.filter = Some(rules);
        let response = json!({"PacketFilters": {"base": self.filter}});
        for stream in self.streams.values() {
            let _ = stream.send(response.clone());
        }
    }

    pub(crate) fn set_derp(&mut self, map: Value) {
        for stream in self.streams.values() {
            let _ = stream.send(json!({"DERPMap": map}));
        }
        self.derp = Some(map);
    }

    pub(crate) fn send(&self, id: i64, response: &Value) {
        if let Some(stream) = self.streams.get(&id) {
            let _ = stream.send(response.clone());
        }
    }

    /// A node's stream begins; another one that it has ends.
    pub(crate) fn begin_stream(&mut self, id: i64, out: Out) {
        self.streams.insert(id, out);
        self.set_online(id, true);
    }

    /// A node's stream has ended, if `out` is still its own.
    pub(crate) fn end_stream(&mut self, id: i64, out: &Out) {
        if self
            .streams
            .get(&id)
            .is_some_and(|now| now.same_channel(out))
        {
            self.streams.remove(&id);
            self.set_online(id, false);
        }
    }

    pub(crate) fn forget_streams(&mut self) {
        for id in std::mem::take(&mut self.streams).into_keys() {
            self.set_online(id, false);
        }
    }

    fn set_online(&mut self, id: i64, online: bool) {
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        node.online = online;
        for (other, stream) in &self.streams {
            if *other != id {
                let patch = json!({"PeersChangedPatch": [{"NodeID": id, "Online": online}]});
                let _ = stream.send(patch);
            }
        }
    }

    /// Tells everybody of a node as it is now.
    fn tell(&self, id: i64) {
        let Some(node) = self.nodes.get(&id) else {
            return;
        };
        let to_others = self.wire(node, false);
        for (other, stream) in &self.streams {
            let response = match *other == id {
                true => json!({"Node": self.wire(node, true)}),
                false => json!({"PeersChanged": [to_others]}),
            };
            let _ = stream.send(response);
        }
    }

    /// The first map of a node.
    pub(crate) fn map(&self, id: i64) -> Value {
        let node = &self.nodes[&id];
        let peers = self.nodes.values().filter(|other| other.id != id);
        let peers: Vec<Value> = peers.map(|other| self.wire(other, false)).collect();
        let everything = json!([{
            "SrcIPs": ["*"], "DstPorts": [{"IP": "*", "Ports": {"First": 0, "Last": 65535}}]
        }]);
        json!({
            "Node": self.wire(node, true),
            "Peers": peers,
            "DERPMap": self.derp.clone().unwrap_or(json!({"Regions": {}})),
            "DNSConfig": {"Domains": ["tail.test"]},
            "Domain": "test",
            "PacketFilters": {"base": self.filter.clone().unwrap_or(everything)},
            "UserProfiles": [{"ID": 1, "LoginName": "someone", "DisplayName": "Someone"}],
            "SSHPolicy": {"rules": null},
            "ControlTime": "2026-11-30T00:00:00.123456789Z",
        })
    }

    /// A node in Go's spelling.
    fn wire(&self, node: &Node, to_itself: bool) -> Value {
        let addresses: Vec<String> = node
            .addresses()
            .iter()
            .zip([32, 128])
            .map(|(address, length)| format!("{address}/{length}"))
            .collect();
        let in_charge = |route: &String| self.primaries.get(route) == Some(&node.id);
        let primary: Vec<String> = node.served().into_iter().filter(in_charge).collect();
        // Everybody else sends only to the one in charge; the node itself sees what was approved.
        let served = node.served();
        let routes = if to_itself { &served } else { &primary };
        let allowed: Vec<&String> = addresses.iter().chain(routes).collect();
        let mut wire = json!({
            "ID": node.id, "StableID": node.id.to_string(), "Name": format!("{}.tail.test.", node.name),
            "User": 1, "Key": node.key, "Machine": node.machine, "DiscoKey": node.disco,
            "Addresses": addresses, "AllowedIPs": allowed, "Hostinfo": node.hostinfo,
            "Created": "2026-11-21T06:52:13.88767373Z", "Cap": node.version, "Online": node.online,
            "MachineAuthorized": true,
        });
        if !node.endpoints.is_empty() {
            wire["Endpoints"] = json!(node.endpoints);
        }
        let home = node.hostinfo["NetInfo"]["PreferredDERP"].as_u64();
        if let Some(home) = home.filter(|home| *home > 0) {
            wire["HomeDERP"] = json!(home);
        }
        if !primary.is_empty() {
            wire["PrimaryRoutes"] = json!(primary);
        }
        if !node.tags.is_empty() {
            wire["Tags"] = json!(node.tags);
        }
        if node.expired {
            wire["Expired"] = json!(true);
        }
        wire
    }
}

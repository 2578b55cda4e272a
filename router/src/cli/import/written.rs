//! What is written of a wg-quick file.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::path::PathBuf;

use ipnet::IpNet;
use serde_json::Value;
use zeroize::Zeroizing;

use super::Note;
use super::conf::{Imported, note};
use super::values::{Interface, Peer, Secret};
use crate::config;

const TAIL: &str = "\n# A network behind this router. Repeat the block for each.\n# [[route]]\n\
                    # cidr = \"10.0.0.0/16\"\n# snat = true          # peers appear there with the \
                    router's address\n";

/// The files; `notes` are those of what was read.
pub(super) fn write(
    interface: &Interface,
    peers: Vec<Peer>,
    stem: Option<&str>,
    mut notes: Vec<Note>,
) -> Imported {
    let mut files = Files::default();
    let mut toml = head(interface, stem, &mut files, &mut notes);
    for (number, peer) in settle(peers, &mut notes).iter().enumerate() {
        peer_section(number + 1, peer, &mut toml, &mut files);
    }
    toml.push_str(TAIL);
    notes.sort_by_key(|note| note.line);
    Imported {
        toml,
        keys: files.keys,
        files: files.named,
        notes,
    }
}

#[derive(Default)]
struct Files {
    /// To be written.
    keys: Vec<(String, Zeroizing<String>)>,
    /// There already, by line.
    named: Vec<(usize, PathBuf)>,
}

impl Files {
    /// The file that holds a secret, as the configuration names it.
    fn of<K>(&mut self, secret: &Secret<K>, name: &str, expose: impl Fn(&K) -> String) -> String {
        match secret {
            Secret::Here(key) => {
                self.keys
                    .push((name.to_owned(), Zeroizing::new(expose(key))));
                quoted(name)
            }
            Secret::File(line, path) => {
                self.named.push((*line, path.into()));
                quoted(path)
            }
        }
    }
}

/// JSON's strings are TOML's too.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn list(items: impl Iterator<Item = IpNet>) -> String {
    let items: Vec<String> = items.map(|net| format!("\"{net}\"")).collect();
    format!("[{}]", items.join(", "))
}

fn head(
    interface: &Interface,
    stem: Option<&str>,
    files: &mut Files,
    notes: &mut Vec<Note>,
) -> String {
    let mut toml = "# Made by `sluice import`. docs/configuration.md explains every key.\n\n\
                    [wireguard]\n"
        .to_owned();
    if let Some(key) = &interface.private_key {
        let file = files.of(key, "private.key", |key| key.expose_base64());
        let _ = writeln!(toml, "private_key_file = {file}");
    }
    let _ = writeln!(
        toml,
        "addresses = {}",
        list(interface.addresses.iter().copied())
    );
    match interface.listen_port {
        Some(port) => {
            let _ = writeln!(toml, "listen_port = {port}");
        }
        None => notes.push(note(
            1,
            format!(
                "there is no ListenPort, so that the port is another at each start; Sluice listens \
                 on {}",
                config::DEFAULT_LISTEN_PORT
            ),
        )),
    }
    if let Some(mtu) = interface.mtu {
        let _ = writeln!(toml, "mtu = {mtu}");
    }
    // Other programs' rules may name it.
    let device = stem.filter(|stem| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_=+.-".contains(c);
        (1..16).contains(&stem.len()) && stem.chars().all(plain)
    });
    if let Some(device) = device {
        let _ = writeln!(toml, "device = {}", quoted(device));
    }
    toml
}

/// Leaves out what Sluice would refuse: names and networks that stand twice, peers without any.
fn settle(mut peers: Vec<Peer>, notes: &mut Vec<Note>) -> Vec<Peer> {
    // In WireGuard the last one gets it.
    let mut owners: HashMap<IpNet, (usize, usize)> = HashMap::new();
    for (number, peer) in peers.iter().enumerate() {
        for allowed in &peer.allowed_ips {
            let owner = owners.entry(allowed.cidr).or_default();
            *owner = (*owner).max((allowed.order, number));
        }
    }
    let mut names = HashSet::new();
    for (number, peer) in peers.iter_mut().enumerate() {
        let mut seen = HashSet::new();
        peer.allowed_ips.retain(|allowed| {
            let cidr = allowed.cidr;
            let own = owners.get(&cidr).is_some_and(|owner| owner.1 == number);
            if !own {
                let text = format!("{cidr} is given to a later peer, which has it alone");
                notes.push(note(allowed.line, text));
            }
            own && seen.insert(cidr)
        });
        peer.name.take_if(|name| !names.insert(name.clone()));
    }
    peers.retain(|peer| {
        let empty = peer.allowed_ips.is_empty();
        if empty {
            let text = "this peer has no AllowedIPs that Sluice could carry; it is left out";
            notes.push(note(peer.line, text));
        }
        !empty
    });
    peers
}

fn peer_section(number: usize, peer: &Peer, toml: &mut String, files: &mut Files) {
    let Some(public_key) = &peer.public_key else {
        return;
    };
    toml.push_str("\n[[peer]]\n");
    let mut line = |key: &str, value: String| {
        let _ = writeln!(toml, "{key} = {value}");
    };
    if let Some(name) = &peer.name {
        line("name", quoted(name));
    }
    line("public_key", format!("\"{public_key}\""));
    match &peer.preshared_key {
        Some(Secret::Here(key)) if *key.expose() == [0; 32] => {}
        Some(key) => {
            let name = format!("peer-{number}.psk");
            let file = files.of(key, &name, |key| key.expose_base64());
            line("preshared_key_file", file);
        }
        None => {}
    }
    line(
        "allowed_ips",
        list(peer.allowed_ips.iter().map(|allowed| allowed.cidr)),
    );
    if let Some(endpoint) = &peer.endpoint {
        line("endpoint", quoted(endpoint));
    }
    if let Some(keepalive) = peer.keepalive.filter(|seconds| *seconds > 0) {
        line("keepalive", keepalive.to_string());
    }
}

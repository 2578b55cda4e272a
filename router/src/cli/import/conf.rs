//! Translates the text of a wg-quick(8) file.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;
use zeroize::Zeroizing;

use super::Note;
use crate::config;
use crate::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};

/// Longest name taken from a comment, in characters.
const LONGEST_NAME: usize = 60;

/// What becomes of a file.
#[derive(Debug)]
pub(super) struct Imported {
    /// The text of `sluice.toml`.
    pub(super) toml: String,
    /// Key files by name, with their keys in base64.
    pub(super) keys: Vec<(String, Zeroizing<String>)>,
    /// What was left out or changed, by line.
    pub(super) notes: Vec<Note>,
}

#[derive(Default)]
struct Interface {
    private_key: Option<PrivateKey>,
    listen_port: Option<u16>,
    mtu: Option<u16>,
    addresses: Vec<IpNet>,
}

struct Peer {
    line: usize,
    name: Option<String>,
    public_key: Option<PublicKey>,
    preshared_key: Option<PresharedKey>,
    allowed_ips: Vec<(usize, IpNet)>,
    endpoint: Option<String>,
    keepalive: u16,
}

impl Peer {
    fn new(line: usize, name: Option<String>) -> Self {
        Self {
            line,
            name,
            public_key: None,
            preshared_key: None,
            allowed_ips: Vec::new(),
            endpoint: None,
            keepalive: 0,
        }
    }
}

/// Reads a file; `stem` is its name without the end, which wg-quick takes for the device's. The
/// error is what keeps it from being a file of wg-quick at all.
pub(super) fn read(text: &str, stem: Option<&str>) -> Result<Imported, Vec<Note>> {
    let mut reader = Reader::default();
    for (at, line) in text.lines().enumerate() {
        reader.line(at + 1, line);
    }
    let Reader {
        interface,
        peers,
        mut notes,
        mut problems,
        ..
    } = reader;
    let Some(private_key) = &interface.private_key else {
        problems.push(note(
            1,
            "there is no [Interface] with a PrivateKey; is it a file of wg-quick?",
        ));
        return Err(problems);
    };
    if !problems.is_empty() {
        return Err(problems);
    }
    let mut keys = vec![(
        "private.key".to_owned(),
        secret(private_key.expose_base64()),
    )];
    let mut toml = head(&interface, stem, &mut notes);
    for (number, peer) in settle(peers, &mut notes).iter().enumerate() {
        peer_section(number + 1, peer, &mut toml, &mut keys);
    }
    toml.push_str(TAIL);
    notes.sort_by_key(|note| note.line);
    Ok(Imported { toml, keys, notes })
}

const TAIL: &str = "\n# A network behind this router. Repeat the block for each.\n# [[route]]\n\
                    # cidr = \"10.0.0.0/16\"\n# snat = true          # peers appear there with the \
                    router's address\n";

fn note(line: usize, text: impl Into<String>) -> Note {
    Note {
        line,
        text: text.into(),
    }
}

fn secret(key: String) -> Zeroizing<String> {
    Zeroizing::new(key)
}

/// JSON's strings are TOML's too.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

fn list(items: impl Iterator<Item = IpNet>) -> String {
    let items: Vec<String> = items.map(|net| format!("\"{net}\"")).collect();
    format!("[{}]", items.join(", "))
}

fn head(interface: &Interface, stem: Option<&str>, notes: &mut Vec<Note>) -> String {
    let mut toml = "# Made by `sluice import`. docs/configuration.md explains every key.\n\n\
                    [wireguard]\nprivate_key_file = \"private.key\"\n"
        .to_owned();
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
    let mut owners: HashMap<IpNet, usize> = HashMap::new();
    for (number, peer) in peers.iter().enumerate() {
        owners.extend(peer.allowed_ips.iter().map(|(_, cidr)| (*cidr, number)));
    }
    let mut names = HashSet::new();
    for (number, peer) in peers.iter_mut().enumerate() {
        let mut seen = HashSet::new();
        peer.allowed_ips.retain(|(line, cidr)| {
            let own = owners.get(cidr) == Some(&number);
            if !own {
                let text = format!("{cidr} is given to a later peer, which has it alone");
                notes.push(note(*line, text));
            }
            own && seen.insert(*cidr)
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

fn peer_section(
    number: usize,
    peer: &Peer,
    toml: &mut String,
    keys: &mut Vec<(String, Zeroizing<String>)>,
) {
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
    if let Some(key) = &peer.preshared_key {
        let file = format!("peer-{number}.psk");
        line("preshared_key_file", quoted(&file));
        keys.push((file, secret(key.expose_base64())));
    }
    line(
        "allowed_ips",
        list(peer.allowed_ips.iter().map(|(_, cidr)| *cidr)),
    );
    if let Some(endpoint) = &peer.endpoint {
        line("endpoint", quoted(endpoint));
    }
    if peer.keepalive > 0 {
        line("keepalive", peer.keepalive.to_string());
    }
}

#[derive(Default)]
struct Reader {
    section: Section,
    /// The comment of the line before.
    comment: Option<String>,
    interface: Interface,
    peers: Vec<Peer>,
    notes: Vec<Note>,
    problems: Vec<Note>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Section {
    #[default]
    None,
    Interface,
    Peer,
}

impl Reader {
    fn line(&mut self, at: usize, line: &str) {
        let (words, comment) = match line.split_once('#') {
            Some((words, comment)) => (words.trim(), named(comment)),
            None => (line.trim(), None),
        };
        let before = std::mem::replace(&mut self.comment, comment);
        if words.is_empty() {
            // A comment right after `[Peer]` names it too.
            if let (Some(peer), Some(name)) = (self.peers.last_mut(), &self.comment)
                && peer.line + 1 == at
                && peer.name.is_none()
            {
                peer.name = Some(name.clone());
            }
            return;
        }
        if words.starts_with('[') {
            self.section = match words.to_ascii_lowercase().as_str() {
                "[interface]" => Section::Interface,
                "[peer]" => {
                    let name = self.comment.take().or(before);
                    self.peers.push(Peer::new(at, name));
                    Section::Peer
                }
                _ => {
                    let text = format!("{words} is no section of wg-quick");
                    self.problems.push(note(at, text));
                    Section::None
                }
            };
            return;
        }
        let Some((key, value)) = words.split_once('=') else {
            let text = "there is no `Key = value` here; is it a file of wg-quick?";
            self.problems.push(note(at, text));
            return;
        };
        let (key, value) = (key.trim(), value.trim());
        let lower = key.to_ascii_lowercase();
        let done = match (self.section, self.peers.last_mut()) {
            (Section::Interface, _) => self.interface.entry(at, &lower, value, &mut self.notes),
            (Section::Peer, Some(peer)) => peer.entry(at, &lower, value, &mut self.notes),
            _ => Err("stands before [Interface]".to_owned()),
        };
        if let Err(text) = done {
            self.problems.push(note(at, format!("{key}: {text}")));
        }
    }
}

/// A name out of a comment, as people and other programs write it.
fn named(comment: &str) -> Option<String> {
    let mut name = comment.trim_start_matches('#').trim();
    for start in ["BEGIN_PEER ", "Client ", "Name ", "friendly_name", "Name:"] {
        name = name.strip_prefix(start).map_or(name, str::trim_start);
    }
    name = name.trim_start_matches(['=', ':']).trim();
    let whole = !name.is_empty()
        && name.chars().count() <= LONGEST_NAME
        && !name.contains(char::is_control)
        && name != "*"
        // A line that was commented out, or a network.
        && !name.contains(['=', '/']);
    whole.then(|| name.to_owned())
}

impl Interface {
    fn entry(
        &mut self,
        at: usize,
        key: &str,
        value: &str,
        notes: &mut Vec<Note>,
    ) -> Result<(), String> {
        let mut left_out = |text: &str| notes.push(note(at, text));
        match key {
            "privatekey" => self.private_key = Some(parsed(value)?),
            "listenport" => self.listen_port = Some(number(value)?).filter(|port| *port > 0),
            "address" => {
                for text in items(value) {
                    let net = network(text)?;
                    let taken = |own: &IpNet| own.addr().is_ipv4() == net.addr().is_ipv4();
                    if self.addresses.iter().any(taken) {
                        left_out(&format!(
                            "{text} is left out: Sluice has one address of each family"
                        ));
                    } else {
                        self.addresses.push(net);
                    }
                }
            }
            "mtu" => {
                let mtu = number(value)?;
                if config::MTU.contains(&mtu) {
                    self.mtu = Some(mtu);
                } else {
                    left_out(&format!(
                        "an MTU of {mtu} is left out: Sluice's are {} to {}",
                        config::MTU.start(),
                        config::MTU.end()
                    ));
                }
            }
            "dns" => left_out("DNS is left out: a router leaves this machine's resolver alone"),
            "table" if value.eq_ignore_ascii_case("auto") => {}
            "table" => left_out(
                "Table is left out: Sluice keeps the routes to its peers in a table of its own",
            ),
            "fwmark" => left_out(
                "FwMark is left out: Sluice has a mark of its own that keeps its packets out of \
                 the tunnel",
            ),
            "saveconfig" if value.eq_ignore_ascii_case("false") => {}
            "saveconfig" => left_out("SaveConfig is left out: Sluice never writes its own file"),
            "preup" | "postup" | "predown" | "postdown" => left_out(command(value)),
            _ => return Err("is no key of [Interface] in a file of wg-quick".to_owned()),
        }
        Ok(())
    }
}

/// What becomes of a command's purpose.
fn command(value: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| value.contains(word));
    if has(&["MASQUERADE", "masquerade", "SNAT", "snat"]) {
        "the command is left out: a [[route]] with snat = true translates sources"
    } else if has(&["ip_forward", "forwarding", "FORWARD", "forward"]) {
        "the command is left out: Sluice lets packets through between the tunnel and its routes"
    } else if has(&["TCPMSS", "maxseg"]) {
        "the command is left out: Sluice sets the MSS by itself"
    } else if has(&["ip route", "ip -4 route", "ip -6 route", "ip rule"]) {
        "the command is left out: Sluice routes allowed_ips into the tunnel and each [[route]] out \
         of it"
    } else {
        "the command is left out: Sluice runs none; if it is still needed, have systemd run it \
         (ExecStartPost= of sluice.service)"
    }
}

impl Peer {
    fn entry(
        &mut self,
        at: usize,
        key: &str,
        value: &str,
        notes: &mut Vec<Note>,
    ) -> Result<(), String> {
        match key {
            "publickey" => self.public_key = Some(parsed(value)?),
            "presharedkey" => {
                let key: PresharedKey = parsed(value)?;
                self.preshared_key = Some(key).filter(|key| *key.expose() != [0; 32]);
            }
            "allowedips" => {
                for text in items(value) {
                    let net = network(text)?;
                    if net.prefix_len() == 0 {
                        notes.push(note(
                            at,
                            format!(
                                "{text} is left out: Sluice leads networks into the tunnel, not \
                                 the whole internet"
                            ),
                        ));
                    } else {
                        self.allowed_ips.push((at, net.trunc()));
                    }
                }
            }
            "endpoint" => match config::parse_endpoint(value) {
                Ok(_) => self.endpoint = Some(value.to_owned()),
                Err(error) => notes.push(note(at, format!("Endpoint is left out: {error}"))),
            },
            "persistentkeepalive" if value.eq_ignore_ascii_case("off") => self.keepalive = 0,
            "persistentkeepalive" => self.keepalive = number(value)?,
            _ => return Err("is no key of [Peer] in a file of wg-quick".to_owned()),
        }
        Ok(())
    }
}

fn items(value: &str) -> impl Iterator<Item = &str> {
    value
        .split(',')
        .map(str::trim)
        .filter(|text| !text.is_empty())
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(value: &str) -> Result<T, String> {
    value.parse().map_err(|error: T::Err| error.to_string())
}

fn number(value: &str) -> Result<u16, String> {
    value
        .parse()
        .map_err(|_| format!("{value:?} is no number from 0 to 65535"))
}

/// An address alone stands for itself.
fn network(text: &str) -> Result<IpNet, String> {
    let net: Result<IpNet, _> = text.parse();
    let net = net.or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    net.map_err(|_| format!("{text:?} is no address and no network"))
}

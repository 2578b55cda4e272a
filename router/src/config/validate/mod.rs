//! Judges the raw form and builds the validated one.

mod cloud;
mod drain;
mod external;
mod http;
mod limits;
mod marks;
mod overlap;
mod peers;
mod policy;
mod routes;
mod tailnet;
mod via;
mod without_file;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ipnet::IpNet;

pub(super) use policy::Source as RuleSource;
pub(super) use without_file::{is_named, judge_peers, policy_of};

use super::problem::Problems;
use super::raw::{Datapath, Raw, Wireguard};
use super::section::{At, Text, TextOr, quoted, within};
use super::{
    Config, DEFAULT_DEVICE, DEFAULT_LISTEN_PORT, DatapathMode, HttpPages, Interface, Local, MTU,
    Mtu, Origin, Place, Places, default_socket, keyfile, net,
};
use crate::control::{Denied, Identity, Policy, Snapshot};
use crate::wireguard::keys::PrivateKey;

/// Longest path of a local socket in bytes: `sun_path` of unix(7) with the final zero is 108.
const LONGEST_SOCKET: usize = 107;
/// More workers than any machine that routes has cores.
const MOST_WORKERS: i64 = 256;
/// Longest name of a router or peer in characters.
const LONGEST_NAME: usize = 63;

/// The validated configuration. `None` only if there are problems.
pub(super) fn config(raw: &Raw<'_>, file: &Path, problems: &mut Problems<'_>) -> Option<Config> {
    let directory = file.parent().unwrap_or(Path::new(""));
    let name = raw.name.as_ref().map(|text| name(text, "name", problems));
    let tunnel = raw.wireguard.as_ref();
    let tunnel = tunnel.map(|raw| Tunnel::new(raw, directory, problems));
    if raw.tailnet.is_some()
        && let Some(tunnel) = &raw.wireguard
    {
        tailnet::identity_is_the_tailnets(tunnel, problems);
    }
    let addresses: &[At<IpNet>] = tunnel.as_ref().map_or(&[], |tunnel| &tunnel.addresses);
    let device = tunnel
        .as_ref()
        .map_or(DEFAULT_DEVICE, |tunnel| &tunnel.device);
    let own_key = tunnel
        .as_ref()
        .and_then(|tunnel| tunnel.private_key.as_ref());
    let interfaces = Interfaces::new(&raw.datapath, device, problems);
    let socket = match &raw.socket {
        Some(text) => socket(text, problems),
        None => Some(default_socket(device)),
    };
    let http = match &raw.metrics.listen {
        Some(text) => http::listen(text, problems).map(Some),
        None => Some(None),
    };
    let http_hosts = http::hosts(raw.metrics.hosts.as_ref(), problems);
    let datapath = mode(
        raw.datapath.mode.as_ref(),
        "datapath.mode",
        [
            ("auto", DatapathMode::Auto),
            ("ebpf", DatapathMode::Ebpf),
            ("kernel", DatapathMode::Kernel),
        ],
        problems,
    );
    let uplink_guard = mode(
        raw.datapath.uplink_guard.as_ref(),
        "datapath.uplink_guard",
        [("off", false), ("auto", true)],
        problems,
    );
    let external_addresses =
        external::addresses(raw.datapath.external_addresses.as_ref(), problems);
    let denied = mode(
        raw.denied.as_ref(),
        "policy.denied",
        [("drop", Denied::Drop), ("reject", Denied::Reject)],
        problems,
    );
    let limits = limits::limits(&raw.datapath, problems);
    let marks = marks::marks(&raw.datapath, problems);
    let patience = drain::patience(&raw.drain, problems);

    let peers = peers::peers(&raw.peers, own_key, addresses, directory, problems);
    let (routes, auto_routes) = routes::routes(&raw.routes, problems);
    let keeps_sources =
        routes.iter().any(|route| !route.value.snat) || auto_routes.iter().any(|route| !route.snat);
    let cloud = cloud::cloud(&raw.cloud, addresses, keeps_sources, problems);
    let joined = raw.tailnet.as_ref();
    let listen_port = tunnel.as_ref().map(|tunnel| tunnel.listen_port);
    let joined =
        joined.map(|raw| tailnet::settings(raw, &routes, listen_port, directory, problems));
    via::check(&peers, &routes, addresses, problems);
    overlap::check(&peers, &via::claims(&routes), addresses, problems);
    let (rules, sources) = policy::rules(&raw.rules, &peers, problems);

    let position = |at: usize| Place {
        file: u16::try_from(problems.lines.layer(at)).unwrap_or(u16::MAX),
        position: problems.lines.position(at),
    };
    let origin = Origin(Some(Arc::new(Places {
        files: problems.lines.files().cloned().collect(),
        addresses: addresses.iter().map(|a| position(a.at)).collect(),
        uplink: raw.datapath.uplink.as_ref().map(|text| position(text.at)),
        subnet: interfaces.subnet.iter().map(|i| position(i.at)).collect(),
        allowed_ips: peers.iter().map(|peer| peer.places(position)).collect(),
    })));
    let tunnel = tunnel?;
    let mtu = match (&joined, tunnel.mtu) {
        // No client of a tailnet takes more.
        (Some(_), Mtu::Auto) => Mtu::Fixed(*MTU.start()),
        (_, mtu) => mtu,
    };
    let identity = match joined {
        Some(_) => None,
        None => Some(Identity {
            private_key: tunnel.private_key?,
            addresses: tunnel.addresses.into_iter().map(|a| a.value).collect(),
        }),
    };
    Some(Config {
        identity,
        cloud,
        auto_routes,
        user_data: Vec::new(),
        tailnet: joined,
        local: Local {
            name: name.unwrap_or_else(|| crate::cloud::name::of(None)),
            listen_port: tunnel.listen_port,
            mtu,
            device: tunnel.device,
            datapath: datapath.unwrap_or(DatapathMode::Auto),
            uplink: interfaces.uplink,
            uplink_guard: uplink_guard.unwrap_or(false),
            subnet: interfaces.subnet.into_iter().map(|i| i.value).collect(),
            external_addresses,
            workers: interfaces.workers,
            limits,
            offloads: raw.offloads,
            marks,
            patience,
            http: http?,
            http_pages: HttpPages::All,
            http_hosts,
            socket: socket?,
        },
        snapshot: Snapshot {
            peers: peers
                .into_iter()
                .map(peers::Checked::into_peer)
                .collect::<Option<_>>()?,
            routes: routes.into_iter().map(|route| route.value).collect(),
            policy: Policy {
                rules,
                denied: denied.unwrap_or_default(),
            },
        },
        sources,
        origin,
    })
}

/// `[wireguard]`, checked; with defaults in the place of what was wrong.
struct Tunnel {
    private_key: Option<PrivateKey>,
    addresses: Vec<At<IpNet>>,
    listen_port: u16,
    mtu: Mtu,
    device: String,
}

impl Tunnel {
    fn new(raw: &Wireguard<'_>, directory: &Path, problems: &mut Problems<'_>) -> Self {
        let private_key = raw.private_key_file.as_ref().and_then(|text| {
            let make = "sluice genkey";
            secret(
                text,
                "wireguard.private_key_file",
                directory,
                make,
                problems,
            )
        });
        let listen_port = raw.listen_port.and_then(|number| {
            let key = "wireguard.listen_port";
            within(number, key, 1..=65535, "UDP port", problems)
        });
        let mtu = raw.mtu.as_ref().and_then(|value| mtu(value, problems));
        let device = raw
            .device
            .as_ref()
            .and_then(|text| interface(text, "wireguard.device", problems).map(|name| name.value));
        Self {
            private_key,
            addresses: tunnel_addresses(raw, problems),
            listen_port: listen_port.unwrap_or(DEFAULT_LISTEN_PORT),
            mtu: mtu.unwrap_or(Mtu::Auto),
            device: device.unwrap_or_else(|| DEFAULT_DEVICE.to_owned()),
        }
    }
}

fn mtu(value: &TextOr<'_, At<i64>>, problems: &mut Problems<'_>) -> Option<Mtu> {
    const KEY: &str = "wireguard.mtu";
    match value {
        TextOr::Text(word) if word.value == "auto" => Some(Mtu::Auto),
        TextOr::Text(word) => {
            let message = format!(
                "{} is no tunnel MTU; write \"auto\" or a number without quotes",
                quoted(&word.value)
            );
            problems.add(word.at, KEY, message);
            None
        }
        TextOr::Other(number) => {
            let range = i64::from(*MTU.start())..=i64::from(*MTU.end());
            within(*number, KEY, range, "tunnel MTU", problems).map(Mtu::Fixed)
        }
    }
}

fn tunnel_addresses(raw: &Wireguard<'_>, problems: &mut Problems<'_>) -> Vec<At<IpNet>> {
    const KEY: &str = "wireguard.addresses";
    let mut found: Vec<At<IpNet>> = Vec::new();
    let Some(list) = &raw.addresses else {
        return found;
    };
    if list.value.is_empty() {
        let message = "an empty list; write one address, e.g. [\"100.64.0.1/24\"]";
        problems.add(list.at, KEY, message);
    }
    for text in &list.value {
        let shown = quoted(&text.value);
        let address = net::cidr(&text.value).and_then(|address| {
            if let Some(what) = net::never_routed(&IpNet::from(address.addr())) {
                return Err(format!("{shown} is {what}, no address for a tunnel"));
            }
            usable_host(address).map_err(|mend| {
                format!("{shown} is the network, not an address in it; write e.g. \"{mend}\"")
            })
        });
        let value = match address {
            Ok(value) => value,
            Err(message) => {
                problems.add(text.at, KEY, message);
                continue;
            }
        };
        let same_family =
            |other: &&At<IpNet>| other.value.addr().is_ipv4() == value.addr().is_ipv4();
        if let Some(first) = found.iter().find(same_family) {
            let family = if value.addr().is_ipv4() {
                "IPv4"
            } else {
                "IPv6"
            };
            let message = format!(
                "{shown} is a second {family} address beside {}; a router has one of each family, \
                 remove one",
                first.value
            );
            problems.add(text.at, KEY, message);
            continue;
        }
        found.push(At { value, at: text.at });
    }
    found
}

/// The address itself unless it is the first of its network, which stands for the network (in IPv6
/// the subnet-router anycast address). The error is the next one.
fn usable_host(address: IpNet) -> Result<IpNet, IpNet> {
    let spare = address.max_prefix_len() - address.prefix_len();
    if spare < 2 || address.addr() != address.network() {
        return Ok(address);
    }
    let next = match address.addr() {
        IpAddr::V4(v4) => IpAddr::from((u32::from(v4) + 1).to_be_bytes()),
        IpAddr::V6(v6) => IpAddr::from((u128::from(v6) + 1).to_be_bytes()),
    };
    Err(IpNet::new(next, address.prefix_len()).unwrap_or(address))
}

/// The interfaces and workers of `[datapath]`, checked.
struct Interfaces {
    uplink: Interface,
    subnet: Vec<At<String>>,
    workers: Option<usize>,
}

impl Interfaces {
    fn new(raw: &Datapath<'_>, device: &str, problems: &mut Problems<'_>) -> Self {
        let ours = |text: &Text<'_>, key: &'static str, problems: &mut Problems<'_>| {
            let name = interface(text, key, problems)?;
            if name.value != device {
                return Some(name);
            }
            let message = format!(
                "{} is the tunnel device itself; name a network card",
                quoted(device)
            );
            problems.add(text.at, key, message);
            None
        };
        let uplink = match &raw.uplink {
            None => Interface::Auto,
            Some(text) if text.value == "auto" => Interface::Auto,
            Some(text) => ours(text, "datapath.uplink", problems)
                .map_or(Interface::Auto, |name| Interface::Named(name.value)),
        };
        let mut subnet: Vec<At<String>> = Vec::new();
        match &raw.subnet {
            None => {}
            Some(TextOr::Text(word)) if word.value == "auto" => {}
            Some(TextOr::Text(word)) => {
                let shown = quoted(&word.value);
                let message = format!("{shown} must be a list; write [{shown}], or \"auto\"");
                problems.add(word.at, "datapath.subnet", message);
            }
            Some(TextOr::Other(list)) => {
                if list.value.is_empty() {
                    let message = "an empty list; write \"auto\", or name at least one interface";
                    problems.add(list.at, "datapath.subnet", message);
                }
                for text in &list.value {
                    let Some(name) = ours(text, "datapath.subnet", problems) else {
                        continue;
                    };
                    if subnet.iter().any(|other| other.value == name.value) {
                        let message = format!("{} is listed twice", quoted(&name.value));
                        problems.add(text.at, "datapath.subnet", message);
                    } else {
                        subnet.push(name);
                    }
                }
            }
        }
        let workers = match &raw.workers {
            None => None,
            Some(TextOr::Text(word)) if word.value == "auto" => None,
            Some(TextOr::Text(word)) => {
                let message = format!(
                    "{} is no number of threads; write \"auto\" or a number without quotes",
                    quoted(&word.value)
                );
                problems.add(word.at, "datapath.workers", message);
                None
            }
            Some(TextOr::Other(number)) => within(
                *number,
                "datapath.workers",
                1..=MOST_WORKERS,
                "number of threads",
                problems,
            ),
        };
        Self {
            uplink,
            subnet,
            workers,
        }
    }
}

fn interface(
    text: &Text<'_>,
    key: &'static str,
    problems: &mut Problems<'_>,
) -> Option<At<String>> {
    match net::interface(&text.value) {
        Ok(()) => Some(At {
            value: text.value.clone().into_owned(),
            at: text.at,
        }),
        Err(message) => {
            problems.add(text.at, key, message);
            None
        }
    }
}

fn socket(text: &Text<'_>, problems: &mut Problems<'_>) -> Option<PathBuf> {
    let path = Path::new(text.value.as_ref());
    let shown = quoted(&text.value);
    let message = if !path.is_absolute() || text.value.contains(char::is_control) {
        format!(
            "{shown} is no absolute path; write one that starts with /, e.g. \"/run/sluice/sluice0.sock\""
        )
    } else if text.value.len() > LONGEST_SOCKET {
        format!("{shown} is longer than a socket's path may be; keep to {LONGEST_SOCKET} bytes")
    } else {
        return Some(path.to_owned());
    };
    problems.add(text.at, "api.socket", message);
    None
}

/// A name for display: on one line, not endless.
fn name(text: &Text<'_>, key: &'static str, problems: &mut Problems<'_>) -> String {
    let length = text.value.chars().count();
    let fault = if text.value.trim() != text.value || text.value.contains(char::is_control) {
        Some("begins or ends with a blank, or holds a control character; remove it".to_owned())
    } else if !(1..=LONGEST_NAME).contains(&length) {
        Some(format!(
            "has {length} characters; write 1 to {LONGEST_NAME}"
        ))
    } else {
        None
    };
    if let Some(fault) = fault {
        problems.add(text.at, key, format!("{} {fault}", quoted(&text.value)));
    }
    text.value.clone().into_owned()
}

/// One of a few words.
fn mode<T: Copy, const N: usize>(
    text: Option<&Text<'_>>,
    key: &'static str,
    words: [(&str, T); N],
    problems: &mut Problems<'_>,
) -> Option<T> {
    let text = text?;
    let found = words.iter().find(|(word, _)| *word == text.value);
    if found.is_none() {
        let list = words.map(|(word, _)| quoted(word)).join(", ");
        let message = format!("{} is none of {list}", quoted(&text.value));
        problems.add(text.at, key, message);
    }
    found.map(|(_, value)| *value)
}

/// Reads the secret in the file that `text` names.
fn secret<K>(
    text: &Text<'_>,
    key: &'static str,
    directory: &Path,
    make: &str,
    problems: &mut Problems<'_>,
) -> Option<K>
where
    K: std::str::FromStr<Err = crate::wireguard::keys::KeyError>,
{
    let written = text.value.as_ref();
    let message = if written.is_empty() || written.contains(char::is_control) {
        format!(
            "{} is no file name; write the path of the file that holds the key",
            quoted(written)
        )
    } else if looks_like_key(written) {
        // Not shown: it is most likely the secret itself.
        "this looks like the key itself, and a secret does not stand in this file; put it in a \
         file of its own with mode 600 and name that here"
            .to_owned()
    } else {
        match keyfile::read(&directory.join(written), make) {
            Ok(secret) => return Some(secret),
            Err(message) => message,
        }
    };
    problems.add(text.at, key, message);
    None
}

/// Whether a text could be a key, whole or with a character lost or gained.
fn looks_like_key(text: &str) -> bool {
    let text = text.trim();
    (40..=48).contains(&text.len())
        && text
            .trim_end_matches('=')
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+/".contains(&b))
        && (text.ends_with('=') || !Path::new(text).is_absolute())
}

impl peers::Checked {
    fn places(&self, position: impl Fn(usize) -> Place) -> Vec<Place> {
        self.allowed_ips
            .iter()
            .map(|net| position(net.at))
            .collect()
    }
}

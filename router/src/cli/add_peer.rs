//! `sluice add-peer`: a peer's configuration in one command.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow, bail};
use ipnet::IpNet;
use zeroize::Zeroizing;

use super::keys::warn_if_world_accessible;
use crate::config::{self, Config};
use crate::files::{Existing, write_atomic};
use crate::runtime;
use crate::wireguard::keys::{PrivateKey, PublicKey};

/// How many addresses are tried before the tunnel network counts as full.
const MOST_TRIES: u32 = 1 << 17;

/// Arguments of `sluice add-peer`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The peer's name, for status and rules.
    name: String,
    /// The configuration file; the peer is appended to it.
    #[arg(long, value_name = "FILE", default_value = super::DEFAULT_CONFIG)]
    config: PathBuf,
    /// Where the peer reaches this router, as HOST:PORT.
    #[arg(long, value_name = "HOST:PORT")]
    endpoint: Option<String>,
    /// The peer's public key, if it has made its own key pair already.
    #[arg(long, value_name = "KEY")]
    public_key: Option<PublicKey>,
}

/// Adds the peer and prints its configuration.
pub(super) fn add_peer(args: &Args) -> anyhow::Result<()> {
    if let Some(text) = &args.endpoint {
        config::parse_endpoint(text).map_err(|error| anyhow!("--endpoint: {error}"))?;
    }
    let (private, public) = match args.public_key {
        Some(public) => (None, public),
        None => {
            let private = PrivateKey::generate()?;
            let public = private.public();
            (Some(private), public)
        }
    };
    let (config, addresses) = append(&args.config, &args.name, public)?;
    warn_if_world_accessible();
    eprintln!(
        "added peer {:?} to {}; its own configuration:",
        args.name,
        args.config.display()
    );
    if config.snapshot.routes.is_empty() {
        eprintln!(
            "there is no [[route]] yet, so that its AllowedIPs hold this router alone: give it the \
             networks there too once they have a [[route]]"
        );
    }
    // What the router will do where this runs, most often the router itself.
    let mtu = runtime::try_mtu(&config).map_or(config::DEFAULT_MTU, |(mtu, _)| mtu);
    let text = client(
        &config,
        mtu,
        private.as_ref(),
        &addresses,
        args.endpoint.as_deref(),
    );
    super::print(&text)
}

/// Appends the peer to the file at `path`; yields the configuration before, and the peer's
/// addresses.
fn append(path: &Path, name: &str, key: PublicKey) -> anyhow::Result<(Config, Vec<IpNet>)> {
    if name.contains(char::is_control) {
        bail!("{name:?} cannot be the name of a peer; write it without control characters");
    }
    // A link stays a link: what it points to is replaced.
    let path = &path
        .canonicalize()
        .with_context(|| path.display().to_string())?;
    let directory = path
        .parent()
        .ok_or_else(|| anyhow!("{} has no directory", path.display()))?;
    // Two at a time would take the same address, and one would lose its peer.
    let lock = File::open(directory).with_context(|| directory.display().to_string())?;
    lock.lock()
        .with_context(|| format!("lock {}", directory.display()))?;

    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let config = config::parse_layered(&text, path)?;
    if config.tailnet.is_some() {
        bail!(
            "{} joins a tailnet, so the router's key and addresses are not known here; write the \
             [[peer]] by hand, with addresses that the tailnet does not have, and give the peer the \
             public key of `sluice status`",
            path.display()
        );
    }
    let peers = &config.snapshot.peers;
    let taken = peers
        .iter()
        .find(|peer| peer.name.as_deref() == Some(name) || peer.public_key == key);
    if let Some(peer) = taken {
        let same = if peer.public_key == key {
            "this key"
        } else {
            "this name"
        };
        bail!(
            "{} has a peer with {same} already; choose another, or remove it",
            path.display()
        );
    }
    let addresses = free_addresses(&config)?;
    let quoted: Vec<String> = addresses.iter().map(|net| format!("\"{net}\"")).collect();
    let newline = if text.is_empty() || text.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    let escaped = name.replace('\\', r"\\").replace('"', "\\\"");
    let longer = format!(
        "{text}{newline}\n[[peer]]\nname = \"{escaped}\"\npublic_key = \"{key}\"\nallowed_ips = \
         [{}]\n",
        quoted.join(", ")
    );
    config::parse_layered(&longer, path)?;
    let mode = fs::metadata(path)?.permissions().mode() & 0o7777;
    write_atomic(path, longer.as_bytes(), mode, Existing::Replace)
        .with_context(|| format!("write {}", path.display()))?;
    Ok((config, addresses))
}

/// The next free address in each of the router's tunnel networks. A router with a single address
/// (/32, /128) says nothing of the network: then the /24 or /64 around it is taken.
fn free_addresses(config: &Config) -> anyhow::Result<Vec<IpNet>> {
    let nets = config
        .snapshot
        .peers
        .iter()
        .flat_map(|peer| &peer.allowed_ips);
    let mut used: HashSet<IpAddr> = config.addresses().iter().map(IpNet::addr).collect();
    let mut wide: Vec<&IpNet> = Vec::new();
    for net in nets {
        if net.prefix_len() == net.max_prefix_len() {
            used.insert(net.addr());
        } else {
            wide.push(net);
        }
    }
    let free = |own: &IpNet| {
        let network = network_of(own);
        let candidate = (1..MOST_TRIES)
            .map_while(|n| nth(&network, n))
            .find(|ip| !used.contains(ip) && !wide.iter().any(|net| net.contains(ip)));
        candidate.map(IpNet::from).with_context(|| {
            format!("{network} has no free address; give the router a wider network in `wireguard.addresses`")
        })
    };
    config.addresses().iter().map(free).collect()
}

fn network_of(own: &IpNet) -> IpNet {
    let usual = if own.addr().is_ipv4() { 24 } else { 64 };
    if own.prefix_len() == own.max_prefix_len() {
        IpNet::new(own.addr(), usual).map_or(*own, |net| net.trunc())
    } else {
        own.trunc()
    }
}

/// The address `n` after the first of `network`; none past its end, or at an IPv4 broadcast address.
fn nth(network: &IpNet, n: u32) -> Option<IpAddr> {
    let ip = match network.network() {
        IpAddr::V4(first) => IpAddr::V4(u32::from(first).checked_add(n)?.into()),
        IpAddr::V6(first) => IpAddr::V6(u128::from(first).checked_add(n.into())?.into()),
    };
    let broadcast = ip.is_ipv4() && network.prefix_len() < 31 && ip == network.broadcast();
    (network.contains(&ip) && !broadcast).then_some(ip)
}

/// The peer's configuration for wg-quick(8).
fn client(
    config: &Config,
    mtu: u16,
    private: Option<&PrivateKey>,
    addresses: &[IpNet],
    endpoint: Option<&str>,
) -> Zeroizing<String> {
    let local = &config.local;
    let list = |nets: &mut dyn Iterator<Item = IpNet>| {
        let nets: Vec<String> = nets.map(|net| net.to_string()).collect();
        nets.join(", ")
    };
    let mut out = Zeroizing::new(String::with_capacity(1024));
    out.push_str("[Interface]\n");
    let _ = match private {
        Some(key) => writeln!(
            out,
            "PrivateKey = {}",
            Zeroizing::new(key.expose_base64()).as_str()
        ),
        None => writeln!(out, "# PrivateKey = the one that the peer made"),
    };
    let _ = writeln!(out, "Address = {}", list(&mut addresses.iter().copied()));
    if mtu != config::DEFAULT_MTU {
        let _ = writeln!(out, "MTU = {mtu}");
    }
    let router = config.addresses().iter().map(|net| IpNet::from(net.addr()));
    let routes = config.snapshot.routes.iter().map(|route| route.cidr);
    let endpoint = match endpoint {
        Some(endpoint) => format!("Endpoint = {endpoint}"),
        None => format!(
            "# Endpoint = the router's public name or address:{}",
            local.listen_port
        ),
    };
    let _ = write!(
        out,
        "\n[Peer]\n# {}\nPublicKey = {}\nAllowedIPs = {}\n{endpoint}\nPersistentKeepalive = 25\n",
        local.name,
        config
            .private_key()
            .map_or_else(String::new, |key| key.public().to_string()),
        list(&mut router.chain(routes)),
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{EXAMPLE, directory_with_keys};

    const BOB: &str = "3p7bfXt9wbTTW2HC7OQ1Nz+DQ8hbeGdNrfx+FG+IK08=";

    fn place(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = directory_with_keys();
        let path = directory.path().join("sluice.toml");
        fs::write(&path, text).unwrap();
        (directory, path)
    }

    #[test]
    fn a_peer_is_appended_with_the_next_free_addresses() {
        let (_directory, path) = place(EXAMPLE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let key = PrivateKey::from_bytes([5; 32]).public();
        let (before, addresses) = append(&path, "phone \"two\"", key).unwrap();
        // .1 is the router's, .2 and .3 are taken.
        let shown: Vec<String> = addresses.iter().map(IpNet::to_string).collect();
        assert_eq!(shown, ["100.64.0.4/32", "fd7a:93b1:6c00::3/128"]);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with(EXAMPLE), "comments stay");
        let after = config::load(&path).unwrap();
        let added = after.snapshot.peers.last().unwrap();
        assert_eq!(added.name.as_deref(), Some("phone \"two\""));
        assert_eq!((added.public_key, &added.allowed_ips), (key, &addresses));
        assert_eq!(after.snapshot.peers.len(), before.snapshot.peers.len() + 1);
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o640
        );
    }

    #[test]
    fn what_would_not_be_valid_is_not_written() {
        let (_directory, path) = place(EXAMPLE);
        let fresh = PrivateKey::from_bytes([5; 32]).public();
        for (name, key, says) in [
            ("laptop", fresh, "has a peer with this name"),
            ("phone", BOB.parse().unwrap(), "has a peer with this key"),
            ("*", fresh, "rule"),
            ("a\nb", fresh, "control characters"),
            ("x\"\n[[peer]]\nname = \"y", fresh, "control characters"),
        ] {
            let error = append(&path, name, key).unwrap_err().to_string();
            assert!(error.contains(says), "{name:?}: {error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), EXAMPLE);
        }
    }

    #[test]
    fn a_full_network_is_told() {
        let (_directory, path) = place(
            "[wireguard]\nprivate_key_file = \"private.key\"\naddresses = [\"100.64.0.1/30\"]\n",
        );
        let key = |n| PrivateKey::from_bytes([n; 32]).public();
        assert_eq!(
            append(&path, "a", key(1)).unwrap().1[0].to_string(),
            "100.64.0.2/32"
        );
        let error = append(&path, "b", key(2)).unwrap_err().to_string();
        assert!(
            error.contains("100.64.0.0/30 has no free address"),
            "{error}"
        );
    }

    #[test]
    fn a_single_address_stands_for_its_usual_network() {
        let own = |text: &str| network_of(&text.parse().unwrap()).to_string();
        assert_eq!(own("100.64.7.9/32"), "100.64.7.0/24");
        assert_eq!(own("fd00::7:9/128"), "fd00::/64");
        assert_eq!(own("100.64.7.9/10"), "100.64.0.0/10");
    }

    #[test]
    fn the_peers_configuration_is_whole() {
        let (_directory, path) = place(EXAMPLE);
        let config = config::load(&path).unwrap();
        let key = PrivateKey::from_bytes([5; 32]);
        let addresses = ["100.64.0.4/32".parse().unwrap()];
        let text = client(
            &config,
            1420,
            Some(&key),
            &addresses,
            Some("vpn.example.com:51820"),
        );
        let expected = format!(
            "[Interface]\nPrivateKey = {}\nAddress = 100.64.0.4/32\n\n[Peer]\n# vpc-router-1\n\
             PublicKey = {}\nAllowedIPs = 100.64.0.1/32, fd7a:93b1:6c00::1/128, 10.0.0.0/16, \
             10.128.0.0/16, 10.96.0.0/12\nEndpoint = vpn.example.com:51820\n\
             PersistentKeepalive = 25\n",
            key.expose_base64(),
            config.private_key().unwrap().public()
        );
        assert_eq!(*text, expected);
        let text = client(&config, 1360, None, &addresses, None);
        let lines = ["# PrivateKey", "# Endpoint", "\nMTU = 1360\n"];
        assert!(lines.iter().all(|line| text.contains(line)), "{}", *text);
    }
}

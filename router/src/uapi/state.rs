//! What a `get` shows.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};

/// A device with its peers, as configured and as they are now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Its private key, if it has one.
    pub private_key: Option<PrivateKey>,
    /// UDP port, host byte order; 0 for none.
    pub listen_port: u16,
    /// Firewall mark; 0 for none.
    pub fwmark: u32,
    /// The peers in order.
    pub peers: Vec<PeerState>,
}

/// A peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerState {
    /// Static public key.
    pub public_key: PublicKey,
    /// Preshared key, if it has one.
    pub preshared_key: Option<PresharedKey>,
    /// Where it was last authenticated from, or its configured endpoint.
    pub endpoint: Option<SocketAddr>,
    /// When the last handshake completed.
    pub last_handshake: Option<SystemTime>,
    /// Underlay bytes sent to it.
    pub tx_bytes: u64,
    /// Underlay bytes received from it.
    pub rx_bytes: u64,
    /// Interval of persistent keepalives in seconds; 0 for none.
    pub keepalive: u16,
    /// CIDRs that are its own.
    pub allowed_ips: Vec<IpNet>,
}

/// Bytes of text for a peer without its allowed IPs, and for one of these, at most.
const PEER: usize = 480;
const CIDR: usize = 64;

impl State {
    /// The answer to a `get`, without the line that ends it. It holds the private key.
    pub fn to_text(&self) -> Zeroizing<String> {
        let cidrs: usize = self.peers.iter().map(|peer| peer.allowed_ips.len()).sum();
        // Room for all: growing would leave copies of secrets behind.
        let room = PEER * (1 + self.peers.len()) + CIDR * cidrs;
        let mut out = Zeroizing::new(String::with_capacity(room));
        if let Some(key) = &self.private_key {
            hex(&mut out, "private_key", key.expose());
        }
        let mut line = |key: &str, value: &dyn std::fmt::Display| {
            let _ = writeln!(out, "{key}={value}");
        };
        if self.listen_port != 0 {
            line("listen_port", &self.listen_port);
        }
        if self.fwmark != 0 {
            line("fwmark", &self.fwmark);
        }
        for peer in &self.peers {
            peer.write(&mut out);
        }
        out
    }
}

impl PeerState {
    fn write(&self, out: &mut String) {
        hex(out, "public_key", &self.public_key.0);
        let none = [0; 32];
        let preshared_key = self.preshared_key.as_ref().map(PresharedKey::expose);
        hex(out, "preshared_key", preshared_key.unwrap_or(&none));
        let since = self
            .last_handshake
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let since = since.unwrap_or_default();
        let mut line = |key: &str, value: &dyn std::fmt::Display| {
            let _ = writeln!(out, "{key}={value}");
        };
        line("protocol_version", &1);
        if let Some(endpoint) = &self.endpoint {
            line("endpoint", endpoint);
        }
        line("last_handshake_time_sec", &since.as_secs());
        line("last_handshake_time_nsec", &since.subsec_nanos());
        line("tx_bytes", &self.tx_bytes);
        line("rx_bytes", &self.rx_bytes);
        line("persistent_keepalive_interval", &self.keepalive);
        for cidr in &self.allowed_ips {
            line("allowed_ip", cidr);
        }
    }
}

fn hex(out: &mut String, key: &str, bytes: &[u8; 32]) {
    out.push_str(key);
    out.push('=');
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            out.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
        }
    }
    out.push('\n');
}

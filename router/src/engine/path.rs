//! The ways to a peer.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use crate::wireguard::keys::PublicKey;

/// Number of a relay; whoever carries datagrams to relays gives it a meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelayId(pub u32);

/// The way to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// By UDP, to this address.
    Udp(SocketAddr),
    /// By UDP to a node at this address, which carries on what is behind a header with this number (24 bits).
    PeerRelay(SocketAddr, u32),
    /// Through a relay, which knows the peer by its public key.
    Relay(RelayId),
}

impl Path {
    /// The peer's own address, if that is the way.
    pub fn endpoint(self) -> Option<SocketAddr> {
        match self {
            Self::Udp(endpoint) => Some(endpoint),
            Self::PeerRelay(..) | Self::Relay(_) => None,
        }
    }

    /// Where our sockets send, and behind a header with which number, if it is by UDP.
    pub(crate) fn by_udp(self) -> Option<(SocketAddr, Option<u32>)> {
        match self {
            Self::Udp(to) => Some((to, None)),
            Self::PeerRelay(to, number) => Some((to, Some(number))),
            Self::Relay(_) => None,
        }
    }
}

const RELAY: &str = "relay:";
const NUMBER: &str = ":vni:";

/// An address, with `:vni:` and a number behind it (as Tailscale writes it), or `relay:` and a number.
impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp(endpoint) => endpoint.fmt(f),
            Self::PeerRelay(relay, number) => write!(f, "{relay}{NUMBER}{number}"),
            Self::Relay(RelayId(relay)) => write!(f, "{RELAY}{relay}"),
        }
    }
}

/// A text that is no path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a path is an address with a port, that with {NUMBER} and a number, or {RELAY} and a number"
)]
pub struct PathError;

impl FromStr for Path {
    type Err = PathError;

    fn from_str(text: &str) -> Result<Self, PathError> {
        let path = match text.strip_prefix(RELAY) {
            Some(relay) => relay.parse().ok().map(|relay| Self::Relay(RelayId(relay))),
            None => match text.rsplit_once(NUMBER) {
                Some((at, number)) => at
                    .parse()
                    .ok()
                    .zip(number.parse().ok())
                    .map(|(at, number)| Self::PeerRelay(at, number)),
                None => text.parse().ok().map(Self::Udp),
            },
        };
        path.ok_or(PathError)
    }
}

/// Datagrams for a peer that go through a relay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relayed {
    /// The relay.
    pub relay: RelayId,
    /// The peer.
    pub peer: PublicKey,
    /// WireGuard messages, one behind the other.
    pub bytes: Box<[u8]>,
    /// Length in bytes of each but the last, which may be shorter.
    pub size: usize,
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_path_reads_as_it_is_written() {
        for text in [
            "192.0.2.1:7",
            "[2001:db8::1]:51820",
            "relay:12",
            "192.0.2.1:7:vni:16777215",
            "[2001:db8::1]:7:vni:1",
        ] {
            assert_eq!(text.parse::<Path>().unwrap().to_string(), text);
        }
        for text in ["", "relay:", "relay:-1", "192.0.2.1", "relay:4294967296"] {
            assert_eq!(text.parse::<Path>(), Err(PathError), "{text}");
        }
    }
}

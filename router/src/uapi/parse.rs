//! The text of requests, taken apart as it comes.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::{Errno, Refusal};
use crate::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};

/// Longest line in bytes, as wireguard-go has it.
const LINE: usize = 64 << 10;

/// What a client asks.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Show everything.
    Get,
    /// Change this.
    Set(Set),
    /// Something that cannot be carried out; the client gets the error number.
    Refused(Refusal),
    /// No request at all: nothing that follows can be understood, so the connection is closed.
    Closed(Refusal),
}

/// A `set`: what shall change of the device, then of peers, in the order of the text.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Set {
    /// A new private key; the inner `None` takes it away.
    pub private_key: Option<Option<PrivateKey>>,
    /// A new UDP port, host byte order; 0: the system chooses.
    pub listen_port: Option<u16>,
    /// A new firewall mark; 0: none.
    pub fwmark: Option<u32>,
    /// Whether all peers go first.
    pub replace_peers: bool,
    /// The peers, each perhaps more than once.
    pub peers: Vec<PeerSet>,
}

/// What shall change of a peer.
#[derive(Debug, PartialEq, Eq)]
pub struct PeerSet {
    /// Whose key it is.
    pub public_key: PublicKey,
    /// Whether it goes.
    pub remove: bool,
    /// Whether nothing is done if there is no such peer.
    pub update_only: bool,
    /// A new preshared key; the inner `None` takes it away.
    pub preshared_key: Option<Option<PresharedKey>>,
    /// A new endpoint.
    pub endpoint: Option<SocketAddr>,
    /// A new interval of persistent keepalives in seconds; 0: none.
    pub keepalive: Option<u16>,
    /// What happens to its allowed IPs, in order.
    pub allowed_ips: Vec<AllowedIp>,
}

/// A change of a peer's allowed IPs. No CIDR has host bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowedIp {
    /// All go.
    Clear,
    /// One comes, wherever it was before.
    Add(IpNet),
    /// One goes, if it is this peer's.
    Remove(IpNet),
}

impl PeerSet {
    /// Nothing changes.
    pub fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            remove: false,
            update_only: false,
            preshared_key: None,
            endpoint: None,
            keepalive: None,
            allowed_ips: Vec::new(),
        }
    }
}

/// Takes bytes as they come from a connection, and yields requests.
pub struct Parser {
    /// The beginning of a line.
    line: Zeroizing<Vec<u8>>,
    phase: Phase,
    /// Finds the number of an interface that the scope of a link-local address names.
    scope: fn(&str) -> Option<u32>,
}

enum Phase {
    /// A request is to begin.
    Idle,
    /// After `get=1`.
    Get,
    /// Within a `set`.
    Set(Box<Set>),
    /// After an error within a request: its rest is passed over.
    Refused,
    /// The connection is of no more use.
    Closed,
}

impl Parser {
    /// A parser at the start of a connection; `scope` tells the index of an interface from its name.
    pub fn new(scope: fn(&str) -> Option<u32>) -> Self {
        Self {
            line: Zeroizing::new(Vec::with_capacity(256)),
            phase: Phase::Idle,
            scope,
        }
    }

    /// Takes bytes from the front of `input` until a request is whole. `None`: all are taken, and
    /// more are needed.
    pub fn next(&mut self, input: &mut &[u8]) -> Option<Request> {
        loop {
            let end = input.iter().position(|byte| *byte == b'\n');
            let (bytes, rest) = input.split_at(end.unwrap_or(input.len()));
            if self.line.len() + bytes.len() > LINE {
                *input = &[];
                return self.close(Errno::Io, "a line of more than 64 KiB");
            }
            self.line.extend_from_slice(bytes);
            *input = rest.get(1..).unwrap_or_default();
            end?;
            let line = std::mem::replace(&mut self.line, Zeroizing::new(Vec::with_capacity(256)));
            if let Some(request) = self.line(&line) {
                return Some(request);
            }
        }
    }

    /// The connection has ended. What had begun is not carried out.
    pub fn finish(&mut self) -> Option<Request> {
        match std::mem::replace(&mut self.phase, Phase::Closed) {
            Phase::Set(_) => Some(Request::Refused(Refusal::new(
                Errno::Protocol,
                "the connection ended before the empty line that ends a `set`",
            ))),
            _ => None,
        }
    }

    fn close(&mut self, errno: Errno, reason: &str) -> Option<Request> {
        let known = !matches!(self.phase, Phase::Closed);
        self.phase = Phase::Closed;
        known.then(|| Request::Closed(Refusal::new(errno, reason)))
    }

    fn line(&mut self, line: &[u8]) -> Option<Request> {
        let end = line.is_empty();
        match &mut self.phase {
            Phase::Idle => {
                match line {
                    b"get=1" => self.phase = Phase::Get,
                    b"set=1" => self.phase = Phase::Set(Box::default()),
                    _ => return self.close(Errno::Protocol, "neither `get=1` nor `set=1`"),
                }
                None
            }
            Phase::Get => {
                self.phase = if end { Phase::Idle } else { Phase::Refused };
                Some(if end {
                    Request::Get
                } else {
                    let reason = "a `get` is followed by an empty line";
                    Request::Refused(Refusal::new(Errno::Invalid, reason))
                })
            }
            Phase::Set(set) if end => {
                let set = std::mem::take(&mut **set);
                self.phase = Phase::Idle;
                Some(Request::Set(set))
            }
            Phase::Set(set) => {
                let refusal = set.line(line, self.scope).err()?;
                self.phase = Phase::Refused;
                Some(Request::Refused(refusal))
            }
            Phase::Refused => {
                if end {
                    self.phase = Phase::Idle;
                }
                None
            }
            Phase::Closed => None,
        }
    }
}

impl Set {
    fn line(&mut self, line: &[u8], scope: fn(&str) -> Option<u32>) -> Result<(), Refusal> {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let pair = str::from_utf8(line).ok().and_then(|l| l.split_once('='));
        let Some((key, value)) = pair else {
            return Err(Refusal::new(Errno::Protocol, "a line is no `key=value`"));
        };
        if key == "public_key" {
            let key = hex(value).map(PublicKey);
            self.peers.push(PeerSet::new(valid("public_key", key)?));
            return Ok(());
        }
        match self.peers.last_mut() {
            None => self.device(key, value),
            Some(peer) => peer.line(key, value, scope),
        }
    }

    fn device(&mut self, key: &str, value: &str) -> Result<(), Refusal> {
        match key {
            "private_key" => {
                let bytes = Zeroizing::new(valid(key, hex(value))?);
                let some = *bytes != [0; 32];
                self.private_key = Some(some.then(|| PrivateKey::from_bytes(*bytes)));
            }
            "listen_port" => self.listen_port = Some(valid(key, number(value))?),
            "fwmark" => self.fwmark = Some(valid(key, number(value))?),
            "replace_peers" => self.replace_peers = valid(key, only_true(value))?,
            _ => return Err(unknown("a device", key)),
        }
        Ok(())
    }
}

impl PeerSet {
    fn line(
        &mut self,
        key: &str,
        value: &str,
        scope: fn(&str) -> Option<u32>,
    ) -> Result<(), Refusal> {
        match key {
            "remove" => self.remove = valid(key, only_true(value))?,
            "update_only" => self.update_only = valid(key, only_true(value))?,
            "preshared_key" => {
                let bytes = Zeroizing::new(valid(key, hex(value))?);
                let some = *bytes != [0; 32];
                self.preshared_key = Some(some.then(|| PresharedKey::from_bytes(*bytes)));
            }
            "endpoint" => self.endpoint = Some(valid(key, endpoint(value, scope))?),
            "persistent_keepalive_interval" => self.keepalive = Some(valid(key, number(value))?),
            "replace_allowed_ips" => {
                valid(key, only_true(value))?;
                self.allowed_ips.push(AllowedIp::Clear);
            }
            "allowed_ip" => {
                let change: fn(IpNet) -> AllowedIp = match value.starts_with('-') {
                    true => AllowedIp::Remove,
                    false => AllowedIp::Add,
                };
                let cidr = value.strip_prefix('-').unwrap_or(value).parse::<IpNet>();
                self.allowed_ips
                    .push(change(valid(key, cidr.ok())?.trunc()));
            }
            "protocol_version" => {
                valid(key, (value == "1").then_some(()))?;
            }
            _ => return Err(unknown("a peer", key)),
        }
        Ok(())
    }
}

fn valid<T>(key: &str, value: Option<T>) -> Result<T, Refusal> {
    value.ok_or_else(|| Refusal::new(Errno::Invalid, format!("the value of `{key}` is no such")))
}

fn unknown(what: &str, key: &str) -> Refusal {
    // A client's own words, but not many of them.
    let key: String = key.chars().take(40).collect();
    Refusal::new(Errno::Invalid, format!("{what} has no key {key:?}"))
}

fn only_true(value: &str) -> Option<bool> {
    (value == "true").then_some(true)
}

/// 32 bytes in 64 hexadecimal digits.
fn hex(text: &str) -> Option<[u8; 32]> {
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let mut bytes = [0; 32];
    if pairs.len() != bytes.len() || !rest.is_empty() {
        return None;
    }
    let digit = |d: u8| char::from(d).to_digit(16);
    for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = (digit(*high)? << 4 | digit(*low)?) as u8;
    }
    Some(bytes)
}

/// Decimal digits alone: Rust would take a sign too.
fn number<N: std::str::FromStr>(text: &str) -> Option<N> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok())?
}

/// An address and a port; the scope of a link-local IPv6 address may be a number or a name.
fn endpoint(text: &str, scope: fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    if let Some((address, rest)) = text.strip_prefix('[').and_then(|t| t.split_once('%')) {
        let (zone, port) = rest.split_once("]:")?;
        let address: Ipv6Addr = address.parse().ok()?;
        let zone = number(zone).or_else(|| scope(zone))?;
        let port = number(port)?;
        return Some(SocketAddrV6::new(address, port, 0, zone).into());
    }
    let address: SocketAddr = text.parse().ok()?;
    // The same peer, whichever way it is written.
    let ip = match address.ip() {
        IpAddr::V6(ip) => ip.to_canonical(),
        v4 => v4,
    };
    Some(SocketAddr::new(ip, address.port()))
}

#[cfg(test)]
mod tests;

//! `[[peer]]`: keys, allowed IPs, endpoints.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use ipnet::IpNet;

use super::super::net;
use super::super::problem::{NOWHERE, Problems};
use super::super::raw;
use super::super::section::{At, Text, quoted, within};
use crate::control::{Endpoint, Peer};
use crate::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};

const ALLOWED_IPS: &str = "peer.allowed_ips";
const ENDPOINT: &str = "peer.endpoint";

/// A peer, checked by itself.
pub(super) struct Checked {
    pub(super) at: usize,
    pub(super) name: Option<String>,
    pub(super) allowed_ips: Vec<At<IpNet>>,
    pub(super) endpoint: Option<At<Endpoint>>,
    public_key: Option<PublicKey>,
    preshared_key: Option<PresharedKey>,
    keepalive: Option<u16>,
}

impl Checked {
    /// How a sentence about another place names this peer.
    pub(super) fn label(&self, problems: &Problems<'_>) -> String {
        match (&self.name, self.public_key) {
            (Some(name), _) => format!("peer {}{}", quoted(name), problems.place(self.at)),
            (None, Some(key)) if self.at == NOWHERE => format!("peer {key}"),
            (None, _) => format!("the peer of line {}", problems.line(self.at)),
        }
    }

    /// A peer that stands in no file, judged as if it did. It may be without allowed IPs: they may
    /// have gone to another peer, or be still to come. And an endpoint that is not the file's tells
    /// where the peer is, for now: that is nothing to hold against CIDRs, and may have a zone.
    pub(super) fn without_file(
        peer: &Peer,
        file: Option<&Peer>,
        addresses: &[At<IpNet>],
        problems: &mut Problems<'_>,
    ) -> Self {
        let text = |written: String| At {
            value: Cow::Owned(written),
            at: NOWHERE,
        };
        let nets: Vec<Text<'_>> = peer
            .allowed_ips
            .iter()
            .map(|net| text(net.to_string()))
            .collect();
        let is_files = file.is_some_and(|file| file.endpoint == peer.endpoint);
        let endpoint = match &peer.endpoint {
            Some(Endpoint::Addr(address)) if !is_files => {
                if let Err(why) = net::usable(*address) {
                    problems.add(NOWHERE, ENDPOINT, format!("\"{address}\" {why}"));
                }
                None
            }
            Some(Endpoint::Addr(address)) => Some(text(address.to_string())),
            Some(Endpoint::Name { host, port }) => Some(text(format!("{host}:{port}"))),
            None => None,
        };
        Self {
            at: NOWHERE,
            name: peer.name.clone(),
            public_key: Some(peer.public_key),
            preshared_key: peer.preshared_key.clone(),
            allowed_ips: allowed_ips(&nets, addresses, problems),
            endpoint: self::endpoint(endpoint.as_ref(), addresses, problems),
            keepalive: peer.keepalive,
        }
    }

    /// The validated peer; `None` if its key was wrong.
    pub(super) fn into_peer(self) -> Option<Peer> {
        Some(Peer {
            name: self.name,
            public_key: self.public_key?,
            preshared_key: self.preshared_key,
            allowed_ips: self.allowed_ips.into_iter().map(|net| net.value).collect(),
            endpoint: self.endpoint.map(|endpoint| endpoint.value),
            keepalive: self.keepalive,
            roaming: true,
            masquerade: Vec::new(),
            jailed: false,
        })
    }
}

/// Checks every peer, and that names and keys are there once.
pub(super) fn peers(
    raw: &[raw::Peer<'_>],
    own: Option<&PrivateKey>,
    addresses: &[At<IpNet>],
    directory: &Path,
    problems: &mut Problems<'_>,
) -> Vec<Checked> {
    let own = own.map(PrivateKey::public);
    let mut keys: HashMap<PublicKey, usize> = HashMap::with_capacity(raw.len());
    let mut names: HashMap<&str, usize> = HashMap::new();
    let mut checked = Vec::with_capacity(raw.len());
    for peer in raw {
        if let Some(name) = &peer.name
            && let Some(first) = names.insert(&name.value, name.at)
        {
            let line = problems.line(first);
            let shown = quoted(&name.value);
            let message = format!("{shown} is the name of the peer of line {line} too; change one");
            problems.add(name.at, "peer.name", message);
        }
        let key = peer.public_key.as_ref();
        let key = key.and_then(|text| Some((text, public_key(text, own, problems)?)));
        if let Some((text, key)) = key
            && let Some(first) = keys.insert(key, text.at)
        {
            let line = problems.line(first);
            let message = format!(
                "\"{key}\" is the key of the peer of line {line} too; a peer stands once, with all \
                 its allowed IPs"
            );
            problems.add(text.at, "peer.public_key", message);
        }
        checked.push(Checked {
            at: peer.at,
            name: peer.name.as_ref().map(|text| name(text, problems)),
            public_key: key.map(|(_, key)| key),
            preshared_key: preshared_key(peer, directory, problems),
            allowed_ips: listed_ips(peer, addresses, problems),
            endpoint: endpoint(peer.endpoint.as_ref(), addresses, problems),
            keepalive: peer.keepalive.and_then(|seconds| {
                let what = "interval in seconds";
                within(seconds, "peer.keepalive", 0..=65535, what, problems)
                    .filter(|seconds| *seconds != 0)
            }),
        });
    }
    checked
}

/// A peer's name. Rules use names beside CIDRs, so one must not look like the other.
fn name(text: &Text<'_>, problems: &mut Problems<'_>) -> String {
    if text.value == "*" || net::cidr(&text.value).is_ok() {
        let message = format!(
            "{} would mean something else in a rule; give the peer a name in letters",
            quoted(&text.value)
        );
        problems.add(text.at, "peer.name", message);
    }
    super::name(text, "peer.name", problems)
}

fn public_key(
    text: &Text<'_>,
    own: Option<PublicKey>,
    problems: &mut Problems<'_>,
) -> Option<PublicKey> {
    let message = match text.value.parse::<PublicKey>() {
        Ok(key) if own == Some(key) => {
            "this is the router's own public key; write the peer's, as `sluice pubkey` prints it \
             from the peer's private key"
                .to_owned()
        }
        Ok(key) if low_order(&key) => format!(
            "\"{key}\" is a point of low order, with which no handshake is secret; write the key \
             that `sluice pubkey` prints from the peer's private key"
        ),
        Ok(key) => return Some(key),
        Err(error) => format!("{} is no key: {error}", quoted(&text.value)),
    };
    problems.add(text.at, "peer.public_key", message);
    None
}

/// Whether a shared secret with this key would be zero whatever the private key (RFC 7748 section
/// 6.1), in any encoding: the points 0, 1 and -1, those of order 8, and p and p + 1 that stand for
/// 0 and 1. The top bit is not part of a coordinate.
fn low_order(key: &PublicKey) -> bool {
    const fn near_p(low: u8) -> [u8; 32] {
        let mut bytes = [0xff; 32];
        bytes[0] = low;
        bytes[31] = 0x7f;
        bytes
    }
    const fn small(low: u8) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[0] = low;
        bytes
    }
    const POINTS: [[u8; 32]; 7] = [
        small(0),
        small(1),
        near_p(0xec),
        near_p(0xed),
        near_p(0xee),
        [
            0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f,
            0xc4, 0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16,
            0x5f, 0x49, 0xb8, 0x00,
        ],
        [
            0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83,
            0xef, 0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd,
            0xd0, 0x9f, 0x11, 0x57,
        ],
    ];
    let mut bytes = key.0;
    bytes[31] &= 0x7f;
    POINTS.contains(&bytes)
}

fn preshared_key(
    peer: &raw::Peer<'_>,
    directory: &Path,
    problems: &mut Problems<'_>,
) -> Option<PresharedKey> {
    let text = peer.preshared_key_file.as_ref()?;
    let key = "peer.preshared_key_file";
    let secret: PresharedKey = super::secret(text, key, directory, "sluice genpsk", problems)?;
    if *secret.expose() == [0; 32] {
        let message = "a key of zeros is the same as none; make one with `sluice genpsk`, or \
                       remove this line";
        problems.add(text.at, key, message);
        return None;
    }
    Some(secret)
}

fn listed_ips(
    peer: &raw::Peer<'_>,
    addresses: &[At<IpNet>],
    problems: &mut Problems<'_>,
) -> Vec<At<IpNet>> {
    let Some(list) = &peer.allowed_ips else {
        return Vec::new();
    };
    if list.value.is_empty() {
        let message = "an empty list, so that nothing reaches this peer; write its own addresses, \
                       e.g. [\"100.64.0.2/32\"]";
        problems.add(list.at, ALLOWED_IPS, message);
    }
    allowed_ips(&list.value, addresses, problems)
}

fn allowed_ips(
    texts: &[Text<'_>],
    addresses: &[At<IpNet>],
    problems: &mut Problems<'_>,
) -> Vec<At<IpNet>> {
    let mut found = Vec::with_capacity(texts.len());
    for text in texts {
        match allowed_ip(&text.value, addresses, problems) {
            Ok(value) => found.push(At { value, at: text.at }),
            Err(message) => problems.add(text.at, ALLOWED_IPS, message),
        }
    }
    found
}

fn allowed_ip(
    text: &str,
    addresses: &[At<IpNet>],
    problems: &Problems<'_>,
) -> Result<IpNet, String> {
    let net = net::cidr(text)?;
    let shown = quoted(text);
    if net != net.trunc() {
        // Most often one address of a peer, copied with the length of the network it is in.
        return Err(format!(
            "{shown} has host bits set; write \"{}\" for that one address or \"{}\" for its network",
            IpNet::from(net.addr()),
            net.trunc()
        ));
    }
    if net.prefix_len() == 0 {
        return Err(format!(
            "{shown} would take everything that this router and the networks behind it send into \
             the tunnel; write the peer's own addresses, e.g. \"100.64.0.2/32\""
        ));
    }
    if let Some(what) = net::never_routed(&net) {
        return Err(format!(
            "{shown} is {what}, which no tunnel carries; remove it"
        ));
    }
    let own = addresses
        .iter()
        .find(|own| IpNet::from(own.value.addr()) == net);
    if let Some(own) = own {
        return Err(format!(
            "{shown} is the router's own tunnel address{}; write the peer's",
            problems.place(own.at)
        ));
    }
    Ok(net)
}

fn endpoint(
    text: Option<&Text<'_>>,
    addresses: &[At<IpNet>],
    problems: &mut Problems<'_>,
) -> Option<At<Endpoint>> {
    let text = text?;
    let parsed = net::endpoint(&text.value).and_then(|endpoint| {
        if let Endpoint::Addr(address) = &endpoint {
            let inside = addresses
                .iter()
                .find(|own| own.value.contains(&address.ip()));
            if let Some(own) = inside {
                return Err(format!(
                    "{} lies in the tunnel network {}{}; write the peer's address outside the \
                     tunnel, or remove this line if the peer finds the router",
                    quoted(&text.value),
                    own.value.trunc(),
                    problems.place(own.at)
                ));
            }
        }
        Ok(endpoint)
    });
    match parsed {
        Ok(value) => Some(At { value, at: text.at }),
        Err(message) => {
            problems.add(text.at, ENDPOINT, message);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use boringtun::x25519::{PublicKey as Point, StaticSecret};
    use proptest::prelude::*;

    fn yields_zero(private: [u8; 32], public: [u8; 32]) -> bool {
        let shared = StaticSecret::from(private).diffie_hellman(&Point::from(public));
        !shared.was_contributory()
    }

    proptest! {
        /// The list is right in both directions, also for coordinates near its points.
        #[test]
        fn low_order_points_are_those_that_yield_zero(
            private: [u8; 32],
            mut public: [u8; 32],
            fill in prop_oneof![Just(None), Just(Some(0u8)), Just(Some(0xff))],
            low: u8,
            top: bool,
        ) {
            if let Some(fill) = fill {
                public = [fill; 32];
                public[0] = low;
                public[31] = fill & 0x7f | u8::from(top) << 7;
            }
            prop_assert_eq!(low_order(&PublicKey(public)), yields_zero(private, public));
        }
    }

    #[test]
    fn points_of_order_eight_are_known() {
        for text in [
            "4Ot6fDtBuK4WVuP68Z/EatoJjeucMrH9hmIFFl9JuAA=",
            "X5yVvKNQjCSx0LFVnIPvWwREXMRYHI6G2CJO3dCfEVc=",
        ] {
            let key: PublicKey = text.parse().unwrap();
            assert!(low_order(&key) && yields_zero([3; 32], key.0));
        }
    }
}

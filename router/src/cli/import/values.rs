//! The values of a wg-quick file, section by section.

use std::net::IpAddr;

use ipnet::IpNet;
use zeroize::Zeroizing;

use super::Note;
use super::conf::note;
use crate::config;
use crate::wireguard::keys::{PresharedKey, PrivateKey, PublicKey};

/// Where a secret is.
#[derive(Debug)]
pub(super) enum Secret<K> {
    /// In the file of wg-quick.
    Here(K),
    /// In a file of its own, named in a line; the path is absolute.
    File(usize, String),
}

/// A key of a section, and what stands behind it.
#[derive(Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) line: usize,
    /// In lower case.
    pub(super) key: &'a str,
    /// Of a key of wg, without blanks.
    pub(super) value: &'a str,
}

#[derive(Default)]
pub(super) struct Interface {
    pub(super) private_key: Option<Secret<PrivateKey>>,
    pub(super) listen_port: Option<u16>,
    pub(super) mtu: Option<u16>,
    pub(super) addresses: Vec<IpNet>,
    /// PostUp, by line.
    pub(super) commands: Vec<(usize, Zeroizing<String>)>,
}

pub(super) struct Peer {
    pub(super) line: usize,
    pub(super) name: Option<String>,
    pub(super) public_key: Option<PublicKey>,
    /// One of zeros is none, and takes away another.
    pub(super) preshared_key: Option<Secret<PresharedKey>>,
    pub(super) allowed_ips: Vec<AllowedIp>,
    pub(super) endpoint: Option<String>,
    pub(super) keepalive: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct AllowedIp {
    pub(super) line: usize,
    /// Of two peers with the same CIDR, the one that got it later has it.
    pub(super) order: usize,
    pub(super) cidr: IpNet,
}

impl Interface {
    /// A key that wg-quick takes for itself.
    pub(super) fn of_wg_quick(
        &mut self,
        Entry { line, key, value }: Entry<'_>,
        notes: &mut Vec<Note>,
    ) -> Result<(), String> {
        let mut left_out = |text: &str| notes.push(note(line, text));
        match key {
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
            "saveconfig" if value.eq_ignore_ascii_case("false") => {}
            "saveconfig" => left_out("SaveConfig is left out: Sluice never writes its own file"),
            "postup" => self.commands.push((line, Zeroizing::new(value.to_owned()))),
            _ => left_out(super::command::purpose(value)),
        }
        Ok(())
    }

    /// A key of wg.
    pub(super) fn entry(
        &mut self,
        Entry { line, key, value }: Entry<'_>,
        notes: &mut Vec<Note>,
    ) -> Result<(), String> {
        match key {
            "privatekey" => {
                // Zeros are none; as a private key they would be clamped into one.
                let zero = *parsed::<PresharedKey>(value)?.expose() == [0; 32];
                self.private_key = if zero {
                    None
                } else {
                    Some(Secret::Here(parsed(value)?))
                };
            }
            "listenport" => self.listen_port = Some(number(value)?).filter(|port| *port > 0),
            "fwmark" if matches!(value, "0" | "0x0") || value.eq_ignore_ascii_case("off") => {}
            "fwmark" => notes.push(note(
                line,
                "FwMark is left out: Sluice has a mark of its own that keeps its packets out of \
                 the tunnel",
            )),
            _ => return Err("is no key of [Interface] in a file of wg-quick".to_owned()),
        }
        Ok(())
    }
}

impl Peer {
    pub(super) fn new(line: usize, name: Option<String>) -> Self {
        Self {
            line,
            name,
            public_key: None,
            preshared_key: None,
            allowed_ips: Vec::new(),
            endpoint: None,
            keepalive: None,
        }
    }

    /// Takes over what a later block of the same peer says.
    pub(super) fn replace(&mut self, later: Self) {
        self.allowed_ips = later.allowed_ips;
        self.name = self.name.take().or(later.name);
        self.preshared_key = later.preshared_key.or(self.preshared_key.take());
        self.endpoint = later.endpoint.or(self.endpoint.take());
        self.keepalive = later.keepalive.or(self.keepalive);
    }

    /// A key of wg; for `order` see [`AllowedIp`].
    pub(super) fn entry(
        &mut self,
        Entry { line, key, value }: Entry<'_>,
        order: usize,
        notes: &mut Vec<Note>,
    ) -> Result<(), String> {
        match key {
            "publickey" => self.public_key = Some(parsed(value)?),
            "presharedkey" => self.preshared_key = Some(Secret::Here(parsed(value)?)),
            "allowedips" => {
                for text in items(value) {
                    // Newer wg: more, and fewer, than there are.
                    let removed = text.strip_prefix('-');
                    let net = network(removed.unwrap_or(text.trim_start_matches('+')))?;
                    let cidr = net.trunc();
                    if removed.is_some() {
                        self.allowed_ips.retain(|allowed| allowed.cidr != cidr);
                    } else if net.prefix_len() == 0 {
                        let text = format!(
                            "{text} is left out: Sluice leads networks into the tunnel, not the \
                             whole internet"
                        );
                        notes.push(note(line, text));
                    } else {
                        self.allowed_ips.push(AllowedIp { line, order, cidr });
                    }
                }
            }
            "endpoint" => match config::parse_endpoint(value) {
                Ok(_) => self.endpoint = Some(value.to_owned()),
                Err(error) => notes.push(note(line, format!("Endpoint is left out: {error}"))),
            },
            "persistentkeepalive" if value.eq_ignore_ascii_case("off") => self.keepalive = Some(0),
            "persistentkeepalive" => self.keepalive = Some(number(value)?),
            _ => return Err("is no key of [Peer] in a file of wg-quick".to_owned()),
        }
        Ok(())
    }
}

/// The items of a list; wg-quick parts addresses at blanks too.
fn items(value: &str) -> impl Iterator<Item = &str> {
    value
        .split(|c: char| c == ',' || c.is_whitespace())
        .filter(|text| !text.is_empty())
}

pub(super) fn parsed<T: std::str::FromStr<Err: std::fmt::Display>>(
    value: &str,
) -> Result<T, String> {
    value.parse().map_err(|error: T::Err| error.to_string())
}

pub(super) fn number(value: &str) -> Result<u16, String> {
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    let parsed = value.parse().ok().filter(|_| digits);
    parsed.ok_or_else(|| {
        let shown = shown(value);
        format!("{shown} is no number from 0 to 65535; write it in digits")
    })
}

/// An address alone stands for itself.
fn network(text: &str) -> Result<IpNet, String> {
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let net = address.parse::<IpAddr>().ok().and_then(|address| {
        let Some(length) = length else {
            return Some(IpNet::from(address));
        };
        let digits = length.bytes().all(|byte| byte.is_ascii_digit());
        let length = length.parse().ok().filter(|_| digits)?;
        IpNet::new(address, length).ok()
    });
    net.ok_or_else(|| {
        let shown = shown(text);
        format!("{shown} is no address and no network; write it like 10.0.0.2/32 or fd00::2/128")
    })
}

/// A value in a sentence: not endless, for it may be anything.
pub(super) fn shown(text: &str) -> String {
    const LONGEST: usize = 80;
    let mut shown: String = text.chars().take(LONGEST).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}

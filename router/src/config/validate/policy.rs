//! `[[rule]]`: sources, destinations with ports, protocols.

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::super::net;
use super::super::problem::Problems;
use super::super::raw;
use super::super::section::{At, Text, TextOr, quoted, within};
use super::super::suggest;
use super::peers::Checked;
use crate::control::{Destination, Rule};

const ALL_PORTS: RangeInclusive<u16> = 0..=65535;
const ICMP: [u8; 2] = [1, 58];

/// Protocols by name, with their numbers at IANA. `icmp` is both families' as in Tailscale's rules.
const PROTOCOLS: &[(&str, &[u8])] = &[
    ("tcp", &[6]),
    ("udp", &[17]),
    ("icmp", &ICMP),
    ("icmpv6", &[58]),
    ("ipv6-icmp", &[58]),
    ("igmp", &[2]),
    ("gre", &[47]),
    ("esp", &[50]),
    ("ah", &[51]),
    ("sctp", &[132]),
];

/// Peers by name: their places among the peers.
type Names<'p> = HashMap<&'p str, usize>;

/// A source of a rule, as the file has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Source {
    Net(IpNet),
    /// The allowed IPs of the peer at this place among the file's peers.
    Peer(usize),
}

/// The CIDRs of `sources`; `owned` tells those of the peer at a place.
pub(super) fn nets(sources: &[Source], owned: impl Fn(usize) -> Vec<IpNet>) -> Vec<IpNet> {
    let nets = sources.iter().flat_map(|source| match source {
        Source::Net(net) => vec![*net],
        Source::Peer(place) => owned(*place),
    });
    nets.collect()
}

/// Checks every rule; the names of peers in them become the peers' allowed IPs. The sources are told
/// with the names, too.
pub(super) fn rules(
    raw: &[raw::Rule<'_>],
    peers: &[Checked],
    problems: &mut Problems<'_>,
) -> (Vec<Rule>, Vec<Vec<Source>>) {
    let names: Names<'_> = if raw.is_empty() {
        Names::new()
    } else {
        let named = (0..).zip(peers);
        let named = named.filter_map(|(place, peer)| Some((peer.name.as_deref()?, place)));
        named.collect()
    };
    let owned = |place: usize| {
        let peer = peers.get(place).into_iter();
        let nets = peer.flat_map(|peer| &peer.allowed_ips);
        nets.map(|net| net.value).collect()
    };
    let rules = raw.iter().map(|rule| {
        let sources = sources(rule, &names, problems);
        let nets = nets(&sources, owned);
        (self::rule(rule, nets, problems), sources)
    });
    rules.unzip()
}

fn rule(raw: &raw::Rule<'_>, sources: Vec<IpNet>, problems: &mut Problems<'_>) -> Rule {
    let (protocols, portless) = protocols(raw, problems);
    let mut destinations = Vec::new();
    for text in entries(raw.to.as_ref(), "rule.to", problems) {
        match destination(&text.value) {
            Ok(found) => {
                fits(text, &found, &sources, portless.as_deref(), problems);
                destinations.extend(found);
            }
            Err(message) => problems.add(text.at, "rule.to", message),
        }
    }
    Rule {
        sources,
        destinations,
        protocols,
        ..Rule::default()
    }
}

/// The entries of a list that must not be empty.
fn entries<'r, 'i>(
    list: Option<&'r At<Vec<Text<'i>>>>,
    key: &'static str,
    problems: &mut Problems<'_>,
) -> &'r [Text<'i>] {
    let Some(list) = list else {
        return &[];
    };
    if list.value.is_empty() {
        let message = "an empty list, so that the rule allows nothing; write [\"*\"] for all, or \
                       remove the rule";
        problems.add(list.at, key, message);
    }
    &list.value
}

fn everything() -> [IpNet; 2] {
    let v4 = Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0);
    let v6 = Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0);
    [v4.into(), v6.into()]
}

fn sources(raw: &raw::Rule<'_>, names: &Names<'_>, problems: &mut Problems<'_>) -> Vec<Source> {
    let mut found = Vec::new();
    for text in entries(raw.from.as_ref(), "rule.from", problems) {
        let written = text.value.as_ref();
        if written == "*" {
            found.extend(everything().map(Source::Net));
        } else if let Some(place) = names.get(written) {
            found.push(Source::Peer(*place));
        } else {
            match net::network(written).map(carried) {
                Ok(Err(message)) => problems.add(text.at, "rule.from", message),
                Ok(Ok(net)) => found.push(Source::Net(net)),
                Err(message) => problems.add(text.at, "rule.from", source(written, names, message)),
            }
        }
    }
    found
}

/// The network again, unless nothing to or from it is carried whatever the rules say.
fn carried(net: IpNet) -> Result<IpNet, String> {
    match net::never_carried(&net) {
        Some(what) => Err(format!(
            "\"{net}\" is {what}: the router carries nothing there for its peers, for its own \
             credentials may be there; remove it"
        )),
        None => Ok(net),
    }
}

/// The sentence for a source that is neither a CIDR nor a known peer.
fn source(written: &str, names: &Names<'_>, message: String) -> String {
    if written.contains(['/', ':']) || written.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return message;
    }
    let shown = quoted(written);
    match suggest::nearest(written, names.keys().copied()) {
        Some(meant) => format!("{shown} is no peer's name; did you mean {}?", quoted(meant)),
        None => format!(
            "{shown} is neither a CIDR nor the name of a peer in this file; write \"*\" for every \
             peer"
        ),
    }
}

/// `cidr`, `cidr:ports`, `[IPv6 cidr]:ports`, with `*` for every address or every port.
fn destination(text: &str) -> Result<Vec<Destination>, String> {
    let shown = quoted(text);
    let (host, ports) = if let Some(rest) = text.strip_prefix('[') {
        let closed = rest.split_once(']');
        let parts = closed.and_then(|(host, rest)| match rest.strip_prefix(':') {
            Some(ports) => Some((host, Some(ports))),
            None => rest.is_empty().then_some((host, None)),
        });
        parts.ok_or_else(|| {
            format!("{shown} is no destination; write IPv6 with ports as \"[fd00::/64]:443\"")
        })?
    } else {
        match text.match_indices(':').count() {
            0 => (text, None),
            1 => text
                .split_once(':')
                .map_or((text, None), |(h, p)| (h, Some(p))),
            _ if text
                .rsplit_once('/')
                .is_some_and(|(_, length)| length.contains(':')) =>
            {
                return Err(format!(
                    "{shown} has ports after an IPv6 CIDR; put the CIDR in brackets, as \
                     \"[fd00::/64]:443\""
                ));
            }
            _ => (text, None),
        }
    };
    let nets = match host {
        "*" => everything().to_vec(),
        host => vec![carried(net::network(host)?)?],
    };
    let ports = match ports {
        None | Some("*") => vec![ALL_PORTS],
        Some(list) => list
            .split(',')
            .map(|range| port_range(range.trim()))
            .collect::<Option<_>>()
            .ok_or_else(|| {
                format!(
                    "{shown} has bad ports; write a port, a range or a list from 1 to 65535, e.g. \
                     \"{host}:443,8000-8100\""
                )
            })?,
    };
    let pairs = nets.iter().flat_map(|cidr| {
        ports.iter().map(|ports| Destination {
            cidr: *cidr,
            ports: ports.clone(),
        })
    });
    Ok(pairs.collect())
}

fn port_range(text: &str) -> Option<RangeInclusive<u16>> {
    // No sign and no blank, which parse() would take.
    if !text.bytes().all(|b| b.is_ascii_digit() || b == b'-') {
        return None;
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = first.parse().ok()?..=last.parse().ok()?;
    let sensible =
        !range.is_empty() && (*range.end() > 0) && (range == ALL_PORTS || *range.start() > 0);
    sensible.then_some(range)
}

/// Reports a destination that no packet of the rule can match.
fn fits(
    text: &Text<'_>,
    found: &[Destination],
    sources: &[IpNet],
    portless: Option<&str>,
    problems: &mut Problems<'_>,
) {
    let shown = quoted(&text.value);
    let v4 = |net: &IpNet| net.addr().is_ipv4();
    let one_family = found.iter().all(|d| v4(&d.cidr) == v4(&found[0].cidr));
    if let Some(first) = found.first()
        && one_family
        && !sources.is_empty()
        && !sources.iter().any(|source| v4(source) == v4(&first.cidr))
    {
        let (this, other) = if v4(&first.cidr) { (4, 6) } else { (6, 4) };
        let message = format!(
            "{shown} is IPv{this}, but every source of the rule is IPv{other}; add an IPv{this} \
             source, or remove it"
        );
        problems.add(text.at, "rule.to", message);
    }
    if let Some(protocol) = portless
        && found
            .iter()
            .any(|destination| destination.ports != ALL_PORTS)
    {
        let message = format!(
            "{shown} has ports, which {protocol} does not have; give {protocol} a rule of its own, \
             without ports"
        );
        problems.add(text.at, "rule.to", message);
    }
}

/// The protocol numbers of a rule, and the first protocol as written for which ports make no sense.
fn protocols(raw: &raw::Rule<'_>, problems: &mut Problems<'_>) -> (Vec<u8>, Option<String>) {
    const KEY: &str = "rule.protocols";
    let mut numbers: Vec<u8> = Vec::new();
    let mut portless = None;
    let Some(list) = &raw.protocols else {
        return (numbers, portless);
    };
    if list.value.is_empty() {
        let message = "an empty list; remove the line for TCP, UDP and ICMP";
        problems.add(list.at, KEY, message);
    }
    let mut icmp = None;
    for entry in &list.value {
        let (written, found) = match entry {
            TextOr::Other(number) => {
                let found = within::<u8>(*number, KEY, 1..=255, "protocol number", problems);
                (number.value.to_string(), found.into_iter().collect())
            }
            TextOr::Text(text) => {
                let lower = text.value.to_ascii_lowercase();
                let known = PROTOCOLS.iter().find(|(name, _)| *name == lower);
                if known.is_none() {
                    problems.add(text.at, KEY, unknown_protocol(&text.value));
                }
                (
                    lower,
                    known.map_or_else(Vec::new, |(_, numbers)| numbers.to_vec()),
                )
            }
        };
        for number in found {
            match number {
                6 | 17 => {}
                1 | 58 => icmp = icmp.or_else(|| Some(written.clone())),
                _ => portless = portless.or_else(|| Some(written.clone())),
            }
            if !numbers.contains(&number) {
                numbers.push(number);
            }
        }
    }
    // Beside TCP or UDP, ICMP matches by address alone.
    let only_icmp = numbers.iter().all(|number| ICMP.contains(number));
    (numbers, portless.or(icmp.filter(|_| only_icmp)))
}

fn unknown_protocol(written: &str) -> String {
    let shown = quoted(written);
    if let Ok(number) = written.parse::<u8>() {
        return format!("{shown} is text; write {number} without the quotes");
    }
    let names: Vec<&str> = PROTOCOLS.iter().map(|(name, _)| *name).collect();
    format!(
        "{shown} is no protocol; write one of {}, or a number",
        names.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Vec<String> {
        let show = |d: Destination| format!("{} {}-{}", d.cidr, d.ports.start(), d.ports.end());
        destination(text).unwrap().into_iter().map(show).collect()
    }

    #[test]
    fn destinations() {
        assert_eq!(parsed("10.0.0.0/16"), ["10.0.0.0/16 0-65535"]);
        assert_eq!(parsed("10.0.0.0/16:443"), ["10.0.0.0/16 443-443"]);
        assert_eq!(parsed("10.0.0.1:*"), ["10.0.0.1/32 0-65535"]);
        assert_eq!(
            parsed("[fd00::/8]:53,8000-8100"),
            ["fd00::/8 53-53", "fd00::/8 8000-8100"]
        );
        assert_eq!(parsed("fd00::/8"), ["fd00::/8 0-65535"]);
        assert_eq!(parsed("[fd00::1]"), ["fd00::1/128 0-65535"]);
        assert_eq!(parsed("*:22"), ["0.0.0.0/0 22-22", "::/0 22-22"]);
        for (text, says) in [
            ("fd00::/8:53", "brackets"),
            ("[fd00::/8:53", "[fd00::/64]:443"),
            ("10.0.0.0/16:", "bad ports"),
            ("10.0.0.0/16:0", "bad ports"),
            ("10.0.0.0/16:8100-8000", "bad ports"),
            ("10.0.0.0/16:+443", "bad ports"),
            ("10.0.0.0/16:65536", "bad ports"),
            ("10.0.0.1/16:443", "\"10.0.0.0/16\""),
            ("db.internal:5432", "no CIDR"),
        ] {
            let error = destination(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}

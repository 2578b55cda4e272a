//! Reads CIDRs, endpoints and interface names, with a sentence for each way to get them wrong.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipnet::IpNet;
use router_ebpf::route::LINK_LOCAL;

use super::section::quoted;
use crate::control::Endpoint;

/// Longest interface name in bytes: the kernel's IFNAMSIZ is 16 with the final zero.
const LONGEST_INTERFACE: usize = 15;

/// A CIDR, host bits kept; an address alone is a CIDR of that address.
pub(super) fn cidr(text: &str) -> Result<IpNet, String> {
    let shown = quoted(text);
    if text.contains('%') {
        return Err(format!(
            "{shown} has a zone, which a CIDR cannot have; leave out the % and what follows it"
        ));
    }
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| {
        format!("{shown} is no CIDR; write one like \"10.0.0.0/16\" or \"fd00::/64\"")
    })?;
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Err(format!("{shown} is IPv4 written as IPv6; write it as {v4}"));
    }
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let Some(length) = length else {
        return Ok(IpNet::from(address));
    };
    let parsed = length.parse::<u8>().ok();
    match parsed.and_then(|length| IpNet::new(address, length).ok()) {
        Some(net) => Ok(net),
        None => Err(match mask(address, length) {
            Some(length) => format!("{shown} has a netmask; write \"{address}/{length}\""),
            None => format!(
                "{shown} has a prefix length that does not exist; it goes from /0 to /{longest}"
            ),
        }),
    }
}

/// The prefix length that an IPv4 netmask stands for.
fn mask(address: IpAddr, text: &str) -> Option<u8> {
    let mask: Ipv4Addr = text.parse().ok()?;
    let net = ipnet::Ipv4Net::with_netmask(Ipv4Addr::UNSPECIFIED, mask).ok()?;
    address.is_ipv4().then(|| net.prefix_len())
}

/// A CIDR without host bits, as it must be for a whole network.
pub(super) fn network(text: &str) -> Result<IpNet, String> {
    let net = cidr(text)?;
    let right = net.trunc();
    if right == net {
        return Ok(net);
    }
    let shown = quoted(text);
    Err(format!("{shown} has host bits set; write \"{right}\""))
}

/// Why packets for a network are never routed, if so.
pub(super) fn never_routed(net: &IpNet) -> Option<&'static str> {
    let within = |address: IpAddr, length| {
        IpNet::new(address, length).is_ok_and(|special: IpNet| special.contains(net))
    };
    [
        (Ipv4Addr::LOCALHOST.into(), 8, "loopback"),
        (Ipv6Addr::LOCALHOST.into(), 128, "loopback"),
        (Ipv4Addr::new(224, 0, 0, 0).into(), 4, "multicast"),
        (
            Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0).into(),
            8,
            "multicast",
        ),
        (Ipv4Addr::UNSPECIFIED.into(), 8, "\"this network\""),
        (Ipv6Addr::UNSPECIFIED.into(), 128, "the unspecified address"),
        (Ipv4Addr::BROADCAST.into(), 32, "broadcast"),
    ]
    .into_iter()
    .find(|(address, length, _)| net.prefix_len() > 0 && within(*address, *length))
    .map(|(_, _, what)| what)
    .or_else(|| never_carried(net))
}

/// Why the router carries nothing to or from a network for its peers, whatever routes and rules say, if so.
pub(super) fn never_carried(net: &IpNet) -> Option<&'static str> {
    let (_, length) = LINK_LOCAL.into_iter().find(|(address, length)| {
        IpNet::new(*address, *length).is_ok_and(|never: IpNet| never.contains(net))
    })?;
    Some(match length {
        128 => "a cloud's metadata service",
        _ => "link-local",
    })
}

/// `host:port`, `address:port` or `[IPv6 address]:port`.
pub(crate) fn endpoint(text: &str) -> Result<Endpoint, String> {
    let shown = quoted(text);
    if text.contains('%') {
        return Err(format!(
            "{shown} has a zone; link-local endpoints are not served, use an address that is \
             routed or a DNS name"
        ));
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        return usable(address)
            .map(Endpoint::Addr)
            .map_err(|why| format!("{shown} {why}"));
    }
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    if let Ok(address) = bare.parse::<IpAddr>() {
        let mend = SocketAddr::new(address, super::DEFAULT_LISTEN_PORT);
        let brackets = if address.is_ipv6() && !text.starts_with('[') {
            " (and an IPv6 address stands in brackets)"
        } else {
            ""
        };
        return Err(format!(
            "{shown} has no port{brackets}; write it like \"{mend}\""
        ));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(if host_name(text) {
            let port = super::DEFAULT_LISTEN_PORT;
            format!("{shown} has no port; write it like \"{text}:{port}\"")
        } else {
            not_an_endpoint(&shown)
        });
    };
    let number = port.parse::<u16>().ok().filter(|port| *port != 0);
    match number {
        _ if !host_name(host) => Err(not_an_endpoint(&shown)),
        Some(port) => Ok(Endpoint::Name {
            host: host.to_owned(),
            port,
        }),
        None => Err(format!(
            "{shown} has a bad port; write a number from 1 to 65535 after the colon"
        )),
    }
}

fn not_an_endpoint(shown: &str) -> String {
    format!(
        "{shown} is no endpoint; write \"name:port\", \"192.0.2.1:port\" or \"[2001:db8::1]:port\""
    )
}

/// The address and port again, if a datagram can be sent to a peer there; else the end of a sentence.
pub(super) fn usable(address: SocketAddr) -> Result<SocketAddr, String> {
    if address.port() == 0 {
        return Err("has a bad port; write a number from 1 to 65535 after the colon".into());
    }
    if let SocketAddr::V6(v6) = address
        && let Some(v4) = v6.ip().to_ipv4_mapped()
    {
        let port = v6.port();
        return Err(format!("is IPv4 written as IPv6; write \"{v4}:{port}\""));
    }
    match never_routed(&IpNet::from(address.ip())) {
        // A peer on this machine is odd but works, and tests live on it.
        Some("loopback") | None => Ok(address),
        // The underlay may be a cable. In IPv6 the address must name its interface then.
        Some("link-local") if !matches!(address, SocketAddr::V6(v6) if v6.scope_id() == 0) => {
            Ok(address)
        }
        Some(what) => Err(format!(
            "is {what}, where no peer can be; write the peer's address outside the tunnel"
        )),
    }
}

/// Whether `text` is a DNS host name (RFC 1123 section 2.1; underscores too, as resolvers take them).
pub(crate) fn host_name(text: &str) -> bool {
    let text = text.strip_suffix('.').unwrap_or(text);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b))
    };
    // A last label of digits alone is a mistyped IPv4 address, never a name.
    let numeric = |label: &str| label.bytes().all(|b| b.is_ascii_digit());
    text.len() <= 253
        && text.split('.').all(label)
        && text.rsplit('.').next().is_some_and(|last| !numeric(last))
}

/// Checks the name of an interface (`dev_valid_name` in the kernel's net/core/dev.c, and what
/// would be ambiguous elsewhere).
pub(super) fn interface(name: &str) -> Result<(), String> {
    let shown = quoted(name);
    let fault = if name.is_empty() || name.len() > LONGEST_INTERFACE {
        Some(format!(
            "has {} characters; an interface name has 1 to {LONGEST_INTERFACE}",
            name.len()
        ))
    } else if !name.bytes().all(|b| b.is_ascii_graphic()) || name.contains(['/', ':', '%']) {
        // The kernel reads % as a template for a number.
        Some("holds a character that an interface name cannot; use letters, digits, - and _".into())
    } else if matches!(name, "." | ".." | "all" | "default" | "lo") {
        // `all` and `default` have a meaning under /proc/sys/net.
        Some("is a name that the kernel keeps for itself; choose another".into())
    } else {
        None
    };
    fault.map_or(Ok(()), |fault| Err(format!("{shown} {fault}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cidrs() {
        let ok = |text: &str| cidr(text).unwrap().to_string();
        assert_eq!(ok("10.0.0.1"), "10.0.0.1/32");
        assert_eq!(ok("fd00::1"), "fd00::1/128");
        assert_eq!(ok("10.0.0.1/24"), "10.0.0.1/24");
        for (text, says) in [
            ("10.0.0.0/255.255.0.0", "write \"10.0.0.0/16\""),
            ("10.0.0.0/33", "/0 to /32"),
            ("10.0.0.0/", "/0 to /32"),
            ("10.0.0.0/-1", "/0 to /32"),
            ("fd00::/129", "/0 to /128"),
            ("fe80::%eth0/64", "zone"),
            ("::ffff:10.0.0.0/104", "write it as 10.0.0.0"),
            ("10.0.0/8", "no CIDR"),
            ("010.0.0.1", "no CIDR"),
            ("", "no CIDR"),
        ] {
            let error = cidr(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn endpoints() {
        let name = |host: &str, port| Endpoint::Name {
            host: host.into(),
            port,
        };
        assert_eq!(
            endpoint("vpn.example.com:7"),
            Ok(name("vpn.example.com", 7))
        );
        assert_eq!(endpoint("3com.example:7"), Ok(name("3com.example", 7)));
        for literal in ["192.0.2.1:1", "[2001:db8::1]:51820"] {
            let address = Endpoint::Addr(literal.parse().unwrap());
            assert_eq!(endpoint(literal), Ok(address));
        }
        for (text, says) in [
            ("vpn.example.com", "\"vpn.example.com:51820\""),
            ("192.0.2.1", "\"192.0.2.1:51820\""),
            ("2001:db8::1", "\"[2001:db8::1]:51820\""),
            ("[2001:db8::1]", "\"[2001:db8::1]:51820\""),
            ("vpn.example.com:0", "bad port"),
            ("vpn.example.com:70000", "bad port"),
            ("192.0.2.1:0", "bad port"),
            ("192.0.2.999:7", "no endpoint"),
            ("udp://vpn.example.com:7", "no endpoint"),
            ("", "no endpoint"),
            (":51820", "no endpoint"),
            ("[fe80::1%eth0]:7", "zone"),
            ("[fe80::1]:7", "link-local"),
            ("224.0.0.1:7", "multicast"),
            ("[::ffff:192.0.2.1]:7", "\"192.0.2.1:7\""),
            ("0.0.0.0:7", "this network"),
        ] {
            let error = endpoint(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn interface_names() {
        for good in ["sluice0", "eth0.100", "a", "fifteen-letters"] {
            assert_eq!(interface(good), Ok(()));
        }
        for bad in [
            "",
            "sixteen-letters-",
            "a b",
            "a/b",
            "eth%d",
            "eth0:1",
            ".",
            "all",
            "lo",
            "é",
        ] {
            assert!(interface(bad).is_err(), "{bad}");
        }
    }
}

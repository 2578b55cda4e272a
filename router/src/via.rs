//! 4via6: the IPv4 hosts of a site, written as IPv6 addresses, so that sites whose networks overlap are told apart.
//!
//! `fd7a:115c:a1e0:b1a:<site>:<IPv4 address>`, with 32 bits for the site (`net/tsaddr` of Tailscale's sources). A peer
//! sends IPv6; the router that serves the site translates, so that everything behind the engine sees IPv4. There each
//! peer needs an IPv4 source of its own, by which replies are told from those of its own IPv4 flows: an address of
//! [`POOL`], which never leaves the router, for such routes translate sources.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// What all 4via6 addresses begin with.
pub const PREFIX: [u8; 8] = [0xfd, 0x7a, 0x11, 0x5c, 0xa1, 0xe0, 0x0b, 0x1a];

/// Bits before the IPv4 address.
const SITE_LENGTH: u8 = 96;

/// The IPv4 addresses that stand for peers. A network for measurements (RFC 2544), which is routed nowhere; of the two
/// halves the one that AWS does not recommend for pods. Class E would be larger, but no program forwards it.
pub const POOL: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(198, 18, 0, 0), 16);

/// An IPv4 network of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ViaNet {
    /// Number of the site.
    pub site: u32,
    /// The network.
    pub net: Ipv4Net,
}

impl ViaNet {
    /// What an IPv6 CIDR stands for; `None` if it is not of a single site.
    pub fn of(cidr: &IpNet) -> Option<Self> {
        let IpNet::V6(cidr) = cidr else {
            return None;
        };
        let length = cidr.prefix_len().checked_sub(SITE_LENGTH)?;
        let (site, host) = parse(cidr.network())?;
        let net = Ipv4Net::new(host, length).ok()?.trunc();
        Some(Self { site, net })
    }

    /// Whether it can be a route: not everything, and nothing that is never reached ([`may_reach`]).
    pub fn is_served(&self) -> bool {
        self.net.prefix_len() > 0 && may_reach(self.net.network())
    }

    /// The IPv6 CIDR.
    pub fn cidr(&self) -> IpNet {
        let address = address(self.site, self.net.network());
        Ipv6Net::new_assert(address, SITE_LENGTH + self.net.prefix_len()).into()
    }
}

/// Whether a CIDR holds 4via6 addresses, or lies among them.
pub fn overlaps(cidr: &IpNet) -> bool {
    let IpNet::V6(cidr) = cidr else {
        return false;
    };
    let all = Ipv6Net::new_assert(address(0, Ipv4Addr::UNSPECIFIED), 64);
    all.contains(cidr) || cidr.contains(&all)
}

/// The address of an IPv4 host of a site.
pub fn address(site: u32, host: Ipv4Addr) -> Ipv6Addr {
    let mut octets = [0; 16];
    octets[..8].copy_from_slice(&PREFIX);
    octets[8..12].copy_from_slice(&site.to_be_bytes());
    octets[12..].copy_from_slice(&host.octets());
    Ipv6Addr::from(octets)
}

/// Site and host of a 4via6 address.
pub fn parse(address: Ipv6Addr) -> Option<(u32, Ipv4Addr)> {
    let octets = address.octets();
    let (prefix, rest) = octets.split_first_chunk::<8>()?;
    let (site, host) = rest.split_first_chunk::<4>()?;
    let host: [u8; 4] = host.try_into().ok()?;
    (*prefix == PREFIX).then(|| (u32::from_be_bytes(*site), Ipv4Addr::from(host)))
}

/// Whether a host may be reached in this way: none that is the router's own business, and no node of the tailnet,
/// which has an address of its own (`ipn/ipnlocal/via.go` of Tailscale's sources).
pub fn may_reach(host: Ipv4Addr) -> bool {
    const TAILNET: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10);
    !(host.is_loopback()
        || host.is_multicast()
        || host.is_unspecified()
        || host.is_broadcast()
        || host.is_link_local()
        || TAILNET.contains(&host)
        || POOL.contains(&host))
}

/// The two addresses of a peer: its own one, and the one of [`POOL`] that stands for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    /// Its own.
    pub v6: Ipv6Addr,
    /// Of [`POOL`].
    pub v4: Ipv4Addr,
}

impl Ends {
    /// Those of a peer with these allowed IPs: its first IPv6 address, and the address of the pool among them.
    pub fn of(allowed_ips: &[IpNet]) -> Option<Self> {
        let mut hosts = allowed_ips
            .iter()
            .filter(|net| net.prefix_len() == net.max_prefix_len());
        let v4 = hosts.find_map(|net| match net {
            IpNet::V4(net) if POOL.contains(&net.addr()) => Some(net.addr()),
            _ => None,
        })?;
        let v6 = host(allowed_ips)?;
        Some(Self { v6, v4 })
    }
}

/// The first IPv6 address among allowed IPs that is a host's.
pub fn host(allowed_ips: &[IpNet]) -> Option<Ipv6Addr> {
    allowed_ips.iter().find_map(|net| match net {
        IpNet::V6(net) if net.prefix_len() == 128 => Some(net.addr()),
        _ => None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn as_tailscale_writes_them() {
        // `tailscale debug via 7 10.1.2.0/24`.
        let cidr: IpNet = "fd7a:115c:a1e0:b1a:0:7:a01:200/120".parse().unwrap();
        let net = ViaNet::of(&cidr).unwrap();
        assert_eq!((net.site, net.net.to_string().as_str()), (7, "10.1.2.0/24"));
        assert_eq!(net.cidr(), cidr);
        let host = address(0x10007, Ipv4Addr::new(10, 1, 2, 3));
        assert_eq!(host.to_string(), "fd7a:115c:a1e0:b1a:1:7:a01:203");
        assert_eq!(parse(host), Some((0x10007, Ipv4Addr::new(10, 1, 2, 3))));
        for other in [
            "10.0.0.0/8",
            "fd7a:115c:a1e0:b1a::/64",
            "fd7a:115c:a1e0:b1b::/120",
        ] {
            assert_eq!(ViaNet::of(&other.parse().unwrap()), None, "{other}");
        }
        assert!(overlaps(&"fd7a:115c:a1e0::/48".parse().unwrap()));
        assert!(!overlaps(&"fd7a:115c:a1e0:b1b::/64".parse().unwrap()));
    }

    #[test]
    fn what_is_not_reached() {
        for (host, may) in [
            ("10.0.0.1", true),
            ("127.0.0.1", false),
            ("169.254.169.254", false),
            ("100.64.0.7", false),
            ("198.18.0.7", false),
            ("224.0.0.1", false),
        ] {
            assert_eq!(may_reach(host.parse().unwrap()), may, "{host}");
        }
    }

    #[test]
    fn the_ends_of_a_peer() {
        let nets = |texts: &[&str]| {
            texts
                .iter()
                .map(|net| net.parse().unwrap())
                .collect::<Vec<IpNet>>()
        };
        let ends = Ends::of(&nets(&[
            "100.64.0.2/32",
            "fd64::/64",
            "fd64::2/128",
            "198.18.3.4/32",
        ]))
        .unwrap();
        assert_eq!(
            (ends.v6.to_string().as_str(), ends.v4.to_string().as_str()),
            ("fd64::2", "198.18.3.4")
        );
        assert_eq!(Ends::of(&nets(&["fd64::2/128"])), None);
        assert_eq!(Ends::of(&nets(&["198.18.3.4/32", "198.18.0.0/16"])), None);
    }
}

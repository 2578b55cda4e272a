//! The tunnel MTU beside what the underlay carries.

use std::fmt;
use std::net::IpAddr;

use super::Facts;
use crate::config::{DEFAULT_MTU, Interface, Local, MTU, Mtu};

/// Bytes around a packet in the tunnel: IP and UDP header, WireGuard's header and tag (16 each).
fn overhead(v6: bool) -> u32 {
    (if v6 { 40 } else { 20 }) + 8 + 32
}

/// A way of underlay packets that is too narrow, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Narrow {
    /// What the way carries, in bytes.
    pub carries: u32,
    /// The interface.
    pub link: String,
    /// To a peer's endpoint; `None`: the uplink as such.
    pub to: Option<IpAddr>,
    /// The route says so, or a router on the path has; else it is the interface's MTU.
    pub told: bool,
    v6: bool,
}

impl Narrow {
    /// Bytes of the largest packet in the tunnel that goes this way in one piece.
    fn room(&self) -> u32 {
        self.carries.saturating_sub(overhead(self.v6))
    }
}

impl fmt::Display for Narrow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.told, self.to) {
            (true, Some(to)) => write!(f, "the path to {to} carries")?,
            (true, None) => write!(f, "the default route by {} carries", self.link)?,
            (false, _) => write!(f, "{} carries", self.link)?,
        }
        write!(f, " {} bytes", self.carries)
    }
}

/// The ways of underlay packets: the uplink's default routes, and those to peers as far as it is
/// known where they are. Without a peer over IPv6 that family counts all the same where the uplink has
/// an address and a default route of it: a peer may come that way at any time, and the tunnel should
/// not change with each.
fn ways<'f>(local: &'f Local, facts: &'f Facts) -> impl Iterator<Item = Narrow> + 'f {
    let named = match &local.uplink {
        Interface::Auto => None,
        Interface::Named(name) => Some(name),
    };
    let global_v6 = move |index: u32| {
        let link = facts.links.get(&index);
        link.is_some_and(|link| {
            let mut v6 = link.addresses.iter().filter_map(|net| match net.addr() {
                IpAddr::V6(v6) => Some(v6),
                IpAddr::V4(_) => None,
            });
            v6.any(|v6| !v6.is_unicast_link_local())
        })
    };
    let routed = facts.paths.iter().filter_map(move |(to, path)| {
        let link = facts.links.get(&path.link)?;
        if to.is_unspecified()
            && (named.is_some_and(|name| *name != link.name)
                || to.is_ipv6() && !global_v6(path.link))
        {
            return None;
        }
        let told = path.mtu.filter(|mtu| *mtu < link.mtu);
        Some(Narrow {
            carries: told.unwrap_or(link.mtu),
            link: link.name.clone(),
            to: Some(*to).filter(|to| !to.is_unspecified()),
            told: told.is_some(),
            v6: to.is_ipv6(),
        })
    });
    // A named uplink that no default route leads to.
    let links = facts.links.iter();
    let links = links.filter(move |(_, link)| named == Some(&link.name));
    let uplink = links.map(move |(index, link)| Narrow {
        carries: link.mtu,
        link: link.name.clone(),
        to: None,
        told: false,
        v6: global_v6(*index) && link.addresses.iter().all(|net| net.addr().is_ipv6()),
    });
    routed.chain(uplink).filter(|way| way.carries > 0)
}

fn narrowest(local: &Local, facts: &Facts) -> Option<Narrow> {
    ways(local, facts).min_by_key(Narrow::room)
}

/// The tunnel MTU in bytes, and the way that makes it smaller than [`DEFAULT_MTU`].
pub fn tunnel_mtu(local: &Local, facts: &Facts) -> (u16, Option<Narrow>) {
    let narrow = match local.mtu {
        Mtu::Fixed(mtu) => return (mtu, None),
        Mtu::Auto => narrowest(local, facts).filter(|way| way.room() < DEFAULT_MTU.into()),
    };
    let mtu = narrow.as_ref().map_or(DEFAULT_MTU, fitting);
    (mtu, narrow)
}

/// What fits this way. A multiple of 16: peers pad packets to that, up to their own MTU, which may be
/// larger than ours.
fn fitting(way: &Narrow) -> u16 {
    let room = u16::try_from(way.room()).unwrap_or(u16::MAX);
    (room & !15).clamp(*MTU.start(), DEFAULT_MTU)
}

/// Why a tunnel MTU of `mtu` bytes does not fit, as a sentence with the mend.
pub fn misfit(mtu: u16, local: &Local, facts: &Facts) -> Option<String> {
    let way = narrowest(local, facts).filter(|way| way.room() < mtu.into())?;
    let needs = u32::from(mtu) + overhead(way.v6);
    let fitting = fitting(&way);
    let mend = if fitting < mtu && local.mtu != Mtu::Auto {
        format!("set wireguard.mtu = \"auto\", or at most {fitting}")
    } else if way.told {
        "find out who on that path says so; what a router has said the kernel forgets within ten \
         minutes"
            .to_owned()
    } else {
        format!("raise the MTU of {}", way.link)
    };
    Some(format!(
        "a tunnel MTU of {mtu} makes packets of up to {needs} bytes, but {way}: they leave in \
         fragments, one datagram at a time, and where fragments are dropped connections stand still; \
         {mend}"
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::tests::{EXAMPLE, parse_in_temporary_directory};
    use crate::core::{LinkFacts, Path};

    fn local(mtu: Mtu) -> Local {
        let local = parse_in_temporary_directory(EXAMPLE).unwrap().local;
        Local { mtu, ..local }
    }

    /// An uplink eth0, and eth1 of 9,000 bytes beside it.
    fn facts(mtu: u32, addresses: &[&str], paths: &[(&str, u32, Option<u32>)]) -> Facts {
        let link = |name: &str, mtu, addresses: &[&str]| LinkFacts {
            name: name.into(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            mtu,
            ..LinkFacts::default()
        };
        let paths = paths.iter().map(|(to, link, mtu)| {
            (
                to.parse().unwrap(),
                Path {
                    link: *link,
                    mtu: *mtu,
                },
            )
        });
        Facts {
            links: BTreeMap::from([
                (2, link("eth0", mtu, addresses)),
                (3, link("eth1", 9000, &[])),
            ]),
            paths: paths.collect(),
            ..Facts::default()
        }
    }

    const V4: (&str, u32, Option<u32>) = ("0.0.0.0", 2, None);
    const V6: (&str, u32, Option<u32>) = ("::", 2, None);
    const BOTH: [&str; 2] = ["198.51.100.1/24", "2001:db8::1/64"];

    #[test]
    fn auto_fits_the_uplink_and_the_ways_to_the_peers() {
        let auto = local(Mtu::Auto);
        let mut named = auto.clone();
        named.uplink = Interface::Named("eth0".into());
        for (mtu, addresses, paths, expected) in [
            (1500, &BOTH[..], &[V4, V6][..], 1420),
            // Jumbo frames: the peers' own networks have none.
            (9001, &BOTH, &[V4, V6], 1420),
            // PPPoE.
            (1492, &BOTH[..1], &[V4], 1420),
            (1492, &BOTH, &[V4, V6], 1408),
            (1450, &BOTH[..1], &[V4], 1376),
            (1450, &BOTH, &[V4, V6], 1360),
            // A default route of IPv6 without an address of ours.
            (1450, &["198.51.100.1/24", "fe80::1/64"], &[V4, V6], 1376),
            (1500, &BOTH[..1], &[("0.0.0.0", 2, Some(1400))], 1328),
            (
                1500,
                &BOTH,
                &[V4, V6, ("2001:db8:9::1", 2, Some(1400))],
                1312,
            ),
            (1500, &BOTH, &[V4, V6, ("203.0.113.9", 3, Some(1400))], 1328),
            // More than the interface carries is nothing that a route can promise.
            (1450, &BOTH[..1], &[("0.0.0.0", 2, Some(9000))], 1376),
            (1500, &BOTH, &[V4, V6, ("203.0.113.9", 2, Some(600))], 1280),
            (576, &BOTH[..1], &[V4], 1280),
            // Nothing is known.
            (1500, &[], &[], 1420),
            (0, &BOTH, &[V4], 1420),
        ] {
            let facts = facts(mtu, addresses, paths);
            assert_eq!(tunnel_mtu(&auto, &facts).0, expected, "{facts:?}");
            assert_eq!(tunnel_mtu(&named, &facts).0, expected, "{facts:?}");
        }
        // A named uplink counts without a default route, and only its own ones do.
        let facts = facts(1450, &BOTH[..1], &[("0.0.0.0", 3, Some(1300))]);
        assert_eq!(tunnel_mtu(&named, &facts).0, 1376);
        assert_eq!(tunnel_mtu(&auto, &facts).0, 1280);
    }

    #[test]
    fn what_does_not_fit_is_told_with_numbers_and_a_mend() {
        let fits = |mtu, facts: &Facts| misfit(mtu, &local(Mtu::Fixed(mtu)), facts);
        assert_eq!(fits(1440, &facts(1500, &BOTH[..1], &[V4])), None);
        let told = fits(1421, &facts(1500, &BOTH, &[V4, V6])).unwrap();
        assert!(
            told.contains("up to 1501 bytes, but eth0 carries 1500 bytes"),
            "{told}"
        );
        let told = fits(1420, &facts(1450, &BOTH[..1], &[V4])).unwrap();
        assert!(
            told.ends_with("set wireguard.mtu = \"auto\", or at most 1376"),
            "{told}"
        );
        let small = facts(1500, &BOTH[..1], &[V4, ("203.0.113.9", 2, Some(600))]);
        let told = misfit(1280, &local(Mtu::Auto), &small).unwrap();
        assert!(
            told.contains("the path to 203.0.113.9 carries 600 bytes"),
            "{told}"
        );
        assert!(
            told.contains("ten minutes") && !told.contains("wireguard.mtu"),
            "{told}"
        );
        let told = misfit(1280, &local(Mtu::Auto), &facts(576, &BOTH[..1], &[V4])).unwrap();
        assert!(told.ends_with("raise the MTU of eth0"), "{told}");
    }
}

//! The advertised route that a packet is of.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::abi::{Address, Overlay, Prefix, Route, Side, Tuple};
use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::Verdict;

/// The route between the two ends of `tuple` as the program of `side` sees it, and the peer at its end;
/// else why the fast path has nothing to do with it.
#[inline(always)]
pub(crate) fn between<T: Tables>(
    side: Side,
    tuple: &Tuple,
    tables: &T,
) -> Result<(Route, Overlay), Verdict> {
    let mut found = (Route { flags: 0 }, Overlay::of(0));
    search(side, tuple, tables, &mut found)?;
    Ok(found)
}

/// [`between`] as a function that the programs have once.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn search<T: Tables>(
    side: Side,
    tuple: &Tuple,
    tables: &T,
    found: &mut (Route, Overlay),
) -> Result<(), Verdict> {
    let (overlay, subnet) = match side {
        Side::Overlay => (&tuple.source, &tuple.destination),
        Side::Subnet => (&tuple.destination, &tuple.source),
    };
    let Some(peer) = tables.peer(&Prefix::host(*overlay)) else {
        return Err(match side {
            Side::Overlay => Verdict::DropSpoofed,
            Side::Subnet => Verdict::PassUnrelated,
        });
    };
    // Before the routes: whatever they say, and however the packet would go on.
    if side == Side::Overlay && (is_link_local(overlay) || is_link_local(subnet)) {
        return Err(Verdict::DropLinkLocal);
    }
    let route = tables
        .route(&Prefix::host(*subnet))
        .ok_or(Verdict::SlowNotRouted)?;
    if route.flags & Route::STACK != 0 {
        return Err(Verdict::SlowStackRoute);
    }
    check_scope(overlay)?;
    check_scope(subnet)?;
    *found = (route, *peer);
    Ok(())
}

/// What is never carried for the overlay, each with its prefix length: link-local addresses of both families
/// (RFC 3927, RFC 4291), and those of AWS in IPv6 that hand out credentials: the metadata service and the
/// agent of EKS. In IPv4 both are link-local.
pub const LINK_LOCAL: [(IpAddr, u8); 4] = [
    (IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16),
    (IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10),
    (
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
        128,
    ),
    (
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)),
        128,
    ),
];

/// Whether `address` is within [`LINK_LOCAL`].
#[inline(always)]
fn is_link_local(address: &Address) -> bool {
    let [first, second, third, fourth] = address.words();
    let [a, b, ..] = first.to_ne_bytes();
    if address.is_v4() {
        return a == 169 && b == 254;
    }
    let cloud = first == u32::from_ne_bytes([0xfd, 0, 0x0e, 0xc2]) && second | third == 0;
    let service = fourth == u32::from_ne_bytes([0, 0, 2, 0x54])
        || fourth == u32::from_ne_bytes([0, 0, 0, 0x23]);
    (a == 0xfe && b & 0xc0 == 0x80) || (cloud && service)
}

/// Addresses that a router must not forward, or forwards by rules of its own (RFC 1812, RFC 4007).
#[inline(always)]
fn check_scope(address: &Address) -> Result<(), Verdict> {
    let [first, second, third, _] = address.words();
    let [a, b, ..] = first.to_ne_bytes();
    let special = if address.is_v4() {
        // 0/8, 127/8, 169.254/16, multicast, reserved and limited broadcast.
        matches!(a, 0 | 127 | 224..) || (a == 169 && b == 254)
    } else {
        // Multicast; fe80::/10; ::/96 with the unspecified and the loopback address.
        a == 0xff || (a == 0xfe && b & 0xc0 == 0x80) || first | second | third == 0
    };
    if special {
        Err(Verdict::SlowScope)
    } else {
        Ok(())
    }
}

/// The verdict about a packet that belongs to no flow, and that `verdict` would be about if it came
/// from a peer to an advertised route, or the other way.
#[inline(always)]
pub(crate) fn refuse<T: Tables>(
    side: Side,
    packet: &Packet,
    tables: &T,
    verdict: Verdict,
) -> Verdict {
    match between(side, &packet.tuple, tables) {
        Ok(_) => verdict,
        Err(verdict) => verdict,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_never_carried_is_what_the_list_says() {
        let around = |(net, length): (IpAddr, u8)| -> Vec<(IpAddr, bool)> {
            let (bits, width) = match net {
                IpAddr::V4(v4) => (u128::from(v4.to_bits()), 32),
                IpAddr::V6(v6) => (v6.to_bits(), 128),
            };
            let size = 1u128 << (width - u32::from(length));
            let address = |bits: u128| match net {
                IpAddr::V4(_) => IpAddr::from((bits as u32).to_be_bytes()),
                IpAddr::V6(_) => IpAddr::from(bits.to_be_bytes()),
            };
            let inside = [bits, bits + size / 2, bits + size - 1];
            let outside = [bits - 1, bits + size];
            let inside = inside.map(|bits| (address(bits), true));
            let outside = outside.map(|bits| (address(bits), false));
            inside.into_iter().chain(outside).collect()
        };
        for (address, never) in LINK_LOCAL.into_iter().flat_map(around) {
            let ours = match address {
                IpAddr::V4(v4) => Address::v4(v4.octets()),
                IpAddr::V6(v6) => Address::v6(v6.octets()),
            };
            assert_eq!(is_link_local(&ours), never, "{address}");
        }
    }

    #[test]
    fn special_addresses_are_the_kernels() {
        let v4 = |octets| check_scope(&Address::v4(octets)).is_err();
        let v6 = |text: &str| {
            let address: std::net::Ipv6Addr = text.parse().unwrap();
            check_scope(&Address::v6(address.octets())).is_err()
        };
        for octets in [
            [0, 0, 0, 0],
            [127, 0, 0, 1],
            [169, 254, 169, 254],
            [224, 0, 0, 1],
            [239, 1, 2, 3],
            [240, 0, 0, 1],
            [255, 255, 255, 255],
        ] {
            assert!(v4(octets), "{octets:?}");
        }
        for octets in [
            [1, 0, 0, 0],
            [126, 0, 0, 1],
            [169, 253, 0, 1],
            [223, 255, 255, 255],
        ] {
            assert!(!v4(octets), "{octets:?}");
        }
        for text in ["::", "::1", "::10.0.0.1", "fe80::1", "febf::1", "ff02::1"] {
            assert!(v6(text), "{text}");
        }
        for text in [
            "::ffff:10.0.0.1",
            "64:ff9b::1",
            "fec0::1",
            "fd00::1",
            "fe00::1",
            "2001:db8::1",
        ] {
            assert!(!v6(text), "{text}");
        }
    }
}

//! Which external address stands for an overlay address.

use crate::abi::{Address, Flow, Link, Tuple, Way};
use crate::tables::{Hop, Tables};
use crate::verdict::Verdict;

/// Gives `chosen`, whose address is all zero, the external address for a flow by `hop`, whose NIC is `link`.
/// Of those chosen by hand an overlay address always gets the same one (RFC 4787, REQ-2). There may
/// be none of the family.
#[inline(always)]
pub(super) fn choose<T: Tables>(
    tuple: &Tuple,
    hop: &Hop,
    link: &Link,
    tables: &T,
    chosen: &mut Flow,
) -> Result<(), Verdict> {
    let source = &tuple.source;
    let count = if source.is_v4() {
        link.v4_count
    } else {
        link.v6_count
    };
    if count == 0 {
        let mut way = Way::new(hop.link, tuple.destination);
        if source.is_v4() && u32::from_ne_bytes(hop.gateway) != 0 {
            way.toward = Address::v4(hop.gateway);
        }
        return if tables.masquerade(&way, chosen) {
            Ok(())
        } else {
            Err(Verdict::SlowSnat)
        };
    }
    // The mask is for the verifier.
    let slot = slot(source, count.into()) as usize & (link.v4.len() - 1);
    if source.is_v4() {
        chosen.address[..4].copy_from_slice(&link.v4[slot]);
    } else {
        chosen.address = link.v6[slot];
    }
    Ok(())
}

/// Which of `count` external addresses it is: what the `hash` expression of nf_tables computes of
/// the source with seed zero (net/netfilter/nft_hash.c), so that both datapaths agree.
#[inline(always)]
pub fn slot(source: &Address, count: u32) -> u32 {
    ((u64::from(hash(source)) * u64::from(count)) >> 32) as u32
}

/// Bob Jenkins's lookup3 as the kernel has it (include/linux/jhash.h).
#[inline(always)]
fn hash(address: &Address) -> u32 {
    let o = &address.octets;
    let bytes = |at: usize| [o[at], o[at + 1], o[at + 2], o[at + 3]];
    let word = |at: usize| u32::from_ne_bytes(bytes(at));
    // The kernel puts the last ones together byte by byte.
    let tail = |at: usize| u32::from_le_bytes(bytes(at));
    let len = if address.is_v4() { 4 } else { 16 };
    let start = 0xdead_beef_u32.wrapping_add(len);
    let (mut a, mut b, mut c) = (start, start, start);
    if address.is_v4() {
        a = a.wrapping_add(tail(0));
    } else {
        a = a.wrapping_add(word(0));
        b = b.wrapping_add(word(4));
        c = c.wrapping_add(word(8));
        (a, c, b) = mix(a, c, b, 4);
        (b, a, c) = mix(b, a, c, 6);
        (c, b, a) = mix(c, b, a, 8);
        (a, c, b) = mix(a, c, b, 16);
        (b, a, c) = mix(b, a, c, 19);
        (c, b, a) = mix(c, b, a, 4);
        a = a.wrapping_add(tail(12));
    }
    c = last(c, b, 14);
    a = last(a, c, 11);
    b = last(b, a, 25);
    c = last(c, b, 16);
    a = last(a, c, 4);
    b = last(b, a, 14);
    last(c, b, 24)
}

#[inline(always)]
fn mix(x: u32, y: u32, z: u32, bits: u32) -> (u32, u32, u32) {
    (
        x.wrapping_sub(y) ^ y.rotate_left(bits),
        y.wrapping_add(z),
        z,
    )
}

#[inline(always)]
fn last(x: u32, y: u32, bits: u32) -> u32 {
    (x ^ y).wrapping_sub(y.rotate_left(bits))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::abi::Prefix;
    use crate::craft::Ip;
    use crate::frame::Bytes;
    use crate::site::{FAMILIES, NIC, V4, address, ip, router, up};
    use crate::world::World;

    /// A router whose NIC has no address chosen by hand.
    fn masquerading() -> World {
        let mut world = router(true);
        let link = world.links.get_mut(&NIC).unwrap();
        (link.v4_count, link.v6_count) = (0, 0);
        world
    }

    #[test]
    fn without_a_chosen_address_it_is_that_of_the_masquerade() {
        for family in FAMILIES {
            let mut world = masquerading();
            let [peer, ..] = family.peers.map(ip);
            let [first, second] = family.servers.map(ip);
            let ask = |server| Ip::udp(peer, server, 5);
            assert_eq!(up(&mut world, &ask(first)), Err(Verdict::SlowSnat));
            let [general, special] = [7, 8].map(|last| {
                let mut taken = address(ip(family.external));
                taken.octets[3] = last;
                taken
            });
            let everywhere = Prefix::cidr(address(first), 0);
            world.masquerade = vec![
                (NIC, everywhere, general.octets),
                (NIC, Prefix::host(address(second)), special.octets),
                (NIC + 1, Prefix::host(address(first)), special.octets),
            ];
            for (server, taken) in [(first, general), (second, special)] {
                let out = up(&mut world, &ask(server)).unwrap();
                assert_eq!(address(out.source), taken, "{server}");
            }
        }
    }

    #[test]
    fn in_ipv4_the_gateway_chooses_the_address() {
        let mut world = masquerading();
        let [peer, ..] = V4.peers.map(ip);
        let [server, _] = V4.servers.map(ip);
        let gateway = [10, 9, 9, 9];
        let mut taken = address(ip(V4.external));
        taken.octets[3] = 9;
        let near = Prefix::host(Address::v4(gateway));
        world.masquerade = vec![(NIC, near, taken.octets)];
        world.routing = Box::new(move |_, _| {
            Ok(Hop {
                gateway,
                link: NIC,
                mtu: 1500,
                resolved: false,
                hardware: Bytes([0; 12]),
            })
        });
        let out = up(&mut world, &Ip::udp(peer, server, 5)).unwrap();
        assert_eq!(address(out.source), taken);
    }

    #[test]
    fn neighbours_are_spread_evenly() {
        for count in 1..=8 {
            let mut taken = [[0_u32; 8]; 2];
            for n in 0..=u8::MAX {
                let mut v6 = [0; 16];
                v6[15] = n;
                let sources = [Address::v4([100, 64, 0, n]), Address::v6(v6)];
                for (taken, source) in taken.iter_mut().zip(&sources) {
                    taken[slot(source, count) as usize] += 1;
                }
            }
            let share = 256 / count;
            for taken in taken {
                let (used, unused) = taken.split_at(count as usize);
                assert!(used.iter().all(|n| *n > share / 2), "{count}: {used:?}");
                assert!(unused.iter().all(|n| *n == 0), "{count}: {unused:?}");
            }
        }
    }
}

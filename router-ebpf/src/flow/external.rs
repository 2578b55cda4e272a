//! Which external address stands for an overlay address.

use crate::abi::{Address, Link};
use crate::verdict::Verdict;

/// Writes the external address of `link` for an overlay address, always the same for one (RFC 4787,
/// REQ-2), to `chosen`, which is all zero. It may have none of the family.
#[inline(always)]
pub(super) fn choose(link: &Link, source: &Address, chosen: &mut [u8; 16]) -> Result<(), Verdict> {
    let count = if source.is_v4() {
        link.v4_count
    } else {
        link.v6_count
    };
    if count == 0 {
        return Err(Verdict::SlowSnat);
    }
    // The mask is for the verifier.
    let slot = slot(source, count.into()) as usize & (link.v4.len() - 1);
    if source.is_v4() {
        chosen[..4].copy_from_slice(&link.v4[slot]);
    } else {
        *chosen = link.v6[slot];
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
    use super::*;

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

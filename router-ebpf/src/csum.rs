//! Incremental update of the Internet checksum.

/// What changed under a checksum: the difference of the sums over the 16-bit words, new less old.
/// In memory order, as the kernel's helpers take it; one's complement sums do not care (RFC 1071,
/// section 2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(pub u32);

impl Delta {
    /// Adds the change of one word. At an odd place of the sum swap the bytes of both.
    #[inline(always)]
    pub const fn word(self, from: [u8; 2], to: [u8; 2]) -> Self {
        // 16 bits and a carry for each of a few dozen words: no overflow.
        Self(self.0 + !u16::from_ne_bytes(from) as u32 + u16::from_ne_bytes(to) as u32)
    }

    /// Adds the change of words of four bytes, in memory's order.
    #[inline(always)]
    pub fn words<const N: usize>(self, from: [u32; N], to: [u32; N]) -> Self {
        const { assert!(N <= 16) };
        let mut sum = 0;
        let mut at = 0;
        while at < N {
            sum += u64::from(!from[at]) + u64::from(to[at]);
            at += 1;
        }
        // Halves count alike, and the carries of so few words fit.
        Self(self.0 + (sum & 0xffff) as u32 + (sum >> 16 & 0xffff) as u32 + (sum >> 32) as u32)
    }

    /// The checksum after the change (RFC 1624, equation 3).
    #[inline(always)]
    pub const fn apply(self, checksum: [u8; 2]) -> [u8; 2] {
        (!fold(self.0 + !u16::from_ne_bytes(checksum) as u32)).to_ne_bytes()
    }
}

/// The 16-bit one's complement sum of the halves of `sum`.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let folded = (sum & 0xffff) + (sum >> 16);
    ((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    /// The one's complement sum of big-endian words, by the book (RFC 1071).
    pub(crate) fn sum(bytes: &[u8]) -> u16 {
        let mut sum = 0_u64;
        for pair in bytes.chunks(2) {
            sum += u64::from(pair[0]) * 256 + u64::from(pair.get(1).copied().unwrap_or(0));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    #[test]
    fn the_example_of_rfc_1624() {
        // Section 4: here equation 2 would give ffff.
        let updated = Delta::default()
            .word([0x55, 0x55], [0x32, 0x85])
            .apply([0xdd, 0x2f]);
        assert_eq!(updated, [0x00, 0x00]);
    }

    proptest! {
        #[test]
        fn a_word_of_four_bytes_counts_as_two_of_two(from: [u32; 4], to: [u32; 4], checksum: [u8; 2]) {
            let halves = |words: [u32; 4]| {
                let bytes = words.map(u32::to_ne_bytes).concat();
                bytes.as_chunks::<2>().0.to_vec()
            };
            let each = halves(from)
                .into_iter()
                .zip(halves(to))
                .fold(Delta::default(), |delta, (from, to)| delta.word(from, to));
            let all = Delta::default().words(from, to);
            prop_assert_eq!(all.apply(checksum), each.apply(checksum));
        }

        #[test]
        fn an_updated_checksum_is_as_right_as_a_new_one(
            mut bytes in proptest::collection::vec(any::<u8>(), 4..100),
            position: prop::sample::Index,
            to: [u8; 2],
        ) {
            let len = bytes.len() & !1;
            bytes.truncate(len);
            bytes[..2].fill(0);
            let checksum = (!sum(&bytes)).to_be_bytes();
            bytes[..2].copy_from_slice(&checksum);

            let at = 2 + 2 * position.index(len / 2 - 1);
            let from = [bytes[at], bytes[at + 1]];
            bytes[at..at + 2].copy_from_slice(&to);
            bytes[..2].copy_from_slice(&Delta::default().word(from, to).apply(checksum));
            // All words zero is the one case that one's complement cannot tell from all ones.
            prop_assert!(sum(&bytes) == 0xffff || bytes[2..].iter().all(|byte| *byte == 0));
        }
    }
}

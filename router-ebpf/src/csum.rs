//! Incremental update of the Internet checksum.

/// The checksum after the 16-bit word `from` under it became `to` (RFC 1624, equation 3).
#[inline(always)]
pub const fn update(checksum: [u8; 2], from: [u8; 2], to: [u8; 2]) -> [u8; 2] {
    let sum = !u16::from_be_bytes(checksum) as u32
        + !u16::from_be_bytes(from) as u32
        + u16::from_be_bytes(to) as u32;
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    (!(folded as u16)).to_be_bytes()
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
        let updated = update([0xdd, 0x2f], [0x55, 0x55], [0x32, 0x85]);
        assert_eq!(updated, [0x00, 0x00]);
    }

    proptest! {
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
            bytes[..2].copy_from_slice(&update(checksum, from, to));
            // All words zero is the one case that one's complement cannot tell from all ones.
            prop_assert!(sum(&bytes) == 0xffff || bytes[2..].iter().all(|byte| *byte == 0));
        }
    }
}

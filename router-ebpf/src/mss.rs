//! The maximum segment size option of a TCP SYN (RFC 9293, section 3.7.1).

use crate::packet::{Bytes, Frame, Sum};
use crate::verdict::Verdict;

const END: u8 = 0;
const NOP: u8 = 1;
const MSS: u8 = 2;
/// Options that may stand in 40 bytes, were each one byte long.
const MAX_OPTIONS: u32 = 40;

/// The largest MSS that fits into `mtu` bytes, without IP options and extension headers.
#[inline(always)]
pub const fn for_mtu(mtu: u32, ip_header_len: u32) -> u16 {
    let mss = mtu.saturating_sub(ip_header_len + 20);
    if mss > u16::MAX as u32 {
        u16::MAX
    } else {
        mss as u16
    }
}

/// Lowers the MSS option of the TCP header at `tcp`, `header_len` bytes long, to `limit`. A lower
/// one and a missing one stay as they are: an absent option means 536 or 1220 bytes.
#[inline(always)]
pub fn clamp<F: Frame>(
    frame: &mut F,
    tcp: u32,
    header_len: u32,
    limit: u16,
) -> Result<(), Verdict> {
    let Some(offset) = find(frame, tcp, header_len) else {
        return Ok(());
    };
    let Some(Bytes(old)) = frame.read::<2>(tcp + offset) else {
        return Ok(());
    };
    if u16::from_be_bytes(old) <= limit {
        return Ok(());
    }
    let new = limit.to_be_bytes();
    if offset % 2 == 0 {
        frame.replace_checksum(tcp + 16, old, new)?;
    } else {
        // The value straddles two words of the sum: swapped bytes give the same difference
        // (RFC 1071, section 2).
        frame.replace_checksum(tcp + 16, [old[1], old[0]], [new[1], new[0]])?;
    }
    frame.write(tcp + offset, &Bytes(new), Sum::Kept)
}

/// Offset of the MSS value from the start of the TCP header.
#[inline(always)]
fn find<F: Frame>(frame: &F, tcp: u32, header_len: u32) -> Option<u32> {
    let mut offset = 20;
    for _ in 0..MAX_OPTIONS {
        if offset >= header_len {
            return None;
        }
        let Bytes([kind]) = frame.read(tcp + offset)?;
        match kind {
            END => return None,
            NOP => offset += 1,
            _ => {
                let Bytes([len]) = frame.read(tcp + offset + 1)?;
                let end = offset + u32::from(len);
                if len < 2 || end > header_len {
                    return None;
                }
                if kind == MSS {
                    return if len == 4 { Some(offset + 2) } else { None };
                }
                offset = end;
            }
        }
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::abi::Side;
    use crate::csum::tests::sum;
    use crate::memory::Memory;
    use proptest::prelude::*;

    /// A TCP header with these options and a checksum over itself.
    fn header(options: &[u8]) -> Memory {
        let mut bytes = vec![0x9c, 0x40, 0x01, 0xbb, 0, 0, 0, 1, 0, 0, 0, 2];
        bytes.extend([5 + options.len().div_ceil(4) as u8, SYN_FLAG, 0xff, 0xff]);
        bytes[12] <<= 4;
        bytes.extend([0; 4]);
        bytes.extend(options);
        bytes.resize(bytes.len().next_multiple_of(4), END);
        let checksum = (!sum(&bytes)).to_be_bytes();
        bytes[16..18].copy_from_slice(&checksum);
        Memory::new(Side::Overlay, bytes, 0)
    }

    const SYN_FLAG: u8 = crate::packet::SYN;

    fn clamped(options: &[u8], limit: u16) -> Vec<u8> {
        let mut frame = header(options);
        let len = frame.bytes.len() as u32;
        clamp(&mut frame, 0, len, limit).unwrap();
        assert_eq!(sum(&frame.bytes), 0xffff, "checksum");
        frame.bytes[20..20 + options.len()].to_vec()
    }

    #[test]
    fn the_option_is_found_among_others() {
        let limit = 1200_u16.to_be_bytes();
        for before in [
            &[][..],
            &[NOP],
            &[NOP, NOP, NOP],
            &[4, 2],
            &[8, 10, 1, 2, 3, 4, 5, 6, 7, 8],
            &[3, 3, 7],
            &[NOP; 36],
        ] {
            let options = [before, &[MSS, 4, 0x05, 0xb4]].concat();
            let wanted = [before, &[MSS, 4], &limit].concat();
            assert_eq!(clamped(&options, 1200), wanted);
        }
    }

    #[test]
    fn what_is_lower_missing_or_odd_stays() {
        for options in [
            &[MSS, 4, 0x04, 0xb0][..],
            &[MSS, 4, 0x00, 0x00],
            &[],
            &[4, 2, NOP, NOP],
            // Behind the end of the list, of a wrong length, beyond the header.
            &[END, 0, 0, 0, MSS, 4, 0x05, 0xb4],
            &[MSS, 3, 0x05, 0xb4],
            &[MSS, 6, 0x05, 0xb4, 0, 0, 0, 0],
            &[8, 0, MSS, 4, 0x05, 0xb4, 0, 0],
            &[8, 1, MSS, 4, 0x05, 0xb4, 0, 0],
            &[NOP, MSS, 4, 0x05],
            &[NOP, NOP, NOP, MSS],
            &[8, 200, MSS, 4, 0x05, 0xb4, 0, 0],
        ] {
            assert_eq!(clamped(options, 1200), options);
        }
    }

    #[test]
    fn an_mtu_without_room_gives_zero() {
        assert_eq!(for_mtu(1420, 20), 1380);
        assert_eq!(for_mtu(1420, 40), 1360);
        assert_eq!(for_mtu(30, 20), 0);
        assert_eq!(for_mtu(u32::MAX, 20), u16::MAX);
    }

    proptest! {
        #[test]
        fn the_mss_is_never_raised_and_nothing_else_changes(
            options in proptest::collection::vec(any::<u8>(), 0..=40),
            limit: u16,
        ) {
            let before = header(&options);
            let mut after = before.clone();
            let len = before.bytes.len() as u32;
            clamp(&mut after, 0, len, limit).unwrap();
            prop_assert_eq!(sum(&after.bytes), 0xffff);
            let found = find(&before, 0, len);
            prop_assert_eq!(found, find(&after, 0, len));
            for (at, (old, new)) in before.bytes.iter().zip(&after.bytes).enumerate() {
                let of_mss = found.is_some_and(|f| (f..f + 2).contains(&(at as u32)));
                prop_assert!(old == new || of_mss || (16..18).contains(&at));
            }
            if let Some(found) = found {
                let value = |frame: &Memory| u16::from_be_bytes(frame.read(found).unwrap().0);
                prop_assert_eq!(value(&after), value(&before).min(limit));
            }
        }
    }
}

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

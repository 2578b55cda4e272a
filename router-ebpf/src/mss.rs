//! The maximum segment size option of a TCP SYN (RFC 9293, section 3.7.1).

use core::hint::black_box;

use crate::abi::{Prefix, Settings, Side};
use crate::csum::Delta;
use crate::forward::Forward;
use crate::frame::{Bytes, Covers, Frame, Sum};
use crate::packet::Packet;
use crate::tables::Tables;
use crate::verdict::Verdict;

const END: u8 = 0;
const NOP: u8 = 1;
const MSS: u8 = 2;
/// Length in bytes of a TCP header without options (RFC 9293, section 3.1).
const HEADER: u32 = 20;

/// Most bytes of TCP options.
const MAX_OPTIONS: u32 = 40;

/// Room to look for an option.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The options; as many as a mask lets an index reach, and those of an option behind it.
    bytes: Bytes<68>,
    /// Where the next one begins. In memory, where the verifier does not follow it: all steps look
    /// alike to it then.
    next: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            bytes: Bytes([0; 68]),
            next: 0,
        }
    }
}

impl Options {
    /// The four bytes at a place, of which the lowest six bits count.
    #[inline(always)]
    fn at(&self, at: u32) -> [u8; 4] {
        // The verifier must see the very index that the mask has passed.
        let at = black_box(at as usize) & 63;
        let bytes = &self.bytes.0;
        [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]
    }

    #[inline(always)]
    fn next(&self) -> u32 {
        // SAFETY: a reference is valid.
        unsafe { (&raw const self.next).read_volatile() }
    }

    #[inline(always)]
    fn set_next(&mut self, at: u32) {
        // SAFETY: as above.
        unsafe { (&raw mut self.next).write_volatile(at) }
    }
}

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

/// The largest MSS that the SYN `packet` may announce. The segments that the announcement allows come the
/// other way: every MTU on both sides counts.
#[inline(always)]
pub fn limit<T: Tables>(
    side: Side,
    packet: &Packet,
    forward: &Forward,
    tables: &T,
) -> Result<u16, Verdict> {
    let settings = tables.settings().ok_or(Verdict::DropInternal)?;
    let tuple = &packet.tuple;
    let (near, subnet) = match side {
        Side::Overlay => (forward.link, &tuple.destination),
        Side::Subnet => (tables.ingress(), &tuple.source),
    };
    let link = tables.link(near).ok_or(Verdict::SlowOtherLink)?;
    let mut smallest = settings.mtu.min(link.mtu);
    if let Some(route) = tables.route(&Prefix::host(*subnet)) {
        smallest = smallest.min(route.mtu());
    }
    if settings.flags & Settings::FIB_MTU != 0 {
        smallest = smallest.min(forward.mtu);
    }
    Ok(for_mtu(smallest, packet.header_len))
}

/// Lowers the MSS option of the TCP header at `tcp`, `header_len` bytes long, to `limit`. A lower
/// one and a missing one stay as they are: an absent option means 536 or 1220 bytes. `options` is
/// room for the work: the stack of a program has none to index.
#[inline(always)]
pub fn clamp<F: Frame>(
    frame: &mut F,
    tcp: u32,
    header_len: u32,
    limit: u16,
    options: &mut Options,
) -> Result<(), Verdict> {
    let len = header_len.wrapping_sub(HEADER);
    if !frame.read_into(tcp + HEADER, len, &mut options.bytes) {
        return Ok(());
    }
    let Some((at, old)) = find(options, len) else {
        return Ok(());
    };
    if u16::from_be_bytes(old) <= limit {
        return Ok(());
    }
    let new = limit.to_be_bytes();
    let delta = if at % 2 == 0 {
        Delta::default().word(old, new)
    } else {
        // The value straddles two words of the sum.
        Delta::default().word([old[1], old[0]], [new[1], new[0]])
    };
    frame.replace_checksum(tcp + 16, delta, Covers::Payload)?;
    frame.write(tcp + HEADER + at, &Bytes(new), Sum::Kept)
}

/// Place and value of the MSS in the first `len` bytes of `options`.
#[inline(always)]
fn find(options: &mut Options, len: u32) -> Option<(u32, [u8; 2])> {
    options.set_next(0);
    // As many as there may be if each is a NOP.
    for _ in 0..MAX_OPTIONS {
        let at = options.next();
        if at >= len {
            return None;
        }
        let [kind, length, value @ ..] = options.at(at);
        let length = u32::from(length);
        if kind == END || (kind != NOP && length < 2) {
            return None;
        }
        let end = at + if kind == NOP { 1 } else { length };
        if kind == MSS {
            return (length == 4 && end <= len).then_some((at + 2, value));
        }
        options.set_next(end);
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
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
        clamp(&mut frame, 0, len, limit, &mut Options::default()).unwrap();
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
            clamp(&mut after, 0, len, limit, &mut Options::default()).unwrap();
            prop_assert_eq!(sum(&after.bytes), 0xffff);
            let mss = |frame: &Memory| {
                let mut room = Options::default();
                room.bytes.0[..frame.bytes.len() - 20].copy_from_slice(&frame.bytes[20..]);
                find(&mut room, len - 20)
            };
            let found = mss(&before);
            prop_assert_eq!(found.map(|f| f.0), mss(&after).map(|f| f.0));
            for (at, (old, new)) in before.bytes.iter().zip(&after.bytes).enumerate() {
                let of_mss = found.is_some_and(|f| (f.0 + 20..f.0 + 22).contains(&(at as u32)));
                prop_assert!(old == new || of_mss || (16..18).contains(&at));
            }
            let value = |frame: &Memory| mss(frame).map(|f| u16::from_be_bytes(f.1));
            prop_assert_eq!(value(&after), value(&before).map(|value| value.min(limit)));
        }
    }
}

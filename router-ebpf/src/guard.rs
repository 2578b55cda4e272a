//! The uplink's guard: which datagrams to our UDP port cannot be WireGuard messages for us.
//!
//! It drops what the engine would refuse for the same reason, before the stack spends anything on
//! it, and lets pass whatever it does not understand. It sees the wire: Ethernet with up to two VLAN
//! tags, IPv4 with or without options, IPv6 without extension headers, UDP, no fragments.

#[cfg(test)]
mod tests;

use core::mem::{align_of, offset_of, size_of};

use crate::abi::Address;
use crate::verdict::verdicts;

/// Program for frames in one or more buffers (Linux 5.18), so that NICs with a large MTU take it.
pub const UPLINK_GUARD: &str = "sluice_uplink_guard";
/// The same program for kernels that know frames in one buffer only.
pub const UPLINK_GUARD_LINEAR: &str = "sluice_guard_linear";

/// Map of one [`Settings`] (array).
pub const GUARD_SETTINGS: &str = "GUARD_SETTINGS";
/// Map of the addresses that are the router's own (hash from [`Address`] to a `u32` that means
/// nothing). A datagram to an address that is not in it passes.
pub const GUARD_ADDRESSES: &str = "GUARD_ADDRESSES";
/// Map of the receiver indices in use: one bit for each value of an index's upper 24 bits (array of
/// `u64`, see [`place`]). It has room for all, so it is never full.
pub const GUARD_INDICES: &str = "GUARD_INDICES";
/// Map of the sources of initiations (LRU hash from [`Datagram::source`] to what [`spend`] keeps).
pub const GUARD_SOURCES: &str = "GUARD_SOURCES";
/// Map of the counters (per-CPU array of `u64`, one for each [`Judgement`]).
pub const GUARD_COUNTERS: &str = "GUARD_COUNTERS";

/// Most addresses of the router.
pub const MAX_ADDRESSES: usize = 1024;
/// Words of [`GUARD_INDICES`].
pub const INDEX_WORDS: usize = (1 << 24) / u64::BITS as usize;
/// Sources of initiations that are remembered; the one that was quiet for longest gives way.
pub const MAX_SOURCES: usize = 1 << 14;
/// Slots of [`GUARD_COUNTERS`].
pub const MAX_COUNTERS: usize = Judgement::ALL.len();

/// A source may send an initiation this often, in ns: 20 per second, as the limiter of the engine
/// and that of the kernel's WireGuard have it.
pub const INITIATION_NS: u64 = 1_000_000_000 / 20;
/// And so many at once. Many peers may stand behind one address, and all of them begin anew when the
/// router was away; the limiter's own, smaller burst holds only for sources that returned a cookie.
pub const INITIATION_BURST: u64 = 256;

verdicts! {
    /// What became of a frame. The order is part of the map ABI.
    enum Judgement;
    PassUnrelated Pass "pass_unrelated" "Not a whole datagram to the listen port at an address of the router.";
    PassWireguard Pass "pass_wireguard" "May be a WireGuard message for the router.";
    DropMalformed Drop "drop_malformed" "A datagram to the listen port that is no WireGuard message: type, reserved bytes or length.";
    DropIndex Drop "drop_index" "A message with a receiver index that no peer has.";
    DropInitiation Drop "drop_initiation" "A handshake initiation of a source that has sent too many.";
    PassOther Pass "pass_other" "A datagram to the listen port that is no WireGuard message, for the daemon has asked for such.";
}

/// What the guard must know. All zero: everything passes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// [`Settings::INDICES`], [`Settings::OTHERS`].
    pub flags: u32,
    /// The listen port, big-endian; zero for none.
    pub port: [u8; 2],
    /// Zero.
    pub reserved: [u8; 2],
}

impl Settings {
    /// Flag: [`GUARD_INDICES`] has every index in use, so what is not in it is nobody's.
    pub const INDICES: u32 = 1 << 0;
    /// Flag: what is no WireGuard message passes.
    pub const OTHERS: u32 = 1 << 1;
}

const _: () = {
    assert!(size_of::<Settings>() == 8 && align_of::<Settings>() == 4);
    assert!(offset_of!(Settings, flags) == 0);
    assert!(offset_of!(Settings, port) == 4);
    assert!(offset_of!(Settings, reserved) == 6);
};

#[cfg(all(feature = "user", not(target_arch = "bpf")))]
// SAFETY: `repr(C)`, integers and byte arrays only, without padding (asserted above).
unsafe impl aya::Pod for Settings {}

/// A frame in place.
pub trait Wire {
    /// `N` bytes at `at`, counted from the Ethernet header, if the frame has them within reach.
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]>;
}

/// The maps, and a clock.
pub trait Tables {
    /// See [`GUARD_SETTINGS`].
    fn settings(&self) -> Settings;

    /// Whether an address is in [`GUARD_ADDRESSES`].
    fn is_ours(&self, address: &Address) -> bool;

    /// A word of [`GUARD_INDICES`].
    fn index_word(&self, word: u32) -> Option<u64>;

    /// Takes one initiation from a source's budget by [`spend`]; false when none is left. Whoever
    /// cannot tell lets it pass.
    fn may_initiate(&self, source: u64) -> bool;
}

/// Where [`GUARD_INDICES`] has the upper 24 bits of a receiver index: word and bit.
#[inline(always)]
pub const fn place(upper: u32) -> (u32, u64) {
    (upper / u64::BITS, 1 << (upper % u64::BITS))
}

/// Takes one initiation from a budget. `paid` is when those that were taken so far are paid off, in
/// ns of the clock of `now`, zero for a new source. Yields the same after this one; `None` when too
/// many are not paid off yet. (The generic cell rate algorithm: a token bucket in one word.)
#[inline(always)]
pub const fn spend(paid: u64, now: u64) -> Option<u64> {
    let from = if paid > now { paid } else { now };
    if from - now > (INITIATION_BURST - 1) * INITIATION_NS {
        return None;
    }
    Some(from + INITIATION_NS)
}

/// A UDP datagram, not a fragment, as its headers tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Who sent it: the IPv4 address, or the upper 64 bits of the IPv6 address, for one host may
    /// choose the others freely.
    pub source: u64,
    /// Destination address.
    pub destination: Address,
    /// Destination port, big-endian.
    pub port: [u8; 2],
    /// Where its payload begins in the frame.
    pub payload: usize,
    /// Bytes of payload. The stack drops a datagram that has fewer.
    pub len: u16,
}

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xdd];
const UDP: u8 = 17;
/// Bytes of a UDP header.
const UDP_HEADER: u16 = 8;

/// The datagram in a frame; `None` for everything else.
#[inline(always)]
pub fn datagram(wire: &impl Wire) -> Option<Datagram> {
    let mut at = 12;
    let mut kind: [u8; 2] = wire.read(at)?;
    for _ in 0..2 {
        // IEEE 802.1Q and 802.1ad.
        if kind == [0x81, 0x00] || kind == [0x88, 0xa8] {
            at += 4;
            kind = wire.read(at)?;
        }
    }
    let ip = at + 2;
    let (source, destination, udp) = match kind {
        IPV4 => {
            let header: [u8; 20] = wire.read(ip)?;
            let len = usize::from(header[0] & 0x0f) * 4;
            let fragment = header[6] & 0x3f != 0 || header[7] != 0;
            if header[0] >> 4 != 4 || len < header.len() || header[9] != UDP || fragment {
                return None;
            }
            let [.., s0, s1, s2, s3, d0, d1, d2, d3] = header;
            let source = u32::from_be_bytes([s0, s1, s2, s3]);
            (u64::from(source), Address::v4([d0, d1, d2, d3]), ip + len)
        }
        IPV6 => {
            let header: [u8; 40] = wire.read(ip)?;
            if header[0] >> 4 != 6 || header[6] != UDP {
                return None;
            }
            let (_, addresses) = header.split_at(8);
            let (source, destination) = addresses.split_at(16);
            (
                u64::from_be_bytes(*source.first_chunk()?),
                Address::v6(*destination.first_chunk()?),
                ip + header.len(),
            )
        }
        _ => return None,
    };
    let header: [u8; 8] = wire.read(udp)?;
    let [_, _, p0, p1, l0, l1, ..] = header;
    Some(Datagram {
        source,
        destination,
        port: [p0, p1],
        payload: udp + header.len(),
        len: u16::from_be_bytes([l0, l1]).checked_sub(UDP_HEADER)?,
    })
}

/// What a datagram's first bytes make it (WireGuard paper, section 5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// A handshake initiation.
    Initiation,
    /// A response, cookie reply or data message, with the place of its receiver index.
    Indexed(usize),
}

/// Tells messages by type, reserved bytes and length; `None` when it is none. Data of any length
/// from 32 bytes on: not everybody pads to 16 bytes, and the paper does not ask it of receivers.
#[inline(always)]
pub const fn message(head: [u8; 4], len: u16) -> Option<Message> {
    match (head, len) {
        ([1, 0, 0, 0], 148) => Some(Message::Initiation),
        ([2, 0, 0, 0], 92) => Some(Message::Indexed(8)),
        ([3, 0, 0, 0], 64) => Some(Message::Indexed(4)),
        ([4, 0, 0, 0], 32..) => Some(Message::Indexed(4)),
        _ => None,
    }
}

/// Judges a frame.
#[inline(always)]
pub fn judge(wire: &impl Wire, tables: &impl Tables) -> Judgement {
    // What cannot be read is not judged.
    consider(wire, tables).unwrap_or(Judgement::PassUnrelated)
}

#[inline(always)]
fn consider(wire: &impl Wire, tables: &impl Tables) -> Option<Judgement> {
    let datagram = datagram(wire)?;
    let settings = tables.settings();
    let listens = settings.port != [0; 2] && datagram.port == settings.port;
    if !listens || !tables.is_ours(&datagram.destination) {
        return None;
    }
    let other = if settings.flags & Settings::OTHERS != 0 {
        Judgement::PassOther
    } else {
        Judgement::DropMalformed
    };
    if datagram.len < 4 {
        return Some(other);
    }
    let judgement = match message(wire.read(datagram.payload)?, datagram.len) {
        None => other,
        Some(Message::Initiation) if !tables.may_initiate(datagram.source) => {
            Judgement::DropInitiation
        }
        Some(Message::Indexed(at)) if settings.flags & Settings::INDICES != 0 => {
            let index = u32::from_le_bytes(wire.read(datagram.payload + at)?);
            let (word, bit) = place(index >> 8);
            if tables.index_word(word)? & bit == 0 {
                Judgement::DropIndex
            } else {
                Judgement::PassWireguard
            }
        }
        Some(_) => Judgement::PassWireguard,
    };
    Some(judgement)
}

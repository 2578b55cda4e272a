//! What the programs send back for a packet that they do not carry.

use crate::abi::{Settings, Side};
use crate::csum::fold;
use crate::forward::{Answer, Exit, Forward};
use crate::frame::{Bytes, Frame, Sum};
use crate::icmp::{self, TTL};
use crate::opening;
use crate::packet::{ACK, FIN, Packet, RST, SYN, TCP, Transport};
use crate::tables::Tables;
use crate::verdict::Verdict;

/// Length in bytes of a TCP header without options.
const TCP_HEADER: u32 = 20;

/// Whether an answer to `packet` may be sent: never to an ICMP error or a later fragment (RFC 1812,
/// section 4.3.2.7; RFC 4443, section 2.4), and not too many. Asked once for a packet.
#[inline(always)]
pub fn may_send<T: Tables>(packet: &Packet, tables: &T) -> bool {
    !matches!(packet.transport, Transport::Error | Transport::Fragment) && tables.may_send_error()
}

/// Has `packet`, which no rule lets through, answered in `forward` if the settings say so. An error
/// is what becomes of it otherwise.
#[inline(always)]
pub fn reject<T: Tables>(
    side: Side,
    packet: &Packet,
    tables: &T,
    forward: &mut Forward,
) -> Result<(), Verdict> {
    let settings = tables.settings().ok_or(Verdict::DropInternal)?;
    // An RST is never answered (RFC 9293, section 3.10.7.1). Only segments have flags.
    if settings.flags & Settings::REJECT == 0 || packet.tcp_flags & RST != 0 {
        return Err(Verdict::DropPolicy);
    }
    // Perhaps of a flow that the other end has opened, and that nobody remembers: one more packet of it
    // from there, and it goes on.
    if opening::other_end_may(side, packet, tables, settings) {
        return Err(Verdict::DropPolicy);
    }
    // To the router itself or a broadcast address: the kernel knows which, judges it by the same rules,
    // and never answers a broadcast (RFC 1122, section 3.2.2).
    if side == Side::Overlay
        && let Err(Verdict::SlowToRouter) = tables.next_hop(packet, packet.header_len, settings)
    {
        return Err(Verdict::SlowToRouter);
    }
    if !may_send(packet, tables) {
        return Err(Verdict::DropPolicy);
    }
    forward.exit = Exit::Answer;
    forward.verdict = Verdict::RejectPolicy;
    forward.answer = if packet.transport == Transport::Tcp && !packet.is_fragment {
        Answer::Reset
    } else {
        Answer::Prohibited
    };
    Ok(())
}

/// Makes of `frame`, which holds `packet` as it came, the answer to its sender, in the name of its
/// destination. Afterwards it leaves by the interface that it came in by.
#[inline(always)]
pub fn send<F: Frame>(packet: &Packet, forward: &Forward, frame: &mut F) -> Result<(), Verdict> {
    match forward.answer {
        Answer::Reset => reset(packet, frame)?,
        answer => icmp::error(packet, answer, forward.mtu, frame)?,
    }
    frame.swap_ethernet()
}

/// Makes of the segment `packet` the RST that its sender believes (RFC 9293, section 3.10.7.1). It has
/// neither IPv4 options nor IPv6 extension headers.
#[inline(always)]
fn reset<F: Frame>(packet: &Packet, frame: &mut F) -> Result<(), Verdict> {
    let len = packet.header_len + TCP_HEADER;
    if frame.len() > len || packet.gso_size != 0 {
        frame.trim(len)?;
    }
    if packet.is_v4() {
        reset_v4(packet, frame)?;
    } else {
        reset_v6(packet, frame)?;
    }
    reset_tcp(packet, frame)
}

/// Writes the IPv4 header of an RST: one that no router cuts.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn reset_v4<F: Frame>(packet: &Packet, frame: &mut F) -> Result<(), Verdict> {
    let mut bytes = Bytes([0; 20]);
    let header = &mut bytes.0;
    header[..4].copy_from_slice(&[0x45, 0, 0, 20 + TCP_HEADER as u8]);
    header[4..8].copy_from_slice(&[0, 0, 0x40, 0]);
    header[8..12].copy_from_slice(&[TTL, TCP, 0, 0]);
    header[12..16].copy_from_slice(&packet.tuple.destination.v4_octets());
    header[16..].copy_from_slice(&packet.tuple.source.v4_octets());
    let checksum = !folded(sum(header));
    header[10..12].copy_from_slice(&checksum.to_ne_bytes());
    frame.write(0, &bytes, Sum::Changed)
}

/// Writes the IPv6 header of an RST.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn reset_v6<F: Frame>(packet: &Packet, frame: &mut F) -> Result<(), Verdict> {
    let mut bytes = Bytes([0; 40]);
    let header = &mut bytes.0;
    header[..4].copy_from_slice(&[0x60, 0, 0, 0]);
    header[4..8].copy_from_slice(&[0, TCP_HEADER as u8, TCP, TTL]);
    header[8..24].copy_from_slice(&packet.tuple.destination.octets);
    header[24..].copy_from_slice(&packet.tuple.source.octets);
    frame.write(0, &bytes, Sum::Changed)
}

/// Writes the TCP header of an RST.
///
/// A device may compute the checksum once more (CHECKSUM_PARTIAL): the segment came so, and no helper
/// takes that order back. It starts from the field's own value, which must be the sum over the
/// pseudo-header then, and without such an order must be the checksum. Both are the same number by
/// the choice of the window, which nobody reads in an RST.
#[cfg_attr(target_arch = "bpf", inline(never))]
fn reset_tcp<F: Frame>(packet: &Packet, frame: &mut F) -> Result<(), Verdict> {
    let [sequence, acknowledged] = packet.sequence;
    let (first, next, flags) = if packet.tcp_flags & ACK != 0 {
        (acknowledged, 0, RST)
    } else {
        let payload = packet.len - packet.transport_at - packet.transport_len;
        let syn = u32::from(packet.tcp_flags & SYN != 0);
        let fin = u32::from(packet.tcp_flags & FIN != 0);
        let next = sequence.wrapping_add(payload).wrapping_add(syn + fin);
        (0, next, RST | ACK)
    };
    let mut bytes = Bytes([0; 20]);
    let header = &mut bytes.0;
    header[..2].copy_from_slice(&packet.tuple.ports[1]);
    header[2..4].copy_from_slice(&packet.tuple.ports[0]);
    header[4..8].copy_from_slice(&first.to_be_bytes());
    header[8..12].copy_from_slice(&next.to_be_bytes());
    header[12..14].copy_from_slice(&[(TCP_HEADER as u8 / 4) << 4, flags]);
    // Of an IPv4 address all but the first four bytes are zero.
    let pseudo = sum(&packet.tuple.source.octets)
        + sum(&packet.tuple.destination.octets)
        + sum(&[0, TCP, 0, TCP_HEADER as u8]);
    let pseudo = folded(pseudo);
    // In one's complement the complement is the negative.
    let window = fold(2 * u32::from(!pseudo) + u32::from(!folded(sum(header))));
    header[14..16].copy_from_slice(&window.to_ne_bytes());
    header[16..18].copy_from_slice(&pseudo.to_ne_bytes());
    frame.write(packet.header_len, &bytes, Sum::Changed)
}

/// The sum over whole words of 32 bits.
#[inline(always)]
fn sum<const N: usize>(bytes: &[u8; N]) -> u64 {
    let (words, _) = bytes.as_chunks::<4>();
    let mut sum = 0;
    for word in words {
        sum += u64::from(u32::from_ne_bytes(*word));
    }
    sum
}

/// The 16-bit one's complement sum of all quarters of `sum`, which is of a few words.
#[inline(always)]
fn folded(sum: u64) -> u16 {
    fold(u32::from(fold(sum as u32)) + (sum >> 32) as u32)
}

#[cfg(test)]
mod tests;

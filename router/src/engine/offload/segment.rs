//! Cuts what the TUN device delivers into packets ready for encryption: super-packets into
//! segments, checksums completed, padded as WireGuard asks.
//!
//! Everything happens in the read buffer. A segment's headers are written over the end of the
//! segment before it, which has been sealed already, so that each packet lies in one piece and no
//! payload is copied.

use crate::engine::offload::checksum;
use crate::engine::offload::ip;
use crate::engine::offload::vnet::{self, Gso};
use crate::wireguard::Packets;

/// Bytes that must follow a packet in its buffer: room for the padding of the last segment.
pub(crate) const SLACK: usize = PADDING;

/// Inner packets are padded to a multiple of this many bytes, but not beyond the MTU (WireGuard
/// paper, section 5.4.6; `calculate_skb_padding` in the kernel).
const PADDING: usize = 16;

/// Longest headers of a super-packet, in bytes: IPv6 with extension headers, TCP with options.
const HEADERS: usize = 192;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// A packet that cannot be cut as its virtio header asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// The packets that one read from the TUN device stands for.
#[derive(Debug)]
pub(crate) struct Segments<'a> {
    buffer: &'a mut [u8],
    mtu: usize,
    /// What padding has overwritten: offset, bytes, how many.
    overwritten: Option<(usize, [u8; PADDING], usize)>,
    plan: Plan,
}

/// On the stack once for each read; a box would be an allocation.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
enum Plan {
    Done,
    Whole(usize),
    Cut(Cut),
}

#[derive(Debug)]
struct Cut {
    headers: [u8; HEADERS],
    /// Length of all headers.
    header: usize,
    /// Offset of the transport header.
    start: usize,
    protocol: u8,
    /// Payload bytes of a segment.
    size: usize,
    /// Offset of the next segment's payload, and of the end.
    at: usize,
    end: usize,
    index: u16,
}

impl<'a> Segments<'a> {
    /// `buffer` holds a packet of `length` bytes and at least [`SLACK`] more.
    pub(crate) fn new(
        header: vnet::Header,
        buffer: &'a mut [u8],
        length: usize,
        mtu: usize,
    ) -> Result<Self, Malformed> {
        if buffer.len() < length + SLACK || length < ip::V4_HEADER {
            return Err(Malformed);
        }
        let plan = match header.gso {
            Gso::None => {
                if let Some((start, offset)) = header.checksum {
                    complete_checksum(&mut buffer[..length], start.into(), offset.into())?;
                }
                Plan::Whole(length)
            }
            _ => Plan::Cut(Cut::new(header, &buffer[..length])?),
        };
        Ok(Self {
            buffer,
            mtu,
            overwritten: None,
            plan,
        })
    }

    /// Pads the packet that ends at `end`, which may be in the middle of what comes later.
    fn pad(&mut self, begin: usize, end: usize) -> usize {
        let length = end - begin;
        let padded = length.next_multiple_of(PADDING).min(self.mtu.max(length));
        let extra = padded - length;
        if extra > 0 {
            let mut saved = [0; PADDING];
            let room = &mut self.buffer[end..end + extra];
            saved[..extra].copy_from_slice(room);
            room.fill(0);
            self.overwritten = Some((end, saved, extra));
        }
        begin + padded
    }
}

impl Packets for Segments<'_> {
    fn next(&mut self) -> Option<&[u8]> {
        if let Some((at, bytes, count)) = self.overwritten.take() {
            self.buffer[at..at + count].copy_from_slice(&bytes[..count]);
        }
        let (begin, end) = match &mut self.plan {
            Plan::Done => return None,
            Plan::Whole(length) => (0, *length),
            Plan::Cut(cut) => cut.next(self.buffer)?,
        };
        if matches!(self.plan, Plan::Whole(_)) {
            self.plan = Plan::Done;
        }
        let padded = self.pad(begin, end);
        Some(&self.buffer[begin..padded])
    }
}

/// Completes a checksum of which the kernel left the folded pseudo-header sum in the field.
pub(crate) fn complete_checksum(
    packet: &mut [u8],
    start: usize,
    offset: usize,
) -> Result<(), Malformed> {
    let field = start + offset;
    if field + 2 > packet.len() {
        return Err(Malformed);
    }
    let mut sum = checksum::finish(checksum::add(0, &packet[start..]));
    if offset == 6 && sum == [0, 0] {
        sum = [0xff, 0xff];
    }
    packet[field..field + 2].copy_from_slice(&sum);
    Ok(())
}

impl Cut {
    fn new(header: vnet::Header, packet: &[u8]) -> Result<Self, Malformed> {
        // The virtio header's own idea of the header length is a hint at best: read the packet.
        let (start, _) = header.checksum.ok_or(Malformed)?;
        let start = usize::from(start);
        let least = match packet[0] >> 4 {
            4 => usize::from(packet[0] & 15) * 4,
            6 => ip::V6_HEADER,
            _ => return Err(Malformed),
        };
        if start < least || least < ip::V4_HEADER {
            return Err(Malformed);
        }
        let (protocol, length) = match header.gso {
            Gso::Udp => (ip::UDP, 8),
            _ => {
                let words = packet.get(start + 12).ok_or(Malformed)? >> 4;
                (ip::TCP, usize::from(words) * 4)
            }
        };
        let whole = start + length;
        let size = usize::from(header.gso_size);
        if (protocol == ip::TCP && length < 20)
            || whole > HEADERS
            || whole >= packet.len()
            || size == 0
        {
            return Err(Malformed);
        }
        let mut headers = [0; HEADERS];
        headers[..whole].copy_from_slice(&packet[..whole]);
        Ok(Self {
            headers,
            header: whole,
            start,
            protocol,
            size,
            at: whole,
            end: packet.len(),
            index: 0,
        })
    }

    /// Puts the next segment in place and says where it is.
    fn next(&mut self, buffer: &mut [u8]) -> Option<(usize, usize)> {
        if self.at >= self.end {
            return None;
        }
        let size = self.size.min(self.end - self.at);
        let begin = self.at - self.header;
        let end = self.at + size;
        let first = self.index == 0;
        let last = end == self.end;
        let packet = &mut buffer[begin..end];
        packet[..self.header].copy_from_slice(&self.headers[..self.header]);

        let length = packet.len();
        let addresses = if packet[0] >> 4 == 4 {
            packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(self.index);
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            packet[10..12].fill(0);
            let header = usize::from(packet[0] & 15) * 4;
            let field = checksum::finish(checksum::add(0, &packet[..header]));
            packet[10..12].copy_from_slice(&field);
            12..20
        } else {
            let payload = (length - ip::V6_HEADER) as u16;
            packet[4..6].copy_from_slice(&payload.to_be_bytes());
            8..40
        };
        let pseudo = checksum::pseudo(&packet[addresses], self.protocol, length - self.start);

        let transport = &mut packet[self.start..];
        if self.protocol == ip::TCP {
            let sent = (self.at - self.header) as u32;
            let sequence =
                u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            transport[4..8].copy_from_slice(&sequence.wrapping_add(sent).to_be_bytes());
            if !first {
                transport[13] &= !TCP_CWR;
            }
            if !last {
                transport[13] &= !(TCP_PSH | TCP_FIN);
            }
            transport[16..18].fill(0);
            let field = checksum::finish(checksum::add(pseudo, transport));
            transport[16..18].copy_from_slice(&field);
        } else {
            let length = (transport.len() as u16).to_be_bytes();
            transport[4..6].copy_from_slice(&length);
            transport[6..8].fill(0);
            let mut field = checksum::finish(checksum::add(pseudo, transport));
            if field == [0, 0] {
                field = [0xff, 0xff];
            }
            transport[6..8].copy_from_slice(&field);
        }

        self.at = end;
        self.index = self.index.wrapping_add(1);
        Some((begin, end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::packets::Flow;
    use proptest::prelude::*;

    /// What the kernel would hand over for `payload` sent as one super-packet, and its header.
    fn super_packet(flow: &Flow, flags: u8, payload: &[u8], size: u16) -> (vnet::Header, Vec<u8>) {
        let mut packet = flow.packet(100, 1000, flags, payload);
        let start = if flow.v6 { 40 } else { 20 };
        let offset = if flow.tcp { 16 } else { 6 };
        // The field holds the pseudo-header's sum, not complemented.
        let mut pseudo = Vec::new();
        pseudo.extend(&packet[if flow.v6 { 8..40 } else { 12..20 }]);
        pseudo.extend(((packet.len() - start) as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, if flow.tcp { 6 } else { 17 }]);
        let sum = !crate::engine::packets::rfc1071(&pseudo);
        packet[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
        let gso = match (size, flow.tcp, flow.v6) {
            (0, ..) => Gso::None,
            (_, true, false) => Gso::Tcp4,
            (_, true, true) => Gso::Tcp6,
            _ => Gso::Udp,
        };
        let header = vnet::Header {
            gso,
            gso_size: size,
            checksum: Some((start as u16, offset as u16)),
        };
        (header, packet)
    }

    fn cut(header: vnet::Header, packet: &[u8], mtu: usize) -> Result<Vec<Vec<u8>>, Malformed> {
        let mut buffer = packet.to_vec();
        buffer.resize(packet.len() + SLACK, 0xaa);
        let mut segments = Segments::new(header, &mut buffer, packet.len(), mtu)?;
        let mut all = Vec::new();
        while let Some(segment) = segments.next() {
            all.push(segment.to_vec());
        }
        Ok(all)
    }

    fn padded(mut packet: Vec<u8>, mtu: usize) -> Vec<u8> {
        while !packet.len().is_multiple_of(16) && packet.len() < mtu {
            packet.push(0);
        }
        packet
    }

    proptest! {
        #[test]
        fn segments_are_the_packets_a_sender_would_have_made(
            v6: bool,
            tcp: bool,
            tos: u8,
            dont_fragment: bool,
            payload in proptest::collection::vec(any::<u8>(), 1..5000),
            size in 1u16..1500,
            flags in prop_oneof![Just(0x10u8), Just(0x18), Just(0x11), Just(0xd8), Just(0x90), Just(0x59)],
            mtu in 1200usize..1600,
        ) {
            let flow = Flow { tos, dont_fragment, ..Flow::new(v6, tcp) };
            let size = size.max((payload.len() / 64) as u16 + 1);
            let (header, packet) = super_packet(&flow, flags, &payload, size);
            let count = payload.len().div_ceil(size.into());
            let expected: Vec<_> = payload
                .chunks(size.into())
                .enumerate()
                .map(|(at, part)| {
                    let mut flags = flags;
                    if at > 0 {
                        flags &= !0x80;
                    }
                    if at + 1 < count {
                        flags &= !0x09;
                    }
                    let sequence = 1000 + (at * usize::from(size)) as u32;
                    padded(flow.packet(100 + at as u16, sequence, flags, part), mtu)
                })
                .collect();
            prop_assert_eq!(cut(header, &packet, mtu), Ok(expected));
        }

        #[test]
        fn a_single_packet_gets_its_checksum(
            v6: bool,
            tcp: bool,
            payload in proptest::collection::vec(any::<u8>(), 0..1400),
        ) {
            let flow = Flow::new(v6, tcp);
            let (header, packet) = super_packet(&flow, 0x10, &payload, 0);
            let expected = padded(flow.packet(100, 1000, 0x10, &payload), 1420);
            prop_assert_eq!(cut(header, &packet, 1420), Ok(vec![expected]));
        }

        #[test]
        fn nonsense_is_refused_or_cut_without_panic(
            head: [u8; vnet::LEN],
            kind in prop_oneof![Just(0u8), Just(1), Just(4), Just(5)],
            start in 0u16..80,
            mut packet in proptest::collection::vec(any::<u8>(), 0..300),
            version in prop_oneof![Just(0x45u8), Just(0x60), any::<u8>()],
        ) {
            let mut head = head;
            head[1] = kind;
            head[6..8].copy_from_slice(&start.to_ne_bytes());
            if let Some(first) = packet.first_mut() {
                *first = version;
            }
            if let Some(header) = vnet::Header::decode(&head) {
                let _ = cut(header, &packet, 1420);
            }
        }
    }

    #[test]
    fn padding_stops_at_the_mtu() {
        let flow = Flow::new(false, false);
        let packet = flow.packet(1, 0, 0, &[1; 1420 - 28]);
        let whole = cut(vnet::Header::PLAIN, &packet, 1420);
        assert_eq!(whole.map(|all| all[0].len()), Ok(1420));
        let packet = flow.packet(1, 0, 0, &[1; 1418 - 28]);
        let whole = cut(vnet::Header::PLAIN, &packet, 1420);
        assert_eq!(whole.map(|all| all[0].len()), Ok(1420));
    }
}

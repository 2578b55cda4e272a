//! Cuts what the TUN device delivers into packets ready for encryption: super-packets into
//! segments, checksums completed, padded as WireGuard asks.
//!
//! Everything happens in the read buffer. A segment's headers are written over the end of the
//! segment before it, which has been sealed already, so that each packet lies in one piece and no
//! payload is copied.

use super::checksum;
use super::ip;
use super::vnet::{self, Gso};
use crate::wireguard::Packets;

/// Bytes that must follow a packet in its buffer: room for the padding of the last segment.
pub(super) const SLACK: usize = PADDING;

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
pub(super) struct Malformed;

/// The packets that one read from the TUN device stands for.
#[derive(Debug)]
pub(super) struct Segments<'a> {
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
    pub(super) fn new(
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
fn complete_checksum(packet: &mut [u8], start: usize, offset: usize) -> Result<(), Malformed> {
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

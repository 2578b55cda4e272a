//! A run: an open super-packet, and what may continue it.

use std::time::Duration;

use crate::engine::offload::checksum;
use crate::engine::offload::ip::{self, Transport};
use crate::engine::offload::vnet::{Gso, Header};

/// Hashes of a packet's addresses, and of its flow. Equal ones need not mean the same flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    pub(super) addresses: u32,
    pub(super) flow: u32,
}

/// Longest IP packet, in bytes.
const LONGEST: usize = 65_535;
/// Segments of a UDP super-packet (`UDP_MAX_SEGMENTS` of kernels before 6.9).
const UDP_SEGMENTS: usize = 64;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;
const TCP_ECE: u8 = 0x40;

/// What is known of an open super-packet; its bytes are in a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) key: Key,
    /// Its buffer among those for the longest packets; it may have none.
    pub(super) large: Option<usize>,
    /// When it was begun, as far as the coalescer has been told.
    pub(super) opened: Duration,
    /// Bytes so far.
    pub(super) length: usize,
    pub(super) transport: Transport,
    /// Payload bytes of each segment but the last.
    size: usize,
    pub(super) segments: usize,
    /// TCP sequence number that continues the run.
    next: u32,
    /// Whether the first packet's checksums are known to be right.
    verified: bool,
    /// Whether its last segment is shorter than the others: nothing may follow.
    pub(super) short: bool,
}

/// What super-packets of such packets are.
pub(super) fn kind(transport: &Transport) -> Gso {
    match (transport.protocol, transport.is_v4()) {
        (ip::UDP, _) => Gso::Udp,
        (_, true) => Gso::Tcp4,
        (_, false) => Gso::Tcp6,
    }
}

/// Whether a packet may be part of a super-packet at all. CWR never is: it belongs to the first
/// segment alone. A UDP packet without checksum would get one.
pub(super) fn joinable(packet: &[u8], transport: &Transport) -> bool {
    if packet.len() <= transport.payload {
        return false;
    }
    if transport.protocol == ip::TCP {
        packet[transport.start + 13] & !(TCP_FIN | TCP_PSH | TCP_ECE) == TCP_ACK
    } else {
        packet[transport.start + 6..transport.start + 8] != [0, 0]
    }
}

/// Whether nothing may follow a packet in its run: whoever sent it wants it delivered now.
pub(super) fn is_last(packet: &[u8], transport: &Transport) -> bool {
    transport.protocol == ip::TCP && packet[transport.start + 13] & (TCP_PSH | TCP_FIN) != 0
}

fn sequence(packet: &[u8], transport: &Transport) -> u32 {
    let at = transport.start + 4;
    u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
}

impl Run {
    /// A run of one packet.
    pub(super) fn new(packet: &[u8], transport: Transport, key: Key, opened: Duration) -> Self {
        let size = packet.len() - transport.payload;
        Self {
            key,
            large: None,
            opened,
            length: packet.len(),
            next: sequence(packet, &transport).wrapping_add(size as u32),
            transport,
            size,
            segments: 1,
            verified: false,
            short: false,
        }
    }

    /// Whether nothing more can be joined to it.
    pub(super) fn is_full(&self) -> bool {
        self.short
            || self.length + self.size > LONGEST
            || (self.transport.protocol == ip::UDP && self.segments >= UDP_SEGMENTS)
    }

    /// Whether `packet` is of this run's flow. `head` begins with the run's first packet.
    pub(super) fn is_of_flow(&self, head: &[u8], packet: &[u8], transport: &Transport) -> bool {
        let (addresses, start) = (transport.addresses(), transport.start);
        self.transport.start == start
            && self.transport.protocol == transport.protocol
            && head[start..start + 4] == packet[start..start + 4]
            && head[addresses.clone()] == packet[addresses]
    }

    /// Whether `packet` as its last segment would be shorter than the others.
    pub(super) fn would_end_short(&self, packet: &[u8], transport: &Transport) -> bool {
        packet.len() - transport.payload < self.size
    }

    /// Whether `packet`, of the same flow, can be joined: its headers and checksums are right.
    /// `head` begins with the run's bytes.
    pub(super) fn accepts(&mut self, head: &[u8], packet: &[u8], transport: &Transport) -> bool {
        if !self.continues(head, packet, transport) {
            return false;
        }
        self.verified = self.verified || self.transport.checksums_hold(&head[..self.length]);
        self.verified && transport.checksums_hold(packet)
    }

    /// Whether `packet`, of the same flow, is the next segment: same headers but for what the
    /// kernel will count up by itself.
    fn continues(&self, head: &[u8], packet: &[u8], transport: &Transport) -> bool {
        let (start, end) = (transport.start, transport.payload);
        let payload = packet.len() - end;
        if end != self.transport.payload || payload > self.size || self.length + payload > LONGEST {
            return false;
        }
        let same = |from: usize, to: usize| head[from..to] == packet[from..to];
        let network = if transport.is_v4() {
            // Without DF the id names fragments, so it must count up; with DF it means nothing
            // (RFC 6864).
            let id = |packet: &[u8]| u16::from_be_bytes([packet[4], packet[5]]);
            let counts_up = id(packet) == id(head).wrapping_add(self.segments as u16);
            same(0, 2) && same(6, 10) && (packet[6] & 0x40 != 0 || counts_up)
        } else {
            same(0, 4) && same(6, 8)
        };
        let transport_matches = transport.protocol == ip::UDP || {
            let ends = TCP_PSH | TCP_FIN;
            sequence(packet, transport) == self.next
                && same(start + 8, start + 13)
                && head[start + 13] & !ends == packet[start + 13] & !ends
                && same(start + 14, start + 16)
                && same(start + 18, end)
        };
        network && transport_matches
    }

    /// Joins a packet that it accepts. `buffer` begins with the run's bytes and has room for it.
    pub(super) fn join(&mut self, buffer: &mut [u8], packet: &[u8], transport: &Transport) {
        let payload = &packet[transport.payload..];
        buffer[self.length..self.length + payload.len()].copy_from_slice(payload);
        if transport.protocol == ip::TCP {
            let flags = transport.start + 13;
            buffer[flags] |= packet[flags] & (TCP_PSH | TCP_FIN);
        }
        self.length += payload.len();
        self.segments += 1;
        self.next = self.next.wrapping_add(payload.len() as u32);
        self.short = payload.len() < self.size;
    }

    /// Completes the headers of a super-packet, and gives its virtio header.
    pub(super) fn finish(&self, packet: &mut [u8]) -> Header {
        let Transport {
            protocol, start, ..
        } = self.transport;
        let length = packet.len() - start;
        self.transport.set_length(packet, packet.len());
        if protocol == ip::UDP {
            packet[start + 4..start + 6].copy_from_slice(&(length as u16).to_be_bytes());
        }
        let pseudo = checksum::pseudo(&packet[self.transport.addresses()], protocol, length);
        let offset = self.transport.checksum_offset();
        packet[start + offset..start + offset + 2].copy_from_slice(&checksum::fold(pseudo));
        Header {
            gso: kind(&self.transport),
            gso_size: self.size as u16,
            checksum: Some((start as u16, offset as u16)),
        }
    }
}

//! Joins decrypted packets of one TCP or UDP flow into super-packets, one TUN write each.
//!
//! A run is an open super-packet. Packets are decrypted straight into a free buffer; one that
//! continues a run has its payload copied behind it, any other becomes a run of its own or is
//! written at once. What comes out, cut again by the kernel, is what went in: only packets whose
//! checksums are right are joined, because a joined packet gets its checksum anew.

use super::checksum;
use super::ip::{self, Transport};
use super::vnet::{self, Gso, Header};

/// Runs that may be open at once.
const RUNS: usize = 8;
/// Offset of the packet in its buffer: room for the virtio header, and an aligned packet.
const OFFSET: usize = 16;
/// Room for the longest packet that a datagram can carry, its tag and padding.
const BUFFER: usize = OFFSET + 65_536 + 64;
/// Longest IP packet, in bytes.
const LONGEST: usize = 65_535;
/// Segments of a UDP super-packet (`UDP_MAX_SEGMENTS` of kernels before 6.9).
const UDP_SEGMENTS: usize = 64;

const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_ACK: u8 = 0x10;
const TCP_ECE: u8 = 0x40;

/// Where finished packets go.
pub(super) trait TunSink {
    /// Writes one packet or super-packet, the virtio header in front where the device has one.
    fn write(&mut self, frame: &[u8]);
}

/// What may be written to the TUN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Offload {
    /// Packets carry a virtio header.
    pub(super) vnet: bool,
    /// TCP super-packets.
    pub(super) tcp: bool,
    /// UDP super-packets.
    pub(super) udp: bool,
}

#[derive(Debug)]
struct Run {
    buffer: usize,
    length: usize,
    transport: Transport,
    /// Payload bytes of each segment but the last.
    size: usize,
    segments: usize,
    /// TCP sequence number that continues the run.
    next: u32,
    /// Whether the first packet's checksums are known to be right.
    verified: bool,
    /// Whether its last segment is shorter than the others: nothing may follow.
    short: bool,
}

/// Whether a packet may be part of a super-packet at all. CWR never is: it belongs to the first
/// segment alone. A UDP packet without checksum would get one.
fn joinable(packet: &[u8], transport: &Transport) -> bool {
    if packet.len() <= transport.payload {
        return false;
    }
    if transport.protocol == ip::TCP {
        packet[transport.start + 13] & !(TCP_FIN | TCP_PSH | TCP_ECE) == TCP_ACK
    } else {
        packet[transport.start + 6..transport.start + 8] != [0, 0]
    }
}

fn sequence(packet: &[u8], transport: &Transport) -> u32 {
    let at = transport.start + 4;
    u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
}

impl Run {
    fn is_full(&self) -> bool {
        self.short
            || self.length + self.size > LONGEST
            || (self.transport.protocol == ip::UDP && self.segments >= UDP_SEGMENTS)
    }

    /// Whether `packet`, of the same flow, is the next segment: same headers but for what the
    /// kernel will count up by itself. `head` begins with the run's first packet.
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

    /// Completes the headers of a super-packet, and gives its virtio header.
    fn finish(&self, packet: &mut [u8]) -> [u8; vnet::LEN] {
        let Transport {
            protocol,
            start,
            payload,
        } = self.transport;
        let length = packet.len() - start;
        self.transport.set_length(packet, packet.len());
        if protocol == ip::UDP {
            packet[start + 4..start + 6].copy_from_slice(&(length as u16).to_be_bytes());
        }
        let pseudo = checksum::pseudo(&packet[self.transport.addresses()], protocol, length);
        let offset = self.transport.checksum_offset();
        packet[start + offset..start + offset + 2].copy_from_slice(&checksum::fold(pseudo));
        let gso = match (protocol, self.transport.is_v4()) {
            (ip::UDP, _) => Gso::Udp,
            (_, true) => Gso::Tcp4,
            (_, false) => Gso::Tcp6,
        };
        Header {
            gso,
            gso_size: self.size as u16,
            checksum: Some((start as u16, offset as u16)),
        }
        .encode(payload as u16)
    }
}

/// The runs of one worker.
#[derive(Debug)]
pub(super) struct Coalescer {
    offload: Offload,
    buffers: Vec<Box<[u8]>>,
    /// The buffer that the next packet goes into.
    scratch: usize,
    /// Last used first: it is still in the cache.
    free: Vec<usize>,
    /// Oldest first.
    open: Vec<Run>,
}

impl Coalescer {
    /// No run is open.
    pub(super) fn new(offload: Offload) -> Self {
        Self {
            offload,
            buffers: (0..=RUNS)
                .map(|_| vec![0; BUFFER].into_boxed_slice())
                .collect(),
            scratch: 0,
            free: (1..=RUNS).collect(),
            open: Vec::with_capacity(RUNS + 1),
        }
    }

    /// Where the next packet is to be decrypted into.
    pub(super) fn slot(&mut self) -> &mut [u8] {
        &mut self.buffers[self.scratch][OFFSET..]
    }

    /// Takes the packet of `length` bytes in [`Coalescer::slot`].
    pub(super) fn push(&mut self, length: usize, sink: &mut impl TunSink) {
        let scratch = self.scratch;
        let packet = &self.buffers[scratch][OFFSET..OFFSET + length];
        let Some(transport) = Transport::parse(packet) else {
            self.flush_between(scratch, sink);
            self.write(scratch, length, sink);
            return;
        };
        let joinable = self.supports(&transport) && joinable(packet, &transport);
        let last = transport.protocol == ip::TCP
            && packet[transport.start + 13] & (TCP_PSH | TCP_FIN) != 0;

        if let Some(at) = self.find(packet, &transport) {
            if joinable && self.append(at, scratch, length, &transport) {
                if last || self.open[at].is_full() {
                    self.flush(at, sink);
                }
                return;
            }
            self.flush(at, sink);
        }
        if !joinable || last {
            self.write(scratch, length, sink);
            return;
        }

        let packet = &self.buffers[scratch][OFFSET..OFFSET + length];
        let size = length - transport.payload;
        self.open.push(Run {
            buffer: scratch,
            length,
            next: sequence(packet, &transport).wrapping_add(size as u32),
            transport,
            size,
            segments: 1,
            verified: false,
            short: false,
        });
        if self.free.is_empty() {
            self.flush(0, sink);
        }
        if let Some(free) = self.free.pop() {
            self.scratch = free;
        }
    }

    /// Writes every open run, oldest first.
    pub(super) fn flush_all(&mut self, sink: &mut impl TunSink) {
        while !self.open.is_empty() {
            self.flush(0, sink);
        }
    }

    /// Index of the open run of this packet's flow.
    fn find(&self, packet: &[u8], transport: &Transport) -> Option<usize> {
        self.open.iter().position(|run| {
            let head = &self.buffers[run.buffer][OFFSET..];
            let (addresses, start) = (transport.addresses(), transport.start);
            run.transport.start == start
                && run.transport.protocol == transport.protocol
                && head[start..start + 4] == packet[start..start + 4]
                && head[addresses.clone()] == packet[addresses]
        })
    }

    fn supports(&self, transport: &Transport) -> bool {
        if transport.protocol == ip::TCP {
            self.offload.tcp
        } else {
            self.offload.udp
        }
    }

    /// Joins the packet in buffer `scratch` to a run of its flow if it continues it.
    fn append(&mut self, at: usize, scratch: usize, length: usize, transport: &Transport) -> bool {
        let run = &mut self.open[at];
        let Ok([target, source]) = self.buffers.get_disjoint_mut([run.buffer, scratch]) else {
            return false;
        };
        let target = &mut target[OFFSET..];
        let packet = &source[OFFSET..OFFSET + length];
        if !run.continues(target, packet, transport) {
            return false;
        }
        run.verified = run.verified || run.transport.checksums_hold(&target[..run.length]);
        if !run.verified || !transport.checksums_hold(packet) {
            return false;
        }
        let payload = &packet[transport.payload..];
        target[run.length..run.length + payload.len()].copy_from_slice(payload);
        if transport.protocol == ip::TCP {
            let flags = transport.start + 13;
            target[flags] |= packet[flags] & (TCP_PSH | TCP_FIN);
        }
        run.length += payload.len();
        run.segments += 1;
        run.next = run.next.wrapping_add(payload.len() as u32);
        run.short = payload.len() < run.size;
        true
    }

    /// Writes the open runs between the addresses of a packet that may belong to any of them.
    fn flush_between(&mut self, scratch: usize, sink: &mut impl TunSink) {
        let mut at = 0;
        while let Some(run) = self.open.get(at) {
            let (head, packet) = (&self.buffers[run.buffer], &self.buffers[scratch]);
            let addresses = run.transport.addresses();
            let addresses = OFFSET + addresses.start..OFFSET + addresses.end;
            if head[OFFSET] >> 4 == packet[OFFSET] >> 4
                && head[addresses.clone()] == packet[addresses]
            {
                self.flush(at, sink);
            } else {
                at += 1;
            }
        }
    }

    fn flush(&mut self, at: usize, sink: &mut impl TunSink) {
        let run = self.open.remove(at);
        if run.segments > 1 {
            let buffer = &mut self.buffers[run.buffer];
            let header = run.finish(&mut buffer[OFFSET..OFFSET + run.length]);
            buffer[OFFSET - vnet::LEN..OFFSET].copy_from_slice(&header);
            sink.write(&buffer[OFFSET - vnet::LEN..OFFSET + run.length]);
        } else {
            self.write(run.buffer, run.length, sink);
        }
        self.free.push(run.buffer);
    }

    /// Writes a packet as it is.
    fn write(&mut self, buffer: usize, length: usize, sink: &mut impl TunSink) {
        let buffer = &mut self.buffers[buffer];
        if self.offload.vnet {
            buffer[OFFSET - vnet::LEN..OFFSET].copy_from_slice(&Header::PLAIN.encode(0));
            sink.write(&buffer[OFFSET - vnet::LEN..OFFSET + length]);
        } else {
            sink.write(&buffer[OFFSET..OFFSET + length]);
        }
    }
}

#[cfg(test)]
mod tests;

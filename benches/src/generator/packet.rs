//! What the generator's packets carry, so that the receiver can tell what became of them.
//!
//! A payload is a stamp (run, flow, sequence number) and a pattern that follows from the stamp, so
//! that any changed byte shows. All integers are little-endian; nothing but the generator reads
//! them.

use std::net::SocketAddrV4;

/// Bytes of an IPv4 and a UDP header without options.
pub(crate) const HEADERS: usize = 28;
/// Bytes of the stamp at the front of every payload; the smallest payload there is.
pub(crate) const STAMP: usize = 24;

const MAGIC: u32 = 0x5eed_1e55;
const PROTOCOL_UDP: u8 = 17;

/// Which packet this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Tells the runs of one process apart: packets of an earlier run may still arrive.
    pub(crate) run: u32,
    /// Flow, from 0.
    pub(crate) flow: u32,
    /// Sequence number within the flow, from 0.
    pub(crate) sequence: u64,
}

impl Stamp {
    /// The words after the stamp: a start that differs per packet, then equal steps.
    fn pattern(self) -> impl Iterator<Item = u64> {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let start = (u64::from(self.run) << 32 | u64::from(self.flow))
            .wrapping_add(self.sequence)
            .wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (1u64..).map(move |i| start.wrapping_add(i.wrapping_mul(STEP)))
    }

    /// Fills a payload of at least [`STAMP`] bytes.
    pub(crate) fn write(self, payload: &mut [u8]) {
        let (stamp, rest) = payload.split_at_mut(STAMP);
        stamp[..4].copy_from_slice(&MAGIC.to_le_bytes());
        stamp[4..8].copy_from_slice(&self.run.to_le_bytes());
        stamp[8..12].copy_from_slice(&self.flow.to_le_bytes());
        stamp[12..16].copy_from_slice(&(rest.len() as u32).to_le_bytes());
        stamp[16..].copy_from_slice(&self.sequence.to_le_bytes());
        for (chunk, word) in rest.chunks_mut(8).zip(self.pattern()) {
            chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
        }
    }

    /// Reads a payload back; `None` if any byte of it is not what was written.
    pub(crate) fn read(payload: &[u8]) -> Option<Self> {
        let (stamp, rest) = payload.split_at_checked(STAMP)?;
        let word = |at: usize| Some(u32::from_le_bytes(stamp.get(at..at + 4)?.try_into().ok()?));
        if word(0)? != MAGIC || word(12)? as usize != rest.len() {
            return None;
        }
        let read = Self {
            run: word(4)?,
            flow: word(8)?,
            sequence: u64::from_le_bytes(stamp[16..].try_into().ok()?),
        };
        let intact = rest
            .chunks(8)
            .zip(read.pattern())
            .all(|(chunk, word)| *chunk == word.to_le_bytes()[..chunk.len()]);
        intact.then_some(read)
    }
}

/// The ones' complement sum of `bytes` as 16-bit words, folded (RFC 1071), not complemented.
pub(crate) fn sum(bytes: &[u8], start: u64) -> u16 {
    let mut total = start;
    let mut words = bytes.chunks_exact(4);
    for word in &mut words {
        total += u64::from(u32::from_be_bytes([word[0], word[1], word[2], word[3]]));
    }
    let mut tail = [0; 4];
    let rest = words.remainder();
    tail[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_be_bytes(tail));
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}

/// The headers of one flow's packets, all of one size.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    headers: [u8; HEADERS],
    /// Sum of the pseudo header, the ports and the length, not folded.
    partial: u64,
    payload: u16,
}

impl Flow {
    /// A flow of `payload` bytes per packet, at least [`STAMP`].
    pub(crate) fn new(from: SocketAddrV4, to: SocketAddrV4, payload: u16) -> Self {
        let (total, udp) = (payload + HEADERS as u16, payload + 8);
        let mut headers = [0; HEADERS];
        headers[0] = 0x45;
        headers[2..4].copy_from_slice(&total.to_be_bytes());
        headers[6] = 0x40; // DF
        headers[8] = 64; // TTL
        headers[9] = PROTOCOL_UDP;
        headers[12..16].copy_from_slice(&from.ip().octets());
        headers[16..20].copy_from_slice(&to.ip().octets());
        let checksum = !sum(&headers[..20], 0);
        headers[10..12].copy_from_slice(&checksum.to_be_bytes());
        headers[20..22].copy_from_slice(&from.port().to_be_bytes());
        headers[22..24].copy_from_slice(&to.port().to_be_bytes());
        headers[24..26].copy_from_slice(&udp.to_be_bytes());
        let addresses = u64::from(sum(&headers[12..20], 0));
        let ports = u64::from(sum(&headers[20..26], 0));
        let partial = addresses + ports + u64::from(PROTOCOL_UDP) + u64::from(udp);
        Self {
            headers,
            partial,
            payload,
        }
    }

    /// Bytes of the whole inner packet.
    pub(crate) fn size(&self) -> usize {
        HEADERS + usize::from(self.payload)
    }

    /// Writes the whole inner packet; `packet` has the flow's size.
    pub(crate) fn write(&self, stamp: Stamp, packet: &mut [u8]) {
        stamp.write(&mut packet[HEADERS..]);
        self.finish(packet);
    }

    /// Writes the whole inner packet around a payload that came from elsewhere.
    #[cfg(test)]
    pub(crate) fn carry(&self, payload: &[u8], packet: &mut [u8]) {
        packet[HEADERS..].copy_from_slice(payload);
        self.finish(packet);
    }

    fn finish(&self, packet: &mut [u8]) {
        let (headers, payload) = packet.split_at_mut(HEADERS);
        headers.copy_from_slice(&self.headers);
        let checksum = match !sum(payload, self.partial) {
            0 => 0xffff,
            other => other,
        };
        headers[26..].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// The payload of an inner IPv4 UDP packet whose headers and checksums are right.
pub(crate) fn payload_of(packet: &[u8]) -> Option<&[u8]> {
    let headers = packet.get(..HEADERS)?;
    let total = usize::from(u16::from_be_bytes([headers[2], headers[3]]));
    let udp = usize::from(u16::from_be_bytes([headers[24], headers[25]]));
    if headers[0] != 0x45
        || headers[9] != PROTOCOL_UDP
        || sum(&headers[..20], 0) != 0xffff
        || total != udp + 20
    {
        return None;
    }
    let datagram = packet.get(20..total)?;
    let pseudo = u64::from(sum(&headers[12..20], 0)) + u64::from(PROTOCOL_UDP) + udp as u64;
    (sum(datagram, pseudo) == 0xffff).then(|| &datagram[8..])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STAMPED: Stamp = Stamp {
        run: 7,
        flow: 3,
        sequence: 1 << 40,
    };

    fn packet(size: u16) -> Vec<u8> {
        let flow = Flow::new(
            "10.0.0.1:1000".parse().unwrap(),
            "10.9.0.2:9".parse().unwrap(),
            size,
        );
        let mut packet = vec![0; HEADERS + usize::from(size)];
        flow.write(STAMPED, &mut packet);
        packet
    }

    #[test]
    fn checksums_agree_with_a_known_header() {
        // RFC 1071 section 3's example sums to ddf2.
        assert_eq!(
            sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7], 0),
            0xddf2
        );
        let packet = packet(64);
        assert_eq!(packet.len(), 92);
        assert_eq!(payload_of(&packet).and_then(Stamp::read), Some(STAMPED));
        // What follows the packet is padding of the tunnel.
        let padded = [packet, vec![0; 4]].concat();
        assert_eq!(payload_of(&padded).and_then(Stamp::read), Some(STAMPED));
    }

    proptest! {
        #[test]
        fn any_changed_byte_of_a_packet_shows(
            size in STAMP as u16..1500, at: prop::sample::Index, flip in 1u8..
        ) {
            let mut packet = packet(size);
            prop_assert_eq!(payload_of(&packet).and_then(Stamp::read), Some(STAMPED));
            let at = at.index(packet.len());
            packet[at] ^= flip;
            prop_assert_eq!(payload_of(&packet), None);
        }

        #[test]
        fn any_changed_byte_of_a_payload_shows(
            size in STAMP..1500, at: prop::sample::Index, flip in 1u8..
        ) {
            let mut payload = vec![0; size];
            STAMPED.write(&mut payload);
            let at = at.index(size);
            payload[at] ^= flip;
            prop_assert_ne!(Stamp::read(&payload), Some(STAMPED));
        }
    }
}

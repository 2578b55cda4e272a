//! Carries out a decision on the packet's bytes.

use crate::csum;
use crate::decide::Forward;
use crate::mss;
use crate::packet::{Bytes, Frame, Packet, Sum};
use crate::verdict::Verdict;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// Clamps the MSS, lowers the TTL, cuts link-layer padding and puts the Ethernet header in front.
/// After an error the packet may be half rewritten: it must be dropped.
#[inline(always)]
pub fn apply<F: Frame>(packet: &Packet, forward: &Forward, frame: &mut F) -> Result<(), Verdict> {
    if let Some(limit) = forward.mss {
        mss::clamp(frame, packet.header_len, packet.transport_len, limit)?;
    }
    decrement_ttl(packet, frame)?;
    // Ethernet pads to 60 bytes; inside a tunnel the padding would only cost.
    if packet.gso_size == 0 && packet.len < frame.len() {
        frame.trim(packet.len)?;
    }
    if let Some(hardware) = forward.hardware {
        let ethertype = if packet.source.address.is_v4() {
            ETHERTYPE_IPV4
        } else {
            ETHERTYPE_IPV6
        };
        let mut header = Bytes([0; 14]);
        header.0[..12].copy_from_slice(&hardware);
        header.0[12..].copy_from_slice(&ethertype);
        frame.push_ethernet(&header)?;
    }
    Ok(())
}

/// `packet.ttl` is at least two.
#[inline(always)]
fn decrement_ttl<F: Frame>(packet: &Packet, frame: &mut F) -> Result<(), Verdict> {
    let ttl = packet.ttl.wrapping_sub(1);
    if packet.source.address.is_v4() {
        // TTL, protocol and checksum in one write.
        let old = [packet.ttl, packet.protocol];
        let new = [ttl, packet.protocol];
        let [high, low] = csum::update(packet.header_checksum, old, new);
        frame.write(8, &Bytes([ttl, packet.protocol, high, low]), Sum::Kept)
    } else {
        frame.write(7, &Bytes([ttl]), Sum::Changed)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::abi::Side;
    use crate::csum::tests::sum;
    use crate::memory::Memory;
    use crate::packet::parse;
    use proptest::prelude::*;

    const MACS: [u8; 12] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];

    fn forward(hardware: Option<[u8; 12]>) -> Forward {
        Forward {
            link: 1,
            hardware,
            mss: None,
        }
    }

    fn v4(ttl: u8, id: [u8; 2], payload: &[u8]) -> Vec<u8> {
        let len = (20 + payload.len()) as u16;
        let mut bytes = vec![0x45, 0];
        bytes.extend(len.to_be_bytes());
        bytes.extend([
            id[0], id[1], 0x40, 0, ttl, 1, 0, 0, 100, 64, 0, 2, 10, 0, 0, 2,
        ]);
        let checksum = (!sum(&bytes)).to_be_bytes();
        bytes[10..12].copy_from_slice(&checksum);
        bytes.extend(payload);
        bytes
    }

    proptest! {
        #[test]
        fn the_header_checksum_follows_the_ttl(ttl in 2..=255_u8, id: [u8; 2]) {
            let mut frame = Memory::new(Side::Overlay, v4(ttl, id, &[0; 8]), 0);
            let packet = parse(&frame).unwrap();
            apply(&packet, &forward(None), &mut frame).unwrap();
            prop_assert_eq!(&frame.bytes, &v4(ttl - 1, id, &[0; 8]));
        }
    }

    #[test]
    fn only_the_hop_limit_of_ipv6_changes() {
        let mut bytes = vec![0x60, 0, 0, 0, 0, 8, 58, 2];
        bytes.extend([1; 32]);
        bytes.extend([9; 8]);
        let mut frame = Memory::new(Side::Overlay, bytes.clone(), 0);
        let packet = parse(&frame).unwrap();
        apply(&packet, &forward(Some(MACS)), &mut frame).unwrap();
        bytes[7] = 1;
        assert_eq!(frame.bytes, [&MACS[..], &ETHERTYPE_IPV6, &bytes].concat());
    }

    #[test]
    fn padding_is_cut_off_plain_packets() {
        let packet_bytes = v4(9, [0; 2], &[1; 8]);
        let padded = [&[0; 14][..], &packet_bytes, &[0; 18]].concat();
        let mut frame = Memory::new(Side::Subnet, padded.clone(), 0);
        let packet = parse(&frame).unwrap();
        apply(&packet, &forward(None), &mut frame).unwrap();
        assert_eq!(frame.bytes.len(), 14 + packet_bytes.len());

        let mut frame = Memory::new(Side::Subnet, padded.clone(), 500);
        apply(&parse(&frame).unwrap(), &forward(None), &mut frame).unwrap();
        assert_eq!(frame.bytes.len(), padded.len());
    }
}

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

//! IP headers from their parts.

use crate::engine::offload::checksum;
use crate::engine::offload::ip::{V4_HEADER, V6_HEADER};

#[allow(clippy::too_many_arguments)]
pub(crate) fn write_v4(
    packet: &mut [u8],
    traffic: u8,
    total: u16,
    id: u16,
    place: u16,
    hops: u8,
    protocol: u8,
    addresses: &[u8; 8],
) {
    packet[0] = 0x45;
    packet[1] = traffic;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    packet[6..8].copy_from_slice(&place.to_be_bytes());
    packet[8] = hops;
    packet[9] = protocol;
    packet[10..12].fill(0);
    packet[12..20].copy_from_slice(addresses);
    let sum = checksum::finish(checksum::add(0, &packet[..V4_HEADER]));
    packet[10..12].copy_from_slice(&sum);
}

pub(crate) fn write_v6(
    traffic: u8,
    length: u16,
    next: u8,
    hops: u8,
    addresses: &[u8; 32],
) -> [u8; V6_HEADER] {
    let mut header = [0; V6_HEADER];
    header[0] = 0x60 | traffic >> 4;
    header[1] = traffic << 4;
    header[4..6].copy_from_slice(&length.to_be_bytes());
    header[6] = next;
    header[7] = hops;
    header[8..].copy_from_slice(addresses);
    header
}

pub(crate) fn both<const N: usize, const M: usize>(
    source: [u8; N],
    destination: [u8; N],
) -> [u8; M] {
    let mut both = [0; M];
    both[..N].copy_from_slice(&source);
    both[N..].copy_from_slice(&destination);
    both
}

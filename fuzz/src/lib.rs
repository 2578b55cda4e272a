//! What the fuzz targets share.

use std::cell::RefCell;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, Mac, Update};
use blake2::{Blake2s256, Blake2sMac, Digest};
use router::engine::internals::bed::Bed;

/// Inputs before the bed is made anew: its session must not grow too old.
const INPUTS: u32 = 8_000;

thread_local! {
    static BED: RefCell<(Bed, u32)> = RefCell::new((Bed::new(), 0));
}

/// A router with a peer, the same for many inputs.
pub fn with_bed(work: impl FnOnce(&mut Bed)) {
    BED.with_borrow_mut(|(bed, inputs)| {
        *inputs += 1;
        if inputs.is_multiple_of(INPUTS) {
            *bed = Bed::new();
        }
        work(bed);
    });
}

/// Gives a handshake message to the router the mac1 that belongs to it: who knows the router's
/// public key can.
pub fn sign(message: &mut [u8], router: &[u8; 32]) {
    let Some(end) = message.len().checked_sub(32) else {
        return;
    };
    let key = Digest::finalize(Digest::chain_update(
        Blake2s256::new_with_prefix(b"mac1----"),
        router,
    ));
    let Ok(mut mac) = <Blake2sMac<U16> as Mac>::new_from_slice(&key) else {
        return;
    };
    Update::update(&mut mac, &message[..end]);
    message[end..end + 16].copy_from_slice(&mac.finalize_fixed());
}

/// Splits an input: each part has its length in two bytes in front, and may be cut short.
pub fn parts(mut data: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (head, rest) = data.split_first_chunk()?;
        let length = usize::from(u16::from_be_bytes(*head) & 0x7ff);
        let (part, rest) = rest.split_at(length.min(rest.len()));
        data = rest;
        Some(part)
    })
}

/// Makes lengths and checksums of an IP packet right, as far as it looks like one.
pub fn repair(packet: &mut [u8]) {
    let length = packet.len();
    let (addresses, start, protocol) = match packet.first().map(|byte| byte >> 4) {
        Some(4) if length >= 20 => {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            packet[10..12].fill(0);
            let sum = checksum(0, &packet[..20]);
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            (12..20, 20, packet[9])
        }
        Some(6) if length >= 40 => {
            packet[4..6].copy_from_slice(&(length as u16 - 40).to_be_bytes());
            (8..40, 40, packet[6])
        }
        _ => return,
    };
    let at = start
        + match protocol {
            6 => 16,
            17 => 6,
            _ => return,
        };
    if length < at + 2 {
        return;
    }
    if protocol == 17 {
        let whole = (length - start) as u16;
        packet[start + 4..start + 6].copy_from_slice(&whole.to_be_bytes());
    }
    packet[at..at + 2].fill(0);
    let pseudo = checksum_part(
        u32::from(protocol) + (length - start) as u32,
        &packet[addresses],
    );
    let sum = match checksum(pseudo, &packet[start..]) {
        0 => 0xffff,
        sum => sum,
    };
    packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

fn checksum_part(start: u32, bytes: &[u8]) -> u32 {
    bytes.chunks(2).fold(start, |sum, pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        sum + u32::from(u16::from_be_bytes([pair[0], low]))
    })
}

fn checksum(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = checksum_part(start, bytes);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

//! Datagrams from strangers: limiter, handshakes, data messages.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_fuzz::{parts, sign, with_bed};

fuzz_target!(|data: &[u8]| {
    let Some((mode, rest)) = data.split_first() else {
        return;
    };
    with_bed(|bed| match mode % 4 {
        // Anything at all, cut up anyhow.
        0 => {
            let stride = rest.first().map_or(1, |length| usize::from(*length) + 1);
            bed.datagrams(rest, stride);
        }
        // Handshake messages by somebody who knows our public key.
        1 => {
            for part in parts(rest) {
                let mut message = part.to_vec();
                message.resize(if mode & 0x10 == 0 { 148 } else { 92 }, 0);
                message[..4].copy_from_slice(&[1 + (mode >> 4 & 1), 0, 0, 0]);
                message[8..12].copy_from_slice(&bed.index().to_le_bytes());
                sign(&mut message, &bed.router().0);
                bed.datagrams(&message, message.len());
            }
        }
        // An initiation of the peer's, damaged.
        2 => {
            let mut message = bed.initiation();
            for place in rest.chunks_exact(2).take(4) {
                message[usize::from(place[0]) % 116] ^= place[1];
            }
            sign(&mut message, &bed.router().0);
            bed.datagrams(&message, message.len());
        }
        // Data messages of the live session, forged.
        _ => {
            for part in parts(rest) {
                let mut message = part.to_vec();
                message.resize(part.len().max(32), 0);
                message[..4].copy_from_slice(&[4, 0, 0, 0]);
                message[4..8].copy_from_slice(&bed.index().to_le_bytes());
                bed.datagrams(&message, message.len());
            }
        }
    });
});

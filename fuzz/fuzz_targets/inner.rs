//! Inner packets: what a peer seals, and what the TUN device gives.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_fuzz::{parts, repair, with_bed};

/// Bytes of the virtio header.
const HEADER: usize = 10;

fuzz_target!(|data: &[u8]| {
    let Some((mode, rest)) = data.split_first() else {
        return;
    };
    with_bed(|bed| match mode % 2 {
        0 => {
            let mut packets: Vec<_> = parts(rest).map(<[u8]>::to_vec).collect();
            for (at, packet) in packets.iter_mut().enumerate() {
                // Each bit spares one packet, so that right and wrong ones meet.
                if mode >> (1 + at % 7) & 1 == 0 {
                    repair(packet);
                }
            }
            bed.sealed(&packets);
        }
        _ => {
            let mut frame = rest.to_vec();
            if mode & 2 == 0 && frame.len() > HEADER {
                repair(&mut frame[HEADER..]);
            }
            bed.device(&frame);
        }
    });
});

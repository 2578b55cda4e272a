//! A deliberate slow-down, for the proof that the benchmark would see one (`bench-delay`).

use std::time::{Duration, Instant};

#[cfg(not(debug_assertions))]
compile_error!("the feature bench-delay makes the router slow on purpose: never in a release");

/// As much again as a packet costs.
const PER_PACKET: Duration = Duration::from_micros(5);

/// Wastes the time of this many packets.
pub(super) fn packets(count: usize) {
    let end = Instant::now() + PER_PACKET * u32::try_from(count).unwrap_or(u32::MAX);
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

//! The one clock of the engine.

use std::time::Duration;

/// Time since boot with sleep counted: sessions age while the machine sleeps, as they do at the peer.
pub(crate) fn uptime() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the pointer is that of a live struct. The call fails for unknown clocks only.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

//! Simulated clocks for tests: what the calling thread, and boringtun on it, takes for the time.
//!
//! The test program's own `clock_gettime` stands before the C library's, so that the code under test
//! is that which ships. boringtun's feature `mock-instant` would replace its clock in every program
//! of the same build, the daemon among them.

use std::cell::Cell;
use std::time::Duration;

thread_local! {
    /// How far the thread's steady clocks run ahead, and its wall clock, in ns.
    static AHEAD: Cell<(i64, i64)> = const { Cell::new((0, 0)) };
}

/// Lets time pass, on all clocks.
pub(crate) fn advance(by: Duration) {
    let by = by.as_nanos() as i64;
    let (steady, wall) = AHEAD.get();
    AHEAD.set((steady + by, wall + by));
}

/// Corrects the wall clock alone, by seconds.
pub(crate) fn correct_wall(seconds: i64) {
    let (steady, wall) = AHEAD.get();
    AHEAD.set((steady, wall + seconds * 1_000_000_000));
}

/// The C library's function of this name, shifted.
///
/// # Safety
/// `time` must point to a `timespec` that may be written, or be null.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(
    clock: libc::clockid_t,
    time: *mut libc::timespec,
) -> libc::c_int {
    // SAFETY: the kernel checks the pointer itself.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) };
    let (steady, wall) = AHEAD.get();
    let ahead = match clock {
        libc::CLOCK_REALTIME => wall,
        libc::CLOCK_MONOTONIC | libc::CLOCK_BOOTTIME => steady,
        _ => 0,
    };
    if result != 0 {
        return -1;
    }
    // SAFETY: the caller's promise; null was refused by the kernel.
    let time = unsafe { &mut *time };
    let nanos = time.tv_sec * 1_000_000_000 + time.tv_nsec + ahead;
    time.tv_sec = nanos.div_euclid(1_000_000_000);
    time.tv_nsec = nanos.rem_euclid(1_000_000_000);
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Instant, SystemTime};

    #[test]
    fn clocks_of_this_thread_are_shifted() {
        let (steady, wall) = (Instant::now(), SystemTime::now());
        advance(Duration::from_secs(100));
        correct_wall(-1000);
        assert!(steady.elapsed() >= Duration::from_secs(100));
        assert!(wall.elapsed().is_err());
        let elsewhere = std::thread::spawn(move || steady.elapsed()).join().unwrap();
        assert!(elsewhere < Duration::from_secs(50));
    }
}

//! Even pacing.

use std::time::{Duration, Instant};

/// How often a paced sender wakes: often enough that a router sees a stream, not a train of bursts.
const TICK: Duration = Duration::from_micros(100);
/// The most that is sent at once after the sender was kept from running.
const BURST: Duration = Duration::from_millis(1);

/// How fast to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rate {
    /// Packets per second, evenly in batches of at most a millisecond's worth. What cannot be sent
    /// in time is left out, not made up for by a burst.
    Paced(u32),
    /// As fast as the sender can.
    Flood,
}

/// Tells a sender how many packets are due.
pub(crate) struct Pacer {
    rate: Rate,
    wake: Instant,
    last: Instant,
    /// Packets due and not yet sent, with their fraction.
    credit: f64,
}

impl Pacer {
    pub(crate) fn new(rate: Rate) -> Self {
        // Without this the kernel lets a sleep of this thread last 50 µs longer.
        // SAFETY: the option takes one integer.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
        let now = Instant::now();
        Self {
            rate,
            wake: now,
            last: now,
            credit: 0.0,
        }
    }

    /// Waits for the next tick and yields how many packets are due, which may be none; `flood` when
    /// there is no pace.
    pub(crate) fn wait(&mut self, flood: usize) -> usize {
        let Rate::Paced(rate) = self.rate else {
            return flood;
        };
        self.wake += TICK;
        let now = Instant::now();
        match self.wake.checked_duration_since(now) {
            Some(pause) => std::thread::sleep(pause),
            None => self.wake = now,
        }
        self.due(Instant::now(), f64::from(rate))
    }

    fn due(&mut self, now: Instant, rate: f64) -> usize {
        let most = (rate * BURST.as_secs_f64()).max(1.0);
        let earned = rate * (now - self.last).as_secs_f64();
        self.credit = (self.credit + earned).min(most);
        self.last = now;
        let due = self.credit as usize;
        self.credit -= due as f64;
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due_after(rate: u32, steps: &[u64]) -> Vec<usize> {
        let mut pacer = Pacer::new(Rate::Paced(rate));
        let mut now = pacer.last;
        let mut due = |micros: &u64| {
            now += Duration::from_micros(*micros);
            pacer.due(now, f64::from(rate))
        };
        steps.iter().map(&mut due).collect()
    }

    #[test]
    fn packets_fall_due_evenly_and_a_pause_is_not_made_up_for() {
        assert_eq!(
            due_after(100_000, &[100, 5, 105, 10_000, 0]),
            [10, 0, 11, 100, 0]
        );
    }

    #[test]
    fn slow_rates_still_send() {
        assert_eq!(due_after(10, &[50_000, 50_001, 1_000]), [0, 1, 0]);
    }
}

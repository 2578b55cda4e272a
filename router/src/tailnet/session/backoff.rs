//! When to try again.

use std::time::{Duration, Instant};

use super::Failure;

const FIRST: Duration = Duration::from_millis(500);
const MOST: Duration = Duration::from_secs(30);
/// The same after a refusal, which somebody has to mend as a rule.
const FIRST_SLOW: Duration = Duration::from_secs(30);
const MOST_SLOW: Duration = Duration::from_secs(600);

/// Waits that double, each with jitter, so that the nodes of a server that comes back do not come all at once.
#[derive(Debug)]
pub(in crate::tailnet) struct Backoff {
    first: Duration,
    most: Duration,
    failures: u32,
    random: u64,
}

impl Backoff {
    pub(in crate::tailnet) fn new(seed: u64) -> Self {
        Self {
            first: FIRST,
            most: MOST,
            failures: 0,
            random: seed,
        }
    }

    /// One from half a minute to ten.
    pub(super) fn slow(seed: u64) -> Self {
        Self {
            first: FIRST_SLOW,
            most: MOST_SLOW,
            ..Self::new(seed)
        }
    }

    /// When to try again after one more failure.
    pub(in crate::tailnet) fn next(&mut self, now: Instant) -> Instant {
        let wait = self.first.saturating_mul(1 << self.failures.min(10));
        let wait = wait.min(self.most);
        self.failures = self.failures.saturating_add(1);
        now + self.spread(wait)
    }

    /// The same, but not before the server wants it.
    pub(super) fn after(&mut self, failure: &Failure, now: Instant) -> Instant {
        match failure.wait() {
            Some(wait) => now + wait + self.spread(wait / 8),
            None => self.next(now),
        }
    }

    /// Between half of `wait` and half as much again.
    pub(in crate::tailnet) fn spread(&mut self, wait: Duration) -> Duration {
        // SplitMix64.
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.random;
        bits = (bits ^ bits >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        let part = ((bits ^ bits >> 31) >> 40) as f64 / (1 << 24) as f64;
        wait.mul_f64(0.5 + part)
    }

    pub(in crate::tailnet) fn succeeded(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_half_a_minute_and_differ() {
        let now = Instant::now();
        let waits = |seed| {
            let mut backoff = Backoff::new(seed);
            (0..12).map(|_| backoff.next(now) - now).collect::<Vec<_>>()
        };
        for (at, wait) in waits(1).iter().enumerate() {
            let middle = FIRST.saturating_mul(1 << at.min(10)).min(MOST);
            assert!(
                (middle / 2..=middle * 3 / 2).contains(wait),
                "{at} {wait:?}"
            );
        }
        assert_ne!(waits(1), waits(2));
        let mut backoff = Backoff::new(1);
        for _ in 0..5 {
            backoff.next(now);
        }
        backoff.succeeded();
        assert!(backoff.next(now) - now < FIRST * 2);
    }
}

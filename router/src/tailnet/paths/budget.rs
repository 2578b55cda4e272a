//! How often something may be done.

use std::time::{Duration, Instant};

/// So many at once, and then one every interval.
#[derive(Debug)]
pub(super) struct Budget {
    interval: Duration,
    burst: u32,
    /// When all that has been taken is paid back.
    paid: Option<Instant>,
}

impl Budget {
    /// A full one.
    pub(super) const fn new(interval: Duration, burst: u32) -> Self {
        Self {
            interval,
            burst,
            paid: None,
        }
    }

    /// Takes one, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let paid = self.paid.map_or(now, |paid| paid.max(now));
        let left = paid - now + self.interval <= self.interval * self.burst;
        if left {
            self.paid = Some(paid + self.interval);
        }
        left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_the_rate() {
        let start = Instant::now();
        let mut budget = Budget::new(Duration::from_millis(100), 5);
        let mut taken = |at| (0..100).filter(|_| budget.take(start + at)).count();
        assert_eq!(taken(Duration::ZERO), 5);
        assert_eq!(taken(Duration::from_millis(99)), 0);
        assert_eq!(taken(Duration::from_millis(350)), 3);
        assert_eq!(taken(Duration::from_secs(60)), 5);
    }
}

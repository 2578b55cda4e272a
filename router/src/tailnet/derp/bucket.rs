//! How much a relay lets its client send.

use std::time::{Duration, Instant};

/// Bytes that may be sent: so many each second, and so many at once.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: f64,
    burst: f64,
    /// Below zero after what was larger than the burst.
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    /// A full one. `rate` in bytes a second, not 0.
    pub(super) fn new(rate: u32, burst: u32, now: Instant) -> Self {
        Self {
            rate: f64::from(rate.max(1)),
            burst: f64::from(burst),
            tokens: f64::from(burst),
            filled: now,
        }
    }

    /// Takes so many bytes; false if they may not be sent yet. What is larger than the burst goes when the bucket is
    /// full, and is made up for later: else it would never go.
    pub(super) fn take(&mut self, bytes: usize, now: Instant) -> bool {
        let past = now.saturating_duration_since(self.filled).as_secs_f64();
        self.tokens = (self.tokens + past * self.rate).min(self.burst);
        self.filled = now;
        let bytes = bytes as f64;
        let may = self.tokens >= bytes.min(self.burst);
        if may {
            self.tokens -= bytes;
        }
        may
    }

    /// How long until so many bytes may be sent.
    pub(super) fn wait(&self, bytes: usize) -> Duration {
        let missing = (bytes as f64).min(self.burst) - self.tokens;
        Duration::try_from_secs_f64(missing / self.rate).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept_to() {
        let start = Instant::now();
        let mut bucket = Bucket::new(10_000, 3000, start);
        let mut sent = 0;
        for millisecond in 0..10_000 {
            let now = start + Duration::from_millis(millisecond);
            while bucket.take(1457, now) {
                sent += 1457;
            }
        }
        assert!((100_000 - 1457..=103_000).contains(&sent), "{sent}");
    }

    #[test]
    fn what_is_larger_than_the_burst_goes_and_is_made_up_for() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1000, 100, start);
        assert!(bucket.take(1100, start));
        assert!(!bucket.take(1, start));
        let wait = bucket.wait(50);
        assert!((1.0..1.1).contains(&wait.as_secs_f64()), "{wait:?}");
        assert!(!bucket.take(50, start + wait - Duration::from_millis(2)));
        assert!(bucket.take(50, start + wait + Duration::from_millis(2)));
        // Without a burst everything waits for what went before.
        let mut bucket = Bucket::new(1000, 0, start);
        assert!(bucket.take(1000, start));
        assert!(!bucket.take(1000, start + Duration::from_millis(900)));
        assert!(bucket.take(1000, start + Duration::from_millis(1100)));
    }
}

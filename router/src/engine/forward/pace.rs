//! How fast handshakes are begun. One costs about 0.2 ms, in which no packet moves.

use std::time::Duration;

/// Least time between two, on the average: a fifth of a core.
const STEP: Duration = Duration::from_millis(1);
/// How many may go at once.
pub(crate) const BURST: u32 = 16;

/// A worker's pace.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// When the next one would go if none ever went at once.
    even: Duration,
}

impl Pace {
    /// When the next one may go.
    pub(crate) fn next(&self) -> Duration {
        self.even.saturating_sub(STEP * (BURST - 1))
    }

    /// Whether one may go now; then it counts as gone.
    pub(crate) fn take(&mut self, now: Duration) -> bool {
        let may = self.next() <= now;
        if may {
            self.even = self.even.max(now) + STEP;
        }
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_go_at_once_and_a_thousand_in_a_second() {
        let mut pace = Pace::default();
        for start in [0, 0, 1000, 5000] {
            let mut went = [0; 1000];
            for (ms, count) in (0..).zip(&mut went) {
                while pace.take(Duration::from_millis(start + ms)) {
                    *count += 1;
                }
            }
            assert!(went.iter().all(|count| *count <= BURST), "{went:?}");
            let all: u32 = went.iter().sum();
            assert!((start == 0 && all <= 1000 + BURST) || (1000..=1000 + BURST).contains(&all));
        }
    }
}

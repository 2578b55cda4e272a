//! When each peer must be looked at again: a timer wheel, so that peers for which nothing is due cost
//! nothing.

use std::time::Duration;

use crate::engine::forward::routes::PeerId;

/// How late a peer may be looked at: one step of the wheel.
pub(crate) const TICK: Duration = Duration::from_millis(100);
/// Steps of one turn, a multiple of 64. What is due later is looked at once a turn.
const STEPS: u64 = 512;

/// No time at all.
pub(crate) const NEVER: Duration = Duration::MAX;

/// Peers by the time at which they are due. An entry that its peer does not know of any more counts for
/// nothing.
#[derive(Debug)]
pub(crate) struct Wheel {
    steps: Box<[Vec<PeerId>]>,
    /// Steps that have entries.
    used: [u64; STEPS as usize / 64],
    /// The step that is next; all before are empty.
    next: u64,
    entries: usize,
}

impl Default for Wheel {
    fn default() -> Self {
        Self {
            steps: (0..STEPS).map(|_| Vec::new()).collect(),
            used: [0; STEPS as usize / 64],
            next: 0,
            entries: 0,
        }
    }
}

fn step(at: Duration) -> u64 {
    u64::try_from(at.as_millis()).unwrap_or(u64::MAX) / TICK.as_millis() as u64
}

fn time(step: u64) -> Duration {
    Duration::from_millis(step.saturating_mul(TICK.as_millis() as u64))
}

impl Wheel {
    /// How many entries there are, about one for each peer that anything is due for.
    pub(crate) fn len(&self) -> usize {
        self.entries
    }

    /// Has a peer looked at at this time or soon after, unless it is due before. `scheduled` is when it
    /// is due.
    pub(crate) fn schedule(
        &mut self,
        id: PeerId,
        scheduled: &mut Duration,
        at: Duration,
        now: Duration,
    ) {
        if self.entries == 0 {
            self.next = step(now);
        }
        let last = self.next + STEPS - 1;
        let due = step(at.max(now).saturating_add(TICK - Duration::from_millis(1)));
        let due = due.clamp(self.next, last);
        if time(due) >= *scheduled {
            return;
        }
        *scheduled = time(due);
        let place = (due % STEPS) as usize;
        self.steps[place].push(id);
        self.used[place / 64] |= 1 << (place % 64);
        self.entries += 1;
    }

    /// The first step with entries.
    fn first(&self) -> Option<u64> {
        let begin = self.next % STEPS;
        let words = self.used.len() as u64;
        // The word that we begin in comes twice: its upper bits first, its lower ones last.
        (0..=words).find_map(|at| {
            let word = (begin / 64 + at) % words;
            let mask = match at {
                0 => u64::MAX << (begin % 64),
                _ if at == words => !(u64::MAX << (begin % 64)),
                _ => u64::MAX,
            };
            let used = self.used[word as usize] & mask;
            let place = word * 64 + u64::from(used.trailing_zeros());
            (used != 0).then(|| self.next + (place + STEPS - begin) % STEPS)
        })
    }

    /// When [`Wheel::pop`] will give something.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        self.first().map(time)
    }

    /// Takes an entry that is due: a peer, and the time that it must know as its own.
    pub(crate) fn pop(&mut self, now: Duration) -> Option<(PeerId, Duration)> {
        let first = self.first()?;
        self.next = self.next.max(first.min(step(now)));
        if first > step(now) {
            return None;
        }
        let place = (first % STEPS) as usize;
        let id = self.steps[place].pop();
        if self.steps[place].is_empty() {
            // Gives its memory back.
            self.steps[place] = Vec::new();
            self.used[place / 64] &= !(1 << (place % 64));
        }
        self.entries -= usize::from(id.is_some());
        id.map(|id| (id, time(first)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(at: u64) -> Duration {
        Duration::from_millis(at)
    }

    proptest! {
        /// Each peer is looked at when it is due, at most a step later, whatever is changed meanwhile.
        #[test]
        fn nobody_is_early_or_forgotten(
            orders in proptest::collection::vec((0u32..20, 0u64..120_000, 0u64..3000), 1..200),
        ) {
            let mut wheel = Wheel::default();
            let mut scheduled = [NEVER; 20];
            let mut wanted = [NEVER; 20];
            let mut now = ms(0);
            let visit = |wheel: &mut Wheel, scheduled: &mut [Duration; 20], wanted: &mut [Duration; 20], now| {
                while let Some((id, at)) = wheel.pop(now) {
                    let id = id as usize;
                    if scheduled[id] != at {
                        continue;
                    }
                    scheduled[id] = NEVER;
                    if wanted[id] <= now {
                        assert!(now - wanted[id] < 2 * TICK);
                        wanted[id] = NEVER;
                    } else if wanted[id] != NEVER {
                        wheel.schedule(id as u32, &mut scheduled[id], wanted[id], now);
                    }
                }
            };
            for (id, later, pause) in orders {
                let at = now + ms(later);
                let id = id as usize;
                if at < wanted[id] {
                    wanted[id] = at;
                    wheel.schedule(id as u32, &mut scheduled[id], at, now);
                }
                // What is due at once does not wait for a step.
                visit(&mut wheel, &mut scheduled, &mut wanted, now);
                for _ in 0..pause / 100 {
                    now += TICK;
                    prop_assert!(wheel.deadline().is_none_or(|at| at + TICK > now));
                    visit(&mut wheel, &mut scheduled, &mut wanted, now);
                }
            }
            for _ in 0..1300 {
                now += TICK;
                visit(&mut wheel, &mut scheduled, &mut wanted, now);
            }
            prop_assert_eq!(wanted, [NEVER; 20]);
            prop_assert_eq!(wheel.len(), 0);
        }
    }

    #[test]
    fn a_long_sleep_forgets_nobody() {
        let mut wheel = Wheel::default();
        let mut scheduled = [NEVER; 3];
        for (id, at) in [(0, 100), (1, 5000), (2, 900_000)] {
            wheel.schedule(id, &mut scheduled[id as usize], ms(at), ms(0));
        }
        let now = ms(100_000_000);
        let mut due: Vec<_> = std::iter::from_fn(|| wheel.pop(now))
            .map(|due| due.0)
            .collect();
        due.sort_unstable();
        assert_eq!(due, [0, 1, 2]);
        wheel.schedule(0, &mut scheduled[0], now + ms(100), now);
        assert_eq!(
            wheel.deadline(),
            None,
            "it knows an earlier time as its own"
        );
        scheduled[0] = NEVER;
        wheel.schedule(0, &mut scheduled[0], now + ms(100), now);
        assert_eq!(wheel.deadline(), Some(now + ms(100)));
    }
}

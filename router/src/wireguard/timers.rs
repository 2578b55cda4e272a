//! When a tunnel acts of its own accord (WireGuard paper, section 6; where it leaves something open,
//! as Linux's drivers/net/wireguard/timers.c does). No clock, no cryptography.

use std::time::Duration;

/// Age from which a session is renewed by its initiator when it sends.
pub(super) const REKEY_AFTER: Duration = Duration::from_secs(120);
/// Age from which a session is dead.
pub(super) const REJECT_AFTER: Duration = Duration::from_secs(180);
/// How long a handshake is tried.
const REKEY_ATTEMPT: Duration = Duration::from_secs(90);
/// Least time between two initiations.
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest silence after a packet of the peer's.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most that is added at random, so that two ends or many peers do not go on in step.
const JITTER: u64 = 334;

/// Age from which the initiator renews a session on which it only receives.
pub(super) const LAST_MINUTE: Duration = REJECT_AFTER
    .saturating_sub(KEEPALIVE_TIMEOUT)
    .saturating_sub(REKEY_TIMEOUT);

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// An initiation.
    Initiation,
    /// An empty packet.
    Keepalive,
    /// The handshake under way is to be given up.
    GiveUp,
}

/// The timers of one tunnel. Each is the time at which it fires.
#[derive(Debug)]
pub(super) struct Timers {
    /// State of the jitter; never 0.
    random: u32,
    /// When the last initiation went.
    initiated: Option<Duration>,
    /// When a handshake was last asked for by anything but a retry.
    asked: Duration,
    /// The initiation goes again unless a handshake completes.
    retry: Option<Duration>,
    /// Somebody sent data, and nothing has come since.
    unanswered: Option<Duration>,
    /// Data came, and nothing has been sent since.
    keepalive: Option<Duration>,
    /// More data came while `keepalive` ran.
    more: bool,
    /// Nothing is due before.
    soonest: Duration,
}

/// No time at all.
const NEVER: Duration = Duration::MAX;

impl Timers {
    /// Nothing is due. `seed` makes the jitter of two tunnels differ.
    pub(super) fn new(seed: u32) -> Self {
        Self {
            random: seed.wrapping_mul(0x9e37_79b9) | 1,
            initiated: None,
            asked: Duration::ZERO,
            retry: None,
            unanswered: None,
            keepalive: None,
            more: false,
            soonest: NEVER,
        }
    }

    /// Nothing is due before; cheap, and perhaps too early.
    pub(super) fn soonest(&self) -> Duration {
        self.soonest
    }

    /// When something is due next, exactly.
    pub(super) fn next(&mut self) -> Duration {
        let all = [self.retry, self.unanswered, self.keepalive];
        self.soonest = all.into_iter().flatten().min().unwrap_or(NEVER);
        self.soonest
    }

    /// Whether a handshake is under way.
    pub(super) fn is_trying(&self) -> bool {
        self.retry.is_some()
    }

    /// Whether an initiation may be due.
    pub(super) fn may_initiate(&self, now: Duration) -> bool {
        let fired = |timer: Option<Duration>| timer.is_some_and(|at| at <= now);
        fired(self.retry) && now.saturating_sub(self.asked) < REKEY_ATTEMPT
            || fired(self.unanswered)
    }

    fn arm(&mut self, at: Duration) -> Option<Duration> {
        self.soonest = self.soonest.min(at);
        Some(at)
    }

    fn jitter(&mut self) -> Duration {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 17;
        self.random ^= self.random << 5;
        Duration::from_millis(u64::from(self.random) % JITTER)
    }

    /// A handshake is wanted. Tells whether an initiation may go now.
    pub(super) fn ask(&mut self, now: Duration) -> bool {
        self.asked = now;
        self.initiated
            .is_none_or(|last| now.saturating_sub(last) >= REKEY_TIMEOUT)
    }

    /// An initiation goes.
    pub(super) fn initiated(&mut self, now: Duration) {
        self.initiated = Some(now);
        let at = now + REKEY_TIMEOUT + self.jitter();
        self.retry = self.arm(at);
        self.sent();
    }

    /// The sessions and what was sent for them are void. A handshake under way begins again.
    pub(super) fn restart(&mut self) {
        self.initiated = None;
        if self.retry.is_some() {
            self.retry = self.arm(Duration::ZERO);
        }
        self.unanswered = None;
        self.keepalive = None;
        self.more = false;
    }

    /// A handshake has completed.
    pub(super) fn completed(&mut self) {
        self.retry = None;
    }

    /// Anything goes that the peer will take for authentic.
    pub(super) fn sent(&mut self) {
        self.keepalive = None;
    }

    /// A packet with content goes.
    pub(super) fn data_sent(&mut self, now: Duration) {
        if self.unanswered.is_none() {
            let at = now + KEEPALIVE_TIMEOUT + REKEY_TIMEOUT + self.jitter();
            self.unanswered = self.arm(at);
        }
    }

    /// Anything authentic came.
    pub(super) fn received(&mut self) {
        self.unanswered = None;
    }

    /// A packet with content came.
    pub(super) fn data_received(&mut self, now: Duration) {
        match self.keepalive {
            Some(_) => self.more = true,
            None => self.keepalive = self.arm(now + KEEPALIVE_TIMEOUT),
        }
    }

    /// Takes one timer that has fired; to be asked until there is none.
    pub(super) fn due(&mut self, now: Duration) -> Option<Due> {
        let fired = |timer: Option<Duration>| timer.is_some_and(|at| at <= now);
        if fired(self.retry) {
            self.retry = None;
            if now.saturating_sub(self.asked) < REKEY_ATTEMPT {
                return Some(Due::Initiation);
            }
            self.unanswered = None;
            self.keepalive = None;
            return Some(Due::GiveUp);
        }
        if fired(self.unanswered) {
            self.unanswered = None;
            if self.ask(now) {
                return Some(Due::Initiation);
            }
        }
        if fired(self.keepalive) {
            let more = std::mem::take(&mut self.more);
            self.keepalive = more.then_some(now + KEEPALIVE_TIMEOUT);
            return Some(Due::Keepalive);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(at: f64) -> Duration {
        Duration::from_secs_f64(at)
    }

    /// What fires until `end`, looked at every 100 ms from `start` on, with the time.
    fn fired(timers: &mut Timers, start: f64, end: f64) -> Vec<(f64, Due)> {
        let mut all = Vec::new();
        let steps = ((end - start) * 10.0) as u32;
        for now in (0..=steps).map(|step| start + f64::from(step) / 10.0) {
            while let Some(due) = timers.due(seconds(now)) {
                if due == Due::Initiation {
                    timers.initiated(seconds(now));
                }
                all.push((now, due));
            }
        }
        all
    }

    #[test]
    fn initiations_repeat_for_90_seconds() {
        for seed in 0..50 {
            let mut timers = Timers::new(seed);
            assert!(timers.ask(seconds(1.0)));
            timers.initiated(seconds(1.0));
            assert!(!timers.ask(seconds(1.0)), "one is under way");
            let all = fired(&mut timers, 1.0, 300.0);
            let (last, retries) = all.split_last().unwrap();
            assert_eq!(last.1, Due::GiveUp);
            assert!((91.0..97.0).contains(&last.0), "{last:?}");
            let mut before = 1.0;
            for (at, due) in retries {
                assert_eq!(*due, Due::Initiation);
                assert!((5.0..5.5).contains(&(at - before)), "{before} {at}");
                before = *at;
            }
        }
    }

    #[test]
    fn a_steady_wish_keeps_a_handshake_going() {
        let mut timers = Timers::new(1);
        timers.ask(seconds(0.0));
        timers.initiated(seconds(0.0));
        for minute in 0..10 {
            let at = f64::from(minute) * 60.0;
            timers.ask(seconds(at));
            let all = fired(&mut timers, at, at + 60.0);
            assert!(all.iter().all(|(_, due)| *due == Due::Initiation));
        }
    }

    #[test]
    fn a_completed_handshake_is_not_tried_again() {
        let mut timers = Timers::new(1);
        timers.ask(seconds(0.0));
        timers.initiated(seconds(0.0));
        timers.completed();
        assert_eq!(fired(&mut timers, 0.0, 300.0), []);
    }

    #[test]
    fn silence_after_data_asks_for_a_handshake() {
        let mut timers = Timers::new(1);
        // A long idle time before counts for nothing.
        timers.received();
        timers.data_sent(seconds(1000.0));
        timers.data_sent(seconds(1010.0));
        let (at, due) = fired(&mut timers, 1000.0, 1016.0)[0];
        assert_eq!(due, Due::Initiation);
        assert!((1015.0..1015.5).contains(&at), "{at}");

        let mut timers = Timers::new(1);
        timers.data_sent(seconds(0.0));
        timers.received();
        assert_eq!(fired(&mut timers, 0.0, 300.0), []);
    }

    #[test]
    fn data_without_an_answer_gets_a_keepalive_after_ten_seconds() {
        let mut timers = Timers::new(1);
        timers.data_received(seconds(100.0));
        let due = [(110.0, Due::Keepalive)];
        assert_eq!(fired(&mut timers, 100.0, 300.0), due);

        // More data in that time: one more keepalive, ten seconds later.
        timers.data_received(seconds(400.0));
        timers.data_received(seconds(405.0));
        let due = [(410.0, Due::Keepalive), (420.0, Due::Keepalive)];
        assert_eq!(fired(&mut timers, 400.0, 500.0), due);

        timers.data_received(seconds(600.0));
        timers.sent();
        assert_eq!(fired(&mut timers, 600.0, 700.0), []);
    }
}

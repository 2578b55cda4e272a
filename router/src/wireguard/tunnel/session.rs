//! What we know of a session beside its keys, which are boringtun's.

use std::time::Duration;

use crate::wireguard::timers::REJECT_AFTER;

/// Sessions that boringtun holds, each in the slot of its index modulo this.
pub(super) const SLOTS: usize = 8;

/// A session as we know it; its keys are boringtun's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Session {
    /// Our receiver index.
    pub(super) index: u32,
    /// Which of the tunnel's sessions it is.
    pub(super) serial: u64,
    pub(super) born: Duration,
    /// We began the handshake.
    pub(super) ours: bool,
    /// The peer has proved that it has the keys.
    pub(super) confirmed: bool,
}

impl Session {
    /// Where boringtun has it.
    pub(super) fn slot(index: u32) -> usize {
        index as usize % SLOTS
    }

    /// How long ago the handshake was.
    pub(super) fn age(&self, now: Duration) -> Duration {
        now.saturating_sub(self.born)
    }

    /// Whether its keys may still be used.
    pub(super) fn alive(&self, now: Duration) -> bool {
        self.age(now) < REJECT_AFTER
    }
}

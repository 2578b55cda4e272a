//! What a machine without IPv6 does to a router that is to carry it.

use std::time::{Duration, Instant};

use crate::netlink::sysctl::{self, Ipv6};

/// Between two looks at whether IPv6 has come back: the kernel tells of it only in part.
const AGAIN: Duration = Duration::from_secs(1);

/// Looks after IPv6 while the TUN device cannot have it, and says so once.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// What is wrong, as it was told.
    problem: Option<String>,
    due: Option<Instant>,
}

impl Watch {
    /// What is wrong and matters, for `status`.
    pub(super) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    /// When [`Watch::changed`] has something to look at.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Takes what a new plan says of it.
    pub(super) fn tell(&mut self, problem: Option<String>) {
        if problem == self.problem {
            return;
        }
        match &problem {
            Some(problem) => {
                tracing::warn!("{problem}");
                self.due = Some(Instant::now() + AGAIN);
            }
            None => {
                tracing::info!("IPv6 is there again, and all that is configured for it");
                self.due = None;
            }
        }
        self.problem = problem;
    }

    /// Whether IPv6 on the TUN device is no longer as `known`. Asks the kernel only when it is due.
    pub(super) fn changed(&mut self, known: Ipv6, device: &str, now: Instant) -> bool {
        if self.due.is_none_or(|due| due > now) {
            return false;
        }
        self.due = Some(now + AGAIN);
        sysctl::ipv6_of(device) != known
    }
}

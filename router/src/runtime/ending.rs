//! How the daemon ends.

use super::{Daemon, whereabouts};

/// How the daemon ends when it is told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// It leaves the machine as it was found.
    Stop,
    /// Another one comes: flows go on.
    HandOver,
}

impl Daemon {
    /// Ends, and leaves to the next daemon what keeps flows alive. Until that comes, packets for
    /// peers are dropped in silence: whoever was refused would give up.
    pub(super) async fn hand_over(mut self) {
        self.leave_tailnet(false).await;
        if let Some(config) = self.sources.peek()
            && config.local.device != self.sources.local.device
        {
            tracing::info!(
                device = config.local.device,
                "the file names another device, whose daemon takes nothing over"
            );
            return self.stop().await;
        }
        let warn = |error: &dyn std::error::Error| tracing::warn!(%error, "flows may end here");
        let path = self.lock.whereabouts();
        if let Err(error) = whereabouts::leave(&path, &self.machine.engine.peer_stats()) {
            tracing::warn!(%error, path = %path.display(), "clients have to come back by themselves");
        }
        let path = self.lock.networks();
        if let Err(error) = self.cloud.leave(&path) {
            tracing::warn!(%error, path = %path.display(), "flows into the VPC may end here");
        }
        let mut machine = self.machine;
        machine.guard.remove();
        // The programs go after the device, lest a packet of a flow of theirs reach the kernel; and the
        // kernel's ruleset goes with `machine`, after all of it.
        drop(machine.engine);
        if let Some(ebpf) = machine.ebpf
            && let Err(error) = ebpf.leave()
        {
            warn(&error);
        }
    }

    /// Takes away everything that the daemon made.
    pub(super) async fn stop(mut self) {
        self.leave_tailnet(true).await;
        self.machine.remove().await;
    }
}

//! How the daemon ends.

use super::{Daemon, TABLE, whereabouts};
use crate::datapath::Datapath as _;
use crate::netlink::RuleSpec;

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
        if let Ok(config) = self.source.load()
            && config.local.device != self.local.device
        {
            tracing::info!(
                device = config.local.device,
                "the file names another device, whose daemon takes nothing over"
            );
            return self.stop().await;
        }
        let warn = |error: &dyn std::error::Error| tracing::warn!(%error, "flows may end here");
        let path = self.lock.whereabouts();
        if let Err(error) = whereabouts::leave(&path, &self.engine.peer_stats()) {
            tracing::warn!(%error, path = %path.display(), "clients have to come back by themselves");
        }
        self.guard.remove();
        // The programs go after the device, lest a packet of a flow of theirs reach the kernel; and the
        // kernel's ruleset goes with `self`, after all of it.
        self.engine.shutdown();
        if let Some(ebpf) = self.ebpf
            && let Err(error) = ebpf.leave()
        {
            warn(&error);
        }
    }

    /// Takes away everything that the daemon made. Goes on after a failure, and says so.
    pub(super) async fn stop(mut self) {
        let warn = |what: &str, error: &dyn std::error::Error| {
            tracing::warn!(%error, "{what} was not removed; the next start does it");
        };
        self.guard.remove();
        if let Some(ebpf) = &mut self.ebpf
            && let Err(error) = ebpf.remove()
        {
            warn("the eBPF datapath", &error);
        }
        if let Err(error) = self
            .netlink
            .remove_rules(&RuleSpec::new(TABLE, self.local.marks.underlay))
            .await
        {
            warn("a routing rule", &error);
        }
        if let Err(error) = self.netlink.release_routes(TABLE).await {
            warn("a route", &error);
        }
        // The filter goes after the device, lest a packet pass without it.
        self.engine.shutdown();
        if let Err(error) = self.sysctls.restore() {
            warn("a forwarding sysctl", &error);
        }
        if let Err(error) = self.kernel.remove() {
            warn("the nf_tables ruleset", &error);
        }
    }
}

//! What the runtime does with a configuration: compares it with the machine, and reads it again.

use std::time::Instant;

use super::{Daemon, Error, facts};
use crate::config::{self, Config};
use crate::core::{Facts, Part};

impl Daemon {
    /// Reads the configuration again. With any problem in it, the old one stays in force whole.
    pub(super) async fn reload(&mut self) {
        let problems = match self.try_reload().await {
            Ok(needs_restart) => needs_restart,
            Err(error) => error.to_string().lines().map(str::to_owned).collect(),
        };
        for problem in &problems {
            tracing::warn!("{problem}");
        }
        self.reload_problems = problems;
    }

    async fn try_reload(&mut self) -> Result<Vec<String>, Error> {
        let config = self.source.load()?;
        let facts = facts::gather(&self.netlink, &config.snapshot, Some(self.tun.index)).await?;
        check(&config, &facts)?;
        let mut needs_restart = Vec::new();
        if config.local.private_key != self.local.private_key {
            // The new key may be a former peer's, and a new peer's the old one: with no peers left
            // there is nothing to clash, and a new key ends every session anyway.
            self.core.invalidate(Part::Peers);
            self.engine.set_peers(&[])?;
            self.engine.set_private_key(&config.local.private_key)?;
            self.local.private_key = config.local.private_key.clone();
        }
        if config.local != self.local {
            needs_restart = config::restart_needed(&self.local, &config.local);
        }
        if config.snapshot != self.snapshot || facts != self.facts {
            tracing::info!(
                peers = config.snapshot.peers.len(),
                routes = config.snapshot.routes.len(),
                rules = config.snapshot.policy.rules.len(),
                "the configuration was read again"
            );
            self.snapshot = config.snapshot;
            self.facts = facts;
            self.names.track(&self.snapshot, Instant::now());
            self.replan();
        }
        self.guard.try_again();
        self.guard_uplink();
        Ok(needs_restart)
    }
}

/// Compares a configuration with this machine.
pub(super) fn check(config: &Config, facts: &Facts) -> Result<(), Error> {
    let problems = config::check_against_system(config, facts);
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::System(
        problems
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("\n"),
    ))
}

//! What the runtime does with a configuration: compares it with the machine, and reads it again.

use std::time::Instant;

use super::{Daemon, Error};
use crate::config::{self, Config};
use crate::control::Snapshot;
use crate::core::{Facts, Part};
use crate::engine::{self, PeerSpec};
use crate::wireguard::keys::PrivateKey;

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
        let facts = self.gather(&config.snapshot).await?;
        check(&config, &facts)?;
        let facts = self.remember_subnet(facts, &config.snapshot);
        let moved = config.local.listen_port != self.local.listen_port;
        // The only thing that may fail by others' fault comes first.
        self.listen_on(config.local.listen_port)?;
        if config.local.private_key != self.local.private_key {
            // With no peers left there is nothing to clash, and a new key ends every session anyway.
            self.take_key(&config.local.private_key, &[])?;
        }
        let needs_restart = config::restart_needed(&self.local, &config.local);
        self.file = config.clone();
        if config.snapshot != self.snapshot || facts != self.facts || moved {
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

    /// Adds to new facts which interfaces are the subnet side now. Other routes than those in force
    /// begin anew.
    pub(super) fn remember_subnet(&self, mut facts: Facts, snapshot: &Snapshot) -> Facts {
        let plan = self.core.wanted().map(|plan| &plan.datapath);
        if let Some(spec) = plan.filter(|spec| spec.routes == snapshot.routes) {
            let links = spec.subnet.iter();
            let there = links.filter(|link| {
                let found = facts.links.get(&link.index);
                found.is_some_and(|found| found.name == link.name)
            });
            facts.former = there.map(|link| link.index).collect();
        }
        facts
    }

    /// Listens on this UDP port, host byte order. On error the old one stays in use.
    pub(super) fn listen_on(&mut self, port: u16) -> Result<(), engine::Error> {
        if port != self.local.listen_port {
            self.engine.set_listen_port(port)?;
            self.local.listen_port = port;
        }
        Ok(())
    }

    /// Takes a private key, with no peers but `staying`: the key may be a former peer's, and a new
    /// peer's the old one. The next plan brings the others.
    pub(super) fn take_key(
        &mut self,
        key: &PrivateKey,
        staying: &[PeerSpec],
    ) -> Result<(), engine::Error> {
        self.core.invalidate(Part::Peers);
        self.engine.set_peers(staying)?;
        if *key != self.local.private_key {
            self.engine.set_private_key(key)?;
            self.local.private_key = key.clone();
        }
        Ok(())
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

//! Puts in force what the core has decided: the one part of the runtime that changes the machine.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::denied::DeniedLog;
use super::fastpath::discard_pins;
use super::guard::UplinkGuard;
use crate::config::DatapathMode;
use crate::control::State;
use crate::core::{
    Action, Names, Plan, overlay_change, peer_change, peer_specs, route_change, tunnel_routes,
};
use crate::datapath::ebpf::Ebpf;
use crate::datapath::kernel::Kernel;
use crate::datapath::marks::Marks;
use crate::datapath::{Datapath, Link, Spec};
use crate::engine::{self, Engine, PeerChange, Skipped};
use crate::netlink::sysctl::{self, Ipv6, Sysctls};
use crate::netlink::{DroppingRule, Netlink, RuleSpec};
use crate::wireguard::keys::{PrivateKey, PublicKey};

/// Our routing table.
pub(super) const TABLE: u32 = 51_820;

/// What carries packets, and what has the kernel carry them.
pub(super) struct Machine {
    pub(super) netlink: Netlink,
    pub(super) sysctls: Sysctls,
    pub(super) engine: Arc<Engine>,
    pub(super) tun: Link,
    pub(super) kernel: Kernel,
    pub(super) ebpf: Option<Ebpf>,
    pub(super) denied: Option<DeniedLog>,
    /// What the configuration asks for.
    pub(super) mode: DatapathMode,
    /// Why the datapath is the one it is.
    pub(super) datapath_reason: String,
    pub(super) marks: Marks,
    pub(super) guard: UplinkGuard,
    /// Where peers were when the daemon before ended, until the engine has been told.
    pub(super) whereabouts: Vec<(PublicKey, engine::Path)>,
    /// By what other names the device was called, in words, until that is told.
    pub(super) renamed: Vec<String>,
    /// Rules of others that drop packets, by family, as last seen.
    pub(super) dropping: [Vec<DroppingRule>; 2],
    /// Peers that the engine does not take, and why.
    pub(super) skipped: BTreeMap<PublicKey, String>,
}

/// What is wanted.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'w> {
    pub(super) plan: &'w Plan,
    pub(super) state: &'w State,
    pub(super) names: &'w Names,
}

impl Wanted<'_> {
    fn spec(&self) -> Spec {
        let mut spec = self.plan.datapath.clone();
        spec.overlay.clone_from(self.state.peers.allowed_ips());
        spec
    }
}

impl Machine {
    pub(super) fn active_datapath(&self) -> &'static str {
        if self.ebpf.is_some() {
            "ebpf"
        } else {
            "kernel"
        }
    }

    /// Carries an action out; what of it had to be changed, in words, as far as others may change it.
    pub(super) async fn carry_out(
        &mut self,
        action: &Action,
        wanted: Wanted<'_>,
    ) -> Result<Vec<String>, String> {
        let state = wanted.state;
        match action {
            Action::Device { mtu } => self.set_up_device(*mtu).await,
            Action::Addresses(family, addresses) => {
                let index = self.tun.index;
                let synced = self.netlink.sync_addresses(index, *family, addresses);
                synced.await.map_err(text)
            }
            Action::Datapath { .. } => {
                let spec = wanted.spec();
                self.kernel.apply(&spec).map_err(text)?;
                let applied = self.apply_to_programs(&spec)?;
                // Nothing is translated before the policy about it stands.
                self.engine.set_sites(&wanted.plan.sites).map_err(text)?;
                Ok(applied)
            }
            Action::OverlayChanged { nets, .. } => {
                let change = overlay_change(state, nets);
                self.kernel.change_peers(&change).map_err(text)?;
                if let Some(ebpf) = &mut self.ebpf {
                    ebpf.change_peers(&change).map_err(text)?;
                }
                Ok(Vec::new())
            }
            Action::Forwarding(family, links) => self.sysctls.apply(*family, links).map_err(text),
            Action::Routes { family, way, .. } => {
                let nets = match way {
                    Ipv6::Absent => Vec::new(),
                    Ipv6::On | Ipv6::Off => tunnel_routes(state, *family),
                };
                let index = self.leads(*way);
                let synced = self.netlink.sync_routes(TABLE, *family, index, &nets);
                synced.await.map_err(text)
            }
            Action::RoutesChanged {
                family, way, nets, ..
            } => {
                if *way != Ipv6::Absent {
                    let (add, remove) = route_change(state, nets);
                    let index = self.leads(*way);
                    let netlink = &self.netlink;
                    let changed = netlink.change_routes(TABLE, *family, index, &add, &remove);
                    changed.await.map_err(text)?;
                }
                Ok(Vec::new())
            }
            Action::Rules(family) => {
                let rules = self.rules();
                let synced = self.netlink.sync_rules(&rules, *family).await;
                let dropping = self.netlink.dropping_rules(&rules, *family).await;
                self.dropping[*family as usize] = dropping.map_err(text)?;
                synced.map_err(text)
            }
            Action::Key(key) => {
                if let Some(key) = key {
                    self.take_key(key).map_err(text)?;
                }
                Ok(Vec::new())
            }
            Action::Peers { .. } => {
                let specs = peer_specs(state, wanted.names);
                let skipped = self.engine.set_peers(&specs).map_err(text)?;
                self.skip(skipped);
                let whereabouts = std::mem::take(&mut self.whereabouts);
                let resumed = self.engine.resume(&whereabouts);
                resumed.map(|()| Vec::new()).map_err(text)
            }
            Action::PeersChanged { keys, .. } => {
                // What keeps one out may have gone with another.
                let again = self.skipped.keys().filter(|key| !keys.contains(key));
                let change = peer_change(state, wanted.names, keys.iter().chain(again));
                let skipped = self.engine.change_peers(&change).map_err(text)?;
                self.skip(skipped);
                Ok(Vec::new())
            }
        }
    }

    async fn set_up_device(&mut self, mtu: u16) -> Result<Vec<String>, String> {
        self.name_device().await?;
        let index = self.tun.index;
        let changed = self.netlink.set_link(index, u32::from(mtu), true).await;
        // Packets are padded no further.
        self.engine.set_mtu(mtu).map_err(text)?;
        if self.ebpf.is_some()
            && let Err(error) = sysctl::accept_local(&self.tun.name)
        {
            tracing::warn!(
                %error,
                "cannot set accept_local of {}: packets of translated flows that must be \
                 cut for a narrow link are lost; make /proc/sys/net writable",
                self.tun.name
            );
        }
        let changed = changed.map_err(text)?;
        Ok([std::mem::take(&mut self.renamed), changed].concat())
    }

    /// Has the device bear its name, by which sysctls are found.
    pub(super) async fn name_device(&mut self) -> Result<(), String> {
        let Link { index, name } = &self.tun;
        match self.netlink.name_link(*index, name).await.map_err(text)? {
            Some(renamed) => {
                self.renamed.extend(renamed);
                Ok(())
            }
            None => Err(format!(
                "somebody has moved {name} to another network namespace, so no packet passes between \
                 peers and this machine: restart the daemon (`systemctl restart sluice`), which makes it anew"
            )),
        }
    }

    /// Where the configuration leaves the choice and the programs fail, they go, and the kernel datapath
    /// has to be told.
    fn apply_to_programs(&mut self, spec: &Spec) -> Result<Vec<String>, String> {
        let Some(ebpf) = &mut self.ebpf else {
            return Ok(Vec::new());
        };
        match ebpf.apply(spec) {
            Err(error) if self.mode == DatapathMode::Auto => {
                tracing::warn!(%error, "falling back to the kernel datapath");
                self.datapath_reason = format!("eBPF failed: {error}");
                if let Err(error) = ebpf.remove() {
                    tracing::warn!(%error, "the eBPF datapath was not removed whole");
                }
                self.ebpf = None;
                self.denied = None;
                discard_pins(&self.tun.name);
                Ok(Vec::new())
            }
            outcome => outcome.map(|()| Vec::new()).map_err(text),
        }
    }

    fn leads(&self, way: Ipv6) -> Option<u32> {
        (way == Ipv6::On).then_some(self.tun.index)
    }

    fn rules(&self) -> RuleSpec {
        RuleSpec::new(TABLE, self.marks.underlay)
    }

    /// Notes all peers that the engine does not take, and says so once of each.
    fn skip(&mut self, skipped: Vec<Skipped>) {
        let before = std::mem::take(&mut self.skipped);
        for Skipped { public_key, error } in skipped {
            let why = error.to_string();
            if before.get(&public_key) != Some(&why) {
                tracing::warn!(peer = %public_key, "a peer is left out: {why}");
            }
            self.skipped.insert(public_key, why);
        }
    }

    /// Takes a private key. The key may be a former peer's, which goes first.
    fn take_key(&self, key: &PrivateKey) -> Result<(), engine::Error> {
        self.drop_peers(vec![key.public()])?;
        self.engine.set_private_key(key)
    }

    /// Has the engine forget these peers with their sessions and counters.
    pub(super) fn drop_peers(&self, remove: Vec<PublicKey>) -> Result<(), engine::Error> {
        let change = PeerChange {
            set: Vec::new(),
            remove,
        };
        self.engine.change_peers(&change).map(|_| ())
    }

    /// The kernel's routing may lead elsewhere: the programs must not rely on what they know of it.
    pub(super) fn renew_next_hops(&mut self) {
        if let Some(ebpf) = &mut self.ebpf
            && let Err(error) = ebpf.bump_generation()
        {
            tracing::warn!(%error, "the fast path does not know of a change of the network");
        }
    }

    /// Keeps the kernel's knowledge of the next hops fresh that flows go to.
    pub(super) async fn look_after_neighbours(&self) {
        let report = self.ebpf.as_ref().and_then(Ebpf::flow_report);
        let used = report.map(|report| report.next_hops).unwrap_or_default();
        if let Err(error) = self.netlink.probe_neighbours(&used).await {
            tracing::warn!(%error, "the next hops of flows were not looked after");
        }
    }

    /// Takes away everything that the daemon made. Goes on after a failure, and says so.
    pub(super) async fn remove(mut self) {
        let warn = |what: &str, error: &dyn std::error::Error| {
            tracing::warn!(%error, "{what} was not removed; the next start does it");
        };
        self.guard.remove();
        if let Some(ebpf) = &mut self.ebpf
            && let Err(error) = ebpf.remove()
        {
            warn("the eBPF datapath", &error);
        }
        if let Err(error) = self.netlink.remove_rules(&self.rules()).await {
            warn("a routing rule", &error);
        }
        if let Err(error) = self.netlink.release_routes(TABLE).await {
            warn("a route", &error);
        }
        // The filter goes after the device, lest a packet pass without it.
        drop(self.engine);
        if let Err(error) = self.sysctls.restore() {
            warn("a forwarding sysctl", &error);
        }
        if let Err(error) = self.kernel.remove() {
            warn("the nf_tables ruleset", &error);
        }
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

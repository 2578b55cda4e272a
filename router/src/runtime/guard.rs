//! The uplink's guard, kept where the uplink is. It is a help, never a need: where it cannot be, a
//! warning and `status` tell why, and the router carries on without.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::Daemon;
use crate::api::{GuardStatus, Problem};
use crate::datapath::ebpf::guard::{Guard, Indices};
use crate::datapath::{Error, Link};
use crate::engine::{Engine, IndexWatch};

/// The guard, if there is one, and why it is where it is.
pub(super) struct UplinkGuard {
    wanted: bool,
    guard: Option<Guard>,
    /// The uplink that was last tried.
    tried: Option<Link>,
    reason: String,
}

impl UplinkGuard {
    /// Loads the guard if it is wanted.
    pub(super) fn load(wanted: bool) -> Self {
        let (guard, reason) = match wanted.then(Guard::load) {
            None => (None, "the configuration does not ask for it".to_owned()),
            Some(Ok(guard)) => (Some(guard), "there is no uplink".to_owned()),
            Some(Err(error)) => (None, unguarded(&error)),
        };
        Self {
            wanted,
            guard,
            tried: None,
            reason,
        }
    }

    /// Has the engine tell the guard of its receiver indices.
    pub(super) fn watch(&self, engine: &Engine) {
        if let Some(guard) = &self.guard {
            engine.watch_indices(Box::new(guard.indices()));
        }
    }

    /// Has the next [`UplinkGuard::follow`] try again what failed.
    pub(super) fn try_again(&mut self) {
        if self
            .guard
            .as_ref()
            .is_some_and(|g| g.attached_to().is_none())
        {
            self.tried = None;
        }
    }

    /// Guards `port` at `addresses` on `uplink`. `others`: what is no WireGuard message is wanted too.
    fn follow(&mut self, uplink: Option<&Link>, port: u16, addresses: &[IpAddr], others: bool) {
        let Some(guard) = &mut self.guard else {
            return;
        };
        if let Err(error) = guard.let_others_pass(others) {
            tracing::warn!(
                %error,
                "the uplink's guard may drop the datagrams by which peers of a tailnet are found; \
                 uplink_guard = \"off\" in [datapath] takes it away"
            );
        }
        if let Err(error) = guard.protect(port, addresses) {
            // It guards what it knew before.
            tracing::warn!(%error, "the uplink's guard does not know of a change");
        }
        if self.tried.as_ref() == uplink {
            return;
        }
        self.tried = uplink.cloned();
        self.reason = match uplink {
            Some(uplink) => match guard.attach(uplink) {
                Ok(()) => {
                    tracing::info!(uplink = %uplink.name, "the uplink is guarded");
                    "attached".to_owned()
                }
                Err(error) => unguarded(&error),
            },
            None => {
                self.remove();
                "there is no uplink".to_owned()
            }
        };
    }

    /// Takes the guard off its interface.
    pub(super) fn remove(&mut self) {
        if let Some(guard) = &mut self.guard
            && let Err(error) = guard.detach()
        {
            tracing::warn!(%error, "the uplink's guard was not removed");
        }
    }

    /// For the status document.
    pub(super) fn status(&self, problems: &mut Vec<Problem>) -> GuardStatus {
        let mut frames = BTreeMap::new();
        match self.guard.as_ref().map(Guard::counters).transpose() {
            Ok(counters) => {
                let counters = counters.unwrap_or_default().into_iter();
                frames.extend(counters.map(|(judgement, count)| (judgement.label(), count)));
            }
            Err(error) => problems.push(Problem {
                part: "counters".to_owned(),
                error: error.to_string(),
            }),
        }
        let link = self.guard.as_ref().and_then(Guard::attached_to);
        GuardStatus {
            requested: if self.wanted { "auto" } else { "off" },
            interface: link.map(|link| link.name.clone()),
            reason: self.reason.clone(),
            frames,
        }
    }
}

fn unguarded(error: &Error) -> String {
    let reason = error.to_string();
    tracing::warn!("the uplink is not guarded: {reason}");
    reason
}

impl IndexWatch for Indices {
    fn changed(&mut self, new: &[u32], gone: &[u32]) {
        if let Err(error) = self.change(new, gone) {
            tracing::warn!(%error, "the uplink's guard lets every receiver index pass from now on");
        }
    }
}

impl Daemon {
    /// Has the guard follow the plan and the addresses of this machine.
    pub(super) fn guard_uplink(&mut self) {
        let links = self.network.facts.links.values();
        let addresses: Vec<IpAddr> = links
            .flat_map(|link| &link.addresses)
            .map(IpNet::addr)
            .collect();
        let uplink = self.core.wanted().and_then(|plan| plan.uplink.as_ref());
        let engine = &self.machine.engine;
        let (port, others) = (engine.listen_port(), engine.takes_others());
        self.machine.guard.follow(uplink, port, &addresses, others);
    }
}

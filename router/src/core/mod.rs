//! Decisions without I/O: what should be in force, what is, and the next step between the two.
//!
//! [`plan()`] turns settings, what control sources want ([`State`](crate::control::State)) and what the
//! kernel says of the network ([`Facts`]) into one small [`Plan`]; what there is of each peer stays in
//! the state. [`Core`] compares the plan with what has been applied, part by part, is told what of the
//! state has changed, and hands out one [`Action`] at a time: of what there is much of, only what has
//! changed since. A part that fails is tried again with a growing pause, while the others go on. No
//! clock is read here: the caller passes `now`.

mod facts;
mod foreign;
mod mtu;
mod names;
mod peers;
mod plan;
mod revisions;
mod via;
mod vrf;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ipnet::IpNet;

pub use facts::{Facts, LinkFacts, Path, Vrf};
pub use foreign::{Foreign, PATIENCE};
pub use mtu::{Narrow, misfit, tunnel_mtu};
pub use names::{Names, REFRESH, RETRY};
pub use peers::{overlay_change, peer_change, peer_spec, peer_specs, route_change, tunnel_routes};
pub use plan::{Overlay, Plan, plan};
pub use via::via_problems;

use self::revisions::Revisions;
use crate::control::Changed;
use crate::datapath::Link;
use crate::netlink::Family;
use crate::netlink::sysctl::Ipv6;
use crate::wireguard::keys::{PrivateKey, PublicKey};

/// The first pause before a failed part is tried again; it doubles up to [`LONGEST_PAUSE`].
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause between two tries of a failed part.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The parts of a plan, in the order in which they are put in force: the policy stands before
/// forwarding is switched on, and peers come last. What each family of addresses has for itself is a
/// part of its own: what one of them cannot have never stops the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// MTU and state of the TUN device.
    Device,
    /// Its addresses.
    Addresses(Family),
    /// nf_tables ruleset and eBPF programs.
    Datapath,
    /// Forwarding sysctls.
    Forwarding(Family),
    /// Routes of the overlay into the TUN device, in our own table.
    Routes(Family),
    /// The rules that lead to our table.
    Rules(Family),
    /// The private key.
    Key,
    /// The engine's peers.
    Peers,
}

impl Part {
    const ALL: [Self; 12] = [
        Self::Device,
        Self::Addresses(Family::V4),
        Self::Addresses(Family::V6),
        Self::Datapath,
        Self::Forwarding(Family::V4),
        Self::Forwarding(Family::V6),
        Self::Routes(Family::V4),
        Self::Routes(Family::V6),
        Self::Rules(Family::V4),
        Self::Rules(Family::V6),
        Self::Key,
        Self::Peers,
    ];

    /// The family that the part is for; `None` for both.
    fn family(self) -> Option<Family> {
        match self {
            Self::Addresses(family)
            | Self::Forwarding(family)
            | Self::Routes(family)
            | Self::Rules(family) => Some(family),
            Self::Device | Self::Datapath | Self::Key | Self::Peers => None,
        }
    }

    /// The word for logs, metrics and `status`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Addresses(_) => "addresses",
            Self::Datapath => "datapath",
            Self::Forwarding(_) => "forwarding",
            Self::Routes(_) => "routes",
            Self::Rules(_) => "rules",
            Self::Key => "key",
            Self::Peers => "peers",
        }
    }
}

/// One step for the runtime. What there is much of is not in it: it stands in the state, and its
/// revision here tells one from another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Give the TUN device its MTU (bytes), and set it up.
    Device {
        /// MTU in bytes.
        mtu: u16,
    },
    /// Give the TUN device exactly these addresses of the family.
    Addresses(Family, Vec<IpNet>),
    /// Make the datapath serve the plan, and the allowed IPs of the state; and the engine translate for sites.
    Datapath {
        /// Of both.
        revision: u64,
    },
    /// Make it serve these allowed IPs as they are now in the state; all else is as before.
    OverlayChanged {
        /// What is in force then.
        revision: u64,
        /// Those that came, went or changed hands.
        nets: Vec<IpNet>,
    },
    /// Let the kernel forward packets of the family from and to these interfaces.
    Forwarding(Family, Vec<Link>),
    /// Have exactly the family's routes to what is in the tunnel.
    Routes {
        /// The family.
        family: Family,
        /// Where they can lead.
        way: Ipv6,
        /// Of the networks.
        revision: u64,
    },
    /// Have routes to those of these networks that are in the tunnel now, and none to the others; all
    /// else is as before.
    RoutesChanged {
        /// The family.
        family: Family,
        /// Where they can lead.
        way: Ipv6,
        /// What is in force then.
        revision: u64,
        /// Those that may have come or gone.
        nets: Vec<IpNet>,
    },
    /// Have the rules of the family that lead to our table.
    Rules(Family),
    /// Be the one with this private key.
    Key(Option<PrivateKey>),
    /// Have exactly the peers of the state.
    Peers {
        /// Of the peers.
        revision: u64,
    },
    /// Have these peers as they are now in the state; all else is as before.
    PeersChanged {
        /// What is in force then.
        revision: u64,
        /// Those that came, went or changed.
        keys: Vec<PublicKey>,
    },
}

impl Action {
    /// The part of the plan that the action puts in force.
    pub fn part(&self) -> Part {
        match self {
            Self::Device { .. } => Part::Device,
            Self::Addresses(family, _) => Part::Addresses(*family),
            Self::Datapath { .. } | Self::OverlayChanged { .. } => Part::Datapath,
            Self::Forwarding(family, _) => Part::Forwarding(*family),
            Self::Routes { family, .. } | Self::RoutesChanged { family, .. } => {
                Part::Routes(*family)
            }
            Self::Rules(family) => Part::Rules(*family),
            Self::Key(_) => Part::Key,
            Self::Peers { .. } | Self::PeersChanged { .. } => Part::Peers,
        }
    }

    /// The action after which the same is in force, whatever was before.
    fn whole(&self) -> Self {
        match *self {
            Self::OverlayChanged { revision, .. } => Self::Datapath { revision },
            Self::RoutesChanged {
                family,
                way,
                revision,
                ..
            } => Self::Routes {
                family,
                way,
                revision,
            },
            Self::PeersChanged { revision, .. } => Self::Peers { revision },
            ref other => other.clone(),
        }
    }
}

/// A part that could not be put in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What the last try said.
    pub error: String,
    /// How often it has failed in a row.
    pub attempts: u32,
    /// When it is tried again.
    retry_at: Instant,
}

/// Desired and actual state, and the way from one to the other.
#[derive(Debug, Default)]
pub struct Core {
    wanted: Option<Plan>,
    key: Option<PrivateKey>,
    /// What the datapath serves.
    overlay: Revisions<IpNet>,
    /// Routes into the tunnel, by family.
    routes: [Revisions<IpNet>; 2],
    peers: Revisions<PublicKey>,
    applied: BTreeMap<Part, Action>,
    /// What was applied, and somebody else may have changed.
    doubted: BTreeMap<Part, Action>,
    foreign: foreign::Ledger,
    failures: BTreeMap<Part, Failure>,
}

impl Core {
    /// Sets the plan and the private key.
    pub fn want(&mut self, plan: Plan, key: Option<PrivateKey>) {
        let before = self.wanted.as_ref();
        if before == Some(&plan) && self.key == key {
            return;
        }
        if before.is_none_or(|before| {
            before.datapath != plan.datapath
                || before.link_mtus != plan.link_mtus
                || before.sites != plan.sites
        }) {
            self.overlay.renew();
        }
        if before.is_none_or(|before| before.addresses != plan.addresses) {
            self.routes.iter_mut().for_each(Revisions::renew);
        }
        // A new plan may mend what failed: do not wait out the old plan's pause.
        self.failures.clear();
        self.wanted = Some(plan);
        self.key = key;
    }

    /// These peers and allowed IPs of the state have changed.
    pub fn changed(&mut self, changed: &Changed) {
        self.overlay.touch(changed.nets.iter().copied());
        for family in Family::ALL {
            let nets = changed.nets.iter().copied();
            let nets = nets.filter(|net| Family::of(net.addr()) == family);
            self.routes[family as usize].touch(nets);
        }
        self.touch_peers(changed.peers.iter().copied());
    }

    /// The engine has to be told of these peers anew.
    pub fn touch_peers(&mut self, keys: impl IntoIterator<Item = PublicKey>) {
        self.peers.touch(keys);
    }

    /// What puts a part of `plan` in force, whatever was before.
    fn whole(&self, plan: &Plan, part: Part) -> Action {
        match part {
            Part::Device => Action::Device { mtu: plan.mtu },
            Part::Addresses(family) => Action::Addresses(family, plan.addresses(family)),
            Part::Datapath => Action::Datapath {
                revision: self.overlay.now(),
            },
            Part::Forwarding(family) => Action::Forwarding(family, plan.forwarding(family)),
            Part::Routes(family) => Action::Routes {
                family,
                way: plan.way(family),
                revision: self.routes[family as usize].now(),
            },
            Part::Rules(family) => Action::Rules(family),
            Part::Key => Action::Key(self.key.clone()),
            Part::Peers => Action::Peers {
                revision: self.peers.now(),
            },
        }
    }

    /// The same as `wanted` where only a part of it has changed since it was applied.
    fn delta(&self, wanted: &Action) -> Option<Action> {
        match (self.applied.get(&wanted.part())?, wanted) {
            (Action::Datapath { revision: before }, Action::Datapath { revision }) => {
                Some(Action::OverlayChanged {
                    revision: *revision,
                    nets: self.overlay.since(*before)?,
                })
            }
            (
                Action::Routes {
                    way: way_before,
                    revision: before,
                    ..
                },
                Action::Routes {
                    family,
                    way,
                    revision,
                },
            ) if way == way_before => Some(Action::RoutesChanged {
                family: *family,
                way: *way,
                revision: *revision,
                nets: self.routes[*family as usize].since(*before)?,
            }),
            (Action::Peers { revision: before }, Action::Peers { revision }) => {
                Some(Action::PeersChanged {
                    revision: *revision,
                    keys: self.peers.since(*before)?,
                })
            }
            _ => None,
        }
    }

    /// Forgets that `part` has been applied, because something outside may have changed it.
    pub fn invalidate(&mut self, part: Part) {
        if let Some(action) = self.applied.remove(&part) {
            self.doubted.insert(part, action);
        }
    }

    /// The next step, or `None` when nothing is to be done before [`Core::poll_timeout`].
    pub fn poll_action(&self, now: Instant) -> Option<Action> {
        let plan = self.wanted.as_ref()?;
        for part in Part::ALL {
            let wanted = self.whole(plan, part);
            if self.applied.get(&part) == Some(&wanted) {
                continue;
            }
            match self.failures.get(&part) {
                Some(failure) if failure.retry_at > now => {
                    // Forwarding without the policy in front of it would open the router.
                    if matches!(part, Part::Device | Part::Datapath) {
                        return None;
                    }
                }
                _ if self.held(&wanted).is_some_and(|until| until > now) => {}
                _ => return Some(self.delta(&wanted).unwrap_or(wanted)),
            }
        }
        None
    }

    /// Until when a part stays as others may have made it, if it is to be as it was.
    fn held(&self, action: &Action) -> Option<Instant> {
        let part = action.part();
        let doubted = self.doubted.get(&part) == Some(action);
        self.foreign.held_until(part).filter(|_| doubted)
    }

    /// When to call [`Core::poll_action`] again although nothing happened.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let failed = self.failures.values().map(|failure| failure.retry_at);
        // What fails, or waits behind it, is not looked at before.
        let blocked = [Part::Device, Part::Datapath]
            .iter()
            .any(|part| self.failures.contains_key(part));
        let waiting = |action: &&Action| !blocked && !self.failures.contains_key(&action.part());
        let held = self.doubted.values().filter(waiting);
        failed
            .chain(held.filter_map(|action| self.held(action)))
            .min()
    }

    /// Takes the outcome of an action: what had to be changed, in words. Where nothing new was wanted,
    /// somebody else had changed it.
    pub fn handle_done(
        &mut self,
        action: Action,
        outcome: Result<Vec<String>, String>,
        now: Instant,
    ) -> Option<Foreign> {
        let part = action.part();
        let whole = action.whole();
        match outcome {
            Ok(changed) => {
                self.failures.remove(&part);
                match whole {
                    Action::Datapath { revision } => self.overlay.in_force(revision),
                    Action::Routes {
                        family, revision, ..
                    } => self.routes[family as usize].in_force(revision),
                    Action::Peers { revision } => self.peers.in_force(revision),
                    _ => {}
                }
                let as_before = self.doubted.remove(&part).as_ref() == Some(&whole);
                self.applied.insert(part, whole);
                let foreign = as_before && !changed.is_empty();
                foreign.then(|| self.foreign.note(part, changed.join(", "), now))
            }
            // What came of a change is unknown: all of it comes next, at once.
            Err(_) if action != whole => {
                self.applied.remove(&part);
                None
            }
            Err(error) => {
                let attempts = self.failures.get(&part).map_or(0, |f| f.attempts) + 1;
                let pause = FIRST_PAUSE
                    .saturating_mul(1 << attempts.saturating_sub(1).min(10))
                    .min(LONGEST_PAUSE);
                self.failures.insert(
                    part,
                    Failure {
                        error,
                        attempts,
                        retry_at: now + pause,
                    },
                );
                None
            }
        }
    }

    /// The parts that others change again and again.
    pub fn contested(&self, now: Instant) -> impl Iterator<Item = (Part, &Foreign)> {
        self.foreign.contested(now)
    }

    /// What could not be put in force.
    pub fn failures(&self) -> impl Iterator<Item = (Part, &Failure)> {
        self.failures.iter().map(|(part, failure)| (*part, failure))
    }

    /// Whether a part is in force as it is wanted.
    pub fn holds(&self, part: Part) -> bool {
        let plan = self.wanted.as_ref();
        plan.is_some_and(|plan| self.applied.get(&part) == Some(&self.whole(plan, part)))
    }

    /// Whether everything that is wanted is in force.
    pub fn settled(&self) -> bool {
        Part::ALL.iter().all(|part| self.holds(*part))
    }

    /// Whether the router does what it can: all is in force that is for both families, and all of one
    /// family of those that are asked for; what the other cannot have has been tried.
    pub fn ready(&self) -> bool {
        let Some(plan) = &self.wanted else {
            return false;
        };
        let is_applied = |part: &Part| self.holds(*part);
        let whole = |family| {
            let mut parts = Part::ALL.iter().filter(|p| p.family() == Some(family));
            parts.all(is_applied)
        };
        let tried = Part::ALL.iter().all(|part| {
            is_applied(part) || (part.family().is_some() && self.failures.contains_key(part))
        });
        let asked: Vec<Family> = Family::ALL.into_iter().filter(|f| plan.asks(*f)).collect();
        tried && (asked.is_empty() || asked.into_iter().any(whole))
    }

    /// The desired state, once there is one.
    pub fn wanted(&self) -> Option<&Plan> {
        self.wanted.as_ref()
    }
}

#[cfg(test)]
mod tests;

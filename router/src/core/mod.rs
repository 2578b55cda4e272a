//! Decisions without I/O: what should be in force, what is, and the next step between the two.
//!
//! [`plan()`] turns settings, a control [`Snapshot`](crate::control::Snapshot) and what the kernel says of the network
//! ([`Facts`]) into the one desired state ([`Plan`]). [`Core`] compares it with what has been
//! applied, part by part, and hands out one [`Action`] at a time; a part that fails is tried again
//! with a growing pause, while the others go on. No clock is read here: the caller passes `now`.

mod foreign;
mod mtu;
mod names;
mod numbers;
mod plan;
mod vrf;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ipnet::IpNet;

pub use foreign::{Foreign, PATIENCE};
pub use mtu::{Narrow, misfit, tunnel_mtu};
pub use names::{Names, REFRESH, RETRY};
pub use numbers::PeerNumbers;
pub use plan::{Facts, LinkFacts, Path, Plan, peer_spec, plan};
pub use vrf::Vrf;

use crate::datapath::{Link, Spec};
use crate::engine::PeerSpec;
use crate::netlink::Family;

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
    /// The engine's peers.
    Peers,
}

impl Part {
    const ALL: [Self; 11] = [
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
        Self::Peers,
    ];

    /// The family that the part is for; `None` for both.
    fn family(self) -> Option<Family> {
        match self {
            Self::Addresses(family)
            | Self::Forwarding(family)
            | Self::Routes(family)
            | Self::Rules(family) => Some(family),
            Self::Device | Self::Datapath | Self::Peers => None,
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
            Self::Peers => "peers",
        }
    }
}

/// One step for the runtime; each carries the whole desired state of its part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Give the TUN device its MTU (bytes), and set it up.
    Device {
        /// MTU in bytes.
        mtu: u16,
    },
    /// Give the TUN device exactly these addresses of the family.
    Addresses(Family, Vec<IpNet>),
    /// Make the datapath serve this.
    Datapath(Box<Spec>),
    /// Let the kernel forward packets of the family from and to these interfaces.
    Forwarding(Family, Vec<Link>),
    /// Have exactly these routes of the family.
    Routes {
        /// The family.
        family: Family,
        /// Whether they lead into the TUN device, and not only nowhere.
        device: bool,
        /// Where to.
        nets: Vec<IpNet>,
    },
    /// Have the rules of the family that lead to our table.
    Rules(Family),
    /// Have exactly these peers.
    Peers(Vec<PeerSpec>),
}

impl Action {
    /// The part of the plan that the action puts in force.
    pub fn part(&self) -> Part {
        match self {
            Self::Device { .. } => Part::Device,
            Self::Addresses(family, _) => Part::Addresses(*family),
            Self::Datapath(_) => Part::Datapath,
            Self::Forwarding(family, _) => Part::Forwarding(*family),
            Self::Routes { family, .. } => Part::Routes(*family),
            Self::Rules(family) => Part::Rules(*family),
            Self::Peers(_) => Part::Peers,
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
    applied: BTreeMap<Part, Action>,
    /// What was applied, and somebody else may have changed.
    doubted: BTreeMap<Part, Action>,
    foreign: foreign::Ledger,
    failures: BTreeMap<Part, Failure>,
}

impl Core {
    /// Sets the desired state.
    pub fn want(&mut self, plan: Plan) {
        if self.wanted.as_ref() != Some(&plan) {
            // A new plan may mend what failed: do not wait out the old plan's pause.
            self.failures.clear();
            self.wanted = Some(plan);
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
            let wanted = plan.action(part);
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
                _ => return Some(wanted),
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
        match outcome {
            Ok(changed) => {
                self.failures.remove(&part);
                let as_before = self.doubted.remove(&part).as_ref() == Some(&action);
                self.applied.insert(part, action);
                let foreign = as_before && !changed.is_empty();
                foreign.then(|| self.foreign.note(part, changed.join(", "), now))
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

    /// Whether everything that is wanted is in force.
    pub fn settled(&self) -> bool {
        self.wanted.as_ref().is_some_and(|plan| {
            Part::ALL
                .iter()
                .all(|part| self.applied.get(part) == Some(&plan.action(*part)))
        })
    }

    /// Whether the router does what it can: all is in force that is for both families, and all of one
    /// family of those that are asked for; what the other cannot have has been tried.
    pub fn ready(&self) -> bool {
        let Some(plan) = &self.wanted else {
            return false;
        };
        let is_applied = |part: &Part| self.applied.get(part) == Some(&plan.action(*part));
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
mod tests {
    use super::*;

    fn run_all(core: &mut Core, now: Instant, fail: Option<Part>) -> Vec<Part> {
        let mut parts = Vec::new();
        while let Some(action) = core.poll_action(now) {
            let part = action.part();
            parts.push(part);
            let outcome = if fail == Some(part) {
                Err("no".to_owned())
            } else {
                Ok(Vec::new())
            };
            core.handle_done(action, outcome, now);
        }
        parts
    }

    const ROUTES: Part = Part::Routes(Family::V4);

    fn some_plan() -> Plan {
        Plan {
            mtu: 1420,
            ..Plan::default()
        }
    }

    #[test]
    fn everything_once_and_policy_before_forwarding_before_peers() {
        let mut core = Core::default();
        let now = Instant::now();
        assert_eq!(core.poll_action(now), None);
        core.want(some_plan());
        assert!(!core.settled());
        assert_eq!(run_all(&mut core, now, None), Part::ALL);
        assert!(core.settled());
        core.want(some_plan());
        assert_eq!(run_all(&mut core, now, None), []);
    }

    #[test]
    fn only_what_changed_is_applied_again() {
        let mut core = Core::default();
        let now = Instant::now();
        core.want(some_plan());
        run_all(&mut core, now, None);
        core.want(Plan {
            tunnel_routes: vec!["10.9.0.0/24".parse().unwrap()],
            ..some_plan()
        });
        assert_eq!(run_all(&mut core, now, None), [ROUTES]);
        core.invalidate(Part::Rules(Family::V6));
        assert_eq!(run_all(&mut core, now, None), [Part::Rules(Family::V6)]);
    }

    #[test]
    fn a_failed_part_is_retried_with_a_growing_pause() {
        let mut core = Core::default();
        let mut now = Instant::now();
        core.want(some_plan());
        run_all(&mut core, now, Some(ROUTES));
        assert!(!core.settled());
        assert_eq!(
            core.failures()
                .map(|(p, f)| (p, f.attempts))
                .collect::<Vec<_>>(),
            [(ROUTES, 1)]
        );
        assert_eq!(core.poll_timeout(), Some(now + FIRST_PAUSE));
        now += FIRST_PAUSE;
        assert_eq!(run_all(&mut core, now, Some(ROUTES)), [ROUTES]);
        assert_eq!(core.poll_timeout(), Some(now + 2 * FIRST_PAUSE));
        for _ in 0..20 {
            now = core.poll_timeout().unwrap();
            run_all(&mut core, now, Some(ROUTES));
        }
        assert_eq!(core.poll_timeout(), Some(now + LONGEST_PAUSE));
        now += LONGEST_PAUSE;
        assert_eq!(run_all(&mut core, now, None), [ROUTES]);
        assert!(core.settled());
        assert_eq!(core.poll_timeout(), None);
    }

    #[test]
    fn without_its_policy_the_router_does_not_open() {
        let mut core = Core::default();
        let now = Instant::now();
        core.want(some_plan());
        let tried = run_all(&mut core, now, Some(Part::Datapath));
        let [v4, v6] = Family::ALL.map(Part::Addresses);
        assert_eq!(tried, [Part::Device, v4, v6, Part::Datapath]);
    }

    #[test]
    fn what_one_family_cannot_have_does_not_stop_the_other() {
        let now = Instant::now();
        let plan = |nets: &[&str]| Plan {
            addresses: nets.iter().map(|net| net.parse().unwrap()).collect(),
            ..some_plan()
        };
        let both = plan(&["100.64.0.1/24", "fd64::1/64"]);
        for of in [Part::Addresses, Part::Forwarding, Part::Routes, Part::Rules] {
            let mut core = Core::default();
            core.want(both.clone());
            assert!(!core.ready());
            let tried = run_all(&mut core, now, Some(of(Family::V6)));
            assert_eq!(tried, Part::ALL);
            assert!(core.ready() && !core.settled());
            // All that is asked for is not there.
            let mut core = Core::default();
            core.want(plan(&["100.64.0.1/24"]));
            run_all(&mut core, now, Some(of(Family::V4)));
            assert!(!core.ready());
        }
        let mut core = Core::default();
        core.want(both);
        run_all(&mut core, now, Some(Part::Peers));
        assert!(!core.ready());
    }

    #[test]
    fn a_new_plan_does_not_wait_for_the_old_ones_pause() {
        let mut core = Core::default();
        let now = Instant::now();
        core.want(some_plan());
        run_all(&mut core, now, Some(Part::Datapath));
        core.want(Plan {
            mtu: 1400,
            ..some_plan()
        });
        let addresses = |part: &Part| matches!(part, Part::Addresses(_));
        let all = Part::ALL.into_iter().filter(|part| !addresses(part));
        assert_eq!(run_all(&mut core, now, None), Vec::from_iter(all));
    }
}

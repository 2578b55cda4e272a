//! Decisions without I/O: what should be in force, what is, and the next step between the two.
//!
//! [`plan()`] turns settings, a control [`Snapshot`](crate::control::Snapshot) and what the kernel says of the network
//! ([`Facts`]) into the one desired state ([`Plan`]). [`Core`] compares it with what has been
//! applied, part by part, and hands out one [`Action`] at a time; a part that fails is tried again
//! with a growing pause, while the others go on. No clock is read here: the caller passes `now`.

mod names;
mod plan;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ipnet::IpNet;

pub use names::{Names, REFRESH, RETRY};
pub use plan::{Facts, LinkFacts, Plan, peer_spec, plan};

use crate::datapath::{Link, Spec};
use crate::engine::PeerSpec;

/// The first pause before a failed part is tried again; it doubles up to [`LONGEST_PAUSE`].
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause between two tries of a failed part.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The parts of a plan, in the order in which they are put in force: the policy stands before
/// forwarding is switched on, and peers come last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// MTU, addresses and state of the TUN device.
    Device,
    /// nf_tables ruleset and eBPF programs.
    Datapath,
    /// Forwarding sysctls.
    Forwarding,
    /// Routes of the overlay into the TUN device, in our own table.
    Routes,
    /// The rules that lead to our table.
    Rules,
    /// The engine's peers.
    Peers,
}

impl Part {
    const ALL: [Self; 6] = [
        Self::Device,
        Self::Datapath,
        Self::Forwarding,
        Self::Routes,
        Self::Rules,
        Self::Peers,
    ];

    /// The word for logs, metrics and `status`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Datapath => "datapath",
            Self::Forwarding => "forwarding",
            Self::Routes => "routes",
            Self::Rules => "rules",
            Self::Peers => "peers",
        }
    }
}

/// One step for the runtime; each carries the whole desired state of its part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Give the TUN device its MTU (bytes) and addresses, and set it up.
    Device {
        /// MTU in bytes.
        mtu: u16,
        /// Tunnel addresses.
        addresses: Vec<IpNet>,
    },
    /// Make the datapath serve this.
    Datapath(Box<Spec>),
    /// Let the kernel forward between these interfaces.
    Forwarding {
        /// From and to these.
        links: Vec<Link>,
        /// IPv4 packets.
        ipv4: bool,
        /// IPv6 packets.
        ipv6: bool,
    },
    /// Have exactly these routes into the TUN device.
    Routes(Vec<IpNet>),
    /// Have the rules that lead to our table.
    Rules,
    /// Have exactly these peers.
    Peers(Vec<PeerSpec>),
}

impl Action {
    /// The part of the plan that the action puts in force.
    pub fn part(&self) -> Part {
        match self {
            Self::Device { .. } => Part::Device,
            Self::Datapath(_) => Part::Datapath,
            Self::Forwarding { .. } => Part::Forwarding,
            Self::Routes(_) => Part::Routes,
            Self::Rules => Part::Rules,
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
        self.applied.remove(&part);
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
                _ => return Some(wanted),
            }
        }
        None
    }

    /// When to call [`Core::poll_action`] again although nothing happened.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.failures.values().map(|failure| failure.retry_at).min()
    }

    /// Takes the outcome of an action.
    pub fn handle_done(&mut self, action: Action, outcome: Result<(), String>, now: Instant) {
        let part = action.part();
        match outcome {
            Ok(()) => {
                self.failures.remove(&part);
                self.applied.insert(part, action);
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
            }
        }
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
                Ok(())
            };
            core.handle_done(action, outcome, now);
        }
        parts
    }

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
        assert_eq!(run_all(&mut core, now, None), [Part::Routes]);
        core.invalidate(Part::Rules);
        assert_eq!(run_all(&mut core, now, None), [Part::Rules]);
    }

    #[test]
    fn a_failed_part_is_retried_with_a_growing_pause() {
        let mut core = Core::default();
        let mut now = Instant::now();
        core.want(some_plan());
        run_all(&mut core, now, Some(Part::Routes));
        assert!(!core.settled());
        assert_eq!(
            core.failures()
                .map(|(p, f)| (p, f.attempts))
                .collect::<Vec<_>>(),
            [(Part::Routes, 1)]
        );
        assert_eq!(core.poll_timeout(), Some(now + FIRST_PAUSE));
        now += FIRST_PAUSE;
        assert_eq!(run_all(&mut core, now, Some(Part::Routes)), [Part::Routes]);
        assert_eq!(core.poll_timeout(), Some(now + 2 * FIRST_PAUSE));
        for _ in 0..20 {
            now = core.poll_timeout().unwrap();
            run_all(&mut core, now, Some(Part::Routes));
        }
        assert_eq!(core.poll_timeout(), Some(now + LONGEST_PAUSE));
        now += LONGEST_PAUSE;
        assert_eq!(run_all(&mut core, now, None), [Part::Routes]);
        assert!(core.settled());
        assert_eq!(core.poll_timeout(), None);
    }

    #[test]
    fn without_its_policy_the_router_does_not_open() {
        let mut core = Core::default();
        let now = Instant::now();
        core.want(some_plan());
        let tried = run_all(&mut core, now, Some(Part::Datapath));
        assert_eq!(tried, [Part::Device, Part::Datapath]);
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
        assert_eq!(run_all(&mut core, now, None), Part::ALL);
    }
}

//! What the kernel says of the network, kept up to date.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use super::machine::TABLE;
use super::underlay::Underlay;
use super::{Daemon, facts, families};
use crate::control::State;
use crate::core::{Facts, Part, Plan};
use crate::netlink::{self, Change, Changes, Concern, Family, sysctl};

/// Changes of the network come in swarms; this long after the first one they are looked at.
const SETTLE: Duration = Duration::from_millis(200);
/// Between two looks at the neighbours that flows go to. The kernel doubts one after half a minute
/// (`base_reachable_time_ms`), and takes some seconds to find out.
const NEIGHBOURS: Duration = Duration::from_secs(10);

/// The network as last seen, and when it is looked at again.
pub(super) struct Network {
    pub(super) changes: Changes,
    pub(super) facts: Facts,
    pub(super) underlay: Underlay,
    pub(super) ipv6: families::Watch,
    /// `net.ipv4.ip_local_port_range`, as last read.
    pub(super) local_ports: Option<RangeInclusive<u16>>,
    due: Option<Instant>,
    neighbours_due: Instant,
}

impl Network {
    pub(super) fn new(changes: Changes, facts: Facts, now: Instant) -> Self {
        Self {
            changes,
            facts,
            underlay: Underlay::new(now),
            ipv6: families::Watch::default(),
            local_ports: sysctl::local_ports(),
            due: None,
            neighbours_due: now + NEIGHBOURS,
        }
    }

    /// Has it looked at before anything else is done.
    pub(super) fn look_soon(&mut self) {
        self.due = Some(Instant::now());
    }

    /// When [`Daemon::look_at_network`] has something to do.
    pub(super) fn due(&self, has_programs: bool) -> Option<Instant> {
        let neighbours = has_programs.then_some(self.neighbours_due);
        let all = [
            self.due,
            self.ipv6.due(),
            Some(self.underlay.due),
            neighbours,
        ];
        all.into_iter().flatten().min()
    }

    /// Where packets of this plan go is a matter of these routes alone.
    pub(super) fn concern(&mut self, plan: &Plan, state: &State) {
        let routed = plan.datapath.routes.iter().map(|route| route.cidr);
        let own = plan.addresses.iter().map(ipnet::IpNet::trunc);
        let overlay = state.peers.allowed_ips().keys().copied();
        let concern = Concern::new(TABLE, routed.chain(own), overlay);
        self.changes.concern(concern);
    }
}

impl Daemon {
    /// Somebody has changed something.
    pub(super) fn note_change(&mut self, change: Change) {
        if change == Change::Rule {
            for family in Family::ALL {
                self.core.invalidate(Part::Rules(family));
            }
        }
        if change != Change::Neighbour {
            // Rules lead to the subnet side too: where a route goes may be another interface now.
            let due = &mut self.network.due;
            due.get_or_insert(Instant::now() + SETTLE);
        }
        self.machine.renew_next_hops();
    }

    /// Looks at what is due.
    pub(super) async fn look_at_network(&mut self, now: Instant) {
        if self.network.due.is_some_and(|due| due <= now) {
            self.network.due = None;
            self.look_at_everything(now).await;
        }
        let (ipv6, device) = (self.network.facts.ipv6, &self.machine.tun.name);
        if self.network.ipv6.changed(ipv6, device, now) {
            self.network.due.get_or_insert(now);
        }
        if self.network.underlay.due <= now {
            self.look_at_underlay().await;
        }
        if self.network.neighbours_due <= now {
            self.network.neighbours_due = now + NEIGHBOURS;
            self.machine.look_after_neighbours().await;
            self.tell_at_limit();
            self.look_at_local_ports();
            self.tell_nowhere();
        }
    }

    async fn look_at_everything(&mut self, now: Instant) {
        // Network managers change what they do not know.
        self.core.invalidate(Part::Device);
        for family in Family::ALL {
            self.core.invalidate(Part::Addresses(family));
            self.core.invalidate(Part::Forwarding(family));
            self.core.invalidate(Part::Routes(family));
        }
        // What is read by its name is there again. An error comes again with the device's own part.
        let _ = self.machine.name_device().await;
        let gathered = self.gather().await;
        match gathered.map(|facts| self.remember_subnet(facts)) {
            Ok(facts) if facts != self.network.facts => {
                tracing::debug!("the network changed");
                self.network.facts = facts;
                self.judge_routes();
                self.replan();
                self.follow_networks();
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "the network could not be looked at; trying again");
                self.network.due = Some(now + Duration::from_secs(1));
            }
        }
    }

    /// What the kernel says of the network, with the ways to peers as last seen.
    pub(super) async fn gather(&self) -> Result<Facts, netlink::Error> {
        let (netlink, tun) = (&self.machine.netlink, self.machine.tun.index);
        let mut facts = facts::gather(netlink, self.sources.state(), Some(tun)).await?;
        let paths = self.network.facts.paths.iter();
        let to_peers = paths.filter(|(to, _)| !to.is_unspecified());
        facts.paths.extend(to_peers.map(|(to, path)| (*to, *path)));
        Ok(facts)
    }

    /// Adds to new facts which interfaces are the subnet side now. Other routes than those in force
    /// begin anew.
    pub(super) fn remember_subnet(&self, mut facts: Facts) -> Facts {
        let routes = &self.sources.state().routes;
        let plan = self.core.wanted().map(|plan| &plan.datapath);
        if let Some(spec) = plan.filter(|spec| spec.routes == *routes) {
            let links = spec.subnet.iter();
            let there = links.filter(|link| {
                let found = facts.links.get(&link.index);
                found.is_some_and(|found| found.name == link.name)
            });
            facts.former = there.map(|link| link.index).collect();
        }
        facts
    }

    /// Follows the kernel's range of ports for sockets, of whose changes nobody tells.
    fn look_at_local_ports(&mut self) {
        let local_ports = sysctl::local_ports();
        if local_ports != self.network.local_ports {
            tracing::info!(
                ?local_ports,
                "net.ipv4.ip_local_port_range has changed: the fast path translates to ports beside it"
            );
            self.network.local_ports = local_ports;
            self.replan();
        }
    }
}

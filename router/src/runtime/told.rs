//! What has been told of the plan, so that each thing is said once.

use std::net::IpAddr;
use std::time::Instant;

use super::Daemon;
use crate::core::Plan;
use crate::datapath::ebpf::AtLimit;

/// What was last told.
#[derive(Default)]
pub(super) struct Told {
    /// External addresses that no subnet-side interface has.
    absent: Vec<IpAddr>,
    /// Names of peers that packets are for and that are nowhere.
    pub(super) missed: Vec<String>,
    /// Where packets go that no flow is carried of.
    pub(super) unserved: Vec<String>,
    /// Routes and rules of others that take or drop packets of peers.
    pub(super) in_the_way: Vec<String>,
    /// When another source than the file has said something that is not in force yet.
    pub(super) heard: Option<Instant>,
    /// Who had as many flows as it may.
    pub(super) at_limit: Vec<AtLimit>,
}

impl Daemon {
    /// Says once what a new plan means for whoever runs the router.
    pub(super) fn tell(&mut self, plan: &Plan) {
        self.tell_absent(plan);
        self.network.ipv6.tell(plan.without_ipv6());
        let before = self.core.wanted();
        let known = before.map_or(&[][..], |plan| &plan.vrf_problems);
        for problem in plan.vrf_problems.iter().filter(|p| !known.contains(p)) {
            tracing::warn!("{problem}");
        }
        self.tell_unserved(plan);
        self.tell_mtu();
        if self.machine.ebpf.is_some() {
            self.tell_left_to_the_kernel(plan);
        }
    }

    fn tell_absent(&mut self, plan: &Plan) {
        let mut absent = self.sources.local.external_addresses.clone();
        let chosen = &plan.datapath.chosen;
        absent.retain(|address| !chosen.values().flatten().any(|found| found == address));
        let known = &mut self.told.absent;
        for address in absent.iter().filter(|address| !known.contains(address)) {
            tracing::warn!(
                %address,
                "no subnet-side interface has this address of datapath.external_addresses: it \
                 is not used; add it to an interface, or take it out of the list"
            );
        }
        *known = absent;
    }

    fn tell_left_to_the_kernel(&self, plan: &Plan) {
        let known = self.core.wanted().map(|before| &before.stack_links);
        for link in &plan.stack_links {
            if !known.is_some_and(|known| known.contains(link)) {
                tracing::info!(
                    "{} has no Ethernet header, which the programs need: the kernel carries what \
                     goes by it",
                    link.name
                );
            }
        }
    }

    /// Notes interfaces that the kernel would send routed packets out of and that the router does not
    /// serve, for the status, and says once of each what mends it.
    fn tell_unserved(&mut self, plan: &Plan) {
        let unserved = plan.unserved(&self.network.facts);
        let unserved: Vec<String> = unserved
            .map(|(cidr, name)| {
                format!(
                    "packets for {cidr} may leave by {name}, which `datapath.subnet` does not name: \
                     no flow that way is carried; add it there, or write \"auto\""
                )
            })
            .collect();
        let known = &mut self.told.unserved;
        for text in unserved.iter().filter(|text| !known.contains(text)) {
            tracing::warn!("{text}");
        }
        *known = unserved;
    }
}

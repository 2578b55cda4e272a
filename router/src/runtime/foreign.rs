//! What is said of others who change what is ours.

use std::collections::BTreeMap;
use std::time::Instant;

use ipnet::IpNet;

use super::Daemon;
use super::machine::TABLE;
use crate::api::Problem;
use crate::core::{Foreign, PATIENCE};
use crate::netlink::{DroppingRule, Family};

/// Tells of what has just been put back, in one line.
pub(super) fn tell(device: &str, foreign: &[Foreign]) {
    let what: Vec<&str> = foreign.iter().map(|one| one.what.as_str()).collect();
    let what = what.join("; ");
    match foreign.iter().map(|one| one.times).min() {
        None => {}
        Some(times) if times <= PATIENCE => tracing::warn!(
            "somebody else has changed {device} or the way to it ({what}): it is put back; {}",
            mend(device)
        ),
        Some(times) if times == PATIENCE + 1 => tracing::warn!(
            "somebody else changes {device} or the way to it again and again ({what}): from now on it \
             is put back after a while only; {}",
            mend(device)
        ),
        Some(_) => tracing::debug!(device, what, "put back once more"),
    }
}

fn mend(device: &str) -> String {
    format!(
        "have network managers leave it alone (NetworkManager: \
         unmanaged-devices=interface-name:{device}; systemd-networkd: Unmanaged=yes for it, and \
         ManageForeignRoutingPolicyRules=no)"
    )
}

/// Whether `net` has addresses in common with one of `nets`.
fn overlaps<V>(nets: &BTreeMap<IpNet, V>, net: &IpNet) -> bool {
    // Sorted, a network stands before all that it holds.
    let next = nets.range(*net..).next();
    let mut outer = (0..=net.prefix_len())
        .filter_map(|length| Some(IpNet::new(net.addr(), length).ok()?.trunc()));
    next.is_some_and(|(next, _)| net.contains(next)) || outer.any(|net| nets.contains_key(&net))
}

impl Daemon {
    /// Routes and rules of others that take or drop packets of peers, each with what mends it.
    pub(super) fn in_the_way(&self) -> Vec<String> {
        let mut told = self.machine.netlink.routes_in_the_way(TABLE);
        let rules = self.machine.dropping.iter().flatten();
        told.extend(rules.filter_map(|rule| self.what_it_drops(rule)));
        told
    }

    fn what_it_drops(&self, rule: &DroppingRule) -> Option<String> {
        let plan = self.core.wanted()?;
        let overlay = self.sources.state().peers.allowed_ips();
        let of_peers = |net: &Option<IpNet>| net.as_ref().is_none_or(|net| overlaps(overlay, net));
        let routed = |net: &Option<IpNet>| {
            let mut routes = plan.datapath.routes.iter().map(|route| route.cidr);
            net.is_none_or(|net| routes.any(|cidr| cidr.contains(&net) || net.contains(&cidr)))
        };
        let device = &self.machine.tun.name;
        let iif = rule.iif.as_deref();
        let from =
            iif.is_none_or(|name| name == device) && of_peers(&rule.from) && routed(&rule.to);
        let to = rule.before_ours
            && iif.is_none_or(|name| plan.datapath.subnet.iter().any(|link| link.name == name))
            && routed(&rule.from)
            && of_peers(&rule.to);
        let what = match (from, to) {
            (true, true) => "what comes from peers and what is for them",
            (true, false) => "what comes from peers",
            (false, true) => "what is for peers",
            (false, false) => return None,
        };
        let option = match rule.family {
            Family::V4 => "",
            Family::V6 => "-6 ",
        };
        let (priority, text) = (rule.priority, rule.text());
        Some(format!(
            "a routing rule of others (priority {priority}: {text}) drops {what}: remove it by `ip \
             {option}rule del priority {priority} {text}`, or have it leave out these addresses"
        ))
    }

    /// Says once of each that it is there.
    pub(super) fn tell_in_the_way(&mut self) {
        let found = self.in_the_way();
        for text in found
            .iter()
            .filter(|text| !self.told.in_the_way.contains(text))
        {
            tracing::warn!("{text}");
        }
        self.told.in_the_way = found;
    }

    /// What others change again and again, for `status`.
    pub(super) fn contested(&self) -> impl Iterator<Item = Problem> {
        let device = &self.machine.tun.name;
        self.core.contested(Instant::now()).map(move |(part, foreign)| Problem {
            part: part.label().to_owned(),
            error: format!(
                "somebody else has changed {device} or the way to it {} times in a row, at last: {}. \
                 It is put back after a while only, and until then packets are lost; {}",
                foreign.times,
                foreign.what,
                mend(device)
            ),
        })
    }
}

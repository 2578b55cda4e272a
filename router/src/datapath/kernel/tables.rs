//! What a [`Spec`] says, in a form that is quick to search: for nf_tables, and for flows that
//! connection tracking already knows.

use std::net::IpAddr;

use ipnet::IpNet;

use super::kept::Carried;
use super::peers::Peers;
use super::policy::Compiled;
use super::span::{Family, Span, holds, merge, number, partition, span, union};
use crate::datapath::Spec;
use crate::datapath::policy::NewFlow;

/// The tables of both families.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tables {
    pub(super) v4: FamilyTables,
    pub(super) v6: FamilyTables,
}

/// The tables of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FamilyTables {
    pub(super) family: Family,
    /// Addresses of peers.
    pub(super) peers: Peers,
    /// Routed addresses.
    pub(super) routes: Vec<Span>,
    /// Routed addresses toward which sources are translated.
    pub(super) snat: Vec<Span>,
    /// What the policy lets both sides do.
    pub(super) policy: Compiled,
}

impl Tables {
    pub(super) fn new(spec: &Spec) -> Self {
        Self {
            v4: FamilyTables::new(spec, Family::V4),
            v6: FamilyTables::new(spec, Family::V6),
        }
    }

    /// What the policies of both families let through.
    pub(super) fn policies(spec: &Spec) -> [Compiled; 2] {
        Family::ALL.map(|family| {
            let cidrs: Vec<IpNet> = spec.routes.iter().map(|route| route.cidr).collect();
            Compiled::new(&spec.policy, family, &union(&cidrs, family))
        })
    }

    pub(super) fn families(&self) -> [&FamilyTables; 2] {
        [&self.v4, &self.v6]
    }

    pub(super) fn families_mut(&mut self) -> [&mut FamilyTables; 2] {
        [&mut self.v4, &mut self.v6]
    }

    /// Whether there are rules about what peers open.
    pub(super) fn restricts_peers(&self) -> bool {
        self.v4.policy.from.restricted
    }

    /// Whether there are rules about what the subnet side opens.
    pub(super) fn restricts_subnet(&self) -> bool {
        self.v4.policy.to.restricted
    }

    /// Whether there are rules.
    pub(super) fn restricted(&self) -> bool {
        self.restricts_peers() || self.restricts_subnet()
    }

    /// Whether a flow that was let through while `before` was carried must end.
    pub(super) fn ends(&self, before: &Carried, flow: &NewFlow) -> bool {
        match self.permits(flow) {
            Some(true) => before.routed(flow) && !self.routed(flow.destination),
            Some(false) => true,
            None => before.passed(flow),
        }
    }

    /// Whether a new flow would be let through; `None` when it does not pass the tunnel.
    fn permits(&self, flow: &NewFlow) -> Option<bool> {
        let tables = self.of(flow.source);
        let ends = [number(flow.source), number(flow.destination)];
        let [source, destination] = ends;
        let open = |from_overlay| {
            let policy = &tables.policy;
            policy.allows(from_overlay, ends, flow.protocol, flow.port)
        };
        let to_peer = tables.peers.hold(destination);
        if tables.peers.hold(source) {
            Some(open(true) && (self.restricts_peers() || !to_peer))
        } else if to_peer && holds(&tables.routes, source) {
            Some(open(false))
        } else {
            None
        }
    }

    fn routed(&self, address: IpAddr) -> bool {
        holds(&self.of(address).routes, number(address))
    }

    fn of(&self, address: IpAddr) -> &FamilyTables {
        match address {
            IpAddr::V4(_) => &self.v4,
            IpAddr::V6(_) => &self.v6,
        }
    }
}

impl FamilyTables {
    fn new(spec: &Spec, family: Family) -> Self {
        let cidrs: Vec<IpNet> = spec.routes.iter().map(|route| route.cidr).collect();
        let routes = union(&cidrs, family);
        Self {
            family,
            peers: Peers::new(&spec.overlay, family),
            policy: Compiled::new(&spec.policy, family, &routes),
            snat: translated(spec, family),
            routes,
        }
    }
}

/// Where sources are translated: of several routes that hold an address, the most specific counts.
fn translated(spec: &Spec, family: Family) -> Vec<Span> {
    let labelled: Vec<(Span, u32)> = spec
        .routes
        .iter()
        .zip(0..)
        .filter_map(|(route, index)| Some((span(&route.cidr, family)?, index)))
        .collect();
    let pieces = partition(&labelled).into_iter().filter(|(_, routes)| {
        routes
            .iter()
            .filter_map(|index| spec.routes.get(*index as usize))
            .max_by_key(|route| route.cidr.prefix_len())
            .is_some_and(|route| route.snat)
    });
    merge(pieces.map(|(span, _)| span).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::control::{Destination, Policy, Route, RouteMode, Rule};
    use crate::datapath::policy::TCP;

    fn spec(overlay: &[&str], routes: &[(&str, bool)], rules: &[(&str, &str)]) -> Spec {
        let route = |(cidr, snat): &(&str, bool)| Route {
            cidr: cidr.parse().unwrap(),
            snat: *snat,
            mode: RouteMode::Fast,
        };
        let rule = |(from, to): &(&str, &str)| Rule {
            sources: vec![from.parse().unwrap()],
            destinations: vec![Destination {
                cidr: to.parse().unwrap(),
                ports: 0..=65535,
            }],
            ..Rule::default()
        };
        Spec {
            overlay: overlay
                .iter()
                .map(|net| (net.parse().unwrap(), 0))
                .collect(),
            routes: routes.iter().map(route).collect(),
            policy: Policy {
                rules: rules.iter().map(rule).collect(),
                ..Policy::default()
            },
            ..Spec::default()
        }
    }

    #[test]
    fn the_most_specific_route_decides_on_translation() {
        let spec = spec(
            &[],
            &[
                ("10.0.0.0/8", true),
                ("10.1.0.0/16", false),
                ("10.1.2.0/24", true),
                ("fd00::/8", false),
            ],
            &[],
        );
        let tables = Tables::new(&spec);
        let nets = |texts: &[&str]| {
            let nets: Vec<IpNet> = texts.iter().map(|t| t.parse().unwrap()).collect();
            union(&nets, Family::V4)
        };
        let mut wanted = nets(&["10.0.0.0/16", "10.1.2.0/24"]);
        wanted.extend([(
            number("10.2.0.0".parse().unwrap()),
            number("10.255.255.255".parse().unwrap()),
        )]);
        assert_eq!(tables.v4.snat, wanted);
        assert_eq!(tables.v6.snat, []);
    }

    #[test]
    fn flows_end_when_what_let_them_through_is_gone() {
        let (peer, other, vpc, router) = ("100.64.0.2", "100.64.0.3", "10.0.0.9", "192.0.2.1");
        let overlay = &["100.64.0.0/24"][..];
        let route = &[("10.0.0.0/24", true)][..];
        let open = spec(overlay, route, &[]);
        let all = spec(overlay, route, &[("100.64.0.0/24", "0.0.0.0/0")]);
        let one = spec(overlay, route, &[("100.64.0.3/32", "10.0.0.0/24")]);
        let back = spec(overlay, route, &[("10.0.0.0/24", "100.64.0.0/24")]);
        let unrouted = spec(overlay, &[("10.7.0.0/24", true)], &[]);
        let peerless = spec(&["100.64.0.3/32"], route, &[]);
        for (ends, before, now, source, destination) in [
            (false, Some(&open), &open, peer, vpc),
            (false, Some(&open), &all, peer, vpc),
            (true, Some(&open), &one, peer, vpc),
            (false, Some(&open), &one, other, vpc),
            (true, Some(&open), &unrouted, peer, vpc),
            (true, Some(&open), &peerless, peer, vpc),
            // From the subnet side.
            (false, Some(&open), &back, vpc, peer),
            (true, Some(&open), &all, vpc, peer),
            (true, Some(&open), &unrouted, vpc, peer),
            // From peer to peer.
            (false, Some(&all), &all, peer, other),
            (true, Some(&all), &open, peer, other),
            // To the router itself.
            (false, Some(&open), &all, peer, router),
            (true, Some(&open), &one, peer, router),
            (false, Some(&open), &unrouted, peer, router),
            // What never passed the tunnel.
            (false, Some(&all), &one, router, vpc),
            (false, Some(&all), &one, router, peer),
            // Left by an earlier run that has not told what it carried.
            (true, None, &one, peer, vpc),
            (false, None, &open, peer, vpc),
            (false, None, &one, router, vpc),
        ] {
            let flow = NewFlow {
                source: source.parse().unwrap(),
                destination: destination.parse().unwrap(),
                protocol: TCP,
                port: 80,
            };
            let before = before.map(|before| Carried::by(&Tables::new(before), Default::default()));
            let before = before.unwrap_or_default();
            let got = Tables::new(now).ends(&before, &flow);
            assert_eq!(got, ends, "{flow:?} {before:?}");
        }
    }
}

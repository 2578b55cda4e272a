//! Which CIDRs and addresses get in each other's way.
//!
//! Every CIDR of the file claims a part of the address space. Peers' allowed IPs become kernel
//! routes into the tunnel, so whatever they hold is captured: another peer's, a routed CIDR, the
//! host of an endpoint. Routed CIDRs become no kernel routes (packets leave by those that are
//! there), so they may hold the uplink's own network, and one may lie within another. A route that
//! holds a peer's endpoint harms that peer: it stands in the network that the route leads to, and
//! once it takes the route it sends packets for its own surroundings, the router among them, into
//! the tunnel.

use std::collections::HashSet;
use std::net::SocketAddr;

use ipnet::IpNet;

use super::super::problem::Problems;
use super::super::section::At;
use super::peers::Checked;
use crate::control::{Endpoint, Route};

/// Who claims a CIDR, by index. The order is that of claims for the same CIDR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Who {
    Peer(usize),
    Route(usize),
    Endpoint(usize, SocketAddr),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    net: IpNet,
    who: Who,
    at: usize,
}

/// Reports claims that get in each other's way.
pub(super) fn check(
    peers: &[Checked],
    routes: &[At<Route>],
    addresses: &[At<IpNet>],
    problems: &mut Problems<'_>,
) {
    for route in routes {
        let cidr = route.value.cidr;
        let tunnel = addresses
            .iter()
            .find(|own| overlaps(&own.value.trunc(), &cidr));
        if let Some(own) = tunnel {
            let message = format!(
                "\"{cidr}\" overlaps the tunnel network {}{}; choose tunnel addresses outside every \
                 route",
                own.value.trunc(),
                problems.place(own.at)
            );
            problems.add(route.at, "route.cidr", message);
        }
    }
    let mut judge = Judge {
        peers,
        blamed_routes: HashSet::new(),
        problems,
    };
    // Of two CIDRs one holds the other or they are apart. Sorted, a CIDR stands before all that it
    // holds, so those that hold the present one are always a stack.
    let mut stack: Vec<Claim> = Vec::new();
    for claim in sorted_claims(peers, routes) {
        while stack
            .last()
            .is_some_and(|outer| !outer.net.contains(&claim.net))
        {
            stack.pop();
        }
        if let Some(outer) = stack.last() {
            judge.pair(outer, &claim);
        }
        if !matches!(claim.who, Who::Endpoint(..)) {
            stack.push(claim);
        }
    }
}

fn overlaps(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

fn sorted_claims(peers: &[Checked], routes: &[At<Route>]) -> Vec<Claim> {
    let mut claims = Vec::new();
    for (index, peer) in peers.iter().enumerate() {
        claims.extend(peer.allowed_ips.iter().map(|net| Claim {
            net: net.value,
            who: Who::Peer(index),
            at: net.at,
        }));
        if let Some(At {
            value: Endpoint::Addr(address),
            at,
        }) = peer.endpoint
        {
            claims.push(Claim {
                net: address.ip().into(),
                who: Who::Endpoint(index, address),
                at,
            });
        }
    }
    claims.extend(routes.iter().enumerate().map(|(index, route)| Claim {
        net: route.value.cidr,
        who: Who::Route(index),
        at: route.at,
    }));
    claims.sort_unstable();
    claims
}

struct Judge<'a, 'p, 't> {
    peers: &'a [Checked],
    /// Routes already reported: one that swallows a thousand peers is one mistake.
    blamed_routes: HashSet<usize>,
    problems: &'p mut Problems<'t>,
}

impl Judge<'_, '_, '_> {
    /// Judges two claims of which `outer` holds `inner`.
    fn pair(&mut self, outer: &Claim, inner: &Claim) {
        match (outer.who, inner.who) {
            (Who::Peer(a), Who::Peer(b)) => self.peers(outer, a, inner, b),
            (Who::Route(_), Who::Route(_)) => {
                if outer.net == inner.net {
                    let line = self.problems.line(outer.at);
                    let message = format!(
                        "\"{}\" is a route already (line {line}); remove one of the two",
                        inner.net
                    );
                    self.problems.add(inner.at, "route.cidr", message);
                }
            }
            (Who::Peer(peer), Who::Route(route)) => self.route(inner, route, outer, peer),
            (Who::Route(route), Who::Peer(peer)) => self.route(outer, route, inner, peer),
            (Who::Peer(_), Who::Endpoint(peer, address)) => {
                let whose = self.peers[peer].label(self.problems);
                let message = format!(
                    "\"{}\" holds the endpoint {address} of {whose}; an address is inside the \
                     tunnel or outside, leave this one out",
                    outer.net
                );
                self.problems.add(outer.at, "peer.allowed_ips", message);
            }
            (Who::Route(route), Who::Endpoint(peer, address)) => {
                if self.blamed_routes.insert(route) {
                    let whose = self.peers[peer].label(self.problems);
                    let message = format!(
                        "\"{}\" holds the endpoint {address} of {whose}: that peer stands in the \
                         routed network itself, and taking the route would cut it off from the \
                         router; narrow the route, or remove the peer",
                        outer.net
                    );
                    self.problems.add(outer.at, "route.cidr", message);
                }
            }
            // An endpoint holds nothing.
            (Who::Endpoint(..), _) => {}
        }
    }

    fn peers(&mut self, outer: &Claim, a: usize, inner: &Claim, b: usize) {
        if a == b {
            if outer.net == inner.net {
                let message = format!("\"{}\" is listed twice; remove one", inner.net);
                self.problems.add(inner.at, "peer.allowed_ips", message);
            }
            return;
        }
        let (net, held) = (outer.net, inner.net);
        // The later in the file is told, and points to the earlier.
        let outer_is_later = outer.at > inner.at;
        let other = &self.peers[if outer_is_later { b } else { a }];
        let whose = other.label(self.problems);
        let (at, message) = if net == held {
            let message =
                format!("\"{net}\" belongs to {whose} already; remove it from one of them");
            (outer.at.max(inner.at), message)
        } else if outer_is_later {
            let message = format!(
                "\"{net}\" holds \"{held}\" of {whose}; allowed IPs of two peers must not overlap, \
                 narrow \"{net}\""
            );
            (outer.at, message)
        } else {
            let message = format!(
                "\"{held}\" lies within \"{net}\" of {whose}; allowed IPs of two peers must not \
                 overlap, narrow \"{net}\""
            );
            (inner.at, message)
        };
        self.problems.add(at, "peer.allowed_ips", message);
    }

    fn route(&mut self, claim: &Claim, route: usize, theirs: &Claim, peer: usize) {
        if !self.blamed_routes.insert(route) {
            return;
        }
        let whose = self.peers[peer].label(self.problems);
        let message = format!(
            "\"{}\" overlaps \"{}\" of {whose}; what a peer owns is in the tunnel and cannot be \
             behind the router too, narrow one of them",
            claim.net, theirs.net
        );
        self.problems.add(claim.at, "route.cidr", message);
    }
}

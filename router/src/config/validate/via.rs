//! Routes to sites (4via6).

use std::collections::HashMap;

use ipnet::IpNet;

use super::super::net;
use super::super::problem::Problems;
use super::super::section::At;
use super::peers::Checked;
use crate::control::Route;
use crate::via::{self, POOL, ViaNet};

/// Reports routes to sites that cannot be served.
pub(super) fn check(
    peers: &[Checked],
    routes: &[At<Route>],
    addresses: &[At<IpNet>],
    problems: &mut Problems<'_>,
) {
    let mut known: HashMap<IpNet, (u32, usize)> = HashMap::new();
    let sites: Vec<&At<Route>> = routes
        .iter()
        .filter(|route| via::overlaps(&route.value.cidr))
        .collect();
    for route in &sites {
        let cidr = route.value.cidr;
        let Some(via) = ViaNet::of(&cidr) else {
            let message = format!(
                "\"{cidr}\" holds the 4via6 networks of several sites; a route to one is \
                 fd7a:115c:a1e0:b1a:0:<site>:<IPv4 address>/<96 and the IPv4 prefix length>, e.g. \
                 \"fd7a:115c:a1e0:b1a:0:7:10.0.0.0/112\" for 10.0.0.0/16 of site 7"
            );
            problems.add(route.at, "route.cidr", message);
            continue;
        };
        let net = IpNet::V4(via.net);
        let special =
            net::never_routed(&net).map(|what| format!("is {what}, which is never routed"));
        let special = special.or_else(|| {
            let what = "is nothing that a site can have (link-local, or the tailnet's own)";
            (!via.is_served()).then(|| what.to_owned())
        });
        if net.prefix_len() == 0 {
            let message = format!(
                "\"{cidr}\" would make this router the peers' way to the whole internet (an exit node), which \
                 Sluice does not serve; name the IPv4 network behind the router"
            );
            problems.add(route.at, "route.cidr", message);
        } else if let Some(why) = special {
            let message = format!("\"{cidr}\" stands for {net}, which {why}; remove this route");
            problems.add(route.at, "route.cidr", message);
        } else if let Some((site, at)) = known.get(&net) {
            let message = format!(
                "\"{cidr}\" stands for {net}, as does the route to site {site} (line {}): behind one router a network \
                 is of one site; remove one of the two",
                problems.line(*at)
            );
            problems.add(route.at, "route.cidr", message);
        }
        if via.is_served() {
            known.entry(net).or_insert((via.site, route.at));
        }
        if !route.value.snat {
            let message = format!(
                "\"{cidr}\" is reached by IPv6 (4via6), for which sources are always translated; leave out snat = false"
            );
            problems.add(route.at, "route.snat", message);
        }
    }
    if let Some(first) = sites.first() {
        check_pool(first.at, peers, routes, addresses, problems);
    }
    let untranslated = routes.iter().filter(|route| !route.value.snat);
    for route in untranslated.filter(|route| !via::overlaps(&route.value.cidr)) {
        let cidr = route.value.cidr;
        if let Some((net, (_, at))) = known
            .iter()
            .find(|(net, _)| net.contains(&cidr) || cidr.contains(*net))
        {
            let message = format!(
                "\"{cidr}\" has snat = false, and overlaps {net}, which peers reach by IPv6 (4via6, line {}) from \
                 addresses that only this router knows; leave out snat = false, or remove the other route",
                problems.line(*at)
            );
            problems.add(route.at, "route.snat", message);
        }
    }
}

/// Reports what lies in the pool of addresses that stand for peers, once there is a route to a site at `at`.
fn check_pool(
    at: usize,
    peers: &[Checked],
    routes: &[At<Route>],
    addresses: &[At<IpNet>],
    problems: &mut Problems<'_>,
) {
    let pool = IpNet::V4(POOL);
    let line = problems.line(at);
    let mut found = Vec::new();
    let allowed = peers.iter().flat_map(|peer| &peer.allowed_ips);
    found.extend(allowed.map(|net| (net.value, net.at, "peer.allowed_ips")));
    found.extend(
        routes
            .iter()
            .map(|route| (route.value.cidr, route.at, "route.cidr")),
    );
    let own = addresses
        .iter()
        .map(|net| (net.value.trunc(), net.at, "wireguard.addresses"));
    found.extend(own);
    for (net, place, key) in found.into_iter().filter(|(net, ..)| pool.contains(net)) {
        let message = format!(
            "\"{net}\" lies in {POOL}, where peers have addresses inside the router because of the 4via6 route of line \
             {line}; choose another network, or remove that route"
        );
        problems.add(place, key, message);
    }
}

/// The routes as CIDRs that are claimed: those to sites as IPv4.
pub(super) fn claims(routes: &[At<Route>]) -> Vec<At<Route>> {
    let mut claims: Vec<At<Route>> = Vec::with_capacity(routes.len());
    let mut sites = Vec::new();
    for route in routes {
        match ViaNet::of(&route.value.cidr) {
            Some(via) if via.is_served() => sites.push((IpNet::V4(via.net), route)),
            _ if via::overlaps(&route.value.cidr) => {}
            _ => claims.push(copy(route, route.value.cidr)),
        }
    }
    for (net, route) in sites {
        if claims.iter().all(|claim| claim.value.cidr != net) {
            claims.push(copy(route, net));
        }
    }
    claims
}

fn copy(route: &At<Route>, cidr: IpNet) -> At<Route> {
    At {
        value: Route {
            cidr,
            ..route.value
        },
        at: route.at,
    }
}

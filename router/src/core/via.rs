//! What stands in the way of 4via6, in sentences with the mend.

use std::collections::BTreeMap;

use ipnet::{IpNet, Ipv4Net};

use super::Facts;
use crate::control::State;
use crate::via::{Ends, POOL, host};

/// What is wrong while there are sites.
pub fn via_problems(state: &State, facts: &Facts) -> Vec<String> {
    let unserved = state.unserved.iter().map(|cidr| {
        format!(
            "the route {cidr} is not served: it is of several 4via6 sites at once, or to what no site can have; name \
             one network of one site (fd7a:115c:a1e0:b1a:0:<site>:<IPv4 address>/<96 and the IPv4 prefix length>)"
        )
    });
    let mut problems: Vec<String> = unserved.collect();
    if state.sites.is_empty() {
        return problems;
    }
    let mut known: BTreeMap<Ipv4Net, u32> = BTreeMap::new();
    for via in &state.sites {
        let first = *known.entry(via.net).or_insert(via.site);
        if first != via.site {
            problems.push(format!(
                "the sites {first} and {} both have the network {}, which is one network behind one router: peers reach \
                 it as that of site {first} alone; take one of the two 4via6 routes out",
                via.site, via.net
            ));
        }
    }
    let plain = |net: &Ipv4Net| IpNet::V4(*net);
    for route in state.routes.iter().filter(|route| !route.snat) {
        if let Some(net) = known
            .keys()
            .map(plain)
            .find(|net| overlaps(net, &route.cidr))
        {
            problems.push(format!(
                "the route {} has snat = false, and peers reach {net} by IPv6 (4via6) from addresses that only this \
                 router knows: no answer finds them; let the route have snat, or take the 4via6 route out",
                route.cidr
            ));
        }
    }
    let pool = IpNet::V4(POOL);
    let mut taken: Vec<(IpNet, &str)> = Vec::new();
    let routes = state.routes.iter().map(|route| (route.cidr, "is a route"));
    let own = state
        .addresses()
        .iter()
        .map(|net| (net.trunc(), "is the tunnel's"));
    let links = facts.links.values().flat_map(|link| link.addresses.iter());
    let links = links.map(|net| (net.trunc(), "is a network of this machine"));
    taken.extend(routes.chain(own).chain(links));
    // What is wider stands behind the single addresses of the pool.
    taken.retain(|(net, _)| pool.contains(net));
    let given = |peer: &crate::control::Peer| Ends::of(&peer.allowed_ips);
    let nets = state.peers.allowed_ips().range(pool..);
    for (net, number) in nets.take_while(|(net, _)| pool.contains(*net)) {
        let ends = state.peers.numbered(*number).and_then(given);
        let own = ends.map(|ends| IpNet::V4(ends.v4.into()));
        if own != Some(*net) {
            taken.push((*net, "is a peer's"));
        }
    }
    if let Some((net, what)) = taken.first() {
        problems.push(format!(
            "{net} {what}, and {POOL} is what 4via6 takes for its peers' IPv4 addresses inside this router: packets of \
             the two are mixed up; take the 4via6 routes out, or serve them by a router without that network"
        ));
    }
    let without = state
        .peers
        .iter()
        .filter(|peer| host(&peer.allowed_ips).is_some() && given(peer).is_none());
    let without = without.count();
    if without > 0 {
        problems.push(format!(
            "{without} peers have no IPv4 address of {POOL}, of which all are in use: 4via6 does not work for them; \
             serve the sites by another router, for fewer peers"
        ));
    }
    problems
}

fn overlaps(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::control::{Combined, Delta, Peer, Route, RouteMode, Update};
    use crate::core::LinkFacts;
    use crate::wireguard::keys::PublicKey;

    fn problems(routes: &[(&str, bool)], allowed: &[&str], link: &str) -> Vec<String> {
        let peer = Peer {
            name: None,
            public_key: PublicKey([1; 32]),
            preshared_key: None,
            allowed_ips: allowed.iter().map(|net| net.parse().unwrap()).collect(),
            endpoint: None,
            keepalive: None,
            roaming: true,
            masquerade: Vec::new(),
            jailed: false,
        };
        let route = |(cidr, snat): &(&str, bool)| Route {
            cidr: cidr.parse().unwrap(),
            snat: *snat,
            mode: RouteMode::Fast,
        };
        let delta = Delta {
            set: vec![peer],
            routes: Some(routes.iter().map(route).collect()),
            ..Delta::default()
        };
        let mut combined = Combined::new(&["file"]);
        combined.apply(0, Update::Delta(delta));
        let link = LinkFacts {
            addresses: vec![link.parse().unwrap()],
            ..LinkFacts::default()
        };
        let facts = Facts {
            links: BTreeMap::from([(2, link)]),
            ..Facts::default()
        };
        via_problems(combined.state(), &facts)
    }

    #[test]
    fn what_gets_in_the_way_is_told() {
        let via = ("fd7a:115c:a1e0:b1a:0:7:a01:0/112", true);
        let (peer, lan) = (&["fd64::2/128"][..], "10.1.0.1/16");
        assert_eq!(problems(&[via], peer, lan), [""; 0]);
        let other = ("fd7a:115c:a1e0:b1a:0:8:a01:0/112", true);
        let told = problems(&[via, other], peer, lan);
        assert!(told[0].contains("sites 7 and 8"), "{told:?}");
        let told = problems(&[via, ("10.1.2.0/24", false)], peer, lan);
        assert!(told[0].contains("10.1.2.0/24 has snat = false"), "{told:?}");
        let told = problems(&[via], peer, "198.18.4.1/24");
        assert!(
            told[0].contains("198.18.4.0/24 is a network of this machine"),
            "{told:?}"
        );
        let told = problems(&[via], &["fd64::2/128", "198.18.4.0/24"], lan);
        assert!(told[0].contains("198.18.4.0/24 is a peer's"), "{told:?}");
        let told = problems(&[("fd7a:115c:a1e0:b1a::/64", true)], peer, lan);
        assert!(told[0].contains("b1a::/64 is not served"), "{told:?}");
        // Without such a route nobody minds.
        assert_eq!(
            problems(&[("10.1.2.0/24", false)], peer, "198.18.4.1/24"),
            [""; 0]
        );
    }
}

//! What the map of routes holds: the advertised ones, cut where the kernel's routes have MTUs of their own.

use std::collections::BTreeMap;

use ipnet::IpNet;
use router_ebpf::abi::{self, Prefix};

use super::tables::prefix;
use crate::control::{Route, RouteMode};

/// The advertised `routes` with the MTUs of the kernel's routes (bytes, zero: none of its own). Of the
/// kernel's routes inside an advertised one, those are taken that say something else than the one around.
pub(super) fn with_mtus(
    routes: &[Route],
    mtus: &BTreeMap<IpNet, u32>,
) -> BTreeMap<Prefix, abi::Route> {
    let mut map: BTreeMap<IpNet, abi::Route> = routes
        .iter()
        .map(|route| {
            (
                route.cidr,
                value(route).with_mtu(mtu(around(mtus, &route.cidr))),
            )
        })
        .collect();
    let mut inside: Vec<_> = mtus
        .iter()
        .filter(|(net, _)| !map.contains_key(net))
        .collect();
    // Those around come before those inside.
    inside.sort_by_key(|(net, _)| net.prefix_len());
    for (net, own) in inside {
        if let Some(outer) = around(&map, net) {
            let value = outer.with_mtu(mtu(Some(*own)));
            if value != outer {
                map.insert(*net, value);
            }
        }
    }
    let entries = map.into_iter();
    entries.map(|(net, value)| (prefix(&net), value)).collect()
}

/// What the longest prefix says that contains `net`.
fn around<V: Copy>(map: &BTreeMap<IpNet, V>, net: &IpNet) -> Option<V> {
    (0..=net.prefix_len()).rev().find_map(|len| {
        let outer = IpNet::new(net.network(), len).ok()?;
        map.get(&outer.trunc()).copied()
    })
}

/// As the map has it: zero for none, and for what no packet exceeds.
fn mtu(own: Option<u32>) -> u16 {
    own.and_then(|mtu| mtu.try_into().ok()).unwrap_or(0)
}

fn value(route: &Route) -> abi::Route {
    let mut flags = 0;
    if route.mode == RouteMode::Stack {
        flags |= abi::Route::STACK;
    }
    if route.snat {
        flags |= abi::Route::SNAT;
    }
    abi::Route { flags }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn check(advertised: &[(&str, bool)], kernel: &[(&str, u32)], wanted: &[(&str, bool, u32)]) {
        let routes: Vec<_> = advertised
            .iter()
            .map(|(cidr, snat)| Route {
                cidr: net(cidr),
                snat: *snat,
                mode: RouteMode::Fast,
            })
            .collect();
        let mtus = kernel.iter().map(|(cidr, mtu)| (net(cidr), *mtu)).collect();
        let wanted: BTreeMap<_, _> = wanted
            .iter()
            .map(|(cidr, snat, mtu)| {
                let flags = if *snat { abi::Route::SNAT } else { 0 };
                let route = abi::Route { flags }.with_mtu(*mtu as u16);
                (prefix(&net(cidr)), route)
            })
            .collect();
        assert_eq!(with_mtus(&routes, &mtus), wanted);
    }

    #[test]
    fn an_advertised_route_has_the_mtu_of_the_kernels_route_around_it() {
        let advertised = [("10.20.0.0/16", true), ("2001:db8::/48", false)];
        check(
            &advertised,
            &[],
            &[("10.20.0.0/16", true, 0), ("2001:db8::/48", false, 0)],
        );
        check(
            &advertised,
            &[
                ("0.0.0.0/0", 1400),
                ("10.0.0.0/8", 1300),
                ("2001:db8::/48", 1280),
            ],
            &[("10.20.0.0/16", true, 1300), ("2001:db8::/48", false, 1280)],
        );
    }

    #[test]
    fn the_kernels_routes_inside_count_where_they_differ() {
        check(
            &[("10.20.0.0/16", true), ("10.20.1.128/25", false)],
            &[
                ("10.20.1.0/24", 1300),
                ("10.20.1.64/26", 0),
                ("10.20.1.66/32", 0),
                ("10.20.1.192/26", 1300),
                ("10.20.2.0/24", 0),
                ("10.30.0.0/16", 1300),
            ],
            &[
                ("10.20.0.0/16", true, 0),
                ("10.20.1.0/24", true, 1300),
                ("10.20.1.64/26", true, 0),
                ("10.20.1.128/25", false, 1300),
            ],
        );
        // More than any packet has.
        check(
            &[("10.0.0.0/8", false)],
            &[("10.0.0.0/8", 70_000)],
            &[("10.0.0.0/8", false, 0)],
        );
    }
}

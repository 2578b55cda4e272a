//! Interfaces in a VRF (Documentation/networking/vrf.rst): what comes in there is looked up in the
//! VRF's table alone, and what leaves for there only where another table leads into it.

use std::collections::BTreeSet;

use ipnet::IpNet;

use super::Facts;
use crate::control::Route;
use crate::datapath::Link;

/// What does not work since the uplink or an interface of the subnet side is in a VRF, with the mend.
pub(super) fn problems(
    routes: &[Route],
    tun: &Link,
    facts: &Facts,
    uplink: Option<&Link>,
    subnet: &BTreeSet<Link>,
) -> Vec<String> {
    let mut problems = Vec::new();
    if let Some((link, vrf)) = uplink.and_then(|link| Some((link, facts.vrfs.get(&link.index)?))) {
        let (uplink, vrf) = (&link.name, &vrf.name);
        if !facts.vrfs_heard {
            problems.push(format!(
                "the uplink {uplink} is in the VRF {vrf}, and the router's UDP socket is not, so that it \
                 hears no peer: set net.ipv4.udp_l3mdev_accept to 1, or take {uplink} out of the VRF"
            ));
        }
        if facts.default_link != Some(link.index) {
            problems.push(format!(
                "the uplink {uplink} is in the VRF {vrf}, and the main table does not lead there, so \
                 that no peer gets an answer: add the VRF's default route to the main table (ip route \
                 add default via GATEWAY dev {uplink}), or take {uplink} out of the VRF"
            ));
        }
    }
    for link in subnet {
        let Some(vrf) = facts.vrfs.get(&link.index) else {
            continue;
        };
        let (nic, name) = (&link.name, &vrf.name);
        let leads_there = |route: &IpNet| {
            let toward = facts.egress.get(route);
            toward.is_some_and(|interfaces| interfaces.contains(&link.index))
        };
        // What only the default route leads somewhere, nothing leads to this subnet.
        let elsewhere = |route: &&IpNet| {
            let mut toward = facts.egress.get(route).into_iter().flatten();
            toward.all(|interface| Some(*interface) == facts.default_link)
        };
        let mut routes = routes.iter().map(|route| &route.cidr);
        if !routes.clone().any(leads_there)
            && let Some(cidr) = routes.find(elsewhere)
        {
            problems.push(format!(
                "{nic} is in the VRF {name}, and the main table does not lead there, so that peers do \
                 not reach {cidr}: ip route add {cidr} dev {nic} (with `via`, where there is a gateway)"
            ));
        }
        if let Some(first) = vrf.astray.first() {
            problems.push(format!(
                "{nic} is in the VRF {name}, whose table does not lead to the peers, so that answers to \
                 them are lost: ip route add {first} dev {} vrf {name}{}",
                tun.name,
                match vrf.astray.len() {
                    1 => String::new(),
                    more => format!(", and {} networks more", more - 1),
                }
            ));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::control::RouteMode;
    use crate::core::Vrf;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.to_owned(),
        }
    }

    /// The uplink `wan` and `lan`, which is the way to 10.20.0.0/16, are in VRFs.
    fn found(edit: impl FnOnce(&mut Facts)) -> Vec<String> {
        let cidr: IpNet = "10.20.0.0/16".parse().unwrap();
        let routes = [Route {
            cidr,
            snat: true,
            mode: RouteMode::Fast,
        }];
        let vrf = |name: &str| Vrf {
            name: name.to_owned(),
            astray: Vec::new(),
        };
        // All that makes them work.
        let mut facts = Facts {
            default_link: Some(2),
            egress: BTreeMap::from([(cidr, BTreeSet::from([3]))]),
            vrfs: BTreeMap::from([(2, vrf("red")), (3, vrf("blue"))]),
            vrfs_heard: true,
            ..Facts::default()
        };
        edit(&mut facts);
        let (wan, lan) = (link(2, "wan"), link(3, "lan"));
        let tun = link(9, "sluice0");
        problems(&routes, &tun, &facts, Some(&wan), &BTreeSet::from([lan]))
    }

    fn names(problems: &[String], words: &[&str]) {
        let [problem] = problems else {
            panic!("{problems:?}");
        };
        for word in words {
            assert!(problem.contains(word), "{word}: {problem}");
        }
    }

    #[test]
    fn what_works_is_no_problem() {
        assert_eq!(found(|_| ()), [""; 0]);
        let apart = found(|facts| {
            facts.vrfs.clear();
            facts.vrfs_heard = false;
            facts.egress.clear();
        });
        assert_eq!(apart, [""; 0]);
    }

    #[test]
    fn an_uplink_in_a_vrf_needs_a_socket_that_hears_it_and_a_way_out() {
        let deaf = found(|facts| facts.vrfs_heard = false);
        names(&deaf, &["wan", "red", "udp_l3mdev_accept"]);
        let dumb = found(|facts| facts.default_link = None);
        names(&dumb, &["wan", "red", "ip route add default"]);
    }

    #[test]
    fn a_subnet_side_in_a_vrf_needs_a_way_in_and_a_way_back() {
        let unreached = found(|facts| facts.egress.clear());
        names(
            &unreached,
            &["lan", "blue", "ip route add 10.20.0.0/16 dev lan"],
        );
        // Most machines have a default route.
        let astray = found(|facts| {
            facts
                .egress
                .values_mut()
                .for_each(|toward| *toward = [2].into());
        });
        names(&astray, &["lan", "ip route add 10.20.0.0/16 dev lan"]);
        let lost = found(|facts| {
            let overlay = "100.64.0.0/24".parse().unwrap();
            facts.vrfs.get_mut(&3).unwrap().astray.push(overlay);
        });
        names(
            &lost,
            &["lan", "ip route add 100.64.0.0/24 dev sluice0 vrf blue"],
        );
    }
}

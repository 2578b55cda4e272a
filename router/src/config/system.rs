//! Compares a configuration with the machine that it is to run on.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::section::quoted;
use super::{Config, Interface, Local, Place, Places, Problem};
use crate::control::Peer;
use crate::core::{Facts, LinkFacts};

/// Problems that only show beside the machine's interfaces; none means that the configuration can
/// run here. `facts` are without the TUN device and the loopback.
///
/// - A named interface must be there.
/// - The tunnel's addresses, its network and the peers' allowed IPs become kernel addresses and
///   routes into the TUN device, which come before the main table's. They must not hold an address
///   of the machine, the default gateway or the whole network that an interface is connected to, or the router loses its
///   own neighbours: gateway, name server, subnet hosts. A part of a connected network without the
///   machine's own address is fine (overlay addresses out of the LAN's range).
/// - Routed CIDRs become no kernel routes: that one holds or equals the uplink's own network is how
///   a one-armed router in a VPC looks.
pub fn check_against_system(config: &Config, facts: &Facts) -> Vec<Problem> {
    let places = config.origin.0.as_deref();
    let mut check = Check {
        facts,
        places,
        problems: Vec::new(),
    };
    let at = |list: Option<&Vec<Place>>, index: usize| list.and_then(|l| l.get(index)).copied();

    if let Interface::Named(name) = &config.local.uplink {
        check.exists(name, "datapath.uplink", places.and_then(|p| p.uplink));
    }
    for (index, name) in config.local.subnet.iter().enumerate() {
        check.exists(
            name,
            "datapath.subnet",
            at(places.map(|p| &p.subnet), index),
        );
    }
    let connected = Connected::new(&config.local, facts);
    for (index, address) in config.addresses().iter().enumerate() {
        let position = at(places.map(|p| &p.addresses), index);
        if let Some(taken) = connected.captured(&address.trunc()) {
            let message = format!(
                "\"{address}\" would take {taken} into the tunnel; choose tunnel addresses that \
                 this machine does not use"
            );
            check.add(position, "wireguard.addresses", message);
        }
    }
    for (index, peer) in config.snapshot.peers.iter().enumerate() {
        check.peer(
            peer,
            &connected,
            places.and_then(|p| p.allowed_ips.get(index)),
        );
    }
    check.problems
}

/// The same for peers that stand in no file.
pub fn check_peers_against_system<'p>(
    local: &Local,
    peers: impl IntoIterator<Item = &'p Peer>,
    facts: &Facts,
) -> Vec<Problem> {
    let mut check = Check {
        facts,
        places: None,
        problems: Vec::new(),
    };
    let connected = Connected::new(local, facts);
    for peer in peers {
        check.peer(peer, &connected, None);
    }
    check.problems
}

/// Which of these networks would cut the router off from its neighbours if they led into the tunnel, each with what of
/// the machine lies in it.
pub fn captured<'n>(
    local: &Local,
    nets: impl IntoIterator<Item = &'n IpNet>,
    facts: &Facts,
) -> Vec<(IpNet, String)> {
    let connected = Connected::new(local, facts);
    let nets = nets.into_iter();
    nets.filter_map(|net| Some((*net, connected.captured(net)?)))
        .collect()
}

struct Check<'a> {
    facts: &'a Facts,
    places: Option<&'a Places>,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn add(&mut self, place: Option<Place>, key: &'static str, message: String) {
        let files = self.places.map(|places| &places.files);
        // What has no place is the file's.
        let number = place.map_or(0, |place| usize::from(place.file));
        let file = files.and_then(|files| files.get(number)).cloned();
        self.problems.push(Problem {
            file: file.unwrap_or_else(|| std::path::Path::new("configuration").into()),
            position: place.map(|place| place.position),
            key: key.into(),
            message,
        });
    }

    fn peer(&mut self, peer: &Peer, connected: &Connected<'_>, places: Option<&Vec<Place>>) {
        for (entry, net) in peer.allowed_ips.iter().enumerate() {
            if let Some(taken) = connected.captured(net) {
                let message = format!(
                    "\"{net}\" would take {taken} into the tunnel, and cut the router off from its \
                     neighbours; narrow it"
                );
                let position = places.and_then(|list| list.get(entry)).copied();
                self.add(position, "peer.allowed_ips", message);
            }
        }
    }

    fn exists(&mut self, name: &str, key: &'static str, position: Option<Place>) {
        let names = || self.facts.links.values().map(|link| link.name.as_str());
        if names().any(|known| known == name) {
            return;
        }
        let known: Vec<&str> = names().collect();
        let message = format!(
            "this machine has no interface {}; it has {}: write one of these, or \"auto\"",
            quoted(name),
            if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            }
        );
        self.add(position, key, message);
    }
}

/// The machine's addresses, sorted, so that those within a CIDR are a range. A single address
/// (/32, /128) has no neighbours and is reached before any route of ours; it counts only on the
/// uplink, where clouds hand out such addresses and neighbours are there all the same.
struct Connected<'f> {
    own: BTreeMap<IpNet, (&'f LinkFacts, IpNet)>,
    gateways: &'f BTreeSet<IpAddr>,
}

impl<'f> Connected<'f> {
    fn new(local: &Local, facts: &'f Facts) -> Self {
        let uplink = |index: &u32, link: &LinkFacts| match &local.uplink {
            Interface::Auto => facts.default_link == Some(*index),
            Interface::Named(name) => link.name == *name,
        };
        let addresses = facts.links.iter().flat_map(|(index, link)| {
            let single = |address: &IpNet| address.prefix_len() == address.max_prefix_len();
            let uplink = uplink(index, link);
            let counts = move |address: &&IpNet| uplink || !single(address);
            let own = move |address: &IpNet| (IpNet::from(address.addr()), (link, *address));
            link.addresses.iter().filter(counts).map(own)
        });
        Self {
            own: addresses.collect(),
            gateways: &facts.gateways,
        }
    }

    /// What of the machine lies within `net`.
    ///
    /// To hold the whole of a connected network is to hold the machine's address in it, so only
    /// addresses need to be looked for.
    fn captured(&self, net: &IpNet) -> Option<String> {
        let from = IpNet::from(net.network());
        let mut within = self.own.range(from..).map(|(own, found)| (own, *found));
        let Some((_, (link, address))) = within.next().filter(|(own, _)| net.contains(*own)) else {
            let gateway = self
                .gateways
                .iter()
                .find(|gateway| net.contains(*gateway))?;
            return Some(format!("{gateway}, the gateway"));
        };
        Some(
            if net.contains(&address.trunc()) && address.prefix_len() < address.max_prefix_len() {
                format!("{}, the network of {}", address.trunc(), link.name)
            } else {
                format!("{}, the address of {}", address.addr(), link.name)
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{EXAMPLE, parse_in_temporary_directory};

    fn facts() -> Facts {
        let link = |name: &str, addresses: &[&str]| LinkFacts {
            name: name.into(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            ..LinkFacts::default()
        };
        Facts {
            links: BTreeMap::from([
                (2, link("eth0", &["10.0.1.5/24", "fe80::1/64"])),
                (3, link("eth1", &["192.168.7.2/24"])),
                (4, link("other0", &["100.127.0.1/32"])),
            ]),
            default_link: Some(2),
            gateways: BTreeSet::from(["10.0.1.1".parse().unwrap()]),
            ..Facts::default()
        }
    }

    fn problems(edit: impl FnOnce(&mut Config)) -> Vec<String> {
        let mut config = parse_in_temporary_directory(EXAMPLE).unwrap();
        edit(&mut config);
        let found = check_against_system(&config, &facts());
        found.iter().map(ToString::to_string).collect()
    }

    fn allow(cidr: &str) -> Vec<String> {
        problems(|config| config.snapshot.peers[0].allowed_ips[0] = cidr.parse().unwrap())
    }

    #[test]
    fn a_route_into_the_uplinks_own_network_is_normal() {
        let route = |cidr: &str| cidr.parse().unwrap();
        for cidr in ["10.0.0.0/16", "10.0.1.0/24", "10.0.1.5/32"] {
            let found = problems(|config| config.snapshot.routes[0].cidr = route(cidr));
            assert_eq!(found, Vec::<String>::new(), "{cidr}");
        }
    }

    #[test]
    fn allowed_ips_must_not_capture_the_machines_networks() {
        for (cidr, says) in [
            ("10.0.0.0/8", "10.0.1.0/24, the network of eth0"),
            ("10.0.1.0/24", "10.0.1.0/24, the network of eth0"),
            ("10.0.1.5/32", "10.0.1.5, the address of eth0"),
            ("192.168.0.0/16", "192.168.7.0/24, the network of eth1"),
            ("10.0.1.0/30", "10.0.1.1, the gateway"),
        ] {
            let found = allow(cidr);
            assert!(
                found.len() == 1 && found[0].contains(says),
                "{cidr}: {found:?}"
            );
            assert!(found[0].contains(": peer.allowed_ips: "), "{found:?}");
            let line = found[0]
                .split(':')
                .nth(1)
                .and_then(|l| l.parse::<usize>().ok());
            let text = line.and_then(|line| EXAMPLE.lines().nth(line - 1)).unwrap();
            assert!(text.contains("allowed_ips"), "{found:?}: {text}");
        }
        for cidr in ["10.0.1.128/25", "10.0.2.0/24", "100.64.0.0/10", "fd00::/8"] {
            assert_eq!(allow(cidr), Vec::<String>::new(), "{cidr}");
        }
    }

    /// Routes of ours that drop in silence outlive a crash, and hold what all allowed IPs do.
    #[test]
    fn allowed_ips_that_hold_everything_together_are_refused() {
        for (halves, says) in [
            (
                ["0.0.0.0/1", "128.0.0.0/1"],
                "\"0.0.0.0/1\" would take 10.0.1.0/24",
            ),
            (["::/1", "8000::/1"], "\"8000::/1\" would take fe80::/64"),
        ] {
            let halves = halves.map(|cidr| cidr.parse().unwrap());
            let found = problems(|config| config.snapshot.peers[0].allowed_ips = halves.into());
            assert!(
                found.iter().any(|problem| problem.contains(says)),
                "{halves:?}: {found:?}"
            );
        }
    }

    #[test]
    fn tunnel_addresses_must_not_capture_the_machines_networks() {
        let found = problems(|config| {
            config.identity.as_mut().unwrap().addresses[0] = "10.0.1.77/24".parse().unwrap()
        });
        assert!(
            found[0].contains("wireguard.addresses: \"10.0.1.77/24\""),
            "{found:?}"
        );
    }

    #[test]
    fn named_interfaces_must_exist() {
        let found = problems(|config| {
            config.local.uplink = Interface::Named("eth9".into());
            config.local.subnet = vec!["eth1".into(), "lan".into()];
        });
        assert!(found[0].contains("no interface \"eth9\"; it has eth0, eth1, other0"));
        assert!(found[1].contains("datapath.subnet: this machine has no interface \"lan\""));
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn a_configuration_without_a_file_is_judged_too() {
        let found = problems(|config| {
            config.origin = Default::default();
            config.local.uplink = Interface::Named("eth9".into());
        });
        assert!(
            found[0].starts_with("configuration: datapath.uplink:"),
            "{found:?}"
        );
    }
}

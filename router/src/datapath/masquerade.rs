//! The address that the kernel's masquerade takes, for programs that must take the same one.
//!
//! In IPv4 it is the first address of the NIC whose network holds the next hop, else the first one
//! (`inet_select_addr` in net/ipv4/devinet.c). In IPv6 it goes by the destination and RFC 6724
//! (`ipv6_dev_get_saddr` in net/ipv6/addrconf.c). Either is a matter of prefixes, so the answers fit
//! a table that is searched for the longest one.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// An address that a masquerade could take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// The address.
    pub address: IpAddr,
    /// Its network: in IPv4 that of the far end, where there is one.
    pub network: IpNet,
    /// In IPv6: a temporary one where these are not preferred, or the other way round (RFC 6724,
    /// rule 7).
    pub unloved: bool,
}

/// A prefix of the kernel's table of IPv6 labels (RFC 6724, section 2.1), and its label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// The interface that it is for; zero: all.
    pub interface: u32,
    /// The addresses.
    pub prefix: Ipv6Net,
    /// Their label.
    pub label: u32,
}

/// What is taken of a NIC's `candidates`, in the kernel's order, toward next hops (IPv4) and
/// destinations (IPv6) by their longest prefix here. `labels` are those for the NIC.
pub fn by_prefix(candidates: &[Candidate], labels: &[Label]) -> Vec<(IpNet, IpAddr)> {
    let mut prefixes: BTreeSet<(u8, IpNet)> = BTreeSet::new();
    for candidate in candidates {
        // Root first: without a better one, something is taken.
        prefixes.insert((0, root(candidate)));
        match candidate.network {
            IpNet::V4(network) => {
                prefixes.insert((network.prefix_len(), network.trunc().into()));
            }
            // A destination may have any number of bits in common with the address.
            IpNet::V6(network) => {
                let lengths = 1..=network.prefix_len();
                prefixes.extend(lengths.filter_map(|length| {
                    let prefix = IpNet::new(candidate.address, length).ok()?;
                    Some((length, prefix.trunc()))
                }));
                let labelled = labels.iter().map(|label| label.prefix);
                prefixes.extend(labelled.map(|p| (p.prefix_len(), p.trunc().into())));
            }
        }
    }
    let mut table: Vec<(IpNet, IpAddr)> = Vec::new();
    for (_, prefix) in prefixes {
        let taken = match prefix {
            IpNet::V4(prefix) => toward_v4(candidates, prefix),
            IpNet::V6(prefix) => toward_v6(candidates, labels, prefix),
        };
        let Some(taken) = taken else { continue };
        // Shorter ones come first, so the last one that holds it is the longest.
        let around = table.iter().rev().find(|(net, _)| net.contains(&prefix));
        if around.is_none_or(|(_, address)| *address != taken) {
            table.push((prefix, taken));
        }
    }
    table
}

fn root(candidate: &Candidate) -> IpNet {
    match candidate.network {
        IpNet::V4(_) => Ipv4Net::default().into(),
        IpNet::V6(_) => Ipv6Net::default().into(),
    }
}

/// What is taken toward next hops in `prefix` that are in no longer prefix of a candidate.
fn toward_v4(candidates: &[Candidate], prefix: Ipv4Net) -> Option<IpAddr> {
    let prefix = IpNet::from(prefix);
    let mut family = candidates.iter().filter(|c| c.address.is_ipv4());
    let first = family.clone().next();
    let near = family.find(|candidate| candidate.network.contains(&prefix));
    near.or(first).map(|candidate| candidate.address)
}

/// What is taken toward destinations in `prefix` that are in no longer prefix of a candidate or a
/// label.
fn toward_v6(candidates: &[Candidate], labels: &[Label], prefix: Ipv6Net) -> Option<IpAddr> {
    let wanted = label(labels, prefix);
    let mut best: Option<((bool, bool, u8), IpAddr)> = None;
    for candidate in candidates {
        let (IpAddr::V6(address), IpNet::V6(network)) = (candidate.address, candidate.network)
        else {
            continue;
        };
        let differing = u128::from(address) ^ u128::from(prefix.addr());
        let common = (differing.leading_zeros() as u8)
            .min(prefix.prefix_len())
            .min(network.prefix_len());
        // Rules 6, 7 and 8; of equals the kernel keeps the first.
        let rank = (
            label(labels, address.into()) == wanted,
            !candidate.unloved,
            common,
        );
        if best.is_none_or(|(highest, _)| rank > highest) {
            best = Some((rank, candidate.address));
        }
    }
    best.map(|(_, address)| address)
}

/// The label of the longest prefix that holds all of `net`.
fn label(labels: &[Label], net: Ipv6Net) -> Option<u32> {
    let around = labels.iter().filter(|label| label.prefix.contains(&net));
    let longest = around.max_by_key(|label| (label.prefix.prefix_len(), label.interface));
    longest.map(|label| label.label)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(text: &str) -> Candidate {
        let network: IpNet = text.parse().unwrap();
        Candidate {
            address: network.addr(),
            network,
            unloved: false,
        }
    }

    fn labels() -> Vec<Label> {
        [("::/0", 1), ("fc00::/7", 5), ("2002::/16", 2)]
            .map(|(prefix, label)| Label {
                interface: 0,
                prefix: prefix.parse().unwrap(),
                label,
            })
            .into()
    }

    fn looked_up(table: &[(IpNet, IpAddr)], to: IpAddr) -> Option<IpAddr> {
        let around = table.iter().filter(|(net, _)| net.contains(&to));
        let longest = around.max_by_key(|(net, _)| net.prefix_len());
        longest.map(|(_, address)| *address)
    }

    fn taken(candidates: &[Candidate], to: &str) -> String {
        let table = by_prefix(candidates, &labels());
        looked_up(&table, to.parse().unwrap()).unwrap().to_string()
    }

    #[test]
    fn the_next_hop_chooses_among_ipv4_addresses() {
        let candidates = ["10.20.0.1/24", "10.20.2.1/24", "10.20.2.129/25"].map(candidate);
        for (to, address) in [
            ("10.20.0.9", "10.20.0.1"),
            ("10.20.2.9", "10.20.2.1"),
            // The first that holds it, not the narrowest.
            ("10.20.2.200", "10.20.2.1"),
            ("192.0.2.1", "10.20.0.1"),
        ] {
            assert_eq!(taken(&candidates, to), address, "{to}");
        }
        let far_end = Candidate {
            network: "10.9.0.2/32".parse().unwrap(),
            ..candidate("10.9.0.1/32")
        };
        let candidates = [candidate("10.20.0.1/24"), far_end];
        assert_eq!(taken(&candidates, "10.9.0.2"), "10.9.0.1");
        assert_eq!(by_prefix(&[], &labels()), []);
    }

    #[test]
    fn the_destination_chooses_among_ipv6_addresses() {
        let mut candidates = [
            "2001:db8:1::1/64",
            "2001:db8:2::1/64",
            "fd00:1::1/64",
            "2002:1::1/64",
        ]
        .map(candidate);
        for (to, address) in [
            ("2001:db8:2::9", "2001:db8:2::1"),
            ("2001:db8:1::9", "2001:db8:1::1"),
            ("2001:db8:3::9", "2001:db8:2::1"),
            // As many bits in common with both: the first.
            ("2001:db8:7::9", "2001:db8:1::1"),
            ("2a00::1", "2001:db8:1::1"),
            ("fd00:9::1", "fd00:1::1"),
            ("2002:9::1", "2002:1::1"),
        ] {
            assert_eq!(taken(&candidates, to), address, "{to}");
        }
        candidates[1].unloved = true;
        assert_eq!(taken(&candidates, "2001:db8:2::9"), "2001:db8:1::1");
    }

    /// The kernel's rules for one destination.
    fn by_rules(candidates: &[Candidate], to: IpAddr) -> Option<IpAddr> {
        let to = match to {
            IpAddr::V4(_) => {
                let mut family = candidates.iter().filter(|c| c.address.is_ipv4());
                let near = family.clone().find(|c| c.network.contains(&to));
                return near.or(family.next()).map(|c| c.address);
            }
            IpAddr::V6(to) => to,
        };
        let mut best: Option<(&Candidate, u32)> = None;
        for candidate in candidates {
            let IpAddr::V6(address) = candidate.address else {
                continue;
            };
            let same = (u128::from(address) ^ u128::from(to)).leading_zeros();
            let same = same.min(candidate.network.prefix_len().into());
            let labelled = |c: &Candidate| {
                let IpAddr::V6(address) = c.address else {
                    unreachable!()
                };
                label(&labels(), address.into()) == label(&labels(), to.into())
            };
            let better = best.is_none_or(|(other, others)| {
                match (labelled(candidate), labelled(other)) {
                    (true, false) => return true,
                    (false, true) => return false,
                    _ => {}
                }
                match (candidate.unloved, other.unloved) {
                    (false, true) => true,
                    (true, false) => false,
                    _ => same > others,
                }
            });
            if better {
                best = Some((candidate, same));
            }
        }
        best.map(|(candidate, _)| candidate.address)
    }

    fn any_candidate() -> impl Strategy<Value = Candidate> {
        // Few different bits, so that much is in common.
        let v4 = (0_u32..16, 0_u32..4, 8_u8..=32).prop_map(|(net, host, len)| {
            let address = IpAddr::from((0x0a00_0000 + (net << 20) + host).to_be_bytes());
            IpNet::new(address, len).unwrap()
        });
        let v6 =
            (0..4_usize, any::<u8>(), 0_u128..4, 1_u8..=128).prop_map(|(first, net, host, len)| {
                let first = [0xfd00_u128, 0x2001, 0x2002, 0x2a00][first];
                let address = (first << 112) + (u128::from(net) << 80) + host;
                IpNet::new(IpAddr::from(address.to_be_bytes()), len).unwrap()
            });
        (prop_oneof![v4, v6], any::<bool>()).prop_map(|(network, unloved)| Candidate {
            address: network.addr(),
            network,
            unloved,
        })
    }

    proptest! {
        #[test]
        fn the_table_says_what_the_rules_say(
            candidates in prop::collection::vec(any_candidate(), 0..8),
            others in prop::collection::vec(any_candidate(), 1..32),
        ) {
            let table = by_prefix(&candidates, &labels());
            for to in candidates.iter().chain(&others) {
                prop_assert_eq!(looked_up(&table, to.address), by_rules(&candidates, to.address));
            }
        }
    }
}

//! ICMP errors of peers: each is believed about its own flows only. What it tells of another's is
//! nothing that it can have seen, and the server would lower the path MTU for all whom the router
//! translates.
//!
//! nf_tables cannot compare two addresses, so sets say which ones are of one peer: pairs of single addresses
//! in one, of ranges in another. Connection tracking has looked the quoted packet up, and knows who is at
//! the flow's ends.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::ruleset::{DROP_SPOOFED, FROM, Sets, decide, load_source, of_family, pass};
use super::span::{Family, Span, merge, partition, span};
use super::tables::FamilyTables;
use crate::datapath::Spec;
use crate::netlink::nft::{Cmp, Ct, Meta, REG, Rule, Transaction, Verdict, WORD};

/// `ct state related`.
const RELATED: u32 = 4;
/// Of a peer with more ranges of addresses only pairs within one are known: what a router of its network
/// tells of another range is not believed.
const PAIRED: usize = 4;
/// Of more pairs of ranges the kernel would take long to make a set; then errors are not looked at.
const MOST: usize = 4096;

/// Pairs of addresses of one peer.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Together {
    hosts: Vec<(Span, Span)>,
    ranges: Vec<(Span, Span)>,
}

impl Together {
    pub(super) fn new(spec: &Spec, family: Family) -> Self {
        let nets: Vec<&IpNet> = spec.overlay.keys().collect();
        let labelled: Vec<(Span, u32)> = nets
            .iter()
            .zip(0..)
            .filter_map(|(net, index)| Some((span(net, family)?, index)))
            .collect();
        let mut peers: BTreeMap<u32, Vec<Span>> = BTreeMap::new();
        for (span, around) in partition(&labelled) {
            let around = around.iter().filter_map(|index| nets.get(*index as usize));
            if let Some(net) = around.max_by_key(|net| net.prefix_len()) {
                let number = spec.overlay.get(net).copied().unwrap_or_default();
                peers.entry(number).or_default().push(span);
            }
        }
        let mut together = Self::default();
        for spans in peers.into_values().map(merge) {
            for one in &spans {
                let others = if spans.len() <= PAIRED {
                    &spans[..]
                } else {
                    std::slice::from_ref(one)
                };
                for other in others {
                    let single = one.0 == one.1 && other.0 == other.1;
                    let pairs = if single {
                        &mut together.hosts
                    } else {
                        &mut together.ranges
                    };
                    pairs.push((*one, *other));
                }
            }
        }
        together
    }
}

const CHAIN: &str = "errors";

fn names(family: Family) -> [&'static str; 2] {
    match family {
        Family::V4 => ["one_peer4", "one_peer_ranges4"],
        Family::V6 => ["one_peer6", "one_peer_ranges6"],
    }
}

/// Writes the sets and the chain.
pub(super) fn write(tx: &mut Transaction<'_>, tables: [&FamilyTables; 2], families: &[Sets; 2]) {
    tx.chain(CHAIN);
    for (tables, sets) in tables.into_iter().zip(families) {
        let (family, together) = (tables.family, &tables.together);
        if together.ranges.len() > MOST {
            tx.rule(CHAIN, |r| {
                pass(of_family(r, family), &FROM);
            });
            continue;
        }
        let kinds = [(&together.hosts, false), (&together.ranges, true)];
        for ((pairs, ranges), name) in kinds.into_iter().zip(names(family)) {
            tx.pair_set(name, family, pairs, ranges);
            // It is at that end which has opened the flow, or at the other.
            for end in [sets.original_source(), sets.original_destination()] {
                tx.rule(CHAIN, |r| {
                    pass(load_pair(r, family, end).lookup(name, WORD), &FROM);
                });
            }
        }
    }
    tx.rule(CHAIN, |r| decide(r, DROP_SPOOFED, Verdict::Drop));
}

fn load_pair<'r, 'a, 'b>(
    rule: &'r mut Rule<'a, 'b>,
    family: Family,
    end: Ct,
) -> &'r mut Rule<'a, 'b> {
    let other = match family {
        Family::V4 => WORD + 1,
        Family::V6 => WORD + 4,
    };
    load_source(of_family(rule, family), family, WORD).ct(end, other)
}

/// Has the chain asked about ICMP errors.
pub(super) fn ask(tx: &mut Transaction<'_>, chain: &str) {
    for protocol in [libc::IPPROTO_ICMP, libc::IPPROTO_ICMPV6] {
        tx.rule(chain, |r| {
            r.meta(Meta::L4Proto, REG)
                .cmp(Cmp::Eq, REG, &[protocol as u8])
                .ct(Ct::State, REG)
                .any_bit(REG, &RELATED.to_ne_bytes());
            r.verdict(Verdict::Goto(CHAIN));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::span::number;
    use super::*;

    #[test]
    fn addresses_of_one_peer_are_paired() {
        let nets = [
            ("100.64.0.2/32", 1),
            ("100.64.0.9/32", 1),
            ("100.64.1.0/24", 2),
            ("100.64.1.0/25", 3),
            ("fd7a::/64", 1),
        ];
        let nets = nets.map(|(net, number)| (net.parse::<IpNet>().unwrap(), number));
        let spec = Spec {
            overlay: nets.into(),
            ..Spec::default()
        };
        let at = |address: &str| number(address.parse().unwrap());
        let host = |address: &str| (at(address), at(address));
        let (one, other) = (host("100.64.0.2"), host("100.64.0.9"));
        let lower = (at("100.64.1.0"), at("100.64.1.127"));
        let upper = (at("100.64.1.128"), at("100.64.1.255"));
        let wanted = Together {
            hosts: vec![(one, one), (one, other), (other, one), (other, other)],
            ranges: vec![(upper, upper), (lower, lower)],
        };
        assert_eq!(Together::new(&spec, Family::V4), wanted);
    }
}

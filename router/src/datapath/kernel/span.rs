//! Ranges of addresses, as numbers.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

pub(super) use crate::netlink::nft::{Family, Span};

/// The range of a CIDR; `None` when it is of the other family.
pub(super) fn span(net: &IpNet, family: Family) -> Option<Span> {
    match (net, family) {
        (IpNet::V4(_), Family::V4) | (IpNet::V6(_), Family::V6) => {
            Some((number(net.network()), number(net.broadcast())))
        }
        _ => None,
    }
}

/// An address as a number.
pub(super) fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(v4.to_bits()),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

/// The address of a number.
pub(super) fn address(number: u128, family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(number as u32).into(),
        Family::V6 => Ipv6Addr::from_bits(number).into(),
    }
}

/// The union of the CIDRs of one family: in order, none touching the next.
pub(super) fn union<'a>(nets: impl IntoIterator<Item = &'a IpNet>, family: Family) -> Vec<Span> {
    merge(
        nets.into_iter()
            .filter_map(|net| span(net, family))
            .collect(),
    )
}

/// The union of ranges: in order, none touching the next.
pub(super) fn merge(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_unstable();
    let mut merged: Vec<Span> = Vec::with_capacity(spans.len());
    for (first, last) in spans {
        match merged.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

/// Whether an address lies in one of the ranges, which are in order.
pub(super) fn holds(spans: &[Span], address: u128) -> bool {
    let behind = spans.partition_point(|(first, _)| *first <= address);
    behind
        .checked_sub(1)
        .is_some_and(|at| spans[at].1 >= address)
}

/// What two unions have in common.
pub(super) fn intersect(a: &[Span], b: &[Span]) -> Vec<Span> {
    let (mut a, mut b) = (a.iter().peekable(), b.iter().peekable());
    let mut common = Vec::new();
    while let (Some(x), Some(y)) = (a.peek(), b.peek()) {
        let (first, last) = (x.0.max(y.0), x.1.min(y.1));
        if first <= last {
            common.push((first, last));
        }
        if x.1 < y.1 {
            a.next();
        } else {
            b.next();
        }
    }
    common
}

/// Cuts labelled ranges into pieces that do not overlap, each with the sorted labels that hold
/// everywhere in it. Neighbours with the same labels are one piece; pieces without labels are left
/// out.
pub(super) fn partition(labelled: &[(Span, u32)]) -> Vec<(Span, Vec<u32>)> {
    // Where a label begins (true) or has ended (false).
    let mut edges: Vec<(u128, bool, u32)> = Vec::with_capacity(labelled.len() * 2);
    for ((first, last), label) in labelled {
        edges.push((*first, true, *label));
        // What lasts to the end of all numbers has no end.
        if let Some(behind) = last.checked_add(1) {
            edges.push((behind, false, *label));
        }
    }
    edges.sort_unstable();
    let mut pieces: Vec<(Span, Vec<u32>)> = Vec::new();
    let mut active: BTreeMap<u32, usize> = BTreeMap::new();
    let mut from = 0;
    let mut emit = |first, last, active: &BTreeMap<u32, usize>| {
        if active.is_empty() || first > last {
            return;
        }
        let labels: Vec<u32> = active.keys().copied().collect();
        match pieces.last_mut() {
            Some((span, same)) if span.1 + 1 == first && *same == labels => span.1 = last,
            _ => pieces.push(((first, last), labels)),
        }
    };
    for (at, begins, label) in edges {
        if at > from {
            emit(from, at - 1, &active);
            from = at;
        }
        let count = active.entry(label).or_default();
        if begins {
            *count += 1;
        } else if *count <= 1 {
            active.remove(&label);
        } else {
            *count -= 1;
        }
    }
    emit(from, u128::MAX, &active);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn small_spans() -> impl Strategy<Value = Vec<Span>> {
        // Small numbers, and some at the far end, where adding one overflows.
        let edge = |n: u128| if n < 24 { n } else { u128::MAX - (31 - n) };
        let span = (0u128..32, 0u128..32).prop_map(move |(a, b)| (edge(a.min(b)), edge(a.max(b))));
        proptest::collection::vec(span, 0..8)
    }

    fn points() -> impl Iterator<Item = u128> {
        (0..32).chain(u128::MAX - 10..=u128::MAX)
    }

    fn inside(spans: &[Span], at: u128) -> bool {
        spans
            .iter()
            .any(|(first, last)| (*first..=*last).contains(&at))
    }

    fn in_order(spans: &[Span]) -> bool {
        spans.windows(2).all(|w| w[0].1 < w[1].0)
    }

    proptest! {
        #[test]
        fn union_and_intersection_hold_the_right_points(a in small_spans(), b in small_spans()) {
            let (x, y) = (merge(a.clone()), merge(b.clone()));
            let common = intersect(&x, &y);
            prop_assert!(in_order(&x) && in_order(&common));
            for at in points() {
                prop_assert_eq!(inside(&x, at), inside(&a, at));
                prop_assert_eq!(holds(&x, at), inside(&a, at));
                prop_assert_eq!(inside(&common, at), inside(&a, at) && inside(&b, at));
            }
        }

        #[test]
        fn pieces_have_the_labels_of_their_points(spans in small_spans()) {
            let labelled: Vec<_> = spans.iter().zip(0..).map(|(s, i)| (*s, i / 2)).collect();
            let pieces = partition(&labelled);
            let only: Vec<Span> = pieces.iter().map(|(span, _)| *span).collect();
            prop_assert!(in_order(&only));
            for at in points() {
                let mut want: Vec<u32> = labelled
                    .iter()
                    .filter(|(span, _)| inside(&[*span], at))
                    .map(|(_, label)| *label)
                    .collect();
                want.dedup();
                let got = pieces.iter().find(|(span, _)| inside(&[*span], at));
                prop_assert_eq!(got.map_or(vec![], |(_, labels)| labels.clone()), want);
            }
        }
    }
}

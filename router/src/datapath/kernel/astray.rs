//! What is for a peer leaves by the TUN device or not at all.
//!
//! The routing rules lead it there, and anybody may take them away: until they are back, the machine's
//! default route would lead packets for a peer's network to the internet, in the clear. This table
//! nobody can take from us. Networks that a peer has as a whole family (an overlay default route) are
//! left out: the machine's own networks come before them.

use ipnet::IpNet;

use super::peers::{self, Peers};
use super::ruleset::{Named, Sets, decide, load_destination, named, of_family};
use super::span::{Family, union};
use super::tables::Tables;
use crate::datapath::Spec;
use crate::netlink::nft::{Cmp, Hook, LOOPBACK, Meta, REG, Rule, Transaction, Verdict};

pub(super) const ASTRAY: Named = named("to_astray", "kernel_to_overlay", "drop_astray");

/// The chain that drops it.
const CHAIN: &str = "astray";

/// The set of the ranges that have only one way, where a peer has a whole family.
const fn set(family: Family) -> &'static str {
    match family {
        Family::V4 => "only_ranges4",
        Family::V6 => "only_ranges6",
    }
}

/// Whether some peer has a whole family.
fn is_whole(peers: &Peers) -> bool {
    peers.nets().any(|net| net.prefix_len() == 0)
}

/// The ranges with only one way, if these are not all that peers have.
pub(super) fn specific(peers: &Peers) -> Option<Vec<&IpNet>> {
    is_whole(peers).then(|| peers.nets().filter(|net| net.prefix_len() > 0).collect())
}

/// Writes the chain, and has packets of the machine's own pass it.
pub(super) fn write(
    tx: &mut Transaction<'_>,
    spec: &Spec,
    tables: &Tables,
    families: &[Sets; 2],
    tun: &[u8],
) {
    tx.chain(CHAIN);
    tx.base_chain("output", Hook::Output);
    // The underlay is marked, and has ways of its own.
    tx.rule(CHAIN, |r| {
        r.meta(Meta::Mark, REG)
            .any_bit(REG, &spec.marks.underlay.to_ne_bytes())
            .verdict(Verdict::Return);
    });
    tx.rule(CHAIN, |r| {
        r.meta(Meta::Oif, REG)
            .cmp(Cmp::Eq, REG, tun)
            .verdict(Verdict::Return);
    });
    tx.rule(CHAIN, |r| {
        r.meta(Meta::OifKind, REG)
            .cmp(Cmp::Eq, REG, &LOOPBACK.to_ne_bytes())
            .verdict(Verdict::Return);
    });
    for (tables, sets) in tables.families().into_iter().zip(families) {
        let family = sets.family;
        let [hosts, ranges] = peers::names(family);
        let load = |r: &mut Rule<'_, '_>| {
            load_destination(of_family(r, family), family, REG);
        };
        let specific = specific(&tables.peers);
        if let Some(nets) = &specific {
            tx.address_set(set(family), family, &union(nets.iter().copied(), family));
        }
        let ranges = if specific.is_some() {
            set(family)
        } else {
            ranges
        };
        for set in [hosts, ranges] {
            tx.rule(CHAIN, |r| {
                load(r);
                decide(r.lookup(set, REG), ASTRAY, Verdict::Drop);
            });
        }
    }
    tx.rule("output", |r| {
        r.verdict(Verdict::Jump(CHAIN));
    });
}

/// Has the packets of `chain` pass it that leave by another than the TUN device.
pub(super) fn guard(tx: &mut Transaction<'_>, chain: &str, tun: &[u8]) {
    tx.rule(chain, |r| {
        r.meta(Meta::Oif, REG)
            .cmp(Cmp::Ne, REG, tun)
            .verdict(Verdict::Jump(CHAIN));
    });
}

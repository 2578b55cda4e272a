//! What is for a peer leaves by the TUN device or not at all.
//!
//! The routing rules lead it there, and anybody may take them away: until they are back, the machine's
//! default route would lead packets for a peer's network to the internet, in the clear. This table
//! nobody can take from us. Networks that a peer has as a whole family (an overlay default route) are
//! left out: the machine's own networks come before them.

use ipnet::IpNet;

use super::ruleset::{Named, Sets, decide, load_destination, named, of_family};
use super::span::{Family, union};
use crate::datapath::Spec;
use crate::netlink::nft::{Cmp, Hook, LOOPBACK, Meta, REG, Transaction, Verdict};

pub(super) const ASTRAY: Named = named("to_astray", "kernel_to_overlay", "drop_astray");

/// The chain that drops it.
const CHAIN: &str = "astray";

/// The set of the addresses that have only one way.
fn set(spec: &Spec, sets: &Sets) -> (String, Option<Vec<IpNet>>) {
    let is_default = |net: &&IpNet| net.prefix_len() == 0;
    let is_ours = |net: &&IpNet| net.addr().is_ipv4() == (sets.family == Family::V4);
    if !spec
        .overlay
        .keys()
        .filter(is_ours)
        .any(|net| is_default(&net))
    {
        return (sets.overlay.clone(), None);
    }
    let specific = spec.overlay.keys().filter(|net| !is_default(net));
    (
        format!("only_{}", sets.overlay),
        Some(specific.copied().collect()),
    )
}

/// Writes the chain, and has packets of the machine's own pass it.
pub(super) fn write(tx: &mut Transaction<'_>, spec: &Spec, families: &[Sets; 2], tun: &[u8]) {
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
    for sets in families {
        let (name, nets) = set(spec, sets);
        if let Some(nets) = nets {
            tx.address_set(&name, sets.family, &union(&nets, sets.family));
        }
        tx.rule(CHAIN, |r| {
            load_destination(of_family(r, sets.family), sets.family, REG).lookup(&name, REG);
            decide(r, ASTRAY, Verdict::Drop);
        });
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

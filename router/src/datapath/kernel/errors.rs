//! ICMP errors of peers: each is believed about its own flows only. What it tells of another's is
//! nothing that it can have seen, and the server would lower the path MTU for all whom the router
//! translates.
//!
//! nf_tables cannot compare two addresses. So a map tells whose the sender's is, and sets hold each peer's number
//! with its addresses. Connection tracking has looked the quoted packet up, and knows who is at the flow's
//! ends. The number waits in the packet's priority meanwhile: nft can show that, which a pair of
//! registers filled from maps it cannot (1.0.6 crashes).

use super::peers;
use super::ruleset::{DROP_SPOOFED, FROM, Sets, decide, load_source, of_family, pass};
use super::tables::Tables;
use crate::netlink::nft::{Cmp, Ct, Meta, REG, REG_2, Transaction, Verdict, WORD};

/// `ct state related`.
const RELATED: u32 = 4;

const CHAIN: &str = "errors";

/// Writes the chain.
pub(super) fn write(tx: &mut Transaction<'_>, tables: &Tables, families: &[Sets; 2]) {
    tx.chain(CHAIN);
    for (tables, sets) in tables.families().into_iter().zip(families) {
        let family = sets.family;
        if !tables.peers.are_paired() {
            tx.rule(CHAIN, |r| {
                pass(of_family(r, family), &FROM);
            });
            continue;
        }
        // A single address within a range is not the range's: it comes last.
        let [of_host, of_range] = peers::map_names(family);
        for map in [of_range, of_host] {
            tx.rule(CHAIN, |r| {
                load_source(of_family(r, family), family, REG)
                    .number_of(map, REG, REG_2)
                    .set_meta(Meta::Priority, REG_2);
            });
        }
        let [paired_hosts, paired_ranges] = peers::pair_names(family);
        // It is at that end which has opened the flow, or at the other.
        let ends = [
            ("opener", sets.original_source()),
            ("other", sets.original_destination()),
        ];
        for (name, end) in ends {
            let [hosts, _] = peers::names(family);
            let chain = format!("{CHAIN}_{name}_{hosts}");
            tx.chain(&chain);
            for set in [paired_hosts, paired_ranges] {
                tx.rule(&chain, |r| {
                    r.meta(Meta::Priority, WORD)
                        .ct(end, WORD + 1)
                        .lookup(set, WORD)
                        .load(REG, &[0; 4])
                        .set_meta(Meta::Priority, REG);
                    pass(r, &FROM);
                });
                // As above.
                if set == paired_hosts {
                    tx.rule(&chain, |r| {
                        r.ct(end, REG).lookup(hosts, REG).verdict(Verdict::Return);
                    });
                }
            }
            tx.rule(CHAIN, |r| {
                of_family(r, family).verdict(Verdict::Jump(&chain));
            });
        }
    }
    tx.rule(CHAIN, |r| decide(r, DROP_SPOOFED, Verdict::Drop));
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

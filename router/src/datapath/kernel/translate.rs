//! The chain that translates sources: to the addresses that were chosen by hand for the interface,
//! else to the first one that it has.

use std::net::IpAddr;

use super::ruleset::{MASQUERADED, Sets};
use super::span::Family;
use crate::datapath::Spec;
use crate::netlink::nft::{Base, Cmp, Meta, REG, REG_2, REG_3, Rule, Transaction};

/// Writes the chain. `tun` is the TUN device's index in host order.
pub(super) fn write(tx: &mut Transaction<'_>, families: &[Sets; 2], tun: &[u8], spec: &Spec) {
    let ports = spec.kernel_nat_ports();
    for sets in families {
        let (nf_proto, source_at, source_len) = match sets.family {
            Family::V4 => (2, 12, 4),
            Family::V6 => (10, 8, 16),
        };
        for (link, addresses) in &spec.chosen {
            let addresses: Vec<&IpAddr> = addresses
                .iter()
                .filter(|address| address.is_ipv4() == (nf_proto == 2))
                .collect();
            for (slot, address) in (0_u32..).zip(&addresses) {
                tx.rule("translate", |r| {
                    from_peer(r, tun, sets).meta(Meta::Oif, REG).cmp(
                        Cmp::Eq,
                        REG,
                        &link.to_ne_bytes(),
                    );
                    if addresses.len() > 1 {
                        // As the programs choose, see `router_ebpf::flow::external`.
                        r.payload(Base::Network, source_at, source_len, REG)
                            .hash(REG, source_len, addresses.len() as u32, REG_2)
                            .cmp(Cmp::Eq, REG_2, &slot.to_ne_bytes());
                    }
                    let octets = match address {
                        IpAddr::V4(address) => address.octets().to_vec(),
                        IpAddr::V6(address) => address.octets().to_vec(),
                    };
                    r.count(MASQUERADED.name)
                        .load(REG, &ports.start().to_be_bytes())
                        .load(REG_2, &ports.end().to_be_bytes())
                        .load(REG_3, &octets)
                        .source_nat(nf_proto, REG_3, REG, REG_2);
                });
            }
        }
        tx.rule("translate", |r| {
            from_peer(r, tun, sets)
                .meta(Meta::Oif, REG)
                .cmp(Cmp::Ne, REG, tun)
                .count(MASQUERADED.name)
                .load(REG, &ports.start().to_be_bytes())
                .load(REG_2, &ports.end().to_be_bytes())
                .masquerade(REG, REG_2);
        });
    }
}

/// Goes on for what a peer sends to where sources are translated.
fn from_peer<'r, 'a, 'b>(
    rule: &'r mut Rule<'a, 'b>,
    tun: &[u8],
    sets: &Sets,
) -> &'r mut Rule<'a, 'b> {
    rule.meta(Meta::Iif, REG)
        .cmp(Cmp::Eq, REG, tun)
        .ct(sets.original_destination(), REG)
        .lookup(&sets.snat, REG)
}

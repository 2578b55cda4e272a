//! The chains that clamp the MSS.

use router_ebpf::packet::{RST, SYN};

use super::ruleset::{Named, TCP_FLAGS, of_family};
use super::span::Family;
use crate::netlink::nft::{Base, Cmp, Meta, REG, Transaction, Verdict};

/// IP and TCP header without options, in bytes: what an MSS leaves out of an MTU (RFC 6691).
const HEADERS_V4: u16 = 20 + 20;
const HEADERS_V6: u16 = 40 + 20;

/// Lowers the MSS of a SYN to what the tunnel carries, and to what the routes to both ends do.
pub(super) fn write(tx: &mut Transaction<'_>, chain: &str, mtu: u16, clamped: Named) {
    for (family, headers) in [(Family::V4, HEADERS_V4), (Family::V6, HEADERS_V6)] {
        let largest = mtu.saturating_sub(headers).to_be_bytes();
        tx.rule(chain, |r| {
            of_family(r, family)
                .mss(REG)
                .cmp(Cmp::Gt, REG, &largest)
                .count(clamped.name)
                .load(REG, &largest)
                .lower_mss(REG);
        });
    }
    tx.rule(chain, |r| {
        r.route_mss(REG).lower_mss(REG);
    });
}

/// The rule that sends SYN and SYN-ACK through a clamp. It stands first: the SYN-ACK already
/// belongs to a known flow.
pub(super) fn syn(tx: &mut Transaction<'_>, chain: &str, clamp: &str) {
    tx.rule(chain, |r| {
        r.meta(Meta::L4Proto, REG)
            .cmp(Cmp::Eq, REG, &[libc::IPPROTO_TCP as u8])
            .payload(Base::Transport, TCP_FLAGS, 1, REG)
            .and(REG, &[SYN | RST])
            .cmp(Cmp::Eq, REG, &[SYN])
            .verdict(Verdict::Jump(clamp));
    });
}

//! Segments of TCP that connection tracking disowns.
//!
//! A reply to a translated connection that lies far outside of its window, or comes after the
//! connection's time, is not translated back. It is one to the router itself then, whose stack knows no
//! such connection and would reset the server's end (RFC 9293, section 3.10.7.1). So what is no first
//! segment, is for a port that is translated to, and for no socket of the router, ends in silence.
//!
//! Only TCP is answered so: what comes for a closed UDP port is told, as traceroute wants it.

use std::ops::RangeInclusive;

use router_ebpf::packet::{ACK, RST, SYN};

use super::ruleset::{TCP_FLAGS, TO, decide};
use crate::netlink::nft::{
    Base, CT_INVALID, CT_NEW, CT_UNTRACKED, Cmp, Ct, Hook, Meta, REG, Transaction, Verdict,
};

/// The chain that ends what is for no socket.
pub(super) const END: &str = "end_disowned";
/// Where the destination port stands in a TCP header, and its length (RFC 9293, section 3.1).
const PORT: (u32, u32) = (2, 2);

/// Writes the chain. `ports` are those that the kernel translates to.
pub(super) fn write(tx: &mut Transaction<'_>, tun: &[u8], ports: &RangeInclusive<u16>) {
    tx.chain(END);
    for transparent in [0, 1] {
        tx.rule(END, |r| {
            r.own_socket(REG)
                .cmp(Cmp::Eq, REG, &[transparent])
                .verdict(Verdict::Accept);
        });
    }
    tx.rule(END, |r| decide(r, TO.drop_invalid, Verdict::Drop));
    tx.base_chain("disowned", Hook::Input);
    // In this order, for most of what comes to the router is of a flow that it knows.
    tx.rule("disowned", |r| {
        let unknown = CT_INVALID | CT_NEW | CT_UNTRACKED;
        r.ct(Ct::State, REG)
            .any_bit(REG, &unknown.to_ne_bytes())
            .meta(Meta::Iif, REG)
            .cmp(Cmp::Ne, REG, tun)
            .meta(Meta::L4Proto, REG)
            .cmp(Cmp::Eq, REG, &[libc::IPPROTO_TCP as u8])
            .payload(Base::Transport, PORT.0, PORT.1, REG)
            .cmp(Cmp::Ge, REG, &ports.start().to_be_bytes())
            .cmp(Cmp::Le, REG, &ports.end().to_be_bytes())
            .payload(Base::Transport, TCP_FLAGS, 1, REG)
            .and(REG, &[SYN | ACK | RST])
            .cmp(Cmp::Ne, REG, &[SYN])
            .verdict(Verdict::Jump(END));
    });
}

//! The end of what the policy does not let through.
//!
//! With [`Denied::Reject`] senders are told, but for the middle of a flow that connection tracking has
//! forgotten and that the other end may open: one more packet from there, and it goes on. So such a
//! packet is asked about once more, turned round, in the sets of the policy that hold what the other
//! side may open; see `router_ebpf::answer`, which does the same.

use router_ebpf::packet::{ACK, RST, SYN};

use super::judged;
use super::policy::{Compiled, Tree};
use super::ruleset::{Direction, FROM, Sets, TCP_FLAGS, TO, decide, load_destination, of_family};
use super::tables::Tables;
use super::tree::Look;
use crate::control::Denied;
use crate::netlink::nft::{
    BROADCAST, Base, Cmp, MULTICAST, Meta, REG, Reject, Rule, Transaction, Verdict,
};

/// RST each second and at once, as many as the eBPF programs send; of ICMP errors the kernel limits
/// its own (`net.ipv4.icmp_msgs_per_sec`).
const RESETS: u64 = 1000;
const RESETS_AT_ONCE: u32 = 50;

/// Protocol and type of the answer to a ping (RFC 792, RFC 4443).
const ECHO_REPLIES: [(libc::c_int, u8); 2] = [(libc::IPPROTO_ICMP, 0), (libc::IPPROTO_ICMPV6, 129)];

/// The chain that drops what may belong to a flow which a peer may open.
pub(super) const PEER_MAY: &str = "peer_may";
/// The chain that drops what may belong to a flow which the subnet side may open.
pub(super) const SUBNET_MAY: &str = "subnet_may";

/// Writes the end of `chain`, where the policy has not let the packet through. `others` are those of
/// [`PEER_MAY`] and [`SUBNET_MAY`] that may be the other end.
pub(super) fn write(
    tx: &mut Transaction<'_>,
    chain: &str,
    counters: &Direction,
    denied: Denied,
    others: &[&str],
) {
    let tcp = [libc::IPPROTO_TCP as u8];
    if denied == Denied::Reject {
        // RFC 1122, section 3.2.2.
        for kind in [BROADCAST, MULTICAST] {
            tx.rule(chain, |r| {
                r.destination_type(REG)
                    .cmp(Cmp::Eq, REG, &kind.to_ne_bytes());
                decide(r, counters.drop_policy, Verdict::Drop);
            });
        }
        for other in others {
            ask_other(tx, chain, other);
        }
        tx.rule(chain, |r| {
            r.meta(Meta::L4Proto, REG)
                .cmp(Cmp::Eq, REG, &tcp)
                .payload(Base::Transport, TCP_FLAGS, 1, REG)
                .and(REG, &[RST])
                .cmp(Cmp::Eq, REG, &[0])
                .limit(RESETS, RESETS_AT_ONCE)
                .count(counters.reject_policy.name)
                .reject(Reject::Reset);
        });
        tx.rule(chain, |r| {
            r.meta(Meta::L4Proto, REG)
                .cmp(Cmp::Ne, REG, &tcp)
                .count(counters.reject_policy.name)
                .reject(Reject::Prohibited);
        });
    }
    tx.rule(chain, |r| decide(r, counters.drop_policy, Verdict::Drop));
}

/// Sends what cannot be the first packet of a flow through the chain `other`.
fn ask_other(tx: &mut Transaction<'_>, chain: &str, other: &str) {
    tx.rule(chain, |r| {
        r.meta(Meta::L4Proto, REG)
            .cmp(Cmp::Eq, REG, &[libc::IPPROTO_TCP as u8])
            .payload(Base::Transport, TCP_FLAGS, 1, REG)
            .and(REG, &[SYN | ACK | RST])
            .cmp(Cmp::Ne, REG, &[SYN])
            .verdict(Verdict::Jump(other));
    });
    for (protocol, kind) in ECHO_REPLIES {
        tx.rule(chain, |r| {
            r.meta(Meta::L4Proto, REG)
                .cmp(Cmp::Eq, REG, &[protocol as u8])
                .payload(Base::Transport, 0, 1, REG)
                .cmp(Cmp::Eq, REG, &[kind])
                .verdict(Verdict::Jump(other));
        });
    }
}

/// Where what gets no answer ends.
const SILENT: &str = "silent";

/// Writes [`SUBNET_MAY`], and [`PEER_MAY`] if the policy about `peers` stands here. `tun` is the TUN device's
/// index in host order.
pub(super) fn write_others(
    tx: &mut Transaction<'_>,
    tables: &Tables,
    families: &[Sets; 2],
    tun: &[u8],
    peers: bool,
) {
    for chain in [PEER_MAY, SUBNET_MAY, SILENT] {
        tx.chain(chain);
    }
    // A peer is asked about what another peer sends, too.
    tx.rule(SILENT, |r| {
        r.meta(Meta::Iif, REG).cmp(Cmp::Eq, REG, tun);
        decide(r, FROM.drop_policy, Verdict::Drop);
    });
    tx.rule(SILENT, |r| decide(r, TO.drop_policy, Verdict::Drop));
    for (tables, sets) in tables.families().into_iter().zip(families) {
        let family = tables.family;
        let policy = &tables.policy;
        let look = Look {
            family,
            name: "",
            turned: true,
            then: (None, Verdict::Goto(SILENT)),
        };
        let load = |r: &mut Rule<'_, '_>| {
            load_destination(of_family(r, family), family, REG);
        };
        if peers {
            let name = judged::name("peer_may", tables);
            tx.chain(&name);
            super::peers::rules(tx, PEER_MAY, family, load, |r| {
                r.verdict(Verdict::Jump(&name));
            });
            let name_of_tree = judged::name("from_turned", tables);
            let look = Look {
                name: &name_of_tree,
                ..look
            };
            ask(tx, &look, &name, &tables.policy, &policy.from);
        }
        let name = judged::name("subnet_may", tables);
        tx.chain(&name);
        tx.rule(SUBNET_MAY, |r| {
            load(r);
            r.lookup(&sets.routes, REG).verdict(Verdict::Jump(&name));
        });
        let name_of_tree = judged::name("to_turned", tables);
        let look = Look {
            name: &name_of_tree,
            ..look
        };
        ask(tx, &look, &name, &tables.policy, &policy.to);
    }
}

/// Writes a tree, and has it asked; where there are no rules, all is let through.
fn ask(tx: &mut Transaction<'_>, look: &Look<'_>, chain: &str, policy: &Compiled, tree: &Tree) {
    if !tree.restricted {
        tx.rule(chain, |r| {
            r.verdict(look.then.1);
        });
        return;
    }
    look.write(tx, policy, tree);
    look.ask(tx, chain, tree);
}

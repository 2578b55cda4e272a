//! The end of what the policy does not let through.
//!
//! With [`Denied::Reject`] senders are told, but for the middle of a flow that connection tracking has
//! forgotten and that the other end may open: one more packet from there, and it goes on. So such a
//! packet is asked about once more, turned round, in the sets of the policy that hold what the other
//! side may open; see `router_ebpf::answer`, which does the same.

use router_ebpf::packet::{ACK, RST, SYN};

use super::policy::Compiled;
use super::ruleset::{
    Direction, FROM, Named, PolicySets, Sets, TCP_FLAGS, TO, decide, load_destination, load_source,
    of_family,
};
use super::span::Family;
use super::tables::FamilyTables;
use crate::control::Denied;
use crate::netlink::nft::{
    BROADCAST, Base, Cmp, MULTICAST, Meta, REG, Reject, Transaction, Verdict, WORD,
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

/// Writes [`PEER_MAY`] and [`SUBNET_MAY`]. `tun` is the TUN device's index in host order.
pub(super) fn write_others(
    tx: &mut Transaction<'_>,
    tables: [&FamilyTables; 2],
    families: &[Sets; 2],
    tun: &[u8],
) {
    tx.chain(PEER_MAY);
    tx.chain(SUBNET_MAY);
    for (tables, sets) in tables.into_iter().zip(families) {
        // A peer is asked about what another peer sends, too.
        let from_either = [(Some(tun), FROM.drop_policy), (None, TO.drop_policy)];
        let peer = Side {
            family: tables.family,
            sources: &sets.overlay,
            policy: &sets.from,
            counters: &from_either,
        };
        peer.write(tx, PEER_MAY, &tables.from);
        let subnet = Side {
            sources: &sets.routes,
            policy: &sets.to,
            counters: &[(None, FROM.drop_policy)],
            ..peer
        };
        subnet.write(tx, SUBNET_MAY, &tables.to);
    }
}

/// One side and family, as the other end of a packet.
#[derive(Clone, Copy)]
struct Side<'a> {
    family: Family,
    /// The set of all addresses of the side.
    sources: &'a str,
    policy: &'a PolicySets,
    /// What counts a dropped packet that came in by this device, or by any.
    counters: &'a [(Option<&'a [u8]>, Named)],
}

impl Side<'_> {
    /// Writes the rules of `chain`, and the chains and the map that they need.
    fn write(&self, tx: &mut Transaction<'_>, chain: &str, compiled: &Compiled) {
        let map = format!("{}_turned", self.policy.classes);
        let turned = |class: usize| format!("{map}_{class}");
        for class in 0..compiled.classes.len() {
            let chain = turned(class);
            tx.chain(&chain);
            self.drop_turned(tx, &chain, &self.policy.class(class), None);
        }
        let sources = compiled.sources.iter();
        let sources: Vec<_> = sources.map(|(s, class)| (*s, turned(*class))).collect();
        tx.chain_map(&map, self.family, &sources);
        self.drop_turned(tx, chain, &self.policy.any, Some(self.sources));
        tx.rule(chain, |r| {
            load_destination(of_family(r, self.family), self.family, REG).dispatch(&map, REG);
        });
    }

    /// Drops the packet when `set` holds its protocol, source and source port, and `destinations`
    /// holds its destination.
    fn drop_turned(
        &self,
        tx: &mut Transaction<'_>,
        chain: &str,
        set: &str,
        destinations: Option<&str>,
    ) {
        let family = self.family;
        let port = match family {
            Family::V4 => WORD + 2,
            Family::V6 => WORD + 5,
        };
        for (device, counter) in self.counters {
            tx.rule(chain, |r| {
                if let Some(device) = device {
                    r.meta(Meta::Iif, REG).cmp(Cmp::Eq, REG, device);
                }
                of_family(r, family);
                if let Some(destinations) = destinations {
                    load_destination(r, family, REG).lookup(destinations, REG);
                }
                load_source(r.meta(Meta::L4Proto, WORD), family, WORD + 1)
                    .payload(Base::Transport, 0, 2, port)
                    .lookup(set, WORD);
                decide(r, *counter, Verdict::Drop);
            });
        }
    }
}

//! The end of what the policy does not let through.

use router_ebpf::packet::RST;

use super::ruleset::{Direction, TCP_FLAGS, decide};
use crate::control::Denied;
use crate::netlink::nft::{
    BROADCAST, Base, Cmp, MULTICAST, Meta, REG, Reject, Transaction, Verdict,
};

/// RST each second and at once, as many as the eBPF programs send; of ICMP errors the kernel limits
/// its own (`net.ipv4.icmp_msgs_per_sec`).
const RESETS: u64 = 1000;
const RESETS_AT_ONCE: u32 = 50;

/// Writes the end of `chain`, where the policy has not let the packet through.
pub(super) fn write(tx: &mut Transaction<'_>, chain: &str, counters: &Direction, denied: Denied) {
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

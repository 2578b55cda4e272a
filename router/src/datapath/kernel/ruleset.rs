//! The nf_tables ruleset of a [`Spec`].
//!
//! | chain | on | does |
//! |---|---|---|
//! | `spoofed` | all that comes in | keeps what the eBPF programs hand over out of connection tracking; drops what is to or from link-local addresses, see `link_local`, and sources that are no peer's |
//! | `forward` | all that passes through | sends to `from_overlay` or `to_overlay`, the rest to `astray` |
//! | `output` | what the machine itself sends | sends to `astray` |
//! | `astray` | what leaves by another than the TUN device | drops what is for a peer, see `astray` |
//! | `from_overlay` | from a peer | clamps the MSS; known flows pass, and what the eBPF programs hand over; unless the router drains, new ones to routed CIDRs, or to a peer if the policy has let them |
//! | `errors` | ICMP errors of a peer about a flow | drops those about another peer's, see `errors` |
//! | `to_overlay` | to a peer | clamps the MSS; known flows pass, and what the eBPF programs hand over; unless the router drains, new ones from routed CIDRs, if the policy lets them |
//! | `permit` | all that comes from the TUN device, once there are rules about it | ends new flows that no rule allows, also those to the router itself; beside eBPF programs by the mark with which they have told |
//! | `peer_may`, `subnet_may` | what would be answered, and is no first packet of a flow | drops it silently where the other end may open the flow, see `denied` |
//! | `leave` | all that leaves | counts what other firewalls have let pass, too |
//! | `disowned` | TCP to the router itself | drops what connection tracking does not know and no socket takes, see `disowned` |
//! | `translate` | the first packet of a flow from a peer | translates its source where the route says so, see `translate` |
//!
//! What a peer asks for is judged before kube-proxy or Docker may translate it: the policy looks at
//! packets before destination NAT, and the routes at connection tracking's view of the flow's first
//! packet.
//!
//! Packets that connection tracking calls invalid belong to a flow that it has not seen from the
//! beginning: one that the eBPF programs or another router carries, or an ICMP error about such a
//! flow. Without rules they pass like others, unless their source would have to be translated; with
//! rules they are dropped, because only the first packet of a flow can be judged.
//!
//! The expressions are such that `nft list ruleset` can show them: nft 1.0.6 crashes on some keys
//! that the kernel takes, such as a concatenation with `ct original proto-dst`.

use super::astray::{self, ASTRAY};
use super::clamp;
use super::disowned;
use super::errors;
use super::judged::{self as policy, Told, handed_over, trees};
use super::link_local;
use super::peers;
use super::policy::Tree;
use super::span::Family;
use super::tables::{FamilyTables, Tables};
use super::translate;
use super::tree;
use crate::datapath::Spec;
use crate::netlink::nft::{
    Base, CT_ESTABLISHED_RELATED, CT_INVALID, CT_NEW, Cmp, Count, Ct, Hook, Meta, REG, Rule,
    Transaction, Verdict,
};

/// Where the flags stand in a TCP header (RFC 9293, section 3.1).
pub(super) const TCP_FLAGS: u32 = 13;

/// The types of ICMP errors: destination unreachable, time exceeded and parameter problem of
/// RFC 792, and all below 128 of RFC 4443.
const ICMP_ERRORS: [(libc::c_int, Cmp, u8); 4] = [
    (libc::IPPROTO_ICMP, Cmp::Eq, 3),
    (libc::IPPROTO_ICMP, Cmp::Eq, 11),
    (libc::IPPROTO_ICMP, Cmp::Eq, 12),
    (libc::IPPROTO_ICMPV6, Cmp::Lt, 128),
];

/// A counter: its name in the table, and program and verdict as the daemon reports them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Named {
    pub(super) name: &'static str,
    pub(super) program: &'static str,
    pub(super) verdict: &'static str,
}

pub(super) const fn named(
    name: &'static str,
    program: &'static str,
    verdict: &'static str,
) -> Named {
    Named {
        name,
        program,
        verdict,
    }
}

/// Every counter. The programs' names differ from those of the eBPF programs, because both
/// datapaths may be at work.
pub(super) const COUNTERS: &[Named] = &[
    FROM.forwarded,
    FROM.clamped,
    FROM.drop_policy,
    FROM.reject_policy,
    FROM.drop_draining,
    FROM.drop_not_routed,
    FROM.drop_invalid,
    DROP_SPOOFED,
    FROM.drop_link_local,
    MASQUERADED,
    TO.forwarded,
    TO.clamped,
    TO.drop_policy,
    TO.reject_policy,
    TO.drop_draining,
    TO.drop_not_routed,
    TO.drop_invalid,
    TO.drop_link_local,
    ASTRAY,
];

/// Counters of what our rules let through, and of what of it leaves: from peers, and to them.
pub(super) const PASSAGES: [[&str; 2]; 2] = [
    [FROM.entered, FROM.forwarded.name],
    [TO.entered, TO.forwarded.name],
];
/// The programs that report what does not.
pub(super) const LOST: [&str; 2] = [FROM.forwarded.program, TO.forwarded.program];

/// The chain of what peers send.
const SPOOFED: &str = "not_spoofed";

/// Counters of one direction.
pub(super) struct Direction {
    /// What our rules let through, by the counter's name.
    pub(super) entered: &'static str,
    forwarded: Named,
    pub(super) clamped: Named,
    pub(super) drop_policy: Named,
    pub(super) reject_policy: Named,
    drop_draining: Named,
    drop_not_routed: Named,
    pub(super) drop_invalid: Named,
    pub(super) drop_link_local: Named,
}

pub(super) const FROM: Direction = Direction {
    entered: "from_entered",
    forwarded: named("from_forwarded", "kernel_from_overlay", "forwarded"),
    clamped: named("from_clamped", "kernel_from_overlay", "clamped"),
    drop_policy: named("from_policy", "kernel_from_overlay", "drop_policy"),
    reject_policy: named("from_reject", "kernel_from_overlay", "reject_policy"),
    drop_draining: named("from_draining", "kernel_from_overlay", "drop_draining"),
    drop_not_routed: named("from_not_routed", "kernel_from_overlay", "drop_not_routed"),
    drop_invalid: named("from_invalid", "kernel_from_overlay", "drop_invalid"),
    drop_link_local: named("from_link_local", "kernel_from_overlay", "drop_link_local"),
};
pub(super) const DROP_SPOOFED: Named = named("from_spoofed", "kernel_from_overlay", "drop_spoofed");
/// Counts flows, not packets: only the first packet of a flow is asked about.
pub(super) const MASQUERADED: Named = named(
    "from_masqueraded",
    "kernel_from_overlay",
    "masqueraded_flow",
);
pub(super) const TO: Direction = Direction {
    entered: "to_entered",
    forwarded: named("to_forwarded", "kernel_to_overlay", "forwarded"),
    clamped: named("to_clamped", "kernel_to_overlay", "clamped"),
    drop_policy: named("to_policy", "kernel_to_overlay", "drop_policy"),
    reject_policy: named("to_reject", "kernel_to_overlay", "reject_policy"),
    drop_draining: named("to_draining", "kernel_to_overlay", "drop_draining"),
    drop_not_routed: named("to_not_routed", "kernel_to_overlay", "drop_not_routed"),
    drop_invalid: named("to_invalid", "kernel_to_overlay", "drop_invalid"),
    drop_link_local: named("to_link_local", "kernel_to_overlay", "drop_link_local"),
};

/// The sets that a packet's source, destination and flow are looked up in, by family; for those of peers see
/// [`peers`].
pub(super) struct Sets {
    pub(super) family: Family,
    /// Destinations that are routed.
    pub(super) routes: String,
    /// Routed destinations toward which sources are translated.
    pub(super) snat: String,
}

impl Sets {
    fn of(family: Family) -> Self {
        let name = |base: &str| match family {
            Family::V4 => format!("{base}4"),
            Family::V6 => format!("{base}6"),
        };
        Self {
            family,
            routes: name("routes"),
            snat: name("snat"),
        }
    }

    pub(super) fn original_source(&self) -> Ct {
        match self.family {
            Family::V4 => Ct::OriginalSource4,
            Family::V6 => Ct::OriginalSource6,
        }
    }

    pub(super) fn original_destination(&self) -> Ct {
        match self.family {
            Family::V4 => Ct::OriginalDestination4,
            Family::V6 => Ct::OriginalDestination6,
        }
    }
}

/// Writes the ruleset of `spec`, of which `tables` were made; each counter goes on from `before`.
/// Some kernels cannot look for sockets (`CONFIG_NFT_SOCKET`).
pub(super) fn write(
    tx: &mut Transaction<'_>,
    spec: &Spec,
    tables: &Tables,
    finds_sockets: bool,
    before: impl Fn(&str) -> Count,
) {
    let entered = PASSAGES.iter().map(|[entered, _]| *entered);
    for name in COUNTERS.iter().map(|counter| counter.name).chain(entered) {
        tx.counter(name, before(name));
    }
    let families = tables.families().map(|tables| {
        let sets = Sets::of(tables.family);
        write_sets(
            tx,
            tables,
            &sets,
            &trees(tables, spec.handed_over.is_some()),
        );
        sets
    });
    tree::write_protocols(tx);
    errors::write(tx, tables, &families);
    link_local::write(tx);
    for chain in [
        "clamp_from",
        "clamp_to",
        "from_overlay",
        "to_overlay",
        SPOOFED,
    ] {
        tx.chain(chain);
    }
    tx.base_chain("spoofed", Hook::Raw);
    tx.base_chain("forward", Hook::Forward);
    tx.base_chain("leave", Hook::Last);
    tx.chain("to_policy");
    if tables.restricts_peers() || spec.handed_over.is_some() {
        tx.base_chain("permit", Hook::BeforeTranslation);
    }
    tx.base_chain("translate", Hook::SourceNat);

    let tun = spec.tun.index.to_ne_bytes();
    astray::write(tx, spec, tables, &families, &tun);
    if let Some(told) = Told::of(spec) {
        tx.rule("spoofed", |r| {
            r.meta(Meta::Mark, REG)
                .and(REG, &told.both().to_ne_bytes())
                .cmp(Cmp::Eq, REG, &told.handed_over.to_ne_bytes())
                .no_track()
                .verdict(Verdict::Accept);
        });
    }
    tx.rule("spoofed", |r| {
        r.meta(Meta::Iif, REG).cmp(Cmp::Eq, REG, &tun);
        r.verdict(Verdict::Jump(SPOOFED));
    });
    link_local::drop_from_overlay(tx, SPOOFED);
    for sets in &families {
        let load = |r: &mut Rule<'_, '_>| {
            load_source(of_family(r, sets.family), sets.family, REG);
        };
        peers::rules(tx, SPOOFED, sets.family, load, |r| {
            r.verdict(Verdict::Return);
        });
    }
    tx.rule(SPOOFED, |r| decide(r, DROP_SPOOFED, Verdict::Drop));
    tx.rule("forward", |r| {
        r.meta(Meta::Iif, REG).cmp(Cmp::Eq, REG, &tun);
        r.verdict(Verdict::Jump("from_overlay"));
    });
    tx.rule("forward", |r| {
        r.meta(Meta::Oif, REG).cmp(Cmp::Eq, REG, &tun);
        r.verdict(Verdict::Jump("to_overlay"));
    });
    astray::guard(tx, "forward", &tun);
    if finds_sockets {
        disowned::write(tx, &tun, &spec.kernel_nat_ports());
    }
    // What the router tells of its groups leaves as if it had come by the device (`igmp_send_report`,
    // `mld_sendpack`).
    for family in [Family::V4, Family::V6] {
        tx.rule("leave", |r| {
            for interface in [Meta::Iif, Meta::Oif] {
                r.meta(interface, REG).cmp(Cmp::Eq, REG, &tun);
            }
            let r = of_family(r, family);
            match family {
                Family::V4 => r
                    .payload(Base::Network, 16, 4, REG)
                    .and(REG, &[0xf0, 0, 0, 0])
                    .cmp(Cmp::Eq, REG, &[0xe0, 0, 0, 0]),
                Family::V6 => r
                    .payload(Base::Network, 24, 1, REG)
                    .cmp(Cmp::Eq, REG, &[0xff]),
            };
            r.verdict(Verdict::Accept);
        });
    }
    tx.rule("leave", |r| {
        r.meta(Meta::Iif, REG).cmp(Cmp::Eq, REG, &tun);
        decide(r, FROM.forwarded, Verdict::Accept);
    });
    // What the router sends itself came by no interface.
    tx.rule("leave", |r| {
        r.meta(Meta::Oif, REG).cmp(Cmp::Eq, REG, &tun);
        r.meta(Meta::Iif, REG).cmp(Cmp::Ne, REG, &[0; 4]);
        decide(r, TO.forwarded, Verdict::Accept);
    });
    clamp::write(tx, "clamp_from", spec.mtu, FROM.clamped);
    clamp::write(tx, "clamp_to", spec.mtu, TO.clamped);
    write_from_overlay(tx, &families, &tun, spec, tables.restricts_peers());
    write_to_overlay(tx, &families, spec, tables.restricts_subnet());
    policy::write(tx, spec, tables, &families, &tun);
    translate::write(tx, &families, &tun, spec);
}

fn write_sets(tx: &mut Transaction<'_>, tables: &FamilyTables, sets: &Sets, trees: &[&Tree]) {
    let family = tables.family;
    tables.peers.write(tx);
    tx.address_set(&sets.routes, family, &tables.routes);
    tx.address_set(&sets.snat, family, &tables.snat);
    tree::write_sources(tx, family, &tables.policy, trees);
}

pub(super) fn load_source<'r, 'a, 'b>(
    rule: &'r mut Rule<'a, 'b>,
    family: Family,
    register: u32,
) -> &'r mut Rule<'a, 'b> {
    let (offset, len) = match family {
        Family::V4 => (12, 4),
        Family::V6 => (8, 16),
    };
    rule.payload(Base::Network, offset, len, register)
}

pub(super) fn load_destination<'r, 'a, 'b>(
    rule: &'r mut Rule<'a, 'b>,
    family: Family,
    register: u32,
) -> &'r mut Rule<'a, 'b> {
    let (offset, len) = match family {
        Family::V4 => (16, 4),
        Family::V6 => (24, 16),
    };
    rule.payload(Base::Network, offset, len, register)
}

pub(super) fn of_family<'r, 'a, 'b>(
    rule: &'r mut Rule<'a, 'b>,
    family: Family,
) -> &'r mut Rule<'a, 'b> {
    rule.meta(Meta::NfProto, REG)
        .cmp(Cmp::Eq, REG, &[family.protocol()])
}

/// Lets the packet through.
pub(super) fn pass(rule: &mut Rule<'_, '_>, direction: &Direction) {
    rule.count(direction.entered).verdict(Verdict::Accept);
}

pub(super) fn decide(rule: &mut Rule<'_, '_>, counter: Named, verdict: Verdict<'_>) {
    rule.count(counter.name).verdict(verdict);
}

pub(super) fn known<'r, 'a, 'b>(rule: &'r mut Rule<'a, 'b>) -> &'r mut Rule<'a, 'b> {
    rule.ct(Ct::State, REG)
        .any_bit(REG, &CT_ESTABLISHED_RELATED.to_ne_bytes())
}

/// The first packet of a flow, or one in the middle of a flow that connection tracking takes up there.
fn begins<'r, 'a, 'b>(rule: &'r mut Rule<'a, 'b>) -> &'r mut Rule<'a, 'b> {
    rule.ct(Ct::State, REG).any_bit(REG, &CT_NEW.to_ne_bytes())
}

fn invalid<'r, 'a, 'b>(rule: &'r mut Rule<'a, 'b>) -> &'r mut Rule<'a, 'b> {
    rule.ct(Ct::State, REG)
        .any_bit(REG, &CT_INVALID.to_ne_bytes())
}

fn write_from_overlay(
    tx: &mut Transaction<'_>,
    families: &[Sets; 2],
    tun: &[u8],
    spec: &Spec,
    restricted: bool,
) {
    let chain = "from_overlay";
    clamp::syn(tx, chain, "clamp_from");
    if restricted {
        // Else no flow from peer to peer is known.
        astray::guard(tx, chain, tun);
    }
    if let Some(told) = Told::of(spec) {
        tx.rule(chain, |r| pass(handed_over(r, told), &FROM));
    }
    errors::ask(tx, chain);
    tx.rule(chain, |r| pass(known(r), &FROM));
    if spec.draining {
        tx.rule(chain, |r| {
            decide(begins(r), FROM.drop_draining, Verdict::Drop)
        });
    }
    if restricted {
        tx.rule(chain, |r| {
            decide(invalid(r), FROM.drop_invalid, Verdict::Drop)
        });
    } else {
        for sets in families {
            for set in [&sets.snat, &sets.routes] {
                tx.rule(chain, |r| {
                    invalid(r).meta(Meta::Oif, REG).cmp(Cmp::Ne, REG, tun);
                    load_destination(of_family(r, sets.family), sets.family, REG).lookup(set, REG);
                    if *set == sets.snat {
                        decide(r, FROM.drop_invalid, Verdict::Drop);
                    } else {
                        pass(r, &FROM);
                    }
                });
            }
        }
    }
    // From peer to peer: only where the policy is asked, and has let it through.
    for sets in families.iter().filter(|_| restricted) {
        let load = |r: &mut Rule<'_, '_>| {
            r.meta(Meta::Oif, REG)
                .cmp(Cmp::Eq, REG, tun)
                .ct(sets.original_destination(), REG);
        };
        peers::rules(tx, chain, sets.family, load, |r| pass(r, &FROM));
    }
    for sets in families {
        tx.rule(chain, |r| {
            r.meta(Meta::Oif, REG)
                .cmp(Cmp::Ne, REG, tun)
                .ct(sets.original_destination(), REG)
                .lookup(&sets.routes, REG);
            pass(r, &FROM);
        });
    }
    tx.rule(chain, |r| decide(r, FROM.drop_not_routed, Verdict::Drop));
}

fn write_to_overlay(tx: &mut Transaction<'_>, families: &[Sets; 2], spec: &Spec, restricted: bool) {
    let chain = "to_overlay";
    link_local::drop_to_overlay(tx, chain);
    clamp::syn(tx, chain, "clamp_to");
    if let Some(told) = Told::of(spec) {
        tx.rule(chain, |r| pass(handed_over(r, told), &TO));
    }
    tx.rule(chain, |r| pass(known(r), &TO));
    if spec.draining {
        tx.rule(chain, |r| {
            decide(begins(r), TO.drop_draining, Verdict::Drop)
        });
    }
    if restricted {
        tx.rule(chain, |r| {
            decide(invalid(r), TO.drop_invalid, Verdict::Drop)
        });
    } else {
        for sets in families {
            tx.rule(chain, |r| {
                load_source(of_family(invalid(r), sets.family), sets.family, REG)
                    .lookup(&sets.routes, REG);
                pass(r, &TO);
            });
        }
        // Errors come from routers on the way, in whatever network they are.
        for (protocol, op, kind) in ICMP_ERRORS {
            tx.rule(chain, |r| {
                invalid(r)
                    .meta(Meta::L4Proto, REG)
                    .cmp(Cmp::Eq, REG, &[protocol as u8])
                    .payload(Base::Transport, 0, 1, REG)
                    .cmp(op, REG, &[kind]);
                pass(r, &TO);
            });
        }
        tx.rule(chain, |r| {
            decide(invalid(r), TO.drop_invalid, Verdict::Drop)
        });
    }
    for sets in families {
        tx.rule(chain, |r| {
            r.ct(sets.original_source(), REG).lookup(&sets.routes, REG);
            r.verdict(Verdict::Goto("to_policy"));
        });
    }
    tx.rule(chain, |r| decide(r, TO.drop_not_routed, Verdict::Drop));
}

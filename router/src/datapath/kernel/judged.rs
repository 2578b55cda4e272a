//! How new flows are judged: by what the eBPF programs have told of their first packets, or by the policy.
//!
//! The programs see all that peers send, so beside them nothing of the policy about peers stands here. What the
//! subnet side sends to peers may come in by a NIC without a program; about that the policy stands here too. It
//! does not grow with the peers.

use super::denied;
use super::policy::Tree;
use super::ruleset::{FROM, Sets, TO, decide, known};
use super::tables::{FamilyTables, Tables};
use super::tree::Look;
use crate::control::Denied;
use crate::datapath::Spec;
use crate::netlink::nft::{CT_UNTRACKED, Cmp, Ct, Meta, REG, Rule, Transaction, Verdict};

/// The bits of the mark by which programs tell, see [`crate::datapath::marks::Marks`].
#[derive(Clone, Copy)]
pub(super) struct Told {
    pub(super) handed_over: u32,
    pub(super) permitted: u32,
}

impl Told {
    /// `None`: there are no programs.
    pub(super) fn of(spec: &Spec) -> Option<Self> {
        Some(Self {
            handed_over: spec.handed_over?,
            permitted: spec.marks.permitted,
        })
    }

    pub(super) fn both(self) -> u32 {
        self.handed_over | self.permitted
    }
}

/// What the eBPF programs have judged already, of a flow of theirs: connection tracking has not seen
/// it begin, and has been kept from it. Who sets the bit later cannot pass for them.
pub(super) fn handed_over<'r, 'a, 'b>(
    rule: &'r mut Rule<'a, 'b>,
    told: Told,
) -> &'r mut Rule<'a, 'b> {
    rule.meta(Meta::Mark, REG)
        .any_bit(REG, &told.handed_over.to_ne_bytes())
        .ct(Ct::State, REG)
        .any_bit(REG, &CT_UNTRACKED.to_ne_bytes())
}

/// The trees that the ruleset asks.
pub(super) fn trees(tables: &FamilyTables, programs: bool) -> Vec<&Tree> {
    let policy = &tables.policy;
    if programs {
        vec![&policy.to]
    } else {
        vec![&policy.from, &policy.to]
    }
}

/// Goes on for what the programs have told so.
fn told_so<'r, 'a, 'b>(rule: &'r mut Rule<'a, 'b>, told: Told, bits: u32) -> &'r mut Rule<'a, 'b> {
    rule.meta(Meta::Mark, REG)
        .and(REG, &told.both().to_ne_bytes())
        .cmp(Cmp::Eq, REG, &bits.to_ne_bytes())
}

/// Writes the chains `permit` and `to_policy`. `tun` is the TUN device's index in host order.
pub(super) fn write(
    tx: &mut Transaction<'_>,
    spec: &Spec,
    tables: &Tables,
    families: &[Sets; 2],
    tun: &[u8],
) {
    let told = Told::of(spec);
    let denied = spec.policy.denied;
    let rejects = tables.restricted() && denied == Denied::Reject;
    if rejects {
        denied::write_others(tx, tables, families, tun, told.is_none());
    }
    let others: &[&str] = match told {
        _ if !rejects => &[],
        Some(_) => &[denied::SUBNET_MAY],
        None => &[denied::PEER_MAY, denied::SUBNET_MAY],
    };
    if tables.restricts_peers() || told.is_some() {
        tx.rule("permit", |r| {
            r.meta(Meta::Iif, REG).cmp(Cmp::Ne, REG, tun);
            r.verdict(Verdict::Accept);
        });
    }
    match told {
        Some(told) => write_told(tx, tables, told),
        None if tables.restricts_peers() => {
            tx.rule("permit", |r| {
                known(r).verdict(Verdict::Accept);
            });
            for tables in tables.families() {
                let policy = &tables.policy;
                let look = Look {
                    family: tables.family,
                    name: &name("from", tables),
                    turned: false,
                    then: (None, Verdict::Accept),
                };
                look.write(tx, policy, &policy.from);
                look.ask(tx, "permit", &policy.from);
            }
        }
        None => {}
    }
    if tables.restricts_peers() {
        denied::write(tx, "permit", &FROM, denied, others);
    }
    write_to(tx, tables, told);
    if tables.restricts_subnet() {
        let others = if told.is_none() && rejects {
            &others[..1]
        } else {
            &[]
        };
        denied::write(tx, "to_policy", &TO, denied, others);
    } else {
        tx.rule("to_policy", |r| {
            r.count(TO.entered).verdict(Verdict::Accept);
        });
    }
}

/// The beginning of the names of a tree's chains.
pub(super) fn name(base: &str, tables: &FamilyTables) -> String {
    match tables.family {
        crate::netlink::nft::Family::V4 => format!("{base}4"),
        crate::netlink::nft::Family::V6 => format!("{base}6"),
    }
}

/// What comes from peers, by what the programs tell. Their bits are taken off: nobody else is to see them.
fn write_told(tx: &mut Transaction<'_>, tables: &Tables, told: Told) {
    tx.rule("permit", |r| {
        handed_over(r, told).verdict(Verdict::Accept);
    });
    tx.rule("permit", |r| {
        known(r).unmark(told.both(), REG).verdict(Verdict::Accept);
    });
    tx.rule("permit", |r| {
        told_so(r, told, told.permitted).unmark(told.both(), REG);
        r.verdict(Verdict::Accept);
    });
    if tables.restricts_peers() {
        tx.rule("permit", |r| {
            decide(
                told_so(r, told, told.both()),
                FROM.drop_policy,
                Verdict::Drop,
            );
        });
    }
}

/// What the subnet side opens to peers.
fn write_to(tx: &mut Transaction<'_>, tables: &Tables, told: Option<Told>) {
    if !tables.restricts_subnet() {
        return;
    }
    if let Some(told) = told {
        tx.rule("to_policy", |r| {
            told_so(r, told, told.permitted)
                .unmark(told.both(), REG)
                .count(TO.entered)
                .verdict(Verdict::Accept);
        });
        tx.rule("to_policy", |r| {
            decide(told_so(r, told, told.both()), TO.drop_policy, Verdict::Drop);
        });
    }
    for tables in tables.families() {
        let policy = &tables.policy;
        let look = Look {
            family: tables.family,
            name: &name("to", tables),
            turned: false,
            then: (Some(TO.entered), Verdict::Accept),
        };
        look.write(tx, policy, &policy.to);
        look.ask(tx, "to_policy", &policy.to);
    }
}

//! Link-local addresses and the cloud's metadata service are never carried for the overlay: they are the
//! router's own neighbours, and one of them hands out the router's own credentials.
//!
//! What peers send there ends before connection tracking, destination NAT and the router's own sockets
//! see it. The router's own packets pass neither chain.

use ipnet::IpNet;
use router_ebpf::route::LINK_LOCAL;

use super::ruleset::{FROM, TO, decide, load_destination, load_source, of_family};
use super::span::{Family, union};
use crate::netlink::nft::{REG, Transaction, Verdict};

/// The set of such addresses.
const fn set(family: Family) -> &'static str {
    match family {
        Family::V4 => "link_local4",
        Family::V6 => "link_local6",
    }
}

/// Writes the sets.
pub(super) fn write(tx: &mut Transaction<'_>) {
    let nets: Vec<IpNet> = LINK_LOCAL
        .into_iter()
        .filter_map(|(address, length)| IpNet::new(address, length).ok())
        .collect();
    for family in Family::ALL {
        tx.address_set(set(family), family, &union(&nets, family));
    }
}

/// Has `chain`, which sees all that peers send, drop what is to or from such an address.
pub(super) fn drop_from_overlay(tx: &mut Transaction<'_>, chain: &str) {
    for family in Family::ALL {
        for load in [load_destination, load_source] {
            tx.rule(chain, |r| {
                load(of_family(r, family), family, REG).lookup(set(family), REG);
                decide(r, FROM.drop_link_local, Verdict::Drop);
            });
        }
    }
}

/// Has `chain`, which sees all that is forwarded to peers, drop what is from such an address.
pub(super) fn drop_to_overlay(tx: &mut Transaction<'_>, chain: &str) {
    for family in Family::ALL {
        tx.rule(chain, |r| {
            load_source(of_family(r, family), family, REG).lookup(set(family), REG);
            decide(r, TO.drop_link_local, Verdict::Drop);
        });
    }
}

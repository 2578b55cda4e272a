//! What outlives the daemon, however it ends but by a stop: a table of its own, which nobody owns.
//!
//! The ruleset goes with the daemon. With the last chain that translates and the last rule that asks
//! connection tracking the kernel would stop looking at packets of the flows that it knows: a server's
//! would be for the router itself, and refused (RST, "port unreachable"). One chain and one rule are
//! enough to have it go on, and they let nothing through: the TUN device is gone, and behind its routes
//! lie others that drop in silence.
//!
//! Its sets tell the next daemon which of these flows passed the tunnel, so that it ends those that
//! it does not carry, and whose external address is gone.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;

use super::ruleset::known;
use super::span::{Family, Span, address, holds, number, union};
use super::tables::{FamilyTables, Tables};
use crate::datapath::policy::NewFlow;
use crate::netlink::Error;
use crate::netlink::nft::{Hook, Nft, Verdict};

/// The name of the table that stays beside `table`.
pub(super) fn name(table: &str) -> String {
    format!("{table}_kept")
}

/// More addresses than this in a row are not ours: a router has a few.
const MOST_IN_A_ROW: usize = 1024;

/// What has been carried, by this daemon or the one before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Carried {
    v4: Ends,
    v6: Ends,
    /// What sources may have been translated to.
    external: BTreeSet<IpAddr>,
}

/// Between whom, in one family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ends {
    /// Addresses of peers, but for single ones.
    overlay: Vec<Span>,
    /// Single addresses of peers.
    hosts: BTreeSet<u128>,
    /// Routed addresses.
    routes: Vec<Span>,
}

impl Ends {
    fn of(tables: &FamilyTables) -> Self {
        Self {
            overlay: tables.peers.ranges().to_vec(),
            hosts: tables.peers.hosts().collect(),
            routes: tables.routes.clone(),
        }
    }

    fn is_peers(&self, address: u128) -> bool {
        self.hosts.contains(&address) || holds(&self.overlay, address)
    }
}

/// The names of the sets.
fn names(family: Family) -> [&'static str; 4] {
    match family {
        Family::V4 => ["overlay4", "hosts4", "routes4", "external4"],
        Family::V6 => ["overlay6", "hosts6", "routes6", "external6"],
    }
}

impl Carried {
    /// What is carried by `tables`, with these external addresses.
    pub(super) fn by(tables: &Tables, external: BTreeSet<IpAddr>) -> Self {
        let [v4, v6] = tables.families();
        Self {
            v4: Ends::of(v4),
            v6: Ends::of(v6),
            external,
        }
    }

    /// The same with other external addresses.
    pub(super) fn with(&self, external: BTreeSet<IpAddr>) -> Self {
        Self {
            external,
            ..self.clone()
        }
    }

    /// What the table says; nothing, when it is not there.
    pub(super) fn read(nft: &mut Nft, table: &str) -> Result<Self, Error> {
        if !nft.has(table)? {
            return Ok(Self::default());
        }
        let mut external = BTreeSet::new();
        let mut ends = |family| -> Result<Ends, Error> {
            let [overlay, hosts, routes, addresses] = names(family);
            for (first, last) in nft.address_set(table, addresses, family)? {
                let numbers = (first..=last).take(MOST_IN_A_ROW);
                external.extend(numbers.map(|number| address(number, family)));
            }
            Ok(Ends {
                overlay: nft.address_set(table, overlay, family)?,
                // Daemons of before had none.
                hosts: nft.host_set(table, hosts)?.into_iter().collect(),
                routes: nft.address_set(table, routes, family)?,
            })
        };
        Ok(Self {
            v4: ends(Family::V4)?,
            v6: ends(Family::V6)?,
            external,
        })
    }

    /// Makes the table say this, which says `before` unless somebody has removed it.
    pub(super) fn keep(&self, nft: &mut Nft, table: &str, before: &Self) -> Result<(), Error> {
        if self == before && nft.has(table)? {
            return Ok(());
        }
        nft.replace(table, false, |tx| {
            tx.base_chain("translated", Hook::SourceNat);
            tx.rule("translated", |r| {
                known(r).verdict(Verdict::Accept);
            });
            let external: Vec<IpNet> = self.external.iter().map(|a| IpNet::from(*a)).collect();
            for (family, ends) in [(Family::V4, &self.v4), (Family::V6, &self.v6)] {
                let [overlay, hosts, routes, addresses] = names(family);
                tx.host_set(hosts, family, ends.hosts.len());
                tx.add_hosts(hosts, family, ends.hosts.iter().copied());
                tx.address_set(addresses, family, &union(&external, family));
                tx.address_set(overlay, family, &ends.overlay);
                tx.address_set(routes, family, &ends.routes);
            }
        })
        .map(drop)
    }

    /// Has single addresses told, too, which are peers' now.
    pub(super) fn add(
        &mut self,
        nft: &mut Nft,
        table: &str,
        [v4, v6]: [BTreeSet<u128>; 2],
    ) -> Result<(), Error> {
        let known = [&mut self.v4, &mut self.v6];
        let families = [Family::V4, Family::V6];
        let mut come = Vec::new();
        for ((ends, hosts), family) in known.into_iter().zip([v4, v6]).zip(families) {
            let new: Vec<u128> = hosts.difference(&ends.hosts).copied().collect();
            ends.hosts.extend(&new);
            come.push((family, new));
        }
        if come.iter().all(|(_, new)| new.is_empty()) {
            return Ok(());
        }
        let added = nft.change(table, |tx| {
            for (family, new) in come {
                let [_, hosts, ..] = names(family);
                tx.add_hosts(hosts, family, new.into_iter());
            }
        });
        // The set may be full.
        added.or_else(|_| self.keep(nft, table, &Self::default()))
    }

    /// What sources may have been translated to.
    pub(super) fn external(&self) -> &BTreeSet<IpAddr> {
        &self.external
    }

    /// Whether the flows of both are between the same ends.
    pub(super) fn like(&self, other: &Self) -> bool {
        self.v4 == other.v4 && self.v6 == other.v6
    }

    /// Whether nothing has been carried.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the destination of `flow` was routed.
    pub(super) fn routed(&self, flow: &NewFlow) -> bool {
        holds(&self.of(flow).routes, number(flow.destination))
    }

    /// Whether a peer began `flow`, so that its source may have been translated.
    pub(super) fn is_peers(&self, flow: &NewFlow) -> bool {
        self.of(flow).is_peers(number(flow.source))
    }

    /// Whether `flow` passed the tunnel.
    pub(super) fn passed(&self, flow: &NewFlow) -> bool {
        let ends = self.of(flow);
        let (source, destination) = (number(flow.source), number(flow.destination));
        self.is_peers(flow) || (ends.is_peers(destination) && holds(&ends.routes, source))
    }

    /// Whether `flow` is between a peer and a routed network, whoever has begun it.
    pub(super) fn joins(&self, flow: &NewFlow) -> bool {
        let ends = self.of(flow);
        let (source, destination) = (number(flow.source), number(flow.destination));
        (ends.is_peers(source) && holds(&ends.routes, destination))
            || (ends.is_peers(destination) && holds(&ends.routes, source))
    }

    fn of(&self, flow: &NewFlow) -> &Ends {
        if flow.source.is_ipv4() {
            &self.v4
        } else {
            &self.v6
        }
    }
}

//! Whose flows are counted together, and who has as many as may be.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use router_ebpf::abi::{Account, Address};

use super::flows::{Store, in_batches};
use super::listing::end;
use super::sweep::Tally;
use crate::datapath::limits::Limits;
use crate::datapath::nets::Nets;

/// Who has opened flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Opener {
    /// The peer with a number of [`crate::datapath::Spec::overlay`].
    Peer(u32),
    /// A host of the subnet side.
    Host(IpAddr),
    /// All hosts of the subnet side together.
    Subnet,
}

/// One that has as many flows as it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct AtLimit {
    /// Who.
    pub opener: Opener,
    /// Whether of IPv4; else of IPv6.
    pub ipv4: bool,
    /// The limit.
    pub limit: u32,
}

impl AtLimit {
    fn new(account: &Account, limit: u32) -> Self {
        let [a, b, c, d, ..] = account.id;
        let address = Address {
            family: [account.family, 0, 0, 0],
            octets: account.id,
        };
        Self {
            opener: match account.kind {
                Account::PEER => Opener::Peer(u32::from_ne_bytes([a, b, c, d])),
                Account::HOST => Opener::Host(end(&address, [0; 2]).ip()),
                _ => Opener::Subnet,
            },
            ipv4: account.family == 4,
            limit,
        }
    }
}

/// The flows of each account that `tally` has found. `peers` are the peers' numbers by allowed IP, as the
/// programs have them.
pub(super) fn accounts(peers: &Nets<u32>, tally: &Tally) -> HashMap<Account, u32> {
    let mut accounts = HashMap::new();
    for (address, flows) in &tally.sources {
        // What is no peer's any more ends soon.
        if let Some((_, number)) = peers.around(&host(address)).next() {
            *accounts.entry(Account::peer(*number, address)).or_default() += flows;
        }
    }
    for (address, flows) in &tally.hosts {
        accounts.insert(Account::host(address), *flows);
        *accounts.entry(Account::subnet(address)).or_default() += flows;
    }
    accounts
}

/// The CIDR of one address.
pub(super) fn host(address: &Address) -> IpNet {
    end(address, [0; 2]).ip().into()
}

/// Sets the number of flows of each account to what was counted, and tells who was at a limit. The programs
/// count up meanwhile: what is lost thereby, the next pass finds.
pub(super) fn recount(
    store: &mut impl Store<Account, u32>,
    counted: &HashMap<Account, u32>,
    limits: &Limits,
) -> io::Result<Vec<AtLimit>> {
    let mut wrong = BTreeMap::new();
    let (mut known, mut full) = (HashSet::new(), BTreeSet::new());
    in_batches(store, |_, entries| {
        for (account, count) in entries {
            known.insert(*account);
            let real = counted.get(account).copied().unwrap_or(0);
            if real != *count || real == 0 {
                wrong.insert(*account, real);
            }
            let limit = match account.kind {
                Account::SUBNET => limits.flows_from_subnet(),
                _ => limits.flows_per_source,
            };
            if real.max(*count) >= limit {
                full.insert(AtLimit::new(account, limit));
            }
        }
        Ok(())
    })?;
    for (account, real) in &wrong {
        if *real == 0 {
            store.remove(account)?;
        } else {
            store.put(account, real)?;
        }
    }
    // A daemon before this one has opened them, or the programs had no room for the account.
    for (account, real) in counted
        .iter()
        .filter(|(account, _)| !known.contains(account))
    {
        // What there is no room for has no limit of its own.
        let _ = store.put(account, real);
    }
    Ok(full.into_iter().collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::flows::memory::Memory;
    use super::*;

    fn address(text: &str) -> Address {
        super::super::tables::address(text.parse().unwrap())
    }

    #[test]
    fn flows_are_counted_by_peer_and_by_host() {
        let nets = [("100.64.0.0/24", 1), ("100.64.0.7/32", 2), ("fd7a::/64", 1)];
        let nets = nets.into_iter().map(|(net, n)| (net.parse().unwrap(), n));
        let peers: Nets<u32> = nets.collect();
        let tally = Tally {
            sources: [
                (address("100.64.0.2"), 3),
                (address("100.64.0.3"), 4),
                (address("100.64.0.7"), 5),
                (address("fd7a::2"), 6),
                (address("192.0.2.1"), 7),
            ]
            .into(),
            hosts: [(address("10.0.0.1"), 8), (address("10.0.0.2"), 9)].into(),
            ..Tally::default()
        };
        let (v4, v6) = (address("0.0.0.0"), address("::"));
        let wanted = [
            (Account::peer(1, &v4), 7),
            (Account::peer(2, &v4), 5),
            (Account::peer(1, &v6), 6),
            (Account::host(&address("10.0.0.1")), 8),
            (Account::host(&address("10.0.0.2")), 9),
            (Account::subnet(&v4), 17),
        ];
        let counted = accounts(&peers, &tally);
        assert_eq!(counted, wanted.into());

        let limits = Limits {
            flows: 34,
            flows_per_source: 7,
            ..Limits::default()
        };
        // One is gone, one was counted too high, and the others were not known.
        let before = [
            (Account::peer(3, &v4), 1),
            (Account::peer(2, &v4), 7),
            (Account::peer(1, &v4), 7),
            (Account::subnet(&v4), 17),
        ];
        let mut store = Memory::new(before.into());
        let full = recount(&mut store, &counted, &limits).unwrap();
        assert_eq!(store.entries, wanted.into());
        let at_limit = |opener, limit| AtLimit {
            opener,
            ipv4: true,
            limit,
        };
        let wanted = [
            at_limit(Opener::Peer(1), 7),
            at_limit(Opener::Peer(2), 7),
            at_limit(Opener::Subnet, 17),
        ];
        assert_eq!(full, wanted);
    }
}

//! Whose flows are counted together, and who has as many as may be.

use std::collections::{BTreeSet, HashMap};
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

/// The flows of each account, as the programs have counted them.
pub(super) fn present(store: &mut impl Store<Account, u32>) -> io::Result<HashMap<Account, u32>> {
    let mut present = HashMap::new();
    in_batches(store, |_, entries| {
        present.extend(entries.iter().copied());
        Ok(())
    })?;
    Ok(present)
}

/// What the count of an account becomes after a pass that has found `found` flows, where the programs' count
/// was `before` when it began and is `now`. What they have opened meanwhile the pass may have missed.
fn corrected(found: u32, before: u32, now: u32) -> u32 {
    let opened = now.saturating_sub(before);
    now.min(found.saturating_add(opened)).max(found)
}

/// Corrects the number of flows of each account by what a pass has `counted` since it was `before`, and tells
/// who was at a limit.
pub(super) fn recount(
    store: &mut impl Store<Account, u32>,
    before: &HashMap<Account, u32>,
    counted: &HashMap<Account, u32>,
    limits: &Limits,
) -> io::Result<Vec<AtLimit>> {
    let of = |counts: &HashMap<Account, u32>, account| counts.get(account).copied().unwrap_or(0);
    let after = |account, now| corrected(of(counted, account), of(before, account), now);
    let present = present(store)?;
    let mut full = BTreeSet::new();
    for (account, count) in &present {
        let real = after(account, *count);
        if real != *count || real == 0 {
            // The programs go on counting: as little time as may be between reading and writing.
            let now = store.get(account)?.unwrap_or(0);
            match after(account, now) {
                0 => store.remove(account)?,
                real if real != now => store.put(account, &real)?,
                _ => {}
            }
        }
        let limit = match account.kind {
            Account::SUBNET => limits.flows_from_subnet(),
            _ => limits.flows_per_source,
        };
        if real.max(*count) >= limit {
            full.insert(AtLimit::new(account, limit));
        }
    }
    // A daemon before this one has opened them, or the programs had no room for the account.
    for (account, found) in counted {
        if !present.contains_key(account) {
            // What there is no room for has no limit of its own.
            let _ = store.put(account, found);
        }
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
        let before = present(&mut store).unwrap();
        let full = recount(&mut store, &before, &counted, &limits).unwrap();
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

    #[test]
    fn flows_that_begin_during_a_pass_stay_counted() {
        let account = Account::peer(1, &address("0.0.0.0"));
        // Found, counted before and after, and what that makes.
        let cases = [
            // Nothing has changed; one has ended; a count of two CPUs at a time was lost.
            (5, 5, 5, 5),
            (4, 5, 5, 4),
            (6, 5, 5, 6),
            // Five began: the pass has found none of them, some, or all.
            (5, 5, 10, 10),
            (7, 5, 10, 10),
            (10, 5, 10, 10),
            // Two ended besides.
            (3, 5, 10, 8),
            // All are over but one that began.
            (0, 5, 6, 1),
            (0, 5, 5, 0),
        ];
        for (found, before, now, wanted) in cases {
            let mut store = Memory::new([(account, now)].into());
            let (before, counted) = ([(account, before)].into(), [(account, found)].into());
            recount(&mut store, &before, &counted, &Limits::default()).unwrap();
            let count = store.entries.get(&account).copied().unwrap_or(0);
            assert_eq!(count, wanted, "{found} found, {now} counted");
        }
    }
}

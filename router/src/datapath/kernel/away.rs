//! External addresses that the router has no more.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// How long translated flows keep an external address that is gone, as those of the programs do: a
/// NIC that is down for a moment loses its IPv6 addresses.
const PATIENCE: Duration = Duration::from_secs(30);

/// Addresses that are gone, and when that was noticed.
#[derive(Debug, Default)]
pub(super) struct Away(BTreeMap<IpAddr, Instant>);

impl Away {
    /// Takes in which of the addresses that were `known` are `present`.
    pub(super) fn look(
        &mut self,
        known: &BTreeSet<IpAddr>,
        present: &BTreeSet<IpAddr>,
        now: Instant,
    ) {
        self.0.retain(|address, _| !present.contains(address));
        for address in known.difference(present) {
            self.0.entry(*address).or_insert(now);
        }
    }

    /// All of them.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.0.keys().copied()
    }

    /// When the next one is gone for good.
    pub(super) fn due(&self) -> Option<Instant> {
        self.0.values().min().map(|since| *since + PATIENCE)
    }

    /// Those that are gone for good.
    pub(super) fn for_good(&self, now: Instant) -> BTreeSet<IpAddr> {
        let gone = self.0.iter().filter(|(_, since)| **since + PATIENCE <= now);
        gone.map(|(address, _)| *address).collect()
    }

    /// Forgets addresses, whose flows have been ended.
    pub(super) fn forget(&mut self, gone: &BTreeSet<IpAddr>) {
        self.0.retain(|address, _| !gone.contains(address));
    }

    /// Has the patience begin anew, for flows could not be ended.
    pub(super) fn postpone(&mut self, now: Instant) {
        self.0.values_mut().for_each(|since| *since = now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_may_come_back_in_time() {
        let all: BTreeSet<IpAddr> = (1..=3).map(|n| IpAddr::from([10, 0, 0, n])).collect();
        let only = |n: u8| BTreeSet::from([IpAddr::from([10, 0, 0, n])]);
        let (mut away, start) = (Away::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        away.look(&all, &all, start);
        assert_eq!(away.due(), None);
        away.look(&all, &(&all - &only(3)), start);
        away.look(&all, &only(1), after(10));
        assert_eq!(away.due(), Some(after(30)));
        assert_eq!(away.for_good(after(29)), BTreeSet::new());
        assert_eq!(away.for_good(after(30)), only(3));
        // The second one is back; the third is gone longer than was noticed last.
        away.look(&all, &(&all - &only(3)), after(39));
        assert_eq!(away.for_good(after(40)), only(3));
        away.forget(&only(3));
        assert_eq!((away.due(), away.addresses().count()), (None, 0));
        away.look(&all, &only(1), after(50));
        away.postpone(after(60));
        assert_eq!(away.due(), Some(after(90)));
    }
}

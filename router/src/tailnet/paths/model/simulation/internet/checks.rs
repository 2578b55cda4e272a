//! What a schedule must end with.

use std::time::Duration;

use super::super::nat::Depends;
use super::super::parts::REGIONS;
use super::{Internet, Kind};
use crate::engine::{Path, RelayId};

impl Internet {
    pub(in super::super) fn end_trouble(&mut self) {
        self.trouble = false;
        self.loss = 0;
        for region in 1..=REGIONS {
            if !self.alive[&region] {
                self.set_relay(region, true);
            }
        }
    }

    pub(in super::super) fn end_traffic(&mut self) {
        self.traffic = false;
    }

    /// What two such nodes can have.
    pub(in super::super) fn best(&self) -> Kind {
        let [a, b] = [&self.nodes[0], &self.nodes[1]];
        if a.blocked || b.blocked {
            return Kind::Relay;
        }
        let without = match self.server {
            Some(_) => Kind::PeerRelay,
            None => Kind::Relay,
        };
        let both_v6 = a.v6.is_some() && b.v6.is_some();
        let near = a.nat.is_some() && a.nat == b.nat;
        let kinds = [a, b].map(|node| match node.nat.map(|nat| &self.nats[nat]) {
            Some(nat) => (nat.mapping, nat.filter),
            None => (Depends::Nothing, Depends::Nothing),
        });
        // Whoever shows each port another one is let in only where ports do not count.
        let passes = |from: (Depends, Depends), to: (Depends, Depends)| {
            from.0 == Depends::Nothing
                || (to.0 == Depends::Nothing && to.1 < Depends::AddressAndPort)
        };
        if both_v6 || near || (passes(kinds[0], kinds[1]) && passes(kinds[1], kinds[0])) {
            Kind::Direct
        } else {
            without
        }
    }

    pub(in super::super) fn assert_way(&self, kind: Kind) {
        for (at, node) in self.nodes.iter().enumerate() {
            let found = match node.ways.map(|ways| ways.path) {
                Some(Path::Udp(_)) => Some(Kind::Direct),
                Some(Path::PeerRelay(..)) => Some(Kind::PeerRelay),
                Some(Path::Relay(RelayId(region))) => {
                    assert!(self.alive[&region]);
                    Some(Kind::Relay)
                }
                None => None,
            };
            let report = node.paths.report(self.now);
            let nats: Vec<_> = self
                .nats
                .iter()
                .map(|nat| (nat.mapping, nat.filter))
                .collect();
            assert_eq!(
                found,
                Some(kind),
                "node {at} of {nats:?}, loss {}: {report:?}",
                self.loss
            );
        }
    }

    /// The way by UDP dies, and nothing says so.
    pub(in super::super) fn block_silently(&mut self) {
        self.nodes[0].blocked = true;
        self.nodes
            .iter_mut()
            .for_each(|node| node.gap = Duration::ZERO);
    }

    /// The longest time without a packet at either end.
    pub(in super::super) fn gap(&self) -> Duration {
        let gaps = self.nodes.iter().map(|node| node.gap);
        gaps.max().unwrap_or_default()
    }

    /// Packets that a peer relay has carried.
    pub(in super::super) fn carried_by_peer_relay(&self) -> u64 {
        self.server.as_ref().map_or(0, |server| server.carried)
    }

    pub(in super::super) fn assert_traffic_arrives(&mut self) {
        let before: Vec<_> = self.nodes.iter().map(|node| node.arrived).collect();
        self.run(Duration::from_secs(10));
        for (node, before) in self.nodes.iter().zip(before) {
            assert!(
                node.arrived >= before + 8,
                "{} of 10",
                node.arrived - before
            );
        }
    }

    /// Without traffic nothing is asked of peers, and little of servers.
    pub(in super::super) fn assert_quiet(&mut self, time: Duration) {
        let before: Vec<_> = self.nodes.iter().map(|node| node.disco_sent).collect();
        self.run(time);
        for (node, before) in self.nodes.iter().zip(before) {
            assert_eq!(node.disco_sent, before);
        }
    }
}

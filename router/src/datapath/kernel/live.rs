//! Which of the flows that the kernel carries are still in use.

use std::collections::HashMap;

use super::{Kernel, error, lock};
use crate::datapath::{Connections, Error, QUIET};
use crate::netlink::nft::Tracked;

/// TCP's states of connection tracking in which a side may still send: established, and one end closed
/// (`include/uapi/linux/netfilter/nf_conntrack_tcp.h`).
const OPEN: std::ops::RangeInclusive<u8> = 3..=5;

/// For how many seconds flows lived on when they were seen last after a packet, by number.
#[derive(Debug, Default)]
pub(super) struct Seen(HashMap<u32, u32>);

impl Seen {
    /// Whether `flow` is in use. The kernel does not tell when it had its last packet, but how long it lives on: each
    /// packet lengthens that.
    fn is_live(&mut self, flow: &Tracked, connections: Connections) -> bool {
        let longest = self.0.entry(flow.id).or_insert(flow.seconds_left);
        *longest = flow.seconds_left.max(*longest);
        let busy = u64::from(*longest - flow.seconds_left) < QUIET.as_secs();
        match flow.tcp_state {
            Some(state) => OPEN.contains(&state) && (busy || connections == Connections::Open),
            None => busy,
        }
    }
}

impl Kernel {
    /// How many of the flows between peers and routed networks are in use: TCP connections, and what else had a
    /// packet in the last [`QUIET`]. What is asked first is taken for one that had.
    pub fn live_flows(&mut self, connections: Connections) -> Result<u64, Error> {
        let Some(nft) = &self.nft else {
            return Ok(0);
        };
        let mut before = std::mem::take(&mut self.seen);
        let mut live = 0;
        let seen = &mut self.seen;
        let carried = &self.carried;
        let listed = lock(nft).flows(|flow| {
            if carried.joins(&flow.first) {
                if let Some(longest) = before.0.remove(&flow.id) {
                    seen.0.insert(flow.id, longest);
                }
                live += u64::from(seen.is_live(flow, connections));
            }
        });
        listed.map(|()| live).map_err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::policy::NewFlow;

    fn flow(tcp_state: Option<u8>, seconds_left: u32) -> Tracked {
        let any = std::net::Ipv4Addr::LOCALHOST.into();
        Tracked {
            first: NewFlow {
                source: any,
                destination: any,
                protocol: 17,
                port: 53,
            },
            external: any,
            id: 7,
            tcp_state,
            seconds_left,
        }
    }

    #[test]
    fn connections_are_in_use_until_both_ends_have_closed_them() {
        let live = |state| Seen::default().is_live(&flow(Some(state), 1), Connections::Open);
        assert_eq!(
            [1, 2, 3, 4, 5, 6, 7, 8].map(live),
            [false, false, true, true, true, false, false, false]
        );
    }

    #[test]
    fn other_flows_are_in_use_until_they_have_been_quiet() {
        let mut seen = Seen::default();
        let mut live = |left| seen.is_live(&flow(None, left), Connections::Open);
        assert!(live(25) && live(16));
        assert!(!live(15));
        // A packet, by which the kernel takes it for a stream.
        assert!(live(120) && live(111));
        assert!(!live(110) && !live(5));
        assert!(live(120));
    }

    #[test]
    fn an_idle_connection_is_in_use_unless_it_may_have_moved() {
        for (connections, idle) in [(Connections::Open, true), (Connections::Busy, false)] {
            let mut seen = Seen::default();
            let mut live = |left| seen.is_live(&flow(Some(3), left), connections);
            assert!(live(432_000) && live(431_991));
            assert_eq!(live(431_990), idle);
            assert!(live(432_000));
        }
    }
}

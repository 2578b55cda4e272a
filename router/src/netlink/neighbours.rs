//! Neighbours: which changes matter, and keeping those fresh that only eBPF programs use.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Error, Netlink};

/// Neighbours whose hardware addresses are remembered: the kernel keeps 1,024 (`gc_thresh3`), and a
/// hundred times as many where somebody has raised that.
const MOST: usize = 1 << 18;

/// The hardware addresses that were last heard of.
///
/// The kernel tells each step of a neighbour's life, several a minute for one in use, and what
/// depends on neighbours is costly to renew. Only another hardware address, or none, is news.
#[derive(Debug, Default)]
pub(super) struct Known(HashMap<(u32, IpAddr), Vec<u8>>);

impl Known {
    /// Takes a message in, and tells whether it is news.
    pub(super) fn learn(&mut self, message: &NeighbourMessage, deleted: bool) -> bool {
        let Some(key) = address(message).map(|address| (message.header.ifindex, address)) else {
            return false;
        };
        let hardware = hardware(message).filter(|_| {
            !deleted
                && !matches!(
                    message.header.state,
                    NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::None
                )
        });
        match hardware {
            None => self.0.remove(&key).is_some(),
            Some(hardware) => {
                if self.0.get(&key).is_some_and(|known| *known == hardware) {
                    return false;
                }
                if self.0.len() >= MOST {
                    // Any one. Without all of them each step of each neighbour would be news again.
                    let one = self.0.keys().next().copied();
                    one.map(|one| self.0.remove(&one));
                }
                self.0.insert(key, hardware.to_owned());
                true
            }
        }
    }
}

impl Netlink {
    /// All neighbours.
    pub(super) async fn neighbours(&self) -> Result<Vec<NeighbourMessage>, Error> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let answers = self.request(request, NLM_F_DUMP, "list neighbours").await?;
        let messages = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewNeighbour(message) => Some(message),
            _ => None,
        });
        Ok(messages.collect())
    }

    /// Has the kernel look whether the neighbours with these hardware addresses (by interface
    /// index) are still there, where it is in doubt. It does so by itself for neighbours that its
    /// own packets go to, and does not see those that programs redirect.
    pub async fn probe_neighbours(&self, used: &HashSet<(u32, [u8; 6])>) -> Result<(), Error> {
        if used.is_empty() {
            return Ok(());
        }
        for message in self.neighbours().await? {
            let used = hardware(&message)
                .and_then(|bytes| bytes.try_into().ok())
                .is_some_and(|hardware| used.contains(&(message.header.ifindex, hardware)));
            if !used || message.header.state != NeighbourState::Stale {
                continue;
            }
            let Some(address) = address(&message) else {
                continue;
            };
            let mut probe = NeighbourMessage::default();
            probe.header.family = message.header.family;
            probe.header.ifindex = message.header.ifindex;
            probe.header.flags = NeighbourFlags::Use;
            probe.attributes = vec![NeighbourAttribute::Destination(address.into())];
            let doing = format!("probe neighbour {address}");
            let request = RouteNetlinkMessage::NewNeighbour(probe);
            match self.request(request, NLM_F_ACK, &doing).await {
                // It has gone meanwhile.
                Err(error) if error.errno() == libc::ENOENT => {}
                outcome => drop(outcome?),
            }
        }
        Ok(())
    }
}

fn address(message: &NeighbourMessage) -> Option<IpAddr> {
    if !matches!(
        message.header.family,
        AddressFamily::Inet | AddressFamily::Inet6
    ) {
        return None;
    }
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some((*v4).into()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some((*v6).into()),
            _ => None,
        })
}

fn hardware(message: &NeighbourMessage) -> Option<&[u8]> {
    message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => Some(&**bytes),
            _ => None,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(host: u8, hardware: Option<u8>, state: NeighbourState) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = 3;
        message.header.state = state;
        let address = IpAddr::from([10, 0, 0, host]);
        message.attributes = vec![NeighbourAttribute::Destination(address.into())];
        let hardware = hardware.map(|last| NeighbourAttribute::LinkLayerAddress(vec![2, last]));
        message.attributes.extend(hardware);
        message
    }

    #[test]
    fn only_another_hardware_address_or_none_is_news() {
        use NeighbourState::{Delay, Failed, Incomplete, Permanent, Reachable, Stale};
        let mut known = Known::default();
        for (news, host, hardware, state) in [
            (false, 1, None, Incomplete),
            (true, 1, Some(1), Reachable),
            (false, 1, Some(1), Stale),
            (false, 1, Some(1), Delay),
            (true, 1, Some(2), Stale),
            (true, 1, None, Failed),
            (false, 1, None, Incomplete),
            (true, 1, Some(2), Reachable),
            (true, 1, Some(2), Failed),
            (true, 2, Some(9), Permanent),
        ] {
            let message = message(host, hardware, state);
            assert_eq!(known.learn(&message, false), news, "{message:?}");
        }
        let gone = message(2, Some(9), Permanent);
        assert!(known.learn(&gone, true));
        assert!(!known.learn(&gone, true));
        // A foreign family, such as a bridge's forwarding table.
        let mut bridge = message(3, Some(3), Reachable);
        bridge.header.family = AddressFamily::Bridge;
        assert!(!known.learn(&bridge, false));
        // As many as a large network has are remembered all at once.
        let mut learn = |host, other| {
            let mut message = message(host, Some(1), Reachable);
            message.header.ifindex = other;
            known.learn(&message, false)
        };
        let all = (0..=255).flat_map(|host| (100..132).map(move |other| (host, other)));
        for (host, other) in all.clone() {
            assert!(learn(host, other), "{host} {other} is new");
        }
        for (host, other) in all {
            assert!(!learn(host, other), "{host} {other} is known");
        }
    }
}

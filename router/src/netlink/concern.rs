//! Which routes concern this router.

use std::collections::BTreeSet;

use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};

use super::routes::ip;

/// The routes that may change where packets of this router go: those of its own table, default
/// routes, and those for any address out of some networks. A machine beside it may learn 100,000 others
/// and change them all day.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Concern {
    table: u32,
    fixed: BTreeSet<IpNet>,
    /// Those that come and go one by one.
    overlay: BTreeSet<IpNet>,
}

impl Concern {
    /// Routes of `table`, and those that overlap one of `fixed` or of `overlay`, all without host bits.
    pub fn new(
        table: u32,
        fixed: impl IntoIterator<Item = IpNet>,
        overlay: impl IntoIterator<Item = IpNet>,
    ) -> Self {
        Self {
            table,
            fixed: fixed.into_iter().collect(),
            overlay: overlay.into_iter().collect(),
        }
    }

    /// Has a network among those of the overlay, or not.
    pub(super) fn change(&mut self, net: IpNet, is_there: bool) {
        if is_there {
            self.overlay.insert(net);
        } else {
            self.overlay.remove(&net);
        }
    }

    /// Whether a route that came, went or changed is one of them.
    pub(super) fn includes(&self, message: &RouteMessage) -> bool {
        let mut table = u32::from(message.header.table);
        let mut destination = None;
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Table(found) => table = *found,
                RouteAttribute::Destination(found) => destination = ip(found),
                _ => {}
            }
        }
        if table == self.table || message.header.destination_prefix_length == 0 {
            return true;
        }
        let of_ip = matches!(
            message.header.address_family,
            AddressFamily::Inet | AddressFamily::Inet6
        );
        let net = destination
            .and_then(|to| IpNet::new(to, message.header.destination_prefix_length).ok());
        // What cannot be read may be anything.
        of_ip && net.is_none_or(|net| self.overlaps(&net))
    }

    fn overlaps(&self, net: &IpNet) -> bool {
        // Sorted, a network stands before all that it holds.
        let within = |nets: &BTreeSet<IpNet>| {
            let next = nets.range(*net..).next();
            next.is_some_and(|next| net.contains(next))
        };
        let mut outer = (0..=net.prefix_len())
            .filter_map(|length| Some(IpNet::new(net.addr(), length).ok()?.trunc()));
        within(&self.fixed)
            || within(&self.overlay)
            || outer.any(|outer| self.fixed.contains(&outer) || self.overlay.contains(&outer))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;

    fn message(table: u32, net: &str) -> RouteMessage {
        let net: IpNet = net.parse().unwrap();
        let mut message = RouteMessage::default();
        message.header.address_family = match net {
            IpNet::V4(_) => AddressFamily::Inet,
            IpNet::V6(_) => AddressFamily::Inet6,
        };
        message.header.destination_prefix_length = net.prefix_len();
        message.attributes = vec![RouteAttribute::Table(table)];
        if net.prefix_len() > 0 {
            let to = RouteAttribute::Destination(net.addr().into());
            message.attributes.push(to);
        }
        message
    }

    #[test]
    fn only_routes_that_may_lead_our_packets_concern_us() {
        let nets = ["10.20.0.0/16", "100.64.0.2/32", "fd7a::/64"];
        let [routed, overlay @ ..] = nets.map(|net| net.parse().unwrap());
        let concern = Concern::new(51820, [routed], overlay);
        for (concerned, table, net) in [
            (true, 254, "10.20.0.0/16"),
            (true, 254, "10.20.7.0/24"),
            (true, 254, "10.0.0.0/8"),
            (true, 77, "10.20.9.9/32"),
            (true, 254, "100.64.0.0/10"),
            (true, 254, "fd7a::/48"),
            (true, 254, "0.0.0.0/0"),
            (true, 254, "::/0"),
            (true, 51820, "192.0.2.0/24"),
            (false, 254, "192.0.2.0/24"),
            (false, 254, "10.21.0.0/16"),
            (false, 254, "10.19.255.255/32"),
            (false, 254, "100.64.0.3/32"),
            (false, 254, "fd7a:0:0:1::/64"),
            // The same number in the other family.
            (false, 254, "::a14:0/128"),
        ] {
            assert_eq!(concern.includes(&message(table, net)), concerned, "{net}");
        }
        assert!(!Concern::new(51820, [], []).includes(&message(254, "10.0.0.0/8")));
    }

    fn any_net() -> impl Strategy<Value = IpNet> {
        (0_u32..=255, 8_u8..=32).prop_map(|(bits, length)| {
            let address = IpAddr::from((0x0a00_0000 | (bits << 12)).to_be_bytes());
            IpNet::new(address, length).unwrap().trunc()
        })
    }

    proptest! {
        #[test]
        fn overlaps_are_found(nets in prop::collection::vec(any_net(), 0..16), net in any_net()) {
            let wanted = nets.iter().any(|n| n.contains(&net) || net.contains(n));
            let (fixed, overlay) = nets.split_at(nets.len() / 2);
            let mut concern = Concern::new(1, fixed.iter().copied(), [net]);
            concern.change(net, false);
            for net in overlay {
                concern.change(*net, true);
            }
            prop_assert_eq!(concern.overlaps(&net), wanted);
        }
    }
}

//! Packet filter rules: `tailcfg.FilterRule`.

use super::{CapMap, List, wire};

wire! {
    /// Who may reach what. A rule that only grants capabilities has no `DstPorts` and lets no packet through.
    pub struct FilterRule {
        /// `*`, addresses, CIDRs, ranges with a hyphen, `cap:` and a capability.
        #[serde(rename = "SrcIPs")]
        pub src_ips: List<String>,
        /// Prefix lengths of the sources in the form of 2020; refused, as Go's client does.
        pub src_bits: List<i64>,
        /// Destinations.
        pub dst_ports: List<NetPortRange>,
        /// IP protocol numbers; none are TCP, UDP, ICMP and ICMPv6.
        #[serde(rename = "IPProto")]
        pub ip_proto: List<i64>,
        /// Capabilities that the sources have toward some destinations.
        pub cap_grant: List<CapGrant>,
    }

    /// Capabilities toward some destinations.
    pub struct CapGrant {
        /// Networks.
        pub dsts: List<String>,
        /// Capabilities without values.
        pub caps: List<String>,
        /// Capabilities.
        pub cap_map: CapMap,
    }

    /// Destination addresses and ports.
    pub struct NetPortRange {
        /// `*`, an address, a CIDR or a range.
        #[serde(rename = "IP")]
        pub ip: String,
        /// Prefix length in the form of 2020; refused.
        pub bits: i64,
        /// Ports.
        pub ports: PortRange,
    }

    /// Ports, host byte order.
    pub struct PortRange {
        /// First of them.
        pub first: i64,
        /// Last of them.
        pub last: i64,
    }
}

//! Nodes and what they say of themselves.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{List, wire};

/// Capabilities by name. Their values are not looked at yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CapMap(pub Vec<String>);

impl<'de> Deserialize<'de> for CapMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = BTreeMap::<String, IgnoredAny>::deserialize(deserializer)?;
        Ok(Self(map.into_keys().collect()))
    }
}

impl Serialize for CapMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|name| (name, [(); 0])))
    }
}

wire! {
    /// A node of the tailnet.
    pub struct Node {
        /// Number; any 64 bits, never reused.
        #[serde(rename = "ID")]
        pub id: i64,
        /// Number for people and interfaces; a text.
        #[serde(rename = "StableID")]
        pub stable_id: String,
        /// Full name with a dot at the end.
        pub name: String,
        /// Owner; nodes with tags share one.
        pub user: i64,
        /// Who has shared it into this tailnet.
        pub sharer: i64,
        /// `nodekey:`.
        pub key: String,
        /// When the key ends; absent or year 1: never.
        pub key_expiry: String,
        /// Signature under tailnet lock, base64.
        pub key_signature: String,
        /// `mkey:`.
        pub machine: String,
        /// `discokey:`.
        pub disco_key: String,
        /// Its own addresses, as host CIDRs.
        pub addresses: List<String>,
        /// CIDRs that are routed to it; absent: its addresses.
        #[serde(rename = "AllowedIPs")]
        pub allowed_ips: List<String>,
        /// Underlay addresses.
        pub endpoints: List<String>,
        /// Home relay in the form before version 111: `127.3.3.40:` and a region.
        #[serde(rename = "DERP")]
        pub legacy_derp: String,
        /// Region of its home relay; 0 for none.
        #[serde(rename = "HomeDERP")]
        pub home_derp: i64,
        /// What it says of itself.
        pub hostinfo: Hostinfo,
        /// Capability version.
        pub cap: i64,
        /// Tags, each with `tag:`.
        pub tags: List<String>,
        /// Routes for which it is the one in charge now.
        pub primary_routes: List<String>,
        /// When it was connected last; only where it is not now.
        pub last_seen: String,
        /// Connected to the coordination server.
        pub online: bool,
        /// An administrator has let it in.
        pub machine_authorized: bool,
        /// Capabilities, the old form.
        pub capabilities: List<String>,
        /// Capabilities.
        pub cap_map: CapMap,
        /// Under tailnet lock, not signed: none of its routes hold.
        #[serde(rename = "UnsignedPeerAPIOnly")]
        pub unsigned_peer_api_only: bool,
        /// Its key has ended.
        pub expired: bool,
        /// Our IPv4 address as this peer knows it.
        #[serde(rename = "SelfNodeV4MasqAddrForThisPeer")]
        pub masquerade4: String,
        /// Our IPv6 address as this peer knows it.
        #[serde(rename = "SelfNodeV6MasqAddrForThisPeer")]
        pub masquerade6: String,
        /// Speaks neither disco nor DERP.
        pub is_wire_guard_only: bool,
        /// May not open flows to us.
        pub is_jailed: bool,
    }

    /// What a node says of itself.
    pub struct Hostinfo {
        /// Version of the software.
        #[serde(rename = "IPNVersion")]
        pub ipn_version: String,
        /// Must be there and not be empty: 64 hexadecimal digits.
        #[serde(rename = "BackendLogID")]
        pub backend_log_id: String,
        /// `linux`.
        #[serde(rename = "OS")]
        pub os: String,
        /// Version of the kernel.
        #[serde(rename = "OSVersion")]
        pub os_version: String,
        /// In a container.
        pub container: bool,
        /// Distribution.
        pub distro: String,
        /// Version of the distribution.
        pub distro_version: String,
        /// Code name of the distribution's version.
        pub distro_code_name: String,
        /// Name of the host, from which the server makes the node's.
        pub hostname: String,
        /// Nobody may open flows to it.
        pub shields_up: bool,
        /// Sends no logs.
        pub no_logs_no_support: bool,
        /// Processor, as uname has it.
        pub machine: String,
        /// Processor, as Go has it.
        pub go_arch: String,
        /// CIDRs that it can route to, without host bits.
        #[serde(rename = "RoutableIPs")]
        pub routable_ips: List<String>,
        /// Tags that it wants.
        pub request_tags: List<String>,
        /// What it serves.
        pub services: List<Service>,
        /// What it knows of its network.
        pub net_info: NetInfo,
        /// The cloud where it is.
        pub cloud: String,
        /// Without a TUN device.
        pub userspace: bool,
        /// Routes without a TUN device.
        pub userspace_router: bool,
        /// The state is encrypted where it is kept.
        pub state_encrypted: bool,
        /// Carries datagrams between others.
        pub peer_relay: bool,
    }

    /// A service of a node.
    pub struct Service {
        /// `tcp`, `udp`, `peerapi4`, `peerapi6`.
        pub proto: String,
        /// Port, host byte order.
        pub port: i64,
        /// For people.
        pub description: String,
    }

    /// What a node knows of its network.
    pub struct NetInfo {
        /// The NAT gives another port for another destination.
        #[serde(rename = "MappingVariesByDestIP")]
        pub mapping_varies_by_dest_ip: bool,
        /// IPv6 reaches the internet.
        #[serde(rename = "WorkingIPv6")]
        pub working_ipv6: bool,
        /// The system has IPv6.
        #[serde(rename = "OSHasIPv6")]
        pub os_has_ipv6: bool,
        /// UDP reaches the internet.
        #[serde(rename = "WorkingUDP")]
        pub working_udp: bool,
        /// ICMP reaches the internet.
        #[serde(rename = "WorkingICMPv4")]
        pub working_icmpv4: bool,
        /// Port mapping by UPnP.
        #[serde(rename = "UPnP")]
        pub upnp: bool,
        /// Port mapping by NAT-PMP.
        #[serde(rename = "PMP")]
        pub pmp: bool,
        /// Port mapping by PCP.
        #[serde(rename = "PCP")]
        pub pcp: bool,
        /// Region of the home relay. Without one, peers behind NAT do not reach the node.
        #[serde(rename = "PreferredDERP")]
        pub preferred_derp: i64,
        /// Seconds by region and family, as `1-v4`.
        #[serde(rename = "DERPLatency")]
        pub derp_latency: BTreeMap<String, Option<f64>>,
        /// What filters its packets.
        pub firewall_mode: String,
    }

    /// A user, for people.
    pub struct UserProfile {
        /// Number.
        #[serde(rename = "ID")]
        pub id: i64,
        /// Like an address of mail.
        pub login_name: String,
        /// Name.
        pub display_name: String,
    }
}

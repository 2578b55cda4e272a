//! The network map: `tailcfg.MapRequest` and `MapResponse`.

use std::collections::BTreeMap;

use super::{CapMap, DerpMap, FilterRule, Hostinfo, List, Node, UserProfile, wire};

wire! {
    /// Asks for the map, or tells about the node. Every request states everything.
    pub struct MapRequest {
        /// Capability version.
        pub version: u16,
        /// `zstd` or empty.
        pub compress: String,
        /// The server shall show that it is alive.
        pub keep_alive: bool,
        /// `nodekey:`.
        pub node_key: String,
        /// `discokey:`.
        pub disco_key: String,
        /// Go on with changes after the first map.
        pub stream: bool,
        /// About the node. A server ignores it on a stream.
        pub hostinfo: Hostinfo,
        /// Underlay addresses. A server ignores them on a stream.
        pub endpoints: List<String>,
        /// How each endpoint is known: 1 local, 2 STUN, 3 port mapping, 5 set by hand.
        pub endpoint_types: List<i64>,
        /// Only tells: nothing is wanted back.
        pub omit_peers: bool,
        /// What is wrong here, as `warn-ip-forwarding-off`.
        pub debug_flags: List<String>,
    }

    /// A map, or what has changed of it.
    pub struct MapResponse {
        /// Nothing but a sign of life. It may carry work all the same.
        pub keep_alive: bool,
        /// Something to be answered.
        pub ping_request: PingRequest,
        /// Where a person is to be sent.
        #[serde(rename = "PopBrowserURL")]
        pub pop_browser_url: String,
        /// The node itself. The first map has it.
        pub node: Node,
        /// Relays.
        #[serde(rename = "DERPMap")]
        pub derp_map: DerpMap,
        /// All peers; when it is not empty, the other fields about peers have no say.
        pub peers: List<Node>,
        /// Peers that are new or have changed, whole.
        pub peers_changed: List<Node>,
        /// Numbers of peers that are gone.
        pub peers_removed: List<i64>,
        /// Changes of single fields.
        pub peers_changed_patch: List<PeerChange>,
        /// By number: seen just now, or not known when.
        pub peer_seen_change: BTreeMap<String, Option<bool>>,
        /// By number: connected or not.
        pub online_change: BTreeMap<String, Option<bool>>,
        /// Names.
        #[serde(rename = "DNSConfig")]
        pub dns_config: DnsConfig,
        /// The tailnet's name.
        pub domain: String,
        /// The filter named `base`.
        pub packet_filter: List<FilterRule>,
        /// Filters by name. Null takes one away; `*` with null takes all away, before the others are looked at.
        pub packet_filters: BTreeMap<String, Option<List<FilterRule>>>,
        /// Users.
        pub user_profiles: List<UserProfile>,
        /// What the server finds wrong; empty: nothing.
        pub health: List<String>,
        /// The same by name. Null takes one away, `*` with null all.
        pub display_messages: BTreeMap<String, Option<DisplayMessage>>,
        /// The server's clock.
        pub control_time: String,
        /// Tailnet lock.
        #[serde(rename = "TKAInfo")]
        pub tka_info: TkaInfo,
        /// Orders.
        pub debug: Debug,
        /// Where the server is to be found from now on.
        pub control_dial_plan: ControlDialPlan,
        /// What the server thinks of our version.
        pub client_version: ClientVersion,
    }

    /// Changed fields of a peer. Absent: unchanged.
    pub struct PeerChange {
        /// Number.
        #[serde(rename = "NodeID")]
        pub node_id: i64,
        /// Home relay; 0 is unchanged too.
        #[serde(rename = "DERPRegion")]
        pub derp_region: i64,
        /// Capability version.
        pub cap: i64,
        /// Capabilities.
        pub cap_map: CapMap,
        /// Underlay addresses.
        pub endpoints: List<String>,
        /// `nodekey:`.
        pub key: String,
        /// `discokey:`.
        pub disco_key: String,
        /// Connected or not.
        pub online: bool,
        /// When it was connected last.
        pub last_seen: String,
        /// When its key ends.
        pub key_expiry: String,
    }

    /// Something that the server wants answered.
    pub struct PingRequest {
        /// Where the answer goes. The same once more is the same request.
        #[serde(rename = "URL")]
        pub url: String,
        /// The answer goes through Noise.
        #[serde(rename = "URLIsNoise")]
        pub url_is_noise: bool,
        /// Say so in the log.
        pub log: bool,
        /// Empty: a HEAD of the URL. `c2n`: `payload` is an HTTP request. Else kinds of ping, with commas.
        pub types: String,
        /// Whom to ping.
        #[serde(rename = "IP")]
        pub ip: String,
        /// Base64.
        pub payload: String,
    }

    /// What a ping has found.
    pub struct PingResponse {
        /// Kind: `TSMP`, `disco`, `ICMP`, `peerapi`.
        #[serde(rename = "Type")]
        pub kind: String,
        /// Who was pinged.
        #[serde(rename = "IP")]
        pub ip: String,
        /// Who has answered.
        #[serde(rename = "NodeIP")]
        pub node_ip: String,
        /// Its name.
        pub node_name: String,
        /// What has failed.
        pub err: String,
        /// Seconds.
        pub latency_seconds: f64,
        /// The underlay address that was used.
        pub endpoint: String,
        /// The peer relay that was used: address, `:vni:` and number.
        pub peer_relay: String,
        /// Region of the relay that was used.
        #[serde(rename = "DERPRegionID")]
        pub derp_region_id: i64,
        /// The address is our own.
        #[serde(rename = "IsLocalIP")]
        pub is_local_ip: bool,
    }

    /// Names: what a router looks at of it.
    pub struct DnsConfig {
        /// Search domains, MagicDNS's first.
        pub domains: List<String>,
        /// MagicDNS is on.
        pub proxied: bool,
        /// Names for which certificates are to be had.
        pub cert_domains: List<String>,
    }

    /// A message of the server for people.
    pub struct DisplayMessage {
        /// One line.
        pub title: String,
        /// More.
        pub text: String,
        /// `high`, `medium` or `low`.
        pub severity: String,
        /// Somebody's packets are concerned.
        pub impacts_connectivity: bool,
    }

    /// Tailnet lock.
    pub struct TkaInfo {
        /// Hash of the newest update; empty when there is no lock.
        pub head: String,
        /// The lock is to be ended.
        pub disabled: bool,
    }

    /// Orders.
    pub struct Debug {
        /// Seconds in which to do nothing.
        pub sleep_seconds: f64,
        /// Send no logs.
        pub disable_log_tail: bool,
        /// End with this code.
        pub exit: i64,
    }

    /// Where the server is to be found: a race, not a list.
    pub struct ControlDialPlan {
        /// Those who run.
        pub candidates: List<ControlIpCandidate>,
    }

    /// A runner of the race.
    pub struct ControlIpCandidate {
        /// Instead of DNS.
        #[serde(rename = "IP")]
        pub ip: String,
        /// A host to be asked by CONNECT over TLS.
        #[serde(rename = "ACEHost")]
        pub ace_host: String,
        /// Seconds until it starts.
        pub dial_start_delay_sec: f64,
        /// Seconds until it gives up, from then on.
        pub dial_timeout_sec: f64,
        /// Higher is better. The first to arrive wins all the same, as in Go's client.
        pub priority: i64,
    }

    /// What the server thinks of our version.
    pub struct ClientVersion {
        /// It is the newest one.
        pub running_latest: bool,
        /// The newest one.
        pub latest_version: String,
        /// The newest one mends something dangerous.
        pub urgent_security_update: bool,
    }
}

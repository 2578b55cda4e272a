//! Relays: `tailcfg/derpmap.go`.

use std::collections::BTreeMap;

use super::{List, wire};

wire! {
    /// All relays. Regions by number, in decimal.
    pub struct DerpMap {
        /// Weights of regions.
        pub home_params: DerpHomeParams,
        /// Null leaves the regions as they are; a null region is none.
        pub regions: BTreeMap<String, Option<DerpRegion>>,
        /// The server's regions replace those that a client has built in.
        #[serde(rename = "omitDefaultRegions")]
        pub omit_default_regions: bool,
    }

    /// Weights of regions.
    pub struct DerpHomeParams {
        /// What a region's latency is multiplied with; none is 1.
        pub region_score: BTreeMap<String, Option<f64>>,
    }

    /// Relays of one place.
    pub struct DerpRegion {
        /// Number, at least 1.
        #[serde(rename = "RegionID")]
        pub region_id: i64,
        /// Short name.
        pub region_code: String,
        /// Name for people.
        pub region_name: String,
        /// Not to be a home as long as there is another.
        pub avoid: bool,
        /// Neither to be measured nor to be a home.
        pub no_measure_no_home: bool,
        /// Relays, the preferred one first.
        pub nodes: List<DerpNode>,
    }

    /// A relay.
    pub struct DerpNode {
        /// Name within the map.
        pub name: String,
        /// Its region.
        #[serde(rename = "RegionID")]
        pub region_id: i64,
        /// DNS name.
        pub host_name: String,
        /// Name in the certificate, where it is another; `sha256-raw:` and a hash pins one.
        pub cert_name: String,
        /// Address instead of DNS; `none` for no IPv4.
        #[serde(rename = "IPv4")]
        pub ipv4: String,
        /// Address instead of DNS; `none` for no IPv6.
        #[serde(rename = "IPv6")]
        pub ipv6: String,
        /// UDP port; absent or 0 is 3478, -1 none.
        #[serde(rename = "STUNPort")]
        pub stun_port: i64,
        /// No relay, STUN alone.
        #[serde(rename = "STUNOnly")]
        pub stun_only: bool,
        /// TCP port of the relay; absent or 0 is 443.
        #[serde(rename = "DERPPort")]
        pub derp_port: i64,
        /// Its certificate is not to be verified.
        pub insecure_for_tests: bool,
        /// Where STUN is asked in tests.
        #[serde(rename = "STUNTestIP")]
        pub stun_test_ip: String,
        /// Port 80 answers too.
        #[serde(rename = "CanPort80")]
        pub can_port80: bool,
    }
}

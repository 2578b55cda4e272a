//! What was found of the network between this node and the relays.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use crate::tailnet::wire::NetInfo;

/// The fields of Tailscale's report (`net/netcheck`) as far as something is known of them here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Netcheck {
    /// When it was finished.
    pub taken: Option<SystemTime>,
    /// STUN answers came.
    pub udp: bool,
    /// They came by IPv4.
    pub ipv4: bool,
    /// They came by IPv6.
    pub ipv6: bool,
    /// The kernel has let IPv4 datagrams go.
    pub ipv4_can_send: bool,
    /// The kernel has let IPv6 datagrams go.
    pub ipv6_can_send: bool,
    /// The system has IPv6.
    pub os_has_ipv6: bool,
    /// The NAT gives another address or port for another destination; `None` when fewer than two answers came.
    pub mapping_varies: Option<bool>,
    /// The region that is nearest.
    pub preferred: Option<u32>,
    /// Least round trip by region.
    pub latency: BTreeMap<u32, Duration>,
    /// By IPv4 alone.
    pub latency4: BTreeMap<u32, Duration>,
    /// By IPv6 alone.
    pub latency6: BTreeMap<u32, Duration>,
    /// Our address and port as seen by IPv4.
    pub global4: Option<SocketAddr>,
    /// Our address and port as seen by IPv6.
    pub global6: Option<SocketAddr>,
}

impl Netcheck {
    /// What the coordination server is told of it, with `home` as the home region.
    pub fn net_info(&self, home: Option<u32>) -> NetInfo {
        let seconds = |all: &BTreeMap<u32, Duration>, family: &str| {
            let text = |(region, time): (&u32, &Duration)| {
                (format!("{region}-{family}"), Some(time.as_secs_f64()))
            };
            all.iter().map(text).collect::<Vec<_>>()
        };
        let latency = [seconds(&self.latency4, "v4"), seconds(&self.latency6, "v6")];
        NetInfo {
            mapping_varies_by_dest_ip: self.mapping_varies,
            working_ipv6: Some(self.ipv6),
            os_has_ipv6: Some(self.os_has_ipv6),
            working_udp: Some(self.udp),
            preferred_derp: home.map(i64::from),
            derp_latency: Some(latency.into_iter().flatten().collect()),
            ..NetInfo::default()
        }
    }
}

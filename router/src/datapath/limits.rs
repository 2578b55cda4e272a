//! How many flows the fast path keeps, and for how long.

use std::time::Duration;

use router_ebpf::abi::DEFAULT_FLOWS;

use super::FLOWS_PER_SOURCE;

/// The limits of the flow table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Most flows of each family.
    pub flows: u32,
    /// Most flows of each family that one peer may open, and one host of the subnet side.
    pub flows_per_source: u32,
    /// How long an idle flow is kept.
    pub timeouts: Timeouts,
}

impl Limits {
    /// Most flows of each family that the hosts of the subnet side may open together: half of the table,
    /// so that they cannot lock the peers out.
    pub fn flows_from_subnet(&self) -> u32 {
        self.flows / 2
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            flows: DEFAULT_FLOWS,
            flows_per_source: FLOWS_PER_SOURCE,
            timeouts: Timeouts::default(),
        }
    }
}

/// How long a flow is kept after its last packet of either direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// An established TCP connection.
    pub tcp: Duration,
    /// A TCP connection that is not established yet, or is over.
    pub tcp_transitory: Duration,
    /// UDP.
    pub udp: Duration,
    /// ICMP echo.
    pub icmp: Duration,
}

impl Timeouts {
    /// The least that the RFCs allow a NAT: RFC 5382 REQ-5, RFC 4787 REQ-5 and RFC 5508 REQ-2.
    pub const LEAST: Self = Self {
        tcp: Duration::from_secs(7440),
        tcp_transitory: Duration::from_secs(240),
        udp: Duration::from_secs(120),
        icmp: Duration::from_secs(60),
    };
}

impl Default for Timeouts {
    /// The least, but for UDP, where RFC 4787 recommends five minutes.
    fn default() -> Self {
        Self {
            udp: Duration::from_secs(300),
            ..Self::LEAST
        }
    }
}

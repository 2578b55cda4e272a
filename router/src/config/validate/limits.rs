//! The limits of the flow table in `[datapath]`.

use std::time::Duration;

use super::super::problem::Problems;
use super::super::raw::Datapath;
use super::super::section::{At, within};
use crate::datapath::limits::{Limits, Timeouts};

/// Fewer flows than one busy machine may need help nobody, and more than this are tens of GB.
const FLOWS: std::ops::RangeInclusive<i64> = 1024..=1 << 24;
/// Longest timeout in seconds: a day.
const LONGEST: i64 = 86_400;

/// The limits, with defaults in the place of what was wrong or is not there.
pub(super) fn limits(raw: &Datapath<'_>, problems: &mut Problems<'_>) -> Limits {
    let default = Limits::default();
    let mut count = |number: Option<At<i64>>, key, range, what, default| {
        let found = number.and_then(|number| within(number, key, range, what, problems));
        found.unwrap_or(default)
    };
    let flows = count(
        raw.flows,
        "datapath.flows",
        FLOWS,
        "number of flows of each family",
        default.flows,
    );
    let flows_per_source = count(
        raw.flows_per_source,
        "datapath.flows_per_source",
        1..=*FLOWS.end(),
        "number of flows of one peer",
        default.flows_per_source,
    );
    let mut timeout = |number: Option<At<i64>>, key, what: &str, least: Duration, default| {
        let range = least.as_secs() as i64..=LONGEST;
        let what = format!("timeout in seconds that {what} allows");
        let found: Option<u32> =
            number.and_then(|number| within(number, key, range, &what, problems));
        found.map_or(default, |seconds| Duration::from_secs(seconds.into()))
    };
    let (least, usual) = (Timeouts::LEAST, default.timeouts);
    let timeouts = Timeouts {
        tcp: timeout(
            raw.tcp_timeout,
            "datapath.tcp_timeout",
            "RFC 5382",
            least.tcp,
            usual.tcp,
        ),
        tcp_transitory: timeout(
            raw.tcp_transitory_timeout,
            "datapath.tcp_transitory_timeout",
            "RFC 5382",
            least.tcp_transitory,
            usual.tcp_transitory,
        ),
        udp: timeout(
            raw.udp_timeout,
            "datapath.udp_timeout",
            "RFC 4787",
            least.udp,
            usual.udp,
        ),
        icmp: timeout(
            raw.icmp_timeout,
            "datapath.icmp_timeout",
            "RFC 5508",
            least.icmp,
            usual.icmp,
        ),
    };
    Limits {
        flows,
        flows_per_source,
        timeouts,
    }
}

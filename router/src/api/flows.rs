//! The flow table over the local socket, and `sluice flows`.

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use router_ebpf::packet::{ICMP, ICMPV6, TCP, UDP};
use serde::Serialize;
use serde_json::Value;

use crate::datapath::ebpf::{FlowFilter, FlowTables, FlowView};

/// Flows in an answer unless the question says otherwise.
const DEFAULT_LIMIT: usize = 1000;
/// Most flows in an answer.
const MOST: usize = 100_000;

/// An answer: flows in no order.
#[derive(Clone, Debug, Serialize)]
pub struct FlowList {
    /// The flows.
    pub flows: Vec<FlowEntry>,
    /// Whether more would fit the question.
    pub more: bool,
}

/// A flow of the fast path.
#[derive(Clone, Debug, Serialize)]
pub struct FlowEntry {
    /// `tcp`, `udp`, `icmp` or a number.
    pub protocol: String,
    /// The overlay end; an ICMP echo has its identifier as the port.
    pub overlay: SocketAddr,
    /// The subnet end.
    pub subnet: SocketAddr,
    /// What the overlay end looks like to the subnet, where it is translated.
    pub external: Option<SocketAddr>,
    /// `overlay` or `subnet`.
    pub opened_by: &'static str,
    /// Of TCP `established` or `transitory`.
    pub state: Option<&'static str>,
    /// Seconds since the last packet.
    pub idle_seconds: u64,
}

impl From<&FlowView> for FlowEntry {
    fn from(view: &FlowView) -> Self {
        Self {
            protocol: protocol_name(view.protocol),
            overlay: view.overlay,
            subnet: view.subnet,
            external: view.external,
            opened_by: if view.from_overlay {
                "overlay"
            } else {
                "subnet"
            },
            state: view.established.map(|established| match established {
                true => "established",
                false => "transitory",
            }),
            idle_seconds: view.idle.as_secs(),
        }
    }
}

const NAMES: [(&str, u8); 4] = [
    ("tcp", TCP),
    ("udp", UDP),
    ("icmp", ICMP),
    ("icmpv6", ICMPV6),
];

pub(super) fn protocol_name(protocol: u8) -> String {
    let known = NAMES.iter().find(|(_, number)| *number == protocol);
    known.map_or_else(|| protocol.to_string(), |(name, _)| (*name).to_owned())
}

/// An IP protocol by its name or number.
pub fn parse_protocol(text: &str) -> Result<u8, String> {
    let known = NAMES.iter().find(|(name, _)| *name == text);
    known
        .map(|(_, number)| *number)
        .or_else(|| text.parse().ok())
        .ok_or_else(|| format!("{text:?} is no protocol; write tcp, udp, icmp, icmpv6 or a number"))
}

/// A CIDR or an address.
pub fn parse_address(text: &str) -> Result<IpNet, String> {
    let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
    text.parse::<IpNet>()
        .ok()
        .or_else(address)
        .ok_or_else(|| format!("{text:?} is no address and no CIDR"))
}

/// A question for flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// Which flows.
    pub filter: FlowFilter,
    /// How many.
    pub limit: usize,
}

impl Default for Question {
    fn default() -> Self {
        Self {
            filter: FlowFilter::default(),
            limit: DEFAULT_LIMIT,
        }
    }
}

impl Question {
    /// Reads the query of a URL.
    pub(super) fn parse(query: &str) -> Result<Self, String> {
        let mut question = Self::default();
        for part in query.split('&').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            let number = || format!("{key}: {value:?} is no number that fits");
            match key {
                "address" => question.filter.address = Some(parse_address(value)?),
                "protocol" => question.filter.protocol = Some(parse_protocol(value)?),
                "port" => question.filter.port = Some(value.parse().map_err(|_| number())?),
                "limit" => {
                    question.limit = value
                        .parse()
                        .ok()
                        .filter(|n| *n <= MOST)
                        .ok_or_else(number)?;
                }
                _ => {
                    return Err(format!(
                        "{key:?} is unknown here; there are address, protocol, port and limit"
                    ));
                }
            }
        }
        Ok(question)
    }

    /// The query of a URL.
    pub(super) fn query(&self) -> String {
        let FlowFilter {
            address,
            protocol,
            port,
        } = self.filter;
        let mut query = format!("limit={}", self.limit);
        let mut add = |key, value: Option<String>| {
            if let Some(value) = value {
                let _ = write!(query, "&{key}={value}");
            }
        };
        add("address", address.map(|address| address.to_string()));
        add("protocol", protocol.map(|protocol| protocol.to_string()));
        add("port", port.map(|port| port.to_string()));
        query
    }

    /// The answer, out of the maps. It takes a while with a large table.
    pub(super) fn answer(&self, tables: &FlowTables) -> std::io::Result<FlowList> {
        let (found, more) = tables.list(&self.filter, self.limit)?;
        Ok(FlowList {
            flows: found.iter().map(FlowEntry::from).collect(),
            more,
        })
    }
}

/// An answer as a table for a person.
pub(super) fn page(answer: &Value) -> String {
    let mut out = format!(
        "{:<8} {:<28} {:<28} {:<28} {:<8} {:<12} {:>6}\n",
        "protocol", "overlay", "subnet", "external", "opened", "state", "idle"
    );
    for flow in answer["flows"].as_array().into_iter().flatten() {
        let _ = writeln!(
            out,
            "{:<8} {:<28} {:<28} {:<28} {:<8} {:<12} {:>5}s",
            cell(&flow["protocol"]),
            cell(&flow["overlay"]),
            cell(&flow["subnet"]),
            cell(&flow["external"]),
            cell(&flow["opened_by"]),
            cell(&flow["state"]),
            flow["idle_seconds"],
        );
    }
    out + there_are_more(answer)
}

/// What a table ends with.
pub(super) fn there_are_more(answer: &Value) -> &'static str {
    if answer["more"] == true {
        "there are more; ask for some of them, or raise --limit\n"
    } else {
        ""
    }
}

/// A text of an answer, for a table.
pub(super) fn cell(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn a_question_survives_its_url() {
        let question = Question {
            filter: FlowFilter {
                address: Some("fd00::/8".parse().unwrap()),
                protocol: Some(UDP),
                port: Some(53),
            },
            limit: 7,
        };
        assert_eq!(Question::parse(&question.query()), Ok(question));
        let none = Question::default();
        assert_eq!(Question::parse(&none.query()), Ok(none));
        let one = Question::parse("address=10.0.0.1&protocol=tcp").unwrap();
        assert_eq!(one.filter.address, Some("10.0.0.1/32".parse().unwrap()));
        assert_eq!(one.filter.protocol, Some(TCP));
        for (query, says) in [
            ("address=host", "no CIDR"),
            ("protocol=quic", "icmpv6"),
            ("port=70000", "port"),
            ("limit=1000000", "limit"),
            ("source=1", "address, protocol"),
        ] {
            let error = Question::parse(query).unwrap_err();
            assert!(error.contains(says), "{query}: {error}");
        }
    }

    #[test]
    fn the_page_shows_a_flow() {
        let answer = json!({"more": true, "flows": [{
            "protocol": "tcp", "overlay": "100.64.0.2:40000", "subnet": "10.0.0.1:443",
            "external": "10.0.0.9:40000", "opened_by": "overlay", "state": "established",
            "idle_seconds": 3,
        }]});
        let page = page(&answer);
        for part in [
            "100.64.0.2:40000",
            "10.0.0.9:40000",
            "established",
            "3s",
            "there are more",
        ] {
            assert!(page.contains(part), "{part} is missing in:\n{page}");
        }
    }
}

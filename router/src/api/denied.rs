//! Denied packets over the local socket, and `sluice denied`.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::UNIX_EPOCH;

use serde::Serialize;
use serde_json::Value;

use super::client::ago;
use super::flows::{Question, cell, protocol_name, there_are_more};
use crate::datapath::ebpf::DeniedPacket;

/// TCP flags from the lowest bit on (RFC 9293, section 3.1).
const FLAGS: [&str; 8] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];

/// An answer: denied packets, the latest first.
#[derive(Clone, Debug, Serialize)]
pub struct DeniedList {
    /// The packets.
    pub packets: Vec<DeniedEntry>,
    /// Whether more would fit the question.
    pub more: bool,
}

/// A packet that was not let through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeniedEntry {
    /// When, in seconds since the Unix epoch.
    pub at: u64,
    /// Which program has seen it, as in the counters.
    pub program: &'static str,
    /// What became of it, as in the counters.
    pub verdict: &'static str,
    /// The same as a sentence.
    pub reason: &'static str,
    /// `tcp`, `udp`, `icmp` or a number.
    pub protocol: String,
    /// Source; of an ICMP echo the overlay end has the identifier as its port.
    pub source: SocketAddr,
    /// Destination.
    pub destination: SocketAddr,
    /// The peer whose end it is: its name, or its key where it has none.
    pub peer: Option<String>,
    /// Bytes at the IP layer.
    pub bytes: u32,
    /// Of TCP the flags, e.g. `SYN`.
    pub tcp_flags: Option<String>,
}

impl DeniedEntry {
    /// `packet`, of a peer.
    pub fn new(packet: &DeniedPacket, peer: Option<String>) -> Self {
        let flags = (0..).zip(FLAGS);
        let set = flags.filter(|(bit, _)| packet.tcp_flags >> bit & 1 != 0);
        let names: Vec<&str> = set.map(|(_, name)| name).collect();
        Self {
            at: packet
                .at
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs()),
            program: packet.side.label(),
            verdict: packet.verdict.label(),
            reason: packet.verdict.text(),
            protocol: protocol_name(packet.protocol),
            source: packet.source,
            destination: packet.destination,
            peer,
            bytes: packet.len,
            tcp_flags: (!names.is_empty()).then(|| names.join(",")),
        }
    }
}

impl Question {
    /// The answer out of `packets`, the latest first; `peer` tells whose an address is.
    pub fn pick<'p>(
        &self,
        packets: impl Iterator<Item = &'p DeniedPacket>,
        mut peer: impl FnMut(&DeniedPacket) -> Option<String>,
    ) -> DeniedList {
        let mut fitting = packets.filter(|packet| {
            let ends = [packet.source, packet.destination];
            self.filter.fits(packet.protocol, ends.into_iter())
        });
        let first = fitting.by_ref().take(self.limit);
        DeniedList {
            packets: first
                .map(|packet| DeniedEntry::new(packet, peer(packet)))
                .collect(),
            more: fitting.next().is_some(),
        }
    }
}

/// An answer as a table for a person.
pub(super) fn page(answer: &Value) -> String {
    let mut out = format!(
        "{:<12} {:<18} {:<8} {:<28} {:<28} {:<16} {:>6} {}\n",
        "when", "verdict", "protocol", "source", "destination", "peer", "bytes", "flags"
    );
    for packet in answer["packets"].as_array().into_iter().flatten() {
        let _ = writeln!(
            out,
            "{:<12} {:<18} {:<8} {:<28} {:<28} {:<16} {:>6} {}",
            ago(&packet["at"]),
            cell(&packet["verdict"]),
            cell(&packet["protocol"]),
            cell(&packet["source"]),
            cell(&packet["destination"]),
            cell(&packet["peer"]),
            packet["bytes"],
            cell(&packet["tcp_flags"]),
        );
    }
    out + there_are_more(answer)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;
    use crate::datapath::ebpf::FlowFilter;
    use router_ebpf::abi::Side;
    use router_ebpf::packet::{TCP, UDP};
    use router_ebpf::verdict::Verdict;

    fn packet(protocol: u8, port: u16) -> DeniedPacket {
        DeniedPacket {
            at: UNIX_EPOCH + Duration::from_millis(5900),
            side: Side::Overlay,
            verdict: Verdict::RejectPolicy,
            protocol,
            source: "100.64.0.2:40000".parse().unwrap(),
            destination: SocketAddr::new("10.0.0.1".parse().unwrap(), port),
            len: 60,
            tcp_flags: if protocol == TCP { 0x12 } else { 0 },
        }
    }

    #[test]
    fn what_fits_is_told_with_its_peer() {
        let packets = [packet(TCP, 22), packet(UDP, 53), packet(TCP, 23)];
        let peer = |packet: &DeniedPacket| Some(format!("of {}", packet.overlay().ip()));
        let ask = |protocol, port, limit| {
            let question = Question {
                filter: FlowFilter {
                    protocol,
                    port,
                    address: None,
                },
                limit,
            };
            let list = question.pick(packets.iter(), peer);
            let ports = list.packets.iter().map(|packet| packet.destination.port());
            (ports.collect::<Vec<_>>(), list.more)
        };
        assert_eq!(ask(None, None, 9), (vec![22, 53, 23], false));
        assert_eq!(ask(Some(TCP), None, 2), (vec![22, 23], false));
        assert_eq!(ask(Some(TCP), None, 1), (vec![22], true));
        assert_eq!(ask(None, Some(53), 9), (vec![53], false));
        let entry = DeniedEntry::new(&packets[0], peer(&packets[0]));
        assert_eq!(entry.at, 5);
        assert_eq!(entry.tcp_flags.as_deref(), Some("SYN,ACK"));
        let list = DeniedList {
            packets: vec![entry, DeniedEntry::new(&packets[1], None)],
            more: true,
        };
        let page = page(&serde_json::to_value(list).unwrap());
        for part in [
            "reject_policy",
            "100.64.0.2:40000",
            "10.0.0.1:22",
            "of 100.64.0.2",
            "SYN,ACK",
            " ago",
            "there are more",
        ] {
            assert!(page.contains(part), "{part} is missing in:\n{page}");
        }
    }
}

//! Packets that the programs did not let through, as far as they tell of them.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, SystemTime};

use aya::maps::{MapData, RingBuf};
use router_ebpf::abi::{self, Denied, Side};
use router_ebpf::packet::{ICMP, ICMPV6};
use router_ebpf::verdict::Verdict;

use super::listing::end;
use super::sweeper::monotonic;
use super::take_map;
use crate::datapath::Error;

/// A packet that was not let through. An ICMP echo has its identifier as the port of the overlay end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeniedPacket {
    /// When.
    pub at: SystemTime,
    /// The program that has seen it.
    pub side: Side,
    /// What became of it, and why.
    pub verdict: Verdict,
    /// IP protocol.
    pub protocol: u8,
    /// Source.
    pub source: SocketAddr,
    /// Destination.
    pub destination: SocketAddr,
    /// Bytes at the IP layer, of a super-packet all.
    pub len: u32,
    /// TCP flags from FIN to CWR; else zero.
    pub tcp_flags: u8,
}

impl DeniedPacket {
    /// `None` if the record is none of this version's programs.
    fn new(record: &Denied, since_boot: Duration, now: SystemTime) -> Option<Self> {
        let side = *Side::ALL.get(usize::from(record.side))?;
        let verdict = *Verdict::ALL.get(usize::from(record.verdict))?;
        let [mut source, mut destination] = record.ports;
        if matches!(record.protocol, ICMP | ICMPV6) {
            // The subnet end has no identifier.
            match side {
                Side::Overlay => destination = [0; 2],
                Side::Subnet => source = [0; 2],
            }
        }
        let age = since_boot.saturating_sub(Duration::from_nanos(record.time));
        Some(Self {
            at: now.checked_sub(age)?,
            side,
            verdict,
            protocol: record.protocol,
            source: end(&record.source, source),
            destination: end(&record.destination, destination),
            len: record.len,
            tcp_flags: record.tcp_flags,
        })
    }

    /// The overlay end.
    pub fn overlay(&self) -> SocketAddr {
        match self.side {
            Side::Overlay => self.source,
            Side::Subnet => self.destination,
        }
    }
}

/// The packets as they come: readable, as poll(2) says it, when there are any.
pub struct DeniedPackets(RingBuf<MapData>);

impl std::fmt::Debug for DeniedPackets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("DeniedPackets").finish()
    }
}

impl AsRawFd for DeniedPackets {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl DeniedPackets {
    /// Takes the map out of the loaded object.
    pub(super) fn take(programs: &mut aya::Ebpf) -> Result<Self, Error> {
        take_map(programs, abi::DENIED).map(Self)
    }

    /// All that have come since the last call, in their order.
    pub fn read(&mut self) -> std::io::Result<Vec<DeniedPacket>> {
        let (since_boot, now) = (Duration::from_nanos(monotonic()?), SystemTime::now());
        let mut packets = Vec::new();
        while let Some(record) = self.0.next() {
            if record.len() < size_of::<Denied>() {
                continue;
            }
            // SAFETY: as many bytes are there, and any are a valid record: integers and byte arrays.
            let record = unsafe { record.as_ptr().cast::<Denied>().read_unaligned() };
            packets.extend(DeniedPacket::new(&record, since_boot, now));
        }
        Ok(packets)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use router_ebpf::abi::{Address, Tuple};
    use router_ebpf::packet::{Packet, TCP};

    fn told(side: Side, protocol: u8, ports: [[u8; 2]; 2], verdict: u8) -> Option<DeniedPacket> {
        let packet = Packet {
            tuple: Tuple {
                source: Address::v4([100, 64, 0, 2]),
                destination: Address::v4([10, 0, 0, 1]),
                ports,
                protocol,
            },
            len: 60,
            tcp_flags: 2,
            ..Packet::default()
        };
        let record = packet.denied(side, verdict, 5_000_000_000);
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        DeniedPacket::new(&record, Duration::from_secs(8), now)
    }

    #[test]
    fn a_record_tells_when_who_and_why() {
        let packet = told(
            Side::Overlay,
            TCP,
            [[0x9c, 0x40], [0, 22]],
            Verdict::DropPolicy as u8,
        )
        .unwrap();
        let wanted = DeniedPacket {
            at: SystemTime::UNIX_EPOCH + Duration::from_secs(97),
            side: Side::Overlay,
            verdict: Verdict::DropPolicy,
            protocol: TCP,
            source: "100.64.0.2:40000".parse().unwrap(),
            destination: "10.0.0.1:22".parse().unwrap(),
            len: 60,
            tcp_flags: 2,
        };
        assert_eq!(packet, wanted);
        assert_eq!(packet.overlay(), wanted.source);
        let asked = Tuple::ASKED_BY_SUBNET;
        let echo = told(
            Side::Subnet,
            ICMP,
            [asked, [0, 7]],
            Verdict::DropPolicy as u8,
        )
        .unwrap();
        assert_eq!((echo.source.port(), echo.overlay().port()), (0, 7));
        assert_eq!(told(Side::Overlay, TCP, [[0; 2]; 2], 200), None);
    }
}

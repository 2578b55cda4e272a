//! Where packets are forwarded without a tunnel: a router whose TUN device is ours, and a server.

use std::collections::HashMap;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lab::packet::{Packet, TCP, UDP};
use lab::{Host, Lab};

use super::forwarder::{Forwarder, Kind};
use super::frame::{self, CLIENT, Link, MTU, SERVER_PORT, Segment, Size};
use super::io::{self, Reader, Sink};
use crate::case::Failure;
use crate::cpu::{self, Cores};
use crate::device::{link, octets};
use crate::generator::packet::Stamp;

/// Name of the TUN device, in its own namespace.
pub(super) const TUN: &str = "tun0";
/// Name of the NICs of both hosts.
pub(super) const NIC: &str = "eth0";
/// The router's address on the server's side.
pub(super) const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 1);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 20, 0, 2);
/// How long a packet may take on its way when nothing else is going on.
const PATIENCE: Duration = Duration::from_secs(5);

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Direction {
    /// From the TUN device to the subnet.
    Up,
    /// From the subnet to the TUN device.
    Down,
}

impl Direction {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// What a flood came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flood {
    /// Frames that were sent.
    pub(super) sent: u64,
    /// Frames that were forwarded and found the TUN queue full: the reader's fault.
    pub(super) overflow: u64,
    /// How long it took.
    pub(super) elapsed: Duration,
    /// CPU time of sending and of all that it set off.
    pub(super) cpu: Duration,
}

/// A router under test between its TUN queue and a server.
pub(super) struct Bed {
    forwarder: Forwarder,
    tun: File,
    socket: OwnedFd,
    router: Host,
    server: Host,
    /// Ethernet addresses from the server to the router.
    ethernet: Link,
    /// Frames by size and direction, made when first asked for.
    frames: HashMap<(Size, Direction), Vec<Vec<u8>>>,
    cores: Cores,
    _lab: Lab,
}

impl Bed {
    pub(super) fn new(kind: Kind, cores: &Cores) -> anyhow::Result<Self> {
        let lab = Lab::new()?;
        let (router, server) = (lab.gateway("router")?, lab.host("server")?);
        // What IPv6 sends by itself would be counted with the frames.
        for host in [&router, &server] {
            host.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        }
        lab.link(
            router.port(NIC).address(&format!("{ROUTER}/24")),
            server.port(NIC).address(&format!("{SERVER}/24")),
        )?;
        let tun = router
            .enter(|| io::open_tun(TUN))?
            .context("make a TUN device")?;
        // Long enough for the pauses of a reader on a busy machine.
        router.ip(&format!("link set {TUN} mtu {MTU} txqueuelen 10000 up"))?;
        router.ip(&format!("address add 100.64.0.1/24 dev {TUN}"))?;
        server.route("100.64.0.0/24", &ROUTER.to_string())?;
        let (tun_index, _) = link(&router, TUN)?;
        let ((nic_index, theirs), (index, ours)) = (link(&router, NIC)?, link(&server, NIC)?);
        // No neighbour is forgotten and asked for again in the middle of a run.
        for (host, ip, mac) in [(&router, SERVER, &ours), (&server, ROUTER, &theirs)] {
            host.ip(&format!(
                "neighbour replace {ip} lladdr {mac} dev {NIC} nud permanent"
            ))?;
        }
        drop_and_count(&server, NIC)?;
        let socket = server.enter(|| io::open_packet_socket(index))?;
        Ok(Self {
            forwarder: Forwarder::install(kind, &router, tun_index, nic_index)?,
            tun,
            socket: socket.context("open a packet socket")?,
            ethernet: Link::Ethernet {
                from: octets(&ours)?,
                to: octets(&theirs)?,
            },
            router,
            server,
            frames: HashMap::new(),
            cores: cores.clone(),
            _lab: lab,
        })
    }

    /// Sends as fast as one CPU can for `duration`. A frame that goes astray is a wrong result.
    pub(super) fn flood(
        &mut self,
        size: Size,
        direction: Direction,
        duration: Duration,
    ) -> Result<Flood, Failure> {
        let frames = match self.frames.remove(&(size, direction)) {
            Some(frames) => frames,
            None => {
                let frames = self.open(size, direction)?;
                self.forwarder.settle()?;
                frames
            }
        };
        let sink = match direction {
            Direction::Up => Sink::Tun(&self.tun),
            Direction::Down => Sink::Socket(&self.socket),
        };
        // Answers of the handshake, for one.
        io::empty(&self.tun).context("empty the TUN queue")?;
        let alone = self.cores.ends != [self.cores.router];
        let reader = (direction == Direction::Down && self.forwarder.kind() != Kind::Drop)
            .then(|| Reader::start(&self.tun, &self.cores.ends, alone))
            .transpose()?;
        let before = self.passed(direction)?;
        let fast = self.forwarder.fast(direction)?;
        let work = cpu::work_on(self.cores.router, || sink.flood(&frames, duration))?;
        let sent = work.value;
        let passed = self.await_passed(direction, before, sent)?;
        let arrived = reader.map_or(Ok(passed), Reader::finish)?;
        let flood = Flood {
            sent,
            overflow: passed.saturating_sub(arrived),
            elapsed: work.elapsed,
            cpu: work.cpu,
        };
        self.frames.insert((size, direction), frames);
        if passed != sent {
            return Err(Failure::Wrong(format!(
                "of {sent} frames {passed} came out of the router"
            )));
        }
        if let (Some(before), Some(after)) = (fast, self.forwarder.fast(direction)?)
            && after - before < sent
        {
            return Err(Failure::Wrong(format!(
                "of {sent} frames {} took the fast path, by its counters",
                after - before
            )));
        }
        Ok(flood)
    }

    /// Nanoseconds that the fast path's program takes per frame in a flood, by the kernel's own
    /// statistics (one reading of its clock included); `None` for what has no fast path. Counting
    /// slows the program's neighbours down, so it is a flood of its own.
    pub(super) fn program_time(
        &mut self,
        size: Size,
        direction: Direction,
        duration: Duration,
    ) -> Result<Option<f64>, Failure> {
        let run_time = |bed: &Self| bed.forwarder.run_time(direction);
        if run_time(self)?.is_none() {
            return Ok(None);
        }
        let counting = aya::sys::enable_stats(aya::sys::Stats::RunTime);
        let _counting = counting.context("count the run time of programs")?;
        let before = run_time(self)?;
        self.flood(size, direction, duration)?;
        let (Some(before), Some(after)) = (before, run_time(self)?) else {
            return Ok(None);
        };
        let runs = (after.1 - before.1).max(1);
        Ok(Some((after.0 - before.0).as_nanos() as f64 / runs as f64))
    }

    /// Frames that have left the router so far.
    fn passed(&self, direction: Direction) -> anyhow::Result<u64> {
        match (self.forwarder.kind(), direction) {
            (Kind::Drop, Direction::Up) => counted(&self.router, TUN),
            (Kind::Drop, Direction::Down) => counted(&self.router, NIC),
            (_, Direction::Up) => counted(&self.server, NIC),
            // What was read from the queue, and what found it full.
            (_, Direction::Down) => {
                let device = &self.router.ip(&format!("-j -s link show {TUN}"))?;
                let count = |name: &str| {
                    let json: serde_json::Value = serde_json::from_str(device).ok()?;
                    json[0]["stats64"]["tx"][name].as_u64()
                };
                let total = count("packets").zip(count("dropped"));
                total
                    .map(|(a, b)| a + b)
                    .context("read the TUN device's counters")
            }
        }
    }

    /// Waits until `sent` frames have left the router since `before`, or no more do; returns how
    /// many did.
    fn await_passed(&self, direction: Direction, before: u64, sent: u64) -> anyhow::Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        let mut last = (u64::MAX, Instant::now());
        loop {
            let passed = self.passed(direction)? - before;
            if passed != last.0 {
                last = (passed, Instant::now());
            }
            let quiet = last.1.elapsed() > Duration::from_millis(300);
            if passed >= sent || quiet || Instant::now() > deadline {
                return Ok(passed);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Opens the flows of `size` from the overlay's side, checks what becomes of their first
    /// packets, and makes the frames.
    fn open(&self, size: Size, direction: Direction) -> Result<Vec<Vec<u8>>, Failure> {
        let server = SocketAddrV4::new(SERVER, SERVER_PORT);
        let clients: Vec<SocketAddrV4> = (0..size.flows())
            .map(|flow| SocketAddrV4::new(CLIENT, size.first_port() + flow))
            .collect();
        let outside = match (self.forwarder.kind(), size) {
            (Kind::Drop, _) => clients.clone(),
            (_, Size::Super) => vec![self.open_tcp(clients[0], server)?],
            (_, Size::Small | Size::Mtu) => self.open_udp(&clients, server, size)?,
        };
        let ends = (0u16..).zip(clients.iter().zip(outside));
        let frame = |(flow, (client, outside)): (u16, (&SocketAddrV4, SocketAddrV4))| {
            let (link, from, to) = match direction {
                Direction::Up => (Link::Tun, *client, server),
                Direction::Down => (self.ethernet, server, outside),
            };
            match size {
                Size::Super => frame::tcp(link, from, to, Segment::Data),
                Size::Small | Size::Mtu => frame::udp(link, from, to, size, flow),
            }
        };
        Ok(ends.map(frame).collect())
    }

    /// Sends the first packet of each flow and returns the addresses that the server sees them
    /// come from.
    fn open_udp(
        &self,
        clients: &[SocketAddrV4],
        server: SocketAddrV4,
        size: Size,
    ) -> Result<Vec<SocketAddrV4>, Failure> {
        /// As many as the capture's buffer surely holds.
        const AT_ONCE: usize = 32;
        let capture = self.server.capture(NIC)?;
        let mut outside: Vec<Option<SocketAddrV4>> = vec![None; clients.len()];
        for start in (0..clients.len()).step_by(AT_ONCE) {
            let flows = start..clients.len().min(start + AT_ONCE);
            for flow in flows.clone() {
                let frame = frame::udp(Link::Tun, clients[flow], server, size, flow as u16);
                self.up(&frame)?;
            }
            lab::poll(PATIENCE, "the first packets of UDP flows", || {
                for first in capture.drain(|packet| first_of_udp(packet, size)) {
                    let first = first.and_then(|(flow, from)| Ok((flow, self.expected(from)?)));
                    match first {
                        Ok((flow, from)) => outside[flow as usize] = Some(from),
                        Err(wrong) => return Some(Err(wrong)),
                    }
                }
                let all = outside[flows.clone()].iter().all(Option::is_some);
                all.then_some(Ok(()))
            })?
            .map_err(Failure::Wrong)?;
        }
        Ok(outside.into_iter().flatten().collect())
    }

    /// Shakes hands for a TCP flow, and returns the address that the server sees it come from.
    fn open_tcp(
        &self,
        client: SocketAddrV4,
        server: SocketAddrV4,
    ) -> Result<SocketAddrV4, Failure> {
        let capture = self.server.capture(NIC)?;
        self.up(&frame::tcp(Link::Tun, client, server, Segment::Syn))?;
        let (outside, mss) = capture.find(PATIENCE, "a SYN", |packet| {
            Some((source(packet)?, packet.syn_mss()?))
        })?;
        let outside = self.expected(outside).map_err(Failure::Wrong)?;
        let expected = self.forwarder.kind().mss();
        if mss != expected {
            return Err(Failure::Wrong(format!("the MSS is {mss}, not {expected}")));
        }
        let answer = frame::tcp(self.ethernet, server, outside, Segment::SynAck);
        Sink::Socket(&self.socket)
            .send(&answer)
            .context("send a SYN-ACK")?;
        self.up(&frame::tcp(Link::Tun, client, server, Segment::Ack))?;
        capture.find(PATIENCE, "the end of the handshake", |packet| {
            (packet.protocol == TCP && packet.syn_mss().is_none()).then_some(())
        })?;
        Ok(outside)
    }

    /// `from`, if it is translated where it should be and only there.
    fn expected(&self, from: SocketAddrV4) -> Result<SocketAddrV4, String> {
        let wanted = match self.forwarder.kind().translates() {
            true => ROUTER,
            false => CLIENT,
        };
        if *from.ip() == wanted {
            Ok(from)
        } else {
            Err(format!("packets come from {from}, not from {wanted}"))
        }
    }

    fn up(&self, frame: &[u8]) -> anyhow::Result<()> {
        Sink::Tun(&self.tun)
            .send(frame)
            .context("write to the TUN queue")
    }
}

fn source(packet: &Packet<'_>) -> Option<SocketAddrV4> {
    match packet.source {
        IpAddr::V4(ip) => Some(SocketAddrV4::new(ip, packet.ports()?.0)),
        IpAddr::V6(_) => None,
    }
}

/// Flow and source of a UDP packet, or what is wrong with it after one hop.
fn first_of_udp(packet: &Packet<'_>, size: Size) -> Option<Result<(u32, SocketAddrV4), String>> {
    if packet.protocol != UDP {
        return None;
    }
    let stamp = packet.payload.get(8..).and_then(Stamp::read);
    Some(match stamp {
        Some(stamp) if packet.len == size.bytes() && packet.ttl == 63 => {
            Ok((stamp.flow, source(packet)?))
        }
        Some(_) => Err(format!(
            "{} bytes with a TTL of 64 arrived as {} bytes with {}",
            size.bytes(),
            packet.len,
            packet.ttl
        )),
        None => Err("a packet arrived with another payload".to_owned()),
    })
}

/// Makes `host` drop and count everything that arrives on `device`, as early as nf_tables can.
pub(super) fn drop_and_count(host: &Host, device: &str) -> anyhow::Result<()> {
    let rules = format!(
        "table netdev {device} {{ counter arrived {{ }}; chain everything {{ \
         type filter hook ingress device {device} priority 0; counter name \"arrived\" drop; }}; }}"
    );
    let nft = host.command(["nft", "-f", "-"]).stdin(rules);
    nft.run().map(drop)
}

/// What [`drop_and_count`] has counted.
fn counted(host: &Host, device: &str) -> anyhow::Result<u64> {
    let text = host.run(["nft", "-j", "list", "counter", "netdev", device, "arrived"])?;
    let json: serde_json::Value = serde_json::from_str(&text)?;
    let objects = json["nftables"].as_array().into_iter().flatten();
    let count = objects
        .filter_map(|o| o["counter"]["packets"].as_u64())
        .next();
    count.with_context(|| format!("nft tells no counter: {text}"))
}

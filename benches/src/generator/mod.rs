//! A load generator that the client does not limit: WireGuard peers without a TUN device.
//!
//! Up, it seals inner UDP packets in batches and hands them to the kernel as GSO super-packets, so
//! that one core sends far more than any router here forwards. Down, a socket in the server's
//! namespace sends clear UDP, one packet each as from a NIC, and the generator opens what arrives.
//! Every packet is stamped and every payload checked, so loss, doubles, reordering and corruption
//! are counted, not estimated. Receivers poll by the clock instead of sleeping in the socket: a
//! wake-up would be paid by whoever delivers, and that is the router.

mod ceiling;
mod pace;
pub(crate) mod packet;
mod receive;
mod send;
mod tally;
mod traffic;
mod tunnel;
mod udp;

#[cfg(test)]
mod tests;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use router::wireguard::keys::{PrivateKey, PublicKey};

pub use ceiling::ceiling;
pub use pace::Rate;
pub use tally::Tally;
pub use traffic::{Counts, Summary, Traffic};

use packet::{Flow, STAMP, Stamp};
use traffic::{Plan, lock, unique};
use tunnel::{OVERHEAD, SLACK, Tunnel};
use udp::{Receiver, Run, Sender};

/// Receive buffer of every socket, in bytes: a few milliseconds of the fastest traffic.
const SOCKET_BUFFER: i32 = 32 << 20;
/// Source port of flow 0 on each peer's address.
const FIRST_PORT: u16 = 10_000;
/// Most flows of a peer: each has a source port of its own.
const MOST_FLOWS: u32 = 50_000;
/// From one handshake to the next: many a router asks for cookies when more come.
const BETWEEN_HANDSHAKES: Duration = Duration::from_micros(2500);

/// One peer that the generator plays.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Its private key.
    pub private: PrivateKey,
    /// Its overlay address, which the router has in the peer's allowed IPs.
    pub address: Ipv4Addr,
}

/// Where packets go.
#[derive(Clone, Debug)]
pub struct Target {
    /// The router's underlay address.
    pub endpoint: SocketAddrV4,
    /// The router's public key.
    pub router: PublicKey,
    /// The server behind the router.
    pub server: SocketAddrV4,
}

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the peers to the server: the router opens.
    Up,
    /// From the server to the peers: the router seals.
    Down,
}

/// What to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Which way.
    pub direction: Direction,
    /// Bytes of UDP payload, 24 and more.
    pub payload: u16,
    /// Flows, spread evenly over the peers; at least one per peer is used.
    pub flows: u32,
    /// How fast.
    pub rate: Rate,
}

/// The generator: sessions with the router, and the server's socket.
pub struct Generator {
    /// Held by one thread for the whole of a run.
    tunnels: Arc<Mutex<Vec<Tunnel>>>,
    peers: Vec<Peer>,
    target: Target,
    server: UdpSocket,
}

/// When sessions began anew.
#[derive(Clone, Copy, Debug)]
pub struct Resumed {
    /// The router's first message came.
    pub first: Instant,
    /// A message of the last of the sessions came.
    pub last: Instant,
}

impl Generator {
    /// Shakes hands with the router for each of `peers`. `client` makes an unconnected UDP socket
    /// in the client's network namespace; `server` is bound to the target's server address in the
    /// server's.
    pub fn connect(
        peers: Vec<Peer>,
        target: Target,
        server: UdpSocket,
        mut client: impl FnMut() -> anyhow::Result<UdpSocket>,
    ) -> anyhow::Result<Self> {
        udp::prepare(&server, SOCKET_BUFFER).context("prepare the server's socket")?;
        let mut receiver = Receiver::new();
        let mut tunnels = Vec::new();
        let begin = Instant::now();
        for (index, peer) in (0u32..).zip(&peers) {
            let turn = begin + BETWEEN_HANDSHAKES * index;
            std::thread::sleep(turn.saturating_duration_since(Instant::now()));
            let socket = client()?;
            udp::prepare(&socket, SOCKET_BUFFER).context("prepare a peer's socket")?;
            socket
                .connect(SocketAddr::V4(target.endpoint))
                .with_context(|| format!("connect to {}", target.endpoint))?;
            let tunnel =
                Tunnel::connect(socket, &peer.private, target.router, index, &mut receiver)?;
            tunnels.push(tunnel);
        }
        if tunnels.is_empty() {
            bail!("the generator needs at least one peer");
        }
        let tunnels = Arc::new(Mutex::new(tunnels));
        Ok(Self {
            tunnels,
            peers,
            target,
            server,
        })
    }

    /// Answers the handshakes that the router begins, until a message of a new session has come to each
    /// peer. No message is under way when this is called.
    pub fn await_sessions(&self, patience: Duration) -> anyhow::Result<Resumed> {
        let deadline = Instant::now() + patience;
        let mut receiver = Receiver::new();
        let mut tunnels = lock(&self.tunnels);
        let mut waiting: Vec<&mut Tunnel> = tunnels.iter_mut().collect();
        let all = waiting.len();
        let mut first = None;
        while !waiting.is_empty() {
            let mut broken = None;
            waiting.retain_mut(
                |tunnel| match tunnel.heard_anew(&mut receiver, &mut first) {
                    Ok(heard) => !heard,
                    Err(error) => {
                        broken = Some(error);
                        true
                    }
                },
            );
            if let Some(error) = broken {
                return Err(error);
            }
            if Instant::now() > deadline {
                bail!(
                    "{} of {all} peers had no session within {patience:?}",
                    waiting.len()
                );
            }
            std::thread::sleep(receive::PAUSE);
        }
        let last = Instant::now();
        Ok(Resumed {
            first: first.unwrap_or(last),
            last,
        })
    }

    /// Starts sending and counting in threads of their own. They inherit the caller's CPUs.
    pub fn start(&mut self, load: Load) -> anyhow::Result<Traffic<'_>> {
        if usize::from(load.payload) < STAMP {
            bail!("a payload of the generator has at least {STAMP} bytes");
        }
        let flows = load.flows.max(self.peers.len() as u32);
        if flows > MOST_FLOWS * self.peers.len() as u32 {
            bail!("the generator has {MOST_FLOWS} flows of a peer at most");
        }
        // Also unlike the runs of other processes: no namespace is shared, but an address may be.
        let run = std::process::id() << 16 ^ unique();
        let plan = Plan { load, flows, run };
        let flows = self.flows(flows, load.payload);
        match load.direction {
            Direction::Up => traffic::up(self, plan, flows),
            Direction::Down => {
                let addresses = self.open_flows(&flows, run)?;
                traffic::down(self, plan, addresses)
            }
        }
    }

    /// Flow `i` belongs to peer `i` modulo the number of peers.
    fn flows(&self, count: u32, payload: u16) -> Vec<Flow> {
        (0..count)
            .zip(self.peers.iter().cycle())
            .map(|(i, peer)| {
                let port = FIRST_PORT + (i / self.peers.len() as u32) as u16;
                let from = SocketAddrV4::new(peer.address, port);
                Flow::new(from, self.target.server, payload)
            })
            .collect()
    }

    /// Sends a packet up each flow until the server has seen all of them, and yields the address
    /// that each has on the server's side: behind source NAT a flow down begins with one up.
    fn open_flows(&self, flows: &[Flow], run: u32) -> anyhow::Result<Vec<SocketAddrV4>> {
        const DEADLINE: Duration = Duration::from_secs(10);
        const RETRY: Duration = Duration::from_millis(200);
        let mut found: Vec<Option<SocketAddrV4>> = vec![None; flows.len()];
        let mut missing = flows.len();
        let mut receiver = Receiver::new();
        let mut sender = Sender::default();
        let mut inner = Vec::new();
        let mut outer = Vec::new();
        let mut tunnels = lock(&self.tunnels);
        let deadline = Instant::now() + DEADLINE;
        while missing > 0 {
            if Instant::now() > deadline {
                bail!(
                    "{missing} of {} flows reached no server within {DEADLINE:?}",
                    flows.len()
                );
            }
            for (i, flow) in flows
                .iter()
                .enumerate()
                .filter(|(i, _)| found[*i].is_none())
            {
                let tunnel = &mut tunnels[i % self.peers.len()];
                inner.resize(flow.size(), 0);
                outer.resize(inner.len() + OVERHEAD + SLACK, 0);
                flow.write(
                    Stamp {
                        run,
                        flow: i as u32,
                        sequence: 0,
                    },
                    &mut inner,
                );
                let length = tunnel.seal(&inner, &mut outer)?;
                let run = Run {
                    range: 0..length,
                    segment: length as u16,
                    to: None,
                };
                sender
                    .send(&tunnel.socket, &outer, &[run])
                    .context("open a flow")?;
            }
            let retry = Instant::now() + RETRY;
            while missing > 0 && Instant::now() < retry {
                if !receiver
                    .receive(&self.server)
                    .context("receive at the server")?
                {
                    std::thread::sleep(receive::PAUSE);
                }
                for (from, payload) in receiver.datagrams() {
                    let stamp = Stamp::read(payload).filter(|stamp| stamp.run == run);
                    let place = stamp.and_then(|stamp| found.get_mut(stamp.flow as usize));
                    if let Some(place) = place
                        && place.replace(from).is_none()
                    {
                        missing -= 1;
                    }
                }
            }
        }
        Ok(found.into_iter().flatten().collect())
    }
}

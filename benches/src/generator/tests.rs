//! The generator against a small router of its own on loopback, which can be made to misbehave.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use router::wireguard::keys::PrivateKey;

use super::packet::{Flow, HEADERS, payload_of};
use super::*;

/// What the router does to its packets.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    DropEveryTenth,
    DoubleEveryTenth,
    CorruptEveryTenth,
    DelayEveryTenth,
}

/// A WireGuard router on loopback: it opens packets and sends their payload to the server from one
/// socket per flow, and back.
struct Loop {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Loop {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

struct Session {
    tunn: Tunn,
    from: SocketAddr,
}

struct LoopRouter {
    socket: UdpSocket,
    private: PrivateKey,
    server: SocketAddrV4,
    fault: Fault,
    sessions: Vec<Session>,
    flows: HashMap<SocketAddrV4, (UdpSocket, usize)>,
    seen: u64,
    held: Option<(SocketAddrV4, Vec<u8>)>,
}

impl LoopRouter {
    fn initiation(&mut self, from: SocketAddr, datagram: &[u8]) {
        let secret = StaticSecret::from(*self.private.expose());
        let public = PublicKey::from(self.private.public().0);
        let Ok(Packet::HandshakeInit(init)) = Tunn::parse_incoming_packet(datagram) else {
            return;
        };
        let peer = parse_handshake_anon(&secret, &public, &init)
            .unwrap()
            .peer_static_public;
        let index = self.sessions.len() as u32;
        let mut tunn = Tunn::new(secret, PublicKey::from(peer), None, None, index, None);
        let mut answer = [0; 256];
        if let TunnResult::WriteToNetwork(m) =
            tunn.decapsulate(Some(from.ip()), datagram, &mut answer)
        {
            self.socket.send_to(m, from).unwrap();
            self.sessions.push(Session { tunn, from });
        }
    }

    fn outer(&mut self, from: SocketAddr, datagram: &[u8]) {
        if datagram[0] == 1 {
            return self.initiation(from, datagram);
        }
        let mut opened = [0; 2048];
        let Some(at) = self.sessions.iter().position(|s| s.from == from) else {
            return;
        };
        let result = self.sessions[at]
            .tunn
            .decapsulate(Some(from.ip()), datagram, &mut opened);
        let TunnResult::WriteToTunnelV4(inner, source) = result else {
            return;
        };
        let payload = payload_of(inner).unwrap().to_vec();
        let port = u16::from_be_bytes([inner[20], inner[21]]);
        self.forward(at, SocketAddrV4::new(source, port), payload);
    }

    fn forward(&mut self, session: usize, flow: SocketAddrV4, mut payload: Vec<u8>) {
        self.seen += 1;
        let server = self.server;
        let (socket, _) = self.flows.entry(flow).or_insert_with(|| {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.connect(server).unwrap();
            (socket, session)
        });
        let send = |payload: &[u8]| assert_eq!(socket.send(payload).unwrap(), payload.len());
        match self.fault {
            Fault::None => send(&payload),
            _ if !self.seen.is_multiple_of(10) => send(&payload),
            Fault::DropEveryTenth => {}
            Fault::DoubleEveryTenth => {
                send(&payload);
                send(&payload);
            }
            Fault::CorruptEveryTenth => {
                payload[30] ^= 1;
                send(&payload);
            }
            Fault::DelayEveryTenth => {
                self.held = Some((flow, payload));
                return;
            }
        }
        if let Some((flow, payload)) = self.held.take() {
            self.flows[&flow].0.send(&payload).unwrap();
        }
    }

    fn inner(&mut self) -> bool {
        let mut buffer = [0; 2048];
        let mut any = false;
        for (flow, (socket, session)) in &self.flows {
            while let Ok(length) = socket.recv(&mut buffer) {
                any = true;
                let mut packet = vec![0; HEADERS + length];
                Flow::new(self.server, *flow, length as u16).carry(&buffer[..length], &mut packet);
                let mut out = [0; 2048];
                let session = &mut self.sessions[*session];
                if let TunnResult::WriteToNetwork(m) = session.tunn.encapsulate(&packet, &mut out) {
                    self.socket.send_to(m, session.from).unwrap();
                }
            }
        }
        any
    }
}

/// Starts a router and connects a generator of `peers` to it.
fn generator(peers: u8, fault: Fault) -> (Loop, Generator) {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let v4 = |socket: &UdpSocket| match socket.local_addr().unwrap() {
        SocketAddr::V4(address) => address,
        SocketAddr::V6(_) => unreachable!("bound to an IPv4 address"),
    };
    let private = PrivateKey::generate().unwrap();
    let target = Target {
        endpoint: v4(&socket),
        router: private.public(),
        server: v4(&server),
    };
    let mut router = LoopRouter {
        socket,
        private,
        server: target.server,
        fault,
        sessions: Vec::new(),
        flows: HashMap::new(),
        seen: 0,
        held: None,
    };
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let thread = std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while !stopped.load(Ordering::Relaxed) {
            let mut any = router.inner();
            while let Ok((length, from)) = router.socket.recv_from(&mut buffer) {
                any = true;
                router.outer(from, &buffer[..length]);
            }
            if !any {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    });
    let running = Loop {
        stop,
        thread: Some(thread),
    };
    let peers = (1..=peers)
        .map(|i| Peer {
            private: PrivateKey::generate().unwrap(),
            address: Ipv4Addr::new(10, 9, 0, i),
        })
        .collect();
    let client = || Ok(UdpSocket::bind("127.0.0.1:0")?);
    (
        running,
        Generator::connect(peers, target, server, client).unwrap(),
    )
}

/// Sends gently until at least `packets` were sent.
fn send(generator: &mut Generator, direction: Direction, flows: u32, packets: u64) -> Summary {
    let load = Load {
        direction,
        payload: 64,
        flows,
        rate: Rate::Paced(5000),
    };
    let traffic = generator.start(load).unwrap();
    lab::wait_until(Duration::from_secs(30), "packets sent", || {
        traffic.counts().sent >= packets
    })
    .unwrap();
    traffic.finish().unwrap()
}

#[test]
fn everything_arrives_both_ways_over_several_peers_and_flows() {
    let (_router, mut generator) = generator(3, Fault::None);
    for direction in [Direction::Up, Direction::Down, Direction::Up] {
        for flows in [1, 7] {
            let summary = send(&mut generator, direction, flows, 500);
            assert!(summary.sent >= 500);
            let expected = Tally {
                received: summary.sent,
                ..Tally::default()
            };
            assert_eq!(summary.tally, expected, "{direction:?} {flows}");
            assert_eq!((summary.lost(), summary.overflow), (0, 0));
        }
    }
}

#[test]
fn what_a_router_does_to_packets_is_seen() {
    for fault in [
        Fault::DropEveryTenth,
        Fault::DoubleEveryTenth,
        Fault::CorruptEveryTenth,
        Fault::DelayEveryTenth,
    ] {
        let (_router, mut generator) = generator(1, fault);
        let Summary { sent, tally, .. } = send(&mut generator, Direction::Up, 1, 500);
        let tenth = sent / 10;
        let whole = Tally {
            received: sent,
            ..Tally::default()
        };
        let expected = match fault {
            Fault::None => whole,
            Fault::DropEveryTenth => Tally {
                received: sent - tenth,
                ..whole
            },
            Fault::DoubleEveryTenth => Tally {
                duplicated: tenth,
                ..whole
            },
            Fault::CorruptEveryTenth => Tally {
                received: sent - tenth,
                corrupted: tenth,
                ..whole
            },
            // The last packet may still be held.
            Fault::DelayEveryTenth => {
                assert!(sent - tally.received <= 1);
                Tally {
                    received: tally.received,
                    reordered: (sent - 1) / 10,
                    ..whole
                }
            }
        };
        assert_eq!(tally, expected);
    }
}

#[test]
fn the_ceiling_is_measured_into_a_socket_that_drops() {
    let sink = UdpSocket::bind("127.0.0.1:0").unwrap();
    let peers = vec![Peer {
        private: PrivateKey::generate().unwrap(),
        address: Ipv4Addr::new(10, 9, 0, 1),
    }];
    let load = Load {
        direction: Direction::Up,
        payload: 64,
        flows: 4,
        rate: Rate::Flood,
    };
    let client = || Ok(UdpSocket::bind("127.0.0.1:0")?);
    let summary = ceiling(load, peers, sink, client, Duration::from_millis(50)).unwrap();
    assert!(summary.sent > 0);
    assert_eq!(summary.tally.received, 0);
}

#[test]
fn a_router_that_is_not_there_is_an_error_not_a_hang() {
    let target = Target {
        endpoint: "127.0.0.1:9".parse().unwrap(),
        router: PrivateKey::generate().unwrap().public(),
        server: "127.0.0.1:9".parse().unwrap(),
    };
    let peer = Peer {
        private: PrivateKey::generate().unwrap(),
        address: Ipv4Addr::new(10, 9, 0, 1),
    };
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let client = || Ok(UdpSocket::bind("127.0.0.1:0")?);
    let error = Generator::connect(vec![peer], target, server, client)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("no WireGuard handshake"),
        "{error}"
    );
}

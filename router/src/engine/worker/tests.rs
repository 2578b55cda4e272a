//! A worker's turns: whatever waits at one place, all others have their turn soon.

use std::net::UdpSocket;
use std::os::fd::{AsRawFd as _, FromRawFd as _};

use super::*;
use crate::engine::forward::directory::{Directory, Keys};
use crate::engine::forward::peer::{Setup, Shared};
use crate::engine::forward::port::Place;
use crate::engine::forward::routes::Routes;
use crate::engine::io::exchange;
use crate::engine::io::udp::{Bind, Underlay};
use crate::engine::offload::coalesce::Offload;
use crate::engine::offload::segment::{SLACK, Segments};
use crate::engine::packets::Flow;
use crate::wireguard::keys::PrivateKey;
use crate::wireguard::message::INITIATION;
use crate::wireguard::{Arena, LocalKey, Packets as _, Tunnel};

const NOW: Duration = Duration::ZERO;
const DEADLINE: Duration = Duration::from_secs(10);
/// What comes beyond a turn.
const MORE: usize = 5;

/// A worker without peers, which drops whatever it takes until it has one. Its device is a socket.
struct Bench {
    forwarder: Forwarder,
    queue: Queue,
    /// The device's other end.
    device: OwnedFd,
    sockets: Arc<Sockets>,
    client: UdpSocket,
    exchanges: Vec<Exchange>,
    waker: Arc<Waker>,
    counters: Arc<Counters>,
    local: Arc<LocalKey>,
    listener: Option<Listener>,
}

impl Bench {
    fn new() -> Self {
        let (worker, workers) = (0, 2);
        let local = Arc::new(LocalKey::new(&PrivateKey::from_bytes([1; 32])));
        let offload = Offload {
            vnet: true,
            tcp: true,
            udp: true,
        };
        let counters = Arc::new(Counters::new());
        let mut underlay = Underlay::bind(Bind {
            port: 0,
            mark: 0,
            workers: 1,
            gro: false,
            others: true,
        })
        .unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(("127.0.0.1", underlay.port)).unwrap();
        let mut ends = [0; 2];
        // SAFETY: the kernel writes two descriptors to an array that lives for the call.
        let done = unsafe {
            let kind = libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
            libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr())
        };
        assert_eq!(done, 0);
        // SAFETY: both descriptors are new, and nobody else has them.
        let [device, queue] = ends.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
        let place = Place { worker, workers };
        let wakers: Vec<_> = (0..workers)
            .map(|_| Arc::new(Waker::new().unwrap()))
            .collect();
        Self {
            forwarder: Forwarder::new(place, 1420, local.clone(), offload, false, counters.clone()),
            local,
            queue: Queue::from(queue),
            device,
            sockets: Arc::new(underlay.sockets.remove(0)),
            client,
            exchanges: exchange::connect(&wakers).0,
            waker: wakers[0].clone(),
            counters,
            listener: None,
        }
    }

    /// Does a piece of the worker's work; gives how much it has counted so far.
    fn work(&mut self, counter: Counter, work: impl FnOnce(&mut Forwarder, &mut Port<'_>)) -> u64 {
        let mut port = Port {
            queue: &self.queue,
            outlet: Outlet::new(self.sockets.clone(), &self.counters),
            exchange: self.exchanges.remove(0),
            counters: &self.counters,
            listener: self.listener.clone(),
            inside: None,
            watcher: None,
        };
        work(&mut self.forwarder, &mut port);
        self.exchanges.insert(0, port.exchange);
        self.counters.get(counter)
    }

    /// A turn at the socket of sessions; gives how many packets have come out of them so far.
    fn turn(&mut self, receiver: &mut Receiver) -> u64 {
        let sockets = self.sockets.clone();
        self.work(Counter::RxPackets, |forwarder, port| {
            let socket = sockets.v4.as_ref().unwrap();
            receive(forwarder, port, receiver, socket, RECEIVES, NOW);
        })
    }

    /// A session: the peer's end of it.
    fn session(&mut self) -> Tunnel {
        const INDEX: u32 = 0x0012_3456;
        let key = LocalKey::new(&PrivateKey::from_bytes([2; 32]));
        let change = Change {
            add: vec![Setup {
                id: 0,
                public_key: key.public(),
                preshared_key: None,
                index: INDEX,
                endpoints: Vec::new(),
                keepalive: None,
                roaming: true,
                shared: Arc::new(Shared::new(key.public())),
            }],
            directory: Some(Arc::new(Directory {
                routes: Routes::new([("0.0.0.0/0".parse().unwrap(), 0)]),
                keys: Keys::from_iter([(key.public(), 0)]),
                owners: vec![0],
            })),
            ..Change::default()
        };
        let sockets = self.sockets.clone();
        self.work(Counter::RxPackets, |forwarder, port| {
            forwarder.apply(change, NOW, port);
        });
        let mut tunnel = Tunnel::new(&key, &self.local.public(), None, INDEX + 1);
        let mut message = [0; INITIATION];
        tunnel.initiate_again(&mut message);
        self.client.send(&message).unwrap();
        let mut strangers = Receiver::new(STRANGERS.0, STRANGERS.1);
        self.work(Counter::RxPackets, |forwarder, port| {
            let socket = sockets.strangers[0].as_ref().unwrap();
            receive(forwarder, port, &mut strangers, socket, 1, NOW);
        });
        let mut response = [0; 256];
        self.client.set_read_timeout(Some(DEADLINE)).unwrap();
        let length = self.client.recv(&mut response).unwrap();
        let done = tunnel.handshake(&response[..length], NOW, &mut message);
        let (Some(length), true) = done.unwrap() else {
            panic!("no session");
        };
        self.client.send(&message[..length]).unwrap();
        tunnel
    }

    /// Packets that the worker has written to its device since the last look.
    fn written(&self) -> Vec<Vec<u8>> {
        let mut packets = Vec::new();
        let mut buffer = vec![0; READ + SLACK];
        loop {
            // SAFETY: pointer and length are those of a live vector.
            let length = unsafe {
                let fd = self.device.as_raw_fd();
                libc::recv(fd, buffer.as_mut_ptr().cast(), READ, libc::MSG_DONTWAIT)
            };
            let Ok(length) = usize::try_from(length) else {
                return packets;
            };
            let (header, packet) = buffer.split_first_chunk_mut().unwrap();
            let header = vnet::Header::decode(header).unwrap();
            let mut segments = Segments::new(header, packet, length - vnet::LEN, 0).unwrap();
            while let Some(segment) = segments.next() {
                packets.push(segment.to_vec());
            }
        }
    }
}

/// Sends what is sealed.
struct Outbox<'a> {
    client: &'a UdpSocket,
    slot: Vec<u8>,
}

impl Arena for Outbox<'_> {
    fn slot(&mut self, length: usize) -> &mut [u8] {
        self.slot = vec![0; length];
        &mut self.slot
    }

    fn filled(&mut self, length: usize) {
        self.client.send(&self.slot[..length]).unwrap();
    }
}

/// No packet is kept while the worker sleeps.
#[test]
fn what_a_turn_has_taken_is_with_the_device_when_it_ends() {
    const FLOWS: usize = 12;
    let mut bench = Bench::new();
    let mut tunnel = bench.session();
    let mut receiver = Receiver::new(BUFFERS.0, BUFFERS.1);
    bench.turn(&mut receiver);
    // The last call of a turn fills some buffers, or none.
    let most = (RECEIVES - 1) * BUFFERS.0;
    for count in [most + MORE, most] {
        let mut sent: Vec<_> = (0..count)
            .map(|number| {
                let flow = Flow {
                    ports: (1000 + (number % FLOWS) as u16, 443),
                    ..Flow::new(false, false)
                };
                flow.packet(0, 0, 0, &[number as u8; 64])
            })
            .collect();
        for packet in &sent {
            let mut buffer = [&packet[..], &[0; SLACK]].concat();
            let plain = vnet::Header::PLAIN;
            let mut packets = Segments::new(plain, &mut buffer, packet.len(), 0).unwrap();
            let mut outbox = Outbox {
                client: &bench.client,
                slot: Vec::new(),
            };
            tunnel.seal(&mut packets, NOW, &mut outbox);
        }
        let before = bench.counters.get(Counter::RxPackets);
        assert_eq!(bench.turn(&mut receiver) - before, count as u64);
        let mut written = bench.written();
        for packets in [&mut sent, &mut written] {
            // With DF the id in the IP header means nothing (RFC 6864).
            for packet in packets.iter_mut() {
                packet.drain(..20);
            }
            packets.sort();
        }
        assert!(written == sent, "{} of {count} packets", written.len());
    }
}

#[test]
fn a_turn_at_the_device_is_bounded() {
    let mut bench = Bench::new();
    let packet = [0x45; 20];
    for _ in 0..READS + MORE {
        // SAFETY: pointer and length are those of a live array.
        let sent = unsafe {
            libc::send(
                bench.device.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
            )
        };
        assert_eq!(sent, 20);
    }
    let mut buffer = vec![0; LEAD + READ + segment::SLACK];
    for expected in [READS, READS + MORE] {
        let reads = bench.work(Counter::TunReads, |forwarder, port| {
            read(forwarder, port, &mut buffer, false, NOW).unwrap();
        });
        assert_eq!(reads, expected as u64);
    }
}

#[test]
fn a_super_packet_that_the_device_refuses_is_not_lost() {
    let mut bench = Bench::new();
    // A timer takes no bytes at all: EINVAL.
    // SAFETY: no pointers are passed, and nobody else has the new descriptor.
    let timer = unsafe {
        OwnedFd::from_raw_fd(libc::timerfd_create(
            libc::CLOCK_MONOTONIC,
            libc::TFD_CLOEXEC,
        ))
    };
    bench.queue = Queue::from(timer);
    let lost = bench.work(Counter::DropTunWrite, |_, port| {
        assert!(!port.write_merged(&[0; 64]));
    });
    assert_eq!((lost, bench.counters.get(Counter::TunRefused)), (0, 1));
    let lost = bench.work(Counter::DropTunWrite, |_, port| port.write(&[0; 64]));
    assert_eq!(lost, 1);
}

#[test]
fn a_turn_at_a_socket_is_bounded() {
    let mut bench = Bench::new();
    let sockets = bench.sockets.clone();
    let mut taken = 0;
    for (kind, size, socket, (buffers, length), calls) in [
        (4, 40, &sockets.v4, BUFFERS, RECEIVES),
        (1, INITIATION, &sockets.strangers[0], STRANGERS, 1),
        (1, 40, &sockets.others[0], STRANGERS, 1),
    ] {
        let turn = buffers * calls;
        let mut datagram = vec![0; size];
        datagram[0] = kind;
        for _ in 0..turn + MORE {
            bench.client.send(&datagram).unwrap();
        }
        let mut receiver = Receiver::new(buffers, length);
        for expected in [turn, MORE] {
            taken += expected as u64;
            let receives = bench.work(Counter::UdpReceives, |forwarder, port| {
                let socket = socket.as_ref().unwrap();
                receive(forwarder, port, &mut receiver, socket, calls, NOW);
            });
            assert_eq!(receives, taken);
        }
    }
}

#[test]
fn a_turn_at_what_others_hand_over_is_bounded_and_more_is_not_forgotten() {
    let mut bench = Bench::new();
    let waker = bench.waker.clone();
    let content = Content::Packet(vnet::Header::PLAIN);
    for _ in 0..PARCELS + MORE {
        assert!(bench.exchanges[1].send(0, content, &[0x45; 20]));
    }
    for expected in [PARCELS, PARCELS + MORE] {
        waker.clear();
        // Nobody's packet.
        let dropped = bench.work(Counter::DropHandOver, |forwarder, port| {
            accept(forwarder, port, &waker, NOW);
        });
        assert_eq!(dropped, expected as u64);
        let mut poll = libc::pollfd {
            fd: waker.as_fd().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which lives for the whole call.
        let woken = unsafe { libc::poll(&mut poll, 1, 0) };
        assert_eq!(woken == 1, expected == PARCELS);
    }
}

#[test]
fn what_is_no_message_goes_to_whoever_asked_and_never_in_front_of_sessions() {
    let mut bench = Bench::new();
    let sockets = bench.sockets.clone();
    let mut receiver = Receiver::new(STRANGERS.0, STRANGERS.1);
    let mut turn = |bench: &mut Bench, counter| {
        bench.client.send(b"TS\xf0\x9f\x92\xac of disco").unwrap();
        bench.work(counter, |forwarder, port| {
            let socket = sockets.others[0].as_ref().unwrap();
            receive(forwarder, port, &mut receiver, socket, 1, NOW);
        })
    };
    assert_eq!(turn(&mut bench, Counter::DropOther), 1);
    let (sender, mut datagrams) = tokio::sync::mpsc::channel(2);
    bench.listener = Some(sender);
    assert_eq!(turn(&mut bench, Counter::RxOther), 1);
    assert_eq!(turn(&mut bench, Counter::RxOther), 2);
    assert_eq!(
        turn(&mut bench, Counter::DropOtherFull),
        1,
        "nobody took them"
    );
    let datagram = datagrams.try_recv().unwrap();
    assert_eq!(&datagram.bytes[..6], [0x54, 0x53, 0xf0, 0x9f, 0x92, 0xac]);
    assert_eq!(datagram.source, bench.client.local_addr().unwrap());
    assert_eq!(datagram.local, Some([127, 0, 0, 1].into()));
    assert_ne!(datagram.interface, 0);
    drop(datagrams);
    assert_eq!(turn(&mut bench, Counter::DropOther), 2);
}

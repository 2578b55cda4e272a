//! A worker's turns: whatever waits at one place, all others have their turn soon.

use std::net::UdpSocket;

use super::super::coalesce::Offload;
use super::super::exchange;
use super::super::forward::Place;
use super::super::udp::{Bind, Underlay};
use super::*;
use crate::wireguard::LocalKey;
use crate::wireguard::keys::PrivateKey;

const NOW: Duration = Duration::ZERO;
/// What comes beyond a turn.
const MORE: usize = 5;

/// A worker without peers, which drops whatever it takes. Its device is a socket.
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
}

impl Bench {
    fn new() -> Self {
        let (worker, workers) = (0, 2);
        let local = Arc::new(LocalKey::new(&PrivateKey::from_bytes([1; 32])));
        let offload = Offload {
            vnet: false,
            tcp: false,
            udp: false,
        };
        let counters = Arc::new(Counters::new());
        let mut underlay = Underlay::bind(Bind {
            port: 0,
            mark: 0,
            workers: 1,
            offload: false,
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
            forwarder: Forwarder::new(place, 1420, local, offload, false, counters.clone()),
            queue: Queue::from(queue),
            device,
            sockets: Arc::new(underlay.sockets.remove(0)),
            client,
            exchanges: exchange::connect(&wakers),
            waker: wakers[0].clone(),
            counters,
        }
    }

    /// Does a piece of the worker's work; gives how much it has counted so far.
    fn work(&mut self, counter: Counter, work: impl FnOnce(&mut Forwarder, &mut Port<'_>)) -> u64 {
        let mut port = Port {
            queue: &self.queue,
            outlet: Outlet::new(self.sockets.clone(), &self.counters),
            exchange: self.exchanges.remove(0),
            counters: &self.counters,
        };
        work(&mut self.forwarder, &mut port);
        self.exchanges.insert(0, port.exchange);
        self.counters.get(counter)
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
fn a_turn_at_a_socket_is_bounded() {
    let mut bench = Bench::new();
    let sockets = bench.sockets.clone();
    let mut taken = 0;
    for (kind, socket, (buffers, length), calls) in [
        (4, &sockets.v4, BUFFERS, RECEIVES),
        (1, &sockets.strangers[0], STRANGERS, 1),
    ] {
        let turn = buffers * calls;
        for _ in 0..turn + MORE {
            bench.client.send(&[kind; 40]).unwrap();
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
            fd: waker.0.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, which lives for the whole call.
        let woken = unsafe { libc::poll(&mut poll, 1, 0) };
        assert_eq!(woken == 1, expected == PARCELS);
    }
}

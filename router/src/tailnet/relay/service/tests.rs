use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use super::*;
use crate::tailnet::disco::Boxes;
use crate::tailnet::relay::server::BIND;
use crate::tailnet::relay::{Handshake, Header, Inner, Message};

const PATIENCE: Duration = Duration::from_secs(10);
/// Of each datagram behind its header.
const LENGTH: usize = 1000;

struct Client {
    secret: DiscoSecret,
    socket: UdpSocket,
    relay: SocketAddr,
}

impl Client {
    fn new(service: &Service, v4: bool) -> Self {
        let (own, relay): (SocketAddr, _) = match v4 {
            true => (
                (Ipv4Addr::LOCALHOST, 0).into(),
                (Ipv4Addr::LOCALHOST, service.port()).into(),
            ),
            false => (
                (Ipv6Addr::LOCALHOST, 0).into(),
                (Ipv6Addr::LOCALHOST, service.port()).into(),
            ),
        };
        let socket = UdpSocket::bind(own).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            secret: DiscoSecret::generate().unwrap(),
            socket,
            relay,
        }
    }

    fn hears(&self) -> Vec<u8> {
        let mut buffer = [0; 2048];
        let (length, from) = self.socket.recv_from(&mut buffer).unwrap();
        assert_eq!(from, self.relay, "from the address that it was sent to");
        buffer[..length].to_vec()
    }

    fn bind(&self, service: &Service, number: u32, remote: DiscoPublic) {
        let mut boxes = Boxes::new(&self.secret);
        let mut says = |message: Message| {
            let sealed = boxes.seal_clear(&service.key(), &message.clear(), [1; 24]);
            let head = Header::to_relay(number).bytes();
            let datagram = [&head[..], &sealed.unwrap()].concat();
            self.socket.send_to(&datagram, self.relay).unwrap();
        };
        let hello = Handshake {
            number,
            generation: 1,
            remote,
            challenge: [0; 32],
        };
        says(Message::Bind(hello));
        let answer = self.hears();
        let (_, sealed) = Header::parse(&answer).unwrap();
        let clear = Boxes::new(&self.secret).open_clear(&service.key(), sealed);
        let Some(Message::Challenge(challenge)) = Message::parse(&clear.unwrap()) else {
            panic!("no challenge");
        };
        says(Message::Answer(challenge));
    }

    /// Datagrams in one message, which arrive in one buffer.
    fn sends(&self, number: u32, count: u8) -> Vec<Vec<u8>> {
        let header = Header {
            inner: Inner::WireGuard,
            control: false,
            number,
        };
        let datagram = |at| [&header.bytes()[..], &[at; LENGTH]].concat();
        let mut all: Vec<Vec<u8>> = (0..count).map(datagram).collect();
        // The last is shorter.
        all.last_mut().unwrap().truncate(20);
        let to = Endpoint {
            remote: self.relay,
            local: None,
            number: None,
        };
        let bytes = all.concat();
        let cut = Cut {
            to: &to,
            bytes: &bytes,
            size: Some(all[0].len()),
            ecn: 0,
        };
        let socket = self.socket.try_clone().unwrap().into();
        let sent = Sender::new().send_cuts(&socket, std::iter::once(cut));
        assert_eq!(sent.unwrap(), 1);
        all
    }
}

#[test]
fn datagrams_are_carried_as_they_are_between_families() {
    let (seen, mut answers) = mpsc::channel(4);
    let service = Service::start(0, 0, seen, Stats::default()).unwrap();
    let clients = [true, false].map(|v4| Client::new(&service, v4));
    let [one, two] = &clients;
    let keys = clients.each_ref().map(|client| client.secret.public());
    let place = service.allocate(keys[0], keys, Instant::now()).unwrap();
    let number = place.number;
    one.bind(&service, number, keys[1]);
    two.bind(&service, number, keys[0]);
    // The second is bound when what it sends arrives.
    for (from, to) in [(two, one), (one, two)] {
        for count in [1, 2, 50] {
            for datagram in from.sends(number, count) {
                assert_eq!(to.hears(), datagram);
            }
        }
    }
    let stats = service.counts().read();
    assert_eq!((stats.open, stats.dropped), (1, [0; 7]));
    for [there, back] in [stats.carried[0], stats.carried[1]] {
        assert_eq!(there.packets + back.packets, 53);
    }
    assert_eq!(stats.carried[0][1].bytes, stats.carried[1][0].bytes);
    // A stranger is not heard, and what a STUN server says goes elsewhere.
    let stranger = Client::new(&service, true);
    stranger.sends(number, 2);
    let mut response = stun::request(&[3; 12]);
    response.truncate(20);
    response[0] = 1;
    response[3] = 12;
    response.extend([0, 1, 0, 8, 0, 1, 4, 210, 198, 51, 100, 77]);
    stranger.socket.send_to(&response, stranger.relay).unwrap();
    let answer = answers.blocking_recv().unwrap();
    assert_eq!(answer.transaction, [3; 12]);
    assert_eq!(answer.mapped, "198.51.100.77:1234".parse().unwrap());
    let counts = service.counts();
    assert_eq!(counts.read().dropped, [0, 0, 2, 0, 0, 0, 0]);
    // Its port is free when it is gone, whoever still looks at what it has carried.
    let port = service.port();
    drop(service);
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
    let before = counts.read();
    assert_eq!(before.open, 1);
    // The next one counts on.
    let next = Service::start(0, 0, mpsc::channel(1).0, before.clone()).unwrap();
    assert_eq!(next.counts().read(), Stats { open: 0, ..before });
}

#[test]
fn a_thread_that_has_ended_is_seen() {
    let service = Service::start(0, 0, mpsc::channel(1).0, Stats::default()).unwrap();
    assert!(!service.has_ended());
    service.ends.store(true, Ordering::Release);
    service.waker.wake();
    let deadline = Instant::now() + PATIENCE;
    while !service.has_ended() {
        assert!(Instant::now() < deadline, "the thread goes on");
        std::thread::yield_now();
    }
}

#[test]
fn a_port_that_is_taken_is_told() {
    let taken = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = Service::start(port, 0, mpsc::channel(1).0, Stats::default()).unwrap_err();
    let text = format!("listen on UDP port {port}: ");
    assert!(error.to_string().starts_with(&text), "{error}");
}

/// Places go in time though nobody says anything.
#[test]
fn the_thread_wakes_for_places_that_end() {
    let service = Service::start(0, 0, mpsc::channel(1).0, Stats::default()).unwrap();
    let keys = [1, 2].map(|byte| DiscoPublic::from_bytes([byte; 32]));
    let long_ago = Instant::now() - 2 * BIND;
    service.allocate(keys[0], keys, long_ago).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while service.counts().read().connecting > 0 {
        assert!(Instant::now() < deadline, "the place stays");
        std::thread::yield_now();
    }
}

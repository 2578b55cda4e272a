//! Sends messages to the underlay, and finds another way for those that the kernel refuses.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::trace;

use crate::engine::counters::{Counter, Counters};
use crate::engine::forward::batch::{Destination, Endpoint, Message, UdpSink};
use crate::engine::forward::routes::PeerId;
use crate::engine::io::udp::Sockets;
use crate::engine::io::udp_io::Sender;
use crate::engine::path::Relayed;

/// What hands messages to a socket.
pub(crate) trait SendMessages {
    /// Hands over messages, all for the socket's family; gives how many it took. An error is about
    /// the first.
    fn send(&mut self, socket: &OwnedFd, arena: &[u8], messages: &[Message]) -> io::Result<usize>;
}

impl SendMessages for Sender {
    fn send(&mut self, socket: &OwnedFd, arena: &[u8], messages: &[Message]) -> io::Result<usize> {
        Self::send(self, socket, arena, messages)
    }
}

/// One worker's way to the underlay.
pub(crate) struct Outlet<'a, S = Sender> {
    sockets: Arc<Sockets>,
    sender: S,
    counters: &'a Counters,
    /// Carries messages to relays, if there is anybody who does.
    pub(crate) carrier: Option<mpsc::Sender<Relayed>>,
    /// Peers whose sticky source the kernel refused.
    pub(crate) stale: Vec<PeerId>,
    /// Peers whose messages the kernel will not cut: the path is too narrow, or the device cannot.
    pub(crate) uncut: Vec<PeerId>,
}

impl<'a> Outlet<'a> {
    /// A way out through a worker's sockets.
    pub(crate) fn new(sockets: Arc<Sockets>, counters: &'a Counters) -> Self {
        Self::through(Sender::new(), sockets, counters)
    }
}

impl<'a, S: SendMessages> Outlet<'a, S> {
    fn through(sender: S, sockets: Arc<Sockets>, counters: &'a Counters) -> Self {
        Self {
            sockets,
            sender,
            counters,
            carrier: None,
            stale: Vec::new(),
            uncut: Vec::new(),
        }
    }

    /// From now on messages go out by these sockets.
    pub(crate) fn rebind(&mut self, sockets: Arc<Sockets>) {
        self.sockets = sockets;
    }

    fn send_to(&mut self, socket: &OwnedFd, arena: &[u8], mut messages: &[Message]) {
        while let [first, after_first @ ..] = messages {
            match self.sender.send(socket, arena, messages) {
                Ok(count) => {
                    let (sent, rest) = messages.split_at(count.clamp(1, messages.len()));
                    self.sent(sent);
                    messages = rest;
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // Waiting would hold up every other peer.
                    Some(libc::EAGAIN | libc::ENOBUFS) => {
                        let same = |message: &&Message| message.to == first.to;
                        let count = messages.iter().take_while(same).count();
                        let (full, rest) = messages.split_at(count);
                        self.dropped(Counter::DropSendFull, full);
                        messages = rest;
                    }
                    _ => {
                        trace!(%error, to = %first.to.path(), "send to the underlay");
                        if first.segments > 1 {
                            self.send_uncut(socket, arena, *first, &error);
                        } else {
                            self.send_sourceless(socket, arena, *first);
                        }
                        messages = after_first;
                    }
                },
            }
        }
    }

    /// The kernel refused a message: sends each datagram by itself, until one is refused.
    fn send_uncut(
        &mut self,
        socket: &OwnedFd,
        arena: &[u8],
        mut message: Message,
        error: &io::Error,
    ) {
        let end = message.offset + message.length;
        for (at, offset) in (message.offset..end).step_by(message.size).enumerate() {
            let length = message.size.min(end - offset);
            let single = Message {
                offset,
                length,
                size: length,
                segments: 1,
                ..message
            };
            if self.sender.send(socket, arena, &[single]).is_ok() {
                self.sent(&[single]);
                // Only what the kernel says of messages that it cannot cut, not a passing trouble.
                let cut = matches!(
                    error.raw_os_error(),
                    Some(libc::EMSGSIZE | libc::EINVAL | libc::EIO)
                );
                if cut && at == 0 {
                    self.uncut.extend(message.peer);
                }
            } else if self.send_sourceless(socket, arena, single) {
                forget_source(&mut message);
            } else {
                let rest = Message {
                    segments: message.segments - at - 1,
                    ..message
                };
                self.dropped(Counter::DropSendError, &[rest]);
                return;
            }
        }
    }

    /// The kernel refused a datagram: our source address may be gone. Tries without, once; true
    /// when that went.
    fn send_sourceless(&mut self, socket: &OwnedFd, arena: &[u8], mut single: Message) -> bool {
        let went = forget_source(&mut single) && self.sender.send(socket, arena, &[single]).is_ok();
        if went {
            self.stale.extend(single.peer);
            self.sent(&[single]);
        } else {
            self.dropped(Counter::DropSendError, &[single]);
        }
        went
    }

    /// Gives messages to whoever carries them to relays.
    fn relay(&mut self, arena: &[u8], messages: &[Message]) {
        for message in messages {
            let (relay, peer) = match message.to {
                Destination::Relay(relay, peer) => (relay, peer),
                Destination::Both(endpoint, relay, peer) => {
                    self.send_too(arena, message, endpoint);
                    (relay, peer)
                }
                Destination::Udp(_) => continue,
            };
            let bytes = &arena[message.offset..message.offset + message.length];
            let relayed = Relayed {
                relay,
                peer,
                bytes: bytes.into(),
                size: message.size,
            };
            let carrier = self.carrier.as_ref();
            let count = datagrams(std::slice::from_ref(message));
            let counter = match carrier.map(|carrier| carrier.try_send(relayed)) {
                Some(Ok(())) => Counter::TxRelayed,
                _ => Counter::DropRelay,
            };
            self.counters.add(counter, count);
        }
    }

    /// Sends what goes through a relay to an address as well.
    fn send_too(&mut self, arena: &[u8], message: &Message, endpoint: Endpoint) {
        let sockets = Arc::clone(&self.sockets);
        let Some(socket) = sockets.of_family(endpoint.remote.is_ipv4()) else {
            return;
        };
        let to = Destination::Udp(endpoint);
        let Some(header) = endpoint.header() else {
            return self.send_to(socket, arena, &[Message { to, ..*message }]);
        };
        let bytes = &arena[message.offset..message.offset + message.length];
        // Half of the datagrams at a time: with headers all of them may be more than a message takes.
        for some in bytes.chunks(message.size * message.segments.div_ceil(2).max(1)) {
            let datagrams = some.chunks(message.size);
            let message = Message {
                offset: 0,
                length: some.len() + datagrams.len() * header.len(),
                size: message.size.min(some.len()) + header.len(),
                segments: datagrams.len(),
                to,
                ..*message
            };
            let mut wrapped = Vec::with_capacity(message.length);
            for datagram in datagrams {
                wrapped.extend_from_slice(&header);
                wrapped.extend_from_slice(datagram);
            }
            self.send_to(socket, &wrapped, &[message]);
        }
    }

    fn sent(&self, messages: &[Message]) {
        self.counters.add(Counter::UdpSends, messages.len() as u64);
        self.counters.add(Counter::TxDatagrams, datagrams(messages));
    }

    fn dropped(&self, why: Counter, messages: &[Message]) {
        self.counters.add(why, datagrams(messages));
    }
}

impl<S: SendMessages> UdpSink for Outlet<'_, S> {
    fn send(&mut self, arena: &[u8], messages: &[Message]) {
        let sockets = Arc::clone(&self.sockets);
        for run in messages.chunk_by(|a, b| family(a) == family(b)) {
            let Some(v4) = family(&run[0]) else {
                self.relay(arena, run);
                continue;
            };
            match sockets.of_family(v4) {
                Some(socket) => self.send_to(socket, arena, run),
                None => self.dropped(Counter::DropSendError, run),
            }
        }
    }
}

/// Whether a message goes by IPv4 or IPv6; `None` if it goes through a relay, or that way too.
fn family(message: &Message) -> Option<bool> {
    let endpoint = message.to.endpoint()?;
    Some(endpoint.remote.is_ipv4())
}

/// Leaves it to the kernel from which of our addresses a message goes. True if that is news.
fn forget_source(message: &mut Message) -> bool {
    match &mut message.to {
        Destination::Udp(endpoint) => endpoint.local.take().is_some(),
        Destination::Relay(..) | Destination::Both(..) => false,
    }
}

fn datagrams(messages: &[Message]) -> u64 {
    messages.iter().map(|message| message.segments as u64).sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
    use std::time::Duration;

    use super::*;
    use crate::engine::io::udp::{Bind, Underlay};
    use crate::engine::path::RelayId;
    use crate::wireguard::keys::PublicKey;

    const SIZE: usize = 40;
    const PEER: PeerId = 7;

    struct Outcome {
        stale: Vec<PeerId>,
        uncut: Vec<PeerId>,
        dropped: u64,
    }

    /// Sends one message of `segments` datagrams to a socket on loopback, which must get all of
    /// `arrive`.
    fn send(segments: usize, local: Ipv4Addr, to: [u8; 4], arrive: usize) -> Outcome {
        let mut underlay = Underlay::bind(Bind {
            port: 0,
            mark: 0,
            workers: 1,
            gro: true,
            others: false,
        })
        .unwrap();
        let sockets = Arc::new(underlay.sockets.remove(0));
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let port = server.local_addr().unwrap().port();
        let counters = Counters::new();
        let mut outlet = Outlet::new(sockets, &counters);
        let arena: Vec<u8> = (0..segments).flat_map(|at| [at as u8; SIZE]).collect();
        let message = Message {
            offset: 0,
            length: arena.len(),
            size: SIZE,
            segments,
            to: Destination::Udp(Endpoint {
                remote: (to, port).into(),
                local: Some(IpAddr::V4(local)),
                number: None,
            }),
            peer: Some(PEER),
            ecn: 0,
        };
        outlet.send(&arena, &[message]);
        let mut buffer = [0; 2 * SIZE];
        for at in 0..arrive {
            assert_eq!(server.recv(&mut buffer).unwrap(), SIZE);
            assert_eq!(buffer[..SIZE], [at as u8; SIZE]);
        }
        assert_eq!(counters.get(Counter::TxDatagrams), arrive as u64);
        Outcome {
            stale: outlet.stale,
            uncut: outlet.uncut,
            dropped: counters.get(Counter::DropSendError),
        }
    }

    #[test]
    fn what_the_kernel_will_not_cut_is_sent_uncut_from_the_same_source() {
        // More segments than any kernel takes: an error that only whole messages meet.
        let outcome = send(200, Ipv4Addr::LOCALHOST, [127, 0, 0, 1], 200);
        assert_eq!(
            (outcome.stale, outcome.uncut, outcome.dropped),
            (vec![], vec![PEER], 0)
        );
    }

    #[test]
    fn a_source_that_is_gone_is_not_taken_for_a_narrow_path() {
        let gone = Ipv4Addr::new(192, 0, 2, 1);
        for segments in [1, 3] {
            let outcome = send(segments, gone, [127, 0, 0, 1], segments);
            assert_eq!(
                (outcome.stale, outcome.uncut, outcome.dropped),
                (vec![PEER], vec![], 0)
            );
        }
    }

    #[test]
    fn what_the_underlay_refuses_for_good_is_dropped_and_counted_once() {
        for segments in [1, 3] {
            // Without SO_BROADCAST the kernel refuses this destination.
            let outcome = send(segments, Ipv4Addr::LOCALHOST, [255; 4], 0);
            assert_eq!(
                (outcome.stale, outcome.uncut, outcome.dropped),
                (vec![], vec![], segments as u64)
            );
        }
    }

    /// A socket that is full whenever the next message is for one of these.
    struct Full(Vec<SocketAddr>, Vec<SocketAddr>);

    impl SendMessages for Full {
        fn send(&mut self, _: &OwnedFd, _: &[u8], messages: &[Message]) -> io::Result<usize> {
            let room =
                |message: &&Message| !self.0.contains(&message.to.endpoint().unwrap().remote);
            let took = messages.iter().take_while(room);
            self.1.extend(
                took.clone()
                    .map(|message| message.to.endpoint().unwrap().remote),
            );
            match took.count() {
                0 => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                count => Ok(count),
            }
        }
    }

    #[test]
    fn a_full_socket_costs_only_whom_it_is_full_for() {
        let mut underlay = Underlay::bind(Bind {
            port: 0,
            mark: 0,
            workers: 1,
            gro: false,
            others: false,
        })
        .unwrap();
        let sockets = Arc::new(underlay.sockets.remove(0));
        let counters = Counters::new();
        let peer = |host: u8| SocketAddr::from(([192, 0, 2, host], 51820));
        let message = |host: u8| Message {
            offset: 0,
            length: 2 * SIZE,
            size: SIZE,
            segments: 2,
            to: Destination::Udp(Endpoint {
                remote: peer(host),
                local: None,
                number: None,
            }),
            peer: Some(host.into()),
            ecn: 0,
        };
        let hosts = [1, 2, 2, 3, 2, 4, 5, 5];
        let full = Full(vec![peer(2), peer(5)], Vec::new());
        let mut outlet = Outlet::through(full, sockets, &counters);
        outlet.send(&[0; 2 * SIZE], &hosts.map(message));
        assert_eq!(outlet.sender.1, [1, 3, 4].map(peer));
        assert_eq!(counters.get(Counter::TxDatagrams), 6);
        assert_eq!(counters.get(Counter::DropSendFull), 10);
    }

    #[test]
    fn what_goes_through_a_relay_is_given_to_whoever_carries_it() {
        let mut underlay = Underlay::bind(Bind {
            port: 0,
            mark: 0,
            workers: 1,
            gro: false,
            others: false,
        })
        .unwrap();
        let sockets = Arc::new(underlay.sockets.remove(0));
        let counters = Counters::new();
        let mut outlet = Outlet::new(sockets, &counters);
        let key = PublicKey([9; 32]);
        let message = Message {
            offset: SIZE,
            length: 2 * SIZE + 5,
            size: SIZE,
            segments: 3,
            to: Destination::Relay(RelayId(3), key),
            peer: Some(PEER),
            ecn: 0,
        };
        let arena: Vec<u8> = (0..4 * SIZE).map(|at| at as u8).collect();
        outlet.send(&arena, &[message]);
        assert_eq!(counters.get(Counter::DropRelay), 3, "nobody does");
        let (carrier, mut carried) = mpsc::channel(1);
        outlet.carrier = Some(carrier);
        outlet.send(&arena, &[message, message]);
        let relayed = carried.try_recv().unwrap();
        assert_eq!(
            (relayed.relay, relayed.peer, relayed.size),
            (RelayId(3), key, SIZE)
        );
        assert_eq!(relayed.bytes[..], arena[SIZE..3 * SIZE + 5]);
        let counted = [Counter::TxRelayed, Counter::DropRelay, Counter::TxDatagrams];
        assert_eq!(
            counted.map(|counter| counters.get(counter)),
            [3, 6, 0],
            "bounded"
        );
    }

    #[test]
    fn what_goes_both_ways_is_sent_and_given_to_whoever_carries_it() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        server
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut underlay = Underlay::bind(Bind {
            port: 0,
            mark: 0,
            workers: 1,
            gro: false,
            others: false,
        })
        .unwrap();
        let sockets = Arc::new(underlay.sockets.remove(0));
        for number in [None, Some(5)] {
            let counters = Counters::new();
            let mut outlet = Outlet::new(Arc::clone(&sockets), &counters);
            let endpoint = Endpoint {
                remote: server.local_addr().unwrap(),
                local: None,
                number,
            };
            let message = Message {
                offset: SIZE,
                length: 2 * SIZE + 5,
                size: SIZE,
                segments: 3,
                to: Destination::Both(endpoint, RelayId(3), PublicKey([9; 32])),
                peer: Some(PEER),
                ecn: 0,
            };
            let arena: Vec<u8> = (0..4 * SIZE).map(|at| at as u8).collect();
            let (carrier, mut carried) = mpsc::channel(1);
            outlet.carrier = Some(carrier);
            outlet.send(&arena, &[message]);
            let whole = &arena[SIZE..3 * SIZE + 5];
            assert_eq!(carried.try_recv().unwrap().bytes[..], *whole);
            let header = endpoint.header();
            let header = header.as_ref().map_or(&[][..], |header| header);
            let mut buffer = [0; 2 * SIZE];
            for datagram in whole.chunks(SIZE) {
                let length = server.recv(&mut buffer).unwrap();
                assert_eq!(buffer[..length], [header, datagram].concat());
            }
            let counted = [Counter::TxRelayed, Counter::TxDatagrams];
            assert_eq!(counted.map(|counter| counters.get(counter)), [3, 3]);
        }
    }
}

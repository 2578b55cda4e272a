//! A worker thread: epoll, and the calls that move packets between its sockets and its TUN queue.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver as Inbox, Sender as Done, SyncSender, TryRecvError};
use std::time::{Duration, Instant};

use tokio::sync::mpsc::Sender as Channel;
use tokio::sync::mpsc::error::TrySendError;

use tracing::{debug, trace};

use crate::engine::clock::uptime;
use crate::engine::counters::{Counter, Counters};
use crate::engine::error::Failure;
use crate::engine::forward::batch::{Message, UdpSink};
use crate::engine::forward::directory::Change;
use crate::engine::forward::location::Way;
use crate::engine::forward::port::{Content, Origin};
use crate::engine::forward::routes::PeerId;
use crate::engine::forward::{Forwarder, port};
use crate::engine::io::detours::Question;
use crate::engine::io::exchange::Exchange;
use crate::engine::io::outlet::Outlet;
use crate::engine::io::poll::{Epoll, Waker};
use crate::engine::io::tun::Queue;
use crate::engine::io::udp::Sockets;
use crate::engine::io::udp_io::Receiver;
use crate::engine::offload::coalesce::TunSink;
use crate::engine::offload::segment;
use crate::engine::offload::vnet;
use crate::engine::path::Relayed;
use crate::engine::types::Datagram;
use crate::wireguard::keys::PublicKey;

/// Buffers of one receive call, each for a whole GRO run, and their length in bytes.
const BUFFERS: (usize, usize) = (8, 65_536);
/// Receive calls on one socket before others have their turn.
const RECEIVES: usize = 4;
/// Datagrams of no session before all else has its turn, and their longest in bytes. A handshake
/// costs about 0.2 ms, but the limiter lets few pass; what it refuses costs less than 2 us.
const STRANGERS: (usize, usize) = (32, 2048);
/// Packets read from the TUN queue before others have their turn.
const READS: usize = 64;
/// Parcels taken from other workers before others have their turn.
const PARCELS: usize = 32;
/// Longest read from a TUN queue in bytes: virtio header and IP packet.
const READ: usize = vnet::LEN + 65_536;
/// Bytes before the virtio header, so that the packet is aligned.
const LEAD: usize = 16 - vnet::LEN;

const TOKEN_WAKE: u64 = 0;
const TOKEN_V4: u64 = 1;
const TOKEN_V6: u64 = 2;
const TOKEN_TUN: u64 = 3;
const TOKEN_STRANGERS: u64 = 4;
const TOKEN_OTHERS: u64 = 5;

/// Who takes datagrams that are no WireGuard message.
pub(super) type Listener = Channel<Datagram>;

/// What the control side asks of a worker.
pub(super) enum Command {
    /// Apply a change, then say so.
    Apply(Box<Change>, Done<()>),
    /// Talk to the underlay through these sockets, then say so.
    Rebind(Arc<Sockets>, Done<()>),
    /// Give datagrams that are no WireGuard message to this one, then say so.
    Listen(Listener, Done<()>),
    /// Give messages between nodes to this one, then say so.
    Inside(Channel<Box<[u8]>>, Done<()>),
    /// Give messages that go through relays to this one, then say so.
    Relay(Channel<Relayed>, Done<()>),
    /// Tell this one of traffic to peers that do not roam, then say so.
    Watch(Channel<PublicKey>, Done<()>),
    /// A way to a peer has been found to be, or not to be, a detour.
    Judge(PeerId, Way),
    /// End the thread.
    Stop,
}

/// A worker before it runs.
pub(super) struct Worker {
    pub(super) forwarder: Forwarder,
    pub(super) queue: Queue,
    pub(super) sockets: Arc<Sockets>,
    pub(super) waker: Arc<Waker>,
    pub(super) inbox: Inbox<Command>,
    /// For those who answer it.
    pub(super) own_inbox: Done<Command>,
    pub(super) detours: SyncSender<Question>,
    pub(super) exchange: Exchange,
    pub(super) counters: Arc<Counters>,
    /// Packets carry a virtio header.
    pub(super) vnet: bool,
}

impl Worker {
    /// Runs until told to stop, or until the device is gone.
    pub(super) fn run(mut self) -> Result<(), Failure> {
        let epoll = Epoll::new().map_err(Failure::Poll)?;
        let watch = |fd: BorrowedFd<'_>, token| epoll.add(fd, token).map_err(Failure::Poll);
        watch(self.waker.as_fd(), TOKEN_WAKE)?;
        watch(self.queue.as_fd(), TOKEN_TUN)?;
        let watch_sockets = |sockets: &Sockets| {
            let sessions = [(&sockets.v4, TOKEN_V4), (&sockets.v6, TOKEN_V6)];
            let strangers = sockets.strangers.each_ref();
            let others = sockets.others.each_ref();
            sessions
                .into_iter()
                .chain(strangers.map(|socket| (socket, TOKEN_STRANGERS)))
                .chain(others.map(|socket| (socket, TOKEN_OTHERS)))
                .filter_map(|(socket, token)| Some((socket.as_ref()?, token)))
                .try_for_each(|(socket, token)| watch(socket.as_fd(), token))
        };
        watch_sockets(&self.sockets)?;
        let mut port = Port {
            queue: &self.queue,
            outlet: Outlet::new(self.sockets.clone(), &self.counters),
            exchange: self.exchange,
            counters: &self.counters,
            listener: None,
            inside: None,
            watcher: None,
        };
        let mut receiver = Receiver::new(BUFFERS.0, BUFFERS.1);
        let mut strangers = Receiver::new(STRANGERS.0, STRANGERS.1);
        let mut buffer = vec![0; LEAD + READ + segment::SLACK].into_boxed_slice();
        loop {
            let deadline = self.forwarder.deadline();
            let timeout = deadline.map(|at| at.saturating_sub(uptime()));
            let mut events = [libc::epoll_event { events: 0, u64: 0 }; 8];
            let count = epoll.wait(&mut events, timeout).map_err(Failure::Poll)?;
            let now = uptime();
            for event in &events[..count] {
                let socket = match event.u64 {
                    TOKEN_V4 => &self.sockets.v4,
                    TOKEN_V6 => &self.sockets.v6,
                    TOKEN_STRANGERS | TOKEN_OTHERS => continue,
                    TOKEN_TUN => {
                        let header = self.vnet;
                        read(&mut self.forwarder, &mut port, &mut buffer, header, now)?;
                        if event.events & (libc::EPOLLERR | libc::EPOLLHUP) as u32 != 0 {
                            return Err(Failure::DeviceGone);
                        }
                        continue;
                    }
                    _ => {
                        self.waker.clear();
                        loop {
                            match run_commands(&mut self.forwarder, &mut port, &self.inbox, now) {
                                Progress::All => break,
                                Progress::Stop => return Ok(()),
                                Progress::Rebind(sockets, done) => {
                                    // The old ones leave the epoll set as they close.
                                    watch_sockets(&sockets)?;
                                    port.outlet.rebind(sockets.clone());
                                    self.sockets = sockets;
                                    let _ = done.send(());
                                }
                            }
                        }
                        accept(&mut self.forwarder, &mut port, &self.waker, now);
                        continue;
                    }
                };
                if let Some(socket) = socket {
                    let forwarder = &mut self.forwarder;
                    receive(forwarder, &mut port, &mut receiver, socket, RECEIVES, now);
                }
            }
            // After what belongs to sessions.
            let others = [
                (TOKEN_STRANGERS, &self.sockets.strangers),
                (TOKEN_OTHERS, &self.sockets.others),
            ];
            for (token, sockets) in others {
                if events[..count].iter().any(|event| event.u64 == token) {
                    for socket in sockets.iter().flatten() {
                        let forwarder = &mut self.forwarder;
                        receive(forwarder, &mut port, &mut strangers, socket, 1, now);
                    }
                }
            }
            if self.forwarder.deadline().is_some_and(|at| at <= now) {
                self.forwarder.tick(now, &mut port);
            }
            for (id, way) in self.forwarder.doubtful.drain(..) {
                if let Some((port, mark)) = self.sockets.sends_as(way.remote.is_ipv4()) {
                    let (inbox, waker) = (self.own_inbox.clone(), self.waker.clone());
                    let answer = Box::new(move |way| {
                        // A worker that has ended wants no answer.
                        if inbox.send(Command::Judge(id, way)).is_ok() {
                            waker.wake();
                        }
                    });
                    // Where the thread is busy or gone, the present belief holds.
                    let _ = self.detours.try_send(Question {
                        way,
                        port,
                        mark,
                        answer,
                    });
                }
            }
            for key in self.forwarder.busy.drain(..) {
                if let Some(watcher) = &port.watcher {
                    // One that is not heard of now is in some seconds, as long as there is traffic.
                    let _ = watcher.try_send(key);
                }
            }
            port.exchange.wake();
            for id in port.outlet.stale.drain(..) {
                self.forwarder.forget_source(id);
            }
            for id in port.outlet.uncut.drain(..) {
                self.forwarder.without_gso(id, now);
            }
        }
    }
}

/// How far [`run_commands`] came.
enum Progress {
    /// Nothing is left to do.
    All,
    /// It is time to stop.
    Stop,
    /// The worker itself must change its sockets; more commands may wait.
    Rebind(Arc<Sockets>, Done<()>),
}

/// Carries out commands.
fn run_commands(
    forwarder: &mut Forwarder,
    port: &mut Port<'_>,
    inbox: &Inbox<Command>,
    now: Duration,
) -> Progress {
    loop {
        match inbox.try_recv() {
            Ok(Command::Apply(change, done)) => {
                forwarder.apply(*change, now, port);
                // The caller may have given up waiting.
                let _ = done.send(());
            }
            Ok(Command::Rebind(sockets, done)) => return Progress::Rebind(sockets, done),
            Ok(Command::Listen(listener, done)) => {
                port.listener = Some(listener);
                let _ = done.send(());
            }
            Ok(Command::Inside(taker, done)) => {
                port.inside = Some(taker);
                let _ = done.send(());
            }
            Ok(Command::Relay(carrier, done)) => {
                port.outlet.carrier = Some(carrier);
                let _ = done.send(());
            }
            Ok(Command::Watch(watcher, done)) => {
                port.watcher = Some(watcher);
                let _ = done.send(());
            }
            Ok(Command::Judge(id, way)) => forwarder.judge(id, &way),
            Err(TryRecvError::Empty) => return Progress::All,
            Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Progress::Stop,
        }
    }
}

/// Takes what other workers handed over until others must have their turn. What comes later wakes
/// this one again.
fn accept(forwarder: &mut Forwarder, port: &mut Port<'_>, waker: &Waker, now: Duration) {
    for taken in 1..=PARCELS {
        let Some(mut parcel) = port.exchange.receive() else {
            break;
        };
        let (content, length) = (parcel.content, parcel.length);
        forwarder.accept(content, &mut parcel.buffer, length, now, port);
        port.exchange.give_back(parcel);
        if taken == PARCELS {
            waker.wake();
        }
    }
    forwarder.flush(port);
    port.exchange.wake();
}

/// Takes datagrams from a socket with so many calls, or until it is empty: then others have their
/// turn.
fn receive(
    forwarder: &mut Forwarder,
    port: &mut Port<'_>,
    receiver: &mut Receiver,
    socket: &OwnedFd,
    calls: usize,
    now: Duration,
) {
    for _ in 0..calls {
        let filled = match receiver.receive(socket) {
            Ok(filled) => filled,
            Err(error) => {
                debug!(%error, "receive from the underlay");
                break;
            }
        };
        if filled.all {
            forwarder.hold(uptime(), port);
        }
        receiver.take(filled, |origin, buffer, stride| {
            port.counters.add(Counter::UdpReceives, 1);
            forwarder.receive(origin, buffer, stride, now, port);
        });
        if !filled.all {
            break;
        }
    }
    forwarder.flush(port);
    port.exchange.wake();
}

/// Takes packets from the TUN queue until it is empty or others must have their turn.
fn read(
    forwarder: &mut Forwarder,
    port: &mut Port<'_>,
    buffer: &mut [u8],
    vnet: bool,
    now: Duration,
) -> Result<(), Failure> {
    let begin = if vnet { LEAD } else { LEAD + vnet::LEN };
    for _ in 0..READS {
        let end = LEAD + READ;
        let length = match port.queue.read(&mut buffer[begin..end]) {
            Ok(length) => begin + length,
            Err(error) => match error.raw_os_error() {
                Some(libc::EAGAIN) => break,
                Some(libc::EINTR) => continue,
                Some(libc::EBADFD) => return Err(Failure::DeviceGone),
                _ => return Err(Failure::Read(error)),
            },
        };
        port.counters.add(Counter::TunReads, 1);
        let (head, packet) = buffer.split_at_mut(LEAD + vnet::LEN);
        let header = if vnet {
            head.last_chunk().and_then(vnet::Header::decode)
        } else {
            Some(vnet::Header::PLAIN)
        };
        match (header, length.checked_sub(LEAD + vnet::LEN)) {
            (Some(header), Some(length)) => {
                forwarder.transmit(header, packet, length, now, port);
            }
            _ => port.counters.add(Counter::DropTunRead, 1),
        }
    }
    forwarder.flush(port);
    port.exchange.wake();
    Ok(())
}

/// Where finished packets go.
struct Port<'a> {
    queue: &'a Queue,
    outlet: Outlet<'a>,
    exchange: Exchange,
    counters: &'a Counters,
    /// Who takes what is no WireGuard message.
    listener: Option<Listener>,
    /// Who takes messages between nodes.
    inside: Option<Channel<Box<[u8]>>>,
    /// Who hears of traffic to peers that do not roam.
    watcher: Option<Channel<PublicKey>>,
}

impl Port<'_> {
    fn lost(&self, frame: &[u8], error: &io::Error) {
        trace!(%error, length = frame.len(), "write to the TUN device");
        self.counters.add(Counter::DropTunWrite, 1);
    }
}

impl TunSink for Port<'_> {
    fn write(&mut self, frame: &[u8]) {
        match self.queue.write(frame) {
            Ok(()) => self.counters.add(Counter::TunWrites, 1),
            Err(error) => self.lost(frame, &error),
        }
    }

    fn write_merged(&mut self, frame: &[u8]) -> bool {
        match self.queue.write(frame) {
            Ok(()) => self.counters.add(Counter::TunWrites, 1),
            // It is about the frame, not about the device or a passing trouble.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                trace!(%error, length = frame.len(), "super-packet to the TUN device");
                self.counters.add(Counter::TunRefused, 1);
                return false;
            }
            Err(error) => self.lost(frame, &error),
        }
        true
    }
}

impl UdpSink for Port<'_> {
    fn send(&mut self, arena: &[u8], messages: &[Message]) {
        self.outlet.send(arena, messages);
    }
}

impl port::Port for Port<'_> {
    fn other(&mut self, origin: &Origin, bytes: &[u8]) -> Counter {
        let Some(listener) = &self.listener else {
            return Counter::DropOther;
        };
        let datagram = Datagram {
            source: origin.remote,
            local: origin.local,
            interface: origin.interface,
            bytes: bytes.into(),
            received: Instant::now(),
        };
        match listener.try_send(datagram) {
            Ok(()) => Counter::RxOther,
            Err(TrySendError::Full(_)) => Counter::DropOtherFull,
            Err(TrySendError::Closed(_)) => {
                self.listener = None;
                Counter::DropOther
            }
        }
    }

    fn takes_inside(&self) -> bool {
        self.inside.is_some()
    }

    fn inside(&mut self, packet: &[u8]) -> Counter {
        let took = self
            .inside
            .as_ref()
            .map(|taker| taker.try_send(packet.into()));
        match took {
            Some(Ok(())) => Counter::RxInside,
            _ => Counter::DropInside,
        }
    }

    fn hand_over(&mut self, worker: usize, content: Content, bytes: &[u8]) -> bool {
        self.exchange.send(worker, content, bytes)
    }
}

#[cfg(test)]
mod tests;

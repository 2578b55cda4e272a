//! The thread of a relay: between its sockets and [`Server`], in batches.
//!
//! It has sockets and a thread of its own, so that what it carries never waits in a queue of the router's own packets.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Instant;

use tokio::sync::mpsc;

use super::server::{Allocated, Leg, Reason, Refusal, Server, Stats, Verdict, runs};
use crate::engine::datagrams::{
    Cut, Endpoint, Epoll, LONGEST, Receiver, SEGMENTS, Sender, Waker, alone, overflows, send_one,
};
use crate::tailnet::keys::{DiscoPublic, DiscoSecret};
use crate::tailnet::stun::{self, Transaction};

/// Buffers of one receive call, each for a whole GRO run, and their length in bytes.
const BUFFERS: (usize, usize) = (16, 65_536);

/// A relay that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its port cannot be had.
    #[error(transparent)]
    Port(#[from] crate::engine::Error),
    /// A thread or a descriptor cannot be had.
    #[error("start the peer relay's thread: {0}")]
    Thread(#[from] io::Error),
    /// The system gives no random bytes.
    #[error("no key for the peer relay can be made: {0}")]
    Random(getrandom::Error),
}

/// How a STUN server sees the relay's port.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// The request's.
    pub transaction: Transaction,
    /// From where it came to the server.
    pub mapped: SocketAddr,
    /// When the answer was here.
    pub received: Instant,
}

/// What a relay has carried, to be looked at also after its end.
#[derive(Clone)]
pub struct Counts {
    server: Arc<Mutex<Server>>,
    /// So that they are closed with the relay.
    sockets: Weak<[Option<OwnedFd>; 2]>,
    before: Stats,
}

impl Counts {
    /// How it stands now, with what the relays before it have carried.
    pub fn read(&self) -> Stats {
        let mut stats = lock(&self.server).stats();
        if let Some(sockets) = self.sockets.upgrade() {
            stats.count_dropped(Reason::Overflow, overflows(sockets.each_ref()));
        }
        stats.follow(&self.before);
        stats
    }
}

impl fmt::Debug for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Counts").field(&self.read()).finish()
    }
}

/// A relay that runs until it is dropped.
pub struct Service {
    server: Arc<Mutex<Server>>,
    key: DiscoPublic,
    port: u16,
    sockets: Arc<[Option<OwnedFd>; 2]>,
    waker: Arc<Waker>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    before: Stats,
}

impl fmt::Debug for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Service").finish_non_exhaustive()
    }
}

impl Service {
    /// Starts one on a UDP port (host byte order). What it sends has the firewall mark `mark`; what STUN servers answer
    /// goes to `seen`, and is dropped while that is full. It counts on from `before`.
    pub fn start(
        mut port: u16,
        mark: u32,
        seen: mpsc::Sender<Seen>,
        before: Stats,
    ) -> Result<Self, StartError> {
        let secret = DiscoSecret::generate().map_err(StartError::Random)?;
        let random = Box::new(|bytes: &mut [u8]| getrandom::fill(bytes).is_ok());
        let server = Server::new(&secret, random);
        let key = server.key();
        let sockets = Arc::new(alone(&mut port, mark)?);
        let waker = Arc::new(Waker::new()?);
        let (server, ends) = (
            Arc::new(Mutex::new(server)),
            Arc::new(AtomicBool::new(false)),
        );
        let epoll = Epoll::new()?;
        for (at, socket) in sockets.iter().enumerate() {
            if let Some(socket) = socket {
                epoll.add(socket.as_fd(), at as u64)?;
            }
        }
        epoll.add(waker.as_fd(), WAKE)?;
        let carrier = Carrier {
            server: server.clone(),
            sockets: sockets.clone(),
            waker: waker.clone(),
            ends: ends.clone(),
            epoll,
            seen,
        };
        let thread = std::thread::Builder::new()
            .name("sluice-relay".to_owned())
            .spawn(move || carrier.run())?;
        Ok(Self {
            server,
            key,
            port,
            sockets,
            waker,
            ends,
            thread: Some(thread),
            before,
        })
    }

    /// Whether it carries nothing any more, by a fault that its log tells.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Its disco key, which is not the node's.
    pub fn key(&self) -> DiscoPublic {
        self.key
    }

    /// Its UDP port, host byte order: the one that the system chose if 0 was asked for.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// See [`Server::allocate`].
    pub fn allocate(
        &self,
        asker: DiscoPublic,
        clients: [DiscoPublic; 2],
        now: Instant,
    ) -> Result<Allocated, Refusal> {
        let allocated = lock(&self.server).allocate(asker, clients, now);
        // It may sleep without a deadline.
        self.waker.wake();
        allocated
    }

    /// Sends a datagram from the relay's port. Does not wait.
    pub fn send(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        let socket = self.sockets[usize::from(to.is_ipv6())].as_ref();
        let socket = socket.ok_or_else(|| io::Error::from_raw_os_error(libc::EAFNOSUPPORT))?;
        send_one(socket, bytes, to, None)
    }

    /// What it has carried.
    pub fn counts(&self) -> Counts {
        Counts {
            server: self.server.clone(),
            sockets: Arc::downgrade(&self.sockets),
            before: self.before.clone(),
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Release);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            // A panic has been printed.
            let _ = thread.join();
        }
    }
}

/// Held for a batch in memory, never for a call of the kernel.
fn lock(server: &Mutex<Server>) -> MutexGuard<'_, Server> {
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

const WAKE: u64 = 2;

/// What the thread has.
struct Carrier {
    server: Arc<Mutex<Server>>,
    /// IPv4 and IPv6.
    sockets: Arc<[Option<OwnedFd>; 2]>,
    waker: Arc<Waker>,
    ends: Arc<AtomicBool>,
    epoll: Epoll,
    seen: mpsc::Sender<Seen>,
}

impl Carrier {
    fn run(self) {
        let mut receiver = Receiver::new(BUFFERS.0, BUFFERS.1);
        let mut sender = Sender::new();
        loop {
            let now = Instant::now();
            let due = lock(&self.server).poll_timeout();
            let timeout = due.map(|due| due.saturating_duration_since(now));
            let mut events = [libc::epoll_event { events: 0, u64: 0 }; 3];
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(error) => {
                    tracing::error!(%error, "the peer relay cannot wait for datagrams and ends");
                    return;
                }
            };
            if self.ends.load(Ordering::Acquire) {
                return;
            }
            for event in &events[..count] {
                match usize::try_from(event.u64)
                    .ok()
                    .and_then(|at| self.sockets.get(at))
                {
                    Some(Some(socket)) => self.turn(socket, &mut receiver, &mut sender),
                    _ => self.waker.clear(),
                }
            }
            lock(&self.server).handle_timeout(Instant::now());
        }
    }

    /// Takes what has come by a socket, as far as there are buffers, and carries it on.
    fn turn(&self, socket: &OwnedFd, receiver: &mut Receiver, sender: &mut Sender) {
        let filled = match receiver.receive(socket) {
            Ok(filled) => filled,
            Err(error) => return tracing::debug!(%error, "receive for the peer relay"),
        };
        let now = Instant::now();
        let mut carried: [Vec<Carried<'_>>; 2] = Default::default();
        let mut answers = Vec::new();
        {
            let mut server = lock(&self.server);
            receiver.take(filled, |origin, bytes, stride| {
                let from = Leg {
                    remote: origin.remote,
                    local: origin.local,
                };
                for run in runs(bytes, stride) {
                    if let Some((transaction, mapped)) = stun::response(run) {
                        let received = now;
                        let _ = self.seen.try_send(Seen {
                            transaction,
                            mapped,
                            received,
                        });
                        continue;
                    }
                    match server.handle(run, stride, from, now) {
                        Verdict::Carry(to) => {
                            let to = Endpoint {
                                remote: to.remote,
                                local: to.local,
                                number: None,
                            };
                            let most = SEGMENTS.min(LONGEST / stride.max(1)).max(1);
                            let pieces = run.chunks(most * stride.max(1)).map(|bytes| Carried {
                                to,
                                bytes,
                                stride,
                                ecn: origin.ecn,
                            });
                            carried[usize::from(to.remote.is_ipv6())].extend(pieces);
                        }
                        Verdict::Answer(bytes) => answers.push((from, bytes)),
                        Verdict::Bound | Verdict::Drop(_) => {}
                    }
                }
            });
        }
        let mut unsent = 0;
        for (from, bytes) in answers {
            if send_one(socket, &bytes, from.remote, from.local).is_err() {
                unsent += 1;
            }
        }
        for (socket, carried) in self.sockets.iter().zip(&carried) {
            if let Some(socket) = socket {
                unsent += send(socket, sender, carried);
            }
        }
        if unsent > 0 {
            lock(&self.server).count_dropped(Reason::Unsent, unsent);
        }
    }
}

/// Datagrams of one length, the last perhaps shorter, on their way to one end.
struct Carried<'b> {
    to: Endpoint,
    bytes: &'b [u8],
    stride: usize,
    ecn: u8,
}

impl Carried<'_> {
    fn datagrams(&self) -> u64 {
        self.bytes.len().div_ceil(self.stride.max(1)) as u64
    }

    fn cut(&self) -> Cut<'_> {
        Cut {
            to: &self.to,
            bytes: self.bytes,
            size: (self.bytes.len() > self.stride).then_some(self.stride),
            ecn: self.ecn,
        }
    }
}

/// Sends all of it; tells how many datagrams the kernel did not take.
fn send(socket: &OwnedFd, sender: &mut Sender, mut carried: &[Carried<'_>]) -> u64 {
    let mut unsent = 0;
    while let [first, after_first @ ..] = carried {
        match sender.send_cuts(socket, carried.iter().map(Carried::cut)) {
            Ok(count) => carried = &carried[count.clamp(1, carried.len())..],
            Err(error) => match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // Waiting would hold up everybody.
                Some(libc::EAGAIN | libc::ENOBUFS) => {
                    return unsent + carried.iter().map(Carried::datagrams).sum::<u64>();
                }
                // It will not cut them, as the path is too narrow or the device cannot, or our address is gone.
                _ => {
                    tracing::trace!(%error, to = %first.to.remote, "send for the peer relay");
                    unsent += send_each(socket, first);
                    carried = after_first;
                }
            },
        }
    }
    unsent
}

/// Sends datagrams one by one until one is refused; tells how many were not taken.
fn send_each(socket: &OwnedFd, carried: &Carried<'_>) -> u64 {
    let all = carried.bytes.chunks(carried.stride.max(1));
    let to = carried.to.remote;
    let went = all.take_while(|bytes| {
        send_one(socket, bytes, to, carried.to.local).is_ok()
            || send_one(socket, bytes, to, None).is_ok()
    });
    carried.datagrams() - went.count() as u64
}

#[cfg(test)]
mod tests;

//! What a worker does with datagrams and packets, without any I/O of its own.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::iter;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use super::batch::{Batch, Endpoint, UdpSink};
use super::coalesce::{Coalescer, Offload, TunSink};
use super::counters::{Counter, Counters};
use super::ip;
use super::peer::{Peer, STAGED, Setup, Staged};
use super::routes::{PeerId, Routes};
use super::segment::Segments;
use super::vnet;
use crate::wireguard::keys::PublicKey;
use crate::wireguard::message::{self, COOKIE, INITIATION, Kind};
use crate::wireguard::{Completed, Limiter, LocalKey, Opened, Packets, Refused, Verdict};

/// How often timers are looked at while any peer is in use.
pub(super) const TICK: Duration = Duration::from_millis(100);
/// A peer's timers rest when it has been silent for this long and has no session: every key has
/// expired by then (REJECT_AFTER_TIME is 180 s).
const REST_AFTER: Duration = Duration::from_secs(200);
/// Packets staged in one worker, all peers together.
const STAGED_TOTAL: usize = 4096;

/// What all workers know: who owns which address and key. Replaced whole, never changed.
#[derive(Debug)]
pub(super) struct Directory {
    /// Allowed IPs.
    pub(super) routes: Routes,
    /// Peers by static public key.
    pub(super) keys: HashMap<PublicKey, PeerId>,
}

/// A change of the peers, applied by a worker in one go.
#[derive(Default)]
pub(super) struct Change {
    /// Peers to end at once.
    pub(super) remove: Vec<PeerId>,
    /// New peers.
    pub(super) add: Vec<Setup>,
    /// New endpoints.
    pub(super) endpoints: Vec<(PeerId, SocketAddr)>,
    /// New keepalive intervals.
    pub(super) keepalives: Vec<(PeerId, Option<Duration>)>,
    /// The directory from now on.
    pub(super) directory: Option<Arc<Directory>>,
    /// Our key from now on.
    pub(super) local: Option<Arc<LocalKey>>,
}

/// Where a buffer of datagrams came from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    /// The sender.
    pub(super) remote: SocketAddr,
    /// Our address that it was sent to.
    pub(super) local: Option<IpAddr>,
    /// ECN bits of the underlay packets.
    pub(super) ecn: u8,
}

impl Origin {
    fn endpoint(&self) -> Endpoint {
        Endpoint {
            remote: self.remote,
            local: self.local,
        }
    }
}

/// What a worker's I/O takes: packets for the TUN device, messages for the underlay.
pub(super) trait Port: TunSink + UdpSink {}
impl<T: TunSink + UdpSink> Port for T {}

/// Hashes receiver indices, which we drew at random ourselves.
#[derive(Default)]
struct IndexHasher(u64);

impl Hasher for IndexHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u32(u32::from(*byte));
        }
    }

    fn write_u32(&mut self, index: u32) {
        self.0 = (self.0 ^ u64::from(index)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// The state of one worker.
pub(super) struct Forwarder {
    mtu: usize,
    local: Arc<LocalKey>,
    directory: Arc<Directory>,
    limiter: Limiter,
    /// By [`PeerId`].
    peers: Vec<Option<Box<Peer>>>,
    /// Peers by the upper 24 bits of their receiver indices.
    indices: HashMap<u32, PeerId, BuildHasherDefault<IndexHasher>>,
    /// Peers whose timers run.
    active: Vec<PeerId>,
    staged: usize,
    coalescer: Coalescer,
    batch: Batch,
    counters: Arc<Counters>,
}

impl Forwarder {
    /// A worker without peers.
    pub(super) fn new(
        mtu: u16,
        local: Arc<LocalKey>,
        offload: Offload,
        gso: bool,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            mtu: mtu.into(),
            local,
            directory: Arc::new(Directory {
                routes: Routes::new([]),
                keys: HashMap::new(),
            }),
            limiter: Limiter::new(),
            peers: Vec::new(),
            indices: HashMap::default(),
            active: Vec::new(),
            staged: 0,
            coalescer: Coalescer::new(offload),
            batch: Batch::new(gso),
            counters,
        }
    }

    /// Whether [`Forwarder::tick`] has anything to do.
    pub(super) fn needs_ticks(&self) -> bool {
        !self.active.is_empty()
    }

    /// Applies a change. Removed peers are gone when it returns.
    pub(super) fn apply(&mut self, change: Change, now: Duration, io: &mut impl Port) {
        for id in change.remove {
            if let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::take) {
                self.staged -= peer.staged.len();
                self.indices.remove(&peer.index);
                self.active.retain(|active| *active != id);
            }
        }
        if let Some(directory) = change.directory {
            self.directory = directory;
        }
        if let Some(local) = change.local {
            self.local = local;
            for peer in self.peers.iter_mut().flatten() {
                if let Some(tunnel) = peer.existing_tunnel() {
                    tunnel.set_local(&self.local);
                }
            }
        }
        for setup in change.add {
            let (id, index) = (setup.id, setup.index);
            if self.peers.len() <= id as usize {
                self.peers.resize_with(id as usize + 1, || None);
            }
            let peer = Peer::new(setup);
            let wants_keepalive = peer.keepalive.is_some();
            self.indices.insert(index, id);
            self.peers[id as usize] = Some(Box::new(peer));
            if wants_keepalive {
                self.wake(id, now, io);
            }
        }
        for (id, remote) in change.endpoints {
            if let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) {
                peer.set_endpoint(Endpoint {
                    remote,
                    local: None,
                });
            }
        }
        for (id, interval) in change.keepalives {
            if let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) {
                peer.set_keepalive(interval);
                self.wake(id, now, io);
            }
        }
        self.flush(io);
    }

    /// Takes datagrams that arrived together, each `stride` bytes long but perhaps the last.
    pub(super) fn receive(
        &mut self,
        origin: &Origin,
        buffer: &[u8],
        stride: usize,
        now: Duration,
        io: &mut impl Port,
    ) {
        let stride = stride.max(1);
        let count = buffer.len().div_ceil(stride);
        self.counters.add(Counter::RxDatagrams, count as u64);
        let mut datagrams = buffer.chunks(stride).peekable();
        while let Some(first) = datagrams.next() {
            match message::kind(first) {
                Some(Kind::Data(index)) => {
                    let same = Some(Kind::Data(index));
                    let more = iter::from_fn(|| datagrams.next_if(|d| message::kind(d) == same));
                    self.open(index, origin, iter::once(first).chain(more), now, io);
                }
                Some(kind) => self.handshake(kind, origin, first, now, io),
                None => self.counters.add(Counter::DropMalformed, 1),
            }
        }
    }

    /// Takes a packet of `length` bytes from the TUN device, and [`super::segment::SLACK`] more.
    pub(super) fn transmit(
        &mut self,
        header: vnet::Header,
        buffer: &mut [u8],
        length: usize,
        now: Duration,
        io: &mut impl Port,
    ) {
        let Some(packet) = buffer.get(..length) else {
            self.counters.add(Counter::DropTunRead, 1);
            return;
        };
        let ecn = ip::ecn(packet);
        let Some(id) = ip::destination(packet).and_then(|to| self.directory.routes.get(to)) else {
            self.counters.add(Counter::DropNoPeer, 1);
            return;
        };
        if !self.wake(id, now, io) {
            self.counters.add(Counter::DropNoPeer, 1);
            return;
        }
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else {
            return;
        };
        let Some(endpoint) = peer.endpoint() else {
            self.counters.add(Counter::DropNoEndpoint, 1);
            return;
        };
        let Ok(mut segments) = Segments::new(header, buffer, length, self.mtu) else {
            self.counters.add(Counter::DropTunRead, 1);
            return;
        };
        let tunnel = peer.tunnel(&self.local);
        if tunnel.ready() {
            let mut lane = self.batch.lane(io, endpoint, Some(id), ecn);
            let bytes = tunnel.seal(&mut segments, &mut lane);
            peer.sent(bytes, now);
            return;
        }
        while let Some(packet) = segments.next() {
            if peer.staged.len() >= STAGED {
                peer.staged.pop_front();
                self.staged -= 1;
                self.counters.add(Counter::DropStaged, 1);
            }
            if self.staged >= STAGED_TOTAL {
                self.counters.add(Counter::DropStaged, 1);
                continue;
            }
            peer.staged.push_back(packet.into());
            self.staged += 1;
        }
        self.initiate(id, now, io);
    }

    /// Moves the timers of every peer in use.
    pub(super) fn tick(&mut self, now: Duration, io: &mut impl Port) {
        let mut at = 0;
        while let Some(id) = self.active.get(at).copied() {
            if self.tick_peer(id, now, io) {
                at += 1;
            } else {
                self.active.swap_remove(at);
            }
        }
        self.flush(io);
    }

    /// Hands over everything that is under way.
    pub(super) fn flush(&mut self, io: &mut impl Port) {
        self.coalescer.flush_all(io);
        self.batch.flush(io);
    }

    /// Our address that a peer talked to is no longer ours.
    pub(super) fn forget_source(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) {
            peer.forget_source();
        }
    }

    /// Sends each datagram as a message of its own from now on.
    pub(super) fn without_gso(&mut self) {
        self.batch.without_gso();
    }

    fn open<'a>(
        &mut self,
        index: u32,
        origin: &Origin,
        messages: impl Iterator<Item = &'a [u8]>,
        now: Duration,
        io: &mut impl Port,
    ) {
        let Some(id) = self.by_index(index) else {
            let count = messages.count() as u64;
            self.counters.add(Counter::DropIndex, count);
            return;
        };
        self.wake(id, now, io);
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else {
            return;
        };
        let mut inner = Inner {
            id,
            ecn: origin.ecn,
            source: None,
            routes: &self.directory.routes,
            coalescer: &mut self.coalescer,
            counters: &self.counters,
            io,
        };
        let (bytes, completed) = peer.tunnel(&self.local).open(messages, &mut inner);
        if bytes > 0 {
            self.heard(id, origin, bytes, completed, now, io);
        }
    }

    /// A peer has proved itself.
    fn heard(
        &mut self,
        id: PeerId,
        origin: &Origin,
        bytes: u64,
        completed: Completed,
        now: Duration,
        io: &mut impl Port,
    ) {
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else {
            return;
        };
        peer.received(bytes, now);
        if peer.set_endpoint(origin.endpoint()) {
            self.counters.add(Counter::Roamed, 1);
        }
        if completed {
            peer.completed();
            self.counters.add(Counter::HandshakesCompleted, 1);
        }
        if peer.staged.is_empty() || !peer.tunnel(&self.local).ready() {
            return;
        }
        let mut queue = std::mem::take(&mut peer.staged);
        self.staged -= queue.len();
        let mut lane = self.batch.lane(io, origin.endpoint(), Some(id), 0);
        let mut staged = Staged::new(&mut queue);
        let bytes = peer.tunnel(&self.local).seal(&mut staged, &mut lane);
        peer.sent(bytes, now);
    }

    fn handshake(
        &mut self,
        kind: Kind,
        origin: &Origin,
        message: &[u8],
        now: Duration,
        io: &mut impl Port,
    ) {
        if !matches!(kind, Kind::Cookie(_)) && !self.admit(origin, message, now, io) {
            return;
        }
        let id = match kind {
            Kind::Initiation => {
                let key = self.local.initiator(message);
                let id = key.and_then(|key| self.directory.keys.get(&key).copied());
                if id.is_none() {
                    self.counters.add(Counter::DropUnknownPeer, 1);
                }
                id
            }
            Kind::Response(index) | Kind::Cookie(index) | Kind::Data(index) => {
                let id = self.by_index(index);
                if id.is_none() {
                    self.counters.add(Counter::DropIndex, 1);
                }
                id
            }
        };
        let Some(id) = id.filter(|id| self.wake(*id, now, io)) else {
            return;
        };
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else {
            return;
        };
        let mut answer = [0; INITIATION];
        match peer.tunnel(&self.local).handshake(message, &mut answer) {
            Ok((length, completed)) => {
                if let Some(length) = length {
                    let bytes = message.len() as u64;
                    self.heard(id, origin, bytes, completed, now, io);
                    self.send(id, &answer[..length], now, io);
                }
            }
            Err(_) => self.counters.add(Counter::DropHandshake, 1),
        }
    }

    /// Asks the limiter. Sends the cookie reply that it may want.
    fn admit(
        &mut self,
        origin: &Origin,
        message: &[u8],
        now: Duration,
        io: &mut impl Port,
    ) -> bool {
        let mut reply = [0; COOKIE];
        let from = origin.remote.ip();
        let counter = match self
            .limiter
            .check(&self.local, from, message, now, &mut reply)
        {
            Verdict::Pass => Counter::HandshakesReceived,
            Verdict::Cookie(length) => {
                let mut lane = self.batch.lane(io, origin.endpoint(), None, 0);
                lane.push(&reply[..length]);
                Counter::CookiesSent
            }
            Verdict::WrongMac => Counter::DropMac,
            Verdict::OverRate => Counter::DropLimited,
        };
        self.counters.add(counter, 1);
        counter == Counter::HandshakesReceived
    }

    /// The peer that a receiver index names. Nobody's before it has been used: strangers must not
    /// make us set up a session.
    fn by_index(&self, index: u32) -> Option<PeerId> {
        let id = *self.indices.get(&(index >> 8))?;
        let peer = self.peers.get(id as usize)?.as_ref()?;
        peer.has_tunnel().then_some(id)
    }

    /// Starts a peer's timers if they rest. False when there is no such peer.
    fn wake(&mut self, id: PeerId, now: Duration, io: &mut impl Port) -> bool {
        match self.peers.get_mut(id as usize).and_then(Option::as_mut) {
            Some(peer) if peer.active => true,
            Some(peer) => {
                peer.active = true;
                peer.used = now;
                self.active.push(id);
                self.tick_peer(id, now, io);
                true
            }
            None => false,
        }
    }

    /// Moves a peer's timers. False when they may rest.
    fn tick_peer(&mut self, id: PeerId, now: Duration, io: &mut impl Port) -> bool {
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else {
            return false;
        };
        let mut out = [0; INITIATION];
        let mut ready = false;
        let mut due = None;
        if let Some(tunnel) = peer.existing_tunnel() {
            let tick = tunnel.tick(&mut out);
            ready = tunnel.ready();
            due = tick.message;
            if tick.gave_up {
                self.staged -= peer.staged.len();
                peer.staged.clear();
            }
        }
        if let Some(length) = due {
            self.send(id, &out[..length], now, io);
        } else if peer.keepalive_due(now) {
            peer.touched(now);
            if ready {
                self.seal_keepalive(id, now, io);
            } else {
                self.initiate(id, now, io);
            }
            return true;
        }
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else {
            return false;
        };
        peer.active =
            ready || peer.keepalive.is_some() || now.saturating_sub(peer.used) < REST_AFTER;
        peer.active
    }

    fn seal_keepalive(&mut self, id: PeerId, now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else {
            return;
        };
        let Some(endpoint) = peer.endpoint() else {
            return;
        };
        let mut lane = self.batch.lane(io, endpoint, Some(id), 0);
        let mut keepalive = Keepalive(false);
        let bytes = peer.tunnel(&self.local).seal(&mut keepalive, &mut lane);
        peer.sent(bytes, now);
    }

    fn initiate(&mut self, id: PeerId, now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else {
            return;
        };
        let mut out = [0; INITIATION];
        if peer.endpoint().is_some()
            && let Some(length) = peer.tunnel(&self.local).initiate(&mut out)
        {
            self.send(id, &out[..length], now, io);
        }
    }

    /// Sends a message that is ready to where the peer is.
    fn send(&mut self, id: PeerId, message: &[u8], now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id as usize).and_then(Option::as_mut) else {
            return;
        };
        let Some(endpoint) = peer.endpoint() else {
            return;
        };
        peer.sent(message.len() as u64, now);
        self.batch.lane(io, endpoint, Some(id), 0).push(message);
    }
}

/// One packet without content.
struct Keepalive(bool);

impl Packets for Keepalive {
    fn next(&mut self) -> Option<&[u8]> {
        let first = !self.0;
        self.0 = true;
        first.then_some(&[])
    }
}

/// Takes opened packets of one peer: source check, ECN, coalescing.
struct Inner<'a, P> {
    id: PeerId,
    /// ECN bits of the underlay packets.
    ecn: u8,
    /// The source that was found good last.
    source: Option<IpAddr>,
    routes: &'a Routes,
    coalescer: &'a mut Coalescer,
    counters: &'a Counters,
    io: &'a mut P,
}

impl<P: Port> Inner<'_, P> {
    fn judge(&mut self, length: usize) -> Result<(), Counter> {
        let packet = &mut self.coalescer.slot()[..length];
        let source = ip::checked_source(packet).ok_or(Counter::DropInner)?;
        if self.source != Some(source) {
            if self.routes.get(source) != Some(self.id) {
                return Err(Counter::DropSource);
            }
            self.source = Some(source);
        }
        if !ip::merge_ecn(packet, self.ecn) {
            return Err(Counter::DropCongestion);
        }
        Ok(())
    }
}

impl<P: Port> Opened for Inner<'_, P> {
    fn slot(&mut self) -> &mut [u8] {
        self.coalescer.slot()
    }

    fn packet(&mut self, length: usize) {
        if length == 0 {
            return;
        }
        match self.judge(length) {
            Ok(()) => {
                self.counters.add(Counter::RxPackets, 1);
                self.coalescer.push(length, self.io);
            }
            Err(why) => self.counters.add(why, 1),
        }
    }

    fn refused(&mut self, why: Refused) {
        let counter = match why {
            Refused::Auth => Counter::DropAuth,
            Refused::Replay => Counter::DropReplay,
            Refused::Expired => Counter::DropExpired,
            Refused::Inner => Counter::DropInner,
            Refused::Handshake => Counter::DropHandshake,
        };
        self.counters.add(counter, 1);
    }
}

#[cfg(test)]
mod tests;

//! What a worker does with datagrams and packets, without any I/O of its own.

pub(crate) mod batch;
pub(crate) mod directory;
pub(crate) mod edits;
mod inner;
pub(crate) mod inside;
pub(crate) mod location;
mod pace;
pub(crate) mod peer;
pub(crate) mod port;
pub(crate) mod routes;
mod sealing;
mod session;
mod staged;
#[cfg(test)]
mod tests;
mod wheel;

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::time::Duration;

use inner::Inner;

use crate::engine::counters::{Counter, Counters};
use crate::engine::forward::batch::Batch;
use crate::engine::forward::directory::{Change, Directory, IndexHasher};
use crate::engine::forward::location::{Location, Way};
use crate::engine::forward::pace::Pace;
use crate::engine::forward::peer::{Amount, Peer, Peers};
use crate::engine::forward::port::{Content, Origin, Place, Port};
use crate::engine::forward::routes::PeerId;
use crate::engine::forward::staged::Staged;
use crate::engine::forward::wheel::{NEVER, Wheel};
use crate::engine::offload::coalesce::{Coalescer, Offload};
use crate::engine::offload::ip;
use crate::engine::offload::refusals::Found;
use crate::engine::offload::segment::SLACK;
use crate::engine::offload::via::sites::Sites;
use crate::engine::offload::vnet;
use crate::geneve;
use crate::wireguard::keys::PublicKey;
use crate::wireguard::message::{self, Kind};
use crate::wireguard::{Limiter, LocalKey};

/// Peers whose timers are looked at before packets have their turn.
const VISITS: usize = 256;
/// Ways to peers that are judged before packets have their turn.
const JUDGED: usize = 16;

/// The state of one worker.
pub(crate) struct Forwarder {
    place: Place,
    mtu: usize,
    local: Arc<LocalKey>,
    directory: Arc<Directory>,
    limiter: Limiter,
    peers: Peers,
    /// Peers by the upper 24 bits of their receiver indices.
    indices: HashMap<u32, PeerId, BuildHasherDefault<IndexHasher>>,
    /// When the timers of each peer are looked at.
    wheel: Wheel,
    /// Peers that wait for their turn to begin a handshake.
    asking: VecDeque<PeerId>,
    pace: Pace,
    staged: Staged,
    /// Ways of peers that somebody should ask the kernel about, and then tell [`Forwarder::judge`].
    pub(crate) doubtful: Vec<(PeerId, Way)>,
    /// Peers with traffic, for whoever says where they are.
    pub(crate) busy: Vec<PublicKey>,
    coalescer: Coalescer,
    batch: Batch,
    sites: Arc<Sites>,
    /// Names the next packet that may be cut.
    fragment: u16,
    /// Where packets are translated.
    translated: Vec<u8>,
    counters: Arc<Counters>,
}

impl Forwarder {
    /// A worker without peers.
    pub(crate) fn new(
        place: Place,
        mtu: u16,
        local: Arc<LocalKey>,
        offload: Offload,
        gso: bool,
        counters: Arc<Counters>,
    ) -> Self {
        Self {
            place,
            mtu: mtu.into(),
            local,
            directory: Arc::new(Directory::empty()),
            limiter: Limiter::new(),
            peers: Peers::default(),
            indices: HashMap::default(),
            wheel: Wheel::default(),
            asking: VecDeque::new(),
            pace: Pace::default(),
            staged: Staged::default(),
            doubtful: Vec::new(),
            busy: Vec::new(),
            coalescer: Coalescer::new(offload),
            batch: Batch::new(gso),
            sites: Arc::default(),
            fragment: 0,
            translated: Vec::new(),
            counters,
        }
    }

    /// Tells in `found` which super-packets the TUN device refuses.
    pub(crate) fn tell_refusals(mut self, found: Found) -> Self {
        self.coalescer.tell_refusals(found);
        self
    }

    /// When [`Forwarder::tick`] has something to do; nothing as long as it is not told.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let asking = (!self.asking.is_empty()).then(|| self.pace.next());
        [self.wheel.deadline(), asking].into_iter().flatten().min()
    }

    /// Applies a change. Removed peers are gone when it returns.
    pub(crate) fn apply(&mut self, change: Change, now: Duration, io: &mut impl Port) {
        for id in change.remove {
            if let Some(peer) = self.peers.remove(id) {
                let dropped = self.staged.discard(id);
                self.counters.add(Counter::DropStaged, dropped);
                self.indices.remove(&peer.index);
            }
        }
        if let Some(directory) = change.directory {
            self.directory = directory;
        }
        if let Some(sites) = change.sites {
            self.sites = sites;
        }
        if let Some(mtu) = change.mtu {
            self.mtu = mtu.into();
        }
        if let Some(local) = change.local {
            // Tunnels take it at their next use, or one after the other: each costs a key exchange.
            self.local = local;
            for (id, peer) in self.peers.iter_mut().filter(|(_, peer)| peer.has_tunnel()) {
                self.wheel.schedule(id, &mut peer.scheduled, now, now);
            }
        }
        for setup in change.add {
            let (id, index) = (setup.id, setup.index);
            let wants_keepalive = setup.keepalive.is_some();
            self.indices.insert(index, id);
            self.peers.insert(id, Peer::new(setup));
            if wants_keepalive {
                self.wake(id, now);
            }
        }
        for (id, edits) in change.edits {
            if let Some(peer) = self.peers.get_mut(id) {
                peer.edits = edits;
            }
        }
        for (id, key) in change.preshared_keys {
            if let Some(peer) = self.peers.get_mut(id) {
                peer.set_preshared_key(key);
                // Its session must end soon.
                self.wake(id, now);
            }
        }
        for (id, addresses) in change.configured {
            if let Some(peer) = self.peers.get_mut(id) {
                peer.relocate(|location| location.configure(addresses));
            }
        }
        for (id, remote) in change.endpoints {
            if let Some(peer) = self.peers.get_mut(id) {
                peer.relocate(|location| location.move_to(remote));
            }
        }
        for (id, roaming) in change.roaming {
            if let Some(peer) = self.peers.get_mut(id) {
                peer.relocate(|location| location.set_roaming(roaming));
            }
        }
        for (id, path, also) in change.paths {
            if let Some(peer) = self.peers.get_mut(id) {
                peer.relocate(|location| location.set_path(path, also));
            }
        }
        for (id, path) in change.resume {
            if let Some(peer) = self.peers.get_mut(id) {
                peer.relocate(|location| location.resume(path));
                self.initiate(id, now, io);
            }
        }
        for (id, interval) in change.keepalives {
            if let Some(peer) = self.peers.get_mut(id) {
                peer.set_keepalive(interval);
                self.wake(id, now);
            }
        }
        self.flush(io);
    }

    /// Takes datagrams that arrived together, each `stride` bytes long but perhaps the last.
    pub(crate) fn receive(
        &mut self,
        origin: &Origin,
        buffer: &[u8],
        stride: usize,
        now: Duration,
        io: &mut impl Port,
    ) {
        let count = buffer.len().div_ceil(stride.max(1));
        self.counters.add(Counter::RxDatagrams, count as u64);
        self.datagrams(origin, buffer, stride, now, io);
    }

    fn datagrams(
        &mut self,
        origin: &Origin,
        buffer: &[u8],
        stride: usize,
        now: Duration,
        io: &mut impl Port,
    ) {
        let stride = stride.max(1);
        // Nearly always one run: a sender's datagrams name one session.
        let mut rest = buffer;
        while !rest.is_empty() {
            let first = &rest[..stride.min(rest.len())];
            let (kind, head, number) = match message::kind(first) {
                None => wrapped(first),
                kind => (kind, 0, None),
            };
            let more = match kind {
                Some(Kind::Data(_)) => rest
                    .chunks(stride)
                    .skip(1)
                    .take_while(|datagram| {
                        datagram.get(..head) == first.get(..head)
                            && message::kind(&datagram[head..]) == kind
                    })
                    .count(),
                _ => 0,
            };
            let behind = Origin { number, ..*origin };
            let (run, after) = rest.split_at(rest.len().min((1 + more) * stride));
            rest = after;
            let index = match kind {
                Some(Kind::Data(index) | Kind::Response(index) | Kind::Cookie(index)) => index,
                Some(Kind::Initiation) => {
                    self.initiation(&behind, &run[head..], now, io);
                    continue;
                }
                None => {
                    let counter = io.other(origin, run);
                    self.counters.add(counter, 1);
                    continue;
                }
            };
            let owner = self.place.owner(index);
            if owner != self.place.worker {
                let content = Content::Datagrams(*origin, stride);
                self.hand_over(owner, content, run, io);
            } else if let Some(Kind::Data(_)) = kind {
                let messages = run.chunks(stride).map(|datagram| &datagram[head..]);
                self.open(index, &behind, messages, now, io);
            } else {
                self.handshake(index, &behind, &run[head..], now, io);
            }
        }
    }

    /// Takes a packet of `length` bytes from the TUN device, and [`crate::engine::offload::segment::SLACK`] more.
    pub(crate) fn transmit(
        &mut self,
        header: vnet::Header,
        buffer: &mut [u8],
        length: usize,
        now: Duration,
        io: &mut impl Port,
    ) {
        let destination = buffer.get(..length).and_then(ip::destination);
        let Some(id) = destination.and_then(|to| self.directory.routes.get(to)) else {
            self.counters.add(Counter::DropNoPeer, 1);
            return;
        };
        // Only the daemon speaks for the node. What hosts send has offloaded checksums, mostly.
        if header.checksum.is_none()
            && ip::protocol(buffer) == Some(inside::TSMP)
            && io.takes_inside()
        {
            self.counters.add(Counter::DropInside, 1);
            return;
        }
        match self.directory.owner(id) {
            Some(owner) if owner != self.place.worker => {
                self.hand_over(owner, Content::Packet(header), &buffer[..length], io);
            }
            _ => self.transmit_to(id, header, buffer, length, now, io),
        }
    }

    /// Takes what another worker handed over; `buffer` has room for [`crate::engine::offload::segment::SLACK`] bytes more.
    pub(crate) fn accept(
        &mut self,
        content: Content,
        buffer: &mut [u8],
        length: usize,
        now: Duration,
        io: &mut impl Port,
    ) {
        let header = match content {
            Content::Packet(header) => Some(header),
            Content::Inside => Some(vnet::Header::PLAIN),
            _ => None,
        };
        match content {
            Content::Packet(_) | Content::Inside => {
                // The directory may have changed on the way: look again, here.
                let destination = ip::destination(&buffer[..length]);
                let id = destination.and_then(|to| self.directory.routes.get(to));
                let id = id.filter(|id| self.directory.owner(*id) == Some(self.place.worker));
                match id.zip(header) {
                    Some((id, header)) => self.transmit_to(id, header, buffer, length, now, io),
                    None => self.counters.add(Counter::DropHandOver, 1),
                }
            }
            Content::Datagrams(origin, stride) => {
                if origin.relay.is_some() {
                    let count = length.div_ceil(stride.max(1)) as u64;
                    self.counters.add(Counter::RxRelayed, count);
                }
                self.datagrams(&origin, &buffer[..length], stride, now, io);
            }
            Content::Initiation(origin, key) => {
                self.respond(&key, &origin, &buffer[..length], now, io);
            }
        }
    }

    fn hand_over(&mut self, worker: usize, content: Content, bytes: &[u8], io: &mut impl Port) {
        let counter = if io.hand_over(worker, content, bytes) {
            Counter::HandedOver
        } else {
            Counter::DropHandOver
        };
        self.counters.add(counter, 1);
    }

    /// Looks at the timers that are due, and begins the handshakes whose turn it is. To be called after
    /// [`Forwarder::deadline`]; what it leaves for the next call is due at once.
    pub(crate) fn tick(&mut self, now: Duration, io: &mut impl Port) {
        while !self.asking.is_empty()
            && self.pace.take(now)
            && let Some(id) = self.asking.pop_front()
        {
            if let Some(peer) = self.peers.get_mut(id).filter(|peer| peer.asks) {
                peer.asks = false;
                self.visit(id, true, now, io);
            }
        }
        for _ in 0..VISITS {
            let Some((id, at)) = self.wheel.pop(now) else {
                break;
            };
            let peer = self.peers.get_mut(id);
            if let Some(peer) = peer.filter(|peer| peer.scheduled == at) {
                peer.scheduled = NEVER;
                self.visit(id, false, now, io);
            }
        }
        self.flush(io);
    }

    /// Datagrams keep coming: until the next [`Forwarder::flush`] packets toward the TUN device may
    /// wait for others of their flow, no longer than [`crate::engine::offload::coalesce::HOLD`] and until the next
    /// call. `now` never goes back.
    pub(crate) fn hold(&mut self, now: Duration, io: &mut impl Port) {
        self.coalescer.hold(now, io);
    }

    /// Hands over everything that is under way.
    pub(crate) fn flush(&mut self, io: &mut impl Port) {
        self.coalescer.flush_all(io);
        self.batch.flush(io);
    }

    /// Our address that a peer talked to is no longer ours.
    pub(crate) fn forget_source(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get_mut(id) {
            peer.relocate(Location::forget_source);
        }
    }

    /// Takes what has been found of a way.
    pub(crate) fn judge(&mut self, id: PeerId, way: &Way) {
        if let Some(peer) = self.peers.get_mut(id) {
            peer.relocate(|location| location.judge(way));
        }
    }

    /// Sends each datagram for a peer as a message of its own for some time.
    pub(crate) fn without_gso(&mut self, id: PeerId, now: Duration) {
        if let Some(peer) = self.peers.get_mut(id) {
            peer.without_gso(now);
        }
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
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        let edits = peer.edits.clone();
        let mut answers = Vec::new();
        let mut inner = Inner {
            id,
            ecn: origin.ecn,
            count: 0,
            source: None,
            routes: &self.directory.routes,
            edits: edits.as_deref(),
            sites: &self.sites,
            mtu: self.mtu,
            fragment: &mut self.fragment,
            answers: &mut answers,
            coalescer: &mut self.coalescer,
            counters: &self.counters,
            io,
        };
        let tunnel = peer.tunnel(&self.local);
        let (bytes, completed) = tunnel.open(index, messages, now, &mut inner);
        let packets = inner.count;
        if bytes > 0 {
            self.heard(id, origin, Amount { packets, bytes }, completed, now, io);
        }
        for mut answer in answers {
            let length = answer.len();
            answer.resize(length + SLACK, 0);
            self.transmit_to(id, vnet::Header::PLAIN, &mut answer, length, now, io);
        }
    }

    /// The peer that a receiver index names. Nobody's before it has been used: strangers must not
    /// make us set up a session.
    fn by_index(&self, index: u32) -> Option<PeerId> {
        let id = *self.indices.get(&(index >> 8))?;
        self.peers.get(id)?.has_tunnel().then_some(id)
    }
}

/// What is behind the header of a peer relay, if there is one: the kind of message, the header's length and number.
fn wrapped(datagram: &[u8]) -> (Option<Kind>, usize, Option<u32>) {
    match geneve::Header::parse(datagram) {
        Some((header, message)) if header.inner == geneve::Inner::WireGuard && !header.control => {
            (message::kind(message), geneve::LEN, Some(header.number))
        }
        _ => (None, 0, None),
    }
}

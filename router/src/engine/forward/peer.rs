//! One peer as its worker has it.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::engine::clock::uptime;
use crate::engine::forward::batch::Destination;
use crate::engine::forward::edits::Edits;
use crate::engine::forward::location::{Location, Way};
use crate::engine::forward::routes::PeerId;
use crate::engine::forward::wheel::{NEVER, Wheel};
use crate::engine::path::Path;
use crate::engine::types::{Nowhere, PeerStats};
use crate::wireguard::keys::{PresharedKey, PublicKey};
use crate::wireguard::{LocalKey, Tunnel};

/// How long each datagram is a message of its own when the kernel has refused to cut one up. Then it is
/// asked again: nothing tells when the path becomes wider, and to be refused costs one call, no packet.
const UNCUT: Duration = Duration::from_secs(10);

/// How often traffic to a peer is told of, to whoever says where it is.
const TOLD: Duration = Duration::from_secs(5);

/// How long a way to a peer rests after it was judged, at least.
pub(crate) const JUDGE_AFTER: Duration = Duration::from_secs(1);

/// What the control side reads of a peer while its worker writes.
#[derive(Debug)]
pub(crate) struct Shared {
    public_key: PublicKey,
    rx_bytes: AtomicU64,
    tx_bytes: AtomicU64,
    rx_packets: AtomicU64,
    tx_packets: AtomicU64,
    /// Nanoseconds since 1970; 0 for never.
    last_handshake: AtomicU64,
    /// [`Peer::uncut_until`] in nanoseconds.
    uncut_until: AtomicU64,
    /// Locked by the worker only when the peer moves.
    path: Mutex<Option<Path>>,
    /// Locked by the worker only for packets that it drops.
    nowhere: Mutex<Option<Nowhere>>,
}

impl Shared {
    /// A peer that has not been heard from.
    pub(crate) fn new(public_key: PublicKey) -> Self {
        Self {
            public_key,
            rx_bytes: AtomicU64::new(0),
            tx_bytes: AtomicU64::new(0),
            rx_packets: AtomicU64::new(0),
            tx_packets: AtomicU64::new(0),
            last_handshake: AtomicU64::new(0),
            uncut_until: AtomicU64::new(0),
            path: Mutex::new(None),
            nowhere: Mutex::new(None),
        }
    }

    /// Reads everything.
    pub(crate) fn stats(&self) -> PeerStats {
        let nanos = self.last_handshake.load(Ordering::Relaxed);
        PeerStats {
            public_key: self.public_key,
            path: *self.path.lock().unwrap_or_else(PoisonError::into_inner),
            last_handshake: (nanos != 0).then(|| UNIX_EPOCH + Duration::from_nanos(nanos)),
            rx_bytes: self.rx_bytes.load(Ordering::Relaxed),
            tx_bytes: self.tx_bytes.load(Ordering::Relaxed),
            rx_packets: self.rx_packets.load(Ordering::Relaxed),
            tx_packets: self.tx_packets.load(Ordering::Relaxed),
            nowhere: *self.nowhere.lock().unwrap_or_else(PoisonError::into_inner),
            uncut: uptime() < Duration::from_nanos(self.uncut_until.load(Ordering::Relaxed)),
        }
    }
}

/// Messages to or from a peer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amount {
    pub(crate) packets: u64,
    pub(crate) bytes: u64,
}

impl Amount {
    /// One message.
    pub(crate) fn of(message: &[u8]) -> Self {
        Self {
            packets: 1,
            bytes: message.len() as u64,
        }
    }
}

fn count(cell: &AtomicU64, more: u64) {
    cell.store(
        cell.load(Ordering::Relaxed).wrapping_add(more),
        Ordering::Relaxed,
    );
}

/// A peer to be added to a worker.
#[derive(Debug)]
pub(crate) struct Setup {
    pub(crate) id: PeerId,
    pub(crate) public_key: PublicKey,
    pub(crate) preshared_key: Option<PresharedKey>,
    /// Receiver indices begin with these 24 bits.
    pub(crate) index: u32,
    /// Where it may be, best first.
    pub(crate) endpoints: Vec<SocketAddr>,
    pub(crate) keepalive: Option<Duration>,
    /// See [`PeerSpec::roaming`](crate::engine::PeerSpec::roaming).
    pub(crate) roaming: bool,
    pub(crate) shared: Arc<Shared>,
}

/// A peer.
pub(crate) struct Peer {
    pub(crate) index: u32,
    public_key: PublicKey,
    preshared_key: Option<PresharedKey>,
    /// Made when first needed: it is large, and costs key exchanges.
    tunnel: Option<Box<Tunnel>>,
    /// The tunnel has yet to take `preshared_key`: at its next use, for it costs key exchanges.
    has_new_key: bool,
    location: Location,
    /// Until then the kernel is not asked to cut up messages on the way to the endpoint.
    uncut_until: Duration,
    pub(crate) keepalive: Option<Duration>,
    /// What is changed of its packets.
    pub(crate) edits: Option<Arc<Edits>>,
    /// When its timers are looked at.
    pub(crate) scheduled: Duration,
    /// It waits for its turn to begin a handshake.
    pub(crate) asks: bool,
    /// When an authentic message last came or went; none: a persistent keepalive is due at once.
    last_traversal: Option<Duration>,
    /// Bytes that had been sent to it when its traffic was told of, and when that was.
    told: Option<(u64, Duration)>,
    shared: Arc<Shared>,
}

impl Peer {
    /// A peer without a session.
    pub(crate) fn new(setup: Setup) -> Self {
        let mut peer = Self {
            index: setup.index,
            public_key: setup.public_key,
            preshared_key: setup.preshared_key,
            tunnel: None,
            has_new_key: false,
            location: Location::default(),
            uncut_until: Duration::ZERO,
            keepalive: setup.keepalive,
            edits: None,
            scheduled: NEVER,
            asks: false,
            last_traversal: None,
            told: None,
            shared: setup.shared,
        };
        peer.relocate(|location| {
            location.set_roaming(setup.roaming);
            location.configure(setup.endpoints);
        });
        peer
    }

    /// The session layer, made if it is not there yet.
    pub(crate) fn tunnel(&mut self, local: &LocalKey) -> &mut Tunnel {
        let preshared = self.preshared_key.as_ref();
        let tunnel = self.tunnel.get_or_insert_with(|| {
            Box::new(Tunnel::new(local, &self.public_key, preshared, self.index))
        });
        tunnel.set_local(local);
        if std::mem::take(&mut self.has_new_key) {
            tunnel.set_preshared(local, preshared);
        }
        tunnel
    }

    /// The session layer for a new handshake, made anew if its clock is behind.
    pub(crate) fn tunnel_to_initiate(&mut self, local: &LocalKey) -> &mut Tunnel {
        let tunnel = self.tunnel(local);
        if tunnel.is_behind() {
            tunnel.renew(local);
        }
        tunnel
    }

    /// Takes a new preshared key. Its session ends; all else stays.
    pub(crate) fn set_preshared_key(&mut self, key: Option<PresharedKey>) {
        self.preshared_key = key;
        self.has_new_key = self.tunnel.is_some();
    }

    /// The session layer, if it has been needed.
    pub(crate) fn existing_tunnel(&mut self, local: &LocalKey) -> Option<&mut Tunnel> {
        self.has_tunnel().then(|| self.tunnel(local))
    }

    /// Whether the session layer has been needed.
    pub(crate) fn has_tunnel(&self) -> bool {
        self.tunnel.is_some()
    }

    /// Where to send.
    pub(crate) fn destination(&self) -> Option<Destination> {
        let endpoint = self.location.endpoint();
        let Some(relay) = self.location.relay() else {
            return endpoint.map(Destination::Udp);
        };
        let both = endpoint.filter(|_| self.location.is_both());
        Some(match both {
            Some(endpoint) => Destination::Both(endpoint, relay, self.public_key),
            None => Destination::Relay(relay, self.public_key),
        })
    }

    /// See [`Location::way_to_judge`].
    pub(crate) fn way_to_judge(&mut self, pause: Duration, now: Duration) -> Option<Way> {
        self.location.way_to_judge(pause, now)
    }

    /// Has the timers looked at in time, after something has come or gone.
    pub(crate) fn arm(&mut self, id: PeerId, wheel: &mut Wheel, now: Duration) {
        let Some(tunnel) = &self.tunnel else {
            return;
        };
        let soonest = tunnel.soonest();
        if self.location.is_doubtful(now) {
            wheel.schedule(id, &mut self.scheduled, now, now);
        } else if soonest < self.scheduled {
            wheel.schedule(id, &mut self.scheduled, soonest, now);
        }
    }

    /// When its timers have something to do.
    pub(crate) fn next(&mut self) -> Duration {
        let tunnel = self.tunnel.as_mut().map_or(NEVER, |tunnel| tunnel.next());
        let keepalive = match (self.keepalive, self.last_traversal) {
            (Some(interval), Some(last)) => last + interval,
            (Some(_), None) => Duration::ZERO,
            (None, _) => NEVER,
        };
        tunnel.min(keepalive)
    }

    /// Whether a look at its timers may cost a key exchange.
    pub(crate) fn may_exchange(&self, local: &LocalKey, now: Duration) -> bool {
        self.tunnel.as_ref().is_some_and(|tunnel| {
            self.has_new_key || !tunnel.has_local(local) || tunnel.may_initiate(now)
        })
    }

    /// Learns something of where it is. True when it is elsewhere now.
    pub(crate) fn relocate(&mut self, learn: impl FnOnce(&mut Location)) -> bool {
        let old = self.path();
        learn(&mut self.location);
        let new = self.path();
        if old == new {
            return false;
        }
        self.set_uncut(Duration::ZERO);
        *self
            .shared
            .path
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = new;
        true
    }

    fn path(&self) -> Option<Path> {
        self.destination().map(|to| to.path())
    }

    /// Its key, if whoever says where it is should hear that there is traffic to it: something was sent since it
    /// was told last, or could not be (`waits`), and that is some time ago.
    pub(crate) fn tells_traffic(&mut self, waits: bool, now: Duration) -> Option<PublicKey> {
        if !self.location.is_told() {
            return None;
        }
        let sent = self.shared.tx_bytes.load(Ordering::Relaxed);
        let (before, at) = self.told.unzip();
        let is_due = at.is_none_or(|at| now.saturating_sub(at) >= TOLD);
        if !is_due || !(waits || sent != before.unwrap_or(0)) {
            return None;
        }
        self.told = Some((sent, now));
        Some(self.public_key)
    }

    /// A packet to `destination` is dropped, for nobody knows where the peer is.
    pub(crate) fn is_nowhere(&self, destination: IpAddr) {
        let packet = Nowhere {
            destination,
            at: SystemTime::now(),
        };
        let nowhere = &self.shared.nowhere;
        *nowhere.lock().unwrap_or_else(PoisonError::into_inner) = Some(packet);
    }

    /// Whether to ask the kernel to cut up messages on the way to the endpoint.
    pub(crate) fn gso(&self, now: Duration) -> bool {
        now >= self.uncut_until
    }

    /// The kernel has refused to: the path is too narrow, or the device cannot.
    pub(crate) fn without_gso(&mut self, now: Duration) {
        self.set_uncut(now + UNCUT);
    }

    fn set_uncut(&mut self, until: Duration) {
        self.uncut_until = until;
        let nanos = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX);
        self.shared.uncut_until.store(nanos, Ordering::Relaxed);
    }

    /// Counts authentic messages that came.
    pub(crate) fn received(&mut self, came: Amount, now: Duration) {
        count(&self.shared.rx_bytes, came.bytes);
        count(&self.shared.rx_packets, came.packets);
        self.touched(now);
    }

    /// Counts messages that go.
    pub(crate) fn sent(&mut self, went: Amount, now: Duration) {
        count(&self.shared.tx_bytes, went.bytes);
        count(&self.shared.tx_packets, went.packets);
        self.touched(now);
    }

    /// Puts off the next persistent keepalive.
    pub(crate) fn touched(&mut self, now: Duration) {
        self.last_traversal = Some(now);
    }

    /// Changes the interval of persistent keepalives; the first is due at once.
    pub(crate) fn set_keepalive(&mut self, interval: Option<Duration>) {
        self.keepalive = interval;
        self.last_traversal = None;
    }

    /// Whether nothing has come or gone for the keepalive interval.
    pub(crate) fn keepalive_due(&self, now: Duration) -> bool {
        self.keepalive.is_some_and(|interval| {
            self.last_traversal
                .is_none_or(|last| now.saturating_sub(last) >= interval)
        })
    }

    /// A handshake has completed.
    pub(crate) fn completed(&self) {
        let since = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let nanos = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        self.shared.last_handshake.store(nanos, Ordering::Relaxed);
    }
}

/// Peers by [`PeerId`].
#[derive(Default)]
pub(crate) struct Peers(Vec<Option<Box<Peer>>>);

impl Peers {
    /// The peer of a number.
    pub(crate) fn get(&self, id: PeerId) -> Option<&Peer> {
        self.0.get(id as usize)?.as_deref()
    }

    /// The peer of a number.
    pub(crate) fn get_mut(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.0.get_mut(id as usize)?.as_deref_mut()
    }

    /// All, with their numbers.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (PeerId, &mut Peer)> {
        let all = (0..).zip(&mut self.0);
        all.filter_map(|(id, peer)| Some((id, peer.as_deref_mut()?)))
    }

    /// Adds a peer.
    pub(crate) fn insert(&mut self, id: PeerId, peer: Peer) {
        let at = id as usize;
        if self.0.len() <= at {
            self.0.resize_with(at + 1, || None);
        }
        self.0[at] = Some(Box::new(peer));
    }

    /// Takes a peer away.
    pub(crate) fn remove(&mut self, id: PeerId) -> Option<Box<Peer>> {
        self.0.get_mut(id as usize)?.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_asked_again_to_cut_up_messages() {
        let public_key = PublicKey([7; 32]);
        let shared = Arc::new(Shared::new(public_key));
        let at = |host| SocketAddr::from(([192, 0, 2, host], 51820));
        let mut peer = Peer::new(Setup {
            id: 0,
            public_key,
            preshared_key: None,
            index: 0,
            endpoints: vec![at(1)],
            keepalive: None,
            roaming: true,
            shared: shared.clone(),
        });
        let now = uptime();
        assert!(peer.gso(now) && !shared.stats().uncut);
        peer.without_gso(now);
        assert!(!peer.gso(now + UNCUT / 2) && shared.stats().uncut);
        assert!(peer.gso(now + UNCUT));
        peer.relocate(|location| location.move_to(at(1)));
        assert!(!peer.gso(now));
        peer.relocate(|location| location.move_to(at(2)));
        assert!(peer.gso(now) && !shared.stats().uncut);
    }
}

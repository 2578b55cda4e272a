//! Sessions: handshakes, timers, and packets that wait for them.

use std::time::Duration;

use super::{Forwarder, JUDGE_AFTER, JUDGED, REST_AFTER, TICK};
use crate::engine::counters::Counter;
use crate::engine::forward::location::Location;
use crate::engine::forward::peer::Staged;
use crate::engine::forward::port::{Content, Origin, Port};
use crate::engine::forward::routes::PeerId;
use crate::wireguard::keys::PublicKey;
use crate::wireguard::message::{COOKIE, INITIATION};
use crate::wireguard::{Completed, Packets, Verdict};

impl Forwarder {
    /// A peer has proved itself.
    pub(super) fn heard(
        &mut self,
        id: PeerId,
        origin: &Origin,
        bytes: u64,
        completed: Completed,
        now: Duration,
        io: &mut impl Port,
    ) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        peer.received(bytes, now);
        let Origin {
            remote,
            local,
            interface,
            ..
        } = *origin;
        if peer.relocate(|location| location.heard(remote, local, interface)) {
            self.counters.add(Counter::Roamed, 1);
        }
        if completed {
            peer.completed();
            self.counters.add(Counter::HandshakesCompleted, 1);
        }
        if peer.staged.is_empty() || !peer.tunnel(&self.local).ready(now) {
            return;
        }
        let Some(endpoint) = peer.endpoint() else {
            return;
        };
        let mut queue = std::mem::take(&mut peer.staged);
        self.staged -= queue.len();
        let mut lane = self.batch.lane(io, endpoint, Some(id), 0, peer.gso(now));
        let mut staged = Staged::new(&mut queue);
        let tunnel = peer.tunnel(&self.local);
        let bytes = tunnel.seal(&mut staged, now, &mut lane);
        peer.sent(bytes, now);
    }

    /// Takes an initiation: judges it, finds out whose it is, and responds or hands it to the
    /// worker that owns the peer.
    pub(super) fn initiation(
        &mut self,
        origin: &Origin,
        message: &[u8],
        now: Duration,
        io: &mut impl Port,
    ) {
        if !self.admit(origin, message, now, io) {
            return;
        }
        let Some(key) = self.local.initiator(message) else {
            self.counters.add(Counter::DropHandshake, 1);
            return;
        };
        let id = self.directory.keys.get(&key);
        match id.and_then(|id| self.directory.owner(id)) {
            Some(owner) if owner != self.place.worker => {
                self.hand_over(owner, Content::Initiation(*origin, key), message, io);
            }
            _ => self.respond(&key, origin, message, now, io),
        }
    }

    /// Takes an initiation of a known sender.
    pub(super) fn respond(
        &mut self,
        key: &PublicKey,
        origin: &Origin,
        message: &[u8],
        now: Duration,
        io: &mut impl Port,
    ) {
        match self.directory.keys.get(key) {
            Some(id) => self.answer(id, origin, message, now, io),
            None => self.counters.add(Counter::DropUnknownPeer, 1),
        }
    }

    /// Takes a response or a cookie reply to one of our initiations.
    pub(super) fn handshake(
        &mut self,
        index: u32,
        origin: &Origin,
        message: &[u8],
        now: Duration,
        io: &mut impl Port,
    ) {
        let Some(id) = self.by_index(index) else {
            self.counters.add(Counter::DropIndex, 1);
            return;
        };
        // A cookie reply has no mac1; its own encryption protects it.
        if message.len() == COOKIE || self.admit(origin, message, now, io) {
            self.answer(id, origin, message, now, io);
        }
    }

    fn answer(
        &mut self,
        id: PeerId,
        origin: &Origin,
        message: &[u8],
        now: Duration,
        io: &mut impl Port,
    ) {
        self.wake(id, now);
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        let mut answer = [0; INITIATION];
        let tunnel = peer.tunnel(&self.local);
        match tunnel.handshake(message, now, &mut answer) {
            Ok((Some(length), completed)) => {
                let bytes = message.len() as u64;
                self.heard(id, origin, bytes, completed, now, io);
                self.send(id, &answer[..length], now, io);
            }
            // A cookie, for the next initiation.
            Ok((None, _)) => {
                peer.relocate(Location::told_to_wait);
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
                let mut lane = self.batch.lane(io, origin.endpoint(), None, 0, true);
                lane.push(&reply[..length]);
                Counter::CookiesSent
            }
            Verdict::WrongMac => Counter::DropMac,
            Verdict::OverRate => Counter::DropLimited,
        };
        self.counters.add(counter, 1);
        counter == Counter::HandshakesReceived
    }

    /// Starts a peer's timers if they rest.
    pub(super) fn wake(&mut self, id: PeerId, now: Duration) {
        if let Some(peer) = self.peers.get_mut(id)
            && !peer.active
        {
            peer.active = true;
            peer.used = now;
            self.active.push(id);
        }
    }

    /// Moves a peer's timers. False when they may rest.
    pub(super) fn tick_peer(&mut self, id: PeerId, now: Duration, io: &mut impl Port) -> bool {
        let Some(peer) = self.peers.get_mut(id) else {
            return false;
        };
        let rest = JUDGE_AFTER.max(TICK * (self.active.len() / JUDGED) as u32);
        if self.doubtful.len() < JUDGED
            && let Some(way) = peer.way_to_judge(rest, now)
        {
            self.doubtful.push((id, way));
        }
        let mut out = [0; INITIATION];
        let mut ready = false;
        let mut due = None;
        let mut unanswered = false;
        if let Some((tunnel, renewed)) = peer.existing_tunnel(&self.local) {
            self.exchanges += usize::from(renewed);
            let tick = tunnel.tick(now, &mut out);
            ready = tunnel.ready(now);
            due = tick.message;
            unanswered = tick.unanswered;
            if tick.gave_up {
                self.staged -= peer.staged.len();
                peer.staged.clear();
            }
        }
        if let Some(length) = due {
            if length == INITIATION {
                self.exchanges += 1;
                peer.relocate(|location| location.initiates(unanswered, now));
            }
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
        let Some(peer) = self.peers.get_mut(id) else {
            return false;
        };
        peer.active =
            ready || peer.keepalive.is_some() || now.saturating_sub(peer.used) < REST_AFTER;
        if !peer.active {
            self.staged -= peer.staged.len();
            peer.staged.clear();
        }
        peer.active
    }

    fn seal_keepalive(&mut self, id: PeerId, now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        let Some(endpoint) = peer.endpoint() else {
            return;
        };
        let mut lane = self.batch.lane(io, endpoint, Some(id), 0, peer.gso(now));
        let mut keepalive = Keepalive(false);
        let tunnel = peer.tunnel(&self.local);
        let bytes = tunnel.seal(&mut keepalive, now, &mut lane);
        peer.sent(bytes, now);
    }

    /// Sends an initiation, unless one is under way.
    pub(super) fn initiate(&mut self, id: PeerId, now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        let mut out = [0; INITIATION];
        if peer.endpoint().is_some()
            && let tunnel = peer.tunnel_to_initiate(&self.local)
            && let Some(length) = tunnel.initiate(now, &mut out)
        {
            self.exchanges += 1;
            peer.relocate(|location| location.initiates(false, now));
            self.send(id, &out[..length], now, io);
        }
    }

    /// Sends a message that is ready to where the peer is.
    fn send(&mut self, id: PeerId, message: &[u8], now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        let Some(endpoint) = peer.endpoint() else {
            return;
        };
        peer.sent(message.len() as u64, now);
        self.batch
            .lane(io, endpoint, Some(id), 0, peer.gso(now))
            .push(message);
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

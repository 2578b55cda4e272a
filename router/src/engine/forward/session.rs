//! Sessions: handshakes, timers, and packets that wait for them.

use std::time::Duration;

use super::{Forwarder, JUDGED};
use crate::engine::counters::Counter;
use crate::engine::forward::batch::Destination;
use crate::engine::forward::location::Location;
use crate::engine::forward::peer::{Amount, JUDGE_AFTER};
use crate::engine::forward::port::{Content, Origin, Port};
use crate::engine::forward::routes::PeerId;
use crate::engine::forward::wheel::{NEVER, TICK};
use crate::wireguard::keys::PublicKey;
use crate::wireguard::message::{COOKIE, INITIATION};
use crate::wireguard::{Completed, Limiter, Packets, Verdict};

impl Forwarder {
    /// A peer has proved itself.
    pub(super) fn heard(
        &mut self,
        id: PeerId,
        origin: &Origin,
        came: Amount,
        completed: Completed,
        now: Duration,
        io: &mut impl Port,
    ) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        peer.received(came, now);
        if peer.relocate(|location| match origin.destination() {
            Destination::Udp(from) => location.heard(from, origin.interface),
            Destination::Relay(relay, _) | Destination::Both(_, relay, _) => {
                location.heard_through(relay);
            }
        }) {
            self.counters.add(Counter::Roamed, 1);
        }
        if completed {
            peer.completed();
            self.counters.add(Counter::HandshakesCompleted, 1);
        }
        peer.arm(id, &mut self.wheel, now);
        if self.staged.is_empty() || !peer.tunnel(&self.local).ready(now) {
            return;
        }
        if let Some(to) = peer.destination()
            && let Some(mut queue) = self.staged.take(id)
        {
            let mut lane = self.batch.lane(io, to, Some(id), 0, peer.gso(now));
            let tunnel = peer.tunnel(&self.local);
            let bytes = tunnel.seal(&mut queue, now, &mut lane);
            let packets = lane.count();
            peer.sent(Amount { packets, bytes }, now);
            peer.arm(id, &mut self.wheel, now);
        }
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
        if message.len() == COOKIE
            || self.is_expected(id, index, message)
            || self.admit(origin, message, now, io)
        {
            self.answer(id, origin, message, now, io);
        }
    }

    /// Whether this answers an initiation of ours. How many may is bounded by those, so the limit for
    /// strangers is not asked.
    fn is_expected(&mut self, id: PeerId, index: u32, message: &[u8]) -> bool {
        if !Limiter::has_mac(&self.local, message) {
            return false;
        }
        let Some(peer) = self.peers.get_mut(id) else {
            return false;
        };
        let expected = peer.tunnel(&self.local).expects(index);
        self.counters
            .add(Counter::HandshakesReceived, expected.into());
        expected
    }

    fn answer(
        &mut self,
        id: PeerId,
        origin: &Origin,
        message: &[u8],
        now: Duration,
        io: &mut impl Port,
    ) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        let mut answer = [0; INITIATION];
        let tunnel = peer.tunnel(&self.local);
        match tunnel.handshake(message, now, &mut answer) {
            Ok((Some(length), completed)) => {
                let came = Amount::of(message);
                self.heard(id, origin, came, completed, now, io);
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
                let mut lane = self.batch.lane(io, origin.destination(), None, 0, true);
                lane.push(&reply[..length]);
                Counter::CookiesSent
            }
            Verdict::WrongMac => Counter::DropMac,
            Verdict::OverRate => Counter::DropLimited,
        };
        self.counters.add(counter, 1);
        counter == Counter::HandshakesReceived
    }

    /// Has a peer's timers looked at now.
    pub(super) fn wake(&mut self, id: PeerId, now: Duration) {
        if let Some(peer) = self.peers.get_mut(id) {
            self.wheel.schedule(id, &mut peer.scheduled, now, now);
        }
    }

    /// Puts a peer into the queue of those who want to begin a handshake.
    fn ask(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get_mut(id)
            && !std::mem::replace(&mut peer.asks, true)
        {
            self.asking.push_back(id);
        }
    }

    /// Looks at a peer's timers. `its_turn`: it has waited for its turn to make a key exchange.
    pub(super) fn visit(&mut self, id: PeerId, its_turn: bool, now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        let mut must_wait = || !self.asking.is_empty() || !self.pace.take(now);
        if !its_turn && peer.may_exchange(&self.local, now) && must_wait() {
            return self.ask(id);
        }
        let pause = JUDGE_AFTER.max(TICK * (self.wheel.len() / JUDGED) as u32);
        if self.doubtful.len() < JUDGED
            && let Some(way) = peer.way_to_judge(pause, now)
        {
            self.doubtful.push((id, way));
        }
        let mut out = [0; INITIATION];
        let mut ready = false;
        let mut due = None;
        let mut unanswered = false;
        if let Some(tunnel) = peer.existing_tunnel(&self.local) {
            // A new key makes it forget what it waited for.
            if its_turn && self.staged.has(id) && !tunnel.ready(now) && !tunnel.is_trying() {
                tunnel.want(now);
            }
            let tick = tunnel.tick(now, &mut out);
            ready = tunnel.ready(now);
            due = tick.message;
            unanswered = tick.unanswered;
            if tick.gave_up {
                let dropped = self.staged.discard(id);
                self.counters.add(Counter::DropStaged, dropped);
            }
        }
        if let Some(length) = due {
            if length == INITIATION {
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
        }
        if let Some(peer) = self.peers.get_mut(id) {
            self.busy.extend(peer.tells_traffic(false, now));
            // Not in the same turn again, whatever is left.
            let next = peer.next().max(now + Duration::from_millis(1));
            if next < NEVER {
                self.wheel.schedule(id, &mut peer.scheduled, next, now);
            }
        }
    }

    fn seal_keepalive(&mut self, id: PeerId, now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        let Some(to) = peer.destination() else {
            return;
        };
        let mut lane = self.batch.lane(io, to, Some(id), 0, peer.gso(now));
        let mut keepalive = Keepalive(false);
        let tunnel = peer.tunnel(&self.local);
        let bytes = tunnel.seal(&mut keepalive, now, &mut lane);
        let packets = lane.count();
        peer.sent(Amount { packets, bytes }, now);
    }

    /// Begins a handshake, unless one is under way: at once, or when it is the peer's turn.
    pub(super) fn initiate(&mut self, id: PeerId, now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        if peer.destination().is_none() {
            return;
        }
        let asks = peer.asks;
        let tunnel = peer.tunnel_to_initiate(&self.local);
        // One that waits for its turn may have forgotten why, with its old key.
        if asks && tunnel.may_initiate(now) {
            return;
        }
        let wants = tunnel.want(now);
        if asks {
            return;
        }
        if wants {
            self.visit(id, false, now, io);
        } else {
            peer.arm(id, &mut self.wheel, now);
        }
    }

    /// Sends a message that is ready to where the peer is.
    fn send(&mut self, id: PeerId, message: &[u8], now: Duration, io: &mut impl Port) {
        let Some(peer) = self.peers.get_mut(id) else {
            return;
        };
        let Some(to) = peer.destination() else {
            return;
        };
        peer.sent(Amount::of(message), now);
        self.batch
            .lane(io, to, Some(id), 0, peer.gso(now))
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

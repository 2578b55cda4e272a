//! The session with one peer, by boringtun.
//!
//! boringtun does the Noise protocol and the data messages. All timers are ours, for its own read a
//! clock that callers cannot give, and count from the wrong packets (docs/findings.md). What else it
//! leaves out is done here too: low-order ephemeral keys,
//! REJECT_AFTER_MESSAGES, the moment at which a handshake counts as completed, byte counts as
//! `wg show` has them. Packets are never queued in boringtun: callers ask [`Tunnel::ready`] first,
//! and stage them.

mod session;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant, SystemTime};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;
use session::{SLOTS, Session};

use super::keys::{PresharedKey, PublicKey};
use super::message::{self, DATA_OVERHEAD, INITIATION, Kind, REJECT_AFTER_MESSAGES};
use super::timers::{Due, LAST_MINUTE, REJECT_AFTER, REKEY_AFTER, Timers};
use super::{Arena, LocalKey, Opened, Packets};

/// Why a message was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Wrong tag: forged or damaged.
    Auth,
    /// Counter seen before, too old, or beyond the last valid one.
    Replay,
    /// Its session is gone.
    Expired,
    /// It decrypts to something that is no IP packet.
    Inner,
    /// A handshake message out of turn, replayed or forged.
    Handshake,
}

/// A handshake has completed with the message just processed.
pub(crate) type Completed = bool;

/// What the timers ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tick {
    /// A message of this length is due.
    pub(crate) message: Option<usize>,
    /// It is an initiation, since what went before has not been answered.
    pub(crate) unanswered: bool,
    /// A handshake was tried for long enough: nothing may wait for one.
    pub(crate) gave_up: bool,
}

/// The session with one peer.
pub(crate) struct Tunnel {
    peer: PublicKey,
    preshared: Option<PresharedKey>,
    tunn: Tunn,
    /// The one before [`Tunnel::renew`], until `tunn` has seen an initiation too: it alone knows
    /// which are old ones.
    previous: Option<Box<Tunn>>,
    /// Our public key that both were made with.
    own: x25519::PublicKey,
    /// The last index that boringtun took; it counts up in the lower 8 bits.
    index: u32,
    sessions: [Option<Session>; SLOTS],
    /// The slot that boringtun sends from. What stands in it is confirmed.
    current: usize,
    /// Sessions so far.
    serial: u64,
    timers: Timers,
    /// Traffic goes over a session that we should renew.
    rekey: bool,
    /// The current session has been renewed because of packets that came.
    last_minute: bool,
    /// When keys that nobody uses any more are to be erased.
    erase: Option<Duration>,
    /// Answers to the last initiation that are worth work.
    answers: u8,
    /// Both clocks when `tunn` was made.
    made: (SystemTime, Instant),
}

/// Responses to one initiation that are worth work without asking the limiter: the right one, and some
/// that somebody who sees the initiation puts before it.
const ANSWERS: u8 = 3;

/// How far the wall clock may run ahead of what boringtun takes for it.
const CLOCK_STEP: Duration = Duration::from_secs(2);
/// boringtun's clock may be that much behind ours.
const CLOCK_SLACK: Duration = Duration::from_secs(1);

fn make(
    local: &LocalKey,
    peer: &PublicKey,
    preshared: Option<&PresharedKey>,
    index: u32,
) -> (Tunn, (SystemTime, Instant)) {
    let tunn = Tunn::new(
        local.secret.clone(),
        x25519::PublicKey::from(peer.0),
        preshared.map(|key| *key.expose()),
        None,
        index >> 8,
        Some(local.calm.clone()),
    );
    (tunn, (SystemTime::now(), Instant::now()))
}

impl Tunnel {
    /// A tunnel without a session. `index` has 24 bits: the receiver indices that the peer will
    /// name are `index << 8` and the 255 after it.
    pub(crate) fn new(
        local: &LocalKey,
        peer: &PublicKey,
        preshared: Option<&PresharedKey>,
        index: u32,
    ) -> Self {
        let index = index << 8;
        let (tunn, made) = make(local, peer, preshared, index);
        Self {
            peer: *peer,
            preshared: preshared.cloned(),
            tunn,
            previous: None,
            own: local.public,
            index,
            sessions: [None; SLOTS],
            current: 0,
            serial: 0,
            timers: Timers::new(index >> 8),
            rekey: false,
            last_minute: false,
            erase: None,
            answers: 0,
            made,
        }
    }

    /// Whether this tunnel stamps initiations with a time that has been corrected since. Peers
    /// ignore a stamp older than the last they saw, so it is better renewed. boringtun reads the
    /// wall clock once, and machines without a battery start in the past.
    pub(crate) fn is_behind(&self) -> bool {
        let (wall, steady) = self.made;
        let elapsed = wall.elapsed().unwrap_or_default();
        self.current().is_none() && elapsed > steady.elapsed() + CLOCK_STEP
    }

    /// Starts anew with the same peer. Sessions end; initiations seen before stay refused.
    pub(crate) fn renew(&mut self, local: &LocalKey) {
        self.set_local(local);
        let (tunn, made) = make(local, &self.peer, self.preshared.as_ref(), self.index);
        self.index &= !0xff;
        self.current = 0;
        let mut old = std::mem::replace(&mut self.tunn, tunn);
        self.made = made;
        if self.previous.is_none() {
            // Erases its sessions.
            old.set_static_private(local.secret.clone(), local.public, Some(local.calm.clone()));
            self.previous = Some(Box::new(old));
        }
        self.forget_sessions();
    }

    /// Takes a new preshared key. Sessions end.
    pub(crate) fn set_preshared(&mut self, local: &LocalKey, preshared: Option<&PresharedKey>) {
        self.preshared = preshared.cloned();
        self.renew(local);
    }

    /// Whether it has this private key.
    pub(crate) fn has_local(&self, local: &LocalKey) -> bool {
        self.own == local.public
    }

    /// Takes a new private key. Sessions made with the old one end. False when it is not new.
    pub(crate) fn set_local(&mut self, local: &LocalKey) -> bool {
        if self.has_local(local) {
            return false;
        }
        self.own = local.public;
        let previous = self.previous.as_deref_mut();
        for tunn in [Some(&mut self.tunn), previous].into_iter().flatten() {
            tunn.set_static_private(local.secret.clone(), local.public, Some(local.calm.clone()));
        }
        self.forget_sessions();
        true
    }

    fn forget_sessions(&mut self) {
        self.sessions = [None; SLOTS];
        self.rekey = false;
        self.last_minute = false;
        self.erase = None;
        self.timers.restart();
    }

    /// Whether packets can be sealed now.
    pub(crate) fn ready(&self, now: Duration) -> bool {
        self.current().is_some_and(|session| session.alive(now))
    }

    fn current(&self) -> Option<&Session> {
        self.sessions[self.current].as_ref()
    }

    /// Whether sending asks for a new session.
    fn is_old(&self, now: Duration) -> bool {
        self.current()
            .is_some_and(|session| session.ours && session.age(now) >= REKEY_AFTER)
    }

    /// Opens data messages of one receiver index, in order. Tells how many bytes of them were
    /// authentic (whole messages, as `wg show` counts), and whether one confirmed a handshake.
    pub(crate) fn open<'a>(
        &mut self,
        index: u32,
        messages: impl Iterator<Item = &'a [u8]>,
        now: Duration,
        opened: &mut impl Opened,
    ) -> (u64, Completed) {
        let slot = Session::slot(index);
        let known = self.sessions[slot].filter(|s| s.index == index && s.alive(now));
        if known.is_none() {
            messages.for_each(|_| opened.refused(Refused::Expired));
            return (0, false);
        }
        let (mut authentic, mut data) = (0, false);
        for message in messages {
            // boringtun computes with the counter before it looks at it.
            if message::counter(message).is_none_or(|c| c >= REJECT_AFTER_MESSAGES) {
                opened.refused(Refused::Replay);
                continue;
            }
            match self.tunn.decapsulate(None, message, opened.slot()) {
                TunnResult::WriteToTunnelV4(packet, _) => {
                    let length = packet.len();
                    opened.packet(length);
                    data = true;
                }
                TunnResult::WriteToTunnelV6(packet, _) => {
                    let length = packet.len();
                    opened.packet(length);
                    data = true;
                }
                TunnResult::Done => opened.packet(0),
                // boringtun gives this only after the tag was right.
                TunnResult::Err(WireGuardError::InvalidPacket) => opened.refused(Refused::Inner),
                TunnResult::Err(why) => {
                    opened.refused(match why {
                        WireGuardError::InvalidAeadTag => Refused::Auth,
                        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => {
                            Refused::Replay
                        }
                        _ => Refused::Expired,
                    });
                    continue;
                }
                TunnResult::WriteToNetwork(_) => continue,
            }
            authentic += message.len() as u64;
        }
        let completed = authentic > 0 && self.heard(slot, data, now);
        (authentic, completed)
    }

    /// The session in a slot has brought something authentic. Tells whether that confirmed it.
    fn heard(&mut self, slot: usize, data: bool, now: Duration) -> Completed {
        self.timers.received();
        if data {
            self.timers.data_received(now);
        }
        let newest = self.current().map(|session| session.serial);
        let Some(session) = &mut self.sessions[slot] else {
            return false;
        };
        let completed = !std::mem::replace(&mut session.confirmed, true);
        let last_minute = session.ours && session.age(now) >= LAST_MINUTE;
        // As boringtun does it.
        if newest.is_none_or(|newest| session.serial > newest) {
            self.current = slot;
        }
        if completed {
            self.completed();
        } else if last_minute && self.current == slot && !self.last_minute {
            self.last_minute = true;
            self.rekey = true;
        }
        completed
    }

    fn completed(&mut self) {
        self.timers.completed();
        self.rekey = false;
        self.last_minute = false;
    }

    /// Seals packets into an arena. Tells how many bytes of messages were made. Nothing when not
    /// [`Tunnel::ready`].
    pub(crate) fn seal(
        &mut self,
        packets: &mut impl Packets,
        now: Duration,
        arena: &mut impl Arena,
    ) -> u64 {
        if !self.ready(now) {
            return 0;
        }
        let (mut bytes, mut data) = (0, false);
        while let Some(packet) = packets.next() {
            let length = packet.len() + DATA_OVERHEAD;
            data |= !packet.is_empty();
            // A session ends after 180 s; no machine reaches the last valid counter by then.
            if let TunnResult::WriteToNetwork(message) =
                self.tunn.encapsulate(packet, arena.slot(length))
            {
                let length = message.len();
                arena.filled(length);
                bytes += length as u64;
            }
        }
        if bytes > 0 {
            self.timers.sent();
            self.rekey |= self.is_old(now);
        }
        if data {
            self.timers.data_sent(now);
        }
        bytes
    }

    /// Processes a handshake message that the limiter let pass, or a cookie reply. `out` gets the
    /// answer, if there is one; its length is returned.
    pub(crate) fn handshake(
        &mut self,
        message: &[u8],
        now: Duration,
        out: &mut [u8; INITIATION],
    ) -> Result<(Option<usize>, Completed), Refused> {
        let kind = message::kind(message).ok_or(Refused::Handshake)?;
        let exchange = matches!(kind, Kind::Initiation | Kind::Response(_));
        if exchange && message::ephemeral(message).is_none_or(message::is_low_order) {
            return Err(Refused::Handshake);
        }
        self.update_clock();
        if kind == Kind::Initiation {
            if let Some(previous) = &mut self.previous {
                let mut scrap = [0; INITIATION];
                let result = previous.decapsulate(None, message, &mut scrap);
                if !matches!(result, TunnResult::WriteToNetwork(_)) {
                    return Err(Refused::Handshake);
                }
            }
            self.spare_current();
        }
        let length = match self.tunn.decapsulate(None, message, out) {
            TunnResult::WriteToNetwork(answer) => answer.len(),
            TunnResult::Done => return Ok((None, false)),
            _ => return Err(Refused::Handshake),
        };
        let index = match kind {
            // Our initiation was answered; the answer to that is a keepalive.
            Kind::Response(index) => index,
            _ => {
                self.previous = None;
                self.index = message::sender(out).unwrap_or(self.index);
                self.index
            }
        };
        let ours = kind != Kind::Initiation;
        let slot = Session::slot(index);
        self.serial += 1;
        self.sessions[slot] = Some(Session {
            index,
            serial: self.serial,
            born: now,
            ours,
            confirmed: ours,
        });
        self.erase = Some(now + REJECT_AFTER + CLOCK_SLACK);
        self.timers.received();
        self.timers.sent();
        if ours {
            self.current = slot;
            self.completed();
        }
        Ok((Some(length), ours))
    }

    /// Keeps a session that is not confirmed yet out of the slot that boringtun sends from: eight
    /// initiations whose responses get lost would end the session there.
    fn spare_current(&mut self) {
        let next = (self.index & !0xff) | u32::from((self.index as u8).wrapping_add(1));
        if Session::slot(next) == self.current {
            // Takes that index, and nothing else that matters.
            self.write_initiation(&mut [0; INITIATION]);
        }
    }

    /// A session is wanted. Tells whether an initiation is due at once, with the next
    /// [`Tunnel::tick`]; when one went just now it is not, for that is repeated until it is answered.
    pub(crate) fn want(&mut self, now: Duration) -> bool {
        self.rekey = self.timers.ask(now);
        self.rekey
    }

    /// Whether [`Tunnel::tick`] may begin a handshake.
    pub(crate) fn may_initiate(&self, now: Duration) -> bool {
        self.rekey || self.timers.may_initiate(now)
    }

    /// Whether a handshake is wanted, or under way.
    pub(crate) fn is_trying(&self) -> bool {
        self.rekey || self.timers.is_trying()
    }

    /// Nothing is due before; cheap, and perhaps too early.
    pub(crate) fn soonest(&self) -> Duration {
        if self.rekey {
            return Duration::ZERO;
        }
        let erase = self.erase.unwrap_or(Duration::MAX);
        self.timers.soonest().min(erase)
    }

    /// When [`Tunnel::tick`] has something to do.
    pub(crate) fn next(&mut self) -> Duration {
        if self.rekey {
            return Duration::ZERO;
        }
        let erase = self.erase.unwrap_or(Duration::MAX);
        self.timers.next().min(erase)
    }

    /// Whether a response to this index may answer the initiation that is under way. Few may: so what
    /// they cost is bounded by what we began.
    pub(crate) fn expects(&mut self, index: u32) -> bool {
        let expected = self.timers.is_trying() && self.index == index && self.answers > 0;
        self.answers -= u8::from(expected);
        expected
    }

    fn send_initiation(&mut self, now: Duration, out: &mut [u8; INITIATION]) -> Option<usize> {
        self.update_clock();
        self.timers.initiated(now);
        self.answers = ANSWERS;
        self.write_initiation(out)
    }

    fn write_initiation(&mut self, out: &mut [u8; INITIATION]) -> Option<usize> {
        let TunnResult::WriteToNetwork(message) = self.tunn.format_handshake_initiation(out, true)
        else {
            return None;
        };
        self.index = message::sender(message).unwrap_or(self.index);
        Some(message.len())
    }

    /// Does what is due; to be called soon after [`Tunnel::next`].
    pub(crate) fn tick(&mut self, now: Duration, out: &mut [u8; INITIATION]) -> Tick {
        let mut tick = Tick {
            message: None,
            unanswered: false,
            gave_up: false,
        };
        if self.erase.is_some_and(|at| at <= now) {
            self.update_clock();
            self.sessions = [None; SLOTS];
            self.erase = None;
        }
        if std::mem::take(&mut self.rekey) && self.timers.ask(now) {
            tick.message = self.send_initiation(now, out);
            return tick;
        }
        while tick.message.is_none()
            && let Some(due) = self.timers.due(now)
        {
            match due {
                Due::Initiation => {
                    tick.message = self.send_initiation(now, out);
                    tick.unanswered = true;
                }
                Due::Keepalive if self.ready(now) => {
                    if let TunnResult::WriteToNetwork(message) = self.tunn.encapsulate(&[], out) {
                        tick.message = Some(message.len());
                        self.rekey |= self.is_old(now);
                    }
                }
                Due::Keepalive => {}
                Due::GiveUp => {
                    self.update_clock();
                    tick.gave_up = true;
                }
            }
        }
        tick
    }

    /// Has boringtun look at its clock: it dates sessions by the last time it did, and erases old
    /// ones. What its own timers ask for is left undone: it cannot write an initiation into so
    /// little room, and its keepalive is lost.
    fn update_clock(&mut self) {
        let _ = self.tunn.update_timers(&mut [0; DATA_OVERHEAD]);
        if self.tunn.time_since_last_handshake().is_none() {
            self.sessions[self.current] = None;
        }
    }
}

#[cfg(any(test, feature = "internals"))]
impl Tunnel {
    /// An initiation even though one is under way.
    pub(crate) fn initiate_again(&mut self, out: &mut [u8; INITIATION]) {
        assert!(self.write_initiation(out).is_some());
    }
}

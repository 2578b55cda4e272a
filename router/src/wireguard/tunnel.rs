//! The session with one peer, by boringtun.
//!
//! What boringtun leaves out is done here: low-order ephemeral keys, REJECT_AFTER_MESSAGES,
//! the moment at which a handshake counts as completed, and byte counts as `wg show` has them.
//! Packets are never queued in boringtun: callers ask [`Tunnel::ready`] first, and stage them.

use std::time::{Duration, Instant, SystemTime};

use boringtun::noise::errors::WireGuardError;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519;

use super::keys::{PresharedKey, PublicKey};
use super::message::{self, DATA_OVERHEAD, INITIATION, Kind, REJECT_AFTER_MESSAGES};
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
    /// There is no session and no handshake under way: nothing may wait for one.
    pub(crate) gave_up: bool,
}

/// The session with one peer.
pub(crate) struct Tunnel {
    tunn: Tunn,
    /// Our public key that it was made with.
    own: x25519::PublicKey,
    /// Whether there is a session to send with.
    ready: bool,
    /// Our index of the session that the peer has yet to confirm.
    unconfirmed: Option<u32>,
    /// Both clocks when `tunn` was made.
    made: (SystemTime, Instant),
}

/// How far the wall clock may run ahead of what boringtun takes for it.
const CLOCK_STEP: Duration = Duration::from_secs(2);

impl Tunnel {
    /// A tunnel without a session. `index` has 24 bits: the receiver indices that the peer will
    /// name are `index << 8` and the 255 after it.
    pub(crate) fn new(
        local: &LocalKey,
        peer: &PublicKey,
        preshared: Option<&PresharedKey>,
        index: u32,
    ) -> Self {
        Self {
            tunn: Tunn::new(
                local.secret.clone(),
                x25519::PublicKey::from(peer.0),
                preshared.map(|key| *key.expose()),
                // Keepalives are ours: boringtun cannot change the interval later.
                None,
                index & 0x00ff_ffff,
                Some(local.calm.clone()),
            ),
            own: local.public,
            ready: false,
            unconfirmed: None,
            made: (SystemTime::now(), Instant::now()),
        }
    }

    /// Whether this tunnel stamps initiations with a time that has been corrected since. Peers
    /// ignore a stamp older than the last they saw, so it is better made anew. boringtun reads the
    /// wall clock once, and machines without a battery start in the past.
    pub(crate) fn is_behind(&self) -> bool {
        let (wall, steady) = self.made;
        let elapsed = wall.elapsed().unwrap_or_default();
        !self.ready && elapsed > steady.elapsed() + CLOCK_STEP
    }

    /// Takes a new private key. Sessions made with the old one end. False when it is not new.
    pub(crate) fn set_local(&mut self, local: &LocalKey) -> bool {
        if self.own == local.public {
            return false;
        }
        self.own = local.public;
        self.tunn
            .set_static_private(local.secret.clone(), local.public, Some(local.calm.clone()));
        self.ready = false;
        self.unconfirmed = None;
        true
    }

    /// Whether packets can be sealed now.
    pub(crate) fn ready(&self) -> bool {
        self.ready
    }

    /// Opens data messages of one receiver index, in order. Tells how many bytes of them were
    /// authentic (whole messages, as `wg show` counts), and whether one confirmed a handshake.
    pub(crate) fn open<'a>(
        &mut self,
        messages: impl Iterator<Item = &'a [u8]>,
        opened: &mut impl Opened,
    ) -> (u64, Completed) {
        let mut authentic = 0;
        let mut completed = false;
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
                }
                TunnResult::WriteToTunnelV6(packet, _) => {
                    let length = packet.len();
                    opened.packet(length);
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
            self.ready = true;
            authentic += message.len() as u64;
            if let Some(index) = self.unconfirmed
                && message::kind(message) == Some(Kind::Data(index))
            {
                self.unconfirmed = None;
                completed = true;
            }
        }
        (authentic, completed)
    }

    /// Seals packets into an arena. Tells how many bytes of messages were made. Nothing when not
    /// [`Tunnel::ready`].
    pub(crate) fn seal(&mut self, packets: &mut impl Packets, arena: &mut impl Arena) -> u64 {
        let mut bytes = 0;
        while self.ready
            && let Some(packet) = packets.next()
        {
            let length = packet.len() + DATA_OVERHEAD;
            // A session ends after 180 s; no machine reaches the last valid counter by then.
            if let TunnResult::WriteToNetwork(message) =
                self.tunn.encapsulate(packet, arena.slot(length))
            {
                let length = message.len();
                arena.filled(length);
                bytes += length as u64;
            }
        }
        bytes
    }

    /// Processes a handshake message that the limiter let pass, or a cookie reply. `out` gets the
    /// answer, if there is one; its length is returned.
    pub(crate) fn handshake(
        &mut self,
        message: &[u8],
        out: &mut [u8; INITIATION],
    ) -> Result<(Option<usize>, Completed), Refused> {
        let kind = message::kind(message).ok_or(Refused::Handshake)?;
        let exchange = matches!(kind, Kind::Initiation | Kind::Response(_));
        if exchange && message::ephemeral(message).is_none_or(message::is_low_order) {
            return Err(Refused::Handshake);
        }
        match self.tunn.decapsulate(None, message, out) {
            TunnResult::WriteToNetwork(answer) => {
                let length = answer.len();
                if kind == Kind::Initiation {
                    self.unconfirmed = message::sender(answer);
                    Ok((Some(length), false))
                } else {
                    // Our initiation was answered; the answer to that is a keepalive.
                    self.ready = true;
                    Ok((Some(length), true))
                }
            }
            TunnResult::Done => Ok((None, false)),
            _ => Err(Refused::Handshake),
        }
    }

    /// An initiation for the peer, unless one is under way.
    pub(crate) fn initiate(&mut self, out: &mut [u8; INITIATION]) -> Option<usize> {
        match self.tunn.format_handshake_initiation(out, false) {
            TunnResult::WriteToNetwork(message) => Some(message.len()),
            _ => None,
        }
    }

    /// Moves boringtun's timers; to be called about every 100 ms while the peer is in use, and
    /// once before it is used again.
    pub(crate) fn tick(&mut self, out: &mut [u8; INITIATION]) -> Tick {
        let result = self.tunn.update_timers(out);
        let tick = Tick {
            message: match &result {
                TunnResult::WriteToNetwork(message) => Some(message.len()),
                _ => None,
            },
            gave_up: matches!(result, TunnResult::Err(WireGuardError::ConnectionExpired)),
        };
        // An answered initiation has a session here too, but not to send with before the peer has
        // confirmed it.
        self.ready &= self.tunn.time_since_last_handshake().is_some();
        tick
    }
}

#[cfg(test)]
impl Tunnel {
    /// An initiation even though one is under way.
    pub(super) fn initiate_again(&mut self, out: &mut [u8; INITIATION]) {
        let result = self.tunn.format_handshake_initiation(out, true);
        assert!(matches!(result, TunnResult::WriteToNetwork(_)));
    }
}

#[cfg(test)]
mod tests {
    use super::super::keys::PrivateKey;
    use super::*;

    /// Collects sealed messages and opened packets.
    #[derive(Default)]
    struct Heap {
        slot: Vec<u8>,
        all: Vec<Vec<u8>>,
        refused: Vec<Refused>,
    }

    impl Arena for Heap {
        fn slot(&mut self, length: usize) -> &mut [u8] {
            self.slot = vec![0; length];
            &mut self.slot
        }

        fn filled(&mut self, length: usize) {
            self.all.push(self.slot[..length].to_vec());
        }
    }

    impl Opened for Heap {
        fn slot(&mut self) -> &mut [u8] {
            self.slot = vec![0; 2000];
            &mut self.slot
        }

        fn packet(&mut self, length: usize) {
            self.all.push(self.slot[..length].to_vec());
        }

        fn refused(&mut self, why: Refused) {
            self.refused.push(why);
        }
    }

    struct Listed<'a>(std::slice::Iter<'a, &'a [u8]>);

    impl Packets for Listed<'_> {
        fn next(&mut self) -> Option<&[u8]> {
            self.0.next().copied()
        }
    }

    fn pair() -> (Tunnel, Tunnel) {
        let keys = [1, 2].map(|seed| LocalKey::new(&PrivateKey::from_bytes([seed; 32])));
        let tunnel =
            |own: usize, index| Tunnel::new(&keys[own], &keys[1 - own].public(), None, index);
        (tunnel(0, 0x00ab_cdef), tunnel(1, 0x0012_3456))
    }

    fn connected() -> (Tunnel, Tunnel) {
        let (mut client, mut router) = pair();
        let (mut one, mut two, mut three) = ([0; INITIATION], [0; INITIATION], [0; INITIATION]);
        let length = client.initiate(&mut one).unwrap();
        let (length, completed) = router.handshake(&one[..length], &mut two).unwrap();
        assert!(
            !completed && !router.ready(),
            "the initiator has yet to prove itself"
        );
        let (length, completed) = client
            .handshake(&two[..length.unwrap()], &mut three)
            .unwrap();
        assert!(completed && client.ready());
        let keepalive = &three[..length.unwrap()];
        let mut opened = Heap::default();
        let result = router.open([keepalive].into_iter(), &mut opened);
        assert_eq!(result, (keepalive.len() as u64, true));
        assert!(router.ready());
        (client, router)
    }

    /// A small IPv4 packet, padded.
    fn packet(serial: u8) -> [u8; 32] {
        let mut packet = [0; 32];
        packet[..4].copy_from_slice(&[0x45, 0, 0, 30]);
        packet[29] = serial;
        packet
    }

    #[test]
    fn receiver_indices_begin_with_the_given_bits() {
        let (mut client, mut router) = pair();
        let (mut one, mut two) = ([0; INITIATION], [0; INITIATION]);
        client.initiate(&mut one).unwrap();
        let (length, _) = router.handshake(&one, &mut two).unwrap();
        assert_eq!(
            message::sender(&one).map(|index| index >> 8),
            Some(0x00ab_cdef)
        );
        let response = &two[..length.unwrap()];
        assert_eq!(
            message::sender(response).map(|index| index >> 8),
            Some(0x0012_3456)
        );
    }

    #[test]
    fn padding_is_sent_and_taken_off() {
        let (mut client, mut router) = connected();
        let mut sealed = Heap::default();
        let plain = [packet(1), packet(2)];
        let list = plain.each_ref().map(|p| p.as_slice());
        let bytes = client.seal(&mut Listed(list.iter()), &mut sealed);
        assert_eq!(bytes, 128);
        let mut opened = Heap::default();
        let result = router.open(sealed.all.iter().map(Vec::as_slice), &mut opened);
        assert_eq!(result, (128, false));
        assert_eq!(opened.all, plain.map(|p| p[..30].to_vec()));
    }

    #[test]
    fn counters_beyond_the_last_are_refused_before_any_work() {
        let (mut client, mut router) = connected();
        let mut sealed = Heap::default();
        client.seal(&mut Listed([packet(1).as_slice()].iter()), &mut sealed);
        sealed.all[0][8..16].copy_from_slice(&REJECT_AFTER_MESSAGES.to_le_bytes());
        let mut opened = Heap::default();
        router.open([sealed.all[0].as_slice()].into_iter(), &mut opened);
        assert_eq!(opened.refused, [Refused::Replay]);
    }

    #[test]
    fn handshakes_with_keys_of_small_order_are_refused() {
        let (mut client, mut router) = pair();
        let mut one = [0; INITIATION];
        client.initiate(&mut one).unwrap();
        one[8..40].fill(0);
        assert_eq!(
            router.handshake(&one, &mut [0; INITIATION]),
            Err(Refused::Handshake)
        );
    }

    #[test]
    fn an_unconfirmed_session_is_not_sent_with() {
        let (mut client, mut router) = pair();
        // boringtun has eight slots for sessions; one of them counts as current from the start.
        for _ in 0..8 {
            let (mut one, mut two) = ([0; INITIATION], [0; INITIATION]);
            client.initiate_again(&mut one);
            router.handshake(&one, &mut two).unwrap();
            router.tick(&mut two);
            assert!(!router.ready());
        }
    }

    #[test]
    fn a_corrected_clock_is_noticed_between_sessions() {
        let (mut client, _) = pair();
        assert!(!client.is_behind());
        client.made.0 -= Duration::from_secs(3600);
        assert!(client.is_behind());
        client.ready = true;
        assert!(!client.is_behind());
    }

    #[test]
    fn no_session_seals_nothing() {
        let (mut client, _) = pair();
        let mut sealed = Heap::default();
        let bytes = client.seal(&mut Listed([packet(1).as_slice()].iter()), &mut sealed);
        assert_eq!((bytes, sealed.all.len()), (0, 0));
    }
}

//! One connection to a relay, without I/O: who each is, signs of life, what goes and what comes.
//!
//! After `derp/derp_client.go`. There nothing tells a dead connection but 120 s of silence. Here the relay is asked
//! sooner, for as long as this is a node's home, nobody finds it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use crypto_box::aead::Aead as _;
use crypto_box::{PublicKey, SalsaBox, SecretKey};
use serde::{Deserialize, Serialize};

use super::GoneReason;
use super::bucket::Bucket;
use super::frames::{self, Frame, FrameError, MOST_DATAGRAM, OVERHEAD};
use super::queue::Queue;
use crate::tailnet::keys::{NodePublic, NodeSecret};

/// Version of the protocol: datagrams come with their sender.
const VERSION: u32 = 2;
const NONCE: usize = 24;
/// How long the relay may take to let the node in.
const HELLO: Duration = Duration::from_secs(10);
/// A relay says something each minute. After so long it is dead, whatever it is asked.
const SILENCE: Duration = Duration::from_secs(120);
/// Without a sign of life for so long it is asked for one,
const QUIET: Duration = Duration::from_secs(20);
/// sooner when something has been sent to it since.
const QUIET_AFTER_SENDING: Duration = Duration::from_secs(4);
/// A relay that has answered before is dead when it does not for so long.
const PATIENCE: Duration = Duration::from_secs(6);
/// The same when there is reason to think that it is.
const LITTLE_PATIENCE: Duration = Duration::from_secs(3);
/// Most bytes that are written at once: two records of TLS. What is written waits behind nothing that can be dropped.
const WRITE: usize = 32 << 10;
/// Most bytes of answers that wait.
const MOST_CONTROL: usize = 4096;
/// No relay may have the node wait for longer.
const MOST_WAIT: Duration = Duration::from_secs(60);

/// Why a connection is over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum SessionError {
    /// Not the protocol.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The relay has another key than it says, or than its certificate does.
    #[error("the relay does not have the key that it says it has")]
    WrongKey,
    /// No relay of this protocol.
    #[error("what the relay says of itself is not understood")]
    Info,
    /// It never let the node in.
    #[error("the relay has not let the node in within {} s", HELLO.as_secs())]
    NotLetIn,
    /// It says nothing any more.
    #[error("the relay has said nothing for {} s", .0.as_secs())]
    Silent(Duration),
}

/// What a relay has said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The node is let in.
    Welcome,
    Packet(NodePublic, Bytes),
    Gone(NodePublic, GoneReason),
    Health(String),
    Restarting {
        reconnect_in: Duration,
        try_for: Duration,
    },
    /// It has answered a ping after so long.
    Latency(Duration),
}

/// What the client says of itself.
#[derive(Serialize)]
struct ClientInfo {
    version: u32,
    #[serde(rename = "CanAckPings")]
    can_ack_pings: bool,
}

/// What the relay says of itself.
#[derive(Deserialize)]
struct ServerInfo {
    #[serde(rename = "TokenBucketBytesPerSecond", default)]
    rate: i64,
    #[serde(rename = "TokenBucketBytesBurst", default)]
    burst: i64,
}

#[derive(Debug)]
struct Asked {
    bytes: [u8; 8],
    at: Instant,
    /// When the relay is dead if it has said nothing since.
    dead: Option<Instant>,
}

/// A connection.
pub(super) struct Session {
    node: NodeSecret,
    server: Option<NodePublic>,
    nonce: [u8; NONCE],
    home: bool,
    began: Instant,
    /// When the node was let in.
    welcome: Option<Instant>,
    bucket: Option<Bucket>,
    /// Frames that go before packets.
    control: BytesMut,
    said: VecDeque<Said>,
    heard: Instant,
    /// When packets were sent first since then.
    sent: Option<Instant>,
    asked: Option<Asked>,
    pings: u64,
    /// It answers pings: old relays do not.
    answers: bool,
    /// Packets wait for the bucket until then.
    held: Option<Instant>,
}

impl Session {
    /// A connection that has just been made, to the relay with the key `server` if that is known already. `nonce` is
    /// random.
    pub(super) fn new(
        node: NodeSecret,
        server: Option<NodePublic>,
        home: bool,
        nonce: [u8; NONCE],
        now: Instant,
    ) -> Result<Self, SessionError> {
        let mut session = Self {
            node,
            server: None,
            nonce,
            home,
            began: now,
            welcome: None,
            bucket: None,
            control: BytesMut::new(),
            said: VecDeque::new(),
            heard: now,
            sent: None,
            asked: None,
            pings: 0,
            answers: false,
            held: None,
        };
        if let Some(server) = server {
            session.greet(server)?;
        }
        Ok(session)
    }

    fn boxed(&self, server: &NodePublic) -> SalsaBox {
        let secret = SecretKey::from_bytes(*self.node.expose());
        SalsaBox::new(&PublicKey::from_bytes(*server.as_bytes()), &secret)
    }

    /// Says who the node is to the relay that has this key.
    fn greet(&mut self, server: NodePublic) -> Result<(), SessionError> {
        match self.server {
            // After a fast start its greeting comes all the same.
            Some(known) if known == server => return Ok(()),
            Some(_) => return Err(SessionError::WrongKey),
            None => self.server = Some(server),
        }
        let info = serde_json::to_vec(&ClientInfo {
            version: VERSION,
            can_ack_pings: true,
        });
        let info = info.map_err(|_| SessionError::Info)?;
        let sealed = self.boxed(&server).encrypt((&self.nonce).into(), &info[..]);
        let sealed = sealed.map_err(|_| SessionError::WrongKey)?;
        frames::client_info(&mut self.control, &self.node.public(), &self.nonce, &sealed);
        if self.home {
            frames::note_preferred(&mut self.control, true);
        }
        Ok(())
    }

    /// Whether this is the home.
    pub(super) fn set_home(&mut self, home: bool) {
        // Before the greeting it goes with that.
        if self.home != home && self.server.is_some() {
            frames::note_preferred(&mut self.control, home);
        }
        self.home = home;
    }

    /// Takes the frames that are whole out of what was read.
    pub(super) fn handle_input(
        &mut self,
        buffer: &mut BytesMut,
        now: Instant,
    ) -> Result<(), SessionError> {
        while let Some(frame) = frames::next(buffer)? {
            self.heard = now;
            self.sent = None;
            if let Some(asked) = &mut self.asked {
                asked.dead = None;
            }
            self.handle(frame, now)?;
        }
        Ok(())
    }

    fn handle(&mut self, frame: Frame, now: Instant) -> Result<(), SessionError> {
        match frame {
            Frame::ServerKey(key) => self.greet(key)?,
            _ if self.server.is_none() => return Err(FrameError::Greeting.into()),
            Frame::ServerInfo(sealed) => {
                let info = self.open(&sealed)?;
                let rate = u32::try_from(info.rate.max(0)).unwrap_or(u32::MAX);
                let burst = u32::try_from(info.burst.max(0)).unwrap_or(u32::MAX);
                self.bucket = (rate != 0).then(|| Bucket::new(rate, burst, now));
                if self.welcome.is_none() {
                    self.welcome = Some(now);
                    self.said.push_back(Said::Welcome);
                    self.ask(now, PATIENCE);
                }
            }
            Frame::Packet { from, bytes } => self.said.push_back(Said::Packet(from, bytes)),
            Frame::Gone { peer, reason } => self.said.push_back(Said::Gone(peer, reason)),
            Frame::Health(text) => self.said.push_back(Said::Health(text)),
            Frame::Restarting {
                reconnect_in,
                try_for,
            } => {
                self.said.push_back(Said::Restarting {
                    reconnect_in: reconnect_in.min(MOST_WAIT),
                    try_for: try_for.min(MOST_WAIT),
                });
            }
            Frame::Ping(bytes) => {
                if self.control.len() < MOST_CONTROL {
                    frames::pong(&mut self.control, &bytes);
                }
            }
            Frame::Pong(bytes) => {
                if let Some(asked) = self.asked.take_if(|asked| asked.bytes == bytes) {
                    self.answers = true;
                    let latency = now.saturating_duration_since(asked.at);
                    self.said.push_back(Said::Latency(latency));
                }
            }
            Frame::KeepAlive | Frame::Present(_) | Frame::Other(_) => {}
        }
        Ok(())
    }

    fn open(&self, sealed: &[u8]) -> Result<ServerInfo, SessionError> {
        let server = self.server.ok_or(SessionError::WrongKey)?;
        let (nonce, sealed) = sealed
            .split_first_chunk::<NONCE>()
            .ok_or(SessionError::Info)?;
        let clear = self.boxed(&server).decrypt(nonce.into(), sealed);
        let clear = clear.map_err(|_| SessionError::WrongKey)?;
        serde_json::from_slice(&clear).map_err(|_| SessionError::Info)
    }

    fn ask(&mut self, now: Instant, patience: Duration) {
        self.pings += 1;
        let bytes = self.pings.to_be_bytes();
        self.asked = Some(Asked {
            bytes,
            at: now,
            dead: self.answers.then(|| now + patience),
        });
        if self.control.len() < MOST_CONTROL {
            frames::ping(&mut self.control, &bytes);
        }
    }

    /// Finds out at once whether the relay is there.
    pub(super) fn check(&mut self, now: Instant) {
        if self.welcome.is_some() {
            self.ask(now, LITTLE_PATIENCE);
        }
    }

    /// When the relay is to be asked for a sign of life.
    fn due(&self) -> Option<Instant> {
        self.welcome?;
        let quiet = self.heard + QUIET;
        let due = self
            .sent
            .map_or(quiet, |sent| quiet.min(sent + QUIET_AFTER_SENDING));
        match &self.asked {
            // Once in a silence; what it says next takes that back.
            Some(asked) if asked.at >= self.heard => None,
            _ => Some(due),
        }
    }

    /// When it is dead, if it says nothing till then, and what that is to be called.
    pub(super) fn death(&self) -> (Instant, SessionError) {
        match self.welcome {
            None => (self.began + HELLO, SessionError::NotLetIn),
            Some(_) => {
                let dead = self.asked.as_ref().and_then(|asked| asked.dead);
                let silence = self.heard + SILENCE;
                let dead = dead.map_or(silence, |dead| dead.min(silence));
                let silent = dead.saturating_duration_since(self.heard);
                (dead, SessionError::Silent(silent))
            }
        }
    }

    /// Does what is due.
    pub(super) fn handle_timeout(&mut self, now: Instant) -> Result<(), SessionError> {
        let (dead, error) = self.death();
        if now >= dead {
            return Err(error);
        }
        if self.due().is_some_and(|due| now >= due) {
            self.ask(now, PATIENCE);
        }
        Ok(())
    }

    /// When something is due next.
    pub(super) fn poll_timeout(&self) -> Instant {
        let due = [self.due(), self.held].into_iter().flatten();
        due.fold(self.death().0, Instant::min)
    }

    /// What the relay has said next.
    pub(super) fn poll_said(&mut self) -> Option<Said> {
        self.said.pop_front()
    }

    /// Whether [`Self::transmit`] has something that need not wait for packets.
    pub(super) fn has_control(&self) -> bool {
        !self.control.is_empty()
    }

    /// Writes what is to be sent now: own frames, then packets as the relay allows. Nothing when `out` stays empty.
    pub(super) fn transmit(&mut self, queue: &mut Queue, out: &mut BytesMut, now: Instant) {
        out.extend_from_slice(&self.control);
        self.control.clear();
        self.held = None;
        let Some(welcome) = self.welcome else {
            return;
        };
        let before = out.len();
        queue.fill(out, WRITE, self.bucket.as_mut(), welcome, now);
        if out.len() > before {
            self.sent.get_or_insert(now);
        }
        if out.len() < WRITE
            && !queue.is_empty()
            && let Some(bucket) = &self.bucket
        {
            let wait = bucket.wait(queue.next().unwrap_or(OVERHEAD + MOST_DATAGRAM));
            self.held = Some(now + wait.max(Duration::from_millis(1)));
        }
    }
}

#[cfg(test)]
mod tests;

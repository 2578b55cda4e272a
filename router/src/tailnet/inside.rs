//! Messages between nodes inside the tunnel: pings of ours and their answers, and what others tell.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::engine::{ECHO, Engine};
use crate::tailnet::keys::DiscoPublic;
use crate::tailnet::tsmp::{self, Message};

/// How long a ping is waited for.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pings that may be under way; more are refused.
const PINGS: usize = 1024;

const ICMP: u8 = libc::IPPROTO_ICMP as u8;
const ICMPV6: u8 = libc::IPPROTO_ICMPV6 as u8;

/// What is sent to a peer, inside the tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TSMP ping, which the peer's client answers before its packet filter.
    Tsmp,
    /// An ICMP echo, which the peer's system answers, if its filter and firewall let it.
    Icmp,
}

/// An answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pong {
    /// From the ping to the answer.
    pub latency: Duration,
    /// The peer API's port; 0 for none, or not told.
    pub peer_api: u16,
}

/// Why a ping brought nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PingError {
    /// Of two families.
    #[error("the two addresses are not of one family")]
    Family,
    /// No random bytes, or too many pings.
    #[error("too many pings are under way; wait until some have ended")]
    Busy,
    /// Nobody has the address.
    #[error("no peer has this address, or its worker has too much to do")]
    NoPeer,
    /// Nothing came.
    #[error(
        "no answer within 10 seconds: the peer is off, no way to it works yet, or (for ICMP) its filter drops echoes"
    )]
    Silence,
}

/// What a peer has told by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// Its disco key, from now on.
    DiscoKey {
        /// An address of the peer.
        from: IpAddr,
        /// The key.
        key: DiscoPublic,
    },
    /// It refuses a flow.
    Rejected {
        /// In whose name it is told.
        from: IpAddr,
        /// The message.
        message: Message,
    },
}

#[derive(Debug)]
struct Waiting {
    from: IpAddr,
    sent: Instant,
    done: oneshot::Sender<Pong>,
}

/// Pings that are under way. Clones are the same.
#[derive(Clone, Debug)]
pub struct Inside {
    engine: Weak<Engine>,
    waiting: Arc<Mutex<HashMap<[u8; 8], Waiting>>>,
}

impl Inside {
    /// Sends by this engine.
    pub fn new(engine: Weak<Engine>) -> Self {
        Self {
            engine,
            waiting: Arc::default(),
        }
    }

    /// Pings the peer that has the address `to`, in the name of our address `from`.
    pub async fn ping(&self, kind: Kind, from: IpAddr, to: IpAddr) -> Result<Pong, PingError> {
        let mut data = [0; 8];
        getrandom::fill(&mut data).map_err(|_| PingError::Busy)?;
        let packet = match kind {
            Kind::Tsmp => tsmp::packet(&Message::Ping(data), from, to),
            Kind::Icmp => echo(from, to, &data),
        };
        let packet = packet.ok_or(PingError::Family)?;
        let answer = self
            .expect(data, to, Instant::now())
            .ok_or(PingError::Busy)?;
        let sent = self
            .engine
            .upgrade()
            .is_some_and(|engine| engine.send_inside(&packet));
        let outcome = match sent {
            true => tokio::time::timeout(PATIENCE, answer).await,
            false => {
                self.waiting().remove(&data);
                return Err(PingError::NoPeer);
            }
        };
        self.waiting().remove(&data);
        outcome.ok().and_then(Result::ok).ok_or(PingError::Silence)
    }

    fn expect(
        &self,
        data: [u8; 8],
        from: IpAddr,
        sent: Instant,
    ) -> Option<oneshot::Receiver<Pong>> {
        let (done, answer) = oneshot::channel();
        let mut waiting = self.waiting();
        waiting.retain(|_, waiting| !waiting.done.is_closed());
        if waiting.len() >= PINGS {
            return None;
        }
        waiting.insert(data, Waiting { from, sent, done });
        Some(answer)
    }

    /// Takes a message of [`Engine::inside`]: answers a ping, or is something that a peer has told.
    pub fn handle(&self, packet: &[u8], now: Instant) -> Option<Told> {
        let (from, protocol, payload) = parts(packet)?;
        if protocol != tsmp::PROTOCOL {
            let data = payload.get(8 + ECHO.len()..)?.first_chunk()?;
            self.answered(data, from, 0, now);
            return None;
        }
        match Message::parse(payload)? {
            Message::Pong { data, peer_api } => {
                self.answered(&data, from, peer_api, now);
                None
            }
            Message::DiscoKey(key) => Some(Told::DiscoKey { from, key }),
            message @ Message::Rejected { .. } => Some(Told::Rejected { from, message }),
            // The engine answers it.
            Message::Ping(_) => None,
        }
    }

    fn answered(&self, data: &[u8; 8], from: IpAddr, peer_api: u16, now: Instant) {
        let mut waiting = self.waiting();
        // Nobody answers for another one.
        if waiting.get(data).is_none_or(|waiting| waiting.from != from) {
            return;
        }
        if let Some(Waiting { sent, done, .. }) = waiting.remove(data) {
            let latency = now.saturating_duration_since(sent);
            // Who asked may have given up.
            let _ = done.send(Pong { latency, peer_api });
        }
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<[u8; 8], Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Source, protocol and payload of an IP packet without extension headers.
fn parts(packet: &[u8]) -> Option<(IpAddr, u8, &[u8])> {
    match packet.first()? >> 4 {
        4 => {
            let start = usize::from(packet[0] & 15) * 4;
            let source: [u8; 4] = *packet.get(12..)?.first_chunk()?;
            Some((source.into(), *packet.get(9)?, packet.get(start..)?))
        }
        6 => {
            let source: [u8; 16] = *packet.get(8..)?.first_chunk()?;
            Some((source.into(), *packet.get(6)?, packet.get(40..)?))
        }
        _ => None,
    }
}

/// An ICMP echo whose answer the engine keeps from the system.
fn echo(from: IpAddr, to: IpAddr, data: &[u8; 8]) -> Option<Vec<u8>> {
    let (kind, protocol) = match from {
        IpAddr::V4(_) => (8, ICMP),
        IpAddr::V6(_) => (128, ICMPV6),
    };
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 1];
    message.extend(ECHO);
    message.extend(data);
    let mut packet = tsmp::around(protocol, &message, from, to)?;
    let mut summed = Vec::new();
    if let (IpAddr::V6(from), IpAddr::V6(to)) = (from, to) {
        summed.extend(from.octets());
        summed.extend(to.octets());
        summed.extend((message.len() as u32).to_be_bytes());
        summed.extend([0, 0, 0, ICMPV6]);
    }
    summed.extend(&message);
    let sum = tsmp::checksum(&summed);
    let at = packet.len() - message.len();
    packet[at + 2..at + 4].copy_from_slice(&sum.to_be_bytes());
    Some(packet)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_millis(7);

    fn inside() -> Inside {
        Inside::new(Weak::new())
    }

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_answer_is_its_pings_and_its_peers() {
        let (inside, sent) = (inside(), Instant::now());
        let (us, them) = (address("100.64.0.1"), address("100.64.0.2"));
        let pong = |from| {
            let message = Message::Pong {
                data: [7; 8],
                peer_api: 80,
            };
            tsmp::packet(&message, from, us).unwrap()
        };
        let mut answer = inside.expect([7; 8], them, sent).unwrap();
        assert_eq!(
            inside.handle(&pong(address("100.64.0.3")), sent + NOW),
            None
        );
        assert!(answer.try_recv().is_err(), "somebody else's");
        assert_eq!(inside.handle(&pong(them), sent + NOW), None);
        let expected = Pong {
            latency: NOW,
            peer_api: 80,
        };
        assert_eq!(answer.try_recv(), Ok(expected));
        assert!(inside.waiting().is_empty());
    }

    #[test]
    fn an_echo_is_right_and_its_answer_is_known() {
        let (inside, sent) = (inside(), Instant::now());
        for (us, them) in [("100.64.0.1", "100.64.0.2"), ("fd64::1", "fd64::2")] {
            let (us, them) = (address(us), address(them));
            let packet = echo(us, them, &[9; 8]).unwrap();
            let (_, protocol, message) = parts(&packet).unwrap();
            if protocol == ICMP {
                assert_eq!(tsmp::checksum(message), 0);
            }
            assert_eq!(message.len(), 24);
            let mut reply = echo(them, us, &[9; 8]).unwrap();
            let at = reply.len() - 24;
            reply[at] = if us.is_ipv4() { 0 } else { 129 };
            let mut answer = inside.expect([9; 8], them, sent).unwrap();
            assert_eq!(inside.handle(&reply, sent + NOW), None);
            assert_eq!(answer.try_recv().unwrap().latency, NOW);
        }
        assert_eq!(
            echo(address("100.64.0.1"), address("fd64::2"), &[0; 8]),
            None
        );
    }

    #[test]
    fn what_peers_tell_is_handed_on() {
        let (us, them) = (address("fd64::1"), address("fd64::2"));
        let key = DiscoPublic::from_bytes([5; 32]);
        let packet = tsmp::packet(&Message::DiscoKey(key), them, us).unwrap();
        let told = inside().handle(&packet, Instant::now());
        assert_eq!(told, Some(Told::DiscoKey { from: them, key }));
        let rejection = tsmp::rejection(
            "[fd64::1]:5".parse().unwrap(),
            "[fd64::2]:80".parse().unwrap(),
            6,
        );
        let told = inside().handle(&rejection.unwrap(), Instant::now());
        assert!(matches!(told, Some(Told::Rejected { from, .. }) if from == them));
        for nonsense in [&[][..], &[0x45; 3], &[0x60; 40], &[0x4f; 20]] {
            assert_eq!(inside().handle(nonsense, Instant::now()), None);
        }
    }

    #[test]
    fn nobody_is_asked_where_there_is_no_engine() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let (us, them) = (address("fd64::1"), address("fd64::2"));
        let outcome = runtime.block_on(inside().ping(Kind::Tsmp, us, them));
        assert_eq!(outcome, Err(PingError::NoPeer));
    }
}

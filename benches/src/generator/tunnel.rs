//! One WireGuard session of the generator: a peer without a TUN device.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey as X25519Public, StaticSecret};
use router::wireguard::keys::{PrivateKey, PublicKey};

use super::udp::Receiver;

/// Bytes that a data message adds to its inner packet.
pub(crate) const OVERHEAD: usize = 32;
/// Bytes that sealing may touch past a data message: boringtun writes a handshake where it has no
/// session.
pub(crate) const SLACK: usize = 148;

/// The first byte of a data message.
const DATA: u8 = 4;

/// How long an unanswered initiation waits. wireguard-go ignores initiations that follow each other
/// within 20 ms, others answer the first with a cookie.
const RETRY: Duration = Duration::from_millis(250);
const DEADLINE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_micros(200);

/// A session with the router.
pub(crate) struct Tunnel {
    tunn: Box<Tunn>,
    pub(crate) socket: UdpSocket,
    opened: Vec<u8>,
}

impl Tunnel {
    /// Shakes hands over `socket`, which is connected to the router's endpoint. `index` differs
    /// from tunnel to tunnel.
    pub(crate) fn connect(
        socket: UdpSocket,
        private: &PrivateKey,
        router: PublicKey,
        index: u32,
        receiver: &mut Receiver,
    ) -> anyhow::Result<Self> {
        let mut tunnel = Self {
            tunn: Box::new(Tunn::new(
                StaticSecret::from(*private.expose()),
                X25519Public::from(router.0),
                None,
                None,
                index,
                None,
            )),
            socket,
            opened: vec![0; 65_536 + SLACK],
        };
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            tunnel.initiate()?;
            let retry = Instant::now() + RETRY;
            while Instant::now() < retry {
                tunnel.drain(receiver, |_| {})?;
                if tunnel.tunn.time_since_last_handshake().is_some() {
                    return Ok(tunnel);
                }
                std::thread::sleep(PAUSE);
            }
        }
        let router = tunnel.socket.peer_addr().context("the tunnel's endpoint")?;
        bail!("no WireGuard handshake with {router} within {DEADLINE:?}")
    }

    fn initiate(&mut self) -> anyhow::Result<()> {
        match self
            .tunn
            .format_handshake_initiation(&mut self.opened, true)
        {
            TunnResult::WriteToNetwork(message) => transmit(&self.socket, message),
            TunnResult::Err(error) => bail!("WireGuard initiation: {error:?}"),
            _ => Ok(()),
        }
    }

    /// Seals `inner` into the front of `out`, which has room for it and [`OVERHEAD`] and [`SLACK`]
    /// more, and yields the length of the data message.
    pub(crate) fn seal(&mut self, inner: &[u8], out: &mut [u8]) -> anyhow::Result<usize> {
        match self.tunn.encapsulate(inner, out) {
            TunnResult::WriteToNetwork(message) if message.len() == inner.len() + OVERHEAD => {
                Ok(message.len())
            }
            _ => bail!("the WireGuard session of the generator is gone"),
        }
    }

    /// Takes what has arrived: gives the inner packets to `take` and answers handshakes. A data
    /// message that does not open is given as an empty packet.
    pub(crate) fn drain(
        &mut self,
        receiver: &mut Receiver,
        mut take: impl FnMut(&[u8]),
    ) -> anyhow::Result<()> {
        while receiver
            .receive(&self.socket)
            .context("receive from the tunnel")?
        {
            for (from, datagram) in receiver.datagrams() {
                let from = Some((*from.ip()).into());
                match self.tunn.decapsulate(from, datagram, &mut self.opened) {
                    TunnResult::WriteToTunnelV4(inner, _)
                    | TunnResult::WriteToTunnelV6(inner, _) => {
                        take(inner);
                    }
                    TunnResult::WriteToNetwork(message) => transmit(&self.socket, message)?,
                    TunnResult::Done => {}
                    TunnResult::Err(_) => take(&[]),
                }
            }
        }
        Ok(())
    }

    /// Answers what has arrived, and tells whether a message of a session was among it. `first` becomes
    /// when something came, if it is unknown.
    pub(crate) fn heard_anew(
        &mut self,
        receiver: &mut Receiver,
        first: &mut Option<Instant>,
    ) -> anyhow::Result<bool> {
        let mut heard = false;
        while receiver
            .receive(&self.socket)
            .context("receive from the tunnel")?
        {
            first.get_or_insert_with(Instant::now);
            for (from, datagram) in receiver.datagrams() {
                let from = Some((*from.ip()).into());
                match self.tunn.decapsulate(from, datagram, &mut self.opened) {
                    TunnResult::WriteToNetwork(message) => transmit(&self.socket, message)?,
                    TunnResult::Err(_) => {}
                    _ => heard |= datagram.first() == Some(&DATA),
                }
            }
        }
        Ok(heard)
    }

    /// Does what is due by the clock, such as a new handshake every two minutes. To be called a few
    /// times per second.
    pub(crate) fn tick(&mut self) -> anyhow::Result<()> {
        match self.tunn.update_timers(&mut self.opened) {
            TunnResult::WriteToNetwork(message) => transmit(&self.socket, message),
            TunnResult::Err(error) => {
                bail!("the WireGuard session of the generator ended: {error:?}")
            }
            _ => Ok(()),
        }
    }
}

/// Sends one control message. A router that is not there yet is no error: the handshake is retried.
fn transmit(socket: &UdpSocket, message: &[u8]) -> anyhow::Result<()> {
    match socket.send(message) {
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => Ok(()),
        other => other.map(|_| ()).context("send to the router"),
    }
}

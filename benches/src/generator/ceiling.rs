//! How fast the generator is when nothing holds it up.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use router::wireguard::keys::PrivateKey;

use super::udp::Receiver;
use super::{Generator, Load, Peer, Summary, Target, receive, traffic, udp};

/// How many packets the generator seals and sends when nothing holds it up, into a socket that answers
/// handshakes and then drops everything. `sink` is bound in one namespace; `client` makes sockets
/// in another.
pub fn ceiling(
    load: Load,
    peers: Vec<Peer>,
    sink: UdpSocket,
    client: impl FnMut() -> anyhow::Result<UdpSocket>,
    duration: Duration,
) -> anyhow::Result<Summary> {
    let SocketAddr::V4(endpoint) = sink.local_addr().context("the sink's address")? else {
        bail!("the generator speaks IPv4");
    };
    udp::prepare(&sink, super::SOCKET_BUFFER).context("prepare the sink")?;
    let private = PrivateKey::generate().context("generate a key")?;
    let target = Target {
        endpoint,
        router: private.public(),
        server: endpoint,
    };
    let connected = AtomicBool::new(false);
    let mut generator = std::thread::scope(|scope| {
        let responder = scope.spawn(|| respond(&sink, &private, &connected));
        let generator = Generator::connect(peers, target, sink.try_clone()?, client);
        connected.store(true, Ordering::Relaxed);
        responder
            .join()
            .map_err(|_| anyhow::anyhow!("the responder panicked"))??;
        generator
    })?;
    udp::drop_all(&sink).context("make the sink drop")?;
    let traffic = generator.start(load)?;
    std::thread::sleep(duration);
    traffic.finish()
}

/// Answers handshake initiations of anyone until told to stop.
fn respond(socket: &UdpSocket, private: &PrivateKey, stop: &AtomicBool) -> anyhow::Result<()> {
    let secret = StaticSecret::from(*private.expose());
    let public = PublicKey::from(private.public().0);
    let mut receiver = Receiver::new();
    let mut answer = [0; 256];
    while !stop.load(Ordering::Relaxed) {
        if !receiver.receive(socket).context("receive at the sink")? {
            std::thread::sleep(receive::PAUSE);
        }
        for (from, datagram) in receiver.datagrams() {
            let Ok(Packet::HandshakeInit(initiation)) = Tunn::parse_incoming_packet(datagram)
            else {
                continue;
            };
            let Ok(handshake) = parse_handshake_anon(&secret, &public, &initiation) else {
                continue;
            };
            let peer = PublicKey::from(handshake.peer_static_public);
            let mut tunn = Tunn::new(secret.clone(), peer, None, None, traffic::unique(), None);
            if let TunnResult::WriteToNetwork(message) =
                tunn.decapsulate(Some((*from.ip()).into()), datagram, &mut answer)
            {
                socket
                    .send_to(message, from)
                    .context("answer a handshake")?;
            }
        }
    }
    Ok(())
}

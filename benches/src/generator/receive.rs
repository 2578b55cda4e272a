//! The receiving halves: they count until told to stop.

use std::net::UdpSocket;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::packet::payload_of;
use super::tally::{Judge, Tally};
use super::traffic::Live;
use super::tunnel::Tunnel;
use super::udp::Receiver;

/// How long a receiver rests when there is nothing.
pub(super) const PAUSE: Duration = Duration::from_micros(300);
/// How often sessions are looked after.
const UPKEEP: Duration = Duration::from_millis(250);

/// Counts clear packets at the server.
pub(super) fn clear(
    server: &UdpSocket,
    flows: u32,
    run: u32,
    live: &Live,
) -> anyhow::Result<Tally> {
    let mut receiver = Receiver::new();
    let mut judge = Judge::new(run, flows);
    while !live.receiver_stopped() {
        if !receiver.receive(server).context("receive at the server")? {
            std::thread::sleep(PAUSE);
            continue;
        }
        for (_, payload) in receiver.datagrams() {
            judge.take(payload);
        }
        live.received
            .store(judge.tally().received, Ordering::Relaxed);
    }
    Ok(judge.tally())
}

/// Opens every packet at the peers and counts.
pub(super) fn sealed(
    tunnels: &mut [Tunnel],
    flows: u32,
    run: u32,
    live: &Live,
) -> anyhow::Result<Tally> {
    let mut receiver = Receiver::new();
    let mut judge = Judge::new(run, flows);
    let mut upkeep = Instant::now() + UPKEEP;
    while !live.receiver_stopped() {
        if Instant::now() >= upkeep {
            upkeep += UPKEEP;
            tunnels.iter_mut().try_for_each(Tunnel::tick)?;
        }
        for tunnel in tunnels.iter_mut() {
            tunnel.drain(&mut receiver, |inner| match payload_of(inner) {
                Some(payload) => judge.take(payload),
                None => judge.take_broken(),
            })?;
            live.received
                .store(judge.tally().received, Ordering::Relaxed);
        }
        std::thread::sleep(PAUSE);
    }
    Ok(judge.tally())
}

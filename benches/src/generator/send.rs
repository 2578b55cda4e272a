//! The sending halves: they send until told to stop.

use std::net::{SocketAddrV4, UdpSocket};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::Load;
use super::pace::Pacer;
use super::packet::{Flow, HEADERS, Stamp};
use super::traffic::Live;
use super::tunnel::{OVERHEAD, SLACK, Tunnel};
use super::udp::{GSO_BYTES, GSO_SEGMENTS, Receiver, Run, Sender};

/// How often sessions are looked after.
const UPKEEP: Duration = Duration::from_millis(250);
/// Packets that one peer sends at once when flooding.
const FLOOD: usize = GSO_SEGMENTS;

/// Hands out sequence numbers, flow after flow.
struct Turn {
    sequences: Vec<u64>,
    run: u32,
    next: usize,
}

impl Turn {
    fn new(flows: usize, run: u32) -> Self {
        Self {
            sequences: vec![0; flows],
            run,
            next: 0,
        }
    }

    /// The next packet of `flow`.
    fn stamp(&mut self, flow: usize) -> Stamp {
        let sequence = self.sequences[flow];
        self.sequences[flow] += 1;
        Stamp {
            run: self.run,
            flow: flow as u32,
            sequence,
        }
    }

    /// Moves on by `n` flows and yields the number of the first of them, to be taken modulo the
    /// number of flows.
    fn advance(&mut self, n: usize) -> usize {
        let first = self.next;
        self.next = (first + n) % self.sequences.len();
        first
    }
}

/// Sends sealed packets through the peers in turn.
pub(super) fn sealed(
    tunnels: &mut [Tunnel],
    flows: &[Flow],
    load: Load,
    run: u32,
    live: &Live,
) -> anyhow::Result<()> {
    let inner_size = HEADERS + usize::from(load.payload);
    let outer_size = inner_size + OVERHEAD;
    let per_run = (GSO_BYTES / outer_size).clamp(1, GSO_SEGMENTS);
    let mut inner = vec![0; inner_size];
    let mut arena = Vec::new();
    let mut runs = Vec::new();
    let mut sender = Sender::default();
    let mut receiver = Receiver::new();
    let mut pacer = Pacer::new(load.rate);
    let mut turn = Turn::new(flows.len(), run);
    let mut upkeep = Instant::now() + UPKEEP;
    let peers = tunnels.len();
    while !live.sender_stopped() {
        if Instant::now() >= upkeep {
            upkeep += UPKEEP;
            for tunnel in tunnels.iter_mut() {
                tunnel.tick()?;
                tunnel.drain(&mut receiver, |_| {})?;
            }
        }
        let due = pacer.wait(FLOOD * peers);
        let first = turn.advance(due);
        // Flow `i` is of peer `i` modulo their number, so a peer's packets are that far apart.
        for offset in 0..due.min(peers) {
            let tunnel = &mut tunnels[(first + offset) % flows.len() % peers];
            let count = (due - offset).div_ceil(peers);
            arena.resize(count * outer_size + SLACK, 0);
            for i in 0..count {
                let flow = (first + offset + i * peers) % flows.len();
                flows[flow].write(turn.stamp(flow), &mut inner);
                tunnel.seal(&inner, &mut arena[i * outer_size..])?;
            }
            runs.clear();
            runs.extend((0..count).step_by(per_run).map(|i| Run {
                range: i * outer_size..count.min(i + per_run) * outer_size,
                segment: outer_size as u16,
                to: None,
            }));
            sender
                .send(&tunnel.socket, &arena, &runs)
                .context("send to the router")?;
            live.sent.fetch_add(count as u64, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Sends clear packets from the server, each on its own, to the flows in turn.
pub(super) fn clear(
    server: &UdpSocket,
    addresses: &[SocketAddrV4],
    load: Load,
    run: u32,
    live: &Live,
) -> anyhow::Result<()> {
    let size = usize::from(load.payload);
    let mut arena = Vec::new();
    let mut runs = Vec::new();
    let mut sender = Sender::default();
    let mut pacer = Pacer::new(load.rate);
    let mut turn = Turn::new(addresses.len(), run);
    while !live.sender_stopped() {
        let due = pacer.wait(FLOOD);
        let first = turn.advance(due);
        arena.resize(due * size, 0);
        runs.clear();
        for (i, bytes) in arena.chunks_exact_mut(size).enumerate() {
            let flow = (first + i) % addresses.len();
            turn.stamp(flow).write(bytes);
            runs.push(Run {
                range: i * size..(i + 1) * size,
                segment: load.payload,
                to: Some(addresses[flow]),
            });
        }
        sender
            .send(server, &arena, &runs)
            .context("send from the server")?;
        live.sent.fetch_add(due as u64, Ordering::Relaxed);
    }
    Ok(())
}

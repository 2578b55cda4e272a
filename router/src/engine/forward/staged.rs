//! Packets that wait for a peer's handshake: first in, first out, bounded for each peer and for all
//! peers of a worker, in packets and in bytes.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::BuildHasherDefault;

use crate::engine::forward::directory::IndexHasher;
use crate::engine::forward::routes::PeerId;
use crate::wireguard::Packets;

/// Packets that wait for one peer; the oldest is dropped for a new one (as in the kernel).
pub(crate) const STAGED: usize = 128;
/// Their bytes: as many packets of 4,096.
const BYTES: usize = 512 << 10;
/// Packets that wait in one worker, all peers together, and their bytes.
pub(crate) const STAGED_TOTAL: usize = 4096;
const BYTES_TOTAL: usize = 8 << 20;

/// What waits for one peer. Gives it oldest first.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    packets: VecDeque<Box<[u8]>>,
    bytes: usize,
    current: Box<[u8]>,
}

impl Packets for Queue {
    fn next(&mut self) -> Option<&[u8]> {
        self.current = self.packets.pop_front()?;
        Some(&self.current)
    }
}

/// All that waits in one worker. Nothing is allocated for peers for which nothing waits.
#[derive(Debug, Default)]
pub(crate) struct Staged {
    queues: HashMap<PeerId, Queue, BuildHasherDefault<IndexHasher>>,
    /// Peers by what waits for them, in packets.
    longest: BTreeSet<(usize, PeerId)>,
    packets: usize,
    bytes: usize,
}

impl Staged {
    /// Whether nothing waits for anybody.
    pub(crate) fn is_empty(&self) -> bool {
        self.packets == 0
    }

    /// Whether anything waits for a peer.
    pub(crate) fn has(&self, id: PeerId) -> bool {
        self.queues.contains_key(&id)
    }

    /// Adds a packet. Gives how many others had to make room: the peer's own when it has its share,
    /// else of whoever has most, for peers that are offline must not keep out others.
    pub(crate) fn push(&mut self, id: PeerId, packet: &[u8]) -> u64 {
        let mut dropped = 0;
        let own = |staged: &Self| {
            let queue = staged.queues.get(&id);
            queue.map_or((0, 0), |queue| (queue.packets.len(), queue.bytes))
        };
        while let (packets, bytes) = own(self)
            && packets > 0
            && (packets >= STAGED || bytes + packet.len() > BYTES)
        {
            self.pop(id);
            dropped += 1;
        }
        while self.packets >= STAGED_TOTAL || self.bytes + packet.len() > BYTES_TOTAL {
            let Some((_, longest)) = self.longest.last().copied() else {
                break;
            };
            self.pop(longest);
            dropped += 1;
        }
        self.change(id, |queue| {
            queue.packets.push_back(packet.into());
            queue.bytes += packet.len();
        });
        dropped
    }

    /// Takes all that waits for a peer.
    pub(crate) fn take(&mut self, id: PeerId) -> Option<Queue> {
        let queue = self.queues.remove(&id)?;
        self.longest.remove(&(queue.packets.len(), id));
        self.packets -= queue.packets.len();
        self.bytes -= queue.bytes;
        Some(queue)
    }

    /// Drops all that waits for a peer; how many packets that was.
    pub(crate) fn discard(&mut self, id: PeerId) -> u64 {
        let queue = self.take(id);
        queue.map_or(0, |queue| queue.packets.len() as u64)
    }

    fn pop(&mut self, id: PeerId) {
        self.change(id, |queue| {
            if let Some(packet) = queue.packets.pop_front() {
                queue.bytes -= packet.len();
            }
        });
    }

    fn change(&mut self, id: PeerId, change: impl FnOnce(&mut Queue)) {
        let queue = self.queues.entry(id).or_default();
        let (packets, bytes) = (queue.packets.len(), queue.bytes);
        change(queue);
        self.packets = self.packets - packets + queue.packets.len();
        self.bytes = self.bytes - bytes + queue.bytes;
        self.longest.remove(&(packets, id));
        if queue.packets.is_empty() {
            self.queues.remove(&id);
        } else {
            self.longest.insert((queue.packets.len(), id));
        }
    }

    /// How many packets wait for a peer, and for all.
    #[cfg(test)]
    pub(crate) fn counts(&self, id: PeerId) -> (usize, usize) {
        let own = self.queues.get(&id);
        (own.map_or(0, |queue| queue.packets.len()), self.packets)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn drain(staged: &mut Staged, id: PeerId) -> Vec<Vec<u8>> {
        let mut queue = staged.take(id).unwrap_or_default();
        std::iter::from_fn(|| queue.next().map(<[u8]>::to_vec)).collect()
    }

    #[test]
    fn what_waits_keeps_its_order_and_only_the_newest_of_too_many() {
        let mut staged = Staged::default();
        for at in 0..STAGED + 3 {
            let dropped = staged.push(7, &[at as u8; 20]);
            assert_eq!(dropped, u64::from(at >= STAGED));
        }
        let expected: Vec<_> = (3..STAGED + 3).map(|at| vec![at as u8; 20]).collect();
        assert_eq!(drain(&mut staged, 7), expected);
        assert!(staged.is_empty() && drain(&mut staged, 7).is_empty());
    }

    #[test]
    fn a_peer_is_bounded_in_bytes() {
        let mut staged = Staged::default();
        let jumbo = vec![0; 60_000];
        let dropped: u64 = (0..20).map(|_| staged.push(1, &jumbo)).sum();
        let kept = drain(&mut staged, 1).len();
        assert_eq!((kept, dropped), (BYTES / jumbo.len(), 20 - kept as u64));
        assert_eq!(staged.bytes, 0);
    }

    #[test]
    fn a_worker_is_bounded_in_bytes_and_whoever_has_most_gives_way() {
        let mut staged = Staged::default();
        let large = vec![0; 8000];
        for id in 0..100 {
            for _ in 0..60 {
                staged.push(id, &large);
            }
            assert!(staged.bytes <= BYTES_TOTAL);
        }
        staged.push(1000, &[1; 100]);
        let (own, all) = staged.counts(1000);
        assert_eq!(own, 1);
        let counts: Vec<_> = (0..100).map(|id| staged.counts(id).0).collect();
        assert_eq!(counts.iter().sum::<usize>() + 1, all);
        let (least, most) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
        assert!(*least > 0 && most - least <= 1, "{counts:?}");
    }
}

//! Peers that are reached through relays, and by ways that somebody else decides on.

use tokio::sync::mpsc;

use super::{Change, Command, Engine, Error};
use crate::engine::counters::Counter;
use crate::engine::forward::port::{Content, Origin, Place};
use crate::engine::io::exchange::Entrance;
use crate::engine::offload::segment::SLACK;
use crate::engine::path::{Path, RelayId, Relayed};
use crate::wireguard::keys::PublicKey;
use crate::wireguard::message::{self, Kind};

/// Messages that may wait for whoever carries them, each of up to 64 datagrams.
const RELAYED: usize = 256;
/// Peers with traffic that may wait to be heard of.
const TRAFFIC: usize = 4096;
/// Most bytes of datagrams from a relay that go to a worker at once.
const RUN: usize = 65_536;

impl Engine {
    /// This is the way to a peer from now on. One that roams leaves it for where it is heard from, another
    /// only for what is said here. Of a way through a relay `also` is one by UDP that everything takes besides, as long
    /// as it is not known whether that still leads there. Does not wait until it is so, which takes well under 10 ms; changes of
    /// one peer keep their order. False if there is no such peer.
    pub fn set_path(
        &self,
        peer: &PublicKey,
        path: Path,
        also: Option<Path>,
    ) -> Result<bool, Error> {
        let state = self.state();
        let Some(known) = state.peers.get(peer) else {
            return Ok(false);
        };
        let change = Change {
            paths: vec![(known.id, path, also)],
            ..Change::default()
        };
        let (done, _) = std::sync::mpsc::channel();
        self.workers[known.worker].tell(Command::Apply(Box::new(change), done))?;
        Ok(true)
    }

    /// Messages that go through relays, from now on; whoever asks last gets them. What waits is bounded:
    /// the rest is dropped and counted (`drop_relay`), as everything is as long as nobody asks.
    pub fn relayed(&self) -> Result<mpsc::Receiver<Relayed>, Error> {
        let _state = self.state();
        let (carrier, relayed) = mpsc::channel(RELAYED);
        self.tell_all(|_, done| Command::Relay(carrier.clone(), done))?;
        Ok(relayed)
    }

    /// Peers that do not roam as something is sent to them: at once when there was nothing for some seconds, and
    /// then every few seconds. Whoever asks last hears of it. Packets cost nothing for that: it is told where timers
    /// are looked at.
    pub fn traffic(&self) -> Result<mpsc::Receiver<PublicKey>, Error> {
        let _state = self.state();
        let (watcher, traffic) = mpsc::channel(TRAFFIC);
        self.tell_all(|_, done| Command::Watch(watcher.clone(), done))?;
        Ok(traffic)
    }

    /// Counts datagrams that whoever carries them to relays could not, beside those that it did not take.
    pub fn count_relay_drops(&self, datagrams: u64) {
        self.outside().add(Counter::DropRelay, datagrams);
    }

    /// Takes datagrams that a relay has brought, by its word each from whoever has the key with it, which is
    /// believed of no message. Those that came one after the other from one peer go on together. Gives how many
    /// were dropped: they are no WireGuard messages, or the worker that they are for has too much to do, which is counted
    /// (`drop_hand_over`).
    pub fn receive_relayed(
        &self,
        relay: RelayId,
        datagrams: impl IntoIterator<Item = (PublicKey, impl AsRef<[u8]>)>,
    ) -> u64 {
        let Some(entrance) = &self.entrance else {
            return datagrams.into_iter().count() as u64;
        };
        let place = Place {
            worker: 0,
            workers: self.workers.len(),
        };
        let mut run: Option<Run> = None;
        let (mut dropped, mut late) = (0, 0);
        for (from, bytes) in datagrams {
            let bytes = bytes.as_ref();
            let Some(worker) = worker(place, from, bytes) else {
                dropped += 1;
                continue;
            };
            if let Some(run) = &mut run
                && run.takes(worker, from, bytes)
            {
                continue;
            }
            let next = run.replace(Run::new(worker, from, bytes));
            late += next.map_or(0, |run| run.enter(entrance, relay));
        }
        late += run.map_or(0, |run| run.enter(entrance, relay));
        entrance.wake();
        if late > 0 {
            self.outside().add(Counter::DropHandOver, late);
        }
        dropped + late
    }
}

/// Which worker takes a datagram; `None` for what is no WireGuard message, or longer than UDP would carry.
fn worker(place: Place, from: PublicKey, bytes: &[u8]) -> Option<usize> {
    if bytes.len() > RUN {
        return None;
    }
    Some(match message::kind(bytes)? {
        Kind::Data(index) | Kind::Response(index) | Kind::Cookie(index) => place.owner(index),
        // Always the same one for a sender, as on the sockets.
        Kind::Initiation => usize::from(from.0[0]) % place.workers,
    })
}

/// Datagrams from one peer for one worker.
struct Run {
    worker: usize,
    from: PublicKey,
    bytes: Vec<u8>,
    /// Bytes of each datagram but the last.
    size: usize,
}

impl Run {
    fn new(worker: usize, from: PublicKey, bytes: &[u8]) -> Self {
        let mut run = Self {
            worker,
            from,
            bytes: Vec::with_capacity(bytes.len() + SLACK),
            size: bytes.len(),
        };
        run.bytes.extend_from_slice(bytes);
        run
    }

    /// Whether it has taken one more.
    fn takes(&mut self, worker: usize, from: PublicKey, bytes: &[u8]) -> bool {
        let fits = (worker, from) == (self.worker, self.from)
            && bytes.len() <= self.size
            && self.bytes.len().is_multiple_of(self.size)
            && self.bytes.len() + bytes.len() <= RUN;
        if fits {
            if self.bytes.len() == self.size {
                // Seldom there is one more alone.
                self.bytes.reserve(RUN + SLACK - self.size);
            }
            self.bytes.extend_from_slice(bytes);
        }
        fits
    }

    /// Gives it to its worker; how many were dropped.
    fn enter(self, entrance: &Entrance, relay: RelayId) -> u64 {
        let count = self.bytes.len().div_ceil(self.size) as u64;
        let content = Content::Datagrams(Origin::relayed(relay, self.from), self.size);
        match entrance.send(self.worker, content, self.bytes) {
            true => 0,
            false => count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_of_one_peer_one_worker_and_one_size() {
        let (a, b) = (PublicKey([1; 32]), PublicKey([2; 32]));
        let mut run = Run::new(0, a, &[0; 100]);
        assert!(!run.takes(1, a, &[0; 100]));
        assert!(!run.takes(0, b, &[0; 100]));
        assert!(!run.takes(0, a, &[0; 101]));
        assert!(run.takes(0, a, &[0; 100]));
        assert!(run.takes(0, a, &[0; 60]), "a shorter one is the last");
        assert!(!run.takes(0, a, &[0; 100]));
        assert!(!run.takes(0, a, &[0; 60]));
        assert_eq!(run.bytes.len(), 260);

        let mut run = Run::new(0, a, &[0; 1452]);
        let count = (0..100).take_while(|_| run.takes(0, a, &[0; 1452])).count();
        assert_eq!(count, RUN / 1452 - 1);
    }
}

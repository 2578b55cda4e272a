//! How a worker hands over what belongs to another: bounded channels of buffers that go back to
//! where they came from. The kernel's steering makes this rare.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use crate::engine::forward::port::Content;
use crate::engine::io::poll::Waker;
use crate::engine::offload::segment::SLACK;

/// Buffers that a worker has for handing over; also the bound of what it may have under way.
/// What one turn reads from the TUN queue fits.
const BUFFERS: usize = 64;
/// Parcels that a worker is woken for at once; fewer wait for the end of a batch.
const PROMPT: usize = 8;
/// Bytes of a buffer: a super-packet or a buffer of datagrams.
const BUFFER: usize = 65_536 + SLACK;

/// Something handed over.
pub(crate) struct Parcel {
    /// What it is.
    pub(crate) content: Content,
    /// Where it is.
    pub(crate) buffer: Box<[u8]>,
    /// Bytes of it in the buffer.
    pub(crate) length: usize,
    /// Whose buffer it is: a worker's, or nobody's.
    from: Option<usize>,
}

/// Parcels of several datagrams that may wait for a worker from outside.
const ENTERING: usize = 256;

/// Where datagrams enter that no socket of ours has received.
#[derive(Debug)]
pub(crate) struct Entrance(Vec<Door>);

#[derive(Debug)]
struct Door {
    parcels: SyncSender<Parcel>,
    waker: Arc<Waker>,
    /// It has got something that it was not woken for.
    waits: AtomicBool,
}

impl Entrance {
    /// Gives datagrams to a worker, which is woken by [`Self::wake`]. False when it has too much to do.
    pub(crate) fn send(&self, worker: usize, content: Content, mut bytes: Vec<u8>) -> bool {
        let Some(door) = self.0.get(worker) else {
            return false;
        };
        let length = bytes.len();
        bytes.resize(length + SLACK, 0);
        let parcel = Parcel {
            content,
            buffer: bytes.into(),
            length,
            from: None,
        };
        let went = door.parcels.try_send(parcel).is_ok();
        // Only when it is there: another thread may wake at any time, and nobody then does once more.
        door.waits.fetch_or(went, Ordering::Release);
        went
    }

    /// Wakes the workers that got something.
    pub(crate) fn wake(&self) {
        for door in &self.0 {
            if door.waits.swap(false, Ordering::Acquire) {
                door.waker.wake();
            }
        }
    }
}

struct Neighbour {
    parcels: SyncSender<Parcel>,
    empties: SyncSender<Box<[u8]>>,
    waker: Arc<Waker>,
    /// Parcels that it has not been woken for.
    waiting: usize,
}

/// One worker's end.
pub(crate) struct Exchange {
    worker: usize,
    parcels: Receiver<Parcel>,
    /// From outside.
    entering: Receiver<Parcel>,
    empties: Receiver<Box<[u8]>>,
    neighbours: Vec<Neighbour>,
    /// Buffers of ours that are here.
    spare: Vec<Box<[u8]>>,
}

/// Connects workers with each other and with the outside, given what wakes each.
pub(crate) fn connect(wakers: &[Arc<Waker>]) -> (Vec<Exchange>, Entrance) {
    let workers = wakers.len();
    let (mut senders, mut receivers) = (Vec::new(), Vec::new());
    let mut entrances = Vec::new();
    for waker in wakers {
        let (parcels, parcels_in) = sync_channel(BUFFERS * workers);
        let (empties, empties_in) = sync_channel(BUFFERS);
        let (entrance, entering) = sync_channel(ENTERING);
        senders.push((parcels, empties, waker));
        receivers.push((parcels_in, empties_in, entering));
        entrances.push(Door {
            parcels: entrance,
            waker: Arc::clone(waker),
            waits: AtomicBool::new(false),
        });
    }
    let exchanges = receivers
        .into_iter()
        .enumerate()
        .map(|(worker, (parcels, empties, entering))| Exchange {
            worker,
            parcels,
            entering,
            empties,
            neighbours: senders
                .iter()
                .map(|(parcels, empties, waker)| Neighbour {
                    parcels: parcels.clone(),
                    empties: empties.clone(),
                    waker: Arc::clone(waker),
                    waiting: 0,
                })
                .collect(),
            spare: if workers > 1 {
                // Not resident until it is used.
                (0..BUFFERS).map(|_| vec![0; BUFFER].into()).collect()
            } else {
                Vec::new()
            },
        })
        .collect();
    (exchanges, Entrance(entrances))
}

impl Exchange {
    /// Hands over a copy of `bytes`. False when that worker has too much to do.
    pub(crate) fn send(&mut self, worker: usize, content: Content, bytes: &[u8]) -> bool {
        let Some(neighbour) = self.neighbours.get_mut(worker) else {
            return false;
        };
        if bytes.len() + SLACK > BUFFER {
            return false;
        }
        let Some(mut buffer) = self.spare.pop().or_else(|| self.empties.try_recv().ok()) else {
            return false;
        };
        buffer[..bytes.len()].copy_from_slice(bytes);
        let parcel = Parcel {
            content,
            buffer,
            length: bytes.len(),
            from: Some(self.worker),
        };
        match neighbour.parcels.try_send(parcel) {
            Ok(()) => {
                neighbour.waiting += 1;
                if neighbour.waiting >= PROMPT {
                    neighbour.waiting = 0;
                    neighbour.waker.wake();
                }
                true
            }
            Err(TrySendError::Full(parcel) | TrySendError::Disconnected(parcel)) => {
                self.spare.push(parcel.buffer);
                false
            }
        }
    }

    /// Wakes the workers that got something.
    pub(crate) fn wake(&mut self) {
        for neighbour in &mut self.neighbours {
            if std::mem::take(&mut neighbour.waiting) > 0 {
                neighbour.waker.wake();
            }
        }
    }

    /// The next parcel for this worker.
    pub(crate) fn receive(&mut self) -> Option<Parcel> {
        let parcel = self.parcels.try_recv().ok();
        parcel.or_else(|| self.entering.try_recv().ok())
    }

    /// Sends a parcel's buffer back.
    pub(crate) fn give_back(&mut self, parcel: Parcel) {
        if let Some(from) = parcel.from
            && let Some(neighbour) = self.neighbours.get(from)
        {
            // There is room for every buffer of that worker, unless it has ended.
            let _ = neighbour.empties.try_send(parcel.buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::offload::vnet::Header;

    const CONTENT: Content = Content::Packet(Header::PLAIN);

    fn pair() -> [Exchange; 2] {
        let wakers: Vec<_> = (0..2).map(|_| Arc::new(Waker::new().unwrap())).collect();
        connect(&wakers).0.try_into().ok().unwrap()
    }

    #[test]
    fn hand_over_is_bounded_and_buffers_come_back() {
        let [mut a, mut b] = pair();
        for round in 0..3u8 {
            for at in 0..BUFFERS as u8 {
                assert!(a.send(1, CONTENT, &[round, at]));
            }
            assert!(!a.send(1, CONTENT, &[0]), "nobody has taken anything yet");
            for at in 0..BUFFERS as u8 {
                let parcel = b.receive().unwrap();
                assert_eq!(parcel.buffer[..parcel.length], [round, at]);
                b.give_back(parcel);
            }
            assert!(b.receive().is_none());
        }
    }

    #[test]
    fn too_long_or_to_nobody_is_refused_without_losing_a_buffer() {
        let [mut a, _b] = pair();
        for _ in 0..2 * BUFFERS {
            assert!(!a.send(1, CONTENT, &[0; BUFFER]));
            assert!(!a.send(2, CONTENT, &[0]));
        }
        assert!(a.send(1, CONTENT, &[0]));
    }

    #[test]
    fn what_enters_is_bounded_and_takes_no_room_from_workers() {
        let wakers: Vec<_> = (0..2).map(|_| Arc::new(Waker::new().unwrap())).collect();
        let (exchanges, entrance) = connect(&wakers);
        let [mut a, mut b]: [Exchange; 2] = exchanges.try_into().ok().unwrap();
        for _ in 0..ENTERING {
            assert!(entrance.send(1, CONTENT, vec![7; 100]));
        }
        assert!(
            !entrance.send(1, CONTENT, vec![7; 100]),
            "nobody has taken anything yet"
        );
        assert!(
            !entrance.send(2, CONTENT, vec![7; 100]),
            "there is no such worker"
        );
        assert!(a.send(1, CONTENT, &[8]));
        for at in 0..=ENTERING {
            let parcel = b.receive().unwrap();
            assert_eq!(parcel.buffer[0], if at == 0 { 8 } else { 7 });
            assert!(parcel.buffer.len() >= parcel.length + SLACK);
            b.give_back(parcel);
        }
        assert!(b.receive().is_none());
    }
}

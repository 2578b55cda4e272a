//! What waits for a relay: bounded for each peer, the oldest dropped first, peers by turns.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

use super::bucket::Bucket;
use super::frames::{self, MOST_DATAGRAM, OVERHEAD};
use crate::tailnet::disco;
use crate::tailnet::keys::NodePublic;

/// Most bytes that wait for one peer: what a fast relay takes in 100 ms or so.
const MOST_OF_PEER: usize = 1 << 20;
/// Most bytes that wait for all.
const MOST_OF_ALL: usize = 16 << 20;
/// Most disco messages that wait for all.
const MOST_URGENT: usize = 256;
/// What has waited for longer, with a connection, is dropped if something newer waits for the same peer.
const LATE: Duration = Duration::from_millis(100);
/// A disco message that is older is about addresses and places of then.
const STALE: Duration = Duration::from_secs(5);
/// Bytes of a peer before it is the next one's turn.
const TURN: usize = 16 << 10;

/// Datagrams of one size that came together.
struct Batch {
    bytes: Bytes,
    size: usize,
    queued: Instant,
}

impl Batch {
    fn count(&self) -> u64 {
        self.bytes.len().div_ceil(self.size) as u64
    }
}

#[derive(Default)]
struct Waiting {
    batches: VecDeque<Batch>,
    bytes: usize,
}

/// Datagrams on the way to one relay.
#[derive(Default)]
pub(super) struct Queue {
    peers: HashMap<NodePublic, Waiting>,
    /// Whose turn it is: those for whom something waits.
    turns: VecDeque<NodePublic>,
    /// Disco messages, which find a better way than this one.
    urgent: VecDeque<(Instant, NodePublic, Bytes)>,
    bytes: usize,
    /// Datagrams dropped.
    pub(super) dropped: u64,
}

impl Queue {
    pub(super) fn is_empty(&self) -> bool {
        self.turns.is_empty() && self.urgent.is_empty()
    }

    /// Drops all that waits.
    pub(super) fn clear(&mut self) {
        let batches = self.peers.drain().flat_map(|(_, waiting)| waiting.batches);
        let waited: u64 = batches.map(|batch| batch.count()).sum();
        self.dropped += waited + self.urgent.len() as u64;
        self.turns.clear();
        self.urgent.clear();
        self.bytes = 0;
    }

    /// Bytes of the frame that goes next.
    pub(super) fn next(&self) -> Option<usize> {
        if let Some((_, _, datagram)) = self.urgent.front() {
            return Some(OVERHEAD + datagram.len());
        }
        let waiting = self.peers.get(self.turns.front()?)?;
        let batch = waiting.batches.front()?;
        Some(OVERHEAD + batch.size.min(batch.bytes.len()))
    }

    /// Takes datagrams of `size` bytes each, the last perhaps shorter. False if they were not taken.
    pub(super) fn push(&mut self, to: NodePublic, bytes: Bytes, size: usize, now: Instant) -> bool {
        if bytes.is_empty() || size == 0 || size > MOST_DATAGRAM {
            return false;
        }
        if bytes.len() <= size && bytes.starts_with(&disco::MAGIC) {
            if self.urgent.len() == MOST_URGENT {
                self.urgent.pop_front();
                self.dropped += 1;
            }
            self.urgent.push_back((now, to, bytes));
            return true;
        }
        if self.bytes + bytes.len() > MOST_OF_ALL || bytes.len() > MOST_OF_PEER {
            return false;
        }
        let waiting = self.peers.entry(to).or_insert_with(|| {
            self.turns.push_back(to);
            Waiting::default()
        });
        while waiting.bytes + bytes.len() > MOST_OF_PEER
            && let Some(oldest) = waiting.batches.pop_front()
        {
            waiting.bytes -= oldest.bytes.len();
            self.bytes -= oldest.bytes.len();
            self.dropped += oldest.count();
        }
        waiting.bytes += bytes.len();
        self.bytes += bytes.len();
        waiting.batches.push_back(Batch {
            bytes,
            size,
            queued: now,
        });
        true
    }

    /// Writes frames to `out` until it has `most` bytes, or the bucket is empty. With a connection since
    /// `connected`: what waited for that does not count as late.
    pub(super) fn fill(
        &mut self,
        out: &mut BytesMut,
        most: usize,
        bucket: Option<&mut Bucket>,
        connected: Instant,
        now: Instant,
    ) {
        let mut bucket = bucket;
        let mut may = |bytes: usize| match &mut bucket {
            Some(bucket) => bucket.take(bytes, now),
            None => true,
        };
        let stale = |(at, ..): &mut (Instant, _, _)| now.saturating_duration_since(*at) > STALE;
        while self.urgent.pop_front_if(stale).is_some() {
            self.dropped += 1;
        }
        while out.len() < most
            && let Some((_, to, datagram)) = self.urgent.front()
        {
            if !may(OVERHEAD + datagram.len()) {
                return;
            }
            frames::send(out, to, datagram);
            self.urgent.pop_front();
        }
        while out.len() < most
            && let Some(to) = self.turns.pop_front()
        {
            let Some(waiting) = self.peers.get_mut(&to) else {
                continue;
            };
            let before = waiting.bytes;
            let late =
                |batch: &Batch| now.saturating_duration_since(batch.queued.max(connected)) > LATE;
            while waiting.batches.len() > 1
                && let Some(oldest) = waiting.batches.pop_front_if(|batch| late(batch))
            {
                waiting.bytes -= oldest.bytes.len();
                self.dropped += oldest.count();
            }
            let enough = most.min(out.len() + TURN);
            let mut refused = false;
            while out.len() < enough
                && !refused
                && let Some(batch) = waiting.batches.front_mut()
            {
                while out.len() < enough && !batch.bytes.is_empty() {
                    let length = batch.size.min(batch.bytes.len());
                    if !may(OVERHEAD + length) {
                        refused = true;
                        break;
                    }
                    frames::send(out, &to, &batch.bytes.split_to(length));
                    waiting.bytes -= length;
                }
                if batch.bytes.is_empty() {
                    waiting.batches.pop_front();
                }
            }
            self.bytes -= before - waiting.bytes;
            match waiting.batches.is_empty() {
                true => {
                    self.peers.remove(&to);
                }
                // Who was refused goes on where it stopped.
                false if refused => self.turns.push_front(to),
                false => self.turns.push_back(to),
            }
            if refused {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::tailnet::derp::frames::tests::sent;

    fn peer(number: u8) -> NodePublic {
        NodePublic::from_bytes([number; 32])
    }

    /// Datagrams that say which they are.
    fn batch(first: u8, count: usize, size: usize) -> Bytes {
        (0..count)
            .flat_map(|at| vec![first + at as u8; size])
            .collect()
    }

    fn firsts(out: &mut BytesMut) -> Vec<(u8, u8)> {
        let found = sent(out);
        found
            .iter()
            .map(|(to, bytes)| (to.as_bytes()[0], bytes[0]))
            .collect()
    }

    #[test]
    fn a_batch_is_one_frame_for_each_datagram() {
        let now = Instant::now();
        let mut queue = Queue::default();
        let bytes = Bytes::from_static(b"aaaabbbbcc");
        assert!(queue.push(peer(1), bytes, 4, now));
        let mut out = BytesMut::new();
        queue.fill(&mut out, 1000, None, now, now);
        let datagrams: Vec<_> = sent(&mut out).into_iter().map(|(_, bytes)| bytes).collect();
        assert_eq!(datagrams, ["aaaa", "bbbb", "cc"]);
        assert!(queue.is_empty() && queue.peers.is_empty() && queue.bytes == 0);
        for (bytes, size) in [(&b""[..], 1), (b"a", 0), (b"a", MOST_DATAGRAM + 1)] {
            assert!(!queue.push(peer(1), Bytes::from_static(bytes), size, now));
        }
    }

    #[test]
    fn what_nobody_waits_for_any_more_is_dropped_and_counted() {
        let start = Instant::now();
        let disco = |end: u8| Bytes::from([&disco::MAGIC[..], &[end]].concat());
        let mut queue = Queue::default();
        let late = start + STALE + Duration::from_millis(1);
        assert!(queue.push(peer(1), disco(1), 1400, start));
        assert!(queue.push(peer(1), disco(2), 1400, late));
        let mut out = BytesMut::new();
        queue.fill(&mut out, 1000, None, late, late);
        let said: Vec<_> = sent(&mut out).into_iter().map(|(_, bytes)| bytes).collect();
        assert_eq!(said, [disco(2)]);
        assert_eq!(queue.dropped, 1);
        assert!(queue.push(peer(1), disco(3), 1400, late));
        assert!(queue.push(peer(1), batch(0, 3, 1400), 1400, late));
        queue.clear();
        assert!(queue.is_empty() && queue.bytes == 0 && queue.next().is_none());
        assert_eq!(queue.dropped, 5);
        assert!(queue.push(peer(1), batch(0, 1, 9), 9, late));
        assert_eq!(queue.next(), Some(OVERHEAD + 9));
    }

    #[test]
    fn peers_take_turns_and_disco_overtakes() {
        let now = Instant::now();
        let mut queue = Queue::default();
        assert!(queue.push(peer(1), batch(0, 40, 1400), 1400, now));
        assert!(queue.push(peer(2), batch(100, 1, 1400), 1400, now));
        let call = [&disco::MAGIC[..], &[0; 60]].concat();
        assert!(queue.push(peer(3), call.clone().into(), call.len(), now));
        let mut out = BytesMut::new();
        queue.fill(&mut out, 64 << 10, None, now, now);
        let order = firsts(&mut out);
        assert_eq!(order[0], (3, b'T'));
        let second = order.iter().position(|(to, _)| *to == 2).unwrap();
        assert!(second <= 1 + TURN / 1400 + 1, "{second}");
        let first: Vec<u8> = order
            .iter()
            .filter(|(to, _)| *to == 1)
            .map(|(_, n)| *n)
            .collect();
        assert!(first.is_sorted(), "in the order in which they came");
    }

    #[test]
    fn the_oldest_go_first_when_there_are_too_many_or_they_are_late() {
        let start = Instant::now();
        let mut queue = Queue::default();
        let size = MOST_OF_PEER / 16;
        for number in 0..20 {
            assert!(queue.push(peer(1), batch(number, 1, size), size, start));
        }
        assert_eq!(queue.dropped, 4);
        let mut out = BytesMut::new();
        queue.fill(&mut out, 1, None, start, start);
        assert_eq!(firsts(&mut out), [(1, 4)]);

        // A connection that has just been made has made nothing late.
        let later = start + LATE * 2;
        queue.fill(&mut out, 1, None, later, later);
        assert_eq!(firsts(&mut out), [(1, 5)]);
        // What has been late all along goes, but for the newest.
        queue.fill(&mut out, 1, None, start, later);
        assert_eq!(firsts(&mut out), [(1, 19)]);
        assert_eq!(queue.dropped, 17);
        assert!(queue.is_empty() && queue.bytes == 0);
    }

    #[test]
    fn all_together_are_bounded() {
        let now = Instant::now();
        let mut queue = Queue::default();
        for number in 0..MOST_OF_ALL / MOST_OF_PEER {
            let bytes = Bytes::from(vec![0; MOST_OF_PEER]);
            assert!(queue.push(peer(number as u8 + 1), bytes, 1400, now));
        }
        assert!(!queue.push(peer(200), Bytes::from_static(b"a"), 1, now));
        for _ in 0..2 * MOST_URGENT {
            assert!(queue.push(peer(200), Bytes::from_static(&disco::MAGIC), 60, now));
        }
        assert_eq!(queue.urgent.len(), MOST_URGENT);
    }

    proptest! {
        /// What is taken comes out, whole and in order, or is counted as dropped; and the sums stay right.
        #[test]
        fn nothing_is_lost_uncounted(
            steps in proptest::collection::vec((0u8..4, 1usize..60, 1usize..3000, 1usize..90_000), 1..60),
        ) {
            let start = Instant::now();
            let (mut queue, mut out) = (Queue::default(), BytesMut::new());
            let (mut taken, mut found) = (0, 0u64);
            let mut last = BTreeMap::new();
            let mut note = |out: &mut BytesMut| -> Result<u64, TestCaseError> {
                let sent = sent(out);
                for (to, bytes) in &sent {
                    let before = last.insert(*to, bytes[0]);
                    prop_assert!(before.is_none_or(|before| before <= bytes[0]));
                }
                Ok(sent.len() as u64)
            };
            for (at, (to, count, size, most)) in steps.iter().enumerate() {
                let now = start + Duration::from_millis(10 * at as u64);
                let bytes = Bytes::from(vec![at as u8; count * size]);
                if queue.push(peer(*to), bytes, *size, now) {
                    taken += *count as u64;
                }
                queue.fill(&mut out, *most, None, start, now);
                found += note(&mut out)?;
                let sum: usize = queue.peers.values().map(|waiting| waiting.bytes).sum();
                prop_assert_eq!(sum, queue.bytes);
                prop_assert_eq!(queue.peers.len(), queue.turns.len());
            }
            queue.fill(&mut out, usize::MAX, None, start, start);
            found += note(&mut out)?;
            prop_assert!(queue.is_empty());
            prop_assert_eq!(found + queue.dropped, taken);
        }
    }
}

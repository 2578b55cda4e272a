//! The open runs of a coalescer, found by flow and by age.

use std::hash::{BuildHasher as _, RandomState};

use super::run::{Key, Run};
use crate::engine::offload::ip::Transport;

/// No run.
const NONE: u16 = u16::MAX;
/// An odd number without pattern, the golden ratio's.
const MIX: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(hash: u64, word: u64) -> u64 {
    let product = u128::from(hash ^ word) * u128::from(MIX);
    product as u64 ^ (product >> 64) as u64
}

#[derive(Debug)]
struct Entry {
    run: Run,
    /// The next one of the same bucket.
    next: u16,
    older: u16,
    newer: u16,
}

/// Open runs, each at a place that it keeps. Nothing is allocated after [`Table::new`].
#[derive(Debug)]
pub(super) struct Table {
    entries: Vec<Entry>,
    /// Places without a run, the one used last at the end: its memory is still in the cache.
    free: Vec<u16>,
    buckets: Box<[u16]>,
    oldest: u16,
    newest: u16,
    /// Peers must not be able to choose flows that share a bucket.
    seed: u64,
}

impl Table {
    /// An empty table for so many runs.
    pub(super) fn new(capacity: u16) -> Self {
        let capacity = usize::from(capacity);
        Self {
            entries: Vec::with_capacity(capacity),
            free: Vec::with_capacity(capacity),
            buckets: vec![NONE; (capacity * 2).next_power_of_two()].into(),
            oldest: NONE,
            newest: NONE,
            seed: RandomState::new().hash_one(()),
        }
    }

    /// How many runs are open.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Hash of the addresses of an IP packet, as they stand in it.
    pub(super) fn addresses(&self, addresses: &[u8]) -> u32 {
        let (words, _) = addresses.as_chunks::<8>();
        let words = words.iter().map(|word| u64::from_ne_bytes(*word));
        words.fold(self.seed, mix) as u32
    }

    /// Hashes of a packet.
    pub(super) fn key(&self, packet: &[u8], transport: &Transport) -> Key {
        let addresses = self.addresses(&packet[transport.addresses()]);
        let at = transport.start;
        let ports = [packet[at], packet[at + 1], packet[at + 2], packet[at + 3]];
        let rest = u64::from(u32::from_ne_bytes(ports)) << 8 | u64::from(transport.protocol);
        Key {
            addresses,
            flow: mix(self.seed ^ u64::from(addresses), rest) as u32,
        }
    }

    fn bucket(&self, key: Key) -> usize {
        key.flow as usize & (self.buckets.len() - 1)
    }

    /// Place of the run with this key that is of the right flow, as `is_it` tells of place and run.
    pub(super) fn find(&self, key: Key, is_it: impl Fn(usize, &Run) -> bool) -> Option<usize> {
        let mut at = self.buckets[self.bucket(key)];
        while let Some(entry) = self.entries.get(usize::from(at)) {
            if entry.run.key == key && is_it(at.into(), &entry.run) {
                return Some(at.into());
            }
            at = entry.next;
        }
        None
    }

    /// The run at a place that has one.
    pub(super) fn get_mut(&mut self, at: usize) -> &mut Run {
        &mut self.entries[at].run
    }

    /// The run that has been open for longest, and its place.
    pub(super) fn oldest(&self) -> Option<(usize, &Run)> {
        let entry = self.entries.get(usize::from(self.oldest))?;
        Some((self.oldest.into(), &entry.run))
    }

    /// Place of the oldest run between addresses of this hash.
    pub(super) fn between(&self, addresses: u32) -> Option<usize> {
        let mut at = self.oldest;
        while let Some(entry) = self.entries.get(usize::from(at)) {
            if entry.run.key.addresses == addresses {
                return Some(at.into());
            }
            at = entry.newer;
        }
        None
    }

    /// Adds a run, the newest; gives its place. There must be room.
    pub(super) fn open(&mut self, run: Run) -> usize {
        let bucket = self.bucket(run.key);
        let entry = Entry {
            run,
            next: self.buckets[bucket],
            older: self.newest,
            newer: NONE,
        };
        let at = if let Some(at) = self.free.pop() {
            self.entries[usize::from(at)] = entry;
            at
        } else {
            self.entries.push(entry);
            (self.entries.len() - 1) as u16
        };
        self.buckets[bucket] = at;
        match self.entries.get_mut(usize::from(self.newest)) {
            Some(newest) => newest.newer = at,
            None => self.oldest = at,
        }
        self.newest = at;
        at.into()
    }

    /// Takes out the run at a place that has one.
    pub(super) fn close(&mut self, at: usize) -> Run {
        let Entry {
            run,
            next,
            older,
            newer,
        } = self.entries[at];
        match self.entries.get_mut(usize::from(older)) {
            Some(older) => older.newer = newer,
            None => self.oldest = newer,
        }
        match self.entries.get_mut(usize::from(newer)) {
            Some(newer) => newer.older = older,
            None => self.newest = older,
        }
        let place = at as u16;
        let bucket = self.bucket(run.key);
        if self.buckets[bucket] == place {
            self.buckets[bucket] = next;
        } else {
            let mut before = usize::from(self.buckets[bucket]);
            while self.entries[before].next != place {
                before = self.entries[before].next.into();
            }
            self.entries[before].next = next;
        }
        self.free.push(place);
        run
    }
}

//! Settled flows ([`router_ebpf::abi::SETTLED4`]): who moves entries in and out, alone.

mod blocks;

use std::io;
use std::sync::atomic::{Ordering, fence};

use router_ebpf::abi::{EMPTY, Flow, VACANT};
use router_ebpf::packet::TCP;

use super::banks::wait_for_programs;
use super::flows::{Read, Store};

pub(super) use blocks::{Flows, Settling, blocks, descriptors, memory};

/// A flow table whose entries settle.
pub(super) trait Settle<K>: Store<K, Flow> {
    /// Whether an entry is settled.
    fn has_settled(&self, key: &K) -> bool;

    /// The present entry of `key`: what [`Read::read`] tells of it from now on.
    fn refresh(&mut self, key: &K) -> io::Result<Option<Flow>>;

    /// Settles entries, as they were read from the table, as far as there is room.
    fn settle(&mut self, entries: &[(K, Flow)]) -> io::Result<()>;

    /// Entries that are settled.
    fn settled(&self) -> u64;
}

/// A slot, as who writes them all knows it.
#[derive(Clone, Copy, Default)]
struct Known {
    /// A part of the hash of the key that has it; zero: nobody.
    mark: u16,
    /// Settled keys that have a slot further on.
    passed: u8,
    /// A program may still look at what was in it.
    resting: bool,
}

/// The flow table of one family, and who alone settles its entries.
pub(super) struct Settler<K: Settling> {
    flows: Flows<K>,
    /// By block; as long as there is none of it, nothing is known.
    known: Vec<Vec<Known>>,
    resting: Vec<u32>,
    settled: u64,
}

impl<K: Settling> Settler<K> {
    /// No entry is settled yet.
    pub(super) fn new(flows: Flows<K>) -> Self {
        let blocks = flows.blocks().most() as usize;
        Self {
            flows,
            known: vec![Vec::new(); blocks],
            resting: Vec::new(),
            settled: 0,
        }
    }

    fn known(&self, slot: u32) -> Known {
        let block = self.known.get((slot / K::IN_BLOCK) as usize);
        let known = block.and_then(|block| block.get((slot % K::IN_BLOCK) as usize));
        known.copied().unwrap_or_default()
    }

    fn know(&mut self, slot: u32, change: impl FnOnce(&mut Known)) {
        if let Some(block) = self.known.get_mut((slot / K::IN_BLOCK) as usize) {
            block.resize(K::IN_BLOCK as usize, Known::default());
            if let Some(known) = block.get_mut((slot % K::IN_BLOCK) as usize) {
                change(known);
            }
        }
    }

    /// The slot of `key`, and its entry.
    fn find(&self, key: &K) -> io::Result<Option<(u32, Flow)>> {
        let mark = mark(key);
        let blocks = self.flows.blocks();
        for seat in blocks.seats(key) {
            if self.known(seat).mark == mark
                && let Some(slot) = blocks.read(seat)?
                && let (_, Some(flow)) = key.entry(&slot)
            {
                return Ok(Some((seat, flow)));
            }
        }
        Ok(None)
    }

    /// Gives a key one of its slots, if one is free; what is in it is to be written.
    fn enter(&mut self, key: &K) -> io::Result<Option<u32>> {
        // A second slot of one key would outlive the first.
        if self.has_settled(key) {
            return Ok(None);
        }
        let seats = self.flows.blocks().seats(key);
        let first = seats.start;
        let mut free = seats.filter(|seat| {
            let known = self.known(*seat);
            known.mark == 0 && !known.resting
        });
        let Some(seat) = free.next().filter(|seat| self.flows.blocks().has(*seat)) else {
            return Ok(None);
        };
        for before in first..seat {
            self.know(before, |known| known.passed += 1);
            // Who looks for the key must not stop there.
            self.say_free(before)?;
        }
        self.know(seat, |known| known.mark = mark(key));
        self.settled += 1;
        Ok(Some(seat))
    }

    /// Writes entries to the slots that they have got.
    fn fill(&self, entered: &[(u32, (K, Flow))]) -> io::Result<()> {
        let blocks = self.flows.blocks();
        let mut slots: Vec<_> = entered
            .iter()
            .map(|(seat, (key, flow))| (*seat, key.slot(flow)))
            .collect();
        slots.sort_unstable_by_key(|(seat, _)| *seat);
        // No program may find the key before all of the entry is there, and the kernel copies in any
        // order.
        let without_key: Vec<_> = slots
            .iter()
            .map(|(seat, slot)| (*seat, K::free(slot, self.free_word(*seat))))
            .collect();
        blocks.write(&without_key)?;
        fence(Ordering::SeqCst);
        blocks.write(&slots)
    }

    /// Has nobody have a slot any more. A program may still look at what is in it: so that stays, without
    /// its key, until [`Settle::settle`] has waited for that.
    fn vacate(&mut self, seat: u32) {
        self.know(seat, |known| {
            known.mark = 0;
            known.resting = true;
        });
        self.resting.push(seat);
        self.settled -= 1;
    }

    /// What stands in a slot that nobody has.
    fn free_word(&self, slot: u32) -> u64 {
        if self.known(slot).passed == 0 {
            EMPTY
        } else {
            VACANT
        }
    }

    /// Writes that to a slot, if nobody has it.
    fn say_free(&self, slot: u32) -> io::Result<()> {
        if self.known(slot).mark != 0 {
            return Ok(());
        }
        let before = self.flows.blocks().read(slot)?;
        before.map_or(Ok(()), |before| {
            let free = K::free(&before, self.free_word(slot));
            self.flows.blocks().write(&[(slot, free)])
        })
    }

    /// Takes a settled entry out.
    fn leave(&mut self, key: &K) -> io::Result<()> {
        let Some((seat, _)) = self.find(key)? else {
            return Ok(());
        };
        self.vacate(seat);
        self.say_free(seat)?;
        let first = self.flows.blocks().seats(key).start;
        for before in first..seat {
            self.know(before, |known| known.passed -= 1);
            self.say_free(before)?;
        }
        Ok(())
    }
}

/// [`Known::mark`] of `key`.
fn mark<K: std::hash::Hash>(key: &K) -> u16 {
    let mut hasher = std::hash::DefaultHasher::new();
    key.hash(&mut hasher);
    (std::hash::Hasher::finish(&hasher) as u16).max(1)
}

impl<K: Settling> Read<K, Flow> for Settler<K> {
    fn read(&self, cursor: &mut Option<u32>, into: &mut Vec<(K, Flow)>) -> io::Result<()> {
        self.flows.read(cursor, into)
    }

    fn get(&self, key: &K) -> io::Result<Option<Flow>> {
        match self.find(key)? {
            Some((_, flow)) => Ok(Some(flow)),
            None => self.flows.table.get(key),
        }
    }
}

impl<K: Settling> Store<K, Flow> for Settler<K> {
    fn remove(&mut self, key: &K) -> io::Result<()> {
        // The table's goes last: it keeps the tuple from other flows.
        self.leave(key)?;
        self.flows.table.remove(key)
    }

    fn put(&mut self, key: &K, flow: &Flow) -> io::Result<()> {
        self.leave(key)?;
        self.flows.table.put(key, flow)
    }
}

impl<K: Settling> Settle<K> for Settler<K> {
    fn has_settled(&self, key: &K) -> bool {
        let mark = mark(key);
        let mut seats = self.flows.blocks().seats(key);
        seats.any(|seat| self.known(seat).mark == mark)
    }

    fn refresh(&mut self, key: &K) -> io::Result<Option<Flow>> {
        let Some((_, flow)) = self.find(key)? else {
            return self.flows.table.get(key);
        };
        self.flows.table.put(key, &flow)?;
        Ok(Some(flow))
    }

    fn settle(&mut self, entries: &[(K, Flow)]) -> io::Result<()> {
        // Else no slot could be given to another key.
        if !self.resting.is_empty() && !wait_for_programs() {
            return Ok(());
        }
        for slot in std::mem::take(&mut self.resting) {
            self.know(slot, |known| known.resting = false);
        }
        self.flows.blocks().make(entries.iter().map(|(key, _)| key));
        let mut entered = Vec::new();
        let mut enter_all = || {
            for (key, flow) in entries {
                if let Some(seat) = self.enter(key)? {
                    entered.push((seat, (*key, *flow)));
                }
            }
            self.fill(&entered)
        };
        if let Err(error) = enter_all() {
            for (seat, _) in entered {
                self.vacate(seat);
                // Some may have their key already. What fails here too is told all the same.
                let _ = self.say_free(seat);
            }
            return Err(error);
        }
        if entered.is_empty() {
            return Ok(());
        }
        let waited = wait_for_programs();
        for (_, (key, flow)) in &entered {
            // A program that had found the old entry may have changed it since it was read. All of
            // that is said again by the next packets, but for the end of a connection.
            let stays = waited
                && (key.tuple().protocol != TCP
                    || (self.flows.table.get(key)?).is_some_and(|now| now.tcp == flow.tcp));
            if !stays {
                self.leave(key)?;
            }
        }
        Ok(())
    }

    fn settled(&self) -> u64 {
        self.settled
    }
}

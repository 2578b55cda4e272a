//! The slots of settled flows: where they are, and how many there may be.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::Pod;
use aya::maps::{Array, ArrayOfMaps, Map, MapData, MapError};
use router_ebpf::abi::{
    BLOCK, EMPTY, Flow, Key4, Key6, PROBES, SETTLED4, SETTLED6, Seats, Slot4, Slot6,
};

use super::super::flows::{Key, Read, Table};
use super::super::{failed, sys};
use crate::datapath::Error;

/// Of a machine's memory, the part that the slots of both families may take.
const SHARE: u64 = 32;

/// Blocks (arrays of slots) that are made at a time where the kernel takes each by itself: it waits for all
/// programs every time.
const SINGLY: usize = 16;

/// Blocks of each family for a flow table of so many entries: of IPv4 two slots for each entry, of IPv6 one;
/// fewer where memory (in bytes) or descriptors are short.
pub(in super::super) fn blocks(entries: u32, memory: u64, descriptors: u64) -> [u32; 2] {
    let most = (memory / SHARE / 2 / BLOCK as u64).min(descriptors / 4);
    let most = most.clamp(1, 1 << 20);
    let fit = |slots: u64, in_block: usize| slots.div_ceil(in_block as u64).clamp(1, most) as u32;
    let entries = u64::from(entries);
    [
        fit(2 * entries, Slot4::IN_BLOCK),
        fit(entries, Slot6::IN_BLOCK),
    ]
}

/// Lets this process have as many descriptors as it may, and tells how many that are. Each block takes one.
pub(in super::super) fn descriptors() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel fills one `rlimit`, and reads one.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) < 0 {
            return 0;
        }
        let wanted = libc::rlimit {
            rlim_cur: limit.rlim_max,
            ..limit
        };
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const wanted) == 0 {
            limit = wanted;
        }
    }
    limit.rlim_cur
}

/// Bytes of memory that this process may use: the machine's, or less if a control group says so.
pub(in super::super) fn memory() -> u64 {
    let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let total = text(Path::new("/proc/meminfo"))
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()
        })
        .map_or(0, |kib: u64| kib.saturating_mul(1024));
    let groups = text(Path::new("/proc/self/cgroup"));
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    let root = Path::new("/sys/fs/cgroup");
    let path = root.join(group.unwrap_or_default());
    path.ancestors()
        .take_while(|path| path.starts_with(root))
        .filter_map(|path| text(&path.join("memory.max")).trim().parse().ok())
        .fold(total, u64::min)
}

/// A key of settled entries.
pub(in super::super) trait Settling: Key {
    /// What a slot holds.
    type Slot: Pod;

    /// The map of the blocks.
    const MAP: &str;

    /// Slots of a block.
    const IN_BLOCK: u32;

    /// Where its entry may be, in so many blocks.
    fn seats(&self, blocks: u32) -> Seats;

    /// The slot of an entry.
    fn slot(&self, flow: &Flow) -> Self::Slot;

    /// The slot that nobody has but for `last`, [`EMPTY`] or [`router_ebpf::abi::VACANT`]; else as
    /// it was before.
    fn free(slot: &Self::Slot, last: u64) -> Self::Slot;

    /// The last word of the key, and the entry if it is this key's.
    fn entry(&self, slot: &Self::Slot) -> (u64, Option<Flow>);
}

macro_rules! settling {
    ($key:ident, $slot:ident, $map:expr) => {
        impl Settling for $key {
            type Slot = $slot;

            const MAP: &str = $map;
            const IN_BLOCK: u32 = $slot::IN_BLOCK as u32;

            fn seats(&self, blocks: u32) -> Seats {
                let words = $key::words(self.side(), &self.tuple());
                Seats::of::<{ $slot::IN_BLOCK }>(&words, blocks)
            }

            fn slot(&self, flow: &Flow) -> $slot {
                let mut slot = $slot {
                    key: $key::words(self.side(), &self.tuple()),
                    ..$slot::default()
                };
                for (word, value) in slot.flow.iter_mut().zip(flow.words()) {
                    *word = value;
                }
                slot
            }

            fn free(slot: &$slot, last: u64) -> $slot {
                let mut slot = *slot;
                if let Some(word) = slot.key.last_mut() {
                    *word = last;
                }
                slot
            }

            fn entry(&self, slot: &$slot) -> (u64, Option<Flow>) {
                let last = slot.key.last().copied().unwrap_or(EMPTY);
                let same = slot.key == $key::words(self.side(), &self.tuple());
                (last, same.then(|| Flow::from_words(&slot.flow)))
            }
        }
    };
}
settling!(Key4, Slot4, SETTLED4);
settling!(Key6, Slot6, SETTLED6);

/// The blocks of one family that there are; the kernel would give a descriptor of one only to an
/// administrator (CAP_SYS_ADMIN).
pub(super) struct Blocks<K: Settling> {
    fd: OwnedFd,
    map: ArrayOfMaps<MapData, Array<MapData, K::Slot>>,
    /// Each is an array of [`Settling::IN_BLOCK`] slots.
    blocks: Vec<Option<OwnedFd>>,
}

impl<K: Settling> Blocks<K> {
    fn new(data: MapData) -> Result<Self, MapError> {
        let fd = data.fd().as_fd().try_clone_to_owned();
        let map = ArrayOfMaps::try_from(Map::ArrayOfMaps(data))?;
        Ok(Self {
            fd: fd.map_err(MapError::IoError)?,
            blocks: (0..map.len()).map(|_| None).collect(),
            map,
        })
    }

    /// How many there may be.
    pub(super) fn most(&self) -> u32 {
        self.map.len()
    }

    /// The block of the slot with this number of all, if there is one yet.
    fn block(&self, slot: u32) -> Option<BorrowedFd<'_>> {
        let block = self.blocks.get((slot / K::IN_BLOCK) as usize)?;
        block.as_ref().map(|block| block.as_fd())
    }

    /// Whether there is a block of this slot.
    pub(super) fn has(&self, slot: u32) -> bool {
        self.block(slot).is_some()
    }

    /// This slot; `None` as long as there is no block of it.
    pub(super) fn read(&self, slot: u32) -> io::Result<Option<K::Slot>> {
        let Some(block) = self.block(slot) else {
            return Ok(None);
        };
        // SAFETY: such are the values of a block.
        unsafe { sys::lookup(block, slot % K::IN_BLOCK) }.map(Some)
    }

    /// Writes slots, each as a whole; those of one block should be neighbours.
    pub(super) fn write(&self, slots: &[(u32, K::Slot)]) -> io::Result<()> {
        let (mut keys, mut values) = (Vec::new(), Vec::new());
        for slots in slots.chunk_by(|(one, _), (other, _)| one / K::IN_BLOCK == other / K::IN_BLOCK)
        {
            let block = slots.first().and_then(|(slot, _)| self.block(*slot));
            let block = block.ok_or(io::ErrorKind::NotFound)?;
            keys.clear();
            keys.extend(slots.iter().map(|(slot, _)| slot % K::IN_BLOCK));
            values.clear();
            values.extend(slots.iter().map(|(_, value)| *value));
            // SAFETY: such are the values of a block.
            unsafe { sys::update_batch(block, &keys, &values) }?;
        }
        Ok(())
    }

    /// The numbers of the slots where `key` may be.
    pub(super) fn seats(&self, key: &K) -> std::ops::Range<u32> {
        let seats = key.seats(self.map.len());
        let first = seats.block * K::IN_BLOCK + seats.first;
        first..first + PROBES
    }

    /// Makes the blocks that these keys need, as far as the kernel lets. What has no place stays in the
    /// table.
    pub(super) fn make<'a>(&mut self, keys: impl Iterator<Item = &'a K>)
    where
        K: 'a,
    {
        let count = self.map.len();
        let mut wanted: Vec<u32> = keys.map(|key| key.seats(count).block).collect();
        wanted.sort_unstable();
        wanted.dedup();
        wanted.retain(|number| matches!(self.blocks.get(*number as usize), Some(None)));
        let mut made = Vec::new();
        for number in wanted {
            match sys::create_array(size_of::<K::Slot>(), K::IN_BLOCK) {
                Ok(fd) => made.push((number, fd)),
                Err(error) => {
                    tracing::debug!(%error, "no more memory for settled flows");
                    break;
                }
            }
        }
        if let Err(error) = self.take_in(made) {
            tracing::debug!(%error, "no more room for settled flows");
        }
    }

    /// Has the programs look into new blocks.
    fn take_in(&mut self, made: Vec<(u32, OwnedFd)>) -> Result<(), MapError> {
        if made.is_empty() {
            return Ok(());
        }
        let (numbers, fds): (Vec<u32>, Vec<u32>) = made
            .iter()
            .map(|(number, fd)| (*number, fd.as_raw_fd() as u32))
            .unzip();
        // SAFETY: the values of such a map are descriptors.
        let whole = unsafe { sys::update_batch(self.fd.as_fd(), &numbers, &fds) }.is_ok();
        // Before Linux 5.18 there are no batches of these.
        let most = if whole { made.len() } else { SINGLY };
        for (number, fd) in made.into_iter().take(most) {
            if !whole {
                let block = MapData::from_fd(fd.try_clone().map_err(MapError::IoError)?)?;
                let block = Array::try_from(Map::from_map_data(block)?)?;
                self.map.set(number, &block, 0)?;
            }
            if let Some(place) = self.blocks.get_mut(number as usize) {
                *place = Some(fd);
            }
        }
        Ok(())
    }
}

/// The flow table of one family with its settled entries, for reading.
pub(in super::super) struct Flows<K: Settling> {
    /// All keys; of those that are settled the entry is an old one.
    pub(in super::super) table: Table<K, Flow>,
    blocks: Arc<Mutex<Blocks<K>>>,
}

impl<K: Settling> Flows<K> {
    /// Takes the maps out of the loaded object.
    pub(in super::super) fn take(programs: &mut aya::Ebpf, table: &str) -> Result<Self, Error> {
        let table = Table::take(programs, table)?;
        let context = format!("find the eBPF map {}", K::MAP);
        let Some(Map::ArrayOfMaps(data)) = programs.take_map(K::MAP) else {
            return Err(failed(context, "the object has no such array of arrays"));
        };
        let blocks = Blocks::new(data).map_err(|error| failed(context, error))?;
        Ok(Self {
            table,
            blocks: Arc::new(Mutex::new(blocks)),
        })
    }

    /// Another handle on the same maps.
    pub(in super::super) fn try_clone(&self) -> Result<Self, MapError> {
        Ok(Self {
            table: self.table.try_clone()?,
            blocks: Arc::clone(&self.blocks),
        })
    }

    pub(super) fn blocks(&self) -> MutexGuard<'_, Blocks<K>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Settling> Read<K, Flow> for Flows<K> {
    fn read(&self, cursor: &mut Option<u32>, into: &mut Vec<(K, Flow)>) -> io::Result<()> {
        self.table.read(cursor, into)
    }

    fn get(&self, key: &K) -> io::Result<Option<Flow>> {
        let blocks = self.blocks();
        for seat in blocks.seats(key) {
            match blocks.read(seat)?.map(|slot| key.entry(&slot)) {
                Some((_, Some(flow))) => return Ok(Some(flow)),
                Some((EMPTY, _)) | None => break,
                _ => {}
            }
        }
        self.table.get(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_what_entries_need_or_what_fits() {
        const GIB: u64 = 1 << 30;
        assert_eq!(blocks(1 << 19, 16 * GIB, 1 << 19), [2115, 1589]);
        // 16 MiB in all.
        assert_eq!(blocks(1 << 19, GIB / 2, 1 << 19), [264, 264]);
        assert_eq!(blocks(1 << 19, GIB, 1000), [250, 250]);
        assert_eq!(blocks(3, GIB, 1000), [1, 1]);
        assert_eq!(blocks(u32::MAX, 0, 0), [1, 1]);
    }

    #[test]
    fn this_machine_has_memory_and_descriptors() {
        assert!(memory() > 1 << 20);
        assert!(descriptors() > 3);
    }
}

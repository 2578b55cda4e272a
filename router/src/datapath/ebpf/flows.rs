//! User space's way to the flow table.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError};
use router_ebpf::abi::{Flow, Key4, Key6, Side, Tuple};

use super::{failed, sys};
use crate::datapath::Error;

/// Entries that one system call reads. More than any bucket of the hash holds, and few enough that
/// the kernel is soon back from it.
const BATCH: usize = 1024;

/// A key of the flow table of one family.
pub(super) trait Key: Pod + Ord + Send + std::hash::Hash {
    /// The key of packets with `tuple` in the program of `side`.
    fn of(side: Side, tuple: &Tuple) -> Self;

    /// The tuple of the packets.
    fn tuple(&self) -> Tuple;

    /// The program that sees such packets.
    fn side(&self) -> Side;
}

macro_rules! key {
    ($type:ident) => {
        impl Key for $type {
            fn of(side: Side, tuple: &Tuple) -> Self {
                Self::new(side, tuple)
            }

            fn tuple(&self) -> Tuple {
                self.tuple()
            }

            fn side(&self) -> Side {
                if self.side == Side::Overlay as u8 {
                    Side::Overlay
                } else {
                    Side::Subnet
                }
            }
        }
    };
}

key!(Key4);
key!(Key6);

/// The key of the other direction's entry.
pub(super) fn partner<K: Key>(key: &K, flow: &Flow) -> K {
    let (side, tuple) = flow.other(key.side(), &key.tuple());
    K::of(side, &tuple)
}

/// A hash that is read while others change it.
pub(super) trait Read<K, V> {
    /// Replaces `into` with further entries, from `cursor` on, and moves the cursor; `None` where
    /// the reading begins, and again when it is at its end. An entry that stays meanwhile is read
    /// once.
    fn read(&self, cursor: &mut Option<u32>, into: &mut Vec<(K, V)>) -> io::Result<()>;

    /// The value of `key`.
    fn get(&self, key: &K) -> io::Result<Option<V>>;
}

/// Has `visit` see all entries, batch by batch.
pub(super) fn in_batches<K, V, S: Read<K, V>>(
    store: &mut S,
    mut visit: impl FnMut(&mut S, &[(K, V)]) -> io::Result<()>,
) -> io::Result<()> {
    let (mut cursor, mut entries) = (None, Vec::new());
    loop {
        store.read(&mut cursor, &mut entries)?;
        visit(store, &entries)?;
        if cursor.is_none() {
            return Ok(());
        }
    }
}

/// One that is changed, too.
pub(super) trait Store<K, V>: Read<K, V> {
    /// Removes `key` if it is there.
    fn remove(&mut self, key: &K) -> io::Result<()>;

    /// Sets the value of `key`.
    fn put(&mut self, key: &K, value: &V) -> io::Result<()>;
}

/// A hash map in the kernel.
pub(super) struct Table<K, V> {
    fd: OwnedFd,
    map: HashMap<MapData, K, V>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    /// Takes the map `name` out of the loaded object.
    pub(super) fn take(programs: &mut aya::Ebpf, name: &str) -> Result<Self, Error> {
        let context = format!("find the eBPF map {name}");
        match programs.take_map(name) {
            Some(Map::HashMap(data)) => {
                Self::open(data.fd().as_fd()).map_err(|error| failed(context, error))
            }
            _ => Err(failed(context, "the object has no such hash")),
        }
    }

    /// A handle of its own on the same map.
    pub(super) fn open(fd: BorrowedFd<'_>) -> Result<Self, MapError> {
        let clone = || fd.try_clone_to_owned().map_err(MapError::IoError);
        let data = MapData::from_fd(clone()?)?;
        Ok(Self {
            fd: clone()?,
            map: HashMap::try_from(Map::from_map_data(data)?)?,
        })
    }

    /// The map itself.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Another handle on the same map.
    pub(super) fn try_clone(&self) -> Result<Self, MapError> {
        Self::open(self.fd.as_fd())
    }
}

impl<K: Pod, V: Pod> Read<K, V> for Table<K, V> {
    fn read(&self, cursor: &mut Option<u32>, into: &mut Vec<(K, V)>) -> io::Result<()> {
        into.clear();
        let mut keys: Vec<K> = Vec::with_capacity(BATCH);
        let mut values: Vec<V> = Vec::with_capacity(BATCH);
        let mut next = 0u32;
        let mut batch = sys::Batch {
            in_batch: cursor
                .as_ref()
                .map_or(0, |at| std::ptr::from_ref(at) as u64),
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: BATCH as u32,
            map_fd: self.fd.as_raw_fd() as u32,
            ..sys::Batch::default()
        };
        // SAFETY: the kernel reads what `in_batch` points to, and writes no more than `count` keys and
        // values of the map's sizes, which aya has compared with those of the types, and one `u32` to
        // `out_batch`.
        let outcome = unsafe { batch.call(sys::LOOKUP_BATCH) };
        let end = match outcome {
            Ok(()) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        let count = (batch.count as usize).min(BATCH);
        // SAFETY: the kernel has written `count` of each, for which there is room, and any bytes
        // make a `Pod`.
        unsafe {
            keys.set_len(count);
            values.set_len(count);
        }
        into.extend(keys.into_iter().zip(values));
        *cursor = (!end).then_some(next);
        Ok(())
    }

    fn get(&self, key: &K) -> io::Result<Option<V>> {
        match self.map.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(io_error(error)),
        }
    }
}

impl<K: Pod, V: Pod> Store<K, V> for Table<K, V> {
    fn remove(&mut self, key: &K) -> io::Result<()> {
        match self.map.remove(key) {
            Ok(()) => Ok(()),
            Err(error) => match io_error(error) {
                error if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                error => Err(error),
            },
        }
    }

    fn put(&mut self, key: &K, value: &V) -> io::Result<()> {
        self.map.insert(key, value, 0).map_err(io_error)
    }
}

pub(super) fn io_error(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::IoError(error) => error,
        MapError::KeyNotFound | MapError::ElementNotFound => {
            io::Error::from_raw_os_error(libc::ENOENT)
        }
        error => io::Error::other(error),
    }
}

/// A store in memory, for tests.
#[cfg(test)]
pub(super) mod memory {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::ops::Bound;

    use super::super::settled::Settle;
    use super::*;

    /// The entries, and the last one that was read.
    pub(in super::super) struct Memory<K, V> {
        pub(in super::super) entries: BTreeMap<K, V>,
        /// Entries that are settled, as they are now.
        pub(in super::super) settled: BTreeMap<K, V>,
        last: RefCell<Option<K>>,
    }

    impl<K: Ord, V> Memory<K, V> {
        pub(in super::super) fn new(entries: BTreeMap<K, V>) -> Self {
            Self {
                entries,
                settled: BTreeMap::new(),
                last: RefCell::new(None),
            }
        }
    }

    impl<K: Ord + Copy, V: Copy> Read<K, V> for Memory<K, V> {
        fn read(&self, cursor: &mut Option<u32>, into: &mut Vec<(K, V)>) -> io::Result<()> {
            let mut last = self.last.borrow_mut();
            let behind = match (*cursor, *last) {
                (Some(_), Some(last)) => Bound::Excluded(last),
                _ => Bound::Unbounded,
            };
            let further = self.entries.range((behind, Bound::Unbounded));
            into.clear();
            into.extend(further.take(7).map(|(k, v)| (*k, *v)));
            *last = into.last().map(|(key, _)| *key);
            *cursor = last.map(|_| 0);
            Ok(())
        }

        fn get(&self, key: &K) -> io::Result<Option<V>> {
            Ok(self.settled.get(key).or(self.entries.get(key)).copied())
        }
    }

    impl<K: Ord + Copy, V: Copy> Store<K, V> for Memory<K, V> {
        fn remove(&mut self, key: &K) -> io::Result<()> {
            self.settled.remove(key);
            self.entries.remove(key);
            Ok(())
        }

        fn put(&mut self, key: &K, value: &V) -> io::Result<()> {
            self.entries.insert(*key, *value);
            Ok(())
        }
    }

    impl<K: Ord + Copy> Settle<K> for Memory<K, Flow> {
        fn has_settled(&self, key: &K) -> bool {
            self.settled.contains_key(key)
        }

        fn refresh(&mut self, key: &K) -> io::Result<Option<Flow>> {
            let present = self.get(key)?;
            if let Some(present) = present {
                self.entries.insert(*key, present);
            }
            Ok(present)
        }

        fn settle(&mut self, entries: &[(K, Flow)]) -> io::Result<()> {
            self.settled.extend(entries.iter().copied());
            Ok(())
        }

        fn settled(&self) -> u64 {
            self.settled.len() as u64
        }
    }
}

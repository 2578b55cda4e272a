//! User space's way to the flow table.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData, MapError};
use router_ebpf::abi::{Flow, Key4, Key6, Side, Tuple};

use super::failed;
use crate::datapath::Error;

/// Entries that one system call reads. More than any bucket of the hash holds, and few enough that
/// the kernel is soon back from it.
const BATCH: usize = 1024;

/// `BPF_MAP_LOOKUP_BATCH` of linux/bpf.h (Linux 5.6).
const LOOKUP_BATCH: libc::c_long = 24;

/// A key of the flow table of one family.
pub(super) trait Key: Pod + Ord + Send {
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

/// A hash that is read from end to end while others change it.
pub(super) trait Store<K, V> {
    /// Replaces `into` with further entries, from `cursor` on, and moves the cursor; `None` where
    /// the reading begins, and again when it is at its end. An entry that stays meanwhile is read
    /// once.
    fn read(&self, cursor: &mut Option<u32>, into: &mut Vec<(K, V)>) -> io::Result<()>;

    /// The value of `key`.
    fn get(&self, key: &K) -> io::Result<Option<V>>;

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

/// The batch part of `union bpf_attr` (linux/bpf.h).
#[repr(C)]
struct Batch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

impl<K: Pod, V: Pod> Store<K, V> for Table<K, V> {
    fn read(&self, cursor: &mut Option<u32>, into: &mut Vec<(K, V)>) -> io::Result<()> {
        into.clear();
        let mut keys: Vec<K> = Vec::with_capacity(BATCH);
        let mut values: Vec<V> = Vec::with_capacity(BATCH);
        let mut next = 0u32;
        let mut batch = Batch {
            in_batch: cursor
                .as_ref()
                .map_or(0, |at| std::ptr::from_ref(at) as u64),
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: BATCH as u32,
            map_fd: self.fd.as_raw_fd() as u32,
            elem_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads `batch` and what `in_batch` points to, and writes no more than
        // `count` keys and values of the map's sizes, which aya has compared with those of the
        // types, and one `u32` to `out_batch`.
        let code = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                LOOKUP_BATCH,
                &raw mut batch,
                size_of::<Batch>(),
            )
        };
        let error = (code < 0).then(io::Error::last_os_error);
        let end = match error {
            None => false,
            Some(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Some(error) => return Err(error),
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

fn io_error(error: MapError) -> io::Error {
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

    use super::*;

    /// The entries, and the last one that was read.
    pub(in super::super) struct Memory<K, V>(
        pub(in super::super) BTreeMap<K, V>,
        RefCell<Option<K>>,
    );

    impl<K: Ord, V> Memory<K, V> {
        pub(in super::super) fn new(entries: BTreeMap<K, V>) -> Self {
            Self(entries, RefCell::new(None))
        }
    }

    impl<K: Ord + Copy, V: Copy> Store<K, V> for Memory<K, V> {
        fn read(&self, cursor: &mut Option<u32>, into: &mut Vec<(K, V)>) -> io::Result<()> {
            let mut last = self.1.borrow_mut();
            let behind = match (*cursor, *last) {
                (Some(_), Some(last)) => Bound::Excluded(last),
                _ => Bound::Unbounded,
            };
            let further = self.0.range((behind, Bound::Unbounded));
            into.clear();
            into.extend(further.take(7).map(|(k, v)| (*k, *v)));
            *last = into.last().map(|(key, _)| *key);
            *cursor = last.map(|_| 0);
            Ok(())
        }

        fn get(&self, key: &K) -> io::Result<Option<V>> {
            Ok(self.0.get(key).copied())
        }

        fn remove(&mut self, key: &K) -> io::Result<()> {
            self.0.remove(key);
            Ok(())
        }

        fn put(&mut self, key: &K, value: &V) -> io::Result<()> {
            self.0.insert(*key, *value);
            Ok(())
        }
    }
}

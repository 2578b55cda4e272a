//! bpf(2), where aya does not offer what is needed of it.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

use aya::Pod;

/// `BPF_MAP_CREATE` of linux/bpf.h.
const MAP_CREATE: libc::c_long = 0;
/// `BPF_MAP_LOOKUP_ELEM`.
const MAP_LOOKUP_ELEM: libc::c_long = 1;
/// `BPF_MAP_LOOKUP_BATCH` (Linux 5.6).
pub(super) const LOOKUP_BATCH: libc::c_long = 24;
/// `BPF_MAP_UPDATE_BATCH` (Linux 5.6).
const UPDATE_BATCH: libc::c_long = 26;
/// `BPF_MAP_TYPE_ARRAY`.
const ARRAY: u32 = 2;

/// The batch part of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
pub(super) struct Batch {
    pub(super) in_batch: u64,
    pub(super) out_batch: u64,
    pub(super) keys: u64,
    pub(super) values: u64,
    pub(super) count: u32,
    pub(super) map_fd: u32,
    pub(super) elem_flags: u64,
    pub(super) flags: u64,
}

impl Batch {
    /// # Safety
    ///
    /// The pointers are to as much as the command reads and writes.
    pub(super) unsafe fn call(&mut self, command: libc::c_long) -> io::Result<()> {
        // SAFETY: by the caller's promise.
        unsafe { bpf(command, self) }.map(drop)
    }
}

/// Sets elements of a map in one call: all, or an error after which some may be set.
///
/// # Safety
///
/// The map's keys are as long as `K`, its values as long as `V`.
pub(super) unsafe fn update_batch<K: Pod, V: Pod>(
    map: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    let mut batch = Batch {
        keys: keys.as_ptr() as u64,
        values: values.as_ptr() as u64,
        count: keys.len().min(values.len()) as u32,
        map_fd: map.as_raw_fd() as u32,
        ..Batch::default()
    };
    // SAFETY: the kernel reads `count` keys and values, of the sizes of the map.
    unsafe { batch.call(UPDATE_BATCH) }
}

/// The head of `union bpf_attr` for `BPF_MAP_LOOKUP_ELEM`.
#[repr(C)]
struct Lookup {
    map_fd: u64,
    key: u64,
    value: u64,
    flags: u64,
}

/// An element of a map of four-byte keys.
///
/// # Safety
///
/// The map's values are as long as `V`.
pub(super) unsafe fn lookup<V: Pod>(map: BorrowedFd<'_>, key: u32) -> io::Result<V> {
    let mut value = MaybeUninit::<V>::uninit();
    let mut attr = Lookup {
        map_fd: map.as_raw_fd() as u64,
        key: &raw const key as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads a key and writes a value, of the sizes of the map; any bytes make a `Pod`.
    unsafe {
        bpf(MAP_LOOKUP_ELEM, &mut attr)?;
        Ok(value.assume_init())
    }
}

/// The head of `union bpf_attr` for `BPF_MAP_CREATE`.
#[repr(C)]
struct Create {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// Makes an array of so many values, of so many bytes each.
pub(super) fn create_array(value_size: usize, entries: u32) -> io::Result<OwnedFd> {
    let mut attr = Create {
        map_type: ARRAY,
        key_size: size_of::<u32>() as u32,
        value_size: value_size as u32,
        max_entries: entries,
    };
    // SAFETY: the command takes no pointers, and makes a descriptor that is nobody else's.
    unsafe { bpf(MAP_CREATE, &mut attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// # Safety
///
/// `attr` is as the command wants it, with pointers to as much as it reads and writes.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes no more of `attr` than its size; else by the caller's promise.
    let code = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if code < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(code as i32)
}

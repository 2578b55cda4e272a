//! bpf(2), as far as a bench needs it that writes its programs by hand: loading them, a map for
//! their state, and BPF_PROG_TEST_RUN (linux/bpf.h; net/bpf/test_run.c).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

const BPF_MAP_CREATE: libc::c_long = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_MAP_TYPE_ARRAY: u32 = 2;

/// `BPF_PROG_TYPE_SCHED_CLS`.
pub(crate) const SCHED_CLS: u32 = 3;
/// `BPF_PROG_TYPE_XDP`.
pub(crate) const XDP: u32 = 6;
/// Flag of a run: what the program lets out really leaves (Linux 5.18).
pub(crate) const XDP_LIVE_FRAMES: u32 = 1 << 1;

/// The head of `union bpf_attr` for BPF_MAP_CREATE.
#[repr(C)]
struct MapAttr {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
}

/// The head of `union bpf_attr` for BPF_MAP_LOOKUP_ELEM.
#[repr(C)]
struct LookupAttr {
    map_fd: u64,
    key: u64,
    value: u64,
    flags: u64,
}

/// The head of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    /// Log, kernel version, flags and name.
    rest: [u64; 5],
}

/// The head of `union bpf_attr` for BPF_PROG_TEST_RUN.
#[repr(C)]
#[derive(Default)]
struct TestAttr {
    prog_fd: RawFd,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    padding: u32,
}

/// How a program is run.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct How<'a> {
    /// What the program gets as its context, as user space sees it; empty for that of no device.
    pub(crate) context: &'a [u8],
    /// Times; zero for once.
    pub(crate) repeat: u32,
    /// [`XDP_LIVE_FRAMES`].
    pub(crate) flags: u32,
    /// Live frames: runs between two times that frames are let out; zero for the kernel's choice.
    pub(crate) batch: u32,
}

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// What the program returned.
    pub(crate) code: u32,
    /// How long it took, in nanoseconds, reading the clock included.
    pub(crate) nanoseconds: u32,
    /// Bytes that it has left.
    pub(crate) len: usize,
}

/// Runs `program` on `frame`. What it leaves is copied to `out`, which has room for it or is empty.
pub(crate) fn run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    how: How<'_>,
    out: &mut [u8],
) -> io::Result<Run> {
    let pointer = |bytes: &[u8]| match bytes {
        [] => 0,
        bytes => bytes.as_ptr() as u64,
    };
    let mut attr = TestAttr {
        prog_fd: program.as_raw_fd(),
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_size_out: out.len() as u32,
        data_out: match out {
            [] => 0,
            out => out.as_mut_ptr() as u64,
        },
        repeat: how.repeat.max(1),
        ctx_size_in: how.context.len() as u32,
        ctx_in: pointer(how.context),
        flags: how.flags,
        batch_size: how.batch,
        ..TestAttr::default()
    };
    // SAFETY: the attribute has the layout of its command, and its pointers are to live memory of
    // the lengths beside them.
    unsafe { bpf(BPF_PROG_TEST_RUN, &raw mut attr) }?;
    Ok(Run {
        code: attr.retval,
        nanoseconds: attr.duration,
        len: attr.data_size_out as usize,
    })
}

/// Loads a program of this type.
pub(crate) fn load(kind: u32, program: &[u64]) -> io::Result<OwnedFd> {
    let mut attr = LoadAttr {
        prog_type: kind,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        ..LoadAttr::default()
    };
    // SAFETY: as in `run`.
    unsafe { make(BPF_PROG_LOAD, &raw mut attr) }
}

/// An instruction as `struct bpf_insn` has it on little-endian machines.
pub(crate) const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> u64 {
    let registers = (from as u64) << 4 | to as u64;
    code as u64 | registers << 8 | (offset as u16 as u64) << 16 | (immediate as u32 as u64) << 32
}

/// Makes an array map of so many values, of so many bytes each, all zero.
pub(crate) fn array(value_size: usize, entries: u32) -> io::Result<OwnedFd> {
    let mut attr = MapAttr {
        map_type: BPF_MAP_TYPE_ARRAY,
        key_size: size_of::<u32>() as u32,
        value_size: value_size as u32,
        max_entries: entries,
    };
    // SAFETY: the attribute has the layout of its command, and no pointers.
    unsafe { make(BPF_MAP_CREATE, &raw mut attr) }
}

/// An array map of one value of `N` words, all zero.
#[derive(Debug)]
pub(crate) struct Words<const N: usize>(OwnedFd);

impl<const N: usize> Words<N> {
    pub(crate) fn new() -> io::Result<Self> {
        array(size_of::<[u64; N]>(), 1).map(Self)
    }

    pub(crate) fn read(&self) -> io::Result<[u64; N]> {
        let (key, mut value) = (0u32, [0; N]);
        let mut attr = LookupAttr {
            map_fd: self.fd() as u64,
            key: &raw const key as u64,
            value: &raw mut value as u64,
            flags: 0,
        };
        // SAFETY: the attribute has the layout of its command, and key and value are live and as
        // long as the map has them.
        unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &raw mut attr) }?;
        Ok(value)
    }

    /// For a program's instructions.
    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// # Safety
/// As of [`bpf`]; the command makes a file descriptor.
unsafe fn make<T>(command: libc::c_long, attr: *mut T) -> io::Result<OwnedFd> {
    // SAFETY: by the caller's promise.
    let fd = unsafe { bpf(command, attr) }?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `attr` is as the command wants it.
unsafe fn bpf<T>(command: libc::c_long, attr: *mut T) -> io::Result<libc::c_int> {
    // SAFETY: by the caller's promise.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attr, size_of::<T>()) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as libc::c_int),
    }
}

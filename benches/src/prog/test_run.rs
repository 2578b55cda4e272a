//! BPF_PROG_TEST_RUN of tc programs, one packet at a time (linux/bpf.h; net/bpf/test_run.c).

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_TEST_RUN: libc::c_long = 10;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
/// Length of `struct __sk_buff`.
const SK_BUFF: usize = 192;
const IFINDEX_AT: usize = 40;

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
}

/// What a run came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// What the program returned.
    pub(super) code: u32,
    /// How long it took, in nanoseconds, reading the clock included.
    pub(super) nanoseconds: u32,
    /// Bytes that it has left.
    pub(super) len: usize,
}

/// Runs `program` once on `frame`, as if it had come in by the interface `ingress` of this
/// thread's namespace. What it leaves is copied to `out`, which has room for it or is empty.
pub(super) fn run(
    program: BorrowedFd<'_>,
    frame: &[u8],
    ingress: u32,
    out: &mut [u8],
) -> io::Result<Run> {
    let mut context = [0u8; SK_BUFF];
    context[IFINDEX_AT..IFINDEX_AT + 4].copy_from_slice(&ingress.to_ne_bytes());
    let mut attr = TestAttr {
        prog_fd: program.as_raw_fd(),
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_size_out: out.len() as u32,
        data_out: match out {
            [] => 0,
            out => out.as_mut_ptr() as u64,
        },
        repeat: 1,
        ctx_size_in: context.len() as u32,
        ctx_in: context.as_ptr() as u64,
        ..TestAttr::default()
    };
    // SAFETY: the attribute has the layout of its command, and its pointers are to live memory of
    // the lengths beside them.
    unsafe {
        bpf(
            BPF_PROG_TEST_RUN,
            (&raw mut attr).cast(),
            size_of_val(&attr),
        )
    }?;
    Ok(Run {
        code: attr.retval,
        nanoseconds: attr.duration,
        len: attr.data_size_out as usize,
    })
}

/// A program that does nothing: what a run of it takes is the price of measuring.
pub(super) fn load_empty() -> io::Result<OwnedFd> {
    // r0 = 0; exit
    const PROGRAM: [u64; 2] = [0xb7, 0x95];
    let attr = LoadAttr {
        prog_type: BPF_PROG_TYPE_SCHED_CLS,
        insn_cnt: PROGRAM.len() as u32,
        insns: PROGRAM.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        ..LoadAttr::default()
    };
    // SAFETY: as in `run`.
    let fd = unsafe { bpf(BPF_PROG_LOAD, (&raw const attr).cast(), size_of_val(&attr)) }?;
    // SAFETY: the descriptor was just made and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// # Safety
/// `attr` points to `size` bytes as the command wants them.
unsafe fn bpf(
    command: libc::c_long,
    attr: *const libc::c_void,
    size: usize,
) -> io::Result<libc::c_int> {
    // SAFETY: by the caller's promise.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attr, size) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result as libc::c_int),
    }
}

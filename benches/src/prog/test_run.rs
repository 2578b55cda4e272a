//! BPF_PROG_TEST_RUN of tc programs, one packet at a time.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use crate::bpf::{self, How, Run};

/// Length of `struct __sk_buff`.
const SK_BUFF: usize = 192;
const IFINDEX_AT: usize = 40;

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
    let how = How {
        context: &context,
        ..How::default()
    };
    bpf::run(program, frame, how, out)
}

/// A program that does nothing: what a run of it takes is the price of measuring.
pub(super) fn load_empty() -> io::Result<OwnedFd> {
    // r0 = 0; exit
    const PROGRAM: [u64; 2] = [0xb7, 0x95];
    bpf::load(bpf::SCHED_CLS, &PROGRAM)
}

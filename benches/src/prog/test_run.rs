//! BPF_PROG_TEST_RUN of tc programs, one packet at a time.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

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

/// What it takes to measure: a program that does nothing.
pub(super) struct Clock(OwnedFd);

impl Clock {
    pub(super) fn new() -> io::Result<Self> {
        // r0 = 0; exit
        const PROGRAM: [u64; 2] = [0xb7, 0x95];
        bpf::load(bpf::SCHED_CLS, &PROGRAM).map(Self)
    }

    /// Runs `program` on each of the packets, as [`run`] does. Returns the typical time of a run in
    /// nanoseconds, without that of reading the clock, which is measured in turn with it.
    pub(super) fn time(
        &self,
        program: BorrowedFd<'_>,
        packets: impl Iterator<Item = Vec<u8>>,
        ingress: u32,
    ) -> io::Result<f64> {
        let (mut nothing, mut times) = (Vec::new(), Vec::new());
        for packet in packets {
            for (program, times) in [(self.0.as_fd(), &mut nothing), (program, &mut times)] {
                times.push(run(program, &packet, ingress, &mut [])?.nanoseconds);
            }
        }
        Ok(typical(times) - typical(nothing))
    }
}

/// The mean of the middle half: as robust as a median, and finer than the clock's own steps.
fn typical(mut times: Vec<u32>) -> f64 {
    times.sort_unstable();
    let quarter = times.len() / 4;
    let middle = &times[quarter..times.len() - quarter];
    let sum: f64 = middle.iter().copied().map(f64::from).sum();
    sum / middle.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_do_not_count() {
        assert_eq!(typical(vec![1, 10, 11, 900]), 10.5);
        assert_eq!(typical(vec![7]), 7.0);
    }
}

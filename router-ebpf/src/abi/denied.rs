//! Packets that did not get through, as the programs tell user space of them.

use core::mem::{align_of, offset_of, size_of};

use super::Address;
use crate::verdict::Verdict;

/// Map of packets that were denied, no more than [`Denied::PER_SECOND`] and [`Denied::AT_ONCE`] of a CPU
/// (ring buffer of [`Denied`]).
pub const DENIED: &str = "DENIED";

/// Size of [`DENIED`] in bytes: a power of two, and pages of whatever size.
pub const DENIED_SIZE: usize = 1 << 16;

/// A packet with one of the verdicts of [`Verdict::is_denied`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Denied {
    /// When, in ns of `CLOCK_MONOTONIC`.
    pub time: u64,
    /// Bytes at the IP layer, of a super-packet all.
    pub len: u32,
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port, then destination port, big-endian; of an echo as in [`super::Tuple`], else zero.
    pub ports: [[u8; 2]; 2],
    /// IP protocol.
    pub protocol: u8,
    /// [`super::Side`] as a number: the program that has seen it.
    pub side: u8,
    /// [`Verdict`] as a number.
    pub verdict: u8,
    /// TCP flags from FIN to CWR; else zero.
    pub tcp_flags: u8,
    /// Zero.
    pub reserved: [u8; 4],
}

impl Denied {
    /// Most packets that are told each second and CPU.
    pub const PER_SECOND: u64 = 100;
    /// Most packets of a CPU that are told at once.
    pub const AT_ONCE: u64 = 50;
}

layout! {
    Denied: 64, align 8 {
        time: 0, len: 8, source: 12, destination: 32, ports: 52, protocol: 56, side: 57, verdict: 58,
        tcp_flags: 59, reserved: 60
    }
}

const _: () = assert!(Verdict::ALL.len() <= u8::MAX as usize);

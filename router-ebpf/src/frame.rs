//! The bytes of a packet, as the packet logic reads and changes them.

use crate::csum::{Delta, fold};
use crate::verdict::Verdict;

/// Bytes of a packet; aligned, so that programs can take them word by word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes<const N: usize>(pub [u8; N]);

/// Whether a write leaves the sum over the packet as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sum {
    /// The same rewrite mends a checksum inside the packet, so the sum over all stays.
    Kept,
    /// No checksum inside the packet covers the bytes.
    Changed,
}

/// What of a changed word a transport checksum covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Covers {
    /// The transport header and what is behind it. A checksum that is left to the hardware stays.
    Payload,
    /// The pseudo-header: it is in the checksum also while that is left to the hardware.
    Pseudo,
    /// As [`Covers::Payload`], of UDP: zero means "no checksum" and stays, and is never made.
    UdpPayload,
    /// As [`Covers::Pseudo`], of UDP.
    UdpPseudo,
}

/// A packet in place; offsets count from its IP header. The only way to its bytes.
pub trait Frame {
    /// Bytes from the IP header to the end, link-layer padding included.
    fn len(&self) -> u32;

    /// Whether there is nothing behind the link-layer header.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Payload bytes of each segment of a super-packet; zero for a plain packet.
    fn gso_size(&self) -> u32;

    /// Fills `to` with the bytes at `AT`; `false` if the packet does not have them. For headers, whose
    /// place is known to the compiler and to the verifier: the cheap way. No `Option`: of one that is none,
    /// LLVM may read the bytes all the same where it does not look at them, and the verifier refuses that.
    fn header<const AT: usize, const N: usize>(&self, to: &mut [u8; N]) -> bool;

    /// `N` bytes at any place, if the packet has them.
    fn read<const N: usize>(&self, at: u32) -> Option<Bytes<N>>;

    /// Fills the first `len` bytes of `to` with those at `at`; `false` if the packet does not have
    /// them, or if `len` is zero or more than `N`.
    fn read_into<const N: usize>(&self, at: u32, len: u32, to: &mut Bytes<N>) -> bool;

    /// Overwrites bytes that [`Frame::header`] has seen. Where a sum over the packet changes by it,
    /// [`Frame::change_sum`] must be told.
    fn write_header<const AT: usize, const N: usize>(
        &mut self,
        bytes: &Bytes<N>,
    ) -> Result<(), Verdict>;

    /// Overwrites bytes that [`Frame::read`] has seen.
    fn write<const N: usize>(&mut self, at: u32, bytes: &Bytes<N>, sum: Sum)
    -> Result<(), Verdict>;

    /// Accounts in the transport checksum at `at` for what changes under it.
    fn replace_checksum(&mut self, at: u32, delta: Delta, covers: Covers) -> Result<(), Verdict>;

    /// Accounts in the sum over the packet, if a device has told one, for what [`Frame::write_header`] has
    /// changed at even places.
    fn change_sum(&mut self, delta: Delta);

    /// The one's complement sum over the first `len` bytes, at most [`MAX_SUM`] and whole words; `None` if
    /// they are not there.
    fn sum(&self, len: u32) -> Option<u16>;

    /// Cuts the packet to `len` bytes; a super-packet becomes a plain one.
    fn trim(&mut self, len: u32) -> Result<(), Verdict>;

    /// Puts an Ethernet header in front of a packet that has none.
    fn push_ethernet(&mut self, header: &Bytes<14>) -> Result<(), Verdict>;

    /// Puts headers in front of the IP header: offsets count from the first of them then.
    fn insert<const N: usize>(&mut self, headers: &Bytes<N>) -> Result<(), Verdict>;

    /// Takes the eight bytes behind the IPv6 header out, as long as a jumbo payload option is; segments
    /// keep their size.
    fn cut_jumbo_header(&mut self) -> Result<(), Verdict>;

    /// Swaps source and destination of the Ethernet header, if there is one.
    fn swap_ethernet(&mut self) -> Result<(), Verdict>;
}

/// Most bytes that [`Frame::sum`] is asked for: what an ICMPv6 error quotes.
pub const MAX_SUM: u32 = 1280 - 48;
/// Bytes that are summed up at a time, and how often that may be.
const CHUNK: u32 = 32;
const CHUNKS: u32 = MAX_SUM.div_ceil(CHUNK);

/// [`Frame::sum`] by [`Frame::read`].
#[inline(always)]
pub fn sum<F: Frame>(frame: &F, len: u32) -> Option<u16> {
    let mut sum = 0_u64;
    let mut at = 0;
    let mut chunk = 0;
    while chunk < CHUNKS {
        if at + CHUNK > len {
            break;
        }
        let Bytes(bytes) = frame.read::<{ CHUNK as usize }>(at)?;
        let (words, _) = bytes.as_chunks::<4>();
        for word in words {
            sum += u64::from(u32::from_ne_bytes(*word));
        }
        at += CHUNK;
        chunk += 1;
    }
    let mut word = 0;
    while word < CHUNK / 4 {
        if at + 4 > len {
            break;
        }
        let Bytes(bytes) = frame.read::<4>(at)?;
        sum += u64::from(u32::from_ne_bytes(bytes));
        at += 4;
        word += 1;
    }
    // A few hundred words of 32 bits: two carries at most.
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    Some(fold(sum as u32))
}

//! Settled flows: the entries of flows that have been in use for a moment, each in one place with its
//! key, so that a packet waits for memory once, where the flow table's hash has it wait for bucket,
//! key and value one after the other.
//!
//! User space alone moves entries in and out, and every settled entry has its key in the flow table
//! as well: that keeps tuples from other flows, counts for the table's size, and serves whatever
//! finds no slot here. But what changes of an entry changes in the slot.

use core::mem::{align_of, offset_of, size_of};

use super::{Address, Flow, Key4, Key6, Side, Tuple};

/// Map of the settled IPv4 entries (array of arrays of [`Slot4`], made when they are needed).
pub const SETTLED4: &str = "SETTLED4";
/// Map of the settled IPv6 entries (array of arrays of [`Slot6`], made when they are needed).
pub const SETTLED6: &str = "SETTLED6";
/// Number of the arrays in [`SETTLED4`] (`u32`, of the programs' constants).
pub const BLOCKS4: &str = "BLOCKS4";
/// The same of [`SETTLED6`].
pub const BLOCKS6: &str = "BLOCKS6";
/// Bytes of the slots of such an array. With what the kernel has in front it takes no more than 32 KiB: up to
/// there its memory is of the kernel's direct map, whose large pages the TLB holds (`bpf_map_area_alloc` in
/// kernel/bpf/syscall.c). One array for all would be of small pages, and finding them is as dear as the entry.
pub const BLOCK: usize = 31 << 10;
/// Slots where an entry may be, one behind the other.
pub const PROBES: u32 = 4;

/// In place of a key's last word: the slot is empty, and no key has its slot behind it.
pub const EMPTY: u64 = 0;
/// In place of a key's last word: the slot is nobody's, but a key may have its slot behind it.
pub const VACANT: u64 = 1;

/// A slot of [`SETTLED4`]: as large as a cache line.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot4 {
    /// The beginning of a [`Flow`]. Before the key: the verifier sees programs read all of a `Flow`, for
    /// it cannot know that none does of an IPv4 flow.
    pub flow: [u64; Flow::V4_LEN / 8],
    /// [`Key4`] as words; the last one may be [`EMPTY`] or [`VACANT`] instead.
    pub key: [u64; size_of::<Key4>() / 8],
}

/// A slot of [`SETTLED6`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot6 {
    /// A [`Flow`].
    pub flow: [u64; size_of::<Flow>() / 8],
    /// [`Key6`] as words; the last one may be [`EMPTY`] or [`VACANT`] instead.
    pub key: [u64; size_of::<Key6>() / 8],
}

/// Where the entry of a key may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seats {
    /// The array.
    pub block: u32,
    /// The first of [`PROBES`] slots in it.
    pub first: u32,
}

impl Seats {
    /// Those of the key with these words, in so many arrays of `IN_BLOCK` slots. The hash has no secret: who
    /// makes keys for one place finds no slot for most of them, no more.
    #[inline(always)]
    pub fn of<const IN_BLOCK: usize>(key: &[u64], blocks: u32) -> Self {
        let mut hash = 0_u64;
        let mut word = 0;
        while word < key.len() {
            // The golden ratio, odd.
            hash = (hash ^ key[word]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            hash ^= hash >> 32;
            word += 1;
        }
        let firsts = (IN_BLOCK as u64) - PROBES as u64 + 1;
        Self {
            block: (((hash & 0xffff_ffff) * blocks as u64) >> 32) as u32,
            first: (((hash >> 48) * firsts) >> 16) as u32,
        }
    }
}

impl Slot4 {
    /// Slots in an array.
    pub const IN_BLOCK: usize = BLOCK / size_of::<Self>();
}

impl Slot6 {
    /// Slots in an array.
    pub const IN_BLOCK: usize = BLOCK / size_of::<Self>();
}

impl Key4 {
    /// [`Key4::new`] as [`Slot4::key`] has it.
    #[inline(always)]
    pub fn words(side: Side, tuple: &Tuple) -> [u64; size_of::<Self>() / 8] {
        // SAFETY: both are aligned, as asserted below.
        let ([source], [destination]) =
            unsafe { (octets(&tuple.source), octets(&tuple.destination)) };
        [pair(source, destination), end(side, tuple)]
    }
}

impl Key6 {
    /// [`Key6::new`] as [`Slot6::key`] has it.
    #[inline(always)]
    pub fn words(side: Side, tuple: &Tuple) -> [u64; size_of::<Self>() / 8] {
        // SAFETY: as for `Key4`.
        let (s, d) = unsafe { (octets::<4>(&tuple.source), octets::<4>(&tuple.destination)) };
        [
            pair(s[0], s[1]),
            pair(s[2], s[3]),
            pair(d[0], d[1]),
            pair(d[2], d[3]),
            end(side, tuple),
        ]
    }
}

const _: () = assert!((offset_of!(Tuple, source) + offset_of!(Address, octets)).is_multiple_of(4));
const _: () =
    assert!((offset_of!(Tuple, destination) + offset_of!(Address, octets)).is_multiple_of(4));

/// The first words of an address.
///
/// # Safety
///
/// The octets are aligned to four bytes.
#[inline(always)]
unsafe fn octets<const WORDS: usize>(address: &Address) -> [u32; WORDS] {
    const { assert!(WORDS <= 4) };
    // SAFETY: by the caller's promise, and of bytes. Volatile, or LLVM makes of it loads of single bytes.
    unsafe {
        (&raw const address.octets)
            .cast::<[u32; WORDS]>()
            .read_volatile()
    }
}

/// The last word of a key.
#[inline(always)]
fn end(side: Side, tuple: &Tuple) -> u64 {
    // SAFETY: aligned and of bytes; volatile as in `octets`.
    let ports = unsafe { (&raw const tuple.ports).cast::<u32>().read_volatile() };
    pair(
        ports,
        u32::from_ne_bytes([tuple.protocol, side as u8, 0, 0]),
    )
}

/// Eight bytes of memory as a word, of two halves.
#[inline(always)]
const fn pair(first: u32, second: u32) -> u64 {
    let (first, second) = (first as u64, second as u64);
    if cfg!(target_endian = "little") {
        first | second << 32
    } else {
        first << 32 | second
    }
}

layout! {
    Slot4: 64, align 8 { flow: 0, key: 48 }
    Slot6: 96, align 8 { flow: 0, key: 56 }
}
const _: () = assert!(offset_of!(Flow, address) + size_of::<[u8; 4]>() <= Flow::V4_LEN);
const _: () = assert!(size_of::<Flow>() <= size_of::<Slot4>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_spread_evenly() {
        const BLOCKS: u32 = 3;
        const FLOWS: u16 = 30_000;
        // As they come: few peers, services and networks, ports one after the other.
        let tuple = |n: u16| Tuple {
            source: Address::v4([100, 64, 0, (n % 5) as u8]),
            destination: Address::v4([10, 0, (n % 7) as u8, 1]),
            ports: [(1024 + n).to_be_bytes(), [0, 53]],
            protocol: 17,
        };
        for side in Side::ALL {
            let mut slots4 = [[0_u32; Slot4::IN_BLOCK]; BLOCKS as usize];
            let mut slots6 = [[0_u32; Slot6::IN_BLOCK]; BLOCKS as usize];
            for n in 0..FLOWS {
                let tuple = tuple(n);
                let four = Seats::of::<{ Slot4::IN_BLOCK }>(&Key4::words(side, &tuple), BLOCKS);
                let six = Seats::of::<{ Slot6::IN_BLOCK }>(&Key6::words(side, &tuple), BLOCKS);
                for probe in 0..PROBES {
                    slots4[four.block as usize][(four.first + probe) as usize] += 1;
                    slots6[six.block as usize][(six.first + probe) as usize] += 1;
                }
            }
            let even = |slots: &[u32]| {
                let each = u32::from(FLOWS) * PROBES / BLOCKS / slots.len() as u32;
                // Fewer begin at a place so that they end at the last slot.
                let inner = &slots[PROBES as usize..slots.len() - PROBES as usize];
                let (least, most) = (inner.iter().min(), inner.iter().max());
                assert!(
                    least > Some(&(each / 2)) && most < Some(&(each * 2)),
                    "{least:?} {most:?}"
                );
                assert!(slots.iter().all(|n| *n > 0));
            };
            slots4.iter().for_each(|slots| even(slots));
            slots6.iter().for_each(|slots| even(slots));
        }
    }

    #[test]
    fn no_key_looks_like_a_free_slot() {
        let tuple = Tuple {
            source: Address::v4([0; 4]),
            destination: Address::v4([0; 4]),
            ports: [[0; 2]; 2],
            protocol: 1,
        };
        for side in Side::ALL {
            let last = [Key4::words(side, &tuple)[1], Key6::words(side, &tuple)[4]];
            assert!(last.iter().all(|last| ![EMPTY, VACANT].contains(last)));
        }
    }

    #[test]
    fn words_are_the_bytes_of_a_key() {
        let tuple = Tuple {
            source: Address::v6(core::array::from_fn(|n| n as u8)),
            destination: Address::v6(core::array::from_fn(|n| 0x40 + n as u8)),
            ports: [[0x80, 0x81], [0x82, 0x83]],
            protocol: 17,
        };
        for side in Side::ALL {
            // SAFETY: keys are as long as their words, and made of integers.
            let (v4, v6) = unsafe {
                (
                    core::mem::transmute::<Key4, [u64; 2]>(Key4::new(side, &tuple)),
                    core::mem::transmute::<Key6, [u64; 5]>(Key6::new(side, &tuple)),
                )
            };
            assert_eq!(Key4::words(side, &tuple), v4);
            assert_eq!(Key6::words(side, &tuple), v6);
        }
    }
}

//! The flow table.

use core::hint::black_box;

use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, BPF_NOEXIST};
use aya_ebpf::btf_maps::{Array, ArrayOfMaps, HashMap};
use aya_ebpf::macros::btf_map;
use router_ebpf::abi::{
    DEFAULT_ENTRIES, EMPTY, Flow, Key4, Key6, PROBES, Seats, Side, Slot4, Slot6, Tuple,
};
use router_ebpf::tables::Refused;

/// `EEXIST` as the kernel returns it.
const EEXIST: i32 = -17;

/// Memory for flows is taken when they come.
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;
#[btf_map]
static FLOWS4: HashMap<Key4, Flow, DEFAULT_ENTRIES, ON_DEMAND> = HashMap::new();
#[btf_map]
static FLOWS6: HashMap<Key6, Flow, DEFAULT_ENTRIES, ON_DEMAND> = HashMap::new();

/// A slot for BTF, which tells nothing of what user space makes. Of a structure Linux 5.15 to 6.1 would
/// remember that there is no timer in it, and refuse arrays of which it does not know that.
type Words4 = [u64; size_of::<Slot4>() / 8];
type Words6 = [u64; size_of::<Slot6>() / 8];
#[btf_map]
static SETTLED4: ArrayOfMaps<Array<Words4, { Slot4::IN_BLOCK }>, 1> = ArrayOfMaps::new();
#[btf_map]
static SETTLED6: ArrayOfMaps<Array<Words6, { Slot6::IN_BLOCK }>, 1> = ArrayOfMaps::new();
/// How many arrays of slots there may be; user space says it before it loads the programs.
#[unsafe(no_mangle)]
static BLOCKS4: u32 = 1;
#[unsafe(no_mangle)]
static BLOCKS6: u32 = 1;

// A function for each: of two calls of one helper LLVM makes one, and the kernel calls what it does
// not know the map of indirectly.
macro_rules! find_entry {
    ($name:ident, $key:ident, $slot:ident, $settled:ident, $blocks:ident, $flows:ident) => {
        #[inline(never)]
        fn $name(side: Side, tuple: &Tuple) -> Option<*mut Flow> {
            let words = $key::words(side, tuple);
            let last = words.len() - 1;
            // SAFETY: the constant lies there. Volatile, for the compiler takes it for one.
            let blocks = unsafe { (&raw const $blocks).read_volatile() };
            let seats = Seats::of::<{ $slot::IN_BLOCK }>(&words, blocks);
            if let Some(block) = $settled.get(seats.block) {
                let mut probe = 0;
                while probe < PROBES {
                    let Some(slot) = block.get_ptr_mut(seats.first + probe) else {
                        break;
                    };
                    let slot = slot.cast::<$slot>();
                    // SAFETY: the slot stays. Volatile, for user space writes to it meanwhile: the key
                    // when the entry is there, and another one only when no program is left that may
                    // have found this one.
                    let found = unsafe { (&raw const (*slot).key).read_volatile() };
                    let difference = difference(&found, &words);
                    if difference == 0 {
                        // SAFETY: what is added is zero.
                        let flow = unsafe { (&raw mut (*slot).flow).byte_add(after(difference)) };
                        return Some(flow.cast());
                    }
                    if found[last] == EMPTY {
                        break;
                    }
                    probe += 1;
                }
            }
            // SAFETY: words as aligned and as long, with the bytes of the key.
            $flows.get_ptr_mut(unsafe { &*words.as_ptr().cast::<$key>() })
        }
    };
}
find_entry!(flow4, Key4, Slot4, SETTLED4, BLOCKS4, FLOWS4);
find_entry!(flow6, Key6, Slot6, SETTLED6, BLOCKS6, FLOWS6);

/// Zero if the words are the same.
#[inline(always)]
fn difference<const N: usize>(one: &[u64; N], other: &[u64; N]) -> u64 {
    let mut difference = 0;
    let mut word = 0;
    while word < N {
        difference |= one[word] ^ other[word];
        word += 1;
    }
    difference
}

/// Zero, by a way that begins at `zero`: a processor with weak ordering must not read an entry before
/// the key beside it, and what keeps it from that is an address that hangs on the key.
#[inline(always)]
fn after(zero: u64) -> usize {
    (black_box(zero) & black_box(0)) as usize
}

/// The entry for packets with `tuple` in the program of `side`.
#[inline(always)]
pub(super) fn find(side: Side, tuple: &Tuple) -> Option<*mut Flow> {
    if tuple.source.is_v4() {
        flow4(side, tuple)
    } else {
        flow6(side, tuple)
    }
}

/// Adds an entry. Where there is a settled one, there is one in the table. A function of its own, for its key
/// would lie on the stack below those that [`super::lookups::claim`] calls: Linux 5.10 adds them up.
#[inline(never)]
pub(super) fn insert(side: Side, tuple: &Tuple, flow: &Flow) -> Result<(), Refused> {
    let added = if tuple.source.is_v4() {
        FLOWS4.insert(Key4::new(side, tuple), flow, BPF_NOEXIST.into())
    } else {
        FLOWS6.insert(Key6::new(side, tuple), flow, BPF_NOEXIST.into())
    };
    added.map_err(|errno| {
        if errno == EEXIST {
            Refused::Exists
        } else {
            Refused::Full
        }
    })
}

/// Removes an entry that was just added, and so has not settled.
#[inline(always)]
pub(super) fn remove(side: Side, tuple: &Tuple) {
    // That it is gone already is as good.
    let _ = if tuple.source.is_v4() {
        FLOWS4.remove(Key4::new(side, tuple))
    } else {
        FLOWS6.remove(Key6::new(side, tuple))
    };
}

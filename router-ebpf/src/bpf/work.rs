//! What a CPU works on, and the form of the functions that share the work.

use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_ns};
use aya_ebpf::macros::btf_map;
use router_ebpf::abi::{Flow, Side, Tuple};
use router_ebpf::flow::Draft;
use router_ebpf::forward::Forward;
use router_ebpf::mss;
use router_ebpf::packet::Packet;
use router_ebpf::verdict::Verdict;

/// The packet that this CPU works on, and what was decided about it.
#[repr(C)]
pub(crate) struct Work {
    pub(crate) packet: Packet,
    pub(crate) forward: Forward,
    pub(crate) draft: Draft,
    /// The tuple, and its entry, that [`super::lookups`] are asked about.
    pub(super) tuple: Tuple,
    pub(super) entry: Flow,
    /// What [`mss::clamp`] looks through.
    pub(super) options: mss::Options,
    /// What the kernel's routing answered last, as a `struct bpf_redir_neigh`: family and address of the
    /// neighbour that packets go to; the family is zero while nothing was asked about this packet.
    pub(crate) next_hop: [u32; 5],
    /// The tick of the kernel at which this CPU last read the clock, and the time then in ns.
    clock: [u64; 2],
}

/// [`Work`], as bytes: the types in it are none that user space or BTF should know.
type Bytes = [u64; size_of::<Work>().div_ceil(8)];

#[btf_map]
static WORK: PerCpuArray<Bytes, 1> = PerCpuArray::new();

/// The place of this CPU's work. No other program of ours runs on this CPU before this one ends.
#[inline(always)]
pub(crate) fn work() -> Option<*mut Work> {
    WORK.get_ptr_mut(0).map(|bytes| bytes.cast())
}

/// A result as a number: zero is success.
#[inline(always)]
pub(super) fn number(result: Result<(), Verdict>) -> u32 {
    match result {
        Ok(()) => 0,
        Err(verdict) => verdict as u32 + 1,
    }
}

/// What [`number`] has made of a result.
#[inline(always)]
pub(super) fn result(number: u32) -> Result<(), Verdict> {
    if number == 0 {
        return Ok(());
    }
    if number > Verdict::ALL.len() as u32 {
        return Err(Verdict::DropInternal);
    }
    // SAFETY: the verdicts are numbered from zero without a gap, as `verdict`'s tests assert.
    Err(unsafe { core::mem::transmute::<u32, Verdict>(number - 1) })
}

#[inline(always)]
pub(super) fn side(number: u32) -> Side {
    if number == Side::Overlay as u32 {
        Side::Overlay
    } else {
        Side::Subnet
    }
}

/// Global functions of the object: the verifier judges each once and by itself, not for every way that
/// leads to it. Such functions take the context and numbers only (Linux 5.10), so the packet lies in
/// a map, which also keeps it off the stack.
macro_rules! global {
    ($($(#[$attribute:meta])* $symbol:ident ($ctx:ident, $work:ident $(, $argument:ident)*) $body:block)*) => {
        $(
            $(#[$attribute])*
            ///
            /// # Safety
            ///
            /// `skb` is the context that the program was called with, and the work of this CPU is
            /// filled as far as the step needs it.
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) unsafe extern "C" fn $symbol(skb: *mut aya_ebpf::bindings::__sk_buff $(, $argument: u32)*) -> u32 {
                // For an argument that a step does not use, LLVM would pass anything, and the
                // verifier wants what the signature says.
                let skb = core::hint::black_box(skb);
                $(let $argument = core::hint::black_box($argument);)*
                let $ctx = &aya_ebpf::programs::TcContext::new(skb);
                let Some($work) = $crate::bpf::work::work() else {
                    return $crate::bpf::work::number(Err(router_ebpf::verdict::Verdict::DropInternal));
                };
                // SAFETY: the place is valid and this program's alone, and the program has filled it.
                let $work = unsafe { &mut *$work };
                $body
            }
        )*
    };
}
pub(super) use global;

/// [`router_ebpf::tables::Tables::now`]: to read the clock takes longer than to ask for the tick, which the
/// kernel makes one load of.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helpers take nothing, and the place is valid and this program's alone.
    unsafe {
        let Some(work) = work() else {
            return bpf_ktime_get_ns();
        };
        let clock = &raw mut (*work).clock;
        let tick = bpf_jiffies64();
        if (*clock)[0] != tick {
            *clock = [tick, bpf_ktime_get_ns()];
        }
        (*clock)[1]
    }
}

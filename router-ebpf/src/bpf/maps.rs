//! The maps but for the flow table, and what is counted in them.

use core::mem::size_of;

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::macros::btf_map;
use router_ebpf::abi::{
    Account, Address, Budget, Counter, DENIED_SIZE, Denied, Fragment, FragmentKey, Link,
    MAX_COUNTERS, MAX_FRAGMENTS, MAX_LINKS, MAX_MASQUERADE, MAX_OVERLAY, MAX_ROUTES, MAX_SOURCES,
    Overlay, Prefix, Route, Settings, Side, Way,
};
use router_ebpf::packet::Packet;
use router_ebpf::policy::{self, MAX_HITS, MAX_PREFIXES, MAX_SETS, Set};
use router_ebpf::verdict::Verdict;

/// Answers at once, and one more each interval, in ns: on each CPU.
const ANSWER_INTERVAL: u64 = 1_000_000;
const ANSWERS_AT_ONCE: u64 = 50;
/// The same of denied packets.
const DENIED_INTERVAL: u64 = 1_000_000_000 / Denied::PER_SECOND;

#[btf_map]
pub(super) static SETTINGS: Array<Settings, 1> = Array::new();
#[btf_map]
pub(super) static OVERLAY: LpmTrie<Address, Overlay, MAX_OVERLAY> = LpmTrie::new();
#[btf_map]
pub(super) static ROUTES: LpmTrie<Address, Route, MAX_ROUTES> = LpmTrie::new();
#[btf_map]
pub(super) static LINKS: HashMap<u32, Link, MAX_LINKS> = HashMap::new();
/// Octets of addresses as words.
#[btf_map]
pub(super) static MASQUERADE: LpmTrie<Way, [u32; 4], MAX_MASQUERADE> = LpmTrie::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counter, MAX_COUNTERS> = PerCpuArray::new();
#[btf_map]
pub(super) static POLICY: LpmTrie<Address, u32, MAX_PREFIXES> = LpmTrie::new();
#[btf_map]
pub(super) static POLICY_SETS: HashMap<u32, Set, MAX_SETS, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();
#[btf_map]
static POLICY_HITS: PerCpuArray<u64, MAX_HITS> = PerCpuArray::new();

#[btf_map]
pub(super) static SOURCES: HashMap<Account, u32, MAX_SOURCES, { BPF_F_NO_PREALLOC as usize }> =
    HashMap::new();
#[btf_map]
pub(super) static FRAGMENTS: LruHashMap<FragmentKey, Fragment, MAX_FRAGMENTS> = LruHashMap::new();
#[btf_map]
static BUDGETS: PerCpuArray<u64, { Budget::COUNT }> = PerCpuArray::new();
#[btf_map]
static DENIED: RingBuf<Denied, DENIED_SIZE> = RingBuf::new();

/// Counts one packet of `bytes` bytes at the IP layer.
#[inline(always)]
pub(crate) fn count(side: Side, verdict: Verdict, bytes: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(side.counter(verdict)) {
        // SAFETY: the slot is this CPU's alone, and ingress programs do not interrupt each other.
        unsafe {
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
}

/// Counts one new flow that a clause of the policy in `bank` lets through.
#[inline(always)]
pub(crate) fn count_hit(bank: u32, clause: u32) {
    if let Some(hits) = POLICY_HITS.get_ptr_mut(policy::hit(bank, clause)) {
        // SAFETY: as in `count`.
        unsafe { *hits += 1 };
    }
}

/// Whether this CPU may send one more, of which there may be some at once, and one each interval; and
/// counts it.
#[inline(always)]
fn take(budget: Budget, interval: u64, at_once: u64, now: u64) -> bool {
    let Some(used_up) = BUDGETS.get_ptr_mut(budget as u32) else {
        return false;
    };
    // SAFETY: as in `count`.
    unsafe {
        let next = (*used_up).max(now) + interval;
        if next > now + at_once * interval {
            return false;
        }
        *used_up = next;
    }
    true
}

/// Whether one more answer may be sent `now`, and counts it.
#[inline(always)]
pub(crate) fn may_answer(now: u64) -> bool {
    take(Budget::Answers, ANSWER_INTERVAL, ANSWERS_AT_ONCE, now)
}

/// Tells user space of a denied packet, unless there are too many.
#[inline(always)]
pub(crate) fn tell_denied(side: Side, verdict: u32, packet: &Packet, now: u64) {
    if take(Budget::Denied, DENIED_INTERVAL, Denied::AT_ONCE, now) {
        let denied = packet.denied(side, verdict as u8, now);
        // What does not fit is in the counters all the same.
        let _ = DENIED.output(denied, 0);
    }
}

/// aya's name for the same bytes.
#[inline(always)]
pub(super) fn key(prefix: &Prefix) -> &Key<Address> {
    const _: () = assert!(size_of::<Prefix>() == size_of::<Key<Address>>());
    // SAFETY: both are a `u32` and then 20 bytes, and `Key` needs no alignment.
    unsafe { &*core::ptr::from_ref(prefix).cast() }
}

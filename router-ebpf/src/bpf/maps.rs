//! The maps, and the kernel's routing, as [`Tables`].

use core::mem::size_of;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_F_NO_PREALLOC, bpf_fib_lookup};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray};
use aya_ebpf::helpers;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::TcContext;
use router_ebpf::abi::{
    Address, Counter, DEFAULT_ENTRIES, Flow, Fragment, FragmentKey, Key4, Key6, Link, MAX_COUNTERS,
    MAX_FRAGMENTS, MAX_LINKS, MAX_OVERLAY, MAX_ROUTES, MAX_SOURCES, Overlay, Prefix, Route,
    Settings, Side,
};
use router_ebpf::decide::{Hop, Tables, fib_failure};
use router_ebpf::packet::Packet;
use router_ebpf::policy::{self, MAX_HITS, MAX_PREFIXES, MAX_SETS, Rules, Set};
use router_ebpf::verdict::Verdict;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const FIB_SUCCESS: i64 = 0;
const FIB_NO_NEIGHBOUR: i64 = 7;

#[btf_map]
static SETTINGS: Array<Settings, 1> = Array::new();
#[btf_map]
static OVERLAY: LpmTrie<Address, Overlay, MAX_OVERLAY> = LpmTrie::new();
#[btf_map]
static ROUTES: LpmTrie<Address, Route, MAX_ROUTES> = LpmTrie::new();
#[btf_map]
static LINKS: HashMap<u32, Link, MAX_LINKS> = HashMap::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counter, MAX_COUNTERS> = PerCpuArray::new();
#[btf_map]
static POLICY: LpmTrie<Address, u32, MAX_PREFIXES> = LpmTrie::new();
#[btf_map]
static POLICY_SETS: HashMap<u32, Set, MAX_SETS, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();
#[btf_map]
static POLICY_HITS: PerCpuArray<u64, MAX_HITS> = PerCpuArray::new();

/// Memory for flows is taken when they come.
const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;
#[btf_map]
static FLOWS4: HashMap<Key4, Flow, DEFAULT_ENTRIES, ON_DEMAND> = HashMap::new();
#[btf_map]
static FLOWS6: HashMap<Key6, Flow, DEFAULT_ENTRIES, ON_DEMAND> = HashMap::new();
#[btf_map]
static SOURCES: HashMap<Address, u32, MAX_SOURCES, ON_DEMAND> = HashMap::new();
#[btf_map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment, MAX_FRAGMENTS> = LruHashMap::new();
#[btf_map]
static ERRORS: PerCpuArray<u64, 1> = PerCpuArray::new();

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

/// The tables as one packet sees them.
pub(crate) struct Maps<'a> {
    ctx: &'a TcContext,
}

impl<'a> Maps<'a> {
    #[inline(always)]
    pub(crate) fn new(ctx: &'a TcContext) -> Self {
        Self { ctx }
    }
}

impl Tables for Maps<'_> {
    #[inline(always)]
    fn settings(&self) -> Settings {
        SETTINGS.get(0).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // SAFETY: the kernel passes a valid context, and the field is readable in tc programs.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    #[inline(always)]
    fn in_overlay(&self, address: &Prefix) -> bool {
        OVERLAY.get(key(address)).is_some()
    }

    #[inline(always)]
    fn route(&self, address: &Prefix) -> Option<Route> {
        ROUTES.get(key(address)).copied()
    }

    #[inline(always)]
    fn link_mtu(&self, index: u32) -> Option<u32> {
        // SAFETY: user space replaces whole values; a reader sees the old or the new word.
        unsafe { LINKS.get(index) }.map(|link| link.mtu)
    }

    #[inline(always)]
    fn next_hop(&self, packet: &Packet, settings: &Settings) -> Result<Hop, Verdict> {
        let mut query = query(packet, self.ingress())?;
        // SAFETY: the query is a whole `bpf_fib_lookup` of the size given.
        let code = unsafe {
            helpers::bpf_fib_lookup(
                self.ctx.as_ptr(),
                &raw mut query,
                size_of::<bpf_fib_lookup>() as i32,
                0,
            )
        };
        // The TUN device has no neighbours.
        if code != FIB_SUCCESS && (code != FIB_NO_NEIGHBOUR || query.ifindex != settings.tun) {
            return Err(fib_failure(code));
        }
        // Without a neighbour the kernel leaves the packet's length in place of the MTU.
        let mtu = if code == FIB_SUCCESS && settings.flags & Settings::FIB_MTU != 0 {
            // SAFETY: every bit pattern is a valid `u16`.
            u32::from(unsafe { query.__bindgen_anon_1.mtu_result })
        } else {
            u32::MAX
        };
        let mut hardware = [0; 12];
        hardware[..6].copy_from_slice(&query.dmac);
        hardware[6..].copy_from_slice(&query.smac);
        Ok(Hop {
            link: query.ifindex,
            mtu,
            hardware,
        })
    }
}

impl Rules for Maps<'_> {
    #[inline(always)]
    fn set(&self, key: &Prefix) -> Option<&Set> {
        let number = POLICY.get(self::key(key))?;
        // SAFETY: user space never changes a set that a program may find: it fills those of the
        // other bank, and removes them when no program uses that bank any more.
        unsafe { POLICY_SETS.get(*number) }
    }
}

/// aya's name for the same bytes.
#[inline(always)]
fn key(prefix: &Prefix) -> &Key<Address> {
    const _: () = assert!(size_of::<Prefix>() == size_of::<Key<Address>>());
    // SAFETY: both are a `u32` and then 20 bytes, and `Key` needs no alignment.
    unsafe { &*core::ptr::from_ref(prefix).cast() }
}

#[inline(always)]
fn query(packet: &Packet, ingress: u32) -> Result<bpf_fib_lookup, Verdict> {
    // SAFETY: the type holds integers only, for which zero is valid.
    let mut query: bpf_fib_lookup = unsafe { core::mem::zeroed() };
    let Ok(segment_len) = u16::try_from(packet.segment_len()) else {
        return Err(Verdict::SlowMtu);
    };
    let [source_port, destination_port] = packet.ports;
    query.l4_protocol = packet.protocol;
    query.sport = u16::from_ne_bytes(source_port);
    query.dport = u16::from_ne_bytes(destination_port);
    query.__bindgen_anon_1.tot_len = segment_len;
    query.ifindex = ingress;
    if packet.source.address.is_v4() {
        query.family = AF_INET;
        query.__bindgen_anon_2.tos = packet.first_word[1];
        query.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(packet.source.address.v4_octets());
        query.__bindgen_anon_4.ipv4_dst =
            u32::from_ne_bytes(packet.destination.address.v4_octets());
    } else {
        query.family = AF_INET6;
        let [version, a, b, c] = packet.first_word;
        query.__bindgen_anon_2.flowinfo = u32::from_ne_bytes([version & 0x0f, a, b, c]);
        query.__bindgen_anon_3.ipv6_src = words(&packet.source.address);
        query.__bindgen_anon_4.ipv6_dst = words(&packet.destination.address);
    }
    Ok(query)
}

#[inline(always)]
fn words(address: &Address) -> [u32; 4] {
    let o = &address.octets;
    [
        u32::from_ne_bytes([o[0], o[1], o[2], o[3]]),
        u32::from_ne_bytes([o[4], o[5], o[6], o[7]]),
        u32::from_ne_bytes([o[8], o[9], o[10], o[11]]),
        u32::from_ne_bytes([o[12], o[13], o[14], o[15]]),
    ]
}

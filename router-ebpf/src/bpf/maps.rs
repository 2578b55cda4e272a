//! The maps, and the kernel's routing, as [`Tables`].

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_ANY, BPF_F_NO_PREALLOC, BPF_NOEXIST, bpf_fib_lookup, bpf_sock_tuple,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use aya_ebpf::helpers;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::TcContext;
use router_ebpf::abi::{
    Account, Address, Budget, Counter, DENIED_SIZE, Denied, Flow, Fragment, FragmentKey, Link,
    MAX_COUNTERS, MAX_FRAGMENTS, MAX_LINKS, MAX_MASQUERADE, MAX_OVERLAY, MAX_ROUTES, MAX_SOURCES,
    Overlay, Prefix, Route, Settings, Side, Tuple, Way, WayPrefix,
};
use router_ebpf::decide::{Hop, Refused, Tables, fib_failure};
use router_ebpf::flow::Entry;
use router_ebpf::packet::{Frame, Packet, TCP, UDP};
use router_ebpf::policy::{self, MAX_HITS, MAX_PREFIXES, MAX_SETS, Rules, Set};
use router_ebpf::verdict::Verdict;

use super::{flows, steps};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const FIB_SUCCESS: i64 = 0;
const FIB_NO_NEIGHBOUR: i64 = 7;

/// `BPF_TCP_LISTEN` of linux/bpf.h.
const BPF_TCP_LISTEN: u32 = 10;
/// `BPF_F_CURRENT_NETNS` of linux/bpf.h.
const THIS_NETNS: u64 = u64::MAX;

/// Answers at once, and one more each interval, in ns: on each CPU.
const ANSWER_INTERVAL: u64 = 1_000_000;
const ANSWERS_AT_ONCE: u64 = 50;
/// The same of denied packets.
const DENIED_INTERVAL: u64 = 1_000_000_000 / Denied::PER_SECOND;

#[btf_map]
static SETTINGS: Array<Settings, 1> = Array::new();
#[btf_map]
static OVERLAY: LpmTrie<Address, Overlay, MAX_OVERLAY> = LpmTrie::new();
#[btf_map]
static ROUTES: LpmTrie<Address, Route, MAX_ROUTES> = LpmTrie::new();
#[btf_map]
static LINKS: HashMap<u32, Link, MAX_LINKS> = HashMap::new();
#[btf_map]
static MASQUERADE: LpmTrie<Way, [u8; 16], MAX_MASQUERADE> = LpmTrie::new();
#[btf_map]
static COUNTERS: PerCpuArray<Counter, MAX_COUNTERS> = PerCpuArray::new();
#[btf_map]
static POLICY: LpmTrie<Address, u32, MAX_PREFIXES> = LpmTrie::new();
#[btf_map]
static POLICY_SETS: HashMap<u32, Set, MAX_SETS, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();
#[btf_map]
static POLICY_HITS: PerCpuArray<u64, MAX_HITS> = PerCpuArray::new();

#[btf_map]
static SOURCES: HashMap<Account, u32, MAX_SOURCES, { BPF_F_NO_PREALLOC as usize }> = HashMap::new();
#[btf_map]
static FRAGMENTS: LruHashMap<FragmentKey, Fragment, MAX_FRAGMENTS> = LruHashMap::new();
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

/// Tells user space of a denied packet, unless there are too many.
#[inline(always)]
pub(crate) fn tell_denied(side: Side, verdict: u32, packet: &Packet, now: u64) {
    if take(Budget::Denied, DENIED_INTERVAL, Denied::AT_ONCE, now) {
        let denied = Denied::new(side, verdict as u8, packet, now);
        // What does not fit is in the counters all the same.
        let _ = DENIED.output(denied, 0);
    }
}

/// The tables as one packet sees them.
pub(crate) struct Maps<'a> {
    ctx: &'a TcContext,
    done: u32,
}

impl<'a> Maps<'a> {
    #[inline(always)]
    pub(crate) fn new(ctx: &'a TcContext) -> Self {
        Self::of(ctx, 0)
    }

    /// As [`Maps::new`]; `done`: the steps that need not be done again.
    #[inline(always)]
    pub(crate) fn of(ctx: &'a TcContext, done: u32) -> Self {
        Self { ctx, done }
    }
}

impl Maps<'_> {
    /// Whether a step need not be done again.
    #[inline(always)]
    pub(crate) fn has_done(&self, step: u32) -> bool {
        self.done & step != 0
    }

    /// Asks the kernel's routing. Types with a niche do not go through the signature: LLVM
    /// describes them in BTF as unions that kernels refuse.
    #[inline(never)]
    fn ask_fib(&self, packet: &Packet, len: u32, answer: &mut Answer) -> i64 {
        let mut place = Place::<bpf_fib_lookup>::new();
        // SAFETY: the type holds integers only.
        let query = unsafe { place.zero() };
        ask(query, packet, len, self.ingress());
        // SAFETY: the query is a whole `bpf_fib_lookup` of the size given.
        let code = unsafe {
            helpers::bpf_fib_lookup(
                self.ctx.as_ptr(),
                query,
                size_of::<bpf_fib_lookup>() as i32,
                0,
            )
        };
        answer.link = query.ifindex;
        if let Some(work) = steps::work() {
            // SAFETY: the place is valid and this program's alone, and both members are integers.
            unsafe {
                let [a, b, c, d] = query.__bindgen_anon_4.ipv6_dst;
                (*work).next_hop = [query.family.into(), a, b, c, d];
            }
        }
        // By a next hop of the other family (RFC 8950) it is the kernel that goes by the destination.
        if query.family == AF_INET {
            // SAFETY: the family says which member it is.
            answer.gateway = unsafe { query.__bindgen_anon_4.ipv4_dst }.to_ne_bytes();
        }
        // SAFETY: every bit pattern is a valid `u16`.
        answer.mtu = u32::from(unsafe { query.__bindgen_anon_1.mtu_result });
        answer.hardware[..6].copy_from_slice(&query.dmac);
        answer.hardware[6..].copy_from_slice(&query.smac);
        code
    }
}

/// What the kernel's routing answers.
#[derive(Default)]
struct Answer {
    link: u32,
    gateway: [u8; 4],
    mtu: u32,
    hardware: [u8; 12],
}

impl Tables for Maps<'_> {
    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        SETTINGS.get(0)
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // Volatile: LLVM must not take the field's address apart from the access.
        // SAFETY: the kernel passes a valid context, and the field is readable in tc programs.
        unsafe { (&raw const (*self.ctx.skb.skb).ifindex).read_volatile() }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        steps::now()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes nothing.
        unsafe { helpers::bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn peer(&self, address: &Prefix) -> Option<u32> {
        let found = OVERLAY.get(key(address))?;
        (found.flags & Overlay::OWN == 0).then_some(found.peer)
    }

    #[inline(always)]
    fn route(&self, address: &Prefix) -> Option<Route> {
        ROUTES.get(key(address)).copied()
    }

    #[inline(always)]
    fn link(&self, index: u32) -> Option<&Link> {
        // SAFETY: user space replaces whole values; a reader sees old or new words.
        unsafe { LINKS.get(index) }
    }

    #[inline(never)]
    fn masquerade(&self, way: &Way, taken: &mut [u8; 16]) -> bool {
        let host = WayPrefix::host(*way);
        const _: () = assert!(size_of::<WayPrefix>() == size_of::<Key<Way>>());
        // SAFETY: as in `key`.
        let key: &Key<Way> = unsafe { &*core::ptr::from_ref(&host).cast() };
        match MASQUERADE.get(key) {
            Some(address) => {
                *taken = *address;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn permits(&self, tuple: &Tuple, settings: &Settings) -> Result<u16, Verdict> {
        if settings.bank == 0 {
            return Ok(Flow::NO_CLAUSE);
        }
        steps::clause(self.ctx, tuple, settings.bank)
            .map(|clause| clause as u16)
            .ok_or(Verdict::DropPolicy)
    }

    #[inline(always)]
    fn count_clause(&self, clause: u16, settings: &Settings) {
        if settings.bank != 0 {
            count_hit(settings.bank, clause.into());
        }
    }

    #[inline(always)]
    fn flow(&self, side: Side, tuple: &Tuple) -> Option<Entry<'_>> {
        let entry = flows::find(side, tuple)?;
        // SAFETY: the kernel keeps the entry's memory until the program ends, also when the entry
        // is deleted, and a slot has of a `Flow` what its family needs.
        Some(unsafe { Entry::new(entry) })
    }

    #[inline(never)]
    fn add_flow(&self, side: Side, tuple: &Tuple, flow: &Flow) -> Result<(), Refused> {
        flows::insert(side, tuple, flow)
    }

    #[inline(never)]
    fn remove_flow(&self, side: Side, tuple: &Tuple) {
        flows::remove(side, tuple);
    }

    #[inline(never)]
    fn take_place(&self, account: &Account, limit: u32) -> bool {
        if let Some(count) = SOURCES.get_ptr_mut(account) {
            // SAFETY: the entry's memory stays. BPF has no atomic addition here, so a count of two
            // CPUs at a time may be lost: user space counts anew.
            unsafe {
                if *count >= limit {
                    return false;
                }
                *count += 1;
            }
        } else {
            // Where there is no room for another account, it has no limit of its own.
            let _ = SOURCES.insert(account, 1, BPF_NOEXIST.into());
        }
        true
    }

    #[inline(never)]
    fn give_place_back(&self, account: &Account) {
        if let Some(count) = SOURCES.get_ptr_mut(account) {
            // SAFETY: as in `take_place`.
            unsafe { *count = (*count).saturating_sub(1) };
        }
    }

    #[inline(never)]
    fn is_socket(&self, tuple: &Tuple) -> bool {
        let [source_port, destination_port] = tuple.ports.map(u16::from_ne_bytes);
        let mut place = Place::<bpf_sock_tuple>::new();
        // SAFETY: the type holds integers only.
        let query = unsafe { place.zero() };
        let size = if tuple.source.is_v4() {
            query.__bindgen_anon_1.ipv4 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 {
                saddr: u32::from_ne_bytes(tuple.source.v4_octets()),
                daddr: u32::from_ne_bytes(tuple.destination.v4_octets()),
                sport: source_port,
                dport: destination_port,
            };
            size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1>()
        } else {
            query.__bindgen_anon_1.ipv6 = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 {
                saddr: words(&tuple.source),
                daddr: words(&tuple.destination),
                sport: source_port,
                dport: destination_port,
            };
            size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>()
        };
        let ctx = self.ctx.as_ptr();
        match tuple.protocol {
            // SAFETY: the tuple has the size given, and what is found is released.
            TCP => unsafe {
                let socket = helpers::bpf_skc_lookup_tcp(ctx, query, size as u32, THIS_NETNS, 0);
                if socket.is_null() {
                    return false;
                }
                let state = (*socket).state;
                helpers::bpf_sk_release(socket.cast());
                // A service of the router waits for others than whom the flow is with.
                state != BPF_TCP_LISTEN
            },
            // SAFETY: as above.
            UDP => unsafe {
                let socket = helpers::bpf_sk_lookup_udp(ctx, query, size as u32, THIS_NETNS, 0);
                if socket.is_null() {
                    return false;
                }
                helpers::bpf_sk_release(socket.cast());
                true
            },
            _ => false,
        }
    }

    #[inline(never)]
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        // SAFETY: an entry that is replaced meanwhile is another packet's with the same ports.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(never)]
    fn add_fragment(&self, key: &FragmentKey, fragment: Fragment) {
        // A packet whose fragments are not remembered is lost, as on a link.
        let _ = FRAGMENTS.insert(key, fragment, BPF_ANY.into());
    }

    #[inline(always)]
    fn may_send_error(&self) -> bool {
        take(
            Budget::Answers,
            ANSWER_INTERVAL,
            ANSWERS_AT_ONCE,
            self.now(),
        )
    }

    #[inline(always)]
    fn claim(&self, reply: &Tuple, flow: &Flow) -> Result<(), Refused> {
        steps::claim(self.ctx, reply, flow)
    }

    #[inline(always)]
    fn find_flow<F: Frame>(&self, _: Side, _: &mut Packet, _: &F) -> Result<bool, Verdict> {
        if self.done & steps::FOUND != 0 {
            return Ok(self.done & steps::THROUGH_STACK != 0);
        }
        steps::find_flow().map(|()| false)
    }

    #[inline(always)]
    fn open(&self, _: Side, _: &Packet) -> Result<(), Verdict> {
        steps::open()
    }

    #[inline(always)]
    fn judge(&self, _: Side, _: &Packet, _: Entry<'_>) -> Result<(), Verdict> {
        if self.done & steps::JUDGED != 0 {
            return Ok(());
        }
        steps::judge()
    }

    #[inline(always)]
    fn probe_mtu(&self, _: &Packet, _: Entry<'_>) -> Result<(), Verdict> {
        steps::probe_mtu(self.ctx)
    }

    #[inline(always)]
    fn look_across(&self, side: Side, _: &Packet, _: Entry<'_>) -> bool {
        steps::look_across(self.ctx, side)
    }

    #[inline(always)]
    fn is_routers(&self, _: &Packet, _: Entry<'_>) -> bool {
        steps::is_routers(self.ctx)
    }

    #[inline(always)]
    fn lead(&self, side: Side, _: &Packet, _: Entry<'_>, stack: bool) -> Result<(), Verdict> {
        steps::lead(self.ctx, side, stack)
    }

    #[inline(always)]
    fn next_hop(&self, packet: &Packet, len: u32, settings: &Settings) -> Result<Hop, Verdict> {
        let mut answer = Answer::default();
        let code = self.ask_fib(packet, len, &mut answer);
        if code != FIB_SUCCESS && code != FIB_NO_NEIGHBOUR {
            return Err(fib_failure(code));
        }
        // Without a neighbour the kernel leaves the packet's length in place of the MTU.
        let mtu = if code == FIB_SUCCESS && settings.flags & Settings::FIB_MTU != 0 {
            answer.mtu
        } else {
            u32::MAX
        };
        Ok(Hop {
            link: answer.link,
            gateway: answer.gateway,
            mtu,
            hardware: (code == FIB_SUCCESS).then_some(answer.hardware),
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

/// The place of a question to the kernel, aligned so that it is whole words.
#[repr(C, align(8))]
struct Place<T>(MaybeUninit<T>);

impl<T> Place<T> {
    #[inline(always)]
    fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// Makes all of it zero, word by word: of a value of zeros LLVM makes a call for BPF, which goes
    /// byte by byte.
    ///
    /// # Safety
    ///
    /// A `T` of zeros is valid.
    #[inline(always)]
    unsafe fn zero(&mut self) -> &mut T {
        let words = core::ptr::from_mut(self).cast::<u64>();
        let mut word = 0;
        while word < size_of::<Self>() / size_of::<u64>() {
            // SAFETY: the word is within the place.
            unsafe { words.add(word).write_volatile(0) };
            word += 1;
        }
        // SAFETY: by the caller's promise.
        unsafe { self.0.assume_init_mut() }
    }
}

/// Fills a question to the kernel's routing, which is all zero. A segment has at most 65,535 bytes.
#[inline(always)]
fn ask(query: &mut bpf_fib_lookup, packet: &Packet, len: u32, ingress: u32) {
    let [source_port, destination_port] = packet.tuple.ports;
    query.l4_protocol = packet.tuple.protocol;
    query.sport = u16::from_ne_bytes(source_port);
    query.dport = u16::from_ne_bytes(destination_port);
    query.__bindgen_anon_1.tot_len = len as u16;
    query.ifindex = ingress;
    if packet.tuple.source.is_v4() {
        query.family = AF_INET;
        query.__bindgen_anon_2.tos = packet.first_word[1];
        query.__bindgen_anon_3.ipv4_src = u32::from_ne_bytes(packet.tuple.source.v4_octets());
        query.__bindgen_anon_4.ipv4_dst = u32::from_ne_bytes(packet.tuple.destination.v4_octets());
    } else {
        query.family = AF_INET6;
        let [version, a, b, c] = packet.first_word;
        query.__bindgen_anon_2.flowinfo = u32::from_ne_bytes([version & 0x0f, a, b, c]);
        query.__bindgen_anon_3.ipv6_src = words(&packet.tuple.source);
        query.__bindgen_anon_4.ipv6_dst = words(&packet.tuple.destination);
    }
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

//! What the kernel is asked: its routing, and its sockets.

use core::mem::{MaybeUninit, size_of};

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    bpf_fib_lookup, bpf_redir_neigh, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2,
};
use aya_ebpf::helpers;
use aya_ebpf::programs::TcContext;
use router_ebpf::abi::Tuple;
use router_ebpf::frame::Bytes;
use router_ebpf::packet::{Packet, TCP, UDP};

use super::work;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// `BPF_TCP_LISTEN` of linux/bpf.h.
const BPF_TCP_LISTEN: u32 = 10;
/// `BPF_F_CURRENT_NETNS` of linux/bpf.h.
const THIS_NETNS: u64 = u64::MAX;

/// Interface that the packet came in by.
#[inline(always)]
pub(crate) fn ingress(ctx: &TcContext) -> u32 {
    // Volatile: LLVM must not take the field's address apart from the access.
    // SAFETY: the kernel passes a valid context, and the field is readable in tc programs.
    unsafe { (&raw const (*ctx.skb.skb).ifindex).read_volatile() }
}

/// What the kernel's routing answers.
pub(crate) struct Answer {
    pub(crate) link: u32,
    pub(crate) gateway: [u8; 4],
    pub(crate) mtu: u32,
    pub(crate) hardware: Bytes<12>,
}

/// Asks the kernel's routing. Types with a niche do not go through the signature: LLVM
/// describes them in BTF as unions that kernels refuse.
#[inline(never)]
pub(crate) fn ask_fib(ctx: &TcContext, packet: &Packet, len: u32, answer: &mut Answer) -> i64 {
    let mut place = Place::<bpf_fib_lookup>::new();
    // SAFETY: the type holds integers only.
    let query = unsafe { place.zero() };
    ask(query, packet, len, ingress(ctx));
    // SAFETY: the query is a whole `bpf_fib_lookup` of the size given.
    let code = unsafe {
        helpers::bpf_fib_lookup(ctx.as_ptr(), query, size_of::<bpf_fib_lookup>() as i32, 0)
    };
    answer.link = query.ifindex;
    if let Some(work) = work::work() {
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
    answer.hardware.0[..6].copy_from_slice(&query.dmac);
    answer.hardware.0[6..].copy_from_slice(&query.smac);
    code
}

/// Whether a socket of the router itself would get a packet with `tuple` that comes in.
#[inline(never)]
pub(crate) fn is_socket(ctx: &TcContext, tuple: &Tuple) -> bool {
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
            saddr: tuple.source.words(),
            daddr: tuple.destination.words(),
            sport: source_port,
            dport: destination_port,
        };
        size_of::<bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2>()
    };
    let ctx = ctx.as_ptr();
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

/// Redirects the packet to the NIC with this index, and has the kernel find the neighbour that its
/// routing has named: asked again, it may name one that is reached by another NIC.
#[inline(always)]
pub(crate) fn redirect_neighbour(link: u32) -> i64 {
    // SAFETY: the place is valid and this program's alone, and as long as the type that the helper takes.
    unsafe {
        if let Some(work) = work::work() {
            let next_hop = &raw mut (*work).next_hop;
            if (*next_hop)[0] != 0 {
                let len = size_of::<bpf_redir_neigh>() as i32;
                return helpers::bpf_redirect_neigh(link, next_hop.cast(), len, 0);
            }
        }
        helpers::bpf_redirect_neigh(link, core::ptr::null_mut(), 0, 0)
    }
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
        query.__bindgen_anon_3.ipv6_src = packet.tuple.source.words();
        query.__bindgen_anon_4.ipv6_dst = packet.tuple.destination.words();
    }
}

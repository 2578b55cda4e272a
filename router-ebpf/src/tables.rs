//! What a decision looks up: the maps, and the kernel's routing.

use crate::abi::{
    Account, Flow, Fragment, FragmentKey, Link, Overlay, Prefix, Route, Settings, Side, Tuple, Way,
};
use crate::entry::Entry;
use crate::frame::Bytes;
use crate::packet::Packet;
use crate::verdict::Verdict;

/// In place of a clause's number, when there are no rules.
pub const NO_CLAUSE: u16 = u16::MAX;

/// Why the flow table did not take an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There is one with this key.
    Exists,
    /// It is full, or the kernel has no memory.
    Full,
}

/// What a decision looks up: the maps, and the kernel's routing.
pub trait Tables {
    /// The settings, once there are any.
    fn settings(&self) -> Option<&Settings>;

    /// Interface that the packet came in by.
    fn ingress(&self) -> u32;

    /// `CLOCK_MONOTONIC` in ns, up to a tick of the kernel old.
    fn now(&self) -> u64;

    /// Any number.
    fn random(&self) -> u32;

    /// What is known of the peer that `address` belongs to; `None`: it is in no allowed IPs, or the
    /// router's own.
    fn peer(&self, address: &Prefix) -> Option<&Overlay>;

    /// The advertised route with the longest prefix that contains `address`.
    fn route(&self, address: &Prefix) -> Option<Route>;

    /// A subnet-side NIC; `None` if `from_subnet` is not attached to it.
    fn link(&self, index: u32) -> Option<&Link>;

    /// Gives `flow`, whose address is all zero, the one that the kernel's masquerade takes on this way;
    /// `false` if there is none.
    fn masquerade(&self, way: &Way, flow: &mut Flow) -> bool;

    /// Whether the policy lets a new flow through, and by which clause; its first packet has
    /// `tuple`, and its source is of `class`, or [`crate::policy::BY_ADDRESS`] if the subnet side opens it.
    /// [`NO_CLAUSE`]: there are no rules about it.
    fn permits(&self, class: u32, tuple: &Tuple, settings: &Settings) -> Result<u16, Verdict>;

    /// Counts a new flow for the clause that let it through.
    fn count_clause(&self, clause: u16, settings: &Settings);

    /// The entry of the flow table for packets with `tuple` in the program of `side`.
    fn flow(&self, side: Side, tuple: &Tuple) -> Option<Entry<'_>>;

    /// Adds an entry to the flow table.
    fn add_flow(&self, side: Side, tuple: &Tuple, flow: &Flow) -> Result<(), Refused>;

    /// Takes an entry out of the flow table.
    fn remove_flow(&self, side: Side, tuple: &Tuple);

    /// Counts one more flow of an account, unless it has `limit` already.
    fn take_place(&self, account: &Account, limit: u32) -> bool;

    /// Takes back what [`Tables::take_place`] has counted.
    fn give_place_back(&self, account: &Account);

    /// Whether a socket of the router itself would get a packet with `tuple` that comes in.
    fn is_socket(&self, tuple: &Tuple) -> bool;

    /// What is known of a fragmented packet.
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment>;

    /// Remembers a fragmented packet.
    fn add_fragment(&self, key: &FragmentKey, fragment: Fragment);

    /// Whether one more answer may be sent now, and counts it.
    fn may_send_error(&self) -> bool;

    /// Adds the reply's entry of a translated flow, unless a socket of the router itself has its
    /// tuple.
    fn claim(&self, reply: &Tuple, flow: &Flow) -> Result<(), Refused>;

    /// The kernel's answer where `packet` goes, were it `len` bytes long.
    fn next_hop(&self, packet: &Packet, len: u32, settings: &Settings) -> Result<Hop, Verdict>;
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Interface index.
    pub link: u32,
    /// The next hop's IPv4 address, big-endian; zero: it is the destination.
    pub gateway: [u8; 4],
    /// MTU of the path in bytes, `u32::MAX` where the kernel does not tell.
    pub mtu: u32,
    /// Whether the neighbour's hardware address is known; never so toward the TUN device. Not an `Option`: of
    /// one that is none, LLVM reads what nobody wrote, and Linux 5.10 refuses the program.
    pub resolved: bool,
    /// Destination, then source hardware address, if `resolved`.
    pub hardware: Bytes<12>,
}

/// The verdict of a return code of `bpf_fib_lookup` (`BPF_FIB_LKUP_RET_*` in linux/bpf.h) that is
/// neither success (0) nor "no neighbour" on a device that has none.
#[inline(always)]
pub const fn fib_failure(code: i64) -> Verdict {
    match code {
        4 => Verdict::SlowToRouter,
        7 => Verdict::SlowNoNeighbour,
        8 => Verdict::SlowMtu,
        _ => Verdict::SlowFib,
    }
}

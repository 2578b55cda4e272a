//! What becomes of a parsed packet. No packet byte is changed here.

use crate::abi::{
    Account, Flow, Fragment, FragmentKey, Link, Prefix, Route, Settings, Side, Tuple, Way,
};
use crate::answer::Answer;
use crate::flow::{self, Entry};
use crate::fragment;
use crate::icmp;
use crate::mss;
use crate::packet::{Frame, Packet, SYN, Transport};
use crate::verdict::Verdict;

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

    /// Number of the peer that `address` belongs to; `None`: it is in no allowed IPs, or the router's
    /// own.
    fn peer(&self, address: &Prefix) -> Option<u32>;

    /// The advertised route with the longest prefix that contains `address`.
    fn route(&self, address: &Prefix) -> Option<Route>;

    /// A subnet-side NIC; `None` if `from_subnet` is not attached to it.
    fn link(&self, index: u32) -> Option<&Link>;

    /// Writes the address that the kernel's masquerade takes on this way to `taken`, which is all zero;
    /// `false` if there is none.
    fn masquerade(&self, way: &Way, taken: &mut [u8; 16]) -> bool;

    /// Whether the policy lets a new flow through, and by which clause; its first packet has
    /// `tuple`.
    fn permits(&self, tuple: &Tuple, settings: &Settings) -> Result<u16, Verdict>;

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
    fn claim(&self, reply: &Tuple, flow: &Flow) -> Result<(), Refused> {
        if self.is_socket(reply) {
            return Err(Refused::Exists);
        }
        self.add_flow(Side::Subnet, reply, flow)
    }

    /// [`find_flow`]; the programs have the rare steps in functions of their own, which the
    /// verifier judges one by one.
    fn find_flow<F: Frame>(
        &self,
        side: Side,
        packet: &mut Packet,
        frame: &F,
    ) -> Result<bool, Verdict>
    where
        Self: Sized,
    {
        find_flow(side, packet, frame, self)
    }

    /// [`flow::open`].
    fn open(&self, side: Side, packet: &Packet) -> Result<(), Verdict>
    where
        Self: Sized,
    {
        flow::open(side, packet, self, &mut flow::Draft::default())
    }

    /// [`flow::judge`].
    fn judge(&self, side: Side, packet: &Packet, entry: Entry<'_>) -> Result<(), Verdict>
    where
        Self: Sized,
    {
        flow::judge(side, packet, entry, self)
    }

    /// [`flow::probe_mtu`].
    fn probe_mtu(&self, packet: &Packet, entry: Entry<'_>) -> Result<(), Verdict>
    where
        Self: Sized,
    {
        flow::probe_mtu(packet, entry, self)
    }

    /// [`flow::look_across`].
    fn look_across(&self, side: Side, packet: &Packet, entry: Entry<'_>) -> bool
    where
        Self: Sized,
    {
        flow::look_across(side, packet, entry, self)
    }

    /// [`flow::is_routers`].
    fn is_routers(&self, packet: &Packet, entry: Entry<'_>) -> bool
    where
        Self: Sized,
    {
        flow::is_routers(packet, entry, self)
    }

    /// [`fragment::lead`].
    fn lead(
        &self,
        side: Side,
        packet: &Packet,
        entry: Entry<'_>,
        stack: bool,
    ) -> Result<(), Verdict>
    where
        Self: Sized,
    {
        fragment::lead(side, packet, entry, self, stack)
    }

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
    /// Destination, then source hardware address; `None` while the neighbour is not known, and
    /// toward the TUN device.
    pub hardware: Option<[u8; 12]>,
}

/// Where a packet leaves to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// To the TUN device.
    Tun,
    /// To a NIC with the hardware addresses that are known.
    Ethernet,
    /// To a NIC; the kernel finds the neighbour.
    Neighbour,
    /// To the kernel, translated.
    Stack,
    /// It ends here, and its sender gets [`Forward::answer`].
    Answer,
}

/// The overlay side of a flow as the subnet side knows it, or the other way round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nat {
    /// The new address as in [`crate::abi::Address::octets`]: the source of what comes from the
    /// overlay, the destination of what comes from the subnet.
    pub address: [u8; 16],
    /// The port or ICMP identifier that goes with it.
    pub port: [u8; 2],
}

/// A packet that the fast path takes on, and what to do with it. Flat and filled in place: an enum
/// with fields would not always be whole, which the verifier refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Where it leaves to.
    pub exit: Exit,
    /// What became of it.
    pub verdict: Verdict,
    /// Interface index; zero for [`Exit::Stack`] and [`Exit::Answer`].
    pub link: u32,
    /// For [`Exit::Answer`]: what its sender is told.
    pub answer: Answer,
    /// MTU in bytes of the way on.
    pub mtu: u32,
    /// For [`Exit::Ethernet`]: destination, then source hardware address.
    pub hardware: [u8; 12],
    /// The translation, if `is_translated`. Of an ICMP error, the packet that it quotes is
    /// translated too.
    pub nat: Nat,
    /// Whether it is translated.
    pub is_translated: bool,
    /// The largest MSS that a SYN may announce; `u16::MAX` for what is no SYN.
    pub mss: u16,
}

impl Default for Forward {
    fn default() -> Self {
        Self {
            exit: Exit::Tun,
            verdict: Verdict::Forwarded,
            link: 0,
            answer: Answer::TooBig,
            mtu: 0,
            hardware: [0; 12],
            nat: Nat::default(),
            is_translated: false,
            mss: u16::MAX,
        }
    }
}

/// Decides about `packet` in the program of `side`; all of `forward` is filled unless it fails.
#[inline(always)]
pub fn decide<F: Frame, T: Tables>(
    side: Side,
    packet: &mut Packet,
    frame: &F,
    tables: &T,
    forward: &mut Forward,
) -> Result<(), Verdict> {
    let settings = tables.settings().ok_or(Verdict::DropInternal)?;
    let mut through_stack = false;
    match packet.transport {
        Transport::Tcp | Transport::Udp | Transport::Echo => {}
        _ => through_stack = tables.find_flow(side, packet, frame)?,
    }
    let packet = &*packet;
    let tuple = packet.flow_tuple();

    let entry = match tables.flow(side, tuple) {
        Some(entry) => entry,
        None => {
            // Soon said of the underlay, which on many routers is most of what comes in here.
            if side == Side::Subnet
                && tables
                    .peer(&Prefix::host(packet.tuple.destination))
                    .is_none()
            {
                return Err(Verdict::PassUnrelated);
            }
            tables.open(side, packet)?;
            tables.flow(side, tuple).ok_or(Verdict::DropInternal)?
        }
    };
    if entry.generation() != settings.generation {
        tables.judge(side, packet, entry)?;
    }
    let translated = entry.flags() & Flow::SNAT != 0;
    forward.verdict = Verdict::Forwarded;
    forward.mtu = match side {
        Side::Overlay => u32::from(entry.mtu()),
        Side::Subnet => settings.mtu,
    };
    forward.mss = u16::MAX;
    forward.nat.address = entry.address(packet.is_v4());
    forward.nat.port = entry.port();
    forward.is_translated = translated;

    if packet.ttl <= 1 {
        return match side {
            // The kernel would take it for its own, were it a reply to a translated flow.
            Side::Subnet if translated => {
                forward.exit = Exit::Answer;
                forward.verdict = Verdict::DropTtl;
                forward.answer = Answer::TimeExceeded;
                Ok(())
            }
            _ => Err(Verdict::SlowTtl),
        };
    }
    match side {
        Side::Subnet => {
            forward.exit = Exit::Tun;
            forward.link = settings.tun;
        }
        Side::Overlay => {
            forward.link = entry.link();
            forward.hardware = entry.hardware();
            forward.exit = if entry.generation() == settings.generation {
                Exit::Ethernet
            } else if translated || entry.flags() & Flow::FROM_SUBNET != 0 {
                // The kernel must not see a packet of a translated flow untranslated, nor the answer to
                // what it has not seen: its rules know nothing of that.
                Exit::Neighbour
            } else {
                return Err(Verdict::SlowNoNeighbour);
            };
        }
    }
    if packet.segment_len() > forward.mtu || through_stack {
        if side == Side::Overlay && settings.flags & Settings::FIB_MTU == 0 && !through_stack {
            match tables.probe_mtu(packet, entry) {
                // Untranslated, the kernel would cut it and give it another port.
                Err(Verdict::SlowMtu) if translated && packet.may_cut => {
                    too_big(side, packet, through_stack, forward)?;
                }
                outcome => outcome?,
            }
        } else {
            too_big(side, packet, through_stack, forward)?;
        }
    }
    if packet.is_fragment && packet.transport != Transport::Fragment {
        tables.lead(side, packet, entry, forward.exit == Exit::Stack)?;
    }
    if forward.exit == Exit::Answer {
        return Ok(());
    }
    flow::touch(side, packet, entry, tables)?;

    if packet.tcp_flags & SYN != 0 {
        // The segments that the announcement allows come the other way: every MTU on both sides
        // counts.
        let (near, subnet) = match side {
            Side::Overlay => (entry.link(), &tuple.destination),
            Side::Subnet => (tables.ingress(), &tuple.source),
        };
        let link = tables.link(near).ok_or(Verdict::SlowOtherLink)?;
        let mut smallest = settings.mtu.min(link.mtu);
        if let Some(route) = tables.route(&Prefix::host(*subnet)) {
            smallest = smallest.min(route.mtu());
        }
        if settings.flags & Settings::FIB_MTU != 0 {
            smallest = smallest.min(forward.mtu);
        }
        forward.mss = mss::for_mtu(smallest, packet.header_len);
    }
    Ok(())
}

/// What becomes of a packet that is too big for the way on, or part of one that is.
#[inline(always)]
fn too_big(
    side: Side,
    packet: &Packet,
    through_stack: bool,
    forward: &mut Forward,
) -> Result<(), Verdict> {
    if through_stack || !forward.is_translated {
        // What the kernel is to put together must reach it whole.
        forward.exit = Exit::Stack;
        forward.verdict = Verdict::SlowMtu;
        return Ok(());
    }
    if packet.may_cut {
        forward.exit = Exit::Stack;
        forward.verdict = Verdict::SlowMtu;
        return Ok(());
    }
    match side {
        // The kernel looks at the size before it translates.
        Side::Overlay => Err(Verdict::SlowMtu),
        // The kernel would answer about a flow that it does not know.
        Side::Subnet => {
            forward.exit = Exit::Answer;
            forward.verdict = Verdict::DropTooBig;
            forward.answer = Answer::TooBig;
            Ok(())
        }
    }
}

/// Finds the flow of what has no ports of its own, see [`Packet::flow`]; `true` if the kernel gets
/// all of a fragmented packet.
#[inline(always)]
pub fn find_flow<F: Frame, T: Tables>(
    side: Side,
    packet: &mut Packet,
    frame: &F,
    tables: &T,
) -> Result<bool, Verdict> {
    let verdict = match packet.transport {
        Transport::Error => return icmp::concerned(side, packet, frame, tables).map(|()| false),
        Transport::Fragment => return fragment::follow(side, packet, tables),
        Transport::Options => Verdict::SlowOptions,
        Transport::Bad => Verdict::SlowTransport,
        _ => Verdict::SlowProtocol,
    };
    Err(refuse(side, packet, tables, verdict))
}

/// Whether the kernel must take `packet`, which it gets with `verdict`, as it comes: it is in the middle of
/// an untranslated flow that the policy has let through, and whose beginning the kernel has not seen.
#[inline(always)]
pub fn is_judged<T: Tables>(side: Side, verdict: Verdict, packet: &Packet, tables: &T) -> bool {
    // Other verdicts come before the flow is found and judged.
    let but_for = match verdict {
        Verdict::SlowTtl | Verdict::SlowMtu => Flow::SNAT,
        Verdict::SlowFragment if packet.transport != Transport::Fragment => Flow::SNAT,
        // Where the kernel carries one direction of what a peer has opened, its connection tracking must
        // know of it, or it would not let the other pass.
        Verdict::SlowOtherLink | Verdict::SlowFib | Verdict::SlowToRouter => 0,
        _ => return false,
    };
    match tables.flow(side, packet.flow_tuple()) {
        Some(entry) if but_for == 0 => entry.flags() & Flow::FROM_SUBNET != 0,
        Some(entry) => entry.flags() & but_for == 0,
        None => false,
    }
}

/// The verdict about a packet that belongs to no flow, and that `verdict` would be about if it came
/// from a peer to an advertised route, or the other way.
#[inline(always)]
pub(crate) fn refuse<T: Tables>(
    side: Side,
    packet: &Packet,
    tables: &T,
    verdict: Verdict,
) -> Verdict {
    match flow::route(side, &packet.tuple, tables) {
        Ok(_) => verdict,
        Err(verdict) => verdict,
    }
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

#[cfg(test)]
mod tests;

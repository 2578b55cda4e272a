//! Flows: how they are opened, judged anew and kept alive.

mod entry;
pub mod external;

use crate::abi::{Account, Address, Flow, Link, Prefix, Route, Settings, Side, Tuple};
use crate::decide::{Refused, Tables, refuse};
use crate::packet::{ACK, FIN, Packet, RST, SYN, Transport};
use crate::verdict::Verdict;

pub use entry::Entry;

/// Ports that a new translated flow tries at most.
const PROBES: u32 = 32;
/// How far in bytes behind the last acknowledgement an RST is believed: what may be on the way.
const RESET_WINDOW: u32 = 1 << 20;

/// The route between the two ends of `tuple` as the program of `side` sees it, and the number of the
/// peer at its end; else why the fast path has nothing to do with it.
#[inline(always)]
pub(crate) fn route<T: Tables>(
    side: Side,
    tuple: &Tuple,
    tables: &T,
) -> Result<(Route, u32), Verdict> {
    let (overlay, subnet) = match side {
        Side::Overlay => (&tuple.source, &tuple.destination),
        Side::Subnet => (&tuple.destination, &tuple.source),
    };
    let Some(peer) = tables.peer(&Prefix::host(*overlay)) else {
        return Err(match side {
            Side::Overlay => Verdict::DropSpoofed,
            Side::Subnet => Verdict::PassUnrelated,
        });
    };
    let route = tables
        .route(&Prefix::host(*subnet))
        .ok_or(Verdict::SlowNotRouted)?;
    if route.flags & Route::STACK != 0 {
        return Err(Verdict::SlowStackRoute);
    }
    check_scope(overlay)?;
    check_scope(subnet)?;
    Ok((route, peer))
}

/// Addresses that a router must not forward, or forwards by rules of its own (RFC 1812, RFC 4007).
#[inline(always)]
pub(crate) fn check_scope(address: &Address) -> Result<(), Verdict> {
    let o = &address.octets;
    let special = if address.is_v4() {
        // 0/8, 127/8, 169.254/16, multicast, reserved and limited broadcast.
        matches!(o[0], 0 | 127 | 224..) || (o[0] == 169 && o[1] == 254)
    } else {
        // Multicast; fe80::/10; ::/96 with the unspecified and the loopback address.
        o[0] == 0xff || (o[0] == 0xfe && o[1] & 0xc0 == 0x80) || (o[0] == 0 && o[..12] == [0; 12])
    };
    if special {
        Err(Verdict::SlowScope)
    } else {
        Ok(())
    }
}

/// A flow in the making; too large for the stack of a program.
#[derive(Default)]
pub struct Draft {
    overlay: Flow,
    subnet: Flow,
    /// That of packets from the overlay.
    tuple: Tuple,
    /// Who opens it, and all of that side.
    accounts: [Account; 2],
}

/// Makes all of an entry zero. Of a value of zeros LLVM makes a call for BPF, which goes byte by byte.
#[inline(always)]
fn clear(entry: &mut Flow) {
    let words = core::ptr::from_mut(entry).cast::<u64>();
    let mut word = 0;
    while word < size_of::<Flow>() / size_of::<u64>() {
        // SAFETY: the entry is aligned and as long, as `abi` asserts, and any bytes are valid in it.
        unsafe { words.add(word).write_volatile(0) };
        word += 1;
    }
}

/// The generation of the tables, read before anything is looked up in them: what is judged while they
/// change is judged again. Volatile, or the compiler might read it anew when it is written down.
#[inline(always)]
fn generation(settings: &Settings) -> u32 {
    // SAFETY: the reference is to a valid place.
    unsafe { (&raw const settings.generation).read_volatile() }
}

/// Opens the flow that `packet` is the first of.
#[inline(always)]
pub fn open<T: Tables>(
    side: Side,
    packet: &Packet,
    tables: &T,
    draft: &mut Draft,
) -> Result<(), Verdict> {
    let settings = tables.settings().ok_or(Verdict::DropInternal)?;
    let generation = generation(settings);
    match packet.transport {
        Transport::Error => return Err(refuse(side, packet, tables, Verdict::SlowNoFlow)),
        Transport::Fragment => return Err(refuse(side, packet, tables, Verdict::DropFragment)),
        _ => {}
    }
    let tuple = &packet.tuple;
    let (route, peer) = route(side, tuple, tables)?;
    if packet.ttl <= 1 {
        return Err(Verdict::SlowTtl);
    }
    let snat = route.flags & Route::SNAT != 0;
    if snat && is_underway(side, packet) {
        return Err(Verdict::SlowNoFlow);
    }
    let clause = tables.permits(tuple, settings)?;
    let hop = tables.next_hop(packet, packet.header_len, settings)?;
    let now = tables.now();
    let Draft {
        overlay,
        subnet,
        tuple: forward,
        accounts: [opener, all],
    } = draft;
    for entry in [&mut *overlay, &mut *subnet] {
        clear(entry);
        entry.last_used = now;
        entry.clause = clause;
    }
    subnet.generation = generation;
    match side {
        Side::Overlay => {
            let link = tables.link(hop.link).ok_or(Verdict::SlowOtherLink)?;
            overlay.link = hop.link;
            overlay.port = tuple.ports[0];
            overlay.mtu = path_mtu(hop.mtu.min(route.mtu()), link, settings);
            // Without it the flow is opened all the same: the answer to what the kernel carries then
            // comes by this table.
            if let Some(hardware) = hop.hardware {
                overlay.hardware = hardware;
                overlay.generation = generation;
            }
            subnet.address = tuple.source.octets;
            subnet.port = tuple.ports[0];
            if snat {
                overlay.flags = Flow::SNAT;
                subnet.flags = Flow::SNAT;
                external::choose(tuple, &hop, link, tables, &mut overlay.address)?;
            } else {
                overlay.address = tuple.source.octets;
            }
        }
        Side::Subnet => {
            if hop.link != settings.tun || tables.link(tables.ingress()).is_none() {
                return Err(Verdict::SlowOtherLink);
            }
            // Its next hop is not known yet.
            overlay.address = tuple.destination.octets;
            overlay.port = tuple.ports[1];
            overlay.flags = Flow::FROM_SUBNET;
            subnet.address = tuple.destination.octets;
            subnet.port = tuple.ports[1];
            subnet.flags = Flow::FROM_SUBNET;
        }
    }
    // What the subnet opens is not on the peer's account: it has no say in who sends to it.
    let from_subnet = side == Side::Subnet;
    if from_subnet {
        *forward = tuple.reversed();
        *opener = Account::host(&tuple.source);
        *all = Account::subnet(&tuple.source);
        if !tables.take_place(all, settings.flows_from_subnet) {
            return Err(Verdict::DropSourceLimit);
        }
    } else {
        *forward = *tuple;
        *opener = Account::peer(peer, &tuple.source);
    }
    let added = counted(opener, settings.flows_per_source, tables, || {
        add(forward, overlay, subnet, tables, settings)
    });
    if from_subnet && added != Ok(true) {
        tables.give_place_back(all);
    }
    added?;
    tables.count_clause(clause, settings);
    Ok(())
}

/// Whether `packet` cannot be the first of a flow that connection tracking would take for new.
#[inline(always)]
pub(crate) fn is_underway(side: Side, packet: &Packet) -> bool {
    match packet.transport {
        Transport::Tcp => packet.tcp_flags & (SYN | ACK | RST) != SYN,
        Transport::Echo => {
            let asked = match side {
                Side::Overlay => packet.tuple.ports[1] == Tuple::ASKED_BY_OVERLAY,
                Side::Subnet => packet.tuple.ports[0] == Tuple::ASKED_BY_SUBNET,
            };
            !asked
        }
        _ => false,
    }
}

/// The MTU that an entry keeps. Where the kernel tells none, it is the largest size that has
/// passed, see [`probe_mtu`]; every path carries the smallest IPv4 MTU (RFC 791).
#[inline(always)]
fn path_mtu(path: u32, link: &Link, settings: &Settings) -> u16 {
    if settings.flags & Settings::FIB_MTU == 0 {
        return 68;
    }
    let mtu = path.min(link.mtu);
    if mtu > u32::from(u16::MAX) {
        u16::MAX
    } else {
        mtu as u16
    }
}

/// Runs `add`, which says whether it has added a flow, with one more counted for `account`.
#[inline(always)]
fn counted<T: Tables>(
    account: &Account,
    limit: u32,
    tables: &T,
    add: impl FnOnce() -> Result<bool, Verdict>,
) -> Result<bool, Verdict> {
    if !tables.take_place(account, limit) {
        return Err(Verdict::DropSourceLimit);
    }
    let added = add();
    if added != Ok(true) {
        tables.give_place_back(account);
    }
    added
}

/// Adds both entries of a flow whose packets from the overlay have `tuple`. The reply's entry comes
/// first: whoever gets it in owns the translation. `false` if another CPU has just opened the flow.
#[inline(always)]
fn add<T: Tables>(
    tuple: &Tuple,
    overlay: &mut Flow,
    subnet: &Flow,
    tables: &T,
    settings: &Settings,
) -> Result<bool, Verdict> {
    let mut reply = overlay.other(Side::Overlay, tuple).1;
    if overlay.flags & Flow::SNAT == 0 {
        match tables.add_flow(Side::Subnet, &reply, subnet) {
            Ok(()) => {}
            // The remote end and an overlay address: no translated flow can have it, so it is the
            // other half of this one, left over or just made.
            Err(Refused::Exists) => {}
            Err(Refused::Full) => return Err(Verdict::DropTableFull),
        }
    } else {
        claim(&mut reply, subnet, tables, settings)?;
        overlay.port = reply.ports[1];
    }
    match tables.add_flow(Side::Overlay, tuple, overlay) {
        Ok(()) => Ok(true),
        Err(refused) => {
            if overlay.flags & Flow::SNAT != 0 {
                tables.remove_flow(Side::Subnet, &reply);
            }
            match refused {
                Refused::Exists => Ok(false),
                Refused::Full => Err(Verdict::DropTableFull),
            }
        }
    }
}

/// Adds the reply's entry of a translated flow with the first port that is free for it: its own,
/// else one of our range. `reply` has the own one before, and the one that it got after.
#[inline(always)]
fn claim<T: Tables>(
    reply: &mut Tuple,
    subnet: &Flow,
    tables: &T,
    settings: &Settings,
) -> Result<(), Verdict> {
    let own = u16::from_be_bytes(reply.ports[1]);
    let [kept_first, kept_last] = settings.kept_ports;
    let [first, last] = settings.ports;
    let keep = own >= kept_first && own <= kept_last;
    let span = u32::from(last.wrapping_sub(first)) + 1;
    let (mut place, mut step) = (0, 0);
    let mut probe = 0;
    while probe < PROBES {
        if probe > 0 || !keep {
            if step == 0 {
                place = tables.random() % span;
                // Odd, hence no port comes twice in a range of a power of two, and seldom in others.
                step = (tables.random() % span) | 1;
            }
            reply.ports[1] = (first.wrapping_add(place as u16)).to_be_bytes();
            place += step;
            if place >= span {
                place -= span;
            }
        }
        match tables.claim(reply, subnet) {
            Ok(()) => return Ok(()),
            Err(Refused::Exists) => {}
            Err(Refused::Full) => return Err(Verdict::DropTableFull),
        }
        probe += 1;
    }
    Err(Verdict::DropNatExhausted)
}

/// Judges a flow by the present tables, and finds its next hop anew. Its entry has the present
/// generation afterwards, unless the neighbour is not known.
#[inline(always)]
pub fn judge<T: Tables>(
    side: Side,
    packet: &Packet,
    entry: Entry<'_>,
    tables: &T,
) -> Result<(), Verdict> {
    let settings = tables.settings().ok_or(Verdict::DropInternal)?;
    if entry.tcp() & Flow::LOST != 0 {
        return Err(match side {
            Side::Overlay => Verdict::DropNatExhausted,
            Side::Subnet => Verdict::SlowToRouter,
        });
    }
    let generation = generation(settings);
    let tuple = packet.flow_tuple();
    let overlay = match side {
        Side::Overlay => *tuple,
        Side::Subnet => entry.other(side, tuple).1,
    };
    // A peer that is none any more is not a spoofed source, but ends alike.
    let (route, _) =
        route(Side::Overlay, &overlay, tables).map_err(|verdict| match (side, verdict) {
            (Side::Subnet, Verdict::DropSpoofed) => Verdict::PassUnrelated,
            (_, verdict) => verdict,
        })?;
    let opening = if entry.flags() & Flow::FROM_SUBNET != 0 {
        overlay.reversed()
    } else {
        overlay
    };
    entry.set_clause(tables.permits(&opening, settings)?);
    if side == Side::Subnet {
        entry.set_generation(generation);
        return Ok(());
    }
    let hop = tables.next_hop(packet, packet.header_len, settings)?;
    let link = tables.link(hop.link).ok_or({
        if entry.flags() & Flow::SNAT != 0 {
            Verdict::DropOtherLink
        } else {
            Verdict::SlowOtherLink
        }
    })?;
    entry.set_link(hop.link);
    entry.set_mtu(path_mtu(hop.mtu.min(route.mtu()), link, settings));
    if let Some(hardware) = hop.hardware {
        entry.set_hardware(hardware);
        entry.set_generation(generation);
    }
    Ok(())
}

/// Asks the kernel about the size of `packet`, where it does not tell the path's MTU (before Linux
/// 5.12), and remembers that it fits.
#[inline(always)]
pub fn probe_mtu<T: Tables>(packet: &Packet, entry: Entry<'_>, tables: &T) -> Result<(), Verdict> {
    let settings = tables.settings().ok_or(Verdict::DropInternal)?;
    let len = packet.segment_len();
    let link = tables.link(entry.link()).ok_or(Verdict::SlowOtherLink)?;
    let mut most = link.mtu;
    // Such kernels forward IPv6 whatever a route says that is not locked.
    if packet.is_v4() {
        most = most.min(route(Side::Overlay, packet.flow_tuple(), tables)?.0.mtu());
    }
    if len > most {
        return Err(Verdict::SlowMtu);
    }
    tables.next_hop(packet, len, settings)?;
    entry.set_mtu(len as u16);
    Ok(())
}

/// Notes that `packet` has passed. Writes only what differs: the entries of busy flows stay shared
/// between the CPUs' caches.
#[inline(always)]
pub(crate) fn touch<T: Tables>(
    side: Side,
    packet: &Packet,
    entry: Entry<'_>,
    tables: &T,
) -> Result<(), Verdict> {
    // An error keeps nothing alive (RFC 5508, section 3.2).
    if packet.transport == Transport::Error {
        return Ok(());
    }
    let now = tables.now();
    // Another CPU's clock may be a tick ahead.
    let rested = now.saturating_sub(entry.last_used()) > Flow::COARSE;
    if side == Side::Subnet
        && (rested || packet.tcp_flags & SYN != 0)
        && entry.flags() & Flow::SNAT != 0
        && tables.is_routers(packet, entry)
    {
        return Err(Verdict::SlowToRouter);
    }
    if rested {
        entry.set_last_used(now);
    }
    if packet.transport != Transport::Tcp {
        return Ok(());
    }
    let flags = packet.tcp_flags;
    if flags & ACK != 0 && entry.acknowledged() != packet.sequence[1] {
        entry.set_acknowledged(packet.sequence[1]);
    }
    let seen = entry.tcp();
    // All is well as long as acknowledgements come.
    if flags & (SYN | FIN | RST) == 0 && seen & (Flow::ACK | Flow::RST) == Flow::ACK {
        return Ok(());
    }
    let begins = flags & (SYN | ACK) == SYN && seen != 0;
    let resets = (flags & RST != 0 || begins) && tables.look_across(side, packet, entry);
    let now = seen_after(seen, flags, resets);
    if now != seen {
        entry.set_tcp(now);
    }
    Ok(())
}

/// Whether `packet`, of the subnet side and of a translated flow, is for the router itself: for a socket
/// that has got the flow's port later, or for a connection that connection tracking translates to it.
/// Asked about each SYN and about one packet each second, for what else comes in between is most likely
/// the flow's.
#[inline(always)]
pub fn is_routers<T: Tables>(packet: &Packet, entry: Entry<'_>, tables: &T) -> bool {
    let tuple = packet.flow_tuple();
    let (side, across) = entry.other(Side::Subnet, tuple);
    let has_socket = tables.is_socket(tuple);
    if packet.transport != Transport::Tcp {
        if has_socket {
            // So that the next one is asked about as well: such a socket may be gone soon.
            entry.set_last_used(0);
        }
        return has_socket;
    }
    let Some(other) = tables.flow(side, &across) else {
        return has_socket;
    };
    // An end that has long acknowledged waits for no answer to a SYN, but for one that is sent again.
    let late = other.acknowledged().wrapping_sub(packet.sequence[0]);
    let answers_another = packet.tcp_flags & (SYN | ACK | RST) == SYN | ACK
        && other.tcp() & Flow::ACK != 0
        && late >= RESET_WINDOW;
    if !has_socket && !answers_another {
        return false;
    }
    for direction in [entry, other] {
        direction.set_tcp(Flow::LOST);
        direction.set_last_used(0);
        // Each packet is judged, see `judge`.
        direction.set_generation(0);
    }
    true
}

/// [`Flow::tcp`] of a direction after a segment with `flags`.
#[inline(always)]
fn seen_after(seen: u8, flags: u8, resets: bool) -> u8 {
    if flags & RST != 0 {
        return if resets { seen | Flow::RST } else { seen };
    }
    if flags & SYN != 0 {
        // The first of a connection, be it with the ports of one that ended.
        return Flow::SYN;
    }
    let mut now = seen & !Flow::RST;
    if flags & FIN != 0 {
        now |= Flow::FIN;
    }
    if flags & ACK != 0 {
        now |= Flow::ACK;
    }
    now
}

/// What a segment that begins or breaks off a connection is to the other direction. A SYN, once more
/// from the same port, has both forget what was before. Of an RST it tells whether the other end will
/// believe it: its sequence number is where that end waits, or a little behind (RFC 5961, section 3.2,
/// as far as one in the middle can tell).
#[inline(always)]
pub fn look_across<T: Tables>(side: Side, packet: &Packet, entry: Entry<'_>, tables: &T) -> bool {
    let (side, tuple) = entry.other(side, packet.flow_tuple());
    let Some(other) = tables.flow(side, &tuple) else {
        return true;
    };
    if packet.tcp_flags & RST == 0 {
        other.set_tcp(0);
        for direction in [entry, other] {
            direction.set_acknowledged(0);
        }
        return false;
    }
    // An end that never acknowledged waits for whatever answers its SYN.
    other.acknowledged() == 0
        || packet.sequence[0].wrapping_sub(other.acknowledged()) < RESET_WINDOW
}

#[cfg(test)]
mod tests;

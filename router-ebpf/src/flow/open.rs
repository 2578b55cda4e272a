//! The first packet of a flow opens it.

use core::mem::MaybeUninit;

use super::external;
use super::judge::{generation, path_mtu};
use crate::abi::{Account, Flow, Route, Settings, Side, Tuple};
use crate::opening;
use crate::packet::{Packet, Transport};
use crate::route;
use crate::tables::{Refused, Tables};
use crate::verdict::Verdict;

/// Ports that a new translated flow tries at most.
const PROBES: u32 = 32;

/// A flow in the making; too large for the stack of a program.
#[derive(Default)]
pub struct Draft {
    overlay: Flow,
    subnet: Flow,
    /// That of packets from the overlay.
    tuple: Tuple,
    /// That of the answers. Here, where the verifier does not follow it: on the stack it would go through
    /// [`claim`] once for each way to make it.
    reply: Tuple,
    /// Who opens it, and all of that side, if it is the subnet's.
    accounts: [Account; 2],
    /// Number of the clause of the policy that lets it through.
    clause: u16,
}

/// As `*to = *from`, word by word as in [`clear`].
#[inline(always)]
fn copy(from: &Tuple, to: &mut Tuple) {
    const WORDS: usize = size_of::<Tuple>() / size_of::<u64>();
    let from = core::ptr::from_ref(from).cast::<MaybeUninit<u64>>();
    let to = core::ptr::from_mut(to).cast::<MaybeUninit<u64>>();
    let mut word = 0;
    while word < WORDS {
        // SAFETY: both are as long, and aligned so; what is padding may stay without a value.
        unsafe { to.add(word).write_volatile(from.add(word).read_volatile()) };
        word += 1;
    }
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

/// Judges the flow that `packet` is the first of, and fills `draft`, of which [`enter`] opens it.
#[inline(always)]
pub fn draft<T: Tables>(
    side: Side,
    packet: &Packet,
    tables: &T,
    draft: &mut Draft,
) -> Result<(), Verdict> {
    let settings = tables.settings().ok_or(Verdict::DropInternal)?;
    let generation = generation(settings);
    let tuple = &packet.tuple;
    let (route, peer) = route::between(side, tuple, tables)?;
    match packet.transport {
        Transport::Error => return Err(Verdict::SlowNoFlow),
        Transport::Fragment => return Err(Verdict::DropFragment),
        _ => {}
    }
    if packet.ttl <= 1 {
        return Err(Verdict::SlowTtl);
    }
    let snat = route.flags & Route::SNAT != 0;
    if snat && packet.is_underway(side) {
        return Err(Verdict::SlowNoFlow);
    }
    let class = opening::class(side, &peer, settings);
    draft.clause = tables.permits(class, tuple, settings)?;
    let hop = tables.next_hop(packet, packet.header_len, settings)?;
    let now = tables.now();
    let Draft {
        overlay,
        subnet,
        tuple: forward,
        accounts: [opener, all],
        ..
    } = draft;
    for entry in [&mut *overlay, &mut *subnet] {
        clear(entry);
        entry.last_used = now;
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
            if hop.resolved {
                overlay.hardware = hop.hardware.0;
                overlay.generation = generation;
            }
            subnet.address = tuple.source.octets;
            subnet.port = tuple.ports[0];
            if snat {
                overlay.flags = Flow::SNAT;
                subnet.flags = Flow::SNAT;
                external::choose(tuple, &hop, link, tables, overlay)?;
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
    if side == Side::Subnet {
        *forward = tuple.reversed();
        *opener = Account::host(&tuple.source);
        *all = Account::subnet(&tuple.source);
    } else {
        copy(tuple, forward);
        *opener = Account::peer(peer.peer, &tuple.source);
    }
    Ok(())
}

/// Opens the flow of `draft`, which was made for a packet of `side`: counts it, and adds its entries.
#[inline(always)]
pub fn enter<T: Tables>(side: Side, draft: &mut Draft, tables: &T) -> Result<(), Verdict> {
    let settings = tables.settings().ok_or(Verdict::DropInternal)?;
    // Not earlier: what the kernel carries, it knows whether that is new.
    if settings.flags & Settings::DRAINING != 0 {
        return Err(Verdict::DropDraining);
    }
    let from_subnet = side == Side::Subnet;
    if from_subnet && !tables.take_place(&draft.accounts[1], settings.flows_from_subnet) {
        return Err(Verdict::DropSourceLimit);
    }
    let (mut is_new, mut outcome) = (false, Err(Verdict::DropSourceLimit));
    if tables.take_place(&draft.accounts[0], settings.flows_per_source) {
        outcome = add(draft, tables, settings, &mut is_new);
        if !is_new {
            tables.give_place_back(&draft.accounts[0]);
        }
    }
    if from_subnet && !is_new {
        tables.give_place_back(&draft.accounts[1]);
    }
    outcome?;
    tables.count_clause(draft.clause, settings);
    Ok(())
}

/// Adds both entries of a flow. The reply's comes first: whoever gets it in owns the translation.
/// `is_new` stays `false` if another CPU has just opened the flow. By itself, for the verifier refuses
/// what LLVM makes of an error that may hold one.
#[inline(always)]
fn add<T: Tables>(
    draft: &mut Draft,
    tables: &T,
    settings: &Settings,
    is_new: &mut bool,
) -> Result<(), Verdict> {
    let Draft {
        overlay,
        subnet,
        tuple,
        reply,
        ..
    } = draft;
    *reply = overlay.other(Side::Overlay, tuple).1;
    if overlay.flags & Flow::SNAT == 0 {
        match tables.add_flow(Side::Subnet, reply, subnet) {
            Ok(()) => {}
            // The remote end and an overlay address: no translated flow can have it, so it is the
            // other half of this one, left over or just made.
            Err(Refused::Exists) => {}
            Err(Refused::Full) => return Err(Verdict::DropTableFull),
        }
    } else {
        claim(reply, subnet, tables, settings)?;
        overlay.port = reply.ports[1];
    }
    match tables.add_flow(Side::Overlay, tuple, overlay) {
        Ok(()) => {
            *is_new = true;
            Ok(())
        }
        Err(refused) => {
            if overlay.flags & Flow::SNAT != 0 {
                tables.remove_flow(Side::Subnet, reply);
            }
            match refused {
                Refused::Exists => Ok(()),
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
    if keep {
        match tables.claim(reply, subnet) {
            Ok(()) => return Ok(()),
            Err(Refused::Exists) => {}
            Err(Refused::Full) => return Err(Verdict::DropTableFull),
        }
    }
    let span = u32::from(last.wrapping_sub(first)) + 1;
    let mut place = tables.random() % span;
    // Odd, hence no port comes twice in a range of a power of two, and seldom in others.
    let step = (tables.random() % span) | 1;
    let mut probe = u32::from(keep);
    while probe < PROBES {
        reply.ports[1] = (first.wrapping_add(place as u16)).to_be_bytes();
        match tables.claim(reply, subnet) {
            Ok(()) => return Ok(()),
            Err(Refused::Exists) => {}
            Err(Refused::Full) => return Err(Verdict::DropTableFull),
        }
        place += step;
        if place >= span {
            place -= span;
        }
        probe += 1;
    }
    Err(Verdict::DropNatExhausted)
}

//! Flows by the present tables: whether they may go on, and where.

use crate::abi::{Flow, Link, Settings, Side};
use crate::entry::Entry;
use crate::opening;
use crate::packet::Packet;
use crate::route;
use crate::tables::Tables;
use crate::verdict::Verdict;

/// The generation of the tables, read before anything is looked up in them: what is judged while they
/// change is judged again. Volatile, or the compiler might read it anew when it is written down.
#[inline(always)]
pub(super) fn generation(settings: &Settings) -> u32 {
    // SAFETY: the reference is to a valid place.
    unsafe { (&raw const settings.generation).read_volatile() }
}

/// The MTU that an entry keeps. Where the kernel tells none, it is the largest size that has
/// passed, see [`probe_mtu`]; every path carries the smallest IPv4 MTU (RFC 791).
#[inline(always)]
pub(super) fn path_mtu(path: u32, link: &Link, settings: &Settings) -> u16 {
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
    let (route, peer) =
        route::between(Side::Overlay, &overlay, tables).map_err(|verdict| {
            match (side, verdict) {
                (Side::Subnet, Verdict::DropSpoofed) => Verdict::PassUnrelated,
                (_, verdict) => verdict,
            }
        })?;
    let (opener, first) = if entry.flags() & Flow::FROM_SUBNET != 0 {
        (Side::Subnet, overlay.reversed())
    } else {
        (Side::Overlay, overlay)
    };
    let class = opening::class(opener, &peer, settings);
    tables.permits(class, &first, settings)?;
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
    if hop.resolved {
        entry.set_hardware(&hop.hardware);
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
        most = most.min(
            route::between(Side::Overlay, packet.flow_tuple(), tables)?
                .0
                .mtu(),
        );
    }
    if len > most {
        return Err(Verdict::SlowMtu);
    }
    tables.next_hop(packet, len, settings)?;
    entry.set_mtu(len as u16);
    Ok(())
}

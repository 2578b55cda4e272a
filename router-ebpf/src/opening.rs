//! What the policy says of a packet that the kernel gets, were it the first of a flow.
//!
//! Only connection tracking knows whether it is. So the programs judge every such packet and tell by its
//! mark, and the kernel's ruleset asks about new ones alone: the policy stands once.

use crate::abi::{Overlay, Prefix, Settings, Side};
use crate::frame::{Bytes, Frame};
use crate::packet::{IPV6_FRAGMENT, Packet, TCP, Transport, UDP};
use crate::policy::BY_ADDRESS;
use crate::tables::Tables;

/// No rule lets the packet begin a flow.
pub const DENIED: u32 = 0;
/// Some rule does, or there are none about it.
pub const PERMITTED: u32 = 1;
/// No rule does, but it may be of a flow that the other end has opened and that nobody remembers: its sender
/// is told nothing, for with one more packet from there the flow goes on.
pub const SILENT: u32 = 2;

/// IPv6 extension headers that are looked through; a packet with more is denied.
const MOST_HEADERS: u32 = 4;

/// The class by which the policy judges what the program of `opener` sees first, with `peer` at the overlay's
/// end.
#[inline(always)]
pub fn class(opener: Side, peer: &Overlay, settings: &Settings) -> u32 {
    match opener {
        Side::Overlay => peer.class(settings.bank),
        Side::Subnet => BY_ADDRESS,
    }
}

/// What the policy says of `packet`, which the kernel gets from the program of `side`: [`DENIED`] or
/// [`PERMITTED`]. Finds ports behind options in place: there is no room for another tuple on the stack (Linux
/// 5.10 adds up those of all functions that are called).
#[inline(always)]
pub fn opening<F: Frame, T: Tables>(side: Side, packet: &mut Packet, frame: &F, tables: &T) -> u32 {
    let Some(settings) = tables.settings() else {
        return DENIED;
    };
    if packet.transport == Transport::Options && !find_ports(packet, frame) {
        return DENIED;
    }
    let overlay = match side {
        Side::Overlay => &packet.tuple.source,
        Side::Subnet => &packet.tuple.destination,
    };
    let Some(peer) = tables.peer(&Prefix::host(*overlay)) else {
        return DENIED;
    };
    let class = class(side, peer, settings);
    match tables.permits(class, &packet.tuple, settings) {
        Ok(_) => PERMITTED,
        Err(_) => DENIED,
    }
}

/// The same of a packet that is [`DENIED`], if it is not to be [`SILENT`].
#[inline(always)]
pub fn denied<T: Tables>(side: Side, packet: &Packet, tables: &T) -> u32 {
    match tables.settings() {
        Some(settings) if other_end_may(side, packet, tables, settings) => SILENT,
        _ => DENIED,
    }
}

/// Whether `packet` cannot be the first of a flow, but its other end may open the one that it would be of.
#[inline(always)]
pub(crate) fn other_end_may<T: Tables>(
    side: Side,
    packet: &Packet,
    tables: &T,
    settings: &Settings,
) -> bool {
    if !packet.is_underway(side) {
        return false;
    }
    // Of what comes from a peer the other end may be another one.
    let class = match tables.peer(&Prefix::host(packet.tuple.destination)) {
        Some(peer) => peer.class(settings.bank),
        None => BY_ADDRESS,
    };
    let turned = packet.tuple.reversed();
    tables.permits(class, &turned, settings).is_ok()
}

/// Finds protocol and ports behind IPv4 options or IPv6 extension headers.
#[inline(always)]
fn find_ports<F: Frame>(packet: &mut Packet, frame: &F) -> bool {
    let mut at = packet.transport_at;
    let v4 = packet.is_v4();
    let tuple = &mut packet.tuple;
    if !v4 {
        let mut turn = 0;
        while turn < MOST_HEADERS {
            let Some(Bytes([next, len])) = frame.read::<2>(at) else {
                return false;
            };
            match tuple.protocol {
                // Hop-by-hop, routing, destination options, mobility, HIP, shim6.
                0 | 43 | 60 | 135 | 139 | 140 => at += 8 * (u32::from(len) + 1),
                IPV6_FRAGMENT => at += 8,
                _ => break,
            }
            tuple.protocol = next;
            turn += 1;
        }
    }
    match tuple.protocol {
        TCP | UDP => match frame.read::<4>(at) {
            Some(Bytes([a, b, c, d])) => {
                tuple.ports = [[a, b], [c, d]];
                true
            }
            None => false,
        },
        0 | 43 | 60 | 135 | 139 | 140 | IPV6_FRAGMENT => false,
        _ => true,
    }
}

#[cfg(test)]
mod tests;

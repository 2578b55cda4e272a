//! What the packets of a flow tell of its life.

use crate::abi::{Flow, Side};
use crate::entry::Entry;
use crate::packet::{ACK, FIN, Packet, RST, SYN, Transport};
use crate::steps::Steps;
use crate::tables::Tables;
use crate::verdict::Verdict;

/// How far in bytes behind the last acknowledgement an RST is believed: what may be on the way.
const RESET_WINDOW: u32 = 1 << 20;

/// Notes that `packet` has passed. Writes only what differs: the entries of busy flows stay shared
/// between the CPUs' caches.
#[inline(always)]
pub(crate) fn touch<S: Steps>(
    side: Side,
    packet: &Packet,
    entry: Entry<'_>,
    steps: &S,
) -> Result<(), Verdict> {
    // An error keeps nothing alive (RFC 5508, section 3.2).
    if packet.transport == Transport::Error {
        return Ok(());
    }
    let now = steps.now();
    // Another CPU's clock may be a tick ahead.
    let rested = now.saturating_sub(entry.last_used()) > Flow::COARSE;
    if side == Side::Subnet
        && (rested || packet.tcp_flags & SYN != 0)
        && entry.flags() & Flow::SNAT != 0
        && steps.is_routers(packet, entry)
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
    let resets = (flags & RST != 0 || begins) && steps.look_across(side, packet, entry);
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

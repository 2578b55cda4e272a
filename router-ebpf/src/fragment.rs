//! Fragments: the first of a packet has the ports, and the others follow it.

use crate::abi::{Fragment, FragmentKey, Route, Side};
use crate::decide::Tables;
use crate::flow;
use crate::packet::Packet;
use crate::verdict::Verdict;

#[inline(always)]
fn key(side: Side, packet: &Packet) -> FragmentKey {
    let tuple = &packet.tuple;
    FragmentKey {
        source: tuple.source.octets,
        destination: tuple.destination.octets,
        id: packet.id,
        protocol: tuple.protocol,
        side: side as u8,
        family: tuple.source.family[0],
        reserved: 0,
    }
}

/// What is known of the packet that has `key`.
#[inline(always)]
fn known<T: Tables>(key: &FragmentKey, tables: &T) -> Option<Fragment> {
    let fragment = tables.fragment(key)?;
    let age = Fragment::stamp(tables.now()).wrapping_sub(fragment.since);
    // Another CPU's clock may be a tick ahead.
    (age.wrapping_add(Fragment::LASTS) <= 2 * Fragment::LASTS).then_some(fragment)
}

/// Gives [`Packet::flow`] the ports of the packet that `packet` is a later fragment of; `true` if the kernel
/// gets all of it.
#[inline(always)]
pub fn follow<T: Tables>(side: Side, packet: &mut Packet, tables: &T) -> Result<bool, Verdict> {
    let key = key(side, packet);
    if let Some(fragment) = known(&key, tables) {
        if fragment.flags & Fragment::EARLY != 0 {
            return Err(Verdict::SlowFragment);
        }
        packet.flow = packet.tuple;
        packet.flow.ports = fragment.ports;
        return Ok(fragment.flags & Fragment::STACK != 0);
    }
    // It came before the first one.
    let (route, _) = flow::route(side, &packet.tuple, tables)?;
    if side == Side::Overlay && route.flags & Route::SNAT != 0 {
        // By the time that the ports are known, the kernel would have it under another port.
        return Err(Verdict::DropFragment);
    }
    tables.add_fragment(
        &key,
        Fragment {
            flags: Fragment::STACK | Fragment::EARLY,
            since: Fragment::stamp(tables.now()),
            ..Fragment::default()
        },
    );
    Err(Verdict::SlowFragment)
}

/// Remembers the ports of the first fragment `packet`, and whether the kernel gets all fragments.
#[inline(always)]
pub fn lead<T: Tables>(
    side: Side,
    packet: &Packet,
    tables: &T,
    translated: bool,
    stack: bool,
) -> Result<(), Verdict> {
    let key = key(side, packet);
    let early = known(&key, tables).is_some_and(|fragment| fragment.flags & Fragment::EARLY != 0);
    if early && !translated {
        return Err(Verdict::SlowFragment);
    }
    let flags = if stack { Fragment::STACK } else { 0 };
    tables.add_fragment(
        &key,
        Fragment {
            ports: packet.tuple.ports,
            flags,
            since: Fragment::stamp(tables.now()),
        },
    );
    Ok(())
}

#[cfg(test)]
mod tests;

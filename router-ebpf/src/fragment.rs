//! Fragments: the first of a packet has the ports, and the others follow it.

use crate::abi::{Flow, Fragment, FragmentKey, Route, Side, Tuple};
use crate::entry::Entry;
use crate::packet::Packet;
use crate::route;
use crate::tables::Tables;
use crate::verdict::Verdict;

/// The key of the fragments that the program of `side` sees with these addresses, or lets out.
#[inline(always)]
pub(crate) fn key(side: Side, tuple: &Tuple, id: [u8; 4]) -> FragmentKey {
    FragmentKey {
        source: tuple.source.octets,
        destination: tuple.destination.octets,
        id,
        protocol: tuple.protocol,
        side: side as u8,
        family: tuple.source.family[0],
        reserved: 0,
    }
}

/// What is known of the packet that has `key`.
#[inline(always)]
pub(crate) fn known<T: Tables>(key: &FragmentKey, tables: &T) -> Option<Fragment> {
    let fragment = tables.fragment(key)?;
    let age = Fragment::stamp(tables.now()).wrapping_sub(fragment.since);
    // Another CPU's clock may be a tick ahead.
    (age.wrapping_add(Fragment::LASTS) <= 2 * Fragment::LASTS).then_some(fragment)
}

/// Gives [`Packet::flow`] the ports of the packet that `packet` is a later fragment of; `true` if the kernel
/// gets all of it.
#[inline(always)]
pub fn follow<T: Tables>(side: Side, packet: &mut Packet, tables: &T) -> Result<bool, Verdict> {
    let key = key(side, &packet.tuple, packet.id);
    if let Some(fragment) = known(&key, tables) {
        if fragment.flags & Fragment::EARLY != 0 {
            return Err(Verdict::SlowFragment);
        }
        packet.flow = packet.tuple;
        packet.flow.ports = fragment.ports;
        return Ok(fragment.flags & Fragment::STACK != 0);
    }
    // It came before the first one.
    let (route, _) = route::between(side, &packet.tuple, tables)?;
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

/// Remembers the ports of the first fragment `packet` of the flow `entry`, and whether the kernel gets all
/// fragments. Of a translated packet also as it leaves: so an error may quote a later fragment.
#[inline(always)]
pub fn lead<T: Tables>(
    side: Side,
    packet: &Packet,
    entry: Entry<'_>,
    tables: &T,
    stack: bool,
) -> Result<(), Verdict> {
    let tuple = &packet.tuple;
    let translated = entry.flags() & Flow::SNAT != 0;
    let seen = key(side, tuple, packet.id);
    let early = known(&seen, tables).is_some_and(|fragment| fragment.flags & Fragment::EARLY != 0);
    if early && !translated {
        return Err(Verdict::SlowFragment);
    }
    let flags = if stack { Fragment::STACK } else { 0 };
    let fragment = Fragment {
        ports: tuple.ports,
        flags,
        since: Fragment::stamp(tables.now()),
    };
    tables.add_fragment(&seen, fragment);
    if translated {
        let left = entry.other(side, tuple).1.reversed();
        let ports = left.ports;
        let left = key(side, &left, packet.id);
        tables.add_fragment(&left, Fragment { ports, ..fragment });
    }
    Ok(())
}

#[cfg(test)]
mod tests;

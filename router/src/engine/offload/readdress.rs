//! Packets whose one address becomes another.

use crate::engine::offload::carried::{Carried, Fragment, MORE, OFFSET, v4_header};
use crate::engine::offload::change::Delta;
use crate::engine::offload::ip::{ICMPV6, TCP, UDP};

/// Changes one address of a packet whose length is right, and its checksums: the source or the destination, to one of
/// the same family. What an ICMP error quotes stays (so does Tailscale's client).
pub(crate) fn readdress(
    packet: &mut [u8],
    source: bool,
    address: &[u8],
    partial: bool,
) -> Option<()> {
    let version = packet.first()? >> 4;
    let (place, carried) = match version {
        4 => {
            let (head, start) = v4_header(packet)?;
            let place = u16::from_be_bytes([head[6], head[7]]);
            let fragment = (place & (OFFSET | MORE) != 0).then_some(Fragment {
                offset: place & OFFSET,
                more: place & MORE != 0,
                id: 0,
            });
            let carried = Carried {
                protocol: head[9],
                start,
                fragment,
            };
            (if source { 12 } else { 16 }, carried)
        }
        6 => (if source { 8 } else { 24 }, Carried::of(packet)?),
        _ => return None,
    };
    let width = if version == 4 { 4 } else { 16 };
    let mut old = [0; 16];
    let old = old.get_mut(..width)?;
    old.copy_from_slice(packet.get(place..place + width)?);
    packet[place..place + width].copy_from_slice(address.get(..width)?);
    let delta = Delta::default()
        .without(old)
        .with(&packet[place..place + width]);
    if version == 4 {
        delta.complete(&mut packet[10..12]);
    }
    let field = match carried.protocol {
        _ if !carried.is_first() => return Some(()),
        TCP => 16,
        UDP => 6,
        ICMPV6 => 2,
        _ => return Some(()),
    };
    let at = carried.start + field;
    let field = packet.get_mut(at..at + 2)?;
    if partial {
        delta.partial(field);
    } else if carried.protocol != UDP || field != [0, 0] {
        delta.complete(field);
        if carried.protocol == UDP && field == [0, 0] {
            field.fill(0xff);
        }
    }
    Some(())
}

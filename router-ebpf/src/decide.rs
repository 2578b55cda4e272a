//! What becomes of a parsed packet. No packet byte is changed here.

use crate::abi::{Flow, Prefix, Settings, Side};
use crate::flow;
use crate::forward::{Answer, Exit, Forward};
use crate::fragment;
use crate::frame::Frame;
use crate::icmp;
use crate::packet::{Packet, Transport};
use crate::route;
use crate::steps::Steps;
use crate::tables::Tables;
use crate::verdict::Verdict;

/// Decides about `packet` in the program of `side`; all of `forward` is filled unless it fails.
#[inline(always)]
pub fn decide<F: Frame, S: Steps>(
    side: Side,
    packet: &mut Packet,
    frame: &F,
    steps: &S,
    forward: &mut Forward,
) -> Result<(), S::Stop> {
    let settings = steps.settings().ok_or(Verdict::DropInternal)?;
    let mut through_stack = false;
    match packet.transport {
        Transport::Tcp | Transport::Udp | Transport::Echo => {}
        _ => through_stack = steps.find_flow(side, packet, frame)?,
    }
    let packet = &*packet;
    let tuple = packet.flow_tuple();

    let entry = match steps.flow(side, tuple) {
        Some(entry) => entry,
        None => {
            // Soon said of the underlay, which on many routers is most of what comes in here.
            if side == Side::Subnet
                && steps
                    .peer(&Prefix::host(packet.tuple.destination))
                    .is_none()
            {
                return Err(Verdict::PassUnrelated.into());
            }
            steps.open(side, packet)?;
            steps.flow(side, tuple).ok_or(Verdict::DropInternal)?
        }
    };
    if entry.generation() != settings.generation {
        steps.judge(side, packet, entry)?;
    }
    let translated = entry.flags() & Flow::SNAT != 0;
    forward.verdict = Verdict::Forwarded;
    forward.mtu = match side {
        Side::Overlay => u32::from(entry.mtu()),
        Side::Subnet => settings.mtu,
    };
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
            _ => Err(Verdict::SlowTtl.into()),
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
                return Err(Verdict::SlowNoNeighbour.into());
            };
        }
    }
    if packet.segment_len() > forward.mtu || through_stack {
        if side == Side::Overlay && settings.flags & Settings::FIB_MTU == 0 && !through_stack {
            match steps.probe_mtu(packet, entry) {
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
        steps.lead(side, packet, entry, forward.exit == Exit::Stack)?;
    }
    if forward.exit == Exit::Answer {
        return Ok(());
    }
    flow::touch(side, packet, entry, steps)?;
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
    Err(route::refuse(side, packet, tables, verdict))
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

#[cfg(test)]
mod tests;

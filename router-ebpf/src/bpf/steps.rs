//! The rare steps of a decision, each a global function.

use aya_ebpf::programs::TcContext;
use aya_log_ebpf::macro_support::{Level, level_enabled};
use aya_log_ebpf::trace;
use router_ebpf::abi::Side;
use router_ebpf::decide;
use router_ebpf::flow;
use router_ebpf::tables::Tables as _;
use router_ebpf::verdict::Verdict;
use router_ebpf::{answer, fragment, icmp, mss, opening};

use super::maps;
use super::skb::Skb;
use super::tables::Maps;
use super::work::{global, number, result, side};

/// Done already: the flow was found.
pub(crate) const FOUND: u32 = 1 << 30;
/// With [`FOUND`]: the kernel gets all of a fragmented packet.
pub(crate) const THROUGH_STACK: u32 = 1 << 31;

global! {
    /// [`decide::find_flow`].
    sluice_find_flow(ctx, work, from) {
        let side = side(from);
        let skb = Skb::at(ctx, side);
        match decide::find_flow(side, &mut work.packet, &skb, &Maps::new(ctx)) {
            Ok(false) => FOUND,
            Ok(true) => FOUND | THROUGH_STACK,
            Err(verdict) => number(Err(verdict)),
        }
    }

    /// [`flow::draft`].
    sluice_draft(ctx, work, from) {
        number(flow::draft(side(from), &work.packet, &Maps::new(ctx), &mut work.draft))
    }

    /// [`flow::enter`].
    sluice_enter(ctx, work, from) {
        number(flow::enter(side(from), &mut work.draft, &Maps::new(ctx)))
    }

    /// [`flow::judge`].
    sluice_judge(ctx, work, from) {
        let (maps, side) = (Maps::new(ctx), side(from));
        let Some(entry) = maps.flow(side, work.packet.flow_tuple()) else {
            return number(Err(Verdict::DropInternal));
        };
        number(flow::judge(side, &work.packet, entry, &maps))
    }

    /// [`flow::probe_mtu`].
    sluice_probe_mtu(ctx, work) {
        let maps = Maps::new(ctx);
        let Some(entry) = maps.flow(Side::Overlay, work.packet.flow_tuple()) else {
            return number(Err(Verdict::DropInternal));
        };
        number(flow::probe_mtu(&work.packet, entry, &maps))
    }

    /// [`flow::look_across`]; not zero if that is true.
    sluice_look_across(ctx, work, from) {
        let (maps, side) = (Maps::new(ctx), side(from));
        match maps.flow(side, work.packet.flow_tuple()) {
            Some(entry) => flow::look_across(side, &work.packet, entry, &maps).into(),
            None => 0,
        }
    }

    /// [`flow::is_routers`]; not zero if it is.
    sluice_is_routers(ctx, work) {
        let maps = Maps::new(ctx);
        match maps.flow(Side::Subnet, work.packet.flow_tuple()) {
            Some(entry) => flow::is_routers(&work.packet, entry, &maps).into(),
            None => 0,
        }
    }

    /// [`decide::is_judged`] for the verdict of this number; not zero if it is.
    sluice_is_judged(ctx, work, from, verdict) {
        match result(verdict + 1) {
            Err(verdict) => {
                decide::is_judged(side(from), verdict, &work.packet, &Maps::new(ctx)).into()
            }
            Ok(()) => 0,
        }
    }

    /// [`opening::opening`].
    sluice_opening(ctx, work, from) {
        let side = side(from);
        opening::opening(side, &mut work.packet, &Skb::at(ctx, side), &Maps::new(ctx))
    }

    /// [`opening::denied`].
    sluice_denied_opening(ctx, work, from) {
        opening::denied(side(from), &work.packet, &Maps::new(ctx))
    }

    /// [`fragment::lead`].
    sluice_lead(ctx, work, from, stack) {
        let (maps, side) = (Maps::new(ctx), side(from));
        let Some(entry) = maps.flow(side, work.packet.flow_tuple()) else {
            return number(Err(Verdict::DropInternal));
        };
        number(fragment::lead(side, &work.packet, entry, &maps, stack != 0))
    }

    /// [`mss::clamp`] with the packet's TCP header, to [`mss::limit`].
    sluice_clamp_mss(ctx, work, from) {
        let packet = &work.packet;
        let limit = match mss::limit(side(from), packet, &work.forward, &Maps::new(ctx)) {
            Ok(limit) => limit,
            Err(verdict) => return number(Err(verdict)),
        };
        // What every header keeps to, told to the verifier.
        let (tcp, header_len) = (packet.transport_at & 63, packet.transport_len & 63);
        let skb = &mut Skb::at(ctx, side(from));
        number(mss::clamp(skb, tcp, header_len, limit, &mut work.options))
    }

    /// [`icmp::translate_quote`].
    sluice_translate_quote(ctx, work, from) {
        let side = side(from);
        let nat = &work.forward.nat;
        number(icmp::translate_quote(side, &work.packet, nat, &mut Skb::at(ctx, side)))
    }

    /// Tells user space of the packet, whose verdict is this number.
    sluice_denied(ctx, work, from, verdict) {
        maps::tell_denied(side(from), verdict, &work.packet, Maps::new(ctx).now());
        0
    }

    /// [`answer::reject`].
    sluice_reject(ctx, work, from) {
        number(answer::reject(side(from), &work.packet, &Maps::new(ctx), &mut work.forward))
    }

    /// Logs what became of the packet; `end`: the verdict, see [`log`].
    sluice_log(ctx, work, from, end) {
        let packet = &work.packet;
        let side = match side(from) {
            Side::Overlay => "from_overlay",
            Side::Subnet => "from_subnet",
        };
        let Some(label) = LABELS.get(end as usize) else {
            return 0;
        };
        // SAFETY: what is ASCII is UTF-8.
        let label = unsafe { core::str::from_utf8_unchecked(label) };
        let tuple = &packet.tuple;
        let [source_port, port] = tuple.ports.map(u16::from_be_bytes);
        let (protocol, len) = (tuple.protocol, packet.len);
        if tuple.source.is_v4() {
            let (source, destination) = (tuple.source.v4_octets(), tuple.destination.v4_octets());
            trace!(
                ctx,
                target: "packets",
                "{} {} {:i} {} > {:i} {} protocol {} {} bytes",
                side, label, source, source_port, destination, port, protocol, len
            );
        } else {
            trace!(
                ctx,
                target: "packets",
                "{} {} {:i} {} > {:i} {} protocol {} {} bytes",
                side, label, tuple.source.octets, source_port, tuple.destination.octets, port,
                protocol, len
            );
        }
        0
    }

    /// [`answer::send`].
    sluice_answer(ctx, work, from) {
        number(answer::send(&work.packet, &work.forward, &mut Skb::at(ctx, side(from))))
    }
}

/// The labels of the verdicts, of one length: the verifier follows no other.
static LABELS: [[u8; 24]; Verdict::ALL.len()] = {
    let mut labels = [[b' '; 24]; Verdict::ALL.len()];
    let mut verdict = 0;
    while verdict < labels.len() {
        let label = Verdict::ALL[verdict].label().as_bytes();
        let mut at = 0;
        while at < label.len() {
            labels[verdict][at] = label[at];
            at += 1;
        }
        verdict += 1;
    }
    labels
};

/// [`FOUND`], with or without [`THROUGH_STACK`]; else as [`number`].
#[inline(always)]
pub(crate) fn find_flow(ctx: &TcContext, side: Side) -> u32 {
    // SAFETY: the program's own context, and an attempt has filled the place of its work. So in all
    // functions below.
    unsafe { sluice_find_flow(ctx.skb.skb, side as u32) }
}

#[inline(always)]
pub(crate) fn open(ctx: &TcContext, side: Side) -> Result<(), Verdict> {
    // SAFETY: as above.
    unsafe {
        result(sluice_draft(ctx.skb.skb, side as u32))?;
        result(sluice_enter(ctx.skb.skb, side as u32))
    }
}

#[inline(always)]
pub(crate) fn judge(ctx: &TcContext, side: Side) -> Result<(), Verdict> {
    // SAFETY: as above.
    result(unsafe { sluice_judge(ctx.skb.skb, side as u32) })
}

#[inline(always)]
pub(crate) fn translate_quote(ctx: &TcContext, side: Side) -> Result<(), Verdict> {
    // SAFETY: as above.
    result(unsafe { sluice_translate_quote(ctx.skb.skb, side as u32) })
}

#[inline(always)]
pub(crate) fn reject(ctx: &TcContext, side: Side) -> Result<(), Verdict> {
    // SAFETY: as above.
    result(unsafe { sluice_reject(ctx.skb.skb, side as u32) })
}

#[inline(always)]
pub(crate) fn answer(ctx: &TcContext, side: Side) -> Result<(), Verdict> {
    // SAFETY: as above.
    result(unsafe { sluice_answer(ctx.skb.skb, side as u32) })
}

#[inline(always)]
pub(crate) fn probe_mtu(ctx: &TcContext) -> Result<(), Verdict> {
    // SAFETY: as above.
    result(unsafe { sluice_probe_mtu(ctx.skb.skb) })
}

#[inline(always)]
pub(crate) fn look_across(ctx: &TcContext, side: Side) -> bool {
    // SAFETY: as above.
    unsafe { sluice_look_across(ctx.skb.skb, side as u32) != 0 }
}

#[inline(always)]
pub(crate) fn is_routers(ctx: &TcContext) -> bool {
    // SAFETY: as above.
    unsafe { sluice_is_routers(ctx.skb.skb) != 0 }
}

/// [`decide::is_judged`].
#[inline(always)]
pub(crate) fn is_judged(ctx: &TcContext, side: Side, verdict: Verdict) -> bool {
    // SAFETY: as above.
    unsafe { sluice_is_judged(ctx.skb.skb, side as u32, verdict as u32) != 0 }
}

/// [`opening::opening`], and [`opening::denied`] for what is.
#[inline(always)]
pub(crate) fn opening(ctx: &TcContext, side: Side) -> u32 {
    // SAFETY: as above.
    unsafe {
        match sluice_opening(ctx.skb.skb, side as u32) {
            opening::DENIED => sluice_denied_opening(ctx.skb.skb, side as u32),
            told => told,
        }
    }
}

#[inline(always)]
pub(crate) fn lead(ctx: &TcContext, side: Side, stack: bool) -> Result<(), Verdict> {
    // SAFETY: as above.
    result(unsafe { sluice_lead(ctx.skb.skb, side as u32, stack.into()) })
}

#[inline(always)]
pub(crate) fn clamp_mss(ctx: &TcContext, side: Side) -> Result<(), Verdict> {
    // SAFETY: as above.
    result(unsafe { sluice_clamp_mss(ctx.skb.skb, side as u32) })
}

/// Tells user space of the packet, which ends here with `verdict`.
#[inline(always)]
pub(crate) fn tell(ctx: &TcContext, side: Side, verdict: Verdict) {
    if verdict.is_denied() {
        // SAFETY: as above.
        unsafe { sluice_denied(ctx.skb.skb, side as u32, verdict as u32) };
    }
}

/// Logs what became of a packet if that is wanted, which user space says before it loads the
/// program: else the verifier leaves this out.
#[inline(always)]
pub(crate) fn log(ctx: &TcContext, side: Side, verdict: Verdict) {
    let parsed = !matches!(verdict, Verdict::PassUnrelated | Verdict::DropMalformed);
    if level_enabled(Level::Trace) && parsed {
        // SAFETY: as above.
        unsafe { sluice_log(ctx.skb.skb, side as u32, verdict as u32) };
    }
}

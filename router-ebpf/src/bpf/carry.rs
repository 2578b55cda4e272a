//! How a packet is carried: attempted, suspended for a step where there is need, attempted again.

use aya_ebpf::programs::TcContext;
use router_ebpf::abi::Side;
use router_ebpf::answer;
use router_ebpf::decide::decide;
use router_ebpf::entry::Entry;
use router_ebpf::forward::{Exit, Forward, Nat};
use router_ebpf::frame::Frame;
use router_ebpf::packet::{Packet, parse};
use router_ebpf::rewrite;
use router_ebpf::steps::Steps;
use router_ebpf::verdict::Verdict;

use super::skb::Skb;
use super::steps::{self, FOUND, THROUGH_STACK};
use super::tables::Maps;
use super::work::{Work, global, number, result};

/// Done already: the quoted packet was translated.
const QUOTED: u32 = 1 << 28;
/// Done already: the flow was judged.
const JUDGED: u32 = 1 << 29;

/// Why an attempt went no further. One number, as a verdict is: nothing of it is ever undefined.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The packet ends with this verdict.
    End(Verdict),
    /// Suspended until its flow is found.
    Find,
    /// Suspended until its flow is opened.
    Open,
    /// Suspended until its flow is judged.
    Judge,
    /// Suspended until the packet that it quotes is translated.
    Quote,
}

const _: () = assert!(size_of::<Result<(), Stop>>() == size_of::<Verdict>());

impl From<Verdict> for Stop {
    #[inline(always)]
    fn from(verdict: Verdict) -> Self {
        Self::End(verdict)
    }
}

/// What an attempt returns for a suspended packet; else as [`number`].
const FIND: u32 = 1 << 8;
const OPEN: u32 = 2 << 8;
const JUDGE: u32 = 3 << 8;
const QUOTE: u32 = 4 << 8;
const _: () = assert!(Verdict::ALL.len() < FIND as usize);

/// The outcome of an attempt as a number.
#[inline(always)]
fn outcome(result: Result<(), Stop>) -> u32 {
    match result {
        Ok(()) => number(Ok(())),
        Err(Stop::End(verdict)) => number(Err(verdict)),
        Err(Stop::Find) => FIND,
        Err(Stop::Open) => OPEN,
        Err(Stop::Judge) => JUDGE,
        Err(Stop::Quote) => QUOTE,
    }
}

/// Carries the packet, or makes the answer to its sender of it.
#[inline(always)]
pub(crate) fn process(ctx: &TcContext, side: Side, work: *const Work) -> Result<(), Verdict> {
    match carry(ctx, side, work) {
        Err(Verdict::DropPolicy) => steps::reject(ctx, side)?,
        outcome => outcome?,
    }
    // SAFETY: the place of this CPU's work. The steps write to it behind the compiler's back, hence no
    // reference to it here.
    if unsafe { (&raw const (*work).forward.exit).read_volatile() } == Exit::Answer {
        return steps::answer(ctx, side);
    }
    Ok(())
}

/// Carries the packet, but for an answer. Steps that need much of the stack are not called from where
/// they are found to be needed, but from here, and then the packet is attempted from the beginning.
#[inline(always)]
fn carry(ctx: &TcContext, side: Side, work: *const Work) -> Result<(), Verdict> {
    let mut done = 0;
    let mut outcome = attempt_from(ctx, side, done);
    if outcome == FIND {
        done = steps::find_flow(ctx, side);
        if done & FOUND == 0 {
            return result(done).and(Err(Verdict::DropInternal));
        }
        outcome = attempt_from(ctx, side, done);
    }
    if outcome == OPEN {
        steps::open(ctx, side)?;
        outcome = attempt_from(ctx, side, done);
    }
    // Nothing is judged a second time, should the tables change meanwhile.
    if outcome == JUDGE {
        steps::judge(ctx, side)?;
        done |= JUDGED;
        outcome = attempt_from(ctx, side, done);
    }
    if outcome == QUOTE {
        steps::translate_quote(ctx, side)?;
        if done & JUDGED == 0 {
            // SAFETY: as in `process`.
            unsafe { (&raw mut (*work.cast_mut()).next_hop[0]).write_volatile(0) };
        }
        outcome = attempt_from(ctx, side, done | JUDGED | QUOTED);
    }
    result(outcome)
}

/// [`attempt`] in a function of its own; `done`: what need not be done again.
#[inline(always)]
fn attempt_from(ctx: &TcContext, side: Side, done: u32) -> u32 {
    // SAFETY: the program's own context, and the step fills the place of its work.
    unsafe {
        match side {
            Side::Overlay => sluice_attempt_overlay(ctx.skb.skb, done),
            Side::Subnet => sluice_attempt_subnet(ctx.skb.skb, done),
        }
    }
}

global! {
    /// [`attempt`] with a packet of the overlay.
    sluice_attempt_overlay(ctx, work, done) {
        outcome(attempt(Side::Overlay, ctx, work, &Maps::of(ctx, done)))
    }

    /// [`attempt`] with a packet of the subnet.
    sluice_attempt_subnet(ctx, work, done) {
        outcome(attempt(Side::Subnet, ctx, work, &Maps::of(ctx, done)))
    }
}

/// Parses the packet, decides about it and carries that out, but for an answer.
#[inline(always)]
fn attempt(side: Side, ctx: &TcContext, work: &mut Work, maps: &Maps<'_>) -> Result<(), Stop> {
    let skb = &mut Skb::new(ctx, side);
    match side {
        Side::Overlay => parse(side, skb, &mut work.packet)?,
        Side::Subnet if !skb.is_untagged_ip_to_us() => return Err(Verdict::PassUnrelated.into()),
        // What is wrong with a frame from the wire is the stack's to judge and to count.
        Side::Subnet => {
            parse(side, skb, &mut work.packet).map_err(|_| Verdict::PassUnrelated)?;
        }
    }
    decide(side, &mut work.packet, skb, maps, &mut work.forward)?;
    if work.forward.exit == Exit::Answer {
        if !answer::may_send(&work.packet, maps) {
            return Err(work.forward.verdict.into());
        }
        return Ok(());
    }
    rewrite::apply(side, &work.packet, &work.forward, maps, skb)
}

impl Steps for Maps<'_> {
    type Stop = Stop;

    #[inline(always)]
    fn find_flow<F: Frame>(&self, _: Side, _: &mut Packet, _: &F) -> Result<bool, Stop> {
        if self.has_done(FOUND) {
            return Ok(self.has_done(THROUGH_STACK));
        }
        Err(Stop::Find)
    }

    #[inline(always)]
    fn open(&self, _: Side, _: &Packet) -> Result<(), Stop> {
        Err(Stop::Open)
    }

    #[inline(always)]
    fn judge(&self, _: Side, _: &Packet, _: Entry<'_>) -> Result<(), Stop> {
        if self.has_done(JUDGED) {
            return Ok(());
        }
        Err(Stop::Judge)
    }

    #[inline(always)]
    fn probe_mtu(&self, _: &Packet, _: Entry<'_>) -> Result<(), Verdict> {
        steps::probe_mtu(self.ctx)
    }

    #[inline(always)]
    fn look_across(&self, side: Side, _: &Packet, _: Entry<'_>) -> bool {
        steps::look_across(self.ctx, side)
    }

    #[inline(always)]
    fn is_routers(&self, _: &Packet, _: Entry<'_>) -> bool {
        steps::is_routers(self.ctx)
    }

    #[inline(always)]
    fn lead(&self, side: Side, _: &Packet, _: Entry<'_>, stack: bool) -> Result<(), Verdict> {
        steps::lead(self.ctx, side, stack)
    }

    #[inline(always)]
    fn clamp_mss<F: Frame>(
        &self,
        side: Side,
        _: &Packet,
        _: &Forward,
        _: &mut F,
    ) -> Result<(), Verdict> {
        steps::clamp_mss(self.ctx, side)
    }

    #[inline(always)]
    fn translate_quote<F: Frame>(
        &self,
        _: Side,
        _: &Packet,
        _: &Nat,
        _: &mut F,
    ) -> Result<(), Stop> {
        if self.has_done(QUOTED) {
            return Ok(());
        }
        Err(Stop::Quote)
    }
}

//! The rare steps of a decision, each a global function of the object: the verifier judges it once
//! and by itself, not for every way that leads to it. Such functions take the context and numbers
//! only (Linux 5.10), so the packet lies in a map, which also keeps it off the stack.

use core::hint::black_box;

use aya_ebpf::bindings::{__sk_buff, bpf_redir_neigh};
use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_ns, bpf_redirect_neigh};
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::macro_support::{Level, level_enabled};
use aya_log_ebpf::trace;
use router_ebpf::abi::{Flow, Prefix, Side, Tuple};
use router_ebpf::decide::{self, Exit, Forward, Refused, Tables as _};
use router_ebpf::flow::{self, Draft};
use router_ebpf::packet::Packet;
use router_ebpf::policy::{self, NewFlow};
use router_ebpf::verdict::Verdict;
use router_ebpf::{answer, fragment, icmp, mss};

use super::maps::{self, Maps};
use super::skb::Skb;

/// The packet that this CPU works on, and what was decided about it.
#[repr(C)]
pub(crate) struct Work {
    pub(crate) packet: Packet,
    pub(crate) forward: Forward,
    pub(crate) draft: Draft,
    /// The tuple, and its entry, that [`sluice_clause`] and [`sluice_claim`] are asked about.
    tuple: Tuple,
    entry: Flow,
    /// What [`sluice_clamp_mss`] looks through.
    options: mss::Options,
    /// What the kernel's routing answered last, as a `struct bpf_redir_neigh`: family and address of the
    /// neighbour that packets go to; the family is zero while nothing was asked about this packet.
    pub(crate) next_hop: [u32; 5],
    /// The step that must be done before the packet can be carried; see [`run`].
    pub(crate) pending: u32,
    /// The tick of the kernel at which this CPU last read the clock, and the time then in ns.
    clock: [u64; 2],
}

/// No step is pending.
const DONE: u32 = 0;
/// [`sluice_open`] is pending.
const OPEN: u32 = 1;
/// [`sluice_judge`] is pending.
const JUDGE: u32 = 2;
/// [`sluice_find_flow`] is pending.
const FIND: u32 = 3;

/// What [`sluice_claim`] answers.
const ADDED: u32 = 0;
const EXISTS: u32 = 1;
const FULL: u32 = 2;

/// [`sluice_translate_quote`] is pending.
const QUOTE: u32 = 4;

/// Done already: the quoted packet was translated.
pub(crate) const QUOTED: u32 = 1 << 28;
/// Done already: the flow was judged.
pub(crate) const JUDGED: u32 = 1 << 29;
/// Done already: the flow was found.
pub(crate) const FOUND: u32 = 1 << 30;
/// With [`FOUND`]: the kernel gets all of a fragmented packet.
pub(crate) const THROUGH_STACK: u32 = 1 << 31;

/// Carries the packet, or makes the answer to its sender of it.
#[inline(always)]
pub(crate) fn run(ctx: &TcContext, side: Side, work: *const Work) -> Result<(), Verdict> {
    let (skb, from) = (ctx.skb.skb, side as u32);
    // SAFETY: see `carry`.
    unsafe {
        match carry(ctx, side, work) {
            Err(Verdict::DropPolicy) => result(sluice_reject(skb, from))?,
            outcome => outcome?,
        }
        if (&raw const (*work).forward.exit).read_volatile() == Exit::Answer {
            return result(sluice_answer(skb, from));
        }
    }
    Ok(())
}

/// Carries the packet, but for an answer. Steps that need much of the stack are not called from where
/// they are found to be needed, but from here, and then the packet is carried from the beginning.
#[inline(always)]
fn carry(ctx: &TcContext, side: Side, work: *const Work) -> Result<(), Verdict> {
    let (skb, from) = (ctx.skb.skb, side as u32);
    // SAFETY: the program's own context, and the place of its work. So in all functions below. The
    // steps write to that place behind the compiler's back, hence no reference to it here.
    unsafe {
        let carry = |done: u32| match side {
            Side::Overlay => sluice_carry_overlay(skb, done),
            Side::Subnet => sluice_carry_subnet(skb, done),
        };
        let pending = || (&raw const (*work).pending).read_volatile();
        let mut done = 0;
        let mut outcome = carry(done);
        if pending() == FIND {
            done = sluice_find_flow(skb, from);
            if done & FOUND == 0 {
                return result(done).and(Err(Verdict::DropInternal));
            }
            outcome = carry(done);
        }
        if pending() == OPEN {
            result(sluice_open(skb, from))?;
            outcome = carry(done);
        }
        // Nothing is judged a second time, should the tables change meanwhile.
        if pending() == JUDGE {
            result(sluice_judge(skb, from))?;
            done |= JUDGED;
            outcome = carry(done);
        }
        if pending() == QUOTE {
            result(sluice_translate_quote(skb, from))?;
            if done & JUDGED == 0 {
                (&raw mut (*work.cast_mut()).next_hop[0]).write_volatile(0);
            }
            outcome = carry(done | JUDGED | QUOTED);
        }
        result(outcome)
    }
}

/// [`Work`], as bytes: the types in it are none that user space or BTF should know.
type Bytes = [u64; size_of::<Work>().div_ceil(8)];

#[btf_map]
static WORK: PerCpuArray<Bytes, 1> = PerCpuArray::new();

/// The place of this CPU's work. No other program of ours runs on this CPU before this one ends.
#[inline(always)]
pub(crate) fn work() -> Option<*mut Work> {
    WORK.get_ptr_mut(0).map(|bytes| bytes.cast())
}

/// A result as a number: zero is success.
#[inline(always)]
fn number(result: Result<(), Verdict>) -> u32 {
    match result {
        Ok(()) => 0,
        Err(verdict) => verdict as u32 + 1,
    }
}

/// What [`number`] has made of a result.
#[inline(always)]
fn result(number: u32) -> Result<(), Verdict> {
    if number == 0 {
        return Ok(());
    }
    if number > Verdict::ALL.len() as u32 {
        return Err(Verdict::DropInternal);
    }
    // SAFETY: the verdicts are numbered from zero without a gap, as `verdict`'s tests assert.
    Err(unsafe { core::mem::transmute::<u32, Verdict>(number - 1) })
}

#[inline(always)]
fn side(number: u32) -> Side {
    if number == Side::Overlay as u32 {
        Side::Overlay
    } else {
        Side::Subnet
    }
}

macro_rules! steps {
    ($($(#[$attribute:meta])* $symbol:ident ($ctx:ident, $work:ident $(, $argument:ident)*) $body:block)*) => {
        $(
            $(#[$attribute])*
            ///
            /// # Safety
            ///
            /// `skb` is the context that the program was called with, and the work of this CPU is
            /// filled as far as the step needs it.
            #[unsafe(no_mangle)]
            #[inline(never)]
            pub(crate) unsafe extern "C" fn $symbol(skb: *mut __sk_buff $(, $argument: u32)*) -> u32 {
                // For an argument that a step does not use, LLVM would pass anything, and the
                // verifier wants what the signature says.
                let skb = black_box(skb);
                $(let $argument = black_box($argument);)*
                let $ctx = &TcContext::new(skb);
                let Some($work) = work() else {
                    return number(Err(Verdict::DropInternal));
                };
                // SAFETY: the place is valid and this program's alone, and the program has filled it.
                let $work = unsafe { &mut *$work };
                $body
            }
        )*
    };
}

steps! {
    /// Carries a packet of the overlay, but for an answer; `done`: what need not be done again.
    sluice_carry_overlay(ctx, work, done) {
        work.pending = DONE;
        number(super::carry(Side::Overlay, ctx, work, &Maps::of(ctx, done)))
    }

    /// Carries a packet of the subnet, but for an answer; `done`: what need not be done again.
    sluice_carry_subnet(ctx, work, done) {
        work.pending = DONE;
        number(super::carry(Side::Subnet, ctx, work, &Maps::of(ctx, done)))
    }

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

    /// [`flow::open`].
    sluice_open(ctx, work, from) {
        number(flow::open(side(from), &work.packet, &Maps::new(ctx), &mut work.draft))
    }

    /// [`flow::judge`].
    sluice_judge(ctx, work, from) {
        let (maps, side) = (Maps::new(ctx), side(from));
        let Some(entry) = maps.flow(side, work.packet.flow_tuple()) else {
            return number(Err(Verdict::DropInternal));
        };
        number(flow::judge(side, &work.packet, entry, &maps))
    }

    /// [`policy::clause`] for the flow whose first packet has the work's tuple: zero, or one more than the
    /// clause that lets it through.
    sluice_clause(ctx, work, bank) {
        let opening = &work.tuple;
        let flow = NewFlow {
            source: Prefix::host(opening.source),
            destination: Prefix::host(opening.destination),
            protocol: opening.protocol,
            port: opening.ports[1],
        };
        policy::clause(&Maps::new(ctx), bank, &flow).map_or(0, |clause| clause + 1)
    }

    /// Adds an entry for what comes from the subnet with the work's tuple.
    sluice_claim(ctx, work) {
        let maps = Maps::new(ctx);
        if maps.is_socket(&work.tuple) {
            return EXISTS;
        }
        match maps.add_flow(Side::Subnet, &work.tuple, &work.entry) {
            Ok(()) => ADDED,
            Err(Refused::Exists) => EXISTS,
            Err(Refused::Full) => FULL,
        }
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

    /// [`fragment::lead`].
    sluice_lead(ctx, work, from, stack) {
        let (maps, side) = (Maps::new(ctx), side(from));
        let Some(entry) = maps.flow(side, work.packet.flow_tuple()) else {
            return number(Err(Verdict::DropInternal));
        };
        number(fragment::lead(side, &work.packet, entry, &maps, stack != 0))
    }

    /// [`mss::clamp`] with the packet's TCP header.
    sluice_clamp_mss(ctx, work, offset, tcp, header_len, limit) {
        let mut skb = Skb { ctx, offset };
        // What every header keeps to, told to the verifier.
        let (tcp, header_len) = (tcp & 63, header_len & 63);
        number(mss::clamp(&mut skb, tcp, header_len, limit as u16, &mut work.options))
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

/// [`decide::Tables::now`]: to read the clock takes longer than to ask for the tick, which the
/// kernel makes one load of.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helpers take nothing, and the place is valid and this program's alone.
    unsafe {
        let Some(work) = work() else {
            return bpf_ktime_get_ns();
        };
        let clock = &raw mut (*work).clock;
        let tick = bpf_jiffies64();
        if (*clock)[0] != tick {
            *clock = [tick, bpf_ktime_get_ns()];
        }
        (*clock)[1]
    }
}

/// Redirects the packet to the NIC with this index, and has the kernel find the neighbour that its
/// routing has named: asked again, it may name one that is reached by another NIC.
#[inline(always)]
pub(crate) fn redirect_neighbour(link: u32) -> i64 {
    // SAFETY: the place is valid and this program's alone, and as long as the type that the helper takes.
    unsafe {
        if let Some(work) = work() {
            let next_hop = &raw mut (*work).next_hop;
            if (*next_hop)[0] != 0 {
                let len = size_of::<bpf_redir_neigh>() as i32;
                return bpf_redirect_neigh(link, next_hop.cast(), len, 0);
            }
        }
        bpf_redirect_neigh(link, core::ptr::null_mut(), 0, 0)
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

/// Logs what became of a packet if that is wanted, which user space says before it loads the
/// program: else the verifier leaves this out.
#[inline(always)]
pub(crate) fn log(ctx: &TcContext, side: Side, verdict: Verdict) {
    let parsed = !matches!(verdict, Verdict::PassUnrelated | Verdict::DropMalformed);
    if level_enabled(Level::Trace) && parsed {
        // SAFETY: see `run`.
        unsafe { sluice_log(ctx.skb.skb, side as u32, verdict as u32) };
    }
}

/// Has the flow found, and the packet carried again.
#[inline(always)]
pub(crate) fn find_flow() -> Result<(), Verdict> {
    suspend(FIND)
}

/// Has the flow opened, and the packet carried again.
#[inline(always)]
pub(crate) fn open() -> Result<(), Verdict> {
    suspend(OPEN)
}

/// Has the flow judged, and the packet carried again.
#[inline(always)]
pub(crate) fn judge() -> Result<(), Verdict> {
    suspend(JUDGE)
}

#[inline(always)]
fn suspend(step: u32) -> Result<(), Verdict> {
    if let Some(work) = work() {
        // SAFETY: the place is valid and this program's alone.
        unsafe { (*work).pending = step };
    }
    Err(Verdict::DropInternal)
}

/// The clause of the policy in `bank` that lets a flow through whose first packet has `opening`.
#[inline(always)]
pub(crate) fn clause(ctx: &TcContext, opening: &Tuple, bank: u32) -> Option<u32> {
    let work = work()?;
    // SAFETY: the place is valid and this program's alone; see `run`.
    let found = unsafe {
        (*work).tuple = *opening;
        sluice_clause(ctx.skb.skb, bank)
    };
    found.checked_sub(1)
}

/// [`decide::Tables::claim`].
#[inline(always)]
pub(crate) fn claim(ctx: &TcContext, reply: &Tuple, flow: &Flow) -> Result<(), Refused> {
    let work = work().ok_or(Refused::Full)?;
    // SAFETY: the place is valid and this program's alone; see `run`.
    let outcome = unsafe {
        (*work).tuple = *reply;
        (*work).entry = *flow;
        sluice_claim(ctx.skb.skb)
    };
    match outcome {
        ADDED => Ok(()),
        EXISTS => Err(Refused::Exists),
        _ => Err(Refused::Full),
    }
}

#[inline(always)]
pub(crate) fn probe_mtu(ctx: &TcContext) -> Result<(), Verdict> {
    // SAFETY: see `run`.
    result(unsafe { sluice_probe_mtu(ctx.skb.skb) })
}

#[inline(always)]
pub(crate) fn look_across(ctx: &TcContext, side: Side) -> bool {
    // SAFETY: see `run`.
    unsafe { sluice_look_across(ctx.skb.skb, side as u32) != 0 }
}

#[inline(always)]
pub(crate) fn is_routers(ctx: &TcContext) -> bool {
    // SAFETY: see `run`.
    unsafe { sluice_is_routers(ctx.skb.skb) != 0 }
}

/// [`decide::is_judged`].
#[inline(always)]
pub(crate) fn is_judged(ctx: &TcContext, side: Side, verdict: Verdict) -> bool {
    // SAFETY: see `run`.
    unsafe { sluice_is_judged(ctx.skb.skb, side as u32, verdict as u32) != 0 }
}

#[inline(always)]
pub(crate) fn lead(ctx: &TcContext, side: Side, stack: bool) -> Result<(), Verdict> {
    // SAFETY: see `run`.
    result(unsafe { sluice_lead(ctx.skb.skb, side as u32, stack.into()) })
}

#[inline(always)]
pub(crate) fn clamp_mss(
    ctx: &TcContext,
    offset: u32,
    tcp: u32,
    header_len: u32,
    limit: u16,
) -> Result<(), Verdict> {
    // SAFETY: see `run`.
    result(unsafe { sluice_clamp_mss(ctx.skb.skb, offset, tcp, header_len, limit.into()) })
}

/// Tells user space of the packet, which ends here with `verdict`.
#[inline(always)]
pub(crate) fn tell(ctx: &TcContext, side: Side, verdict: Verdict) {
    if verdict.is_denied() {
        // SAFETY: see `run`.
        unsafe { sluice_denied(ctx.skb.skb, side as u32, verdict as u32) };
    }
}

/// Has the packet that an ICMP error quotes translated, and the error carried again.
#[inline(always)]
pub(crate) fn translate_quote() -> Result<(), Verdict> {
    suspend(QUOTE)
}

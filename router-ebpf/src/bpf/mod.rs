//! The programs: the outermost functions, which alone count a verdict and turn it into a return
//! code.

mod carry;
mod flows;
mod kernel;
mod lookups;
mod maps;
mod skb;
mod steps;
mod tables;
mod work;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use router_ebpf::abi::{ABI_VERSION, Prefix, Side};
use router_ebpf::forward::Exit;
use router_ebpf::frame::Frame as _;
use router_ebpf::opening::{PERMITTED as PERMITTED_OPENING, SILENT as SILENT_OPENING};
use router_ebpf::packet::parse;
use router_ebpf::policy::BY_ADDRESS;
use router_ebpf::tables::Tables as _;
use router_ebpf::verdict::Class;

use skb::Skb;
use tables::Maps;

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// See [`router_ebpf::abi::ABI_SECTION`].
#[unsafe(link_section = "sluice.abi")]
#[unsafe(no_mangle)]
static SLUICE_ABI: u32 = ABI_VERSION;

/// See [`router_ebpf::abi::HANDED_OVER`]; user space says which before it loads the programs.
#[unsafe(no_mangle)]
static HANDED_OVER: u32 = 0;

/// See [`router_ebpf::abi::PERMITTED`]; as above.
#[unsafe(no_mangle)]
static PERMITTED: u32 = 0;

/// On the TUN device's ingress: packets that peers send, without a link-layer header.
#[classifier]
pub(crate) fn sluice_from_overlay(ctx: TcContext) -> i32 {
    run(Side::Overlay, ctx)
}

/// On a subnet-side NIC's ingress, after GRO; often the uplink too.
#[classifier]
pub(crate) fn sluice_from_subnet(ctx: TcContext) -> i32 {
    run(Side::Subnet, ctx)
}

/// For tests and measurements, never attached: tells what the policy says of a packet (with an
/// Ethernet header) as if it began a flow, and counts it so. From a peer's address it is a peer's. Zero: nothing lets it through; else
/// one more than the number of the clause that does.
#[classifier]
pub(crate) fn sluice_policy(ctx: TcContext) -> i32 {
    let maps = Maps::new(&ctx);
    let Some(settings) = maps.settings() else {
        return 0;
    };
    let Some(work) = work::work() else {
        return 0;
    };
    // SAFETY: the place is valid and this program's alone, and `parse` fills what is read.
    let packet = unsafe { &mut (*work).packet };
    if parse(Side::Subnet, &Skb::new(&ctx, Side::Subnet), packet).is_err() {
        return 0;
    }
    let class = match maps.peer(&Prefix::host(packet.tuple.source)) {
        Some(peer) => peer.class(settings.bank),
        None => BY_ADDRESS,
    };
    match lookups::clause(&ctx, class, &packet.tuple, settings.bank) {
        Some(clause) => {
            maps::count_hit(settings.bank, clause);
            clause as i32 + 1
        }
        None => 0,
    }
}

#[inline(always)]
fn run(side: Side, ctx: TcContext) -> i32 {
    let bytes = Skb::at(&ctx, side).len();
    let Some(work) = work::work() else {
        return TC_ACT_SHOT;
    };
    let outcome = carry::process(&ctx, side, work);
    // SAFETY: the place is valid and this program's alone, and no step is at work on it any more.
    let forward = unsafe { &(*work).forward };
    let verdict = match outcome {
        Ok(()) => forward.verdict,
        Err(verdict) => verdict,
    };
    maps::count(side, verdict, bytes);
    steps::log(&ctx, side, verdict);
    // SAFETY: the helpers take plain numbers, and no parameters when the pointer is null; the
    // kernel passes a valid context, whose mark a tc program may write.
    let code = unsafe {
        if side == Side::Subnet && outcome.is_ok() {
            Skb::at(&ctx, side).untag();
        }
        match outcome {
            Ok(()) => match forward.exit {
                Exit::Stack => {
                    hand_over(&ctx);
                    TC_ACT_UNSPEC.into()
                }
                Exit::Answer => {
                    steps::tell(&ctx, side, verdict);
                    bpf_redirect(kernel::ingress(&ctx), 0)
                }
                Exit::Neighbour => kernel::redirect_neighbour(forward.link),
                _ => bpf_redirect(forward.link, 0),
            },
            Err(verdict) if matches!(verdict.class(), Class::Drop | Class::Reject) => {
                steps::tell(&ctx, side, verdict);
                TC_ACT_SHOT.into()
            }
            // Not TC_ACT_OK: programs and filters behind this one have their turn.
            Err(verdict) => {
                if verdict.class() == Class::Slow {
                    if steps::is_judged(&ctx, side, verdict) {
                        hand_over(&ctx);
                    } else {
                        tell_ruleset(&ctx, steps::opening(&ctx, side));
                    }
                }
                TC_ACT_UNSPEC.into()
            }
        }
    };
    code as i32
}

/// Tells the kernel's ruleset that the packet was judged. Without the mark the kernel would track it as the
/// first one of a flow: ask the policy, and translate it, perhaps once more.
#[inline(always)]
fn hand_over(ctx: &TcContext) {
    // SAFETY: the kernel passes a valid context, whose mark a tc program may write; the constant lies there.
    unsafe {
        // Volatile, for the compiler takes it for a constant.
        (*ctx.skb.skb).mark |= (&raw const HANDED_OVER).read_volatile();
    }
}

/// Tells the kernel's ruleset what the policy says of the packet, were it the first of a flow: only
/// connection tracking knows whether it is.
#[inline(always)]
fn tell_ruleset(ctx: &TcContext, opening: u32) {
    // SAFETY: as in `hand_over`.
    unsafe {
        let mark = &raw mut (*ctx.skb.skb).mark;
        let [permitted, handed_over] = [&raw const PERMITTED, &raw const HANDED_OVER];
        // No other packet comes in with them.
        let bits = match opening {
            PERMITTED_OPENING => permitted.read_volatile(),
            SILENT_OPENING => permitted.read_volatile() | handed_over.read_volatile(),
            _ => 0,
        };
        *mark |= bits;
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

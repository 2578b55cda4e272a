//! The programs: the outermost functions, which alone count a verdict and turn it into a return
//! code.

mod maps;
mod skb;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use router_ebpf::abi::{ABI_VERSION, Side};
use router_ebpf::decide::{Tables as _, decide};
use router_ebpf::packet::{Frame as _, parse};
use router_ebpf::policy::{self, NewFlow};
use router_ebpf::rewrite;
use router_ebpf::verdict::{Class, Verdict};

use maps::Maps;
use skb::Skb;

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

/// See [`router_ebpf::abi::ABI_SECTION`].
#[unsafe(link_section = "sluice.abi")]
#[unsafe(no_mangle)]
static SLUICE_ABI: u32 = ABI_VERSION;

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
/// Ethernet header) as if it began a flow, and counts it so. Zero: nothing lets it through; else
/// one more than the number of the clause that does.
#[classifier]
pub(crate) fn sluice_policy(ctx: TcContext) -> i32 {
    let maps = Maps::new(&ctx);
    let bank = maps.settings().bank;
    let Ok(packet) = parse(&Skb::new(&ctx, Side::Subnet)) else {
        return 0;
    };
    let flow = NewFlow {
        source: packet.source,
        destination: packet.destination,
        protocol: packet.protocol,
        port: packet.ports[1],
    };
    match policy::clause(&maps, bank, &flow) {
        Some(clause) => {
            maps::count_hit(bank, clause);
            clause as i32 + 1
        }
        None => 0,
    }
}

#[inline(always)]
fn run(side: Side, ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx, side);
    let bytes = skb.len();
    let outcome = carry(side, &ctx, &mut skb);
    let verdict = match outcome {
        Ok(_) => Verdict::Forwarded,
        Err(verdict) => verdict,
    };
    maps::count(side, verdict, bytes);
    match outcome {
        // SAFETY: the helper takes plain numbers.
        Ok(link) => unsafe { bpf_redirect(link, 0) as i32 },
        Err(verdict) if matches!(verdict.class(), Class::Drop) => TC_ACT_SHOT,
        // Not TC_ACT_OK: programs and filters behind this one have their turn.
        Err(_) => TC_ACT_UNSPEC,
    }
}

/// The interface to redirect the rewritten packet to.
#[inline(always)]
fn carry(side: Side, ctx: &TcContext, skb: &mut Skb<'_>) -> Result<u32, Verdict> {
    let packet = match side {
        Side::Overlay => parse(skb)?,
        Side::Subnet if !skb.is_untagged_ip_to_us() => return Err(Verdict::PassUnrelated),
        // What is wrong with a frame from the wire is the stack's to judge and to count.
        Side::Subnet => parse(skb).map_err(|_| Verdict::PassUnrelated)?,
    };
    let forward = decide(side, &packet, &Maps::new(ctx))?;
    rewrite::apply(&packet, &forward, skb)?;
    Ok(forward.link)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

//! Look-ups that are global functions of their own.

use aya_ebpf::programs::TcContext;
use router_ebpf::abi::{Flow, Prefix, Side, Tuple};
use router_ebpf::policy::{self, NewFlow, Rules, Set};
use router_ebpf::tables::Refused;

use super::maps::{self, POLICY, POLICY_SETS};
use super::work::{global, work};
use super::{flows, kernel};

/// What [`sluice_claim`] answers.
const ADDED: u32 = 0;
const EXISTS: u32 = 1;
const FULL: u32 = 2;

/// The tables of the policy.
struct Policy;

impl Rules for Policy {
    #[inline(always)]
    fn set(&self, key: &Prefix) -> Option<&Set> {
        let number = POLICY.get(maps::key(key))?;
        self.numbered(*number)
    }

    #[inline(always)]
    fn numbered(&self, number: u32) -> Option<&Set> {
        // SAFETY: user space never changes a set, and removes it when nothing names it and no program
        // runs any more that has read its number.
        unsafe { POLICY_SETS.get(number) }
    }
}

global! {
    /// [`policy::clause`] for the flow whose first packet has the work's tuple, and whose source is of
    /// `class`: zero, or one more than the clause that lets it through.
    sluice_clause(_ctx, work, class, bank) {
        let opening = &work.tuple;
        let flow = NewFlow {
            class,
            source: Prefix::host(opening.source),
            destination: Prefix::host(opening.destination),
            protocol: opening.protocol,
            port: opening.ports[1],
        };
        policy::clause(&Policy, bank, &flow).map_or(0, |clause| clause + 1)
    }

    /// Adds an entry for what comes from the subnet with the work's tuple.
    sluice_claim(ctx, work) {
        if kernel::is_socket(ctx, &work.tuple) {
            return EXISTS;
        }
        match flows::insert(Side::Subnet, &work.tuple, &work.entry) {
            Ok(()) => ADDED,
            Err(Refused::Exists) => EXISTS,
            Err(Refused::Full) => FULL,
        }
    }
}

/// The clause of the policy in `bank` that lets a flow through whose first packet has `opening`, and whose
/// source is of `class`.
#[inline(always)]
pub(crate) fn clause(ctx: &TcContext, class: u32, opening: &Tuple, bank: u32) -> Option<u32> {
    let work = work()?;
    // SAFETY: the place is valid and this program's alone, and the context the program's own.
    let found = unsafe {
        (*work).tuple = *opening;
        sluice_clause(ctx.skb.skb, class, bank)
    };
    found.checked_sub(1)
}

/// [`router_ebpf::tables::Tables::claim`].
#[inline(always)]
pub(crate) fn claim(ctx: &TcContext, reply: &Tuple, flow: &Flow) -> Result<(), Refused> {
    let work = work().ok_or(Refused::Full)?;
    // SAFETY: the place is valid and this program's alone, and the context the program's own.
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

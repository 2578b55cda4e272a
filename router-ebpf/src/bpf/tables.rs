//! The maps, and the kernel around them, as [`Tables`].

use core::mem::size_of;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers;
use aya_ebpf::programs::TcContext;
use router_ebpf::abi::{
    Account, Flow, Fragment, FragmentKey, Link, Overlay, Prefix, Route, Settings, Side, Tuple, Way,
    WayPrefix,
};
use router_ebpf::entry::Entry;
use router_ebpf::frame::Bytes;
use router_ebpf::packet::Packet;
use router_ebpf::tables::{Hop, NO_CLAUSE, Refused, Tables, fib_failure};
use router_ebpf::verdict::Verdict;

use super::kernel::{self, Answer};
use super::maps::{self, FRAGMENTS, LINKS, MASQUERADE, OVERLAY, ROUTES, SETTINGS, SOURCES, key};
use super::{flows, lookups, work};

const FIB_SUCCESS: i64 = 0;
const FIB_NO_NEIGHBOUR: i64 = 7;

/// The tables as one packet sees them.
pub(crate) struct Maps<'a> {
    pub(super) ctx: &'a TcContext,
    done: u32,
}

impl<'a> Maps<'a> {
    #[inline(always)]
    pub(crate) fn new(ctx: &'a TcContext) -> Self {
        Self::of(ctx, 0)
    }

    /// As [`Maps::new`]; `done`: the steps that need not be done again.
    #[inline(always)]
    pub(crate) fn of(ctx: &'a TcContext, done: u32) -> Self {
        Self { ctx, done }
    }
}

impl Maps<'_> {
    /// Whether a step need not be done again.
    #[inline(always)]
    pub(crate) fn has_done(&self, step: u32) -> bool {
        self.done & step != 0
    }
}

impl Tables for Maps<'_> {
    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        SETTINGS.get(0)
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        kernel::ingress(self.ctx)
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        work::now()
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: the helper takes nothing.
        unsafe { helpers::bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn peer(&self, address: &Prefix) -> Option<&Overlay> {
        let found = OVERLAY.get(key(address))?;
        (found.flags & Overlay::OWN == 0).then_some(found)
    }

    #[inline(always)]
    fn route(&self, address: &Prefix) -> Option<Route> {
        ROUTES.get(key(address)).copied()
    }

    #[inline(always)]
    fn link(&self, index: u32) -> Option<&Link> {
        // SAFETY: user space replaces whole values; a reader sees old or new words.
        unsafe { LINKS.get(index) }
    }

    #[inline(never)]
    fn masquerade(&self, way: &Way, flow: &mut Flow) -> bool {
        let host = WayPrefix::host(*way);
        const _: () = assert!(size_of::<WayPrefix>() == size_of::<Key<Way>>());
        // SAFETY: as in `key`.
        let key: &Key<Way> = unsafe { &*core::ptr::from_ref(&host).cast() };
        match MASQUERADE.get(key) {
            Some(address) => {
                // SAFETY: as many bytes, and any are valid.
                flow.address = unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(*address) };
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn permits(&self, class: u32, tuple: &Tuple, settings: &Settings) -> Result<u16, Verdict> {
        if settings.is_open(class) {
            return Ok(NO_CLAUSE);
        }
        lookups::clause(self.ctx, class, tuple, settings.bank)
            .map(|clause| clause as u16)
            .ok_or(Verdict::DropPolicy)
    }

    #[inline(always)]
    fn count_clause(&self, clause: u16, settings: &Settings) {
        if settings.bank != 0 {
            maps::count_hit(settings.bank, clause.into());
        }
    }

    #[inline(always)]
    fn flow(&self, side: Side, tuple: &Tuple) -> Option<Entry<'_>> {
        let entry = flows::find(side, tuple)?;
        // SAFETY: the kernel keeps the entry's memory until the program ends, also when the entry
        // is deleted, and a slot has of a `Flow` what its family needs.
        Some(unsafe { Entry::new(entry) })
    }

    #[inline(never)]
    fn add_flow(&self, side: Side, tuple: &Tuple, flow: &Flow) -> Result<(), Refused> {
        flows::insert(side, tuple, flow)
    }

    #[inline(never)]
    fn remove_flow(&self, side: Side, tuple: &Tuple) {
        flows::remove(side, tuple);
    }

    #[inline(never)]
    fn take_place(&self, account: &Account, limit: u32) -> bool {
        if let Some(count) = SOURCES.get_ptr_mut(account) {
            // SAFETY: the entry's memory stays. BPF has no atomic addition here, so a count of two
            // CPUs at a time may be lost: user space counts anew.
            unsafe {
                if *count >= limit {
                    return false;
                }
                *count += 1;
            }
        } else {
            // Where there is no room for another account, it has no limit of its own.
            let _ = SOURCES.insert(account, 1, BPF_NOEXIST.into());
        }
        true
    }

    #[inline(never)]
    fn give_place_back(&self, account: &Account) {
        if let Some(count) = SOURCES.get_ptr_mut(account) {
            // SAFETY: as in `take_place`.
            unsafe { *count = (*count).saturating_sub(1) };
        }
    }

    #[inline(always)]
    fn is_socket(&self, tuple: &Tuple) -> bool {
        kernel::is_socket(self.ctx, tuple)
    }

    #[inline(never)]
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        // SAFETY: an entry that is replaced meanwhile is another packet's with the same ports.
        unsafe { FRAGMENTS.get(key) }.copied()
    }

    #[inline(never)]
    fn add_fragment(&self, key: &FragmentKey, fragment: Fragment) {
        // A packet whose fragments are not remembered is lost, as on a link.
        let _ = FRAGMENTS.insert(key, fragment, BPF_ANY.into());
    }

    #[inline(always)]
    fn may_send_error(&self) -> bool {
        maps::may_answer(self.now())
    }

    #[inline(always)]
    fn claim(&self, reply: &Tuple, flow: &Flow) -> Result<(), Refused> {
        lookups::claim(self.ctx, reply, flow)
    }

    #[inline(always)]
    fn next_hop(&self, packet: &Packet, len: u32, settings: &Settings) -> Result<Hop, Verdict> {
        let mut answer = Answer {
            link: 0,
            gateway: [0; 4],
            mtu: 0,
            hardware: Bytes([0; 12]),
        };
        let code = kernel::ask_fib(self.ctx, packet, len, &mut answer);
        if code != FIB_SUCCESS && code != FIB_NO_NEIGHBOUR {
            return Err(fib_failure(code));
        }
        // Without a neighbour the kernel leaves the packet's length in place of the MTU.
        let mtu = if code == FIB_SUCCESS && settings.flags & Settings::FIB_MTU != 0 {
            answer.mtu
        } else {
            u32::MAX
        };
        Ok(Hop {
            link: answer.link,
            gateway: answer.gateway,
            mtu,
            resolved: code == FIB_SUCCESS,
            hardware: answer.hardware,
        })
    }
}

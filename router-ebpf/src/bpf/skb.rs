//! A socket buffer as a [`Frame`].

use core::hint::black_box;
use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::bpf_adj_room_mode::{BPF_ADJ_ROOM_MAC, BPF_ADJ_ROOM_NET};
use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
};
use aya_ebpf::helpers::{
    bpf_csum_update, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_head,
    bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes, bpf_skb_vlan_pop,
};
use aya_ebpf::programs::TcContext;
use router_ebpf::abi::Side;
use router_ebpf::csum::Delta;
use router_ebpf::frame::{self, Bytes, Covers, Frame, Sum};
use router_ebpf::verdict::Verdict;

use super::work::{global, side};

/// `PACKET_HOST` of linux/if_packet.h: the frame is addressed to this machine.
const PACKET_HOST: u32 = 0;
/// The bits of a VLAN tag that name the VLAN.
const VLAN_ID: u32 = 0xfff;
/// EtherTypes as `__sk_buff.protocol` holds them, in network byte order.
const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// What [`sluice_sum`] answers where there is no sum.
const NO_SUM: u32 = 1 << 16;

/// What [`Frame::header`] reaches: an IPv6 header, a fragment header and a TCP header without
/// options.
const HEADERS: u32 = 68;

/// A socket buffer. The helpers behind it serve linear and paged data alike and make shared data
/// private before they write.
pub(crate) struct Skb<'a> {
    ctx: &'a TcContext,
    /// Bytes in front of the IP header.
    offset: u32,
}

impl<'a> Skb<'a> {
    #[inline(always)]
    pub(crate) fn new(ctx: &'a TcContext, side: Side) -> Self {
        let offset = side.header_offset();
        // Headers lie in the linear part but for odd drivers. If this fails, the headers are not
        // found.
        let wanted = (offset + HEADERS).min(ctx.len());
        if ctx.data() + wanted as usize > ctx.data_end() {
            let _ = ctx.pull_data(wanted);
        }
        Self { ctx, offset }
    }

    /// As [`Skb::new`], where that was called before.
    #[inline(always)]
    pub(crate) fn at(ctx: &'a TcContext, side: Side) -> Self {
        Self {
            ctx,
            offset: side.header_offset(),
        }
    }

    /// Whether the frame is IP in no VLAN and addressed to this machine: a NIC in promiscuous mode
    /// also brings what other machines are to receive. A tag of VLAN 0 tells a priority only (IEEE
    /// 802.1Q); the kernel has taken it out of the frame, and ignores it.
    #[inline(always)]
    pub(crate) fn is_untagged_ip_to_us(&self) -> bool {
        // SAFETY: the kernel passes a valid context, and these fields are readable in tc programs.
        let (pkt_type, protocol) = unsafe {
            let skb = self.ctx.skb.skb;
            ((*skb).pkt_type, (*skb).protocol)
        };
        pkt_type == PACKET_HOST
            && (protocol == ETH_P_IP || protocol == ETH_P_IPV6)
            // SAFETY: as above.
            && (!self.is_tagged() || unsafe { (*self.ctx.skb.skb).vlan_tci } & VLAN_ID == 0)
    }

    /// Whether there is a VLAN tag.
    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: as in `is_untagged_ip_to_us`. Volatile, as in `kernel::ingress`.
        unsafe { (&raw const (*self.ctx.skb.skb).vlan_present).read_volatile() != 0 }
    }

    /// Takes the VLAN tag off, if there is one, which would leave with the packet otherwise.
    #[inline(always)]
    pub(crate) fn untag(&self) {
        if self.is_tagged() {
            // SAFETY: the helper takes the context alone. It fails only for a tag within the frame.
            unsafe { bpf_skb_vlan_pop(self.ctx.skb.skb) };
        }
    }
}

#[inline(always)]
fn done(code: i64) -> Result<(), Verdict> {
    if code == 0 {
        Ok(())
    } else {
        Err(Verdict::DropInternal)
    }
}

/// Overwrites bytes of the linear part without a helper. The kernel makes the data private when a
/// program that does so begins.
#[inline(always)]
fn write_at<const N: usize>(
    ctx: &TcContext,
    offset: usize,
    bytes: &Bytes<N>,
) -> Result<(), Verdict> {
    let start = ctx.data() + offset;
    if start + N > ctx.data_end() {
        return Err(Verdict::DropInternal);
    }
    let mut at = 0;
    // By words, as in `header`.
    while at + 4 <= N {
        let word = [
            bytes.0[at],
            bytes.0[at + 1],
            bytes.0[at + 2],
            bytes.0[at + 3],
        ];
        // SAFETY: the bytes lie between `data` and `data_end`, as the verifier checks too.
        unsafe { ((start + at) as *mut u32).write(u32::from_ne_bytes(word)) };
        at += 4;
    }
    while at < N {
        // SAFETY: as above.
        unsafe { ((start + at) as *mut u8).write(bytes.0[at]) };
        at += 1;
    }
    Ok(())
}

global! {
    /// [`frame::sum`]; [`NO_SUM`] if there is none.
    sluice_sum(ctx, _work, from, len) {
        match frame::sum(&Skb::at(ctx, side(from)), len) {
            Some(sum) => sum.into(),
            None => NO_SUM,
        }
    }
}

impl Frame for Skb<'_> {
    #[inline(always)]
    fn len(&self) -> u32 {
        self.ctx.len().saturating_sub(self.offset)
    }

    #[inline(always)]
    fn gso_size(&self) -> u32 {
        // SAFETY: as in `is_untagged_ip_to_us`; the field is there since Linux 5.7.
        unsafe { (*self.ctx.skb.skb).gso_size }
    }

    #[inline(always)]
    fn header<const AT: usize, const N: usize>(&self, to: &mut [u8; N]) -> bool {
        let start = self.ctx.data() + self.offset as usize + AT;
        if start + N > self.ctx.data_end() {
            return false;
        }
        let mut at = 0;
        while at + 4 <= N {
            // By words, for a load of unknown alignment LLVM makes a load of every byte. BPF knows no
            // alignment by itself: where the machine does, the verifier refuses such a load.
            // SAFETY: the bytes lie between `data` and `data_end`, as the verifier checks too.
            let word = unsafe { ((start + at) as *const u32).read() };
            to[at..at + 4].copy_from_slice(&word.to_ne_bytes());
            at += 4;
        }
        while at < N {
            // SAFETY: as above.
            to[at] = unsafe { ((start + at) as *const u8).read() };
            at += 1;
        }
        true
    }

    #[inline(always)]
    fn read<const N: usize>(&self, at: u32) -> Option<Bytes<N>> {
        let mut bytes = MaybeUninit::<Bytes<N>>::uninit();
        // SAFETY: the destination has N bytes.
        let code = unsafe {
            bpf_skb_load_bytes(
                self.ctx.as_ptr(),
                self.offset + at,
                bytes.as_mut_ptr().cast(),
                N as u32,
            )
        };
        // SAFETY: the helper has filled all N bytes, and the rest is padding.
        (code == 0).then(|| unsafe { bytes.assume_init() })
    }

    #[inline(always)]
    fn read_into<const N: usize>(&self, at: u32, len: u32, to: &mut Bytes<N>) -> bool {
        // What is compared must be what is passed, or the verifier does not see the bounds; and
        // before Linux 5.13 it does not learn from a comparison with zero.
        let less = black_box(u64::from(len).wrapping_sub(1));
        if less >= N as u64 {
            return false;
        }
        let len = less as u32 + 1;
        // SAFETY: the destination has as many bytes and more.
        let code = unsafe {
            bpf_skb_load_bytes(
                self.ctx.as_ptr(),
                self.offset + at,
                to.0.as_mut_ptr().cast(),
                len,
            )
        };
        code == 0
    }

    #[inline(always)]
    fn write_header<const AT: usize, const N: usize>(
        &mut self,
        bytes: &Bytes<N>,
    ) -> Result<(), Verdict> {
        write_at(self.ctx, self.offset as usize + AT, bytes)
    }

    #[inline(always)]
    fn write<const N: usize>(
        &mut self,
        at: u32,
        bytes: &Bytes<N>,
        sum: Sum,
    ) -> Result<(), Verdict> {
        let flags = match sum {
            Sum::Kept => 0,
            Sum::Changed => u64::from(BPF_F_RECOMPUTE_CSUM),
        };
        // SAFETY: the source has N bytes.
        done(unsafe {
            bpf_skb_store_bytes(
                self.ctx.skb.skb,
                self.offset + at,
                bytes.0.as_ptr().cast(),
                N as u32,
                flags,
            )
        })
    }

    #[inline(always)]
    fn replace_checksum(&mut self, at: u32, delta: Delta, covers: Covers) -> Result<(), Verdict> {
        let flags = match covers {
            Covers::Payload => 0,
            Covers::Pseudo => BPF_F_PSEUDO_HDR,
            Covers::UdpPayload => BPF_F_MARK_MANGLED_0,
            Covers::UdpPseudo => BPF_F_PSEUDO_HDR | BPF_F_MARK_MANGLED_0,
        };
        // SAFETY: the helper takes plain numbers; of size zero it takes a difference of sums.
        done(unsafe {
            bpf_l4_csum_replace(
                self.ctx.skb.skb,
                self.offset + at,
                0,
                delta.0.into(),
                flags.into(),
            )
        })
    }

    #[inline(always)]
    fn sum(&self, len: u32) -> Option<u16> {
        let side = if self.offset == Side::Overlay.header_offset() {
            Side::Overlay
        } else {
            Side::Subnet
        };
        // SAFETY: the program's own context; the step needs no more.
        let sum = unsafe { sluice_sum(self.ctx.skb.skb, side as u32, len) };
        (sum != NO_SUM).then_some(sum as u16)
    }

    #[inline(always)]
    fn change_sum(&mut self, delta: Delta) {
        // SAFETY: the helper takes plain numbers. It fails where there is no such sum.
        unsafe { bpf_csum_update(self.ctx.skb.skb, delta.0) };
    }

    #[inline(always)]
    fn trim(&mut self, len: u32) -> Result<(), Verdict> {
        // SAFETY: the helper takes plain numbers.
        done(unsafe { bpf_skb_change_tail(self.ctx.skb.skb, self.offset + len, 0) })
    }

    #[inline(always)]
    fn push_ethernet(&mut self, header: &Bytes<14>) -> Result<(), Verdict> {
        // SAFETY: the helper takes plain numbers.
        done(unsafe { bpf_skb_change_head(self.ctx.skb.skb, header.0.len() as u32, 0) })?;
        write_at(self.ctx, 0, header)
    }

    #[inline(always)]
    fn insert<const N: usize>(&mut self, headers: &Bytes<N>) -> Result<(), Verdict> {
        // SAFETY: the helper takes plain numbers.
        done(unsafe { bpf_skb_adjust_room(self.ctx.skb.skb, N as i32, BPF_ADJ_ROOM_MAC, 0) })?;
        self.write(0, headers, Sum::Changed)
    }

    #[inline(always)]
    fn cut_jumbo_header(&mut self) -> Result<(), Verdict> {
        const LEN: i32 = 8;
        let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
        // SAFETY: the helper takes plain numbers.
        done(unsafe { bpf_skb_adjust_room(self.ctx.skb.skb, -LEN, BPF_ADJ_ROOM_NET, flags) })
    }

    #[inline(always)]
    fn swap_ethernet(&mut self) -> Result<(), Verdict> {
        if self.offset == 0 {
            return Ok(());
        }
        let mut addresses = [0_u8; 12];
        // SAFETY: source and destination of the copies have twelve bytes.
        unsafe {
            done(bpf_skb_load_bytes(
                self.ctx.as_ptr(),
                0,
                addresses.as_mut_ptr().cast(),
                12,
            ))?;
            // Not `rotate_left`, which takes 256 bytes of stack.
            let [a, b, c, d, e, f, g, h, i, j, k, l] = addresses;
            addresses = [g, h, i, j, k, l, a, b, c, d, e, f];
            done(bpf_skb_store_bytes(
                self.ctx.skb.skb,
                0,
                addresses.as_ptr().cast(),
                12,
                0,
            ))
        }
    }
}

//! A socket buffer as a [`Frame`].

use core::mem::MaybeUninit;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::BPF_F_RECOMPUTE_CSUM;
use aya_ebpf::helpers::{
    bpf_l4_csum_replace, bpf_skb_change_head, bpf_skb_change_tail, bpf_skb_load_bytes,
    bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use router_ebpf::abi::Side;
use router_ebpf::packet::{Bytes, Frame, Sum};
use router_ebpf::verdict::Verdict;

/// `PACKET_HOST` of linux/if_packet.h: the frame is addressed to this machine.
const PACKET_HOST: u32 = 0;
/// EtherTypes as `__sk_buff.protocol` holds them, in network byte order.
const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

/// What [`Frame::header`] reaches: an IPv6 header and a TCP header without options.
const HEADERS: u32 = 60;

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

    /// Whether the frame is IP without a VLAN tag and addressed to this machine: a NIC in
    /// promiscuous mode also brings what other machines are to receive.
    #[inline(always)]
    pub(crate) fn is_untagged_ip_to_us(&self) -> bool {
        // SAFETY: the kernel passes a valid context, and these fields are readable in tc programs.
        let (pkt_type, vlan, protocol) = unsafe {
            let skb = self.ctx.skb.skb;
            ((*skb).pkt_type, (*skb).vlan_present, (*skb).protocol)
        };
        pkt_type == PACKET_HOST && vlan == 0 && (protocol == ETH_P_IP || protocol == ETH_P_IPV6)
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
    fn header<const AT: usize, const N: usize>(&self) -> Option<[u8; N]> {
        let start = self.ctx.data() + self.offset as usize + AT;
        if start + N > self.ctx.data_end() {
            return None;
        }
        // SAFETY: the bytes lie between `data` and `data_end`, as the verifier checks too.
        Some(unsafe { (start as *const [u8; N]).read() })
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
    fn replace_checksum(&mut self, at: u32, from: [u8; 2], to: [u8; 2]) -> Result<(), Verdict> {
        // SAFETY: the helper takes plain numbers; two is the size of the words.
        done(unsafe {
            bpf_l4_csum_replace(
                self.ctx.skb.skb,
                self.offset + at,
                u64::from(u16::from_ne_bytes(from)),
                u64::from(u16::from_ne_bytes(to)),
                2,
            )
        })
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
        // SAFETY: the source has as many bytes as the headroom just made.
        done(unsafe {
            bpf_skb_store_bytes(
                self.ctx.skb.skb,
                0,
                header.0.as_ptr().cast(),
                header.0.len() as u32,
                0,
            )
        })
    }
}

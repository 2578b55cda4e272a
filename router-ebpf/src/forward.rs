//! What was decided about a packet.

use crate::verdict::Verdict;

/// What a sender is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// ICMP "packet too big", with [`Forward::mtu`].
    TooBig,
    /// ICMP "time exceeded".
    TimeExceeded,
    /// ICMP "administratively prohibited".
    Prohibited,
    /// A TCP RST.
    Reset,
}

/// Where a packet leaves to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// To the TUN device.
    Tun,
    /// To a NIC with the hardware addresses that are known.
    Ethernet,
    /// To a NIC; the kernel finds the neighbour.
    Neighbour,
    /// To the kernel, translated.
    Stack,
    /// It ends here, and its sender gets [`Forward::answer`].
    Answer,
}

/// The overlay side of a flow as the subnet side knows it, or the other way round. Aligned as
/// [`crate::abi::Address`] is.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nat {
    /// The new address as in [`crate::abi::Address::octets`]: the source of what comes from the
    /// overlay, the destination of what comes from the subnet.
    pub address: [u8; 16],
    /// The port or ICMP identifier that goes with it.
    pub port: [u8; 2],
}

impl Nat {
    /// The address as words, in memory's order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        // SAFETY: as many bytes, and any are valid.
        unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(self.address) }
    }
}

/// A packet that the fast path takes on, and what to do with it. Flat and filled in place: an enum
/// with fields would not always be whole, which the verifier refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Where it leaves to.
    pub exit: Exit,
    /// What became of it.
    pub verdict: Verdict,
    /// Interface index; zero for [`Exit::Stack`] and [`Exit::Answer`].
    pub link: u32,
    /// For [`Exit::Answer`]: what its sender is told.
    pub answer: Answer,
    /// MTU in bytes of the way on.
    pub mtu: u32,
    /// For [`Exit::Ethernet`]: destination, then source hardware address.
    pub hardware: [u8; 12],
    /// The translation, if `is_translated`. Of an ICMP error, the packet that it quotes is
    /// translated too.
    pub nat: Nat,
    /// Whether it is translated.
    pub is_translated: bool,
}

impl Default for Forward {
    fn default() -> Self {
        Self {
            exit: Exit::Tun,
            verdict: Verdict::Forwarded,
            link: 0,
            answer: Answer::TooBig,
            mtu: 0,
            hardware: [0; 12],
            nat: Nat::default(),
            is_translated: false,
        }
    }
}

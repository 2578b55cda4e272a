//! What user space and the programs share: names, keys and values of the maps.
//!
//! Addresses are big-endian byte arrays. Interface indexes, MTUs and counters are in host byte
//! order, since both sides run on one machine. Padding is explicit and zero. Bump [`ABI_VERSION`]
//! with every change of a name, size or meaning: pinned maps outlive the daemon that made them.

use core::mem::{align_of, offset_of, size_of};

use crate::verdict::Verdict;

macro_rules! layout {
    ($($type:ty: $size:literal, align $align:literal { $($field:ident: $offset:literal),* })*) => {
        $(const _: () = {
            assert!(size_of::<$type>() == $size);
            assert!(align_of::<$type>() == $align);
            $(assert!(offset_of!($type, $field) == $offset);)*
        };)*
    };
}

mod denied;
mod flows;
mod settled;

pub use denied::*;
pub use flows::*;
pub use settled::*;

/// Version of everything in this module.
pub const ABI_VERSION: u32 = 14;

/// Section of the object that holds its [`ABI_VERSION`], in the object's byte order.
pub const ABI_SECTION: &str = "sluice.abi";

/// Name of the program on the TUN device's ingress, also the name of its clsact filter.
pub const FROM_OVERLAY: &str = "sluice_from_overlay";
/// Name of the program on the subnet-side NICs' ingress, also the name of its clsact filter.
pub const FROM_SUBNET: &str = "sluice_from_subnet";
/// Name of the program that tells what the policy says of a packet; never attached.
pub const POLICY_PROBE: &str = "sluice_policy";

/// Map of one [`Settings`] (array).
pub const SETTINGS: &str = "SETTINGS";
/// Map of the overlay CIDRs (LPM trie from [`Prefix`] to [`Overlay`]).
pub const OVERLAY: &str = "OVERLAY";
/// Map of the advertised routes (LPM trie from [`Prefix`] to [`Route`]).
pub const ROUTES: &str = "ROUTES";
/// Map of the subnet-side NICs (hash from interface index, `u32`, to [`Link`]).
pub const LINKS: &str = "LINKS";
/// Map of what translated sources become on NICs whose [`Link`] names no address of the family (LPM
/// trie from [`WayPrefix`] to [`Address::octets`]): what the kernel's masquerade takes.
pub const MASQUERADE: &str = "MASQUERADE";
/// Map of the counters (per-CPU array of [`Counter`], see [`Side::counter`]).
pub const COUNTERS: &str = "COUNTERS";

/// Constant of the object: the bit that programs set in the mark of packets which they hand to the kernel and
/// which the policy would let begin a flow. With [`HANDED_OVER`] beside it: it would not, but they may be of
/// a flow that the other end may open, see [`crate::opening`].
pub const PERMITTED: &str = "PERMITTED";
/// Constant of the object: the bit that programs set in the mark of packets which they hand to the
/// kernel after they have judged and translated them. Other bits are others'.
pub const HANDED_OVER: &str = "HANDED_OVER";

/// The banks of the policy, see [`crate::policy`]. Zero in the settings means that there are no rules.
pub const BANKS: [u32; 2] = [1, 2];
/// In place of the number of a set of the policy ([`Overlay::class`]): the subnet side opens the flow, and the
/// source's set is found by its address.
pub const BY_ADDRESS: u32 = u32::MAX;

/// Most overlay CIDRs.
pub const MAX_OVERLAY: usize = 1 << 18;
/// Most advertised routes, both families.
pub const MAX_ROUTES: usize = 1 << 14;
/// Most subnet-side NICs.
pub const MAX_LINKS: usize = 256;
/// Most prefixes of [`MASQUERADE`].
pub const MAX_MASQUERADE: usize = 1 << 14;
/// Slots of [`COUNTERS`]: one for each program and verdict.
pub const MAX_COUNTERS: usize = Side::ALL.len() * Verdict::ALL.len();

/// Which program a packet is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// [`FROM_OVERLAY`]: from the TUN device toward the subnet.
    Overlay,
    /// [`FROM_SUBNET`]: from a subnet-side NIC toward the TUN device.
    Subnet,
}

impl Side {
    /// Both programs.
    pub const ALL: [Self; 2] = [Self::Overlay, Self::Subnet];

    /// The other one.
    #[inline(always)]
    pub const fn other(self) -> Self {
        match self {
            Self::Overlay => Self::Subnet,
            Self::Subnet => Self::Overlay,
        }
    }

    /// The program's label in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Overlay => "from_overlay",
            Self::Subnet => "from_subnet",
        }
    }

    /// The program's name in the object.
    pub const fn program(self) -> &'static str {
        match self {
            Self::Overlay => FROM_OVERLAY,
            Self::Subnet => FROM_SUBNET,
        }
    }

    /// Bytes in front of the IP header where the program runs.
    pub const fn header_offset(self) -> u32 {
        match self {
            Self::Overlay => 0,
            Self::Subnet => 14,
        }
    }

    /// Slot of [`COUNTERS`] for this program and `verdict`.
    #[inline(always)]
    pub const fn counter(self, verdict: Verdict) -> u32 {
        self as u32 * Verdict::ALL.len() as u32 + verdict as u32
    }
}

/// The data of an LPM key; family and IPv4 address share the first eight bytes, which the kernel
/// compares in one step. Aligned, so that programs copy it word by word.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address {
    /// 4 or 6, then zeros.
    pub family: [u8; 4],
    /// The address, big-endian; an IPv4 address is in the first four bytes, the rest is zero.
    pub octets: [u8; 16],
}

impl Address {
    /// An IPv4 address.
    #[inline(always)]
    pub const fn v4([a, b, c, d]: [u8; 4]) -> Self {
        Self {
            family: [4, 0, 0, 0],
            octets: [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    /// An IPv6 address.
    #[inline(always)]
    pub const fn v6(octets: [u8; 16]) -> Self {
        Self {
            family: [6, 0, 0, 0],
            octets,
        }
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        // All of it: a byte that is read by itself has LLVM copy the others one by one.
        u32::from_ne_bytes(self.family) == u32::from_ne_bytes([4, 0, 0, 0])
    }

    /// The octets as words, in memory's order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        // SAFETY: as many bytes, and any are valid.
        unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(self.octets) }
    }

    /// The IPv4 address; meaningless for IPv6.
    #[inline(always)]
    pub const fn v4_octets(&self) -> [u8; 4] {
        let [a, b, c, d, ..] = self.octets;
        [a, b, c, d]
    }
}

/// A key of [`OVERLAY`] and [`ROUTES`]. Aligned, so that programs fill it word by word.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    /// Bits of `address` that count; the family's bits come first.
    pub len: u32,
    /// Family and address; the bits beyond `len` are zero.
    pub address: Address,
}

impl Prefix {
    /// The longest `len`.
    pub const BITS: u32 = 8 * size_of::<Address>() as u32;

    /// The key that looks up `address`.
    #[inline(always)]
    pub const fn host(address: Address) -> Self {
        Self {
            len: Self::BITS,
            address,
        }
    }

    /// The key of a CIDR with `len` bits.
    pub const fn cidr(address: Address, len: u8) -> Self {
        Self {
            len: 8 * size_of::<[u8; 4]>() as u32 + len as u32,
            address,
        }
    }
}

/// The data of a key of [`MASQUERADE`]: where packets go.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Way {
    /// Interface index in host byte order.
    pub link: [u8; 4],
    /// The next hop (IPv4) or the destination (IPv6).
    pub toward: Address,
}

impl Way {
    /// Out of the NIC with this index.
    #[inline(always)]
    pub const fn new(link: u32, toward: Address) -> Self {
        Self {
            link: link.to_ne_bytes(),
            toward,
        }
    }
}

/// A key of [`MASQUERADE`].
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WayPrefix {
    /// Bits of `way` that count.
    pub len: u32,
    /// NIC and address; the bits beyond `len` are zero.
    pub way: Way,
}

impl WayPrefix {
    /// The key that looks up `way`.
    #[inline(always)]
    pub const fn host(way: Way) -> Self {
        Self {
            len: 8 * size_of::<Way>() as u32,
            way,
        }
    }

    /// The key of all ways by a NIC to a CIDR with `len` bits.
    pub const fn toward(way: Way, len: u8) -> Self {
        Self {
            len: 8 * size_of::<[u32; 2]>() as u32 + len as u32,
            way,
        }
    }
}

/// What both programs must know.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// [`ABI_VERSION`] of the writer.
    pub abi_version: u32,
    /// [`Settings::FIB_MTU`], [`Settings::REJECT`], [`Settings::DRAINING`] and what of both directions is open.
    pub flags: u32,
    /// Interface index of the TUN device.
    pub tun: u32,
    /// Tunnel MTU in bytes.
    pub mtu: u32,
    /// Grows with every change of tables, routing, neighbours or policy, and is never zero: each
    /// direction of a flow is judged anew, and its next hop found anew, by its next packet.
    pub generation: u32,
    /// The bank of the policy in force (see [`crate::policy`]); zero: there are no rules.
    pub bank: u32,
    /// Most flows of a family that one peer may open, and one host of the subnet side.
    pub flows_per_source: u32,
    /// First and last port, host byte order, that a translated flow may keep from its source.
    pub kept_ports: [u16; 2],
    /// First and last port, host byte order, of those that translated flows get otherwise.
    pub ports: [u16; 2],
    /// Most flows of a family that the subnet side may open, all hosts together.
    pub flows_from_subnet: u32,
}

impl Settings {
    /// Flag: the kernel's FIB lookup answers with the MTU of the path (Linux 5.12).
    pub const FIB_MTU: u32 = 1 << 0;
    /// Flag: the senders of packets that the policy denies are told.
    pub const REJECT: u32 = 1 << 1;
    /// Flag: no rule is about the flows that peers open, so all are let through.
    pub const OPEN_FROM_OVERLAY: u32 = 1 << 2;
    /// Flag: the same of flows that the subnet side opens.
    pub const OPEN_TO_OVERLAY: u32 = 1 << 3;
    /// Flag: flows go on, and no new ones are opened.
    pub const DRAINING: u32 = 1 << 4;

    /// Whether no rule is about a flow whose source is of `class` ([`BY_ADDRESS`]: that the
    /// subnet side opens).
    #[inline(always)]
    pub const fn is_open(&self, class: u32) -> bool {
        let open = if class == BY_ADDRESS {
            Self::OPEN_TO_OVERLAY
        } else {
            Self::OPEN_FROM_OVERLAY
        };
        self.bank == 0 || self.flags & open != 0
    }
}

/// Value of [`OVERLAY`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overlay {
    /// [`Overlay::OWN`].
    pub flags: u32,
    /// Number of the peer whose allowed IP it is; the same for all of one peer's, and another for each
    /// peer, as long as they stay.
    pub peer: u32,
    /// For each bank of the policy, the number of the set of the clauses that may be used from here
    /// ([`crate::policy::Set`]); zero: there is none.
    pub classes: [u32; 2],
}

impl Overlay {
    /// Flag: the router's own address, in the middle of a peer's allowed IPs.
    pub const OWN: u32 = 1 << 0;

    /// The entry of a peer that no rule names.
    pub const fn of(peer: u32) -> Self {
        Self {
            flags: 0,
            peer,
            classes: [0; 2],
        }
    }

    /// The number of the set of clauses by the policy in `bank`, which is not zero.
    #[inline(always)]
    pub const fn class(&self, bank: u32) -> u32 {
        let [one, two] = self.classes;
        if bank == BANKS[1] { two } else { one }
    }
}

/// Value of [`ROUTES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// [`Route::STACK`] and [`Route::SNAT`], and [`Route::mtu`] from bit 16 on.
    pub flags: u32,
}

impl Route {
    /// Flag: the kernel stack must see the packets.
    pub const STACK: u32 = 1 << 0;
    /// Flag: the sources of flows that the overlay opens are translated.
    pub const SNAT: u32 = 1 << 1;

    /// MTU in bytes of the kernel's own route (`ip route … mtu`), which its FIB lookup tells only if it is
    /// locked; 65,535 where it has none.
    #[inline(always)]
    pub const fn mtu(self) -> u32 {
        match self.flags >> 16 {
            0 => u16::MAX as u32,
            mtu => mtu,
        }
    }

    /// The same with such an MTU; zero: none.
    pub const fn with_mtu(self, mtu: u16) -> Self {
        Self {
            flags: self.flags & u16::MAX as u32 | (mtu as u32) << 16,
        }
    }
}

/// Value of [`LINKS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// MTU in bytes.
    pub mtu: u32,
    /// How many of `v4` are used.
    pub v4_count: u8,
    /// How many of `v6` are used.
    pub v6_count: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// External IPv4 addresses that were chosen by hand, big-endian: what translated sources become on
    /// this link. Without any of the family, [`MASQUERADE`] tells.
    pub v4: [[u8; 4]; MAX_EXTERNAL],
    /// External IPv6 addresses that were chosen by hand, big-endian.
    pub v6: [[u8; 16]; MAX_EXTERNAL],
}

/// Value of [`COUNTERS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Packets; a super-packet counts once.
    pub packets: u64,
    /// Bytes at the IP layer.
    pub bytes: u64,
}

layout! {
    Address: 20, align 4 { family: 0, octets: 4 }
    Prefix: 24, align 8 { len: 0, address: 4 }
    Settings: 40, align 4 {
        abi_version: 0, flags: 4, tun: 8, mtu: 12, generation: 16, bank: 20, flows_per_source: 24,
        kept_ports: 28, ports: 32, flows_from_subnet: 36
    }
    Way: 24, align 4 { link: 0, toward: 4 }
    WayPrefix: 28, align 4 { len: 0, way: 4 }
    Overlay: 16, align 4 { flags: 0, peer: 4, classes: 8 }
    Route: 4, align 4 { flags: 0 }
    Link: 168, align 4 { mtu: 0, v4_count: 4, v6_count: 5, reserved: 6, v4: 8, v6: 40 }
    Counter: 16, align 8 { packets: 0, bytes: 8 }
}

#[cfg(all(feature = "user", not(target_arch = "bpf")))]
mod pod {
    macro_rules! pod {
        ($($type:ident),*) => {
            $(
                // SAFETY: `repr(C)`, integers and byte arrays only, and the sum of the fields is
                // the size (asserted above), so there is no padding.
                unsafe impl aya::Pod for super::$type {}
            )*
        };
    }

    pod!(
        Address,
        Way,
        Settings,
        Overlay,
        Route,
        Link,
        Counter,
        Denied,
        Account,
        Key4,
        Key6,
        Flow,
        Slot4,
        Slot6,
        FragmentKey,
        Fragment
    );
}

//! The flow table: two entries for each flow, one for each direction.
//!
//! The entry of a direction is found by the tuple of a packet as the program of that side sees it,
//! and says what the packet becomes. A direction's program alone writes its entry's changing
//! fields; user space reads both and deletes.

use core::mem::{align_of, offset_of, size_of};

use super::{Address, Side};

/// Map of the IPv4 flows (hash from [`Key4`] to [`Flow`]).
pub const FLOWS4: &str = "FLOWS4";
/// Map of the IPv6 flows (hash from [`Key6`] to [`Flow`]).
pub const FLOWS6: &str = "FLOWS6";
/// Map of the number of flows that a peer or a host of the subnet side has opened (hash from
/// [`Account`] to `u32`). The programs count up, user space counts anew with every sweep.
pub const SOURCES: &str = "SOURCES";
/// Map from the first fragment of a packet to those behind it (LRU hash from [`FragmentKey`] to
/// [`Fragment`]).
pub const FRAGMENTS: &str = "FRAGMENTS";
/// Map of when what this CPU may still send would be used up (per-CPU array of `u64`, ns of
/// `CLOCK_MONOTONIC`): one slot for each [`Budget`].
pub const BUDGETS: &str = "BUDGETS";

/// A slot of [`BUDGETS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Budget {
    /// Answers to senders.
    Answers,
    /// What is told of denied packets.
    Denied,
}

impl Budget {
    /// Slots of [`BUDGETS`].
    pub const COUNT: usize = 2;
}

/// Flows of each family, unless the loader sets another number.
pub const DEFAULT_FLOWS: u32 = 1 << 18;
/// Entries of [`FLOWS4`] and [`FLOWS6`] for [`DEFAULT_FLOWS`].
pub const DEFAULT_ENTRIES: usize = 2 * DEFAULT_FLOWS as usize;
/// Most accounts whose flows are counted; those beyond have no limit of their own.
pub const MAX_SOURCES: usize = 1 << 16;
/// Fragmented packets that are remembered at a time.
pub const MAX_FRAGMENTS: usize = 1 << 13;
/// Most external addresses of a link and a family.
pub const MAX_EXTERNAL: usize = 8;

/// A key of [`SOURCES`]: who opened the flows that are counted together, those of one family. Aligned, so
/// that programs fill it word by word.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Account {
    /// [`Account::PEER`], [`Account::HOST`] or [`Account::SUBNET`].
    pub kind: u8,
    /// 4 or 6.
    pub family: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// The peer's number ([`super::Overlay::peer`]) in the first four bytes, in host byte order; the host's
    /// address as in [`Address::octets`]; or zeros.
    pub id: [u8; 16],
}

impl Account {
    /// `kind`: a peer.
    pub const PEER: u8 = 1;
    /// `kind`: a host of the subnet side.
    pub const HOST: u8 = 2;
    /// `kind`: all of the subnet side.
    pub const SUBNET: u8 = 3;

    #[inline(always)]
    const fn new(kind: u8, family: u8, id: [u8; 16]) -> Self {
        Self {
            kind,
            family,
            reserved: [0; 2],
            id,
        }
    }

    /// The account of the peer with this number, of flows of the family of `address`.
    #[inline(always)]
    pub const fn peer(number: u32, address: &Address) -> Self {
        let [a, b, c, d] = number.to_ne_bytes();
        let id = [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        Self::new(Self::PEER, address.family[0], id)
    }

    /// The account of a host of the subnet side.
    #[inline(always)]
    pub const fn host(address: &Address) -> Self {
        Self::new(Self::HOST, address.family[0], address.octets)
    }

    /// The account of all hosts of the subnet side of the family of `address`.
    #[inline(always)]
    pub const fn subnet(address: &Address) -> Self {
        Self::new(Self::SUBNET, address.family[0], [0; 16])
    }
}

/// What a packet belongs to. An ICMP echo has its identifier in place of the port on the overlay
/// side, and [`Tuple::ASKED_BY_OVERLAY`] or [`Tuple::ASKED_BY_SUBNET`] in place of the other.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port, then destination port, big-endian.
    pub ports: [[u8; 2]; 2],
    /// IP protocol.
    pub protocol: u8,
}

impl Tuple {
    /// In place of the subnet-side port: the overlay side sends echo requests.
    pub const ASKED_BY_OVERLAY: [u8; 2] = [0, 0];
    /// In place of the subnet-side port: the subnet side sends echo requests.
    pub const ASKED_BY_SUBNET: [u8; 2] = [0, 1];

    /// The tuple of an answer.
    #[inline(always)]
    pub const fn reversed(&self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            ports: [self.ports[1], self.ports[0]],
            protocol: self.protocol,
        }
    }

    /// The tuple of the other direction's packets, if this is that of packets in the program of `side`,
    /// and the overlay's end is `address` and `port` on the other side.
    #[inline(always)]
    pub const fn other(&self, side: Side, address: Address, port: [u8; 2]) -> Self {
        match side {
            Side::Overlay => Self {
                source: self.destination,
                destination: address,
                ports: [self.ports[1], port],
                protocol: self.protocol,
            },
            Side::Subnet => Self {
                source: address,
                destination: self.source,
                ports: [port, self.ports[0]],
                protocol: self.protocol,
            },
        }
    }
}

/// A key of [`FLOWS4`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key4 {
    /// Source address, big-endian.
    pub source: [u8; 4],
    /// Destination address, big-endian.
    pub destination: [u8; 4],
    /// Source port, then destination port, big-endian; see [`Tuple`] for ICMP.
    pub ports: [[u8; 2]; 2],
    /// IP protocol.
    pub protocol: u8,
    /// [`Side`] as a number: the program that sees such packets.
    pub side: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

/// A key of [`FLOWS6`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key6 {
    /// Source address, big-endian.
    pub source: [u8; 16],
    /// Destination address, big-endian.
    pub destination: [u8; 16],
    /// Source port, then destination port, big-endian; see [`Tuple`] for ICMP.
    pub ports: [[u8; 2]; 2],
    /// IP protocol.
    pub protocol: u8,
    /// [`Side`] as a number: the program that sees such packets.
    pub side: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

impl Key4 {
    /// The key of IPv4 packets with `tuple` in the program of `side`.
    #[inline(always)]
    pub const fn new(side: Side, tuple: &Tuple) -> Self {
        Self {
            source: tuple.source.v4_octets(),
            destination: tuple.destination.v4_octets(),
            ports: tuple.ports,
            protocol: tuple.protocol,
            side: side as u8,
            reserved: [0; 2],
        }
    }

    /// The tuple of the packets.
    #[inline(always)]
    pub const fn tuple(&self) -> Tuple {
        Tuple {
            source: Address::v4(self.source),
            destination: Address::v4(self.destination),
            ports: self.ports,
            protocol: self.protocol,
        }
    }
}

impl Key6 {
    /// The key of IPv6 packets with `tuple` in the program of `side`.
    #[inline(always)]
    pub const fn new(side: Side, tuple: &Tuple) -> Self {
        Self {
            source: tuple.source.octets,
            destination: tuple.destination.octets,
            ports: tuple.ports,
            protocol: tuple.protocol,
            side: side as u8,
            reserved: [0; 2],
        }
    }

    /// The tuple of the packets.
    #[inline(always)]
    pub const fn tuple(&self) -> Tuple {
        Tuple {
            source: Address::v6(self.source),
            destination: Address::v6(self.destination),
            ports: self.ports,
            protocol: self.protocol,
        }
    }
}

/// An entry of the flow table. Of an IPv4 flow the first [`Flow::V4_LEN`] bytes are all that is in use.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// When a packet of this direction last passed, in ns of `CLOCK_MONOTONIC`; up to
    /// [`Flow::COARSE`] old.
    pub last_used: u64,
    /// [`super::Settings::generation`] under which the flow was last judged and, from the overlay,
    /// its next hop was found; zero: never.
    pub generation: u32,
    /// Interface index of the next hop; only from the overlay.
    pub link: u32,
    /// Last acknowledgement number that this direction has sent; only TCP.
    pub acknowledged: u32,
    /// MTU in bytes of the path of this direction.
    pub mtu: u16,
    /// Zero.
    pub reserved: [u8; 2],
    /// Destination, then source hardware address of the next hop; only from the overlay.
    pub hardware: [u8; 12],
    /// The port (or ICMP identifier) that goes with `address`, big-endian.
    pub port: [u8; 2],
    /// What of TCP was seen in this direction: [`Flow::SYN`] and the like.
    pub tcp: u8,
    /// [`Flow::SNAT`] and [`Flow::FROM_SUBNET`].
    pub flags: u8,
    /// Source address that packets from the overlay get, destination address that packets from the
    /// subnet get; as in [`Address::octets`].
    pub address: [u8; 16],
}

impl Flow {
    /// Flag: source address and port of the overlay side are translated.
    pub const SNAT: u8 = 1 << 0;
    /// Flag: the subnet side has opened the flow.
    pub const FROM_SUBNET: u8 = 1 << 1;

    /// TCP: a SYN.
    pub const SYN: u8 = 1 << 0;
    /// TCP: a FIN.
    pub const FIN: u8 = 1 << 1;
    /// TCP: an RST that the other side will believe, and nothing since.
    pub const RST: u8 = 1 << 2;
    /// TCP: an acknowledgement without SYN.
    pub const ACK: u8 = 1 << 3;
    /// TCP: a connection of the router itself, or one that its kernel translates, has got the translated
    /// port since. The flow is over.
    pub const LOST: u8 = 1 << 4;

    /// Bytes of an entry that are in use for IPv4, in whole words; those behind are zero.
    pub const V4_LEN: usize = 48;

    /// How old `last_used` may be of a flow that is in use, in ns: it is not written more often.
    pub const COARSE: u64 = 1_000_000_000;

    /// The entry as words.
    pub fn words(&self) -> [u64; size_of::<Self>() / 8] {
        // SAFETY: as long and as aligned as the words, and made of integers.
        unsafe { *core::ptr::from_ref(self).cast() }
    }

    /// The entry of which these are the first words; what is missing is zero.
    pub fn from_words(words: &[u64]) -> Self {
        let mut all = [0; size_of::<Self>() / 8];
        for (word, value) in all.iter_mut().zip(words) {
            *word = *value;
        }
        // SAFETY: as long and as aligned as the entry, and any bytes are valid in it.
        unsafe { core::mem::transmute(all) }
    }

    /// The tuple of the other direction's packets, as the other side's program sees them; `tuple`
    /// and `side` are those of this entry's key.
    #[inline(always)]
    pub const fn other(&self, side: Side, tuple: &Tuple) -> (Side, Tuple) {
        let address = Address {
            family: tuple.source.family,
            octets: self.address,
        };
        (side.other(), tuple.other(side, address, self.port))
    }
}

/// A key of [`FRAGMENTS`].
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// Source address as in [`Address::octets`].
    pub source: [u8; 16],
    /// Destination address as in [`Address::octets`].
    pub destination: [u8; 16],
    /// Identification; of IPv4 in the last two bytes.
    pub id: [u8; 4],
    /// IP protocol.
    pub protocol: u8,
    /// [`Side`] as a number.
    pub side: u8,
    /// 4 or 6.
    pub family: u8,
    /// Zero.
    pub reserved: u8,
}

/// Value of [`FRAGMENTS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// The ports of the packet, as in [`Tuple::ports`].
    pub ports: [[u8; 2]; 2],
    /// [`Fragment::STACK`] and [`Fragment::EARLY`].
    pub flags: u32,
    /// When it came, in units of 2^20 ns of `CLOCK_MONOTONIC`, of which the lowest 32 bits.
    pub since: u32,
}

impl Fragment {
    /// How long in units of `since` the fragments of a packet belong together: half a minute, as in Linux
    /// (`ipfrag_time`). After that its identification may be another packet's.
    pub const LASTS: u32 = (30_000_000_000_u64 >> 20) as u32;

    /// `since` at `now`, in ns of `CLOCK_MONOTONIC`.
    #[inline(always)]
    pub const fn stamp(now: u64) -> u32 {
        (now >> 20) as u32
    }

    /// Flag: all fragments of the packet go to the kernel, which puts them together and cuts them
    /// anew.
    pub const STACK: u32 = 1 << 0;
    /// Flag: a later fragment came before the first, so the ports are not known.
    pub const EARLY: u32 = 1 << 1;
}

layout! {
    Account: 20, align 4 { kind: 0, family: 1, reserved: 2, id: 4 }
    Key4: 16, align 8 { source: 0, destination: 4, ports: 8, protocol: 12, side: 13, reserved: 14 }
    Key6: 40, align 8 { source: 0, destination: 16, ports: 32, protocol: 36, side: 37, reserved: 38 }
    Flow: 56, align 8 {
        last_used: 0, generation: 8, link: 12, acknowledged: 16, mtu: 20, reserved: 22, hardware: 24,
        port: 36, tcp: 38, flags: 39, address: 40
    }
    FragmentKey: 40, align 8 { source: 0, destination: 16, id: 32, protocol: 36, side: 37, family: 38, reserved: 39 }
    Fragment: 12, align 4 { ports: 0, flags: 4, since: 8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_direction_leads_to_the_other() {
        let tuple = Tuple {
            source: Address::v4([100, 64, 0, 2]),
            destination: Address::v4([10, 0, 0, 2]),
            ports: [[1, 2], [3, 4]],
            protocol: 6,
        };
        let forward = Flow {
            address: Address::v4([10, 0, 0, 9]).octets,
            port: [5, 6],
            ..Flow::default()
        };
        let (side, reply) = forward.other(Side::Overlay, &tuple);
        let wanted = Tuple {
            source: Address::v4([10, 0, 0, 2]),
            destination: Address::v4([10, 0, 0, 9]),
            ports: [[3, 4], [5, 6]],
            protocol: 6,
        };
        assert_eq!((side, reply), (Side::Subnet, wanted));
        let backward = Flow {
            address: tuple.source.octets,
            port: tuple.ports[0],
            ..Flow::default()
        };
        assert_eq!(backward.other(side, &reply), (Side::Overlay, tuple));
        assert_eq!(Key4::new(side, &reply).tuple(), reply);
        assert_eq!(tuple.reversed().reversed(), tuple);
    }
}

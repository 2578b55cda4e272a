//! The expressions of an nf_tables rule, as far as Sluice needs them.
//!
//! Each method appends one expression; a rule matches when none of them breaks off. Numbers are
//! those of `include/uapi/linux/netfilter/nf_tables.h`.

use crate::netlink::wire::Payload;

/// The register that a verdict is put in.
pub(super) const VERDICT: u32 = 0;
/// A register of 16 bytes.
pub(crate) const REG: u32 = 1;
/// Another register of 16 bytes.
pub(crate) const REG_2: u32 = 2;
/// A third register of 16 bytes.
pub(crate) const REG_3: u32 = 3;
/// The first of sixteen registers of four bytes that lie behind each other: a key of several
/// fields is put together there. The first four of them are [`REG`].
pub(crate) const WORD: u32 = 8;

/// What the packet itself tells.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Meta {
    /// Mark; host order.
    Mark,
    /// Priority, by which it is queued; host order.
    Priority,
    /// Index of the interface it came in by; host order.
    Iif,
    /// Index of the interface it leaves by; host order.
    Oif,
    /// Kind of the interface it leaves by ([`LOOPBACK`] and the like); two bytes, host order.
    OifKind,
    /// 2 for IPv4, 10 for IPv6; one byte.
    NfProto,
    /// IP protocol behind all extension headers; one byte.
    L4Proto,
}

impl Meta {
    fn number(self) -> u32 {
        match self {
            Self::Priority => 2,
            Self::Mark => 3,
            Self::Iif => 4,
            Self::Oif => 5,
            Self::OifKind => 9,
            Self::NfProto => 15,
            Self::L4Proto => 16,
        }
    }
}

/// `ARPHRD_LOOPBACK` of linux/if_arp.h, as [`Meta::OifKind`] tells it.
pub(crate) const LOOPBACK: u16 = 772;

/// What connection tracking tells.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ct {
    /// State bits ([`CT_INVALID`] and its like); host order.
    State,
    /// IPv4 source of the flow's first packet, before any translation.
    OriginalSource4,
    /// IPv4 destination of the flow's first packet, before any translation.
    OriginalDestination4,
    /// IPv6 source of the flow's first packet, before any translation.
    OriginalSource6,
    /// IPv6 destination of the flow's first packet, before any translation.
    OriginalDestination6,
}

/// `ct state invalid`.
pub(crate) const CT_INVALID: u32 = 1;
/// `ct state new`.
pub(crate) const CT_NEW: u32 = 8;
/// `ct state untracked`.
pub(crate) const CT_UNTRACKED: u32 = 64;
/// `ct state established,related`.
pub(crate) const CT_ESTABLISHED_RELATED: u32 = 2 | 4;

/// Where in the packet to look.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Base {
    /// IP header.
    Network,
    /// TCP, UDP or ICMP header.
    Transport,
}

/// How to compare; the bytes are compared from the first one on, as numbers in network order.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cmp {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// The register is less than the value.
    Lt,
    /// The register is at most the value.
    Le,
    /// The register is greater than the value.
    Gt,
    /// The register is at least the value.
    Ge,
}

/// What the sender of a packet is told.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Reject {
    /// A TCP RST.
    Reset,
    /// The ICMP error "administratively prohibited" of the packet's family.
    Prohibited,
}

/// `RTN_BROADCAST` of linux/rtnetlink.h, as [`Rule::destination_type`] loads it.
pub(crate) const BROADCAST: u32 = 3;
/// `RTN_MULTICAST`.
pub(crate) const MULTICAST: u32 = 5;

/// Where a packet goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Verdict<'a> {
    /// Out of the table, unhindered by it.
    Accept,
    /// Away.
    Drop,
    /// Into a chain, and back to the next rule if that does not decide.
    Jump(&'a str),
    /// Into a chain for good.
    Goto(&'a str),
    /// Back to the chain that has jumped here.
    Return,
}

/// The expressions of a rule under construction.
pub(crate) struct Rule<'a, 'b>(&'a mut Payload<'b>);

impl<'a, 'b> Rule<'a, 'b> {
    pub(super) fn new(list: &'a mut Payload<'b>) -> Self {
        Self(list)
    }

    fn expression(&mut self, name: &str, write: impl FnOnce(&mut Payload<'_>)) -> &mut Self {
        const LIST_ELEMENT: u16 = 1;
        const NAME: u16 = 1;
        const DATA: u16 = 2;
        self.0.nested(LIST_ELEMENT, |expression| {
            expression.text(NAME, name);
            expression.nested(DATA, write);
        });
        self
    }

    /// Loads what the packet tells.
    pub(crate) fn meta(&mut self, key: Meta, register: u32) -> &mut Self {
        let key = key.number();
        self.expression("meta", |data| {
            data.be32(1, register);
            data.be32(2, key);
        })
    }

    /// Takes bits off the packet's mark.
    pub(crate) fn unmark(&mut self, bits: u32, register: u32) -> &mut Self {
        self.meta(Meta::Mark, register)
            .and(register, &(!bits).to_ne_bytes())
            .set_meta(Meta::Mark, register)
    }

    /// Makes the packet's mark or priority that of the register.
    pub(crate) fn set_meta(&mut self, key: Meta, register: u32) -> &mut Self {
        let key = key.number();
        self.expression("meta", |data| {
            data.be32(2, key);
            data.be32(3, register);
        })
    }

    /// Loads what connection tracking tells; the rule does not match an untracked packet.
    pub(crate) fn ct(&mut self, key: Ct, register: u32) -> &mut Self {
        const ORIGINAL: u8 = 0;
        let (key, directed) = match key {
            Ct::State => (0, false),
            Ct::OriginalSource4 => (19, true),
            Ct::OriginalDestination4 => (20, true),
            Ct::OriginalSource6 => (21, true),
            Ct::OriginalDestination6 => (22, true),
        };
        self.expression("ct", |data| {
            data.be32(1, register);
            data.be32(2, key);
            if directed {
                data.attribute(3, &[ORIGINAL]);
            }
        })
    }

    /// Loads one byte of the socket of this machine that the packet is for; without one the rule does
    /// not match. In [`super::Hook::Input`].
    pub(crate) fn own_socket(&mut self, register: u32) -> &mut Self {
        const TRANSPARENT: u32 = 0;
        self.expression("socket", |data| {
            data.be32(1, TRANSPARENT);
            data.be32(2, register);
        })
    }

    /// Keeps the packet out of connection tracking; in [`super::Hook::Raw`].
    pub(crate) fn no_track(&mut self) -> &mut Self {
        self.expression("notrack", |_| ())
    }

    /// Loads bytes of the packet.
    pub(crate) fn payload(
        &mut self,
        base: Base,
        offset: u32,
        len: u32,
        register: u32,
    ) -> &mut Self {
        let base = match base {
            Base::Network => 1,
            Base::Transport => 2,
        };
        self.expression("payload", |data| {
            data.be32(1, register);
            data.be32(2, base);
            data.be32(3, offset);
            data.be32(4, len);
        })
    }

    /// Goes on only when the comparison holds.
    pub(crate) fn cmp(&mut self, op: Cmp, register: u32, value: &[u8]) -> &mut Self {
        let op = match op {
            Cmp::Eq => 0,
            Cmp::Ne => 1,
            Cmp::Lt => 2,
            Cmp::Le => 3,
            Cmp::Gt => 4,
            Cmp::Ge => 5,
        };
        self.expression("cmp", |data| {
            data.be32(1, register);
            data.be32(2, op);
            data.nested(3, |value_of| value_of.attribute(1, value));
        })
    }

    /// Goes on only when some bit of `mask` is set in the register.
    pub(crate) fn any_bit(&mut self, register: u32, mask: &[u8]) -> &mut Self {
        let zero = vec![0; mask.len()];
        self.and(register, mask).cmp(Cmp::Ne, register, &zero)
    }

    /// Keeps only the bits of `mask` in the register.
    pub(crate) fn and(&mut self, register: u32, mask: &[u8]) -> &mut Self {
        self.expression("bitwise", |data| {
            data.be32(1, register);
            data.be32(2, register);
            data.be32(3, mask.len() as u32);
            data.nested(4, |value| value.attribute(1, mask));
            data.nested(5, |value| value.attribute(1, &vec![0; mask.len()]));
        })
    }

    /// Goes on only when the register is in a set.
    pub(crate) fn lookup(&mut self, set: &str, register: u32) -> &mut Self {
        self.lookup_into(set, register, None)
    }

    /// Loads the number that a map has for the register, and goes on only when it has one.
    pub(crate) fn number_of(&mut self, map: &str, register: u32, into: u32) -> &mut Self {
        self.lookup_into(map, register, Some(into))
    }

    /// Sends the packet to the chain that the map has for the register, and goes on when it has
    /// none, or that chain does not decide.
    pub(crate) fn dispatch(&mut self, map: &str, register: u32) -> &mut Self {
        self.lookup_into(map, register, Some(VERDICT))
    }

    fn lookup_into(&mut self, set: &str, source: u32, into: Option<u32>) -> &mut Self {
        self.expression("lookup", |data| {
            data.text(1, set);
            data.be32(2, source);
            if let Some(into) = into {
                data.be32(3, into);
            }
        })
    }

    /// Counts the packet in a named counter.
    pub(crate) fn count(&mut self, counter: &str) -> &mut Self {
        self.expression("objref", |data| {
            data.be32(1, super::COUNTER);
            data.text(2, counter);
        })
    }

    /// Loads the MSS option of a TCP header (RFC 9293 section 3.7.1); network order, two bytes.
    pub(crate) fn mss(&mut self, register: u32) -> &mut Self {
        self.mss_option(1, register)
    }

    /// Lowers the MSS option to the register's value; it is never raised (nft_exthdr.c).
    pub(crate) fn lower_mss(&mut self, register: u32) -> &mut Self {
        self.mss_option(7, register)
    }

    fn mss_option(&mut self, register_kind: u16, register: u32) -> &mut Self {
        const TCP_OPTION: u32 = 1;
        const OPTION_MSS: u8 = 2;
        self.expression("exthdr", |data| {
            data.be32(register_kind, register);
            data.attribute(2, &[OPTION_MSS]);
            data.be32(3, 2);
            data.be32(4, 2);
            data.be32(6, TCP_OPTION);
        })
    }

    /// Loads the largest MSS that the routes to both ends allow; network order, two bytes.
    pub(crate) fn route_mss(&mut self, register: u32) -> &mut Self {
        const TCP_MSS: u32 = 3;
        const HOST_TO_NETWORK: u32 = 1;
        self.expression("rt", |data| {
            data.be32(1, register);
            data.be32(2, TCP_MSS);
        });
        self.expression("byteorder", |data| {
            data.be32(1, register);
            data.be32(2, register);
            data.be32(3, HOST_TO_NETWORK);
            data.be32(4, 2);
            data.be32(5, 2);
        })
    }

    /// Loads a value.
    pub(crate) fn load(&mut self, register: u32, value: &[u8]) -> &mut Self {
        self.expression("immediate", |data| {
            data.be32(1, register);
            data.nested(2, |value_of| value_of.attribute(1, value));
        })
    }

    /// Translates the source to the address of the interface that the packet leaves by, with a
    /// port (or ICMP id) between those in two registers, network order.
    pub(crate) fn masquerade(&mut self, first_port: u32, last_port: u32) -> &mut Self {
        const PROTO_SPECIFIED: u32 = 2;
        self.expression("masq", |data| {
            data.be32(1, PROTO_SPECIFIED);
            data.be32(2, first_port);
            data.be32(3, last_port);
        })
    }

    /// Translates the source to an address and a port (or ICMP id) between two; all in registers,
    /// network order.
    pub(crate) fn source_nat(
        &mut self,
        nf_proto: u8,
        address: u32,
        first_port: u32,
        last_port: u32,
    ) -> &mut Self {
        const SOURCE: u32 = 0;
        self.expression("nat", |data| {
            data.be32(1, SOURCE);
            data.be32(2, nf_proto.into());
            data.be32(3, address);
            data.be32(5, first_port);
            data.be32(6, last_port);
        })
    }

    /// Loads a number below `modulus`, which is at least two: Jenkins's hash with seed zero of `len`
    /// bytes of a register; host order.
    pub(crate) fn hash(&mut self, from: u32, len: u32, modulus: u32, into: u32) -> &mut Self {
        const JENKINS: u32 = 0;
        self.expression("hash", |data| {
            data.be32(1, from);
            data.be32(2, into);
            data.be32(3, len);
            data.be32(4, modulus);
            data.be32(5, 0);
            data.be32(7, JENKINS);
        })
    }

    /// Loads what the routing takes the destination for ([`BROADCAST`] and the like); host order.
    pub(crate) fn destination_type(&mut self, register: u32) -> &mut Self {
        const ADDRESS_TYPE: u32 = 3;
        const OF_DESTINATION: u32 = 2;
        self.expression("fib", |data| {
            data.be32(1, register);
            data.be32(2, ADDRESS_TYPE);
            data.be32(3, OF_DESTINATION);
        })
    }

    /// Goes on for no more packets than `rate` a second, and `burst` at once.
    pub(crate) fn limit(&mut self, rate: u64, burst: u32) -> &mut Self {
        const SECONDS: u64 = 1;
        const PACKETS: u32 = 0;
        self.expression("limit", |data| {
            data.attribute(1, &rate.to_be_bytes());
            data.attribute(2, &SECONDS.to_be_bytes());
            data.be32(3, burst);
            data.be32(4, PACKETS);
        })
    }

    /// Ends the packet, and tells its sender; not in every hook.
    pub(crate) fn reject(&mut self, reject: Reject) -> &mut Self {
        const RESET: u32 = 1;
        const ICMP_OF_FAMILY: u32 = 2;
        const PROHIBITED: u8 = 3;
        self.expression("reject", |data| match reject {
            Reject::Reset => data.be32(1, RESET),
            Reject::Prohibited => {
                data.be32(1, ICMP_OF_FAMILY);
                data.attribute(2, &[PROHIBITED]);
            }
        })
    }

    /// Decides.
    pub(crate) fn verdict(&mut self, verdict: Verdict<'_>) -> &mut Self {
        self.expression("immediate", |data| {
            data.be32(1, VERDICT);
            data.nested(2, |value| write_verdict(value, verdict));
        })
    }
}

/// Writes a verdict as the data of an expression or of a map's element.
pub(super) fn write_verdict(data: &mut Payload<'_>, verdict: Verdict<'_>) {
    let (code, chain): (i32, _) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    data.nested(2, |verdict| {
        verdict.be32(1, code.cast_unsigned());
        if let Some(chain) = chain {
            verdict.text(2, chain);
        }
    });
}
